"""The HTTP face: what it answers, how it refuses, and what it can bear."""

import asyncio
import base64
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from imagemesh_cli.host import MeshHost
from imagemesh_client import Client
from imagemesh_runtime.server import MeshServer
from tests.support.hanging import Hanging, hanging
from tests.support.mesh import running_mesh

MIB = 1 << 20
MAX_BODY = MIB
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def mesh() -> Iterator[MeshHost]:
    with running_mesh({"max_http_body_bytes": str(MAX_BODY)}, backend="fake") as mesh:
        yield mesh


@pytest.fixture(scope="module")
def painter(models: Path) -> Iterator[MeshHost]:
    """A mesh whose pictures depend on the seed."""
    with running_mesh(backend="torch", models=str(models)) as mesh:
        yield mesh


@pytest.fixture
def still_well(mesh: MeshHost) -> Iterator[None]:
    """Finds, after each test, that the mesh still draws."""
    yield
    assert post(mesh, {"prompt": "ok", "steps": 2}).status_code == 200


def url(mesh: MeshHost) -> str:
    return f"http://{mesh.http_address}/v1/generate"


def post(mesh: MeshHost, body: object, **headers: str) -> httpx.Response:
    return httpx.post(url(mesh), json=body, headers=headers, timeout=60)


def send(mesh: MeshHost, content: Any, kind: str = "application/json") -> httpx.Response:
    return httpx.post(url(mesh), content=content, headers={"Content-Type": kind}, timeout=60)


def refusal(answer: httpx.Response) -> tuple[int, str, str | None]:
    """Status, gRPC code and field of an error; it must say something."""
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"}
    assert error["message"]
    return answer.status_code, error["code"], error.get("field")


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def count(mesh: MeshHost, name: str, *, at: MeshServer | None = None, **labels: str) -> float:
    """The sum of the series of that name with these labels, of the gateway or another server."""
    text = httpx.get(f"http://{(at or mesh.gateway).metrics_http.address}/metrics").text
    samples = (one for family in text_string_to_metric_families(text) for one in family.samples)
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


async def until(reached: Any) -> None:
    async with asyncio.timeout(20):
        while not await asyncio.to_thread(reached):
            await asyncio.sleep(0.01)


REQUEST = {"prompt": "a fox", "seed": 7, "steps": 3, "guidance": 3.0, "scheduler": "DDIM", "width": 64, "height": 48}


@pytest.fixture(scope="module")
def drawn(painter: MeshHost) -> np.ndarray:
    """What gRPC draws for REQUEST."""
    with Client(painter.grpc_address) as client:
        made = client.generate(**REQUEST)  # type: ignore[arg-type]
    return np.asarray(made.images[0].to_pil())


def test_json_carries_the_picture_and_what_made_it(painter: MeshHost, drawn: np.ndarray) -> None:
    answer = post(painter, REQUEST)
    told = answer.json()
    (image,) = told["images"]
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    np.testing.assert_array_equal(pixels(base64.b64decode(image["png"])), drawn)
    made = told["parameters"]
    assert (image["seed"], made["seed"], made["steps"], made["prompt"]) == (7, 7, 3, "a fox")
    assert (made["width"], made["height"], made["scheduler"]) == (64, 48, "DDIM")
    assert set(made["backends"].values()) == {"torch"}
    assert [one["stage"] for one in told["timings"]] == ["text-encoder", "diffusion", "vae"]
    assert answer.headers["X-Imagemesh-Seed"] == "7"


def test_png_is_the_picture(painter: MeshHost, drawn: np.ndarray) -> None:
    answer = post(painter, REQUEST, Accept="image/png")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.headers["X-Imagemesh-Seed"] == "7"
    np.testing.assert_array_equal(pixels(answer.content), drawn)
    other = post(painter, {**REQUEST, "seed": 8}, Accept="image/png")
    assert np.abs(pixels(other.content).astype(int) - drawn).max() > 10


def test_a_drawn_seed_is_told_and_makes_the_picture_again(painter: MeshHost) -> None:
    drawn = post(painter, {**REQUEST, "seed": None}, Accept="image/png")
    again = post(painter, {**REQUEST, "seed": int(drawn.headers["X-Imagemesh-Seed"])}, Accept="image/png")
    np.testing.assert_array_equal(pixels(again.content), pixels(drawn.content))


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("image/*", "image/png"),
        ("image/png;q=0.2, application/json", "application/json"),
        ("image/png, */*;q=0.1", "image/png"),
    ],
)
def test_the_client_chooses_the_form(mesh: MeshHost, accept: str, kind: str) -> None:
    answer = post(mesh, {"prompt": "x", "steps": 1}, Accept=accept)
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)


def test_without_accept_the_answer_is_json(mesh: MeshHost) -> None:
    with httpx.Client() as client:
        del client.headers["accept"]
        answer = client.post(url(mesh), json={"prompt": "x", "steps": 1})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")


def test_a_form_that_is_not_spoken_is_refused_before_the_work(mesh: MeshHost) -> None:
    before = count(mesh, "imagemesh_stage_seconds_count")
    answer = post(mesh, {"prompt": "x"}, Accept="text/html, image/png;q=0")
    assert refusal(answer) == (406, "INVALID_ARGUMENT", "Accept")
    assert "application/json or image/png" in answer.json()["error"]["message"]
    assert count(mesh, "imagemesh_stage_seconds_count") == before


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"prompt": "x", "steps": 0}, 400, "steps must be 1 to 1000, got 0"),
        ({"prompt": "x", "steps": 2.5}, 400, "steps must be 1 to 1000, got 2.5"),
        ({"prompt": "x", "steps": "many"}, 400, "steps must be 1 to 1000, got 'many'"),
        ({"prompt": "x", "width": 7}, 400, "width must be a multiple of 8"),
        ({"prompt": "x", "width": 0}, 400, "width must be a whole number of pixels from 1 to 4096, got 0"),
        ({"prompt": "x", "num_images": 0}, 400, "num_images must be 1 to 64, got 0"),
        ({"prompt": "x", "height": -8}, 400, "height must be a whole number of pixels from 1 to 4096"),
        ({"prompt": "x", "height": 10**30}, 400, "height must be a whole number of pixels from 1 to 4096"),
        ({"prompt": "x", "guidance": 101}, 400, "guidance must be 0 to 100.0, got 101"),
        ({"prompt": "x", "scheduler": "Eular"}, 404, "scheduler 'Eular' not found, perhaps 'Euler'"),
        ({"prompt": "x", "model": "dreams"}, 404, "model 'dreams' not found; available: fake"),
        ({"prompt": "x", "negative_prompt": "y" * 20_000}, 400, "negative_prompt must be at most 10000 characters"),
        ({"prompt": "x", "sneed": 1}, 400, "sneed must be left out (the fields are prompt, negative_prompt, seed"),
        ({"prompt": "x", "s" * 5000: 1}, 400, "s" * 80 + " must be left out"),
        ({"steps": 3}, 400, "prompt must be a string of valid Unicode, got 'nothing'"),
        ({"prompt": 7}, 400, "prompt must be a string of valid Unicode, got 7"),
        ({"prompt": ["x"] * 9}, 400, "prompt must be a string of valid Unicode, got 'a list of 9 values'"),
        ({"prompt": "x", "seed": -1}, 400, "seed must be a whole number from 0 to 9223372036854775807, got -1"),
        (
            {"prompt": "x", "seed": "z" * 5000},
            400,
            "seed must be a whole number from 0 to 9223372036854775807, got 'zz",
        ),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_what_is_allowed(
    mesh: MeshHost, still_well: None, body: dict[str, object], status: int, said: str
) -> None:
    answer = post(mesh, body)
    message = answer.json()["error"]["message"]
    assert refusal(answer)[0] == status
    assert said in message
    assert len(message) < 2000
    if status == 400:
        assert refusal(answer)[1:] == ("INVALID_ARGUMENT", said.partition(" must ")[0])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_guidance_is_a_finite_number(mesh: MeshHost, still_well: None, number: str) -> None:
    answer = send(mesh, f'{{"prompt": "x", "guidance": {number}}}')
    assert refusal(answer) == (400, "INVALID_ARGUMENT", "guidance")


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "scheduler", "model"])
def test_half_a_surrogate_pair_is_refused(mesh: MeshHost, still_well: None, field: str) -> None:
    answer = send(mesh, f'{{"prompt": "x", "{field}": "\\ud800"}}')
    assert refusal(answer) == (400, "INVALID_ARGUMENT", field)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"nojson", "body must be JSON (Expecting value at character 0), got 'nojson'"),
        (b"[" * 100_000, "body must be JSON"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "must be"),
        (b'{"prompt": "\xff"}', "body must be JSON"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "body must be JSON"),
        (b'{"prompt": "x", "\\udcff": 1}', "body must be a JSON object whose field names are valid Unicode"),
        (b"[1]", "body must be a JSON object, got 'a list of 1 values'"),
        (b"", "body must be a JSON object, got 'nothing'"),
    ],
    ids=["no JSON", "deep", "deep and whole", "no UTF-8", "huge number", "half a surrogate pair", "list", "empty"],
)
def test_a_body_that_is_no_json_object_is_named(mesh: MeshHost, still_well: None, content: bytes, said: str) -> None:
    answer = send(mesh, content)
    assert refusal(answer) == (400, "INVALID_ARGUMENT", "body")
    assert said in answer.json()["error"]["message"]
    assert len(answer.content) < 1000


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonnet", ""])
def test_a_body_of_another_type_is_named(mesh: MeshHost, still_well: None, kind: str) -> None:
    answer = send(mesh, b'{"prompt": "x"}', kind)
    assert refusal(answer) == (415, "INVALID_ARGUMENT", "body")
    assert "JSON, with Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("chunks", [1, 40], ids=["announced", "chunked"])
def test_a_large_body_is_refused_with_the_limit(mesh: MeshHost, still_well: None, chunks: int) -> None:
    body = b'{"prompt": "' + b"x" * (8 * MIB) + b'"}'
    size = len(body) // chunks
    parts = (body[i : i + size] for i in range(0, len(body), size))
    answer = send(mesh, body if chunks == 1 else parts)
    assert refusal(answer) == (413, "INVALID_ARGUMENT", "body")
    assert f"body must be at most {MAX_BODY} bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/generate", 405), ("POST", "/v1/nothing", 404)])
def test_what_is_not_there_is_told_in_the_same_shape(mesh: MeshHost, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, f"http://{mesh.http_address}{path}")
    assert refusal(answer)[0] == status
    assert f"{method} {path}" in answer.json()["error"]["message"]


def test_requests_are_counted_by_route_and_code(mesh: MeshHost) -> None:
    def counts() -> list[float]:
        return [
            count(mesh, "http_requests_total", method="POST", path="/v1/generate", code="200"),
            count(mesh, "http_requests_total", method="POST", path="/v1/generate", code="400"),
            count(mesh, "http_requests_total", method="GET", path="/readyz", code="200"),
            count(mesh, "http_requests_total", method="other", path="other", code="404"),
            count(mesh, "http_request_duration_seconds_count", method="POST", path="/v1/generate"),
        ]

    before = counts()
    for steps in (1, 2, 0):
        post(mesh, {"prompt": "x", "steps": steps})
    httpx.get(f"http://{mesh.http_address}/readyz")
    httpx.request("BREW", f"http://{mesh.http_address}/coffee/{time.time()}")
    assert [after - old for after, old in zip(counts(), before, strict=True)] == [2, 1, 1, 1, 3]
    for server in mesh.services.values():
        assert "http_requests" not in httpx.get(f"http://{server.metrics_http.address}/metrics").text


@asynccontextmanager
async def stuck(folder: Path, **settings: str) -> AsyncIterator[tuple[MeshHost, Hanging]]:
    """A mesh whose text encoder never answers."""
    address = f"unix:{folder}/hanging.sock"
    async with hanging(address) as service:
        with running_mesh({"text_encoder": address, **settings}, ["text-encoder"], backend="fake") as mesh:
            yield mesh, service


async def test_a_client_that_goes_cancels_its_generation_quietly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with stuck(tmp_path) as (mesh, service):
        host, port = mesh.http_address.split(":")
        body = json.dumps({"prompt": "x"}).encode()
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        writer.write(head.encode() + b"\r\n\r\n" + body)
        async with asyncio.timeout(20):
            await service.asked.wait()
            writer.close()
            await service.left.wait()
        await until(lambda: count(mesh, "http_requests_total", path="/v1/generate", code="499") == 1)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert not reader.at_eof() or await reader.read() == b""


async def test_a_client_that_goes_stops_the_sampler(painter: MeshHost) -> None:
    sampler = painter.services["diffusion"]
    before = count(painter, "imagemesh_cancelled_requests_total", at=sampler)
    async with httpx.AsyncClient() as client:
        body = {"prompt": "x", "steps": 900, "scheduler": "DDIM"}
        call = asyncio.create_task(client.post(url(painter), json=body, timeout=60))
        await until(lambda: count(painter, "imagemesh_running_requests", at=sampler) == 1)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await until(lambda: count(painter, "imagemesh_cancelled_requests_total", at=sampler) == before + 1)
    await until(lambda: count(painter, "imagemesh_running_requests", at=sampler) == 0)


async def test_a_client_that_goes_before_its_body_is_whole_ends_quietly(
    mesh: MeshHost, caplog: pytest.LogCaptureFixture
) -> None:
    before = count(mesh, "http_requests_total", code="499")
    host, port = mesh.http_address.split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    writer.close()
    await until(lambda: count(mesh, "http_requests_total", code="499") == before + 1)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_one_request_too_many_is_told_to_come_back(tmp_path: Path) -> None:
    async with stuck(tmp_path, max_http_requests="1") as (mesh, service), httpx.AsyncClient(timeout=30) as client:
        running = asyncio.create_task(client.post(url(mesh), json={"prompt": "x"}))
        await asyncio.wait_for(service.asked.wait(), 20)
        refused = await client.post(url(mesh), json={"prompt": "y"})
        assert refusal(refused)[:2] == (503, "UNAVAILABLE")
        assert refused.headers["Retry-After"] == "1"
        assert "1 HTTP requests are in work" in refused.json()["error"]["message"]
        assert (await client.get(f"http://{mesh.http_address}/readyz")).status_code == 200
        running.cancel()
        await asyncio.wait_for(service.left.wait(), 20)
        await until(lambda: count(mesh, "http_requests_total", code="499") == 1)
        later = await client.post(url(mesh), json={"prompt": "y", "steps": 0})
        assert later.status_code == 400


async def test_a_request_that_takes_too_long_names_the_late_service(tmp_path: Path) -> None:
    async with stuck(tmp_path, request_timeout_seconds="1") as (mesh, _), httpx.AsyncClient(timeout=30) as client:
        begun = time.monotonic()
        answer = await client.post(url(mesh), json={"prompt": "x"})
        assert refusal(answer)[:2] == (504, "DEADLINE_EXCEEDED")
        assert answer.json()["error"]["message"] == "text-encoder: did not answer within the deadline"
        assert time.monotonic() - begun < 2


async def test_the_gateways_own_work_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def forever(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("imagemesh_gateway.direct.make_plan", forever)
    with running_mesh({"request_timeout_seconds": "0.5"}, backend="fake") as mesh:
        async with httpx.AsyncClient(timeout=30) as client:
            answer = await client.post(url(mesh), json={"prompt": "x"})
    assert refusal(answer)[:2] == (504, "DEADLINE_EXCEEDED")
    assert answer.json()["error"]["message"] == "gateway: the request was not done within 0.5 s"


async def test_a_body_that_trickles_in_is_given_up() -> None:
    with running_mesh({"http_body_timeout_seconds": "0.3"}, backend="fake") as mesh:
        host, port = mesh.http_address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        async with asyncio.timeout(20):
            answer = await reader.read()  # to the end: the connection is closed
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 504 ")
    assert json.loads(body)["error"]["message"] == "body: did not arrive within 0.3 s"


def test_the_unforeseen_is_an_id_whose_story_is_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("imagemesh_gateway.direct.make_plan", broken)
    with running_mesh(backend="fake") as mesh:
        answer = post(mesh, {"prompt": "x"})
    assert refusal(answer)[:2] == (500, "INTERNAL")
    assert "a secret" not in answer.text
    (record,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert record.getMessage().split("error id ")[1][:16] in answer.text
    assert "a secret" in str(record.exc_info)


async def test_the_trace_of_an_http_request_goes_on(tmp_path: Path) -> None:
    async with stuck(tmp_path, request_timeout_seconds="1") as (mesh, service), httpx.AsyncClient() as client:
        headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        await client.post(url(mesh), json={"prompt": "x"}, headers=headers, timeout=30)
    (metadata,) = service.metadata
    version, trace, span, flags = metadata["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert span != "b7ad6b7169203331"
