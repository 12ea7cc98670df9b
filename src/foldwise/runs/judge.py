"""Whether a trial has fallen so far behind the best one that its remaining folds are not worth training.

A pure function of predictions, so that a recorded study can be judged again under other error rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

from numpy.typing import NDArray

from foldwise.metrics import Floats, Labels, Metric
from foldwise.stats import normal_quantile, paired_difference, spent


@dataclass(frozen=True)
class Verdict:
    """What the judge says of a trial after some of its folds.

    Attributes:
        prune: Whether the trial should stop.
        gain: How much better it is than the best trial on the folds done; negative where it is behind.
        standard_error: Of `gain`, over images and over seeds of the training.
        limit: It is pruned when `gain` is below this; never above 0, and minus infinity where there is no look.
        level: Share of the error rate that this look may spend: the one-sided level of its test.
    """

    prune: bool
    gain: float
    standard_error: float
    limit: float
    level: float


def judge(
    metric: Metric,
    labels: Labels,
    trial: Floats,
    best: Floats,
    groups: NDArray[Any],
    *,
    look: int,
    looks: int,
    error_rate: float,
    seed_sd: float,
) -> Verdict:
    """Compare a trial with the best complete one, paired on the validation images of the folds done so far.

    The hypothesis that must be rejected before a trial is pruned: trained anew and scored on new images, its parameters
    do at least as well as the best trial's. The test is one-sided, and a sequential one, since a trial is looked at
    after each fold: the error rate is spent over the looks (`foldwise.stats.spent`), and by Bonferroni's inequality a
    trial that is truly as good is pruned at any look with at most that probability. After its last fold a trial is
    complete and nothing can be saved, so all error is spent at the look before.

    The standard error has two parts. One is the paired bootstrap over groups: other images, and what seeds change image
    by image. The other is the margin for seeds: parameters are judged, but one training of each was seen, and a whole
    fold goes well or badly by `seed_sd` when nothing but the seed changes, in the trial and in the best one alike.

    The gain is in the competition's metric, although log loss would tell two models apart on fewer images: label
    smoothing, mixup, dropout and the number of epochs move log loss without moving accuracy, and a trial pruned for
    being badly calibrated might have won by the metric that chooses the winner.

    What the guarantee leaves out: the best trial was chosen as the maximum, so its predictions on these very images are
    luckier than its parameters deserve, and trials that are as good get pruned more often than the error rate says,
    the more so the more trials are complete. `foldwise.runs.replay` measures by how much in a recorded study.

    Args:
        metric: The competition's.
        labels: (n,) class indices of the images of the folds done.
        trial: (n, C) class probabilities of the trial.
        best: (n, C) class probabilities of the best complete trial for the same images in the same order.
        groups: (n,) names or numbers; images of one group are drawn together.
        look: Folds done, from 1.
        looks: Folds of a complete trial; with `look == looks` nothing is pruned.
        error_rate: Greatest probability of pruning a trial that is as good, over all looks, 0 to 1.
        seed_sd: Standard deviation between seeds of one fold's score, as far as the bootstrap does not see it; see
            `seed_spread`.

    Returns:
        The verdict; the same for the same arguments.

    Raises:
        ValueError: If there is no image, or `look` is not one of 1 to `looks`.
    """
    difference = paired_difference(metric, labels, trial, best, groups)
    return decide(
        difference.gain,
        difference.standard_error,
        look=look,
        looks=looks,
        error_rate=error_rate,
        seed_sd=seed_sd,
    )


def decide(gain: float, image_error: float, *, look: int, looks: int, error_rate: float, seed_sd: float) -> Verdict:
    """The rule of `judge`, for a gain that is known already.

    Args:
        gain: Of the trial over the best one.
        image_error: Standard error of `gain` over images, paired.
        look: Folds done, from 1.
        looks: Folds of a complete trial.
        error_rate: Over all looks.
        seed_sd: Standard deviation between seeds of one fold's score, beyond what `image_error` holds.

    Returns:
        The verdict.

    Raises:
        ValueError: If `look` is not one of 1 to `looks`.
    """
    if not 1 <= look <= looks:
        raise ValueError(f"`1 <= look <= looks` must hold, but got ({look=}, {looks=})")
    error = sqrt(image_error**2 + 2 * seed_sd**2 / look)
    level = 0.0
    if look < looks:
        level = spent(look / (looks - 1), error_rate) - spent((look - 1) / (looks - 1), error_rate)
    # A level above one half would prune trials that are ahead.
    limit = min(0.0, normal_quantile(level) * error) if level > 0 else -inf
    return Verdict(gain < limit, gain, error, limit, level)


def seed_spread(pairs: Sequence[tuple[float, float]], image_errors: Sequence[float] = ()) -> float:
    """Standard deviation of one fold's score between seeds.

    Most of it is single images that flip, each for itself. The paired bootstrap sees those as it sees other images; a
    judge that counted them twice would stop half as many of the trials that it should. `image_errors` takes them off.

    Args:
        pairs: Scores of the same fold and parameters under two seeds, one pair a fold; at least one.
        image_errors: Paired standard error of each pair's difference (`foldwise.stats.paired_difference`). With none,
            the whole spread is told.

    Returns:
        sqrt(sum(d^2 - e^2) / (2 n)) for differences d with errors e, 0 where the errors explain all: half the mean
        squared difference is the variance of one score (Dahlberg 1940, "Statistical methods for medical and biological
        students"), less that of its images.

    Raises:
        ValueError: If there is no pair, or not one error a pair.
    """
    if not pairs or len(image_errors) not in (0, len(pairs)):
        what = "the spread between seeds needs a pair of scores, and one error a pair or none"
        raise ValueError(f"{what}, but got (pairs={len(pairs)}, image_errors={len(image_errors)})")
    total = sum((first - second) ** 2 for first, second in pairs) - sum(error**2 for error in image_errors)
    return sqrt(max(0.0, total) / (2 * len(pairs)))
