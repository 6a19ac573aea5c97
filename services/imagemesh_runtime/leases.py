"""The server's side of shared memory: one arena a client, written here, read there.

A client asks for a lease over gRPC, comes to a Unix socket in a folder that only this user can enter, says its token,
and is passed the arena's descriptor. Its calls name the lease; answers that are parcels then leave their payloads in
the arena. Through the socket the client reports, call by call, how many of the call's messages it has let go of, and
when the call is over, how many it has seen: only then is a range written again. When the socket closes, the lease ends.
"""

import asyncio
import logging
import os
import secrets
import shutil
import socket
import struct
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from imagemesh.v1 import transport_service_pb2 as pb
from imagemesh.v1 import transport_service_pb2_grpc as rpc
from imagemesh_runtime.arena import AVAILABLE, PAGE, Arena, padded
from imagemesh_runtime.errors import FailedPrecondition, Overloaded
from imagemesh_runtime.parcels import Parcel, Shelved, tensors_of

log = logging.getLogger(__name__)

HEADER: Final = "imagemesh-lease"  # the token in hexadecimal, "-", the number of the call
TOKEN_BYTES: Final = 16
# A call's number; how many of its messages were let go of; how many were seen, or -1 while it goes on.
REPORT: Final = struct.Struct("<QQq")
_MAX_LEASES: Final = 32
_ADMISSION_SECONDS: Final = 5.0  # from the offer to the token
_PATIENCE_SECONDS: Final = 0.25  # for room; after that the message goes the other way, which takes about as long
# The path of a Unix socket has at most 107 bytes, and ours ends in /imagemesh-shm-12345678/0123456789abcdef.
_LONGEST_PARENT: Final = 67
_PREFIX: Final = "imagemesh-shm-"
_CREDENTIALS: Final = struct.Struct("iII")  # pid, uid, gid


def peer_is_us(connection: socket.socket) -> bool:
    """Whether a Unix socket's other end is a process of this user."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(told)[1]
    return uid == os.geteuid()


@dataclass(eq=False)
class Shelf:
    """One call's messages in an arena."""

    sent: int = 0
    ranges: dict[int, int] = field(default_factory=dict)  # where each message that is still held begins
    ended: bool = False  # the client hears no more of this call
    left: bool = False  # and the server says no more


class Broken(Exception):
    """The client reports what can't be."""


class Lease:
    """One client's arena."""

    def __init__(self, size: int) -> None:
        self.arena = Arena(size)
        self.closed = False
        self._shelves: dict[int, Shelf] = {}
        self._early: deque[int] = deque(maxlen=1024)  # calls that were over before they were here
        self._room = asyncio.Event()

    def enter(self, call: int) -> Shelf:
        """The call's shelf, from its begin to ``leave``."""
        shelf = self._shelves.setdefault(call, Shelf())
        shelf.ended = shelf.ended or call in self._early
        return shelf

    def leave(self, call: int) -> None:
        """The call is over here."""
        shelf = self._shelves.get(call)
        if shelf is not None:
            shelf.left = True
            self._forget(call, shelf)

    async def place(self, shelf: Shelf, parcel: Parcel[Any]) -> bool:
        """Leave the parcel's payloads in the arena and refer to them; False: it has to go another way."""
        size = sum(padded(payload.nbytes) for payload in parcel.payloads)
        start = await self._find_room(shelf, size) if size else None
        if start is None:
            return False
        shelf.sent += 1
        shelf.ranges[shelf.sent] = at = start
        for tensor in tensors_of(parcel.message):
            if tensor.WhichOneof("payload") == "shared_memory":
                payload = parcel.payloads[tensor.shared_memory.offset]
                self.arena.write(at, payload)
                where = tensor.shared_memory
                where.offset, where.length, where.generation = at, payload.nbytes, shelf.sent
                at += padded(payload.nbytes)
        parcel.memory, parcel.payloads = Shelved(parcel.payload_bytes), []
        return True

    async def _find_room(self, shelf: Shelf, size: int) -> int | None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                while size <= self.arena.size and not (self.closed or shelf.ended):
                    start = self.arena.take(size)
                    if start is not None:
                        return start
                    self._room.clear()
                    await self._room.wait()
        return None

    def report(self, call: int, freed: int, seen: int) -> None:
        """What the client says of a call.

        Raises:
            Broken: it speaks of messages that were not sent.
        """
        shelf = self._shelves.get(call)
        if shelf is None:
            if seen >= 0:
                self._early.append(call)
            return
        if freed > shelf.sent or seen > shelf.sent:
            raise Broken(f"call {call} has {shelf.sent} messages, not {max(freed, seen)}")
        shelf.ended = shelf.ended or seen >= 0
        for number in [one for one in shelf.ranges if one <= freed or 0 <= seen < one]:
            self.arena.give_back(shelf.ranges.pop(number))
        self._forget(call, shelf)
        self._room.set()

    def _forget(self, call: int, shelf: Shelf) -> None:
        if shelf.left and not shelf.ranges:
            del self._shelves[call]

    def close(self) -> None:
        """The client is gone, or as good as."""
        if not self.closed:
            self.closed = True
            self._room.set()
            self.arena.close()


class Leases(rpc.TransportServiceServicer):
    """All leases of a server; offered only if it was started."""

    def __init__(self, listen: str, size: int) -> None:
        self._near = Path(listen.removeprefix("unix:")).absolute().parent if listen.startswith("unix:") else None
        self._size = size
        self._folder: Path | None = None
        self._socket: socket.socket | None = None
        self._offers: dict[bytes, asyncio.TimerHandle] = {}
        self._visitors: set[_Visitor] = set()
        self._leases: dict[bytes, Lease] = {}

    def start(self) -> None:
        """Open the side door, if this machine has what it takes."""
        if not AVAILABLE or self._size <= 0:
            return
        parent = self._near or Path(tempfile.gettempdir())
        if len(os.fsencode(parent)) > _LONGEST_PARENT:
            log.warning("no shared memory: %s is too long for the path of a socket in it", parent)
            return
        _sweep(parent)
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))  # mode 0700
        path = self._folder / secrets.token_hex(8)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))
        path.chmod(0o600)
        self._socket.listen()
        asyncio.get_running_loop().add_reader(self._socket, self._welcome)

    async def OpenLease(self, request: pb.OpenLeaseRequest, context: Any) -> pb.OpenLeaseResponse:
        if self._socket is None:
            raise FailedPrecondition("this server shares no memory")
        if len(self._offers) + len(self._visitors) >= _MAX_LEASES:
            raise Overloaded("leases", _MAX_LEASES, _ADMISSION_SECONDS)
        token = secrets.token_bytes(TOKEN_BYTES)
        expiry = asyncio.get_running_loop().call_later(_ADMISSION_SECONDS, self._offers.pop, token, None)
        self._offers[token] = expiry
        return pb.OpenLeaseResponse(socket=self._socket.getsockname(), token=token, size=padded(self._size, PAGE))

    def enter(self, header: str | None) -> "tuple[Lease, Shelf, Callable[[], None]] | None":
        """The lease that a call's header names, the call's shelf, and what to call at its end; None: it has none."""
        token, _, number = (header or "").partition("-")
        try:
            lease, call = self._leases.get(bytes.fromhex(token)), int(number)
        except ValueError:
            return None
        if lease is None or lease.closed or not 0 <= call < 1 << 64:
            return None
        return lease, lease.enter(call), lambda: lease.leave(call)

    def admit(self, token: bytes) -> Lease | None:
        """A new lease for whoever was offered it; an offer holds once."""
        offer = self._offers.pop(token, None)
        if offer is None:
            return None
        offer.cancel()
        lease = self._leases[token] = Lease(self._size)
        return lease

    def part(self, visitor: "_Visitor") -> None:
        """A visitor has gone, and its lease with it."""
        self._visitors.discard(visitor)
        if visitor.token is not None:
            self._leases.pop(visitor.token).close()

    def close(self) -> None:
        """End all leases and leave nothing on the disk."""
        for visitor in list(self._visitors):
            visitor.leave()
        for offer in self._offers.values():
            offer.cancel()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _welcome(self) -> None:
        assert self._socket is not None
        with suppress(OSError):
            connection, _ = self._socket.accept()
            connection.setblocking(False)
            if len(self._visitors) < _MAX_LEASES and peer_is_us(connection):
                self._visitors.add(_Visitor(connection, self))
            else:
                connection.close()


class _Visitor:
    """Who came to the side door: first says its token, then reports."""

    def __init__(self, connection: socket.socket, leases: Leases) -> None:
        self._connection = connection
        self._leases = leases
        self._loop = asyncio.get_running_loop()
        self.token: bytes | None = None
        self._lease: Lease | None = None
        self._limit = self._loop.call_later(_ADMISSION_SECONDS, self.leave)
        self._loop.add_reader(connection, self._hear)

    def _hear(self) -> None:
        try:
            while said := self._connection.recv(REPORT.size + 1):
                self._take(said)
        except BlockingIOError:
            return
        except (OSError, struct.error, Broken) as error:
            log.warning("a lease of shared memory ends: %s", error)
        self.leave()

    def _take(self, said: bytes) -> None:
        if self._lease is not None:
            self._lease.report(*REPORT.unpack(said))
            return
        lease = self._leases.admit(said)
        if lease is None:
            raise Broken("the token was not offered")
        self._lease, self.token = lease, said
        self._limit.cancel()
        try:
            socket.send_fds(self._connection, [b"\0"], [lease.arena.descriptor])
        finally:
            os.close(lease.arena.descriptor)

    def leave(self) -> None:
        """Hang up."""
        self._limit.cancel()
        if self._connection.fileno() >= 0:
            self._loop.remove_reader(self._connection)
            self._connection.close()
            self._leases.part(self)


def _sweep(parent: Path) -> None:
    """Remove the folders of servers that were killed: nobody listens at their sockets."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            if folder.stat().st_uid != os.geteuid():
                continue
            for path in folder.iterdir():
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()
            folder.rmdir()
