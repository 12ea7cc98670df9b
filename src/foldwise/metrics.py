"""The metrics a competition can be scored by, and the tables that explain a score.

Every metric is a function of sums over images, so that weighted, bootstrapped and plain scores are one computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]

# Least probability that log loss sees: about the step of float32 at 1, in which predictions are kept.
LOG_LOSS_EPS = 1e-7


@dataclass(frozen=True)
class Metric:
    """A figure of merit of class probabilities.

    Attributes:
        name: As in `competition.yaml`.
        greater_is_better: False for losses.
        hard: Whether only the predicted class counts (the largest probability, the first of equals).
        finish: Maps sums over images, (..., S) as `statistics` gives them, to scores (...).
    """

    name: str
    greater_is_better: bool
    hard: bool
    finish: Callable[[Floats], Floats]

    @property
    def sign(self) -> int:
        """1 or -1: a score times it is better when greater."""
        return 1 if self.greater_is_better else -1

    def statistics(self, labels: Labels, probs: Floats) -> NDArray[np.float64]:
        """What each image adds to the sums that `finish` takes.

        Args:
            labels: (N,) class indices, 0 to C - 1.
            probs: (N, C) class probabilities.

        Returns:
            (N, S). Hard metrics: three one-hot rows of C, which are right hits, the label and the prediction. Log loss:
            the image's loss, and 1.
        """
        if not self.hard:
            return np.stack([log_loss_of(probs[np.arange(len(labels)), labels]), np.ones(len(labels))], axis=1)
        classes = np.arange(probs.shape[1])
        true = labels[:, None] == classes
        predicted = probs.argmax(axis=1)[:, None] == classes
        return np.concatenate([true & predicted, true, predicted], axis=1).astype(np.float64)

    def score(self, labels: Labels, probs: Floats, weights: Floats | None = None) -> float:
        """Score predictions.

        Args:
            labels: (N,) class indices, 0 to C - 1.
            probs: (N, C) class probabilities.
            weights: (N,) not negative; a weight of 2 is the same as giving the image twice, 0 as leaving it out.

        Returns:
            The score. Macro F1 averages over the classes that occur among labels or predictions, balanced accuracy over
            those that occur among labels: scikit-learn's meaning of both.

        Raises:
            ValueError: If there is no image, or none with a weight.
        """
        rows = self.statistics(labels, probs)
        if weights is not None:
            rows = rows * weights[:, None]
        if len(rows) == 0 or (weights is not None and not weights.any()):
            raise ValueError(f"cannot score `{self.name}` on no images, but got ({len(rows)=})")
        return float(self.finish(rows.sum(axis=0)))


def log_loss_of(true_probs: Floats) -> NDArray[np.float64]:
    """Negative log of probabilities of the true class, each taken as at least `LOG_LOSS_EPS`."""
    loss: NDArray[np.float64] = -np.log(np.maximum(true_probs.astype(np.float64), LOG_LOSS_EPS))
    return loss


def _thirds(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """Hits, labels and predictions per class, each (..., C)."""
    hits, true, predicted = np.split(sums, 3, axis=-1)
    return hits, true, predicted


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Elementwise ratio, 0 where the denominator is."""
    ratio: Floats = np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator > 0)
    return ratio


def _accuracy(sums: Floats) -> Floats:
    hits, true, _ = _thirds(sums)
    return np.asarray(hits.sum(axis=-1) / true.sum(axis=-1))


def _macro_f1(sums: Floats) -> Floats:
    hits, true, predicted = _thirds(sums)
    f1 = _ratio(2 * hits, true + predicted)
    return np.asarray(f1.sum(axis=-1) / (true + predicted > 0).sum(axis=-1))


def _balanced_accuracy(sums: Floats) -> Floats:
    hits, true, _ = _thirds(sums)
    return np.asarray(_ratio(hits, true).sum(axis=-1) / (true > 0).sum(axis=-1))


def _log_loss(sums: Floats) -> Floats:
    return np.asarray(sums[..., 0] / sums[..., 1])


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", greater_is_better=True, hard=True, finish=_accuracy),
        Metric("macro_f1", greater_is_better=True, hard=True, finish=_macro_f1),
        Metric("balanced_accuracy", greater_is_better=True, hard=True, finish=_balanced_accuracy),
        Metric("log_loss", greater_is_better=False, hard=False, finish=_log_loss),
    )
}


def per_image(name: str, labels: Labels, probs: Floats) -> NDArray[np.float64]:
    """Each image's part in a metric that is a mean over images.

    Args:
        name: `accuracy` (1 right, 0 wrong) or `log_loss`.
        labels: (N,) class indices.
        probs: (N, C) class probabilities.

    Returns:
        (N,) whose mean is the metric.

    Raises:
        ValueError: If the metric is no mean over images.
    """
    if name == "accuracy":
        return np.asarray(probs.argmax(axis=1) == labels, dtype=np.float64)
    if name == "log_loss":
        return log_loss_of(probs[np.arange(len(labels)), labels])
    raise ValueError(f"only accuracy and log_loss are means over images, but got ({name=})")


def confusion_matrix(labels: Labels, probs: Floats) -> NDArray[np.int64]:
    """Count predictions per label.

    Args:
        labels: (N,) class indices.
        probs: (N, C) class probabilities.

    Returns:
        (C, C) counts, rows true, columns predicted.
    """
    classes = probs.shape[1]
    cells = labels * classes + probs.argmax(axis=1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes).astype(np.int64)


def per_class_table(labels: Labels, probs: Floats, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and number of images of each class.

    Args:
        labels: (N,) class indices.
        probs: (N, C) class probabilities.
        classes: C names, in the order of the indices.

    Returns:
        A row {class, precision, recall, f1, support} a class; a ratio with nothing below the line is 0.
    """
    counts = confusion_matrix(labels, probs).astype(np.float64)
    hits, true, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    precision, recall, f1 = _ratio(hits, predicted), _ratio(hits, true), _ratio(2 * hits, true + predicted)
    return [
        {
            "class": name,
            "precision": float(precision[index]),
            "recall": float(recall[index]),
            "f1": float(f1[index]),
            "support": int(true[index]),
        }
        for index, name in enumerate(classes)
    ]
