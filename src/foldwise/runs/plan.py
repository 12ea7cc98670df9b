"""What a run will do, worked out before anything is trained: its data, its folds, its units and where they are kept.

A worker in another process or on another machine makes the same plan from the same few values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from foldwise.data.competition import Dataset, load_dataset
from foldwise.data.folds import Folds
from foldwise.errors import FoldwiseError
from foldwise.metrics import METRICS, Metric
from foldwise.records.store import Context, RunFolder
from foldwise.runs.crossval import Table, make_table, relabelled, smoke_table
from foldwise.runs.external import Guarded, guarded
from foldwise.runs.starting import Start, starting_point
from foldwise.runs.teachers import Teachers, find_teachers, stand_ins
from foldwise.spec.load import spec_yaml
from foldwise.spec.model import ExperimentSpec, resolved


@dataclass(frozen=True, eq=False)
class Plan:
    """An experiment, resolved against the data that lies here.

    Attributes:
        root: The project's root.
        spec: What is trained; that of a smoke run where it is one.
        split: Which split of folds.csv, from 0.
        smoke: Whether it is a smoke run.
        data: The competition.
        own: Its images, labels and folds, in the classes that the experiment learns.
        guarded: The same with what joins it from elsewhere, and what is not trained on.
        classes: These classes, in the order of their indices.
        metric: The competition's.
        folds: The split, or the two folds of a smoke run.
        context: What the predictions depend on besides the spec.
        start: Weights to start from; None where there are none.
        teachers: Runs to learn from, or what stands in for them in a smoke run; None where there are none.
    """

    root: Path
    spec: ExperimentSpec
    split: int
    smoke: bool
    data: Dataset
    own: Table
    guarded: Guarded
    classes: tuple[str, ...]
    metric: Metric
    folds: Folds
    context: Context
    start: Start | None
    teachers: Teachers | None

    @property
    def table(self) -> Table:
        """All rows that the experiment trains on or predicts, in the classes that it learns."""
        return self.guarded.joined

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.root / "oof" / (".smoke" if self.smoke else "") / self.spec.name

    def units(self, folds: tuple[int, ...] | None = None) -> list[tuple[int, int]]:
        """(fold, seed) in the order in which they run.

        Args:
            folds: Only these; None for all.

        Raises:
            FoldwiseError: If there is no such fold.
        """
        there = self.table.folds
        if unknown := sorted(set(folds or ()) - set(there)):
            raise FoldwiseError(
                f"there is no fold {unknown[0]}: `{self.spec.competition}` has folds {', '.join(map(str, there))}\n"
                "  fix: FOLDS=0,1"
            )
        return [(fold, seed) for fold in there if folds is None or fold in folds for seed in self.spec.seeds]

    def open(self, path: Path | None = None, *, fresh: bool = False) -> RunFolder:
        """Open the run's folder, or another one for the same run; see `RunFolder.open`."""
        return RunFolder.open(
            path or self.path,
            spec=resolved(self.spec),
            spec_yaml=spec_yaml(self.spec),
            context=self.context,
            fresh=fresh,
        )


def make_plan(
    root: Path,
    spec: ExperimentSpec,
    *,
    split: int = 0,
    smoke: bool = False,
    say: Callable[[str], None] = lambda _text: None,
) -> Plan:
    """Work out what a run will do.

    Args:
        root: The project's root.
        spec: The experiment.
        split: Which split of folds.csv, from 0.
        smoke: One epoch on 64 images in two folds.
        say: Takes a line where something is going to take its time.

    Raises:
        FoldwiseError: If the competition was not taken in, has no such split, or external data, starting weights or
            teachers will not do.
    """
    data = load_dataset(root, spec.competition, split=split)
    own, classes = relabelled(make_table(data), data.competition.classes, spec.label_map)
    folds = data.folds
    if smoke:
        spec, own = _smoke_spec(spec), smoke_table(own, spec.seeds[0])
        labelled = own.labels >= 0
        folds = Folds(own.ids[labelled], own.fold[labelled], own.group[labelled])
    start = starting_point(root, spec, data, smoke=smoke)
    joined = guarded(root, spec, data, own, smoke=smoke, say=say)
    teachers = _teachers(root, spec, data, joined.joined, classes, smoke=smoke)
    made_by = data.competition.split.model_dump(mode="json")
    context = Context(
        competition=spec.competition,
        classes=classes,
        split=made_by | ({"number": split} if split else {}),
        folds_sha256=folds.sha256,
        inputs_sha256=data.sha256,
        smoke=smoke,
        start_sha256=None if start is None else start.sha256,
        teachers_sha256=None if teachers is None else teachers.sha256,
        guard_sha256=joined.sha256,
    )
    metric = METRICS[data.competition.metric]
    return Plan(root, spec, split, smoke, data, own, joined, classes, metric, folds, context, start, teachers)


def with_spec(plan: Plan, spec: ExperimentSpec) -> Plan:
    """The same data under another spec of the same competition and classes, without reading the data again."""
    start = starting_point(plan.root, spec, plan.data, smoke=plan.smoke)
    joined = plan.guarded
    if (spec.external, spec.clear_of) != (plan.spec.external, plan.spec.clear_of):
        joined = guarded(plan.root, spec, plan.data, plan.own, smoke=plan.smoke)
    teachers = _teachers(plan.root, spec, plan.data, joined.joined, plan.classes, smoke=plan.smoke)
    context = replace(
        plan.context,
        start_sha256=None if start is None else start.sha256,
        teachers_sha256=None if teachers is None else teachers.sha256,
        guard_sha256=joined.sha256,
    )
    return replace(plan, spec=spec, guarded=joined, context=context, start=start, teachers=teachers)


def _teachers(
    root: Path, spec: ExperimentSpec, data: Dataset, table: Table, classes: tuple[str, ...], *, smoke: bool
) -> Teachers | None:
    # The two folds of a smoke run are no teacher's: whatever its units left out, they saw these labels.
    if smoke:
        return stand_ins(spec, data, table, classes)
    return find_teachers(root, spec, data, table, classes)


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
