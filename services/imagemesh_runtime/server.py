"""The server of every service: limits, interceptors, health, reflection, metrics, drain and a graceful stop."""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from imagemesh.v1 import load_service_pb2_grpc, transport_service_pb2_grpc
from imagemesh_runtime.channels import channel_options
from imagemesh_runtime.config import ServerConfig
from imagemesh_runtime.health import HealthServicer
from imagemesh_runtime.http import HttpServer, admin_routes, metrics_routes
from imagemesh_runtime.interceptors import (
    Layer,
    LayeredInterceptor,
    context_layer,
    errors_layer,
    metrics_layer,
    shared_memory_layer,
    spans_layer,
)
from imagemesh_runtime.leases import Leases
from imagemesh_runtime.load import FULL_NAME as LOAD
from imagemesh_runtime.load import LoadServicer
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.tls import server_certificates, server_credentials

log = logging.getLogger(__name__)

# Health names for Kubernetes' gRPC probes. A draining service is alive, but not ready; one whose device hangs is
# neither.
LIVENESS = "liveness"
READINESS = "readiness"
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"


class MeshServer:
    """One gRPC server with its metrics port and its admin port.

    Lifecycle: ``add`` servicers, ``start``, ``set_ready``; later ``drain`` (asks for new work to go
    elsewhere) and ``stop``.

    Args:
        layers: more of what happens around every call, where its errors are told and its context is known.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics, layers: Sequence[Layer] = ()) -> None:
        self.name, self.metrics = metrics.service, metrics
        self.address = ""
        self._config = config
        self.certificates = server_certificates(config)
        self._names = [health.SERVICE_NAME, reflection.SERVICE_NAME, REFLECTION_V1]
        self._health = HealthServicer()
        self._ready = self._wants_work = False
        self._draining = self._hangs = False
        self._leases = Leases(config.listen, config.shared_memory_bytes)
        self._shares_memory = False
        around = [
            metrics_layer(metrics),
            context_layer(config.request_timeout_seconds),
            *([spans_layer(metrics.spans)] if metrics.spans is not None else []),
            errors_layer(self.name),
            *layers,
            shared_memory_layer(self._leases),
        ]
        self._server = grpc.aio.server(
            interceptors=(LayeredInterceptor(around, metrics, config.max_message_bytes),),
            options=channel_options(config.max_message_bytes),
            maximum_concurrent_rpcs=config.max_concurrent_calls,
        )
        routes = metrics_routes(metrics.registry, lambda: self._ready, lambda: not self._hangs)
        self.metrics_http = HttpServer(config.metrics_listen, routes)
        self.admin_http = HttpServer(config.admin_listen, admin_routes(self._drain_from_thread))
        self.add(
            load_service_pb2_grpc.add_LoadServiceServicer_to_server, LoadServicer(metrics, lambda: self._ready), LOAD
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_drain: list[Callable[[], Awaitable[None]]] = []

    def add(
        self, register: Callable[[Any, Any], None], servicer: object, full_name: str, *, parcels: bool = False
    ) -> None:
        """Serve ``servicer``; ``register`` is the generated ``add_..._to_server``.

        With ``parcels``, as the servicer answers them, clients on this machine are offered shared memory for them.
        """
        register(servicer, self._server)
        self._names.append(full_name)
        if parcels and not self._shares_memory:
            self._shares_memory = True
            transport_service_pb2_grpc.add_TransportServiceServicer_to_server(self._leases, self._server)
            self._names.append("imagemesh.v1.TransportService")

    @property
    def ready(self) -> bool:
        """Whether new work is welcome."""
        return self._ready

    def on_drain(self, hand_back: Callable[[], Awaitable[None]]) -> None:
        """Await ``hand_back()`` when the server drains: work that another replica can go on with leaves at once."""
        self._on_drain.append(hand_back)

    async def start(self) -> None:
        """Bind and accept calls; health says NOT_SERVING until ``set_ready``."""
        self._loop = asyncio.get_running_loop()
        if self._shares_memory:
            self._leases.start()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        _add_reflection(self._names, self._server)
        self.address = self._bind(self._config.listen)
        self._health.set(("", READINESS, *self._names), serving=False)
        self._health.set((LIVENESS,), serving=True)
        await self._server.start()
        self.metrics_http.start()
        self.admin_http.start()
        log.info("%s serves gRPC on %s, metrics on %s, admin on %s",
                 self.name, self.address, self.metrics_http.address, self.admin_http.address)  # fmt: skip

    def _bind(self, listen: str) -> str:
        """Listen there, by TLS if there are certificates; the answer is where that is."""
        if listen.startswith("unix:"):  # which nobody else hears
            self._server.add_insecure_port(listen)
            return listen
        if self.certificates is None:
            port = self._server.add_insecure_port(listen)
        else:
            port = self._server.add_secure_port(listen, server_credentials(self.certificates))
        return f"{listen.rpartition(':')[0]}:{port}"

    async def set_ready(self, ready: bool = True) -> None:
        """Say through health and ``/readyz`` whether new work is welcome; once drained, it never is again."""
        self._wants_work = ready
        self._tell_ready()

    async def set_hangs(self, hangs: bool) -> None:
        """Say that the device hangs, or goes on: until then nothing is ready, and only a restart may help."""
        self._hangs = hangs
        self._health.set((LIVENESS,), serving=not hangs)
        self._tell_ready()

    def _tell_ready(self) -> None:
        self._ready = self._wants_work and not self._draining and not self._hangs
        self._health.set(("", READINESS, *self._names), serving=self._ready)

    async def drain(self) -> None:
        """Say through health and ``/readyz`` that new work should go elsewhere; load balancers then stop sending.

        Calls that still come are served until ``stop``, so that nobody fails who has not yet heard of it.
        """
        log.info("%s drains", self.name)
        self._draining = True
        await self.set_ready(False)
        await asyncio.gather(*(hand_back() for hand_back in self._on_drain))

    async def stop(self) -> None:
        """Drain, let calls under way end within the grace period, then close."""
        await self.drain()
        self._health.close()
        await self._server.stop(self._config.drain_grace_seconds)
        self._leases.close()
        await asyncio.gather(asyncio.to_thread(self.metrics_http.stop), asyncio.to_thread(self.admin_http.stop))

    def _drain_from_thread(self) -> None:
        if self._loop is None:
            raise RuntimeError("the server has not started")
        draining = asyncio.run_coroutine_threadsafe(self._drain_and_settle(), self._loop)
        draining.result(timeout=10 + self._config.drain_settle_seconds)

    async def _drain_and_settle(self) -> None:
        await self.drain()
        await asyncio.sleep(self._config.drain_settle_seconds)


def _add_reflection(names: list[str], server: Any) -> None:
    """Register v1alpha, and the same servicer again as v1, which newer clients ask for; the messages agree."""
    servicer = reflection.aio.ReflectionServicer(names)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": handler}),)
    )


def stop_signal() -> asyncio.Event:
    """An event that is set when the process is asked to stop (SIGTERM, SIGINT)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    return stop


async def wait_for_signal() -> None:
    """Return when the process is asked to stop."""
    await stop_signal().wait()
