"""Speed as ratios, each taken in one run, since absolute times say more of the machine than of the code.

`make bench` prints them; nothing here is a test.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch

from foldwise.data.demo import draw_demo
from foldwise.data.ingest import ingest
from foldwise.learn.augment import Augment, Batches
from foldwise.learn.device import make_deterministic, pick_runtime
from foldwise.learn.fit import fit
from foldwise.learn.models import build_model, place, to_input
from foldwise.learn.objectives import Supervised, soft_target_loss
from foldwise.metrics import METRICS
from foldwise.records.ensemble import _caruana
from foldwise.runs.executors import Job, make_executor, units_of
from foldwise.spec.model import ExperimentSpec, LossSpec, MixSpec, ModelSpec, OptimSpec, ScheduleSpec, TrainSpec

REPEATS = 5
ROOT = Path(__file__).resolve().parents[1]
TRANSFORMS = (
    {"HorizontalFlip": {"p": 0.5}},
    {"Affine": {"rotate": [-12, 12], "translate_percent": [-0.08, 0.08], "scale": [0.9, 1.1], "p": 0.9}},
    {"RandomBrightnessContrast": {"brightness_limit": 0.2, "contrast_limit": 0.2, "p": 0.5}},
)


def main() -> None:
    """Print a line a ratio: median, and the range over repeats."""
    for arch, batch in (("cnn_3block", 64), ("vit_small_patch8_48", 64)):
        _report(f"an epoch of fit / its bare arithmetic, {arch}", [_epoch_ratio(arch, batch) for _ in range(REPEATS)])
    _report("`run.py check` / python that imports pydantic", [_check_ratio() for _ in range(REPEATS)])
    _report("four units of a thread, one process / two", _workers_ratios())
    _report(
        "greedy selection among 24 runs / one pass over their predictions", [_blend_ratio() for _ in range(REPEATS)]
    )


def _report(what: str, ratios: list[float]) -> None:
    print(f"{what}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _epoch_ratio(arch: str, batch_size: int, count: int = 1024) -> float:
    """Augmentation, resizing, seeding, EMA-free bookkeeping and the checkpoint, against forward, backward and step."""
    runtime = pick_runtime("cpu", "auto", None)
    make_deterministic(runtime.threads)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 48, 48, 1), dtype=np.uint8)
    labels, rows = rng.integers(0, 7, count), np.arange(count)
    spec = ModelSpec(arch=arch)
    prepare = to_input(spec, images, rows)
    objective = Supervised(
        labels, 7, loss=LossSpec(), mixing=MixSpec(), prepare=prepare, runtime=runtime, class_weights=None
    )
    batches = Batches(images, rows, Augment(TRANSFORMS, (48, 48, 1)), batch_size=batch_size, key=(0, 0))
    model = place(build_model(spec, classes=7, channels=1), runtime)
    bare = place(build_model(spec, classes=7, channels=1), runtime)
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-3, fused=True)
    ready = [
        (prepare(torch.from_numpy(images[i : i + batch_size])).contiguous(memory_format=runtime.memory_format),
         torch.nn.functional.one_hot(torch.from_numpy(labels[i : i + batch_size]), 7).float())
        for i in range(0, count, batch_size)
    ]  # fmt: skip

    def arithmetic() -> None:
        bare.train()
        for inputs, targets in ready:
            with runtime.autocast():
                logits = bare(inputs)
            soft_target_loss(logits.float(), targets, LossSpec()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with tempfile.TemporaryDirectory() as folder:
        paths = iter(Path(folder) / f"{number}.pt" for number in range(9))

        def epoch() -> None:
            fit(
                model, objective, batches, optim=OptimSpec(lr=1e-3), schedule=ScheduleSpec(name="constant"),
                train=TrainSpec(epochs=1, batch_size=batch_size), key=(0, 0), runtime=runtime, checkpoint=next(paths),
            )  # fmt: skip

        arithmetic()
        epoch()
        return _seconds(epoch) / _seconds(arithmetic)


def _check_ratio() -> float:
    def python(*arguments: str) -> float:
        return _seconds(lambda: subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True))

    return python("run.py", "check") / python("-c", "import pydantic")


def _workers_ratios() -> list[float]:
    """Whole units on one core against two, once the processes are there: 2 where the second costs the first nothing."""
    spec = ExperimentSpec.model_validate(
        {
            "name": "bench",
            "competition": "demo",
            "model": {"arch": "cnn_3block", "image_size": 48},
            "optim": {"lr": 1e-3},
            "train": {"epochs": 1, "batch_size": 32, "threads": 1},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw_demo(root / "handout", train=120, test=10)
        ingest(root / "handout", root, "demo")
        fresh = iter(root / "oof" / "bench" / str(number) / "seed0" for number in range(1000))

        def four_units(workers: int) -> Callable[[], object]:
            executor = stack.enter_context(
                closing(make_executor("processes", lambda *_: None, threads=1, device="cpu", workers=workers))
            )
            return lambda: list(units_of(executor, [Job(root, spec, k, 0, next(fresh), 1, "cpu") for k in range(4)]))

        with ExitStack() as stack:
            one, two = four_units(1), four_units(2)
            one(), two()
            return [_seconds(one) / _seconds(two) for _ in range(REPEATS)]


def _blend_ratio() -> float:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 2700)
    stack = np.ascontiguousarray(rng.dirichlet(np.ones(7), (2700, 24)).transpose(2, 0, 1))
    return _seconds(lambda: _caruana(stack, labels, METRICS["accuracy"])) / _seconds(lambda: stack.argmax(axis=0))


if __name__ == "__main__":
    main()
