"""Reading FER2013's CSV: a row an image, its gray pixels as numbers in one cell.

The pixels are parsed by numpy in blocks and lie in a temporary file, so memory does not grow with the rows.
"""

from __future__ import annotations

import csv
import gzip
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import IO, TextIO

import numpy as np
import numpy.typing as npt

from foldwise.data.readers.handout import ColumnsSpec, FilesSpec, HandOut, HandOutError, Table, shown
from foldwise.data.readers.images import png_of
from foldwise.errors import Fault

# The order of the numbers 0 to 6 in the column `emotion` (Goodfellow et al. 2013, kaggle.com/c/3364).
EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
LABEL, PIXELS, USAGE = "emotion", "pixels", "Usage"

# A row of 48x48 px has 9 kB; a line far beyond that is no row, and must not fill the memory.
LINE_BYTES = 2**17
BLOCK = 512
BLANK_BYTES = np.frombuffer(b" \t\r\n", np.uint8)
BLANKS = str.maketrans("\r\n\t", "   ")

AGAIN = "fetch the file again; it is damaged"


@contextmanager
def open_pixels(source: Path, columns: ColumnsSpec, files: FilesSpec | None, faults: list[Fault]) -> Iterator[HandOut]:
    """Open a hand-out whose images are rows of a CSV: `emotion,pixels[,Usage]`, in any order, gzipped or not.

    A `test.csv` of pixels without labels is read after a `train.csv` without parts. Ids are row numbers from 1.

    Args:
        source: Its folder.
        columns: What to call the columns of ids and labels.
        files: `train` names the file where there are several; None: there is but one.
        faults: Takes what is wrong and leaves the rest readable.

    Raises:
        HandOutError: If no file of labels can be read.
    """
    labelled, unlabelled = pixel_files(source)
    named = files.train if files and "train" in files.model_fields_set else ""
    if named and (source / named) in labelled:
        labelled = [source / named]
    if len(labelled) != 1:
        have = ", ".join(path.name for path in labelled or unlabelled) or "none"
        what = f"expected one CSV with the columns {LABEL} and {PIXELS}, but got {len(labelled)} (of pixels: {have})"
        fix = "leave one there, or name it in competition.yaml, under `files.train`"
        raise HandOutError([*faults, Fault(shown(source), what, fix)])
    (path,) = labelled
    usage = USAGE in _header(path)
    more = [] if usage else [other for other in unlabelled if other.name.split(".")[0] == "test"]
    with tempfile.TemporaryFile() as spool:
        rows = _Rows(spool)
        for file in (path, *more):
            _read(file, rows, faults)
        if not rows.labels:
            raise HandOutError(faults or [Fault(shown(path), "there is no row below the header", AGAIN)])
        pixels = rows.array()
        row_of = {image: row for row, image in enumerate(rows.places)}

        def read(image: str, _faults: list[Fault]) -> bytes:
            return png_of(pixels[row_of[image]])

        yield HandOut(
            format="pixels",
            source=source,
            table=Table(
                (columns.id, columns.label, *([USAGE] if usage else [])),
                tuple((image, label, *([rows.usage[image]] if usage else [])) for image, label in rows.labels.items()),
                tuple(rows.places[image] for image in rows.labels),
            ),
            names={image: f"{image}.png" for image in rows.places},
            read=read,
            where=rows.places.__getitem__,
            columns=columns,
            files=FilesSpec(train=path.name),
            part=USAGE if usage else "",
            classes=EMOTIONS,
            notes=tuple(rows.notes),
        )


def pixel_files(source: Path) -> tuple[list[Path], list[Path]]:
    """The CSVs of pixels in a folder: those with labels, and those without."""
    found = [path for pattern in ("*.csv", "*.csv.gz") for path in sorted(source.glob(pattern)) if path.is_file()]
    headers = {path: _header(path) for path in found}
    pixels = [path for path in found if PIXELS in headers[path]]
    return [path for path in pixels if LABEL in headers[path]], [path for path in pixels if LABEL not in headers[path]]


@dataclass
class _Rows:
    """What was read so far, by id; pixels lie in `spool`, a row an image."""

    spool: IO[bytes]
    side: int = 0
    numbered: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    usage: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def array(self) -> npt.NDArray[np.uint8]:
        """(N, side, side) uint8, memory-mapped."""
        self.spool.flush()
        shape = (len(self.places), self.side, self.side)
        return np.memmap(self.spool, dtype=np.uint8, mode="r", shape=shape)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """The file as text, unpacked where its name says that it is packed."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    else:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file


def _header(path: Path) -> list[str]:
    """The column names, stripped: one well-known copy has a space before each; empty where it cannot be read."""
    try:
        with _opened(path) as file:
            return [name.strip() for name in next(csv.reader([file.readline(LINE_BYTES)]), [])]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error):
        return []


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(LINE_BYTES):
        if len(line) == LINE_BYTES:
            raise csv.Error(f"a line of {LINE_BYTES:,} characters and more")
        yield line


def _read(path: Path, rows: _Rows, faults: list[Fault]) -> None:
    """Read one file after those in `rows`."""
    where = shown(path)
    header = _header(path)
    for name in (LABEL, PIXELS, USAGE):
        if header.count(name) > 1:
            faults.append(Fault(f"{where}:1", f"column {name!r} is there twice", "remove one of the two"))
            return
    place = {name: header.index(name) for name in (LABEL, PIXELS, USAGE) if name in header}
    block: list[tuple[str, int, str]] = []
    line = 0
    try:
        with _opened(path) as file:
            reader = csv.reader(_lines(file), strict=True)
            next(reader)
            for cells in reader:
                line = reader.line_num
                if not cells:
                    continue
                rows.numbered += 1
                image = str(rows.numbered)
                at = f"{where}:{line}"
                if len(cells) != len(header):
                    what = f"expected {len(header)} cells, but got {len(cells)}"
                    faults.append(Fault(at, what, "give every row as many cells as the header"))
                    continue
                if not _labelled(cells, place, at, image, rows, faults):
                    continue
                rows.places[image] = at
                block.append((image, line, cells[place[PIXELS]]))
                if len(block) == BLOCK:
                    _parse(block, where, rows, faults)
                    block = []
    except csv.Error as error:
        faults.append(Fault(f"{where}:{line + 1}", f"not CSV: {error}", AGAIN))
    except UnicodeDecodeError as error:
        what = f"expected UTF-8 text, but got the byte 0x{error.object[error.start]:02x}"
        faults.append(Fault(f"{where}:{line + 1}", what, "save the file as UTF-8"))
    except (OSError, EOFError, zlib.error) as error:
        faults.append(Fault(f"{where}:{line + 1}", f"cannot be read on: {error}", AGAIN))
    _parse(block, where, rows, faults)


def _labelled(cells: list[str], place: dict[str, int], at: str, image: str, rows: _Rows, faults: list[Fault]) -> bool:
    """Note a row's label and usage; False with a fault where there is none."""
    blank = [name for name, index in place.items() if not cells[index].strip()]
    if blank:
        what = f"{' and '.join(blank)} {'is' if len(blank) == 1 else 'are'} blank"
        faults.append(Fault(at, what, "fill it in, or remove the row"))
        return False
    if LABEL not in place:
        return True
    number = cells[place[LABEL]].strip()
    if not (number.isascii() and number.isdecimal() and int(number) < len(EMOTIONS)):
        fix = "emotions are: " + ", ".join(f"{index} {name}" for index, name in enumerate(EMOTIONS))
        faults.append(Fault(at, f"unknown {LABEL} {number!r}", fix))
        return False
    rows.labels[image] = EMOTIONS[int(number)]
    if USAGE in place:
        rows.usage[image] = cells[place[USAGE]].strip()
    return True


def _parse(block: list[tuple[str, int, str]], where: str, rows: _Rows, faults: list[Fault]) -> None:
    """Turn cells of numbers into rows of pixels, in the order of `rows.places`."""
    if not block:
        return
    # A newline ends each cell, so none may be inside one.
    text = "\n".join(cell.translate(BLANKS) if "\n" in cell else cell for *_, cell in block) + "\n"
    raw = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    digit = raw - 48
    is_digit = digit < 10
    line_ends = np.flatnonzero(raw == 10)
    # The last digit of each number; the two before it count while they are digits too.
    last = np.flatnonzero(is_digit[:-1] & ~is_digit[1:])
    tens, hundreds, more = (is_digit[np.maximum(last - back, 0)] & (last >= back) for back in (1, 2, 3))
    hundreds &= tens
    more &= hundreds
    value = digit[last].astype(np.int32) + 10 * np.where(tens, digit[last - 1], 0).astype(np.int32)
    value += 100 * np.where(hundreds, digit[np.maximum(last - 2, 0)], 0).astype(np.int32)
    ends = np.searchsorted(last, line_ends)
    counts = np.diff(ends, prepend=0)
    strange = np.searchsorted(line_ends, np.flatnonzero(~is_digit & ~np.isin(raw, BLANK_BYTES)))
    beyond = np.searchsorted(line_ends, last[(value > 255) | more])
    bad = set(strange.tolist()) | set(beyond.tolist())
    if not rows.side:
        common, _ = Counter(counts.tolist()).most_common(1)[0]
        rows.side = isqrt(common)
    wanted = rows.side**2
    bad |= set(np.flatnonzero(counts != wanted).tolist())

    starts = ends - counts
    for row, (image, line, cell) in enumerate(block):
        if row not in bad and wanted:
            rows.spool.write(value[starts[row] : ends[row]].astype(np.uint8).tobytes())
            continue
        for kept in (rows.places, rows.labels, rows.usage):
            kept.pop(image, None)
        faults.append(_fault(cell, f"{where}:{line}", rows.side))


def _fault(cell: str, at: str, side: int) -> Fault:
    numbers = cell.split()
    for index, number in enumerate(numbers, 1):
        if not (number.isascii() and number.isdecimal() and len(number) <= 3 and int(number) <= 255):
            what = f"pixel {index} must be a whole number from 0 to 255, but got {number!r}"
            return Fault(at, what, "mend the row, or remove it")
    what = f"has {len(numbers):,} pixels, but {side**2:,} ({side}x{side}) are expected"
    return Fault(at, what, "mend the row, or remove it; every image is a square of one size")
