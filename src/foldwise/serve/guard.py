"""What stands before the server's answers: who may ask, how often, how much, and what a browser may do with the answer.

A page of another site can reach a server on this machine through its reader's browser; host and origin keep it out.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from http import HTTPStatus
from urllib.parse import urlsplit

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from foldwise.serve.limits import RateLimit

_log = logging.getLogger(__name__)

LOOPBACK = ("localhost", "127.0.0.1", "::1")

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(self), microphone=(), geolocation=(), display-capture=()",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every answer."""

_FREE = ("/health", "/metrics")  # asked by machines, at their own pace
# What a client still sends after it was refused is read and dropped, so that it gets to read why; no longer than this.
_DRAIN_S, _DRAIN_BYTES = 1.0, 2**26


class RefusalError(Exception):
    """A request is refused.

    Attributes:
        status: 400 to 503.
        reason: For the caller, what is wrong and what would help.
        retry_s: Seconds after which it is worth another try; None where it is not.
    """

    def __init__(self, status: int, reason: str, *, retry_s: int | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.retry_s = status, reason, retry_s


def refusal(error: RefusalError) -> JSONResponse:
    """The answer to a refused request: `error`, the status in words, and `reason`."""
    headers = {} if error.retry_s is None else {"retry-after": str(error.retry_s)}
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    words = HTTPStatus(error.status).phrase.lower()
    return JSONResponse({"error": words, "reason": error.reason}, error.status, headers)


class Guard:
    """ASGI middleware: refuses foreign hosts and origins and the too eager, sets `HEADERS`, answers for mistakes."""

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], any_address: bool, rate: RateLimit) -> None:
        """Stand before an app.

        Args:
            app: What answers.
            hosts: Names by which browsers may reach the server, without ports.
            any_address: Whether they may by any IP address too: no name can be pointed at another server later on.
            rate: Tokens of each client, told apart by the address that connects; headers that name another are not
                believed.
        """
        self._app = app
        self._hosts = {host.lower() for host in hosts}
        self._any_address = any_address
        self._rate = rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except RefusalError as error:
            await self._refuse(error, scope, receive, send)
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await with_headers(message)

        with_headers = _with_headers(send)
        try:
            await self._app(scope, receive, sending)
        except Exception:
            _log.exception("a request to %s failed", scope["path"])
            if started or scope["type"] == "websocket":
                raise
            broken = RefusalError(500, "the server failed at this; its terminal says more")
            await self._refuse(broken, scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = _name_of(host)
        if not (name in self._hosts or (self._any_address and _is_address(name))):
            reason = f"this server is not known as {name[:80]!r}; who runs it may allow the name (--name)"
            raise RefusalError(HTTPStatus.MISDIRECTED_REQUEST, reason)
        if scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin")
            foreign = origin is not None and _netloc(origin) != host.lower()
            if foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
                raise RefusalError(HTTPStatus.FORBIDDEN, "pages of other sites may not ask this server")
        if scope["path"] not in _FREE and (wait := self._rate.wait(client_of(scope), time.monotonic())):
            seconds = math.ceil(wait)
            reason = f"too many requests from one address; again in {seconds} s"
            raise RefusalError(HTTPStatus.TOO_MANY_REQUESTS, reason, retry_s=seconds)

    async def _refuse(self, error: RefusalError, scope: Scope, receive: Receive, send: Send) -> None:
        response = refusal(error)
        if scope["type"] == "websocket":
            await WebSocket(scope, receive, send).send_denial_response(response)
            return
        await response(scope, receive, _with_headers(send))


def client_of(scope: Scope) -> str:
    """The address that connected; empty where the server does not tell."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending


def _name_of(host: str) -> str:
    """The name in a Host header, without port and brackets; empty for what is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _netloc(origin: str) -> str | None:
    """Host and port of an origin in lower case; None where it is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


class _InMemory(MultiPartParser):
    # Starlette writes a larger file to a temporary one; a picture does not go to disk.
    spool_max_size = 2**62

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], *, most_files: int) -> None:
        super().__init__(headers, stream, max_files=math.inf)
        self._parts, self._most = 0, most_files

    def on_headers_finished(self) -> None:
        self._parts += 1
        if self._parts > self._most:
            raise RefusalError(422, f"a request holds at most {self._most} files")
        # A part without a file name would be decoded as text, which a picture does not survive.
        disposition = self._current_part.content_disposition
        if disposition is not None and b"filename" not in parse_options_header(disposition)[1]:
            self._current_part.content_disposition = disposition + b'; filename="file"'
        super().on_headers_finished()


async def read_files(
    request: Request, *, most_files: int, most_bytes: int, seconds: float, hold: Callable[[int], None]
) -> list[bytes]:
    """Read the files of a form, in memory, and no more of it than allowed.

    Args:
        request: Whose body is `multipart/form-data` with the one field `files`, once or several times.
        most_files: Files at most.
        most_bytes: Of the body, counted as it is read: what it says of its own length is not believed.
        seconds: For the whole body.
        hold: Called with the length of each part of it, before the part is kept.

    Returns:
        The content of each file; at least one, in order.

    Raises:
        RefusalError: If it is too long (413) or too slow (408), no such form (400, 415) or has no files (422).
        BusyError: If `hold` raises it.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise RefusalError(415, f"the body must be multipart/form-data with `files`, but is {kind[:80] or 'untold'!r}")

    async def counted() -> AsyncGenerator[bytes, None]:
        count = 0
        async for chunk in request.stream():
            count += len(chunk)
            if count > most_bytes:
                raise RefusalError(413, f"a request is at most {most_bytes / 2**20:g} MiB")
            hold(len(chunk))
            yield chunk

    try:
        if int(request.headers.get("content-length", "0")) > most_bytes:
            raise RefusalError(413, f"a request is at most {most_bytes / 2**20:g} MiB")
        async with asyncio.timeout(seconds):
            form = await _InMemory(request.headers, counted(), most_files=most_files).parse()
    except RefusalError as error:
        await _drain(request, error)
        raise
    except TimeoutError:
        raise RefusalError(408, f"the body took longer than {seconds:g} s") from None
    except ClientDisconnect:
        raise RefusalError(400, "the client left before the body was whole") from None
    except (MultiPartException, ValueError, AssertionError) as error:
        raise RefusalError(400, f"the body is no form that can be read: {str(error)[:200]}") from None
    try:
        fields = form.multi_items()
        if wrong := sorted({name for name, _ in fields if name != "files"}):
            raise RefusalError(422, f"the form takes the field `files` only, but has {wrong[0][:80]!r}")
        files = [value for _, value in fields if isinstance(value, UploadFile)]
        if not files:
            raise RefusalError(422, "`files` must be one or several files")
        return [await file.read() for file in files]
    finally:
        await form.close()


async def _drain(request: Request, error: RefusalError) -> None:
    """Read and drop what still comes, for a moment: a client that is cut while it sends never reads the answer."""
    if error.status != HTTPStatus.REQUEST_ENTITY_TOO_LARGE or "expect" in request.headers:
        return
    dropped = 0
    receive: Callable[[], Awaitable[Message]] = request.receive
    try:
        async with asyncio.timeout(_DRAIN_S):
            while dropped < _DRAIN_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return
