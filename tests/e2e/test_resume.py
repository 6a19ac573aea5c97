"""The diffusion service by itself: checkpoints on its stream, going on from one, handing back when it drains."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import diffusion_service_pb2_grpc as rpc
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.tensors import from_proto, to_proto
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.service import create

LOCAL = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0"}


@pytest.fixture
async def servers(models: Path) -> AsyncIterator[list[Any]]:
    """Two replicas."""
    config = DiffusionConfig(**LOCAL, backend="torch", models=str(models), dtype="float32")
    found = [create(config, Lane("diffusion")) for _ in range(2)]
    for server in found:
        await server.start()
    yield found
    for server in found:
        await server.stop()


def a_request(scheduler: str = "Euler a", steps: int = 8, **more: Any) -> pb.SampleRequest:
    numbers = np.random.default_rng(0).normal(size=(2, 1, 5, 32)).astype(np.float32)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return pb.SampleRequest(
        model="tiny-sd", conditioning={name: to_proto(one) for name, one in zip(names, numbers, strict=True)},
        width=64, height=64, steps=steps, guidance_scale=4.0, scheduler=scheduler, seeds=[5], **more,
    )  # fmt: skip


async def sample(server: Any, request: pb.SampleRequest) -> list[pb.SampleResponse]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        return [response async for response in rpc.DiffusionServiceStub(channel).Sample(request)]


def latents(responses: list[pb.SampleResponse]) -> np.ndarray:
    return from_proto(responses[-1].result.outputs["latents"], "latents")


async def test_checkpoints_come_as_often_as_asked_and_another_replica_goes_on(servers: list[Any]) -> None:
    plain = await sample(servers[0], a_request())
    told = await sample(servers[0], a_request(checkpoint_every=3))
    frozen = [response.checkpoint for response in told if response.WhichOneof("event") == "checkpoint"]
    assert [one.evaluation for one in frozen] == [3, 6]
    assert not [one for one in plain if one.WhichOneof("event") == "checkpoint"]
    resumed = await sample(servers[1], a_request(resume_from=frozen[-1]))
    steps = [response.progress.step for response in resumed if response.WhichOneof("event") == "progress"]
    assert steps == [7, 8]
    np.testing.assert_array_equal(latents(resumed), latents(plain))
    np.testing.assert_array_equal(latents(told), latents(plain))


async def drained_at_step(server: Any, request: pb.SampleRequest, step: int) -> tuple[list[pb.SampleResponse], Any]:
    """What came until the stream ended, and how it ended."""
    heard: list[pb.SampleResponse] = []
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = rpc.DiffusionServiceStub(channel).Sample(request)
        try:
            async for response in call:
                heard.append(response)
                if response.progress.step == step:
                    draining = asyncio.create_task(server.drain())
        except grpc.aio.AioRpcError:
            await draining
        return heard, await call.code()


async def test_a_replica_that_drains_hands_back_and_no_step_is_done_twice(servers: list[Any]) -> None:
    wanted = latents(await sample(servers[0], a_request("DPM++ 2M SDE Karras", steps=30)))
    request = a_request("DPM++ 2M SDE Karras", steps=30, checkpoint_every=1000)
    heard, code = await drained_at_step(servers[0], request, 4)
    assert code is grpc.StatusCode.UNAVAILABLE
    checkpoint = heard[-1].checkpoint
    steps_before = [one.progress.step for one in heard if one.WhichOneof("event") == "progress"]
    request.resume_from.CopyFrom(checkpoint)
    after = await sample(servers[1], request)
    steps_after = [one.progress.step for one in after if one.WhichOneof("event") == "progress"]
    assert steps_before + steps_after == list(range(1, 31))
    np.testing.assert_array_equal(latents(after), wanted)


async def test_a_draining_replica_ends_what_could_not_go_elsewhere(servers: list[Any]) -> None:
    under_way = asyncio.create_task(sample(servers[0], a_request(steps=20)))
    await asyncio.sleep(0)
    await servers[0].drain()
    assert (await under_way)[-1].WhichOneof("event") == "result"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await sample(servers[0], a_request(checkpoint_every=5))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


BROKEN = {
    "of another request": lambda one: a_request("Heun", resume_from=one),
    "with another seed": lambda one: _changed(a_request(resume_from=one), seeds=[6]),
    "of another model": lambda one: a_request(resume_from=_changed(one, fingerprint="0" * 64)),
    "truncated": lambda one: a_request(resume_from=_changed(one, state=one.state[:20])),
    "without its tensors": lambda one: a_request(resume_from=pb.SampleCheckpoint(
        evaluation=one.evaluation, fingerprint=one.fingerprint, state=one.state)),
    "beyond the end": lambda one: a_request(resume_from=_changed(one, evaluation=8)),
    "with an index its scheduler has no sigma for": lambda one: a_request(
        resume_from=_changed(one, state='{"scheduler": {"_step_index": 4000}}')),
    "with text for an index": lambda one: a_request(
        resume_from=_changed(one, state='{"scheduler": {"_step_index": "three"}}')),
}  # fmt: skip


def _changed(message: Any, **fields: Any) -> Any:
    for name, value in fields.items():
        message.ClearField(name)
        message.MergeFrom(type(message)(**{name: value}))
    return message


@pytest.mark.parametrize("how", BROKEN)
async def test_a_checkpoint_that_does_not_fit_is_refused(servers: list[Any], how: str) -> None:
    told = await sample(servers[0], a_request(checkpoint_every=3))
    checkpoint = next(one.checkpoint for one in told if one.WhichOneof("event") == "checkpoint")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await sample(servers[0], BROKEN[how](checkpoint))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "resume_from" in (caught.value.details() or "")
