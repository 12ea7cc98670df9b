"""Training batches: which images an epoch draws, albumentations on their native pixels, and mixing on the device.

Images are augmented a few batches ahead on background threads; each draw has its own key, so threads change nothing.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

# Before the import: else it asks the network for its newest version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from torch import Tensor

from foldwise.data.stacked import Images
from foldwise.errors import FoldwiseError
from foldwise.learn.keys import Purpose, generator, python_random
from foldwise.spec.model import MixSpec

cv2.setNumThreads(0)  # images are small, and the threads here already are the parallelism

_AHEAD = 4  # batches prepared ahead of the one in training


@dataclass(frozen=True)
class Batch:
    """One batch, still on the CPU.

    Attributes:
        pixels: (B, H, W, C) uint8, augmented.
        rows: (B,) int64 rows of the data set, from which an objective finds its targets.
        key: (seed, fold, epoch, index) of the batch.
    """

    pixels: Tensor
    rows: Tensor
    key: tuple[int, int, int, int]


class Augment:
    """albumentations transforms, seeded anew for each image."""

    def __init__(self, transforms: Sequence[dict[str, dict[str, Any]]], shape: tuple[int, int, int]) -> None:
        """Build the pipeline and try it once.

        Args:
            transforms: The experiment's `augment` section.
            shape: (H, W, C) of the images.

        Raises:
            FoldwiseError: If albumentations refuses a parameter, or the images come out in another shape or type.
        """
        self._transforms = transforms
        self._compose_here = threading.local()
        if transforms:
            # In the trial every transform fires: a rare one shall not fail in the middle of a training.
            for transform in self._compose().transforms:
                transform.p = 1.0
            self(np.arange(np.prod(shape), dtype=np.int64).reshape(shape).astype(np.uint8), (0, 0, 0, 0))
            self._compose_here = threading.local()

    def _compose(self) -> A.Compose:
        compose = getattr(self._compose_here, "compose", None)
        if compose is None:
            children = []
            for index, entry in enumerate(self._transforms):
                ((name, parameters),) = entry.items()
                kind = getattr(A, name)
                # A few define __init__ without a schema of their own: these know no `strict`, and refuse by themselves.
                strict = {} if "__init__" in vars(kind) and "InitSchema" not in vars(kind) else {"strict": True}
                try:
                    children.append(kind(**{key: _as_tuple(v) for key, v in parameters.items()}, **strict))
                except (TypeError, ValueError) as error:
                    raise FoldwiseError(f"`augment.{index}.{name}` is refused by albumentations: {error}") from error
            compose = self._compose_here.compose = A.Compose(children, strict=True)
        return compose

    def __call__(self, image: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
        """Augment one (H, W, C) uint8 image by the draws that belong to `key`."""
        if not self._transforms:
            return image
        compose = self._compose()
        # One stream for all children: a seed of its own in each would make two p=0.5 transforms fire together.
        compose.set_random_state(generator(Purpose.AUGMENT, *key), python_random(Purpose.AUGMENT, *key))
        try:
            out: np.ndarray = compose(image=image)["image"]
        except (TypeError, ValueError, KeyError, NotImplementedError, cv2.error) as error:
            names = ", ".join(next(iter(entry)) for entry in self._transforms)
            raise FoldwiseError(
                f"`augment` ({names}) fails on a {image.shape} uint8 image: {error}\n"
                "  fix: leave out the transforms that need another kind of image (colour ones on gray, say)"
            ) from error
        if out.shape != image.shape or out.dtype != np.uint8:
            raise FoldwiseError(
                f"`augment` turns {image.shape} uint8 images into {out.shape} {out.dtype}\n"
                "  fix: keep the native size and type; `model.image_size` and `model.normalize` do the rest"
            )
        return out


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


class Batches:
    """The batches of each epoch of one unit."""

    def __init__(
        self,
        images: Images,
        rows: np.ndarray,
        augment: Augment,
        *,
        batch_size: int,
        key: tuple[int, int],
        weights: np.ndarray | None = None,
        workers: int = 2,
    ) -> None:
        """Plan the batches.

        Args:
            images: (N, H, W, C) uint8, the whole data set.
            rows: Rows of `images` to train on.
            augment: What is done to each image.
            batch_size: Images a batch; the last of an epoch is smaller.
            key: (seed, fold).
            weights: One weight for each of `rows`, to draw by with replacement; None for each row once.
            workers: Background threads.
        """
        self._images = images
        self._rows = rows
        self._augment = augment
        self._batch_size = batch_size
        self._key = key
        self._shares = None if weights is None else weights / weights.sum()
        self._workers = workers

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self._rows), self._batch_size)
        # A batch of one image has no batch statistics: it sits the epoch out, unless it is all there is.
        return full + (rest > 1 or full == 0)

    def order(self, epoch: int) -> np.ndarray:
        """Rows of `images` in the order in which `epoch` draws them."""
        rng = generator(Purpose.ORDER, *self._key, epoch)
        if self._shares is None:
            return self._rows[rng.permutation(len(self._rows))]
        return self._rows[rng.choice(len(self._rows), size=len(self._rows), p=self._shares)]

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, prepared ahead."""
        order = self.order(epoch)
        with ThreadPoolExecutor(self._workers, thread_name_prefix="augment") as pool:
            waiting: deque[Future[Batch]] = deque()
            try:
                for index in range(len(self)):
                    waiting.append(pool.submit(self._batch, order, epoch, index))
                    if len(waiting) > _AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _batch(self, order: np.ndarray, epoch: int, index: int) -> Batch:
        first = index * self._batch_size
        rows = order[first : first + self._batch_size]
        pixels = np.empty((len(rows), *self._images.shape[1:]), dtype=np.uint8)
        for place, row in enumerate(rows):
            pixels[place] = self._augment(np.ascontiguousarray(self._images[row]), (*self._key, epoch, first + place))
        return Batch(torch.from_numpy(pixels), torch.from_numpy(rows.astype(np.int64)), (*self._key, epoch, index))


def sampling_weights(kind: str, labels: np.ndarray, classes: int) -> np.ndarray | None:
    """Weights to draw training images by.

    Args:
        kind: `none`, `balanced` (N / N_class) or `sqrt` (its square root).
        labels: (N,) class indices.
        classes: Number of classes.

    Returns:
        (N,) float64 weights, or None for `none`.
    """
    if kind == "none":
        return None
    counts = np.bincount(labels, minlength=classes)
    ratio = len(labels) / np.maximum(counts, 1)
    weights: np.ndarray = (ratio if kind == "balanced" else np.sqrt(ratio))[labels]
    return weights


def mix(images: Tensor, targets: Tensor, spec: MixSpec, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a batch with a permutation of itself.

    Any batch size will do. CutMix's share is that of the pixels really pasted.

    Args:
        images: (B, C, H, W) float, on any device.
        targets: (B, classes) float, rows summing to 1.
        spec: The experiment's `mix` section.
        key: (seed, fold, epoch, index) of the batch.

    Returns:
        Mixed images and targets; the very same tensors where nothing is mixed.
    """
    if spec.mixup_alpha == 0 and spec.cutmix_alpha == 0:
        return images, targets
    rng = generator(Purpose.MIX, *key)
    # All draws are made, whether used or not, and each share has its own stream, since a beta takes more or fewer
    # numbers by its alpha: so one option does not shift the draws of another.
    mixup_rng, cutmix_rng = rng.spawn(2)
    mixed, cut = rng.random() < spec.prob, rng.random() < spec.switch_prob
    partner = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    mixup_share = mixup_rng.beta(spec.mixup_alpha, spec.mixup_alpha) if spec.mixup_alpha else 1.0
    cutmix_share = cutmix_rng.beta(spec.cutmix_alpha, spec.cutmix_alpha) if spec.cutmix_alpha else 1.0
    centre = rng.random(2)
    if not mixed:
        return images, targets
    if spec.cutmix_alpha and (cut or not spec.mixup_alpha):
        height, width = images.shape[-2:]
        top, bottom = _span(centre[0], height, np.sqrt(1 - cutmix_share))
        left, right = _span(centre[1], width, np.sqrt(1 - cutmix_share))
        images = images.clone()
        images[..., top:bottom, left:right] = images[partner][..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        share = mixup_share
        images = images * share + images[partner] * (1 - share)
    return images, targets * share + targets[partner] * (1 - share)


def _span(centre: float, size: int, ratio: float) -> tuple[int, int]:
    middle, half = int(centre * size), int(size * ratio / 2)
    return max(0, middle - half), min(size, middle + half)
