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
from collections.abc import AsyncGenerator, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from time import perf_counter

from imagemesh_runtime.context import CallContext, set_current_call
from imagemesh_runtime.errors import DeadlineExceeded, Hangs, Overloaded, TooMuchAhead, Unavailable
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_services.diffusion.backend import DiffusionModel, SampleInputs
from imagemesh_services.diffusion.generation import (
    SENDING_SECONDS,
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
from imagemesh_services.diffusion.limits import NOTHING, Limits
from imagemesh_services.diffusion.pace import Pace, finish_times
from imagemesh_services.diffusion.steer import steer
from imagemesh_services.diffusion.ticks import Tick, Ticks
from imagemesh_services.diffusion.watchdog import Watchdog

log = logging.getLogger(__name__)

# A deadline is taken to be missed only beyond this much of what is left to it: estimates err.
_SURE = 1.25
# How long those of a forward wait for one another's checkpoints to leave, a millisecond each on a quiet machine.
_TOGETHER_SECONDS = 0.05
# For a refusal before anything was measured.
_UNKNOWN_RETRY = 1.0
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
        self.limits = Limits(max_rows, self._pace, tuned)
        self.watchdog = Watchdog(lane, metrics, self._pace, least=hang_seconds, factor=hang_factor)
        self._watching: asyncio.Task[None] | None = None
        self._backlog = metrics.backlog.labels(metrics.service)

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
                if isinstance(event, Frozen):  # it is sent, now that the caller asks for more
                    generation.frozen_at = None
                    self._changed.set()
                if isinstance(event, Finished):
                    return
        finally:
            generation.gone = True
            if generation.residuals is not None:
                generation.residuals.give_up()  # the lane may be waiting for them
            self._wake()

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
        times = self._finish_times([*waiting[:ahead], generation])
        if len(waiting) >= self._max_queue:
            raise Overloaded(self._metrics.service, self._max_queue, min(times) if times else _UNKNOWN_RETRY)
        if times is not None:
            self._check_deadline(generation, times[-1])
        self._waiting = deque([*waiting[:ahead], generation, *waiting[ahead:]])
        self._wake()
        return ahead

    def _check_deadline(self, generation: Generation, seconds: float) -> None:
        """Refuse now what would be thrown away later: ``seconds`` until it is done."""
        remaining = generation.call.remaining()
        if remaining is None or seconds <= remaining * _SURE:
            return
        alone = finish_times([], [generation.left(self._pace)], self.limits.fits, self._pace)
        own = alone[0] if alone else 0.0
        if own > remaining * _SURE:
            message = f"the generation takes about {own:.1f} s, and its deadline is in {remaining:.1f} s"
            raise DeadlineExceeded(self._metrics.service, message)
        raise TooMuchAhead(self._metrics.service, seconds - own, own, remaining)

    def _finish_times(self, waiting: Sequence[Generation]) -> list[float] | None:
        """Seconds until each of those who run, and then of those who wait, is done; None: not known yet."""
        running = [one.left(self._pace) for one in self._active if not one.gone]
        return finish_times(running, [one.left(self._pace) for one in waiting], self.limits.fits, self._pace)

    def _wake(self) -> None:
        self._metrics.pending.set(sum(not one.gone for one in self._waiting))
        self._tell_backlog()
        self._changed.set()
        if self._ticks is not None:
            self._ticks.halt()
        if not self._closed and (self._worker is None or self._worker.done()):
            self._worker = asyncio.create_task(self._work())
            watch = self.watchdog.watch(self._worker, lambda: self._ticks, self._give_up)
            self._watching = asyncio.create_task(watch)

    def _tell_backlog(self) -> None:
        times = self._finish_times([one for one in self._waiting if not one.gone])
        self._backlog.set(max(times, default=0.0) if times is not None else 0.0)

    async def _work(self) -> None:
        try:
            while self._waiting or self._active:
                self._changed.clear()
                self._drop_gone()
                if self._handing_back:
                    await self._part()
                await self._let_in()
                batch = self._next_batch()
                if batch:
                    await self._tick(batch)
                elif self._active:
                    self._tell_backlog()
                    await self._wait()
            self._tell_backlog()
        except Exception as error:
            # Not a request's fault but the engine's own: nobody is left to wait for ever.
            log.exception("the engine failed; every generation here ends")
            self._end_all(error)

    async def _wait(self) -> None:
        """Until there may be something to do."""
        sending = any(one.sending for one in self._active)
        with suppress(TimeoutError):
            async with asyncio.timeout(SENDING_SECONDS if sending else None):
                await self._changed.wait()

    async def _send(self, batch: Sequence[Generation]) -> None:
        """Give the checkpoints of this tick a moment to leave, so that who shared a forward shares the next one too."""
        until = perf_counter() + _TOGETHER_SECONDS
        while any(one.sending and not one.gone for one in batch) and perf_counter() < until:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_TOGETHER_SECONDS):
                    await self._changed.wait()

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
                stuck = one in at or (one.run is None and one in self._active)
                service = self._metrics.service
                self._end(one, Hangs(service) if stuck else Unavailable(service, _HANGS))
        self._wake()

    def _fits(self, generation: Generation) -> bool:
        """Whether it may run beside those who do."""
        if not self._active:
            return True
        if generation.terms.alone or any(one.terms.alone for one in self._active):
            return False
        return self.limits.fits([one.left(self._pace) for one in self._active], generation.left(self._pace))

    async def _let_in(self) -> None:
        """Start those at the head of the queue as long as their rows fit."""
        while self._waiting:
            if not self._fits(self._waiting[0]):
                break
            generation = self._waiting.popleft()
            if generation.gone:
                continue
            self._active.append(generation)
            waited = perf_counter() - generation.since
            self._metrics.queue_wait.observe(waited)
            generation.call.queue_seconds += waited
            if generation.terms.every:
                generation.events.put_nowait(Started())
            try:
                with self._charging(generation):
                    generation.run = await self._lane.run(generation.begin)
                    steps = generation.inputs.steps_to_do
                    self._pace.note_evaluations(generation.scheduler, steps, generation.run.evaluations)
            except Exception as error:
                self._end(generation, generation.blame(error))
                continue
            if generation.open_control is not None and not generation.gone:
                generation.wanted.set()
                generation.steering = asyncio.create_task(self._steer(generation))
        self._metrics.pending.set(len(self._waiting))
        self._metrics.running.set(len(self._active))

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
                self._tell_backlog()  # while the lane works
                tick = await ticks.next()
                more = tick is not None and tick.more
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
        for generation, outcome in zip(batch, tick.outcomes, strict=True):
            generation.last_tick = number
            if generation.residuals is not None:
                self._metrics.control_stall.observe(generation.residuals.stalled, "within")
            if outcome.late:
                generation.hasty = False
            else:
                generation.residuals, generation.steered = None, False
            generation.call.queue_seconds += tick.queue
            generation.call.compute_seconds += shared + outcome.seconds
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

    @contextmanager
    def _charging(self, *who: Generation) -> Iterator[CallContext]:
        """Charge what the lane does meanwhile to those it is done for, the wait for the lane as waiting."""
        spent = CallContext()
        set_current_call(spent)
        try:
            yield spent
        finally:
            for generation in who:
                generation.call.queue_seconds += spent.queue_seconds
                generation.call.compute_seconds += spent.compute_seconds

    def _end_all(self, error: Exception) -> None:
        for generation in [*self._active, *self._waiting]:
            self._end(generation, error)
        self._waiting.clear()

    def _end(self, generation: Generation, last: Finished | Exception) -> None:
        generation.events.put_nowait(last)
        self._leave(generation)

    def _leave(self, generation: Generation) -> None:
        """Take the generation out; its ControlNets hear of it, unless they have said all they had to."""
        generation.gone = True
        steering = generation.steering
        if steering is not None and steering is not asyncio.current_task() and not generation.done:
            steering.cancel()
        if generation in self._active:
            self._active.remove(generation)
        self._metrics.running.set(len(self._active))
