"""Several replicas of the diffusion service as processes, and a gateway in this one before them."""

import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.mesh import running_mesh
from tests.support.processes import Process, start
from tests.support.tampered import RECORD_VARIABLE, Record

MODULE = "tests.support.tampered"


class Fleet:
    """Replicas by number. Their addresses stay when they are started again."""

    def __init__(self, stack: ExitStack, folder: Path, backend: str, count: int, settings: dict[str, str]) -> None:
        self.record = Record(folder / "record")
        self.record.path.touch()
        self.addresses = [f"unix:{folder}/{i}.sock" for i in range(count)]
        self._metrics = [f"127.0.0.1:{port}" for port in _free_ports(count)]
        self._stack = stack
        self._settings = {
            "IMAGEMESH_ADMIN_LISTEN": "127.0.0.1:0", "IMAGEMESH_BACKEND": f"recorded-{backend}",
            "IMAGEMESH_THREADS": "1", "IMAGEMESH_LOG_LEVEL": "WARNING", RECORD_VARIABLE: str(self.record.path),
            **settings,
        }  # fmt: skip
        self.replicas = [self._start(i) for i in range(count)]
        self.wait_ready()

    def wait_ready(self) -> None:
        """Return when all are."""
        for replica in self.replicas:
            replica.wait_ready()

    def restart(self) -> None:
        """Start those that have ended; they are ready when it returns."""
        for i, replica in enumerate(self.replicas):
            if replica.process.poll() is not None:
                self.replicas[i] = self._start(i)
        self.wait_ready()

    def metric(self, i: int, name: str) -> float:
        """The value of one series of a replica that runs."""
        text = httpx.get(f"http://{self._metrics[i]}/metrics").text
        samples = (one for family in text_string_to_metric_families(text) for one in family.samples)
        return next(one.value for one in samples if one.name == name)

    def _start(self, i: int) -> Process:
        settings = {**self._settings, "IMAGEMESH_METRICS_LISTEN": self._metrics[i]}
        return self._stack.enter_context(start("diffusion", self.addresses[i], settings, module=MODULE))


@contextmanager
def fleet(backend: str, models: Path, count: int = 2, *, max_batch: int = 1, **more: str) -> Iterator[Fleet]:
    """``count`` replicas, ready, and stopped at the end; ``more`` is of their environment."""
    settings = {"IMAGEMESH_MODELS": str(models), "IMAGEMESH_MAX_BATCH": str(max_batch), **more}
    # A path short enough for Unix sockets.
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        yield Fleet(stack, Path(folder), backend, count, settings)


@contextmanager
def gateway_before(found: Fleet, backend: str, models: Path, every: int) -> Iterator[str]:
    """The rest of the mesh; answers the gateway's address."""
    gateway = {"diffusion": ",".join(found.addresses), "checkpoint_every": str(every)}
    with running_mesh(gateway, without=["diffusion"], backend=backend, models=str(models), max_batch="1") as mesh:
        yield mesh.grpc_address


def _free_ports(count: int) -> list[int]:
    """They stay free while a replica is away: the system gives ports of above this range to who asks for any."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            found.append(port)
    return found
