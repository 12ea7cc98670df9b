"""Reading YAML 1.2 so that every fault in it can be shown at its line and column.

A `Document` keeps the place of each value; `validate` puts pydantic's complaints about it into our words.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from foldwise.errors import Fault, FaultsError, SpecError

Loc = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

_TAG = "tag:yaml.org,2002:"
# The core schema, https://yaml.org/spec/1.2.2/#1032-tag-resolution: PyYAML follows 1.1, where `3e-4` is a
# string and `no` is false.
_SCALARS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
}


# Characters of a line beyond which a fault is shown without it, and levels beyond which nothing is read.
_LONGEST_SOURCE = 200
_DEEPEST = 50


class _AliasError(yaml.MarkedYAMLError):
    pass


class _Loader(yaml.SafeLoader):
    # mypy: typeshed's declaration leaves the table's type open
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise _AliasError(None, None, f"`*{event.anchor}` refers to another value", event.start_mark)
        return super().compose_node(parent, index)


for _name, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_pattern.pattern})\Z"), None)


@dataclass(frozen=True)
class _Token:
    line: int
    column: int
    width: int


@dataclass(frozen=True)
class Document:
    """One YAML file as plain data that remembers where everything stands.

    Attributes:
        path: The file.
        value: Its content: dicts with string keys, lists, strings, ints, floats, bools, None. Of equal keys
            the first counts.
        text: The file's text.
        faults: What is wrong with it as YAML (duplicate keys and the like); `validate` reports these with its
            own.
    """

    path: Path
    value: Any
    text: str
    faults: tuple[Fault, ...] = ()
    _keys: dict[Loc, _Token] = field(default_factory=dict, repr=False)
    _values: dict[Loc, _Token] = field(default_factory=dict, repr=False)
    _origins: dict[Loc, str] = field(default_factory=dict, repr=False)

    def fault(self, loc: Loc, what: str, fix: str = "", on_key: bool = False) -> Fault:
        """A fault at the value (or, with `on_key`, at the key) that `loc` leads to.

        Args:
            loc: Keys and list indices from the top; where it leads nowhere, its nearest parent is marked.
            what: What is wrong, with the value.
            fix: What to do about it.
            on_key: Mark the key rather than the value.
        """
        for length in range(len(loc), 0, -1):
            part = loc[:length]
            if part in self._origins:
                return Fault(self._origins[part], what, fix)
            # A parent is marked by its key: its value is what holds the missing thing.
            by_key = on_key or length < len(loc)
            tables = (self._keys, self._values) if by_key else (self._values, self._keys)
            token = tables[0].get(part) or tables[1].get(part)
            if token is not None:
                return _fault_at(self.path, self.text, token, what, fix)
        return Fault(f"{_shown(self.path)}:1:1", what, fix)

    def replaced(self, loc: Loc, value: Any, origin: str) -> Document:
        """This document with another value at `loc`, whose faults are then placed at `origin`.

        Args:
            loc: Keys and list indices from the top; missing mappings on the way are made.
            value: Plain data.
            origin: Names the place that the value came from, e.g. `--set optim.lr=abc`.

        Raises:
            KeyError: If the way leads through a scalar, or to no item of a list; its text says which.
        """
        value = _put(self.value, loc, value, ())
        # Whatever stood below `loc` in the file, or was set there before, is gone.
        return replace(
            self,
            value=value,
            _keys=_not_below(loc, self._keys),
            _values=_not_below(loc, self._values),
            _origins={**_not_below(loc, self._origins), loc: origin},
        )


def read_yaml(path: Path) -> Document:
    """Read a YAML 1.2 file whose top level is a mapping.

    Raises:
        SpecError: If the file is missing, not UTF-8, empty, not YAML, or no mapping. Duplicate keys and other
            faults that leave it readable are kept in `Document.faults`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        known = [other.name for other in sorted(path.parent.glob("*.yaml"))]
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise SpecError([Fault(_shown(path), reason, did_you_mean(path.name, known))]) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"expected UTF-8 text, but got the byte 0x{content[error.start]:02x}"
        raise SpecError([Fault(f"{_shown(path)}:{line}", what, "save the file as UTF-8")]) from error
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> Document:
    """Parse YAML 1.2 whose top level is a mapping; `path` only names it in messages.

    Raises:
        SpecError: As `read_yaml`.
    """
    root = _compose(text, path)
    if root is None:
        raise SpecError([Fault(f"{_shown(path)}:1:1", "the file is empty", "write `key: value` lines")])
    if not isinstance(root, yaml.MappingNode):
        what = f"the top level must be a mapping, but got {described(_Reader(text, path).read(root, ()))}"
        raise SpecError([_fault_at(path, text, _token(root, text), what, "write `key: value` lines")])
    reader = _Reader(text, path)
    value = reader.read(root, ())
    return Document(path, value, text, tuple(reader.faults), reader.keys, reader.values)


def parse_value(text: str) -> Any:
    """One YAML 1.2 value, as it would stand after a colon: `3e-4`, `[identity]`, `{p: 0.5}`.

    Raises:
        SpecError: If it is not YAML.
    """
    root = _compose(text, Path("value"))
    if root is None:
        return None
    reader = _Reader(text, Path("value"))
    value = reader.read(root, ())
    if reader.faults:
        raise SpecError(reader.faults)
    return value


def validate(document: Document, model: type[M], *, error: type[FaultsError] = SpecError) -> M:
    """Check a document against a pydantic model.

    Args:
        document: From `read_yaml`.
        model: Its fields' names are the keys; their descriptions help in messages.
        error: What to raise.

    Raises:
        FaultsError: `error`, with every fault of the document at once, in the order of the file.
    """
    result, faults = check(document, model)
    if result is None or faults:
        raise error(faults)
    return result


def check(document: Document, model: type[M]) -> tuple[M | None, list[Fault]]:
    """As `validate`, but hands the faults back, for a caller that has more to check.

    Returns:
        The model, or None where it refuses the document; and every fault, in the order of the file.
    """
    faults = list(document.faults)
    result: M | None = None
    try:
        # JSON mode: strict, yet lists are fine for tuples and ints for floats.
        result = model.model_validate_json(json.dumps(document.value))
    except ValidationError as refused:
        grouped: dict[Loc, list[ErrorDetails]] = {}
        for detail in refused.errors(include_url=False):
            loc = _data_loc(document.value, detail["loc"], missing=detail["type"] == "missing")
            grouped.setdefault(loc, []).append(detail)
        faults += [_schema_fault(document, model, loc, details) for loc, details in grouped.items()]
    return result, in_order(faults)


def in_order(faults: Iterable[Fault]) -> list[Fault]:
    """Faults in the order of the file; those placed elsewhere (overrides) after them."""
    return sorted(faults, key=lambda fault: (fault.where.startswith("--"), fault.line, fault.column))


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """``did you mean `lr`?`` for the option nearest to `word`, or nothing where none is near."""
    near = nearest(word, options)
    return f"did you mean `{near}`?" if near else ""


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option that `word` most likely means: other case, a typo, or initials (`wd` for `weight_decay`)."""
    by_lower = {option.lower(): option for option in options}
    lower = word.lower()
    if lower in by_lower:
        return by_lower[lower]
    for other, option in by_lower.items():
        if len(lower) > 1 and len(other) > 1 and (_initials(other) == lower or _initials(lower) == other):
            return option
    close = get_close_matches(lower, by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def dotted(loc: Sequence[str | int]) -> str:
    """`augment.0.HorizontalFlip.p`: how a place is written in messages and in overrides."""
    return ".".join(str(part) for part in loc)


def plain(value: Any) -> str:
    """A value as messages show it: YAML's spelling, quoted strings, cut to 80 characters."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def described(value: Any) -> str:
    """A value with its type, where the type is what is wrong: `the string 'thirty'`, `a list`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return plain(value)
    if isinstance(value, int):
        return f"the integer {plain(value)}"
    if isinstance(value, float):
        return f"the number {plain(value)}"
    if isinstance(value, str):
        return f"the string {plain(value)}"
    return "a list" if isinstance(value, list) else "a mapping"


def dump_yaml(value: dict[str, Any]) -> str:
    """`value` as YAML that reads back equal under YAML 1.1 and 1.2: block mappings, lists of scalars on one line."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110
    )
    return text


def flow_text(value: Any) -> str:
    """`value` as YAML on one line: `[identity, hflip]`, `{p: 0.5}`."""
    text: str = yaml.dump(value, Dumper=_FlowDumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def loc_of(tree: Any, key: str) -> Loc:
    """The place in `tree` that a dotted key names; list items by index, a part that is not there as it is written.

    A key of the tree may hold dots itself: the longest that fits is taken, so that `tune.space.optim.lr.low` is found.
    """
    loc: list[str | int] = []
    parts = key.split(".")
    while parts:
        length = 1
        if isinstance(tree, list):
            index = int(parts[0]) if parts[0].isascii() and parts[0].isdigit() else None
            loc.append(parts[0] if index is None else index)
            tree = tree[index] if index is not None and index < len(tree) else None
        else:
            inside = tree if isinstance(tree, dict) else {}
            fits = [count for count in range(1, len(parts) + 1) if ".".join(parts[:count]) in inside]
            length = max(fits, default=1)
            name = ".".join(parts[:length])
            loc.append(name)
            tree = inside.get(name)
        parts = parts[length:]
    return tuple(loc)


def value_at(tree: Any, loc: Loc) -> Any:
    """What stands at `loc`.

    Raises:
        KeyError: If nothing does.
    """
    for done, part in enumerate(loc):
        inside = range(len(tree)) if isinstance(tree, list) else tree if isinstance(tree, dict) else ()
        if part not in inside:
            raise KeyError(dotted(loc[: done + 1]))
        tree = tree[part]
    return tree


class _Dumper(yaml.SafeDumper):
    pass


class _FlowDumper(_Dumper):
    pass


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML quotes what YAML 1.1 would misread; `3e-4` and `0o17` are numbers for 1.2 alone.
    style = "'" if any(pattern.fullmatch(text) for pattern in _SCALARS.values()) else None
    if any(character in text for character in "\x85\u2028\u2029"):
        style = '"'  # line breaks, which only double quotes escape
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


def _represent_list(dumper: _Dumper, items: list[Any]) -> yaml.SequenceNode:
    flat = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence(f"{_TAG}seq", items, flow_style=flat)


def _represent_str_in_flow(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # other quotes break the line where the text does
    return dumper.represent_scalar(f"{_TAG}str", text, style='"') if "\n" in text else _represent_str(dumper, text)


def _represent_in_flow(dumper: _Dumper, value: Any) -> yaml.Node:
    if isinstance(value, dict):
        return dumper.represent_mapping(f"{_TAG}map", value, flow_style=True)
    return dumper.represent_sequence(f"{_TAG}seq", value, flow_style=True)


_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(list, _represent_list)
_FlowDumper.add_representer(str, _represent_str_in_flow)
_FlowDumper.add_representer(list, _represent_in_flow)
_FlowDumper.add_representer(dict, _represent_in_flow)


def _initials(words: str) -> str:
    return "".join(part[:1] for part in words.split("_"))


def _shown(path: Path) -> str:
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()


def _not_below(loc: Loc, table: dict[Loc, T]) -> dict[Loc, T]:
    return {known: place for known, place in table.items() if known == loc or known[: len(loc)] != loc}


def _put(tree: Any, loc: Loc, value: Any, done: Loc) -> Any:
    if not loc:
        return value
    key, rest = loc[0], loc[1:]
    if tree is None or isinstance(tree, dict):
        tree = tree or {}
        return {**tree, str(key): _put(tree.get(str(key)), rest, value, (*done, key))}
    if isinstance(tree, list):
        if not isinstance(key, int) or not 0 <= key < len(tree):
            expected = f"expected an index from 0 to {len(tree) - 1}" if tree else "it has no items"
            raise KeyError(f"`{dotted(done)}` is a list: {expected}, but got {key!r}")
        return [*tree[:key], _put(tree[key], rest, value, (*done, key)), *tree[key + 1 :]]
    raise KeyError(f"`{dotted(done)}` is {described(tree)}, which holds no `{key}`")


# Text to nodes to plain data --------------------------------------------------------------------------------


def _compose(text: str, path: Path) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise SpecError([_syntax_fault(error, text, path)]) from error
    except yaml.reader.ReaderError as error:
        line, start = text.count("\n", 0, error.position), text.rfind("\n", 0, error.position) + 1
        what = f"YAML takes no control characters, but got U+{ord(text[error.position]):04X}"
        where = f"{_shown(path)}:{line + 1}:{error.position - start + 1}"
        raise SpecError([Fault(where, what, "remove it")]) from error
    except RecursionError as error:
        raise SpecError([Fault(f"{_shown(path)}:1:1", "nested too deeply", "close the brackets")]) from error


def _syntax_fault(error: yaml.MarkedYAMLError, text: str, path: Path) -> Fault:
    mark = error.problem_mark or error.context_mark
    assert mark is not None
    problem = str(error.problem)
    context = error.context_mark
    what, fix = f"not YAML: {problem}", ""
    if isinstance(error, _AliasError):
        what, fix = problem, "write the value out; anchors and aliases are not supported"
    elif "found another document" in problem:
        what, fix = "a second document starts here", "one file holds one mapping: remove the `---`"
    elif mark.index < len(text) and text[mark.index] == "\t":
        what, fix = "not YAML: a tab where only spaces may stand", "replace tabs by spaces"
    elif "mapping values are not allowed" in problem:
        fix = "indent the keys of one mapping alike, and quote a text that holds a colon"
    elif error.context and context is not None:
        began = re.sub(r"while (parsing|scanning) an? ", "the ", error.context)
        what += f"; {began} starts in line {context.line + 1}"
    elif "cannot start any token" in problem:
        fix = "quote a text that starts with this character"
    if mark.index >= len(text.rstrip()) and context is not None:
        mark = context
    return _fault_at(path, text, _Token(mark.line + 1, mark.column + 1, 1), what, fix)


def _fault_at(path: Path, text: str, token: _Token, what: str, fix: str) -> Fault:
    lines = text.splitlines()
    source = lines[token.line - 1].replace("\t", " ") if token.line <= len(lines) else ""
    where = f"{_shown(path)}:{token.line}:{token.column}"
    shown = source if len(source) <= _LONGEST_SOURCE else None
    return Fault(where, what, fix, shown, token.line, token.column, token.width)


def _token(node: yaml.Node, text: str) -> _Token:
    start, end = node.start_mark, node.end_mark
    # A block collection ends where the next token starts, often lines below: mark the rest of its first line.
    if end.line == start.line:
        width = end.column - start.column
    else:
        line = text[start.index :].split("\n", 1)[0]
        width = len(re.sub(r"\s+#.*$", "", line).rstrip())
    return _Token(start.line + 1, start.column + 1, max(1, width))


class _Reader:
    """Turns nodes into plain data, noting places and faults on the way."""

    def __init__(self, text: str, path: Path) -> None:
        self.text = text
        self.path = path
        self.keys: dict[Loc, _Token] = {}
        self.values: dict[Loc, _Token] = {}
        self.faults: list[Fault] = []

    def read(self, node: yaml.Node, loc: Loc) -> Any:
        empty = isinstance(node, yaml.ScalarNode) and node.start_mark.index == node.end_mark.index
        below_key = isinstance(node, yaml.CollectionNode) and not node.flow_style and loc in self.keys
        if loc and not empty and not below_key:
            self.values[loc] = _token(node, self.text)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if len(loc) > _DEEPEST:
            self._fault(node, f"nested more than {_DEEPEST} levels deep", "close the brackets")
            return None
        if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            self._fault(node, f"unknown tag `{node.tag}`", "remove the tag")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, loc)
        return [self.read(item, (*loc, index)) for index, item in enumerate(node.value)]

    def _fault(self, node: yaml.Node, what: str, fix: str) -> None:
        self.faults.append(_fault_at(self.path, self.text, _token(node, self.text), what, fix))

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a collection"
                what = f"a key must be a string, but got {shown}"
                self._fault(key_node, what, "put it in quotes, or rename it")
            elif key == "<<":
                self._fault(key_node, "merge keys (`<<`) are not supported", "write the keys out")
            elif key in result:
                first = self.keys[(*loc, key)].line
                what = f"duplicate key `{dotted((*loc, key))}`, first given in line {first}"
                self._fault(key_node, what, "remove one of the two")
            else:
                self.keys[(*loc, key)] = _token(key_node, self.text)
                result[key] = self.read(value_node, (*loc, key))
        return result

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text: str = node.value
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            if any("\ud800" <= character <= "\udfff" for character in text):
                self._fault(node, "half a surrogate pair is no character", "write the character itself")
                return ""
            return text
        if kind not in _SCALARS:
            self._fault(node, f"unknown tag `{node.tag}`", "remove the tag")
            return None
        if not _SCALARS[kind].fullmatch(text):
            self._fault(node, f"`!!{kind}` does not fit {text!r}", "remove the tag")
            return None
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "float":
            return float(text.replace(".", "", 1) if text.lower().lstrip("+-") in (".inf", ".nan") else text)
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        if len(text) > 1000:
            self._fault(node, f"a number of {len(text)} digits", "write fewer digits")
            return 0
        return int(text, base)


# pydantic's errors in our words -----------------------------------------------------------------------------

_TYPES = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _data_loc(value: Any, loc: Loc, missing: bool) -> Loc:
    """Pydantic's location without the union branches that it names on the way."""
    found: list[str | int] = []
    for position, part in enumerate(loc):
        inside = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        if part in inside:
            found.append(part)
            value = value[part]
        elif missing and position == len(loc) - 1:
            found.append(part)
    return tuple(found)


def _schema_fault(document: Document, model: type[BaseModel], loc: Loc, details: Sequence[ErrorDetails]) -> Fault:
    first = details[0]
    kind, value, name = first["type"], first["input"], dotted(loc)
    section = dotted(loc[:-1])
    if kind == "missing":
        hint = _field_descriptions(model, loc[:-1]).get(str(loc[-1]), "")
        under = f" under `{section}`" if section else ""
        fix = f"add `{loc[-1]}: ...`{under}" + (f": {hint}" if hint else "")
        return document.fault(loc, f"missing key `{name}`", fix)
    if kind == "extra_forbidden":
        return document.fault(loc, f"unknown key `{name}`", _key_fix(model, loc), on_key=True)
    if kind == "value_error":
        return _value_error_fault(document, loc, str(first["ctx"]["error"]))
    if kind in ("too_short", "too_long"):
        words, bound = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
        count = first["ctx"][bound]
        items = "item" if count == 1 else "items"
        return document.fault(loc, f"`{name}` must hold {words} {count} {items}, but got {len(value)}")
    wanted = list(dict.fromkeys(_wanted(detail) for detail in details))
    joined = ", ".join(wanted[:-1]) + " or " + wanted[-1] if len(wanted) > 1 else wanted[0]
    typed = all(detail["type"] in _TYPES for detail in details)
    got = described(value) if typed else plain(value)
    return document.fault(loc, f"`{name}` must be {joined}, but got {got}", _fix(details))


def _wanted(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _TYPES:
        return _TYPES[kind]
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"{words} {context[bound]:g}"
    if kind in ("literal_error", "enum"):
        return f"one of {', '.join(_choices(detail))}"
    if kind == "finite_number":
        return "finite"
    return detail["msg"].removeprefix("Input should be ").removeprefix("Value should be ")


def _choices(detail: ErrorDetails) -> list[str]:
    # pydantic hands them over as prose: "'none', 'balanced' or 'sqrt'"
    return re.findall(r"'([^']*)'", detail["ctx"]["expected"]) or [str(detail["ctx"]["expected"])]


def _fix(details: Sequence[ErrorDetails]) -> str:
    kinds = {detail["type"] for detail in details}
    value = details[0]["input"]
    if kinds == {"literal_error"} and isinstance(value, str):
        return did_you_mean(value, _choices(details[0]))
    if isinstance(value, str) and kinds & {"int_type", "float_type"} and "string_type" not in kinds:
        is_number = any(_SCALARS[kind].fullmatch(value) for kind in ("int", "float"))
        return f"write it without quotes: {value}" if is_number else ""
    if kinds == {"string_type"} and isinstance(value, bool | int | float):
        return f'put it in quotes: "{plain(value)}"'
    if kinds == {"dict_type"} and isinstance(value, str):
        return f"write `{value}: {{}}`"
    if kinds <= {"dict_type", "model_type"} and value is None:
        return "write `{}` for the defaults, or remove it"
    if value is None and kinds <= _TYPES.keys():
        return "give it a value, or remove it"
    if kinds == {"tuple_type"} and isinstance(value, str | int | float):
        return f"put it in brackets: [{value if isinstance(value, str) else plain(value)}]"
    return ""


def _value_error_fault(document: Document, loc: Loc, message: str) -> Fault:
    if loc:
        return document.fault(loc, f"`{dotted(loc)}`: {message}")
    # A rule between sections has no place of its own: take the first key that it names and that is there.
    for name in re.findall(r"`([a-z_0-9.]+)`", message):
        place = tuple(name.split("."))
        if place in document._keys or place in document._origins:
            return document.fault(place, message)
    return document.fault((), message)


def _key_fix(model: type[BaseModel], loc: Loc) -> str:
    key, section = str(loc[-1]), dotted(loc[:-1])
    fields = _field_descriptions(model, loc[:-1])
    near = did_you_mean(key, fields)
    if not near:
        homes = [
            f"{name}.{key}"
            for name, info in model.model_fields.items()
            if any(key in inner.model_fields for inner in _sections(info.annotation))
        ]
        if key in model.model_fields:
            homes.append(key)
        near = f"did you mean `{homes[0]}`?" if homes else ""
    takes = f"{f'`{section}`' if section else 'the top level'} takes: {', '.join(sorted(fields))}"
    return f"{near} {takes}".strip()


def _field_descriptions(model: type[BaseModel], loc: Loc) -> dict[str, str]:
    sections: list[type[BaseModel]] = [model]
    for part in loc:
        inner = [
            found
            for section in sections
            if part in section.model_fields
            for found in _sections(section.model_fields[str(part)].annotation)
        ]
        # A list index or a free key leads to the sections already found below the field.
        sections = inner or sections
    return {name: info.description or "" for section in sections for name, info in section.model_fields.items()}


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _sections(argument)]
