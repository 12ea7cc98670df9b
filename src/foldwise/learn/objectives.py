"""What `fit` minimises: an objective takes a batch and gives a loss.

`Supervised` is cross-entropy or focal loss on soft targets, with label smoothing applied once and classes weighted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from foldwise.learn.augment import Batch, mix
from foldwise.learn.device import Runtime
from foldwise.learn.models import ToInput
from foldwise.spec.model import LossSpec, MixSpec


@dataclass(frozen=True)
class Loss:
    """A batch's loss.

    Attributes:
        mean: Scalar to minimise, on the device.
        hits: Scalar count of images whose likeliest class is their (heavier) target, on the device.
    """

    mean: Tensor
    hits: Tensor


class Objective(Protocol):
    """Batch to loss."""

    def __call__(self, model: nn.Module, batch: Batch, *, mixed: bool) -> Loss:
        """Compute the loss of a batch; `mixed` is off in the last epochs where the spec says so."""


class Supervised:
    """Learn labels: pixels in, resized and mixed on the device, soft targets, one loss."""

    def __init__(
        self,
        labels: np.ndarray,
        classes: int,
        *,
        loss: LossSpec,
        mixing: MixSpec,
        prepare: ToInput,
        runtime: Runtime,
        class_weights: np.ndarray | None,
    ) -> None:
        """Bind the data's labels to the spec's loss.

        Args:
            labels: (N,) int64 class of every row of the data set; rows that are not trained on may hold -1.
            classes: Number of classes.
            loss: The experiment's `loss` section.
            mixing: The experiment's `mix` section.
            prepare: Pixels to input, on the device.
            runtime: Device and precision.
            class_weights: (classes,) weights, or None.
        """
        self._labels = torch.from_numpy(labels.astype(np.int64))
        self._classes = classes
        self._loss = loss
        self._mixing = mixing
        self._prepare = prepare
        self._runtime = runtime
        self._weights = None if class_weights is None else _to(torch.from_numpy(class_weights).float(), runtime)

    def __call__(self, model: nn.Module, batch: Batch, *, mixed: bool) -> Loss:
        """See `Objective`."""
        images = self._prepare(_to(batch.pixels, self._runtime))
        labels = _to(self._labels[batch.rows], self._runtime)
        targets = functional.one_hot(labels, self._classes).float()
        if mixed:
            images, targets = mix(images, targets, self._mixing, batch.key)
        with self._runtime.autocast():
            logits = model(images.contiguous(memory_format=self._runtime.memory_format))
        logits = logits.float()
        hits = (logits.argmax(1) == targets.argmax(1)).sum()
        return Loss(soft_target_loss(logits, targets, self._loss, self._weights), hits)


def _to(tensor: Tensor, runtime: Runtime) -> Tensor:
    if runtime.device.type == "cuda":
        return tensor.pin_memory().to(runtime.device, non_blocking=True)
    return tensor.to(runtime.device)


def soft_target_loss(logits: Tensor, targets: Tensor, spec: LossSpec, weights: Tensor | None = None) -> Tensor:
    """Mean loss of a batch against soft targets.

    Cross-entropy: -sum_c w_c t_c log p_c. Focal (Lin et al. 2017), on soft targets: each term times (1 - p_c)^gamma.
    Label smoothing moves its mass from `targets` to the uniform distribution, once, whatever mixing did. The weighted
    sum over images is divided by the sum of their targets' weights, as `torch.nn.CrossEntropyLoss(weight=...)` does.

    Args:
        logits: (B, classes) float32.
        targets: (B, classes) float32, rows summing to 1.
        spec: The experiment's `loss` section.
        weights: (classes,) float32, or None.

    Returns:
        Scalar.
    """
    log_probs = logits.log_softmax(1)
    smooth = targets * (1 - spec.label_smoothing) + spec.label_smoothing / targets.shape[1]
    terms = -smooth * log_probs
    if spec.name == "focal":
        # Below float32's resolution of 1 - p, so that only 0 is lifted: a root's slope there is infinite.
        terms = terms * (1 - log_probs.exp()).clamp_min(1e-8) ** spec.gamma
    if weights is None:
        return terms.sum(1).mean()
    return (terms * weights).sum() / (targets * weights).sum()


def loss_class_weights(kind: str, labels: np.ndarray, classes: int) -> np.ndarray | None:
    """Class weights of the loss.

    Args:
        kind: `none`, `balanced` (N / (C N_class)) or `sqrt` (its square root).
        labels: (N,) class indices of the training images.
        classes: Number of classes C.

    Returns:
        (classes,) float64 with mean 1 over the training images, or None for `none`; 0 for a class without images.
    """
    if kind == "none":
        return None
    counts = np.bincount(labels, minlength=classes)
    weights = np.where(counts > 0, len(labels) / (classes * np.maximum(counts, 1)), 0.0)
    if kind == "sqrt":
        weights = np.sqrt(weights)
    return np.asarray(weights * len(labels) / (weights * counts).sum())
