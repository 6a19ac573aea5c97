"""Preprocessors as the gateway sees them: what the ControlNet service has, and calls handed on to it."""

import asyncio
import time
from typing import Any

import numpy as np
from PIL import Image

from imagemesh.v1 import gateway_service_pb2, image_pb2
from imagemesh.v1 import preprocess_service_pb2 as pb
from imagemesh.v1 import preprocess_service_pb2_grpc as rpc
from imagemesh_gateway.access.caller import current_caller
from imagemesh_gateway.config import GatewayConfig
from imagemesh_runtime import preprocessing
from imagemesh_runtime.client import Hop, Peer
from imagemesh_runtime.errors import NotFound, PermissionDenied
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.replicas import Replicas
from imagemesh_runtime.tensors import Array, from_proto, to_proto


class Preprocessors:
    """Remembers for a while which preprocessors the service has, and calls them."""

    def __init__(self, config: GatewayConfig, replicas: Replicas) -> None:
        self._timeout = config.catalogue_timeout_seconds
        self._ttl = config.catalogue_ttl_seconds
        self._replicas = replicas
        self._stub = rpc.PreprocessServiceStub(replicas.channel)
        self._known: tuple[float, list[pb.PreprocessorInfo]] = (0.0, [])

    async def infos(self) -> list[pb.PreprocessorInfo]:
        """What the service says now, with those of the models that the caller's key is for.

        Raises:
            MeshError: it can't be reached, or does not answer in time.
        """
        return [_narrowed(info) for info in await self._fetch()]

    async def _fetch(self) -> list[pb.PreprocessorInfo]:
        """Of all replicas, which may have different models."""
        infos: dict[str, pb.PreprocessorInfo] = {}
        for answer in await self._replicas.survey(self._ask):
            for info in answer.preprocessors:
                known = infos.setdefault(info.name, info)
                known.models.extend([name for name in info.models if name not in known.models])
        self._known = (time.monotonic(), list(infos.values()))
        return self._known[1]

    async def _ask(self, peer: Peer) -> pb.ListPreprocessorsResponse:
        stub = rpc.PreprocessServiceStub(peer.channel)
        answer: pb.ListPreprocessorsResponse = await peer.unary(
            stub.ListPreprocessors, pb.ListPreprocessorsRequest(), timeout_seconds=self._timeout
        )
        return answer

    async def wanted(self, unit: gateway_service_pb2.GenerateControl, field: str) -> pb.PreprocessRequest | None:
        """What a control unit asks for, its picture still to come; None: nothing.

        Raises:
            NotFound: there is no such preprocessor, or no model for it.
            InvalidArgument: a parameter isn't allowed.
        """
        if not unit.preprocessor:
            return None
        preprocessing.check_resolution(f"{field}.preprocessor_resolution", unit.preprocessor_resolution)
        fetched, infos = self._known
        if time.monotonic() - fetched <= self._ttl:
            try:
                return _checked(unit, field, infos)
            except NotFound:  # it may have come since
                pass
        return _checked(unit, field, await self._fetch())

    async def run(self, request: pb.PreprocessRequest, hop: Hop | None = None) -> pb.PreprocessResponse:
        """The service's answer.

        Raises:
            PermissionDenied: it takes a model that the caller's key is not for.
        """
        key = current_caller().key
        if key is not None and key.models:  # else the service's first model is the caller's as well
            info = preprocessing.find_preprocessor(await self._fetch(), request.preprocessor)
            request.model = _find_model(info, request.model, "model")
        answer: pb.PreprocessResponse = await self._replicas.unary(self._stub.Preprocess, request, hop)
        return answer

    async def hint(self, wanted: pb.PreprocessRequest, picture: Array, hop: Hop) -> tuple[Array, str]:
        """What a ControlNet is to follow, uint8 [h, w, 3] of the picture's size, and what made it."""
        request = pb.PreprocessRequest()
        request.CopyFrom(wanted)
        request.image.CopyFrom(image_pb2.Image(pixels=to_proto(picture)))
        answer = await self.run(request, hop)
        drawn = from_proto(answer.image, "image", dtypes=["uint8"], shape=(None, None, 3))
        if drawn.shape != picture.shape:
            size = (picture.shape[1], picture.shape[0])
            resized = await asyncio.to_thread(Image.fromarray(drawn).resize, size, Image.Resampling.LANCZOS)
            drawn = np.asarray(resized)
        return drawn, answer.backend


def _checked(
    unit: gateway_service_pb2.GenerateControl, field: str, infos: list[pb.PreprocessorInfo]
) -> pb.PreprocessRequest:
    info = preprocessing.find_preprocessor(infos, unit.preprocessor)
    preprocessing.check_parameters(info, unit.preprocessor_parameters, f"{field}.preprocessor_parameters")
    model = _find_model(info, unit.preprocessor_model, f"{field}.preprocessor_model")
    return pb.PreprocessRequest(
        preprocessor=info.name,
        parameters=unit.preprocessor_parameters,
        resolution=unit.preprocessor_resolution,
        model=model,
    )


def _narrowed(info: pb.PreprocessorInfo) -> pb.PreprocessorInfo:
    """With those of its models that the caller's key is for."""
    narrowed = pb.PreprocessorInfo()
    narrowed.CopyFrom(info)
    narrowed.models[:] = current_caller().usable(info.models)
    return narrowed


def _find_model(info: pb.PreprocessorInfo, name: str, field: str) -> str:
    """As ``preprocessing.find_model``, of the models that the caller's key is for.

    Raises:
        PermissionDenied: it is for others.
    """
    caller, narrowed = current_caller(), _narrowed(info)
    if name in info.models:
        caller.require_model(name)
    if info.models and not narrowed.models:
        raise PermissionDenied(f"key {caller.id} is for no model of preprocessor {info.name}")
    return preprocessing.find_model(narrowed, name, field)


class PreprocessServicer(rpc.PreprocessServiceServicer):
    """The ControlNet service's own, at the front door."""

    def __init__(self, preprocessors: Preprocessors, metrics: Metrics) -> None:
        self._preprocessors = preprocessors
        self._metrics = metrics

    async def ListPreprocessors(
        self, request: pb.ListPreprocessorsRequest, context: Any
    ) -> pb.ListPreprocessorsResponse:
        return pb.ListPreprocessorsResponse(preprocessors=await self._preprocessors.infos())

    async def Preprocess(self, request: pb.PreprocessRequest, context: Any) -> pb.PreprocessResponse:
        with self._metrics.stage.time("preprocess"):
            return await self._preprocessors.run(request)
