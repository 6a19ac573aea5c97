"""The seam between the ControlNet service and what runs the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

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


class ControlRun(Protocol):
    """A ControlNet at work for one generation. Called on the lane."""

    def tell(self, embeddings: Array, added: Mapping[str, Array]) -> None:
        """The prompts changed: what takes the place of ``ControlInputs``', of the same shapes."""

    def residuals(self, sample: Array, timestep: float) -> tuple[Sequence[Array], Array]:
        """For rows [rows, channels, h, w]: what to add to the UNet's skip connections, and to its middle block.

        Fewer rows than the embeddings have are the last ones of them: a step without guidance has no negative rows.

        Raises:
            InvalidArgument: the rows don't fit the picture or the embeddings.
        """


class ControlModel(Protocol):
    """A loaded ControlNet."""

    def start(self, inputs: ControlInputs) -> ControlRun:
        """Prepare for a generation.

        Raises:
            InvalidArgument: the embeddings don't fit the model.
        """


_ROOM = "imagemesh_services.controlnet.backends"
BACKENDS: Final[Mapping[str, BackendEntry]] = {
    "torch": BackendEntry(f"{_ROOM}.torch:TorchControlNet", library="torch"),
    "fake": BackendEntry(f"{_ROOM}.fake:FakeControlNet", explicit=True),
}
