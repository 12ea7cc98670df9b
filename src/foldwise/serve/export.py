"""`export`: a run or a blend as one ONNX or TorchScript file, checked against PyTorch before it is there.

The file takes pixels of the competition's form and gives probabilities; what it is of is written in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from foldwise.data.competition import CompetitionSpec, Dataset, load_competition, load_dataset
from foldwise.errors import Fault, FoldwiseError, RecordError
from foldwise.files import atomic_path, sha256_json
from foldwise.learn.device import Runtime
from foldwise.learn.predict import View, parse_view, predict_batch_size
from foldwise.metrics import METRICS
from foldwise.records.store import Run, rows_of
from foldwise.records.submission import predict_as_described
from foldwise.runs.kept import KeptModel, kept_models
from foldwise.serve.onnx_engine import (
    FORMAT,
    INPUT,
    RESIZING,
    Averaged,
    Blended,
    OnnxEngine,
    check,
    metadata,
    noise,
    reference,
    require,
    torchscript_runner,
    with_metadata,
    write_onnx,
    write_torchscript,
)
from foldwise.serve.predictor import Predictor, resolve
from foldwise.stats import Difference, paired_difference

Kind = Literal["onnx", "torchscript"]
SUFFIX_OF: dict[Kind, str] = {"onnx": ".onnx", "torchscript": ".pt"}
CHECKED = 100
_CALIBRATED = 128
_TIMED, _TIMES = 16, 5
_FP32 = Runtime(torch.device("cpu"), "fp32", 1)

_Pixels = NDArray[np.uint8]
_Probs = NDArray[np.float64]
_Runner = Callable[[_Pixels], _Probs]


@dataclass(frozen=True)
class Quantised:
    """What int8 costs, measured on images that the models did not see.

    Attributes:
        fold: Whose models were measured, on its images; None where no image is held out, and nothing was measured.
        images: How many.
        score: Of the int8 file, by the competition's metric; None where nothing was measured.
        difference: Of the scores, int8 less fp32 (positive where int8 is better), paired; None likewise.
        agreed: Images with the same label from both.
        speed: How many times as fast as the fp32 file.
    """

    fold: int | None
    images: int
    score: float | None
    difference: Difference | None
    agreed: int
    speed: float


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares.

    Attributes:
        path: The file.
        told: What it tells of itself.
        images: What it was checked on, in words.
        count: How many images that were.
        difference: The largest difference of a probability from PyTorch in fp32; of the fp32 file, where this is int8.
        agreed: Images with PyTorch's label.
        record: The name of the kept predictions, their largest difference, and images with their label; None where
            there are none to compare with.
        speeds: How many times as fast as PyTorch, by the precision of the latter.
        quantised: What int8 costs; None for fp32.
    """

    path: Path
    told: dict[str, Any]
    images: str
    count: int
    difference: float
    agreed: int
    record: tuple[str, float, int] | None
    speeds: dict[str, float]
    quantised: Quantised | None


class _Reference:
    """The models of a run in PyTorch, in fp32 on one thread: what a file is held against."""

    def __init__(self, run: Run, views: Sequence[str] | None) -> None:
        self.run = run
        self.models = list(kept_models(run, _FP32))
        self.views: tuple[View, ...] = tuple(parse_view(name) for name in views or run.info["tta"])
        self.classes = run.classes
        self.folds = tuple(sorted({model.fold for model in self.models}))
        self.channels = self.models[0].channels
        self.batch_size = predict_batch_size(self.models[0].spec.image_size)

    def of(self, fold: int | None) -> list[KeptModel]:
        return [model for model in self.models if fold is None or model.fold == fold]

    def probabilities(self, pixels: _Pixels, *, fold: int | None = None) -> _Probs:
        """See `Engine.probabilities`."""
        return reference(self.of(fold), pixels, self.views, batch_size=self.batch_size)


class _Source:
    """All that a file is made of and held against: runs, models, how they blend, and the competition's images."""

    def __init__(self, root: Path, name: str, views: Sequence[str] | None) -> None:
        self.runs, self.blend, called = resolve(name, root)
        self.competition: CompetitionSpec = load_competition(root, self.runs[0].info["competition"])
        self.engines = [_Reference(run, views) for run in self.runs]
        for engine in self.engines:
            if engine.channels != self.competition.image.channels:
                channels, takes = self.competition.image.channels, engine.channels
                what = f"gives images of {channels} channels, but {engine.run.name} takes {takes}"
                fix = "put back what the run was trained with, or train it anew"
                raise RecordError([Fault(f"inputs/{self.competition.name}/competition.yaml", what, fix)])
        self.as_kept = views is None
        self.predictor = Predictor(
            called, root=root, competition=self.competition, runs=self.runs, engines=self.engines, told=self.blend
        )
        self.archs = ", ".join(dict.fromkeys(model.spec.arch for one in self.engines for model in one.models))
        self.data = _taken_in(root, self.runs[0])

    def network(self, fold: int | None) -> nn.Module:
        form = self.competition.image
        each = [Averaged(engine.of(fold), form, engine.views) for engine in self.engines]
        return each[0] if self.blend is None else Blended(each, self.blend)

    def told(self, fold: int | None, precision: str) -> dict[str, Any]:
        """What a file tells of itself."""
        each = [metadata(engine.of(fold), engine.run, self.competition, engine.views) for engine in self.engines]
        version, estimate = self.predictor.version, self.predictor.estimate
        if fold is not None or not self.as_kept or precision != "fp32":
            version = sha256_json([FORMAT, version, fold, [one["views"] for one in each], precision])[:12]
        same = self.as_kept and precision == "fp32"  # else it is another model, whose score is not known
        external = [words for one in each for words in one["external"]]
        return {
            "name": self.predictor.name,
            "version": version,
            **each[0],
            "batch_size": min(one["batch_size"] for one in each),
            "precision": precision,
            "fold": fold,
            "units": [unit for one in each for unit in one["units"]],
            "views": {run: views for one in each for run, views in one["views"].items()},
            "blend": self.blend,
            "estimate": {
                "metric": estimate.metric,
                "score": estimate.score if same else None,
                "standard_error": estimate.standard_error if same else None,
                "interval": estimate.interval if same else None,
            },
            "marks": list(estimate.marks),
            "external": list(dict.fromkeys(external)),
        }

    def wanted(self, pixels: _Pixels, fold: int | None, *, as_trained: bool = False) -> _Probs:
        """What PyTorch answers, in fp32, or in the precision that each run was trained in."""
        each = []
        for engine in self.engines:
            models = engine.of(fold)
            if as_trained:
                models = [replace(model, runtime=replace(_FP32, precision=self.precision)) for model in models]
            each.append(reference(models, pixels, engine.views, batch_size=engine.batch_size))
        return each[0] if self.blend is None else predict_as_described(self.blend, each)

    @property
    def precision(self) -> str:
        """What the first run was trained in, where a CPU computes in it; else fp32."""
        told = self.runs[0].info["precision"]
        precision = str(told[0] if isinstance(told, list) else told)
        return "fp32" if precision == "fp16" else precision

    def recorded(self, fold: int | None) -> tuple[list[str], _Probs]:
        """Ids with what was kept of them when the runs were made: those of test.csv, or of a fold in oof.csv."""
        first = self.runs[0]
        ids = first.test_ids if fold is None else first.ids[first.fold == fold]
        each = [
            run.test_probs[rows_of(run.test_ids, ids)] if fold is None else run.probs[rows_of(run.ids, ids)]
            for run in self.runs
        ]
        return ids.tolist(), each[0] if self.blend is None else predict_as_described(self.blend, each)

    def pixels(self, ids: Sequence[str]) -> _Pixels:
        assert self.data is not None
        pixels: _Pixels = self.data.images[rows_of(self.data.ids, np.array(ids, dtype=np.str_))]
        return pixels


def export(
    root: Path,
    name: str,
    *,
    kind: Kind = "onnx",
    out: Path | None = None,
    fold: int | None = None,
    views: Sequence[str] | None = None,
    int8: bool = False,
    count: int = CHECKED,
) -> Exported:
    """Write a run or a blend as one file, which is there only if it answers as PyTorch does.

    Args:
        root: The project's root.
        name: A run, or a blend, as `Predictor.load` takes it.
        kind: ONNX or TorchScript.
        out: The file; None: `exports/<name>...` below `root`.
        fold: Only the models of this fold; None for all, as for a test image.
        views: Names of the views to average; None: those of the run.
        int8: Weights and activations of 8 bits in all layers that have weights (ONNX alone).
        count: Images to check the file on, at most.

    Returns:
        What was written, and how it compares.

    Raises:
        RecordError: If the run or the blend is not here as it was made, or weights are not on this machine.
        FoldwiseError: If a library is missing, the network cannot be exported, an option does not fit, or the file does
            not answer as PyTorch does.
    """
    if int8 and kind != "onnx":
        raise FoldwiseError("--int8 needs ONNX\n  fix: leave out --format torchscript")
    if count < 1:
        raise FoldwiseError(f"a file must be checked on one image or more, but got {count}\n  fix: --images {CHECKED}")
    if kind == "onnx":
        require()
    source = _Source(root, name, views)
    if fold is not None and fold not in source.predictor.folds:
        there = ", ".join(map(str, source.predictor.folds))
        raise FoldwiseError(f"{source.predictor.name} has no models of fold {fold}\n  fix: --fold, one of {there}")
    if int8 and source.data is None:
        raise FoldwiseError(
            f"--int8 is set up on training images, but {source.competition.name} is not taken in here as the run saw it"
            f"\n  fix: make data COMP={source.competition.name} FROM=<folder>"
        )
    path = out or root / "exports" / _file_name(source.predictor.name, kind, fold, views, int8)
    images, pixels, recorded = _sample(source, fold, count)
    with atomic_path(path) as temporary, _one_thread(), TemporaryDirectory() as scratch:
        plain = Path(scratch) / "fp32.onnx" if int8 else temporary
        _write(source, fold, plain, kind)
        run = _runner(plain, kind)
        wanted = source.wanted(pixels, fold)
        got = run(pixels)
        # One image alone, which a network with the example's batch size frozen in does not take.
        got[:1] = run(pixels[:1])
        difference = check(source.archs, wanted, got, images)
        record = None
        if recorded is not None:
            agreed = int((got.argmax(1) == recorded.argmax(1)).sum())
            record = ("test.csv" if fold is None else "oof.csv", float(np.abs(got - recorded).max()), agreed)
        quantised, told = None, source.told(fold, "int8" if int8 else "fp32")
        if int8:
            _quantise(plain, temporary, _calibration(source, fold), told)
            quantised = _measured(source, fold, (plain, temporary), Path(scratch))
            run = _runner(temporary, kind)
        speeds = _speeds(source, fold, run, pixels[:_TIMED])
    agreed = int((got.argmax(1) == wanted.argmax(1)).sum())
    return Exported(path, told, images, len(pixels), difference, agreed, record, speeds, quantised)


def export_lines(exported: Exported, root: Path) -> list[str]:
    """What was written and how it compares, as lines for the terminal."""
    told, count = exported.told, exported.count
    folds = sorted({unit["fold"] for unit in told["units"]})
    models = "1 model" if len(told["units"]) == 1 else f"{len(told['units'])} models"
    of = f"fold {folds[0]}" if len(folds) == 1 else f"folds {', '.join(map(str, folds))}"
    views = list(dict.fromkeys(", ".join(names) for names in told["views"].values()))
    form = told["competition"]["image"]
    before = "" if exported.quantised is None else ", before int8"
    lines = [
        f"{'network':<12} {told['name']}: {models} of {of}; views {' | '.join(views)}",
        f"{'takes':<12} (N, {form['height']}, {form['width']}, {form['channels']}) uint8, gives (N, "
        f"{len(told['classes'])}) float32: {', '.join(told['classes'])}",
        f"{'checked':<12} {count} {exported.images}{before}: at most {exported.difference:.1e} from PyTorch in fp32, "
        f"labels agree on {exported.agreed}",
    ]
    if exported.record is not None:
        name, largest, agreed = exported.record
        lines.append(
            f"{'record':<12} at most {largest:.1e} from {name} as it was kept{before}, labels agree on {agreed}"
        )
    if (costs := exported.quantised) is not None:
        lines += [f"{'' if index else 'int8':<12} {line}" for index, line in enumerate(_int8_lines(costs, told))]
    compared = ", ".join(f"{ratio:.1f} times PyTorch's in {precision}" for precision, ratio in exported.speeds.items())
    lines.append(f"{'speed':<12} {compared} (CPU time of one thread, {_TIMED} images, best of {_TIMES})")
    path = exported.path
    shown = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    lines.append(f"{'written':<12} {shown}, {path.stat().st_size / 1e6:,.1f} MB, version {told['version']}")
    return lines


def _int8_lines(costs: Quantised, told: Mapping[str, Any]) -> list[str]:
    speed = f"{costs.speed:.1f} times the speed of fp32"
    if costs.difference is None or costs.score is None:
        return [f"{speed}; its score is not measured: no image was held out"]
    metric = told["estimate"]["metric"]
    gain = f"{costs.difference.gain:+.4f} +- {costs.difference.standard_error:.4f}"
    whole = "" if told["fold"] is not None else f", by the models of fold {costs.fold} alone"
    return [
        f"{metric} {costs.score:.4f}, {gain} against fp32 (paired, positive is better), labels agree on {costs.agreed}",
        f"on the {costs.images} images of fold {costs.fold} that the models did not see{whole}; {speed}",
    ]


def _file_name(name: str, kind: Kind, fold: int | None, views: Sequence[str] | None, int8: bool) -> str:
    parts = [name.replace(":", "-")]
    parts += [] if fold is None else [f"fold{fold}"]
    parts += [] if views is None else ["_".join(views)]
    parts += ["int8"] if int8 else []
    return "-".join(parts) + SUFFIX_OF[kind]


def _taken_in(root: Path, run: Run) -> Dataset | None:
    """The competition's images and labels, where they are here as the run saw them."""
    try:
        data = load_dataset(root, run.info["competition"])
    except FoldwiseError:
        return None
    return data if data.sha256 == run.info["hashes"]["inputs"] else None


def _sample(source: _Source, fold: int | None, count: int) -> tuple[str, _Pixels, _Probs | None]:
    """What to check a file on: images in words, their pixels, and what was kept of them (None for other views)."""
    if source.data is None:
        pixels = noise(source.competition.image, min(count, _TIMED))
        return f"random images ({source.competition.name} is not taken in here as the run saw it)", pixels, None
    ids, probs = source.recorded(fold)
    if not ids:
        return "labelled images", source.pixels(source.data.ids[:count].tolist()), None
    named = f"test images of {source.competition.name}" if fold is None else f"images of fold {fold}"
    return named, source.pixels(ids[:count]), probs[:count] if source.as_kept else None


def _write(source: _Source, fold: int | None, path: Path, kind: Kind) -> None:
    write = write_onnx if kind == "onnx" else write_torchscript
    told = source.told(fold, "fp32")
    write(source.network(fold), path, form=source.competition.image, told=told, arch=source.archs)


def _runner(path: Path, kind: Kind) -> _Runner:
    return OnnxEngine([path]).probabilities if kind == "onnx" else torchscript_runner(path)


def _calibration(source: _Source, fold: int | None) -> _Pixels:
    """Training images of the models of a fold, the same every time."""
    first, data = source.runs[0], source.data
    assert data is not None
    folds = set(first.fold.tolist())
    # Of a split with one fold nothing that is validated was trained on, by any model; nor a labelled test part.
    held = folds if len(folds) == 1 else {fold}
    unseen = {name for name, own in zip(first.ids.tolist(), first.fold.tolist(), strict=True) if own in held}
    unseen |= set(first.test_ids.tolist())
    labelled = data.ids[data.labels >= 0]
    ids = labelled[[name not in unseen for name in labelled.tolist()]]
    chosen = np.random.default_rng(0).permutation(len(ids))[:_CALIBRATED]
    return source.pixels(ids[np.sort(chosen)].tolist())


def _quantise(plain: Path, path: Path, pixels: _Pixels, told: Mapping[str, Any]) -> None:
    """Write an ONNX file anew with 8 bits in every layer that has weights; what comes before and after stays.

    Static quantisation with a scale a channel (Jacob et al. 2018, arXiv 1712.05877). Dynamic quantisation was slower
    than fp32 in convolutions. Weights keep 7 bits, so that CPUs without VNNI do not overflow.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class _Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter([pixels[start : start + 16] for start in range(0, len(pixels), 16)])

        def get_next(self) -> dict[str, _Pixels] | None:
            batch = next(self._batches, None)
            return None if batch is None else {INPUT: batch}

    model = onnx.load(plain)
    weights = {one.name for one in model.graph.initializer if not one.name.endswith(RESIZING)}
    layers = [
        node.name
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in weights
        if not any(name.endswith(RESIZING) for name in node.input)
    ]
    # PyTorch's exporter did what ONNX Runtime's preparation would do; unless told so, it warns.
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    quantize_static(
        model,
        path,
        _Reader(),
        quant_format=QuantFormat.QDQ,
        nodes_to_quantize=layers,
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    with_metadata(path, told)


def _measured(source: _Source, fold: int | None, files: tuple[Path, Path], scratch: Path) -> Quantised:
    """What int8 costs, by the models of one fold on the images that they did not see.

    Args:
        source: What the files were made of.
        fold: Of the files; None for all, for which the first fold then stands.
        files: In fp32 and in int8.
        scratch: A folder to write in.
    """
    first = source.runs[0]
    held_out = [one for one in source.predictor.folds if (first.fold == one).any()]
    measured = fold if fold is not None else min(held_out, default=None)
    if measured != fold:
        files = scratch / "measured.onnx", scratch / "measured_int8.onnx"
        _write(source, measured, files[0], "onnx")
        _quantise(*files, _calibration(source, measured), source.told(measured, "int8"))
    plain, quantised = (_runner(path, "onnx") for path in files)
    timed = _calibration(source, measured)[:_TIMED]
    seconds = _seconds({"fp32": _applied(plain, timed), "int8": _applied(quantised, timed)})
    speed = seconds["fp32"] / seconds["int8"]
    if measured not in held_out:
        return Quantised(None, 0, None, None, 0, speed)
    rows = first.fold == measured
    ids, labels = first.ids[rows], first.labels[rows]
    pixels = source.pixels(ids.tolist())
    before, after = plain(pixels), quantised(pixels)
    metric = METRICS[source.competition.metric]
    assert source.data is not None
    difference = paired_difference(metric, labels, after, before, source.data.folds.groups_of(ids.tolist()))
    agreed = int((before.argmax(1) == after.argmax(1)).sum())
    return Quantised(measured, len(ids), metric.score(labels, after), difference, agreed, speed)


def _speeds(source: _Source, fold: int | None, run: _Runner, pixels: _Pixels) -> dict[str, float]:
    """How many times as fast as PyTorch a file is, by PyTorch's precision: fp32, and what the run was trained in."""
    ways: dict[str, Callable[[], _Probs]] = {
        "file": _applied(run, pixels),
        "fp32": lambda: source.wanted(pixels, fold),
    }
    if source.precision != "fp32":
        ways[source.precision] = lambda: source.wanted(pixels, fold, as_trained=True)
    seconds = _seconds(ways)
    return {name: seconds[name] / seconds["file"] for name in ways if name != "file"}


def _applied(run: _Runner, pixels: _Pixels) -> Callable[[], _Probs]:
    return lambda: run(pixels)


def _seconds(ways: Mapping[str, Callable[[], _Probs]]) -> dict[str, float]:
    """CPU seconds of each way, the least of several; taken in turns, so that what else the machine does hits all."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(_TIMES):
        for name, way in ways.items():
            began = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - began)
    return best


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
