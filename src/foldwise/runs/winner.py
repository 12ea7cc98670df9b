"""From the best trials of a study to its winner: how good it is when run in full, and its file as an ordinary spec.

A score that chose among many flatters; what is shown beside it is corrected for the choice, or from another split.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldwise.errors import FoldwiseError, RecordError
from foldwise.files import atomic_write
from foldwise.metrics import Labels, Metric
from foldwise.records.store import Ids, Run, Unit, load_run, rows_of
from foldwise.runs.experiment import seal
from foldwise.runs.plan import Plan, with_spec
from foldwise.spec.load import differences, load_experiment, with_defaults
from foldwise.spec.model import ExperimentSpec, TunedSpec, resolved
from foldwise.spec.yaml import dump_yaml, flow_text, read_yaml
from foldwise.stats import bias_corrected, paired_difference, standard_error


@dataclass(frozen=True, eq=False)
class Finalist:
    """A trial that was run in full, or the experiment's own kept run.

    Attributes:
        number: Of the trial; None for the own run.
        values: Its parameters.
        ids: (n,) validated ids.
        labels: (n,) class indices.
        probs: (n, C) out-of-fold probabilities.
        units: Its units; none for the own run.
        folder: Where their weights lie.
    """

    number: int | None
    values: dict[str, Any]
    ids: Ids
    labels: Labels
    probs: NDArray[np.float64]
    units: tuple[Unit, ...] = ()
    folder: Path = Path()


def own_run(plan: Plan, name: str | None = None) -> Run | None:
    """The kept run of the plan's spec, if there is one and it was made of the same as the plan's would be."""
    try:
        run = load_run(plan.root / "oof" / (name or plan.spec.name))
    except RecordError:
        return None
    kept = with_defaults(read_yaml(run.path / "spec.yaml").value)
    apart = {"name": None, "tuned": None}
    if differences(kept | apart, resolved(plan.spec) | apart):
        return None
    context = asdict(plan.context)
    made_on = ("folds", "inputs", "start", "teachers", "guard")
    return run if all(run.info["hashes"].get(name) == context[f"{name}_sha256"] for name in made_on) else None


def finalist_of(run: Run, values: Mapping[str, Any]) -> Finalist:
    """The experiment's own run as a finalist."""
    return Finalist(None, dict(values), run.ids, run.labels, run.probs)


def ranked(plan: Plan, finalists: Sequence[Finalist]) -> list[tuple[Finalist, dict[str, Any]]]:
    """Finalists with their figures, the best first; of equals the earlier trial, the own run before all.

    Returns:
        With each finalist {number, parameters, score, standard_error}.
    """
    table = []
    for finalist in finalists:
        groups = plan.folds.groups_of(finalist.ids)
        told = {
            "number": finalist.number,
            "parameters": finalist.values,
            "score": plan.metric.score(finalist.labels, finalist.probs),
            "standard_error": standard_error(plan.metric, finalist.labels, finalist.probs, groups),
        }
        table.append((finalist, told))
    return sorted(
        table, key=lambda pair: (-plan.metric.sign * pair[1]["score"], -1 if pair[0].number is None else pair[0].number)
    )


def corrected(
    metric: Metric, labels: Labels, groups: NDArray[Any], predictions: Sequence[Any]
) -> dict[str, Any] | None:
    """The score of the best of several, corrected for the choice; None where there was none to make."""
    if len(predictions) < 2:
        return None
    return asdict(bias_corrected(metric, labels, predictions, groups))


def difference(plan: Plan, first: Finalist | Run, second: Finalist | Run) -> dict[str, Any]:
    """How much better the first is than the second, on the same images."""
    other = second.probs[rows_of(second.ids, first.ids)]
    return asdict(paired_difference(plan.metric, first.labels, first.probs, other, plan.folds.groups_of(first.ids)))


def second_split(plan: Plan, tuned: ExperimentSpec) -> dict[str, Any] | None:
    """The tuned run beside the experiment's own on the second split, where both are kept.

    Args:
        plan: The experiment on the second split.
        tuned: The tuned spec.

    Returns:
        {own, tuned: {score, standard_error}, difference}; None where a run is missing.
    """
    own = own_run(plan, f"{plan.spec.name}.split{plan.split}")
    found = own_run(with_spec(plan, tuned), f"{tuned.name}.split{plan.split}")
    if own is None or found is None:
        return None
    return {
        "own": {name: own.info[name] for name in ("score", "standard_error")},
        "tuned": {name: found.info[name] for name in ("score", "standard_error")},
        "difference": difference(plan, found, own),
    }


# The winner's file and run --------------------------------------------------------------------------------------------


def tuned_path(root: Path, name: str) -> Path:
    """Where the winner's file goes.

    Raises:
        FoldwiseError: If there is a file of that name which no study wrote.
    """
    path = root / "experiments" / f"{name}_tuned.yaml"
    if path.exists() and not isinstance(read_yaml(path).value.get("tuned"), dict):
        raise FoldwiseError(
            f"experiments/{path.name} is where the winner goes, but it was not written by a study\n"
            "  fix: rename that file"
        )
    return path


def write_winner(plan: Plan, winner: Finalist, spec: ExperimentSpec, trials: int, command: str) -> ExperimentSpec:
    """Write the winner as `experiments/<exp>_tuned.yaml`, and its units as the complete run `oof/<exp>_tuned/`.

    Args:
        plan: The experiment.
        winner: The finalist, with its units.
        spec: The experiment with the winner's parameters.
        trials: Parameter sets among which it was chosen.
        command: What runs it.

    Returns:
        The spec as it reads back from the file.

    Raises:
        FoldwiseError: If the file of that name is someone's own.
    """
    path = tuned_path(plan.root, plan.spec.name)
    mark = TunedSpec(study=plan.spec.name, trials=trials, folds_sha256=plan.folds.sha256)
    spec = spec.model_copy(update={"name": path.stem, "tune": None, "tuned": mark})
    changed = ", ".join(f"{key} {flow_text(value)}" for key, value in winner.values.items())
    header = [
        "# yaml-language-server: $schema=schema.json",
        f"# {plan.spec.name} with the best of {trials} parameter sets: {changed}.",
        f"# Found by: {command}      Run: make exp EXP={path.stem}",
    ]
    tree = spec.model_dump(mode="json", exclude_defaults=True, exclude={"tune"})
    atomic_write(path, "\n".join(header) + "\n" + dump_yaml(tree))
    read = load_experiment(path, root=plan.root)
    of_winner = with_spec(plan, read)
    try:
        folder = of_winner.open()
    except RecordError:
        if not isinstance(read_yaml(of_winner.path / "spec.yaml").value.get("tuned"), dict):
            raise  # someone's own, not an earlier study's
        folder = of_winner.open(fresh=True)
    with folder:
        if folder.record is None:
            for unit in winner.units:
                where = folder.unit_path(unit.fold, unit.seed)
                where.mkdir(parents=True, exist_ok=True)
                weights = winner.folder / f"fold{unit.fold}" / f"seed{unit.seed}" / "weights.safetensors"
                if weights.exists():
                    shutil.copyfile(weights, where / weights.name)
                folder.save_unit(unit)
            seal(of_winner, folder, winner.units)
    return read


# What the user is told ------------------------------------------------------------------------------------------------


def summary(info: Mapping[str, Any]) -> list[str]:
    """The lines that a study ends with, from the content of `tune.json`."""
    metric, counts, trainings = info["metric"], info["trials"], info["fold_trainings"]
    folds = ", ".join(map(str, info["folds"]))
    less = [f"{info['epochs']} epoch{'s' if info['epochs'] > 1 else ''}", f"{info['image_size']} px"]
    lines = [
        f"{info['experiment']}: {counts['distinct']} parameter sets on folds {folds} ({', '.join(less)}): "
        f"{counts['complete']} complete, {counts['pruned']} pruned, {counts['failed']} failed",
        f"  trained    {trainings['done']} of {trainings['possible']} folds"
        + (f", {trainings['saved']:.0%} saved by pruning" if counts["pruned"] else ""),
    ]
    best = info["best"]
    lines.append(f"  search     trial {best['number']} is best: {metric} {_score(best)} at this fidelity")
    if found := info["corrected"]:
        lines.append(
            f"             as the best of {found['chosen_among']} it is flattered; corrected {_score(found)}, "
            f"{found['level']:.0%} interval {found['low']:.4f} to {found['high']:.4f}"
        )
    for row in info["finalists"]:
        name = "own values" if row["number"] is None else f"trial {row['number']}"
        lines.append(f"  in full    {name}: OOF {metric} {_score(row)}")
    if found := info["corrected_full"]:
        lines.append(
            f"             the best of {found['chosen_among']} corrected for the choice: {_score(found)}, "
            f"{found['level']:.0%} interval {found['low']:.4f} to {found['high']:.4f}"
        )
    if info["difference"] is not None:
        lines.append(f"  gain       {_gain(info['difference'])} over the own values, paired")
    if (second := info["second_split"]) is not None:
        lines.append(
            f"  split 1    own {_score(second['own'])}, tuned {_score(second['tuned'])}; {_gain(second['difference'])}"
        )
    if info["seed_sd"] is not None:
        lines.append(f"  seeds      a fold's score moves by {info['seed_sd']:.4f} (sd) with the seed alone")
    if info["winner"] is None:
        lines.append("  winner     none is named, since `finalists: 0` runs none in full")
        return lines
    if info["tuned"] is None:
        lines.append("  winner     the spec's own values: nothing better was found, so nothing was written")
        return lines
    moved = [f"{key} {flow_text(info['own'].get(key))} -> {flow_text(value)}" for key, value in info["winner"].items()]
    lines += [f"  {'winner' if not index else '':<11}{text}" for index, text in enumerate(moved)]
    lines.append(f"  written    experiments/{info['tuned']}.yaml, oof/{info['tuned']}/")
    if info["difference"] is None:
        lines.append(f"  next       make exp EXP={info['experiment']}, then this again: says what tuning gained")
    elif second is None and info["splits"] > 1:
        lines.append(
            f"  next       make exp EXP={info['experiment']} SPLIT=1, make exp EXP={info['tuned']} SPLIT=1, then this "
            "again: confirms the gain on folds that chose nothing"
        )
    return lines


def _score(told: Mapping[str, Any]) -> str:
    return f"{told['score']:.4f} +- {told['standard_error']:.4f}"


def _gain(told: Mapping[str, Any]) -> str:
    return (
        f"{told['gain']:+.4f} +- {told['standard_error']:.4f} "
        f"({told['level']:.0%} interval {told['low']:+.4f} to {told['high']:+.4f})"
    )
