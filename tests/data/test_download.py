"""Kaggle's own client, against a server that answers as Kaggle does: files arrive, and refusals say what to do."""

from __future__ import annotations

import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from foldwise.data.demo import draw_demo
from foldwise.data.download import fetch_kaggle, unpack
from foldwise.data.ingest import ingest
from foldwise.errors import DataError, FoldwiseError

STATUS = {"closed": 403, "nope": 404, "stale": 401, "busy": 429, "down": 500}


class Kaggle(BaseHTTPRequestHandler):
    """Hands out one archive under any slug but those in STATUS."""

    archive = b""
    asked: list[str] = []  # noqa: RUF012  shared on purpose

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        Kaggle.asked.append(f"{self.path} {body} {self.headers['Authorization']}")
        if status := next((status for slug, status in STATUS.items() if slug in body), 0):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            answer = b'{"code": %d, "message": "no"}' % status
        elif "DownloadDataFiles" in self.path:
            self.send_response(302)
            self.send_header("Location", "/files/archive.zip")
            answer = b""
        else:
            return self.do_GET()
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        return None

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/zip")
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.send_header("Content-Length", str(len(self.archive)))
        self.end_headers()
        self.wfile.write(self.archive)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Kaggle]]:
    """The client signed in with a legacy key and pointed at a server on the loopback."""
    # Before the import, which looks for a token, makes its folder, and would ask the real server about it.
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_API_V1_TOKEN", "https_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("KAGGLE_USERNAME", "someone")
    monkeypatch.setenv("KAGGLE_KEY", "0" * 32)
    pytest.importorskip("kaggle")
    from kaggle.api.kaggle_api_extended import KaggleApi
    from kagglesdk import kaggle_env

    with ThreadingHTTPServer(("127.0.0.1", 0), Kaggle) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, address)
        monkeypatch.setattr(KaggleApi, "config", str(tmp_path / "kaggle.json"))
        monkeypatch.setattr(Kaggle, "asked", [])
        try:
            yield Kaggle
        finally:
            server.shutdown()
            thread.join()


def zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(("slug", "service"), [("faces", "DownloadDataFiles"), ("someone/faces", "DownloadDataset")])
def test_a_hand_out_is_fetched_unpacked_and_taken_in(
    slug: str, service: str, kaggle: type[Kaggle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_demo(tmp_path / "drawn", train=60, test=5)
    (tmp_path / "drawn" / "test_labels.csv").unlink()
    kaggle.archive = zipped(tmp_path / "drawn")
    fetch_kaggle(slug, tmp_path / "hand")
    assert any(service in line and "faces" in line and "Basic" in line for line in kaggle.asked)
    assert sorted(path.name for path in (tmp_path / "hand").iterdir()) == ["dataset.zip", "train.csv"]
    assert ingest(tmp_path / "hand", tmp_path, "faces").n_train == 60
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slug", "what", "fix"),
    [
        (
            "closed",
            "Kaggle does not let you have it (403): its rules are not accepted, or it is private",
            "open https://www.kaggle.com/competitions/closed, accept the rules there (Join, or Rules), and try again",
        ),
        (
            "a/closed",
            "Kaggle does not let you have it (403): its rules are not accepted, or it is private",
            "open https://www.kaggle.com/datasets/a/closed, accept the rules there (Join, or Rules), and try again",
        ),
        (
            "nope",
            "Kaggle has no such competition or data set (404)",
            "give the end of its address: <competition>, or <owner>/<dataset>",
        ),
        (
            "stale",
            "Kaggle does not accept the token (401)",
            "at kaggle.com, under Settings > API, create a token; then set KAGGLE_API_TOKEN to it, "
            "or run `kaggle auth login`",
        ),
        (
            "busy",
            "Kaggle asks for fewer downloads (429)",
            "wait some minutes; or open https://www.kaggle.com/competitions/busy, download it there by hand, "
            "and give FROM=<folder>",
        ),
        (
            "down",
            "Kaggle failed (500): no",
            "try again later; or open https://www.kaggle.com/competitions/down, download it there by hand, "
            "and give FROM=<folder>",
        ),
        (
            "https://kaggle.com/c/x",
            "is neither a competition nor a data set",
            "give the end of its address: <competition>, or <owner>/<dataset>",
        ),
    ],
)
def test_refusals_say_what_to_do(slug: str, what: str, fix: str, kaggle: type[Kaggle], tmp_path: Path) -> None:
    with pytest.raises(FoldwiseError) as caught:
        fetch_kaggle(slug, tmp_path / "hand")
    assert str(caught.value) == f"KAGGLE={slug}: {what}\n  fix: {fix}"
    assert caught.value.exit_code == 3


@pytest.mark.slow
def test_no_token_no_network_no_client(
    kaggle: type[Kaggle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kagglesdk import kaggle_env

    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, "http://127.0.0.1:9")
    with pytest.raises(
        FoldwiseError, match=r"KAGGLE=faces: Kaggle cannot be reached\n  \(ConnectionError: .*\n  fix: "
    ):
        fetch_kaggle("faces", tmp_path / "hand")
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FoldwiseError, match=r"KAGGLE=faces: there is no Kaggle token\n  fix: at kaggle\.com"):
        fetch_kaggle("faces", tmp_path / "hand")
    for name in ("kaggle", "kaggle.api", "kaggle.api.kaggle_api_extended"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(FoldwiseError) as caught:
        fetch_kaggle("faces", tmp_path / "hand")
    assert str(caught.value) == 'kaggle is not installed\n  fix: pip install "foldwise[kaggle]"'
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "..\\x"])
def test_nothing_is_unpacked_out_of_its_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good.txt", "x")
        archive.writestr(name, "x")
    with pytest.raises(DataError, match="leads out of the archive's folder"):
        unpack(path, tmp_path / "in")
    assert [found.name for found in tmp_path.rglob("*")] == ["in", "a.zip"]


def test_a_damaged_archive_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"<html>")
    with pytest.raises(DataError, match="cannot be unpacked: File is not a zip file"):
        unpack(path, tmp_path)
