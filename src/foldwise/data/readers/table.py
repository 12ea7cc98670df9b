"""Reading train.csv with images in a zip or a folder: how most competitions hand out.

Every oddity is either borne and noted, or a fault with its row.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from foldwise.data.readers.handout import ColumnsSpec, FilesSpec, HandOut, HandOutError, Table, shown, unknown
from foldwise.data.readers.images import SUFFIXES
from foldwise.errors import Fault
from foldwise.spec.yaml import nearest

# No honest image file is larger, and no honest hand-out unpacks to more.
MEMBER_BYTES = 64 * 2**20
ARCHIVE_BYTES = 256 * 2**30


@contextmanager
def open_table(
    source: Path,
    columns: ColumnsSpec,
    files: FilesSpec | None,
    faults: list[Fault],
    *,
    classes: Sequence[str] = (),
    part: str = "",
    parts: Sequence[str] = (),
) -> Iterator[HandOut]:
    """Open a hand-out of train.csv with images.

    Args:
        source: Its folder.
        columns: The columns of train.csv.
        files: The names of the files; None: the usual ones, or the only zip, and the pattern that fits the ids.
        faults: Takes what is wrong and leaves the rest readable.
        classes: The labels there are; empty: any.
        part: Name of the column that says who is trained on, if there is one.
        parts: The values of that column.

    Raises:
        HandOutError: If the table or the images as a whole cannot be read.
    """
    there = files or _files_there(source)
    table = read_table(source / there.train, columns, faults, classes=classes, part=part, parts=parts)
    with open_images(source, there.images, faults) as images:
        if table is None or images is None:
            raise HandOutError(faults)
        if files is None:
            there = there.model_copy(update={"pattern": _pattern(table.column(columns.id), images)})
        names = _names(images, there, faults)
        yield HandOut(
            format="table",
            source=images.source,
            table=table,
            names=names,
            read=lambda image, faults: images.read(names[image], faults),
            where=lambda image: images.where(names[image]),
            columns=columns,
            files=there,
            part=part,
            notes=(*table.notes, *images.notes),
        )


def _files_there(source: Path) -> FilesSpec:
    """File names for a hand-out that nobody described: the usual ones, or the only zip."""
    zips = sorted(path.name for path in source.glob("*.zip"))
    usual = FilesSpec()
    return FilesSpec(images=zips[0]) if len(zips) == 1 and usual.images not in zips else usual


def _pattern(labelled: list[str], images: ImageFiles) -> str:
    """The file-name pattern that finds the most labelled ids; `{id}.*` where it alone finds more."""
    votes = Counter(
        name.replace(image, "{id}", 1)
        for image in labelled[:20]
        for name in images.files
        if image in name and not set("{}*") & set(name)
    )
    candidates = [FilesSpec(pattern=pattern) for pattern, _ in votes.most_common(50)] + [FilesSpec()]
    wanted = set(labelled)
    return max(candidates, key=lambda files: len({files.id_of(name) for name in images.files} & wanted)).pattern


def _names(images: ImageFiles, files: FilesSpec, faults: list[Fault]) -> dict[str, str]:
    """File names by id."""
    names: dict[str, str] = {}
    for name in sorted(images.files):
        image = files.id_of(name)
        if image is None:
            what = f"does not fit the pattern {files.pattern!r}"
            faults.append(Fault(images.where(name), what, "remove it, or mend `files.pattern` in competition.yaml"))
        elif image in names:
            what = f"is a second file of the id {image!r}, after {names[image]}"
            faults.append(Fault(images.where(name), what, "keep one file an id"))
        else:
            names[image] = name
    return names


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
        places_of_rows: list[str] = []
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
                faults.append(Fault(f"{where}:{line}", unknown("label", label, classes), fix))
            if parts and cells[places[part]] not in parts:
                fix = f"give the value to one part in competition.yaml, under `split`; known are: {', '.join(parts)}"
                faults.append(Fault(f"{where}:{line}", unknown(part, cells[places[part]], parts), fix))
            rows.append(tuple(cells))
            places_of_rows.append(f"{where}:{line}")
    except csv.Error as error:
        faults.append(Fault(f"{where}:{reader.line_num}", f"not CSV: {error}", "quote cells as RFC 4180 says"))
        return None
    if not rows and not faults:
        faults.append(Fault(where, "there is no row below the header", "give the labelled images, one a row"))
    return Table(header, tuple(rows), tuple(places_of_rows), notes)


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
        found, notes = _one_folder(members(archive, shown(path), faults), shown(path), faults)
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


def members(archive: zipfile.ZipFile, where: str, faults: list[Fault], *, largest: int = MEMBER_BYTES) -> list[str]:
    """Names of the files in a zip; a fault for each that leads out of it, is encrypted, or unpacks to too much."""
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
        elif member.file_size > largest:
            what = f"unpacks to {member.file_size:,} bytes, more than {largest:,}"
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
