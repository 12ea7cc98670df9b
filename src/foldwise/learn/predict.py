"""The second of the two loops over batches: images to class probabilities, averaged over views.

Validation, OOF, test, `predict` and `serve` all come through here, so that the same image gives the same probabilities.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from foldwise.errors import DivergedError
from foldwise.learn.device import Runtime
from foldwise.spec.model import VIEW_NAME

_SHIFT = 1 / 12  # of a side: 4 px at 48
_CROP = 0.9  # side of a crop, as a share of the image's
_PIXELS = 256 * 96 * 96  # input pixels of a forward pass, which holds no gradients


@dataclass(frozen=True)
class View:
    """One view, averaged over its renderings.

    Attributes:
        name: As the spec names it.
        renderings: Affine maps (2, 3) from output to input coordinates in [-1, 1], or None for the image as it is.
    """

    name: str
    renderings: tuple[Tensor | None, ...]


def parse_view(name: str) -> View:
    """Make a view from its name in a spec.

    `identity`; `hflip` mirrors; `zoom_<f>` looks at the middle 1/f; `shift` moves by a twelfth of the side in four
    directions; `rotate_<deg>` turns both ways; `multicrop` takes four corners and the middle, nine tenths wide. Borders
    are mirrored. With `+hflip`, as in `shift+hflip`, each rendering is there as it is and mirrored.

    Raises:
        ValueError: If there is no such view.
    """
    match = VIEW_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"unknown view {name!r}")
    renderings = _renderings(name.removesuffix("+hflip"), match)
    if match["mirrored"]:
        renderings += tuple(_MIRROR if one is None else one * _MIRRORED for one in renderings)
    return View(name, renderings)


def _renderings(name: str, match: re.Match[str]) -> tuple[Tensor | None, ...]:
    if name == "identity":
        return (None,)
    if name == "hflip":
        return (_MIRROR,)
    if name == "shift":
        reach = 2 * _SHIFT
        return tuple(_affine(1, 1, dx, dy) for dx, dy in ((reach, 0), (-reach, 0), (0, reach), (0, -reach)))
    if name == "multicrop":
        reach = 1 - _CROP
        corners = [(dx, dy) for dx in (-reach, reach) for dy in (-reach, reach)]
        return tuple(_affine(_CROP, _CROP, dx, dy) for dx, dy in [(0.0, 0.0), *corners])
    if match["zoom"] is not None:
        return (_affine(1 / float(match["zoom"]), 1 / float(match["zoom"])),)
    angle = math.radians(float(match["rotate"]))
    return tuple(
        torch.tensor([[math.cos(a), -math.sin(a), 0.0], [math.sin(a), math.cos(a), 0.0]]) for a in (angle, -angle)
    )


def _affine(scale_x: float, scale_y: float, dx: float = 0.0, dy: float = 0.0) -> Tensor:
    return torch.tensor([[scale_x, 0.0, dx], [0.0, scale_y, dy]])


_MIRROR = _affine(-1, 1)
_MIRRORED = torch.tensor([[-1.0], [1.0]])  # times a map: the same look at the mirrored image


def render(images: Tensor, rendering: Tensor | None) -> Tensor:
    """Apply one rendering to (B, C, S, S) float images; a mirror image is exact."""
    if rendering is None:
        return images
    if torch.equal(rendering, _MIRROR):
        return images.flip(-1)
    theta = rendering.to(images.device).expand(len(images), 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def predict_batch_size(image_size: int) -> int:
    """Images a forward pass of `predict`, for inputs of `image_size` px a side; the bits may depend on it."""
    return max(1, min(128, _PIXELS // image_size**2))


def predict(
    model: nn.Module,
    images: np.ndarray,
    views: Sequence[View],
    *,
    prepare: Callable[[Tensor], Tensor],
    runtime: Runtime,
    batch_size: int,
) -> Tensor:
    """Average class probabilities over test-time-augmentation views.

    Args:
        model: Maps (B, C, S, S) float32 to (B, classes) logits, on the runtime's device; put into eval mode.
        images: (N, H, W, C) uint8, 0-255; may be memory-mapped.
        views: Views to average with equal weight, each over its renderings; at least one.
        prepare: Pixels (B, H, W, C) uint8 to input (B, C, S, S) float32, on the device.
        runtime: Device and precision.
        batch_size: Images per forward pass; the last batch is padded to it, so that an image's probabilities do not
            depend on how many others there are.

    Returns:
        (N, classes) float32 on the CPU, rows summing to 1 within 1e-5, in the order of `images`.

    Raises:
        DivergedError: If a logit is not finite; names the first such row.
    """
    model.eval()
    chunks = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            pixels = torch.from_numpy(np.array(images[start : start + batch_size]))
            count = len(pixels)
            if count < batch_size:
                pixels = torch.cat([pixels, pixels[-1:].expand(batch_size - count, *pixels.shape[1:])])
            batch = prepare(pixels.to(runtime.device))
            total: Tensor | None = None
            for view in views:
                for rendering in view.renderings:
                    with runtime.autocast():
                        logits = model(render(batch, rendering).contiguous(memory_format=runtime.memory_format))
                    share = logits.float().softmax(1) / (len(views) * len(view.renderings))
                    # Softmax would hide a logit of minus infinity.
                    share = share.where(logits.isfinite().all(1, keepdim=True), torch.nan)
                    total = share if total is None else total + share
            assert total is not None, "predict needs at least one view"
            chunks.append(total[:count].cpu())
    if not chunks:
        return torch.empty(0, 0)
    probs = torch.cat(chunks)
    wrong = (~probs.isfinite()).any(1).nonzero()
    if len(wrong):
        raise DivergedError(
            f"the logits of row {int(wrong[0])} (of {len(images)}) are not finite: the model has diverged\n"
            "  fix: a smaller `optim.lr`, `optim.clip_grad_norm: 1.0`, or `train.precision: fp32`"
        )
    return probs
