"""The emoji mirror without a browser: a camera in a window, or a video annotated into another.

The same session as the page's mirror, so the same faces, numbers and smoothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from foldwise.data.readers.images import png_of
from foldwise.errors import FoldwiseError
from foldwise.files import atomic_path, atomic_write
from foldwise.serve.faces import Box
from foldwise.serve.tracking import Face, Model, Session

Pixels = NDArray[np.uint8]

NOTICE = "an expression is not a feeling: the model names what a face looks like to those who labelled its training set"

_SEARCHED = 640  # px of the width in which faces are sought: half the time of a camera's 1280
_FORMATS = {".mp4": "mp4v", ".avi": "MJPG"}
_INK, _PLAIN, _DARK = "#33261a", "#d5dbe3", "#1a1e25"

# On 64 x 64: skin, eyes, and curves as (x0, y0, x1, y1, x2, y2), the middle point being the control point.
_EYES = ((22, 27, 3.5, 4.5), (42, 27, 3.5, 4.5))
_WIDE = ((22, 28, 5, 6), (42, 28, 5, 6))
_EMOJIS: dict[str, tuple[str, Sequence[tuple[float, ...]], Sequence[tuple[float, ...]]]] = {
    "angry": ("#f0836a", _EYES, ((14, 16, 20, 19, 26, 22), (50, 16, 44, 19, 38, 22), (21, 47, 32, 38, 43, 47))),
    "disgust": (
        "#b5c764",
        (),
        (
            (14, 20, 20, 17, 26, 21),
            (50, 16, 43, 15, 38, 21),
            (17, 28, 21, 28, 26, 28),
            (38, 28, 42, 28, 47, 28),
            (19, 46, 25, 38, 31, 42),
            (31, 42, 37, 46, 45, 37),
        ),
    ),
    "fear": (
        "#b9b4ee",
        _WIDE,
        (
            (14, 18, 18, 13, 24, 12),
            (50, 18, 46, 13, 40, 12),
            (20, 46, 24, 40, 28, 46),
            (28, 46, 32, 52, 36, 46),
            (36, 46, 40, 40, 44, 46),
        ),
    ),
    "happy": ("#ffcb45", (), ((16, 28, 21.5, 20, 27, 28), (37, 28, 42.5, 20, 48, 28), (17, 38, 32, 64, 47, 38))),
    "neutral": ("#e6d5a4", _EYES, ((21, 43, 32, 43, 43, 43),)),
    "sad": ("#8dbcec", _EYES, ((14, 21, 21, 21, 25, 15), (50, 21, 43, 21, 39, 15), (21, 48, 32, 37, 43, 48))),
    "surprise": (
        "#ffdc73",
        (*_EYES, (32, 45, 7, 8)),
        ((15, 17, 20, 10, 26, 13), (49, 17, 44, 10, 38, 13)),
    ),
}


class Screen(Protocol):
    """Where frames are shown."""

    def show(self, picture: Pixels) -> str | None:
        """Show (H, W, 3) RGB uint8; the last key that was pressed since, `q` where the window was closed."""

    def close(self) -> None:
        """Take the window away."""


def mirror(
    model: Model,
    *,
    folds: Sequence[int] = (),
    camera: int = 0,
    source: Path | None = None,
    write: Path | None = None,
    snapshots: Path = Path("snapshots"),
    say: Callable[[str], None],
    screen: Callable[[str], Screen] | None = None,
) -> None:
    """Show a camera or a video with an emoji on each face, or write a video so annotated.

    In the window `s` saves what is shown and `q` ends. Nothing else is kept of a camera's frames.

    Args:
        model: Answers for the faces, as a `Predictor` does.
        folds: Its folds, which may take turns in a window where all its models together are slow; see `Session`.
        camera: Number of the camera, where there is no `source`.
        source: A video file in place of the camera; not mirrored.
        write: Annotate `source` into this file, `.mp4` or `.avi`, without a window and without its sound.
        snapshots: Folder for what `s` saves.
        say: Prints a line.
        screen: Opens a window of that title; None for the real one.

    Raises:
        FoldwiseError: If there is no screen, no camera, no such video, or it cannot be written.
    """
    say(NOTICE)
    if write is not None:
        if source is None:
            raise FoldwiseError("--write has no video to read\n  fix: name one: --source VIDEO --write OUT.mp4")
        say(_annotate_video(Session(model), model.classes, source, write))
        return
    session = Session(model, folds=folds)
    began = time.monotonic()
    with (
        _opened(camera if source is None else source) as (video, rate),
        closing((screen or _open_window)("Foldwise: mirror")) as window,
        suppress(KeyboardInterrupt),
    ):
        say("s saves a snapshot, q ends")
        for frame, picture in enumerate(_frames(video)):
            shown = picture if source is not None else np.ascontiguousarray(picture[:, ::-1])
            now = time.monotonic() - began
            faces = _look(session, shown, now)
            drawn = annotate(shown, faces, model.classes, told=f"{session.rate:.0f} frames a second")
            if source is not None:  # a video is not to run faster than it was taken
                time.sleep(max(0.0, (frame + 1) / rate - (time.monotonic() - began)))
            key = window.show(drawn)
            if key == "s":
                path = snapshots / f"mirror-{datetime.now():%Y-%m-%d-%H%M%S-%f}.png"
                atomic_write(path, png_of(drawn))
                say(f"written  {path}")
            elif key == "q":
                break


def _annotate_video(session: Session, classes: tuple[str, ...], source: Path, write: Path) -> str:
    """Write the video; a frame's time is its own, so that the same video always gives the same answers."""
    fourcc = _FORMATS.get(write.suffix.lower())
    if fourcc is None:
        raise FoldwiseError(f"{write}: is to be a video of an unknown kind\n  fix: name it {' or '.join(_FORMATS)}")
    frames = with_face = 0
    began = time.monotonic()
    with _opened(source) as (video, rate), atomic_path(write) as temporary:
        # The encoder goes by the name's ending.
        named = temporary.with_name(temporary.name + write.suffix.lower())
        out: cv2.VideoWriter | None = None
        try:
            for picture in _frames(video):
                faces = _look(session, picture, frames / rate)
                drawn = annotate(picture, faces, classes)
                if out is None:
                    height, width = drawn.shape[:2]
                    out = cv2.VideoWriter(str(named), cv2.VideoWriter.fourcc(*fourcc), rate, (width, height))
                    if not out.isOpened():
                        raise FoldwiseError(f"{write}: this OpenCV cannot encode it\n  fix: name it .avi")
                out.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
                frames += 1
                with_face += bool(faces)
            if out is None:
                raise FoldwiseError(f"{source}: holds no frame that can be read\n  fix: give a video that plays")
            out.release()
            named.replace(temporary)
        finally:
            named.unlink(missing_ok=True)
    took = time.monotonic() - began
    return f"written  {write}: {frames} frames, {with_face} with a face; {frames / took:.1f} frames a second"


@contextmanager
def _opened(source: int | Path) -> Iterator[tuple[cv2.VideoCapture, float]]:
    """The frames of a camera or a file, and how many of them make a second."""
    if isinstance(source, Path) and not source.is_file():
        raise FoldwiseError(f"{source}: there is no such video\n  fix: give the path of a video file")
    video = cv2.VideoCapture(str(source) if isinstance(source, Path) else source)
    try:
        if not video.isOpened() and isinstance(source, Path):
            raise FoldwiseError(f"{source}: is no video that OpenCV reads\n  fix: convert it to .mp4 or .avi")
        if not video.isOpened():
            raise FoldwiseError(
                f"camera {source} cannot be opened\n"
                "  fix: is it plugged in, free and allowed? --camera N takes another, --source VIDEO a file"
            )
        video.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # of a slow model's camera the newest frame, not the oldest
        rate = video.get(cv2.CAP_PROP_FPS)
        yield video, rate if 1 <= rate <= 1000 else 25.0
    finally:
        video.release()


def _frames(video: cv2.VideoCapture) -> Iterator[Pixels]:
    while True:
        there, frame = video.read()
        if not there:
            return
        yield np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _look(session: Session, picture: Pixels, now: float) -> list[Face]:
    """The faces of a frame, sought in a smaller one where it is large."""
    scale = picture.shape[1] / _SEARCHED
    if scale <= 1:
        return session.look(picture, now)
    size = _SEARCHED, max(1, round(picture.shape[0] / scale))
    small = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return [
        Face(face.id, _scaled(face.box, scale), face.label, face.probabilities, face.seen)
        for face in session.look(small, now)
    ]


def _scaled(box: Box, scale: float) -> Box:
    left, top, width, height = (round(scale * side) for side in (box.left, box.top, box.width, box.height))
    return Box(left, top, width, height, box.score)


def annotate(picture: Pixels, faces: Sequence[Face], classes: Sequence[str], *, told: str = "") -> Pixels:
    """Draw each face's box, emoji and class, and beside the picture the bars of the largest face.

    Args:
        picture: (H, W, 3) uint8 RGB; left as it is.
        faces: In its pixels.
        classes: Names, in the order of the probabilities.
        told: A line at the bottom of the bars.

    Returns:
        (H, W + P, 3) uint8 RGB, where P is about half of H and even, as encoders want it.
    """
    height, width = picture.shape[:2]
    side = 2 * round(max(0.25 * height, 80))
    image = Image.new("RGB", (width + side, height), _DARK)
    image.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(image, "RGBA")
    font = _font(max(11.0, height / 26))
    line = max(2, height // 180)
    for face in faces:
        box, name = face.box, classes[face.label]
        ends = (box.left, box.top, box.left + box.width, box.top + box.height)
        outline = (255, 255, 255, 255 if face.seen else 120)
        draw.rounded_rectangle(ends, radius=0.1 * box.width, outline=outline, width=line)
        drawn = emoji(name, round(max(0.5 * box.width, height / 9)))
        left, top = round(box.left + (box.width - drawn.width) / 2), max(0, round(box.top - 0.72 * drawn.height))
        image.paste(drawn, (left, top), drawn)
        _label(draw, font, f"{name} {face.probabilities[face.label]:.0%}", box, (width, height))
    draw.rectangle((width, 0, width + side, height), fill=_DARK)  # over what reached beyond the picture
    largest = max(faces, key=lambda face: face.box.width * face.box.height, default=None)
    _panel(image, (width, side), font, largest, classes, told)
    return np.asarray(image)


def _label(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, text: str, box: Box, size: tuple[int, int]) -> None:
    wide, high = font.getlength(text) + font.size, 1.5 * font.size
    left = min(max(0.0, box.left + (box.width - wide) / 2), size[0] - wide)
    top = min(box.top + box.height + 0.3 * font.size, size[1] - high)
    draw.rounded_rectangle((left, top, left + wide, top + high), radius=0.4 * font.size, fill=(0, 0, 0, 165))
    draw.text((left + wide / 2, top + high / 2), text, fill="white", font=font, anchor="mm")


def _panel(
    image: Image.Image,
    place: tuple[int, int],
    font: ImageFont.FreeTypeFont,
    face: Face | None,
    classes: Sequence[str],
    told: str,
) -> None:
    """Emoji, name and bars of a face, from `place[0]` px on, `place[1]` px wide."""
    draw = ImageDraw.Draw(image, "RGBA")
    gap, (left, wide) = 0.7 * font.size, place
    right, top = left + wide - gap, 4.6 * font.size
    name = "no face" if face is None else classes[face.label]
    if face is not None:
        drawn = emoji(name, round(3 * font.size))
        image.paste(drawn, (round(left + gap), round(gap)), drawn)
    draw.text((left + 2 * gap + 3 * font.size, gap + 1.5 * font.size), name, fill="white", font=font, anchor="lm")
    shares = np.zeros(len(classes)) if face is None else face.probabilities
    begin = left + 1.6 * gap + max(font.getlength(each) for each in classes)
    step = min(1.6 * font.size, (image.height - top - 2 * font.size) / len(classes))
    for row, (each, share) in enumerate(zip(classes, shares, strict=True)):
        middle, half = top + step * (row + 0.5), 0.3 * step
        draw.text((left + gap, middle), each, fill="white", font=font, anchor="lm")
        draw.rectangle((begin, middle - half, right, middle + half), fill=(255, 255, 255, 40))
        fill = (255, 203, 69, 255) if face is not None and row == face.label else (255, 255, 255, 170)
        if share > 0:
            draw.rectangle((begin, middle - half, begin + (right - begin) * float(share), middle + half), fill=fill)
    draw.text((left + gap, image.height - gap), told, fill=(255, 255, 255, 170), font=font, anchor="ls")


def _font(size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # with a size it is
    return font


@lru_cache(maxsize=256)
def emoji(name: str, side: int) -> Image.Image:
    """A drawn emoji, so that no font is needed: RGBA, `side` x `side` px; of an unknown class its first letter."""
    scale = 4 * side / 64
    image = Image.new("RGBA", (4 * side, 4 * side))
    draw = ImageDraw.Draw(image)
    known = _EMOJIS.get(name)
    skin, eyes, curves = known or (_PLAIN, (), ())
    draw.ellipse([scale * end for end in (2, 2, 62, 62)], fill=skin)
    for x, y, across, down in eyes:
        draw.ellipse([scale * end for end in (x - across, y - down, x + across, y + down)], fill=_INK)
    t = np.linspace(0, 1, 24)[:, None]
    for curve in curves:
        first, middle, last = np.array(curve).reshape(3, 2)
        points = [
            (float(x), float(y)) for x, y in scale * ((1 - t) ** 2 * first + 2 * t * (1 - t) * middle + t**2 * last)
        ]
        if name == "happy" and curve is curves[-1]:
            draw.polygon(points, fill=_INK)
        draw.line(points, fill=_INK, width=round(3.2 * scale), joint="curve")
        for x, y in (points[0], points[-1]):
            draw.ellipse((x - 1.6 * scale, y - 1.6 * scale, x + 1.6 * scale, y + 1.6 * scale), fill=_INK)
    if known is None:
        draw.text((32 * scale, 33 * scale), name[:1].upper(), fill=_INK, anchor="mm", font=_font(30 * scale))
    return image.resize((side, side), Image.Resampling.LANCZOS)


class _Window:
    """A window of tkinter's that shows one frame after another."""

    def __init__(self, title: str) -> None:
        import tkinter as tk

        from PIL import ImageTk

        self._photo_of = ImageTk.PhotoImage
        self._keys: list[str] = []
        self._window = tk.Tk()
        self._window.title(title)
        self._window.protocol("WM_DELETE_WINDOW", lambda: self._keys.append("q"))
        self._window.bind("<Key>", lambda event: self._keys.append(event.char))
        self._window.bind("<Escape>", lambda _event: self._keys.append("q"))
        self._label = tk.Label(self._window, borderwidth=0)
        self._label.pack()
        self._window.focus_force()

    def show(self, picture: Pixels) -> str | None:
        photo = self._photo_of(Image.fromarray(picture))
        self._label.configure(image=photo)
        self._photo = photo  # Tk does not hold it
        self._window.update()
        key = next((key for key in reversed(self._keys) if key in ("q", "s")), None)
        self._keys.clear()
        return key

    def close(self) -> None:
        self._window.destroy()


def _open_window(title: str) -> Screen:
    elsewhere = "make serve, and open the page's mirror in a browser; --source VIDEO --write OUT.mp4 needs no screen"
    try:
        import tkinter as tk

        from PIL import ImageTk  # noqa: F401 - is there or not
    except ImportError as error:
        raise FoldwiseError(f"there is no window without {error.name}\n  fix: {elsewhere}") from None
    try:
        return _Window(title)
    except tk.TclError as error:
        raise FoldwiseError(f"there is no screen here: {error}\n  fix: {elsewhere}") from None
