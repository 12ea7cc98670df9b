"""A run answers as its own files do, a blend as its submission; and about its training images it says what it is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from drawn_heads import draw_head
from PIL import Image

from foldwise.data.competition import load_dataset
from foldwise.data.demo import draw_face
from foldwise.errors import FoldwiseError, RecordError
from foldwise.files import pretty_json
from foldwise.records.store import load_run, read_probs, rows_of
from foldwise.records.submission import predict_as_described
from foldwise.serve.ask import Answers, answer_lines, answers_json, ask, picture_files
from foldwise.serve.faces import Box, crop
from foldwise.serve.pictures import read_picture, to_form
from foldwise.serve.predictor import Estimate, Predictor
from foldwise.serve.shelf import Catalogue

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(asked_root: Path) -> Predictor:
    return Predictor.load("tiny", root=asked_root, device="cpu")


@pytest.fixture(scope="module")
def best(asked_root: Path) -> Predictor:
    return Predictor.load("best", root=asked_root, device="cpu")


def images(root: Path, ids: np.ndarray) -> list[np.ndarray]:
    """The image files of these ids, as a stranger would send them."""
    data = load_dataset(root, "demo")
    files = [root / "inputs" / "demo" / "images" / data.competition.files.file_of(name) for name in ids.tolist()]
    return [read_picture(file.read_bytes(), where=file.name) for file in files]


@pytest.mark.parametrize("name", ["tiny", "twice"])
def test_each_fold_gives_its_oof_rows_again(asked_root: Path, name: str) -> None:
    predictor, run = Predictor.load(name, root=asked_root, device="cpu"), load_run(asked_root / "oof" / name)
    assert predictor.folds == (0, 1, 2, 3, 4)
    for fold in predictor.folds:
        mine = run.fold == fold
        found = predictor.predict(images(asked_root, run.ids[mine]), fold=fold)
        np.testing.assert_allclose(found.probabilities, run.probs[mine], atol=1e-6)
        assert found.labels.tolist() == [run.classes[index] for index in run.probs[mine].argmax(axis=1)]


def test_all_folds_give_the_test_rows_again(asked_root: Path, tiny: Predictor) -> None:
    run = load_run(asked_root / "oof" / "tiny")
    found = tiny.predict(images(asked_root, run.test_ids))
    np.testing.assert_allclose(found.probabilities, run.test_probs, atol=1e-6)
    assert found.classes == run.classes


def test_a_blend_gives_its_submission_again(asked_root: Path, best: Predictor) -> None:
    folder = asked_root / "submissions" / "demo" / best.name.removeprefix("blend:")
    rows = [line.split(",") for line in (folder / "submission.csv").read_text().splitlines()[1:]]
    ids = np.array([name for name, _ in rows])
    found = best.predict(images(asked_root, ids))
    assert found.labels.tolist() == [label for _, label in rows]
    told = json.loads((folder / "blend.json").read_text())
    each = []
    for member in told["members"]:
        (test_ids,), probs = read_probs(asked_root / "oof" / member["run"] / "test.csv", ("id",), found.classes)
        each.append(probs[rows_of(test_ids, ids)])
    assert len(each) == 2
    np.testing.assert_allclose(found.probabilities, predict_as_described(told, each), atol=1e-6)


def test_an_image_does_not_depend_on_how_many_others_there_are(asked_root: Path, tiny: Predictor) -> None:
    some = images(asked_root, load_run(asked_root / "oof" / "tiny").test_ids)
    together = tiny.predict(some).probabilities
    for count in (1, 3, 9):
        np.testing.assert_allclose(tiny.predict(some[:count]).probabilities, together[:count], atol=1e-6)
    small = Predictor.load("tiny", root=asked_root, device="cpu", batch_size=2)
    np.testing.assert_allclose(small.predict(some).probabilities, together, atol=1e-6)
    assert tiny.predict([]).probabilities.shape == (0, 7)


def test_faces_are_rows_in_the_order_of_their_boxes(tiny: Predictor) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (90, 120, 3), dtype=np.uint8) for _ in range(2))
    boxes = [Box(5, 5, 40, 40, 1.0), Box(60, 20, 48, 48, 1.0)], [Box(70, 30, 30, 30, 1.0)]
    found = tiny.predict([first, second, first], [*boxes, []])
    cut = [crop(first, boxes[0][0]), crop(first, boxes[0][1]), crop(second, boxes[1][0])]
    np.testing.assert_array_equal(found.probabilities, tiny.predict(cut).probabilities)
    np.testing.assert_array_equal(tiny.prepare(cut)[1], to_form(cut[1], tiny.competition.image))


def test_a_predictor_names_what_decides_its_answers(project: Path, tiny: Predictor, best: Predictor) -> None:
    names = ("tiny", project / "oof" / "tiny", "best", "blend", best.name, best.name[6:], f"blend:{best.name[6:20]}")
    loaded = [Predictor.load(name, root=project, device="cpu") for name in names]
    assert [one.name for one in loaded] == ["tiny", "tiny", *[best.name] * 5]
    assert {one.version for one in loaded} == {tiny.version, best.version}
    # Other views answer otherwise.
    file = project / "oof" / "tiny" / "run.json"
    info = json.loads(file.read_text())
    file.write_text(pretty_json(info | {"tta": ["identity"]}))
    changed = Predictor.load("tiny", root=project, device="cpu")
    assert changed.version != tiny.version


def test_own_images_are_known_by_their_pixels(asked_root: Path, tiny: Predictor) -> None:
    run = load_run(asked_root / "oof" / "tiny")
    own = tiny.own(tiny.prepare(images(asked_root, run.ids[:20])))
    known = [one for one in own if one is not None]
    assert [(one.id, one.fold) for one in known] == list(
        zip(run.ids[:20].tolist(), run.fold[:20].tolist(), strict=True)
    )
    pixels = tiny.prepare(images(asked_root, run.ids[:1]))
    pixels[0, 0, 0] ^= 1
    assert tiny.own(pixels) == [None]
    assert tiny.own(tiny.prepare(images(asked_root, run.test_ids))) == [None] * len(run.test_ids)


def test_without_the_data_no_image_is_known(project: Path) -> None:
    run = load_run(project / "oof" / "tiny")
    some = images(project, run.ids[:2])
    (project / "inputs" / "demo" / "train.csv").unlink()
    predictor = Predictor.load("tiny", root=project, device="cpu")
    assert predictor.own(predictor.prepare(some)) == [None, None]
    path = next((project / "inputs" / "demo" / "images").iterdir())
    told = "its training images are not recognised: demo is not taken in here as the run saw it"
    found = ask(predictor, [path])
    assert answer_lines(found)[-1] == told
    assert answers_json(found)["doubts"] == [told]


def test_a_twin_on_the_other_side_was_seen_and_a_test_part_was_not(project: Path) -> None:
    run = load_run(project / "oof" / "tiny")
    data = load_dataset(project, "demo")
    predictor = Predictor.load("tiny", root=project, device="cpu")
    first = int(np.flatnonzero(run.fold == 0)[0])
    other = int(np.flatnonzero(run.fold == 1)[0])
    row = {name: index for index, name in enumerate(data.ids.tolist())}
    twins = data.images.copy()
    twins[row[run.ids[other]]] = twins[row[run.ids[first]]]
    seen = dataclasses.replace(data, images=twins)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foldwise.serve.predictor.load_dataset", lambda *_: seen)
        (one,) = predictor.own(twins[row[run.ids[first]]][None])
    assert one is not None
    assert one.fold is None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nobody", "there is no kept run and no submission 'nobody'\n  fix: `best`, or a run: tiny, twice"),
        ("strict!", "there is no kept run and no submission 'strict!'\n  fix: `best`, or a run: tiny, twice"),
    ],
)
def test_what_is_not_there_is_named(asked_root: Path, name: str, told: str) -> None:
    with pytest.raises(FoldwiseError) as caught:
        Predictor.load(name, root=asked_root)
    assert str(caught.value) == told


def test_what_cannot_answer_says_why(project: Path, tiny: Predictor) -> None:
    with pytest.raises(FoldwiseError) as caught:
        tiny.predict([], fold=7)
    assert str(caught.value) == "tiny has no models of fold 7\n  fix: one of 0, 1, 2, 3, 4, or leave it out"
    (project / "oof" / "twice" / "fold2" / "seed1" / "weights.safetensors").unlink()
    for name in ("twice", "best"):
        with pytest.raises(RecordError, match="oof/twice: its weights are not on this machine: fold2/seed1"):
            Predictor.load(name, root=project)
    shutil.rmtree(project / "submissions")
    with pytest.raises(FoldwiseError) as caught:
        Predictor.load("best", root=project)
    assert str(caught.value) == "there is no blend yet to predict with\n  fix: make submit, or name a run: tiny, twice"


def test_a_blend_whose_member_was_made_anew_is_not_asked(project: Path) -> None:
    assert Catalogue(project).best().aliases == ("blend:best", "blend:strict")
    described = next((project / "submissions" / "demo").glob("*/blend.json"))
    told = json.loads(described.read_text())
    told["members"][0]["hashes"]["oof"] = "0" * 64
    described.write_text(pretty_json(told))
    with pytest.raises(RecordError, match=r"is not the run that .* was blended of: it was made anew since"):
        Predictor.load(described.parent.name, root=project)

    catalogue = Catalogue(project)
    changed = catalogue.find(described.parent.name)
    assert (changed.missing, changed.changed) == ((), (told["members"][0]["run"],))
    assert changed.unserved == f"made anew since it was blended: {told['members'][0]['run']}"
    assert catalogue.best().kind == "run"


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate("accuracy", 0.4629, 0.00966, None, ()), "right on 46.3 % +- 1.0 of images that it had not seen"),
        (
            Estimate("accuracy", 0.4874, 0.0097, (0.4684, 0.5064), ("optimistic",)),
            "right on 48.7 % +- 1.0 of images that it had not seen (95 % interval 46.8 to 50.6 %); marked optimistic",
        ),
        (
            Estimate("log_loss", 1.25, 0.02, (1.2, 1.3), ()),
            "log_loss 1.2500 +- 0.0200 on images that it had not seen (95 % interval 1.2000 to 1.3000)",
        ),
        (Estimate("accuracy", None, None, None, ()), "how often it is right is not known: no image was held out"),
    ],
)
def test_how_often_it_is_right_is_said_in_a_line(estimate: Estimate, text: str) -> None:
    assert str(estimate) == text


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shots(asked_root: Path, tmp_path: Path) -> Path:
    """A folder with a new face, a training image, a group, and what cannot be read."""
    folder = tmp_path / "shots"
    folder.mkdir()
    Image.fromarray(draw_face("happy", np.random.default_rng(77))).save(folder / "10.png")
    data = load_dataset(asked_root, "demo")
    first = load_run(asked_root / "oof" / "tiny").ids[0]
    shutil.copy(asked_root / "inputs" / "demo" / "images" / data.competition.files.file_of(first), folder / "2.png")
    group = np.full((300, 500, 3), 160, np.uint8)
    group[20:220, 20:220], group[100:220, 300:420] = draw_head(), draw_head(120)
    Image.fromarray(group).save(folder / "group.png")
    (folder / "note.txt").write_text("no picture")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    return folder


def test_files_folders_and_patterns(shots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, faults = picture_files([str(shots)])
    assert [file.name for file in files] == ["2.png", "10.png", "broken.jpg", "group.png"]
    assert not faults
    monkeypatch.chdir(shots)
    files, faults = picture_files(["g*.png", "10.png", "*.png", "gone.jpg", str(shots / "1*.png")])
    assert [file.name for file in files] == ["group.png", "10.png", "2.png", "10.png"]
    assert [str(fault) for fault in faults] == [
        "gone.jpg: there is no such file\n  fix: give a picture, a folder or a pattern"
    ]


def asked(predictor: Predictor, folder: Path, **options: object) -> Answers:
    return ask(predictor, picture_files([str(folder)])[0], **options)  # type: ignore[arg-type]


def test_a_training_image_is_answered_by_who_never_saw_it(asked_root: Path, tiny: Predictor, shots: Path) -> None:
    run = load_run(asked_root / "oof" / "tiny")
    found = asked(tiny, shots)
    own, new, group = found.answers
    np.testing.assert_allclose(own.probabilities, run.probs[0], atol=1e-6)
    assert (own.fold, new.fold, group.fold) == (run.fold[0], None, None)
    name, fold = run.ids[0], run.fold[0]
    lines = answer_lines(found)
    assert lines[1].strip() == f"image {name} of demo's training data: by fold {fold}, which did not see it"
    told = answers_json(found)["answers"]
    assert told[0]["training_image"] == {"id": name, "fold": fold}
    assert (told[0]["fold"], told[1]["training_image"], told[1]["fold"]) == (fold, None, None)
    other = (fold + 1) % 5
    lines = answer_lines(asked(tiny, shots, fold=other))
    expected = f"image {name} of demo's training data: by fold {other}, which saw it, which proves nothing"
    assert lines[1].strip() == expected
    assert lines[3].strip() == f"by fold {other} alone"


def test_lines_are_calm_ascii(tiny: Predictor, shots: Path) -> None:
    found = asked(tiny, shots)
    lines = answer_lines(found)
    answer = found.answers[1]
    prob = answer.probabilities.max()
    width = max(len(one.file) for one in found.answers) if len(answer.file) <= 40 else 40
    title = answer.file if len(answer.file) <= 40 else f"...{answer.file[-37:]}"
    bar = "#" * round(prob * 24)
    assert lines[2] == f"{title:<{width}}  {answer.label:<8}  {prob:.2f}  {bar}"
    assert lines[-2:] == ["", f"tiny, version {tiny.version}: {tiny.estimate}"]
    assert all(line.isascii() and line == line.rstrip() for line in lines)
    every = answer_lines(found, show_all=True)
    assert len(every) == len(lines) + 3 * 6
    assert every[0] == lines[0]
    shown = [float(line.split()[1]) for line in every[1:7]]
    assert shown == sorted(shown, reverse=True)


def test_faces_have_rows_of_their_own(tiny: Predictor, shots: Path) -> None:
    found = asked(tiny, shots, faces=True)
    assert [(Path(one.file).name, one.face, one.no_face) for one in found.answers] == [
        ("2.png", 0, True),
        ("10.png", 0, True),
        ("group.png", 1, False),
        ("group.png", 2, False),
    ]
    lines = answer_lines(found)
    assert [line.strip() for line in lines].count("no face was found: this is of the whole picture") == 2
    box = found.answers[2].box
    assert box is not None
    assert f"{box.width} x {box.height} px at {box.left},{box.top}" in "\n".join(lines)
    assert "face 1" in lines[5]
    picture = read_picture((shots / "group.png").read_bytes(), where="group.png")
    expected = tiny.predict([crop(picture, box)]).probabilities[0]
    np.testing.assert_allclose(found.answers[2].probabilities, expected, atol=1e-6)
    assert answers_json(found)["answers"][2]["box"]["width"] == box.width


def test_what_cannot_be_read_is_told_and_the_others_are_predicted(tiny: Predictor, shots: Path) -> None:
    found = asked(tiny, shots)
    assert len(found.answers) == 3
    assert [str(fault) for fault in found.faults] == [f"{shots / 'broken.jpg'}: is cut short\n  fix: fetch it again"]
    told = answers_json(found)
    assert told["faults"] == [{"file": str(shots / "broken.jpg"), "what": "is cut short", "fix": "fetch it again"}]
    assert json.loads(pretty_json(told))["answers"] == told["answers"]


def test_names_do_not_steer_the_terminal(tiny: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31mred.png"
    Image.fromarray(draw_face("sad", np.random.default_rng(7))).save(path)
    assert "\x1b" not in "".join(answer_lines(ask(tiny, [path])))
