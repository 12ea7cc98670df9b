"""What lies in `oof/<exp>/tune/`: the trials of a study and what each of them predicted, verified when read back.

Every figure of a study can be recomputed from `scored.csv` and the competition's `folds.csv` alone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from foldwise.errors import Fault, RecordError
from foldwise.files import atomic_write, pretty_json, sha256_file
from foldwise.metrics import METRICS, Floats, Labels, Metric
from foldwise.records.store import Ids, Probs64, rows_of, shown, write_csv

SCHEMA_VERSION = 1

TrialState = Literal["complete", "pruned", "failed", "duplicate"]

_TRIALS, _SCORED, _STUDY = "trials.csv", "scored.csv", "tune.json"
_BEFORE_FOLDS = ["number", "state", "score", "standard_error", "wall_s"]
_FIX = "take the committed one back with git, or tune again with --fresh"


@dataclass(frozen=True)
class TrialRow:
    """A trial as `trials.csv` keeps it.

    Attributes:
        number: From 0, unique in the study.
        state: How it ended. A duplicate has the parameters and the scores of another trial, and trained nothing.
        parameters: Dotted keys of the spec and their plain values; a parameter whose condition does not hold is absent.
        fold_scores: The metric on each fold that was trained.
        score: The metric on all images of its folds together; None when there is none to compare.
        standard_error: Of `score`.
        wall_s: Seconds that its training took.
        reason: Why it was pruned or failed, or which trial it repeats; kept as one line.
    """

    number: int
    state: TrialState
    parameters: dict[str, Any]
    fold_scores: dict[int, float]
    score: float | None
    standard_error: float | None
    wall_s: float
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Scored:
    """What the trials of a study predicted for the images that they are scored on, as much of it as the metric sees.

    Attributes:
        metric: Name of the competition's metric.
        classes: Class names, in the order of the indices.
        ids: (N,) ids of the study's folds, each once.
        fold: (N,) int64.
        labels: (N,) int64 class indices.
        values: For each trial that scored anything (N,) float64: the index of the predicted class for a hard metric,
            else the probability of the true class; NaN where its fold was not trained.
    """

    metric: str
    classes: tuple[str, ...]
    ids: Ids
    fold: NDArray[np.int64]
    labels: Labels
    values: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def add(self, trial: int, ids: Ids, probs: Floats) -> None:
        """Take in what a trial predicted for a fold; what it predicted for other folds stays.

        Args:
            trial: Its number.
            ids: (n,) some of `self.ids`, in any order.
            probs: (n, C) probabilities; nine significant digits of the true class's are kept on disk.

        Raises:
            KeyError: For an id that is none of the study's.
        """
        rows = rows_of(self.ids, ids)
        column = self.values.setdefault(trial, np.full(len(self.ids), np.nan))
        column[rows] = probs.argmax(axis=1) if self._hard else probs[np.arange(len(rows)), self.labels[rows]]

    def score(self, trial: int) -> float:
        """The metric on all images that the trial predicted, together."""
        rows, probs = predictions_of(self, trial)
        return METRICS[self.metric].score(self.labels[rows], probs)

    def fold_scores(self, trial: int) -> dict[int, float]:
        """The metric on each fold that the trial predicted, by fold."""
        rows, probs = predictions_of(self, trial)
        fold, labels = self.fold[rows], self.labels[rows]
        metric = METRICS[self.metric]
        return {number: metric.score(labels[fold == number], probs[fold == number]) for number in _distinct(fold)}

    @property
    def _hard(self) -> bool:
        return METRICS[self.metric].hard


@dataclass(frozen=True, eq=False)
class Study:
    """A finished study, verified.

    Attributes:
        trials: In the order of their numbers.
        scored: What they predicted.
        info: The content of `tune.json`.
    """

    trials: tuple[TrialRow, ...]
    scored: Scored
    info: dict[str, Any]


def predictions_of(scored: Scored, trial: int) -> tuple[NDArray[np.intp], Probs64]:
    """Predictions that score as the trial's own do, by the study's metric.

    Args:
        scored: Of the study.
        trial: Number of a trial that scored anything.

    Returns:
        (n,) rows of `scored` that it predicted, in their order, and (n, C) probabilities: for a hard metric all on the
        predicted class, else that of the true class with the rest spread evenly. `metric.statistics` of them are those
        of the trial's own.

    Raises:
        KeyError: If the trial scored nothing.
    """
    values = scored.values[trial]
    rows = np.flatnonzero(~np.isnan(values))
    classes = len(scored.classes)
    if METRICS[scored.metric].hard:
        return rows, np.eye(classes)[values[rows].astype(np.int64)]
    true = values[rows]
    probs = np.repeat(((1 - true) / max(1, classes - 1))[:, None], classes, axis=1)
    probs[np.arange(len(rows)), scored.labels[rows]] = true
    return rows, probs


def write_tables(path: Path, trials: Sequence[TrialRow], scored: Scored) -> dict[str, str]:
    """Write `trials.csv` and `scored.csv`; a `tune.json` that vouches for older ones goes first.

    Args:
        path: `oof/<exp>/tune`.
        trials: In any order.
        scored: What they predicted.

    Returns:
        The sha256 of each file, by `trials` and `scored`.
    """
    (path / _STUDY).unlink(missing_ok=True)
    folds = _distinct(scored.fold)
    keys = list(dict.fromkeys(key for trial in trials for key in trial.parameters))
    ordered = sorted(trials, key=lambda trial: trial.number)
    write_csv(
        path / _TRIALS,
        [*_BEFORE_FOLDS, *(f"fold_{fold}" for fold in folds), "reason", *keys],
        (
            [
                str(trial.number),
                trial.state,
                _figure(trial.score),
                _figure(trial.standard_error),
                _figure(trial.wall_s),
                *(_figure(trial.fold_scores.get(fold)) for fold in folds),
                # Messages of libraries run over several lines.
                " ".join(trial.reason.split()),
                *(_cell(trial.parameters[key]) if key in trial.parameters else "" for key in keys),
            ]
            for trial in ordered
        ),
    )
    numbers = sorted(scored.values)
    columns = [_texts(scored, scored.values[number]) for number in numbers]
    names = np.array(scored.classes)[scored.labels].tolist()
    write_csv(
        path / _SCORED,
        ["id", "fold", "label", *(f"t{number}" for number in numbers)],
        zip(scored.ids.tolist(), map(str, scored.fold.tolist()), names, *columns, strict=True),
    )
    return {"trials": sha256_file(path / _TRIALS), "scored": sha256_file(path / _SCORED)}


def write_study(path: Path, trials: Sequence[TrialRow], scored: Scored, info: Mapping[str, Any]) -> dict[str, Any]:
    """Write a finished study, `tune.json` last: its presence means that the study is complete.

    Args:
        path: `oof/<exp>/tune`.
        trials: In any order.
        scored: What they predicted.
        info: Plain JSON values of the caller; `schema_version`, `metric`, `classes` and `hashes` are added.

    Returns:
        The content of `tune.json`.
    """
    hashes = write_tables(path, trials, scored)
    content = (
        {"schema_version": SCHEMA_VERSION}
        | dict(info)
        | {"metric": scored.metric, "classes": list(scored.classes), "hashes": hashes}
    )
    atomic_write(path / _STUDY, pretty_json(content))
    return content


def read_study(path: Path) -> Study:
    """Read a finished study, and verify that its files are those that were written and agree with each other.

    Args:
        path: `oof/<exp>/tune`.

    Returns:
        The study; every score in `trials` was recomputed from `scored`.

    Raises:
        RecordError: If there is none, or a file is missing, changed or damaged; says where.
    """
    where = shown(path)
    if not (path / _STUDY).exists():
        what = f"holds no finished study: it has no {_STUDY}"
        raise RecordError([Fault(where, what, "make tune EXP=<experiment>")])
    try:
        info = json.loads((path / _STUDY).read_bytes())
        metric, classes, hashes = METRICS[info["metric"]], tuple(info["classes"]), dict(info["hashes"])
        sums = {_TRIALS: hashes["trials"], _SCORED: hashes["scored"]}
    except (ValueError, TypeError) as error:
        raise RecordError([Fault(f"{where}/{_STUDY}", f"is not readable ({error})", _FIX)]) from None
    except KeyError as error:
        raise RecordError([Fault(f"{where}/{_STUDY}", f"lacks the key or names no metric: {error}", _FIX)]) from None
    faults = []
    for name, expected in sums.items():
        if not (path / name).exists():
            faults.append(Fault(f"{where}/{name}", "is missing", _FIX))
        elif sha256_file(path / name) != expected:
            faults.append(Fault(f"{where}/{name}", f"is not the file that {_STUDY} vouches for", _FIX))
    if faults:
        raise RecordError(faults)
    try:
        scored = _read_scored(path / _SCORED, metric, classes)
        trials = _read_trials(path / _TRIALS)
        _check(trials, scored)
    except ValueError as error:
        raise RecordError([Fault(where, str(error), _FIX)]) from None
    return Study(trials, scored, info)


def _distinct(fold: NDArray[np.int64]) -> list[int]:
    numbers: list[int] = np.unique(fold).tolist()
    return numbers


def _figure(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def _cell(value: Any) -> str:
    """A parameter's value as text: a string as it is where that is no JSON of another value, all else as JSON."""
    if isinstance(value, str) and value and value.isprintable() and _value(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _value(cell: str) -> Any:
    """What `_cell` wrote."""
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def _texts(scored: Scored, values: NDArray[np.float64]) -> list[str]:
    if METRICS[scored.metric].hard:
        return ["" if np.isnan(value) else scored.classes[int(value)] for value in values.tolist()]
    return ["" if np.isnan(value) else f"{value:.9g}" for value in values.tolist()]


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows; raises ValueError for no header, a repeated column, or a row of another length."""
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    if not rows:
        raise ValueError(f"{path.name}: is empty")
    header, *body = rows
    if len(set(header)) < len(header):
        raise ValueError(f"{path.name}:1: a column is there twice")
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise ValueError(f"{path.name}:{number}: {len(header)} cells must be there, but got {len(row)}")
    return header, body


def _read_scored(path: Path, metric: Metric, classes: tuple[str, ...]) -> Scored:
    header, rows = _read_csv(path)
    if header[:3] != ["id", "fold", "label"]:
        raise ValueError(f"{path.name}:1: the first columns must be id,fold,label, but are {','.join(header[:3])}")
    index = {name: position for position, name in enumerate(classes)}
    numbers = []
    for column in header[3:]:
        if not (column.startswith("t") and column[1:].isdecimal()):
            raise ValueError(f"{path.name}:1: no trial is called {column!r}")
        numbers.append(int(column[1:]))
    labels, values = np.empty(len(rows), dtype=np.int64), np.full((len(rows), len(numbers)), np.nan)
    fold, seen = np.empty(len(rows), dtype=np.int64), set()
    for row, (name, number, label, *cells) in enumerate(rows):
        place = f"{path.name}:{row + 2}"
        if name in seen:
            raise ValueError(f"{place}: the id {name} is there more than once")
        seen.add(name)
        try:
            fold[row] = int(number)
            labels[row] = index[label]
            for position, cell in enumerate(cells):
                if cell:
                    values[row, position] = index[cell] if metric.hard else _probability(cell)
        except KeyError as error:
            raise ValueError(f"{place}: unknown label {error}; the classes are {', '.join(classes)}") from None
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    ids = np.array([row[0] for row in rows], dtype=np.str_)
    by_trial = {number: values[:, column].copy() for column, number in enumerate(numbers)}
    return Scored(metric.name, classes, ids, fold, labels, by_trial)


def _probability(cell: str) -> float:
    value = float(cell)
    if not 0 <= value <= 1:
        raise ValueError(f"a probability must be from 0 to 1, but got {cell}")
    return value


def _read_trials(path: Path) -> tuple[TrialRow, ...]:
    header, rows = _read_csv(path)
    count = len(_BEFORE_FOLDS)
    end = header.index("reason") if "reason" in header else len(header)
    fold_columns, keys = header[count:end], header[end + 1 :]
    if (
        header[:count] != _BEFORE_FOLDS
        or end == len(header)
        or not all(column.startswith("fold_") and column[5:].isdecimal() for column in fold_columns)
    ):
        expected = ",".join([*_BEFORE_FOLDS, "fold_<k>...", "reason", "<parameter>..."])
        raise ValueError(f"{path.name}:1: the columns must be {expected}, but are {','.join(header)}")
    folds = [int(column[5:]) for column in fold_columns]
    trials = []
    for place, cells in enumerate(rows, start=2):
        number, state, score, error, wall_s = cells[:count]
        if state not in get_args(TrialState):
            raise ValueError(f"{path.name}:{place}: no trial ends as {state!r}")
        try:
            trials.append(
                TrialRow(
                    number=int(number),
                    state=state,  # type: ignore[arg-type]  # it is one of them
                    parameters={key: _value(cell) for key, cell in zip(keys, cells[end + 1 :], strict=True) if cell},
                    fold_scores={fold: float(cell) for fold, cell in zip(folds, cells[count:end], strict=True) if cell},
                    score=float(score) if score else None,
                    standard_error=float(error) if error else None,
                    wall_s=float(wall_s),
                    reason=cells[end],
                )
            )
        except ValueError as damage:
            raise ValueError(f"{path.name}:{place}: {damage}") from None
    return tuple(trials)


def _repeats(trial: TrialRow, other: TrialRow) -> bool:
    same = (trial.parameters, trial.fold_scores, trial.score) == (other.parameters, other.fold_scores, other.score)
    return same and other.state != "duplicate"


def _check(trials: Sequence[TrialRow], scored: Scored) -> None:
    """Raise ValueError where the trials' figures are not those of what they predicted."""
    tolerance = 1e-12 if METRICS[scored.metric].hard else 1e-8
    numbers = [trial.number for trial in trials]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{_TRIALS}: a trial's number is there twice")
    if strangers := sorted(set(scored.values) - set(numbers)):
        raise ValueError(f"{_SCORED}: trial {strangers[0]} is not in {_TRIALS}")
    for trial in trials:
        if trial.number not in scored.values:
            if trial.state == "duplicate" and any(_repeats(trial, other) for other in trials):
                continue
            if trial.fold_scores or trial.score is not None:
                raise ValueError(f"{_SCORED}: trial {trial.number} has scores in {_TRIALS}, but no predictions")
            continue
        rows, _ = predictions_of(scored, trial.number)
        trained = np.isin(scored.fold, scored.fold[rows])
        if int(trained.sum()) != len(rows):
            first = np.flatnonzero(trained & np.isnan(scored.values[trial.number]))[0]
            place = f"id {scored.ids[first]} of fold {scored.fold[first]}"
            raise ValueError(f"{_SCORED}: trial {trial.number} predicts a part of a fold only: {place} is blank")
        found: dict[str, float] = {f"fold {fold}": score for fold, score in scored.fold_scores(trial.number).items()}
        kept = {f"fold {fold}": score for fold, score in trial.fold_scores.items()}
        if trial.score is not None:
            found["all folds"], kept["all folds"] = scored.score(trial.number), trial.score
        for part in found.keys() | kept.keys():
            if (
                part not in kept
                or part not in found
                or abs(kept[part] - found[part]) > tolerance * max(1.0, abs(found[part]))
            ):
                what = f"{_TRIALS}: trial {trial.number}, {part}: the score is {kept.get(part)!r}"
                raise ValueError(f"{what}, but {_SCORED} gives {found.get(part)!r}")
