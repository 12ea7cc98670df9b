"""Uploading a kept submission to Kaggle through its official client, and fetching what it scored there.

What would be refused, wasted or sent twice is refused here first; what Kaggle refuses is told with its words and mend.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from foldwise.data.competition import CompetitionSpec
from foldwise.data.download import SIGN_IN, SLUG, KaggleError, kaggle_client, refusal
from foldwise.data.folds import natural_order
from foldwise.errors import Fault, FoldwiseError, RecordError
from foldwise.files import sha256_bytes
from foldwise.metrics import METRICS
from foldwise.records.history import History, Submission, Upload, parse_score, record_score, record_upload
from foldwise.records.store import read_probs
from foldwise.records.submission import check_submission

# The fewest that Kaggle's competitions usually allow.
PER_DAY = 2
# Submissions that are looked through for a reference, the latest first.
_LISTED = 100


def upload(
    root: Path,
    spec: CompetitionSpec,
    history: History,
    submission: Submission,
    slug: str,
    *,
    message: str | None = None,
    per_day: int = PER_DAY,
    force: bool = False,
    now: datetime,
) -> list[str]:
    """Upload a submission to a Kaggle competition, and note it in the submission's folder.

    Args:
        root: The project's root.
        spec: The competition.
        history: Its submissions.
        submission: One of them.
        slug: The competition's name at Kaggle: the end of its address.
        message: What Kaggle shows beside it; None: members and estimate.
        per_day: Uploads that the competition allows a day; Kaggle's days begin at midnight UTC.
        force: Upload bytes again that were uploaded before.
        now: With a time zone.

    Returns:
        Lines for the user: Kaggle's answer, its reference, and how many uploads the day has left.

    Raises:
        RecordError: If the file is not the one that `blend.json` describes, or not what the competition asks for.
        KaggleError: If the day's uploads are used up, or Kaggle refuses or cannot be reached.
        FoldwiseError: If the slug is none, the same bytes were uploaded before, or the client is not installed.
    """
    check_slug(slug)
    _refuse_wrong_file(root, spec, submission)
    done = [(other, sent) for other in history.submissions for sent in other.uploads if sent.kaggle == slug]
    same = [(other, sent) for other, sent in done if other.sha256 == submission.sha256]
    if same and not force:
        other, sent = max(same, key=lambda pair: pair[1].when)
        what = f"KAGGLE={slug}: these very bytes were uploaded on {sent.when[:16].replace('T', ' ')} UTC"
        what += f" from {other.name} (reference {sent.reference})"
        fix = "they would score the same; FORCE=1 uploads them again and costs one of the day's uploads"
        raise FoldwiseError(f"{what}\n  fix: {fix}")
    left = _left_today(slug, [sent for _, sent in done], per_day, now)

    page = f"https://www.kaggle.com/competitions/{slug}"
    message = message or _message(submission)
    with _translated(slug, page), contextlib.redirect_stdout(io.StringIO()) as printed:
        api = kaggle_client(slug)
        answer = api.competition_submit(str(submission.file), message, slug, quiet=True)
        # Told in words alone, by an answer that is otherwise like any other.
        failed = answer.message == api.COMPETITION_SUBMIT_UPLOAD_FAILED_MESSAGE
    if failed:
        reason = (printed.getvalue().strip().splitlines() or ["no reason given"])[-1]
        fix = f"try again; or upload {submission.file.name} by hand at {page}/submissions"
        raise KaggleError(f"KAGGLE={slug}: Kaggle did not take the file ({reason})\n  fix: {fix}")
    when = now.astimezone(UTC).isoformat(timespec="seconds")
    record_upload(submission, Upload(slug, when, answer.ref or None, message, answer.message))
    return [
        f"uploaded     {submission.name} to {slug}: {answer.message or 'taken'}"
        + (f" (reference {answer.ref})" if answer.ref else ""),
        f"             said with it: {message}",
        f"             {left - 1} of {per_day} uploads are left today (UTC), as far as this project's records tell",
        f"next         once it is scored: make submit COMP={spec.name} SCORE=kaggle{_of(history, submission)}; "
        f"it stands at {page}",
    ]


def check_slug(slug: str) -> None:
    """Raise FoldwiseError unless this can be a competition's name at Kaggle."""
    match = SLUG.fullmatch(slug)
    if match is None or match["owner"]:
        fix = "give the end of its address, kaggle.com/competitions/<this>"
        raise FoldwiseError(f"KAGGLE={slug}: is not the name of a competition\n  fix: {fix}")


def fetch_score(history: History, submission: Submission, *, images: int | None, now: datetime) -> list[str]:
    """Ask Kaggle for the public score of an uploaded submission, and record it.

    Args:
        history: The submissions of the competition.
        submission: One of them.
        images: How many images the public score is on; None where nobody knows.
        now: With a time zone.

    Returns:
        Lines for the user, as of `record_score`.

    Raises:
        KaggleError: If there is no score yet, the submission failed at Kaggle, or Kaggle refuses or is not reached.
        FoldwiseError: If it was not uploaded from here, or the client is not installed.
    """
    sent = [
        told
        for other in history.submissions
        if other.sha256 == submission.sha256
        for told in other.uploads
        if told.reference is not None
    ]
    if not sent:
        fix = f"make submit COMP={history.competition} SCORE=<score>{_of(history, submission)}, as its page shows it"
        raise FoldwiseError(f"SCORE=kaggle: {submission.name} was not uploaded from here\n  fix: {fix}")
    latest = max(sent, key=lambda told: told.when)
    slug = latest.kaggle
    page = f"https://www.kaggle.com/competitions/{slug}"
    with _translated(slug, page), contextlib.redirect_stdout(io.StringIO()):
        listed = kaggle_client(slug).competition_submissions(slug, page_size=_LISTED)
    found = next((told for told in listed or [] if told is not None and told.ref == latest.reference), None)
    where = f"KAGGLE={slug}: reference {latest.reference}"
    if found is None:
        fix = f"look at {page}/submissions, and give its score by SCORE=<score>"
        raise KaggleError(f"{where} is not among the latest {_LISTED} submissions there\n  fix: {fix}")
    if found.error_description:
        raise KaggleError(f"{where} failed at Kaggle: {found.error_description}\n  fix: see {page}/submissions")
    if not found.public_score:
        raise KaggleError(f"{where} has no public score yet\n  fix: try again in a minute; or see {page}/submissions")
    score = parse_score(found.public_score, METRICS[submission.metric])
    return record_score(submission, score, images=images, source="kaggle", now=now)


def _of(history: History, submission: Submission) -> str:
    return "" if submission is history.newest else f" OF={submission.name}"


def _message(submission: Submission) -> str:
    estimate = f"{submission.metric} {submission.score:.4f} +- {submission.standard_error:.4f} expected"
    return f"{submission.blended}; {estimate} [{submission.sha256[:8]}]"


def _refuse_wrong_file(root: Path, spec: CompetitionSpec, submission: Submission) -> None:
    """Refuse a file that is not what `blend.json` describes, or not what the competition asks for."""
    where = f"{submission.name}/{submission.file.name}"
    content = submission.file.read_bytes()
    if sha256_bytes(content) != submission.sha256:
        raise RecordError([Fault(where, "is not the file that blend.json describes", "take it back with git")])
    faults = check_submission(
        content,
        where=where,
        expected_ids=spec.submission_ids or _test_ids(root, spec, submission),
        classes=spec.classes,
        id_column=spec.columns.id,
        label_column=spec.columns.label,
    )
    if faults:
        raise RecordError(faults)


def _test_ids(root: Path, spec: CompetitionSpec, submission: Submission) -> Sequence[str]:
    """The ids that a member predicts, in natural order: what must be there where the competition names no range."""
    for run, _ in submission.members:
        path = root / "oof" / run / "test.csv"
        if path.is_file():
            (ids,), _probs = read_probs(path, ("id",), spec.classes)
            return natural_order(ids.tolist())
    what = "the ids that it must hold are not known: neither `test_ids` is set, nor is there a test.csv of"
    raise RecordError(
        [
            Fault(
                submission.name,
                f"{what} {submission.blended}",
                f"set `test_ids` in inputs/{spec.name}/competition.yaml",
            )
        ]
    )


def _left_today(slug: str, done: Sequence[Upload], per_day: int, now: datetime) -> int:
    """How many uploads the day has left, at least one.

    Raises:
        KaggleError: If none is left.
    """
    today = now.astimezone(UTC).date()
    times = sorted(
        sent.when[11:16] for sent in done if datetime.fromisoformat(sent.when).astimezone(UTC).date() == today
    )
    if len(times) < per_day:
        return per_day - len(times)
    midnight = datetime(today.year, today.month, today.day, tzinfo=UTC) + timedelta(days=1)
    minutes = -((now - midnight) // timedelta(minutes=1))
    what = f"all {per_day} uploads of today are used up ({', '.join(times)} UTC)"
    fix = f"try again after {midnight:%Y-%m-%d %H:%M} UTC, in {minutes // 60} h {minutes % 60:02d} min"
    more = "; where more are allowed, set `submissions_per_day` in competition.yaml"
    raise KaggleError(f"KAGGLE={slug}: {what}\n  fix: {fix}{more}")


@contextmanager
def _translated(slug: str, page: str) -> Iterator[None]:
    """Turn what the client raises into what the user can mend, the server's own words included."""
    try:
        yield
    except FoldwiseError:
        raise
    except OSError as error:
        refused = refusal(error)
        if refused is None:
            raise
        status, words = refused
        if status is None:
            what = f"Kaggle cannot be reached, or went away\n  ({words})"
            fix = f"go online; whether anything arrived is told at {page}/submissions"
        elif status == 400:
            what = f"Kaggle does not take it (400): {words}"
            fix = f"if these words name a limit, wait for 00:00 UTC; else see what {page} asks of a file"
        elif status == 401:
            what, fix = f"Kaggle does not accept the token (401): {words}", SIGN_IN
        elif status == 403:
            what = f"Kaggle does not let you submit (403): {words}"
            fix = f"open {page}, accept the rules there (Join, or Rules), and see that it is still open"
        elif status == 404:
            what = f"Kaggle has no such competition (404): {words}"
            fix = "give the end of its address, kaggle.com/competitions/<this>"
        elif status == 429:
            what = f"Kaggle asks for fewer requests (429): {words}"
            fix = f"if these words name a daily limit, wait for 00:00 UTC; else some minutes; see {page}/submissions"
        else:
            what = f"Kaggle failed ({status}): {words}"
            fix = f"try again later; whether anything arrived is told at {page}/submissions"
        raise KaggleError(f"KAGGLE={slug}: {what}\n  fix: {fix}") from None
