"""Studies on real storages: distinct sets, the same draws after any stop, the dead, what cannot be opened.

Nothing is trained: a parameter set scores by a formula.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import log10
from pathlib import Path
from typing import Any

import optuna
import pytest
from filelock import FileLock, Timeout
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from foldwise.errors import FoldwiseError
from foldwise.runs.provenance import without_password
from foldwise.runs.study import Asked, Search, open_search, open_storage, set_key
from foldwise.spec.model import ExperimentSpec, resolved
from foldwise.spec.space import own_values, parameters

NUMBERS = {"optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "model.dropout": {"low": 0.0, "high": 0.4}}
FINITE = {"model.dropout": {"low": 0.1, "high": 0.5, "step": 0.1}, "train.batch_size": {"choices": [16, 32]}}
MIXED = {
    "optim.lr": NUMBERS["optim.lr"],
    **FINITE,
    "mix.prob": {"choices": [0.0, 1.0]},
    "mix.mixup_alpha": {"low": 0.0, "high": 0.4, "when": {"mix.prob": [1.0]}},
}
SPACES = {"tpe": MIXED, "random": MIXED, "cmaes": NUMBERS, "gp": FINITE | NUMBERS, "grid": FINITE}


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder in memory where there is such a disk: a study commits hundreds of times, and a busy disk takes long."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with in_memory() as folder:
        yield folder


def spec_of(space: dict[str, Any], **tune: Any) -> ExperimentSpec:
    tree = {
        "name": "tiny",
        "competition": "demo",
        "model": {"arch": "vit_tiny_patch16_224", "dropout": 0.1},
        "optim": {"lr": 3e-3},
        "train": {"epochs": 8, "batch_size": 16},
        "tune": {"space": space, "prune": {"folds": False}} | tune,
    }
    return ExperimentSpec.model_validate_json(json.dumps(tree))


class Player:
    """Trains nothing: a parameter set scores by a formula, and a fold is a file."""

    def __init__(self, folder: Path, space: dict[str, Any] = MIXED, *, tune: dict[str, Any] | None = None, **opened):
        self.spec = spec_of(space, **(tune or {}))
        assert self.spec.tune is not None
        self.folder = folder
        self.locks: dict[int, FileLock] = {}
        self.search: Search = open_search(
            folder,
            "demo/tiny",
            self.spec.tune,
            parameters(self.spec),
            own=own_values(self.spec),
            identity={"spec": resolved(self.spec), "space": space},
            **{"greater_is_better": True, "epochs": 8} | opened,
        )

    def hold(self, asked: Asked) -> bool:
        (self.folder / asked.key).mkdir(exist_ok=True)
        lock = FileLock(self.folder / asked.key / ".lock", timeout=0, thread_local=False)
        lock.acquire()
        self.locks[asked.number] = lock
        return True

    def next(self, wanted: int = 100) -> Asked | None:
        return self.search.next(wanted, self.hold)

    def take(self, wanted: int = 100) -> Asked:
        asked = self.next(wanted)
        assert asked is not None
        return asked

    def end(self, asked: Asked, state: TrialState = TrialState.COMPLETE) -> None:
        value = formula(asked.values)
        told = {"fold_scores": {"0": value}, "score": value, "standard_error": 0.1, "wall_s": 1.0, "reason": ""}
        if state == TrialState.PRUNED:
            asked.trial.report(value, step=1)
        self.search.tell(asked.number, state, value, **told)
        self.locks.pop(asked.number).release()

    def die(self, asked: Asked, fold: int | None = None) -> None:
        """What is left of a process that died: no lock, and the folds that it kept."""
        if fold is not None:
            kept = self.folder / asked.key / f"fold{fold}" / "seed42" / "unit.json"
            kept.parent.mkdir(parents=True)
            kept.write_text("{}")
        self.locks.pop(asked.number).release()
        self.search._mine.discard(asked.number)

    def play(self, wanted: int) -> list[dict[str, Any]]:
        drawn = []
        while (asked := self.next(wanted)) is not None:
            drawn.append(asked.values)
            self.end(asked)
        return drawn

    @property
    def sampler(self) -> str:
        assert self.spec.tune is not None
        return self.spec.tune.sampler

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        return self.search.study.get_trials(deepcopy=False)


def formula(values: dict[str, Any]) -> float:
    score = 1 - abs(log10(values.get("optim.lr", 1e-2)) + 2) / 4 - values.get("model.dropout", 0.0) / 3
    return score + values.get("train.batch_size", 0) / 1000 - values.get("mix.mixup_alpha", 0.2)


def keys_of(drawn: list[dict[str, Any]]) -> list[str]:
    return [set_key(values) for values in drawn]


def results(search: Search) -> list[tuple[Any, ...]]:
    """What a study found, whatever number its trials have."""
    return [(row.state, row.parameters, row.fold_scores, row.score, row.reason) for row in search.rows()]


# What is asked for ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SPACES)
def whole(request: pytest.FixtureRequest) -> Iterator[tuple[Player, list[dict[str, Any]]]]:
    """A study that nothing disturbed, by each of the samplers, and what it drew."""
    with in_memory() as folder:
        player = Player(folder, SPACES[request.param], tune={"sampler": request.param, "seed": 5})
        # TPE and the Gaussian process draw at random up to the tenth trial.
        yield player, player.play(10 if request.param == "grid" else 13)


@pytest.mark.slow
def test_every_sampler_starts_with_the_own_values_and_draws_distinct_sets(whole: Any) -> None:
    player, drawn = whole
    sampler, wanted = player.sampler, len(drawn)
    assert wanted >= 10
    assert drawn[0] == own_values(player.spec)
    assert len(set(keys_of(drawn))) == len(drawn) == wanted == len(player.search.keys())
    assert {trial.state for trial in player.trials} == {TrialState.COMPLETE}
    for values in drawn:
        assert ("mix.mixup_alpha" in values) == (values.get("mix.prob") == 1.0)
    if sampler == "grid":
        every = itertools.product((0.1, 0.2, 0.3, 0.4, 0.5), (16, 32))
        assert sorted((values["model.dropout"], values["train.batch_size"]) for values in drawn) == sorted(every)
        assert len(player.trials) == wanted
    assert player.play(wanted) == []


@pytest.mark.slow
def test_a_study_that_was_cut_off_draws_what_it_would_have_drawn(tmp_path: Path, whole: Any) -> None:
    undisturbed, expected = whole
    sampler, wanted = undisturbed.sampler, len(expected)
    tune, folder = {"sampler": sampler, "seed": 5}, tmp_path / "cut"
    for number in (0, 2, 7, 11):
        player = Player(folder, SPACES[sampler], tune=tune)
        if number < wanted:
            player.play(number)
            player.die(player.take(wanted))
    player = Player(folder, SPACES[sampler], tune=tune)
    asked = player.take(wanted)
    player.search.let_go(asked.number, player.locks.pop(asked.number).release)
    player.play(wanted)
    assert [row.parameters for row in player.search.rows()] == expected
    assert results(player.search) == results(undisturbed.search)
    assert len(player.trials) > len(undisturbed.trials)
    other = Player(tmp_path / "other", SPACES[sampler], tune=tune | {"seed": 6})
    assert other.play(4)[1:] != expected[1:4], "another seed draws otherwise"


def test_pruned_trials_are_told_with_what_they_scored(tmp_path: Path) -> None:
    player = Player(tmp_path)
    player.end(player.take())
    player.end(asked := player.take(), TrialState.PRUNED)
    assert player.trials[1].state == TrialState.PRUNED
    assert player.trials[1].value == formula(asked.values)
    assert [row.state for row in player.search.rows()] == ["complete", "pruned"]
    assert [trial.number for trial in player.search.complete()] == [0]


def test_the_best_come_first_by_the_direction_of_the_metric(tmp_path: Path) -> None:
    for direction in (True, False):
        player = Player(tmp_path / str(direction), greater_is_better=direction)
        player.play(6)
        values = [trial.value for trial in player.search.complete()]
        assert values == sorted(values, reverse=direction)
        assert len(set(values)) > 1


def test_a_study_goes_on_though_specs_have_come_to_know_a_key_since(tmp_path: Path) -> None:
    player = Player(tmp_path)
    kept = player.search.study.user_attrs["identity"]
    assert kept["spec"].pop("pseudo", "absent") is None
    player.search.study.set_user_attr("identity", kept)
    player.search.close()
    Player(tmp_path).search.close()
    kept["spec"]["train"]["epochs"] += 1
    again = Player(tmp_path)
    again.search.study.set_user_attr("identity", kept)
    again.search.close()
    with pytest.raises(FoldwiseError, match=r"spec\.train\.epochs"):
        Player(tmp_path)


def test_a_finite_space_ends_with_a_note_and_without_a_repetition(tmp_path: Path) -> None:
    player = Player(tmp_path, FINITE)
    assert len(player.play(99)) == 10
    assert player.search.notes == ["the space holds no more than 10 parameter sets"]
    assert player.next(99) is None
    again = Player(tmp_path, FINITE)
    assert again.play(99) == []
    assert player.search.notes == again.search.notes, "told once a call"
    known = [row.state for row in again.search.rows()]
    assert known.count("complete") == 10
    counts = len(again.trials)
    Player(tmp_path, FINITE).play(99)
    assert len(again.trials) == counts, "a space that is known to be used up is not drawn from"


def test_a_repetition_gets_the_known_result_and_is_not_counted(tmp_path: Path) -> None:
    player = Player(tmp_path)
    player.play(2)
    player.end(player.take(), TrialState.PRUNED)
    for number in range(3):
        player.search.study.enqueue_trial(player.trials[number].params)
    drawn = player.play(4)
    assert len(drawn) == 1, "only the new set is handed out"
    rows = player.search.rows()
    assert [row.state for row in rows] == ["complete", "complete", "pruned", *["duplicate"] * 3, "complete"]
    for known, copy in zip(rows[:3], rows[3:6], strict=True):
        assert copy.reason == f"the same parameters as trial {known.number}"
        assert (copy.parameters, copy.fold_scores, copy.score) == (known.parameters, known.fold_scores, known.score)
        assert copy.wall_s == 0
    assert [trial.state.name for trial in player.trials[3:6]] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert len(player.search.keys()) == 4
    assert [trial.number for trial in player.search.complete()].count(3) == 0


def test_two_workers_never_have_the_same_set_and_see_each_other(tmp_path: Path) -> None:
    one, two = Player(tmp_path, FINITE), Player(tmp_path, FINITE)
    held = [(player, player.take(6)) for player in (one, two, one, two)]
    assert len({asked.key for _, asked in held}) == 4
    assert [asked.number for _, asked in held] == [0, 1, 2, 3]
    assert (one.search.others_at_work(), two.search.others_at_work()) == (2, 2)
    # What the other has under way is as good as known.
    one.search.study.enqueue_trial(one.trials[1].params)
    one.end(one.take(6))
    assert one.trials[4].state == TrialState.FAIL
    assert one.search.rows()[0].state == "duplicate"
    for player, asked in held:
        player.end(asked)
    one.play(6)
    assert (one.search.others_at_work(), len(two.search.keys())) == (0, 6)
    assert two.next(6) is None


@given(st.integers(1, 9), st.integers(0, 5), st.integers(1, 6))
def test_a_value_on_a_step_has_one_name(first: int, low: int, steps: int) -> None:
    """0.1 + 2 * 0.1 is not 0.3 in binary: the set must be the same whether it is drawn, listed or written in a spec."""
    step = first / 10
    high = (low * 10 + first * steps) / 10
    space = {"mix.cutmix_alpha": {"low": float(low), "high": high, "step": step}}
    spec = spec_of(space)
    (one,) = parameters(spec)
    written = {set_key({one.key: float(f"{low + count * step:.1f}")}) for count in range(steps + 1)}
    drawn = {set_key({one.key: one.value_of(low + count * step)}) for count in range(steps + 1)}
    assert written == drawn
    assert len(drawn) == steps + 1


# The dead -------------------------------------------------------------------------------------------------------------


def test_a_trial_whose_process_died_is_tried_again_and_fails_where_it_dies_twice(tmp_path: Path) -> None:
    player = Player(tmp_path)
    player.play(1)
    first = player.take()
    player.die(first)
    again = player.take()
    assert (again.values, again.key, again.number, again.retry_of) == (first.values, first.key, 2, 1)
    player.die(again, fold=0)
    third = player.take()
    assert (third.key, third.retry_of) == (first.key, 2), "it got further, so it may go on"
    player.die(third)
    other = player.take()
    assert other.key != first.key
    assert other.retry_of is None
    assert player.search.notes == [
        "trial 1 was cut off; it is tried again from its 0 finished folds",
        "trial 2 was cut off; it is tried again from its 1 finished folds",
        "trial 3 failed: its process died twice in the same fold",
    ]
    player.end(other)
    player.play(4)
    rows = player.search.rows()
    assert [(row.number, row.state) for row in rows] == [
        (0, "complete"),
        (3, "failed"),
        (4, "complete"),
        (5, "complete"),
    ]
    assert rows[1].reason == "its process died twice in the same fold"
    assert rows[1].parameters == first.values
    assert len(player.search.keys()) == 4


def test_a_stop_on_purpose_is_no_death(tmp_path: Path) -> None:
    player = Player(tmp_path)
    asked = player.take()
    for _ in range(3):
        player.search.let_go(asked.number, player.locks.pop(asked.number).release)
        asked = player.take()
    player.die(asked)
    asked = player.take()
    assert asked.key == set_key(own_values(player.spec)), "one death is not two"
    player.end(asked)
    assert [row.number for row in player.search.rows()] == [asked.number]
    assert len(player.search.keys()) == 1


def test_a_trial_is_let_go_in_one_piece(tmp_path: Path) -> None:
    """Else another process would find it dead, or its folder locked."""
    player, other = Player(tmp_path), Player(tmp_path)
    asked = player.take()
    seen = []

    def unlock() -> None:
        seen.append([trial.state.name for trial in other.trials])
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".ask.lock", timeout=0, thread_local=False).acquire()
        player.locks.pop(asked.number).release()

    player.search.let_go(asked.number, unlock)
    assert seen == [["FAIL", "WAITING"]]
    assert other.take().key == asked.key
    assert other.search.notes == []


def test_a_living_process_is_left_alone_and_a_dead_one_is_found_by_whoever_is_left(tmp_path: Path) -> None:
    alive, other = Player(tmp_path), Player(tmp_path)
    asked = alive.take(1)
    assert other.next(1) is None
    assert (other.search.others_at_work(), other.search.waiting) == (1, False)
    alive.die(asked)
    assert (other.search.others_at_work(), other.search.waiting) == (1, True)
    taken = other.take(1)
    assert (taken.key, taken.retry_of) == (asked.key, asked.number)


def test_a_trial_that_ends_while_another_process_looks_for_the_dead_is_not_buried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working, looking = Player(tmp_path), Player(tmp_path)
    asked = working.take(2)
    lives = looking.search._alive

    def ends_just_now(trial: Any) -> bool:
        if trial.number == asked.number and asked.number in working.search._mine:
            working.end(asked)
        return lives(trial)

    monkeypatch.setattr(looking.search, "_alive", ends_just_now)
    assert looking.take(2).key != asked.key
    assert [(row.number, row.state) for row in working.search.rows()] == [(asked.number, "complete")]
    assert looking.search.notes == []


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_kill_between_asking_and_naming_the_set_loses_nothing(tmp_path: Path, sampler: str) -> None:
    expected = Player(tmp_path / "whole", tune={"sampler": sampler}).play(4)
    player = Player(tmp_path / "cut", tune={"sampler": sampler})
    player.search.study.ask()  # the own values, which were queued
    player.play(2)
    player.search.study.ask()
    player.play(4)
    assert [row.parameters for row in player.search.rows()] == expected
    assert not player.search.waiting


def test_a_kill_between_queueing_and_telling_queues_nothing_twice(tmp_path: Path) -> None:
    player = Player(tmp_path)
    player.play(1)
    asked = player.take()
    player.search.study.enqueue_trial(asked.trial.params)
    player.die(asked)
    player.play(3)
    assert [row.state for row in player.search.rows()] == ["complete"] * 3
    assert player.search.rows()[1].parameters == asked.values


@pytest.mark.parametrize("queued", [False, True])
def test_a_kill_while_the_study_is_made_leaves_the_own_values_first(tmp_path: Path, queued: bool) -> None:
    tmp_path.joinpath("tune").mkdir()
    study = optuna.create_study(
        storage=f"sqlite:///{tmp_path}/tune/study.db", study_name="demo/tiny", direction="maximize"
    )
    if queued:
        study.enqueue_trial({"optim.lr": 3e-3, "model.dropout": 0.1})
    player = Player(tmp_path / "tune", NUMBERS)
    drawn = player.play(3)
    assert drawn[0] == own_values(player.spec)
    assert [row.state for row in player.search.rows()] == ["complete"] * 3


# Kills ----------------------------------------------------------------------------------------------------------------

WORKER = f"""\
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_study import Player
player = Player(Path(sys.argv[1]), storage=sys.argv[2] or None)
while (asked := player.next(12)) is not None:
    for fold in (0, 1):
        kept = player.folder / asked.key / f"fold{{fold}}" / "seed42" / "unit.json"
        if not kept.exists():
            time.sleep(0.05)
            kept.parent.mkdir(parents=True)
            kept.write_text(str(asked.number))
    player.end(asked)
"""


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["", "journal:{}/study.log"], ids=["sqlite", "journal"])
def test_kills_at_random_moments_change_nothing_but_the_numbers(tmp_path: Path, storage: str) -> None:
    expected = Player(tmp_path / "whole")
    expected.play(12)
    folder = tmp_path / "cut"
    url = storage.format(folder)
    command = [sys.executable, "-c", WORKER, str(folder), url]
    moments = random.Random(storage)
    before: dict[Path, str] = {}
    for _ in range(2):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            begun, until = len(before), time.monotonic() + 120
            while len(units := sorted(folder.glob("*/fold*/seed*/unit.json"))) < begun + 4:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < until, "nothing happened"
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.3))
            process.kill()
        assert all(path.read_text() == text for path, text in before.items())
        before = {path: path.read_text() for path in units}
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path: path.read_text() for path in before} == before
    found = Player(folder, storage=url or None).search
    assert results(found) == results(expected.search)
    assert len(found.keys()) == 12
    assert found.others_at_work() == 0
    cut = [trial for trial in found.study.get_trials(deepcopy=False) if trial.user_attrs.get("fate") == "died"]
    assert len(cut) <= 2


# Storages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["", "journal:{}/kept/study.log", "sqlite:///{}/other.db"])
def test_a_study_goes_on_where_it_was(tmp_path: Path, storage: str) -> None:
    url = storage.format(tmp_path) or None
    whole = Player(tmp_path / "whole").play(5)
    player = Player(tmp_path / "tune", storage=url)
    assert player.play(2) == whole[:2]
    attempt = player.search.attempt
    assert Player(tmp_path / "tune", storage=url).play(5) == whole[2:]
    assert Player(tmp_path / "tune", storage=url).search.attempt == attempt
    if url:
        assert not (tmp_path / "tune" / "study.db").exists()
    fresh = Player(tmp_path / "tune", storage=url, fresh=True)
    assert fresh.play(1) == whole[:1]


def test_a_study_that_was_made_otherwise_is_refused_with_the_difference(tmp_path: Path) -> None:
    Player(tmp_path, NUMBERS).play(2)
    wider = NUMBERS | {"model.dropout": {"low": 0.0, "high": 0.5}}
    with pytest.raises(FoldwiseError) as caught:
        Player(tmp_path, wider)
    assert str(caught.value) == (
        "the study `demo/tiny` was made otherwise, and its trials cannot be compared with new ones:\n"
        "  space.model.dropout.high: 0.4 -> 0.5\n"
        "  fix: change it back, or FRESH=1 (--fresh) deletes the study and begins anew"
    )
    assert len(Player(tmp_path, NUMBERS).play(3)) == 1
    other = Player(tmp_path, wider, fresh=True)
    assert [trial.number for trial in other.trials] == [0]
    assert Player(tmp_path, wider, tune={"sampler": "random", "trials": 7}).play(1) == [own_values(other.spec)]


def test_a_journals_lock_can_be_seen_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna looks at the file behind the lock to find out whether its owner died; behind a relative link is none."""
    monkeypatch.chdir(tmp_path)
    storage = open_storage("journal:kept/study.log", tmp_path)
    assert isinstance(storage, optuna.storages.JournalStorage)
    lock = storage._backend._lock
    lock.acquire()
    (link,) = tmp_path.rglob("*.lock")
    monkeypatch.chdir("/")
    assert link.is_symlink()
    assert link.resolve() == tmp_path / "kept" / "study.log"
    lock.release()


PASSWORD = "open sesame".replace(" ", "")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (
            f"mysql://me:{PASSWORD}@127.0.0.1/none",
            "the storage mysql://me:***@127.0.0.1/none needs a driver that is not installed (Failed to import DB "
            "access module for the specified storage URL. Please install appropriate one.)\n"
            "  fix: for PostgreSQL .venv/bin/pip install -e '.[postgres]' and "
            "STORAGE=postgresql+psycopg://user@host/name",
        ),
        (
            f"nosuch://me:{PASSWORD}@127.0.0.1/none",
            "the storage nosuch://me:***@127.0.0.1/none cannot be opened: "
            "Can't load plugin: sqlalchemy.dialects:nosuch\n"
            "  fix: STORAGE=postgresql+psycopg://user:password@host/database, journal:<file>, or none for SQLite",
        ),
        (
            f"sqlite://me:{PASSWORD}@/none",
            "the storage sqlite://me:***@/none cannot be opened: "
            "Invalid SQLite URL: sqlite://me:***@/none\n"
            "  fix: STORAGE=postgresql+psycopg://user:password@host/database, journal:<file>, or none for SQLite",
        ),
        (
            "sqlite:////nowhere/at/all.db",
            "the storage sqlite:////nowhere/at/all.db cannot be opened: "
            "(sqlite3.OperationalError) unable to open database file\n"
            "  fix: STORAGE=postgresql+psycopg://user:password@host/database, journal:<file>, or none for SQLite",
        ),
        (
            "study.db",
            "the storage study.db cannot be opened: Could not parse SQLAlchemy URL from given URL string\n"
            "  fix: STORAGE=postgresql+psycopg://user:password@host/database, journal:<file>, or none for SQLite",
        ),
        (
            "journal:/dev/null/study.log",
            "the storage journal:/dev/null/study.log cannot be opened: "
            "[Errno 17] File exists: '/dev/null'\n"
            "  fix: STORAGE=postgresql+psycopg://user:password@host/database, journal:<file>, or none for SQLite",
        ),
    ],
    ids=["driver", "dialect", "form", "file", "no url", "journal"],
)
def test_a_storage_that_cannot_be_opened_is_told_without_its_password(tmp_path: Path, url: str, told: str) -> None:
    with pytest.raises(FoldwiseError) as caught:
        Player(tmp_path, storage=url)
    assert str(caught.value) == told


def test_a_port_that_is_no_number_is_told_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(FoldwiseError) as caught:
        Player(tmp_path, storage=f"postgresql+psycopg://me:{PASSWORD}@127.0.0.1:port/none")
    assert str(caught.value).startswith(
        "the storage postgresql+psycopg://me:***@127.0.0.1:port/none cannot be opened: "
    )
    assert PASSWORD not in str(caught.value)


@given(
    st.text("abz09._-", min_size=1, max_size=8),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12),
    st.sampled_from(["python run.py tune tiny --storage {}", "{}", "{} --trials 3"]),
)
def test_no_password_is_shown_whatever_it_is_made_of(user: str, password: str, text: str) -> None:
    before, after = text.split("{}")
    url = f"postgresql+psycopg://{user}:{password}@host:5432/name"
    hidden = f"{before}postgresql+psycopg://{user}:***@host:5432/name{after}"
    assert without_password(before + url + after) == hidden


def test_a_password_among_the_parameters_is_hidden_and_all_else_is_shown() -> None:
    url = f"postgresql://host/name?user=me&password={PASSWORD}&sslmode=require"
    assert without_password(url) == "postgresql://host/name?user=me&password=***&sslmode=require"
    for url in ("journal:a/b.log", "postgresql://me@host/name", "sqlite:///a@b.db"):
        assert without_password(url) == url


def test_nothing_is_said_beside_what_foldwise_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Player(tmp_path).play(12)
    assert [str(warning.message) for warning in caught] == []
    assert capfd.readouterr() == ("", "")
