"""Puts the room together: config -> backend -> batcher -> server."""

import logging

from imagemesh.v1 import reference_service_pb2_grpc as reference_rpc
from imagemesh.v1 import search_service_pb2_grpc as search_rpc
from imagemesh.v1 import vit_service_pb2_grpc as rpc
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.oip import FULL_NAME, InferenceServicer, add_inference
from imagemesh_runtime.oip_stages import local_name, vit_models
from imagemesh_runtime.registry import Backend, LoadedModels, choose_backend
from imagemesh_runtime.service import ModelServer
from imagemesh_services.vit.automatic import open_backend
from imagemesh_services.vit.backend import VitModel
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.references import backend as references
from imagemesh_services.vit.references.servicer import ReferenceServicer
from imagemesh_services.vit.search.servicer import SearchServicer
from imagemesh_services.vit.servicer import VitServicer

log = logging.getLogger(__name__)


def create(config: VitConfig, lane: Lane) -> ModelServer[VitModel]:
    """The service, not yet started."""
    metrics = Metrics(config.SERVICE)
    models: LoadedModels[VitModel] = LoadedModels(open_backend(config), lane, metrics)
    servicer = VitServicer(config, models, metrics)
    server = ModelServer(config, metrics, models)
    server.add(rpc.add_VitServiceServicer_to_server, servicer, "imagemesh.v1.VitService")
    server.allow_loading()
    faces = vit_models(
        local_name(models.backend.cards),
        lambda request: servicer.ClassifyImages(request, None),
        lambda request: servicer.EmbedImages(request, None),
    )
    seconds = config.request_timeout_seconds
    server.add(add_inference, InferenceServicer(config.SERVICE, faces, lambda: server.ready, seconds), FULL_NAME)
    search = SearchServicer(config, models.backend.cards, lambda request: servicer.EmbedImages(request, None))
    server.add(search_rpc.add_SearchServiceServicer_to_server, search, "imagemesh.v1.SearchService")
    server.on_stop(search.close)
    server.on_stop(servicer.close)
    _add_references(server, config, lane, metrics)
    return server


def _add_references(server: ModelServer[VitModel], config: VitConfig, lane: Lane, metrics: Metrics) -> None:
    backend = _references_backend(config)
    if backend is None:
        return
    models: LoadedModels[references.ReferenceEncoder] = LoadedModels(backend, lane, metrics)
    servicer = ReferenceServicer(config, models, metrics)
    server.add(reference_rpc.add_ReferenceServiceServicer_to_server, servicer, "imagemesh.v1.ReferenceService")
    server.on_stop(servicer.close)


def _references_backend(config: VitConfig) -> Backend[references.ReferenceEncoder] | None:
    """The fake one beside the fake, else torch's, whatever runs the classifiers; None: no torch, or no such device."""
    choice = "fake" if config.backend == "fake" else "torch"
    if not references.BACKENDS[choice].installed:
        log.info("vit: no pictures are embedded for IP-Adapters: torch is not installed")
        return None
    try:
        backend: Backend[references.ReferenceEncoder] = choose_backend(references.BACKENDS, choice)(config)
    except InvalidArgument as error:  # such as a device that only OpenVINO has
        log.info("vit: no pictures are embedded for IP-Adapters: %s", error)
        return None
    return backend
