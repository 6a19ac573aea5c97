"""The engine that owns the denoising loop: running requests share the model step by step.

At every tick it takes the runnable generations of one key and does the next evaluation of all of them in one forward.
They join and leave at any step, each with its own scheduler, guidance, step count and seeds. A generation that waits
for its ControlNet's residuals is not runnable and holds nobody back. A lone one on an idle engine starts at once.

The idea is continuous batching (Orca, OSDI'22) with the denoising step in place of the token.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from time import perf_counter

from imagemesh_runtime.context import CallContext, current_call, set_current_call
from imagemesh_runtime.errors import Overloaded, Unavailable
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.tensors import Array
from imagemesh_services.diffusion.backend import DiffusionModel, Residuals, Run, SampleInputs
from imagemesh_services.diffusion.control import Control

OpenControl = Callable[[Array], AbstractAsyncContextManager[Control]]


@dataclass(frozen=True)
class Queued:
    """The generation has its place; ``position`` others wait ahead of it."""

    position: int


@dataclass(frozen=True)
class Progress:
    """Steps behind, as the user counts them."""

    step: int


@dataclass(frozen=True)
class Finished:
    """The last event: float latents [pictures, channels, h, w], and what made them."""

    latents: Array
    scheduler: str
    evaluations: int
    control_backends: Sequence[str]


Event = Queued | Progress | Finished


@dataclass(eq=False)
class _Generation:
    """One request's place in the engine."""

    model: DiffusionModel
    inputs: SampleInputs
    open_control: OpenControl | None
    events: "asyncio.Queue[Event | BaseException]" = field(default_factory=asyncio.Queue)
    call: CallContext = field(default_factory=current_call)
    since: float = field(default_factory=perf_counter)
    run: Run | None = None
    # The ControlNets' side of it: the task that asks them, when to ask, what they said.
    steering: "asyncio.Task[None] | None" = None
    wanted: asyncio.Event = field(default_factory=asyncio.Event)
    residuals: Residuals | None = None
    control_backends: Sequence[str] = ()
    evaluated: int = 0
    last_tick: int = 0
    gone: bool = False

    @property
    def runnable(self) -> bool:
        """Whether nothing is missing for the next evaluation."""
        return not self.gone and (self.open_control is None or self.residuals is not None)


class Engine:
    """Runs generations on a lane.

    Args:
        max_rows: most rows of all running generations together; a generation that is larger by itself runs alone.
        max_queue: most generations that may wait; one more is refused.
    """

    def __init__(self, lane: Lane, metrics: Metrics, *, max_rows: int, max_queue: int) -> None:
        self._lane = lane
        self._metrics = metrics
        self._max_rows = max_rows
        self._max_queue = max_queue
        self._waiting: deque[_Generation] = deque()
        self._active: list[_Generation] = []
        self._ticks = itertools.count(1)
        self._changed = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._seconds_a_run = 1.0  # a running mean, for the retry times of refusals

    async def sample(
        self, model: DiffusionModel, inputs: SampleInputs, open_control: OpenControl | None = None
    ) -> AsyncGenerator[Event, None]:
        """Run one generation and tell how it goes: ``Queued``, then ``Progress``, last ``Finished``.

        Leaving the iterator takes the generation out before its next evaluation.

        Raises:
            Overloaded: the queue is full; nothing was done.
            MeshError: it failed; its neighbours did not.
        """
        generation = _Generation(model, inputs, open_control)
        ahead = self._enter(generation)
        try:
            yield Queued(ahead)
            while True:
                event = await generation.events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            generation.gone = True
            self._wake()

    async def close(self) -> None:
        """Stop; whoever is still here is told that the service goes away."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for generation in [*self._active, *self._waiting]:
            self._end(generation, Unavailable(self._metrics.service, "is going away"))

    def _enter(self, generation: _Generation) -> int:
        """Take the place at the end of the queue; answers how many wait ahead."""
        ahead = sum(not one.gone for one in self._waiting)
        if ahead >= self._max_queue:
            raise Overloaded(self._metrics.service, self._max_queue, self._seconds_a_run * ahead)
        self._waiting.append(generation)
        self._wake()
        return ahead

    def _wake(self) -> None:
        self._metrics.pending.set(sum(not one.gone for one in self._waiting))
        self._changed.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        set_current_call(CallContext())  # not that of the caller whose arrival started this task
        while self._waiting or self._active:
            self._changed.clear()
            self._drop_gone()
            await self._let_in()
            batch = self._next_batch()
            if batch:
                await self._tick(batch)
            elif self._active:
                await self._changed.wait()

    def _drop_gone(self) -> None:
        self._waiting = deque(one for one in self._waiting if not one.gone)
        for generation in [one for one in self._active if one.gone]:
            self._leave(generation)

    async def _let_in(self) -> None:
        """Start those at the head of the queue as long as their rows fit."""
        while self._waiting:
            rows = sum(one.inputs.rows for one in self._active)
            if self._active and rows + self._waiting[0].inputs.rows > self._max_rows:
                break
            generation = self._waiting.popleft()
            if generation.gone:
                continue
            self._active.append(generation)
            waited = perf_counter() - generation.since
            self._metrics.queue_wait.observe(waited)
            generation.call.queue_seconds += waited
            try:
                generation.run = await self._lane.run(generation.model.start, generation.inputs)
            except Exception as error:
                self._end(generation, error)
                continue
            if generation.open_control is not None:
                generation.wanted.set()
                generation.steering = asyncio.create_task(self._steer(generation, generation.run))
        self._metrics.pending.set(len(self._waiting))
        self._metrics.running.set(len(self._active))

    def _next_batch(self) -> list[_Generation]:
        """The runnable generations that can share a forward with the one that has waited longest for its turn."""
        runnable = [one for one in self._active if one.runnable]
        if not runnable:
            return []
        first = min(runnable, key=lambda one: one.last_tick)
        return [one for one in runnable if one.model is first.model and _run(one).key == _run(first).key]

    async def _tick(self, batch: Sequence[_Generation]) -> None:
        tick, start = next(self._ticks), perf_counter()
        runs = [_run(one) for one in batch]
        faults: Sequence[Exception | None]
        try:
            faults = await self._lane.run(batch[0].model.advance, runs, [one.residuals for one in batch])
        except Exception as error:  # the backend broke its promise; end these, and go on for the others
            faults = [error] * len(batch)
        seconds = perf_counter() - start
        self._metrics.step.observe(seconds)
        self._metrics.batch_size.observe(sum(one.inputs.rows for one in batch))
        for generation, fault in zip(batch, faults, strict=True):
            generation.last_tick = tick
            generation.evaluated += 1
            generation.residuals = None
            generation.call.compute_seconds += seconds
            if fault is not None:
                self._end(generation, fault)
            elif not generation.gone:
                await self._tell(generation)

    async def _tell(self, generation: _Generation) -> None:
        run = _run(generation)
        generation.events.put_nowait(Progress(run.steps_done()))
        if generation.evaluated < run.evaluations:
            generation.wanted.set()
            return
        latents = await self._lane.run(run.latents)
        done = Finished(latents, run.scheduler, run.evaluations, generation.control_backends)
        self._end(generation, done)

    async def _steer(self, generation: _Generation, run: Run) -> None:
        """Ask the generation's ControlNets before each evaluation."""
        assert generation.open_control is not None
        try:
            async with generation.open_control(await self._lane.run(run.embeddings)) as control:
                while True:
                    await generation.wanted.wait()
                    generation.wanted.clear()
                    generation.residuals = await control.residuals(*await self._lane.run(run.model_input))
                    generation.control_backends = control.backends
                    self._wake()
        except Exception as error:
            self._end(generation, error)
            self._wake()

    def _end(self, generation: _Generation, last: Finished | Exception) -> None:
        generation.events.put_nowait(last)
        self._leave(generation)

    def _leave(self, generation: _Generation) -> None:
        generation.gone = True
        if generation.steering is not None and generation.steering is not asyncio.current_task():
            generation.steering.cancel()
        if generation in self._active:
            self._active.remove(generation)
            seconds = perf_counter() - generation.since
            self._seconds_a_run += 0.2 * (seconds - self._seconds_a_run)
        self._metrics.running.set(len(self._active))


def _run(generation: _Generation) -> Run:
    """The run of a generation that was let in."""
    assert generation.run is not None
    return generation.run
