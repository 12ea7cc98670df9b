"""What happens in a run, as it happens: small frozen records that the live view, the log and the trackers listen to.

Whoever trains emits them; a listener must return at once and never raise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class UnitDone:
    """A unit is trained, predicted and stored.

    Attributes:
        fold: From 0.
        seed: Of every random choice.
        score: The metric on its fold, views averaged; None where no row is scored.
        standard_error: Of `score`.
        wall_s: Seconds it took, over all pieces of a resumed unit.
    """

    fold: int
    seed: int
    score: float | None
    standard_error: float | None
    wall_s: float


@dataclass(frozen=True)
class RunStarted:
    """A run begins or goes on.

    Attributes:
        experiment: Name of the run (the folder under `oof/`).
        competition: Name of the competition.
        attempt: Changes when the run is redone with `--fresh`, stays when it is resumed.
        spec: The resolved spec.
        metric: Name of the competition's metric, e.g. `accuracy`.
        units: All (fold, seed) of this call, in the order in which they run.
        finished: The units kept from before.
        epochs: Epochs of each unit.
        device: Where it runs, e.g. `cpu, 2 threads, bf16`.
        smoke: Whether this is a smoke run.
    """

    experiment: str
    competition: str
    attempt: str
    spec: dict[str, Any]
    metric: str
    units: tuple[tuple[int, int], ...]
    finished: tuple[UnitDone, ...]
    epochs: int
    device: str
    smoke: bool = False


@dataclass(frozen=True)
class UnitStarted:
    """One fold with one seed begins; `from_epoch` > 0 when it goes on from a checkpoint."""

    fold: int
    seed: int
    from_epoch: int
    train_images: int
    val_images: int


@dataclass(frozen=True)
class StepDone:
    """An optimizer step, emitted a few times a second at most; `epoch` counts from 1, `step` from 1 in its epoch."""

    fold: int
    seed: int
    epoch: int
    step: int
    steps: int


@dataclass(frozen=True)
class EpochDone:
    """An epoch; `row` is its line of history.csv: fold, seed, epoch (from 1), lr, train_loss, val_<metric>, ..."""

    fold: int
    seed: int
    epoch: int
    row: dict[str, float | int]


@dataclass(frozen=True)
class RunDone:
    """All units of the run are there and run.json is written.

    Attributes:
        info: The content of run.json.
        path: The run's folder, as a string.
        per_class: Rows of {class, precision, recall, f1, support}; empty where nothing is scored.
        confusion: (C, C) counts, rows true, columns predicted; empty where nothing is scored.
    """

    info: dict[str, Any]
    path: str
    per_class: list[dict[str, Any]] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Message:
    """A line for the user, e.g. from where a run goes on."""

    text: str


Stage = Literal["search", "seeds", "full"]
TrialState = Literal["complete", "pruned", "failed", "duplicate"]


@dataclass(frozen=True)
class TrialDone:
    """A trial of a study ended, well or not.

    Attributes:
        number: From 0, in the order in which the study asked for it; -1 of stage `seeds`.
        state: `pruned` was worse than the best before its last fold, `duplicate` drew what another trial has.
        parameters: Dotted key of the spec to its value.
        fold_scores: Fold to the metric on it, of the folds that were finished.
        score: The metric on all images of its folds together; None where no fold was finished.
        standard_error: Of `score`, over images.
        wall_s: Seconds that its folds took.
        stage: `search`; `seeds` is the own values under other seeds; `full` is a finalist re-run in full.
        reason: Why it was pruned or failed.
    """

    number: int
    state: TrialState
    parameters: dict[str, Any]
    fold_scores: dict[int, float]
    score: float | None
    standard_error: float | None
    wall_s: float
    stage: Stage = "search"
    reason: str = ""


@dataclass(frozen=True)
class TuneStarted:
    """A study begins or goes on.

    Attributes:
        experiment: Name of the tuned experiment.
        competition: Name of the competition.
        metric: Name of the competition's metric, e.g. `accuracy`.
        greater_is_better: Whether a larger score is the better one.
        trials: Distinct parameter sets wanted, those finished before included.
        finished: The trials of an earlier call, by number.
        folds: The folds of a complete trial, in the order in which they are trained.
        epochs: Epochs of each fold of a trial.
        device: Where it runs, e.g. `cpu, 2 threads, bf16`.
        executor: What trains the folds, e.g. `2 processes`.
        sampler: What draws the parameters, e.g. `tpe`.
        space: The search space, dotted key to its range or choices, as plain JSON types.
        own: The spec's own values of the parameters: the first trial.
        spec: The resolved spec.
        attempt: Changes when the study is redone with `--fresh`, stays when it is resumed.
    """

    experiment: str
    competition: str
    metric: str
    greater_is_better: bool
    trials: int
    finished: tuple[TrialDone, ...]
    folds: tuple[int, ...]
    epochs: int
    device: str
    executor: str
    sampler: str
    space: dict[str, Any]
    own: dict[str, Any]
    spec: dict[str, Any]
    attempt: str


@dataclass(frozen=True)
class TrialStarted:
    """A trial begins.

    Attributes:
        number: From 0, in the order in which the study asked for it.
        parameters: Dotted key of the spec to its value.
        folds: Those that it trains if it is not pruned, in this order.
        epochs: Epochs of each fold.
        stage: As in `TrialDone`.
        retry_of: The trial of the same parameters that was interrupted; None for a new one.
    """

    number: int
    parameters: dict[str, Any]
    folds: tuple[int, ...]
    epochs: int
    stage: Stage = "search"
    retry_of: int | None = None


@dataclass(frozen=True)
class TrialEvent:
    """Something happened in a unit of a trial."""

    number: int
    stage: Stage
    event: StepDone | UnitStarted | EpochDone | UnitDone | Message


@dataclass(frozen=True)
class TuneDone:
    """The study has its trials and its winner, and tune.json is written.

    Attributes:
        info: The content of tune.json.
        path: The study's folder, as a string.
        lines: The summary for the user.
    """

    info: dict[str, Any]
    path: str
    lines: tuple[str, ...]


RunEvent = RunStarted | UnitStarted | StepDone | EpochDone | UnitDone | RunDone | Message
TuneEvent = TuneStarted | TrialStarted | TrialEvent | TrialDone | TuneDone
Event = RunEvent | TuneEvent


class Listener(Protocol):
    """Something that follows a run or a study."""

    def on(self, event: Event) -> None:
        """Take note of an event; returns at once, never raises."""

    def close(self) -> None:
        """The run or study ended, well or not; called once."""
