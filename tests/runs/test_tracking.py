"""W&B and TensorBoard as followers: what they keep, and that nothing of theirs reaches the training."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from foldwise.errors import FoldwiseError
from foldwise.runs.events import (
    EpochDone,
    Event,
    Listener,
    Message,
    RunDone,
    RunStarted,
    StepDone,
    TrialDone,
    TrialEvent,
    TrialStarted,
    TuneDone,
    TuneStarted,
    UnitDone,
    UnitStarted,
)
from foldwise.runs.tracker_process import _tta_gain, run_id, study_id
from foldwise.runs.tracking import WandbTracker, tensorboard_tracker, wandb_tracker

WANDB = Path(sys.executable).with_name("wandb")
SPEC = {
    "name": "vit",
    "seeds": [42],
    "model": {"arch": "resnet18"},
    "augment": [{"HorizontalFlip": {"p": 0.5}}],
    "optim": {"lr": 0.002},
}
INFO = {
    "score": 0.61,
    "standard_error": 0.01,
    "fold_scores": {"0": 0.6, "1": 0.62},
    "classes": ["angry", "happy"],
    "wall_s": 12.5,
    "parameters": 1000,
    "git": {"commit": "abc"},
    "test_score": None,
    "n_scored": 90,
    "seeds": [42],
    "score_without_tta": 0.59,
    "marks": ["optimistic", "transductive"],
    "external": ["fer2013"],
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def started(attempt: str = "first", folds: int = 5, spec: dict[str, Any] | None = None) -> RunStarted:
    units = tuple((fold, 42) for fold in range(folds))
    return RunStarted(
        "vit",
        "aspicv",
        attempt,
        spec or SPEC,
        "accuracy",
        units,
        (UnitDone(9, 42, 0.5, 0.1, 1.0),),
        3,
        "cpu",
        smoke=True,
    )


def epoch(fold: int, number: int) -> EpochDone:
    row = {
        "fold": fold,
        "seed": 42,
        "epoch": number,
        "lr": 0.002 / number,
        "train_loss": 1 / number,
        "val_accuracy": 0.5,
    }
    return EpochDone(fold, 42, number, row)


def whole_unit(fold: int) -> Iterator[Event]:
    yield UnitStarted(fold, 42, 0, 80, 20)
    for number in (1, 2, 3):
        yield StepDone(fold, 42, number, 1, 2)
        yield epoch(fold, number)
    yield UnitDone(fold, 42, 0.6, 0.02, 4.0)


def follow(tracker: Listener | None, *events: Event) -> None:
    assert tracker is not None
    for event in events:
        tracker.on(event)
    tracker.close()


def inspect(path: Path, *options: str) -> str:
    command = [str(WANDB), "leet", "inspect", "--json", *options, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kept_runs(folder: Path) -> list[dict[str, Any]]:
    """Every offline run below `folder`: its run record, config, last summary, history, artifacts, metrics and end."""
    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        records: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in inspect(path).splitlines():
            record = json.loads(line)
            records[record["type"]].append(record[record["type"]])
        (run,) = records["run"]
        summary: dict[str, Any] = {}
        for update in records["summary"]:
            summary |= update["update"]
        runs.append(
            run
            | {
                "path": path,
                "name": run["display_name"],
                "config": run["config"]["update"],
                "summary": summary,
                "history": [item["item"] for item in records["history"]],
                "artifacts": [item["name"] for item in records["artifact"]],
                "metrics": records["metric"],
                "exit_code": [item["exit_code"] for item in records["exit"]],
            }
        )
    return runs


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def test_run_ids_differ_by_project_spec_attempt_and_unit() -> None:
    base = {"experiment": "vit", "spec": SPEC, "attempt": "first"}
    ids = {
        run_id("p", base, "summary"),
        run_id("p", base, "fold0-seed42"),
        run_id("q", base, "summary"),
        run_id("p", base | {"attempt": "second"}, "summary"),
        run_id("p", base | {"spec": SPEC | {"name": "x"}}, "summary"),
        run_id("p", base | {"experiment": "x"}, "summary"),
    }
    assert len(ids) == 6
    assert run_id("p", dict(base), "summary") in ids


@pytest.mark.slow
def test_offline_keeps_a_group_of_unit_runs_and_a_summary(tmp_path: Path) -> None:
    (tmp_path / "oof.csv").write_text("id,fold\n")
    tracker = wandb_tracker(tmp_path, "faces")
    per_class = [{"class": name, "precision": 0.5, "support": 4} for name in INFO["classes"]]
    follow(
        tracker,
        started(),
        Message("going on"),
        *(event for fold in range(5) for event in whole_unit(fold)),
        RunDone(INFO, str(tmp_path), per_class, [[3, 1], [2, 2]]),
    )
    assert tracker is not None
    assert tracker.notes == [
        f"W&B: offline (WANDB_MODE=offline). Sync later: .venv/bin/wandb sync {tmp_path}/wandb/offline-run-*"
    ]
    assert tracker.url is None
    runs = {run["name"]: run for run in kept_runs(tmp_path)}
    assert sorted(runs) == ["vit", *(f"vit/fold{fold}" for fold in range(5))]
    assert {run["run_group"] for run in runs.values()} == {"vit"}
    assert {run["project"] for run in runs.values()} == {"faces"}
    assert all(run["tags"] == ["aspicv", "resnet18", "smoke"] for run in runs.values() if run["job_type"] == "unit")
    assert all(run["exit_code"] == [0] for run in runs.values())
    assert all(run["config"]["optim.lr"] == 0.002 for run in runs.values())

    unit = runs["vit/fold3"]
    assert unit["job_type"] == "unit"
    assert [row["epoch"] for row in unit["history"]] == [1, 2, 3]
    assert [row["lr"] for row in unit["history"]] == [0.002, 0.001, 0.002 / 3]
    assert [row["train_loss"] for row in unit["history"]] == [1, 0.5, 1 / 3]
    assert unit["config"]["fold"] == 3
    assert unit["summary"]["score"] == 0.6
    assert {"glob_name": "*", "options": {"defined": True, "step_sync": True}, "step_metric": "epoch"} in unit[
        "metrics"
    ]

    summary = runs["vit"]
    assert summary["job_type"] == "summary"
    assert "fold" not in summary["config"]
    expected = {
        "oof/accuracy": 0.61,
        "oof/standard_error": 0.01,
        "oof/fold0": 0.6,
        "oof/fold1": 0.62,
        "wall_s": 12.5,
        "parameters": 1000,
        "git.commit": "abc",
        "n_scored": 90,
    }
    assert expected.items() <= summary["summary"].items()
    assert summary["summary"]["oof/tta_gain"] == pytest.approx(0.02)
    assert "test_score" not in summary["summary"]
    assert summary["tags"] == ["aspicv", "resnet18", "smoke", "optimistic", "transductive", "with external data"]
    about = {"metric": "accuracy", "track": "with external data", "marks": "optimistic, transductive"}
    assert (about | {"n_seeds": 1, "n_folds": 2, "model.arch": "resnet18"}).items() <= summary["config"].items()
    assert summary["summary"]["per_class.nrows"] == 2
    assert summary["summary"]["confusion_matrix_table.nrows"] == 4
    assert "vit-oof" in summary["artifacts"]
    overview = json.loads(inspect(summary["path"], "--summary"))
    assert (overview["state"], overview["summary"]["oof/accuracy"]) == ("finished", 0.61)


def test_the_gain_of_tta_is_told_only_where_both_scores_are_of_the_same_thing() -> None:
    assert _tta_gain("accuracy", INFO) == pytest.approx(0.02)
    assert _tta_gain("log_loss", INFO) == pytest.approx(-0.02), "a higher loss is worse"
    assert _tta_gain("macro_f1", INFO) is None, "a mean of folds' F1 is not the F1 of all folds"
    assert _tta_gain("accuracy", INFO | {"seeds": [42, 43]}) is None, "seeds are averaged, which gains too"
    assert _tta_gain("accuracy", INFO | {"score_without_tta": None}) is None


@pytest.mark.slow
def test_resumed_pieces_share_an_id_and_another_attempt_does_not(tmp_path: Path) -> None:
    unit = UnitStarted(0, 42, 0, 80, 20)
    follow(wandb_tracker(tmp_path, "faces"), started(), unit, epoch(0, 1))
    follow(
        wandb_tracker(tmp_path, "faces"),
        started(),
        UnitStarted(0, 42, 1, 80, 20),
        epoch(0, 2),
        UnitDone(0, 42, 0.6, 0.02, 1.0),
    )
    follow(wandb_tracker(tmp_path, "faces"), started("second"), unit, epoch(0, 1))
    runs = kept_runs(tmp_path)
    assert len(runs) == 3
    by_epochs = {(run["run_id"], tuple(row["_step"] for row in run["history"])): run["exit_code"] for run in runs}
    first = {name for name, _ in by_epochs if (name, (2,)) in by_epochs}
    assert len(first) == 1, "the second piece has its own id"
    (name,) = first
    assert by_epochs[name, (2,)] == [0]
    assert by_epochs[name, (1,)] == [1], "a unit that did not end is marked as failed"
    assert len({run["run_id"] for run in runs}) == 2


OWN = {"optim.lr": 0.002, "augment": [{"HorizontalFlip": {"p": 0.5}}]}
OTHER = {"optim.lr": 0.0003, "augment": []}


def study_started(attempt: str = "first", trials: int = 3, finished: tuple[TrialDone, ...] = ()) -> TuneStarted:
    return TuneStarted(
        "vit",
        "aspicv",
        "accuracy",
        True,
        trials,
        finished,
        (0, 1),
        3,
        "cpu",
        "this process",
        "tpe",
        {"optim.lr": {"low": 1e-5, "high": 1e-2, "log": True}},
        OWN,
        SPEC | {"tune": {"trials": trials}},
        attempt,
    )


def whole_trial(number: int, parameters: dict[str, Any], state: Any = "complete", folds: int = 2) -> Iterator[Event]:
    yield TrialStarted(number, parameters, (0, 1), 3)
    for fold in reversed(range(folds)):
        for event in whole_unit(fold):
            assert isinstance(event, UnitStarted | StepDone | EpochDone | UnitDone)
            yield TrialEvent(number, "search", event)
    scores = {fold: 0.5 + fold / 10 for fold in range(folds)}
    yield TrialDone(number, state, parameters, scores, 0.55, 0.02, 8.0, reason="" if folds == 2 else "far behind")


@pytest.mark.slow
def test_a_study_is_a_group_of_trials_and_a_summary(tmp_path: Path) -> None:
    (tmp_path / "trials.csv").write_text("number\n")
    tracker = wandb_tracker(tmp_path, "faces")
    info = {"best": {"number": 1, "parameters": OTHER, "score": 0.6}, "corrected": {"score": 0.57}, "tuned": None}
    late = TrialEvent(1, "search", UnitDone(1, 42, 0.9, 0.1, 1.0))
    follow(
        tracker,
        study_started(finished=(TrialDone(7, "complete", OWN, {0: 0.4}, 0.4, None, 1.0),)),
        TrialStarted(0, OWN, (0, 1), 3),
        *whole_trial(1, OTHER, "pruned", folds=1),
        late,
        TrialDone(2, "duplicate", OTHER, {0: 0.5}, 0.55, 0.02, 0.0),
        *whole_trial(0, OWN),
        TrialStarted(1, OTHER, (0, 1), 9, "full"),
        TrialDone(1, "complete", OTHER, {0: 0.6, 1: 0.7}, 0.65, 0.02, 9.0, "full"),
        TrialDone(3, "failed", {"optim.lr": 9.0}, {}, None, None, 0.0, reason="the loss is nan"),
        TuneDone(info, str(tmp_path), ("tuned",)),
    )
    assert tracker is not None
    assert len(tracker.notes) == 1, "offline, and nothing else"
    runs = {run["name"]: run for run in kept_runs(tmp_path)}
    assert sorted(runs) == ["trial 0", "trial 1", "trial 1 in full", "trial 3", "vit tune"]
    assert {run["run_group"] for run in runs.values()} == {"vit-tune"}
    assert len({run["run_id"] for run in runs.values()}) == 5

    trial = runs["trial 0"]
    assert (trial["job_type"], trial["tags"], trial["exit_code"]) == ("search", ["aspicv", "tpe"], [0])
    assert trial["config"]["optim.lr"] == 0.002
    assert [(row["fold"], row["_step"], row["fold_score"]) for row in trial["history"]] == [(0, 0, 0.5), (1, 1, 0.6)]
    expected = {"score": 0.55, "standard_error": 0.02, "state": "complete", "wall_s": 8.0, "stage": "search"}
    assert expected.items() <= trial["summary"].items()
    assert trial["summary"]["fold1-seed42"] == 0.6, "each unit's score is there as soon as it is known"
    assert {"glob_name": "*", "options": {"defined": True, "step_sync": True}, "step_metric": "fold"} in trial[
        "metrics"
    ]

    pruned = runs["trial 1"]
    assert {"state": "pruned", "reason": "far behind"}.items() <= pruned["summary"].items()
    assert [row["fold_score"] for row in pruned["history"]] == [0.5]
    assert (pruned["exit_code"], runs["trial 3"]["exit_code"]) == ([0], [1])
    assert runs["trial 1 in full"]["job_type"] == "full"

    summary = runs["vit tune"]
    assert {"best.score": 0.6, "best.parameters.optim.lr": 0.0003, "corrected.score": 0.57}.items() <= summary[
        "summary"
    ].items()
    assert "tuned" not in summary["summary"]
    assert (summary["summary"]["trials.nrows"], summary["summary"]["trials.ncols"]) == (6, 9)
    assert "vit-tune" in summary["artifacts"]
    assert summary["config"]["space.optim.lr.high"] == 0.01


@pytest.mark.slow
def test_a_trial_tried_again_is_the_same_run_also_when_more_trials_are_wanted(tmp_path: Path) -> None:
    follow(wandb_tracker(tmp_path, "faces"), study_started(), *list(whole_trial(0, OWN))[:-1])
    finished = (TrialDone(1, "complete", OTHER, {0: 0.4}, 0.4, None, 1.0),)
    follow(
        wandb_tracker(tmp_path, "faces"),
        study_started(trials=9, finished=finished),
        TrialStarted(2, OWN, (0, 1), 3, retry_of=0),
        *list(whole_trial(2, OWN))[1:],
    )
    follow(wandb_tracker(tmp_path, "faces"), study_started("second"), *whole_trial(0, OWN))
    pieces = [(run["run_id"], run["name"], run["exit_code"], len(run["history"])) for run in kept_runs(tmp_path)]
    assert len(pieces) == 3, "a trial of an earlier call is not sent again"
    ((first, *cut), (again, *whole), (other, *_)) = sorted(
        pieces, key=lambda piece: (piece[2] != [1], piece[1] != "trial 2")
    )
    assert first == again != other
    assert (cut, whole) == (["trial 0", [1], 0], ["trial 2", [0], 2])


def test_ids_of_a_study_differ_by_project_experiment_attempt_and_trial_but_not_by_spec() -> None:
    base = {"experiment": "vit", "spec": SPEC, "attempt": "first"}
    ids = {
        study_id("p", base, "summary"),
        study_id("p", base, "x"),
        study_id("q", base, "summary"),
        study_id("p", base | {"attempt": "second"}, "summary"),
        study_id("p", base | {"experiment": "x"}, "summary"),
        run_id("p", base, "summary"),
    }
    assert len(ids) == 6
    assert study_id("p", base | {"spec": {}}, "summary") in ids


@pytest.mark.slow
def test_several_seeds_name_the_seed(tmp_path: Path) -> None:
    follow(wandb_tracker(tmp_path, "faces"), started(spec=SPEC | {"seeds": [42, 43]}), UnitStarted(0, 42, 0, 80, 20))
    assert [run["name"] for run in kept_runs(tmp_path)] == ["vit/fold0-seed42"]


@pytest.mark.slow
def test_a_killed_child_is_told_and_no_more(tmp_path: Path) -> None:
    tracker = wandb_tracker(tmp_path, "faces")
    assert tracker is not None
    assert tracker.pid is not None
    tracker.on(started())
    os.kill(tracker.pid, signal.SIGKILL)
    for _ in range(3):
        follow(tracker, *(event for fold in range(5) for event in whole_unit(fold)))
    assert tracker.notes[1:] == [f"W&B: its process ended early (exit code -9); see {tmp_path}/wandb/tracker.log"]


@pytest.mark.slow
def test_a_hanging_child_neither_blocks_the_training_nor_outlives_the_deadline(tmp_path: Path) -> None:
    tracker = wandb_tracker(tmp_path, "faces", deadline_s=0.3)
    assert tracker is not None
    assert tracker.pid is not None
    os.kill(tracker.pid, signal.SIGSTOP)
    begun = time.monotonic()
    for number in range(20_000):
        tracker.on(epoch(0, number + 1))
    assert time.monotonic() - begun < 5, "waits for a pipe that nobody reads"
    begun = time.monotonic()
    tracker.close()
    assert time.monotonic() - begun < 5
    assert tracker.notes[1:] == [
        "W&B: its process was stopped after 0.3 s. "
        f"Sync what it kept: .venv/bin/wandb sync --include-online {tmp_path}/wandb/*run-*"
    ]
    with pytest.raises(ProcessLookupError):
        os.kill(tracker.pid, 0)


def test_an_unwritable_folder_is_told_and_no_more(tmp_path: Path) -> None:
    file = tmp_path / "oof"
    file.write_text("a file where a folder should be")
    tracker = wandb_tracker(file, "faces")
    follow(tracker, started(), *whole_unit(0))
    assert tracker is not None
    (note,) = tracker.notes
    assert note.startswith("W&B: this run is not tracked (")


@pytest.mark.slow
def test_a_bad_event_costs_itself_alone(tmp_path: Path) -> None:
    tracker = wandb_tracker(tmp_path, "faces")
    follow(tracker, RunDone({}, str(tmp_path)), EpochDone(0, 42, 1, {"lr": float("nan")}), started(), *whole_unit(0))
    assert tracker is not None
    assert tracker.notes[1:] == [f"W&B: not everything could be tracked; see {tmp_path}/wandb/tracker.log"]
    assert "KeyError" in (tmp_path / "wandb" / "tracker.log").read_text()
    (run,) = kept_runs(tmp_path)
    assert [row["epoch"] for row in run["history"]] == [1, 2, 3]


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_left_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker = wandb_tracker(tmp_path, "faces", deadline_s=4.5)
        assert tracker is not None
        assert tracker.notes == [], "a key is there: it should try"
        tracker.on(started())
        tracker.on(UnitStarted(0, 42, 0, 80, 20))
        wait_for(lambda: bool(tracker.notes))
        follow(tracker, epoch(0, 1), epoch(0, 2), epoch(0, 3), UnitDone(0, 42, 0.6, 0.02, 4.0))
    (note,) = tracker.notes
    assert note.startswith("W&B: went offline (")
    assert note.endswith(f". Sync later: .venv/bin/wandb sync --include-online {tmp_path}/wandb/*run-*")
    complete = [run for run in kept_runs(tmp_path) if run["history"]]
    assert [[row["epoch"] for row in run["history"]] for run in complete] == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("environment", "mode", "reason"),
    [
        ({}, "auto", "no API key"),
        ({"WANDB_API_KEY": "a" * 40}, "offline", "asked for"),
        ({"WANDB_API_KEY": "a" * 40, "WANDB_MODE": "dryrun"}, "auto", "WANDB_MODE=dryrun"),
        ({"WANDB_API_KEY": "a" * 40}, "auto", None),
        ({"NETRC_HOST": "api.wandb.ai"}, "auto", None),
        ({"NETRC_HOST": "elsewhere.example"}, "auto", "no API key"),
        ({"NETRC_HOST": "w.example", "WANDB_BASE_URL": "https://w.example"}, "auto", None),
    ],
)
def test_online_needs_a_key_and_no_veto(
    environment: dict[str, str], mode: Any, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def start(tracker: WandbTracker, folder: Path, project: str, mode: str) -> Any:
        modes.append(mode)
        return subprocess.Popen([sys.executable, "-c", ""], text=True)

    monkeypatch.setattr(WandbTracker, "_start", start)
    monkeypatch.delenv("WANDB_MODE")
    host = environment.pop("NETRC_HOST", None)
    if host is not None:
        (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {'a' * 40}\n")
        (tmp_path / "netrc").chmod(0o600)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tracker = wandb_tracker(tmp_path, "faces", mode=mode)
    follow(tracker)
    assert tracker is not None
    assert modes == ["online" if reason is None else "offline"]
    assert [note.split(". ")[0] for note in tracker.notes] == ([] if reason is None else [f"W&B: offline ({reason})"])


def test_disabled_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_tracker(tmp_path, "faces") is None
    assert list(tmp_path.iterdir()) == []


def test_the_training_process_imports_no_wandb() -> None:
    code = "import sys, foldwise.runs.tracking; sys.exit('wandb' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_tensorboard_holds_the_curves_of_each_unit(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(
        tensorboard_tracker(tmp_path),
        started(),
        *whole_unit(0),
        UnitStarted(1, 42, 0, 80, 20),
        epoch(1, 1),
        epoch(1, 2),
    )
    follow(tensorboard_tracker(tmp_path), started(), UnitStarted(1, 42, 1, 80, 20), epoch(1, 2), epoch(1, 3))
    folders = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert folders == ["fold0-seed42", "fold1-seed42"]
    for folder in folders:
        events = EventAccumulator(str(tmp_path / "tensorboard" / folder)).Reload()
        assert [point.step for point in events.Scalars("lr")] == [1, 2, 3]
        assert [point.value for point in events.Scalars("train_loss")] == pytest.approx([1, 0.5, 1 / 3])


def test_tensorboard_in_an_unwritable_folder_is_told_and_no_more(tmp_path: Path) -> None:
    file = tmp_path / "oof"
    file.write_text("a file where a folder should be")
    tracker = tensorboard_tracker(file)
    follow(tracker, started(), *whole_unit(0), *whole_unit(1))
    (note,) = tracker.notes
    assert note.startswith("TensorBoard: this run is not followed any further (")


def test_tensorboard_without_its_package_fails_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(FoldwiseError, match=r"fix: \.venv/bin/pip install -e '\.\[tensorboard\]'"):
        tensorboard_tracker(tmp_path)
