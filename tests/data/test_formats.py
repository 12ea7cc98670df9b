"""The same images give the same competition in whatever format they are handed out."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from foldwise.data.competition import Dataset, load_competition, load_dataset
from foldwise.data.demo import draw_demo
from foldwise.data.ingest import IngestReport, ingest, render
from foldwise.data.readers import ColumnsSpec, ImageSpec, decode, open_hand_out
from foldwise.data.readers.folders import class_folders
from foldwise.errors import DataError, Fault, FoldwiseError
from foldwise.runs.events import Event
from foldwise.runs.experiment import Options, run_experiment
from foldwise.spec.model import ExperimentSpec, ModelSpec, OptimSpec, TrainSpec

REPO = Path(__file__).resolve().parents[2]
FER = REPO / ".." / "shared" / "data" / "fer2013"
needs_fer = pytest.mark.skipif(not FER.is_dir(), reason="the FER2013 file is not beside the repository")

EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
YAML = f"""\
name: toy
classes: [{", ".join(EMOTIONS)}]
image: {{height: 48, width: 48, channels: 1}}
split: {{kind: kfold, folds: 5, seed: 42, repeats: 2}}
"""


class Faces:
    """The demo's faces, all of them labelled, as files, labels and pixels by id."""

    def __init__(self, folder: Path, count: int) -> None:
        draw_demo(folder, train=count, test=1)
        with (folder / "train.csv").open(newline="") as file:
            self.labels = {row["id"]: row["label"] for row in csv.DictReader(file)}
        with zipfile.ZipFile(folder / "dataset.zip") as archive:
            self.files = {image: archive.read(f"{image}.jpg") for image in self.labels}
        self.pixels = {image: np.asarray(Image.open(io.BytesIO(raw))) for image, raw in self.files.items()}

    def cells(self, image: str) -> tuple[str, str]:
        """Emotion and pixels as FER2013 has them."""
        return str(EMOTIONS.index(self.labels[image])), " ".join(map(str, self.pixels[image].ravel().tolist()))


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return Faces(tmp_path_factory.mktemp("faces"), 200)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return Faces(tmp_path_factory.mktemp("few"), 60)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def describe(yaml: str) -> None:
    Path("inputs/toy").mkdir(parents=True, exist_ok=True)
    Path("inputs/toy/competition.yaml").write_text(yaml)


def take(source: str = "hand") -> tuple[IngestReport, Dataset]:
    report = ingest(Path(source), Path.cwd(), "toy")
    return report, load_dataset(Path.cwd(), "toy")


def refused(source: str = "hand", error: type[FoldwiseError] = DataError) -> str:
    with pytest.raises(error) as caught:
        ingest(Path(source), Path.cwd(), "toy")
    return str(caught.value)


def table(folder: Path, rows: list[tuple[str, ...]], name: str = "train.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    (folder / name).write_text(text.getvalue())
    return folder / name


# The formats ----------------------------------------------------------------------------------------------------------


def as_zip(faces: Faces, folder: Path) -> None:
    table(folder, [("id", "label"), *faces.labels.items()])
    with zipfile.ZipFile(folder / "dataset.zip", "w") as archive:
        for image, raw in faces.files.items():
            archive.writestr(f"{image}.jpg", raw)


def as_files(faces: Faces, folder: Path) -> None:
    table(folder, [("id", "label"), *faces.labels.items()])
    (folder / "images").mkdir()
    for number, (image, raw) in enumerate(faces.files.items()):
        # Every other as another format: the suffix is no part of the id.
        (folder / "images" / f"{image}.{'jpg' if number % 2 else 'jpeg'}").write_bytes(raw)


def as_pixels(faces: Faces, folder: Path) -> None:
    table(folder, [("emotion", "pixels"), *map(faces.cells, faces.labels)], "fer2013.csv")


def as_gzip(faces: Faces, folder: Path) -> None:
    rows = [("emotion", "pixels", "Usage"), *((*faces.cells(image), "Training") for image in faces.labels)]
    path = table(folder, rows, "fer2013.csv")
    with gzip.open(folder / "fer2013.csv.gz", "wb") as file:
        file.write(path.read_bytes())
    path.unlink()


def as_icml(faces: Faces, folder: Path) -> None:
    rows = [(emotion, "Training", pixels) for emotion, pixels in map(faces.cells, faces.labels)]
    table(folder, [("emotion", " Usage", " pixels"), *rows], "icml_face_data.csv")


def as_folders(faces: Faces, folder: Path) -> None:
    for image, label in faces.labels.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{image}.jpg").write_bytes(faces.files[image])


def as_part_folders(faces: Faces, folder: Path) -> None:
    for number, (image, label) in enumerate(faces.labels.items()):
        inner = folder / "archive" / ("test" if number % 4 == 0 else "train") / label
        inner.mkdir(parents=True, exist_ok=True)
        (inner / f"{image}.jpg").write_bytes(faces.files[image])


def as_parquet(faces: Faces, folder: Path) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=sorted(EMOTIONS, reverse=True))}
    )
    (folder / "data").mkdir(parents=True)
    images = list(faces.labels)
    for split, chosen in (("train", images[:150]), ("test", images[150:])):
        rows = {
            "image": [{"bytes": faces.files[image], "path": f"{image}.jpg"} for image in chosen],
            "label": [faces.labels[image] for image in chosen],
        }
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def as_plain_parquet(faces: Faces, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    images = list(reversed(faces.labels))
    rows = {
        "image": [{"bytes": faces.files[image], "path": None} for image in images],
        "label": [faces.labels[image] for image in images],
        "id": [int(image) for image in images],
    }
    pq.write_table(pa.table(rows), folder / "faces.parquet")


def as_image_folder(faces: Faces, folder: Path) -> None:
    rows = [("file_name", "label", "id"), *((f"f{image}.jpg", label, image) for image, label in faces.labels.items())]
    table(folder, rows, "metadata.csv")
    for image, raw in faces.files.items():
        (folder / f"f{image}.jpg").write_bytes(raw)


def as_jsonl_folder(faces: Faces, folder: Path) -> None:
    (folder / "train").mkdir(parents=True)
    rows = [
        {"file_name": f"{image}.jpg", "label": label, "id": image} for image, label in reversed(faces.labels.items())
    ]
    (folder / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for image, raw in faces.files.items():
        (folder / "train" / f"{image}.jpg").write_bytes(raw)


FORMATS = [as_zip, as_files, as_pixels, as_gzip, as_icml, as_folders, as_part_folders]
LIBRARY = [as_parquet, as_plain_parquet, as_image_folder, as_jsonl_folder]


@pytest.fixture(scope="module")
def expected(faces: Faces, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, bytes]:
    root = tmp_path_factory.mktemp("expected")
    as_zip(faces, root / "hand")
    (root / "inputs" / "toy").mkdir(parents=True)
    (root / "inputs" / "toy" / "competition.yaml").write_text(YAML)
    ingest(root / "hand", root, "toy")
    return load_dataset(root, "toy"), (root / "inputs" / "toy" / "folds.csv").read_bytes()


# The library reads a metadata.csv in pieces and never closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("write", [*FORMATS, *(pytest.param(write, marks=pytest.mark.slow) for write in LIBRARY)])
def test_every_format_gives_the_same_competition(
    write: Callable[[Faces, Path], None], faces: Faces, expected: tuple[Dataset, bytes], here: Path
) -> None:
    if write in LIBRARY:
        pytest.importorskip("datasets")
    write(faces, Path("hand"))
    describe(YAML)
    report, data = take()
    first, folds = expected
    assert data.ids.tolist() == first.ids.tolist() == [str(number) for number in range(1, 201)]
    assert (data.labels == first.labels).all()
    assert [EMOTIONS[label] for label in data.labels] == [faces.labels[image] for image in data.ids.tolist()]
    assert (data.images == first.images).all()
    assert (data.images[..., 0] == np.stack([faces.pixels[image] for image in data.ids.tolist()])).all()
    assert data.sha256 == report.sha256 == first.sha256
    assert Path("inputs/toy/folds.csv").read_bytes() == folds
    assert set(data.source.tolist()) == {""}
    # What lies there now can be taken in again, and is the same.
    assert take("inputs/toy")[1].sha256 == first.sha256


# What is inferred -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
def test_every_reader_gives_the_same_out_of_fold_file(faces: Faces, here: Path) -> None:
    spec = ExperimentSpec(
        name="tiny",
        competition="toy",
        model=ModelSpec(arch="cnn_3block"),
        augment=({"HorizontalFlip": {"p": 0.5}},),
        optim=OptimSpec(lr=1e-3),
        train=TrainSpec(epochs=1, batch_size=32, precision="fp32", threads=1),
    )
    made = {}
    for write in (as_zip, as_pixels, as_folders, as_parquet, as_image_folder):  # one a reader
        root = here / write.__name__
        (root / "inputs" / "toy").mkdir(parents=True)
        (root / "inputs" / "toy" / "competition.yaml").write_text(YAML.replace("folds: 5", "folds: 2"))
        write(faces, root / "hand")
        ingest(root / "hand", root, "toy")
        run_experiment(root, spec, Options(), screen=Silence())
        made[write.__name__] = (root / "oof" / "tiny" / "oof.csv").read_bytes()
    assert len(set(made.values())) == 1, {name: hash(content) for name, content in made.items()}
    assert next(iter(made.values())).count(b"\n") == 201


class Silence:
    """A listener that says nothing."""

    def on(self, event: Event) -> None: ...

    def close(self) -> None: ...


def test_fer_has_its_own_class_order_and_its_usage_is_the_split(few: Faces, here: Path) -> None:
    parts = ["PrivateTest", "PublicTest", "Training", "Training"]
    rows = [(*few.cells(image), parts[int(image) % 4]) for image in few.labels]
    table(Path("hand"), [("emotion", "pixels", "Usage"), *rows], "fer2013.csv")
    report, data = take()
    spec = load_competition(Path.cwd(), "toy")
    assert spec.classes == EMOTIONS
    assert (spec.image.height, spec.image.width, spec.image.channels) == (48, 48, 1)
    assert (spec.split.kind, spec.split.column) == ("column", "Usage")
    assert (spec.split.train, spec.split.val, spec.split.test) == (("Training",), ("PublicTest",), ("PrivateTest",))
    assert data.folds.of(["4", "5", "6", "7"]).tolist() == [-2, 0, -1, -1]
    assert report.by_part["Training"].total() == 30
    assert Path("inputs/toy/train.csv").read_text().splitlines()[:2] == [
        "id,label,Usage",
        f"1,{few.labels['1']},PublicTest",
    ]


def test_unlabelled_rows_of_test_csv_are_numbered_on(few: Faces, here: Path) -> None:
    images = list(few.labels)
    table(Path("hand"), [("emotion", "pixels"), *map(few.cells, images[:50])])
    table(Path("hand"), [("pixels",), *((few.cells(image)[1],) for image in images[50:])], "test.csv")
    report, data = take()
    assert (report.n_train, report.n_test) == (50, 10)
    assert data.ids.tolist() == images
    assert (data.labels[50:] == -1).all()
    assert (data.images[..., 0] == np.stack([few.pixels[image] for image in images])).all()
    assert report.competition.test_ids == "51-60"


def test_folders_with_a_test_part_alone_are_scored_on_it(few: Faces, here: Path) -> None:
    as_part_folders(few, Path("hand"))
    report, data = take()
    assert report.competition.split.model_dump()["val"] == ("test",)
    assert "scored on the labelled test part" in Path("inputs/toy/competition.yaml").read_text()
    assert sorted(set(data.folds.fold.tolist())) == [-1, 0]
    assert report.by_part["test"].total() == (data.folds.fold == 0).sum() == 15
    assert report.competition.classes == tuple(sorted(EMOTIONS))


def test_stems_that_recur_take_part_and_class_into_the_id(few: Faces, here: Path) -> None:
    kinds = {label: [few.files[i] for i, other in few.labels.items() if other == label] for label in EMOTIONS}
    for part in ("train", "valid"):
        for label in EMOTIONS:
            folder = Path("hand", part, label)
            folder.mkdir(parents=True)
            (folder / "1.jpg").write_bytes(kinds[label][0 if part == "train" else 1])
    Path("hand/test").mkdir()
    Path("hand/test/new.jpg").write_bytes(few.files["1"])
    report, data = take()
    assert (report.n_train, report.n_test) == (14, 1)
    assert {"test-new", "train-angry-1", "valid-sad-1"} < set(data.ids.tolist())
    assert report.competition.split.val == ("valid",)
    assert re.search(r"all +14 +7 +7 *\n", text(report))


def text(report: IngestReport) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(render(report))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


# Merged sources -------------------------------------------------------------------------------------------------------

MERGED = """\
name: toy
classes: [angry, disgust, fear, happy, neutral, sad, surprise]
image: {height: 32, width: 32, channels: 1, fit: squash, convert: true}
split: {kind: holdout, share: 0.2}
sources:
  - {name: one, path: One, class_map: {anger: angry, contempt: null}}
  - {name: two, path: sub/Two}
"""


def two_sources(few: Faces) -> None:
    rng = np.random.default_rng(0)
    for number, image in enumerate(list(few.labels)[:30]):
        label = {"angry": "anger", "fear": "contempt"}.get(few.labels[image], few.labels[image])
        folder = Path("hand/One", label)
        folder.mkdir(parents=True, exist_ok=True)
        colour = np.stack([few.pixels[image], *rng.integers(0, 255, (2, 48, 48)).astype(np.uint8)], axis=-1)
        Image.fromarray(colour).save(folder / f"{number}.png")
    rows = list(map(few.cells, list(few.labels)[30:]))
    table(Path("hand/sub/Two"), [("emotion", "pixels"), *rows], "fer.csv")


def test_sources_are_merged_mapped_and_counted(few: Faces, here: Path) -> None:
    two_sources(few)
    describe(MERGED)
    report, data = take()
    left_out = sum(few.labels[image] == "fear" for image in list(few.labels)[:30])
    assert report.n_train == 60 - left_out
    assert f"one: left out, as `class_map` says: {left_out} of 'contempt'" in report.notes
    assert {image.split("-")[0] for image in data.ids.tolist()} == {"one", "two"}
    assert data.source.tolist() == [image.split("-")[0] for image in data.ids.tolist()]
    names = np.array(report.competition.classes)[data.labels]
    for image, name in zip(data.ids.tolist(), names.tolist(), strict=True):
        source, number = image.split("-")
        assert name == few.labels[str(int(number) + (1 if source == "one" else 30))]
    with Path("inputs/toy/train.csv").open(newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert list(rows["two-1"]) == ["id", "label", "source"]
    assert {row["source"] for row in rows.values()} == {"one", "two"}
    for source in ("one", "two"):
        assert report.by_source[source] == {
            label: count
            for label in EMOTIONS
            if (count := sum(row["source"] == source and row["label"] == label for row in rows.values()))
        }
    assert "two" in text(report)
    assert take("inputs/toy")[1].sha256 == data.sha256


def test_unmapped_classes_are_told_from_both_sides_and_missing_sources_with_them(few: Faces, here: Path) -> None:
    two_sources(few)
    describe(MERGED.replace("anger: angry", "angry_: angry") + "  - {name: three, path: Three}\n")
    anger = sum(few.labels[image] == "angry" for image in list(few.labels)[:30])
    assert refused() == (
        "hand/One (one): classes that are neither mapped nor the competition's: "
        f"'anger' ({anger} images; did you mean 'angry'?)\n"
        "  fix: map them in competition.yaml, under `class_map`, or to null to leave them out; "
        "the competition's classes are: angry, disgust, fear, happy, neutral, sad, surprise\n"
        "hand/Three: there is no such folder\n"
        "  fix: put the source 'three' there, or mend its `path` in competition.yaml\n"
        "2 errors; nothing was written."
    )


def test_one_source_is_mapped_too_and_parts_must_be_known(few: Faces, here: Path) -> None:
    rows = [(image, label.upper()) for image, label in few.labels.items()]
    table(Path("hand"), [("id", "label"), *rows])
    for image, raw in few.files.items():
        Path("hand", f"{image}.jpg").write_bytes(raw)
    mapped = "\n".join(f"  {label.upper()}: {label}" for label in EMOTIONS if label != "fear")
    describe(f"{YAML}class_map:\n{mapped}\n  FEAR: null\n")
    report, data = take()
    assert report.n_train == len(data.ids) == sum(label != "fear" for label in few.labels.values())
    assert report.n_test == 0
    assert "class 'fear' has no image" in report.notes

    shutil.rmtree("hand")
    as_part_folders(few, Path("hand"))
    split = "split: {kind: column, column: %s, train: [train], val: [tests]}\n"
    Path("inputs/toy/folds.csv").unlink()
    describe(YAML.split("split:")[0] + split % "part")
    assert refused().startswith("hand/archive: unknown part 'test' (did you mean 'tests'?)\n")
    describe(YAML.split("split:")[0] + split % "Usage")
    assert refused().startswith("hand/archive: there is no column 'Usage' of parts; the parts are in 'part'\n")


# What is refused ------------------------------------------------------------------------------------------------------


def spoilt(few: Faces, change: Callable[[list[list[str]]], object]) -> None:
    rows = [list(few.cells(image)) for image in few.labels]
    change(rows)
    table(Path("hand"), [("emotion", "pixels"), *map(tuple, rows)], "fer.csv")


def test_faults_of_pixels_name_their_line_all_at_once(few: Faces, here: Path) -> None:
    def change(rows: list[list[str]]) -> None:
        rows[0][1] = rows[0][1] + " 7"
        rows[1][1] = rows[1][1].replace(" ", " 256 ", 1)
        rows[2][1] = rows[2][1].replace(" ", " -1 ", 1)
        rows[3][1] = "12x " + rows[3][1]
        rows[4][0] = "7"
        rows[5][0] = "happy"
        rows[6][1] = " "
        rows[7][0] = ""
        rows[8].append("more")
        rows[9][1] = "0012 " + rows[9][1].split(" ", 1)[1]
        rows[10][1] = rows[10][1].replace(" ", "  ")

    spoilt(few, change)
    with pytest.raises(DataError) as caught:
        take()
    assert sorted((int(fault.where.split(":")[1]), fault.what) for fault in caught.value.faults) == [
        (2, "has 2,305 pixels, but 2,304 (48x48) are expected"),
        (3, "pixel 2 must be a whole number from 0 to 255, but got '256'"),
        (4, "pixel 2 must be a whole number from 0 to 255, but got '-1'"),
        (5, "pixel 1 must be a whole number from 0 to 255, but got '12x'"),
        (6, "unknown emotion '7'"),
        (7, "unknown emotion 'happy'"),
        (8, "pixels is blank"),
        (9, "emotion is blank"),
        (10, "expected 2 cells, but got 3"),
        (11, "pixel 1 must be a whole number from 0 to 255, but got '0012'"),
    ]
    assert not Path("inputs/toy").exists()


def test_a_cut_archive_is_a_fault(few: Faces, here: Path) -> None:
    as_gzip(few, Path("hand"))
    path = Path("hand/fer2013.csv.gz")
    path.write_bytes(path.read_bytes()[:-2000])
    assert "cannot be read on: " in refused()


def test_two_formats_in_one_folder_are_named_and_one_can_be_chosen(few: Faces, here: Path) -> None:
    as_pixels(few, Path("hand"))
    as_folders(few, Path("hand"))
    assert refused() == (
        "hand: could be read as `pixels` (fer2013.csv), and `folders` (angry/, disgust/, fear/ ...)\n"
        "  fix: leave one of them there, or choose in competition.yaml: `files: {format: pixels}`\n"
        "1 error; nothing was written."
    )
    describe(YAML + "files: {format: folders}\n")
    assert take()[0].n_train == 60
    as_icml(few, Path("hand"))
    describe(YAML + "files: {format: pixels}\n")
    assert "expected one CSV with the columns emotion and pixels, but got 2" in refused()
    describe(YAML + "files: {format: pixels, train: icml_face_data.csv}\n")
    assert take()[0].n_train == 60


def test_nothing_recognised_says_what_would_be(here: Path) -> None:
    Path("hand/angry").mkdir(parents=True)
    Path("hand/readme.txt").write_text("x")
    told = refused()
    assert told.startswith("hand: nothing here is recognised as a hand-out; there is: angry/, readme.txt\n")
    for piece in ("table      train.csv", "pixels     a CSV", "folders    one folder a class", "datasets   a copy of"):
        assert piece in told
    assert class_folders(Path("hand")) == []


def test_a_pattern_that_does_not_fit_is_told(few: Faces, here: Path) -> None:
    as_pixels(few, Path("hand"))
    describe(YAML + 'files: {pattern: "{id}.jpg"}\n')
    assert refused().startswith(
        "hand/fer2013.csv:2: would be kept as 1.png, which does not fit the pattern '{id}.jpg'\n"
    )


def test_without_the_library_its_formats_say_what_to_install(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("hand").mkdir()
    Path("hand/x.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("hand", "hf:owner/name"):
        told = refused(source, FoldwiseError)
        assert told == 'datasets is not installed\n  fix: pip install "foldwise[hf]"'


@pytest.mark.slow
def test_faults_of_a_copy_of_a_data_set(few: Faces, here: Path) -> None:
    pytest.importorskip("datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq

    Path("hand").mkdir()
    Path("secret.jpg").write_bytes(few.files["1"])
    images = [{"bytes": few.files[image], "path": None} for image in ("1", "2", "3", "4")]
    rows = {
        "image": [*images, {"bytes": None, "path": str(Path("secret.jpg").resolve())}],
        "id": ["a", "a", "../b", "c", "d"],
        "label": ["happy", "happy", "sad", None, "sad"],
    }
    pq.write_table(pa.table(rows), "hand/x.parquet")
    with pytest.raises(DataError) as caught:
        take()
    assert [(fault.where, fault.what) for fault in caught.value.faults] == [
        ("hand:train:2", "id 'a' is there twice"),
        ("hand:train:3", "'../b' cannot be an id"),
        ("hand:train:5", "image holds no bytes"),
        ("label", "there is one class only: happy"),
    ]
    Path("hand/x.parquet").write_bytes(b"no")
    assert refused().startswith("hand: cannot be read: ")


@pytest.mark.slow
def test_the_hub_out_of_reach_says_what_to_do(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    import datasets

    from foldwise.errors import HubError

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    told = refused("hf:owner/name@v1:small", HubError)
    assert told == (
        "hf:owner/name@v1:small: the hub cannot be reached\n"
        "  (ConnectionError: Couldn't reach 'owner/name' on the Hub (LocalEntryNotFoundError))\n"
        "  fix: go online; or on another machine `hf download --repo-type dataset owner/name --local-dir <folder>`, "
        "bring the folder here, and give FROM=<folder>"
    )
    assert refused("hf:a/b/c").startswith("FROM=hf:a/b/c: names no data set of the hub\n")


# The real thing -------------------------------------------------------------------------------------------------------


@needs_fer
@pytest.mark.slow
def test_fer2013_is_read_whole() -> None:
    faults: list[Fault] = []
    with open_hand_out(FER, ColumnsSpec(), None, faults) as hand_out:
        counts = Counter(hand_out.labels)
        first = decode(hand_out.read("1", faults) or b"", ImageSpec(height=48, width=48, channels=1), "1")
    assert faults == []
    assert [counts[name] for name in EMOTIONS] == [4016, 452, 4111, 7204, 4829, 3360, 4957]
    with gzip.open(FER / "fer2013.csv.gz", "rt", newline="") as file:
        row = next(csv.DictReader(file))
    assert first.ravel().tolist() == [int(number) for number in row["pixels"].split()]


@pytest.mark.parametrize("name", ["fer2013", "fer2013_usage", "expressions3", "faces_folders"])
def test_the_descriptions_that_come_with_foldwise_are_sound(name: str) -> None:
    assert sorted(load_competition(REPO, name).classes) == sorted(EMOTIONS)


def test_the_three_merged_sets_are_mapped_from_their_own_names(few: Faces, here: Path) -> None:
    shutil.copytree(REPO / "inputs" / "expressions3", "inputs/toy")
    path = Path("inputs/toy/competition.yaml")
    path.write_text(path.read_text().replace("name: expressions3", "name: toy"))
    named = {
        "FERPlus/train": ["neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt"],
        "AffectNet/train": list("01234567"),
        "RAF-DB/train": list("1234567"),
    }
    raw = iter(few.files.values())
    for folder, classes in named.items():
        for label in classes:
            Path("hand", folder, label).mkdir(parents=True)
            Path("hand", folder, label, "1.jpg").write_bytes(next(raw))
    report, data = take()
    assert data.images.shape == (21, 112, 112, 3)
    label_of = dict(zip(data.ids.tolist(), np.array(report.competition.classes)[data.labels].tolist(), strict=True))
    assert (
        label_of["affectnet-train-6-1"] == label_of["rafdb-train-6-1"] == label_of["ferplus-train-anger-1"] == "angry"
    )
    assert label_of["affectnet-train-3-1"] == label_of["rafdb-train-1-1"] == "surprise"
    assert all(counts.total() == 7 and max(counts.values()) == 1 for counts in report.by_source.values())
