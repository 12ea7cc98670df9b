"""Which images from elsewhere are copies of a competition's own, so that nothing is trained on what is scored.

A copy is found through JPEG, resizing, brightness and contrast, mirroring, small shifts and crops of a few per cent.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from foldwise.data.competition import Dataset, competition_folder
from foldwise.data.stacked import Images
from foldwise.files import atomic_write, sha256_json

THRESHOLD = 0.85
"""Similarity from which on two images are copies of one picture; docs/EXTERNAL.md shows what lies on both sides."""

VERSION = 2
"""Of the measure: runs that were cleaned by another one are no longer vouched for."""

# Every image is compared as a gray one of this side, px, whatever its own size.
_SIDE = 48
# Two thirds to an eighth of a face: below lies what JPEG does, above what light does, and faces share both.
_FINE_SIGMA, _COARSE_SIGMA = 0.8, 5.0
# All pairs are compared by a grid of so many cells a side, at these zooms and shifts (px), mirrored or not.
_CELLS, _GRID_ZOOMS, _SHIFTS = 12, (0.88, 1.0, 1.14), (-3, 0, 3)
# The likeliest partners are then compared px by px: the middle, at these zooms, wherever it lies in the image.
_PARTNERS, _CORE, _ZOOMS = 5, 36, (0.84, 0.92, 1.0, 1.09, 1.19)
# A pair that is less similar on the grid is no copy, and is compared no further: no copy was ever below 0.66.
_WORTH_A_LOOK = 0.64

Floats = npt.NDArray[np.float32]


def of_todays_measure(guard: Mapping[str, Any]) -> bool:
    """Whether a run's `leak_guard` was made by the present measure and threshold."""
    return bool((guard["version"], guard["threshold"]) == (VERSION, THRESHOLD))


@dataclass(frozen=True, eq=False)
class Likeness:
    """How much the images of one data set resemble those of another.

    Attributes:
        ids: (N,) str, of the images from elsewhere.
        nearest: (N,) str, the id of the competition's image that each resembles most.
        similarity: (N,) float32 in [-1, 1], of the best alignment of the two; by the grid alone below its floor.
        threshold: Similarity from which on an image is a copy.
    """

    ids: npt.NDArray[np.str_]
    nearest: npt.NDArray[np.str_]
    similarity: Floats
    threshold: float = THRESHOLD

    @cached_property
    def copies(self) -> npt.NDArray[np.bool_]:
        """(N,) bool: what must not be trained on."""
        return self.similarity >= np.float32(self.threshold)

    def counts(self) -> dict[str, int]:
        """Copies by similarity, from the threshold up, in steps that grow finer."""
        ends = [self.threshold, 0.9, 0.95, 0.98, np.inf]
        found, _ = np.histogram(self.similarity[self.copies], np.array(ends, dtype=np.float32))
        names = [f"{low:.2f} to {high:.2f}" for low, high in pairwise(ends[:-1])]
        return dict(zip([*names, f"{ends[-2]:.2f} and more"], found.tolist(), strict=True))


class _Cut(NamedTuple):
    """A picture's band, and its middle at every zoom, mirrored and not, less those that are constant."""

    banded: Floats
    cores: list[Floats]


def likeness(
    images: Dataset, competition: Dataset, root: Path, *, say: Callable[[str], None] = lambda _text: None
) -> Likeness:
    """Compare a data set with a competition; kept below the data set's cache for as long as neither changes.

    Near-duplicates in the data set are one picture, as its folds have them: all are as similar as the most similar one.

    Args:
        images: The data set from elsewhere.
        competition: The competition, training and test images alike.
        root: The project's root.
        say: Takes a line before images are compared, which can take a while.
    """
    key = sha256_json([VERSION, images.sha256, images.folds.sha256, competition.sha256])[:16]
    path = competition_folder(root, images.competition.name) / "cache" / f"likeness-{key}.csv"
    if (kept := _read(path, images)) is not None:
        return kept
    say(
        f"leak guard: compares {len(images.ids)} images of {images.competition.name} with {len(competition.ids)} of "
        f"{competition.competition.name}, once"
    )
    rows, similarity = nearest_copies(images.images, competition.images)
    rows, similarity = _of_groups(images, rows, similarity)
    found = Likeness(images.ids, competition.ids[rows], similarity)
    _write(path, found)
    return found


def _of_groups(
    images: Dataset, rows: npt.NDArray[np.int64], similarity: Floats
) -> tuple[npt.NDArray[np.int64], Floats]:
    """The nearest image and its similarity, those of the most similar image of each group of near-duplicates."""
    group_of = dict(zip(images.folds.ids.tolist(), images.folds.group.tolist(), strict=True))
    _, group = np.unique([group_of.get(image, image) for image in images.ids.tolist()], return_inverse=True)
    first = np.zeros(group.max() + 1, dtype=np.int64)
    order = np.argsort(similarity, kind="stable")
    first[group[order]] = order  # the highest last
    return rows[first[group]], similarity[first[group]]


def nearest_copies(images: Images, others: Images, *, block: int = 2048) -> tuple[npt.NDArray[np.int64], Floats]:
    """Find for each image the one of another set that it is likeliest a copy of.

    The similarity is the normalised correlation (zero mean, unit norm) of the band-passed middle of either image with
    the other, at its highest over mirroring, zooms of 0.84 to 1.19 and all shifts of up to an eighth of a side. In
    the band between fine noise and broad shading two photographs of faces resemble each other least.

    Memory grows with `block` and M, time with N times M: the million images that N may be take M = 3,000 some
    twenty minutes on two cores. A constant image is like nothing: 0.

    Args:
        images: (N, H, W, C) uint8, 0-255, C 1 or 3 (RGB); may be memory-mapped.
        others: (M, H', W', C') uint8, M at least 1; sizes and channels need not be those of `images`.
        block: Images compared at a time.

    Returns:
        (N,) int64 rows of `others`, and (N,) float32 similarities.
    """
    partner = np.zeros(len(images), dtype=np.int64)
    similarity = np.zeros(len(images), dtype=np.float32)
    pictures = _gray(others)
    grids = list(_grids(pictures))
    found_rows, found_partners = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, len(images), block):
        rows = np.arange(start, min(start + block, len(images)))
        values, likeliest = _on_grid(_banded(_gray(images[start : start + block])), grids)
        partner[rows], similarity[rows] = likeliest[:, 0], values[:, 0]
        image, place = np.nonzero(values >= _WORTH_A_LOOK)
        found_rows.append(rows[image])
        found_partners.append(likeliest[image, place])
    row_of, partner_of = np.concatenate(found_rows), np.concatenate(found_partners)
    # All images of one partner together: its cuts are made once, and are gone before the next one's.
    order = np.argsort(partner_of, kind="stable")
    row_of, partner_of = row_of[order], partner_of[order]
    aligned = np.empty(len(row_of), dtype=np.float32)

    def align(pairs: npt.NDArray[np.int64]) -> None:
        other = _cut(pictures[partner_of[pairs[0]]])
        for pair in pairs.tolist():
            mine = _cut(_gray(images[row_of[pair] : row_of[pair] + 1])[0])
            aligned[pair] = max(_aligned(mine, other), _aligned(other, mine))

    of_partner = np.split(np.arange(len(row_of)), np.flatnonzero(np.diff(partner_of)) + 1)
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        list(threads.map(align, (pairs for pairs in of_partner if len(pairs))))
    similarity[row_of] = -1
    for pair in np.argsort(aligned, kind="stable").tolist():  # the highest last
        partner[row_of[pair]], similarity[row_of[pair]] = partner_of[pair], aligned[pair]
    return partner, similarity


def _gray(images: Images) -> Floats:
    """(n, 48, 48) float32; luma of Rec. 601 where there are colours."""
    out = np.empty((len(images), _SIDE, _SIDE), dtype=np.float32)
    for index in range(len(images)):
        image = images[index]
        flat = image[..., 0] if image.shape[-1] == 1 else cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
        if flat.shape != (_SIDE, _SIDE):
            flat = cv2.resize(flat, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
        out[index] = flat
    return out


def _banded(pictures: Floats) -> Floats:
    """What is neither fine noise nor broad shading: a difference of Gaussians."""
    out = np.empty_like(pictures)
    for index, picture in enumerate(pictures):
        fine, broad = (
            cv2.GaussianBlur(picture, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
            for sigma in (_FINE_SIGMA, _COARSE_SIGMA)
        )
        out[index] = fine - broad
    return out


def _grids(pictures: Floats) -> Iterator[Floats]:
    """(M, cells) unit rows of the pictures, one for each zoom and shift, mirrored and not."""
    margin = max(_SHIFTS)
    for zoom in _GRID_ZOOMS:
        banded = _banded(np.stack([_zoomed(picture, zoom) for picture in pictures]))
        for mirrored in (banded, banded[:, :, ::-1]):
            padded = np.pad(mirrored, ((0, 0), (margin, margin), (margin, margin)))
            for down, right in product(_SHIFTS, repeat=2):
                top, left = margin + down, margin + right
                yield _cells(padded[:, top : top + _SIDE, left : left + _SIDE])


def _zoomed(picture: Floats, zoom: float) -> Floats:
    """A picture enlarged (zoom > 1) or made smaller about its middle, in its own size."""
    if zoom == 1:
        return picture
    offset = (1 - zoom) * (_SIDE - 1) / 2
    matrix = np.array([[zoom, 0, offset], [0, zoom, offset]])
    zoomed: Floats = cv2.warpAffine(
        picture, matrix, (_SIDE, _SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    return zoomed


def _cells(banded: Floats) -> Floats:
    side = _SIDE // _CELLS
    means = banded.reshape(len(banded), _CELLS, side, _CELLS, side).mean((2, 4)).reshape(len(banded), -1)
    means -= means.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(means, axis=1, keepdims=True)
    norm[norm < 1e-3] = np.inf  # a constant picture, but for rounding
    unit: Floats = (means / norm).astype(np.float32)
    return unit


def _on_grid(banded: Floats, grids: list[Floats]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """The highest correlations of each image with the others, (n, partners) in falling order, and whose they are."""
    cells = _cells(banded)
    best = cells @ grids[0].T
    for grid in grids[1:]:
        np.maximum(best, cells @ grid.T, out=best)
    count = min(_PARTNERS, best.shape[1])
    rows = np.argpartition(best, best.shape[1] - count, axis=1)[:, -count:]
    values = np.take_along_axis(best, rows, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _cut(picture: Floats) -> _Cut:
    low = (_SIDE - _CORE) // 2
    cores = []
    for zoom in _ZOOMS:
        middle = _banded(_zoomed(picture, zoom)[None])[0, low : low + _CORE, low : low + _CORE]
        if np.ptp(middle) >= 1e-3:
            cores += [np.ascontiguousarray(middle), np.ascontiguousarray(middle[:, ::-1])]
    return _Cut(_banded(picture[None])[0], cores)


def _aligned(picture: _Cut, other: _Cut) -> float:
    """The highest correlation of a picture with the middle of another, over zooms, mirroring and shifts."""
    found = [cv2.matchTemplate(picture.banded, core, cv2.TM_CCOEFF_NORMED).max() for core in other.cores]
    return min(float(max(found, default=-1.0)), 1.0)


def _read(path: Path, images: Dataset) -> Likeness | None:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        ids, nearest, similarity = zip(*rows, strict=True)
        values = np.array(similarity, dtype=np.float32)
    except (OSError, ValueError):
        return None
    if header != ["id", "nearest", "similarity"] or list(ids) != images.ids.tolist():
        return None
    return Likeness(images.ids, np.array(nearest, dtype=np.str_), values)


def _write(path: Path, found: Likeness) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "nearest", "similarity"])
    for image, other, value in zip(found.ids, found.nearest, found.similarity, strict=True):
        writer.writerow([image, other, f"{value:.9g}"])
    atomic_write(path, text.getvalue())
