"""From `experiments/<exp>.yaml` and its overrides to an `ExperimentSpec`, or to every fault at once.

Also the way back: a resolved spec as YAML, as flat keys, and as the differences between two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from foldwise.errors import Fault, SpecError
from foldwise.files import sha256_json
from foldwise.spec.catalogue import Complaint, complaints
from foldwise.spec.model import EXPERIMENT_NAME, ChoiceSpec, ExperimentSpec, RangeSpec, resolved
from foldwise.spec.space import space_faults
from foldwise.spec.yaml import (
    Document,
    Loc,
    check,
    did_you_mean,
    dotted,
    dump_yaml,
    in_order,
    loc_of,
    nearest,
    parse_value,
    read_yaml,
    value_at,
)


def load_experiment(
    path: Path, *, overrides: Sequence[str] = (), name: str | None = None, root: Path, tuning: bool = False
) -> ExperimentSpec:
    """Read an experiment file and check all that can be checked without images or torch.

    Args:
        path: `experiments/<exp>.yaml`.
        overrides: `a.b=value` each, values in YAML; list items by index (`augment.0.HorizontalFlip.p=0.3`).
        name: Names the run instead of the file's stem; an overridden spec without one is called `<exp>_<hash>`, by
            what the overrides set, whatever their order and spelling. Those of `tune` change nothing that is trained.
        root: The project's root, which holds `experiments/`, `inputs/` and `oof/`.
        tuning: Whether the overridden spec is about to be searched, so that its values must lie in `tune.space`. The
            file's own always must; where overrides change them for a single run, they need not.

    Returns:
        The valid spec, overrides in it, under the run's name.

    Raises:
        SpecError: With every fault of the file, of the overrides and of what they refer to.
    """
    document, locs, faults = _overridden(read_yaml(path), overrides)
    spec, schema_faults = check(document, ExperimentSpec)
    faults += schema_faults
    trained = {loc for loc in locs if loc[0] != "tune"}
    # An overridden spec is never run under its file's name, and may build on what was.
    own = name if name is not None else "" if trained else path.stem
    faults += _reference_faults(document, path.stem, own, root)
    if tuning or not trained:
        faults += _tune_faults(document, own, root)
    if name is not None:
        faults += _name_faults(name, path.stem, bool(trained), root)
    if spec is None or faults:
        raise SpecError(in_order(faults))
    if name is None and trained:
        tree = resolved(spec)
        name = f"{spec.name}_{sha256_json({dotted(loc): value_at(tree, loc) for loc in trained})[:6]}"
        if not EXPERIMENT_NAME.fullmatch(name):
            raise SpecError([Fault(f"--set {overrides[0]}", f"`{name}` is too long a name", "give it one: NAME=...")])
    return spec if name is None else spec.model_copy(update={"name": name})


def check_all(root: Path, paths: Sequence[Path] = ()) -> list[tuple[Path, SpecError | None]]:
    """Check the given experiment files, or all in `experiments/`; each with what is wrong with it, or None."""
    results: list[tuple[Path, SpecError | None]] = []
    for path in paths or sorted((root / "experiments").glob("*.yaml")):
        try:
            load_experiment(path, root=root)
            results.append((path, None))
        except SpecError as error:
            results.append((path, error))
    return results


def split_overrides(text: str) -> list[str]:
    """Cut `a=1 b="x y" tta=[identity, hflip]` at the spaces outside brackets and quotes."""
    parts, depth, quote, previous = [""], 0, "", " "
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and previous in " =[{,:":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character.isspace() and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
        previous = character
    return [part for part in parts if part]


def spec_yaml(spec: ExperimentSpec) -> str:
    """The resolved spec as YAML, every default in it; it reads back to an equal spec."""
    return dump_yaml(resolved(spec))


def with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A spec as it was resolved, with the keys that have come since at their defaults; as it is where it is no spec."""
    try:
        return resolved(ExperimentSpec.model_validate_json(json.dumps(tree)))
    except ValidationError:
        return tree


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested plain data as `{"optim.lr": 0.0003, ...}`; a list of scalars becomes the text `[identity, hflip]`."""
    return dict(_leaves(tree, ()))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed from one resolved spec to another: `optim.lr: 0.0002 -> 0.0003`, one line each."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {_shown(before, key)} -> {_shown(after, key)}"
        for key in [*after, *(key for key in before if key not in after)]
        if key not in before or key not in after or before[key] != after[key]
    ]


def _leaves(tree: Any, loc: Loc) -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
            yield dotted((*loc, key)), f"[{', '.join(map(_text, value))}]"
        elif isinstance(value, dict | list) and value:
            yield from _leaves(value, (*loc, key))
        else:
            yield dotted((*loc, key)), "{}" if isinstance(value, dict) else value


def _shown(flat: dict[str, Any], key: str) -> str:
    return _text(flat[key]) if key in flat else "(absent)"


def _text(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)


# Overrides ------------------------------------------------------------------------------------------------------------


def _overridden(document: Document, overrides: Sequence[str]) -> tuple[Document, set[Loc], list[Fault]]:
    locs: set[Loc] = set()
    faults: list[Fault] = []
    for override in overrides:
        where = f"--set {override}"
        key, equals, text = override.partition("=")
        loc = _loc_of_override(document.value, key.strip())
        if not equals or "" in loc:
            faults.append(Fault(where, "an override must read `section.key=value`", "e.g. optim.lr=1e-3"))
        elif loc == ("name",):
            faults.append(Fault(where, "an override cannot change the name", "name the run with NAME=..."))
        else:
            try:
                document = document.replaced(loc, parse_value(text), where)
                locs.add(loc)
            except SpecError as error:
                faults += [Fault(where, fault.what, fault.fix) for fault in error.faults]
            except KeyError as error:
                faults.append(Fault(where, str(error.args[0])))
    return document, locs, faults


def _loc_of_override(tree: Any, key: str) -> Loc:
    loc = loc_of(tree, key)
    if loc[:2] != ("tune", "space") or len(loc) < 4:
        return loc
    space = _mapping(_mapping(tree.get("tune")).get("space"))
    if loc[2] in space:
        # the keys of `when` are dotted as well
        return (*loc[:4], dotted(loc[4:])) if loc[3] == "when" and len(loc) > 4 else loc
    # A key that is new to the space: all up to a field of its entry, `optim.lr` of `tune.space.optim.lr.low`.
    fields = {*RangeSpec.model_fields, *ChoiceSpec.model_fields}
    return (*loc[:2], dotted(loc[2:-1]), loc[-1]) if loc[-1] in fields else (*loc[:2], dotted(loc[2:]))


# What a spec refers to ------------------------------------------------------------------------------------------------


def _reference_faults(document: Document, stem: str, own: str, root: Path) -> Iterator[Fault]:
    spec = document.value
    if isinstance(name := spec.get("name"), str) and name != stem:
        yield document.fault(("name",), f"`name` must be the file's stem, but got {name!r}", f"write `name: {stem}`")
    competition = spec.get("competition")
    described = _described(spec, root)
    if isinstance(competition, str) and EXPERIMENT_NAME.fullmatch(competition):
        if described is not None:
            yield from _label_map_faults(document, competition, _list(described.get("classes")))
        else:
            known = [folder.parent.name for folder in sorted((root / "inputs").glob("*/competition.yaml"))]
            make = "make demo" if competition == "demo" else f"make data COMP={competition} FROM=<folder>"
            near = did_you_mean(competition, known)
            fix = f"{near} if not, `{make}` reads it in" if near else f"`{make}`"
            yield document.fault(("competition",), f"there is no competition `{competition}` in inputs/", fix)
    for complaint in _complaints(spec, described, own, root):
        yield document.fault(complaint.loc, complaint.what, complaint.fix, on_key=complaint.on_key)


def _tune_faults(document: Document, own: str, root: Path) -> Iterator[Fault]:
    tune = document.value.get("tune")
    if not isinstance(tune, dict):
        return
    described = _described(document.value, root)
    yield from space_faults(document, lambda tree: _complaints(tree, described, own, root))
    kind = _mapping((described or {}).get("split")).get("kind", "kfold")
    folds = _list(_mapping(tune.get("fidelity")).get("folds"))
    if kind == "full":
        what = f"`{document.value['competition']}` has `split.kind: full`: nothing is scored, so nothing can be chosen"
        yield document.fault(("tune",), what, "tune on a competition with folds or a held-out part", on_key=True)
    elif kind != "kfold" and folds not in ([], [0]):
        what = f"`tune.fidelity.folds` can only be [0] with `split.kind: {kind}`, but got {folds}"
        yield document.fault(("tune", "fidelity", "folds"), what, "remove it")


def _complaints(spec: dict[str, Any], described: dict[str, Any] | None, own: str, root: Path) -> Iterator[Complaint]:
    """What the libraries would refuse, and runs that are not there; `own` is the name that the spec is run under."""
    channels = _mapping((described or {}).get("image")).get("channels")
    yield from complaints(spec, root, channels=channels if isinstance(channels, int) else None)
    weights = _mapping(spec.get("model")).get("weights")
    if isinstance(weights, str) and weights.startswith("run:"):
        what = "an experiment cannot start from its own weights"
        yield from _source_complaints(weights.removeprefix("run:"), "run:", ("model", "weights"), what, own, root)
    for section in ("pseudo", "distill"):
        for index, name in enumerate(_list(_mapping(spec.get(section)).get("from"))):
            if isinstance(name, str):
                what = "an experiment cannot be its own teacher"
                yield from _source_complaints(name, "", (section, "from", index), what, own, root)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _described(spec: dict[str, Any], root: Path) -> dict[str, Any] | None:
    """The `competition.yaml` that a spec names, as plain data; None where there is none."""
    competition = spec.get("competition")
    if not isinstance(competition, str) or not EXPERIMENT_NAME.fullmatch(competition):
        return None
    path = root / "inputs" / competition / "competition.yaml"
    if not path.is_file():
        return None
    try:
        return _mapping(read_yaml(path).value)
    except SpecError:
        return {}  # whoever loads the competition tells what is wrong with it


def _label_map_faults(document: Document, competition: str, classes: list[str]) -> Iterator[Fault]:
    label_map = document.value.get("label_map")
    if not isinstance(label_map, dict) or not classes:
        return
    theirs = f"the classes of {competition} are: {', '.join(classes)}"
    for label in label_map:
        if label not in classes:
            guess = did_you_mean(label, classes)
            what = f"`label_map` maps {label!r}, which is no class of {competition}"
            yield document.fault(("label_map", label), what, f"{guess} {theirs}" if guess else theirs, on_key=True)
    if left := [label for label in classes if label not in label_map]:
        what = f"`label_map` must map every class, but leaves out {', '.join(left)}"
        yield document.fault(("label_map",), what, f"map it to itself where it stays; {theirs}", on_key=True)


def _source_complaints(source: str, prefix: str, loc: Loc, of_itself: str, own: str, root: Path) -> Iterator[Complaint]:
    """A run that a spec builds on, written as `prefix` and its name, must be another one, and known."""
    if source == own:
        yield Complaint(loc, of_itself, "name another")
        return
    if not EXPERIMENT_NAME.fullmatch(source):
        return  # the schema speaks of it
    known = {path.stem for path in (root / "experiments").glob("*.yaml")}
    known |= {path.parent.name for path in (root / "oof").glob("*/run.json")}
    if source not in known:
        near = nearest(source, sorted(known - {own}))
        fix = f"did you mean `{prefix}{near}`?" if near else f"train experiments/{source}.yaml first"
        yield Complaint(loc, f"there is no experiment or run `{source}`", fix)


def _name_faults(name: str, stem: str, overridden: bool, root: Path) -> Iterator[Fault]:
    where = f"--name {name}"
    if not EXPERIMENT_NAME.fullmatch(name):
        what = f"a name must be up to 80 lower-case letters, digits, `_`, `-` and `.`, but got {name!r}"
        yield Fault(where, what, f"e.g. {stem}_2")
    elif (name != stem or overridden) and (root / "experiments" / f"{name}.yaml").is_file():
        yield Fault(where, f"`{name}` is the name of experiments/{name}.yaml", "an override needs a name of its own")
