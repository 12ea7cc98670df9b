"""Starting weights from another run (`model.weights: run:<exp>`), where no label leaks by it.

Fold k starts from a model that was trained without fold k: the other run's own fold k on the same folds, or a run on
another competition that was kept clear of all images of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from foldwise.data.competition import Dataset, load_dataset
from foldwise.errors import Fault, RecordError
from foldwise.files import sha256_json
from foldwise.records.store import Run, load_run
from foldwise.runs.external import clear_of
from foldwise.runs.kept import verify_weights, weight_files
from foldwise.spec.model import ExperimentSpec


@dataclass(frozen=True)
class Start:
    """Where units start from.

    Attributes:
        weights_of: (fold, seed) to named tensors.
        sha256: Of all its weights, so that a run does not go on from others than it began with.
        marks: Marks of the other run, which follow.
        external: External data of the other run, which follows; its competition too, where that is another one.
        guard: `leak_guard` of the other run.
        classes: Classes of its head, which serves where they are the experiment's own.
    """

    weights_of: Callable[[int, int], Mapping[str, torch.Tensor]]
    sha256: str
    marks: list[str]
    external: list[Any]
    guard: dict[str, Any] | None
    classes: tuple[str, ...]


def starting_point(root: Path, spec: ExperimentSpec, data: Dataset) -> Start | None:
    """Find the weights that a spec starts from.

    Args:
        root: The project's root.
        spec: The experiment.
        data: The competition that the experiment is scored on.

    Returns:
        None unless `weights` names a run.

    Raises:
        RecordError: If that run is not complete, saw a label that this one is scored on, or its weights are not here.
    """
    if not spec.model.weights.startswith("run:"):
        return None
    name = spec.model.weights.removeprefix("run:")
    run = load_run(root / "oof" / name)
    _refuse_leak(run, data)
    _refuse_unclear(root, run, spec)
    files = weight_files(run)
    elsewhere = run.info["competition"] != data.competition.name
    first = min(fold for fold, _ in files)

    def weights_of(fold: int, seed: int) -> Mapping[str, torch.Tensor]:
        seeds = run.info["seeds"]
        path = files[first if elsewhere else fold, seed if seed in seeds else seeds[0]]
        verify_weights(run, path)
        weights: Mapping[str, torch.Tensor] = safetensors.torch.load_file(path)
        return weights

    external = list(run.info["external"])
    if elsewhere:
        inputs = run.info["hashes"]["inputs"]
        external.insert(0, {"source": run.info["competition"], "by": f"run:{run.name}", "inputs_sha256": inputs})
    return Start(
        weights_of,
        sha256_json(run.info["weights"]),
        list(run.info["marks"]),
        external,
        run.info["leak_guard"],
        run.classes,
    )


def _refuse_leak(run: Run, data: Dataset) -> None:
    info = run.info
    if info["smoke"]:
        reason = "is a smoke run"
    elif info["competition"] != data.competition.name:
        unclear = clear_of(info["leak_guard"], data)
        if unclear is None:
            return
        reason = f"was trained on {info['competition']}, and {unclear}"
        fix = f"write `clear_of: [{data.competition.name}]` into experiments/{run.name}.yaml, and run it again"
        raise RecordError([Fault(f"model.weights: run:{run.name}", reason, fix)])
    elif info["split"]["kind"] != "kfold" or info["hashes"]["folds"] != data.folds.sha256:
        reason = "was trained on other folds, and so on labels that this experiment is scored on"
    else:
        return
    fix = f"start from a k-fold run of {data.competition.name} on its present folds, from `pretrained`, or from `none`"
    raise RecordError([Fault(f"model.weights: run:{run.name}", reason, fix)])


def _refuse_unclear(root: Path, run: Run, spec: ExperimentSpec) -> None:
    """An experiment is no clearer of a competition's images than what it starts from."""
    faults = []
    for name in spec.clear_of:
        if (unclear := clear_of(run.info["leak_guard"], load_dataset(root, name))) is not None:
            fix = f"write `clear_of: [{name}]` into experiments/{run.name}.yaml too, and run it again"
            faults.append(Fault(f"model.weights: run:{run.name}", unclear, fix))
    if faults:
        raise RecordError(faults)
