"""Weights come to another machine as run.json vouches for them, or not at all; a store holds nothing half-written.

Most tests carry files of a few bytes, since only their hashes count; one predicts with what a fresh clone pulled. W&B's
own client talks to a stand-in of its server over loopback.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from filelock import FileLock

from foldwise.data.competition import load_dataset
from foldwise.errors import FoldwiseError, HubError, RecordError
from foldwise.files import sha256_bytes, sha256_json
from foldwise.learn.device import pick_runtime
from foldwise.records.store import load_run, rows_of
from foldwise.runs.kept import kept_models
from foldwise.runs.weights import Carried, pull_weights, push_weights, weights_lines


def keep(root: Path, name: str, *contents: bytes) -> list[Path]:
    """A complete run with a file of weights a fold, as far as carrying weights looks at it."""
    files = [root / "oof" / name / f"fold{fold}" / "seed42" / "weights.safetensors" for fold in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
    hashes = {f"fold{fold}/seed42": sha256_bytes(content) for fold, content in enumerate(contents)}
    record = root / "oof" / name / "run.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"competition": "faces", "weights": hashes}))
    return files


def clone(root: Path, to: Path) -> Path:
    """What git carries: everything but the folders of folds."""
    return shutil.copytree(root, to, ignore=shutil.ignore_patterns("fold[0-9]", "store", "clone", ".lock"))


def push(root: Path, *names: str, to: str = "store") -> tuple[Carried, list[str]]:
    said: list[str] = []
    return push_weights(root, names, to, say=said.append), said


def pull(root: Path, *names: str, source: str) -> tuple[Carried, list[str]]:
    said: list[str] = []
    return pull_weights(root, names, source, say=said.append), said


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two runs with weights and one that has none here."""
    keep(tmp_path, "cnn", b"first", b"second")
    keep(tmp_path, "vit", b"third")
    keep(tmp_path, "elsewhere", b"fourth")[0].unlink()
    return tmp_path


def test_a_fresh_clone_pulls_what_was_pushed_and_nothing_twice(root: Path, store: Path) -> None:
    done, said = push(root)
    assert done == Carried(files=3, bytes=len(b"firstsecondthird"), before=0, lacking=("elsewhere",))
    assert said == [
        "pushed     cnn: 2 files, 0.0 MB",
        "pushed     vit: 1 file, 0.0 MB",
        "not here   elsewhere",
        "weights    3 files pushed to store, 0.0 MB; 0 there before",
    ]
    first = sha256_bytes(b"first")
    assert contents(store)[f"{first[:2]}/{first}.safetensors"] == b"first"
    assert len(contents(store)) == 3, "nothing but files by their hash"

    times = {file: file.stat().st_mtime_ns for file in store.rglob("*.safetensors")}
    done, said = push(root)
    assert (done.files, done.before) == (0, 3)
    assert said[0] == "there      cnn: 2 files there already"
    assert times == {file: file.stat().st_mtime_ns for file in store.rglob("*.safetensors")}

    other = clone(root, root / "clone")
    done, said = pull(other, source=str(store))
    assert (done.files, done.before, done.lacking) == (3, 0, ("elsewhere",))
    assert (
        said
        == [
            "pulled     cnn: 2 files, 0.0 MB",
            "not there  elsewhere",
            "pulled     vit: 1 file, 0.0 MB",
            f"weights    3 files pulled from {store}, 0.0 MB; 0 here before",
        ][:1]
        + said[1:]
    ), "runs by name"
    assert contents(other / "oof" / "cnn") == contents(root / "oof" / "cnn") | {".lock": b""}
    assert pull(other, source=str(store))[0] == Carried(0, 0, 3, ("elsewhere",))


def test_a_pull_that_was_stopped_goes_on(root: Path, store: Path) -> None:
    push(root)
    other = clone(root, root / "clone")
    first, second = (other / "oof" / "cnn" / f"fold{fold}" / "seed42" / "weights.safetensors" for fold in (0, 1))
    pull(other, "cnn", source=str(store))
    second.unlink()
    before = first.stat().st_mtime_ns
    done, said = pull(other, "cnn", source=str(store))
    assert (done.files, done.before, said[0]) == (1, 1, "pulled     cnn: 1 file, 0.0 MB")
    assert (second.read_bytes(), first.stat().st_mtime_ns) == (b"second", before)


def test_a_damaged_file_there_is_refused_and_the_others_come(root: Path, store: Path) -> None:
    push(root)
    sha256 = sha256_bytes(b"first")
    kept = store / sha256[:2] / f"{sha256}.safetensors"
    kept.write_bytes(b"firs")
    other = clone(root, root / "clone")
    with pytest.raises(RecordError) as caught:
        pull(other, "cnn", source=str(store))
    found = sha256_bytes(b"firs")
    assert str(caught.value).splitlines() == [
        f"oof/cnn/fold0/seed42: {store}: the file there is not the one that run.json vouches for "
        f"(sha256 {found[:12]}, expected {sha256[:12]})",
        f"  fix: push it again from where it was trained: make weights TO={store}",
        "1 error; all other files were carried over.",
    ]
    assert set(contents(other / "oof" / "cnn")) == {"run.json", ".lock", "fold1/seed42/weights.safetensors"}

    assert push(root, "cnn")[1][0] == "pushed     cnn: 1 file, 0.0 MB (1 replaced: damaged there)"
    assert kept.read_bytes() == b"first"
    assert pull(other, "cnn", source=str(store))[0].files == 1


def test_another_file_here_is_neither_pushed_nor_written_over(root: Path, store: Path) -> None:
    push(root)
    shutil.rmtree(store / sha256_bytes(b"second")[:2])
    mine = root / "oof" / "cnn" / "fold0" / "seed42" / "weights.safetensors"
    mine.write_bytes(b"of another training")
    expected = [
        "oof/cnn/fold0/seed42/weights.safetensors: is not the file that run.json vouches for, and was left alone",
        "  fix: move it away and fetch the right one: make weights FROM=<folder>; or make exp EXP=cnn FRESH=1",
        "1 error; all other files were carried over.",
    ]
    for carry in (lambda: push(root, "cnn"), lambda: pull(root, "cnn", source=str(store))):
        with pytest.raises(RecordError) as caught:
            carry()
        assert str(caught.value).splitlines() == expected
        assert mine.read_bytes() == b"of another training"
    assert sha256_bytes(b"of another training") not in str(contents(store).keys())
    assert b"second" in contents(store).values(), "the other file was pushed"
    assert weights_lines(root, ["cnn"], None)[1] == "cnn      2  0.0  1 of 2, 1 other"


def test_what_is_named_must_be_there(root: Path, store: Path) -> None:
    with pytest.raises(RecordError) as caught:
        push(root, "elsewhere")
    assert str(caught.value).splitlines()[:2] == [
        "oof/elsewhere: its weights are not on this machine: fold0/seed42",
        "  fix: push from where it was trained, or train it here: make exp EXP=elsewhere FRESH=1",
    ]
    push(root, "cnn")
    with pytest.raises(RecordError) as caught:
        pull(root, "elsewhere", source=str(store))
    assert str(caught.value).splitlines()[:2] == [
        f"oof/elsewhere: {store} does not hold its weights: fold0/seed42",
        f"  fix: push them from where it was trained: make weights TO={store}",
    ]
    with pytest.raises(FoldwiseError) as caught_name:
        push(root, "cmn")
    assert str(caught_name.value) == (
        "there is no complete run `cmn` under oof/\n  fix: did you mean `cnn`? runs here: cnn, elsewhere, vit"
    )


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "--from nowhere: there is no such folder\n  fix: mount it, or fill it where the runs were trained"),
        ("wandb:faces", "--from wandb:faces: is neither a folder nor `wandb:<entity>/<project>`"),
        ("s3://bucket/w", "--from s3://bucket/w: is neither a folder nor `wandb:<entity>/<project>`"),
        ("oof/cnn/run.json", "--from oof/cnn/run.json: is no folder"),
        ("", "--from : is neither a folder nor"),
    ],
)
def test_places_that_are_none(root: Path, place: str, message: str) -> None:
    with pytest.raises(FoldwiseError) as caught:
        pull(root, source=place)
    assert str(caught.value).startswith(message)


def test_a_record_that_leads_elsewhere_is_refused(root: Path) -> None:
    record = root / "oof" / "cnn" / "run.json"
    for unit, sha256 in (("../../../fold0/seed42", "0" * 64), ("fold0/seed42", "../" * 21 + "x")):
        record.write_text(json.dumps({"competition": "faces", "weights": {unit: sha256}}))
        with pytest.raises(RecordError) as caught:
            push(root)
        assert str(caught.value).splitlines()[:2] == [
            f"oof/cnn/run.json: `weights` holds {unit!r}: {sha256!r}, which is no unit's hash",
            "  fix: take it back with git",
        ]


def test_nothing_is_put_into_a_run_that_is_being_trained(root: Path, store: Path) -> None:
    push(root)
    other = clone(root, root / "clone")
    with FileLock(other / "oof" / "cnn" / ".lock"), pytest.raises(RecordError) as caught:
        pull(other, source=str(store))
    assert str(caught.value).splitlines()[0] == "oof/cnn: is being run by another process"
    assert set(contents(other / "oof" / "cnn")) <= {"run.json", ".lock"}
    assert (other / "oof" / "vit" / "fold0" / "seed42" / "weights.safetensors").read_bytes() == b"third"


def test_a_full_disk_leaves_nothing_half_written(root: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(root)
    other = clone(root, root / "clone")

    def full(_source: Any, to: Any) -> None:
        Path(to).write_bytes(b"fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(RecordError, match=r"oof/cnn/fold0/seed42: .*: No space left on device"):
        pull(other, "cnn", source=str(store))
    assert set(contents(other / "oof" / "cnn")) == {"run.json", ".lock"}
    with pytest.raises(RecordError, match="elsewhere: oof/cnn: No space left on device"):
        push(root, "cnn", to="elsewhere")
    assert contents(root / "elsewhere") == {}


def test_the_table(root: Path, store: Path) -> None:
    assert weights_lines(root, [], None) == [
        "run        units   MB  here",
        "cnn            2  0.0  all",
        "elsewhere      1    -  none",
        "vit            1  0.0  all",
        "",
        "here: 0.0 MB, verified",
    ]
    push(root, "cnn")
    keep(root, "cnn2", b"first", b"fifth")
    assert weights_lines(root, ["cnn2", "elsewhere"], "store") == [
        "run        units   MB  here  there",
        "cnn2           2  0.0  all   1 of 2",
        "elsewhere      1    -  none  none",
        "",
        "here: 0.0 MB, verified; there: store, by name",
    ]


def test_several_that_push_at_once_are_harmless(root: Path, store: Path) -> None:
    keep(root, "large", *(np.random.default_rng(fold).bytes(500_000) for fold in range(3)))
    with ThreadPoolExecutor(4) as pool:
        done = [future.result()[0] for future in [pool.submit(push, root) for _ in range(4)]]
    assert {(one.files + one.before, one.lacking) for one in done} == {(6, ("elsewhere",))}
    assert len(contents(store)) == 6
    assert all(Path(name).stem == sha256_bytes(content) for name, content in contents(store).items())


@pytest.mark.slow
def test_what_a_fresh_clone_pulled_predicts_as_the_run_did(kept: Any, tmp_path: Path) -> None:
    said: list[str] = []
    push_weights(kept.root, [], str(tmp_path / "store"), say=said.append)
    other = clone(kept.root, tmp_path / "clone")
    with pytest.raises(RecordError, match="its weights are not on this machine"):
        list(kept_models(load_run(other / "oof" / "tiny"), pick_runtime("cpu", "fp32", 1)))
    pull_weights(other, ["tiny"], str(tmp_path / "store"), say=said.append)
    run, data = load_run(other / "oof" / "tiny"), load_dataset(other, "demo")
    images = data.images[rows_of(data.ids, run.test_ids)]
    models = list(kept_models(run, pick_runtime("cpu", "fp32", 1)))
    mean = sum(model.probabilities(images) for model in models) / len(models)
    np.testing.assert_allclose(mean, run.test_probs, atol=1e-6)


# W&B ------------------------------------------------------------------------------------------------------------------


class Wandb(ThreadingHTTPServer):
    """A server with one project, `me/faces`, and room for one artifact, as W&B's own client asks for it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.artifact: dict[str, Any] | None = None
        self.files: dict[str, bytes] = {}
        self.refuses = False

    def ask(self, operation: str, given: dict[str, Any]) -> dict[str, Any] | None:
        """What GraphQL answers; None where it knows no answer."""
        project = {"id": "p", "internalId": "1", "name": "faces", "entity": {"id": "e", "name": "me"}}
        viewer = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
        manifest = {"id": "m", "file": {"uploadUrl": f"{self.address}/manifest", "uploadHeaders": []}}
        match operation:
            case "Viewer":
                return {"viewer": viewer}
            case "UpsertBucket":
                bucket = {"id": "x", "name": given["name"], "displayName": "d", "config": "{}", "project": project}
                return {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}
            case "CreateArtifact":
                self.artifact = given["input"]
                made = {"id": "a", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
                return {"createArtifact": {"artifact": made}}
            case "CreateArtifactManifest":
                return {"createArtifactManifest": {"artifactManifest": manifest}}
            case "CreateArtifactFiles":
                nodes = [
                    {
                        "storagePath": file["name"],
                        "uploadUrl": f"{self.address}/{base64.b64decode(file['md5']).hex()}",
                        "uploadHeaders": [],
                        "uploadMultipartUrls": None,
                        "artifact": {"id": "a"},
                    }
                    for file in given["input"]["artifactFiles"]
                ]
                return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}}
            case "ArtifactByID":
                return {"artifact": self.told(project)}
            case "FetchArtifactManifest":
                return {"artifact": {"currentManifest": {"file": {"directUrl": f"{self.address}/manifest"}}}}
            case "ArtifactMembershipByName":
                membership = None
                if given["name"] in self.names and (told := self.told(project)):
                    of = {"artifact": told, "artifactCollection": told["artifactSequence"]}
                    about = {
                        "__typename": "ArtifactCollectionMembership",
                        "id": "m",
                        "versionIndex": 0,
                        "createdAt": "2026-01-01",
                        "aliases": [],
                    }
                    membership = about | of
                return {"project": {"artifactCollectionMembership": membership}}
            case _:
                return None

    @property
    def names(self) -> list[str]:
        """What the artifact goes by."""
        if self.artifact is None:
            return []
        return [f"{self.artifact['artifactCollectionName']}:{alias['alias']}" for alias in self.artifact["aliases"]]

    def told(self, project: dict[str, Any]) -> dict[str, Any] | None:
        if self.artifact is None:
            return None
        return {
            "__typename": "Artifact",
            "id": "a",
            "artifactSequence": {
                "__typename": "ArtifactSequence",
                "name": self.artifact["artifactCollectionName"],
                "project": project,
            },
            "versionIndex": 0,
            "artifactType": {"name": self.artifact["artifactTypeName"]},
            "metadata": self.artifact["metadata"],
            "ttlDurationSeconds": -1,
            "ttlIsInherited": True,
            "tags": [],
            "state": "COMMITTED",
            "size": "1",
            "digest": self.artifact["digest"],
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": "c",
            "fileCount": 2,
            "createdAt": "2026-01-01T00:00:00Z",
            "aliases": [],
            **dict.fromkeys(("description", "historyStep", "updatedAt")),
        }


class Answer(BaseHTTPRequestHandler):
    """Takes what is uploaded by the last part of its address, and gives out what an address names."""

    server: Wandb

    def do_GET(self) -> None:
        held = [content for name, content in self.server.files.items() if name in self.path]
        self.answer(held[0] if held else b"{}")

    def do_PUT(self) -> None:
        self.server.files[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b"")

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        told: dict[str, Any] = {}
        if self.path.startswith("/graphql"):
            asked = json.loads(content)
            operation = re.search(r"(?:query|mutation) (\w+)", asked["query"])
            data = self.server.ask(operation[1] if operation else "", asked.get("variables") or {})
            refused = {"data": None, "errors": [{"message": "permission denied"}]}
            told = refused if data is None or self.server.refuses else {"data": data}
        self.answer(json.dumps(told).encode())

    def answer(self, content: bytes) -> None:
        with suppress(OSError):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wandb]:
    """The server, which the client finds by its environment."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    # Whatever an earlier test left knows another server.
    wandb.teardown()
    with Wandb() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        try:
            yield server
        finally:
            wandb.teardown()
            server.shutdown()
            thread.join()


@pytest.mark.slow
def test_an_artifact_comes_to_a_fresh_clone_by_the_hash_of_all_files(
    root: Path, faces: Wandb, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = clone(root, tmp_path / "clone")
    assert push(root, "cnn", to="wandb:me/faces") == (
        Carried(2, 11, 0, ()),
        ["pushed     cnn: 2 files, 0.0 MB", "weights    2 files pushed to wandb:me/faces, 0.0 MB; 0 there before"],
    )
    units = json.loads((root / "oof" / "cnn" / "run.json").read_text())["weights"]
    assert set(faces.names) == {"cnn-weights:latest", f"cnn-weights:sha-{sha256_json(units)[:16]}"}
    assert faces.artifact is not None
    assert json.loads(faces.artifact["metadata"]) == {"run": "cnn", "competition": "faces", "sha256": units}
    assert {b"first", b"second"} <= set(faces.files.values())
    assert set(contents(root / "oof" / "cnn")) == {"run.json", *(f"{unit}/weights.safetensors" for unit in units)}

    assert push(root, "cnn", to="wandb:me/faces")[1][0] == "there      cnn: 2 files there already"
    assert weights_lines(root, [], "wandb:me/faces")[1:3] == [
        "cnn            2  0.0  all   all",
        "elsewhere      1    -  none  none",
    ]
    assert pull(other, source="wandb:me/faces")[0] == Carried(2, 11, 0, ("elsewhere", "vit"))
    assert contents(other / "oof" / "cnn") == contents(root / "oof" / "cnn") | {".lock": b""}, "and nothing else"
    assert capfd.readouterr() == ("", "")

    again = clone(root, tmp_path / "again")
    (name,) = (name for name, content in faces.files.items() if content == b"first")
    faces.files[name] = b"forged"
    with pytest.raises(RecordError, match="oof/cnn/fold0/seed42: wandb:me/faces: the file there is not the one"):
        pull(again, "cnn", source="wandb:me/faces")
    assert set(contents(again / "oof" / "cnn")) == {"run.json", ".lock", "fold1/seed42/weights.safetensors"}

    (root / "oof" / "cnn" / "fold1" / "seed42" / "weights.safetensors").unlink()
    with pytest.raises(RecordError, match="1 of 2 files are here, but an artifact holds all of a run"):
        push(root, "cnn", to="wandb:me/faces")
    faces.refuses = True
    with pytest.raises(HubError) as caught:
        pull(root, "elsewhere", source="wandb:me/faces")
    first, fix = str(caught.value).splitlines()
    assert first.startswith("wandb:me/faces: W&B refuses or cannot be reached (")
    assert (
        fix == "  fix: see that you are logged in, and that the project is yours to read and write; then run it again"
    )


@pytest.mark.slow
def test_offline_an_artifact_waits_where_sync_looks_for_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    done, said = push(root, "cnn", to="wandb:me/faces")
    assert done.files == 2
    assert said == [
        "kept       cnn: 2 files, 0.0 MB (offline; before it is trained again: make sync EXP=cnn)",
        "weights    2 files kept for wandb:me/faces, 0.0 MB; 0 there before",
    ]
    (piece,) = (root / "oof" / "cnn" / "wandb").glob("offline-run-*/run-*.wandb")
    units = json.loads((root / "oof" / "cnn" / "run.json").read_text())["weights"]
    for told in (f"sha-{sha256_json(units)[:16]}", f"{sha256_bytes(b'second')}.safetensors", "cnn-weights"):
        assert told.encode() in piece.read_bytes()
    with pytest.raises(FoldwiseError, match="WANDB_MODE=offline, but what is there is asked for\n  fix: leave"):
        pull(root, source="wandb:me/faces")
