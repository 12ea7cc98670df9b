"""A run or a blend, loaded once and asked about pictures in batches: the same models, views and arithmetic as its OOF.

What it answers about an image it was trained on proves nothing; `own` tells which fold's models never saw that image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from foldwise.data.competition import CompetitionSpec, load_competition, load_dataset
from foldwise.errors import Fault, FoldwiseError, RecordError
from foldwise.files import sha256_bytes, sha256_json
from foldwise.learn.device import Runtime, pick_runtime
from foldwise.learn.predict import predict, predict_batch_size
from foldwise.records.history import BEST_COPY, STRICT_COPY, History, Submission, read_history
from foldwise.records.store import Run, external_words, load_run
from foldwise.records.submission import predict_as_described
from foldwise.runs.kept import KeptModel, kept_models, weight_files
from foldwise.serve.faces import Box, crop
from foldwise.serve.pictures import to_form

EngineName = Literal["torch", "onnx"]
_BLEND_FILE = BEST_COPY[1]
# To which few pictures are padded, so that one picture does not cost as much as a full batch.
_SMALL_BATCHES = (1, 4, 16)
_PREFIX = "blend:"


class Engine(Protocol):
    """The models of one run, whatever runs them.

    Attributes:
        classes: In the order of the columns.
        folds: Of its units, in order.
        channels: Of the images that it takes.
        batch_size: Pictures a forward pass, at most.
    """

    classes: tuple[str, ...]
    folds: tuple[int, ...]
    channels: int
    batch_size: int

    def probabilities(self, pixels: NDArray[np.uint8], *, fold: int | None = None) -> NDArray[np.float64]:
        """Predict (N, H, W, C) pixels of the competition's form: (N, classes), rows summing to 1.

        The mean over all units, as in `test.csv`; or over those of one fold, as in `oof.csv`.
        """


@dataclass(frozen=True, eq=False)
class Prediction:
    """Answers, a row a picture or a face.

    Attributes:
        labels: (N,) the likeliest class of each.
        probabilities: (N, C) float64, rows summing to 1.
        classes: (C,) in the order of the columns.
    """

    labels: NDArray[np.str_]
    probabilities: NDArray[np.float64]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Own:
    """An image that is one of those the models were trained on.

    Attributes:
        id: Of the image.
        fold: Whose models never saw it; None where every model did.
    """

    id: str
    fold: int | None


@dataclass(frozen=True)
class Estimate:
    """How often it is right on images that it has not seen.

    Attributes:
        metric: The competition's.
        score: Out of fold, or of a blend the cross-fitted one; None where no image was held out.
        standard_error: Of `score`.
        interval: Its 95% interval; None for a run, whose record holds none.
        marks: What flatters it, such as `optimistic`.
    """

    metric: str
    score: float | None
    standard_error: float | None
    interval: tuple[float, float] | None
    marks: tuple[str, ...]

    def __str__(self) -> str:
        """As a command prints it, e.g. `right on 46.3 % +- 1.0 of images that it had not seen`."""
        if self.score is None or self.standard_error is None:
            return "how often it is right is not known: no image was held out"
        form, unit = ("{:.1f}", " %") if self.metric == "accuracy" else ("{:.4f}", "")
        scale = 100 if self.metric == "accuracy" else 1
        score, error = (form.format(value * scale) for value in (self.score, self.standard_error))
        told = f"right on {score} % +- {error}" if unit else f"{self.metric} {score} +- {error}"
        text = f"{told} {'of' if unit else 'on'} images that it had not seen"
        if self.interval is not None:
            low, high = (form.format(value * scale) for value in self.interval)
            text += f" (95 % interval {low} to {high}{unit})"
        return text + (f"; marked {', '.join(self.marks)}" if self.marks else "")


class TorchEngine:
    """The models of a run in PyTorch.

    Attributes:
        classes: In the order of the columns.
        folds: Of its units, in order.
        batch_size: Pictures a forward pass, at most; few are padded to 1, 4 or 16 instead. On a CPU in bf16 the answers
            are the same to the bit for 1, 4, 16 and 128 (resnet18_64, 128 images of fold 1).
    """

    def __init__(self, run: Run, *, device: str | None = None, batch_size: int | None = None) -> None:
        """Load all units; see `Predictor.load`."""
        self._models: list[KeptModel] = list(kept_models(run, run_runtime(run, device)))
        self.classes = run.classes
        self.folds = tuple(sorted({model.fold for model in self._models}))
        self.channels = self._models[0].channels
        self.batch_size = batch_size or predict_batch_size(self._models[0].spec.image_size)

    def probabilities(self, pixels: NDArray[np.uint8], *, fold: int | None = None) -> NDArray[np.float64]:
        """See `Engine.probabilities`."""
        models = [model for model in self._models if fold is None or model.fold == fold]
        size = min(next((few for few in _SMALL_BATCHES if few >= len(pixels)), self.batch_size), self.batch_size)
        total = np.zeros((len(pixels), len(self.classes)))
        for model in models:
            with _threads(model.runtime.threads):
                probs = predict(
                    model.model,
                    pixels,
                    model.views,
                    prepare=model.prepare,
                    runtime=model.runtime,
                    batch_size=size,
                )
            total += probs.numpy().reshape(total.shape)
        # As `test.csv` and `oof.csv` keep them.
        return (total / len(models)).astype(np.float32).astype(np.float64)


class Predictor:
    """A run or a blend that answers; not to be asked by two threads at once.

    Attributes:
        name: Of the run, or `blend:<folder of the submission>`.
        version: First 12 hex digits of a hash over what decides the answer: weights, views, blend and form of images.
        classes: In the order of the probabilities.
        competition: What it was trained for; its `image` is the form that pictures are brought to.
        folds: Whose models can be asked alone.
        estimate: How often it is right.
    """

    def __init__(
        self,
        name: str,
        *,
        root: Path,
        competition: CompetitionSpec,
        runs: Sequence[Run],
        engines: Sequence[Engine],
        told: dict[str, Any] | None = None,
    ) -> None:
        """Put together what was loaded; `load` does it.

        Args:
            name: Of the run or the blend.
            root: The project's root.
            competition: Of the runs.
            runs: The run, or a blend's members in their order.
            engines: Of each run.
            told: The content of `blend.json`; None for a run.
        """
        self.name = name
        self.competition = competition
        self.classes = engines[0].classes
        self.folds = tuple(fold for fold in engines[0].folds if all(fold in engine.folds for engine in engines))
        self.estimate = _estimate(runs[0], told)
        decides = [
            {"run": run.name, "weights": run.info["weights"], "tta": run.info["tta"], "classes": run.classes}
            for run in runs
        ]
        form = competition.image.model_dump(mode="json")
        self.version = sha256_json([decides, told, form])[:12]
        self._root = root
        self._runs = tuple(runs)
        self._engines = tuple(engines)
        self._told = told

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        root: Path = Path(),
        device: str | None = None,
        engine: EngineName = "torch",
        batch_size: int | None = None,
    ) -> Self:
        """Load a run or a blend with all its models.

        Precision and threads are those of the run, so that its OOF comes out again: of resnet18_64 (bf16) all 2,700
        rows within 5e-10, which is how its files round. In fp32 instead, probabilities move by up to 0.004 (128 images
        of fold 1, no label changed). On a CPU, which cannot compute in fp16, fp32 stands in.

        Args:
            name: A run's name or folder; `best` (or `blend`) or `strict` for the newest blends; a submission's folder,
                or the beginning of its name or hash, also after `blend:`.
            root: The project's root.
            device: `cpu`, `cuda`, `cuda:<n>`, `mps`; None for the best there is.
            engine: What runs the models: PyTorch, or ONNX Runtime.
            batch_size: Pictures a forward pass, at most; None for that of the run's OOF.

        Raises:
            RecordError: If the run or the blend is not here as it was made, or weights are not on this machine.
            FoldwiseError: If there is no such blend, or it is not clear which one.
            DeviceError: If there is no such device.
        """
        runs, told, called = resolve(str(name), root)
        competition = load_competition(root, runs[0].info["competition"])
        _refuse_missing(runs)
        engines: list[Engine] = []
        for run in runs:
            made: Engine
            if engine == "onnx":
                # Here and not above: predicting in PyTorch needs nothing of it.
                from foldwise.serve.onnx_engine import OnnxEngine

                threads = run_runtime(run, "cpu").threads
                made = OnnxEngine.of_run(run, competition, threads=threads, batch_size=batch_size)
            else:
                made = TorchEngine(run, device=device, batch_size=batch_size)
            if made.channels != competition.image.channels:
                what = f"gives images of {competition.image.channels} channels, but {run.name} takes {made.channels}"
                fix = "put back what the run was trained with, or train it anew"
                raise RecordError([Fault(f"inputs/{competition.name}/competition.yaml", what, fix)])
            engines.append(made)
        return cls(called, root=root, competition=competition, runs=runs, engines=engines, told=told)

    def prepare(
        self, images: Sequence[NDArray[np.uint8]], boxes: Sequence[Sequence[Box]] | None = None
    ) -> NDArray[np.uint8]:
        """Bring pictures, or the faces in them, to the form that the models take.

        Args:
            images: RGB (H, W, 3) or gray (H, W) or (H, W, 1), uint8, of any sizes.
            boxes: Of each picture; None for the whole pictures.

        Returns:
            (N, height, width, channels) uint8: a row a picture, or a row a box in their order.
        """
        form = self.competition.image
        cut = images
        if boxes is not None:
            cut = [crop(image, box) for image, some in zip(images, boxes, strict=True) for box in some]
        pixels = np.empty((len(cut), form.height, form.width, form.channels), dtype=np.uint8)
        for row, image in enumerate(cut):
            pixels[row] = to_form(image, form)
        return pixels

    def predict(
        self,
        images: Sequence[NDArray[np.uint8]],
        boxes: Sequence[Sequence[Box]] | None = None,
        *,
        fold: int | None = None,
    ) -> Prediction:
        """Predict pictures, or the faces in them.

        Args:
            images: RGB (H, W, 3) or gray (H, W) or (H, W, 1), uint8, of any sizes.
            boxes: Of each picture; None for the whole pictures.
            fold: Only the models of this fold, which never saw its images; None for all, as for a test image.

        Returns:
            A row a picture, or a row a box in their order.

        Raises:
            FoldwiseError: If there is no such fold, or a picture is no such array.
            DivergedError: If a logit is not finite.
        """
        if fold is not None and fold not in self.folds:
            there = ", ".join(map(str, self.folds))
            raise FoldwiseError(f"{self.name} has no models of fold {fold}\n  fix: one of {there}, or leave it out")
        pixels = self.prepare(images, boxes)
        if not len(pixels):
            probs = np.empty((0, len(self.classes)))
        else:
            each = [engine.probabilities(pixels, fold=fold) for engine in self._engines]
            probs = each[0] if self._told is None else predict_as_described(self._told, each)
        return Prediction(np.array(self.classes)[probs.argmax(axis=1)], probs, self.classes)

    def own(self, pixels: NDArray[np.uint8]) -> list[Own | None]:
        """Which of these images are labelled ones of the competition, to the bit.

        Args:
            pixels: (N, height, width, channels) uint8, as `prepare` gives them.

        Returns:
            For each the image that it is; None for none, and for all where the competition was not taken in on this
            machine, or is not what the run was trained on.
        """
        return [self._labelled.get(sha256_bytes(one.tobytes())) for one in pixels]

    @property
    def knows_own(self) -> bool:
        """Whether training images can be told: the competition is here, as the run saw it."""
        return bool(self._labelled)

    @property
    def external(self) -> list[str]:
        """Other images that it was trained on, in words; `own` knows none of them."""
        return list(dict.fromkeys(words for run in self._runs for words in external_words(run.info["external"])))

    @cached_property
    def _labelled(self) -> dict[str, Own]:
        """The labelled images of the competition by the hash of their pixels."""
        run = self._runs[0]
        try:
            data = load_dataset(self._root, self.competition.name)
        except FoldwiseError:
            return {}
        if data.sha256 != run.info["hashes"]["inputs"]:
            return {}
        fold = dict(zip(run.ids.tolist(), run.fold.tolist(), strict=True))
        rows = np.flatnonzero(data.labels >= 0).tolist()
        names = data.ids.tolist()
        unseen = set(run.test_ids.tolist())  # a labelled test part: no model was trained on it
        known: dict[str, Own] = {}
        for row in rows:
            if names[row] in unseen:
                continue
            one = Own(names[row], fold.get(names[row]))
            key = sha256_bytes(data.images[row].tobytes())
            before = known.setdefault(key, one)
            if before.fold != one.fold:  # a twin on the other side: some model saw these pixels
                known[key] = Own(before.id, None)
        return known


def run_runtime(run: Run, device: str | None) -> Runtime:
    """The precision and threads that a run was made with, on a device of this machine.

    Args:
        run: The run; where its units differ, the first counts.
        device: As for `Predictor.load`.

    Raises:
        DeviceError: If there is no such device.
    """
    precision, threads = (
        told[0] if isinstance(told, list) else told for told in (run.info["precision"], run.info["threads"])
    )
    chosen = pick_runtime(device, "fp32", threads)
    if chosen.device.type == "cpu" and precision == "fp16":
        return chosen
    return Runtime(chosen.device, precision, chosen.threads)


def _refuse_missing(runs: Sequence[Run]) -> None:
    """Raise before anything is loaded, of all runs at once."""
    faults: list[Fault] = []
    for run in runs:
        try:
            weight_files(run)
        except RecordError as error:
            faults += error.faults
    if faults:
        raise RecordError(faults)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with this many CPU threads, which torch keeps for each thread that asks."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _estimate(run: Run, told: dict[str, Any] | None) -> Estimate:
    if told is None:
        info = run.info
        return Estimate(info["metric"], info["score"], info["standard_error"], None, tuple(info["marks"]))
    estimate = told["estimate"]
    low_high = estimate.get("interval")
    return Estimate(
        told["metric"],
        estimate["score"],
        estimate["standard_error"],
        None if low_high is None else (low_high[0], low_high[1]),
        tuple(told.get("marks", ())),
    )


def resolve(name: str, root: Path) -> tuple[list[Run], dict[str, Any] | None, str]:
    """The runs that are meant, the content of their `blend.json` (None for one run), and what to call it."""
    for path in (root / "oof" / name, Path(name)):
        if not name.startswith(_PREFIX) and (path / "run.json").is_file():
            run = load_run(path.resolve())
            return [run], None, run.name
    submission = _submission(name.removeprefix(_PREFIX), root)
    told = json.loads((submission.path / _BLEND_FILE).read_bytes())
    runs, faults = [], []
    for member in told["members"]:
        run = load_run(root / "oof" / member["run"])
        if submission.changed(member["run"], run.info["hashes"]):
            what = f"is not the run that {submission.name} was blended of: it was made anew since"
            fix = f"take it back with git, or blend again: make submit COMP={told['competition']}"
            faults.append(Fault(f"oof/{run.name}", what, fix))
        runs.append(run)
    if faults:
        raise RecordError(faults)
    return runs, told, _PREFIX + submission.name


def _submission(name: str, root: Path) -> Submission:
    """The submission that is meant, of whichever competition."""
    folders = [root / "submissions", root / "submissions" / "demo"]
    copy = {"blend": BEST_COPY[1], "best": BEST_COPY[1], "strict": STRICT_COPY[1]}.get(name)
    if copy is not None:
        competition = next(filter(None, (_competition_of(folder / copy) for folder in folders)), None)
        if competition is not None:
            return read_history(root, competition).find("best" if copy == BEST_COPY[1] else name)
        raise FoldwiseError(
            f"there is no blend yet to predict with\n  fix: make submit, or name a run{_runs_here(root)}"
        )
    files = [file for folder in folders for file in sorted(folder.glob(f"*/{_BLEND_FILE}"))]
    histories: dict[str, History] = {}
    for competition in {_competition_of(file) for file in files} - {None}:
        histories[str(competition)] = read_history(root, str(competition))
    wanted = Path(name).name.lower()
    meant = [
        history
        for _, history in sorted(histories.items())
        if any(one.name.startswith(wanted) or one.sha256.startswith(wanted) for one in history.submissions)
    ]
    if wanted and len(meant) == 1:
        return meant[0].find(name)
    if len(meant) > 1:
        raise FoldwiseError(f"{name!r} may be any of several submissions\n  fix: give more of its name")
    raise FoldwiseError(f"there is no kept run and no submission {name!r}\n  fix: `best`, or a run{_runs_here(root)}")


def _runs_here(root: Path) -> str:
    there = sorted(path.parent.name for path in root.glob("oof/*/run.json"))
    return f": {', '.join(there)}" if there else " (none is kept here: make exp EXP=<experiment>)"


def _competition_of(described: Path) -> str | None:
    try:
        return str(json.loads(described.read_bytes())["competition"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
