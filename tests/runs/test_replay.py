"""Recorded studies whose truth is known: what pruning saves, and when it loses the best trial.

The rules to compare with must be Optuna's own, and the table of verdicts the judge's own.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import optuna
import pytest

from foldwise.metrics import METRICS
from foldwise.runs.judge import judge
from foldwise.runs.replay import _judged, _median, _Recorded, _wilcoxon, compare_rules, render, replay

ACCURACY = METRICS["accuracy"]
CLASSES = 4


def recorded(shares, *, images=150, folds=5, seed=0):
    """Complete trials that are right with the given probabilities, on images that are easy or hard for all of them."""
    rng = np.random.default_rng(seed)
    count = images * folds
    labels = rng.integers(0, CLASSES, count)
    luck = rng.random((count, 1))
    right = 0.5 * luck + 0.5 * rng.random((count, len(shares))) < np.array(shares)
    predictions = [np.eye(CLASSES)[np.where(column, labels, (labels + 1) % CLASSES)] for column in right.T]
    groups = np.array([f"g{index // 2}" for index in range(count)])
    return labels, groups, np.arange(count) % folds, predictions


def test_hopeless_trials_are_stopped_at_the_first_look_and_the_best_one_never():
    data = recorded([0.8, *[0.1] * 9])
    result = replay(ACCURACY, *data, error_rate=0.05, seed_sd=0.01, orders=400)
    assert (result.trials, result.folds, result.orders) == (10, 5, 400)
    # After the best one, all hopeless ones train one fold of five; before it, they are complete: half on average.
    assert result.saved == pytest.approx(0.5 * 9 * 4 / 50, abs=4 * result.saved_error)
    assert 0 < result.saved_error < 0.02
    assert (result.winner_pruned, result.winner_low, result.regret) == (0, 0, 0)
    assert 0 < result.winner_high < 0.02


def test_equal_trials_are_left_alone_by_a_strict_judge():
    data = recorded([0.6] * 8)
    result = replay(ACCURACY, *data, error_rate=0.001, seed_sd=0.05, orders=100)
    assert (result.saved, result.winner_pruned) == (0, 0)


def test_a_best_trial_with_a_bad_first_fold_is_lost_and_the_loss_is_counted():
    labels, groups, fold, predictions = recorded([0.4, 0.9], folds=2)
    unlucky = fold == 0
    predictions[1][unlucky] = np.eye(CLASSES)[(labels[unlucky] + 1) % CLASSES]
    scores = [ACCURACY.score(labels, probs) for probs in predictions]
    assert scores[1] > scores[0]
    result = replay(ACCURACY, labels, groups, fold, predictions, error_rate=0.05, seed_sd=0.0, orders=300)
    # It is lost whenever it comes second.
    assert result.winner_low <= 0.5 <= result.winner_high
    assert result.regret == pytest.approx(result.winner_pruned * (scores[1] - scores[0]))
    assert result.saved == pytest.approx(result.winner_pruned / 4)


def test_a_loss_is_played_by_its_sign():
    labels, groups, fold, predictions = recorded([0.8, 0.2, 0.2])
    soft = [0.6 * probs + 0.1 for probs in predictions]
    result = replay(METRICS["log_loss"], labels, groups, fold, soft, error_rate=0.05, seed_sd=0.0, orders=50)
    assert result.saved > 0.1
    assert (result.winner_pruned, result.regret) == (0, 0)


def test_a_greater_error_rate_saves_more_on_the_whole():
    data = recorded(np.linspace(0.5, 0.6, 12))
    results = compare_rules(ACCURACY, *data, seed_sd=0.01, orders=200)
    assert [one.rule for one in results] == ["judge 0.01", "judge 0.05", "judge 0.1", "judge 0.2", "median", "wilcoxon"]
    assert all(one.saved <= other.saved for one, other in pairwise(results[:4]))
    assert results[0].saved < results[3].saved
    assert results[1] == replay(ACCURACY, *data, error_rate=0.05, seed_sd=0.01, orders=200)


def test_the_orders_follow_from_the_seed_alone():
    data = recorded(np.linspace(0.5, 0.6, 6))
    one, same, other = (
        replay(ACCURACY, *data, error_rate=0.2, seed_sd=0.0, orders=50, seed=seed) for seed in (1, 1, 2)
    )
    assert one == same
    assert one.saved != other.saved


@pytest.mark.slow
def test_the_judge_seldom_loses_the_best_trial_where_the_median_often_does():
    """Trainings with luck a fold, parameters nearly as good as each other: 1% of accuracy between them."""
    lost = {"judge 0.05": 0.0, "median": 0.0}
    for seed in range(6):
        rng = np.random.default_rng(seed)
        count, trials = 1_500, 20
        fold = np.arange(count) % 5
        easy, skill = rng.beta(1, 0.6, (count, 1)), rng.normal(0, 0.01, trials)
        luck = rng.normal(0, 0.01, (5, trials))[fold]
        right = rng.random((count, trials)) < easy + skill + rng.normal(0, 0.1, (count, trials)) + luck
        predictions = [np.eye(2)[column.astype(int)] for column in right.T]
        labels = np.ones(count, dtype=np.int64)
        results = compare_rules(
            ACCURACY, labels, np.arange(count), fold, predictions, seed_sd=0.01, error_rates=(0.05,), orders=100
        )
        for one in results[:2]:
            lost[one.rule] += one.winner_pruned / 6
    assert lost["judge 0.05"] <= 0.05
    assert lost["median"] > 0.15


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_every_verdict_is_the_judges_own(metric):
    labels, groups, fold, predictions = recorded([0.5, 0.55, 0.65, 0.7], images=60, folds=4)
    rule = _judged(_Recorded(METRICS[metric], labels, groups, fold, predictions), 0.1, 0.01)
    found = []
    for look in (1, 2, 3):
        rows = fold < look
        for trial in range(4):
            for best in range(4):
                verdict = judge(
                    METRICS[metric],
                    labels[rows],
                    predictions[trial][rows],
                    predictions[best][rows],
                    groups[rows],
                    look=look,
                    looks=4,
                    error_rate=0.1,
                    seed_sd=0.01,
                )
                assert rule(trial, look, [], best) == verdict.prune
                found.append(verdict.prune)
    assert 0 < sum(found) < len(found)


def optunas(pruner, steps, trial, complete):
    """What Optuna's own pruner says of a trial after some steps."""
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for other in complete:
        values = dict(enumerate(steps[other].tolist()))
        study.add_trial(optuna.create_trial(value=float(np.mean(steps[other])), intermediate_values=values))
    running = study.ask()
    for step, value in enumerate(trial):
        running.report(float(value), step)
    return running.should_prune()


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("folds", [3, 5])
def test_the_rules_to_compare_with_are_optunas(folds):
    data = recorded(np.linspace(0.5, 0.65, 9), images=97, folds=folds)
    known = _Recorded(ACCURACY, *data)
    median, wilcoxon = _median(known), _wilcoxon(known)
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        said = []
        for trial in range(9):
            others = [other for other in range(9) if other != trial]
            for look in range(1, folds):
                so_far, by_fold = known.so_far[trial, :look], known.by_fold[trial, :look]
                for count in (4, 5, 8):
                    complete = others[:count]
                    expected = optunas(optuna.pruners.MedianPruner(), known.so_far, so_far, complete)
                    assert median(trial, look, complete, -1) == expected
                    said.append(("median", expected))
                for best in others:
                    expected = optunas(optuna.pruners.WilcoxonPruner(), known.by_fold, by_fold, [best])
                    assert wilcoxon(trial, look, [best], best) == expected
                    said.append(("wilcoxon", expected))
    finally:
        optuna.logging.set_verbosity(level)
    assert {("median", True), ("median", False), ("wilcoxon", False)} <= set(said)
    # Of two folds the least p is 1/4, of three 1/8: Optuna's level of 0.1 is first reached after the fourth.
    assert (("wilcoxon", True) in said) == (folds > 4)


def test_the_table_reads():
    data = recorded([0.8, *[0.1] * 9])
    lines = render(compare_rules(ACCURACY, *data, seed_sd=0.01, error_rates=(0.05,), orders=50))
    assert lines[0].split() == ["rule", "trainings", "saved", "best", "trial", "pruned", "regret"]
    assert lines[1].split()[:2] == ["judge", "0.05"]
    assert lines[1].endswith("0.0% (0.0% to 7.1%)   0.00000")
    assert [line.split()[0] for line in lines[2:]] == ["median", "wilcoxon"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(("trials", "folds"), [(1, 3), (3, 1)])
def test_a_replay_needs_something_to_compare(trials, folds):
    data = recorded([0.5] * trials, folds=folds)
    with pytest.raises(ValueError, match=rf"two complete trials of two folds, but got \({trials=}, {folds=}\)"):
        replay(ACCURACY, *data, error_rate=0.05, seed_sd=0.0)
