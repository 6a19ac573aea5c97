"""Puts the gateway together: config -> channels -> gRPC and HTTP servers."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from imagemesh.v1 import gateway_service_pb2_grpc as rpc
from imagemesh.v1 import (
    job_service_pb2_grpc,
    model_loading_service_pb2_grpc,
    preprocess_service_pb2_grpc,
    search_service_pb2_grpc,
)
from imagemesh_gateway.access.caller import current_caller
from imagemesh_gateway.access.door import Door
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.direct import Direct
from imagemesh_gateway.http import create_app
from imagemesh_gateway.http_guard import WS_MESSAGE_BYTES, Guard, HttpLimits
from imagemesh_gateway.jobs.service import Jobs
from imagemesh_gateway.jobs.servicer import JobServicer
from imagemesh_gateway.loading import LoadingForwarder
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.oip import oip_models
from imagemesh_gateway.preprocess import PreprocessServicer
from imagemesh_gateway.search import SearchForwarder
from imagemesh_gateway.servicer import GatewayServicer
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.oip import FULL_NAME, InferenceServicer, add_inference
from imagemesh_runtime.server import MeshServer
from imagemesh_runtime.tls import Certificates, server_context

log = logging.getLogger(__name__)


class GatewayServer(MeshServer):
    """The gRPC server with the HTTP face beside it, in one event loop."""

    def __init__(self, config: GatewayConfig, mesh: Mesh, metrics: Metrics, door: Door) -> None:
        super().__init__(config, metrics, layers=[door.layer()])
        self._mesh = mesh
        self._door = door
        self._jobs = Jobs(config, mesh, metrics)
        self._add_services(config, mesh, metrics)
        app = create_app(mesh, self._jobs, metrics, lambda: self._ready)
        self._http = _http_server(config, Guard(app, metrics, HttpLimits.of(config), door), self.certificates)
        self._http_task: asyncio.Task[None] | None = None

    def _add_services(self, config: GatewayConfig, mesh: Mesh, metrics: Metrics) -> None:
        direct, count = Direct(mesh, self._jobs.admission, metrics), self._door.count_message
        self.add(
            rpc.add_GatewayServiceServicer_to_server,
            GatewayServicer(mesh, metrics, direct, count),
            "imagemesh.v1.GatewayService",
        )
        self.add(
            preprocess_service_pb2_grpc.add_PreprocessServiceServicer_to_server,
            PreprocessServicer(mesh.preprocessors, metrics),
            "imagemesh.v1.PreprocessService",
        )
        self.add(
            search_service_pb2_grpc.add_SearchServiceServicer_to_server,
            SearchForwarder(mesh, metrics),
            "imagemesh.v1.SearchService",
        )
        self.add(
            model_loading_service_pb2_grpc.add_ModelLoadingServiceServicer_to_server,
            LoadingForwarder(mesh),
            "imagemesh.v1.ModelLoadingService",
        )
        self.add(
            job_service_pb2_grpc.add_JobServiceServicer_to_server, JobServicer(self._jobs), "imagemesh.v1.JobService"
        )
        inference = InferenceServicer(
            "imagemesh",
            oip_models(mesh, direct),
            lambda: self.ready,
            config.request_timeout_seconds,
            count_message=count,
            tenant=lambda: current_caller().tenant,
        )
        self.add(add_inference, inference, FULL_NAME)

    @property
    def http_address(self) -> str:
        """``host:port`` of the HTTP face, as bound."""
        host, port = self._http.servers[0].sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def http_scheme(self) -> str:
        """How that face is called: "http" or "https"."""
        return "http" if self.certificates is None else "https"

    async def start(self) -> None:
        """Bind both faces; ready when both listen."""
        self._door.start()
        await self._mesh.start()
        await self._jobs.start()
        await super().start()
        self._http_task = asyncio.create_task(self._http.serve())
        await self._http.wait_started(self._http_task)
        await self.set_ready()

    async def stop(self) -> None:
        """Turn new callers away, let calls under way end, close the channels."""
        self._http.should_exit = True
        try:
            await asyncio.gather(super().stop(), self._jobs.drain(self._config.drain_grace_seconds))
        finally:
            try:
                if self._http_task is not None:
                    await self._http_task
            finally:
                try:
                    await self._jobs.stop()
                finally:
                    await self._door.stop()
                    await self._mesh.close()


def _http_server(config: GatewayConfig, app: Guard, certificates: Certificates | None) -> "_EmbeddedUvicorn":
    host, _, port = config.http_listen.rpartition(":")
    host = host.strip("[]")  # an IPv6 address; uvicorn wants it bare
    return _EmbeddedUvicorn(
        uvicorn.Config(
            app, host=host, port=int(port), lifespan="off", log_config=None, ws_max_size=WS_MESSAGE_BYTES,
            ssl_context_factory=None if certificates is None else lambda *_: server_context(certificates),
            access_log=False, timeout_graceful_shutdown=int(config.drain_grace_seconds),
            # Below INFO it writes down the headers of WebSockets, with their keys.
            log_level=logging.INFO if log.isEnabledFor(logging.DEBUG) else None,
        )
    )  # fmt: skip


class _EmbeddedUvicorn(uvicorn.Server):
    """uvicorn inside our event loop: signals are ours, and so is the word that it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._listening = asyncio.Event()

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        try:
            await super().startup(sockets)  # type: ignore[arg-type]
        except SystemExit as error:  # uvicorn's way to say that the address can't be bound
            raise OSError(f"cannot listen on {self.config.host}:{self.config.port}") from error
        self._listening.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def wait_started(self, serving: asyncio.Task[None]) -> None:
        """Return when the server listens; raise if it failed instead."""
        listening = asyncio.create_task(self._listening.wait())
        await asyncio.wait((listening, serving), return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if serving.done():
            await serving
            raise RuntimeError("the HTTP server ended before it listened")


def create(config: GatewayConfig) -> GatewayServer:
    """The gateway, not yet started; call it inside the event loop that will run it."""
    metrics = Metrics(config.SERVICE)
    door = Door(config, metrics)  # before channels are opened, since it may refuse
    return GatewayServer(config, Mesh(config, metrics), metrics, door)
