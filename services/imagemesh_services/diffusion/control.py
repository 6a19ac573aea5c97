"""The sampler's side of its ControlNets: a session each, a question each evaluation."""

import asyncio
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add

from imagemesh.v1 import controlnet_service_pb2 as pb
from imagemesh.v1 import controlnet_service_pb2_grpc as rpc
from imagemesh.v1 import diffusion_service_pb2
from imagemesh_runtime.client import Peer, Session
from imagemesh_runtime.errors import DeadlineExceeded
from imagemesh_runtime.tensors import FLOATS, Array, from_proto, map_to_proto, require_finite, to_proto
from imagemesh_services.diffusion.backend import Residuals, Run


@dataclass(frozen=True)
class Told:
    """What the model, and so its ControlNets, are told of the prompts in one phase, as ``Run`` has it."""

    phase: Hashable
    embeddings: Array
    added: Mapping[str, Array]

    @classmethod
    def of(cls, run: Run, last: "Told | None" = None) -> "Told":
        """What holds at the run's next evaluation: ``last`` itself, if that still holds. Called on the lane."""
        if last is not None and last.phase == run.phase:
            return last
        return cls(run.phase, run.embeddings(), run.added_conditions())


class Control:
    """The open sessions of one generation."""

    def __init__(self, sessions: Sequence["Session[pb.ControlResponse]"], peer: Peer, timeout: float) -> None:
        self._sessions = sessions
        self._peer = peer
        self._timeout = timeout
        self.backends: list[str] = []

    async def residuals(self, sample: Array, timestep: float, changed: Told | None = None) -> Residuals:
        """The units' residuals for these rows, summed in the order of the request.

        Args:
            changed: what they are told of the prompts from now on, if it isn't what they were told last.

        Raises:
            DeadlineExceeded: a ControlNet did not answer in time.
        """
        step = pb.ControlStep(sample=to_proto(sample), timestep=timestep)
        if changed is not None:
            step.encoder_hidden_states.CopyFrom(to_proto(changed.embeddings))
            for name, tensor in map_to_proto(changed.added).items():
                step.added_conditions[name].CopyFrom(tensor)
        question = pb.ControlRequest(step=step)
        try:
            async with asyncio.timeout(self._timeout):
                answers = await asyncio.gather(*(session.ask(question) for session in self._sessions))
        except TimeoutError as error:
            raise DeadlineExceeded(self._peer.name, f"no residuals within {self._timeout} s") from error
        self.backends = [answer.backend for answer in answers]
        return reduce(add, [_residuals(answer) for answer in answers])


@asynccontextmanager
async def open_control(
    peer: Peer,
    units: Sequence[diffusion_service_pb2.ControlUnit],
    embeddings: Array,
    added: Mapping[str, Array],
    timeout_seconds: float,
) -> AsyncIterator[Control]:
    """Start a session for every unit; what holds until more is told is sent now, once."""
    stub = rpc.ControlNetServiceStub(peer.channel)
    async with AsyncExitStack() as stack:
        sessions: list[Session[pb.ControlResponse]] = []
        for unit in units:
            session = await stack.enter_async_context(peer.session(stub.Control))
            start = pb.ControlStart(
                model=unit.model,
                image=unit.image,
                encoder_hidden_states=to_proto(embeddings),
                scale=unit.scale,
                added_conditions=map_to_proto(added),
            )
            await session.send(pb.ControlRequest(start=start))
            sessions.append(session)
        yield Control(sessions, peer, timeout_seconds)


def _residuals(answer: pb.ControlResponse) -> Residuals:
    down = [from_proto(one, f"down_residuals[{i}]", dtypes=FLOATS) for i, one in enumerate(answer.down_residuals)]
    mid = from_proto(answer.mid_residual, "mid_residual", dtypes=FLOATS)
    for i, one in enumerate(down):
        require_finite(one, f"down_residuals[{i}]")
    return Residuals(down, require_finite(mid, "mid_residual"))
