"""Every random choice as a pure function of what it is for: no generator carries state from one choice to the next.

A key is a purpose and a few integers (seed, fold, epoch, step or draw position); equal keys give equal draws.
"""

from __future__ import annotations

import random
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a draw is for. The numbers are part of every result: never reuse or change one."""

    INIT = 1
    ORDER = 2
    AUGMENT = 3
    MIX = 4
    STEP = 5
    INNER = 6
    SMOKE = 7


def generator(purpose: Purpose, *key: int) -> np.random.Generator:
    """A numpy generator for one purpose and key."""
    return np.random.default_rng([int(purpose), *key])


def python_random(purpose: Purpose, *key: int) -> random.Random:
    """A `random.Random` for one purpose and key."""
    return random.Random(torch_seed(purpose, *key))


def torch_seed(purpose: Purpose, *key: int) -> int:
    """A non-negative 63-bit seed for `torch.manual_seed`."""
    return int(np.random.SeedSequence([int(purpose), *key]).generate_state(1, np.uint64)[0] >> 1)
