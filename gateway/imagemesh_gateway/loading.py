"""Loading by name, at the ViT service."""

from typing import Any

from imagemesh.v1 import model_loading_service_pb2 as pb
from imagemesh.v1 import model_loading_service_pb2_grpc as rpc
from imagemesh_gateway.mesh import Mesh


class LoadingForwarder(rpc.ModelLoadingServiceServicer):
    """Hands the calls on to every replica; what the gateway knows of the service's models is then asked anew."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._stub = rpc.ModelLoadingServiceStub(mesh.vit.channel)

    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        answer: pb.LoadModelResponse = (await self._mesh.vit.everywhere(self._stub.LoadModel, request))[0]
        await self._mesh.catalogue.fetch(self._mesh.vit)
        return answer

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        answer: pb.UnloadModelResponse = (await self._mesh.vit.everywhere(self._stub.UnloadModel, request))[0]
        await self._mesh.catalogue.fetch(self._mesh.vit)
        return answer
