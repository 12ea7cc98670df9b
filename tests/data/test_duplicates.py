"""Near-duplicates are found whatever the brightness, in blocks of any size, and chain into groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldwise.data.duplicates import Pair, groups, near_duplicates, nearest


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(40, 180, shape).astype(np.uint8)


@given(st.integers(0, 10_000), st.integers(1, 9))
@settings(max_examples=30)
def test_agrees_with_the_correlation_matrix_in_blocks_of_any_size(seed: int, block: int) -> None:
    images = noise(seed, 14, 4, 3, 1)
    images[9] = images[2] + 30
    images[13] = images[5]
    matrix = np.corrcoef(images.reshape(14, -1).astype(np.float64))
    expected = {(a, b) for a, b in np.argwhere(matrix >= 0.5).tolist() if a < b}
    found = near_duplicates(images, threshold=0.5, block=block)
    assert {(pair.a, pair.b) for pair in found} == expected
    assert {(2, 9), (5, 13)} <= expected
    assert found == sorted(found)
    for pair in found:
        assert pair.similarity == pytest.approx(matrix[pair.a, pair.b], abs=1e-9)


def test_constant_images_match_equal_constants_only() -> None:
    images = noise(1, 6, 8, 8, 1)
    images[1], images[3], images[4] = 7, 7, 8
    assert near_duplicates(images) == [Pair(1, 3, 1.0)]


def test_large_images_are_compared_at_a_smaller_size() -> None:
    small = noise(2, 3, 40, 50, 3)
    images = small.repeat(4, axis=1).repeat(4, axis=2)
    images[2] = images[0]
    assert [(pair.a, pair.b) for pair in near_duplicates(images)] == [(0, 2)]


def test_no_images_have_no_pairs() -> None:
    assert near_duplicates(np.zeros((0, 4, 4, 1), np.uint8)) == []


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)).filter(lambda pair: pair[0] != pair[1]), max_size=30))
def test_groups_are_connected_components_named_by_their_smallest_index(edges: list[tuple[int, int]]) -> None:
    group = groups(20, [Pair(min(edge), max(edge), 1.0) for edge in edges])
    reach = np.eye(20, dtype=bool)
    for a, b in edges:
        reach[a, b] = reach[b, a] = True
    for _ in range(5):
        reach = reach @ reach
    assert group.tolist() == [int(np.flatnonzero(reach[index])[0]) for index in range(20)]


@pytest.mark.parametrize("block", [3, 2048])
def test_nearest_is_numpys_correlation(block: int) -> None:
    rng = np.random.default_rng(4)
    images, others = (rng.integers(0, 256, (count, 6, 5, 1)).astype(np.uint8) for count in (7, 11))
    images[2] = others[8] // 2 + 20  # the same picture, darker
    rows, similarity = nearest(images, others, block=block)
    expected = np.corrcoef(images.reshape(7, -1), others.reshape(11, -1))[:7, 7:]
    np.testing.assert_array_equal(rows, expected.argmax(axis=1))
    np.testing.assert_allclose(similarity, expected.max(axis=1), atol=1e-5)
    assert rows[2] == 8
    assert similarity[2] > 0.99
