"""Whatever goes wrong in a servicer, the client gets a clear status, and the next call is served."""

import asyncio
import json
import logging

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2

from imagemesh.v1 import vae_service_pb2, vae_service_pb2_grpc
from imagemesh_runtime.config import ServerConfig
from imagemesh_runtime.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    MeshError,
    NotFinite,
    NotFound,
    Overloaded,
    Unavailable,
)
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.server import MeshServer
from tests.support.echo import LIMIT, Echo, EchoStub, echoing, handled, scrape, status_of

HELLO = StringValue(value="hello")
SECRET = "/etc/passwd of the database"


def raising(error: BaseException) -> Echo:
    """Every method raises ``error``: after a message where it sends a stream, after the last where it hears one."""

    async def unary(request, context):
        raise error

    async def client_stream(requests, context):
        [_ async for _ in requests]
        raise error

    async def server_stream(request, context):
        yield HELLO
        raise error

    async def bidi_stream(requests, context):
        yield HELLO
        await client_stream(requests, context)

    return Echo(unary=unary, client_stream=client_stream, server_stream=server_stream, bidi_stream=bidi_stream)


async def fails(stub: EchoStub, kind: str) -> grpc.aio.AioRpcError:
    """The error of a call, a stream's after its first message."""
    call = getattr(stub, kind)(HELLO if kind in ("unary", "server_stream") else iter([HELLO]))
    if kind.endswith("_stream") and kind != "client_stream":
        assert await call.read() == HELLO
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if kind in ("unary", "client_stream") else call.read())
    return caught.value


KINDS = ("unary", "server_stream", "client_stream", "bidi_stream")
BAD_STEPS = InvalidArgument("steps", 0, "1 to 1000")
ERRORS = [
    (BAD_STEPS, grpc.StatusCode.INVALID_ARGUMENT, error_details_pb2.BadRequest),
    (NotFound("model", "sd99", ["sd15"]), grpc.StatusCode.NOT_FOUND, error_details_pb2.ResourceInfo),
    (Overloaded("vae", 8, 1.25), grpc.StatusCode.RESOURCE_EXHAUSTED, error_details_pb2.RetryInfo),
    (Unavailable("vae", "is stopping"), grpc.StatusCode.UNAVAILABLE, error_details_pb2.ErrorInfo),
    (DeadlineExceeded("vae", "hangs"), grpc.StatusCode.DEADLINE_EXCEEDED, error_details_pb2.ErrorInfo),
    (NotFinite("sd15", "pixels"), grpc.StatusCode.INTERNAL, error_details_pb2.ErrorInfo),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("error", "code", "detail"), ERRORS, ids=lambda value: getattr(value, "__name__", ""))
async def test_our_errors_arrive_with_code_text_and_details(kind, error: MeshError, code, detail) -> None:
    async with echoing(raising(error)) as (_, stub):
        got = await fails(stub, kind)
    assert got.code() is code
    assert got.details() == str(error)
    assert status_of(got) == error.to_status()
    assert status_of(got).details[0].Is(detail.DESCRIPTOR)


async def test_a_bad_field_is_named() -> None:
    async with echoing(raising(BAD_STEPS)) as (_, stub):
        status = status_of(await fails(stub, "unary"))
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    assert [(one.field, one.description) for one in bad.field_violations] == [("steps", "must be 1 to 1000, got 0")]


async def test_a_refusal_says_when_to_come_back() -> None:
    async with echoing(raising(Overloaded("vae", 8, 1.25))) as (_, stub):
        error = await fails(stub, "unary")
    info = error_details_pb2.RetryInfo()
    assert status_of(error).details[0].Unpack(info)
    assert info.retry_delay.ToTimedelta().total_seconds() == 1.25
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1250"


async def test_an_error_without_details_arrives() -> None:
    async with echoing(raising(FailedPrecondition("no ControlNet here"))) as (_, stub):
        error = await fails(stub, "unary")
    assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "no ControlNet here")


async def test_an_error_that_lists_thousands_of_models_arrives() -> None:
    async with echoing(raising(NotFound("model", "x", [f"organisation/model-{i}" for i in range(5000)]))) as (_, stub):
        error = await fails(stub, "unary")
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "more" in error.details()


@pytest.mark.parametrize("kind", KINDS)
async def test_an_unforeseen_exception_is_an_id_for_the_client_and_a_story_in_the_log(kind, caplog) -> None:
    async with echoing(raising(RuntimeError(SECRET))) as (_, stub):
        error = await fails(stub, kind)
    assert error.code() is grpc.StatusCode.INTERNAL
    info = error_details_pb2.ErrorInfo()
    assert status_of(error).details[0].Unpack(info)
    assert SECRET not in str(error) + str(error.trailing_metadata())
    story = next(record for record in caplog.records if record.name == "imagemesh_runtime.interceptors")
    assert info.metadata["id"] in story.getMessage()
    assert SECRET in logging.Formatter().format(story)


async def test_an_answer_that_cannot_be_serialised_shows_no_text() -> None:
    async def unary(request, context):
        return SECRET

    async with echoing(Echo(unary=unary)) as (_, stub):
        error = await fails(stub, "unary")
    assert error.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in str(error)


async def test_a_timeout_of_the_servicers_own_is_not_the_callers_deadline() -> None:
    async with echoing(raising(TimeoutError(SECRET))) as (server, stub):
        assert (await fails(stub, "unary")).code() is grpc.StatusCode.INTERNAL
        await handled(server, "unary/Unary", "INTERNAL")


async def test_a_call_that_is_cancelled_from_within_does_not_leave_its_caller_hanging() -> None:
    async with echoing(raising(asyncio.CancelledError())) as (_, stub):
        error = await asyncio.wait_for(fails(stub, "unary"), 5)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "echo" in error.details()


async def test_an_unknown_method_is_unimplemented() -> None:
    async with echoing() as (server, _), grpc.aio.insecure_channel(server.address) as channel:
        for path in ("/test.Echo/Nothing", "/test.Nobody/Unary", "/a/b/c", "/"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(path)(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert await scrape(server) == {}  # names that strangers make up become no series


async def test_a_method_that_a_servicer_leaves_out_is_unimplemented() -> None:
    server = MeshServer(ServerConfig(), Metrics("vae"))
    servicer = vae_service_pb2_grpc.VaeServiceServicer()
    server.add(vae_service_pb2_grpc.add_VaeServiceServicer_to_server, servicer, "imagemesh.v1.VaeService")
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = vae_service_pb2_grpc.VaeServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DecodeLatents(vae_service_pb2.DecodeLatentsRequest())
    await server.stop()
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "DecodeLatents" in caught.value.details()


async def test_bytes_that_are_no_message_are_an_invalid_argument() -> None:
    async with echoing() as (server, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.raw_unary(b"\xff" * 10)
        assert await stub.unary(HELLO) == HELLO
        await handled(server, "unary/Unary", "INVALID_ARGUMENT")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_bytes_in_a_stream_that_are_no_message_are_counted_as_an_invalid_argument() -> None:
    async with echoing() as (server, stub):
        call = stub.raw_client_stream()
        await call.write(b"\xff" * 10)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        await handled(server, "client_stream/ClientStream", "INVALID_ARGUMENT")


async def test_a_message_over_the_limit_is_refused_and_the_server_lives_on() -> None:
    async with echoing() as (server, stub), grpc.aio.insecure_channel(server.address) as channel:
        greedy = EchoStub(channel)  # without our limits, so that the server has to refuse
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await greedy.unary(StringValue(value="x" * (LIMIT + 1)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await stub.unary(HELLO) == HELLO


async def test_a_message_over_four_mebibytes_passes_where_the_limit_allows_it() -> None:
    async def length(request, context):
        return StringValue(value=str(len(request.value)))

    async with echoing(Echo(unary=length), max_message_bytes=16 << 20) as (server, _):
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(server.address, options=options) as channel:
            answer = await EchoStub(channel).unary(StringValue(value="x" * (5 << 20)))
    assert json.loads(answer.value) == 5 << 20


@pytest.mark.parametrize("kind", ["unary", "server_stream"])
async def test_an_answer_over_the_limit_is_an_error_and_the_server_lives_on(kind: str) -> None:
    async def unary(request, context):
        return StringValue(value="x" * (LIMIT + 1)) if request.value == "hello" else request

    async def stream(request, context):
        yield HELLO
        yield await unary(request, context)

    async with echoing(Echo(unary=unary, server_stream=stream)) as (server, stub):
        error = await asyncio.wait_for(fails(stub, kind), 5)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await handled(server, "unary/Unary" if kind == "unary" else "server_stream/ServerStream", "RESOURCE_EXHAUSTED")
        assert (await stub.unary(StringValue(value="ok"))).value == "ok"


async def test_a_code_that_the_servicer_aborts_with_or_sets_is_kept_and_counted() -> None:
    async def abort(request, context):
        await context.abort(grpc.StatusCode.ALREADY_EXISTS, "twice")

    async def set_code(requests, context):
        [_ async for _ in requests]
        context.set_code(grpc.StatusCode.DATA_LOSS)
        context.set_details("gone")
        return StringValue()

    async with echoing(Echo(unary=abort, client_stream=set_code)) as (server, stub):
        aborted, set_ = await fails(stub, "unary"), await fails(stub, "client_stream")
        assert (aborted.code(), aborted.details()) == (grpc.StatusCode.ALREADY_EXISTS, "twice")
        assert (set_.code(), set_.details()) == (grpc.StatusCode.DATA_LOSS, "gone")
        await handled(server, "unary/Unary", "ALREADY_EXISTS")
        await handled(server, "client_stream/ClientStream", "DATA_LOSS")
