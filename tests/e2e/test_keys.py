"""API keys at every face of the gateway: who is let in, whose jobs are seen, how much is done."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import pytest
import tritonclient.grpc as triton
import webuiapi
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.utils import InferenceServerException
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import gateway_service_pb2_grpc as rpc
from imagemesh_cli.host import MeshHost
from imagemesh_cli.main import main
from imagemesh_client import Client, MeshError
from imagemesh_gateway.access.rights import GRPC
from tests.support.keys import key_file
from tests.support.mesh import running_mesh

LONG = {"steps": 1000, "width": 1024, "height": 1024}
KEYS: dict[str, dict[str, Any]] = {
    "alice": {"tenant": "a", "calls_per_minute": 100_000},
    "bob": {"tenant": "b"},
    "viewer": {"tenant": "a", "role": "viewer"},
    "admin": {"tenant": "ops", "role": "admin"},
    "old": {"expired": True},
    "gone": {"revoked": True},
    "few": {"tenant": "few", "calls_per_minute": 1, "burst": 1},
    "fewer": {"tenant": "few", "calls_per_minute": 1, "burst": 1},
    "fewest": {"tenant": "few", "calls_per_minute": 1, "burst": 1},
    "small": {"tenant": "small", "pixel_steps_per_day": 64 * 64 * 3},
    "single": {"tenant": "single", "max_jobs": 1},
    "late": {"tenant": "late", "max_priority": "batch"},
    "picky": {"tenant": "picky", "models": ("other-*",)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def tokens(folder: Path) -> dict[str, str]:
    return {**key_file(folder / "keys.json", **KEYS), "wrong": "im_0123456789_" + "x" * 43}


@pytest.fixture(scope="module")
def mesh(folder: Path, tokens: dict[str, str]) -> Iterator[MeshHost]:
    gateway = {"keys_file": str(folder / "keys.json"), "max_running_jobs": "2", "drain_grace_seconds": "1"}
    with running_mesh(gateway, backend="fake") as host:
        yield host


@pytest.fixture
def sdk(mesh: MeshHost, tokens: dict[str, str]) -> Iterator[Callable[[str], Client]]:
    made: dict[str, Client] = {}

    def client(name: str) -> Client:
        return made.setdefault(name, Client(mesh.grpc_address, key=tokens.get(name, ""), timeout=60))

    yield client
    for job in client("admin").jobs.list(["queued", "running"]):
        client("admin").jobs.cancel(job.id)
    for one in made.values():
        one.close()


@pytest.fixture
def http(mesh: MeshHost, tokens: dict[str, str]) -> Iterator[Callable[..., httpx.Response]]:
    with httpx.Client(base_url=f"http://{mesh.http_address}", timeout=60) as client:

        def call(name: str, method: str, path: str, **options: Any) -> httpx.Response:
            headers = {"Authorization": f"Bearer {tokens[name]}"} if name else {}
            return client.request(method, path, headers=headers, **options)

        yield call


def told(error: MeshError) -> tuple[str, str]:
    details = {detail.TypeName() for detail in error.to_status().details}
    (info,) = [one for one in error.details() if isinstance(one, error_details_pb2.ErrorInfo)] or [None]
    return error.code.name, info.reason if info else ",".join(sorted(details))


def raised(call: Callable[[], Any]) -> MeshError:
    with pytest.raises(MeshError) as caught:
        call()
    return caught.value


REASONS = {"": "CREDENTIALS_MISSING", "wrong": "API_KEY_INVALID", "old": "API_KEY_EXPIRED", "gone": "API_KEY_REVOKED"}


@pytest.mark.parametrize("name", REASONS)
def test_who_has_no_key_that_is_taken_gets_in_nowhere(
    name: str, sdk: Callable[[str], Client], http: Callable[..., httpx.Response], mesh: MeshHost, tokens: dict[str, str]
) -> None:
    assert told(raised(sdk(name).models)) == ("UNAUTHENTICATED", REASONS[name])
    assert told(raised(lambda: sdk(name).generate("a cat"))) == ("UNAUTHENTICATED", REASONS[name])
    ours = http(name, "POST", "/v1/generate", json={"prompt": "a cat"})
    assert (ours.status_code, ours.json()["error"]["code"]) == (401, "UNAUTHENTICATED")
    assert ours.headers["www-authenticate"].startswith('Bearer realm="imagemesh", Basic')
    theirs = http(name, "POST", "/sdapi/v1/txt2img", json={"prompt": "a cat"})
    assert (theirs.status_code, theirs.json()["error"]) == (401, "UNAUTHENTICATED")
    assert theirs.json()["detail"] == ours.json()["error"]["message"]
    with (
        openai.OpenAI(base_url=f"http://{mesh.http_address}/v1", api_key=tokens.get(name, "none"), max_retries=0) as ai,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        ai.images.generate(prompt="a cat")
    assert (caught.value.type, caught.value.code) == ("authentication_error", "unauthenticated")
    with pytest.raises(InvalidStatus) as closed:
        connect(f"ws://{mesh.http_address}/v1/jobs/x/socket", additional_headers=_bearer(tokens.get(name, "none")))
    assert closed.value.response.status_code == 401


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_the_clients_of_others_get_in_with_a_key(mesh: MeshHost, tokens: dict[str, str]) -> None:
    host, port = mesh.http_address.split(":")
    api = webuiapi.WebUIApi(host=host, port=int(port), username="alice", password=tokens["alice"])
    assert api.txt2img(prompt="a cat", steps=1, width=64, height=64).image.size == (64, 64)
    with openai.OpenAI(base_url=f"http://{mesh.http_address}/v1", api_key=tokens["alice"], max_retries=0) as ai:
        assert ai.images.generate(prompt="a cat", size="64x64", extra_body={"steps": 1}).data
        assert ai.models.list().data
    with triton.InferenceServerClient(mesh.grpc_address) as client:
        headers = {"authorization": f"Bearer {tokens['alice']}"}
        assert client.get_model_metadata("generate", headers=headers).name == "generate"
        with pytest.raises(InferenceServerException, match="an API key is needed"):
            client.get_model_metadata("generate")


def test_health_is_open_and_everything_else_of_it_is_not(
    mesh: MeshHost, http: Callable[..., httpx.Response], tokens: dict[str, str]
) -> None:
    assert [http("", "GET", path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
    assert [http("", "GET", path).status_code for path in ("/metrics", "/docs", "/openapi.json", "/x")] == [401] * 4
    assert [http("viewer", "GET", path).status_code for path in ("/metrics", "/docs", "/x")] == [200, 200, 404]
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    with grpc.insecure_channel(mesh.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        with pytest.raises(grpc.RpcError, match="an API key is needed"):
            next(reflect(iter(asked), timeout=10))
        metadata = (("authorization", f"Bearer {tokens['viewer']}"),)
        assert next(reflect(iter(asked), timeout=10, metadata=metadata)).list_services_response.service
    with triton.InferenceServerClient(mesh.grpc_address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()


def test_every_service_of_the_gateway_has_its_right(mesh: MeshHost) -> None:
    assert set(mesh.gateway._names) <= set(GRPC)


def test_roles_do_what_they_are_for(
    sdk: Callable[[str], Client], http: Callable[..., httpx.Response], mesh: MeshHost, tokens: dict[str, str]
) -> None:
    assert sdk("viewer").models().models
    assert told(raised(lambda: sdk("viewer").jobs.create("a cat")))[0] == "PERMISSION_DENIED"
    refused = http("viewer", "POST", "/v1/images/generations", json={"prompt": "a cat"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert http("alice", "DELETE", "/v1/index/x").status_code == 403
    assert http("admin", "DELETE", "/v1/index/x").status_code == 404
    with (
        triton.InferenceServerClient(mesh.grpc_address) as client,
        pytest.raises(InferenceServerException, match="has the role user, and this takes admin"),
    ):
        client.unload_model("vit", headers={"authorization": f"Bearer {tokens['alice']}"})


def long_job(client: Client, **options: Any) -> str:
    job = client.jobs.create("a long one", **LONG, **options)  # type: ignore[arg-type]
    for now in client.jobs.watch(job.id):
        if now.state == "running":
            break
    return job.id


def test_another_tenants_job_is_like_one_that_is_not_there(
    sdk: Callable[[str], Client], http: Callable[..., httpx.Response], mesh: MeshHost, tokens: dict[str, str]
) -> None:
    running, nobodys = long_job(sdk("alice")), "0123456789abcdef"
    done = sdk("alice").jobs.create("a cat", steps=1).id
    sdk("alice").jobs.wait(done)
    bob = sdk("bob")
    for call in (bob.jobs.get, bob.jobs.cancel, lambda job: list(bob.jobs.watch(job))):
        unknown = raised(lambda call=call: call(nobodys))
        for job in (running, done):
            refused = raised(lambda call=call, job=job: call(job))
            assert (refused.code, str(refused)) == (grpc.StatusCode.NOT_FOUND, str(unknown).replace(nobodys, job))
    paths = [("GET", ""), ("POST", "/cancel"), ("GET", "/result"), ("GET", "/images/0"), ("GET", "/events")]
    for method, path in paths:
        unknown = http("bob", method, f"/v1/jobs/{nobodys}{path}")
        for job in (running, done):
            refused = http("bob", method, f"/v1/jobs/{job}{path}")
            assert (refused.status_code, refused.text) == (404, unknown.text.replace(nobodys, job))
    for job in (running, done):
        with pytest.raises(InvalidStatus) as closed:
            connect(f"ws://{mesh.http_address}/v1/jobs/{job}/socket", additional_headers=_bearer(tokens["bob"]))
        assert closed.value.response.status_code == 404
    assert bob.jobs.list() == []
    assert http("bob", "GET", "/v1/jobs").json()["jobs"] == []
    assert sdk("alice").jobs.get(running).state == "running"


def test_a_tenants_keys_share_its_jobs_and_an_admin_sees_all(
    sdk: Callable[[str], Client], http: Callable[..., httpx.Response]
) -> None:
    job = long_job(sdk("alice"), idempotency_key="the same")
    assert sdk("viewer").jobs.get(job).tenant == "a"
    assert told(raised(lambda: sdk("viewer").jobs.cancel(job)))[0] == "PERMISSION_DENIED"
    mine = sdk("bob").jobs.create("a long one", idempotency_key="the same", **LONG)  # type: ignore[arg-type]
    assert mine.id != job
    assert {one.tenant for one in sdk("admin").jobs.list(["queued", "running"])} == {"a", "b"}
    assert http("admin", "GET", f"/v1/jobs/{mine.id}").json()["tenant"] == "b"
    assert sdk("admin").jobs.cancel(mine.id).state == "cancelled"


def test_stable_diffusions_progress_options_and_interrupt_are_each_tenants_own(
    sdk: Callable[[str], Client], http: Callable[..., httpx.Response]
) -> None:
    answers: list[httpx.Response] = []
    asked = {"prompt": "x", **LONG}
    waiting = threading.Thread(target=lambda: answers.append(http("alice", "POST", "/sdapi/v1/txt2img", json=asked)))
    waiting.start()
    try:
        deadline = time.monotonic() + 30
        while not (job := http("alice", "GET", "/sdapi/v1/progress").json()["state"]["job"]):
            assert time.monotonic() < deadline
        state = http("bob", "GET", "/sdapi/v1/progress").json()["state"]
        assert (state["job"], state["job_count"]) == ("", 0)
        assert http("bob", "POST", "/sdapi/v1/interrupt").status_code == 200
        assert sdk("alice").jobs.get(job).state == "running"
        assert http("alice", "POST", "/sdapi/v1/interrupt").status_code == 200
        assert sdk("alice").jobs.get(job).state == "cancelled"
    finally:
        http("alice", "POST", "/sdapi/v1/interrupt")
        waiting.join(timeout=60)
    assert answers[0].json()["images"] == []
    http("alice", "POST", "/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2})
    clip = [http(name, "GET", "/sdapi/v1/options").json()["CLIP_stop_at_last_layers"] for name in ("alice", "bob")]
    assert clip == [2, 1]


def test_too_many_calls_are_refused_before_any_work_with_a_time_to_come_back(
    sdk: Callable[[str], Client], http: Callable[..., httpx.Response], mesh: MeshHost, tokens: dict[str, str]
) -> None:
    assert http("few", "GET", "/v1/jobs").status_code == 200
    ours = http("few", "POST", "/v1/jobs", json={"prompt": "a cat"})
    assert (ours.status_code, ours.json()["error"]["code"]) == (429, "RESOURCE_EXHAUSTED")
    assert 1 <= int(ours.headers["retry-after"]) <= 60
    theirs = http("few", "POST", "/sdapi/v1/txt2img", json={"prompt": "a cat"})
    assert (theirs.status_code, theirs.json()["error"]) == (429, "RESOURCE_EXHAUSTED")
    assert "retry-after" in theirs.headers
    with (
        openai.OpenAI(base_url=f"http://{mesh.http_address}/v1", api_key=tokens["few"], max_retries=0) as ai,
        pytest.raises(openai.RateLimitError) as caught,
    ):
        ai.images.generate(prompt="a cat")
    assert caught.value.type == "rate_limit_error"
    assert "retry-after" in caught.value.response.headers
    error = raised(lambda: sdk("few").jobs.create("a cat"))
    assert told(error) == ("RESOURCE_EXHAUSTED", "google.rpc.QuotaFailure,google.rpc.RetryInfo")
    assert 0 < (error.retry_after() or 0) <= 60
    assert sdk("admin").jobs.list() == [] or all(one.tenant != "few" for one in sdk("admin").jobs.list())


def test_a_streams_messages_count_as_calls(mesh: MeshHost, tokens: dict[str, str]) -> None:
    with grpc.insecure_channel(mesh.grpc_address) as channel:
        metadata = (("authorization", f"Bearer {tokens['fewer']}"),)
        stream = rpc.GatewayServiceStub(channel).ClassifyStream(
            iter([pb.ClassifyStreamRequest()]), metadata=metadata, timeout=2
        )
        refused = next(stream).error
    assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert "1 calls a minute, 1 of them at once; retry after" in refused.message
    with triton.InferenceServerClient(mesh.grpc_address) as client:
        errors: Any = queue.Queue()
        client.start_stream(
            lambda result, error: errors.put(error), headers={"authorization": f"Bearer {tokens['fewest']}"}
        )
        prompt = triton.InferInput("prompt", [1], "BYTES")
        prompt.set_data_from_numpy(np.array([b"a cat"], np.object_))
        client.async_stream_infer("generate", [prompt])
        assert "retry after" in str(errors.get(timeout=30))
        client.stop_stream()


def test_a_days_work_and_jobs_at_a_time_are_bounded(
    sdk: Callable[[str], Client], http: Callable[..., httpx.Response]
) -> None:
    small, asked = sdk("small"), {"steps": 2, "width": 64, "height": 64}
    assert told(raised(lambda: small.generate("x", steps=4, width=64, height=64)))[0] == "PERMISSION_DENIED"
    small.generate("x", **asked)
    assert told(raised(lambda: small.generate("x", **asked)))[0] == "RESOURCE_EXHAUSTED"
    assert told(raised(lambda: small.jobs.create("x", **asked)))[0] == "RESOURCE_EXHAUSTED"
    faces = ("/v1/generate", "/v1/jobs", "/sdapi/v1/txt2img")
    refused = [http("small", "POST", path, json={"prompt": "x", **asked}) for path in faces]
    refused.append(http("small", "POST", "/v1/images/generations", json={"prompt": "x", "steps": 2, "size": "64x64"}))
    assert [answer.status_code for answer in refused] == [429] * 4
    assert all(1 <= int(answer.headers["retry-after"]) <= 86400 for answer in refused)
    job = sdk("single").jobs.create("x", **LONG)  # type: ignore[arg-type]
    assert told(raised(lambda: sdk("single").generate("x", steps=1)))[0] == "RESOURCE_EXHAUSTED"
    assert http("single", "POST", "/v1/jobs", json={"prompt": "x"}).headers["retry-after"] == "5"
    sdk("single").jobs.cancel(job.id)
    sdk("single").generate("x", steps=1)


def test_priorities_are_capped_and_models_are_those_of_the_key(
    sdk: Callable[[str], Client], http: Callable[..., httpx.Response]
) -> None:
    late = sdk("late").jobs.create("x", priority="interactive", steps=1)
    assert http("late", "GET", f"/v1/jobs/{late.id}").json()["priority"] == "batch"
    sdk("late").jobs.wait(late.id)
    assert sdk("picky").models().models == ()
    for model in ("", "fake"):
        assert told(raised(lambda model=model: sdk("picky").generate("x", model=model)))[0] == "PERMISSION_DENIED"
    assert told(raised(lambda: sdk("picky").generate("x", model="other-x")))[0] == "NOT_FOUND"
    assert http("picky", "GET", "/sdapi/v1/sd-models").json() == []
    assert http("picky", "GET", "/v1/models").json()["data"] == []


def test_the_command_and_the_sdk_find_the_key_in_the_environment(
    mesh: MeshHost, tokens: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IMAGEMESH_API_KEY", tokens["viewer"])
    with Client(mesh.grpc_address) as client:
        assert client.models().models
    assert main(["models", "--server", mesh.grpc_address]) == 0
    assert main(["models", "--server", mesh.grpc_address, "--api-key", tokens["wrong"]]) == 1
    assert "this API key is not known" in capsys.readouterr().err
    with pytest.raises(MeshError) as caught:
        Client(mesh.grpc_address, key="two words").models()
    assert "two words" not in str(caught.value)
