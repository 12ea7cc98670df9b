"""Pictures of heads for tests: drawn, and nobody's.

The cascade for faces finds them, as it wants eyes darker than cheeks and a light bridge of the nose.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def draw_head(size: int = 200) -> NDArray[np.uint8]:
    """(size, size, 3) RGB: a head, shaded as the cascade for faces wants it; nobody's."""
    scale = size / 200
    image = np.full((200, 200), 120, np.uint8)
    cv2.ellipse(image, (100, 105), (68, 88), 0, 0, 360, 205, -1)
    for x in (70, 130):
        cv2.ellipse(image, (x, 85), (24, 13), 0, 0, 360, 110, -1)
        cv2.ellipse(image, (x, 88), (13, 7), 0, 0, 360, 40, -1)
        cv2.line(image, (x - 20, 68), (x + 20, 68), 60, 7)
    cv2.rectangle(image, (90, 80), (110, 125), 225, -1)
    cv2.ellipse(image, (100, 130), (16, 6), 0, 0, 360, 130, -1)
    cv2.ellipse(image, (100, 157), (30, 9), 0, 0, 360, 90, -1)
    image = cv2.GaussianBlur(image, (0, 0), 4)
    resized = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return np.repeat(resized[:, :, None], 3, axis=2)
