"""Search at the gateway: calls handed on to the ViT service, which keeps the indexes."""

from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from imagemesh.v1 import search_service_pb2 as pb
from imagemesh.v1 import search_service_pb2_grpc as rpc
from imagemesh_gateway.access.caller import current_caller
from imagemesh_gateway.mesh import Mesh
from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.metrics import Metrics


class SearchForwarder(rpc.SearchServiceServicer):
    """The ViT service's own, at the front door."""

    def __init__(self, mesh: Mesh, metrics: Metrics) -> None:
        self._mesh = mesh
        self._metrics = metrics
        self._stub = rpc.SearchServiceStub(mesh.vit.channel)

    async def IndexImages(self, request: pb.IndexImagesRequest, context: Any) -> pb.IndexImagesResponse:
        request.ClearField("default_model")  # which is the gateway's to set: a caller's would pass by the key's models
        if request.model:
            current_caller().require_model(request.model)
        else:
            # Without a model too, what is wrong with the request comes first, and only the service knows that.
            with suppress(FailedPrecondition):
                request.default_model = (await self._mesh.catalogue.find(self._mesh.vit, "")).name
        answer: pb.IndexImagesResponse = await self._call(self._stub.IndexImages, request)
        return answer

    async def SearchImages(self, request: pb.SearchImagesRequest, context: Any) -> pb.SearchImagesResponse:
        answer: pb.SearchImagesResponse = await self._call(self._stub.SearchImages, request)
        return answer

    async def FindDuplicates(self, request: pb.FindDuplicatesRequest, context: Any) -> pb.FindDuplicatesResponse:
        answer: pb.FindDuplicatesResponse = await self._call(self._stub.FindDuplicates, request)
        return answer

    async def ListIndexes(self, request: pb.ListIndexesRequest, context: Any) -> pb.ListIndexesResponse:
        answer: pb.ListIndexesResponse = await self._call(self._stub.ListIndexes, request)
        return answer

    async def RemoveImages(self, request: pb.RemoveImagesRequest, context: Any) -> pb.RemoveImagesResponse:
        answer: pb.RemoveImagesResponse = await self._call(self._stub.RemoveImages, request)
        return answer

    async def DeleteIndex(self, request: pb.DeleteIndexRequest, context: Any) -> pb.DeleteIndexResponse:
        answer: pb.DeleteIndexResponse = await self._call(self._stub.DeleteIndex, request)
        return answer

    async def ExportVectors(
        self, request: pb.ExportVectorsRequest, context: Any
    ) -> AsyncIterator[pb.ExportVectorsResponse]:
        async with aclosing(self._mesh.vit.stream(self._stub.ExportVectors, request)) as pieces:
            async for piece in pieces:
                yield piece

    async def ClusterImages(
        self, request: pb.ClusterImagesRequest, context: Any
    ) -> AsyncIterator[pb.ClusterImagesResponse]:
        async with aclosing(self._mesh.vit.stream(self._stub.ClusterImages, request)) as pieces:
            async for piece in pieces:
                yield piece

    async def _call(self, method: Any, request: Any) -> Any:
        with self._metrics.stage.time("search"):
            return await self._mesh.vit.unary(method, request)
