"""Where the gateway takes a generation whose replica goes away, against samplers that do as the test says."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import diffusion_service_pb2_grpc as rpc
from imagemesh_gateway import placement
from imagemesh_gateway.placement import MAX_MOVES, sample
from imagemesh_runtime.client import Hop, Peer
from imagemesh_runtime.context import CallContext, set_current_call
from imagemesh_runtime.errors import Deadly, Hangs, InvalidArgument, MeshError, Overloaded, Unavailable
from imagemesh_runtime.interceptors import LayeredInterceptor, errors_layer
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.replicas import Replicas

Behaviour = Callable[[pb.SampleRequest], AsyncIterator[pb.SampleResponse]]
CHECKPOINT = pb.SampleCheckpoint(evaluation=3, fingerprint="f")


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "PAUSES", (0.01,) * 6)


class Died(Exception):
    """The process is gone: nobody is left to say what happened."""


class Sampler(rpc.DiffusionServiceServicer):
    """Behaves as told, and remembers what it was asked."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.asked: list[pb.SampleRequest] = []
        self.confirmed: asyncio.Queue[pb.ConfirmCheckpointRequest] = asyncio.Queue()

    async def ConfirmCheckpoint(
        self, request: pb.ConfirmCheckpointRequest, context: Any
    ) -> pb.ConfirmCheckpointResponse:
        self.confirmed.put_nowait(request)
        return pb.ConfirmCheckpointResponse()

    async def Sample(self, request: pb.SampleRequest, context: Any) -> AsyncIterator[pb.SampleResponse]:
        self.asked.append(request)
        try:
            async for response in self.behaviour(request):
                yield response
        except Died:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


async def finishes(request: pb.SampleRequest) -> AsyncIterator[pb.SampleResponse]:
    yield pb.SampleResponse(result=pb.SampleResult(backend="x", evaluations=request.resume_from.evaluation))


async def dies(request: pb.SampleRequest) -> AsyncIterator[pb.SampleResponse]:
    yield pb.SampleResponse(queued=pb.SampleQueued())
    yield pb.SampleResponse(started=pb.SampleStarted())
    yield pb.SampleResponse(checkpoint=CHECKPOINT)
    raise Died


async def dies_at_once(request: pb.SampleRequest) -> AsyncIterator[pb.SampleResponse]:
    yield pb.SampleResponse(queued=pb.SampleQueued())
    yield pb.SampleResponse(started=pb.SampleStarted())
    raise Died


async def dies_of_another(request: pb.SampleRequest) -> AsyncIterator[pb.SampleResponse]:
    yield pb.SampleResponse(queued=pb.SampleQueued(position=1))
    raise Died


async def hangs(request: pb.SampleRequest) -> AsyncIterator[pb.SampleResponse]:
    yield pb.SampleResponse(started=pb.SampleStarted())
    yield pb.SampleResponse(checkpoint=CHECKPOINT)
    raise Hangs("diffusion")


async def hangs_at_another(request: pb.SampleRequest) -> AsyncIterator[pb.SampleResponse]:
    yield pb.SampleResponse(started=pb.SampleStarted())
    yield pb.SampleResponse(checkpoint=CHECKPOINT)
    raise Unavailable("diffusion", "its device hangs")


async def hands_back(request: pb.SampleRequest) -> AsyncIterator[pb.SampleResponse]:
    yield pb.SampleResponse(started=pb.SampleStarted())
    yield pb.SampleResponse(checkpoint=CHECKPOINT)
    raise Unavailable("diffusion", "is going away")


async def has_lost_its_controlnet(request: pb.SampleRequest) -> AsyncIterator[pb.SampleResponse]:
    yield pb.SampleResponse(checkpoint=CHECKPOINT)
    raise Unavailable("controlnet", "cannot be reached")


async def is_another_build(request: pb.SampleRequest) -> AsyncIterator[pb.SampleResponse]:
    if request.HasField("resume_from"):
        raise InvalidArgument("resume_from.fingerprint", "f", "g")
    async for response in finishes(request):
        yield response


@asynccontextmanager
async def fleet(*behaviours: Behaviour) -> AsyncIterator[tuple[list[Sampler], Replicas]]:
    """A server a behaviour, and the gateway's view of them."""
    samplers, peers = [Sampler(behaviour) for behaviour in behaviours], []
    async with AsyncExitStack() as stack:
        for sampler in samplers:
            layers = LayeredInterceptor((errors_layer("diffusion"),), Metrics("diffusion"), 1 << 20)
            server = grpc.aio.server(interceptors=(layers,))
            rpc.add_DiffusionServiceServicer_to_server(sampler, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, 0)
            peers.append(Peer("diffusion", f"127.0.0.1:{port}", max_message_bytes=1 << 20))
            stack.push_async_callback(peers[-1].close)
        yield samplers, Replicas(peers, rest_seconds=60)


async def run(replicas: Replicas, metrics: Metrics | None = None, hop: Hop | None = None) -> pb.SampleResult:
    request = pb.SampleRequest(model="m")
    events = sample(replicas, request, hop or Hop(), metrics or Metrics("gateway"), checkpoint_every=3)
    found = [event async for event in events]
    return found[-1].result


async def test_a_generation_goes_on_from_the_last_checkpoint_elsewhere() -> None:
    metrics, hop = Metrics("gateway"), Hop()
    async with fleet(dies, dies, finishes) as (samplers, replicas):
        result = await run(replicas, metrics, hop)
        asked = [one for sampler in samplers[:2] for one in sampler.asked]
        assert result.evaluations == (3 if asked else 0)
        assert all(one.checkpoint_every == 3 for one in asked)
        moved = metrics.registry.get_sample_value("imagemesh_moved_generations_total", {"service": "gateway"})
        assert moved == len(asked)
        assert hop.moved == bool(asked)


@pytest.mark.parametrize("dying", [dies, dies_at_once, hangs])
async def test_one_that_kills_its_replicas_stops_after_two_moves_the_last_alone(dying: Behaviour) -> None:
    async with fleet(*[dying] * 5) as (samplers, replicas):
        with pytest.raises(MeshError) as caught:
            await run(replicas)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert isinstance(caught.value, Deadly)
        asked = [one for sampler in samplers for one in sampler.asked]
        assert len(asked) == MAX_MOVES + 1
        assert max(len(sampler.asked) for sampler in samplers) == 1  # never twice at one
        assert sorted(one.alone for one in asked) == [False, False, True]


@pytest.mark.parametrize("innocent", [dies_of_another, hands_back, hangs_at_another])
async def test_one_that_cannot_have_killed_its_replicas_goes_on_until_one_stays(innocent: Behaviour) -> None:
    async with fleet(*[innocent] * 4, finishes) as (samplers, replicas):
        for peer in replicas.peers[4:]:
            replicas.note_failure(peer)  # so that it comes last
        assert (await run(replicas)).evaluations == (0 if innocent is dies_of_another else 3)
        asked = [one for sampler in samplers for one in sampler.asked]
        assert len(asked) == 5
        assert not any(one.alone for one in asked)


@pytest.mark.parametrize("innocent", [dies_of_another, hands_back])
async def test_where_every_replica_is_gone_the_caller_is_told(innocent: Behaviour) -> None:
    async with fleet(innocent, innocent) as (samplers, replicas):
        with pytest.raises(MeshError) as caught:
            await run(replicas)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert not isinstance(caught.value, Deadly)
        assert [len(sampler.asked) for sampler in samplers] == [1 + len(placement.PAUSES) // 2] * 2


async def test_the_replica_is_told_of_each_checkpoint_that_has_arrived() -> None:
    async with fleet(finishes, finishes) as (samplers, replicas):

        async def waits(request: pb.SampleRequest) -> AsyncIterator[pb.SampleResponse]:
            for evaluation in (3, 6):
                yield pb.SampleResponse(checkpoint=pb.SampleCheckpoint(evaluation=evaluation))
                told = await asyncio.wait_for(samplers[0].confirmed.get(), 30)
                assert (told.confirm_as, told.evaluation) == (request.confirm_as, evaluation)
            async for response in finishes(request):
                yield response

        samplers[0].behaviour = waits
        replicas.note_failure(replicas.peers[1])
        for _ in range(2):
            await run(replicas)
        names = {one.confirm_as for one in samplers[0].asked}
        assert len(names) == 2
        assert all(len(name) >= 32 for name in names)


def fails_at_first(times: int, error: Callable[[], Exception]) -> Behaviour:
    """Answers so many who ask with the error."""
    left = iter(range(times))

    async def behaviour(request: pb.SampleRequest) -> AsyncIterator[pb.SampleResponse]:
        if next(left, None) is not None:
            raise error()
        async for response in finishes(request):
            yield response

    return behaviour


def full_at_first(times: int) -> Behaviour:
    """Has no place for so many who ask."""
    return fails_at_first(times, lambda: Overloaded("diffusion", 1, 0.01))


async def test_one_that_lost_its_replica_waits_for_a_place_at_another_and_loses_no_step() -> None:
    async with fleet(hands_back, full_at_first(2)) as (samplers, replicas):
        replicas.note_failure(replicas.peers[1])  # so that it comes last
        assert (await run(replicas)).evaluations == 3
        assert [len(sampler.asked) for sampler in samplers] == [1, 3]


async def test_where_one_replica_stops_before_the_other_is_back_the_generation_waits_for_it() -> None:
    async with fleet(hands_back, fails_at_first(2, Died)) as (samplers, replicas):
        replicas.note_failure(replicas.peers[1])  # so that it comes last
        assert (await run(replicas)).evaluations == 3
        assert [len(sampler.asked) for sampler in samplers] == [3, 3]


async def test_nobody_waits_for_a_replica_beyond_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "PAUSES", (100.0,))
    async with fleet(hands_back, hands_back) as (_, replicas):
        set_current_call(CallContext(deadline=time.monotonic() + 50))
        with pytest.raises(MeshError) as caught:
            await asyncio.wait_for(run(replicas), 30)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE


async def test_one_that_never_had_a_place_is_told_that_there_is_none() -> None:
    async with fleet(full_at_first(2), full_at_first(2)) as (samplers, replicas):
        with pytest.raises(MeshError, match="is full"):
            await run(replicas)
        assert sum(len(sampler.asked) for sampler in samplers) == 1


async def test_one_that_lost_its_replica_waits_no_longer_for_a_place_than_for_a_replica() -> None:
    async with fleet(hands_back, full_at_first(100)) as (samplers, replicas):
        replicas.note_failure(replicas.peers[1])
        with pytest.raises(MeshError, match="is full"):
            await run(replicas)
        assert len(samplers[1].asked) <= 2 + len(placement.PAUSES)


async def test_nobody_waits_for_a_place_beyond_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "PAUSES", (100.0,))
    async with fleet(hands_back, full_at_first(100)) as (_, replicas):
        replicas.note_failure(replicas.peers[1])
        set_current_call(CallContext(deadline=time.monotonic() + 0.4))
        with pytest.raises(MeshError) as caught:
            await asyncio.wait_for(run(replicas), 30)
        assert caught.value.code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_a_replica_of_another_build_starts_the_generation_again() -> None:
    async with fleet(dies, is_another_build) as (samplers, replicas):
        replicas.note_failure(replicas.peers[1])  # so that the one that dies is asked first
        assert (await run(replicas)).evaluations == 0
        assert [one.HasField("resume_from") for one in samplers[1].asked] == [True, False]


async def test_a_service_behind_the_replica_is_no_reason_to_move() -> None:
    async with fleet(has_lost_its_controlnet, finishes) as (samplers, replicas):
        replicas.note_failure(replicas.peers[1])
        with pytest.raises(MeshError, match="controlnet"):
            await run(replicas)
        assert samplers[1].asked == []


async def test_with_one_replica_no_checkpoint_is_asked_for() -> None:
    async with fleet(finishes) as (samplers, replicas):
        await run(replicas)
        assert samplers[0].asked[0].checkpoint_every == 0


async def test_a_replica_that_failed_rests_and_the_less_busy_one_gets_the_work() -> None:
    async with fleet(finishes, finishes) as (_, replicas):
        first, second = replicas.peers
        with replicas.work_on(first):
            assert {replicas.pick() for _ in range(20)} == {second}
            replicas.note_failure(second)
            assert {replicas.pick() for _ in range(20)} == {first}
            assert replicas.pick(avoid=[first]) is second  # there is nobody else
