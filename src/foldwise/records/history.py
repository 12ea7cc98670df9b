"""The submissions that were written: what each was expected to score, and what it scored in public.

Public scores and uploads lie in files of their own beside `blend.json`, which stays as it is to the byte.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, Literal, TypeVar

from foldwise.errors import Fault, FoldwiseError, RecordError
from foldwise.files import atomic_write, pretty_json, sha256_bytes
from foldwise.metrics import METRICS, Metric
from foldwise.stats import Z95

SCHEMA_VERSION = 1
OWN_TRACK, EXTERNAL_TRACK = "competition data only", "with external data"
_BLEND, _SUBMISSION, _PUBLIC, _UPLOADS = "blend.json", "submission.csv", "public.json", "uploads.json"
# The copies of the newest: each a submission, and the description that tells which one it is.
BEST_COPY, STRICT_COPY = (_SUBMISSION, _BLEND), ("strict.csv", "strict.json")
_FOLDER = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
# Members that a line names; more are counted.
_NAMED = 4

T = TypeVar("T")

Source = Literal["user", "kaggle"]


@dataclass(frozen=True)
class PublicScore:
    """What a submission scored on the public part of the test images.

    Attributes:
        score: By the competition's metric.
        images: How many images it is on; None where nobody said, of this or another submission.
        source: Who told: the user, or Kaggle.
        when: When it was recorded, ISO 8601 in UTC.
    """

    score: float
    images: int | None
    source: Source
    when: str


@dataclass(frozen=True)
class Upload:
    """One upload that Kaggle took.

    Attributes:
        kaggle: The competition's name there.
        when: When, ISO 8601 in UTC.
        reference: Kaggle's number of it; None where it gave none.
        message: What was said with it.
        answer: Kaggle's words.
    """

    kaggle: str
    when: str
    reference: int | None
    message: str
    answer: str


@dataclass(frozen=True)
class Submission:
    """A kept submission, whose `submission.csv` is the one that its `blend.json` describes.

    Attributes:
        path: Its folder.
        competition: Name of the competition.
        metric: Name of the metric.
        method: How its members were blended.
        members: Name and weight of each run, the heaviest first.
        hashes: Of each run by name, those of its `run.json` when it was blended, where `blend.json` tells them.
        score: The estimate.
        standard_error: Of `score`.
        interval: Lower and upper end around `score`; None where `blend.json` has none.
        expected: Images expected to be right, and the half-width of the interval around it; None where it has none.
        images: Test images.
        marks: Marks of all members.
        track: `competition data only` or `with external data`.
        sha256: Of `submission.csv`.
        n_scored: Images that the estimate is on; None where the first member is not there any more.
        public: The public score of these very bytes, whichever folder it was recorded in; None where there is none.
        uploads: The oldest first.
    """

    path: Path
    competition: str
    metric: str
    method: str
    members: tuple[tuple[str, float], ...]
    hashes: dict[str, dict[str, str]]
    score: float
    standard_error: float
    interval: tuple[float, float] | None
    expected: tuple[int, int] | None
    images: int
    marks: tuple[str, ...]
    track: str
    sha256: str
    n_scored: int | None
    public: PublicScore | None
    uploads: tuple[Upload, ...]

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.path.name

    @property
    def file(self) -> Path:
        """Its `submission.csv`."""
        return self.path / _SUBMISSION

    @property
    def when(self) -> datetime:
        """When it was written, local time."""
        return datetime.strptime(self.name[:15], "%Y%m%d-%H%M%S")

    @property
    def blended(self) -> str:
        """Its members in a line, such as `caruana of baseline_cnn 0.59, resnet18 0.41`."""
        named = [name if len(self.members) == 1 else f"{name} {weight:.2f}" for name, weight in self.members[:_NAMED]]
        more = [f"{len(self.members) - _NAMED} more"] if len(self.members) > _NAMED else []
        return f"{self.method} of {', '.join([*named, *more])}"

    def changed(self, run: str, hashes: Mapping[str, str]) -> bool:
        """Whether a member, whose `run.json` holds these hashes, was made anew since it was blended."""
        blended = self.hashes.get(run, hashes)
        return any(blended[file] != hashes[file] for file in ("oof", "test"))

    @property
    def public_error(self) -> float | None:
        """How far the public score strays by the draw of its images: one standard deviation, if the estimate holds.

        Binomial for accuracy. For other metrics the estimate's own standard error, scaled to the number of images.
        """
        if self.public is None:
            return None
        images = self.public.images or self.images
        if self.metric == "accuracy":
            return sqrt(self.score * (1 - self.score) / images)
        return None if self.n_scored is None else self.standard_error * sqrt(self.n_scored / images)

    @property
    def z(self) -> float | None:
        """Public score less estimate, in standard errors of that difference; negative where the public one is worse."""
        error = self.public_error
        if self.public is None or error is None or not (spread := sqrt(self.standard_error**2 + error**2)):
            return None
        return METRICS[self.metric].sign * (self.public.score - self.score) / spread


@dataclass(frozen=True)
class Drift:
    """How public scores lie to the estimates.

    All public scores are on the same images and most members are shared, so the z-scores hang together and must not be
    pooled as if each were news. Their mean has a standard deviation of 1 at most, however closely they hang together,
    so that a mean beyond the 95% quantile of a standard normal variable happens in at most 1 of 20 competitions in
    which nothing is wrong. With one public score it is that one's z-score.

    Attributes:
        scored: Public scores with a z-score; the same bytes count once.
        below: Those that lie below their 95% interval, so worse than estimated.
        above: Those that lie above it.
        mean_z: Mean of their z-scores.
        optimistic: Whether the estimate of any of them is marked so.
    """

    scored: int
    below: int
    above: int
    mean_z: float
    optimistic: bool

    @property
    def apart(self) -> bool:
        """Whether public scores and estimates have drifted apart."""
        return abs(self.mean_z) > Z95


@dataclass(frozen=True)
class History:
    """The submissions of a competition.

    Attributes:
        competition: Its name.
        submissions: The latest first, by the time of their folder.
        newest: The one that a copy of is kept as the newest; None where there is none, or where it is left out.
        newest_strict: The one that a copy of is kept as the newest of competition data only; None likewise.
        left_out: A line `<folder>: <reason>` for each folder that cannot be read.
    """

    competition: str
    submissions: tuple[Submission, ...]
    newest: Submission | None
    newest_strict: Submission | None
    left_out: tuple[str, ...]

    @cached_property
    def drift(self) -> Drift | None:
        """How public scores lie to the estimates; None without a public score that can be held against one."""
        by_bytes = {submission.sha256: submission for submission in reversed(self.submissions)}
        scored = [submission for submission in by_bytes.values() if submission.z is not None]
        z = [submission.z for submission in scored if submission.z is not None]
        if not z:
            return None
        optimistic = any("optimistic" in submission.marks for submission in scored)
        return Drift(len(z), sum(v < -Z95 for v in z), sum(v > Z95 for v in z), sum(z) / len(z), optimistic)

    def find(self, of: str | None = None) -> Submission:
        """The submission meant.

        Args:
            of: Its folder, or the beginning of its folder's name or of its hash; None, `newest` or `best`: the newest;
                `strict`: the newest of competition data only.

        Raises:
            FoldwiseError: If there is none, or it is not clear which one.
        """
        if not self.submissions:
            what = f"there is no submission of `{self.competition}`"
            what += "".join(f"\n  left out: {line}" for line in self.left_out)
            raise FoldwiseError(f"{what}\n  fix: make submit COMP={self.competition}")
        of = "newest" if of is None else of
        if of in ("newest", "best"):
            what = f"the newest submission of `{self.competition}` is not what was written, or its folder is gone"
            return self._there(self.newest, what, "make submit again")
        if of == "strict":
            what = f"no submission of `{self.competition}` is of {OWN_TRACK}, or the newest is not what was written"
            return self._there(self.newest_strict, what, f"make submit COMP={self.competition} TRACK=strict")
        wanted = Path(of).name.lower()
        found = [
            submission
            for submission in self.submissions
            if wanted and (submission.name.startswith(wanted) or submission.sha256.startswith(wanted))
        ]
        if len({submission.sha256 for submission in found}) == 1:
            return found[0]
        if found:
            there = ", ".join(submission.name for submission in found)
            raise FoldwiseError(
                f"OF={of} may be any of {len(found)} submissions\n  fix: give more of its name: {there}"
            )
        reasons = [line for line in self.left_out if wanted and line.startswith(wanted)]
        if reasons:
            raise FoldwiseError(f"OF={of}: {reasons[0]}\n  fix: take it back with git, or name another one")
        there = ", ".join(submission.name for submission in self.submissions)
        raise FoldwiseError(f"OF={of}: there is no such submission of `{self.competition}`\n  fix: one of {there}")

    def _there(self, submission: Submission | None, what: str, again: str) -> Submission:
        if submission is None:
            what += "".join(f"\n  left out: {line}" for line in self.left_out)
            raise FoldwiseError(f"{what}\n  fix: take it back with git, {again}, or name one by OF=")
        return submission


def track_of(told: Mapping[str, Any]) -> str:
    """The track of a run or a blend, by what its `run.json` or `blend.json` says of external data."""
    return EXTERNAL_TRACK if told.get("external") or "external" in told.get("marks", ()) else OWN_TRACK


def submissions_folder(root: Path, competition: str) -> Path:
    """Where a competition's submissions lie; those of the demo apart, since git ignores them."""
    return root / "submissions" / "demo" if competition == "demo" else root / "submissions"


def read_history(root: Path, competition: str) -> History:
    """Read the submissions of a competition with their public scores and uploads.

    Args:
        root: The project's root.
        competition: A folder under `inputs/`.

    Returns:
        The history; a folder whose `blend.json` or `submission.csv` cannot be read is left out and named.

    Raises:
        RecordError: If a `public.json` or `uploads.json` is not what was written there.
    """
    folder = submissions_folder(root, competition)
    read: list[Submission] = []
    left_out: list[str] = []
    faults: list[Fault] = []
    for path in sorted((path.parent for path in folder.glob(f"*/{_BLEND}")), reverse=True):
        if not _FOLDER.fullmatch(path.name):
            continue
        try:
            submission = _read(path, root, competition)
        except RecordError as error:
            faults += error.faults
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{_BLEND} lacks the key {error}" if isinstance(error, KeyError) else str(error)
            left_out.append(f"{path.name}: {reason}")
        else:
            read += [submission] if submission else []
    if faults:
        raise RecordError(faults)
    submissions = tuple(_with_public_scores(read))
    strict = [submission for submission in submissions if submission.track == OWN_TRACK]
    newest = _newest(folder / BEST_COPY[1], submissions, competition, _latest(submissions))
    own = newest if newest in strict else _latest(strict)
    return History(
        competition, submissions, newest, _newest(folder / STRICT_COPY[1], strict, competition, own), tuple(left_out)
    )


def _with_public_scores(read: Sequence[Submission]) -> Iterator[Submission]:
    """Give each submission what was recorded latest for its bytes, and for a competition's public images."""
    recorded = sorted(
        ((submission.sha256, submission.public) for submission in read if submission.public),
        key=lambda pair: pair[1].when,
    )
    by_bytes = dict(recorded)
    # All public scores of a competition are on the same images.
    images = next((public.images for _, public in reversed(recorded) if public.images is not None), None)
    for submission in read:
        public = by_bytes.get(submission.sha256)
        if public is not None and public.images is None:
            public = replace(public, images=images)
        yield replace(submission, public=public)


def _read(path: Path, root: Path, competition: str) -> Submission | None:
    """The submission of a folder; None where it is of another competition."""
    try:
        told = json.loads((path / _BLEND).read_bytes())
    except ValueError as error:
        raise ValueError(f"{_BLEND} is not readable as JSON ({error})") from None
    if told["competition"] != competition:
        return None
    if told["metric"] not in METRICS:
        raise ValueError(f"the metric {told['metric']!r} is unknown")
    content = (path / _SUBMISSION).read_bytes()
    if sha256_bytes(content) != told["submission_sha256"]:
        raise ValueError(f"{_SUBMISSION} is not the file that {_BLEND} describes")
    estimate, expectation, marks = told["estimate"], told.get("expectation"), tuple(told.get("marks", ()))
    members = tuple((str(member["run"]), float(member["weight"])) for member in told["members"])
    rows = csv.reader(io.StringIO(content.decode("utf-8"), newline=""))
    return Submission(
        path=path,
        competition=competition,
        metric=told["metric"],
        method=told["method"],
        members=members,
        hashes={member["run"]: member["hashes"] for member in told["members"] if "hashes" in member},
        score=float(estimate["score"]),
        standard_error=float(estimate["standard_error"]),
        interval=(estimate["interval"][0], estimate["interval"][1]) if "interval" in estimate else None,
        expected=(expectation["right"], expectation["plus_minus"]) if expectation else None,
        images=sum(1 for _ in rows) - 1,
        marks=marks,
        track=track_of(told),
        sha256=told["submission_sha256"],
        n_scored=_n_scored(root, members),
        public=_read_public(path),
        uploads=_read_uploads(path),
    )


def _n_scored(root: Path, members: Sequence[tuple[str, float]]) -> int | None:
    """Images that the members are scored on, from the record of the first."""
    try:
        return int(json.loads((root / "oof" / members[0][0] / "run.json").read_bytes())["n_scored"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _read_public(path: Path) -> PublicScore | None:
    def build(told: Any) -> PublicScore:
        if told["images"] is not None and not (isinstance(told["images"], int) and told["images"] > 0):
            raise ValueError(f"`images` must be a number above 0, but is {told['images']!r}")
        return PublicScore(float(told["score"]), told["images"], told["source"], str(told["when"]))

    return _beside(path / _PUBLIC, build, "take it back with git, or delete it and record the score again")


def _read_uploads(path: Path) -> tuple[Upload, ...]:
    def build(told: Any) -> tuple[Upload, ...]:
        uploads = tuple(Upload(**upload) for upload in told["uploads"])
        for upload in uploads:
            datetime.fromisoformat(upload.when)  # or it cannot be counted by day
        return uploads

    return _beside(path / _UPLOADS, build, "take it back with git: it tells what was uploaded, and when") or ()


def _beside(file: Path, build: Callable[[Any], T], fix: str) -> T | None:
    """A record beside `blend.json`; None where there is none."""
    if not file.exists():
        return None
    try:
        return build(json.loads(file.read_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError([Fault(f"{file.parent.name}/{file.name}", f"cannot be read ({error})", fix)]) from None


def _latest(submissions: Sequence[Submission]) -> Submission | None:
    """The latest; of those that were written together the one with the best estimate."""
    return max(submissions, key=lambda one: (one.when, METRICS[one.metric].sign * one.score), default=None)


def _newest(
    copy: Path, submissions: Sequence[Submission], competition: str, otherwise: Submission | None
) -> Submission | None:
    """The submission whose description is copied; `otherwise` where there is no copy, or one of another competition.

    None where the copy is of this one, but its folder is left out or gone: no other may stand in for it unsaid.
    """
    if copy.exists():
        described = copy.read_bytes()
        # The same blend again keeps its folder, so that the newest need not be the latest.
        for submission in submissions:
            if (submission.path / _BLEND).read_bytes() == described:
                return submission
        try:
            if json.loads(described)["competition"] == competition:
                return None
        except (ValueError, KeyError, TypeError):
            return None
    return otherwise


def parse_score(text: str, metric: Metric) -> float:
    """Read a public score.

    Args:
        text: As the user gave it.
        metric: What it is a score by.

    Raises:
        FoldwiseError: If it is no number, or not one that the metric can give.
    """
    what = f"SCORE={text}: is no score by {metric.name}"
    most = 1.0 if metric.greater_is_better else float("inf")
    try:
        score = float(text)
    except ValueError:
        raise FoldwiseError(f"{what}, but no number\n  fix: give it as Kaggle shows it, e.g. SCORE=0.64") from None
    if isfinite(score) and 0 <= score <= most:
        return score
    allowed = "0 to 1" if most == 1 else "0 or more"
    percent = f"; {score:g} % is SCORE={score / 100:g}" if 1 < score <= 100 and most == 1 else ""
    raise FoldwiseError(f"{what}, which is {allowed}\n  fix: give it as Kaggle shows it{percent}")


def parse_images(text: str, total: int) -> int:
    """Read how many of the test images a public score is on.

    Args:
        text: A number such as `90`, or a share such as `30%`, as Kaggle's leaderboard page tells it.
        total: Test images.

    Raises:
        FoldwiseError: If it is neither, or not from 1 to `total`.
    """
    try:
        images = round(float(text[:-1]) / 100 * total) if text.endswith("%") else int(text)
    except (ValueError, OverflowError):
        images = 0
    if not 1 <= images <= total:
        what = f"IMAGES={text}: must be a number from 1 to {total}, or a share of them"
        raise FoldwiseError(f"{what}\n  fix: e.g. IMAGES=30%, as the leaderboard's page tells it, or leave it out")
    return images


def record_score(
    submission: Submission, score: float, *, images: int | None, source: Source, now: datetime
) -> list[str]:
    """Write a public score beside a submission's `blend.json`.

    Args:
        submission: What was scored.
        score: Its public score, as `parse_score` gives it.
        images: How many images it is on; None where nobody knows, or for what was said before.
        source: Who told.
        now: With a time zone.

    Returns:
        Lines for the user: what was recorded, what that replaces, and whether the score can be on all test images.
    """
    before = submission.public
    images = before.images if images is None and before is not None else images
    public = PublicScore(score, images, source, now.astimezone(UTC).isoformat(timespec="microseconds"))
    record = {"schema_version": SCHEMA_VERSION, "submission_sha256": submission.sha256, **asdict(public)}
    atomic_write(submission.path / _PUBLIC, pretty_json(record))
    line = f"recorded  public score {score:.4f} of {submission.name}, in its {_PUBLIC}"
    if before is not None:
        line += f"; it was {before.score:.4f}, recorded {before.when[:10]} by {before.source}"
    lines = [line]
    if submission.metric == "accuracy" and images is None and not _is_share(score, submission.images):
        what = f"note: {score} is no share of {submission.images} images, so that it is on fewer"
        lines.append(f"{what}; say on how many, e.g. IMAGES=30%")
    return lines


def record_upload(submission: Submission, upload: Upload) -> None:
    """Add an upload to those of a submission."""
    uploads = [asdict(told) for told in (*_read_uploads(submission.path), upload)]
    record = {"schema_version": SCHEMA_VERSION, "submission_sha256": submission.sha256, "uploads": uploads}
    atomic_write(submission.path / _UPLOADS, pretty_json(record))


def _is_share(score: float, images: int) -> bool:
    """Whether some number of right answers of `images` rounds to `score`."""
    digits = len(repr(score).partition(".")[2])
    near = round(score * images)
    return any(round(right / images, digits) == score for right in (near - 1, near, near + 1))


def history_lines(history: History) -> list[str]:
    """The history as a table of two lines a submission, the latest first, and what public scores say of estimates."""
    left_out = [f"left out: {line}" for line in history.left_out]
    if not history.submissions:
        return [
            *left_out,
            f"there is no submission of `{history.competition}` yet: make submit COMP={history.competition}",
        ]
    rows = [_cells(submission, history) for submission in history.submissions]
    header = ["submission", "estimate", "expect", "public", "z", "uploaded"]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    metrics = ", ".join(dict.fromkeys(submission.metric for submission in history.submissions))
    legend = "* is the newest"
    if history.newest_strict is not None and history.newest_strict is not history.newest:
        legend += f", s that of {OWN_TRACK}"
    lines = [*left_out, f"submissions of {history.competition} by {metrics}, the latest first; {legend}", ""]
    for submission, cells in zip((None, *history.submissions), (header, *rows), strict=True):
        lines.append(f"{_star(submission, history)} {'  '.join(map(str.ljust, cells, widths))}".rstrip())
        if submission is not None:
            marks = f"; marked {', '.join(submission.marks)}" if submission.marks else ""
            lines.append(f"    {submission.blended}; {submission.track}{marks}")
    if history.newest_strict is None and any(one.track == OWN_TRACK for one in history.submissions):
        lines += [
            "",
            f"the newest of {OWN_TRACK} is not what was written, or its folder is gone: take it back with git, "
            f"or make submit COMP={history.competition} TRACK=strict",
        ]
    return [*lines, "", *_drift_lines(history)]


def _star(submission: Submission | None, history: History) -> str:
    if submission is None:
        return " "
    return "*" if submission is history.newest else "s" if submission is history.newest_strict else " "


def _cells(submission: Submission, history: History) -> list[str]:
    public, error, z = submission.public, submission.public_error, submission.z
    expect = "-"
    if submission.expected is not None:
        expect = "{} +- {} of {}".format(*submission.expected, submission.images)
    told = "-"
    if public is not None:
        spread = "" if error is None else f" +- {error:.4f}"
        told = f"{public.score:.4f}{spread} on {public.images or f'{submission.images}?'}"
    # The same bytes in another folder are uploaded too.
    uploads = [upload for other in history.submissions if other.sha256 == submission.sha256 for upload in other.uploads]
    latest = max(uploads, key=lambda upload: upload.when, default=None)
    return [
        submission.name,
        f"{submission.score:.4f} +- {submission.standard_error:.4f}",
        expect,
        told,
        "-" if z is None else f"{z:+.1f}{'!' if abs(z) > Z95 else ''}",
        "no" if latest is None else f"{latest.when[:10]} to {latest.kaggle}",
    ]


def _drift_lines(history: History) -> list[str]:
    """What public scores say of the estimates, in words."""
    scored = [submission for submission in history.submissions if submission.public is not None]
    if not scored:
        call = f"make submit COMP={history.competition} SCORE=<score>"
        return [f"no public score is recorded: {call}, and OF=<submission> for an older one"]
    lines = []
    if any(submission.public and submission.public.images is None for submission in scored):
        lines.append("?: nobody said how many images it is on; all are assumed. IMAGES=<n, or 30%> with SCORE= says it")
    if untold := [submission.name for submission in scored if submission.z is None]:
        lines.append(f"no z-score: the spread of a public score by {scored[0].metric} is not known ({untold[0]})")
    drift = history.drift
    if drift is None:
        return lines
    noun = "public score" if drift.scored == 1 else "public scores"
    shown = f"z {drift.mean_z:+.1f} +- 1"
    if drift.scored > 1:
        shown = f"mean {shown} at most: as all are on the same images, they may be little more than one"
    lines += [
        f"of {drift.scored} {noun}, {drift.below} below and {drift.above} above the 95% interval around the estimate",
        shown,
    ]
    if not drift.apart:
        lines.append("public scores and estimates agree, as far as these images can tell")
        return lines
    if drift.mean_z < 0:
        lines += [
            "WARNING: public scores are worse than the estimates. That may mean",
            "  a leak        labels that reach the models of their own fold flatter every out-of-fold score",
            "  duplicates    near-duplicates lie in different folds, while the test images have none here",
            "  a shift       the test images differ from the labelled ones",
            "  luck          at most 1 time in 20 where nothing is wrong",
        ]
        if drift.optimistic:
            lines.append("  optimism      an estimate marked `optimistic` is too good by itself")
    else:
        lines += [
            "WARNING: public scores are better than the estimates. That may mean",
            "  a leak        test images, or near-duplicates of them, were trained on, e.g. in external data",
            "  the blend     all folds' models together are better than each on its fold: real, but small",
            "  a shift       the public test images are easier than the labelled ones",
            "  luck          at most 1 time in 20 where nothing is wrong",
        ]
    lines.append(f"  fix: make drift COMP={history.competition}; trust the estimates again once the cause is known")
    return lines


def history_json(history: History) -> dict[str, Any]:
    """The history as plain JSON types; figures are not rounded, times are those of the files."""
    drift = history.drift
    return {
        "schema_version": SCHEMA_VERSION,
        "competition": history.competition,
        "newest": history.newest.name if history.newest else None,
        "newest_strict": history.newest_strict.name if history.newest_strict else None,
        "submissions": [
            {
                "name": submission.name,
                "when": submission.when.isoformat(),
                "metric": submission.metric,
                "method": submission.method,
                "members": [{"run": run, "weight": weight} for run, weight in submission.members],
                "estimate": {
                    "score": submission.score,
                    "standard_error": submission.standard_error,
                    "interval": list(submission.interval) if submission.interval else None,
                    "n_scored": submission.n_scored,
                },
                "expected_right": submission.expected[0] if submission.expected else None,
                "expected_plus_minus": submission.expected[1] if submission.expected else None,
                "images": submission.images,
                "public": asdict(submission.public) if submission.public else None,
                "public_standard_error": submission.public_error,
                "z": submission.z,
                "track": submission.track,
                "marks": list(submission.marks),
                "uploads": [asdict(upload) for upload in submission.uploads],
                "submission_sha256": submission.sha256,
            }
            for submission in history.submissions
        ],
        "drift": asdict(drift) | {"apart": drift.apart} if drift else None,
        "left_out": list(history.left_out),
    }
