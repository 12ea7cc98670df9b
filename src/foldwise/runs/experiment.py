"""One experiment from its spec to its sealed folder in `oof/`: what is kept is skipped, what is missing is trained.

Only here do cross-validation, the store and the followers of a run meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldwise.data.competition import load_dataset
from foldwise.data.folds import Folds
from foldwise.errors import FoldwiseError
from foldwise.learn.device import pick_runtime
from foldwise.metrics import METRICS, confusion_matrix, per_class_table
from foldwise.records.store import Context, RunFolder, Unit, load_run, rows_of, shown
from foldwise.runs.crossval import Table, make_table, relabelled, run_units, smoke_table
from foldwise.runs.events import Event, Listener, Message, RunDone, RunStarted, UnitDone
from foldwise.runs.provenance import command_line, git_state, versions
from foldwise.runs.starting import starting_point
from foldwise.spec.load import spec_yaml
from foldwise.spec.model import ExperimentSpec, resolved


@dataclass(frozen=True)
class Options:
    """What belongs to a call rather than to the experiment.

    Attributes:
        folds: Folds to run now, or None for all; the others are left for another call.
        smoke: One epoch on 64 images in two folds, kept apart from real runs.
        fresh: Delete what is there and begin anew.
        device: `cpu`, `cuda`, `mps` or None for the best there is.
    """

    folds: tuple[int, ...] | None = None
    smoke: bool = False
    fresh: bool = False
    device: str | None = None


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
    data = load_dataset(root, spec.competition)
    table, classes = relabelled(make_table(data), data.competition.classes, spec.label_map)
    path = root / "oof" / spec.name
    if options.smoke:
        spec, table, path = _smoke_spec(spec), smoke_table(table, spec.seeds[0]), root / "oof" / ".smoke" / spec.name
    start = starting_point(root, spec.model, data)
    runtime = pick_runtime(options.device, spec.train.precision, spec.train.threads)
    metric = METRICS[data.competition.metric]
    folds = _folds_of(table) if options.smoke else data.folds
    units = _units(table, spec, None)
    wanted = _units(table, spec, options.folds)
    context = Context(
        competition=spec.competition,
        classes=classes,
        split=data.competition.split.model_dump(mode="json"),
        folds_sha256=folds.sha256,
        inputs_sha256=data.sha256,
        smoke=options.smoke,
        start_sha256=None if start is None else start.sha256,
    )
    fresh = options.fresh or options.smoke
    with RunFolder.open(path, spec=resolved(spec), spec_yaml=spec_yaml(spec), context=context, fresh=fresh) as folder:
        listeners = [screen]

        def emit(event: Event) -> None:
            for listener in listeners:
                listener.on(event)

        try:
            if (record := folder.record) is not None:
                emit(Message(f"{spec.name} is complete and kept; FRESH=1 (--fresh) redoes it"))
                emit(_done(path, record))
                return record
            listeners.extend(follow(path))
            kept = {unit: found for unit in units if (found := folder.finished(*unit)) is not None}
            emit(
                RunStarted(
                    experiment=spec.name,
                    competition=spec.competition,
                    attempt=str(folder.attempt),
                    spec=resolved(spec),
                    metric=metric.name,
                    units=tuple(wanted),
                    finished=tuple(_unit_done(kept[unit]) for unit in wanted if unit in kept),
                    epochs=spec.train.epochs,
                    device=str(runtime),
                    smoke=options.smoke,
                )
            )
            for note in folder.notes:
                emit(Message(note))
            trained = run_units(
                spec,
                table,
                classes,
                metric.name,
                [unit for unit in wanted if unit not in kept],
                folder_of=folder.unit_path,
                runtime=runtime,
                emit=emit,
                start_weights=None if start is None else start.weights_of,
                new_head=start is not None and start.classes != classes,
            )
            for unit in trained:
                folder.save_unit(unit)
                kept[unit.fold, unit.seed] = unit
                emit(_unit_done(unit))
            if left := [unit for unit in units if unit not in kept]:
                names = ", ".join(str(fold) for fold in sorted({fold for fold, _ in left}))
                emit(Message(f"{len(kept)} of {len(units)} units are kept; still to run: folds {names}"))
                return None
            marks = [*spec.marks, *(start.marks if start else [])]
            record = folder.complete(
                units,
                folds=folds,
                labels=table.labels[rows_of(table.ids, folds.ids)],
                metric=metric,
                sources=data.source[rows_of(data.ids, folds.ids)] if data.competition.sources else None,
                info={
                    "score_without_tta": _without_tta(list(kept.values())),
                    "parameters": next(iter(kept.values())).info["parameters"],
                    "tta": list(spec.tta),
                    "label_map": spec.label_map,
                    "git": git_state(root),
                    "versions": versions(),
                    "command": command_line(),
                    "tracker": next((url for item in listeners if (url := getattr(item, "url", None))), None),
                    "external": start.external if start else [],
                    "marks": list(dict.fromkeys(marks)),
                },
            )
            emit(_done(path, record))
            return record
        finally:
            for listener in listeners:
                listener.close()


def _units(table: Table, spec: ExperimentSpec, folds: tuple[int, ...] | None) -> list[tuple[int, int]]:
    unknown = sorted(set(folds or ()) - set(table.folds))
    if unknown:
        raise FoldwiseError(
            f"there is no fold {unknown[0]}: `{spec.competition}` has folds {', '.join(map(str, table.folds))}\n"
            "  fix: FOLDS=0,1"
        )
    return [(fold, seed) for fold in table.folds if folds is None or fold in folds for seed in spec.seeds]


def _smoke_spec(spec: ExperimentSpec) -> ExperimentSpec:
    """The same experiment for one epoch, so that every part of it is seen to work."""
    return spec.model_copy(
        update={
            "seeds": spec.seeds[:1],
            "train": spec.train.model_copy(update={"epochs": 1, "freeze_backbone_epochs": 0}),
            "schedule": spec.schedule.model_copy(update={"warmup_epochs": 0.0}),
            "mix": spec.mix.model_copy(update={"off_epochs": 0}),
        }
    )


def _folds_of(table: Table) -> Folds:
    labelled = table.labels >= 0
    return Folds(table.ids[labelled], table.fold[labelled], table.group[labelled])


def _unit_done(unit: Unit) -> UnitDone:
    info = unit.info
    return UnitDone(unit.fold, unit.seed, info["score"], info["standard_error"], info["wall_s"])


def _without_tta(units: Sequence[Unit]) -> float | None:
    """Mean score of the units without test-time augmentation, each by the size of its fold."""
    pairs = [(unit.info["score_without_tta"], len(unit.val_ids)) for unit in units if len(unit.val_ids)]
    return sum(score * count for score, count in pairs) / sum(count for _, count in pairs) if pairs else None


def _done(path: Path, record: dict[str, Any]) -> RunDone:
    run = load_run(path)
    if not len(run.ids):
        return RunDone(record, shown(path))
    table = per_class_table(run.labels, run.probs, run.classes)
    return RunDone(record, shown(path), table, confusion_matrix(run.labels, run.probs).tolist())
