"""Jobs of a whole mesh, by way of the SDK."""

import asyncio
import threading
from collections.abc import Iterator

import grpc
import pytest

from imagemesh.v1 import gateway_service_pb2, job_service_pb2, job_service_pb2_grpc
from imagemesh_client import AsyncClient, Client, MeshError
from tests.support.mesh import running_mesh

# Long enough that a test can look at it while it runs, with the fake sampler.
LONG = 1000


@pytest.fixture(scope="module")
def mesh() -> Iterator[str]:
    gateway = {"max_running_jobs": "1", "max_queued_jobs": "3", "drain_grace_seconds": "1"}
    with running_mesh(gateway, backend="fake") as host:
        yield host.grpc_address


@pytest.fixture
def client(mesh: str) -> Iterator[Client]:
    with Client(mesh) as client:
        yield client
        for job in client.jobs.list(["queued", "running"]):
            client.jobs.cancel(job.id)


@pytest.fixture
def stub(mesh: str) -> Iterator[job_service_pb2_grpc.JobServiceStub]:
    with grpc.insecure_channel(mesh) as channel:
        yield job_service_pb2_grpc.JobServiceStub(channel)


def long_job(client: Client, **options: object) -> str:
    """A job that is under way."""
    job = client.jobs.create("a long one", steps=LONG, width=1024, height=1024, **options)  # type: ignore[arg-type]
    for now in client.jobs.watch(job.id):
        if now.state == "running":
            break
    return job.id


def test_a_job_draws_what_the_call_draws(client: Client) -> None:
    job = client.jobs.create("a cat", seed=5, steps=4, n=2)
    steps: list[int] = []
    made = client.jobs.wait(job.id, on_progress=lambda progress: steps.append(progress.step))
    assert made.id == job.id
    assert [image.seed for image in made.images] == [5, 6]
    called = client.generate("a cat", seed=5, steps=4, n=2)
    assert [image.png for image in made.images] == [image.png for image in called.images]
    assert steps == sorted(steps)
    assert {timing.stage for timing in made.timings} == {"text-encoder", "diffusion", "vae"}


def test_a_job_tells_of_its_life(client: Client) -> None:
    created = client.jobs.create("a dog", steps=4, finish_within=60, keep_for=100)
    assert created.state in ("queued", "running")
    assert not created.done
    client.jobs.wait(created.id)
    job = client.jobs.get(created.id)
    assert (job.state, job.prompt, job.attempts, job.error) == ("succeeded", "a dog", 1, None)
    assert job.started is not None
    assert job.finished is not None
    assert job.expires is not None
    assert job.deadline is not None
    assert job.created <= job.started <= job.finished < job.deadline
    assert (job.expires - job.finished).total_seconds() == pytest.approx(100)
    assert job.result is not None


def test_jobs_run_in_the_order_of_their_priority(client: Client) -> None:
    running = long_job(client)
    batch = client.jobs.create("last", priority="batch", steps=2)
    normal = client.jobs.create("second", steps=2)
    interactive = client.jobs.create("first", priority="interactive", steps=2)
    assert (interactive.position, client.jobs.get(normal.id).position, client.jobs.get(batch.id).position) == (0, 1, 2)
    client.jobs.cancel(running)
    for job in (batch, normal, interactive):
        client.jobs.wait(job.id)
    started = [client.jobs.get(job.id).started for job in (interactive, normal, batch)]
    assert started == sorted(started)  # type: ignore[type-var]


def test_a_queued_job_can_be_cancelled_and_never_runs(client: Client) -> None:
    long_job(client)
    waiting = client.jobs.create("never", steps=2)
    assert client.jobs.cancel(waiting.id).state == "cancelled"
    assert client.jobs.get(waiting.id).attempts == 0
    with pytest.raises(MeshError) as caught:
        client.jobs.wait(waiting.id)
    assert caught.value.code is grpc.StatusCode.CANCELLED


def test_a_running_job_can_be_cancelled_and_makes_room(client: Client) -> None:
    running = long_job(client)
    waiting = client.jobs.create("next", steps=2)
    cancelled = client.jobs.cancel(running)
    assert cancelled.state == "cancelled"
    assert client.jobs.wait(waiting.id).images
    assert client.jobs.get(running).state == "cancelled"


def test_a_finished_job_stays_as_it_is_when_it_is_cancelled(client: Client) -> None:
    job = client.jobs.create("done", steps=2)
    client.jobs.wait(job.id)
    assert client.jobs.cancel(job.id).state == "succeeded"


def test_the_same_key_is_the_same_job(client: Client) -> None:
    first = client.jobs.create("once", steps=2, idempotency_key="k1")
    second = client.jobs.create("once", steps=2, idempotency_key="k1")
    assert first.id == second.id
    with pytest.raises(MeshError, match="idempotency_key 'k1' is taken by job") as caught:
        client.jobs.create("something else", steps=2, idempotency_key="k1")
    assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS


def test_what_waits_beyond_its_deadline_fails(client: Client) -> None:
    long_job(client)
    late = client.jobs.create("late", steps=2, finish_within=0.3)
    with pytest.raises(MeshError, match="its deadline passed while it was queued") as caught:
        client.jobs.wait(late.id)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_what_runs_beyond_its_deadline_fails(client: Client) -> None:
    job = client.jobs.create("long", steps=LONG, width=1024, height=1024, finish_within=0.5)
    with pytest.raises(MeshError) as caught:
        client.jobs.wait(job.id)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert client.jobs.get(job.id).attempts == 1


def test_what_cannot_be_drawn_is_refused_at_once(client: Client) -> None:
    before = len(client.jobs.list(limit=500))
    with pytest.raises(MeshError, match="steps must be 1 to 1000, got 5000"):
        client.jobs.create("x", steps=5000)
    with pytest.raises(MeshError, match="not found") as caught:
        client.jobs.create("x", model="nobody")
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert len(client.jobs.list(limit=500)) == before


def test_a_failure_of_the_services_is_the_jobs(client: Client) -> None:
    job = client.jobs.create("x", image=b"this is no picture", steps=4)
    with pytest.raises(MeshError) as caught:
        client.jobs.wait(job.id)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    failed = client.jobs.get(job.id)
    assert failed.state == "failed"
    assert failed.error is not None
    assert failed.error.code == "INVALID_ARGUMENT"
    assert "image" in failed.error.message


def test_a_full_queue_refuses_with_a_time_to_come_back(client: Client) -> None:
    long_job(client)
    for i in range(3):
        client.jobs.create(f"waits {i}", steps=2)
    with pytest.raises(MeshError, match="queue jobs is full") as caught:
        client.jobs.create("one too many", steps=2)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_after() == pytest.approx(5)


def test_lists_are_paged_from_the_newest(client: Client, stub: job_service_pb2_grpc.JobServiceStub) -> None:
    ids = []
    for i in range(3):
        ids.append(client.jobs.create(f"listed {i}", steps=2).id)
        client.jobs.wait(ids[-1])
    first = stub.ListJobs(job_service_pb2.ListJobsRequest(page_size=2))
    rest = stub.ListJobs(job_service_pb2.ListJobsRequest(page_size=2, page_token=first.next_page_token))
    assert [job.id for job in (*first.jobs, *rest.jobs)][:3] == ids[::-1]
    assert not any(job.HasField("result") for job in first.jobs)
    assert [job.id for job in client.jobs.list(["succeeded"], limit=1)] == ids[-1:]
    assert client.jobs.list(["running"]) == []


REFUSED = {
    "states[0] must be JOB_STATE_QUEUED": job_service_pb2.ListJobsRequest(states=[9]),  # type: ignore[list-item]
    "page_token must be next_page_token": job_service_pb2.ListJobsRequest(page_token="x'; DROP TABLE jobs"),
    "page_size must be at most 500": job_service_pb2.ListJobsRequest(page_size=501),
    "generate must be a GenerateRequest": job_service_pb2.CreateJobRequest(),
    "timeout_seconds must be above 0": job_service_pb2.CreateJobRequest(
        generate=gateway_service_pb2.GenerateRequest(), timeout_seconds=float("nan")
    ),
    "retention_seconds must be above 0": job_service_pb2.CreateJobRequest(
        generate=gateway_service_pb2.GenerateRequest(), retention_seconds=1e9
    ),
    "idempotency_key must be at most 200": job_service_pb2.CreateJobRequest(
        generate=gateway_service_pb2.GenerateRequest(), idempotency_key="k" * 201
    ),
}


@pytest.mark.parametrize(("complaint", "request_"), REFUSED.items(), ids=[text.split()[0] for text in REFUSED])
def test_bad_input_is_named(stub: job_service_pb2_grpc.JobServiceStub, complaint: str, request_: object) -> None:
    call = stub.ListJobs if isinstance(request_, job_service_pb2.ListJobsRequest) else stub.CreateJob
    with pytest.raises(grpc.RpcError) as caught:
        call(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert complaint in caught.value.details()


@pytest.mark.parametrize("job", ["", "unknown", "../../etc/passwd", "\0"])
def test_an_unknown_id_is_not_found(stub: job_service_pb2_grpc.JobServiceStub, job: str) -> None:
    for call in (
        lambda: stub.GetJob(job_service_pb2.GetJobRequest(id=job)),
        lambda: stub.CancelJob(job_service_pb2.CancelJobRequest(id=job)),
        lambda: list(stub.WatchJob(job_service_pb2.WatchJobRequest(id=job))),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_drawn_seed_is_drawn_once(client: Client) -> None:
    job = client.jobs.create("any", steps=2)
    made = client.jobs.wait(job.id)
    assert client.generate("any", steps=2, seed=made.parameters.seed).images[0].png == made.images[0].png


def test_many_may_watch_and_leave(client: Client) -> None:
    job = long_job(client)
    ends: list[str] = []

    def watch() -> None:
        for now in client.jobs.watch(job):
            if now.done:
                ends.append(now.state)

    threads = [threading.Thread(target=watch) for _ in range(5)]
    for thread in threads:
        thread.start()
    changes = client.jobs.watch(job)
    next(changes)
    changes.close()
    client.jobs.cancel(job)
    for thread in threads:
        thread.join(30)
    assert ends == ["cancelled"] * 5


async def test_the_async_client_has_jobs_too(mesh: str) -> None:
    async with AsyncClient(mesh) as client:
        jobs = await asyncio.gather(*(client.jobs.create(f"at once {i}", steps=2) for i in range(3)))
        made = await asyncio.gather(*(client.jobs.wait(job.id) for job in jobs))
        assert [one.id for one in made] == [job.id for job in jobs]
