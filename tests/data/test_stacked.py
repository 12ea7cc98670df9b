"""Stacked and selected images are indexed like the one array that they stand for, and read what is asked for alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldwise.data.stacked import Selected, Stacked, fitted

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 6, 5, 1), dtype=np.uint8)


@st.composite
def asked(draw, count):
    """Something that an array of `count` rows is indexed with."""
    numbers = st.integers(-count, count - 1)
    row_lists = st.lists(numbers, max_size=12) if count else st.just([])
    kinds = [
        st.slices(count),
        row_lists.map(lambda rows: np.array(rows, dtype=np.int64)),
        st.lists(st.booleans(), min_size=count, max_size=count).map(lambda mask: np.array(mask, dtype=bool)),
    ]
    if count:
        kinds += [numbers, numbers.map(np.int64)]
    return draw(st.one_of(kinds))


@settings(max_examples=300)
@given(data=st.data(), sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_parts_are_one_array(data, sizes):
    cuts = np.cumsum([0, *sizes])
    parts = [PIXELS[low:high] for low, high in pairwise(cuts)]
    whole, stacked = np.concatenate(parts), Stacked(parts)
    assert stacked.shape == whole.shape
    assert len(stacked) == len(whole)
    rows = data.draw(asked(len(whole)))
    np.testing.assert_array_equal(stacked[rows], whole[rows], strict=True)


@settings(max_examples=300)
@given(data=st.data(), chosen=st.lists(st.integers(0, 29), max_size=12))
def test_selected_rows_are_an_array(data, chosen):
    rows = np.array(chosen, dtype=np.int64)
    whole, selected = PIXELS[rows], Selected(PIXELS, rows)
    assert selected.shape == whole.shape
    assert len(selected) == len(whole)
    wanted = data.draw(asked(len(whole)))
    np.testing.assert_array_equal(selected[wanted], whole[wanted], strict=True)


def test_one_within_the_other():
    inner = Stacked([Selected(PIXELS, np.array([4, 2])), PIXELS[10:13]])
    whole = PIXELS[[4, 2, 10, 11, 12]]
    np.testing.assert_array_equal(Selected(inner, np.array([4, 0, 1]))[:], whole[[4, 0, 1]])
    np.testing.assert_array_equal(Stacked([inner, inner])[[-1, 5]], whole[[4, 0]])


@pytest.mark.parametrize("row", [5, -6])
def test_rows_beyond_the_end_are_refused(row):
    for images in (Stacked([PIXELS[:2], PIXELS[2:5]]), Selected(PIXELS, np.arange(5))):
        with pytest.raises(IndexError):
            images[row]
        with pytest.raises(IndexError):
            images[np.array([row])]


def test_only_what_is_asked_for_is_read():
    class Watched:
        shape = (20, 6, 5, 1)
        read = 0

        def __len__(self):
            return 20

        def __getitem__(self, rows):
            found = PIXELS[:20][rows]
            self.read += len(found)
            return found

    parts = [Watched(), Watched()]
    stacked = Stacked(parts)
    stacked[np.array([3, 1])]
    stacked[4]
    assert [part.read for part in parts] == [3, 0]


@pytest.mark.parametrize("shape", [(48, 48, 1), (48, 48, 3), (20, 60, 1), (96, 96, 3)])
def test_size_and_channels_are_those_of_the_first(shape):
    first = np.full((2, *shape), 9, np.uint8)
    frozen = np.full((3, 64, 40, 4 - shape[-1]), 200, np.uint8)
    frozen.flags.writeable = False
    stacked = Stacked([first, frozen])
    assert stacked.shape == (5, *shape)
    np.testing.assert_array_equal(
        stacked[:], np.repeat(np.array([9, 9, 200, 200, 200], np.uint8), np.prod(shape)).reshape(5, *shape)
    )
    assert stacked[4].shape == shape


def test_shrinking_averages_and_colours_become_luma():
    blocks = np.arange(0, 160, 10, dtype=np.uint8).reshape(1, 4, 4, 1)
    means = blocks[0, :, :, 0].reshape(2, 2, 2, 2).mean(axis=(1, 3))
    np.testing.assert_array_equal(fitted(blocks, (2, 2, 1))[0, :, :, 0], means)
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8).reshape(3, 1, 1, 3)
    assert fitted(colours, (1, 1, 1)).ravel().tolist() == [76, 150, 29]
    gray = np.array([7, 130], np.uint8).reshape(2, 1, 1, 1)
    assert fitted(gray, (1, 1, 3)).reshape(2, 3).tolist() == [[7, 7, 7], [130, 130, 130]]


def test_images_that_fit_are_not_copied():
    assert fitted(PIXELS, (6, 5, 1)) is PIXELS
