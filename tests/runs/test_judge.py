"""The judge keeps its error rate when nothing is different, and finds what is worse.

The looks are simulated with what seeds do to a fold; without the margin for them the error rate is broken.
"""

from __future__ import annotations

from math import inf, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from foldwise.metrics import METRICS
from foldwise.runs.judge import decide, judge, seed_spread
from foldwise.stats import paired_difference, spent

ACCURACY = METRICS["accuracy"]
FOLDS, IMAGES = 5, 500


def one_hot(labels, right, classes=4):
    return np.eye(classes)[np.where(right, labels, (labels + 1) % classes)]


def pruned_at(rng, *, behind, fold_sd, seed_sd, error_rate):
    """The look at which a trial is pruned, or 0; its parameters are `behind` in accuracy."""
    easy = rng.beta(2, 1, (FOLDS, IMAGES))
    trainings = []
    for loss in (behind, 0.0):
        luck = rng.normal(0, fold_sd, (FOLDS, 1))
        trainings.append(rng.random((FOLDS, IMAGES)) < np.clip(easy - loss + luck, 0, 1))
    differences = trainings[0].astype(float) - trainings[1]
    for look in range(1, FOLDS):
        seen = differences[:look].ravel()
        error = seen.std() / sqrt(len(seen))
        verdict = decide(seen.mean(), error, look=look, looks=FOLDS, error_rate=error_rate, seed_sd=seed_sd)
        if verdict.prune:
            return look
    return 0


def rate_of_pruning(*, behind=0.0, fold_sd=0.02, seed_sd=0.02, error_rate=0.05, simulations=2_000):
    rng = np.random.default_rng(0)
    looks = [
        pruned_at(rng, behind=behind, fold_sd=fold_sd, seed_sd=seed_sd, error_rate=error_rate)
        for _ in range(simulations)
    ]
    return np.count_nonzero(looks) / simulations


@pytest.mark.parametrize("error_rate", [0.05, 0.2])
def test_what_is_as_good_is_pruned_no_more_often_than_the_error_rate(error_rate):
    rate = rate_of_pruning(error_rate=error_rate)
    assert 0 < rate < error_rate + 3 * sqrt(error_rate * (1 - error_rate) / 2_000)


def test_without_the_margin_for_seeds_luck_is_taken_for_skill():
    assert rate_of_pruning(seed_sd=0.0) > 0.1


def test_what_is_far_worse_is_pruned_nearly_always():
    assert rate_of_pruning(behind=0.15, simulations=200) > 0.95


def test_a_judgement_is_the_paired_difference_with_the_margin_for_seeds():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 300)
    trial, best = one_hot(labels, rng.random(300) < 0.5), one_hot(labels, rng.random(300) < 0.7)
    groups = rng.integers(0, 200, 300)
    verdict = judge(ACCURACY, labels, trial, best, groups, look=2, looks=5, error_rate=0.05, seed_sd=0.01)
    difference = paired_difference(ACCURACY, labels, trial, best, groups)
    assert verdict.gain == difference.gain < 0
    assert verdict.standard_error == pytest.approx(sqrt(difference.standard_error**2 + 0.01**2))
    assert verdict.level == pytest.approx(spent(0.5, 0.05) - spent(0.25, 0.05))
    assert verdict.limit == pytest.approx(norm.ppf(verdict.level) * verdict.standard_error)
    assert verdict.prune


def test_the_looks_together_spend_the_error_rate():
    levels = [decide(0, 1, look=look, looks=5, error_rate=0.05, seed_sd=0).level for look in range(1, 6)]
    assert sum(levels) == pytest.approx(0.05)
    assert levels[-1] == 0


def test_a_loss_is_judged_by_its_sign():
    labels = np.zeros(60, dtype=np.int64)
    rng = np.random.default_rng(2)
    true = rng.uniform(0.5, 0.6, 60)
    worse, better = np.stack([true, 1 - true], axis=1), np.stack([true + 0.3, 0.7 - true], axis=1)
    arguments = {"look": 1, "looks": 3, "error_rate": 0.05, "seed_sd": 0.0}
    assert judge(METRICS["log_loss"], labels, worse, better, np.arange(60), **arguments).prune
    assert not judge(METRICS["log_loss"], labels, better, worse, np.arange(60), **arguments).prune


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    name=st.sampled_from(sorted(METRICS)),
    look=st.integers(1, 4),
    error_rate=st.floats(0, 1),
    seed_sd=st.floats(0, 0.1),
)
def test_an_identical_trial_is_never_pruned(seed, name, look, error_rate, seed_sd):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 20)
    probs = rng.dirichlet(np.ones(3), 20)
    verdict = judge(
        METRICS[name],
        labels,
        probs,
        probs.copy(),
        np.arange(20),
        look=look,
        looks=5,
        error_rate=error_rate,
        seed_sd=seed_sd,
    )
    assert not verdict.prune
    assert verdict.gain == 0


figures = st.floats(-1, 1)
errors = st.floats(0, 1)


@given(figures, errors, errors, st.integers(1, 9), st.integers(1, 10), errors, errors)
def test_a_greater_error_rate_prunes_whatever_a_lesser_one_does(gain, error, seed_sd, look, looks, one, other):
    look = min(look, looks)
    least, greatest = (
        decide(gain, error, look=look, looks=looks, error_rate=rate, seed_sd=seed_sd) for rate in sorted((one, other))
    )
    assert least.limit <= greatest.limit <= 0
    assert greatest.prune or not least.prune


@given(st.floats(0, 1), errors, errors, st.integers(1, 9), errors)
def test_a_trial_that_is_ahead_goes_on(gain, error, seed_sd, look, error_rate):
    assert not decide(gain, error, look=look, looks=10, error_rate=error_rate, seed_sd=seed_sd).prune


@pytest.mark.parametrize("looks", [1, 4])
def test_after_the_last_fold_there_is_nothing_to_save(looks):
    verdict = decide(-1.0, 0.0, look=looks, looks=looks, error_rate=0.5, seed_sd=0)
    assert (verdict.prune, verdict.limit, verdict.level) == (False, -inf, 0.0)


@pytest.mark.parametrize("look", [0, 4])
def test_a_look_is_one_of_the_folds(look):
    with pytest.raises(ValueError, match=rf"1 <= look <= looks.*got \(look={look}, looks=3\)"):
        decide(0.0, 0.1, look=look, looks=3, error_rate=0.05, seed_sd=0)


def test_the_spread_between_seeds_is_recovered_from_pairs():
    rng = np.random.default_rng(3)
    fold = rng.normal(0.6, 0.1, (4_000, 1))
    assert seed_spread((fold + rng.normal(0, 0.02, (4_000, 2))).tolist()) == pytest.approx(0.02, rel=0.05)
    assert seed_spread([(0.5, 0.52)]) == pytest.approx(0.02 / sqrt(2))


def test_images_that_flip_are_no_part_of_the_spread_that_is_left():
    rng = np.random.default_rng(4)
    luck = rng.normal(0, 0.02, (2, 2_000, 1))
    scores, errors = [], []
    for first, second in zip(*(rng.random((2, 2_000, 200)) < 0.6 + luck), strict=True):
        scores.append((first.mean(), second.mean()))
        errors.append((first.astype(float) - second).std() / sqrt(200))
    assert seed_spread(scores) == pytest.approx(sqrt(0.02**2 + 0.24 / 200), rel=0.05)
    assert seed_spread(scores, errors) == pytest.approx(0.02, rel=0.1)


def test_a_spread_that_the_images_explain_is_none():
    assert seed_spread([(0.5, 0.52), (0.6, 0.6)], [0.02, 0.02]) == 0


@pytest.mark.parametrize(("pairs", "count"), [([], 0), ([(0.5, 0.6)], 2)])
def test_a_spread_needs_its_pairs(pairs, count):
    what = rf"needs a pair of scores, .* but got \(pairs={len(pairs)}, image_errors={count}\)"
    with pytest.raises(ValueError, match=what):
        seed_spread(pairs, [0.1] * count)
