"""What a run will do, worked out before anything is trained: its data, its folds, its units and where they are kept.

A worker in another process or on another machine makes the same plan from the same few values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from foldwise.data.competition import Dataset, load_dataset
from foldwise.data.folds import Folds
from foldwise.errors import FoldwiseError
from foldwise.metrics import METRICS, Metric
from foldwise.records.store import Context, RunFolder
from foldwise.runs.crossval import Table, make_table, relabelled, smoke_table
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
        table: Its images, labels and folds, in the classes that the experiment learns.
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
    table: Table
    classes: tuple[str, ...]
    metric: Metric
    folds: Folds
    context: Context
    start: Start | None
    teachers: Teachers | None

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


def make_plan(root: Path, spec: ExperimentSpec, *, split: int = 0, smoke: bool = False) -> Plan:
    """Work out what a run will do.

    Args:
        root: The project's root.
        spec: The experiment.
        split: Which split of folds.csv, from 0.
        smoke: One epoch on 64 images in two folds.

    Raises:
        FoldwiseError: If the competition was not taken in, has no such split, or starting weights or teachers will not
            do.
    """
    data = load_dataset(root, spec.competition, split=split)
    table, classes = relabelled(make_table(data), data.competition.classes, spec.label_map)
    folds = data.folds
    if smoke:
        spec, table = _smoke_spec(spec), smoke_table(table, spec.seeds[0])
        labelled = table.labels >= 0
        folds = Folds(table.ids[labelled], table.fold[labelled], table.group[labelled])
    start = starting_point(root, spec.model, data)
    teachers = _teachers(root, spec, data, table, classes, smoke=smoke)
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
    )
    metric = METRICS[data.competition.metric]
    return Plan(root, spec, split, smoke, data, table, classes, metric, folds, context, start, teachers)


def with_spec(plan: Plan, spec: ExperimentSpec) -> Plan:
    """The same data under another spec of the same competition and classes, without reading the data again."""
    start = starting_point(plan.root, spec.model, plan.data)
    teachers = _teachers(plan.root, spec, plan.data, plan.table, plan.classes, smoke=plan.smoke)
    context = replace(
        plan.context,
        start_sha256=None if start is None else start.sha256,
        teachers_sha256=None if teachers is None else teachers.sha256,
    )
    return replace(plan, spec=spec, context=context, start=start, teachers=teachers)


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
