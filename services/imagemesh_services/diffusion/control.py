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
from imagemesh_runtime.parcels import Parcel
from imagemesh_runtime.tensors import FLOATS, Array, require_finite
from imagemesh_services.diffusion.backend import Residuals, Run

Answer = Parcel[pb.ControlResponse]


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

    def __init__(self, sessions: Sequence[Session[Answer]], peer: Peer, timeout: float) -> None:
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
        question = Parcel[pb.ControlRequest]()
        step = pb.ControlStep(sample=question.add(sample), timestep=timestep)
        if changed is not None:
            step.encoder_hidden_states.CopyFrom(question.add(changed.embeddings))
            for name, tensor in question.add_map(changed.added).items():
                step.added_conditions[name].CopyFrom(tensor)
        question.seal(pb.ControlRequest(step=step))
        try:
            async with asyncio.timeout(self._timeout):
                answers = await asyncio.gather(*(session.ask(question) for session in self._sessions))
        except TimeoutError as error:
            raise DeadlineExceeded(self._peer.name, f"no residuals within {self._timeout} s") from error
        self.backends = [answer.message.backend for answer in answers]
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
    stub = rpc.ControlNetServiceStub(peer.parcels)
    async with AsyncExitStack() as stack:
        sessions: list[Session[Answer]] = []
        for unit in units:
            session = await stack.enter_async_context(peer.session(stub.Control))
            opening = Parcel[pb.ControlRequest]()
            start = pb.ControlStart(
                model=unit.model,
                image=unit.image,
                encoder_hidden_states=opening.add(embeddings),
                scale=unit.scale,
                added_conditions=opening.add_map(added),
            )
            await session.send(opening.seal(pb.ControlRequest(start=start)))
            sessions.append(session)
        yield Control(sessions, peer, timeout_seconds)


def _residuals(answer: Answer) -> Residuals:
    told = answer.message
    down = [answer.array(one, f"down_residuals[{i}]", dtypes=FLOATS) for i, one in enumerate(told.down_residuals)]
    mid = answer.array(told.mid_residual, "mid_residual", dtypes=FLOATS)
    for i, one in enumerate(down):
        require_finite(one, f"down_residuals[{i}]")
    return Residuals(down, require_finite(mid, "mid_residual"))
