"""The rules of the spec's sections, and what follows from a spec."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from foldwise.spec.model import ExperimentSpec, mapped_classes, resolved

LEAST: dict[str, Any] = {
    "name": "a",
    "competition": "b",
    "model": {"arch": "resnet18"},
    "optim": {"lr": 0.001},
    "train": {"epochs": 3},
}


def spec(**changes: Any) -> ExperimentSpec:
    return ExperimentSpec.model_validate_json(json.dumps({**LEAST, **changes}))


def test_the_least_spec_is_valid_frozen_and_whole_when_resolved() -> None:
    least = spec()
    assert least.seeds == (42,)
    assert resolved(least)["schedule"]["name"] == "cosine"
    assert ExperimentSpec.model_validate_json(json.dumps(resolved(least))) == least
    with pytest.raises(ValidationError, match="frozen"):
        least.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Upper"}, "expected lower-case letters"),
        ({"name": "../up"}, "expected lower-case letters"),
        ({"seeds": [1, 1]}, "expected distinct seeds, but got \\[1, 1\\]"),
        ({"seeds": [-1]}, "expected seeds from 0 to 2\\*\\*32 - 1"),
        ({"seeds": []}, "at least 1 item"),
        ({"tta": ["zoom"]}, "unknown view 'zoom'"),
        ({"tta": ["rotate_0"]}, "a rotation must lie between 0 and 180 degrees, but got 'rotate_0'"),
        ({"tta": ["zoom_2.5+hflip"]}, "a zoom must lie between 0.5 and 2, but got 'zoom_2.5\\+hflip'"),
        ({"tta": ["hflip", "hflip"]}, "expected distinct views"),
        (
            {"model": {"arch": "a", "options": {"checkpoint_path": "oof/b/weights.safetensors"}}},
            "`checkpoint_path` brings weights of which nothing is known; they are named by `model.weights`",
        ),
        (
            {"model": {"arch": "a", "weights": "hub"}},
            "expected `pretrained`, `none` or `run:<exp.*>`, but got 'hub'",
        ),
        (
            {"model": {"arch": "a", "head": {"hidden": [256], "dropout": [0.5]}}},
            "one value before each of the 2 linear layers, but got \\[0.5\\]",
        ),
        ({"model": {"arch": "a", "head": {"hidden": [0]}}}, "greater than or equal to 1"),
        ({"model": {"arch": "a", "head": {}, "dropout": 0.2}}, "with `head`, give `head.dropout`"),
        ({"label_map": {"x": "one", "y": "one"}}, "expected two classes or more, but all become 'one'"),
        ({"label_map": {"x": "one", "y": " "}}, "a class must not be blank"),
        ({"optim": {"lr": 1, "layer_decay": 0.7, "backbone_lr_scale": 0.1}}, "both set the backbone's rate"),
        ({"train": {"epochs": 3, "freeze_backbone_epochs": 3}}, "must hold, but got \\(3, 3\\)"),
        ({"schedule": {"warmup_epochs": 4}}, "must hold, but got \\(4.0, 3\\)"),
        ({"train": {"epochs": True}}, "valid integer"),
        ({"more": 1}, "Extra inputs"),
        ({"pseudo": {}}, "from\n  Field required"),
        ({"pseudo": {"from": []}}, "at least 1 item"),
        ({"pseudo": {"from": ["../up"]}}, "expected names of kept runs, but got '../up'"),
        ({"distill": {"from": ["x", "x"]}}, "expected distinct runs, but got \\['x', 'x'\\]"),
        ({"distill": {"from": ["x"], "weight": 0}}, "greater than 0"),
        ({"distill": {"from": ["x"], "temperature": 0.5}}, "greater than or equal to 1"),
        ({"pseudo": {"from": ["x"], "min_confidence": 1.1}}, "less than or equal to 1"),
        ({"external": [{"source": "../up"}]}, "expected the name of a folder under inputs/, but got '../up'"),
        ({"external": [{"source": "x"}, {"source": "x"}]}, "expected distinct sources, but got \\['x', 'x'\\]"),
        ({"external": [{"source": "b"}]}, "`external` names the competition itself: 'b'"),
        ({"external": [{"source": "x", "weight": 0}]}, "greater than 0"),
        ({"external": [{"class_map": {}}]}, "source\n  Field required"),
        ({"external": [{"source": "x", "class_map": {"y": 1}}]}, "valid string"),
        ({"external": [{"source": "x", "weights": 1}]}, "Extra inputs"),
        ({"clear_of": ["../up"]}, "expected names of folders under inputs/, but got '../up'"),
        ({"clear_of": ["x", "x"]}, "expected distinct competitions, but got \\['x', 'x'\\]"),
        ({"clear_of": ["b"]}, "`clear_of` names the competition itself: 'b'"),
        (
            {"clear_of": ["x"], "external": [{"source": "x"}]},
            "`external` and `clear_of` both name 'x': train on its images, or keep clear of them",
        ),
        (
            {"clear_of": ["x"], "train": {"epochs": 2, "keep": "best", "watch": "scored"}},
            "`clear_of` does not go with `train.watch: scored`: scored images may be copies, and their labels would "
            "choose the weights",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        spec(**changes)


@given(st.lists(st.sampled_from("abcdef"), unique=True, min_size=2), st.data())
def test_merged_classes_keep_the_order_of_their_first(classes: list[str], data: st.DataObject) -> None:
    label_map = {label: data.draw(st.sampled_from("XYZ")) for label in classes}
    own, becomes = mapped_classes(classes, label_map)
    assert set(own) == set(label_map.values())
    assert [own[index] for index in becomes] == [label_map[label] for label in classes]
    firsts = [becomes.index(index) for index in range(len(own))]
    assert firsts == sorted(firsts)
    assert mapped_classes(classes, None) == (tuple(classes), list(range(len(classes))))


@pytest.mark.parametrize(
    ("changes", "marks"),
    [
        ({}, []),
        ({"train": {"epochs": 3, "watch": "scored"}}, []),
        ({"train": {"epochs": 3, "watch": "scored", "keep": "best"}}, ["optimistic"]),
        ({"train": {"epochs": 3, "watch": "scored", "early_stop_patience": 2}}, ["optimistic"]),
        ({"train": {"epochs": 3, "watch": "scored"}, "schedule": {"name": "plateau"}}, ["optimistic"]),
        ({"train": {"epochs": 3, "keep": "best"}, "schedule": {"name": "plateau"}}, []),
        ({"pseudo": {"from": ["x"]}}, ["transductive"]),
        ({"distill": {"from": ["x"]}}, []),
        (
            {"train": {"epochs": 3, "watch": "scored", "keep": "best"}, "pseudo": {"from": ["x"]}},
            ["optimistic", "transductive"],
        ),
    ],
)
def test_only_a_spec_that_watches_the_scored_fold_is_optimistic_and_only_pseudo_labels_are_transductive(
    changes: dict[str, Any], marks: list[str]
) -> None:
    assert spec(**changes).marks == marks


def test_teachers_are_called_by_the_key_of_the_file() -> None:
    student = spec(pseudo={"from": ["x", "y"]}, distill={"from": ["z"]})
    assert student.pseudo is not None
    assert student.distill is not None
    assert (student.pseudo.teachers, student.distill.teachers) == (("x", "y"), ("z",))
    assert resolved(student)["pseudo"] == {"from": ["x", "y"], "min_confidence": 0.9, "hard": True, "weight": 1.0}
    assert resolved(student)["distill"] == {"from": ["z"], "weight": 0.7, "temperature": 2.0}


def test_a_class_of_external_data_may_become_none() -> None:
    asked = spec(external=[{"source": "x", "class_map": {"y": None, "z": "a"}}, {"source": "w", "weight": 0.5}])
    assert resolved(asked)["external"] == [
        {"source": "x", "class_map": {"y": None, "z": "a"}, "weight": 1.0},
        {"source": "w", "class_map": {}, "weight": 0.5},
    ]
    assert (resolved(spec())["external"], resolved(spec())["clear_of"]) == ([], [])
