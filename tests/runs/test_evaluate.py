"""Scoring a kept run on other sets: recomputed from predictions.csv; what the run was trained on never counts."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from foldwise.data.competition import load_dataset
from foldwise.data.demo import draw_face
from foldwise.data.ingest import ingest
from foldwise.data.labelled import read_labelled
from foldwise.data.leaks import THRESHOLD
from foldwise.errors import DataError, FoldwiseError, RecordError
from foldwise.files import sha256_file
from foldwise.learn.device import pick_runtime
from foldwise.records.store import load_run
from foldwise.runs import evaluate as module
from foldwise.runs.evaluate import Evaluation, evaluate
from foldwise.runs.kept import kept_models
from foldwise.show.report import evaluation_lines, write_evaluation

RUNTIME = pick_runtime("cpu", "fp32", 1)
CLASSES = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")


def new_faces(folder: Path, each: int = 4, size: int = 48, mode: str = "L") -> str:
    for number, emotion in enumerate(CLASSES):
        for copy in range(each):
            face = Image.fromarray(draw_face(emotion, np.random.default_rng([5, number, copy])))
            path = folder / emotion / f"{emotion}{copy}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            face.resize((size, size)).convert(mode).save(path)
    return str(folder)


def trained_on(project: Any, folder: Path, wanted: slice, *, labelled: bool = True) -> list[str]:
    """Deliver some of the run's own images anew, as JPEG of another quality, under other names."""
    data = load_dataset(project.root, "demo")
    rows = np.flatnonzero((data.labels >= 0) == labelled)[wanted]
    for row in rows.tolist():
        path = folder / data.competition.classes[data.labels[row]] / f"own{data.ids[row]}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = io.BytesIO()
        Image.fromarray(data.images[row, :, :, 0]).save(raw, "JPEG", quality=90)
        path.write_bytes(raw.getvalue())
    return [f"own{image}" for image in data.ids[rows].tolist()]


def score(project: Any, on: str, name: str = "tiny", **options: Any) -> Evaluation:
    return evaluate(project.root, name, on, runtime=RUNTIME, **options)


def table(found: Evaluation) -> pd.DataFrame:
    return pd.read_csv(found.path / "predictions.csv", dtype={"id": str, "twin": str}, keep_default_na=False)


def recomputed(rows: pd.DataFrame) -> float:
    probs = rows.filter(like="p_")
    return float((probs.idxmax(axis=1).str.removeprefix("p_") == rows["label"]).mean())


@pytest.fixture(scope="module")
def mine(kept: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy of the project with the complete run `tiny`, for all tests here to evaluate in."""
    return type(kept)(shutil.copytree(kept.root, tmp_path_factory.mktemp("evaluate") / "project"))


def test_new_faces_are_scored_as_predictions_csv_reads(mine: Any, tmp_path: Path) -> None:
    found = score(mine, new_faces(tmp_path / "New Faces"))
    assert found.path == mine.path() / "eval" / "new_faces"
    info, rows = json.loads((found.path / "eval.json").read_text()), table(found)
    assert info == found.info
    assert list(rows.columns) == ["id", "label", "twin", *(f"p_{name}" for name in CLASSES)]
    assert info["score"] == recomputed(rows) == pytest.approx((found.probs.argmax(1) == found.labels).mean())
    assert (info["n_scored"], info["n_images"], set(rows["twin"])) == (28, 28, {""})
    assert info["class_counts"] == rows["label"].value_counts().reindex(CLASSES).to_dict()
    twins = info["twins"]
    assert (twins["checked"], twins["threshold"], twins["n"], twins["naive_score"]) == (True, 0.98, 0, None)
    data = load_dataset(mine.root, "demo")
    flat = [x.reshape(len(x), -1).astype(float) for x in (found.images, data.images[data.labels >= 0])]
    assert twins["closest"] == pytest.approx(np.corrcoef(*flat)[:28, 28:].max(), abs=1e-5)
    assert evaluation_lines(found, mine.root)[-1] == "written      oof/tiny/eval/new_faces"
    low, high = info["interval"]
    assert low < info["score"] < high
    # Of independent images it is the binomial's, up to the draws.
    assert info["standard_error"] == pytest.approx((info["score"] * (1 - info["score"]) / 28) ** 0.5, rel=0.1)
    assert info["hashes"]["predictions"] == sha256_file(found.path / "predictions.csv")
    assert info["hashes"]["weights"] == load_run(mine.path()).info["weights"]
    assert info["notes"] == []


def test_the_probabilities_are_the_mean_over_all_units(mine: Any, tmp_path: Path) -> None:
    found = score(mine, new_faces(tmp_path / "mean", each=1))
    spec = load_dataset(mine.root, "demo").competition
    images = read_labelled(str(tmp_path / "mean"), root=mine.root, competition=spec, class_map={}).images
    each = [model.probabilities(images) for model in kept_models(load_run(mine.path()), RUNTIME)]
    assert found.info["units"] == len(each) == 5
    np.testing.assert_allclose(found.probs, np.mean(each, axis=0), atol=1e-6)


def test_images_that_were_trained_on_are_told_and_do_not_count(mine: Any, tmp_path: Path) -> None:
    on = new_faces(tmp_path / "half")
    own = trained_on(mine, tmp_path / "half", slice(0, 30))
    found = score(mine, on)
    rows = table(found).set_index("id")
    assert sorted(rows.index[rows["twin"] != ""]) == sorted(own)
    # A twin within the competition may come first; its picture is the same.
    assert (rows["twin"].loc[own] == [name.removeprefix("own") for name in own]).mean() > 0.9
    info = found.info
    assert (info["n_scored"], info["twins"]["n"], info["n_images"]) == (28, 30, 58)
    assert info["score"] == recomputed(rows[rows["twin"] == ""])
    assert info["twins"]["naive_score"] == recomputed(rows)
    lines = evaluation_lines(found, mine.root)
    assert "twins        30 of 58 images are left out: the run may have been trained on them" in lines
    assert f"naive        {recomputed(rows):.4f} (with the twins: not to be trusted)" in lines


@pytest.mark.parametrize(("marks", "twins"), [([], 0), (["transductive"], 12)])
def test_unlabelled_images_do_not_count_where_teachers_labelled_them(
    resumable: Any, tmp_path: Path, marks: list[str], twins: int
) -> None:
    record = resumable.path() / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"marks": marks}))
    on = new_faces(tmp_path / "half")
    trained_on(resumable, tmp_path / "half", slice(0, 12), labelled=False)
    assert score(resumable, on).info["twins"]["n"] == twins


def test_the_training_images_again_are_refused(mine: Any, tmp_path: Path) -> None:
    trained_on(mine, tmp_path / "again", slice(None))
    with pytest.raises(DataError) as caught:
        score(mine, str(tmp_path / "again"))
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/again: all 140 images are near-duplicates of images that tiny may have been trained on",
        "  fix: score it on images that it has not seen",
        "1 error; nothing was written.",
    ]
    assert not (mine.path() / "eval" / "again").exists()


def test_its_own_competition_is_refused(mine: Any) -> None:
    out_of_fold = load_run(mine.path()).info["score"]
    for on in ("demo", str(mine.root / "inputs" / "demo")):
        with pytest.raises(RecordError) as caught:
            score(mine, on)
        assert str(caught.value).splitlines()[:2] == [
            "oof/tiny: was trained on demo",
            f"  fix: its score there is the out-of-fold one of run.json (accuracy {out_of_fold:.4f}); give another set",
        ]


def test_without_the_competition_nothing_is_checked_and_that_is_said(resumable: Any, tmp_path: Path) -> None:
    (resumable.root / "inputs" / "demo" / "train.csv").unlink()
    run_json = resumable.path() / "run.json"
    record = json.loads(run_json.read_text())
    run_json.write_text(json.dumps(record | {"external": ["faces-of-elsewhere"]}))
    found = score(resumable, new_faces(tmp_path / "new", each=1), called="mine")
    assert found.path.name == "mine"
    assert found.info["twins"]["checked"] is False
    assert found.info["external"] == {"used": ["faces-of-elsewhere"], "checked": False, "threshold": THRESHOLD}
    assert found.info["notes"] == [
        "NOT CHECKED whether the run was trained on some of these images: demo was not taken in on this machine",
        "NOT CHECKED against the external data of the run, faces-of-elsewhere: the record does not say which images "
        "these are",
    ]
    assert sum("NOT CHECKED" in line for line in evaluation_lines(found, resumable.root)) == 2


def textured(folder: Path, seed: int, count: int, *, mirrored: bool = False) -> str:
    """Images of smooth noise, two of which resemble each other less than two drawn faces do."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = cv2.GaussianBlur(rng.normal(size=(48, 48)), (0, 0), 2)
        image = Image.fromarray((128 + 45 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))
        path = folder / CLASSES[number % 7] / f"s{seed}_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image).save(path)
    return str(folder)


def test_copies_of_external_images_do_not_count_where_the_source_is_here(
    resumable: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resumable.root / "inputs" / "elsewhere"
    folder.mkdir()
    described = f"name: elsewhere\nclasses: [{', '.join(CLASSES)}]\nsplit: {{kind: full}}\n"
    (folder / "competition.yaml").write_text(f"{described}image: {{height: 48, width: 48, channels: 1}}\n")
    ingest(Path(textured(tmp_path / "handout", 1, 21)), resumable.root, "elsewhere")
    run_json = resumable.path() / "run.json"
    record = json.loads(run_json.read_text())

    def started_from(sha256: str) -> None:
        entry = {"source": "elsewhere", "by": "run:pre", "inputs_sha256": sha256}
        run_json.write_text(json.dumps(record | {"external": [entry]}))

    started_from(load_dataset(resumable.root, "elsewhere").sha256)
    # So that the nearest image of all is found across blocks.
    monkeypatch.setattr(module, "_BLOCK", 5)
    on = textured(tmp_path / "mixed", 2, 14)
    textured(tmp_path / "mixed", 1, 6, mirrored=True)
    found = score(resumable, on)
    rows = table(found).set_index("id")
    pairs = rows["twin"][rows["twin"] != ""]
    assert sorted(pairs.index) == [f"s1_{number}" for number in range(6)]
    source = load_dataset(resumable.root, "elsewhere")
    for image, twin in pairs.items():
        pixels = source.images[source.ids.tolist().index(twin.removeprefix("elsewhere:"))][..., 0]
        with Image.open(next((tmp_path / "mixed").glob(f"*/{image}.png"))) as copy:
            np.testing.assert_array_equal(pixels, np.asarray(copy)[:, ::-1])
    assert (found.info["n_scored"], found.info["external"]["checked"]) == (14, True)
    words = "checked against the external data of the run, elsewhere (by run:pre)"
    assert found.info["notes"] == [f"{words}: 6 of 20 images are copies of these and do not count"]
    (note,) = score(resumable, textured(tmp_path / "others", 3, 7)).info["notes"]
    assert re.fullmatch(
        re.escape(words) + r": no image is a copy of these \(similarity up to 0\.\d\d, below 0\.85\)", note
    )

    started_from("ab" * 32)
    unchecked = score(resumable, on).info
    assert (unchecked["n_scored"], unchecked["external"]["checked"]) == (20, False)
    assert unchecked["notes"] == [
        "NOT CHECKED against the external data of the run, elsewhere (by run:pre): the images or labels of elsewhere "
        "are not those of the run"
    ]


def test_a_competition_that_changed_since_is_refused_or_said(resumable: Any, tmp_path: Path) -> None:
    on = new_faces(tmp_path / "new", each=1)
    labels = resumable.root / "inputs" / "demo" / "train.csv"
    before = labels.read_text()
    first = before.splitlines()[1]
    other = "happy" if first.endswith("sad") else "sad"
    labels.write_text(before.replace(first, f"{first.split(',')[0]},{other}", 1))
    assert score(resumable, on).info["notes"] == [
        "NOT CHECKED whether the run was trained on some of these images: "
        "the images or labels of demo are not those of the run"
    ]
    described = resumable.root / "inputs" / "demo" / "competition.yaml"
    described.write_text(described.read_text().replace("disgust", "disdain"))
    with pytest.raises(RecordError, match=r"gives the classes .*disdain.* but tiny was trained with .*disgust"):
        score(resumable, on)


def test_other_sizes_and_colour_are_scored_and_noted(mine: Any, tmp_path: Path) -> None:
    found = score(mine, new_faces(tmp_path / "large", each=1, size=72, mode="RGB"), called="large")
    assert found.images.shape == (7, 48, 48, 1)
    assert found.info["notes"] == ["squashed to 48x48 px, from other sizes: 7 images", "converted to gray: 7 images"]


def test_names(mine: Any, tmp_path: Path) -> None:
    on = new_faces(tmp_path / "Größe (2)" / "test", each=1)
    assert score(mine, str(Path(on).parent), part="test").path.name == "gr_e_2_-test"
    with pytest.raises(FoldwiseError, match="an evaluation's name must be of lower-case letters"):
        score(mine, on, called="../elsewhere")


@pytest.mark.slow
def test_a_holdout_run_of_merged_classes(project: Any, tmp_path: Path) -> None:
    project.describe("split: {kind: holdout, share: 0.2, seed: 1}")
    label_map = {name: "good" if name in ("happy", "surprise") else "other" for name in CLASSES}
    project.run(project.spec("merged").model_copy(update={"label_map": label_map}))
    found = score(project, new_faces(tmp_path / "new"), "merged", class_map={"fear": None})
    rows = table(found)
    assert list(rows.columns[3:]) == ["p_other", "p_good"]
    assert dict(rows["label"].value_counts()) == {"other": 16, "good": 8}
    assert found.info["score"] == recomputed(rows)
    assert (found.info["units"], found.info["class_map"]) == (1, {"fear": None})
    assert found.info["notes"] == ["left out, as the class map says: 4 of 'fear'"]


@pytest.mark.slow
def test_its_report_is_of_the_images_that_count(mine: Any, tmp_path: Path) -> None:
    on = new_faces(tmp_path / "report")
    trained_on(mine, tmp_path / "report", slice(0, 5))
    found = score(mine, on)
    report = write_evaluation(found)
    assert sorted(path.name for path in report.files) == [
        "calibration.png",
        "classification_report.csv",
        "classification_report.txt",
        "confusion.png",
        "mistakes.png",
    ]
    assert all(path.parent == found.path and path.stat().st_size for path in report.files)
    classes = pd.read_csv(found.path / "classification_report.csv").set_index("class")
    assert int(classes.loc["macro avg", "support"]) == 28
    text = (found.path / "classification_report.txt").read_text()
    assert text.startswith("tiny on report: 28 images, 5 twins of trained-on ones left out\n")
    assert f"with the twins       {found.info['twins']['naive_score']:.4f} (not to be trusted)" in text
    before = {path: path.read_bytes() for path in report.files}
    assert {path: path.read_bytes() for path in write_evaluation(score(mine, on)).files} == before
