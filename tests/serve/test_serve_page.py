"""The page in a real browser, with the server's routes behind it, no network, and a camera that plays a drawn video.

A face is a gray square on blue; the model calls a light one happy, and a dark one sad.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import shutil
import socket
import threading
from base64 import b64encode
from types import SimpleNamespace

import cv2
import httpx
import numpy as np
import pytest
import uvicorn
from fake_models import FakePredictor, entry, make_backend
from PIL import Image

from foldwise.serve import app as module
from foldwise.serve import tracking
from foldwise.serve.faces import Box

pytestmark = pytest.mark.slow

EVIL = "</script><img src=x onerror=window.hacked=1><b>&amp;"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SIZE = 320, 240
LIGHT, DARK = 215, 40
RATE, HELD_S = 10, 3  # frames a second of the camera's video, and seconds that it shows a face


def drawn(*squares):
    """A blue picture with gray squares: (left, top, side, level) each."""
    picture = np.full((SIZE[1], SIZE[0], 3), (20, 40, 200), dtype=np.uint8)
    for left, top, side, level in squares:
        picture[top : top + side, left : left + side] = level
    return picture


def png(*squares):
    file = io.BytesIO()
    Image.fromarray(drawn(*squares)).save(file, "PNG")
    return file.getvalue()


def find_squares(picture, *, limit):
    """The gray squares of a picture, the largest first, a little within their borders."""
    gray = (picture[..., 2].astype(int) - picture[..., 0] < 60).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(gray)
    boxes = [Box(int(x) + 2, int(y) + 2, int(w) - 4, int(h) - 4, 1.0) for x, y, w, h, n in stats[1:] if n > 400]
    return sorted(boxes, key=lambda box: -box.width)[:limit]


class Session(tracking.Session):
    def __init__(self, model, **options):
        super().__init__(model, find=find_squares, **options)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """What the camera plays, again and again: a light face, then a dark one, left of the middle."""
    path = tmp_path_factory.mktemp("camera") / "faces.y4m"
    with path.open("wb") as file:
        file.write(f"YUV4MPEG2 W{SIZE[0]} H{SIZE[1]} F{RATE}:1 Ip A1:1 C420jpeg\n".encode())
        for level in (LIGHT, DARK):
            frame = cv2.cvtColor(drawn((40, 70, 100, level)), cv2.COLOR_RGB2YUV_I420).tobytes()
            file.write((b"FRAME\n" + frame) * RATE * HELD_S)
    return path


@pytest.fixture(scope="module")
def server():
    """The address of a server with three models that disagree, on a thread; `lamp` is asked by default."""
    models = [
        FakePredictor("lamp", classes=("sad", "happy")),
        FakePredictor("negative", classes=("happy", "sad")),
        FakePredictor("odd", classes=("plain", EVIL)),
    ]
    gone = entry(EVIL, missing=("other",), score=0.6)
    backend = make_backend(*models, entries=[gone])
    with pytest.MonkeyPatch.context() as patch, socket.socket() as listening:
        patch.setattr(module, "Session", Session)
        patch.setattr(module, "find_faces", find_squares)
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            module.create_app(backend), ws="websockets-sansio", log_config=None, log_level="critical", access_log=False
        )
        running = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(running.serve([listening])))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        running.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def browser(video):
    if CHROMIUM is None:
        if os.environ.get("FOLDWISE_REQUIRE_CHROMIUM"):
            pytest.fail("FOLDWISE_REQUIRE_CHROMIUM is set, but there is no chromium")
        pytest.skip("there is no chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    camera = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    camera.append(f"--use-file-for-fake-video-capture={video}")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, server):
    """Opens the page; at the end it must have asked nobody but the server, and told no error it was not to tell."""
    seen = SimpleNamespace(requests=[], errors=[])
    contexts = []

    def opens(width=1400, scheme="light", script="", tab=""):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(40_000)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("console", lambda line: seen.errors.append(line.text) if line.type in ("error", "warning") else None)
        if script:
            page.add_init_script(script)
        page.goto(f"{server}/{tab}")
        page.wait_for_selector(".runs tbody tr", state="attached")
        return page

    opens.seen = seen
    yield opens
    for context in contexts:
        context.close()
    assert seen.errors == []
    assert {re.sub(r"^(\w+://[^/]*).*", r"\1", url) for url in seen.requests if not url.startswith("blob:")} <= {
        server,
        "data:,",
    }


def give(page, content, name="picture.png"):
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})


def told(page, where="picture"):
    """The label, and each class with its share, as the page shows them."""
    answer = page.locator(f"#{where}-answer")
    classes = answer.locator(".bars dt").all_inner_texts()
    return answer.locator(".label").inner_text(), dict(
        zip(classes, answer.locator(".bars .share").all_inner_texts(), strict=True)
    )


def wait_for_label(page, label, where="picture"):
    page.locator(f"#{where}-answer .label").get_by_text(label, exact=True).wait_for()


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def test_faces_of_a_picture_are_boxed_and_picked_by_click_and_by_key(opened, server):
    page = opened()
    content = png((20, 60, 120, LIGHT), (200, 90, 80, DARK))
    answer = httpx.post(f"{server}/predict?faces=true", files={"files": content}).json()
    (file,) = answer["files"]
    assert [face["label"] for face in file["faces"]] == ["happy", "sad"]
    give(page, content)
    wait_for_label(page, "happy")
    shares = [{name: f"{p:.0%}" for name, p in face["probabilities"].items()} for face in file["faces"]]
    assert told(page) == ("happy", shares[0])
    boxes = page.locator(".box")
    named = [box.get_attribute("aria-label") for box in boxes.all()]
    assert named == [
        f"Face {k + 1} of 2: {face['label']}, {face['confidence']:.0%}" for k, face in enumerate(file["faces"])
    ]
    # A box lies where it was found, whatever the picture's size on the screen.
    picture, first = page.locator("#shown").bounding_box(), boxes.first.bounding_box()
    scale = picture["width"] / SIZE[0]
    left, top, width, height = file["faces"][0]["box"]
    expected = [picture["x"] + scale * left, picture["y"] + scale * top, scale * width, scale * height]
    assert [first[key] for key in ("x", "y", "width", "height")] == pytest.approx(expected, abs=1.5)
    boxes.nth(1).focus()
    page.keyboard.press("Enter")
    wait_for_label(page, "sad")
    assert told(page) == ("sad", shares[1])
    assert page.locator("#heard").inner_text() == f"sad, {file['faces'][1]['confidence']:.0%}"
    boxes.first.click()
    wait_for_label(page, "happy")
    assert [box.get_attribute("aria-pressed") for box in boxes.all()] == ["true", "false"]
    page.uncheck("#find")
    page.get_by_text("The answer is for the whole picture.").wait_for()
    assert boxes.count() == 0
    assert page.locator("#picture-answer .foot").inner_text().startswith(f"lamp, version {answer['version']}, ")


def test_another_model_answers_anew_and_names_are_text(opened):
    page = opened()
    give(page, png((20, 60, 120, LIGHT)))
    wait_for_label(page, "happy")
    page.select_option("#model", "negative")
    wait_for_label(page, "sad")
    page.select_option("#model", "odd")
    wait_for_label(page, EVIL)
    assert list(told(page)[1]) == ["plain", EVIL]
    # Of a class that no emoji is known for, the first letter.
    assert page.locator("#picture-answer .emoji text").text_content() == "<"
    page.click("#tab-runs")
    assert page.get_by_role("row").filter(has_text="onerror").locator("th").inner_text() == EVIL
    assert page.evaluate("window.hacked") is None


def test_a_picture_can_be_dropped_and_pasted_and_what_is_none_is_told(opened):
    page = opened()

    def arrives(kind, content, mime="image/png"):
        page.evaluate(
            """([kind, text, mime]) => {
              const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
              const files = new DataTransfer();
              files.items.add(new File([bytes], "given", { type: mime }));
              const init = { bubbles: true, cancelable: true };
              const event = kind === "drop"
                ? new DragEvent("drop", { ...init, dataTransfer: files })
                : new ClipboardEvent("paste", { ...init, clipboardData: files });
              document.body.dispatchEvent(event);
            }""",
            [kind, b64encode(content).decode(), mime],
        )

    arrives("drop", png((20, 60, 120, LIGHT)))
    wait_for_label(page, "happy")
    arrives("paste", png((20, 60, 120, DARK)))
    wait_for_label(page, "sad")
    arrives("drop", b"no picture", "text/plain")
    page.get_by_role("alert").get_by_text("given is no picture that can be shown.").wait_for()
    assert told(page)[0] == "sad"
    # What the browser shows and the server does not take: the server's reason is given.
    arrives("drop", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "image/svg+xml")
    page.get_by_role("alert").get_by_text("SVG").wait_for()
    assert told(page) == ("No answer", {"sad": "\u00a0", "happy": "\u00a0"})
    assert [("415" in each) for each in opened.seen.errors] == [True]
    opened.seen.errors.clear()


def test_why_there_is_no_heat_map_is_told(opened):
    page = opened()
    page.check("#explain")
    give(page, png((20, 60, 120, LIGHT)))
    page.locator(".looked p").get_by_text("the server failed at this").wait_for()
    assert told(page)[0] == "happy"
    assert [("500" in each) for each in opened.seen.errors] == [True]
    opened.seen.errors.clear()


def test_the_emoji_of_the_mirror_changes_with_the_face_and_a_snapshot_is_saved(opened, tmp_path):
    page = opened(tab="#mirror")
    page.click("#start")
    for label in ("happy", "sad", "happy"):
        wait_for_label(page, label, "mirror")
        assert page.locator("#mirror-answer .emoji").get_attribute("aria-label") == label
    assert re.fullmatch(r"(\d+(\.\d)? frames a second, )?\d+ ms each", page.locator("#rate").inner_text())
    with page.expect_download() as download:
        page.click("#snapshot")
    assert re.fullmatch(r"mirror-[\d-]+\.png", download.value.suggested_filename)
    download.value.save_as(tmp_path / "snapshot.png")
    saved = np.asarray(Image.open(tmp_path / "snapshot.png").convert("RGB")).astype(int)
    scale = saved.shape[1] / SIZE[0]
    # The face stands left of the middle before the camera, and right of it in a mirror.
    here, there = (saved[round(120 * scale), round(x * scale)] for x in (230, 90))
    assert np.ptp(here) < 30
    assert there[2] - there[0] > 100
    yellow = (np.abs(saved - [255, 203, 69]).sum(axis=2) < 20) | (np.abs(saved - [141, 188, 236]).sum(axis=2) < 20)
    assert yellow.sum() > 300 * scale**2  # the emoji
    page.click("#start")
    wait_for_label(page, "The mirror is off", "mirror")
    assert page.evaluate("document.getElementById('video').srcObject") is None


def test_the_mirror_goes_on_with_another_model_and_stops_with_its_tab(opened):
    page = opened(tab="#mirror")
    streams = "document.getElementById('video').srcObject !== null"
    page.click("#start")
    wait_for_label(page, "happy", "mirror")
    page.select_option("#model", "odd")
    page.locator("#mirror-answer .bars dt").get_by_text("plain").wait_for()
    page.locator("#mirror-answer .first").first.wait_for()
    assert page.evaluate(streams)
    page.click("#tab-runs")
    assert not page.evaluate(streams)


def test_a_camera_that_is_refused_is_told(opened):
    refuses = "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('no', 'NotAllowedError'); }"
    page = opened(script=refuses, tab="#mirror")
    page.click("#start")
    page.locator("#mirror-note").get_by_text("The camera was not allowed.").wait_for()
    assert page.locator("#start").inner_text() == "Start the mirror"
    assert page.locator("#start").is_enabled()


def test_runs_are_listed_with_their_scores_and_can_be_picked(opened):
    page = opened(tab="#runs")
    rows = [row.locator("th, td").all_inner_texts() for row in page.locator(".runs tbody tr").all()]
    assert [row[1].strip() for row in rows] == ["0.8000 \u00b1 0.0400"] * 3 + ["0.6000 \u00b1 0.0400"]
    assert [row[-1] for row in rows] == ["in use", "use", "use", "not here"]
    page.get_by_role("button", name="use negative").click()
    assert page.locator("#model").input_value() == "negative"
    assert page.locator(".runs tr.here th").inner_text() == "negative"
    options = page.locator("#model option").all()
    assert [option.is_disabled() for option in options] == [False, False, False, True]


def test_tabs_follow_the_arrow_keys_and_every_button_has_a_name(opened):
    page = opened()
    page.locator("#tab-picture").focus()
    for key, tab in (("ArrowRight", "mirror"), ("End", "runs"), ("ArrowRight", "picture"), ("ArrowLeft", "runs")):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.id") == f"tab-{tab}"
        assert page.locator("[role=tabpanel]:visible").get_attribute("id") == f"panel-{tab}"
    unnamed = "els => els.filter(el => !(el.getAttribute('aria-label') || el.innerText.trim())).length"
    assert page.eval_on_selector_all("button:visible", unnamed) == 0


def test_nothing_jumps_when_an_answer_comes(opened):
    page = opened()
    places = "els => els.map(el => { const r = el.getBoundingClientRect(); return [r.x, r.y, r.width]; })"
    before = page.eval_on_selector_all(".stage:visible, .answer:visible, .bars:visible, footer", places)
    give(page, png((20, 60, 120, LIGHT)))
    wait_for_label(page, "happy")
    assert page.eval_on_selector_all(".stage:visible, .answer:visible, .bars:visible, footer", places) == before


@pytest.mark.parametrize("width", [390, 820])
def test_a_narrow_page_never_scrolls_sideways(opened, width):
    page = opened(width=width, scheme="dark")
    assert overflow(page) <= 0
    give(page, png((2, 2, 120, LIGHT), (230, 100, 85, DARK)))
    wait_for_label(page, "happy")
    page.select_option("#model", "odd")
    wait_for_label(page, EVIL)
    assert overflow(page) <= 0
    for tab in ("mirror", "runs"):
        page.click(f"#tab-{tab}")
        assert overflow(page) <= 0
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", background)[:3])) < 384
    page.get_by_role("button", name="Light theme").click()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", background)[:3])) > 384
