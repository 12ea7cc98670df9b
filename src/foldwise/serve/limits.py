"""What a server takes on: requests a client, bytes at a time, images that wait, and one prediction after another.

Whatever is beyond a limit is refused at once and told when to come again; nothing here knows of HTTP.
"""

from __future__ import annotations

import ipaddress
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from foldwise.errors import FoldwiseError

BATCH = 16
"""Images that are predicted together at most; engines pad fewer to a few sizes, so that one image costs one."""

_CLIENTS = 10_000  # whose buckets are remembered

T = TypeVar("T")
Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]


class BusyError(FoldwiseError):
    """There is too much to do already.

    Attributes:
        retry_s: Seconds after which it is worth another try.
    """

    def __init__(self, what: str, retry_s: int) -> None:
        super().__init__(f"{what}\n  fix: try again in {retry_s} s")
        self.retry_s = retry_s


class Predicts(Protocol):
    """What predicts images of one form, as an `Engine` does; never asked from two threads at once."""

    def probabilities(self, pixels: Pixels) -> Floats:
        """(N, H, W, C) uint8 to (N, classes)."""


class RateLimit:
    """A token bucket for each client: `burst` at once, then `rate` a second.

    Beyond 10,000 clients the least recent are forgotten, so that memory is bounded; who is forgotten has a full bucket.
    """

    def __init__(self, rate: float, burst: float) -> None:
        """Fill all buckets.

        Args:
            rate: Tokens a second; infinity for no limit.
            burst: Tokens in a full bucket; at least 1.
        """
        self._rate, self._burst = rate, burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str, now: float) -> float:
        """Take a token.

        Args:
            client: An address. IPv6 addresses of one /64 share a bucket, as one client has them all.
            now: Seconds of a clock that does not go backwards.

        Returns:
            0 where there was one; else the seconds until there is, and none was taken.
        """
        if math.isinf(self._rate):
            return 0.0
        key = _network(client)
        tokens, before = self._buckets.pop(key, (self._burst, now))
        tokens = min(self._burst, tokens + (now - before) * self._rate)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self._rate
        self._buckets[key] = (tokens if wait else tokens - 1, now)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        return wait


def _network(client: str) -> str:
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class Budget:
    """Bytes that all requests hold together; for one thread, as that of an event loop."""

    def __init__(self, total: int) -> None:
        self._free = total

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Begin a request that holds nothing yet; whatever it held is given back at the end.

        Yields:
            What to call with the number of bytes to hold more; raises `BusyError` if there are not so many left.
        """
        held = 0

        def hold(amount: int) -> None:
            nonlocal held
            if amount > self._free:
                raise BusyError("too many large requests are under way", 2)
            self._free -= amount
            held += amount

        try:
            yield hold
        finally:
            self._free += held


@dataclass(eq=False)
class _Job:
    engine: Predicts | None  # None for work of its own
    images: Sequence[Pixels]
    work: Callable[[], Any] | None
    future: Future[Any] = field(default_factory=Future)

    @property
    def size(self) -> int:
        return max(1, len(self.images))


class Batcher:
    """One thread that predicts what waits together, and does other work on models in between.

    Images that wait for the same engine make a batch, the oldest first.
    """

    def __init__(self, *, most_waiting: int = 128, on_batch: Callable[[int], object] = lambda _count: None):
        """Start the thread.

        Args:
            most_waiting: Images that wait at most; a request of more is taken only while nothing waits.
            on_batch: Told the images of each batch; called on the thread.
        """
        self._most = most_waiting
        self._on_batch = on_batch
        self._jobs: deque[_Job] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="predicts", daemon=True)
        self._thread.start()

    def predict(self, engine: Predicts, images: Sequence[Pixels]) -> Future[Floats]:
        """Have images predicted.

        Args:
            engine: Whose turn it is; engines are told apart by identity.
            images: (H, W, C) uint8 each, all of the form that the engine takes.

        Returns:
            (N, classes) float64 in their order, once they are predicted; cancelled jobs that wait are never begun.

        Raises:
            BusyError: If too many images wait.
        """
        if not images:
            raise ValueError("at least one image must be there, but got none")
        return cast("Future[Floats]", self._add(_Job(engine, images, None)))

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Have other work done on the thread, in its turn; it counts as one image that waits.

        Raises:
            BusyError: If too many images wait.
        """
        return self._add(_Job(None, (), work))

    @property
    def waiting(self) -> int:
        """Images that wait."""
        with self._change:
            return sum(job.size for job in self._jobs)

    def close(self) -> None:
        """Finish what is being computed, cancel what waits, and end the thread."""
        with self._change:
            self._closed = True
            jobs, self._jobs = self._jobs, deque()
            self._change.notify()
        for job in jobs:
            job.future.cancel()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, job: _Job) -> Future[Any]:
        with self._change:
            if self._closed:
                raise BusyError("the server is stopping", 5)
            # What was cancelled is not waited for any more.
            self._jobs = deque(other for other in self._jobs if not other.future.cancelled())
            waiting = sum(other.size for other in self._jobs)
            if waiting and waiting + job.size > self._most:
                raise BusyError(f"{waiting} images wait already", 1)
            self._jobs.append(job)
            self._change.notify()
        return job.future

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._jobs and not self._closed:
                    self._change.wait()
                if self._closed:
                    return
                jobs = self._taken()
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if jobs:
                self._do(jobs)

    def _taken(self) -> list[_Job]:
        """The oldest job, and those that fit into one batch with it."""
        first = self._jobs.popleft()
        taken, size = [first], first.size
        rest: deque[_Job] = deque()
        for job in self._jobs:
            if first.engine is not None and job.engine is first.engine and size + job.size <= BATCH:
                taken.append(job)
                size += job.size
            else:
                rest.append(job)
        self._jobs = rest
        return taken

    def _do(self, jobs: Sequence[_Job]) -> None:
        try:
            if jobs[0].work is not None:
                jobs[0].future.set_result(jobs[0].work())
                return
            engine = jobs[0].engine
            assert engine is not None
            rows = self._probabilities(engine, [image for job in jobs for image in job.images])
        except BaseException as error:  # whoever asked must hear of it, and the thread go on
            for job in jobs:
                with suppress(Exception):
                    job.future.set_exception(error)
            return
        begin = 0
        for job in jobs:
            job.future.set_result(rows[begin : begin + job.size])
            begin += job.size

    def _probabilities(self, engine: Predicts, images: Sequence[Pixels]) -> Floats:
        rows = []
        for begin in range(0, len(images), BATCH):
            pixels = np.stack(images[begin : begin + BATCH])
            self._on_batch(len(pixels))
            rows.append(engine.probabilities(pixels))
        return np.concatenate(rows)
