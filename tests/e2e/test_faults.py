"""A service that is down or hangs is named within the deadline; a client that goes stops the sampler."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from imagemesh_cli.host import MeshHost
from imagemesh_client import AsyncClient, Client, Control
from imagemesh_client.types import Progress
from imagemesh_runtime.errors import MeshError
from tests.support.hanging import hanging
from tests.support.mesh import running_mesh

SERVICES = ("text_encoder", "diffusion", "vae", "vit", "controlnet")


@pytest.mark.parametrize("down", ["text_encoder", "diffusion", "vae"])
def test_a_service_that_is_down_is_named(tmp_path: Path, down: str) -> None:
    gone = {down: f"unix:{tmp_path}/nobody.sock"}
    without = [down.replace("_", "-")]
    with running_mesh(gone, without, backend="fake") as mesh, Client(mesh.grpc_address, timeout=10) as client:
        begun = time.monotonic()
        with pytest.raises(MeshError) as caught:
            client.generate("x", steps=2)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert down.replace("_", "-") in str(caught.value)
        assert time.monotonic() - begun < 10


def test_a_vit_that_is_down_harms_no_generation(tmp_path: Path, control_image: Any) -> None:
    gone = {"vit": f"unix:{tmp_path}/nobody.sock"}
    with running_mesh(gone, ["vit"], backend="fake") as mesh, Client(mesh.grpc_address, timeout=10) as client:
        with pytest.raises(MeshError, match="vit: cannot be reached") as caught:
            client.classify(control_image)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert client.generate("x", steps=2).images
        assert client.models().unreachable == ("vit",)


def test_a_controlnet_that_is_down_is_named_by_the_sampler(tmp_path: Path, control_image: Any) -> None:
    with running_mesh(backend="fake") as mesh, Client(mesh.grpc_address, timeout=10) as client:
        client.generate("x", steps=2, controls=[Control(control_image)])
        stop_service(mesh, "controlnet")
        with pytest.raises(MeshError, match="controlnet: cannot be reached") as caught:
            client.generate("x", steps=2, controls=[Control(control_image)])
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert client.generate("x", steps=2).images


def stop_service(mesh: MeshHost, name: str) -> None:
    """Stop one service of a running mesh, on the mesh's own loop."""
    server = mesh.services[name]
    loop = server._loop
    assert loop is not None
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result(timeout=60)


def ask(client: AsyncClient, service: str, picture: Any) -> Any:
    """Something that can't be answered without the service."""
    if service == "vit":
        return client.classify(picture)
    return client.generate("x", steps=2, controls=[Control(picture)] if service == "controlnet" else [])


@pytest.mark.parametrize("service", SERVICES)
async def test_a_service_that_hangs_is_named_within_the_callers_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, control_image: Any, service: str
) -> None:
    address, name = f"unix:{tmp_path}/hanging.sock", service.replace("_", "-")
    monkeypatch.setenv(f"IMAGEMESH_{service.upper()}", address)  # for the gateway, and the sampler with its ControlNets
    async with hanging(address):
        with running_mesh(without=[name], backend="fake") as mesh:
            async with AsyncClient(mesh.grpc_address, timeout=2) as client:
                begun = time.monotonic()
                with pytest.raises(MeshError) as caught:
                    await ask(client, service, control_image)
                assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
                assert str(caught.value).startswith(f"{name}: ")
                assert time.monotonic() - begun < 2.5
            assert await healthy(mesh)


async def healthy(mesh: MeshHost) -> bool:
    async with AsyncClient(mesh.grpc_address, timeout=10) as client:
        return len(await client.models()) == len(SERVICES)


@pytest.fixture(scope="module")
def mesh(models: Path) -> Iterator[MeshHost]:
    with running_mesh(backend="torch", models=str(models)) as mesh:
        yield mesh


def sample(mesh: MeshHost, name: str, **labels: str) -> float:
    """The value of one series of the diffusion service."""
    text = httpx.get(f"http://{mesh.services['diffusion'].metrics_http.address}/metrics").text
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name == name and labels.items() <= one.labels.items():
                return one.value
    return 0.0


async def until(reached: Any) -> None:
    """Wait for a condition that another thread brings about."""
    async with asyncio.timeout(20):
        while not reached():
            await asyncio.sleep(0.01)


async def test_cancel_frees_the_sampler_and_says_so(mesh: MeshHost) -> None:
    def steps() -> float:
        return sample(mesh, "imagemesh_step_seconds_count")

    def cancelled() -> float:
        return sample(mesh, "imagemesh_cancelled_requests_total")

    before = cancelled()
    async with AsyncClient(mesh.grpc_address) as client:
        events = client.stream("x", steps=900, seed=1, scheduler="DDIM")
        async for event in events:
            if isinstance(event, Progress) and event.step >= 3:
                break
        await events.aclose()
        await until(lambda: cancelled() == before + 1)
        await until(lambda: sample(mesh, "imagemesh_running_requests") == 0)
        stopped = steps()
        # The sampler is free again at once, and does only the next request's steps.
        await client.generate("x", steps=2, seed=1, scheduler="DDIM")
    assert steps() == stopped + 2


async def test_a_waiting_request_that_is_cancelled_never_runs(mesh: MeshHost) -> None:
    async with AsyncClient(mesh.grpc_address) as client:
        # As many pictures as fill the engine's batch, so that the next one waits.
        running = client.stream("x", steps=400, seed=1, n=16, scheduler="DDIM")
        await anext(running)
        await anext(running)
        waiting = client.stream("y", steps=100, seed=2, scheduler="DDIM")
        assert (await anext(waiting)).position == 0  # type: ignore[union-attr]
        await until(lambda: sample(mesh, "imagemesh_pending_requests") == 1)
        before = sample(mesh, "imagemesh_queue_wait_seconds_count")
        await waiting.aclose()
        await until(lambda: sample(mesh, "imagemesh_pending_requests") == 0)
        await running.aclose()
        await until(lambda: sample(mesh, "imagemesh_running_requests") == 0)
        assert sample(mesh, "imagemesh_queue_wait_seconds_count") == before
