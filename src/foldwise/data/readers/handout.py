"""What every reader gives, whatever the format: a table of labels, and images that are read when asked for.

Ids are unique, and the table's columns are named as competition.yaml has them.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field, field_validator

from foldwise.data.readers.images import SUFFIXES
from foldwise.errors import DataError, Fault
from foldwise.spec.model import Section
from foldwise.spec.yaml import nearest

Format = Literal["table", "pixels", "folders", "datasets"]

# Faults of one kind beyond these are counted, not listed.
LISTED = 20

# The column of parts, where the format has no name for it.
PART = "part"


class ColumnsSpec(Section):
    """The columns of train.csv and of the submission."""

    id: str = "id"
    label: str = "label"


class FilesSpec(Section):
    """What was handed out, by name."""

    format: Format | None = Field(
        None,
        description="table: train.csv and images; pixels: a CSV of pixels; folders: one a class; datasets: Hugging "
        "Face's; null: found by what is there.",
    )
    train: str = Field("train.csv", description="table, pixels: the file of labels.")
    images: str = Field(
        "dataset.zip", description="table: a zip; where it is not there, the images lie unpacked beside train.csv."
    )
    pattern: str = Field("{id}.*", description="From an id to its file's name; `.*` is any image suffix.")

    @field_validator("pattern")
    @classmethod
    def _holds_one_id(cls, value: str) -> str:
        if not re.fullmatch(r"[^/\\{}*]*\{id\}([^/\\{}*]*|\.\*)", value):
            raise ValueError(
                f"expected a file name with `{{id}}` in it, e.g. '{{id}}.jpg' or '{{id}}.*', but got {value!r}"
            )
        return value

    def file_of(self, image: str) -> str:
        """The name of an id's file; with a `*` where the suffix may be any."""
        return self.pattern.replace("{id}", image)

    def id_of(self, file: str) -> str | None:
        """The id that a file's name stands for; None where it does not fit the pattern."""
        before, after = self.pattern.split("{id}")
        if after == ".*":
            after = PurePosixPath(file).suffix
            if after.lower() not in SUFFIXES:
                return None
        image = file[len(before) : len(file) - len(after)]
        return image if image and file == f"{before}{image}{after}" else None


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
        places: How messages name each row, e.g. `train.csv:7`.
        notes: Harmless oddities that were read right, e.g. CRLF line ends.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    places: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def column(self, name: str) -> list[str]:
        """The cells of one column."""
        place = self.header.index(name)
        return [row[place] for row in self.rows]

    def csv(self) -> str:
        """The table as normal CSV: UTF-8 without a mark, LF."""
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()


@dataclass(frozen=True)
class HandOut:
    """A hand-out that a reader has open.

    Attributes:
        format: What it was read as.
        source: Where it lies; messages name it.
        table: The labels, with the columns `columns.id`, `columns.label` and, where there are parts, `part`.
        names: File name by id, of every image, labelled or not.
        read: From an id to its file's bytes; None with a fault.
        where: From an id to how messages name its image.
        columns: The table's columns.
        files: What was found, for a competition.yaml that nobody wrote.
        part: The column that says which part an image was handed out in; empty: there is none.
        classes: Class order that the format fixes; empty: it fixes none.
        notes: Harmless oddities.
    """

    format: Format | Literal["merged"]
    source: Path
    table: Table
    names: Mapping[str, str]
    read: Callable[[str, list[Fault]], bytes | None]
    where: Callable[[str], str]
    columns: ColumnsSpec = field(default_factory=ColumnsSpec)
    files: FilesSpec = field(default_factory=FilesSpec)
    part: str = ""
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> list[str]:
        """The label of each row."""
        return self.table.column(self.columns.label)

    @property
    def labelled(self) -> list[str]:
        """The id of each row."""
        return self.table.column(self.columns.id)

    @property
    def parts(self) -> list[str]:
        """The distinct parts of the labelled images, in the order of the table."""
        return list(dict.fromkeys(self.table.column(self.part))) if self.part else []


def safe_id(image: str) -> bool:
    """Whether an id can be the name of a file: not hidden, and in no other folder."""
    return bool(image.strip()) and not image.startswith(".") and not re.search(r"[/\\:*{}\x00-\x1f]", image)


def unknown(what: str, value: str, known: Sequence[str]) -> str:
    """`unknown label 'hapy' (did you mean 'happy'?)`."""
    near = nearest(value.strip(), known)
    return f"unknown {what} {value!r}" + (f" (did you mean {near!r}?)" if near else "")
