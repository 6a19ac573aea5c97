"""A peer's failures under its name and in time, and conversations with it."""

import asyncio
from contextlib import aclosing, asynccontextmanager, suppress
from time import monotonic

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import status_pb2

from imagemesh_runtime.client import Hop, Peer, Session, translate
from imagemesh_runtime.context import CallContext, current_call, set_current_call
from imagemesh_runtime.errors import DeadlineExceeded, InvalidArgument, MeshError, Overloaded, RemoteError, Unavailable
from tests.support.echo import LIMIT, Echo, EchoStub, calling, echoing, handled, serving, status_of

HELLO = StringValue(value="hello")
LATE = "echo: .*deadline"


@asynccontextmanager
async def peering(echo: Echo | None = None, **settings):
    """(server, peer, stub). The server's deadline and the client's pass at the same time: either may name it."""
    async with serving(echo, **settings) as server:
        peer = Peer("echo", server.address, max_message_bytes=LIMIT)
        yield server, peer, EchoStub(peer.channel)
        await peer.close()


def give_the_current_call(seconds: float) -> None:
    set_current_call(CallContext(deadline=monotonic() + seconds))


async def hang(request, context):
    await asyncio.Event().wait()


async def hanging_stream(request, context):
    yield HELLO
    await asyncio.Event().wait()


async def test_a_service_that_is_down_is_unavailable_by_name_within_the_deadline() -> None:
    async with serving() as server:
        address = server.address
    peer = Peer("vae", address, max_message_bytes=LIMIT)
    give_the_current_call(5)
    with pytest.raises(Unavailable, match=f"vae: cannot be reached at {address}"):
        await peer.unary(EchoStub(peer.channel).unary, HELLO)
    with pytest.raises(Unavailable, match="vae"):
        [_ async for _ in peer.stream(EchoStub(peer.channel).server_stream, HELLO)]
    assert current_call().remaining() > 0
    await peer.close()


async def test_a_service_that_hangs_is_named_before_the_callers_own_deadline() -> None:
    async with peering(Echo(unary=hang, server_stream=hanging_stream)) as (_, peer, stub):
        give_the_current_call(0.5)
        with pytest.raises(MeshError, match=LATE) as unary:
            await peer.unary(stub.unary, HELLO)
        assert current_call().remaining() > 0
        give_the_current_call(0.5)
        with pytest.raises(MeshError, match=LATE) as stream:
            [_ async for _ in peer.stream(stub.server_stream, HELLO)]
        assert current_call().remaining() > 0
    assert unary.value.code is stream.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_across_two_hops_the_client_hears_which_service_hung() -> None:
    async with serving(Echo(unary=hang), service="far") as server:
        peer = Peer("far", server.address, max_message_bytes=LIMIT)
        far = EchoStub(peer.channel)

        async def ask(request, context):
            return await peer.unary(far.unary, request)

        async with echoing(Echo(unary=ask)) as (server, stub):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.unary(HELLO, timeout=1.0)
            await handled(server, "unary/Unary", "DEADLINE_EXCEEDED")
        await peer.close()
    assert caught.value.details().startswith("far: ")


async def test_a_deadline_that_has_passed_is_told_at_once() -> None:
    async with peering() as (_, peer, stub):
        give_the_current_call(-1)
        with pytest.raises(DeadlineExceeded, match="echo"):
            await peer.unary(stub.unary, HELLO)


async def test_a_calls_own_limit_holds_below_the_deadline() -> None:
    async with peering(Echo(unary=hang)) as (_, peer, stub):
        with pytest.raises(MeshError, match=LATE):
            await asyncio.wait_for(peer.unary(stub.unary, HELLO, timeout_seconds=0.05), 5)


@pytest.mark.parametrize("error", [InvalidArgument("steps", 0, "1 to 9"), Overloaded("vae", 8, 1.5)], ids=type)
async def test_rich_errors_are_handed_on_unchanged(error: MeshError) -> None:
    async def fail(request, context):
        raise error

    async with peering(Echo(unary=fail)) as (_, peer, far):

        async def ask(request, context):
            return await peer.unary(far.unary, request)

        async with echoing(Echo(unary=ask)) as (_, stub):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.unary(HELLO)
    assert caught.value.code() is error.code
    assert status_of(caught.value) == error.to_status()
    pushback = dict(caught.value.trailing_metadata()).get("grpc-retry-pushback-ms")
    assert pushback == ("1500" if isinstance(error, Overloaded) else None)


async def test_a_bare_status_gets_the_services_name() -> None:
    async with serving() as server:
        peer = Peer("vae", server.address, max_message_bytes=LIMIT)
        with pytest.raises(RemoteError, match="vae: ") as caught:
            await peer.unary(peer.channel.unary_unary("/test.Nobody/Unary", HELLO.__class__.SerializeToString), HELLO)
        await peer.close()
    assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("details", [b"\xff\xff", status_pb2.Status(code=0).SerializeToString(), b""])
def test_a_peers_nonsensical_status_is_a_bare_one(details: bytes) -> None:
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", details))
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), trailing, "gone")
    assert isinstance(translate("vae", "here:1", error), Unavailable)


async def test_a_request_over_the_limit_is_refused_by_name() -> None:
    async with peering() as (_, peer, stub):
        with pytest.raises(RemoteError, match="echo: ") as caught:
            await peer.unary(stub.unary, StringValue(value="x" * (LIMIT + 1)))
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_channel_that_is_closed_is_unavailable_and_no_cancel() -> None:
    begun = asyncio.Event()

    async def hang_here(request, context):
        begun.set()
        await asyncio.Event().wait()

    async with peering(Echo(unary=hang_here)) as (_, peer, stub):
        call = asyncio.create_task(peer.unary(stub.unary, HELLO))
        await begun.wait()
        await peer.close()
        with pytest.raises(Unavailable, match="echo"):
            await asyncio.wait_for(call, 5)
        with pytest.raises(Unavailable, match="echo"):
            await peer.unary(stub.unary, HELLO)


async def test_a_caller_that_is_cancelled_cancels_the_peer() -> None:
    begun = asyncio.Event()

    async def hang_here(request, context):
        begun.set()
        await asyncio.Event().wait()

    async with peering(Echo(unary=hang_here)) as (server, peer, stub):
        call = asyncio.create_task(peer.unary(stub.unary, HELLO))
        await begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await handled(server, "unary/Unary", "CANCELLED")


async def test_leaving_a_stream_cancels_it() -> None:
    async with peering(Echo(server_stream=hanging_stream)) as (server, peer, stub):
        async with aclosing(peer.stream(stub.server_stream, HELLO)) as answers:
            assert await anext(answers) == HELLO
        await handled(server, "server_stream/ServerStream", "CANCELLED")


async def test_a_hop_knows_its_bytes_and_its_seconds() -> None:
    async def work(request, context):
        current_call().compute_seconds += 0.001
        current_call().queue_seconds += 0.002
        return StringValue(value="x" * 100)

    async with peering(Echo(unary=work)) as (_, peer, stub):
        hop = Hop()
        answer = await peer.unary(stub.unary, HELLO, hop)
    assert (hop.bytes_sent, hop.bytes_received) == (HELLO.ByteSize(), answer.ByteSize())
    assert (hop.compute_seconds, hop.queue_seconds) == (0.001, 0.002)
    assert hop.seconds > 0


async def test_a_streams_hop_sums_its_messages() -> None:
    async with peering() as (_, peer, stub):
        hop = Hop()
        answers = [answer async for answer in peer.stream(stub.server_stream, HELLO, hop)]
    assert hop.bytes_received == sum(answer.ByteSize() for answer in answers) > 0
    assert hop.seconds > 0


async def test_a_session_answers_each_question_and_ends_well() -> None:
    async with peering() as (server, peer, stub):
        session: Session[StringValue]
        async with peer.session(stub.bidi_stream) as session:
            for word in ("one", "two", "three"):
                assert (await session.ask(StringValue(value=word))).value == word
        await handled(server, "bidi_stream/BidiStream", "OK")


async def test_an_error_in_a_session_cancels_it() -> None:
    async with peering() as (server, peer, stub):
        with suppress(KeyError):
            async with peer.session(stub.bidi_stream) as session:
                await session.ask(HELLO)
                raise KeyError("mine")
        await handled(server, "bidi_stream/BidiStream", "CANCELLED")


class Ending:
    """A conversation that answers once, then ends: with an error, or with nothing."""

    def __init__(self, error: MeshError | None) -> None:
        self.error = error

    async def talk(self, requests, context):
        async for request in requests:
            yield request
            break
        if self.error is not None:
            raise self.error


BAD = InvalidArgument("step.sample", "NaN", "finite")


@pytest.mark.parametrize(
    ("error", "match"), [(BAD, "step.sample must be finite"), (None, "echo: it ended the session")]
)
async def test_a_session_that_the_peer_ends_says_why(error: MeshError | None, match: str) -> None:
    async with peering(Echo(bidi_stream=Ending(error).talk)) as (_, peer, stub):
        async with peer.session(stub.bidi_stream) as session:
            await session.ask(HELLO)
            for _ in range(3):  # also when asked again
                with pytest.raises(MeshError, match=match) as caught:
                    await session.ask(HELLO)
        if error is not None:
            assert caught.value.to_status() == error.to_status()


async def test_a_peer_that_ends_a_session_while_we_talk_is_quoted() -> None:
    async def refuse(requests, context):
        raise BAD
        yield

    async with peering(Echo(bidi_stream=refuse)) as (_, peer, stub), peer.session(stub.bidi_stream) as session:

        async def talk() -> None:
            while True:
                await session.send(StringValue(value="x" * 10_000))

        with pytest.raises(MeshError, match=r"step\.sample must be finite") as caught:
            await talk()
    assert caught.value.to_status() == BAD.to_status()


async def test_a_session_with_a_service_that_is_down_is_unavailable_by_name() -> None:
    async with serving() as server:
        peer = Peer("controlnet", server.address, max_message_bytes=LIMIT)
    async with peer.session(EchoStub(peer.channel).bidi_stream) as session:
        with pytest.raises(Unavailable, match="controlnet: cannot be reached"):
            await session.ask(HELLO)
    await peer.close()


async def test_a_session_whose_peer_hangs_ends_with_the_deadline() -> None:
    async with peering(Echo(bidi_stream=hanging_stream)) as (_, peer, stub):
        give_the_current_call(0.3)
        async with peer.session(stub.bidi_stream) as session:
            await session.ask(HELLO)
            with pytest.raises(MeshError, match=LATE):
                await session.ask(HELLO)


async def test_leaving_a_session_does_not_wait_for_a_peer_that_talks_on() -> None:
    async with peering(Echo(bidi_stream=hanging_stream)) as (server, peer, stub):
        async with asyncio.timeout(5), peer.session(stub.bidi_stream) as session:
            await session.ask(HELLO)
        await handled(server, "bidi_stream/BidiStream", "CANCELLED")


async def test_a_peer_over_a_unix_socket_works(tmp_path) -> None:
    async with peering(listen=f"unix:{tmp_path}/far.sock") as (_, peer, stub):
        assert await peer.unary(stub.unary, HELLO) == HELLO


async def test_a_service_that_comes_back_is_found_again() -> None:
    async with serving() as server:
        address = server.address
        peer = Peer("echo", address, max_message_bytes=LIMIT)
        stub = EchoStub(peer.channel)
        assert await peer.unary(stub.unary, HELLO) == HELLO
    with pytest.raises(Unavailable):
        await peer.unary(stub.unary, HELLO)
    async with serving(listen=address) as server, calling(server), asyncio.timeout(10):
        await peer.channel.channel_ready()
        assert await peer.unary(stub.unary, HELLO) == HELLO
    await peer.close()
