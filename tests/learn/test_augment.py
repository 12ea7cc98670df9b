"""Augmentation depends on keys alone, an epoch is complete, and what is mixed adds up."""

from __future__ import annotations

import json
import random
import threading
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foldwise.errors import FoldwiseError
from foldwise.learn.augment import Augment, Batches, mix, sampling_weights
from foldwise.spec.model import MixSpec

SCHEMA = Path(__file__).resolve().parents[2] / "experiments" / "schema.json"

FLIPS: list[dict[str, dict[str, Any]]] = [{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}}]
SEVERAL: list[dict[str, dict[str, Any]]] = [
    {"HorizontalFlip": {"p": 0.5}},
    {"Affine": {"rotate": [-15, 15], "translate_percent": [-0.1, 0.1], "scale": [0.9, 1.1], "p": 0.8}},
    {"CoarseDropout": {"num_holes_range": [1, 3], "p": 0.5}},
    {"GaussNoise": {"p": 0.5}},
]
NO_CHANGE: list[dict[str, dict[str, Any]]] = []


def global_states() -> tuple[Any, ...]:
    return (*np.random.get_state()[1].tolist(), random.getstate(), *torch.get_rng_state().tolist())  # noqa: NPY002


def make_batches(
    images: np.ndarray, transforms: list[dict[str, dict[str, Any]]] = NO_CHANGE, **options: Any
) -> Batches:
    defaults: dict[str, Any] = {"rows": np.arange(len(images)), "batch_size": 8, "key": (42, 1)}
    return Batches(images, augment=Augment(transforms, images.shape[1:]), **(defaults | options))


def epoch_pixels(batches: Batches, epoch: int = 0) -> torch.Tensor:
    return torch.cat([batch.pixels for batch in batches.epoch(epoch)])


# --- One image ---


def test_two_transforms_of_even_odds_are_uncorrelated() -> None:
    corners = np.arange(4, dtype=np.uint8).reshape(2, 2, 1)
    augment = Augment(FLIPS, corners.shape)
    seen = np.array([augment(corners, (42, 0, 0, position))[0, 0, 0] for position in range(2_000)])
    mirrored, upside_down = seen % 2, seen // 2
    for fired in (mirrored, upside_down):
        assert abs(fired.mean() - 0.5) < 0.05
        assert abs(np.corrcoef(fired[:-1], fired[1:])[0, 1]) < 0.08
    assert abs(np.corrcoef(mirrored, upside_down)[0, 1]) < 0.08


def test_an_image_depends_on_its_key_alone(pixels: np.ndarray) -> None:
    first, second = Augment(SEVERAL, pixels.shape[1:]), Augment(SEVERAL, pixels.shape[1:])
    forth = [first(image, (1, 2, 3, place)) for place, image in enumerate(pixels)]
    back = [second(pixels[place], (1, 2, 3, place)) for place in reversed(range(len(pixels)))][::-1]
    assert np.array_equal(forth, back)
    other = [first(image, (1, 2, 4, place)) for place, image in enumerate(pixels)]
    assert np.mean([np.array_equal(a, b) for a, b in zip(forth, other, strict=True)]) < 0.5


def test_without_transforms_the_image_is_itself(pixels: np.ndarray) -> None:
    assert Augment([], (16, 16, 1))(pixels[0], (0, 0, 0, 0)).base is pixels


@pytest.mark.parametrize("name", ["MedianBlur", "RandomRotate90", "ToSepia", "HorizontalFlip", "Affine"])
def test_unknown_parameters_are_refused(name: str) -> None:
    Augment([{name: {"p": 0.5}}], (16, 16, 3))
    with pytest.raises(FoldwiseError, match=rf"^`augment\.1\.{name}` is refused by albumentations: .*probability"):
        Augment([{"VerticalFlip": {}}, {name: {"probability": 0.5}}], (16, 16, 3))


def test_lists_become_the_tuples_that_albumentations_wants() -> None:
    augment = Augment([{"Affine": {"rotate": [90, 90], "p": 1.0}}], (5, 5, 1))
    image = np.arange(25, dtype=np.uint8).reshape(5, 5, 1)
    assert np.array_equal(augment(image, (0, 0, 0, 0)), np.rot90(image, -1)) or np.array_equal(
        augment(image, (0, 0, 0, 0)), np.rot90(image)
    )


def test_another_shape_is_refused() -> None:
    with pytest.raises(FoldwiseError) as caught:
        Augment([{"Resize": {"height": 32, "width": 24}}], (16, 16, 1))
    assert str(caught.value) == (
        "`augment` turns (16, 16, 1) uint8 images into (32, 24, 1) uint8\n"
        "  fix: keep the native size and type; `model.image_size` and `model.normalize` do the rest"
    )


@pytest.mark.parametrize(
    "entry",
    [
        {"ToFloat": {}},
        {"ToRGB": {}},
        {"RandomCrop": {"height": 8, "width": 8, "p": 1e-9}},
        {"RandomFog": {"p": 1e-9}},
        {"ChannelDropout": {}},
        {"ISONoise": {}},
        {"Crop": {"x_max": 99, "y_max": 99}},
    ],
)
def test_what_gray_images_cannot_bear_is_refused_before_training(entry: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(FoldwiseError, match="\n  fix: "):
        Augment([{"HorizontalFlip": {}}, entry], (16, 16, 1))


def test_a_shape_that_changes_now_and_then_is_refused_when_it_does(pixels: np.ndarray) -> None:
    augment = Augment.__new__(Augment)
    augment._transforms = [{"RandomCrop": {"height": 8, "width": 8, "p": 0.5}}]
    augment._compose_here = threading.local()
    with pytest.raises(FoldwiseError, match=r"turns \(16, 16, 1\) uint8 images into \(8, 8, 1\) uint8"):
        list(Batches(pixels, np.arange(26), augment, batch_size=8, key=(0, 0)).epoch(0))


def test_every_transform_is_pure_and_leaves_images_and_global_generators_alone() -> None:
    catalogue = json.loads(SCHEMA.read_text(encoding="utf-8"))["properties"]["augment"]["items"]["properties"]
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    images.setflags(write=False)
    tried = 0
    for name, schema in catalogue.items():
        needed = {key: [3, 3] if key == "num_grid_xy" else 24 for key in schema.get("required", [])}
        entry = {name: {**needed, "p": 1.0}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                first, second = Augment([entry], (24, 24, 3)), Augment([entry], (24, 24, 3))
                forth = [first(image, (1, 2, 3, place)) for place, image in enumerate(images)]
            except FoldwiseError:
                continue
            before = global_states()
            back = [second(images[place], (1, 2, 3, place)) for place in (2, 1, 0)][::-1]
        assert np.array_equal(forth, back), name
        assert before == global_states(), name
        tried += 1
    assert tried > 70


# --- An epoch ---


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 3))
@settings(max_examples=40)
def test_every_row_comes_once_an_epoch(count: int, batch_size: int, epoch: int) -> None:
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    rows = np.arange(100)[::2][:count]
    batches = make_batches(images, rows=rows, batch_size=batch_size)
    seen = list(batches.epoch(epoch))
    assert len(seen) == len(batches)
    assert [batch.key for batch in seen] == [(42, 1, epoch, index) for index in range(len(seen))]
    drawn = torch.cat([batch.rows for batch in seen])
    # a last batch of one image sits out, but where it is all there is
    left_out = count % batch_size == 1 and count > 1 and batch_size > 1
    assert len(drawn) == count - left_out
    assert set(drawn.tolist()) <= set(rows.tolist())
    assert len(set(drawn.tolist())) == len(drawn)
    assert torch.equal(torch.cat([batch.pixels for batch in seen]).flatten(), drawn.to(torch.uint8))
    assert all(batch.pixels.dtype == torch.uint8 and batch.rows.dtype == torch.int64 for batch in seen)


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_workers_and_the_past_change_nothing(workers: int, pixels: np.ndarray) -> None:
    expected = epoch_pixels(make_batches(pixels, SEVERAL, workers=2), epoch=2)
    random.seed(workers)
    torch.manual_seed(workers)
    before = global_states()
    batches = make_batches(pixels, SEVERAL, workers=workers)
    stored = pixels.copy()
    epoch_pixels(batches, epoch=1)
    assert torch.equal(epoch_pixels(batches, epoch=2), expected)
    assert before == global_states()
    assert np.array_equal(pixels, stored)


def test_epochs_folds_and_seeds_differ_in_order_and_pixels(pixels: np.ndarray) -> None:
    batches = make_batches(pixels, SEVERAL)
    others = [make_batches(pixels, SEVERAL, key=key) for key in ((42, 2), (43, 1))]
    orders = [batches.order(0), batches.order(1), *(other.order(0) for other in others)]
    assert len({tuple(order) for order in orders}) == 4
    same_place = [
        batch(pixels[0], (*key, 0)) for batch in [Augment(SEVERAL, (16, 16, 1))] for key in [(42, 1, 0), (42, 1, 1)]
    ]
    assert not np.array_equal(*same_place)
    assert not torch.equal(epoch_pixels(batches, 0), epoch_pixels(batches, 1))


def test_images_may_be_memory_mapped(pixels: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "pixels.npy", pixels)
    mapped = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    assert torch.equal(epoch_pixels(make_batches(mapped, SEVERAL)), epoch_pixels(make_batches(pixels, SEVERAL)))


@pytest.mark.parametrize("kind", ["balanced", "sqrt"])
def test_a_sampler_draws_classes_by_their_shares(kind: str) -> None:
    labels = np.repeat([0, 1, 2], [2_700, 240, 60])
    weights = sampling_weights(kind, labels, 4)
    assert weights is not None
    batches = make_batches(np.zeros((3_000, 1, 1, 1), dtype=np.uint8), weights=weights)
    drawn = np.concatenate([labels[batches.order(epoch)] for epoch in range(4)])
    counts = np.bincount(labels)
    expected = np.full(3, 1 / 3) if kind == "balanced" else np.sqrt(counts) / np.sqrt(counts).sum()
    assert len(drawn) == 12_000
    assert np.abs(np.bincount(drawn) / len(drawn) - expected).max() < 4 * np.sqrt(0.25 / len(drawn))
    repeats = Counter(batches.order(0).tolist()).most_common(1)[0][1]
    assert repeats > 1


def test_no_sampler_has_no_weights_and_ratios_are_as_documented() -> None:
    labels = np.array([0, 0, 0, 1])
    assert sampling_weights("none", labels, 2) is None
    assert sampling_weights("balanced", labels, 2).tolist() == pytest.approx([4 / 3, 4 / 3, 4 / 3, 4])
    assert sampling_weights("sqrt", labels, 2).tolist() == pytest.approx(np.sqrt([4 / 3, 4 / 3, 4 / 3, 4]).tolist())


def augment_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("augment")]


def test_leaving_an_epoch_early_leaves_no_thread_and_little_work() -> None:
    calls: list[int] = []

    class Counting(Augment):
        def __call__(self, image: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
            calls.append(1)
            return image

    images = np.zeros((400, 4, 4, 1), dtype=np.uint8)
    batches = Batches(images, np.arange(400), Counting([], (4, 4, 1)), batch_size=4, key=(0, 0))
    epoch = batches.epoch(0)
    for _batch in epoch:
        break
    epoch.close()
    assert augment_threads() == []
    assert 4 <= len(calls) <= 4 * 6, "only a few batches are prepared ahead"


def test_a_fault_in_a_thread_reaches_the_loop_and_ends_the_threads(pixels: np.ndarray) -> None:
    class Failing(Augment):
        def __call__(self, image: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
            if key[-1] == 10:
                raise FoldwiseError("the eleventh")
            return image

    batches = Batches(pixels, np.arange(26), Failing([], (16, 16, 1)), batch_size=4, key=(0, 0))
    seen = []
    with pytest.raises(FoldwiseError, match="the eleventh"):
        seen.extend(batches.epoch(0))
    assert augment_threads() == []


# --- Mixing ---
#
# Image i of a batch of B is 1 in channel i and 0 in the others, and its target is row i of the identity. So after any
# mixing the mean of the pixels in channel c is the share of image c, which is what the target must say.


def who_is_who(count: int, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.eye(count)
    return targets[:, :, None, None].expand(count, count, size, size).contiguous(), targets


alphas = st.sampled_from([0.0, 0.1, 0.4, 1.0, 3.0])
shares = st.sampled_from([0.0, 0.3, 1.0])


@given(st.integers(1, 9), alphas, alphas, shares, shares, st.integers(0, 10_000))
@settings(max_examples=200)
def test_targets_tell_the_share_of_pixels(
    count: int, mixup: float, cutmix: float, prob: float, switch: float, index: int
) -> None:
    images, targets = who_is_who(count)
    kept = images.clone(), targets.clone()
    spec = MixSpec(mixup_alpha=mixup, cutmix_alpha=cutmix, prob=prob, switch_prob=switch)
    mixed_images, mixed_targets = mix(images, targets, spec, (42, 0, 1, index))
    torch.testing.assert_close(mixed_images.mean((2, 3)), mixed_targets)
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(count))
    assert mixed_images.dtype == mixed_targets.dtype == torch.float32
    assert float(mixed_targets.min()) >= 0
    assert torch.equal(images, kept[0])
    assert torch.equal(targets, kept[1])
    if prob == 0 or (mixup == 0 and cutmix == 0):
        assert mixed_images is images
        assert mixed_targets is targets


def test_mixup_blends_and_cutmix_pastes_a_rectangle() -> None:
    images, targets = who_is_who(5)
    blended, _ = mix(images, targets, MixSpec(mixup_alpha=1.0), (0, 0, 0, 1))
    assert torch.equal(blended, blended[..., :1, :1].expand_as(blended))
    pasted, _ = mix(images, targets, MixSpec(cutmix_alpha=1.0), (0, 0, 0, 1))
    assert set(pasted.unique().tolist()) == {0.0, 1.0}
    foreign = (pasted != images).any(0).any(0)
    rows, columns = foreign.any(1), foreign.any(0)
    assert 0 < int(foreign.sum()) < foreign.numel()
    assert torch.equal(foreign, rows[:, None] & columns[None, :])


def test_one_option_does_not_shift_the_draws_of_another() -> None:
    images, targets = who_is_who(7)
    for index in range(40):
        key = (42, 0, 0, index)
        mixup, _ = mix(images, targets, MixSpec(mixup_alpha=0.4), key)
        cutmix, _ = mix(images, targets, MixSpec(cutmix_alpha=1.0), key)
        for alpha in (0.3, 2.0):
            both = MixSpec(mixup_alpha=0.4, cutmix_alpha=alpha, switch_prob=0.0)
            assert torch.equal(mix(images, targets, both, key)[0], mixup)
            both = MixSpec(mixup_alpha=alpha, cutmix_alpha=1.0, switch_prob=1.0)
            assert torch.equal(mix(images, targets, both, key)[0], cutmix)
        either, _ = mix(images, targets, MixSpec(mixup_alpha=0.4, cutmix_alpha=1.0), key)
        assert torch.equal(either, mixup) or torch.equal(either, cutmix)
        seldom, _ = mix(images, targets, MixSpec(mixup_alpha=0.4, prob=0.5), key)
        assert seldom is images or torch.equal(seldom, mixup)


def test_shares_and_odds_are_those_asked_for() -> None:
    images, targets = who_is_who(2, size=32)
    spec = MixSpec(mixup_alpha=1.0, cutmix_alpha=1.0, prob=0.6, switch_prob=0.25)
    results = [mix(images, targets, spec, (1, 0, 0, index)) for index in range(1_000)]
    mixed = [image for image, _ in results if image is not images]
    # a batch of two is its own partner half the time, and cut at a border a rectangle may be empty
    cut = [image for image in mixed if bool(((image == 0) | (image == 1)).all()) and not torch.equal(image, images)]
    blended = [image for image in mixed if bool(((image > 0) & (image < 1)).any())]
    assert abs(len(mixed) / 1_000 - 0.6) < 0.06
    assert abs(len(cut) / (len(cut) + len(blended)) - 0.25) < 0.08
    own = torch.stack([image[0, 0, 0, 0] for image in blended])
    assert abs(float(own.mean()) - 0.5) < 0.06, "Beta(1, 1) is uniform"
