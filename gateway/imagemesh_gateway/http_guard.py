"""What stands before the HTTP application: bounds in number, size and time, metrics, and an eye on who has gone."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from time import perf_counter
from typing import Any

from fastapi import FastAPI, Response
from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers
from starlette.routing import Match

from imagemesh_gateway.access.door import Door
from imagemesh_gateway.access.rights import right_of_request
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.http_errors import RefusedRequest, challenge_of, unforeseen
from imagemesh_gateway.http_faces import tell
from imagemesh_gateway.http_job_events import EVENTS_PATH, SOCKET_PATH
from imagemesh_gateway.http_origin import SAFE_METHODS, check_origin
from imagemesh_runtime.context import CallContext, Trace, set_current_call
from imagemesh_runtime.errors import DeadlineExceeded, MeshError, Unavailable
from imagemesh_runtime.metrics import Metrics

# An overloaded gateway must not look like a dead one.
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
# They last as long as what they watch, mostly idle.
WATCHES = frozenset({EVENTS_PATH, SOCKET_PATH})
# Nobody has much to say to a socket that only tells.
WS_MESSAGE_BYTES = 64 * 1024
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CLIENT_GONE = 499
_OTHER = "other"
_RETRY_SECONDS = 1
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True)
class HttpLimits:
    """How much one client, and all of them, may take."""

    requests: int
    watches: int
    body_bytes: int
    held_bytes: int
    body_seconds: float
    request_seconds: float

    @classmethod
    def of(cls, config: GatewayConfig) -> "HttpLimits":
        """The limits that the configuration sets."""
        return cls(
            config.max_http_requests,
            config.max_http_watches,
            config.max_http_body_bytes,
            config.max_http_held_bytes,
            config.http_body_timeout_seconds,
            config.request_timeout_seconds,
        )


class _ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class _Crowded(Unavailable):
    """There is no room for one more now."""

    def __init__(self, told: str) -> None:
        super().__init__("gateway", f"{told}; retry after {_RETRY_SECONDS} s")

    def retry_after(self) -> float | None:
        return _RETRY_SECONDS


class _Exchange:
    """One request under way: the ASGI channel, and how far the answer has come."""

    def __init__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        self.receive = receive
        self._send = send
        self.status: int | None = None
        self.complete = False
        self.held = 0  # bytes of its body

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        await self._send(message)

    async def fail(self, error: MeshError, headers: dict[str, str] | None = None) -> None:
        """Answer with the error, unless an answer has begun."""
        if self.status is None:
            await _answer(self.scope, error, headers)(self.scope, self.receive, self.send)


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: FastAPI, metrics: Metrics, limits: HttpLimits, door: Door) -> None:
        self._app = app
        self._door = door
        self._limits = limits
        self._spans = metrics.spans
        self._running = {"requests": 0, "watches": 0}
        self._held = 0  # bytes of the bodies in work
        labels = ("method", "path")
        self._handled = Counter(
            "http_requests", "HTTP requests answered.", (*labels, "code"), registry=metrics.registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds", "Seconds from the head of a request to the end of its answer.", labels,
            buckets=_BUCKETS, registry=metrics.registry,
        )  # fmt: skip

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection event."""
        if scope["type"] != "http":
            await self._socket(scope, receive, send)
            return
        exchange, path, start = _Exchange(scope, receive, send), self._template(scope), perf_counter()
        try:
            await self._admit(exchange, path)
        finally:
            if path == _OTHER:  # a router's routes are found by itself alone, when it serves them
                path = str(getattr(scope.get("route"), "path", _OTHER))
            labels = (scope["method"] if scope["method"] in METHODS else "other", path)
            self._handled.labels(*labels, exchange.status or CLIENT_GONE).inc()
            self._seconds.labels(*labels).observe(perf_counter() - start)

    def _template(self, scope: Any) -> str:
        """The path of the route that the request is for, so that clients can't invent series."""
        for route in self._app.routes:
            if route.matches(scope)[0] is not Match.NONE:
                return str(getattr(route, "path", _OTHER))
        return _OTHER

    @contextmanager
    def _call(self, exchange: _Exchange, path: str, seconds: float | None) -> Iterator[None]:
        """Make the request the current call, with a span where they are made."""
        if self._spans is None:
            _begin_call(exchange.scope, seconds)
            yield
            return
        method = exchange.scope["method"]
        told = {"http.request.method": method, "http.route": path}
        with self._spans.span(f"{method} {path}", "server", _parent(exchange.scope), told) as span:
            _begin_call(exchange.scope, seconds, span.trace)
            try:
                yield
            finally:
                status = exchange.status or CLIENT_GONE
                span.note({"http.response.status_code": status})
                if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    span.fail(str(status))

    async def _socket(self, scope: Any, receive: Any, send: Any) -> None:
        _begin_call(scope, None)
        try:
            self._let_in(scope)
        except MeshError as error:
            await _answer(scope, error)(scope, receive, send)
            return
        full = self._full("watches")
        if full is not None:
            await _answer(scope, full)(scope, receive, send)
            return
        with self._counted("watches"):
            await self._app(scope, receive, send)

    async def _admit(self, exchange: _Exchange, path: str) -> None:
        try:
            self._let_in(exchange.scope)
        except MeshError as error:
            await exchange.fail(error)
            return
        kind = "watches" if path in WATCHES else "requests"
        if path in PROBES:
            await self._app(exchange.scope, exchange.receive, exchange.send)
        elif (full := self._full(kind)) is not None:
            await exchange.fail(full)
        else:
            seconds = None if kind == "watches" else self._limits.request_seconds
            with self._counted(kind), self._call(exchange, path, seconds):
                await self._bounded(exchange, seconds)

    def _let_in(self, scope: Any) -> None:
        """Raise MeshError unless the door does; before the body is read, and before the request counts."""
        right = right_of_request(scope.get("method", "GET"), scope["path"])
        self._door.enter(Headers(scope=scope).get("authorization"), right)

    def _full(self, kind: str) -> MeshError | None:
        limit = getattr(self._limits, kind)
        if self._running[kind] < limit:
            return None
        return _Crowded(f"{limit} HTTP {kind} are in work, as many as it takes")

    @contextmanager
    def _counted(self, kind: str) -> Iterator[None]:
        self._running[kind] += 1
        try:
            yield
        finally:
            self._running[kind] -= 1

    async def _bounded(self, exchange: _Exchange, seconds: float | None) -> None:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                if exchange.scope["method"] not in SAFE_METHODS:
                    check_origin(Headers(scope=exchange.scope), "change anything")
                body = await self._body(exchange)
                await self._while_connected(exchange, body)
        except _ClientGoneError:
            pass
        except MeshError as error:
            # What is left of a large body is read away, or the client would not come to read this; a slow one isn't.
            headers = {"Connection": "close"} if isinstance(error, DeadlineExceeded) else None
            await exchange.fail(error, headers)
        except Exception as error:
            if limit.expired():
                late = DeadlineExceeded("gateway", f"the request was not done within {seconds:g} s")
                await exchange.fail(late, {"Connection": "close"})
            elif exchange.status is None:  # else the application has told of it, and its framework raises it again
                await exchange.fail(unforeseen(error, exchange.scope["path"]))
        finally:
            self._held -= exchange.held

    async def _body(self, exchange: _Exchange) -> bytes:
        """The whole body.

        Raises:
            RefusedRequest: it is over the limit, by its announced length or as it comes in.
            Unavailable: with it all bodies together are.
            DeadlineExceeded: it came too slowly.
        """
        most = self._limits.body_bytes
        announced = int(Headers(scope=exchange.scope).get("content-length", 0))
        if announced > most:
            raise RefusedRequest(413, "body", f"{announced} bytes", f"at most {most} bytes")
        self._check_room(announced)
        body = bytearray()
        limit = asyncio.timeout(self._limits.body_seconds)
        try:
            async with limit:
                more = True
                while more:
                    message = await exchange.receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGoneError
                    part = message.get("body", b"")
                    self._check_room(len(part))
                    body += part
                    exchange.held += len(part)
                    self._held += len(part)
                    if len(body) > most:
                        raise RefusedRequest(413, "body", f"more than {most} bytes", f"at most {most} bytes")
                    more = message.get("more_body", False)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineExceeded("body", f"did not arrive within {self._limits.body_seconds:g} s") from error
        return bytes(body)

    def _check_room(self, more: int) -> None:
        """What is announced takes no room until it comes, so that nobody can keep room by words alone."""
        if self._held + more > self._limits.held_bytes:
            held = f"{self._held} bytes of bodies are in work, and it takes {self._limits.held_bytes} bytes"
            raise _Crowded(f"{held} together")

    async def _while_connected(self, exchange: _Exchange, body: bytes) -> None:
        """Let the application answer, but give it up when the client goes."""
        gone = asyncio.create_task(_disconnected(exchange))
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if unread:
                return unread.pop()
            await asyncio.wait((gone,))
            return {"type": "http.disconnect"}

        work = asyncio.create_task(self._app(exchange.scope, receive, exchange.send))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if exchange.complete:  # for the server, the client has gone once it has its answer
                await asyncio.wait((work,))
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if work.cancelled():
            raise _ClientGoneError
        work.result()


def _answer(scope: Any, error: MeshError, headers: dict[str, str] | None = None) -> Response:
    """The error as the API at that path tells of it."""
    response = tell(error, scope["path"])
    response.headers.update({**challenge_of(error), **(headers or {})})
    return response


def _parent(scope: Any) -> Trace | None:
    return Trace.parse(Headers(scope=scope).get("traceparent"))


def _begin_call(scope: Any, seconds: float | None, trace: Trace | None = None) -> None:
    if trace is None:
        parent = _parent(scope)
        trace = parent.child() if parent else Trace.start()
    deadline = None if seconds is None else time.monotonic() + seconds
    set_current_call(CallContext(trace, deadline))


async def _disconnected(exchange: _Exchange) -> None:
    while (await exchange.receive())["type"] != "http.disconnect":
        pass
