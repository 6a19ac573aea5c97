"""Loading by name, at the ViT service."""

from contextlib import suppress
from typing import Any

from imagemesh.v1 import model_loading_service_pb2 as pb
from imagemesh.v1 import model_loading_service_pb2_grpc as rpc
from imagemesh_gateway.access.caller import current_caller
from imagemesh_gateway.mesh import Mesh
from imagemesh_runtime.errors import MeshError


class LoadingForwarder(rpc.ModelLoadingServiceServicer):
    """Hands the calls on to every replica; what the gateway knows of the service's models is then asked anew."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._stub = rpc.ModelLoadingServiceStub(mesh.vit.channel)

    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        answers = await self._everywhere(self._stub.LoadModel, request)
        return pb.LoadModelResponse(model=answers[0].model, changed=any(one.changed for one in answers))

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        answers = await self._everywhere(self._stub.UnloadModel, request)
        return pb.UnloadModelResponse(changed=any(one.changed for one in answers))

    async def _everywhere(self, method: Any, request: Any) -> list[Any]:
        if request.name:
            current_caller().require_model(request.name)
        answers = await self._mesh.vit.everywhere(method, request)
        with suppress(MeshError):  # it is done, and who asks for models later asks the service again
            await self._mesh.catalogue.fetch(self._mesh.vit)
        return answers
