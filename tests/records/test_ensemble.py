"""Blends: what is chosen, what is estimated, and that the estimate is honest.

The reference for Caruana's selection is the plain loop of the paper; simulations know the truth.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blend_simulation import FEW, WEAK, World, bias, covered, simulate
from hypothesis import given, settings
from hypothesis import strategies as st

from foldwise.errors import RecordError
from foldwise.metrics import METRICS
from foldwise.records.ensemble import BAG_LEAST, METHODS, ROUNDS, _caruana, blend
from foldwise.records.store import Run, list_runs
from foldwise.stats import bootstrap_interval, standard_error

ACCURACY = METRICS["accuracy"]
CLASSES = ("a", "b", "c", "d")


def probs_of(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def make_runs(probs, labels, fold, *, prefix="run"):
    """A run a (N, C) array of probabilities, with two test ids that it predicts as its first two rows."""
    ids = np.array([f"i{row:05}" for row in range(len(labels))])
    runs = []
    for index, member in enumerate(probs):
        info = {
            "competition": "toy",
            "split": {"kind": "kfold"},
            "hashes": {"folds": "f" * 64, "inputs": "1" * 64, "oof": str(index)},
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
        probs.append(probs_of(logits))
    return probs, labels, fold


def by_name(result):
    return {member.run.name: member.weight for member in result.members}


# --- what is chosen


def plain_caruana(stack, labels, metric):
    """Caruana et al. 2004, figure 1, without any shortcut."""
    total, picks, best, kept = np.zeros(stack.shape[:2]), [], -np.inf, 0
    for size in range(1, ROUNDS + 1):
        joined = [total + stack[:, :, index] for index in range(stack.shape[2])]
        scores = [metric.sign * metric.score(labels, probs.T) for probs in joined] if metric.hard else None
        losses = [METRICS["log_loss"].score(labels, probs.T / size) for probs in joined]
        scores = scores or [-loss for loss in losses]
        pick = min(range(len(joined)), key=lambda index: (-scores[index], losses[index], index))
        picks.append(pick)
        total = joined[pick]
        if scores[pick] > best:
            best, kept = scores[pick], size
    return np.bincount(picks[:kept], minlength=stack.shape[2]) / kept


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), sharpness=st.sampled_from([0.3, 1.0, 4.0]))
def test_selection_is_that_of_the_plain_loop(name, seed, sharpness):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 30)
    logits = rng.normal(size=(3, 30, 6))
    logits[labels, np.arange(30)] += rng.uniform(0, 2, 6)
    stack = np.exp(sharpness * logits)
    stack /= stack.sum(axis=0)
    weights, picks = _caruana(stack, labels, METRICS[name])
    assert len(picks) == ROUNDS
    assert weights == pytest.approx(plain_caruana(stack, labels, METRICS[name]))
    assert weights.sum() == pytest.approx(1)


def test_equal_candidates_are_told_apart_by_log_loss_then_by_order():
    labels = np.array([0, 1])
    unsure, sure = np.array([[0.6, 0.4], [0.4, 0.6]]), np.array([[0.9, 0.1], [0.1, 0.9]])
    weights, _ = _caruana(np.stack([unsure.T, sure.T, sure.T], axis=2), labels, ACCURACY)
    assert weights.tolist() == [0, 1, 0]


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
    result = blend(runs, metric=ACCURACY, groups=groups, methods=("best", "mean", "caruana"))
    assert result.method == "mean"
    assert by_name(result) == pytest.approx({f"run{index:02}": 0.2 for index in range(5)})
    assert result.score > max(member.score for member in result.members)
    calibrated = [
        probs_of(np.log(run.probs[:2]) / member.temperature)
        for run, member in zip(runs, sorted(result.members, key=lambda member: member.run.name), strict=True)
    ]
    assert result.test_probs == pytest.approx(sum(calibrated) / 5, abs=1e-6)
    assert result.note.endswith("conditional on the trained models")


def test_bad_runs_are_left_out():
    good, labels, fold = weak_runs(2, models=2, skill=1.5)
    rng = np.random.default_rng(0)
    bad = [probs_of(4 * rng.normal(size=(len(labels), 4))) for _ in range(4)]
    runs, groups = make_runs([*bad, *good], labels, fold)
    result = blend(runs, metric=ACCURACY, groups=groups, methods=("caruana",))
    assert set(result.fold_methods.values()) == {"caruana"}
    weights = by_name(result)
    for member in result.members:
        assert (member.gain > 3 * member.gain_standard_error) == (member.run.name in ("run04", "run05"))
    assert list(weights.values()) == sorted(weights.values(), reverse=True)
    assert len(result.considered) == 6
    # Calibrated noise is flat: no average suffers from it.
    mean = blend(runs, metric=ACCURACY, groups=groups, methods=("mean",))
    alone = blend(runs[4:], metric=ACCURACY, groups=groups).score
    assert (mean.score, result.score) == pytest.approx((alone, alone), abs=0.02)
    assert min(member.temperature for member in mean.members if member.run in runs[:4]) > 20


def test_a_blend_that_does_not_beat_its_best_run_is_that_run_alone():
    good, labels, fold = weak_runs(6, models=1, skill=2.0)
    worse, _, _ = weak_runs(6, models=2, skill=2.0)
    noisy = probs_of(np.log(worse[0]) + np.random.default_rng(1).normal(size=worse[0].shape) * 2)
    runs, groups = make_runs([good[0], noisy], labels, fold)
    result = blend(runs, metric=ACCURACY, groups=groups)
    assert (result.method, by_name(result)) == ("best", {"run00": 1.0})
    assert result.choice == "no blend beats the best run by more than its standard error, so it is submitted alone"
    assert result.score == result.naive == ACCURACY.score(labels, good[0])


def test_a_loss_is_blended_downwards():
    good, labels, fold = weak_runs(3, models=2, skill=1.5)
    bad = [probs_of(6 * np.random.default_rng(0).normal(size=(len(labels), 4)))]
    runs, groups = make_runs([*bad, *good], labels, fold)
    result = blend(runs, metric=METRICS["log_loss"], groups=groups)
    assert result.method == "stack"
    assert by_name(result).get("run00", 0) < 0.02
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
    result = blend(runs, metric=ACCURACY, groups=groups)
    assert result.fold_methods == {0: "best", 1: "best"}
    assert result.method == "best"  # what is submitted is what was estimated
    assert result.choice == "two folds leave none to choose a method by, so the simplest is taken"


def test_figures_stay_where_they_can_be():
    labels, fold = np.arange(80) % 4, np.arange(80) % 5
    perfect = np.eye(4)[labels]
    nearly = perfect.copy()
    nearly[0] = nearly[0][::-1]
    runs, groups = make_runs([nearly, perfect * 0.9 + 0.025], labels, fold)
    result = blend(runs, metric=ACCURACY, groups=groups, methods=("mean",))
    assert 0 <= result.interval[0] <= result.interval[1] <= 1
    assert not any(str(member.gain).startswith("-0.0") and member.gain == 0 for member in result.members)
    uniform, groups = make_runs([np.full((80, 4), 0.25)] * 2, labels, fold)
    stacked = blend(uniform, metric=ACCURACY, groups=groups, methods=("stack",))
    assert sum(member.weight for member in stacked.members) == pytest.approx(1)


def test_a_member_that_was_chosen_on_these_folds_flatters_and_that_is_said():
    probs, labels, fold = weak_runs(7, models=2, rows=200)
    runs, groups = make_runs(probs, labels, fold)
    assert "flattered" not in blend(runs, metric=ACCURACY, groups=groups, methods=("mean",)).note
    runs[0].info["marks"].append("tuned")
    note = blend(runs, metric=ACCURACY, groups=groups, methods=("mean",)).note
    assert note.endswith("; flattered as far as its members are tuned; conditional on the trained models")


# --- what is estimated


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prior", ["none", "train"])
def test_the_held_out_fold_has_no_say_in_its_own_predictions(method, prior):
    """The estimate from the parts: for each fold a blend is fitted to the others, and predicts the fold as new images.

    A model that cheats on fold 0 alone gets the weight on fold 0 that it earned on the other folds.
    """
    probs, labels, fold = weak_runs(6, models=5, rows=250, skill=0.8)
    probs[3][fold == 0] = np.eye(4)[labels[fold == 0]] * 0.97 + 0.0075
    runs, groups = make_runs(probs, labels, fold)
    whole = blend(runs, metric=ACCURACY, groups=groups, methods=(method,), prior=prior)
    right = 0
    for held in range(5):
        rows, others = fold == held, fold != held
        parts = [
            replace(
                run,
                ids=run.ids[others],
                fold=run.fold[others],
                labels=run.labels[others],
                probs=run.probs[others],
                test_ids=run.ids[rows],
                test_probs=run.probs[rows],
            )
            for run in runs
        ]
        part = blend(parts, metric=ACCURACY, groups=groups, methods=(method,), prior=prior)
        right += (part.test_probs.argmax(axis=1) == labels[rows]).sum()
    assert whole.score == right / 250
    assert whole.fold_methods == dict.fromkeys(range(5), method)


@pytest.mark.slow
def test_the_cross_fitted_score_is_honest_where_the_naive_one_flatters():
    """15 weak models of 400 rows; what the shipped blend scores on fresh images is the truth."""
    rows = simulate(replace(WEAK, models=15), range(8), methods=("caruana",), fresh=5_000)
    estimates, naives, _, _, truths, _ = zip(*rows, strict=True)
    honest, error = bias(estimates, truths)
    naive, naive_error = bias(naives, truths)
    assert abs(honest) < 2.5 * error
    assert naive > 4 * naive_error
    assert naive > 3 * abs(honest)


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    share, low, high = covered(simulate(FEW, range(20), fresh=5_000))
    assert low <= 0.95 <= high
    assert share >= 0.8


def test_fits_that_hang_on_a_fold_widen_the_interval():
    """The second part of the error: 0 for a run alone, and more where equal runs are chosen among."""
    probs, labels, fold = weak_runs(14, models=12, rows=300)
    runs, groups = make_runs(probs, labels, fold)
    group = np.arange(300)
    alone = blend(runs[:1], metric=ACCURACY, groups=groups)
    assert alone.standard_error == pytest.approx(standard_error(ACCURACY, labels, probs[0], group), rel=0.05)
    low, high = bootstrap_interval(ACCURACY, labels, probs[0], group)
    assert alone.interval == pytest.approx((low, high), abs=0.01)
    mean, best = (blend(runs, metric=ACCURACY, groups=groups, methods=(method,)) for method in ("mean", "best"))
    assert best.standard_error > 1.15 * alone.standard_error
    assert best.standard_error > 1.1 * mean.standard_error
    assert best.interval[1] - best.interval[0] == pytest.approx(2 * 1.96 * best.standard_error, rel=0.1)


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


# --- calibration, stacking, priors


SHARP = World(models=4, rows=600, skills=(0.8, 1.0), sharpness=(1.0, 1.0))


def sharpened(run, power):
    """The same run, too sure of itself: its logits times `power`."""
    probs, test_probs = (probs_of(power * np.log(part)) for part in (run.probs, run.test_probs))
    return replace(run, probs=probs, test_probs=test_probs)


def test_a_run_that_is_too_sure_does_not_outvote_the_others():
    runs, groups, fresh = SHARP.draw(1, fresh=4_000)
    loud = [sharpened(runs[0], 3.0), *runs[1:]]
    scores = {}
    for method in ("mean", "logit_mean"):
        quiet, louder = (blend(some, metric=ACCURACY, groups=groups, methods=(method,)) for some in (runs, loud))
        temperature = {member.run.name: member.temperature for member in louder.members}["run000"]
        before = {member.run.name: member.temperature for member in quiet.members}["run000"]
        assert temperature == pytest.approx(3 * before, rel=0.03)
        scores[method] = [ACCURACY.score(fresh, result.test_probs) for result in (quiet, louder)]
        assert scores[method][0] == pytest.approx(scores[method][1], abs=0.006)
    raw = ACCURACY.score(fresh, sum(run.test_probs for run in loud))
    assert raw < min(scores["mean"]) - 0.01


def test_a_stack_weighs_skill_and_leaves_out_noise():
    runs, groups, _ = SHARP.draw(2, fresh=100)
    rng = np.random.default_rng(0)
    noise = replace(runs[1], name="noise", probs=probs_of(rng.normal(size=runs[1].probs.shape)))
    result = blend([noise, *runs], metric=METRICS["log_loss"], groups=groups, methods=("stack",))
    weights = by_name(result)
    assert weights.get("noise", 0) < 0.02
    assert sum(weights.values()) == pytest.approx(1, abs=1e-5)
    assert min(member.coefficient for member in result.members) > 0
    assert result.score < min(member.score for member in result.members)
    assert result.weights_are.startswith("the share of the blend's logits")


def test_a_balanced_samplers_lean_is_undone():
    """Models that learnt from equal classes, scored where classes are not equal."""
    rng = np.random.default_rng(3)
    shares = np.array([0.7, 0.1, 0.1, 0.1])
    labels = rng.choice(4, 1_500, p=shares)
    probs = []
    for _ in range(3):
        logits = rng.normal(size=(1_500, 4))
        logits[np.arange(1_500), labels] += 1
        probs.append(probs_of(logits))
    runs, groups = make_runs(probs, labels, rng.permutation(1_500) % 5)
    as_is, corrected = (
        blend(runs, metric=ACCURACY, groups=groups, methods=("mean",), prior=prior) for prior in ("none", "train")
    )
    assert corrected.score > as_is.score + 3 * as_is.standard_error
    assert corrected.correction.factors[0] > 2 * max(corrected.correction.factors[1:])
    assert corrected.correction.exponent > 1
    assert as_is.correction is None
    assert abs(corrected.naive - corrected.score) < corrected.standard_error
    assert corrected.marks == []


def test_the_test_images_own_class_shares_are_found():
    rng = np.random.default_rng(4)
    labels, shifted = rng.integers(0, 4, 800), rng.choice(4, 800, p=[0.7, 0.1, 0.1, 0.1])
    probs, test_probs = [], []
    for _ in range(3):
        for part, truth in ((probs, labels), (test_probs, shifted)):
            logits = rng.normal(size=(800, 4))
            logits[np.arange(800), truth] += 1
            part.append(probs_of(logits))
    runs, groups = make_runs(probs, labels, rng.permutation(800) % 5)
    ids = np.array([f"t{row}" for row in range(800)])
    runs = [replace(run, test_ids=ids, test_probs=part) for run, part in zip(runs, test_probs, strict=True)]
    as_is, corrected = (
        blend(runs, metric=ACCURACY, groups=groups, methods=("mean",), prior=prior) for prior in ("none", "test")
    )
    gain = ACCURACY.score(shifted, corrected.test_probs) - ACCURACY.score(shifted, as_is.test_probs)
    assert gain > 0.03
    first, *others = corrected.correction.factors
    assert 3 < first / max(others) < 8
    assert corrected.score == pytest.approx(as_is.score, abs=0.02)
    assert corrected.marks == ["transductive"]


# --- gains


def test_the_gain_of_a_run_is_that_over_the_blend_without_it():
    good, labels, fold = weak_runs(11, models=3, rows=300, skill=1.2)
    good.append(good[0])
    runs, groups = make_runs(good, labels, fold)
    for method in METHODS:
        result = blend(runs, metric=METRICS["macro_f1"], groups=groups, methods=(method,))
        assert result.choice == f"only `{method}` was asked for"
        for member in result.members:
            rest = [run for run in runs if run is not member.run]
            without = blend(rest, metric=METRICS["macro_f1"], groups=groups, methods=(method,))
            assert member.gain == pytest.approx(result.score - without.score, abs=1e-9)
            assert member.gain_standard_error >= 0


def test_a_run_that_no_bag_picked_changes_nothing_and_gains_are_of_what_was_picked():
    """More runs than a bag holds: the gain is of a blend whose bags lack the run."""
    probs, labels, fold = weak_runs(12, models=3 * BAG_LEAST, rows=300, skill=0.6)
    runs, groups = make_runs(probs, labels, fold)
    result = blend(runs, metric=ACCURACY, groups=groups, methods=("caruana",))
    weights = [member.weight for member in result.members]
    assert len(weights) > BAG_LEAST
    assert sum(weights) == pytest.approx(1)
    gains = [member.gain for member in result.members if member.gain is not None]
    assert len(gains) == 10
    assert [member.gain is None for member in result.members] == sorted(
        member.gain is None for member in result.members
    )
    assert np.mean(np.abs(gains)) < 0.03


def test_what_was_tried_is_told():
    good, labels, fold = weak_runs(13, models=3, rows=400, skill=1.0)
    runs, groups = make_runs(good, labels, fold)
    result = blend(runs, metric=ACCURACY, groups=groups)
    assert [trial.method for trial in result.trials] == list(METHODS)
    assert result.trials[0].gain == 0
    for trial in result.trials:
        alone = blend(runs, metric=ACCURACY, groups=groups, methods=(trial.method,))
        assert trial.score == alone.score
        assert trial.gain == pytest.approx(trial.score - result.trials[0].score, abs=1e-9)
    assert result.choice.startswith("taken in order")


# --- what is refused


def test_no_runs_are_refused():
    with pytest.raises(RecordError) as error:
        blend([], metric=ACCURACY, groups={})
    assert "there is no complete run to blend" in str(error.value)


def test_runs_that_do_not_fit_together_are_all_named():
    probs, labels, fold = weak_runs(10, models=8, rows=50)
    runs, groups = make_runs(probs, labels, fold)
    runs[1].info["competition"] = "faces"
    runs[2].info["hashes"]["folds"] = "0" * 64
    runs[3] = replace(runs[3], classes=("a", "b", "d", "c"))
    runs[4] = replace(runs[4], ids=np.array([f"x{row}" for row in range(50)]))
    runs[5].info["split"]["kind"] = "holdout"
    runs[6] = replace(runs[6], labels=(labels + (np.arange(50) < 2)) % 4)
    runs[7].info["hashes"]["inputs"] = "2" * 64
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
        "oof/run02: was made on other folds than `run00` (sha256 of the folds 00000000, not ffffffff)",
        fix,
        "oof/run03: has the classes a, b, d, c, but `run00` has a, b, c, d",
        fix,
        "oof/run04: holds other ids (50 validated, 2 test) than `run00` (50, 2)",
        fix,
        "oof/run06: has other labels or folds than `run00` for 2 ids, such as i00000",
        fix,
        "oof/run07: was made on other images or labels than `run00` (sha256 of the inputs 22222222, not 11111111)",
        fix,
        "8 errors; nothing was written.",
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
