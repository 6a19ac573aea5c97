"""What happens around every RPC of every service, outermost first:

metrics -> call context (trace, deadline, Server-Timing) -> errors -> the servicer's method.

A layer is an async context manager around the call; one interceptor adapts them to gRPC's four kinds of RPC.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import grpc
from grpc_status import rpc_status

from imagemesh_runtime.context import CallContext, Trace, set_current_call
from imagemesh_runtime.errors import DeadlineExceeded, InternalError, MeshError
from imagemesh_runtime.metrics import Metrics

log = logging.getLogger(__name__)

_KINDS = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, False): "client_stream",
    (True, True): "bidi_stream",
}


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
            call.code = grpc.StatusCode.CANCELLED
            raise
        finally:
            metrics.grpc_seconds.labels(*labels).observe(perf_counter() - start)
            metrics.grpc_handled.labels(*labels, call.code.name).inc()

    return layer


def context_layer(default_timeout: float) -> Layer:
    """Give the call its trace and its deadline, and tell the caller afterwards what it cost."""

    @asynccontextmanager
    async def layer(call: Call) -> AsyncIterator[None]:
        trace = Trace.parse(call.metadata.get("traceparent"))
        remaining = call.context.time_remaining()
        timeout = default_timeout if remaining is None else min(remaining, default_timeout)
        current = call.context_call
        current.trace = trace.child() if trace else Trace.start()
        current.deadline = time.monotonic() + timeout
        set_current_call(current)
        try:
            yield
        finally:
            held = call.context.trailing_metadata() or ()
            call.context.set_trailing_metadata((*held, ("server-timing", current.server_timing)))

    return layer


def errors_layer(service: str) -> Layer:
    """Turn exceptions into ``google.rpc.Status``; what is unforeseen is logged under an id and not shown."""

    @asynccontextmanager
    async def layer(call: Call) -> AsyncIterator[None]:
        remaining = call.context_call.remaining()
        try:
            async with asyncio.timeout(remaining):
                yield
        except MeshError as error:
            await _abort(call, error)
        except TimeoutError:
            await _abort(call, DeadlineExceeded(service, f"{call.method} did not end within its deadline"))
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception:
            error_id = secrets.token_hex(8)
            log.exception("%s/%s failed, error id %s, trace %s", call.service, call.method, error_id,
                          call.context_call.trace.trace_id)  # fmt: skip
            await _abort(call, InternalError(error_id))

    return layer


async def _abort(call: Call, error: MeshError) -> None:
    call.code = error.code
    status = rpc_status.to_status(error.to_status())
    retry_after = error.retry_after()
    pushback = () if retry_after is None else (("grpc-retry-pushback-ms", str(int(retry_after * 1000))),)
    timing = ("server-timing", call.context_call.server_timing)
    await call.context.abort(status.code, status.details, (*status.trailing_metadata, *pushback, timing))


class LayeredInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Runs the layers around every call, whatever its kind, and counts its messages."""

    def __init__(self, layers: Sequence[Layer], metrics: Metrics) -> None:
        self._layers = layers
        self._metrics = metrics

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None  # an unknown method: gRPC answers UNIMPLEMENTED
        streams = (handler.request_streaming, handler.response_streaming)
        _, service, method = details.method.split("/")
        metadata = dict(details.invocation_metadata or ())

        def begin(context: Any) -> Call:
            return Call(_KINDS[streams], service, method, metadata, context, CallContext())

        return self._wrap(handler, streams, begin)

    def _wrap(self, handler: Any, streams: tuple[bool, bool], begin: Callable[[Any], Call]) -> Any:
        inputs = self._count_inputs if streams[0] else self._count_input

        async def to_unary(request: Any, context: Any) -> Any:
            call = begin(context)
            async with self._around(call):
                behaviour = handler.stream_unary if streams[0] else handler.unary_unary
                response = await behaviour(inputs(request, call), context)
                self._count(self._metrics.grpc_sent, call)
                return response

        async def to_stream(request: Any, context: Any) -> AsyncIterator[Any]:
            call = begin(context)
            async with self._around(call):
                behaviour = handler.stream_stream if streams[0] else handler.unary_stream
                async for response in _responses(behaviour, inputs(request, call), context):
                    self._count(self._metrics.grpc_sent, call)
                    yield response

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[streams]
        behaviour = to_stream if streams[1] else to_unary
        return make(behaviour, handler.request_deserializer, handler.response_serializer)

    def _around(self, call: Call) -> AbstractAsyncContextManager[None]:
        return _stacked(self._layers, call)

    def _count(self, counter: Any, call: Call) -> None:
        counter.labels(call.kind, call.service, call.method).inc()

    def _count_input(self, request: Any, call: Call) -> Any:
        self._count(self._metrics.grpc_received, call)
        return request

    async def _count_inputs(self, requests: Any, call: Call) -> AsyncIterator[Any]:
        async for request in requests:
            self._count(self._metrics.grpc_received, call)
            yield request


@asynccontextmanager
async def _stacked(layers: Sequence[Layer], call: Call) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for layer in layers:
            await stack.enter_async_context(layer(call))
        yield


async def _responses(behaviour: Any, request: Any, context: Any) -> AsyncIterator[Any]:
    """The responses of either style of streaming method: an async generator, or a coroutine that calls write."""
    produced = behaviour(request, context)
    if not hasattr(produced, "__aiter__"):
        await produced
        return
    try:
        async for response in produced:
            yield response
    finally:
        await produced.aclose()
