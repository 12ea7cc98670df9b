"""The leak guard sees through what was promised, leaves other pictures alone, and keeps what it found."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leak_recall import BEYOND, PROMISED

from foldwise.data.competition import load_dataset
from foldwise.data.folds import Folds
from foldwise.data.ingest import ingest
from foldwise.data.leaks import THRESHOLD, Likeness, _banded, _gray, _grids, _on_grid, likeness, nearest_copies
from foldwise.data.stacked import Selected, Stacked

REPO = Path(__file__).resolve().parents[2]
SHARED = REPO / ".." / "shared" / "data"


def textures(count, seed, side=48):
    """Pictures with something at every scale, as photographs have; (count, side, side, 1) uint8."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    amplitude = 1 / np.maximum(frequency, 1 / side) ** 1.2
    spectrum = np.fft.rfft2(rng.standard_normal((count, side, side))) * amplitude
    pictures = np.fft.irfft2(spectrum, s=(side, side))
    pictures -= pictures.mean(axis=(1, 2), keepdims=True)
    return np.clip(128 + 45 * pictures / pictures.std(axis=(1, 2), keepdims=True), 0, 255).astype(np.uint8)[..., None]


OTHERS = textures(40, 1)
ROWS = np.arange(0, 40, 4)


@pytest.fixture(scope="module")
def found():
    """By change: the partners found for its copies of every fourth picture, and the similarities."""
    changes = PROMISED | BEYOND
    copies = [np.stack([change(OTHERS[row, :, :, 0]) for row in ROWS])[..., None] for change in changes.values()]
    partner, similarity = nearest_copies(Stacked(copies), OTHERS)
    pairs = zip(np.split(partner, len(changes)), np.split(similarity, len(changes)), strict=True)
    return dict(zip(changes, pairs, strict=True))


@pytest.mark.parametrize("change", PROMISED)
def test_what_is_promised_is_found(found, change):
    partner, similarity = found[change]
    assert partner.tolist() == ROWS.tolist()
    assert similarity.min() >= THRESHOLD


@pytest.mark.parametrize("change", ["cropped by 8 px a side", "lower half covered"])
def test_the_limits_are_where_they_are_said_to_be(found, change):
    _, similarity = found[change]
    assert np.median(similarity) < THRESHOLD


def test_colours_and_larger_sizes_are_compared_as_they_are():
    large = np.repeat(np.repeat(OTHERS[ROWS], 2, axis=1), 2, axis=2)
    partner, similarity = nearest_copies(np.repeat(large, 3, axis=-1), OTHERS)
    assert partner.tolist() == ROWS.tolist()
    assert similarity.min() > 0.99


def test_different_pictures_are_no_copies():
    _, similarity = nearest_copies(textures(60, 2), OTHERS)
    assert similarity.max() < THRESHOLD - 0.1


def test_an_image_itself_is_its_own_copy():
    partner, similarity = nearest_copies(OTHERS, OTHERS)
    assert partner.tolist() == list(range(40))
    assert similarity == pytest.approx(1, abs=1e-5)
    assert similarity.max() <= 1


def test_a_constant_image_is_like_nothing():
    flat = np.stack([np.full((48, 48, 1), value, np.uint8) for value in (0, 128, 255)])
    assert nearest_copies(flat, OTHERS)[1].tolist() == [0, 0, 0]
    assert nearest_copies(flat, flat)[1].tolist() == [0, 0, 0]
    assert nearest_copies(OTHERS[:2], flat)[1].tolist() == [0, 0]


def test_a_picture_whose_middle_is_constant_is_compared_all_the_same():
    """What is left of its correlation with a flat window must not come out as likeness."""
    framed = OTHERS[:6].copy()
    framed[:, 5:43, 5:43] = 90
    _, similarity = nearest_copies(framed, OTHERS[6:])
    assert similarity.max() < THRESHOLD


def test_no_images_have_no_copies():
    partner, similarity = nearest_copies(OTHERS[:0], OTHERS)
    assert partner.shape == similarity.shape == (0,)


MIXED = np.concatenate([textures(5, 3), OTHERS[3:6], OTHERS[2:4, :, ::-1], np.full((1, 48, 48, 1), 7, np.uint8)])
ALONE = nearest_copies(MIXED, OTHERS[:8])


@settings(max_examples=12)
@given(block=st.integers(1, 12), order=st.permutations(range(len(MIXED))))
def test_neither_blocks_nor_order_matter(block, order):
    partner, similarity = nearest_copies(Selected(MIXED, np.array(order)), OTHERS[:8], block=block)
    textured = MIXED[order].std(axis=(1, 2, 3)) > 0
    np.testing.assert_array_equal(partner[textured], ALONE[0][order][textured])
    np.testing.assert_allclose(similarity, ALONE[1][order], atol=1e-6)


def test_a_copy_is_found_behind_one_that_is_likelier_by_the_grid():
    original = textures(1, 11)
    copy = np.roll(original, (2, -2), (1, 2))
    # The same twelve by twelve cells, with other detail inside them.
    cells = original[0, :, :, 0].reshape(12, 4, 12, 4).mean((1, 3))
    detail = np.tile(np.array([[60, -60], [-60, 60]]), (24, 24))
    decoy = np.clip(np.kron(cells, np.ones((4, 4))) + detail, 0, 255).astype(np.uint8)[None, :, :, None]
    likeliest = _on_grid(_banded(_gray(original)), list(_grids(_gray(np.concatenate([decoy, copy])))))[1]
    assert likeliest[0].tolist() == [0, 1]
    partner, similarity = nearest_copies(original, np.concatenate([decoy, copy]))
    assert partner.tolist() == [1]
    assert similarity[0] > 0.95


def test_copies_are_counted_from_the_threshold_up():
    values = np.array([-0.2, 0.8499, 0.85, 0.8999, 0.9, 0.95, 0.98, 1.0], np.float32)
    ids = np.array([f"i{row}" for row in range(len(values))])
    like = Likeness(ids, ids, values)
    assert like.copies.tolist() == [False, False, *[True] * 6]
    assert like.counts() == {"0.85 to 0.90": 2, "0.90 to 0.95": 1, "0.95 to 0.98": 1, "0.98 and more": 2}


@pytest.fixture
def sets(demo_root):
    """The demo as a competition, and 12 of its images, mirrored, among 8 textures as what comes from elsewhere."""
    demo = load_dataset(demo_root, "demo")
    images = np.concatenate([demo.images[:12, :, ::-1], textures(8, 5)])
    elsewhere = replace(
        demo,
        competition=demo.competition.model_copy(update={"name": "elsewhere"}),
        images=images,
        ids=np.array([f"e{row}" for row in range(20)]),
        labels=np.zeros(20, np.int64),
        sha256="e" * 64,
    )
    return elsewhere, demo


def test_what_was_found_is_kept_until_either_side_changes(sets, tmp_path):
    elsewhere, demo = sets
    said = []
    first = likeness(elsewhere, demo, tmp_path, say=said.append)
    assert said == ["leak guard: compares 20 images of elsewhere with 170 of demo, once"]
    assert first.copies.tolist() == [True] * 12 + [False] * 8
    (path,) = (tmp_path / "inputs" / "elsewhere" / "cache").iterdir()

    again = likeness(elsewhere, demo, tmp_path, say=said.append)
    assert len(said) == 1
    np.testing.assert_array_equal(again.nearest, first.nearest)
    assert again.similarity.tobytes() == first.similarity.tobytes()

    likeness(replace(elsewhere, sha256="f" * 64), demo, tmp_path, say=said.append)
    likeness(elsewhere, replace(demo, sha256="d" * 64), tmp_path, say=said.append)
    assert len(said) == 3

    # What somebody's editor left behind is no answer, nor are the ids of another set.
    whole = path.read_text()
    for spoilt in ("", whole.replace(",", ";"), whole.replace("e3,", "x3,"), whole + "e20\n", whole[:21]):
        path.write_text(spoilt)
        likeness(elsewhere, demo, tmp_path, say=said.append)
        assert path.read_text() == whole
    assert len(said) == 8


def test_near_duplicates_in_a_source_are_copies_together(sets, tmp_path):
    elsewhere, demo = sets
    apart = likeness(elsewhere, demo, tmp_path / "apart")
    group = [f"g{row}" if row > 2 else "g0" for row in range(20)]  # a texture joins the copies of two images
    group[15] = "g0"
    folds = Folds(elsewhere.ids, np.zeros(20, np.int64), np.array(group))
    together = likeness(replace(elsewhere, folds=folds), demo, tmp_path / "together")
    assert not apart.copies[15]
    assert together.copies[15]
    assert len({(together.nearest[row], together.similarity[row]) for row in (0, 1, 2, 15)}) == 1
    others = [row for row in range(20) if row not in (0, 1, 2, 15)]
    np.testing.assert_array_equal(together.similarity[others], apart.similarity[others])


def test_the_kept_table_names_partners_by_id(sets, tmp_path):
    elsewhere, demo = sets
    likeness(elsewhere, demo, tmp_path)
    (path,) = (tmp_path / "inputs" / "elsewhere" / "cache").iterdir()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == elsewhere.ids.tolist()
    # The demo holds pictures twice: the partner is the very image or its twin, which both have its pixels.
    row_of = {image: row for row, image in enumerate(demo.ids.tolist())}
    for row, line in enumerate(rows[:12]):
        theirs, ours = elsewhere.images[row, :, ::-1], demo.images[row_of[line["nearest"]]]
        assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.98


@pytest.mark.slow
def test_fer2013_is_cleaned_of_the_competition(tmp_path):
    """Every twelfth image of FER2013: some 230 are copies to the pixel, and none is left either way round."""
    for path in (SHARED / "aspicv", SHARED / "fer2013" / "fer2013.csv.gz"):
        if not path.exists():
            pytest.skip(f"the data is not beside the checkout (../shared/data/{path.relative_to(SHARED)})")
    (tmp_path / "inputs" / "aspicv").mkdir(parents=True)
    for name in ("competition.yaml", "folds.csv"):
        shutil.copy(REPO / "inputs" / "aspicv" / name, tmp_path / "inputs" / "aspicv")
    ingest(SHARED / "aspicv", tmp_path, "aspicv")
    competition = load_dataset(tmp_path, "aspicv")
    table = pd.read_csv(SHARED / "fer2013" / "fer2013.csv.gz").iloc[::12]
    faces = np.stack([np.array(pixels.split(), np.uint8) for pixels in table["pixels"]]).reshape(-1, 48, 48, 1)
    partner, similarity = nearest_copies(faces, competition.images)
    same = similarity >= 0.98
    assert 200 <= same.sum() <= 260
    assert 280 <= (similarity >= THRESHOLD).sum() <= 350
    # Labels agree for the most part, or these would be other pictures; those of the test images nobody has.
    classes = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
    known = same & (competition.labels[partner] >= 0)
    theirs = np.array(classes)[table["emotion"].to_numpy()[known]]
    ours = np.array(competition.competition.classes)[competition.labels[partner[known]]]
    assert (theirs == ours).mean() > 0.9
    sample = np.arange(0, len(competition.ids), 10)
    _, backwards = nearest_copies(competition.images[sample], faces[similarity < THRESHOLD])
    assert (backwards >= 0.9).sum() == 0
    assert (backwards >= THRESHOLD).mean() <= 0.01
