"""Explanations: maps that are right where the answer is known, by oracle elsewhere; nobody explains what he learnt.

The networks are made by hand, so that it is known what they look at; kept runs hold untrained ones.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image
from torch import nn

from foldwise.data.competition import load_dataset
from foldwise.data.demo import draw_demo
from foldwise.data.folds import Folds
from foldwise.data.ingest import ingest
from foldwise.errors import FoldwiseError, RecordError
from foldwise.learn.device import pick_runtime
from foldwise.learn.models import build_model, place, to_input
from foldwise.metrics import METRICS
from foldwise.records.store import Context, RunFolder, Unit, load_run
from foldwise.runs.crossval import metadata
from foldwise.show import explain as module
from foldwise.show.explain import (
    attention_rollout,
    explain,
    feature_layer,
    grad_cam,
    pick,
    rollout,
    spatial_attention,
)
from foldwise.spec.model import ModelSpec

RUNTIME = pick_runtime("cpu", "fp32", 1)
CNN = ModelSpec(arch="cnn_3block", image_size=48)
CBAM = ModelSpec(arch="cnn_3stage_cbam", image_size=48)
VIT = ModelSpec(arch="vit_small_patch8_48", image_size=48, options={"embed_dim": 24, "depth": 2, "num_heads": 3})
CLASS_TOKEN = ModelSpec(
    arch="vit_tiny_patch16_224", image_size=32, options={"embed_dim": 24, "depth": 2, "num_heads": 3}
)
MIXER = ModelSpec(arch="gmlp_ti16_224", image_size=224)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(spec, *, classes=7, channels=1):
    return place(build_model(spec, classes=classes, channels=channels), RUNTIME).eval()


def keep_run(root, name, spec, *, kind="kfold", folds=5, seeds=(42,)):
    """Keep a run whose networks were never trained, with drawn probabilities."""
    data = load_dataset(root, "demo")
    labels, test_ids = data.labels[data.labels >= 0], data.ids[data.labels < 0]
    classes = data.competition.classes
    fold = data.folds.fold if kind == "kfold" else np.where(data.folds.fold == 0, 0, -1) if kind == "holdout" else -1
    split = Folds(data.folds.ids, np.broadcast_to(fold, len(labels)).astype(np.int64), data.folds.group)
    context = Context("demo", classes, {"kind": kind, "folds": folds}, split.sha256, data.sha256)
    numbers = np.unique(split.fold[split.fold >= 0]).tolist() or [0]
    path = root / "oof" / name
    label_of = dict(zip(data.ids.tolist(), data.labels.tolist(), strict=True))
    rng = np.random.default_rng(0)
    with RunFolder.open(
        path, spec={"name": name, "seeds": seeds}, spec_yaml=f"name: {name}\n", context=context
    ) as folder:
        for number in numbers:
            for seed in seeds:
                torch.manual_seed(100 * number + seed)
                model = build_model(spec, classes=len(classes), channels=data.images.shape[-1])
                told = metadata(spec, classes, to_input(spec, data.images, np.arange(10)))
                unit_path = folder.unit_path(number, seed)
                unit_path.mkdir(parents=True, exist_ok=True)
                safetensors.torch.save_file(model.state_dict(), unit_path / "weights.safetensors", metadata=told)
                ids = split.ids[split.fold == number]
                own = np.array([label_of[image] for image in ids.tolist()], dtype=np.int64)
                logits = rng.normal(size=(len(ids), len(classes)))
                logits[np.arange(len(ids)), own] += 1.5
                probs, test = (
                    (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)).astype(np.float32)
                    for x in (logits, rng.normal(size=(len(test_ids), len(classes))))
                )
                history = [{"epoch": 1, "lr": 0.1, "train_loss": 1.0, "train_accuracy": 0.5}]
                folder.save_unit(Unit(number, seed, ids, own, probs, test_ids, test, history, {"wall_s": 1}))
        units = [(number, seed) for number in numbers for seed in seeds]
        in_order = np.array([label_of[image] for image in split.ids.tolist()], dtype=np.int64)
        folder.complete(units, folds=split, labels=in_order, metric=METRICS["accuracy"], info={"tta": ["identity"]})
    return path


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


class Corner(nn.Module):
    """Class 1 is the brightness of the upper left corner, class 0 the rest's; features may be (B, h, w, C)."""

    def __init__(self, output_fmt="NCHW"):
        super().__init__()
        self.output_fmt = output_fmt
        self.features = nn.Identity()
        weight = torch.zeros(12, 12)
        weight[:4, :4] = 1
        self.register_buffer("corner", weight)

    def forward(self, images):
        channels_last = self.output_fmt == "NHWC"
        cells = nn.functional.avg_pool2d(images, 4).relu()
        # A channel for the corner's own evidence, one for the rest: what a trained network would have.
        maps = torch.cat([cells * self.corner, cells * (1 - self.corner)], 1)
        maps = self.features(maps.permute(0, 2, 3, 1) if channels_last else maps)
        pooled = maps.mean((1, 2)) if channels_last else maps.mean((2, 3))
        return torch.stack([pooled[:, 1], pooled[:, 0]], 1)


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_grad_cam_finds_the_corner_that_the_class_depends_on(output_fmt):
    images = torch.rand(3, 1, 48, 48, requires_grad=True)
    cam = grad_cam(Corner(output_fmt), images, torch.tensor([1, 0, 1]))
    inside = cam[:, :18, :18].sum((1, 2)) / cam.sum((1, 2))
    assert inside[0] > 0.99
    assert inside[1] < 0.05
    assert inside[2] > 0.99


class Small(nn.Module):
    """Convolution, ReLU in place, pooling, two linear layers: a head through which gradients differ by image."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.AvgPool2d(2)
        )
        self.head = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


def test_grad_cam_is_its_equations():
    model, images, targets = Small().eval(), torch.randn(4, 3, 16, 16), torch.tensor([0, 3, 2, 2])
    cam = grad_cam(model, images, targets)
    for image, target, got in zip(images, targets, cam, strict=True):
        features = model.body(image[None]).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model.head(features.mean((2, 3)))[0, target], features)
        alpha = gradient.mean((2, 3))[0]
        expected = (alpha[:, None, None] * features[0]).sum(0).relu().detach()
        expected = nn.functional.interpolate(expected[None, None], (16, 16), mode="bilinear")[0, 0]
        torch.testing.assert_close(got, expected)
    assert cam.shape == (4, 16, 16)
    assert not cam.requires_grad


def test_an_image_is_explained_alike_alone_and_among_others_and_nothing_stays_behind():
    model, images = network(CBAM), torch.randn(3, 1, 48, 48)
    together = grad_cam(model, images, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(together[1:2], grad_cam(model, images[1:2], torch.tensor([1])), atol=1e-5, rtol=1e-4)
    spatial_attention(model, images)
    attention_rollout(vit := network(VIT), images)
    for each in (*model.modules(), *vit.modules()):
        assert not each._forward_hooks
        assert not each._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arch", "size", "layer"),
    [
        ("cnn_3block", 48, "blocks"),
        ("cnn_3stage_cbam", 48, "stages"),
        ("resnet18", 48, "layer2"),
        ("resnet18", 224, "layer4"),
        ("mobilenetv2_050", 64, "blocks.2"),
        ("convnext_atto", 48, "stages.1"),
        ("cnn_3block", 16, "blocks.1.2"),
    ],
)
def test_the_layer_is_the_last_map_that_tells(arch, size, layer):
    model = timm.create_model(arch, num_classes=3, in_chans=1)
    assert feature_layer(model, torch.zeros(1, 1, size, size)) == layer


@pytest.mark.parametrize("spec", [VIT, MIXER], ids=lambda spec: spec.arch)
def test_networks_of_tokens_have_no_feature_map(spec):
    inputs = torch.zeros(1, 1, spec.image_size, spec.image_size)
    with pytest.raises(FoldwiseError, match="no feature map that its classifier rests on\n  fix: "):
        feature_layer(network(spec), inputs)


def test_captum_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(FoldwiseError) as caught:
        grad_cam(network(CNN), torch.zeros(1, 1, 48, 48), torch.tensor([0]))
    assert str(caught.value) == 'captum is not installed\n  fix: pip install "foldwise[explain]"'


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3), st.integers(2, 9))
def test_rows_of_a_rollout_sum_to_one(seed, layers, heads, tokens):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(2, heads, tokens, tokens, generator=generator).softmax(-1) for _ in range(layers)]
    through = rollout(drawn)
    torch.testing.assert_close(through.sum(-1), torch.ones(2, tokens))
    # The paper's recursion, a layer after another from the last to the first, in float64.
    expected = np.eye(tokens)
    for attention in drawn:
        expected = (0.5 * attention[0].double().numpy().mean(0) + 0.5 * np.eye(tokens)) @ expected
    np.testing.assert_allclose(through[0], expected, atol=1e-6)


def test_identity_attention_stays_at_its_token():
    torch.testing.assert_close(rollout([torch.eye(5).expand(2, 3, 5, 5)] * 4), torch.eye(5).expand(2, 5, 5))


@pytest.mark.parametrize(("spec", "grid"), [(VIT, (6, 6)), (CLASS_TOKEN, (2, 2))], ids=["mean", "class token"])
def test_uniform_attention_rolls_out_uniformly(spec, grid):
    model = network(spec)
    for name, parameter in model.named_parameters():
        if ".qkv." in name:
            parameter.data.zero_()
    shares = attention_rollout(model, torch.randn(2, 1, spec.image_size, spec.image_size))
    torch.testing.assert_close(shares, torch.full((2, *grid), 1 / (grid[0] * grid[1])))


@pytest.mark.parametrize("spec", [VIT, CLASS_TOKEN], ids=["mean", "class token"])
def test_attention_rollout_reads_the_tokens_that_the_classifier_reads(spec):
    model, images = network(spec), torch.randn(2, 1, spec.image_size, spec.image_size)
    by_layer = []
    hooks = [b.attn.register_forward_pre_hook(lambda m, i: by_layer.append((m, i[0]))) for b in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    attentions = []
    for attn, tokens in by_layer:
        batch, count, width = tokens.shape
        q, k, _ = attn.qkv(tokens).reshape(batch, count, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        attentions.append((q @ k.transpose(-2, -1) * (width // attn.num_heads) ** -0.5).softmax(-1))
    through = rollout(attentions)
    expected = through[:, 0, 1:] if spec is CLASS_TOKEN else through.mean(1)
    got = attention_rollout(model, images)
    torch.testing.assert_close(got.flatten(1), expected / expected.sum(1, keepdim=True))
    for block in model.blocks:
        block.attn.fused_attn = True  # as on a GPU
    torch.testing.assert_close(attention_rollout(model, images), got)
    assert all(block.attn.fused_attn for block in model.blocks)


def test_networks_without_global_attention_have_no_rollout():
    with pytest.raises(FoldwiseError, match="no global attention over a grid of patches\n  fix: "):
        attention_rollout(network(CNN), torch.zeros(1, 1, 48, 48))


def test_spatial_attention_is_what_cbam_multiplies_by():
    model, images = network(CBAM), torch.randn(2, 1, 48, 48)
    maps = spatial_attention(model, images)
    assert [tuple(each.shape) for each in maps] == [(2, 24, 24), (2, 12, 12), (2, 6, 6)]
    before = model.stages[0][:-1](images)
    cbam = model.stages[0][-1]
    gated = before * cbam.channel(before)
    torch.testing.assert_close(gated * maps[0][:, None], cbam(before))
    assert spatial_attention(network(CNN), images) == []


def test_the_pick_is_the_surest_of_both_kinds(root):
    run = load_run(keep_run(root, "a", CNN))
    (wrong_heading, wrong), (_, right) = pick(run, 10, 0)
    assert wrong_heading == "the most confident mistakes"
    assert (len(wrong), len(right)) == (5, 5)
    predicted, confidence = run.probs.argmax(1), run.probs.max(1)
    expected = sorted(np.flatnonzero(predicted != run.labels), key=lambda row: -confidence[row])[:5]
    assert [p.id for p in wrong] == run.ids[expected].tolist()
    for p in right:
        row = run.ids.tolist().index(p.id)
        same = (predicted == run.labels) & (predicted == p.label)
        assert confidence[row] == confidence[same].max(), "the surest of its class"
        assert p.fold == run.fold[row]
    assert len({p.label for p in right}) == 5
    for count in (1, 3, 60):
        assert sum(len(half) for _, half in pick(run, count, 0)) == count
    few = int((predicted != run.labels).sum())
    assert [len(half) for _, half in pick(run, len(run.ids), 0)] == [few, len(run.ids) - few]


@pytest.mark.slow
@pytest.mark.parametrize("spec", [CBAM, VIT], ids=lambda spec: spec.arch)
def test_a_picture_of_a_run(root, figures, spec):
    path = keep_run(root, "a", spec)
    picture = explain(root, "a", ids=None, count=6, runtime=RUNTIME)
    assert picture == path / "report" / "explain.png"
    first = picture.read_bytes()
    with Image.open(picture) as image:
        assert min(image.size) > 500
    explain(root, "a", ids=None, count=6, runtime=RUNTIME)
    assert picture.read_bytes() == first
    figure = figures[0]
    for text in figure.findobj(Text):
        box = text.get_window_extent()
        if text.get_text().strip() and text.get_visible() and text.axes is not None and text in text.axes.texts:
            assert box.x0 >= 0, text.get_text()
            assert box.x1 <= figure.bbox.x1, text.get_text()
    run = load_run(path)
    for _, half in pick(run, 6, 0):
        for p in half:
            assert any(said.startswith(f"{p.id}   ") and said.endswith(f"by fold {p.fold}") for said in texts(figure))


@pytest.mark.slow
def test_each_image_is_explained_by_a_model_that_did_not_see_it(root, monkeypatch):
    """By weights: the network asked is that of the image's own fold; of the first for test images."""
    path = keep_run(root, "a", CNN, seeds=(42, 43))
    run = load_run(path)
    data = load_dataset(root, "demo")
    asked = []
    real = module._maps

    def watched(model, pixels, target, name):
        asked.append((model.model.state_dict()["head.0.weight"].clone(), np.array(pixels), target, model.seed))
        return real(model, pixels, target, name)

    monkeypatch.setattr(module, "_maps", watched)
    ids = [*(str(run.ids[np.flatnonzero(run.fold == fold)[0]]) for fold in (3, 1, 4)), str(run.test_ids[5])]
    explain(root, "a", ids=ids, count=16, runtime=RUNTIME)
    assert len(asked) == 4
    for weight, pixels, target, seed in asked:
        (row,) = [i for i, image in enumerate(data.images) if np.array_equal(image, pixels)]
        image = str(data.ids[row])
        assert image in ids
        fold = int(run.fold[run.ids.tolist().index(image)]) if image in run.ids else 0
        kept = safetensors.torch.load_file(path / f"fold{fold}" / "seed42" / "weights.safetensors")
        assert torch.equal(weight, kept["head.0.weight"])
        probs = run.probs[run.ids == image] if image in run.ids else run.test_probs[run.test_ids == image]
        assert (target, seed) == (int(probs[0].argmax()), 42)


@pytest.mark.parametrize(("kind", "held_out"), [("holdout", True), ("full", False)])
def test_other_splits(root, figures, kind, held_out):
    run = load_run(keep_run(root, "a", CNN, kind=kind))
    explain(root, "a", ids=None, count=4, runtime=RUNTIME)
    note = next(text for text in texts(figures[0]) if "Grad-CAM: " in text).replace("\n", " ")
    assert ("Each image is explained by the model of its fold" in note) == held_out
    assert ("Test images, which no model saw, are explained by the model of fold 0" in note) != held_out
    trained_on = next(image for image in load_dataset(root, "demo").folds.ids.tolist() if image not in run.ids)
    with pytest.raises(RecordError, match=f"did not see the image, for 1 id: {trained_on}\n"):
        explain(root, "a", ids=[trained_on], count=16, runtime=RUNTIME)


def test_all_unknown_ids_are_named(root):
    run = load_run(keep_run(root, "a", CNN))
    with pytest.raises(RecordError) as caught:
        explain(root, "a", ids=["9001", str(run.ids[0]), "x.jpg"], count=16, runtime=RUNTIME)
    some = ", ".join([*run.ids[:3].tolist(), *run.test_ids[:3].tolist()])
    assert str(caught.value) == (
        "oof/a: has no prediction by a model that did not see the image, for 2 ids: 9001, x.jpg\n"
        f"  fix: ids of its oof.csv or test.csv, such as {some}\n"
        "1 error; nothing was written."
    )


@pytest.mark.parametrize(("ids", "count", "got"), [(None, 0, 0), (None, 61, 61), ([str(i) for i in range(99)], 1, 99)])
def test_too_many_images_for_one_picture(root, ids, count, got):
    with pytest.raises(FoldwiseError, match=f"a picture explains 1 to 60 images, but got {got}\n  fix: "):
        explain(root, "a", ids=ids, count=count, runtime=RUNTIME)


def test_weights_and_images_must_be_those_of_the_run(root):
    path = keep_run(root, "a", CNN)
    table = root / "inputs" / "demo" / "train.csv"
    lines = table.read_text().splitlines()
    one, other = (lines[1].split(",")[0], next(row for row in lines[2:] if row.split(",")[1] != lines[1].split(",")[1]))
    table.write_text("\n".join([lines[0], f"{one},{other.split(',')[1]}", *lines[2:], ""]))
    with pytest.raises(RecordError, match="oof/a: the images or labels of demo are not those of the run\n  fix: "):
        explain(root, "a", ids=None, count=2, runtime=RUNTIME)
    (path / "fold1" / "seed42" / "weights.safetensors").unlink()
    with pytest.raises(RecordError, match="its weights are not on this machine: fold1/seed42"):
        explain(root, "a", ids=None, count=2, runtime=RUNTIME)
    assert not (path / "report").exists()


@pytest.mark.slow
def test_networks_that_cannot_be_explained(root):
    keep_run(root, "gmlp", MIXER, kind="holdout")
    with pytest.raises(FoldwiseError) as caught:
        explain(root, "gmlp", ids=None, count=2, runtime=RUNTIME)
    assert str(caught.value) == (
        "`gmlp_ti16_224` has neither feature maps that its classifier rests on nor global attention\n"
        "  fix: explain a run of a convolutional network or a ViT; see the mistakes: make report EXP=gmlp"
    )


def test_colour_images(tmp_path, figures):
    """In RGB, wider than high, more classes' worth of names than fit: drawn in colour, the heat over their gray."""
    draw_demo(tmp_path / "handout", train=40, test=8)
    ingest(tmp_path / "handout", tmp_path, "demo")
    described = tmp_path / "inputs" / "demo" / "competition.yaml"
    described.write_text(described.read_text().replace("channels: 1", "channels: 3"))
    ingest(tmp_path / "handout", tmp_path, "demo")
    keep_run(tmp_path, "rgb", CNN, kind="holdout")
    explain(tmp_path, "rgb", ids=None, count=2, runtime=RUNTIME)
    shapes = [image.get_array().shape for image in figures[0].axes[0].images]
    assert shapes[:3] == [(48, 48, 3), (48, 48), (48, 48)]
