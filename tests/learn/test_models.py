"""Networks have their size, take weights from the hub's cache where it has them, and get the right input."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from foldwise.errors import FoldwiseError, HubError
from foldwise.learn.models import CBAM, OWN_ARCHS, ToInput, build_model, head_parameters, to_input
from foldwise.spec.model import HeadSpec, ModelSpec

# --- Networks ---


@pytest.mark.parametrize(
    ("arch", "classes", "channels", "parameters"),
    [
        ("cnn_3block", 7, 1, 403_911),
        ("cnn_3block", 10, 3, 403_911 + 3 * 129 + 2 * 64 * 9),
        ("cnn_3stage_cbam", 7, 1, 1_189_997),
        ("cnn_3stage_cbam", 10, 3, 1_189_997 + 3 * 129 + 2 * 64 * 9),
        ("cnn_4stage", 7, 1, 2_639_479),
        ("cnn_4stage", 10, 3, 2_639_479 + 3 * 385 + 2 * 48 * 9),
        ("resnet18", 4, 1, 11_172_292),
        ("vit_small_patch8_48", 7, 1, 3_776_023),
        ("vit_small_patch8_48", 10, 3, 3_776_023 + 3 * 193 + 2 * 48 * 9),
    ],
)
def test_own_networks_have_their_size_and_shape(arch: str, classes: int, channels: int, parameters: int) -> None:
    model = build_model(ModelSpec(arch=arch), classes=classes, channels=channels)
    assert model.training
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model(torch.rand(2, channels, 48, 48)).shape == (2, classes)


def test_a_residual_stage_adds_what_it_is_given_and_an_attentive_one_ends_in_cbam() -> None:
    options = {"width": 32, "depth": 3, "residual": True, "attention": True}
    model = build_model(ModelSpec(arch="cnn_4stage", options=options), classes=7, channels=1).eval()
    stage = model.get_submodule("stages.1")
    first, residual, pool, attention = stage
    assert isinstance(attention, CBAM)
    given = torch.randn(2, 32, 8, 8)
    inner = first(given)
    one, two = residual
    torch.testing.assert_close(stage(given), attention(pool(inner + two(one(inner)))))
    with pytest.raises(FoldwiseError, match="a stage needs 2 convolutions or more"):
        build_model(ModelSpec(arch="cnn_4stage", options=options | {"depth": 1}), classes=7, channels=1)


def test_attention_gates_channels_then_places_as_its_paper_says() -> None:
    torch.manual_seed(0)
    cbam, features = CBAM(32), torch.randn(3, 32, 6, 5)
    inner, outer = cbam.channel.layers[0].weight, cbam.channel.layers[2].weight

    def shared(pooled: torch.Tensor) -> torch.Tensor:
        return (pooled @ inner.T).clamp_min(0) @ outer.T

    channels = torch.sigmoid(shared(features.mean((2, 3))) + shared(features.amax((2, 3))))
    gated = features * channels[:, :, None, None]
    pooled = torch.stack([gated.mean(1), gated.amax(1)], dim=1)
    places = torch.sigmoid(functional.conv2d(pooled, cbam.spatial.conv.weight, padding=3))
    torch.testing.assert_close(cbam(features), gated * places)


HEAD = {"hidden": (256,), "dropout": (0.5, 0.3)}


def test_a_described_head_replaces_the_networks_own() -> None:
    spec = ModelSpec(arch="mobilenetv2_100", image_size=64, head=HeadSpec(**HEAD))
    model: Any = build_model(spec, classes=7, channels=1)
    kinds = [type(layer).__name__ for layer in model.classifier]
    assert kinds == ["Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert [layer.p for layer in model.classifier if isinstance(layer, torch.nn.Dropout)] == [0.5, 0.3]
    assert sum(parameter.numel() for parameter in model.classifier.parameters()) == 1280 * 256 + 256 + 256 * 7 + 7
    assert head_parameters(model) == {f"classifier.{layer}.{kind}" for layer in (1, 4) for kind in ("weight", "bias")}
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("arch", ["cnn_3block", "vit_small_patch8_48", "test_convnext", "test_resnet"])
@pytest.mark.parametrize("hidden", [(), (8, 5)])
def test_every_kind_of_network_takes_a_described_head(arch: str, hidden: tuple[int, ...]) -> None:
    spec = ModelSpec(arch=arch, head=HeadSpec(hidden=hidden, activation="gelu"))
    model = build_model(spec, classes=3, channels=1)
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if name in head_parameters(model) and p.ndim == 2]
    assert [outer for outer, _ in shapes] == [*hidden, 3]
    assert [inner for _, inner in shapes[1:]] == list(hidden)
    assert model(torch.rand(2, 1, 48, 48)).shape == (2, 3)


def test_a_classifier_that_is_not_one_module_cannot_be_replaced() -> None:
    with pytest.raises(FoldwiseError) as caught:
        build_model(ModelSpec(arch="deit_tiny_distilled_patch16_224", head=HeadSpec()), classes=3, channels=1)
    assert str(caught.value) == (
        "`model.head` cannot replace the classifier of `deit_tiny_distilled_patch16_224`, which is not of linear "
        "layers\n  fix: leave `head` out, and use `model.dropout`"
    )


def test_own_networks_are_timms_too() -> None:
    assert set(OWN_ARCHS) <= set(timm.list_models())


def test_equal_seeds_build_equal_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_model(ModelSpec(arch="vit_small_patch8_48"), classes=3, channels=1).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("cnn_3block", {"head.0.weight", "head.0.bias", "head.3.weight", "head.3.bias"}),
        ("vit_small_patch8_48", {"head.weight", "head.bias"}),
        ("test_vit", {"head.weight", "head.bias"}),
        ("test_resnet", {"fc.weight", "fc.bias"}),
        ("test_convnext", {"head.fc.weight", "head.fc.bias"}),
        ("deit_tiny_distilled_patch16_224", {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}),
    ],
)
def test_the_head_is_the_classifier(arch: str, expected: set[str]) -> None:
    assert head_parameters(build_model(ModelSpec(arch=arch), classes=3, channels=1)) == expected


def test_dropout_drop_path_image_size_and_options_reach_the_network() -> None:
    spec = ModelSpec(arch="vit_small_patch8_48", image_size=64, dropout=0.4, drop_path=0.2, options={"depth": 2})
    model: Any = build_model(spec, classes=3, channels=1)
    assert len(model.blocks) == 2
    assert model.head_drop.p == 0.4
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    assert model.pos_embed.shape[1] == 64
    model = build_model(ModelSpec(arch="cnn_3block", dropout=0.3), classes=3, channels=1)
    assert model.head[2].p == 0.3


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"arch": "cnn_3block", "drop_path": 0.1}, "unexpected keyword argument 'drop_path_rate'"),
        ({"arch": "vit_small_patch8_48", "options": {"num_heads": 5}}, "divisible"),
        ({"arch": "vit_small_patch8_48", "options": {"patch_size": 16}}, "patches of 8 px"),
        ({"arch": "vit_small_patch8_48", "image_size": 50}, "patches of 8 px"),
        ({"arch": "test_vit", "image_size": 50}, "divisible by patch size"),
        ({"arch": "test_vit", "options": {"act_layer": "gelly"}}, "KeyError: 'gelly'"),
        ({"arch": "test_vit", "options": {"embed_dim": -1}}, "negative dimension"),
        ({"arch": "test_resnet", "options": {"global_pool": "best"}}, "best"),
    ],
)
def test_what_a_network_cannot_be_is_said_before_training(spec: dict[str, Any], reason: str) -> None:
    with pytest.raises(FoldwiseError) as caught:
        build_model(ModelSpec(**spec), classes=3, channels=1)
    message = str(caught.value)
    assert message.startswith(f"`{spec['arch']}` cannot be made with num_classes=3, in_chans=1")
    assert reason in message
    assert message.endswith("\n  fix: see `model.options`, `model.drop_path` and `model.image_size` in the spec")


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        ({"arch": "test_resnet", "options": {"num_classes": 4}}, "num_classes"),
        ({"arch": "test_vit", "options": {"img_size": 64}}, "img_size"),
        ({"arch": "test_vit", "dropout": 0.1, "options": {"drop_rate": 0.2}}, "drop_rate"),
    ],
)
def test_options_do_not_override_other_keys(spec: dict[str, Any], key: str) -> None:
    with pytest.raises(FoldwiseError) as caught:
        build_model(ModelSpec(**spec), classes=3, channels=1)
    assert str(caught.value) == (
        f"`model.options` holds `{key}`, which other keys of the files set\n"
        "  fix: leave that out; `model.image_size`, `dropout`, `drop_path` and the competition decide it"
    )


@pytest.mark.parametrize("arch", OWN_ARCHS)
def test_own_networks_have_no_pretrained_weights(arch: str) -> None:
    with pytest.raises(FoldwiseError) as caught:
        build_model(ModelSpec(arch=arch, weights="pretrained"), classes=3, channels=1)
    assert str(caught.value) == (
        f"`{arch}` has no pretrained weights\n  fix: `model.weights: none`, or `run:<experiment>`"
    )


# --- The hub ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    return tmp_path


def put_into_cache(cache: Path, arch: str) -> dict[str, torch.Tensor]:
    """Weights of a thousand classes and three channels, as the hub's client would have left them."""
    torch.manual_seed(1)
    state = timm.create_model(arch, num_classes=1000).state_dict()
    stored = {name: tensor + tensor.is_floating_point() * 0.01 for name, tensor in state.items()}
    folder = cache / f"models--timm--{arch}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    safetensors.torch.save_file(stored, folder / "snapshots" / ("0" * 40) / "model.safetensors")
    return stored


@pytest.mark.parametrize(
    ("arch", "stem", "head", "image_size"),
    [
        ("test_resnet.r160_in1k", "conv1.0.weight", "fc.", 48),
        ("test_vit.r160_in1k", "patch_embed.proj.weight", "head.", 160),
    ],
)
def test_cached_weights_are_loaded_without_the_network(
    arch: str, stem: str, head: str, image_size: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = put_into_cache(cache, arch)

    def no_network(*_args: object, **_options: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    spec = ModelSpec(arch=arch, weights="pretrained", image_size=image_size)
    state = build_model(spec, classes=3, channels=1).state_dict()
    assert set(state) == set(stored)
    for name, tensor in stored.items():
        if name == stem:
            torch.testing.assert_close(state[name], tensor.sum(1, keepdim=True))
        elif name.startswith(head):
            assert state[name].shape[0] == 3
        else:
            assert torch.equal(state[name], tensor), name


def test_a_vit_from_the_cache_takes_another_image_size(cache: Path) -> None:
    stored = put_into_cache(cache, "test_vit.r160_in1k")
    spec = ModelSpec(arch="test_vit.r160_in1k", weights="pretrained", image_size=48)
    state = build_model(spec, classes=3, channels=3).state_dict()
    assert state["pos_embed"].shape[1] == stored["pos_embed"].shape[1] - 100 + 9
    assert torch.equal(state["patch_embed.proj.weight"], stored["patch_embed.proj.weight"])


def test_options_that_do_not_fit_the_weights_are_refused(cache: Path) -> None:
    put_into_cache(cache, "test_vit.r160_in1k")
    spec = ModelSpec(arch="test_vit.r160_in1k", weights="pretrained", options={"embed_dim": 128})
    with pytest.raises(FoldwiseError, match=r"cannot be made with .*embed_dim=128.*\n") as caught:
        build_model(spec, classes=3, channels=1)
    assert str(caught.value).endswith("in the spec")
    assert str(cache) not in str(caught.value)


MESSAGE = (
    "the pretrained weights of `test_vit.r160_in1k` are not in the local cache, "
    "and the Hugging Face Hub cannot be reached\n"
    "  ({reason})\n"
    "  fix: one of\n"
    "    - run once where there is internet; the weights stay in the cache (~/.cache/huggingface, or $HF_HOME)\n"
    "    - fetch them elsewhere with `hf download timm/test_vit.r160_in1k` and copy that cache folder here\n"
    '    - train from scratch: SET="model.weights=none"\n'
    '    - start from a run of your own: SET="model.weights=run:<experiment>"'
)
PRETRAINED = ModelSpec(arch="test_vit.r160_in1k", weights="pretrained")


def test_no_cache_and_no_hub_is_told_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(HubError) as caught:
            build_model(PRETRAINED, classes=3, channels=1)
    assert time.monotonic() - began < 2
    assert str(caught.value) == MESSAGE.format(reason="ConnectionRefusedError: [Errno 111] Connection refused")
    assert caught.value.exit_code == 3


def test_an_offline_hub_is_not_asked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as caught:
        build_model(PRETRAINED, classes=3, channels=1)
    assert str(caught.value) == MESSAGE.format(reason="OSError: HF_HUB_OFFLINE is set")


@pytest.fixture
def empty_hub() -> Iterator[str]:
    """A server that knows no file."""

    class Nothing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Nothing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_without_the_file_is_told_too(cache: Path, empty_hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", empty_hub)
    template = empty_hub + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(HubError, match=r"of `test_vit\.r160_in1k` are not in the local cache.*\n  \(\w+Error: "):
        build_model(PRETRAINED, classes=3, channels=1)


# --- Pixels to input ---


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("normalize", ["imagenet", "half", "unit", "dataset"])
def test_normalising_is_numpys(normalize: str, channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 200, (2_100, 6, 6, channels), dtype=np.uint8)
    rows = np.arange(2_099, 0, -2)
    scaled = images.astype(np.float64) / 255
    mean = {
        "imagenet": np.array([0.485, 0.456, 0.406]),
        "half": np.full(channels, 0.5),
        "unit": np.zeros(channels),
        "dataset": scaled[rows].mean((0, 1, 2)),
    }[normalize]
    std = {
        "imagenet": np.array([0.229, 0.224, 0.225]),
        "half": np.full(channels, 0.5),
        "unit": np.ones(channels),
        "dataset": scaled[rows].std((0, 1, 2)),
    }[normalize]
    if normalize == "imagenet" and channels == 1:
        mean, std = mean.mean(), std.mean()
    spec = ModelSpec(arch="cnn_3block", normalize=normalize, image_size=16)
    prepare = to_input(spec, images, rows)
    prepare.image_size = 6
    expected = ((scaled[:5] - mean) / std).transpose(0, 3, 1, 2)
    ours = prepare(torch.from_numpy(images[:5]))
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_only_training_images_set_the_statistics() -> None:
    images = np.zeros((4, 16, 16, 1), dtype=np.uint8)
    images[2:] = 255
    images[0, 0] = 255
    prepare = to_input(ModelSpec(arch="cnn_3block"), images, np.array([0, 1]))
    assert float(prepare.mean) == pytest.approx(1 / 32)


@given(st.integers(0, 255))
@settings(max_examples=30)
def test_one_flat_colour_has_a_deviation_to_divide_by(level: int) -> None:
    images = np.full((3, 16, 16, 1), level, dtype=np.uint8)
    prepare = to_input(ModelSpec(arch="cnn_3block", image_size=16), images, np.arange(3))
    assert prepare(torch.from_numpy(images)).abs().max() < 1e-3


def test_enlarging_is_interpolate_within_the_range(pixels: np.ndarray) -> None:
    images = torch.from_numpy(pixels[:3])
    scaled = images.permute(0, 3, 1, 2).float() / 255
    for mode in ("bicubic", "bilinear"):
        expected = functional.interpolate(scaled, (224, 224), mode=mode, align_corners=False)
        ours = ToInput(224, mode, [0.0], [1.0])(images)
        assert torch.equal(ours, expected.clamp(0, 1))
        assert (expected.max() > 1) == (mode == "bicubic")


def test_shrinking_is_antialiased_and_sees_every_pixel() -> None:
    stripes = np.zeros((1, 48, 48, 1), dtype=np.uint8)
    stripes[:, :, ::3] = 255
    small = ToInput(16, "bilinear", [0.0], [1.0])(torch.from_numpy(stripes))
    inner = small[..., 1:-1]
    assert torch.allclose(inner, torch.full_like(inner, 1 / 3), atol=0.01)


@pytest.mark.parametrize("shape", [(144, 32), (32, 144)])
def test_shrinking_one_side_alone_is_antialiased_too(shape: tuple[int, int]) -> None:
    stripes = np.zeros((1, *shape, 1), dtype=np.uint8)
    if shape[0] > shape[1]:
        stripes[:, ::3] = 255
    else:
        stripes[:, :, ::3] = 255
    small = ToInput(48, "bilinear", [0.0], [1.0])(torch.from_numpy(stripes))
    assert small.shape == (1, 1, 48, 48)
    inner = small[..., 1:-1, 1:-1]
    assert torch.allclose(inner, torch.full_like(inner, 1 / 3), atol=0.01), "one pixel in three is all that was seen"
