"""Taking in a competition: checks everything that was handed out, then lays it down under `inputs/<comp>/`.

Whatever is wrong is told at once and nothing is written; whatever is odd but harmless is in the report.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from foldwise.data.competition import (
    CompetitionSpec,
    Dataset,
    competition_folder,
    dataset,
    decoded_images,
    load_competition,
)
from foldwise.data.duplicates import Pair, groups, near_duplicates
from foldwise.data.folds import Folds, fold_faults, make_folds, natural_order, read_folds, write_folds
from foldwise.data.readers import (
    ColumnsSpec,
    FilesSpec,
    HandOutError,
    ImageFiles,
    Table,
    header_of,
    open_images,
    read_table,
    shown,
)
from foldwise.errors import DataError, Fault
from foldwise.files import atomic_write
from foldwise.spec.model import EXPERIMENT_NAME
from foldwise.spec.yaml import parse_yaml, validate

# Pairs that `render` lists; the summary counts all.
PAIRS_SHOWN = 12

PairKind = Literal["same label", "conflicting labels", "across train and test", "test"]


@dataclass(frozen=True)
class NearDuplicate:
    """Two images that are the same picture; `label` is None for a test image."""

    id_a: str
    id_b: str
    similarity: float
    label_a: str | None
    label_b: str | None

    @property
    def kind(self) -> PairKind:
        """What the pair means for scores."""
        if self.label_a is None and self.label_b is None:
            return "test"
        if self.label_a is None or self.label_b is None:
            return "across train and test"
        return "same label" if self.label_a == self.label_b else "conflicting labels"


@dataclass(frozen=True)
class IngestReport:
    """What `ingest` found and wrote.

    Attributes:
        competition: As described, or inferred, in competition.yaml.
        classes: Labelled images by class, in class order.
        sizes: Images by height, width (px) and Pillow's mode.
        n_train: Labelled images.
        n_test: Unlabelled images.
        pairs: Near-duplicates, in the natural order of ids.
        notes: Harmless oddities, and what was inferred.
        folder: `inputs/<comp>`.
        folds_sha256: Hash of split 0.
        sha256: The data set's hash.
    """

    competition: CompetitionSpec
    classes: dict[str, int]
    sizes: Counter[tuple[int, int, str]]
    n_train: int
    n_test: int
    pairs: tuple[NearDuplicate, ...]
    notes: tuple[str, ...]
    folder: Path
    folds_sha256: str
    sha256: str


def ingest(source: Path, root: Path, name: str) -> IngestReport:
    """Check a hand-out and lay it down as `inputs/<name>/`.

    Where `inputs/<name>/competition.yaml` is not there, it is inferred and written. An existing folds.csv is kept.

    Args:
        source: Folder with train.csv and with dataset.zip or the unpacked images.
        root: The project's root.
        name: What to call the competition.

    Raises:
        DataError: With every fault of the hand-out; what was there before is left as it was.
        SpecError: If an existing competition.yaml is faulty.
    """
    if not EXPERIMENT_NAME.fullmatch(name):
        what = "a competition's name must be of lower-case letters, digits, `_`, `-` and `.`"
        raise DataError([Fault(f"COMP={name}", what, "give it another name")])
    if not source.is_dir():
        raise DataError([Fault(shown(source), "there is no such folder", "give the folder that holds train.csv")])
    folder = competition_folder(root, name)
    spec = load_competition(root, name) if (folder / "competition.yaml").is_file() else None
    files = spec.files if spec else _files_there(source)
    columns = spec.columns if spec else ColumnsSpec()

    faults: list[Fault] = []
    table = read_table(
        source / files.train,
        columns,
        faults,
        classes=spec.classes if spec else (),
        part=spec.split.column if spec and spec.parts else "",
        parts=spec.parts if spec else (),
    )
    with open_images(source, files.images, faults) as images, _workplace(folder) as work:
        if table is None or images is None:
            raise HandOutError(faults)
        yaml = None
        if spec is None:
            yaml = _inferred(name, table, images, files, faults)
            spec = validate(parse_yaml(yaml, folder / "competition.yaml"), CompetitionSpec)
        wanted = _matched(spec, table, images, source / files.train, faults)
        for file in wanted:
            if (raw := images.read(file, faults)) is not None:
                (work / "images" / file).write_bytes(raw)
        try:
            decoded = decoded_images(work, spec, where=images.where)
        except HandOutError as error:
            raise HandOutError([*faults, *error.faults]) from None
        if faults:
            raise HandOutError(faults)

        pairs = near_duplicates(decoded.images, threshold=spec.near_duplicate)
        label_of = dict(zip(table.column(columns.id), table.column(columns.label), strict=True))
        splits = _splits(spec, table, decoded.ids, pairs, folder / "folds.csv")
        data = dataset(spec, decoded, label_of, splits[0])
        notes = [*table.notes, *images.notes, *_remarks(spec, data)]

        # From here on only renames: without train.csv nothing is ingested, and it comes last.
        (folder / "train.csv").unlink(missing_ok=True)
        for part in ("images", "cache"):
            if (folder / part).exists():
                (folder / part).rename(work / f"old_{part}")
            (work / part).rename(folder / part)
        if yaml is not None:
            notes.append(f"{shown(folder / 'competition.yaml')} was inferred: read it, and correct what is wrong")
            atomic_write(folder / "competition.yaml", yaml)
        if not (folder / "folds.csv").exists():
            write_folds(folder / "folds.csv", splits)
        atomic_write(folder / "train.csv", table.csv())

    counts = Counter(label_of.values())
    return IngestReport(
        competition=spec,
        classes={label: counts[label] for label in spec.classes},
        sizes=decoded.sizes,
        n_train=len(label_of),
        n_test=len(decoded.ids) - len(label_of),
        pairs=tuple(
            NearDuplicate(first, second, pair.similarity, label_of.get(first), label_of.get(second))
            for pair in pairs
            for first, second in [(decoded.ids[pair.a], decoded.ids[pair.b])]
        ),
        notes=tuple(notes),
        folder=folder,
        folds_sha256=splits[0].sha256,
        sha256=data.sha256,
    )


def render(report: IngestReport) -> RenderableType:
    """The report as tables, at most 100 columns wide, for a terminal or a log."""
    spec = report.competition
    heading = Text(f"{spec.name}: {report.n_train:,} labelled and {report.n_test:,} test images", style="bold")

    classes = Grid(box=box.SIMPLE_HEAD, title="Classes", title_justify="left")
    classes.add_column("class")
    classes.add_column("images", justify="right")
    classes.add_column("share", justify="right")
    for label, count in report.classes.items():
        classes.add_row(Text(label), f"{count:,}", f"{count / max(1, report.n_train):.1%}")

    sizes = Grid(box=box.SIMPLE_HEAD, title="Images as handed out", title_justify="left")
    sizes.add_column("height x width")
    sizes.add_column("mode")
    sizes.add_column("images", justify="right")
    for (height, width, mode), count in report.sizes.most_common(PAIRS_SHOWN):
        sizes.add_row(f"{height} x {width}", mode, f"{count:,}")

    kinds = Counter(pair.kind for pair in report.pairs)
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    summary = Text(f" {len(report.pairs)} pairs of near-duplicates" + (f": {counted}" if counted else ""))
    telling = [pair for pair in report.pairs if pair.kind in ("conflicting labels", "across train and test")]
    parts: list[RenderableType] = [heading, Text(), classes, sizes, summary]
    if telling:
        twins = Grid(box=box.SIMPLE_HEAD)
        for column in ("id", "label", "id", "label"):
            twins.add_column(column)
        twins.add_column("similarity", justify="right")
        twins.add_column("kind")
        for pair in telling[:PAIRS_SHOWN]:
            labels = [Text(label or "(test)") for label in (pair.label_a, pair.label_b)]
            twins.add_row(Text(pair.id_a), labels[0], Text(pair.id_b), labels[1], f"{pair.similarity:.4f}", pair.kind)
        parts.append(twins)
        if len(telling) > PAIRS_SHOWN:
            parts.append(Text(f"   ... and {len(telling) - PAIRS_SHOWN} more"))
    parts.append(Text())
    parts += [Text(f" note: {note}") for note in report.notes]
    parts.append(Text(f" folds: {shown(report.folder / 'folds.csv')}  sha256 {report.folds_sha256[:12]}"))
    parts.append(Text(f" data:  {shown(report.folder)}  sha256 {report.sha256[:12]}"))
    return Group(*parts)


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A folder beside what is to be replaced, so that putting it there is a rename; removed in the end."""
    made = [path for path in (folder.parent, folder) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".ingest-*"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=folder, prefix=".ingest-"))
    (work / "images").mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for path in reversed(made):
            if not any(path.iterdir()):
                path.rmdir()


def _files_there(source: Path) -> FilesSpec:
    """File names for a hand-out that nobody described: the usual ones, or the only zip."""
    zips = sorted(path.name for path in source.glob("*.zip"))
    usual = FilesSpec()
    return FilesSpec(images=zips[0]) if len(zips) == 1 and usual.images not in zips else usual


def _matched(spec: CompetitionSpec, table: Table, images: ImageFiles, train: Path, faults: list[Fault]) -> list[str]:
    """Names of the files to take in: one for every labelled id and for every test id, and no other."""
    labelled = table.column(spec.columns.id)
    line_of = dict(zip(labelled, table.lines, strict=True))
    for image, line in line_of.items():
        file = spec.files.file_of(image)
        if file not in images.files:
            what = f"{spec.columns.id} {image!r} has no image {file}"
            faults.append(Fault(f"{shown(train)}:{line}", what, "add the image, or remove the row"))
    expected = spec.submission_ids
    for image in expected or ():
        file = spec.files.file_of(image)
        if file not in images.files:
            what = f"test image {file} is missing"
            fix = f"add it; `test_ids` in competition.yaml promises {spec.test_ids}"
            faults.append(Fault(shown(images.source), what, fix))
        if image in line_of:
            what = f"{spec.columns.id} {image!r} has a label, but is one of `test_ids` {spec.test_ids}"
            faults.append(
                Fault(
                    f"{shown(train)}:{line_of[image]}", what, "mend `test_ids` in competition.yaml, or remove the row"
                )
            )
    known = {*labelled, *(expected or ())}
    wanted = []
    for name in sorted(images.files):
        image_id = spec.files.id_of(name)
        if image_id is None:
            what = f"does not fit the pattern {spec.files.pattern!r}"
            faults.append(Fault(images.where(name), what, "remove it, or mend `files.pattern` in competition.yaml"))
        elif expected is not None and image_id not in known:
            what = f"is neither labelled in {train.name} nor one of `test_ids` {spec.test_ids}"
            faults.append(Fault(images.where(name), what, "remove it, or mend `test_ids` in competition.yaml"))
        else:
            wanted.append(name)
    return wanted


def _splits(spec: CompetitionSpec, table: Table, ids: tuple[str, ...], pairs: list[Pair], path: Path) -> list[Folds]:
    """The splits in folds.csv if it is there and fits, else new ones."""
    labelled = table.column(spec.columns.id)
    row = {image: index for index, image in enumerate(ids)}
    component = groups(len(ids), pairs)
    # A group may start with a test image, which folds.csv does not know: its first labelled one names it.
    first: dict[int, str] = {}
    for image in natural_order(labelled):
        first.setdefault(int(component[row[image]]), image)
    group = [first[int(component[row[image]])] for image in labelled]
    if path.exists():
        splits = [read_folds(path, split) for split in range(spec.split.repeats)]
        faults = [fault for folds in splits for fault in fold_faults(shown(path), folds, labelled, spec.split, group)]
        if faults:
            raise HandOutError(faults)
        return splits
    index = {label: number for number, label in enumerate(spec.classes)}
    labels = np.array([index[label] for label in table.column(spec.columns.label)], dtype=np.int64)
    parts = table.column(spec.split.column) if spec.parts else ()
    splits = make_folds(labelled, labels, group, spec.split, parts=parts)
    if spec.split.kind == "kfold" and len(set(splits[0].fold.tolist())) < spec.split.folds:
        what = f"{len(set(group))} labelled pictures do not fill {spec.split.folds} folds"
        where = shown(path.with_name("competition.yaml"))
        raise HandOutError([Fault(where, what, "lower `split.folds`, or label more images")])
    return splits


def _remarks(spec: CompetitionSpec, data: Dataset) -> list[str]:
    """What deserves a second look though nothing is wrong."""
    notes = []
    counts = np.bincount(data.labels[data.labels >= 0], minlength=len(spec.classes))
    for label, count in zip(spec.classes, counts.tolist(), strict=True):
        if spec.split.kind == "kfold" and count < spec.split.folds:
            notes.append(f"images of class {label!r}: {count}, fewer than the {spec.split.folds} folds")
    if spec.split.kind == "column":
        parts: dict[str, set[int]] = {}
        for group, fold in zip(data.folds.group.tolist(), data.folds.fold.tolist(), strict=True):
            parts.setdefault(group, set()).add(fold)
        if torn := sum(len(folds) > 1 for folds in parts.values()):
            notes.append(f"groups of near-duplicates torn by the given split, from which scores profit: {torn}")
    return notes


def _inferred(name: str, table: Table, images: ImageFiles, files: FilesSpec, faults: list[Fault]) -> str:
    """A competition.yaml for a hand-out that nobody described."""
    columns = ColumnsSpec()
    labelled = table.column(columns.id)
    files = files.model_copy(update={"pattern": _pattern(labelled, images)})
    test = natural_order({image for file in images.files if (image := files.id_of(file))} - set(labelled))
    contiguous = bool(test) and test == [str(number) for number in range(_number(test[0]), _number(test[-1]) + 1)]

    headers: Counter[tuple[int, int, str]] = Counter()
    for file in images.files:
        # Bytes that cannot be read are reported when the image is taken in.
        if (raw := images.read(file, [])) is not None and (header := header_of(raw)):
            headers[header] += 1
    height, width, mode = headers.most_common(1)[0][0] if headers else (1, 1, "L")
    classes = sorted(set(table.column(columns.label)))
    if len(classes) < 2:
        what = f"there is one class only: {', '.join(classes) or 'none'}"
        faults.append(Fault(columns.label, what, "give two classes or more"))
        raise HandOutError(faults)

    lines = [
        "# Inferred from what was handed out; correct what is wrong. Every experiment of the competition shares it.",
        f"name: {_scalar(name)}",
        "classes:  # their order is the class order everywhere",
        *(f"  - {_scalar(label)}" for label in classes),
        "metric: accuracy  # or macro_f1, balanced_accuracy, log_loss",
        "image:",
        f"  height: {height}  # px",
        f"  width: {width}",
        f"  channels: {1 if mode == 'L' else 3}  # 1: gray, 3: RGB",
        "  fit: exact  # or letterbox, crop, squash: another size is brought to this one",
        "files:",
        f"  train: {_scalar(files.train)}",
        f"  images: {_scalar(files.images)}",
        f"  pattern: {json.dumps(files.pattern)}",
        "split: {kind: kfold, folds: 5, seed: 42, repeats: 2}  # the second split confirms what the first chose",
        "near_duplicate: 0.98  # normalised correlation from which on two images are the same picture",
    ]
    if contiguous:
        lines.append(f"test_ids: {test[0]}-{test[-1]}  # what a submission must hold, in order")
    return "\n".join(lines) + "\n"


def _pattern(labelled: list[str], images: ImageFiles) -> str:
    """The file-name pattern that finds the most labelled ids."""
    votes = Counter(
        name.replace(image, "{id}", 1)
        for image in labelled[:20]
        for name in images.files
        if image in name and "{" not in name and "}" not in name
    )
    candidates = [FilesSpec(pattern=pattern) for pattern, _ in votes.most_common(50)] or [FilesSpec()]
    return max(candidates, key=lambda files: sum(files.file_of(image) in images.files for image in labelled)).pattern


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() else -1


def _scalar(text: str) -> str:
    """`text` as a YAML string, quoted where it would read as something else."""
    plain = re.fullmatch(r"[A-Za-z_][\w.-]*", text) and text.lower() not in ("null", "true", "false")
    return text if plain else json.dumps(text)
