"""What lies in `oof/<exp>/`: exact round trips, figures that anyone can recompute, and what is refused.

A kill at any moment must leave a run that is not complete, never one that is wrong.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import log_loss

from foldwise.data.folds import Folds
from foldwise.data.leaks import THRESHOLD, VERSION
from foldwise.errors import RecordError
from foldwise.metrics import METRICS
from foldwise.records import store
from foldwise.records.store import external_words, list_runs, load_run

UNITS = [(0, 42), (1, 42), (2, 42)]


def same_unit(one, other):
    for name in ("val_ids", "val_labels", "val_probs", "test_ids", "test_probs"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype.kind == right.dtype.kind
        assert left.shape == right.shape
        assert left.tobytes() == right.astype(left.dtype).tobytes()
    assert (one.fold, one.seed, one.info) == (other.fold, other.seed, other.info)


def message(error):
    return str(error.value)


# --- the round trip


@given(probs=arrays(np.float32, (4, 3), elements=st.floats(0, 1, width=32)))
def test_every_float32_is_kept_to_the_last_bit(tmp_path_factory, probs):
    path = tmp_path_factory.mktemp("probs") / "test.csv"
    store.write_probs(path, {"id": np.array(["1", "2", "3", "4"])}, probs, ["a", "b", "c"])
    (ids,), back = store.read_probs(path, ("id",), ["a", "b", "c"])
    assert back.astype(np.float32).tobytes() == probs.tobytes()
    assert ids.tolist() == ["1", "2", "3", "4"]
    assert pd.read_csv(path).filter(like="p_").to_numpy(np.float32).tobytes() == probs.tobytes()


def test_a_unit_reads_back_as_it_was(project):
    unit = project.unit(1)
    with project.open("vit") as folder:
        assert folder.finished(1, 42) is None
        folder.save_unit(unit)
        back = folder.finished(1, 42)
        assert folder.notes == []
    same_unit(unit, back)
    assert back.history == [{"fold": 1, "seed": 42} | row for row in unit.history]
    assert isinstance(back.history[0]["epoch"], int)


def test_ids_and_classes_may_hold_commas_quotes_and_words_that_mean_nothing_elsewhere(project):
    unit = project.unit(0, test_ids=np.array(["NA", 'a"b', "c,d", "007", "null", "ä"]))
    with project.open("vit") as folder:
        folder.save_unit(unit)
        same_unit(unit, folder.finished(0, 42))


def test_saving_a_unit_deletes_its_checkpoint_and_vouches_for_its_weights(project):
    with project.open("vit") as folder:
        path = folder.unit_path(0, 42)
        path.mkdir(parents=True)
        (path / "checkpoint.pt").write_bytes(b"half-way")
        (path / "weights.safetensors").write_bytes(b"weights")
        folder.save_unit(project.unit(0))
        assert not (path / "checkpoint.pt").exists()
        assert folder.finished(0, 42) is not None
        (path / "weights.safetensors").write_bytes(b"other weights")
        assert folder.finished(0, 42) is None
        assert folder.notes == [
            "fold 0, seed 42 is trained again: oof/vit/fold0/seed42 is damaged "
            "(weights.safetensors is not the file that was kept)"
        ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "val.csv").write_text("id,label\n"),
        lambda path: (path / "test.csv").unlink(),
        lambda path: (path / "unit.json").write_text("{"),
        lambda path: (path / "unit.json").write_text("[]"),
        lambda path: (path / "unit.json").write_text('{"fold": 0, "seed": 42}'),
    ],
)
def test_a_damaged_unit_is_trained_again(project, damage):
    with project.open("vit") as folder:
        folder.save_unit(project.unit(0))
        damage(folder.unit_path(0, 42))
        assert folder.finished(0, 42) is None
        assert len(folder.notes) == 1


def test_a_unit_copied_from_a_run_of_another_spec_is_trained_again(project):
    with project.open("vit") as folder:
        folder.save_unit(project.unit(0))
        source = folder.unit_path(0, 42)
    with project.open("resnet") as folder:
        shutil.copytree(source, folder.unit_path(0, 42))
        assert folder.finished(0, 42) is None
        assert "unit.json is of another spec" in folder.notes[0]


# --- the complete run


def test_every_figure_can_be_recomputed_from_the_files_alone(project):
    record = project.keep("vit")
    path = project.root / "oof" / "vit"
    oof = pd.read_csv(path / "oof.csv", dtype={"id": str})
    assert oof["id"].tolist() == project.ids.tolist()
    assert oof["fold"].tolist() == project.folds.fold.tolist()
    probs = oof.filter(like="p_")
    predicted = probs.columns[probs.to_numpy().argmax(axis=1)].str.removeprefix("p_")
    right = pd.Series(predicted == oof["label"], index=oof.index)
    assert record["score"] == right.mean()
    assert record["fold_scores"] == {str(fold): value for fold, value in right.groupby(oof["fold"]).mean().items()}
    assert 0 < record["standard_error"] < 0.1
    assert record == json.loads((path / "run.json").read_text())
    test = pd.read_csv(path / "test.csv", dtype={"id": str})
    mean = np.mean([project.unit(fold).test_probs.astype(np.float64) for fold in range(3)], axis=0)
    assert np.array_equal(test.filter(like="p_").to_numpy(np.float32), mean.astype(np.float32))


def test_a_log_loss_can_be_recomputed_too(project):
    record = project.keep("vit", metric="log_loss")
    oof = pd.read_csv(project.root / "oof" / "vit" / "oof.csv")
    probs = oof.filter(like="p_").to_numpy()
    assert record["score"] == pytest.approx(log_loss(project.labels, probs / probs.sum(1, keepdims=True)), abs=1e-6)


def test_a_record_tells_what_ran(project):
    info = {"device": "cuda", "tta": ["identity"], "marks": ["optimistic"], "score": 2.0, "lucky": True}
    record = project.keep("vit", info=info)
    assert (record["experiment"], record["competition"], record["metric"]) == ("vit", "toy", "accuracy")
    assert record["classes"] == ["angry", "happy", "sad, or so"]
    assert record["split"] == {"kind": "kfold", "folds": 3, "seed": 42, "sha256": project.folds.sha256}
    assert record["wall_s"] == 7.5
    assert record["peak_rss_mib"] == 102.0
    assert (record["device"], record["threads"], record["lucky"]) == ("cuda", 2, True)
    assert (record["marks"], record["external"], record["leak_guard"]) == (["optimistic"], [], None)
    assert (record["attempt"], record["smoke"], record["seeds"]) == (1, False, [42])
    assert record["score"] <= 1
    assert set(record["hashes"]) == {"folds", "inputs", "start", "spec", "oof", "test"}
    assert record["started"] <= record["finished"]


def test_seeds_are_averaged_and_their_spread_is_told(project):
    record = project.keep("vit", seeds=(1, 2))
    run = load_run(project.root / "oof" / "vit")
    for fold in range(3):
        rows = {image: row for row, image in enumerate(run.ids.tolist())}
        units = [project.unit(fold, seed) for seed in (1, 2)]
        by_id = [dict(zip(unit.val_ids.tolist(), unit.val_probs.astype(float), strict=True)) for unit in units]
        for image in units[0].val_ids.tolist():
            mean = ((by_id[0][image] + by_id[1][image]) / 2).astype(np.float32)
            assert run.probs[rows[image]].astype(np.float32).tobytes() == mean.tobytes()
    one, two = record["seed_scores"]["1"], record["seed_scores"]["2"]
    assert record["seed_std"] == pytest.approx(abs(one - two) / np.sqrt(2))
    right = sum((unit.val_probs.argmax(1) == unit.val_labels).sum() for unit in (project.unit(f, 1) for f in range(3)))
    assert one == right / 60
    history = pd.read_csv(project.root / "oof" / "vit" / "history.csv")
    assert history.groupby(["fold", "seed"]).size().tolist() == [2] * 6


def test_the_same_units_make_the_same_bytes_in_any_order(project):
    project.keep("vit")
    first = {name: (project.root / "oof" / "vit" / name).read_bytes() for name in ("oof.csv", "test.csv")}
    with project.open("vit") as folder:
        project.complete(folder, UNITS[::-1])
    assert b"\r" not in first["oof.csv"]
    assert first["oof.csv"] == (project.root / "oof" / "vit" / "oof.csv").read_bytes()


def test_a_column_split_scores_its_validation_and_its_test_part(project):
    fold = np.repeat([-1, 0, -2], 20)
    project.folds = Folds(project.ids, fold, project.folds.group)
    project.kind = "column"
    test_ids = np.concatenate([project.test_ids, project.ids[fold == -2]])
    with project.open("vit") as folder:
        unit = project.unit(0, test_ids=test_ids)
        folder.save_unit(unit)
        record = project.complete(folder, [(0, 42)])
    run = load_run(folder.path)
    assert run.ids.tolist() == project.ids[fold == 0].tolist()
    assert record["score"] == METRICS["accuracy"].score(run.labels, run.probs)
    right = unit.test_probs[12:].argmax(axis=1) == project.labels[fold == -2]
    assert record["test_score"] == right.mean()
    assert record["test_standard_error"] > 0
    assert record["n_scored"] == 20


def test_a_column_split_whose_test_part_was_not_predicted_is_refused(project):
    project.folds = Folds(project.ids, np.repeat([-1, 0, -2], 20), project.folds.group)
    project.kind = "column"
    with project.open("vit") as folder:
        folder.save_unit(project.unit(0))
        with pytest.raises(RecordError) as error:
            project.complete(folder, [(0, 42)])
    assert "test.csv lacks 20 ids of the labelled test part, such as 41" in message(error)


def test_a_run_on_everything_has_no_score(project):
    project.folds = Folds(project.ids, np.full(60, -1), project.folds.group)
    project.kind = "full"
    with project.open("vit") as folder:
        folder.save_unit(project.unit(0))
        record = project.complete(folder, [(0, 42)])
    assert record["score"] is None
    assert not (folder.path / "oof.csv").exists()
    run = load_run(folder.path)
    assert (len(run.ids), len(run.test_ids), run.probs.shape) == (0, 12, (0, 3))


def test_a_run_that_lacks_a_unit_is_not_completed(project):
    with project.open("vit") as folder:
        folder.save_unit(project.unit(0))
        folder.save_unit(project.unit(2))
        with pytest.raises(RecordError) as error:
            project.complete(folder, [(0, 42), (2, 42)])
    assert message(error) == (
        "oof/vit: is not complete: 2 of 3 units; missing: fold 1 seed 42\n"
        "  fix: run the experiment again: it goes on from here\n"
        "1 error; nothing was written."
    )
    with pytest.raises(RecordError, match="is not complete: 2 of 3 units"):
        load_run(folder.path)


def test_units_of_other_ids_or_labels_are_not_completed(project):
    with project.open("vit") as folder:
        good = project.unit(0)
        folder.save_unit(replace(good, val_labels=(good.val_labels + 1) % 3))
        folder.save_unit(project.unit(1, test_ids=project.test_ids[:5]))
        folder.save_unit(project.unit(2))
        with pytest.raises(RecordError) as error:
            project.complete(folder, UNITS)
    assert "oof/vit/fold0/seed42: val.csv does not hold the 21 ids of fold 0 with their labels" in message(error)
    assert "oof/vit/fold1/seed42: test.csv does not hold the same ids as that of fold0/seed42" in message(error)
    assert "2 errors" in message(error)


# --- going on, redoing, refusing


def test_a_run_goes_on_where_it_stopped(project):
    with project.open("vit") as folder:
        started = folder.started
        folder.save_unit(project.unit(0))
    with project.open("vit") as folder:
        assert folder.finished(0, 42) is not None
        assert (folder.attempt, folder.started, folder.record) == (1, started, None)


def test_another_spec_under_the_same_name_is_refused(project):
    project.keep("vit_mixup")
    with pytest.raises(RecordError) as error:
        project.open("vit_mixup", spec={"name": "vit_mixup", "seeds": [42], "optim": {"lr": 0.0003}})
    assert message(error) == (
        "oof/vit_mixup: holds a run of another spec:\n"
        "  optim.lr: 0.0002 -> 0.0003\n"
        "  fix: give this one a name (NAME=...), or redo it with --fresh\n"
        "1 error; nothing was written."
    )
    assert load_run(project.root / "oof" / "vit_mixup").info["score"] > 0


def test_another_context_is_refused_with_every_difference(project):
    with project.open("vit"):
        pass
    with pytest.raises(RecordError) as error:
        project.open("vit", inputs_sha256="2" * 64, classes=("angry", "happy"), smoke=True)
    assert "oof/vit: holds a run of another context:\n" in message(error)
    for line in ("smoke: false -> true", f"inputs_sha256: {'1' * 64} -> {'2' * 64}", "classes: [angry, happy, sad"):
        assert f"\n  {line}" in message(error)
    assert "fix: put back what it was made with, or redo it with --fresh" in message(error)


def test_a_refused_folder_is_left_unlocked(project):
    with project.open("vit"):
        pass
    with pytest.raises(RecordError):
        project.open("vit", inputs_sha256="2" * 64)
    project.open("vit").close()


def test_a_committed_run_is_known_by_its_record_on_another_machine(project):
    project.keep("vit")
    path = project.root / "oof" / "vit"
    for name in (".state.json", "fold0", "fold1", "fold2"):
        shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
    with project.open("vit") as folder:
        assert folder.attempt == 1
        assert folder.record["score"] == load_run(path).info["score"]
    (path / ".state.json").unlink()
    with pytest.raises(RecordError, match="holds a run of another context"):
        project.open("vit", inputs_sha256="2" * 64)


def test_fresh_deletes_everything_and_counts_the_attempt(project):
    project.keep("vit")
    path = project.root / "oof" / "vit"
    (path / "report").mkdir()
    (path / "report" / "page.html").write_text("old")
    spec = {"name": "vit", "seeds": [42], "optim": {"lr": 0.5}}
    with project.open("vit", spec=spec, fresh=True, inputs_sha256="2" * 64) as folder:
        assert folder.attempt == 2
        assert folder.record is None
        assert sorted(child.name for child in path.iterdir() if child.name != ".lock") == [".state.json", "spec.yaml"]
        assert "0.5" in (path / "spec.yaml").read_text()
    with project.open("vit", spec=spec, fresh=True) as folder:
        assert folder.attempt == 3


def test_fresh_counts_on_from_a_committed_record(project):
    project.keep("vit")
    project.open("vit", fresh=True).close()
    project.keep("vit")
    (project.root / "oof" / "vit" / ".state.json").unlink()
    with project.open("vit", fresh=True) as folder:
        assert folder.attempt == 3


def test_a_kill_while_clearing_is_finished_by_the_next_open(project, monkeypatch):
    project.keep("vit")
    path = project.root / "oof" / "vit"

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_clear", killed)
    with pytest.raises(KeyboardInterrupt):
        project.open("vit", fresh=True)
    monkeypatch.undo()
    with project.open("vit") as folder:
        assert folder.attempt == 2
        assert folder.finished(0, 42) is None
        assert not (path / "run.json").exists()
    with project.open("vit") as folder:
        assert folder.attempt == 2


def test_a_study_in_the_folder_is_no_hindrance_and_outlives_a_fresh_run(project):
    table = project.root / "oof" / "vit" / "tune" / "trials.csv"
    table.parent.mkdir(parents=True)
    table.write_text("number,state\n")
    for fresh in (False, True):
        with project.open("vit", fresh=fresh):
            assert table.read_text() == "number,state\n"


def test_files_without_a_spec_are_not_deleted_unasked(project):
    path = project.root / "oof" / "vit"
    path.mkdir(parents=True)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(RecordError, match=r"holds files but no spec\.yaml"):
        project.open("vit")
    assert (path / "notes.txt").exists()
    project.open("vit", fresh=True).close()
    assert not (path / "notes.txt").exists()


def test_a_second_open_is_refused(project):
    with project.open("vit"), pytest.raises(RecordError) as error:
        project.open("vit")
    assert message(error).startswith("oof/vit: is being run by another process\n")
    project.open("vit").close()


def test_another_process_is_refused(project):
    program = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    path = project.root / "oof" / "vit"
    path.mkdir(parents=True)
    command = [sys.executable, "-c", program, str(path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(RecordError, match="is being run by another process"):
            project.open("vit")
        process.kill()
    project.open("vit").close()


# --- a kill at any moment


@pytest.mark.slow
def test_a_kill_between_any_two_writes_never_leaves_a_wrong_run(project, monkeypatch):
    """Kill the run before each of its writes in turn, go on, and compare with the run that was never killed."""
    project.keep("whole")
    expected = load_run(project.root / "oof" / "whole")
    write = store.atomic_write
    kills = 0
    for moment in range(1, 30):
        writes = 0

        def killing(path, content, moment=moment):
            nonlocal writes
            writes += 1
            if writes == moment:
                raise KeyboardInterrupt
            write(path, content)

        monkeypatch.setattr(store, "atomic_write", killing)
        try:
            project.keep(f"run{moment}")
        except KeyboardInterrupt:
            kills += 1
            path = project.root / "oof" / f"run{moment}"
            with pytest.raises(RecordError, match="is not complete"):
                load_run(path)
            (path / ".oof.csv.abc.tmp").write_text("half a file")
            monkeypatch.setattr(store, "atomic_write", write)
            with project.open(f"run{moment}") as folder:
                for fold, seed in UNITS:
                    if folder.finished(fold, seed) is None:
                        folder.save_unit(project.unit(fold))
                assert folder.notes == []
                assert not list(path.rglob("*.tmp"))
                project.complete(folder, UNITS)
            run = load_run(path)
            assert run.probs.tobytes() == expected.probs.tobytes()
            assert run.info["score"] == expected.info["score"]
    assert kills == 18


def test_a_complete_run_is_incomplete_while_a_unit_or_its_files_change(project, monkeypatch):
    project.keep("vit")
    path = project.root / "oof" / "vit"

    def killed(*_):
        raise KeyboardInterrupt

    with project.open("vit") as folder:
        monkeypatch.setattr(store, "atomic_write", killed)
        with pytest.raises(KeyboardInterrupt):
            project.complete(folder, UNITS)
        assert not (path / "run.json").exists()
        monkeypatch.undo()
        project.complete(folder, UNITS)
        folder.save_unit(project.unit(0, salt=1))
        assert not (path / "run.json").exists()


# --- reading kept runs


def reseal(path, **changes):
    """Make `run.json` vouch for the files as they are."""
    info = json.loads((path / "run.json").read_text())
    info["hashes"] |= {key: store.sha256_file(path / f"{key}.csv") for key in ("oof", "test")}
    (path / "run.json").write_text(json.dumps(info | changes))


def test_a_run_reads_back_with_all_its_parts(project):
    record = project.keep("vit")
    run = load_run(project.root / "oof" / "vit")
    assert (run.name, run.info, run.classes) == ("vit", record, ("angry", "happy", "sad, or so"))
    assert run.labels.tolist() == project.labels.tolist()
    assert run.labels.dtype == run.fold.dtype == np.int64
    assert run.probs.dtype == run.test_probs.dtype == np.float64
    assert run.test_ids.tolist() == project.test_ids.tolist()


@pytest.mark.parametrize("name", ["oof.csv", "test.csv", "spec.yaml"])
def test_a_file_that_was_changed_by_hand_is_refused(project, name):
    project.keep("vit")
    path = project.root / "oof" / "vit" / name
    path.write_text(path.read_text().replace("0", "1", 1))
    with pytest.raises(RecordError) as error:
        load_run(path.parent)
    assert message(error) == (
        f"oof/vit/{name}: is not the file that run.json vouches for: it was changed after the run\n"
        "  fix: take it back with git, or redo it with --fresh\n"
        "1 error; nothing was written."
    )


def test_all_files_that_are_missing_are_named(project):
    project.keep("vit")
    for name in ("oof.csv", "test.csv"):
        (project.root / "oof" / "vit" / name).unlink()
    with pytest.raises(RecordError) as error:
        load_run(project.root / "oof" / "vit")
    assert "oof/vit/oof.csv: is missing" in message(error)
    assert "oof/vit/test.csv: is missing" in message(error)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda frame: frame.assign(id="7"), "oof.csv: the id 7 is there more than once"),
        (lambda frame: frame.assign(p_happy="nan"), "oof.csv: the probabilities of id 1 are not finite"),
        (lambda frame: frame.assign(p_happy="2"), "oof.csv: the probabilities of id 1 do not sum to 1 (2."),
        (lambda frame: frame.assign(p_happy="much"), "oof.csv: could not convert string to float: 'much'"),
        (lambda frame: frame.assign(label="hapy"), "oof.csv: unknown label 'hapy'; the classes are angry, happy, sad"),
        (
            lambda frame: frame[["id", "fold", "label", "p_happy", "p_angry", "p_sad, or so"]],
            "oof.csv: the columns must be id,fold,label,p_angry,p_happy,p_sad, or so, but are id,fold,label,p_happy",
        ),
        (lambda frame: frame.assign(label="happy"), "run.json: the score is"),
        (lambda frame: frame.iloc[:0, :0], "oof.csv:"),
    ],
)
def test_what_cannot_be_a_run_is_refused_even_under_its_seal(project, change, expected):
    project.keep("vit")
    path = project.root / "oof" / "vit"
    change(pd.read_csv(path / "oof.csv", dtype=str)).to_csv(path / "oof.csv", index=False)
    reseal(path)
    with pytest.raises(RecordError) as error:
        load_run(path)
    assert message(error).startswith(f"oof/vit: {expected}")


def test_short_rows_and_empty_files_are_refused(project):
    project.keep("vit")
    path = project.root / "oof" / "vit"
    with (path / "test.csv").open("a") as file:
        file.write("99,0.5\n")
    reseal(path)
    with pytest.raises(RecordError, match=r"test\.csv:14: 4 cells must be there, but got 2"):
        load_run(path)
    (path / "test.csv").write_text("")
    reseal(path)
    with pytest.raises(RecordError, match=r"test\.csv: is empty"):
        load_run(path)


def test_records_of_another_version_or_with_conflict_marks_are_refused(project):
    project.keep("vit")
    path = project.root / "oof" / "vit"
    reseal(path, schema_version=2)
    with pytest.raises(RecordError, match=r"another version of Foldwise \(schema 2, here 1\)"):
        load_run(path)
    (path / "run.json").write_text("<<<<<<< HEAD\n{}\n")
    with pytest.raises(RecordError, match=r"oof/vit/run\.json: is not readable as JSON"):
        load_run(path)
    (path / "run.json").write_text('{"schema_version": 1}')
    with pytest.raises(RecordError, match=r"oof/vit/run\.json: lacks the key 'classes'"):
        load_run(path)


def test_a_folder_without_a_record_is_not_complete(project):
    (project.root / "oof" / "vit").mkdir(parents=True)
    with pytest.raises(RecordError) as error:
        load_run(project.root / "oof" / "vit")
    assert message(error) == (
        "oof/vit: is not complete: it has no run.json\n  fix: make exp EXP=vit\n1 error; nothing was written."
    )


def test_listed_runs_are_those_that_may_be_blended_and_the_others_say_why(project):
    project.keep("b_good")
    project.keep("a_good")
    project.keep("other", competition="faces")
    project.keep("smoke", smoke=True)
    project.keep("old", folds_sha256="9" * 64)
    for name, version in (("clear", VERSION), ("half_clear", VERSION - 1)):
        guard = {"version": version, "threshold": THRESHOLD, "clear_of": {}}
        project.keep(name, info={"command": "make exp", "leak_guard": guard})
    project.open("begun").close()
    project.keep("edited")
    with (project.root / "oof" / "edited" / "oof.csv").open("a") as file:
        file.write("\n")
    (project.root / "oof" / "empty").mkdir()
    (project.root / "oof" / ".smoke").mkdir()
    holdout = Folds(project.ids, np.repeat([-1, 0], 30), project.folds.group)
    project.folds, project.kind, before = holdout, "holdout", project.folds
    with project.open("held", folds_sha256=before.sha256) as folder:
        folder.save_unit(project.unit(0))
        project.complete(folder, [(0, 42)])
    runs, skipped = list_runs(project.root, "toy")
    assert [run.name for run in runs] == ["a_good", "b_good", "clear"]
    assert skipped == [
        "begun: is not complete: 0 of 3 units",
        "edited: is not the file that run.json vouches for: it was changed after the run",
        "half_clear: was kept clear of copies by another measure of likeness than today's; train it again",
        "held: has no out-of-fold predictions for every image (split kind holdout)",
        "old: was made on other folds (99999999, now " + before.sha256[:8] + ")",
        "other: is of competition faces",
        "smoke: is a smoke run",
    ]


def test_each_source_of_a_merged_set_is_scored_apart(project):
    sources = np.array(["web", "lab", "web"] * 20)
    with project.open("vit") as folder:
        for fold in range(3):
            folder.save_unit(project.unit(fold))
        record = folder.complete(
            [(fold, 42) for fold in range(3)],
            folds=project.folds, labels=project.labels, metric=METRICS["accuracy"], info={}, sources=sources,
        )  # fmt: skip
    oof = pd.read_csv(folder.path / "oof.csv", dtype={"id": str}).set_index("id").loc[project.ids]
    predicted = oof.filter(like="p_").to_numpy().argmax(axis=1)
    for name in ("lab", "web"):
        part = sources == name
        told = record["source_scores"][name]
        assert (told["score"], told["n_scored"]) == ((predicted == project.labels)[part].mean(), part.sum())
        assert 0 < told["standard_error"] < 0.2
    assert set(record["source_scores"]) == {"lab", "web"}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"source": "faces", "images": 12345, "weight": 1.0, "inputs_sha256": "ab"}, "faces (12,345 images)"),
        ({"source": "faces", "images": 9, "weight": 0.25, "inputs_sha256": "ab"}, "faces (9 images, weight 0.25)"),
        ({"source": "faces", "by": "run:pre", "inputs_sha256": "ab"}, "faces (by run:pre)"),
        ({"source": "faces"}, "faces"),
        ("faces", "faces"),
    ],
)
def test_external_data_in_words(entry, words):
    assert external_words([entry, entry]) == [words, words]
