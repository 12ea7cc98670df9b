"""A hand-out is taken in whole or not at all, and whatever is wrong with it is told at once."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from foldwise.data import ingest as module
from foldwise.data.competition import load_competition, load_dataset
from foldwise.data.ingest import IngestReport, ingest, render
from foldwise.data.readers.table import MEMBER_BYTES
from foldwise.errors import DataError

REPO = Path(__file__).resolve().parents[2]
ASPICV = REPO / ".." / "shared" / "data" / "aspicv"
needs_aspicv = pytest.mark.skipif(not ASPICV.is_dir(), reason="the aspicv hand-out is not beside the repository")

LABELS = {str(number): "ab"[number % 2] for number in range(1, 9)}
TEST = ("9", "10")


class HandOut:
    """A small hand-out that a test may spoil before it is written to `hand/`."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.images = {
            f"{image}.png": png(rng.integers(0, 255, (16, 16)).astype(np.uint8)) for image in (*LABELS, *TEST)
        }
        self.train = b"id,label\n" + "".join(f"{image},{label}\n" for image, label in LABELS.items()).encode()

    def write(self, *, unpacked: str | None = None, inner: str = "") -> Path:
        folder = Path("hand")
        folder.mkdir(exist_ok=True)
        (folder / "train.csv").write_bytes(self.train)
        if unpacked is not None:
            (folder / unpacked).mkdir(exist_ok=True)
            for name, raw in self.images.items():
                (folder / unpacked / name).write_bytes(raw)
        else:
            with zipfile.ZipFile(folder / "dataset.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for name, raw in self.images.items():
                    archive.writestr(inner + name, raw)
        return folder


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def hand_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HandOut:
    monkeypatch.chdir(tmp_path)
    return HandOut()


def take(source: Path = Path("hand")) -> IngestReport:
    return ingest(source, Path.cwd(), "toy")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("unpacked", "inner"),
    [(None, ""), (None, "dataset/"), ("", ""), ("images", "")],
    ids=["zip", "inner", "flat", "folder"],
)
def test_every_way_of_packing_gives_the_same_competition(unpacked: str | None, inner: str, hand_out: HandOut) -> None:
    report = take(hand_out.write(unpacked=unpacked, inner=inner))
    assert (report.n_train, report.n_test, report.classes) == (8, 2, {"a": 4, "b": 4})
    data = load_dataset(Path.cwd(), "toy")
    assert data.ids.tolist() == [str(number) for number in range(1, 11)]
    assert data.labels.tolist() == [1, 0] * 4 + [-1, -1]
    assert data.sha256 == report.sha256
    with Image.open(io.BytesIO(hand_out.images["10.png"])) as image:
        assert (data.images[9, ..., 0] == np.asarray(image)).all()
    assert sorted(path.name for path in Path("inputs/toy").iterdir()) == [
        "cache", "competition.yaml", "folds.csv", "images", "train.csv",
    ]  # fmt: skip


def test_what_is_inferred(hand_out: HandOut) -> None:
    report = take(hand_out.write())
    spec = load_competition(Path.cwd(), "toy")
    assert report.competition == spec
    assert spec.classes == ("a", "b")
    assert (spec.image.height, spec.image.width, spec.image.channels) == (16, 16, 1)
    assert spec.files.pattern == "{id}.png"
    assert spec.test_ids == "9-10"
    assert (spec.split.folds, spec.split.seed, spec.split.repeats) == (5, 42, 2)


def test_names_colours_and_words_that_yaml_would_misread_are_inferred(hand_out: HandOut) -> None:
    rng = np.random.default_rng(1)
    hand_out.images = {f"img_{name}x.png": png(rng.integers(0, 255, (9, 7, 3)).astype(np.uint8)) for name in "pqrstu"}
    hand_out.train = b"id,label\np,no\nq,1\nr,null\ns,a: b\nt,no\n"
    report = take(hand_out.write())
    assert report.competition.classes == ("1", "a: b", "no", "null")
    assert report.competition.files.pattern == "img_{id}x.png"
    assert report.competition.test_ids is None
    assert load_dataset(Path.cwd(), "toy").images.shape == (6, 9, 7, 3)


def test_marks_and_line_ends_are_noted(hand_out: HandOut) -> None:
    hand_out.train = b"\xef\xbb\xbf" + hand_out.train.replace(b"\n", b"\r\n")
    report = take(hand_out.write())
    assert report.notes[:2] == (
        "hand/train.csv starts with a byte order mark; it was dropped",
        "hand/train.csv has CRLF line ends; they were read as LF",
    )
    assert Path("inputs/toy/train.csv").read_bytes() == HandOut().train


def drop(name: str) -> Callable[[HandOut], None]:
    return lambda hand_out: hand_out.images.pop(name) and None


def put(name: str, raw: bytes) -> Callable[[HandOut], None]:
    return lambda hand_out: hand_out.images.update({name: raw})


def rewrite(old: bytes, new: bytes) -> Callable[[HandOut], None]:
    def spoil(hand_out: HandOut) -> None:
        assert old in hand_out.train
        hand_out.train = hand_out.train.replace(old, new)

    return spoil


GRAY_RGB = png(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))
BROKEN = {
    "missing": (drop("3.png"), "hand/train.csv:4: id '3' has no image 3.png", "add the image, or remove the row"),
    "missing test": (
        drop("10.png"),
        "hand/dataset.zip: test image 10.png is missing",
        "add it; `test_ids` in competition.yaml promises 9-10",
    ),
    "extra": (
        put("11.png", png(np.eye(16, dtype=np.uint8))),
        "hand/dataset.zip:11.png: is neither labelled in train.csv nor one of `test_ids` 9-10",
        "remove it, or mend `test_ids` in competition.yaml",
    ),
    "other name": (
        put("1.jpg", png(np.eye(16, dtype=np.uint8))),
        "hand/dataset.zip:1.jpg: does not fit the pattern '{id}.png'",
        "remove it, or mend `files.pattern` in competition.yaml",
    ),
    "truncated": (
        put("4.png", HandOut().images["4.png"][:100]),
        "hand/dataset.zip:4.png: is truncated",
        "fetch the hand-out again; it is damaged",
    ),
    "no image": (
        put("4.png", b"<html>"),
        "hand/dataset.zip:4.png: is no image: 6 bytes starting with b'<html>'",
        "replace or remove the file",
    ),
    "size": (
        put("9.png", png(np.eye(17, dtype=np.uint8)[:16])),
        "hand/dataset.zip:9.png: is 16x17 px (height x width), but 16x16 is expected",
        "replace it, or set `image.fit` in competition.yaml to letterbox, crop or squash",
    ),
    "colour": (
        put("9.png", GRAY_RGB),
        "hand/dataset.zip:9.png: has the mode RGB, but gray (L) is expected",
        "convert it to gray, which loses nothing as its three channels are equal; "
        "`image.convert: true` in competition.yaml does it",
    ),
    "twice": (
        rewrite(b"2,a\n", b"2,a\n2,b\n"),
        "hand/train.csv:4: id '2' is there twice, first in line 3",
        "keep one row an id",
    ),
    "label": (
        rewrite(b"2,a\n", b"2,A\n"),
        "hand/train.csv:3: unknown label 'A' (did you mean 'a'?)",
        "labels are: a, b",
    ),
    "blank": (rewrite(b"2,a\n", b"2,a\n,b\n"), "hand/train.csv:4: id is blank", "fill it in, or remove the row"),
    "column": (
        rewrite(b"id,label", b"id,emotion"),
        "hand/train.csv:1: there is no column 'label'; columns: id, emotion",
        "name the columns in competition.yaml, under `columns`",
    ),
    "encoding": (
        rewrite(b"2,a\n", b"2,\xff\n"),
        "hand/train.csv:3: expected UTF-8 text, but got the byte 0xff",
        "save the file as UTF-8",
    ),
    "labelled test": (
        rewrite(b"8,a\n", b"8,a\n9,a\n"),
        "hand/train.csv:10: id '9' has a label, but is one of `test_ids` 9-10",
        "mend `test_ids` in competition.yaml, or remove the row",
    ),
    "escaping": (
        put("../11.png", b"x"),
        "hand/dataset.zip:../11.png: leads out of the archive's folder",
        "do not unpack it; ask for an archive that stays in its own folder",
    ),
    "absolute": (
        put("/tmp/11.png", b"x"),
        "hand/dataset.zip:/tmp/11.png: leads out of the archive's folder",
        "do not unpack it; ask for an archive that stays in its own folder",
    ),
    "bomb": (
        put("4.png", bytes(MEMBER_BYTES + 1)),
        "hand/dataset.zip:4.png: unpacks to 67,108,865 bytes, more than 67,108,864",
        "remove it; no image is that large",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_fault_is_named_with_its_place_and_nothing_changes(kind: str, hand_out: HandOut) -> None:
    take(hand_out.write())
    before = snapshot(Path("inputs"))
    spoil, what, fix = BROKEN[kind]
    spoil(hand_out)
    with pytest.raises(DataError) as caught:
        take(hand_out.write())
    told = str(caught.value)
    if kind == "bomb":
        assert told.startswith(f"{what}\n  fix: {fix}\n")
    else:
        assert told == f"{what}\n  fix: {fix}\n1 error; nothing was written."
    assert snapshot(Path("inputs")) == before


def test_many_faults_are_told_at_once_and_a_first_failure_leaves_nothing(hand_out: HandOut) -> None:
    for kind in ("missing", "truncated", "size", "colour", "twice", "blank"):
        BROKEN[kind][0](hand_out)
    put("5.png", b"<html>")(hand_out)
    with pytest.raises(DataError) as caught:
        take(hand_out.write())
    assert [fault.where for fault in caught.value.faults] == [
        "hand/train.csv:4",
        "hand/train.csv:5",
        "hand/train.csv:6",
        "hand/dataset.zip:4.png",
        "hand/dataset.zip:5.png",
        "hand/dataset.zip:9.png",
    ]
    assert str(caught.value).endswith("6 errors; nothing was written.")
    assert not Path("inputs/toy").exists()


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda: shutil.rmtree("hand"), "hand: there is no such folder"),
        (lambda: Path("hand/dataset.zip").unlink(), "hand: there is neither dataset.zip nor an image"),
        (
            lambda: Path("hand/dataset.zip").write_bytes(b"no"),
            "hand/dataset.zip: cannot be read as a zip: File is not a zip file",
        ),
        (lambda: Path("hand/train.csv").unlink(), "hand/train.csv: there is no such file"),
        (lambda: Path("hand/train.csv").write_text("id,label\n1,a\n"), "label: there is one class only: a"),
        (
            lambda: Path("hand/train.csv").write_text("id,label\n1,a\n2,b\n3,a\n"),
            "inputs/toy/competition.yaml: 3 labelled pictures do not fill 5 folds",
        ),
    ],
)  # fmt: skip
def test_a_hand_out_that_is_none(arrange: Callable[[], object], message: str, hand_out: HandOut) -> None:
    hand_out.write()
    arrange()
    with pytest.raises(DataError) as caught:
        take()
    assert str(caught.value).startswith(f"{message}\n")


def test_images_in_two_folders_and_a_damaged_member(hand_out: HandOut) -> None:
    put("more/11.png", b"x")(hand_out)
    with pytest.raises(DataError, match=r"hand/dataset\.zip: images lie in 2 folders: \. \(10\), more \(1\)"):
        take(hand_out.write())
    del hand_out.images["more/11.png"]
    folder = hand_out.write()
    content = bytearray((folder / "dataset.zip").read_bytes())
    content[content.index(b"4.png") + 60] ^= 255
    (folder / "dataset.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"hand/dataset\.zip:4\.png: cannot be read: "):
        take()


def test_what_no_one_meant_to_hand_out_is_left_aside(hand_out: HandOut) -> None:
    for name in ("__MACOSX/._1.png", ".DS_Store", "._2.png", "Thumbs.db"):
        put(name, b"x")(hand_out)
    report = take(hand_out.write())
    assert sorted(path.name for path in Path("inputs/toy/images").iterdir()) == sorted(HandOut().images)
    assert any("files left aside as no images: 1, first Thumbs.db" in note for note in report.notes)


def test_folds_are_never_silently_remade(hand_out: HandOut) -> None:
    take(hand_out.write())
    folds = Path("inputs/toy/folds.csv")
    made = folds.read_bytes()
    take()
    assert folds.read_bytes() == made
    rows = made.decode().splitlines()
    fold = {row.split(",")[0]: row.split(",")[1] for row in rows[1:9]}
    twin = next(image for image in LABELS if fold[image] != fold["1"])
    hand_out.images[f"{twin}.png"] = hand_out.images["1.png"]
    with pytest.raises(DataError, match=f"near-duplicates '1' and '{twin}' are in folds") as caught:
        take(hand_out.write())
    assert "delete inputs/toy/folds.csv and run `make data` again" in str(caught.value)
    folds.unlink()
    take()
    assert load_dataset(Path.cwd(), "toy").folds.groups_of([twin]).tolist() == ["1"]


def test_near_duplicates_chain_through_a_test_image_and_are_reported(hand_out: HandOut) -> None:
    for image in ("3", "8", "10"):
        hand_out.images[f"{image}.png"] = hand_out.images["2.png"]
    report = take(hand_out.write())
    assert [(pair.id_a, pair.id_b, pair.kind) for pair in report.pairs] == [
        ("2", "3", "conflicting labels"),
        ("2", "8", "same label"),
        ("2", "10", "across train and test"),
        ("3", "8", "conflicting labels"),
        ("3", "10", "across train and test"),
        ("8", "10", "across train and test"),
    ]
    folds = load_dataset(Path.cwd(), "toy").folds
    assert folds.groups_of(["2", "3", "8"]).tolist() == ["2"] * 3
    assert len(set(folds.of(["2", "3", "8"]).tolist())) == 1


def test_a_column_split_follows_the_column_and_tells_of_torn_twins(hand_out: HandOut) -> None:
    take(hand_out.write())
    path = Path("inputs/toy/competition.yaml")
    split = "split: {kind: column, column: part, train: [t], val: [v], test: [x]}\n"
    lines = [line for line in path.read_text().splitlines(keepends=True) if not line.startswith("split:")]
    path.write_text("".join([*lines, split]))
    Path("inputs/toy/folds.csv").unlink()
    hand_out.train = b"id,label,part\n" + b"".join(
        f"{image},{label},{'tvx'[int(image) % 3]}\n".encode() for image, label in LABELS.items()
    )
    hand_out.images["2.png"] = hand_out.images["1.png"]
    report = take(hand_out.write())
    assert load_dataset(Path.cwd(), "toy").folds.fold.tolist() == [0, -2, -1, 0, -2, -1, 0, -2]
    assert any(note.endswith("torn by the given split, from which scores profit: 1") for note in report.notes)


@pytest.mark.parametrize("step", ["write_folds", "atomic_write"])
def test_a_kill_while_writing_leaves_nothing_half(
    step: str, hand_out: HandOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_out.write()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, step, killed)
        with pytest.raises(KeyboardInterrupt):
            take()
    with pytest.raises(DataError, match=r"there is no such file|is missing"):
        load_dataset(Path.cwd(), "toy")
    report = take()
    assert load_dataset(Path.cwd(), "toy").sha256 == report.sha256
    assert not list(Path("inputs/toy").glob(".*"))


def test_what_was_taken_in_can_be_taken_in_again_from_where_it_lies(hand_out: HandOut) -> None:
    first = take(hand_out.write())
    shutil.rmtree("hand")
    assert take(Path("inputs/toy")).sha256 == first.sha256


def test_a_strange_name_is_refused(hand_out: HandOut) -> None:
    with pytest.raises(DataError, match=r"COMP=\.\./x: a competition's name must be of lower-case letters"):
        ingest(hand_out.write(), Path.cwd(), "../x")


def text(report: IngestReport, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(report))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_report_names_what_matters(demo_root: Path) -> None:
    shown = text(ingest(demo_root / "handout", demo_root, "demo"))
    for piece in ("demo: 140 labelled and 30 test images", "disgust", "48 x 48", "3 pairs of near-duplicates"):
        assert piece in shown
    assert "across train and test" in shown
    assert max(map(len, shown.splitlines())) <= 100


@needs_aspicv
def test_aspicv_is_what_it_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "inputs" / "aspicv").mkdir(parents=True)
    shutil.copy(REPO / "inputs" / "aspicv" / "competition.yaml", tmp_path / "inputs" / "aspicv")
    report = ingest(ASPICV, tmp_path, "aspicv")
    assert (report.n_train, report.n_test) == (2700, 300)
    assert report.classes == {
        "angry": 355, "disgust": 39, "fear": 413, "happy": 640, "neutral": 489, "sad": 451, "surprise": 313,
    }  # fmt: skip
    assert dict(report.sizes) == {(48, 48, "L"): 3000}
    assert len(report.pairs) == 29
    assert any("CRLF" in note for note in report.notes)
    committed = (REPO / "inputs" / "aspicv" / "folds.csv").read_bytes()
    assert (tmp_path / "inputs" / "aspicv" / "folds.csv").read_bytes() == committed
    assert report.competition.submission_ids == tuple(map(str, range(2701, 3001)))
