"""The Optuna side of a search: a storage, a sampler, and each parameter set handed out once.

A trial belongs to whoever holds the lock of its folder, on any storage: no clock decides who is dead.
"""

from __future__ import annotations

import copy
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from foldwise.errors import FoldwiseError
from foldwise.files import sha256_json
from foldwise.runs.events import TrialDone
from foldwise.runs.provenance import without_password
from foldwise.spec.load import differences, with_defaults
from foldwise.spec.model import TuneSpec
from foldwise.spec.space import Parameter, size

optuna.logging.set_verbosity(optuna.logging.ERROR)

# Draws of the sampler that repeat what is known, before a set is drawn at random.
_REPEATS = 20
# Sets that a finite space may hold to be listed; a larger one is drawn from.
_ENUMERATED = 100_000
_STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
# Fates of a trial whose parameters were queued again: another trial stands for it.
_CUT_OFF = ("died", "stopped")


@dataclass(frozen=True, eq=False)
class Asked:
    """A trial that is ours to run.

    Attributes:
        number: In the study, from 0.
        values: Plain values of the parameters that exist, by dotted key.
        key: Names the parameter set, and so its folder: equal sets have equal keys.
        trial: Optuna's handle of it.
        retry_of: The trial that died with these parameters; None for new ones.
    """

    number: int
    values: dict[str, Any]
    key: str
    trial: optuna.Trial
    retry_of: int | None


class Search:
    """A study that hands out distinct parameter sets to any number of processes.

    Attributes:
        study: Optuna's.
        notes: Lines for the user about trials that were found dead.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: BaseStorage,
        tune: TuneSpec,
        parameters: tuple[Parameter, ...],
        folder: Path,
    ) -> None:
        self.study = study
        self._storage = storage
        self.notes: list[str] = []
        self._tune = tune
        self._parameters = parameters
        self._folder = folder
        self._lock = FileLock(folder / ".ask.lock", thread_local=False)
        self._mine: set[int] = set()
        self._sets = size(parameters)
        self._exhausted = False

    def next(self, wanted: int, hold: Callable[[Asked], bool]) -> Asked | None:
        """Ask for the next trial.

        Args:
            wanted: Distinct parameter sets in all.
            hold: Takes the lock of a trial's folder; False where it could not, and ended the trial.

        Returns:
            A trial that nobody else has, its folder locked; None where there are enough, or no others in the space.
        """
        with self._lock:
            self._bury()
            repeats = 0
            while self.waiting or len(self.keys()) < wanted:
                if not self.waiting and (repeats == _REPEATS or self._sets == len(self.keys())):
                    if (values := self._untried()) is None:
                        if not self._exhausted:
                            self.notes.append(f"the space holds no more than {len(self.keys())} parameter sets")
                        self._exhausted = True
                        return None
                    self.study.enqueue_trial(self._labels(values))
                    repeats = 0
                if (asked := self._ask()) is None:
                    repeats += 1
                elif hold(asked):
                    self._mine.add(asked.number)
                    return asked
            return None

    @property
    def attempt(self) -> str:
        """When the study was begun, UTC ISO 8601."""
        return str(self.study.user_attrs["attempt"])

    def keys(self) -> set[str]:
        """The distinct parameter sets that were asked for."""
        return {trial.user_attrs["set"] for trial in self._trials() if "set" in trial.user_attrs}

    def tell(self, number: int, state: TrialState, value: float | None = None, **told: Any) -> None:
        """End a trial.

        Args:
            number: Of the trial.
            state: COMPLETE with a value, PRUNED or FAIL.
            value: Its score.
            told: What else is kept with it (`fold_scores`, `standard_error`, `wall_s`, `reason`).
        """
        trial = self._frozen(number)
        for name, content in told.items():
            self._storage.set_trial_user_attr(trial._trial_id, name, content)
        self.study.tell(number, value if state == TrialState.COMPLETE else None, state=state)
        self._mine.discard(number)

    def let_go(self, number: int, unlock: Callable[[], None]) -> None:
        """End a trial that was interrupted on purpose, and queue its parameters again; its folds are kept.

        Args:
            number: Of the trial.
            unlock: Lets go of its folder: before another process can ask for the trial, which needs the folder, and
                not before it is queued, or it would be found dead.
        """
        with self._lock:
            self._end_and_queue(self._frozen(number), "stopped", "interrupted")
            self._mine.discard(number)
            unlock()

    @property
    def waiting(self) -> bool:
        """Whether parameters are queued that nobody took yet."""
        return any(trial.state == TrialState.WAITING for trial in self._trials())

    def others_at_work(self) -> int:
        """Trials that other processes have under way; those of dead ones are queued again, and counted until taken."""
        with self._lock:
            self._bury()
            busy = [t for t in self._trials() if t.state in (TrialState.RUNNING, TrialState.WAITING)]
            return sum(trial.number not in self._mine for trial in busy)

    def rows(self) -> list[TrialDone]:
        """Every trial that ended, as events tell of it; those that were tried again later are left out."""
        rows = []
        for trial in self._trials():
            told = trial.user_attrs
            if trial.state not in _STATES or told.get("fate") in _CUT_OFF:
                continue
            rows.append(
                TrialDone(
                    number=trial.number,
                    state="duplicate" if told.get("fate") == "duplicate" else _STATES[trial.state],  # type: ignore[arg-type]
                    parameters=told.get("values", {}),
                    fold_scores={int(fold): score for fold, score in told.get("fold_scores", {}).items()},
                    score=told.get("score"),
                    standard_error=told.get("standard_error"),
                    wall_s=told.get("wall_s", 0.0),
                    reason=told.get("reason", ""),
                )
            )
        return rows

    def complete(self) -> list[FrozenTrial]:
        """The complete trials of distinct parameter sets, the best first."""
        done = [
            trial
            for trial in self._trials()
            if trial.state == TrialState.COMPLETE and trial.user_attrs.get("fate") != "duplicate"
        ]
        sign = -1 if self.study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        return sorted(done, key=lambda trial: (sign * float(trial.value or 0.0), trial.number))

    def close(self) -> None:
        """Let go of the storage's connections."""
        close_storage(self._storage)

    # Asking -----------------------------------------------------------------------------------------------------------

    def _ask(self) -> Asked | None:
        """Ask Optuna once; None where the parameters are known already, which the study is told."""
        # A study that was never cut off has none of those, and must draw the same.
        count = sum(other.user_attrs.get("fate") not in _CUT_OFF for other in self._trials())
        self.study.sampler = make_sampler(self._tune, count)
        if self._tune.sampler == "grid" and not self.waiting and (values := self._untried()) is not None:
            self.study.enqueue_trial(self._labels(values))
        trial = self.study.ask()
        values = self._suggest(trial)
        key = set_key(values)
        same = [other for other in self._trials() if other.user_attrs.get("set") == key]
        trial.set_user_attr("values", values)
        trial.set_user_attr("set", key)
        known = [other for other in same if other.user_attrs.get("fate") not in _CUT_OFF]
        if known:
            self._tell_duplicate(trial.number, known[0])
            return None
        return Asked(trial.number, values, key, trial, same[-1].number if same else None)

    def _suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for one in self._parameters:
            if not one.exists(values):
                continue
            label: Any
            if one.kind == "choice":
                label = trial.suggest_categorical(one.key, one.labels)
            elif one.kind == "int":
                assert isinstance(one.low, int)
                assert isinstance(one.high, int)
                label = trial.suggest_int(one.key, one.low, one.high, step=int(one.step or 1), log=one.log)
            else:
                assert one.low is not None
                assert one.high is not None
                label = trial.suggest_float(one.key, one.low, one.high, step=one.step, log=one.log)
                if one.step is not None:  # 0.1 + 2 * 0.1 is not 0.3 in binary, and another key would be another set
                    label = _step(one, round((label - one.low) / one.step))
            values[one.key] = one.value_of(label)
        return values

    def _labels(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Parameter values as a study holds them."""
        labels: dict[str, Any] = {}
        for one in self._parameters:
            if one.key in values:
                value = values[one.key]
                labels[one.key] = one.labels[one.choices.index(value)] if one.kind == "choice" else value
        return labels

    def _tell_duplicate(self, number: int, known: FrozenTrial) -> None:
        """Give a repeated set the result that is known; one under way counts as failed, so as not to be proposed."""
        told = {
            name: known.user_attrs[name]
            for name in ("fold_scores", "score", "standard_error")
            if name in known.user_attrs
        }
        told |= {"fate": "duplicate", "reason": f"the same parameters as trial {known.number}"}
        if known.state == TrialState.COMPLETE:
            self.tell(number, TrialState.COMPLETE, known.value, **told)
        else:
            state = TrialState.PRUNED if known.state == TrialState.PRUNED else TrialState.FAIL
            self.tell(number, state, **told)

    def _untried(self) -> dict[str, Any] | None:
        """A parameter set that nobody asked for, at random; None where the space holds no other."""
        known = self.keys()
        drawn = random.Random(_seed(self._tune.seed, len(known)))
        if (sets := size(self._parameters)) is not None and sets <= _ENUMERATED:
            left = [values for values in _every_set(self._parameters, {}) if set_key(values) not in known]
            return drawn.choice(left) if left else None
        sampler = optuna.samplers.RandomSampler(seed=_seed(self._tune.seed, len(known)))
        apart = optuna.create_study(sampler=sampler)
        for _ in range(1000):
            values = self._suggest(apart.ask())
            if set_key(values) not in known:
                return values
        return None

    # The dead ---------------------------------------------------------------------------------------------------------

    def _bury(self) -> None:
        """End the trials whose process is gone, and queue them again once; the caller holds the lock for asking."""
        for trial in self._trials():
            if trial.state != TrialState.RUNNING or trial.number in self._mine or self._alive(trial):
                continue
            # It may have ended since it was read: its process says so before it lets go of the folder.
            if self._frozen(trial.number).state != TrialState.RUNNING:
                continue
            key = trial.user_attrs.get("set")
            kept = len(list((self._folder / key).glob("fold*/seed*/unit.json"))) if key else 0
            died_here = any(
                other.user_attrs.get("fate") == "died" and other.user_attrs.get("kept") == kept
                for other in self._trials()
                if key and other.user_attrs.get("set") == key
            )
            self._storage.set_trial_user_attr(trial._trial_id, "kept", kept)
            if died_here:
                reason = "its process died twice in the same fold"
                self.tell(trial.number, TrialState.FAIL, reason=reason)
                self.notes.append(f"trial {trial.number} failed: {reason}")
            else:
                self._end_and_queue(trial, "died", "its process died")
                self.notes.append(f"trial {trial.number} was cut off; it is tried again from its {kept} finished folds")

    def _alive(self, trial: FrozenTrial) -> bool:
        """Whether some process holds the lock of the trial's folder."""
        key = trial.user_attrs.get("set")
        if key is None:  # cut off between asking and locking, which only happens under the lock that we hold
            return False
        lock = FileLock(self._folder / key / ".lock", timeout=0, thread_local=False)
        try:
            (self._folder / key).mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            return True
        lock.release()
        return False

    def _end_and_queue(self, trial: FrozenTrial, fate: str, reason: str) -> None:
        values = trial.user_attrs.get("values")
        labels = trial.system_attrs.get("fixed_params") if values is None else self._labels(values)
        # A kill between the two lines below leaves it queued, but not told.
        queued = [
            other.system_attrs.get("fixed_params") for other in self._trials() if other.state == TrialState.WAITING
        ]
        if labels and labels not in queued:
            # With what the sampler noted: CMA-ES counts a generation by it, and keeps its state there.
            noted = {**trial.system_attrs, "fixed_params": dict(labels)}
            self.study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING, system_attrs=noted))
        self.tell(trial.number, TrialState.FAIL, fate=fate, reason=reason)

    # Optuna -----------------------------------------------------------------------------------------------------------

    def _trials(self) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self.study.get_trials(deepcopy=False)
        return trials

    def _frozen(self, number: int) -> FrozenTrial:
        return next(trial for trial in self._trials() if trial.number == number)


def open_search(
    folder: Path,
    name: str,
    tune: TuneSpec,
    parameters: tuple[Parameter, ...],
    *,
    own: Mapping[str, Any],
    identity: Mapping[str, Any],
    greater_is_better: bool,
    epochs: int,
    storage: str | None = None,
    fresh: bool = False,
) -> Search:
    """Open the study of an experiment, or make it.

    Args:
        folder: `oof/<exp>/tune`.
        name: What it is called in the storage.
        tune: The experiment's `tune` section.
        parameters: The space.
        own: The spec's own values: the first trial.
        identity: What makes two trials comparable; a study of another identity is refused.
        greater_is_better: Direction of the search.
        epochs: Of a fold of a trial.
        storage: None for SQLite in `folder`, `journal:<file>`, or the URL of a database.
        fresh: Delete the study that is there.

    Raises:
        FoldwiseError: If the storage cannot be opened, or its study differs, saying where.
    """
    folder.mkdir(parents=True, exist_ok=True)
    opened = open_storage(storage, folder)
    with FileLock(folder / ".ask.lock", thread_local=False):
        there = {summary.study_name for summary in optuna.get_all_study_summaries(opened, include_best_trial=False)}
        if fresh and name in there:
            optuna.delete_study(study_name=name, storage=opened)
            there.remove(name)
        study = optuna.create_study(
            storage=opened,
            study_name=name,
            load_if_exists=True,
            direction="maximize" if greater_is_better else "minimize",
            sampler=make_sampler(tune, 0),
            pruner=make_pruner(tune, epochs),
        )
        search = Search(study, opened, tune, parameters, folder)
        if name not in there or "identity" not in study.user_attrs:
            study.set_user_attr("attempt", datetime.now(UTC).isoformat(timespec="seconds"))
            if not search.waiting:
                study.enqueue_trial(search._labels(own))
            study.set_user_attr("identity", dict(identity))  # last: the study is whole
        elif lines := differences(_with_defaults(study.user_attrs["identity"]), dict(identity)):
            search.close()
            changed = "\n".join(f"  {line}" for line in lines)
            raise FoldwiseError(
                f"the study `{name}` was made otherwise, and its trials cannot be compared with new ones:\n{changed}\n"
                "  fix: change it back, or FRESH=1 (--fresh) deletes the study and begins anew"
            )
    return search


def _with_defaults(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as it was kept, the keys that specs have come to know since being at their defaults."""
    kept = identity["spec"]
    spec = with_defaults({"name": "study", **kept})
    return {**identity, "spec": {key: value for key, value in spec.items() if key != "name" or key in kept}}


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """Open a storage; see `open_search`."""
    import sqlalchemy.exc

    try:
        if url is not None and url.startswith("journal:"):
            # Absolute, since its lock is a link to it: of a dangling one Optuna never finds out that its owner died.
            path = Path(url.removeprefix("journal:")).absolute()
            path.parent.mkdir(parents=True, exist_ok=True)
            return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
        if url is None:
            # Several processes wait for each other instead of failing with "database is locked".
            patience = {"connect_args": {"timeout": 60}}
            return _open_database(f"sqlite:///{folder / 'study.db'}", **patience)
        return _open_database(url)
    except ImportError as error:
        raise FoldwiseError(
            f"the storage {without_password(url or '')} needs a driver that is not installed ({error})\n"
            "  fix: for PostgreSQL .venv/bin/pip install -e '.[postgres]' and STORAGE=postgresql+psycopg://user@host/name"
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, OSError, ValueError) as error:
        first = without_password(str(error).splitlines()[0])
        raise FoldwiseError(
            f"the storage {without_password(url or '')} cannot be opened: {first}\n"
            "  fix: STORAGE=postgresql+psycopg://user:password@host/database, journal:<file>, or none for SQLite"
        ) from error


def _open_database(url: str, **options: Any) -> BaseStorage:
    """Open a database, in which processes that open it at once all try to create Optuna's tables.

    The first does, and PostgreSQL tells the others that what was not there when they looked now is; they find it there
    when they look again. They look without a pool, which would leave the connections of a failed attempt open.
    """
    import sqlalchemy.exc
    from sqlalchemy.pool import NullPool

    for wait_s in (0.1, 0.3, 1.0, 3.0, None):
        try:
            close_storage(optuna.storages.RDBStorage(url, options | {"poolclass": NullPool}))
            break
        except sqlalchemy.exc.DBAPIError as error:
            others = isinstance(error, sqlalchemy.exc.IntegrityError) or "already exists" in str(error)
            if wait_s is None or not others:
                raise
            time.sleep(wait_s)
    return optuna.storages.RDBStorage(url, options)


def close_storage(storage: BaseStorage) -> None:
    """Let go of a storage's connections."""
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


class _CmaEsSampler(optuna.samplers.CmaEsSampler):  # type: ignore[misc]
    """Optuna's, but seeded by the trials that count: it adds the trial's number, which grows with each retry."""

    def __init__(self, seed: int, count: int) -> None:
        super().__init__(seed=seed, warn_independent_sampling=False)
        self._count = count

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        """Draw as for the trial after `count` others."""
        numbered = copy.copy(trial)
        numbered.number = self._count
        drawn: dict[str, Any] = super().sample_relative(study, numbered, search_space)
        return drawn


def make_sampler(tune: TuneSpec, count: int) -> BaseSampler:
    """Optuna's sampler for the trial after `count` others, seeded by both: a resumed study draws as it would have."""
    seed = _seed(tune.seed, count)
    match tune.sampler:
        case "tpe":
            with warnings.catch_warnings():  # `group` may change, says Optuna
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)
        case "cmaes":
            return _CmaEsSampler(seed, count)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
        case _:  # a grid is queued set by set: Optuna's own sampler of it cannot be asked outside `optimize`
            return optuna.samplers.RandomSampler(seed=seed)


def make_pruner(tune: TuneSpec, epochs: int) -> optuna.pruners.BasePruner:
    """Optuna's pruner of the epochs of a trial's first fold."""
    match tune.prune.epochs:
        case "median":
            return optuna.pruners.MedianPruner()
        case "hyperband":
            return optuna.pruners.HyperbandPruner(max_resource=epochs)
        case _:
            return optuna.pruners.NopPruner()


def set_key(values: Mapping[str, Any]) -> str:
    """Names a parameter set: equal values, equal name."""
    return sha256_json(dict(values))[:12]


def _every_set(parameters: Sequence[Parameter], values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every parameter set of a finite space."""
    if not parameters:
        yield values
        return
    first, rest = parameters[0], parameters[1:]
    if not first.exists(values):
        yield from _every_set(rest, values)
        return
    for value in first.choices if first.kind == "choice" else (_step(first, n) for n in range(first.count or 0)):
        yield from _every_set(rest, {**values, first.key: value})


def _step(one: Parameter, steps: int) -> float | int:
    """The value of a range after so many steps from its low end, as one would write it."""
    value = Decimal(str(one.low)) + steps * Decimal(str(one.step or 1))
    return int(value) if one.kind == "int" else float(value)


def _seed(seed: int, count: int) -> int:
    return int(sha256_json([seed, count])[:8], 16)


logging.getLogger("alembic").setLevel(logging.ERROR)
