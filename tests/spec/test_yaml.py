"""YAML 1.2 scalars, places of faults, and pydantic's errors in our words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from foldwise.errors import DataError, Fault, SpecError
from foldwise.spec.yaml import (
    Document,
    did_you_mean,
    dump_yaml,
    flow_text,
    loc_of,
    nearest,
    parse_value,
    parse_yaml,
    read_yaml,
    validate,
    value_at,
)

HERE = Path("exp.yaml")


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    lr: float = Field(gt=0, description="Peak rate.")
    weight_decay: float = Field(0.0, ge=0, le=1)
    kind: Literal["none", "sqrt", "balanced"] = "none"


class Outer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str = "x"
    epochs: int = Field(1, ge=1)
    on: bool = False
    sizes: tuple[int, ...] = Field((1,), min_length=1)
    free: dict[str, bool | int | float | str] = {}
    optim: Inner
    more: tuple[Inner, ...] = ()


def message(text: str, model: type[BaseModel] = Outer) -> str:
    with pytest.raises(SpecError) as caught:
        validate(parse_yaml(text, HERE), model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("3E4", 3e4),
        ("+.5", 0.5),
        ("5.", 5.0),
        ("-1.5e+3", -1500.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("+.Inf", math.inf),
        ("1e999", math.inf),
        ("12", 12),
        ("-0", 0),
        ("007", 7),
        ("0o17", 15),
        ("0xfF", 255),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("1:30", "1:30"),
        ("0o8", "0o8"),
        ("true", True),
        ("FALSE", False),
        ("tRUE", "tRUE"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("null", None),
        ("~", None),
        ("", None),
        ("nULL", "nULL"),
        ("=", "="),
        ("2026-01-31", "2026-01-31"),
        ("'3e-4'", "3e-4"),
        ('"no"', "no"),
        ("!!str 3", "3"),
        ("!!float 3", 3.0),
        ("[1, a, 2.0]", [1, "a", 2.0]),
        ("{p: 0.5}", {"p": 0.5}),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    for got in (parse_value(text), parse_yaml(f"a: {text}\n", HERE).value["a"]):
        assert got == value
        assert type(got) is type(value)


def test_nan_is_a_float() -> None:
    assert math.isnan(parse_value(".NaN"))


def test_a_fault_marks_the_value_and_on_key_marks_the_key() -> None:
    document = parse_yaml("a: 1\nsection:\n  key: value  # why\n", HERE)
    assert str(document.fault(("section", "key"), "is wrong", "mend it")) == (
        "exp.yaml:3:8: is wrong\n    3 |   key: value  # why\n      |        ^^^^^\n  fix: mend it"
    )
    assert str(document.fault(("section", "key"), "is wrong", on_key=True)) == (
        "exp.yaml:3:3: is wrong\n    3 |   key: value  # why\n      |   ^^^"
    )


@pytest.mark.parametrize(
    ("text", "loc", "marked"),
    [
        ("a: {b: [1, 20]}\n", ("a", "b", 1), "20"),
        ("a: {b: [1, 20]}\n", ("a", "b"), "[1, 20]"),
        ("a: {b: [1, 20]}\n", ("a", "c"), "a"),
        ("a:\n  b: 1\n", ("a",), "a"),
        ("a:\n", ("a",), "a"),
        ("a: [1,\n  2]\n", ("a",), "[1,"),
        ("a:\n  - b: 1  # why\n  - c\n", ("a", 0), "b: 1"),
        ("a:\n  - b: 1\n  - c\n", ("a", 1), "c"),
        ("a:\n  - b: 1\n", ("a", 7, "x"), "a"),
        ("é: 'ü'\n", ("é",), "'ü'"),
        ("a: |\n  long\n  text\n", ("a",), "|"),
    ],
)
def test_what_is_marked(text: str, loc: tuple[str | int, ...], marked: str) -> None:
    fault = parse_yaml(text, HERE).fault(loc, "x")
    assert fault.source is not None
    assert fault.source[fault.column - 1 :][: fault.width] == marked


def test_a_very_long_line_is_not_shown() -> None:
    fault = parse_yaml(f"a: {'x' * 5000}\n", HERE).fault(("a",), "too long")
    assert str(fault) == "exp.yaml:1:4: too long"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: b: c\n", "exp.yaml:1:5: not YAML: mapping values are not allowed here"),
        ("a:\n\t- b\n", "exp.yaml:2:1: not YAML: a tab where only spaces may stand"),
        (
            "a: [1,2\nb: 3\n",
            "exp.yaml:2:2: not YAML: expected ',' or ']', but got ':'; the flow sequence starts in line 1",
        ),
        (
            "a: 'x\nb: 1\n",
            "exp.yaml:1:4: not YAML: found unexpected end of stream; the quoted scalar starts in line 1",
        ),
        ("a: &x 1\nb: *x\n", "exp.yaml:2:4: `*x` refers to another value"),
        ("a: 1\n---\nb: 2\n", "exp.yaml:2:1: a second document starts here"),
        ("a: 1\nb: \x00\n", "exp.yaml:2:4: YAML takes no control characters, but got U+0000"),
        ("a: @b\n", "exp.yaml:1:4: not YAML: found character '@' that cannot start any token"),
        ("", "exp.yaml:1:1: the file is empty"),
        ("# nothing\n", "exp.yaml:1:1: the file is empty"),
        ("- 1\n", "exp.yaml:1:1: the top level must be a mapping, but got a list"),
        ("word\n", "exp.yaml:1:1: the top level must be a mapping, but got the string 'word'"),
        ("[" * 5000, "exp.yaml:1:1: nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_one_located_fault(text: str, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, HERE)
    assert len(caught.value.faults) == 1
    assert str(caught.value).startswith(f"{expected}\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2\n", ["exp.yaml:2:1: duplicate key `a`, first given in line 1"]),
        (
            "s: {a: 1, a: 2, a: 3}\n",
            [
                "exp.yaml:1:11: duplicate key `s.a`, first given in line 1",
                "exp.yaml:1:17: duplicate key `s.a`, first given in line 1",
            ],
        ),
        ("<<: {a: 1}\n", ["exp.yaml:1:1: merge keys (`<<`) are not supported"]),
        ("1: a\n", ["exp.yaml:1:1: a key must be a string, but got 1"]),
        ("? [1]\n: 2\n", ["exp.yaml:1:3: a key must be a string, but got a collection"]),
        ("a: !thing 1\n", ["exp.yaml:1:4: unknown tag `!thing`"]),
        ("a: !thing {b: 1}\n", ["exp.yaml:1:4: unknown tag `!thing`"]),
        ("a: !!int x\n", ["exp.yaml:1:4: `!!int` does not fit 'x'"]),
        ('a: "\\ud800"\n', ["exp.yaml:1:4: half a surrogate pair is no character"]),
        (f"a: {'9' * 2000}\n", ["exp.yaml:1:4: a number of 2000 digits"]),
        (f"a: {'[' * 60}{']' * 60}\n", ["exp.yaml:1:54: nested more than 50 levels deep"]),
    ],
)
def test_what_leaves_the_file_readable_is_kept_beside_the_value(text: str, expected: list[str]) -> None:
    faults = parse_yaml(text, HERE).faults
    assert [f"{fault.where}: {fault.what}" for fault in faults] == expected


def test_of_equal_keys_the_first_counts_and_its_places_stay() -> None:
    document = parse_yaml("a: {b: 1}\na: {b: 22}\n", HERE)
    assert document.value == {"a": {"b": 1}}
    assert document.fault(("a", "b"), "x").line == 1


def test_bom_and_crlf_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: two\r\n")
    document = read_yaml(path)
    assert document.value == {"a": 1, "b": "two"}
    assert (document.fault(("b",), "x").line, document.fault(("b",), "x").source) == (2, "b: two")


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit.yaml").write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(SpecError, match=r"vit\.yaml:2: expected UTF-8 text, but got the byte 0xff"):
        read_yaml(tmp_path / "vit.yaml")
    with pytest.raises(SpecError, match=r"vti\.yaml: there is no such file\n  fix: did you mean `vit.yaml`\?"):
        read_yaml(tmp_path / "vti.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "optim:\n  learning_rate: 2e-4\n  lr: 1\n",
            "exp.yaml:2:3: unknown key `optim.learning_rate`\n"
            "    2 |   learning_rate: 2e-4\n"
            "      |   ^^^^^^^^^^^^^\n"
            "  fix: did you mean `lr`? `optim` takes: kind, lr, weight_decay\n"
            "1 error; nothing ran.",
        ),
        (
            "optim: {kind: none}\n",
            "exp.yaml:1:1: missing key `optim.lr`\n"
            "    1 | optim: {kind: none}\n"
            "      | ^^^^^\n"
            "  fix: add `lr: ...` under `optim`: Peak rate.\n"
            "1 error; nothing ran.",
        ),
        ("name: a\n", "exp.yaml:1:1: missing key `optim`\n  fix: add `optim: ...`\n1 error; nothing ran."),
        (
            "optim: {lr: 1}\nepochs: thirty\n",
            "exp.yaml:2:9: `epochs` must be an integer, but got the string 'thirty'\n"
            "    2 | epochs: thirty\n"
            "      |         ^^^^^^\n"
            "1 error; nothing ran.",
        ),
        (
            "optim: {lr: 1}\nepochs: 0\n",
            "exp.yaml:2:9: `epochs` must be at least 1, but got 0\n"
            "    2 | epochs: 0\n"
            "      |         ^\n"
            "1 error; nothing ran.",
        ),
        (
            "optim: {lr: 1, kind: sqr}\n",
            "exp.yaml:1:22: `optim.kind` must be one of none, sqrt, balanced, but got 'sqr'\n"
            "    1 | optim: {lr: 1, kind: sqr}\n"
            "      |                      ^^^\n"
            "  fix: did you mean `sqrt`?\n"
            "1 error; nothing ran.",
        ),
    ],
)
def test_messages_in_full(text: str, expected: str) -> None:
    assert message(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: 1.0", "`epochs` must be an integer, but got the number 1.0"),
        ("epochs: true", "`epochs` must be an integer, but got true"),
        ("epochs: '3'", "`epochs` must be an integer, but got the string '3'"),
        ("epochs: '3'", "fix: write it without quotes: 3"),
        ("on: 1", "`on` must be true or false, but got the integer 1"),
        ("name: 3", "`name` must be a string, but got the integer 3"),
        ("name: 3", 'fix: put it in quotes: "3"'),
        ("name:", "`name` must be a string, but got nothing (null)"),
        ("name:", "fix: give it a value, or remove it"),
        ("sizes: 3", "`sizes` must be a list, but got the integer 3"),
        ("sizes: 3", "fix: put it in brackets: [3]"),
        ("sizes: []", "`sizes` must hold at least 1 item, but got 0"),
        ("sizes: [1, x]", "`sizes.1` must be an integer, but got the string 'x'"),
        ("free: {a: [1]}", "`free.a` must be true or false, an integer, a number or a string, but got a list"),
        ("free: word", "fix: write `word: {}`"),
        ("more: [{lr: 1}, 3]", "`more.1` must be a mapping, but got the integer 3"),
        ("more: [{lr: 1}, {}]", "missing key `more.1.lr`"),
        ("more: [{lr: 1, lrr: 1}]", "fix: did you mean `lr`? `more.0` takes: kind, lr, weight_decay"),
        ("lr: 3", "fix: did you mean `optim.lr`? the top level takes:"),
        ("zzz: 3", "fix: the top level takes: epochs, free, more, name, on, optim, sizes"),
    ],
)
def test_messages_in_part(text: str, expected: str) -> None:
    assert expected in message(f"{text}\noptim: {{lr: 1}}\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 0", "`optim.lr` must be more than 0, but got 0"),
        ("lr: .inf", "`optim.lr` must be finite, but got .inf"),
        ("lr: .nan", "`optim.lr` must be finite, but got .nan"),
        ("lr: -1e-3", "`optim.lr` must be more than 0, but got -0.001"),
        ("{lr: 1, weight_decay: 1.5}", "`optim.weight_decay` must be at most 1, but got 1.5"),
    ],
)
def test_numbers_out_of_range(text: str, expected: str) -> None:
    assert expected in message(f"optim: {text if text.startswith('{') else '{' + text + '}'}\n")


def test_all_faults_come_at_once_in_the_order_of_the_file() -> None:
    with pytest.raises(DataError) as caught:
        validate(parse_yaml("optim: {lr: x, lr: 1}\nepochs: 0\nnam: y\nepochs: 3\n", HERE), Outer, error=DataError)
    assert [fault.where for fault in caught.value.faults] == [
        "exp.yaml:1:13",
        "exp.yaml:1:16",
        "exp.yaml:2:9",
        "exp.yaml:3:1",
        "exp.yaml:4:1",
    ]
    assert str(caught.value).endswith("5 errors; nothing was written.")


def test_an_int_is_fine_for_a_float_and_a_list_for_a_tuple() -> None:
    result = validate(parse_yaml("optim: {lr: 1}\nsizes: [1, 2]\n", HERE), Outer)
    assert result.optim.lr == 1.0
    assert isinstance(result.optim.lr, float)
    assert result.sizes == (1, 2)


def test_replaced_values_are_blamed_on_their_origin() -> None:
    document = parse_yaml("optim: {lr: 1}\nmore: [{lr: 1}]\n", HERE)
    changed = document.replaced(("more", 0, "lr"), "x", "--set more.0.lr=x").replaced(
        ("free", "a"), 1, "--set free.a=1"
    )
    assert changed.value == {"optim": {"lr": 1}, "more": [{"lr": "x"}], "free": {"a": 1}}
    assert document.value == {"optim": {"lr": 1}, "more": [{"lr": 1}]}
    section = document.replaced(("optim",), {"lr": "x"}, "--set optim={lr: x}")
    assert section.fault(("optim", "lr"), "what").where == "--set optim={lr: x}"
    with pytest.raises(SpecError) as caught:
        validate(changed, Outer)
    assert str(caught.value.faults[0]) == "--set more.0.lr=x: `more.0.lr` must be a number, but got the string 'x'"


@pytest.mark.parametrize(
    ("loc", "expected"),
    [
        (("sizes", 2), "`sizes` is a list: expected an index from 0 to 1, but got 2"),
        (("sizes", "x"), "`sizes` is a list: expected an index from 0 to 1, but got 'x'"),
        (("name", "x"), "`name` is the string 'a', which holds no `x`"),
    ],
)
def test_ways_that_lead_nowhere(loc: tuple[str | int, ...], expected: str) -> None:
    with pytest.raises(KeyError) as caught:
        parse_yaml("sizes: [1, 2]\nname: a\n", HERE).replaced(loc, 1, "--set")
    assert caught.value.args[0] == expected


@pytest.mark.parametrize(
    ("word", "option"),
    [
        ("learning_rate", "lr"),
        ("wd", "weight_decay"),
        ("LR", "lr"),
        ("batchsize", "batch_size"),
        ("smoothing", "label_smoothing"),
        ("zzz", None),
        ("", None),
    ],
)
def test_nearest(word: str, option: str | None) -> None:
    assert nearest(word, ["lr", "weight_decay", "batch_size", "label_smoothing"]) == option
    assert did_you_mean(word, ["lr", "weight_decay", "batch_size", "label_smoothing"]) == (
        f"did you mean `{option}`?" if option else ""
    )


texts = st.text(st.characters(exclude_categories=["Cs"]))
plain_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def exactly(value: Any) -> Any:
    """`value` with its types, since 1 == 1.0 == True."""
    if isinstance(value, dict):
        return {key: exactly(item) for key, item in value.items()}
    return [exactly(item) for item in value] if isinstance(value, list) else (type(value), value)


@given(st.dictionaries(st.sampled_from(["a", "no", "3e-4", "true", "x y"]), plain_data, min_size=1, max_size=4))
def test_dump_reads_back(value: dict[str, Any]) -> None:
    document: Document = parse_yaml(dump_yaml(value), HERE)
    assert document.faults == ()
    assert exactly(document.value) == exactly(value)


@given(plain_data)
def test_flow_text_is_one_line_that_reads_back(value: Any) -> None:
    text = flow_text(value)
    assert "\n" not in text
    assert exactly(parse_value(text)) == exactly(value)


def test_flow_text_is_short() -> None:
    assert flow_text(["identity", "hflip"]) == "[identity, hflip]"
    assert flow_text({"a": [{"p": 0.5}, []], "b": {}}) == "{a: [{p: 0.5}, []], b: {}}"
    assert [flow_text(value) for value in (None, True, 1, 0.5, "x")] == ["null", "true", "1", "0.5", "x"]


@pytest.mark.parametrize(
    ("key", "loc"),
    [
        ("a.0.p", ("a", 0, "p")),
        ("a.1.p", ("a", 1, "p")),
        ("a.x", ("a", "x")),
        ("space.optim.lr.low", ("space", "optim.lr", "low")),
        ("space.optim.wd.low", ("space", "optim", "wd", "low")),
        ("space.optim", ("space", "optim")),
        ("new.key", ("new", "key")),
        ("a..b", ("a", "", "b")),
    ],
)
def test_a_dotted_key_leads_to_a_place(key: str, loc: tuple[str | int, ...]) -> None:
    assert loc_of({"a": [{"p": 1}], "space": {"optim.lr": {"low": 1}, "optim": 3}}, key) == loc


def test_what_stands_at_a_place() -> None:
    tree = {"a": [{"p": 1}]}
    assert value_at(tree, ("a", 0, "p")) == 1
    assert value_at(tree, ()) is tree
    for loc in (("a", 1), ("a", "0"), ("a", 0, "p", "q"), ("b",)):
        with pytest.raises(KeyError):
            value_at(tree, loc)


@given(st.text(max_size=40) | st.text("ab:-{}[]&*!|>'\"#%@?,\t \n01.e", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    faults: tuple[Fault, ...] = ()
    try:
        validate(parse_yaml(text, HERE), Outer)
    except SpecError as error:
        faults = error.faults
    assert all(fault.where.startswith("exp.yaml:") for fault in faults)
