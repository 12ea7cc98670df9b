"""The committed catalogue is what the libraries offer, and refuses nothing that albumentations takes."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from foldwise.spec.catalogue import complaints

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "experiments" / "schema.json"

pytestmark = pytest.mark.slow


def test_the_committed_catalogue_is_current() -> None:
    from foldwise.learn.catalogue import generate, render

    assert render(generate()) == SCHEMA.read_text(encoding="utf-8"), (
        "experiments/schema.json is stale: `python run.py schema` writes it anew"
    )


def test_the_catalogue_is_a_schema_that_takes_a_whole_experiment() -> None:
    from jsonschema import Draft202012Validator

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    spec = {
        "name": "a",
        "competition": "b",
        "model": {"arch": "cnn_3block"},
        "augment": [{"HorizontalFlip": {}}, {"Affine": {"rotate": [-15, 15]}}],
        "optim": {"lr": 1e-3},
        "train": {"epochs": 3},
        "tta": ["identity", "zoom_1.1"],
    }
    validator = Draft202012Validator(schema)
    assert validator.is_valid(spec)
    assert not validator.is_valid({**spec, "tta": ["zoom"]})
    assert not validator.is_valid({**spec, "model": {"arch": "resnet19"}})
    assert not validator.is_valid({**spec, "augment": [{"HorizontalFlip": {"prob": 1}}]})


def built(name: str, parameters: dict[str, Any]) -> bool:
    """Whether albumentations takes the parameters."""
    import albumentations

    def tupled(value: Any) -> Any:
        return tuple(map(tupled, value)) if isinstance(value, list) else value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            kind = getattr(albumentations, name)
            # a few define __init__ without a schema of their own; these know no `strict`, and refuse by themselves
            strict = {} if "__init__" in vars(kind) and "InitSchema" not in vars(kind) else {"strict": True}
            kind(**{key: tupled(value) for key, value in parameters.items()}, **strict)
        except (ValueError, TypeError, KeyError):
            return False
    return True


NUMBERS = [-1000, -1, -0.5, 0, 0.005, 0.15, 0.5, 1, 1.5, 2, 3, 7, 9, 49, 64, 100.5, 255, 256, 361]
VALUES: list[Any] = [
    *NUMBERS,
    *([low, high] for low, high in itertools.product([-2, -0.5, 0, 0.1, 0.5, 1, 2, 3, 7, 101, 400], repeat=2)),
    [],
    [1],
    [1, 2, 3],
    "word",
    None,
    {},
    {"x": [0.1, 0.2]},
]


def test_nothing_is_refused_that_albumentations_takes_and_most_is_that_it_refuses() -> None:
    transforms = json.loads(SCHEMA.read_text(encoding="utf-8"))["properties"]["augment"]["items"]["properties"]
    needed = {"height": 32, "width": 32, "size": [32, 32], "min_max_height": [24, 32], "num_grid_xy": [4, 4]}
    needed |= {"magnitude": 3}
    special: dict[str, dict[str, Any]] = {
        "CropAndPad": {"px": 2},
        "LongestMaxSize": {"max_size": 48},
        "SmallestMaxSize": {"max_size": 48},
    }
    false_alarms, missed, agreed = [], 0, 0
    for name, schema in transforms.items():
        base = {key: needed[key] for key in schema.get("required", [])} | special.get(name, {})
        assert built(name, base), name
        for parameter, value in itertools.product(schema["properties"], VALUES):
            parameters = {**base, parameter: value}
            refused = bool(complaints({"augment": [{name: parameters}]}, ROOT, channels=3))
            taken = built(name, parameters)
            # albumentations reads 0 and 1 as false and true; a spec says what it means
            if refused and taken and schema["properties"][parameter].get("type") != "boolean":
                false_alarms.append((name, parameter, value))
            missed += not refused and not taken
            agreed += refused and not taken
    assert false_alarms == []
    # What is missed are rules between parameters and a few functions; albumentations speaks of them when it builds.
    assert missed < 0.05 * agreed, (missed, agreed)


def test_every_default_is_valid() -> None:
    transforms = json.loads(SCHEMA.read_text(encoding="utf-8"))["properties"]["augment"]["items"]["properties"]
    for name, schema in transforms.items():
        defaults = {key: value["default"] for key, value in schema["properties"].items() if "default" in value}
        found = complaints({"augment": [{name: defaults}]}, ROOT, channels=3)
        assert [complaint for complaint in found if not complaint.what.startswith("missing")] == []
