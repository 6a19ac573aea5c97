"""The sampler's side of a ControlNet session against a real service, and which way its bytes went."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from imagemesh.v1 import diffusion_service_pb2
from imagemesh_runtime.client import Peer
from imagemesh_runtime.leases import Lease
from imagemesh_runtime.metrics import DIRECTIONS, PATHS, Metrics
from imagemesh_runtime.replicas import Replicas
from imagemesh_runtime.tensors import to_proto
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.controlnet.service import create
from imagemesh_services.diffusion.backend import Residuals
from imagemesh_services.diffusion.control import Control, Question, Told, open_control
from imagemesh_services.diffusion.controlnets import ControlNets
from imagemesh_services.diffusion.incoming import Incoming
from tests.support.services import serving

_numbers = np.random.default_rng(5)
PICTURE = _numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8)
EMBEDDINGS = _numbers.normal(size=(2, 5, 32)).astype(np.float32)
SAMPLE = _numbers.normal(size=(2, 4, 8, 8)).astype(np.float32)
LIMIT = 256 << 20


def moved(metrics: Metrics) -> dict[str, int]:
    """Bytes by "path direction", those that are not 0."""
    found = {}
    for path in PATHS:
        for direction in DIRECTIONS:
            labels = {"service": metrics.service, "path": path, "direction": direction}
            value = metrics.registry.get_sample_value("imagemesh_transport_bytes_total", labels)
            assert value is not None
            found[f"{path} {direction}"] = int(value)
    return {name: value for name, value in found.items() if value}


class Steered:
    """A sampler's peer, and the service that it calls."""

    def __init__(self, server: Any, peer: Peer, metrics: Metrics, model: str) -> None:
        self.server, self.peer, self.metrics, self.server_metrics = server, peer, metrics, server.metrics
        self._model = model

    @property
    def leases(self) -> list[Lease]:
        """Those that the service has given out."""
        return list(self.server._leases._leases.values())

    def control(self, *scales: float, rounding: str = "") -> Any:
        """A session, a unit a scale."""
        return steer(self.peer, self._model, *scales, rounding=rounding)

    async def residuals(self, *timesteps: float) -> list[Residuals]:
        """What one session answers."""
        async with self.control(1.0) as control:
            return [await ask(control, timestep) for timestep in timesteps]


TOLD = Told(0, EMBEDDINGS, {})


async def ask(control: Control, timestep: float = 601.0, places: Sequence[int] | None = None) -> Residuals:
    """What units answer; if not told which, all of them."""
    incoming = Incoming()
    units = range(len(control._units)) if places is None else places
    await control.residuals(Question(SAMPLE, timestep, TOLD, units), incoming)
    return Residuals(incoming.down, incoming.mid)


def steer(
    peer: Peer, model: str, *scales: float, guess: bool = False, rounding: str = ""
) -> AbstractAsyncContextManager[Control]:
    """A session with a ControlNet service, a unit a scale."""
    picture = to_proto(PICTURE)
    units = [
        diffusion_service_pb2.ControlUnit(model=model, image=picture, scale=scale, guess_mode=guess) for scale in scales
    ]
    return open_control(ControlNets(Replicas([peer], 5)), units, TOLD, 1, 30, rounding)


@asynccontextmanager
async def peering(address: str, **settings: Any) -> AsyncIterator[tuple[Peer, Metrics]]:
    """The service at an address as the sampler sees it."""
    metrics = Metrics("diffusion")
    peer = Peer("controlnet", address, max_message_bytes=LIMIT, metrics=metrics, **settings)
    try:
        yield peer, metrics
    finally:
        await peer.close()


@asynccontextmanager
async def steered(
    models: Path | None = None, listen: str = "127.0.0.1:0", wants_memory: bool = True, **settings: Any
) -> AsyncIterator[Steered]:
    """The real service, with tiny-controlnet or the fake, and a peer for it."""
    backend, model = ("fake", "fake") if models is None else ("torch", "tiny-controlnet")
    config = ControlNetConfig(
        listen=listen, backend=backend, models=str(models or ""), device="cpu", threads=1, drain_grace_seconds=0.1,
        **settings,
    )  # fmt: skip
    async with (
        serving(create, config) as served,
        peering(served.server.address, shares_memory=wants_memory) as (peer, metrics),
    ):
        yield Steered(served.server, peer, metrics, model)


def payload(residuals: Residuals) -> int:
    """Bytes of the arrays."""
    return sum(one.nbytes for one in (*residuals.down, residuals.mid))


def same(one: Residuals, other: Residuals) -> bool:
    """Whether they agree bit by bit."""
    pairs = zip((*one.down, one.mid), (*other.down, other.mid), strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what the other side of a socket notices by itself."""
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0)
