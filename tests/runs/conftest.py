"""A project to run tiny experiments in, and one that was run before.

The network is a ViT of one narrow layer on four patches: a fold takes a fraction of a second on one CPU thread.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from foldwise.data.ingest import ingest
from foldwise.runs.events import Event, Message
from foldwise.runs.experiment import Options, run_experiment
from foldwise.spec.model import ExperimentSpec

TINY = {
    "competition": "demo",
    "model": {
        "arch": "vit_tiny_patch16_224",
        "image_size": 32,
        "options": {"embed_dim": 24, "depth": 1, "num_heads": 3},
    },
    "augment": ({"HorizontalFlip": {"p": 0.5}},),
    "optim": {"lr": 3e-3},
    "train": {"epochs": 2, "batch_size": 16, "precision": "fp32", "threads": 1},
}


@dataclass
class Recorder:
    """A listener that remembers."""

    events: list[Event] = field(default_factory=list)
    closed: int = 0

    def on(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1

    @property
    def said(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Message)]


@dataclass
class Project:
    """A project's root with the demo competition of 140 labelled and 30 test images in five folds."""

    root: Path

    def spec(self, name: str = "tiny", **changes: Any) -> ExperimentSpec:
        """A tiny experiment; a dict changes some keys of its section, anything else replaces it."""
        sections: dict[str, Any] = {**TINY, "name": name}
        for key, change in changes.items():
            before = sections.get(key)
            sections[key] = {**(before or {}), **change} if isinstance(change, dict) else change
        return ExperimentSpec.model_validate(sections)

    def run(
        self, spec: ExperimentSpec, follow: Callable[[Path], Any] = lambda _path: (), **options: Any
    ) -> tuple[dict[str, Any] | None, Recorder]:
        recorder = Recorder()
        return run_experiment(self.root, spec, Options(**options), screen=recorder, follow=follow), recorder

    def path(self, name: str = "tiny") -> Path:
        return self.root / "oof" / name

    def table(self, *parts: str) -> pd.DataFrame:
        """A CSV file under `oof/`, as any reader of it would load it."""
        return pd.read_csv(self.root.joinpath("oof", *parts), dtype={"id": str})

    def describe(self, *lines: str) -> None:
        """Take the competition in anew, with these lines instead of `split` and `metric` in its competition.yaml."""
        folder = self.root / "inputs" / "demo"
        path = folder / "competition.yaml"
        kept = [line for line in path.read_text().splitlines() if not line.startswith(("split:", "metric:"))]
        path.write_text("\n".join([*kept, *lines, ""]))
        (folder / "folds.csv").unlink()
        ingest(self.root / "handout", self.root, "demo")

    def snapshot(self, name: str = "tiny") -> dict[str, tuple[bytes, int]]:
        """Content and time of every file of a run, but for the lock."""
        files = [path for path in self.path(name).rglob("*") if path.is_file() and path.name != ".lock"]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def project(demo_root: Path, tmp_path: Path) -> Project:
    """A project without runs, to write in."""
    return Project(shutil.copytree(demo_root, tmp_path / "project"))


@pytest.fixture(scope="session")
def kept(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the complete run `tiny`; read-only."""
    made = Project(shutil.copytree(demo_root, tmp_path_factory.mktemp("kept") / "project"))
    made.run(made.spec())
    return made


@pytest.fixture
def resumable(kept: Project, tmp_path: Path) -> Project:
    """A copy of the project with the complete run `tiny`, to write in."""
    return Project(shutil.copytree(kept.root, tmp_path / "project"))
