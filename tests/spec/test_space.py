"""The search space: what is drawn from it is a spec, what is wrong with it is told, and its size is what it holds."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foldwise.errors import SpecError
from foldwise.spec.load import differences, load_experiment
from foldwise.spec.model import ExperimentSpec, FidelitySpec, resolved
from foldwise.spec.space import Parameter, own_values, parameters, size, with_fidelity, with_parameters
from foldwise.spec.yaml import parse_yaml, validate

ROOT = Path(__file__).resolve().parents[2]

SPEC = """\
name: cnn
competition: faces
model: {arch: cnn_3block, dropout: 0.2, options: {depth: 6}}
augment:
  - HorizontalFlip: {p: 0.5}
  - Affine: {rotate: [-12, 12], p: 1.0}
mix: {mixup_alpha: 0.2, prob: 0.5}
optim: {lr: 1e-3}
schedule: {warmup_epochs: 5}
train: {epochs: 50, batch_size: 32}
tta: [identity, hflip]
tune:
"""
SPACE = """\
  space:
    model.options.depth: {low: 4, high: 8, when: {model.arch: [cnn_3stage_cbam]}}
    model.arch: {choices: [cnn_3block, cnn_3stage_cbam, resnet18]}
    optim.lr: {low: 1e-4, high: 1e-2, log: true}
    train.batch_size: {low: 16, high: 100, step: 16}
    augment.1.Affine.p: {low: 0, high: 1, step: 0.1}
    augment.1.Affine.rotate: {choices: [0, [-12, 12], [-20, 20]]}
    mix: {choices: [{}, {mixup_alpha: 0.2, prob: 0.5}, {cutmix_alpha: 1, off_epochs: 5}]}
    mix2: {}
    schedule.warmup_epochs: {low: 0, high: 10}
    optim.clip_grad_norm: {choices: [null, 1, 5.0]}
    tta: {choices: [[identity], [identity, hflip]], when: {mix: [{}]}}
""".replace("    mix2: {}\n", "")


def spec_of(tune: str) -> ExperimentSpec:
    return validate(parse_yaml(SPEC + tune, Path("cnn.yaml")), ExperimentSpec)


def space_of(*entries: str) -> tuple[Parameter, ...]:
    return parameters(spec_of("  space:\n" + "".join(f"    {entry}\n" for entry in entries)))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "inputs" / "faces").mkdir(parents=True)
    (tmp_path / "inputs" / "faces" / "competition.yaml").write_text("image: {height: 48, width: 48, channels: 1}\n")
    return tmp_path


def load(root: Path, tune: str, *overrides: str, tuning: bool = False) -> ExperimentSpec:
    path = root / "experiments" / "cnn.yaml"
    path.write_text(SPEC + tune)
    return load_experiment(path, overrides=overrides, root=root, tuning=tuning)


def message(root: Path, tune: str, *overrides: str, tuning: bool = False) -> str:
    with pytest.raises(SpecError) as caught:
        load(root, tune, *overrides, tuning=tuning)
    return str(caught.value)


# What a space is ------------------------------------------------------------------------------------------------------


def test_a_space_is_read_into_parameters_in_the_order_of_their_conditions(project: Path) -> None:
    found = {parameter.key: parameter for parameter in parameters(load(project, SPACE))}
    keys = list(found)
    assert keys.index("model.arch") < keys.index("model.options.depth")
    assert keys.index("mix") < keys.index("tta")
    assert found["optim.lr"] == Parameter("optim.lr", "float", 1e-4, 1e-2, True, None, (), 1e-3, {})
    # 100 lies between two steps: the range ends at the last of them
    assert found["train.batch_size"] == Parameter("train.batch_size", "int", 16, 96, False, 16, (), 32, {})
    # the field holds floats, so whole numbers are none
    warmup = found["schedule.warmup_epochs"]
    assert [warmup.kind, *map(type, (warmup.low, warmup.high, warmup.own))] == ["float", float, float, float]
    assert found["model.options.depth"].kind == "int"
    assert found["augment.1.Affine.p"].count == 11
    # of a section, the choice that says the same as the spec, whose defaults it leaves out
    assert found["mix"].own == {"mixup_alpha": 0.2, "prob": 0.5}
    assert found["tta"].labels == ("[identity]", "[identity, hflip]")
    assert found["mix"].labels[0] == "{}"
    assert found["optim.clip_grad_norm"].labels == (None, 1, 5.0)
    for parameter in found.values():
        assert [parameter.value_of(label) for label in parameter.labels] == list(parameter.choices)
    with pytest.raises(KeyError, match="`tta` has no choice 'hflip'"):
        found["tta"].value_of("hflip")


def test_a_spec_without_a_space_has_no_parameters() -> None:
    plain = ExperimentSpec.model_validate(spec_of(SPACE).model_copy(update={"tune": None}))
    assert parameters(plain) == ()
    assert own_values(plain) == {}


def test_own_values_are_those_of_the_parameters_that_exist() -> None:
    spec = spec_of(SPACE)
    own = own_values(spec)
    assert own.keys() == set(spec.tune.space) - {"model.options.depth", "tta"}  # type: ignore[union-attr]
    assert with_parameters(spec, own, root=ROOT) == spec


def test_a_space_changes_no_run(project: Path) -> None:
    with_space = load(project, SPACE)
    without = validate(parse_yaml(SPEC.removesuffix("tune:\n"), Path("cnn.yaml")), ExperimentSpec)
    assert with_space != without
    assert json.dumps(resolved(with_space)) == json.dumps(resolved(without))


def test_a_number_between_two_steps_is_put_on_the_nearer() -> None:
    (parameter,) = space_of("augment.1.Affine.p: {low: 0, high: 1, step: 0.1}")
    assert parameter.value_of(0.1 + 0.2) == 0.3
    assert parameter.holds(0.3)
    assert not parameter.holds(0.35)
    assert not parameter.holds(1.1)
    assert not parameter.holds(True)


# Any drawn values -----------------------------------------------------------------------------------------------------


def drawn(data: st.DataObject, space: tuple[Parameter, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for parameter in space:
        if not parameter.exists(values):
            continue
        low, high, step = parameter.low, parameter.high, parameter.step
        if parameter.kind == "choice":
            values[parameter.key] = parameter.value_of(data.draw(st.sampled_from(parameter.labels)))
        elif parameter.kind == "float" and step is None:
            assert low is not None
            assert high is not None
            values[parameter.key] = data.draw(st.floats(low, high))
        else:
            assert parameter.count is not None
            assert low is not None
            index = data.draw(st.integers(0, parameter.count - 1))
            values[parameter.key] = parameter.value_of(low + index * (step or 1))
    return values


@settings(max_examples=100)
@given(st.data())
def test_any_values_of_a_space_give_a_valid_spec_that_holds_them(data: st.DataObject) -> None:
    spec = spec_of(SPACE)
    space = parameters(spec)
    values = drawn(data, space)
    for parameter in space:
        assert parameter.key not in values or parameter.holds(values[parameter.key])
    made = with_parameters(spec, values, root=ROOT)
    found = {parameter.key: parameter for parameter in parameters(made)}
    assert {key: found[key].own for key in values} == values
    changed = {line.split(":")[0] for line in differences(resolved(spec), resolved(made))}
    assert all(any(line == key or line.startswith(f"{key}.") for key in values) for line in changed)


CLASHING = """\
  space:
    train.epochs: {low: 3, high: 50}
    train.freeze_backbone_epochs: {low: 0, high: 20}
    model.dropout: {low: 0, high: 0.5}
    model.head: {choices: [null, {hidden: [64]}]}
    augment.1.Affine.rotate.0: {low: -12, high: 20}
    optim.name: {choices: [adamw, sgd]}
"""


@settings(max_examples=100)
@given(st.data())
def test_values_that_do_not_go_together_are_a_spec_error_that_names_them_all(data: st.DataObject) -> None:
    spec = spec_of(CLASHING)
    values = drawn(data, parameters(spec))
    clash = (
        values["train.freeze_backbone_epochs"] >= values["train.epochs"]
        or values["train.epochs"] <= 5  # the warm-up
        or (values["model.head"] is not None and values["model.dropout"] > 0)
    )
    if not clash:
        assert with_parameters(spec, values, root=ROOT)
        return
    with pytest.raises(SpecError) as caught:
        with_parameters(spec, values, root=ROOT)
    assert all(f"{key}=" in fault.where for fault in caught.value.faults for key in values)


def test_the_catalogue_is_asked_of_values_together() -> None:
    spec = spec_of("  space: {model.weights: {choices: [none, pretrained]}}\n")
    with pytest.raises(SpecError) as caught:
        with_parameters(spec, {"model.arch": "cnn_3block", "model.weights": "pretrained"}, root=ROOT)
    assert str(caught.value) == (
        "model.arch=cnn_3block model.weights=pretrained: `cnn_3block` has no pretrained weights on the hub\n"
        "  fix: write `none`, or `run:<experiment>`\n"
        "1 error; nothing ran."
    )
    assert with_parameters(spec, {"model.arch": "resnet18", "model.weights": "pretrained"}, root=ROOT)


finite = st.one_of(
    st.builds(lambda choices: {"choices": choices}, st.lists(st.integers(0, 9), min_size=2, max_size=4, unique=True)),
    st.builds(
        lambda low, width, step: {"low": low, "high": low + width, **({"step": step} if step <= width else {})},
        st.integers(1, 5),
        st.integers(1, 5),
        st.integers(1, 3),
    ),
    st.builds(
        lambda low, width, step: {"low": low / 10, "high": (low + width) / 10, "step": step / 10},
        st.integers(0, 5),
        st.integers(3, 6),
        st.integers(1, 3),
    ),
)


def enumerated(space: tuple[Parameter, ...], values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if not space:
        yield values
        return
    head, *rest = space
    if not head.exists(values):
        yield from enumerated(tuple(rest), values)
        return
    numbers = itertools.count(head.low or 0, head.step or 1)
    every = head.choices or [head.value_of(number) for number, _ in zip(numbers, range(head.count or 0), strict=False)]
    for value in every:
        yield from enumerated(tuple(rest), {**values, head.key: value})


@settings(max_examples=100)
@given(st.data())
def test_the_size_is_the_number_of_distinct_sets(data: st.DataObject) -> None:
    options = {f"k{index}": data.draw(finite) for index in range(data.draw(st.integers(1, 4)))}
    known: list[str] = []
    for key, entry in options.items():
        conditional = data.draw(st.booleans())
        if known and conditional:
            other = data.draw(st.sampled_from(known))
            parent = options[other]
            held = parent.get("choices") or [parent["low"], parent["high"]]
            wanted: list[float] = data.draw(st.lists(st.sampled_from(held), max_size=2))
            entry["when"] = {f"model.options.{other}": wanted}
        known.append(key)
    tree = spec_of(SPACE).model_dump(mode="json")
    tree["model"]["options"] = {
        key: 1 if all(isinstance(entry.get(part, 0), int) for part in ("low", "high")) else 0.5
        for key, entry in options.items()
    }
    tree["tune"]["space"] = {f"model.options.{key}": entry for key, entry in options.items()}
    space = parameters(ExperimentSpec.model_validate_json(json.dumps(tree)))
    assume(all(parameter.count for parameter in space))
    sets = [json.dumps(values, sort_keys=True) for values in enumerated(space, {})]
    assert len(set(sets)) == len(sets)
    assert size(space) == len(sets)


def test_a_space_with_a_range_of_floats_is_endless_only_where_it_exists() -> None:
    endless = space_of("optim.lr: {low: 1e-4, high: 1e-2}")
    assert size(endless) is None
    assert size(()) == 1
    never = space_of("tta: {choices: [[identity], [hflip]]}", "optim.lr: {low: 1e-4, high: 1e-2, when: {tta: []}}")
    assert size(never) == 2


@settings(max_examples=100)
@given(st.integers(0, 40), st.integers(1, 90), st.integers(1, 40))
def test_optuna_takes_every_range_as_it_is(low: int, width: int, step: int) -> None:
    assume(step <= width)
    floats, ints = space_of(
        f"augment.1.Affine.p: {{low: {low / 100}, high: {(low + width) / 100}, step: {step / 100}}}",
        f"train.batch_size: {{low: {low}, high: {low + width}, step: {step}}}",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna warns where it must shorten a range
        number = optuna.distributions.FloatDistribution(floats.low, floats.high, step=floats.step)
        integer = optuna.distributions.IntDistribution(ints.low, ints.high, step=ints.step)
    assert (number.high, integer.high) == (floats.high, ints.high)
    assert floats.count == ints.count == (width // step) + 1


# A trial does less ----------------------------------------------------------------------------------------------------


def test_fewer_epochs_shrink_all_that_is_counted_in_epochs() -> None:
    tree = spec_of(SPACE).model_dump(mode="json")
    tree["mix"]["off_epochs"] = 10
    tree["train"] |= {"freeze_backbone_epochs": 4, "early_stop_patience": 20}
    tree["schedule"] |= {"patience": 12, "step_epochs": 3}
    spec = ExperimentSpec.model_validate_json(json.dumps(tree))
    trial = with_fidelity(spec, FidelitySpec(epochs=10, image_size=32, folds=(0, 1)))
    assert differences(resolved(spec), resolved(trial)) == [
        "model.image_size: 48 -> 32",
        "mix.off_epochs: 10 -> 2",
        "schedule.warmup_epochs: 5.0 -> 1.0",
        "schedule.patience: 12 -> 2",
        "schedule.step_epochs: 3 -> 1",
        "train.epochs: 50 -> 10",
        "train.early_stop_patience: 20 -> 4",
        "train.freeze_backbone_epochs: 4 -> 1",
    ]
    assert with_fidelity(spec, FidelitySpec()) == spec


@given(
    epochs=st.integers(1, 100),
    less=st.integers(1, 100),
    frozen=st.integers(0, 99),
    warm=st.floats(0, 1, exclude_max=True),
    off=st.integers(0, 200),
)
def test_a_trial_of_any_fidelity_is_a_valid_spec(epochs: int, less: int, frozen: int, warm: float, off: int) -> None:
    assume(frozen < epochs)
    assume(less <= epochs)
    tree = spec_of(SPACE).model_dump(mode="json")
    tree["train"] |= {"epochs": epochs, "freeze_backbone_epochs": frozen}
    tree["schedule"]["warmup_epochs"] = warm * epochs * 0.999
    tree["mix"]["off_epochs"] = off
    spec = ExperimentSpec.model_validate_json(json.dumps(tree))
    trial = with_fidelity(spec, FidelitySpec(epochs=less))
    assert ExperimentSpec.model_validate_json(trial.model_dump_json()) == trial
    assert (trial.mix.off_epochs == 0) == (off == 0)
    assert trial.schedule.warmup_epochs / less == pytest.approx(spec.schedule.warmup_epochs / epochs)


# Faults ---------------------------------------------------------------------------------------------------------------


def test_every_fault_of_a_space_is_told_at_once_and_at_its_place(project: Path) -> None:
    text = """\
  space:
    optim.learning_rate: {low: 1e-4, high: 1e-2}
    optim.lr: {low: 1e-2, high: 1e-1, log: true}
    model.arch: {choices: [cnn_3block, resnet81]}
    augment.1.Affine.p: {low: 0, high: 3}
"""
    assert message(project, text) == (
        "experiments/cnn.yaml:14:5: `optim.learning_rate` is no key of this experiment\n"
        "   14 |     optim.learning_rate: {low: 1e-4, high: 1e-2}\n"
        "      |     ^^^^^^^^^^^^^^^^^^^\n"
        "  fix: did you mean `optim.lr`?\n"
        "experiments/cnn.yaml:15:5: `optim.lr` is 0.001 in the spec, but here it goes from 0.01 to 0.1\n"
        "   15 |     optim.lr: {low: 1e-2, high: 1e-1, log: true}\n"
        "      |     ^^^^^^^^\n"
        "  fix: the spec's own values are the first trial: let the range hold it\n"
        "experiments/cnn.yaml:16:40: choice 2 of `model.arch`: unknown architecture 'resnet81'\n"
        "   16 |     model.arch: {choices: [cnn_3block, resnet81]}\n"
        "      |                                        ^^^^^^^^\n"
        "  fix: did you mean `resnet18`?\n"
        "experiments/cnn.yaml:17:40: `high` of `augment.1.Affine.p`: `Affine.p` must be a number from 0 to 1, but got "
        "the number 3.0\n"
        "   17 |     augment.1.Affine.p: {low: 0, high: 3}\n"
        "      |                                        ^\n"
        "4 errors; nothing ran."
    )


@pytest.mark.parametrize(
    ("entries", "what", "fix"),
    [
        (["lr: {low: 1, high: 2}"], "`lr` is no key of this experiment", "did you mean `optim.lr`?"),
        (["augment.7.Blur.p: {low: 0, high: 1}"], "`augment.7.Blur.p` is no key", "`augment` has the items 0 to 1"),
        (
            ["augment.0.HorizontalFlip.q: {low: 0, high: 1}"],
            "`augment.0.HorizontalFlip.q` is no key",
            "a key needs a value in the spec before it can be tuned; `augment.0.HorizontalFlip` holds: p",
        ),
        (["optim.lr.x: {low: 0, high: 1}"], "`optim.lr.x` is no key", "`optim.lr` is the number 0.001, which holds no"),
        (
            ["seeds: {choices: [[1], [42]]}"],
            "`seeds` cannot be tuned",
            "remove it; what can be: external, model, augment, ",
        ),
        (["tune.trials: {low: 1, high: 2}"], "`tune.trials` cannot be tuned", ""),
        (
            ["mix: {choices: [{}, {mixup_alpha: 0.2, prob: 0.5}]}", "mix.prob: {low: 0, high: 1}"],
            "`mix.prob` lies within `mix`, which is tuned as a whole",
            "keep one of the two",
        ),
        (
            ["augment.0.HorizontalFlip.p: {low: 0, high: 1}", "augment.00.HorizontalFlip.p: {low: 0, high: 1}"],
            "`augment.0.HorizontalFlip.p` and `augment.00.HorizontalFlip.p` are the same key",
            "keep one of the two",
        ),
        (["tta: {low: 0, high: 1}"], "a range needs a number, but `tta` is a list in the spec", "list `choices:"),
        (["train.compile: {low: 0, high: 1}"], "a range needs a number, but `train.compile` is false in the spec", ""),
        (["train.batch_size: {low: 0.5, high: 64}"], "takes integers alone, but got low=0.5", "write integers"),
        (["train.batch_size: {low: 16, high: 64, step: 0.5}"], "takes integers alone, but got step=0.5", ""),
        (["train.batch_size: {low: 0, high: 64}"], "`low` of `train.batch_size`: `train.batch_size` must be at l", ""),
        (
            ["train.batch_size: {low: 16, high: 100, step: 20}"],
            "`train.batch_size` is 32 in the spec, but here it goes from 16 to 96 by 20",
            "the spec's own values are the first trial: let the range hold it",
        ),
        (["tta: {choices: [[identity], [hflip]]}"], "`tta` is [identity, hflip] in the spec, which is none of", "list"),
        (["tta: {choices: [[identity, hflip], [spin]]}"], "choice 2 of `tta`: `tta`: unknown view 'spin'", ""),
        (["model.weights: {choices: [none, 'run:nix']}"], "choice 2 of `model.weights`: there is no experiment", ""),
        (
            ["optim.name: {choices: [adamw, adamx]}"],
            "choice 2 of `optim.name`: unknown optimizer 'adamx'",
            "did you mean `adam",
        ),
        (
            ["augment.0: {choices: [{HorizontalFlip: {p: 0.5}}, {RandomRain: {}}]}"],
            "choice 2 of `augment.0`: `RandomRain` needs colour images",
            "remove it",
        ),
        (
            ["mix: {choices: [{}, {mixup_alpha: 0.2, prob: 0.5}, {mixup_alpha: 0}]}"],
            "choice 3 of `mix` says the same as choice 1",
            "remove one of the two",
        ),
        (
            ["optim.clip_grad_norm: {low: 1, high: 5}"],
            "`optim.clip_grad_norm` is null in the spec, which no range holds",
            "give the spec a number, or list `choices: [null, ...]`",
        ),
        (["optim.lr: {low: 1e-4, high: 1e-2, when: {mixx: [1]}}"], "names `mixx`, which is no key of the space", ""),
        (
            [
                "optim.lr: {low: 1e-4, high: 1e-2}",
                "tta: {choices: [[identity, hflip], [hflip]], when: {optim.lr: [1]}}",
            ],
            "`when` of `tta` waits for single values of `optim.lr`, which takes any number",
            "name a key with choices, integers or a `step`",
        ),
        (
            [
                "train.batch_size: {low: 16, high: 64, step: 16, when: {tta: [[hflip]]}}",
                "tta: {choices: [[identity, hflip], [identity]]}",
            ],
            "`when` of `train.batch_size` waits for `tta` to be ['hflip'], which it never is",
            "its choices: [identity, hflip], [identity]",
        ),
        (
            ["train.batch_size: {low: 16, high: 64, when: {tta: []}}", "tta: {choices: [[identity, hflip], [hflip]]}"],
            "`when` of `train.batch_size` names no value of `tta`",
            "its choices: ",
        ),
        (
            [
                "train.batch_size: {low: 16, high: 64, when: {train.accumulate: [1]}}",
                "train.accumulate: {low: 1, high: 2, when: {train.batch_size: [32]}}",
            ],
            "`when` of `train.batch_size` names `train.accumulate`, which itself waits for `train.batch_size`",
            "remove one of the conditions",
        ),
        (["optim.lr: {low: 2, high: 1}"], "`tune.space.optim.lr`: `low < high` must hold, but got (low=2, high=1)", ""),
        (["optim.lr: {low: 0, high: 1, log: true}"], "`log` needs `low` > 0, but got low=0", ""),
        (["optim.lr: {low: 1e-4, high: 1, log: true, step: 0.1}"], "`log` takes no `step`, but got step=0.1", ""),
        (["optim.lr: {low: 0, high: 1, step: 2}"], "`0 < step <= high - low` must hold, but got step=2", ""),
        (["tta: {choices: [[identity, hflip]]}"], "`tune.space.tta.choices` must hold at least 2 items, but got 1", ""),
        (["optim.name: {choices: [adamw, adamw]}"], "expected distinct choices, but got ['adamw', 'adamw']", ""),
        (["optim.name: {choises: [adamw, sgd]}"], "unknown key `tune.space.optim.name.choises`", "did you mean `choic"),
        (["optim.name: [adamw, sgd]"], "`tune.space.optim.name` must be a mapping, but got a list", ""),
    ],
)
def test_what_a_space_may_not_say(project: Path, entries: list[str], what: str, fix: str) -> None:
    text = message(project, "  space:\n" + "".join(f"    {entry}\n" for entry in entries))
    assert what in text
    assert fix in text


@pytest.mark.parametrize(
    ("tune", "what"),
    [
        ("  sampler: grid\n", "`grid` needs a finite space, but any number is taken at `optim.lr`, `schedule.warmup"),
        ("  sampler: grid\n", "`grid` knows no conditions, but there is `when` at `model.options.depth`, `tta`"),
        ("  sampler: gp\n", "`gp` knows no conditions"),
        ("  sampler: cmaes\n", "`cmaes` searches numbers alone, but there are choices at `model.arch`, "),
        ("  fidelity: {epochs: 50}\n", "`tune.fidelity.epochs` < `train.epochs` must hold, but got (50, 50)"),
        (
            "  fidelity: {image_size: 64}\n",
            "`tune.fidelity.image_size` < `model.image_size` must hold, but got (64, 48)",
        ),
        ("  fidelity: {folds: [1, 1]}\n", "expected distinct folds, but got [1, 1]"),
        ("  fidelity: {folds: [-1]}\n", "`tune.fidelity.folds.0` must be at least 0, but got -1"),
        ("  finalists: -1\n", "`tune.finalists` must be at least 0, but got -1"),
        ("  prune: {error_rate: 0}\n", "`tune.prune.error_rate` must be more than 0, but got 0"),
    ],
)
def test_what_goes_with_a_space(project: Path, tune: str, what: str) -> None:
    assert what in message(project, tune + SPACE)


def test_a_large_grid_and_a_tuned_fidelity_are_refused(project: Path) -> None:
    big = "  sampler: grid\n  space: {train.epochs: {low: 11, high: 2000}, train.batch_size: {low: 1, high: 100}}\n"
    assert "`grid` takes up to 100000 parameter sets, but the space holds 199000" in message(project, big)
    tuned = "  fidelity: {epochs: 9}\n  space: {train.epochs: {low: 11, high: 60}}\n"
    assert "`tune.fidelity.epochs` is the same for every trial, but the space tunes `train.epochs`" in message(
        project, tuned
    )


def test_only_folds_that_can_be_there_are_searched(project: Path) -> None:
    described = project / "inputs" / "faces" / "competition.yaml"
    kept = described.read_text()
    folds = "  fidelity: {folds: [0, 1]}\n" + SPACE
    load(project, folds)
    described.write_text(kept + "split: {kind: holdout}\n")
    assert "`tune.fidelity.folds` can only be [0] with `split.kind: holdout`, but got [0, 1]" in message(project, folds)
    load(project, folds.replace("[0, 1]", "[0]"))
    described.write_text(kept + "split: {kind: full}\n")
    assert "`faces` has `split.kind: full`: nothing is scored, so nothing can be chosen" in message(project, SPACE)


def test_a_condition_that_does_not_hold_spares_the_specs_own_value(project: Path) -> None:
    entry = "    optim.clip_grad_norm: {low: 1, high: 5, when: {optim.name: [%s]}}\n"
    text = "  space:\n    optim.name: {choices: [adamw, sgd]}\n"
    spec = load(project, text + entry % "sgd")
    assert own_values(spec) == {"optim.name": "adamw"}
    assert [parameter.kind for parameter in parameters(spec)] == ["choice", "float"]
    assert "`optim.clip_grad_norm` is null in the spec" in message(project, text + entry % "adamw")


def test_a_conditional_value_is_tried_where_it_exists(project: Path) -> None:
    # a head takes no `dropout`, so that without its condition the choice would be refused
    text = """\
  space:
    model.dropout: {choices: [0.2, 0.0]}
    model.head: {choices: [null, {hidden: [64]}], when: {model.dropout: [0.0]}}
"""
    load(project, text)
    assert "choice 2 of `model.head`: `model`: `dropout` belongs to" in message(
        project, text.replace("[0.0]}}", "[0.2]}}")
    )


def test_faults_of_the_spec_itself_are_not_told_again(project: Path) -> None:
    path = project / "experiments" / "cnn.yaml"
    path.write_text((SPEC + SPACE).replace("{p: 0.5}", "{q: 0.5}"))
    with pytest.raises(SpecError) as caught:
        load_experiment(path, root=project)
    assert [fault.what for fault in caught.value.faults] == ["`HorizontalFlip` has no parameter `q`"]


def test_the_example_of_the_docs_is_a_valid_space(project: Path) -> None:
    section = (ROOT / "docs" / "EXPERIMENTS.md").read_text().split("### tune\n")[1]
    example = section.split("```yaml\n")[1].split("```")[0]
    path = project / "experiments" / "cnn.yaml"
    path.write_text(f"name: cnn\ncompetition: faces\n{example}")
    spec = load_experiment(path, root=project)
    assert spec.tune is not None
    found = {parameter.key: parameter for parameter in parameters(spec)}
    assert len(found) == len(spec.tune.space) == 9
    assert found["model.options.depth"].when == {"model.arch": ("vit_small_patch8_48",)}
    assert with_parameters(spec, own_values(spec), root=ROOT) == spec


# Overrides ------------------------------------------------------------------------------------------------------------


def test_an_override_of_the_search_alone_leaves_the_name(project: Path) -> None:
    overrides = ("tune.trials=5", "tune.space.optim.lr.high=1e-1", "tune.space.tta.when.mix=[{}]")
    spec = load(project, SPACE, *overrides)
    assert spec.name == "cnn"
    assert spec.tune is not None
    assert spec.tune.trials == 5
    assert spec.tune.space["optim.lr"].high == 0.1  # type: ignore[union-attr]
    path = project / "experiments" / "cnn.yaml"
    assert load_experiment(path, overrides=overrides, name="cnn", root=project).name == "cnn"
    both = load(project, SPACE, "tune.trials=5", "optim.lr=2e-3")
    assert both.name == load(project, SPACE, "optim.lr=2e-3").name != "cnn"


@pytest.mark.parametrize(
    "overrides",
    [
        ["tune.space.optim.weight_decay={low: 0, high: 1}"],
        ["tune.space.optim.weight_decay.low=0", "tune.space.optim.weight_decay.high=1"],
        ["tune.space={optim.weight_decay: {low: 0, high: 1}}"],
    ],
)
def test_an_override_adds_a_key_to_the_space(project: Path, overrides: list[str]) -> None:
    found = {parameter.key: parameter for parameter in parameters(load(project, SPACE, *overrides))}
    assert found["optim.weight_decay"] == Parameter("optim.weight_decay", "float", 0.0, 1.0, False, None, (), 0.05, {})


def test_an_overridden_space_is_checked_and_its_faults_name_the_override(project: Path) -> None:
    lines = message(project, SPACE, "tune.space.optim.lr.low=0.5", "tune.space.tta.when.mix=[{prob: 2}]").splitlines()
    assert [line for line in lines if line.startswith("--")] == [
        "--set tune.space.tta.when.mix=[{prob: 2}]: `when` of `tta` waits for `mix` to be {'prob': 2}, "
        "which it never is",
    ]
    assert "`tune.space.optim.lr`: `low < high` must hold, but got (low=0.5, high=0.01)" in "\n".join(lines)


def test_a_single_run_may_leave_the_space_and_a_search_may_not(project: Path) -> None:
    assert load(project, SPACE, "optim.lr=1").optim.lr == 1
    assert "`optim.lr` is 1.0 in the spec" in message(project, SPACE, "optim.lr=1", tuning=True)
    assert load(project, SPACE, "optim.lr=2e-3", tuning=True).optim.lr == 2e-3


def test_a_space_is_checked_without_the_libraries_that_search_it(project: Path) -> None:
    load(project, SPACE)
    code = (
        "import sys; from pathlib import Path; from foldwise.spec.load import check_all\n"
        "results = check_all(Path())\n"
        "assert results and not any(error for _, error in results), results\n"
        "heavy = {'torch', 'numpy', 'optuna', 'albumentations', 'timm'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
