"""Submissions: their bytes, what lies beside them, and what the check finds.

Each fault has its message here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from datetime import datetime

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldwise.errors import RecordError
from foldwise.metrics import METRICS
from foldwise.records.ensemble import blend
from foldwise.records.store import list_runs
from foldwise.records.submission import check_submission, write_submission

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


def write(project, result, **changes):
    arguments = {"id_column": "id", "label_column": "label", "now": NOW, **changes}
    arguments.setdefault("expected_ids", project.test_ids.tolist())
    return write_submission(project.root / "submissions", result, **arguments)


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
    mean = np.zeros((12, 3))
    for member in blended.members:
        mean += member.weight * pd.read_csv(member.run.path / "test.csv").filter(like="p_").to_numpy()
    assert frame["label"].tolist() == [blended.classes[index] for index in mean.argmax(axis=1)]
    for name in ("submission.csv", "blend.json"):
        assert (project.root / "submissions" / name).read_bytes() == (path / name).read_bytes()
    assert (
        check_submission(
            content, where="submission.csv", expected_ids=project.test_ids.tolist(), classes=blended.classes
        )
        == []
    )


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
