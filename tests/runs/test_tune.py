"""A study from its first trial to its tables: what is trained, judged, failed, given back and never trained again."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
from filelock import FileLock
from optuna.trial import TrialState

from foldwise.data.ingest import ingest
from foldwise.errors import DeviceError, FoldwiseError
from foldwise.records.study import read_study
from foldwise.runs import crossval, executors
from foldwise.runs.events import (
    EpochDone,
    Message,
    TrialDone,
    TrialEvent,
    TrialStarted,
    TuneDone,
    TuneStarted,
    UnitDone,
)
from foldwise.runs.study import set_key
from foldwise.spec.space import own_values

GOOD, HOPELESS = 1e-2, 1e-9
TWO = {"optim.lr": {"choices": (GOOD, HOPELESS)}}


def trained(recorder: Any) -> list[tuple[str, int, int]]:
    """(stage, trial, fold) of every epoch that was trained."""
    events = [event for event in recorder.events if isinstance(event, TrialEvent)]
    return [(event.stage, event.number, event.event.fold) for event in events if isinstance(event.event, EpochDone)]


def ended(recorder: Any, stage: str = "search") -> list[TrialDone]:
    return [event for event in recorder.events if isinstance(event, TrialDone) and event.stage == stage]


def good(**tune: Any) -> dict[str, Any]:
    """A spec that learns, in a grid of two, the other of which does not."""
    return {"changes": {"optim": {"lr": GOOD}}, "sampler": "grid", "space": TWO, "trials": 2} | tune


def study_of(tuning: Any) -> optuna.Study:
    return optuna.load_study(study_name=f"demo/{tuning.name}", storage=f"sqlite:///{tuning.path}/study.db")


# A study --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_tells_what_it_does(tuning: Any) -> None:
    followers = []

    def follow(path: Path) -> list[Any]:
        assert path == tuning.path
        followers.append(type(screen)())
        return followers

    spec = tuning.spec(trials=3, finalists=1)
    _, screen = tuning.run(tuning.spec(trials=1))
    info, screen = tuning.run(spec, follow)
    (follower,) = followers
    assert follower.events == screen.events
    assert (follower.closed, screen.closed) == (1, 1)
    started, *_, done = screen.events
    assert isinstance(started, TuneStarted)
    assert (started.trials, started.folds, started.epochs, started.metric) == (3, (0, 1), 1, "accuracy")
    assert [row.number for row in started.finished] == [0]
    assert started.finished[0].parameters == own_values(spec)
    assert isinstance(done, TuneDone)
    assert done.info == info
    assert [
        (event.number, event.stage, event.folds, event.epochs)
        for event in screen.events
        if isinstance(event, TrialStarted)
    ][:2] == [
        (1, "search", (0, 1), 1),
        (2, "search", (0, 1), 1),
    ]
    (full,) = ended(screen, "full")
    assert sorted(full.fold_scores) == [0, 1, 2, 3, 4]
    units = [
        event.event for event in screen.events if isinstance(event, TrialEvent) and isinstance(event.event, UnitDone)
    ]
    assert len(units) == 2 * 2 + 5
    assert trained(screen) == [("search", 1, 0), ("search", 1, 1), ("search", 2, 0), ("search", 2, 1)] + [
        ("full", full.number, fold) for fold in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)
    ]


@pytest.mark.slow
def test_the_own_values_come_first_and_the_tables_are_what_the_units_say(tuned: Any) -> None:
    study = read_study(tuned.path)
    spec = tuned.spec(changes={"optim": {"lr": 1e-5}}, trials=6, finalists=2)
    assert study.trials[0].parameters == own_values(spec)
    assert len({set_key(trial.parameters) for trial in study.trials}) == len(study.trials) == 6
    for trial in study.trials:
        folder = tuned.path / set_key(trial.parameters)
        parts = [pd.read_csv(folder / f"fold{fold}" / "seed42" / "val.csv", dtype={"id": str}) for fold in (0, 1)]
        hits = [part[["p_dark", "p_light"]].idxmax(axis=1).str.removeprefix("p_") == part["label"] for part in parts]
        assert trial.fold_scores == {fold: hits[fold].mean() for fold in (0, 1)}
        assert trial.score == pd.concat(hits).mean()


@pytest.mark.slow
def test_a_finished_study_is_not_trained_again_and_goes_on_when_more_is_asked_for(
    retuning: Any, tmp_path: Path
) -> None:
    """And so do the trials of an earlier call: one after another in three calls, or all in one, they are the same."""
    spec = retuning.spec(changes={"optim": {"lr": 1e-5}}, trials=6, finalists=2)
    before, units = (retuning.path / "tune.json").read_text(), retuning.units()
    info, screen = retuning.run(spec)
    assert info is not None
    assert trained(screen) == []
    assert retuning.units() == units
    assert (retuning.path / "tune.json").read_text() == before
    figures = retuning.figures()

    _, screen = retuning.run(spec, trials=7)
    assert retuning.figures()[:7] == figures
    assert len(retuning.figures()) == 8
    assert {number for stage, number, _ in trained(screen) if stage == "search"} == {6}
    assert retuning.units().items() >= units.items()
    seven = retuning.figures()

    retuning.run(spec, trials=2, fresh=True)
    assert retuning.figures() == figures[:3]
    assert not set(retuning.units().items()) & set(units.items())
    for trials in (5, 7):
        retuning.run(spec, trials=trials)
    assert retuning.figures() == seven


def test_a_small_space_ends_with_a_note(tuning: Any) -> None:
    info, screen = tuning.run(
        tuning.spec(**good(trials=9, prune={"folds": False}, fidelity={"epochs": 1, "folds": (0,)}))
    )
    assert info is not None
    assert info["trials"] == {"distinct": 2, "complete": 2, "pruned": 0, "failed": 0, "duplicate": 0}
    assert screen.said == ["the space holds no more than 2 parameter sets"]
    assert len(trained(screen)) == 2


@pytest.mark.slow
def test_a_repetition_is_told_and_trains_nothing(tuning: Any) -> None:
    spec = tuning.spec(trials=2, fidelity={"epochs": 1, "folds": (0,)})
    tuning.run(spec)
    study = study_of(tuning)
    study.enqueue_trial(study.trials[1].params)
    info, screen = tuning.run(spec, trials=3)
    assert info is not None
    assert (info["trials"]["distinct"], info["trials"]["duplicate"]) == (3, 1)
    assert {number for _, number, _ in trained(screen)} == {3}
    rows = read_study(tuning.path).trials
    assert (rows[2].state, rows[2].reason, rows[2].score) == (
        "duplicate",
        "the same parameters as trial 1",
        rows[1].score,
    )


# The judge ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hopeless_trial_is_ended_after_its_first_fold_by_its_own_images(tuning: Any) -> None:
    info, screen = tuning.run(tuning.spec(**good()))
    assert info is not None
    _, pruned = ended(screen)
    assert (pruned.state, list(pruned.fold_scores)) == ("pruned", [0])
    assert ("search", pruned.number, 1) not in trained(screen)
    told = re.fullmatch(r"after fold 0: (\S+) \+- (\S+) to the best, below (\S+)", pruned.reason)
    assert told is not None
    gain, error, limit = map(float, told.groups())
    assert gain < limit < 0
    parts = []
    for lr in (HOPELESS, GOOD):
        file = tuning.path / set_key({"optim.lr": lr}) / "fold0" / "seed42" / "val.csv"
        table = pd.read_csv(file, dtype={"id": str}).set_index("id")
        parts.append(table[["p_dark", "p_light"]].idxmax(axis=1).str.removeprefix("p_") == table["label"])
    hopeless, best = parts
    paired = hopeless.astype(int) - best.loc[hopeless.index].astype(int)
    assert f"{paired.mean():+.4f}" == told[1]
    # The images' part of the error, as the bootstrap tends to; the seeds' part comes from the own values' second seed.
    images = paired.std(ddof=0) / len(paired) ** 0.5
    assert error == pytest.approx((images**2 + 2 * info["seed_sd"] ** 2) ** 0.5, rel=0.1)
    assert info["fold_trainings"] == {"done": 3, "possible": 4, "saved": 0.25}

    states = {trial.state for trial in study_of(tuning).trials}
    assert states == {TrialState.COMPLETE, TrialState.PRUNED}
    units = tuning.units()
    _, screen = tuning.run(tuning.spec(**good()))
    assert trained(screen) == []
    assert tuning.units() == units


def test_nothing_is_ended_where_that_is_said(tuning: Any) -> None:
    info, screen = tuning.run(tuning.spec(**good(prune={"folds": False})))
    assert info is not None
    assert [(done.state, sorted(done.fold_scores)) for done in ended(screen)] == [("complete", [0, 1])] * 2
    assert ended(screen)[0].score > ended(screen)[1].score
    assert info["seed_sd"] is None
    assert not (tuning.path / "seeds").exists()


@pytest.mark.slow
def test_what_a_seed_does_is_measured_once(tuning: Any) -> None:
    info, screen = tuning.run(tuning.spec(**good(trials=1)))
    assert info is not None
    (seeds,) = ended(screen, "seeds")
    (own,) = ended(screen)
    assert (seeds.number, seeds.parameters) == (-1, own.parameters)
    assert (tuning.path / "seeds" / "fold0" / "seed43" / "unit.json").exists()
    most = (sum((own.fold_scores[fold] - seeds.fold_scores[fold]) ** 2 for fold in (0, 1)) / 4) ** 0.5
    assert 0 <= info["seed_sd"] <= most
    _, screen = tuning.run(tuning.spec(**good()))
    assert ended(screen, "seeds") == []


@pytest.mark.slow
def test_the_median_of_the_epochs_ends_a_trial_in_its_first_fold(tuning: Any) -> None:
    space = {"optim.lr": {"low": HOPELESS, "high": 1.1e-2}}
    spec = tuning.spec(
        changes={"optim": {"lr": GOOD}},
        space=space,
        sampler="random",
        trials=5,
        fidelity={"epochs": 3, "folds": (0, 1)},
        prune={"folds": False, "epochs": "median"},
    )
    tuning.run(spec)
    study_of(tuning).enqueue_trial({"optim.lr": HOPELESS})
    info, screen = tuning.run(spec, trials=6)
    assert info is not None
    (done,) = ended(screen)
    assert (done.state, done.fold_scores, done.score) == ("pruned", {}, None)
    assert done.reason == "fold 0 was stopped after epoch 1 by `prune.epochs: median`"
    assert trained(screen) == [("search", 5, 0)]
    last = study_of(tuning).trials[-1]
    assert (last.state, list(last.intermediate_values)) == (TrialState.PRUNED, [1])
    assert not list(tuning.path.rglob(".stop"))
    assert read_study(tuning.path).trials[5].reason == done.reason
    _, screen = tuning.run(spec, trials=7)
    assert {number for _, number, _ in trained(screen)} == {6}, "the study goes on"


@pytest.mark.slow
def test_hyperband_ends_trials_by_a_loss(tuning: Any) -> None:
    """Of log loss, whose column in the history has another name, and where less is better."""
    competition = tuning.root / "inputs" / "demo" / "competition.yaml"
    competition.write_text(competition.read_text().replace("metric: accuracy", "metric: log_loss"))
    spec = tuning.spec(
        changes={"optim": {"lr": GOOD}},
        space={"optim.lr": {"low": HOPELESS, "high": 1e-1, "log": True}},
        sampler="random",
        trials=7,
        fidelity={"epochs": 4, "folds": (0,)},
        prune={"epochs": "hyperband"},
    )
    info, screen = tuning.run(spec)
    assert info is not None
    done = ended(screen)
    assert {row.state for row in done} == {"complete", "pruned"}
    for row in done:
        epochs = len([1 for stage, number, _ in trained(screen) if (stage, number) == ("search", row.number)])
        assert (epochs < 4) == (row.state == "pruned")
    complete = [row for row in done if row.state == "complete"]
    assert info["best"]["score"] == min(row.score for row in complete)
    assert all(trial.state.is_finished() for trial in study_of(tuning).trials)


# What goes wrong ------------------------------------------------------------------------------------------------------


def exhausting(monkeypatch: pytest.MonkeyPatch, condition: Any) -> None:
    """Let a network that fulfils a condition be too large for the memory."""
    build = crossval.build_model

    def full(model: Any, **given: Any) -> Any:
        if condition(model):
            raise torch.OutOfMemoryError
        return build(model, **given)

    monkeypatch.setattr(crossval, "build_model", full)


@pytest.mark.slow
def test_a_trial_that_diverges_or_does_not_fit_fails_with_its_parameters_and_the_study_goes_on(
    tuning: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exhausting(monkeypatch, lambda model: model.dropout == 0.5)
    space = {"optim.lr": {"choices": (GOOD, 1e6)}, "model.dropout": {"choices": (0.0, 0.5)}}
    changes = {"optim": {"lr": GOOD, "name": "sgd"}}
    spec = tuning.spec(changes=changes, space=space, sampler="grid", trials=4, fidelity={"folds": (0, 1)})
    info, screen = tuning.run(spec)
    assert info is not None
    assert info["trials"] == {"distinct": 4, "complete": 1, "pruned": 0, "failed": 3, "duplicate": 0}
    rows = {tuple(row.parameters.values()): row for row in read_study(tuning.path).trials}
    assert rows[GOOD, 0.0].state == "complete"
    assert "(fold 0, seed 42)" in rows[1e6, 0.0].reason
    for lr in (GOOD, 1e6):
        assert rows[lr, 0.5].reason.startswith("out of memory on cpu in fold 0: batches of 16 images at 32 px")
    assert {done.state for done in ended(screen)} == {"complete", "failed"}
    _, screen = tuning.run(spec)
    assert trained(screen) == [], "it would fail again"


def test_the_own_values_under_another_seed_may_fail(tuning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train_unit = executors.train_unit

    def failing(*given: Any, **named: Any) -> Any:
        if given[5] == 43:
            raise DeviceError("out of memory")
        return train_unit(*given, **named)

    monkeypatch.setattr(executors, "train_unit", failing)
    info, screen = tuning.run(tuning.spec(**good()))
    assert info is not None
    assert (info["seed_sd"], info["trials"]["complete"]) == (None, 2), "nothing is pruned without it"
    assert [done.state for done in ended(screen, "seeds")] == ["failed"]


@pytest.mark.slow
def test_a_finalist_that_does_not_fit_in_full_leaves_the_others(tuning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train_unit = executors.train_unit
    failing: list[float] = [GOOD]

    def in_full(spec: Any, *given: Any, **named: Any) -> Any:
        if spec.train.epochs == 2 and spec.optim.lr in failing:
            raise DeviceError("out of memory")
        return train_unit(spec, *given, **named)

    monkeypatch.setattr(executors, "train_unit", in_full)
    spec = tuning.spec(**good(finalists=2, prune={"folds": False}))
    info, screen = tuning.run(spec)
    assert info is not None
    assert [(done.parameters["optim.lr"], done.state) for done in ended(screen, "full")] == [
        (GOOD, "failed"),
        (HOPELESS, "complete"),
    ]
    assert info["winner"] == {"optim.lr": HOPELESS}
    failing.append(HOPELESS)
    with pytest.raises(FoldwiseError) as caught:
        tuning.run(spec, fresh=True)
    assert str(caught.value) == (
        "none of the finalists of `tiny` could be trained in full\n"
        "  fix: their reasons are above; a greater `tune.finalists` lets more trials try"
    )
    failing.clear()
    info, _ = tuning.run(spec)
    assert info is not None
    assert info["winner"] == {"optim.lr": GOOD}


@pytest.mark.slow
@pytest.mark.parametrize("error", [FoldwiseError("the disk is full"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_whatever_else_stops_the_study_gives_the_trial_back(
    tuning: Any, tuned: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    spec = tuning.spec(changes={"optim": {"lr": 1e-5}}, trials=6)
    train_unit, left = executors.train_unit, [3, 0, 1, 2]

    def failing(*given: Any, **named: Any) -> Any:
        if left and not left[0]:
            raise error
        unit = train_unit(*given, **named)
        if left:
            left[0] -= 1
        return unit

    monkeypatch.setattr(executors, "train_unit", failing)
    units: dict[str, int] = {}
    while left:  # the second call comes no further than the first, which is no death
        with pytest.raises(type(error)):
            tuning.run(spec)
        assert tuning.units().items() >= units.items()
        units = tuning.units()
        assert {trial.state for trial in study_of(tuning).trials} <= {
            TrialState.COMPLETE,
            TrialState.FAIL,
            TrialState.WAITING,
        }
        del left[0]
    info, screen = tuning.run(spec)
    assert info is not None
    assert tuning.units().items() >= units.items()
    assert (info["trials"]["distinct"], info["trials"]["failed"]) == (6, 0)
    assert tuning.figures() == tuned.figures()
    assert [event for event in screen.events if isinstance(event, Message)] == []


@pytest.mark.slow
def test_a_trial_that_died_twice_in_a_fold_is_left_behind(tuning: Any) -> None:
    """What a storage shows of a process that is gone: a running trial whose folder nobody has locked."""
    spec = tuning.spec(trials=2, fidelity={"epochs": 1, "folds": (0,)})
    tuning.run(spec)
    study, died = study_of(tuning), {"optim.lr": 2e-3, "model.dropout": 0.2, "mix.prob": 0.0}
    for last in (False, True):
        trial = study.ask()
        trial.set_user_attr("values", died)
        trial.set_user_attr("set", set_key(died))
        if not last:
            study._storage.set_trial_user_attr(trial._trial_id, "fate", "died")
            study._storage.set_trial_user_attr(trial._trial_id, "kept", 0)
            study.tell(trial, state=TrialState.FAIL)
    info, screen = tuning.run(spec, trials=4)
    assert info is not None
    assert screen.said == ["trial 3 failed: its process died twice in the same fold"]
    assert {number for _, number, _ in trained(screen)} == {4}
    assert info["trials"] == {"distinct": 4, "complete": 3, "pruned": 0, "failed": 1, "duplicate": 0}
    assert read_study(tuning.path).trials[2].parameters == died


# Kills ----------------------------------------------------------------------------------------------------------------

TWELVE = {"trials": 12, "finalists": 1, "fidelity": {"epochs": 1, "folds": (0,)}, "changes": {"optim": {"lr": 1e-5}}}


@pytest.fixture(scope="module")
def undisturbed(shades_root: Path, tuned: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A study of twelve trials in one piece."""
    root = shutil.copytree(shades_root, tmp_path_factory.mktemp("undisturbed") / "project")
    whole = type(tuned)(type(tuned.project)(root))
    whole.run(whole.spec(**TWELVE))
    return whole


# Only the process itself can stop at the same moment on every machine. Such moments are the steps of an optimizer, and
# just before and just after a file is put in its place, which `os.replace` does for all of them.
STOPPING = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

stop, units, moments = map(int, sys.argv[1:4])
del sys.argv[:4]
replace = os.replace

def pass_moment(*_):
    global moments
    if units <= 0:
        moments -= 1
        if moments == 0:
            os.kill(os.getpid(), stop)

def telling(source, target):
    global units
    pass_moment()
    replace(source, target)
    units -= os.path.basename(target) == "unit.json"
    pass_moment()

os.replace = telling
register_optimizer_step_post_hook(pass_moment)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# The moments after a unit was kept: as the next trial is begun, as it is trained, and as its files are written.
BEGINNING, TRAINING, WRITING = range(1, 6), range(6, 10), range(10, 21)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == ""
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "stops"),
    [
        (None, ((signal.SIGKILL, TRAINING), (signal.SIGKILL, WRITING))),
        ("journal:oof/tiny/tune/study.log", ((signal.SIGKILL, BEGINNING), (signal.SIGINT, TRAINING))),
    ],
    ids=["sqlite", "journal"],
)
def test_a_study_that_was_stopped_twice_ends_as_if_it_was_not(
    tuning: Any,
    undisturbed: Any,
    monkeypatch: pytest.MonkeyPatch,
    storage: str | None,
    stops: tuple[tuple[signal.Signals, range], ...],
) -> None:
    tuning.write(tuning.spec(**TWELVE))
    given = ["--storage", storage] if storage else []
    drawn = random.Random(str(storage))
    units: dict[str, int] = {}
    for stop, moments in stops:
        left = len(undisturbed.units()) - len(units)
        more = drawn.randint(left // 4, left * 2 // 5)
        numbers = [int(stop), more, drawn.choice(moments)]
        process = tuning.start(*given, through=["-c", STOPPING, *map(str, numbers)])
        _, err = process.communicate(timeout=300)
        assert process.returncode == (130 if stop == signal.SIGINT else -stop)
        if stop == signal.SIGINT:
            assert err == "\nstopped; the same command goes on from the last finished epoch\n"
        assert tuning.units().items() >= units.items(), "what was trained was trained again"
        assert len(tuning.units()) == len(units) + more
        units = tuning.units()
        assert not (tuning.path / "tune.json").exists()
    finish(tuning.start(*given))
    assert tuning.units().items() >= units.items(), "what was trained was trained again"
    assert tuning.figures() == undisturbed.figures()
    assert set(tuning.units()) == set(undisturbed.units())
    found, expected = read_study(tuning.path).info, read_study(undisturbed.path).info
    for key in ("trials", "fold_trainings", "seed_sd", "winner", "corrected", "corrected_full", "tuned"):
        assert found[key] == expected[key], key
    for name in ("oof.csv", "test.csv"):
        files = [one.root / "oof" / "tiny_tuned" / name for one in (tuning, undisturbed)]
        assert files[0].read_bytes() == files[1].read_bytes()
    monkeypatch.chdir(tuning.root)
    _, screen = tuning.run(tuning.spec(**TWELVE), storage=storage)
    assert (trained(screen), screen.said) == ([], [])


# Executors ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_the_folds_that_one_gives(tuning: Any, tmp_path: Path) -> None:
    """Drawn at random, since other samplers learn from what is finished, which depends on who is faster."""
    other = type(tuning)(type(tuning.project)(shutil.copytree(tuning.root, tmp_path / "other")))
    spec = tuning.spec(trials=4, sampler="random", prune={"folds": False}, finalists=1)
    info, _ = tuning.run(spec)
    found, screen = other.run(spec, on="processes", workers=2)
    assert info is not None
    assert found is not None
    assert found["executor"] == "2 processes of 1 thread"
    header, *rows = tuning.figures()
    assert other.figures()[0] == header
    assert sorted(other.figures()[1:]) == sorted(rows)
    assert found["trials"] == info["trials"]
    assert len(trained(screen)) == 4 * 2 + 5 * 2
    vals = [path.relative_to(tuning.path) for path in tuning.path.glob("*/fold*/seed42/val.csv")]
    assert len(vals) == 4 * 2 + 5
    if found["winner"] == info["winner"]:  # of two that are equal the earlier one wins
        for name in vals:
            assert (tuning.path / name).read_bytes() == (other.path / name).read_bytes()


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_of_other_folds_or_another_spec_is_refused_with_the_difference(tuning: Any) -> None:
    spec = tuning.spec(trials=1, fidelity={"epochs": 1, "folds": (0,)})
    tuning.run(spec)
    units = tuning.units()
    fidelity = {"epochs": 1, "folds": (1, 0)}
    changed = tuning.spec(
        trials=1, fidelity=fidelity, space=TWO | {"model.dropout": {"low": 0.0, "high": 0.4, "step": 0.1}},
        changes={"optim": {"lr": GOOD}, "train": {"epochs": 3}},
    )  # fmt: skip
    with pytest.raises(FoldwiseError) as caught:
        tuning.run(changed)
    head, *lines, fix = str(caught.value).splitlines()
    assert head == "the study `demo/tiny` was made otherwise, and its trials cannot be compared with new ones:"
    assert fix == "  fix: change it back, or FRESH=1 (--fresh) deletes the study and begins anew"
    assert {line.split(":")[0].strip() for line in lines} >= {"spec.optim.lr", "spec.train.epochs"}
    assert any(line.startswith("  tune.fidelity.folds") for line in lines)
    assert any(line.startswith("  tune.space.optim.lr") for line in lines)
    assert tuning.units() == units

    folds = tuning.root / "inputs" / "demo" / "folds.csv"
    folds.unlink()
    competition = folds.with_name("competition.yaml")
    competition.write_text(competition.read_text().replace("seed: 42", "seed: 43"))
    ingest(tuning.root / "handout", tuning.root, "demo")
    with pytest.raises(FoldwiseError) as caught:
        tuning.run(spec)
    (line,) = str(caught.value).splitlines()[1:-1]
    assert re.fullmatch(r"  folds: [0-9a-f]{64} -> [0-9a-f]{64}", line)
    assert tuning.units() == units


@pytest.mark.slow
def test_what_says_only_how_to_search_may_change(tuning: Any) -> None:
    fidelity = {"epochs": 1, "folds": (0,)}
    tuning.run(tuning.spec(trials=1, fidelity=fidelity))
    info, _ = tuning.run(
        tuning.spec(trials=2, fidelity=fidelity, sampler="random", seed=3, finalists=1, prune={"error_rate": 0.2})
    )
    assert info is not None
    assert info["trials"]["distinct"] == 2


def test_a_study_that_others_work_on_does_not_begin_anew(retuning: Any) -> None:
    spec = retuning.spec(changes={"optim": {"lr": 1e-5}}, trials=6, finalists=2)
    units = retuning.units()
    (first, *_) = sorted(retuning.path.glob("*/.lock"))
    with FileLock(first), pytest.raises(FoldwiseError) as caught:
        retuning.run(spec, fresh=True)
    assert str(caught.value) == (
        "oof/tiny/tune is being worked on by another process, so it cannot begin anew\n  fix: wait for it, or stop it"
    )
    with pytest.raises(FoldwiseError, match="cannot be opened"):
        retuning.run(spec, fresh=True, storage="sqlite:////nowhere/at/all.db")
    assert retuning.units() == units, "nothing was deleted"


def test_what_cannot_be_searched_says_so(tuning: Any) -> None:
    for spec, options, told in (
        (
            tuning.project.spec("tiny"),
            {},
            "`tiny` has no `tune` section, so there is nothing to search\n"
            "  fix: give it `tune: {space: {optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}}}`; see docs/TUNING.md",
        ),
        (
            tuning.spec(fidelity={"folds": (1, 5, 7)}),
            {},
            "`tune.fidelity.folds` names fold 5, but `demo` has folds 0, 1, 2, 3, 4\n  fix: name some of these",
        ),
        (
            tuning.spec(),
            {"trials": 0},
            "`TRIALS >= 1` must hold, but got 0\n  fix: leave TRIALS (--trials) out",
        ),
    ):
        with pytest.raises(FoldwiseError) as caught:
            tuning.run(spec, **options)
        assert str(caught.value) == told
        assert not tuning.path.exists()


def test_a_split_without_a_score_cannot_be_searched(tuning: Any) -> None:
    tuning.project.describe("metric: accuracy", "split: {kind: full}")
    with pytest.raises(FoldwiseError) as caught:
        tuning.run(tuning.spec(fidelity={"epochs": 1}))
    assert str(caught.value) == (
        "`demo` validates no image (`split.kind: full`), so there is nothing to compare trials by\n"
        "  fix: another `split` in its competition.yaml"
    )


def test_a_study_whose_trials_all_fail_says_so(tuning: Any) -> None:
    spec = tuning.spec(
        trials=2, space={"optim.lr": {"low": 1e6, "high": 1e7}}, changes={"optim": {"lr": 1e6, "name": "sgd"}}
    )
    with pytest.raises(FoldwiseError) as caught:
        tuning.run(spec)
    assert str(caught.value) == (
        "no trial of `tiny` was completed: all 2 failed\n  fix: their reasons are above; FRESH=1 (--fresh) begins anew"
    )
