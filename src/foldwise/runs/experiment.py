"""One experiment from its spec to its sealed folder in `oof/`: what is kept is skipped, what is missing is trained.

Only here do cross-validation, the store and the followers of a run meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldwise.learn.device import pick_runtime
from foldwise.metrics import confusion_matrix, per_class_table
from foldwise.records.store import RunFolder, Unit, load_run, rows_of, shown
from foldwise.runs.events import Event, Listener, Message, RunDone, RunStarted, UnitDone
from foldwise.runs.executors import Job, make_executor, units_of
from foldwise.runs.external import merged_guards
from foldwise.runs.plan import Plan, make_plan
from foldwise.runs.provenance import command_line, git_state, versions
from foldwise.spec.model import ExperimentSpec, resolved


@dataclass(frozen=True)
class Options:
    """What belongs to a call rather than to the experiment.

    Attributes:
        folds: Folds to run now, or None for all; the others are left for another call.
        smoke: One epoch on 64 images in two folds, kept apart from real runs.
        fresh: Delete what is there and begin anew.
        device: `cpu`, `cuda`, `mps` or None for the best there is.
        split: Which split of folds.csv, from 0; the caller names the run after it.
        on: Name of the executor: `local`, `processes` or `ray`.
        workers: Units at a time; None for what there is room for.
    """

    folds: tuple[int, ...] | None = None
    smoke: bool = False
    fresh: bool = False
    device: str | None = None
    split: int = 0
    on: str = "local"
    workers: int | None = None


def run_experiment(
    root: Path,
    spec: ExperimentSpec,
    options: Options,
    *,
    screen: Listener,
    follow: Callable[[Path], Sequence[Listener]] = lambda _path: (),
) -> dict[str, Any] | None:
    """Run an experiment, or go on with it.

    Args:
        root: The project's root.
        spec: The experiment.
        options: What belongs to this call.
        screen: Shows the run to the user; once the run's folder is open it is closed at the end, however that comes.
        follow: Makes further listeners for the run's folder (log, trackers), where something is to be run; closed too.

    Returns:
        The content of `run.json`, or None while folds are still to be run.

    Raises:
        FoldwiseError: For whatever the user can mend; what was finished before is kept.
    """
    plan = make_plan(root, spec, split=options.split, smoke=options.smoke, say=lambda text: screen.on(Message(text)))
    given, spec = spec, plan.spec
    runtime = pick_runtime(options.device, spec.train.precision, spec.train.threads)
    units, wanted = plan.units(), plan.units(options.folds)
    with plan.open(fresh=options.fresh or options.smoke) as folder:
        listeners = [screen]

        def emit(event: Event) -> None:
            for listener in listeners:
                listener.on(event)

        try:
            if (record := folder.record) is not None:
                emit(Message(f"{spec.name} is complete and kept; FRESH=1 (--fresh) redoes it"))
                emit(_done(plan.path, record))
                return record
            listeners.extend(follow(plan.path))
            kept = {unit: found for unit in units if (found := folder.finished(*unit)) is not None}
            emit(
                RunStarted(
                    experiment=spec.name,
                    competition=spec.competition,
                    attempt=str(folder.attempt),
                    spec=resolved(spec),
                    metric=plan.metric.name,
                    units=tuple(wanted),
                    finished=tuple(unit_done(kept[unit]) for unit in wanted if unit in kept),
                    epochs=spec.train.epochs,
                    device=str(runtime),
                    smoke=options.smoke,
                )
            )
            for note in (*plan.guarded.told, *folder.notes):
                emit(Message(note))
            if options.smoke and plan.teachers is not None:
                emit(
                    Message(
                        "a smoke run asks no teachers: what `from` names is not read, and stand-ins know the labels"
                    )
                )
            with closing(
                make_executor(
                    options.on,
                    lambda _job, event: emit(event),
                    threads=runtime.threads,
                    device=options.device,
                    workers=options.workers,
                )
            ) as executor:
                jobs = [
                    Job(
                        root,
                        given,
                        *unit,
                        folder.unit_path(*unit),
                        runtime.threads,
                        options.device,
                        options.split,
                        options.smoke,
                        plan.context.sha256,
                    )
                    for unit in wanted
                    if unit not in kept
                ]
                for unit in units_of(executor, jobs):
                    folder.save_unit(unit)
                    kept[unit.fold, unit.seed] = unit
                    emit(unit_done(unit))
            if left := [unit for unit in units if unit not in kept]:
                names = ", ".join(str(fold) for fold in sorted({fold for fold, _ in left}))
                emit(Message(f"{len(kept)} of {len(units)} units are kept; still to run: folds {names}"))
                return None
            tracker = next((url for item in listeners if (url := getattr(item, "url", None))), None)
            record = seal(plan, folder, [kept[unit] for unit in units], tracker=tracker)
            emit(_done(plan.path, record))
            return record
        finally:
            for listener in listeners:
                listener.close()


def seal(plan: Plan, folder: RunFolder, kept: Sequence[Unit], *, tracker: str | None = None) -> dict[str, Any]:
    """Complete a run whose units are all kept, noting where it comes from.

    Args:
        plan: The run.
        folder: Its folder, open.
        kept: Its units.
        tracker: The page of a tracker that followed it.

    Returns:
        The content of `run.json`.

    Raises:
        RecordError: If a unit is not kept, or does not fit the folds.
    """
    spec, data = plan.spec, plan.data
    origins = [origin for origin in (plan.guarded, plan.start, plan.teachers) if origin is not None]
    before = [origin for origin in (plan.start, plan.teachers) if origin is not None]
    tuned = ["tuned"] if spec.tuned is not None and spec.tuned.folds_sha256 == plan.folds.sha256 else []
    marks = [*spec.marks, *(mark for origin in before for mark in origin.marks), *tuned]
    external: list[Any] = []
    for source in (source for origin in origins for source in origin.external):
        if source not in external:
            external.append(source)
    # Every seed of a fold has the same teachers, and so the same pseudo-labels.
    pseudo = {str(unit.fold): unit.info["n_pseudo"] for unit in kept if "n_pseudo" in unit.info}
    return folder.complete(
        plan.units(),
        folds=plan.folds,
        labels=plan.table.labels[rows_of(plan.table.ids, plan.folds.ids)],
        metric=plan.metric,
        sources=data.source[rows_of(data.ids, plan.folds.ids)] if data.competition.sources else None,
        info={
            "score_without_tta": _without_tta(kept),
            "tta_gain": tta_gain(kept),
            "parameters": kept[0].info["parameters"],
            "tta": list(spec.tta),
            "label_map": spec.label_map,
            "git": git_state(plan.root),
            "versions": versions(),
            "command": command_line(),
            "tracker": tracker,
            "external": external,
            "leak_guard": merged_guards([one.guard for one in origins], (spec.competition, *spec.clear_of)),
            "marks": list(dict.fromkeys(marks)),
            **({"n_pseudo": pseudo} if pseudo else {}),
        },
    )


def unit_done(unit: Unit) -> UnitDone:
    """The event that tells of a kept unit."""
    info = unit.info
    return UnitDone(unit.fold, unit.seed, info["score"], info["standard_error"], info["wall_s"])


def _without_tta(units: Sequence[Unit]) -> float | None:
    """Mean score of the units without test-time augmentation, each by the size of its fold."""
    pairs = [(unit.info["score_without_tta"], len(unit.val_ids)) for unit in units if len(unit.val_ids)]
    return sum(score * count for score, count in pairs) / sum(count for _, count in pairs) if pairs else None


def tta_gain(units: Sequence[Unit]) -> dict[str, float] | None:
    """What test-time augmentation adds to a unit, each by the size of its fold; None where some unit does not tell.

    Folds hold different images, so that their errors add up as squares; the seeds of a fold share its images, and their
    errors are taken to be one.
    """
    scored = [unit for unit in units if len(unit.val_ids)]
    if not scored or any(unit.info.get("tta_gain") is None for unit in scored):
        return None
    total = sum(len(unit.val_ids) for unit in scored)
    gain, errors = 0.0, dict.fromkeys((unit.fold for unit in scored), 0.0)
    for unit in scored:
        share = len(unit.val_ids) / total
        gain += share * unit.info["tta_gain"]["gain"]
        errors[unit.fold] += share * unit.info["tta_gain"]["standard_error"]
    return {"gain": gain, "standard_error": math.hypot(*errors.values())}


def _done(path: Path, record: dict[str, Any]) -> RunDone:
    run = load_run(path)
    if not len(run.ids):
        return RunDone(record, shown(path))
    table = per_class_table(run.labels, run.probs, run.classes)
    return RunDone(record, shown(path), table, confusion_matrix(run.labels, run.probs).tolist())
