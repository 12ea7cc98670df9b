"""Pairs of images that are the same picture, and the groups that such pairs chain into.

A group never straddles folds, so that no image is scored by a model which was trained on its twin.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Larger images are averaged down to this many px a side first: twins stay twins, and the cost stays bounded.
COMPARED_SIDE = 64
# float32 sums depend on the BLAS; candidates this close to the threshold are decided in float64.
SLACK = 1e-3


class Pair(NamedTuple):
    """Two rows of an image array with `a < b`, and their normalised correlation."""

    a: int
    b: int
    similarity: float


def near_duplicates(images: npt.NDArray[np.uint8], *, threshold: float = 0.98, block: int = 2048) -> list[Pair]:
    """Find every pair of images whose normalised correlation reaches `threshold`.

    The correlation is the inner product of the pixels brought to zero mean and unit norm, so brightness and
    contrast do not matter. A constant image has no such form: it matches equal constants only, at 1.0.

    Args:
        images: (N, H, W, C) uint8, 0-255; may be memory-mapped.
        threshold: Least correlation of a pair, in (0, 1].
        block: Images compared at a time; memory grows with it, not with N.

    Returns:
        The pairs in order of (a, b).
    """
    pairs = _equal_constants(images, block)
    for start in range(0, len(images), block):
        rows = _unit_rows(images[start : start + block])
        for other in range(start, len(images), block):
            columns = rows if other == start else _unit_rows(images[other : other + block])
            close = rows @ columns.T >= threshold - SLACK
            if other == start:
                close = np.triu(close, 1)
            for row, column in np.argwhere(close).tolist():
                similarity = _similarity(images, start + row, other + column)
                if similarity >= threshold:
                    pairs.append(Pair(start + row, other + column, similarity))
    return sorted(pairs)


def nearest(
    images: npt.NDArray[np.uint8], others: npt.NDArray[np.uint8], *, block: int = 2048
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Find for each image the most similar one of another set, by the correlation of `near_duplicates`.

    Args:
        images: (N, H, W, C) uint8, 0-255; may be memory-mapped.
        others: (M, H, W, C) uint8, M at least 1.
        block: Images compared at a time; memory grows with it.

    Returns:
        (N,) int64 rows of `others`, and (N,) float32 correlations. A constant image is taken to be like nothing: 0.
    """
    row_of = np.zeros(len(images), dtype=np.int64)
    similarity = np.full(len(images), -np.inf, dtype=np.float32)
    for start in range(0, len(images), block):
        rows = _unit_rows(images[start : start + block])
        place = slice(start, start + len(rows))
        for other in range(0, len(others), block):
            close = rows @ _unit_rows(others[other : other + block]).T
            best = close.argmax(axis=1)
            value = close[np.arange(len(rows)), best]
            better = value > similarity[place]
            row_of[place][better] = best[better] + other
            similarity[place][better] = value[better]
    return row_of, np.minimum(similarity, 1)


def groups(count: int, pairs: Iterable[Pair]) -> npt.NDArray[np.int64]:
    """Chain pairs into groups: the connected components of the graph whose edges they are.

    Args:
        count: Number of images.
        pairs: Pairs of indices below `count`.

    Returns:
        (count,) int64: each image's group, named by the group's smallest index.
    """
    parent = list(range(count))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for pair in pairs:
        first, second = sorted((root(pair.a), root(pair.b)))
        parent[second] = first
    return np.array([root(index) for index in range(count)], dtype=np.int64)


def _flat(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(n, pixels) float32, averaged down where a side is longer than COMPARED_SIDE."""
    n, height, width, channels = images.shape
    factor = -(-max(height, width) // COMPARED_SIDE)
    if factor == 1 or min(height, width) < factor:
        return images.reshape(n, -1).astype(np.float32)
    rows, columns = height // factor, width // factor
    cut = images[:, : rows * factor, : columns * factor]
    boxes = cut.reshape(n, rows, factor, columns, factor, channels)
    averaged: npt.NDArray[np.float32] = boxes.mean(axis=(2, 4), dtype=np.float32)
    return averaged.reshape(n, -1)


def _unit_rows(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Zero-mean rows of norm 1; zeros for a constant image, so that it correlates with nothing."""
    flat = _flat(images)
    flat -= flat.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    constant = np.ptp(images.reshape(len(images), -1), axis=1) == 0
    norm[constant] = np.inf
    flat /= np.maximum(norm, 1e-12)
    return flat


def _similarity(images: npt.NDArray[np.uint8], a: int, b: int) -> float:
    pair = np.stack([_flat(images[index : index + 1])[0] for index in (a, b)]).astype(np.float64)
    pair -= pair.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(pair, axis=1)
    return float(min(1.0, pair[0] @ pair[1] / max(norms[0] * norms[1], 1e-300)))


def _equal_constants(images: npt.NDArray[np.uint8], block: int) -> list[Pair]:
    by_value: dict[int, list[int]] = {}
    for start in range(0, len(images), block):
        flat = images[start : start + block].reshape(len(images[start : start + block]), -1)
        for row in np.flatnonzero(np.ptp(flat, axis=1) == 0).tolist():
            by_value.setdefault(int(flat[row, 0]), []).append(start + row)
    return [
        Pair(first, second, 1.0)
        for members in by_value.values()
        for index, first in enumerate(members)
        for second in members[index + 1 :]
    ]
