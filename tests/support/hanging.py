"""A service that says what models it has, and never answers anything else."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from imagemesh.v1 import model_service_pb2 as pb


class Hanging(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Takes the place of any of the services; it has the model "fake"."""

    def __init__(self) -> None:
        self.asked, self.left = asyncio.Event(), asyncio.Event()
        # Of the calls that hang.
        self.metadata: list[dict[str, str]] = []

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method.endswith("/ListServedModels"):
            return grpc.unary_unary_rpc_method_handler(
                _models,
                request_deserializer=pb.ListServedModelsRequest.FromString,
                response_serializer=pb.ListServedModelsResponse.SerializeToString,
            )
        self.metadata.append(dict(details.invocation_metadata))
        return grpc.stream_stream_rpc_method_handler(self._hang)

    async def _hang(self, requests: Any, context: Any) -> None:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()


async def _models(request: pb.ListServedModelsRequest, context: Any) -> pb.ListServedModelsResponse:
    properties = {"width": "64", "height": "64", "multiple": "8"}
    return pb.ListServedModelsResponse(models=[pb.ModelInfo(name="fake", properties=properties)])


@asynccontextmanager
async def hanging(address: str) -> AsyncIterator[Hanging]:
    """The service, listening there."""
    server, service = grpc.aio.server(), Hanging()
    server.add_generic_rpc_handlers((service,))
    server.add_insecure_port(address)
    await server.start()
    try:
        yield service
    finally:
        await server.stop(None)
