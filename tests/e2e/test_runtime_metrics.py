"""grpc_server_* say exactly what was served; deadlines and cancels are told apart."""

import asyncio

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from imagemesh_runtime.client import Peer
from imagemesh_runtime.context import current_call, parse_server_timing
from tests.support.echo import Echo, EchoStub, calling, echoing, handled, scraped, serving, status_of

HELLO = StringValue(value="hello")


def words(*values: str) -> list[StringValue]:
    return [StringValue(value=value) for value in values]


class Hang:
    """A method that hangs; the events tell that it began and how it ended."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()

    async def unary(self, request, context):
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def stream(self, request, context):
        yield HELLO
        await self.unary(request, context)

    async def flood(self, request, context):
        """Sends until the client's window is full and the write waits."""
        self.begun.set()
        try:
            while True:
                yield StringValue(value="x" * 100_000)
        finally:
            self.ended.set()


async def test_all_four_kinds_are_counted_exactly() -> None:
    async with echoing() as (server, stub):
        for _ in range(3):
            await stub.unary(HELLO)
        assert [answer async for answer in stub.server_stream(HELLO)] == words(*"hello")
        assert (await stub.client_stream(iter(words("a", "b")))).value == "ab"
        assert [answer async for answer in stub.bidi_stream(iter(words("a", "b")))] == words("a", "b")
        samples = await handled(server, "bidi_stream/BidiStream", "OK")
    calls = {
        "unary/Unary": 3,
        "server_stream/ServerStream": 1,
        "client_stream/ClientStream": 1,
        "bidi_stream/BidiStream": 1,
    }
    received = {**calls, "client_stream/ClientStream": 2, "bidi_stream/BidiStream": 2}
    sent = {**calls, "server_stream/ServerStream": 5, "bidi_stream/BidiStream": 2}
    for method in calls:
        assert samples["grpc_server_started_total", method] == calls[method]
        assert samples["grpc_server_handled_total", f"{method}/OK"] == calls[method]
        assert samples["grpc_server_handling_seconds_count", method] == calls[method]
        assert samples["grpc_server_msg_received_total", method] == received[method]
        assert samples["grpc_server_msg_sent_total", method] == sent[method]
    assert len([name for name, _ in samples if name == "grpc_server_handled_total"]) == 4


async def test_methods_that_read_and_write_by_themselves_are_counted_alike() -> None:
    async def bidi(requests, context):
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request)

    async with echoing(Echo(bidi_stream=bidi)) as (server, stub):
        assert [answer async for answer in stub.bidi_stream(iter(words("a", "b")))] == words("a", "b")
        samples = await handled(server, "bidi_stream/BidiStream", "OK")
    assert samples["grpc_server_msg_received_total", "bidi_stream/BidiStream"] == 2
    assert samples["grpc_server_msg_sent_total", "bidi_stream/BidiStream"] == 2


@pytest.mark.parametrize("kind", ["unary", "server_stream"])
async def test_a_hang_ends_with_the_callers_deadline_and_counts_as_such(kind: str) -> None:
    hang = Hang()
    async with echoing(Echo(unary=hang.unary, server_stream=hang.stream)) as (server, stub):
        call = getattr(stub, kind)(HELLO, timeout=0.3)
        if kind == "server_stream":
            await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call if kind == "unary" else call.read())
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(hang.ended.wait(), 5)
        await handled(server, "unary/Unary" if kind == "unary" else "server_stream/ServerStream", "DEADLINE_EXCEEDED")


async def test_a_hang_without_a_deadline_ends_with_the_servers_own() -> None:
    hang = Hang()
    async with echoing(Echo(unary=hang.unary), request_timeout_seconds=0.1) as (server, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.unary(HELLO)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert status_of(caught.value).message == "echo: Unary did not end within its deadline"
        assert hang.ended.is_set()
        await handled(server, "unary/Unary", "DEADLINE_EXCEEDED")


@pytest.mark.parametrize("method", ["unary", "stream", "flood"])
async def test_a_caller_that_goes_ends_the_servicer_and_counts_as_cancelled(method: str) -> None:
    hang = Hang()
    async with echoing(Echo(unary=hang.unary, server_stream=getattr(hang, method))) as (server, stub):
        call = stub.unary(HELLO) if method == "unary" else stub.server_stream(HELLO)
        await hang.begun.wait()
        call.cancel()
        await asyncio.wait_for(hang.ended.wait(), 5)
        await handled(server, "unary/Unary" if method == "unary" else "server_stream/ServerStream", "CANCELLED")


async def test_a_client_that_leaves_a_stream_half_heard_counts_as_cancelled() -> None:
    hang = Hang()
    async with echoing(Echo(server_stream=hang.flood)) as (server, stub):
        call = stub.server_stream(HELLO)
        await call.read()
        call.cancel()
        await asyncio.wait_for(hang.ended.wait(), 5)
        await handled(server, "server_stream/ServerStream", "CANCELLED")


async def test_no_call_is_counted_twice_whatever_its_end() -> None:
    hang = Hang()
    async with echoing(Echo(server_stream=hang.stream)) as (server, stub):
        for _ in range(5):
            call = stub.server_stream(HELLO)
            await call.read()
            call.cancel()

        def all_ended(samples) -> bool:
            return samples.get(("grpc_server_handling_seconds_count", "server_stream/ServerStream")) == 5

        samples = await scraped(server, all_ended)
    codes = [value for (name, _), value in samples.items() if name == "grpc_server_handled_total"]
    assert sum(codes) == 5


async def test_an_answer_tells_what_it_cost() -> None:
    async def unary(request, context):
        current_call().compute_seconds += 0.25
        current_call().queue_seconds += 0.5
        return request

    async with echoing(Echo(unary=unary)) as (_, stub):
        call = stub.unary(HELLO)
        await call
        timing = dict(await call.trailing_metadata())["server-timing"]
    assert parse_server_timing(timing) == {"compute": 0.25, "queue": 0.5}


async def test_trailing_metadata_of_the_servicers_own_is_kept() -> None:
    async def unary(request, context):
        context.set_trailing_metadata((("x-mine", "1"),))
        return request

    async with echoing(Echo(unary=unary)) as (_, stub):
        call = stub.unary(HELLO)
        await call
        assert {"x-mine", "server-timing"} <= set(dict(await call.trailing_metadata()))


async def test_one_calls_context_is_not_anothers() -> None:
    """Streams that take turns each find their own call, at every message."""

    async def stream(request, context):
        for _ in range(3):
            yield StringValue(value=current_call().trace.trace_id)

    async def heard(stub: EchoStub, trace: str) -> set[str]:
        call = stub.server_stream(HELLO, metadata=(("traceparent", f"00-{trace}-{'1' * 16}-01"),))
        return {answer.value async for answer in call}

    traces = [f"{i:032x}" for i in range(1, 6)]
    async with echoing(Echo(server_stream=stream)) as (_, stub):
        assert await asyncio.gather(*(heard(stub, trace) for trace in traces)) == [{trace} for trace in traces]


async def test_a_trace_crosses_every_hop() -> None:
    seen: list[str] = []

    async def last(request, context):
        seen.append(current_call().trace.header)
        return request

    async with serving(Echo(unary=last)) as far:
        peer = Peer("far", far.address, max_message_bytes=1 << 20)
        far_stub = EchoStub(peer.channel)

        async def first(request, context):
            seen.append(current_call().trace.header)
            return await peer.unary(far_stub.unary, request)

        async with serving(Echo(unary=first)) as near, calling(near) as stub:
            await stub.unary(HELLO, metadata=(("traceparent", f"00-{'a' * 32}-{'b' * 16}-00"),))
        await peer.close()
    assert [header.split("-")[1] for header in seen] == ["a" * 32] * 2
    assert len({"b" * 16, *(header.split("-")[2] for header in seen)}) == 3
    assert [header.split("-")[3] for header in seen] == ["00"] * 2  # who does not sample, decides for all
