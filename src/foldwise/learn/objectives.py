"""What `fit` minimises: an objective takes a batch and gives a loss.

`Supervised` is cross-entropy or focal loss on soft targets, with label smoothing applied once and classes weighted;
teachers may give targets to images without labels, and distributions to be matched besides the labels.
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


@dataclass(frozen=True, eq=False)
class Taught:
    """What teachers add to the labels; N rows of the data set, of which those that are trained on count.

    Attributes:
        targets: (N, classes) float32, what stands in place of the label; rows sum to 1.
        weights: (N,) float32, of each image in the loss, more than 0.
        matched: (N, classes) float32, the teachers' probabilities, softened; None where there is nothing to match.
        share: Of matching in the loss; the targets have the rest.
        temperature: By which `matched` was softened, and the student's logits are divided.
    """

    targets: np.ndarray
    weights: np.ndarray
    matched: np.ndarray | None = None
    share: float = 0.0
    temperature: float = 1.0


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
        taught: Taught | None = None,
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
            taught: What teachers say, whose targets then stand in place of the labels; None without teachers.
        """
        self._labels = torch.from_numpy(labels.astype(np.int64))
        self._classes = classes
        self._loss = loss
        self._mixing = mixing
        self._prepare = prepare
        self._runtime = runtime
        self._weights = None if class_weights is None else _to(torch.from_numpy(class_weights).float(), runtime)
        self._taught = taught
        self._columns = None if taught is None else _columns(taught)

    def __call__(self, model: nn.Module, batch: Batch, *, mixed: bool) -> Loss:
        """See `Objective`."""
        images = self._prepare(_to(batch.pixels, self._runtime))
        if self._columns is None:
            labels = _to(self._labels[batch.rows], self._runtime)
            columns = functional.one_hot(labels, self._classes).float()
        else:
            columns = _to(self._columns[batch.rows], self._runtime)
        if mixed:
            images, columns = mix(images, columns, self._mixing, batch.key)
        with self._runtime.autocast():
            logits = model(images.contiguous(memory_format=self._runtime.memory_format))
        logits = logits.float()
        if self._taught is None:
            return Loss(soft_target_loss(logits, columns, self._loss, self._weights), _hits(logits, columns))
        image_weights, parts = columns[:, 0], columns[:, 1:] / columns[:, :1]
        targets = parts[:, : self._classes]
        loss = soft_target_loss(logits, targets, self._loss, self._weights, image_weights)
        if self._taught.matched is not None:
            matching = matching_loss(logits, parts[:, self._classes :], self._taught.temperature, image_weights)
            loss = (1 - self._taught.share) * loss + self._taught.share * matching
        return Loss(loss, _hits(logits, targets))


def _columns(taught: Taught) -> Tensor:
    """Weight, weighted targets and weighted matched probabilities side by side: what mixing may add up linearly."""
    parts = [taught.targets] if taught.matched is None else [taught.targets, taught.matched]
    weights = taught.weights[:, None]
    return torch.from_numpy(np.concatenate([weights, *(weights * part for part in parts)], axis=1).astype(np.float32))


def _hits(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(1) == targets.argmax(1)).sum()


def _to(tensor: Tensor, runtime: Runtime) -> Tensor:
    if runtime.device.type == "cuda":
        return tensor.pin_memory().to(runtime.device, non_blocking=True)
    return tensor.to(runtime.device)


def soft_target_loss(
    logits: Tensor,
    targets: Tensor,
    spec: LossSpec,
    weights: Tensor | None = None,
    image_weights: Tensor | None = None,
) -> Tensor:
    """Mean loss of a batch against soft targets.

    Cross-entropy: -sum_c w_c t_c log p_c. Focal (Lin et al. 2017), on soft targets: each term times (1 - p_c)^gamma.
    Label smoothing moves its mass from `targets` to the uniform distribution, once, whatever mixing did. The weighted
    sum over images is divided by the sum of their targets' weights, as `torch.nn.CrossEntropyLoss(weight=...)` does;
    an image's own weight multiplies both.

    Args:
        logits: (B, classes) float32.
        targets: (B, classes) float32, rows summing to 1.
        spec: The experiment's `loss` section.
        weights: (classes,) float32, or None.
        image_weights: (B,) float32, or None.

    Returns:
        Scalar.
    """
    log_probs = logits.log_softmax(1)
    smooth = targets * (1 - spec.label_smoothing) + spec.label_smoothing / targets.shape[1]
    terms = -smooth * log_probs
    if spec.name == "focal":
        # Below float32's resolution of 1 - p, so that only 0 is lifted: a root's slope there is infinite.
        terms = terms * (1 - log_probs.exp()).clamp_min(1e-8) ** spec.gamma
    if image_weights is not None:
        each = image_weights[:, None]
        weights = each if weights is None else each * weights
    if weights is None:
        return terms.sum(1).mean()
    return (terms * weights).sum() / (targets * weights).sum()


def matching_loss(logits: Tensor, matched: Tensor, temperature: float, image_weights: Tensor) -> Tensor:
    """How far the student, softened, is from the softened teachers (Hinton et al. 2015, section 2).

    T^2 sum_c q_c (log q_c - log softmax(z / T)_c), the mean over images by their weights. The gradient at temperature T
    is about 1/T^2 of what it is at 1; the factor T^2 undoes that, so that a share in the loss means the same at any
    temperature. The teachers' own entropy is taken off, which changes no gradient: 0 is a perfect match. Neither label
    smoothing nor class weights nor the focal loss come in here: they would move the match elsewhere.

    Args:
        logits: (B, classes) float32.
        matched: (B, classes) float32, the teachers' probabilities as `softened` makes them, rows summing to 1.
        temperature: T.
        image_weights: (B,) float32.

    Returns:
        Scalar.
    """
    log_probs = (logits / temperature).log_softmax(1)
    apart = (torch.xlogy(matched, matched) - matched * log_probs).sum(1)
    return temperature**2 * (apart * image_weights).sum() / image_weights.sum()


def softened(probs: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities as their logits, divided by the temperature, would give them (Hinton et al. 2015, equation 1).

    Args:
        probs: (N, classes), rows summing to 1; a probability of 0 stays 0.
        temperature: T, from 1.

    Returns:
        (N, classes) float64: p^(1/T), rows summing to 1.
    """
    powers = np.asarray(probs, dtype=np.float64) ** (1 / temperature)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


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
