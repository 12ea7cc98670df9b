"""Draws are pure functions of purpose and key, and no two keys share a stream."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from foldwise.learn.keys import Purpose, generator, python_random, torch_seed

purposes = st.sampled_from(Purpose)
numbers = st.integers(0, 2**32 - 1)
keys = st.tuples(purposes, numbers, numbers, numbers)


@given(keys)
def test_equal_keys_give_equal_draws(key: tuple[Purpose, int, int, int]) -> None:
    generator(*key).random(3)
    python_random(*key).random()
    assert generator(*key).integers(2**32, size=8).tolist() == generator(*key).integers(2**32, size=8).tolist()
    assert python_random(*key).getstate() == python_random(*key).getstate()
    assert torch_seed(*key) == torch_seed(*key)


@given(st.lists(keys, min_size=2, max_size=20, unique=True))
def test_distinct_keys_give_distinct_streams(several: list[tuple[Purpose, int, int, int]]) -> None:
    assert len({tuple(generator(*key).integers(2**32, size=4)) for key in several}) == len(several)
    assert len({python_random(*key).random() for key in several}) == len(several)
    assert len({torch_seed(*key) for key in several}) == len(several)


def test_neighbouring_keys_are_unrelated() -> None:
    draws = np.array([generator(Purpose.AUGMENT, 42, 0, 3, position).random() for position in range(4_000)])
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05
    assert abs(draws.mean() - 0.5) < 0.02


@given(keys)
def test_a_torch_seed_fits_manual_seed(key: tuple[Purpose, int, int, int]) -> None:
    seed = torch_seed(*key)
    assert 0 <= seed < 2**63
    try:
        torch.manual_seed(seed)
        assert torch.initial_seed() == seed
    finally:
        torch.manual_seed(0)


def test_no_global_generator_is_touched() -> None:
    np.random.seed(1)  # noqa: NPY002 - the very generator that must stay as it is
    torch.manual_seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    generator(Purpose.MIX, 1).random()
    python_random(Purpose.MIX, 1).random()
    torch_seed(Purpose.MIX, 1)
    assert np.array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[1], torch.get_rng_state())


def test_what_kept_runs_were_drawn_with_stays() -> None:
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "INIT": 1, "ORDER": 2, "AUGMENT": 3, "MIX": 4, "STEP": 5, "INNER": 6, "SMOKE": 7,
    }  # fmt: skip
    assert torch_seed(Purpose.INIT, 42, 0) == 5_648_736_374_453_952_957
    assert generator(Purpose.ORDER, 42, 0, 0).permutation(8).tolist() == [7, 5, 2, 6, 1, 4, 0, 3]
