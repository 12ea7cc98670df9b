"""Reading images that lie in one folder a class, as `train/angry/1.jpg` or as `angry/1.jpg`.

The folders give the labels; ids are the file names without suffix where these are unique.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from foldwise.data.readers.handout import PART, ColumnsSpec, FilesSpec, HandOut, HandOutError, Table, safe_id, shown
from foldwise.data.readers.images import SUFFIXES
from foldwise.data.readers.table import MEMBER_BYTES
from foldwise.errors import Fault

# Folders that are parts and no classes, by what a split uses them for.
TRAIN = frozenset({"train", "training"})
VAL = frozenset({"val", "valid", "validation", "publictest"})
TEST = frozenset({"test", "testing", "privatetest"})
PARTS = TRAIN | VAL | TEST


class _File(NamedTuple):
    path: Path
    part: str
    label: str


@contextmanager
def open_folders(source: Path, columns: ColumnsSpec, faults: list[Fault]) -> Iterator[HandOut]:
    """Open a hand-out of class folders, below `train/`, `test/` and the like or directly in `source`.

    Images directly in a part's folder have no label.

    Args:
        source: Its folder.
        columns: What to call the columns of ids and labels.
        faults: Takes what is wrong and leaves the rest readable.

    Raises:
        HandOutError: If there is no labelled image.
    """
    files, aside = _files(source)
    if not any(file.label for file in files):
        fix = "put the images into one folder a class, below train/ or not"
        raise HandOutError([*faults, Fault(shown(source), "there is no class folder with images", fix)])
    stems = Counter(file.path.stem for file in files)
    unique = max(stems.values()) == 1
    file_of: dict[str, _File] = {}
    for file in files:
        stem = file.path.stem
        image = stem if unique else "-".join(filter(None, [file.part, file.label, stem]))
        if image in file_of:
            what = f"is a second file of the id {image!r}, after {file_of[image].path.name}"
            faults.append(Fault(shown(file.path), what, "keep one file an id"))
        elif not safe_id(image):
            faults.append(Fault(shown(file.path), f"{image!r} cannot be an id", r"rename it without \ : * { }"))
        else:
            file_of[image] = file

    def read(image: str, faults: list[Fault]) -> bytes | None:
        path = file_of[image].path
        try:
            if (size := path.stat().st_size) > MEMBER_BYTES:
                what = f"has {size:,} bytes, more than {MEMBER_BYTES:,}"
                faults.append(Fault(shown(path), what, "remove it; no image is that large"))
                return None
            return path.read_bytes()
        except OSError as error:
            faults.append(Fault(shown(path), f"cannot be read: {error.strerror}", "fetch it again; it is damaged"))
            return None

    parts = any(file.part for file in files)
    labelled = {image: file for image, file in file_of.items() if file.label}
    yield HandOut(
        format="folders",
        source=source,
        table=Table(
            (columns.id, columns.label, *([PART] if parts else [])),
            tuple((image, file.label, *([file.part] if parts else [])) for image, file in labelled.items()),
            tuple(shown(file.path) for file in labelled.values()),
        ),
        names={image: f"{image}{file.path.suffix}" for image, file in file_of.items()},
        read=read,
        where=lambda image: shown(file_of[image].path),
        columns=columns,
        files=FilesSpec(),
        part=PART if parts else "",
        notes=(f"{shown(source)}: files left aside as no images: {len(aside)}, first {shown(aside[0])}",)
        if aside
        else (),
    )


def class_folders(source: Path) -> list[str]:
    """The class folders of a folder, as paths below it; empty where there are fewer than two."""
    parts = _parts(source)
    tops = parts or [source]
    found = [folder.relative_to(source).as_posix() for top in tops for folder in _folders(top) if _has_image(folder)]
    return found if len({Path(folder).name for folder in found}) > 1 else []


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX")))


def _parts(source: Path) -> list[Path]:
    order = (TRAIN, VAL, TEST)
    found = [path for path in _folders(source) if path.name.lower() in PARTS]
    return sorted(found, key=lambda path: [path.name.lower() in kind for kind in order].index(True))


def _has_image(folder: Path) -> bool:
    return any(_is_image(path) for path in folder.iterdir())


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _files(source: Path) -> tuple[list[_File], list[Path]]:
    """The images with part and class, and what is none."""
    files: list[_File] = []
    aside: list[Path] = []

    def take(folder: Path, part: str, label: str) -> None:
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or (path.is_dir() and not label):
                continue
            if _is_image(path):
                files.append(_File(path, part, label))
            else:
                aside.append(path)

    parts = _parts(source)
    for top in parts or [source]:
        part = top.name if parts else ""
        if part:
            take(top, part, "")
        for folder in _folders(top):
            if part or _has_image(folder):
                take(folder, part, folder.name)
    return files, aside
