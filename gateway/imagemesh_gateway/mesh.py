"""The services as the gateway sees them: their replicas, a stub each, and what models they have."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Final

from imagemesh.v1 import (
    controlnet_service_pb2_grpc,
    diffusion_service_pb2,
    diffusion_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    reference_service_pb2_grpc,
    text_encoder_service_pb2_grpc,
    vae_service_pb2_grpc,
    vit_service_pb2_grpc,
)
from imagemesh_gateway.access.caller import current_caller
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.costs import Costs
from imagemesh_gateway.preprocess import Preprocessors
from imagemesh_runtime.client import Peer
from imagemesh_runtime.discovery import Discovery
from imagemesh_runtime.errors import FailedPrecondition, MeshError, NotFound, PermissionDenied
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.replicas import Replicas
from imagemesh_runtime.tls import peer_files

ModelInfo = model_service_pb2.ModelInfo

# Services whose replicas may have different models; those of the others are alike.
_DIFFERING: Final = ("controlnet",)


class Mesh:
    """Channels to the replicas of the five services."""

    def __init__(self, config: GatewayConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._discoveries: list[Discovery] = []
        self.text_encoder = self._replicas("text-encoder", config.text_encoder)
        self.diffusion = self._replicas("diffusion", config.diffusion)
        self._timeout = config.catalogue_timeout_seconds
        self.checkpoint_every = config.checkpoint_every
        self.vae = self._replicas("vae", config.vae)
        self.controlnet = self._replicas("controlnet", config.controlnet)
        self.vit = self._replicas("vit", config.vit, keeping=("imagemesh.v1.SearchService",))
        self.services = (self.text_encoder, self.diffusion, self.vae, self.controlnet, self.vit)
        self.encode = text_encoder_service_pb2_grpc.TextEncoderServiceStub(self.text_encoder.channel)
        self.decode = vae_service_pb2_grpc.VaeServiceStub(self.vae.channel)
        self.pictures = vae_service_pb2_grpc.VaeServiceStub(self.vae.parcels)
        self.see = vit_service_pb2_grpc.VitServiceStub(self.vit.channel)
        self.control = controlnet_service_pb2_grpc.ControlNetServiceStub(self.controlnet.channel)
        self.references = reference_service_pb2_grpc.ReferenceServiceStub(self.vit.channel)
        self.preprocessors = Preprocessors(config, self.controlnet)
        self.catalogue = Catalogue(config)
        self.costs = Costs()

    def _replicas(self, name: str, addresses: str, keeping: Sequence[str] = ()) -> Replicas:
        config, passed_over = self._config, self._metrics.passed_over.labels(self._metrics.service, name)

        files = peer_files(config)

        def connect(address: str, known_as: str) -> Peer:
            return Peer(
                name, address, max_message_bytes=config.max_message_bytes,
                timeout_seconds=config.request_timeout_seconds, metrics=self._metrics,
                shares_memory=config.shared_memory_bytes > 0, tls=files, known_as=known_as,
            )  # fmt: skip

        found = Discovery(
            name, addresses, connect, rest_seconds=config.replica_rest_seconds,
            resolve_seconds=config.resolve_seconds, keeping=keeping, note_rest=passed_over.inc,
        )  # fmt: skip
        self._discoveries.append(found)
        return found.replicas

    @property
    def peers(self) -> list[Peer]:
        """All replicas of all services, as far as they are known."""
        return [peer for replicas in self.services for peer in replicas.peers]

    async def start(self) -> None:
        """Look for the replicas of services that are known by a name, and for what each has to do."""
        await asyncio.gather(*(found.start() for found in self._discoveries))

    async def models(self) -> tuple[list[ModelInfo], list[str]]:
        """All models of all services, and the names of the services that did not answer."""
        answers = await asyncio.gather(*map(self.catalogue.fetch, self.services), return_exceptions=True)
        models: list[ModelInfo] = []
        unreachable: list[str] = []
        for replicas, answer in zip(self.services, answers, strict=True):
            if isinstance(answer, MeshError):
                unreachable.append(replicas.name)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                models += answer.values()
        return models, unreachable

    async def schedulers(self) -> Sequence[diffusion_service_pb2.SchedulerInfo]:
        """The schedulers that generations take; errors as ``Catalogue.fetch``."""

        async def ask(peer: Peer) -> diffusion_service_pb2.ListSchedulersResponse:
            stub = diffusion_service_pb2_grpc.DiffusionServiceStub(peer.channel)
            asked = diffusion_service_pb2.ListSchedulersRequest()
            answer: diffusion_service_pb2.ListSchedulersResponse = await peer.unary(
                stub.ListSchedulers, asked, timeout_seconds=self._timeout
            )
            return answer

        return (await self.diffusion.ask(ask)).schedulers

    async def guiders(self) -> Sequence[diffusion_service_pb2.GuiderInfo]:
        """The guiders likewise."""

        async def ask(peer: Peer) -> diffusion_service_pb2.ListGuidersResponse:
            stub = diffusion_service_pb2_grpc.DiffusionServiceStub(peer.channel)
            asked = diffusion_service_pb2.ListGuidersRequest()
            answer: diffusion_service_pb2.ListGuidersResponse = await peer.unary(
                stub.ListGuiders, asked, timeout_seconds=self._timeout
            )
            return answer

        return (await self.diffusion.ask(ask)).guiders

    async def close(self) -> None:
        """Close the channels."""
        for found in self._discoveries:
            await found.close()


class Catalogue:
    """Remembers for a while which models each service has, and tells callers of those that their key is for."""

    def __init__(self, config: GatewayConfig) -> None:
        self._timeout = config.catalogue_timeout_seconds
        self._ttl = config.catalogue_ttl_seconds
        self._defaults = {
            "diffusion": config.default_model,
            "controlnet": config.default_controlnet,
            "vit": config.default_vit,
        }
        self._known: dict[str, tuple[float, Mapping[str, ModelInfo]]] = {}
        self._roots: dict[str, Sequence[str]] = {}

    def roots(self) -> list[str]:
        """The folders below which the services look for models, as far as they have been asked."""
        return list(dict.fromkeys(root for roots in self._roots.values() for root in roots))

    async def find(self, replicas: Replicas, name: str) -> ModelInfo:
        """The service's model of that name; "" is the default one.

        Raises:
            NotFound: there is no such model; the error lists what there is.
            PermissionDenied: the caller's key is for other models.
            FailedPrecondition: the default is asked for, and the service has no model at all.
            Unavailable, DeadlineExceeded: the service doesn't say.
        """
        caller = current_caller()
        usual = self._defaults.get(replicas.name, "")
        wanted = name or (usual if caller.may_use(usual) else "")
        fetched, models = self._known.get(replicas.name, (0.0, {}))
        if time.monotonic() - fetched > self._ttl or (wanted and wanted not in models):
            models = await self._fetch(replicas)
        if not wanted:
            wanted = self._first(replicas.name, models)
        if wanted not in models:
            raise NotFound("model", wanted, caller.usable(models))
        caller.require_model(wanted)
        return models[wanted]

    def _first(self, service: str, models: Mapping[str, ModelInfo]) -> str:
        """The first by name that the caller may use; errors as ``find``."""
        if not models:
            looked = f"; it looked in {', '.join(roots)}" if (roots := self._roots.get(service)) else ""
            raise FailedPrecondition(f"{service} has no model to serve{looked}")
        usable = current_caller().usable(models)
        if not usable:
            raise PermissionDenied(f"key {current_caller().id} is for no model of {service}")
        return min(usable)

    async def fetch(self, replicas: Replicas) -> Mapping[str, ModelInfo]:
        """Ask the service now: its replicas, one after another until one answers, or all where they may differ.

        Raises:
            MeshError: it can't be reached, or does not answer in time.
        """
        models = await self._fetch(replicas)
        return {name: models[name] for name in current_caller().usable(models)}

    async def _fetch(self, replicas: Replicas) -> Mapping[str, ModelInfo]:
        differ = replicas.name in _DIFFERING
        answers = await replicas.survey(self._ask) if differ else [await replicas.ask(self._ask)]
        models = {info.name: info for answer in answers for info in answer.models}
        self._known[replicas.name] = (time.monotonic(), models)
        self._roots[replicas.name] = list(dict.fromkeys(root for answer in answers for root in answer.roots))
        return models

    async def _ask(self, peer: Peer) -> model_service_pb2.ListServedModelsResponse:
        stub = model_service_pb2_grpc.ModelServiceStub(peer.channel)
        request = model_service_pb2.ListServedModelsRequest()
        answer: model_service_pb2.ListServedModelsResponse = await peer.unary(
            stub.ListServedModels, request, timeout_seconds=self._timeout
        )
        return answer
