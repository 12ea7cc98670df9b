"""Writing a blend as a submission, and checking a submission before it is uploaded.

A submission's bytes depend on the runs alone; the `blend.json` beside it says what it is and what to expect of it.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal

import numpy as np

from foldwise.errors import Fault, FoldwiseError, RecordError
from foldwise.files import atomic_path, pretty_json, sha256_bytes
from foldwise.metrics import LOG_LOSS_EPS, Metric
from foldwise.records.calibration import Prior
from foldwise.records.ensemble import METHODS, Blend, Correction, Method, Recipe, blend
from foldwise.records.history import BEST_COPY, EXTERNAL_TRACK, OWN_TRACK, STRICT_COPY, track_of
from foldwise.records.store import Probs64, Run, rows_of
from foldwise.stats import Difference, paired_difference

# 2 added how to calibrate and what was tried; whatever 1 has is there as it was.
SCHEMA_VERSION = 2
_SUBMISSION, _BLEND = BEST_COPY
# Members that are printed; the rest are counted.
_LISTED = 12
# Members that a line names; the rest are counted.
_NAMED = 4
# Characters of a line of explanation.
_WIDTH = 105

Track = Literal["best", "strict"]


def check_submission(
    content: bytes,
    *,
    where: str,
    expected_ids: Sequence[str],
    classes: Sequence[str],
    id_column: str = "id",
    label_column: str = "label",
) -> list[Fault]:
    """Find all that keeps a file from being a submission.

    Args:
        content: The bytes of the file.
        where: How to name the file.
        expected_ids: The ids that it must hold, in their order.
        classes: The labels that it may hold.
        id_column: Name of the first column.
        label_column: Name of the second.

    Returns:
        Faults, each with its line; empty for a good submission.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return [Fault(where, f"is not UTF-8 (byte {error.start})", "save it as UTF-8")]
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    if header != [id_column, label_column]:
        what = f"the header must be `{id_column},{label_column}`, but is `{','.join(header)}`"
        fix = "save it without a byte order mark" if text.startswith("\ufeff") else ""
        return [Fault(f"{where}:1", what, fix)]

    faults = []
    ids: list[str] = []
    expected = set(expected_ids)
    seen: dict[str, int] = {}
    for row in reader:
        place = f"{where}:{reader.line_num}"
        if len(row) != 2:
            faults.append(Fault(place, f"two cells must be there, but got {len(row)}"))
            continue
        name, label = row
        if not name:
            faults.append(Fault(place, "the id is blank"))
        elif name in seen:
            faults.append(Fault(place, f"the id {name} is there already, in line {seen[name]}"))
        elif name not in expected:
            faults.append(Fault(place, f"the id {name} is none of the {len(expected)} to be predicted"))
        if not label:
            faults.append(Fault(place, f"the label of id {name} is blank"))
        elif label not in classes:
            near = get_close_matches(label, classes, n=1)
            fix = f"did you mean `{near[0]}`?" if near else f"the classes are {', '.join(classes)}"
            faults.append(Fault(place, f"unknown label {label!r}", fix))
        seen.setdefault(name, reader.line_num)
        ids.append(name)
    missing = [name for name in expected_ids if name not in seen]
    if missing:
        what = f"{len(missing)} of {len(expected_ids)} ids are missing: {', '.join(missing[:5])}"
        faults.append(Fault(where, what + (", ..." if len(missing) > 5 else "")))
    if not faults and ids != list(expected_ids):
        first = next(index for index, name in enumerate(ids) if name != expected_ids[index])
        what = (
            f"the order of the ids is not the expected one: id {expected_ids[first]} must be here, but got {ids[first]}"
        )
        faults.append(Fault(f"{where}:{first + 2}", what, "sort the rows"))
    return faults


@dataclass(frozen=True, eq=False)
class Tracks:
    """The best blend, and the best of competition data only.

    Attributes:
        best: None where only the strict one was asked for.
        strict: Of competition data only; `best` itself where that is so. None where no run is, or the user named runs.
        every: The blend of all runs, where some saw external data; `best` itself where these help.
        gain: Of `every` over `strict`, paired; None where not both were made, or `every` is of competition data only.
        written: What gets a copy as the newest, by the names of the copies: a submission and its description.
    """

    best: Blend | None
    strict: Blend | None
    every: Blend | None
    gain: Difference | None
    written: Mapping[tuple[str, str], Blend]

    @property
    def first(self) -> Blend:
        """The one to tell of at length."""
        return next(iter(self.written.values()))


def blend_tracks(
    runs: Sequence[Run],
    *,
    metric: Metric,
    groups: Mapping[str, str],
    methods: Sequence[Method] = METHODS,
    prior: Prior = "none",
    track: Track | None = None,
    named: bool = False,
) -> Tracks:
    """Blend all runs, and where some saw external data those of competition data only as well.

    The blend of all runs is the best one where it gives a run with external data a weight and its estimate is higher
    than that of the strict one. Having been chosen so, the better of the two estimates is too good by 0.4 standard
    errors of the gain at most (the mean of a standard normal variable's positive part is 0.399).

    Args:
        runs: At least one; see `ensemble.blend` for this and the next four.
        metric: What to choose and to score by.
        groups: Group of each id.
        methods: Some of `METHODS`.
        prior: What to correct class probabilities for.
        track: Which of the two to make; None for both.
        named: The user named the runs: all of them are blended, whatever their tracks, unless `track` is `strict`.

    Returns:
        The blends; the same for the same runs.

    Raises:
        RecordError: If runs do not fit each other.
        FoldwiseError: If the strict one was asked for, but no run, or not every one that the user named, can be in it.
    """

    def blended(some: Sequence[Run]) -> Blend:
        return blend(some, metric=metric, groups=groups, methods=methods, prior=prior)

    external = [run.name for run in runs if track_of(run.info) == EXTERNAL_TRACK]
    own = [run for run in runs if track_of(run.info) == OWN_TRACK]
    if track == "strict":
        if external and named:
            what = f"TRACK=strict: not of {OWN_TRACK}: {', '.join(external)}"
            raise FoldwiseError(f"{what}\n  fix: leave these out of RUNS, or TRACK")
        if not own:
            what = f"TRACK=strict: no run is of {OWN_TRACK}, but {_runs(len(external))} {EXTERNAL_TRACK}"
            raise FoldwiseError(f"{what}\n  fix: train one without `external`, or leave TRACK out")
        strict = blended(own)
        return Tracks(None, strict, None, None, {STRICT_COPY: strict})
    if named or not own:
        best = blended(runs)
        return Tracks(best, None, None, None, {BEST_COPY: best})
    # First, since it refuses runs that do not fit each other, whatever their tracks.
    every = blended(runs) if external else None
    best = strict = blended(own)
    gain = None
    if every is not None and _track(every) == EXTERNAL_TRACK:
        gain = _gain(every, strict, own[0], metric, groups)
        # By the scores that are kept: those are the same on every machine.
        best = every if metric.sign * (every.score - strict.score) > 0 else strict
    return Tracks(best, strict, every, gain, {BEST_COPY: best} | ({} if track == "best" else {STRICT_COPY: strict}))


def _gain(first: Blend, second: Blend, run: Run, metric: Metric, groups: Mapping[str, str]) -> Difference:
    """Gain of the first blend over the second, both cross-fitted, on the images that the run knows the labels of."""
    mine, other = (of.oof_probs[rows_of(of.oof_ids, run.ids)] for of in (first, second))
    return paired_difference(metric, run.labels, mine, other, np.array([groups[name] for name in run.ids.tolist()]))


def write_submissions(
    folder: Path, tracks: Tracks, *, expected_ids: Sequence[str], id_column: str, label_column: str, now: datetime
) -> dict[tuple[str, str], Path]:
    """Write blends' predictions to folders of their own, then over the newest copies.

    All files are whole on disk before the first is renamed: a failure until then, a full disk say, changes nothing. One
    between renames, such as a folder where a file belongs, may leave some places new and others as they were, but no
    description beside a submission that it does not describe. What is there already to the byte is not touched.

    Args:
        folder: `submissions`; gets `<when>-<hash>/submission.csv` and `blend.json` for each blend, and copies of both
            as the newest: `submission.csv` and `blend.json` of the best, `strict.csv` and `strict.json` of the strict.
        tracks: What to submit.
        expected_ids: The ids to predict, in the order to write.
        id_column: Name of the first column.
        label_column: Name of the second.
        now: Names the folder, to the second, unless the very same blend has one already. Where that name is taken, the
            next second is.

    Returns:
        The folder of each submission, by the names of its copies; equal for the same blend.

    Raises:
        RecordError: If a blend does not predict an expected id.
    """
    kept: dict[Blend, _Kept] = {}
    for one in tracks.written.values():
        if one not in kept:
            content, description = _contents(one, expected_ids, id_column, label_column)
            path = _own_folder(folder, content, description, now, [other.path for other in kept.values()])
            kept[one] = _Kept(path, content, description)
    places = [(folder, names, kept[one]) for names, one in tracks.written.items()]
    places += [(new.path, BEST_COPY, new) for new in kept.values()]
    created = [new.path for new in kept.values() if not new.path.exists()]
    try:
        # Renamed when all are whole, the last first: folders before copies, a submission before what describes it.
        with ExitStack() as stack:
            for place, (submission, described), new in places:
                if new.is_at(place / submission, place / described):
                    continue
                stack.enter_context(atomic_path(place / described)).write_bytes(new.description.encode())
                stack.enter_context(atomic_path(place / submission)).write_bytes(new.content)
                stack.enter_context(_then_gone(place / described))
    except BaseException:
        for path in created:
            with suppress(OSError):
                path.rmdir()
        raise
    return {names: kept[one].path for names, one in tracks.written.items()}


@dataclass(frozen=True)
class _Kept:
    path: Path
    content: bytes
    description: str

    def is_at(self, submission: Path, described: Path) -> bool:
        """Whether these two files hold it already."""
        there = submission.is_file() and described.is_file()
        return there and (submission.read_bytes(), described.read_bytes()) == (self.content, self.description.encode())


@contextmanager
def _then_gone(path: Path) -> Iterator[None]:
    """Take a file away on a clean exit, and only then."""
    yield
    path.unlink(missing_ok=True)


def _own_folder(folder: Path, content: bytes, description: str, now: datetime, taken: Sequence[Path]) -> Path:
    """The folder that the very same blend has already, or one that nothing has."""
    digest = sha256_bytes(content)[:8]
    same = [file.parent for file in folder.glob(f"*-{digest}/{_BLEND}") if file.read_text("utf-8") == description]
    names = (folder / f"{now + timedelta(seconds=late):%Y%m%d-%H%M%S}-{digest}" for late in count())
    return min(same) if same else next(path for path in names if path not in taken and not (path / _BLEND).exists())


def _contents(blend: Blend, expected_ids: Sequence[str], id_column: str, label_column: str) -> tuple[bytes, str]:
    """The bytes of a blend's `submission.csv`, checked, and its description."""
    predicted = set(blend.test_ids.tolist())
    if lacking := [name for name in expected_ids if name not in predicted]:
        what = (
            f"the blend predicts {len(blend.test_ids)} ids, but {len(lacking)} of the expected ones are not among them"
        )
        fix = "run its members again on the present data, with --fresh"
        raise RecordError([Fault(_SUBMISSION, f"{what}, such as {lacking[0]}", fix)])
    rows = rows_of(blend.test_ids, np.array(expected_ids, dtype=np.str_))
    labels = [blend.classes[index] for index in blend.test_probs[rows].argmax(axis=1).tolist()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([id_column, label_column])
    writer.writerows(zip(expected_ids, labels, strict=True))
    content = text.getvalue().encode()
    faults = check_submission(
        content,
        where=_SUBMISSION,
        expected_ids=expected_ids,
        classes=blend.classes,
        id_column=id_column,
        label_column=label_column,
    )
    if faults:
        raise RecordError(faults)
    return content, pretty_json(_describe(blend, Counter(labels), sha256_bytes(content)))


def predict_as_described(told: Mapping[str, Any], probs: Sequence[Probs64]) -> Probs64:
    """Blend predictions in the way that a `blend.json` tells.

    Args:
        told: The content of the file.
        probs: Predictions (N, C) of each of its members, in their order there, of the same images.

    Returns:
        (N, C) float64; of the members' `test.csv` the probabilities that gave `submission.csv`.
    """
    members, classes = told["members"], len(told["classes"])
    weights = np.array([member["weight"] for member in members])
    recipe = Recipe(
        method="best" if told["method"] == "single" else told["method"],
        coefficients=np.array([member.get("coefficient", member["weight"]) for member in members]),
        # The first schema averaged probabilities as they were.
        temperatures=np.array([member.get("temperature", 1.0) for member in members]),
        bias=np.array(told.get("bias", [0.0] * classes)),
        shares=weights,
    )
    correction = told.get("prior", {}).get("correction")
    if correction is None:
        return recipe.predict(probs, None)
    return recipe.predict(probs, Correction(correction["exponent"], tuple(correction["factors"])))


def blend_lines(blend: Blend) -> list[str]:
    """What to tell of a blend: its members, the methods that were tried, the estimate and what to expect."""
    listed = blend.members[:_LISTED]
    width = max(len(name) for name in ("member", *(member.run.name for member in listed)))
    gained = any(member.gain is not None for member in listed)
    lines = [f"{'member':<{width}}  weight  OOF {blend.metric:<14}" + ("  gain from it" if gained else "")]
    for member in listed:
        line = f"{member.run.name:<{width}}  {member.weight:6.3f}  {_with_error(member.score, member.standard_error)}"
        if member.gain is not None and member.gain_standard_error is not None:
            line += f"  {_with_error(member.gain, member.gain_standard_error, sign='+')}"
        lines.append(line)
    if rest := blend.members[_LISTED:]:
        lines.append(f"and {len(rest)} more, with {sum(member.weight for member in rest):.3f} of the weight")
    lines = [line.rstrip() for line in lines]
    if len(blend.trials) > 1:
        lines += ["", f"tried       cross-fitted       over {blend.trials[0].method}"]
        for trial in blend.trials:
            line = f"{trial.method:<10}  {_with_error(trial.score, trial.standard_error)}"
            if trial is not blend.trials[0]:
                line += f"  {_with_error(trial.gain, trial.gain_standard_error, sign='+')}"
            lines.append(line + ("  <- taken" if trial.method == blend.method else ""))
        lines.append("")
    low, high = blend.interval
    right, margin = blend.expected_right(len(blend.test_ids))
    lines += [f"method       {blend.method}, of {_runs(len(blend.considered))}", f"             {blend.choice}"]
    if blend.method == "stack":
        lines.append(f"             weights: {blend.weights_are}")
    if others := Counter(method for method in blend.fold_methods.values() if method != blend.method):
        told = ", ".join(f"{method} in {count}" for method, count in sorted(others.items()))
        lines.append(f"             chosen without one of the {len(blend.fold_methods)} folds: {told}")
    if blend.correction is not None:
        pairs = zip(blend.classes, blend.correction.factors, strict=True)
        factors = ", ".join(f"{name} {factor:.2f}" for name, factor in pairs)
        lines.append(f"prior        {blend.prior}: probabilities to the power {blend.correction.exponent:.2f}, times")
        lines.append(f"             {factors}")
    lines += [
        f"estimate     {_with_error(blend.score, blend.standard_error)}, "
        f"{blend.level:.0%} interval {low:.4f} to {high:.4f}",
        *(f"             {line}" for line in wrap(blend.note, _WIDTH)),
    ]
    if blend.method != "single":
        lines.append(f"naive        {blend.naive:.4f} (scored on the rows that chose the weights: not to be trusted)")
    lines.append(f"expect       {right} +- {margin} of {len(blend.test_ids)} test images right")
    if blend.marks:
        lines.append(f"marks        {', '.join(blend.marks)}")
    external = [member.run.name for member in blend.members if track_of(member.run.info) == EXTERNAL_TRACK]
    track = f"{EXTERNAL_TRACK} ({', '.join(external)})" if external else OWN_TRACK
    lines += [f"{'' if index else 'track':<12} {line}" for index, line in enumerate(wrap(track, _WIDTH))]
    return lines


def tracks_lines(tracks: Tracks) -> list[str]:
    """What to tell of the blends: the best one at length, the strict one beside it and what external data bring."""
    lines = blend_lines(tracks.first)
    if tracks.every is None:
        return lines
    if tracks.gain is None:
        what = f"in a blend of all {len(tracks.every.considered)} runs none with external data gets a weight"
        return [*lines, f"external     does not help: {what}"]
    gain = (
        f"{_with_error(tracks.gain.gain, tracks.gain.standard_error, sign='+')}, paired, "
        f"{tracks.gain.level:.0%} interval {tracks.gain.low:+.4f} to {tracks.gain.high:+.4f}"
    )
    if tracks.best is tracks.strict:
        score = _with_error(tracks.every.score, tracks.every.standard_error)
        return [*lines, f"external     does not help: with it {score}, a gain of {gain}"]
    if tracks.strict is None:
        return lines
    low, high = tracks.strict.interval
    score = _with_error(tracks.strict.score, tracks.strict.standard_error)
    return [
        *lines,
        f"external     a gain of {gain}, over the strict one",
        f"strict       {_in_short(tracks.strict)}",
        f"             estimate {score}, {tracks.strict.level:.0%} interval {low:.4f} to {high:.4f}",
    ]


def written_lines(written: Mapping[tuple[str, str], Path], root: Path) -> list[str]:
    """What was written where: a line a copy; see `write_submissions`."""
    lines = []
    for names, path in written.items():
        kept = path.relative_to(root)
        lines.append(f"{kept.parent.as_posix()}/{', '.join(names)}; kept in {kept.as_posix()}")
    return [f"{'' if index else 'written':<12} {line}" for index, line in enumerate(lines)]


def _track(blend: Blend) -> str:
    return track_of({"external": blend.external, "marks": blend.marks})


def _in_short(blend: Blend) -> str:
    named = [f"{member.run.name} {member.weight:.2f}" for member in blend.members[:_NAMED]]
    more = [f"{len(blend.members) - _NAMED} more"] if len(blend.members) > _NAMED else []
    return f"{blend.method} of {', '.join([*named, *more])}"


def _with_error(value: float, error: float, sign: str = "") -> str:
    return f"{value:{sign}.4f} +- {error:.4f}"


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _describe(blend: Blend, counts: Counter[str], digest: str) -> dict[str, Any]:
    images = counts.total()
    right, margin = blend.expected_right(images)
    return {
        "schema_version": SCHEMA_VERSION,
        "competition": blend.competition,
        "metric": blend.metric,
        "method": blend.method,
        "members": [
            {
                "run": member.run.name,
                "weight": member.weight,
                "score": member.score,
                "standard_error": member.standard_error,
                "coefficient": member.coefficient,
                "temperature": member.temperature,
                "marginal_gain": member.gain,
                "marginal_gain_standard_error": member.gain_standard_error,
                "hashes": member.run.info["hashes"],
            }
            for member in blend.members
        ],
        "weights_are": blend.weights_are,
        "bias": list(blend.bias),
        "calibration": {"kind": "temperature of each run, fitted to its log loss", "least_prob": LOG_LOSS_EPS},
        "prior": {
            "kind": blend.prior,
            "correction": asdict(blend.correction) if blend.correction is not None else None,
        },
        "considered": list(blend.considered),
        "choice": blend.choice,
        "tried": [
            {
                "method": trial.method,
                "score": trial.score,
                "standard_error": trial.standard_error,
                "gain": trial.gain,
                "gain_standard_error": trial.gain_standard_error,
            }
            for trial in blend.trials
        ],
        "estimate": {
            "score": blend.score,
            "standard_error": blend.standard_error,
            "interval": list(blend.interval),
            "level": blend.level,
            "note": blend.note,
            "fold_methods": {str(fold): method for fold, method in blend.fold_methods.items()},
        },
        "naive": blend.naive,
        "expectation": {
            "right": right,
            "plus_minus": margin,
            "of": images,
            "level": blend.level,
            "text": f"expect {right} +- {margin} right of {images}",
        },
        "classes": list(blend.classes),
        "counts": {name: counts[name] for name in blend.classes},
        "folds_sha256": blend.folds_sha256,
        "submission_sha256": digest,
        "marks": blend.marks,
        "external": blend.external,
    }
