"""One request's place in the engine, and what it tells its caller."""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from time import perf_counter

from imagemesh_runtime.context import CallContext, current_call
from imagemesh_runtime.errors import InvalidArgument, MeshError, NotFinite, shorten
from imagemesh_runtime.tensors import Array
from imagemesh_services.diffusion.backend import DiffusionModel, Run, SampleInputs
from imagemesh_services.diffusion.checkpoint import FIELD, Checkpoint
from imagemesh_services.diffusion.control import Control, Told
from imagemesh_services.diffusion.guiders import Passes
from imagemesh_services.diffusion.incoming import Incoming
from imagemesh_services.diffusion.pace import Pace, Work

# Opens the sessions with the ControlNets, given what they are told first.
OpenControl = Callable[[Told], AbstractAsyncContextManager[Control]]


@dataclass(frozen=True)
class Queued:
    """The generation has its place; ``position`` others wait ahead of it."""

    position: int


@dataclass(frozen=True)
class Started:
    """The generation has left the queue; told to those who can go on elsewhere."""


@dataclass(frozen=True)
class Progress:
    """Steps behind, as the user counts them, and perhaps the latents as the model takes them to end."""

    step: int
    preview: Array | None = None


@dataclass(frozen=True)
class Frozen:
    """Where the generation is, for another replica to go on from."""

    checkpoint: Checkpoint


@dataclass(frozen=True)
class Finished:
    """The last event: float latents [pictures, channels, h, w], and what made them."""

    latents: Array
    scheduler: str
    evaluations: int
    control_backends: Sequence[str]


Event = Queued | Started | Progress | Frozen | Finished


# Seconds that a generation may be overtaken for, by the names of the contract's priorities.
PATIENCE = {"interactive": 0.0, "normal": 30.0, "batch": 300.0}


# How long a caller may take to take a checkpoint before its generation goes on without.
SENDING_SECONDS = 2.0
# How long those of a forward wait for one another's checkpoints to leave, a millisecond each on a quiet machine.
TOGETHER_SECONDS = 0.05


@dataclass(frozen=True)
class Terms:
    """On what terms a generation runs here.

    Attributes:
        patience: seconds by which those who came later may be taken to have come earlier.
        every: evaluations between two checkpoints; 0: none, and the caller can't be handed back.
        resume_from: where it was on the replica before.
        alone: it may take its replica down with it, so nobody else runs beside it.
        preview_every: steps between two previews; 0: none.
        confirm_as: the name under which a checkpoint is said to have arrived; "": it is taken to when it is sent.
    """

    patience: float = PATIENCE["normal"]
    every: int = 0
    resume_from: Checkpoint | None = None
    alone: bool = False
    preview_every: int = 0
    confirm_as: str = ""


def work_of(inputs: SampleInputs, kind: Hashable, behind: int, evaluations: int) -> Work:
    """What the evaluations from ``behind`` on cost: their number may change when guidance begins or ends."""
    work: Work | None = None
    for count, passes in reversed(inputs.guider.stretches(inputs.guided, evaluations, behind)):
        work = Work(kind, len(inputs.seeds) * passes.all, count, inputs.forwards(passes), work)
    assert work is not None, "an evaluation is left"
    return work


@dataclass(eq=False)
class Generation:
    """One request from its arrival to its last event. Belongs to the call that made it."""

    model: DiffusionModel
    inputs: SampleInputs
    open_control: OpenControl | None
    terms: Terms = field(default_factory=Terms)
    events: "asyncio.Queue[Event | BaseException]" = field(default_factory=asyncio.Queue)
    call: CallContext = field(default_factory=current_call)
    since: float = field(default_factory=perf_counter)
    # The task in which it begins, whether the lane is at that, and what came of it.
    beginning: "asyncio.Task[float | Exception] | None" = None
    begins: bool = False
    run: Run | None = None
    # The ControlNets' side of it: the task that asks them, when to ask; whether they are at it, or have no say in the
    # next evaluation; what they say.
    steering: "asyncio.Task[None] | None" = None
    wanted: asyncio.Event = field(default_factory=asyncio.Event)
    steered: bool = False
    residuals: Incoming | None = None
    # Whether a forward is begun before all residuals are there: until they were late once.
    hasty: bool = True
    control_backends: Sequence[str] = ()
    evaluated: int = 0
    # Steps that the caller last heard of.
    told: int = 0
    last_tick: int = 0
    gone: bool = False
    # When the checkpoint was made that is on its way to the caller.
    frozen_at: float | None = None

    @property
    def runnable(self) -> bool:
        """Whether nothing is missing for the next evaluation, and no checkpoint to be sent before it."""
        steered = self.open_control is None or (self.steered and (self.hasty or self.complete))
        return not self.gone and self.run is not None and steered and not self.sending

    @property
    def complete(self) -> bool:
        """Whether no residuals are on their way."""
        return self.residuals is None or self.residuals.there

    @property
    def sending(self) -> bool:
        """Whether a checkpoint is on its way.

        The next evaluation waits for it, so that a replica never takes more along than the evaluations between two; but
        it doesn't wait for ever for a caller who doesn't listen.
        """
        return self.frozen_at is not None and perf_counter() - self.frozen_at < SENDING_SECONDS

    @property
    def started(self) -> Run:
        """The run, once the engine has let the generation in."""
        assert self.run is not None
        return self.run

    @property
    def turn(self) -> float:
        """The lowest goes first of those who wait: the time of arrival, and how long it may be overtaken for."""
        return self.since + self.terms.patience

    @property
    def kind(self) -> Hashable:
        """Generations of one kind take equally long."""
        return (self.model.fingerprint, self.inputs.width, self.inputs.height)

    @property
    def scheduler(self) -> str:
        """Its name, or "" for the model's own."""
        return self.inputs.scheduler.name if self.inputs.scheduler else ""

    def left(self, pace: Pace) -> Work:
        """What is still to do."""
        expected = pace.evaluations(self.scheduler, self.inputs.steps_to_do)
        evaluations = self.run.evaluations if self.run is not None else expected
        behind = self.terms.resume_from.evaluation if self.run is None and self.terms.resume_from else self.evaluated
        return work_of(self.inputs, self.kind, min(behind, evaluations - 1), evaluations)

    @property
    def passes(self) -> Passes:
        """What its guider wants at the next evaluation."""
        return self.inputs.passes(self.evaluated, self.started.evaluations)

    @property
    def done(self) -> bool:
        """Whether every evaluation is behind it."""
        return self.run is not None and self.evaluated == self.run.evaluations

    @property
    def ending(self) -> bool:
        """Whether it leaves at the next tick at the latest."""
        return self.gone or (self.run is not None and self.evaluated >= self.run.evaluations - 1)

    @property
    def freezes_now(self) -> bool:
        """Whether a checkpoint is due between the last evaluation and the next."""
        return self.terms.every > 0 and self.evaluated % self.terms.every == 0 and not self.done

    def shows_at(self, step: int) -> bool:
        """Whether a preview is due, now that ``step`` steps are behind; after the last one the result is."""
        every = self.terms.preview_every
        return every > 0 and step > self.told and step % every == 0 and not self.done

    def charge(self, queue: float, compute: float, device: float) -> None:
        """Seconds of a tick: that it waited, that it took, and that were its share of the device's time."""
        self.call.queue_seconds += queue
        self.call.compute_seconds += compute
        self.call.device_seconds += device

    def go(self) -> None:
        """It is over, or nobody wants it any more; what the lane has not begun of it, it never will."""
        self.gone = True
        if self.beginning is not None:
            self.beginning.cancel()

    def begin(self) -> Run:
        """Start the run, or go on where it was; called on the lane."""
        self.begins = True
        try:
            run = self.model.start(self.inputs)
            if self.terms.resume_from is not None:
                run.restore(self.terms.resume_from)
                self.evaluated = self.terms.resume_from.evaluation
            return run
        finally:
            self.begins = False

    def blame(self, fault: Exception) -> Exception:
        """What goes wrong unforeseen, or not finite, after a checkpoint is the checkpoint's fault.

        Nobody can tell a sound one from one that only looks so. Whoever gave it begins anew without it, and hears of
        the fault then if it is another's.
        """
        foreseen = isinstance(fault, MeshError) and not isinstance(fault, NotFinite)
        if self.terms.resume_from is None or foreseen:
            return fault
        return InvalidArgument(FIELD, "a checkpoint that can't be gone on from", f"a sound one ({shorten(str(fault))})")

    def finished(self, latents: Array) -> Finished:
        """The last event."""
        return Finished(latents, self.started.scheduler, self.started.evaluations, self.control_backends)
