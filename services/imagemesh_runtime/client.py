"""Channels to other services: limits, trace, deadline and errors, the same for every call."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2

from imagemesh_runtime.channels import channel_options
from imagemesh_runtime.context import current_call, parse_server_timing
from imagemesh_runtime.errors import DeadlineExceeded, MeshError, RemoteError, Unavailable

Response = TypeVar("Response", bound=Message)

# What of the remaining time is kept for telling the caller which service was late.
_MARGIN = 0.1
_MARGIN_MIN, _MARGIN_MAX = 0.02, 1.0


@dataclass
class Hop:
    """What a call to a peer cost, in seconds and bytes of messages."""

    seconds: float = 0.0
    compute_seconds: float = 0.0
    queue_seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    _start: float = field(default_factory=perf_counter)

    async def end(self, call: Any) -> None:
        """Note the time, and what the peer says of it."""
        self.seconds = perf_counter() - self._start
        for key, value in await call.trailing_metadata() or ():
            if key == "server-timing":
                timing = parse_server_timing(value)
                self.compute_seconds = timing.get("compute", 0.0)
                self.queue_seconds = timing.get("queue", 0.0)


class Peer:
    """A service that this one calls, by name."""

    def __init__(self, name: str, address: str, *, max_message_bytes: int, timeout_seconds: float = 600.0) -> None:
        self.name = name
        self.address = address
        self._timeout = timeout_seconds
        self.channel = grpc.aio.insecure_channel(address, options=channel_options(max_message_bytes))

    async def unary(
        self, method: Any, request: Message, hop: Hop | None = None, *, timeout_seconds: float | None = None
    ) -> Any:
        """Call a unary method of a stub on ``self.channel``, for at most ``timeout_seconds`` if given.

        Raises:
            Unavailable: the peer can't be reached.
            DeadlineExceeded: the peer did not answer within what is left of the caller's deadline.
            MeshError: the peer's own error, handed on.
        """
        hop = hop if hop is not None else Hop()
        hop.bytes_sent += request.ByteSize()
        timeout = self.timeout() if timeout_seconds is None else min(timeout_seconds, self.timeout())
        call = method(request, timeout=timeout, metadata=self.metadata())
        try:
            response = await call
            await hop.end(call)
        except grpc.aio.AioRpcError as error:
            raise translate(self.name, self.address, error) from error
        hop.bytes_received += response.ByteSize()
        return response

    async def stream(self, method: Any, request: Message, hop: Hop | None = None) -> AsyncIterator[Any]:
        """Call a server-streaming method. Leaving the iterator cancels the call; errors as ``unary``."""
        hop = hop if hop is not None else Hop()
        hop.bytes_sent += request.ByteSize()
        call = method(request, timeout=self.timeout(), metadata=self.metadata())
        try:
            async for response in call:
                hop.bytes_received += response.ByteSize()
                yield response
            await hop.end(call)
        except grpc.aio.AioRpcError as error:
            raise translate(self.name, self.address, error) from error
        finally:
            call.cancel()

    def session(self, method: Any) -> "Session[Any]":
        """Open a bidirectional call whose every message is answered by one."""
        return Session(self, method(timeout=self.timeout(), metadata=self.metadata()))

    def timeout(self) -> float:
        """Seconds to give a call: what is left to the current one, less a margin to report in."""
        remaining = current_call().remaining()
        if remaining is None:
            return self._timeout
        margin = min(max(remaining * _MARGIN, _MARGIN_MIN), _MARGIN_MAX)
        return max(min(self._timeout, remaining - margin), 0.0)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Headers that tie the call to the current one's trace."""
        return (("traceparent", current_call().trace.child().header),)

    async def close(self) -> None:
        """Close the channel; calls under way end."""
        await self.channel.close()


class Session(Generic[Response]):
    """A bidirectional call used as a conversation: say one thing, hear one answer. Leaving it cancels the call."""

    def __init__(self, peer: Peer, call: Any) -> None:
        self._peer = peer
        self._call = call

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._call.cancel()

    async def send(self, message: Message) -> None:
        """Say something that isn't answered."""
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
            raise await self._failure(error) from error

    async def ask(self, message: Message) -> Response:
        """Say something and wait for the answer."""
        await self.send(message)
        try:
            answer: Response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise translate(self._peer.name, self._peer.address, error) from error
        if answer is grpc.aio.EOF:
            raise await self._failure(None)
        return answer

    async def _failure(self, error: BaseException | None) -> MeshError:
        """Why the call ended, as the peer's status has it."""
        if isinstance(error, grpc.aio.AioRpcError):
            return translate(self._peer.name, self._peer.address, error)
        code = await self._call.code()
        status = status_pb2.Status(code=code.value[0], message=await self._call.details() or "the session ended")
        return from_status(self._peer.name, self._peer.address, status)


def translate(service: str, address: str, error: grpc.aio.AioRpcError) -> MeshError:
    """A peer's failure as an error of ours; one that carries a rich status is handed on unchanged."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return RemoteError(status_pb2.Status.FromString(value))
    return from_status(service, address, status_pb2.Status(code=error.code().value[0], message=error.details() or ""))


def from_status(service: str, address: str, status: status_pb2.Status) -> MeshError:
    """An error for a bare status: what the transport says, under the name of the service it happened to."""
    if status.code == grpc.StatusCode.UNAVAILABLE.value[0]:
        return Unavailable(service, f"cannot be reached at {address}")
    if status.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]:
        return DeadlineExceeded(service, "did not answer within the deadline")
    status.message = f"{service}: {status.message}"
    return RemoteError(status)
