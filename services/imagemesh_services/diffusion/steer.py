"""A generation's conversation with its ControlNets: asked before each evaluation, heard while it is under way."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

from imagemesh_runtime.context import set_current_call
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.tensors import Array
from imagemesh_services.diffusion.backend import Residuals
from imagemesh_services.diffusion.control import Question, Told
from imagemesh_services.diffusion.generation import Generation
from imagemesh_services.diffusion.incoming import Incoming


async def steer(generation: Generation, lane: Lane, metrics: Metrics, wake: Callable[[], None]) -> None:
    """Ask for the residuals of every evaluation that is left, as part of the generation's own call.

    The generation may run as soon as the ControlNet is at it, before the first residuals are there: the UNet does what
    it can without them. ``wake`` is called whenever it may have become runnable.

    Raises:
        MeshError: a ControlNet failed, or did not answer in time.
    """
    set_current_call(generation.call)
    assert generation.open_control is not None
    run = generation.started
    heard = _Listening(generation)
    told = await lane.run(Told.of, run)
    async with generation.open_control(heard.told(told)) as control:
        for evaluation in range(generation.evaluated, run.evaluations):
            await generation.wanted.wait()
            generation.wanted.clear()
            incoming = Incoming(generation.model.plus)
            begun = partial(_begin, generation, metrics, wake, incoming, perf_counter())
            places = control.at_work(evaluation, run.evaluations)
            if not places:
                generation.steered = True
                wake()
                continue
            if kept := heard.kept(evaluation, places):
                incoming.complete(kept)
                begun()
                continue
            told = await lane.run(Told.of, run, told)
            sample, timestep = await lane.run(run.model_input)
            question = Question(heard.rows(sample), timestep, heard.told(told), places)
            before = control.received
            await control.residuals(question, incoming, begun)
            metrics.control_bytes.inc(control.received - before)
            await heard.keep(evaluation, places, incoming)
            generation.control_backends = control.backends
            wake()


def _begin(
    generation: Generation, metrics: Metrics, wake: Callable[[], None], incoming: Incoming, asked_at: float
) -> None:
    """The ControlNets are at it."""
    metrics.control_stall.observe(perf_counter() - asked_at, "before")
    generation.residuals, generation.steered = incoming, True
    wake()


class _Listening:
    """What of the ControlNets' say a generation takes, by its savings: whose rows, and for how many evaluations."""

    def __init__(self, generation: Generation) -> None:
        self._inputs, self._run = generation.inputs, generation.started
        self._savings = generation.inputs.savings
        self._told: tuple[Told, Told] | None = None
        self._kept: tuple[int, object, Residuals] | None = None

    def rows(self, sample: Array) -> Array:
        """Those that the ControlNets are asked about: of the prompt alone, or all."""
        return sample[-len(self._inputs.seeds) :] if self._savings.conditional_only else sample

    def told(self, told: Told) -> Told:
        """What they are told of the prompts; the same object as long as the same holds."""
        if not self._savings.conditional_only:
            return told
        if self._told is None or self._told[0] is not told:
            added = {name: self.rows(one) for name, one in told.added.items()}
            self._told = (told, Told(told.phase, self.rows(told.embeddings), added))
        return self._told[1]

    def kept(self, evaluation: int, places: Sequence[int]) -> Residuals | None:
        """The last residuals, where they are to serve this evaluation too: not for others at work, or other rows."""
        if self._kept is None:
            return None
        asked_at, asked_for, residuals = self._kept
        serves = evaluation < asked_at + self._savings.reuse_steps and asked_for == self._asked(evaluation, places)
        return residuals if serves else None

    async def keep(self, evaluation: int, places: Sequence[int], found: Incoming) -> None:
        """For the evaluations to come; copied, since the memory that they came in is wanted for other messages."""
        if self._savings.reuse_steps > 1:
            copied = await asyncio.to_thread(_copied, Residuals(found.down, found.mid))
            self._kept = (evaluation, self._asked(evaluation, places), copied)

    def _asked(self, evaluation: int, places: Sequence[int]) -> object:
        return tuple(places), self._inputs.conditions(evaluation, self._run.evaluations)


def _copied(found: Residuals) -> Residuals:
    return Residuals([one.copy() for one in found.down], found.mid.copy())
