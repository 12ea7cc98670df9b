"""Starting weights from another run: the same fold's, and none that saw a label which is then scored."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest

from foldwise.data.ingest import ingest
from foldwise.errors import RecordError
from foldwise.runs.events import UnitStarted

FIX = "start from a run of demo on its present folds, from `pretrained`, or from `none`"


def starter(project: Any, **changes: Any) -> Any:
    """An experiment that starts from `tiny` and learns next to nothing."""
    return project.spec("starter", model={"weights": "run:tiny"}, optim={"lr": 1e-9}, train={"epochs": 1}, **changes)


def refusal(project: Any) -> str:
    with pytest.raises(RecordError) as caught:
        project.run(starter(project))
    assert not project.path("starter").exists()
    return str(caught.value)


def edit_record(project: Any, **changes: Any) -> None:
    path = project.path() / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_unit_starts_from_the_same_folds_weights(resumable: Any) -> None:
    resumable.run(starter(resumable), folds=(1, 4))
    for fold in (1, 4):
        theirs = resumable.table("tiny", f"fold{fold}", "seed42", "val.csv").set_index("id")
        ours = resumable.table("starter", f"fold{fold}", "seed42", "val.csv").set_index("id").loc[theirs.index]
        np.testing.assert_allclose(ours.drop(columns="label"), theirs.drop(columns="label"), atol=1e-5)
    test = {fold: resumable.table("starter", f"fold{fold}", "seed42", "test.csv").set_index("id") for fold in (1, 4)}
    assert (test[1] - test[4]).abs().max(axis=None) > 1e-3, "two folds must start from two different models"


def test_a_seed_that_the_other_run_lacks_starts_from_its_first(resumable: Any) -> None:
    resumable.run(starter(resumable, seeds=(5,)), folds=(0,))
    theirs = resumable.table("tiny", "fold0", "seed42", "val.csv").set_index("id")
    ours = resumable.table("starter", "fold0", "seed5", "val.csv").set_index("id").loc[theirs.index]
    np.testing.assert_allclose(ours.drop(columns="label"), theirs.drop(columns="label"), atol=1e-5)


def test_marks_and_external_data_follow(resumable: Any) -> None:
    edit_record(resumable, marks=["optimistic"], external=["faces"])
    record, _ = resumable.run(starter(resumable))
    assert (record["marks"], record["external"]) == (["optimistic"], ["faces"])


def test_a_run_on_other_folds_is_refused(resumable: Any) -> None:
    resumable.describe("split: {kind: kfold, folds: 5, seed: 7}")
    assert refusal(resumable) == (
        "model.weights: run:tiny: was trained on other folds, and so on labels that this experiment is scored on\n"
        f"  fix: {FIX}\n"
        "1 error; nothing was written."
    )


def test_a_run_on_other_images_is_refused_though_the_folds_are_the_same(resumable: Any) -> None:
    hashes = json.loads((resumable.path() / "run.json").read_text())["hashes"]
    edit_record(resumable, hashes=hashes | {"inputs": "ab" * 32})
    assert refusal(resumable) == (
        f"model.weights: run:tiny: was trained on other images or labels (abababab, here {hashes['inputs'][:8]})\n"
        "  fix: train it again: make exp EXP=tiny FRESH=1\n"
        "1 error; nothing was written."
    )


def test_a_run_that_left_nothing_out_is_refused_where_something_is_scored(project: Any) -> None:
    project.describe("split: {kind: full}")
    project.run(project.spec())
    project.describe("split: {kind: kfold, folds: 5, seed: 42}")
    assert "was trained on other folds" in refusal(project)


@pytest.mark.parametrize("split", ["{kind: full}", "{kind: holdout, share: 0.2, seed: 1}"])
def test_a_run_that_left_out_what_is_scored_serves_whatever_the_kind_of_split(project: Any, split: str) -> None:
    project.describe(f"split: {split}")
    project.run(project.spec())
    project.run(starter(project))
    theirs, ours = (project.table(name, "test.csv").set_index("id") for name in ("tiny", "starter"))
    np.testing.assert_allclose(ours, theirs.loc[ours.index], atol=1e-5)
    record, _ = project.run(starter(project), smoke=True)  # on two folds, of which that run has one
    assert record["smoke"]


def test_a_run_of_another_competition_is_refused_unless_it_is_clear_of_this_one(resumable: Any) -> None:
    folder = resumable.root / "inputs" / "other"
    folder.mkdir()
    text = (resumable.root / "inputs" / "demo" / "competition.yaml").read_text()
    (folder / "competition.yaml").write_text(text.replace("name: demo", "name: other"))
    ingest(resumable.root / "handout", resumable.root, "other")
    with pytest.raises(RecordError) as caught:
        resumable.run(starter(resumable, competition="other"))
    assert str(caught.value) == (
        "model.weights: run:tiny: was trained on demo, and was not kept clear of the images of other\n"
        "  fix: write `clear_of: [other]` into experiments/tiny.yaml, and run it again with FRESH=1\n"
        "1 error; nothing was written."
    )
    assert not resumable.path("starter").exists()


def test_a_smoke_run_is_refused(resumable: Any) -> None:
    edit_record(resumable, smoke=True)
    assert refusal(resumable).startswith("model.weights: run:tiny: is a smoke run\n")


def test_an_incomplete_run_is_refused(resumable: Any) -> None:
    (resumable.path() / "run.json").unlink()
    assert refusal(resumable).startswith("oof/tiny: is not complete: 5 of 5 units\n  fix: make exp EXP=tiny\n")


def test_missing_weights_are_named_with_the_mend(resumable: Any) -> None:
    for fold in (1, 3):
        (resumable.path() / f"fold{fold}" / "seed42" / "weights.safetensors").unlink()
    assert refusal(resumable) == (
        "oof/tiny: its weights are not on this machine: fold1/seed42, fold3/seed42\n"
        "  fix: fetch them: make weights FROM=<folder>, or train it here: make exp EXP=tiny FRESH=1\n"
        "1 error; nothing was written."
    )


def test_weights_that_the_record_does_not_vouch_for_are_refused(resumable: Any) -> None:
    folder = resumable.path() / "fold1" / "seed42"
    shutil.copy(resumable.path() / "fold0" / "seed42" / "weights.safetensors", folder / "weights.safetensors")
    with pytest.raises(RecordError, match=r"oof/tiny/fold1/seed42/weights.safetensors: is not the file that run.json"):
        resumable.run(starter(resumable))


def test_a_run_does_not_go_on_from_other_weights_than_it_began_with(resumable: Any) -> None:
    resumable.run(starter(resumable), folds=(0,))
    shutil.rmtree(resumable.path())
    resumable.run(resumable.spec(train={"epochs": 3}))
    with pytest.raises(
        RecordError, match=r"oof/starter: holds a run of another context:\n  start_sha256: \w{64} -> \w{64}"
    ):
        resumable.run(starter(resumable), folds=(1,))


def test_a_smoke_run_may_start_from_a_real_one(resumable: Any) -> None:
    record, screen = resumable.run(starter(resumable), smoke=True)
    assert record["smoke"]
    assert [event.fold for event in screen.events if isinstance(event, UnitStarted)] == [0, 1]
