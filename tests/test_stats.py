"""The bootstrap against closed forms, and its coverage by simulation.

Groups must widen the error, pairing must narrow it.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from foldwise.metrics import METRICS
from foldwise.stats import (
    bias_corrected,
    bootstrap,
    bootstrap_interval,
    normal_quantile,
    paired_difference,
    spent,
    standard_error,
    wilson,
)

ACCURACY = METRICS["accuracy"]


def predictions(rng, labels, share_right, classes=4):
    """One-hot probabilities of which about `share_right` are right."""
    wrong = (labels + rng.integers(1, classes, len(labels))) % classes
    return np.eye(classes)[np.where(rng.random(len(labels)) < share_right, labels, wrong)]


def test_standard_error_of_accuracy_is_the_binomial_one_when_every_image_is_alone():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1_000)
    probs = predictions(rng, labels, 0.7)
    share = ACCURACY.score(labels, probs)
    expected = np.sqrt(share * (1 - share) / 1_000)
    assert standard_error(ACCURACY, labels, probs, np.arange(1_000)) == pytest.approx(expected, rel=0.06)


def test_standard_error_is_the_cluster_robust_one_for_unequal_groups():
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 150, 900)
    labels = rng.integers(0, 4, 900)
    right_in_group = rng.uniform(0.2, 1, 150)
    probs = predictions(rng, labels, right_in_group[groups])
    residual = (probs.argmax(axis=1) == labels) - ACCURACY.score(labels, probs)
    by_group = np.bincount(groups, weights=residual, minlength=150)
    expected = np.sqrt((by_group**2).sum()) / 900
    alone = standard_error(ACCURACY, labels, probs, np.arange(900))
    assert standard_error(ACCURACY, labels, probs, groups) == pytest.approx(expected, rel=0.06)
    assert expected > 1.2 * alone


def test_images_given_twice_in_a_group_tell_no_more_than_once():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 4, 300)
    probs = predictions(rng, labels, 0.6)
    twice, groups = np.repeat(np.arange(300), 2), np.repeat(np.arange(300), 2)
    once = standard_error(ACCURACY, labels, probs, np.arange(300))
    assert standard_error(ACCURACY, labels[twice], probs[twice], groups) == pytest.approx(once, rel=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_an_interval_around_its_score(name):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 400)
    probs = 0.2 * predictions(rng, labels, 0.6) + 0.2
    low, high = bootstrap_interval(METRICS[name], labels, probs, np.arange(400).astype(str))
    assert low < METRICS[name].score(labels, probs) < high
    assert high - low == pytest.approx(4 * standard_error(METRICS[name], labels, probs, np.arange(400)), rel=0.15)


def test_draws_follow_from_the_seed_alone():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 4, 100)
    probs = predictions(rng, labels, 0.6)
    groups = np.arange(100)
    one = bootstrap_interval(ACCURACY, labels, probs, groups, draws=300, seed=1)
    assert one == bootstrap_interval(ACCURACY, labels, probs, groups, draws=300, seed=1)
    errors = [standard_error(ACCURACY, labels, probs, groups, draws=300, seed=seed) for seed in (1, 2)]
    assert errors[0] != errors[1]


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 4, 250)
        low, high = bootstrap_interval(
            ACCURACY, labels, predictions(rng, labels, 0.7), np.arange(250), level=0.9, draws=300, seed=seed
        )
        held += low <= 0.7 <= high
    assert 0.84 <= held / 200 <= 0.95


def test_a_paired_difference_is_surer_than_two_scores():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 4, 1_000)
    second = predictions(rng, labels, 0.6)
    first = second.copy()
    mended = np.flatnonzero(second.argmax(axis=1) != labels)[:40]
    first[mended] = np.eye(4)[labels[mended]]
    groups = np.arange(1_000)
    difference = paired_difference(ACCURACY, labels, first, second, groups)
    assert difference.gain == pytest.approx(0.04)
    assert difference.standard_error == pytest.approx(np.sqrt(0.04 * 0.96 / 1_000), rel=0.06)
    assert difference.standard_error < standard_error(ACCURACY, labels, first, groups)
    assert 0 < difference.low < difference.gain < difference.high
    assert difference.level == 0.95


def test_a_gain_in_a_loss_is_a_lower_loss():
    labels = np.zeros(50, dtype=np.int64)
    good, bad = np.tile([0.9, 0.1], (50, 1)), np.tile([0.6, 0.4], (50, 1))
    difference = paired_difference(METRICS["log_loss"], labels, good, bad, np.arange(50))
    assert difference.gain == pytest.approx(np.log(0.9 / 0.6))
    assert difference.standard_error == pytest.approx(0, abs=1e-12)


def test_nothing_can_be_drawn_from_no_images():
    with pytest.raises(ValueError, match="cannot draw from no images"):
        standard_error(ACCURACY, np.zeros(0, dtype=np.int64), np.zeros((0, 2)), np.zeros(0))


@pytest.mark.parametrize(("hits", "trials"), [(0, 5), (5, 5), (3, 7), (500, 1000)])
def test_wilson_is_scipys(hits, trials):
    ends = binomtest(hits, trials).proportion_ci(method="wilson")
    assert wilson(np.array([hits]), np.array([trials]))[0] == pytest.approx([ends.low, ends.high], abs=1e-9)


def test_wilson_knows_nothing_from_no_trial():
    assert wilson(np.array([0]), np.array([0])).tolist() == [[0.0, 1.0]]


def test_a_draw_counts_each_group_as_often_as_it_was_drawn():
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 4, 30)
    groups = rng.integers(0, 12, 30)
    probs = predictions(rng, labels, 0.5)
    names = np.unique(groups)
    expected = []
    for drawn in np.random.default_rng(7).integers(0, len(names), (20, len(names))):
        rows = np.concatenate([np.flatnonzero(groups == names[index]) for index in drawn])
        expected.append(ACCURACY.score(labels[rows], probs[rows]))
    assert bootstrap(ACCURACY, labels, [probs], groups, draws=20, seed=7)[:, 0] == pytest.approx(expected)


def test_the_best_of_equals_is_flattered_by_what_theory_says_and_its_corrected_score_is_not():
    naive, corrected = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 4, 400)
        tried = [predictions(rng, labels, 0.6) for _ in range(40)]
        found = bias_corrected(ACCURACY, labels, tried, np.arange(400), draws=200, seed=seed)
        naive.append(found.naive)
        corrected.append(found.score)
        assert found.chosen_among == 40
    # The mean of the greatest of 40 standard normal variables is 2.16.
    assert np.mean(naive) - 0.6 == pytest.approx(2.16 * np.sqrt(0.6 * 0.4 / 400), rel=0.1)
    assert abs(np.mean(corrected) - 0.6) < 3 * np.std(corrected) / np.sqrt(40)


def test_choosing_loses_little_where_one_is_truly_the_best():
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 4, 1_000)
    tried = [predictions(rng, labels, share) for share in (0.5, 0.8, 0.55)]
    found = bias_corrected(ACCURACY, labels, tried, np.arange(1_000))
    assert found.naive == ACCURACY.score(labels, tried[1])
    assert found.score == pytest.approx(found.naive, abs=0.002)


@pytest.mark.parametrize("name", METRICS)
def test_one_configuration_needs_no_correction(name):
    rng = np.random.default_rng(9)
    labels = rng.integers(0, 4, 600)
    groups = rng.integers(0, 300, 600)
    probs = 0.2 * predictions(rng, labels, 0.6) + 0.2
    found = bias_corrected(METRICS[name], labels, [probs], groups, draws=2_000)
    error = standard_error(METRICS[name], labels, probs, groups)
    assert found.naive == METRICS[name].score(labels, probs)
    assert found.score == pytest.approx(found.naive, abs=0.15 * error)
    assert found.standard_error == pytest.approx(error, rel=0.08)
    assert found.low < found.score < found.high
    assert found.high - found.low == pytest.approx(4 * error, rel=0.12)


def test_the_least_loss_is_the_best():
    rng = np.random.default_rng(10)
    labels = rng.integers(0, 4, 300)
    sure = 0.2 * np.eye(4)[labels] + 0.2
    found = bias_corrected(METRICS["log_loss"], labels, [np.full((300, 4), 0.25), sure], np.arange(300), draws=100)
    assert found.naive == pytest.approx(-np.log(0.4))
    assert found.score == pytest.approx(-np.log(0.4))


def test_draws_that_leave_nothing_out_are_passed_over():
    labels = np.array([0, 0, 1, 1])
    found = bias_corrected(ACCURACY, labels, [np.eye(2)[[0, 0, 0, 0]]], np.array([0, 0, 1, 1]), draws=200)
    assert found.score == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("count", "groups"), [(0, 3), (2, 1)])
def test_a_choice_needs_something_to_choose_and_something_left_out(count, groups):
    labels = np.zeros(6, dtype=np.int64)
    with pytest.raises(ValueError, match=f"needs a configuration and two groups, but got .*={count}, groups={groups}"):
        bias_corrected(ACCURACY, labels, [np.eye(2)[labels]] * count, np.arange(6) % groups)


@pytest.mark.slow
def test_two_hundred_configurations_are_corrected_in_seconds():
    rng = np.random.default_rng(11)
    labels = rng.integers(0, 7, 2_700)
    tried = [predictions(rng, labels, 0.6, 7) for _ in range(200)]
    begun = perf_counter()
    bias_corrected(ACCURACY, labels, tried, np.arange(2_700))
    assert perf_counter() - begun < 20


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8).map(sorted), st.floats(0, 1))
def test_an_error_rate_is_spent_little_by_little_and_wholly(shares, error_rate):
    amounts = [spent(share, error_rate) for share in shares]
    assert amounts == sorted(amounts)
    assert spent(0, error_rate) == 0
    assert spent(1, error_rate) == pytest.approx(error_rate)


def test_a_normal_quantile_is_scipys():
    assert [normal_quantile(share) for share in (0.001, 0.05, 0.5, 0.975)] == pytest.approx(
        norm.ppf([0.001, 0.05, 0.5, 0.975])
    )
