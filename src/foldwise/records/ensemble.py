"""Blending kept runs, and what the blend will score on images that nobody has labels for.

Members, weights and method are chosen on all folds but one and scored on that one, so the estimate is not flattered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from foldwise.errors import Fault, RecordError
from foldwise.metrics import METRICS, Labels, Metric, log_loss_of
from foldwise.records.store import Ids, Probs64, Run, rows_of, shown
from foldwise.stats import bootstrap, interval, paired_difference, standard_error

Method = Literal["best", "mean", "caruana"]
# The simpler first: a later one must beat it by more than the standard error of the gain.
METHODS: tuple[Method, ...] = ("best", "mean", "caruana")
LEVEL = 0.95
ROUNDS = 50

Weights = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Member:
    """A run with a weight in a blend.

    Attributes:
        run: The run.
        weight: Above 0; those of a blend sum to 1.
        score: Its OOF metric.
        standard_error: Of `score`.
    """

    run: Run
    weight: float
    score: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class Blend:
    """A weighted mean of runs with an honest estimate of its score.

    Attributes:
        competition: Name of the competition.
        metric: Name of the metric.
        classes: Class names, in the order of the indices.
        folds_sha256: Of the split that all members share.
        considered: Names of all runs that were offered.
        members: Those that got a weight, the heaviest first, equal ones by name.
        method: `single`, `best`, `mean` or `caruana`.
        fold_methods: The method chosen without each fold, by fold.
        score: Cross-fitted estimate; for a single run its OOF score.
        standard_error: Of `score`.
        interval: Lower and upper end around `score`.
        level: Share of such intervals that hold the true score.
        naive: Score of `members` on the rows that chose them: too good, shown for comparison.
        accuracy: Cross-fitted accuracy, whatever the metric.
        accuracy_standard_error: Of `accuracy`.
        test_ids: (T,) ids.
        test_probs: (T, C) float64.
    """

    competition: str
    metric: str
    classes: tuple[str, ...]
    folds_sha256: str
    considered: tuple[str, ...]
    members: tuple[Member, ...]
    method: Method | Literal["single"]
    fold_methods: dict[int, Method]
    score: float
    standard_error: float
    interval: tuple[float, float]
    level: float
    naive: float
    accuracy: float
    accuracy_standard_error: float
    test_ids: Ids
    test_probs: Probs64

    @property
    def note(self) -> str:
        """What the estimate means, in a sentence."""
        if self.method == "single":
            return "out-of-fold score of the one run; conditional on its trained models"
        chosen = "members, weights and method chosen without the scored fold"
        return f"cross-fitted: {chosen}; conditional on the trained models"

    @property
    def marks(self) -> list[str]:
        """Marks of all members, each once."""
        return _union(member.run.info["marks"] for member in self.members)

    @property
    def external(self) -> list[Any]:
        """External data of all members, each once."""
        return _union(member.run.info["external"] for member in self.members)

    def expected_right(self, images: int) -> tuple[int, int]:
        """How many of `images` unseen images the blend gets right.

        Returns:
            The expectation and the half-width of an interval at `level`, in which the binomial draw of the images and
            the error of the estimate are both counted.
        """
        share = self.accuracy
        deviation = sqrt(images * share * (1 - share) + (images * self.accuracy_standard_error) ** 2)
        return round(images * share), round(NormalDist().inv_cdf((1 + self.level) / 2) * deviation)


def blend(
    runs: Sequence[Run], *, metric: Metric, groups: Mapping[str, str], methods: Sequence[Method] = METHODS
) -> Blend:
    """Weigh runs and estimate what the blend scores.

    `best` takes the best run alone, `mean` weighs all equally. `caruana` is greedy forward selection with replacement
    (Caruana et al. 2004, "Ensemble selection from libraries of models", ICML), 50 rounds of which the best is kept. A
    cross-fit chooses between them: a later one must gain more than the standard error of its paired gain. The estimate
    repeats all of this for each fold without that fold.

    Args:
        runs: At least one, of the same competition, folds, classes and ids; their order is of no consequence.
        metric: What to choose and to score by.
        groups: Group of each id; near-duplicates share one.
        methods: Some of `METHODS`, the simplest first.

    Returns:
        The blend; the same for the same runs.

    Raises:
        RecordError: If there is no run, or one does not fit the first; all that do not are named.
    """
    if not runs:
        raise RecordError([Fault("oof", "there is no complete run to blend", "make exp EXP=<experiment>")])
    runs = sorted(runs, key=lambda run: run.name)
    _refuse_mismatched(runs, groups)
    first = runs[0]
    group = np.array([groups[name] for name in first.ids.tolist()])
    oof = [run.probs[rows_of(run.ids, first.ids)] for run in runs]
    labels = first.labels
    method: Method | Literal["single"] = "single"
    fold_methods: dict[int, Method] = {}
    weights, held_out = np.ones(1), oof[0]
    if len(runs) > 1:
        fitting = _CrossFit(oof, labels, first.fold, group, metric, tuple(methods))
        method, fold_methods, weights, held_out = fitting.result()
    accuracy = METRICS["accuracy"]
    chosen = np.flatnonzero(weights)
    draws = bootstrap(metric, labels, [held_out, *(oof[index] for index in chosen)], group)
    errors = draws.std(axis=0, ddof=1).tolist()
    members = [
        Member(runs[index], float(weights[index]), metric.score(labels, oof[index]), error)
        for index, error in zip(chosen, errors[1:], strict=True)
    ]
    test = [run.test_probs[rows_of(run.test_ids, first.test_ids)] for run in runs]
    return Blend(
        competition=first.info["competition"],
        metric=metric.name,
        classes=first.classes,
        folds_sha256=first.info["hashes"]["folds"],
        considered=tuple(run.name for run in runs),
        members=tuple(sorted(members, key=lambda member: -member.weight)),
        method=method,
        fold_methods=fold_methods,
        score=metric.score(labels, held_out),
        standard_error=errors[0],
        interval=interval(draws[:, 0], LEVEL),
        level=LEVEL,
        naive=metric.score(labels, _average(weights, oof)),
        accuracy=accuracy.score(labels, held_out),
        accuracy_standard_error=standard_error(accuracy, labels, held_out, group),
        test_ids=first.test_ids,
        test_probs=_average(weights, test),
    )


class _CrossFit:
    """Fits on all folds but some, each made once: the fit without folds j and k serves the estimates of both."""

    def __init__(
        self,
        oof: Sequence[Probs64],
        labels: Labels,
        fold: NDArray[np.int64],
        group: NDArray[np.str_],
        metric: Metric,
        methods: tuple[Method, ...],
    ) -> None:
        self._oof = oof
        # Models last: a row's candidates then lie together, and rows are taken out cheaply.
        self._stack = np.ascontiguousarray(np.stack(oof, axis=2))
        self._labels = labels
        self._fold = fold
        self._group = group
        self._metric = metric
        self._methods = methods
        self._folds: list[int] = np.unique(fold).tolist()
        self._fits: dict[frozenset[int], Weights] = {}

    def result(self) -> tuple[Method, dict[int, Method], Weights, Probs64]:
        """Method and weights from all folds, the methods chosen without each fold, and the held-out predictions."""
        nothing: frozenset[int] = frozenset()
        method = self._method(nothing)
        fold_methods = {fold: self._method(frozenset({fold})) for fold in self._folds}
        return method, fold_methods, self._weights(method, nothing), self._held_out(fold_methods, nothing)

    def _method(self, excluded: frozenset[int]) -> Method:
        """The method chosen by a cross-fit on the folds that are not excluded; the simplest where one fold is left."""
        chosen = self._methods[0]
        rest = [fold for fold in self._folds if fold not in excluded]
        if len(rest) < 2:
            return chosen
        rows = np.isin(self._fold, rest)
        labels, group = self._labels[rows], self._group[rows]
        best = self._held_out(dict.fromkeys(rest, chosen), excluded)[rows]
        for method in self._methods[1:]:
            probs = self._held_out(dict.fromkeys(rest, method), excluded)[rows]
            difference = paired_difference(self._metric, labels, probs, best, group)
            if difference.gain > difference.standard_error:
                chosen, best = method, probs
        return chosen

    def _held_out(self, methods: Mapping[int, Method], excluded: frozenset[int]) -> Probs64:
        """(N, C) predictions for each fold of `methods` with weights from the other folds that are not excluded."""
        predictions = np.zeros(self._oof[0].shape)
        for fold, method in methods.items():
            rows = self._fold == fold
            predictions[rows] = _average(self._weights(method, excluded | {fold}), [probs[rows] for probs in self._oof])
        return predictions

    def _weights(self, method: Method, excluded: frozenset[int]) -> Weights:
        if method == "mean":
            return np.full(len(self._oof), 1 / len(self._oof))
        if method == "best":
            rows = ~np.isin(self._fold, list(excluded))
            scores = [self._metric.sign * self._metric.score(self._labels[rows], probs[rows]) for probs in self._oof]
            alone: Weights = np.eye(len(self._oof))[int(np.argmax(scores))]
            return alone
        if excluded not in self._fits:
            rows = ~np.isin(self._fold, list(excluded))
            self._fits[excluded] = _caruana(self._stack[rows], self._labels[rows], self._metric)
        return self._fits[excluded]


def _union(lists: Iterable[list[Any]]) -> list[Any]:
    """What is in any of the lists, each once, in order of appearance."""
    union: list[Any] = []
    for values in lists:
        union += [value for value in values if value not in union]
    return union


def _average(weights: Weights, probs: Sequence[Probs64]) -> Probs64:
    """Weighted sum in the order of the runs, without BLAS, whose last bits differ between machines."""
    total = np.zeros(probs[0].shape)
    for weight, member in zip(weights.tolist(), probs, strict=True):
        if weight > 0:
            total += weight * member
    return total


def _caruana(stack: Probs64, labels: Labels, metric: Metric) -> Weights:
    """Greedy forward selection with replacement.

    Args:
        stack: (N, C, M) predictions of M candidates.
        labels: (N,) class indices.
        metric: What to choose by; equal candidates are told apart by log loss, then by their order.

    Returns:
        (M,) weights that sum to 1: how often each was picked until the best round, the earliest of equals.
    """
    images, classes, candidates = stack.shape
    lowest, highest = stack.min(axis=2), stack.max(axis=2)
    true = stack[np.arange(images), labels]
    total = np.zeros((images, classes))
    picks: list[int] = []
    best, kept = -np.inf, 0
    for size in range(1, ROUNDS + 1):
        total_true = total[np.arange(images), labels][:, None]
        if metric.hard:
            scores = metric.sign * metric.finish(
                _counts_with_each(stack, total, labels, total + lowest, total + highest)
            )
        else:
            scores = metric.sign * _losses_with_each(total_true, true, size)
        top = float(scores.max())
        tied = np.flatnonzero(scores == top)
        pick = int(tied[_losses_with_each(total_true, true[:, tied], size).argmin()]) if len(tied) > 1 else int(tied[0])
        picks.append(pick)
        total += stack[:, :, pick]
        if top > best:
            best, kept = top, size
    return np.bincount(picks[:kept], minlength=candidates) / kept


def _losses_with_each(total_true: Probs64, true: Probs64, size: int) -> NDArray[np.float64]:
    """(M,) log loss of the mean of `size` members of which the last is each candidate in turn."""
    losses: NDArray[np.float64] = log_loss_of((total_true + true) / size).mean(axis=0)
    return losses


def _counts_with_each(
    stack: Probs64, total: Probs64, labels: Labels, floor: Probs64, ceiling: Probs64
) -> NDArray[np.float64]:
    """(M, 3C) hits, labels and predictions per class when each of M candidates in turn joins `total`.

    A row is settled when the least that its best class can get from a candidate (`floor`) is above the most that any
    other can (`ceiling`); it is counted once for all candidates. After a few rounds that is most rows.
    """
    images, classes, candidates = stack.shape
    winner = total.argmax(axis=1)
    rows = np.arange(images)
    others = ceiling.copy()
    others[rows, winner] = -np.inf
    # The margin is for rounding in the sums.
    settled = floor[rows, winner] > others.max(axis=1) + 1e-9
    open_rows = np.flatnonzero(~settled)

    best = stack[open_rows, 0] + total[open_rows, 0, None]
    predicted = np.zeros(best.shape, dtype=np.intp)
    for index in range(1, classes):
        joined = stack[open_rows, index]
        joined += total[open_rows, index, None]
        np.copyto(predicted, index, where=joined > best)
        np.maximum(best, joined, out=best)

    cells = predicted * candidates + np.arange(candidates)
    hit = predicted == labels[open_rows, None]
    shape = (classes, candidates)
    predictions = np.bincount(cells.ravel(), minlength=classes * candidates).reshape(shape)
    hits = np.bincount(cells[hit], minlength=classes * candidates).reshape(shape)
    predictions += np.bincount(winner[settled], minlength=classes)[:, None]
    hits += np.bincount(winner[settled & (winner == labels)], minlength=classes)[:, None]
    true = np.broadcast_to(np.bincount(labels, minlength=classes)[:, None], shape)
    return np.concatenate([hits, true, predictions]).T.astype(np.float64)


def _refuse_mismatched(runs: Iterable[Run], groups: Mapping[str, str]) -> None:
    """Raise RecordError unless the runs are of one competition and split; one fault a run and reason."""
    first, *others = runs
    faults = []
    fix = f"leave it out, or run it again as `{first.name}` was"
    ids, test_ids = sorted(first.ids.tolist()), sorted(first.test_ids.tolist())
    for run in (first, *others):
        where = shown(run.path)
        if run.info["split"]["kind"] != "kfold":
            faults.append(Fault(where, f"only k-fold runs blend, but its split is `{run.info['split']['kind']}`", fix))
        if lacking := set(run.ids.tolist()) - set(groups):
            faults.append(Fault(where, f"{len(lacking)} of its ids have no group, such as {min(lacking)}", fix))
    for run in others:
        where = shown(run.path)
        mine, theirs = run.info, first.info
        if mine["competition"] != theirs["competition"]:
            what = f"is of competition `{mine['competition']}`, but `{first.name}` of `{theirs['competition']}`"
            faults.append(Fault(where, what, fix))
            continue
        if mine["hashes"]["folds"] != theirs["hashes"]["folds"]:
            hashes = f"{mine['hashes']['folds'][:8]}, not {theirs['hashes']['folds'][:8]}"
            what = f"was made on other folds than `{first.name}` ({hashes})"
            faults.append(Fault(where, what, fix))
        if run.classes != first.classes:
            what = f"has the classes {', '.join(run.classes)}, but `{first.name}` has {', '.join(first.classes)}"
            faults.append(Fault(where, what, fix))
        if sorted(run.ids.tolist()) != ids or sorted(run.test_ids.tolist()) != test_ids:
            what = f"holds other ids ({len(run.ids)} validated, {len(run.test_ids)} test) than `{first.name}`"
            faults.append(Fault(where, f"{what} ({len(ids)}, {len(test_ids)})", fix))
        elif run.classes == first.classes:
            rows = rows_of(run.ids, first.ids)
            other = (run.labels[rows] != first.labels) | (run.fold[rows] != first.fold)
            if other.any():
                what = f"has other labels or folds than `{first.name}` for {other.sum()} ids"
                faults.append(Fault(where, f"{what}, such as {first.ids[other][0]}", fix))
    if faults:
        raise RecordError(faults)
