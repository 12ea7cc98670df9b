"""The submissions' history: what is read, which one is the newest, and what public scores say of the estimates.

Each refusal has its message here; z-scores are computed again from the files.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldwise.errors import FoldwiseError, RecordError
from foldwise.metrics import METRICS
from foldwise.records.history import (
    BEST_COPY,
    Drift,
    Upload,
    history_json,
    history_lines,
    parse_images,
    parse_score,
    read_history,
    record_score,
    record_upload,
)
from foldwise.records.store import list_runs
from foldwise.records.submission import blend_tracks, write_submissions

NOW = datetime(2025, 3, 6, 12, tzinfo=UTC)


def put(root, *, day=1, score=0.5, se=0.01, images=300, seed=0, folder="submissions", **changes):
    """A submission as `write_submission` leaves it, its blend.json with the keys that have always been there."""
    labels = np.random.default_rng([seed, day]).choice(["happy", "sad"], images)
    content = "id,label\n" + "".join(f"{index},{label}\n" for index, label in enumerate(labels))
    digest = hashlib.sha256(content.encode()).hexdigest()
    told = {
        "competition": "toy",
        "metric": "accuracy",
        "method": "caruana",
        "members": [{"run": "a", "weight": 0.75}, {"run": "b", "weight": 0.25}],
        "estimate": {"score": score, "standard_error": se, "interval": [score - 2 * se, score + 2 * se]},
        "expectation": {"right": round(score * images), "plus_minus": 18},
        "submission_sha256": digest,
        "marks": [],
        "external": [],
    } | changes
    path = root / folder / f"202503{day:02d}-120000-{digest[:8]}"
    path.mkdir(parents=True)
    for place in (path, path.parent):
        (place / "submission.csv").write_text(content)
        (place / "blend.json").write_text(json.dumps(told))
    return path


def record(root, score, of=None, images=None, now=NOW):
    history = read_history(root, "toy")
    return record_score(history.find(of), score, images=images, source="user", now=now)


def test_what_write_submission_leaves_is_read_back(project):
    project.keep("run0", skill=1, info={"marks": ["external"], "external": ["fer2013"]})
    project.keep("run1", skill=3, salt=1, info={"marks": ["optimistic"]})
    tracks = blend_tracks(
        list_runs(project.root, "toy")[0], metric=METRICS["accuracy"], groups=project.groups, named=True
    )
    written = write_submissions(
        project.root / "submissions",
        tracks,
        expected_ids=project.test_ids.tolist(),
        id_column="id",
        label_column="label",
        now=datetime(2025, 3, 4, 15, 6, 7),
    )
    path, blended = written[BEST_COPY], tracks.best
    (submission,) = read_history(project.root, "toy").submissions
    assert (submission.path, submission.when) == (path, datetime(2025, 3, 4, 15, 6, 7))
    assert submission.members == tuple((member.run.name, member.weight) for member in blended.members)
    assert (submission.score, submission.standard_error) == (blended.score, blended.standard_error)
    assert (submission.interval, submission.expected) == (blended.interval, blended.expected_right(12))
    assert (submission.images, submission.n_scored) == (12, 60)
    assert (submission.metric, list(submission.marks)) == ("accuracy", blended.marks)
    assert submission.track == ("with external data" if blended.external else "competition data only")
    assert (submission.public, submission.uploads) == (None, ())


def test_the_table(tmp_path):
    put(tmp_path, day=1, score=0.46, marks=["optimistic"], external=["fer2013"])
    path = put(tmp_path, day=2, score=0.48, method="single", members=[{"run": "vit", "weight": 1.0}])
    record(tmp_path, 0.45, images=90)
    record_upload(read_history(tmp_path, "toy").find(), Upload("faces", "2025-03-05T01:02:03+00:00", 7, "m", "ok"))
    names = [submission.name for submission in read_history(tmp_path, "toy").submissions]
    assert history_lines(read_history(tmp_path, "toy")) == [
        "submissions of toy by accuracy, the latest first; * is the newest",
        "",
        "  submission                estimate          expect            public                  z     uploaded",
        f"* {path.name}  0.4800 +- 0.0100  144 +- 18 of 300  0.4500 +- 0.0527 on 90  -0.6  2025-03-05 to faces",
        "    single of vit; competition data only",
        f"  {names[1]}  0.4600 +- 0.0100  138 +- 18 of 300  -                       -     no",
        "    caruana of a 0.75, b 0.25; with external data; marked optimistic",
        "",
        "of 1 public score, 0 below and 0 above the 95% interval around the estimate",
        "z -0.6 +- 1",
        "public scores and estimates agree, as far as these images can tell",
    ]


def test_an_empty_history_says_what_to_do(tmp_path):
    assert history_lines(read_history(tmp_path, "toy")) == ["there is no submission of `toy` yet: make submit COMP=toy"]
    with pytest.raises(FoldwiseError) as error:
        read_history(tmp_path, "toy").find()
    assert str(error.value) == "there is no submission of `toy`\n  fix: make submit COMP=toy"


def test_many_members_are_counted(tmp_path):
    put(tmp_path, members=[{"run": f"r{index}", "weight": 1 / 6} for index in range(6)])
    assert read_history(tmp_path, "toy").submissions[0].blended == (
        "caruana of r0 0.17, r1 0.17, r2 0.17, r3 0.17, 2 more"
    )


def test_keys_that_a_newer_or_older_description_has_or_lacks_do_no_harm(tmp_path):
    path = put(tmp_path, calibration={"x": 1})
    told = json.loads((path / "blend.json").read_text())
    for name in ("marks", "external", "expectation"):
        del told[name]
    del told["estimate"]["interval"]
    (path / "blend.json").write_text(json.dumps(told))
    history = read_history(tmp_path, "toy")
    assert (history.submissions[0].expected, history.submissions[0].marks) == (None, ())
    assert any(f"{path.name}  0.5000 +- 0.0100  -" in line for line in history_lines(history))


def test_no_other_stands_in_for_a_newest_that_was_changed(tmp_path):
    older, newest = put(tmp_path, day=1), put(tmp_path, day=2)
    (newest / "submission.csv").write_text("id,label\n")
    with pytest.raises(FoldwiseError) as error:
        record(tmp_path, 0.5)
    first, *_, fix = str(error.value).splitlines()
    assert first == "the newest submission of `toy` is not what was written, or its folder is gone"
    assert fix == "  fix: take it back with git, make submit again, or name one by OF="
    assert f"left out: {newest.name}" in str(error.value)
    record(tmp_path, 0.5, of=older.name)
    assert not (newest / "public.json").exists()


def test_the_newest_is_the_one_that_is_copied_not_the_latest(tmp_path):
    old = put(tmp_path, day=1)
    late = put(tmp_path, day=2, score=0.6)
    assert read_history(tmp_path, "toy").find().path == late
    (tmp_path / "submissions" / "blend.json").write_bytes((old / "blend.json").read_bytes())
    history = read_history(tmp_path, "toy")
    assert history.find().path == history.find("newest").path == old
    assert [submission.path for submission in history.submissions] == [late, old]
    other = put(tmp_path, day=3, competition="other")
    history = read_history(tmp_path, "toy")
    assert history.find().path == late, "the copy is of another competition"
    assert read_history(tmp_path, "other").find().path == other


def test_the_newest_strict_one_is_the_one_that_is_copied(tmp_path):
    old, late = put(tmp_path, day=1), put(tmp_path, day=2)
    history = read_history(tmp_path, "toy")
    assert history.newest_strict is history.newest, "without a copy it is the newest, which is strict"
    put(tmp_path, day=3, external=["fer2013"])
    history = read_history(tmp_path, "toy")
    assert (history.find("strict").path, history.find("best").name[:8]) == (late, "20250303")
    assert history_json(history)["newest_strict"] == late.name
    copy = tmp_path / "submissions" / "strict.json"
    copy.write_bytes((old / "blend.json").read_bytes())
    assert read_history(tmp_path, "toy").find("strict").path == old
    copy.write_text('{"competition": "other"}')
    assert read_history(tmp_path, "toy").find("strict").path == late
    copy.write_text('{"competition": "toy"}')
    with pytest.raises(FoldwiseError) as error:
        read_history(tmp_path, "toy").find("strict")
    assert str(error.value) == (
        "no submission of `toy` is of competition data only, or the newest is not what was written\n"
        "  fix: take it back with git, make submit COMP=toy TRACK=strict, or name one by OF="
    )
    told = (
        "the newest of competition data only is not what was written, or its folder is gone: take it back with git, "
        "or make submit COMP=toy TRACK=strict"
    )
    assert told in history_lines(read_history(tmp_path, "toy"))
    copy.unlink()
    assert told not in history_lines(read_history(tmp_path, "toy"))


def test_no_external_one_is_the_newest_strict_one(tmp_path):
    put(tmp_path, external=["fer2013"])
    history = read_history(tmp_path, "toy")
    assert history.newest_strict is None
    with pytest.raises(FoldwiseError, match="no submission of `toy` is of competition data only"):
        history.find("strict")
    assert not any(line.startswith(("s ", "the newest of")) for line in history_lines(history))


@pytest.mark.parametrize(("metric", "better"), [("accuracy", 0.6), ("log_loss", 0.4)])
def test_of_two_written_at_once_the_better_is_the_newest_without_a_copy(tmp_path, metric, better):
    for seed, score in enumerate((0.4, 0.6, 0.4)):
        put(tmp_path, seed=seed, score=score, metric=metric)
    (tmp_path / "submissions" / "blend.json").unlink()
    assert read_history(tmp_path, "toy").find().score == better


def test_the_demos_submissions_lie_apart(tmp_path):
    path = put(tmp_path, folder="submissions/demo", competition="demo")
    assert read_history(tmp_path, "demo").find().path == path


def test_what_cannot_be_read_is_left_out_and_named(tmp_path):
    good = put(tmp_path, day=1)
    for day, spoil in enumerate(
        (
            lambda path: (path / "blend.json").write_text("{"),
            lambda path: (path / "submission.csv").write_text("id,label\n1,sad\n"),
            lambda path: (path / "submission.csv").unlink(),
            lambda path: (path / "blend.json").write_text('{"competition": "toy", "metric": "accuracy"}'),
            lambda path: (path / "blend.json").write_text('{"competition": "toy", "metric": "kappa"}'),
        ),
        start=2,
    ):
        spoil(put(tmp_path, day=day))
    (good.parent / "mine").mkdir()
    (good.parent / "mine" / "blend.json").write_text("{")
    history = read_history(tmp_path, "toy")
    assert [submission.path for submission in history.submissions] == [good]
    reasons = [line.partition(": ")[2] for line in history.left_out]
    assert reasons[0] == "the metric 'kappa' is unknown"
    assert reasons[1] == "blend.json lacks the key 'submission_sha256'"
    assert "No such file" in reasons[2]
    assert reasons[3] == "submission.csv is not the file that blend.json describes"
    assert reasons[4].startswith("blend.json is not readable as JSON (")
    assert len(reasons) == 5
    assert history_lines(history)[0] == f"left out: {history.left_out[0]}"
    name = history.left_out[3].partition(":")[0]
    with pytest.raises(
        FoldwiseError, match=r"is not the file that blend\.json describes\n  fix: take it back with git"
    ):
        history.find(name)


@pytest.mark.parametrize("name", ["public.json", "uploads.json"])
def test_a_damaged_record_is_a_fault_and_not_silently_none(tmp_path, name):
    path = put(tmp_path)
    (path / name).write_text('{"schema_version": 1}')
    with pytest.raises(RecordError) as error:
        read_history(tmp_path, "toy")
    assert str(error.value).startswith(f"{path.name}/{name}: cannot be read (")
    assert "fix: take it back with git" in str(error.value)


def test_a_submission_is_found_by_folder_or_hash(tmp_path):
    first, second = put(tmp_path, day=1), put(tmp_path, day=2)
    history = read_history(tmp_path, "toy")
    for of in (first.name, str(first), f"submissions/{first.name}/", first.name[:10], first.name[-8:], "20250301"):
        assert history.find(of).path == first
    assert history.find(history.find(second.name).sha256[:5].upper()).path == second
    with pytest.raises(FoldwiseError) as error:
        history.find("202503")
    assert str(error.value) == (
        f"OF=202503 may be any of 2 submissions\n  fix: give more of its name: {second.name}, {first.name}"
    )
    with pytest.raises(FoldwiseError) as error:
        history.find("x")
    assert str(error.value) == (
        f"OF=x: there is no such submission of `toy`\n  fix: one of {second.name}, {first.name}"
    )


def test_a_score_is_recorded_beside_a_description_that_stays_to_the_byte(tmp_path):
    path = put(tmp_path)
    before = (path / "blend.json").read_bytes()
    assert record(tmp_path, 0.64) == [f"recorded  public score 0.6400 of {path.name}, in its public.json"]
    assert (path / "blend.json").read_bytes() == before
    told = json.loads((path / "public.json").read_text())
    assert told == {
        "schema_version": 1,
        "submission_sha256": hashlib.sha256((path / "submission.csv").read_bytes()).hexdigest(),
        "score": 0.64,
        "images": None,
        "source": "user",
        "when": "2025-03-06T12:00:00.000000+00:00",
    }
    assert record(tmp_path, 0.65, images=90) == [
        f"recorded  public score 0.6500 of {path.name}, in its public.json; it was 0.6400, recorded 2025-03-06 by user"
    ]
    record(tmp_path, 0.66)
    public = read_history(tmp_path, "toy").find().public
    assert (public.score, public.images) == (0.66, 90), "what was said before of the images stays"


def test_a_score_that_all_images_cannot_give_is_noted(tmp_path):
    path = put(tmp_path)
    assert record(tmp_path, 0.6423)[1:] == [
        "note: 0.6423 is no share of 300 images, so that it is on fewer; say on how many, e.g. IMAGES=30%"
    ]
    assert record(tmp_path, 0.6423, images=90)[1:] == []
    (path / "public.json").unlink()
    assert record(tmp_path, 0.64333)[1:] == []


@given(right=st.integers(0, 300), digits=st.integers(2, 6))
def test_no_true_share_is_noted(tmp_path_factory, right, digits):
    root = tmp_path_factory.mktemp("root")
    put(root)
    assert len(record(root, round(right / 300, digits))) == 1


def test_a_public_score_belongs_to_the_bytes_and_its_images_to_the_competition(tmp_path):
    old = put(tmp_path, day=1)
    new = put(tmp_path, day=2, score=0.6)
    # The same bytes, described anew.
    (new / "submission.csv").write_bytes((old / "submission.csv").read_bytes())
    told = json.loads((new / "blend.json").read_text()) | {
        "submission_sha256": read_history(tmp_path, "toy").find(old.name).sha256
    }
    (new / "blend.json").write_text(json.dumps(told))
    other = put(tmp_path, day=3)
    record(tmp_path, 0.55, of=old.name)
    record(tmp_path, 0.51, of=other.name, images=100, now=NOW + timedelta(hours=1))
    history = read_history(tmp_path, "toy")
    assert [submission.public.score for submission in history.submissions] == [0.51, 0.55, 0.55]
    assert [submission.public.images for submission in history.submissions] == [100, 100, 100]
    assert history.drift.scored == 2, "the same bytes count once"
    assert history.drift.mean_z == pytest.approx((history.find(other.name).z + history.find(new.name).z) / 2)
    record(tmp_path, 0.54, of=new.name, now=NOW + timedelta(hours=2))
    assert read_history(tmp_path, "toy").find(old.name).public.score == 0.54, "what was recorded last"


@pytest.mark.parametrize(
    ("text", "metric", "message"),
    [
        (
            "64",
            "accuracy",
            "SCORE=64: is no score by accuracy, which is 0 to 1\n  fix: give it as Kaggle shows it; 64 % is SCORE=0.64",
        ),
        ("-0.1", "macro_f1", "SCORE=-0.1: is no score by macro_f1, which is 0 to 1\n  fix: give it as Kaggle shows it"),
        ("nan", "accuracy", "SCORE=nan: is no score by accuracy, which is 0 to 1\n  fix: give it as Kaggle shows it"),
        ("-1", "log_loss", "SCORE=-1: is no score by log_loss, which is 0 or more\n  fix: give it as Kaggle shows it"),
        (
            "inf",
            "log_loss",
            "SCORE=inf: is no score by log_loss, which is 0 or more\n  fix: give it as Kaggle shows it",
        ),
        (
            "0,64",
            "accuracy",
            "SCORE=0,64: is no score by accuracy, but no number\n  fix: give it as Kaggle shows it, e.g. SCORE=0.64",
        ),
    ],
)
def test_a_score_out_of_range_is_refused(text, metric, message):
    with pytest.raises(FoldwiseError) as error:
        parse_score(text, METRICS[metric])
    assert str(error.value) == message


def test_scores_and_images_in_range_are_taken():
    assert [parse_score(text, METRICS["accuracy"]) for text in ("0", "0.64", "1")] == [0, 0.64, 1]
    assert parse_score("64", METRICS["log_loss"]) == 64
    assert [parse_images(text, 300) for text in ("1", "300", "30%", "33.3%", "100%")] == [1, 300, 90, 100, 300]
    for text in ("0", "301", "0%", "101%", "x", "%", "nan%", "inf%", "1.5"):
        with pytest.raises(FoldwiseError) as error:
            parse_images(text, 300)
        assert str(error.value) == (
            f"IMAGES={text}: must be a number from 1 to 300, or a share of them\n"
            "  fix: e.g. IMAGES=30%, as the leaderboard's page tells it, or leave it out"
        )


def test_z_counts_both_errors(tmp_path):
    put(tmp_path, score=0.5, se=0.03)
    record(tmp_path, 0.4, images=100)
    submission = read_history(tmp_path, "toy").find()
    assert submission.public_error == pytest.approx((0.5 * 0.5 / 100) ** 0.5)
    assert submission.z == pytest.approx(-0.1 / (0.03**2 + 0.05**2) ** 0.5)


def test_z_of_other_metrics_goes_by_the_estimates_own_spread(tmp_path):
    put(tmp_path, metric="log_loss", score=1.2, se=0.02)
    record(tmp_path, 1.3, images=100)
    history = read_history(tmp_path, "toy")
    assert (history.find().z, history.drift) == (None, None)
    assert any(line.startswith("no z-score: ") for line in history_lines(history))
    (tmp_path / "oof" / "a").mkdir(parents=True)
    (tmp_path / "oof" / "a" / "run.json").write_text('{"n_scored": 2500}')
    submission = read_history(tmp_path, "toy").find()
    assert submission.public_error == pytest.approx(0.02 * 5)
    assert submission.z == pytest.approx(-0.1 / (0.02**2 + 0.1**2) ** 0.5), "a higher loss is worse"


def test_drift_is_warned_of_by_the_mean_alone(tmp_path):
    for day, public in enumerate((0.44, 0.45, 0.5), start=1):
        path = put(tmp_path, day=day, score=0.52, se=0.01, marks=["optimistic"] if day == 1 else [])
        record(tmp_path, public, of=path.name, now=NOW + timedelta(hours=day))
    history = read_history(tmp_path, "toy")
    z = np.array([submission.z for submission in history.submissions])
    assert history.drift.mean_z == pytest.approx(z.mean())
    assert (history.drift.scored, history.drift.below, history.drift.above) == (3, int((z < -1.96).sum()), 0)
    assert history.drift.below == 2
    assert not history.drift.apart
    lines = history_lines(history)
    assert "of 3 public scores, 2 below and 0 above the 95% interval around the estimate" in lines
    told = f"mean z {z.mean():+.1f} +- 1 at most: as all are on the same images, they may be little more than one"
    assert told in lines
    assert not any("WARNING" in line for line in lines)
    record(tmp_path, 0.44, of=history.submissions[0].name, now=NOW + timedelta(hours=9))
    lines = history_lines(read_history(tmp_path, "toy"))
    start = lines.index("WARNING: public scores are worse than the estimates. That may mean")
    assert [line.split("  ")[1].strip() for line in lines[start + 1 :]] == [
        "a leak", "duplicates", "a shift", "luck", "optimism", lines[-1].strip(),
    ]  # fmt: skip
    assert lines[-1].startswith("  fix: make drift COMP=toy")
    assert "?: nobody said how many images it is on; all are assumed. IMAGES=<n, or 30%> with SCORE= says it" in lines


def test_too_good_public_scores_are_warned_of_too(tmp_path):
    put(tmp_path, score=0.5)
    record(tmp_path, 0.7, images=300)
    lines = history_lines(read_history(tmp_path, "toy"))
    assert "WARNING: public scores are better than the estimates. That may mean" in lines
    assert any("+6.5!" in line for line in lines)


def test_the_warning_is_rare_where_nothing_is_wrong_however_alike_the_submissions_are():
    """The rule's promise, by simulation: shared test images and shared members, no drift."""
    rng = np.random.default_rng(0)
    alarms = []
    for alike in (0.0, 0.7, 1.0):
        z = (alike**0.5) * rng.normal(size=(4000, 1)) + ((1 - alike) ** 0.5) * rng.normal(size=(4000, 6))
        alarms.append(np.mean([Drift(6, 0, 0, mean, optimistic=False).apart for mean in z.mean(axis=1).tolist()]))
    assert alarms[0] < alarms[1] < alarms[2] < 0.06


def test_json_says_all_of_it(tmp_path):
    path = put(tmp_path)
    record(tmp_path, 0.45, images=90)
    record_upload(read_history(tmp_path, "toy").find(), Upload("faces", "2025-03-05T01:02:03+00:00", 7, "m", "ok"))
    told = json.loads(json.dumps(history_json(read_history(tmp_path, "toy"))))
    assert (told["newest"], told["competition"], told["left_out"]) == (path.name, "toy", [])
    (submission,) = told["submissions"]
    assert submission["public"]["score"] == 0.45
    assert submission["estimate"]["standard_error"] == 0.01
    assert submission["uploads"][0]["reference"] == 7
    assert told["drift"]["scored"] == 1
    assert told["drift"]["apart"] is False
    assert history_json(read_history(tmp_path, "none"))["newest"] is None
