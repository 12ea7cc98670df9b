"""Fixtures that several test modules share.

The demo competition is drawn once a session; tests that write below a root copy it first.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from foldwise.data.demo import draw_demo
from foldwise.data.ingest import ingest

# How long an example takes tells of what else the machine does.
settings.register_profile("foldwise", deadline=None)
settings.load_profile("foldwise")


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project root whose only competition, `demo`, has 140 labelled and 30 test images of 48 px."""
    root = tmp_path_factory.mktemp("demo_root")
    draw_demo(root / "handout", train=140, test=30)
    ingest(root / "handout", root, "demo")
    return root
