"""The search space of `tune.space`: what may vary, from which values, and the spec that results.

Knows nothing of samplers: whoever draws hands plain values in, and gets a whole valid spec back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from foldwise.errors import Fault, SpecError
from foldwise.spec.catalogue import Complaint, complaints
from foldwise.spec.model import ChoiceSpec, ExperimentSpec, FidelitySpec, RangeSpec, SpaceEntry, resolved
from foldwise.spec.yaml import (
    Document,
    Loc,
    check,
    described,
    did_you_mean,
    dotted,
    flow_text,
    loc_of,
    nearest,
    plain,
    value_at,
)

Scalar = bool | int | float | str | None


@dataclass(frozen=True)
class Parameter:
    """One key of the search space.

    Attributes:
        key: Dotted key of the spec, list items by index.
        kind: `int` and `float` have a range, `choice` has choices.
        low: Smallest value of a range.
        high: Largest value of a range; with `step`, the last that a step reaches.
        log: Whether the range is drawn evenly in the logarithm.
        step: Distance of a range's values; None: every value, or every integer.
        choices: Values of a choice, as plain JSON types.
        own: The spec's value; of a choice, the one that says the same.
        when: Keys of other parameters, each with the values for which this parameter exists; empty: always.
    """

    key: str
    kind: Literal["int", "float", "choice"]
    low: float | int | None
    high: float | int | None
    log: bool
    step: float | int | None
    choices: tuple[Any, ...]
    own: Any
    when: dict[str, tuple[Any, ...]]

    @property
    def labels(self) -> tuple[Scalar, ...]:
        """What each choice is called in a study: itself if it is a scalar, else its YAML on one line."""
        return tuple(flow_text(choice) if isinstance(choice, dict | list) else choice for choice in self.choices)

    def value_of(self, label: Scalar) -> Any:
        """The plain value behind what a study holds: the choice of that label, or the number, exactly on its step.

        Raises:
            KeyError: If no choice is called so.
        """
        if self.kind == "float" and self.step is not None and self.low is not None and _is_number(label):
            low, step = Decimal(str(self.low)), Decimal(str(self.step))
            return float(low + round((Decimal(str(label)) - low) / step) * step)
        if self.kind != "choice":
            return label
        for known, choice in zip(self.labels, self.choices, strict=True):
            if known == label:
                return choice
        raise KeyError(f"`{self.key}` has no choice {label!r}")

    @property
    def count(self) -> int | None:
        """How many values it has; None: endlessly many."""
        if self.kind == "choice":
            return len(self.choices)
        if self.low is None or self.high is None or (self.kind == "float" and self.step is None):
            return None
        step = 1 if self.step is None else self.step
        return int((Decimal(str(self.high)) - Decimal(str(self.low))) // Decimal(str(step))) + 1

    def holds(self, value: Any) -> bool:
        """Whether it can take a plain value: one of the choices, or a number within the range and on its step."""
        if self.kind == "choice":
            return value in self.choices
        if not _is_number(value) or self.low is None or self.high is None or not self.low <= value <= self.high:
            return False
        if self.kind == "int" and value != int(value):
            return False
        return self.step is None or (Decimal(str(value)) - Decimal(str(self.low))) % Decimal(str(self.step)) == 0

    def exists(self, values: Mapping[str, Any]) -> bool:
        """Whether this parameter exists where the others have these values; an absent one has none."""
        return all(key in values and values[key] in wanted for key, wanted in self.when.items())


def parameters(spec: ExperimentSpec) -> tuple[Parameter, ...]:
    """The search space of a checked spec, each parameter after those that its `when` names; none without `tune`."""
    if spec.tune is None:
        return ()
    tree = resolved(spec)
    return tuple(_ordered({key: _parameter(tree, key, entry) for key, entry in spec.tune.space.items()}))


def own_values(spec: ExperimentSpec) -> dict[str, Any]:
    """The first trial: the spec's own values of the parameters that exist for them, by dotted key."""
    values: dict[str, Any] = {}
    for parameter in parameters(spec):
        if parameter.exists(values):
            values[parameter.key] = parameter.own
    return values


def with_parameters(spec: ExperimentSpec, values: Mapping[str, Any], *, root: Path = Path()) -> ExperimentSpec:
    """The spec with other values, checked as a whole.

    Args:
        spec: A valid spec.
        values: Plain values by dotted key; keys that are not named stay as they are.
        root: The project's root, whose catalogue knows the names.

    Raises:
        SpecError: If the values do not go together; names them all, since each alone may be right.
    """
    tree = spec.model_dump(mode="json")
    document = Document(Path(), tree, "")
    for key, value in values.items():
        document = document.replaced(loc_of(document.value, key), value, key)
    result, faults = check(document, ExperimentSpec)
    told = [(fault.what, fault.fix) for fault in faults]
    told += [(found.what, found.fix) for found in complaints(document.value, root, channels=None)]
    if result is None or told:
        where = " ".join(f"{key}={flow_text(value)}" for key, value in values.items())
        raise SpecError([Fault(where, what, fix) for what, fix in told])
    return result


# Counted in epochs, with the least that each may shrink to where it is not 0.
_EPOCH_COUNTS = {
    ("schedule", "warmup_epochs"): 0,
    ("schedule", "patience"): 1,
    ("schedule", "step_epochs"): 1,
    ("mix", "off_epochs"): 1,
    ("train", "freeze_backbone_epochs"): 1,
    ("train", "early_stop_patience"): 1,
}


def with_fidelity(spec: ExperimentSpec, fidelity: FidelitySpec) -> ExperimentSpec:
    """The spec as a trial trains it: fewer epochs, a smaller image; `fidelity.folds` are the caller's.

    With fewer epochs, everything that the spec counts in epochs shrinks by the same ratio, so that the recipe keeps its
    shape: `schedule.warmup_epochs`, `schedule.patience`, `schedule.step_epochs`, `mix.off_epochs`,
    `train.freeze_backbone_epochs` and `train.early_stop_patience`. Whole numbers are rounded, and stay at least 1 where
    they were; `train.freeze_backbone_epochs` stays below the epochs. What is a share of the run (`schedule.warm_share`)
    or an average (`train.ema_decay`) stays.
    """
    changes: dict[str, dict[str, Any]] = {section: {} for section in ("model", "schedule", "mix", "train")}
    if fidelity.image_size is not None:
        changes["model"]["image_size"] = fidelity.image_size
    if fidelity.epochs is not None and fidelity.epochs != spec.train.epochs:
        ratio = fidelity.epochs / spec.train.epochs
        changes["train"]["epochs"] = fidelity.epochs
        for (section, key), least in _EPOCH_COUNTS.items():
            value = getattr(getattr(spec, section), key)
            if isinstance(value, float):
                changes[section][key] = value * ratio
            elif value:
                changes[section][key] = max(least, round(value * ratio))
        frozen = changes["train"].get("freeze_backbone_epochs", 0)
        changes["train"]["freeze_backbone_epochs"] = min(frozen, fidelity.epochs - 1)
    return spec.model_copy(
        update={section: getattr(spec, section).model_copy(update=update) for section, update in changes.items()}
    )


def size(space: Sequence[Parameter]) -> int | None:
    """How many distinct parameter sets a space holds, conditions taken into account; None: endlessly many."""
    named = {key for parameter in space for key in parameter.when}
    return _count(tuple(space), named, {})


def _count(space: tuple[Parameter, ...], named: set[str], values: dict[str, Any]) -> int | None:
    total = 1
    for index, parameter in enumerate(space):
        if not parameter.exists(values):
            continue
        count = parameter.count
        if count is None:
            return None
        if parameter.key not in named:
            total *= count
            continue
        # Values that no condition names lead to the same rest: a stand-in is counted for all of them.
        asked = [value for later in space for value in later.when.get(parameter.key, ())]
        asked = [value for at, value in enumerate(asked) if value not in asked[:at] and parameter.holds(value)]
        rest = space[index + 1 :]
        cases = [(1, {**values, parameter.key: value}) for value in asked]
        if count > len(asked):
            cases.append((count - len(asked), {**values, parameter.key: _OTHER}))
        below = [(weight, _count(rest, named, case)) for weight, case in cases]
        if any(sets is None for _, sets in below):
            return None
        return total * sum(weight * (sets or 0) for weight, sets in below)
    return total


_OTHER = object()


def _ordered(found: Mapping[str, Parameter]) -> list[Parameter]:
    """Each after those that its `when` names; without those that wait for an unknown one, or for each other."""
    ordered: dict[str, Parameter] = {}
    while ready := [key for key, one in found.items() if key not in ordered and one.when.keys() <= ordered.keys()]:
        ordered[ready[0]] = found[ready[0]]
    return list(ordered.values())


def _parameter(tree: dict[str, Any], key: str, entry: RangeSpec | ChoiceSpec) -> Parameter:
    loc = loc_of(tree, key)
    own = value_at(tree, loc)
    when = entry.when or {}
    if isinstance(entry, ChoiceSpec):
        same = [choice for choice in entry.choices if _normal(loc, choice) == own]
        return Parameter(key, "choice", None, None, False, None, entry.choices, same[0] if same else own, when)
    # Where the spec's own value is a float so is the range, and where the field holds floats alone.
    numbers = [_normal(loc, entry.low), _normal(loc, entry.high), entry.step, own]
    if all(isinstance(number, int) for number in numbers if number is not None):
        high = entry.high if entry.step is None else entry.low + (entry.high - entry.low) // entry.step * entry.step
        return Parameter(key, "int", entry.low, high, entry.log, entry.step, (), own, when)
    low, high, step = float(entry.low), float(entry.high), entry.step
    if step is not None:
        # in decimals, as (0.3 - 0.1) / 0.1 falls short of 2
        exact_low, exact_step = Decimal(str(low)), Decimal(str(step := float(step)))
        high = float(exact_low + (Decimal(str(high)) - exact_low) // exact_step * exact_step)
    return Parameter(key, "float", low, high, entry.log, step, (), float(own) if _is_number(own) else own, when)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _normal(loc: Loc, value: Any) -> Any:
    """A value as the spec would hold it at `loc`, defaults filled in; as it is where the spec refuses it."""
    try:
        adapter = _adapter(loc)
        return adapter.dump_python(adapter.validate_json(json.dumps(value), strict=True), mode="json")
    except ValidationError:
        return value


@cache
def _adapter(loc: Loc) -> TypeAdapter[Any]:
    annotation: Any = ExperimentSpec
    for part in loc:
        arms = [arm for arm in _arms(annotation) if arm is not NoneType]
        annotation = Any
        for arm in arms:
            if isinstance(arm, type) and issubclass(arm, BaseModel) and part in arm.model_fields:
                annotation = arm.model_fields[str(part)].annotation
            elif get_origin(arm) is tuple:
                annotation = get_args(arm)[0]
            elif get_origin(arm) is dict:
                annotation = get_args(arm)[1]
    return TypeAdapter(annotation)


def _arms(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, UnionType):
        for arm in get_args(annotation):
            yield from _arms(arm)
    elif get_origin(annotation) is Annotated:
        yield from _arms(get_args(annotation)[0])
    else:
        yield annotation


# Faults ---------------------------------------------------------------------------------------------------------------

_SPACE = ("tune", "space")
# They say what is compared with what: two trials that differ in them could not be.
_FIXED = ("name", "competition", "seeds", "label_map", "clear_of", "tune", "tuned")
_FIRST = "the spec's own values are the first trial"
# Optuna's grid lists all of its sets before the first trial.
_LARGEST_GRID = 100_000

Problem = tuple[str, str]


def space_faults(document: Document, complain: Callable[[dict[str, Any]], Iterable[Complaint]]) -> Iterator[Fault]:
    """What is wrong with the section `tune` beyond its schema.

    Every choice and both ends of every range are put into the spec, one at a time, and the whole is then checked as any
    spec is. Where the rest of the file is no valid spec, nothing is said: its own faults come first.

    Args:
        document: The experiment file, overrides in it; entries that the schema refuses are passed over.
        complain: What the libraries, and whatever else a spec refers to, would refuse in a spec of plain data.
    """
    tune = document.value.get("tune")
    base = {key: value for key, value in document.value.items() if key != "tune"}
    spec, _ = check(Document(document.path, base, ""), ExperimentSpec)
    if spec is None or not isinstance(tune, dict):
        return
    tree = resolved(spec)
    space = tune.get("space")
    entries = {key: _valid(SpaceEntry, value) for key, value in space.items()} if isinstance(space, dict) else {}
    found: dict[str, Parameter] = {}
    for key, entry in entries.items():
        problem = _key_problem(tree, key, entries) or _kind_problem(tree, key, entry)
        if problem is not None:
            what, fix = problem
            yield document.fault((*_SPACE, key), what, fix, on_key=True)
        elif entry is not None:
            found[key] = _parameter(tree, key, entry)
    for parameter in found.values():
        yield from _when_faults(document, parameter, found, entries)
    yield from _value_faults(document, tree, _ordered(found), complain)
    for what, fix in _sampler_problems(tune.get("sampler"), list(found.values())):
        yield document.fault(("tune", "sampler"), what, fix)
    fidelity = _valid(FidelitySpec, tune.get("fidelity"))
    if fidelity is not None:
        yield from _fidelity_faults(document, tree, fidelity, [loc_of(tree, key) for key in found])


def _valid(kind: Any, value: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value))
    except ValidationError:
        return None


def _key_problem(tree: dict[str, Any], key: str, entries: Iterable[str]) -> Problem | None:
    loc = loc_of(tree, key)
    if loc[0] in _FIXED:
        return f"`{key}` cannot be tuned", f"remove it; what can be: {', '.join(_tunable(tree))}"
    try:
        value_at(tree, loc)
    except KeyError:
        return f"`{key}` is no key of this experiment", _key_fix(tree, loc)
    for other in entries:
        outer = loc_of(tree, other)
        if other != key and loc == outer:
            return f"`{key}` and `{other}` are the same key", "keep one of the two"
        if other != key and loc[: len(outer)] == outer:
            return f"`{key}` lies within `{other}`, which is tuned as a whole", "keep one of the two"
    return None


def _tunable(tree: dict[str, Any]) -> list[str]:
    return [key for key in tree if key not in _FIXED]


def _key_fix(tree: dict[str, Any], loc: Loc) -> str:
    depth, inside = 0, tree
    while isinstance(inside, dict | list) and loc[depth] in _parts(inside):
        depth, inside = depth + 1, value_at(tree, loc[: depth + 1])
    within, part, rest = dotted(loc[:depth]), loc[depth], loc[depth + 1 :]
    if isinstance(inside, list):
        return f"`{within}` has the items 0 to {len(inside) - 1}" if inside else f"`{within}` has no items"
    if not isinstance(inside, dict):
        return f"`{within}` is {described(inside)}, which holds no `{part}`"
    names = list(inside) if depth else _tunable(tree)
    if near := nearest(str(part), names):
        return f"did you mean `{dotted((*loc[:depth], near, *rest))}`?"
    if homes := [key for key in _keys(tree) if key.endswith(f".{loc[-1]}")]:
        return f"did you mean `{homes[0]}`?"
    holds = f"{f'`{within}`' if depth else 'it'} holds: {', '.join(names) or 'nothing'}"
    return f"a key needs a value in the spec before it can be tuned; {holds}"


def _parts(inside: dict[str, Any] | list[Any]) -> Iterable[str | int]:
    return range(len(inside)) if isinstance(inside, list) else inside


def _keys(tree: Any, loc: Loc = ()) -> Iterator[str]:
    for part in _parts(tree) if isinstance(tree, dict | list) else ():
        yield dotted((*loc, part))
        yield from _keys(tree[part], (*loc, part))


def _kind_problem(tree: dict[str, Any], key: str, entry: RangeSpec | ChoiceSpec | None) -> Problem | None:
    own = value_at(tree, loc_of(tree, key))
    if isinstance(entry, RangeSpec) and own is not None and not _is_number(own):
        return f"a range needs a number, but `{key}` is {described(own)} in the spec", "list `choices: [...]`"
    if isinstance(entry, RangeSpec) and not isinstance(own, float) and not _takes_fractions(loc_of(tree, key)):
        given = {"low": entry.low, "high": entry.high, "step": entry.step}
        if broken := [f"{name}={number}" for name, number in given.items() if isinstance(number, float)]:
            return f"`{key}` takes integers alone, but got {', '.join(broken)}", "write integers"
    return None


def _takes_fractions(loc: Loc) -> bool:
    try:
        _adapter(loc).validate_json("0.5", strict=True)
    except ValidationError:
        return False
    return True


def _when_faults(
    document: Document, parameter: Parameter, found: Mapping[str, Parameter], entries: Iterable[str]
) -> Iterator[Fault]:
    for other, wanted in parameter.when.items():
        loc = (*_SPACE, parameter.key, "when", other)
        text = f"`when` of `{parameter.key}`"
        if other not in entries:
            what = f"{text} names `{other}`, which is no key of the space"
            yield document.fault(loc, what, did_you_mean(other, entries), on_key=True)
        elif other in found and parameter.key in _awaited(other, found):
            what = f"{text} names `{other}`, which itself waits for `{parameter.key}`"
            yield document.fault(loc, what, "remove one of the conditions", on_key=True)
        elif other in found:
            one = found[other]
            if not wanted:
                yield document.fault(loc, f"{text} names no value of `{other}`", _values_in_words(one))
            elif one.count is None:
                what = f"{text} waits for single values of `{other}`, which takes any number"
                yield document.fault(loc, what, "name a key with choices, integers or a `step`", on_key=True)
            elif never := [value for value in wanted if not one.holds(value)]:
                what = f"{text} waits for `{other}` to be {plain(never[0])}, which it never is"
                yield document.fault(loc, what, _values_in_words(one))


def _awaited(key: str, found: Mapping[str, Parameter]) -> set[str]:
    """The key, and whatever it waits for, directly or not."""
    awaited: set[str] = set()
    left = [key]
    while left:
        one = left.pop()
        if one not in awaited:
            awaited.add(one)
            left += [other for other in found[one].when if other in found]
    return awaited


def _values_in_words(parameter: Parameter) -> str:
    if parameter.kind == "choice":
        return f"its choices: {', '.join(map(flow_text, parameter.choices))}"
    step = f" by {parameter.step}" if parameter.step is not None else ""
    return f"it goes from {parameter.low} to {parameter.high}{step}"


def _value_faults(
    document: Document,
    tree: dict[str, Any],
    space: Sequence[Parameter],
    complain: Callable[[dict[str, Any]], Iterable[Complaint]],
) -> Iterator[Fault]:
    known = [complaint.what for complaint in complain(tree)]
    found = {parameter.key: parameter for parameter in space}
    own: dict[str, Any] = {}
    conditions: dict[str, dict[str, Any]] = {}
    for parameter in space:
        key = parameter.key
        # A parameter is tried where it exists: with the spec's own values if it does there, else with the first others.
        needed: dict[str, Any] = {}
        for other, wanted in parameter.when.items():
            fitting = [value for value in wanted if found[other].holds(value)]
            if other in conditions and fitting:
                value = own[other] if other in own and own[other] in fitting else fitting[0]
                needed |= {**conditions[other], other: value}
        if not parameter.when.keys() <= needed.keys():
            continue  # it never exists, which is a fault of its own
        conditions[key] = needed
        if parameter.exists(own):
            own[key] = parameter.own
            if not parameter.holds(parameter.own):
                what, fix = _own_problem(parameter)
                yield document.fault((*_SPACE, key), what, fix, on_key=True)
        for loc, name, value in _samples(parameter):
            trial = Document(document.path, tree, "")
            for changed, new in {**conditions[key], key: value}.items():
                trial = trial.replaced(loc_of(trial.value, changed), new, "")
            _, faults = check(trial, ExperimentSpec)
            told = [(fault.what, fault.fix) for fault in faults]
            told += [(found.what, found.fix) for found in complain(trial.value) if found.what not in known]
            for what, fix in told:
                yield document.fault((*_SPACE, key, *loc), f"{name}: {what}", fix)
        yield from _twins(document, parameter, loc_of(tree, key))


def _own_problem(parameter: Parameter) -> Problem:
    key, own = parameter.key, parameter.own
    if parameter.kind == "choice":
        return f"`{key}` is {flow_text(own)} in the spec, which is none of its choices", f"{_FIRST}: list it"
    if own is None:
        fix = f"{_FIRST}: give the spec a number, or list `choices: [null, ...]`"
        return f"`{key}` is null in the spec, which no range holds", fix
    goes = _values_in_words(parameter).removeprefix("it ")
    return f"`{key}` is {plain(own)} in the spec, but here it {goes}", f"{_FIRST}: let the range hold it"


def _samples(parameter: Parameter) -> Iterator[tuple[Loc, str, Any]]:
    key = parameter.key
    for index, choice in enumerate(parameter.choices):
        yield ("choices", index), f"choice {index + 1} of `{key}`", choice
    if parameter.low is not None and parameter.high is not None:
        yield ("low",), f"`low` of `{key}`", parameter.low
        yield ("high",), f"`high` of `{key}`", parameter.high
        if parameter.step is not None:
            yield ("step",), f"one `step` above `low` of `{key}`", parameter.low + parameter.step


def _twins(document: Document, parameter: Parameter, loc: Loc) -> Iterator[Fault]:
    seen: list[tuple[Any, Scalar]] = []
    for index, (choice, label) in enumerate(zip(parameter.choices, parameter.labels, strict=True)):
        value = _normal(loc, choice)
        same = [number for number, twin in enumerate(seen) if value == twin[0] or label == twin[1]]
        if same:
            what = f"choice {index + 1} of `{parameter.key}` says the same as choice {same[0] + 1}"
            yield document.fault((*_SPACE, parameter.key, "choices", index), what, "remove one of the two")
        seen.append((value, label))


def _sampler_problems(sampler: Any, space: Sequence[Parameter]) -> Iterator[Problem]:
    """What Optuna would refuse, or would warn of and then draw at random."""
    conditional = [parameter.key for parameter in space if parameter.when]
    if sampler in ("grid", "cmaes", "gp") and conditional:
        what = f"`{sampler}` knows no conditions, but there is `when` at {_listed(conditional)}"
        yield what, "write `tpe` or `random`, or remove the conditions"
    chosen = [parameter.key for parameter in space if parameter.kind == "choice"]
    if sampler == "cmaes" and chosen:
        yield f"`cmaes` searches numbers alone, but there are choices at {_listed(chosen)}", "write `tpe` or `gp`"
    if sampler == "grid":
        endless = [parameter.key for parameter in space if parameter.count is None]
        if endless:
            what = f"`grid` needs a finite space, but any number is taken at {_listed(endless)}"
            yield what, "give a `step` or `choices`, or write another sampler"
        sets = size([parameter for parameter in space if not parameter.when])
        if sets is not None and sets > _LARGEST_GRID:
            yield f"`grid` takes up to {_LARGEST_GRID} parameter sets, but the space holds {sets}", "write `random`"


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _fidelity_faults(
    document: Document, tree: dict[str, Any], fidelity: FidelitySpec, tuned: Sequence[Loc]
) -> Iterator[Fault]:
    for key, loc, value in (
        ("epochs", ("train", "epochs"), fidelity.epochs),
        ("image_size", ("model", "image_size"), fidelity.image_size),
    ):
        if value is None:
            continue
        place, full = ("tune", "fidelity", key), value_at(tree, loc)
        if loc in tuned or loc[:1] in tuned:
            what = f"`tune.fidelity.{key}` is the same for every trial, but the space tunes `{dotted(loc)}`"
            yield document.fault(place, what, "keep one of the two", on_key=True)
        elif value >= full:
            what = f"`tune.fidelity.{key}` < `{dotted(loc)}` must hold, but got ({value}, {full})"
            yield document.fault(place, what, "give it less, or remove it for the full value")
