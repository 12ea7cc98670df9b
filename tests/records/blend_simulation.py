"""Blends of models that are drawn, so that the truth is known: how far estimates are off, and how often intervals hold.

`OMP_NUM_THREADS=1 .venv/bin/python tests/records/blend_simulation.py` prints the figures of up to 500 draws (minutes).
The truth is the accuracy, on fresh images, of the blend that was fitted on all folds. The estimate's blends lack a fold
each, so that it may be a little too low. Models are fixed: an interval is conditional on them, and so is its coverage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foldwise.metrics import METRICS
from foldwise.records.ensemble import METHODS, blend
from foldwise.records.store import Run
from foldwise.stats import wilson

CLASSES = ("a", "b", "c", "d")
FRESH = 20_000
# Other seeds than those on which the interval was found too narrow, and mended.
FIRST_SEED = 10_000


@dataclass
class World:
    """Models whose logits are the truth times a skill, an error that all share, one of their own, and a sharpness.

    `skills` and `sharpness` are ranges from which each model's is drawn.
    """

    models: int
    rows: int
    skills: tuple[float, float]
    shared: float = 0.7
    own: float = 1.0
    sharpness: tuple[float, float] = (1.0, 1.0)

    def draw(self, seed, fresh=FRESH):
        """Runs of this world with their groups, whose test images are fresh ones, and the labels of these."""
        rng = np.random.default_rng(seed)
        count = self.rows + fresh
        labels = rng.integers(0, len(CLASSES), count)
        shared = self.shared * rng.normal(size=(count, len(CLASSES))).astype(np.float32)
        ids = np.array([f"i{row:06}" for row in range(count)])
        fold = rng.permutation(self.rows) % 5
        runs = []
        for index in range(self.models):
            logits = shared + self.own * rng.standard_normal(shared.shape, dtype=np.float32)
            logits[np.arange(count), labels] += rng.uniform(*self.skills)
            probs = np.exp(logits.astype(np.float64) * np.exp(rng.uniform(*np.log(self.sharpness))))
            probs /= probs.sum(axis=1, keepdims=True)
            info = {
                "competition": "toy",
                "split": {"kind": "kfold"},
                "hashes": {"folds": "f" * 64, "inputs": "1" * 64},
                "marks": [],
                "external": [],
            }
            name, seen = f"run{index:03}", slice(0, self.rows)
            validated = ids[seen], fold, labels[seen], probs[seen]
            test = ids[self.rows :], probs[self.rows :]
            runs.append(Run(name, Path("oof") / name, info, CLASSES, *validated, *test))
        return runs, {name: name for name in ids[: self.rows].tolist()}, labels[self.rows :]


FEW = World(models=6, rows=400, skills=(0.4, 1.4), sharpness=(0.5, 4.0))
WEAK = World(models=100, rows=400, skills=(0.15, 0.2), shared=0.3)


def simulate(world, seeds, *, methods=METHODS, prior="none", fresh=FRESH):
    """For each seed the estimate, the naive one, both ends of the interval, the truth and the method."""
    accuracy = METRICS["accuracy"]
    rows = []
    for seed in seeds:
        runs, groups, labels = world.draw(seed, fresh)
        result = blend(runs, metric=accuracy, groups=groups, methods=methods, prior=prior)
        truth = accuracy.score(labels, result.test_probs)
        rows.append((result.score, result.naive, *result.interval, truth, result.method))
    return rows


def bias(estimates, truths):
    """Mean of the differences and its Monte-Carlo standard error."""
    errors = np.array(estimates) - np.array(truths)
    return float(errors.mean()), float(errors.std(ddof=1) / np.sqrt(len(errors)))


def covered(rows):
    """Share of the intervals that hold the truth, with its Wilson interval."""
    hits = sum(low <= truth <= high for _, _, low, high, truth, _ in rows)
    low, high = wilson(np.array([hits]), np.array([len(rows)]))[0]
    return hits / len(rows), float(low), float(high)


def main():
    for name, world, draws, options in (
        ("6 models, 400 rows", FEW, 500, {}),
        ("6 models, 400 rows, prior train", FEW, 100, {"prior": "train"}),
        ("100 weak models, 400 rows", WEAK, 200, {}),
        ("100 weak models, 400 rows, caruana", WEAK, 60, {"methods": ("caruana",)}),
        ("100 weak models, 400 rows, stack", WEAK, 60, {"methods": ("stack",)}),
        ("100 weak models, 400 rows, best", WEAK, 200, {"methods": ("best",)}),
    ):
        rows = simulate(world, range(FIRST_SEED, FIRST_SEED + draws), **options)
        estimates, naives, _, _, truths, methods = zip(*rows, strict=True)
        share, low, high = covered(rows)
        (honest, honest_error), (naive, naive_error) = bias(estimates, truths), bias(naives, truths)
        print(f"{name}, {draws} draws: 95% intervals hold the truth in {share:.3f} ({low:.3f} to {high:.3f})")
        print(f"  bias: cross-fitted {honest:+.4f} +- {honest_error:.4f}, naive {naive:+.4f} +- {naive_error:.4f}")
        print(
            f"  truth {np.mean(truths):.4f}; { ({m: methods.count(m) for m in METHODS if m in methods}) }", flush=True
        )


if __name__ == "__main__":
    main()
