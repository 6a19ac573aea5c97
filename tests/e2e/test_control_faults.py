"""ControlNets that go in the middle of a generation, and sessions by the thousand."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import diffusion_service_pb2_grpc as rpc
from imagemesh_runtime.errors import InvalidArgument, MeshError, Unavailable
from imagemesh_runtime.replicas import Replicas
from imagemesh_runtime.tensors import from_proto, to_proto
from imagemesh_services.controlnet import service as controlnet
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.controlnet.servicer import ControlNetServicer
from imagemesh_services.diffusion import service as diffusion
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.control import open_control
from imagemesh_services.diffusion.controlnets import ControlNets
from tests.support.processes import start
from tests.support.services import serving
from tests.support.steering import PICTURE, TOLD, ask, peering, same, steered

FAKE = {"IMAGEMESH_BACKEND": "fake"}
STEPS = 8


def units(*models: str) -> list[pb.ControlUnit]:
    return [pb.ControlUnit(model=model, image=to_proto(PICTURE), scale=1.0) for model in models]


def request(**changes: Any) -> pb.SampleRequest:
    embeds = to_proto(np.ones((1, 8, 4), dtype=np.float32))
    return pb.SampleRequest(
        model="fake", conditioning={"prompt_embeds": embeds}, width=64, height=64, steps=STEPS, seeds=[1],
        controls=units("fake"), **changes,
    )  # fmt: skip


@asynccontextmanager
async def sampler(replicas: int) -> AsyncIterator[rpc.DiffusionServiceStub]:
    """A sampler with so many ControlNet services."""
    async with AsyncExitStack() as stack:
        addresses = []
        for _ in range(replicas):
            config = ControlNetConfig(listen="127.0.0.1:0", backend="fake", drain_grace_seconds=0.1)
            addresses.append((await stack.enter_async_context(serving(controlnet.create, config))).server.address)
        asked = DiffusionConfig(
            listen="127.0.0.1:0", backend="fake", controlnet=",".join(addresses), drain_grace_seconds=0.1
        )
        yield rpc.DiffusionServiceStub((await stack.enter_async_context(serving(diffusion.create, asked))).channel)


class Dying:
    """The first session that has answered three steps ends, as if its service were killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.servicers, whole = 3, [], ControlNetServicer._answers

        async def answers(servicer: Any, *given: Any) -> AsyncIterator[Any]:
            self.servicers.append(servicer)
            self.left -= 1
            if self.left == -1:
                raise Unavailable("controlnet", "is killed")
            async for answer in whole(servicer, *given):
                yield answer

        monkeypatch.setattr(ControlNetServicer, "_answers", answers)


async def drawn(stub: rpc.DiffusionServiceStub) -> np.ndarray:
    last = [response async for response in stub.Sample(request(), timeout=60)][-1]
    return from_proto(last.result.outputs["latents"], "latents")


async def test_the_step_is_done_again_on_another_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    async with sampler(2) as stub:
        undisturbed = await drawn(stub)
        dying = Dying(monkeypatch)
        np.testing.assert_array_equal(await drawn(stub), undisturbed)
    first, second = dying.servicers[0], dying.servicers[-1]
    assert first is not second
    assert dying.servicers == [first] * 4 + [second] * (STEPS - 3)


async def test_without_another_replica_the_controlnet_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async with sampler(1) as stub:
        Dying(monkeypatch)
        with pytest.raises(grpc.aio.AioRpcError, match="controlnet: is killed") as caught:
            await drawn(stub)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (await drawn(stub)).size


async def test_a_process_that_is_killed_is_replaced_by_another(tmp_path: Path) -> None:
    addresses = [f"unix:{tmp_path}/{name}.sock" for name in "ab"]
    async with AsyncExitStack() as stack:
        processes = {address: stack.enter_context(start("controlnet", address, FAKE)) for address in addresses}
        for process in processes.values():
            await asyncio.to_thread(process.wait_ready)
        peers = [(await stack.enter_async_context(peering(address)))[0] for address in addresses]
        asking = await stack.enter_async_context(
            open_control(ControlNets(Replicas(peers, 5)), units("fake"), TOLD, 1, 30)
        )
        before = await ask(asking)
        at = asking._asked[0]._peer.address
        processes[at].process.kill()
        assert same(await ask(asking), before)
        assert asking._asked[0]._peer.address != at


async def test_units_are_shared_out_to_services_that_have_them_and_summed_in_their_order(
    models: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    os.symlink(models / "tiny-controlnet", tmp_path / "other" / "mine")
    async with steered(models) as one, steered(tmp_path / "other") as other:
        nets = ControlNets(Replicas([one.peer, other.peer], 5))
        async with open_control(nets, units("mine", "tiny-controlnet", "mine"), TOLD, 1, 30) as control:
            shares = {asked._peer: list(asked.places) for asked in control._asked}
            assert shares == {one.peer: [1], other.peer: [0, 2]}
            both = await ask(control)
            first, second = await ask(control, places=[0, 2]), await ask(control, places=[1])
        for got, a, b in zip([*both.down, both.mid], [*first.down, first.mid], [*second.down, second.mid], strict=True):
            np.testing.assert_array_equal(got, a + b)


async def test_units_of_services_whose_models_differ_are_not_added(models: Path) -> None:
    async with steered() as one, steered(models) as other:
        nets = ControlNets(Replicas([one.peer, other.peer], 5))
        async with open_control(nets, units("fake", "tiny-controlnet"), TOLD, 1, 30) as control:
            with pytest.raises(InvalidArgument, match="ControlNets of one family"):
                await ask(control)


async def test_a_model_that_no_service_has_is_named(models: Path) -> None:
    async with steered() as one, steered() as other:
        nets = ControlNets(Replicas([one.peer, other.peer], 5))
        async with open_control(nets, units("fake", "canny"), TOLD, 1, 30) as control:
            with pytest.raises(MeshError, match="model 'canny' not found; available: fake"):
                await ask(control)


async def test_no_service_in_reach_is_told_so(tmp_path: Path) -> None:
    async with peering(f"unix:{tmp_path}/a.sock") as (one, _), peering(f"unix:{tmp_path}/b.sock") as (other, _):
        with pytest.raises(Unavailable, match="controlnet: none of 2 can be reached"):
            async with open_control(ControlNets(Replicas([one, other], 5)), units("fake"), TOLD, 1, 30):
                pass
