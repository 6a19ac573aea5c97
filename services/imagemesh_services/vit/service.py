"""Puts the room together: config -> backend -> batcher -> server."""

from imagemesh.v1 import vit_service_pb2_grpc as rpc
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels, choose_backend
from imagemesh_runtime.service import ModelServer
from imagemesh_services.vit.backend import BACKENDS, VitModel
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.servicer import VitServicer


def create(config: VitConfig, lane: Lane) -> ModelServer[VitModel]:
    """The service, not yet started."""
    metrics = Metrics(config.SERVICE)
    models: LoadedModels[VitModel] = LoadedModels(choose_backend(BACKENDS, config.backend)(config), lane, metrics)
    servicer = VitServicer(config, models, metrics)
    server = ModelServer(config, metrics, models)
    server.add(rpc.add_VitServiceServicer_to_server, servicer, "imagemesh.v1.VitService")
    server.on_stop(servicer.close)
    return server
