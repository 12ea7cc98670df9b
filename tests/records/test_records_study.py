"""A study reads back as it was written, and damage is told with its place.

Scores are recomputed from the predictions that it keeps, as a stranger would.
"""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldwise.errors import RecordError
from foldwise.files import sha256_file
from foldwise.metrics import METRICS
from foldwise.records.study import (
    Scored,
    TrialRow,
    _cell,
    _value,
    predictions_of,
    read_study,
    write_study,
    write_tables,
)

CLASSES = ("angry", "happy", "sad, or so")
IMAGES = 45


def probs_of(number):
    rng = np.random.default_rng(number + 5)
    return rng.dirichlet(np.ones(3), IMAGES).astype(np.float32)


def study_of(metric):
    """Two complete trials, one pruned after its first fold, a failed and a repeated one; ids in no order."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.arange(1, IMAGES + 1).astype(str))
    scored = Scored(metric, CLASSES, ids, np.arange(IMAGES) % 3, rng.integers(0, 3, IMAGES))
    for number, folds in ((0, (0, 1, 2)), (1, (0,)), (4, (0, 1, 2))):
        for fold in folds:
            rows = rng.permutation(np.flatnonzero(scored.fold == fold))
            scored.add(number, ids[rows], probs_of(number)[rows])
    endings = {
        0: ("complete", {"optim.lr": 2e-4, "model.arch": "resnet18", "tta": ["identity", "hflip"]}, ""),
        1: ("pruned", {"optim.lr": 1.0, "model.arch": "true", "mix": None}, "behind by 0.1, more than 0.05"),
        2: ("failed", {"optim.lr": 1 / 3, "model.arch": ""}, "DivergedError: a loss is not finite"),
        3: ("duplicate", {"optim.lr": 2e-4, "augment.0": {"Affine": {"p": 0.5}}}, "the parameters of trial 0"),
        4: ("complete", {"train.epochs": 30, "ema": True, "model.arch": "vit\r\n"}, ""),
    }
    trials = [
        TrialRow(
            number,
            state,
            parameters,
            scored.fold_scores(number) if number in scored.values else {},
            scored.score(number) if state == "complete" else None,
            0.01 / 3 if state == "complete" else None,
            12.5 * number,
            reason,
        )
        for number, (state, parameters, reason) in endings.items()
    ]
    return trials, scored


@pytest.fixture(params=sorted(METRICS))
def metric(request):
    return request.param


def test_a_study_reads_back_as_it_was_written(tmp_path, metric):
    trials, scored = study_of(metric)
    written = write_study(tmp_path, trials[::-1], scored, {"best": 4, "corrected": {"score": 0.5}})
    study = read_study(tmp_path)
    assert list(study.trials) == trials
    assert study.info == written
    assert study.info["best"] == 4
    for name in ("ids", "fold", "labels"):
        assert getattr(study.scored, name).tolist() == getattr(scored, name).tolist()
    assert study.scored.values.keys() == scored.values.keys()
    for number, values in scored.values.items():
        rounded = [float(f"{value:.9g}") for value in values.tolist()]
        assert np.array_equal(study.scored.values[number], rounded, equal_nan=True)


def test_predictions_that_read_back_score_as_the_real_ones(tmp_path, metric):
    trials, scored = study_of(metric)
    write_study(tmp_path, trials, scored, {})
    again = read_study(tmp_path).scored
    for number, folds in ((0, [0, 1, 2]), (1, [0])):
        rows, probs = predictions_of(again, number)
        assert rows.tolist() == np.flatnonzero(np.isin(scored.fold, folds)).tolist()
        real = probs_of(number)[rows]
        of = METRICS[metric]
        labels = scored.labels[rows]
        digits = 0 if of.hard else 1e-8
        assert of.statistics(labels, probs) == pytest.approx(of.statistics(labels, real), rel=digits, abs=0)
        assert again.score(number) == pytest.approx(of.score(labels, real), rel=digits, abs=0)
        assert list(again.fold_scores(number)) == folds
        first = again.fold[rows] == 0
        expected = of.score(labels[first], real[first])
        assert again.fold_scores(number)[0] == pytest.approx(expected, rel=digits, abs=0)


def test_the_tables_are_for_people_too(tmp_path):
    trials, scored = study_of("accuracy")
    hashes = write_tables(tmp_path, trials, scored)
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:9] == [
        *("number", "state", "score", "standard_error", "wall_s"),
        *("fold_0", "fold_1", "fold_2", "reason"),
    ]
    assert [row["number"] for row in rows] == list("01234")
    assert (rows[0]["optim.lr"], rows[0]["model.arch"], rows[0]["tta"]) == (
        "0.0002",
        "resnet18",
        '["identity", "hflip"]',
    )
    assert (rows[1]["fold_1"], rows[1]["mix"], rows[0]["mix"]) == ("", "null", "")
    with (tmp_path / "scored.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "fold", "label", "t0", "t1", "t4"]
    predicted = np.array(CLASSES)[probs_of(0).argmax(axis=1)]
    assert [row["t0"] for row in rows] == predicted.tolist()
    assert [row["t1"] != "" for row in rows] == [row["fold"] == "0" for row in rows]
    assert hashes == {name: sha256_file(tmp_path / f"{name}.csv") for name in ("trials", "scored")}


def test_a_reason_is_one_line(tmp_path):
    trials, scored = study_of("accuracy")
    trials[2] = replace(trials[2], reason="out of memory:\n\r  tried to allocate 2 GiB")
    write_study(tmp_path, trials, scored, {})
    assert read_study(tmp_path).trials[2].reason == "out of memory: tried to allocate 2 GiB"


def test_new_tables_are_never_beside_the_record_of_old_ones(tmp_path):
    trials, scored = study_of("accuracy")
    write_study(tmp_path, trials, scored, {})
    write_tables(tmp_path, trials[:3], scored)
    assert not (tmp_path / "tune.json").exists()


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(plain | st.sampled_from(["true", "null", "1e-3", "NaN", "[a]", " 1", '"x"', "a\rb"]))
def test_a_parameter_of_any_value_reads_back_with_its_type(value):
    cell = _cell(value)
    assert cell
    assert "\r" not in cell
    assert _value(cell) == value
    assert type(_value(cell)) is type(value)


def edit(path, name, change):
    """Change a table as a hand would, and let `tune.json` vouch for it, so that the next check is reached."""
    file = path / name
    file.write_text(change(file.read_text()))
    info = json.loads((path / "tune.json").read_text())
    info["hashes"][name.removesuffix(".csv")] = sha256_file(file)
    (path / "tune.json").write_text(json.dumps(info))


def line(number, change):
    """Apply `change` to one line of a text, counted from 1."""

    def whole(text):
        lines = text.splitlines(keepends=True)
        lines[number - 1] = change(lines[number - 1])
        return "".join(lines)

    return whole


def swap(old, new):
    return lambda text: text.replace(old, new, 1)


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "oof" / "toy" / "tune"
    trials, scored = study_of("accuracy")
    write_study(path, trials, scored, {})
    return path


FIX = "  fix: take the committed one back with git, or tune again with --fresh\n1 error; nothing was written."


def test_no_study_is_told_apart_from_a_damaged_one(tmp_path):
    with pytest.raises(RecordError) as error:
        read_study(tmp_path / "oof" / "toy" / "tune")
    assert str(error.value) == (
        "oof/toy/tune: holds no finished study: it has no tune.json\n"
        "  fix: make tune EXP=<experiment>\n"
        "1 error; nothing was written."
    )


def test_all_files_that_are_not_vouched_for_are_named(kept):
    (kept / "trials.csv").unlink()
    with (kept / "scored.csv").open("a") as file:
        file.write("\n")
    with pytest.raises(RecordError) as error:
        read_study(kept)
    assert [str(fault).splitlines()[0] for fault in error.value.faults] == [
        "oof/toy/tune/trials.csv: is missing",
        "oof/toy/tune/scored.csv: is not the file that tune.json vouches for",
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is not readable (Expecting property name"),
        ("[]", "is not readable (list indices"),
        ('{"metric": "accuracy"}', "lacks the key or names no metric: 'classes'"),
        ('{"metric": "auc", "classes": [], "hashes": {}}', "lacks the key or names no metric: 'auc'"),
    ],
)
def test_an_unreadable_record_says_what_it_lacks(kept, text, what):
    (kept / "tune.json").write_text(text)
    with pytest.raises(RecordError) as error:
        read_study(kept)
    assert str(error.value).startswith(f"oof/toy/tune/tune.json: {what}")
    assert str(error.value).endswith(FIX)


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        (
            "scored.csv",
            swap("id,fold", "fold,id"),
            "scored.csv:1: the first columns must be id,fold,label, but are fol",
        ),
        ("scored.csv", line(1, swap("t4", "t4b")), "scored.csv:1: no trial is called 't4b'"),
        ("scored.csv", line(1, swap("t4", "t1")), "scored.csv:1: a column is there twice"),
        ("scored.csv", line(1, swap("t4", "t9")), "scored.csv: trial 9 is not in trials.csv"),
        ("scored.csv", line(4, lambda row: "x" + row.replace(",", ",2,", 1)), "scored.csv:4: 6 cells must be there, b"),
        ("scored.csv", line(3, swap(",1,", ",one,")), "scored.csv:3: invalid literal for int"),
        ("scored.csv", line(3, lambda row: row.rstrip() + "ish\n"), "scored.csv:3: unknown label"),
        ("scored.csv", lambda text: text + text.splitlines()[-1] + "\n", "is there more than once"),
        ("scored.csv", lambda _: "", "scored.csv: is empty"),
        (
            "trials.csv",
            swap("reason", "why"),
            "trials.csv:1: the columns must be number,state,score,standard_error,wal",
        ),
        ("trials.csv", swap("fold_1", "fold_b"), "trials.csv:1: the columns must be number,state,score,standard_error"),
        ("trials.csv", swap("pruned", "cut"), "trials.csv:3: no trial ends as 'cut'"),
        ("trials.csv", line(2, lambda row: "x" + row), "trials.csv:2: invalid literal for int"),
        ("trials.csv", line(3, lambda row: "0" + row[1:]), "trials.csv: a trial's number is there twice"),
    ],
)
def test_damage_is_told_with_its_place(kept, name, change, what):
    edit(kept, name, change)
    with pytest.raises(RecordError) as error:
        read_study(kept)
    assert what in str(error.value)
    assert str(error.value).startswith("oof/toy/tune: ")
    assert str(error.value).endswith(FIX)


def test_a_score_that_its_predictions_do_not_give_is_refused(tmp_path):
    trials, scored = study_of("accuracy")
    score = trials[4].score
    trials[4] = replace(trials[4], score=score + 1e-6)
    write_study(tmp_path, trials, scored, {})
    with pytest.raises(RecordError, match=f"trial 4, all folds: the score is .*, but scored.csv gives {score!r}"):
        read_study(tmp_path)


def test_a_fold_that_was_scored_without_predictions_is_refused(tmp_path):
    trials, scored = study_of("accuracy")
    trials[1] = replace(trials[1], fold_scores=trials[1].fold_scores | {2: 0.5})
    write_study(tmp_path, trials, scored, {})
    with pytest.raises(RecordError, match=r"trial 1, fold 2: the score is 0\.5, but scored\.csv gives None"):
        read_study(tmp_path)


def test_scores_of_a_trial_that_predicted_nothing_are_refused(tmp_path):
    trials, scored = study_of("accuracy")
    del scored.values[1]
    write_study(tmp_path, trials, scored, {})
    with pytest.raises(RecordError, match=r"trial 1 has scores in trials\.csv, but no predictions"):
        read_study(tmp_path)


def test_a_duplicate_has_the_scores_of_the_trial_that_it_repeats_and_no_others(tmp_path):
    trials, scored = study_of("accuracy")
    trials[3] = replace(trials[0], number=3, state="duplicate")
    write_study(tmp_path, trials, scored, {})
    assert read_study(tmp_path).trials[3].score == trials[0].score
    trials[3] = replace(trials[3], score=trials[3].score + 0.1)
    write_study(tmp_path, trials, scored, {})
    with pytest.raises(RecordError, match=r"trial 3 has scores in trials\.csv, but no predictions"):
        read_study(tmp_path)


def test_a_part_of_a_fold_is_no_fold(tmp_path):
    trials, scored = study_of("accuracy")
    scored.values[4][7] = np.nan
    write_study(tmp_path, trials, scored, {})
    with pytest.raises(RecordError, match=f"trial 4 predicts a part of a fold only: id {scored.ids[7]} of fold 1"):
        read_study(tmp_path)


def test_a_probability_beyond_one_is_refused(tmp_path):
    path = tmp_path / "oof" / "toy" / "tune"
    trials, scored = study_of("log_loss")
    write_study(path, trials, scored, {})
    edit(path, "scored.csv", line(2, lambda row: row.rsplit(",", 1)[0] + ",1.5\n"))
    with pytest.raises(RecordError, match=r"scored\.csv:2: a probability must be from 0 to 1, but got 1\.5"):
        read_study(path)


def test_an_id_of_another_study_is_refused():
    _, scored = study_of("accuracy")
    with pytest.raises(KeyError, match="999"):
        scored.add(0, np.array(["999"]), np.eye(3)[[0]])
