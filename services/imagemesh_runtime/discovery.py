"""Who the replicas of a service are, and what they have to do: looked up again and again while the process runs.

An address such as ``dns:///vae-replicas:50053`` stands for a replica at every address that the name has, as a headless
Service of Kubernetes does; any other one stands for one replica.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import grpc

from imagemesh.v1 import load_service_pb2 as pb
from imagemesh.v1 import load_service_pb2_grpc as rpc
from imagemesh_runtime.addresses import WANTED, is_address
from imagemesh_runtime.client import Peer
from imagemesh_runtime.errors import InvalidArgument, MeshError
from imagemesh_runtime.replicas import Replicas

log = logging.getLogger(__name__)

DNS: Final = "dns:///"
_LOAD_SECONDS: Final = 1.0  # between two questions, and at most for an answer
_RESOLVING_SECONDS: Final = 5.0

# A peer at an address, and the name that its certificate is for; "": the address is.
Connect = Callable[[str, str], Peer]
# The addresses of a host's name.
Resolve = Callable[[str], Awaitable[Sequence[str]]]


class Resolver:
    """Asks the machine's, one name at a time, on a thread of its own.

    Nothing stops a look-up that hangs: on the event loop's threads one after another would take them all, and what else
    is done there would stand still.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="resolver")

    async def __call__(self, host: str) -> Sequence[str]:
        """The host's addresses, after what was asked before; raises ``OSError`` where none is known."""
        look_up = partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._thread, look_up)
        return [str(address[0]) for *_, address in found]

    def close(self) -> None:
        """Look nothing up any more; what is under way ends by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class Discovery:
    """Keeps ``replicas`` what the addresses say, from ``start`` to ``close``.

    Args:
        name: of the service.
        addresses: one, or several joined by commas.
        connect: makes a peer.
        resolve_seconds: between two looks at the names.
        rest_seconds, keeping, note_rest: as ``Replicas`` has them.
        resolve: other than by the machine's resolver.

    Raises:
        InvalidArgument: there is no address, or one that is none.
    """

    def __init__(
        self,
        name: str,
        addresses: str,
        connect: Connect,
        *,
        rest_seconds: float = 5.0,
        resolve_seconds: float = 2.0,
        keeping: Collection[str] = (),
        note_rest: Callable[[], object] = lambda: None,
        resolve: Resolve | None = None,
    ) -> None:
        given = [address.strip() for address in addresses.split(",") if address.strip()]
        if not given:
            raise InvalidArgument(name, addresses, "an address, or several joined by commas")
        self._names = [_host_and_port(name, address) for address in given if address.startswith(DNS)]
        self._resolver = Resolver()
        self._connect, self._resolve, self._every = connect, resolve or self._resolver, resolve_seconds
        fixed = [connect(address, "") for address in given if not address.startswith(DNS)]
        self.replicas = Replicas(fixed, rest_seconds, name=name, keeping=keeping, note_rest=note_rest)
        self._found: dict[str, Peer] = {}
        self._failing = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Look the names up, and go on doing so."""
        if self._names:
            await self._look_up()
            self._tasks.append(asyncio.create_task(self._repeat(self._look_up, self._every)))
        if self._names or len(self.replicas.peers) > 1:
            self._tasks.append(asyncio.create_task(self._repeat(self._ask_loads, _LOAD_SECONDS)))

    async def close(self) -> None:
        """Look no more, and close the channels."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._resolver.close()
        await self.replicas.close()

    async def _repeat(self, work: Callable[[], Awaitable[None]], seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except Exception:
                log.exception("looking for replicas of %s failed; trying again", self.replicas.name)

    async def _look_up(self) -> None:
        """Where a name can't be resolved now, whoever is known stays: they are asked whether they are ready besides."""
        wanted: dict[str, str] = {}
        for host, port in self._names:
            try:
                async with asyncio.timeout(_RESOLVING_SECONDS):
                    found = await self._resolve(host)
            except OSError as error:  # a TimeoutError is one
                if not self._failing:
                    log.warning("%s: %s can't be resolved: %s", self.replicas.name, host, error or "no answer")
                self._failing = True
                return
            wanted |= {f"[{one}]:{port}" if ":" in one else f"{one}:{port}": host for one in sorted(set(found))}
        self._failing = False
        for address in [one for one in self._found if one not in wanted]:
            log.info("%s: the replica at %s has gone", self.replicas.name, address)
            self.replicas.part(self._found.pop(address))
        for address, host in wanted.items():
            if address not in self._found:
                log.info("%s: a replica at %s has come", self.replicas.name, address)
                self._found[address] = self._connect(address, host)
                self.replicas.join(self._found[address])

    async def _ask_loads(self) -> None:
        """Where there is a choice."""
        if len(self.replicas.peers) > 1:
            await asyncio.gather(*map(self._ask_load, self.replicas.peers))

    async def _ask_load(self, peer: Peer) -> None:
        told: pb.ReportLoadResponse | None = None
        try:
            stub = rpc.LoadServiceStub(peer.channel)
            told = await peer.unary(stub.ReportLoad, pb.ReportLoadRequest(), timeout_seconds=_LOAD_SECONDS)
        except MeshError as error:
            if error.code is grpc.StatusCode.UNIMPLEMENTED:
                return  # an earlier version of it: the calls from here have to do
        self.replicas.note_load(peer, told)


def _host_and_port(name: str, address: str) -> tuple[str, str]:
    rest = address.removeprefix(DNS)
    if not is_address(rest) or rest.startswith(("unix", "dns:", "ipv4:", "ipv6:")):
        raise InvalidArgument(f"address of {name}", address, f"{WANTED}, or dns:///host:port")
    host, _, port = rest.rpartition(":")
    return host.strip("[]"), port
