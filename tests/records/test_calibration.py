"""Temperatures, logistic fits and class priors, each against a plain optimiser or a known truth.

Log-probabilities come as classes by images.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from foldwise.metrics import LOG_LOSS_EPS, METRICS
from foldwise.records.calibration import (
    corrected,
    fit_logistic,
    log_probs,
    losses_by_temperature,
    share_factors,
    shift_factors,
    softmax,
    temperatures,
    uncalibrated,
)

LOG_LOSS = METRICS["log_loss"]


def drawn(seed, *, runs=3, images=400, classes=4, skill=1.0, sharpness=1.0):
    """Labels, and probabilities of runs that are calibrated at a sharpness of 1: (M, N, C)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    logits = rng.normal(size=(runs, images, classes))
    logits[:, np.arange(images), labels] += skill
    probs = np.exp(skill * sharpness * logits)
    return labels, probs / probs.sum(axis=2, keepdims=True)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), sharpness=st.floats(0.4, 3.0))
def test_a_temperature_makes_log_loss_least(seed, sharpness):
    labels, probs = drawn(seed, sharpness=sharpness)
    logits = log_probs(probs)
    fitted = temperatures(losses_by_temperature(logits, labels, np.arange(400) % 5).sum(axis=0))
    for run, temperature in zip(logits, fitted, strict=True):
        found = scipy.optimize.minimize_scalar(
            lambda log, run=run: LOG_LOSS.score(labels, softmax(run / np.exp(log)).T), bounds=(-3, 5), method="bounded"
        )
        assert np.log(temperature) == pytest.approx(found.x, abs=0.02)
        assert temperature == float(f"{temperature:.3g}")


def test_losses_of_folds_are_those_of_their_rows():
    labels, probs = drawn(0, images=50)
    logits, fold = log_probs(probs), np.arange(50) % 3
    losses = uncalibrated(losses_by_temperature(logits, labels, fold))
    assert losses.shape == (3, 3)
    for part in range(3):
        rows = fold == part
        expected = [LOG_LOSS.score(labels[rows], run[rows]) * rows.sum() for run in probs]
        assert losses[part] == pytest.approx(expected, rel=1e-5)


def test_noise_gets_the_highest_temperature_and_a_certain_run_a_low_one():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 3000)
    noise = rng.dirichlet(np.full(4, 0.3), 3000)[None]
    sure = np.full((1, 3000, 4), 0.2)
    sure[0, np.arange(3000), labels] = 0.4
    fitted = temperatures(
        losses_by_temperature(log_probs(np.concatenate([noise, sure])), labels, np.zeros(3000, dtype=int))[0]
    )
    assert fitted[0] > 10
    assert fitted[1] < 0.3


def test_a_probability_of_zero_is_as_low_as_log_loss_sees():
    logits = log_probs(np.array([[0.0, 1.0]]))
    assert logits.tolist() == [[round(np.log(LOG_LOSS_EPS), 6)], [0.0]]


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), pull=st.sampled_from([0.1, 25.0, 1000.0]))
def test_a_logistic_fit_is_that_of_a_plain_optimiser(seed, pull):
    labels, probs = drawn(seed, images=200)
    logits, offset = log_probs(probs), np.zeros((4, 200))

    def loss(values):
        total = np.einsum("m,mcn->cn", values[:3], logits) + values[3:, None]
        total -= np.log(np.exp(total).sum(axis=0))
        distance = ((values[:3] - 1 / 3) ** 2).sum() * pull + (values[3:] ** 2).sum()
        return -total[labels, np.arange(200)].sum() + distance / 2

    start = np.concatenate([np.full(3, 1 / 3), np.zeros(4)])
    expected = scipy.optimize.minimize(loss, start, method="BFGS", options={"gtol": 1e-3}).x
    fitted, bias = fit_logistic(logits, labels, offset=offset, centre=1 / 3, pull=pull, bias_pull=1.0)
    assert np.concatenate([fitted, bias]) == pytest.approx(expected, abs=0.003)
    assert fitted.tolist() == np.round(fitted, 3).tolist()


def test_a_strong_pull_leaves_equal_coefficients():
    labels, probs = drawn(2)
    fitted, bias = fit_logistic(
        log_probs(probs), labels, offset=np.zeros((4, 400)), centre=1 / 3, pull=1e9, bias_pull=1e9
    )
    assert (fitted.tolist(), np.abs(bias).max()) == ([0.333] * 3, 0)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), lean=st.floats(0.2, 5.0), sharpness=st.floats(0.3, 2.0))
def test_corrected_classes_have_the_labels_shares(seed, lean, sharpness):
    labels, (probs,) = drawn(seed, runs=1, sharpness=sharpness)
    leaning = probs * np.array([lean, 1, 1, 1])
    leaning /= leaning.sum(axis=1, keepdims=True)
    exponent, factors = share_factors(leaning.T, labels)
    again = corrected(leaning.T, exponent, factors)
    assert again.mean(axis=1) == pytest.approx(np.bincount(labels, minlength=4) / 400, abs=2e-3)
    assert exponent == pytest.approx(1 / sharpness, rel=0.5)
    assert LOG_LOSS.score(labels, again.T) <= LOG_LOSS.score(labels, leaning) + 1e-6


def test_a_class_without_an_image_is_no_trouble():
    labels, (probs,) = drawn(3, runs=1)
    some = labels != 2
    exponent, factors = share_factors(probs[some].T, labels[some])
    again = corrected(probs[some].T, exponent, factors)
    assert again[2].max() < 0.01
    shares = np.bincount(labels[some], minlength=4) / some.sum()
    shifted = shift_factors(again, shares)
    assert shifted[2] == 0
    assert np.isfinite(corrected(again, 1.0, shifted)).all()


def test_shifted_shares_are_found_and_unshifted_ones_left():
    rng = np.random.default_rng(4)
    shares = np.full(4, 0.25)
    for truth in (shares, np.array([0.6, 0.2, 0.15, 0.05])):
        labels = rng.choice(4, 3_000, p=truth)
        logits = rng.normal(size=(4, 3_000))
        logits[labels, np.arange(3_000)] += 2
        factors = shift_factors(softmax(2 * logits), shares)
        assert factors * shares == pytest.approx(truth, abs=0.04)


def test_an_image_that_is_surely_of_an_absent_class_leaves_the_others_their_shares():
    probs = np.array([[0.0, 0.5, 0.5], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    shares = np.array([0.5, 0.5, 0.0])
    assert shift_factors(probs, shares).tolist() == [1, 1, 0]
    assert shift_factors(probs[:, :1], shares).tolist() == [1, 1, 0]
    assert shift_factors(probs[:, :0], shares).tolist() == [1, 1, 0]
