"""How sure a score is: standard errors, intervals, paired differences and tests, and corrections for many of them.

Near-duplicates stand or fall together, so the bootstrap draws whole groups, never single images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import e, erfc, exp, lgamma, log, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldwise.metrics import Floats, Labels, Metric

Z95 = 1.959963984540054  # the normal quantile of a 95% interval

# Cells of the matrix of drawn counts that is held at once: 32 MB.
_BLOCK_CELLS = 4_000_000


@dataclass(frozen=True)
class Difference:
    """How much better one set of predictions is than another on the same images.

    Attributes:
        gain: Difference of the scores; positive where the first is better, for losses too.
        standard_error: Of `gain`.
        low: Lower end of the interval around `gain`.
        high: Upper end of it.
        level: Share of such intervals that hold the true gain, e.g. 0.95.
    """

    gain: float
    standard_error: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Corrected:
    """What the best of several configurations scores, without the luck of having been chosen.

    Attributes:
        score: Corrected estimate.
        standard_error: Of `score`.
        low: Lower end of the interval around `score`.
        high: Upper end of it.
        level: Share of such intervals that hold the true score, e.g. 0.95.
        naive: Score of the best on the very rows that chose it: too good.
        chosen_among: Number of configurations.
    """

    score: float
    standard_error: float
    low: float
    high: float
    level: float
    naive: float
    chosen_among: int


def bootstrap(
    metric: Metric,
    labels: Labels,
    predictions: Sequence[Floats],
    groups: NDArray[Any],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Scores of drawn samples: as many groups as there are, with replacement (Davison and Hinkley 1997, section 3.8).

    Args:
        metric: What is scored.
        labels: (N,) class indices.
        predictions: P arrays of (N, C) class probabilities, all for the same images in the same order.
        groups: (N,) names or numbers; images of one group are drawn together.
        draws: Bootstrap samples.
        seed: Of the draws; the same seed gives the same figures.

    Returns:
        (draws, P); a draw takes the same groups for all predictions.

    Raises:
        ValueError: If there is no image.
    """
    if not len(labels):
        raise ValueError("cannot draw from no images")
    sums = _sums_by_group(metric, labels, predictions, groups)
    scores = np.empty((draws, len(predictions)))
    for start, counts in _drawn_counts(len(np.unique(groups)), draws, seed):
        for index, by_group in enumerate(sums):
            scores[start : start + len(counts), index] = metric.finish(counts @ by_group)
    return scores


def _sums_by_group(
    metric: Metric, labels: Labels, predictions: Sequence[Floats], groups: NDArray[Any]
) -> list[NDArray[np.float64]]:
    """For each of the predictions (G, S) sums over the images of each group."""
    names, member = np.unique(groups, return_inverse=True)
    sums = []
    for probs in predictions:
        rows = metric.statistics(labels, probs)
        by_group = np.zeros((len(names), rows.shape[1]))
        np.add.at(by_group, member, rows)
        sums.append(by_group)
    return sums


def _drawn_counts(count: int, draws: int, seed: int) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Blocks of draws: the number of the first, and (block, count) how often each group is in each draw."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_CELLS // count)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        drawn = rng.integers(0, count, size=(size, count)) + np.arange(size)[:, None] * count
        yield start, np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)


def interval(scores: NDArray[np.float64], level: float) -> tuple[float, float]:
    """Lower and upper end of the middle `level` of bootstrap scores (Efron and Tibshirani 1993, chapter 13)."""
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def standard_error(
    metric: Metric, labels: Labels, probs: Floats, groups: NDArray[Any], *, draws: int = 2000, seed: int = 0
) -> float:
    """Standard error of a score, by bootstrap over groups.

    Args:
        metric: What is scored.
        labels: (N,) class indices.
        probs: (N, C) class probabilities.
        groups: (N,) names or numbers; images of one group are drawn together.
        draws: Bootstrap samples.
        seed: Of the draws; the same seed gives the same figure.

    Returns:
        Standard deviation of the scores of the bootstrap samples.
    """
    return float(bootstrap(metric, labels, [probs], groups, draws=draws, seed=seed).std(ddof=1))


def bootstrap_interval(
    metric: Metric,
    labels: Labels,
    probs: Floats,
    groups: NDArray[Any],
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a score, by bootstrap over groups.

    Args:
        metric: What is scored.
        labels: (N,) class indices.
        probs: (N, C) class probabilities.
        groups: (N,) names or numbers; images of one group are drawn together.
        level: Share of such intervals that hold the true score.
        draws: Bootstrap samples.
        seed: Of the draws.

    Returns:
        Lower and upper end.
    """
    return interval(bootstrap(metric, labels, [probs], groups, draws=draws, seed=seed)[:, 0], level)


def paired_difference(
    metric: Metric,
    labels: Labels,
    first: Floats,
    second: Floats,
    groups: NDArray[Any],
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Difference:
    """How much better `first` is than `second`, both scored on the same draws of groups.

    Args:
        metric: What is scored.
        labels: (N,) class indices.
        first: (N, C) class probabilities.
        second: (N, C) class probabilities of the same images in the same order.
        groups: (N,) names or numbers; images of one group are drawn together.
        level: Share of such intervals that hold the true gain.
        draws: Bootstrap samples.
        seed: Of the draws.

    Returns:
        The gain with its standard error and percentile interval.
    """
    scores = bootstrap(metric, labels, [first, second], groups, draws=draws, seed=seed)
    gains = metric.sign * (scores[:, 0] - scores[:, 1])
    gain = metric.sign * (metric.score(labels, first) - metric.score(labels, second))
    low, high = interval(gains, level)
    return Difference(gain, float(gains.std(ddof=1)), low, high, level)


def wilson(hits: NDArray[Any], trials: NDArray[Any]) -> NDArray[np.float64]:
    """95% intervals of proportions (Wilson 1927, JASA 22:209), images taken as independent.

    Args:
        hits: (n,) successes.
        trials: (n,) trials; none at all gives 0 to 1.

    Returns:
        (n, 2) lower and upper ends.
    """
    n = np.maximum(trials, 1).astype(np.float64)
    share = hits / n
    middle = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * np.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    ends = np.clip(np.stack([middle - half, middle + half], axis=-1), 0, 1)
    # An end that is exactly 0 or 1 comes out a rounding error inside, beyond the share itself.
    ends = np.stack([np.minimum(ends[..., 0], share), np.maximum(ends[..., 1], share)], axis=-1)
    return np.where((trials > 0)[..., None], ends, np.array([0.0, 1.0]))


def bias_corrected(
    metric: Metric,
    labels: Labels,
    predictions: Sequence[Floats],
    groups: NDArray[Any],
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Corrected:
    """What the best of several configurations scores, without the luck of having been chosen.

    The best of many is partly the luckiest, so its own score flatters it. Here the choice is made again in each of many
    bootstrap samples of groups, and what it chose is scored on the groups that were not drawn (BBC-CV: Tsamardinos,
    Greasidou and Borboudakis 2018, Machine Learning 107:1895); the mean is the corrected score. Groups that were not
    drawn are a subset of about 1/e of all, whose scores spread sqrt(e - 1) times as widely as those of whole samples
    (the delete-d jackknife: Shao and Wu 1989, Annals of Statistics 17:1176); standard error and interval are
    narrowed by that.

    Args:
        metric: What is scored, and chosen by.
        labels: (N,) class indices.
        predictions: P arrays of (N, C) out-of-fold probabilities, one a configuration, all for the same images in the
            same order.
        groups: (N,) names or numbers; images of one group are drawn together.
        level: Share of such intervals that hold the true score.
        draws: Bootstrap samples.
        seed: Of the draws; the same seed gives the same figures.

    Returns:
        The corrected score; conditional on the trained models, like every figure of out-of-fold predictions.

    Raises:
        ValueError: If there is no configuration, or fewer than two groups.
    """
    count = len(np.unique(groups))
    if not predictions or count < 2:
        what = "a choice needs a configuration and two groups"
        raise ValueError(f"{what}, but got (len(predictions)={len(predictions)}, groups={count})")
    sums = _sums_by_group(metric, labels, predictions, groups)
    left_out: list[Floats] = []
    for _, counts in _drawn_counts(count, draws, seed):
        drawn = np.stack([metric.finish(counts @ by_group) for by_group in sums])
        chosen = (metric.sign * drawn).argmax(axis=0)
        # With few groups a draw may hold them all: it leaves nothing to score on.
        rest = (counts == 0).astype(np.float64)
        usable = rest.any(axis=1)
        left_out += [
            metric.finish(rest[usable & (chosen == index)] @ sums[index]) for index in np.unique(chosen[usable])
        ]
    scores = np.concatenate(left_out, dtype=np.float64)
    score = float(scores.mean())
    narrowed = score + (scores - score) / sqrt(e - 1)
    low, high = interval(narrowed, level)
    naive = max((metric.score(labels, probs) for probs in predictions), key=lambda value: metric.sign * value)
    return Corrected(score, float(narrowed.std(ddof=1)), low, high, level, naive, len(predictions))


def spent(share: float, error_rate: float) -> float:
    """How much of an error rate may have been spent after a share of the looks, Pocock-like: about equally at each.

    alpha * ln(1 + (e - 1) t), from Lan and DeMets 1983, Biometrika 70:659.

    Args:
        share: t, of the information at the last look, 0 to 1.
        error_rate: alpha, of all looks together.

    Returns:
        0 at the share 0, `error_rate` at the share 1.
    """
    return error_rate * log(1 + (e - 1) * share)


def normal_quantile(share: float) -> float:
    """The value below which a standard normal variable is with probability `share`, above 0 and below 1."""
    return NormalDist().inv_cdf(share)


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


def normal_p(gain: float, error: float) -> float:
    """Two-sided p-value of a gain by its standard error, 1 where that is 0: then nothing tells them apart."""
    return erfc(abs(gain) / (error * sqrt(2))) if error > 0 else 1.0
