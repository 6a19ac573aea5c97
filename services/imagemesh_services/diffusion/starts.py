"""Generations begin on the lane, some ahead of their turn, behind a tick under way: the next then waits for nobody."""

import asyncio
from collections.abc import Sequence

from imagemesh_runtime.context import CallContext, set_current_call
from imagemesh_runtime.lanes import Lane
from imagemesh_services.diffusion.generation import Generation
from imagemesh_services.diffusion.pace import Pace

# The lane's seconds, or why it could not begin.
Begun = float | Exception


class Starts:
    """Begins each generation once."""

    def __init__(self, lane: Lane, pace: Pace) -> None:
        self._lane = lane
        self._pace = pace
        self._under_way: set[asyncio.Task[Begun]] = set()

    def begin(self, generation: Generation) -> "asyncio.Task[Begun]":
        """Begin it, unless that was asked before; its ``run`` is there when the task is done, and all went well."""
        if generation.beginning is None:
            generation.beginning = task = asyncio.create_task(self._begin(generation))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        return generation.beginning

    async def all_of(self, generations: Sequence[Generation]) -> list[Begun | None]:
        """Begin these, and return when all have; without a wait, if that was done before. None: given up meanwhile."""
        tasks = [self.begin(one) for one in generations]
        if not all(task.done() for task in tasks):
            await asyncio.wait(tasks)
        return [None if task.cancelled() else task.result() for task in tasks]

    async def settle(self, seconds: float) -> None:
        """Return when none is under way, or after so long."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=seconds)

    async def _begin(self, generation: Generation) -> Begun:
        spent = CallContext()  # of this task alone; the wait for the lane is a part of that in the queue
        set_current_call(spent)
        try:
            run = await self._lane.run(generation.begin)
        except Exception as error:
            return error
        finally:
            generation.call.compute_seconds += spent.compute_seconds
        self._pace.note_evaluations(generation.scheduler, generation.inputs.steps_to_do, run.evaluations)
        generation.run = run
        return spent.compute_seconds
