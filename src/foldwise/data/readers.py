"""Reading what a competition handed out: a table of labels, and images in a zip or a folder.

Nothing is trusted: every reader collects located faults, and the caller raises them all at once.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from pydantic import Field, field_validator

from foldwise.errors import DataError, Fault
from foldwise.spec.model import Section
from foldwise.spec.yaml import nearest

# Part of the cache's key: raise it when `decode` gives other pixels for the same bytes.
DECODER_VERSION = 1

# Formats that Pillow decodes by itself; others (EPS) start programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# No honest image file is larger, and no honest hand-out unpacks to more.
MEMBER_BYTES = 64 * 2**20
ARCHIVE_BYTES = 256 * 2**30

# Faults of one kind beyond these are counted, not listed.
LISTED = 20


class ImageSpec(Section):
    """What every image is brought to when it is decoded."""

    height: int = Field(ge=1, le=4096, description="px")
    width: int = Field(ge=1, le=4096, description="px")
    channels: Literal[1, 3] = Field(description="1: gray, 3: RGB.")
    fit: Literal["exact", "letterbox", "crop", "squash"] = Field(
        "exact",
        description="exact: another size is a fault; letterbox: scaled to fit, black borders; crop: scaled to fill, "
        "centre kept; squash: scaled to both sides, shape lost.",
    )


class ColumnsSpec(Section):
    """The columns of train.csv and of the submission."""

    id: str = "id"
    label: str = "label"


class FilesSpec(Section):
    """What was handed out, by name."""

    train: str = "train.csv"
    images: str = Field(
        "dataset.zip", description="A zip; where it is not there, the images lie unpacked beside train.csv."
    )
    pattern: str = Field("{id}.jpg", description="From an id to its file's name.")

    @field_validator("pattern")
    @classmethod
    def _holds_one_id(cls, value: str) -> str:
        if not re.fullmatch(r"[^/\\{}]*\{id\}[^/\\{}]*", value):
            raise ValueError(f"expected a file name with `{{id}}` in it, e.g. '{{id}}.jpg', but got {value!r}")
        return value

    def file_of(self, image: str) -> str:
        """The name of an id's file."""
        return self.pattern.replace("{id}", image)

    def id_of(self, file: str) -> str | None:
        """The id that a file's name stands for; None where it does not fit the pattern."""
        before, after = self.pattern.split("{id}")
        image = file[len(before) : len(file) - len(after)]
        return image if image and file == self.file_of(image) else None


class HandOutError(DataError):
    """Faults of a hand-out: all in `faults`, alike ones together; the message lists the first 20 of a kind."""

    def __str__(self) -> str:
        """List the faults by kind (one mend, one kind) with the mend once at the end of each."""
        kinds: dict[str, list[Fault]] = {}
        for fault in self.faults:
            kinds.setdefault(fault.fix or fault.what, []).append(fault)
        lines = []
        for alike in kinds.values():
            lines += [str(replace(fault, fix="")) for fault in alike[:LISTED]]
            if len(alike) > LISTED:
                lines.append(f"  ... and {len(alike) - LISTED} more like these")
            if alike[0].fix:
                lines.append(f"  fix: {alike[0].fix}")
        count = len(self.faults)
        return "\n".join([*lines, f"{count} {'error' if count == 1 else 'errors'}; {self.consequence}."])


def shown(path: Path) -> str:
    """`path` as messages name it: relative to the working directory where it lies below."""
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()


@dataclass(frozen=True)
class Table:
    """A table of labels as it was read; rows with a fault are left out.

    Attributes:
        header: Column names.
        rows: Cells, as text.
        lines: Line of each row in the file, from 1.
        notes: Harmless oddities that were read right, e.g. CRLF line ends.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]
    notes: tuple[str, ...]

    def column(self, name: str) -> list[str]:
        """The cells of one column."""
        place = self.header.index(name)
        return [row[place] for row in self.rows]

    def csv(self) -> str:
        """The table as normal CSV: UTF-8 without a mark, LF."""
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()


def read_table(
    path: Path,
    columns: ColumnsSpec,
    faults: list[Fault],
    *,
    classes: Sequence[str] = (),
    part: str = "",
    parts: Sequence[str] = (),
) -> Table | None:
    """Read train.csv.

    Args:
        path: The file.
        columns: Names of its id and label columns.
        faults: Takes what is wrong, with file and row.
        classes: The labels there are; empty: any.
        part: Name of the column that says who is trained on, if there is one.
        parts: The values of that column.

    Returns:
        The table, or None where the file as a whole cannot be read.
    """
    where = shown(path)
    text, notes = _text(path, where, faults)
    if text is None:
        return None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = tuple(next(reader, ()))
        needed = [columns.id, columns.label, *([part] if part else [])]
        for name in needed:
            if name not in header:
                near = nearest(name, header)
                what = f"there is no column {name!r}; columns: {', '.join(header) or 'none'}"
                what += f" (did you mean {near!r}?)" if near else ""
                faults.append(Fault(f"{where}:1", what, "name the columns in competition.yaml, under `columns`"))
            elif header.count(name) > 1:
                faults.append(Fault(f"{where}:1", f"column {name!r} is there twice", "remove one of the two"))
        if any(header.count(name) != 1 for name in needed):
            return None
        places = {name: header.index(name) for name in needed}

        rows: list[tuple[str, ...]] = []
        lines: list[int] = []
        first: dict[str, int] = {}
        for cells in reader:
            line = reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                what = f"expected {len(header)} cells, but got {len(cells)}"
                faults.append(
                    Fault(f"{where}:{line}", what, "give every row as many cells as the header; quote commas")
                )
                continue
            blank = [name for name in needed if not cells[places[name]].strip()]
            if blank:
                what = f"{' and '.join(blank)} {'is' if len(blank) == 1 else 'are'} blank"
                faults.append(Fault(f"{where}:{line}", what, "fill it in, or remove the row"))
                continue
            image, label = cells[places[columns.id]], cells[places[columns.label]]
            if image in first:
                what = f"{columns.id} {image!r} is there twice, first in line {first[image]}"
                faults.append(Fault(f"{where}:{line}", what, "keep one row an id"))
            first.setdefault(image, line)
            if classes and label not in classes:
                fix = f"labels are: {', '.join(classes)}"
                faults.append(Fault(f"{where}:{line}", _unknown("label", label, classes), fix))
            if parts and cells[places[part]] not in parts:
                fix = f"give the value to one part in competition.yaml, under `split`; known are: {', '.join(parts)}"
                faults.append(Fault(f"{where}:{line}", _unknown(part, cells[places[part]], parts), fix))
            rows.append(tuple(cells))
            lines.append(line)
    except csv.Error as error:
        faults.append(Fault(f"{where}:{reader.line_num}", f"not CSV: {error}", "quote cells as RFC 4180 says"))
        return None
    if not rows and not faults:
        faults.append(Fault(where, "there is no row below the header", "give the labelled images, one a row"))
    return Table(header, tuple(rows), tuple(lines), notes)


def _text(path: Path, where: str, faults: list[Fault]) -> tuple[str | None, tuple[str, ...]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
        faults.append(Fault(where, reason, "put it there, or name it in competition.yaml, under `files`"))
        return None, ()
    notes = []
    if content.startswith(b"\xef\xbb\xbf"):
        notes.append(f"{where} starts with a byte order mark; it was dropped")
    if b"\r\n" in content:
        notes.append(f"{where} has CRLF line ends; they were read as LF")
    try:
        return content.decode("utf-8-sig"), tuple(notes)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"expected UTF-8 text, but got the byte 0x{content[error.start]:02x}"
        faults.append(Fault(f"{where}:{line}", what, "save the file as UTF-8"))
        return None, ()


def _unknown(what: str, value: str, known: Sequence[str]) -> str:
    near = nearest(value.strip(), known)
    return f"unknown {what} {value!r}" + (f" (did you mean {near!r}?)" if near else "")


class ImageFiles:
    """The image files of a hand-out by name, wherever they lie; made by `open_images`.

    Attributes:
        source: The zip or the folder.
        files: From a file's name to its member of the zip, or its path below the folder.
        notes: Files that were left aside.
    """

    def __init__(self, source: Path, files: dict[str, str], notes: list[str], archive: zipfile.ZipFile | None) -> None:
        self.source = source
        self.files = files
        self.notes = tuple(notes)
        self._archive = archive

    def where(self, name: str) -> str:
        """How messages name the file."""
        return f"{shown(self.source)}{':' if self._archive else '/'}{self.files[name]}"

    def read(self, name: str, faults: list[Fault]) -> bytes | None:
        """The file's bytes, or None with a fault."""
        try:
            if self._archive is None:
                return (self.source / self.files[name]).read_bytes()
            return self._archive.read(self.files[name])
        except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, ValueError) as error:
            faults.append(
                Fault(self.where(name), f"cannot be read: {error}", "fetch the hand-out again; it is damaged")
            )
            return None


@contextmanager
def open_images(folder: Path, images: str, faults: list[Fault]) -> Iterator[ImageFiles | None]:
    """Find the image files of a hand-out.

    Args:
        folder: Holds the zip `images`, or the unpacked images, flat or all in one sub-folder.
        images: Name of the zip.
        faults: Takes what is wrong.

    Yields:
        The files, or None where there are none.
    """
    path = folder / images
    if not path.is_file():
        found, notes = _one_folder(_unpacked(folder), shown(folder), faults)
        if not found and not faults:
            what = f"there is neither {images} nor an image"
            faults.append(
                Fault(shown(folder), what, "put the images there, zipped or not; or see `files` in competition.yaml")
            )
        yield ImageFiles(folder, found, notes, None) if found else None
        return
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        faults.append(
            Fault(shown(path), f"cannot be read as a zip: {error}", "fetch the hand-out again; it is damaged")
        )
        yield None
        return
    with archive:
        found, notes = _one_folder(_members(archive, shown(path), faults), shown(path), faults)
        if not found and not faults:
            faults.append(Fault(shown(path), "there is no image in it", "zip the images, flat or in one folder"))
        yield ImageFiles(path, found, notes, archive) if found else None


def _unpacked(folder: Path) -> list[str]:
    return [
        path.relative_to(folder).as_posix()
        for pattern in ("*", "*/*")
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    ]


def _members(archive: zipfile.ZipFile, where: str, faults: list[Fault]) -> list[str]:
    names = []
    total = 0
    for member in archive.infolist():
        if member.is_dir():
            continue
        parts = PurePosixPath(member.filename.replace("\\", "/")).parts
        if ".." in parts or member.filename.startswith(("/", "\\")) or ":" in parts[0]:
            fix = "do not unpack it; ask for an archive that stays in its own folder"
            faults.append(Fault(f"{where}:{member.filename}", "leads out of the archive's folder", fix))
        elif member.flag_bits & 1:
            faults.append(Fault(f"{where}:{member.filename}", "is encrypted", "unpack it, and give the folder"))
        elif member.file_size > MEMBER_BYTES:
            what = f"unpacks to {member.file_size:,} bytes, more than {MEMBER_BYTES:,}"
            faults.append(Fault(f"{where}:{member.filename}", what, "remove it; no image is that large"))
        else:
            names.append(member.filename)
            total += member.file_size
    if total > ARCHIVE_BYTES:
        what = f"unpacks to {total:,} bytes, more than {ARCHIVE_BYTES:,}"
        faults.append(Fault(where, what, "unpack it, and give the folder"))
        return []
    return names


def _one_folder(paths: Sequence[str], where: str, faults: list[Fault]) -> tuple[dict[str, str], list[str]]:
    """Names to paths of the images among `paths`, which must lie in one folder, and notes on what is none."""
    folders: dict[str, dict[str, str]] = {}
    aside = []
    for path in paths:
        parts = PurePosixPath(path).parts
        if "__MACOSX" in parts or any(part.startswith(".") for part in parts):
            continue
        inner = folders.setdefault("/".join(parts[:-1]), {})
        if PurePosixPath(path).suffix.lower() not in SUFFIXES:
            if PurePosixPath(path).suffix.lower() not in {".csv", ".yaml", ".zip"}:
                aside.append(path)
        elif parts[-1] in inner:
            faults.append(Fault(f"{where}:{path}", "is in the archive twice", "keep one file an image"))
        else:
            inner[parts[-1]] = path
    folders = {folder: inner for folder, inner in folders.items() if inner}
    if len(folders) > 1:
        listed = ", ".join(f"{folder or '.'} ({len(inner)})" for folder, inner in sorted(folders.items()))
        what = f"images lie in {len(folders)} folders: {listed}"
        faults.append(Fault(where, what, "put all images into one folder"))
        return {}, []
    notes = [f"{where}: files left aside as no images: {len(aside)}, first {aside[0]}"] if aside else []
    return next(iter(folders.values()), {}), notes


def header_of(raw: bytes) -> tuple[int, int, str] | None:
    """Height and width, px, and Pillow's mode of an image, from its header alone; None where it is no image."""
    try:
        with _strict(), Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            return image.height, image.width, image.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None


def decode(raw: bytes, spec: ImageSpec, where: str) -> npt.NDArray[np.uint8]:
    """Decode one image.

    Args:
        raw: The file's bytes.
        spec: Size, channels and fit.
        where: How messages name the file.

    Returns:
        (H, W, C) uint8, 0-255.

    Raises:
        DataError: If it is no image, is cut short, or is not of the size or the channels expected.
    """
    try:
        with _strict(), Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            if spec.fit == "exact" and image.size != (spec.width, spec.height):
                what = (
                    f"is {image.height}x{image.width} px (height x width), but {spec.height}x{spec.width} is expected"
                )
                fix = "replace it, or set `image.fit` in competition.yaml to letterbox, crop or squash"
                raise DataError([Fault(where, what, fix)])
            image.load()
            _check_channels(image, spec.channels, where)
            # A JPEG without an end marker decodes, with what is missing in gray.
            if image.format == "JPEG" and raw.rfind(b"\xff\xd9") < raw.rfind(b"\xff\xda"):
                raise OSError("image file is truncated")
            pixels = np.asarray(_fitted(image.convert("L" if spec.channels == 1 else "RGB"), spec))
    except UnidentifiedImageError:
        what = f"is no image: {len(raw):,} bytes starting with {raw[:8]!r}" if raw else "is no image: 0 bytes"
        raise DataError([Fault(where, what, "replace or remove the file")]) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError([Fault(where, f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels", "scale it down")]) from None
    except (OSError, ValueError, SyntaxError) as error:
        what = "is truncated" if "truncated" in str(error).lower() else f"cannot be decoded: {error}"
        raise DataError([Fault(where, what, "fetch the hand-out again; it is damaged")]) from None
    return pixels.reshape(spec.height, spec.width, spec.channels)


@contextmanager
def _strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _check_channels(image: Image.Image, channels: Literal[1, 3], where: str) -> None:
    if image.mode == "L" or (channels == 3 and image.mode in ("RGB", "P")):
        return
    if channels == 3:
        raise DataError([Fault(where, f"has the mode {image.mode}, but RGB is expected", "convert it to RGB")])
    bands = np.asarray(image.convert("RGB"))
    if image.mode == "RGB" and (bands == bands[..., :1]).all():
        fix = "convert it to gray, which loses nothing as its three channels are equal"
    else:
        fix = "convert it to gray, or set `image.channels` in competition.yaml to 3"
    raise DataError([Fault(where, f"has the mode {image.mode}, but gray (L) is expected", fix)])


def _fitted(image: Image.Image, spec: ImageSpec) -> Image.Image:
    if image.size == (spec.width, spec.height):
        return image
    if spec.fit == "squash":
        return image.resize((spec.width, spec.height), Image.Resampling.BICUBIC)
    ratios = spec.width / image.width, spec.height / image.height
    scale = min(ratios) if spec.fit == "letterbox" else max(ratios)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    scaled = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - spec.width) // 2, (size[1] - spec.height) // 2
    # A crop box beyond the image is filled with black.
    return scaled.crop((left, top, left + spec.width, top + spec.height))
