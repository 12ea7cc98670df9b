"""Networks: timm's by name, Foldwise's own registered beside them, and the way from stored pixels to a network's input.

`build_model` loads weights from the hub's cache, the hub, or nowhere; `ToInput` resizes and normalises on the device.
"""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from foldwise.data.stacked import Images
from foldwise.errors import FoldwiseError, HubError
from foldwise.learn.device import Runtime
from foldwise.spec.model import HeadSpec, ModelSpec

OWN_ARCHS = ("cnn_3block", "cnn_3stage_cbam", "cnn_4stage", "vit_small_patch8_48")
"""Foldwise's own architectures; importing this module registers them with timm."""

# Mean and standard deviation of ImageNet's RGB channels, for pixels in [0, 1].
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class _StagedCNN(nn.Module):
    """What timm asks of a network of `blocks` or `stages` in a row and a `head`."""

    head: nn.Module

    def get_classifier(self) -> nn.Module:
        """The layers that are new for every set of classes."""
        return self.head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002 - timm's signature
        """Layers from input to output, for layer-wise learning rates."""
        return {"stem": r"^(?:blocks|stages)\.0", "blocks": r"^(?:blocks|stages)\.(\d+)"}


class ThreeBlockCNN(_StagedCNN):
    """Three blocks of convolution, norm, ReLU and pooling (64-128-256), then a two-layer head; 0.4 M parameters."""

    def __init__(self, num_classes: int = 7, in_chans: int = 1, drop_rate: float = 0.0) -> None:
        super().__init__()
        widths = (in_chans, 64, 128, 256)
        self.num_classes = num_classes
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(), nn.MaxPool2d(2)
                )
                for inner, outer in pairwise(widths)
            )
        )
        self.head = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Dropout(drop_rate), nn.Linear(128, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float -> (B, classes) logits."""
        features: Tensor = self.blocks(images).mean(dim=(2, 3))
        logits: Tensor = self.head(features)
        return logits


class ChannelAttention(nn.Module):
    """How much each channel counts: a shared two-layer network on its mean and its maximum (Woo et al. 2018)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        inner = channels // reduction
        self.layers = nn.Sequential(
            nn.Linear(channels, inner, bias=False), nn.ReLU(), nn.Linear(inner, channels, bias=False)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 1, 1) in (0, 1)."""
        flat = features.flatten(2)
        gate: Tensor = torch.sigmoid(self.layers(flat.mean(2)) + self.layers(flat.max(2).values))
        return gate[:, :, None, None]


class SpatialAttention(nn.Module):
    """How much each place counts: a 7x7 convolution on the mean and the maximum over channels (Woo et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, H, W) in (0, 1)."""
        pooled = torch.cat([features.mean(1, keepdim=True), features.max(1, keepdim=True).values], dim=1)
        return torch.sigmoid(self.conv(pooled))


class CBAM(nn.Module):
    """Convolutional block attention module: channels first, then places (Woo et al. 2018, arXiv 1807.06521)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels)
        self.spatial = SpatialAttention()

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        features = features * self.channel(features)
        attended: Tensor = features * self.spatial(features)
        return attended


class ThreeStageCBAM(_StagedCNN):
    """Three stages of two convolutions, pooling and CBAM (64-128-256), then a two-layer head; 1.2 M parameters."""

    def __init__(self, num_classes: int = 7, in_chans: int = 1, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stages = nn.Sequential()
        for inner, outer in pairwise((in_chans, 64, 128, 256)):
            layers: list[nn.Module] = []
            for width in (inner, outer):
                layers += [nn.Conv2d(width, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
            # Attention after the pooling costs a quarter of attention before it.
            self.stages.append(nn.Sequential(*layers, nn.MaxPool2d(2), CBAM(outer)))
        self.head = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Dropout(drop_rate), nn.Linear(128, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float -> (B, classes) logits."""
        features: Tensor = self.stages(images).mean(dim=(2, 3))
        logits: Tensor = self.head(features)
        return logits


class FourStageCNN(_StagedCNN):
    """Four stages of 3x3 convolutions and pooling, made for 48 px, then one linear layer; 2.6 M parameters as it comes.

    Stages are `width`, 2, 4 and 8 times `width` channels wide and have `depth` convolutions each. Plain it is a small
    VGG (Simonyan and Zisserman 2015); with `residual` the convolutions after a stage's first are added to what they
    are given (He et al. 2016); with `attention` CBAM follows each pooling.
    """

    def __init__(
        self,
        num_classes: int = 7,
        in_chans: int = 1,
        drop_rate: float = 0.0,
        width: int = 48,
        depth: int = 2,
        residual: bool = False,
        attention: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1 + residual:
            raise ValueError(f"a stage needs {1 + residual} convolutions or more, but got {depth=}")
        self.num_classes = num_classes
        self.stages = nn.Sequential()
        for inner, outer in pairwise((in_chans, width, 2 * width, 4 * width, 8 * width)):
            later = [_conv_norm_relu(outer, outer) for _ in range(depth - 1)]
            layers: list[nn.Module] = [_conv_norm_relu(inner, outer)]
            layers += [Residual(*later)] if residual else later
            layers.append(nn.MaxPool2d(2))
            if attention:
                layers.append(CBAM(outer))
            self.stages.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout(drop_rate)
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float -> (B, classes) logits."""
        features: Tensor = self.stages(images).mean(dim=(2, 3))
        logits: Tensor = self.head(self.dropout(features))
        return logits


class Residual(nn.Sequential):
    """Layers in a row, and what they are given added to what they give."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        given = features
        for layer in self:
            features = layer(features)
        return given + features


def _conv_norm_relu(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU())


class ConvStem(nn.Module):
    """Patch embedding by three convolutions of stride 2, which lets a ViT learn from little data (Xiao et al. 2021)."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_timm: Any) -> None:
        super().__init__()
        if patch_size != 8 or img_size % 8:
            raise ValueError(f"the stem's strides make patches of 8 px, but got ({img_size=}, {patch_size=})")
        self.grid_size = (img_size // 8, img_size // 8)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.patch_size = (8, 8)
        widths = (in_chans, embed_dim // 4, embed_dim // 2, embed_dim)
        self.layers = nn.Sequential()
        for inner, outer in pairwise(widths):
            self.layers += nn.Sequential(
                nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outer), nn.GELU()
            )

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, patches, embed_dim)."""
        embedded: Tensor = self.layers(images)
        return embedded.flatten(2).transpose(1, 2)


@register_model  # type: ignore[untyped-decorator]
def cnn_3block(pretrained: bool = False, **options: Any) -> nn.Module:
    """`ThreeBlockCNN`; has no pretrained weights."""
    options = _own_options("cnn_3block", pretrained, options)
    return ThreeBlockCNN(**options)


@register_model  # type: ignore[untyped-decorator]
def cnn_3stage_cbam(pretrained: bool = False, **options: Any) -> nn.Module:
    """`ThreeStageCBAM`; has no pretrained weights."""
    options = _own_options("cnn_3stage_cbam", pretrained, options)
    return ThreeStageCBAM(**options)


@register_model  # type: ignore[untyped-decorator]
def cnn_4stage(pretrained: bool = False, **options: Any) -> nn.Module:
    """`FourStageCNN`; has no pretrained weights."""
    options = _own_options("cnn_4stage", pretrained, options)
    return FourStageCNN(**options)


@register_model  # type: ignore[untyped-decorator]
def vit_small_patch8_48(pretrained: bool = False, **options: Any) -> nn.Module:
    """A ViT made for 48 px: 36 patches of 8 px from a convolutional stem, width 192, depth 8; 3.8 M parameters."""
    options = _own_options("vit_small_patch8_48", pretrained, options)
    defaults = {
        "img_size": 48, "patch_size": 8, "embed_dim": 192, "depth": 8, "num_heads": 3, "class_token": False,
        "global_pool": "avg", "embed_layer": ConvStem,
    }  # fmt: skip
    model: nn.Module = VisionTransformer(**(defaults | options))
    return model


def _own_options(arch: str, pretrained: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Of timm's arguments those that a constructor of our own takes."""
    if pretrained:
        raise FoldwiseError(f"`{arch}` has no pretrained weights\n  fix: `model.weights: none`, or `run:<experiment>`")
    about_weights = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {name: value for name, value in options.items() if name not in about_weights}


def build_model(spec: ModelSpec, *, classes: int, channels: int) -> nn.Module:
    """Make a network, with the weights that its spec names unless those are another run's.

    Args:
        spec: The experiment's `model` section.
        classes: Number of logits.
        channels: Channels of the images; timm sums RGB filters for one channel.

    Returns:
        A module from (B, channels, image_size, image_size) to (B, classes) logits, on the CPU.

    Raises:
        HubError: If pretrained weights are neither cached nor reachable.
        FoldwiseError: If the constructor refuses an option, or the network an image of this size.
    """
    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
    if spec.dropout:
        options["drop_rate"] = spec.dropout
    if spec.drop_path:
        options["drop_path_rate"] = spec.drop_path
    config = timm.get_pretrained_cfg(spec.arch, allow_unregistered=True)
    if (config is not None and config.fixed_input_size) or spec.arch == "vit_small_patch8_48":
        options["img_size"] = spec.image_size
    if taken := sorted(options.keys() & spec.options.keys()):
        raise FoldwiseError(
            f"`model.options` holds {', '.join(f'`{key}`' for key in taken)}, which other keys of the files set\n"
            "  fix: leave that out; `model.image_size`, `dropout`, `drop_path` and the competition decide it"
        )
    options |= spec.options
    pretrained = spec.weights == "pretrained"
    if pretrained:
        options["pretrained_cfg_overlay"] = _cached_weights(spec.arch)
    try:
        model: nn.Module = timm.create_model(spec.arch, pretrained=pretrained, **options)
        if spec.head is not None:
            _replace_head(model, spec.head, spec.arch, classes)
        with torch.no_grad():  # some constructors take any image size, and only an image shows that it does not fit
            model.eval()(torch.zeros(1, channels, spec.image_size, spec.image_size))
    except OSError as error:
        raise HubError(_hub_message(spec.arch, error)) from error
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        shown = ", ".join(f"{key}={value}" for key, value in options.items() if key != "pretrained_cfg_overlay")
        raise FoldwiseError(
            f"`{spec.arch}` cannot be made with {shown} for {spec.image_size} px: {type(error).__name__}: {error}\n"
            "  fix: see `model.options`, `model.drop_path` and `model.image_size` in the spec"
        ) from error
    return model.train()


_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def _replace_head(model: nn.Module, head: HeadSpec, arch: str, classes: int) -> None:
    """Put the described classifier where the network's own one is."""
    find: Any = getattr(model, "get_classifier", lambda: None)
    own = find()
    linear = [module for module in own.modules() if isinstance(module, nn.Linear)] if isinstance(own, nn.Module) else []
    place = next((name for name, module in model.named_modules() if module is own), None)
    if not linear or not place:
        raise FoldwiseError(
            f"`model.head` cannot replace the classifier of `{arch}`, which is not of linear layers\n"
            "  fix: leave `head` out, and use `model.dropout`"
        )
    layers: list[nn.Module] = []
    width = linear[0].in_features
    rates = head.dropout or (0.0,) * (len(head.hidden) + 1)
    for outer, rate in zip((*head.hidden, classes), rates, strict=True):
        if layers:
            layers.append(_ACTIVATIONS[head.activation]())
        layers += [nn.Dropout(rate), nn.Linear(width, outer)]
        width = outer
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Sequential(*layers))


def _cached_weights(arch: str) -> dict[str, str]:
    """Point timm at the hub's cache where the weights are in it, without the network; else see whether the hub answers.

    The hub's client retries for most of a minute before it gives up; a look at the address tells at once.
    """
    config = timm.get_pretrained_cfg(arch)
    if config is None or not config.hf_hub_id:
        return {}
    for filename in (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(config.hf_hub_id, filename) if filename else None
        if isinstance(found, str):
            return {"file": found}
    if constants.HF_HUB_OFFLINE:
        raise HubError(_hub_message(arch, OSError("HF_HUB_OFFLINE is set")))
    if not urllib.request.getproxies():
        address = urllib.parse.urlsplit(constants.ENDPOINT)
        port = address.port or (80 if address.scheme == "http" else 443)
        try:
            socket.create_connection((address.hostname or "", port), timeout=10).close()
        except OSError as error:
            raise HubError(_hub_message(arch, error)) from error
    return {}


def _hub_message(arch: str, error: Exception) -> str:
    config = timm.get_pretrained_cfg(arch)
    repository = config.hf_hub_id if config is not None and config.hf_hub_id else f"timm/{arch}"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"the pretrained weights of `{arch}` are not in the local cache, and the Hugging Face Hub cannot be reached\n"
        f"  ({type(error).__name__}: {reason[:160]})\n"
        "  fix: one of\n"
        "    - run once where there is internet; the weights stay in the cache (~/.cache/huggingface, or $HF_HOME)\n"
        f"    - fetch them elsewhere with `hf download {repository}` and copy that cache folder here\n"
        '    - train from scratch: SET="model.weights=none"\n'
        '    - start from a run of your own: SET="model.weights=run:<experiment>"'
    )


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the classifier's parameters: new for every set of classes, and trained while the backbone is frozen."""
    find: Any = getattr(model, "get_classifier", lambda: None)
    classifier = find()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    inside = {id(p) for head in heads if isinstance(head, nn.Module) for p in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def place(model: nn.Module, runtime: Runtime) -> nn.Module:
    """Move a model to where it runs, in the memory format and with the attention that are fast there."""
    model.to(runtime.device).to(memory_format=runtime.memory_format)
    if runtime.device.type == "cpu":
        # The fused kernel's backward pass takes twice the time of plain matrix products at a ViT's few dozen tokens.
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", False)  # noqa: B010 - nn.Module types no attribute
    return model


class ToInput(nn.Module):
    """Stored pixels to a network's input: resize, scale to [0, 1], normalise; runs on the device."""

    mean: Tensor
    std: Tensor

    def __init__(self, image_size: int, interpolation: str, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.image_size = image_size
        self.interpolation = interpolation
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, H, W, C) uint8 -> (B, C, image_size, image_size) float32."""
        images = pixels.permute(0, 3, 1, 2).float() / 255
        if images.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            antialias = max(images.shape[-2:]) > self.image_size
            images = functional.interpolate(
                images, size, mode=self.interpolation, align_corners=False, antialias=antialias
            )
            images = images.clamp(0, 1)
        return (images - self.mean) / self.std


def to_input(spec: ModelSpec, images: Images, rows: np.ndarray) -> ToInput:
    """The way in for one network.

    Args:
        spec: The experiment's `model` section.
        images: (N, H, W, C) uint8.
        rows: Indices of the training images, which alone may set `normalize: dataset`.
    """
    channels = images.shape[-1]
    mean: Sequence[float]
    std: Sequence[float]
    if spec.normalize == "imagenet":
        mean, std = _IMAGENET
        if channels == 1:
            mean, std = (float(np.mean(mean)),), (float(np.mean(std)),)
    elif spec.normalize == "half":
        mean = std = (0.5,) * channels
    elif spec.normalize == "unit":
        mean, std = (0.0,) * channels, (1.0,) * channels
    else:
        mean, std = _pixel_statistics(images, rows)
    return ToInput(spec.image_size, spec.interpolation, mean, std)


def _pixel_statistics(images: Images, rows: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in [0, 1], from histograms, a block of rows at a time."""
    counts = np.zeros((images.shape[-1], 256))
    for start in range(0, len(rows), 1024):
        block = images[np.sort(rows)[start : start + 1024]]
        for channel in range(block.shape[-1]):
            counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ levels
    std = np.sqrt(shares @ levels**2 - mean**2)
    return mean.tolist(), np.maximum(std, 1e-3).tolist()
