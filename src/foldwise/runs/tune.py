"""Tuning: trials of a study, their folds through an executor, a judge after each fold, the best few in full.

What was trained is never trained again: a trial's folds are kept in a folder named after its parameters.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

from foldwise.errors import DeviceError, DivergedError, FoldwiseError, RecordError
from foldwise.learn.device import pick_runtime
from foldwise.records.store import RunFolder, Unit, read_probs, rows_of, shown
from foldwise.records.study import Scored, TrialRow, predictions_of, write_study
from foldwise.runs.events import (
    EpochDone,
    Event,
    Listener,
    Message,
    RunDone,
    RunStarted,
    Stage,
    TrialDone,
    TrialEvent,
    TrialStarted,
    TuneDone,
    TuneStarted,
)
from foldwise.runs.events import (
    TrialState as State,
)
from foldwise.runs.executors import STOP, Job, Outcome, StoppedError, make_executor
from foldwise.runs.experiment import unit_done
from foldwise.runs.judge import Verdict, judge, seed_spread
from foldwise.runs.plan import Plan, make_plan, with_spec
from foldwise.runs.provenance import command_line, git_state, versions, without_password
from foldwise.runs.study import Asked, close_storage, open_search, open_storage, set_key
from foldwise.runs.winner import (
    Finalist,
    corrected,
    difference,
    finalist_of,
    own_run,
    ranked,
    second_split,
    summary,
    tuned_path,
    write_winner,
)
from foldwise.spec.model import ExperimentSpec, TuneSpec, resolved
from foldwise.spec.space import own_values, parameters, with_fidelity, with_parameters
from foldwise.stats import paired_difference, standard_error

_SEEDS = "seeds"


@dataclass(frozen=True)
class TuneOptions:
    """What belongs to a call rather than to the experiment.

    Attributes:
        trials: Distinct parameter sets in all; None for the spec's number.
        storage: None for SQLite beside the trials, `journal:<file>`, or the URL of a database.
        on: Name of the executor.
        workers: Units at a time; None for what the machine has room for.
        device: As `pick_runtime` takes it.
        fresh: Delete the study that is there, and begin anew.
    """

    trials: int | None = None
    storage: str | None = None
    on: str = "local"
    workers: int | None = None
    device: str | None = None
    fresh: bool = False


@dataclass(eq=False)
class _Trial:
    """A trial that is under way in this process."""

    number: int
    stage: Stage
    values: dict[str, Any]
    plan: Plan
    folder: RunFolder
    folds: tuple[int, ...]
    asked: Asked | None = None
    units: dict[tuple[int, int], Unit] = field(default_factory=dict)
    under_way: set[tuple[int, int]] = field(default_factory=set)
    judged: int = 0
    ended: bool = False

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.plan.spec.seeds

    @property
    def done(self) -> tuple[int, ...]:
        """The folds that are finished with every seed, in their order."""
        return tuple(fold for fold in self.folds if all((fold, seed) in self.units for seed in self.seeds))

    def missing(self, fold: int) -> list[tuple[int, int]]:
        """The units of a fold that nobody trains yet."""
        return [
            (fold, seed) for seed in self.seeds if (fold, seed) not in self.units and (fold, seed) not in self.under_way
        ]

    def probs(self, fold: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a finished fold and the (n, C) mean over seeds."""
        units = [self.units[fold, seed] for seed in self.seeds]
        ids = units[0].val_ids
        total = np.zeros(units[0].val_probs.shape)
        for unit in units:
            total += unit.val_probs[rows_of(unit.val_ids, ids)]
        return ids, total / len(units)

    @property
    def wall_s(self) -> float:
        return round(sum(float(unit.info["wall_s"]) for unit in self.units.values()), 1)


def tune(
    root: Path,
    spec: ExperimentSpec,
    options: TuneOptions,
    *,
    screen: Listener,
    follow: Callable[[Path], Sequence[Listener]] = lambda _path: (),
    plots: Callable[[Any, Path, str], list[str]] = lambda _study, _path, _metric: [],
) -> dict[str, Any] | None:
    """Search the spec's `tune.space`, or go on with the search; ends with `experiments/<exp>_tuned.yaml`.

    Args:
        root: The project's root.
        spec: The experiment, with a `tune` section.
        options: What belongs to this call.
        screen: Shows the study to the user; closed at the end, however that comes.
        follow: Makes further listeners for the study's folder; closed too.
        plots: Draws an Optuna study into a folder, its score called so, and returns notes.

    Returns:
        The content of `tune.json`; None while other processes still have trials under way.

    Raises:
        FoldwiseError: For whatever the user can mend; what was finished before is kept.
    """
    if spec.tune is None:
        raise FoldwiseError(
            f"`{spec.name}` has no `tune` section, so there is nothing to search\n"
            "  fix: give it `tune: {space: {optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}}}`; see docs/TUNING.md"
        )
    return _Tuner(root, spec, spec.tune, options, screen, follow, plots).run()


class _Tuner:
    """One call of `tune`: the study, the executor, and the trials under way."""

    def __init__(
        self,
        root: Path,
        spec: ExperimentSpec,
        tune: TuneSpec,
        options: TuneOptions,
        screen: Listener,
        follow: Callable[[Path], Sequence[Listener]],
        plots: Callable[[Any, Path, str], list[str]],
    ) -> None:
        self.root, self.spec, self.tune, self.options = root, spec, tune, options
        tuned_path(root, spec.name)  # refuses before anything is trained
        self.plan = make_plan(root, spec, say=lambda text: screen.on(Message(text)))
        self.path = root / "oof" / spec.name / "tune"
        self.metric = self.plan.metric
        self.folds = self._fidelity_folds()
        self.runtime = pick_runtime(options.device, spec.train.precision, spec.train.threads)
        self.wanted = tune.trials if options.trials is None else options.trials
        if self.wanted < 1:
            raise FoldwiseError(f"`TRIALS >= 1` must hold, but got {self.wanted}\n  fix: leave TRIALS (--trials) out")
        if not (self.plan.folds.fold >= 0).any():
            raise FoldwiseError(
                f"`{spec.competition}` validates no image (`split.kind: {self.plan.data.competition.split.kind}`), so "
                "there is nothing to compare trials by\n  fix: another `split` in its competition.yaml"
            )
        self.trial_spec = with_fidelity(spec, tune.fidelity)
        self.labels = dict(zip(self.plan.table.ids.tolist(), self.plan.table.labels.tolist(), strict=True))
        self.listeners = [screen]
        self._follow, self._plots = follow, plots
        self.active: list[_Trial] = []
        self.by_folder: dict[Path, tuple[_Trial, tuple[int, int]]] = {}
        self.held: dict[int, tuple[Plan, RunFolder]] = {}

    @property
    def full(self) -> bool:
        """Whether a trial is the whole experiment already."""
        return resolved(self.trial_spec) == resolved(self.spec) and self.folds == self.plan.table.folds

    def emit(self, event: Event) -> None:
        for listener in self.listeners:
            listener.on(event)

    def _close_listeners(self) -> None:
        for listener in self.listeners:
            listener.close()

    def run(self) -> dict[str, Any] | None:
        with ExitStack() as stack:
            stack.callback(self._close_listeners)
            if self.options.fresh and self.path.exists():
                self._delete()
            self.search = open_search(
                self.path,
                f"{self.spec.competition}/{self.spec.name}",
                self.tune,
                parameters(self.spec),
                own=own_values(self.spec),
                identity=self._identity(),
                greater_is_better=self.metric.greater_is_better,
                epochs=self.trial_spec.train.epochs,
                storage=self.options.storage,
                fresh=self.options.fresh,
            )
            stack.callback(self.search.close)
            self.listeners.extend(self._follow(self.path))
            self.executor = stack.enter_context(
                closing(
                    make_executor(
                        self.options.on,
                        self._hear,
                        threads=self.runtime.threads,
                        device=self.options.device,
                        workers=self.options.workers,
                    )
                )
            )
            self.emit(self._started())
            try:
                self._train(self._open_next)
                while (others := self.search.others_at_work()) and self.search.waiting:
                    self._train(self._open_next)  # of a process that died meanwhile: nobody else may be left
                self._tell_notes()
                if others:
                    self.emit(Message(f"{others} trials are under way in other processes; the last to finish goes on"))
                    return None
                return self._finish()
            finally:
                self._let_go()

    def _delete(self) -> None:
        """Delete what an earlier study left, unless the new one could not be begun.

        Raises:
            FoldwiseError: If another process is at work on it, or the storage cannot be opened.
        """
        if self.options.storage is not None:
            close_storage(open_storage(self.options.storage, self.path))
        with ExitStack() as stack:
            # A journal's lock is a link, and Optuna's.
            for path in sorted(path for path in self.path.rglob("*.lock") if not path.is_symlink()):
                lock = FileLock(path, timeout=0, thread_local=False)
                try:
                    stack.enter_context(lock)
                except Timeout:
                    raise FoldwiseError(
                        f"{shown(self.path)} is being worked on by another process, so it cannot begin anew\n"
                        "  fix: wait for it, or stop it"
                    ) from None
        shutil.rmtree(self.path)

    # The search -------------------------------------------------------------------------------------------------------

    def _train(self, more: Callable[[], _Trial | None]) -> None:
        """Keep the executor busy until nothing is left to train; `more` opens another trial."""
        while True:
            while len(self.by_folder) < self.executor.slots and (job := self._next_job(more)) is not None:
                self.executor.submit(job)
            if not self.by_folder:
                return
            self._take(self.executor.wait())

    def _next_job(self, more: Callable[[], _Trial | None]) -> Job | None:
        """The next fold to train: of a trial that waits for it, else of a new trial, else a further one of any."""
        for trial in self.active:
            if not trial.under_way and not trial.ended and (job := self._job_of(trial, trial.folds)) is not None:
                return job
        if (opened := more()) is not None:
            return self._job_of(opened, opened.folds)
        for trial in self.active:
            if not trial.ended and (job := self._job_of(trial, trial.folds)) is not None:
                return job
        return None

    def _job_of(self, trial: _Trial, folds: Sequence[int]) -> Job | None:
        for fold in folds:
            if fold in trial.done:
                continue
            for unit in trial.missing(fold):
                folder = trial.folder.unit_path(*unit)
                (folder / STOP).unlink(missing_ok=True)
                trial.under_way.add(unit)
                self.by_folder[folder] = (trial, unit)
                return Job(
                    self.root,
                    trial.plan.spec,
                    *unit,
                    folder,
                    self.runtime.threads,
                    self.options.device,
                    context_sha256=trial.plan.context.sha256,
                )
        return None

    def _open_next(self) -> _Trial | None:
        """A new trial that has something to train; trials whose folds are all kept end at once."""
        while True:
            if (trial := self._open_seeds()) is None and (trial := self._open_trial()) is None:
                return None
            self.active.append(trial)
            self._judge(trial)
            if not trial.ended:
                return trial

    def _open_trial(self) -> _Trial | None:
        asked = self.search.next(self.wanted, self._hold)
        self._tell_notes()
        if asked is None:
            return None
        plan, folder = self.held.pop(asked.number)
        trial = _Trial(asked.number, "search", asked.values, plan, folder, self.folds, asked)
        self.emit(
            TrialStarted(asked.number, asked.values, self.folds, self.trial_spec.train.epochs, retry_of=asked.retry_of)
        )
        self._read_kept(trial)
        return trial

    def _tell_notes(self) -> None:
        for note in self.search.notes:
            self.emit(Message(note))
        self.search.notes.clear()

    def _hold(self, asked: Asked) -> bool:
        """Open a trial's folder, which makes it ours; parameters that do not go together fail their trial."""
        try:
            plan = with_spec(self.plan, self._trial_spec(asked.values))
            self.held[asked.number] = (plan, plan.open(self.path / asked.key))
        except FoldwiseError as error:
            self._fail(asked.number, asked.values, error)
            return False
        return True

    def _trial_spec(self, values: Mapping[str, Any]) -> ExperimentSpec:
        return with_fidelity(with_parameters(self.spec, values, root=self.root), self.tune.fidelity)

    def _open_seeds(self) -> _Trial | None:
        """The own values under other seeds, to measure what a seed alone does; where no other process has them."""
        if not self._prunes or "seed_sd" in self.search.study.user_attrs or self._own_fold_scores() is None:
            return None
        if any(trial.stage == "seeds" for trial in self.active):
            return None
        seeds = tuple(max(self.spec.seeds) + 1 + index for index in range(len(self.spec.seeds)))
        plan = with_spec(self.plan, self.trial_spec.model_copy(update={"seeds": seeds}))
        try:
            folder = plan.open(self.path / _SEEDS)
        except RecordError:
            return None
        values = own_values(self.spec)
        trial = _Trial(-1, "seeds", values, plan, folder, self.folds)
        self.emit(TrialStarted(-1, values, self.folds, self.trial_spec.train.epochs, "seeds"))
        self._read_kept(trial)
        return trial

    @property
    def _prunes(self) -> bool:
        return self.tune.prune.folds and len(self.folds) > 1

    def _own_fold_scores(self) -> dict[int, float] | None:
        """Fold scores of the spec's own values, once they are complete."""
        key = set_key(own_values(self.spec))
        for trial in self.search.complete():
            if trial.user_attrs["set"] == key:
                return {int(fold): score for fold, score in trial.user_attrs["fold_scores"].items()}
        return None

    def _read_kept(self, trial: _Trial) -> None:
        for fold in trial.folds:
            for seed in trial.seeds:
                if (unit := trial.folder.finished(fold, seed)) is not None:
                    trial.units[fold, seed] = unit
                    self.emit(TrialEvent(trial.number, trial.stage, unit_done(unit)))

    def _hear(self, job: Job, event: Event) -> None:
        """Pass on what happens in a unit, and let Optuna's pruner look at the epochs of a trial's first fold."""
        trial, (fold, seed) = self.by_folder[job.folder]
        if isinstance(event, RunStarted | RunDone | TuneStarted | TrialStarted | TrialEvent | TrialDone | TuneDone):
            return
        self.emit(TrialEvent(trial.number, trial.stage, event))
        asked = trial.asked
        if (
            isinstance(event, EpochDone)
            and self.tune.prune.epochs != "none"
            and asked is not None
            and trial.stage == "search"
            and (fold, seed) == (trial.folds[0], trial.seeds[0])
        ):
            name = "loss" if self.metric.name == "log_loss" else self.metric.name
            asked.trial.report(float(event.row[f"val_{name}"]), step=event.epoch)
            if asked.trial.should_prune():
                (job.folder / STOP).touch()

    def _take(self, outcome: Outcome) -> None:
        """Keep what came back, and judge its trial."""
        trial, unit = self.by_folder.pop(outcome.job.folder)
        trial.under_way.discard(unit)
        if outcome.unit is None:
            error = outcome.error or FoldwiseError("a unit came back empty")
            if isinstance(error, StoppedError):
                (outcome.job.folder / STOP).unlink(missing_ok=True)
            if trial.ended:
                self._close(trial)
            elif isinstance(error, StoppedError):
                self._end(trial, "pruned", reason=f"{error} by `prune.epochs: {self.tune.prune.epochs}`")
            elif isinstance(error, DeviceError | DivergedError):
                self._end(trial, "failed", reason=str(error))
            else:
                raise error
            return
        trial.folder.save_unit(outcome.unit)
        trial.units[unit] = outcome.unit
        self.emit(TrialEvent(trial.number, trial.stage, unit_done(outcome.unit)))
        if trial.ended:
            self._close(trial)
        else:
            self._judge(trial)

    # The judge --------------------------------------------------------------------------------------------------------

    def _judge(self, trial: _Trial) -> None:
        """End a trial that is complete, or that the best one surely beats on the folds done so far."""
        done = trial.done
        if len(done) == len(trial.folds):
            self._end(trial, "complete")
            return
        if trial.stage != "search" or not self._prunes or len(done) <= trial.judged:
            return
        trial.judged = len(done)
        if (verdict := self._verdict(trial, done)) is not None and verdict.prune:
            reason = (
                f"after fold {done[-1]}: {verdict.gain:+.4f} +- {verdict.standard_error:.4f} to the best, "
                f"below {verdict.limit:.4f}"
            )
            self._end(trial, "pruned", reason=reason)

    def _verdict(self, trial: _Trial, done: Sequence[int]) -> Verdict | None:
        seed_sd = self.search.study.user_attrs.get("seed_sd")
        best = next(iter(self.search.complete()), None)
        if seed_sd is None or best is None:
            return None
        ids, labels, groups, probs = self._scored(trial, done)
        theirs = self._predictions(self.path / best.user_attrs["set"], done, self.spec.seeds, ids)
        return judge(
            self.metric,
            labels,
            probs,
            theirs,
            groups,
            look=len(done),
            looks=len(self.folds),
            error_rate=self.tune.prune.error_rate,
            seed_sd=seed_sd,
        )

    def _scored(self, trial: _Trial, done: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Ids, labels, groups and (n, C) probabilities of the images of finished folds."""
        parts = [trial.probs(fold) for fold in done]
        ids = np.concatenate([ids for ids, _ in parts])
        labels = np.array([self.labels[name] for name in ids.tolist()], dtype=np.int64)
        return ids, labels, self.plan.folds.groups_of(ids), np.concatenate([probs for _, probs in parts])

    def _predictions(self, folder: Path, folds: Sequence[int], seeds: Sequence[int], ids: np.ndarray) -> np.ndarray:
        """(n, C) probabilities of `ids` by kept units of those folds, whoever trained them; mean over seeds."""
        total = np.zeros((len(ids), len(self.plan.classes)))
        for seed in seeds:
            files = [folder / f"fold{fold}" / f"seed{seed}" / "val.csv" for fold in folds]
            read = [read_probs(file, ("id", "label"), self.plan.classes) for file in files]
            found = np.concatenate([columns[0] for columns, _ in read])
            total += np.concatenate([probs for _, probs in read])[rows_of(found, ids)]
        return total / len(seeds)

    def _end(self, trial: _Trial, state: State, *, reason: str = "") -> None:
        """Tell the study and the listeners what became of a trial, and let go of its folder."""
        done = trial.done
        fold_scores, score, error = {}, None, None
        if done:
            _, labels, groups, probs = self._scored(trial, done)
            score = self.metric.score(labels, probs)
            error = standard_error(self.metric, labels, probs, groups)
            for fold in done:
                _, of_fold, _, probs_of_fold = self._scored(trial, [fold])
                fold_scores[fold] = self.metric.score(of_fold, probs_of_fold)
        if trial.stage == "search" and trial.asked is not None:
            if score is not None and state == "pruned":
                # Beyond the epochs' steps: orders pruned trials for the sampler, and is looked at by no pruner.
                trial.asked.trial.report(score, step=self.trial_spec.train.epochs + len(done))
            states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
            told = {"fold_scores": fold_scores, "score": score, "standard_error": error, "wall_s": trial.wall_s}
            self.search.tell(trial.number, states[state], score, **told, reason=reason)
        elif trial.stage == "seeds" and (own := self._own_fold_scores()) is not None:
            # None where it failed: nothing is known of the spread, so nothing is pruned.
            spread = self._spread(trial, own, fold_scores) if state == "complete" else None
            self.search.study.set_user_attr("seed_sd", spread)
        self.emit(
            TrialDone(trial.number, state, trial.values, fold_scores, score, error, trial.wall_s, trial.stage, reason)
        )
        trial.ended = True
        for fold, seed in trial.under_way:
            (trial.folder.unit_path(fold, seed) / STOP).touch()
        self._close(trial)

    def _spread(self, trial: _Trial, own: Mapping[int, float], other: Mapping[int, float]) -> float:
        """How much a fold's score moves with the seed alone, beyond what its images explain."""
        folder, errors = self.path / set_key(own_values(self.spec)), []
        for fold in trial.folds:
            ids, labels, groups, probs = self._scored(trial, [fold])
            theirs = self._predictions(folder, [fold], self.spec.seeds, ids)
            errors.append(paired_difference(self.metric, labels, probs, theirs, groups).standard_error)
        return seed_spread([(own[fold], other[fold]) for fold in trial.folds], errors)

    def _close(self, trial: _Trial) -> None:
        """Let go of the folder of a trial that ended, once nothing of it is trained any more."""
        if trial.ended and not trial.under_way:
            self.active.remove(trial)
            trial.folder.close()

    def _fail(self, number: int, values: dict[str, Any], error: FoldwiseError) -> None:
        reason = str(error)
        self.search.tell(number, TrialState.FAIL, reason=reason)
        self.emit(TrialDone(number, "failed", values, {}, None, None, 0.0, reason=reason))

    def _let_go(self) -> None:
        """Give back what was interrupted, so that the next call goes on with it at once."""
        self.executor.close()
        for trial in self.active:
            if trial.stage == "search" and not trial.ended:
                self.search.let_go(trial.number, trial.folder.close)
            else:
                trial.folder.close()
        for number, (_, folder) in self.held.items():
            self.search.let_go(number, folder.close)

    # The end ----------------------------------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any] | None:
        """Run the best few in full, name the winner, write its file and the study's record."""
        try:
            lock = FileLock(self.path / ".finish.lock", timeout=0, thread_local=False).acquire()
        except Timeout:
            self.emit(Message("another process is running the finalists in full"))
            return None
        with lock:
            complete = self.search.complete()
            if not complete:
                raise FoldwiseError(
                    f"no trial of `{self.spec.name}` was completed: all {len(self.search.keys())} failed\n"
                    "  fix: their reasons are above; FRESH=1 (--fresh) begins anew"
                )
            rows, scored = self._record()
            ranking = ranked(self.plan, self._finalists(complete))
            winner = ranking[0][0] if ranking else None
            own = own_run(self.plan)
            tuned = None
            if winner is not None and winner.number is not None and winner.values != own_values(self.spec):
                spec = with_parameters(self.spec, winner.values, root=self.root)
                command = f"make tune EXP={self.spec.name}"
                tuned = write_winner(self.plan, winner, spec, len(self.search.keys()), command)
            numbers = [trial.number for trial in complete]
            best = next(row for row in rows if row.number == numbers[0])
            groups = self.plan.folds.groups_of(scored.ids)
            info = write_study(
                self.path,
                rows,
                scored,
                {
                    "experiment": self.spec.name,
                    "competition": self.spec.competition,
                    "sampler": self.tune.sampler,
                    "seed": self.tune.seed,
                    "storage": without_password(self.options.storage or "sqlite"),
                    "space": self.tune.model_dump(mode="json")["space"],
                    "folds": list(self.folds),
                    "epochs": self.trial_spec.train.epochs,
                    "image_size": self.trial_spec.model.image_size,
                    "splits": self.plan.data.competition.split.repeats,
                    "trials": self._counts(rows),
                    "fold_trainings": self._trainings(rows),
                    "seed_sd": self.search.study.user_attrs.get("seed_sd"),
                    "own": own_values(self.spec),
                    "best": {
                        "number": best.number,
                        "parameters": best.parameters,
                        "score": best.score,
                        "standard_error": best.standard_error,
                    },
                    "corrected": corrected(
                        self.metric,
                        scored.labels,
                        groups,
                        [predictions_of(scored, number)[1] for number in numbers],
                    ),
                    "finalists": [told for _, told in ranking],
                    "corrected_full": None
                    if winner is None
                    else corrected(
                        self.metric,
                        winner.labels,
                        self.plan.folds.groups_of(winner.ids),
                        [one.probs[rows_of(one.ids, winner.ids)] for one, _ in ranking],
                    ),
                    "difference": difference(self.plan, winner, own) if winner and own and tuned else None,
                    "second_split": self._second_split(tuned),
                    "winner": winner and winner.values,
                    "tuned": None if tuned is None else tuned.name,
                    "folds_sha256": self.plan.context.folds_sha256,
                    "inputs_sha256": self.plan.context.inputs_sha256,
                    "wall_s": round(sum(row.wall_s for row in rows), 1),
                    "device": str(self.runtime),
                    "executor": self.executor.told,
                    "git": git_state(self.root),
                    "versions": versions() | {"optuna": version("optuna")},
                    "command": command_line(),
                },
            )
            for note in self._plots(self.search.study, self.path, self.metric.name):
                self.emit(Message(note))
            self.emit(TuneDone(info, shown(self.path), tuple(summary(info))))
            return info

    def _finalists(self, complete: Sequence[FrozenTrial]) -> list[Finalist]:
        """The best few, trained in full, and the own run where it is kept."""
        if not self.tune.finalists:
            return []
        own = own_run(self.plan)
        found = [] if own is None else [finalist_of(own, own_values(self.spec))]
        trials = []
        for frozen in complete[: self.tune.finalists]:
            values = frozen.user_attrs["values"]
            if own is not None and values == own_values(self.spec):
                continue
            plan = with_spec(self.plan, with_parameters(self.spec, values, root=self.root))
            key = frozen.user_attrs["set"]
            folder = plan.open(self.path / (key if self.full else f"{key}-full"))
            trial = _Trial(frozen.number, "full", values, plan, folder, self.plan.table.folds)
            self.emit(TrialStarted(trial.number, values, trial.folds, plan.spec.train.epochs, "full"))
            self._read_kept(trial)
            self.active.append(trial)
            trials.append(trial)
        for trial in trials:
            self._judge(trial)
        self._train(lambda: None)
        for trial in trials:
            if len(trial.done) < len(trial.folds):
                continue  # too much for the device in full, or it diverged; its listeners know why
            ids, labels, _, probs = self._scored(trial, trial.folds)
            units = tuple(trial.units[unit] for unit in trial.plan.units())
            found.append(Finalist(trial.number, trial.values, ids, labels, probs, units, trial.folder.path))
        if not found:
            raise FoldwiseError(
                f"none of the finalists of `{self.spec.name}` could be trained in full\n"
                "  fix: their reasons are above; a greater `tune.finalists` lets more trials try"
            )
        return found

    def _record(self) -> tuple[list[TrialRow], Scored]:
        """The study's tables, from its storage and from what its trials kept."""
        folds = self.plan.folds
        inside = np.isin(folds.fold, self.folds)
        ids = folds.ids[inside]
        labels = np.array([self.labels[name] for name in ids.tolist()], dtype=np.int64)
        scored = Scored(self.metric.name, self.plan.classes, ids, folds.fold[inside], labels)
        rows = []
        for done in self.search.rows():
            rows.append(
                TrialRow(
                    done.number,
                    done.state,
                    done.parameters,
                    done.fold_scores,
                    done.score,
                    done.standard_error,
                    done.wall_s,
                    done.reason,
                )
            )
            if done.state != "duplicate":
                for fold in done.fold_scores:
                    of_fold = ids[scored.fold == fold]
                    folder = self.path / set_key(done.parameters)
                    scored.add(done.number, of_fold, self._predictions(folder, [fold], self.spec.seeds, of_fold))
        return rows, scored

    def _counts(self, rows: Sequence[TrialRow]) -> dict[str, int]:
        states = [row.state for row in rows]
        return {"distinct": len(self.search.keys())} | {
            state: states.count(state) for state in ("complete", "pruned", "failed", "duplicate")
        }

    def _trainings(self, rows: Sequence[TrialRow]) -> dict[str, Any]:
        """Folds that were trained for trials which ended well or were pruned, and what pruning saved."""
        judged = [row for row in rows if row.state in ("complete", "pruned")]
        done, possible = sum(len(row.fold_scores) for row in judged), len(judged) * len(self.folds)
        return {"done": done, "possible": possible, "saved": 1 - done / possible if possible else 0.0}

    def _second_split(self, tuned: ExperimentSpec | None) -> dict[str, Any] | None:
        if tuned is None or self.plan.data.competition.split.repeats < 2:
            return None
        try:
            plan = make_plan(self.root, self.spec, split=1)
        except RecordError:  # what it starts or learns from is of the first split
            return None
        return second_split(plan, tuned)

    # What the study is ------------------------------------------------------------------------------------------------

    def _fidelity_folds(self) -> tuple[int, ...]:
        there = self.plan.table.folds
        assert self.spec.tune is not None
        wanted = self.spec.tune.fidelity.folds or there
        if unknown := sorted(set(wanted) - set(there)):
            raise FoldwiseError(
                f"`tune.fidelity.folds` names fold {unknown[0]}, but `{self.spec.competition}` has folds "
                f"{', '.join(map(str, there))}\n  fix: name some of these"
            )
        return tuple(wanted)

    def _identity(self) -> dict[str, Any]:
        """What makes trials comparable: the data, the folds, the fidelity, the space, and the rest of the spec."""
        spec = resolved(self.spec)
        spec.pop("name")  # that of the study
        tune = self.tune.model_dump(mode="json")
        context = self.plan.context
        origins = {"start": context.start_sha256, "teachers": context.teachers_sha256, "guard": context.guard_sha256}
        return {
            "spec": spec,
            "tune": {"space": tune["space"], "fidelity": tune["fidelity"]},
            "folds": context.folds_sha256,
            "inputs": context.inputs_sha256,
            **{name: value for name, value in origins.items() if value is not None},
        }

    def _started(self) -> TuneStarted:
        return TuneStarted(
            experiment=self.spec.name,
            competition=self.spec.competition,
            metric=self.metric.name,
            greater_is_better=self.metric.greater_is_better,
            trials=self.wanted,
            finished=tuple(self.search.rows()),
            folds=self.folds,
            epochs=self.trial_spec.train.epochs,
            device=str(self.runtime),
            executor=self.executor.told,
            sampler=self.tune.sampler,
            space=self.tune.model_dump(mode="json")["space"],
            own=own_values(self.spec),
            spec=resolved(self.spec),
            attempt=self.search.attempt,
        )
