"""A project to run tiny experiments in, and one that was run before.

The network is a ViT of one narrow layer on four patches: a fold takes a fraction of a second on one CPU thread.
"""

from __future__ import annotations

import csv
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from foldwise.data.ingest import ingest
from foldwise.runs.events import Event, Message
from foldwise.runs.experiment import Options, run_experiment
from foldwise.runs.tune import TuneOptions, tune
from foldwise.spec.model import ExperimentSpec
from foldwise.spec.yaml import dump_yaml

REPO = Path(__file__).resolve().parents[2]
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


# The study of a tiny experiment ---------------------------------------------------------------------------------------

LR = {"low": 1e-5, "high": 1e-1, "log": True}
SPACE = {
    "optim.lr": LR,
    "model.dropout": {"low": 0.0, "high": 0.4, "step": 0.1},
    "mix.prob": {"choices": (0.0, 1.0)},
    "mix.mixup_alpha": {"low": 0.0, "high": 0.4, "when": {"mix.prob": (1.0,)}},
}


@dataclass
class Tuning:
    """An experiment with a search space, in a project of its own; a trial trains one epoch of folds 0 and 1.

    Its images are dark or light, and told apart in one epoch by whoever learns at all.
    """

    project: Project
    name: str = "tiny"

    @property
    def root(self) -> Path:
        return self.project.root

    @property
    def path(self) -> Path:
        return self.project.path(self.name) / "tune"

    def spec(self, *, changes: dict[str, Any] | None = None, **tune: Any) -> ExperimentSpec:
        """The experiment; what is given replaces keys of its `tune` section, `changes` change other sections."""
        section = {"trials": 4, "space": SPACE, "fidelity": {"epochs": 1, "folds": (0, 1)}, "finalists": 0} | tune
        return self.project.spec(self.name, tune=section, **(changes or {}))

    def run(
        self, spec: ExperimentSpec, follow: Callable[[Path], Any] = lambda _path: (), **options: Any
    ) -> tuple[dict[str, Any] | None, Recorder]:
        recorder = Recorder()
        return tune(self.root, spec, TuneOptions(**options), screen=recorder, follow=follow), recorder

    def write(self, spec: ExperimentSpec) -> None:
        """Put the experiment's file where a command finds it."""
        path = self.root / "experiments" / f"{spec.name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(dump_yaml(spec.model_dump(mode="json", exclude_defaults=True)))

    def start(self, *arguments: str, through: Sequence[str] = ()) -> subprocess.Popen[str]:
        """`run.py tune` as a process of its own; `through` is what Python is given before it."""
        python = [sys.executable, *through]
        command = [*python, str(REPO / "run.py"), "--root", str(self.root), "tune", self.name, "--track", "none"]
        # Tests that a shell started in the background ignore Ctrl-C, and so would what they start.
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            return subprocess.Popen([*command, *arguments], cwd=self.root, **pipes)
        finally:
            signal.signal(signal.SIGINT, before)

    def units(self) -> dict[str, int]:
        """When each unit was kept, ns; whoever trains one again changes it."""
        kept = sorted(self.path.glob("*/fold*/seed*/unit.json"))
        return {str(file.parent.relative_to(self.path)): file.stat().st_mtime_ns for file in kept}

    def figures(self) -> list[list[str]]:
        """The rows of `trials.csv` without what two equal studies may differ in: numbers and seconds."""
        header, *rows = csv.reader((self.path / "trials.csv").read_text().splitlines())
        kept = [index for index, name in enumerate(header) if name not in ("number", "wall_s")]
        return [[row[index] for index in kept] for row in (header, *rows)]


@pytest.fixture(scope="session")
def shades_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project root whose only competition, `demo`, has 80 labelled and 10 test images of 16 px, dark or light."""
    root = tmp_path_factory.mktemp("shades_root")
    rng = np.random.default_rng(3)
    for number in range(1, 91):
        label = ("dark", "light")[number % 2]
        folder = root / "handout" / ("test" if number > 80 else f"train/{label}")
        folder.mkdir(parents=True, exist_ok=True)
        # One in ten or so is lighter than it should be, or darker, so that a good score is not a perfect one.
        pixels = rng.normal(rng.normal(90 if label == "dark" else 160, 28), 30, (16, 16))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    ingest(root / "handout", root, "demo")
    return root


@pytest.fixture
def tuning(shades_root: Path, tmp_path: Path) -> Tuning:
    """An experiment to tune that never was, to write in."""
    return Tuning(Project(shutil.copytree(shades_root, tmp_path / "project")))


@pytest.fixture(scope="session")
def tuned(shades_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    """A finished study of six trials whose own values hardly learn, so that there is a winner; read-only."""
    made = Tuning(Project(shutil.copytree(shades_root, tmp_path_factory.mktemp("tuned") / "project")))
    made.run(made.spec(changes={"optim": {"lr": 1e-5}}, trials=6, finalists=2))
    return made


@pytest.fixture
def retuning(tuned: Tuning, tmp_path: Path) -> Tuning:
    """A copy of the finished study, to write in."""
    return Tuning(Project(shutil.copytree(tuned.root, tmp_path / "project")))
