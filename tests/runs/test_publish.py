"""Publishing: what a stand-in of the hub is sent is the run's own, and the card's code predicts with it as the run did.

The stand-in speaks the few endpoints that a commit takes, and hands files out again; it is reached over loopback.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCard, close_session, constants
from PIL import Image
from sklearn.metrics import classification_report

from foldwise.data.competition import load_competition, load_dataset
from foldwise.data.readers.images import decode
from foldwise.errors import FoldwiseError, HubError, RecordError
from foldwise.files import sha256_bytes, sha256_file
from foldwise.learn.device import pick_runtime
from foldwise.learn.models import ToInput, build_model
from foldwise.records.store import load_run, rows_of
from foldwise.runs.crossval import metadata
from foldwise.runs.kept import kept_models
from foldwise.runs.publish import publish, render
from foldwise.spec.model import ModelSpec

# The hub's client still sends files in a way that its own HTTP library no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/tiny"
WEIGHTS = [f"fold{k}/seed42/weights.safetensors" for k in range(5)]


class Hub(ThreadingHTTPServer):
    """One repository of a hub, and its owner."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] | None = None  # None: there is no repository
        self.private = False
        self.objects: dict[str, bytes] = {}
        self.commits: list[list[dict[str, Any]]] = []
        self.refuses_card = ""


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        if not self.known():
            return
        if hub.files is None:
            self.reply(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
        elif self.path == f"/api/models/{REPO}":
            siblings = [{"rfilename": name} for name in hub.files]
            self.reply(
                200, {"id": REPO, "modelId": REPO, "private": hub.private, "siblings": siblings, "sha": "0" * 40}
            )
        elif (name := self.path.removeprefix(f"/{REPO}/resolve/main/")) in hub.files:
            content = hub.files[name]
            self.reply(200, content, ETag=f'"{sha256_bytes(content)}"', **{"X-Repo-Commit": "0" * 40})
        else:
            self.reply(404, {"error": "Entry not found"}, **{"X-Error-Code": "EntryNotFound"})

    def do_PUT(self) -> None:
        self.server.objects[self.path.removeprefix("/lfs/")] = self.body()
        self.reply(200, {})

    def do_POST(self) -> None:
        hub, body = self.server, self.body()
        if not self.known():
            return
        if self.headers["Authorization"] == "Bearer reader":
            self.reply(403, {"error": "You don't have the rights to create a model under the namespace me"})
        elif self.path == "/api/repos/create":
            if hub.files is not None:
                self.reply(409, {"error": "You already created this model repo", "url": f"{hub.address}/{REPO}"})
                return
            hub.files, hub.private = {".gitattributes": b""}, json.loads(body).get("visibility") == "private"
            self.reply(200, {"url": f"{hub.address}/{REPO}"})
        elif self.path == "/api/validate-yaml":
            errors = [{"message": hub.refuses_card}] if hub.refuses_card else []
            self.reply(400 if errors else 200, {"errors": errors, "warnings": []})
        elif self.path == f"/api/models/{REPO}/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            files = [{"path": p, "uploadMode": mode[p.endswith(".safetensors")], "shouldIgnore": False} for p in paths]
            self.reply(200, {"files": files})
        elif self.path == f"/{REPO}.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            put = [{**o, "actions": {"upload": {"href": f"{hub.address}/lfs/{o['oid']}"}}} for o in wanted]
            self.reply(200, {"transfer": "basic", "objects": put})
        elif self.path == f"/api/models/{REPO}/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
            self.reply(200, {"commitUrl": f"{hub.address}/{REPO}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.reply(404, {"error": f"the stand-in does not know {self.path}"})

    def commit(self, operations: list[dict[str, Any]]) -> None:
        files = self.server.files
        assert files is not None
        self.server.commits.append(operations)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]

    def known(self) -> bool:
        if self.headers["Authorization"] in ("Bearer writer", "Bearer reader"):
            return True
        self.reply(401, {"error": "Invalid username or password."})
        return False

    def body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, status: int, content: Any, **headers: str) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(raw)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in, the cache is empty, and the hub is an address where nothing answers."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    point_at(monkeypatch, "http://127.0.0.1:9")


def point_at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(nobody: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub without the repository, whose owner is logged in."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        point_at(monkeypatch, server.address)
        monkeypatch.setenv("HF_TOKEN", "writer")
        yield server
        close_session()
        server.shutdown()
        thread.join()


def snippet(card: str, folder: Path) -> dict[str, Any]:
    """Run the card's code as a reader would, beside an `image.png`; what it defines."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    before = Path.cwd()
    os.chdir(folder)
    try:
        defined: dict[str, Any] = {}
        exec(compile(code, "README.md", "exec"), defined)
    finally:
        os.chdir(before)
    return defined


def assert_snippet_gives_oof(card: str, root: Path, name: str, folder: Path) -> None:
    run, data = load_run(root / "oof" / name), load_dataset(root, "demo")
    for fold in (0, 3):
        row = int(np.flatnonzero(run.fold == fold)[1])
        picture = data.images[rows_of(data.ids, run.ids[[row]])[0]]
        Image.fromarray(picture[..., 0]).save(folder / "image.png")
        defined = snippet(card, folder)
        probs = defined["probabilities"](folder / "image.png", [defined["WEIGHTS"][fold]])
        assert tuple(probs) == run.classes
        np.testing.assert_allclose(list(probs.values()), run.probs[row], atol=1e-5)


def edit_record(project: Any, **changes: Any) -> None:
    path = project.path() / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def dry_card(project: Any, tmp_path: Path) -> str:
    publish(project.root, "tiny", REPO, dry_run=tmp_path / "dry")
    return (tmp_path / "dry" / "README.md").read_text(encoding="utf-8")


def test_one_commit_holds_the_runs_own_bytes(kept: Any, hub: Hub) -> None:
    done = publish(kept.root, "tiny", REPO)
    assert hub.files is not None
    record = json.loads((kept.path() / "run.json").read_text())
    assert {name: sha256_bytes(hub.files[f"{name}/weights.safetensors"]) for name in record["weights"]} == record[
        "weights"
    ]
    texts = ["README.md", "config.json", "metrics.json", "run.json", "spec.yaml"]
    assert sorted(hub.files) == sorted([".gitattributes", *texts, *WEIGHTS])
    for name in ("run.json", "spec.yaml"):
        assert hub.files[name] == (kept.path() / name).read_bytes()
    assert [operations[0]["value"]["summary"] for operations in hub.commits] == ["Publish tiny"]
    assert done.sizes == {name: len(content) for name, content in hub.files.items() if name != ".gitattributes"}
    assert render(done) == [
        f"pushed       10 files, {sum(done.sizes.values()) / 1e6:.1f} MB: 5 models, README.md, config.json, spec.yaml, "
        "run.json, metrics.json",
        "note         there is no report, and so no pictures: make report EXP=tiny, then publish again",
        "left out     oof.csv and test.csv (ids, labels, predictions), and pictures of the images",
        "visibility   public",
        f"commit       {'0' * 40}",
        f"address      {hub.address}/me/tiny",
    ]


def test_the_cards_code_gives_the_runs_probabilities(kept: Any, hub: Hub, tmp_path: Path) -> None:
    publish(kept.root, "tiny", REPO)
    assert hub.files is not None
    assert_snippet_gives_oof(hub.files["README.md"].decode(), kept.root, "tiny", tmp_path)


def test_timm_finds_the_first_model(kept: Any, hub: Hub) -> None:
    publish(kept.root, "tiny", REPO)
    model = timm.create_model(f"hf_hub:{REPO}", pretrained=True)
    expected = safetensors.torch.load_file(kept.path() / WEIGHTS[0])
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.pretrained_cfg["label_names"] == list(load_run(kept.path()).classes)


def test_the_card_tells_the_scores(kept: Any, nobody: None, tmp_path: Path) -> None:
    card, run = dry_card(kept, tmp_path), load_run(kept.path())
    data = ModelCard(card).data
    (result,) = data.eval_results
    accuracy = float((run.probs.argmax(axis=1) == run.labels).mean())
    error = run.info["standard_error"]
    assert (result.metric_type, result.metric_value) == ("accuracy", pytest.approx(accuracy, abs=1e-6))
    assert result.metric_name == f"accuracy, out of fold (standard error {error:.4f})"
    assert (data.library_name, data.license, data.pipeline_tag) == ("timm", "other", "image-classification")
    low, high = accuracy - 1.959964 * error, accuracy + 1.959964 * error
    assert f"**accuracy {accuracy:.4f} ± {error:.4f}** (standard error), 95% interval {low:.4f} to {high:.4f}" in card
    table = classification_report(
        run.labels, run.probs.argmax(axis=1), target_names=run.classes, output_dict=True, zero_division=0
    )
    rows = {cells[1].strip(): cells[2:7] for line in card.splitlines() if len(cells := line.split("|")) == 8}
    for name in run.classes:
        recall, interval, precision, f1, images = (cell.strip() for cell in rows[name])
        expected = [table[name][key] for key in ("recall", "precision", "f1-score", "support")]
        assert [float(recall), float(precision), float(f1), float(images)] == pytest.approx(expected, abs=6e-4)
        low, high = map(float, interval.split(" to "))
        assert low <= float(recall) <= high
        assert high - low > 0.05, "of few images an interval is wide, also where all are wrong"
    metrics = json.loads((tmp_path / "dry" / "metrics.json").read_text())
    assert (np.array(metrics["confusion"]).trace() / len(run.ids), metrics["score"]) == (accuracy, accuracy)
    assert "An expression is not an emotion" in card


def test_neither_ids_nor_labels_leave(kept: Any, nobody: None, tmp_path: Path) -> None:
    publish(kept.root, "tiny", REPO, dry_run=tmp_path / "dry")
    names = {path.name for path in (tmp_path / "dry").rglob("*") if path.is_file()}
    assert names == {"README.md", "config.json", "metrics.json", "run.json", "spec.yaml", "weights.safetensors"}


def test_the_report_goes_along_without_the_images(resumable: Any, nobody: None, tmp_path: Path) -> None:
    report = resumable.path() / "report"
    report.mkdir()
    for name in ("history.png", "confusion.png", "mistakes.png", "label_errors.png", "label_errors.csv"):
        (report / name).write_bytes(name.encode())
    card = dry_card(resumable, tmp_path)
    sent = {path.name: path.read_bytes() for path in (tmp_path / "dry" / "report").iterdir()}
    assert sent == {"history.png": b"history.png", "confusion.png": b"confusion.png"}
    assert re.findall(r"!\[.*?\]\((.*?)\)", card) == ["report/history.png", "report/confusion.png"]


def test_what_makes_a_score_doubtful_is_told(resumable: Any, nobody: None, tmp_path: Path) -> None:
    external = [
        {"source": "faces", "images": 12345, "weight": 0.5, "inputs_sha256": "ab"},
        {"source": "fer2013_full", "by": "run:pre", "inputs_sha256": "cd"},
    ]
    edit_record(resumable, marks=["optimistic"], external=external, git={"commit": "abc", "dirty": True})
    card = dry_card(resumable, tmp_path)
    for line in (
        "- marked **optimistic**: the scored images themselves chose the epoch or ended the training, so the score is "
        "too high",
        "- external data: faces (12,345 images, weight 0.5), fer2013_full (by run:pre)",
        "- commit: `abc`, with changes on top",
        "- starting weights: none",
    ):
        assert line in card.splitlines()


def test_another_publication_takes_the_place_of_the_first(kept: Any, hub: Hub) -> None:
    stale = ["fold7/seed1/weights.safetensors", "report/history.png"]
    hub.files = dict.fromkeys([".gitattributes", "run.json", "notes.txt", WEIGHTS[0], *stale], b"old")
    publish(kept.root, "tiny", REPO)
    assert len(hub.commits) == 1
    assert not set(stale) & set(hub.files)
    assert hub.files["notes.txt"] == b"old"
    assert hub.files[WEIGHTS[0]] == (kept.path() / WEIGHTS[0]).read_bytes()


def test_a_private_repository(kept: Any, hub: Hub) -> None:
    assert publish(kept.root, "tiny", REPO, private=True).private
    assert hub.private
    assert publish(kept.root, "tiny", REPO).private, "what is private stays so"


def test_a_public_repository_is_not_taken_for_a_private_one(kept: Any, hub: Hub) -> None:
    hub.files = {"run.json": b"old"}
    with pytest.raises(HubError) as caught:
        publish(kept.root, "tiny", REPO, private=True)
    assert str(caught.value) == (
        "REPO=me/tiny: is there and public, but PRIVATE=1 was asked for; nothing was uploaded\n"
        f"  fix: make it private at {hub.address}/me/tiny/settings, or choose another name"
    )
    assert hub.files == {"run.json": b"old"}
    assert not hub.objects


def test_a_repository_of_something_else_is_left_alone(kept: Any, hub: Hub) -> None:
    hub.files = {"README.md": b"mine", "model.bin": b"mine"}
    with pytest.raises(HubError) as caught:
        publish(kept.root, "tiny", REPO)
    assert str(caught.value) == (
        "REPO=me/tiny: holds files that no run left there (model.bin); nothing was uploaded\n"
        "  fix: choose another name, or empty it"
    )
    assert hub.files == {"README.md": b"mine", "model.bin": b"mine"}


def test_a_dry_run_writes_what_would_be_pushed(kept: Any, nobody: None, hub: Hub, tmp_path: Path) -> None:
    pushed = publish(kept.root, "tiny", REPO, license_id="mit")
    dry = publish(kept.root, "tiny", REPO, license_id="mit", dry_run=tmp_path / "dry")
    assert hub.files is not None
    written = {p.relative_to(tmp_path / "dry").as_posix(): p.read_bytes() for p in (tmp_path / "dry").rglob("*.*")}
    assert written == {name: content for name, content in hub.files.items() if name != ".gitattributes"}
    assert (dry.sizes, dry.commit, dry.address) == (pushed.sizes, None, str(tmp_path / "dry"))
    assert len(hub.commits) == 1
    with pytest.raises(FoldwiseError, match=r"dry is not an empty folder\n  fix: name a new one, or empty it"):
        publish(kept.root, "tiny", REPO, dry_run=tmp_path / "dry")


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (
            "",
            "you are not logged in to the Hugging Face Hub\n  fix: run `hf auth login`, or set HF_TOKEN to a token",
        ),
        (
            "stranger",
            "the hub does not accept the token (401: Invalid username or password.)\n  fix: run `hf auth login`",
        ),
        (
            "reader",
            "the token may not write there (403: You don't have the rights to create a model under the namespace me)\n"
            "  fix: take a token with write access to `me` (https://huggingface.co/settings/tokens), or a name",
        ),
    ],
)
def test_tokens_are_refused_with_the_mend(
    kept: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, expected: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError) as caught:
        publish(kept.root, "tiny", REPO)
    assert str(caught.value).startswith(f"REPO=me/tiny: {expected}")
    assert caught.value.exit_code == 3
    assert hub.files is None


def test_a_hub_that_is_away(kept: Any, nobody: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "writer")
    with pytest.raises(HubError) as caught:
        publish(kept.root, "tiny", REPO)
    first, second, third = str(caught.value).splitlines()
    assert first == "REPO=me/tiny: the Hugging Face Hub cannot be reached"
    assert "ConnectError" in second
    fix = "go online; or write the files with --dry-run <folder>, and elsewhere `hf upload me/tiny <folder>`"
    assert third == f"  fix: {fix}"


def test_a_card_that_the_hub_refuses(kept: Any, hub: Hub) -> None:
    hub.refuses_card = '"license" must be one of [mit, ...]'
    with pytest.raises(HubError) as caught:
        publish(kept.root, "tiny", REPO, license_id="none at all")
    assert str(caught.value) == (
        'REPO=me/tiny: the hub refuses: Invalid metadata in README.md. - "license" must be one of [mit, ...]\n'
        "  fix: for a licence, give an identifier of https://huggingface.co/docs/hub/repositories-licenses"
    )
    assert not hub.objects, "the card is checked before anything is uploaded"


@pytest.mark.parametrize("repo", ["tiny", "me/tiny/2", "me/ti ny", "me/tiny--2", "", "../me"])
def test_what_is_no_name_of_a_repository(kept: Any, nobody: None, repo: str) -> None:
    with pytest.raises(FoldwiseError, match=r"is no name of a repository \((.|\n)*fix: REPO=<owner>/<name>") as caught:
        publish(kept.root, "tiny", repo)
    assert caught.value.exit_code == 2


def test_a_run_that_is_not_to_be_published(resumable: Any, hub: Hub) -> None:
    def refusal() -> str:
        with pytest.raises(RecordError) as caught:
            publish(resumable.root, "tiny", REPO)
        assert hub.files is None
        return str(caught.value)

    edit_record(resumable, smoke=True)
    assert refusal().startswith("oof/tiny: is a smoke run\n  fix: make exp EXP=tiny\n")
    edit_record(resumable, smoke=False)
    shutil.copy(resumable.path() / WEIGHTS[0], resumable.path() / WEIGHTS[1])
    assert refusal().startswith(f"oof/tiny/{WEIGHTS[1]}: is not the file that run.json vouches for\n")
    (resumable.path() / WEIGHTS[1]).unlink()
    assert refusal().startswith("oof/tiny: its weights are not on this machine: fold1/seed42\n")
    (resumable.path() / "run.json").unlink()
    assert refusal().startswith("oof/tiny: is not complete: 5 of 5 units\n  fix: make exp EXP=tiny\n")


@pytest.mark.parametrize("fit", ["letterbox", "crop", "squash"])
def test_the_cards_code_fits_images_as_the_competition_does(
    resumable: Any, nobody: None, tmp_path: Path, fit: str
) -> None:
    path = resumable.root / "inputs" / "demo" / "competition.yaml"
    path.write_text(path.read_text().replace("fit: exact", f"fit: {fit}"))
    card = dry_card(resumable, tmp_path)
    spec = load_competition(resumable.root, "demo").image
    assert spec.fit == fit
    for size in ((61, 40), (33, 90)):
        pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image.png")
        expected = ToInput(32, "bicubic", [0.0], [1.0])(
            torch.tensor(decode((tmp_path / "image.png").read_bytes(), spec, "image.png")[None])
        )
        defined = definitions(card)
        torch.testing.assert_close(defined["pixels"](tmp_path / "image.png"), expected)


def definitions(card: str) -> dict[str, Any]:
    """What the card's code defines, without its last line, which predicts."""
    (code,) = re.findall(r"```python\n(.*?)\nprint\(", card, re.DOTALL)
    defined: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), defined)
    return defined


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "by_timm"),
    [
        ({"arch": "cnn_3block", "image_size": 16}, False),
        ({"arch": "resnet10t", "image_size": 32, "head": {"hidden": (8,), "dropout": (0.1, 0.2)}}, False),
        ({"arch": "mobilenetv3_small_050.lamb_in1k", "image_size": 32, "interpolation": "bilinear"}, True),
    ],
    ids=["own", "head", "timm"],
)
def test_the_cards_code_knows_every_network_and_view(
    resumable: Any, hub: Hub, tmp_path: Path, model: Any, by_timm: bool
) -> None:
    """Weights that were never trained, of another network than the run's, looked at in every view."""
    spec = ModelSpec.model_validate(model)
    prepare = ToInput(spec.image_size, spec.interpolation, [0.5], [0.2])
    run = load_run(resumable.path())
    torch.manual_seed(0)
    for name in run.info["weights"]:
        network = build_model(spec, classes=len(run.classes), channels=1)
        told = metadata(spec, run.classes, prepare)
        safetensors.torch.save_file(network.state_dict(), resumable.path() / name / "weights.safetensors", told)
    hashes = {name: sha256_file(resumable.path() / name / "weights.safetensors") for name in run.info["weights"]}
    edit_record(
        resumable, weights=hashes, tta=["identity", "hflip", "zoom_1.1", "shift+hflip", "rotate_10", "multicrop"]
    )
    publish(resumable.root, "tiny", REPO)
    assert hub.files is not None
    card = hub.files["README.md"].decode()
    pixels = load_dataset(resumable.root, "demo").images[5]
    Image.fromarray(pixels[..., 0]).save(tmp_path / "image.png")
    kept_model = next(kept_models(load_run(resumable.path()), pick_runtime("cpu", "fp32", 1), folds=(2,)))
    probs = definitions(card)["probabilities"](tmp_path / "image.png", [WEIGHTS[2]])
    np.testing.assert_allclose(list(probs.values()), kept_model.probabilities(pixels[None])[0], atol=1e-5)
    assert ("config.json" in hub.files, ModelCard(card).data.library_name) == (
        by_timm,
        "timm" if by_timm else "foldwise",
    )
    if by_timm:
        timm.create_model(f"hf_hub:{REPO}", pretrained=True)


@pytest.mark.slow
def test_a_run_that_scored_nothing(project: Any, nobody: None, tmp_path: Path) -> None:
    project.describe("split: {kind: full}")
    project.run(project.spec(train={"epochs": 1}))
    card = dry_card(project, tmp_path)
    assert "Nothing was held out, so nothing is known about how good it is." in card
    assert ModelCard(card).data.eval_results is None
    assert not (tmp_path / "dry" / "metrics.json").exists()
