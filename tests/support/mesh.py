"""The mesh on a thread of its own, so that plain tests can talk to it over real channels."""

import asyncio
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from imagemesh_cli.host import MeshHost
from imagemesh_cli.rooms import SERVICES, configure
from imagemesh_gateway.config import GatewayConfig

FREE_PORTS = {"listen": "127.0.0.1:0", "http_listen": "127.0.0.1:0"}


@contextmanager
def running_mesh(
    gateway: dict[str, str] | None = None,
    without: Collection[str] = (),
    each: Mapping[str, Mapping[str, str]] | None = None,
    **settings: str,
) -> Iterator[MeshHost]:
    """A ready mesh of all services but ``without``.

    ``settings`` are fields of every service's configuration, ``each`` those of some by the services' names.
    """
    shared = {"metrics_listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0"}
    rooms = {name: room for name, room in SERVICES.items() if name not in without}
    own = each or {}
    services = [configure(room.config(), {**shared, **settings, **own.get(name, {})}) for name, room in rooms.items()]
    host = MeshHost(services, configure(GatewayConfig, {**shared, **FREE_PORTS, **(gateway or {})}))
    with event_loop() as loop:
        loop.run(host.__aenter__())
        try:
            yield host
        finally:
            loop.run(host.__aexit__(None, None, None))


class LoopThread:
    """An event loop that runs on a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def run(self, work: Any) -> Any:
        """The coroutine's result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=120)


@contextmanager
def event_loop() -> Iterator[LoopThread]:
    """A running ``LoopThread``, stopped at the end."""
    runner = LoopThread()
    runner.thread.start()
    try:
        yield runner
    finally:
        runner.loop.call_soon_threadsafe(runner.loop.stop)
        runner.thread.join()
        runner.loop.close()
