"""Training resumes to the same bits, follows its schedule, and does what each option of `optim` and `train` says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from foldwise.errors import DivergedError
from foldwise.learn.augment import Augment, Batch, Batches, sampling_weights
from foldwise.learn.device import Runtime
from foldwise.learn.fit import Fitted, Row, _make_optimizer, fit, lr_multiplier
from foldwise.learn.models import ToInput, build_model, head_parameters
from foldwise.learn.objectives import Loss, Supervised
from foldwise.spec.model import LossSpec, MixSpec, ModelSpec, OptimSpec, ScheduleSpec, TrainSpec

CPU = Runtime(torch.device("cpu"), "fp32", 1)
CLASSES = 3


class Tiny(nn.Module):
    """A convolution, a norm and a head with dropout inside; plain, it has neither norm nor dropout."""

    def __init__(self, seed: int = 0, *, plain: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.norm = nn.Identity() if plain else nn.BatchNorm2d(6)
        self.head = nn.Sequential(nn.Dropout(0.0 if plain else 0.3), nn.Linear(6, CLASSES))

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.conv(images)).relu().mean((2, 3)))
        return logits


def figure(model: nn.Module) -> float:
    """A number that goes up and down from epoch to epoch, and depends on the weights alone."""
    return float(sum(tensor.double().sum() for tensor in model.state_dict().values()) * 1_000 % 1)


def train_it(
    folder: Path,
    model: nn.Module | None = None,
    *,
    count: int = 26,
    batch_size: int = 8,
    optim: dict[str, Any] | None = None,
    schedule: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    mixing: MixSpec | None = None,
    sampler: str = "none",
    key: tuple[int, int] = (7, 1),
    runtime: Runtime = CPU,
    objective: Callable[..., Loss] | None = None,
    augment: Sequence[dict[str, dict[str, Any]]] = ({"HorizontalFlip": {"p": 0.5}},),
    **options: Any,
) -> Fitted:
    rng = np.random.default_rng(1)
    labels = np.arange(count) % CLASSES
    images = (
        rng.integers(0, 120, (count, 8, 8, 1), dtype=np.uint8) + (labels * 60).astype(np.uint8)[:, None, None, None]
    )
    mixing = mixing or MixSpec()
    supervised = Supervised(
        labels,
        CLASSES,
        loss=LossSpec(label_smoothing=0.1),
        mixing=mixing,
        prepare=ToInput(8, "bilinear", [0.5], [0.25]).to(runtime.device),
        runtime=runtime,
        class_weights=None,
    )
    rows = np.arange(count)
    batches = Batches(
        images,
        rows,
        Augment(augment, (8, 8, 1)),
        batch_size=batch_size,
        key=key,
        weights=sampling_weights(sampler, labels, CLASSES),
    )
    return fit(
        Tiny() if model is None else model,
        objective or supervised,
        batches,
        optim=OptimSpec(**({"lr": 0.02} | (optim or {}))),
        schedule=ScheduleSpec(**({"name": "cosine"} | (schedule or {}))),
        train=TrainSpec(**({"epochs": 4, "batch_size": batch_size, "precision": "fp32"} | (train or {}))),
        key=key,
        runtime=runtime,
        checkpoint=folder / "checkpoint.pt",
        unmixed_epochs=mixing.off_epochs,
        **options,
    )


def watching(row: Row) -> float:
    return row["inner_accuracy"]


def scripted(values: Sequence[float]) -> dict[str, Any]:
    """Options of `fit` that watch a figure with these values, epoch by epoch."""
    left = iter(values)
    return {"evaluate": lambda _model: {"inner_accuracy": next(left)}, "watched": watching}


def weights_of(path: Path, part: str = "model") -> dict[str, torch.Tensor]:
    content = torch.load(path / "checkpoint.pt", weights_only=True)
    weights: dict[str, torch.Tensor] = content[part]
    return weights


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_clock(history: Sequence[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in history]


# --- Resuming ---

WATCHED = {"evaluate": lambda model: {"inner_accuracy": figure(model)}, "watched": watching}
RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optim": {"name": "sgd", "momentum": 0.9}, "schedule": {"name": "one_cycle"}},
    "muon": {"optim": {"name": "nmuon", "momentum": 0.95}, "schedule": {"name": "one_cycle"}},
    "ema": {"train": {"ema_decay": 0.9}},
    "mixup": {"mixing": MixSpec(mixup_alpha=0.4, cutmix_alpha=1.0, off_epochs=1)},
    "accumulate": {"train": {"accumulate": 3}, "optim": {"clip_grad_norm": 0.1}},
    "plateau": {"schedule": {"name": "plateau", "patience": 0, "factor": 0.3}, **WATCHED},
    "keep best": {"train": {"keep": "best"}, **WATCHED},
    "sampler": {"sampler": "sqrt"},
    "early stop": {"train": {"epochs": 9, "early_stop_patience": 2}, **WATCHED},
    "freeze": {"train": {"freeze_backbone_epochs": 2}, "optim": {"backbone_lr_scale": 0.5}},
    "bf16": {"runtime": Runtime(torch.device("cpu"), "bf16", 1)},
    "everything": {
        "optim": {"name": "nadamw", "clip_grad_norm": 0.5, "backbone_lr_scale": 0.3},
        "schedule": {"name": "plateau", "patience": 0, "factor": 0.5, "warmup_epochs": 1.5},
        "train": {
            "epochs": 6, "accumulate": 2, "ema_decay": 0.95, "keep": "best", "early_stop_patience": 4,
            "freeze_backbone_epochs": 1,
        },
        "mixing": MixSpec(mixup_alpha=0.4, cutmix_alpha=1.0, prob=0.7, off_epochs=1),
        "sampler": "balanced",
        **WATCHED,
    },
}  # fmt: skip


class KillError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_unit_goes_on_to_the_same_bits(recipe: str, tmp_path: Path) -> None:
    options = RECIPES[recipe]
    whole = train_it(tmp_path / "whole", **options)

    def kill(after: int) -> Callable[[Row], None]:
        def on_epoch(row: Row) -> None:
            if row["epoch"] == after:
                raise KillError

        return on_epoch

    for after in (1, 3):
        with pytest.raises(KillError):
            train_it(tmp_path / "killed", on_epoch=kill(after), **options)
    started: list[int] = []
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - what another process would have done
    # the weights that a fresh process begins with must not matter either
    resumed = train_it(tmp_path / "killed", Tiny(seed=5), on_start=started.append, **options)
    assert started == [3]
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert without_clock(resumed.history) == without_clock(whole.history)
    assert (resumed.best_epoch, resumed.stopped_early) == (whole.best_epoch, whole.stopped_early)
    for part in ("model", "ema"):
        if weights_of(tmp_path / "whole", part) is not None:
            assert same(weights_of(tmp_path / "killed", part), weights_of(tmp_path / "whole", part))


def test_a_unit_killed_within_an_epoch_repeats_that_epoch(tmp_path: Path) -> None:
    def on_step(epoch: int, _step: int, _steps: int) -> None:
        if epoch == 3:
            raise KillError

    whole = train_it(tmp_path / "whole")
    with pytest.raises(KillError):
        train_it(tmp_path / "killed", on_step=on_step)
    resumed = train_it(tmp_path / "killed", Tiny(seed=5))
    assert same(resumed.model.state_dict(), whole.model.state_dict())


def test_a_finished_unit_is_not_trained_again(tmp_path: Path) -> None:
    first = train_it(tmp_path)
    again = train_it(tmp_path, Tiny(seed=5), objective=lambda *_args, **_options: pytest.fail("trained"))
    assert same(first.model.state_dict(), again.model.state_dict())
    assert again.history == first.history
    assert again.wall_s == first.wall_s > 0


def test_seed_and_fold_make_another_run(tmp_path: Path) -> None:
    runs = [train_it(tmp_path / str(key), key=key, train={"epochs": 1}) for key in ((7, 1), (7, 2), (8, 1))]
    assert len({figure(run.model) for run in runs}) == 3


def test_a_checkpoint_unpickles_nothing_and_remembers_the_threads(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    train_it(tmp_path, train={"epochs": 1, "ema_decay": 0.9, "keep": "best"}, **WATCHED)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert content["threads"] == 2
    torch.set_num_threads(1)
    train_it(tmp_path, train={"epochs": 2, "ema_decay": 0.9, "keep": "best"}, **WATCHED)
    assert torch.get_num_threads() == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


# --- What comes out ---


def test_rows_and_news_tell_of_every_epoch(tmp_path: Path) -> None:
    rows: list[Row] = []
    news: list[tuple[int, int, int]] = []
    fitted = train_it(
        tmp_path,
        train={"epochs": 3},
        evaluate=lambda model: {"val_loss": figure(model)},
        on_epoch=rows.append,
        on_step=lambda *told: news.append(told),
    )
    assert fitted.history == rows
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert list(row) == ["epoch", "lr", "train_loss", "train_accuracy", "val_loss", "images_per_s"]
        assert 0 <= row["train_accuracy"] <= 1
        assert row["images_per_s"] > 0
    assert {epoch for epoch, _, _ in news} == {1, 2, 3}
    assert all(1 <= step <= steps == 4 for _, step, steps in news)
    assert not fitted.model.training
    assert (fitted.best_epoch, fitted.stopped_early) == (3, False)


def test_it_learns(tmp_path: Path) -> None:
    fitted = train_it(tmp_path, Tiny(plain=True), optim={"lr": 0.1}, train={"epochs": 8}, augment=())
    assert fitted.history[-1]["train_loss"] < 0.7 * fitted.history[0]["train_loss"]
    assert fitted.history[-1]["train_accuracy"] > 0.8


def test_the_reported_loss_is_the_mean_over_images(tmp_path: Path) -> None:
    def by_row(_model: nn.Module, batch: Batch, *, mixed: bool) -> Loss:
        anchor = _model.head[1].bias.sum() * 0
        return Loss(batch.rows.float().mean() + anchor, (batch.rows > 20).sum())

    (row,) = train_it(tmp_path, objective=by_row, train={"epochs": 1}).history
    assert row["train_loss"] == pytest.approx(12.5)
    assert row["train_accuracy"] == pytest.approx(5 / 26)


def test_the_last_epochs_are_unmixed(tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []

    def recorder(model: nn.Module, batch: Batch, *, mixed: bool) -> Loss:
        seen.append((batch.key[2], mixed))
        return Loss(model.head[1].bias.square().sum(), torch.tensor(0))

    train_it(tmp_path, objective=recorder, mixing=MixSpec(mixup_alpha=1.0, off_epochs=2))
    assert set(seen) == {(0, True), (1, True), (2, False), (3, False)}


# --- Optimizer ---


def rates(model: nn.Module, **optim: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Rate and weight decay of each parameter, by name."""
    optimizer = _make_optimizer(model, OptimSpec(**({"lr": 1.0} | optim)), head_parameters(model))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = [(names[id(parameter)], group) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(pairs) == len(names) == len({name for name, _ in pairs})
    return {name: group["lr"] for name, group in pairs}, {name: group["weight_decay"] for name, group in pairs}


@pytest.mark.parametrize("arch", ["cnn_3block", "vit_small_patch8_48", "test_convnext"])
@pytest.mark.parametrize("extra", [{}, {"layer_decay": 0.5}, {"backbone_lr_scale": 0.1}])
def test_biases_norms_and_position_embeddings_do_not_decay(arch: str, extra: dict[str, float]) -> None:
    model = build_model(ModelSpec(arch=arch), classes=3, channels=1)
    _, decays = rates(model, weight_decay=0.05, **extra)
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    for name, decay in decays.items():
        spared = shapes[name] <= 1 or name.endswith("pos_embed")
        assert decay == (0 if spared else 0.05), name
    assert set(decays.values()) == {0, 0.05}


@pytest.mark.parametrize("arch", ["cnn_3block", "test_resnet"])
def test_the_backbone_has_its_own_rate(arch: str) -> None:
    model = build_model(ModelSpec(arch=arch), classes=3, channels=1)
    lrs, _ = rates(model, lr=0.2, backbone_lr_scale=0.1)
    head = head_parameters(model)
    assert {name for name, lr in lrs.items() if lr == 0.2} == head
    assert [lr for name, lr in lrs.items() if name not in head] == pytest.approx([0.02] * (len(lrs) - len(head)))


@pytest.mark.parametrize(
    ("arch", "depths"),
    [
        ("cnn_3block", {"blocks.0.0.weight": 3, "blocks.1.0.weight": 2, "blocks.2.1.bias": 1, "head.3.weight": 0}),
        (
            "vit_small_patch8_48",
            {"patch_embed.layers.0.weight": 9, "pos_embed": 9, "blocks.0.norm1.weight": 8, "blocks.7.mlp.fc1.weight": 1}
            | {"head.weight": 0, "head.bias": 0},
        ),
    ],
)
def test_layer_decay_lowers_the_rate_layer_by_layer(arch: str, depths: dict[str, int]) -> None:
    lrs, _ = rates(build_model(ModelSpec(arch=arch), classes=3, channels=1), lr=0.2, layer_decay=0.5)
    assert {name: lrs[name] for name in depths} == pytest.approx({name: 0.2 * 0.5**n for name, n in depths.items()})


def test_every_rate_follows_the_schedule(tmp_path: Path) -> None:
    seen: list[list[float]] = []
    for epochs in (1, 2, 3):
        train_it(
            tmp_path,
            train={"epochs": epochs},
            optim={"lr": 0.5, "backbone_lr_scale": 0.1},
            schedule={"name": "step", "step_epochs": 1},
        )
        groups = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"]
        seen.append(sorted({group["lr"] for group in groups}))
    assert seen == [pytest.approx([0.05 * 0.1**n, 0.5 * 0.1**n]) for n in range(3)]


@pytest.mark.parametrize(
    "name", ["adamw", "adam", "sgd", "momentum", "lamb", "adan", "lion", "muon", "adamp", "rmsprop"]
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_optimizers_can_be_had_by_name(name: str, momentum: float, tmp_path: Path) -> None:
    before = Tiny().state_dict()
    fitted = train_it(tmp_path, optim={"name": name, "lr": 1e-3, "momentum": momentum}, train={"epochs": 1})
    assert not torch.equal(before["conv.weight"], fitted.model.state_dict()["conv.weight"])
    assert all(tensor.isfinite().all() for tensor in fitted.model.state_dict().values())


@pytest.mark.parametrize("count", [32, 24])
def test_accumulating_is_a_larger_batch(count: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"count": count, "optim": {"name": "sgd", "lr": 0.1}}
    small = train_it(tmp_path / "a", Tiny(plain=True), batch_size=8, train={"accumulate": 2}, **options)
    large = train_it(tmp_path / "b", Tiny(plain=True), batch_size=16, **options)
    torch.testing.assert_close(small.model.state_dict(), large.model.state_dict(), atol=1e-6, rtol=1e-5)
    assert not same(large.model.state_dict(), Tiny(plain=True).state_dict())
    assert [row["lr"] for row in small.history] == [row["lr"] for row in large.history]


def test_gradients_are_clipped_to_their_norm(tmp_path: Path) -> None:
    def moved(folder: str, **optim: Any) -> float:
        plain_sgd = {"name": "momentum", "lr": 1.0, "weight_decay": 0.0, "momentum": 0.0}
        options: dict[str, Any] = {"count": 8, "train": {"epochs": 1}, "schedule": {"name": "constant"}}
        state = train_it(tmp_path / folder, Tiny(plain=True), optim=plain_sgd | optim, **options).model.state_dict()
        start = Tiny(plain=True).state_dict()
        return math.sqrt(sum(float((state[name] - start[name]).square().sum()) for name in start))

    free = moved("free")
    assert free > 0.1
    assert moved("clipped", clip_grad_norm=0.01) == pytest.approx(0.01, rel=1e-3)
    assert moved("loose", clip_grad_norm=1e3) == pytest.approx(free)


# --- Freezing, averaging, keeping, stopping ---


def test_freezing_keeps_the_backbone_and_its_statistics_for_as_long_as_asked(tmp_path: Path) -> None:
    model = Tiny()
    states = [deepcopy(model.state_dict())]
    modes: set[tuple[bool, bool]] = set()
    model.norm.register_forward_hook(
        lambda _module, _inputs, _output: modes.add((model.norm.training, model.head[0].training))
    )

    def on_epoch(row: Row) -> None:
        states.append(deepcopy(model.state_dict()))
        expected = {(False, True)} if row["epoch"] <= 2 else {(True, True)}
        assert modes == expected, "the head's dropout works while the backbone's norms rest"
        modes.clear()

    train_it(tmp_path, model, train={"freeze_backbone_epochs": 2}, on_epoch=on_epoch)
    head = head_parameters(model)
    for name in states[0]:
        frozen_alike = torch.equal(states[0][name], states[2][name])
        assert frozen_alike == (name not in head), name
        assert not torch.equal(states[2][name], states[3][name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_frozen_timm_backbone_rests_too(tmp_path: Path) -> None:
    model = build_model(ModelSpec(arch="test_resnet", image_size=16, dropout=0.2), classes=CLASSES, channels=1)
    before = deepcopy(model.state_dict())
    moved: list[set[str]] = []

    def on_epoch(_row: Row) -> None:
        moved.append({name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])})

    train_it(tmp_path, model, train={"epochs": 2, "freeze_backbone_epochs": 1}, on_epoch=on_epoch)
    assert moved[0] == head_parameters(model)
    assert any("running_mean" in name for name in moved[1])


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_is_of_weights_and_statistics_and_is_what_is_scored(decay: float, tmp_path: Path) -> None:
    raw = [deepcopy(Tiny().state_dict())]
    scored: list[dict[str, torch.Tensor]] = []

    def evaluate(model: nn.Module) -> Row:
        scored.append(deepcopy(model.state_dict()))
        return {}

    fitted = train_it(
        tmp_path,
        count=8,
        train={"epochs": 6, "ema_decay": decay},
        evaluate=evaluate,
        on_epoch=lambda _row: raw.append(weights_of(tmp_path)),
    )
    average = {name: tensor.double() for name, tensor in raw[0].items()}
    for step, state in enumerate(raw[1:]):
        # timm's warm-up: 1 - (1 + step) ** (-2 / 3), after two steps that just copy
        ratio = 0.0 if step < 2 else min(decay, 1 - (1 + step - 1) ** (-2 / 3))
        for name in average:
            average[name] = ratio * average[name] + (1 - ratio) * state[name].double()
        for name in ("conv.weight", "norm.running_mean", "norm.running_var", "head.1.bias"):
            torch.testing.assert_close(scored[step][name], average[name].float(), atol=1e-6, rtol=1e-4)
    assert same(fitted.model.state_dict(), scored[-1])
    assert not torch.equal(scored[-1]["norm.running_var"], raw[-1]["norm.running_var"])


@pytest.mark.parametrize(
    ("ema_decay", "values", "best"), [(None, [0.1, 0.5, 0.3, 0.5], 2), (0.5, [0.1, 0.2, 0.3, 0.2], 3)]
)
def test_the_best_epochs_weights_are_kept(
    ema_decay: float | None, values: list[float], best: int, tmp_path: Path
) -> None:
    part = "model" if ema_decay is None else "ema"
    states: list[dict[str, torch.Tensor]] = []
    fitted = train_it(
        tmp_path,
        train={"keep": "best", "ema_decay": ema_decay},
        on_epoch=lambda _row: states.append(weights_of(tmp_path, part)),
        **scripted(values),
    )
    assert fitted.best_epoch == best
    assert len(fitted.history) == 4
    assert [same(fitted.model.state_dict(), state) for state in states] == [n == best for n in range(1, 5)]


def test_the_last_epochs_weights_are_kept_otherwise(tmp_path: Path) -> None:
    fitted = train_it(tmp_path, train={"early_stop_patience": 9}, **scripted([0.9, 0.1, 0.1, 0.1]))
    assert fitted.best_epoch == 4
    assert same(fitted.model.state_dict(), weights_of(tmp_path))


@pytest.mark.parametrize(
    ("values", "patience", "epochs"),
    [
        ([0.1, 0.5, 0.4, 0.5, 0.9, 0.9], 2, 4),
        ([0.1, 0.5, 0.4, 0.6, 0.5, 0.5], 2, 6),
        ([0.5, 0.4, 0.9, 0.9, 0.9, 0.9], 1, 2),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 1, 6),
    ],
)
def test_early_stopping_waits_as_long_as_asked(values: list[float], patience: int, epochs: int, tmp_path: Path) -> None:
    fitted = train_it(tmp_path, train={"epochs": 6, "early_stop_patience": patience}, **scripted(values))
    assert len(fitted.history) == epochs
    since_best = epochs - 1 - int(np.argmax(values[:epochs]))
    assert fitted.stopped_early == (since_best >= patience)


def test_plateau_lowers_the_rate_that_is_trained_with(tmp_path: Path) -> None:
    values = [0.1, 0.1, 0.1, 0.5, 0.4, 0.3]
    fitted = train_it(
        tmp_path,
        train={"epochs": 6},
        optim={"lr": 0.01},
        schedule={"name": "plateau", "patience": 1, "factor": 0.1},
        **scripted(values),
    )
    assert [row["lr"] for row in fitted.history] == pytest.approx([1e-2, 1e-2, 1e-2, 1e-3, 1e-3, 1e-3])


# --- Divergence, precision, compilation ---


@pytest.mark.parametrize(
    ("bad", "count", "at", "window"),
    [
        (math.nan, 26, 2, "the loss became nan between steps 1 and 4"),
        (math.inf, 480, 55, "the loss became inf between steps 51 and 60"),
        (-math.inf, 480, 12, "the loss became -inf between steps 1 and 50"),
        (1e6, 26, 1, "the loss became 3.08e+05 between steps 1 and 4"),
    ],
)
def test_divergence_names_the_steps(bad: float, count: int, at: int, window: str, tmp_path: Path) -> None:
    def diverging(model: nn.Module, batch: Batch, *, mixed: bool) -> Loss:
        loss = model.head[1].bias.square().sum()
        if batch.key[2:] == (1, at):
            loss = loss * 0 + bad
        return Loss(loss, torch.tensor(0))

    with pytest.raises(DivergedError) as caught:
        train_it(tmp_path, count=count, objective=diverging, augment=())
    assert str(caught.value) == (
        f"{window} of epoch 2 (fold 1, seed 7)\n"
        "  fix: a smaller `optim.lr`, `schedule.warmup_epochs: 1`, `optim.clip_grad_norm: 1.0`, "
        "or `train.precision: fp32`"
    )
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"]) == 1


def test_bf16_trains_float32_weights(tmp_path: Path) -> None:
    fitted = train_it(tmp_path, runtime=Runtime(torch.device("cpu"), "bf16", 1), train={"epochs": 5}, augment=())
    assert fitted.history[-1]["train_loss"] < fitted.history[0]["train_loss"]
    assert {tensor.dtype for tensor in fitted.model.state_dict().values()} == {torch.float32, torch.int64}


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_gpu_trains_and_resumes_in_every_precision(precision: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"runtime": Runtime(torch.device("cuda"), precision, 1)} | {"train": {"ema_decay": 0.9}}
    torch.use_deterministic_algorithms(mode=False)

    def on_epoch(row: Row) -> None:
        if row["epoch"] == 2:
            raise KillError

    whole = train_it(tmp_path / "whole", **options)
    with pytest.raises(KillError):
        train_it(tmp_path / "killed", on_epoch=on_epoch, **options)
    resumed = train_it(tmp_path / "killed", Tiny(seed=5), **options)
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict())
    assert all(tensor.isfinite().all() for tensor in resumed.model.state_dict().values())


def compiles() -> bool:
    """Whether torch finds a compiler that works."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(4))
    except Exception:  # whatever a missing or broken tool chain raises
        return False
    return True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiling_trains_the_same_model(tmp_path: Path) -> None:
    if not compiles():
        pytest.skip("torch.compile finds no working compiler")
    options: dict[str, Any] = {"train": {"epochs": 2, "ema_decay": 0.9}, "count": 24, "optim": {"name": "sgd"}}
    plain = train_it(tmp_path / "plain", Tiny(plain=True), **options)
    options["train"] = options["train"] | {"compile": True}
    compiled = train_it(tmp_path / "compiled", Tiny(plain=True), **options)
    torch.testing.assert_close(compiled.model.state_dict(), plain.model.state_dict(), atol=1e-5, rtol=1e-3)
    assert weights_of(tmp_path / "compiled").keys() == Tiny(plain=True).state_dict().keys()


# --- Schedules ---

schedules = st.builds(
    ScheduleSpec,
    name=st.sampled_from(["constant", "cosine", "plateau", "step", "one_cycle"]),
    warmup_epochs=st.sampled_from([0.0, 0.5, 1.0, 2.7]),
    min_lr_ratio=st.sampled_from([0.0, 0.01, 0.3]),
    factor=st.sampled_from([0.1, 0.5, 0.9]),
    patience=st.integers(0, 4),
    step_epochs=st.integers(1, 9),
    warm_share=st.floats(0.01, 0.99),
)
figures = st.lists(st.integers(0, 6).map(lambda n: n / 10), max_size=30)


def course(spec: ScheduleSpec, steps: int, epochs: int) -> list[float]:
    return [lr_multiplier(spec, step, steps, epochs) for step in range(steps * epochs)]


@given(schedules, st.integers(1, 9), st.integers(3, 12), st.data(), figures)
def test_a_multiplier_is_a_share_and_a_pure_function(
    spec: ScheduleSpec, steps: int, epochs: int, data: st.DataObject, watched: list[float]
) -> None:
    step = data.draw(st.integers(0, steps * epochs - 1))
    kept = list(watched)
    value = lr_multiplier(spec, step, steps, epochs, watched)
    assert 0 < value <= 1
    lr_multiplier(spec, steps, steps, epochs, [0.5])
    assert lr_multiplier(spec, step, steps, epochs, watched) == value
    assert watched == kept
    if spec.name != "plateau":
        assert lr_multiplier(spec, step, steps, epochs) == value


@given(schedules, st.integers(1, 9), st.integers(3, 12))
def test_warm_up_rises_to_the_top(spec: ScheduleSpec, steps: int, epochs: int) -> None:
    if spec.name == "one_cycle":
        return
    warm = math.ceil(spec.warmup_epochs * steps)
    rising = course(spec, steps, epochs)[:warm]
    assert all(low < high for low, high in pairwise(rising))
    assert all(value < 1 for value in rising)
    if rising:
        assert rising[0] == pytest.approx(1 / (spec.warmup_epochs * steps + 1))


@given(st.integers(1, 9), st.integers(3, 12), st.integers(0, 2), st.sampled_from([0.0, 0.01, 0.3]))
def test_cosine_falls_from_one_to_its_end(steps: int, epochs: int, warmup: int, end: float) -> None:
    spec = ScheduleSpec(name="cosine", warmup_epochs=warmup, min_lr_ratio=end)
    falling = course(spec, steps, epochs)[warmup * steps :]
    assert falling[0] == 1
    assert all(high > low for high, low in pairwise(falling))
    assert lr_multiplier(spec, steps * epochs, steps, epochs) == pytest.approx(end)
    middle = warmup * steps + (epochs - warmup) * steps / 2
    assert lr_multiplier(spec, middle, steps, epochs) == pytest.approx((1 + end) / 2)  # type: ignore[arg-type]


def test_constant_and_step_are_what_their_names_say() -> None:
    assert set(course(ScheduleSpec(name="constant"), 3, 5)) == {1.0}
    assert course(ScheduleSpec(name="step", factor=0.5, step_epochs=2), 2, 5) == [1, 1, 1, 1] + [0.5] * 4 + [0.25] * 2


@given(st.integers(1, 9), st.integers(1, 12), st.floats(0.01, 0.99), st.sampled_from([0.0, 0.01]))
def test_one_cycle_rises_to_its_peak_and_falls(steps: int, epochs: int, warm_share: float, end: float) -> None:
    spec = ScheduleSpec(name="one_cycle", warm_share=warm_share, min_lr_ratio=end)
    values = course(spec, steps, epochs)
    top = int(np.argmax(values))
    assert values[0] == pytest.approx(0.04)
    assert all(low < high for low, high in pairwise(values[: top + 1]))
    assert all(high > low for high, low in pairwise(values[top:]))
    assert abs(top - warm_share * len(values)) <= 1
    if (1 - warm_share) * len(values) >= 1:
        assert lr_multiplier(spec, len(values), steps, epochs) == pytest.approx(end)


def test_one_cycle_reaches_one_where_the_rise_ends() -> None:
    values = course(ScheduleSpec(name="one_cycle", warm_share=0.25, min_lr_ratio=0.0), 10, 4)
    assert values[10] == max(values) == 1.0


@given(figures, st.integers(0, 4), st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from([0.0, 0.2]))
def test_plateau_is_torchs(watched: list[float], patience: int, factor: float, end: float) -> None:
    spec = ScheduleSpec(name="plateau", patience=patience, factor=factor, min_lr_ratio=end)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=factor, patience=patience, threshold=0.0, min_lr=end, eps=0.0
    )
    for epoch, score in enumerate(watched):
        assert lr_multiplier(spec, epoch, 1, 30, watched[:epoch]) == pytest.approx(optimizer.param_groups[0]["lr"])
        oracle.step(score)
    assert lr_multiplier(spec, 29, 1, 30, watched) == pytest.approx(optimizer.param_groups[0]["lr"])
