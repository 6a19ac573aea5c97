"""A tiny service, test.Echo, with one method for each of gRPC's four kinds, served by the real server.

Messages are StringValue. A test replaces the method that it is about.
"""

import asyncio
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import status_pb2
from prometheus_client.parser import text_string_to_metric_families

from imagemesh_runtime.channels import channel_options
from imagemesh_runtime.config import ServerConfig
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.server import MeshServer

NAME = "test.Echo"
LIMIT = 1 << 20


class Echo:
    """The servicer; each method says back what it heard."""

    def __init__(self, **methods: Any) -> None:
        for name, method in methods.items():
            setattr(self, name, method)

    async def unary(self, request: StringValue, context: Any) -> StringValue:
        return request

    async def server_stream(self, request: StringValue, context: Any) -> AsyncIterator[StringValue]:
        for character in request.value:
            yield StringValue(value=character)

    async def client_stream(self, requests: AsyncIterator[StringValue], context: Any) -> StringValue:
        return StringValue(value="".join([request.value async for request in requests]))

    async def bidi_stream(self, requests: AsyncIterator[StringValue], context: Any) -> AsyncIterator[StringValue]:
        async for request in requests:
            yield request


def add_echo(echo: Echo, server: Any) -> None:
    """As a generated ``add_..._to_server``."""

    def handler(make: Any, method: Any) -> Any:
        return make(method, StringValue.FromString, StringValue.SerializeToString)

    handlers = {
        "Unary": handler(grpc.unary_unary_rpc_method_handler, echo.unary),
        "ServerStream": handler(grpc.unary_stream_rpc_method_handler, echo.server_stream),
        "ClientStream": handler(grpc.stream_unary_rpc_method_handler, echo.client_stream),
        "BidiStream": handler(grpc.stream_stream_rpc_method_handler, echo.bidi_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))


class EchoStub:
    """As a generated stub."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        codec = {"request_serializer": StringValue.SerializeToString, "response_deserializer": StringValue.FromString}
        self.unary = channel.unary_unary(f"/{NAME}/Unary", **codec)
        self.server_stream = channel.unary_stream(f"/{NAME}/ServerStream", **codec)
        self.client_stream = channel.stream_unary(f"/{NAME}/ClientStream", **codec)
        self.bidi_stream = channel.stream_stream(f"/{NAME}/BidiStream", **codec)
        # Whatever bytes, to a method that expects a StringValue.
        self.raw_unary = channel.unary_unary(f"/{NAME}/Unary")
        self.raw_client_stream = channel.stream_unary(f"/{NAME}/ClientStream")


@asynccontextmanager
async def serving(echo: Echo | None = None, service: str = "echo", **settings: Any) -> AsyncIterator[MeshServer]:
    """A ready server of the echo service, stopped at the end."""
    config = ServerConfig(**{"max_message_bytes": LIMIT, "drain_grace_seconds": 5.0, **settings})
    server = MeshServer(config, Metrics(service))
    server.add(add_echo, echo or Echo(), NAME)
    await server.start()
    await server.set_ready()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def calling(server: MeshServer) -> AsyncIterator[EchoStub]:
    """A stub on a channel of its own."""
    async with grpc.aio.insecure_channel(server.address, options=channel_options(LIMIT)) as channel:
        yield EchoStub(channel)


@asynccontextmanager
async def echoing(echo: Echo | None = None, **settings: Any) -> AsyncIterator[tuple[MeshServer, EchoStub]]:
    """A server and a stub for it."""
    async with serving(echo, **settings) as server, calling(server) as stub:
        yield server, stub


def status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The rich status that came with the error."""
    trailing = dict(error.trailing_metadata())
    return status_pb2.Status.FromString(trailing["grpc-status-details-bin"])


async def http(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    """Status and body of an HTTP request."""

    def fetch() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(urllib.request.Request(f"http://{address}{path}", method=method)) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(fetch)


Samples = dict[tuple[str, str], float]


async def scrape(server: MeshServer) -> Samples:
    """What the metrics port says of test.Echo: {(name, "unary/Unary" or "unary/Unary/OK"): value}."""
    _, text = await http(server.metrics_http.address, "/metrics")
    keys = ("grpc_type", "grpc_method", "grpc_code")
    return {
        (sample.name, "/".join(sample.labels[key] for key in keys if key in sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("grpc_service") == NAME and "le" not in sample.labels
    }


async def scraped(server: MeshServer, ready: Callable[[Samples], bool]) -> Samples:
    """Scrape until ``ready``: a client hears of a call's end a little before the server has counted it."""
    async with asyncio.timeout(10):
        while not ready(samples := await scrape(server)):
            pass
        return samples


async def handled(server: MeshServer, method: str, code: str) -> Samples:
    """Scrape until a call of the method, such as "unary/Unary", was counted under the code."""
    return await scraped(server, lambda samples: ("grpc_server_handled_total", f"{method}/{code}") in samples)
