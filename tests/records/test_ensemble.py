"""Blends: what is chosen, what is estimated, and that the estimate is honest.

The reference for Caruana's selection is the plain loop of the paper.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldwise.errors import RecordError
from foldwise.metrics import METRICS
from foldwise.records.ensemble import ROUNDS, _caruana, _CrossFit, blend
from foldwise.records.store import Run, list_runs

ACCURACY = METRICS["accuracy"]
CLASSES = ("a", "b", "c", "d")


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def make_runs(probs, labels, fold, *, prefix="run"):
    """A run a (N, C) array of probabilities, with two test ids that it predicts as its first two rows."""
    ids = np.array([f"i{row:05}" for row in range(len(labels))])
    runs = []
    for index, member in enumerate(probs):
        info = {
            "competition": "toy",
            "split": {"kind": "kfold"},
            "hashes": {"folds": "f" * 64, "oof": str(index)},
            "marks": [],
            "external": [],
        }
        name = f"{prefix}{index:02}"
        test = np.array(["t1", "t2"]), member[:2]
        runs.append(Run(name, Path("oof") / name, info, CLASSES, ids, fold, labels, member, *test))
    return runs, {name: name for name in ids.tolist()}


def weak_runs(seed, rows=500, models=40, noise=1.0, skill=0.25):
    """Models of about equal, small skill whose errors are their own: choosing among them is choosing luck."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, rows)
    fold = rng.permutation(rows) % 5
    probs = []
    for _ in range(models):
        logits = rng.normal(size=(rows, 4)) * noise
        logits[np.arange(rows), labels] += skill
        probs.append(softmax(logits))
    return probs, labels, fold


def by_name(result):
    return {member.run.name: member.weight for member in result.members}


# --- what is chosen


def plain_caruana(stack, labels, metric):
    """Caruana et al. 2004, figure 1, without any shortcut."""
    total, picks, best, kept = np.zeros(stack.shape[:2]), [], -np.inf, 0
    for size in range(1, ROUNDS + 1):
        joined = [total + stack[:, :, index] for index in range(stack.shape[2])]
        scores = [metric.sign * metric.score(labels, probs) for probs in joined] if metric.hard else None
        losses = [METRICS["log_loss"].score(labels, probs / size) for probs in joined]
        scores = scores or [-loss for loss in losses]
        pick = min(range(len(joined)), key=lambda index: (-scores[index], losses[index], index))
        picks.append(pick)
        total = joined[pick]
        if scores[pick] > best:
            best, kept = scores[pick], size
    return np.bincount(picks[:kept], minlength=stack.shape[2]) / kept


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), sharpness=st.sampled_from([0.3, 1.0, 4.0]))
def test_selection_is_that_of_the_plain_loop(name, seed, sharpness):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 30)
    logits = rng.normal(size=(30, 3, 6))
    logits[np.arange(30), labels] += rng.uniform(0, 2, 6)
    stack = np.exp(sharpness * logits)
    stack /= stack.sum(axis=1, keepdims=True)
    weights = _caruana(stack, labels, METRICS[name])
    assert weights == pytest.approx(plain_caruana(stack, labels, METRICS[name]))
    assert weights.sum() == pytest.approx(1)


def test_equal_candidates_are_told_apart_by_log_loss_then_by_order():
    labels = np.array([0, 1])
    unsure, sure = np.array([[0.6, 0.4], [0.4, 0.6]]), np.array([[0.9, 0.1], [0.1, 0.9]])
    assert _caruana(np.stack([unsure, sure, sure], axis=2), labels, ACCURACY).tolist() == [0, 1, 0]


def test_one_run_stands_for_itself():
    probs, labels, fold = weak_runs(0, models=1, skill=1.0)
    runs, groups = make_runs(probs, labels, fold)
    result = blend(runs, metric=ACCURACY, groups=groups)
    assert (result.method, by_name(result), result.fold_methods) == ("single", {"run00": 1.0}, {})
    assert result.score == result.naive == ACCURACY.score(labels, probs[0])
    assert result.interval[0] < result.score < result.interval[1]
    assert "the one run" in result.note


def test_equally_good_runs_are_weighed_equally():
    probs, labels, fold = weak_runs(1, models=5, skill=1.0)
    runs, groups = make_runs(probs, labels, fold)
    result = blend(runs, metric=ACCURACY, groups=groups)
    assert result.method == "mean"
    assert by_name(result) == pytest.approx({f"run{index:02}": 0.2 for index in range(5)})
    assert result.score > max(member.score for member in result.members)
    assert result.test_probs == pytest.approx(sum(member[:2] for member in probs) / 5)
    assert result.note.endswith("conditional on the trained models")


def test_bad_runs_are_left_out():
    good, labels, fold = weak_runs(2, models=2, skill=1.5)
    rng = np.random.default_rng(0)
    bad = [softmax(4 * rng.normal(size=(len(labels), 4))) for _ in range(4)]
    runs, groups = make_runs([*bad, *good], labels, fold)
    result = blend(runs, metric=ACCURACY, groups=groups)
    assert result.method == "caruana"
    assert set(result.fold_methods.values()) == {"caruana"}
    weights = by_name(result)
    assert weights["run04"] + weights["run05"] > 0.7
    assert list(weights.values()) == sorted(weights.values(), reverse=True)
    assert len(result.considered) == 6
    assert blend(runs, metric=ACCURACY, groups=groups, methods=("mean",)).score < result.score


def test_a_blend_that_does_not_beat_its_best_run_is_that_run_alone():
    good, labels, fold = weak_runs(6, models=1, skill=2.0)
    worse, _, _ = weak_runs(6, models=2, skill=2.0)
    noisy = softmax(np.log(worse[0]) + np.random.default_rng(1).normal(size=worse[0].shape) * 2)
    runs, groups = make_runs([good[0], noisy], labels, fold)
    result = blend(runs, metric=ACCURACY, groups=groups)
    assert (result.method, by_name(result)) == ("best", {"run00": 1.0})
    assert result.score == result.naive == ACCURACY.score(labels, good[0])


def test_a_loss_is_blended_downwards():
    good, labels, fold = weak_runs(3, models=2, skill=1.5)
    bad = [softmax(6 * np.random.default_rng(0).normal(size=(len(labels), 4)))]
    runs, groups = make_runs([*bad, *good], labels, fold)
    result = blend(runs, metric=METRICS["log_loss"], groups=groups)
    assert result.method == "caruana"
    assert by_name(result).keys() == {"run01", "run02"}
    assert result.score < min(member.score for member in result.members)


def test_the_order_of_runs_and_rows_is_of_no_consequence():
    probs, labels, fold = weak_runs(4, models=6, rows=300, skill=0.8)
    runs, groups = make_runs(probs, labels, fold)
    rng = np.random.default_rng(0)
    turn = rng.permutation(len(labels))
    shuffled = [
        replace(run, ids=run.ids[turn], fold=run.fold[turn], labels=run.labels[turn], probs=run.probs[turn])
        for run in runs[1:]
    ]
    one = blend(runs, metric=ACCURACY, groups=groups)
    other = blend([*shuffled[::-1], runs[0]], metric=ACCURACY, groups=groups)
    assert by_name(one) == by_name(other)
    assert one.test_probs.tobytes() == other.test_probs.tobytes()
    assert (one.score, one.interval, one.naive) == (other.score, other.interval, other.naive)


def test_two_folds_leave_nothing_to_choose_a_method_by():
    probs, labels, _ = weak_runs(5, models=3, rows=200)
    runs, groups = make_runs(probs, labels, np.arange(200) % 2)
    assert blend(runs, metric=ACCURACY, groups=groups).fold_methods == {0: "best", 1: "best"}


# --- what is estimated


def test_the_held_out_fold_has_no_say_in_its_own_weights():
    """A model that cheats on fold 0 alone gets the weight on fold 0 that it earned on the other folds."""
    probs, labels, fold = weak_runs(6, models=5, rows=250, skill=0.8)
    held = fold == 0
    probs[3][held] = np.eye(4)[labels[held]]
    fitting = _CrossFit(probs, labels, fold, np.arange(250).astype(str), ACCURACY, ("caruana",))
    _, fold_methods, _, held_out = fitting.result()
    weights = _caruana(np.stack(probs, axis=2)[~held], labels[~held], ACCURACY)
    assert fold_methods == dict.fromkeys(range(5), "caruana")
    expected = sum(weight * member[held] for weight, member in zip(weights, probs, strict=True))
    assert held_out[held] == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
def test_the_cross_fitted_score_is_honest_where_the_naive_one_flatters():
    """40 weak models of 400 labelled rows each; what the shipped weights score on 8,000 fresh rows is the truth."""
    naive, honest = [], []
    for seed in range(8):
        probs, labels, fold = weak_runs(seed, rows=8_400)
        seen = slice(0, 400)
        runs, groups = make_runs([member[seen] for member in probs], labels[seen], fold[seen])
        result = blend(runs, metric=ACCURACY, groups=groups, methods=("caruana",))
        weights = by_name(result)
        fresh = sum(weights.get(run.name, 0) * member[400:] for run, member in zip(runs, probs, strict=True))
        truth = ACCURACY.score(labels[400:], fresh)
        naive.append(result.naive - truth)
        honest.append(result.score - truth)
    error = np.std(honest, ddof=1) / np.sqrt(8)
    assert abs(np.mean(honest)) < 2.5 * error
    assert np.mean(naive) > 0.05
    assert np.mean(naive) > 4 * abs(np.mean(honest))


def test_near_duplicates_widen_the_interval():
    probs, labels, fold = weak_runs(7, models=1, rows=300)
    runs, groups = make_runs(probs, labels, fold)
    alone = blend(runs, metric=ACCURACY, groups=groups).standard_error
    order = np.argsort(probs[0].argmax(axis=1) == labels)
    together = {runs[0].ids[row]: str(place // 10) for place, row in enumerate(order)}
    assert blend(runs, metric=ACCURACY, groups=together).standard_error > 2 * alone


def test_expected_right_answers_count_both_sources_of_chance():
    probs, labels, fold = weak_runs(8, models=1, rows=1_000, skill=1.0)
    runs, groups = make_runs(probs, labels, fold)
    result = replace(blend(runs, metric=ACCURACY, groups=groups), accuracy=0.64, accuracy_standard_error=0.01)
    assert result.expected_right(300) == (192, 17)
    assert replace(result, accuracy_standard_error=0.05).expected_right(300) == (192, 34)


def test_marks_and_external_data_follow_into_the_blend():
    probs, labels, fold = weak_runs(9, models=3, rows=200)
    runs, groups = make_runs(probs, labels, fold)
    runs[0].info["marks"] = ["optimistic"]
    runs[1].info["marks"] = ["optimistic", "external"]
    runs[2].info["external"] = [{"source": "fer2013"}]
    result = blend(runs, metric=ACCURACY, groups=groups, methods=("mean",))
    assert sorted(result.marks) == ["external", "optimistic"]
    assert result.external == [{"source": "fer2013"}]


# --- what is refused


def test_no_runs_are_refused():
    with pytest.raises(RecordError) as error:
        blend([], metric=ACCURACY, groups={})
    assert "there is no complete run to blend" in str(error.value)


def test_runs_that_do_not_fit_together_are_all_named():
    probs, labels, fold = weak_runs(10, models=7, rows=50)
    runs, groups = make_runs(probs, labels, fold)
    runs[1].info["competition"] = "faces"
    runs[2].info["hashes"]["folds"] = "0" * 64
    runs[3] = replace(runs[3], classes=("a", "b", "d", "c"))
    runs[4] = replace(runs[4], ids=np.array([f"x{row}" for row in range(50)]))
    runs[5].info["split"]["kind"] = "holdout"
    runs[6] = replace(runs[6], labels=(labels + (np.arange(50) < 2)) % 4)
    with pytest.raises(RecordError) as error:
        blend(runs, metric=ACCURACY, groups=groups)
    fix = "  fix: leave it out, or run it again as `run00` was"
    assert str(error.value).splitlines() == [
        "oof/run04: 50 of its ids have no group, such as x0",
        fix,
        "oof/run05: only k-fold runs blend, but its split is `holdout`",
        fix,
        "oof/run01: is of competition `faces`, but `run00` of `toy`",
        fix,
        "oof/run02: was made on other folds than `run00` (00000000, not ffffffff)",
        fix,
        "oof/run03: has the classes a, b, d, c, but `run00` has a, b, c, d",
        fix,
        "oof/run04: holds other ids (50 validated, 2 test) than `run00` (50, 2)",
        fix,
        "oof/run06: has other labels or folds than `run00` for 2 ids, such as i00000",
        fix,
        "7 errors; nothing was written.",
    ]


def test_kept_runs_blend(project):
    for index in range(3):
        project.keep(f"run{index}", salt=index)
    runs, skipped = list_runs(project.root, "toy")
    result = blend(runs, metric=ACCURACY, groups=project.groups)
    assert skipped == []
    assert result.folds_sha256 == project.folds.sha256
    assert [member.score for member in result.members] == [member.run.info["score"] for member in result.members]
    assert [member.standard_error for member in result.members] == pytest.approx(
        [member.run.info["standard_error"] for member in result.members]
    )
