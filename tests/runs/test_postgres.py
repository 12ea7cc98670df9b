"""Several processes on one study in PostgreSQL: every set once, no fold twice, and the death of one is no loss.

The server is Debian's own, started here; FOLDWISE_REQUIRE_POSTGRES=1 makes its absence a failure.
"""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from foldwise.records.store import load_run
from foldwise.records.study import read_study
from foldwise.runs.study import close_storage, open_storage, set_key
from foldwise.spec.space import own_values

pytestmark = pytest.mark.slow

PASSWORD = "hushhush"
WORKERS = 4


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of an empty database on a server of our own, with the password of its user."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs or not (programs[-1] / "initdb").exists():
        reason = "PostgreSQL's server is not installed: apt-get install postgresql"
        if os.environ.get("FOLDWISE_REQUIRE_POSTGRES"):
            pytest.fail(reason)
        pytest.skip(reason)
    pytest.importorskip("psycopg")
    # Not below pytest's own folder, which is closed to others: the server refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="foldwise-postgres-"))
    user = "postgres" if os.geteuid() == 0 else getpass.getuser()
    if os.geteuid() == 0:
        os.chown(folder, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)

    def call(program: str, *words: str) -> None:
        command = [str(programs[-1] / program), *words]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", *command]
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    secret = folder / "password"
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    data, log = str(folder / "data"), str(folder / "log")
    # Nothing here must outlive the machine, so nothing is flushed to its disk.
    asked = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off -c shared_buffers=16MB"
    try:
        call("initdb", "-D", data, "-U", "tuner", "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync")
        call("pg_ctl", "-D", data, "-l", log, "-w", "-o", asked, "start")
        try:
            yield f"postgresql+psycopg://tuner:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


@contextmanager
def watched(tuning: Any) -> Iterator[dict[str, set[int]]]:
    """See each unit as often as it is kept: a second training of it would give its file a second time."""
    seen: dict[str, set[int]] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            try:
                for unit, kept in tuning.units().items():
                    seen.setdefault(unit, set()).add(kept)
            except FileNotFoundError:  # it is just being kept
                continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def spec_of(tuning: Any, sets: int, finalists: int) -> Any:
    return tuning.spec(changes={"optim": {"lr": 1e-5}}, trials=sets, finalists=finalists)


def secrets_in(folder: Path) -> list[Path]:
    """Files that tell the database's password."""
    return [path for path in folder.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]


def check(tuning: Any, url: str, seen: dict[str, set[int]], sets: int) -> list[optuna.trial.FrozenTrial]:
    """What must hold of a study whoever worked on it, and however that ended."""
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": NullPool})
    trials = optuna.load_study(study_name=f"demo/{tuning.name}", storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert all(trial.state.is_finished() for trial in trials)
    rows = read_study(tuning.path).trials
    counted = [row for row in rows if row.state != "duplicate"]
    assert len({set_key(row.parameters) for row in counted}) == len(counted) == sets
    own = own_values(spec_of(tuning, sets, 0))
    assert trials[0].user_attrs["values"] == own
    assert own in [row.parameters for row in counted]  # under a later number where its process was the one killed
    assert {row.state for row in counted} <= {"complete", "pruned"}
    for row in counted:
        for fold in row.fold_scores:
            assert (tuning.path / set_key(row.parameters) / f"fold{fold}" / "seed42" / "unit.json").exists()
    assert sum(len(row.fold_scores) for row in counted) == len(
        list(tuning.path.glob("????????????/fold*/seed42/unit.json"))
    )
    assert {unit: len(times) for unit, times in seen.items()} == dict.fromkeys(tuning.units(), 1)
    assert not secrets_in(tuning.root)
    assert read_study(tuning.path).info["storage"] == url.replace(PASSWORD, "***")
    return trials


def test_a_new_database_is_opened_by_many_at_once(server: str, tmp_path: Path) -> None:
    """All find no tables and make them; PostgreSQL lets one succeed and fails the rest."""
    for turn in range(5):
        engine = create_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE opened{turn}"))
        url = server.replace("/postgres", f"/opened{turn}")
        together = threading.Barrier(8)

        def open_one(_: int, url: str = url, together: threading.Barrier = together) -> bool:
            together.wait()
            close_storage(open_storage(url, tmp_path))
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(open_one, range(8)))


def test_four_processes_share_a_study_and_one_of_them_finishes_it(tuning: Any, server: str) -> None:
    tuning.write(spec_of(tuning, 8, 1))
    with watched(tuning) as seen, ExitStack() as stack:
        workers = [stack.enter_context(tuning.start("--storage", server)) for _ in range(WORKERS)]
        printed = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORKERS, printed
    assert [err for _, err in printed] == [""] * WORKERS
    trials = check(tuning, server, seen, 8)
    assert not [trial for trial in trials if trial.user_attrs.get("fate") in ("died", "stopped")]
    assert any("experiments/tiny_tuned.yaml" in out for out, _ in printed)
    assert len(load_run(tuning.root / "oof" / "tiny_tuned").ids) == 80


def test_the_death_of_one_of_four_is_no_loss(tuning: Any, server: str) -> None:
    tuning.name = "small"
    tuning.write(spec_of(tuning, 8, 0))
    with watched(tuning) as seen, ExitStack() as stack:
        workers = [stack.enter_context(tuning.start("--storage", server)) for _ in range(WORKERS)]
        until = time.monotonic() + 300
        while len(tuning.units()) < 3:
            assert time.monotonic() < until, "nothing happened"
            assert all(worker.poll() is None for worker in workers)
            time.sleep(0.01)
        workers[0].kill()
        for worker in workers:
            worker.communicate(timeout=300)
        assert [worker.returncode for worker in workers[1:]] == [0] * (WORKERS - 1)
        if not (tuning.path / "tune.json").exists():  # it was to finish the study
            with tuning.start("--storage", server) as last:
                assert last.communicate(timeout=300)[1] == ""
    check(tuning, server, seen, 8)
