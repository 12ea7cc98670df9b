"""What a run tells while it runs: one calm live view in a terminal, plain lines elsewhere, and a log file.

All three are listeners of `foldwise.runs.events`; the state that they show is kept once, in `Board`.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from foldwise.records.store import external_words
from foldwise.runs.events import (
    EpochDone,
    Event,
    Listener,
    Message,
    RunDone,
    RunStarted,
    StepDone,
    TrialDone,
    TrialEvent,
    TrialStarted,
    TuneDone,
    TuneStarted,
    UnitDone,
    UnitStarted,
)

REFRESHES_PER_S = 4
# Between two lines of epochs where the output is not a terminal, s.
QUIET_S = 10.0

Clock = Callable[[], float]
Unit = tuple[int, int]


@dataclass
class UnitState:
    """How far one unit is.

    Attributes:
        state: `kept` is finished before this call, `done` in it.
        epoch: Epochs behind it, those of an earlier call included.
        part: Share of the epoch under way that is done.
        row: The last epoch's figures.
        score: The metric on its fold; None while unknown or where nothing is scored.
        wall_s: Seconds that it took; None unless `done`.
    """

    state: Literal["waiting", "running", "kept", "done"] = "waiting"
    epoch: int = 0
    part: float = 0.0
    row: Mapping[str, float | int] = field(default_factory=dict)
    score: float | None = None
    standard_error: float | None = None
    wall_s: float | None = None


class Board:
    """The state of a run, put together from its events in whatever order they come.

    Attributes:
        started: The run's first event; None before it.
        units: (fold, seed) to its state, in the order in which they run.
        begun_at: When the run began, by the board's clock.
    """

    def __init__(self, clock: Clock) -> None:
        self.started: RunStarted | None = None
        self.units: dict[Unit, UnitState] = {}
        self._clock = clock
        self.begun_at = clock()
        self._training_since: float | None = None
        self._from_epochs: dict[Unit, int] = {}

    def take(self, event: Event) -> None:
        """Bring the state up to date."""
        match event:
            case RunStarted():
                self.started = event
                kept = {(unit.fold, unit.seed): unit for unit in event.finished}
                self.units = {
                    key: UnitState() for key in [*(key for key in kept if key not in event.units), *event.units]
                }
                for key, unit_done in kept.items():
                    self.units[key] = UnitState(
                        "kept", event.epochs, score=unit_done.score, standard_error=unit_done.standard_error
                    )
                self.begun_at, self._training_since = self._clock(), None
                self._from_epochs = {}
            case UnitStarted():
                if self._training_since is None:
                    self._training_since = self._clock()
                self._from_epochs[event.fold, event.seed] = event.from_epoch
                self.units[event.fold, event.seed] = UnitState("running", event.from_epoch)
            case StepDone():
                unit = self._unit(event)
                unit.epoch, unit.part = event.epoch - 1, event.step / max(1, event.steps)
            case EpochDone():
                unit = self._unit(event)
                unit.epoch, unit.part, unit.row = event.epoch, 0.0, event.row
            case UnitDone():
                unit = self._unit(event)
                unit.state, unit.part = "done", 0.0
                unit.score, unit.standard_error, unit.wall_s = event.score, event.standard_error, event.wall_s
            case _:
                pass

    def _unit(self, event: StepDone | EpochDone | UnitDone) -> UnitState:
        unit = self.units.setdefault((event.fold, event.seed), UnitState())
        unit.state = "running"
        return unit

    def draw(self, width: int, height: int) -> RenderableType:
        """Draw the state, as `frame` does."""
        return frame(self, width=width, height=height)

    def tell(self, event: Event) -> Sequence[str]:
        """Messages, and the lines that a run ends with."""
        match event:
            case Message():
                return [event.text]
            case RunDone():
                return closing(event)
            case _:
                return []

    def label(self, key: Unit) -> str:
        """`fold 0`, and its seed where the run has several."""
        fold, seed = key
        several = len({seed for _, seed in self.units}) > 1
        return f"fold {fold} seed {seed}" if several else f"fold {fold}"

    def figures(self, unit: UnitState) -> tuple[float | None, float | None]:
        """Training loss and validation metric of the last epoch; None where there is none."""
        metric = self.started.metric if self.started else ""
        return unit.row.get("train_loss"), unit.row.get(f"val_{metric}")

    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self.begun_at

    def left_s(self) -> float | None:
        """Seconds that all epochs to come will take at the pace so far; None before there is a pace."""
        epochs = self.started.epochs if self.started else 0
        trained = sum(
            self.units[key].epoch + self.units[key].part - first
            for key, first in self._from_epochs.items()
            if key in self.units
        )
        if self._training_since is None or trained <= 0:
            return None
        to_come = sum(
            max(0.0, epochs - unit.epoch - unit.part)
            for unit in self.units.values()
            if unit.state in ("waiting", "running")
        )
        return (self._clock() - self._training_since) / trained * to_come

    def score_line(self) -> str:
        """Mean of the finished units' scores and its standard error, e.g. `accuracy so far 0.61 +- 0.01`."""
        count = sum(unit.state in ("kept", "done") for unit in self.units.values())
        done = f"{count} of {len(self.units)} units done"
        scored = {key: (u.score, u.standard_error) for key, u in self.units.items() if u.score is not None}
        mean, error = mean_and_error(scored)
        if mean is None or self.started is None:
            return done
        spread = "" if error is None else f" +- {error:.4f}"
        return f"{done}, {self.started.metric} so far {mean:.4f}{spread}"


def duration(seconds: float) -> str:
    """`2:05` for 125 s, `1:00:00` for an hour."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def mean_and_error(
    scores: Mapping[Unit, tuple[float, float | None]],
) -> tuple[float | None, float | None]:
    """Mean of units' scores and its standard error.

    Folds hold different images, so that their errors are independent; the seeds of a fold share its images.

    Args:
        scores: (fold, seed) to the score and its standard error, None where that is unknown.

    Returns:
        The mean and its error over the finite scores; None for what cannot be said.
    """
    finite = {key: told for key, told in scores.items() if math.isfinite(told[0])}
    if not finite:
        return None, None
    folds: dict[int, list[float]] = {}
    for (fold, _), (_, error) in finite.items():
        if error is not None:
            folds.setdefault(fold, []).append(error)
    spread = math.hypot(*(sum(errors) / len(errors) for errors in folds.values())) / len(folds) if folds else None
    return sum(score for score, _ in finite.values()) / len(finite), spread


def opening(started: RunStarted) -> str:
    """The line that a run begins with: what, on which data, how much, where."""
    kept = f", {len(started.finished)} kept from before" if started.finished else ""
    units = len({*started.units, *((unit.fold, unit.seed) for unit in started.finished)})
    epochs = "1 epoch" if started.epochs == 1 else f"{started.epochs} epochs"
    return (
        f"{started.experiment} on {started.competition}{' (smoke run)' if started.smoke else ''}: "
        f"{units} {'unit' if units == 1 else 'units'} of {epochs}{kept}; {started.device}"
    )


def closing(event: RunDone) -> list[str]:
    """The lines that a run ends with: score, folds, sources, time, marks, place, and what to run next."""
    info: Mapping[str, Any] = event.info
    name = info.get("experiment", Path(event.path).name)
    crossed = (info.get("split") or {}).get("kind", "kfold") == "kfold"
    metric, score, error = info.get("metric", "score"), info.get("score"), info.get("standard_error")
    if score is None:
        lines = [f"{name}: trained, nothing held out to score"]
    else:
        spread = "" if error is None else f" +- {error:.4f} (standard error)"
        lines = [f"{name}: {'OOF' if crossed else 'held-out'} {metric} {score:.4f}{spread}"]
    if (test := info.get("test_score")) is not None:
        lines.append(f"  test part  {metric} {test:.4f} +- {info.get('test_standard_error') or 0:.4f}")
    if crossed and (scores := info.get("fold_scores")):
        errors = info.get("fold_standard_errors") or {}
        shown = [
            _number(score) + (f" +- {errors[fold]:.4f}" if fold in errors else "") for fold, score in scores.items()
        ]
        lines.append("  folds      " + ", ".join(shown))
    for source, told in (info.get("source_scores") or {}).items():
        told_score = f"{told['score']:.4f} +- {told['standard_error']:.4f}"
        lines.append(f"  source     {source}: {told_score}, {told['n_scored']:,} images")
    if label_map := info.get("label_map"):
        classes = info.get("classes", [])
        lines.append(f"  classes    {len(label_map)} merged into {len(classes)}: {', '.join(classes)}")
    if info.get("wall_s") is not None:
        lines.append(f"  wall time  {duration(info['wall_s'])}")
    if marks := info.get("marks"):
        lines.append("  marks      " + ", ".join(marks))
    if external := info.get("external"):
        lines.append("  external   " + ", ".join(external_words(external)))
    lines.append(f"  kept in    {event.path}")
    if info.get("smoke"):
        lines.append("  next       the same without SMOKE=1 (a smoke run's score means nothing)")
    elif crossed and not label_map:
        lines.append(f"  next       make submit COMP={info.get('competition', '')}")
    return lines


def frame(board: Board, *, width: int, height: int) -> RenderableType:
    """Draw a run's state: a header, a row a unit, and a footer with the time and the score so far.

    Args:
        board: The state.
        width: Columns of the terminal.
        height: Lines of the terminal; the drawing takes at most one less.
    """
    started = board.started
    if started is None:
        return Text("starting")
    head = Text(f"{started.experiment} on {started.competition}", style="bold", no_wrap=True, overflow="ellipsis")
    head.append(f"  {'smoke run, ' if started.smoke else ''}{started.device}", style="not bold dim")
    table = Table(box=None, expand=True, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    wide = width >= 90
    table.add_column("unit", no_wrap=True)
    table.add_column("", ratio=1, no_wrap=True)
    table.add_column("epoch", justify="right", no_wrap=True)
    table.add_column("train loss" if wide else "loss", justify="right", no_wrap=True)
    table.add_column(f"val {started.metric}" if wide else started.metric[:10], justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True, min_width=11)
    before, shown, after = _visible(board.units, room=height - 5)
    if before:
        table.add_row(f"{before} more", "", "", "", "", "done", style="dim")
    for key in shown:
        unit = board.units[key]
        loss, value = board.figures(unit)
        finished = unit.state in ("kept", "done")
        table.add_row(
            board.label(key),
            ProgressBar(total=max(1, started.epochs), completed=unit.epoch + unit.part, width=None),
            "" if unit.state == "kept" else f"{unit.epoch}/{started.epochs}",
            "" if loss is None else f"{loss:.4f}",
            "" if value is None else f"{value:.4f}",
            f"{unit.state} {_number(unit.score)}" if finished else unit.state,
            style="dim" if unit.state == "waiting" else "",
        )
    if after:
        table.add_row(f"{after} more", "", "", "", "", "unfinished", style="dim")
    left = board.left_s()
    clock = f"{duration(board.elapsed_s())} gone" + ("" if left is None else f", about {duration(left)} left")
    return Group(
        head,
        table,
        Text(clock, no_wrap=True, overflow="ellipsis"),
        Text(board.score_line(), no_wrap=True, overflow="ellipsis"),
    )


def _visible(units: Mapping[Unit, UnitState], room: int) -> tuple[int, list[Unit], int]:
    """The units that fit: the running ones first, then the last finished; and how many are left out either side."""
    keys = list(units)
    if len(keys) <= room:
        return 0, keys, 0
    running = [key for key in keys if units[key].state == "running"][: max(1, room - 2)]
    finished = [key for key in keys if units[key].state in ("kept", "done")]
    spare = max(0, room - 2 - len(running))
    last = finished[len(finished) - min(spare, len(finished)) :]
    before = len(finished) - len(last)
    return before, [*last, *running], len(keys) - before - len(last) - len(running)


class Shown(Protocol):
    """What a live view shows: a state that events change, and that can be drawn."""

    def take(self, event: Event) -> None:
        """Bring the state up to date."""

    def draw(self, width: int, height: int) -> RenderableType:
        """Draw it, in at most one line less than `height`."""

    def tell(self, event: Event) -> Sequence[str]:
        """Lines to print above the view, where they stay."""


class LiveView:
    """A listener that keeps one live view; the events change the board, a thread of rich's redraws it."""

    def __init__(self, console: Console, board: Shown) -> None:
        self._console = console
        self._board = board
        self._live: Live | None = None
        self._lock = threading.Lock()

    def on(self, event: Event) -> None:
        """Bring the view up to date; the first event of a run or a study opens it, its last one closes it."""
        with self._lock:
            self._board.take(event)
            lines = self._board.tell(event)
        # rich redraws under a lock of its own, so none of ours may be held from here on.
        with suppress(OSError, ValueError):
            if isinstance(event, RunStarted | TuneStarted) and self._live is None:
                self._live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=REFRESHES_PER_S)
                self._live.start(refresh=True)
            elif isinstance(event, RunDone | TuneDone):
                self.close()
            print_lines(self._console, *lines)

    def close(self) -> None:
        """Leave the view as it is."""
        live, self._live = self._live, None
        if live is not None:
            with suppress(OSError, ValueError):
                live.stop()

    def _draw(self) -> RenderableType:
        with self._lock:
            return self._board.draw(self._console.width, self._console.height)


class _PlainLines:
    """A line now and then, for files, pipes and build servers."""

    def __init__(self, console: Console, clock: Clock) -> None:
        self._console = console
        self._clock = clock
        self._board = Board(clock)
        self._last_line_at = float("-inf")
        self._untold: EpochDone | None = None

    def on(self, event: Event) -> None:
        self._board.take(event)
        with suppress(OSError, ValueError):
            print_lines(self._console, *self._lines(event))

    def close(self) -> None:
        """Nothing is open."""

    def _lines(self, event: Event) -> Sequence[str]:
        board = self._board
        match event:
            case RunStarted():
                return [opening(event)]
            case UnitStarted():
                since = f" from epoch {event.from_epoch + 1}" if event.from_epoch else ""
                self._last_line_at = float("-inf")
                return [
                    f"{board.label((event.fold, event.seed))}: trains on {event.train_images} images{since}, "
                    f"{event.val_images} held out"
                ]
            case EpochDone():
                last = board.started is not None and event.epoch >= board.started.epochs
                if not last and self._clock() - self._last_line_at < QUIET_S:
                    self._untold = event
                    return []
                return [self._epoch_line(event)]
            case UnitDone():
                lines = []
                if self._untold is not None and (self._untold.fold, self._untold.seed) == (event.fold, event.seed):
                    lines.append(self._epoch_line(self._untold))
                error = "" if event.standard_error is None else f" +- {event.standard_error:.4f}"
                score = "trained" if event.score is None else f"score {event.score:.4f}{error}"
                label = board.label((event.fold, event.seed))
                return [*lines, f"{label}: {score} in {duration(event.wall_s)}; {board.score_line()}"]
            case RunDone():
                return closing(event)
            case Message():
                return [event.text]
            case _:
                return []

    def _epoch_line(self, event: EpochDone) -> str:
        self._last_line_at, self._untold = self._clock(), None
        board = self._board
        loss, value = board.figures(UnitState(row=event.row))
        epochs = board.started.epochs if board.started else event.epoch
        left = board.left_s()
        metric = board.started.metric if board.started else "metric"
        return (
            f"{board.label((event.fold, event.seed))}: epoch {event.epoch:>{len(str(epochs))}}/{epochs}  "
            f"train loss {_number(loss)}  val {metric} {_number(value)}  {duration(board.elapsed_s())} gone"
            + ("" if left is None else f", about {duration(left)} left")
        )


def print_lines(console: Console, *lines: str) -> None:
    """Print lines as they are, brackets and all, however long."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def progress_listener(console: Console, *, clock: Clock = time.monotonic) -> Listener:
    """Show a run on a console: a live view in a terminal, plain lines without control codes elsewhere.

    The live view is redrawn four times a second and fits the terminal; `CI` set in the environment,
    or a terminal that cannot move its cursor, makes it plain lines. Plain lines come about every ten
    seconds, and for the first and the last epoch of a unit.

    Args:
        console: Where to write.
        clock: Seconds from any origin.
    """
    return LiveView(console, Board(clock)) if is_live(console) else _PlainLines(console, clock)


def is_live(console: Console) -> bool:
    """Whether a console can hold a live view, and nobody asked for plain lines with `CI`."""
    automated = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return console.is_terminal and not console.is_dumb_terminal and not automated


class _Log:
    """A time-stamped line an event, on disk as soon as it happened."""

    def __init__(self, path: Path, now: Callable[[], datetime]) -> None:
        self._now = now
        self._file: TextIO | None = None
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", buffering=1)

    def on(self, event: Event) -> None:
        if self._file is None:
            return
        stamp = self._now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with suppress(OSError, ValueError):
            for line in _log_lines(event):
                self._file.write(f"{stamp} {line}\n")

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


def _log_lines(event: Event) -> Sequence[str]:
    match event:
        case RunStarted():
            return [opening(event)]
        case UnitStarted():
            return [
                f"fold {event.fold} seed {event.seed}: starts, from_epoch={event.from_epoch} "
                f"train_images={event.train_images} val_images={event.val_images}"
            ]
        case EpochDone():
            row = {name: value for name, value in event.row.items() if name not in ("fold", "seed", "epoch")}
            figures = " ".join(f"{name}={value:.6g}" for name, value in row.items())
            return [f"fold {event.fold} seed {event.seed} epoch {event.epoch}: {figures}"]
        case UnitDone():
            return [f"fold {event.fold} seed {event.seed}: done, score={event.score} wall_s={event.wall_s:.1f}"]
        case RunDone():
            return closing(event)
        case Message():
            return event.text.splitlines()
        case StepDone():
            return []
        case TuneStarted():
            space = " ".join(f"{key}={json.dumps(entry)}" for key, entry in event.space.items())
            return [
                f"{event.experiment}: study, attempt={event.attempt} sampler={event.sampler} trials={event.trials} "
                f"finished={len(event.finished)} folds={_joined(event.folds)} epochs={event.epochs} "
                f"device={event.device} executor={event.executor} space: {space}"
            ]
        case TrialStarted():
            again = "" if event.retry_of is None else f" retry_of={event.retry_of}"
            values = " ".join(f"{key}={json.dumps(value)}" for key, value in event.parameters.items())
            return [
                f"trial {event.number} {event.stage}: starts, folds={_joined(event.folds)} "
                f"epochs={event.epochs}{again} {values}"
            ]
        case TrialEvent():
            return [f"trial {event.number} {event.stage}: {line}" for line in _log_lines(event.event)]
        case TrialDone():
            told = (
                f"trial {event.number} {event.stage}: {event.state}, score={event.score} "
                f"standard_error={event.standard_error} wall_s={event.wall_s:.1f}"
            )
            return [told, *event.reason.splitlines()]
        case TuneDone():
            return event.lines


def _joined(folds: Sequence[int]) -> str:
    return ",".join(map(str, folds))


def log_listener(path: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Listener:
    """Append every event but the steps to a text file, a line each, stamped with the time in UTC.

    A resumed run goes on at the end of its log. A log that cannot be written is left out in silence:
    what it would hold is in `history.csv` and `run.json` too.

    Args:
        path: `oof/<exp>/run.log`; its folder is made where it is absent.
        now: The present time.
    """
    return _Log(path, now)
