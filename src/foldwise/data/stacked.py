"""Several arrays of images as one, in the size and the channels of the first, without a copy of any.

Rows are brought to that form when they are asked for, so that memory grows with what is asked for alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


class Images(Protocol):
    """(N, H, W, C) uint8, 0-255: an array, or what can be indexed by rows like one."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, rows: Any, /) -> Pixels:
        """The images of some rows: an array of row numbers, a mask, a slice or one number."""


class Selected:
    """Some rows of an array of images, read when they are asked for."""

    def __init__(self, images: Images, rows: npt.NDArray[np.int64]) -> None:
        """Choose the rows.

        Args:
            images: (N, H, W, C) uint8.
            rows: (n,) row numbers.
        """
        self._images = images
        self._rows = rows
        self.shape: tuple[int, int, int, int] = (len(rows), *images.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Pixels:
        """See `Images`."""
        return self._images[self._rows[rows]]


class Stacked:
    """Arrays of images one after the other."""

    def __init__(self, parts: Sequence[Images]) -> None:
        """Stack the parts.

        Args:
            parts: (N_i, H_i, W_i, C_i) uint8 each, C_i 1 or 3 (RGB); the first sets size and channels for all.
        """
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape: tuple[int, int, int, int] = (int(self._ends[-1]), *parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Pixels:
        """See `Images`."""
        if isinstance(rows, (int, np.integer)):
            wanted_row = range(len(self))[rows]
            index = int(np.searchsorted(self._ends, wanted_row, side="right"))
            part = self._parts[index]
            row = wanted_row - (self._ends[index] - len(part))
            one: Pixels = fitted(part[row : row + 1], self.shape[1:])[0]
            return one
        wanted = np.arange(len(self))[rows]
        out = np.empty((len(wanted), *self.shape[1:]), dtype=np.uint8)
        for part, end in zip(self._parts, self._ends, strict=True):
            first = end - len(part)
            here = (wanted >= first) & (wanted < end)
            if here.any():
                out[here] = fitted(part[wanted[here] - first], self.shape[1:])
        return out


def fitted(images: Pixels, shape: tuple[int, ...]) -> Pixels:
    """Images in another size and number of channels.

    Args:
        images: (n, h, w, c) uint8, c 1 or 3 (RGB).
        shape: (H, W, C) wanted, C 1 or 3.

    Returns:
        (n, H, W, C) uint8: averaged where it shrinks, bicubic where it grows, luma of Rec. 601 where colours go.
    """
    if images.shape[1:] == shape:
        return images
    height, width, channels = shape
    out = np.empty((len(images), *shape), dtype=np.uint8)
    for index, image in enumerate(images):
        changed: np.ndarray = image
        if image.shape[-1] != channels:
            code = cv2.COLOR_RGB2GRAY if channels == 1 else cv2.COLOR_GRAY2RGB
            changed = cv2.cvtColor(np.ascontiguousarray(image), code)
        if changed.shape[:2] != (height, width):
            shrinks = height <= changed.shape[0] and width <= changed.shape[1]
            how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
            changed = cv2.resize(changed, (width, height), interpolation=how)
        out[index] = changed.reshape(shape)
    return out
