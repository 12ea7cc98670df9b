"""Probabilities are probabilities, depend on the image alone, and are averaged over views that do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from foldwise.errors import DivergedError
from foldwise.learn.device import Runtime
from foldwise.learn.models import ToInput
from foldwise.learn.predict import parse_view, predict, render

ALL_VIEWS = ["identity", "hflip", "shift", "multicrop", "zoom_1.1", "rotate_10", "shift+hflip"]
PREPARE = ToInput(16, "bilinear", [0.5], [0.25])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(1536, 4)
    )


def probabilities(
    model: nn.Module, images: np.ndarray, views: list[str], runtime: Runtime, batch_size: int = 8
) -> torch.Tensor:
    parsed = [parse_view(view) for view in views]
    return predict(model, images, parsed, prepare=PREPARE, runtime=runtime, batch_size=batch_size)


def square(size: int) -> torch.Tensor:
    """(2, 1, size, size) noise."""
    return torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(3))


# --- predict ---


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_are_probabilities(model: nn.Module, pixels: np.ndarray, precision: str) -> None:
    probs = probabilities(model, pixels, ALL_VIEWS, Runtime(torch.device("cpu"), precision, 1))
    assert probs.shape == (26, 4)
    assert probs.dtype == torch.float32
    assert float(probs.min()) > 0
    assert float((probs.sum(1) - 1).abs().max()) < 1e-5
    assert float(probs.std(0).min()) > 0


def test_an_image_does_not_depend_on_how_many_others_there_are(
    model: nn.Module, pixels: np.ndarray, cpu: Runtime
) -> None:
    sizes: set[int] = set()
    model.register_forward_pre_hook(lambda _module, inputs: sizes.add(len(inputs[0])))
    every = probabilities(model, pixels, ALL_VIEWS, cpu)
    for count in (1, 7, 8, 9, 25):
        assert torch.equal(probabilities(model, pixels[:count], ALL_VIEWS, cpu), every[:count])
    assert sizes == {8}, "some kernels round by the size of the batch"


def test_images_may_be_memory_mapped_and_stay_as_they_are(
    model: nn.Module, pixels: np.ndarray, cpu: Runtime, tmp_path: Path
) -> None:
    np.save(tmp_path / "pixels.npy", pixels)
    mapped = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    assert torch.equal(probabilities(model, mapped, ["hflip"], cpu), probabilities(model, pixels, ["hflip"], cpu))


def test_the_model_is_left_in_eval_mode_and_unchanged(model: nn.Module, pixels: np.ndarray, cpu: Runtime) -> None:
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probs = probabilities(model, pixels, ["identity"], cpu)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not probs.requires_grad


def test_no_images_give_no_rows(model: nn.Module, pixels: np.ndarray, cpu: Runtime) -> None:
    assert len(probabilities(model, pixels[:0], ["identity"], cpu)) == 0


def test_identity_is_softmax_of_the_plain_forward_pass(model: nn.Module, pixels: np.ndarray, cpu: Runtime) -> None:
    probs = probabilities(model, pixels, ["identity"], cpu, batch_size=26)
    with torch.no_grad():
        expected = model.eval()(PREPARE(torch.from_numpy(pixels))).softmax(1)
    torch.testing.assert_close(probs, expected)


def test_hflip_is_identity_of_mirrored_images_to_the_bit(model: nn.Module, pixels: np.ndarray, cpu: Runtime) -> None:
    mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
    assert torch.equal(probabilities(model, pixels, ["hflip"], cpu), probabilities(model, mirrored, ["identity"], cpu))


def test_views_weigh_the_same_whatever_their_renderings(model: nn.Module, pixels: np.ndarray, cpu: Runtime) -> None:
    together = probabilities(model, pixels, ALL_VIEWS, cpu)
    alone = [probabilities(model, pixels, [view], cpu) for view in ALL_VIEWS]
    torch.testing.assert_close(together, torch.stack(alone).mean(0))
    inputs = PREPARE(torch.from_numpy(pixels))
    with torch.no_grad():
        by_hand = [model(render(inputs, rendering)).softmax(1) for rendering in parse_view("multicrop").renderings]
    torch.testing.assert_close(alone[ALL_VIEWS.index("multicrop")], torch.stack(by_hand).mean(0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_logit_that_is_not_finite_names_its_first_row(pixels: np.ndarray, cpu: Runtime, bad: float) -> None:
    class Diverged(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(images), 3)
            logits[:, 1] = torch.where(images.amax((1, 2, 3)) > 1.9, bad, 0.0)
            return logits

    images = pixels // 2
    images[[11, 19]] = 255
    with pytest.raises(DivergedError) as caught:
        probabilities(Diverged(), images, ["identity", "hflip"], cpu)
    assert str(caught.value) == (
        "the logits of row 11 (of 26) are not finite: the model has diverged\n"
        "  fix: a smaller `optim.lr`, `optim.clip_grad_norm: 1.0`, or `train.precision: fp32`"
    )
    assert caught.value.exit_code == 4
    assert probabilities(Diverged(), images[:11], ["identity"], cpu).isfinite().all()


# --- Views ---


UNKNOWN = ["", "vflip", "zoom", "zoom_", "rotate_-5", "hflip2", "identity ", "hflip+hflip", "shift+shift", "+hflip"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_view_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^unknown view '{re.escape(name)}'$"):
        parse_view(name)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("identity", 1), ("hflip", 1), ("zoom_1.1", 1), ("zoom_0.8", 1), ("rotate_10", 2), ("shift", 4)),
        *(("multicrop", 5), ("identity+hflip", 2), ("zoom_1.1+hflip", 2), ("rotate_10+hflip", 4), ("shift+hflip", 8)),
    ],
)
def test_a_view_has_its_renderings_and_they_differ(name: str, count: int) -> None:
    view = parse_view(name)
    assert view.name == name
    rendered = [render(square(24), rendering) for rendering in view.renderings]
    assert len(rendered) == count
    assert all(image.shape == (2, 1, 24, 24) for image in rendered)
    assert len({tuple(image.flatten().tolist()) for image in rendered}) == count


def test_identity_and_hflip_are_exact() -> None:
    images = square(24)
    assert render(images, parse_view("identity").renderings[0]) is images
    assert torch.equal(render(images, parse_view("hflip").renderings[0]), images.flip(-1))


def test_zoom_1_is_nearly_identity() -> None:
    (rendering,) = parse_view("zoom_1.0").renderings
    torch.testing.assert_close(render(square(48), rendering), square(48), atol=1e-4, rtol=0)


def test_zoom_enlarges_the_middle() -> None:
    (rendering,) = parse_view("zoom_2").renderings
    expected = functional.interpolate(square(48)[..., 12:36, 12:36], (48, 48), mode="bilinear", align_corners=False)
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(render(square(48), rendering)[inner], expected[inner], atol=1e-4, rtol=0)


def test_a_small_zoom_shows_mirrored_borders() -> None:
    (rendering,) = parse_view("zoom_0.5").renderings
    out = render(square(48), rendering)
    mirrored = torch.from_numpy(np.pad(square(48).numpy(), ((0, 0), (0, 0), (24, 24), (24, 24)), "symmetric"))
    torch.testing.assert_close(out, functional.avg_pool2d(mirrored, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["identity", "zoom_1.1", "rotate_10", "shift", "multicrop"])
def test_a_mirrored_view_is_the_view_and_the_view_of_the_mirrored_image(
    model: nn.Module, pixels: np.ndarray, cpu: Runtime, name: str
) -> None:
    mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
    expected = (probabilities(model, pixels, [name], cpu) + probabilities(model, mirrored, [name], cpu)) / 2
    torch.testing.assert_close(probabilities(model, pixels, [f"{name}+hflip"], cpu), expected)


def test_rotate_turns_both_ways() -> None:
    turned = [render(square(24), rendering) for rendering in parse_view("rotate_90").renderings]
    expected = [square(24).rot90(1, (2, 3)), square(24).rot90(-1, (2, 3))]
    if not torch.allclose(turned[0], expected[0], atol=1e-4):
        expected.reverse()
    torch.testing.assert_close(turned[0], expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(turned[1], expected[1], atol=1e-4, rtol=0)


def test_shift_moves_by_a_twelfth_each_way() -> None:
    padded = np.pad(square(48).numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), "symmetric")
    windows = [(4, 8), (4, 0), (8, 4), (0, 4)]  # down and right from the padded corner
    for rendering, (top, left) in zip(parse_view("shift").renderings, windows, strict=True):
        expected = torch.from_numpy(padded[..., top : top + 48, left : left + 48])
        torch.testing.assert_close(render(square(48), rendering), expected, atol=1e-4, rtol=0)


def test_multicrop_shows_the_middle_and_four_corners_of_nine_tenths() -> None:
    inner = (..., slice(1, -1), slice(1, -1))
    found = set()
    for rendering in parse_view("multicrop").renderings:
        out = render(square(40), rendering)[inner]
        for top, left in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)):
            crop = square(40)[..., top : top + 36, left : left + 36]
            resized = functional.interpolate(crop, (40, 40), mode="bilinear", align_corners=False)[inner]
            if torch.allclose(out, resized, atol=1e-4):
                found.add((top, left))
    assert len(found) == 5
