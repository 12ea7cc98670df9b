"""Who is trained on and who is scored: one `folds.csv` a competition, made once and shared by every experiment.

Folds are stratified by class, keep groups of near-duplicates whole, and follow from the ids and the seed alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from foldwise.errors import DataError, Fault
from foldwise.files import atomic_write, sha256_bytes
from foldwise.spec.model import Section

Ints = npt.NDArray[np.int64]
Texts = npt.NDArray[np.str_]

TRAIN_ONLY = -1
SCORED_ONLY = -2

# The keys that each kind of split looks at; any other would be silently without effect.
KIND_KEYS = {
    "kfold": {"folds", "seed", "repeats"},
    "holdout": {"share", "seed", "repeats"},
    "column": {"column", "train", "val", "test"},
    "full": set[str](),
}


class SplitSpec(Section):
    """How the labelled images are split; only `kfold` runs blend."""

    kind: Literal["kfold", "holdout", "column", "full"] = "kfold"
    folds: int = Field(5, ge=2, le=1000, description="kfold: number of folds.")
    seed: int = Field(42, ge=0, description="kfold, holdout: another seed, other folds.")
    repeats: int = Field(
        1, ge=1, le=100, description="kfold, holdout: splits in folds.csv; the second confirms the first."
    )
    share: float = Field(0.1, gt=0, lt=1, description="holdout: share of the labelled images that is scored.")
    column: str = Field("Usage", description="column: the column of train.csv that says who is trained on.")
    train: tuple[str, ...] = Field((), description="column: its values for images to train on.")
    val: tuple[str, ...] = Field((), description="column: its values for images to score.")
    test: tuple[str, ...] = Field((), description="column: its values for a labelled test part, scored at the end.")

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Self:
        idle = sorted(self.model_fields_set - KIND_KEYS[self.kind] - {"kind"})
        if idle:
            raise ValueError(f"{', '.join(f'`{key}`' for key in idle)} has no effect with `kind: {self.kind}`")
        if self.kind == "column":
            if not self.train or not self.val:
                raise ValueError("`kind: column` needs `train` and `val`: the values of the column for each part")
            twice = [value for value, count in Counter(self.train + self.val + self.test).items() if count > 1]
            if twice:
                raise ValueError(f"a value belongs to one part of the split, but {twice[0]!r} is given twice")
        return self


@dataclass(frozen=True, eq=False)
class Folds:
    """One split of the labelled images, in the natural order of their ids.

    Attributes:
        ids: (N,) str: every labelled id once.
        fold: (N,) int64: the fold that scores the image; -1: always trained on; -2: scored only, never trained on.
        group: (N,) str: the id of the first labelled image of the group of near-duplicates; its own id if alone.
    """

    ids: Texts
    fold: Ints
    group: Texts

    @cached_property
    def sha256(self) -> str:
        """Hash of this split alone: a second split in the file does not change it."""
        rows = zip(self.ids, self.fold, self.group, strict=True)
        return sha256_bytes("".join(f"{image},{fold},{group}\n" for image, fold, group in rows).encode())

    @cached_property
    def _row(self) -> dict[str, int]:
        return {image: row for row, image in enumerate(self.ids.tolist())}

    def of(self, ids: Iterable[str]) -> Ints:
        """Folds of `ids`, (n,) int64, joined by id.

        Raises:
            KeyError: If an id has no fold.
        """
        return self.fold[[self._row[str(image)] for image in ids]]

    def groups_of(self, ids: Iterable[str]) -> Texts:
        """Groups of `ids`, (n,) str, joined by id.

        Raises:
            KeyError: If an id has no fold.
        """
        return self.group[[self._row[str(image)] for image in ids]]


def natural_order(ids: Iterable[str]) -> list[str]:
    """Sort ids as numbers when all of them are, else as text."""
    listed = list(ids)
    if all(image.isascii() and image.isdecimal() for image in listed):
        return sorted(listed, key=lambda image: (int(image), image))
    return sorted(listed)


def make_folds(
    ids: Sequence[str], labels: Ints, groups: Sequence[str], split: SplitSpec, *, parts: Sequence[str] = ()
) -> list[Folds]:
    """Draw the splits of a competition.

    Groups of two and more come first, largest first, each to the fold where it least disturbs the class shares;
    then, class by class, every other image goes to the fold that is furthest behind in that class, and of those to
    the smallest. Ties are broken by a hash of seed and id, so the result depends on no generator and no row order.

    Args:
        ids: N distinct labelled ids.
        labels: (N,) int64, class indices from 0.
        groups: N group names; equal names stay together.
        split: What to draw.
        parts: With `kind: column`, the N values of that column, all of them known to `split`; else empty.

    Returns:
        One split a repeat, each in the natural order of ids.
    """
    row = {image: index for index, image in enumerate(ids)}
    order = [row[image] for image in natural_order(ids)]
    names = np.array([ids[index] for index in order], dtype=np.str_)
    classes = labels[order]
    group = np.array([groups[index] for index in order], dtype=np.str_)

    if split.kind == "column":
        fold_of = dict.fromkeys(split.train, TRAIN_ONLY) | dict.fromkeys(split.val, 0)
        fold_of |= dict.fromkeys(split.test, SCORED_ONLY)
        return [Folds(names, np.array([fold_of[parts[index]] for index in order], dtype=np.int64), group)]
    if split.kind == "full":
        return [Folds(names, np.full(len(names), TRAIN_ONLY, dtype=np.int64), group)]

    if split.kind == "kfold":
        shares, fold_names = [1 / split.folds] * split.folds, list(range(split.folds))
    else:
        shares, fold_names = [split.share, 1 - split.share], [0, TRAIN_ONLY]
    numbers = np.array(fold_names, dtype=np.int64)
    return [
        Folds(names, numbers[_deal(names.tolist(), classes, group.tolist(), shares, f"{split.seed}/{repeat}")], group)
        for repeat in range(split.repeats)
    ]


def _deal(ids: list[str], labels: Ints, groups: list[str], shares: list[float], seed: str) -> Ints:
    """(N,) int64: for each image the index of its share."""

    def draw(name: str) -> bytes:
        return hashlib.sha256(f"{seed}/{name}".encode()).digest()

    bins = len(shares)
    totals = np.bincount(labels).astype(np.float64)
    target = np.outer(shares, totals)
    dealt = np.zeros_like(target)
    tie = sorted(range(bins), key=lambda index: draw(f"fold {index}"))
    rank = {index: place for place, index in enumerate(tie)}
    result = np.full(len(ids), -1, dtype=np.int64)

    members: dict[str, list[int]] = {}
    for row, name in enumerate(groups):
        members.setdefault(name, []).append(row)
    together = [rows for rows in members.values() if len(rows) > 1]
    for rows in sorted(together, key=lambda rows: (-len(rows), draw(ids[rows[0]]))):
        need = np.bincount(labels[rows], minlength=len(totals))
        ahead = dealt - target
        # Relative to the class's size, else the common classes would decide where the rare ones go.
        cost = (((ahead + need) ** 2 - ahead**2) / np.maximum(totals, 1)).sum(axis=1)
        size = ahead.sum(axis=1)
        chosen = min(
            range(bins), key=lambda index: (round(float(cost[index]), 9), round(float(size[index]), 9), rank[index])
        )
        dealt[chosen] += need
        result[rows] = chosen

    size_ahead = (dealt - target).sum(axis=1).tolist()
    for label in range(len(totals)):
        class_ahead = (dealt[:, label] - target[:, label]).tolist()
        alone = [row for row in np.flatnonzero(labels == label).tolist() if result[row] < 0]
        for row in sorted(alone, key=lambda row: draw(ids[row])):
            chosen = min(
                range(bins), key=lambda index: (round(class_ahead[index], 9), round(size_ahead[index], 9), rank[index])
            )
            class_ahead[chosen] += 1
            size_ahead[chosen] += 1
            result[row] = chosen
    return result


def write_folds(path: Path, splits: Sequence[Folds]) -> None:
    """Write `folds.csv`: `id,fold,group`, and `split` where there are several."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    several = len(splits) > 1
    writer.writerow(["id", "fold", "group", *(["split"] if several else [])])
    for number, folds in enumerate(splits):
        for image, fold, group in zip(folds.ids, folds.fold, folds.group, strict=True):
            writer.writerow([image, fold, group, *([number] if several else [])])
    atomic_write(path, text.getvalue())


def read_folds(path: Path, split: int = 0) -> Folds:
    """Read one split of `folds.csv`.

    Args:
        path: The file.
        split: Which split, from 0.

    Raises:
        DataError: If the file is missing, is not of the expected form, or does not hold `split`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError([Fault(str(path), "there is no such file", "ingest the competition: `make data`")]) from None
    except UnicodeDecodeError:
        raise DataError([Fault(str(path), "is not UTF-8", "restore it from git")]) from None
    rows = csv.reader(io.StringIO(text, newline=""))
    header = next(rows, [])
    if header not in (["id", "fold", "group"], ["id", "fold", "group", "split"]):
        what = f"expected the header `id,fold,group` or `id,fold,group,split`, but got {','.join(header)!r}"
        raise DataError([Fault(f"{path}:1", what, "restore the file from git")])

    faults: list[Fault] = []
    splits: set[int] = set()
    found: dict[str, tuple[int, str]] = {}
    for cells in rows:
        where = f"{path}:{rows.line_num}"
        try:
            image, fold, group = cells[0], int(cells[1]), cells[2]
            number = int(cells[3]) if len(header) == 4 else 0
        except (IndexError, ValueError):
            faults.append(
                Fault(where, f"expected `{','.join(header)}` with whole numbers, but got {','.join(cells)!r}")
            )
            continue
        splits.add(number)
        if number != split:
            continue
        if image in found:
            faults.append(Fault(where, f"id {image!r} is in split {split} twice"))
        if fold < SCORED_ONLY:
            faults.append(Fault(where, f"a fold must be at least {SCORED_ONLY}, but got {fold}"))
        found[image] = (fold, group)
    if faults:
        raise DataError(faults)
    if not found:
        have = ", ".join(map(str, sorted(splits))) or "none"
        fix = f"raise `split.repeats` in competition.yaml to {split + 1}, then remake the file"
        raise DataError([Fault(str(path), f"there is no split {split}; splits here: {have}", fix)])
    ids = natural_order(found)
    return Folds(
        np.array(ids, dtype=np.str_),
        np.array([found[image][0] for image in ids], dtype=np.int64),
        np.array([found[image][1] for image in ids], dtype=np.str_),
    )


def fold_faults(
    where: str, folds: Folds, ids: Iterable[str], split: SplitSpec, groups: Iterable[str] = ()
) -> list[Fault]:
    """What keeps a `folds.csv` from fitting the labelled images.

    Args:
        where: How to name the file.
        folds: One split of it.
        ids: The labelled ids.
        split: What competition.yaml asks for.
        groups: The groups of `ids` as found in the images, in the same order; without them the file's own are checked.

    Returns:
        Faults; empty where the file fits.
    """
    fix = f"delete {where} and run `make data` again to remake it, which makes earlier runs incomparable"
    labelled, known = set(ids_list := list(ids)), set(folds.ids.tolist())
    faults = []
    if lacking := natural_order(labelled - known):
        faults.append(Fault(where, f"{_ids_have(lacking)} a label but no fold, first {lacking[0]!r}", fix))
    if surplus := natural_order(known - labelled):
        faults.append(Fault(where, f"{_ids_have(surplus)} a fold but no label, first {surplus[0]!r}", fix))

    have = sorted(set(folds.fold.tolist()))
    allowed = {
        "kfold": list(range(split.folds)),
        "holdout": [TRAIN_ONLY, 0],
        "column": [SCORED_ONLY, TRAIN_ONLY, 0],
        "full": [TRAIN_ONLY],
    }[split.kind]
    if not set(have) <= set(allowed) or (split.kind == "kfold" and max(have) != split.folds - 1):
        what = (
            f"holds the folds {', '.join(map(str, have))}, but competition.yaml asks for {', '.join(map(str, allowed))}"
        )
        faults.append(Fault(where, what, fix))

    # A column is given by the organisers: its twins across parts are reported, not refused.
    if split.kind != "column":
        pairs = (
            zip(ids_list, groups, strict=True) if (groups := list(groups)) else zip(folds.ids, folds.group, strict=True)
        )
        first: dict[str, str] = {}
        fold_of = dict(zip(folds.ids.tolist(), folds.fold.tolist(), strict=True))
        for image, group in ((str(image), str(group)) for image, group in pairs):
            if image not in fold_of:
                continue
            twin = first.setdefault(group, image)
            if fold_of[twin] != fold_of[image]:
                what = f"near-duplicates {twin!r} and {image!r} are in folds {fold_of[twin]} and {fold_of[image]}"
                faults.append(Fault(where, what, fix))
    return faults


def _ids_have(ids: list[str]) -> str:
    return "1 id has" if len(ids) == 1 else f"{len(ids)} ids have"
