"""What a study tells: one calm live view in a terminal, plain lines elsewhere, and Optuna's plots when it is over.

The view and the lines are listeners of `foldwise.runs.events`; the state that they show is kept once, in `TuneBoard`.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import optuna
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.category import StrCategoryLocator
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState as OptunaState
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from foldwise.files import atomic_path
from foldwise.runs.events import (
    EpochDone,
    Event,
    Listener,
    Message,
    Stage,
    StepDone,
    TrialDone,
    TrialEvent,
    TrialStarted,
    TrialState,
    TuneDone,
    TuneStarted,
    UnitDone,
    UnitStarted,
)
from foldwise.show.plots import DPI, FAINT, GRAY, INK, short
from foldwise.show.progress import Clock, LiveView, duration, is_live, mean_and_error, print_lines
from foldwise.spec.yaml import flow_text

# Between two plain lines while a fold is trained, s; the ends of folds and trials are always told.
SILENCE_S = 60.0
BEST_SHOWN, LAST_SHOWN = 3, 5
# Panels of the slices beside each other.
SLICE_COLUMNS = 4
# Characters of a choice in a picture.
LABEL_LENGTH = 22
# Last parts of keys that say nothing alone.
BARE = ("p", "prob", "name")

Key = tuple[Stage, int]
Unit = tuple[int, int]


@dataclass
class TrialRow:
    """How far one trial is.

    Attributes:
        folds: Those that it trains if nothing stops it.
        epochs: Of a unit.
        seeds: Units of a fold.
        units: (fold, seed) of the finished ones to their score and its standard error.
        under_way: (fold, seed) of those in training to the epochs behind them, with the part of the one under way.
        from_epochs: The same to the epochs of it that an earlier call had trained.
        fold_scores: Of the folds that it finished; None while it runs.
        score: Mean of its folds; None while it runs, or where there is none.
        error: Standard error of `score`.
        trained: Units that this call trained for it, but for those under way.
    """

    number: int
    stage: Stage
    parameters: Mapping[str, Any]
    folds: tuple[int, ...] = ()
    epochs: int = 1
    seeds: int = 1
    state: Literal["running"] | TrialState = "running"
    units: dict[Unit, tuple[float | None, float | None]] = field(default_factory=dict)
    under_way: dict[Unit, float] = field(default_factory=dict)
    from_epochs: dict[Unit, int] = field(default_factory=dict)
    fold_scores: Mapping[int, float] | None = None
    score: float | None = None
    error: float | None = None
    trained: float = 0.0

    @property
    def label(self) -> str:
        """`7`; `7 full` is the finalist re-run in full, `seeds` the own values under other seeds."""
        return {"search": str(self.number), "seeds": "seeds", "full": f"{self.number} full"}[self.stage]

    @property
    def finished_folds(self) -> int:
        """Folds that are trained with every seed."""
        if self.fold_scores is not None:
            return len(self.fold_scores)
        folds = [fold for fold, _ in self.units]
        return sum(folds.count(fold) >= self.seeds for fold in set(folds))

    @property
    def progress(self) -> float:
        """Folds behind it, with the part of those under way."""
        now = sum(epoch / max(1, self.epochs) for epoch in self.under_way.values())
        return min(float(len(self.folds)), (len(self.units) + now) / max(1, self.seeds))

    @property
    def pace(self) -> float:
        """Folds that this call trained for it, with the part of those under way."""
        now = sum(epoch - self.from_epochs.get(unit, 0) for unit, epoch in self.under_way.items())
        return (self.trained + max(0.0, now) / max(1, self.epochs)) / max(1, self.seeds)

    def so_far(self) -> tuple[float | None, float | None]:
        """Its score and the standard error; while it runs, those of the units behind it."""
        if self.state != "running":
            return self.score, self.error
        return mean_and_error(
            {unit: (score, error) for unit, (score, error) in self.units.items() if score is not None}
        )

    def advance(self, event: Event) -> None:
        """Take note of what happened in one of its units; what comes after its end is left out."""
        if self.state != "running":
            return
        match event:
            case UnitStarted(fold, seed, from_epoch):
                self.under_way[fold, seed] = self.from_epochs[fold, seed] = from_epoch
            case StepDone(fold, seed, epoch, step, steps):
                self.under_way[fold, seed] = epoch - 1 + step / max(1, steps)
            case EpochDone(fold, seed, epoch):
                self.under_way[fold, seed] = epoch
            case UnitDone(fold, seed):
                self.units[fold, seed] = event.score, event.standard_error
                if self.under_way.pop((fold, seed), None) is not None:
                    self.trained += max(0.0, 1 - self.from_epochs.get((fold, seed), 0) / max(1, self.epochs))
            case _:
                pass

    def end(self, event: TrialDone) -> None:
        """Take note of its end."""
        self.trained = self.pace * self.seeds
        self.under_way = {}
        self.state, self.parameters, self.fold_scores = event.state, event.parameters, event.fold_scores
        self.score, self.error = event.score, event.standard_error


class TuneBoard:
    """The state of a study, put together from its events in whatever order they come.

    Attributes:
        started: The study's first event; None before it.
        rows: (stage, number) to the trial's state, in the order in which the trials began.
        ended: Keys of the trials that ended, in that order.
    """

    def __init__(self, clock: Clock) -> None:
        self.started: TuneStarted | None = None
        self.rows: dict[Key, TrialRow] = {}
        self.ended: list[Key] = []
        self._clock = clock
        self._begun_at = clock()
        self._since: dict[Stage, float] = {}
        self._names: dict[str, str] = {}

    def take(self, event: Event) -> None:
        """Bring the state up to date."""
        match event:
            case TuneStarted():
                self.started, self._begun_at = event, self._clock()
                self.rows, self.ended, self._since = {}, [], {}
                self._names = brief_names(event.space)
                for trial in event.finished:
                    self._end(trial)
            case TrialStarted():
                self._since.setdefault(event.stage, self._clock())
                row = self._row(event)
                row.parameters, row.folds, row.epochs = event.parameters, event.folds, event.epochs
            case TrialEvent():
                self._row(event).advance(event.event)
            case TrialDone():
                self._end(event)
            case _:
                pass

    def _row(self, event: TrialStarted | TrialEvent | TrialDone) -> TrialRow:
        started = self.started
        if started is None:
            blank = TrialRow(event.number, event.stage, {})
        else:
            seeds = len(started.spec.get("seeds", (0,)))
            blank = TrialRow(event.number, event.stage, {}, started.folds, started.epochs, seeds)
        return self.rows.setdefault((event.stage, event.number), blank)

    def _end(self, event: TrialDone) -> None:
        self._row(event).end(event)
        key = event.stage, event.number
        if key not in self.ended:
            self.ended.append(key)

    def draw(self, width: int, height: int) -> RenderableType:
        """Draw the state, as `tuning_frame` does."""
        return tuning_frame(self, width=width, height=height)

    def tell(self, event: Event) -> Sequence[str]:
        """Messages, and the lines that a study ends with."""
        match event:
            case Message():
                return [event.text]
            case TrialEvent(event=Message() as message):
                return [f"{self.name(event.stage, event.number)}: {message.text}"]
            case TuneDone():
                return event.lines
            case _:
                return []

    @staticmethod
    def name(stage: Stage, number: int) -> str:
        """`trial 7`, `trial 7 in full`, or `own values, other seeds`."""
        return {"search": f"trial {number}", "seeds": "own values, other seeds", "full": f"trial {number} in full"}[
            stage
        ]

    def values(self, parameters: Mapping[str, Any]) -> str:
        """What a trial has other than the spec: `lr 0.00032, arch resnet18`; `own values` where nothing is."""
        own = {} if self.started is None else self.started.own
        told = [
            f"{self._names.get(key, key)} {brief_value(value)}"
            for key, value in parameters.items()
            if key not in own or own[key] != value
        ]
        return ", ".join(told) or "own values"

    def running(self) -> list[TrialRow]:
        """The trials that are not over."""
        return [row for row in self.rows.values() if row.state == "running"]

    def searched(self, *states: TrialState) -> list[TrialRow]:
        """The last trial of the search for each parameter set, of those that ended so; in the order of their ends."""
        found: dict[str, TrialRow] = {}
        for key in self.ended:
            row = self.rows[key]
            if row.stage == "search" and row.state != "duplicate":
                name = _identity(row)
                found.pop(name, None)
                found[name] = row
        return [row for row in found.values() if row.state in states]

    def best(self) -> list[TrialRow]:
        """The complete trials of the search, the best first."""
        scored = [row for row in self.searched("complete") if row.score is not None and math.isfinite(row.score)]
        sign = -1 if self.started is None or self.started.greater_is_better else 1
        return sorted(scored, key=lambda row: sign * (row.score or 0.0))

    def elapsed_s(self) -> float:
        """Seconds since the study began or went on."""
        return self._clock() - self._begun_at

    def left_s(self) -> tuple[float, Stage] | None:
        """Seconds that the stage under way will still take at its pace so far, and which stage that is.

        A trial to come is taken to train as many folds as those of the search did in the mean, pruned ones included;
        the re-runs of finalists are counted once they run.

        Returns:
            None before there is a pace, and where nothing runs.
        """
        if self.started is None:
            return None
        running = self.running()
        ended = self.searched("complete", "pruned", "failed")
        to_start = max(0, self.started.trials - len(ended) - sum(row.stage == "search" for row in running))
        stages = {row.stage for row in running}
        stage: Stage = "full" if "full" in stages else "search" if to_start or "search" in stages else "seeds"
        trained = sum(row.pace for row in self.rows.values() if row.stage == stage)
        if not (running or to_start) or stage not in self._since or trained <= 0:
            return None
        tried = [row.finished_folds for row in ended if row.state != "failed"]
        usual = sum(tried) / len(tried) if tried else len(self.started.folds)
        here = [row for row in running if row.stage == stage]
        folds = sum(max(0.0, len(row.folds) - row.progress) for row in here)
        if stage == "search":
            folds += to_start * usual
        return (self._clock() - self._since[stage]) / trained * folds, stage

    def count_line(self) -> str:
        """`8 of 30 parameter sets, 3 pruned; 17 fold-trainings done, 7 spared`."""
        if self.started is None:
            return ""
        ended = self.searched("complete", "pruned", "failed")
        pruned = [row for row in ended if row.state == "pruned"]
        failed = sum(row.state == "failed" for row in ended)
        spared = sum(len(row.folds) - row.finished_folds for row in pruned)
        trained = [row for row in self.rows.values() if row.stage == "search" and row.state != "duplicate"]
        done = sum(row.finished_folds for row in trained)
        return (
            f"{len(ended)} of {self.started.trials} parameter sets, {len(pruned)} pruned"
            + (f", {failed} failed" if failed else "")
            + f"; {done} fold-trainings done, {spared} spared"
        )

    def time_line(self) -> str:
        """`12:00 gone, about 31:00 left for the search`."""
        gone = f"{duration(self.elapsed_s())} gone"
        left = self.left_s()
        if left is None:
            return gone
        what = {"search": "the search", "seeds": "the other seeds", "full": "the full re-runs under way"}[left[1]]
        return f"{gone}, about {duration(left[0])} left for {what}"

    def best_line(self) -> str:
        """`best accuracy so far 0.6312 +- 0.0098 (trial 3, chosen among 8)`; empty while nothing is complete.

        Pruned trials were chosen among too: the more there were, the more the best one's score flatters it.
        """
        best = self.best()
        if not best or self.started is None:
            return ""
        among = len(self.searched("complete", "pruned"))
        own = ", own values" if self.started is not None and best[0].parameters == self.started.own else ""
        score = told_score(best[0].score, best[0].error)
        return f"best {self.started.metric} so far {score} (trial {best[0].number}{own}, chosen among {among})"


def _identity(row: TrialRow) -> str:
    return json.dumps(row.parameters, sort_keys=True, default=str)


def brief_names(keys: Collection[str]) -> dict[str, str]:
    """The shortest ends of dotted keys that tell them apart: `optim.lr` is `lr`, `augment.1.Affine.p` is `Affine.p`."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        others = [f".{other}" for other in keys if other != key]
        names[key] = next(
            (
                end
                for end in ends
                if not (end[0].isdigit() or end in BARE) and not any(other.endswith(f".{end}") for other in others)
            ),
            key,
        )
    return names


def brief_value(value: Any) -> str:
    """A value on one line, numbers to three digits: `0.00032`, `resnet18`, `{name: adamw, lr: 0.001}`."""
    return f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else flow_text(value)


def told_score(score: float | None, error: float | None) -> str:
    """`0.6123 +- 0.0100`, without the error where it is unknown, `-` without a score."""
    if score is None:
        return "-"
    return f"{score:.4f}" + ("" if error is None else f" +- {error:.4f}")


def tuning_frame(board: TuneBoard, *, width: int, height: int) -> RenderableType:
    """Draw a study's state: a header, the running trials, the best and the last ones, and a footer.

    Args:
        board: The state.
        width: Columns of the terminal.
        height: Lines of the terminal; the drawing takes at most one less.
    """
    started = board.started
    if started is None:
        return Text("starting")
    head = Text(f"{started.experiment} on {started.competition}", style="bold", no_wrap=True, overflow="ellipsis")
    head.append(f"  tuned by {started.sampler}, {started.executor}, {started.device}", style="not bold dim")
    footer = [line for line in (board.count_line(), board.time_line(), board.best_line()) if line]
    foot = [Text(line, no_wrap=True, overflow="ellipsis") for line in footer]
    room = height - 3 - len(foot)
    running = board.running()
    shown = running if len(running) <= room else running[: max(0, room - 1)]
    table = _table(width, bars=True)
    for row in shown:
        table.add_row(*_running_cells(board, row, width))
    if len(shown) < len(running) and room > 0:
        table.add_row("", f"{len(running) - len(shown)} more are running", style="dim")
    parts: list[RenderableType] = [head, table]
    room -= len(shown) + (len(shown) < len(running))
    best = board.best()[: min(BEST_SHOWN, max(0, (room - 2) // 2 if room >= 4 else room - 1))]
    room -= len(best) + 1 if best else 0
    last = [board.rows[key] for key in board.ended][::-1][: min(LAST_SHOWN, max(0, room - 1))]
    for title, rows in (("best so far", best), ("last finished", last)):
        if rows:
            below = _table(width, bars=False)
            for row in rows:
                state = Text(row.state, style={"complete": "green", "failed": "red"}.get(row.state, "dim"))
                folds = f"{row.finished_folds}/{len(row.folds)}"
                score = told_score(row.score, row.error)
                below.add_row(row.label, board.values(row.parameters), folds, score, state)
            parts += [Text(title, style="dim", no_wrap=True, overflow="ellipsis"), below]
    return Group(*parts, *foot)


def _table(width: int, *, bars: bool) -> Table:
    """A table of trials; with and without `bars` the columns at the right stand below each other."""
    table = Table(box=None, width=width, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim", show_header=bars)
    table.add_column("trial", no_wrap=True, width=7)
    table.add_column("parameters", no_wrap=True, overflow="ellipsis", ratio=1)
    if bars and _bar_width(width):
        table.add_column("", no_wrap=True, width=_bar_width(width))
    table.add_column("fold", justify="right", no_wrap=True, width=5)
    table.add_column("score", no_wrap=True, width=17)
    table.add_column("state", no_wrap=True, width=12)
    return table


def _bar_width(width: int) -> int:
    return 0 if width < 70 else 8 if width < 100 else 20


def _running_cells(board: TuneBoard, row: TrialRow, width: int) -> list[RenderableType]:
    bar = ProgressBar(total=max(1, len(row.folds)), completed=row.progress, width=_bar_width(width))
    now = next(iter(row.under_way.values()), None)
    return [
        row.label,
        board.values(row.parameters),
        *([bar] if _bar_width(width) else []),
        f"{min(len(row.folds), row.finished_folds + (now is not None))}/{len(row.folds)}",
        told_score(*row.so_far()) if row.units else "",
        "waiting" if now is None else f"epoch {math.floor(now)}/{row.epochs}",
    ]


class _PlainTuning:
    """A line now and then, for files, pipes and build servers."""

    def __init__(self, console: Console, clock: Clock) -> None:
        self._console = console
        self._clock = clock
        self._board = TuneBoard(clock)
        self._last_line_at = clock()

    def on(self, event: Event) -> None:
        self._board.take(event)
        if lines := self._lines(event):
            self._last_line_at = self._clock()
            with suppress(OSError, ValueError):
                print_lines(self._console, *lines)

    def close(self) -> None:
        """Nothing is open."""

    def _lines(self, event: Event) -> Sequence[str]:
        board = self._board
        match event:
            case TuneStarted():
                return [tuning_opening(event)]
            case TrialStarted():
                values = f"{len(event.folds)} folds" if event.stage == "seeds" else board.values(event.parameters)
                again = "" if event.retry_of is None else f" (trial {event.retry_of} again)"
                return [f"{board.name(event.stage, event.number)}{again}: {values}"]
            case TrialEvent(event=UnitDone() as unit):
                row = board.rows[event.stage, event.number]
                seed = f" seed {unit.seed}" if row.seeds > 1 else ""
                place = f"fold {unit.fold}{seed}, {row.finished_folds} of {len(row.folds)}"
                score = "trained" if unit.score is None else told_score(unit.score, unit.standard_error)
                return [f"{board.name(event.stage, event.number)}: {place}: {score} in {duration(unit.wall_s)}"]
            case TrialEvent(event=EpochDone() as epoch) if self._clock() - self._last_line_at >= SILENCE_S:
                row = board.rows[event.stage, event.number]
                place = f"fold {epoch.fold}, epoch {epoch.epoch}/{row.epochs}"
                return [f"{board.name(event.stage, event.number)}: {place}; {board.time_line()}"]
            case TrialDone():
                return self._ending(event)
            case _:
                return board.tell(event)

    def _ending(self, event: TrialDone) -> list[str]:
        board = self._board
        name = board.name(event.stage, event.number)
        reason = f": {event.reason}" if event.reason else ""
        match event.state:
            case "complete":
                metric = board.started.metric if board.started else "score"
                score = f"{metric} {told_score(event.score, event.standard_error)}"
                line = f"{name}: complete, {score} in {duration(event.wall_s)}{reason}"
            case "pruned":
                folds = f"after {len(event.fold_scores)} of {len(board.rows[event.stage, event.number].folds)} folds"
                line = f"{name}: pruned, {event.reason or folds}"
            case "failed":
                line = f"{name}: failed{reason}"
            case "duplicate":
                return [f"{name}: was tried before{reason}"]
        if event.stage != "search":
            return [line]
        footer = [text for text in (board.count_line(), board.best_line(), board.time_line()) if text]
        return [line, "  " + "; ".join(footer)]


def tuning_opening(started: TuneStarted) -> str:
    """The line that a study begins with: what, on which data, how much, where."""
    folds = "1 fold" if len(started.folds) == 1 else f"{len(started.folds)} folds"
    epochs = "1 epoch" if started.epochs == 1 else f"{started.epochs} epochs"
    kept = sum(trial.state != "duplicate" for trial in started.finished)
    before = f", {kept} kept from before" if kept else ""
    return (
        f"{started.experiment} on {started.competition}: {started.sampler} tunes {len(started.space)} "
        f"{'parameter' if len(started.space) == 1 else 'parameters'}, {started.trials} sets of {folds} of {epochs}"
        f"{before}; {started.executor}; {started.device}"
    )


def tuning_listener(console: Console, *, clock: Clock = time.monotonic) -> Listener:
    """Show a study on a console: a live view in a terminal, plain lines without control codes elsewhere.

    Which of them is decided as for a run. The live view fits the terminal; plain lines tell the beginning and the end
    of every trial and the end of every fold, and come at the end of an epoch after a minute of silence.

    Args:
        console: Where to write.
        clock: Seconds from any origin.
    """
    return LiveView(console, TuneBoard(clock)) if is_live(console) else _PlainTuning(console, clock)


# Optuna's plots -------------------------------------------------------------------------------------------------------

# A picture's file name to its title.
PLOTS = {
    "history": "Scores in the order of the trials",
    "importances": "What the scores depend on",
    "slice": "Scores by parameter",
    "parallel_coordinate": "Scores and parameters, a line each trial",
}
_FUNCTIONS = {"history": "plot_optimization_history", "importances": "plot_param_importances"}


def write_plots(study: optuna.Study, folder: Path, metric: str = "score") -> list[str]:
    """Draw Optuna's own plots of a study: `history`, `importances`, `slice` and `parallel_coordinate`.

    Each is written as a page, `<name>.html`, and as a picture, `<name>.png`. The pages need no network: they share
    `plotly.min.js`, which is put beside them. Names of parameters and choices are cut to what tells them apart. The
    importances are those of PED-ANOVA (Watanabe, Bansal and Hutter 2023, "PED-ANOVA: Efficiently Quantifying
    Hyperparameter Importance in Arbitrary Subspaces").

    Args:
        study: The study; of its complete trials those are drawn that are no duplicates (`fate` among their attributes).
        folder: Where to; made where it is absent.
        metric: What the study's values are, for the axes.

    Returns:
        A line for each plot that cannot be drawn, with the reason; empty where all are drawn.
    """
    count = sum(map(_drawn, study.get_trials(deepcopy=False)))
    if count < 2:
        return [f"plots: they need two complete trials, but the study has {count}"]
    folder.mkdir(parents=True, exist_ok=True)
    notes = []
    with _quiet():
        brief = _brief_study(study)
        for name, title in PLOTS.items():
            try:
                _write_page(folder / f"{name}.html", name, brief, f"{title} ({count} complete trials)", metric)
                _write_picture(folder / f"{name}.png", name, brief, f"{title} ({count} complete trials)", metric)
            except (ValueError, RuntimeError, UserWarning) as error:
                notes.append(f"plots: Optuna cannot draw {name} ({str(error).rstrip('.')})")
    return notes


def _drawn(trial: optuna.trial.FrozenTrial) -> bool:
    complete = trial.state == OptunaState.COMPLETE and trial.user_attrs.get("fate") != "duplicate"
    return complete and trial.value is not None and math.isfinite(trial.value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's warnings from the user; that importances mean nothing is raised instead."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", message=r".*importance of the parameter may be inaccurate")
            warnings.filterwarnings("ignore", message=r"Attempting to set identical low and high", category=UserWarning)
            warnings.filterwarnings("error", message=r".*importances will be equal", category=UserWarning)
            warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from", category=UserWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _brief_study(study: optuna.Study) -> optuna.Study:
    """A copy of the study in memory, its parameters and choices called by names that fit into a picture."""
    trials = study.get_trials(deepcopy=False)
    names = brief_names({key for trial in trials for key in trial.params})
    brief = optuna.create_study(direction=study.direction, storage=optuna.storages.InMemoryStorage())
    labels: dict[str, dict[Any, Any]] = {}
    for trial in trials:
        done = _drawn(trial)
        params, distributions = {}, {}
        for key, value in trial.params.items() if done else ():
            distribution = trial.distributions[key]
            if isinstance(distribution, CategoricalDistribution):
                known = labels.setdefault(key, _brief_choices(distribution.choices))
                distribution = CategoricalDistribution(list(known.values()))
                value = known[value]
            params[names[key]], distributions[names[key]] = value, distribution
        # The others keep its place, so that every trial has its number.
        brief.add_trial(
            optuna.create_trial(
                state=trial.state if done else OptunaState.FAIL,
                value=trial.value if done else None,
                params=params,
                distributions=distributions,
            )
        )
    return brief


def _brief_choices(choices: Sequence[Any]) -> dict[Any, Any]:
    brief: dict[Any, Any] = {}
    for choice in choices:
        label = short(choice, LABEL_LENGTH) if isinstance(choice, str) else choice
        if label in brief.values():
            label = f"{short(choice, LABEL_LENGTH - 4)} ({len(brief) + 1})"
        brief[choice] = label
    return brief


def _write_page(path: Path, name: str, study: optuna.Study, title: str, metric: str) -> None:
    figure = getattr(optuna.visualization, _FUNCTIONS.get(name, f"plot_{name}"))(study, target_name=metric)
    figure.update_layout(title_text=title, template="plotly_white")
    with atomic_path(path) as temporary:
        figure.write_html(temporary, include_plotlyjs="directory")


def _write_picture(path: Path, name: str, study: optuna.Study, title: str, metric: str) -> None:
    with mpl.rc_context():
        plt.switch_backend("agg")
        mpl.rcdefaults()
        mpl.rcParams["figure.constrained_layout.use"] = name != "history"  # which asks for a tight one itself
        plot = getattr(optuna.visualization.matplotlib, _FUNCTIONS.get(name, f"plot_{name}"))
        try:
            drawn = np.ravel(plot(study, target_name=metric))
            figure = drawn[0].figure
            for axes in figure.axes:
                _restyle(axes)
            _LAYOUTS[name](figure, list(drawn))
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
        finally:
            plt.close("all")


def _restyle(axes: Axes) -> None:
    """Make Optuna's axes look like the other pictures."""
    for place in ("left", "center", "right"):
        axes.set_title("", loc=place)
    axes.set_facecolor("none")
    axes.tick_params(colors=GRAY, labelcolor=INK, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9)
    axes.spines[:].set(color=GRAY, linewidth=0.8)


def _lay_out_history(figure: Figure, drawn: list[Axes]) -> None:
    (axes,) = drawn
    figure.set_size_inches(7.5, 4.2)
    figure.set_layout_engine("constrained")
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(labels=["a trial", "best so far"], frameon=False, fontsize=8, loc="best")


def _lay_out_importances(figure: Figure, drawn: list[Axes]) -> None:
    (axes,) = drawn
    figure.set_size_inches(7.5, 1.3 + 0.36 * len(axes.get_yticks()))
    axes.grid(visible=False)
    axes.set(xlabel="importance", ylabel="")
    axes.margins(x=0.12)
    if (legend := axes.get_legend()) is not None:
        legend.remove()
    for text in axes.texts:
        text.set(fontsize=8, text=f" {text.get_text()}")


def _lay_out_slice(figure: Figure, drawn: list[Axes]) -> None:
    columns = min(SLICE_COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure.set_size_inches(max(5.0, 1.2 + 2.7 * columns), 0.6 + 2.9 * rows)
    grid = figure.add_gridspec(rows, columns)
    (colours,) = (axes for axes in figure.axes if axes not in drawn)
    colours.set_ylabel("trial")
    colours.yaxis.set_major_locator(MaxNLocator(integer=True))
    for place, axes in enumerate(drawn):
        axes.set_subplotspec(grid[place // columns, place % columns])
        axes.grid(color=FAINT, linewidth=0.6)
        axes.tick_params(labelleft=place % columns == 0)
        axes.yaxis.label.set_visible(place % columns == 0)
        axes.set_xlabel(_wrapped(axes.get_xlabel()))
        if axes.get_xscale() == "log":  # the labels between the decades run into each other
            axes.xaxis.set_minor_formatter(NullFormatter())
        if isinstance(axes.xaxis.get_major_locator(), StrCategoryLocator):
            labels = [label.get_text().strip("'") for label in axes.get_xticklabels()]
            axes.set_xticks(axes.get_xticks(), labels)
            if max(map(len, labels)) > 12 or sum(map(len, labels)) > 24:
                axes.set_xticks(axes.get_xticks(), labels, rotation=30, ha="right", rotation_mode="anchor", fontsize=7)


def _lay_out_parallel(figure: Figure, drawn: list[Axes]) -> None:
    (axes,) = drawn
    names = [_wrapped(label.get_text(), 18) for label in axes.get_xticklabels()]
    figure.set_size_inches(2.2 + 1.55 * len(names), 4.8)
    axes.set_xticks(axes.get_xticks(), names, rotation=0, fontsize=8)
    axes.tick_params(axis="x", length=0, pad=8)
    for other in figure.axes:
        for label in [*other.get_yticklabels(), *other.get_yticklabels(minor=True)]:
            if other is not axes:
                label.set(fontsize=7, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8})


def _wrapped(name: str, width: int = 26) -> str:
    """A dotted name in lines of about `width` characters, broken behind dots and underscores."""
    lines = [""]
    for part in re.split(r"(?<=[._])", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


_LAYOUTS = {
    "history": _lay_out_history,
    "importances": _lay_out_importances,
    "slice": _lay_out_slice,
    "parallel_coordinate": _lay_out_parallel,
}
