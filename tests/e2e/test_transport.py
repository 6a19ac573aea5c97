"""Which way the bytes of tensors go, over real channels; the counters prove it."""

from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from imagemesh.v1 import controlnet_service_pb2 as pb
from imagemesh.v1 import controlnet_service_pb2_grpc as rpc
from imagemesh_client import Client, Control
from imagemesh_runtime import arena, leases, tenancy
from imagemesh_runtime.channels import channel_options
from imagemesh_runtime.tensors import from_proto, to_proto
from imagemesh_services.diffusion.backend import Residuals
from tests.support.mesh import running_mesh
from tests.support.steering import EMBEDDINGS, LIMIT, PICTURE, SAMPLE, ask, moved, payload, same, steered, until

TIMESTEPS = (981.0, 481.0)


async def test_over_tcp_residuals_come_as_raw_bytes(models: Path) -> None:
    async with steered(models, wants_memory=False) as sampler:
        answers = await sampler.residuals(*TIMESTEPS)
        told, server = moved(sampler.metrics), moved(sampler.server_metrics)
    total = sum(map(payload, answers))
    assert total > 100_000
    assert total < told["raw received"] < total + 2000
    assert told.pop("protobuf received") < 200  # that a step has begun
    assert set(told) == {"raw sent", "raw received"}
    assert server["raw received"] > PICTURE.nbytes
    assert server["protobuf received"] > 2 * SAMPLE.nbytes  # under 4 KiB each
    assert abs(server["raw sent"] - told["raw received"]) < 200  # before it is sent, its size is an estimate


async def test_a_plain_client_gets_the_same_residuals(models: Path) -> None:
    """Who knows nothing of parcels talks protobuf, and is answered in it."""
    unit = pb.ControlNetUnit(model="tiny-controlnet", image=to_proto(PICTURE), scale=1.0)
    start = pb.ControlStart(units=[unit], encoder_hidden_states=to_proto(EMBEDDINGS))
    async with steered(models) as sampler:
        (wanted,) = await sampler.residuals(601.0)
        async with grpc.aio.insecure_channel(sampler.server.address, options=channel_options(LIMIT)) as channel:
            call = rpc.ControlNetServiceStub(channel).Control()
            await call.write(pb.ControlRequest(start=start))
            await call.write(pb.ControlRequest(step=pb.ControlStep(sample=to_proto(SAMPLE), timestep=601.0)))
            answer = await call.read()
            call.cancel()
    plain = [from_proto(one, "residual") for one in (*answer.down_residuals, answer.mid_residual)]
    for got, one in zip(plain, [*wanted.down, wanted.mid], strict=True):
        np.testing.assert_array_equal(got, one)


async def test_several_controlnets_are_summed_before_they_are_sent(models: Path) -> None:
    async with steered(models) as sampler:
        async with sampler.control(0.5, 0.5) as control:
            both = await ask(control)
        async with sampler.control(0.5) as control:
            one = await ask(control)
    twice = Residuals([2 * part for part in one.down], 2 * one.mid)
    assert same(both, twice)


@pytest.mark.parametrize("memory", [False, True], ids=["raw", "shm"])
async def test_three_controlnets_cost_the_wire_what_one_does(models: Path, memory: bool) -> None:
    received = []
    for scales in ((1.0,), (1.0, 0.5, 0.3)):
        async with steered(models, wants_memory=memory) as sampler, sampler.control(*scales) as control:
            for timestep in TIMESTEPS:
                await ask(control, timestep)
            told = moved(sampler.metrics)
            assert ("shm received" in told) == memory
            received.append(sum(count for way, count in told.items() if way.endswith("received")))
    assert received[1] / received[0] <= 1.02


@pytest.mark.parametrize("socket", [False, True], ids=["tcp", "unix"])
async def test_on_one_machine_residuals_come_in_shared_memory(models: Path, socket: bool, tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/c.sock" if socket else "127.0.0.1:0"
    async with steered(models, listen) as sampler:
        answers = await sampler.residuals(*TIMESTEPS)
        told, server = moved(sampler.metrics), moved(sampler.server_metrics)
    total = sum(map(payload, answers))
    assert told["shm received"] == server["shm sent"] == total
    assert told["protobuf received"] < 1000  # the messages around them
    assert "raw received" not in told
    assert server["raw received"] > PICTURE.nbytes  # what is sent to the service goes its way as before


async def test_residuals_are_the_same_bit_by_bit_whichever_way_they_come(models: Path, tmp_path: Path) -> None:
    found = []
    for listen, memory in (("127.0.0.1:0", 0), (f"unix:{tmp_path}/c.sock", 0), ("127.0.0.1:0", 64 << 20)):
        async with steered(models, listen, shared_memory_bytes=memory) as sampler:
            found.append(await sampler.residuals(*TIMESTEPS))
            assert ("shm received" in moved(sampler.metrics)) == (memory > 0)
    for others in found[1:]:
        assert all(same(one, other) for one, other in zip(found[0], others, strict=True))


async def test_the_arrays_stay_what_they_are_while_they_are_held(models: Path) -> None:
    """Also beside later answers, and after the session, the service and the lease are gone."""
    async with steered(models) as sampler, sampler.control(1.0) as control:
        held = await ask(control, 981.0)
        copy = [one.copy() for one in (*held.down, held.mid)]
        for timestep in (481.0, 1.0):
            await ask(control, timestep)
    for one, other in zip((*held.down, held.mid), copy, strict=True):
        np.testing.assert_array_equal(one, other)


async def test_memory_is_used_again_when_its_arrays_are_dropped(models: Path) -> None:
    async with steered(models) as sampler, sampler.control(1.0) as control:
        places = set()
        for timestep in (981.0, 481.0, 1.0):
            answer = await ask(control, timestep)
            places.add(answer.mid.ctypes.data)
            del answer
            await until(lambda: [lease.arena.in_use for lease in sampler.leases] == [0])
        assert len(places) == 1


async def test_a_service_with_too_little_memory_sends_raw_bytes(models: Path) -> None:
    async with steered(models, shared_memory_bytes=4096) as sampler:
        answers = await sampler.residuals(601.0)
        told = moved(sampler.metrics)
    assert told["raw received"] > sum(map(payload, answers))
    assert "shm received" not in told


@pytest.mark.parametrize(
    "hindrance",
    [
        "the service offers none",
        "the sampler wants none",
        "another machine",
        "another user",
        "the service refuses",
        "no lease is left",
        "the memory is not sealed",
    ],
)
async def test_without_shared_memory_residuals_come_as_raw_bytes(
    models: Path, hindrance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, object] = {}
    match hindrance:
        case "the service offers none":
            settings["shared_memory_bytes"] = 0
        case "the sampler wants none":
            settings["wants_memory"] = False
        case "another machine":  # where there is no such socket
            monkeypatch.setattr(tenancy.Tenancy, "open", partial(elsewhere, tenancy.Tenancy.open))
        case "another user":
            monkeypatch.setattr(tenancy, "peer_is_us", lambda connection: False)
        case "the service refuses":
            monkeypatch.setattr(leases, "peer_is_us", lambda connection: False)
        case "no lease is left":
            monkeypatch.setattr(leases, "_MAX_LEASES", 0)
        case "the memory is not sealed":
            monkeypatch.setattr(arena, "_SEALS", 0x0001)
            monkeypatch.setattr(tenancy, "Mapping", Strict)
    async with steered(models, **settings) as sampler:  # type: ignore[arg-type]
        answers = await sampler.residuals(601.0)
        told = moved(sampler.metrics)
        assert sampler.leases == [] or hindrance == "the memory is not sealed"
    assert told["raw received"] > sum(map(payload, answers))
    assert "shm received" not in told


async def elsewhere(open: Any, offer: Any, timeout_seconds: float) -> tenancy.Tenancy:
    offer.socket += "-of-another-machine"
    return await open(offer, timeout_seconds)


class Strict(arena.Mapping):
    """Wants seals that the arena of the test lacks."""

    def __init__(self, descriptor: int, size: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arena, "_SEALS", 0x0017)
            super().__init__(descriptor, size)


def test_a_controlled_picture_is_the_same_with_and_without_shared_memory(
    models: Path, control_image: Image.Image
) -> None:
    pictures = []
    for size in ("0", str(64 << 20)):
        memory = {"shared_memory_bytes": size}
        with (
            running_mesh(memory, models=str(models), backend="torch", **memory) as mesh,
            Client(mesh.grpc_address) as client,
        ):
            answer = client.generate("the red cat", steps=2, seed=3, controls=[Control(control_image)])
            pictures.append(np.asarray(answer.images[0].to_pil()))
            sampler, gateway = (moved(server.metrics) for server in (mesh.services["diffusion"], mesh.gateway))
            vae, controlnet = (moved(mesh.services[name].metrics) for name in ("vae", "controlnet"))
        assert sampler.get("shm received", 0) == controlnet.get("shm sent", 0)
        assert gateway.get("shm received", 0) == vae.get("shm sent", 0) == (pictures[-1].nbytes if size != "0" else 0)
        assert ("shm received" in sampler) != ("raw received" in sampler)
    np.testing.assert_array_equal(*pictures)
