"""Taking in a competition: checks everything that was handed out, then lays it down under `inputs/<comp>/`.

Whatever is wrong is told at once and nothing is written; whatever is odd but harmless is in the report.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
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
    HandOut,
    HandOutError,
    Table,
    header_of,
    open_hand_out,
    shown,
)
from foldwise.data.readers.folders import TEST, TRAIN, VAL
from foldwise.data.readers.handout import PART, unknown
from foldwise.errors import DataError, Fault
from foldwise.files import atomic_write
from foldwise.spec.model import EXPERIMENT_NAME
from foldwise.spec.yaml import nearest, parse_yaml, validate

# Pairs that `render` lists; the summary counts all.
PAIRS_SHOWN = 12
# A step that takes longer says what it is, s.
QUIET_S = 3.0

SOURCE = "source"

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
        by_source: The same by source and class; empty where there is but one source.
        by_part: The same by part and class; empty where the hand-out has no parts.
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
    by_source: dict[str, Counter[str]]
    by_part: dict[str, Counter[str]]
    sizes: Counter[tuple[int, int, str]]
    n_train: int
    n_test: int
    pairs: tuple[NearDuplicate, ...]
    notes: tuple[str, ...]
    folder: Path
    folds_sha256: str
    sha256: str


def ingest(source: Path, root: Path, name: str) -> IngestReport:
    """Check a hand-out of any format that is recognised, and lay it down as `inputs/<name>/`.

    Where `inputs/<name>/competition.yaml` is not there, it is inferred and written. An existing folds.csv is kept.

    Args:
        source: Folder of the hand-out, or of several where competition.yaml has `sources`; or a data set of the hub,
            `hf:<owner/name>[@revision][:config]`.
        root: The project's root.
        name: What to call the competition.

    Raises:
        DataError: With every fault of the hand-out; what was there before is left as it was.
        SpecError: If an existing competition.yaml is faulty.
        HubError: If a hub cannot be reached.
        FoldwiseError: If a library that a format needs is not installed.
    """
    if not EXPERIMENT_NAME.fullmatch(name):
        what = "a competition's name must be of lower-case letters, digits, `_`, `-` and `.`"
        raise DataError([Fault(f"COMP={name}", what, "give it another name")])
    if not (source.is_dir() or source.as_posix().startswith("hf:")):
        raise DataError([Fault(shown(source), "there is no such folder", "give the folder that holds the hand-out")])
    folder = competition_folder(root, name)
    spec = load_competition(root, name) if (folder / "competition.yaml").is_file() else None

    faults: list[Fault] = []
    with _opened(source, folder, spec, faults) as (hand_out, left_out), _workplace(folder) as work:
        yaml = None
        if spec is None:
            yaml = _inferred(name, hand_out, faults)
            spec = validate(parse_yaml(yaml, folder / "competition.yaml"), CompetitionSpec)
        wanted = _matched(spec, hand_out, faults)
        id_of = {}
        with _told(f"reading {len(wanted):,} images"):
            for image in wanted:
                file = hand_out.names[image]
                id_of[file] = image
                if (raw := hand_out.read(image, faults)) is not None:
                    (work / "images" / file).write_bytes(raw)
        try:
            with _told(f"decoding {len(wanted):,} images"):
                decoded = decoded_images(work, spec, where=lambda file: hand_out.where(id_of[file]))
        except HandOutError as error:
            raise HandOutError([*faults, *error.faults]) from None
        if faults:
            raise HandOutError(faults)

        with _told(f"comparing {len(wanted):,} images with each other for near-duplicates"):
            pairs = near_duplicates(decoded.images, threshold=spec.near_duplicate)
        label_of = dict(zip(hand_out.labelled, hand_out.labels, strict=True))
        splits = _splits(spec, hand_out, decoded.ids, pairs, folder / "folds.csv")
        data = dataset(spec, decoded, label_of, splits[0])
        notes = [*hand_out.notes, *left_out, *_remarks(spec, data)]

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
        atomic_write(folder / "train.csv", hand_out.table.csv())

    counts = Counter(label_of.values())
    return IngestReport(
        competition=spec,
        classes={label: counts[label] for label in spec.classes},
        by_source=_counts(hand_out, SOURCE if spec.sources else ""),
        by_part=_counts(hand_out, hand_out.part),
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
    groups_shown = {**report.by_source, **report.by_part}
    for name in groups_shown:
        classes.add_column(Text(name), justify="right", style="dim")
    for label, count in report.classes.items():
        shares = [f"{counts[label]:,}" for counts in groups_shown.values()]
        classes.add_row(Text(label), f"{count:,}", f"{count / max(1, report.n_train):.1%}", *shares)
    if groups_shown:
        totals = [f"{counts.total():,}" for counts in groups_shown.values()]
        classes.add_section()
        classes.add_row("all", f"{report.n_train:,}", "", *totals)

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


@contextmanager
def _told(text: str) -> Iterator[None]:
    """Say on stderr what is under way once it takes more than a moment."""
    console = Console(stderr=True)
    progress = Progress(SpinnerColumn(), TextColumn(text), TimeElapsedColumn(), console=console, transient=True)
    progress.add_task(text)

    def tell() -> None:
        if console.is_terminal:
            progress.start()
        else:
            console.print(f"{text} ...", highlight=False)

    timer = threading.Timer(QUIET_S, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if progress.live.is_started:
            progress.stop()


@contextmanager
def _opened(
    source: Path, folder: Path, spec: CompetitionSpec | None, faults: list[Fault]
) -> Iterator[tuple[HandOut, list[str]]]:
    """The hand-out in the competition's own classes, all sources merged, and notes on what was left out."""
    columns = spec.columns if spec else ColumnsSpec()
    files = spec.files if spec else None
    with ExitStack() as stack:
        # What was taken in is merged and mapped already.
        again = source.is_dir() and source.resolve() == folder.resolve()
        if again:
            files = FilesSpec(format="table", pattern=files.pattern if files else "{id}.*")
        if spec is None or again or not (spec.sources or spec.class_map):
            hand_out = stack.enter_context(
                open_hand_out(
                    _place(source),
                    columns,
                    files,
                    faults,
                    classes=spec.classes if spec else (),
                    part=spec.split.column if spec and spec.parts else "",
                    parts=spec.parts if spec else (),
                )
            )
            hand_out, notes = _mapped(hand_out, spec, {}, "", faults)
            _check_parts(spec, hand_out, faults)
            yield hand_out, notes
            return
        if not spec.sources:
            hand_out = stack.enter_context(
                open_hand_out(_place(source), columns, files, faults, part=spec.split.column if spec.parts else "")
            )
            hand_out, notes = _mapped(hand_out, spec, spec.class_map, "", faults)
            _check_parts(spec, hand_out, faults)
            yield hand_out, notes
            return
        opened = {}
        notes = []
        for one in spec.sources:
            place = Path(one.path) if one.path.startswith("hf:") else source / one.path
            if not (one.path.startswith("hf:") or place.is_dir()):
                fix = f"put the source {one.name!r} there, or mend its `path` in competition.yaml"
                faults.append(Fault(shown(place), "there is no such folder", fix))
                continue
            try:
                hand_out = stack.enter_context(open_hand_out(_place(place), columns, None, faults))
            except HandOutError as error:
                # `faults` may be in it already.
                faults[:] = list(dict.fromkeys([*faults, *error.faults]))
                continue
            opened[one.name], told = _mapped(hand_out, spec, one.class_map, one.name, faults)
            notes += told
        if len(opened) < len(spec.sources):
            raise HandOutError(faults)
        hand_out = _merged(opened, source, columns)
        _check_parts(spec, hand_out, faults)
        yield hand_out, notes


def _place(source: Path) -> Path | str:
    """A folder, or the name of a data set on the hub."""
    return source if source.is_dir() or not source.as_posix().startswith("hf:") else source.as_posix()


def _mapped(
    hand_out: HandOut, spec: CompetitionSpec | None, class_map: dict[str, str | None], name: str, faults: list[Fault]
) -> tuple[HandOut, list[str]]:
    """The hand-out with the competition's class names, and notes on what was left out."""
    if spec is None:
        return hand_out, []
    if hand_out.format == "table" and not (class_map or name):
        # Its labels were checked row by row.
        return hand_out, []
    counts = Counter(hand_out.labels)
    known = set(spec.classes)
    strange = [label for label in counts if label not in class_map and label not in known]
    if strange:
        listed = ", ".join(_counted(label, counts[label], spec.classes) for label in strange)
        what = f"classes that are neither mapped nor the competition's: {listed}"
        fix = (
            "map them in competition.yaml, under `class_map`, or to null to leave them out; "
            f"the competition's classes are: {', '.join(spec.classes)}"
        )
        faults.append(Fault(shown(hand_out.source) + (f" ({name})" if name else ""), what, fix))
    if not class_map:
        return hand_out, []

    column = hand_out.table.header.index(hand_out.columns.label)
    rows: list[tuple[str, ...]] = []
    places: list[str] = []
    gone: Counter[str] = Counter()
    names = dict(hand_out.names)
    for image, row, place in zip(hand_out.labelled, hand_out.table.rows, hand_out.table.places, strict=True):
        label = class_map.get(row[column], row[column])
        if label is None:
            gone[row[column]] += 1
            names.pop(image, None)
        else:
            rows.append((*row[:column], label, *row[column + 1 :]))
            places.append(place)
    table = replace(hand_out.table, rows=tuple(rows), places=tuple(places))
    here = name or shown(hand_out.source)
    notes = [f"{here}: left out, as `class_map` says: {count:,} of {label!r}" for label, count in gone.items()]
    notes += [f"{here}: `class_map` names {label!r}, of which there is no image" for label in class_map.keys() - counts]
    return replace(hand_out, table=table, names=names), sorted(notes)


def _check_parts(spec: CompetitionSpec | None, hand_out: HandOut, faults: list[Fault]) -> None:
    """Note parts that the split does not know."""
    if spec is None or not spec.parts or hand_out.format == "table":
        return
    column = spec.split.column
    where = shown(hand_out.source)
    if column != hand_out.part:
        what = f"there is no column {column!r} of parts; " + (
            f"the parts are in {hand_out.part!r}" if hand_out.part else "the hand-out has no parts"
        )
        fix = "mend `split.column` in competition.yaml, or split by another kind"
        raise HandOutError([*faults, Fault(where, what, fix)])
    for part in hand_out.parts:
        if part not in spec.parts:
            fix = f"give it to one part in competition.yaml, under `split`; known are: {', '.join(spec.parts)}"
            faults.append(Fault(where, unknown(column, part, spec.parts), fix))


def _counted(label: str, count: int, classes: tuple[str, ...]) -> str:
    near = nearest(label.strip(), classes)
    return f"{label!r} ({count:,} images{f'; did you mean {near!r}?' if near else ''})"


def _merged(opened: dict[str, HandOut], source: Path, columns: ColumnsSpec) -> HandOut:
    """Several hand-outs as one, with the source's name before each id."""
    parts = any(hand_out.part for hand_out in opened.values())
    rows: list[tuple[str, ...]] = []
    places: list[str] = []
    names: dict[str, str] = {}
    origin: dict[str, tuple[HandOut, str]] = {}
    for name, hand_out in opened.items():
        given = hand_out.table.column(hand_out.part) if hand_out.part else [""] * len(hand_out.labelled)
        for image, label, part in zip(hand_out.labelled, hand_out.labels, given, strict=True):
            rows.append((f"{name}-{image}", label, *([part] if parts else []), name))
        places += hand_out.table.places
        for image, file in hand_out.names.items():
            names[f"{name}-{image}"] = f"{name}-{image}{Path(file).suffix}"
            origin[f"{name}-{image}"] = hand_out, image

    def read(image: str, faults: list[Fault]) -> bytes | None:
        hand_out, own = origin[image]
        return hand_out.read(own, faults)

    def where(image: str) -> str:
        hand_out, own = origin[image]
        return hand_out.where(own)

    header = (columns.id, columns.label, *([PART] if parts else []), SOURCE)
    return HandOut(
        format="merged",
        source=source,
        table=Table(header, tuple(rows), tuple(places)),
        names=names,
        read=read,
        where=where,
        columns=columns,
        part=PART if parts else "",
        notes=tuple(f"{name}: {note}" for name, hand_out in opened.items() for note in hand_out.notes),
    )


def _counts(hand_out: HandOut, column: str) -> dict[str, Counter[str]]:
    """Labelled images by a column of the table, and by class."""
    counts: dict[str, Counter[str]] = {}
    if column:
        for value, label in zip(hand_out.table.column(column), hand_out.labels, strict=True):
            counts.setdefault(value, Counter())[label] += 1
    return counts


def _matched(spec: CompetitionSpec, hand_out: HandOut, faults: list[Fault]) -> list[str]:
    """Ids of the images to take in: every labelled and every test one, and no other."""
    place_of = dict(zip(hand_out.labelled, hand_out.table.places, strict=True))
    for image, place in place_of.items():
        if image not in hand_out.names:
            what = f"{spec.columns.id} {image!r} has no image {spec.files.file_of(image)}"
            faults.append(Fault(place, what, "add the image, or remove the row"))
    expected = spec.submission_ids
    for image in expected or ():
        if image not in hand_out.names:
            what = f"test image {spec.files.file_of(image)} is missing"
            fix = f"add it; `test_ids` in competition.yaml promises {spec.test_ids}"
            faults.append(Fault(shown(hand_out.source), what, fix))
        if image in place_of:
            what = f"{spec.columns.id} {image!r} has a label, but is one of `test_ids` {spec.test_ids}"
            faults.append(Fault(place_of[image], what, "mend `test_ids` in competition.yaml, or remove the row"))
    known = {*place_of, *(expected or ())}
    wanted = []
    for image, file in sorted(hand_out.names.items(), key=lambda item: item[1]):
        if spec.files.id_of(file) != image:
            what = f"would be kept as {file}, which does not fit the pattern {spec.files.pattern!r}"
            fix = "set `files.pattern` in competition.yaml to '{id}.*'"
            faults.append(Fault(hand_out.where(image), what, fix))
        elif expected is not None and image not in known:
            what = f"is neither labelled in {spec.files.train} nor one of `test_ids` {spec.test_ids}"
            faults.append(Fault(hand_out.where(image), what, "remove it, or mend `test_ids` in competition.yaml"))
        else:
            wanted.append(image)
    return wanted


def _splits(
    spec: CompetitionSpec, hand_out: HandOut, ids: tuple[str, ...], pairs: list[Pair], path: Path
) -> list[Folds]:
    """The splits in folds.csv if it is there and fits, else new ones."""
    labelled = hand_out.labelled
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
    labels = np.array([index[label] for label in hand_out.labels], dtype=np.int64)
    parts = hand_out.table.column(spec.split.column) if spec.parts else ()
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
        if not count:
            notes.append(f"class {label!r} has no image")
        elif spec.split.kind == "kfold" and count < spec.split.folds:
            notes.append(f"images of class {label!r}: {count}, fewer than the {spec.split.folds} folds")
    if spec.split.kind == "column":
        parts: dict[str, set[int]] = {}
        for group, fold in zip(data.folds.group.tolist(), data.folds.fold.tolist(), strict=True):
            parts.setdefault(group, set()).add(fold)
        if torn := sum(len(folds) > 1 for folds in parts.values()):
            notes.append(f"groups of near-duplicates torn by the given split, from which scores profit: {torn}")
    return notes


def _inferred(name: str, hand_out: HandOut, faults: list[Fault]) -> str:
    """A competition.yaml for a hand-out that nobody described."""
    files = hand_out.files
    test = natural_order(set(hand_out.names) - set(hand_out.labelled))
    contiguous = bool(test) and test == [str(number) for number in range(_number(test[0]), _number(test[-1]) + 1)]

    headers: Counter[tuple[int, int, str]] = Counter()
    for image in hand_out.names:
        # Bytes that cannot be read are reported when the image is taken in.
        if (raw := hand_out.read(image, [])) is not None and (header := header_of(raw)):
            headers[header] += 1
    height, width, mode = headers.most_common(1)[0][0] if headers else (1, 1, "L")
    classes = list(hand_out.classes) or sorted(set(hand_out.labels))
    if len(set(hand_out.labels)) < 2:
        what = f"there is one class only: {', '.join(sorted(set(hand_out.labels))) or 'none'}"
        faults.append(Fault(hand_out.columns.label, what, "give two classes or more"))
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
        *([f"  train: {_scalar(files.train)}"] if hand_out.format in ("table", "pixels") else []),
        *([f"  images: {_scalar(files.images)}"] if hand_out.format == "table" else []),
        f"  pattern: {json.dumps(files.pattern)}",
        *_inferred_split(hand_out),
        "near_duplicate: 0.98  # normalised correlation from which on two images are the same picture",
    ]
    if contiguous:
        lines.append(f"test_ids: {test[0]}-{test[-1]}  # what a submission must hold, in order")
    return "\n".join(lines) + "\n"


def _inferred_split(hand_out: HandOut) -> list[str]:
    """The `split` lines: by the parts as they were handed out, where there are some to train on and some to score."""
    train, val, test = ([part for part in hand_out.parts if part.lower() in kind] for kind in (TRAIN, VAL, TEST))
    if not train or not (val or test):
        return [
            "split: {kind: kfold, folds: 5, seed: 42, repeats: 2}  # the second split confirms what the first chose"
        ]
    comments = [
        "# The parts as they were handed out; {kind: kfold} instead would score every labelled image, and can blend."
    ]
    if not val:
        # The test part alone is there to be scored; nothing watches it while training unless an experiment asks so.
        val, test = test, []
        comments += [
            "# There is no val part: a run is scored on the labelled test part, which it never trains on and never",
            "# watches. Choose between experiments by a holdout of the train part: choosing by this score flatters it.",
        ]
    given = {"train": train, "val": val, "test": test}
    listed = "".join(f", {key}: [{', '.join(map(_scalar, parts))}]" for key, parts in given.items() if parts)
    return [*comments, f"split: {{kind: column, column: {hand_out.part}{listed}}}"]


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() else -1


def _scalar(text: str) -> str:
    """`text` as a YAML string, quoted where it would read as something else."""
    plain = re.fullmatch(r"[A-Za-z_][\w.-]*", text) and text.lower() not in ("null", "true", "false")
    return text if plain else json.dumps(text)
