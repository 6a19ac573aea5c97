"""Channels to other services: limits, trace, deadline and errors, the same for every call."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2

from imagemesh_runtime.addresses import WANTED, is_address
from imagemesh_runtime.channels import channel_options
from imagemesh_runtime.context import Trace, current_call, parse_server_timing, served_call
from imagemesh_runtime.errors import DeadlineExceeded, InvalidArgument, MeshError, RemoteError, Unavailable
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.parcels import Parcel, ParcelChannel, moved
from imagemesh_runtime.tenancy import Lodger, NoReceipts, Receipts
from imagemesh_runtime.tls import NO_TLS, Certificates, RenewedChannel, TlsFiles
from imagemesh_runtime.tracing import UNSEEN

Response = TypeVar("Response", bound=Message | Parcel[Any])
T = TypeVar("T")

# What of the remaining time is kept for telling the caller which service was late.
_MARGIN = 0.1
_MARGIN_MIN, _MARGIN_MAX = 0.02, 1.0
# How long a peer may take to end a conversation that has been said good-bye to.
_PARTING_SECONDS = 1.0
_KEY = re.compile(r"[A-Za-z0-9_.~+/=-]*", re.ASCII)  # what may stand in a Bearer token, and that is in ours
_WRITE_FAILED = "Internal error from Core"  # grpcio's own words


@dataclass
class Hop:
    """What a call to a peer cost, in seconds and bytes of messages.

    ``moved``: another peer had done some of it before, whose seconds nobody has told.
    """

    seconds: float = 0.0
    compute_seconds: float = 0.0
    queue_seconds: float = 0.0
    device_seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    moved: bool = False
    _start: float = field(default_factory=perf_counter)

    async def end(self, call: Any) -> None:
        """Note the time, and what the peer says of it."""
        self.seconds = perf_counter() - self._start
        for key, value in await call.trailing_metadata() or ():
            if key == "server-timing":
                timing = parse_server_timing(value)
                self.compute_seconds = timing.get("compute", 0.0)
                self.queue_seconds = timing.get("queue", 0.0)
                self.device_seconds = timing.get("device", 0.0)


class Peer:
    """A service that this one calls, by name, at ``host:port`` or ``unix:/path``.

    Stubs on ``channel`` take and answer messages, those on ``parcels`` parcels, whose payloads come in shared memory if
    the peer is on this machine and offers some. ``key`` is shown to a peer that wants an API key. With ``tls`` it is
    called by TLS, except on a Unix socket.
    """

    def __init__(
        self,
        name: str,
        address: str,
        *,
        max_message_bytes: int,
        timeout_seconds: float = 600.0,
        metrics: Metrics | None = None,
        shares_memory: bool = True,
        key: str = "",
        tls: TlsFiles = NO_TLS,
        known_as: str = "",
    ) -> None:
        if not is_address(address):
            raise InvalidArgument(f"address of {name}", address, WANTED)
        if not _KEY.fullmatch(key):
            raise InvalidArgument("key", "something else", "an API key, of letters, digits, - and _")
        self.name = name
        self.address = address
        self._shown = (("authorization", f"Bearer {key}"),) if key else ()
        self._timeout = timeout_seconds
        self._metrics = metrics
        self._spans = metrics.spans if metrics is not None else None
        self.channel = _channel(address, max_message_bytes, timeout_seconds, tls, known_as)
        self.parcels = ParcelChannel(self.channel)
        self._lodger = Lodger(self.channel) if shares_memory else None

    async def unary(
        self,
        method: Any,
        request: Message | Parcel[Any],
        hop: Hop | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> Any:
        """Call a unary method of a stub on ``self.channel``, for at most ``timeout_seconds`` if given.

        Raises:
            Unavailable: the peer can't be reached.
            DeadlineExceeded: the peer did not answer within what is left of the caller's deadline.
            MeshError: the peer's own error, handed on.
        """
        hop = hop if hop is not None else Hop()
        hop.bytes_sent += self.count("sent", request)
        with self.span(method) as trace, self.failures():
            async with self.receiving(method) as receipts:
                # Only now: seeking shared memory takes of the time, with a peer that hangs.
                timeout = self.timeout() if timeout_seconds is None else min(timeout_seconds, self.timeout())
                call = method(request, timeout=timeout, metadata=(*self.metadata(trace), *receipts.metadata))
                response = receipts.claim(await call)
                await hop.end(call)
        hop.bytes_received += self.count("received", response)
        return response

    async def stream(
        self, method: Any, request: Message | Parcel[Any] | AsyncIterator[Message], hop: Hop | None = None
    ) -> AsyncGenerator[Any, None]:
        """Call a method that streams its answers, and takes one request or several; errors as ``unary``.

        Closing the generator cancels the call: hold it in ``contextlib.aclosing``, or that is left to the collector.
        """
        hop = hop if hop is not None else Hop()
        hop.bytes_sent += self.count("sent", request) if isinstance(request, Message | Parcel) else 0
        async with self.receiving(method) as receipts:
            with self.span(method) as trace:
                with self.failures():
                    metadata = (*self.metadata(trace), *receipts.metadata)
                    call = method(request, timeout=self.timeout(), metadata=metadata)
                try:
                    with self.failures():
                        async for response in call:
                            hop.bytes_received += self.count("received", receipts.claim(response))
                            yield response
                        await hop.end(call)
                finally:
                    call.cancel()

    def session(self, method: Any) -> "Session[Any]":
        """A bidirectional call whose every message is answered by one; entering it opens it."""
        return Session(self, method)

    @asynccontextmanager
    async def receiving(self, method: Any) -> AsyncIterator[Receipts | NoReceipts]:
        """Around a call of ``method``: what its answers leave in shared memory, if they may."""
        receipts = None
        if self._lodger is not None and getattr(method, "answers_parcels", False):
            receipts = await self._lodger.begin(self.timeout())
        try:
            yield receipts or NoReceipts()
        finally:
            if receipts is not None:
                receipts.end()

    def count(self, direction: str, message: Message | Parcel[Any]) -> int:
        """Note which way a message's bytes go; answers how many they are."""
        if self._metrics is not None:
            for path, count in moved(message):
                self._metrics.count_transport(path, direction, count)
        return message.ByteSize()

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Around the use of a call: turn what gRPC raises into an error that names this peer."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise translate(self.name, self.address, error) from error
        except grpc.aio.UsageError as error:
            raise Unavailable(self.name, "the channel to it is closed") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise Unavailable(self.name, "the channel to it was closed") from error

    def timeout(self) -> float:
        """Seconds to give a call: what is left to the current one, less a margin to report in.

        Raises:
            DeadlineExceeded: nothing is left.
        """
        remaining = current_call().remaining()
        if remaining is None:
            return self._timeout
        remaining -= min(max(remaining * _MARGIN, _MARGIN_MIN), _MARGIN_MAX)
        if remaining <= 0:
            raise DeadlineExceeded(self.name, "no time was left to ask it")
        return min(self._timeout, remaining)

    @contextmanager
    def span(self, method: Any) -> Iterator[Trace]:
        """Around a call of ``method``: its place in the current one's trace, and a span where they are made."""
        call, path = served_call(), "" if self._spans is None else method._method.decode().lstrip("/")
        if self._spans is None or call is None or path.startswith(UNSEEN):
            yield current_call().trace.child()
            return
        service, _, name = path.partition("/")
        told = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name, "server.address": self.address}
        with self._spans.span(path, "client", call.trace, told) as span:
            yield span.trace

    def metadata(self, trace: Trace) -> tuple[tuple[str, str], ...]:
        """Headers that tie a call to its trace, and say who calls."""
        return (("traceparent", trace.header), *self._shown)

    async def close(self) -> None:
        """Close the channel; calls under way end."""
        if self._lodger is not None:
            self._lodger.close()
        await self.channel.close()


def out_of_time() -> bool:
    """Whether the current call's deadline has come for whom it calls: what is left is what ``Peer.timeout`` keeps."""
    remaining = current_call().remaining()
    return remaining is not None and remaining <= _MARGIN_MAX


def tls_files(authority: str, certificate: str = "", key: str = "") -> TlsFiles:
    """What to show to a peer, and whose certificates it may show; without an authority there is no TLS.

    A certificate alone is nobody's mistake: where that is in the environment, servers use it.
    """
    return TlsFiles(certificate, key, authority) if authority else NO_TLS


def _channel(address: str, max_message_bytes: int, linger_seconds: float, tls: TlsFiles, known_as: str) -> Any:
    options: list[tuple[str, Any]] = [*channel_options(max_message_bytes)]
    if not tls or address.startswith("unix:"):
        return grpc.aio.insecure_channel(address, options=options)
    if known_as:
        options.append(("grpc.ssl_target_name_override", known_as))
    return RenewedChannel(
        Certificates(tls), lambda credentials: grpc.aio.secure_channel(address, credentials, options), linger_seconds
    )


class Session(Generic[Response]):
    """A bidirectional call used as a conversation: say one thing, hear one answer.

    Leaving it says good-bye and lets the peer end the call; leaving it with an exception cancels the call.
    """

    def __init__(self, peer: Peer, method: Any) -> None:
        self._peer = peer
        self._method = method
        self._stack = AsyncExitStack()
        self._end: grpc.aio.AioRpcError | None = None
        self._ended = asyncio.Event()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            with self._peer.failures():
                self._receipts = await stack.enter_async_context(self._peer.receiving(self._method))
                trace = stack.enter_context(self._peer.span(self._method))
                metadata = (*self._peer.metadata(trace), *self._receipts.metadata)
                self._call = self._method(timeout=self._peer.timeout(), metadata=metadata)
            self._call.add_done_callback(self._note_end)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._call.done():
                with suppress(TimeoutError):  # of a peer that goes on talking
                    async with asyncio.timeout(_PARTING_SECONDS):
                        await self._call.done_writing()
                        await self._ended.wait()
        finally:
            self._call.cancel()
            await self._stack.aclose()

    async def send(self, message: Message | Parcel[Any]) -> None:
        """Say something that isn't answered.

        Raises:
            MeshError: the call has ended, as the peer's status has it.
        """
        await self._attempt(self._call.write(message))
        self._peer.count("sent", message)

    async def ask(self, message: Message | Parcel[Any]) -> Response:
        """Say something and wait for the answer; errors as ``send``."""
        await self.send(message)
        return await self.hear()

    async def hear(self) -> Response:
        """Wait for an answer, one of several to what was said; errors as ``send``."""
        answer: Response = await self._attempt(self._call.read())
        if answer is grpc.aio.EOF:
            raise await self._reason()
        self._peer.count("received", self._receipts.claim(answer))
        return answer

    async def _attempt(self, operation: Awaitable[Any]) -> Any:
        try:
            with self._peer.failures():
                return await operation
        except asyncio.InvalidStateError as error:  # what a write to a call that has ended raises
            raise await self._reason() from error
        except MeshError as error:
            if isinstance(error.__cause__, grpc.aio.AioRpcError):
                raise await self._reason() from error.__cause__
            raise

    def _note_end(self, call: Any) -> None:
        """Keep the peer's status: a write that fails later puts one of its own in the place of it."""
        code, details, trailing = _now(call.code()), _now(call.details()), _now(call.trailing_metadata())
        if details != _WRITE_FAILED:
            self._end = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)
            self._ended.set()

    async def _reason(self) -> MeshError:
        """Why there is no more to say or to hear, as the peer's status has it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_PARTING_SECONDS):
                await self._ended.wait()
        if self._end is None or self._end.code() is grpc.StatusCode.OK:
            return Unavailable(self._peer.name, "it ended the session")
        return translate(self._peer.name, self._peer.address, self._end)


def _now(answer: Coroutine[Any, Any, T]) -> T:
    """What a coroutine that need not wait returns."""
    try:
        answer.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise RuntimeError("the call has not ended")


def translate(service: str, address: str, error: grpc.aio.AioRpcError) -> MeshError:
    """A peer's failure as an error of ours; one that carries a rich status is handed on unchanged."""
    code = error.code().value[0]
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                continue
            if status.code == code:
                return RemoteError(status)
    return from_status(service, address, status_pb2.Status(code=code, message=error.details() or ""))


def from_status(service: str, address: str, status: status_pb2.Status) -> MeshError:
    """An error for a bare status: what the transport says, under the name of the service it happened to."""
    if status.code == grpc.StatusCode.UNAVAILABLE.value[0]:
        return Unavailable(service, f"cannot be reached at {address}")
    if status.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]:
        return DeadlineExceeded(service, "did not answer within the deadline")
    status.message = f"{service}: {status.message}"
    return RemoteError(status)
