"""What a study tells: plain lines to the letter, the live view at every size, any order of events, and the plots."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from foldwise.runs.events import (
    EpochDone,
    Event,
    Message,
    StepDone,
    TrialDone,
    TrialEvent,
    TrialStarted,
    TuneDone,
    TuneStarted,
    UnitDone,
    UnitStarted,
)
from foldwise.show.progress import log_listener
from foldwise.show.tuning import (
    LABEL_LENGTH,
    PLOTS,
    TuneBoard,
    _brief_study,
    brief_names,
    tuning_frame,
    tuning_listener,
    write_plots,
)

SPACE = {"optim.lr": {"low": 1e-5, "high": 1e-2, "log": True}, "model.arch": {"choices": ["resnet18", "vit_tiny"]}}
OWN = {"optim.lr": 0.001, "model.arch": "resnet18"}
SMALL = {"optim.lr": 0.00032, "model.arch": "resnet18"}
VIT = {"optim.lr": 0.02, "model.arch": "vit_tiny"}


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


def started(finished: tuple[TrialDone, ...] = (), trials: int = 4, seeds: tuple[int, ...] = (42,)) -> TuneStarted:
    return TuneStarted(
        "vit",
        "aspicv",
        "accuracy",
        True,
        trials,
        finished,
        (0, 1, 2),
        2,
        "cpu, 2 threads",
        "this process",
        "tpe",
        SPACE,
        OWN,
        {"seeds": list(seeds)},
        "a",
    )


def fold(clock: Clock, number: int, of: int, score: float, stage: Any = "search", seed: int = 42) -> Iterator[Event]:
    """A fold of two epochs, 5 s each."""
    yield TrialEvent(number, stage, UnitStarted(of, seed, 0, 180, 90))
    for epoch in (1, 2):
        clock.now += 5
        yield TrialEvent(number, stage, StepDone(of, seed, epoch, 2, 2))
        yield TrialEvent(number, stage, EpochDone(of, seed, epoch, {"train_loss": 1.0, "val_accuracy": score}))
    yield TrialEvent(number, stage, UnitDone(of, seed, score, 0.03, 10.0))


def complete(number: int, parameters: dict[str, Any], scores: list[float], **more: Any) -> TrialDone:
    mean = sum(scores) / len(scores)
    state = more.pop("state", "complete")
    return TrialDone(number, state, parameters, dict(enumerate(scores)), mean, 0.0173, 10.0 * len(scores), **more)


def scripted(clock: Clock) -> Iterator[Event]:
    """Trial 0 is kept; 1 is pruned after a fold, 2 fails, 3 is interrupted and repeated as 4; then a finalist."""
    yield started((complete(0, OWN, [0.5, 0.52, 0.54]),))
    yield TrialStarted(1, VIT, (0, 1, 2), 2)
    yield from fold(clock, 1, 0, 0.31)
    yield TrialDone(1, "pruned", VIT, {0: 0.31}, 0.31, 0.03, 10.0, reason="after fold 0: -0.19 to the best")
    yield TrialDone(2, "failed", OWN | {"optim.lr": 9.0}, {}, None, None, 0.0, reason="the loss is nan")
    yield TrialStarted(4, SMALL, (0, 1, 2), 2, retry_of=3)
    yield TrialEvent(4, "search", Message("goes on from fold 1 [brackets stay]"))
    for of, score in enumerate([0.6, 0.61, 0.62]):
        yield from fold(clock, 4, of, score)
    yield complete(4, SMALL, [0.6, 0.61, 0.62])
    yield TrialStarted(4, SMALL, (0,), 2, stage="full")
    yield from fold(clock, 4, 0, 0.63, "full")
    yield complete(4, SMALL, [0.63], stage="full")
    yield TuneDone({}, "oof/vit/tune", ("vit: tuned", "  lr 0.00032"))


def plain(events: Iterable[Event], clock: Clock) -> str:
    out = StringIO()
    listener = tuning_listener(Console(file=out, force_terminal=False), clock=clock)
    for event in events:
        listener.on(event)
    listener.close()
    return out.getvalue()


def text_of(board: TuneBoard, width: int = 140, height: int = 50) -> str:
    console = Console(file=StringIO(), width=width, height=height, force_terminal=False)
    console.print(tuning_frame(board, width=width, height=height))
    return console.file.getvalue()  # type: ignore[attr-defined]


def board_of(events: Iterable[Event], clock: Clock | None = None) -> TuneBoard:
    board = TuneBoard(clock or Clock())
    for event in events:
        board.take(event)
    return board


def test_plain_lines_to_the_letter() -> None:
    clock = Clock()
    assert plain(scripted(clock), clock) == (
        "vit on aspicv: tpe tunes 2 parameters, 4 sets of 3 folds of 2 epochs, 1 kept from before; this process; "
        "cpu, 2 threads\n"
        "trial 1: lr 0.02, arch vit_tiny\n"
        "trial 1: fold 0, 1 of 3: 0.3100 +- 0.0300 in 0:10\n"
        "trial 1: pruned, after fold 0: -0.19 to the best\n"
        "  2 of 4 parameter sets, 1 pruned; 4 fold-trainings done, 2 spared; best accuracy so far 0.5200 +- 0.0173 "
        "(trial 0, own values, chosen among 2); 0:10 gone, about 0:40 left for the search\n"
        "trial 2: failed: the loss is nan\n"
        "  3 of 4 parameter sets, 1 pruned, 1 failed; 4 fold-trainings done, 2 spared; best accuracy so far 0.5200 "
        "+- 0.0173 (trial 0, own values, chosen among 2); 0:10 gone, about 0:20 left for the search\n"
        "trial 4 (trial 3 again): lr 0.00032\n"
        "trial 4: goes on from fold 1 [brackets stay]\n"
        "trial 4: fold 0, 1 of 3: 0.6000 +- 0.0300 in 0:10\n"
        "trial 4: fold 1, 2 of 3: 0.6100 +- 0.0300 in 0:10\n"
        "trial 4: fold 2, 3 of 3: 0.6200 +- 0.0300 in 0:10\n"
        "trial 4: complete, accuracy 0.6100 +- 0.0173 in 0:30\n"
        "  4 of 4 parameter sets, 1 pruned, 1 failed; 7 fold-trainings done, 2 spared; best accuracy so far 0.6100 "
        "+- 0.0173 (trial 4, chosen among 3); 0:40 gone\n"
        "trial 4 in full: lr 0.00032\n"
        "trial 4 in full: fold 0, 1 of 1: 0.6300 +- 0.0300 in 0:10\n"
        "trial 4 in full: complete, accuracy 0.6300 +- 0.0173 in 0:10\n"
        "vit: tuned\n"
        "  lr 0.00032\n"
    )


def test_a_long_fold_is_told_once_a_minute() -> None:
    clock = Clock()

    def events() -> Iterator[Event]:
        yield started()
        yield TrialStarted(0, OWN, (0, 1, 2), 100)
        yield TrialEvent(0, "search", UnitStarted(0, 42, 0, 180, 90))
        for epoch in range(1, 31):
            clock.now += 10
            yield TrialEvent(0, "search", EpochDone(0, 42, epoch, {}))

    lines = plain(events(), clock).splitlines()
    assert [line.split(";")[0] for line in lines[2:]] == [
        f"trial 0: fold 0, epoch {epoch}/100" for epoch in (6, 12, 18, 24, 30)
    ]


def test_the_log_holds_a_line_an_event_but_for_steps(tmp_path: Path) -> None:
    listener = log_listener(tmp_path / "tune.log")
    clock = Clock()
    events = list(scripted(clock))
    for event in events:
        listener.on(event)
    listener.close()
    lines = (tmp_path / "tune.log").read_text().splitlines()
    steps = sum(isinstance(event, TrialEvent) and isinstance(event.event, StepDone) for event in events)
    reasons = sum(isinstance(event, TrialDone) and bool(event.reason) for event in events)
    assert len(lines) == len(events) - steps + reasons + 1  # the last event tells two lines
    assert lines[1].endswith('Z trial 1 search: starts, folds=0,1,2 epochs=2 optim.lr=0.02 model.arch="vit_tiny"')


@pytest.mark.parametrize(("width", "height"), [(140, 40), (80, 24), (40, 10)])
def test_live_view_ends_with_the_trials_and_the_same_final_lines(width: int, height: int) -> None:
    out, clock = StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=width, height=height, legacy_windows=False)
    listener = tuning_listener(console, clock=clock)
    for event in scripted(clock):
        listener.on(event)
    listener.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert shown.endswith("vit: tuned\n  lr 0.00032\n")
    assert "trial 4: goes on from fold 1 [brackets stay]\n" in shown
    assert "best so far" in shown


@settings(max_examples=60)
@given(
    st.integers(20, 200), st.integers(5, 60), st.integers(0, 12), st.integers(0, 30), st.sampled_from(["vit", "x" * 90])
)
def test_the_view_fits_the_terminal(width: int, height: int, running: int, ended: int, arch: str) -> None:
    events: list[Event] = [started(tuple(complete(n, VIT | {"optim.lr": n / 7}, [0.5] * 3) for n in range(ended)))]
    for number in range(ended, ended + running):
        parameters = {"optim.lr": number / 7, "model.arch": arch}
        events += [TrialStarted(number, parameters, (0, 1, 2), 2), *fold(Clock(), number, 0, 0.5)]
    lines = text_of(board_of(events), width, height).splitlines()
    assert len(lines) < max(height, 7)
    assert max(map(len, lines)) <= width


def test_a_running_trial_shows_its_fold_its_epoch_and_what_it_has_so_far() -> None:
    clock = Clock()
    board = board_of(
        [
            started((complete(0, OWN, [0.5, 0.52, 0.54]),)),
            TrialStarted(1, SMALL, (0, 1, 2), 2),
            *fold(clock, 1, 0, 0.6),
            TrialEvent(1, "search", UnitStarted(1, 42, 0, 180, 90)),
            TrialEvent(1, "search", EpochDone(1, 42, 1, {})),
        ],
        clock,
    )
    (line,) = [line for line in text_of(board).splitlines() if "lr 0.00032" in line]
    assert line.split()[:3] == ["1", "lr", "0.00032"]
    assert line.split()[-6:] == ["2/3", "0.6000", "+-", "0.0300", "epoch", "1/2"]
    assert board.rows["search", 1].progress == pytest.approx(1.5)


def test_a_fold_of_two_seeds_is_finished_with_the_second() -> None:
    clock = Clock()
    events = [started(seeds=(42, 43)), TrialStarted(0, OWN, (0, 1, 2), 2), *fold(clock, 0, 0, 0.6)]
    board = board_of(events, clock)
    row = board.rows["search", 0]
    assert (row.finished_folds, row.progress, row.pace) == (0, 0.5, 0.5)
    for event in fold(clock, 0, 0, 0.62, seed=43):
        board.take(event)
    assert (row.finished_folds, row.progress, row.pace) == (1, 1.0, 1.0)
    mean, error = row.so_far()
    assert (mean, error) == (pytest.approx(0.61), pytest.approx(0.03)), "the seeds of a fold share its images"


def test_units_that_end_after_their_trial_was_pruned_change_nothing() -> None:
    clock = Clock()
    events = list(scripted(clock))
    board, late = board_of(events[:-1], clock), fold(clock, 1, 1, 0.9)
    before = board.count_line(), board.best_line(), board.rows["search", 1].units
    for event in late:
        board.take(event)
    assert (board.count_line(), board.best_line(), board.rows["search", 1].units) == before


def test_parameter_sets_count_once_and_the_best_is_so_by_the_metric() -> None:
    rows = (
        complete(0, OWN, [0.5]),
        complete(1, SMALL, [0.4]),
        complete(2, SMALL, [0.4], state="duplicate"),
        complete(3, VIT, [float("nan")]),
    )
    board = board_of([started(rows)])
    assert board.count_line().startswith("3 of 4 parameter sets, 0 pruned; 3 fold-trainings done")
    assert [row.number for row in board.best()] == [0, 1]
    less = board_of([TuneStarted(**{**vars(started(rows)), "greater_is_better": False})])
    assert [row.number for row in less.best()] == [1, 0]
    assert "(trial 1, chosen among 3)" in less.best_line()


def test_time_left_goes_by_the_folds_that_trials_took_so_far() -> None:
    clock = Clock()
    board = board_of([started(trials=5)], clock)
    assert board.left_s() is None
    board.take(TrialStarted(0, OWN, (0, 1, 2), 2))
    for of in range(3):
        for event in fold(clock, 0, of, 0.5):
            board.take(event)
    board.take(complete(0, OWN, [0.5] * 3))
    assert board.left_s() == (pytest.approx(4 * 3 * 10.0), "search")
    board.take(TrialStarted(1, VIT, (0, 1, 2), 2))
    for event in fold(clock, 1, 0, 0.3):
        board.take(event)
    # One fold of three is behind it, and three sets of three folds are to come.
    assert board.left_s() == (pytest.approx((2 + 9) * 10.0), "search")
    board.take(TrialDone(1, "pruned", VIT, {0: 0.3}, 0.3, None, 10.0))
    assert board.left_s() == (pytest.approx(3 * 2 * 10.0), "search"), "two folds a trial, in the mean"


@given(st.sets(st.from_regex(r"[a-c]{1,2}(\.([a-c]{1,2}|[0-9])){0,3}", fullmatch=True), min_size=1, max_size=8))
def test_brief_names_are_ends_of_their_keys_and_tell_them_apart(keys: set[str]) -> None:
    names = brief_names(keys)
    assert len(set(names.values())) == len(names) == len(keys)
    assert all(f".{key}".endswith(f".{name}") for key, name in names.items())


def test_brief_names_of_a_pipeline() -> None:
    keys = ["optim.lr", "augment.0.Affine.p", "mix.prob", "augment.0.Affine.rotate.1"]
    assert list(brief_names(keys).values()) == ["lr", "Affine.p", "mix.prob", "rotate.1"]


units = st.tuples(st.integers(0, 2), st.integers(42, 43))
inner = st.one_of(
    units.map(lambda key: UnitStarted(*key, 1, 80, 20)),
    st.tuples(units, st.integers(1, 3), st.integers(0, 2)).map(lambda t: StepDone(*t[0], t[1], t[2], t[2])),
    st.tuples(units, st.integers(1, 3)).map(lambda t: EpochDone(*t[0], t[1], {})),
    st.tuples(units, st.none() | st.floats()).map(lambda t: UnitDone(*t[0], t[1], t[1], 1.0)),
    st.just(Message("[hello]")),
)
trials = st.tuples(st.integers(-1, 3), st.sampled_from(["search", "seeds", "full"]))
values = st.dictionaries(st.sampled_from([*SPACE, "tta"]), st.sampled_from([0.1, None, True, "a", [1], {"p": 1}]))
scores = st.none() | st.floats()
dones = st.builds(
    lambda key, state, parameters, folds, score: TrialDone(
        key[0], state, parameters, folds, score, score, 1.0, key[1], "line\nline"
    ),
    trials,
    st.sampled_from(["complete", "pruned", "failed", "duplicate"]),
    values,
    st.dictionaries(st.integers(0, 2), st.floats()),
    scores,
)
events_ = st.one_of(
    st.lists(dones, max_size=2).map(lambda done: started(tuple(done), seeds=(42, 43))),
    st.builds(lambda key, p: TrialStarted(key[0], p, (0, 1), 2, key[1]), trials, values),
    st.builds(lambda key, event: TrialEvent(*key, event), trials, inner),
    dones,
    st.just(Message("hello")),
    st.just(TuneDone({}, "oof/x/tune", ("done",))),
)


@settings(max_examples=100)
@given(st.lists(events_, max_size=12), st.floats(0, 100))
def test_no_order_of_events_raises(sequence: list[Event], pace: float) -> None:
    clock = Clock()
    board = TuneBoard(clock)
    for event in sequence:
        clock.now += pace
        board.take(event)
        text_of(board, 80, 24)
        left = board.left_s()
        assert left is None or left[0] >= 0
    assert plain(sequence, clock) is not None


# Plots ----------------------------------------------------------------------------------------------------------------


def study_of(*rows: tuple[Any, dict[str, Any], float | None], fates: dict[int, str] | None = None) -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    archs = [f"vit_base_patch16_224.orig_in21k_{n}" for n in range(3)]
    for number, (state, parameters, value) in enumerate(rows):
        kinds: dict[str, Any] = {
            "optim.lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True),
            "model.arch": optuna.distributions.CategoricalDistribution([*archs, 7, None]),
            "augment.0.RandomBrightnessContrast.brightness_limit": optuna.distributions.FloatDistribution(0, 1),
        }
        study.add_trial(
            optuna.create_trial(
                state=state,
                value=value,
                params=parameters,
                distributions={key: kinds[key] for key in parameters},
                user_attrs={"fate": fates[number]} if fates and number in fates else {},
            )
        )
    return study


def drawn(count: int) -> list[tuple[Any, dict[str, Any], float]]:
    choices = ["vit_base_patch16_224.orig_in21k_0", "vit_base_patch16_224.orig_in21k_2", 7, None]
    return [
        (
            optuna.trial.TrialState.COMPLETE,
            {
                "optim.lr": 1e-4 * (n + 1),
                "model.arch": choices[n % 4],
                "augment.0.RandomBrightnessContrast.brightness_limit": n / count,
            },
            0.5 + math.sin(n) / 10,
        )
        for n in range(count)
    ]


@pytest.mark.slow
def test_plots_are_pages_without_network_and_pictures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pruned = (optuna.trial.TrialState.PRUNED, {"optim.lr": 0.1}, None)
    running = (optuna.trial.TrialState.RUNNING, {}, None)
    study = study_of(*drawn(7), pruned, running, *drawn(1), fates={9: "duplicate"})
    assert write_plots(study, tmp_path / "tune", "accuracy") == []
    assert capfd.readouterr() == ("", "")
    names = {f"{name}.{kind}" for name in PLOTS for kind in ("html", "png")}
    assert {path.name for path in (tmp_path / "tune").iterdir()} == {"plotly.min.js", *names}
    for name, title in PLOTS.items():
        page = (tmp_path / "tune" / f"{name}.html").read_text()
        assert len(page) < 100_000, "the library is beside it"
        sources = re.findall(r'src="([^"]+)"', page)
        assert sources == ["plotly.min.js"]
        assert f"{title} (7 complete trials)" in page, "neither pruned nor running nor duplicate"
        with Image.open(tmp_path / "tune" / f"{name}.png") as picture:
            assert picture.width >= 700
            assert len(picture.convert("L").getcolors() or [0] * 99) > 20, "something is drawn"
    assert "accuracy" in (tmp_path / "tune" / "history.html").read_text()


def test_pictures_go_by_short_names_but_the_same_numbers_and_values() -> None:
    pruned = (optuna.trial.TrialState.PRUNED, {"optim.lr": 0.1}, None)
    study = study_of(*drawn(3), pruned, *drawn(5))
    brief = _brief_study(study)
    assert [t.number for t in brief.get_trials() if t.state == optuna.trial.TrialState.COMPLETE] == [
        0,
        1,
        2,
        *range(4, 9),
    ]
    assert [t.value for t in brief.get_trials()] == [t.value for t in study.get_trials()]
    archs = {}
    for old, new in zip(study.get_trials(), brief.get_trials(), strict=True):
        if old.state == optuna.trial.TrialState.COMPLETE:
            assert set(new.params) == {"lr", "arch", "brightness_limit"}
            assert new.params["lr"] == old.params["optim.lr"]
            assert new.distributions["lr"] == old.distributions["optim.lr"]
            archs[old.params["model.arch"]] = new.params["arch"]
    assert len(set(archs.values())) == len(archs) == 4, "equal beginnings are told apart"
    assert all(not isinstance(label, str) or len(label) <= LABEL_LENGTH for label in archs.values())
    assert (archs[7], archs[None]) == (7, None)


def test_too_few_trials_are_a_note(tmp_path: Path) -> None:
    rows = [*drawn(1), (optuna.trial.TrialState.COMPLETE, {"optim.lr": 0.01}, float("inf"))]
    assert write_plots(study_of(*rows), tmp_path / "tune") == [
        "plots: they need two complete trials, but the study has 1"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_importances_that_mean_nothing_are_a_note_and_the_rest_is_drawn(tmp_path: Path) -> None:
    rows = [(state, {"optim.lr": 0.01}, 0.5) for state, _, _ in drawn(4)]
    assert write_plots(study_of(*rows), tmp_path) == [
        "plots: Optuna cannot draw importances (Target and region quantiles select the same set of trials. "
        "Parameter importances will be equal)"
    ]
    assert {path.stem for path in tmp_path.glob("*.png")} == set(PLOTS) - {"importances"}
