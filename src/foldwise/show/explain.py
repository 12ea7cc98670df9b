"""What a kept run looks at: `oof/<exp>/report/explain.png`, heat maps over its surest mistakes and right answers.

Convolutional networks are explained by Grad-CAM, ViTs by attention rollout; CBAM shows its spatial attention beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from foldwise.data.competition import load_dataset
from foldwise.errors import Fault, FoldwiseError, RecordError
from foldwise.learn.device import Runtime
from foldwise.learn.models import SpatialAttention
from foldwise.records.store import Run, load_run, rows_of
from foldwise.runs.kept import KeptModel, kept_models, weight_files
from foldwise.show.plots import COLOURS, GRAY, INK, Floats, picture, short

MOST = 60
"""Images that one picture holds at most."""

# A coarser map says little: at 48 px a ResNet-18 ends in 2 x 2 cells, which is four quarters of a face.
_CELLS = 6
_CLASSES = 7  # bars of an image
# In inches: an image's side, steps between images and between rows, width of the bars, gap between the two halves.
_STEP, _ROW, _BARS, _GAP = 1.06, 1.3, 2.05, 0.3


@dataclass(frozen=True)
class Picked:
    """An image to explain.

    Attributes:
        id: Its id.
        fold: Of the model that explains it, which was not trained on it.
        label: Its class index; None for a test image.
        probs: (C,) as `oof.csv` or `test.csv` has them.
    """

    id: str
    fold: int
    label: int | None
    probs: Floats

    @property
    def predicted(self) -> int:
        """Index of the predicted class."""
        return int(self.probs.argmax())


@dataclass(frozen=True)
class Map:
    """A heat map of one image.

    Attributes:
        heading: Above its column.
        values: (h, w) float64 in [0, 1]; stretched over the image.
        below: A few words below it.
        over: Whether it is laid over the image.
    """

    heading: str
    values: Floats
    below: str
    over: bool


def explain(root: Path, name: str, *, ids: Sequence[str] | None, count: int, runtime: Runtime) -> Path:
    """Draw what the models of a kept run look at, each image by the model of the fold that did not see it.

    Args:
        root: The project's root.
        name: A run under `oof/`.
        ids: Images, held-out or test ones; None: half of `count` the most confident mistakes, half the surest right
            answers, of each class in turn; test images where the run held nothing out.
        count: Images where `ids` is None; 1 to 60.
        runtime: Device, precision and threads; the maps are computed in float32.

    Returns:
        `oof/<name>/report/explain.png`, which git ignores, as it shows the competition's images.

    Raises:
        RecordError: If the run is not complete, its weights are not on this machine, the images are not those of the
            run, or some id has no prediction of a model that did not see it; all such ids at once.
        DataError: If the competition is not here.
        FoldwiseError: If there are too many images, captum is not installed, or the network is not one to explain.
    """
    wanted = count if ids is None else len(set(ids))
    if not 1 <= wanted <= MOST:
        raise FoldwiseError(f"a picture explains 1 to {MOST} images, but got {wanted}\n  fix: fewer IDS, or N=16")
    run = load_run(root / "oof" / name)
    first = min(weight_files(run))[0]
    halves = pick(run, count, first) if ids is None else _named(run, ids, first)
    data = load_dataset(root, run.info["competition"])
    if data.sha256 != run.info["hashes"]["inputs"]:
        what = f"the images or labels of {run.info['competition']} are not those of the run"
        raise RecordError([Fault(f"oof/{name}", what, f"put them back, or train anew: make exp EXP={name} FRESH=1")])

    pixels = {p.id: data.images[row] for _, half in halves for p in half for row in rows_of(data.ids, np.array([p.id]))}
    maps: dict[str, list[Map]] = {}
    method, seed = "", 0
    folds = {p.fold for _, half in halves for p in half}
    explained: set[int] = set()
    for model in kept_models(run, runtime, folds=sorted(folds)):
        if model.fold in explained:  # a fold's further seeds
            continue
        explained.add(model.fold)
        seed = model.seed
        for picked in (p for _, half in halves for p in half if p.fold == model.fold):
            maps[picked.id], method = _maps(model, pixels[picked.id], picked.predicted, run.name)

    path = run.path / "report" / "explain.png"
    _draw(path, run, halves, pixels, maps, note=_note(run, halves, method, first, seed))
    return path


def pick(run: Run, count: int, first: int) -> list[tuple[str, list[Picked]]]:
    """Choose the images that tell most: where the run is surely wrong, and, to compare, where it is surely right.

    Args:
        run: A complete run.
        count: Images.
        first: Its first fold, whose model explains test images.

    Returns:
        Headings, and the images below each: `count` in all where there are so many. The right answers are the surest
        of each class in turn, since the easiest class would fill them otherwise.
    """
    if not len(run.ids):
        return [("test images", [_test_image(run, row, first) for row in range(min(count, len(run.test_ids)))])]
    predicted, confidence = run.probs.argmax(axis=1), run.probs.max(axis=1)
    by_confidence = np.lexsort((np.arange(len(run.ids)), -confidence))
    right = (predicted == run.labels)[by_confidence]
    mistakes, hits = by_confidence[~right].tolist(), by_confidence[right].tolist()
    turn = dict.fromkeys(range(len(run.classes)), 0)
    turns = []
    for row in hits:
        turn[int(predicted[row])] += 1
        turns.append(turn[int(predicted[row])])
    hits = [row for _, row in sorted(zip(turns, hits, strict=True), key=lambda pair: pair[0])]
    wrong = max((count + 1) // 2, count - len(hits))
    halves = [
        ("the most confident mistakes", mistakes[:wrong]),
        ("the surest right answers, of each class in turn", hits[: count - len(mistakes[:wrong])]),
    ]
    return [(heading, [_held_out(run, row) for row in rows]) for heading, rows in halves if rows]


def _held_out(run: Run, row: int) -> Picked:
    return Picked(str(run.ids[row]), int(run.fold[row]), int(run.labels[row]), run.probs[row])


def _test_image(run: Run, row: int, first: int) -> Picked:
    return Picked(str(run.test_ids[row]), first, None, run.test_probs[row])


def _named(run: Run, ids: Sequence[str], first: int) -> list[tuple[str, list[Picked]]]:
    """The images asked for, in their order, in one or two halves."""
    held_out = {image: row for row, image in enumerate(run.ids.tolist())}
    test = {image: row for row, image in enumerate(run.test_ids.tolist())}
    asked = list(dict.fromkeys(ids))
    if unknown := [image for image in asked if image not in held_out and image not in test]:
        noun = "id" if len(unknown) == 1 else "ids"
        what = f"has no prediction by a model that did not see the image, for {len(unknown)} {noun}: "
        some = ", ".join([*list(held_out)[:3], *list(test)[:3]])
        fix = f"ids of its oof.csv or test.csv, such as {some}"
        raise RecordError([Fault(f"oof/{run.name}", what + ", ".join(unknown), fix)])
    picked = [_held_out(run, held_out[i]) if i in held_out else _test_image(run, test[i], first) for i in asked]
    middle = (len(picked) + 1) // 2 if len(picked) > 4 else len(picked)
    return [("", half) for half in (picked[:middle], picked[middle:]) if half]


def grad_cam(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Grad-CAM: where a convolutional network sees evidence for a class (Selvaraju et al. 2017, equations 1 and 2).

    The map is that of `feature_layer`.

    Args:
        model: Maps (B, C, S, S) to (B, classes) logits; put into eval mode.
        inputs: (B, C, S, S) float32.
        targets: (B,) int64 class indices.

    Returns:
        (B, S, S) float32, at least 0, not scaled; enlarged bilinearly from the feature map. All 0 where nothing speaks
        for the class.

    Raises:
        FoldwiseError: If captum is not installed, or the network has no feature map.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError:
        raise FoldwiseError('captum is not installed\n  fix: pip install "foldwise[explain]"') from None
    name = feature_layer(model, inputs)
    channels_last = _channels_last(model)
    # What captum watches: the feature map as (B, C, h, w), which Swin and others keep as (B, h, w, C).
    probe = nn.Identity()

    def through(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        watched: Tensor = probe(output.permute(0, 3, 1, 2) if channels_last else output)
        return watched.permute(0, 2, 3, 1) if channels_last else watched

    with ExitStack() as hooks:
        hooks.callback(model.get_submodule(name).register_forward_hook(through).remove)
        cam: Tensor = LayerGradCam(model, probe).attribute(inputs, targets, relu_attributions=True)
    return functional.interpolate(cam.detach(), inputs.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def feature_layer(model: nn.Module, inputs: Tensor) -> str:
    """Name the module whose output Grad-CAM looks at.

    It is the last step of the network that gives a feature map of at least 6 cells a side: at the image size that a
    network is made for, the last map before global pooling. A network made for 224 px shrinks 48 px to 2 cells, in
    which nothing can be seen; then it is the last map before that, finer, but less of the class. Steps are the model's
    own modules, and those of an `nn.Sequential` in it, but not the insides of a block.

    Args:
        model: As for `grad_cam`.
        inputs: (B, C, S, S) float32.

    Raises:
        FoldwiseError: If the network has no feature map that its classifier rests on, as a ViT or an MLP-Mixer.
    """
    made: list[tuple[str, tuple[int, ...]]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim > 2:
                made.append((name, tuple(output.shape)))

        return hook

    model.eval()
    with ExitStack() as hooks, torch.no_grad():
        for name, module in _steps(model):
            hooks.callback(module.register_forward_hook(note(name)).remove)
        model(inputs[:1])
    first = 1 if _channels_last(model) else 2
    maps = [(name, min(shape[first : first + 2])) for name, shape in made if len(shape) == 4]
    maps = [(name, side) for name, side in maps if side > 1]
    if not maps or len(made[-1][1]) == 3:
        raise FoldwiseError(
            "the network has no feature map that its classifier rests on\n"
            "  fix: Grad-CAM is for convolutional networks; explain a run of one of them"
        )
    enough = min(_CELLS, max(side for _, side in maps))
    return [name for name, side in maps if side >= enough][-1]


def _steps(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_children():
        yield prefix + name, module
        if isinstance(module, nn.Sequential):
            yield from _steps(module, f"{prefix}{name}.")


def _channels_last(model: nn.Module) -> bool:
    """Whether feature maps are (B, h, w, C), as timm says of a network."""
    return getattr(model, "output_fmt", None) == "NHWC"


def attention_rollout(model: nn.Module, inputs: Tensor) -> Tensor:
    """Attention rollout: which patches a ViT's class token, or the mean of its patches, draws on.

    It follows attention alone, not what a token says, and so is the same for every class (Abnar and Zuidema 2020).

    Args:
        model: A timm ViT with global attention over a grid of patches; put into eval mode.
        inputs: (B, C, S, S) float32.

    Returns:
        (B, h, w) float32 shares of the patches, summing to 1: of the class token's row where the classifier reads
        that, else of the mean over the patches' rows. What is drawn from the class token itself is left out.

    Raises:
        FoldwiseError: If the network has no such attention.
    """
    attentions = _attentions(model, inputs)
    if not attentions:
        raise FoldwiseError(
            "the network has no global attention over a grid of patches\n"
            "  fix: attention rollout is for ViTs; explain a run of one of them"
        )
    before = int(getattr(model, "num_prefix_tokens", 0))
    drawn = rollout(attentions)[..., before:]
    of_class_token = before > 0 and getattr(model, "global_pool", None) == "token"
    shares = drawn[:, 0] if of_class_token else drawn[:, before:].mean(1)
    return (shares / shares.sum(1, keepdim=True)).reshape(-1, *_grid(model))


def rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Multiply attention through the layers (Abnar and Zuidema 2020, equation 1).

    A layer passes half of each token on as it is, for its residual connection, and half by the mean of its heads.

    Args:
        attentions: A layer each, first to last: (B, heads, N, N), rows summing to 1.

    Returns:
        (B, N, N) float32: what the last layer's token (row) draws from each input token (column); rows sum to 1.
    """
    size = attentions[0].shape[-1]
    unit = torch.eye(size, device=attentions[0].device)
    through = unit.expand(len(attentions[0]), size, size)
    for attention in attentions:
        through = (attention.float().mean(1) + unit) / 2 @ through
    return through


def _grid(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of patches; (0, 0) where the network has no such grid."""
    grid: Any = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return (int(grid[0]), int(grid[1])) if isinstance(grid, tuple) else (0, 0)


def _attentions(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Attention of every layer, (B, heads, N, N); none unless all of it is over all patches."""
    kept: list[Tensor] = []
    model.eval()
    with ExitStack() as hooks, torch.no_grad(), _plain_attention(model):
        for name, module in model.named_modules():
            # timm passes attention through this dropout; its own AttentionExtract would leave its hooks behind.
            if name.endswith("attn_drop"):
                hooks.callback(module.register_forward_hook(lambda _m, _i, output: kept.append(output)).remove)
        model(inputs)
    rows, columns = _grid(model)
    size = rows * columns + int(getattr(model, "num_prefix_tokens", 0))
    whole = rows > 0 and all(a.ndim == 4 and (len(a), *a.shape[2:]) == (len(inputs), size, size) for a in kept)
    return kept if whole else []


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Have attention computed step by step, as the fused kernel never holds it."""
    fused: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def spatial_attention(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """CBAM's spatial attention (Woo et al. 2018), of each stage from first to last.

    Args:
        model: Put into eval mode.
        inputs: (B, C, S, S) float32.

    Returns:
        (B, h, w) float32 in (0, 1) a stage; none for a network without CBAM.
    """
    kept: list[Tensor] = []
    model.eval()
    with ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            if isinstance(module, SpatialAttention):
                hooks.callback(module.register_forward_hook(lambda _m, _i, output: kept.append(output[:, 0])).remove)
        model(inputs)
    return kept


def _maps(model: KeptModel, pixels: NDArray[np.uint8], target: int, run: str) -> tuple[list[Map], str]:
    """The maps of one image, and what is to be said about them."""
    network = model.model
    inputs = model.prepare(torch.from_numpy(np.array(pixels[None])).to(model.runtime.device))
    if _attentions(network, inputs):
        shares = _array(attention_rollout(network, inputs))
        said = (
            "Rollout: attention followed through all layers (Abnar and Zuidema 2020), the same for every class; each "
            "map from its least to its greatest share, the number is the greatest over the mean: near 1 it looks "
            "everywhere alike."
        )
        return [
            Map(
                "attention rollout",
                _scaled(shares, shares.min()),
                f"peak {shares.max() / shares.mean():.1f} x mean",
                over=True,
            )
        ], said
    try:
        layer = feature_layer(network, inputs)
    except FoldwiseError:
        raise FoldwiseError(
            f"`{model.spec.arch}` has neither feature maps that its classifier rests on nor global attention\n"
            f"  fix: explain a run of a convolutional network or a ViT; see the mistakes: make report EXP={run}"
        ) from None
    cam = _array(grad_cam(network, inputs, torch.tensor([target], device=inputs.device)))
    maps = [Map("Grad-CAM", _scaled(cam, 0), "" if cam.max() > 0 else "nothing speaks for it", over=True)]
    said = (
        f"Grad-CAM: evidence for the predicted class at `{layer}` (Selvaraju et al. 2017), each map scaled to its own "
        "maximum."
    )
    for stage, attended in enumerate(spatial_attention(network, inputs), start=1):
        values = _array(attended)
        below = f"{' x '.join(map(str, values.shape))}, {values.min():.2f} to {values.max():.2f}"
        maps.append(Map(f"attention {stage}", _scaled(values, values.min()), below, over=False))
        said += " Attention: CBAM's spatial weights of each stage, from least to greatest." if stage == 1 else ""
    return maps, said


def _scaled(values: Floats, low: float) -> Floats:
    """`low` to 0 and the greatest to 1; all 0 where none is above `low`."""
    return np.clip((values - low) / max(float(values.max()) - low, 1e-12), 0, 1)


def _array(maps: Tensor) -> Floats:
    return maps[0].double().cpu().numpy()


def _note(run: Run, halves: Sequence[tuple[str, list[Picked]]], method: str, first: int, seed: int) -> str:
    picked = [p for _, half in halves for p in half]
    lines = [method]
    if any(p.label is not None for p in picked):
        lines.append("Each image is explained by the model of its fold, which did not see it.")
    if any(p.label is None for p in picked):
        lines.append(f"Test images, which no model saw, are explained by the model of fold {first} alone.")
    if len(run.info["seeds"]) > 1:
        lines.append(f"Of several seeds it is {seed}.")
    lines.append("Bars: the probabilities of the run of record; maps are of the image as it is, without TTA.")
    return " ".join(lines)


def _draw(
    path: Path,
    run: Run,
    halves: Sequence[tuple[str, list[Picked]]],
    pixels: dict[str, NDArray[np.uint8]],
    maps: dict[str, list[Map]],
    *,
    note: str,
) -> None:
    """Draw a row an image: the image, its maps, its probabilities; two halves side by side."""
    headings = ["image", *(each.heading for each in next(iter(maps.values())))]
    width = len(headings) * _STEP + _BARS
    rows = max(len(half) for _, half in halves)
    whole = len(halves) * width + (len(halves) - 1) * _GAP
    top = 0.5 if halves[0][0] else 0.25
    with picture(
        path, max(whole + 0.3, 6.5), rows * _ROW + top + 0.95, title=f"{run.name}: what it looks at", note=note
    ) as figure:
        axes = figure.subplots()  # one for all: a pair an image takes ten times as long
        axes.set_axis_off()
        for number, (heading, half) in enumerate(halves):
            left = number * (width + _GAP)
            axes.text(left, -0.3, heading, fontsize=10, va="bottom")
            for column, text in enumerate(headings):
                axes.text(left + column * _STEP + 0.5, -0.06, text, fontsize=7, color=GRAY, ha="center", va="bottom")
            for row, picked in enumerate(half):
                _draw_row(axes, left, row * _ROW, run.classes, picked, pixels[picked.id], maps[picked.id])
        axes.set_xlim(-0.02, whole)
        axes.set_ylim(rows * _ROW - 0.02, -top)
        axes.set_anchor("NW")


def _draw_row(
    axes: Axes,
    left: float,
    top: float,
    classes: Sequence[str],
    picked: Picked,
    pixels: NDArray[np.uint8],
    maps: Sequence[Map],
) -> None:
    seen = short(classes[picked.predicted], 14)
    if picked.label is None:
        said = f"test image → {seen}"
    elif picked.label == picked.predicted:
        said = f"{seen}, right"
    else:
        said = f"{short(classes[picked.label], 14)} → {seen}"
    name = picked.id if len(picked.id) <= 14 else "…" + picked.id[-13:]
    caption = f"{name}   {said}   {picked.probs.max():.2f}   by fold {picked.fold}"
    axes.text(left, top + 0.14, caption, fontsize=7.5, va="bottom")
    top += 0.18
    height, width = (side / max(pixels.shape[:2]) for side in pixels.shape[:2])
    for column, each in enumerate([None, *maps]):
        x = left + column * _STEP + (1 - width) / 2
        extent = (x, x + width, top + height, top)
        gray = pixels.mean(axis=2)  # so that a colour is the map's alone
        if each is None and pixels.shape[2] == 3:
            axes.imshow(pixels, extent=extent, interpolation="bicubic")
        elif each is None or each.over:
            axes.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="bicubic")
        if each is None:
            continue
        alpha = 0.15 + 0.45 * each.values if each.over else None
        smooth = "bilinear" if each.over else "nearest"
        axes.imshow(each.values, cmap="inferno", vmin=0, vmax=1, alpha=alpha, extent=extent, interpolation=smooth)
        axes.text(
            left + column * _STEP + 0.5,
            top + height + 0.015,
            each.below,
            fontsize=5.5,
            color=GRAY,
            ha="center",
            va="top",
        )
    _draw_bars(axes, left + (1 + len(maps)) * _STEP, top, classes, picked)


def _draw_bars(axes: Axes, left: float, top: float, classes: Sequence[str], picked: Picked) -> None:
    """Bars of the classes, the likeliest ones where there are many, the true one always among them."""
    shown = list(range(len(classes)))
    if len(shown) > _CLASSES:
        shown = np.argsort(-picked.probs, kind="stable")[:_CLASSES].tolist()
        if picked.label is not None and picked.label not in shown:
            shown[-1] = picked.label
    step = 1 / _CLASSES
    start, length = left + 0.78, 0.85
    for place, index in enumerate(shown):
        middle = top + (place + 0.5) * step
        colour = COLOURS[2] if index == picked.label else COLOURS[1] if index == picked.predicted else "#b8b8b8"
        if picked.label is None and index == picked.predicted:
            colour = COLOURS[0]
        ink = INK if index in (picked.label, picked.predicted) else GRAY
        share = float(picked.probs[index])
        axes.text(start - 0.05, middle, short(classes[index], 11), fontsize=6.5, color=ink, ha="right", va="center")
        axes.add_patch(Rectangle((start, middle - 0.35 * step), length * share, 0.7 * step, color=colour, lw=0))
        axes.text(start + length * share + 0.04, middle, f"{share:.2f}", fontsize=6, color=ink, va="center")
