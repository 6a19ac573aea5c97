"""Puts the room together: config -> backend -> server."""

from dataclasses import replace
from typing import Any

from imagemesh.v1 import controlnet_service_pb2_grpc as rpc
from imagemesh.v1 import preprocess_service_pb2_grpc as preprocess_rpc
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import Backend, LoadedModels, choose_backend
from imagemesh_runtime.service import ModelServer
from imagemesh_services.automatic import open_backend
from imagemesh_services.controlnet.backend import BACKENDS, Loaded
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.controlnet.preprocessors import backend as preprocessors
from imagemesh_services.controlnet.preprocessors.servicer import PreprocessServicer
from imagemesh_services.controlnet.servicer import ControlNetServicer


def create(config: ControlNetConfig, lane: Lane) -> ModelServer[Loaded]:
    """The service, not yet started."""
    metrics = Metrics(config.SERVICE)
    models: LoadedModels[Loaded] = LoadedModels(open_backend(BACKENDS, config), lane, metrics)
    server = ModelServer(config, metrics, models)
    servicer = ControlNetServicer(config, models, metrics)
    server.add(rpc.add_ControlNetServiceServicer_to_server, servicer, "imagemesh.v1.ControlNetService", parcels=True)
    _add_preprocessors(server, config, lane, metrics)
    return server


def _add_preprocessors(server: ModelServer[Loaded], config: ControlNetConfig, lane: Lane, metrics: Metrics) -> None:
    backend = _annotators(config)
    models: LoadedModels[preprocessors.Annotator] = LoadedModels(backend, lane, metrics)
    servicer = PreprocessServicer(config, models, metrics)
    name = "imagemesh.v1.PreprocessService"
    server.add(preprocess_rpc.add_PreprocessServiceServicer_to_server, servicer, name)
    server.on_stop(servicer.close)


def _annotators(config: ControlNetConfig) -> Backend[Any]:
    """Torch's, where the backend has none, on the configured device, or where that is none of torch's on its own."""
    known = config.backend if config.backend in preprocessors.BACKENDS else "torch"
    opened = choose_backend(preprocessors.BACKENDS, known)
    try:
        backend: Backend[Any] = opened(config)
    except InvalidArgument:
        if known == config.backend:
            raise
        backend = opened(replace(config, device="auto"))
    return backend
