"""Whether the gateway can serve, as the services' own health says."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import Gauge

from imagemesh_gateway.mesh import Mesh
from imagemesh_runtime.client import Peer
from imagemesh_runtime.errors import MeshError
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.server import READINESS

# What each kind of request needs at least one ready replica of.
NEEDS: Final[Mapping[str, Sequence[str]]] = {
    "generate": ("text-encoder", "diffusion", "vae"),
    "classify": ("vit",),
    "embed": ("vit",),
}
READY: Final = "ready"
# How long what was found is believed, and how long a service may take to say.
_BELIEVED_SECONDS = 1.0
_ASKING_SECONDS = 1.0


@dataclass(frozen=True)
class State:
    """What was found: of every service "ready" or what is wrong with it."""

    services: Mapping[str, str]
    ready: Mapping[str, bool]

    @property
    def serves(self) -> list[str]:
        """The kinds of request that can be served."""
        return [kind for kind, needs in NEEDS.items() if all(self.ready[name] for name in needs)]


class Readiness:
    """Asks all services at once, when somebody wants to know and what was found is old."""

    def __init__(self, mesh: Mesh, metrics: Metrics) -> None:
        self._replicas = {replicas.name: replicas for replicas in mesh.services}
        self._asked = 0.0
        self._found: asyncio.Task[State] | None = None
        gauge = Gauge(
            "imagemesh_ready_replicas", "Replicas of a service that were ready when /readyz last asked them.",
            ("service", "peer"), registry=metrics.registry,
        )  # fmt: skip
        self._gauges = {name: gauge.labels(metrics.service, name) for name in self._replicas}

    async def state(self) -> State:
        """What the services say, at most a second old; in at most another second."""
        if self._found is None or (self._found.done() and time.monotonic() - self._asked > _BELIEVED_SECONDS):
            self._asked = time.monotonic()
            self._found = asyncio.create_task(self._ask_all())
        return await asyncio.shield(self._found)  # whoever asks first may go before the others

    async def _ask_all(self) -> State:
        names = list(self._replicas)
        services = zip(names, await asyncio.gather(*(self._ask_service(name) for name in names)), strict=True)
        found = dict(services)
        return State(
            {name: _told(answers) for name, answers in found.items()},
            {name: READY in answers for name, answers in found.items()},
        )

    async def _ask_service(self, name: str) -> list[str]:
        answers = await asyncio.gather(*map(_ask, self._replicas[name].peers))
        self._gauges[name].set(answers.count(READY))
        return answers


def _told(answers: Sequence[str]) -> str:
    if not answers:
        return "no replica of it is known"
    ready = answers.count(READY)
    if ready == len(answers):
        return READY
    wrong = "; ".join(dict.fromkeys(answer for answer in answers if answer != READY))
    return wrong if len(answers) == 1 else f"{ready} of {len(answers)} ready: {wrong}"


async def _ask(peer: Peer) -> str:
    stub: Any = health_pb2_grpc.HealthStub(peer.channel)
    request = health_pb2.HealthCheckRequest(service=READINESS)
    try:
        answer = await peer.unary(stub.Check, request, timeout_seconds=_ASKING_SECONDS)
    except MeshError as error:
        return str(error).removeprefix(f"{peer.name}: ").removeprefix(f"{peer.name} ")
    ready = answer.status == health_pb2.HealthCheckResponse.SERVING
    return READY if ready else "loads its models, drains, or its device hangs"
