"""Log-probabilities of kept runs: their temperatures, logistic fits on them, and corrections of class priors.

All that is fitted here is rounded before it is used, so that last bits that differ between machines never show.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from foldwise.metrics import LOG_LOSS_EPS, Labels

Floats = NDArray[np.float64]
Prior = Literal["none", "train", "test"]
PRIORS: tuple[Prior, ...] = ("none", "train", "test")

# Temperatures at which losses are taken; a parabola through the least and its neighbours finds what lies between.
_TEMPERATURES = 2.0 ** (np.arange(-5, 15) / 2)
_UNCHANGED = int(np.flatnonzero(_TEMPERATURES == 1)[0])
# Pull on what a correction of priors fits: its biases are else free up to a constant, and endless where a class has no
# image.
_GAUGE = 1e-3
# Weight of the labels' class shares against the images whose shares are estimated: as if a tenth as many had them.
_PRIOR_IMAGES = 0.1


def log_probs(probs: Floats) -> Floats:
    """Logits of probabilities: their logs, none below that of `LOG_LOSS_EPS`.

    The bound is log loss's own, about the step of float32 at 1: below it a probability is what rounding left of one
    minus the others, and in a geometric mean one such value would outvote any number of other runs.

    Args:
        probs: (N, C), or (M, N, C) of several runs.

    Returns:
        (C, N), or (M, C, N), float64, to six decimals. Images come last, where sums over few classes are cheap.
    """
    logs: Floats = np.log(np.maximum(np.swapaxes(probs, -1, -2), LOG_LOSS_EPS))
    return logs.round(6)


def softmax(logits: Floats) -> Floats:
    """Probabilities (..., C, N) of logits (..., C, N), to nine decimals."""
    powers: Floats = np.exp(logits - logits.max(axis=-2, keepdims=True))
    powers /= powers.sum(axis=-2, keepdims=True)
    return powers.round(9)


def losses_by_temperature(logits: Floats, labels: Labels, fold: NDArray[np.int64]) -> Floats:
    """Summed log loss of each run in each fold at each of a grid of temperatures.

    Sums over folds add up, so that a fit without any of the folds costs a sum.

    Args:
        logits: (M, C, N), as `log_probs` gives them.
        labels: (N,) class indices.
        fold: (N,) 0 to F - 1.

    Returns:
        (F, M, G).
    """
    runs, _, images = logits.shape
    folds = int(fold.max()) + 1
    losses = np.empty((folds, runs, len(_TEMPERATURES)))
    for run in range(runs):
        true = logits[run, labels, np.arange(images)]
        for index, temperature in enumerate(_TEMPERATURES.tolist()):
            # No largest logit is taken off: all lie between log(LOG_LOSS_EPS) and 0, far from under- and overflow.
            loss = np.log(np.exp(logits[run] / temperature).sum(axis=0)) - true / temperature
            losses[:, run, index] = np.bincount(fold, weights=loss, minlength=folds)
    return losses


def uncalibrated(losses: Floats) -> Floats:
    """(..., M) log losses as the runs are, of losses (..., M, G) by temperature."""
    unchanged: Floats = losses[..., _UNCHANGED]
    return unchanged


def temperatures(losses: Floats) -> Floats:
    """Temperature of each run that makes its log loss least (Guo et al. 2017, "On calibration of modern networks").

    Args:
        losses: (M, G) sums of `losses_by_temperature` over the folds to fit on.

    Returns:
        (M,) above 1 for a run that is too sure, to three significant digits; from 0.177 to 128, where only noise ends.
    """
    lowest = losses.argmin(axis=1)
    least = np.clip(lowest, 1, len(_TEMPERATURES) - 2)
    runs = np.arange(len(losses))
    # In 1 / sqrt(T) the loss is nearest to a parabola: its turn is within 3% of the true one.
    scale = _TEMPERATURES**-0.5
    here, left, right = scale[least], scale[least - 1] - scale[least], scale[least + 1] - scale[least]
    rise_left, rise_right = (losses[runs, least + step] - losses[runs, least] for step in (-1, 1))
    below = left * rise_right - right * rise_left
    turn = np.divide(left**2 * rise_right - right**2 * rise_left, 2 * below, out=np.zeros(len(runs)), where=below != 0)
    fitted = np.where(lowest == least, (here + turn) ** -2.0, _TEMPERATURES[lowest])
    return np.array([float(f"{temperature:.3g}") for temperature in fitted.tolist()])


def fit_logistic(
    logits: Floats, labels: Labels, *, offset: Floats, centre: float, pull: float, bias_pull: float
) -> tuple[Floats, Floats]:
    """Multinomial logistic regression with one coefficient a run, shared by the classes, and one bias a class.

    The probability of class c is proportional to exp(offset_c + sum over runs of coefficient times logit_c + bias_c).
    Newton's method on the penalised likelihood, which is concave, to convergence.

    Args:
        logits: (M, C, N); M may be 0.
        labels: (N,) class indices.
        offset: (C, N).
        centre: What coefficients are pulled to.
        pull: Of the square of a coefficient's distance from `centre`, halved.
        bias_pull: The same for a bias and 0.

    Returns:
        (M,) coefficients and (C,) biases, to three decimals.
    """
    runs, classes, images = len(logits), *offset.shape
    rows = np.arange(images)
    centres = np.concatenate([np.full(runs, centre), np.zeros(classes)])
    pulls = np.concatenate([np.full(runs, pull), np.full(classes, bias_pull)])
    flat = logits.reshape(runs, classes * images)

    def at(values: Floats) -> tuple[float, Floats]:
        total = offset + (values[:runs] @ flat).reshape(classes, images) + values[runs:, None]
        total -= total.max(axis=0)
        powers = np.exp(total)
        sums = powers.sum(axis=0)
        loss = float((np.log(sums) - total[labels, rows]).sum() + (pulls * (values - centres) ** 2).sum() / 2)
        return loss, powers / sums

    values = centres
    loss, probs = at(values)
    for _ in range(100):
        residual = probs.copy()
        residual[labels, rows] -= 1
        weighted = logits * probs
        means = weighted.sum(axis=1)
        gradient = np.concatenate([flat @ residual.ravel(), residual.sum(axis=1)]) + pulls * (values - centres)
        hessian = np.diag(pulls)
        hessian[:runs, :runs] += weighted.reshape(flat.shape) @ flat.T - means @ means.T
        hessian[:runs, runs:] += weighted.sum(axis=2) - means @ probs.T
        hessian[runs:, :runs] = hessian[:runs, runs:].T
        hessian[runs:, runs:] += np.diag(probs.sum(axis=1)) - probs @ probs.T
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-4 and at(values - size * step)[0] > loss + 1e-9 * abs(loss):
            size /= 2
        values = values - size * step
        loss, probs = at(values)
        if np.abs(step).max() < 1e-9:
            break
    fitted = np.round(values, 3)
    return fitted[:runs], fitted[runs:]


def share_factors(probs: Floats, labels: Labels) -> tuple[float, Floats]:
    """Exponent and class factors that calibrate probabilities, class by class on average.

    The factors undo what a balanced sampler or class weights did to a model's class probabilities. They need their
    exponent: averages of runs are less sure than their members should be, and factors alone then overdo (Alexandari,
    Kundaje and Shrikumar 2020, "Maximum likelihood with bias-corrected calibration is hard-to-beat at label shift
    adaptation", ICML).

    Args:
        probs: (C, N) of the rows to fit on.
        labels: (N,) class indices.

    Returns:
        To four significant digits, what makes the labels likeliest in `corrected`; the classes' mean probabilities then
        are their shares among the labels.
    """
    logits = np.log(np.maximum(probs, LOG_LOSS_EPS))
    offset = np.zeros(probs.shape)
    slope, bias = fit_logistic(logits[None], labels, offset=offset, centre=1.0, pull=_GAUGE, bias_pull=_GAUGE)
    # Less than nothing can be learnt from probabilities that are worse than chance.
    return max(float(slope[0]), 0.001), four_digits(np.exp(bias))


def shift_factors(probs: Floats, shares: Floats) -> Floats:
    """Factors of the classes for images whose class shares are others than those that the probabilities suppose.

    The EM algorithm of Saerens, Latinne and Decaestecker 2002, "Adjusting the outputs of a classifier to new a priori
    probabilities", Neural Computation 14:21, held by a Dirichlet prior: the shares of a few hundred images, seen by a
    weak classifier whose every fold leans its own way, otherwise wander to 0 for classes that are there.

    Args:
        probs: (C, N) of the images themselves; no label is used.
        shares: (C,) class shares that `probs` suppose.

    Returns:
        (C,) likeliest shares over `shares`, to four significant digits; 0 for a class that has no share.
    """
    present = shares > 0
    supposed, held = shares[present], probs[present]
    sums = held.sum(axis=0)
    # An image that is surely of a class that is not present tells nothing of the others.
    held = held[:, sums > 0] / sums[sums > 0]
    if not held.size:
        return present.astype(np.float64)
    factors = np.ones(len(held))
    for _ in range(2000):
        likeliest = factors * (held @ (1 / (factors @ held))) / held.shape[1]
        updated = (likeliest + _PRIOR_IMAGES * supposed) / (1 + _PRIOR_IMAGES) / supposed
        change = np.abs(updated - factors).max()
        factors = updated
        if change < 1e-6:
            break
    result = np.zeros(len(shares))
    result[present] = four_digits(factors)
    return result


def corrected(probs: Floats, exponent: float, factors: Floats) -> Floats:
    """(C, N) probabilities to a power times the factors (C,) of their classes, summing to 1 again, to nine decimals."""
    with np.errstate(divide="ignore"):
        biases = np.log(factors)
    return softmax(exponent * np.log(np.maximum(probs, LOG_LOSS_EPS)) + biases[:, None])


def four_digits(values: NDArray[Any]) -> Floats:
    """Values without the last bits, which differ between machines."""
    return np.array([float(f"{value:.4g}") for value in values.tolist()])
