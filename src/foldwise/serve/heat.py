"""What a model looked at in one picture, as a heat map over it: Grad-CAM, or attention rollout for a ViT.

The picture is that which the model saw: brought to the form of its competition, and gray below the map.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from foldwise.errors import FoldwiseError
from foldwise.runs.kept import KeptModel
from foldwise.serve.guard import RefusalError
from foldwise.show.explain import attention_rollout, feature_layer, grad_cam

SIDE = 384
"""Longest side of a map, px."""


def heat_map(model: KeptModel, pixels: NDArray[np.uint8]) -> tuple[bytes, str]:
    """Draw where a model finds what speaks for its answer.

    Args:
        model: One model of a run; not to be asked by two threads at once.
        pixels: (H, W, C) uint8 of the competition's form.

    Returns:
        A PNG, RGB, and the name of the class that the map is for: the model's own answer, without TTA. Grad-CAM is
        scaled to its maximum (Selvaraju et al. 2017), rollout from least to greatest (Abnar and Zuidema 2020), which is
        the same for every class.

    Raises:
        RefusalError: If the network has neither feature maps that its classifier rests on nor global attention
            (422).
        FoldwiseError: If captum is not installed.
    """
    network = model.model
    inputs = model.prepare(torch.from_numpy(pixels[None].copy()).to(model.runtime.device))
    with torch.no_grad():
        target = network(inputs).argmax(dim=1)
    try:
        shares = attention_rollout(network, inputs)
        values = shares - shares.min()
    except FoldwiseError:
        try:
            feature_layer(network, inputs)
        except FoldwiseError:
            what = f"`{model.spec.arch}` has neither feature maps that its classifier rests on nor global attention"
            raise RefusalError(422, f"{what}; ask a run of a convolutional network or a ViT") from None
        values = grad_cam(network, inputs, target)
    heat = values[0].double().cpu().numpy()
    return _drawn(pixels, heat / max(float(heat.max()), 1e-12)), model.classes[int(target)]


def _drawn(pixels: NDArray[np.uint8], heat: NDArray[np.float64]) -> bytes:
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    size = round(width * scale), round(height * scale)
    gray = Image.fromarray(pixels.mean(axis=2).round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    stretched = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    values = np.asarray(stretched, dtype=np.float64).clip(0, 1)
    alpha = (0.15 + 0.45 * values)[..., None]
    below = np.asarray(gray, dtype=np.float64)[..., None]
    mixed = (1 - alpha) * below + alpha * 255 * colormaps["inferno"](values)[..., :3]
    file = io.BytesIO()
    Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()
