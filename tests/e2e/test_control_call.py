"""The sampler's call to a ControlNet carries the deadline and the trace of the generation that it is for."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest

from imagemesh.v1 import controlnet_service_pb2 as control_pb
from imagemesh.v1 import controlnet_service_pb2_grpc as control_rpc
from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import diffusion_service_pb2_grpc as rpc
from imagemesh_runtime.context import Trace
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.tensors import to_proto
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.service import create


class Recording(control_rpc.ControlNetServiceServicer):
    """Notes what a session came with; answers zeros, or nothing at all, or what does not fit."""

    def __init__(self) -> None:
        self.traces: list[str] = []
        self.remaining: list[float] = []
        self.hangs = False
        self.empty = 0  # messages before a step's residuals
        self.mid = np.zeros((1, 1, 1, 1), np.float32)
        self.ended = asyncio.Event()

    async def Control(self, request_iterator: Any, context: Any) -> AsyncIterator[control_pb.ControlResponse]:
        self.traces.append(dict(context.invocation_metadata())["traceparent"])
        self.remaining.append(context.time_remaining())
        try:
            async for request in request_iterator:
                if request.WhichOneof("message") != "step":
                    continue
                if self.hangs:
                    await asyncio.Event().wait()
                for _ in range(self.empty):
                    yield control_pb.ControlResponse()
                zeros = to_proto(np.zeros((1, 4, 8, 8), np.float32))
                yield control_pb.ControlResponse(down_residuals=[zeros], mid_residual=to_proto(self.mid))
        finally:
            self.ended.set()


@pytest.fixture
async def controlnet() -> AsyncIterator[tuple[Recording, str]]:
    server, recording = grpc.aio.server(), Recording()
    control_rpc.add_ControlNetServiceServicer_to_server(recording, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield recording, f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def sampler(controlnet: tuple[Recording, str]) -> AsyncIterator[Any]:
    lane = Lane("test")
    config = DiffusionConfig(
        listen="127.0.0.1:0", backend="fake", controlnet=controlnet[1], control_timeout_seconds=0.5,
        drain_grace_seconds=1,
    )  # fmt: skip
    server = create(config, lane)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield rpc.DiffusionServiceStub(channel)
    await server.stop()
    lane.close()


def request(steps: int = 3, side: int = 64) -> pb.SampleRequest:
    embeds = to_proto(np.ones((1, 8, 4), dtype=np.float32))
    unit = pb.ControlUnit(model="fake", image=to_proto(np.zeros((side, 64, 3), np.uint8)), scale=1)
    return pb.SampleRequest(
        model="fake", conditioning={"prompt_embeds": embeds}, width=64, height=64, steps=steps, seeds=[1],
        controls=[unit],
    )  # fmt: skip


async def test_deadline_and_trace_reach_the_controlnet(controlnet: tuple[Recording, str], sampler: Any) -> None:
    trace = Trace.start()
    call = sampler.Sample(request(), timeout=20, metadata=(("traceparent", trace.header),))
    assert [response async for response in call][-1].result.evaluations == 3
    recording = controlnet[0]
    (arrived,) = recording.traces
    assert Trace.parse(arrived).trace_id == trace.trace_id  # type: ignore[union-attr]
    assert 0 < recording.remaining[0] < 20


async def test_a_controlnet_that_hangs_is_named_and_its_session_ended(
    controlnet: tuple[Recording, str], sampler: Any
) -> None:
    controlnet[0].hangs = True
    with pytest.raises(grpc.RpcError) as caught:
        [response async for response in sampler.Sample(request(), timeout=20)]
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "controlnet: no residuals within 0.5 s" in caught.value.details()
    await asyncio.wait_for(controlnet[0].ended.wait(), timeout=10)


async def test_a_step_begins_with_one_empty_message_at_most(controlnet: tuple[Recording, str], sampler: Any) -> None:
    controlnet[0].empty = 1
    assert [response async for response in sampler.Sample(request(), timeout=20)][-1].result.evaluations == 3
    controlnet[0].empty = 2
    with pytest.raises(grpc.RpcError, match="down_residuals must be one with residuals, got 'an empty message'"):
        [response async for response in sampler.Sample(request(), timeout=20)]


async def test_a_cancelled_generation_ends_its_session(controlnet: tuple[Recording, str], sampler: Any) -> None:
    call = sampler.Sample(request(steps=1000), timeout=20)
    while (await call.read()).WhichOneof("event") != "progress":
        pass
    call.cancel()
    await asyncio.wait_for(controlnet[0].ended.wait(), timeout=10)


async def test_residuals_that_are_not_finite_are_not_used(controlnet: tuple[Recording, str], sampler: Any) -> None:
    controlnet[0].mid = np.full((1, 1, 1, 1), np.inf, np.float32)
    with pytest.raises(grpc.RpcError, match="mid_residual must be finite"):
        [response async for response in sampler.Sample(request(), timeout=20)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"side": 32}, "controls[0].image.shape must be [64, 64, 3], got [32, 64, 3]"),
        ({"inputs": "noise"}, "inputs must be a map of image_mean, image_log_variance, image_latents, mask, "),
        (
            {"conditioning": "pooled"},
            "conditioning must be a map of prompt_embeds and negative_prompt_embeds and prompt_phases and "
            "negative_prompt_phases alone",
        ),
        ({"tokens": 0}, "conditioning['prompt_embeds'].shape[1] must be 1 to 4096, got 0"),
        ({"tokens": 5000}, "conditioning['prompt_embeds'].shape[1] must be 1 to 4096, got 5000"),
    ],
)
async def test_what_the_sampler_cannot_use_is_refused_by_name(sampler: Any, change: dict[str, Any], said: str) -> None:
    asked = request(side=change.get("side", 64))
    if "inputs" in change:
        asked.inputs[change["inputs"]].CopyFrom(to_proto(np.zeros(1, np.float32)))
    if "conditioning" in change:
        asked.conditioning["pooled"].CopyFrom(to_proto(np.zeros(1, np.float32)))
    if "tokens" in change:
        asked.conditioning["prompt_embeds"].CopyFrom(to_proto(np.zeros((1, change["tokens"], 4), np.float32)))
    with pytest.raises(grpc.RpcError) as caught:
        [response async for response in sampler.Sample(asked, timeout=20)]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in caught.value.details()
