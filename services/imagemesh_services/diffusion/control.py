"""The sampler's side of its ControlNets: a session each service, a question each evaluation."""

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

from imagemesh.v1 import controlnet_service_pb2 as pb
from imagemesh.v1 import controlnet_service_pb2_grpc as rpc
from imagemesh.v1 import diffusion_service_pb2
from imagemesh.v1.tensor_pb2 import Tensor
from imagemesh_runtime.client import Peer, Session
from imagemesh_runtime.errors import InvalidArgument, MeshError
from imagemesh_runtime.parcels import Parcel
from imagemesh_runtime.savings import ROUNDINGS, restored
from imagemesh_runtime.tensors import FLOATS, Array
from imagemesh_services.diffusion.backend import Residuals, Run
from imagemesh_services.diffusion.controlnets import ControlNets, Late, Share
from imagemesh_services.diffusion.features import steers
from imagemesh_services.diffusion.incoming import Incoming

Answer = Parcel[pb.ControlResponse]
Units = Sequence[diffusion_service_pb2.ControlUnit]
_MAX_RESIDUALS: Final = 64  # of one step


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


@dataclass(frozen=True)
class Question:
    """What ControlNets are asked at one evaluation.

    Attributes:
        sample: float [rows, channels, h, w].
        told: what holds of the prompts.
        places: the units at work, by their places in the request.
    """

    sample: Array
    timestep: float
    told: Told
    places: Sequence[int]


class Control:
    """The ControlNets of one generation, with a session open at each service that has some of them."""

    def __init__(self, units: Units, asked: Sequence["_Asked"]) -> None:
        self._units = units
        self._asked = asked

    @property
    def backends(self) -> list[str]:
        """What runs each unit, as far as it was asked."""
        found = {place: one.backend for one in self._asked for place in one.places if one.backend}
        return [found[place] for place in sorted(found)]

    @property
    def received(self) -> int:
        """Bytes of residuals that came so far, as they came."""
        return sum(one.received for one in self._asked)

    def at_work(self, evaluation: int, evaluations: int) -> list[int]:
        """The places of the units that steer that evaluation of so many, counted as diffusers' pipelines do."""

        def works(unit: diffusion_service_pb2.ControlUnit) -> bool:
            return steers(unit.start, unit.end if unit.HasField("end") else 1.0, evaluation, evaluations)

        return [place for place, unit in enumerate(self._units) if works(unit)]

    async def residuals(self, question: Question, incoming: Incoming, begun: Callable[[], None] = lambda: None) -> None:
        """Complete ``incoming`` with the units' residuals; ``begun`` is called when all are at it.

        Those of one service are summed there, and the services' by ``incoming``, in the order of the first units that
        they have.

        Raises:
            DeadlineExceeded: a ControlNet did not answer in time.
            MeshError: one failed, and nobody else can do its work.
        """
        asked = [one for one in self._asked if set(one.places) & set(question.places)]
        waited = len(asked)

        def one_begun() -> None:
            nonlocal waited
            waited -= 1
            if not waited:
                begun()

        asking = [asyncio.create_task(one.ask(question, one_begun)) for one in asked]
        try:
            found = await asyncio.gather(*asking)
            _require_addable(found)
            incoming.complete(*found)
        finally:
            incoming.give_up()
            await _end(asking)
            asking.clear()  # an error refers to this frame: what it holds of shared memory shall go with it


async def _end(tasks: Sequence[asyncio.Task[Residuals]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Asked:
    """A session with a service about some of the units; with another that has them, when it fails."""

    def __init__(
        self, units: Units, share: Share, nets: ControlNets, negative_rows: int, timeout: float, rounding: str
    ) -> None:
        self.places = share.places
        self.backend = ""
        self.received = 0
        self._units = [units[place] for place in share.places]
        self._peers = list(share.peers)
        self._nets = nets
        self._negative_rows = negative_rows
        self._timeout = timeout
        self._rounding = rounding
        self._session: Session[Answer] | None = None
        self._work = ExitStack()
        self._told: Told | None = None

    @property
    def _peer(self) -> Peer:
        return self._peers[0]

    async def ask(self, question: Question, begun: Callable[[], None]) -> Residuals:
        """The units' residuals; ``begun`` is called once, when the last of them is at work."""
        heard = False

        def first() -> None:
            nonlocal heard
            if not heard:
                heard = True
                begun()

        while True:
            try:
                return await self._try(question, first)
            except MeshError as error:
                await self.close(error)
                if not self._nets.note_failure(self._peer, error) or len(self._peers) == 1:
                    raise
                self._peers.pop(0)

    async def _try(self, question: Question, first: Callable[[], None]) -> Residuals:
        try:
            async with asyncio.timeout(self._timeout):
                if self._session is None:
                    self._session = await self.open(question.told)
                await self._session.send(self._step(question))
                return await self._hear(self._session, first)
        except TimeoutError as error:
            raise Late(self._peer.name, f"no residuals within {self._timeout} s") from error

    async def _hear(self, session: Session[Answer], first: Callable[[], None]) -> Residuals:
        down: list[Array] = []
        heard = False  # that the work has begun
        while True:
            answer = await session.hear()
            told, at = answer.message, len(down)
            if at + len(told.down_residuals) > _MAX_RESIDUALS:
                raise InvalidArgument("down_residuals", f"over {_MAX_RESIDUALS}", f"at most {_MAX_RESIDUALS}")
            for i, one in enumerate(told.down_residuals):
                scales = told.down_scales[i] if i < len(told.down_scales) else None
                down.append(await self._read(answer, f"down_residuals[{at + i}]", one, scales))
            self.backend = told.backend
            if told.HasField("mid_residual"):
                scales = told.mid_scales if told.HasField("mid_scales") else None
                found = Residuals(down, await self._read(answer, "mid_residual", told.mid_residual, scales))
                first()
                return found
            if len(down) == at and (at or heard):
                raise InvalidArgument("down_residuals", "an empty message", "one with residuals")
            heard = True
            first()

    async def _read(self, answer: Answer, field: str, residual: Tensor, scales: Tensor | None) -> Array:
        if not self._rounding:
            whole = answer.array(residual, field, dtypes=FLOATS)
            self.received += whole.nbytes
            return whole
        dtype = ROUNDINGS[self._rounding][0].name
        values = answer.array(residual, field, dtypes=[dtype], shape=(None, None, None, None))
        if scales is None:
            raise InvalidArgument(f"{field}'s scales", "nothing", "a tensor: it is rounded")
        path = f"scales of {field}"
        factors = answer.array(scales, path, dtypes=["float32"], shape=values.shape[:2])
        self.received += values.nbytes + factors.nbytes
        # Not on the event loop: they may be millions. The arrays keep the memory that they came in.
        return await asyncio.to_thread(restored, values, factors)

    def _step(self, question: Question) -> Parcel[pb.ControlRequest]:
        parcel = Parcel[pb.ControlRequest]()
        step = pb.ControlStep(sample=parcel.add(question.sample), timestep=question.timestep)
        if question.told is not self._told:
            self._told = question.told
            step.encoder_hidden_states.CopyFrom(parcel.add(question.told.embeddings))
            for name, tensor in parcel.add_map(question.told.added).items():
                step.added_conditions[name].CopyFrom(tensor)
        mine = [i for i, place in enumerate(self.places) if place in question.places]
        if len(mine) < len(self.places):
            step.units.extend(mine)
        return parcel.seal(pb.ControlRequest(step=step))

    async def open(self, told: Told) -> Session[Answer]:
        """Begin a session with the best of the peers that are left; what holds until more is told is sent now, once."""
        stub = rpc.ControlNetServiceStub(self._peer.parcels)
        session: Session[Answer] = self._peer.session(stub.Control)
        with ExitStack() as work:
            work.enter_context(self._nets.work_on(self._peer))
            await session.__aenter__()
            self._work = work.pop_all()
        self._session = session
        parcel = Parcel[pb.ControlRequest]()
        units = [
            pb.ControlNetUnit(
                model=unit.model,
                image=unit.image,
                scale=unit.scale,
                guess_mode=unit.guess_mode,
                block_weights=unit.block_weights,
                control_type=unit.control_type if unit.HasField("control_type") else None,
            )
            for unit in self._units
        ]
        start = pb.ControlStart(
            units=units,
            encoder_hidden_states=parcel.add(told.embeddings),
            added_conditions=parcel.add_map(told.added),
            by_block=True,
            negative_rows=self._negative_rows,
            residuals=self._rounding,
        )
        await session.send(parcel.seal(pb.ControlRequest(start=start)))
        self._told = told
        return session

    async def close(self, error: BaseException | None = None) -> None:
        """End the session: with an error at once, else with a good-bye."""
        session, self._session = self._session, None
        if session is not None:
            with self._work:
                await session.__aexit__(None if error is None else type(error), error, None)


@asynccontextmanager
async def open_control(
    nets: ControlNets, units: Units, told: Told, negative_rows: int, timeout_seconds: float, rounding: str = ""
) -> AsyncIterator[Control]:
    """Start the sessions that the units take."""
    async with AsyncExitStack() as stack:
        asked = []
        for share in await nets.share([unit.model for unit in units]):
            one = _Asked(units, share, nets, negative_rows, timeout_seconds, rounding)

            async def end(kind: object, error: BaseException | None, trace: object, one: _Asked = one) -> None:
                await one.close(error)

            stack.push_async_exit(end)
            asked.append(one)
        yield Control(units, asked)


def _require_addable(found: Sequence[Residuals]) -> None:
    """That they can be added but for rows that some of them lack.

    Raises:
        InvalidArgument: they are of models that differ.
    """
    first, *others = [[list(one.shape[1:]) for one in (*part.down, part.mid)] for part in found]
    for other in others:
        if other != first:
            raise InvalidArgument("controls", f"residuals of {first} and {other}", "ControlNets of one family")
