"""Submissions: their bytes, what lies beside them, and what the check finds.

Each fault has its message here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from datetime import datetime

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldwise.errors import RecordError
from foldwise.metrics import METRICS
from foldwise.records.ensemble import METHODS, Trial, blend
from foldwise.records.history import BEST_COPY
from foldwise.records.store import list_runs, load_run
from foldwise.records.submission import Tracks, blend_lines, check_submission, predict_as_described, write_submissions

NOW = datetime(2025, 3, 4, 15, 6, 7)
GOOD = "id,label\n7,happy\n8,sad\n9,happy\n"


def check(text, **changes):
    content = text if isinstance(text, bytes) else text.encode()
    arguments = {"where": "my.csv", "expected_ids": ["7", "8", "9"], "classes": ["happy", "sad"], **changes}
    return [str(fault) for fault in check_submission(content, **arguments)]


@pytest.fixture
def blended(project):
    for index in range(3):
        project.keep(f"run{index}", salt=index, skill=1 + index, info={"marks": ["optimistic"] if index else []})
    return blend(list_runs(project.root, "toy")[0], metric=METRICS["accuracy"], groups=project.groups)


def blend_of_three(blended):
    """The same blend with all of three members, whatever it chose."""
    return replace(blended, members=(blended.members * 3)[:3])


def write(project, result, **changes):
    arguments = {"id_column": "id", "label_column": "label", "now": NOW, **changes}
    arguments.setdefault("expected_ids", project.test_ids.tolist())
    tracks = Tracks(result, None, None, None, {BEST_COPY: result})
    return write_submissions(project.root / "submissions", tracks, **arguments)[BEST_COPY]


def test_a_good_file_has_no_faults():
    assert check(GOOD) == []
    assert check(GOOD.replace("\n", "\r\n")) == []
    assert check(GOOD.replace("id,label", "image,emotion"), id_column="image", label_column="emotion") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD.replace("8,sad\n", ""), ["my.csv: 1 of 3 ids are missing: 8"]),
        ("id,label\n", ["my.csv: 3 of 3 ids are missing: 7, 8, 9"]),
        (GOOD + "8,sad\n", ["my.csv:5: the id 8 is there already, in line 3"]),
        (GOOD + "10,sad\n", ["my.csv:5: the id 10 is none of the 3 to be predicted"]),
        (GOOD + ",sad\n", ["my.csv:5: the id is blank"]),
        (GOOD.replace("8,sad", "8,"), ["my.csv:3: the label of id 8 is blank"]),
        (GOOD.replace("8,sad", "8,sda"), ["my.csv:3: unknown label 'sda'\n  fix: did you mean `sad`?"]),
        (GOOD.replace("8,sad", "8,1"), ["my.csv:3: unknown label '1'\n  fix: the classes are happy, sad"]),
        (GOOD + "10\n", ["my.csv:5: two cells must be there, but got 1"]),
        (
            "id,label\n8,sad\n7,happy\n9,happy\n",
            [
                "my.csv:2: the order of the ids is not the expected one: id 7 must be here, but got 8\n"
                "  fix: sort the rows"
            ],
        ),
        ("", ["my.csv:1: the header must be `id,label`, but is ``"]),
        ("label,id\n", ["my.csv:1: the header must be `id,label`, but is `label,id`"]),
        (
            "\ufeff" + GOOD,
            [
                "my.csv:1: the header must be `id,label`, but is `\ufeffid,label`\n"
                "  fix: save it without a byte order mark"
            ],
        ),
        (GOOD.encode() + b"\xff", ["my.csv: is not UTF-8 (byte 31)\n  fix: save it as UTF-8"]),
        (
            "id,label\n7,\n7,happi\n12,sad\n",
            [
                "my.csv:2: the label of id 7 is blank",
                "my.csv:3: the id 7 is there already, in line 2",
                "my.csv:3: unknown label 'happi'\n  fix: did you mean `happy`?",
                "my.csv:4: the id 12 is none of the 3 to be predicted",
                "my.csv: 2 of 3 ids are missing: 8, 9",
            ],
        ),
    ],
)
def test_each_fault_has_its_message(text, expected):
    assert check(text) == expected


@given(rows=st.lists(st.sampled_from(GOOD.splitlines()[1:]), max_size=5))
def test_a_file_is_good_only_if_it_is_the_expected_one(rows):
    text = "\n".join(["id,label", *rows, ""])
    assert (check(text) == []) == (text == GOOD)


def test_a_submission_is_what_the_blend_says(project, blended):
    path = write(project, blended)
    content = (path / "submission.csv").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert path == project.root / "submissions" / f"20250304-150607-{digest[:8]}"
    frame = pd.read_csv(path / "submission.csv", dtype=str)
    assert frame["id"].tolist() == project.test_ids.tolist()
    for name in ("submission.csv", "blend.json"):
        assert (project.root / "submissions" / name).read_bytes() == (path / name).read_bytes()
    assert (
        check_submission(
            content, where="submission.csv", expected_ids=project.test_ids.tolist(), classes=blended.classes
        )
        == []
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prior", ["none", "train", "test"])
def test_the_description_is_enough_to_make_the_submission_again(project, blended, method, prior):
    runs = [load_run(path) for path in sorted((project.root / "oof").iterdir())]
    result = blend(runs, metric=METRICS["accuracy"], groups=project.groups, methods=(method,), prior=prior)
    path = write(project, result)
    told = json.loads((path / "blend.json").read_text())
    frame = pd.read_csv(path / "submission.csv", dtype=str)
    tables = [
        pd.read_csv(project.root / "oof" / member["run"] / "test.csv", dtype={"id": str}).set_index("id")
        for member in told["members"]
    ]
    probs = [table.loc[frame["id"]].to_numpy() for table in tables]
    again = predict_as_described(told, probs)
    assert frame["label"].tolist() == [told["classes"][index] for index in again.argmax(axis=1)]
    assert again == pytest.approx(result.test_probs, abs=1e-8)


def test_a_description_of_the_first_schema_averages_probabilities():
    told = {"method": "caruana", "classes": ["a", "b"], "members": [{"weight": 0.75}, {"weight": 0.25}]}
    probs = [np.array([[0.8, 0.2]]), np.array([[0.0, 1.0]])]
    assert predict_as_described(told, probs) == pytest.approx(np.array([[0.6, 0.4]]), abs=1e-6)


def test_what_is_told_of_a_blend(blended):
    members = [
        replace(member, weight=weight, score=0.5, standard_error=0.01, gain=gain, gain_standard_error=gain and 0.004)
        for member, weight, gain in zip(
            blend_of_three(blended).members, (0.6, 0.3, 0.1), (0.02, -0.001, None), strict=True
        )
    ]
    trials = (Trial("best", 0.5, 0.01, 0.0, 0.0), Trial("stack", 0.52, 0.011, 0.02, 0.006))
    result = replace(
        blended,
        members=tuple(members),
        method="stack",
        trials=trials,
        fold_methods={0: "stack", 1: "best", 2: "stack"},
        score=0.52,
        standard_error=0.012,
        interval=(0.4967, 0.5433),
        naive=0.55,
        accuracy=0.52,
        accuracy_standard_error=0.012,
    )
    names = [member.run.name for member in members]
    assert blend_lines(result) == [
        "member  weight  OOF accuracy        gain from it",
        f"{names[0]}     0.600  0.5000 +- 0.0100  +0.0200 +- 0.0040",
        f"{names[1]}     0.300  0.5000 +- 0.0100  -0.0010 +- 0.0040",
        f"{names[2]}     0.100  0.5000 +- 0.0100",
        "",
        "tried       cross-fitted       over best",
        "best        0.5000 +- 0.0100",
        "stack       0.5200 +- 0.0110  +0.0200 +- 0.0060  <- taken",
        "",
        "method       stack, of 3 runs",
        f"             {result.choice}",
        "             weights: the share of the blend's logits that comes from each run",
        "             chosen without one of the 3 folds: best in 1",
        "estimate     0.5200 +- 0.0120, 95% interval 0.4967 to 0.5433",
        "             cross-fitted: members, weights and method chosen without the scored fold; "
        "flattered as far as its members",
        "             are optimistic; conditional on the trained models",
        "naive        0.5500 (scored on the rows that chose the weights: not to be trusted)",
        "expect       6 +- 3 of 12 test images right",
        "marks        optimistic",
        "track        competition data only",
    ]


def test_members_beyond_a_screenful_are_counted(blended):
    members = [replace(blended.members[0], weight=1 / 20) for _ in range(20)]
    lines = blend_lines(replace(blended, members=tuple(members)))
    assert lines[13] == "and 8 more, with 0.400 of the weight"


def test_the_description_tells_what_to_expect(project, blended):
    path = write(project, blended)
    told = json.loads((path / "blend.json").read_text())
    assert told["competition"] == "toy"
    assert [member["run"] for member in told["members"]] == [member.run.name for member in blended.members]
    assert sum(member["weight"] for member in told["members"]) == pytest.approx(1)
    assert told["members"][0]["hashes"]["folds"] == told["folds_sha256"] == project.folds.sha256
    assert told["considered"] == ["run0", "run1", "run2"]
    assert told["estimate"]["score"] == blended.score
    assert told["estimate"]["interval"] == list(blended.interval)
    assert "conditional on the trained models" in told["estimate"]["note"]
    assert told["naive"] == blended.naive
    assert [trial["method"] for trial in told["tried"]] == list(METHODS)
    assert told["members"][0]["marginal_gain"] == blended.members[0].gain
    assert told["prior"] == {"kind": "none", "correction": None}
    assert told["choice"] == blended.choice
    right, margin = blended.expected_right(12)
    assert told["expectation"]["text"] == f"expect {right} +- {margin} right of 12"
    assert sum(told["counts"].values()) == 12
    assert told["submission_sha256"] == hashlib.sha256((path / "submission.csv").read_bytes()).hexdigest()
    assert told["marks"] == ["optimistic"]


def test_the_bytes_depend_on_the_runs_alone(project, blended):
    first = write(project, blended)
    before = {name: (first / name).read_bytes() for name in ("submission.csv", "blend.json")}
    shutil.rmtree(first)
    later = write(project, blended, now=datetime(2026, 1, 1))
    assert later != first
    assert {name: (later / name).read_bytes() for name in before} == before


def test_the_same_blend_again_keeps_its_folder(project, blended):
    first = write(project, blended)
    assert write(project, blended, now=datetime(2026, 1, 1)) == first
    assert [path for path in (project.root / "submissions").iterdir() if path.is_dir()] == [first]


def test_rows_are_joined_by_id_and_written_in_the_expected_order(project, blended):
    labels = dict(pd.read_csv(write(project, blended) / "submission.csv", dtype=str).to_numpy().tolist())
    expected_ids = project.test_ids[[5, 2, 9]].tolist()
    path = write(project, blended, expected_ids=expected_ids, id_column="image", label_column="emotion")
    frame = pd.read_csv(path / "submission.csv", dtype=str)
    assert frame.columns.tolist() == ["image", "emotion"]
    assert frame.to_numpy().tolist() == [[name, labels[name]] for name in expected_ids]


def test_an_id_that_no_run_predicts_is_refused(project, blended):
    with pytest.raises(RecordError) as error:
        write(project, blended, expected_ids=["61", "99", "100"])
    assert str(error.value) == (
        "submission.csv: the blend predicts 12 ids, but 2 of the expected ones are not among them, such as 99\n"
        "  fix: run its members again on the present data, with --fresh\n"
        "1 error; nothing was written."
    )
    assert not (project.root / "submissions").exists()
