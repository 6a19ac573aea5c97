"""Puts the room together: config -> backend -> batcher -> server."""

from imagemesh.v1 import vae_service_pb2_grpc as rpc
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.oip import FULL_NAME, InferenceServicer, add_inference
from imagemesh_runtime.oip_stages import local_name, vae_models
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.service import ModelServer
from imagemesh_services.automatic import open_backend
from imagemesh_services.vae.backend import BACKENDS, VaeModel
from imagemesh_services.vae.config import VaeConfig
from imagemesh_services.vae.servicer import VaeServicer


def create(config: VaeConfig, lane: Lane) -> ModelServer[VaeModel]:
    """The service, not yet started."""
    metrics = Metrics(config.SERVICE)
    models: LoadedModels[VaeModel] = LoadedModels(open_backend(BACKENDS, config), lane, metrics)
    servicer = VaeServicer(config, models, metrics)
    server = ModelServer(config, metrics, models)
    server.add(rpc.add_VaeServiceServicer_to_server, servicer, "imagemesh.v1.VaeService", parcels=True)
    faces = vae_models(local_name(models.backend.cards), servicer.decode, servicer.encode)
    seconds = config.request_timeout_seconds
    server.add(add_inference, InferenceServicer(config.SERVICE, faces, lambda: server.ready, seconds), FULL_NAME)
    server.on_stop(servicer.batcher.close)
    return server
