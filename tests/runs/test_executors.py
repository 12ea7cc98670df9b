"""Executors of this machine: one process or several, the same bits, and what becomes of a process that dies."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foldwise.errors import DeviceError, Fault, FoldwiseError, RecordError, SpecError
from foldwise.learn.device import pick_runtime
from foldwise.records.store import Unit
from foldwise.runs import executors
from foldwise.runs.events import EpochDone, Event, Message, UnitStarted
from foldwise.runs.executors import (
    STOP,
    Job,
    LocalExecutor,
    Outcome,
    ProcessesExecutor,
    StoppedError,
    make_executor,
    train,
    units_of,
)
from foldwise.runs.plan import make_plan

PATIENCE_S = 120.0


def ignore(_job: Job, _event: Event) -> None:
    pass


def jobs_of(project: Any, folder: str, folds: tuple[int, ...] = (0, 1), threads: int = 1, **train: Any) -> list[Job]:
    spec = project.spec(train=train)
    return [
        Job(project.root, spec, fold, 42, project.root / "oof" / folder / f"fold{fold}" / "seed42", threads, "cpu")
        for fold in folds
    ]


def finish(
    jobs: list[Job], name: str, emit: Callable[[Job, Event], None] = ignore, workers: int | None = None
) -> dict[int, Unit]:
    with closing(make_executor(name, emit, threads=jobs[0].threads, device="cpu", workers=workers)) as executor:
        return {unit.fold: unit for unit in units_of(executor, jobs)}


def assert_same(units: dict[int, Unit], others: dict[int, Unit]) -> None:
    assert units.keys() == others.keys()
    for fold, unit in units.items():
        other = others[fold]
        assert unit.val_ids.tolist() == other.val_ids.tolist()
        np.testing.assert_array_equal(unit.val_probs, other.val_probs)
        np.testing.assert_array_equal(unit.test_probs, other.test_probs)
        assert unit.info["weights_sha256"] == other.info["weights_sha256"]
        assert unit.info["threads"] == other.info["threads"]
        losses = [[row["train_loss"] for row in found.history] for found in (unit, other)]
        assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_worker_that_finds_other_data_than_the_run_began_with_trains_nothing(project: Any) -> None:
    (job,) = jobs_of(project, "x", (0,), epochs=1)
    context = make_plan(job.root, job.spec).context
    assert train(replace(job, context_sha256=context.sha256), ignore).unit is not None
    other = replace(context, guard_sha256="0" * 64)
    outcome = train(replace(job, context_sha256=other.sha256), ignore)
    assert outcome.unit is None
    assert str(outcome.error) == (
        "fold 0 was not trained: its data, its starting weights or its teachers are not those that the run began with\n"
        "  fix: let all machines see the same files, and change none while a run goes on"
    )


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    """Workers of a process, but not the tracker of semaphores that comes with them."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat, line = (path / "stat").read_text(), (path / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(stat.rpartition(")")[2].split()[1]) == pid and b"spawn_main" in line:
            found.append(int(path.name))
    return found


def wait_until(true: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


# Making one ---------------------------------------------------------------------------------------------------------


def test_an_unknown_executor_is_refused_with_the_known_ones() -> None:
    with pytest.raises(FoldwiseError) as caught:
        make_executor("slurm", ignore, threads=1, device="cpu", workers=None)
    assert str(caught.value) == "there is no executor `slurm`\n  fix: ON=local, processes or ray (--on)"


@pytest.mark.parametrize("name", ["local", "processes", "ray"])
def test_no_workers_at_all_are_refused(name: str) -> None:
    with pytest.raises(FoldwiseError) as caught:
        make_executor(name, ignore, threads=1, device="cpu", workers=0)
    assert str(caught.value) == "`WORKERS >= 1` must hold, but got 0\n  fix: leave WORKERS (--workers) out"


def test_local_refuses_several_workers_rather_than_to_ignore_them() -> None:
    with pytest.raises(FoldwiseError) as caught:
        make_executor("local", ignore, threads=1, device="cpu", workers=2)
    assert str(caught.value) == (
        "`local` trains one unit at a time, but 2 workers were asked for\n"
        "  fix: ON=processes WORKERS=2 (--on processes --workers 2)"
    )
    assert isinstance(make_executor("local", ignore, threads=1, device="cpu", workers=1), LocalExecutor)


def test_ray_that_is_not_installed_is_told_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FoldwiseError) as caught:
        make_executor("ray", ignore, threads=1, device="cpu", workers=None)
    assert str(caught.value) == "Ray is not installed\n  fix: .venv/bin/pip install -e '.[ray]'"


def test_a_device_that_is_not_there_is_refused_before_a_process_is_started() -> None:
    with pytest.raises(DeviceError, match="unknown device 'abacus'"):
        make_executor("processes", ignore, threads=1, device="abacus", workers=None)


@pytest.mark.parametrize(
    ("cores", "threads", "workers", "slots", "told"),
    [
        (8, 2, None, 4, "4 processes of 2 threads"),
        (8, 3, None, 2, "2 processes of 3 threads"),
        (2, 4, None, 1, "1 process of 4 threads"),
        (1, 1, None, 1, "1 process of 1 thread"),
        (2, 2, 3, 3, "3 processes of 2 threads"),
    ],
)
def test_there_are_as_many_processes_as_the_cores_have_room_for(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, workers: int | None, slots: int, told: str
) -> None:
    monkeypatch.setattr(executors, "_cores", lambda: cores)
    executor = make_executor("processes", ignore, threads=threads, device="cpu", workers=workers)
    assert (executor.slots, executor.told) == (slots, told)
    executor.close()


def test_each_process_gets_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, project: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    executor = make_executor("processes", ignore, threads=8, device="cuda", workers=None)
    assert isinstance(executor, ProcessesExecutor)
    assert (executor.slots, executor.told) == (3, "3 processes of 8 threads")
    (job,) = jobs_of(project, "gpus", (0,))
    for _ in range(4):
        executor._busy[Future()] = (executors._Worker(executor._free_device(job)), job)
    assert [worker.device for worker, _ in executor._busy.values()] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    executor.close()
    one = make_executor("processes", ignore, threads=8, device="cuda:1", workers=None)
    assert (one.slots, one.told) == (1, "1 process of 8 threads")


# What crosses between processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        FoldwiseError("a\n  fix: b"),
        DeviceError("no memory"),
        StoppedError("stopped"),
        RecordError([Fault("a.csv:3", "is wrong", "mend it"), Fault("b.csv", "too")]),
        SpecError([Fault("a.yaml:1:2", "unknown key", "drop it", "key: 1", 1, 2, 3)]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_user_cross_whole(error: FoldwiseError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), back.exit_code) == (type(error), str(error), error.exit_code)


def test_a_job_and_its_outcome_cross_whole(project: Any) -> None:
    (job,) = jobs_of(project, "cross", (0,))
    assert pickle.loads(pickle.dumps(job)) == job
    back = pickle.loads(pickle.dumps(Outcome(job, None, StoppedError("stopped"))))
    assert (back.job, back.unit, str(back.error)) == (job, None, "stopped")


# One process --------------------------------------------------------------------------------------------------------


def test_local_trains_in_the_order_of_the_jobs_and_passes_events_on_with_their_job(project: Any) -> None:
    jobs = jobs_of(project, "local", (1, 0))
    heard: list[tuple[Job, Event]] = []
    executor = make_executor("local", lambda job, event: heard.append((job, event)), threads=1, device="cpu", workers=1)
    for job in jobs:
        executor.submit(job)
    assert [executor.wait().job for _ in jobs] == jobs
    assert [job for job, event in heard if isinstance(event, UnitStarted)] == jobs
    assert all(getattr(event, "fold", job.fold) == job.fold for job, event in heard)


def test_a_data_set_that_is_gone_is_an_outcome_and_not_a_crash(project: Any) -> None:
    (job,) = jobs_of(project, "gone", (0,))
    (project.root / "inputs" / "demo" / "folds.csv").unlink()
    outcome = train(job, ignore)
    assert outcome.unit is None
    assert outcome.error is not None
    assert "folds.csv" in str(outcome.error)


def test_a_unit_told_to_stop_ends_after_its_epoch_and_goes_on_from_there(project: Any) -> None:
    (job,) = jobs_of(project, "stop", (0,), epochs=3)
    (whole,) = finish(jobs_of(project, "whole", (0,), epochs=3), "local").values()

    def stop_after_one(job: Job, event: Event) -> None:
        if isinstance(event, EpochDone) and event.epoch == 1:
            (job.folder / STOP).touch()

    outcome = train(job, stop_after_one)
    assert isinstance(outcome.error, StoppedError)
    assert str(outcome.error) == "fold 0 was stopped after epoch 1"
    (job.folder / STOP).unlink()
    started: list[Event] = []
    rest = train(job, lambda _job, event: started.append(event))
    assert [event.from_epoch for event in started if isinstance(event, UnitStarted)] == [1]
    assert rest.unit is not None
    assert_same({0: rest.unit}, {0: whole})


# Several processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_end_with_the_bits_of_local_and_tell_of_it_in_the_waiting_thread(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # must not decide anything
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # two threads that spin on a busy machine take minutes
    heard: dict[int, list[int]] = {}
    ended: list[int] = []
    waiting = False

    def emit(job: Job, event: Event) -> None:
        assert waiting
        assert job.fold not in ended
        if isinstance(event, EpochDone):
            heard.setdefault(job.fold, []).append(event.epoch)

    def jobs(folder: str) -> list[Job]:
        return [*jobs_of(project, folder, (0, 1)), *jobs_of(project, folder, (2,), threads=2, epochs=1)]

    units = {}
    with closing(make_executor("processes", emit, threads=1, device="cpu", workers=2)) as executor:
        for job in jobs("apart"):
            executor.submit(job)
        for _ in range(3):
            waiting = True
            outcome = executor.wait()
            waiting = False
            ended.append(outcome.job.fold)
            assert outcome.unit is not None
            units[outcome.job.fold] = outcome.unit
    assert heard == {0: [1, 2], 1: [1, 2], 2: [1]}
    assert [units[fold].info["threads"] for fold in (0, 1, 2)] == [1, 1, 2]
    assert_same(units, finish(jobs("here"), "local"))


@pytest.mark.slow
def test_runs_of_processes_write_the_files_of_local_ones(project: Any) -> None:
    record, told = project.run(project.spec("apart"), on="processes", workers=2)
    local, _ = project.run(project.spec("here"))
    assert len([event for event in told.events if isinstance(event, EpochDone)]) == 10
    for name in ("oof.csv", "test.csv"):
        assert (project.path("apart") / name).read_bytes() == (project.path("here") / name).read_bytes()
    for key in ("score", "fold_scores", "score_without_tta", "weights", "seeds"):
        assert record[key] == local[key]


@pytest.mark.slow
def test_a_users_error_is_an_outcome_a_bug_is_raised_and_the_process_trains_on(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "_cores", lambda: 2)
    said: list[str] = []
    bad, bug, good = jobs_of(project, "mixed", (0, 1, 2), epochs=1)
    bad = replace(bad, spec=bad.spec.model_copy(update={"competition": "nowhere"}))
    bug = replace(bug, threads="many")

    def emit(_job: Job, event: Event) -> None:
        if isinstance(event, Message):
            said.append(event.text)

    with closing(make_executor("processes", emit, threads=2, device="cpu", workers=None)) as executor:
        for job in (bad, bug, good):
            executor.submit(job)
        first = executor.wait()
        (pid,) = children(os.getpid())
        with pytest.raises(RuntimeError, match="expects an int, but got str") as caught:
            executor.wait()
        last = executor.wait()
        assert children(os.getpid()) == [pid]
    assert (first.job, first.unit) == (bad, None)
    assert isinstance(first.error, FoldwiseError)
    assert "nowhere" in str(first.error)
    assert "in make_deterministic" in str(caught.value.__cause__)
    assert last.job == good
    assert last.unit is not None
    assert said == [
        "a unit takes 2 of the 2 cores, so one is trained at a time; "
        "`train.threads: 1` makes room for more, and other bits"
    ]


# Deaths -------------------------------------------------------------------------------------------------------------


class Killer:
    """Kills the process of a fold each time that an epoch of it ends, `times` times."""

    def __init__(self, fold: int, times: int) -> None:
        self.fold, self.left = fold, times
        self.started: list[tuple[int, int]] = []
        self.said: list[str] = []
        self.pids: set[int] = set()

    def __call__(self, job: Job, event: Event) -> None:
        if isinstance(event, Message):
            self.said.append(event.text)
        if isinstance(event, UnitStarted):
            self.started.append((job.fold, event.from_epoch))
        if isinstance(event, EpochDone) and job.fold == self.fold and self.left and event.epoch >= 2:
            pids = set(children(os.getpid())) - self.pids
            if not pids:  # what a process had told before it was killed
                return
            (pid,) = pids
            self.left -= 1
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not alive(pid))


@pytest.mark.slow
def test_a_unit_whose_process_is_killed_goes_on_from_its_epoch_and_ends_with_the_same_bits(project: Any) -> None:
    undisturbed = finish(jobs_of(project, "calm", (0, 1), epochs=40), "local")
    killer = Killer(fold=0, times=1)
    calm, other = jobs_of(project, "hit", (0, 1), epochs=40)
    with closing(make_executor("processes", killer, threads=1, device="cpu", workers=2)) as executor:
        executor.submit(other)
        killer.pids = set(children(os.getpid()))
        executor.submit(calm)
        outcomes = [executor.wait(), executor.wait()]
    assert not children(os.getpid())
    units = {outcome.job.fold: outcome.unit for outcome in outcomes if outcome.unit is not None}
    assert_same(units, undisturbed)
    assert [len(unit.history) for unit in units.values()] == [40, 40]
    assert killer.left == 0
    assert "the process of fold 0, seed 42 died; it is started again" in killer.said
    from_epochs = [epoch for fold, epoch in killer.started if fold == 0]
    assert from_epochs[0] == 0
    assert len(from_epochs) == 2
    assert from_epochs[1] >= 2
    # The other unit was not touched by it.
    assert [epoch for fold, epoch in killer.started if fold == 1] == [0]


@pytest.mark.slow
def test_a_unit_whose_process_dies_too_often_is_given_up_and_the_next_one_is_trained(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "_DEATHS", 2)
    killer = Killer(fold=1, times=2)
    (first,) = jobs_of(project, "doomed", (0,), epochs=1)
    (doomed,) = jobs_of(project, "doomed", (1,), epochs=5_000)
    (last,) = jobs_of(project, "doomed", (2,), epochs=1)
    with closing(make_executor("processes", killer, threads=1, device="cpu", workers=1)) as executor:
        executor.submit(first)
        assert executor.wait().unit is not None
        # The death of a process that has nothing to do counts for no unit.
        (pid,) = children(os.getpid())
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid))
        time.sleep(0.5)  # until the pool has taken note
        executor.submit(doomed)
        executor.submit(last)
        given_up, trained = executor.wait(), executor.wait()
    assert (given_up.job, given_up.unit) == (doomed, None)
    assert isinstance(given_up.error, DeviceError)
    assert str(given_up.error) == (
        "fold 1, seed 42 was given up: its process died 2 times, most likely for want of memory\n"
        '  fix: fewer at a time (WORKERS=1, --workers 1), or less memory each (SET="train.batch_size=8"); '
        "see docs/TROUBLESHOOTING.md"
    )
    assert [text for text in killer.said if "died" in text] == [
        "the process of fold 1, seed 42 died; it is started again"
    ]
    assert trained.job == last
    assert trained.unit is not None


@pytest.mark.slow
def test_close_ends_busy_processes_at_once_and_leaves_their_checkpoints(project: Any) -> None:
    jobs = jobs_of(project, "closed", (0, 1), epochs=5_000)
    ended: set[int] = set()

    class EnoughError(Exception):
        pass

    def until_both_have_an_epoch(job: Job, event: Event) -> None:
        if isinstance(event, EpochDone):
            ended.add(job.fold)
            if len(ended) == 2:
                raise EnoughError

    executor = make_executor("processes", until_both_have_an_epoch, threads=1, device="cpu", workers=2)
    for job in jobs:
        executor.submit(job)
    with pytest.raises(EnoughError):
        executor.wait()
    assert len(children(os.getpid())) == 2
    began = time.monotonic()
    executor.close()
    assert time.monotonic() - began < 5
    assert not children(os.getpid())
    for job in jobs:
        assert torch.load(job.folder / "checkpoint.pt", weights_only=True)["history"]
    executor.close()


SCRIPT = """
import sys
from contextlib import closing
from pathlib import Path
from foldwise.runs.events import EpochDone
from foldwise.runs.executors import Job, make_executor
from foldwise.spec.model import ExperimentSpec

if __name__ == "__main__":
    root = Path(sys.argv[1])
    spec = ExperimentSpec.model_validate_json(sys.argv[2])
    def emit(job, event):
        if isinstance(event, EpochDone):
            print(job.fold, event.epoch, flush=True)
    with closing(make_executor("processes", emit, threads=1, device="cpu", workers=2)) as executor:
        for fold in (0, 1):
            executor.submit(Job(root, spec, fold, 42, root / "oof" / "x" / f"fold{fold}" / "seed42", 1, "cpu"))
        executor.wait()
"""


@pytest.fixture
def busy(project: Any, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with two busy workers, in a process group of its own, as a shell would start it."""
    script = tmp_path / "busy.py"
    script.write_text(SCRIPT)
    spec = project.spec(train={"epochs": 10_000}).model_dump_json()
    # Ctrl-C must be heard even where whoever runs the tests was started in the background.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, str(script), str(project.root), spec],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


def until_both_train(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    seen: set[str] = set()
    deadline = time.monotonic() + PATIENCE_S
    while len(seen) < 2 and time.monotonic() < deadline:
        seen.add(process.stdout.readline().partition(" ")[0])
    assert seen == {"0", "1"}
    workers = children(process.pid)
    assert len(workers) == 2
    return workers


@pytest.mark.slow
def test_workers_do_not_outlive_a_parent_that_is_killed(busy: subprocess.Popen[str]) -> None:
    workers = until_both_train(busy)
    busy.kill()
    busy.communicate(timeout=PATIENCE_S)
    wait_until(lambda: not any(alive(pid) for pid in workers), patience_s=5)


@pytest.mark.slow
def test_ctrl_c_is_the_parents_alone(busy: subprocess.Popen[str]) -> None:
    workers = until_both_train(busy)
    os.killpg(busy.pid, signal.SIGINT)
    _, err = busy.communicate(timeout=PATIENCE_S)
    assert busy.returncode == -signal.SIGINT
    assert err.count("Traceback") == 1
    assert err.strip().endswith("KeyboardInterrupt")
    assert not any(alive(pid) for pid in workers)


@pytest.mark.slow
def test_ctrl_c_in_the_first_moment_leaves_no_traceback_of_a_worker(busy: subprocess.Popen[str]) -> None:
    wait_until(lambda: bool(children(busy.pid)))
    os.killpg(busy.pid, signal.SIGINT)
    _, err = busy.communicate(timeout=PATIENCE_S)
    assert busy.returncode == -signal.SIGINT
    assert err.count("Traceback") == 1
    assert not children(busy.pid)


@pytest.mark.slow
def test_ctrl_c_while_a_process_is_started_leaves_none_behind(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def interrupted() -> Iterator[None]:
        yield
        raise KeyboardInterrupt

    monkeypatch.setattr(executors, "_deaf_children", interrupted)
    (job,) = jobs_of(project, "interrupted", (0,), epochs=10_000)
    before = set(children(os.getpid()))
    with (
        pytest.raises(KeyboardInterrupt),
        closing(make_executor("processes", ignore, threads=1, device="cpu", workers=1)) as executor,
    ):
        executor.submit(job)
    assert set(children(os.getpid())) <= before


def test_the_threads_of_a_unit_are_those_of_its_job_whatever_torch_was_told(project: Any) -> None:
    (job,) = jobs_of(project, "threads", (0,), epochs=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        outcome = train(job, ignore)
        assert pick_runtime("cpu", "fp32", None).threads == 1
    finally:
        torch.set_num_threads(before)
    assert outcome.unit is not None
    assert outcome.unit.info["threads"] == 1
