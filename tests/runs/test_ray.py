"""The Ray executor: the same bits as in one process, on a cluster that loses a node in mid-run as well."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foldwise.errors import FoldwiseError
from foldwise.runs.events import EpochDone, Event, Message, UnitStarted
from foldwise.runs.executors import Job, RayExecutor, _train_on_node, make_executor, units_of

# Clusters of tests answer nobody else. Ray reads this once, as it is imported; without it, a token goes to the home.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

ray = pytest.importorskip("ray")

# What Ray itself leaves open or has superseded is its own affair.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set for Ray goes with the test."""
    for name, value in (("worker_niceness", "0"), ("task_oom_retries", "3"), ("ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")):
        monkeypatch.setenv(f"RAY_{name}", value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one CPU each, which $RAY_ADDRESS leads to."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20})
    try:
        started.add_node(num_cpus=1, object_store_memory=80 << 20)
        monkeypatch.setenv("RAY_ADDRESS", started.address)
        yield started
    finally:
        ray.shutdown()
        started.shutdown()


def jobs_of(project: Any, folder: str) -> list[Job]:
    """A unit of one thread and one of two."""
    made = []
    for fold, threads in ((0, 1), (1, 2)):
        path = project.root / "oof" / folder / f"fold{fold}" / "seed42"
        path.mkdir(parents=True)
        made.append(Job(project.root, project.spec(train={"epochs": 1}), fold, 42, path, threads, "cpu"))
    return made


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def refused(threads: int = 1) -> str:
    with pytest.raises(FoldwiseError) as caught:
        make_executor("ray", lambda _job, _event: None, threads=threads, device="cpu", workers=None)
    return str(caught.value)


def test_a_cluster_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert refused() == (
        f"no Ray cluster at RAY_ADDRESS={address}: [Errno 111] Connection refused\n"
        "  fix: start it (ray start --head --port=6379), or leave RAY_ADDRESS out for one on this machine; "
        "see docs/CLUSTER.md"
    )


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("ray://127.0.0.1:10001", "`ray://` is not supported, since the run's files must be here"),
        ("127.0.0.1:ray", "invalid literal for int"),
    ],
)
def test_an_address_that_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch, address: str, why: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert refused().startswith(f"no Ray cluster at RAY_ADDRESS={address}: {why}")


def test_a_node_without_the_projects_files_is_named(project: Any) -> None:
    (job, _) = jobs_of(project, "tiny")
    (project.root / "inputs" / "demo").rename(project.root / "inputs" / "elsewhere")
    outcome = _train_on_node(job, 1, None)
    assert outcome.unit is None
    assert str(outcome.error) == (
        f"{project.root / 'inputs' / 'demo'} is not there on the node {socket.gethostname()}\n"
        "  fix: the project must lie under the same path on every node, on shared storage; see docs/CLUSTER.md"
    )


@pytest.mark.slow
def test_a_cluster_of_ones_own_ends_with_the_bits_of_local_for_one_thread_and_for_two(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # two threads that spin on a busy machine take minutes
    monkeypatch.chdir(project.root)
    heard: list[tuple[int, Event]] = []
    ended: list[int] = []

    def emit(job: Job, event: Event) -> None:
        assert job.fold not in ended
        heard.append((job.fold, event))

    units = {}
    with closing(make_executor("ray", emit, threads=2, device="cpu", workers=1)) as executor:
        assert (executor.slots, executor.told) == (1, "Ray, 1 node, 1 unit of 2 threads at a time")
        for unit in units_of(executor, jobs_of(project, "apart")):
            ended.append(unit.fold)
            units[unit.fold] = unit
    assert not ray.is_initialized()
    assert [fold for fold, event in heard if isinstance(event, EpochDone)] == [0, 1]
    with closing(make_executor("local", lambda _job, _event: None, threads=2, device="cpu", workers=1)) as local:
        for unit in units_of(local, jobs_of(project, "here")):
            other = units[unit.fold]
            assert (unit.info["threads"], other.info["threads"]) == (unit.fold + 1, unit.fold + 1)
            np.testing.assert_array_equal(unit.val_probs, other.val_probs)
            np.testing.assert_array_equal(unit.test_probs, other.test_probs)
            assert unit.info["weights_sha256"] == other.info["weights_sha256"]


class NodeKiller:
    """A listener that takes a node away once two units have trained an epoch at the same time."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.at: dict[int, int] = {}
        self.started: list[tuple[int, int]] = []
        self.said: list[str] = []
        self.gone = False

    def on(self, event: Event) -> None:
        if isinstance(event, Message):
            self.said.append(event.text)
        if isinstance(event, UnitStarted):
            self.started.append((event.fold, event.from_epoch))
        if isinstance(event, EpochDone):
            self.at[event.fold] = event.epoch
            under_way = [fold for fold, epoch in self.at.items() if 2 <= epoch < 20]
            if len(under_way) == 2 and not self.gone:
                self.gone = True
                (node,) = self.cluster.worker_nodes
                self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        pass


@pytest.mark.slow
def test_a_run_that_loses_a_node_ends_with_the_files_of_an_undisturbed_one(cluster: Any, project: Any) -> None:
    # Whoever asks for more than any node has would wait for ever.
    assert refused(threads=3) == (
        "no node of the Ray cluster has room for a unit of 3 threads: the largest has 1 CPU\n"
        "  fix: --set train.threads=1, or start a larger node"
    )
    with closing(make_executor("ray", lambda _job, _event: None, threads=1, device="cpu", workers=None)) as executor:
        assert isinstance(executor, RayExecutor)
        assert (executor.slots, executor.told) == (2, "Ray, 2 nodes, 2 units of 1 thread at a time")

    epochs = {"epochs": 30}
    killer = NodeKiller(cluster)
    record, _ = project.run(project.spec("apart", train=epochs), follow=lambda _path: [killer], on="ray")
    local, _ = project.run(project.spec("here", train=epochs))

    assert killer.gone
    resumed = [(fold, epoch) for fold, epoch in killer.started if epoch]
    assert len(resumed) == 1
    assert resumed[0][1] >= 2
    assert f"fold {resumed[0][0]}, seed 42: goes on after epoch {resumed[0][1]} of 30" in killer.said
    for name in ("oof.csv", "test.csv"):
        assert (project.path("apart") / name).read_bytes() == (project.path("here") / name).read_bytes()
    for fold in range(5):
        unit = Path(f"fold{fold}") / "seed42"
        for name in ("val.csv", "test.csv"):
            assert (project.path("apart") / unit / name).read_bytes() == (
                project.path("here") / unit / name
            ).read_bytes()
        history = project.table("apart", "history.csv")
        assert history[history.fold == fold].epoch.tolist() == list(range(1, 31))
    for key in ("score", "fold_scores", "weights"):
        assert record[key] == local[key]
