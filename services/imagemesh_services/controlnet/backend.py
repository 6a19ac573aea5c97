"""The seam between the ControlNet service and what runs the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias, runtime_checkable

from imagemesh_runtime.registry import BackendEntry
from imagemesh_runtime.tensors import Array


@dataclass(frozen=True)
class ControlInputs:
    """What stays the same for all steps of a generation, or until the prompts change."""

    image: Array  # uint8 [height, width, 3], RGB
    embeddings: Array  # float [rows, tokens, width]
    scale: float
    # For some families "text_embeds" and "time_ids", each float [rows, width].
    added: Mapping[str, Array] = field(default_factory=dict)
    # Whether the residuals of the first blocks are weakened so that the picture counts more than the prompt.
    guess: bool = False
    # Of the single residuals besides, the middle one's last; empty: all 1.
    block_weights: Sequence[float] = ()
    # Which of the model's kinds of pictures this one is; None: it has one kind.
    control_type: int | None = None


@dataclass(frozen=True)
class Part:
    """Residuals of one step, or those of one block of it: float, rows first, in diffusers' order."""

    down: Sequence[Array]
    # Of the middle block, and so of the last part.
    mid: Array | None = None


# Called with each part as soon as it is there; what it raises ends the step.
Emit = Callable[[Part], None]


class ControlRun(Protocol):
    """A ControlNet at work for one generation. Called on the lane."""

    def tell(self, embeddings: Array, added: Mapping[str, Array]) -> None:
        """The prompts changed: what takes the place of ``ControlInputs``', of the same shapes."""

    def residuals(self, sample: Array, timestep: float, emit: Emit) -> None:
        """For rows [rows, channels, h, w]: what to add to the UNet's skip connections, and to its middle block.

        Told in one part or, by backends that can, in one for each block.

        Fewer rows than the embeddings have are the last ones of them: a step without guidance has no negative rows.

        Raises:
            InvalidArgument: the rows don't fit the picture or the embeddings.
        """


@runtime_checkable
class ControlModel(Protocol):
    """A loaded ControlNet."""

    # Whether it is only ever asked about the prompt's rows, as diffusers does with those whose residuals are pooled.
    prompt_rows_only: bool
    # Of the residuals of a step, the middle one too.
    count: int
    # How many kinds of pictures it tells apart; 0: it isn't told the kind.
    control_types: int

    def start(self, inputs: ControlInputs) -> ControlRun:
        """Prepare for a generation.

        Raises:
            InvalidArgument: the embeddings or the weights don't fit the model.
        """

    def trial(self, image: Array) -> tuple[ControlInputs, Array]:
        """Inputs of two rows with that picture, and their sample, of any content, to measure with."""

    def plus(self, one: Array, other: Array) -> Array:
        """Two residuals' sum, to the bit what the model's library makes of it; called on the lane.

        Raises:
            ValueError: their shapes don't go together.
        """


@runtime_checkable
class PictureAdapter(Protocol):
    """A loaded T2I-Adapter."""

    def features(self, image: Array) -> Sequence[Array]:
        """Of a picture, what to add in the UNet's down blocks, float [1, channels, h, w] each; called on the lane.

        Args:
            image: uint8 [height, width, 3], RGB.

        Raises:
            InvalidArgument: the picture's sides aren't multiples of what the adapter takes.
            NotFinite: the adapter gave NaN or infinity.
        """


# What a backend loads.
Loaded: TypeAlias = ControlModel | PictureAdapter


def whole(run: ControlRun, sample: Array, timestep: float) -> Part:
    """All residuals of a step in one."""
    parts: list[Part] = []
    run.residuals(sample, timestep, parts.append)
    return Part([one for part in parts for one in part.down], parts[-1].mid)


_ROOM = "imagemesh_services.controlnet.backends"
BACKENDS: Final[Mapping[str, BackendEntry]] = {
    "torch": BackendEntry(f"{_ROOM}.torch:TorchControlNet", library="torch"),
    "onnxruntime": BackendEntry(f"{_ROOM}.onnxruntime:OnnxControlNet", library="onnxruntime", beside=("torch", "onnx")),
    "openvino": BackendEntry(f"{_ROOM}.openvino:OpenVinoControlNet", library="openvino", beside=("torch",)),
    "fake": BackendEntry(f"{_ROOM}.fake:FakeControlNet", explicit=True),
}
