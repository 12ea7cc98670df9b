"""A competition's description is checked, and its arrays come from a cache that is never stale."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foldwise.data.competition import CompetitionSpec, load_competition, load_dataset
from foldwise.errors import DataError, FoldwiseError, SpecError

YAML = """\
name: toy
classes: [a, b]
image: {height: 2, width: 2, channels: 1}
"""


def described(root: Path, yaml: str) -> CompetitionSpec:
    path = root / "inputs" / "toy" / "competition.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml)
    return load_competition(root, "toy")


@pytest.fixture
def copy(demo_root: Path, tmp_path: Path) -> Path:
    shutil.copytree(demo_root / "inputs", tmp_path / "inputs")
    return tmp_path


def test_defaults(tmp_path: Path) -> None:
    spec = described(tmp_path, YAML)
    assert (spec.metric, spec.image.fit, spec.split.kind, spec.split.folds) == ("accuracy", "exact", "kfold", 5)
    assert spec.submission_ids is None
    assert described(tmp_path, YAML + "test_ids: 9-11\n").submission_ids == ("9", "10", "11")


@pytest.mark.parametrize(
    ("yaml", "messages"),
    [
        (YAML.replace("toy", "other"), ["yaml:1:7: `name` must be the folder's name 'toy', but got 'other'"]),
        (YAML.replace("[a, b]", "[a, a]"), ["competition.yaml:2:10: ", "'a' is given twice"]),
        (YAML + "test_ids: 11-9\n", ["competition.yaml:4:11: ", "expected `first-last` with first <= last"]),
        (YAML + "columns: {id: x, label: x}\n", ["must differ, but both are 'x'"]),
        (YAML + "class_map: {x: c}\n", ["`class_map` maps 'x' to 'c', which is none of `classes`"]),
        (YAML + "sources:\n  - {name: s, path: ../s}\n  - {name: S, path: s}\n", [
            "competition.yaml:5:21: ", "expected a folder below FROM, but got '../s'",
            "competition.yaml:6:12: ", "expected lower-case letters, digits and `_`, but got 'S'",
        ]),
        (YAML + "sources: [{name: s, path: s}, {name: s, path: t}]\n", ["but 's' is given twice"]),
        (YAML + "class_map: {x: a}\nsources: [{name: s, path: s}]\n", ["`class_map` has no effect with `sources`"]),
        (YAML + "metrics: accuracy\n", ["competition.yaml:4:1: unknown key `metrics`", "did you mean `metric`?"]),
        (YAML.replace("height: 2", "height: 0") + "split: {kind: full, folds: 3}\n", [
            "competition.yaml:3:17: ", "has no effect with `kind: full`", "2 errors; nothing ran.",
        ]),
    ],
)  # fmt: skip
def test_faults_of_the_description_are_located(yaml: str, messages: list[str], tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        described(tmp_path, yaml)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("nope", "`make data COMP=nope FROM=<folder>`, where the folder holds what was handed out"),
        ("demo", "`make demo` draws it"),
    ],
)
def test_a_missing_competition_says_how_to_get_it(
    name: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_competition(tmp_path, name)
    assert str(caught.value) == (
        f"inputs/{name}/competition.yaml: there is no such file\n  fix: {fix}\n1 error; nothing was written."
    )


def test_the_arrays_fit_together(demo_root: Path) -> None:
    data = load_dataset(demo_root, "demo")
    assert data.images.shape == (170, 48, 48, 1)
    assert data.images.dtype == np.uint8
    assert isinstance(data.images, np.memmap)
    assert not data.images.flags.writeable
    assert data.ids.tolist() == [str(number) for number in range(1, 171)]
    assert data.labels.dtype == np.int64
    assert (data.labels >= 0).sum() == 140
    assert data.folds.ids.tolist() == data.ids[data.labels >= 0].tolist()
    for row in (0, 42, 169):
        with Image.open(demo_root / "inputs" / "demo" / "images" / f"{data.ids[row]}.jpg") as image:
            assert (np.asarray(image) == data.images[row, :, :, 0]).all()


def test_the_second_split_differs_and_a_third_is_not_there(demo_root: Path) -> None:
    first, second = (load_dataset(demo_root, "demo", split=split) for split in (0, 1))
    assert first.sha256 == second.sha256
    assert (first.folds.fold != second.folds.fold).any()
    with pytest.raises(DataError, match="there is no split 2; splits here: 0, 1"):
        load_dataset(demo_root, "demo", split=2)


def test_the_hash_knows_pixels_and_labels_and_nothing_else(copy: Path, demo_root: Path) -> None:
    folder = copy / "inputs" / "demo"
    before = load_dataset(demo_root, "demo").sha256
    assert load_dataset(copy, "demo").sha256 == before
    rows = (folder / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("\n".join([rows[0], *reversed(rows[1:])]))
    assert load_dataset(copy, "demo").sha256 == before, "row order is no content"
    image, label = rows[1].split(",")
    (folder / "train.csv").write_text(
        "\n".join([rows[0], f"{image},{'sad' if label != 'sad' else 'happy'}", *rows[2:]])
    )
    assert load_dataset(copy, "demo").sha256 != before


def test_the_cache_is_used_while_it_is_current(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_dataset(copy, "demo")
    monkeypatch.setattr("foldwise.data.competition.decode", None)
    monkeypatch.setattr("foldwise.data.competition.sha256_bytes", None)
    load_dataset(copy, "demo")


def test_touched_files_are_read_but_not_decoded_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(copy / "inputs" / "demo" / "images" / "3.jpg", (1, 1))
    monkeypatch.setattr("foldwise.data.competition.decode", None)
    load_dataset(copy, "demo")


@pytest.mark.parametrize("loss", ["all", "npy", "record", "cut", "garbled"])
def test_a_lost_or_broken_cache_is_remade(loss: str, copy: Path) -> None:
    before = load_dataset(copy, "demo")
    cache = copy / "inputs" / "demo" / "cache"
    (npy,), (record,) = cache.glob("*.npy"), cache.glob("*.json")
    if loss == "all":
        shutil.rmtree(cache)
    elif loss == "cut":
        npy.write_bytes(npy.read_bytes()[:1000])
    elif loss == "garbled":
        record.write_text("{")
    else:
        (npy if loss == "npy" else record).unlink()
    after = load_dataset(copy, "demo")
    assert after.sha256 == before.sha256
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]


def test_a_changed_image_is_noticed(copy: Path) -> None:
    before = load_dataset(copy, "demo")
    folder = copy / "inputs" / "demo" / "images"
    shutil.copyfile(folder / "5.jpg", folder / "4.jpg")
    after = load_dataset(copy, "demo")
    assert after.sha256 != before.sha256
    assert (after.images[3] == before.images[4]).all()


def test_another_size_in_the_description_is_another_cache(copy: Path) -> None:
    path = copy / "inputs" / "demo" / "competition.yaml"
    path.write_text(path.read_text().replace("height: 48", "height: 24").replace("fit: exact", "fit: squash"))
    assert load_dataset(copy, "demo").images.shape == (170, 24, 48, 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "train.csv").unlink(),
            "inputs/demo/train.csv: is missing\n  fix: `make demo` draws it",
        ),
        (lambda folder: (folder / "folds.csv").unlink(), "inputs/demo/folds.csv: is missing"),
        (lambda folder: shutil.rmtree(folder / "images"), "inputs/demo/images: is missing"),
        (
            lambda folder: (folder / "images" / "7.jpg").unlink(),
            "inputs/demo/images/7.jpg: is missing; labelled ids without an image: 1",
        ),
        (
            lambda folder: (folder / "images" / "8.jpg").write_bytes(b"no"),
            "inputs/demo/images/8.jpg: is no image: 2 bytes starting with b'no'",
        ),
        (
            lambda folder: (folder / "images" / "x.png").write_bytes(b"no"),
            "inputs/demo/images/x.png: does not fit the pattern '{id}.jpg' of competition.yaml",
        ),
        (
            lambda folder: (folder / "train.csv").write_text("id,label\n1,hapy\n"),
            "inputs/demo/train.csv:2: unknown label 'hapy' (did you mean 'happy'?)",
        ),
        (
            lambda folder: (folder / "train.csv").write_text("id,label\n1,happy\n2,sad\n"),
            "inputs/demo/folds.csv: 138 ids have a fold but no label, first '3'",
        ),
    ],
)
def test_files_that_do_not_fit_are_named(spoil, message: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    spoil(copy / "inputs" / "demo")
    with pytest.raises(FoldwiseError) as caught:
        load_dataset(copy, "demo")
    assert str(caught.value).startswith(message)


def test_a_star_takes_any_suffix_but_one_file_an_id(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    before = load_dataset(copy, "demo")
    folder = copy / "inputs" / "demo"
    yaml = (folder / "competition.yaml").read_text()
    (folder / "competition.yaml").write_text(yaml.replace("{id}.jpg", "{id}.*"))
    with Image.open(folder / "images" / "7.jpg") as image:
        image.save(folder / "images" / "7.png")
    with pytest.raises(DataError, match=r"inputs/demo/images/7\.png: is a second file of the id '7', after 7\.jpg"):
        load_dataset(copy, "demo")
    (folder / "images" / "7.jpg").unlink()
    assert load_dataset(copy, "demo").sha256 == before.sha256
