"""The gateway's gRPC face."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import gateway_service_pb2_grpc as rpc
from imagemesh.v1 import vit_service_pb2
from imagemesh_gateway.direct import Direct
from imagemesh_gateway.mesh import Mesh
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.streaming import answers, as_fields


class GatewayServicer(rpc.GatewayServiceServicer):
    """Generates, classifies, embeds and lists by asking the services.

    ``count_message`` is called for each message of a stream, and refuses one by raising a ``MeshError``.
    """

    def __init__(self, mesh: Mesh, metrics: Metrics, direct: Direct, count_message: Callable[[], None]) -> None:
        self._mesh = mesh
        self._metrics = metrics
        self._direct = direct
        self._count_message = count_message

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        async with aclosing(self._direct.stream(request)) as events:
            async for event in events:
                yield event

    async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        mesh = self._mesh
        model = await mesh.catalogue.find(mesh.vit, request.model)
        asked = vit_service_pb2.ClassifyImagesRequest(
            model=model.name,
            images=request.images,
            top_k=request.top_k,
            threshold=request.threshold,
            size=request.size,
        )
        with self._metrics.stage.time("vit"):
            answer = await mesh.vit.unary(mesh.see.ClassifyImages, asked)
        return pb.ClassifyResponse(classifications=answer.classifications, model=answer.model, backend=answer.backend)

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        mesh = self._mesh
        model = await mesh.catalogue.find(mesh.vit, request.model)
        asked = vit_service_pb2.EmbedImagesRequest(
            model=model.name,
            images=request.images,
            pooling=request.pooling,
            normalize=request.normalize,
            hidden_states=request.hidden_states,
            layers=request.layers,
            dtype=request.dtype,
            size=request.size,
            attention_maps=request.attention_maps,
        )
        with self._metrics.stage.time("vit"):
            answer = await mesh.vit.unary(mesh.see.EmbedImages, asked)
        return pb.EmbedResponse(
            embeddings=answer.embeddings,
            model=answer.model,
            backend=answer.backend,
            hidden_states=answer.hidden_states if answer.HasField("hidden_states") else None,
            scales=answer.scales if answer.HasField("scales") else None,
            attention_maps=answer.attention_maps,
        )

    async def ClassifyStream(
        self, request_iterator: AsyncIterator[pb.ClassifyStreamRequest], context: Any
    ) -> AsyncIterator[pb.ClassifyStreamResponse]:
        async def answer(one: pb.ClassifyRequest) -> pb.ClassifyResponse:
            return await self.Classify(one, context)

        asked = (message.request async for message in request_iterator)
        async with aclosing(answers(asked, answer, count=self._count_message)) as outcomes:
            async for index, outcome in outcomes:
                yield pb.ClassifyStreamResponse(index=index, **as_fields(outcome))

    async def EmbedStream(
        self, request_iterator: AsyncIterator[pb.EmbedStreamRequest], context: Any
    ) -> AsyncIterator[pb.EmbedStreamResponse]:
        async def answer(one: pb.EmbedRequest) -> pb.EmbedResponse:
            return await self.Embed(one, context)

        asked = (message.request async for message in request_iterator)
        async with aclosing(answers(asked, answer, count=self._count_message)) as outcomes:
            async for index, outcome in outcomes:
                yield pb.EmbedStreamResponse(index=index, **as_fields(outcome))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        models, unreachable = await self._mesh.models()
        return pb.ListModelsResponse(models=models, unreachable=unreachable, roots=self._mesh.catalogue.roots())

    async def DescribeSampling(self, request: pb.DescribeSamplingRequest, context: Any) -> pb.DescribeSamplingResponse:
        mesh = self._mesh
        return pb.DescribeSamplingResponse(schedulers=await mesh.schedulers(), guiders=await mesh.guiders())
