"""The mirror without a browser: a video is annotated frame by frame, and a window is shown what it should be.

A face is a gray square on blue; the model calls a light one happy, and a dark one sad.
"""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from foldwise.errors import FoldwiseError
from foldwise.serve import mirror as module
from foldwise.serve import tracking
from foldwise.serve.faces import Box
from foldwise.serve.mirror import NOTICE, annotate, emoji, mirror
from foldwise.serve.tracking import Face

SIZE = 320, 240
LEFT, TOP, SIDE = 40, 80, 100
HAPPY, SAD = (255, 203, 69), (141, 188, 236)


class Lamp:
    """Says how light each box is, and remembers which fold was asked."""

    classes = ("happy", "sad")

    def __init__(self):
        self.folds = []

    def predict(self, images, boxes=None, *, fold=None):
        self.folds.append(fold)
        (image,), (some,) = images, boxes
        light = np.array([image[b.top : b.top + b.height, b.left : b.left + b.width].mean() / 255 for b in some])
        return SimpleNamespace(probabilities=np.stack([light, 1 - light], axis=1))


def find_squares(picture, *, limit):
    gray = (picture[..., 2].astype(int) - picture[..., 0] < 60).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(gray)
    return [Box(int(x), int(y), int(w), int(h), 1.0) for x, y, w, h, n in stats[1:] if n > 400][:limit]


@pytest.fixture(autouse=True)
def squares(monkeypatch):
    class Session(tracking.Session):
        def __init__(self, model, *, folds=()):
            super().__init__(model, find=find_squares, folds=folds, slow_s=-1.0)

    monkeypatch.setattr(module, "Session", Session)


def drawn(level, scale=1):
    """A blue picture with a gray square, or none for None."""
    picture = np.full((scale * SIZE[1], scale * SIZE[0], 3), (20, 40, 200), dtype=np.uint8)
    if level is not None:
        picture[scale * TOP : scale * (TOP + SIDE), scale * LEFT : scale * (LEFT + SIDE)] = level
    return picture


def video(path, levels, scale=1, rate=10):
    out = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), rate, (scale * SIZE[0], scale * SIZE[1]))
    for level in levels:
        out.write(cv2.cvtColor(drawn(level, scale), cv2.COLOR_RGB2BGR))
    out.release()
    return path


def frames_of(path):
    read = cv2.VideoCapture(str(path))
    frames = []
    while (got := read.read())[0]:
        frames.append(cv2.cvtColor(got[1], cv2.COLOR_BGR2RGB))
    return frames, read.get(cv2.CAP_PROP_FPS)


def share(frame, colour):
    """How many pixels above the face's middle have nearly that colour; the bars are elsewhere."""
    scale = frame.shape[0] / SIZE[1]
    part = frame[: round(scale * (TOP + 30)), round(scale * LEFT) : round(scale * (LEFT + SIDE))]
    return int((np.abs(part.astype(int) - colour).sum(axis=2) < 130).sum() / scale**2)


class Screen:
    """A window that presses the keys it is given, one a frame, and keeps what it was shown."""

    def __init__(self, *keys):
        self.keys, self.shown, self.closed = list(keys), [], False

    def __call__(self, title):
        assert title == "Foldwise: mirror"
        return self

    def show(self, picture):
        self.shown.append(picture.copy())
        key = self.keys.pop(0)
        if key is KeyboardInterrupt:
            raise key
        return key

    def close(self):
        self.closed = True


# Videos ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "name"), [(1, "out.avi"), (3, "out.mp4")])
def test_each_frame_of_a_video_is_annotated_with_the_emoji_of_its_face(tmp_path, scale, name):
    levels = [None] * 2 + [225] * 6 + [30] * 6
    said = []
    source = video(tmp_path / "in.avi", levels, scale)
    mirror(Lamp(), source=source, write=tmp_path / "to" / name, say=said.append)
    frames, rate = frames_of(tmp_path / "to" / name)
    assert rate == 10
    assert [frame.shape for frame in frames] == [(scale * SIZE[1], scale * SIZE[0] + max(160, scale * 120), 3)] * len(
        levels
    )
    more = [share(frame, HAPPY) - share(frame, SAD) for frame in (*frames[:8], *frames[-3:])]
    assert [(each > 150) - (each < -150) for each in more] == [*[0] * 2, *[1] * 6, *[-1] * 3]
    assert said[0] == NOTICE
    assert said[1].startswith(f"written  {tmp_path / 'to' / name}: 14 frames, 12 with a face; ")
    assert [path.name for path in (tmp_path / "to").iterdir()] == [name]


def test_a_video_is_answered_by_all_models_however_slow_they_are(tmp_path):
    lamp = Lamp()
    source = video(tmp_path / "in.avi", [200] * 6)
    mirror(lamp, folds=(0, 1), source=source, write=tmp_path / "out.avi", say=lambda _line: None)
    assert lamp.folds == [None] * 6


def refusal(**options):
    with pytest.raises(FoldwiseError) as caught:
        mirror(Lamp(), say=lambda _line: None, **options)
    return str(caught.value)


def test_what_cannot_be_annotated_is_told_and_leaves_nothing(tmp_path):
    source, text, out = video(tmp_path / "in.avi", [200]), tmp_path / "text.avi", tmp_path / "out.mp4"
    text.write_text("no video")
    empty = video(tmp_path / "empty.avi", [])
    assert refusal(write=out) == "--write has no video to read\n  fix: name one: --source VIDEO --write OUT.mp4"
    assert refusal(source=source, write=tmp_path / "out.gif") == (
        f"{tmp_path / 'out.gif'}: is to be a video of an unknown kind\n  fix: name it .mp4 or .avi"
    )
    missing = tmp_path / "none.avi"
    assert refusal(source=missing, write=out) == (
        f"{missing}: there is no such video\n  fix: give the path of a video file"
    )
    assert refusal(source=text, write=out) == (
        f"{text}: is no video that OpenCV reads\n  fix: convert it to .mp4 or .avi"
    )
    assert str(empty) in refusal(source=empty, write=out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.avi", "in.avi", "text.avi"]


# Windows --------------------------------------------------------------------------------------------------------------


def test_a_key_saves_what_is_shown_and_another_ends(tmp_path):
    screen, said = Screen(None, "s", None, "q"), []
    source = video(tmp_path / "in.avi", [225] * 8, rate=100)
    mirror(Lamp(), source=source, snapshots=tmp_path / "kept", say=said.append, screen=screen)
    assert len(screen.shown) == 4
    assert screen.closed
    (saved,) = (tmp_path / "kept").iterdir()
    assert (np.asarray(Image.open(saved)) == screen.shown[1]).all()
    assert said == [NOTICE, "s saves a snapshot, q ends", f"written  {saved}"]
    assert share(screen.shown[0], HAPPY) > 150


def test_a_camera_is_mirrored_and_a_video_is_not(tmp_path, monkeypatch):
    path = video(tmp_path / "in.avi", [225] * 3, rate=100)
    plain, turned = Screen(None, None, None), Screen(None, None, None)
    mirror(Lamp(), source=path, say=lambda _line: None, screen=plain)
    opens = cv2.VideoCapture
    asked = []
    monkeypatch.setattr(module.cv2, "VideoCapture", lambda source: asked.append(source) or opens(str(path)))
    mirror(Lamp(), camera=3, say=lambda _line: None, screen=turned)
    assert asked == [3]
    middle = TOP + SIDE // 2
    left, right = (middle, LEFT + 20), (middle, SIZE[0] - LEFT - 20)
    for screen, face, wall in ((plain, left, right), (turned, right, left)):
        assert np.ptp(screen.shown[0][face].astype(int)) < 30
        assert screen.shown[0][wall][2] > 150


def test_folds_take_turns_in_a_window(tmp_path):
    lamp = Lamp()
    source = video(tmp_path / "in.avi", [200] * 6, rate=100)
    mirror(lamp, folds=(4, 7), source=source, say=lambda _line: None, screen=Screen(*[None] * 6))
    assert lamp.folds == [None, None, None, 7, 4, 7]


def test_an_interrupt_ends_it_quietly(tmp_path):
    screen = Screen(None, KeyboardInterrupt)
    mirror(Lamp(), source=video(tmp_path / "in.avi", [200] * 6, rate=100), say=lambda _line: None, screen=screen)
    assert screen.closed


def test_without_a_screen_or_a_camera_it_is_told_what_to_do_instead(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("DISPLAY", raising=False)
    source = video(tmp_path / "in.avi", [200])
    told = refusal(source=source)
    assert told.startswith(("there is no screen here: ", "there is no window without "))
    assert told.endswith(
        "\n  fix: make serve, and open the page's mirror in a browser; --source VIDEO --write OUT.mp4 needs no screen"
    )
    assert refusal(camera=99) == (
        "camera 99 cannot be opened\n"
        "  fix: is it plugged in, free and allowed? --camera N takes another, --source VIDEO a file"
    )


# Drawing --------------------------------------------------------------------------------------------------------------


def test_every_emotion_has_an_emoji_of_its_own_and_others_their_first_letter():
    names = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise", "cat", "dog")
    images = {name: np.asarray(emoji(name, 64)).astype(int) for name in names}
    for name in names:
        assert images[name].shape == (64, 64, 4)
        assert (images[name][0, 0, 3], images[name][8, 32, 3]) == (0, 255)
        for other in names:
            if other != name:
                assert np.abs(images[name] - images[other]).mean() > 0.5
    grays = images["cat"][32, 6, :3]
    assert (grays == images["dog"][32, 6, :3]).all()


def test_a_picture_is_not_drawn_on_itself_and_faces_at_its_border_are_drawn():
    picture = drawn(None)
    kept = picture.copy()
    face = Face(1, Box(-10, -10, 60, 60, 1.0), 0, np.array([0.7, 0.3]), seen=False)
    other = Face(2, Box(290, 220, 60, 60, 1.0), 1, np.array([0.2, 0.8]), seen=True)
    shown = annotate(picture, [face, other], ("happy", "sad"), told="12 frames a second")
    assert (picture == kept).all()
    assert shown.shape == (SIZE[1], SIZE[0] + 160, 3)
    assert (shown[:, : SIZE[0]] != picture).any(axis=2).mean() > 0.03
    assert (shown[:, -3:] == shown[0, -1]).all()  # nothing reaches beyond the picture
