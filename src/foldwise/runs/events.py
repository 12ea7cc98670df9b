"""What happens in a run, as it happens: small frozen records that the live view, the log and the trackers listen to.

`crossval` emits them; a listener must return at once and never raise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


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


Event = RunStarted | UnitStarted | StepDone | EpochDone | UnitDone | RunDone | Message


class Listener(Protocol):
    """Something that follows a run."""

    def on(self, event: Event) -> None:
        """Take note of an event; returns at once, never raises."""

    def close(self) -> None:
        """The run ended, well or not; called once."""
