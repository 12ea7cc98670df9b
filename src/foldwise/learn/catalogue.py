"""What the libraries offer, as the JSON Schema of an experiment file: `experiments/schema.json`.

Editors complete names and parameters from it, and `check` validates against it without importing the libraries.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before the import: else it asks for its newest version

import albumentations
import numpy as np
import timm
import timm.optim
from albumentations.core.transforms_interface import BasicTransform, Transform3D
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from foldwise.files import atomic_write
from foldwise.learn.models import OWN_ARCHS
from foldwise.spec.model import VIEW_NAME, WEIGHTS, ExperimentSpec

# Optimizers of packages that Foldwise does not install or that need opt_einsum, and one of second derivatives.
_NO_OPTIMIZERS = ("bnb", "fused", "adahessian", "kron")
# They take functions, volumes, boxes or masks, and do nothing of their own on an image alone.
_NO_TRANSFORMS = ("AtLeastOneBBoxRandomCrop", "ConstrainedCoarseDropout", "Lambda", "ToTensor3D")
# A transform is tried before it is listed: these are for the parameters that it cannot do without, on 48x48 pixels.
_TRIAL = {
    "height": 32,
    "width": 32,
    "size": (32, 32),
    "min_max_height": (24, 32),
    "num_grid_xy": (4, 4),
    "magnitude": 3,
}
_TRIAL_OF = {
    "Crop": {"x_max": 32, "y_max": 32},
    "CropAndPad": {"px": 2},
    "LongestMaxSize": {"max_size": 48},
    "SmallestMaxSize": {"max_size": 48},
}


def generate() -> dict[str, Any]:
    """Ask timm and albumentations what they offer.

    Returns:
        A JSON Schema (draft 2020-12) of an experiment file. Beyond the standard, a list of two ends with `x-ordered`
        must not fall, and `x-foldwise` holds the libraries' versions, the architectures without weights on the hub
        (`untrained`) and the transforms that take colour images alone (`colour_only`).
    """
    pretrained = set(timm.list_models(pretrained=True))
    bare = set(timm.list_models()) | set(OWN_ARCHS)
    transforms, colour_only = _transforms()
    optimizers = [name for name in timm.optim.list_optimizers() if not name.startswith(_NO_OPTIMIZERS)]

    schema = _without_titles(ExperimentSpec.model_json_schema())
    definitions = schema["$defs"]
    definitions["ModelSpec"]["properties"]["arch"]["enum"] = sorted(pretrained | bare)
    definitions["ModelSpec"]["properties"]["weights"]["pattern"] = f"^({WEIGHTS.pattern})$"
    definitions["OptimSpec"]["properties"]["name"]["enum"] = sorted(optimizers)
    # JSON Schema's regular expressions know no named groups of Python's spelling.
    views = re.sub(r"\?P<\w+>", "", VIEW_NAME.pattern)
    schema["properties"]["tta"]["items"]["pattern"] = f"^({views})$"
    schema["properties"]["augment"]["items"] = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
        "properties": transforms,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A Foldwise experiment",
        **schema,
        "x-foldwise": {
            "versions": {"albumentations": albumentations.__version__, "timm": timm.__version__},
            "colour_only": colour_only,
            "untrained": sorted(bare - {name.split(".")[0] for name in pretrained}),
        },
    }


def render(catalogue: dict[str, Any]) -> str:
    """The text of `schema.json`: whatever fits a line stands on one, so that a new name is one line of a diff."""
    return _rendered(catalogue, "") + "\n"


def write(path: Path) -> None:
    """Write the catalogue of the installed libraries to `path`, e.g. `experiments/schema.json`."""
    atomic_write(path, render(generate()))


def _rendered(value: Any, indent: str) -> str:
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + len(indent) <= 110 or not isinstance(value, dict | list) or not value:
        return line
    inner = indent + " "
    if isinstance(value, list):
        parts = [_rendered(item, inner) for item in value]
    else:
        parts = [f"{json.dumps(key)}: {_rendered(item, inner)}" for key, item in value.items()]
    first, last = "[]" if isinstance(value, list) else "{}"
    return f"{first}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{last}"


def _transforms() -> tuple[dict[str, Any], list[str]]:
    schemas: dict[str, Any] = {}
    colour_only: list[str] = []
    for name in sorted(dir(albumentations)):
        kind = getattr(albumentations, name)
        if not (inspect.isclass(kind) and issubclass(kind, BasicTransform)) or issubclass(kind, Transform3D):
            continue
        if name in _NO_TRANSFORMS or not _keeps_pixels(kind, channels=3):
            continue
        try:
            schemas[name] = _transform_schema(kind)
        except PydanticInvalidForJsonSchema:
            continue  # it takes a function, which YAML cannot hold
        if not _keeps_pixels(kind, channels=1):
            colour_only.append(name)
    return schemas, colour_only


def _keeps_pixels(kind: type[BasicTransform], *, channels: int) -> bool:
    """Whether a transform makes uint8 pixels of uint8 pixels, and needs nothing else (masks, boxes, other images)."""
    needed = [name for name, parameter in _parameters(kind).items() if parameter.default is parameter.empty]
    if not set(needed) <= _TRIAL.keys():
        return False
    image = np.random.default_rng(0).integers(0, 256, (48, 48, channels), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            transform = kind(**{name: _TRIAL[name] for name in needed}, **_TRIAL_OF.get(kind.__name__, {}), p=1.0)
            pixels = albumentations.Compose([transform], seed=0)(image=image)["image"]
        except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError):
            return False
    return isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[2:] == (channels,)


def _parameters(kind: type[BasicTransform]) -> dict[str, inspect.Parameter]:
    parameters = list(inspect.signature(kind.__init__).parameters.items())[1:]
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: parameter for name, parameter in parameters if parameter.kind not in variable}


def _transform_schema(kind: type[BasicTransform]) -> dict[str, Any]:
    known = kind.InitSchema.model_json_schema(schema_generator=_WithBounds)["properties"]
    properties: dict[str, Any] = {}
    required: list[str] = []
    for name, parameter in _parameters(kind).items():
        if name == "strict" or name not in known:
            continue
        properties[name] = _without_titles(known[name])
        properties[name].pop("default", None)
        if parameter.default is parameter.empty:
            required.append(name)
        else:
            properties[name]["default"] = parameter.default
    summary = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
    return {
        "description": summary,
        "type": "object",
        "additionalProperties": False,
        **({"required": required} if required else {}),
        "properties": properties,
    }


class _WithBounds(GenerateJsonSchema):
    """Also writes down what albumentations checks in functions: the bounds of both ends, and their order."""

    def function_after_schema(self, schema: core_schema.AfterValidatorFunctionSchema) -> JsonSchemaValue:
        result = super().function_after_schema(schema)
        function = schema["function"]["function"]
        if function.__qualname__.startswith("check_range_bounds."):
            bounds = inspect.getclosurevars(function).nonlocals
            low, high = bounds["min_val"], bounds["max_val"]
            limits = {"minimum" if bounds["min_inclusive"] else "exclusiveMinimum": low}
            if high is not None:
                limits["maximum" if bounds["max_inclusive"] else "exclusiveMaximum"] = high
            _limit(result, limits)
        elif function.__qualname__ == "process_non_negative_range":
            _limit(result, {"minimum": 0})
        elif function.__qualname__ == "nondecreasing" and not _sorts(schema["schema"]):
            for arm in result.get("anyOf", [result]):
                if "prefixItems" in arm:
                    arm["x-ordered"] = True
        return result


def _sorts(schema: core_schema.CoreSchema) -> bool:
    """Whether a validator before this one puts two ends in order by itself (all that pass through `to_tuple`)."""
    if schema["type"] != "function-after":
        return False
    name = schema["function"]["function"].__qualname__
    return name.endswith("_range") or _sorts(schema["schema"])


def _limit(schema: JsonSchemaValue, limits: dict[str, float]) -> None:
    # A lone number becomes one end of the range, so that the bounds hold for it too.
    for arm in schema.get("anyOf", [schema]):
        for end in arm.get("prefixItems", [arm]):
            if end.get("type") in ("number", "integer"):
                end.update(limits)


def _without_titles(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without_titles(value)
        for key, value in schema.items()
        # a property may be called `title`; its value is then a schema
        if not (key == "title" and isinstance(value, str))
    }
