"""What the catalogue says of names and parameters, with its mends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from foldwise.errors import FoldwiseError
from foldwise.spec import catalogue
from foldwise.spec.catalogue import Complaint, complaints

ROOT = Path(__file__).resolve().parents[2]


def augment(*entries: Any, channels: int | None = 3) -> list[Complaint]:
    return complaints({"augment": list(entries)}, ROOT, channels=channels)


@pytest.mark.parametrize(
    ("entry", "what", "fix"),
    [
        ({"HorizontalFlip": {"prob": 1}}, "`HorizontalFlip` has no parameter `prob`", "did you mean `p`?"),
        ({"Blur": {"blur_limt": 3}}, "`Blur` has no parameter `blur_limt`", "did you mean `blur_limit`?"),
        ({"horizontalflip": {}}, "unknown transform `horizontalflip`", "did you mean `HorizontalFlip`?"),
        ({"Lambda": {}}, "unknown transform `Lambda`", "see albumentations' transforms of images alone"),
        ({"HorizontalFlip": {"p": 2}}, "`HorizontalFlip.p` must be a number from 0 to 1, but got the integer 2", ""),
        ({"HorizontalFlip": {"p": True}}, "`HorizontalFlip.p` must be a number from 0 to 1, but got true", ""),
        (
            {"Affine": {"rotate": "wide"}},
            "`Affine.rotate` must be a list of 2 numbers or a number, but got the string 'wide'",
            "",
        ),
        (
            {"Downscale": {"scale_range": [0.9, 0.1]}},
            "`Downscale.scale_range` must be a list of 2 numbers from 0 to 1, the first no larger than the second, "
            "but got [0.9, 0.1]",
            "",
        ),
        (
            {"Affine": {"rotate_method": "box"}},
            "`Affine.rotate_method` must be one of largest_box, ellipse, but got the string 'box'",
            "",
        ),
        (
            {"CenterCrop": {"height": 32}},
            "missing parameter `width` of `CenterCrop`",
            "add `width: ...`: an integer of at least 1",
        ),
        ({}, "`augment.0` must hold one transform, but got nothing", "give each transform a `- ` of its own"),
        (
            {"Blur": {}, "Transpose": {}},
            "`augment.0` must hold one transform, but got Blur, Transpose",
            "give each transform a `- ` of its own",
        ),
    ],
)
def test_transforms(entry: dict[str, Any], what: str, fix: str) -> None:
    (complaint,) = augment(entry)
    assert complaint.what == what
    assert complaint.fix.startswith(fix)
    assert bool(complaint.fix) == bool(fix)


def test_all_complaints_come_with_their_places() -> None:
    found = augment({"Affine": {}}, {"CenterCrop": {"hight": 3, "pad_if_needed": 7}})
    assert [(complaint.loc, complaint.on_key) for complaint in found] == [
        (("augment", 1, "CenterCrop", "hight"), True),
        (("augment", 1, "CenterCrop", "pad_if_needed"), False),
        (("augment", 1, "CenterCrop", "height"), False),
        (("augment", 1, "CenterCrop", "width"), False),
    ]


def test_colour_transforms_are_fine_where_the_channels_are_unknown() -> None:
    assert augment({"RandomRain": {}}, channels=None) == []
    assert augment({"RandomRain": {}}, channels=3) == []
    assert len(augment({"RandomRain": {}}, channels=1)) == 1


@pytest.mark.parametrize(
    "spec", [{}, {"model": 3}, {"model": {"arch": 3}}, {"optim": []}, {"augment": "x"}, {"augment": [3]}]
)
def test_wrong_types_are_left_to_the_models(spec: dict[str, Any]) -> None:
    assert complaints(spec, ROOT, channels=1) == []


@pytest.mark.parametrize(
    ("model", "what", "fix"),
    [
        ({"arch": "resnet18"}, None, ""),
        ({"arch": "cnn_3block"}, None, ""),
        ({"arch": "resnet18.a1_in1k", "weights": "pretrained"}, None, ""),
        ({"arch": "resnet18", "weights": "pretrained"}, None, ""),
        ({"arch": "Resnet18"}, "unknown architecture 'Resnet18'", "did you mean `resnet18`?"),
        (
            {"arch": "resnet50d.a1"},
            "`resnet50d` has no weights tagged 'a1'",
            "its tags: a1_in1k, a2_in1k, a3_in1k, gluon_in1k, ra2_in1k, ra4_e3600_r224_in1k",
        ),
        ({"arch": "qqqq"}, "unknown architecture 'qqqq'", "timm.list_models() names them"),
        (
            {"arch": "cnn_3block", "weights": "pretrained"},
            "`cnn_3block` has no pretrained weights on the hub",
            "write `none`, or `run:<experiment>`",
        ),
    ],
)
def test_architectures(model: dict[str, Any], what: str | None, fix: str) -> None:
    found = complaints({"model": model}, ROOT, channels=1)
    assert [(complaint.what, complaint.fix) for complaint in found] == ([(what, fix)] if what else [])


@pytest.mark.parametrize(
    ("name", "fix"),
    [("adamw", None), ("Adam", "did you mean `adam`?"), ("qqq", "some are adamw, adam, sgd, nadamw, lamb, lion")],
)
def test_optimizers(name: str, fix: str | None) -> None:
    found = complaints({"optim": {"name": name}}, ROOT, channels=1)
    assert [complaint.fix for complaint in found] == ([fix] if fix else [])


def test_the_roots_own_catalogue_comes_first_and_a_missing_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / catalogue.SCHEMA
    path.parent.mkdir()
    path.write_text('{"$defs": {"OptimSpec": {"properties": {"name": {"enum": ["mine"]}}}}}')
    assert complaints({"optim": {"name": "mine"}}, tmp_path, channels=1) == []
    monkeypatch.setattr(catalogue, "SCHEMA", Path("nowhere.json"))
    with pytest.raises(FoldwiseError, match=r"nowhere\.json: there is no such file.*\n  fix: `python run.py schema"):
        complaints({"optim": {"name": "mine"}}, tmp_path / "other", channels=1)
