"""What a run tells: the plain lines to the letter, the live view at every size, the log, and any order of events."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from foldwise.runs.events import (
    EpochDone,
    Event,
    Listener,
    Message,
    RunDone,
    RunStarted,
    StepDone,
    UnitDone,
    UnitStarted,
)
from foldwise.show.progress import Board, duration, frame, log_listener, progress_listener

INFO = {
    "experiment": "vit",
    "competition": "aspicv",
    "metric": "accuracy",
    "score": 0.61234,
    "standard_error": 0.0094,
    "fold_scores": {"0": 0.6, "1": 0.62, "2": 0.617},
    "split": {"kind": "kfold"},
    "marks": ["optimistic"],
    "wall_s": 3725.0,
    "smoke": False,
}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def epoch(fold: int, number: int, seed: int = 42) -> EpochDone:
    row = {
        "fold": fold,
        "seed": seed,
        "epoch": number,
        "lr": 0.001,
        "train_loss": 2 / number,
        "val_accuracy": 0.5 + 0.01 * number,
    }
    return EpochDone(fold, seed, number, row)


def scripted(clock: Clock) -> Iterator[Event]:
    """Three folds of four epochs, 6 s each; the first is kept from before, the last goes on from epoch 2."""
    units = ((0, 42), (1, 42), (2, 42))
    yield RunStarted(
        "vit", "aspicv", "a", {}, "accuracy", units, (UnitDone(0, 42, 0.6, 0.02, 25.0),), 4, "cpu, 2 threads"
    )
    yield Message("goes on from fold 1 [brackets stay]")
    for fold, first, score in ((1, 0, 0.62), (2, 2, 0.617)):
        yield UnitStarted(fold, 42, first, 180, 90)
        for number in range(first + 1, 5):
            for step in (1, 2):
                clock.now += 3
                yield StepDone(fold, 42, number, step, 2)
            yield epoch(fold, number)
        clock.now += 1
        yield UnitDone(fold, 42, score, 0.02, 25.0)
    yield RunDone(INFO, "oof/vit", [], [])


def plain(events: Iterator[Event], clock: Clock) -> str:
    out = StringIO()
    listener = progress_listener(Console(file=out, force_terminal=False), clock=clock)
    for event in events:
        listener.on(event)
    listener.close()
    return out.getvalue()


def test_plain_lines_to_the_letter() -> None:
    clock = Clock()
    assert plain(scripted(clock), clock) == (
        "vit on aspicv: 3 units of 4 epochs, 1 kept from before; cpu, 2 threads\n"
        "goes on from fold 1 [brackets stay]\n"
        "fold 1: trains on 180 images, 90 held out\n"
        "fold 1: epoch 1/4  train loss 2.0000  val accuracy 0.5100  0:06 gone, about 0:42 left\n"
        "fold 1: epoch 3/4  train loss 0.6667  val accuracy 0.5300  0:18 gone, about 0:30 left\n"
        "fold 1: epoch 4/4  train loss 0.5000  val accuracy 0.5400  0:24 gone, about 0:24 left\n"
        "fold 1: score 0.6200 +- 0.0200 in 0:25; 2 of 3 units done, accuracy so far 0.6100 +- 0.0141\n"
        "fold 2: trains on 180 images from epoch 3, 90 held out\n"
        "fold 2: epoch 3/4  train loss 0.6667  val accuracy 0.5300  0:31 gone, about 0:06 left\n"
        "fold 2: epoch 4/4  train loss 0.5000  val accuracy 0.5400  0:37 gone, about 0:00 left\n"
        "fold 2: score 0.6170 +- 0.0200 in 0:25; 3 of 3 units done, accuracy so far 0.6123 +- 0.0115\n"
        "vit: OOF accuracy 0.6123 +- 0.0094 (standard error)\n"
        "  folds      0.6000, 0.6200, 0.6170\n"
        "  wall time  1:02:05\n"
        "  marks      optimistic\n"
        "  kept in    oof/vit\n"
        "  next       make submit COMP=aspicv\n"
    )


def test_a_long_run_is_told_every_ten_seconds_and_an_early_stop_at_its_end() -> None:
    clock = Clock()

    def events() -> Iterator[Event]:
        yield RunStarted("vit", "aspicv", "a", {}, "accuracy", ((0, 42),), (), 1000, "cpu")
        yield UnitStarted(0, 42, 0, 180, 90)
        for number in range(1, 48):
            clock.now += 1
            yield epoch(0, number)
        yield UnitDone(0, 42, 0.6, None, 47.0)

    told = [
        int(line.split("epoch")[1].split("/")[0]) for line in plain(events(), clock).splitlines() if "epoch " in line
    ]
    assert told == [1, 11, 21, 31, 41, 47]


def test_no_score_no_submission() -> None:
    clock = Clock()
    info = INFO | {"score": None, "standard_error": None, "fold_scores": {}, "marks": [], "split": {"kind": "full"}}
    assert plain(iter([RunDone(info, "oof/vit")]), clock) == (
        "vit: trained, nothing held out to score\n  wall time  1:02:05\n  kept in    oof/vit\n"
    )


def test_a_held_out_part_merged_classes_and_sources_are_told_for_what_they_are() -> None:
    info = INFO | {
        "split": {"kind": "column"},
        "fold_scores": {"0": 0.6123},
        "marks": [],
        "test_score": 0.59,
        "test_standard_error": 0.02,
        "source_scores": {"web": {"score": 0.6, "standard_error": 0.03, "n_scored": 1200}},
        "label_map": {"angry": "bad", "happy": "good", "sad": "bad"},
        "classes": ["bad", "good"],
    }
    assert plain(iter([RunDone(info, "oof/vit")]), Clock()) == (
        "vit: held-out accuracy 0.6123 +- 0.0094 (standard error)\n"
        "  test part  accuracy 0.5900 +- 0.0200\n"
        "  source     web: 0.6000 +- 0.0300, 1,200 images\n"
        "  classes    3 merged into 2: bad, good\n"
        "  wall time  1:02:05\n"
        "  kept in    oof/vit\n"
    )


def test_a_smoke_run_says_so() -> None:
    clock = Clock()
    started = RunStarted("vit", "aspicv", "a", {}, "accuracy", ((0, 42),), (), 1, "cpu", smoke=True)
    lines = plain(iter([started, RunDone(INFO | {"smoke": True}, "oof/.smoke/vit")]), clock).splitlines()
    assert lines[0] == "vit on aspicv (smoke run): 1 unit of 1 epoch; cpu"
    assert lines[-1] == "  next       the same without SMOKE=1 (a smoke run's score means nothing)"


@pytest.mark.parametrize(("environment", "live"), [({}, True), ({"CI": "true"}, False), ({"TERM": "dumb"}, False)])
def test_only_a_real_terminal_gets_control_codes(
    environment: dict[str, str], live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    clock, out = Clock(), StringIO()
    listener = progress_listener(Console(file=out, force_terminal=True, width=80, height=24), clock=clock)
    for event in scripted(clock):
        listener.on(event)
    listener.close()
    assert ("\x1b[" in out.getvalue()) == live


@pytest.mark.parametrize("height", [10, 24])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_live_view_ends_with_all_units_and_the_same_final_lines(width: int, height: int) -> None:
    clock = Clock()
    console = Console(file=StringIO(), force_terminal=True, record=True, width=width, height=height)
    listener = progress_listener(console, clock=clock)
    for event in scripted(clock):
        listener.on(event)
    listener.close()
    text = console.export_text()
    last = text[text.rindex("vit on aspicv") :].splitlines()
    words = [line.split() for line in last]
    assert words[2][-2:] == ["kept", "0.6000"]
    assert words[3][-5:] == ["4/4", "0.5000", "0.5400", "done", "0.6200"]
    assert words[4][-5:] == ["4/4", "0.5000", "0.5400", "done", "0.6170"]
    assert last[6].strip() == "3 of 3 units done, accuracy so far 0.6123 +- 0.0115"
    assert last[-1] == "  next       make submit COMP=aspicv"
    assert text.count("goes on from fold 1 [brackets stay]") == 1


@pytest.mark.parametrize("height", [10, 24])
@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(("folds", "seeds", "finished"), [(1, 1, 0), (5, 1, 2), (5, 3, 7), (10, 10, 50), (5, 5, 24)])
def test_the_view_fits_the_terminal(width: int, height: int, folds: int, seeds: int, finished: int) -> None:
    clock = Clock()
    board = Board(clock)
    units = tuple((fold, seed) for seed in range(seeds) for fold in range(folds))
    name = "a" * 80
    kept = tuple(UnitDone(fold, seed, 0.5, 0.02, 9.0) for fold, seed in units[:finished])
    board.take(RunStarted(name, "aspicv", "a", {}, "accuracy", units, kept, 300, "d" * 90))
    running = units[finished]
    board.take(UnitStarted(*running, 0, 180, 90))
    clock.now += 3
    board.take(epoch(running[0], 200, running[1]))
    console = Console(file=StringIO(), force_terminal=True, record=True, width=width, height=height)
    console.print(frame(board, width=width, height=height))
    lines = console.export_text().splitlines()
    assert len(lines) <= height - 1
    assert max(len(line) for line in lines) <= width
    (row,) = [line for line in lines if "running" in line]
    assert "200/300" in row
    assert row.startswith(board.label(running))
    hidden = sum(int(line.split()[0]) for line in lines if " more " in line)
    shown = sum(line.startswith("fold ") for line in lines)
    assert hidden + shown == len(units)


def test_time_left_counts_the_epochs_of_all_units_at_the_pace_of_this_call() -> None:
    clock = Clock()
    board = Board(clock)
    units = ((0, 1), (1, 1), (2, 1))
    board.take(RunStarted("vit", "aspicv", "a", {}, "accuracy", units, (UnitDone(0, 1, 0.5, 0.03, 9.0),), 10, "cpu"))
    assert board.left_s() is None
    clock.now += 50
    board.take(UnitStarted(1, 1, 6, 180, 90))
    clock.now += 8
    board.take(epoch(1, 8, seed=1))
    assert board.left_s() == pytest.approx(4 * (2 + 10))
    clock.now += 2
    board.take(StepDone(1, 1, 9, 50, 100))
    assert board.left_s() == pytest.approx(4 * (1.5 + 10))
    assert board.elapsed_s() == pytest.approx(60)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3600, "1:00:00"), (-3, "0:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_log_holds_every_event_but_the_steps_and_goes_on_when_resumed(tmp_path: Path) -> None:
    path = tmp_path / "oof" / "vit" / "run.log"
    east = timezone(timedelta(hours=2))
    for hour in (12, 13):
        clock = Clock()
        listener = log_listener(path, now=lambda hour=hour: datetime(2026, 1, 2, hour, 4, 5, tzinfo=east))
        events = list(scripted(clock))
        for event in events[:6]:
            listener.on(event)
            if not isinstance(event, StepDone):
                assert path.read_text().count("\n") > 0, "a line waits in a buffer"
        listener.close()
        listener.on(events[0])
    half = (
        "2026-01-02T{hour}:04:05Z vit on aspicv: 3 units of 4 epochs, 1 kept from before; cpu, 2 threads\n"
        "2026-01-02T{hour}:04:05Z goes on from fold 1 [brackets stay]\n"
        "2026-01-02T{hour}:04:05Z fold 1 seed 42: starts, from_epoch=0 train_images=180 val_images=90\n"
        "2026-01-02T{hour}:04:05Z fold 1 seed 42 epoch 1: lr=0.001 train_loss=2 val_accuracy=0.51\n"
    )
    assert path.read_text() == half.format(hour=10) + half.format(hour=11)


def test_a_log_that_cannot_be_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    listener = log_listener(tmp_path / "file" / "run.log")
    listener.on(Message("lost"))
    listener.close()


def test_a_closed_output_does_not_stop_the_run() -> None:
    clock, out = Clock(), StringIO()
    listener = progress_listener(Console(file=out, force_terminal=False), clock=clock)
    out.close()
    for event in scripted(clock):
        listener.on(event)


def test_scores_that_are_not_finite_are_left_out_of_the_mean() -> None:
    scores = enumerate((float("nan"), float("inf"), 0.5, 0.7))
    finished = tuple(UnitDone(fold, 1, score, 0.03, 9.0) for fold, score in scores)
    board = Board(Clock())
    board.take(RunStarted("vit", "aspicv", "a", {}, "log_loss", (), finished, 10, "cpu"))
    assert board.score_line() == "4 of 4 units done, log_loss so far 0.6000 +- 0.0212"


small = st.integers(-1, 3)
finite = st.floats(-1e6, 1e6)
rows = st.dictionaries(st.sampled_from(["train_loss", "val_accuracy", "lr", "epoch"]), st.floats() | st.integers())
keys = st.tuples(small, small)
units_done = st.builds(UnitDone, small, small, st.none() | st.floats(), st.none() | st.floats(), finite)
events = st.one_of(
    st.builds(
        RunStarted,
        experiment=st.just("vit"),
        competition=st.just("aspicv"),
        attempt=st.just("a"),
        spec=st.just({}),
        metric=st.just("accuracy"),
        units=st.lists(keys, max_size=4).map(tuple),
        finished=st.lists(units_done, max_size=2).map(tuple),
        epochs=st.integers(0, 3),
        device=st.text(max_size=5),
        smoke=st.booleans(),
    ),
    st.builds(UnitStarted, small, small, small, small, small),
    st.builds(StepDone, small, small, small, small, small),
    st.builds(EpochDone, small, small, small, rows),
    units_done,
    st.builds(RunDone, st.sampled_from([{}, INFO, INFO | {"score": None, "fold_scores": {}}]), st.just("oof/vit")),
    st.builds(Message, st.text(max_size=10)),
)


@settings(max_examples=60)
@given(st.lists(events, max_size=12), st.floats(0, 5))
def test_no_order_of_events_raises(sequence: list[Event], pace: float) -> None:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        listeners: list[Listener] = [
            progress_listener(Console(file=StringIO(), force_terminal=True, width=60, height=10), clock=clock),
            progress_listener(Console(file=StringIO(), force_terminal=False), clock=clock),
            log_listener(Path(folder) / "run.log", now=lambda: datetime(2026, 1, 1, tzinfo=UTC)),
        ]
        board = Board(clock)
        for event in sequence:
            clock.now += pace
            for listener in listeners:
                listener.on(event)
            board.take(event)
            Console(file=StringIO(), width=60).print(frame(board, width=60, height=10))
        for listener in listeners:
            listener.close()
