"""What lies in `oof/<exp>/`: kept unit by unit while an experiment runs, sealed by `run.json`, verified when read back.

Files are joined by id; probabilities are float32, written with nine significant digits, which is exact.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from foldwise.data.folds import SCORED_ONLY, Folds, read_folds
from foldwise.errors import Fault, RecordError
from foldwise.files import atomic_write, pretty_json, sha256_file, sha256_json
from foldwise.metrics import METRICS, Labels, Metric
from foldwise.spec.load import differences, with_defaults
from foldwise.spec.yaml import read_yaml
from foldwise.stats import standard_error

SCHEMA_VERSION = 1
FRESH = "redo it with --fresh"

_SPEC, _OOF, _TEST, _HISTORY, _RECORD = "spec.yaml", "oof.csv", "test.csv", "history.csv", "run.json"
_VAL, _WEIGHTS, _CHECKPOINT, _UNIT = "val.csv", "weights.safetensors", "checkpoint.pt", "unit.json"
_STATE, _LOCK = ".state.json", ".lock"
# A folder in a run's folder that is not of the run: the study that searched its experiment's space.
STUDY = "tune"

Ids = NDArray[np.str_]
Probs32 = NDArray[np.float32]
Probs64 = NDArray[np.float64]


@dataclass(frozen=True)
class Context:
    """What a run's predictions depend on besides its spec; a run goes on only in the same context.

    Attributes:
        competition: Name of the competition.
        classes: Class names, in the order of the indices.
        split: How `folds.csv` was made: `kind` and its parameters; for `kfold` at least `folds`.
        folds_sha256: Of the split.
        inputs_sha256: Of ids, labels and pixels.
        smoke: Whether this is a smoke run.
        start_sha256: Of the weights that it starts from; None where it starts from none of another run's.
        teachers_sha256: Of each run that it learns from, by name; None where there is none.
        guard_sha256: Of the external images that join, and of what the leak guard keeps out; None where it kept none.
    """

    competition: str
    classes: tuple[str, ...]
    split: dict[str, Any]
    folds_sha256: str
    inputs_sha256: str
    smoke: bool = False
    start_sha256: str | None = None
    teachers_sha256: dict[str, str] | None = None
    guard_sha256: str | None = None

    @property
    def sha256(self) -> str:
        """Of all of it."""
        return sha256_json(asdict(self))


@dataclass(frozen=True, eq=False)
class Unit:
    """One fold trained with one seed.

    Attributes:
        fold: From 0.
        seed: Of every random choice.
        val_ids: (n,) ids of the fold.
        val_labels: (n,) int64 class indices.
        val_probs: (n, C) float32.
        test_ids: (t,) ids that are predicted but not validated on: unlabelled ones, and those of a labelled test part.
        test_probs: (t, C) float32.
        history: One row an epoch.
        info: Plain JSON values: score, wall_s, epochs, best_epoch, peak_rss_mib, device, threads, precision, n_train,
            n_val, and what else is worth keeping.
    """

    fold: int
    seed: int
    val_ids: Ids
    val_labels: Labels
    val_probs: Probs32
    test_ids: Ids
    test_probs: Probs32
    history: list[dict[str, float | int]]
    info: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Run:
    """A complete run, verified.

    Attributes:
        name: Name of the experiment.
        path: Its folder.
        info: The content of `run.json`.
        classes: Class names, in the order of the indices.
        ids: (N,) validated ids, each once; none for a `full` split.
        fold: (N,) int64.
        labels: (N,) int64 class indices.
        probs: (N, C) float64, as `oof.csv` reads.
        test_ids: (T,) ids.
        test_probs: (T, C) float64, as `test.csv` reads.
    """

    name: str
    path: Path
    info: dict[str, Any]
    classes: tuple[str, ...]
    ids: Ids
    fold: NDArray[np.int64]
    labels: Labels
    probs: Probs64
    test_ids: Ids
    test_probs: Probs64


class RunFolder:
    """The folder of a run that is being made, locked against other processes until `close`.

        oof/<exp>/spec.yaml           the resolved spec
                  fold<k>/seed<s>/    val.csv, test.csv, history.csv, weights.safetensors; the trainer's checkpoint.pt;
                                      unit.json, written last: the unit is kept
                  oof.csv, test.csv, history.csv
                  run.json            written last: the run is complete
                  .state.json, .lock  of this machine alone: the attempt and its context

    Attributes:
        path: `oof/<exp>`.
        attempt: 1, and one more with each `fresh`.
        started: When the attempt began, UTC ISO 8601.
        notes: Lines for the user, e.g. about a damaged unit that must be trained again.
    """

    def __init__(
        self, path: Path, lock: FileLock, spec_sha256: str, context: Context, attempt: int, started: str
    ) -> None:
        self.path = path
        self.attempt = attempt
        self.started = started
        self.notes: list[str] = []
        self._lock = lock
        self._context = context
        self._vouched = {"spec": spec_sha256, "context": sha256_json(_plain(context))}

    @classmethod
    def open(
        cls, path: Path, *, spec: Mapping[str, Any], spec_yaml: str, context: Context, fresh: bool = False
    ) -> RunFolder:
        """Create the folder of a run, or go on with the one that is there.

        Args:
            path: `oof/<exp>`.
            spec: The resolved spec, as plain JSON types.
            spec_yaml: The same as YAML; what `spec.yaml` gets.
            context: What else the run depends on.
            fresh: Delete what is there first, which makes this the next attempt.

        Returns:
            The folder, locked.

        Raises:
            RecordError: If another process runs it, or it holds a run of another spec or context; each difference is
                named.
        """
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / _LOCK, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise RecordError(
                [Fault(shown(path), "is being run by another process", "wait for it, or stop it")]
            ) from None
        try:
            state = _open_attempt(path, dict(spec), context, fresh=fresh)
            if not (path / _SPEC).exists():
                atomic_write(path / _SPEC, spec_yaml)
            return cls(path, lock, sha256_file(path / _SPEC), context, state["attempt"], state["started"])
        except BaseException:
            lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes in."""
        self._lock.release()

    @property
    def record(self) -> dict[str, Any] | None:
        """The content of `run.json` when the run is complete, else None."""
        return _read_json(self.path / _RECORD)

    def unit_path(self, fold: int, seed: int) -> Path:
        """Folder of one unit, where the trainer keeps its checkpoint and weights."""
        return self.path / f"fold{fold}" / f"seed{seed}"

    def finished(self, fold: int, seed: int) -> Unit | None:
        """Read one kept unit.

        Returns:
            The unit; None when it was not kept, or when a file is not what was kept: then `notes` says which.
        """
        folder = self.unit_path(fold, seed)
        if not (folder / _UNIT).exists():
            return None
        try:
            return _read_unit(folder, self._vouched, self._context.classes)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.notes.append(f"fold {fold}, seed {seed} is trained again: {shown(folder)} is damaged ({error})")
            return None

    def save_unit(self, unit: Unit) -> None:
        """Keep a finished unit, `unit.json` last, and delete its checkpoint.

        `weights.safetensors`, where the trainer left one, is kept by its hash. An older `run.json` goes first.
        """
        (self.path / _RECORD).unlink(missing_ok=True)
        folder = self.unit_path(unit.fold, unit.seed)
        (folder / _UNIT).unlink(missing_ok=True)
        classes = self._context.classes
        names = np.array(classes)[unit.val_labels]
        write_probs(folder / _VAL, {"id": unit.val_ids, "label": names}, unit.val_probs, classes)
        write_probs(folder / _TEST, {"id": unit.test_ids}, unit.test_probs, classes)
        _write_history(folder / _HISTORY, [{"fold": unit.fold, "seed": unit.seed} | row for row in unit.history])
        files = [name for name in (_VAL, _TEST, _HISTORY, _WEIGHTS) if (folder / name).exists()]
        vouched = self._vouched | {"files": {name: sha256_file(folder / name) for name in files}}
        atomic_write(
            folder / _UNIT, pretty_json({"fold": unit.fold, "seed": unit.seed} | unit.info | {"vouched": vouched})
        )
        (folder / _CHECKPOINT).unlink(missing_ok=True)

    def complete(
        self,
        units: Sequence[tuple[int, int]],
        *,
        folds: Folds,
        labels: Labels,
        metric: Metric,
        info: Mapping[str, Any],
        sources: NDArray[np.str_] | None = None,
    ) -> dict[str, Any]:
        """Gather the kept units into `oof.csv`, `test.csv` and `history.csv`, and seal the run with `run.json`.

        Probabilities are averaged over seeds for `oof.csv`, over all units for `test.csv`. Figures are computed from
        the files as they read back, so that anyone can recompute them from there.

        Args:
            units: Every (fold, seed) of the run, the seeds the same for all folds.
            folds: The split; the rows of `oof.csv` are its ids with a fold from 0, in its order.
            labels: (n,) int64 class indices of `folds.ids`.
            metric: The competition's.
            info: What only the caller knows: git, versions, tta, parameters, external, leak_guard, marks, command,
                tracker, and whatever else is worth keeping. Device, threads and precision are taken from the units
                unless given here.
            sources: (n,) where each of `folds.ids` is from, in a set merged from several: each is scored apart too.

        Returns:
            The content of `run.json`. `fold_scores` are those of the rows of `oof.csv`, `seed_scores` those of each
            seed alone over all folds; scores are None where no row is validated.

        Raises:
            RecordError: If a unit is not kept, or its ids or labels are not those of the split.
        """
        kept = self._kept(units, folds, labels)
        classes = self._context.classes
        for name in (_RECORD, _OOF, _TEST, _HISTORY):
            (self.path / name).unlink(missing_ok=True)
        _write_history(self.path / _HISTORY, [row for unit in kept for row in unit.history])
        test_ids = kept[0].test_ids
        total = np.zeros(kept[0].test_probs.shape)
        for unit in kept:
            total += unit.test_probs[rows_of(unit.test_ids, test_ids)]
        write_probs(self.path / _TEST, {"id": test_ids}, (total / len(kept)).astype(np.float32), classes)
        scores = self._write_oof(kept, folds, labels, metric, sources)
        scores |= self._score_test_part(folds, labels, metric)
        record = self._record(kept, metric, scores, info)
        atomic_write(self.path / _RECORD, pretty_json(record))
        return record

    def _kept(self, units: Sequence[tuple[int, int]], folds: Folds, labels: Labels) -> list[Unit]:
        """All units of the run, each with the ids and labels of its fold and the same test ids as the others."""
        kept = [unit for fold, seed in units if (unit := self.finished(fold, seed)) is not None]
        validated = np.unique(folds.fold[folds.fold >= 0]).tolist()
        expected = {(fold, seed) for fold in validated for _, seed in units} | set(units)
        missing = sorted(expected - {(unit.fold, unit.seed) for unit in kept})
        if missing:
            names = ", ".join(f"fold {fold} seed {seed}" for fold, seed in missing)
            what = f"is not complete: {len(kept)} of {len(expected)} units; missing: {names}"
            raise RecordError([Fault(shown(self.path), what, "run the experiment again: it goes on from here")])
        test_part = set(folds.ids[folds.fold == SCORED_ONLY].tolist())
        faults = []
        for unit in kept:
            where = shown(self.unit_path(unit.fold, unit.seed))
            rows = folds.fold == unit.fold
            of_fold = sorted(zip(folds.ids[rows].tolist(), labels[rows].tolist(), strict=True))
            if sorted(zip(unit.val_ids.tolist(), unit.val_labels.tolist(), strict=True)) != of_fold:
                what = f"val.csv does not hold the {len(of_fold)} ids of fold {unit.fold} with their labels"
                faults.append(Fault(where, what, FRESH))
            if sorted(unit.test_ids.tolist()) != sorted(kept[0].test_ids.tolist()):
                what = f"test.csv does not hold the same ids as that of {_unit_name(kept[0])}"
                faults.append(Fault(where, what, FRESH))
            if lacking := test_part - set(unit.test_ids.tolist()):
                what = f"test.csv lacks {len(lacking)} ids of the labelled test part, such as {min(lacking)}"
                faults.append(Fault(where, what, FRESH))
        if faults:
            raise RecordError(faults)
        return kept

    def _write_oof(
        self, kept: Sequence[Unit], folds: Folds, labels: Labels, metric: Metric, sources: NDArray[np.str_] | None
    ) -> dict[str, Any]:
        """Write `oof.csv` and score it as it reads back; nothing is written where nothing is validated."""
        rows = folds.fold >= 0
        if not rows.any():
            return {
                "score": None,
                "standard_error": None,
                "fold_scores": {},
                "fold_standard_errors": {},
                "seed_scores": {},
                "seed_std": None,
                "source_scores": {},
                "n_scored": 0,
            }
        ids, fold, true, groups = folds.ids[rows], folds.fold[rows], labels[rows], folds.group[rows]
        classes = self._context.classes
        by_seed = {unit.seed: np.zeros((len(ids), len(classes))) for unit in kept}
        for unit in kept:
            by_seed[unit.seed][rows_of(ids, unit.val_ids)] = unit.val_probs
        mean = sum(by_seed.values(), np.zeros((len(ids), len(classes)))) / len(by_seed)
        leading = {"id": ids, "fold": fold.astype(str), "label": np.array(classes)[true]}
        write_probs(self.path / _OOF, leading, mean.astype(np.float32), classes)
        _, probs = read_probs(self.path / _OOF, ("id", "fold", "label"), classes)
        seed_scores = {str(seed): metric.score(true, seed_probs) for seed, seed_probs in by_seed.items()}
        parts = {str(k): fold == k for k in np.unique(fold).tolist()}
        origins = {} if sources is None else {name: sources[rows] == name for name in np.unique(sources[rows]).tolist()}
        return {
            "score": metric.score(true, probs),
            "standard_error": standard_error(metric, true, probs, groups),
            "fold_scores": {k: metric.score(true[part], probs[part]) for k, part in parts.items()},
            "fold_standard_errors": {
                k: standard_error(metric, true[part], probs[part], groups[part]) for k, part in parts.items()
            },
            "seed_scores": seed_scores,
            "seed_std": float(np.std(list(seed_scores.values()), ddof=1)) if len(seed_scores) > 1 else None,
            "source_scores": {
                name: {
                    "score": metric.score(true[part], probs[part]),
                    "standard_error": standard_error(metric, true[part], probs[part], groups[part]),
                    "n_scored": int(part.sum()),
                }
                for name, part in origins.items()
            },
            "n_scored": len(ids),
        }

    def _score_test_part(self, folds: Folds, labels: Labels, metric: Metric) -> dict[str, Any]:
        """Score the labelled test part of a `column` split, where there is one, from `test.csv` as it reads back."""
        rows = folds.fold == SCORED_ONLY
        if not rows.any():
            return {"test_score": None, "test_standard_error": None}
        (ids,), probs = read_probs(self.path / _TEST, ("id",), self._context.classes)
        part = probs[rows_of(ids, folds.ids[rows])]
        return {
            "test_score": metric.score(labels[rows], part),
            "test_standard_error": standard_error(metric, labels[rows], part, folds.group[rows]),
        }

    def _record(
        self, kept: Sequence[Unit], metric: Metric, scores: Mapping[str, Any], info: Mapping[str, Any]
    ) -> dict[str, Any]:
        context = self._context
        files = {"spec": _SPEC, "oof": _OOF, "test": _TEST}
        written = {key: sha256_file(self.path / name) for key, name in files.items() if (self.path / name).exists()}
        weights = {_unit_name(unit): self.unit_path(unit.fold, unit.seed) / _WEIGHTS for unit in kept}
        computed = {
            "schema_version": SCHEMA_VERSION,
            "experiment": self.path.name,
            "competition": context.competition,
            "metric": metric.name,
            **scores,
            "classes": list(context.classes),
            "split": context.split | {"sha256": context.folds_sha256},
            "seeds": list(dict.fromkeys(unit.seed for unit in kept)),
            "smoke": context.smoke,
            "attempt": self.attempt,
            "started": self.started,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_s": sum(unit.info.get("wall_s", 0.0) for unit in kept),
            "peak_rss_mib": max((unit.info.get("peak_rss_mib") or 0 for unit in kept), default=0) or None,
            "hashes": {
                "folds": context.folds_sha256,
                "inputs": context.inputs_sha256,
                "start": context.start_sha256,
                **({} if context.teachers_sha256 is None else {"teachers": context.teachers_sha256}),
                **({} if context.guard_sha256 is None else {"guard": context.guard_sha256}),
                **written,
            },
            "weights": {name: sha256_file(path) for name, path in weights.items() if path.exists()},
        }
        of_units = {key: _common(unit.info.get(key) for unit in kept) for key in ("device", "threads", "precision")}
        defaults: dict[str, Any] = {
            "git": None,
            "versions": {},
            "tta": [],
            "parameters": None,
            "command": None,
            "tracker": None,
            "label_map": None,
        }
        honesty: dict[str, Any] = {"external": [], "leak_guard": None, "marks": []}
        return computed | of_units | defaults | honesty | {key: info[key] for key in info if key not in computed}


def load_run(path: Path) -> Run:
    """Read a complete run and verify all that can be verified without the competition's files.

    Args:
        path: `oof/<exp>`.

    Raises:
        RecordError: If the run is not complete, a file is not the one that `run.json` vouches for, ids repeat,
            probabilities are not finite or do not sum to 1, or the score is not that of `oof.csv`.
    """
    where = shown(path)
    info = _read_json(path / _RECORD)
    if info is None:
        raise RecordError([Fault(where, _incomplete(path), f"make exp EXP={path.name}")])
    if info.get("schema_version") != SCHEMA_VERSION:
        what = f"was kept by another version of Foldwise (schema {info.get('schema_version')}, here {SCHEMA_VERSION})"
        raise RecordError([Fault(where, what, FRESH)])
    try:
        return _read_run(path, info)
    except KeyError as error:
        raise RecordError([Fault(f"{where}/{_RECORD}", f"lacks the key {error}", FRESH)]) from None


def external_words(external: Iterable[Any]) -> list[str]:
    """What `external` of a run's record says, a few words an entry.

    Args:
        external: Entries: images that joined the training, or a run on other images that came before.

    Returns:
        Such as `fer2013_full (28,709 images)` and `fer2013_full (by run:pre_resnet18)`; a mere name as it is.
    """
    words = []
    for entry in external:
        if not isinstance(entry, dict):
            words.append(str(entry))
            continue
        told = [f"by {entry['by']}"] if "by" in entry else []
        if "images" in entry:
            told.append(f"{entry['images']:,} images")
        if entry.get("weight", 1) != 1:
            told.append(f"weight {entry['weight']:g}")
        words.append(f"{entry['source']} ({', '.join(told)})" if told else entry["source"])
    return words


def read_units(run: Run) -> list[Unit]:
    """Read the units that a complete run was gathered from, and verify that they are these.

    A unit's own hashes lie beside it, where a stranger may have written both. So the units must also hold the ids of
    their folds, and add up to the oof.csv and test.csv that `run.json` vouches for.

    Args:
        run: A complete run.

    Returns:
        Its units, by fold and then in the order of its seeds.

    Raises:
        RecordError: If they are not on this machine, or are not those of the run.
    """
    again = f"train it here: {train_again(run.name, run.info)}"
    vouched = {"spec": run.info["hashes"]["spec"], "context": sha256_json(_plain(_context_of(run.info)))}
    folds = np.unique(run.fold).tolist()
    names = {(fold, seed): f"fold{fold}/seed{seed}" for fold in folds for seed in run.info["seeds"]}
    missing = [name for name in names.values() if not (run.path / name / _UNIT).exists()]
    if missing:
        what = f"its fold predictions are not on this machine: {', '.join(missing)}"
        raise RecordError([Fault(shown(run.path), what, again)])
    units, faults = [], []
    for (fold, seed), name in names.items():
        try:
            unit = _read_unit(run.path / name, vouched, run.classes)
            if (unit.fold, unit.seed) != (fold, seed):
                raise ValueError(f"{_UNIT} is of {_unit_name(unit)}")
            if sorted(unit.val_ids.tolist()) != sorted(run.ids[run.fold == fold].tolist()):
                raise ValueError(f"{_VAL} does not hold the ids of fold {fold}")
            if sorted(unit.test_ids.tolist()) != sorted(run.test_ids.tolist()):
                raise ValueError(f"{_TEST} does not hold the ids of the run's own")
            units.append(unit)
        except (OSError, ValueError, KeyError, TypeError) as error:
            faults.append(Fault(f"{shown(run.path)}/{name}", f"is not what was kept: {error}", again))
    if not faults:
        oof, test = np.zeros(run.probs.shape), np.zeros(run.test_probs.shape)
        for unit in units:
            oof[rows_of(run.ids, unit.val_ids)] += unit.val_probs / len(run.info["seeds"])
            test += unit.test_probs[rows_of(unit.test_ids, run.test_ids)] / len(units)
        for name, mean, kept in ((_OOF, oof, run.probs), (_TEST, test, run.test_probs)):
            if not np.allclose(mean, kept, rtol=0, atol=1e-6):
                what = f"its fold predictions do not add up to the {name} that {_RECORD} vouches for"
                faults.append(Fault(shown(run.path), what, again))
    if faults:
        raise RecordError(faults)
    return units


def list_runs(root: Path, competition: str) -> tuple[list[Run], list[str]]:
    """Read the runs that may be blended: complete k-fold runs of the competition on its present folds.

    Args:
        root: The project's root.
        competition: A folder under `inputs/`.

    Returns:
        The runs by name, and a line `<exp>: <reason>` for each folder under `oof/` that is left out.
    """
    present = read_folds(root / "inputs" / competition / "folds.csv").sha256
    runs, skipped = [], []
    for path in sorted((root / "oof").glob("[!.]*")):
        if not (path / _SPEC).exists():
            continue
        try:
            run = load_run(path)
        except RecordError as error:
            skipped += [f"{path.name}: {fault.what}" for fault in error.faults]
            continue
        reason = _unblendable(run.info, competition, present)
        if reason:
            skipped.append(f"{run.name}: {reason}")
        else:
            runs.append(run)
    return runs, skipped


def shown(path: Path) -> str:
    """`path` from its `oof` folder on, or whole where it is in none."""
    parts = path.parts
    return "/".join(parts[parts.index("oof") :]) if "oof" in parts else str(path)


def train_again(name: str, info: Mapping[str, Any]) -> str:
    """The command that trains a run anew, also one on a later split or with `--set`, from its `run.json`."""
    command = str(info.get("command", ""))
    if " --set " in command and command.isprintable():
        return f"{command} --fresh"
    experiment, _, split = name.rpartition(".split")
    if experiment and split.isdecimal():
        return f"make exp EXP={experiment} SPLIT={split} FRESH=1"
    return f"make exp EXP={name} FRESH=1"


def rows_of(ids: Ids, wanted: Ids) -> NDArray[np.intp]:
    """Where each of `wanted` is in `ids`; raises KeyError for one that is not."""
    row = {name: index for index, name in enumerate(ids.tolist())}
    return np.array([row[name] for name in wanted.tolist()], dtype=np.intp)


def _unblendable(info: Mapping[str, Any], competition: str, folds_sha256: str) -> str:
    """Why a complete run cannot take part in a blend; empty when it can."""
    if info["competition"] != competition:
        return f"is of competition {info['competition']}"
    if info["smoke"]:
        return "is a smoke run"
    if number := info["split"].get("number"):
        return f"is on split {number} of the folds, where it confirms what was chosen on the first"
    if info["split"]["kind"] != "kfold":
        return f"has no out-of-fold predictions for every image (split kind {info['split']['kind']})"
    if info.get("label_map"):
        return f"is scored on {len(info['classes'])} classes of its own ({', '.join(info['classes'])})"
    if info["hashes"]["folds"] != folds_sha256:
        return f"was made on other folds ({info['hashes']['folds'][:8]}, now {folds_sha256[:8]})"
    if guard := info["leak_guard"]:
        # Here and not above: it imports OpenCV.
        from foldwise.data.leaks import of_todays_measure

        if not of_todays_measure(guard):
            return "was kept clear of copies by another measure of likeness than today's; train it again"
    return ""


def _unit_name(unit: Unit) -> str:
    return f"fold{unit.fold}/seed{unit.seed}"


def _common(values: Iterable[Any]) -> Any:
    """The value that all share, else the list of the different ones."""
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else distinct


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object that Foldwise wrote; None where there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        fix = f"take the committed one back with git, or {FRESH}"
        raise RecordError([Fault(shown(path), f"is not readable as JSON ({error})", fix)]) from None
    if not isinstance(value, dict):
        raise RecordError([Fault(shown(path), "is not a JSON object", f"take the committed one back, or {FRESH}")])
    return value


def _open_attempt(path: Path, spec: dict[str, Any], context: Context, *, fresh: bool) -> dict[str, Any]:
    """Settle which attempt `path` is open for: the state that it then holds."""
    # What a kill left half written; under the lock nobody is writing it now.
    for stray in (*path.glob(".*.tmp"), *path.glob("fold*/seed*/.*.tmp")):
        stray.unlink()
    units = len(spec.get("seeds", [0])) * (context.split["folds"] if context.split["kind"] == "kfold" else 1)
    state: dict[str, Any] = {
        "attempt": 1,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "units": units,
        "clearing": False,
        "context": _plain(context),
    }
    before = None if fresh else _read_json(path / _STATE)
    if fresh or (before is not None and before["clearing"]):
        state["attempt"] = before["attempt"] if before is not None else _latest_attempt(path) + 1
        # The mark outlives a kill between here and the end of clearing, which the next open then finishes.
        atomic_write(path / _STATE, pretty_json(state | {"clearing": True}))
        _clear(path)
        before = None
    elif (path / _SPEC).exists():
        record = _read_json(path / _RECORD)
        before = before or _state_of(record) or state
        _refuse_other(path, spec, before["context"], state["context"])
    elif before is None and any(not child.name.startswith(".") and child.name != STUDY for child in path.iterdir()):
        raise RecordError([Fault(shown(path), f"holds files but no {_SPEC}", f"take it back with git, or {FRESH}")])
    state |= {key: before[key] for key in ("attempt", "started") if before is not None}
    atomic_write(path / _STATE, pretty_json(state))
    return state


def _plain(context: Context) -> dict[str, Any]:
    """The context as it reads back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(context)))
    for name in ("teachers_sha256", "guard_sha256"):
        if plain[name] is None:
            del plain[name]  # so that a run without them says what it said before there were any
    return plain


def _latest_attempt(path: Path) -> int:
    """The latest attempt that the folder tells of, 0 for none; what cannot be read tells nothing."""
    attempts = [0]
    for name in (_STATE, _RECORD):
        try:
            attempts.append(int((_read_json(path / name) or {"attempt": 0})["attempt"]))
        except (RecordError, KeyError, TypeError, ValueError):
            continue
    return max(attempts)


def _clear(path: Path) -> None:
    """Delete a run, first of all what vouches for the rest; the study that searched its space stays."""
    for name in (_RECORD, _SPEC):
        (path / name).unlink(missing_ok=True)
    for child in path.iterdir():
        if child.name in (_STATE, _LOCK, STUDY):
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _state_of(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The state that a committed record tells of, for a folder that came without its own."""
    if record is None:
        return None
    return {
        "attempt": record["attempt"],
        "started": record["started"],
        "context": _plain(_context_of(record)),
    }


def _context_of(record: Mapping[str, Any]) -> Context:
    """The context that a committed record tells of."""
    split = {key: value for key, value in record["split"].items() if key != "sha256"}
    return Context(
        competition=record["competition"],
        classes=tuple(record["classes"]),
        split=split,
        folds_sha256=record["hashes"]["folds"],
        inputs_sha256=record["hashes"]["inputs"],
        smoke=record["smoke"],
        start_sha256=record["hashes"].get("start"),
        teachers_sha256=record["hashes"].get("teachers"),
        guard_sha256=record["hashes"].get("guard"),
    )


def _refuse_other(path: Path, spec: dict[str, Any], old_context: dict[str, Any], context: dict[str, Any]) -> None:
    """Raise if the run in `path` is one of another spec or context."""
    faults = []
    name_fix = f"give this one a name (NAME=...), or {FRESH}"
    for what, old, new, fix in (
        ("spec", with_defaults(read_yaml(path / _SPEC).value), spec, name_fix),
        ("context", old_context, context, f"put back what it was made with, or {FRESH}"),
    ):
        lines = differences(old, new)
        if lines:
            listed = "".join(f"\n  {line}" for line in lines)
            faults.append(Fault(shown(path), f"holds a run of another {what}:{listed}", fix))
    if faults:
        raise RecordError(faults)


def _incomplete(path: Path) -> str:
    """How far the run in `path` has come."""
    state = _read_json(path / _STATE)
    if state is None:
        return f"is not complete: it has no {_RECORD}"
    return f"is not complete: {len(list(path.glob(f'fold*/seed*/{_UNIT}')))} of {state['units']} units"


def _read_unit(folder: Path, vouched: Mapping[str, str], classes: tuple[str, ...]) -> Unit:
    """Read and verify one unit; raises ValueError, KeyError, TypeError or OSError for a damaged one."""
    info = json.loads((folder / _UNIT).read_bytes())
    fold, seed, seal = info.pop("fold"), info.pop("seed"), info.pop("vouched")
    for key, value in vouched.items():
        if seal[key] != value:
            raise ValueError(f"{_UNIT} is of another {key}")
    for name, expected in seal["files"].items():
        if sha256_file(folder / name) != expected:
            raise ValueError(f"{name} is not the file that was kept")
    (val_ids, names), val_probs = read_probs(folder / _VAL, ("id", "label"), classes)
    (test_ids,), test_probs = read_probs(folder / _TEST, ("id",), classes)
    return Unit(
        fold=fold,
        seed=seed,
        val_ids=val_ids,
        val_labels=_indices(names, classes, _VAL),
        val_probs=val_probs.astype(np.float32),
        test_ids=test_ids,
        test_probs=test_probs.astype(np.float32),
        history=_read_history(folder / _HISTORY),
        info=info,
    )


def _read_run(path: Path, info: dict[str, Any]) -> Run:
    """Read what `run.json` vouches for; raises RecordError, or KeyError for a key that `info` lacks."""
    where = shown(path)
    classes = tuple(info["classes"])
    faults = []
    for key, name in (("spec", _SPEC), ("oof", _OOF), ("test", _TEST)):
        # A `full` split validates nothing and so has no oof.csv.
        if name == _OOF and info["score"] is None:
            continue
        if not (path / name).exists():
            faults.append(Fault(f"{where}/{name}", "is missing", f"take it back with git, or {FRESH}"))
        elif sha256_file(path / name) != info["hashes"][key]:
            what = f"is not the file that {_RECORD} vouches for: it was changed after the run"
            faults.append(Fault(f"{where}/{name}", what, f"take it back with git, or {FRESH}"))
    if faults:
        raise RecordError(faults)
    try:
        (test_ids,), test_probs = read_probs(path / _TEST, ("id",), classes)
        _check_probs(_TEST, test_ids, test_probs)
        ids, fold, names, probs = _no_rows(len(classes))
        if info["score"] is not None:
            (ids, fold, names), probs = read_probs(path / _OOF, ("id", "fold", "label"), classes)
            _check_probs(_OOF, ids, probs)
        labels = _indices(names, classes, _OOF)
        if info["score"] is not None:
            recomputed = METRICS[info["metric"]].score(labels, probs)
            if abs(recomputed - info["score"]) > 1e-12 * max(1.0, abs(recomputed)):
                raise ValueError(f"{_RECORD}: the score is {info['score']!r}, but {_OOF} gives {recomputed!r}")
    except ValueError as error:
        raise RecordError([Fault(where, str(error), FRESH)]) from None
    return Run(path.name, path, info, classes, ids, fold.astype(np.int64), labels, probs, test_ids, test_probs)


def _no_rows(classes: int) -> tuple[Ids, Ids, Ids, Probs64]:
    nothing = np.array([], dtype=np.str_)
    return nothing, nothing, nothing, np.zeros((0, classes))


def _check_probs(name: str, ids: Ids, probs: Probs64) -> None:
    """Raise ValueError unless ids are unique and rows are probabilities."""
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        raise ValueError(f"{name}: the id {unique[counts > 1][0]} is there more than once")
    if not np.isfinite(probs).all():
        raise ValueError(f"{name}: the probabilities of id {ids[~np.isfinite(probs).all(axis=1)][0]} are not finite")
    sums = probs.sum(axis=1)
    wrong = (np.abs(sums - 1) > 1e-4) | (probs < 0).any(axis=1)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{name}: the probabilities of id {ids[first]} do not sum to 1 ({sums[first]:.6g}), or one is negative"
        )


def _indices(names: Ids, classes: tuple[str, ...], file: str) -> Labels:
    """Class indices of class names; raises ValueError for an unknown one."""
    index = {name: position for position, name in enumerate(classes)}
    unknown = sorted(set(names.tolist()) - set(index))
    if unknown:
        raise ValueError(f"{file}: unknown label {unknown[0]!r}; the classes are {', '.join(classes)}")
    return np.array([index[name] for name in names.tolist()], dtype=np.int64)


def _prob_columns(classes: Sequence[str]) -> list[str]:
    return [f"p_{name}" for name in classes]


def write_probs(path: Path, leading: Mapping[str, Ids], probs: Probs32, classes: Sequence[str]) -> None:
    """Write columns of text and then probabilities; nine significant digits tell every float32 from its neighbours."""
    columns = [column.tolist() for column in leading.values()]
    rows = ([*texts, *(f"{p:.9g}" for p in row)] for *texts, row in zip(*columns, probs.tolist(), strict=True))
    write_csv(path, [*leading, *_prob_columns(classes)], rows)


def read_probs(path: Path, leading: tuple[str, ...], classes: Sequence[str]) -> tuple[tuple[Ids, ...], Probs64]:
    """Read back what `write_probs` wrote; raises ValueError for another header, a short row or what is no number."""
    header, rows = _read_csv(path)
    expected = [*leading, *_prob_columns(classes)]
    if header != expected:
        raise ValueError(f"{path.name}: the columns must be {','.join(expected)}, but are {','.join(header)}")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(expected):
            raise ValueError(f"{path.name}:{number}: {len(expected)} cells must be there, but got {len(row)}")
    count = len(leading)
    texts = tuple(np.array([row[index] for row in rows], dtype=np.str_) for index in range(count))
    try:
        probs = np.array([row[count:] for row in rows], dtype=np.float64).reshape(len(rows), len(classes))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    return texts, probs


def _write_history(path: Path, rows: Sequence[Mapping[str, float | int]]) -> None:
    columns = list(dict.fromkeys(["fold", "seed", "epoch", *(key for row in rows for key in row)]))
    write_csv(path, columns, ([repr(row[key]) if key in row else "" for key in columns] for row in rows))


def _read_history(path: Path) -> list[dict[str, float | int]]:
    header, rows = _read_csv(path)
    return [{key: _number(cell) for key, cell in zip(header, row, strict=True) if cell} for row in rows]


def _number(text: str) -> float | int:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows; raises ValueError for bytes that are not UTF-8 or a file without a header."""
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    if not rows:
        raise ValueError(f"{path.name}: is empty")
    return rows[0], rows[1:]
