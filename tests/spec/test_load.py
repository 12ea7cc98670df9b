"""Experiment files and overrides: golden messages, all faults at once, round trips, and nothing but SpecError."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldwise.errors import SpecError
from foldwise.spec.load import (
    check_all,
    differences,
    flatten,
    load_experiment,
    spec_yaml,
    split_overrides,
    with_defaults,
)
from foldwise.spec.model import ExperimentSpec, resolved
from foldwise.spec.yaml import dump_yaml, parse_yaml, validate

VIT = """\
# yaml-language-server: $schema=schema.json
name: vit
competition: faces
model: {arch: vit_base_patch16_224.orig_in21k_ft_in1k, weights: pretrained, image_size: 224}
augment:
  - HorizontalFlip: {p: 0.5}
  - Affine: {rotate: [-15, 15], p: 1.0}
optim:
  name: adamw
  lr: 2e-4
train: {epochs: 30, batch_size: 32}
tta: [identity, hflip, zoom_1.1]
"""


LEAST = {
    "name": "vit",
    "competition": "faces",
    "model": {"arch": "resnet18"},
    "optim": {"lr": 0.001},
    "train": {"epochs": 3},
}


def make_project(root: Path) -> Path:
    (root / "experiments").mkdir()
    (root / "experiments" / "vit.yaml").write_text(VIT)
    (root / "inputs" / "faces").mkdir(parents=True)
    (root / "inputs" / "faces" / "competition.yaml").write_text("image: {height: 48, width: 48, channels: 1}\n")
    return root


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_project(tmp_path)


def load(root: Path, text: str | None = None, *overrides: str, name: str | None = None) -> ExperimentSpec:
    path = root / "experiments" / "vit.yaml"
    if text is not None:
        path.write_text(text)
    return load_experiment(path, overrides=overrides, name=name, root=root)


def message(root: Path, text: str | None = None, *overrides: str, name: str | None = None) -> str:
    with pytest.raises(SpecError) as caught:
        load(root, text, *overrides, name=name)
    return str(caught.value)


def test_a_good_file_loads(project: Path) -> None:
    spec = load(project)
    assert spec.name == "vit"
    assert spec.optim.lr == 2e-4
    assert spec.augment == ({"HorizontalFlip": {"p": 0.5}}, {"Affine": {"rotate": [-15, 15], "p": 1.0}})


def test_five_faults_give_five_located_messages(project: Path) -> None:
    text = """\
name: vit
competition: faces
model: {arch: resnet18, dropout: much}
augment:
  - HorizontalFlip: {prob: 0.5}
optim:
  learning_rate: 2e-4
  lr: 1e-3
train: {epochs: 0}
name: other
"""
    assert message(project, text) == (
        "experiments/vit.yaml:3:34: `model.dropout` must be a number, but got the string 'much'\n"
        "    3 | model: {arch: resnet18, dropout: much}\n"
        "      |                                  ^^^^\n"
        "experiments/vit.yaml:5:22: `HorizontalFlip` has no parameter `prob`\n"
        "    5 |   - HorizontalFlip: {prob: 0.5}\n"
        "      |                      ^^^^\n"
        "  fix: did you mean `p`? `HorizontalFlip` takes: p\n"
        "experiments/vit.yaml:7:3: unknown key `optim.learning_rate`\n"
        "    7 |   learning_rate: 2e-4\n"
        "      |   ^^^^^^^^^^^^^\n"
        "  fix: did you mean `lr`? `optim` takes: backbone_lr_scale, clip_grad_norm, layer_decay, lr, momentum, "
        "name, weight_decay\n"
        "experiments/vit.yaml:9:17: `train.epochs` must be at least 1, but got 0\n"
        "    9 | train: {epochs: 0}\n"
        "      |                 ^\n"
        "experiments/vit.yaml:10:1: duplicate key `name`, first given in line 1\n"
        "   10 | name: other\n"
        "      | ^^^^\n"
        "  fix: remove one of the two\n"
        "5 errors; nothing ran."
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "name: vit\n",
            "name: vti\n",
            "experiments/vit.yaml:2:7: `name` must be the file's stem, but got 'vti'\n"
            "    2 | name: vti\n"
            "      |       ^^^\n"
            "  fix: write `name: vit`\n",
        ),
        (
            "competition: faces",
            "competition: face",
            "experiments/vit.yaml:3:14: there is no competition `face` in inputs/\n"
            "    3 | competition: face\n"
            "      |              ^^^^\n"
            "  fix: did you mean `faces`? if not, `make data COMP=face FROM=<folder>` reads it in\n",
        ),
        ("competition: faces", "competition: demo", "  fix: `make demo`\n"),
        ("competition: faces", "competition: birds", "  fix: `make data COMP=birds FROM=<folder>`\n"),
        ("name: adamw", "name: adamvv", "experiments/vit.yaml:9:9: unknown optimizer 'adamvv'\n"),
        (".orig_in21k_ft_in1k", ".orig_in21k", None),
        (".orig_in21k_ft_in1k", ".orig", "`vit_base_patch16_224` has no weights tagged 'orig'\n"),
        ("vit_base_patch16_224.orig_in21k_ft_in1k", "resnet_18", "  fix: did you mean `resnet18`?\n"),
        (
            "weights: pretrained",
            "weights: run:vit",
            "experiments/vit.yaml:4:65: an experiment cannot start from its own weights\n",
        ),
        ("weights: pretrained", "weights: run:vitt", "there is no experiment or run `vitt`\n"),
        (
            "weights: pretrained",
            "weights: run:A",
            "`model.weights`: expected `pretrained`, `none` or `run:<experiment>`",
        ),
        ("weights: pretrained", "weights: run:cnn", None),
        ("weights: pretrained", "weights: run:kept", None),
        (
            "zoom_1.1",
            "zoom_9",
            "experiments/vit.yaml:12:6: `tta`: a zoom must lie between 0.5 and 2, but got 'zoom_9'\n",
        ),
        (
            "{epochs: 30, batch_size: 32}",
            "{epochs: 3, freeze_backbone_epochs: 3}",
            "experiments/vit.yaml:11:44: `train.freeze_backbone_epochs` < `train.epochs` must hold, but got (3, 3)\n",
        ),
    ],
)
def test_what_a_spec_refers_to(project: Path, old: str, new: str, expected: str | None) -> None:
    (project / "experiments" / "cnn.yaml").write_text("name: cnn\n")
    (project / "oof" / "kept").mkdir(parents=True)
    (project / "oof" / "kept" / "run.json").write_text("{}")
    assert old in VIT
    text = VIT.replace(old, new)
    if expected is None:
        load(project, text)
    else:
        assert expected in message(project, text)


def test_faults_of_teachers_are_told_at_their_place(project: Path) -> None:
    (project / "oof" / "teacher").mkdir(parents=True)
    (project / "oof" / "teacher" / "run.json").write_text("{}")
    text = VIT + "pseudo: {from: [teacher, vit, techer], min_confident: 0.8}\ndistill: {weight: 0.5}\n"
    assert message(project, text).replace("experiments/vit.yaml", "F") == (
        "F:13:26: an experiment cannot be its own teacher\n"
        "   13 | pseudo: {from: [teacher, vit, techer], min_confident: 0.8}\n"
        "      |                          ^^^\n"
        "  fix: name another\n"
        "F:13:31: there is no experiment or run `techer`\n"
        "   13 | pseudo: {from: [teacher, vit, techer], min_confident: 0.8}\n"
        "      |                               ^^^^^^\n"
        "  fix: did you mean `teacher`?\n"
        "F:13:40: unknown key `pseudo.min_confident`\n"
        "   13 | pseudo: {from: [teacher, vit, techer], min_confident: 0.8}\n"
        "      |                                        ^^^^^^^^^^^^^\n"
        "  fix: did you mean `min_confidence`? `pseudo` takes: from, hard, min_confidence, weight\n"
        "F:14:1: missing key `distill.from`\n"
        "   14 | distill: {weight: 0.5}\n"
        "      | ^^^^^^^\n"
        "  fix: add `from: ...` under `distill`: Kept k-fold runs on the same folds and classes, averaged; fold k asks "
        "their fold k alone.\n"
        "4 errors; nothing ran."
    )


def test_an_overridden_spec_may_learn_from_the_run_of_its_file(project: Path) -> None:
    spec = load(project, None, "pseudo.from=[vit]", name="vit_pseudo")
    assert spec.name == "vit_pseudo"
    assert spec.pseudo is not None
    assert spec.pseudo.teachers == ("vit",)
    assert load(project, None, "distill.from=[vit]", "distill.weight=0.5").name.startswith("vit_")
    assert load(project, None, "model.weights=run:vit", name="vit_again").model.weights == "run:vit"
    (project / "oof" / "vit_pseudo").mkdir(parents=True)
    (project / "oof" / "vit_pseudo" / "run.json").write_text("{}")
    refused = message(project, None, "pseudo.from=[vit_pseudo]", name="vit_pseudo")
    assert refused.startswith("--set pseudo.from=[vit_pseudo]: an experiment cannot be its own teacher\n")
    assert message(project, None, "distill.from=vit").startswith(
        "--set distill.from=vit: `distill.from` must be a list, but got the string 'vit'\n"
        "  fix: put it in brackets: [vit]"
    )


def test_what_a_student_is_taught_can_be_tuned(project: Path) -> None:
    text = VIT.replace("name: vit", "name: pupil") + (
        "pseudo: {from: [vit]}\n"
        "tune:\n"
        "  space:\n"
        "    pseudo.min_confidence: {low: 0.5, high: 0.95}\n"
        "    pseudo.from: {choices: [[vit], [pupil]]}\n"
        "    distill: {choices: [null, {from: [vit]}, {from: [gone]}]}\n"
    )
    path = project / "experiments" / "pupil.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_experiment(path, root=project)
    assert [fault.what for fault in caught.value.faults] == [
        "choice 2 of `pseudo.from`: an experiment cannot be its own teacher",
        "choice 3 of `distill`: there is no experiment or run `gone`",
    ]


def test_colour_transforms_are_refused_for_gray_images_alone(project: Path) -> None:
    text = VIT.replace("HorizontalFlip: {p: 0.5}", "RandomRain: {}")
    assert "`RandomRain` needs colour images, but the competition's have 1 channel" in message(project, text)
    (project / "inputs" / "faces" / "competition.yaml").write_text("image: {height: 48, width: 48, channels: 3}\n")
    load(project, text)


def test_a_label_map_maps_every_class_of_the_competition_and_no_other(project: Path) -> None:
    described = project / "inputs" / "faces" / "competition.yaml"
    described.write_text(described.read_text() + "classes: [angry, happy, sad]\n")
    mapped = VIT.replace("model:", "label_map: {angry: bad, happy: good, sad: bad}\nmodel:")
    assert load(project, mapped).label_map == {"angry": "bad", "happy": "good", "sad": "bad"}
    wrong = VIT.replace("model:", "label_map: {angry: bad, hapy: good}\nmodel:")
    assert message(project, wrong) == (
        "experiments/vit.yaml:4:1: `label_map` must map every class, but leaves out happy, sad\n"
        "    4 | label_map: {angry: bad, hapy: good}\n"
        "      | ^^^^^^^^^\n"
        "  fix: map it to itself where it stays; the classes of faces are: angry, happy, sad\n"
        "experiments/vit.yaml:4:25: `label_map` maps 'hapy', which is no class of faces\n"
        "    4 | label_map: {angry: bad, hapy: good}\n"
        "      |                         ^^^^\n"
        "  fix: did you mean `happy`? the classes of faces are: angry, happy, sad\n"
        "2 errors; nothing ran."
    )


def test_a_spec_kept_before_a_key_came_has_that_keys_default() -> None:
    whole = resolved(ExperimentSpec.model_validate(json.loads(json.dumps(LEAST)), strict=False))
    older = copy.deepcopy(whole)
    del older["label_map"], older["model"]["head"], older["tuned"]
    assert with_defaults(older) == whole
    assert with_defaults(older | {"seeds": [7]}) == whole | {"seeds": [7]}
    assert with_defaults({"no": "spec"}) == {"no": "spec"}


def test_overrides_are_applied_and_name_the_run(project: Path) -> None:
    spec = load(
        project, None, "optim.lr=3e-4", "augment.0.HorizontalFlip.p=0.3", "tta=[identity]", "model.options.a=no"
    )
    assert spec.optim.lr == 3e-4
    assert spec.augment[0] == {"HorizontalFlip": {"p": 0.3}}
    assert spec.tta == ("identity",)
    assert spec.model.options == {"a": "no"}
    assert spec.optim.name == "adamw"
    base, _, digits = spec.name.rpartition("_")
    assert base == "vit"
    assert len(digits) == 6


def test_an_overridden_name_depends_on_the_effect_alone(project: Path) -> None:
    first = load(project, None, "optim.lr=3e-4", "tta=[identity]").name
    assert load(project, None, "tta=[ 'identity' ]", "optim.lr=0.0003").name == first
    assert load(project, None, "optim.lr=9", "tta=[identity]", "optim.lr=0.0003").name == first
    assert load(project, None, "optim.lr=3e-4").name != first
    assert load(project, None, "optim.lr=3e-4", name="vit_slow").name == "vit_slow"
    assert load(project, None, name="vit_again").name == "vit_again"
    assert load(project, None, name="vit").name == "vit"


def test_overrides_are_checked_as_the_file_is(project: Path) -> None:
    (project / "experiments" / "cnn.yaml").write_text("name: cnn\n")
    bad = ["optim.lr=abc", "lr=3", "augment.0.HorizontalFlip.q=1", "model.weights=run:vti", "optim.name=adamv"]
    hopeless = ["augment.5.p=1", "tta=[x", "foo", "a..b=3", "name=x", "train.epochs.x=3"]
    lines = message(project, None, *bad, *hopeless, name="cnn").splitlines()
    assert [line for line in lines if line.startswith("--")] == [
        "--set augment.5.p=1: `augment` is a list: expected an index from 0 to 1, but got 5",
        "--set tta=[x: not YAML: expected ',' or ']', but got '<stream end>'; the flow sequence starts in line 1",
        "--set foo: an override must read `section.key=value`",
        "--set a..b=3: an override must read `section.key=value`",
        "--set name=x: an override cannot change the name",
        "--set train.epochs.x=3: `train.epochs` is the integer 30, which holds no `x`",
        "--set optim.lr=abc: `optim.lr` must be a number, but got the string 'abc'",
        "--set lr=3: unknown key `lr`",
        "--set optim.name=adamv: unknown optimizer 'adamv'",
        "--set augment.0.HorizontalFlip.q=1: `HorizontalFlip` has no parameter `q`",
        "--set model.weights=run:vti: there is no experiment or run `vti`",
        "--name cnn: `cnn` is the name of experiments/cnn.yaml",
    ]
    assert lines[-1] == "12 errors; nothing ran."


def test_an_override_mends_the_file(project: Path) -> None:
    broken = VIT.replace("lr: 2e-4", "lr: fast")
    assert "`optim.lr` must be a number" in message(project, broken)
    assert load(project, broken, "optim.lr=1e-3").optim.lr == 1e-3


@pytest.mark.parametrize("name", ["vit", "Vit", "a b", "", "x" * 81, "../up"])
def test_names_that_an_overridden_spec_cannot_have(project: Path, name: str) -> None:
    assert f"--name {name}: " in message(project, None, "optim.lr=1", name=name)


def test_a_name_too_long_for_its_hash(project: Path) -> None:
    stem = "v" * 80
    path = project / "experiments" / f"{stem}.yaml"
    path.write_text(VIT.replace("name: vit\n", f"name: {stem}\n"))
    assert load_experiment(path, root=project).name == stem
    with pytest.raises(SpecError, match="is too long a name\n  fix: give it one: NAME="):
        load_experiment(path, overrides=["optim.lr=1"], root=project)


def test_check_all_reports_file_by_file(project: Path) -> None:
    bad = project / "experiments" / "bad.yaml"
    bad.write_text("name: bad\n")
    results = check_all(project)
    assert [path.name for path, _ in results] == ["bad.yaml", "vit.yaml"]
    assert [error is None for _, error in results] == [False, True]
    assert [path for path, _ in check_all(project, [bad])] == [bad]
    missing = project / "experiments" / "vitt.yaml"
    assert "did you mean `vit.yaml`?" in str(check_all(project, [missing])[0][1])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("  a=1   b=2\n", ["a=1", "b=2"]),
        ("tta=[identity, hflip] x={a: 1, b: [2, 3]} y=3", ["tta=[identity, hflip]", "x={a: 1, b: [2, 3]}", "y=3"]),
        ("a='x y' b=\"p ] q\" c=it's d=1", ["a='x y'", 'b="p ] q"', "c=it's", "d=1"]),
        ("a=[1, 2 b=3", ["a=[1, 2 b=3"]),
        ("a=1] b=3", ["a=1]", "b=3"]),
    ],
)
def test_split_overrides(text: str, parts: list[str]) -> None:
    assert split_overrides(text) == parts


def test_flatten_and_differences() -> None:
    old = {
        "a": {"b": 1.0, "c": None},
        "tta": ["identity", "hflip"],
        "augment": [{"Blur": {"p": 0.5}}],
        "x": {},
        "y": True,
    }
    assert flatten(old) == {
        "a.b": 1.0,
        "a.c": None,
        "tta": "[identity, hflip]",
        "augment.0.Blur.p": 0.5,
        "x": "{}",
        "y": True,
    }
    new = {"a": {"b": 2.0, "c": None}, "tta": ["identity"], "augment": [], "x": {"z": 1}, "y": False}
    assert differences(old, new) == [
        "a.b: 1.0 -> 2.0",
        "tta: [identity, hflip] -> [identity]",
        "augment: (absent) -> []",
        "x.z: (absent) -> 1",
        "y: true -> false",
        "augment.0.Blur.p: 0.5 -> (absent)",
        "x: {} -> (absent)",
    ]
    assert differences(old, copy.deepcopy(old)) == []


def test_a_kept_spec_is_readable_and_differs_in_nothing(project: Path) -> None:
    spec = load(project)
    text = spec_yaml(spec)
    assert "\n  lr: 0.0002\n" in text
    assert "\ntta: [identity, hflip, zoom_1.1]\n" in text
    assert validate(parse_yaml(text, Path("spec.yaml")), ExperimentSpec) == spec


def test_a_spec_that_a_study_wrote_says_so_for_good(project: Path) -> None:
    text = VIT + f"tuned: {{study: vit, trials: 30, folds_sha256: {'0a' * 32}}}\n"
    spec = load(project, text)
    assert spec.tuned is not None
    assert spec.tuned.trials == 30
    assert validate(parse_yaml(spec_yaml(spec), Path("spec.yaml")), ExperimentSpec) == spec
    assert with_defaults(resolved(spec))["tuned"]["study"] == "vit"
    assert "`tuned.trials` must be at least 1, but got 0" in message(project, text.replace("30, folds", "0, folds"))
    assert "`tuned.folds_sha256`" in message(project, text.replace("0a0a", "0A0A"))


# Any valid spec -------------------------------------------------------------------------------------------------------

positive = st.floats(1e-12, 1e6)
share = st.floats(0, 1)
below_one = st.floats(0, 1, exclude_max=True)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words
values = scalars | st.none() | st.lists(scalars, max_size=3) | st.dictionaries(words, scalars, max_size=2)


specs = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,20}", fullmatch=True),
        "competition": st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,20}", fullmatch=True),
        "model": st.fixed_dictionaries(
            {"arch": words},
            optional={
                "weights": st.sampled_from(["none", "pretrained", "run:no", "run:1e5"]),
                "image_size": st.integers(16, 1024),
                "dropout": below_one,
                "options": st.dictionaries(words, scalars, max_size=3),
            },
        ),
        "optim": st.fixed_dictionaries(
            {"lr": positive}, optional={"name": words, "clip_grad_norm": st.none() | positive, "momentum": below_one}
        ),
        "train": st.fixed_dictionaries(
            {"epochs": st.integers(1, 10_000)},
            optional={"ema_decay": st.none() | st.floats(0.1, 0.9), "compile": st.booleans()},
        ),
    },
    optional={
        "seeds": st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3, unique=True),
        "augment": st.lists(st.dictionaries(words, st.dictionaries(words, values, max_size=3), max_size=2), max_size=3),
        "mix": st.fixed_dictionaries({}, optional={"mixup_alpha": positive, "prob": share}),
        "pseudo": st.none()
        | st.fixed_dictionaries(
            {"from": st.lists(st.sampled_from(["a", "no", "1e5"]), min_size=1, unique=True)},
            optional={"min_confidence": share, "hard": st.booleans()},
        ),
        "distill": st.fixed_dictionaries(
            {"from": st.just(["null"])}, optional={"weight": st.floats(0.1, 1), "temperature": st.floats(1, 20)}
        ),
        "tta": st.lists(st.sampled_from(["identity", "hflip", "zoom_1.1+hflip", "rotate_10"]), min_size=1, unique=True),
    },
)


@given(specs)
def test_any_valid_spec_round_trips(tree: dict[str, Any]) -> None:
    spec = ExperimentSpec.model_validate_json(json.dumps(tree))
    again = validate(parse_yaml(spec_yaml(spec), Path("spec.yaml")), ExperimentSpec)
    assert again == spec
    assert json.dumps(resolved(again)) == json.dumps(resolved(spec))


# Any broken spec ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


def places(tree: Any, loc: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield loc
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*loc, key))


@settings(max_examples=150)
@given(st.data())
def test_deleting_and_inserting_keys_gives_a_spec_or_a_spec_error(shared_project: Path, data: st.DataObject) -> None:
    tree: dict[str, Any] = parse_yaml(VIT, Path("vit.yaml")).value
    for _ in range(data.draw(st.integers(1, 3))):
        loc = data.draw(st.sampled_from([place for place in places(tree) if place] or [("name",)]))
        parent: Any = tree
        for key in loc[:-1]:
            parent = parent[key]
        if data.draw(st.booleans()) and (isinstance(parent, list) or loc[-1] in parent):
            del parent[loc[-1]]
        else:
            known = st.sampled_from(
                ["p", "lr", "name", "arch", "weights", "Affine", "epochs", "options", "competition"]
            )
            key = loc[-1] if isinstance(parent, list) else data.draw(known | words)
            parent[key] = data.draw(values)
    overrides = data.draw(
        st.lists(words | st.sampled_from(["optim.lr=1", "augment.0=1", "model=3", "tta.0=["]), max_size=2)
    )
    path = shared_project / "experiments" / "vit.yaml"
    path.write_text(dump_yaml(tree), encoding="utf-8")
    try:
        assert isinstance(load_experiment(path, overrides=overrides, root=shared_project), ExperimentSpec)
    except SpecError as error:
        count = len(error.faults)
    else:
        count = 1
    assert count > 0


@settings(max_examples=150)
@given(st.integers(0, len(VIT)), st.integers(0, 12), st.text(":{}[]&*!|>'\"#%@?,-\t \n01.eax", max_size=4))
def test_garbling_the_text_gives_a_spec_or_a_spec_error(shared_project: Path, start: int, cut: int, new: str) -> None:
    path = shared_project / "experiments" / "vit.yaml"
    path.write_text(VIT[:start] + new + VIT[start + cut :], encoding="utf-8")
    ((_, error),) = check_all(shared_project, [path])
    assert error is None or error.faults


def test_checking_files_loads_no_heavy_library(project: Path) -> None:
    # How long it takes is a ratio in tests/bench.py: this is what keeps it under a second.
    code = (
        "import sys; from pathlib import Path; from foldwise.spec.load import check_all\n"
        f"results = check_all(Path({str(project)!r}))\n"
        "assert results and not any(error for _, error in results), results\n"
        "heavy = {'torch', 'numpy', 'pandas', 'albumentations', 'timm', 'rich', 'PIL'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
