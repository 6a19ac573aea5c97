"""The seam between the diffusion service and what runs the model."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from imagemesh_runtime.registry import BackendEntry
from imagemesh_runtime.tensors import Array
from imagemesh_services.diffusion.checkpoint import Checkpoint
from imagemesh_services.diffusion.features import PictureFeatures
from imagemesh_services.diffusion.guiders import CFG, Guider, Passes
from imagemesh_services.diffusion.phases import Phase, phase_at
from imagemesh_services.diffusion.references import Reference
from imagemesh_services.diffusion.schedulers import SchedulerChoice
from imagemesh_services.diffusion.thrift import Savings


@dataclass(frozen=True)
class Moments:
    """The distribution of pictures' latents, float [1 or pictures, channels, h, w], as the VAE has it (not scaled)."""

    mean: Array
    log_variance: Array


@dataclass(frozen=True)
class ImageInputs:
    """Pictures to start from, one for all or one each."""

    # Scaled latents instead, float [pictures, channels, h', w'] of any size.
    source: Moments | Array
    # Above 0 to 1: how much of the schedule is run.
    strength: float
    # uint8 [1, 1, height, width] of the picture's size, 1 where it is redrawn; None: everywhere.
    mask: Array | None = None
    # The picture without what the mask covers, for models made for inpainting.
    masked: Moments | None = None
    # How latents of another size are brought to the generation's, as torch's ``interpolate`` calls it.
    latent_resize: str = "bilinear"


@dataclass(frozen=True)
class Wants:
    """What a model must be told of the prompt, under diffusers' names.

    Attributes:
        names: "prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask".
        negative: whether guidance is a second pass, which wants the same of the negative prompt; where it is not, the
            scale is an input of the model's, or nothing to it.
        equal: whether the negative prompt's embeddings must be of the prompt's length.
        changing: whether prompts may change with the step.
    """

    names: Sequence[str]
    negative: bool = True
    equal: bool = True
    changing: bool = True


@dataclass(frozen=True)
class SampleInputs:
    """One generation, checked."""

    # "prompt_embeds" and perhaps "negative_prompt_embeds": float [1, tokens, width]; for some families
    # "pooled_prompt_embeds" and perhaps "negative_pooled_prompt_embeds" too: float [1, width]; for some
    # "prompt_embeds_mask" and its negative: int64 [1, tokens], 0 where a token is padding. Of prompts that change a row
    # a phase, and ``phases.PHASES`` besides.
    conditioning: Mapping[str, Array]
    width: int  # pixels
    height: int
    steps: int
    guidance_scale: float
    # None: the model's own scheduler.
    scheduler: SchedulerChoice | None
    # One picture a seed.
    seeds: Sequence[int]
    # None: from noise alone.
    image: ImageInputs | None = None
    # Other seeds, one a picture, and how far its noise is turned towards theirs, 0 to 1.
    variation_seeds: Sequence[int] = ()
    variation_strength: float = 0.0
    # How the passes of the model become one prediction.
    guider: Guider = CFG
    # Whether the model has a pass with the negative prompt to guide it at all.
    guidable: bool = True
    # Whether a part of a step, which a strength may leave, is done as a whole one.
    rounds_up: bool = False
    # Pictures to be like.
    references: Sequence[Reference] = ()
    # What T2I-Adapters say of pictures.
    features: Sequence[PictureFeatures] = ()
    # What is saved on ControlNets.
    savings: Savings = field(default_factory=Savings)

    @property
    def steps_to_do(self) -> int:
        """Steps of the schedule that are run, as diffusers counts them."""
        if self.image is None:
            return self.steps
        share = min(self.steps * self.image.strength, self.steps)
        return self.steps - int(self.steps - share) if self.rounds_up else int(share)

    def phase(self, steps_done: int) -> Phase:
        """Which prompts hold when so many of ``steps_to_do`` are behind."""
        return phase_at(self.conditioning, min(self.steps - self.steps_to_do + steps_done, self.steps - 1))

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on."""
        return self.guidable and self.guidance_scale > 1

    @property
    def rows(self) -> int:
        """Rows of all conditions: one a picture, two with guidance."""
        return len(self.seeds) * (2 if self.guided else 1)

    def passes(self, evaluation: int, evaluations: int) -> Passes:
        """The guider's passes at this evaluation of so many, a row a picture each."""
        return self.guider.passes(self.guided, evaluation, evaluations)

    def conditions(self, evaluation: int, evaluations: int) -> int:
        """How many conditions these passes are of: the positive one, and where guidance is on the negative one."""
        return 2 if self.guider.negates(self.guided, evaluation, evaluations) else 1

    def forwards(self, passes: Passes) -> int:
        """Forwards that such passes need besides the one that is shared."""
        return passes.own * (len(self.seeds) if self.guider.draws else 1)


class Steering(Protocol):
    """What ControlNets add to the UNet at one evaluation: float, in diffusers' order, a row for each of the run's.

    Of the rows, those at the front may be missing: nothing is added to them. To read it may mean to wait for what is
    still on its way, though not for long.

    Raises:
        Late: it did not come in time; the evaluation is to be done again when it has.
    """

    @property
    def down(self) -> Sequence[Array]:
        """For the skip connections."""

    @property
    def mid(self) -> Array:
        """For the middle block."""


class Late(Exception):
    """Residuals did not come in time."""


@dataclass(frozen=True)
class Residuals:
    """``Steering`` that is all there."""

    down: Sequence[Array]
    mid: Array


class Run(Protocol):
    """One generation under way. Every method is called on the lane.

    Rows are pictures, twice as many with guidance: then the negative rows come first. Which of them an evaluation needs
    is the guider's affair, see ``SampleInputs.passes``.
    """

    # Forward passes of the model in all, and the steps that the user counts them as.
    evaluations: int
    scheduler: str
    # Runs of one model whose keys are equal can share a forward: shapes and dtypes of all inputs of the model, and what
    # changes the model.
    key: Hashable

    @property
    def phase(self) -> Hashable:
        """Of the next evaluation; the embeddings and added conditions change with it alone."""

    def embeddings(self) -> Array:
        """float [rows, tokens, width]: the rows' prompt embeddings at the next evaluation."""

    def added_conditions(self) -> Mapping[str, Array]:
        """What families such as Stable Diffusion XL want besides, by diffusers' names, each float [rows, width]."""

    def model_input(self) -> tuple[Array, float]:
        """The rows as the model gets them at the next evaluation, [rows, channels, h, w], and the timestep.

        Where no pass of the evaluation is of the negative prompt, its rows aren't among them: the last ones are left.
        """

    def steps_done(self) -> int:
        """Steps behind, as the user counts them."""

    def latents(self) -> Array:
        """float [pictures, channels, h, w]."""

    def preview(self) -> Array:
        """float [pictures, channels, h, w]: the latents it is heading for, by the last evaluation."""

    def checkpoint(self) -> Checkpoint:
        """All that ``restore`` needs to go on from here, of the same bits."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go to where a run of the same inputs was at its checkpoint; called before the first evaluation.

        Raises:
            InvalidArgument: the checkpoint can't be of such a run.
        """


class DiffusionModel(Protocol):
    """A loaded denoising model with its scheduler's settings."""

    # Pixels a latent spans in each direction, and of how many a picture's sides must be multiples.
    scale_factor: int
    multiple: int
    wants: Wants
    # As ``SampleInputs`` has it.
    rounds_up: bool
    # Replicas whose fingerprints are equal compute the same bits: weights, element type, library versions.
    fingerprint: str

    def find_adapters(self, names: Sequence[str]) -> Sequence[str]:
        """Look for the IP-Adapters of a request, before it is started; answers a fingerprint of each one's weights.

        It reads from disk, and is called on any thread but the lane.

        Raises:
            NotFound: there is no such adapter.
        """

    def start(self, inputs: SampleInputs) -> Run:
        """Draw the noise and set the schedule.

        Raises:
            InvalidArgument: the conditioning doesn't fit the model, or the scheduler doesn't take so many steps.
        """

    def trial(self, width: int, height: int) -> SampleInputs:
        """Inputs of one row, of any content, to measure with."""

    def plus(self, one: Array, other: Array) -> Array:
        """Two residuals' sum, to the bit what the model's library makes of it; called on the lane, while it advances.

        Raises:
            ValueError: their shapes don't go together.
        """

    def advance(self, runs: Sequence[Run], residuals: Sequence[Steering | None]) -> Sequence[Exception | None]:
        """Do the next evaluation of each run, all in one forward; the runs' keys are equal.

        Answers what went wrong, a run each: one run's fault (an exception, NaN) is its own, and the others advance. A
        run whose steering is ``Late`` has that as its fault, and is where it was before.
        """


_ROOM = "imagemesh_services.diffusion.backends"
BACKENDS: Final[Mapping[str, BackendEntry]] = {
    "torch": BackendEntry(f"{_ROOM}.torch:TorchDiffusion", library="torch"),
    "onnxruntime": BackendEntry(f"{_ROOM}.onnxruntime:OnnxDiffusion", library="onnxruntime", beside=("torch", "onnx")),
    "openvino": BackendEntry(f"{_ROOM}.openvino:OpenVinoDiffusion", library="openvino", beside=("torch",)),
    "fake": BackendEntry(f"{_ROOM}.fake:FakeDiffusion", explicit=True),
}
