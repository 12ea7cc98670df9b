"""Exported files answer as PyTorch does, whatever the network, say what they are of, and are there only if they do.

Networks of each family are made by hand and never trained; runs and blends are those of the shared project.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foldwise.data.competition import CompetitionSpec, load_competition, load_dataset
from foldwise.data.readers import ImageSpec
from foldwise.errors import DivergedError, FoldwiseError, RecordError
from foldwise.learn.device import pick_runtime
from foldwise.learn.models import ToInput, build_model, place
from foldwise.learn.predict import parse_view
from foldwise.metrics import METRICS
from foldwise.records.store import load_run, rows_of
from foldwise.records.submission import predict_as_described
from foldwise.runs.kept import KeptModel
from foldwise.serve import export as module
from foldwise.serve import onnx_engine
from foldwise.serve.export import Exported, export, export_lines
from foldwise.serve.onnx_engine import (
    Averaged,
    Blended,
    OnnxEngine,
    metadata,
    noise,
    reference,
    torchscript_runner,
    write_onnx,
    write_torchscript,
)
from foldwise.serve.predictor import Predictor
from foldwise.spec.model import ModelSpec

FORM = ImageSpec(height=24, width=20, channels=1)
COMPETITION = CompetitionSpec(name="made", classes=("a", "b", "c"), image=FORM)
RUNTIME = pick_runtime("cpu", "fp32", 1)
VIEWS = tuple(parse_view(name) for name in ("identity", "hflip", "shift+hflip", "rotate_10", "zoom_1.1"))
FAMILIES = {
    "cnn_3block": {},
    "cnn_3stage_cbam": {},
    "vit_small_patch8_48": {"embed_dim": 24, "depth": 1, "num_heads": 3},
    "test_resnet": {},
    "repvgg_a0": {},
    "test_convnext": {},
    "test_efficientnet": {},
}


def made(model: nn.Module, spec: ModelSpec, *, std: float = 0.2) -> KeptModel:
    """A unit of a run, of three classes."""
    prepare = ToInput(spec.image_size, spec.interpolation, [0.4], [std])
    return KeptModel(0, 42, spec, COMPETITION.classes, place(model, RUNTIME).eval(), prepare, VIEWS, RUNTIME)


def untrained(arch: str, seed: int = 0, size: int = 32, **options: Any) -> KeptModel:
    """A network that answers differently to different images, with statistics of a batch norm that say something."""
    torch.manual_seed(seed)
    spec = ModelSpec(arch=arch, image_size=size, options=options)
    model = build_model(spec, classes=3, channels=1)
    unit = made(model, spec)
    images = unit.prepare(torch.from_numpy(pictures(8)))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # so that one pass sets the statistics
                layer.weight.uniform_(0.5, 1.5)
        model.train()(images)
        last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
        logits = model.eval()(images)
        scale = 1 / logits.std(0).mean()
        last.weight.mul_(scale)
        last.bias.copy_(scale * (last.bias - logits.mean(0)))
    return unit


def pictures(count: int) -> np.ndarray:
    """(count, H, W, 1) uint8: blobs at different places, lighter and darker."""
    rng = np.random.default_rng(5)
    rows, columns = np.mgrid[: FORM.height, : FORM.width]
    middles = rng.uniform(4, 16, (count, 2, 1, 1))
    blobs = np.exp(-((rows - middles[:, 0]) ** 2 + (columns - middles[:, 1]) ** 2) / 30)
    return (rng.uniform(60, 250, (count, 1, 1)) * blobs)[..., None].astype(np.uint8)


def told_of(unit: KeptModel) -> dict[str, Any]:
    return {
        "format": onnx_engine.FORMAT,
        "classes": list(unit.classes),
        "competition": COMPETITION.model_dump(mode="json"),
        "batch_size": 4,
        "units": [{"run": "made", "fold": unit.fold, "seed": unit.seed, "sha256": "0" * 64}],
    }


def written(unit: KeptModel, path: Path, **changes: Any) -> Path:
    told = told_of(unit) | changes
    write_onnx(Averaged([unit], FORM, unit.views), path, form=FORM, told=told, arch=unit.spec.arch)
    return path


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> tuple[KeptModel, Path]:
    """A small network, and its file."""
    unit = replace(untrained("cnn_3block", size=16), views=(parse_view("identity"),))
    return unit, written(unit, tmp_path_factory.mktemp("block") / "block.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_answers_as_in_pytorch(arch: str, tmp_path: Path) -> None:
    unit = untrained(arch, **FAMILIES[arch])
    pixels = pictures(7)
    wanted = reference([unit], pixels, unit.views)
    assert wanted.std(axis=0).min() > 0.01, "the images must be told apart"
    engine = OnnxEngine([written(unit, tmp_path / "file.onnx")])
    network = Averaged([unit], FORM, unit.views)
    write_torchscript(network, tmp_path / "file.pt", form=FORM, told=told_of(unit), arch=arch)
    for run in (engine.probabilities, torchscript_runner(tmp_path / "file.pt")):
        np.testing.assert_allclose(run(pixels), wanted, atol=2e-5)
        np.testing.assert_array_equal(run(pixels[:1]).argmax(1), wanted[:1].argmax(1))


@settings(max_examples=30)
@given(
    height=st.integers(9, 60),
    width=st.integers(9, 60),
    size=st.integers(16, 64),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_resizing_by_matrices_is_that_of_training(height: int, width: int, size: int, interpolation: Any) -> None:
    class Passed(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    form = ImageSpec(height=height, width=width, channels=1)
    spec = ModelSpec(arch="cnn_3block", image_size=size, interpolation=interpolation)
    unit = made(Passed(), spec, std=0.02)
    pixels = torch.from_numpy(noise(form, 2))
    got = Averaged([unit], form, [parse_view("identity")])(pixels)
    torch.testing.assert_close(got, unit.prepare(pixels).flatten(1).softmax(1), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("method", ["single", "best", "mean", "caruana", "logit_mean", "stack"])
@pytest.mark.parametrize("correction", [None, {"exponent": 1.3, "factors": [0.7, 0.0, 1.6]}])
def test_a_blend_is_what_its_description_says(method: str, correction: dict[str, Any] | None) -> None:
    class Answers(nn.Module):
        def __init__(self, probs: np.ndarray) -> None:
            super().__init__()
            self.probs = torch.from_numpy(probs).float()

        def forward(self, _pixels: torch.Tensor) -> torch.Tensor:
            return self.probs

    rng = np.random.default_rng(1)
    each = [rng.dirichlet(np.full(3, 0.3), 40).astype(np.float32).astype(np.float64) for _ in range(2)]
    each[0][0] = (1, 0, 0)  # whose logs have a bound
    told = {
        "method": method,
        "classes": ["a", "b", "c"],
        "members": [
            {"weight": 0.6, "coefficient": 0.55, "temperature": 0.8},
            {"weight": 0.4, "coefficient": 0.7, "temperature": 1.7},
        ],
        "bias": [0.2, -0.1, 0.05] if method == "stack" else [0.0, 0.0, 0.0],
        "prior": {"kind": "train", "correction": correction},
    }
    if method in ("single", "best"):
        told["members"], each = told["members"][:1], each[:1]
    got = Blended([Answers(probs) for probs in each], told)(torch.zeros(1))
    np.testing.assert_allclose(got.numpy(), predict_as_described(told, each), atol=5e-6)


def test_the_first_blends_had_weights_alone() -> None:
    told = {"method": "caruana", "classes": ["a", "b"], "members": [{"weight": 0.25}, {"weight": 0.75}]}
    probs = [np.array([[0.9, 0.1]]), np.array([[0.2, 0.8]])]
    members = [nn.Sequential(nn.Identity()) for _ in probs]
    blended = Blended(members, told)
    for member, one in zip(members, probs, strict=True):
        member.forward = lambda _pixels, one=one: torch.tensor(one).float()
    np.testing.assert_allclose(blended(torch.zeros(1)).numpy(), predict_as_described(told, probs), atol=5e-6)


# A run, a fold and a blend --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fold_file(asked_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Fold 1 of the run `tiny`."""
    return export(asked_root, "tiny", fold=1, out=tmp_path_factory.mktemp("exported") / "tiny.onnx", count=20)


@pytest.mark.slow
def test_a_fold_gives_its_oof_rows_again(asked_root: Path, fold_file: Exported) -> None:
    run, data = load_run(asked_root / "oof" / "tiny"), load_dataset(asked_root, "demo")
    rows = run.fold == 1
    engine = OnnxEngine([fold_file.path])
    probs = engine.probabilities(data.images[rows_of(data.ids, run.ids[rows])], fold=1)
    np.testing.assert_allclose(probs, run.probs[rows], atol=1e-5)
    assert fold_file.difference < 1e-5
    assert fold_file.record is not None
    assert fold_file.record[0] == "oof.csv"
    assert fold_file.record[1] < 1e-5
    assert fold_file.record[2] == fold_file.agreed == fold_file.count == 20
    assert set(fold_file.speeds) == {"fp32"}


@pytest.mark.slow
def test_a_file_says_what_it_is_of(asked_root: Path, fold_file: Exported) -> None:
    info = load_run(asked_root / "oof" / "tiny").info
    proto = onnx.load(fold_file.path)
    (entry,) = proto.metadata_props
    told = json.loads(entry.value)
    assert told == json.loads(json.dumps(fold_file.told))
    assert told["units"] == [{"run": "tiny", "fold": 1, "seed": 42, "sha256": info["weights"]["fold1/seed42"]}]
    competition = load_competition(asked_root, "demo")
    assert ImageSpec.model_validate(told["competition"]["image"]) == competition.image
    assert tuple(told["classes"]) == competition.classes
    assert told["views"] == {"tiny": ["identity", "hflip"]}
    assert (told["estimate"]["score"], told["estimate"]["standard_error"]) == (info["score"], info["standard_error"])
    assert (told["external"], told["marks"], told["precision"], told["fold"]) == ([], [], "fp32", 1)
    source = str(Path(onnx_engine.__file__).parent).encode()
    assert source not in fold_file.path.read_bytes(), "nothing tells where the file was made"


@pytest.mark.slow
def test_lines_say_what_was_written(asked_root: Path, fold_file: Exported) -> None:
    lines = export_lines(fold_file, fold_file.path.parent)
    classes = ", ".join(load_competition(asked_root, "demo").classes)
    assert lines[:2] == [
        "network      tiny: 1 model of fold 1; views identity, hflip",
        f"takes        (N, 48, 48, 1) uint8, gives (N, 7) float32: {classes}",
    ]
    assert lines[2].startswith("checked      20 images of fold 1: at most ")
    assert lines[2].endswith(" from PyTorch in fp32, labels agree on 20")
    assert lines[3].startswith("record       at most ")
    assert lines[3].endswith(" from oof.csv as it was kept, labels agree on 20")
    size = fold_file.path.stat().st_size / 1e6
    assert lines[-1] == f"written      tiny.onnx, {size:,.1f} MB, version {fold_file.told['version']}"
    assert len(lines) == 6


@pytest.mark.slow
def test_a_whole_run_in_torchscript(asked_root: Path, tmp_path: Path) -> None:
    done = export(asked_root, "tiny", kind="torchscript", out=tmp_path / "tiny.pt")
    run, data = load_run(asked_root / "oof" / "tiny"), load_dataset(asked_root, "demo")
    probs = torchscript_runner(done.path)(data.images[rows_of(data.ids, run.test_ids)])
    np.testing.assert_allclose(probs, run.test_probs, atol=1e-5)
    assert done.told["version"] == Predictor.load("tiny", root=asked_root, device="cpu").version
    assert done.record is not None
    assert (done.record[0], len(done.told["units"]), done.told["fold"]) == ("test.csv", 5, None)


@pytest.mark.slow
def test_a_blend_of_runs_with_several_seeds(asked_root: Path, tmp_path: Path) -> None:
    done = export(asked_root, "best", fold=0, out=tmp_path / "blend.onnx", count=10)
    predictor = Predictor.load("best", root=asked_root, device="cpu")
    data = load_dataset(asked_root, "demo")
    wanted = predictor.predict(list(data.images[:9]), fold=0).probabilities
    np.testing.assert_allclose(OnnxEngine([done.path]).probabilities(data.images[:9]), wanted, atol=1e-5)
    assert [(unit["run"], unit["seed"]) for unit in done.told["units"]] == [("tiny", 42), ("twice", 1), ("twice", 2)]
    assert done.told["blend"]["method"] == "mean"
    assert done.told["version"] != predictor.version


@pytest.mark.slow
def test_int8_is_measured_on_what_the_models_did_not_see(asked_root: Path, tmp_path: Path) -> None:
    done = export(asked_root, "tiny", fold=1, int8=True, out=tmp_path / "int8.onnx", count=5)
    costs = done.quantised
    assert costs is not None
    assert costs.difference is not None
    run, data = load_run(asked_root / "oof" / "tiny"), load_dataset(asked_root, "demo")
    rows = run.fold == 1
    pixels = data.images[rows_of(data.ids, run.ids[rows])]
    probs = OnnxEngine([done.path]).probabilities(pixels)
    assert 1e-5 < np.abs(probs - run.probs[rows]).max() < 0.2
    assert (costs.fold, costs.images) == (1, int(rows.sum()))
    assert costs.score == METRICS["accuracy"].score(run.labels[rows], probs)
    assert costs.difference.gain == pytest.approx(costs.score - run.info["fold_scores"]["1"])
    assert costs.agreed == (probs.argmax(1) == run.probs[rows].argmax(1)).sum()
    assert done.told["precision"] == "int8"
    nodes = onnx.load(done.path).graph.node
    made_by = {output: node for node in nodes for output in node.output}
    resizing = [node for node in nodes if any(name.endswith(onnx_engine.RESIZING) for name in node.input)]
    weighted = [node for node in nodes if node.op_type in ("Conv", "Gemm")]
    assert len(resizing) == 2
    assert weighted
    assert all(made_by[node.input[1]].op_type == "DequantizeLinear" for node in weighted)
    lines = export_lines(done, tmp_path)
    assert lines[4].startswith(f"int8         accuracy {costs.score:.4f}, {costs.difference.gain:+.4f} +- ")
    assert lines[5].startswith(f"             on the {costs.images} images of fold 1 that the models did not see; ")


@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_not_written(
    asked_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "reference", lambda models, pixels, views, **_options: np.full((len(pixels), 7), 1 / 7))
    with pytest.raises(FoldwiseError) as caught:
        export(asked_root, "tiny", fold=0, kind="torchscript", out=tmp_path / "tiny.pt", count=5)
    assert str(caught.value).startswith("`vit_tiny_patch16_224`: the exported file is up to 0.")
    assert str(caught.value).endswith(
        " from PyTorch on images of fold 0, and 0.0001 is allowed; nothing was written\n"
        "  fix: serve it with PyTorch (--engine torch)"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_the_images_random_ones_are_used(project: Path) -> None:
    (project / "inputs" / "demo" / "train.csv").unlink()
    done = export(project, "tiny", fold=0, kind="torchscript", views=["identity"])
    assert done.path == project / "exports" / "tiny-fold0-identity.pt"
    assert done.images == "random images (demo is not taken in here as the run saw it)"
    assert (done.count, done.record) == (16, None)
    with pytest.raises(FoldwiseError) as caught:
        export(project, "tiny", int8=True)
    assert str(caught.value) == (
        "--int8 is set up on training images, but demo is not taken in here as the run saw it\n"
        "  fix: make data COMP=demo FROM=<folder>"
    )


def test_options_that_do_not_fit_are_refused(asked_root: Path) -> None:
    for options, message in (
        ({"int8": True, "kind": "torchscript"}, "--int8 needs ONNX\n  fix: leave out --format torchscript"),
        ({"fold": 7}, "tiny has no models of fold 7\n  fix: --fold, one of 0, 1, 2, 3, 4"),
        ({"count": 0}, "a file must be checked on one image or more, but got 0\n  fix: --images 100"),
    ):
        with pytest.raises(FoldwiseError) as caught:
            export(asked_root, "tiny", **options)
        assert str(caught.value) == message


def test_a_missing_library_is_named(asked_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(FoldwiseError) as caught:
        export(asked_root, "tiny")
    assert str(caught.value) == 'onnxscript is not installed\n  fix: pip install "foldwise[export]"'


@pytest.mark.slow
def test_a_network_that_cannot_be_exported_is_named(tmp_path: Path) -> None:
    class Moody(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, : 3 if images.sum() > 0 else 4]

    unit = made(Moody(), ModelSpec(arch="cnn_3block", image_size=16))
    with pytest.raises(FoldwiseError) as caught:
        written(unit, tmp_path / "moody.onnx")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("`cnn_3block` cannot be written as ONNX: ")
    assert lines[1:] == ["  fix: serve it with PyTorch (--engine torch)"]


# The engine -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_engine_of_a_run_answers_as_its_oof_and_keeps_its_files(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = load_run(project / "oof" / "tiny"), load_dataset(project, "demo")
    kept_units = dict(list(run.info["weights"].items())[:2])
    run.info["weights"] = kept_units
    stale = run.path / "export" / "fold0-seed42-000000000000.onnx"
    stale.parent.mkdir()
    stale.touch()
    engine = OnnxEngine.of_run(run, data.competition)
    assert (engine.classes, engine.folds, engine.channels) == (run.classes, (0, 1), 1)
    for fold in (0, 1):
        rows = run.fold == fold
        probs = engine.probabilities(data.images[rows_of(data.ids, run.ids[rows])], fold=fold)
        np.testing.assert_allclose(probs, run.probs[rows], atol=1e-5)
    pixels = data.images[:5]
    mean = (engine.probabilities(pixels, fold=0) + engine.probabilities(pixels, fold=1)) / 2
    np.testing.assert_allclose(engine.probabilities(pixels), mean, atol=1e-7)
    assert not stale.exists()
    names = [path.name.rpartition("-")[0] for path in sorted(stale.parent.iterdir())]
    assert names == ["fold0-seed42", "fold1-seed42"]

    def again(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("was exported again")

    monkeypatch.setattr(onnx_engine, "write_onnx", again)
    assert engine.told["name"] == "tiny/fold0/seed42"
    OnnxEngine.of_run(run, data.competition)
    run.info["tta"] = ["identity"]
    with pytest.raises(AssertionError, match="was exported again"):
        OnnxEngine.of_run(run, data.competition)


def test_a_folder_that_cannot_be_written_is_named(project: Path) -> None:
    run = load_run(project / "oof" / "tiny")
    (run.path / "export").touch()
    with pytest.raises(FoldwiseError) as caught:
        OnnxEngine.of_run(run, load_competition(project, "demo"))
    assert str(caught.value) == (
        "oof/tiny/export cannot be written: File exists\n"
        "  fix: ask once where it can: python run.py predict tiny <picture> --engine onnx"
    )


@pytest.mark.slow
def test_an_answer_does_not_depend_on_the_others_in_its_batch(block: tuple[KeptModel, Path]) -> None:
    path = block[1]
    pixels = noise(FORM, 6)
    answers = [OnnxEngine([path], batch_size=size).probabilities(pixels) for size in (1, 4, 6)]
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])
    assert OnnxEngine([path]).batch_size == 4
    assert OnnxEngine([path]).probabilities(pixels[:0]).shape == (0, 3)


@pytest.mark.slow
def test_the_same_network_gives_the_same_bytes(block: tuple[KeptModel, Path], tmp_path: Path) -> None:
    unit, path = block
    assert written(unit, tmp_path / "again.onnx").read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_what_is_asked_wrongly_is_refused(block: tuple[KeptModel, Path]) -> None:
    engine = OnnxEngine([block[1]])
    with pytest.raises(FoldwiseError) as caught:
        engine.probabilities(np.zeros((2, 24, 24, 1), np.uint8))
    assert str(caught.value) == (
        "the models take images of 24x20 px and 1 channels, uint8, but got uint8 of shape (24, 24, 1)\n"
        "  fix: bring them to that form first"
    )
    with pytest.raises(FoldwiseError) as caught:
        engine.probabilities(noise(FORM, 1), fold=3)
    assert str(caught.value) == "there are no models of fold 3 alone\n  fix: leave the fold out; there: 0"


@pytest.mark.slow
def test_a_model_that_diverged_is_refused(tmp_path: Path) -> None:
    unit = replace(untrained("cnn_3block", size=16), views=(parse_view("identity"),))
    with torch.no_grad():
        unit.model.head[-1].bias[0] = torch.inf
    with pytest.raises(DivergedError) as caught:
        OnnxEngine([written(unit, tmp_path / "inf.onnx")]).probabilities(noise(FORM, 2))
    assert str(caught.value) == "the probabilities of row 0 (of 2) are not finite"


@pytest.mark.slow
def test_files_of_others_are_refused(block: tuple[KeptModel, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    with pytest.raises(FoldwiseError) as caught:
        OnnxEngine([other])
    assert str(caught.value) == f"{other}: there is no such file\n  fix: python run.py export <run> --out {other}"
    other.write_bytes(block[1].read_bytes()[:5000])
    with pytest.raises(FoldwiseError) as caught:
        OnnxEngine([other])
    assert str(caught.value).startswith(f"{other}: ONNX Runtime cannot read it (")
    proto = onnx.load(block[1])
    del proto.metadata_props[:]
    onnx.save(proto, other)
    with pytest.raises(RecordError, match="does not say what it is of: Foldwise did not export it"):
        OnnxEngine([other])
    onnx_engine.with_metadata(other, told_of(block[0]) | {"format": 0})
    with pytest.raises(RecordError, match=r"was exported by another version of Foldwise \(format 0, here 1\)"):
        OnnxEngine([other])


def test_what_a_file_tells_of_external_data(asked_root: Path) -> None:
    run = load_run(asked_root / "oof" / "tiny")
    run.info["external"] = [{"source": "more", "images": 1200}]
    run.info["weights"] = {"fold0/seed42": "a" * 64}
    unit = untrained("cnn_3block", size=16)
    told = metadata([unit], run, COMPETITION, unit.views)
    assert told["external"] == ["more (1,200 images)"]
    # 128 images at 16 px, over thirteen renderings of five views
    assert (told["batch_size"], told["units"][0]["sha256"]) == (9, "a" * 64)
