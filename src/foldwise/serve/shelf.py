"""What a server can answer with: the kept runs and blends of a project by name, and the few models that are held.

A caller asks for a name on the list and never for a path; what is not asked for any more makes room.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from foldwise.data.competition import load_competition
from foldwise.errors import FoldwiseError
from foldwise.metrics import METRICS
from foldwise.records.history import Submission, read_history, track_of
from foldwise.records.store import Run, load_run
from foldwise.spec.yaml import did_you_mean
from foldwise.stats import Z95

BLEND = "blend:"
_NEWEST = ("best", "strict")
_FRESH_S = 10.0  # for which a list is taken as it was

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A run or a blend that can be asked for.

    Attributes:
        name: A run's name, or `blend:<folder of the submission>`.
        aliases: Further names: `blend:best`, `blend:strict`.
        kind: `run` or `blend`.
        competition: What it was scored on.
        classes: In the order of its probabilities.
        metric: Name of the metric.
        score: Out of fold, of a blend its estimate; None where nothing was held out.
        standard_error: Of `score`.
        interval: 95% interval around `score`.
        n_scored: Images that the score is on; None where the record does not tell.
        track: `competition data only` or `with external data`.
        marks: Such as `optimistic`, `transductive`.
        members: Name and weight of a blend's runs, the heaviest first; of a run itself alone.
        parameters: Of one model; None for a blend.
        missing: Runs whose weights are not on this machine.
        changed: Members of a blend which were made anew since, so that it would answer otherwise.
    """

    name: str
    aliases: tuple[str, ...]
    kind: Literal["run", "blend"]
    competition: str
    classes: tuple[str, ...]
    metric: str
    score: float | None
    standard_error: float | None
    interval: tuple[float, float] | None
    n_scored: int | None
    track: str
    marks: tuple[str, ...]
    members: tuple[tuple[str, float], ...]
    parameters: int | None
    missing: tuple[str, ...]
    changed: tuple[str, ...] = ()

    @property
    def unserved(self) -> str | None:
        """Why it cannot be asked here; None where it can."""
        if self.missing:
            return f"the weights of {', '.join(self.missing)} are not on this machine"
        return f"made anew since it was blended: {', '.join(self.changed)}" if self.changed else None


class Catalogue:
    """The runs and blends of a project, read anew when a record changes; may be asked from several threads."""

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read nothing yet.

        Args:
            root: The project's root.
            clock: Seconds; a list is at most ten seconds old.
        """
        self._root = root
        self._clock = clock
        self._lock = threading.Lock()
        self._runs: dict[Path, tuple[int, Run | None]] = {}
        self._entries: list[Entry] = []
        self._read_at = float("-inf")

    def entries(self) -> list[Entry]:
        """All that is complete, whether or not its weights are here: of each competition the best first."""
        with self._lock:
            if self._clock() - self._read_at > _FRESH_S:
                runs = {run.name: run for run in self._complete()}
                found = [_of_run(run) for run in runs.values()]
                for competition in dict.fromkeys(entry.competition for entry in found):
                    found += self._blends(competition, runs)
                self._entries = sorted(found, key=_order)
                self._read_at = self._clock()
            return self._entries

    def find(self, name: str) -> Entry:
        """The run or blend of that name.

        Args:
            name: As listed; for a blend also its alias, `blend`, or the name without `blend:`.

        Raises:
            FoldwiseError: If there is none.
        """
        entries = self.entries()
        by_name = {alias: entry for entry in entries for alias in entry.aliases}
        by_name |= {entry.name: entry for entry in entries}
        wanted = "best" if name == BLEND.rstrip(":") else name
        if found := by_name.get(wanted) or by_name.get(BLEND + wanted):
            return found
        here = [entry.name for entry in entries if entry.unserved is None]
        guess = did_you_mean(name, list(by_name))
        listed = f"{guess + ' ' if guess else ''}served here: {', '.join(here) or 'none'}"
        raise FoldwiseError(f"there is no run or blend {name!r}\n  fix: {listed}")

    def best(self) -> Entry:
        """What is served where nobody says what: the best blend whose weights are all here, else the best run.

        Raises:
            FoldwiseError: If no weights are here.
        """
        here = [entry for entry in self.entries() if entry.unserved is None and entry.score is not None]
        if not here:
            what = "there is nothing to serve: no run under oof/ has its weights on this machine"
            raise FoldwiseError(
                f"{what}\n  fix: fetch them (make weights FROM=<folder>), or train one: make exp EXP=<name>"
            )
        home = here[0].competition
        return next(
            (e for e in here if e.kind == "blend" and e.competition == home and "blend:best" in e.aliases), here[0]
        )

    def run(self, name: str) -> Run:
        """The record of a run that is listed."""
        return load_run(self._root / "oof" / name)

    def _complete(self) -> Iterator[Run]:
        for record in sorted(self._root.glob("oof/*/run.json")):
            changed = record.stat().st_mtime_ns
            known = self._runs.get(record)
            if known is None or known[0] != changed:
                try:
                    run = load_run(record.parent)
                except FoldwiseError:
                    run = None  # `compare` and `report` say what is wrong with it
                known = self._runs[record] = (changed, run)
            if known[1] is not None and not known[1].info["smoke"]:
                yield known[1]

    def _blends(self, competition: str, runs: dict[str, Run]) -> Iterator[Entry]:
        try:
            history = read_history(self._root, competition)
            classes = load_competition(self._root, competition).classes
        except FoldwiseError:
            return
        newest = dict(zip(_NEWEST, (history.newest, history.newest_strict), strict=True))
        for submission in history.submissions:
            aliases = tuple(BLEND + alias for alias, one in newest.items() if one is submission)
            yield _of_blend(submission, aliases, classes, runs)


def _of_run(run: Run) -> Entry:
    info = run.info
    score, error = info["score"], info["standard_error"]
    known = score is not None and error is not None
    return Entry(
        name=run.name,
        aliases=(),
        kind="run",
        competition=info["competition"],
        classes=run.classes,
        metric=info["metric"],
        score=score,
        standard_error=error,
        interval=(score - Z95 * error, score + Z95 * error) if known else None,
        n_scored=info["n_scored"],
        track=track_of(info),
        marks=tuple(info["marks"]),
        members=((run.name, 1.0),),
        parameters=info.get("parameters"),
        missing=() if _here(run) else (run.name,),
    )


def _of_blend(
    submission: Submission, aliases: tuple[str, ...], classes: tuple[str, ...], runs: dict[str, Run]
) -> Entry:
    members = [(name, runs[name]) for name, _ in submission.members if name in runs]
    return Entry(
        name=BLEND + submission.name,
        aliases=aliases,
        kind="blend",
        competition=submission.competition,
        classes=classes,
        metric=submission.metric,
        score=submission.score,
        standard_error=submission.standard_error,
        interval=submission.interval,
        n_scored=submission.n_scored,
        track=submission.track,
        marks=submission.marks,
        members=submission.members,
        parameters=None,
        missing=tuple(name for name, _ in submission.members if name not in runs or not _here(runs[name])),
        changed=tuple(name for name, run in members if submission.changed(name, run.info["hashes"])),
    )


def _here(run: Run) -> bool:
    units = run.info["weights"]
    return bool(units) and all((run.path / unit / "weights.safetensors").exists() for unit in units)


def _order(entry: Entry) -> tuple[Any, ...]:
    """The home competition first, the demo last; then the best score, newer blends first among equal ones."""
    sign = METRICS[entry.metric].sign
    score = float("-inf") if entry.score is None else sign * entry.score
    return (entry.competition == "demo", entry.competition, -score, not entry.aliases, entry.name)


class Shelf(Generic[T]):
    """The few things held that take long to make; the one asked for least recently makes room. For several threads."""

    def __init__(self, make: Callable[[str], T], most: int, *, keep: Sequence[str] = ()) -> None:
        """Hold nothing yet.

        Args:
            make: Makes what a name stands for; called for one name at a time.
            most: Things held at most.
            keep: Names that never make room.
        """
        self._make = make
        self._most = most
        self._keep = frozenset(keep)
        self._held: OrderedDict[str, T] = OrderedDict()
        self._making = threading.Lock()

    def peek(self, name: str) -> T | None:
        """What is held by that name; None where it is not. Never waits."""
        with suppress(KeyError):
            self._held.move_to_end(name)
        return self._held.get(name)

    def get(self, name: str) -> T:
        """What is held by that name, made where need be; raises what `make` raises."""
        with self._making:
            if name not in self._held:
                made = self._make(name)
                for other in list(self._held):
                    if len(self._held) < self._most:
                        break
                    if other not in self._keep:
                        del self._held[other]
                self._held[name] = made
            self._held.move_to_end(name)
            return self._held[name]

    @property
    def names(self) -> list[str]:
        """Of what is held, the least recently asked for first."""
        return list(self._held)
