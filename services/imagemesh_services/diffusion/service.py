"""Puts the room together: config -> backend -> queue -> server."""

from imagemesh.v1 import diffusion_service_pb2_grpc as rpc
from imagemesh_runtime.client import Peer
from imagemesh_runtime.discovery import Discovery
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.service import ModelServer
from imagemesh_runtime.tls import peer_files
from imagemesh_services.automatic import open_backend
from imagemesh_services.diffusion.backend import BACKENDS, DiffusionModel
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.controlnets import ControlNets
from imagemesh_services.diffusion.servicer import DiffusionServicer


def create(config: DiffusionConfig, lane: Lane) -> ModelServer[DiffusionModel]:
    """The service, not yet started."""
    metrics = Metrics(config.SERVICE)
    models: LoadedModels[DiffusionModel] = LoadedModels(open_backend(BACKENDS, config), lane, metrics)
    server = ModelServer(config, metrics, models)
    controlnets = None
    if config.controlnet:
        files = peer_files(config)

        def connect(address: str, known_as: str) -> Peer:
            return Peer(
                "controlnet", address, max_message_bytes=config.max_message_bytes, metrics=metrics,
                shares_memory=config.shared_memory_bytes > 0, tls=files, known_as=known_as,
            )  # fmt: skip

        passed_over = metrics.passed_over.labels(metrics.service, "controlnet")
        found = Discovery("controlnet", config.controlnet, connect, note_rest=passed_over.inc)
        controlnets = ControlNets(found.replicas)
        server.on_start(found.start)
        server.on_stop(found.close)
    servicer = DiffusionServicer(config, models, controlnets, metrics)
    server.on_describe(servicer.describe)
    servicer.engine.watchdog.on_change.append(server.set_hangs)
    server.on_drain(servicer.engine.hand_back)
    server.on_stop(servicer.engine.close)
    server.add(rpc.add_DiffusionServiceServicer_to_server, servicer, "imagemesh.v1.DiffusionService")
    return server
