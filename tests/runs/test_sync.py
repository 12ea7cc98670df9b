"""Sending offline files with W&B's own command, against a server that takes them, refuses them or hangs.

The server answers the few requests that a unit's run needs as W&B's does.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from foldwise.errors import FoldwiseError, HubError
from foldwise.runs.events import EpochDone, RunStarted, UnitDone, UnitStarted
from foldwise.runs.sync import Synced, _reason, sync_runs
from foldwise.runs.tracking import wandb_tracker


class Wandb(BaseHTTPRequestHandler):
    """Takes runs, but refuses those named in `refused`, and leaves those in `slow` without an answer for a while."""

    rows: list[dict[str, Any]] = []  # noqa: RUF012  shared on purpose
    refused: set[str] = set()  # noqa: RUF012
    slow: set[str] = set()  # noqa: RUF012

    def do_GET(self) -> None:
        self.answer(200, {})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        told: dict[str, Any] = json.loads(content) if self.path.startswith(("/graphql", "/files")) else {}
        if self.path.endswith("/file_stream"):
            content_of = told.get("files", {}).get("wandb-history.jsonl", {})
            Wandb.rows.extend(json.loads(line) for line in content_of.get("content", []))
            self.answer(200, {})
        elif "UpsertBucket" in told.get("query", ""):
            name = told["variables"]["name"]
            if name in Wandb.slow:
                time.sleep(2)
            if name in Wandb.refused:
                self.answer(403, {"errors": [{"message": "no such project"}]})
                return
            project = {"id": "p", "name": "faces", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "x", "name": name, "displayName": "d", "config": "{}", "project": project}
            self.answer(200, {"data": {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}})
        elif "RunResumeStatus" in told.get("query", ""):
            self.answer(200, {"data": {"model": None}})
        else:
            self.answer(200, {"data": {}, "errors": [{"message": "files are not taken here"}]})

    def answer(self, status: int, told: Any) -> None:
        content = json.dumps(told).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # it was killed while it waited

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Wandb]]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in (("rows", []), ("refused", set()), ("slow", set())):
        monkeypatch.setattr(Wandb, name, value)
    with ThreadingHTTPServer(("127.0.0.1", 0), Wandb) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        try:
            yield Wandb
        finally:
            server.shutdown()
            thread.join()


def track(path: Path, *epochs: int, attempt: str = "first") -> Path:
    """Follow a unit as W&B does, begun at the first of `epochs`, and give back the piece that it leaves in `path`."""
    path.mkdir(parents=True, exist_ok=True)
    before = set(path.glob("wandb/*run-*"))
    tracker = wandb_tracker(path, "faces")
    assert tracker is not None
    tracker.on(RunStarted("vit", "aspicv", attempt, {"seeds": [42]}, "accuracy", ((0, 42),), (), 3, "cpu", False))
    tracker.on(UnitStarted(0, 42, epochs[0] - 1, 80, 20))
    for number in epochs:
        tracker.on(EpochDone(0, 42, number, {"epoch": number, "val_accuracy": number / 10}))
    tracker.on(UnitDone(0, 42, 0.6, 0.02, 1.0))
    tracker.close()
    (piece,) = set(path.glob("wandb/*run-*")) - before
    return piece


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """What W&B leaves offline: of a run, the same run resumed, and another one."""
    folder = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        return track(folder, 1, 2), track(folder, 3), track(folder, 1, attempt="other")


def put(root: Path, folder: str, *pieces: Path) -> list[str]:
    """Copy pieces to a run's or a study's folder, and say where they are now."""
    for piece in pieces:
        shutil.copytree(piece, root / "oof" / folder / "wandb" / piece.name)
    return [f"oof/{folder}/wandb/{piece.name}" for piece in pieces]


def run_id_of(piece: Path) -> str:
    return piece.name.rpartition("-")[2]


def sync(root: Path, experiment: str | None = None, **changes: Any) -> tuple[Synced, list[str]]:
    said: list[str] = []
    return sync_runs(root, experiment, say=said.append, **changes), said


@pytest.mark.slow
def test_each_piece_is_sent_once_in_order_and_a_refused_one_stops_no_other(
    server: type[Wandb], offline: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    first, second, other = offline
    (bad,) = put(tmp_path, "bad", other)
    begun, resumed = put(tmp_path, "vit", first, second)
    server.refused.add(run_id_of(other))
    assert sync(tmp_path) == (
        Synced(sent=2, before=0, failed=1, waiting=0),
        [
            f"NOT SENT    {bad}: no such project",
            f"sent        {begun}",
            f"sent        {resumed}",
            "W&B: 2 sent, 0 sent before, 1 not sent; the same command tries them again",
        ],
    )
    assert [(row["epoch"], row["val_accuracy"]) for row in server.rows] == [(1, 0.1), (2, 0.2), (3, 0.3)]

    server.rows.clear()
    server.refused.clear()
    assert sync(tmp_path, "vit") == (Synced(0, 2, 0, 0), ["W&B: 0 sent, 2 sent before"])
    assert server.rows == []
    assert sync(tmp_path) == (Synced(1, 2, 0, 0), [f"sent        {bad}", "W&B: 1 sent, 2 sent before"])
    assert [row["epoch"] for row in server.rows] == [1], "nothing is sent twice"


@pytest.mark.slow
def test_a_server_that_hangs_is_not_waited_for_with_every_piece(
    server: type[Wandb], offline: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    first, _, other = offline
    server.slow.update(map(run_id_of, offline))
    slow, _ = put(tmp_path, "vit", first, other)
    assert sync(tmp_path, patience_s=1.5) == (
        Synced(0, 0, 2, 0),
        [
            f"NOT SENT    {slow}: no end after 1.5 s",
            "NOT SENT    1 more were not tried",
            "W&B: 0 sent, 0 sent before, 2 not sent; the same command tries them again",
        ],
    )


@pytest.mark.slow
def test_what_was_sent_while_it_ran_is_not_sent_again_but_what_got_stuck_is(
    server: type[Wandb], tmp_path: Path
) -> None:
    piece = track(tmp_path / "oof" / "vit", 1)
    assert piece.name.startswith("run-"), "it was online"
    assert sync(tmp_path) == (Synced(0, 1, 0, 0), ["W&B: 0 sent, 1 sent before"])
    (mark,) = piece.glob("*.synced")
    mark.unlink()  # as a run leaves it whose server went away
    assert sync(tmp_path)[0] == Synced(1, 0, 0, 0)
    assert mark.exists(), "the mark is W&B's own"


def test_runs_and_studies_are_found_and_those_under_way_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []

    def send(file: Path, *_: object) -> tuple[str, bool]:
        sent.append(file.parent.relative_to(tmp_path / "oof").as_posix())
        return "", True

    monkeypatch.setattr("foldwise.runs.sync._send", send)
    monkeypatch.setattr("foldwise.runs.sync.wandb_environment", dict)
    every = ("offline-run-1-x", "run-2-x", "offline-run-3-x")
    for folder in ("b", "a", "a/tune", ".smoke/a"):
        for piece in every:
            (tmp_path / "oof" / folder / "wandb" / piece).mkdir(parents=True)
            (tmp_path / "oof" / folder / "wandb" / piece / "run-x.wandb").touch()
    (tmp_path / "oof" / "a" / "tune" / "journal.lock").symlink_to("nowhere")
    (tmp_path / "oof" / "a" / "tune" / "3").mkdir()
    with FileLock(tmp_path / "oof" / "a" / ".lock"):
        result, said = sync(tmp_path)
        assert result == Synced(6, 0, 0, 3)
        assert said[0] == "left alone  oof/a/wandb: its run is under way; sync it afterwards"
        assert said[-1] == "W&B: 6 sent, 0 sent before, 3 left alone"
        assert sent == [f"{folder}/wandb/{piece}" for folder in ("a/tune", "b") for piece in every]
    with FileLock(tmp_path / "oof" / "a" / "tune" / "3" / ".lock"):
        sent.clear()
        assert sync(tmp_path, "a")[0] == Synced(3, 0, 0, 3)
        assert sent == [f"a/wandb/{piece}" for piece in every]


def test_nothing_starts_without_a_key_a_server_or_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("foldwise.runs.sync._send", lambda *_: pytest.fail("tried to send"))
    assert sync(tmp_path) == (Synced(0, 0, 0, 0), ["W&B: there is nothing on disk to send"])
    piece = tmp_path / "oof" / "vit" / "wandb" / "offline-run-1-x"
    piece.mkdir(parents=True)
    (piece / "run-x.wandb").touch()
    with pytest.raises(FoldwiseError) as error:
        sync(tmp_path)
    assert str(error.value) == (
        "there is no W&B API key, so that nothing can be sent\n"
        "  fix: .venv/bin/wandb login, or set WANDB_API_KEY; for a server of your own WANDB_BASE_URL too"
    )
    with pytest.raises(FoldwiseError) as error:
        sync(tmp_path, "cnn")
    assert str(error.value) == "there is no run `cnn` under oof/\n  fix: runs here: vit"
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(HubError) as unreached:
        sync(tmp_path)
    reason = str(unreached.value).partition("(")[2].partition(")")[0]
    assert str(unreached.value) == (
        f"W&B at http://127.0.0.1:9 cannot be reached ({reason})\n"
        "  fix: go online, or mend WANDB_BASE_URL, and try again"
    )
    (piece / "run-x.wandb.synced").touch()
    assert sync(tmp_path)[0] == Synced(0, 1, 0, 0), "where nothing is left to send, nothing is asked for"


def test_the_reason_is_what_wandb_gave_last_without_its_colours() -> None:
    said = (
        "\x1b[34mwandb\x1b[0m: Syncing 1 run(s):\nwandb: ERROR Failed to x: returned error 401\n"
        "wandb: ERROR Find detailed error logs at: /tmp/x.log\nError: WANDB_API_KEY invalid: too short.\n"
    )
    assert _reason(said) == "WANDB_API_KEY invalid: too short."
    assert _reason(said.rpartition("Error:")[0]) == "Failed to x: returned error 401"
    assert _reason("wandb: No runs to sync.\n") == "No runs to sync."
    assert _reason("") == "wandb sync said nothing"
