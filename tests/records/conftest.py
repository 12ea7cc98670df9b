"""A small competition without images, and runs of record of it that were never trained.

Probabilities are drawn around the true class, so that scores are neither perfect nor chance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from foldwise.data.folds import Folds, write_folds
from foldwise.metrics import METRICS
from foldwise.records.store import Context, RunFolder, Unit

CLASSES = ("angry", "happy", "sad, or so")


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def draw_probs(rng, labels, classes=3, skill=1.0):
    logits = rng.normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), labels] += skill
    return softmax(logits).astype(np.float32)


@dataclass
class Project:
    """A project root with `inputs/toy/folds.csv`: 60 labelled ids in 3 folds, two of them twins, and 12 test ids."""

    root: Path
    kind: str = "kfold"
    inputs_sha256: str = "1" * 64
    ids: np.ndarray = field(default_factory=lambda: np.arange(1, 61).astype(str))
    test_ids: np.ndarray = field(default_factory=lambda: np.arange(61, 73).astype(str))

    def __post_init__(self):
        rng = np.random.default_rng(0)
        self.labels = rng.integers(0, 3, 60)
        fold = np.arange(60) % 3
        fold[1] = fold[0]
        group = self.ids.copy()
        group[1] = group[0]
        self.folds = Folds(self.ids, fold, group)
        write_folds(self.root / "inputs" / "toy" / "folds.csv", [self.folds])

    @property
    def groups(self):
        return dict(zip(self.folds.ids.tolist(), self.folds.group.tolist(), strict=True))

    def context(self, **changes):
        split = {"kind": self.kind, "folds": 3, "seed": 42} if self.kind == "kfold" else {"kind": self.kind}
        return Context(
            **{
                "competition": "toy",
                "classes": CLASSES,
                "split": split,
                "folds_sha256": self.folds.sha256,
                "inputs_sha256": self.inputs_sha256,
                **changes,
            }
        )

    def open(self, name, *, spec=None, fresh=False, **changes):
        spec = spec or {"name": name, "seeds": [42], "optim": {"lr": 0.0002}}
        text = f"name: {spec['name']}\nseeds: {spec['seeds']}\noptim:\n  lr: {spec['optim']['lr']}\n"
        path = self.root / "oof" / name
        return RunFolder.open(path, spec=spec, spec_yaml=text, context=self.context(**changes), fresh=fresh)

    def unit(self, fold, seed=42, *, skill=1.0, salt=0, test_ids=None):
        rng = np.random.default_rng([fold + 10, seed, salt])
        test_ids = self.test_ids if test_ids is None else test_ids
        rows = rng.permutation(np.flatnonzero(self.folds.fold == fold))
        return Unit(
            fold=fold,
            seed=seed,
            val_ids=self.ids[rows],
            val_labels=self.labels[rows],
            val_probs=draw_probs(rng, self.labels[rows], skill=skill),
            test_ids=test_ids,
            test_probs=draw_probs(rng, rng.integers(0, 3, len(test_ids))),
            history=[{"epoch": 1, "lr": 1e-4, "val_loss": 1.0}, {"epoch": 2, "lr": 1 / 3, "train_loss": float("inf")}],
            info={"score": 0.5, "wall_s": 2.5, "peak_rss_mib": 100.0 + fold, "device": "cpu", "threads": 2},
        )

    def keep(self, name, *, seeds=(42,), skill=1.0, salt=0, metric="accuracy", info=None, **changes):
        """Keep a whole run and return its record."""
        spec = {"name": name, "seeds": list(seeds), "optim": {"lr": 0.0002}}
        units = [(fold, seed) for fold in range(3) for seed in seeds]
        with self.open(name, spec=spec, **changes) as folder:
            for fold, seed in units:
                folder.save_unit(self.unit(fold, seed, skill=skill, salt=salt))
            return self.complete(folder, units, metric=metric, info=info)

    def complete(self, folder, units, *, metric="accuracy", info=None):
        return folder.complete(
            units, folds=self.folds, labels=self.labels, metric=METRICS[metric], info=info or {"command": "make exp"}
        )


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)
