"""Scoring a kept run on another labelled set, into `oof/<exp>/eval/<called>/`.

An image that the run may have been trained on proves nothing: near-duplicates of its labelled images do not count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldwise.data.competition import CompetitionSpec, Dataset, load_competition, load_dataset
from foldwise.data.duplicates import groups, near_duplicates, nearest
from foldwise.data.labelled import Labelled, ingested_name, read_labelled
from foldwise.data.leaks import THRESHOLD, nearest_copies
from foldwise.errors import DataError, Fault, FoldwiseError, RecordError
from foldwise.files import atomic_write, pretty_json, sha256_file
from foldwise.learn.device import Runtime, device_name
from foldwise.metrics import METRICS, Labels
from foldwise.records.store import Ids, Probs32, Probs64, Run, external_words, load_run, read_probs, write_probs
from foldwise.runs.kept import kept_models
from foldwise.runs.provenance import command_line, git_state, versions
from foldwise.spec.model import EXPERIMENT_NAME, mapped_classes
from foldwise.stats import bootstrap, interval

SCHEMA_VERSION = 1
LEVEL = 0.95

_PREDICTIONS, _RECORD = "predictions.csv", "eval.json"
# External images compared at a time: `nearest_copies` needs some 30 KiB for each.
_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A run's predictions on another set: the images that count.

    Attributes:
        path: `oof/<exp>/eval/<called>`.
        info: The content of `eval.json`.
        classes: The run's, in the order of the indices.
        ids: (N,) ids.
        labels: (N,) int64 class indices.
        probs: (N, C) float64, as `predictions.csv` reads.
        groups: (N,) int64, the same for near-duplicates within the set.
        images: (N, H, W, C) uint8.
    """

    path: Path
    info: dict[str, Any]
    classes: tuple[str, ...]
    ids: Ids
    labels: Labels
    probs: Probs64
    groups: NDArray[np.int64]
    images: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class _Twins:
    """Which images the run may have been trained on.

    Attributes:
        of: (N,) id of the run's own image, or `<source>:<id>` of an external one; empty for none.
        closest: Correlation with the run's own images of the closest image that is none; None where nothing could be
            compared.
        unchecked: Why the run's own images could not be compared; empty where they were.
        notes: What came of comparing with the external images, a line for each of the run's sources.
        external_checked: Whether all sources could be compared.
    """

    of: Ids
    closest: float | None
    unchecked: str
    notes: list[str]
    external_checked: bool


def evaluate(
    root: Path,
    name: str,
    on: str,
    *,
    runtime: Runtime,
    class_map: Mapping[str, str | None] | None = None,
    part: str | None = None,
    called: str | None = None,
) -> Evaluation:
    """Score a kept run on a labelled set that it was not trained on.

        oof/<exp>/eval/<called>/predictions.csv    id,label,twin,p_<class>...; the mean over all units, as in test.csv
                                eval.json          written last: its presence means the evaluation is complete

    `twin` is the labelled image of the run's competition that the image is a near-duplicate of; such rows are not
    scored. A copy that was mirrored, turned, cropped or much compressed is not found: `closest` in `eval.json` is the
    correlation of the closest image that counts. Nor is a copy of an image of the run's external data scored, whose
    `twin` is `<source>:<id>`; those are found by the measure of the leak guard, mirrored or not.

    Args:
        root: The project's root.
        name: The run, `oof/<name>`.
        on: A competition under `inputs/`, a folder, or `hf:<owner/name>[@revision][:config]`.
        runtime: Device, precision and threads.
        class_map: From the set's class names to those of the run's competition; None: left out.
        part: Only this part of the set.
        called: Name of the evaluation; None: after the set and its part.

    Raises:
        RecordError: If the run is not complete or its weights are not here; if the set is its own competition; if the
            competition is not what it was.
        DataError: If the set cannot be read, its classes are not the competition's, or all of it are twins.
        FoldwiseError: If `called` is no name.
    """
    run = load_run(root / "oof" / name)
    called = _called(on, root, part) if called is None else called
    if not EXPERIMENT_NAME.fullmatch(called):
        raise FoldwiseError(
            f"an evaluation's name must be of lower-case letters, digits, `_`, `-` and `.`, but got {called!r}\n"
            "  fix: give it another (NAME=, --name)"
        )
    competition = load_competition(root, run.info["competition"])
    if ingested_name(on, root) == competition.name:
        _refuse_own(run)
    classes, becomes = _classes(run, competition)
    labelled = read_labelled(on, root=root, competition=competition, class_map=class_map or {}, part=part)
    labels = np.array(becomes, dtype=np.int64)[labelled.labels]
    twins = _twins(run, root, competition, labelled)
    counts = twins.of == ""
    if not counts.any():
        what = f"all {len(labels):,} images are near-duplicates of images that {name} may have been trained on"
        raise DataError([Fault(on, what, "score it on images that it has not seen")])
    probs, units = _predicted(run, competition, labelled, runtime)

    path = run.path / "eval" / called
    (path / _RECORD).unlink(missing_ok=True)
    leading = {"id": labelled.ids, "label": np.array(classes)[labels], "twin": twins.of}
    write_probs(path / _PREDICTIONS, leading, probs, classes)
    # Scored as it reads back, so that anyone can recompute it from there.
    _, read = read_probs(path / _PREDICTIONS, tuple(leading), classes)
    images = labelled.images[counts]
    group = groups(len(images), near_duplicates(images, threshold=competition.near_duplicate))
    metric = METRICS[run.info["metric"]]
    drawn = bootstrap(metric, labels[counts], [read[counts]], group)[:, 0]
    by_class = Counter(labels[counts].tolist())
    info = {
        "schema_version": SCHEMA_VERSION,
        "experiment": run.name,
        "competition": competition.name,
        "name": called,
        "on": on,
        "part": part,
        "metric": metric.name,
        "score": metric.score(labels[counts], read[counts]),
        "standard_error": float(drawn.std(ddof=1)),
        "interval": list(interval(drawn, LEVEL)),
        "level": LEVEL,
        "n_scored": int(counts.sum()),
        "n_images": len(labels),
        "n_groups": len(np.unique(group)),
        "class_counts": {label: by_class[index] for index, label in enumerate(classes)},
        "twins": {
            "checked": not twins.unchecked,
            "threshold": competition.near_duplicate,
            "n": int((~counts).sum()),
            "closest": twins.closest,
            "naive_score": None if counts.all() else metric.score(labels, read),
        },
        "out_of_fold": run.info["score"],
        "external": {"used": run.info["external"], "checked": twins.external_checked, "threshold": THRESHOLD},
        "class_map": dict(class_map or {}),
        "label_map": run.info.get("label_map"),
        "marks": run.info["marks"],
        "tta": run.info["tta"],
        "units": units,
        "notes": [*_doubts(twins), *labelled.notes],
        "hashes": {
            "data": labelled.sha256,
            "predictions": sha256_file(path / _PREDICTIONS),
            "run": sha256_file(run.path / "run.json"),
            "weights": run.info["weights"],
        },
        "git": git_state(root),
        "versions": versions(),
        "device": device_name(runtime.device),
        "threads": runtime.threads,
        "precision": runtime.precision,
        "command": command_line(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    atomic_write(path / _RECORD, pretty_json(info))
    return Evaluation(path, info, classes, labelled.ids[counts], labels[counts], read[counts], group, images)


def _called(on: str, root: Path, part: str | None) -> str:
    """A name after the set: the competition's, the folder's last part, or the hub's owner and name."""
    stem = ingested_name(on, root) or (on.removeprefix("hf:") if on.startswith("hf:") else Path(on).resolve().name)
    named = f"{stem}-{part}" if part else stem
    return re.sub(r"[^a-z0-9_.-]+", "_", named.lower()).strip("_.-")[:80]


def _refuse_own(run: Run) -> None:
    what = f"was trained on {run.info['competition']}"
    told = f"{run.info['metric']} {run.info['score']:.4f}" if run.info["score"] is not None else "none was held out"
    fix = f"its score there is the out-of-fold one of run.json ({told}); give another set"
    raise RecordError([Fault(f"oof/{run.name}", what, fix)])


def _classes(run: Run, competition: CompetitionSpec) -> tuple[tuple[str, ...], list[int]]:
    """The run's classes, and for each of the competition's the index of what the run merged it into."""
    where = f"inputs/{competition.name}/competition.yaml"
    fix = "put back what the run was trained with, or train it anew"
    try:
        classes, becomes = mapped_classes(competition.classes, run.info.get("label_map"))
    except KeyError as error:
        what = f"has the class {error}, which {run.name} was not trained with"
        raise RecordError([Fault(where, what, fix)]) from None
    if classes != run.classes:
        what = f"gives the classes {', '.join(classes)}, but {run.name} was trained with {', '.join(run.classes)}"
        raise RecordError([Fault(where, what, fix)])
    return classes, becomes


def _twins(run: Run, root: Path, competition: CompetitionSpec, labelled: Labelled) -> _Twins:
    """Compare with all that the run may have been trained on: its competition's images, and its external data."""
    of, notes, checked = _external_twins(run, root, labelled)
    data, reason = _taken_in(root, run.info["competition"], run.info["hashes"]["inputs"])
    if data is None:
        return _Twins(of, None, reason, notes, checked)
    # The unlabelled ones too, where teachers gave them labels.
    own = np.flatnonzero((data.labels >= 0) | ("transductive" in run.info["marks"]))
    row, similarity = nearest(labelled.images, data.images[own])
    of = np.where(similarity >= competition.near_duplicate, data.ids[own][row], of)
    counts = of == ""
    return _Twins(of, float(similarity[counts].max()) if counts.any() else None, "", notes, checked)


def _external_twins(run: Run, root: Path, labelled: Labelled) -> tuple[Ids, list[str], bool]:
    """Which images are copies of the run's external data, a line for each entry, and whether all could be compared."""
    of = np.zeros(len(labelled.ids), dtype="<U1")
    notes, checked = [], True
    for entry, words in zip(run.info["external"], external_words(run.info["external"]), strict=True):
        source, reason = None, "the record does not say which images these are"
        if isinstance(entry, dict) and "source" in entry and "inputs_sha256" in entry:
            source, reason = _taken_in(root, entry["source"], entry["inputs_sha256"])
        if source is None:
            checked = False
            notes.append(f"NOT CHECKED against the external data of the run, {words}: {reason}")
            continue
        row, similarity = _nearest_copies(labelled, source)
        copies = similarity >= THRESHOLD
        names = np.array([f"{entry['source']}:{image}" for image in source.ids[row].tolist()])
        of = np.where(copies & (of == ""), names, of)
        found = f"{int(copies.sum()):,} of {len(of):,} images are copies of these and do not count"
        if not copies.any():
            found = f"no image is a copy of these (similarity up to {similarity.max():.2f}, below {THRESHOLD:g})"
        notes.append(f"checked against the external data of the run, {words}: {found}")
    return of, notes, checked


def _nearest_copies(labelled: Labelled, source: Dataset) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The row of the source that each image is likeliest a copy of, and how similar the two are."""
    row = np.zeros(len(labelled.ids), dtype=np.int64)
    highest = np.full(len(labelled.ids), -1, dtype=np.float32)
    for start in range(0, len(source.ids), _BLOCK):
        here, similarity = nearest_copies(labelled.images, source.images[start : start + _BLOCK])
        better = similarity > highest
        row[better], highest[better] = start + here[better], similarity[better]
    return row, highest


def _taken_in(root: Path, name: str, sha256: str) -> tuple[Dataset | None, str]:
    """What a run was trained on, or why it is not here."""
    try:
        data = load_dataset(root, name)
    except FoldwiseError:
        return None, f"{name} was not taken in on this machine"
    if data.sha256 != sha256:
        return None, f"the images or labels of {name} are not those of the run"
    return data, ""


def _doubts(twins: _Twins) -> list[str]:
    """What may flatter the score, and could not be checked; and what could."""
    doubts = []
    if twins.unchecked:
        doubts.append(f"NOT CHECKED whether the run was trained on some of these images: {twins.unchecked}")
    return doubts + twins.notes


def _predicted(run: Run, competition: CompetitionSpec, labelled: Labelled, runtime: Runtime) -> tuple[Probs32, int]:
    """Probabilities averaged over all units, (N, C) float32, and the number of units."""
    total = np.zeros((len(labelled.ids), len(run.classes)))
    units = 0
    for model in kept_models(run, runtime):
        if model.channels != competition.image.channels:
            what = f"gives images of {competition.image.channels} channels, but {run.name} takes {model.channels}"
            fix = "put back what the run was trained with, or train it anew"
            raise RecordError([Fault(f"inputs/{competition.name}/competition.yaml", what, fix)])
        total += model.probabilities(labelled.images)
        units += 1
    return (total / units).astype(np.float32), units
