"""What kept runs teach a student, where no label leaks: pseudo-labels, and predictions to be matched.

A student of fold k asks only models that were trained without fold k: the teachers' own units of fold k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foldwise.data.competition import Dataset, load_dataset
from foldwise.errors import Fault, RecordError
from foldwise.files import sha256_json
from foldwise.learn.device import Runtime
from foldwise.learn.objectives import Taught, softened
from foldwise.records.store import Run, Unit, load_run, read_units, rows_of
from foldwise.runs.crossval import Lesson, Table
from foldwise.runs.external import merged_guards, outdated, unclear
from foldwise.runs.kept import kept_models, weight_files
from foldwise.spec.model import ExperimentSpec, PseudoSpec

# (fold, rows of the table, runtime) -> (rows, classes) probabilities
_Ask = Callable[[int, np.ndarray, Runtime], np.ndarray]

# What stands in for teachers in a smoke run is this sure of a label.
_STAND_IN_SURE = 0.9


@dataclass(frozen=True)
class Teachers:
    """The runs that an experiment learns from.

    Attributes:
        lesson: (fold, labelled rows to train on, runtime) to what a unit of that fold is taught.
        sha256: Of each run's predictions and weights, by name, so that a run does not go on with other teachers.
        marks: Marks of the runs, which follow.
        external: External data of the runs, which follows.
        guard: `leak_guard` of the runs, put together.
    """

    lesson: Callable[[int, np.ndarray, Runtime], Lesson]
    sha256: dict[str, str]
    marks: list[str]
    external: list[Any]
    guard: dict[str, Any] | None = None


def find_teachers(
    root: Path, spec: ExperimentSpec, data: Dataset, table: Table, classes: Sequence[str]
) -> Teachers | None:
    """Find the runs that a spec learns from, and refuse those by which a label would leak.

    Student k may learn from fold k's units alone. Pseudo-labels are the mean of their test.csv; what is matched is
    predicted anew by their weights. Neither the averaged test.csv of a run nor its oof.csv will do, though both are
    out of fold for the run itself: K - 1 of the K models behind test.csv saw the labels of fold k, and the models
    behind the OOF rows of the student's training images (the val.csv of the other folds) all saw them. Targets from
    there would carry the labels that the student is scored on into its training, by way of images that resemble each
    other.

    Args:
        root: The project's root.
        spec: The experiment.
        data: The competition that it is scored on.
        table: Its images, labels and folds.
        classes: The classes that it learns.

    Returns:
        None unless the spec has `pseudo` or `distill`.

    Raises:
        RecordError: If a run is not complete, is not of these folds, classes and images, or its predictions or weights
            are not here; all that is wrong with all of them.
    """
    sections = {name: section for name in ("pseudo", "distill") if (section := getattr(spec, name)) is not None}
    if not sections:
        return None
    places: dict[str, str] = {}
    for section, asked in sections.items():
        for name in asked.teachers:
            places.setdefault(name, f"{section}.from: {name}")
    runs: dict[str, Run] = {}
    clear = [load_dataset(root, name) for name in spec.clear_of]
    faults = list(_without_unlabelled(spec, data, table))
    for name, where in places.items():
        try:
            run = load_run(root / "oof" / name)
        except RecordError as error:
            faults += error.faults
            continue
        reasons = list(_differences(run, spec, data, classes))
        fix = f"name k-fold runs of {data.competition.name} on its present folds, of the same classes"
        faults += [Fault(where, reason, fix) for reason in reasons]
        also = [why for one in clear if (why := unclear(run.info, one)) is not None]
        key = f"`clear_of: [{', '.join(spec.clear_of)}]`"
        again = f"write {key} into experiments/{name}.yaml too, and run it again with FRESH=1"
        faults += [Fault(where, why, again) for why in also]
        if not reasons and not also:
            runs[name] = run
    units: dict[str, list[Unit]] = {}
    for name, run in runs.items():
        try:
            if spec.pseudo is not None and name in spec.pseudo.teachers:
                units[name] = read_units(run)
            if spec.distill is not None and name in spec.distill.teachers:
                weight_files(run)
        except RecordError as error:
            faults += error.faults
    if faults:
        raise RecordError(faults)

    def of_files(fold: int, rows: np.ndarray, _runtime: Runtime) -> np.ndarray:
        assert spec.pseudo is not None
        return fold_mean([units[name] for name in spec.pseudo.teachers], fold, table.ids[rows])

    def of_models(fold: int, rows: np.ndarray, runtime: Runtime) -> np.ndarray:
        assert spec.distill is not None
        means = []
        for name in spec.distill.teachers:
            models = kept_models(runs[name], runtime, folds=(fold,))
            means.append(np.mean([model.probabilities(table.images[rows]) for model in models], axis=0))
        return np.asarray(np.mean(means, axis=0))

    def lesson(fold: int, rows: np.ndarray, runtime: Runtime) -> Lesson:
        return make_lesson(spec, table, classes, fold, rows, runtime, of_files, of_models)

    return Teachers(
        lesson,
        {name: _sha256(run) for name, run in runs.items()},
        list(dict.fromkeys(mark for run in runs.values() for mark in run.info["marks"])),
        [one for run in runs.values() for one in run.info["external"]],
        merged_guards([run.info["leak_guard"] for run in runs.values()], (spec.competition, *spec.clear_of)),
    )


def stand_ins(spec: ExperimentSpec, data: Dataset, table: Table, classes: Sequence[str]) -> Teachers | None:
    """Teachers of a smoke run, whose folds are none of any kept run's: no file is read, and every line is still run.

    They give nine tenths to the label of a labelled image, and all to one class after the other of unlabelled ones.

    Raises:
        RecordError: If there are no unlabelled images to be given labels.
    """
    if spec.pseudo is None and spec.distill is None:
        return None
    if faults := list(_without_unlabelled(spec, data, table)):
        raise RecordError(faults)
    count = len(classes)

    def say(_fold: int, rows: np.ndarray, _runtime: Runtime) -> np.ndarray:
        labels = table.labels[rows]
        sure = np.where(labels >= 0, _STAND_IN_SURE, 1.0)[:, None]
        return np.eye(count)[np.where(labels >= 0, labels, rows % count)] * sure + (1 - sure) / count

    def lesson(fold: int, rows: np.ndarray, runtime: Runtime) -> Lesson:
        return make_lesson(spec, table, classes, fold, rows, runtime, say, say)

    return Teachers(lesson, {}, [], [])


def fold_mean(teachers: Sequence[Sequence[Unit]], fold: int, ids: np.ndarray) -> np.ndarray:
    """Mean probabilities of unlabelled images by models that never saw a fold.

    Args:
        teachers: The units of each run; a run counts as much as another, whatever the number of its seeds.
        fold: Only its units are asked.
        ids: (n,) ids of the images.

    Returns:
        (n, classes) float64.
    """
    means = []
    for units in teachers:
        asked = [unit.test_probs[rows_of(unit.test_ids, ids)] for unit in units if unit.fold == fold]
        means.append(np.mean(asked, axis=0, dtype=np.float64))
    return np.asarray(np.mean(means, axis=0))


def pseudo_labels(probs: np.ndarray, spec: PseudoSpec) -> tuple[np.ndarray, np.ndarray]:
    """Which images are taken, and their targets (Lee 2013).

    Args:
        probs: (n, classes) mean probabilities of the teachers.
        spec: The experiment's `pseudo` section.

    Returns:
        (n,) bool, and (m, classes) targets of those m that are: one-hot where `hard`, else the probabilities.
    """
    taken = probs.max(axis=1) >= spec.min_confidence
    targets = probs[taken]
    return taken, np.eye(probs.shape[1])[targets.argmax(axis=1)] if spec.hard else targets


def make_lesson(
    spec: ExperimentSpec,
    table: Table,
    classes: Sequence[str],
    fold: int,
    rows: np.ndarray,
    runtime: Runtime,
    of_unlabelled: _Ask,
    of_trained: _Ask,
) -> Lesson:
    """Put together what a unit is taught.

    Args:
        spec: The experiment.
        table: Images, labels and folds.
        classes: The classes that it learns.
        fold: The fold that is scored.
        rows: Labelled rows that are trained on; what is held back to be watched is not among them.
        runtime: Device, precision and threads.
        of_unlabelled: What the teachers of `pseudo` say.
        of_trained: What the teachers of `distill` say.

    Returns:
        The lesson. With both sections the images with pseudo-labels are matched as well.
    """
    count = len(classes)
    targets = np.zeros((len(table.ids), count), dtype=np.float32)
    targets[rows] = np.eye(count, dtype=np.float32)[table.labels[rows]]
    weights = np.ones(len(table.ids), dtype=np.float32)
    added, told, info = rows[:0], [], {}
    if spec.pseudo is not None:
        unlabelled = np.flatnonzero((table.labels < 0) if table.barred is None else (table.labels < 0) & ~table.barred)
        taken, labels = pseudo_labels(of_unlabelled(fold, unlabelled, runtime), spec.pseudo)
        added = unlabelled[taken]
        targets[added] = labels
        weights[added] = spec.pseudo.weight
        counts = np.bincount(labels.argmax(axis=1), minlength=count).tolist()
        each = ", ".join(f"{name} {number}" for name, number in zip(classes, counts, strict=True) if number)
        more = f" ({each})" if each else "; a lower `pseudo.min_confidence` would take some"
        told.append(f"{len(added)} of {len(unlabelled)} unlabelled images are labelled by teachers{more}")
        info = {"n_pseudo": len(added), "n_unlabelled": len(unlabelled)}
    if spec.distill is None:
        return Lesson(added, Taught(targets, weights), told, info)
    asked = np.concatenate([rows, added])
    matched = np.zeros_like(targets)
    probs = of_trained(fold, asked, runtime)
    matched[asked] = softened(probs, spec.distill.temperature)
    agree = float((probs.argmax(axis=1) == targets[asked].argmax(axis=1)).mean())
    told.append(f"teachers give {agree:.1%} of the {len(asked)} trained images their label")
    taught = Taught(targets, weights, matched, spec.distill.weight, spec.distill.temperature)
    return Lesson(added, taught, told, info | {"teacher_agreement": agree})


def _differences(run: Run, spec: ExperimentSpec, data: Dataset, classes: Sequence[str]) -> Iterator[str]:
    """Why a complete run cannot teach; nothing where it can."""
    info, competition = run.info, data.competition
    if run.name == spec.name:
        yield "is this very run"
    if info["smoke"]:
        yield "is a smoke run"
    if info["competition"] != competition.name:
        yield f"was trained on {info['competition']}, not on {competition.name}"
    elif info["split"]["kind"] != "kfold":
        yield f"has no models that leave out one fold each (split kind {info['split']['kind']})"
    elif info["hashes"]["folds"] != data.folds.sha256:
        mine, theirs = data.folds.sha256[:8], info["hashes"]["folds"][:8]
        yield f"was trained on other folds ({theirs}, here {mine}), and so on labels that this experiment is scored on"
    elif info["hashes"]["inputs"] != data.sha256:
        yield f"was trained on other images or labels ({info['hashes']['inputs'][:8]}, here {data.sha256[:8]})"
    elif run.classes != tuple(classes):
        yield f"is of other classes ({', '.join(run.classes)}; here {', '.join(classes)})"
    elif _merged(competition.classes, info.get("label_map")) != _merged(competition.classes, spec.label_map):
        yield "merges the classes in another way (`label_map`)"
    elif (why := outdated(info["leak_guard"], data)) is not None:
        yield why


def _merged(classes: Sequence[str], label_map: dict[str, str] | None) -> list[str]:
    return [(label_map or {}).get(name, name) for name in classes]


def _without_unlabelled(spec: ExperimentSpec, data: Dataset, table: Table) -> Iterator[Fault]:
    if spec.pseudo is not None and not (table.labels < 0).any():
        what = f"{data.competition.name} has no unlabelled images to be given labels"
        yield Fault("pseudo", what, "remove the section")


def _sha256(run: Run) -> str:
    """Of all that a run may teach: its predictions, and the weights that predict."""
    return sha256_json([run.info["hashes"]["oof"], run.info["hashes"]["test"], run.info["weights"]])
