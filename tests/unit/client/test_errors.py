"""Failures reach the SDK's user as exceptions with code, text and details."""

import threading

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from imagemesh_client import AsyncClient, Client, MeshError, RemoteError, Unavailable
from imagemesh_runtime.errors import InvalidArgument, NotFound, Overloaded
from tests.support.recording_gateway import RecordingGateway


@pytest.mark.parametrize(
    ("error", "code", "detail"),
    [
        (
            InvalidArgument("steps", 0, "1 to 1000"),
            grpc.StatusCode.INVALID_ARGUMENT,
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field="steps", description="must be 1 to 1000, got 0")
                ]
            ),
        ),
        (
            NotFound("model", "nope", ["sd-tiny"]),
            grpc.StatusCode.NOT_FOUND,
            error_details_pb2.ResourceInfo(resource_type="model", resource_name="nope"),
        ),
        (
            Unavailable("vae", "cannot be reached"),
            grpc.StatusCode.UNAVAILABLE,
            error_details_pb2.ErrorInfo(reason="UNAVAILABLE", domain="imagemesh", metadata={"service": "vae"}),
        ),
    ],
)
def test_the_gateways_error_arrives_whole(
    gateway: RecordingGateway, error: MeshError, code: grpc.StatusCode, detail: Message
) -> None:
    gateway.error = error
    with Client(gateway.address) as client, pytest.raises(MeshError) as caught:
        client.generate("a fox")
    status = caught.value.to_status()
    received = type(detail)()
    assert (caught.value.code, str(caught.value), len(status.details)) == (code, str(error), 1)
    assert status.details[0].Unpack(received)
    assert received == detail


def test_an_overloaded_mesh_says_when_to_come_back(gateway: RecordingGateway) -> None:
    gateway.error = Overloaded("diffusion", 32, 2.5)
    with Client(gateway.address) as client, pytest.raises(RemoteError) as caught:
        client.models()
    assert caught.value.retry_after() == 2.5


async def test_async_errors_are_the_sync_ones(gateway: RecordingGateway) -> None:
    gateway.error = NotFound("model", "nope", ["sd-tiny"])
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(RemoteError) as caught:
            await client.classify(b"file")
    with Client(gateway.address) as sync_client, pytest.raises(RemoteError) as sync_caught:
        sync_client.classify(b"file")
    assert caught.value.to_status() == sync_caught.value.to_status()


def test_nobody_there_is_unavailable_and_names_the_address() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        client.models()


def test_a_url_is_told_what_is_wanted() -> None:
    with Client("http://localhost:50050") as client, pytest.raises(InvalidArgument) as caught:
        client.models()
    assert str(caught.value).startswith("address of gateway must be host:port such as 127.0.0.1:50050, or unix:/path")


def test_a_gateway_that_hangs_is_given_up_after_the_timeout(gateway: RecordingGateway) -> None:
    gateway.hold = True
    with Client(gateway.address, timeout=0.3) as client, pytest.raises(MeshError) as caught:
        client.embed(b"file")
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert gateway.cancelled.wait(20)


def test_a_closed_client_says_so(gateway: RecordingGateway) -> None:
    client = Client(gateway.address)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.models()
    with pytest.raises(RuntimeError, match="closed"):
        next(client.stream("a fox"))


async def test_a_closed_async_client_says_so(gateway: RecordingGateway) -> None:
    client = AsyncClient(gateway.address)
    await client.models()
    await client.close()
    with pytest.raises(RuntimeError, match="closed"):
        await client.models()


def test_close_ends_the_clients_thread(gateway: RecordingGateway) -> None:
    with Client(gateway.address) as client:
        client.models()
        assert "imagemesh-client" in {thread.name for thread in threading.enumerate()}
    assert "imagemesh-client" not in {thread.name for thread in threading.enumerate()}
