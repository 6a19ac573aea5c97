"""Jobs over HTTP: made, followed, cancelled, and their pictures."""

import base64
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from imagemesh_client import Client
from tests.support.mesh import running_mesh

LONG = {"prompt": "a long one", "steps": 1000, "width": 1024, "height": 1024}


@pytest.fixture(scope="module")
def mesh() -> Iterator[tuple[str, str]]:
    """Where gRPC and HTTP listen."""
    gateway = {"max_running_jobs": "1", "max_queued_jobs": "3", "max_http_watches": "3", "drain_grace_seconds": "1"}
    with running_mesh(gateway, backend="fake") as host:
        yield host.grpc_address, host.http_address


@pytest.fixture
def http(mesh: tuple[str, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{mesh[1]}", timeout=60) as http:
        yield http
        for job in http.get("/v1/jobs", params={"state": ["queued", "running"], "page_size": 500}).json()["jobs"]:
            http.post(f"/v1/jobs/{job['id']}/cancel")


def create(http: httpx.Client, **body: Any) -> str:
    answer = http.post("/v1/jobs", json={"prompt": "a cat", "steps": 2} | body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def events(http: httpx.Client, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with http.stream("GET", f"/v1/jobs/{job}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in answer.iter_lines():
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                yield name, json.loads(value)


def ended(http: httpx.Client, job: str) -> dict[str, Any]:
    return list(events(http, job))[-1][1]


def refused(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_job_draws_what_the_call_draws(http: httpx.Client) -> None:
    asked = {"prompt": "a cat", "steps": 4, "seed": 5, "num_images": 2}
    answer = http.post("/v1/jobs", json=asked | {"timeout_seconds": 60, "retention_seconds": 100})
    job = answer.json()["id"]
    assert (answer.status_code, answer.headers["location"]) == (202, f"/v1/jobs/{job}")
    end = ended(http, job)
    assert (end["state"], end["attempts"], end["request"]["seed"]) == ("succeeded", 1, 5)
    assert end["created"] <= end["started"] <= end["finished"] < end["deadline"]
    called = http.post("/v1/generate", json=asked).json()
    made = http.get(f"/v1/jobs/{job}/result").json()
    assert made["images"] == called["images"]
    assert made["id"] == job
    for i, image in enumerate(end["images"]):
        picture = http.get(image["url"])
        assert picture.headers["content-type"] == "image/png"
        assert picture.content == base64.b64decode(called["images"][i]["png"])
    first = http.get(f"/v1/jobs/{job}/result", headers={"Accept": "image/png"})
    assert first.content == base64.b64decode(called["images"][0]["png"])


def test_events_tell_of_progress_with_previews(http: httpx.Client) -> None:
    job = create(http, steps=6, preview_every=2)
    told = list(events(http, job))
    assert [name for name, _ in told][-1] == "succeeded"
    assert [data["state"] for _, data in told] == [name for name, _ in told]
    steps = [data["progress"]["step"] for name, data in told if name == "running" and "progress" in data]
    assert steps == sorted(steps)


def test_previews_are_jpegs(http: httpx.Client) -> None:
    job = create(http, **LONG, preview_every=1)
    for _, data in events(http, job):
        if previews := data.get("progress", {}).get("previews"):
            assert base64.b64decode(previews[0])[:3] == b"\xff\xd8\xff"
            break
    else:
        pytest.fail("no preview came")


def test_a_socket_tells_the_same_as_events(mesh: tuple[str, str], http: httpx.Client) -> None:
    job = create(http, steps=3)
    with connect(f"ws://{mesh[1]}/v1/jobs/{job}/socket") as socket:
        told = [json.loads(message) for message in socket]
    assert told[-1] == ended(http, job) == http.get(f"/v1/jobs/{job}").json()
    assert told[-1]["state"] == "succeeded"


def test_who_leaves_leaves_the_job_alone(mesh: tuple[str, str], http: httpx.Client) -> None:
    job = create(http, **LONG)
    for _ in range(5):  # more than may watch at a time
        with connect(f"ws://{mesh[1]}/v1/jobs/{job}/socket") as socket:
            assert json.loads(socket.recv())["id"] == job
        next(iter(events(http, job)))
    assert http.get(f"/v1/jobs/{job}").json()["state"] in ("queued", "running")


def test_more_watchers_than_may_be_are_told_to_come_back(mesh: tuple[str, str], http: httpx.Client) -> None:
    job = create(http, **LONG)
    address = f"ws://{mesh[1]}/v1/jobs/{job}/socket"
    with connect(address) as one, connect(address) as two, connect(address) as three:
        for socket in (one, two, three):
            socket.recv()
        answer = http.get(f"/v1/jobs/{job}/events")
        assert refused(answer) == (503, "UNAVAILABLE")
        assert answer.headers["retry-after"] == "1"
        with pytest.raises(InvalidStatus) as caught, connect(address):
            pass
        assert caught.value.response.status_code == 503
        assert http.get(f"/v1/jobs/{job}").status_code == 200


def test_a_page_of_another_site_may_not_watch(mesh: tuple[str, str], http: httpx.Client) -> None:
    job = create(http)
    address = f"ws://{mesh[1]}/v1/jobs/{job}/socket"
    with pytest.raises(InvalidStatus) as caught, connect(address, origin="https://evil.example"):
        pass
    assert caught.value.response.status_code == 403
    with connect(address, origin=f"http://{mesh[1]}") as socket:
        assert json.loads(socket.recv())["id"] == job


def test_the_same_key_is_the_same_job(http: httpx.Client) -> None:
    body = {"prompt": "once", "steps": 2}
    first = http.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k1"})
    second = http.post("/v1/jobs", json=body | {"idempotency_key": "k1"})
    assert (first.status_code, second.status_code) == (202, 200)
    assert first.json()["id"] == second.json()["id"]
    other = http.post("/v1/jobs", json={"prompt": "else", "steps": 2}, headers={"Idempotency-Key": "k1"})
    assert refused(other) == (409, "ALREADY_EXISTS")
    two = http.post("/v1/jobs", json=body | {"idempotency_key": "k2"}, headers={"Idempotency-Key": "k1"})
    assert refused(two) == (400, "INVALID_ARGUMENT")


def test_keys_hold_where_many_ask_at_once(mesh: tuple[str, str], http: httpx.Client) -> None:
    ids: list[str] = []

    def ask() -> None:
        body = {"prompt": "at once", "steps": 2}
        answer = httpx.post(f"http://{mesh[1]}/v1/jobs", json=body, headers={"Idempotency-Key": "all"})
        ids.append(answer.json()["id"])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(ids), len(set(ids))) == (6, 1)


def test_a_cancelled_job_has_no_result(http: httpx.Client) -> None:
    job = create(http, **LONG)
    assert refused(http.get(f"/v1/jobs/{job}/result")) == (409, "FAILED_PRECONDITION")
    assert http.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    assert http.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    answer = http.get(f"/v1/jobs/{job}/result")
    assert refused(answer) == (409, "FAILED_PRECONDITION")
    assert "it is cancelled" in answer.json()["error"]["message"]


def test_a_failed_job_answers_as_it_failed(http: httpx.Client) -> None:
    job = create(http, image=base64.b64encode(b"no picture").decode())
    assert ended(http, job)["error"]["code"] == "INVALID_ARGUMENT"
    assert refused(http.get(f"/v1/jobs/{job}/result")) == (400, "INVALID_ARGUMENT")
    late = create(http, **LONG, timeout_seconds=0.3)
    assert ended(http, late)["state"] == "failed"
    assert refused(http.get(f"/v1/jobs/{late}/images/0")) == (504, "DEADLINE_EXCEEDED")


def test_a_job_is_kept_as_long_as_asked(http: httpx.Client) -> None:
    job = create(http, retention_seconds=0.2)
    ended(http, job)
    while http.get(f"/v1/jobs/{job}").status_code == 200:
        pass
    assert refused(http.get(f"/v1/jobs/{job}/result")) == (404, "NOT_FOUND")


def test_lists_are_paged_and_narrowed(mesh: tuple[str, str], http: httpx.Client) -> None:
    ids = []
    for _ in range(3):
        ids.append(create(http))
        ended(http, ids[-1])
    first = http.get("/v1/jobs", params={"page_size": 2, "state": "succeeded"}).json()
    rest = http.get("/v1/jobs", params={"page_token": first["next_page_token"]}).json()
    assert [job["id"] for job in first["jobs"] + rest["jobs"]][:3] == ids[::-1]
    with Client(mesh[0]) as client:
        assert client.jobs.get(ids[0]).state == "succeeded"


def test_a_full_queue_says_when_to_come_back(http: httpx.Client) -> None:
    running = create(http, **LONG)
    next(data for name, data in events(http, running) if name == "running")
    for _ in range(3):
        create(http)
    answer = http.post("/v1/jobs", json={"prompt": "x"})
    assert refused(answer) == (429, "RESOURCE_EXHAUSTED")
    assert answer.headers["retry-after"] == "5"


@pytest.mark.parametrize("job", ["unknown", "..%2f..%2fetc%2fpasswd", "%00"])
def test_an_unknown_id_is_not_found(mesh: tuple[str, str], http: httpx.Client, job: str) -> None:
    for path in ("", "/result", "/events", "/images/0"):
        assert refused(http.get(f"/v1/jobs/{job}{path}")) == (404, "NOT_FOUND")
    assert refused(http.post(f"/v1/jobs/{job}/cancel")) == (404, "NOT_FOUND")
    with pytest.raises(InvalidStatus) as caught, connect(f"ws://{mesh[1]}/v1/jobs/{job}/socket"):
        pass
    assert caught.value.response.status_code in (403, 404)  # no route takes a name with a slash in it


BAD = {
    "timeout_seconds must be a number of seconds above 0": {"timeout_seconds": 0},
    "retention_seconds must be above 0, and at most": {"retention_seconds": 1e9},
    "idempotency_key must be at most 200 characters": {"idempotency_key": "k" * 201},
    "preview_every must be 0 to 1000": {"preview_every": -1},
    "keep_for must be left out (the fields are prompt,": {"keep_for": 1},
    "steps must be 1 to 1000, got 5000": {"steps": 5000},
}


@pytest.mark.parametrize(("complaint", "body"), BAD.items(), ids=[text.split()[0] for text in BAD])
def test_bad_fields_are_named(http: httpx.Client, complaint: str, body: dict[str, Any]) -> None:
    answer = http.post("/v1/jobs", json={"prompt": "x"} | body)
    assert refused(answer) == (400, "INVALID_ARGUMENT")
    assert complaint in answer.json()["error"]["message"]


def test_bad_queries_are_named(http: httpx.Client) -> None:
    for query, complaint in {
        "state=asleep": "state.0 must be queued, running, succeeded, failed, cancelled, got 'asleep'",
        "page_size=501": "page_size must be 1 to 500, got '501'",
        "page_token=x": "page_token must be next_page_token of an earlier answer",
    }.items():
        answer = http.get(f"/v1/jobs?{query}")
        assert refused(answer) == (400, "INVALID_ARGUMENT")
        assert complaint in answer.json()["error"]["message"]
