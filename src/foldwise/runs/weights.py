"""Carrying weights between machines by their hash: to and from a folder, or W&B artifacts.

Git keeps `run.json`, which says what each file of weights must be; whatever is another file is never put in its place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from foldwise.errors import Fault, FoldwiseError, HubError, RecordError
from foldwise.files import atomic_path, sha256_file, sha256_json
from foldwise.records.store import shown, train_again
from foldwise.runs.sync import wandb_environment
from foldwise.spec.model import EXPERIMENT_NAME
from foldwise.spec.yaml import did_you_mean

_UNIT = re.compile(r"fold\d{1,6}/seed\d{1,20}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WANDB = re.compile(r"wandb:([\w.-]+)/([\w.-]+)")
_TYPE = "weights"
_NO_WEIGHTS = "no file of weights in its run.json: it was trained elsewhere, or kept none"

Say = Callable[[str], None]


class WeightsError(RecordError):
    """Some files of weights were not carried over; the others were."""

    consequence = "all other files were carried over"


@dataclass(frozen=True)
class Vouched:
    """What a run's `run.json` says of its weights.

    Attributes:
        name: Of the run.
        path: `oof/<exp>`.
        competition: Its competition.
        units: From `fold<k>/seed<s>` to the sha256 of its file.
        again: The command that trains it anew.
    """

    name: str
    path: Path
    competition: str
    units: Mapping[str, str]
    again: str

    def file(self, unit: str) -> Path:
        """Where the file of a unit belongs."""
        return self.path / unit / "weights.safetensors"

    @cached_property
    def here(self) -> dict[str, Path]:
        """The files that are on this machine, by unit; not verified."""
        return {unit: path for unit in self.units if (path := self.file(unit)).is_file()}


@dataclass(frozen=True)
class Carried:
    """What became of the files of weights.

    Attributes:
        files: Carried over now.
        bytes: Of these.
        before: Files that were there already.
        lacking: Names of runs that were passed over, or are there in part, since files of them are on neither side.
    """

    files: int
    bytes: int
    before: int
    lacking: tuple[str, ...]


class Store(Protocol):
    """Where weights are kept by their hash.

    Attributes:
        done: What `put` does with files, as a command says it.
    """

    done: str

    def sizes(self, run: Vouched) -> dict[str, int]:
        """Bytes of each of a run's files that is there, by hash; not verified."""

    def put(self, run: Vouched, files: Mapping[str, Path]) -> tuple[list[str], str]:
        """Take in files, by unit: which were not there, and a note. Raises `_RefusedError` for another file."""

    def fetch(self, run: Vouched, sha256: str, to: Path) -> None:
        """Copy a file that is there to `to`, whatever it may hold."""


class _RefusedError(Exception):
    """A file that is not what its hash says; the message is what is wrong with it."""


def push_weights(root: Path, names: Sequence[str], to: str, *, say: Say) -> Carried:
    """Keep the weights of runs elsewhere, by their hash.

    A folder gets `<folder>/<sha[:2]>/<sha>.safetensors`, whole or not at all; what is there already is verified, left
    alone where it is right, and replaced where it is not. So it may be stopped and begun again, by several at once.
    W&B gets an artifact `<exp>-weights` of the type `weights` for each run, whose alias is the hash of all its files.

    Args:
        root: The project's root.
        names: Of complete runs; none for all that have weights here.
        to: A folder, below `root` unless absolute, made where it is not there; or `wandb:<entity>/<project>`.
        say: Takes a line for each run, and a summary.

    Returns:
        What became of the files.

    Raises:
        FoldwiseError: If there is no such run, or `to` is neither; nothing was tried.
        WeightsError: If a run that was named has no weights here, or a file is not what `run.json` vouches for.
        HubError: If W&B cannot be reached, or refuses.
    """
    runs = _runs(root, names)
    store = _store(to, "--to", root)
    faults: list[Fault] = []
    files = size = before = 0
    lacking: list[str] = []
    for run in runs:
        missing = [unit for unit in run.units if unit not in run.here]
        if missing or not run.units:
            lacking.append(run.name)
            if names:
                faults.append(_not_here(run, missing))
        good = {unit: path for unit, path in run.here.items() if _verified(run, unit, path, faults)}
        if not good:
            continue
        try:
            put, note = store.put(run, good)
        except (OSError, _RefusedError) as error:
            faults.append(Fault(f"{to}: {shown(run.path)}", _reason(error), "mend that, and push again"))
            continue
        new = sum(good[unit].stat().st_size for unit in put)
        files, size, before = files + len(put), size + new, before + len(good) - len(put)
        told = f"{_files(len(put))}, {new / 1e6:,.1f} MB" if put else f"{_files(len(good))} there already"
        say(f"{store.done if put else 'there':<10} {run.name}: {told}{note}{_of_all(run, len(good))}")
    idle = [run.name for run in runs if not run.here]
    if idle and not names:
        say(f"{'not here':<10} {', '.join(idle)}")
    where = f"for {to}" if store.done == "kept" else f"to {to}"
    say(f"weights    {_files(files)} {store.done} {where}, {size / 1e6:,.1f} MB; {before} there before")
    if faults:
        raise WeightsError(faults)
    return Carried(files, size, before, tuple(lacking))


def pull_weights(root: Path, names: Sequence[str], source: str, *, say: Say) -> Carried:
    """Fetch the weights that runs lack here, each verified against `run.json` before it is put in its place.

    What is here already is kept and not fetched again, so that a pull that was stopped goes on.

    Args:
        root: The project's root.
        names: Of complete runs; none for all that lack weights.
        source: A folder that `push_weights` filled, or `wandb:<entity>/<project>`.
        say: Takes a line for each run, and a summary.

    Returns:
        What became of the files.

    Raises:
        FoldwiseError: If there is no such run, or `source` is neither; nothing was tried.
        WeightsError: If a run that was named is not there, a file there is not what `run.json` vouches for, or another
            file lies here in its place.
        HubError: If W&B cannot be reached, or refuses.
    """
    runs = _runs(root, names)
    store = _store(source, "--from", root)
    faults: list[Fault] = []
    files = size = before = 0
    lacking: list[str] = []
    for run in runs:
        missing = [unit for unit in run.units if unit not in run.here]
        before += sum(_verified(run, unit, path, faults) for unit, path in run.here.items())
        if not missing:
            if not run.units and names:
                faults.append(Fault(shown(run.path), _NO_WEIGHTS, f"train it here: {run.again}"))
            continue
        there = store.sizes(run)
        if absent := [unit for unit in missing if run.units[unit] not in there]:
            lacking.append(run.name)
            if names:
                what = f"{source} does not hold its weights: {', '.join(absent)}"
                fix = f"push them from where it was trained: make weights TO={source}"
                faults.append(Fault(shown(run.path), what, fix))
        wanted = [unit for unit in missing if unit not in absent]
        if not wanted:
            continue
        fetched = []
        with _alone(run, faults) as alone:
            for unit in wanted if alone else ():
                try:
                    _put_in_place(store, run, unit)
                except (OSError, _RefusedError) as error:
                    fix = f"push it again from where it was trained: make weights TO={source}"
                    faults.append(Fault(f"{shown(run.path)}/{unit}", f"{source}: {_reason(error)}", fix))
                else:
                    fetched.append(run.file(unit).stat().st_size)
        files, size = files + len(fetched), size + sum(fetched)
        if fetched:
            told = f"{_files(len(fetched))}, {sum(fetched) / 1e6:,.1f} MB"
            say(f"{'pulled':<10} {run.name}: {told}{_of_all(run, len(run.here) + len(fetched))}")
    if lacking and not names:
        say(f"{'not there':<10} {', '.join(lacking)}")
    say(f"weights    {_files(files)} pulled from {source}, {size / 1e6:,.1f} MB; {before} here before")
    if faults:
        raise WeightsError(faults)
    return Carried(files, size, before, tuple(lacking))


def weights_lines(root: Path, names: Sequence[str], there: str | None) -> list[str]:
    """A table of runs: how many files of weights each has, what they weigh, and which are here and there.

    Files here are verified; those there are looked up by name.

    Args:
        root: The project's root.
        names: Of complete runs; none for all.
        there: A folder, `wandb:<entity>/<project>`, or None to look here alone.

    Raises:
        FoldwiseError: If there is no such run, or `there` is neither.
        HubError: If W&B cannot be reached, or refuses.
    """
    runs = _runs(root, names)
    store = None if there is None else _store(there, "--from", root)
    rows = [["run", "units", "MB", "here", *(["there"] if store else [])]]
    total = 0
    for run in runs:
        faults: list[Fault] = []
        good = {run.units[unit]: path for unit, path in run.here.items() if _verified(run, unit, path, faults)}
        held = store.sizes(run) if store else {}
        sizes = held | {sha256: path.stat().st_size for sha256, path in good.items()}
        # One that is on neither side weighs what the others do, all being the same network.
        whole = sum(sizes.values()) * len(set(run.units.values())) / len(sizes) if sizes else None
        total += sum(sizes[sha256] for sha256 in good)
        rows.append(
            [
                run.name,
                str(len(run.units)),
                "-" if whole is None else f"{whole / 1e6:,.1f}",
                _count(len(good), len(run.units)) + (f", {len(faults)} other" if faults else ""),
                *([_count(sum(sha256 in held for sha256 in run.units.values()), len(run.units))] if store else []),
            ]
        )
    if not runs:
        return ["there is no complete run under oof/: make exp EXP=<experiment>"]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if 0 < index < 3 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines += ["", f"here: {total / 1e6:,.1f} MB, verified" + (f"; there: {there}, by name" if store else "")]
    return lines


def _runs(root: Path, names: Sequence[str]) -> list[Vouched]:
    """The runs by these names, or all complete ones."""
    there = sorted(path.parent.name for path in (root / "oof").glob("[!.]*/run.json"))
    for name in names:
        if name not in there:
            guess = did_you_mean(name, there)
            what = f"there is no complete run `{name}` under oof/"
            runs = f"{guess + ' ' if guess else ''}runs here: {', '.join(there) or 'none'}"
            raise FoldwiseError(f"{what}\n  fix: {runs}")
    return [_vouched(root / "oof" / name) for name in (dict.fromkeys(names) if names else there)]


def _vouched(path: Path) -> Vouched:
    """Read what `run.json` says; its names become paths, so that they are looked at closely."""
    where, fix = f"{shown(path)}/run.json", "take it back with git"
    try:
        info = json.loads((path / "run.json").read_bytes())
        units, competition = dict(info["weights"]), str(info["competition"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError([Fault(where, f"cannot be read: {error!r}", fix)]) from None
    for unit, sha256 in units.items():
        if not (EXPERIMENT_NAME.fullmatch(path.name) and _UNIT.fullmatch(unit) and _SHA256.fullmatch(str(sha256))):
            raise RecordError([Fault(where, f"`weights` holds {unit!r}: {sha256!r}, which is no unit's hash", fix)])
    return Vouched(path.name, path, competition, units, train_again(path.name, info))


def _store(place: str, option: str, root: Path) -> Store:
    if match := _WANDB.fullmatch(place):
        return _WandbStore(match[1], match[2], option)
    # A letter and a colon is a drive of Windows.
    if not place or place.startswith("wandb:") or re.match(r"[a-z][a-z0-9+.-]+:", place):
        what = f"{option} {place}: is neither a folder nor `wandb:<entity>/<project>`"
        raise FoldwiseError(f"{what}\n  fix: e.g. {option} /mnt/weights, or {option} wandb:me/foldwise")
    folder = root / Path(place).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FoldwiseError(f"{option} {place}: is no folder\n  fix: name a folder, or `wandb:<entity>/<project>`")
    if option == "--from" and not folder.exists():
        what = f"{option} {place}: there is no such folder"
        raise FoldwiseError(f"{what}\n  fix: mount it, or fill it where the runs were trained: make weights TO={place}")
    return _FolderStore(folder)


class _FolderStore:
    """A folder of files that are named by their hashes."""

    done = "pushed"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sizes(self, run: Vouched) -> dict[str, int]:
        found = {}
        for sha256 in run.units.values():
            with suppress(FileNotFoundError, NotADirectoryError):
                found[sha256] = self._file(sha256).stat().st_size
        return found

    def put(self, run: Vouched, files: Mapping[str, Path]) -> tuple[list[str], str]:
        put = []
        mended = 0
        for unit, path in files.items():
            sha256 = run.units[unit]
            kept = self._file(sha256)
            before = kept.exists()
            if before and sha256_file(kept) == sha256:
                continue
            with atomic_path(kept) as temporary:
                shutil.copyfile(path, temporary)
                _verify(temporary, sha256, "what was written does not read back as it was")
            put.append(unit)
            mended += before
        return put, f" ({mended} replaced: damaged there)" if mended else ""

    def fetch(self, run: Vouched, sha256: str, to: Path) -> None:  # noqa: ARG002  the hash alone is its place
        shutil.copyfile(self._file(sha256), to)

    def _file(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / f"{sha256}.safetensors"


class _WandbStore:
    """The artifacts of a W&B project, one a run, of the type `weights`."""

    def __init__(self, entity: str, project: str, option: str) -> None:
        self._entity, self._project = entity, project
        mode = os.environ.get("WANDB_MODE", "").lower()
        self._offline = mode in ("offline", "dryrun")
        if self._offline and option == "--from":
            what = f"--from wandb:{entity}/{project}: WANDB_MODE={mode}, but what is there is asked for"
            raise FoldwiseError(f"{what}\n  fix: leave WANDB_MODE out, or name a folder")
        if not self._offline:
            wandb_environment()
        # Offline, it waits on disk until it is sent.
        self.done = "kept" if self._offline else "pushed"
        self._found: dict[str, Any] = {}

    def sizes(self, run: Vouched) -> dict[str, int]:
        if self._offline:
            return {}
        with self._translated():
            artifact = self._artifact(run)
            if artifact is None:
                return {}
            entries = artifact.manifest.entries
            named = {sha256: entries.get(f"{sha256}.safetensors") for sha256 in run.units.values()}
            return {sha256: int(entry.size or 0) for sha256, entry in named.items() if entry is not None}

    def put(self, run: Vouched, files: Mapping[str, Path]) -> tuple[list[str], str]:
        if len(files) < len(run.units):
            raise _RefusedError(f"{len(files)} of {len(run.units)} files are here, but an artifact holds all of a run")
        if not self._offline and self.sizes(run).keys() >= set(run.units.values()):
            return [], ""
        import wandb
        from wandb.errors.term import termsetup

        # Or its login says where it found the key.
        termsetup(wandb.Settings(silent=True), None)
        with self._translated(), tempfile.TemporaryDirectory() as scratch:
            artifact = wandb.Artifact(
                f"{run.name}-weights",
                type=_TYPE,
                metadata={"run": run.name, "competition": run.competition, "sha256": dict(run.units)},
            )
            for unit, path in files.items():
                # Copies would double what a run takes on disk; what is sent is verified when it is fetched.
                artifact.add_file(
                    str(path.resolve()), f"{run.units[unit]}.safetensors", skip_cache=True, policy="immutable"
                )
            log = wandb.init(
                entity=self._entity,
                project=self._project,
                group=run.name,
                name=f"{run.name} weights",
                job_type="weights",
                # What waits to be sent lies where `sync` looks for it.
                dir=str(run.path) if self._offline else scratch,
                mode="offline" if self._offline else "online",
                reinit="create_new",
                settings=wandb.Settings(
                    console="off",
                    disable_code=True,
                    disable_git=True,
                    init_timeout=60,
                    silent=True,
                    symlink=False,
                    use_dot_wandb=False,
                    x_disable_machine_info=True,
                    x_disable_meta=True,
                    x_disable_stats=True,
                    x_save_requirements=False,
                ),
            )
            logged = log.log_artifact(artifact, aliases=["latest", _alias(run)])
            if not self._offline:
                logged.wait()
            log.finish()
        later = f" (offline; before it is trained again: make sync EXP={run.name})" if self._offline else ""
        return list(files), later

    def fetch(self, run: Vouched, sha256: str, to: Path) -> None:
        with self._translated(), tempfile.TemporaryDirectory(dir=to.parent, prefix=".pull-") as scratch:
            entry = self._artifact(run).get_entry(f"{sha256}.safetensors")
            Path(entry.download(root=scratch, skip_cache=True)).replace(to)

    def _artifact(self, run: Vouched) -> Any:
        """The artifact that holds exactly a run's files; None where there is none."""
        import wandb

        if run.name not in self._found:
            api = wandb.Api({"entity": self._entity, "project": self._project}, timeout=60)
            name = f"{self._entity}/{self._project}/{run.name}-weights:{_alias(run)}"
            self._found[run.name] = api.artifact(name, _TYPE) if api.artifact_exists(name, _TYPE) else None
        return self._found[run.name]

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what W&B raises into what the user can mend."""
        import wandb

        try:
            yield
        except (wandb.errors.Error, OSError, ValueError) as error:
            told = (str(error).splitlines() or [type(error).__name__])[0]
            where = f"wandb:{self._entity}/{self._project}"
            fix = "see that you are logged in, and that the project is yours to read and write; then run it again"
            raise HubError(f"{where}: W&B refuses or cannot be reached ({told})\n  fix: {fix}") from error


def _alias(run: Vouched) -> str:
    """Tells one training of a run from another: a hash of all its files' hashes."""
    return f"sha-{sha256_json(dict(run.units))[:16]}"


def _put_in_place(store: Store, run: Vouched, unit: str) -> None:
    with atomic_path(run.file(unit)) as temporary:
        store.fetch(run, run.units[unit], temporary)
        _verify(temporary, run.units[unit], "the file there is not the one that run.json vouches for")


def _verify(path: Path, sha256: str, otherwise: str) -> None:
    if (found := sha256_file(path)) != sha256:
        raise _RefusedError(f"{otherwise} (sha256 {found[:12]}, expected {sha256[:12]})")


def _verified(run: Vouched, unit: str, path: Path, faults: list[Fault]) -> bool:
    """Whether a file here is what it should be; else a fault."""
    if sha256_file(path) == run.units[unit]:
        return True
    what = "is not the file that run.json vouches for, and was left alone"
    fix = f"move it away and fetch the right one: make weights FROM=<folder>; or {run.again}"
    faults.append(Fault(f"{shown(run.path)}/{unit}/{path.name}", what, fix))
    return False


def _not_here(run: Vouched, missing: Sequence[str]) -> Fault:
    what = f"its weights are not on this machine: {', '.join(missing)}" if missing else _NO_WEIGHTS
    fix = f"push from where it was trained, or train it here: {run.again}"
    return Fault(shown(run.path), what, fix)


@contextmanager
def _alone(run: Vouched, faults: list[Fault]) -> Iterator[bool]:
    """Whether nobody trains the run meanwhile; else a fault."""
    try:
        with FileLock(run.path / ".lock", timeout=0, thread_local=False):
            yield True
    except Timeout:
        faults.append(Fault(shown(run.path), "is being run by another process", "wait for it, or stop it"))
        yield False


def _reason(error: Exception) -> str:
    return f"{error.strerror or error}" if isinstance(error, OSError) else str(error)


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _count(count: int, of: int) -> str:
    return "-" if not of else "all" if count == of else "none" if not count else f"{count} of {of}"


def _of_all(run: Vouched, count: int) -> str:
    return "" if count == len(run.units) else f"; {count} of its {len(run.units)} units"
