"""A gateway that is killed at any moment comes back with every job that it accepted."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from imagemesh_client import Client, MeshError
from imagemesh_client.types import Generation
from tests.support.mesh import running_mesh
from tests.support.processes import Process, start

pytestmark = pytest.mark.timeout(280)

KILLS = 3
STEPS = 60


@pytest.fixture(scope="module")
def services() -> Iterator[dict[str, str]]:
    """The services of a mesh; gateways are the tests' own."""
    with running_mesh(backend="fake") as host:
        yield {f"IMAGEMESH_GATEWAY_{name.upper().replace('-', '_')}": s.address for name, s in host.services.items()}


@contextmanager
def gateway(folder: Path, services: dict[str, str], **more: str) -> Iterator[Process]:
    env = {
        **services,
        "IMAGEMESH_GATEWAY_JOBS_FOLDER": str(folder / "jobs"),
        "IMAGEMESH_GATEWAY_HTTP_LISTEN": "127.0.0.1:0",
        "IMAGEMESH_LOG_LEVEL": "ERROR",
        **more,
    }
    with start("gateway", f"unix:{folder}/gateway.sock", env) as process:
        process.wait_ready()
        yield process


def kill(process: Process) -> None:
    os.kill(process.process.pid, signal.SIGKILL)
    process.process.wait(30)


class Load(threading.Thread):
    """Creates jobs until it is stopped; remembers those that were accepted, by their seed."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.address = address
        self.accepted: dict[int, str] = {}
        self.stopping = threading.Event()

    def run(self) -> None:
        seed = 0
        with Client(self.address) as client:
            while not self.stopping.is_set():
                try:
                    job = client.jobs.create("under fire", seed=seed, steps=STEPS, idempotency_key=f"key {seed}")
                except MeshError as error:
                    if error.code is not grpc.StatusCode.UNAVAILABLE:
                        raise
                    continue
                self.accepted[seed] = job.id
                seed += 1
                time.sleep(0.1)


def test_no_accepted_job_is_lost_and_none_is_made_twice(tmp_path: Path, services: dict[str, str]) -> None:
    load = Load(f"unix:{tmp_path}/gateway.sock")
    for _ in range(KILLS):
        with gateway(tmp_path, services) as process:
            if not load.is_alive():
                load.start()
            time.sleep(random.uniform(0.2, 2.0))
            kill(process)
    with gateway(tmp_path, services) as process, Client(process.address) as client:
        load.stopping.set()
        load.join(60)
        assert len(load.accepted) > KILLS
        made = {seed: client.jobs.wait(job) for seed, job in load.accepted.items()}
        listed = client.jobs.list(limit=10_000)
        fresh = client.generate("under fire", seed=0, steps=STEPS)
    assert {job.id for job in listed} == set(load.accepted.values())
    assert len(listed) == len(load.accepted)
    assert [job.state for job in listed] == ["succeeded"] * len(listed)
    for seed, generation in made.items():
        assert generation.images[0].to_pil().size == (64, 64)  # decoded to its last byte
        assert generation.images[0].seed == seed
    assert made[0].images[0].png == fresh.images[0].png
    assert len(list((tmp_path / "jobs" / "pictures").iterdir())) == len(listed)


def test_a_watch_goes_on_when_the_gateway_is_back(tmp_path: Path, services: dict[str, str]) -> None:
    made: list[Generation] = []
    with Client(f"unix:{tmp_path}/gateway.sock") as client:
        with gateway(tmp_path, services) as process:
            job = client.jobs.create("a long one", steps=1000, width=512, height=512)
            waiting = threading.Thread(target=lambda: made.append(client.jobs.wait(job.id)), daemon=True)
            waiting.start()
            while client.jobs.get(job.id).progress is None:
                time.sleep(0.02)
            kill(process)
        with gateway(tmp_path, services):
            waiting.join(60)
            assert client.jobs.get(job.id).attempts == 2
    assert [one.id for one in made] == [job.id]


def test_a_stopped_gateway_puts_its_jobs_back(tmp_path: Path, services: dict[str, str]) -> None:
    more = {"IMAGEMESH_GATEWAY_DRAIN_GRACE_SECONDS": "0.2", "IMAGEMESH_GATEWAY_MAX_RUNNING_JOBS": "1"}
    with gateway(tmp_path, services, **more) as process, Client(process.address) as client:
        running = client.jobs.create("runs", steps=1000, width=1024, height=1024).id
        waiting = client.jobs.create("waits", steps=2).id
        while client.jobs.get(running).state != "running":
            time.sleep(0.02)
    assert process.process.returncode == 0
    with gateway(tmp_path, services, **more) as process, Client(process.address) as client:
        assert client.jobs.wait(running).images
        assert client.jobs.wait(waiting).images
        assert [client.jobs.get(job).attempts for job in (running, waiting)] == [2, 1]
