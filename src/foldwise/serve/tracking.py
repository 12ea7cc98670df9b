"""Faces followed from frame to frame: the same face keeps its number, and its answer is smoothed over time.

A `Tracker` is a pure state machine of times, boxes and probabilities; a `Session` feeds it the frames of one camera.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from foldwise.serve.faces import Box, find_faces
from foldwise.serve.pictures import Limits, read_picture

Floats = NDArray[np.float64]

FRAME = Limits(bytes=2**20, pixels=1_000_000)
"""A camera's frame is at most this; the page sends 320 px wide JPEGs of some 15 KiB."""

MOST_FACES = 6
"""Faces followed in a frame, the largest first: each costs a prediction."""

# Two boxes with less in common are two faces. Faces that do not overlap and move by less than a quarter of their width
# between frames share at least 0.6 with themselves and at most 0.15 with another: their numbers cannot swap.
_OVERLAP = 0.2
# In seconds, so that a slow computer smooths as much as a fast one, only in fewer steps.
_HALF_LIFE = 0.2  # of the weight of what was seen before in the probabilities
_BOX_HALF_LIFE = 0.05
_LOST_AFTER = 0.6
_RATE_OVER = 2.0
_SLOW_FRAMES = 3
# Another class is shown once it is ahead by so much, or has been ahead for so long: noise around a tie does neither.
_MARGIN = 0.1
_AHEAD_FOR = 0.5


class Model(Protocol):
    """What answers for faces: a `Predictor`, or whatever queues for one."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the probabilities' columns."""

    def predict(
        self,
        images: Sequence[NDArray[np.uint8]],
        boxes: Sequence[Sequence[Box]] | None = None,
        *,
        fold: int | None = None,
    ) -> Answer:
        """Probabilities of the faces in `boxes`, a row each; by the models of one fold, or by all."""


class Answer(Protocol):
    """What a `Model` gives back, as `Prediction` does."""

    @property
    def probabilities(self) -> Floats:
        """(N, classes) float64, each row sums to 1."""


@dataclass(frozen=True, eq=False)
class Face:
    """A face that is followed.

    Attributes:
        id: From 1, in the order of first sight; never given to another face.
        box: Smoothed, in pixels of the frame.
        label: Index of the class that is shown; it trails the greatest probability a little, so as not to flicker.
        probabilities: (C,) float64, smoothed over time; they sum to 1.
        seen: Whether the face was found in this very frame.
    """

    id: int
    box: Box
    label: int
    probabilities: Floats
    seen: bool


@dataclass(eq=False)
class _Track:
    id: int
    last: Box  # as it was found
    place: Floats  # (4,) left, top, width, height, smoothed
    probabilities: Floats
    label: int
    seen: float  # when it was last found
    sightings: int = 1
    ahead_since: float | None = None  # since when another class than the one shown has been ahead


class Tracker:
    """Follows faces through the frames of one camera."""

    def __init__(self) -> None:
        self._tracks: list[_Track] = []
        self._count = 0
        self._now = -np.inf

    def update(self, now: float, boxes: Sequence[Box], probabilities: Floats) -> list[Face]:
        """Take in what was found in one frame.

        A face that is not found stays for 0.6 s after it was last seen, if it was seen at least twice: detectors miss
        a face for a frame now and then, and find one on a wall for a single frame.

        Args:
            now: When the frame was taken, in seconds of any clock that does not go backwards.
            boxes: The faces found, in pixels; none overlaps another by much.
            probabilities: (N, C) float64, of each box; each row sums to 1.

        Returns:
            The faces to show, by their number.

        Raises:
            ValueError: If `now` is before the frame before, or there are not as many probabilities as boxes.
        """
        if now < self._now:
            raise ValueError(f"a frame of {now} s came after one of {self._now} s")
        if len(boxes) != len(probabilities):
            raise ValueError(f"{len(boxes)} boxes, but {len(probabilities)} rows of probabilities")
        self._now = now
        matched = _match([track.last for track in self._tracks], boxes)
        for place, found in matched.items():
            _follow(self._tracks[place], now, boxes[found], probabilities[found])
        kept = [
            track
            for place, track in enumerate(self._tracks)
            if place in matched or (track.sightings > 1 and now - track.seen <= _LOST_AFTER)
        ]
        taken = set(matched.values())
        new = [self._begun(now, boxes[k], probabilities[k]) for k in range(len(boxes)) if k not in taken]
        self._tracks = kept + new
        return [
            Face(track.id, _rounded(track), track.label, track.probabilities.copy(), track.seen == now)
            for track in self._tracks
        ]

    def _begun(self, now: float, box: Box, probabilities: Floats) -> _Track:
        self._count += 1
        probabilities = np.array(probabilities, dtype=np.float64)
        return _Track(self._count, box, _numbers(box), probabilities, int(probabilities.argmax()), now)


class Session:
    """The frames of one camera: faces are found, predicted and followed. Not to be called from two threads at once."""

    def __init__(
        self,
        model: Model,
        *,
        find: Callable[..., list[Box]] = find_faces,
        folds: Sequence[int] = (),
        slow_s: float = 0.1,
    ) -> None:
        """Begin with no face in sight.

        Args:
            model: Answers for the faces.
            find: Finds them: `find(picture, limit=)`, largest first.
            folds: Whose models may take turns, a fold a frame, where all of them together are slow; smoothing then
                averages them over time. Empty: all answer for every frame.
            slow_s: Seconds that all models may take for a frame; three frames in a row over it, and they take turns.
        """
        self._model = model
        self._find = find
        self._folds = tuple(folds)
        self._slow_s = slow_s
        self._slow = 0  # frames in a row over `slow_s`
        self._tracker = Tracker()
        self._times: deque[float] = deque()
        self._frames = 0

    @property
    def rate(self) -> float:
        """Frames a second over the last two seconds; 0 where there were not two."""
        if len(self._times) < 2 or self._times[-1] == self._times[0]:
            return 0.0
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])

    @property
    def in_turns(self) -> int:
        """How many folds take turns; 0 where all models answer for every frame."""
        return len(self._folds) if len(self._folds) > 1 and self._slow >= _SLOW_FRAMES else 0

    def look(self, picture: NDArray[np.uint8], now: float) -> list[Face]:
        """Find, predict and follow the faces of a frame.

        Args:
            picture: (H, W, 3) uint8 RGB.
            now: When it was taken, in seconds of a clock that does not go backwards.
        """
        boxes = self._find(picture, limit=MOST_FACES)
        rows = self._predicted(picture, boxes) if boxes else np.empty((0, len(self._model.classes)))
        faces = self._tracker.update(now, boxes, rows)
        self._frames += 1
        self._times.append(now)
        while now - self._times[0] > _RATE_OVER:
            self._times.popleft()
        return faces

    def _predicted(self, picture: NDArray[np.uint8], boxes: Sequence[Box]) -> Floats:
        turns = self.in_turns
        if turns:
            return self._model.predict([picture], [boxes], fold=self._folds[self._frames % turns]).probabilities
        began = time.perf_counter()
        rows = self._model.predict([picture], [boxes]).probabilities
        self._slow = self._slow + 1 if time.perf_counter() - began > self._slow_s else 0
        return rows

    def frame(self, raw: bytes, now: float) -> dict[str, Any]:
        """Answer a frame as the page's mirror sends it.

        Args:
            raw: A JPEG, PNG or WebP within `FRAME`.
            now: When it came, in seconds of a clock that does not go backwards.

        Returns:
            For JSON: `frame` (from 1), `width` and `height` in pixels, `faces` (`id`, `box` as left, top, width and
            height in pixels, `label`, `confidence`, `probabilities` by class, `seen`), `time_ms` that the answer took,
            `fps` over the last two seconds, and `in_turns`.

        Raises:
            PictureError: If the bytes are no picture, or too large a one; the session goes on with the next frame.
        """
        began = time.perf_counter()
        picture = read_picture(raw, where="the frame", limits=FRAME)
        faces = self.look(picture, now)
        classes = self._model.classes
        return {
            "frame": self._frames,
            "width": picture.shape[1],
            "height": picture.shape[0],
            "faces": [
                {
                    "id": face.id,
                    "box": [face.box.left, face.box.top, face.box.width, face.box.height],
                    "label": classes[face.label],
                    "confidence": round(float(face.probabilities[face.label]), 4),
                    "probabilities": {
                        name: round(float(p), 4) for name, p in zip(classes, face.probabilities, strict=True)
                    },
                    "seen": face.seen,
                }
                for face in faces
            ],
            "time_ms": round(1e3 * (time.perf_counter() - began), 1),
            "fps": round(self.rate, 1),
            "in_turns": self.in_turns,
        }


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, from 0 to 1."""
    width = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
    height = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
    shared = max(width, 0) * max(height, 0)
    union = a.width * a.height + b.width * b.height - shared
    return shared / union if union else 0.0


def _match(tracks: Sequence[Box], boxes: Sequence[Box]) -> dict[int, int]:
    """Which box goes on with which track: the greatest overlap first, none below `_OVERLAP`."""
    shares = sorted(
        (-overlap(track, box), row, column) for row, track in enumerate(tracks) for column, box in enumerate(boxes)
    )
    matched: dict[int, int] = {}
    taken = set()
    for share, row, column in shares:
        if -share >= _OVERLAP and row not in matched and column not in taken:
            matched[row] = column
            taken.add(column)
    return matched


def _follow(track: _Track, now: float, box: Box, probabilities: Floats) -> None:
    passed = now - track.seen
    track.place += (1 - 0.5 ** (passed / _BOX_HALF_LIFE)) * (_numbers(box) - track.place)
    track.probabilities += (1 - 0.5 ** (passed / _HALF_LIFE)) * (probabilities - track.probabilities)
    track.last, track.seen = box, now
    track.sightings += 1
    first = int(track.probabilities.argmax())
    lead = track.probabilities[first] - track.probabilities[track.label]
    if lead <= 0:
        track.ahead_since = None
        return
    if track.ahead_since is None:
        track.ahead_since = now
    if lead >= _MARGIN or now - track.ahead_since >= _AHEAD_FOR:
        track.label, track.ahead_since = first, None


def _numbers(box: Box) -> Floats:
    return np.array([box.left, box.top, box.width, box.height], dtype=np.float64)


def _rounded(track: _Track) -> Box:
    left, top, width, height = (int(number) for number in np.rint(track.place))
    return Box(left, top, width, height, track.last.score)
