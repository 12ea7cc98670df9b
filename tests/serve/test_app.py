"""The server's routes: what they answer, and what they refuse to whom, with models whose answer is known.

A picture's bytes reach no disk and no log; a refusal has a reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from fake_models import FakePredictor, entry, keep_untrained, kept_model, make_backend, png
from PIL import Image
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from foldwise.errors import FoldwiseError
from foldwise.serve import app as module
from foldwise.serve import tracking
from foldwise.serve.app import create_app, serve
from foldwise.serve.faces import Box
from foldwise.serve.guard import HEADERS
from foldwise.serve.pictures import read_picture
from foldwise.serve.predictor import Predictor


@contextlib.contextmanager
def running(*predictors, card=None, hosts=None, any_address=False, **options):
    """A client of a server with these models."""
    backend = make_backend(*predictors, **options)
    known = {} if hosts is None else {"hosts": hosts}
    app = create_app(backend, card=card, any_address=any_address, **known)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def client():
    with running() as made:
        yield made


def files(*contents):
    return [("files", (f"{number}.png", content, "image/png")) for number, content in enumerate(contents)]


def problem(response, status):
    """The reason of a refusal, which must be of this status and well-formed."""
    assert response.status_code == status, response.text
    told = response.json()
    assert set(told) == {"error", "reason"}
    assert told["error"]
    return told["reason"]


class TestPredict:
    def test_the_whole_picture_is_answered_for(self, client):
        told = client.post("/predict", files=files(png(204, (30, 20)))).json()
        assert told.pop("time_ms") >= 0
        assert told == {
            "model": "lamp",
            "version": "0123456789ab",
            "metric": "accuracy",
            "score": 0.8,
            "standard_error": 0.04,
            "files": [
                {
                    "width": 30,
                    "height": 20,
                    "label": "light",
                    "confidence": 0.8,
                    "faces": [
                        {
                            "box": None,
                            "label": "light",
                            "confidence": 0.8,
                            "probabilities": {"dark": 0.2, "light": 0.8},
                        }
                    ],
                }
            ],
        }

    def test_several_pictures_keep_their_order_and_make_one_batch(self):
        lamp = FakePredictor()
        with running(lamp) as client:
            shades = [0, 255, 51, 102, 153]
            told = client.post("/predict", files=files(*map(png, shades))).json()
        assert [each["faces"][0]["probabilities"]["light"] for each in told["files"]] == [0, 1, 0.2, 0.4, 0.6]
        assert lamp.batches == [5]

    def test_each_face_is_answered_for_the_largest_first(self, monkeypatch):
        picture = np.zeros((40, 60, 3), dtype=np.uint8)
        picture[5:25, 30:50] = 255
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="PNG")
        asked = []

        def find(seen, *, limit):
            asked.append((seen.shape, limit))
            return [Box(30, 5, 20, 20, 3.0), Box(0, 30, 10, 10, 2.0)]

        monkeypatch.setattr(module, "find_faces", find)
        with running(faces=7) as client:
            told = client.post("/predict?faces=true", files=files(file.getvalue())).json()["files"][0]
            whole = client.post("/predict?faces=false", files=files(file.getvalue())).json()["files"][0]
        assert asked == [((40, 60, 3), 7)]
        assert [(face["box"], face["label"]) for face in told["faces"]] == [
            ([30, 5, 20, 20], "light"),
            ([0, 30, 10, 10], "dark"),
        ]
        assert (told["label"], told["confidence"]) == ("light", 1.0)
        assert [face["box"] for face in whole["faces"]] == [None]
        assert whole["label"] == "dark"

    def test_without_a_face_it_is_the_whole_picture(self, client):
        told = client.post("/predict?faces=true", files=files(png(255, (100, 100)))).json()
        assert [face["box"] for face in told["files"][0]["faces"]] == [None]

    def test_what_waits_is_predicted_together_by_one_thread(self):
        lamp = FakePredictor()
        lamp.gate.clear()
        with running(lamp) as client:
            answers = {}

            def ask(shade):
                answers[shade] = client.post("/predict", files=files(png(shade))).json()

            threads = [threading.Thread(target=ask, args=(shade,)) for shade in range(0, 250, 25)]
            threads[0].start()
            assert lamp.asked.wait(20)
            for thread in threads[1:]:
                thread.start()
            while client.get("/health").json()["waiting"] < 9:
                time.sleep(0.01)
            lamp.gate.set()
            for thread in threads:
                thread.join(20)
        for shade, told in answers.items():
            assert told["files"][0]["faces"][0]["probabilities"]["light"] == pytest.approx(shade / 255, abs=1e-6)
        assert lamp.batches == [1, 9]
        assert not lamp.at_once


HOSTILE = {
    "empty": (b"", 415),
    "text": (b"hello", 415),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', 415),
    "pdf": (b"%PDF-1.7\n", 415),
    "cut short": (png(size=(64, 64))[:-20], 422),
    "followed by a script": (png() + b"<script>alert(1)</script>", 422),
}


class TestRefusedPictures:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_what_is_no_picture_is_refused_with_a_reason(self, client, name):
        content, status = HOSTILE[name]
        reason = problem(client.post("/predict", files=files(png(), content)), status)
        assert reason.startswith("files[1]: ")
        assert "\n" not in reason

    def test_a_zip_behind_a_picture_is_refused(self, client):
        behind = io.BytesIO()
        with zipfile.ZipFile(behind, "w") as archive:
            archive.writestr("a", "b")
        assert "after the end of the picture" in problem(
            client.post("/predict", files=files(png() + behind.getvalue())), 422
        )

    def test_an_animation_is_refused(self, client):
        file = io.BytesIO()
        frames = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:])
        assert "is animated" in problem(client.post("/predict", files=files(file.getvalue())), 422)

    def test_a_bomb_is_refused_before_it_is_decoded(self, client):
        # A header that promises 400 million pixels, and next to nothing behind it.
        def chunk(kind, content):
            return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
        bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        assert "20,000 x 20,000 pixels" in problem(client.post("/predict", files=files(bomb)), 413)

    def test_200_malformed_uploads_are_refused_and_the_next_one_is_answered(self, client):
        rng = np.random.default_rng(0)
        whole = [png(size=(64, 48), form=form) for form in ("PNG", "JPEG", "WEBP", "BMP")]
        statuses = []
        for number in range(200):
            content = bytearray(whole[number % 4])
            if number % 3 == 0:
                content = content[: rng.integers(0, len(content) - 4)]
            elif number % 3 == 1:
                content[: rng.integers(1, 9)] = rng.bytes(8)
            else:
                content += rng.bytes(200).replace(b"\0", b"x")
            statuses.append(client.post("/predict", files=files(bytes(content))).status_code)
        assert set(statuses) <= {413, 415, 422}
        assert client.post("/predict", files=files(png())).status_code == 200


class TestRefusedRequests:
    def test_no_form_is_refused(self, client):
        assert problem(client.post("/predict", content=png()), 415) == (
            "the body must be multipart/form-data with `files`, but is 'untold'"
        )
        assert "application/json" in problem(client.post("/predict", json={}), 415)

    @pytest.mark.parametrize(
        ("body", "kind", "status", "says"),
        [
            (b"", "multipart/form-data; boundary=x", 422, "`files` must be one or several files"),
            (b"--x--\r\n", "multipart/form-data; boundary=x", 422, "`files` must be one or several files"),
            (b"nothing", "multipart/form-data; boundary=x", 400, "the body is no form that can be read"),
            (b"", "multipart/form-data", 400, "Missing boundary"),
        ],
    )
    def test_a_broken_form_is_refused(self, client, body, kind, status, says):
        assert says in problem(client.post("/predict", content=body, headers={"content-type": kind}), status)

    def test_other_fields_and_texts_are_refused(self, client):
        both = client.post("/predict", files=files(png()), data={"path": "/etc/passwd"})
        assert problem(both, 422) == "the form takes the field `files` only, but has 'path'"
        assert "is text" in problem(client.post("/predict", files={"files": (None, "text")}), 415)

    def test_a_picture_without_a_file_name_is_taken(self, client):
        response = client.post("/predict", files={"files": (None, png(204), "image/png")})
        assert response.json()["files"][0]["confidence"] == 0.8

    def test_too_many_files_are_refused(self):
        with running(files=3) as client:
            assert client.post("/predict", files=files(*[png()] * 3)).status_code == 200
            for count in (4, 9):
                reason = problem(client.post("/predict", files=files(*[png()] * count)), 422)
                assert reason == "a request holds at most 3 files"

    def test_parameters_that_nobody_knows_are_refused(self, client):
        assert "query.modl" in problem(client.post("/predict?modl=x", files=files(png())), 422)
        assert "query.faces" in problem(client.post("/predict?faces=maybe", files=files(png())), 422)
        assert "query.x" in problem(client.get("/health?x=1"), 422)

    def test_other_methods_and_paths_are_refused_as_json(self, client):
        response = client.delete("/predict")
        assert "/docs" in problem(response, 405)
        assert response.headers["allow"] == "POST"
        problem(client.get("/../../etc/passwd"), 404)
        problem(client.get("/page.css/..%2f..%2fpyproject.toml"), 404)


def asgi(app, body, *, headers=(), path="/predict"):
    """Post chunks to an app as they come: the answer's status and headers, and how many chunks it took."""
    sent, taken = [], 0
    chunks = iter(body)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }

    async def receive():
        nonlocal taken
        chunk = next(chunks, None)
        if chunk is None:
            await asyncio.sleep(30)
        taken += 1
        return {"type": "http.request", "body": chunk, "more_body": True}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"]), taken


HEAD = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'


class TestBodies:
    """The size is counted while it is read; nothing is waited for, and nothing kept, beyond it."""

    def test_a_body_without_a_length_is_cut_at_the_limit(self):
        backend = make_backend(request_bytes=10_000)
        status, headers, told, _ = asgi(create_app(backend), [HEAD, *[b"y" * 1000] * 12, b"", *[b"z"] * 20])
        assert (status, told["reason"]) == (413, "a request is at most 0.00953674 MiB")
        assert headers[b"connection"] == b"close"
        with backend.budget.share() as hold:
            hold(backend.settings.held_bytes)
        backend.close()

    def test_a_length_beyond_the_limit_is_refused_without_reading(self):
        backend = make_backend(request_bytes=10_000)
        status, _, _, taken = asgi(
            create_app(backend), [HEAD], headers=[(b"content-length", b"10001"), (b"expect", b"100-continue")]
        )
        assert (status, taken) == (413, 0)
        backend.close()

    def test_a_length_that_lies_changes_nothing(self):
        backend = make_backend(request_bytes=10_000)
        chunks = [HEAD, *[b"y" * 1000] * 12, b"", *[b"z"] * 20]
        assert asgi(create_app(backend), chunks, headers=[(b"content-length", b"5")])[0] == 413
        backend.close()

    def test_a_slow_body_is_cut(self):
        backend = make_backend(body_s=0.05)
        status, headers, told, _ = asgi(create_app(backend), [HEAD, b"y"])
        assert (status, told["reason"]) == (408, "the body took longer than 0.05 s")
        assert headers[b"connection"] == b"close"
        backend.close()

    def test_bodies_together_are_bounded(self):
        backend = make_backend(held_bytes=3000)
        status, headers, told, taken = asgi(create_app(backend), [HEAD, *[b"y" * 1000] * 12])
        assert (status, headers[b"retry-after"]) == (503, b"2")
        assert told["reason"] == "too many large requests are under way; fix: try again in 2 s"
        assert taken == 4
        with backend.budget.share() as hold:
            hold(3000)
        backend.close()

    def test_no_picture_goes_to_disk(self, client, monkeypatch):
        def rolled(self):
            raise AssertionError("a picture went to a temporary file")

        monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", rolled)
        large = png(100, (1500, 1500), "BMP")
        assert len(large) > 6_000_000
        assert client.post("/predict", files=files(large)).status_code == 200


class TestWhoMayAsk:
    @pytest.mark.parametrize("host", ["evil.example", "127.0.0.2", "localhost.evil.example", "", "[::1", "10.0.0.7:80"])
    def test_a_foreign_host_is_refused(self, client, host):
        assert "is not known as" in problem(client.get("/health", headers={"host": host}), 421)

    @pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
    def test_this_machine_is_known(self, client, host):
        assert client.get("/health", headers={"host": host}).status_code == 200

    def test_an_open_server_is_known_by_any_address_and_its_names(self):
        with running(any_address=True, hosts=["lab.example"]) as client:
            answers = {
                host: client.get("/health", headers={"host": host}).status_code
                for host in ("10.0.0.7:8000", "[2001:db8::1]:8000", "lab.example", "evil.example")
            }
        assert answers == {"10.0.0.7:8000": 200, "[2001:db8::1]:8000": 200, "lab.example": 200, "evil.example": 421}

    @pytest.mark.parametrize(
        "headers",
        [
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"origin": "http://["},
            {"origin": "http://localhost:3000"},
            {"sec-fetch-site": "cross-site"},
            {"sec-fetch-site": "same-site"},
        ],
    )
    def test_a_page_of_another_site_may_not_post(self, client, headers):
        reason = problem(client.post("/predict", files=files(png()), headers=headers), 403)
        assert reason == "pages of other sites may not ask this server"
        assert client.get("/health", headers=headers).status_code == 200

    def test_its_own_page_may(self, client):
        headers = {"origin": "http://localhost", "sec-fetch-site": "same-origin"}
        assert client.post("/predict", files=files(png()), headers=headers).status_code == 200

    def test_the_eager_are_told_to_wait_and_the_machines_are_not(self):
        with running(rate=0.1, burst=2) as client:
            assert [client.get("/runs").status_code for _ in range(2)] == [200, 200]
            response = client.post("/predict", files=files(png()), headers={"x-forwarded-for": "1.2.3.4"})
            wait = int(response.headers["retry-after"])
            assert problem(response, 429) == f"too many requests from one address; again in {wait} s"
            assert 1 <= wait <= 10
            assert {client.get(path).status_code for path in ["/health", "/metrics"] * 5} == {200}

    def test_every_answer_has_the_headers(self, client):
        for response in (
            client.get("/"),
            client.get("/docs"),
            client.get("/nothing"),
            client.post("/predict"),
            client.get("/health", headers={"host": "evil.example"}),
        ):
            assert {name: response.headers[name] for name in HEADERS} == HEADERS
        assert "unsafe" not in HEADERS["content-security-policy"]


class TestBusy:
    def test_a_full_queue_is_told_at_once(self):
        lamp = FakePredictor()
        lamp.gate.clear()
        with running(lamp, waiting=2) as client:
            statuses = []
            threads = [
                threading.Thread(
                    target=lambda: statuses.append(client.post("/predict", files=files(png())).status_code)
                )
                for _ in range(3)
            ]
            threads[0].start()
            assert lamp.asked.wait(20)
            for thread in threads[1:]:
                thread.start()
            while client.get("/health").json()["waiting"] < 2:
                time.sleep(0.01)
            response = client.post("/predict", files=files(png()))
            assert problem(response, 503) == "2 images wait already; fix: try again in 1 s"
            assert response.headers["retry-after"] == "1"
            lamp.gate.set()
            for thread in threads:
                thread.join(20)
        assert statuses == [200] * 3

    def test_an_answer_that_takes_too_long_is_given_up(self):
        lamp = FakePredictor()
        lamp.gate.clear()
        with running(lamp, answer_s=0.1) as client:
            response = client.post("/predict", files=files(png()))
            assert problem(response, 503) == "no answer within 0.1 s"
            lamp.gate.set()

    def test_a_mistake_of_the_server_is_told_without_its_details(self):
        with running(FakePredictor(failure=RuntimeError("secret"))) as client:
            response = client.post("/predict", files=files(png()))
            assert problem(response, 500) == "the server failed at this; its terminal says more"
            assert {name: response.headers[name] for name in HEADERS} == HEADERS
            assert client.get("/health").status_code == 200
        with running(FakePredictor(failure=FoldwiseError("diverged\n  fix: train anew"))) as client:
            assert problem(client.post("/predict", files=files(png())), 500) == "diverged; fix: train anew"


class TestModels:
    def test_another_one_is_loaded_once_and_the_least_asked_for_makes_room(self):
        loaded = []

        def load(name):
            loaded.append(name)
            return FakePredictor(name)

        entries = [entry("a"), entry("b"), entry("blend:c", kind="blend", aliases=("blend:best",))]
        with running(entries=entries, load=load, models=3) as client:
            for name in ("a", "a", "b", "lamp", "blend:best", "blend:c", "b", "a"):
                told = client.post(f"/predict?model={name}", files=files(png())).json()
                assert told["model"] == name.replace("best", "c")
            assert loaded == ["a", "b", "blend:c", "a"]
            assert client.get("/health").json()["models"] == ["lamp", "b", "a"]

    def test_only_names_on_the_list_are_looked_for(self):
        with running(entries=[entry("gone", missing=("gone",))]) as client:
            for name in ("../../etc/passwd", "/etc/passwd", "oof/lamp", ""):
                reason = problem(client.post("/predict", params={"model": name}, files=files(png())), 404)
                assert reason == f"there is no run or blend {name!r}; fix: served here: lamp"
            assert problem(client.post("/predict?model=gone", files=files(png())), 404) == (
                "gone cannot be asked here: the weights of gone are not on this machine"
            )
            problem(client.post("/predict", params={"model": "x" * 201}, files=files(png())), 422)

    def test_the_list_says_what_can_be_asked(self, tmp_path):
        card = tmp_path / "MODEL_CARD.md"
        with running(entries=[entry("gone", missing=("a", "b"), score=None)], card=card) as client:
            told = client.get("/runs").json()
            assert {key: told[key] for key in ("default", "competition", "title", "card")} == {
                "default": "lamp",
                "competition": "shades",
                "title": "Shades",
                "card": False,
            }
            assert told["runs"][0] == {
                "name": "lamp",
                "aliases": [],
                "kind": "run",
                "competition": "shades",
                "metric": "accuracy",
                "score": 0.8,
                "standard_error": 0.04,
                "interval": [0.72, 0.88],
                "n_scored": 100,
                "track": "competition data only",
                "marks": [],
                "classes": ["dark", "light"],
                "members": ["lamp"],
                "parameters": 12,
                "weights": True,
                "reason": None,
            }
            gone = told["runs"][1]
            assert (gone["weights"], gone["reason"]) == (False, "the weights of a, b are not on this machine")
            problem(client.get("/card"), 404)
            card.write_text("What it cannot tell.")
            assert client.get("/runs").json()["card"] is True
            assert client.get("/card").text == "What it cannot tell."

    def test_what_came_from_elsewhere_is_on_the_list_too(self):
        backend = make_backend(FakePredictor())
        backend._catalogue._entries.clear()
        with TestClient(create_app(backend), base_url="http://localhost") as client:
            (told,) = client.get("/runs").json()["runs"]
        assert (told["name"], told["score"], told["weights"]) == ("lamp", 0.8, True)


class TestPages:
    @pytest.mark.parametrize(
        ("path", "kind"),
        [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript"), ("/base.css", "text/css")],
    )
    def test_the_page_and_its_files_are_there(self, client, path, kind):
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"] == f"{kind}; charset=utf-8"

    def test_no_page_asks_for_anything_elsewhere(self, client):
        for path in ("/", "/docs"):
            for link in re.findall(r"""(?:src|href)=["']([^"']+)""", client.get(path).text):
                assert not re.match(r"[a-z]+:|//", link) or link == "data:,", link
        assert "<script" not in client.get("/docs").text

    def test_the_reference_has_all_routes_of_the_schema(self, client):
        text = client.get("/docs").text
        for path, methods in client.get("/openapi.json").json()["paths"].items():
            for method in methods:
                assert f"<code>{method.upper()} {path}</code>" in text

    def test_health_says_what_is_held(self, client):
        told = client.get("/health").json()
        assert told.pop("uptime_s") >= 0
        assert told == {"status": "ok", "model": "lamp", "version": "0123456789ab", "models": ["lamp"], "waiting": 0}

    def test_metrics_count_by_route_and_not_by_what_a_stranger_asks_for(self):
        with running() as client:
            client.post("/predict", files=files(png(), png()))
            client.post("/predict", files=files(b""))
            for number in range(3):
                client.get(f"/stranger{number}")
            lines = client.get("/metrics").text.splitlines()
        assert 'foldwise_requests_total{path="/predict",status="200"} 1.0' in lines
        assert 'foldwise_requests_total{path="/predict",status="415"} 1.0' in lines
        assert 'foldwise_requests_total{path="other",status="404"} 3.0' in lines
        assert 'foldwise_pictures_total{model="lamp"} 2.0' in lines
        assert "foldwise_batch_images_sum 2.0" in lines
        assert "foldwise_batch_images_count 1.0" in lines
        assert 'foldwise_request_seconds_count{path="/predict"} 2.0' in lines
        assert "foldwise_models 1.0" in lines
        assert not any("stranger" in line for line in lines)


@pytest.fixture(scope="module")
def explaining():
    names = []

    def explainer(name):
        names.append(name)
        return kept_model("cnn_3block")

    with running(explainer=explainer) as client:
        yield SimpleNamespace(post=client.post, names=names)


class TestExplain:
    def test_it_is_a_picture_of_what_the_model_saw(self, explaining):
        response = explaining.post("/explain", files=files(png(size=(30, 20))))
        assert response.status_code == 200
        assert response.headers["content-type"] == "image/png"
        assert response.headers["x-model"] == "lamp, fold 3"
        assert response.headers["x-label"] in ("dark", "light")
        with Image.open(io.BytesIO(response.content)) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (384, 384))
        assert explaining.names == ["lamp"]

    def test_a_box_is_explained_alone(self, explaining):
        picture = Image.new("L", (40, 40))
        picture.paste(255, (20, 20, 40, 40))
        file = io.BytesIO()
        picture.save(file, format="PNG")
        dark, light = (
            explaining.post(f"/explain?box={box}", files=files(file.getvalue())).content
            for box in ("0,0,20,20", "20,20,20,20")
        )
        means = [np.asarray(Image.open(io.BytesIO(each))).mean() for each in (dark, light)]
        assert means[1] > means[0] + 50
        assert explaining.names == ["lamp"], "the model is held"

    @pytest.mark.parametrize(
        ("box", "says"),
        [
            ("0,0,31,20", "the box 0,0,31,20 is not within the picture of 30 x 20 pixels"),
            ("0,0,0,5", "query.box"),
            ("-1,0,5,5", "query.box"),
            ("1,2,3", "query.box"),
        ],
    )
    def test_a_box_must_lie_in_the_picture(self, explaining, box, says):
        assert says in problem(explaining.post(f"/explain?box={box}", files=files(png(size=(30, 20)))), 422)

    def test_only_one_picture_is_explained(self, explaining):
        reason = problem(explaining.post("/explain", files=files(png(), png())), 422)
        assert reason == "a request holds at most 1 files"

    def test_a_thin_box_whose_square_would_fill_the_memory_is_refused(self, explaining):
        thin = png(size=(90_000, 900))
        said = problem(explaining.post("/explain?box=0,0,90000,1", files=files(thin)), 413)
        assert "25,000,000" in said
        thin = png(size=(20_000, 1_000))
        said = problem(explaining.post("/explain?box=0,0,20000,1", files=files(thin)), 422)
        assert said == "the box 0,0,20000,1 is too long; a face is about as wide as it is high"

    def test_a_network_without_maps_is_told(self):
        model = kept_model("mixer_s32_224")
        with running(explainer=lambda _name: model) as client:
            assert problem(client.post("/explain", files=files(png())), 422) == (
                "`mixer_s32_224` has neither feature maps that its classifier rests on nor global attention; "
                "ask a run of a convolutional network or a ViT"
            )

    def test_what_is_not_installed_is_told(self, explaining, monkeypatch):
        monkeypatch.setitem(sys.modules, "captum.attr", None)
        assert problem(explaining.post("/explain", files=files(png())), 501) == (
            'captum is not installed; fix: pip install "foldwise[explain]"'
        )


class TestMirror:
    @pytest.fixture(autouse=True)
    def whole_frames(self, monkeypatch):
        """The face is the whole frame."""

        def find(picture, *, limit):
            return [Box(0, 0, picture.shape[1], picture.shape[0], 1.0)]

        class Session(tracking.Session):
            def __init__(self, model, *, folds):
                super().__init__(model, find=find, folds=folds)

        monkeypatch.setattr(module, "Session", Session)

    def test_frames_are_answered_one_after_another(self):
        with running() as client, client.websocket_connect("ws://localhost/mirror?model=lamp") as camera:
            camera.send_bytes(png(204, (32, 24), "JPEG"))
            first = camera.receive_json()
            camera.send_bytes(png(204, (32, 24), "JPEG"))
            second = camera.receive_json()
            assert 'foldwise_mirror_frames_total{outcome="answered"} 2.0' in client.get("/metrics").text
            assert "foldwise_mirrors 1.0" in client.get("/metrics").text
        (face,) = first["faces"]
        assert (face["box"], face["label"], face["confidence"]) == ([0, 0, 32, 24], "light", 0.8)
        assert (second["frame"], second["faces"][0]["id"]) == (2, face["id"])

    def test_a_bad_frame_is_told_and_the_next_one_answered(self, client):
        with client.websocket_connect("ws://localhost/mirror") as camera:
            camera.send_bytes(b"no picture")
            assert camera.receive_json()["error"] == "unsupported media type"
            camera.send_text("hello")
            assert camera.receive_json() == {"error": "bad request", "reason": "a frame is a binary message"}
            camera.send_bytes(png(204, (32, 24)))
            assert camera.receive_json()["faces"][0]["label"] == "light"

    def test_a_full_queue_is_told_and_the_mirror_goes_on(self):
        lamp = FakePredictor()
        with running(lamp, waiting=1) as client, client.websocket_connect("ws://localhost/mirror") as camera:
            lamp.gate.clear()
            threads = [
                threading.Thread(target=client.post, args=("/predict",), kwargs={"files": files(png())})
                for _ in range(2)
            ]
            threads[0].start()
            assert lamp.asked.wait(20)
            threads[1].start()
            while client.get("/health").json()["waiting"] < 1:
                time.sleep(0.01)
            camera.send_bytes(png(204, (32, 24)))
            told = camera.receive_json()
            assert (told["error"], told["retry_after"]) == ("service unavailable", 1)
            lamp.gate.set()
            for thread in threads:
                thread.join(20)
            camera.send_bytes(png(204, (32, 24)))
            assert camera.receive_json()["faces"][0]["label"] == "light"

    def test_a_model_that_is_not_there_ends_it_with_a_reason(self, client):
        with (
            client.websocket_connect("ws://localhost/mirror?model=../x") as camera,
            pytest.raises(WebSocketDisconnect) as caught,
        ):
            camera.receive_json()
        assert (caught.value.code, caught.value.reason) == (
            1008,
            "there is no run or blend '../x'; fix: served here: lamp",
        )

    def test_mirrors_are_bounded_and_make_room(self):
        with running(mirrors=1) as client:
            with client.websocket_connect("ws://localhost/mirror"):
                with pytest.raises(WebSocketDisconnect) as caught, client.websocket_connect("ws://localhost/mirror"):
                    pass
                assert problem(caught.value, 503) == "1 mirrors are open already"
            with client.websocket_connect("ws://localhost/mirror") as camera:
                camera.send_bytes(png())
                assert camera.receive_json()["frame"] == 1

    @pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"host": "evil.example"}])
    def test_a_page_of_another_site_gets_none(self, client, headers):
        with (
            pytest.raises(WebSocketDisconnect) as caught,
            client.websocket_connect("ws://localhost/mirror", headers=headers),
        ):
            pass
        assert caught.value.status_code in (403, 421)

    def test_one_that_sends_nothing_is_closed(self):
        with (
            running(idle_s=0.05) as client,
            client.websocket_connect("ws://localhost/mirror") as camera,
            pytest.raises(WebSocketDisconnect) as caught,
        ):
            camera.receive_json()
        assert (caught.value.code, caught.value.reason) == (1001, "no frame came")

    def test_frames_beyond_the_rate_wait(self):
        with running(rate=4.0, burst=2) as client:
            began = time.monotonic()
            with client.websocket_connect("ws://localhost/mirror") as camera:
                for _ in range(4):
                    camera.send_bytes(png())
                    assert camera.receive_json()["faces"]
            # The handshake takes one token, the first frame the other; three more come at four a second.
            assert time.monotonic() - began >= 0.75


class TestStarting:
    def test_a_port_that_is_taken_is_told_before_anything_is_loaded(self, tmp_path):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(FoldwiseError) as caught:
                serve(tmp_path, ["nothing"], port=port, say=print)
        assert str(caught.value) == (
            f"port {port} is taken\n  fix: stop what listens there, or take another: --port {port + 1}"
        )

    def test_an_address_of_another_machine_is_told(self, tmp_path):
        with pytest.raises(FoldwiseError, match=r"--host 192.0.2.1: cannot listen there"):
            serve(tmp_path, [], host="192.0.2.1", port=0, say=print)
        with pytest.raises(FoldwiseError, match="is no address of this machine"):
            serve(tmp_path, [], host="no such name", port=0, say=print)
        with pytest.raises(FoldwiseError, match="--port must be 0 to 65535, but got 70000"):
            serve(tmp_path, [], port=70_000, say=print)
        with pytest.raises(FoldwiseError, match="--rate must be 0 or more requests a second, but got -1"):
            serve(tmp_path, [], rate=-1.0, say=print)

    def test_nothing_to_serve_is_told(self, tmp_path):
        with pytest.raises(FoldwiseError) as caught:
            serve(tmp_path, [], port=0, say=print)
        assert str(caught.value) == (
            "there is nothing to serve: no run under oof/ has its weights on this machine\n"
            "  fix: fetch them (make weights FROM=<folder>), or train one: make exp EXP=<name>"
        )

    def test_what_is_not_installed_is_told(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "fastapi", None)
        monkeypatch.delitem(sys.modules, "foldwise.serve.app")
        with pytest.raises(FoldwiseError) as caught:
            importlib.import_module("foldwise.serve.app")
        assert str(caught.value) == 'fastapi is not installed\n  fix: pip install "foldwise[serve]"'


SERVER = """
import sys
from pathlib import Path
from foldwise.serve.app import serve
sys.exit(serve(Path(sys.argv[1]), ["tiny"], port=0, say=lambda line: print(line, flush=True)))
"""


@pytest.fixture(scope="module")
def served_root(demo_root, tmp_path_factory):
    root = tmp_path_factory.mktemp("served") / "project"
    shutil.copytree(demo_root, root)
    keep_untrained(root, "tiny")
    return root


@pytest.fixture(scope="module")
def server(served_root):
    command = [sys.executable, "-c", SERVER, str(served_root)]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not lines or not lines[-1].startswith("stop"):
                line = process.stdout.readline()
                assert line, process.stderr.read()
                lines.append(line.strip())
            address = re.search(r"http://(127\.0\.0\.1:\d+)", "\n".join(lines))[1]
            yield SimpleNamespace(process=process, lines=lines, address=address)
        finally:
            process.kill()


@pytest.mark.slow
class TestRealServer:
    """One process of its own with a network of its own, over a real socket."""

    def test_it_answers_as_the_predictor_does_refuses_and_stops(self, server, served_root):
        assert re.match(r"model     tiny, version [0-9a-f]{12}: right on ", server.lines[0])
        predictor = Predictor.load("tiny", root=served_root, device="cpu")
        pictures = sorted((served_root / "inputs" / "demo" / "images").iterdir())[:5]
        contents = [path.read_bytes() for path in pictures]
        expected = predictor.predict([read_picture(raw, where="it") for raw in contents])
        with httpx.Client(base_url=f"http://{server.address}", timeout=60) as client:
            told = client.post("/predict", files=files(*contents)).json()
            assert (told["model"], told["version"]) == ("tiny", predictor.version)
            assert [each["label"] for each in told["files"]] == expected.labels.tolist()
            probs = [list(each["faces"][0]["probabilities"].values()) for each in told["files"]]
            assert np.abs(np.array(probs) - expected.probabilities).max() < 1e-5
            assert client.post("/explain", files=files(contents[0])).headers["content-type"] == "image/png"
            assert [run["name"] for run in client.get("/runs").json()["runs"]] == ["tiny"]

        host, port = server.address.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as raw:
            head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            raw.sendall(f"{head}Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n".encode())
            assert raw.recv(100).startswith(b"HTTP/1.1 413 ")

        with connect(f"ws://{server.address}/mirror", origin=f"http://{server.address}") as camera:
            for number in (1, 2):
                camera.send(contents[0])
                assert json.loads(camera.recv(60))["frame"] == number
        with pytest.raises(InvalidStatus), connect(f"ws://{server.address}/mirror", origin="http://evil.example"):
            pass

        server.process.send_signal(signal.SIGINT)
        out, err = server.process.communicate(timeout=60)
        assert (server.process.returncode, out, err) == (0, "stopped\n", "")
