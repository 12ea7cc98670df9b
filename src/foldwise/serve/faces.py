"""Finding the faces in a picture, and cutting them out.

By OpenCV's cascade for frontal faces: Viola and Jones, "Rapid object detection using a boosted cascade", CVPR 2001.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

# Longest side that is searched, px; larger pictures are scaled down first.
_LONGEST = 1024
# Least side of a face: a share of the picture's shorter side, and what the cascade was trained at, px.
_LEAST_SHARE, _LEAST = 1 / 12, 24
_SCALE_STEP, _NEIGHBOURS = 1.1, 5
# FER2013's own faces, pasted on a larger canvas, are found in boxes of 0.98 of their side, hardly off their centre
# (medians of the 47 found of 60): what the cascade finds is already the cut that models of such faces were trained on.
MARGIN = 0.0

# A cascade keeps state while it searches, so that each thread has its own.
_of_thread = threading.local()


@dataclass(frozen=True)
class Box:
    """A face's square in a picture.

    Attributes:
        left: px of the upright picture, from its left side.
        top: px.
        width: px.
        height: px.
        score: The cascade's own, above 0; higher is surer, and it is no probability.
    """

    left: int
    top: int
    width: int
    height: int
    score: float


def find_faces(picture: NDArray[np.uint8], *, limit: int = 20) -> list[Box]:
    """Find upright, frontal faces.

    A face that fills its picture, as those of FER2013 do, is often not found: the cascade wants forehead, chin and
    something around them. So is a face that looks aside, is turned, half hidden or smaller than a twelfth of the
    picture's shorter side.

    Args:
        picture: (H, W, 3) RGB or (H, W) or (H, W, 1) gray, uint8.
        limit: At most this many.

    Returns:
        Boxes within the picture, the largest first.
    """
    gray = (
        cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) if picture.shape[2:] == (3,) else picture.reshape(picture.shape[:2])
    )
    height, width = picture.shape[:2]
    scale = min(1.0, _LONGEST / max(height, width))
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
    least = max(_LEAST, round(min(gray.shape) * _LEAST_SHARE))
    if min(gray.shape) < least:
        return []
    found, _, scores = _cascade().detectMultiScale3(
        cv2.equalizeHist(gray),
        scaleFactor=_SCALE_STEP,
        minNeighbors=_NEIGHBOURS,
        minSize=(least, least),
        outputRejectLevels=True,
    )
    boxes = []
    for (left, top, across, down), score in zip(np.array(found).reshape(-1, 4), np.ravel(scores), strict=True):
        first, second = round(left / scale), round(top / scale)
        across, down = min(round(across / scale), width - first), min(round(down / scale), height - second)
        boxes.append(Box(first, second, across, down, float(score)))
    # Equal sizes in an order that does not hang on the cascade's.
    return sorted(boxes, key=lambda box: (-box.width * box.height, box.top, box.left))[:limit]


def crop(picture: NDArray[np.uint8], box: Box, margin: float = MARGIN) -> NDArray[np.uint8]:
    """Cut a square around a face; where it goes beyond the picture, the picture is mirrored at its border.

    Args:
        picture: (H, W, C) or (H, W) uint8.
        box: The face; at least partly in the picture.
        margin: On each side, as a share of the box's longer side.

    Returns:
        (S, S, C) or (S, S) uint8.
    """
    side = max(1, round(max(box.width, box.height) * (1 + 2 * margin)))
    left = round(box.left + box.width / 2 - side / 2)
    top = round(box.top + box.height / 2 - side / 2)
    rows, columns = (
        _mirrored(np.arange(start, start + side), length)
        for start, length in zip((top, left), picture.shape[:2], strict=True)
    )
    return picture[np.ix_(rows, columns)]


def _mirrored(index: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Indices beyond 0 to `length - 1` folded back, as often as need be: c b a | a b c | c b a."""
    folded = index % (2 * length)
    return np.where(folded < length, folded, 2 * length - 1 - folded)


def _cascade() -> Any:
    if not hasattr(_of_thread, "cascade"):
        path = Path(cv2.__file__).with_name("data") / "haarcascade_frontalface_default.xml"
        _of_thread.cascade = cv2.CascadeClassifier(str(path))
    return _of_thread.cascade
