"""Loads and unloads a service's models by name, for who doesn't want to wait for the first request."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from imagemesh.v1 import model_loading_service_pb2 as pb
from imagemesh.v1 import model_loading_service_pb2_grpc as rpc
from imagemesh.v1 import model_service_pb2
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.registry import LoadedModels

Infos = Callable[[], Awaitable[Mapping[str, model_service_pb2.ModelInfo]]]


class LoadingServicer(rpc.ModelLoadingServiceServicer):
    """Names are looked up among the repository's folders; ``infos`` tells what is known of its models."""

    def __init__(self, models: LoadedModels[Any], infos: Infos) -> None:
        self._models = models
        self._infos = infos

    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        changed = await self._models.refresh(_name(request.name))
        return pb.LoadModelResponse(model=(await self._infos()).get(request.name), changed=changed)

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        return pb.UnloadModelResponse(changed=await self._models.unload(_name(request.name)))


def _name(name: str) -> str:
    if not name:
        raise InvalidArgument("name", name, "a model's name")
    return name
