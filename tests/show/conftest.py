"""What tests of pictures share: a project to draw from, and the figures that were drawn."""

from __future__ import annotations

import shutil

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def root(demo_root, tmp_path):
    """A copy of the demo's root; its images are linked, not copied."""
    for name in ("competition.yaml", "folds.csv", "train.csv"):
        target = tmp_path / "inputs" / "demo" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(demo_root / "inputs" / "demo" / name, target)
    for name in ("images", "cache"):
        (tmp_path / "inputs" / "demo" / name).symlink_to(demo_root / "inputs" / "demo" / name)
    return tmp_path


@pytest.fixture
def figures(monkeypatch):
    """The figures that were written, in order."""
    kept = []
    savefig = Figure.savefig

    def keep(self, *args, **kwargs):
        kept.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept
