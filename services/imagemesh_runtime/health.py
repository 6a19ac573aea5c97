"""gRPC's health service (``grpc.health.v1``), without two faults of grpcio-health-checking's asyncio servicer.

There, a watcher that leaves deafens the other watchers of its name, and one that does not read holds up whoever sets a
status. Here a watcher waits on its own, and ends when the server does.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from imagemesh_runtime.errors import NotFound, Unavailable


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Tells which services take work; ``""`` stands for the whole server."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def set(self, names: Iterable[str], serving: bool) -> None:
        """Note the status of ``names`` and tell whoever watches them."""
        self._serving.update(dict.fromkeys(names, serving))
        self._wake()

    def close(self) -> None:
        """End the watches; they would hold up a graceful stop."""
        self._closed = True
        self._wake()

    async def Check(self, request: Any, context: Any) -> Any:
        if request.service not in self._serving:
            raise NotFound("service", request.service, [name for name in self._serving if name])
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        told = None
        while not self._closed:
            changed = self._changed
            status = self._status(request.service)
            if status != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            await changed.wait()
        if told != self._status(request.service):
            yield health_pb2.HealthCheckResponse(status=self._status(request.service))
        raise Unavailable("health", "the server is stopping")

    def _status(self, name: str) -> int:
        kinds = health_pb2.HealthCheckResponse
        serving = self._serving.get(name)
        status: int = kinds.SERVICE_UNKNOWN if serving is None else kinds.SERVING if serving else kinds.NOT_SERVING
        return status

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
