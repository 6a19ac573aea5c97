"""/readyz tells what can be served and what is missing; /healthz that the process lives; /docs asks no other host."""

import asyncio
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from imagemesh_cli.host import MeshHost
from imagemesh_runtime.server import MeshServer
from tests.support.mesh import running_mesh
from tests.support.processes import start

NOWHERE = "127.0.0.1:1"
DOWN = f"cannot be reached at {NOWHERE}"


def readyz(mesh: MeshHost) -> tuple[int, dict[str, Any]]:
    answer = httpx.get(f"http://{mesh.http_address}/readyz", timeout=30)
    return answer.status_code, answer.json()


@pytest.fixture(scope="module")
def mesh() -> Iterator[MeshHost]:
    with running_mesh(backend="fake") as mesh:
        yield mesh


def metrics(mesh: MeshHost) -> str:
    return httpx.get(f"http://{mesh.gateway.metrics_http.address}/metrics").text


def test_a_whole_mesh_serves_everything(mesh: MeshHost) -> None:
    status, told = readyz(mesh)
    assert (status, told["ready"], told["serves"]) == (200, True, ["generate", "classify", "embed"])
    assert told["services"] == dict.fromkeys(["text-encoder", "diffusion", "vae", "controlnet", "vit"], "ready")
    assert 'imagemesh_ready_replicas{peer="diffusion",service="gateway"} 1.0' in metrics(mesh)


def test_without_one_of_its_services_the_gateway_serves_the_rest_and_names_it() -> None:
    with running_mesh({"vae": NOWHERE}, without=["vae"], backend="fake") as mesh:
        status, told = readyz(mesh)
        assert (status, told["serves"]) == (200, ["classify", "embed"])
        assert told["services"]["vae"] == DOWN
        assert 'imagemesh_ready_replicas{peer="vae",service="gateway"} 0.0' in metrics(mesh)


def test_a_gateway_that_can_serve_nothing_is_alive_but_not_ready() -> None:
    gone = {"text_encoder": NOWHERE, "vit": NOWHERE}
    with running_mesh(gone, without=["text-encoder", "vit"], backend="fake") as mesh:
        status, told = readyz(mesh)
        assert (status, told["ready"], told["serves"]) == (503, False, [])
        assert [name for name, said in told["services"].items() if said != "ready"] == ["text-encoder", "vit"]
        assert httpx.get(f"http://{mesh.http_address}/healthz").status_code == 200


def test_one_of_two_replicas_is_enough() -> None:
    with running_mesh(backend="fake") as other:
        replicas = f"{other.services['diffusion'].address},{NOWHERE}"
        with running_mesh({"diffusion": replicas}, without=["diffusion"], backend="fake") as mesh:
            status, told = readyz(mesh)
    assert (status, told["serves"]) == (200, ["generate", "classify", "embed"])
    assert told["services"]["diffusion"] == f"1 of 2 ready: {DOWN}"


async def test_a_service_that_drains_is_missed_after_a_second() -> None:
    with running_mesh(backend="fake") as mesh:
        assert readyz(mesh)[1]["serves"] == ["generate", "classify", "embed"]
        await asyncio.to_thread(httpx.post, f"http://{mesh.services['vit'].admin_http.address}/drain")
        await _until(lambda: readyz(mesh)[1]["serves"] == ["generate"])
        assert readyz(mesh)[1]["services"]["vit"] == "loads its models, drains, or its device hangs"


def test_a_gateway_that_drains_is_not_ready() -> None:
    with running_mesh(backend="fake") as mesh:
        httpx.post(f"http://{mesh.gateway.admin_http.address}/drain")
        status, told = readyz(mesh)
        assert (status, told["draining"], told["services"]["vae"]) == (503, True, "ready")


def test_a_frozen_service_is_told_within_a_second_or_so(tmp_path: Path) -> None:
    settings = {"IMAGEMESH_BACKEND": "fake", "IMAGEMESH_METRICS_LISTEN": "127.0.0.1:0"}
    settings["IMAGEMESH_ADMIN_LISTEN"] = "127.0.0.1:0"
    with start("vit", f"unix:{tmp_path}/v.sock", settings) as vit:
        vit.wait_ready()
        with running_mesh({"vit": vit.address}, without=["vit"], backend="fake") as mesh:
            vit.process.send_signal(signal.SIGSTOP)
            try:
                status, told = readyz(mesh)
            finally:
                vit.process.send_signal(signal.SIGCONT)
    assert (status, told["serves"]) == (200, ["generate"])
    assert told["services"]["vit"] == "did not answer within the deadline"


async def test_many_who_ask_at_once_are_one_question(mesh: MeshHost) -> None:
    begun, before = time.monotonic(), _checks(mesh.services["vae"])
    async with httpx.AsyncClient(timeout=30) as client:
        answers = await asyncio.gather(*(client.get(f"http://{mesh.http_address}/readyz") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert _checks(mesh.services["vae"]) - before <= 1 + time.monotonic() - begun


def _checks(server: MeshServer) -> float:
    text = httpx.get(f"http://{server.metrics_http.address}/metrics").text
    found = re.search(r'grpc_server_handled_total\{[^}]*grpc_method="Check"[^}]*\} ([\d.]+)', text)
    return float(found[1]) if found else 0.0


async def _until(reached: Any) -> None:
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(reached):
            await asyncio.sleep(0.05)


def test_the_page_of_all_fields_loads_from_the_gateway_alone(mesh: MeshHost) -> None:
    base = f"http://{mesh.http_address}"
    page = httpx.get(f"{base}/docs")
    assert page.status_code == 200
    assert re.findall(r"(?:https?:)?//[\w.]+\.\w+", page.text) == []
    files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(files) == 3
    for file in files:
        assert httpx.get(f"{base}{file}").status_code == 200
    assert '"validatorUrl": null' in page.text
    assert httpx.get(f"{base}/redoc").status_code == 404
    assert "/v1/generate" in httpx.get(f"{base}/openapi.json").json()["paths"]
