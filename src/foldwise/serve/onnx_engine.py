"""Runs and blends as one network from stored pixels to class probabilities, written as a file, and what runs the file.

Resizing, views, averaging and blending are in the network, so that the file alone is enough to predict with.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn import functional

from foldwise.data.competition import CompetitionSpec
from foldwise.data.readers import ImageSpec
from foldwise.errors import DivergedError, Fault, FoldwiseError, RecordError
from foldwise.files import atomic_path, sha256_json
from foldwise.learn.device import Runtime
from foldwise.learn.predict import View, parse_view, predict, predict_batch_size
from foldwise.metrics import LOG_LOSS_EPS
from foldwise.records.store import Run, external_words, shown
from foldwise.runs.kept import KeptModel, kept_models

FORMAT = 1
INPUT, OUTPUT = "pixels", "probabilities"
METADATA = "foldwise"
TOLERANCE = 1e-4
"""How far a probability may be from PyTorch's in fp32; fusing a network's branches moves it by some 1e-6."""

# The last with GridSample and Gelu as PyTorch means them that runtimes of several years understand.
_OPSET = 20
_MOST_BYTES = 2**31 - 2**20  # protobuf's bound on a file
# Two matrices that resize; quantisation leaves them alone.
RESIZING = ("resize_rows", "resize_columns")


class Averaged(nn.Module):
    """The models of a run with the same way in and the same views: pixels to the mean of their probabilities."""

    grids: Tensor
    shares: Tensor
    resize_rows: Tensor
    resize_columns: Tensor

    def __init__(self, models: Sequence[KeptModel], form: ImageSpec, views: Sequence[View]) -> None:
        """Put models together; they stay as they are.

        Args:
            models: At least one, on the CPU.
            form: Of the images.
            views: Averaged with equal weight, each over its renderings.
        """
        super().__init__()
        size, interpolation = models[0].spec.image_size, models[0].spec.interpolation
        # Branches that a network only needs in training become one convolution each.
        self.networks = nn.ModuleList(
            reparameterize_model(model.model).to(memory_format=torch.contiguous_format) for model in models
        )
        self.normalisations = nn.ModuleList(_Normalise(model) for model in models)
        self._resizes = (form.height, form.width) != (size, size)
        if self._resizes:
            shrinks = max(form.height, form.width) > size
            rows, columns = (_resizing(side, size, interpolation, shrinks) for side in (form.height, form.width))
            self.register_buffer("resize_rows", rows)
            self.register_buffer("resize_columns", columns.T.contiguous())
        renderings = [(view, rendering) for view in views for rendering in view.renderings]
        shares = [1 / (len(views) * len(view.renderings)) for view, _ in renderings]
        self.register_buffer("shares", torch.tensor(shares).view(-1, 1, 1))
        # For each rendering: the image as it is, its mirror image, or the row of the grid that it is sampled at.
        self._ways: list[str | int] = []
        grids: list[Tensor] = []
        for _, rendering in renderings:
            if rendering is None:
                self._ways.append("as it is")
            elif torch.equal(rendering, torch.tensor([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])):
                self._ways.append("mirrored")
            else:
                self._ways.append(len(grids))
                grids.append(functional.affine_grid(rendering[None], [1, 1, size, size], align_corners=False))
        if grids:
            self.register_buffer("grids", torch.stack(grids))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, H, W, C) uint8 -> (B, classes) float32."""
        images = pixels.permute(0, 3, 1, 2).float() / 255
        if self._resizes:
            images = (self.resize_rows @ images @ self.resize_columns).clamp(0, 1)
        # All renderings in one pass: the network is in the file once.
        rendered = torch.cat([self._rendered(images, way) for way in self._ways])
        total: Tensor | None = None
        for normalise, network in zip(self.normalisations, self.networks, strict=True):
            probs = network(normalise(rendered)).softmax(1)
            total = probs if total is None else total + probs
        assert total is not None
        mean = total / len(self.networks)
        return (mean.view(len(self._ways), -1, mean.shape[1]) * self.shares).sum(0)

    def _rendered(self, images: Tensor, way: str | int) -> Tensor:
        if isinstance(way, str):
            return images if way == "as it is" else images.flip(-1)
        grid = self.grids[way].expand(images.shape[0], -1, -1, -1)
        return functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


class _Normalise(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, model: KeptModel) -> None:
        super().__init__()
        self.register_buffer("mean", model.prepare.mean.clone())
        self.register_buffer("std", model.prepare.std.clone())

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Blended(nn.Module):
    """A blend as its `blend.json` tells; see `records.submission.predict_as_described`, which this must agree with."""

    temperatures: Tensor
    coefficients: Tensor
    bias: Tensor
    logs_of_factors: Tensor

    def __init__(self, members: Sequence[nn.Module], told: Mapping[str, Any]) -> None:
        """Put a blend together.

        Args:
            members: Pixels to probabilities, one for each of the blend's runs, in their order.
            told: The content of `blend.json`.
        """
        super().__init__()
        runs = told["members"]
        self.members = nn.ModuleList(members)
        self._method = "best" if told["method"] == "single" else told["method"]
        self.register_buffer("coefficients", torch.tensor([run.get("coefficient", run["weight"]) for run in runs]))
        self.register_buffer("temperatures", torch.tensor([run.get("temperature", 1.0) for run in runs]))
        self.register_buffer("bias", torch.tensor(told.get("bias", [0.0] * len(told["classes"]))))
        correction = told.get("prior", {}).get("correction")
        self._exponent = None if correction is None else float(correction["exponent"])
        if correction is not None:
            self.register_buffer("logs_of_factors", torch.tensor(correction["factors"]).log())

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, H, W, C) uint8 -> (B, classes) float32."""
        if self._method == "best":
            probs: Tensor = self.members[0](pixels)
        else:
            logits = torch.stack([_logs(member(pixels)) for member in self.members])
            calibrated = logits / self.temperatures.view(-1, 1, 1)
            shares = self.coefficients.view(-1, 1, 1)
            if self._method in ("mean", "caruana"):
                probs = (shares * calibrated.softmax(2)).sum(0)
            else:
                probs = ((shares * calibrated).sum(0) + self.bias).softmax(1)
        if self._exponent is None:
            return probs
        return (self._exponent * _logs(probs) + self.logs_of_factors).softmax(1)


def _logs(probs: Tensor) -> Tensor:
    return probs.clamp_min(LOG_LOSS_EPS).log()


def _resizing(side: int, size: int, interpolation: str, antialias: bool) -> Tensor:
    """(size, side) that resizes one axis as `ToInput` does: PyTorch's own coefficients, whatever a runtime's are."""
    unit = torch.eye(side)[None, None]
    resized: Tensor = functional.interpolate(
        unit, (size, side), mode=interpolation, align_corners=False, antialias=antialias
    )
    return resized[0, 0]


def metadata(
    models: Sequence[KeptModel], run: Run, competition: CompetitionSpec, views: Sequence[View]
) -> dict[str, Any]:
    """What a file of these models of a run tells of itself, as JSON types: enough to bring a picture to their form."""
    units = [
        {"run": run.name, "fold": one.fold, "seed": one.seed, "sha256": run.info["weights"][unit_name(one)]}
        for one in models
    ]
    renderings = sum(len(view.renderings) for view in views)
    return {
        "format": FORMAT,
        "classes": list(run.classes),
        "competition": competition.model_dump(mode="json", include={"name", "title", "classes", "metric", "image"}),
        "batch_size": max(1, predict_batch_size(models[0].spec.image_size) // renderings),
        "units": units,
        "views": {run.name: [view.name for view in views]},
        "marks": list(run.info["marks"]),
        "external": external_words(run.info["external"]),
    }


def unit_name(model: KeptModel) -> str:
    """As `run.json` names it, e.g. `fold0/seed42`."""
    return f"fold{model.fold}/seed{model.seed}"


def write_onnx(network: nn.Module, path: Path, *, form: ImageSpec, told: Mapping[str, Any], arch: str) -> None:
    """Write a network as an ONNX file that takes any number of images.

    Args:
        network: (N, H, W, C) uint8 to (N, classes) float32; it takes no gradients afterwards.
        path: What to write; not atomic.
        form: Of the images.
        told: What the file tells of itself; kept as JSON under `foldwise`.
        arch: Names the network in messages.

    Raises:
        FoldwiseError: If a library is missing, or PyTorch cannot write this network as ONNX.
    """
    require()
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if size > _MOST_BYTES:
        raise FoldwiseError(
            f"the models take {size / 1e9:.1f} GB, but an ONNX file holds 2 at most\n"
            "  fix: export the models of one fold (--fold 0), or with --format torchscript"
        )
    example = torch.zeros(3, form.height, form.width, form.channels, dtype=torch.uint8)
    network.eval().requires_grad_(False)
    try:
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            opset_version=_OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("images", min=1)},),
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _unsupported(arch, "ONNX", error) from error
    assert program is not None
    proto = program.model_proto
    # Where each node came from in this machine's source files, and shapes that quantisation would make wrong.
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del proto.graph.value_info[:]
    _save(proto, path, told)


def with_metadata(path: Path, told: Mapping[str, Any]) -> None:
    """Write into an ONNX file what it tells of itself, and nothing else."""
    import onnx

    _save(onnx.load(path), path, told)


def _save(proto: Any, path: Path, told: Mapping[str, Any]) -> None:
    del proto.metadata_props[:]
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(told)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def write_torchscript(network: nn.Module, path: Path, *, form: ImageSpec, told: Mapping[str, Any], arch: str) -> None:
    """Write a network as a TorchScript file, with `foldwise.json` in it; see `write_onnx`."""
    example = torch.zeros(3, form.height, form.width, form.channels, dtype=torch.uint8)
    network.eval().requires_grad_(False)
    with _quietly():
        try:
            traced = torch.jit.trace(network, (example,), check_trace=False)  # type: ignore[no-untyped-call]
        except (RuntimeError, TypeError, ValueError) as error:
            raise _unsupported(arch, "TorchScript", error) from error
        torch.jit.save(traced, path, _extra_files={f"{METADATA}.json": json.dumps(told).encode()})


def torchscript_runner(path: Path) -> Callable[[NDArray[np.uint8]], NDArray[np.float64]]:
    """What runs a TorchScript file: (N, H, W, C) uint8 to (N, classes)."""
    files = {f"{METADATA}.json": ""}
    with _quietly():
        network = torch.jit.load(path, map_location="cpu", _extra_files=files)  # type: ignore[no-untyped-call]
    size = json.loads(files[f"{METADATA}.json"])["batch_size"]

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        with torch.inference_mode(), _quietly():
            images = torch.from_numpy(np.array(pixels))
            batches = [images[start : start + size] for start in range(0, len(images), size)]
            answer: NDArray[np.float64] = torch.cat([network(batch) for batch in batches]).double().numpy()
        return answer

    return run


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out that TorchScript is deprecated, which the user knows, and what other batch sizes are checked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def require() -> None:
    """See that the libraries are there that write, change and run ONNX files.

    Raises:
        FoldwiseError: If one is not.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise FoldwiseError(f'{name} is not installed\n  fix: pip install "foldwise[export]"') from None


def _unsupported(arch: str, what: str, error: Exception) -> FoldwiseError:
    reason = next((line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()), "")
    return FoldwiseError(
        f"`{arch}` cannot be written as {what}: {reason[:200]}\n  fix: serve it with PyTorch (--engine torch)"
    )


class OnnxEngine:
    """Exported files in ONNX Runtime, on the CPU; an `Engine` of a `Predictor`.

    Attributes:
        classes: In the order of the columns.
        folds: Whose models can be asked alone.
        batch_size: Images at a time, at most; an answer does not depend on it.
        channels: Of the images.
        told: The metadata of the first file.
        weights: Hashes of the weights in each file.
    """

    def __init__(self, paths: Sequence[Path], *, threads: int = 1, batch_size: int | None = None) -> None:
        """Open files.

        Args:
            paths: One file, or the files of a run's units, which are averaged.
            threads: CPU threads.
            batch_size: Images at a time, at most; None for what fits into memory easily.

        Raises:
            FoldwiseError: If ONNX Runtime is missing, or a file cannot be read.
            RecordError: If a file is none that Foldwise exported.
        """
        opened = [_open(path, threads) for path in paths]
        self.told: dict[str, Any] = opened[0][1]
        self.weights: list[list[str]] = [[unit["sha256"] for unit in told["units"]] for _, told in opened]
        self.classes = tuple(self.told["classes"])
        self.batch_size = batch_size or int(self.told["batch_size"])
        form = self.told["competition"]["image"]
        self.channels = int(form["channels"])
        self._shape = (form["height"], form["width"], form["channels"])
        # A file of several folds answers for all of them together alone.
        self._sessions = [(_only_fold(told), session) for session, told in opened]
        self.folds = tuple(sorted({fold for fold, _ in self._sessions if fold is not None}))

    @classmethod
    def of_run(cls, run: Run, competition: CompetitionSpec, *, threads: int = 1, batch_size: int | None = None) -> Self:
        """Open the models of a run, which are exported into `oof/<run>/export/` where they are not there yet.

        Args:
            run: A complete run.
            competition: What it was trained for.
            threads: CPU threads.
            batch_size: Images at a time, at most; None for what fits into memory easily.

        Raises:
            RecordError: If weights are not on this machine, or not those that `run.json` vouches for.
            FoldwiseError: If a library is missing, or the network cannot be exported.
        """
        form = competition.image.model_dump(mode="json")
        paths = {}
        for unit, sha256 in run.info["weights"].items():
            version = sha256_json([FORMAT, sha256, run.info["tta"], run.classes, form])[:12]
            paths[unit] = run.path / "export" / f"{unit.replace('/', '-')}-{version}.onnx"
        if missing := [unit for unit, path in paths.items() if not path.exists()]:
            _export_units(run, competition, {unit: paths[unit] for unit in missing})
        engine = cls(list(paths.values()), threads=threads, batch_size=batch_size)
        for (unit, path), held in zip(paths.items(), engine.weights, strict=True):
            if held != [run.info["weights"][unit]]:
                what = "is not of the weights that run.json vouches for"
                raise RecordError([Fault(shown(path), what, "delete it; it is made again when asked for")])
        return engine

    def probabilities(self, pixels: NDArray[np.uint8], *, fold: int | None = None) -> NDArray[np.float64]:
        """Predict as `Engine.probabilities` does.

        Args:
            pixels: (N, H, W, C) uint8 of the competition's form.
            fold: Only the models of this fold; None for all.

        Returns:
            (N, classes) float64, as float32 keeps it.

        Raises:
            FoldwiseError: If there is no such fold, or the pixels are of another form.
            DivergedError: If a probability is not finite.
        """
        if pixels.shape[1:] != self._shape or pixels.dtype != np.uint8:
            height, width, channels = self._shape
            raise FoldwiseError(
                f"the models take images of {height}x{width} px and {channels} channels, uint8, but got "
                f"{pixels.dtype} of shape {pixels.shape[1:]}\n  fix: bring them to that form first"
            )
        if fold is not None and fold not in self.folds:
            there = ", ".join(map(str, self.folds)) or "none alone"
            raise FoldwiseError(f"there are no models of fold {fold} alone\n  fix: leave the fold out; there: {there}")
        asked = [session for own, session in self._sessions if fold is None or own == fold]
        total = np.zeros((len(pixels), len(self.classes)))
        for start in range(0, len(pixels), self.batch_size):
            batch = np.ascontiguousarray(pixels[start : start + self.batch_size])
            for session in asked:
                total[start : start + len(batch)] += session.run([OUTPUT], {INPUT: batch})[0]
        probs: NDArray[np.float64] = (total / len(asked)).astype(np.float32).astype(np.float64)
        wrong = np.flatnonzero(~np.isfinite(probs).all(axis=1))
        if len(wrong):
            raise DivergedError(f"the probabilities of row {wrong[0]} (of {len(pixels)}) are not finite")
        return probs


def reference(
    models: Sequence[KeptModel], pixels: NDArray[np.uint8], views: Sequence[View], *, batch_size: int = 128
) -> NDArray[np.float64]:
    """What PyTorch answers: the mean over models, (N, classes), as float32 keeps it; see `learn.predict`.

    Args:
        models: At least one.
        pixels: (N, H, W, C) uint8, at least one image.
        views: To average.
        batch_size: Pictures a forward pass, at most.
    """
    total = np.zeros((len(pixels), len(models[0].classes)))
    size = min(len(pixels), batch_size)
    for model in models:
        probs = predict(model.model, pixels, views, prepare=model.prepare, runtime=model.runtime, batch_size=size)
        total += probs.numpy()
    return (total / len(models)).astype(np.float32).astype(np.float64)


def check(arch: str, wanted: NDArray[np.float64], got: NDArray[np.float64], images: str) -> float:
    """The largest difference between two answers (N, classes).

    Raises:
        FoldwiseError: If it is above `TOLERANCE`.
    """
    largest = float(np.abs(wanted - got).max())
    if not largest <= TOLERANCE:
        raise FoldwiseError(
            f"`{arch}`: the exported file is up to {largest:.2g} from PyTorch on {images}, and {TOLERANCE:g} is "
            "allowed; nothing was written\n  fix: serve it with PyTorch (--engine torch)"
        )
    return largest


def noise(form: ImageSpec, count: int) -> NDArray[np.uint8]:
    """(count, H, W, C) uint8 random pixels, the same every time."""
    shape = (count, form.height, form.width, form.channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _export_units(run: Run, competition: CompetitionSpec, wanted: Mapping[str, Path]) -> None:
    """Write a checked file for each of these units, and delete those of former versions."""
    form = competition.image
    views = [parse_view(name) for name in run.info["tta"]]
    runtime = Runtime(torch.device("cpu"), "fp32", torch.get_num_threads())
    for model in kept_models(run, runtime):
        unit = unit_name(model)
        if unit not in wanted:
            continue
        told = {"name": f"{run.name}/{unit}", **metadata([model], run, competition, views)}
        pixels = noise(form, 5)
        try:
            with atomic_path(wanted[unit]) as temporary:
                write_onnx(Averaged([model], form, views), temporary, form=form, told=told, arch=model.spec.arch)
                got = OnnxEngine([temporary], batch_size=2).probabilities(pixels)
                check(model.spec.arch, reference([model], pixels, views), got, "random images")
            for stale in wanted[unit].parent.glob(f"{unit.replace('/', '-')}-*.onnx"):
                if stale != wanted[unit]:
                    stale.unlink()
        except OSError as error:
            raise FoldwiseError(
                f"{shown(wanted[unit].parent)} cannot be written: {error.strerror}\n"
                f"  fix: ask once where it can: python run.py predict {run.name} <picture> --engine onnx"
            ) from error


def _open(path: Path, threads: int) -> tuple[Any, dict[str, Any]]:
    """A session of ONNX Runtime, and what the file tells of itself."""
    require()
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    if not path.is_file():
        raise FoldwiseError(f"{path}: there is no such file\n  fix: python run.py export <run> --out {path}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait must not keep a CPU busy that something else is served on.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    refused = (states.InvalidProtobuf, states.InvalidArgument, states.InvalidGraph, states.Fail, states.NotImplemented)
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        told = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    except refused as error:
        reason = str(error).splitlines()[0][:200]
        raise FoldwiseError(
            f"{path}: ONNX Runtime cannot read it ({reason})\n  fix: delete it, then export or ask again"
        ) from None
    except (KeyError, ValueError):
        what = "does not say what it is of: Foldwise did not export it"
        raise RecordError([Fault(shown(path), what, "python run.py export <run>")]) from None
    if told.get("format") != FORMAT:
        what = f"was exported by another version of Foldwise (format {told.get('format')}, here {FORMAT})"
        raise RecordError([Fault(shown(path), what, "export it again")])
    return session, told


def _only_fold(told: Mapping[str, Any]) -> int | None:
    folds = {unit["fold"] for unit in told["units"]}
    return folds.pop() if len(folds) == 1 else None
