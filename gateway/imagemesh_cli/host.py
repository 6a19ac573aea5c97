"""The whole mesh in one process: all services and the gateway in one event loop, with real gRPC between them."""

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from types import TracebackType
from typing import Any, Self

from imagemesh_cli.rooms import GATEWAY, SERVICES, configure
from imagemesh_gateway.access.door import require_keys
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.jobs.service import folder_of
from imagemesh_runtime.config import ModelServerConfig
from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.server import MeshServer

# The path of a Unix socket has at most 107 bytes, and ours ends in /imagemesh-12345678/text-encoder.sock.
LONGEST_PARENT = 70


class MeshHost:
    """Hosts the given services and a gateway in front of them, from ``async with`` to its end.

    They share one compute lane, so that they take turns on the cores. The services listen on Unix sockets in a folder
    that only this user can enter: a loopback port could be called by every user of the machine, past the gateway.
    A service that isn't given is looked for where the gateway's configuration says.
    """

    def __init__(self, services: Iterable[ModelServerConfig], gateway: GatewayConfig) -> None:
        self._configs = {config.SERVICE: config for config in services}
        self._gateway_config = gateway
        self._stack = AsyncExitStack()
        self._folder: TemporaryDirectory[str] | None = None
        # Called last. Waits for the work under way; a process that is to end need not wait for ever.
        self.close_lane: Callable[[Lane], object] = Lane.close
        self.services: dict[str, MeshServer] = {}
        self.gateway: MeshServer
        # As bound: ``host:port``.
        self.grpc_address = ""
        self.http_address = ""
        self.http_scheme = "http"

    @classmethod
    def configured(
        cls, settings: Mapping[str, str], gateway: Mapping[str, str], file: Path | None = None
    ) -> "MeshHost":
        """All five services and the gateway, configured by ``settings`` and ``gateway``, the environment and a file."""
        services = [configure(room.config(), settings, file) for room in SERVICES.values()]
        return cls(services, configure(GatewayConfig, gateway, file))

    async def __aenter__(self) -> Self:
        require_keys(self._gateway_config)
        require_free("gateway", self._gateway_config.listen, self._gateway_config.http_listen)
        async with AsyncExitStack() as stack:
            parent = gettempdir() if len(gettempdir()) <= LONGEST_PARENT else "/tmp"  # noqa: S108
            self._folder = TemporaryDirectory(prefix="imagemesh-", dir=parent, ignore_cleanup_errors=True)
            folder = stack.enter_context(self._folder)
            lane = Lane("mesh")
            stack.callback(self.close_lane, lane)
            addresses = {name: f"unix:{os.path.join(folder, name)}.sock" for name in self._configs}
            for name in (name for name in SERVICES if name in self._configs):
                config = _wired(self._configs[name], addresses, listen=addresses[name])
                self.services[name] = SERVICES[name].create(config, lane)
                await _start(self.services[name], stack)
            await self._start_gateway(_keeping_jobs(_wired(self._gateway_config, addresses), folder), stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def abandon(self) -> None:
        """Leave nothing on the disk; for a process that ends without waiting for calls under way."""
        if self._folder is not None:
            self._folder.cleanup()

    async def _start_gateway(self, config: GatewayConfig, stack: AsyncExitStack) -> None:
        gateway = GATEWAY.create(config)
        await _start(gateway, stack)
        self.gateway, self.grpc_address, self.http_address = gateway, gateway.address, gateway.http_address
        self.http_scheme = gateway.http_scheme


def _wired(config: Any, addresses: Mapping[str, str], **changes: str) -> Any:
    """The configuration with the addresses of the services that it has fields for."""
    known = {name.replace("-", "_"): address for name, address in addresses.items()}
    return replace(config, **{name: at for name, at in known.items() if hasattr(config, name)}, **changes)


def _keeping_jobs(config: GatewayConfig, folder: str) -> GatewayConfig:
    """Jobs that last no longer than the gateway are kept in this folder, which goes with it however it ends."""
    return config if folder_of(config) is not None else replace(config, jobs_folder=os.path.join(folder, "jobs"))


async def _start(server: MeshServer, stack: AsyncExitStack) -> None:
    stack.push_async_callback(server.stop)  # also after a start that failed: its channels are open
    await server.start()


def require_free(name: str, *addresses: str) -> None:
    """Try whether a server can listen on all of these ``host:port``; a Unix socket always can.

    gRPC keeps the reason to itself, and uvicorn ends the process: so they are asked only after this.

    Raises:
        FailedPrecondition: an address is taken, or isn't ours to bind.
    """
    for address in addresses:
        if address.startswith("unix:"):
            continue
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
        except (OSError, ValueError, OverflowError) as error:
            reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]
            raise FailedPrecondition(f"{name} cannot listen on {address}: {reason}") from error
