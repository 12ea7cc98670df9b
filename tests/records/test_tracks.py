"""Two tracks: the best blend, and the best of competition data only; what is chosen, written, refused and told.

The gain between them is computed again from the members' files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foldwise.data.folds import read_folds
from foldwise.errors import FoldwiseError, RecordError
from foldwise.metrics import METRICS
from foldwise.records import submission as module
from foldwise.records.history import history_lines, read_history, track_of
from foldwise.records.store import Run, list_runs
from foldwise.records.submission import blend_tracks, tracks_lines, write_submissions, written_lines

NOW = datetime(2025, 3, 4, 15, 6, 7)
OWN, EXTERNAL = "competition data only", "with external data"
BEST, STRICT = ("submission.csv", "blend.json"), ("strict.csv", "strict.json")


SKILLS = {"a": 1, "b": 1.5, "x": 2.5}


def drawn(project, name, skill):
    """A run as `load_run` gives it, without its files."""
    units = [project.unit(fold, salt=ord(name), skill=skill) for fold in range(3)]
    hashes = {"folds": project.folds.sha256, "inputs": project.inputs_sha256}
    return Run(
        name=name,
        path=project.root / "oof" / name,
        info={"competition": "toy", "split": {"kind": "kfold"}, "hashes": hashes, "marks": [], "external": []},
        classes=project.context().classes,
        ids=np.concatenate([unit.val_ids for unit in units]),
        fold=np.repeat([unit.fold for unit in units], [len(unit.val_ids) for unit in units]),
        labels=np.concatenate([unit.val_labels for unit in units]),
        probs=np.concatenate([unit.val_probs for unit in units]).astype(np.float64),
        test_ids=units[0].test_ids,
        test_probs=np.mean([unit.test_probs for unit in units], axis=0),
    )


@pytest.fixture
def runs(project):
    """`a` and `b`, and `x`, which is better; all of competition data only."""
    return [drawn(project, name, skill) for name, skill in SKILLS.items()]


def with_external(runs, *names):
    """The same runs, of which some saw external data."""
    told = [{"source": "fer2013"}]
    return [replace(run, info=run.info | {"external": told if run.name in names else []}) for run in runs]


def blended(project, runs, metric="accuracy", **changes):
    return blend_tracks(runs, metric=METRICS[metric], groups=project.groups, **changes)


def write(project, tracks, root=None, now=NOW):
    return write_submissions(
        (root or project.root) / "submissions",
        tracks,
        expected_ids=project.test_ids.tolist(),
        id_column="id",
        label_column="label",
        now=now,
    )


def names(blend):
    return {member.run.name for member in blend.members}


def held_out_score(project, blend):
    """Accuracy of a blend's cross-fitted predictions, by the project's own labels."""
    labels = dict(zip(project.ids.tolist(), project.labels.tolist(), strict=True))
    return np.mean([labels[name] for name in blend.oof_ids.tolist()] == blend.oof_probs.argmax(axis=1))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_or_blend_is_external_by_its_data_or_its_mark():
    assert track_of({}) == track_of({"external": [], "marks": ["tuned"]}) == OWN
    assert track_of({"external": ["fer2013"]}) == track_of({"external": [], "marks": ["external"]}) == EXTERNAL


def test_the_better_track_is_the_best_and_the_strict_one_is_written_beside_it(project, runs):
    runs = with_external(runs, "x")
    tracks = blended(project, runs)
    assert "x" in names(tracks.best)
    assert names(tracks.strict) <= {"a", "b"}
    assert (tracks.best.considered, tracks.strict.considered) == (("a", "b", "x"), ("a", "b"))
    scores = [held_out_score(project, blend) for blend in (tracks.best, tracks.strict)]
    assert scores == pytest.approx([tracks.best.score, tracks.strict.score])
    assert tracks.gain.gain == pytest.approx(scores[0] - scores[1])
    assert tracks.gain.low < tracks.gain.gain < tracks.gain.high

    written = write(project, tracks)
    folder = project.root / "submissions"
    assert list(written) == [BEST, STRICT]
    for (submission, description), kept in written.items():
        assert (folder / submission).read_bytes() == (kept / "submission.csv").read_bytes()
        assert (folder / description).read_bytes() == (kept / "blend.json").read_bytes()
    assert json.loads((folder / "strict.json").read_text())["external"] == []
    assert json.loads((folder / "blend.json").read_text())["external"] == [{"source": "fer2013"}]
    history = read_history(project.root, "toy")
    assert (history.find().path, history.find("best").path) == (written[BEST], written[BEST])
    assert history.find("strict").path == written[STRICT]
    assert {one.path: one.track for one in history.submissions} == {written[BEST]: EXTERNAL, written[STRICT]: OWN}


def test_the_gain_is_paired_by_id(project, runs):
    """Predictions in another order of images give the same gain."""
    tracks = blended(project, with_external(runs, "x"))
    rows = np.random.default_rng(0).permutation(len(tracks.best.oof_ids))
    turned = replace(tracks.best, oof_ids=tracks.best.oof_ids[rows], oof_probs=tracks.best.oof_probs[rows])
    arguments = runs[0], METRICS["accuracy"], project.groups
    assert module._gain(turned, tracks.strict, *arguments) == tracks.gain


@pytest.mark.parametrize("metric", ["accuracy", "log_loss"])
def test_external_data_that_do_not_help_leave_the_strict_one_the_best(project, runs, metric):
    runs = with_external([drawn(project, "a", -3), *runs[1:]], "a")
    tracks = blended(project, runs, metric, methods=("mean",))
    assert (names(tracks.every), names(tracks.strict)) == ({"a", "b", "x"}, {"b", "x"})
    assert tracks.best is tracks.strict
    assert tracks.gain.gain <= 0, "equal ones are strict"
    written = write(project, tracks)
    assert written[BEST] == written[STRICT]
    every, gain = tracks.every, tracks.gain
    assert tracks_lines(tracks)[-2:] == [
        "track        competition data only",
        f"external     does not help: with it {every.score:.4f} +- {every.standard_error:.4f}, a gain of "
        f"{gain.gain:+.4f} +- {gain.standard_error:.4f}, paired, 95% interval {gain.low:+.4f} to {gain.high:+.4f}",
    ]


def test_a_blend_without_an_external_member_is_not_of_the_external_track(project, runs):
    tracks = blended(project, with_external(runs, "a"), methods=("best",))
    assert names(tracks.every) == {"x"}
    assert (tracks.best, tracks.gain) == (tracks.strict, None)
    assert tracks.best.considered == ("b", "x")
    assert tracks_lines(tracks)[-1] == (
        "external     does not help: in a blend of all 3 runs none with external data gets a weight"
    )


def test_where_all_is_competition_data_both_files_are_the_same(project, runs):
    tracks = blended(project, runs)
    assert (tracks.best, tracks.every, tracks.gain) == (tracks.strict, None, None)
    written = write(project, tracks)
    kept = written[BEST]
    files = contents(project.root / "submissions")
    assert set(files) == {*BEST, *STRICT, f"{kept.name}/submission.csv", f"{kept.name}/blend.json"}
    assert files["submission.csv"] == files["strict.csv"]
    assert files["blend.json"] == files["strict.json"]
    assert tracks_lines(tracks)[-1] == "track        competition data only"
    history = read_history(project.root, "toy")
    assert history.newest is history.newest_strict
    assert written_lines(written, project.root) == [
        f"written      submissions/submission.csv, blend.json; kept in submissions/{kept.name}",
        f"             submissions/strict.csv, strict.json; kept in submissions/{kept.name}",
    ]


def test_where_all_saw_external_data_the_strict_copy_stays_as_it_was(project, runs):
    write(project, blended(project, runs, track="strict"))
    before = contents(project.root / "submissions")
    tracks = blended(project, with_external(runs, "a", "b", "x"))
    assert tracks.strict is None
    assert list(write(project, tracks)) == [BEST]
    assert contents(project.root / "submissions").items() > before.items()


def test_one_track_alone(project, runs):
    runs = with_external(runs, "x")
    both = blended(project, runs)
    strict, best = blended(project, runs, track="strict"), blended(project, runs, track="best")
    assert list(write(project, strict)) == [STRICT]
    assert not (project.root / "submissions" / "submission.csv").exists()
    assert list(write(project, best)) == [BEST]
    before = contents(project.root / "submissions")
    write(project, both)
    assert contents(project.root / "submissions") == before, "the same blends as where both are made"


def test_named_runs_are_blended_as_they_are(project, runs):
    runs = with_external(runs, "a", "x")
    for track in (None, "best"):
        tracks = blended(project, runs, track=track, named=True, methods=("mean",))
        assert (tracks.best.considered, tracks.strict) == (("a", "b", "x"), None)
        assert list(tracks.written) == [BEST]
    assert blended(project, runs[1:2], track="strict", named=True).strict.considered == ("b",)


def test_what_cannot_be_strict_is_refused(project, runs):
    with pytest.raises(FoldwiseError) as error:
        blended(project, with_external(runs, "a", "x"), track="strict", named=True)
    assert str(error.value) == (
        "TRACK=strict: not of competition data only: a, x\n  fix: leave these out of RUNS, or TRACK"
    )
    with pytest.raises(FoldwiseError) as error:
        blended(project, with_external(runs, "a", "b", "x"), track="strict")
    assert str(error.value) == (
        "TRACK=strict: no run is of competition data only, but 3 runs with external data\n"
        "  fix: train one without `external`, or leave TRACK out"
    )


def test_runs_that_do_not_fit_are_refused_whatever_their_tracks(project, runs):
    runs = with_external(runs, "x")
    runs[2] = replace(runs[2], ids=runs[2].ids[1:], probs=runs[2].probs[1:], labels=runs[2].labels[1:])
    with pytest.raises(RecordError, match="holds other ids"):
        blended(project, runs)


def test_what_is_told_of_the_strict_one(project, runs):
    tracks = blended(project, with_external(runs, "x"), methods=("mean",))
    strict, gain = tracks.strict, tracks.gain
    low, high = strict.interval
    score = f"{strict.score:.4f} +- {strict.standard_error:.4f}"
    assert tracks_lines(tracks)[-4:] == [
        "track        with external data (x)",
        f"external     a gain of {gain.gain:+.4f} +- {gain.standard_error:.4f}, paired, "
        f"95% interval {gain.low:+.4f} to {gain.high:+.4f}, over the strict one",
        "strict       mean of a 0.50, b 0.50",
        f"             estimate {score}, 95% interval {low:.4f} to {high:.4f}",
    ]


def test_both_are_written_or_none(project, runs, monkeypatch):
    tracks = blended(project, with_external(runs, "x"))
    lacking = replace(tracks.strict, test_ids=tracks.strict.test_ids[1:], test_probs=tracks.strict.test_probs[1:])
    with pytest.raises(RecordError, match="the blend predicts 11 ids"):
        write(project, replace(tracks, strict=lacking, written={BEST: tracks.best, STRICT: lacking}))
    assert not (project.root / "submissions").exists()

    write(project, blended(project, runs, methods=("best",)))
    before = contents(project.root / "submissions")
    there = sorted((project.root / "submissions").iterdir())
    whole, calls = module.atomic_path, []

    def full(path):
        calls.append(path)
        if len(calls) > fits:
            raise OSError(28, "No space left on device")
        return whole(path)

    monkeypatch.setattr(module, "atomic_path", full)
    for fits in range(8):  # noqa: B007  `full` reads it
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            write(project, tracks)
        assert contents(project.root / "submissions") == before
        assert sorted((project.root / "submissions").iterdir()) == there
    calls.clear()
    fits = 8
    assert list(write(project, tracks)) == [BEST, STRICT]


@pytest.mark.parametrize("failing", range(8))
def test_a_failure_between_renames_leaves_no_description_of_another_submission(project, runs, monkeypatch, failing):
    write(project, blended(project, runs, methods=("best",)))
    folder = project.root / "submissions"
    before = contents(folder)
    tracks, whole, calls = blended(project, with_external(runs, "x")), Path.replace, []

    def broken(path, target):
        calls.append(target)
        if len(calls) > failing:
            raise OSError(5, "Input/output error")
        return whole(path, target)

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write(project, tracks)
    monkeypatch.undo()
    after = contents(folder)
    names = dict([STRICT[::-1], BEST[::-1]])
    described = [name for name in after if name.endswith(".json")]
    for name in described:
        place, _, own = name.rpartition("/")
        submission = f"{place}/{names[own]}".lstrip("/")
        digest = hashlib.sha256(after[submission]).hexdigest()
        assert json.loads(after[name])["submission_sha256"] == digest, name
    assert {name: after[name] for name in before if "/" in name} == {n: before[n] for n in before if "/" in n}
    if failing < 4:
        assert {name: after[name] for name in (*BEST, "strict.csv")} == {n: before[n] for n in (*BEST, "strict.csv")}
    assert not [name for name in after if name.endswith(".tmp")]
    written = write(project, tracks)
    assert (folder / "strict.json").read_bytes() == (written[STRICT] / "blend.json").read_bytes()


def test_a_folder_where_a_copy_belongs_takes_no_kept_description(project, runs):
    tracks = blended(project, with_external(runs, "x"))
    written = write(project, tracks)
    folder = project.root / "submissions"
    (folder / "strict.csv").unlink()
    (folder / "strict.csv").mkdir()
    before = contents(folder)
    with pytest.raises(IsADirectoryError):
        write(project, tracks)
    after = contents(folder)
    assert before.keys() - after.keys() == {"strict.json"}
    assert after.items() <= before.items()
    assert read_history(project.root, "toy").find().path == written[BEST]


def test_what_is_there_to_the_byte_is_not_touched(project, runs):
    tracks = blended(project, with_external(runs, "x"))
    write(project, tracks)
    files = [path for path in (project.root / "submissions").rglob("*") if path.is_file()]
    before = {path: path.stat().st_ino for path in files}
    write(project, tracks)
    assert {path: path.stat().st_ino for path in files} == before


def test_the_same_predictions_of_two_blends_have_a_folder_each(project, runs):
    tracks = blended(project, with_external(runs, "x"))
    alike = replace(tracks.strict, test_probs=tracks.best.test_probs, test_ids=tracks.best.test_ids)
    tracks = replace(tracks, strict=alike, written={BEST: tracks.best, STRICT: alike})
    written = write(project, tracks)
    assert written[BEST].name[:15] == "20250304-150607"
    assert written[STRICT].name == written[BEST].name.replace("150607", "150608")
    assert write(project, tracks, now=datetime(2026, 1, 1)) == written, "each is found again"
    assert read_history(project.root, "toy").find().path == written[BEST]


def test_a_clone_rebuilds_both_to_the_byte(tmp_path, project):
    """From the records alone: no images, no folds' predictions, no weights."""
    for salt, (name, skill) in enumerate(SKILLS.items()):
        project.keep(name, salt=salt, skill=skill, info={"external": ["fer2013"] if name == "x" else []})
    write(project, blended(project, list_runs(project.root, "toy")[0]))
    clone = tmp_path / "clone"
    shutil.copytree(project.root / "inputs", clone / "inputs")
    for path in (project.root / "oof").iterdir():
        (clone / "oof" / path.name).mkdir(parents=True)
        for name in ("spec.yaml", "oof.csv", "test.csv", "history.csv", "run.json"):
            shutil.copy(path / name, clone / "oof" / path.name)
    folds = read_folds(clone / "inputs" / "toy" / "folds.csv")
    groups = dict(zip(folds.ids.tolist(), folds.group.tolist(), strict=True))
    runs, skipped = list_runs(clone, "toy")
    assert (len(runs), skipped) == (3, [])
    again = blend_tracks(runs[::-1], metric=METRICS["accuracy"], groups=groups)
    assert again.best is not again.strict
    write(project, again, root=clone)
    assert contents(clone / "submissions") == contents(project.root / "submissions")


def test_the_list_tells_the_newest_of_each_track(project, runs):
    written = write(project, blended(project, with_external(runs, "x"), methods=("mean",)))
    lines = history_lines(read_history(project.root, "toy"))
    assert lines[0] == (
        "submissions of toy by accuracy, the latest first; * is the newest, s that of competition data only"
    )
    rows = {line[2:26]: (line[0], below) for line, below in zip(lines[3:7:2], lines[4:7:2], strict=True)}
    assert rows == {
        written[BEST].name: ("*", "    mean of a 0.33, b 0.33, x 0.33; with external data"),
        written[STRICT].name: ("s", "    mean of a 0.50, b 0.50; competition data only"),
    }


# The fixtures' runs are read alone, never changed.
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    external=st.sets(st.sampled_from(["a", "b", "x"])),
    metric=st.sampled_from(["accuracy", "log_loss"]),
    methods=st.sampled_from([("best",), ("mean",), ("best", "mean")]),
)
def test_no_blend_is_in_a_track_that_its_members_are_not(project, runs, external, metric, methods):
    tracks = blended(project, with_external(runs, *external), metric, methods=methods)
    assert (tracks.strict is None) == (external == {"a", "b", "x"})
    assert (STRICT in tracks.written) == (tracks.strict is not None)
    assert tracks.written[BEST] is tracks.best is tracks.first
    if tracks.strict is not None:
        assert not names(tracks.strict) & external
        assert METRICS[metric].sign * (tracks.best.score - tracks.strict.score) >= 0
        assert (tracks.best is tracks.strict) == (not names(tracks.best) & external)
