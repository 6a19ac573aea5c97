"""What a room of the house adds up to: a server, its models, and the way to run it as a process."""

import asyncio
import logging
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Generic, TypeVar

from imagemesh.v1 import model_loading_service_pb2_grpc, model_service_pb2, model_service_pb2_grpc
from imagemesh_runtime import logs, tracing
from imagemesh_runtime.config import ModelServerConfig, load
from imagemesh_runtime.findings import nothing_to_serve
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.loading import LoadingServicer
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels, ModelCard
from imagemesh_runtime.server import MeshServer, stop_signal

log = logging.getLogger(__name__)

# The exit code of a process whose device was still at something, slow or hanging, when it was to end.
EXIT_HANGS: Final = 70
# How long what the lane is at may take when all calls have ended, or were ended after the grace period.
_LAST_SECONDS: Final = 3.0

Config = TypeVar("Config", bound=ModelServerConfig)
Model = TypeVar("Model")


class ModelServer(MeshServer, Generic[Model]):
    """A server that runs models, with the ModelService that every one of them has."""

    def __init__(self, config: ModelServerConfig, metrics: Metrics, models: LoadedModels[Model]) -> None:
        super().__init__(config, metrics)
        self._models = models
        self._given = config.models
        self._preload = [name for name in config.preload.split(",") if name]
        self._beginnings: list[Callable[[], Awaitable[None]]] = []
        self._closers: list[Callable[[], Any]] = []
        self._lister = ModelServicer(metrics.service, models)
        self.add(model_service_pb2_grpc.add_ModelServiceServicer_to_server, self._lister, "imagemesh.v1.ModelService")

    def on_start(self, begin: Callable[[], Awaitable[None]]) -> None:
        """Await ``begin()`` before the service is ready."""
        self._beginnings.append(begin)

    def on_stop(self, close: Callable[[], Any]) -> None:
        """Await ``close()`` after the server has stopped."""
        self._closers.append(close)

    def on_describe(self, describe: Callable[[ModelCard], Mapping[str, str]]) -> None:
        """Add what ``describe`` answers to a model's properties whenever models are listed."""
        self._lister.describe = describe

    def allow_loading(self) -> None:
        """Let models be loaded and unloaded by name; for a service whose requests keep to the model they began with."""
        servicer = LoadingServicer(self._models, self._lister.infos)
        add = model_loading_service_pb2_grpc.add_ModelLoadingServiceServicer_to_server
        self.add(add, servicer, "imagemesh.v1.ModelLoadingService")

    async def start(self) -> None:
        """Bind, load what is to be preloaded, then say that the service is ready."""
        await super().start()
        for begin in self._beginnings:
            await begin()
        for name in self._preload:
            await self._models.get(name)
        if not self._preload:
            await asyncio.to_thread(self._warn_of_nothing)  # it reads the disk
        await self.set_ready()

    def _warn_of_nothing(self) -> None:
        """Models may still be put there; but whoever forgot them should not learn it from a failed request."""
        repository = self._models.backend.repository
        if repository is not None and not self._models.backend.cards():
            # Not every role has a model among those that come with imagemesh: nobody's mistake.
            level = logging.WARNING if self._given else logging.INFO
            log.log(level, "%s", nothing_to_serve(self._config.SERVICE, repository))

    async def stop(self) -> None:
        """Stop the server, then what it used."""
        try:
            await super().stop()
        finally:
            await asyncio.gather(*(close() for close in self._closers))


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """Lists a service's models."""

    def __init__(self, role: str, models: LoadedModels[Any]) -> None:
        self._role = role
        self._models = models
        # More properties of a model.
        self.describe: Callable[[ModelCard], Mapping[str, str]] = lambda card: {}

    async def ListServedModels(
        self, request: model_service_pb2.ListServedModelsRequest, context: Any
    ) -> model_service_pb2.ListServedModelsResponse:
        """Answer from the disk and from memory; nothing is loaded."""
        repository = self._models.backend.repository
        roots = map(str, repository.roots) if repository is not None else ()
        return model_service_pb2.ListServedModelsResponse(models=(await self.infos()).values(), roots=roots)

    async def infos(self) -> dict[str, model_service_pb2.ModelInfo]:
        """The models by name."""
        backend = self._models.backend
        cards = await asyncio.to_thread(backend.cards)  # it reads the disk
        return {
            card.name: model_service_pb2.ModelInfo(
                name=card.name,
                role=self._role,
                backend=(card.engine or backend).name,
                dtype=(card.engine or backend).dtype,
                device=(card.engine or backend).device,
                loaded=self._models.is_loaded(card.name),
                properties={**card.properties, **self.describe(card)},
            )
            for card in cards.values()
        }


def set_process_defaults(log_level: str = "INFO") -> None:
    """Settings of the whole process, made before any library that reads them is imported.

    Idle OpenMP threads would otherwise spin, and two processes on the same cores slow each other several-fold; and
    transformers would write advice and progress bars of its own into a server's log. A lane that asks for the
    interpreter's lock, as it does for each operation of a forward, would wait five milliseconds for an event loop that
    is busy: that is a forward of a small model.
    """
    sys.setswitchinterval(0.0005)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logs.configure(log_level, os.environ.get("IMAGEMESH_LOG_FORMAT", "text"))
    tracing.configure(os.environ)


def main(cls: type[Config], create: Callable[[Config, Lane], MeshServer], file: Path | None = None) -> None:
    """Run one service until the process is told to stop."""
    set_process_defaults(os.environ.get("IMAGEMESH_LOG_LEVEL", "INFO"))
    lane = Lane(cls.SERVICE)
    try:
        asyncio.run(serve(lambda: create(load(cls, file=file), lane)))
    finally:
        leave(lane)


def leave(lane: Lane, first: Callable[[], None] = lambda: None) -> None:
    """Close the lane of a process that ends; if it is still at work, end without it, and with ``EXIT_HANGS``.

    A thread can't be stopped, and Python would wait for it, for ever where the device hangs: that can't be told from
    slow work, such as the load of a model. An exception that ends the process is logged here, since Python would not
    come to it. ``first`` is called before such an end.
    """
    if lane.close(_LAST_SECONDS):
        return
    stack, since = lane.stack(), lane.busy_since
    at = f"{stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}" if stack else "a call that just ended"
    if (error := sys.exception()) is not None:
        log.error("the process ends by an error", exc_info=error)
    log.error(
        "lane %s is still at %s after %.0f s, slow or hanging; the process ends without it\n%s",
        lane.name, at, perf_counter() - since if since is not None else 0.0, "".join(traceback.format_list(stack)),
    )  # fmt: skip
    first()
    logging.shutdown()
    os._exit(EXIT_HANGS)


async def serve(create: Callable[[], MeshServer]) -> None:
    """Create the server (its channels belong to the running event loop), run it until SIGTERM or SIGINT, stop it."""
    stop = asyncio.create_task(stop_signal().wait())  # from the first moment: loading models takes its time
    server = create()
    start = asyncio.create_task(server.start())
    try:
        await asyncio.wait((start, stop), return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            await start
            await stop
    finally:
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        await server.stop()
