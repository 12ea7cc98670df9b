"""The page of results: what the kept runs of a competition score, and what each choice was worth.

It is made of the records alone, without a clock or a folder of this machine: the same runs give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from foldwise.data.competition import competition_folder, load_competition
from foldwise.data.folds import Folds, read_folds
from foldwise.errors import Fault, FoldwiseError, RecordError
from foldwise.files import atomic_write
from foldwise.metrics import METRICS
from foldwise.records.compare import ALPHA, LEVEL, Comparison, Group, Row, compare
from foldwise.records.compare_text import duration, millions
from foldwise.records.history import EXTERNAL_TRACK, OWN_TRACK, History, Submission, read_history
from foldwise.records.store import Run, external_words, load_run, rows_of
from foldwise.spec.load import differences, with_defaults
from foldwise.spec.model import Section
from foldwise.spec.yaml import Document, Loc, check, did_you_mean, dotted, in_order, plain, read_yaml
from foldwise.stats import Z95, bootstrap, holm, interval, mcnemar, normal_p

PAGE, CHOICES = "docs/RESULTS.md", "docs/ablations.yaml"
# Keys of a spec that two runs differ in: those that a cell tells the values of; the others are named.
_KEYS_SHOWN = 5
# What a choice is told by, besides its name and a note: two runs, the views of one run, or a submitted blend.
_KINDS = (("without", "with"), ("run",), ("blend",))
_KEYS = ("choice", *(key for keys in _KINDS for key in keys), "note")
_BLENDS = ("best", "strict")
# As `compare` says it of runs of the competition itself.
_UNSCORED = "has no score: nothing was held out"
# Keeps a figure and its error on one line of a narrow column.
_NO_BREAK = "\u00a0"
_DEVICE = re.compile(r"(?P<kind>\w+)\S* \((?P<name>.*)\), (?P<threads>\d+) threads, (?P<precision>\S+)")


class Benchmark(Section):
    """A score by others that the submissions are held against."""

    name: str = Field(description="Whose it is, as the page says it.")
    right: int = Field(ge=0, description="Test images that it gets right.")
    of: int = Field(ge=1, description="Test images.")

    @model_validator(mode="after")
    def _a_part(self) -> Self:
        if self.right > self.of:
            raise ValueError(f"`right <= of` must hold, but got (right={self.right}, of={self.of})")
        return self


class Ablations(Section):
    """What `docs/ablations.yaml` holds."""

    competition: str = Field(description="A folder under `inputs/`.")
    benchmark: Benchmark | None = None
    choices: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Results:
    """The page of results.

    Attributes:
        competition: Name of the competition.
        text: The page, markdown.
        left_out: A line `<folder>: <reason>` for each run or submission of the competition that is not in it.
        verdicts: What was found of each choice, in the order of the page: `helps`, `hurts` or `not told apart`.
    """

    competition: str
    text: str
    left_out: tuple[str, ...]
    verdicts: tuple[str, ...]


class _Effect(NamedTuple):
    """What a choice was worth; `gain` is positive where it helps, `p` is not corrected."""

    gain: float
    error: float
    low: float
    high: float
    p: float


class _Choice(NamedTuple):
    """A line of the table of choices, before its p-value is corrected."""

    name: str
    without: str
    chosen: str
    effect: _Effect
    changed: str
    note: str


def results(root: Path, competition: str | None = None) -> Results:
    """Make the page of results of the competition that `docs/ablations.yaml` names.

    Two runs are told apart as `compare` does it: a paired bootstrap over groups of near-duplicates for the difference
    and its interval; McNemar's test for the p-value where the metric is accuracy, else the normal distribution. What
    views and blends gain has its standard error in the records; their intervals and p-values are by the normal
    distribution. All p-values of the table of choices are corrected together (Holm 1979).

    Args:
        root: The project's root.
        competition: Refuse a file of choices that is of another; None for whatever it is of.

    Raises:
        SpecError: If `docs/ablations.yaml` is missing, or cannot be read as YAML.
        RecordError: With every fault of `docs/ablations.yaml`, each at its line; or if there is no complete run.
        DataError: If a `folds.csv` or `competition.yaml` cannot be read.
        FoldwiseError: If the newest submission, or the newest of competition data only, is not what was written.
    """
    document = read_yaml(root / CHOICES)
    asked, faults = check(document, Ablations)
    listed, of_lines = _listed(document)
    of_name = _competition_faults(root, document, competition)
    faults += [*of_lines, *of_name]
    name = document.value.get("competition")
    if of_name or not isinstance(name, str):
        raise RecordError(in_order(faults))
    told = load_competition(root, name)
    comparison, history = compare(root, name), read_history(root, name)
    cited = {run for line in listed.values() for key in ("without", "with", "run") if (run := line.get(key))}
    apart, unscored, left_out = _elsewhere(root, comparison, cited)
    submitted = _submitted(history)
    groups = [*((name, group) for group in comparison.groups), *apart]
    reasons = dict(line.split(": ", 1) for line in (*comparison.left_out, *left_out))
    reasons |= {run.name: _UNSCORED for run in unscored}
    choices = _Choices(root, document, groups, reasons, submitted)
    read = [choices.read(("choices", index), line) for index, line in listed.items()]
    faults += [fault for one in read if not isinstance(one, _Choice) for fault in one]
    if asked is not None:
        faults += _benchmark_faults(document, asked.benchmark, submitted)
    if asked is None or faults:
        raise RecordError(in_order(faults))
    lines = [one for one in read if isinstance(one, _Choice)]
    corrected = holm([line.effect.p for line in lines])
    verdicts = tuple(_verdict(line.effect.gain, p) for line, p in zip(lines, corrected, strict=True))
    folds = read_folds(competition_folder(root, name) / "folds.csv")
    main = next((group for group in comparison.groups if _blends(group, folds)), None)
    others = [(of, group) for of, group in groups if group is not main]
    parts = [
        f"# Results: {told.title or name}",
        f"<!-- Written by `make results`; change {CHOICES} and the runs, not this page. -->",
        *_opening(asked, main, submitted),
        "## Runs",
        *([] if main is None else _runs(main)),
        *_runs_apart(others, unscored),
        "## Choices",
        *_choices(lines, corrected, verdicts),
    ]
    text = "\n\n".join(parts) + "\n"
    return Results(name, text, (*comparison.left_out, *left_out, *history.left_out), verdicts)


def write_results(root: Path, competition: str | None = None) -> list[str]:
    """Write `docs/RESULTS.md`.

    Args:
        root: The project's root.
        competition: As `results` takes it.

    Returns:
        Lines for the user.

    Raises:
        FoldwiseError: As `results`; then nothing is written.
    """
    page = results(root, competition)
    atomic_write(root / PAGE, page.text)
    return [
        *(f"left out: {line}" for line in page.left_out),
        f"written  {PAGE}, of {page.competition}; {_tally(page.verdicts)}",
    ]


# Which runs and submissions -------------------------------------------------------------------------------------------


def _elsewhere(
    root: Path, comparison: Comparison, cited: Iterable[str]
) -> tuple[list[tuple[str, Group]], list[Run], list[str]]:
    """Runs of other competitions that belong on the page.

    They are those that a run on it builds on, those that a choice names, and those that are scored on a held-out part:
    k-fold runs of other competitions are of no interest here.

    Returns:
        Competition and group of the scored ones, the runs that are not scored at all, and a line for each left out.
    """
    infos = {path.parent.name: info for path in sorted((root / "oof").glob("[!.]*/run.json")) if (info := _info(path))}
    elsewhere = {name: info for name, info in infos.items() if info.get("competition") != comparison.competition}
    wanted = {name for name in cited if name in elsewhere}
    wanted |= {name for name, info in elsewhere.items() if info.get("split", {}).get("kind") in ("holdout", "column")}
    waiting = [row.name for group in comparison.groups for row in group.rows] + sorted(wanted)
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in infos and name not in seen:
            seen.add(name)
            waiting += _sources(_spec(root / "oof" / name))
    left_out, unscored, scored = [], [], dict[str, list[str]]()
    for name in sorted(seen | wanted):
        if name in elsewhere:
            try:
                run = load_run(root / "oof" / name)
            except RecordError as error:
                left_out.append(f"{name}: {error.faults[0].what}")
                continue
            if len(run.ids):
                scored.setdefault(run.info["competition"], []).append(name)
            else:
                unscored.append(run)
    groups = [(name, group) for name, runs in sorted(scored.items()) for group in compare(root, name, runs).groups]
    return groups, unscored, left_out


def _info(path: Path) -> dict[str, Any] | None:
    """What a `run.json` tells; None for a smoke run, and for what is no JSON object."""
    try:
        info = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) and not info.get("smoke") else None


def _spec(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = read_yaml(path / "spec.yaml").value
    except FoldwiseError:
        return {}
    return value


def _sources(spec: Mapping[str, Any]) -> list[str]:
    """The runs that a spec starts from or learns from."""
    weights = str((spec.get("model") or {}).get("weights", ""))
    start = [weights.removeprefix("run:")] if weights.startswith("run:") else []
    taught = [name for section in ("distill", "pseudo") for name in (spec.get(section) or {}).get("from", [])]
    return list(dict.fromkeys([*start, *taught]))


def _submitted(history: History) -> list[Submission]:
    """The newest submission, and the newest of competition data only, last; none where nothing was submitted."""
    if not history.submissions and not history.left_out:
        return []
    newest = history.find()
    if all(one.track != OWN_TRACK for one in history.submissions):
        return [newest]
    strict = history.find("strict")
    return [newest] if strict is newest else [newest, strict]


def _blends(group: Group, folds: Folds) -> bool:
    """Whether the runs of a group may be blended: the table that the page is about."""
    info = group.rows[0].run.info
    first = info["split"]["kind"] == "kfold" and not info["split"].get("number") and not info.get("label_map")
    return first and info["hashes"]["folds"] == folds.sha256


# Choices --------------------------------------------------------------------------------------------------------------


def _competition_faults(root: Path, document: Document, competition: str | None) -> list[Fault]:
    """What is wrong with the name of the competition; what is no name at all is the schema's to tell."""
    name = document.value.get("competition")
    if not isinstance(name, str):
        return []
    there = [path.parent.name for path in sorted((root / "inputs").glob("*/competition.yaml"))]
    if name not in there:
        what, fix = f"there is no competition `{name}` in inputs/", did_you_mean(name, there)
    elif competition not in (None, name):
        what = f"the choices are those of `{name}`, but the results of `{competition}` were asked for"
        fix = f"COMP={name}, or list the choices of {competition} there"
    else:
        return []
    return [document.fault(("competition",), what, fix)]


def _listed(document: Document) -> tuple[dict[int, dict[str, str]], list[Fault]]:
    """The choices that can be looked up, by their place, and what is wrong with the form of the others."""
    choices = document.value.get("choices")
    listed, faults = dict[int, dict[str, str]](), list[Fault]()
    for index, line in enumerate(choices if isinstance(choices, list) else []):
        # What is of another type is the schema's to tell.
        if isinstance(line, dict) and all(isinstance(value, str) for value in line.values()):
            wrong = _form_faults(document, ("choices", index), line)
            faults += wrong
            listed |= {} if wrong else {index: line}
    return listed, faults


def _form_faults(document: Document, loc: Loc, line: Mapping[str, str]) -> list[Fault]:
    """Unknown and missing keys, keys that do not go together, and values that no run or blend can have."""
    takes = "a choice takes `choice` with `without` and `with`, `run`, or `blend`; and `note`"
    unknown = [key for key in line if key not in _KEYS]
    faults = [
        document.fault(
            (*loc, key),
            f"unknown key `{dotted((*loc, key))}`",
            f"{did_you_mean(key, _KEYS)} {takes}".strip(),
            on_key=True,
        )
        for key in unknown
    ]
    if "choice" not in line:
        fix = "add `choice: ...`: what was chosen, in a few words"
        faults.append(document.fault(loc, f"missing key `{dotted((*loc, 'choice'))}`", fix))
    given = [key for keys in _KINDS for key in keys if key in line]
    if tuple(given) not in _KINDS and not unknown:
        has = f"has {', '.join(f'`{key}`' for key in given)}" if given else "has none of these"
        faults.append(document.fault(loc, f"a choice is told by two runs, one run or a blend, but this {has}", takes))
    elif line.get("with", "") == line.get("without"):
        what = f"`{line['with']}` is compared with itself"
        faults.append(document.fault((*loc, "with"), what, "name two runs that differ in the choice"))
    if "blend" in line and line["blend"] not in _BLENDS:
        what = f"`{dotted((*loc, 'blend'))}` must be one of {', '.join(_BLENDS)}, but got {plain(line['blend'])}"
        faults.append(document.fault((*loc, "blend"), what, did_you_mean(line["blend"], _BLENDS)))
    return faults


class _Choices:
    """Reads choices against the runs that are there; scores are drawn once for all runs of a group."""

    def __init__(
        self,
        root: Path,
        document: Document,
        groups: Sequence[tuple[str, Group]],
        reasons: Mapping[str, str],
        submitted: Sequence[Submission],
    ) -> None:
        self._root = root
        self._document = document
        self._there = {row.name: (name, group, row) for name, group in groups for row in group.rows}
        self._reasons = reasons
        self._submitted = submitted
        self._drawn: dict[str, NDArray[np.float64]] = {}

    def read(self, loc: Loc, line: Mapping[str, str]) -> _Choice | list[Fault]:
        """What a line's choice was worth, or all that is wrong with it."""
        if "blend" in line:
            return self._blend(loc, line)
        faults = [fault for key in ("without", "with", "run") if key in line for fault in self._unknown(loc, line, key)]
        if faults:
            return faults
        return self._views(loc, line) if "run" in line else self._pair(loc, line)

    def _unknown(self, loc: Loc, line: Mapping[str, str], key: str) -> list[Fault]:
        name = line[key]
        if name in self._there:
            return []
        if name in self._reasons:
            what, fix = f"the run `{name}` {self._reasons[name]}", f"make exp EXP={name}, or leave the choice out"
            if self._reasons[name] == _UNSCORED:
                fix = "name a run that was scored"
        else:
            what = f"there is no complete run `{name}`"
            fix = did_you_mean(name, self._there) or f"make exp EXP={name}, or leave the choice out"
        return [self._document.fault((*loc, key), what, fix)]

    def _pair(self, loc: Loc, line: Mapping[str, str]) -> _Choice | list[Fault]:
        name, group, without = self._there[line["without"]]
        other_name, other, chosen = self._there[line["with"]]
        if group is not other:
            what = (
                f"`{chosen.name}` cannot be compared with `{without.name}`: it is scored on {other_name}, {other.title}"
                f", not on {name}, {group.title}"
            )
            fix = "name two runs of the same competition, folds, labels and classes"
            return [self._document.fault((*loc, "with"), what, fix)]
        effect = self._difference(name, group, without.run, chosen.run)
        told = f"`{without.name}`", f"`{chosen.name}`"
        return _Choice(line["choice"], *told, effect, _changed(without, chosen), line.get("note", ""))

    def _difference(self, competition: str, group: Group, without: Run, chosen: Run) -> _Effect:
        metric = METRICS[group.metric]
        ids = group.rows[0].run.ids
        groups = read_folds(competition_folder(self._root, competition) / "folds.csv").groups_of(ids.tolist())
        labels = group.rows[0].run.labels
        probs = [run.probs[rows_of(run.ids, ids)] for run in (without, chosen)]
        for run, each in zip((without, chosen), probs, strict=True):
            if run.name not in self._drawn:
                self._drawn[run.name] = bootstrap(metric, labels, [each], groups)[:, 0]
        # The same groups are drawn for all runs, so that draws are paired.
        gains = metric.sign * (self._drawn[chosen.name] - self._drawn[without.name])
        gain = metric.sign * (metric.score(labels, probs[1]) - metric.score(labels, probs[0]))
        error = float(gains.std(ddof=1))
        if metric.name == "accuracy":
            _, member = np.unique(groups, return_inverse=True)
            right = [(each.argmax(axis=1) == labels).astype(np.int64) for each in probs]
            ahead = np.bincount(member, weights=right[1] - right[0])
            p = mcnemar(int((ahead > 0).sum()), int((ahead < 0).sum()))
        else:
            p = normal_p(gain, error)
        return _Effect(gain, error, *interval(gains, LEVEL), p)

    def _views(self, loc: Loc, line: Mapping[str, str]) -> _Choice | list[Fault]:
        _, _, row = self._there[line["run"]]
        views = [str(view) for view in row.run.info["tta"]]
        told = row.run.info.get("tta_gain")
        if told is None:
            what, fix = f"`{row.name}` has no views but {', '.join(views) or 'the image'}", "name a run with several"
            if len(views) > 1:
                what = f"`{row.name}` was kept without the standard error of what its views gain"
                fix = f"make exp EXP={row.name} FRESH=1, or name a run that was kept since"
            return [self._document.fault((*loc, "run"), what, fix)]
        effect = _by_normal(told["gain"], told["standard_error"])
        sides = f"`{row.name}`, the image alone", f"`{row.name}`, the mean of {len(views)} views"
        return _Choice(line["choice"], *sides, effect, f"`tta: [{', '.join(views)}]`", line.get("note", ""))

    def _blend(self, loc: Loc, line: Mapping[str, str]) -> _Choice | list[Fault]:
        strict = line["blend"] == "strict"
        submission = self._submitted[-1 if strict else 0] if self._submitted else None
        if submission is None or (strict and submission.track != OWN_TRACK):
            kind = f" of {OWN_TRACK}" if strict else ""
            return [self._document.fault((*loc, "blend"), f"there is no submission{kind}", "make submit")]
        record = _record(submission)
        tried = {trial["method"]: trial for trial in record.get("tried", [])}
        blends = [trial for method, trial in tried.items() if method != "best"]
        if "best" not in tried or submission.method not in tried or not blends:
            what = f"the submission {submission.name} does not tell what its blend gains over its best run"
            fix = "make submit, without METHOD"
            if submission.method == "single":
                fix = "leave the choice out until two runs of the track are kept"
            return [self._document.fault((*loc, "blend"), what, fix)]
        trial, chosen = tried[submission.method], submission.blended
        if submission.method == "best":
            # Against itself the best run gains nothing: what a blend would have been worth is the news.
            trial = max(blends, key=lambda trial: trial["gain"])
            chosen = f"{trial['method']} of {len(record['considered'])} runs, not taken"
        effect = _by_normal(trial["gain"], trial["gain_standard_error"])
        return _Choice(line["choice"], "the best run alone", chosen, effect, "-", line.get("note", ""))


def _by_normal(gain: float, error: float) -> _Effect:
    return _Effect(gain, error, gain - Z95 * error, gain + Z95 * error, normal_p(gain, error))


def _changed(without: Row, chosen: Row) -> str:
    """What the second spec has otherwise than the first, so that one sees whether it is the choice alone."""
    before, after = (with_defaults(row.spec) | {"name": "", "tune": None} for row in (without, chosen))
    lines = differences(before, after)
    others = ", ".join(f"`{line.partition(': ')[0]}`" for line in lines[_KEYS_SHOWN:])
    shown = [f"`{line}`" for line in lines[:_KEYS_SHOWN]]
    return "; ".join([*shown, *([f"and {others}"] if others else [])]) or "nothing"


def _benchmark_faults(document: Document, benchmark: Benchmark | None, submitted: Sequence[Submission]) -> list[Fault]:
    wrong = [one for one in submitted if benchmark is not None and one.images != benchmark.of]
    if benchmark is None or not wrong:
        return []
    what = f"`benchmark.of` is {benchmark.of}, but the submission {wrong[0].name} holds {wrong[0].images} images"
    return [document.fault(("benchmark", "of"), what, "hold submissions against a score on the same images")]


def _verdict(gain: float, p: float) -> str:
    if p >= ALPHA:
        return "not told apart"
    return "helps" if gain > 0 else "hurts"


def _tally(verdicts: Sequence[str]) -> str:
    help_, hurt, open_ = (verdicts.count(word) for word in ("helps", "hurts", "not told apart"))
    noun = "choice" if len(verdicts) == 1 else "choices"
    return f"{len(verdicts)} {noun}: {help_} help, {hurt} hurt, {open_} not told apart"


# The page -------------------------------------------------------------------------------------------------------------


def _opening(asked: Ablations, main: Group | None, submitted: Sequence[Submission]) -> list[str]:
    name, benchmark = asked.competition, asked.benchmark
    scored = ""
    if main is not None:
        scored = f", by {main.metric} on {main.n_scored:,} labelled images, out of fold over {main.title}"
    parts = [
        f"What the kept runs of `{name}` score{scored}, what their blends are expected to score on the test images, "
        f"whose labels nobody has here, and what each choice was worth. `+-` is one standard error, except in the "
        f"count of test images, where it is half of the 95 % interval. Made by `make results COMP={name}` from `oof/` "
        f"and `submissions/`."
    ]
    if not submitted:
        return [*parts, f"Nothing is submitted yet: `make submit COMP={name}`."]
    images = submitted[0].images
    header = ["Track", "Blend", "Estimate", "95 % interval", f"Expected right of {images}"]
    if benchmark is not None:
        header.append(f"More than {benchmark.right} right")
    marked = any(one.marks for one in submitted)
    header += [*(["Marks"] if marked else []), "Kept in"]
    rows = []
    for one in submitted:
        ends = "-" if one.interval is None else _unbroken(f"{one.interval[0]:.4f} to {one.interval[1]:.4f}")
        expected = "-" if one.expected is None else _unbroken(f"{one.expected[0]} +- {one.expected[1]}")
        cells = [one.track, one.blended, _plus_minus(one.score, one.standard_error), ends, expected]
        if benchmark is not None:
            cells.append(_chance(one, benchmark.right))
        if marked:
            cells.append(", ".join(one.marks) or "-")
        rows.append([*cells, f"`submissions/{one.name}`"])
    parts.append(_table(header, rows))
    made = dict[str, list[str]]()
    for index, one in enumerate(submitted):
        made.setdefault(_command(one, main, strict_copy=index > 0), []).append(one.name)
    code = [f"{command}  # {', '.join(names)}" for command, names in made.items()]
    parts.append("\n".join(["```", *code, "```"]))
    parts.append(
        "Estimates of blends are cross-fitted: members, weights and method are chosen without the fold that they are "
        "scored on. They are conditional on the trained models, and suppose test images drawn like the labelled ones."
    )
    if benchmark is not None:
        share = benchmark.right / benchmark.of
        error = (share * (1 - share) / benchmark.of) ** 0.5
        parts.append(
            f"To be beaten: {benchmark.name}, {benchmark.right} of {benchmark.of} test images right, "
            f"{_plus_minus(share, error)}. The chance of more takes the estimate, its error and the luck of "
            f"{benchmark.of} images as normal."
        )
    return parts


def _record(submission: Submission) -> dict[str, Any]:
    """What its `blend.json` holds, which `read_history` has read before."""
    record: dict[str, Any] = json.loads((submission.path / "blend.json").read_bytes())
    return record


def _command(submission: Submission, main: Group | None, *, strict_copy: bool) -> str:
    """What makes a submission of the runs that are there now; without RUNS it is made of all of its track."""
    record = _record(submission)
    rows = () if main is None else main.rows
    considered = record.get("considered", [name for name, _ in submission.members])
    of_track = {row.name for row in rows if submission.track == EXTERNAL_TRACK or row.track == OWN_TRACK}
    asked = [] if set(considered) == of_track else [f"RUNS={','.join(considered)}"]
    if len(considered) > 1 and len(record.get("tried", [])) < 2:
        asked.append(f"METHOD={submission.method}")
    prior = (record.get("prior") or {}).get("kind", "none")
    asked += [f"PRIOR={prior}"] if prior != "none" else []
    # What was asked for belongs to this one alone; named runs would otherwise be written as the best.
    asked += ["TRACK=strict"] if asked and strict_copy else []
    return " ".join(["make submit", f"COMP={submission.competition}", *asked])


def _chance(submission: Submission, right: int) -> str:
    """How likely more than `right` images are right, by the expected count and the interval around it."""
    if submission.expected is None:
        return "-"
    mean, half_width = submission.expected
    chance = 1 - NormalDist(mean, half_width / Z95).cdf(right + 0.5) if half_width else float(mean > right)
    return "below 1 %" if chance < 0.01 else "above 99 %" if chance > 0.99 else f"about {100 * chance:.0f} %"


def _runs(group: Group) -> list[str]:
    """What the best run scores, and two tables a track, the best run first."""
    tracks = {track: [row for row in group.rows if row.track == track] for track in (EXTERNAL_TRACK, OWN_TRACK)}
    parts, best = list[str](), group.best
    if best is not None:
        of = f"all {best.chosen_among} runs" + (" of both tracks" if all(tracks.values()) else "")
        ends = _unbroken(f"{best.low:.4f} to {best.high:.4f}")
        parts.append(
            f"`{group.rows[0].name}` is the best of {of} on the images that score it. Corrected for "
            f"that choice (BBC-CV): {_plus_minus(best.score, best.standard_error)}, 95 % interval {ends}."
        )
    if any(row.tta_gain is not None and row.tta_error is None for row in group.rows):
        parts.append("A gain by test-time augmentation (TTA) without `+-` is of a run whose record does not tell it.")
    metric = group.metric.replace("_", " ")
    header = ["Run", f"{metric[0].upper()}{metric[1:]}", "Gain by TTA", "Parameters", "Image", "Seeds", "Builds on"]
    for track, rows in tracks.items():
        if rows:
            parts.append(f"### {track[0].upper()}{track[1:]}")
            parts += [_guard_words(rows)] if track == EXTERNAL_TRACK else []
            parts.append(_table([*header, "Marks"], [_run_cells(row) for row in rows]))
            parts += _how_made([row.run for row in rows])
    return parts


def _guard_words(rows: Sequence[Row]) -> str:
    """What the leak guard did for runs with external data."""
    words = (
        "Images of other data sets that are copies of the competition's, labelled or test, are left out before "
        "anything is trained ([the leak guard](EXTERNAL.md))."
    )
    untold = [f"`{row.name}`" for row in rows if not row.run.info.get("leak_guard")]
    return f"{words} Not told by the records of {', '.join(untold)}." if untold else words


def _run_cells(row: Row) -> list[str]:
    gain = "-" if row.tta_gain is None else f"{row.tta_gain:+.4f}"
    return [
        f"`{row.name}`",
        _plus_minus(row.score, row.standard_error),
        gain if row.tta_error is None else _unbroken(f"{gain} +- {row.tta_error:.4f}"),
        millions(row.parameters),
        _image(row.spec),
        f"{row.seeds}" if row.seed_std is None else f"{row.seeds}, std {row.seed_std:.4f}",
        _builds_on(row.spec, row.run.info),
        ", ".join(row.marks) or "-",
    ]


def _runs_apart(groups: Sequence[tuple[str, Group]], unscored: Sequence[Run]) -> list[str]:
    """Runs that are not in the tables above: other competitions, held-out parts, other classes, other splits."""
    rows = [
        [
            f"`{row.name}`",
            f"`{name}`",
            f"{group.title}: {group.n_scored:,} images",
            f"{group.metric} {_plus_minus(row.score, row.standard_error)}",
            millions(row.parameters),
            _image(row.spec),
            _builds_on(row.spec, row.run.info),
        ]
        for name, group in groups
        for row in group.rows
    ]
    for run in unscored:
        spec, info = _spec(run.path), run.info
        cells = [f"`{run.name}`", f"`{info['competition']}`", _held_out(spec, info), "-"]
        rows.append([*cells, millions(info["parameters"]), _image(spec), _builds_on(spec, info)])
    if not rows:
        return []
    header = ["Run", "Competition", "Scored on", "Score", "Parameters", "Image", "Builds on"]
    runs = [*(row.run for _, group in groups for row in group.rows), *unscored]
    return ["### Scored apart", _table(header, rows), *_how_made(runs)]


def _held_out(spec: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    """What a run without a score was not trained on: copies of images that whoever builds on it is scored on."""
    guarded = (info.get("leak_guard") or {}).get("clear_of", {})
    told = []
    for name in spec.get("clear_of") or []:
        if name in guarded:
            count = sum(of["dropped"] for of in guarded[name]["dropped"].values())
            told.append(f"{count:,} {'copy' if count == 1 else 'copies'} of {name}'s images")
    return "; without ".join(["nothing held out", *([", ".join(told)] if told else [])])


def _how_made(runs: Sequence[Run]) -> list[str]:
    """A table of wall times, devices and commands."""
    rows = []
    for run in runs:
        device = run.info["device"]
        devices = device if isinstance(device, list) else [device or "-"]
        shown = "; ".join(dict.fromkeys(_device(str(one)) for one in devices))
        rows.append(
            [f"`{run.name}`", _unbroken(duration(run.info["wall_s"])), shown, f"`{run.info['command'] or '-'}`"]
        )
    return ["How they were made:", _table(["Run", "Wall time", "Trained on", "Command"], rows)]


def _device(text: str) -> str:
    """A device in short: `Intel Xeon, 2 threads, bf16`."""
    found = _DEVICE.fullmatch(text)
    if found is None:
        return text
    name = re.sub(r"\((R|TM)\)| (Processor|CPU)\b", "", found["name"]).strip()
    threads = "thread" if found["threads"] == "1" else "threads"
    parts = [name, *([f"{found['threads']} {threads}"] if found["kind"] == "cpu" else []), found["precision"]]
    return ", ".join(parts)


def _image(spec: Mapping[str, Any]) -> str:
    size = (spec.get("model") or {}).get("image_size")
    return "-" if size is None else f"{size} px"


def _builds_on(spec: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    """Starting weights, teachers, and data from elsewhere."""
    weights = str((spec.get("model") or {}).get("weights", "none"))
    parts = []
    if weights == "pretrained":
        parts.append("pretrained weights")
    elif weights.startswith("run:"):
        parts.append(f"starts from `{weights.removeprefix('run:')}`")
    taught = [name for name in _sources(spec) if weights != f"run:{name}"]
    if taught:
        parts.append(f"taught by {', '.join(f'`{name}`' for name in taught)}")
    # What the start brought is told by it; then only the source is news.
    entries = [
        {key: value for key, value in entry.items() if key != "by"}
        if isinstance(entry, dict) and entry.get("by") == weights
        else entry
        for entry in info["external"]
    ]
    if external := external_words(entries):
        parts.append(f"external {', '.join(external)}")
    return "; ".join(parts) or "-"


def _choices(lines: Sequence[_Choice], corrected: Sequence[float], verdicts: Sequence[str]) -> list[str]:
    if not lines:
        return [f"None is listed in {CHOICES} yet."]
    header = ["Choice", "Without", "With", "Difference", "95 % interval", "p", "Verdict", "What differs", "Note"]
    rows = [
        [
            line.name,
            line.without,
            line.chosen,
            _unbroken(f"{line.effect.gain:+.4f} +- {line.effect.error:.4f}"),
            _unbroken(f"{line.effect.low:+.4f} to {line.effect.high:+.4f}"),
            "below 0.001" if p < 0.001 else f"{p:.3f}",
            verdict,
            line.changed,
            line.note or "-",
        ]
        for line, p, verdict in zip(lines, corrected, verdicts, strict=True)
    ]
    return [
        f"The lines of [ablations.yaml](ablations.yaml) in their order, negative results too. {_tally(verdicts)}. "
        "Differences are paired, on the same images, and positive where the choice helps. p is corrected for all lines "
        f"of the table (Holm), and tells apart below {ALPHA}. `What differs` is from the two specs: where it names "
        "more than the choice, the difference is of all that it names.",
        _table(header, rows),
        "Two runs: paired bootstrap over groups of near-duplicates; p by McNemar's test where the metric is accuracy. "
        "Views and blends: standard errors of their records, normal distribution; a blend is held against the best run "
        "with both cross-fitted, and its method was chosen by these figures. Every difference is conditional on the "
        "trained models: another seed gives another one.",
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first, *others = (f"| {' | '.join(map(_cell, line))} |" for line in (header, *rows))
    return "\n".join([first, f"|{'---|' * len(header)}", *others])


def _cell(text: str) -> str:
    return re.sub(r"[ \t\r\n]+", " ", text).strip(" ").replace("|", "\\|")


def _unbroken(text: str) -> str:
    return text.replace(" ", _NO_BREAK)


def _plus_minus(value: float, error: float) -> str:
    return _unbroken(f"{value:.4f} +- {error:.4f}")
