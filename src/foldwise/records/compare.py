"""All kept runs of a competition side by side: scores, whether differences are real, what blending pairs would give.

Runs are told apart on the same images only, paired, and corrected for how many are compared.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import erfc, exp, isnan, lgamma, log, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.box import Box
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foldwise.data.folds import Folds, natural_order, read_folds
from foldwise.errors import DataError, Fault, FoldwiseError, RecordError
from foldwise.files import pretty_json, sha256_json
from foldwise.metrics import METRICS, Floats, Labels, Metric, confusion_matrix
from foldwise.records.history import EXTERNAL_TRACK, OWN_TRACK
from foldwise.records.store import Probs64, Run, load_run, rows_of, shown
from foldwise.spec.load import differences, with_defaults
from foldwise.spec.yaml import did_you_mean, read_yaml
from foldwise.stats import Corrected, Difference, bias_corrected, bootstrap, interval, wilson

SCHEMA_VERSION = 1
# Corrected p-values below it are called a difference.
ALPHA = 0.05
LEVEL = 0.95
# Rows of the table of blended pairs, ids of images, and characters of a reason: what a terminal shows; JSON has all.
_PAIRS_SHOWN, _IDS_SHOWN, _REASON_SHOWN = 5, 8, 120
_SPEC, _RECORD = "spec.yaml", "run.json"

# A rule below the header alone, as box.SIMPLE_HEAD, of characters that every log and terminal has.
_BOX = Box("    \n    \n -- \n" + "    \n" * 5, ascii=True)

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
        parameters: Of one model; None where unknown.
        wall_s: Seconds of training, all units together.
        device: What it was trained on.
        marks: `optimistic`, `tuned`, `transductive`, `external`.
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


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Correct p-values for their number, so that any false alarm among them all keeps its rate.

    Step down: the smallest times n, the next times n - 1, and so on, never below an earlier one (Holm 1979,
    Scandinavian Journal of Statistics 6:65).

    Args:
        p_values: n of them, each 0 to 1.

    Returns:
        The corrected ones, at most 1, in the order given.
    """
    corrected = [0.0] * len(p_values)
    least = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = least
    return tuple(corrected)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided mid-p-value of McNemar's exact test: do two runs get equally many right that the other gets wrong?

    Twice the binomial tail, with half the probability of what was seen (Fagerland, Lydersen and Laake 2013, BMC Medical
    Research Methodology 13:91, who recommend it over the exact p-value, which is too cautious).

    Args:
        first_only: Images, or groups of them, that the first run does better on.
        second_only: Those that the second does better on.

    Returns:
        0 to 1; 1 where the two counts are equal.
    """
    count, fewer = first_only + second_only, min(first_only, second_only)
    seen = exp(lgamma(count + 1) - lgamma(fewer + 1) - lgamma(count - fewer + 1) - count * log(2))
    # Of the binomial probabilities below, each is the one above it times k / (n - k + 1).
    k = np.arange(fewer, 0, -1)
    below = np.cumprod(k / (count - k + 1)).sum()
    return float(min(1.0, seen * (1 + 2 * below)))


def _normal_p(gain: float, error: float) -> float:
    """Two-sided p-value of a gain by its standard error, 1 where that is 0: then nothing tells them apart."""
    return erfc(abs(gain) / (error * sqrt(2))) if error > 0 else 1.0


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
    count = Counter(titles.values())
    return {
        setting: title if count[title] == 1 else f"{title}, labels {setting.labels_sha256[:8]}"
        for setting, title in titles.items()
    }


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
            p = _normal_p(scores[i] - scores[j], sqrt(max(0.0, variance)))
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
    """What test-time augmentation adds.

    `score_without_tta` is the mean over units, so that it is set against the mean over the same units, never against
    the score of averaged seeds: that would credit the views with what averaging adds.
    """
    info = run.info
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


# Printed --------------------------------------------------------------------------------------------------------------


def render(comparison: Comparison) -> RenderableType:
    """The comparison as tables that are readable from 80 columns on."""
    parts: list[RenderableType] = []
    for group in comparison.groups:
        count = _counted(len(group.rows), "run")
        heading = f"{comparison.competition}, {group.title}: {count}, scored on {_counted(group.n_scored, 'image')}"
        tables = [_score_table(group), _training_table(group)]
        if len(group.rows) > 1:
            tables[1:1] = [_neighbour_table(group), _pair_table(group)]
        tables += [_facts(lines)] if (lines := _lines(group)) else []
        parts += [Text(heading, style="bold"), Text(), *map(_indented, tables)]
    if comparison.left_out:
        parts.append(_indented(_facts([("left out", line) for line in comparison.left_out])))
    return Stack(*parts)


def _indented(table: Table) -> RenderableType:
    return Padding(table, (0, 0, 1, 1), expand=False)


def _grid(title: str) -> Table:
    return Table(
        box=_BOX,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=title,
        title_justify="left",
        title_style="italic",
    )


def _name_column(table: Table, header: str) -> None:
    # A name may have 80 characters: it is broken rather than cut, since names are what one copies.
    table.add_column(header, overflow="fold", min_width=8)


def _score_table(group: Group) -> Table:
    table = _grid("Scores")
    _name_column(table, "run")
    table.add_column(group.metric, no_wrap=True)
    several = len(group.rows) > 1
    tested = any(row.run.info.get("test_score") is not None for row in group.rows)
    augmented = any(row.tta_gain is not None for row in group.rows)
    marked = any(row.marks for row in group.rows)
    if several:
        table.add_column("against the best", no_wrap=True)
    if tested:
        table.add_column("test part", no_wrap=True)
    if augmented:
        table.add_column("TTA", no_wrap=True, justify="right")
    if marked:
        table.add_column("marks", overflow="fold")
    for row in group.rows:
        cells = [row.name, _plus_minus(row.score, row.standard_error)]
        if several:
            cells.append("the best" if row.told_from_best is None else _verdict("worse", row.told_from_best))
        if tested:
            info = row.run.info
            told = info.get("test_score") is not None
            cells.append(_plus_minus(info["test_score"], info["test_standard_error"]) if told else "-")
        if augmented:
            cells.append("-" if row.tta_gain is None else f"{row.tta_gain:+.4f}")
        if marked:
            cells.append(", ".join(row.marks) or "-")
        table.add_row(*map(Text, cells))
    return table


def _neighbour_table(group: Group) -> Table:
    table = _grid("Is the difference real? Each run and the next")
    _name_column(table, "run")
    _name_column(table, "next")
    table.add_column("ahead by", no_wrap=True)
    table.add_column("the first is", no_wrap=True)
    for pair in group.neighbours:
        gain = _plus_minus(pair.difference.gain, pair.difference.standard_error)
        table.add_row(*map(Text, (pair.better, pair.worse, gain, _verdict("better", pair.p_corrected))))
    return table


def _pair_table(group: Group) -> Table:
    pairs = _pairs(group)
    count = len(pairs)
    few = f"best {_PAIRS_SHOWN} of {count} pairs" if count > _PAIRS_SHOWN else _counted(count, "pair")
    table = _grid(f"Two blended: the mean less the better one ({few})")
    _name_column(table, "run")
    _name_column(table, "with")
    table.add_column("differ on", no_wrap=True, justify="right")
    table.add_column("gain", no_wrap=True)
    table.add_column("blending", no_wrap=True)
    for pair in sorted(pairs, key=lambda pair: -pair["gain"])[:_PAIRS_SHOWN]:
        verdict = _verdict("helps" if pair["gain"] > 0 else "hurts", pair["p_corrected"], "unclear")
        gain = f"{pair['gain']:+.4f} +- {pair['standard_error']:.4f}"
        table.add_row(*map(Text, (pair["first"], pair["second"], f"{pair['disagreement']:.1%}", gain, verdict)))
    return table


def _training_table(group: Group) -> Table:
    table = _grid("Training")
    _name_column(table, "run")
    table.add_column("seeds", no_wrap=True)
    table.add_column("parameters", no_wrap=True, justify="right")
    table.add_column("wall time", no_wrap=True, justify="right")
    table.add_column("data", overflow="fold")
    table.add_column("trained on", overflow="fold")
    for row in group.rows:
        data = f"external: {', '.join(_source_names(row))}" if row.track == EXTERNAL_TRACK else "own"
        seeds = f"{row.seeds}" if row.seed_std is None else f"{row.seeds}, std {row.seed_std:.4f}"
        table.add_row(*map(Text, (row.name, seeds, _millions(row.parameters), _duration(row.wall_s), data, row.device)))
    return table


def _lines(group: Group) -> list[tuple[str, str]]:
    """What is said below the tables: a word and its text each."""
    lines = []
    if group.best is not None:
        best = group.best
        lines.append(
            (
                "the best",
                f"{group.rows[0].name}, chosen among {best.chosen_among} on the very images that score it: its "
                f"{best.naive:.4f} may flatter. Corrected for the choice (BBC-CV): "
                f"{_plus_minus(best.score, best.standard_error)}, {best.level:.0%} interval "
                f"{best.low:.4f} to {best.high:.4f}",
            )
        )
    if len(group.rows) > 1:
        close = [row.name for row in group.rows if row.told_from_best is not None and row.told_from_best >= ALPHA]
        listed = f"not told apart from the best: {', '.join(close)}" if close else "no other run: each is worse"
        lines.append(("close", listed))
        lines += _missed_lines(group)
        lines.append(
            ("p", f"{_test_of(group.metric)}; corrected for how many are compared (Holm); told apart below {ALPHA}")
        )
    if any(row.tta_gain is not None for row in group.rows):
        text = "gain of test-time augmentation; predictions without it are not kept, so that its error is not known"
        lines.append(("TTA", text))
    return lines


def _missed_lines(group: Group) -> list[tuple[str, str]]:
    if not METRICS[group.metric].hard:
        return []
    count, runs = len(group.missed), "both" if len(group.rows) == 2 else f"all {len(group.rows)}"
    share, (low, high) = _share(count, group.n_scored)
    be = "is" if count == 1 else "are"
    told = f"{_counted(count, 'image')} ({share:.1%}; {low:.1%} to {high:.1%}) {be} missed by {runs} runs"
    lines = [("all wrong", told)]
    agreed = [image for image in group.missed if len(set(image.predicted)) == 1]
    if agreed:
        named = ", ".join(f"{image.id} ({image.label}: {image.predicted[0]})" for image in agreed[:_IDS_SHOWN])
        more = f" and {len(agreed) - _IDS_SHOWN:,} more" if len(agreed) > _IDS_SHOWN else ""
        get = "gets" if len(agreed) == 1 else "get"
        told = f"{len(agreed):,} of these {get} the same wrong class from {runs}, as id (label: class): {named}{more}"
        lines.append(("", told))
    return lines


def _facts(lines: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for word, text in lines:
        table.add_row(word, Text(text))
    return table


def _verdict(word: str, p: float, otherwise: str = "not told apart") -> str:
    return f"{word if p < ALPHA else otherwise} ({_p_text(p)})"


def _p_text(p: float) -> str:
    return "p<0.001" if p < 0.001 else f"p={p:.3f}" if p < 0.1 else f"p={p:.2f}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun if count == 1 else noun + 's'}"


def _plus_minus(value: float, error: float) -> str:
    return f"{value:.4f} +- {error:.4f}"


def _millions(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f} M" if count < 10_000_000 else f"{count / 1e6:.1f} M"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _source_names(row: Row) -> list[str]:
    return [str(one.get("name", one)) if isinstance(one, dict) else str(one) for one in row.run.info["external"]]


def _test_of(metric: str) -> str:
    if metric == "accuracy":
        return "McNemar's test (mid-p) on the same images, near-duplicates counted once"
    return "paired bootstrap over groups of near-duplicates, by the normal distribution"


def _share(count: int, total: int) -> tuple[float, tuple[float, float]]:
    low, high = wilson(np.array([count]), np.array([total]))[0].tolist()
    return count / total, (low, high)


# As files -------------------------------------------------------------------------------------------------------------


def to_json(comparison: Comparison) -> str:
    """Every figure with its uncertainty, as JSON; the same runs give the same text."""
    groups = [_group_json(group) for group in comparison.groups]
    return pretty_json(
        {
            "schema_version": SCHEMA_VERSION,
            "competition": comparison.competition,
            "alpha": ALPHA,
            "groups": groups,
            "left_out": list(comparison.left_out),
        }
    )


def _group_json(group: Group) -> dict[str, Any]:
    metric = METRICS[group.metric]
    share, share_interval = _share(len(group.missed), group.n_scored)
    return {
        "title": group.title,
        "metric": group.metric,
        "greater_is_better": metric.greater_is_better,
        "classes": list(group.classes),
        "n_scored": group.n_scored,
        "test": _test_of(group.metric),
        "runs": [_row_json(row, rank, group) for rank, row in enumerate(group.rows, start=1)],
        "neighbours": [
            {
                "better": pair.better,
                "worse": pair.worse,
                **_difference_json(pair.difference),
                "p": pair.p,
                "p_corrected": pair.p_corrected,
                "told_apart": pair.p_corrected < ALPHA,
                "spec_differences": _spec_differences(upper, lower),
            }
            for pair, (upper, lower) in zip(group.neighbours, pairwise(group.rows), strict=True)
        ],
        "best": None
        if group.best is None
        else {
            "run": group.rows[0].name,
            "naive": group.best.naive,
            "corrected": group.best.score,
            "standard_error": group.best.standard_error,
            "interval": [group.best.low, group.best.high],
            "level": group.best.level,
            "chosen_among": group.best.chosen_among,
            "not_told_from_best": [
                row.name for row in group.rows if row.told_from_best is not None and row.told_from_best >= ALPHA
            ],
        },
        "pairs": _pairs(group),
        "missed": None
        if not metric.hard
        else {
            "count": len(group.missed),
            "share": share,
            "interval": list(share_interval),
            "level": LEVEL,
            "images": [
                {
                    "id": image.id,
                    "label": image.label,
                    "predicted": dict(zip((row.name for row in group.rows), image.predicted, strict=True)),
                    "votes": dict(sorted(Counter(image.predicted).items(), key=lambda vote: (-vote[1], vote[0]))),
                }
                for image in group.missed
            ],
        },
    }


def _row_json(row: Row, rank: int, group: Group) -> dict[str, Any]:
    info = row.run.info
    counts = confusion_matrix(row.run.labels, row.run.probs)
    ends = wilson(counts.diagonal(), counts.sum(axis=1)).tolist()
    return {
        "rank": rank,
        "run": row.name,
        "score": row.score,
        "standard_error": row.standard_error,
        "fold_scores": info["fold_scores"],
        "fold_standard_errors": info["fold_standard_errors"],
        "seeds": info["seeds"],
        "seed_scores": info["seed_scores"],
        "seed_std": row.seed_std,
        "test_score": info.get("test_score"),
        "test_standard_error": info.get("test_standard_error"),
        "source_scores": info.get("source_scores", {}),
        # Predictions without augmentation are not kept, so that the error of the gain cannot be had.
        "tta": {"views": info["tta"], "gain": row.tta_gain, "standard_error": None},
        "parameters": row.parameters,
        "wall_s": row.wall_s,
        "device": row.device,
        "marks": list(row.marks),
        "track": row.track,
        "external": info["external"],
        "recall": {
            name: {"recall": None if isnan(recall) else recall, "interval": None if isnan(recall) else between}
            for name, recall, between in zip(group.classes, row.recall.tolist(), ends, strict=True)
        },
        "behind_best": None
        if row.behind_best is None or row.told_from_best is None
        else {
            **_difference_json(row.behind_best),
            "p_corrected": row.told_from_best,
            "told_apart": row.told_from_best < ALPHA,
        },
        "spec_sha256": info["hashes"]["spec"],
        "oof_sha256": info["hashes"]["oof"],
    }


def _difference_json(difference: Difference) -> dict[str, Any]:
    return {
        "gain": difference.gain,
        "standard_error": difference.standard_error,
        "interval": [difference.low, difference.high],
        "level": difference.level,
    }


def _spec_differences(upper: Row, lower: Row) -> list[str]:
    """What the upper run's spec has otherwise than the lower one's, `optim.lr: 0.0002 -> 0.0003` each."""
    old, new = (with_defaults(row.spec) | {"name": ""} for row in (lower, upper))
    return differences(old, new)


def _pairs(group: Group) -> list[dict[str, Any]]:
    """Each two runs of a group: how often they differ, and what blending them gains, corrected for all pairs (Holm)."""
    count = len(group.rows)
    pairs = list(combinations(range(count), 2))
    p_values = [_normal_p(group.pair_gain[pair], group.pair_gain_error[pair]) for pair in pairs]
    differ = np.array([group.disagreement[pair] for pair in pairs])
    ends = wilson(differ * group.n_scored, np.full(len(pairs), group.n_scored)).tolist()
    return [
        {
            "first": group.rows[i].name,
            "second": group.rows[j].name,
            "disagreement": float(group.disagreement[i, j]),
            "disagreement_interval": between,
            "gain": float(group.pair_gain[i, j]),
            "standard_error": float(group.pair_gain_error[i, j]),
            "p": p,
            "p_corrected": corrected,
        }
        for (i, j), between, p, corrected in zip(pairs, ends, p_values, holm(p_values), strict=True)
    ]


def to_csv(comparison: Comparison) -> str:
    """One row a run, best first within each group; an empty cell is unknown or does not apply."""
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for group in comparison.groups:
        following = {pair.better: pair for pair in group.neighbours}
        for rank, row in enumerate(group.rows, start=1):
            after, behind, info = following.get(row.name), row.behind_best, row.run.info
            cells = {
                "competition": comparison.competition,
                "group": group.title,
                "rank": rank,
                "run": row.name,
                "metric": group.metric,
                "score": row.score,
                "standard_error": row.standard_error,
                "n_scored": group.n_scored,
                "folds": row.folds,
                "seeds": row.seeds,
                "seed_std": row.seed_std,
                "test_score": info.get("test_score"),
                "test_standard_error": info.get("test_standard_error"),
                "tta_gain": row.tta_gain,
                "parameters": row.parameters,
                "wall_s": row.wall_s,
                "device": row.device,
                "marks": ";".join(row.marks),
                "track": row.track,
                "external": ";".join(_source_names(row)),
                "behind_best": None if behind is None else behind.gain,
                "behind_best_standard_error": None if behind is None else behind.standard_error,
                "behind_best_p_corrected": row.told_from_best,
                "ahead_of_next": None if after is None else after.difference.gain,
                "ahead_of_next_standard_error": None if after is None else after.difference.standard_error,
                "ahead_of_next_p_corrected": None if after is None else after.p_corrected,
            }
            if writer is None:
                writer = csv.DictWriter(text, list(cells), lineterminator="\n")
                writer.writeheader()
            writer.writerow(cells)
    return text.getvalue()
