"""Ticks: forwards that several generations share, and what each of them then has to tell.

A tick is one piece of work on the lane. As long as nothing changes, the lane begins the next one by itself, and its
device doesn't wait until the event loop has heard of the last.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from imagemesh_runtime.errors import InvalidArgument, NotFinite
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.tensors import require_finite
from imagemesh_services.diffusion.backend import Late
from imagemesh_services.diffusion.generation import Event, Finished, Frozen, Generation, Progress


@dataclass(frozen=True)
class Outcome:
    """What a tick made of one generation.

    Attributes:
        events: what to tell its caller, in this order.
        fault: what went wrong; it ends here.
        seconds: of the lane's time that previews, checkpoints and the result took.
        late: its residuals did not come in time, and it is where it was.
    """

    events: Sequence[Event] = ()
    fault: Exception | None = None
    seconds: float = 0.0
    late: bool = False

    @property
    def last(self) -> bool:
        """Whether the generation ends with it."""
        return self.fault is not None or any(isinstance(event, Finished) for event in self.events)

    @property
    def freezes(self) -> bool:
        """Whether there is a checkpoint to be sent before the generation goes on."""
        return any(isinstance(event, Frozen) for event in self.events)


@dataclass(frozen=True)
class Cost:
    """What the model does at a tick.

    Attributes:
        shared: rows of the forward that all have together.
        rows: of all its forwards.
        forwards: that one, and those of passes that are not shared.
    """

    shared: int
    rows: int
    forwards: int


@dataclass(frozen=True)
class Tick:
    """One that is over; times are in seconds.

    Attributes:
        outcomes: one for each generation of the batch.
        queue: how long it waited for the lane.
        forward: of the model alone.
        compute: of all the lane did.
        more: another one follows.
    """

    outcomes: Sequence[Outcome]
    cost: Cost
    queue: float
    forward: float
    compute: float
    more: bool


class Ticks:
    """Ticks of one batch. The lane is at most one ahead of what ``next`` has told.

    Args:
        chained: whether the lane may go on by itself, until ``halt``.
    """

    def __init__(self, lane: Lane, batch: Sequence[Generation], *, chained: bool) -> None:
        self.batch = batch
        self._lane = lane
        self._halted = not chained
        self._abandoned = False
        self._begun = self._told = 0
        # What the lane is at, if it is at one of these.
        self.under_way: Cost | None = None
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Queue[Tick | None] = asyncio.Queue()
        self._post()

    def halt(self) -> None:
        """Something changed: none is begun but the first."""
        self._halted = True

    def abandon(self) -> None:
        """Nobody will ask: none is begun."""
        self._halted = self._abandoned = True

    async def next(self) -> Tick | None:
        """Wait for the next one that is over; None: the one that was to follow was not begun."""
        tick = await self._over.get()
        self._told += 1
        return tick

    def _post(self) -> None:
        submitted = perf_counter()
        self._lane.post(lambda: self._run(submitted))

    def _run(self, submitted: float) -> None:
        """Called on the lane."""
        tick = None
        if not self._abandoned and not (self._halted and self._begun):
            self._begun += 1
            begun, cost = perf_counter(), cost_of(self.batch)
            self.under_way = cost
            outcomes, forward = advance(self.batch)
            self.under_way = None
            more = self._goes_on(outcomes)
            tick = Tick(outcomes, cost, begun - submitted, forward, perf_counter() - begun, more)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._over.put_nowait, tick)

    def _goes_on(self, outcomes: Sequence[Outcome]) -> bool:
        if self._halted or self._begun > self._told + 1 or any(one.last or one.freezes for one in outcomes):
            return False
        if len({one.started.key for one in self.batch}) > 1:  # what they ask of the model may change at a step
            return False
        try:
            self._post()
        except RuntimeError:  # the lane is being closed
            return False
        return True


def cost_of(batch: Sequence[Generation]) -> Cost:
    """Of the next evaluation of them all."""
    shared = sum(len(one.inputs.seeds) * one.passes.shared for one in batch)
    rows = sum(len(one.inputs.seeds) * one.passes.all for one in batch)
    return Cost(shared, rows, 1 + sum(one.inputs.forwards(one.passes) for one in batch))


def advance(batch: Sequence[Generation]) -> tuple[list[Outcome], float]:
    """Do the next evaluation of all in ``batch``; answers an outcome each, and the seconds of the forward.

    Called on the lane. One generation's fault is its own, and one whose caller has gone has nothing to tell.
    """
    begun = perf_counter()
    faults: Sequence[Exception | None]
    try:
        faults = batch[0].model.advance([one.started for one in batch], [one.residuals for one in batch])
        if len(faults) != len(batch):
            raise RuntimeError(f"{len(batch)} runs gave {len(faults)} answers")
    except Exception as error:  # the backend broke its promise; these end, and the others go on
        faults = [error] * len(batch)
    seconds = perf_counter() - begun
    return [_outcome(one, fault) for one, fault in zip(batch, faults, strict=True)], seconds


def _outcome(generation: Generation, fault: Exception | None) -> Outcome:
    if isinstance(fault, Late):
        return Outcome(late=True)
    generation.evaluated += 1
    if fault is not None:
        return Outcome(fault=generation.blame(_traced(generation, fault)))
    if generation.gone:
        return Outcome()
    begun, run = perf_counter(), generation.started
    events: list[Event] = []
    try:
        step = run.steps_done()
        events.append(Progress(step, run.preview() if generation.shows_at(step) else None))
        generation.told = step
        if generation.freezes_now:
            events.append(Frozen(run.checkpoint()))
        if generation.done:
            events.append(generation.finished(run.latents()))
    except Exception as error:
        fault = generation.blame(error)
    return Outcome(events, fault, perf_counter() - begun)


def _traced(generation: Generation, fault: Exception) -> Exception:
    """What residuals that aren't finite made of the prediction is told as theirs; they are not searched before."""
    residuals = generation.residuals
    if isinstance(fault, NotFinite) and residuals is not None:
        try:
            for i, one in enumerate(residuals.down):
                require_finite(one, f"down_residuals[{i}]")
            require_finite(residuals.mid, "mid_residual")
        except (InvalidArgument, Late) as error:
            return error
    return fault
