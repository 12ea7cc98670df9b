"""Starting weights from another run (`model.weights: run:<exp>`), where no label leaks by it.

Fold k may start only from a model that was trained without fold k: the other run's own fold k, on the same folds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from foldwise.data.competition import Dataset
from foldwise.errors import Fault, RecordError
from foldwise.files import sha256_json
from foldwise.records.store import Run, load_run
from foldwise.runs.kept import verify_weights, weight_files
from foldwise.spec.model import ModelSpec


@dataclass(frozen=True)
class Start:
    """Where units start from.

    Attributes:
        weights_of: (fold, seed) to named tensors.
        sha256: Of all its weights, so that a run does not go on from others than it began with.
        marks: Marks of the other run, which follow.
        external: External data of the other run, which follows.
        classes: Classes of its head, which serves where they are the experiment's own.
    """

    weights_of: Callable[[int, int], Mapping[str, torch.Tensor]]
    sha256: str
    marks: list[str]
    external: list[Any]
    classes: tuple[str, ...]


def starting_point(root: Path, model: ModelSpec, data: Dataset) -> Start | None:
    """Find the weights that a spec starts from.

    Args:
        root: The project's root.
        model: The experiment's `model` section.
        data: The competition that the experiment is scored on.

    Returns:
        None unless `weights` names a run.

    Raises:
        RecordError: If that run is not complete, saw a label that this one is scored on, or its weights are not here.
    """
    if not model.weights.startswith("run:"):
        return None
    name = model.weights.removeprefix("run:")
    run = load_run(root / "oof" / name)
    _refuse_leak(run, data)
    files = weight_files(run)

    def weights_of(fold: int, seed: int) -> Mapping[str, torch.Tensor]:
        seeds = run.info["seeds"]
        path = files[fold, seed if seed in seeds else seeds[0]]
        verify_weights(run, path)
        weights: Mapping[str, torch.Tensor] = safetensors.torch.load_file(path)
        return weights

    return Start(
        weights_of, sha256_json(run.info["weights"]), list(run.info["marks"]), list(run.info["external"]), run.classes
    )


def _refuse_leak(run: Run, data: Dataset) -> None:
    info = run.info
    if info["smoke"]:
        reason = "is a smoke run"
    elif info["competition"] != data.competition.name:
        reason = (
            f"was trained on {info['competition']}, and it is not known whether that holds images of "
            f"{data.competition.name}"
        )
    elif info["split"]["kind"] != "kfold" or info["hashes"]["folds"] != data.folds.sha256:
        reason = "was trained on other folds, and so on labels that this experiment is scored on"
    else:
        return
    fix = f"start from a k-fold run of {data.competition.name} on its present folds, from `pretrained`, or from `none`"
    raise RecordError([Fault(f"model.weights: run:{run.name}", reason, fix)])
