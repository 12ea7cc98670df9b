"""Blending kept runs, and what the blend will score on images that nobody has labels for.

Members, weights and method are chosen on all folds but one and scored on that one, so the estimate is not flattered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from foldwise.errors import Fault, RecordError
from foldwise.metrics import METRICS, Floats, Labels, Metric, log_loss_of
from foldwise.records.calibration import (
    Prior,
    corrected,
    fit_logistic,
    four_digits,
    log_probs,
    losses_by_temperature,
    share_factors,
    shift_factors,
    softmax,
    temperatures,
    uncalibrated,
)
from foldwise.records.store import Ids, Probs64, Run, rows_of, shown
from foldwise.stats import bootstrap, interval, normal_quantile

Method = Literal["best", "mean", "caruana", "logit_mean", "stack"]
# The simpler first: a later one must beat it by more than the standard error of the gain.
METHODS: tuple[Method, ...] = ("best", "mean", "caruana", "logit_mean", "stack")
LEVEL = 0.95
ROUNDS = 15
# Greedy selection sees the best this many; where that is more than a bag's least, bags of half of them each.
CANDIDATES = 24
BAGS = 6
BAG_LEAST = 8
# A stack's runs: those that greedy selection weighs most.
STACKED = 10
# What pulls a stack's coefficients to equal ones: a normal prior with a standard deviation of 0.2; of 1 for biases.
PULL, BIAS_PULL = 25.0, 1.0
# Marginal gains are of the heaviest this many.
GAINS = 10
# Draws for a standard error that is compared, not told: its own error is then 3%.
FEW_DRAWS = 500

Weights = NDArray[np.float64]


@dataclass(frozen=True)
class Correction:
    """What class probabilities are corrected by for another class prior: see `calibration.corrected`.

    Attributes:
        exponent: Of the probabilities.
        factors: (C,) of the classes, after that.
    """

    exponent: float
    factors: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Recipe:
    """How the probabilities of runs become those of a blend.

    Attributes:
        method: `best`, `mean` and `caruana` average probabilities, `logit_mean` and `stack` sum logits.
        coefficients: (M,) of probabilities or of logits, 0 for a run that takes no part.
        temperatures: (M,) that the logits of each run are divided by; 1 for `best`.
        bias: (C,) added to the sum of logits; 0 but for `stack`.
        shares: (M,) sum to 1. Of a `stack` what share of its logits comes from each run: coefficient times the root
            mean square of the calibrated logits around their mean over the classes. Else the coefficients.
    """

    method: Method
    coefficients: Weights
    temperatures: Weights
    bias: Weights
    shares: Weights

    def predict(self, probs: Sequence[Probs64], correction: Correction | None) -> Probs64:
        """Blend the predictions of the runs.

        Args:
            probs: M arrays (N, C) of the same images.
            correction: Of the class prior.

        Returns:
            (N, C) float64.
        """
        stacked = np.stack(probs)
        return _corrected(_combined(self, stacked, log_probs(stacked)), correction)


@dataclass(frozen=True, eq=False)
class Member:
    """A run with a weight in a blend.

    Attributes:
        run: The run.
        weight: Above 0; those of a blend sum to 1. See `Recipe.shares`.
        score: Its OOF metric, as it is.
        standard_error: Of `score`.
        coefficient: What multiplies its probabilities (`best`, `mean`, `caruana`) or logits (`logit_mean`, `stack`).
        temperature: What its logits are divided by first.
        gain: Cross-fitted score of the blend less that of the blend without it, same method; positive where it helps,
            for losses too. None for a single run and beyond the `GAINS` heaviest.
        gain_standard_error: Of `gain`, paired.
    """

    run: Run
    weight: float
    score: float
    standard_error: float
    coefficient: float
    temperature: float
    gain: float | None
    gain_standard_error: float | None


@dataclass(frozen=True)
class Trial:
    """A method's own cross-fitted score.

    Attributes:
        method: The method.
        score: Cross-fitted, with this method for all folds.
        standard_error: Of `score`.
        gain: Over the first method of the blend, paired; positive where better, for losses too.
        gain_standard_error: Of `gain`.
    """

    method: Method
    score: float
    standard_error: float
    gain: float
    gain_standard_error: float


@dataclass(frozen=True, eq=False)
class Blend:
    """A blend of runs with an honest estimate of its score.

    Attributes:
        competition: Name of the competition.
        metric: Name of the metric.
        classes: Class names, in the order of the indices.
        folds_sha256: Of the split that all members share.
        considered: Names of all runs that were offered.
        members: Those that got a weight, the heaviest first, equal ones by name.
        method: `single` where one run was offered, else one of `METHODS`.
        fold_methods: The method chosen without each fold, by fold.
        trials: All methods that were tried, the simplest first; none for a single run.
        prior: What class probabilities were corrected for.
        correction: Of the test images' class probabilities; None where `prior` is `none`.
        bias: (C,) added to the sum of logits.
        score: Cross-fitted estimate; for a single run its OOF score.
        standard_error: Of `score` as an estimate for the blend that is fitted on all folds.
        interval: Lower and upper end around `score`.
        level: Share of such intervals that hold the true score.
        naive: Score of `members` on the rows that chose them: too good, shown for comparison.
        accuracy: Cross-fitted accuracy, whatever the metric.
        accuracy_standard_error: Of `accuracy`.
        oof_ids: (N,) ids.
        oof_probs: (N, C) float64, what `score` is of: each row by a fit without its fold.
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
    trials: tuple[Trial, ...]
    prior: Prior
    correction: Correction | None
    bias: tuple[float, ...]
    score: float
    standard_error: float
    interval: tuple[float, float]
    level: float
    naive: float
    accuracy: float
    accuracy_standard_error: float
    oof_ids: Ids
    oof_probs: Probs64
    test_ids: Ids
    test_probs: Probs64

    @property
    def note(self) -> str:
        """What the estimate means, in a sentence."""
        told = [mark for mark in self.marks if mark in ("optimistic", "tuned")]
        flattered = f"; flattered as far as its members are {' and '.join(told)}" if told else ""
        if self.method == "single":
            prior = "" if self.prior == "none" else ", class prior corrected without the scored fold"
            return f"out-of-fold score of the one run{prior}{flattered}; conditional on its trained models"
        chosen = "members, weights and method chosen without the scored fold"
        return f"cross-fitted: {chosen}{flattered}; conditional on the trained models"

    @property
    def choice(self) -> str:
        """Why this method, in a sentence."""
        if self.method == "single":
            return "one run was offered"
        if len(self.trials) == 1:
            return f"only `{self.method}` was asked for"
        if len(self.fold_methods) < 3:
            return "two folds leave none to choose a method by, so the simplest is taken"
        if self.method == "best":
            return "no blend beats the best run by more than its standard error, so it is submitted alone"
        return "taken in order, each must beat the method held so far by more than the standard error of the gain"

    @property
    def weights_are(self) -> str:
        """What the members' weights are, in a phrase."""
        if self.method == "stack":
            return "the share of the blend's logits that comes from each run"
        return "what each run's logits are multiplied by" if self.method == "logit_mean" else "shares of the average"

    @property
    def marks(self) -> list[str]:
        """Marks of all members, each once; `transductive` where predictions of the test images set the class prior."""
        of_blend = ["transductive"] if self.prior == "test" else []
        return _union([*(member.run.info["marks"] for member in self.members), of_blend])

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
        return round(images * share), round(normal_quantile((1 + self.level) / 2) * deviation)


def blend(
    runs: Sequence[Run],
    *,
    metric: Metric,
    groups: Mapping[str, str],
    methods: Sequence[Method] = METHODS,
    prior: Prior = "none",
) -> Blend:
    """Weigh runs and estimate what the blend scores.

    The methods, the simplest first:

    - `best` takes the best run alone, as it is.
    - `mean` averages the probabilities of all runs.
    - `caruana` averages what greedy forward selection with replacement picks (Caruana et al. 2004, "Ensemble selection
      from libraries of models", ICML): `ROUNDS` rounds of which the best is kept, equal candidates told apart by log
      loss. It sees the `CANDIDATES` best runs (pruning, Caruana, Munson and Niculescu-Mizil 2006, ICDM) and selects in
      `BAGS` bags of half of them each, whose weights are averaged; up to `BAG_LEAST` runs are one bag.
    - `logit_mean` averages logits of all runs: the geometric mean of their probabilities.
    - `stack` is a multinomial logistic regression on the logits of the `STACKED` runs that greedy selection weighs
      most, with one coefficient a run, pulled to equal ones and above 0 (Breiman 1996, "Stacked regressions", Machine
      Learning 24:49), and one bias a class.

    All but `best` see calibrated runs: each run's logits are divided by its temperature first, so that a run that is
    too sure of itself does not outvote the others. Averages of probabilities gain from it as those of logits do.

    A cross-fit chooses between the methods: taken in order, a later one replaces the one held so far only if its paired
    gain over it is more than the standard error of that gain. The estimate repeats all of this (temperatures, members,
    weights, method, class factors) for each fold without that fold.

    Its standard error counts two things: which images were drawn (bootstrap over groups), and that the fits without a
    fold are not the fit that is submitted. For the second the paired difference between held-out predictions and those
    of the final fit is drawn too; it is 0 for a run alone, and grows where a fold more changes predictions. The
    interval is the percentile interval, widened by both in the same ratio. Both are conditional on the trained models.

    What is fitted is rounded before it is used, and predictions are summed in a fixed order and without BLAS, whose
    last bits differ between machines: the same runs give the same blend everywhere.

    Args:
        runs: At least one, of the same competition, folds, classes and ids; their order is of no consequence.
        metric: What to choose and to score by.
        groups: Group of each id; near-duplicates share one.
        methods: Some of `METHODS`; one alone is used without a choice.
        prior: `train` calibrates the blend so that classes get the mean probability that they have among the labels
            that it was fitted on (`calibration.share_factors`); `test` goes on from there to the likeliest class
            shares of the very images that are predicted (`calibration.shift_factors`).

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
    # Fold by fold, and by id within: no run's order of rows shows, and a fold's rows are a slice.
    order = np.lexsort((first.ids, first.fold))
    ids, labels, fold = first.ids[order], first.labels[order], first.fold[order]
    group = np.array([groups[name] for name in ids.tolist()])
    oof = np.stack([run.probs[rows_of(run.ids, ids)] for run in runs])
    tried: tuple[Method, ...] = tuple(method for method in METHODS if method in methods)
    fitting = _CrossFit(oof, labels, fold, group, metric, tried if len(runs) > 1 else ("best",), prior)
    method, fold_methods, trials = fitting.choose()
    recipe = fitting.recipe(method, _NOTHING)
    chosen = np.flatnonzero(recipe.coefficients)
    held_out = fitting.held_out(fold_methods)
    seen = fitting.predict(recipe, _NOTHING, oof)[0]
    draws = bootstrap(metric, labels, [held_out, seen, *oof[chosen]], group)
    errors = draws.std(axis=0, ddof=1)
    error = _total_error(draws)
    heaviest = sorted(chosen.tolist(), key=lambda index: -recipe.shares[index])[:GAINS] if len(runs) > 1 else []
    gains = dict(zip(heaviest, fitting.gains(method, heaviest), strict=True))
    members = [
        Member(
            run=runs[index],
            weight=float(recipe.shares[index]),
            score=_score(metric, labels, oof[index]),
            standard_error=_figure(own_error),
            coefficient=float(recipe.coefficients[index]),
            temperature=float(recipe.temperatures[index]),
            gain=gains.get(index, (None, None))[0],
            gain_standard_error=gains.get(index, (None, None))[1],
        )
        for index, own_error in zip(chosen.tolist(), errors[2:], strict=True)
    ]
    test = np.stack([run.test_probs[rows_of(run.test_ids, first.test_ids)] for run in runs])
    test_probs, correction = fitting.predict(recipe, _NOTHING, test)
    accuracy = METRICS["accuracy"]
    score = _score(metric, labels, held_out)
    low, high = _widened(interval(draws[:, 0], LEVEL), score, errors[0], error)
    low, high = max(low, 0.0), min(high, 1.0) if metric.hard else high
    accuracy_error = error if metric is accuracy else _total_error(bootstrap(accuracy, labels, [held_out, seen], group))
    return Blend(
        competition=first.info["competition"],
        metric=metric.name,
        classes=first.classes,
        folds_sha256=first.info["hashes"]["folds"],
        considered=tuple(run.name for run in runs),
        members=tuple(sorted(members, key=lambda member: -member.weight)),
        method=method if len(runs) > 1 else "single",
        fold_methods=fold_methods if len(runs) > 1 else {},
        trials=trials if len(runs) > 1 else (),
        prior=prior,
        correction=correction,
        bias=tuple(recipe.bias.tolist()),
        score=score,
        standard_error=_figure(error),
        interval=(_figure(low), _figure(high)),
        level=LEVEL,
        naive=_score(metric, labels, seen),
        accuracy=accuracy.score(labels, held_out),
        accuracy_standard_error=_figure(accuracy_error),
        oof_ids=ids,
        oof_probs=held_out,
        test_ids=first.test_ids,
        test_probs=test_probs,
    )


_NOTHING: frozenset[int] = frozenset()


class _CrossFit:
    """Fits on all folds but some, each made once: the fit without folds j and k serves the estimates of both.

    Rows come fold by fold. Folds are numbered from 0 in here, runs by their place.
    """

    def __init__(
        self,
        oof: Probs64,
        labels: Labels,
        fold: NDArray[np.int64],
        group: NDArray[np.str_],
        metric: Metric,
        methods: tuple[Method, ...],
        prior: Prior,
    ) -> None:
        self._oof = oof
        self._logits = log_probs(oof)
        self._labels = labels
        names, starts, self._fold = np.unique(fold, return_index=True, return_inverse=True)
        self._names: list[int] = names.tolist()
        self._folds = range(len(names))
        self._rows = [slice(start, end) for start, end in pairwise([*starts.tolist(), len(fold)])]
        self._group = group
        self._metric = metric
        self._methods = methods
        self._prior = prior
        self._all = frozenset(range(len(oof)))
        self._losses = losses_by_temperature(self._logits, labels, self._fold)
        one_hot = (self._fold == np.arange(len(names))[:, None]).astype(np.float64)
        self._sums = np.stack([np.einsum("fn,ns->fs", one_hot, metric.statistics(labels, probs)) for probs in oof], 1)
        self._priority = np.random.default_rng(0).random((BAGS, len(oof)))
        self._recipes: dict[tuple[Method, frozenset[int], int | None], Recipe] = {}
        self._temperatures: dict[frozenset[int], Weights] = {}
        self._calibrated: dict[tuple[frozenset[int], int], Weights] = {}
        self._greedy: dict[tuple[frozenset[int], int], tuple[Weights, frozenset[int]]] = {}
        self._candidates: tuple[frozenset[int], Floats] | None = None
        self._share_factors: dict[Recipe, tuple[float, Weights]] = {}

    def choose(self) -> tuple[Method, dict[int, Method], tuple[Trial, ...]]:
        """The method chosen from all folds, those chosen without each fold by its name, and what was compared."""
        method, trials = self._method(_NOTHING)
        if len(self._folds) < 3:
            # Without a fold one is left, by which no method can be chosen: what is submitted is what is estimated.
            method = self._methods[0]
        fold_methods = {self._names[fold]: self._method(frozenset({fold}))[0] for fold in self._folds}
        return method, fold_methods, trials

    def held_out(self, methods: Mapping[int, Method]) -> Probs64:
        """(N, C) predictions for each fold by a fit without it, by the method for the fold's name."""
        predictions = np.zeros(self._oof[0].shape)
        for fold, name in enumerate(self._names):
            predictions[self._rows[fold]] = self._predicted(methods[name], frozenset({fold}), fold)
        return predictions

    def gains(self, method: Method, runs: Sequence[int]) -> list[tuple[float, float]]:
        """Marginal gain of each of `runs` in the blend by `method`, with its standard error."""
        predictions = [np.zeros(self._oof[0].shape) for _ in range(len(runs) + 1)]
        for fold in self._folds:
            for probs, without in zip(predictions, (None, *runs), strict=True):
                probs[self._rows[fold]] = self._predicted(method, frozenset({fold}), fold, without)
        return self._paired(predictions, np.ones(len(self._labels), dtype=bool), sign=-1)

    def predict(self, recipe: Recipe, excluded: frozenset[int], probs: Probs64) -> tuple[Probs64, Correction | None]:
        """(N, C) predictions, and their correction, for probs (M, N, C) of images that are not of the fitted rows."""
        combined = _combined(recipe, probs, log_probs(probs))
        correction = self._correction(combined, recipe, excluded)
        return _corrected(combined, correction), correction

    def recipe(self, method: Method, excluded: frozenset[int], without: int | None = None) -> Recipe:
        """Fit `method` on the folds that are not excluded, to all runs or to all without one."""
        key = method, excluded, without
        if key not in self._recipes:
            self._recipes[key] = self._fit(method, excluded, without)
        return self._recipes[key]

    def _method(self, excluded: frozenset[int]) -> tuple[Method, tuple[Trial, ...]]:
        """The method chosen by a cross-fit on the folds that are not excluded; the simplest where one fold is left."""
        rest = [fold for fold in self._folds if fold not in excluded]
        if len(rest) < 2 or (excluded and len(self._methods) == 1):
            return self._methods[0], ()
        rows = np.isin(self._fold, rest)
        predictions = [np.zeros(self._oof[0].shape) for _ in self._methods]
        # Fold by fold, so that `stack` finds what `caruana` has just fitted.
        for fold in rest:
            for probs, method in zip(predictions, self._methods, strict=True):
                probs[self._rows[fold]] = self._predicted(method, excluded | {fold}, fold)
        scores = [_score(self._metric, self._labels[rows], probs[rows]) for probs in predictions]
        draws = self._draws(predictions, rows)
        held = 0
        for index in range(1, len(scores)):
            gain = self._metric.sign * (scores[index] - scores[held])
            if gain > (draws[:, index] - draws[:, held]).std(ddof=1):
                held = index
        errors = draws.std(axis=0, ddof=1)
        gains = [(0.0, 0.0), *self._paired(predictions, rows, draws=draws)]
        trials = tuple(
            Trial(method, score, _figure(error), *gain)
            for method, score, error, gain in zip(self._methods, scores, errors, gains, strict=True)
        )
        return self._methods[held], trials

    def _draws(self, predictions: Sequence[Probs64], rows: NDArray[np.bool_]) -> NDArray[np.float64]:
        labels, group = self._labels[rows], self._group[rows]
        return bootstrap(self._metric, labels, [probs[rows] for probs in predictions], group, draws=FEW_DRAWS)

    def _paired(
        self,
        predictions: Sequence[Probs64],
        rows: NDArray[np.bool_],
        *,
        sign: int = 1,
        draws: NDArray[np.float64] | None = None,
    ) -> list[tuple[float, float]]:
        """Gain, times `sign`, of each of the predictions but the first over the first, with its standard error."""
        draws = self._draws(predictions, rows) if draws is None else draws
        scores = np.array([self._metric.score(self._labels[rows], probs[rows]) for probs in predictions])
        gains = sign * self._metric.sign * (scores[1:] - scores[0])
        errors = (draws[:, 1:] - draws[:, :1]).std(axis=0, ddof=1)
        return [(_figure(gain), _figure(error)) for gain, error in zip(gains, errors, strict=True)]

    def _predicted(self, method: Method, excluded: frozenset[int], fold: int, without: int | None = None) -> Probs64:
        """(n, C) predictions for the images of a fold."""
        rows = self._rows[fold]
        recipe = self.recipe(method, excluded, without)
        probs, logits, calibrated = self._oof[:, rows], self._logits[:, :, rows], None
        if method in ("mean", "caruana"):
            if (excluded, fold) not in self._calibrated:
                self._calibrated[excluded, fold] = softmax(logits / self._temperature(excluded)[:, None, None])
            calibrated = self._calibrated[excluded, fold]
        combined = _combined(recipe, probs, logits, calibrated)
        return _corrected(combined, self._correction(combined, recipe, excluded))

    def _correction(self, combined: Weights, recipe: Recipe, excluded: frozenset[int]) -> Correction | None:
        """The correction of predictions (C, n), from the rows that the recipe was fitted on and, for `test`, them."""
        if self._prior == "none":
            return None
        rows = self._fitted(excluded)
        labels = self._labels[rows]
        if recipe not in self._share_factors:
            fitted = _combined(recipe, self._oof[:, rows], self._logits[:, :, rows])
            self._share_factors[recipe] = share_factors(fitted, labels)
        exponent, factors = self._share_factors[recipe]
        if self._prior == "test":
            shares = np.bincount(labels, minlength=len(combined)) / len(labels)
            factors = four_digits(factors * shift_factors(corrected(combined, exponent, factors), shares))
        return Correction(exponent, tuple(factors.tolist()))

    def _fitted(self, excluded: frozenset[int]) -> NDArray[np.bool_]:
        return ~np.isin(self._fold, list(excluded))

    def _temperature(self, excluded: frozenset[int]) -> Weights:
        if excluded not in self._temperatures:
            self._temperatures[excluded] = temperatures(self._summed(self._losses, excluded))
        return self._temperatures[excluded]

    def _summed(self, by_fold: Weights, excluded: frozenset[int]) -> Weights:
        """Sum of (F, ...) over the folds that are not excluded."""
        total: Weights = by_fold[[fold for fold in self._folds if fold not in excluded]].sum(axis=0)
        return total

    def _best_first(self, excluded: frozenset[int]) -> list[int]:
        """All runs, the best on the folds that are not excluded first; equal ones by log loss."""
        scores = self._metric.sign * self._metric.finish(self._summed(self._sums, excluded))
        order: list[int] = np.lexsort((uncalibrated(self._summed(self._losses, excluded)), -scores)).tolist()
        return order

    def _fit(self, method: Method, excluded: frozenset[int], without: int | None) -> Recipe:
        runs, classes = len(self._oof), self._oof.shape[2]
        temperature, bias = self._temperature(excluded), np.zeros(classes)
        coefficients = np.zeros(runs)
        if method == "best":
            coefficients[next(run for run in self._best_first(excluded) if run != without)] = 1
            temperature = np.ones(runs)
        elif method == "caruana":
            coefficients = self._bagged(excluded, without)
        elif method == "stack":
            return self._stack(excluded, without)
        else:
            coefficients[:] = 1
            coefficients[[] if without is None else [without]] = 0
            coefficients /= coefficients.sum()
        return Recipe(method, coefficients, temperature, bias, coefficients)

    def _bagged(self, excluded: frozenset[int], without: int | None) -> Weights:
        """Mean over the bags of the weights that greedy selection gives."""
        order = np.array(self._best_first(excluded)[:CANDIDATES])
        size = max(BAG_LEAST, ceil(len(order) / 2))
        # What falls to a bag does not hang on `without`: a bag that did not pick it need not be selected again.
        bags = [order[np.sort(np.argsort(priority[order])[:size])] for priority in self._priority]
        weights = np.zeros(len(self._oof))
        for number, bag in enumerate(bags[: 1 if size >= len(order) else BAGS]):
            key = excluded, number
            if key not in self._greedy:
                self._greedy[key] = self._select(excluded, order, bag)
            selected, picked = self._greedy[key]
            if without in picked:
                selected, _ = self._select(excluded, order, bag[bag != without])
            weights += selected
        mean: Weights = weights / weights.sum()
        return mean

    def _select(
        self, excluded: frozenset[int], order: NDArray[np.intp], bag: NDArray[np.intp]
    ) -> tuple[Weights, frozenset[int]]:
        """(M,) weights by greedy selection among `bag`, and all runs that it ever picked."""
        rows = self._fitted(excluded)
        if self._candidates is None or self._candidates[0] != excluded:
            temperature = self._temperature(excluded)[order, None, None]
            calibrated = softmax(self._logits[order][:, :, rows] / temperature)
            # Models last: a row's candidates then lie together. Half the bytes are most of the time.
            self._candidates = excluded, np.ascontiguousarray(calibrated.transpose(1, 2, 0), dtype=np.float32)
        place = {run: index for index, run in enumerate(order.tolist())}
        stack = np.ascontiguousarray(self._candidates[1][:, :, [place[run] for run in bag.tolist()]])
        selected, picks = _caruana(stack, self._labels[rows], self._metric)
        weights = np.zeros(len(self._oof))
        weights[bag] = selected
        return weights, frozenset(bag[picks].tolist())

    def _stack(self, excluded: frozenset[int], without: int | None) -> Recipe:
        weights = self.recipe("caruana", excluded, without).coefficients
        by_weight = sorted(self._best_first(excluded), key=lambda run: -weights[run])
        runs = np.sort([run for run in by_weight if run != without][:STACKED])
        rows = self._fitted(excluded)
        temperature = self._temperature(excluded)
        logits = self._logits[runs][:, :, rows] / temperature[runs, None, None]
        offset = np.zeros(logits.shape[1:])
        while True:
            fitted, bias = fit_logistic(
                logits, self._labels[rows], offset=offset, centre=1 / len(runs), pull=PULL, bias_pull=BIAS_PULL
            )
            keep = fitted > 0
            keep[fitted.argmax()] = True
            if keep.all():
                break
            runs, logits = runs[keep], logits[keep]
        # The last one left may have a coefficient of 0 or less: then the biases say all.
        fitted = np.maximum(fitted, 0.001)
        spread = np.sqrt(((logits - logits.mean(axis=1, keepdims=True)) ** 2).mean(axis=(1, 2)))
        coefficients, shares = np.zeros(len(self._oof)), np.zeros(len(self._oof))
        coefficients[runs] = fitted
        # Runs that say the same of every class have no logits to share.
        parts = fitted * spread if spread.any() else fitted
        shares[runs] = np.round(parts / parts.sum(), 6)
        return Recipe("stack", coefficients, temperature, bias, shares)


def _figure(value: float) -> float:
    """A figure without the last bits, which differ between machines."""
    return round(float(value), 9) + 0.0  # no minus zero


def _total_error(draws: NDArray[np.float64]) -> float:
    """Standard error of the score in the first column as an estimate for the blend that scores as in the second."""
    return float(np.hypot(draws[:, 0].std(ddof=1), (draws[:, 1] - draws[:, 0]).std(ddof=1)))


def _widened(ends: tuple[float, float], score: float, error: float, total_error: float) -> tuple[float, float]:
    """An interval of a score whose error is more than that by which the interval was made."""
    if error == 0:
        half = normal_quantile((1 + LEVEL) / 2) * total_error
        return score - half, score + half
    low, high = (score + total_error / error * (end - score) for end in ends)
    return low, high


def _score(metric: Metric, labels: Labels, probs: Probs64) -> float:
    """A score that is the same on every machine; a hard metric's ratio of counts is as it is."""
    score = metric.score(labels, probs)
    return score if metric.hard else _figure(score)


def _union(lists: Iterable[list[Any]]) -> list[Any]:
    """What is in any of the lists, each once, in order of appearance."""
    union: list[Any] = []
    for values in lists:
        union += [value for value in values if value not in union]
    return union


def _combined(recipe: Recipe, probs: Probs64, logits: Weights, calibrated: Weights | None = None) -> Weights:
    """(C, N) of probs (M, N, C), logits (M, C, N) and, where the caller has them, calibrated probs (M, C, N)."""
    used = np.flatnonzero(recipe.coefficients)
    coefficients, temperature = recipe.coefficients[used], recipe.temperatures[used]
    if recipe.method == "best":
        return np.ascontiguousarray(probs[used[0]].T)
    if recipe.method in ("mean", "caruana"):
        members = softmax(logits[used] / temperature[:, None, None]) if calibrated is None else calibrated[used]
        return _weighted(coefficients, members)
    return softmax(_weighted(coefficients / temperature, logits[used]) + recipe.bias[:, None])


def _weighted(weights: Weights, values: Weights) -> Weights:
    """Weighted sum of (M, C, N) in the order of the runs, without BLAS, whose last bits differ between machines."""
    total = np.zeros(values.shape[1:])
    for weight, member in zip(weights.tolist(), values, strict=True):
        total += weight * member
    return total


def _corrected(combined: Weights, correction: Correction | None) -> Probs64:
    """(N, C) of (C, N)."""
    if correction is None:
        return combined.T
    return corrected(combined, correction.exponent, np.array(correction.factors)).T


def _caruana(stack: Floats, labels: Labels, metric: Metric) -> tuple[Weights, list[int]]:
    """Greedy forward selection with replacement.

    Args:
        stack: (C, N, M) float32 or float64 predictions of M candidates.
        labels: (N,) class indices.
        metric: What to choose by; equal candidates are told apart by log loss, then by their order.

    Returns:
        (M,) weights that sum to 1: how often each was picked until the best round, the earliest of equals. And all
        picks, those of later rounds too.
    """
    classes, images, candidates = stack.shape
    rows = np.arange(images)
    lowest, highest = stack.min(axis=2), stack.max(axis=2)
    true = stack[labels, rows]
    total = np.zeros((classes, images), dtype=stack.dtype)
    picks: list[int] = []
    best, kept = -np.inf, 0
    for size in range(1, ROUNDS + 1):
        total_true = total[labels, rows][:, None]
        if metric.hard:
            counts = _counts_with_each(stack, total, labels, total + lowest, total + highest)
            scores = metric.sign * metric.finish(counts)
        else:
            scores = metric.sign * _losses_with_each(total_true, true, size)
        top = float(scores.max())
        tied = np.flatnonzero(scores == top)
        pick = int(tied[_losses_with_each(total_true, true[:, tied], size).argmin()]) if len(tied) > 1 else int(tied[0])
        picks.append(pick)
        total += stack[:, :, pick]
        if top > best:
            best, kept = top, size
    return np.bincount(picks[:kept], minlength=candidates) / kept, picks


def _losses_with_each(total_true: Floats, true: Floats, size: int) -> NDArray[np.float64]:
    """(M,) log loss of the mean of `size` members of which the last is each candidate in turn."""
    losses: NDArray[np.float64] = log_loss_of((total_true + true) / size).mean(axis=0)
    return losses


def _counts_with_each(
    stack: Floats, total: Floats, labels: Labels, floor: Floats, ceiling: Floats
) -> NDArray[np.float64]:
    """(M, 3C) hits, labels and predictions per class when each of M candidates in turn joins `total` (C, N).

    A row is settled when the least that its best class can get from a candidate (`floor`) is above the most that any
    other can (`ceiling`); it is counted once for all candidates. After a few rounds that is most rows.
    """
    classes, images, candidates = stack.shape
    rows = np.arange(images)
    winner = _largest(total)
    others = ceiling.copy()
    others[winner, rows] = -np.inf
    # The margin is for rounding in sums of float32.
    settled = floor[winner, rows] > others.max(axis=0) + 1e-5
    open_rows = np.flatnonzero(~settled)

    joined = stack[:, open_rows]
    joined += total[:, open_rows, None]
    predicted = _largest(joined)

    cells = predicted.astype(np.intp) * candidates + np.arange(candidates)
    hit = predicted == labels[open_rows, None]
    shape = (classes, candidates)
    predictions = np.bincount(cells.ravel(), minlength=classes * candidates).reshape(shape)
    hits = np.bincount(cells[hit], minlength=classes * candidates).reshape(shape)
    predictions += np.bincount(winner[settled], minlength=classes)[:, None]
    hits += np.bincount(winner[settled & (winner == labels)], minlength=classes)[:, None]
    true = np.broadcast_to(np.bincount(labels, minlength=classes)[:, None], shape)
    return np.concatenate([hits, true, predictions]).T.astype(np.float64)


def _largest(values: Floats) -> NDArray[np.int16]:
    """Index of the largest along the first axis, the first of equals: `argmax`, faster where that axis is short."""
    best = values[0].copy()
    largest = np.zeros(best.shape, dtype=np.int16)
    for index in range(1, len(values)):
        np.copyto(largest, index, where=values[index] > best)
        np.maximum(best, values[index], out=best)
    return largest


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
            hashes = f"sha256 of the folds {mine['hashes']['folds'][:8]}, not {theirs['hashes']['folds'][:8]}"
            what = f"was made on other folds than `{first.name}` ({hashes})"
            faults.append(Fault(where, what, fix))
        if mine["hashes"]["inputs"] != theirs["hashes"]["inputs"]:
            hashes = f"sha256 of the inputs {mine['hashes']['inputs'][:8]}, not {theirs['hashes']['inputs'][:8]}"
            faults.append(Fault(where, f"was made on other images or labels than `{first.name}` ({hashes})", fix))
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
