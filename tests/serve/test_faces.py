"""Faces are found where they are, at any size of picture; the heads here are drawn, and nobody's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from drawn_heads import draw_head
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from foldwise.serve.faces import Box, crop, find_faces


def scene(*heads: tuple[int, int, int], height: int = 500, width: int = 700) -> NDArray[np.uint8]:
    """A gray picture with heads at (left, top, size)."""
    picture = np.full((height, width, 3), 160, np.uint8)
    for left, top, size in heads:
        picture[top : top + size, left : left + size] = draw_head(size)
    return picture


def overlap(box: Box, left: int, top: int, size: int) -> float:
    """Intersection over union with a square."""
    across = min(box.left + box.width, left + size) - max(box.left, left)
    down = min(box.top + box.height, top + size) - max(box.top, top)
    shared = max(0, across) * max(0, down)
    return shared / (box.width * box.height + size * size - shared)


def test_faces_are_found_the_largest_first() -> None:
    heads = [(60, 50, 200), (450, 300, 120)]
    for picture in (scene(*heads), scene(*heads)[:, :, 0], scene(*heads)[:, :, :1]):
        boxes = find_faces(picture)
        assert len(boxes) == 2
        assert all(overlap(box, *head) > 0.6 for box, head in zip(boxes, heads, strict=True))
        assert all(box.score > 0 for box in boxes)
    assert find_faces(scene(*heads), limit=1) == boxes[:1]


def test_boxes_are_in_pixels_of_the_picture_that_was_given() -> None:
    large = scene((200, 300, 900), height=1500, width=2600)  # searched at 1024
    (box,) = find_faces(large)
    assert overlap(box, 200, 300, 900) > 0.6


@pytest.mark.parametrize("shape", [(1, 1, 3), (10, 400, 3), (300, 300, 3)])
def test_nothing_is_found_where_there_is_none(shape: tuple[int, ...]) -> None:
    assert find_faces(np.full(shape, 99, np.uint8)) == []


def test_several_threads_find_what_one_does() -> None:
    pictures = [scene((60 + 40 * number, 50, 160)) for number in range(6)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(find_faces, pictures)) == [find_faces(picture) for picture in pictures]


def test_a_crop_within_the_picture_is_a_slice() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    np.testing.assert_array_equal(crop(picture, Box(10, 20, 15, 15, 1.0)), picture[20:35, 10:25])
    np.testing.assert_array_equal(crop(picture, Box(20, 20, 10, 10, 1.0), margin=0.5), picture[15:35, 15:35])
    # The square of a box that is none has its longer side and its middle.
    np.testing.assert_array_equal(crop(picture, Box(10, 20, 10, 20, 1.0)), picture[20:40, 5:25])


@given(
    left=st.integers(-30, 50),
    top=st.integers(-30, 30),
    side=st.integers(1, 60),
    margin=st.floats(0, 1),
    gray=st.booleans(),
)
def test_beyond_the_border_the_picture_is_mirrored(left: int, top: int, side: int, margin: float, gray: bool) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    picture = picture[:, :, 0] if gray else picture
    got = crop(picture, Box(left, top, side, side, 1.0), margin)
    wanted = max(1, round(side * (1 + 2 * margin)))
    assert got.shape == (wanted, wanted, *picture.shape[2:])
    far = 200
    around = np.pad(picture, [(far, far), (far, far), *([(0, 0)] if not gray else [])], mode="symmetric")
    first, second = round(top + side / 2 - wanted / 2) + far, round(left + side / 2 - wanted / 2) + far
    np.testing.assert_array_equal(got, around[first : first + wanted, second : second + wanted])
