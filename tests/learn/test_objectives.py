"""Losses equal torch's where torch has them and the textbook's where it has not; smoothing happens once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import nn
from torch.nn import functional

from foldwise.learn.augment import Batch, mix
from foldwise.learn.device import Runtime
from foldwise.learn.models import ToInput
from foldwise.learn.objectives import (
    Supervised,
    Taught,
    loss_class_weights,
    matching_loss,
    soft_target_loss,
    softened,
)
from foldwise.spec.model import LossSpec, MixSpec

WEIGHTS = torch.tensor([0.2, 1.0, 2.5, 0.7])
SETTINGS = list(itertools.product([0.0, 0.1, 0.3], [None, WEIGHTS]))


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 3, 3, 2, 0, 0, 1])


@pytest.fixture
def soft() -> torch.Tensor:
    return torch.rand(9, 4, generator=torch.Generator().manual_seed(1)).softmax(1)


@pytest.mark.parametrize(("smoothing", "weights"), SETTINGS)
def test_hard_targets_give_torchs_cross_entropy(
    smoothing: float, weights: torch.Tensor | None, logits: torch.Tensor, labels: torch.Tensor
) -> None:
    ours = soft_target_loss(logits, functional.one_hot(labels, 4).float(), LossSpec(label_smoothing=smoothing), weights)
    torch.testing.assert_close(ours, functional.cross_entropy(logits, labels, weights, label_smoothing=smoothing))


@pytest.mark.parametrize(("smoothing", "weights"), SETTINGS)
def test_soft_targets_give_torchs_cross_entropy_over_the_sum_of_weights(
    smoothing: float, weights: torch.Tensor | None, logits: torch.Tensor, soft: torch.Tensor
) -> None:
    ours = soft_target_loss(logits, soft, LossSpec(label_smoothing=smoothing), weights)
    total = functional.cross_entropy(logits, soft, weights, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(ours, total / (len(soft) if weights is None else (soft * weights).sum()))


@pytest.mark.parametrize(("smoothing", "weights"), SETTINGS)
def test_focal_without_focus_is_cross_entropy(
    smoothing: float, weights: torch.Tensor | None, logits: torch.Tensor, soft: torch.Tensor
) -> None:
    focal = LossSpec(name="focal", gamma=0.0, label_smoothing=smoothing)
    plain = LossSpec(label_smoothing=smoothing)
    torch.testing.assert_close(
        soft_target_loss(logits, soft, focal, weights), soft_target_loss(logits, soft, plain, weights)
    )


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_is_the_textbooks_on_hard_targets(gamma: float, logits: torch.Tensor, labels: torch.Tensor) -> None:
    p = logits.double().softmax(1).gather(1, labels[:, None])
    expected = (-((1 - p) ** gamma) * p.log()).mean().float()
    ours = soft_target_loss(logits, functional.one_hot(labels, 4).float(), LossSpec(name="focal", gamma=gamma))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_has_a_gradient_for_a_certain_model(gamma: float, smoothing: float) -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0], [200.0, 0.0, 0.0]], requires_grad=True)
    spec = LossSpec(name="focal", gamma=gamma, label_smoothing=smoothing)
    loss = soft_target_loss(logits, torch.eye(3)[:2], spec)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@given(npst.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 4)), st.sampled_from(["balanced", "sqrt"]))
def test_class_weights_have_mean_one_and_know_absent_classes(labels: np.ndarray, kind: str) -> None:
    weights = loss_class_weights(kind, labels, 6)
    assert weights is not None
    counts = np.bincount(labels, minlength=6)
    assert weights[labels].mean() == pytest.approx(1)
    assert ((weights == 0) == (counts == 0)).all()
    present = np.flatnonzero(counts)
    power = 1 if kind == "balanced" else 0.5
    scaled = weights[present] * counts[present] ** power
    assert scaled == pytest.approx(scaled[0])


def test_no_class_weights() -> None:
    assert loss_class_weights("none", np.array([0, 1]), 2) is None


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat([0, 1, 2], [5, 20, 75])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert loss_class_weights("balanced", labels, 3) == pytest.approx(expected)


@pytest.fixture
def batch(pixels: np.ndarray) -> Batch:
    rows = torch.tensor([3, 1, 4, 1, 5, 9])
    return Batch(torch.from_numpy(pixels[rows.numpy()]), rows, (42, 0, 3, 2))


def supervised(
    runtime: Runtime,
    loss: LossSpec,
    mixing: MixSpec,
    weights: np.ndarray | None = None,
    taught: Taught | None = None,
) -> Supervised:
    labels = np.arange(26) % 4
    labels[20:] = -1
    prepare = ToInput(16, "bilinear", [0.5], [0.25])
    return Supervised(
        labels, 4, loss=loss, mixing=mixing, prepare=prepare, runtime=runtime, class_weights=weights, taught=taught
    )


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 4))


def test_an_objective_looks_labels_up_by_row_and_counts_hits(cpu: Runtime, batch: Batch) -> None:
    model = small_model()
    class_weights = np.array([1.0, 2.0, 0.5, 1.5])
    result = supervised(cpu, LossSpec(), MixSpec(), class_weights)(model, batch, mixed=True)
    inputs = (batch.pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    logits, labels = model(inputs), batch.rows % 4
    weights = torch.tensor(class_weights, dtype=torch.float32)
    torch.testing.assert_close(result.mean, functional.cross_entropy(logits, labels, weights))
    assert int(result.hits) == int((logits.argmax(1) == labels).sum())
    assert result.mean.requires_grad


@pytest.mark.parametrize("mixing", [MixSpec(mixup_alpha=0.4), MixSpec(cutmix_alpha=1.0)])
def test_smoothing_happens_once_under_mixing_and_mixing_can_be_off(mixing: MixSpec, cpu: Runtime, batch: Batch) -> None:
    model = small_model()
    objective = supervised(cpu, LossSpec(label_smoothing=0.2), mixing)
    inputs = (batch.pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    targets = functional.one_hot(batch.rows % 4, 4).float()
    images, mixed = mix(inputs, targets, mixing, batch.key)
    expected = functional.cross_entropy(model(images), mixed * 0.8 + 0.2 / 4)
    torch.testing.assert_close(objective(model, batch, mixed=True).mean, expected)
    plain = functional.cross_entropy(model(inputs), targets, label_smoothing=0.2)
    torch.testing.assert_close(objective(model, batch, mixed=False).mean, plain)
    assert not torch.isclose(expected, plain)


def test_the_loss_is_float32_whatever_the_forward_pass_is(batch: Batch) -> None:
    runtime = Runtime(torch.device("cpu"), "bf16", 1)
    kinds = []
    model = small_model()
    model.register_forward_hook(lambda _module, _inputs, output: kinds.append(output.dtype))
    result = supervised(runtime, LossSpec(), MixSpec())(model, batch, mixed=False)
    assert kinds == [torch.bfloat16]
    assert result.mean.dtype == torch.float32


# Teachers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("name", ["cross_entropy", "focal"])
def test_an_image_of_weight_two_counts_as_two_images(
    name: str, class_weights: torch.Tensor | None, logits: torch.Tensor, soft: torch.Tensor
) -> None:
    spec = LossSpec.model_validate({"name": name, "label_smoothing": 0.1})
    twice = torch.cat([torch.arange(9), torch.tensor([3, 7])])
    expected = soft_target_loss(logits[twice], soft[twice], spec, class_weights)
    image_weights = torch.ones(9)
    image_weights[[3, 7]] = 2.0
    torch.testing.assert_close(soft_target_loss(logits, soft, spec, class_weights, image_weights), expected)


def test_matching_is_torchs_divergence(logits: torch.Tensor, soft: torch.Tensor) -> None:
    weights = torch.tensor([1.0, 0.5, 2.0] * 3)
    soft[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # of a certain teacher
    apart = functional.kl_div((logits / 3).log_softmax(1), soft, reduction="none").sum(1)
    torch.testing.assert_close(matching_loss(logits, soft, 3.0, weights), 9 * (apart * weights).sum() / weights.sum())
    assert float(matching_loss(3 * soft[1:].log(), soft[1:], 3.0, weights[1:])) == pytest.approx(0, abs=1e-5)


def test_the_temperature_leaves_the_size_of_the_gradient() -> None:
    """At a high temperature it is (z - v) / C for centred logits z and v (Hinton et al. 2015, equation 4)."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(1, 4, generator=generator), torch.randn(1, 4, generator=generator)
    student, teacher = student - student.mean(), teacher - teacher.mean()
    for temperature in (20.0, 100.0):
        student.requires_grad_().grad = None
        matched = (teacher / temperature).softmax(1)
        matching_loss(student, matched, temperature, torch.ones(1)).backward()
        torch.testing.assert_close(student.grad, (student.detach() - teacher) / 4, rtol=0.2, atol=0.02)


teachers_logits = npst.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(2, 7)), elements=st.floats(-30, 30))


@given(teachers_logits, st.floats(1, 20))
def test_softening_divides_the_logits(teacher: np.ndarray, temperature: float) -> None:
    def softmax(values: np.ndarray) -> np.ndarray:
        powers = np.exp(values - values.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    probs = softmax(teacher)
    soft = softened(probs, temperature)
    np.testing.assert_allclose(soft, softmax(teacher / temperature), atol=1e-9)
    np.testing.assert_allclose(softened(probs, 1.0), probs, atol=1e-12)
    assert (soft.max(axis=1) <= probs.max(axis=1) + 1e-12).all()


def test_a_teacher_that_is_certain_stays_so() -> None:
    certain = np.array([[0, 1, 0]], dtype=np.float32)
    np.testing.assert_array_equal(softened(certain, 4.0), certain)


def taught(*, matched: bool) -> Taught:
    rng = np.random.default_rng(0)
    soft = rng.dirichlet(np.ones(4), 26).astype(np.float32)
    weights = rng.uniform(0.2, 2.0, 26).astype(np.float32)
    other = rng.dirichlet(np.ones(4), 26).astype(np.float32)
    return Taught(soft, weights, other, 0.3, 2.0) if matched else Taught(soft, weights)


def test_plain_labels_as_lessons_change_nothing(cpu: Runtime, batch: Batch) -> None:
    labels = np.eye(4, dtype=np.float32)[np.arange(26) % 4]
    plain = Taught(labels, np.ones(26, dtype=np.float32))
    for loss in (LossSpec(label_smoothing=0.1), LossSpec(name="focal")):
        for mixing in (MixSpec(), MixSpec(mixup_alpha=0.4), MixSpec(cutmix_alpha=1.0)):
            expected = supervised(cpu, loss, mixing)(small_model(), batch, mixed=True)
            got = supervised(cpu, loss, mixing, taught=plain)(small_model(), batch, mixed=True)
            torch.testing.assert_close(got.mean, expected.mean)
            assert int(got.hits) == int(expected.hits)


@pytest.mark.parametrize("matched", [False, True])
def test_lessons_are_mixed_by_the_weight_of_their_images(matched: bool, cpu: Runtime, batch: Batch) -> None:
    lesson, mixing, model = taught(matched=matched), MixSpec(mixup_alpha=0.4), small_model()
    spec = LossSpec(label_smoothing=0.1)
    rows = batch.rows.numpy()
    inputs = (batch.pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    images, shares = mix(inputs, torch.eye(6), mixing, batch.key)  # row i: the shares of the batch in image i
    weights = torch.from_numpy(lesson.weights[rows])
    mass = shares @ weights

    def blended(values: np.ndarray) -> torch.Tensor:
        return (shares * weights) @ torch.from_numpy(values[rows]) / mass[:, None]

    logits = model(images)
    expected = soft_target_loss(logits, blended(lesson.targets), spec, None, mass)
    if lesson.matched is not None:
        expected = 0.7 * expected + 0.3 * matching_loss(logits, blended(lesson.matched), 2.0, mass)
    result = supervised(cpu, spec, mixing, taught=lesson)(model, batch, mixed=True)
    torch.testing.assert_close(result.mean, expected)
    assert int(result.hits) == int((logits.argmax(1) == blended(lesson.targets).argmax(1)).sum())
    assert result.mean.requires_grad
