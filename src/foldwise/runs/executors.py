"""Where units are trained: in this process, in several on this machine, or on a Ray cluster.

An executor trains what it is given and hands back what comes out; who is trained, and what is kept, is the caller's.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from foldwise.errors import DeviceError, FoldwiseError
from foldwise.learn.device import pick_runtime
from foldwise.records.store import Unit
from foldwise.runs.crossval import train_unit
from foldwise.runs.events import EpochDone, Event, Message
from foldwise.runs.plan import Plan, make_plan
from foldwise.spec.model import ExperimentSpec

# A file of this name in a unit's folder ends its training after the epoch under way.
STOP = ".stop"
_NEWS_EVERY_S = 0.2
_LOOK_EVERY_S = 10.0
_CONNECT_S = 5.0
_OBJECT_STORE = 128 << 20  # bytes; the predictions of a unit are small
_DEATHS = 3  # of the worker of a unit, before the unit is given up


class StoppedError(FoldwiseError):
    """A unit was told to stop before its last epoch."""


@dataclass(frozen=True)
class Job:
    """One unit to be trained: all that another process needs to know, so it must pickle.

    Attributes:
        root: The project's root, on storage that every worker sees.
        spec: The experiment, before it is cut down for a smoke run.
        fold: The fold that is scored.
        seed: Of every random choice.
        folder: The unit's folder, for its checkpoint and weights.
        threads: CPU threads, decided by who submits it: the bits of a result depend on them.
        device: As `pick_runtime` takes it.
        split: Which split of folds.csv.
        smoke: Whether it is of a smoke run.
        context_sha256: Of the context that the run began with, which the worker's must be; None for whatever is there.
    """

    root: Path
    spec: ExperimentSpec
    fold: int
    seed: int
    folder: Path
    threads: int
    device: str | None = None
    split: int = 0
    smoke: bool = False
    context_sha256: str | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a job: a unit, or why there is none."""

    job: Job
    unit: Unit | None
    error: FoldwiseError | None = None


Emit = Callable[[Job, Event], None]


class Executor(Protocol):
    """Trains units, several at a time where there is room."""

    @property
    def slots(self) -> int:
        """Units that it trains at a time now, at least one; more may be submitted, and wait."""

    @property
    def told(self) -> str:
        """What it is, for the user, e.g. `2 processes of 1 thread`."""

    def submit(self, job: Job) -> None:
        """Take a job; returns at once."""

    def wait(self) -> Outcome:
        """Wait for the next job to end, whichever it is, passing on events meanwhile; at least one must be under way.

        Raises:
            KeyboardInterrupt: If the user says so.
        """

    def close(self) -> None:
        """Stop what is under way; its last finished epoch is kept."""


def train(job: Job, emit: Emit) -> Outcome:
    """Train one job where we are, which is what every executor does in the end.

    Args:
        job: The unit.
        emit: Takes its events.

    Returns:
        The unit, or the error that the user can mend. Any other error is a bug, and raised.
    """
    stop = job.folder / STOP

    def pass_on(event: Event) -> None:
        emit(job, event)
        if isinstance(event, EpochDone) and event.epoch < plan.spec.train.epochs and stop.exists():
            raise StoppedError(f"fold {job.fold} was stopped after epoch {event.epoch}")

    try:
        plan = _plan(job)
        unit = train_unit(
            plan.spec,
            plan.table,
            plan.classes,
            plan.metric.name,
            job.fold,
            job.seed,
            folder=job.folder,
            runtime=pick_runtime(job.device, job.spec.train.precision, job.threads),
            emit=pass_on,
            start_weights=None if plan.start is None else plan.start.weights_of,
            start_classes=None if plan.start is None else plan.start.classes,
            lesson_of=None if plan.teachers is None else plan.teachers.lesson,
        )
    except FoldwiseError as error:
        return Outcome(job, None, error)
    return Outcome(job, unit)


def _plan(job: Job) -> Plan:
    """A worker's plan, kept from one unit to the next for as long as it is that of the run.

    Raises:
        FoldwiseError: If what lies here is not what the run began with.
    """
    asked = job.root, job.spec.model_dump_json(), job.split, job.smoke
    plan = _plan_of(*asked)
    if job.context_sha256 not in (None, plan.context.sha256):
        _plan_of.cache_clear()
        plan = _plan_of(*asked)
    if job.context_sha256 not in (None, plan.context.sha256):
        raise FoldwiseError(
            f"fold {job.fold} was not trained: its data, its starting weights or its teachers are not those that the "
            "run began with\n  fix: let all machines see the same files, and change none while a run goes on"
        )
    return plan


@lru_cache(maxsize=2)
def _plan_of(root: Path, spec_json: str, split: int, smoke: bool) -> Plan:
    return make_plan(root, ExperimentSpec.model_validate_json(spec_json), split=split, smoke=smoke)


def units_of(executor: Executor, jobs: Sequence[Job]) -> Iterator[Unit]:
    """Train jobs and yield their units as they are finished.

    Raises:
        FoldwiseError: The first that a job ends with; the others are left where they are.
    """
    for job in jobs:
        executor.submit(job)
    for _ in jobs:
        outcome = executor.wait()
        if outcome.unit is None:
            raise outcome.error or FoldwiseError(f"fold {outcome.job.fold} came back empty")
        yield outcome.unit


class LocalExecutor:
    """One unit after another, in this process."""

    slots = 1
    told = "this process"

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._waiting: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        """Queue a job; `wait` trains it."""
        self._waiting.append(job)

    def wait(self) -> Outcome:
        """Train the job that has waited longest."""
        return train(self._waiting.popleft(), self._emit)

    def close(self) -> None:
        """Forget what waits."""
        self._waiting.clear()


class ProcessesExecutor:
    """Several processes of this machine, each a pool of its own: the death of one is no other unit's.

    Where there are GPUs, each process has one to itself. A unit whose process dies goes on from its last epoch in a
    new one.
    """

    def __init__(self, emit: Emit, *, threads: int, device: str | None, workers: int | None) -> None:
        self._emit = emit
        self._devices = _gpus(device, threads)
        cores = _cores()
        room = len(self._devices) or max(1, cores // threads)
        self.slots = workers or room
        self.told = f"{_counted(self.slots, 'process', 'processes')} of {_counted(threads, 'thread')}"
        self._note = ""
        if self.slots == 1 < cores and not workers and not self._devices:
            self._note = (
                f"a unit takes {threads} of the {cores} cores, so one is trained at a time; "
                "`train.threads: 1` makes room for more, and other bits"
            )
        # All that may have a process, also one that a Ctrl-C kept from becoming busy.
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._busy: dict[futures.Future[Outcome], tuple[_Worker, Job]] = {}
        self._waiting: deque[Job] = deque()
        self._deaths: Counter[Path] = Counter()

    def submit(self, job: Job) -> None:
        """Start a job, or queue it where all processes are busy."""
        self._waiting.append(job)
        self._feed()

    def wait(self) -> Outcome:
        """Wait for the next job to end; see `Executor`."""
        if self._note:
            job = next((job for _, job in self._busy.values()), None) or self._waiting[0]
            self._emit(job, Message(self._note))
            self._note = ""
        while True:
            done = futures.wait(self._busy, _NEWS_EVERY_S, futures.FIRST_COMPLETED).done
            for worker, job in self._busy.values():
                for event in worker.news():
                    self._emit(job, event)
            if done and (outcome := self._take(done.pop())) is not None:
                return outcome

    def close(self) -> None:
        """End the processes at once."""
        self._waiting.clear()
        workers, self._workers, self._idle, self._busy = self._workers, [], [], {}
        for worker in workers:
            worker.let_go()
        for worker in workers:
            worker.end()

    def _feed(self) -> None:
        while self._waiting and len(self._busy) < self.slots:
            job = self._waiting.popleft()
            if self._idle:
                worker = self._idle.pop()
            else:
                worker = _Worker(self._free_device(job))
                self._workers.append(worker)
            try:
                future = worker.start(job)
            except BrokenProcessPool:  # it died while it had nothing to do
                self._end(worker)
                self._waiting.appendleft(job)
                continue
            self._busy[future] = (worker, job)

    def _end(self, worker: _Worker) -> None:
        worker.end()
        self._workers.remove(worker)

    def _free_device(self, job: Job) -> str | None:
        """The GPU that the fewest processes have; what the job asks for where there are none."""
        taken = Counter(worker.device for worker, _ in self._busy.values())
        return min(self._devices, key=lambda device: taken[device], default=job.device)

    def _take(self, future: futures.Future[Outcome]) -> Outcome | None:
        """The outcome of a finished job; None where its process died and it is started again."""
        worker, job = self._busy.pop(future)
        died, given_up = isinstance(future.exception(), BrokenProcessPool), False
        if died:
            self._end(worker)
            self._deaths[job.folder] += 1
            given_up = self._deaths[job.folder] >= _DEATHS
            if not given_up:
                self._emit(job, Message(f"the process of fold {job.fold}, seed {job.seed} died; it is started again"))
                self._waiting.appendleft(job)
        else:
            self._idle.append(worker)
        self._feed()
        if given_up:
            return Outcome(job, None, _died(job, f"its process died {_DEATHS} times"))
        return None if died else replace(future.result(), job=job)


class _Worker:
    """A pool of one process, and the pipe that its events come through.

    The process ends when our end of the pipe is closed, by us or by our death.
    """

    def __init__(self, device: str | None) -> None:
        self.device = device
        context = multiprocessing.get_context("spawn")
        self._news, self._theirs = context.Pipe()
        self._pool = futures.ProcessPoolExecutor(1, context, _begin_worker, (self._theirs,))

    def start(self, job: Job) -> futures.Future[Outcome]:
        """Train a job; the process must be idle.

        Raises:
            BrokenProcessPool: If the process died.
        """
        with _deaf_children():
            future = self._pool.submit(_train_in_worker, replace(job, device=self.device))
        self._theirs.close()  # the process has its own by now, and the pipe ends when the process does
        return future

    def news(self) -> Iterator[Event]:
        """Events that have come in."""
        try:
            while self._news.poll():
                yield self._news.recv()
        except (EOFError, OSError):
            return

    def let_go(self) -> None:
        """Tell the process to end."""
        self._news.close()

    def end(self) -> None:
        """End the process, and wait until it has."""
        self.let_go()
        self._pool.shutdown(cancel_futures=True)


_to_parent: Connection | None = None  # in a worker's process


def _begin_worker(to_parent: Connection) -> None:
    """Set up a worker's process: only the parent hears Ctrl-C, and the process does not outlive it."""
    global _to_parent
    _to_parent = to_parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(to_parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    # Nothing is ever sent this way, so what comes is the end.
    multiprocessing.connection.wait([parent])
    os._exit(1)


def _train_in_worker(job: Job) -> Outcome:
    assert _to_parent is not None
    send = _to_parent.send
    return train(job, lambda _job, event: send(event))


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Let processes that are started in here never hear Ctrl-C, not even while they still import."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class RayExecutor:
    """One Ray task a unit, on the cluster at $RAY_ADDRESS or, without that, on one that lives as long as this.

    Ray runs a task again when its process or its node dies; the unit goes on from its last epoch, since its folder
    lies on storage that every node sees.
    """

    def __init__(self, emit: Emit, *, threads: int, device: str | None, workers: int | None) -> None:
        self._emit = emit
        self._threads, self._workers = threads, workers
        self._ray = ray = _connect(threads, workers)
        # Where no GPU was asked for, the cluster's decide, not those of the machine that only submits.
        kind = "cuda" if device is None and ray.cluster_resources().get("GPU") else (device or "").partition(":")[0]
        self._gpus = 1 if kind == "cuda" else 0
        self._device = kind or None
        if not self._room():
            largest = max((_has(node, "CPU") for node in self._nodes()), default=0)
            self.close()
            raise FoldwiseError(
                f"no node of the Ray cluster has room for a unit of {_counted(threads, 'thread')}"
                f"{' and a GPU' if self._gpus else ''}: the largest has {_counted(largest, 'CPU')}\n"
                f"  fix: --set train.threads={max(1, largest)}, or start a larger node"
            )
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # On our own node, which nothing survives anyway.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._mailbox: Any = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._task = ray.remote(_train_on_node).options(num_cpus=threads, num_gpus=self._gpus, max_retries=_DEATHS)
        self._running: dict[Any, int] = {}
        self._jobs: dict[int, Job] = {}
        self._waiting: deque[int] = deque()
        self._submitted = 0
        self._looked_at = time.monotonic()

    @property
    def slots(self) -> int:
        """Units at a time on the nodes that are there now: a node may join or leave in mid-run."""
        room = max(1, self._room())
        return min(room, self._workers) if self._workers else room

    @property
    def told(self) -> str:
        """The cluster as it is now."""
        each = "a GPU" if self._gpus else _counted(self._threads, "thread")
        return f"Ray, {_counted(len(self._nodes()), 'node')}, {_counted(self.slots, 'unit')} of {each} at a time"

    def submit(self, job: Job) -> None:
        """Hand a job to Ray, or hold it back where `workers` are under way."""
        self._submitted += 1
        self._jobs[self._submitted] = job
        self._waiting.append(self._submitted)
        self._feed()

    def wait(self) -> Outcome:
        """Wait for the next job to end; see `Executor`."""
        while True:
            done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_NEWS_EVERY_S)
            self._pass_on()
            if done:
                return self._take(done[0])
            self._look()

    def close(self) -> None:
        """Cancel the tasks and leave the cluster; our own ends with that."""
        for task in getattr(self, "_running", ()):
            self._ray.cancel(task, force=True)
        self._ray.shutdown()

    def _feed(self) -> None:
        while self._waiting and (self._workers is None or len(self._running) < self._workers):
            key = self._waiting.popleft()
            job = self._jobs[key]
            # Its own folder is another one on each node.
            absolute = replace(job, root=job.root.absolute(), folder=job.folder.absolute(), device=self._device)
            self._running[self._task.remote(absolute, key, self._mailbox)] = key

    def _pass_on(self) -> None:
        """Emit what came in, but nothing of a unit that has ended: a node given up for dead may still speak."""
        if count := self._mailbox.qsize():
            for key, event in self._mailbox.get_nowait_batch(count):
                if (job := self._jobs.get(key)) is not None:
                    self._emit(job, event)

    def _take(self, task: Any) -> Outcome:
        errors = self._ray.exceptions
        job = self._jobs.pop(self._running.pop(task))
        self._feed()
        try:
            found: Outcome = self._ray.get(task)
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
            return Outcome(job, None, _died(job, f"Ray tried {_DEATHS + 1} times ({type(error).__name__})"))
        return replace(found, job=job)

    def _look(self) -> None:
        """Say once that nothing can be trained, since Ray then waits in silence for a node to join."""
        if time.monotonic() - self._looked_at > _LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            if not self._room():
                job = self._jobs[next(iter(self._running.values()))]
                self._emit(job, Message("no node of the Ray cluster has room for a unit: waiting for one to join"))
                self._looked_at = float("inf")

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _room(self) -> int:
        return sum(
            min(_has(node, "CPU") // self._threads, _has(node, "GPU") if self._gpus else sys.maxsize)
            for node in self._nodes()
        )


def _has(node: dict[str, Any], resource: str) -> int:
    return int(node["Resources"].get(resource, 0))


def _connect(threads: int, workers: int | None) -> Any:
    """Join the Ray cluster at $RAY_ADDRESS, or start one on this machine.

    Raises:
        FoldwiseError: If Ray is not installed, or the cluster does not answer.
    """
    os.environ.setdefault("RAY_task_oom_retries", str(_DEATHS))
    os.environ.setdefault("RAY_worker_niceness", "0")  # else a unit yields to everything else on the machine
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of its next version
    try:
        import ray
    except ImportError:
        raise FoldwiseError("Ray is not installed\n  fix: .venv/bin/pip install -e '.[ray]'") from None
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        cores = max(_cores(), threads * (workers or 1))
        ray.init("local", num_cpus=cores, object_store_memory=_OBJECT_STORE, include_dashboard=False, **quiet)
        return ray
    try:
        _knock(address)
        ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:  # Ray's ConnectionError is an OSError
        raise FoldwiseError(
            f"no Ray cluster at RAY_ADDRESS={address}: {error}\n"
            "  fix: start it (ray start --head --port=6379), or leave RAY_ADDRESS out for one on this machine; "
            "see docs/CLUSTER.md"
        ) from None
    return ray


def _knock(address: str) -> None:
    """See whether anyone listens, since `ray.init` waits for minutes before it says so."""
    if "://" in address:
        raise ValueError("`ray://` is not supported, since the run's files must be here; use host:port on a node of it")
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()


def _train_on_node(job: Job, key: int, mailbox: Any) -> Outcome:
    """Train a job in a Ray task."""
    for path in (job.root / "inputs" / job.spec.competition, job.folder.parents[1]):
        if not path.is_dir():
            return Outcome(
                job,
                None,
                FoldwiseError(
                    f"{path} is not there on the node {socket.gethostname()}\n"
                    "  fix: the project must lie under the same path on every node, on shared storage; "
                    "see docs/CLUSTER.md"
                ),
            )
    return train(job, lambda _job, event: mailbox.put((key, event)))


def make_executor(name: str, emit: Emit, *, threads: int, device: str | None, workers: int | None) -> Executor:
    """Make the executor of a name.

    Args:
        name: `local`, `processes` or `ray`.
        emit: Takes the events of jobs, in the thread that calls `wait`.
        threads: CPU threads of a unit, from which follows how many there is room for.
        device: As `pick_runtime` takes it.
        workers: Units at a time; None for what there is room for.

    Raises:
        FoldwiseError: If there is no such executor, or what it needs is not there.
    """
    if workers is not None and workers < 1:
        raise FoldwiseError(f"`WORKERS >= 1` must hold, but got {workers}\n  fix: leave WORKERS (--workers) out")
    match name:
        case "local":
            if workers is not None and workers > 1:
                raise FoldwiseError(
                    f"`local` trains one unit at a time, but {workers} workers were asked for\n"
                    f"  fix: ON=processes WORKERS={workers} (--on processes --workers {workers})"
                )
            return LocalExecutor(emit)
        case "processes":
            return ProcessesExecutor(emit, threads=threads, device=device, workers=workers)
        case "ray":
            return RayExecutor(emit, threads=threads, device=device, workers=workers)
    raise FoldwiseError(f"there is no executor `{name}`\n  fix: ON=local, processes or ray (--on)")


def _gpus(device: str | None, threads: int) -> list[str]:
    """The devices that units can have one each; none where they share the CPU."""
    chosen = pick_runtime(device, "fp32", threads).device
    if chosen.type == "cpu":
        return []
    if chosen.type == "cuda" and chosen.index is None:
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [str(chosen)]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _died(job: Job, what: str) -> DeviceError:
    return DeviceError(
        f"fold {job.fold}, seed {job.seed} was given up: {what}, most likely for want of memory\n"
        "  fix: fewer at a time (WORKERS=1, --workers 1), or less memory each "
        f'(SET="train.batch_size={max(1, job.spec.train.batch_size // 2)}"); see docs/TROUBLESHOOTING.md'
    )
