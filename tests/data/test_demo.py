"""The demo hand-out is the same to the byte each time, holds every class, and has twins and wrong labels."""

from __future__ import annotations

import csv
import io
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foldwise.data.demo import CLASSES, SHARES, draw_demo, draw_face
from foldwise.data.ingest import ingest


def labels(path: Path) -> dict[str, str]:
    with path.open() as file:
        return {row["id"]: row["label"] for row in csv.DictReader(file)}


def test_same_seed_same_bytes_and_another_seed_other_faces(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        draw_demo(tmp_path / folder, seed=seed, train=60, test=20)
    for name in ("dataset.zip", "train.csv", "test_labels.csv"):
        first, again, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert first == again
        assert first != other


@pytest.mark.parametrize("seed", range(3))
def test_a_tiny_one_has_every_class_twice_and_each_kind_of_twin(seed: int, tmp_path: Path) -> None:
    draw_demo(tmp_path / "handout", seed=seed, train=60, test=20)
    counts = Counter(labels(tmp_path / "handout" / "train.csv").values())
    assert set(counts) == set(CLASSES)
    assert min(counts.values()) >= 2
    report = ingest(tmp_path / "handout", tmp_path, "demo")
    assert {pair.kind for pair in report.pairs} == {"same label", "conflicting labels", "across train and test"}


def test_it_looks_like_a_real_hand_out(tmp_path: Path) -> None:
    draw_demo(tmp_path, train=300, test=50)
    with zipfile.ZipFile(tmp_path / "dataset.zip") as archive:
        assert archive.namelist() == [f"{number}.jpg" for number in range(1, 351)]
        with Image.open(io.BytesIO(archive.read("350.jpg"))) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "L", (48, 48))
    train, test = labels(tmp_path / "train.csv"), labels(tmp_path / "test_labels.csv")
    assert list(train) == [str(number) for number in range(1, 301)]
    assert list(test) == [str(number) for number in range(301, 351)]
    counts = Counter(train.values())
    for name, share in SHARES.items():
        assert counts[name] / 300 == pytest.approx(share, abs=0.03)


def test_faces_of_one_emotion_resemble_each_other_more_than_chance() -> None:
    def mean_face(emotion: str, first: int) -> np.ndarray:
        faces = [draw_face(emotion, np.random.default_rng([first, number])) for number in range(60)]
        mean = np.mean(faces, axis=0)[24:42, 10:38]
        return (mean - mean.mean()) / mean.std()

    names = ("happy", "surprise", "angry")
    ours, theirs = ([mean_face(name, first) for name in names] for first in (1, 2))
    distance = [[float(np.abs(a - b).mean()) for b in theirs] for a in ours]
    assert [int(np.argmin(row)) for row in distance] == [0, 1, 2]
