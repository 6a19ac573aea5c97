"""Puts the room together: config -> backend -> batcher -> server."""

from imagemesh.v1 import text_encoder_service_pb2_grpc as rpc
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.oip import FULL_NAME, InferenceServicer, add_inference
from imagemesh_runtime.oip_stages import local_name, text_models
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.service import ModelServer
from imagemesh_services.automatic import open_backend
from imagemesh_services.text_encoder.backend import BACKENDS, PromptModel, TextModel
from imagemesh_services.text_encoder.config import TextEncoderConfig
from imagemesh_services.text_encoder.servicer import TextEncoderServicer


def create(config: TextEncoderConfig, lane: Lane) -> ModelServer[TextModel | PromptModel]:
    """The service, not yet started."""
    metrics = Metrics(config.SERVICE)
    backend = open_backend(BACKENDS, config)
    models: LoadedModels[TextModel | PromptModel] = LoadedModels(backend, lane, metrics)
    servicer = TextEncoderServicer(config, models, metrics)
    server = ModelServer(config, metrics, models)
    server.add(rpc.add_TextEncoderServiceServicer_to_server, servicer, "imagemesh.v1.TextEncoderService")
    faces = text_models(local_name(backend.cards), lambda request: servicer.EncodeText(request, None))
    seconds = config.request_timeout_seconds
    server.add(add_inference, InferenceServicer(config.SERVICE, faces, lambda: server.ready, seconds), FULL_NAME)
    server.on_stop(servicer.batcher.close)
    return server
