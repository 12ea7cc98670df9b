"""Fixtures of the learn room's tests: one thread, the CPU, small random images.

Tests that change the number of threads leave it as it was.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from foldwise.learn.device import Runtime


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One CPU thread an operation, as it was afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cpu() -> Runtime:
    """The CPU in float32."""
    return Runtime(torch.device("cpu"), "fp32", 1)


@pytest.fixture
def pixels() -> np.ndarray:
    """(26, 16, 16, 1) uint8 noise."""
    return np.random.default_rng(0).integers(0, 256, (26, 16, 16, 1), dtype=np.uint8)
