"""Drift: nothing is found where nothing is, what was planted is found and named, and the figures are those of oracles.

Faces are drawn; runs are of the demo competition, with drawn probabilities in place of training.
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score

from foldwise.data.competition import load_dataset
from foldwise.data.demo import draw_face
from foldwise.data.duplicates import Pair
from foldwise.data.folds import Folds, write_folds
from foldwise.errors import DataError
from foldwise.records.store import Context, RunFolder, Unit
from foldwise.show import drift as module
from foldwise.show.drift import (
    auc_interval,
    compare_statistics,
    drift,
    drift_lines,
    file_facts,
    image_statistics,
    pixel_features,
    tell_apart,
    write_drift,
)

EMOTIONS = ("happy", "sad", "fear", "neutral")


@pytest.fixture(scope="module")
def faces():
    """400 drawn faces, all lit from the left; the last 100 are to be test images."""
    drawn = [draw_face(EMOTIONS[n % 4], np.random.default_rng([5, n])) for n in range(400)]
    light = np.linspace(1.15, 0.85, 48)
    return np.clip(np.stack(drawn) * light, 0, 255).astype(np.uint8)[..., None]


TEST = np.arange(400) >= 300
ALONE = np.arange(400)


def brighter(image):
    return np.clip(image.astype(int) + 15, 0, 255).astype(np.uint8)


def flatter(image):
    return np.clip((image.astype(float) - 128) * 0.8 + 128, 0, 255).astype(np.uint8)


def reencoded(image):
    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, "JPEG", quality=40)
    return np.asarray(Image.open(file))[..., None]


def mirrored(image):
    return image[:, ::-1]


def planted(faces, change):
    return np.concatenate([faces[:300], np.stack([change(image) for image in faces[300:]])])


def varied(statistics):
    return {"statistics": np.stack([v for v in statistics.values() if np.ptp(v) > 0], axis=1)}


@pytest.mark.parametrize(
    ("change", "name", "more"),
    [
        (brighter, "brightness", True),
        (flatter, "contrast", False),
        (reencoded, "blockiness", True),
        (mirrored, "right less left", True),
    ],
)
def test_a_planted_shift_is_found_and_named(faces, change, name, more):
    images = planted(faces, change)
    statistics = image_statistics(images)
    told = tell_apart(varied(statistics), TEST, ALONE, shuffles=99)
    assert told.looks[0].p == 0.01
    assert told.looks[0].auc.value > told.critical > 0.5
    assert told.looks[0].auc.low > 0.5
    compared, _ = compare_statistics(statistics, TEST, ALONE, shuffles=99)
    found = {one.name: one for one in compared if one.p < 0.05}
    assert name in found
    assert (found[name].test > found[name].train) == more == (found[name].auc.value > 0.5)


def test_pixels_alone_find_what_is_mirrored_and_what_is_moved(faces):
    for change in (mirrored, lambda image: np.roll(image, 2, axis=0)):
        told = tell_apart({"pixels": pixel_features(planted(faces, change))}, TEST, ALONE, shuffles=99)
        assert told.looks[0].p == 0.01


def test_faces_of_one_population_are_not_told_apart(faces):
    looks = {"pixels": pixel_features(faces), **varied(image_statistics(faces))}
    told = tell_apart(looks, TEST, ALONE, shuffles=99)
    assert min(look.p for look in told.looks) > 0.05
    for look in told.looks:
        assert look.auc.low < 0.5 < look.auc.high
        assert look.auc.value <= told.critical
    compared, _ = compare_statistics(image_statistics(faces), TEST, ALONE, shuffles=99)
    assert min(one.p for one in compared) > 0.05


def judged(seed, *, together):
    """Least p of two looks, and the first AUC's interval, where groups are alike and the sides drawn at random.

    Images of a group are almost the same, and all on one side.
    """
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(50), 3)
    first = rng.normal(size=(50, 8))[group] + 0.05 * rng.normal(size=(150, 8))
    test = rng.permutation(np.arange(50) < 13)[group]
    looks = {"a": first, "b": rng.normal(size=(150, 3))}
    told = tell_apart(looks, test, group if together else np.arange(150), seed=seed, shuffles=39)
    return min(look.p for look in told.looks), told.looks[0].auc


@pytest.mark.slow
def test_it_is_wrong_as_often_as_it_says_and_only_whole_groups_make_it_so():
    honest = [judged(seed, together=True) for seed in range(60)]
    # 39 shuffles make p <= 0.05 with probability 2 / 40; more than 8 of 60 has probability 0.003.
    assert sum(p <= 0.05 for p, _ in honest) <= 8
    assert sum(p > 0.5 for p, _ in honest) >= 15
    # 95 % of them should hold it; fewer than 52 of 60 has probability 0.003.
    assert sum(auc.low <= 0.5 <= auc.high for _, auc in honest) >= 52
    alone = [judged(seed, together=False) for seed in range(10)]
    # Were it wrong one time in 20 without groups too, 4 of 10 had probability 0.001.
    assert sum(p <= 0.05 for p, _ in alone) >= 4


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=12, max_size=40))
def test_the_auc_is_that_of_scikit_learn_and_its_error_that_of_delong(rows):
    scores = np.array([float(score) for score, _ in rows])
    test = np.array([side for _, side in rows])
    test[:4] = [True, True, False, False]
    whole = np.zeros((1, len(rows)), dtype=np.int64)
    auc = auc_interval(scores[None], test, np.arange(len(rows)), whole)
    assert auc.value == pytest.approx(roc_auc_score(test, scores))
    compared = (scores[test][:, None] > scores[~test]) + 0.5 * (scores[test][:, None] == scores[~test])
    error = compared.mean(axis=1).var(ddof=1) / test.sum() + compared.mean(axis=0).var(ddof=1) / (~test).sum()
    if 0.1 < auc.value < 0.9 and auc.low > 0 and auc.high < 1:
        beyond = 0.025 ** (1 / min(test.sum(), (~test).sum()))
        if 1 - beyond <= auc.value <= beyond:
            assert (auc.high - auc.low) / 2 == pytest.approx(1.959964 * np.sqrt(error), rel=1e-6)
    # Each image twice, the twins grouped, tells no more than once.
    twice = auc_interval(
        np.tile(scores, 2)[None], np.tile(test, 2), np.tile(np.arange(len(rows)), 2), np.tile(whole, 2)
    )
    assert twice.value == pytest.approx(auc.value)
    assert twice.high - twice.low >= 0.85 * (auc.high - auc.low)


def test_images_of_several_folds_are_compared_within_their_fold_only():
    fold = np.repeat([[0, 1]], 10, axis=1).reshape(1, -1)
    test = np.arange(20) % 4 < 2
    # Within each fold the test image is the larger; between folds the scales differ by far.
    scores = test + 100.0 * fold[0]
    assert auc_interval(scores[None], test, np.arange(20), fold).value == 1.0


def test_a_perfect_split_has_an_interval_all_the_same():
    test = np.arange(60) < 20
    auc = auc_interval(test[None].astype(float), test, np.arange(60), np.zeros((1, 60), dtype=np.int64))
    assert (auc.value, auc.high) == (1.0, 1.0)
    assert auc.low == pytest.approx(0.025 ** (1 / 20))


def test_statistics_are_what_they_are_called():
    flat = np.full((1, 48, 48, 1), 100, dtype=np.uint8)
    noise = np.clip(np.random.default_rng(0).normal(128, 10, (1, 48, 48, 1)), 0, 255).round().astype(np.uint8)
    half = np.zeros((1, 48, 48, 1), dtype=np.uint8)
    half[:, :, 24:] = 255
    of_flat, of_noise, of_half = (image_statistics(images) for images in (flat, noise, half))
    assert of_flat["brightness"] == 100
    assert of_flat["contrast"] == of_flat["noise"] == of_flat["blockiness"] == 0
    assert of_flat["gray levels"] == 1
    assert of_noise["noise"] == pytest.approx(10, rel=0.1)
    assert abs(of_noise["blockiness"]) < 0.2
    assert of_half["right less left"] == 255
    assert of_half["bottom less top"] == 0
    assert of_half["share of black"] == of_half["share of white"] == 0.5
    assert of_half["gray levels"] == 2
    red = np.zeros((1, 20, 30, 3), dtype=np.uint8)
    red[..., 0] = 90
    assert image_statistics(red)["red less green"] == image_statistics(red)["colourfulness"] == 90


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 50, 3), (48, 48, 1), (300, 20, 3)])
def test_images_of_any_shape_have_finite_features(shape):
    images = np.random.default_rng(1).integers(0, 256, (30, *shape)).astype(np.uint8)
    assert np.isfinite(pixel_features(images)).all()
    assert all(np.isfinite(values).all() for values in image_statistics(images).values())
    black = np.zeros((30, *shape), dtype=np.uint8)
    assert np.isfinite(pixel_features(black)).all()


def keep_run(root, name, *, skill=0.8, lean=0.0, folders=True):
    """Keep a run of the demo that was never trained; `lean` adds to the logit of the first class on test images."""
    data = load_dataset(root, "demo")
    labels, folds, classes = data.labels[data.labels >= 0], data.folds, data.competition.classes
    context = Context("demo", classes, {"kind": "kfold", "folds": 5}, folds.sha256, data.sha256)
    test_ids = data.ids[data.labels < 0][::-1]

    def draw(rng, truth, extra=0.0):
        logits = rng.normal(size=(len(truth), len(classes)))
        logits[np.arange(len(truth)), truth] += skill
        logits[:, 0] += extra
        return (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)

    numbers = np.unique(folds.fold).tolist()
    truth = np.random.default_rng(9).permutation(labels)[: len(test_ids)]
    with RunFolder.open(root / "oof" / name, spec={"name": name}, spec_yaml=f"name: {name}\n", context=context) as run:
        for number in numbers:
            rng = np.random.default_rng([number, len(name)])
            rows = np.flatnonzero(folds.fold == number)
            probs, test = draw(rng, labels[rows]), draw(rng, truth, lean)
            history = [{"epoch": 1, "lr": 0.1, "val_loss": 1.0}]
            run.save_unit(
                Unit(number, 42, folds.ids[rows], labels[rows], probs, test_ids, test, history, {"score": 0.5})
            )
        units = [(number, 42) for number in numbers]
        run.complete(units, folds=folds, labels=labels, metric=module.METRICS["accuracy"], info={"command": "make exp"})
    if not folders:
        for number in numbers:
            shutil.rmtree(root / "oof" / name / f"fold{number}")


@pytest.fixture(autouse=True)
def _few_shuffles(monkeypatch):
    """As many as tests need; the command itself takes more."""
    monkeypatch.setattr(module, "SHUFFLES", 199)
    monkeypatch.setattr(module, "_REPEATS", 2)


@pytest.fixture
def own_images(root):
    """The root, its images copied, and the cache made anew: the images may be changed."""
    folder = root / "inputs" / "demo"
    linked = (folder / "images").resolve()
    for name in ("images", "cache"):
        (folder / name).unlink()
    shutil.copytree(linked, folder / "images")
    return root


def test_a_competition_without_drift_is_told_so_with_its_uncertainty(root, figures):
    found = drift(root, "demo")
    lines = drift_lines(found)
    assert lines[0] == "demo: 140 training images against 30 test images"
    assert not found.found
    data = load_dataset(root, "demo")
    assert found.inputs_sha256 == data.sha256
    whole = image_statistics(data.images)["brightness"]
    brightness = next(one for one in found.statistics if one.name == "brightness")
    assert brightness.train == pytest.approx(whole[data.labels >= 0].mean())
    assert brightness.auc.value == pytest.approx(roc_auc_score(data.labels < 0, whole))
    together = found.looks[0]
    assert lines[-2] == (f"verdict  cannot tell test from training images: AUC {together.auc}, p = {together.p:.3f}")
    # With 30 test images only a large drift would show, and the verdict says so instead of promising too much.
    assert found.critical > 0.6
    assert lines[-1] == f"         but so few images show only a drift with an AUC above {found.critical:.2f}"
    assert "note: no complete k-fold run of these images: nothing is said of the classes on the test images" in lines
    assert [line for line in lines if not line.isascii() or len(line) > 120] == []

    first = write_drift(found, root)
    content = [path.read_bytes() for path in first]
    again = drift(root, "demo")
    assert [path.read_bytes() for path in write_drift(again, root)] == content
    record = json.loads(content[0])
    assert record["looks"][0]["auc"]["value"] == pytest.approx(together.auc.value, abs=5e-5)
    assert [line[9:] for line in lines[-2:]] == record["verdict"]
    assert "tiles" not in record
    texts = " ".join(text.get_text() for text in figures[0].findobj(match=lambda one: hasattr(one, "get_text")))
    assert "training → like test" in texts
    assert "test → like test" in texts


def test_test_files_of_another_encoding_are_found_with_what_differs(own_images):
    folder = own_images / "inputs" / "demo" / "images"
    for number in range(141, 171):
        path = folder / f"{number}.jpg"
        Image.open(path).save(path, quality=50)
    found = drift(own_images, "demo")
    assert found.found
    assert found.strongest.p == 0.005
    assert {"file size (bytes)", "JPEG quantisation"} <= {one.name for one in found.statistics if one.p < 0.05}
    lines = drift_lines(found)
    verdict = lines[lines.index(next(line for line in lines if line.startswith("verdict"))) :]
    assert verdict[0].startswith("verdict  can tell test from training images, by ")
    assert verdict[1] == "         OOF scores may not carry over"
    assert any(line.startswith("         JPEG quantisation: ") for line in verdict[2:])


def test_twins_of_training_images_are_grouped_with_them(own_images):
    folder = own_images / "inputs" / "demo" / "images"
    for number in range(141, 171):
        shutil.copy(folder / f"{number - 140}.jpg", folder / f"{number}.jpg")
    found = drift(own_images, "demo")
    assert found.across >= 30
    assert (
        f"{found.pairs} pairs of near-duplicates stay together, {found.across} of them across" in drift_lines(found)[1]
    )
    assert not found.found


def test_groups_of_folds_csv_are_kept_and_joined_by_pairs(root):
    data = load_dataset(root, "demo")
    group = data.folds.group.copy()
    group[:5] = group[0]
    folds = Folds(data.folds.ids, np.where(np.arange(140) < 5, 0, data.folds.fold), group)
    write_folds(root / "inputs" / "demo" / "folds.csv", [folds])
    data = load_dataset(root, "demo")
    grouped = module._groups(data, np.arange(170), [])
    assert len(set(grouped[:5].tolist())) == 1
    assert len(set(grouped.tolist())) == len(set(group.tolist())) + 30
    joined = module._groups(data, np.arange(170), [Pair(3, 160, 0.99)])
    assert joined[160] == joined[0] != grouped[160]
    assert len(set(joined.tolist())) == len(set(grouped.tolist())) - 1


def test_a_sample_is_drawn_of_many_images_and_told(root, monkeypatch):
    keep_run(root, "run")
    monkeypatch.setattr(module, "MOST_TRAIN", 60)
    monkeypatch.setattr(module, "MOST_TEST", 20)
    found = drift(root, "demo", seed=3)
    assert (found.n_train, found.n_test, found.all_train, found.all_test) == (60, 20, 140, 30)
    told = "60 training images (of 140, drawn with seed 3) against 20 test images (of 30, drawn with seed 3)"
    assert drift_lines(found)[0] == f"demo: {told}"
    # What the run predicted is joined by id, whatever the order of its rows.
    data, run = load_dataset(root, "demo"), module.list_runs(root, "demo")[0][0]
    sampled = data.ids[module._sampled(np.flatnonzero(data.labels < 0), 20, [3, 1])]
    of_sample = run.test_probs[np.isin(run.test_ids, sampled)]
    assert [share.test for share in found.seen.shares] == pytest.approx(of_sample.mean(axis=0))


def test_the_best_run_tells_of_the_classes(root):
    keep_run(root, "weak", skill=0.1)
    keep_run(root, "good", skill=2.0)
    seen = drift(root, "demo").seen
    assert seen is not None
    assert seen.run == "good"
    assert sum(share.labelled for share in seen.shares) == pytest.approx(1)
    assert all(share.low <= share.test - share.oof <= share.high for share in seen.shares)
    run = module.list_runs(root, "demo")[0][0]
    for index, share in enumerate(seen.shares):
        assert share.oof == pytest.approx(run.probs[:, index].mean())
        assert share.test == pytest.approx(run.test_probs[:, index].mean())
    assert seen.p > 0.05
    assert seen.averaged == 1
    # The folds' own models are as sure of test images as of their own fold's, while their mean is less so.
    assert seen.low < 0 < seen.high
    for number in np.unique(run.fold):
        shutil.rmtree(run.path / f"fold{number}")
    found = drift(root, "demo")
    assert found.seen.averaged == 5
    assert found.seen.test_confidence == pytest.approx(run.test_probs.max(axis=1).mean())
    assert found.seen.test_confidence < seen.test_confidence
    assert any("test.csv is the mean of 5 models, which lowers it" in line for line in drift_lines(found))


def test_other_classes_on_the_test_images_are_told(root):
    keep_run(root, "leaning", lean=1.5, folders=False)
    found = drift(root, "demo")
    first = found.seen.shares[0]
    assert first.low > 0
    assert found.seen.p < 0.05
    told = f"         leaning sees other shares of the classes in test images, p = {found.seen.p:.3f}"
    assert drift_lines(found)[-1] == told


def test_file_facts_are_of_the_files(root):
    data = load_dataset(root, "demo")
    folder = root / "inputs" / "demo" / "images"
    facts = file_facts(folder, data.competition, ["7", "3"])
    assert facts["file size (bytes)"].tolist() == [(folder / f"{n}.jpg").stat().st_size for n in (7, 3)]
    assert facts["height handed out"].tolist() == facts["width handed out"].tolist() == [48, 48]
    assert facts["channels"].tolist() == [1, 1]


def test_what_cannot_be_compared_is_refused(root, tmp_path):
    with pytest.raises(DataError, match="there is no such file"):
        drift(tmp_path, "nowhere")
    rows = (root / "inputs" / "demo" / "train.csv").read_text().splitlines()
    data = load_dataset(root, "demo")
    for labelled, counted in ((170, "no test images"), (165, "5 test images"), (169, "1 test image")):
        ids = [str(number) for number in range(1, labelled + 1)]
        (root / "inputs" / "demo" / "train.csv").write_text(
            "\n".join([*rows, *(f"{image},happy" for image in ids[140:])]) + "\n"
        )
        fold, group = (list(values) for values in (data.folds.fold, data.folds.group))
        fold += [0] * (labelled - 140)
        group += ids[140:]
        write_folds(root / "inputs" / "demo" / "folds.csv", [Folds(np.array(ids), np.array(fold), np.array(group))])
        with pytest.raises(DataError) as raised:
            drift(root, "demo")
        assert str(raised.value) == (
            f"inputs/demo: has {counted}, twins counted once; to tell training from test images takes 10 of each\n"
            "  fix: take in a hand-out with unlabelled images to predict, or a labelled test part (`split.test`)\n"
            "1 error; nothing was written."
        )


def test_a_labelled_test_part_counts_as_test_images(root):
    data = load_dataset(root, "demo")
    fold = np.where(np.arange(140) < 20, module.SCORED_ONLY, data.folds.fold)
    parted = replace(data, folds=Folds(data.folds.ids, fold, data.folds.group))
    train, test = module._sides(parted)
    assert data.ids[train].tolist() == [str(number) for number in range(21, 141)]
    assert data.ids[test].tolist() == [str(number) for number in [*range(1, 21), *range(141, 171)]]
