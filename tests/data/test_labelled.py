"""A labelled set read in a competition's classes and form: what is mapped, left out, squashed, converted, refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from foldwise.data.competition import load_competition, load_dataset
from foldwise.data.demo import draw_face
from foldwise.data.labelled import ingested_name, parse_class_map, read_labelled
from foldwise.errors import DataError, FoldwiseError


def deliver(folder, classes, each=2, size=48, mode="L", suffix="png"):
    """New faces, one folder a class, {folder: emotion}."""
    for number, (label, emotion) in enumerate(classes.items()):
        for copy in range(each):
            face = Image.fromarray(draw_face(emotion, np.random.default_rng([99, number, copy])))
            path = folder / label / f"{label}{copy}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            face.resize((size, size)).convert(mode).save(path)
    return str(folder)


@pytest.fixture
def read(demo_root):
    def of(on, class_map=None, part=None):
        competition = load_competition(demo_root, "demo")
        return read_labelled(on, root=demo_root, competition=competition, class_map=class_map or {}, part=part)

    return of


def refused(read, *args, **kwargs):
    with pytest.raises(DataError) as caught:
        read(*args, **kwargs)
    return str(caught.value)


def test_class_folders_are_read_with_their_classes_mapped_and_left_out(read, demo_root, tmp_path):
    on = deliver(tmp_path / "set", {"happy": "happy", "sadness": "sad", "contempt": "disgust"})
    found = read(on, {"sadness": "sad", "contempt": None, "awe": None})
    classes = load_competition(demo_root, "demo").classes
    assert [(i, classes[n]) for i, n in zip(found.ids.tolist(), found.labels.tolist(), strict=True)] == [
        ("happy0", "happy"),
        ("happy1", "happy"),
        ("sadness0", "sad"),
        ("sadness1", "sad"),
    ]
    for image, pixels in zip(found.ids.tolist(), found.images, strict=True):
        with Image.open(tmp_path / "set" / image[:-1] / f"{image}.png") as file:
            np.testing.assert_array_equal(pixels[..., 0], np.asarray(file))
    assert found.notes[-2:] == (
        "left out, as the class map says: 2 of 'contempt'",
        "the class map names 'awe', of which there is no image",
    )


def test_other_sizes_and_colours_are_brought_to_the_form_and_counted(read, tmp_path):
    deliver(tmp_path / "set", {"happy": "happy", "sad": "sad"})
    plain = read(str(tmp_path / "set"))
    deliver(tmp_path / "set", {"happy": "happy"}, size=96, mode="RGB")
    found = read(str(tmp_path / "set"))
    assert found.images.shape == (4, 48, 48, 1)
    assert found.images.dtype == np.uint8
    np.testing.assert_array_equal(found.images[2:], plain.images[2:])
    # Twice the size and back is the same face.
    assert np.corrcoef(found.images[0].ravel(), plain.images[0].ravel())[0, 1] > 0.98
    assert found.notes[-2:] == ("squashed to 48x48 px, from other sizes: 2 images", "converted to gray: 2 images")
    assert found.sha256 != plain.sha256


def test_the_hash_is_of_what_is_there_not_of_how_it_lies(read, tmp_path):
    png = read(deliver(tmp_path / "png", {"happy": "happy", "sad": "sad"}))
    bmp = read(deliver(tmp_path / "bmp", {"happy": "happy", "sad": "sad"}, suffix="bmp"))
    assert png.sha256 == bmp.sha256


def test_one_part_alone(read, tmp_path):
    deliver(tmp_path / "set" / "train", {"happy": "happy", "sad": "sad"})
    deliver(tmp_path / "set" / "test", {"happy": "fear", "sad": "angry"}, each=3)
    assert len(read(str(tmp_path / "set")).ids) == 10
    assert len(read(str(tmp_path / "set"), part="test").ids) == 6
    assert "unknown part 'tset' (did you mean 'test'?)\n  fix: parts there: train, test" in refused(
        read, str(tmp_path / "set"), part="tset"
    )


def test_a_set_without_parts_has_none_to_choose(read, tmp_path):
    on = deliver(tmp_path / "set", {"happy": "happy", "sad": "sad"})
    assert "has no parts, but 'test' is asked for\n  fix: leave the part out" in refused(read, on, part="test")


def test_a_competition_is_read_as_it_was_taken_in(read, demo_root):
    found, data = read("demo"), load_dataset(demo_root, "demo")
    known = data.labels >= 0
    np.testing.assert_array_equal(found.ids, data.ids[known])
    np.testing.assert_array_equal(found.labels, data.labels[known])
    np.testing.assert_array_equal(found.images, data.images[known])
    assert found.notes[-1] == "unlabelled images, which do not count: 30"


def test_what_names_a_competition(demo_root, tmp_path, monkeypatch):
    monkeypatch.chdir(demo_root)
    assert ingested_name("demo", demo_root) == "demo"
    assert ingested_name("inputs/demo", demo_root) == "demo"
    assert ingested_name(str(demo_root / "inputs" / "demo"), demo_root) == "demo"
    assert ingested_name("handout", demo_root) is None
    assert ingested_name(str(tmp_path), demo_root) is None


def test_all_wrong_classes_are_told_at_once(read, tmp_path):
    on = deliver(tmp_path / "set", {"hapy": "happy", "sad": "sad", "awe": "fear"})
    assert refused(read, on, {"sad": "sadd"}).splitlines() == [
        "MAP sad=sadd: unknown class 'sadd' (did you mean 'sad'?)",
        "  fix: the competition's classes are: angry, disgust, fear, happy, neutral, sad, surprise",
        f"{on}: classes that are neither mapped nor the competition's: 'awe' (2 images), "
        "'hapy' (2 images; did you mean 'happy'?)",
        '  fix: map them, MAP="awe=<class> ...", or to nothing to leave them out ("awe="); '
        "the competition's classes are: angry, disgust, fear, happy, neutral, sad, surprise",
        "2 errors; nothing was written.",
    ]


def test_nothing_left_and_nothing_there_are_refused(read, tmp_path):
    on = deliver(tmp_path / "set", {"hapy": "happy", "sad": "sad"})
    assert "there is no labelled image of the competition's classes" in refused(read, on, {"hapy": None, "sad": None})
    assert refused(read, "nowhere").splitlines()[:2] == [
        "ON=nowhere: there is no such competition, and no such folder",
        "  fix: give a folder, hf:<owner/name>, or one of the competitions here: demo",
    ]


def test_a_damaged_image_is_a_located_fault(read, tmp_path):
    on = deliver(tmp_path / "set", {"happy": "happy", "sad": "sad"})
    (tmp_path / "set" / "sad" / "sad1.png").write_bytes(b"nothing")
    assert "sad1.png: is no image: 7 bytes" in refused(read, on)


def test_pairs_of_classes():
    assert parse_class_map(["happiness=happy", "contempt=", "a=b=c"]) == {
        "happiness": "happy",
        "contempt": None,
        "a": "b=c",
    }
    with pytest.raises(FoldwiseError) as caught:
        parse_class_map(["happy"])
    assert str(caught.value) == (
        "expected `<class of the set>=<class of the competition>`, but got 'happy'\n"
        "  fix: e.g. happiness=happy, or contempt= to leave that class out"
    )
    with pytest.raises(FoldwiseError, match="the class 'a' is mapped twice"):
        parse_class_map(["a=b", "a="])
