"""Models that were never trained, for tests of the server: what they say of a picture is its brightness.

They remember how they were asked.
"""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass, field

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from foldwise.data.competition import CompetitionSpec, load_dataset
from foldwise.errors import FoldwiseError
from foldwise.learn.device import pick_runtime
from foldwise.learn.models import ToInput, build_model, place, to_input
from foldwise.learn.predict import parse_view
from foldwise.metrics import METRICS
from foldwise.records.store import Context, RunFolder, Unit
from foldwise.runs.crossval import metadata
from foldwise.runs.kept import KeptModel
from foldwise.serve.backend import Backend, Settings
from foldwise.serve.faces import crop
from foldwise.serve.pictures import to_form
from foldwise.serve.predictor import Estimate, Prediction
from foldwise.serve.shelf import Entry
from foldwise.spec.model import ModelSpec

CLASSES = ("dark", "light")
COMPETITION = CompetitionSpec.model_validate(
    {
        "name": "shades",
        "title": "Shades",
        "classes": CLASSES,
        "image": {"width": 8, "height": 8, "channels": 1},
    }
)


@dataclass(eq=False)
class FakePredictor:
    """Says `light` with the probability of a picture's mean brightness."""

    name: str = "lamp"
    version: str = "0123456789ab"
    classes: tuple[str, ...] = CLASSES
    folds: tuple[int, ...] = (0, 1)
    competition: CompetitionSpec = COMPETITION
    estimate: Estimate = Estimate("accuracy", 0.8, 0.04, None, ())  # noqa: RUF009  frozen
    gate: threading.Event = field(default_factory=threading.Event)  # asked before an answer
    batches: list[int] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)  # set once it is asked
    failure: BaseException | None = None
    busy: threading.Lock = field(default_factory=threading.Lock)
    at_once: bool = False  # whether two threads ever asked at the same time

    def __post_init__(self):
        self.gate.set()

    def prepare(self, images, boxes=None):
        cut = images
        if boxes is not None:
            cut = [crop(image, box) for image, some in zip(images, boxes, strict=True) for box in some]
        return np.stack([to_form(image, COMPETITION.image) for image in cut])

    def predict(self, images, boxes=None, *, fold=None):
        free = self.busy.acquire(blocking=False)
        self.at_once |= not free
        try:
            self.asked.set()
            assert self.gate.wait(20), "the test never opened the gate"
            if self.failure is not None:
                raise self.failure
            pixels = self.prepare(images, boxes)
            self.batches.append(len(pixels))
            light = pixels.reshape(len(pixels), -1).mean(axis=1) / 255
            probs = np.stack([1 - light, light], axis=1)
            return Prediction(np.array(CLASSES)[probs.argmax(axis=1)], probs, CLASSES)
        finally:
            if free:
                self.busy.release()


def entry(name, *, kind="run", aliases=(), missing=(), score=0.8):
    """A line of the list, as a catalogue gives it."""
    return Entry(
        name=name,
        aliases=aliases,
        kind=kind,
        competition="shades",
        classes=CLASSES,
        metric="accuracy",
        score=score,
        standard_error=0.04,
        interval=(0.72, 0.88),
        n_scored=100,
        track="competition data only",
        marks=(),
        members=((name, 1.0),),
        parameters=12,
        missing=missing,
    )


class FakeCatalogue:
    """Lists what it is given."""

    def __init__(self, *entries):
        self._entries = list(entries)

    def entries(self):
        return self._entries

    def find(self, name):
        for each in self._entries:
            if name in (each.name, *each.aliases):
                return each
        raise FoldwiseError(f"there is no run or blend {name!r}\n  fix: served here: lamp")


def make_backend(*predictors, entries=(), load=None, explainer=None, **settings):
    """A backend of fake models, without a rate limit unless one is given."""
    predictors = predictors or (FakePredictor(),)

    def nothing(name):
        raise AssertionError(f"{name} was loaded")

    return Backend(
        predictors,
        catalogue=FakeCatalogue(*(entry(each.name) for each in predictors), *entries),
        load=load or nothing,
        explainer=explainer or nothing,
        settings=Settings(**{"rate": float("inf"), **settings}),
    )


def png(shade=200, size=(8, 8), form="PNG", **options):
    """A picture of one shade, as a file."""
    file = io.BytesIO()
    Image.new("L", size, shade).convert("RGB").save(file, format=form, **options)
    return file.getvalue()


def kept_model(arch, **options):
    """A model that was never trained, of two classes and 8 px."""
    torch.manual_seed(0)
    runtime = pick_runtime("cpu", "fp32", 1)
    spec = ModelSpec(arch=arch, image_size=32, options=options)
    model = place(build_model(spec, classes=2, channels=1), runtime).eval()
    prepare = ToInput(32, spec.interpolation, [0.5], [0.25])
    return KeptModel(3, 42, spec, ("dark", "light"), model, prepare, (parse_view("identity"),), runtime)


def keep_untrained(root, name):
    """Keep a run of the demo whose networks were never trained, a fold each, with drawn probabilities."""
    data = load_dataset(root, "demo")
    spec = ModelSpec(arch="cnn_3block", image_size=48)
    classes, rng = data.competition.classes, np.random.default_rng(0)
    label_of = dict(zip(data.ids.tolist(), data.labels.tolist(), strict=True))
    labels = np.array([label_of[image] for image in data.folds.ids.tolist()], dtype=np.int64)
    test_ids = data.ids[data.labels < 0]
    context = Context("demo", classes, {"kind": "kfold", "folds": 5}, data.folds.sha256, data.sha256)
    units = [(fold, 42) for fold in range(5)]

    def drawn(count):
        return rng.dirichlet(np.ones(len(classes)), count).astype(np.float32)

    with RunFolder.open(
        root / "oof" / name, spec={"name": name, "seeds": [42]}, spec_yaml=f"name: {name}\n", context=context
    ) as folder:
        for fold, seed in units:
            torch.manual_seed(fold)
            model = build_model(spec, classes=len(classes), channels=data.images.shape[-1])
            told = metadata(spec, classes, to_input(spec, data.images, np.arange(10)))
            path = folder.unit_path(fold, seed)
            path.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(model.state_dict(), path / "weights.safetensors", metadata=told)
            held = data.folds.fold == fold
            history = [{"epoch": 1, "lr": 0.1, "train_loss": 1.0}]
            info = {"wall_s": 1, "precision": "fp32", "threads": 1}
            ids = data.folds.ids[held]
            probs, test = drawn(len(ids)), drawn(len(test_ids))
            folder.save_unit(Unit(fold, seed, ids, labels[held], probs, test_ids, test, history, info))
        metric = METRICS["accuracy"]
        folder.complete(units, folds=data.folds, labels=labels, metric=metric, info={"tta": ["identity", "hflip"]})
