"""Reports: their figures are those of the kept files, by oracle; what cannot be made is said.

Runs are of the demo competition, with drawn probabilities in place of training.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import classification_report

from foldwise.data.competition import load_dataset
from foldwise.data.folds import Folds
from foldwise.errors import FoldwiseError, RecordError
from foldwise.metrics import METRICS
from foldwise.records.store import Context, RunFolder, Unit, load_run
from foldwise.show.report import (
    calibrate,
    calibration_metric,
    classification_table,
    equal_mass,
    equal_width,
    kept_epoch,
    label_errors,
    reliability,
    write_comparison,
    write_report,
)

PICTURES = ["history.png", "confusion.png", "calibration.png"]
TABLES = ["classification_report.csv", "label_errors.csv", "classification_report.txt"]
GALLERIES = ["mistakes.png", "label_errors.png"]


def draw_probs(rng, labels, classes, skill=1.5):
    logits = rng.normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), labels] += skill
    return (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)


def history(epochs, figures=("val_loss", "val_accuracy")):
    return [
        {"epoch": e, "lr": 0.001, "train_loss": 1 / e, "train_accuracy": 0.5} | dict.fromkeys(figures, 0.5 / e)
        for e in range(1, epochs + 1)
    ]


def keep_run(root, name, *, metric="accuracy", kind="kfold", skill=1.5, epochs=2, classes=None, competition="demo"):
    """Keep a run of the demo that was never trained."""
    data = load_dataset(root, "demo")
    labels = data.labels[data.labels >= 0]
    names = data.competition.classes if classes is None else classes
    labels = labels % len(names)
    fold = data.folds.fold if kind == "kfold" else np.where(data.folds.fold == 0, 0, -1) if kind != "full" else -1
    folds = Folds(data.folds.ids, np.broadcast_to(fold, len(labels)).astype(np.int64), data.folds.group)
    context = Context(competition, tuple(names), {"kind": kind, "folds": 3}, folds.sha256, data.sha256)
    numbers = np.unique(folds.fold[folds.fold >= 0]).tolist() or [0]
    text = f"name: {name}\nmix:\n  mixup_alpha: 0.2\nloss:\n  label_smoothing: 0.1\n"
    path = root / "oof" / name
    test_ids = data.ids[data.labels < 0]
    spec = {"name": name, "mix": {"mixup_alpha": 0.2}, "loss": {"label_smoothing": 0.1}}
    with RunFolder.open(path, spec=spec, spec_yaml=text, context=context) as folder:
        for number in numbers:
            rng = np.random.default_rng(number)
            rows = np.flatnonzero(folds.fold == number)
            probs = draw_probs(rng, labels[rows], len(names), skill)
            test = draw_probs(rng, np.zeros(len(test_ids), dtype=int), len(names))
            figures = () if kind == "full" else ("val_loss", "val_accuracy", f"val_{metric}")
            unit = Unit(
                number,
                42,
                folds.ids[rows],
                labels[rows],
                probs,
                test_ids,
                test,
                history(epochs, figures),
                {"wall_s": 1},
            )
            folder.save_unit(unit)
        folder.complete([(k, 42) for k in numbers], folds=folds, labels=labels, metric=METRICS[metric], info={})
    return path


def names_of(report):
    return [path.name for path in report.files]


probabilities = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(max_examples=30)
@given(probabilities, st.integers(1, 80), st.integers(2, 6), st.booleans())
def test_the_table_is_scikit_learns(rng, rows, classes, absent):
    labels = rng.integers(0, classes - absent, rows)
    probs = rng.dirichlet(np.ones(classes), rows)
    names = [f"c{index}" for index in range(classes)]
    table = classification_table(labels, probs, names)
    predicted = probs.argmax(axis=1)
    oracle = classification_report(
        np.array(names)[labels], np.array(names)[predicted], output_dict=True, zero_division=0
    )
    occurring = {name for name in names if name in oracle}
    assert occurring == {names[index] for index in {*labels.tolist(), *predicted.tolist()}}
    for row in table:
        if row["class"] in oracle:
            expected = oracle[row["class"]]
            assert [row["precision"], row["recall"], row["f1"]] == pytest.approx(
                [expected["precision"], expected["recall"], expected["f1-score"]]
            )
            assert row["support"] == expected["support"]


@settings(max_examples=30)
@given(probabilities, st.integers(1, 200))
def test_calibration_error_is_the_papers_sum(rng, rows):
    labels, probs = rng.integers(0, 3, rows), rng.dirichlet(np.ones(3), rows)
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    expected = 0.0
    for low, high in zip(np.arange(15) / 15, np.arange(1, 16) / 15, strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_metric(equal_width()).score(labels, probs) == pytest.approx(expected)
    bins = reliability(labels, probs)
    assert bins.count.sum() == rows
    assert (bins.count * np.abs(bins.accuracy - bins.confidence)).sum() / rows == pytest.approx(expected)


def test_bins_of_equal_mass_hold_equally_many():
    confidence = np.random.default_rng(0).beta(5, 1, 1500)
    counts, _ = np.histogram(confidence, equal_mass(confidence))
    assert len(counts) == 15
    assert counts.min() >= 99
    assert equal_mass(np.full(9, 0.5)) == (0.0, 0.5, 1.0)
    assert equal_mass(np.ones(9)) == (0.0, 1.0)


def test_a_calibrated_model_is_found_to_be_one_and_an_overconfident_one_not():
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.ones(4), 3000)
    labels = (rng.random(3000)[:, None] > probs.cumsum(axis=1)).sum(axis=1).clip(0, 3)
    good = calibrate(labels, probs, np.arange(3000)).ece
    assert good.corrected < good.value
    assert good.interval[0] < 0.005
    sharp = probs**3 / (probs**3).sum(axis=1, keepdims=True)
    bad = calibrate(labels, sharp, np.arange(3000))
    assert bad.ece.interval[0] > 0.1
    assert bad.adaptive.interval[0] > 0.1
    assert bad.confidence > bad.accuracy


def test_flipped_labels_are_found():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 400)
    probs = draw_probs(rng, truth, 5, skill=5).astype(np.float64)  # of the fifth class there is no image
    labels = truth.copy()
    flipped = rng.choice(400, 20, replace=False)
    labels[flipped] = (labels[flipped] + 1) % 4
    found = label_errors(labels, probs)
    assert len(set(found[:20].tolist()) & set(flipped.tolist())) >= 15
    own = probs[found, labels[found]]
    assert (np.diff(own) >= 0).all()
    assert label_errors(np.zeros(9, dtype=np.int64), probs[:9]).tolist() == []


def test_no_cleanlab_is_said_and_the_rest_is_written(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    path = keep_run(root, "run")
    with pytest.raises(FoldwiseError) as error:
        label_errors(np.array([0, 1]), np.eye(2))
    assert str(error.value) == 'cleanlab is not installed\n  fix: pip install "foldwise[report]"'
    report = write_report(path, root=root)
    assert names_of(report) == [*PICTURES, TABLES[0], TABLES[2], "mistakes.png"]
    assert report.notes == (f"label_errors.csv is left out: {error.value}",)


def columns(**figures):
    return {"epoch": np.array([1.0, 2, 3]), **{name: np.array(values) for name, values in figures.items()}}


@pytest.mark.parametrize(
    ("history", "train", "metric", "epoch"),
    [
        (columns(val_accuracy=[0.1, 0.9, 0.9]), {}, "accuracy", 3),
        (columns(val_accuracy=[0.1, 0.9, 0.9]), {"keep": "best"}, "accuracy", 2),
        (columns(val_accuracy=[0.9, 0, 0], inner_accuracy=[0, 0.2, 0.3]), {"keep": "best"}, "accuracy", 3),
        (columns(val_loss=[3, 1, 2.0]), {"keep": "best"}, "log_loss", 2),
        (columns(val_loss=[1, 3, 2.0]), {"keep": "best", "watch_figure": "log_loss"}, "accuracy", 1),
        (columns(val_accuracy=[np.nan] * 3), {"keep": "best"}, "accuracy", 3),
    ],
)
def test_kept_epoch(history, train, metric, epoch):
    assert kept_epoch(history, train, METRICS[metric]) == epoch


@pytest.mark.slow
def test_a_report_is_of_the_kept_files_and_the_same_bytes_again(root):
    path = keep_run(root, "run")
    report = write_report(path, root=root)
    assert names_of(report) == [*PICTURES, *TABLES, *GALLERIES]
    assert report.notes == ()
    before = {file: file.read_bytes() for file in report.files}
    assert write_report(path, root=root) == report
    assert {file: file.read_bytes() for file in (path / "report").iterdir()} == before

    run = load_run(path)
    with (path / "report" / "classification_report.csv").open(newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    predicted = run.probs.argmax(axis=1)
    for index, name in enumerate(run.classes):
        of_class = run.labels == index
        assert float(rows[name]["recall"]) == pytest.approx((predicted[of_class] == index).mean(), abs=1e-6)
        assert int(rows[name]["support"]) == of_class.sum()
    assert rows["macro avg"]["recall_low"] == ""
    text = (path / "report" / "classification_report.txt").read_text()
    score, error = run.info["score"], run.info["standard_error"]
    assert text.startswith(
        f"run on demo: 140 images, out of fold\n\n{'accuracy':<20} {score:.4f} +- {error:.4f}   95% "
    )
    assert max(map(len, text.splitlines())) <= 110
    with (path / "report" / "label_errors.csv").open(newline="") as file:
        doubtful = list(csv.DictReader(file))
    assert [int(row["rank"]) for row in doubtful] == list(range(1, len(doubtful) + 1))
    row_of = {name: row for row, name in enumerate(run.ids.tolist())}
    for row in doubtful:
        at = row_of[row["id"]]
        assert row["label"] == run.classes[run.labels[at]] != row["suggested"]
        assert float(row["self_confidence"]) == pytest.approx(run.probs[at, run.labels[at]], abs=1e-6)


def test_absent_images_are_noted_and_older_pictures_of_them_go(root):
    path = keep_run(root, "run")
    (path / "report").mkdir()
    (path / "report" / "mistakes.png").write_bytes(b"old")
    (root / "inputs" / "demo" / "images").unlink()
    report = write_report(path, root=root)
    assert names_of(report) == [*PICTURES, *TABLES]
    assert sorted(file.name for file in (path / "report").iterdir()) == sorted([*PICTURES, *TABLES])
    (note,) = report.notes
    assert note.startswith("mistakes.png and label_errors.png are left out: no images (")


def test_a_change_of_labels_leaves_the_galleries_out(root):
    path = keep_run(root, "run")
    table = root / "inputs" / "demo" / "train.csv"
    lines = table.read_text().splitlines()
    lines[1] = "1,sad" if lines[1] != "1,sad" else "1,happy"
    table.write_text("\n".join(lines) + "\n")
    note = "mistakes.png and label_errors.png are left out: the images or labels of demo are not those of the run"
    assert write_report(path, root=root).notes == (note,)


def test_without_folds_every_image_counts_alone(root):
    path = keep_run(root, "run")
    (root / "inputs" / "demo" / "folds.csv").unlink()
    notes = write_report(path, root=root).notes
    assert notes[0] == "demo/folds.csv does not hold the run's ids: every image counts as independent"


def test_a_full_split_has_curves_alone(root):
    report = write_report(keep_run(root, "run", kind="full"), root=root)
    assert names_of(report) == ["history.png"]
    assert report.notes == ("nothing was held out to validate on: there are the learning curves alone",)


@pytest.mark.parametrize(
    ("metric", "kind", "classes"),
    [("log_loss", "kfold", None), ("macro_f1", "holdout", ("a", "b")), ("accuracy", "kfold", tuple("0123456789"))],
)
def test_other_metrics_splits_and_classes(root, metric, kind, classes):
    path = keep_run(root, "run", metric=metric, kind=kind, classes=classes, epochs=1)
    report = write_report(path, root=root)
    assert set(PICTURES + TABLES) <= set(names_of(report))
    text = (path / "report" / "classification_report.txt").read_text()
    run = load_run(path)
    assert f"{len(run.ids)} {'images, out of fold' if kind == 'kfold' else 'held-out images'}" in text
    first = text.splitlines()[2]
    assert first.startswith(metric.replace("_", " ").replace("f1", "F1"))
    assert f"{run.info['score']:.4f} +- {run.info['standard_error']:.4f}" in first
    if classes and len(classes) == 10:
        assert "No image is of: 7, 8, 9." in text


def test_a_test_part_and_sources_are_told_where_they_are_scored(root):
    path = keep_run(root, "run")
    record = json.loads((path / "run.json").read_text())
    source = {"score": 0.25, "standard_error": 0.0625, "n_scored": 1234}
    record |= {"test_score": 0.5, "test_standard_error": 0.125, "source_scores": {"a": source}, "marks": ["optimistic"]}
    record |= {"external": [{"source": "faces", "by": "run:pre", "inputs_sha256": "ab"}]}
    (path / "run.json").write_text(json.dumps(record))
    write_report(path, root=root)
    lines = (path / "report" / "classification_report.txt").read_text().splitlines()
    assert f"{'test part':<20} 0.5000 +- 0.1250" in lines
    assert f"{'source a':<20} 0.2500 +- 0.0625 (1,234 images)" in lines
    assert f"{'marks':<20} optimistic" in lines
    assert f"{'external data':<20} faces (by run:pre)" in lines


def test_a_history_that_cannot_be_read_is_said(root):
    path = keep_run(root, "run")
    (path / "history.csv").write_text("fold,seed,epoch\n0,42,one\n")
    with pytest.raises(RecordError, match=r"oof/run/history.csv: is not a history that can be read"):
        write_report(path, root=root)
    (path / "history.csv").unlink()
    with pytest.raises(RecordError, match=r"oof/run/history.csv: is missing"):
        write_report(path, root=root)


def test_a_comparison_is_drawn_again_to_the_same_bytes(root):
    keep_run(root, "weak", skill=0.5)
    keep_run(root, "strong", skill=3.0, epochs=3)
    first = write_comparison(root, ["weak", "strong", "weak"], root / "a.png")
    second = write_comparison(root, ["strong", "weak"], root / "b.png")
    assert first.read_bytes() == second.read_bytes()


def test_runs_that_differ_are_not_compared(root):
    keep_run(root, "one")
    keep_run(root, "two", metric="log_loss")
    keep_run(root, "three", classes=("a", "b"))
    keep_run(root, "four", kind="full")
    with pytest.raises(RecordError) as error:
        write_comparison(root, ["one", "two", "three", "four", "five"], root / "a.png")
    assert not (root / "a.png").exists()
    assert [fault.where for fault in error.value.faults] == ["oof/four", "oof/five", "oof/two", "oof/three"]
    assert "oof/two: cannot be compared with one: its metric must be accuracy, but got log_loss" in str(error.value)
    with pytest.raises(RecordError, match="no run is named"):
        write_comparison(root, [], root / "a.png")


@pytest.mark.slow
def test_a_report_needs_neither_torch_nor_a_window():
    code = "import sys, foldwise.show.report; print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
