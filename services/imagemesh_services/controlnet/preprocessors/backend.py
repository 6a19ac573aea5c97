"""The seam between preprocessors and the models that some of them need."""

from collections.abc import Mapping
from enum import Enum
from typing import Final, Protocol

from imagemesh_runtime.registry import BackendEntry
from imagemesh_runtime.tensors import Array


class Task(Enum):
    """What a model sees in a picture, and what ``Annotator.look`` answers."""

    # float32 [h, w], the nearer the higher, in the model's own units and at its own size
    DEPTH = "depth"
    # int32 [h, w]: each pixel's class, from 0, at the model's own size
    CLASSES = "classes"
    # float32 [people, 17, 3]: x and y in pixels of the picture and the confidence, in COCO's order of body points
    PEOPLE = "people"
    # float32 [h, w], 0 to 1: how surely there is an edge, at the picture's size or a smaller one
    EDGES = "edges"


class Annotator(Protocol):
    """A loaded model."""

    def look(self, image: Array) -> Array:
        """uint8 [height, width, 3], RGB, to what the model's ``Task`` says; called on the lane.

        Raises:
            NotFinite: the model gave NaN or infinity.
        """


# A card's property that holds its task's value.
TASK: Final = "task"
_ROOM = "imagemesh_services.controlnet.preprocessors.backends"
BACKENDS: Final[Mapping[str, BackendEntry]] = {
    "torch": BackendEntry(f"{_ROOM}.torch:TorchAnnotators", library="torch"),
    "fake": BackendEntry(f"{_ROOM}.fake:FakeAnnotators", explicit=True),
}
