"""All kept runs of a competition side by side: scores, whether differences are real, what blending pairs would give.

Runs are told apart on the same images only, paired, and corrected for how many are compared.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foldwise.data.folds import Folds, natural_order, read_folds
from foldwise.errors import DataError, Fault, FoldwiseError, RecordError
from foldwise.files import sha256_json
from foldwise.metrics import METRICS, Floats, Labels, Metric, confusion_matrix
from foldwise.records.history import EXTERNAL_TRACK, OWN_TRACK
from foldwise.records.store import Probs64, Run, load_run, rows_of, shown
from foldwise.spec.yaml import did_you_mean, read_yaml
from foldwise.stats import Corrected, Difference, bias_corrected, bootstrap, holm, interval, mcnemar, normal_p

# Corrected p-values below it are called a difference.
ALPHA = 0.05
LEVEL = 0.95
# Characters of a reason why a folder is left out.
_REASON_SHOWN = 120
_SPEC, _RECORD = "spec.yaml", "run.json"

Floats64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Row:
    """A run in the table.

    Attributes:
        run: The run.
        spec: Its resolved spec, as plain JSON types.
        score: Its OOF metric.
        standard_error: Of `score`.
        folds: Number of folds.
        seeds: Number of seeds.
        seed_std: Standard deviation of the score over seeds; None with one seed.
        tta_gain: Score with less score without test-time augmentation, positive where it helps; of a mean seed where
            there are several. None where there is no such augmentation, or where it is unknown.
        tta_error: Paired standard error of `tta_gain`; None where the record does not tell it.
        parameters: Of one model; None where unknown.
        wall_s: Seconds of training, all units together.
        device: What it was trained on.
        marks: `optimistic`, `tuned`, `transductive`.
        track: `competition data only` or `with external data`.
        recall: (C,) per-class recall; NaN for a class without images.
        told_from_best: p-value of being worse than the group's best, corrected for all pairs of the group (Holm 1979),
            since which run is the best was seen in the same figures; None for the best itself.
        behind_best: How much better the group's best is, paired, with its interval; None for the best itself.
    """

    run: Run
    spec: dict[str, Any]
    score: float
    standard_error: float
    folds: int
    seeds: int
    seed_std: float | None
    tta_gain: float | None
    tta_error: float | None
    parameters: int | None
    wall_s: float
    device: str
    marks: tuple[str, ...]
    track: str
    recall: NDArray[np.float64]
    told_from_best: float | None
    behind_best: Difference | None = None

    @property
    def name(self) -> str:
        """Of the run."""
        return self.run.name


@dataclass(frozen=True)
class Neighbours:
    """Two runs that follow each other in the table.

    Attributes:
        better: Name of the upper one.
        worse: Name of the lower one.
        difference: How much better, paired, with its interval.
        p: Two-sided p-value, before correction.
        p_corrected: The same, corrected for all pairs of neighbours of the group (Holm 1979).
    """

    better: str
    worse: str
    difference: Difference
    p: float
    p_corrected: float


@dataclass(frozen=True)
class Missed:
    """An image that every run of a group gets wrong.

    Attributes:
        id: Of the image.
        label: Its class.
        predicted: The class that each run predicts, in the order of the group's rows.
    """

    id: str
    label: str
    predicted: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that can be compared: same competition, split and classes.

    Attributes:
        title: What they share, in a few words, e.g. `5 folds`.
        classes: C names.
        metric: Name of the metric.
        n_scored: Images that each run is scored on.
        rows: The runs, best first.
        neighbours: One fewer than rows.
        best: The best run's score without the luck of having been chosen; None with one run.
        disagreement: (R, R) share of images for which two runs predict different classes.
        pair_gain: (R, R) score of the mean of two runs less that of the better one, positive where blending helps.
        pair_gain_error: (R, R) paired standard error of `pair_gain`.
        missed: Images that every run gets wrong, by id; empty for a metric that does not count hits.
    """

    title: str
    classes: tuple[str, ...]
    metric: str
    n_scored: int
    rows: tuple[Row, ...]
    neighbours: tuple[Neighbours, ...]
    best: Corrected | None
    disagreement: NDArray[np.float64]
    pair_gain: NDArray[np.float64]
    pair_gain_error: NDArray[np.float64]
    missed: tuple[Missed, ...]


@dataclass(frozen=True, eq=False)
class Comparison:
    """All complete runs of a competition.

    Attributes:
        competition: Its name.
        groups: Comparable runs, those that may be blended first.
        left_out: A line `<exp>: <reason>` for each folder that holds no complete run of it.
    """

    competition: str
    groups: tuple[Group, ...]
    left_out: tuple[str, ...]


# Tests ----------------------------------------------------------------------------------------------------------------


# Which runs -----------------------------------------------------------------------------------------------------------


def compare(root: Path, competition: str, names: Sequence[str] | None = None) -> Comparison:
    """Put the complete runs of a competition side by side.

    Two runs are compared on the same images, groups of near-duplicates as units: their difference has a bootstrap
    interval, and a p-value by McNemar's test where the metric is accuracy (a group counts once, for the run that gets
    more of it right), else by the bootstrap's standard error and the normal distribution. Neighbours in the table are
    corrected for the number of neighbours. Comparisons with the best are corrected for all pairs: corrected for their
    own number alone, one of ten equal runs would be called worse than the luckiest in 15 of 100 competitions.

    What the mean of two runs gains over the better one has an analytic standard error, by the influence of each group
    on the difference (nonparametric delta method: Davison and Hinkley 1997, section 2.7.2), since a bootstrap of
    thousands of pairs would take minutes.

    Args:
        root: The project's root.
        competition: A folder under `inputs/`.
        names: Only these runs; None for all. One named twice counts once.

    Returns:
        The comparison; it does not depend on the order of files or of `names`.

    Raises:
        RecordError: If there is no complete run, or one of `names` is not a complete run of the competition.
        DataError: If `folds.csv` cannot be read.
    """
    runs, left_out = _complete_runs(root, competition)
    if names is not None:
        runs, left_out = _named(root, competition, runs, left_out, names), []
    splits = _Splits(root / "inputs" / competition / "folds.csv")
    together: dict[_Setting, list[Run]] = {}
    for run in runs:
        try:
            together.setdefault(_setting(run, splits), []).append(run)
        except KeyError as error:
            left_out.append(f"{run.name}: was scored on images that folds.csv does not hold, such as {error.args[0]!r}")
    if not together:
        because = "".join(f"\n  left out: {line}" for line in left_out)
        what = f"there is no complete run of `{competition}`{because}"
        raise RecordError([Fault("oof", what, "make exp EXP=<experiment>")])
    settings = sorted(together, key=_order)
    titles = _titles(settings)
    groups = [_compared(titles[setting], setting, together[setting], splits) for setting in settings]
    return Comparison(competition, tuple(groups), tuple(sorted(left_out)))


def _complete_runs(root: Path, competition: str) -> tuple[list[Run], list[str]]:
    """Complete, scored runs of the competition, and why other folders of it are none; smoke runs are not spoken of."""
    runs, left_out = [], []
    for path in sorted((root / "oof").glob("[!.]*")):
        if not any((path / name).exists() for name in (_SPEC, _RECORD)):
            continue
        # Before anything is read in full, since other competitions may have many runs.
        if _competition_of(path) not in (competition, None):
            continue
        try:
            run = load_run(path)
        except RecordError as error:
            left_out.append(_one_line(f"{path.name}: {error.faults[0].what}"))
            continue
        if run.info["smoke"]:
            continue
        if len(run.ids):
            runs.append(run)
        else:
            left_out.append(f"{path.name}: has no score: nothing was held out")
    return runs, left_out


def _competition_of(path: Path) -> str | None:
    """The competition of the run in a folder; None where its files do not tell."""
    try:
        told = json.loads((path / _RECORD).read_bytes())["competition"]
    except (OSError, ValueError, KeyError, TypeError):
        try:
            told = read_yaml(path / _SPEC).value["competition"]
        except (OSError, FoldwiseError, KeyError, TypeError):
            return None
    return told if isinstance(told, str) else None


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _REASON_SHOWN else f"{line[: _REASON_SHOWN - 3]}..."


def _named(root: Path, competition: str, runs: list[Run], left_out: list[str], names: Sequence[str]) -> list[Run]:
    """Those of `runs` that are named; raises RecordError with a fault for each name that is none of them."""
    there = {run.name: run for run in runs}
    reasons = dict(line.split(": ", 1) for line in left_out)
    listed = f"runs of {competition}: {', '.join(there) or 'none'}"
    faults = []
    for name in dict.fromkeys(names):
        if name in there:
            continue
        path = root / "oof" / name
        guess = did_you_mean(name, list(there))
        if name in reasons:
            what, guess = reasons[name], ""
        elif (path / _RECORD).exists():
            other = _competition_of(path)
            what, guess = f"is of competition {other}" if other != competition else "is a smoke run", ""
        else:
            what = f"there is no run `{name}`"
        faults.append(Fault(shown(path), what, f"{guess} {listed}" if guess else listed))
    if faults:
        raise RecordError(faults)
    return [there[name] for name in sorted(set(names))]


class _Splits:
    """The splits in a competition's `folds.csv`, each read when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: dict[int, Folds | None] = {}
        self.first = read_folds(path)

    def present(self, number: int, sha256: str) -> Folds | None:
        """The split of that number, if it is still the one with this hash."""
        if number not in self._read:
            try:
                self._read[number] = read_folds(self._path, number) if number else self.first
            except DataError:
                self._read[number] = None
        folds = self._read[number]
        return folds if folds is not None and folds.sha256 == sha256 else None


class _Setting(NamedTuple):
    """What runs must share to be comparable.

    Attributes:
        metric: Its name.
        split: How the folds were made, in words.
        blendable: Whether the runs may be blended: k folds, the first split, the competition's own classes.
        number: Of the split.
        folds_sha256: Of the split.
        outdated: Whether `folds.csv` now holds other folds.
        classes: Their names, in the order of the indices.
        own_classes: Whether the classes are the competition's.
        labels_sha256: Of ids with their labels.
        inputs_sha256: Of ids, labels and pixels.
    """

    metric: str
    split: str
    blendable: bool
    number: int
    folds_sha256: str
    outdated: bool
    classes: tuple[str, ...]
    own_classes: bool
    labels_sha256: str
    inputs_sha256: str


def _setting(run: Run, splits: _Splits) -> _Setting:
    """What a run must share with those that it is compared with; raises KeyError for an image without a group."""
    info = run.info
    number, sha256 = info["split"].get("number", 0), info["hashes"]["folds"]
    outdated = splits.present(number, sha256) is None
    if outdated:
        splits.first.groups_of(run.ids.tolist())
    own_classes = not info.get("label_map")
    return _Setting(
        metric=info["metric"],
        split=_split_title(info["split"]),
        blendable=info["split"]["kind"] == "kfold" and not number and own_classes and not outdated,
        number=number,
        folds_sha256=sha256,
        outdated=outdated,
        classes=run.classes,
        own_classes=own_classes,
        labels_sha256=sha256_json(sorted(zip(run.ids.tolist(), run.labels.tolist(), strict=True))),
        inputs_sha256=info["hashes"]["inputs"],
    )


def _split_title(split: Mapping[str, Any]) -> str:
    if split["kind"] == "kfold":
        return f"{split['folds']} folds"
    if split["kind"] == "holdout":
        return f"held-out {split['share']:.0%}" if "share" in split else "held-out part"
    return f"part held out by {split['column']}" if "column" in split else "held-out part"


def _order(setting: _Setting) -> tuple[Any, ...]:
    """Those that may be blended first; then present folds before outdated ones, and the first split before others."""
    return (not setting.blendable, setting.outdated, setting.number, not setting.own_classes, *setting)


def _titles(settings: Sequence[_Setting]) -> dict[_Setting, str]:
    """A title for each setting; what all share is not said, and two that would read the same get a hash."""
    several_metrics = len({setting.metric for setting in settings}) > 1
    titles = {}
    for setting in settings:
        parts = [setting.split]
        parts += [f"split {setting.number}"] if setting.number else []
        parts += [f"{len(setting.classes)} classes ({', '.join(setting.classes)})"] if not setting.own_classes else []
        parts += [f"not the present folds ({setting.folds_sha256[:8]})"] if setting.outdated else []
        parts += [f"by {setting.metric}"] if several_metrics else []
        titles[setting] = ", ".join(parts)
    for what, of in (("labels", "labels_sha256"), ("images", "inputs_sha256")):
        count = Counter(titles.values())
        titles = {
            setting: title if count[title] == 1 else f"{title}, {what} {getattr(setting, of)[:8]}"
            for setting, title in titles.items()
        }
    return titles


# The comparison of a group --------------------------------------------------------------------------------------------


def _compared(title: str, setting: _Setting, runs: Sequence[Run], splits: _Splits) -> Group:
    """Compare runs that share a setting."""
    metric = METRICS[setting.metric]
    runs = sorted(runs, key=lambda run: (-metric.sign * run.info["score"], run.name))
    ids = np.array(natural_order(runs[0].ids.tolist()), dtype=np.str_)
    groups = (splits.present(setting.number, setting.folds_sha256) or splits.first).groups_of(ids.tolist())
    order = [rows_of(run.ids, ids) for run in runs]
    labels = runs[0].labels[order[0]]
    probs = [run.probs[rows] for run, rows in zip(runs, order, strict=True)]
    predicted = np.stack([each.argmax(axis=1) for each in probs])
    _, member = np.unique(groups, return_inverse=True)
    drawn = metric.sign * bootstrap(metric, labels, probs, groups)
    scores = [run.info["score"] for run in runs]

    def difference(upper: int, lower: int) -> Difference:
        gains = drawn[:, upper] - drawn[:, lower]
        low, high = interval(gains, LEVEL)
        return Difference(metric.sign * (scores[upper] - scores[lower]), float(gains.std(ddof=1)), low, high, LEVEL)

    others = range(1, len(runs))
    behind = [difference(0, index) for index in others]
    ahead = [difference(upper, lower) for upper, lower in pairwise(range(len(runs)))]
    p_values = _p_values(metric, scores, drawn, predicted == labels, member)
    # Row by row, so that those of the best against the others come first.
    told = holm(p_values[np.triu_indices(len(runs), 1)].tolist())
    of_neighbours = p_values.diagonal(1).tolist()
    corrected = holm(of_neighbours)
    gain, gain_error = _blended_pairs(metric, labels, probs, member)
    wrong = np.flatnonzero((predicted != labels).all(axis=0)).tolist() if metric.hard else []
    classes = setting.classes
    return Group(
        title=title,
        classes=classes,
        metric=metric.name,
        n_scored=len(ids),
        rows=tuple(
            _row(
                run,
                metric,
                float(drawn[:, index].std(ddof=1)),
                told[index - 1] if index else None,
                behind[index - 1] if index else None,
            )
            for index, run in enumerate(runs)
        ),
        neighbours=tuple(
            Neighbours(
                runs[lower - 1].name, runs[lower].name, ahead[lower - 1], of_neighbours[lower - 1], corrected[lower - 1]
            )
            for lower in others
        ),
        best=bias_corrected(metric, labels, probs, groups) if len(runs) > 1 and member.any() else None,
        disagreement=np.stack([(predicted != each).mean(axis=1) for each in predicted]),
        pair_gain=gain,
        pair_gain_error=gain_error,
        missed=tuple(
            Missed(str(ids[image]), classes[labels[image]], tuple(classes[each] for each in predicted[:, image]))
            for image in wrong
        ),
    )


def _p_values(
    metric: Metric, scores: Sequence[float], drawn: Floats64, right: NDArray[np.bool_], member: NDArray[np.intp]
) -> Floats64:
    """Two-sided p-values of each two runs, (R, R), 1 on the diagonal.

    Args:
        metric: What is scored.
        scores: R scores.
        drawn: (draws, R) bootstrap scores.
        right: (R, N) whether a run is right on an image.
        member: (N,) number of each image's group.
    """
    count = len(scores)
    p_values = np.ones((count, count))
    by_group = np.stack([np.bincount(member, weights=row) for row in right])
    ahead = np.stack([(row > by_group).sum(axis=1) for row in by_group]).tolist()
    covariance = np.atleast_2d(np.cov(drawn, rowvar=False))
    for i, j in combinations(range(count), 2):
        if metric.name == "accuracy":
            p = mcnemar(ahead[i][j], ahead[j][i])
        else:
            variance = covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]
            p = normal_p(scores[i] - scores[j], sqrt(max(0.0, variance)))
        p_values[i, j] = p_values[j, i] = p
    return p_values


def _row(run: Run, metric: Metric, error: float, told: float | None, behind: Difference | None) -> Row:
    info = run.info
    counts = confusion_matrix(run.labels, run.probs)
    support = counts.sum(axis=1)
    recall = np.divide(counts.diagonal(), support, out=np.full(len(support), np.nan), where=support > 0)
    device = info["device"]
    return Row(
        run=run,
        spec=read_yaml(run.path / _SPEC).value,
        score=info["score"],
        standard_error=error,
        folds=len(info["fold_scores"]),
        seeds=len(info["seeds"]),
        seed_std=info["seed_std"],
        tta_gain=_tta_gain(run, metric),
        tta_error=(info.get("tta_gain") or {}).get("standard_error"),
        parameters=info["parameters"],
        wall_s=info["wall_s"],
        device="; ".join(map(str, device)) if isinstance(device, list) else str(device or "-"),
        marks=tuple(info["marks"]),
        track=EXTERNAL_TRACK if info["external"] else OWN_TRACK,
        recall=recall,
        told_from_best=told,
        behind_best=behind,
    )


def _tta_gain(run: Run, metric: Metric) -> float | None:
    """What test-time augmentation adds, as the record tells it or, for older ones, as it follows from the scores.

    `score_without_tta` is the mean over units, so that it is set against the mean over the same units, never against
    the score of averaged seeds: that would credit the views with what averaging adds.
    """
    info = run.info
    if told := info.get("tta_gain"):
        return float(told["gain"])
    without = info.get("score_without_tta")
    if without is None or info["tta"] in ([], ["identity"]):
        return None
    if metric.name in ("accuracy", "log_loss"):
        # Means over images: those of folds average to that of all.
        seeds = info["seed_scores"].values()
        return float(metric.sign * (sum(seeds) / len(seeds) - without))
    if len(info["seeds"]) > 1:
        return None
    folds = info["fold_scores"]
    sizes = [int((run.fold == int(fold)).sum()) for fold in folds]
    return float(metric.sign * (np.average(list(folds.values()), weights=sizes) - without))


def _blended_pairs(
    metric: Metric, labels: Labels, probs: Sequence[Probs64], member: NDArray[np.intp]
) -> tuple[Floats64, Floats64]:
    """What the mean of each two runs gains over the better one, and the paired standard error of that, (R, R) each.

    Args:
        metric: What is scored.
        labels: (N,) class indices.
        probs: R arrays (N, C), the better run first.
        member: (N,) number of each image's group.
    """
    count = len(probs)
    gain, error = np.zeros((count, count)), np.zeros((count, count))
    alone = [_linearised(metric, labels, each) for each in probs]
    for i, j in combinations(range(count), 2):
        score, influence = alone[i]
        blended, of_blend = _linearised(metric, labels, (probs[i] + probs[j]) / 2)
        by_group = np.bincount(member, weights=of_blend - influence)
        gain[i, j] = gain[j, i] = metric.sign * (blended - score)
        error[i, j] = error[j, i] = sqrt(by_group @ by_group)
    return gain, error


def _linearised(metric: Metric, labels: Labels, probs: Floats) -> tuple[float, Floats64]:
    """A score, and each image's part in it to first order, (N,): the gradient of `finish` times what the image adds.

    Every `finish` is a ratio of sums, or a mean of such, so the parts of all images add up to 0.
    """
    if not metric.hard:
        rows = metric.statistics(labels, probs)
        sums = rows.sum(axis=0)
        return float(metric.finish(sums)), np.asarray(rows @ _gradient(metric, sums))
    # What `statistics` gives for hard metrics, counted instead of spelt out: pairs are many.
    predicted = probs.argmax(axis=1)
    right = predicted == labels
    classes = probs.shape[1]
    sums = np.concatenate([np.bincount(each, minlength=classes) for each in (labels[right], labels, predicted)])
    of_hit, of_label, of_prediction = np.split(_gradient(metric, sums.astype(np.float64)), 3)
    return float(metric.finish(sums)), of_hit[labels] * right + of_label[labels] + of_prediction[predicted]


def _gradient(metric: Metric, sums: Floats64) -> Floats64:
    """(S,) derivatives of `finish` by central differences."""
    steps = np.diag(1e-4 * np.maximum(1.0, np.abs(sums)))
    return np.asarray((metric.finish(sums + steps) - metric.finish(sums - steps)) / (2 * steps.diagonal()))
