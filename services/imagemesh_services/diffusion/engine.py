"""The engine that owns the denoising loop: running requests share the model step by step.

At every tick it takes the runnable generations of one key and does the next evaluation of all of them in one forward.
They join and leave at any step, each with its own scheduler, guidance, step count and seeds. A generation that waits
for its ControlNet's residuals is not runnable and holds nobody back. A lone one on an idle engine starts at once.

The idea is continuous batching (Orca, OSDI'22) with the denoising step in place of the token.
"""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, Hashable, Mapping, Sequence
from contextlib import suppress
from time import perf_counter

from imagemesh_runtime.errors import Hangs, Overloaded, Unavailable
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_services.diffusion.backend import DiffusionModel, SampleInputs
from imagemesh_services.diffusion.forecast import Outlook
from imagemesh_services.diffusion.generation import (
    SENDING_SECONDS,
    TOGETHER_SECONDS,
    Event,
    Finished,
    Frozen,
    Generation,
    OpenControl,
    Queued,
    Started,
    Terms,
)
from imagemesh_services.diffusion.incoming import Patience
from imagemesh_services.diffusion.limits import NOTHING, Limits, Room
from imagemesh_services.diffusion.pace import Pace
from imagemesh_services.diffusion.starts import Begun, Starts
from imagemesh_services.diffusion.steer import steer
from imagemesh_services.diffusion.ticks import Tick, Ticks
from imagemesh_services.diffusion.watchdog import Watchdog

log = logging.getLogger(__name__)

_UNKNOWN_RETRY = 1.0  # for a refusal before anything was measured
_HANGS = "its device hangs"


class Engine:
    """Runs generations on a lane.

    Args:
        max_rows: most rows of all running generations together at any evaluation that they have before them; a
            generation that is larger by itself runs alone.
        max_queue: most generations that may wait; one more is refused.
        tuned: the most rows of a kind of generations, as far as they were measured beforehand.
        hang_seconds, hang_factor: see ``Watchdog``.
        control_wait: seconds that a forward may wait for residuals; those whose are late then are left out of it.
    """

    def __init__(
        self,
        lane: Lane,
        metrics: Metrics,
        *,
        max_rows: int,
        max_queue: int,
        tuned: Mapping[Hashable, int] = NOTHING,
        hang_seconds: float = 0.0,
        hang_factor: float = 20.0,
        control_wait: float = 0.5,
    ) -> None:
        self._control_wait = control_wait
        self._lane = lane
        self._metrics = metrics
        self._max_queue = max_queue
        self._waiting: deque[Generation] = deque()
        self._active: list[Generation] = []
        self._numbers = itertools.count(1)
        self._ticks: Ticks | None = None
        self._changed = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._closed = False
        self._handing_back = False
        self._pace = Pace()
        self._starts = Starts(lane, self._pace)
        self.limits = Limits(max_rows, self._pace, tuned)
        self._outlook = Outlook(self.limits, self._pace, metrics)
        self.watchdog = Watchdog(lane, metrics, self._pace, least=hang_seconds, factor=hang_factor)
        self._watching: asyncio.Task[None] | None = None
        self._telling: asyncio.Handle | None = None
        # Between two ticks the lane waits, so nothing is told there; it is as soon as the next one is begun.
        self._between = False

    async def sample(
        self,
        model: DiffusionModel,
        inputs: SampleInputs,
        open_control: OpenControl | None = None,
        terms: Terms | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Run one generation and tell how it goes.

        ``Queued``, ``Started`` where it can go on elsewhere, then ``Progress`` and ``Frozen``, last ``Finished``.
        Leaving the iterator takes the generation out before its next evaluation.

        Raises:
            Overloaded: the queue is full, or too much is ahead for the deadline; nothing was done.
            DeadlineExceeded: it takes longer by itself than its deadline allows.
            Unavailable: the engine was closed, or hands its work to other replicas; or the lane hangs.
            MeshError: it failed; its neighbours did not.
        """
        generation = Generation(model, inputs, open_control, terms or Terms())
        ahead = self._enter(generation)
        try:
            yield Queued(ahead)
            while True:
                event = await generation.events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Frozen) and not generation.terms.confirm_as:
                    generation.frozen_at = None  # it is sent, now that the caller asks for more
                    self._changed.set()
                if isinstance(event, Finished):
                    return
        finally:
            generation.go()
            if generation.residuals is not None:
                generation.residuals.give_up()  # the lane may be waiting for them
            self._wake()

    def confirm(self, confirm_as: str, evaluation: int) -> None:
        """The checkpoint of whoever confirms under that name has arrived."""
        for one in self._active:
            if confirm_as and (one.terms.confirm_as, one.evaluated) == (confirm_as, evaluation):
                one.frozen_at = None
        self._changed.set()

    async def hand_back(self) -> None:
        """Give back whoever can go on elsewhere, at the next step boundary, with a last checkpoint.

        Whoever comes from now on and could go elsewhere is refused; the others are served until ``close``.
        """
        self._handing_back = True
        self._wake()

    async def close(self) -> None:
        """Stop; whoever is still here, and whoever comes later, is told that the service goes away."""
        self._closed = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, *filter(None, [self._watching]), return_exceptions=True)
        steering = [one.steering for one in self._active if one.steering is not None]
        self._end_all(Unavailable(self._metrics.service, "is going away"))
        await asyncio.gather(*steering, return_exceptions=True)

    def _enter(self, generation: Generation) -> int:
        """Take its place in the queue; answers how many wait ahead."""
        if self._closed or (self._handing_back and generation.terms.every):
            raise Unavailable(self._metrics.service, "is going away")
        if self.watchdog.hangs and generation.terms.every:
            raise Unavailable(self._metrics.service, _HANGS)
        waiting = [one for one in self._waiting if not one.gone]
        ahead = sum(one.turn <= generation.turn for one in waiting)
        if len(waiting) >= self._max_queue:
            times = self._outlook.times(self._active, [*waiting[:ahead], generation])
            raise Overloaded(self._metrics.service, self._max_queue, min(times) if times else _UNKNOWN_RETRY)
        self._outlook.check_deadline(generation, self._active, waiting[:ahead])
        self._waiting = deque([*waiting[:ahead], generation, *waiting[ahead:]])
        self._wake()
        return ahead

    def _wake(self) -> None:
        self._metrics.pending.set(sum(not one.gone for one in self._waiting))
        self._changed.set()
        if self._ticks is not None:
            self._ticks.halt()
        if not self._closed and (self._worker is None or self._worker.done()):
            self._between = False
            self._worker = asyncio.create_task(self._work())
            watch = self.watchdog.watch(self._worker, lambda: self._ticks, self._give_up)
            self._watching = asyncio.create_task(watch)
        if self._telling is None and not self._between:  # once for all that changes at a time
            self._telling = asyncio.get_running_loop().call_soon(self._look_ahead)

    def _tell_backlog(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._outlook.tell(self._active, self._waiting)

    async def _work(self) -> None:
        try:
            while self._waiting or self._active:
                self._changed.clear()
                self._drop_gone()
                if self._handing_back:
                    await self._part()
                await self._let_in()
                batch, self._between = self._next_batch(), False
                if batch:
                    await self._tick(batch)
                    self._between = True
                elif self._active:
                    self._tell_backlog()
                    await self._wait(SENDING_SECONDS if any(one.sending for one in self._active) else None)
            self._tell_backlog()
        except Exception as error:
            # Not a request's fault but the engine's own: nobody is left to wait for ever.
            log.exception("the engine failed; every generation here ends")
            self._end_all(error)

    async def _wait(self, seconds: float | None) -> None:
        """Until there may be something to do, or for so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def _send(self, batch: Sequence[Generation]) -> None:
        """Give the checkpoints of this tick a moment to leave, so that who shared a forward shares the next one too."""
        until = perf_counter() + TOGETHER_SECONDS
        while any(one.sending and not one.gone for one in batch) and perf_counter() < until:
            self._changed.clear()
            await self._wait(TOGETHER_SECONDS)

    def _drop_gone(self) -> None:
        self._waiting = deque(one for one in self._waiting if not one.gone)
        for generation in [one for one in self._active if one.gone]:
            self._leave(generation)

    async def _part(self) -> None:
        """Hand back all who asked for checkpoints: those who run with where they are."""
        away = Unavailable(self._metrics.service, "is going away")
        for generation in [one for one in self._active if one.terms.every]:
            if generation.run is not None:
                try:
                    generation.events.put_nowait(Frozen(await self._lane.run(generation.run.checkpoint)))
                except Exception:
                    log.exception("no checkpoint could be made; the generation starts again elsewhere")
            self._end(generation, away)
        for generation in [one for one in self._waiting if one.terms.every]:
            self._end(generation, away)
        self._drop_gone()

    def _give_up(self) -> None:
        """The lane hangs: end all who can go on elsewhere; those that it hangs at are told so."""
        at = self._ticks.batch if self._ticks is not None and self._ticks.under_way is not None else ()
        for one in [*self._active, *self._waiting]:
            if one.terms.every:
                service = self._metrics.service
                self._end(one, Hangs(service) if one.begins or one in at else Unavailable(service, _HANGS))
        self._wake()

    def _fits(self, generation: Generation, room: Room) -> bool:
        """Whether it may run beside those who do, who leave this room."""
        if not self._active:
            return True
        if generation.terms.alone or any(one.terms.alone for one in self._active):
            return False
        return room.fits(generation.left(self._pace))

    async def _let_in(self) -> None:
        """Start those at the head of the queue as long as their rows fit."""
        room = self.limits.room(one.left(self._pace) for one in self._active if self._waiting)
        while entered := self._admit(room):
            for generation, begun in zip(entered, await self._starts.all_of(entered), strict=True):
                if begun is not None:
                    self._begun(generation, begun)
        self._metrics.pending.set(len(self._waiting))
        self._metrics.running.set(len(self._active))

    def _admit(self, room: Room) -> list[Generation]:
        """Take those out of the queue who fit into that room, and what they take of it."""
        entered = []
        while self._waiting and self._fits(self._waiting[0], room):
            generation = self._waiting.popleft()
            if not generation.gone:
                self._active.append(generation)
                room.add(generation.left(self._pace))
                entered.append(generation)
                if generation.terms.every:
                    generation.events.put_nowait(Started())
        return entered

    def _begun(self, generation: Generation, begun: Begun) -> None:
        waited = perf_counter() - generation.since - (begun if isinstance(begun, float) else 0.0)
        self._metrics.queue_wait.observe(waited)
        generation.call.queue_seconds += waited
        if isinstance(begun, Exception):
            self._end(generation, generation.blame(begun))
        elif generation.open_control is not None and not generation.gone:
            generation.wanted.set()
            generation.steering = asyncio.create_task(self._steer(generation))

    def _look_ahead(self) -> None:
        """While the lane is at a tick: tell what is left to do, and begin those who come in when the tick is over."""
        self._tell_backlog()
        staying = [one for one in self._active if not one.ending]
        waiting = [one for one in self._waiting if not one.gone]
        if not waiting or any(one.terms.alone for one in staying):
            return
        room = self.limits.room(one.left(self._pace) for one in staying)
        for generation in waiting:
            if generation.terms.alone or not room.fits(generation.left(self._pace)):
                return
            room.add(generation.left(self._pace))
            self._starts.begin(generation)

    def _next_batch(self) -> list[Generation]:
        """The runnable generations that can share a forward with the one that has waited longest for its turn."""
        runnable = [one for one in self._active if one.runnable]
        if not runnable:
            return []
        first = min(runnable, key=lambda one: one.last_tick)
        return [one for one in runnable if one.model is first.model and one.started.key == first.started.key]

    async def _tick(self, batch: Sequence[Generation]) -> None:
        """The next evaluation of all of these; more than one as long as there is nothing else to do."""
        steady = len(batch) == len(self._active) and not any(one.open_control for one in batch)
        patience = Patience(self._control_wait)
        for generation in batch:
            if generation.residuals is not None:
                generation.residuals.patience = patience
        self._ticks = ticks = Ticks(self._lane, batch, chained=steady and not self._changed.is_set())
        try:
            more = True
            while more:
                self._look_ahead()
                tick = await ticks.next()
                more = tick is not None and tick.more
                if not more:
                    await self._starts.settle(TOGETHER_SECONDS)  # ahead of the callers, whom what is told awakes
                if tick is not None:
                    self._tell(batch, tick)
        finally:
            ticks.abandon()
        await self._send(batch)

    def _tell(self, batch: Sequence[Generation], tick: Tick) -> None:
        """Note what the tick took, and tell what became of each."""
        number = next(self._numbers)
        kind = batch[0].kind
        # One that hung tells nothing of others, unless nothing else is known: then that is how slow it is here.
        told = not self.watchdog.hangs or self._pace.tick_seconds(kind, tick.cost.rows) is None
        if told and not any(outcome.late for outcome in tick.outcomes):
            self._pace.note(kind, tick.cost.rows, tick.queue + tick.compute, tick.cost.forwards)
        self._metrics.step.observe(tick.forward)
        self._metrics.batch_size.observe(tick.cost.shared)
        shared = tick.compute - sum(outcome.seconds for outcome in tick.outcomes)
        each = tick.compute / sum(len(one.inputs.seeds) for one in batch)
        for generation, outcome in zip(batch, tick.outcomes, strict=True):
            generation.last_tick = number
            if generation.residuals is not None:
                self._metrics.control_stall.observe(generation.residuals.stalled, "within")
            if outcome.late:
                generation.hasty = False
            else:
                generation.residuals, generation.steered = None, False
            generation.charge(tick.queue, shared + outcome.seconds, each * len(generation.inputs.seeds))
            if generation.gone or outcome.late:
                continue
            for event in outcome.events:
                generation.events.put_nowait(event)
            if outcome.freezes:
                generation.frozen_at = perf_counter()
            generation.wanted.set()
            if outcome.fault is not None:
                generation.events.put_nowait(outcome.fault)
            if outcome.last:
                self._leave(generation)

    async def _steer(self, generation: Generation) -> None:
        """Let its ControlNets have their say in every evaluation."""
        try:
            await steer(generation, self._lane, self._metrics, self._wake)
        except Exception as error:
            self._end(generation, error)
            self._wake()

    def _end_all(self, error: Exception) -> None:
        for generation in [*self._active, *self._waiting]:
            self._end(generation, error)
        self._waiting.clear()

    def _end(self, generation: Generation, last: Finished | Exception) -> None:
        generation.events.put_nowait(last)
        self._leave(generation)

    def _leave(self, generation: Generation) -> None:
        """Take the generation out; its ControlNets hear of it, unless they have said all they had to."""
        generation.go()
        steering = generation.steering
        if steering is not None and steering is not asyncio.current_task() and not generation.done:
            steering.cancel()
        if generation in self._active:
            self._active.remove(generation)
        self._metrics.running.set(len(self._active))
