"""The models of a kept run, ready to predict: one a unit, made from its weights, which say what network they are.

Whatever asks a run about images (evaluation, explanation, starting weights) gets its models here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
from torch import nn

from foldwise.errors import Fault, RecordError
from foldwise.files import sha256_file
from foldwise.learn.device import Runtime
from foldwise.learn.models import ToInput, build_model, place
from foldwise.learn.predict import View, parse_view, predict, predict_batch_size
from foldwise.records.store import Run, train_again
from foldwise.spec.model import ModelSpec


@dataclass(frozen=True)
class KeptModel:
    """The model of one unit.

    Attributes:
        fold: The fold that it never saw.
        seed: Of its training.
        spec: What network it is.
        classes: Its classes, in the order of its logits.
        model: On the runtime's device, in eval mode.
        prepare: Pixels (B, H, W, C) uint8 to input, on the device.
        views: As in the run's OOF.
        runtime: Device and precision.
    """

    fold: int
    seed: int
    spec: ModelSpec
    classes: tuple[str, ...]
    model: nn.Module
    prepare: ToInput
    views: tuple[View, ...]
    runtime: Runtime

    @property
    def channels(self) -> int:
        """Channels of the images that it takes."""
        return int(self.prepare.mean.numel())

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Predict as the run's OOF was: (N, H, W, C) uint8 to (N, classes) float32."""
        probs = predict(
            self.model,
            images,
            self.views,
            prepare=self.prepare,
            runtime=self.runtime,
            batch_size=predict_batch_size(self.spec.image_size),
        )
        return probs.numpy().reshape(len(images), len(self.classes))


def kept_models(run: Run, runtime: Runtime, *, folds: Sequence[int] | None = None) -> Iterator[KeptModel]:
    """Load the models of a run one after another.

    Args:
        run: A complete run.
        runtime: Device, precision and threads.
        folds: Only these; None for all.

    Yields:
        A model a unit, by fold and seed.

    Raises:
        RecordError: If weights are not on this machine, or are not those that `run.json` vouches for.
    """
    for (fold, seed), path in sorted(weight_files(run).items()):
        if folds is not None and fold not in folds:
            continue
        verify_weights(run, path)
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if "foldwise" not in metadata:
            what = "was written by an older version, and does not say what network it is of"
            raise RecordError([Fault(f"oof/{run.name}/{path.parent.relative_to(run.path)}", what, _again(run))])
        told = json.loads(metadata["foldwise"])
        spec = ModelSpec.model_validate_json(json.dumps(told["model"] | {"weights": "none"}))
        model = build_model(spec, classes=len(told["classes"]), channels=len(told["mean"]))
        model.load_state_dict(safetensors.torch.load_file(path))
        prepare = ToInput(spec.image_size, spec.interpolation, told["mean"], told["std"]).to(runtime.device)
        views = tuple(parse_view(name) for name in run.info["tta"])
        classes = tuple(told["classes"])
        yield KeptModel(fold, seed, spec, classes, place(model, runtime).eval(), prepare, views, runtime)


def weight_files(run: Run) -> dict[tuple[int, int], Path]:
    """Files of weights by (fold, seed).

    Raises:
        RecordError: If one is not on this machine.
    """
    files = {unit: run.path / unit / "weights.safetensors" for unit in run.info["weights"]}
    missing = [unit for unit, path in files.items() if not path.exists()]
    if missing or not files:
        what = f"its weights are not on this machine: {', '.join(missing) or 'none were kept'}"
        raise RecordError([Fault(f"oof/{run.name}", what, f"fetch them: make weights FROM=<folder>, or {_again(run)}")])
    named = {}
    for unit, path in files.items():
        fold, seed = unit.split("/")
        named[int(fold.removeprefix("fold")), int(seed.removeprefix("seed"))] = path
    return named


def verify_weights(run: Run, path: Path) -> None:
    """Check a file of weights against its hash in `run.json`.

    Raises:
        RecordError: If it is another file.
    """
    unit = path.parent.relative_to(run.path).as_posix()
    if sha256_file(path) != run.info["weights"][unit]:
        what = "is not the file that run.json vouches for"
        raise RecordError([Fault(f"oof/{run.name}/{unit}/{path.name}", what, train_again(run.name, run.info))])


def _again(run: Run) -> str:
    return f"train it here: {train_again(run.name, run.info)}"
