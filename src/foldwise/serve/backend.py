"""What stands behind the server's routes: the models that are held, the threads that decode and predict, the counters.

The event loop computes nothing: pictures are decoded by a few threads, and one predicts what waits together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from foldwise.errors import FoldwiseError
from foldwise.runs.kept import KeptModel
from foldwise.serve.faces import Box
from foldwise.serve.guard import RefusalError
from foldwise.serve.limits import Batcher, Budget, BusyError, Predicts, RateLimit
from foldwise.serve.pictures import Limits, read_picture
from foldwise.serve.predictor import Prediction, Predictor
from foldwise.serve.shelf import Catalogue, Entry, Shelf
from foldwise.serve.tracking import Session

T = TypeVar("T")
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Settings:
    """Limits of a server.

    Attributes:
        pictures: Of one picture.
        files: Pictures of one request.
        request_bytes: Of one request's body.
        held_bytes: Of all requests' bodies together.
        faces: Faces of one picture that are answered for, the largest first.
        rate: Requests a second of one client, and frames of its mirror; infinity for no limit.
        burst: Requests that it may make at once.
        body_s: Seconds for a body to arrive.
        answer_s: Seconds for an answer, loading of a model included.
        waiting: Images that wait for the models.
        models: Runs and blends held in memory.
        mirrors: Mirrors at a time.
        idle_s: Seconds without a frame after which a mirror is closed.
        decoders: Pictures that are decoded and searched for faces at a time; each takes 75 MB at most.
    """

    pictures: Limits = field(default_factory=Limits)
    files: int = 16
    request_bytes: int = 32 * 2**20
    held_bytes: int = 256 * 2**20
    faces: int = 20
    rate: float = 50.0
    burst: float = 100.0
    body_s: float = 20.0
    answer_s: float = 60.0
    waiting: int = 128
    models: int = 3
    mirrors: int = 8
    idle_s: float = 60.0
    decoders: int = 2


class Served:
    """A loaded run or blend, as the batcher asks it: all of it, or the models of one fold.

    Attributes:
        predictor: What answers.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._asked = {fold: _Asked(predictor, fold) for fold in (None, *predictor.folds)}

    def of(self, fold: int | None) -> Predicts:
        """What the batcher asks for the models of a fold; None: all of them. Always the same object for a fold."""
        return self._asked[fold]


@dataclass(frozen=True, eq=False)
class _Asked:
    predictor: Predictor
    fold: int | None

    def probabilities(self, pixels: Pixels) -> NDArray[np.float64]:
        """(N, H, W, C) uint8 of the competition's form to (N, classes)."""
        return self.predictor.predict(list(pixels), fold=self.fold).probabilities


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        where = self.registry
        self.requests = Counter("foldwise_requests", "Requests by path and status.", ["path", "status"], registry=where)
        self.seconds = Histogram(
            "foldwise_request_seconds",
            "From a request to its answer.",
            ["path"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=where,
        )
        self.pictures = Counter(
            "foldwise_pictures", "Faces and whole pictures answered for.", ["model"], registry=where
        )
        self.frames = Counter("foldwise_mirror_frames", "Frames of mirrors.", ["outcome"], registry=where)
        self.batches = Histogram(
            "foldwise_batch_images", "Images of a batch.", buckets=(1, 2, 4, 8, 16), registry=where
        )
        self.waiting = Gauge("foldwise_waiting_images", "Images that wait for a model.", registry=where)
        self.models = Gauge("foldwise_models", "Runs and blends in memory.", registry=where)
        self.open_mirrors = 0
        mirrors = Gauge("foldwise_mirrors", "Mirrors that are open.", registry=where)
        mirrors.set_function(lambda: self.open_mirrors)

    @contextmanager
    def mirror(self) -> Iterator[None]:
        """Count a mirror while it is open."""
        self.open_mirrors += 1
        try:
            yield
        finally:
            self.open_mirrors -= 1


class Backend:
    """What the routes share.

    Attributes:
        settings: Limits.
        default: Name of what is asked where nobody says what.
        metrics: Counters.
        batcher: The thread that predicts.
        budget: Bytes of bodies.
        rate: Requests of each client.
        began: When it was made, by the monotonic clock.
    """

    def __init__(
        self,
        predictors: Sequence[Predictor],
        *,
        catalogue: Catalogue,
        load: Callable[[str], Predictor],
        explainer: Callable[[str], KeptModel],
        settings: Settings,
    ) -> None:
        """Start the threads.

        Args:
            predictors: What was loaded already, the default first; never makes room for others.
            catalogue: What else can be asked for.
            load: Loads a run or a blend by its name.
            explainer: Loads the model that explains a run, by the run's name.
            settings: Limits.
        """
        self.settings = settings
        self.default = predictors[0].name
        self.metrics = Metrics()
        self.batcher = Batcher(most_waiting=settings.waiting, on_batch=self.metrics.batches.observe)
        self.budget = Budget(settings.held_bytes)
        self.rate = RateLimit(settings.rate, settings.burst)
        self.began = time.monotonic()
        self._catalogue = catalogue
        self._given = {predictor.name: predictor for predictor in predictors}
        self._shelf = Shelf(
            lambda name: Served(self._given.get(name) or load(name)),
            max(settings.models, len(predictors) + 1),
            keep=list(self._given),
        )
        for name in self._given:
            self._shelf.get(name)
        self._explainers = Shelf(explainer, 1)
        self._decoders = ThreadPoolExecutor(settings.decoders, "decodes")
        self._loader = ThreadPoolExecutor(1, "loads")
        self._lister = ThreadPoolExecutor(1, "lists")
        self._cameras = ThreadPoolExecutor(settings.mirrors, "mirrors")
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)
        self.metrics.models.set_function(lambda: len(self._shelf.names))

    @property
    def loaded(self) -> list[str]:
        """Names of what is held."""
        return self._shelf.names

    @property
    def given(self) -> list[Predictor]:
        """What was loaded at the start, the default first."""
        return list(self._given.values())

    async def entries(self) -> list[Entry]:
        """What can be asked for, with what was given at the start, and what could be if its weights were here."""
        entries = await _in(self._lister, self._catalogue.entries)
        listed = {entry.name for entry in entries}
        return [_unlisted(self._given[name]) for name in self._given if name not in listed] + entries

    async def served(self, name: str | None) -> Served:
        """The run or blend of a name on the list, loaded where need be; None: the default.

        Raises:
            RefusalError: If there is no such name, or it cannot be asked here (404).
        """
        known = self.default if name is None else name
        if known not in self._given:
            known = (await self._entry(known)).name
        held = self._shelf.peek(known)
        return held if held is not None else await _in(self._loader, self._shelf.get, known)

    async def _entry(self, name: str) -> Entry:
        try:
            entry = await _in(self._lister, self._catalogue.find, name)
        except FoldwiseError as error:
            raise RefusalError(404, flat(error)) from None
        if entry.unserved is not None and entry.name not in self._given:
            raise RefusalError(404, f"{entry.name} cannot be asked here: {entry.unserved}")
        return entry

    async def explained(self, served: Served, pixels: Pixels) -> tuple[bytes, str, str]:
        """What the first model of the run looked at, or the first of a blend's heaviest run.

        Args:
            served: The run or blend.
            pixels: (H, W, C) uint8 of the competition's form.

        Returns:
            A PNG, the class that it is for, and whose it is: the run and the fold of its model.

        Raises:
            RefusalError: If the network is not one to explain (422), or what that needs is not installed (501).
            BusyError: If too many images wait.
        """
        name = served.predictor.name
        members = next((entry.members for entry in await self.entries() if entry.name == name), ())
        run = members[0][0] if members else name
        model = await _in(self._loader, self._explainers.get, run)

        def work() -> tuple[bytes, str]:
            # Here and not above: the first time, this imports matplotlib.
            from foldwise.serve.heat import heat_map

            try:
                return heat_map(model, pixels)
            except FoldwiseError as error:
                raise RefusalError(501, flat(error)) from None

        png, label = await asyncio.wrap_future(self.batcher.call(work))
        return png, label, f"{run}, fold {model.fold}"

    async def decoded(self, raw: bytes, where: str, look: Callable[[Pixels], T]) -> T:
        """What `look` makes of a picture, on a thread that decodes.

        Raises:
            PictureError: If it cannot be read.
        """

        def work() -> T:
            return look(read_picture(raw, where=where, limits=self.settings.pictures))

        return await _in(self._decoders, work)

    async def predicted(self, served: Served, images: Sequence[Pixels]) -> NDArray[np.float64]:
        """(N, classes) of images in the competition's form; where the caller is cancelled, they leave the queue.

        Raises:
            BusyError: If too many images wait.
        """
        rows = await asyncio.wrap_future(self.batcher.predict(served.of(None), images))
        self.metrics.pictures.labels(served.predictor.name).inc(len(images))
        return rows

    def holds(self, served: Served) -> bool:
        """Whether it is still held, not gone to make room for another; it counts as asked for."""
        return self._shelf.peek(served.predictor.name) is served

    async def framed(self, session: Session, raw: bytes) -> dict[str, Any]:
        """The answer to a mirror's frame, on a thread that may wait for the models."""
        return await _in(self._cameras, session.frame, raw, time.monotonic())

    def close(self) -> None:
        """End the threads."""
        self.batcher.close()
        for pool in (self._decoders, self._loader, self._lister, self._cameras):
            pool.shutdown(wait=False, cancel_futures=True)


class Queued:
    """A loaded run or blend that is asked by way of the batcher, as a mirror's `Session` does.

    Attributes:
        classes: In the order of the probabilities.
    """

    def __init__(self, backend: Backend, served: Served) -> None:
        self._backend, self._served = backend, served
        self.classes = served.predictor.classes

    def predict(
        self, images: Sequence[Pixels], boxes: Sequence[Sequence[Box]] | None = None, *, fold: int | None = None
    ) -> Prediction:
        """See `Predictor.predict`; waits for its turn."""
        pixels = self._served.predictor.prepare(images, boxes)
        future = self._backend.batcher.predict(self._served.of(fold), list(pixels))
        try:
            # The thread must end by itself: nobody else can end it, and its session has one frame at a time.
            probabilities = future.result(self._backend.settings.answer_s)
        except TimeoutError:
            future.cancel()
            raise BusyError("the models are too busy", 2) from None
        self._backend.metrics.pictures.labels(self._served.predictor.name).inc(len(pixels))
        return Prediction(np.array(self.classes)[probabilities.argmax(axis=1)], probabilities, self.classes)


def flat(error: FoldwiseError) -> str:
    """A message of several lines as one sentence for a caller."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _unlisted(predictor: Predictor) -> Entry:
    """An entry for what was given by its path, from elsewhere."""
    told = predictor.estimate
    return Entry(
        name=predictor.name,
        aliases=(),
        kind="run",
        competition=predictor.competition.name,
        classes=predictor.classes,
        metric=told.metric,
        score=told.score,
        standard_error=told.standard_error,
        interval=told.interval,
        n_scored=None,
        track="unknown",
        marks=told.marks,
        members=(),
        parameters=None,
        missing=(),
    )


async def _in(pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, partial(work, *arguments))
