"""The HTTP server of `make serve`: one process that answers for a face by JSON, as a web page and as a mirror.

It holds pictures in memory only, for the moment of their answer; by default nobody but this machine reaches it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import math
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from importlib import resources
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from foldwise.errors import FoldwiseError
from foldwise.records.store import load_run
from foldwise.runs.kept import KeptModel, kept_models, weight_files
from foldwise.serve.answers import (
    GETS,
    POSTS,
    AskedExplain,
    AskedPredict,
    FileAnswer,
    HealthAnswer,
    Nothing,
    PredictAnswer,
    RunsAnswer,
    face_answer,
    form,
    listed,
    problems,
    reference,
)
from foldwise.serve.faces import Box, find_faces
from foldwise.serve.limits import BusyError
from foldwise.serve.pictures import PictureError
from foldwise.serve.predictor import EngineName, Predictor, run_runtime
from foldwise.serve.shelf import Catalogue
from foldwise.serve.tracking import Session

try:
    import uvicorn
    from fastapi import FastAPI, Query, Request, Response, WebSocket, WebSocketDisconnect
    from fastapi.exceptions import RequestValidationError
    from prometheus_client import generate_latest
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

    from foldwise.serve.backend import Backend, Queued, Settings, flat
    from foldwise.serve.guard import LOOPBACK, Guard, RefusalError, client_of, read_files, refusal
except ImportError as error:
    raise FoldwiseError(f'{error.name} is not installed\n  fix: pip install "foldwise[serve]"') from None

Pixels = NDArray[np.uint8]

_HEAD_S = 10.0  # for the head of a request
_CONNECTIONS = 1000
_STOP_S = 5  # for requests under way when the server stops
_FRAME_BYTES = 2**20

# The look of the page is that of the comparison's.
_ASSETS = {
    "/": ("foldwise.serve", "page.html", "text/html"),
    "/page.css": ("foldwise.serve", "page.css", "text/css"),
    "/page.js": ("foldwise.serve", "page.js", "text/javascript"),
    "/base.css": ("foldwise.show", "page.css", "text/css"),
}


def create_app(
    backend: Backend, *, hosts: Sequence[str] = LOOPBACK, any_address: bool = False, card: Path | None = None
) -> FastAPI:
    """Put routes before a backend, which is closed when the app shuts down.

    Args:
        backend: Models, threads and limits.
        hosts: Names by which browsers may reach the server.
        any_address: Whether they may by any IP address too.
        card: The model card, a text; None for none.
    """
    settings = backend.settings

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        backend.close()

    app = FastAPI(
        title="Foldwise",
        summary="What a kept run or blend says of a face.",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        swagger_ui_oauth2_redirect_url=None,
    )

    @app.post("/predict", response_model=PredictAnswer, responses=POSTS, openapi_extra=form(settings.files))
    async def predict(request: Request, asked: Annotated[AskedPredict, Query()]) -> PredictAnswer:
        """Say what a model sees in pictures: label and probabilities of each, or of each face in them."""
        began = time.perf_counter()
        with backend.budget.share() as hold:
            raws = await _files(backend, request, hold, settings.files)
            async with asyncio.timeout(settings.answer_s):
                served = await backend.served(asked.model)
                look = partial(_looked, served.predictor, settings.faces if asked.faces else 0)
                looked = [await backend.decoded(raw, f"files[{number}]", look) for number, raw in enumerate(raws)]
                rows = iter(await backend.predicted(served, [one for _, _, some in looked for one in some]))
        predictor = served.predictor
        files = []
        for (height, width), boxes, _ in looked:
            faces = [face_answer(box, next(rows), predictor.classes) for box in boxes]
            first = faces[0]
            files.append(
                FileAnswer(width=width, height=height, label=first.label, confidence=first.confidence, faces=faces)
            )
        return PredictAnswer(
            model=predictor.name,
            version=predictor.version,
            metric=predictor.estimate.metric,
            score=predictor.estimate.score,
            standard_error=predictor.estimate.standard_error,
            time_ms=round(1e3 * (time.perf_counter() - began), 2),
            files=files,
        )

    @app.post(
        "/explain",
        response_class=Response,
        responses={
            **POSTS,
            **problems(501),
            200: {
                "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
                "description": "A heat map over what the model saw, which is the face or the whole picture.",
                "headers": {
                    "x-label": {
                        "schema": {"type": "string"},
                        "description": "The class that the map is for, URL-encoded.",
                    },
                    "x-model": {"schema": {"type": "string"}, "description": "The run and the fold of its model."},
                },
            },
        },
        openapi_extra=form(1),
    )
    async def explain(request: Request, asked: Annotated[AskedExplain, Query()]) -> Response:
        """Draw where the first model of a run finds what speaks for its answer: Grad-CAM, or attention rollout."""
        with backend.budget.share() as hold:
            raws = await _files(backend, request, hold, 1)
            async with asyncio.timeout(settings.answer_s):
                served = await backend.served(asked.model)
                pixels = await backend.decoded(
                    raws[0],
                    "files[0]",
                    lambda picture: served.predictor.prepare(
                        [picture], _boxes(asked.box, picture, settings.pictures.pixels)
                    )[0],
                )
                png, label, whose = await backend.explained(served, pixels)
        return Response(png, media_type="image/png", headers={"x-label": quote(label), "x-model": whose})

    @app.get("/runs", response_model=RunsAnswer, responses=GETS)
    async def runs(_asked: Annotated[Nothing, Query()]) -> RunsAnswer:
        """List the runs and blends, with their scores and whether they can be asked here."""
        competition = backend.given[0].competition
        entries = await backend.entries()
        return RunsAnswer(
            default=backend.default,
            competition=competition.name,
            title=competition.title or competition.name,
            card=card is not None and card.is_file(),
            runs=[listed(entry, backend.loaded) for entry in entries],
        )

    @app.get("/health", response_model=HealthAnswer, responses=GETS)
    async def health(_asked: Annotated[Nothing, Query()]) -> HealthAnswer:
        """Say that the server works, and with what."""
        first = backend.given[0]
        return HealthAnswer(
            status="ok",
            model=first.name,
            version=first.version,
            models=backend.loaded,
            waiting=backend.batcher.waiting,
            uptime_s=round(time.monotonic() - backend.began, 1),
        )

    @app.get(
        "/metrics",
        response_class=Response,
        responses={**GETS, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics(_asked: Annotated[Nothing, Query()]) -> Response:
        """Count requests, seconds, batches and what waits, for Prometheus."""
        return Response(generate_latest(backend.metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/card", include_in_schema=False)
    async def model_card() -> Response:
        if card is None or not card.is_file():
            raise RefusalError(404, "there is no model card")
        return Response(card.read_bytes(), media_type="text/plain; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(reference(app.openapi()), media_type="text/html")

    @app.websocket("/mirror")
    async def mirror(websocket: WebSocket, model: str | None = None) -> None:
        await _mirror(backend, websocket, model)

    for path, (package, name, kind) in _ASSETS.items():
        app.get(path, include_in_schema=False)(_asset(package, name, kind))

    @app.exception_handler(RefusalError)
    async def refused(_request: Request, error: RefusalError) -> Response:
        return refusal(error)

    @app.exception_handler(PictureError)
    async def no_picture(_request: Request, error: PictureError) -> Response:
        return refusal(RefusalError(error.status, flat(error)))

    @app.exception_handler(BusyError)
    async def busy(_request: Request, error: BusyError) -> Response:
        return refusal(RefusalError(503, flat(error), retry_s=error.retry_s))

    @app.exception_handler(TimeoutError)
    async def late(_request: Request, _error: TimeoutError) -> Response:
        return refusal(RefusalError(503, f"no answer within {settings.answer_s:g} s", retry_s=5))

    @app.exception_handler(FoldwiseError)
    async def failed(_request: Request, error: FoldwiseError) -> Response:
        return refusal(RefusalError(500, flat(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        said = "; ".join(f"{'.'.join(map(str, each['loc']))[:80]}: {each['msg']}" for each in error.errors()[:5])
        return refusal(RefusalError(422, said))

    @app.exception_handler(HTTPException)
    async def unrouted(_request: Request, error: HTTPException) -> Response:
        response = refusal(RefusalError(error.status_code, f"{error.detail}; the routes are at /docs"))
        response.headers.update(error.headers or {})
        return response

    app.add_middleware(Guard, hosts=hosts, any_address=any_address, rate=backend.rate)
    app.add_middleware(_Counted, backend=backend)
    return app


async def _files(backend: Backend, request: Request, hold: Callable[[int], None], most: int) -> list[bytes]:
    settings = backend.settings
    return await read_files(
        request, most_files=most, most_bytes=settings.request_bytes, seconds=settings.body_s, hold=hold
    )


def _looked(
    predictor: Predictor, most: int, picture: Pixels
) -> tuple[tuple[int, int], Sequence[Box | None], Sequence[Pixels]]:
    """Height and width of a picture, its faces, at most so many (None: the whole of it), and each one's pixels."""
    faces = find_faces(picture, limit=most) if most else []
    pixels = predictor.prepare([picture], [faces] if faces else None)
    return (picture.shape[0], picture.shape[1]), faces or [None], list(pixels)


def _boxes(text: str | None, picture: Pixels, most: int) -> list[list[Box]] | None:
    """The box that was asked for, which must lie in the picture, and whose square have at most so many pixels."""
    if text is None:
        return None
    left, top, width, height = map(int, text.split(","))
    if left + width > picture.shape[1] or top + height > picture.shape[0]:
        what = f"the box {text} is not within the picture of {picture.shape[1]} x {picture.shape[0]} pixels"
        raise RefusalError(422, what)
    # A square of its longer side is cut, which goes beyond a thin picture.
    if max(width, height) ** 2 > most:
        raise RefusalError(422, f"the box {text} is too long; a face is about as wide as it is high")
    return [[Box(left, top, width, height, 1.0)]]


async def _mirror(backend: Backend, websocket: WebSocket, name: str | None) -> None:
    """Answer the frames of a camera, one after another: a frame is a binary message, its answer a JSON text."""
    settings, metrics = backend.settings, backend.metrics
    if metrics.open_mirrors >= settings.mirrors:
        error = RefusalError(503, f"{settings.mirrors} mirrors are open already", retry_s=10)
        await websocket.send_denial_response(refusal(error))
        return
    with metrics.mirror():
        await websocket.accept()
        try:
            served = await backend.served(name)
        except (RefusalError, FoldwiseError) as error:
            reason = error.reason if isinstance(error, RefusalError) else flat(error)
            await websocket.close(1008, reason[:120])
            return
        session = Session(Queued(backend, served), folds=served.predictor.folds)
        client = client_of(websocket.scope)
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                try:
                    async with asyncio.timeout(settings.idle_s):
                        message = await websocket.receive()
                except TimeoutError:
                    await websocket.close(1001, "no frame came")
                    return
                if message["type"] == "websocket.disconnect":
                    return
                while (wait := backend.rate.wait(client, time.monotonic())) > 0:
                    await asyncio.sleep(wait)
                if not backend.holds(served):
                    await websocket.close(1001, "its model made room for another")
                    return
                await websocket.send_text(json.dumps(await _framed(backend, session, message)))


async def _framed(backend: Backend, session: Session, message: Message) -> dict[str, Any]:
    raw = message.get("bytes")
    outcome, retry = "answered", None
    try:
        if raw is None:
            raise RefusalError(400, "a frame is a binary message")
        # Not timed here: that would leave its thread in the session, where the next frame begins another.
        answer = await backend.framed(session, raw)
    except RefusalError as error:
        outcome, words, reason = "refused", error.status, error.reason
    except PictureError as error:
        outcome, words, reason = "refused", error.status, flat(error)
    except BusyError as error:
        outcome, words, reason, retry = "busy", 503, flat(error), error.retry_s
    except FoldwiseError as error:
        outcome, words, reason = "failed", 500, flat(error)
    backend.metrics.frames.labels(outcome).inc()
    if outcome == "answered":
        return answer
    told: dict[str, Any] = {"error": HTTPStatus(words).phrase.lower(), "reason": reason}
    return told if retry is None else told | {"retry_after": retry}


def _asset(package: str, name: str, kind: str) -> Callable[[], Response]:
    def asset() -> Response:
        return Response(resources.files(package).joinpath(name).read_bytes(), media_type=f"{kind}; charset=utf-8")

    return asset


class _Counted:
    """ASGI middleware: counts requests and their seconds, by route; nothing of a request is logged."""

    def __init__(self, app: ASGIApp, *, backend: Backend) -> None:
        self._app = app
        self._metrics = backend.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            # What is no route has one label, or a stranger could make as many as he likes.
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - began)


def serve(
    root: Path,
    names: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str | None = None,
    engine: EngineName = "torch",
    public_names: Sequence[str] = (),
    rate: float | None = None,
    say: Callable[[str], None],
) -> int:
    """Serve until interrupted.

    Args:
        root: The project's root.
        names: Runs and blends loaded at the start, the default first; none: the best that is here.
        host: Address to listen at.
        port: 0 for any free one.
        device: As for `Predictor.load`.
        engine: What runs the models.
        public_names: Further names by which browsers may reach it, such as that of a proxy.
        rate: Requests a second of one client; 0: no limit; None: the default.
        say: Gets lines for the user.

    Returns:
        0, when it was stopped.

    Raises:
        FoldwiseError: If there is nothing to serve, the address is not to be had, or the rate is below 0.
    """
    settings = Settings()
    if rate is not None and rate < 0:
        raise FoldwiseError(f"--rate must be 0 or more requests a second, but got {rate:g}\n  fix: 0 for no limit")
    if rate is not None:
        settings = replace(settings, rate=rate or math.inf, burst=max(2 * rate, 1))
    with _listening(host, port) as listening:
        catalogue = Catalogue(root)
        wanted = list(names) or [catalogue.best().name]

        def load(name: str) -> Predictor:
            return Predictor.load(name, root=root, device=device, engine=engine)

        predictors = [load(name) for name in wanted]
        given = {
            predictor.name: Path(word)
            for predictor, word in zip(predictors, wanted, strict=True)
            if not (root / "oof" / word / "run.json").is_file() and (Path(word) / "run.json").is_file()
        }

        def explainer(name: str) -> KeptModel:
            run = load_run(given[name].resolve() if name in given else root / "oof" / name)
            first = min(weight_files(run))[0]
            return next(kept_models(run, run_runtime(run, device), folds=[first]))

        backend = Backend(predictors, catalogue=catalogue, load=load, explainer=explainer, settings=settings)
        bound, open_to_all = _bound(listening)
        app = create_app(
            backend,
            hosts=[*LOOPBACK, host, *public_names, *([socket.gethostname()] if open_to_all else [])],
            any_address=open_to_all,
            card=root / "docs" / "MODEL_CARD.md",
        )
        for predictor in predictors:
            say(f"model     {predictor.name}, version {predictor.version}: {predictor.estimate}")
        say(f"address   {bound}  (the page; the HTTP interface is at /docs)")
        if open_to_all:
            say(f"WARNING: --host {host} lets whoever reaches this machine ask the models; there is no password.")
        say("stop      Ctrl-C")
        config = uvicorn.Config(
            app,
            http=_http(),
            ws=_websockets(),
            ws_ping_timeout=settings.answer_s,  # nothing is read while a frame is answered
            ws_max_size=_FRAME_BYTES,
            ws_max_queue=2,
            ws_per_message_deflate=False,
            lifespan="on",
            log_config=None,
            # The guard tells of mistakes; uvicorn calls a refused websocket one.
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_STOP_S,
        )
        _Stopped(config).run([listening])
    say("stopped")
    return 0


class _Stopped(uvicorn.Server):
    """Ends quietly: a signal that was heeded is not raised again."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def _websockets() -> type[asyncio.Protocol]:
    class Impatient(WebSocketsSansIOProtocol):
        """Cuts a client that leaves what it was sent unread: its mirror would be held for ever."""

        def pause_writing(self) -> None:
            super().pause_writing()
            self.transport.abort()

    return Impatient


def _http() -> type[asyncio.Protocol]:
    class Bounded(H11Protocol):
        """Cuts a connection whose request has no end to its head, and those beyond the limit."""

        _head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > _CONNECTIONS:
                transport.abort()
                return
            self._head = self.loop.call_later(_HEAD_S, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            answering = self.cycle is not None and not self.cycle.response_complete
            if self._head is not None and (answering or self.transport.get_protocol() is not self):
                self._head.cancel()
                self._head = None
            elif self._head is None and not answering and self.transport.get_protocol() is self:
                self._head = self.loop.call_later(_HEAD_S, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._head is not None:
                self._head.cancel()
            super().connection_lost(exc)

    return Bounded


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens, taken before anything is loaded."""
    # `getaddrinfo` takes what is beyond modulo 65536.
    if not 0 <= port < 2**16:
        raise FoldwiseError(f"--port must be 0 to 65535, but got {port}\n  fix: --port 8000")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        what = f"--host {host} --port {port} is no address of this machine ({error})"
        raise FoldwiseError(f"{what}\n  fix: --host 127.0.0.1, or 0.0.0.0 for all addresses") from None
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                what, fix = f"port {port} is taken", f"stop what listens there, or take another: --port {port + 1}"
            elif error.errno == errno.EACCES:
                what, fix = f"port {port} is not for everyone", "take one from 1024 on: --port 8000"
            else:
                what, fix = f"--host {host}: cannot listen there ({error})", "--host 127.0.0.1, or 0.0.0.0"
            raise FoldwiseError(f"{what}\n  fix: {fix}") from None
        listening.listen(2048)
        yield listening


def _bound(listening: socket.socket) -> tuple[str, bool]:
    """The address of the page, and whether others than this machine reach it."""
    host, port = listening.getsockname()[:2]
    address = ipaddress.ip_address(host)
    shown = "127.0.0.1" if address.is_unspecified else f"[{host}]" if address.version == 6 else host
    return f"http://{shown}:{port}", not address.is_loopback
