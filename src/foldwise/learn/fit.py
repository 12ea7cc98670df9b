"""The first of the two loops over batches: an objective, a schedule and a checkpoint after every epoch.

A killed unit goes on from its last epoch and ends with the same bits: every draw has its own key.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from foldwise.errors import DivergedError
from foldwise.files import atomic_path
from foldwise.learn.augment import Batches
from foldwise.learn.device import Runtime
from foldwise.learn.keys import Purpose, torch_seed
from foldwise.learn.models import head_parameters
from foldwise.learn.objectives import Objective
from foldwise.spec.model import OptimSpec, ScheduleSpec, TrainSpec

Row = dict[str, float | int]

_CHECK_EVERY = 50  # optimizer steps between looks at the loss, the only time the loop waits for the device
_LARGEST_LOSS = 1e4  # a mean loss beyond this is divergence, finite or not
_NEWS_EVERY_S = 0.25


@dataclass(frozen=True)
class Fitted:
    """What came out of a fit.

    Attributes:
        model: The module to be scored (the average of the weights where the spec asks for one), on the device.
        history: A row an epoch.
        best_epoch: The epoch whose weights these are, from 1.
        stopped_early: Whether early stopping ended it.
        wall_s: Seconds of training over all pieces of a resumed unit.
    """

    model: nn.Module
    history: list[Row]
    best_epoch: int
    stopped_early: bool
    wall_s: float


def fit(
    model: nn.Module,
    objective: Objective,
    batches: Batches,
    *,
    optim: OptimSpec,
    schedule: ScheduleSpec,
    train: TrainSpec,
    key: tuple[int, int],
    runtime: Runtime,
    checkpoint: Path,
    unmixed_epochs: int = 0,
    evaluate: Callable[[nn.Module], Row] = lambda _model: {},
    watched: Callable[[Row], float] | None = None,
    on_start: Callable[[int], None] = lambda _epoch: None,
    on_step: Callable[[int, int, int], None] = lambda _epoch, _step, _steps: None,
    on_epoch: Callable[[Row], None] = lambda _row: None,
) -> Fitted:
    """Train a model.

    Args:
        model: To be trained in place; moved to the device.
        objective: Batch to loss.
        batches: The epochs' batches.
        optim: The experiment's `optim` section.
        schedule: The experiment's `schedule` section.
        train: The experiment's `train` section.
        key: (seed, fold), from which dropout is reseeded at each step.
        runtime: Device, precision and threads.
        checkpoint: File that is replaced after every epoch, and gone on from where it is there.
        unmixed_epochs: The last so many epochs train unmixed.
        evaluate: Called with the model to be scored after each epoch; its figures join the epoch's row.
        watched: Picks the watched figure of a row, higher is better; needed where the spec watches anything.
        on_start: Called with the number of epochs already there.
        on_step: Called with (epoch, step, steps of the epoch) a few times a second.
        on_epoch: Called with each new row.

    Returns:
        The model to be scored, with its history.

    Raises:
        DivergedError: If the loss is not finite or beyond all reason; names the window of steps.
    """
    model.to(runtime.device)
    head = head_parameters(model)
    optimizer = _make_optimizer(model, optim, head)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
    ema = ModelEmaV3(model, decay=train.ema_decay, use_warmup=True) if train.ema_decay is not None else None
    state = _State()
    if checkpoint.exists():
        state = _load_checkpoint(checkpoint, model, ema, optimizer, scaler, runtime)
    forward: nn.Module = torch.compile(model) if train.compile else model  # type: ignore[assignment]
    steps = math.ceil(len(batches) / train.accumulate)
    on_start(len(state.history))
    for epoch in range(len(state.history), train.epochs):
        if state.stopped_early:
            break
        began = time.monotonic()
        frozen = epoch < train.freeze_backbone_epochs
        _freeze(model, head if frozen else None)
        losses: list[Tensor] = []
        hits: list[Tensor] = []
        images, step, told = 0, 0, 0.0
        scores = [watched(row) for row in state.history] if watched is not None else []
        for index, batch in enumerate(batches.epoch(epoch)):
            group_start = step * train.accumulate
            group_size = min(train.accumulate, len(batches) - group_start)
            torch.manual_seed(torch_seed(Purpose.STEP, *key, epoch, index))
            loss = objective(forward, batch, mixed=epoch < train.epochs - unmixed_epochs)
            scaler.scale(loss.mean / group_size).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.mean.detach() * len(batch.rows))
            hits.append(loss.hits)
            images += len(batch.rows)
            if index + 1 < group_start + group_size:
                continue
            done = epoch * steps + step
            multiplier = lr_multiplier(schedule, done, steps, train.epochs, scores)
            for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base * multiplier
            if optim.clip_grad_norm is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update(model, step=done)
            step += 1
            if step % _CHECK_EVERY == 0 or step == steps:
                _check_losses(losses, images, epoch, step, key)
            if time.monotonic() - told > _NEWS_EVERY_S:
                told = time.monotonic()
                on_step(epoch + 1, step, steps)
        trained_s = time.monotonic() - began
        scored = ema.module if ema is not None else model
        row: Row = {
            "epoch": epoch + 1,
            "lr": max(group["lr"] for group in optimizer.param_groups),
            "train_loss": float(torch.stack(losses).sum()) / images,
            "train_accuracy": int(torch.stack(hits).sum()) / images,
            **evaluate(scored),
            "images_per_s": round(images / trained_s, 1),
        }
        state.history.append(row)
        state.wall_s += time.monotonic() - began
        if watched is not None:
            state.follow(watched(row), scored, keep=train.keep == "best", patience=train.early_stop_patience)
        _save_checkpoint(checkpoint, state, model, ema, optimizer, scaler)
        on_epoch(row)
    scored = ema.module if ema is not None else model
    best_epoch = len(state.history)
    if state.best_weights is not None:
        scored.load_state_dict(state.best_weights)
        best_epoch = state.best_epoch
    return Fitted(scored.eval(), state.history, best_epoch, state.stopped_early, state.wall_s)


@dataclass
class _State:
    """What a checkpoint holds beside the weights and the optimizer."""

    history: list[Row] = field(default_factory=list)
    best_score: float = -math.inf
    best_epoch: int = 0
    best_weights: dict[str, Tensor] | None = None
    stopped_early: bool = False
    wall_s: float = 0.0

    def follow(self, score: float, scored: nn.Module, *, keep: bool, patience: int | None) -> None:
        """Note an epoch's watched figure: the best so far, and whether it is time to stop."""
        epoch = len(self.history)
        if score > self.best_score:
            self.best_score, self.best_epoch = score, epoch
            if keep:
                self.best_weights = deepcopy(scored.state_dict())
        self.stopped_early = patience is not None and epoch - self.best_epoch >= patience


def _make_optimizer(model: nn.Module, optim: OptimSpec, head: set[str]) -> torch.optim.Optimizer:
    """Timm's factory over groups that each have their own rate; no decay on biases, norms and what the model names."""
    named: Any = getattr(model, "no_weight_decay", set)
    spared: set[str] = named()
    if optim.layer_decay is not None:
        groups = param_groups_layer_decay(model, optim.weight_decay, spared, layer_decay=optim.layer_decay)
    else:
        groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=spared)
    heads = {id(parameter) for name, parameter in model.named_parameters() if name in head}
    split: list[dict[str, Any]] = []
    for group in groups:
        scale = group.pop("lr_scale", 1.0)
        for inside, ratio in ((True, 1.0), (False, optim.backbone_lr_scale)):
            members = [parameter for parameter in group["params"] if (id(parameter) in heads) is inside]
            if members:
                split.append({**group, "params": members, "lr": optim.lr * scale * ratio})
    options: dict[str, Any] = {}
    if optim.name in {"adamw", "adam"}:
        options["fused"] = True
    info = get_optimizer_info(optim.name)
    if info.has_betas and info.num_betas == 2:
        options["betas"] = (optim.momentum, 0.999)
    if optim.momentum == 0 and (info.defaults or {}).get("nesterov"):
        options["nesterov"] = False
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        split, opt=optim.name, lr=optim.lr, weight_decay=optim.weight_decay, momentum=optim.momentum, **options
    )
    return optimizer


def _freeze(model: nn.Module, head: set[str] | None) -> None:
    """Put the model in training mode: all of it, or the head alone, the rest keeping its norms' statistics too."""
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(head is None or name in head)
    if head is not None:
        for name, module in model.named_modules():
            if module.state_dict():  # what has no state, dropout above all, does as the module that holds it
                module.train(not name or any(parameter.startswith(f"{name}.") for parameter in head))


def lr_multiplier(spec: ScheduleSpec, step: int, steps: int, epochs: int, watched: Sequence[float] = ()) -> float:
    """The ratio that every group's base rate is multiplied by: a pure function, so that resuming needs no state.

    Args:
        spec: The experiment's `schedule` section.
        step: Optimizer steps done so far.
        steps: Optimizer steps an epoch.
        epochs: Planned epochs.
        watched: The watched figure of each finished epoch, higher is better; plateau's only input.

    Returns:
        A ratio in (0, 1].
    """
    total = steps * epochs
    if spec.name == "one_cycle":  # Smith & Topin 2018, with cosine flanks, from 1/25 of the peak
        rise = max(1.0, spec.warm_share * total)
        if step < rise:
            return _cosine(step / rise, 0.04, 1.0)
        return _cosine((step - rise) / max(1.0, total - rise), 1.0, spec.min_lr_ratio)
    warm = spec.warmup_epochs * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    if spec.name == "cosine":
        return _cosine((step - warm) / max(1.0, total - warm), 1.0, spec.min_lr_ratio)
    if spec.name == "step":
        return spec.factor ** (step // steps // spec.step_epochs)
    if spec.name == "plateau":
        return max(spec.min_lr_ratio, spec.factor ** _plateau_drops(watched, spec.patience))
    return 1.0


def _cosine(progress: float, start: float, end: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def _plateau_drops(watched: Sequence[float], patience: int) -> int:
    """How often a plateau of more than `patience` epochs has been seen, replayed from the start."""
    best, waiting, drops = -math.inf, 0, 0
    for score in watched:
        if score > best:
            best, waiting = score, 0
        else:
            waiting += 1
            if waiting > patience:
                drops, waiting = drops + 1, 0
    return drops


def _check_losses(losses: Sequence[Tensor], images: int, epoch: int, step: int, key: tuple[int, int]) -> None:
    first = (step - 1) // _CHECK_EVERY * _CHECK_EVERY + 1
    mean = float(torch.stack(list(losses)).sum()) / images
    if not abs(mean) < _LARGEST_LOSS:  # NaN is not less than anything
        seed, fold = key
        raise DivergedError(
            f"the loss became {mean:.3g} between steps {first} and {step} of epoch {epoch + 1} "
            f"(fold {fold}, seed {seed})\n"
            "  fix: a smaller `optim.lr`, `schedule.warmup_epochs: 1`, `optim.clip_grad_norm: 1.0`, or "
            "`train.precision: fp32`"
        )


def _save_checkpoint(
    path: Path,
    state: _State,
    model: nn.Module,
    ema: ModelEmaV3 | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    content: Mapping[str, Any] = {
        "model": model.state_dict(),
        "ema": None if ema is None else ema.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "history": state.history,
        "best_score": state.best_score,
        "best_epoch": state.best_epoch,
        "best_weights": state.best_weights,
        "stopped_early": state.stopped_early,
        "wall_s": state.wall_s,
        "threads": torch.get_num_threads(),
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def _load_checkpoint(
    path: Path,
    model: nn.Module,
    ema: ModelEmaV3 | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    runtime: Runtime,
) -> _State:
    content = torch.load(path, map_location=runtime.device, weights_only=True)
    model.load_state_dict(content["model"])
    if ema is not None:
        ema.module.load_state_dict(content["ema"])
    optimizer.load_state_dict(content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    torch.set_num_threads(content["threads"])
    state = _State()
    for name in ("history", "best_score", "best_epoch", "best_weights", "stopped_early", "wall_s"):
        setattr(state, name, content[name])
    return state
