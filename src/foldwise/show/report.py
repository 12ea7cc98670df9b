"""What a kept run was like: `oof/<exp>/report/` with its curves, confusions, calibration, mistakes and doubtful labels.

All of it follows from the kept files, so that a report can be made again, to the same bytes, whenever it is wanted.
"""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from foldwise.data.competition import Dataset, competition_folder, load_dataset
from foldwise.data.folds import read_folds
from foldwise.errors import Fault, FoldwiseError, RecordError
from foldwise.files import atomic_write
from foldwise.metrics import METRICS, Floats, Labels, Metric, confusion_matrix, per_class_table
from foldwise.records.store import Run, external_words, load_run, rows_of, shown
from foldwise.show.plots import (
    Bins,
    Columns,
    Compared,
    Tile,
    Unit,
    column_title,
    draw_calibration,
    draw_comparison,
    draw_confusion,
    draw_gallery,
    draw_history,
    mean_curve,
)
from foldwise.spec.yaml import read_yaml
from foldwise.stats import bootstrap, interval, wilson

if TYPE_CHECKING:
    from foldwise.records.store import Ids
    from foldwise.runs.evaluate import Evaluation

BINS = 15
_TILES = 24
_CONFUSIONS = 5
_DRAWS = 1000

# Pictures of the competition's own images are not for publishing; git ignores them.
_HISTORY, _CONFUSION, _CALIBRATION = "history.png", "confusion.png", "calibration.png"
_TEXT, _TABLE = "classification_report.txt", "classification_report.csv"
_MISTAKES, _LABELS, _LABEL_TILES = "mistakes.png", "label_errors.csv", "label_errors.png"
_FILES = (_HISTORY, _CONFUSION, _CALIBRATION, _TEXT, _TABLE, _MISTAKES, _LABELS, _LABEL_TILES)


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        files: In the order in which they were written.
        notes: Lines for the user about what was left out, and why.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...]


class Scored(Protocol):
    """Predictions beside their labels: a run's out-of-fold ones, or those on another set."""

    @property
    def classes(self) -> tuple[str, ...]:
        """C names."""

    @property
    def ids(self) -> Ids:
        """(N,)."""

    @property
    def labels(self) -> Labels:
        """(N,) class indices."""

    @property
    def probs(self) -> NDArray[np.float64]:
        """(N, C)."""


@dataclass(frozen=True)
class CalibrationError(Metric):
    """Expected calibration error over given bins, a `Metric` so that `stats.bootstrap` draws it.

    It is the sum over bins of |images that are right - sum of confidences|, by the number of images: Guo et al. 2017,
    "On Calibration of Modern Neural Networks", equation 3.

    Attributes:
        edges: B + 1 increasing edges from 0 to 1; a bin holds its upper edge, not its lower.
    """

    edges: tuple[float, ...]

    def statistics(self, labels: Labels, probs: Floats) -> NDArray[np.float64]:
        """What each image adds: its right minus its confidence in the column of its bin, and 1 in the last.

        Args:
            labels: (N,) class indices.
            probs: (N, C) class probabilities.

        Returns:
            (N, B + 1).
        """
        rows = np.zeros((len(labels), len(self.edges)))
        confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
        rows[np.arange(len(labels)), bin_of(confidence, self.edges)] = right - confidence
        rows[:, -1] = 1
        return rows


@dataclass(frozen=True)
class BinnedError:
    """An expected calibration error and how sure it is.

    Attributes:
        value: As it is defined; never below the truth on average, even for a perfect model.
        corrected: Less its bias as the bootstrap sees it, at least 0.
        interval: 95% interval around `corrected`.
    """

    value: float
    corrected: float
    interval: tuple[float, float]

    def shown(self, digits: int) -> str:
        """`0.028, less its bias 0.018 [0.005, 0.030]`, with so many digits."""
        corrected, low, high = (f"{number:.{digits}f}" for number in (self.corrected, *self.interval))
        return f"{self.value:.{digits}f}, less its bias {corrected} [{low}, {high}]"


@dataclass(frozen=True)
class Calibration:
    """How far confidence is from accuracy.

    Attributes:
        ece: Expected calibration error over 15 bins of equal width.
        adaptive: The same over 15 bins of about equally many images (Nguyen and O'Connor 2015).
        confidence: Mean confidence.
        accuracy: Share that is right.
    """

    ece: BinnedError
    adaptive: BinnedError
    confidence: float
    accuracy: float


def bin_of(confidence: Floats, edges: Sequence[float]) -> NDArray[np.intp]:
    """The bin of each confidence, (N,), where a bin holds its upper edge, not its lower; 0 belongs to the first."""
    return np.searchsorted(np.asarray(edges)[1:-1], confidence, side="left")


def calibration_metric(edges: Iterable[float]) -> CalibrationError:
    """Expected calibration error over bins between `edges`, as a metric."""
    return CalibrationError(
        "calibration_error",
        greater_is_better=False,
        hard=False,
        finish=lambda sums: np.asarray(np.abs(sums[..., :-1]).sum(axis=-1) / sums[..., -1]),
        edges=tuple(edges),
    )


def equal_width(bins: int = BINS) -> tuple[float, ...]:
    """Edges of bins of equal width."""
    return tuple(np.linspace(0, 1, bins + 1).tolist())


def equal_mass(confidence: Floats, bins: int = BINS) -> tuple[float, ...]:
    """Edges of bins that hold about equally many of the (N,) confidences; fewer bins where many are equal."""
    inner = np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1])
    return (0.0, *(edge for edge in np.unique(inner).tolist() if 0 < edge < 1), 1.0)


def calibrate(labels: Labels, probs: Floats, groups: NDArray[Any]) -> Calibration:
    """Measure calibration, with intervals by bootstrap over groups.

    The estimate is biased upwards, and so are its bootstrap draws once more: the interval is the basic one, which
    turns the draws about the estimate and so takes the bias off (Davison and Hinkley 1997, section 5.2), cut at 0.

    Args:
        labels: (N,) class indices.
        probs: (N, C) class probabilities.
        groups: (N,) names; images of one group are drawn together.
    """
    confidence = probs.max(axis=1)
    errors = []
    for edges in (equal_width(), equal_mass(confidence)):
        metric = calibration_metric(edges)
        value = metric.score(labels, probs)
        drawn = 2 * value - bootstrap(metric, labels, [probs], groups, draws=_DRAWS)[:, 0]
        low, high = interval(np.maximum(drawn, 0), 0.95)
        errors.append(BinnedError(value, max(0.0, float(drawn.mean())), (low, high)))
    accuracy = float((probs.argmax(axis=1) == labels).mean())
    ece, adaptive = errors
    return Calibration(ece, adaptive, float(confidence.mean()), accuracy)


def reliability(labels: Labels, probs: Floats) -> Bins:
    """Bin predictions by confidence, 15 bins of equal width, empty ones left out.

    Args:
        labels: (N,) class indices.
        probs: (N, C) class probabilities.
    """
    edges = np.array(equal_width())
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    place = bin_of(confidence, equal_width())
    count = np.bincount(place, minlength=BINS)
    full = count > 0
    hits = np.bincount(place, weights=right, minlength=BINS)[full]
    mean = np.bincount(place, weights=confidence, minlength=BINS)[full] / count[full]
    return Bins(edges[:-1][full], edges[1:][full], count[full], mean, hits / count[full], wilson(hits, count[full]))


def classification_table(labels: Labels, probs: Floats, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class with 95% Wilson intervals, and their averages, as scikit-learn has them.

    Args:
        labels: (N,) class indices, N > 0.
        probs: (N, C) class probabilities.
        classes: C names.

    Returns:
        A row a class, then `macro avg` (over the classes that occur among labels or predictions) and `weighted avg`
        (by the images of each class), which have no intervals (None).
    """
    counts = confusion_matrix(labels, probs)
    hits, support, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    precisions, recalls = wilson(hits, predicted).tolist(), wilson(hits, support).tolist()
    table = [
        {
            "class": row["class"],
            "precision": row["precision"],
            "precision_low": precisions[index][0],
            "precision_high": precisions[index][1],
            "recall": row["recall"],
            "recall_low": recalls[index][0],
            "recall_high": recalls[index][1],
            "f1": row["f1"],
            "support": row["support"],
        }
        for index, row in enumerate(per_class_table(labels, probs, classes))
    ]
    occurs = (support + predicted > 0).astype(np.float64)
    averages = []
    for name, weights in (("macro avg", occurs), ("weighted avg", support)):
        mean = {key: float(np.average([row[key] for row in table], weights=weights)) for key in _RATIOS}
        averages.append({**dict.fromkeys(table[0]), "class": name, **mean, "support": int(support.sum())})
    return table + averages


_RATIOS = ("precision", "recall", "f1")


def label_errors(labels: Labels, probs: Floats) -> NDArray[np.intp]:
    """Rows whose label is likely wrong, the likeliest first, by cleanlab (Northcutt et al. 2021, JAIR 70:1373).

    What both of its prunings flag, ranked by the probability of the given label. With a weak model most of them are
    the model's own errors: the order tells more than the number.

    Args:
        labels: (N,) class indices.
        probs: (N, C) out-of-fold probabilities.

    Raises:
        FoldwiseError: If cleanlab is not installed.
    """
    try:
        from cleanlab.filter import find_label_issues
    except ImportError:
        raise FoldwiseError('cleanlab is not installed\n  fix: pip install "foldwise[report]"') from None
    if len(np.unique(labels)) < 2:
        return np.array([], dtype=np.intp)
    # More jobs are processes, which cost more than they save here.
    with warnings.catch_warnings():
        # A class of one image or none is left alone, as it should be.
        warnings.filterwarnings("ignore", message="May not flag all label issues", category=UserWarning)
        flagged = find_label_issues(
            labels, probs, filter_by="both", return_indices_ranked_by="self_confidence", n_jobs=1
        ).astype(np.intp)
    # Ranked by a sort that is not stable; of equals the first row comes first.
    own = probs[flagged, labels[flagged]]
    ranked: NDArray[np.intp] = flagged[np.lexsort((flagged, own))]
    return ranked


def write_report(run_path: Path, *, root: Path) -> Report:
    """Write `report/` into the folder of a kept run; what an older report left there is replaced.

        report/history.png                 learning curves
               confusion.png               confusion matrix
               calibration.png             reliability diagram
               classification_report.txt   scores, table of classes, calibration, with their uncertainty
               classification_report.csv   the table alone
               label_errors.csv            likely label errors, the likeliest first
               mistakes.png                the most confident mistakes          needs the images; ignored by git
               label_errors.png            the likeliest label errors           needs the images; ignored by git

    Args:
        run_path: `oof/<exp>`.
        root: The project's root, for folds and images.

    Returns:
        The files, and notes on those that could not be made.

    Raises:
        RecordError: If the run is not complete, or its files are not what they were.
    """
    run = load_run(run_path)
    folder = run_path / "report"
    notes: list[str] = []
    written: list[Path] = []

    def place(name: str) -> Path:
        written.append(folder / name)
        return folder / name

    _write_history_picture(run, place(_HISTORY))
    if not len(run.ids):
        notes.append("nothing was held out to validate on: there are the learning curves alone")
    else:
        groups = _groups(run, root, notes)
        calibration = calibrate(run.labels, run.probs, groups)
        counts = confusion_matrix(run.labels, run.probs)
        scored = f"{len(run.ids):,} images, out of fold" if _is_kfold(run) else f"{len(run.ids):,} held-out images"
        _write_confusion_picture(run.name, counts, run.classes, scored, place(_CONFUSION))
        _write_calibration_picture(run, run.name, calibration, place(_CALIBRATION))
        table = classification_table(run.labels, run.probs, run.classes)
        atomic_write(place(_TABLE), _table_csv(table))
        doubtful = None
        try:
            doubtful = label_errors(run.labels, run.probs)
            atomic_write(place(_LABELS), _label_errors_csv(run, doubtful))
        except FoldwiseError as error:
            notes.append(f"{_LABELS} is left out: {error}")
        text = _text(run, scored, table, calibration, counts, groups, doubtful)
        atomic_write(place(_TEXT), text)
        data = _images(run, root, notes)
        if data is not None:
            _write_galleries(run, data, doubtful, place, notes)
    for name in _FILES:
        if folder / name not in written:
            (folder / name).unlink(missing_ok=True)
    return Report(tuple(written), tuple(notes))


def write_evaluation(evaluation: Evaluation) -> Report:
    """Draw how a run does on another set, into the folder of the evaluation; what was drawn there before is replaced.

        confusion.png, calibration.png, classification_report.txt, classification_report.csv    as in a run's report
        mistakes.png                                                                            ignored by git

    Args:
        evaluation: As `runs.evaluate` gives it; all figures are of the images that count.

    Returns:
        The files, and notes on those that could not be made.
    """
    folder, info, classes = evaluation.path, evaluation.info, evaluation.classes
    name = f"{info['experiment']} on {info['name']}"
    notes: list[str] = []
    written: list[Path] = []

    def place(file: str) -> Path:
        written.append(folder / file)
        return folder / file

    counts = confusion_matrix(evaluation.labels, evaluation.probs)
    calibration = calibrate(evaluation.labels, evaluation.probs, evaluation.groups)
    scored = f"{len(evaluation.ids):,} images"
    if twins := info["twins"]["n"]:
        scored += f", {twins:,} twins of trained-on ones left out"
    _write_confusion_picture(name, counts, classes, scored, place(_CONFUSION))
    _write_calibration_picture(evaluation, name, calibration, place(_CALIBRATION))
    table = classification_table(evaluation.labels, evaluation.probs, classes)
    atomic_write(place(_TABLE), _table_csv(table))
    lines = [f"{name}: {scored}", ""]
    lines += _score_lines(evaluation, info["metric"], info["standard_error"], calibration, evaluation.groups)
    if info["twins"]["naive_score"] is not None:
        lines.append(_after("with the twins", f"{info['twins']['naive_score']:.4f} (not to be trusted)"))
    lines += _table_part(table, counts, classes)
    atomic_write(place(_TEXT), "\n".join([*lines, "", *(f"Note: {note}." for note in info["notes"])]).rstrip() + "\n")
    _write_mistakes(evaluation, name, evaluation.images, place, notes)
    if folder / _MISTAKES not in written:
        (folder / _MISTAKES).unlink(missing_ok=True)
    return Report(tuple(written), tuple(notes))


def evaluation_lines(evaluation: Evaluation, root: Path) -> list[str]:
    """What the terminal says of an evaluation."""
    info, twins = evaluation.info, evaluation.info["twins"]
    low, high = info["interval"]
    title = column_title(info["metric"]).lower()
    lines = [f"{info['experiment']} on {info['on']}" + (f", part {info['part']}" if info["part"] else "")]
    value = f"{info['score']:.4f} +- {info['standard_error']:.4f}, {info['level']:.0%} interval {low:.4f} to {high:.4f}"
    lines.append(f"score        {title} {value}, on {info['n_scored']:,} images")
    if info["out_of_fold"] is not None:
        lines.append(f"out of fold  {info['out_of_fold']:.4f} on {info['competition']}")
    if twins["n"]:
        told = f"{twins['n']:,} of {info['n_images']:,} images are left out"
        lines.append(f"twins        {told}: the run may have been trained on them")
        lines.append(f"naive        {twins['naive_score']:.4f} (with the twins: not to be trusted)")
    elif twins["checked"]:
        told = f"the closest correlates {twins['closest']:.2f}, below {twins['threshold']:g}"
        lines.append(f"twins        none found among the images that the run may have been trained on ({told})")
    counts = confusion_matrix(evaluation.labels, evaluation.probs)
    if found := _confusions(counts, 3):
        told = ", ".join(f"{evaluation.classes[t]} -> {evaluation.classes[s]} {counts[t, s]:,}" for t, s in found)
        lines.append(f"confused     {told}")
    lines += [f"note         {note}" for note in info["notes"]]
    lines.append(f"written      {evaluation.path.relative_to(root)}")
    return lines


def write_comparison(root: Path, names: Sequence[str], path: Path) -> Path:
    """Draw several kept runs of one competition side by side: scores, validation curves, recall of each class.

    Args:
        root: The project's root.
        names: Runs under `oof/`; one named twice counts once.
        path: The PNG to write.

    Returns:
        `path`.

    Raises:
        RecordError: If no run is named, one is not complete or scored nothing, or they differ in competition, metric
            or classes; all such faults at once.
    """
    faults: list[Fault] = []
    runs: list[Run] = []
    for name in dict.fromkeys(names):
        try:
            run = load_run(root / "oof" / name)
        except RecordError as error:
            faults += error.faults
            continue
        if not len(run.ids):
            faults.append(Fault(shown(run.path), "has no score: nothing was held out", "compare it by another run"))
        runs.append(run)
    if not names:
        faults.append(Fault("comparison", "no run is named", "RUNS=a,b"))
    for run in runs[1:]:
        faults += _unlike(runs[0], run)
    if faults:
        raise RecordError(faults)
    metric = METRICS[runs[0].info["metric"]]
    runs.sort(key=lambda run: (-metric.sign * run.info["score"], run.name))
    compared = [_compared(run, metric) for run in runs]
    sizes = sorted({len(run.ids) for run in runs})
    note = f"Each scored on {' or '.join(f'{size:,}' for size in sizes)} images it was not trained on."
    if len({tuple(sorted(run.ids.tolist())) for run in runs}) > 1:
        note += " The runs were not scored on the same images: small differences mean nothing."
    elif len(runs) > 1:
        note += " They share their images: the error of a difference is smaller than the errors shown suggest."
    if marked := [f"{run.name} ({', '.join(run.info['marks'])})" for run in runs if run.info["marks"]]:
        note += f" Marked: {'; '.join(marked)}."
    title = f"{runs[0].info['competition']}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}"
    draw_comparison(path, compared, runs[0].classes, metric=metric.name, title=title, note=note)
    return path


def _unlike(first: Run, other: Run) -> list[Fault]:
    """Why two runs cannot be drawn into one comparison."""
    faults = []
    for what, key in (("competition", "competition"), ("metric", "metric"), ("classes", "classes")):
        if first.info[key] != other.info[key]:
            mine, theirs = (", ".join(v) if isinstance(v, list) else v for v in (other.info[key], first.info[key]))
            text = f"cannot be compared with {first.name}: its {what} must be {theirs}, but got {mine}"
            faults.append(Fault(shown(other.path), text, "compare runs of one competition"))
    return faults[:1]


def _compared(run: Run, metric: Metric) -> Compared:
    units = read_curves(run)
    column = "val_loss" if metric.name == "log_loss" else f"val_{metric.name}"
    counts = confusion_matrix(run.labels, run.probs)
    hits, support = counts.diagonal(), counts.sum(axis=1)
    recall = np.divide(hits, support, out=np.full(len(hits), np.nan), where=support > 0)
    epochs, curve = mean_curve(units, column)
    return Compared(
        run.name,
        run.info["score"],
        run.info["standard_error"],
        tuple(run.info["fold_scores"].values()),
        epochs,
        curve,
        recall,
        np.where(np.isnan(recall)[:, None], np.nan, wilson(hits, support)),
    )


def _is_kfold(run: Run) -> bool:
    return bool(run.info["split"].get("kind", "kfold") == "kfold")


def _groups(run: Run, root: Path, notes: list[str]) -> NDArray[np.str_]:
    """Groups of near-duplicates, (N,); each image its own where folds.csv does not tell."""
    path = competition_folder(root, run.info["competition"]) / "folds.csv"
    try:
        return read_folds(path).groups_of(run.ids.tolist())
    except (FoldwiseError, KeyError):
        notes.append(f"{path.parent.name}/folds.csv does not hold the run's ids: every image counts as independent")
        return run.ids


def _images(run: Run, root: Path, notes: list[str]) -> Dataset | None:
    """The images that the run was scored on, or None and a note."""
    left_out = f"{_MISTAKES} and {_LABEL_TILES} are left out"
    try:
        data = load_dataset(root, run.info["competition"])
    except FoldwiseError as error:
        first = str(error).splitlines()[0]
        notes.append(f"{left_out}: no images ({first})")
        return None
    if data.sha256 != run.info["hashes"]["inputs"]:
        notes.append(f"{left_out}: the images or labels of {run.info['competition']} are not those of the run")
        return None
    return data


def read_curves(run: Run) -> dict[Unit, dict[str, NDArray[np.float64]]]:
    """The run's `history.csv` as columns of each unit; NaN where a cell is empty or not finite."""
    path = run.path / "history.csv"
    where = shown(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        by_unit: dict[Unit, list[dict[str, str]]] = {}
        for row in rows:
            by_unit.setdefault((int(row["fold"]), int(row["seed"])), []).append(row)
        if not rows:
            raise ValueError("no epoch is in it")
        units = {
            key: {
                name: np.array([float(row[name] or "nan") for row in of_unit])
                for name in of_unit[0]
                if any(row[name] for row in of_unit)
            }
            for key, of_unit in sorted(by_unit.items())
        }
    except FileNotFoundError:
        raise RecordError([Fault(where, "is missing", "take it back with git, or redo the run")]) from None
    except (ValueError, KeyError, TypeError) as error:
        what = f"is not a history that can be read ({error})"
        raise RecordError([Fault(where, what, "take it back with git, or redo the run")]) from None
    return {
        key: {name: np.where(np.isfinite(column), column, np.nan) for name, column in columns.items()}
        for key, columns in units.items()
    }


def kept_epoch(columns: Columns, train: Mapping[str, Any], metric: Metric) -> int:
    """The epoch whose weights a unit kept, replayed from its history.

    Args:
        columns: Of the unit's history.
        train: The spec's `train` section.
        metric: The competition's.
    """
    last = int(columns["epoch"][-1])
    if train.get("keep", "last") != "best":
        return last
    part = "inner" if any(name.startswith("inner_") for name in columns) else "val"
    watched = METRICS["log_loss"] if train.get("watch_figure") == "log_loss" else metric
    column = columns.get(f"{part}_{'loss' if watched.name == 'log_loss' else watched.name}")
    if column is None or np.isnan(column).all():
        return last
    return int(columns["epoch"][int(np.nanargmax(watched.sign * column))])


def _write_history_picture(run: Run, path: Path) -> None:
    units = read_curves(run)
    spec: dict[str, Any] = read_yaml(run.path / "spec.yaml").value
    metric = METRICS[run.info["metric"]]
    kept = {key: kept_epoch(columns, spec.get("train", {}), metric) for key, columns in units.items()}
    mix, loss = spec.get("mix", {}), spec.get("loss", {})
    ways = []
    if mix.get("mixup_alpha") or mix.get("cutmix_alpha"):
        ways.append("mixed images (mixup or CutMix)")
    elif spec.get("augment"):
        ways.append("augmented images")
    if loss.get("label_smoothing"):
        ways.append(f"smoothed labels ({loss['label_smoothing']:g})")
    note = f"Training figures are of {' and '.join(ways)}: not comparable with validation." if ways else ""
    draw_history(path, units, kept, metric=metric.name, title=f"{run.name}: learning curves", note=note)


def _write_confusion_picture(
    name: str, counts: NDArray[np.int64], classes: Sequence[str], scored: str, path: Path
) -> None:
    note = f"{scored}. Colour and percentage: share of the images of the true class (its row)."
    draw_confusion(path, counts, classes, title=f"{name}: confusion matrix", note=note)


def _write_calibration_picture(scored: Scored, name: str, calibration: Calibration, path: Path) -> None:
    lines = [
        f"calibration error {calibration.ece.shown(3)}",
        f"with adaptive bins {calibration.adaptive.shown(3)}",
        f"mean confidence {calibration.confidence:.3f}, accuracy {calibration.accuracy:.3f}",
    ]
    note = (
        f"{len(scored.ids):,} images; {BINS} bins of equal width. Points: 95% Wilson intervals. Brackets: 95% basic "
        "bootstrap over groups of near-duplicates."
    )
    bins = reliability(scored.labels, scored.probs)
    draw_calibration(path, bins, lines=lines, title=f"{name}: calibration", note=note)


def _write_galleries(
    run: Run, data: Dataset, doubtful: NDArray[np.intp] | None, place: Callable[[str], Path], notes: list[str]
) -> None:
    images = data.images[rows_of(data.ids, run.ids)]
    _write_mistakes(run, run.name, images, place, notes)
    if doubtful is not None and len(doubtful):
        own = run.probs[np.arange(len(run.ids)), run.labels]
        note = (
            f"Of {len(doubtful):,} that cleanlab flags. Id (probability of the given label), given → suggested class."
        )
        title = f"{run.name}: the likeliest label errors"
        draw_gallery(place(_LABEL_TILES), _tiles(run, images, doubtful, own, 3), title=title, note=note)
    elif doubtful is not None:
        notes.append(f"{_LABEL_TILES} is left out: no label is doubtful")


def _write_mistakes(
    scored: Scored, name: str, images: NDArray[np.uint8], place: Callable[[str], Path], notes: list[str]
) -> None:
    """Draw the most confident mistakes; `images` (N, H, W, C) are in the order of the predictions."""
    predicted, confidence = scored.probs.argmax(axis=1), scored.probs.max(axis=1)
    wrong = np.flatnonzero(predicted != scored.labels)
    wrong = wrong[np.lexsort((wrong, -confidence[wrong]))]
    if len(wrong):
        note = f"Of {len(wrong):,} mistakes. Id (confidence), true → predicted class."
        title = f"{name}: the most confident mistakes"
        draw_gallery(place(_MISTAKES), _tiles(scored, images, wrong, confidence, 2), title=title, note=note)
    else:
        notes.append(f"{_MISTAKES} is left out: there is no mistake")


def _tiles(
    scored: Scored, images: NDArray[np.uint8], rows: NDArray[np.intp], figures: Floats, digits: int
) -> list[Tile]:
    predicted = scored.probs.argmax(axis=1)
    return [
        Tile(
            np.asarray(images[row]),
            str(scored.ids[row]),
            f"{figures[row]:.{digits}f}",
            scored.classes[scored.labels[row]],
            scored.classes[predicted[row]],
        )
        for row in rows[:_TILES].tolist()
    ]


def _label_errors_csv(run: Run, doubtful: NDArray[np.intp]) -> str:
    header = ["rank", "id", "label", "suggested", "self_confidence", "suggested_confidence"]
    predicted = run.probs.argmax(axis=1)
    rows = (
        [
            str(rank),
            str(run.ids[row]),
            run.classes[run.labels[row]],
            run.classes[predicted[row]],
            f"{run.probs[row, run.labels[row]]:.6f}",
            f"{run.probs[row, predicted[row]]:.6f}",
        ]
        for rank, row in enumerate(doubtful.tolist(), start=1)
    )
    return _csv_text(header, rows)


def _text(
    run: Run,
    scored: str,
    table: Sequence[Mapping[str, Any]],
    calibration: Calibration,
    counts: NDArray[np.int64],
    groups: NDArray[np.str_],
    doubtful: NDArray[np.intp] | None,
) -> str:
    """The text report: what was scored, the scores, the table of classes, and what else there is to say."""
    info = run.info
    folds = list(info["fold_scores"].values())
    lines = [f"{run.name} on {info['competition']}: {scored}", ""]
    lines += _score_lines(run, info["metric"], info["standard_error"], calibration, groups)
    if len(folds) > 1:
        spread = float(np.std(folds, ddof=1))
        lines.append(_after("folds", f"{', '.join(f'{s:.4f}' for s in folds)} (standard deviation {spread:.4f})"))
    if info["seed_std"] is not None:
        seeds = ", ".join(f"{score:.4f}" for score in info["seed_scores"].values())
        lines.append(_after("seeds", f"{seeds} (standard deviation {info['seed_std']:.4f})"))
    if info.get("score_without_tta") is not None and info["tta"] not in ([], ["identity"]):
        lines.append(_after("without TTA", f"{info['score_without_tta']:.4f}"))
    if info.get("test_score") is not None:
        lines.append(_after("test part", f"{info['test_score']:.4f} +- {info['test_standard_error']:.4f}"))
    for source, score in (info.get("source_scores") or {}).items():
        told = f"{score['score']:.4f} +- {score['standard_error']:.4f} ({score['n_scored']:,} images)"
        lines.append(_after(f"source {source}", told))
    if info["marks"]:
        lines.append(_after("marks", ", ".join(info["marks"])))
    if info["external"]:
        lines.append(_after("external data", ", ".join(external_words(info["external"]))))
    lines += _table_part(table, counts, run.classes)
    if doubtful is not None:
        share = len(doubtful) / len(run.ids)
        lines += [
            "",
            f"Label errors: cleanlab flags {len(doubtful):,} of {len(run.ids):,} labels ({share:.0%}), among them many",
            f"errors of the model (accuracy {calibration.accuracy:.2f}): read {_LABELS} from its top.",
        ]
    return "\n".join(lines) + "\n"


def _score_lines(
    scored: Scored, name: str, standard_error: float, calibration: Calibration, groups: NDArray[Any]
) -> list[str]:
    """The metric `name`, whose error is known, the other usual ones, and calibration."""
    lines = []
    for metric in (METRICS[key] for key in dict.fromkeys([name, "accuracy", "macro_f1", "log_loss"])):
        drawn = bootstrap(metric, scored.labels, [scored.probs], groups, draws=_DRAWS)[:, 0]
        low, high = interval(drawn, 0.95)
        error = standard_error if metric.name == name else float(drawn.std(ddof=1))
        value = f"{metric.score(scored.labels, scored.probs):.4f} +- {error:.4f}   95% {low:.4f} to {high:.4f}"
        lines.append(_after(column_title(metric.name), value))
    lines.append(_after("calibration error", calibration.ece.shown(4)))
    lines.append(_after("  adaptive bins", calibration.adaptive.shown(4)))
    return lines


def _table_part(table: Sequence[Mapping[str, Any]], counts: NDArray[np.int64], classes: Sequence[str]) -> list[str]:
    lines = ["", *_table_lines(table), ""]
    lines.append("[ ] 95% Wilson intervals, images taken as independent; +- standard error and 95% by bootstrap over")
    lines.append("groups of near-duplicates. All of it is conditional on the models as they were trained.")
    if absent := [row["class"] for row in table[:-2] if not row["support"]]:
        lines.append(f"No image is of: {', '.join(absent)}.")
    if never := [row["class"] for row, column in zip(table[:-2], counts.sum(axis=0), strict=True) if not column]:
        lines.append(f"Never predicted: {', '.join(never)}.")
    return lines + _confusion_lines(counts, classes)


def _after(what: str, value: str) -> str:
    return f"{what:<20} {value}"


def _table_lines(table: Sequence[Mapping[str, Any]]) -> list[str]:
    width = max(len(row["class"]) for row in table)
    lines = [f"{'':<{width}}  {'precision':<21}  {'recall':<21}  {'F1':<6}  images", ""]
    for row in table:
        cells = []
        for key in ("precision", "recall"):
            low, high = row[f"{key}_low"], row[f"{key}_high"]
            spread = "" if low is None else f" [{low:.3f}, {high:.3f}]"
            cells.append(f"{row[key]:.4f}{spread:<15}")
        line = f"{row['class']:<{width}}  {cells[0]}  {cells[1]}  {row['f1']:.4f}  {row['support']:>6,}"
        lines += ["", line] if row is table[-2] else [line]
    return lines


def _table_csv(table: Sequence[Mapping[str, Any]]) -> str:
    return _csv_text(list(table[0]), ([_cell(value) for value in row.values()] for row in table))


def _confusion_lines(counts: NDArray[np.int64], classes: Sequence[str]) -> list[str]:
    """The most frequent confusions, as counts and shares of the true class."""
    found = _confusions(counts, _CONFUSIONS)
    if not found:
        return []
    support = counts.sum(axis=1)
    width = max(len(classes[true]) + len(classes[seen]) for true, seen in found) + 4
    return [
        "",
        "Most frequent confusions (true -> predicted):",
        *(
            f"  {f'{classes[true]} -> {classes[seen]}':<{width}}  {counts[true, seen]:>6,}  "
            f"{counts[true, seen] / support[true]:.0%} of {classes[true]}"
            for true, seen in found
        ),
    ]


def _confusions(counts: NDArray[np.int64], most: int) -> list[tuple[int, int]]:
    """The most frequent confusions, (true, predicted)."""
    off = counts - np.diag(counts.diagonal())
    cells = [divmod(cell, len(counts)) for cell in np.argsort(-off, axis=None, kind="stable")[:most].tolist()]
    return [(true, seen) for true, seen in cells if off[true, seen]]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6f}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _csv_text(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
