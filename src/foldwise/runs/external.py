"""Images from elsewhere (`external`), and the leak guard that stands before them and before starting weights.

Nothing is trained on that is a copy of an image which is scored, here or by an experiment that starts from this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from foldwise.data.competition import Dataset, load_dataset
from foldwise.data.folds import TRAIN_ONLY
from foldwise.data.leaks import THRESHOLD, VERSION, Likeness, likeness, of_todays_measure
from foldwise.data.stacked import Selected, Stacked
from foldwise.errors import Fault, RecordError
from foldwise.files import sha256_json
from foldwise.runs.crossval import Table
from foldwise.spec.model import ExperimentSpec, ExternalSpec, mapped_classes

_SMOKE_IMAGES = 32  # of each source

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Guarded:
    """What joins a table and what must not be trained on, and what a run's record says of it.

    Attributes:
        joined: The table with what joins it.
        external: One entry a source, as plain JSON values.
        guard: `leak_guard` of the run's record; None where nothing was asked for.
        told: Lines for the user.
    """

    joined: Table
    external: list[dict[str, Any]] = field(default_factory=list)
    guard: dict[str, Any] | None = None
    told: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str | None:
        """Of all that a run depends on here, so that it does not go on with other images."""
        return None if self.guard is None else sha256_json([self.external, self.guard])


def guarded(
    root: Path, spec: ExperimentSpec, data: Dataset, table: Table, *, smoke: bool, say: Say = lambda _text: None
) -> Guarded:
    """Join the external images of an experiment to its table, less the copies of what is scored.

    An image is left out where it is a copy of any image of the competition, training or test, or of one that the
    experiment is to be kept clear of; images of the competition itself are kept out of training where they are
    copies of the latter.

    Args:
        root: The project's root.
        spec: The experiment.
        data: Its competition.
        table: The competition's images, labels and folds, in the classes that the experiment learns.
        smoke: Take but a few images of each source.
        say: Takes a line where the comparison is going to take its time.

    Raises:
        FoldwiseError: If a source or a competition was not taken in, or a class is of no use here.
    """
    if not spec.external and not spec.clear_of:
        return Guarded(table)
    others = [load_dataset(root, name) for name in spec.clear_of]
    sources = [load_dataset(root, asked.source) for asked in spec.external]
    # Before the comparison, which takes its time.
    becomes = _classes(spec, sources, data)
    found: dict[str, dict[str, Likeness]] = {}
    told: list[str] = []

    def copies(images: Dataset, competitions: Sequence[Dataset]) -> np.ndarray:
        mask = np.zeros(len(images.ids), dtype=bool)
        for competition in competitions:
            like = likeness(images, competition, root, say=say)
            found.setdefault(competition.competition.name, {})[images.competition.name] = like
            told.append(_line(images, competition, like))
            mask |= like.copies
        return mask

    barred = None
    if others:
        clean = ~copies(data, others)
        kept = dict(zip(data.ids.tolist(), clean.tolist(), strict=True))
        barred = np.array([not kept[image] for image in table.ids.tolist()])
        if barred[table.labels >= 0].all():
            count, names = int((table.labels >= 0).sum()), ", ".join(spec.clear_of)
            what = f"all {count} labelled images are copies of images of {names}"
            raise RecordError([Fault("clear_of", what, "pretrain on other images")])
    joined, external = [table if barred is None else replace(table, barred=barred)], []
    for asked, source, index in zip(spec.external, sources, becomes, strict=True):
        part = _part(asked, source, index[source.labels], ~copies(source, [data, *others]))
        if smoke:
            part = part.take(np.arange(min(_SMOKE_IMAGES, len(part.ids))))
        joined.append(part)
        told.append(f"{len(part.ids)} images of {asked.source} join the training side of every fold")
        external.append(
            {
                "source": asked.source,
                "images": len(part.ids),
                "weight": asked.weight,
                "inputs_sha256": source.sha256,
            }
        )
    sha256 = {one.competition.name: one.sha256 for one in (data, *others)}
    guard = {
        "version": VERSION,
        "threshold": THRESHOLD,
        "clear_of": {
            name: {
                "inputs_sha256": sha256[name],
                "dropped": {source: _dropped(like) for source, like in by_source.items()},
            }
            for name, by_source in found.items()
        },
    }
    return Guarded(_stacked(joined), external, guard, told)


def unclear(info: Mapping[str, Any], competition: Dataset) -> str | None:
    """Why a run's record does not vouch for it as clear of a competition's images; None where it does.

    Args:
        info: The content of `run.json`.
        competition: What is to be scored, and not what the run was scored on.
    """
    name = competition.competition.name
    if info["competition"] == name:
        # Its guard speaks of the competition too: of what came from elsewhere, not of its own images.
        return f"was trained on {name} itself"
    if name not in (info["leak_guard"] or {}).get("clear_of", {}):
        return f"was not kept clear of the images of {name}"
    return outdated(info["leak_guard"], competition)


def outdated(guard: Mapping[str, Any] | None, competition: Dataset) -> str | None:
    """Why what a `leak_guard` says of a competition no longer holds; None where it holds, or says nothing of it.

    Args:
        guard: Of a run's record.
        competition: As it is now.
    """
    name = competition.competition.name
    entry = (guard or {}).get("clear_of", {}).get(name)
    if guard is None or entry is None:
        return None
    if not of_todays_measure(guard):
        return f"was kept clear of the images of {name} by another measure of likeness than today's"
    if entry["inputs_sha256"] != competition.sha256:
        return f"was kept clear of other images of {name} ({entry['inputs_sha256'][:8]}, here {competition.sha256[:8]})"
    return None


def merged_guards(guards: Sequence[Mapping[str, Any] | None], competitions: Sequence[str]) -> dict[str, Any] | None:
    """One `leak_guard` of a run and of those it comes from: what each of them dropped; None where none says anything.

    Args:
        guards: `leak_guard` of each.
        competitions: What the run is clear of: its own competition, and those that it was asked to keep clear of. Of
            others a run that it comes from may be clear, but not what it was trained on itself.
    """
    clear: dict[str, dict[str, Any]] = {}
    measure: dict[str, Any] = {}
    for guard in (guard for guard in guards if guard is not None):
        for name in (name for name in guard["clear_of"] if name in competitions):
            entry = guard["clear_of"][name]
            measure = measure or {"version": guard["version"], "threshold": guard["threshold"]}
            into = clear.setdefault(name, {"inputs_sha256": entry["inputs_sha256"], "dropped": {}})
            into["dropped"] = into["dropped"] | entry["dropped"]
    return measure | {"clear_of": clear} if clear else None


def _classes(spec: ExperimentSpec, sources: Sequence[Dataset], data: Dataset) -> list[np.ndarray]:
    """What each class of each source becomes; -1 for what is left out, and in the last place for the unlabelled."""
    ours = data.competition.classes
    _, own = mapped_classes(ours, spec.label_map)
    faults, found = [], []
    for asked, source in zip(spec.external, sources, strict=True):
        theirs = source.competition.classes
        becomes = {name: asked.class_map.get(name, name) for name in theirs}
        faults += [
            Fault("external", f"`class_map` of {asked.source} names {name!r}, which is no class of it", _one_of(theirs))
            for name in asked.class_map
            if name not in theirs
        ]
        faults += [
            Fault(
                "external",
                f"the class {name!r} of {asked.source} becomes {label!r}, which is no class of {data.competition.name}",
                f"map it in `class_map` ({_one_of(ours)}), or to null to leave it out",
            )
            for name, label in becomes.items()
            if label is not None and label not in ours
        ]
        index = [own[ours.index(label)] if label in ours else -1 for label in becomes.values()]
        found.append(np.array([*index, -1], dtype=np.int64))
    if faults:
        raise RecordError(faults)
    return found


def _part(asked: ExternalSpec, source: Dataset, labels: np.ndarray, clean: np.ndarray) -> Table:
    """A source's images that have a label here and are clean, as rows of the experiment's table."""
    rows = np.flatnonzero(clean & (labels >= 0))
    if not len(rows):
        what = (
            f"nothing of {asked.source} is left to train on: {int((labels < 0).sum())} of {len(labels)} images are of "
            f"no class here, and {int((~clean).sum())} are copies of what is scored"
        )
        raise RecordError([Fault("external", what, "remove the source, or look at its `class_map`")])
    ids = np.array([f"{asked.source}:{image}" for image in source.ids[rows].tolist()], dtype=np.str_)
    fold = np.full(len(rows), TRAIN_ONLY, dtype=np.int64)
    weight = np.full(len(rows), asked.weight, dtype=np.float32)
    return Table(Selected(source.images, rows), ids, labels[rows], fold, ids, weight=weight)


def _stacked(parts: Sequence[Table]) -> Table:
    first, *more = parts
    if not more:
        return first
    weights = [np.ones(len(part.ids), np.float32) if part.weight is None else part.weight for part in parts]
    barred = [np.zeros(len(part.ids), bool) if part.barred is None else part.barred for part in parts]
    weight = np.concatenate(weights)
    return Table(
        Stacked([part.images for part in parts]),
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.fold for part in parts]),
        np.concatenate([part.group for part in parts]),
        barred=np.concatenate(barred),
        weight=None if (weight == 1).all() else weight,
        n_own=len(first.ids),
    )


def _dropped(like: Likeness) -> dict[str, Any]:
    gone = like.ids[like.copies].tolist()
    return {
        "images": len(like.ids),
        "dropped": len(gone),
        "by_similarity": like.counts(),
        "ids_sha256": sha256_json(gone),
    }


def _line(images: Dataset, competition: Dataset, like: Likeness) -> str:
    counts = ", ".join(f"{name}: {count}" for name, count in like.counts().items())
    return (
        f"leak guard: {int(like.copies.sum())} of {len(like.ids)} images of {images.competition.name} are copies of "
        f"images of {competition.competition.name} and are left out (similarity {counts})"
    )


def _one_of(names: Sequence[str]) -> str:
    return f"one of: {', '.join(names)}"
