"""The gateway's faces without services behind them: metrics, replicas, names, sockets."""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway import oip
from imagemesh_gateway.access.door import Door
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.http import create_app
from imagemesh_gateway.http_guard import Guard, HttpLimits
from imagemesh_gateway.http_job_events import _tell_socket
from imagemesh_gateway.jobs.service import Jobs
from imagemesh_gateway.mesh import Mesh
from imagemesh_runtime.errors import DeadlineExceeded, Unavailable
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.replicas import Replicas


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/v1/models", "/v1/models"), ("/v1/models/x/y", "/v1/models/{model:path}"),
        ("/sdapi/v1/upscalers", "/sdapi/v1/upscalers"), ("/healthz", "/healthz"), ("/nowhere", "other"),
    ],
)  # fmt: skip
async def test_requests_are_counted_by_their_route_also_those_of_imitated_apis(path: str, template: str) -> None:
    config, metrics = GatewayConfig(catalogue_timeout_seconds=0.1), Metrics("gateway")
    mesh = Mesh(config, metrics)
    app = create_app(mesh, Jobs(config, mesh, metrics), metrics, lambda: True)
    guard = Guard(app, metrics, HttpLimits.of(config), Door(config, metrics))
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=guard), base_url="http://gateway") as client:
            code = (await client.get(path)).status_code
    finally:
        await mesh.close()
    labels = {"method": "GET", "path": template, "code": str(code)}
    assert metrics.registry.get_sample_value("http_requests_total", labels) == 1


@dataclass(frozen=True)
class Named:
    """As much of a peer as choosing one takes."""

    name: str


async def test_of_several_replicas_one_that_answers_is_found_and_the_absent_one_rests() -> None:
    peers: Any = [Named("absent"), Named("there")]
    replicas = Replicas(peers, 60, name="diffusion")
    asked: list[str] = []

    async def question(peer: Any) -> str:
        asked.append(peer.name)
        if peer.name == "absent":
            raise Unavailable("diffusion", "is absent")
        return "yes"

    assert [await replicas.ask(question) for _ in range(20)] == ["yes"] * 20
    assert asked.count("absent") <= 1


async def test_when_no_replica_answers_the_last_ones_error_is_told() -> None:
    peers: Any = [Named("a"), Named("b")]

    async def question(peer: Any) -> str:
        raise Unavailable("diffusion", "is absent")

    with pytest.raises(Unavailable):
        await Replicas(peers, 60).ask(question)


async def test_a_caller_who_has_no_time_left_puts_no_replica_to_rest() -> None:
    peers: Any = [Named("a"), Named("b")]
    replicas = Replicas(peers, 60, name="diffusion")

    async def question(peer: Any) -> str:
        raise DeadlineExceeded("diffusion", "no time was left to ask it")

    with pytest.raises(DeadlineExceeded):
        await replicas.ask(question)
    assert not any(map(replicas.rests, peers))


async def test_a_stage_without_a_model_named_takes_the_meshs_default_one() -> None:
    async def find(peer: str, name: str) -> Any:
        return SimpleNamespace(name=name or {"diffusion": "z-default", "vae": "a-first"}[peer])

    mesh: Any = SimpleNamespace(catalogue=SimpleNamespace(find=find), diffusion="diffusion")
    name = oip._stage_name(mesh, "vae")  # type: ignore[arg-type]
    assert [await name(""), await name("mine")] == ["z-default", "mine"]


async def test_pictures_are_decoded_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stream(_: Any) -> AsyncGenerator[pb.GenerateResponse, None]:
        yield pb.GenerateResponse(result=pb.GenerateResult())

    threads: list[int] = []
    monkeypatch.setattr(oip, "_made", lambda result: threads.append(threading.get_ident()) or {})
    direct: Any = SimpleNamespace(stream=stream)
    model: Any = oip._generate_model(None, direct)  # type: ignore[arg-type]
    assert [last async for _, last in model.stream({}, {})] == [True]
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


@pytest.mark.parametrize("error", [ZeroDivisionError("unforeseen"), RuntimeError("unforeseen")])
async def test_a_socket_is_closed_as_broken_and_the_log_says_why(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def watch(job: str, pictures: bool) -> AsyncGenerator[Any, None]:
        raise error
        yield

    closed: list[int] = []

    async def close(code: int) -> None:
        closed.append(code)

    socket: Any = SimpleNamespace(receive=asyncio.Event().wait, close=close)
    jobs: Any = SimpleNamespace(watch=watch)
    with caplog.at_level(logging.ERROR):
        await _tell_socket(socket, jobs, "j")
    assert closed == [1011]
    assert "unforeseen" in caplog.text
