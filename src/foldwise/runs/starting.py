"""Starting weights from another run (`model.weights: run:<exp>`), where no label leaks by it.

Fold k starts from a model that was trained without fold k: the other run's own fold k on the same folds, or any one of
a run on another competition that was kept clear of all images of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from foldwise.data.competition import Dataset, load_dataset
from foldwise.errors import Fault, RecordError
from foldwise.files import sha256_json
from foldwise.records.store import Run, load_run
from foldwise.runs.external import outdated, unclear
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


def starting_point(root: Path, spec: ExperimentSpec, data: Dataset, *, smoke: bool = False) -> Start | None:
    """Find the weights that a spec starts from.

    Of a run on the same competition, unit (k, seed) starts from its unit (k, seed), or from that of its first seed
    where it lacks the seed; so the same images are held out of both. Of a run on another competition all folds start
    from its first, since whatever it held out is none of this competition's.

    Args:
        root: The project's root.
        spec: The experiment.
        data: The competition that the experiment is scored on.
        smoke: Whether it runs on two folds of its own, which a holdout's run has not: then all start from its first.

    Returns:
        None unless `weights` names a run.

    Raises:
        RecordError: If that run is not complete, saw a label that this one is scored on or an image that this one is
            to be kept clear of, or its weights are not here.
    """
    if not spec.model.weights.startswith("run:"):
        return None
    name = spec.model.weights.removeprefix("run:")
    run = load_run(root / "oof" / name)
    if faults := [*_leaks(run, data), *_unclear(root, run, spec)]:
        raise RecordError(faults)
    files = weight_files(run)
    elsewhere = run.info["competition"] != data.competition.name
    first = min(fold for fold, _ in files)

    def weights_of(fold: int, seed: int) -> Mapping[str, torch.Tensor]:
        seeds = run.info["seeds"]
        any_fold = elsewhere or (smoke and all(fold != kept for kept, _ in files))
        path = files[first if any_fold else fold, seed if seed in seeds else seeds[0]]
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


def _leaks(run: Run, data: Dataset) -> Iterator[Fault]:
    """Why labels that are scored here may be in the weights."""
    info, name = run.info, data.competition.name
    where = f"model.weights: run:{run.name}"
    if info["smoke"]:
        fix = f"start from a run of {name} on its present folds, from `pretrained`, or from `none`"
        yield Fault(where, "is a smoke run", fix)
    elif info["competition"] != name:
        if (why := unclear(info, data)) is not None:
            yield Fault(where, f"was trained on {info['competition']}, and {why}", _again(run, [name]))
    elif info["hashes"]["folds"] != data.folds.sha256:
        what = "was trained on other folds, and so on labels that this experiment is scored on"
        yield Fault(where, what, f"start from a run of {name} on its present folds, from `pretrained`, or from `none`")
    elif info["hashes"]["inputs"] != data.sha256:
        what = f"was trained on other images or labels ({info['hashes']['inputs'][:8]}, here {data.sha256[:8]})"
        yield Fault(where, what, f"train it again: make exp EXP={run.name} FRESH=1")
    elif (why := outdated(info["leak_guard"], data)) is not None:
        yield Fault(where, why, f"train it again: make exp EXP={run.name} FRESH=1")


def _unclear(root: Path, run: Run, spec: ExperimentSpec) -> Iterator[Fault]:
    """An experiment is no clearer of a competition's images than what it starts from."""
    for name in spec.clear_of:
        if (why := unclear(run.info, load_dataset(root, name))) is not None:
            fix = _again(run, spec.clear_of)
            if run.info["competition"] == name:
                fix = f"start from a run that never saw {name}, or take it out of `clear_of`"
            yield Fault(f"model.weights: run:{run.name}", why, fix)


def _again(run: Run, names: Sequence[str]) -> str:
    told = (run.info["leak_guard"] or {}).get("clear_of", {})
    if all(name in told for name in names):
        return f"train it again: make exp EXP={run.name} FRESH=1"
    wanted = ", ".join(dict.fromkeys([*told, *names]))
    return f"write `clear_of: [{wanted}]` into experiments/{run.name}.yaml, and run it again with FRESH=1"
