"""The page of results: its figures against the files and `compare`, golden faults, and the committed page itself.

Runs are drawn around the true class; submissions are written as `blend.json` has them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foldwise.errors import FoldwiseError, RecordError, SpecError
from foldwise.metrics import METRICS
from foldwise.records.compare import compare
from foldwise.records.results import CHOICES, PAGE, results, write_results
from foldwise.records.store import RunFolder
from foldwise.stats import Z95, holm, mcnemar, normal_p

REPO = Path(__file__).resolve().parents[2]

COMPETITION = """\
name: {name}
title: Toy faces
classes: [angry, happy, "sad, or so"]
metric: accuracy
image: {{height: 48, width: 48, channels: 1, fit: exact}}
"""


def describe(project, choices, *, benchmark="", name="toy"):
    """Write `competition.yaml` and the file of choices."""
    (project.root / "inputs" / name / "competition.yaml").write_text(COMPETITION.format(name=name))
    path = project.root / CHOICES
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"competition: {name}\n{benchmark}choices:{' []' if not choices else ''}\n{choices}")


def keep_spec(project, name, spec, *, skill=1.0, salt=0, info=None, **context):
    """Keep a run of a spec with a model."""
    spec = {"name": name, "seeds": [42]} | spec
    path = project.root / "oof" / name
    text = json.dumps(spec)
    units = [(fold, 42) for fold in range(3)]
    with RunFolder.open(path, spec=spec, spec_yaml=text, context=project.context(**context)) as folder:
        for fold, seed in units:
            folder.save_unit(project.unit(fold, seed, skill=skill, salt=salt))
        return project.complete(folder, units, info={"command": f"make exp EXP={name}"} | (info or {}))


def keep_right(project, name, right):
    """Keep a run that is right on just these images."""
    likely = np.where(right, project.labels, (project.labels + 1) % 3)
    probs = np.full((60, 3), 0.1, dtype=np.float32)
    probs[np.arange(60), likely] = 0.8
    with project.open(name) as folder:
        for fold in range(3):
            rows = np.flatnonzero(project.folds.fold == fold)
            arrays = {"val_ids": project.ids[rows], "val_labels": project.labels[rows], "val_probs": probs[rows]}
            folder.save_unit(replace(project.unit(fold), **arrays))
        project.complete(folder, [(fold, 42) for fold in range(3)])


def submit(project, day, *, external=(), method="stack", score=0.5, right=6, tried=None, copy="blend.json", **changes):
    content = "id,label\n" + "".join(f"{index},angry\n" for index in project.test_ids)
    digest = hashlib.sha256(content.encode()).hexdigest()
    told = {
        "competition": "toy",
        "metric": "accuracy",
        "method": method,
        "members": [{"run": "strong", "weight": 0.75, "score": 0.6}, {"run": "weak", "weight": 0.25, "score": 0.4}],
        "tried": tried
        or [
            {"method": "best", "score": 0.4, "standard_error": 0.01, "gain": 0.0, "gain_standard_error": 0.0},
            {"method": "stack", "score": 0.5, "standard_error": 0.01, "gain": 0.1, "gain_standard_error": 0.04},
        ],
        "estimate": {"score": score, "standard_error": 0.0123, "interval": [score - 0.02, score + 0.02]},
        "expectation": {"right": right, "plus_minus": 3},
        "submission_sha256": digest,
        "marks": [],
        "external": list(external),
    } | changes
    path = project.root / "submissions" / f"202503{day:02d}-120000-{digest[:8]}"
    path.mkdir(parents=True)
    (path / "submission.csv").write_text(content)
    for place in (path / "blend.json", path.parent / copy):
        place.write_text(json.dumps(told))
    return path


def tables(text):
    """Each markdown table as a list of rows, a dict each."""
    found = []
    for block in text.replace("\u00a0", " ").split("\n\n"):
        if block.startswith("|"):
            header, rule, *rows = (
                [cell.strip() for cell in line.replace("\\|", "\0")[1:-1].split("|")] for line in block.splitlines()
            )
            assert set(rule) == {"---"}
            found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def choices_of(text):
    return tables(text)[-1]


# Figures --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["accuracy", "log_loss"])
def test_a_pair_has_the_figures_of_compare(project, metric):
    for salt, (name, skill) in enumerate([("weak", 0.3), ("strong", 3.0), ("middling", 1.4)]):
        project.keep(name, skill=skill, salt=salt, metric=metric)
    pairs = [("weak", "strong"), ("strong", "middling")]
    describe(project, "".join(f"  - {{choice: c, without: {a}, with: {b}}}\n" for a, b in pairs))
    told = choices_of(results(project.root).text)
    expected = []
    for without, chosen in pairs:
        (group,) = compare(project.root, "toy", [without, chosen]).groups
        (pair,) = group.neighbours
        sign = 1 if pair.better == chosen else -1
        expected.append((sign, pair))
    corrected = holm([pair.p for _, pair in expected])
    for row, (sign, pair), p in zip(told, expected, corrected, strict=True):
        apart = pair.difference
        assert row["Difference"] == f"{sign * apart.gain:+.4f} +- {apart.standard_error:.4f}"
        ends = sorted((sign * apart.low, sign * apart.high))
        assert row["95 % interval"] == f"{ends[0]:+.4f} to {ends[1]:+.4f}"
        assert row["p"] == ("below 0.001" if p < 0.001 else f"{p:.3f}")
    assert [row["Verdict"] for row in told] == ["helps", "hurts" if corrected[1] < 0.05 else "not told apart"]


def test_twins_count_once(project):
    image = np.arange(60)
    keep_right(project, "below", (image >= 2) & (image < 36) | (image == 58))
    keep_right(project, "above", image < 40)
    describe(project, "  - {choice: c, without: below, with: above}\n")
    # Images 0 and 1 are twins: of six images that only `above` gets right, five groups are left; `below` has one.
    (row,) = choices_of(results(project.root).text)
    assert row["p"] == f"{mcnemar(1, 5):.3f}" != f"{mcnemar(1, 6):.3f}"


def test_views_blends_and_pairs_are_corrected_together_and_stay_in_order(project):
    views = {"tta": ["identity", "hflip"], "score_without_tta": 0.5}
    project.keep("strong", skill=3, info=views | {"tta_gain": {"gain": -0.03, "standard_error": 0.01}})
    project.keep("weak", skill=0.3, salt=1)
    describe(
        project,
        "  - {choice: TTA views, run: strong}\n"
        "  - {choice: architecture, without: strong, with: weak, note: a | b}\n"
        "  - {choice: blending, blend: best}\n",
    )
    submit(project, 1)
    page = results(project.root)
    assert page.verdicts == ("hurts", "hurts", "helps")
    assert "3 choices: 1 help, 2 hurt, 0 not told apart" in page.text
    first, second, third = choices_of(page.text)
    (group,) = compare(project.root, "toy").groups
    p_values = [normal_p(-0.03, 0.01), group.neighbours[0].p, normal_p(0.1, 0.04)]
    corrected = holm(p_values)
    assert corrected[0] > p_values[0]
    shown = ["below 0.001" if p < 0.001 else f"{p:.3f}" for p in corrected]
    assert [row["p"] for row in (first, second, third)] == shown
    assert tables(page.text)[1][0]["Gain by TTA"] == f"{group.rows[0].tta_gain:+.4f} +- 0.0100"
    assert first["Difference"] == "-0.0300 +- 0.0100"
    assert first["95 % interval"] == f"{-0.03 - Z95 * 0.01:+.4f} to {-0.03 + Z95 * 0.01:+.4f}"
    assert (first["Without"], first["With"]) == ("`strong`, the image alone", "`strong`, the mean of 2 views")
    assert (second["Without"], second["With"], second["Note"]) == ("`strong`", "`weak`", "a \0 b")
    assert (third["Difference"], third["Without"]) == ("+0.1000 +- 0.0400", "the best run alone")
    assert third["With"] == "stack of strong 0.75, weak 0.25"


def test_what_differs_is_from_the_specs(project):
    keep_spec(project, "plain", {"optim": {"lr": 0.1}, "tune": {"trials": 3}})
    keep_spec(project, "mixed", {"optim": {"lr": 0.1}, "mix": {"mixup_alpha": 0.4}}, salt=1)
    keep_spec(project, "again", {"optim": {"lr": 0.1}}, salt=2)
    many = {f"k{index}": index for index in range(8)}
    keep_spec(project, "other", {"optim": {"lr": 0.1}, "train": many}, salt=3)
    lines = "".join(f"  - {{choice: c, without: plain, with: {name}}}\n" for name in ("mixed", "again", "other"))
    describe(project, lines)
    mixed, again, other = (row["What differs"] for row in choices_of(results(project.root).text))
    assert mixed == "`mix.mixup_alpha: (absent) -> 0.4`"
    assert again == "nothing"
    assert other.endswith("`train.k4: (absent) -> 4`; and `train.k5`, `train.k6`, `train.k7`")


# Which runs and submissions -------------------------------------------------------------------------------------------


def test_runs_stand_by_track_with_what_they_build_on(project):
    elsewhere = [{"source": "faces", "by": "run:pre", "inputs_sha256": "0"}, {"source": "more", "images": 26123}]
    model = {"weights": "run:pre", "image_size": 80}
    distill = {"from": ["own"]}
    keep_spec(project, "lent", {"model": model, "distill": distill}, skill=2, info={"external": elsewhere})
    device = "cpu (Intel(R) Xeon(R) Processor), 2 threads, bf16"
    keep_spec(project, "own", {"model": {"image_size": 48}}, salt=1, info={"parameters": 11_173_831, "device": device})
    keep_spec(project, "pretrained", {"model": {"weights": "pretrained"}}, salt=2)
    describe(project, "")
    page = results(project.root)
    assert page.text.index("### With external data") < page.text.index("### Competition data only")
    (lent,), (lent_made,), own, own_made = tables(page.text)
    assert lent["Run"] == "`lent`"
    assert lent["Builds on"] == ("starts from `pre`; taught by `own`; external faces, more (26,123 images)")
    assert lent_made["Command"] == "`make exp EXP=lent`"
    assert lent["Image"] == "80 px"
    assert [row["Run"] for row in own] == [row["Run"] for row in own_made]
    by_name = {row["Run"]: row | made for row, made in zip(own, own_made, strict=True)}
    assert by_name["`own`"]["Trained on"] == "Intel Xeon, 2 threads, bf16"
    assert by_name["`own`"]["Parameters"] == "11.2 M"
    assert by_name["`own`"]["Command"] == "`make exp EXP=own`"
    record = json.loads((project.root / "oof" / "own" / "run.json").read_text())
    assert by_name["`own`"]["Accuracy"] == f"{record['score']:.4f} +- {record['standard_error']:.4f}"
    assert by_name["`pretrained`"]["Builds on"] == "pretrained weights"
    assert "None is listed in docs/ablations.yaml yet." in page.text
    assert page.text.count("the leak guard") == 1
    assert "([the leak guard](EXTERNAL.md)). Not told by the records of `lent`." in page.text
    best = page.text.index(" is the best of all 3 runs of both tracks on the images that score it.")
    assert page.text.index("## Runs") < best < page.text.index("### With external data")


def test_one_track_is_not_both(project):
    project.keep("strong", skill=3)
    project.keep("weak", skill=0.3, salt=1)
    describe(project, "")
    text = results(project.root).text
    assert "`strong` is the best of all 2 runs on the images that score it." in text
    assert "leak guard" not in text


def test_a_figure_and_its_error_stay_on_one_line(project):
    project.keep("strong", skill=3)
    project.keep("weak", skill=0.3, salt=1)
    describe(project, "  - {choice: c, without: strong, with: weak}\n")
    submit(project, 1)
    text = results(project.root).text.replace("`+-` is one standard error", "")
    assert " +- " not in text
    assert "| 0.5000\u00a0+-\u00a00.0123 | 0.4800\u00a0to\u00a00.5200 | 6\u00a0+-\u00a03 |" in text


def test_a_run_without_a_score_tells_what_it_was_kept_clear_of(project):
    dropped = {"faces": {"images": 28929, "dropped": 3757}, "more": {"images": 5, "dropped": 1}}
    guard = {"clear_of": {"toy": {"dropped": dropped}, "small": {"dropped": {"more": {"dropped": 1}}}}}
    for name, clear_of, info in (("pre", ["toy", "small"], {"leak_guard": guard}), ("all", [], {})):
        path = project.root / "oof" / name
        context = project.context(competition="faces", split={"kind": "full"})
        spec = {"name": name, "seeds": [42], "clear_of": clear_of}
        with RunFolder.open(path, spec=spec, spec_yaml=json.dumps(spec), context=context) as folder:
            none = {"val_ids": project.ids[:0], "val_labels": project.labels[:0], "val_probs": np.empty((0, 3), "f4")}
            folder.save_unit(replace(project.unit(0), **none))
            folds = replace(project.folds, fold=np.full(60, -1))
            told = {"command": "make exp"} | info
            folder.complete([(0, 42)], folds=folds, labels=project.labels, metric=METRICS["accuracy"], info=told)
        keep_spec(project, f"from_{name}", {"model": {"weights": f"run:{name}"}}, salt=len(clear_of))
    describe(project, "")
    apart = tables(results(project.root).text)[-2]
    assert {row["Run"]: row["Scored on"] for row in apart} == {
        "`all`": "nothing held out",
        "`pre`": "nothing held out; without 3,758 copies of toy's images, 1 copy of small's images",
    }
    describe(project, "  - {choice: c, without: from_pre, with: pre}\n")
    told = refused(project)
    assert "the run `pre` has no score: nothing was held out\n" in told
    assert told.endswith("  fix: name a run that was scored\n1 error; nothing was written.")


def test_runs_of_other_competitions_are_those_that_are_built_on_or_held_out(project):
    shutil.copytree(project.root / "inputs" / "toy", project.root / "inputs" / "faces")
    held_out = {"kind": "holdout", "share": 0.1}
    keep_spec(project, "grand", {"model": {"weights": "none"}}, competition="faces")
    keep_spec(project, "pre", {"model": {"weights": "run:grand"}}, salt=1, competition="faces")
    keep_spec(project, "apart", {}, salt=2, competition="faces", split=held_out)
    keep_spec(project, "stranger", {}, salt=3, competition="faces")
    keep_spec(project, "smoke", {}, salt=4, competition="faces", split=held_out, smoke=True)
    keep_spec(project, "own", {"model": {"weights": "run:pre"}}, salt=5)
    keep_spec(project, "second", {}, salt=6, split={"kind": "kfold", "folds": 3, "number": 1})
    describe(project, "")
    text = results(project.root).text
    assert "### Scored apart" in text
    main, _, apart, _ = tables(text)
    assert [row["Run"] for row in main] == ["`own`"]
    assert sorted(row["Run"] for row in apart) == ["`apart`", "`grand`", "`pre`", "`second`"]
    by_name = {row["Run"]: row for row in apart}
    assert by_name["`apart`"]["Scored on"] == "held-out 10%: 60 images"
    assert by_name["`pre`"]["Competition"] == "`faces`"
    assert by_name["`second`"]["Scored on"].startswith("3 folds, split 1")


def test_the_newest_submission_of_each_track_is_told(project):
    project.keep("strong", skill=3)
    project.keep("weak", skill=0.3, salt=1)
    describe(
        project,
        "  - {choice: b, blend: best}\n  - {choice: s, blend: strict}\n",
        benchmark="""\
benchmark: {name: "the other one", right: 7, of: 12}
""",
    )
    submit(project, 2, score=0.4, right=5)
    stack = {"method": "stack", "gain": 0.2, "gain_standard_error": 0.02}
    best = {"method": "best", "gain": 0.0, "gain_standard_error": 0.0}
    submit(project, 3, score=0.45, right=6, tried=[best, {"method": "stack", "gain": 0.3, "gain_standard_error": 0.1}])
    newest = submit(project, 4, external=["faces"], score=0.6, right=9, tried=[best, stack])
    text = results(project.root).text.replace("\u00a0", " ")
    first, second = tables(text)[0]
    assert [first["Track"], second["Track"]] == ["with external data", "competition data only"]
    assert (first["Estimate"], second["Estimate"]) == ("0.6000 +- 0.0123", "0.4500 +- 0.0123")
    assert first["95 % interval"] == "0.5800 to 0.6200"
    assert (first["Expected right of 12"], first["Kept in"]) == ("9 +- 3", f"`submissions/{newest.name}`")
    assert (first["More than 7 right"], second["More than 7 right"]) == ("about 84 %", "about 16 %")
    assert "Command" not in first
    assert "To be beaten: the other one, 7 of 12 test images right, 0.5833 +- 0.1423." in text
    assert [row["Difference"] for row in choices_of(text)] == ["+0.2000 +- 0.0200", "+0.3000 +- 0.1000"]


TRIED = [
    {"method": "best", "score": 0.5, "standard_error": 0.01, "gain": 0.0, "gain_standard_error": 0.0},
    {"method": "mean", "score": 0.48, "standard_error": 0.01, "gain": -0.02, "gain_standard_error": 0.02},
    {"method": "stack", "score": 0.51, "standard_error": 0.01, "gain": 0.01, "gain_standard_error": 0.02},
]


def test_the_strict_submission_is_the_one_that_is_copied(project):
    project.keep("strong", skill=3)
    describe(project, "  - {choice: b, blend: best}\n  - {choice: s, blend: strict}\n")
    kept = submit(project, 1, copy="strict.json", score=0.41)
    submit(project, 2, score=0.42)
    newest = submit(project, 3, external=["faces"], score=0.6)

    def told():
        text = results(project.root).text
        return [row["Kept in"].strip("`").removeprefix("submissions/") for row in tables(text)[0]]

    assert told() == [newest.name, kept.name], "not the latest of competition data only"
    ad_hoc = submit(project, 4, score=0.3, tried=TRIED)
    assert told() == [ad_hoc.name, kept.name], "runs that were named are not the strict blend"
    best, strict = choices_of(results(project.root).text)
    assert (best["Difference"], strict["Difference"]) == ("+0.0100 +- 0.0200", "+0.1000 +- 0.0400")
    (kept.parent / "blend.json").write_bytes((kept / "blend.json").read_bytes())
    assert told() == [kept.name]
    (kept.parent / "strict.json").write_text('{"competition": "toy"}')
    with pytest.raises(FoldwiseError, match="no submission of `toy` is of competition data only, or the newest is not"):
        results(project.root)


def test_there_is_no_strict_choice_of_a_submission_with_external_data(project):
    project.keep("strong", skill=3)
    describe(project, "  - {choice: s, blend: strict}\n")
    submit(project, 1, external=["faces"])
    assert "there is no submission of competition data only\n" in refused(project)


def test_each_submission_tells_the_command_that_makes_it_of_the_runs_that_are_there(project):
    project.keep("strong", skill=3)
    project.keep("weak", skill=0.3, salt=1)
    project.keep("lent", skill=2, salt=2, info={"external": ["faces"]})
    describe(project, "")

    def commands():
        block = results(project.root).text.split("```")[1]
        return [line.split("  # ") for line in block.strip().splitlines()]

    own = submit(project, 1, copy="strict.json", considered=["strong", "weak"])
    lent = submit(project, 2, external=["faces"], considered=["lent", "strong", "weak"])
    assert commands() == [["make submit COMP=toy", f"{lent.name}, {own.name}"]]
    forced = submit(project, 3, considered=["strong", "weak"], tried=TRIED[2:], prior={"kind": "test"})
    assert commands()[0] == ["make submit COMP=toy METHOD=stack PRIOR=test", forced.name]
    project.keep("later", salt=3)
    assert commands() == [
        ["make submit COMP=toy RUNS=strong,weak METHOD=stack PRIOR=test", forced.name],
        ["make submit COMP=toy RUNS=strong,weak TRACK=strict", own.name],
    ]
    one = submit(project, 4, considered=["weak"], tried=[], method="single")
    assert commands()[0] == ["make submit COMP=toy RUNS=weak", one.name]


def test_of_a_best_run_that_was_taken_the_strongest_blend_is_told(project):
    project.keep("strong", skill=3)
    describe(project, "  - {choice: blending, blend: best}\n")
    submit(project, 1, method="best", tried=TRIED, considered=["strong", "weak", "other"])
    (row,) = choices_of(results(project.root).text)
    assert (row["Without"], row["With"]) == ("the best run alone", "stack of 3 runs, not taken")
    assert (row["Difference"], row["Verdict"]) == ("+0.0100 +- 0.0200", "not told apart")
    submit(project, 2, method="best", tried=TRIED[:1])
    assert "  fix: make submit, without METHOD\n" in refused(project)


def test_a_page_without_a_submission(project):
    project.keep("strong")
    describe(project, "")
    assert "Nothing is submitted yet: `make submit COMP=toy`." in results(project.root).text


def test_a_changed_newest_submission_is_refused(project):
    project.keep("strong")
    describe(project, "")
    path = submit(project, 1)
    (path / "submission.csv").write_text("id,label\n")
    with pytest.raises(FoldwiseError, match=r"left out: 20250301.*is not the file that blend.json describes"):
        results(project.root)


# The file -------------------------------------------------------------------------------------------------------------


def test_the_page_is_written_whole_and_again_to_the_byte(project):
    project.keep("strong", skill=3)
    project.keep("weak", skill=0.3, salt=1)
    (project.root / "oof" / "begun").mkdir()
    (project.root / "oof" / "begun" / "spec.yaml").write_text("competition: toy\n")
    describe(project, "  - {choice: c, without: strong, with: weak}\n")
    lines = write_results(project.root, "toy")
    assert lines == [
        "left out: begun: is not complete: it has no run.json",
        "written  docs/RESULTS.md, of toy; 1 choice: 0 help, 1 hurt, 0 not told apart",
    ]
    written = (project.root / PAGE).read_bytes()
    assert written.decode() == results(project.root).text
    assert str(project.root) not in written.decode()
    assert written.decode().replace("\u00a0", " ").isascii()
    # What is only begun is no part of the page.
    shutil.rmtree(project.root / "oof" / "begun")
    write_results(project.root)
    assert (project.root / PAGE).read_bytes() == written


# Faults ---------------------------------------------------------------------------------------------------------------


def refused(project, **changes):
    with pytest.raises(RecordError) as caught:
        write_results(project.root, **changes)
    assert not (project.root / PAGE).exists()
    return str(caught.value)


def test_all_faults_of_the_file_are_told_at_once(project, monkeypatch):
    monkeypatch.chdir(project.root)
    project.keep("strong", skill=3, info={"tta": ["identity", "hflip"], "score_without_tta": 0.5})
    project.keep("weak", salt=1, info={"tta": ["identity"]})
    project.keep("second", salt=2, split={"kind": "kfold", "folds": 3, "number": 1})
    (project.root / "oof" / "begun").mkdir()
    (project.root / "oof" / "begun" / "spec.yaml").write_text("competition: toy\n")
    submission = submit(project, 1, method="single").name
    describe(
        project,
        """\
  - {choice: mixup, without: strong, wiht: weak}
  - {choice: folds, without: strong, with: second}
  - {choice: unknown, without: storng, with: begun}
  - {choice: itself, without: weak, with: weak}
  - {without: strong, with: weak}
  - {choice: both, run: strong, blend: best}
  - {choice: views, run: strong}
  - {choice: one view, run: weak}
  - {choice: blending, blend: strct}
  - {choice: blending, blend: strict}
  - {choice: nothing}
  - {choice: 3, run: weak}
""",
        benchmark="benchmark: {name: other, right: 7, of: 300}\n",
    )
    told = refused(project)
    # The schema refuses the file, so that the benchmark is not held against the submission yet.
    assert told + "\n" == GOLDEN.replace("{submission}", submission)
    text = (project.root / CHOICES).read_text().replace("choice: 3,", 'choice: "3",')
    (project.root / CHOICES).write_text(text)
    assert "docs/ablations.yaml:2:40: `benchmark.of` is 300, but the submission 20250301-120000-" in refused(project)


GOLDEN = """\
docs/ablations.yaml:4:38: unknown key `choices.0.wiht`
    4 |   - {choice: mixup, without: strong, wiht: weak}
      |                                      ^^^^
  fix: did you mean `with`? a choice takes `choice` with `without` and `with`, `run`, or `blend`; and `note`
docs/ablations.yaml:5:44: `second` cannot be compared with `strong`: it is scored on toy, \
3 folds, split 1, not the present folds (4d9b76b6), not on toy, 3 folds
    5 |   - {choice: folds, without: strong, with: second}
      |                                            ^^^^^^
  fix: name two runs of the same competition, folds, labels and classes
docs/ablations.yaml:6:32: there is no complete run `storng`
    6 |   - {choice: unknown, without: storng, with: begun}
      |                                ^^^^^^
  fix: did you mean `strong`?
docs/ablations.yaml:6:46: the run `begun` is not complete: it has no run.json
    6 |   - {choice: unknown, without: storng, with: begun}
      |                                              ^^^^^
  fix: make exp EXP=begun, or leave the choice out
docs/ablations.yaml:7:43: `weak` is compared with itself
    7 |   - {choice: itself, without: weak, with: weak}
      |                                           ^^^^
  fix: name two runs that differ in the choice
docs/ablations.yaml:8:5: missing key `choices.4.choice`
    8 |   - {without: strong, with: weak}
      |     ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  fix: add `choice: ...`: what was chosen, in a few words
docs/ablations.yaml:9:5: a choice is told by two runs, one run or a blend, but this has `run`, `blend`
    9 |   - {choice: both, run: strong, blend: best}
      |     ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  fix: a choice takes `choice` with `without` and `with`, `run`, or `blend`; and `note`
docs/ablations.yaml:10:26: `strong` was kept without the standard error of what its views gain
   10 |   - {choice: views, run: strong}
      |                          ^^^^^^
  fix: make exp EXP=strong FRESH=1, or name a run that was kept since
docs/ablations.yaml:11:29: `weak` has no views but identity
   11 |   - {choice: one view, run: weak}
      |                             ^^^^
  fix: name a run with several
docs/ablations.yaml:12:31: `choices.8.blend` must be one of best, strict, but got 'strct'
   12 |   - {choice: blending, blend: strct}
      |                               ^^^^^
  fix: did you mean `strict`?
docs/ablations.yaml:13:31: the submission {submission} does not tell what its blend gains over its best run
   13 |   - {choice: blending, blend: strict}
      |                               ^^^^^^
  fix: leave the choice out until two runs of the track are kept
docs/ablations.yaml:14:5: a choice is told by two runs, one run or a blend, but this has none of these
   14 |   - {choice: nothing}
      |     ^^^^^^^^^^^^^^^^^
  fix: a choice takes `choice` with `without` and `with`, `run`, or `blend`; and `note`
docs/ablations.yaml:15:14: `choices.11.choice` must be a string, but got the integer 3
   15 |   - {choice: 3, run: weak}
      |              ^
  fix: put it in quotes: "3"
13 errors; nothing was written.
"""


def test_another_competition_is_refused(project, monkeypatch):
    monkeypatch.chdir(project.root)
    project.keep("strong")
    describe(project, "")
    assert refused(project, competition="faces").startswith(
        "docs/ablations.yaml:1:14: the choices are those of `toy`, but the results of `faces` were asked for\n"
        "    1 | competition: toy\n"
        "      |              ^^^\n"
        "  fix: COMP=toy, or list the choices of faces there\n"
    )
    (project.root / CHOICES).write_text("competition: tyo\n")
    assert refused(project).endswith("  fix: did you mean `toy`?\n1 error; nothing was written.")
    (project.root / CHOICES).unlink()
    with pytest.raises(SpecError, match=r"docs/ablations\.yaml: there is no such file"):
        write_results(project.root)


# The committed page ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_committed_page_is_what_the_committed_runs_give(tmp_path):
    listed = ["git", "-C", str(REPO), "ls-files", "-z", "oof", "submissions", "inputs"]
    names = subprocess.run(listed, capture_output=True, check=True).stdout.decode().split("\0")
    for name in (CHOICES, *(name for name in names if name.endswith((".csv", ".json", ".yaml")))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    assert results(tmp_path).text == (REPO / PAGE).read_text(), "make results, and commit docs/RESULTS.md"
