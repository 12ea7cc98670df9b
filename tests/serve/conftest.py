"""A project with two trained runs and a blend of them, to ask about pictures.

The networks are ViTs of one narrow layer on four patches, so that a fold takes a fraction of a second.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from foldwise.cli import main
from foldwise.runs.experiment import Options, run_experiment
from foldwise.spec.model import ExperimentSpec

TINY: dict[str, Any] = {
    "competition": "demo",
    "model": {
        "arch": "vit_tiny_patch16_224",
        "image_size": 32,
        "options": {"embed_dim": 24, "depth": 1, "num_heads": 3},
    },
    "optim": {"lr": 3e-3},
    "train": {"epochs": 1, "batch_size": 16, "precision": "fp32", "threads": 1},
    "tta": ("identity", "hflip"),
}


class _Silent:
    def on(self, event: object) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture(scope="session")
def asked_root(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's root with the runs `tiny` and `twice` (two seeds) and a blend of both; read-only."""
    root = Path(shutil.copytree(demo_root, tmp_path_factory.mktemp("asked") / "project"))
    for changes in ({"name": "tiny"}, {"name": "twice", "seeds": (1, 2), "optim": {"lr": 1e-2}}):
        spec = ExperimentSpec.model_validate(TINY | changes)
        run_experiment(root, spec, Options(device="cpu"), screen=_Silent(), follow=lambda _path: ())
    assert main(["--root", str(root), "submit", "--comp", "demo", "--method", "mean"]) == 0
    return root


@pytest.fixture
def project(asked_root: Path, tmp_path: Path) -> Path:
    """A copy of it, to write in."""
    return Path(shutil.copytree(asked_root, tmp_path / "project"))
