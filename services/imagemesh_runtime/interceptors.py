"""What happens around every RPC of every service, outermost first:

metrics -> call context (trace, deadline, Server-Timing) -> spans, if any -> errors -> the server's own (the gateway:
who asks) -> shared memory -> the servicer's method.

A layer is an async context manager around the call; one interceptor adapts them to gRPC's four kinds of RPC. It also
parses and serialises the messages itself, so that a request that can't be parsed is an error like any other, and reads
them inside of the layers: who is refused sends none, and who sends none waits no longer than the call's deadline.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from imagemesh_runtime.context import CallContext, Trace, set_current_call
from imagemesh_runtime.errors import (
    CODES,
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    MeshError,
    TooLarge,
    Unavailable,
    Unimplemented,
)
from imagemesh_runtime.leases import HEADER, Leases
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.parcels import Parcel, moved
from imagemesh_runtime.tracing import UNSEEN, Spans

log = logging.getLogger(__name__)

_KINDS = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, False): "client_stream",
    (True, True): "bidi_stream",
}
# When a client goes, gRPC first ends the requests, as if it had said all, and just after that cancels the servicer.
_CANCEL_LAG_SECONDS = 0.002
# Streams that last as long as their client likes: each of their requests has the default deadline instead.
_LASTING = {("inference.GRPCInferenceService", "ModelStreamInfer")}
# What anybody may ask, also without a key: nothing to wait for, so nobody holds a call's place by it for long.
_QUICK = {
    ("grpc.health.v1.Health", "Check"),
    ("inference.GRPCInferenceService", "ServerLive"),
    ("inference.GRPCInferenceService", "ServerReady"),
}
_QUICK_SECONDS = 10.0


@dataclass
class Call:
    """The RPC that the layers surround."""

    kind: str
    service: str
    method: str
    metadata: dict[str, Any]
    context: Any
    context_call: CallContext
    # The code that the RPC ends with, as far as it is known.
    code: grpc.StatusCode = grpc.StatusCode.OK
    # Leaves a parcel's payloads in memory that the client shares, if it can; None: the client shares none.
    place: Callable[[Parcel[Any]], Awaitable[bool]] | None = None

    def final_code(self) -> grpc.StatusCode:
        """The code that the client gets: the layers' one, else what the servicer itself set or aborted with."""
        if self.code is not grpc.StatusCode.OK:
            return self.code
        code = self.context.code()  # a number, until somebody sets it
        return code if isinstance(code, grpc.StatusCode) else CODES.get(code or 0, grpc.StatusCode.UNKNOWN)


Layer = Callable[[Call], AbstractAsyncContextManager[None]]


def metrics_layer(metrics: Metrics) -> Layer:
    """Count calls under the names that gRPC's users know (go-grpc-prometheus)."""

    @asynccontextmanager
    async def layer(call: Call) -> AsyncIterator[None]:
        labels = (call.kind, call.service, call.method)
        metrics.grpc_started.labels(*labels).inc()
        start = perf_counter()
        try:
            yield
        except asyncio.CancelledError:
            expired = call.context_call.expired()
            call.code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            raise
        finally:
            metrics.grpc_seconds.labels(*labels).observe(perf_counter() - start)
            metrics.grpc_handled.labels(*labels, call.final_code().name).inc()

    return layer


def context_layer(default_timeout: float) -> Layer:
    """Give the call its trace and its deadline, and tell the caller afterwards what it cost.

    gRPC's own services (health, reflection) get no default deadline: a health watch lasts as long as its client. Nor
    do streams that see to it themselves. What only asks how the server is gets a short one.
    """

    @asynccontextmanager
    async def layer(call: Call) -> AsyncIterator[None]:
        trace = Trace.parse(call.metadata.get("traceparent"))
        limits = _default_limits((call.service, call.method), default_timeout)
        remaining = call.context.time_remaining()
        if remaining is not None:
            limits.append(remaining)
        current = call.context_call
        current.trace = trace.child() if trace else Trace.start()
        current.deadline = time.monotonic() + min(limits) if limits else None
        set_current_call(current)
        try:
            yield
        finally:
            held = call.context.trailing_metadata() or ()
            call.context.set_trailing_metadata((*held, ("server-timing", current.server_timing)))

    return layer


def _default_limits(method: tuple[str, str], usual: float) -> list[float]:
    if method in _QUICK:
        return [min(usual, _QUICK_SECONDS)]
    return [] if method[0].startswith("grpc.") or method in _LASTING else [usual]


def spans_layer(spans: Spans) -> Layer:
    """Make a span of the call, below the caller's, and give the call its ids; for inside of ``context_layer``."""

    @asynccontextmanager
    async def layer(call: Call) -> AsyncIterator[None]:
        if call.service.startswith(UNSEEN):
            yield
            return
        current, parent = call.context_call, Trace.parse(call.metadata.get("traceparent"))
        told = {"rpc.system": "grpc", "rpc.service": call.service, "rpc.method": call.method}
        with spans.span(f"{call.service}/{call.method}", "server", parent, told) as span:
            current.trace = span.trace
            try:
                yield
            finally:
                code = call.final_code()
                if code is not grpc.StatusCode.OK:
                    span.fail(code.name)
                costs = {"queue": current.queue_seconds, "compute": current.compute_seconds}
                span.note({f"imagemesh.{name}_seconds": seconds for name, seconds in costs.items()})
                span.note({"rpc.grpc.status_code": code.value[0]})

    return layer


def errors_layer(service: str) -> Layer:
    """Turn exceptions into ``google.rpc.Status``; what is unforeseen is logged under an id and not shown."""

    @asynccontextmanager
    async def layer(call: Call) -> AsyncIterator[None]:
        limit = asyncio.timeout(call.context_call.remaining())
        try:
            async with limit:
                yield
        except MeshError as error:
            await _abort(call, error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # by gRPC: the caller went, or the server closes
            await _abort(call, Unavailable(service, f"{call.method} was given up"))
        except grpc.aio.AbortError:
            raise  # the servicer's own
        except grpc.aio.InternalError:
            call.code = grpc.StatusCode.CANCELLED  # a message could not be sent, since nobody is there any more
            raise
        except Exception as error:
            await _abort(call, _named(service, call, error, expired=limit.expired()))

    return layer


def _named(service: str, call: Call, error: Exception, *, expired: bool) -> MeshError:
    """What the client is told of an exception that is none of ours."""
    if expired and isinstance(error, TimeoutError):
        return DeadlineExceeded(service, f"{call.method} did not end within its deadline")
    if isinstance(error, NotImplementedError) and call.final_code() is grpc.StatusCode.UNIMPLEMENTED:
        return Unimplemented(f"{service} does not implement {call.method}")  # the generated base class says so
    error_id, trace_id = secrets.token_hex(8), call.context_call.trace.trace_id
    message = "%s/%s failed, error id %s, trace %s"
    log.error(message, call.service, call.method, error_id, trace_id, exc_info=error)
    return InternalError(error_id)


async def _abort(call: Call, error: MeshError) -> None:
    call.code = error.code
    status = rpc_status.to_status(error.to_status())
    retry_after = error.retry_after()
    pushback = () if retry_after is None else (("grpc-retry-pushback-ms", str(int(retry_after * 1000))),)
    timing = ("server-timing", call.context_call.server_timing)
    await call.context.abort(status.code, status.details, (*status.trailing_metadata, *pushback, timing))


def shared_memory_layer(leases: Leases) -> Layer:
    """Give the call the place in shared memory that its client has leased."""

    @asynccontextmanager
    async def layer(call: Call) -> AsyncIterator[None]:
        found = leases.enter(call.metadata.get(HEADER))
        if found is None:
            yield
            return
        lease, shelf, leave = found
        call.place = partial(lease.place, shelf)
        try:
            yield
        finally:
            leave()

    return layer


class LayeredInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Runs the layers around every call, whatever its kind, and counts its messages."""

    def __init__(self, layers: Sequence[Layer], metrics: Metrics, max_message_bytes: int) -> None:
        self._layers = layers
        self._metrics = metrics
        self._limit = max_message_bytes

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None  # an unknown method: gRPC answers UNIMPLEMENTED
        streams = (handler.request_streaming, handler.response_streaming)
        _, service, method = details.method.split("/")
        metadata = dict(details.invocation_metadata or ())

        def begin(context: Any) -> "_Wire":
            call = Call(_KINDS[streams], service, method, metadata, context, CallContext())
            return _Wire(handler, behaviour, call, self._metrics, self._limit)

        behaviour = getattr(handler, "_".join("stream" if streaming else "unary" for streaming in streams))
        return self._wrap(behaviour, streams, begin)

    def _wrap(self, behaviour: Any, streams: tuple[bool, bool], begin: Callable[[Any], "_Wire"]) -> Any:

        async def to_unary(requests: Any, context: Any) -> bytes:
            wire = begin(context)
            async with _stacked(self._layers, wire.call):
                response = await behaviour(await wire.input(requests), wire)
                if wire.call.final_code() is not grpc.StatusCode.OK:
                    return b""  # the servicer set a code; gRPC sends no message with it
                return await wire.encode(response)
            raise AssertionError("a layer swallowed an error")

        async def to_stream(requests: Any, context: Any) -> None:
            # Not a generator: so the servicer's one is closed at once, in this task, when the caller goes.
            wire = begin(context)
            async with _stacked(self._layers, wire.call):
                produced = behaviour(await wire.input(requests), wire)
                if not hasattr(produced, "__aiter__"):
                    await produced  # a coroutine that calls context.write
                    return
                async with aclosing(produced):
                    async for response in produced:
                        await wire.write(response)

        # Also where there is one request: gRPC would receive that before it calls what it takes for a unary handler.
        if streams[1]:
            return grpc.stream_stream_rpc_method_handler(to_stream)
        return grpc.stream_unary_rpc_method_handler(to_unary)


class _Wire:
    """The context that a servicer sees: gRPC's own, with messages parsed, serialised and counted on their way."""

    def __init__(self, handler: Any, behaviour: Any, call: Call, metrics: Metrics, limit: int) -> None:
        self.call = call
        self._limit = limit
        self._metrics = metrics
        self._parse = handler.request_deserializer
        if getattr(behaviour, "takes_parcels", False):
            self._parse = partial(Parcel.from_bytes, handler.request_deserializer.__self__)
        self._serialise = handler.response_serializer
        self._streams_in = handler.request_streaming
        labels = (call.kind, call.service, call.method)
        self._received = metrics.grpc_received.labels(*labels)
        self._sent = metrics.grpc_sent.labels(*labels)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.call.context, name)

    async def input(self, requests: AsyncIterator[bytes]) -> Any:
        """The request, or an iterator of requests."""
        return self._requests(requests) if self._streams_in else await self._only()

    def decode(self, data: bytes) -> Any:
        self._received.inc()
        if self._parse is None:
            return data
        try:
            request = self._parse(data)
        except DecodeError as error:
            raise InvalidArgument("request", f"{len(data)} bytes", "a message of the method's request type") from error
        self._count("received", request)
        return request

    async def encode(self, message: Any) -> bytes:
        if isinstance(message, Parcel):
            placed = self.call.place is not None and await self.call.place(message)
            data: bytes = message.message.SerializeToString() if placed else message.to_bytes()
        else:
            data = message if self._serialise is None else self._serialise(message)
        if len(data) > self._limit:
            raise TooLarge(f"the answer's {len(data)} bytes are over the limit of {self._limit}")
        self._sent.inc()
        self._count("sent", message)
        return data

    def _count(self, direction: str, message: Any) -> None:
        for path, count in moved(message):
            self._metrics.count_transport(path, direction, count)

    async def read(self) -> Any:
        data = await self.call.context.read()
        return data if data is grpc.aio.EOF else self.decode(data)

    async def write(self, message: Any) -> None:
        await self.call.context.write(await self.encode(message))

    async def _only(self) -> Any:
        request = await self.read()
        if request is grpc.aio.EOF:
            await asyncio.sleep(_CANCEL_LAG_SECONDS)
            raise InvalidArgument("request", "no message", "one message")
        return request

    async def _requests(self, data: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for one in data:
            yield self.decode(one)
        await asyncio.sleep(_CANCEL_LAG_SECONDS)


@asynccontextmanager
async def _stacked(layers: Sequence[Layer], call: Call) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for layer in layers:
            await stack.enter_async_context(layer(call))
        yield
