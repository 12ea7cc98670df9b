"""A competition as Foldwise keeps it: `inputs/<comp>/` as a description, and as arrays ready for training.

inputs/<comp>/competition.yaml   what it is: classes, metric, image size, split      committed
              folds.csv          who is scored by which fold; see `folds`            committed
              train.csv          labels; written last by `ingest`: its presence vouches for the rest
              images/            the image files as they were handed out
              cache/<key>.npy    all of them decoded, in the natural order of their ids; remade when need be
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator

from foldwise.data.folds import Folds, Ints, SplitSpec, Texts, fold_faults, natural_order, read_folds
from foldwise.data.readers import (
    DECODER_VERSION,
    ColumnsSpec,
    FilesSpec,
    HandOutError,
    ImageSpec,
    decode,
    header_of,
    read_table,
    shown,
)
from foldwise.errors import DataError, Fault, SpecError
from foldwise.files import atomic_path, atomic_write, pretty_json, sha256_bytes, sha256_json
from foldwise.spec.model import Section
from foldwise.spec.yaml import read_yaml, validate


class SourceSpec(Section):
    """One of several hand-outs that make up a competition."""

    name: str = Field(description="Ids become `<name>-<id>`.")
    path: str = Field(description="Its folder below FROM, or `hf:<owner/name>[@revision][:config]`.")
    class_map: dict[str, str | None] = Field(
        default_factory=dict, description="From its class names to the competition's; null: left out."
    )

    @field_validator("name")
    @classmethod
    def _is_a_prefix(cls, value: str) -> str:
        # Without a dash, or the source of an id such as `a-b-1` would be open.
        if not re.fullmatch(r"[a-z0-9_]{1,40}", value):
            raise ValueError(f"expected lower-case letters, digits and `_`, but got {value!r}")
        return value

    @field_validator("path")
    @classmethod
    def _stays_below(cls, value: str) -> str:
        if not value.startswith("hf:") and (Path(value).is_absolute() or ".." in Path(value).parts):
            raise ValueError(f"expected a folder below FROM, but got {value!r}")
        return value


class CompetitionSpec(Section):
    """What a competition is, whatever the experiment; `inputs/<comp>/competition.yaml`."""

    name: str = Field(description="The folder under `inputs/`.")
    title: str = ""
    classes: tuple[str, ...] = Field(min_length=2, description="Labels; their order is the class order everywhere.")
    metric: Literal["accuracy", "macro_f1", "balanced_accuracy", "log_loss"] = "accuracy"
    image: ImageSpec
    columns: ColumnsSpec = ColumnsSpec()
    files: FilesSpec = FilesSpec()
    class_map: dict[str, str | None] = Field(
        default_factory=dict, description="From the hand-out's class names to `classes`; null: left out."
    )
    sources: tuple[SourceSpec, ...] = Field((), description="Several hand-outs below FROM, merged into one.")
    split: SplitSpec = SplitSpec()
    near_duplicate: float = Field(
        0.98, gt=0, le=1, description="Normalised correlation from which on two images are the same picture."
    )
    test_ids: str | None = Field(
        None, description="`first-last`: the ids that a submission must hold, in order; null: all unlabelled images."
    )
    submissions_per_day: int | None = Field(
        None, ge=1, description="Uploads that Kaggle allows a day (UTC); null: 2 are assumed."
    )

    @field_validator("classes")
    @classmethod
    def _distinct_classes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = [label for label, count in Counter(value).items() if count > 1]
        if twice:
            raise ValueError(f"expected distinct classes, but {twice[0]!r} is given twice")
        if any(not label.strip() for label in value):
            raise ValueError("a class must not be blank")
        return value

    @field_validator("test_ids")
    @classmethod
    def _is_a_range(cls, value: str | None) -> str | None:
        if value is not None:
            first, dash, last = value.partition("-")
            if not (dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
                raise ValueError(f"expected `first-last` with first <= last, e.g. 2701-3000, but got {value!r}")
        return value

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        if self.columns.id == self.columns.label:
            raise ValueError(f"`columns.id` and `columns.label` must differ, but both are {self.columns.id!r}")
        return self

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        twice = [name for name, count in Counter(source.name for source in self.sources).items() if count > 1]
        if twice:
            raise ValueError(f"expected distinct sources, but {twice[0]!r} is given twice")
        if self.sources and self.class_map:
            raise ValueError("`class_map` has no effect with `sources`: each source has its own")
        for place, class_map in [("class_map", self.class_map), *((s.name, s.class_map) for s in self.sources)]:
            for name, label in class_map.items():
                if label is not None and label not in self.classes:
                    raise ValueError(f"`{place}` maps {name!r} to {label!r}, which is none of `classes`")
        return self

    @property
    def submission_ids(self) -> tuple[str, ...] | None:
        """The ids that a submission must hold, in order; None where only the images tell."""
        if self.test_ids is None:
            return None
        first, last = map(int, self.test_ids.split("-"))
        return tuple(map(str, range(first, last + 1)))

    @property
    def parts(self) -> tuple[str, ...]:
        """The values that the split's column may take; empty where the split goes by no column."""
        split = self.split
        return split.train + split.val + split.test if split.kind == "column" else ()


@dataclass(frozen=True, eq=False)
class Dataset:
    """A competition's images and labels, labelled and test together, in the natural order of ids.

    Attributes:
        competition: What it is.
        images: (N, H, W, C) uint8, 0-255; memory-mapped and read-only.
        ids: (N,) str.
        labels: (N,) int64, indices into `competition.classes`; -1: unlabelled.
        folds: The split asked for; covers exactly the labelled ids.
        sha256: Over ids, labels and pixels: the same wherever and however the files lie.
    """

    competition: CompetitionSpec
    images: npt.NDArray[np.uint8]
    ids: Texts
    labels: Ints
    folds: Folds
    sha256: str

    @cached_property
    def source(self) -> Texts:
        """(N,) str: the name of the source that an image is from; empty where there is but one."""
        if not self.competition.sources:
            return np.zeros(len(self.ids), dtype="<U1")
        return np.array([image.partition("-")[0] for image in self.ids.tolist()], dtype=np.str_)


@dataclass(frozen=True, eq=False)
class Decoded:
    """The cache: all images of a folder as one array.

    Attributes:
        path: The .npy.
        ids: In natural order, one a row.
        images: (N, H, W, C) uint8, memory-mapped and read-only.
        pixels_sha256: Over the array.
        sizes: Images by height, width (px) and Pillow's mode as they were handed out.
    """

    path: Path
    ids: tuple[str, ...]
    images: npt.NDArray[np.uint8]
    pixels_sha256: str
    sizes: Counter[tuple[int, int, str]]


def competition_folder(root: Path, name: str) -> Path:
    """`inputs/<name>` of the project at `root`."""
    return root / "inputs" / name


def load_competition(root: Path, name: str) -> CompetitionSpec:
    """Read `inputs/<name>/competition.yaml`.

    Args:
        root: The project's root.
        name: The competition.

    Raises:
        DataError: If there is no such competition.
        SpecError: If the file is not as it should be; names every fault with its line.
    """
    path = competition_folder(root, name) / "competition.yaml"
    if not path.is_file():
        raise DataError([Fault(shown(path), "there is no such file", _how_to_make(name))])
    document = read_yaml(path)
    spec = validate(document, CompetitionSpec)
    if spec.name != name:
        what = f"`name` must be the folder's name {name!r}, but got {spec.name!r}"
        raise SpecError([document.fault(("name",), what, f"write `name: {name}`, or rename the folder")])
    return spec


def load_dataset(root: Path, name: str, *, split: int = 0) -> Dataset:
    """Load an ingested competition; quick, as the images are decoded once and then memory-mapped.

    Args:
        root: The project's root.
        name: The competition.
        split: Which split of folds.csv, from 0.

    Raises:
        DataError: If it was not ingested, or its files do not fit together.
        SpecError: If its competition.yaml is faulty.
    """
    spec = load_competition(root, name)
    folder = competition_folder(root, name)
    for path in (folder / "train.csv", folder / "images", folder / "folds.csv"):
        if not path.exists():
            raise DataError([Fault(shown(path), "is missing", _how_to_make(name))])
    faults: list[Fault] = []
    table = read_table(folder / "train.csv", spec.columns, faults, classes=spec.classes)
    if table is None or faults:
        raise HandOutError(faults)
    ids, names = table.column(spec.columns.id), table.column(spec.columns.label)
    decoded = decoded_images(folder, spec)
    if unseen := natural_order(set(ids) - set(decoded.ids)):
        where = shown(folder / "images" / spec.files.file_of(unseen[0]))
        raise DataError([Fault(where, f"is missing; labelled ids without an image: {len(unseen)}", _how_to_make(name))])
    folds = read_folds(folder / "folds.csv", split)
    if faults := fold_faults(shown(folder / "folds.csv"), folds, ids, spec.split):
        raise DataError(faults)
    return dataset(spec, decoded, dict(zip(ids, names, strict=True)), folds)


def dataset(spec: CompetitionSpec, decoded: Decoded, label_of: dict[str, str], folds: Folds) -> Dataset:
    """Join images, labels (class names by id) and folds."""
    index = {label: number for number, label in enumerate(spec.classes)}
    named = [label_of.get(image, "") for image in decoded.ids]
    labels = np.array([index[label] if label else -1 for label in named], dtype=np.int64)
    sha256 = sha256_json([list(decoded.ids), named, decoded.pixels_sha256])
    return Dataset(spec, decoded.images, np.array(decoded.ids, dtype=np.str_), labels, folds, sha256)


def decoded_images(
    folder: Path, spec: CompetitionSpec, *, images: Path | None = None, where: Callable[[str], str] | None = None
) -> Decoded:
    """The decoded images of a competition, from the cache where it is current.

    The cache's key is a hash of every file's bytes, the wanted form and the decoder. While names, sizes and times
    of the files stay as they were when the key was last computed, they are not read again.

    Args:
        folder: `inputs/<comp>`; the cache is kept below it.
        spec: Wanted form of the images, and how ids become file names.
        images: Where the files lie; None: `folder / "images"`.
        where: How messages name a file; None: by its path.

    Raises:
        HandOutError: If a file cannot be decoded, or its name does not fit the pattern; names all of them.
    """
    images = images or folder / "images"
    name_of, listing = _listed(images, spec)
    wanted = {"image": spec.image.model_dump(), "pattern": spec.files.pattern, "decoder": DECODER_VERSION}
    stamp = sha256_json([wanted, listing])
    for record in sorted((folder / "cache").glob("*.json")):
        if (kept := _kept(record)) and kept[0]["stamp"] == stamp:
            return kept[1]

    ids = natural_order(name_of)
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode())
    for image in ids:
        digest.update(f"{image}\0{sha256_bytes((images / name_of[image]).read_bytes())}\n".encode())
    path = folder / "cache" / f"{digest.hexdigest()[:16]}.npy"
    record = path.with_suffix(".json")
    if kept := _kept(record):
        atomic_write(record, pretty_json({**kept[0], "stamp": stamp}))
        return kept[1]

    shape = (len(ids), spec.image.height, spec.image.width, spec.image.channels)
    faults: list[Fault] = []
    sizes: Counter[tuple[int, int, str]] = Counter()
    pixels = hashlib.sha256(repr(shape).encode())
    with atomic_path(path) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        for row, image in enumerate(ids):
            raw = (images / name_of[image]).read_bytes()
            if header := header_of(raw):
                sizes[header] += 1
            try:
                array[row] = decode(raw, spec.image, where(name_of[image]) if where else shown(images / name_of[image]))
            except DataError as error:
                faults += error.faults
            else:
                pixels.update(array[row].tobytes())
        array.flush()
        del array
        if faults:
            raise HandOutError(faults)
    content = {
        "stamp": stamp,
        "pixels_sha256": pixels.hexdigest(),
        "sizes": [[*size, count] for size, count in sizes.most_common()],
        "ids": ids,
    }
    atomic_write(record, json.dumps(content) + "\n")
    return Decoded(path, tuple(ids), np.load(path, mmap_mode="r"), pixels.hexdigest(), sizes)


def _listed(images: Path, spec: CompetitionSpec) -> tuple[dict[str, str], list[tuple[str, int, int]]]:
    """File names by id, and what tells a changed file without reading it."""
    name_of: dict[str, str] = {}
    listing = []
    faults = []
    with os.scandir(images) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            image = spec.files.id_of(entry.name)
            if image is None:
                what = f"does not fit the pattern {spec.files.pattern!r} of competition.yaml"
                faults.append(Fault(shown(Path(entry.path)), what, "remove the file, or mend `files.pattern`"))
                continue
            if image in name_of:
                what = f"is a second file of the id {image!r}, after {name_of[image]}"
                faults.append(Fault(shown(Path(entry.path)), what, "keep one file an id"))
                continue
            status = entry.stat()
            name_of[image] = entry.name
            listing.append((entry.name, status.st_size, status.st_mtime_ns))
    if faults:
        raise HandOutError(faults)
    return name_of, listing


def _kept(record: Path) -> tuple[dict[str, Any], Decoded] | None:
    """A cache file's record and the cache itself; None where it is not there or not whole."""
    path = record.with_suffix(".npy")
    try:
        content = json.loads(record.read_bytes())
        images = np.load(path, mmap_mode="r")
        sizes = Counter({(height, width, mode): count for height, width, mode, count in content["sizes"]})
        ids: Sequence[str] = content["ids"]
        if len(ids) != len(images):
            return None
        return content, Decoded(path, tuple(ids), images, content["pixels_sha256"], sizes)
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _how_to_make(name: str) -> str:
    if name == "demo":
        return "`make demo` draws it"
    return f"`make data COMP={name} FROM=<folder>`, where the folder holds what was handed out"
