"""The client's side of shared memory: read what the server wrote, and say when it may write there again.

The arrays of a parcel share the memory. When the last of a message's arrays is dropped, wherever and by whichever
thread, the message counts as let go of, and the server is told.
"""

import asyncio
import logging
import os
import socket
import time
import weakref
from contextlib import suppress
from typing import Final, TypeVar

import grpc

from imagemesh.v1 import transport_service_pb2 as pb
from imagemesh.v1 import transport_service_pb2_grpc as rpc
from imagemesh_runtime.arena import Mapping, Window
from imagemesh_runtime.leases import HEADER, REPORT, TOKEN_BYTES, peer_is_us
from imagemesh_runtime.parcels import Parcel, tensors_of

T = TypeVar("T")
log = logging.getLogger(__name__)

_SEEK_SECONDS: Final = 1.0
_REFUSED_SECONDS: Final = 10.0  # until a peer is asked again
_AGAIN_SECONDS: Final = 0.005  # until a report is tried again that found the socket full


class Lodger:
    """A channel's shared memory: sought when it is first wanted, and again when it was lost."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = rpc.TransportServiceStub(channel)
        self._tenancy: Tenancy | None = None
        self._refused_until = 0.0
        self._seeking = asyncio.Lock()

    async def begin(self, timeout_seconds: float) -> "Receipts | None":
        """For a new call; None: the peer shares no memory, be it that it is far away, or that it does not want to."""
        async with self._seeking:
            if self._tenancy is None or self._tenancy.closed:
                self._tenancy = None
                if time.monotonic() >= self._refused_until:
                    self._tenancy = await self._seek(min(timeout_seconds, _SEEK_SECONDS))
        return None if self._tenancy is None else self._tenancy.begin()

    async def _seek(self, timeout_seconds: float) -> "Tenancy | None":
        try:
            offer = await self._stub.OpenLease(pb.OpenLeaseRequest(), timeout=timeout_seconds)
            return await Tenancy.open(offer, timeout_seconds)
        except (grpc.aio.AioRpcError, OSError, ValueError) as error:  # a TimeoutError is an OSError
            reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else error
            log.info("no shared memory: %s", reason)
            self._refused_until = time.monotonic() + _REFUSED_SECONDS
            return None

    def close(self) -> None:
        """Give it up; the memory goes with the last array of it."""
        if self._tenancy is not None:
            self._tenancy.close()
            self._tenancy = None


class Tenancy:
    """A lease as its client holds it."""

    def __init__(self, connection: socket.socket, mapping: Mapping, token: bytes) -> None:
        self.closed = False
        self._connection = connection
        self._mapping = mapping
        self._token = token
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, Receipts] = {}
        self._unsent: dict[int, Receipts] = {}
        self._next = 1
        self._loop.add_reader(connection, self._hear)

    @classmethod
    async def open(cls, offer: pb.OpenLeaseResponse, timeout_seconds: float) -> "Tenancy":
        """Take up an offer.

        Raises:
            OSError, ValueError: it can't be: another machine, another user, or not what it says it is.
            TimeoutError: the server does not pass the memory on.
        """
        if len(offer.token) != TOKEN_BYTES:
            raise OSError("the offer has no token")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            connection.connect(offer.socket)
            if not peer_is_us(connection):
                raise PermissionError("the socket is another user's")
            connection.send(offer.token)
            async with asyncio.timeout(timeout_seconds):
                await _readable(connection)
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
            if not descriptors:
                raise OSError("no memory was passed")
            try:
                mapping = Mapping(descriptors[0], offer.size)
            finally:
                os.close(descriptors[0])
            return cls(connection, mapping, offer.token)
        except BaseException:
            connection.close()
            raise

    def begin(self) -> "Receipts":
        """For a new call."""
        call = self._next
        self._next += 1
        self._calls[call] = receipts = Receipts(self, call)
        return receipts

    def header(self, call: int) -> tuple[str, str]:
        """What ties the call to the lease."""
        return (HEADER, f"{self._token.hex()}-{call}")

    def window(self, call: int, number: int, size: int) -> Window:
        """The memory of a call's message; noticed when it is dropped."""
        whole = self._mapping.whole()
        weakref.finalize(whole, self._let_go, call, number).atexit = False
        return Window(whole, number, size)

    def _let_go(self, call: int, number: int) -> None:
        with suppress(RuntimeError):  # the loop is closed, and the server knows that we are gone
            self._loop.call_soon_threadsafe(self._note, call, number)

    def _note(self, call: int, number: int) -> None:
        receipts = self._calls[call]
        receipts.let_go(number)
        self.report(receipts)

    def report(self, receipts: "Receipts") -> None:
        """Tell the server how the call stands."""
        if receipts.over and receipts.freed == receipts.seen:
            self._calls.pop(receipts.call, None)
        self._unsent[receipts.call] = receipts
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent and not self.closed:
                receipts = next(iter(self._unsent.values()))
                seen = receipts.seen if receipts.over else -1
                self._connection.send(REPORT.pack(receipts.call, receipts.freed, seen))
                del self._unsent[receipts.call]
        except BlockingIOError:
            self._loop.call_later(_AGAIN_SECONDS, self._flush)
        except OSError:
            self.close()

    def _hear(self) -> None:
        """The server says nothing but its end."""
        with suppress(BlockingIOError):
            with suppress(ConnectionError):
                self._connection.recv(1)
            self.close()

    def close(self) -> None:
        """Give the lease up. Arrays that are still in use stay what they are."""
        if not self.closed:
            self.closed = True
            self._loop.remove_reader(self._connection)
            self._connection.close()


class Receipts:
    """A call's messages in shared memory, as far as they have come and gone."""

    def __init__(self, tenancy: Tenancy, call: int) -> None:
        self.call = call
        self.seen = 0
        self.freed = 0  # and all before it
        self.over = False
        self._tenancy = tenancy
        self._out_of_turn: set[int] = set()

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Headers for the call."""
        return (self._tenancy.header(self.call),)

    def claim(self, answer: T) -> T:
        """The answer; a parcel is given the memory that it refers to."""
        if not isinstance(answer, Parcel) or answer.memory is not None:
            return answer
        held = [one.shared_memory.length for one in tensors_of(answer.message) if one.HasField("shared_memory")]
        if held:
            self.seen += 1
            answer.memory = self._tenancy.window(self.call, self.seen, sum(held))
        return answer

    def let_go(self, number: int) -> None:
        """Nothing refers to the message any more."""
        self._out_of_turn.add(number)
        while self.freed + 1 in self._out_of_turn:
            self.freed += 1
            self._out_of_turn.remove(self.freed)

    def end(self) -> None:
        """The call is over; what has not come by now never will."""
        if not self.over:
            self.over = True
            self._tenancy.report(self)


class NoReceipts:
    """Those of a call without shared memory."""

    metadata: tuple[tuple[str, str], ...] = ()

    def claim(self, answer: T) -> T:
        """The answer; if it refers to shared memory all the same, reading it is an error."""
        return answer


async def _readable(connection: socket.socket) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)
