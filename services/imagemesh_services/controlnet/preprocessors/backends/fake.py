"""Models to be worked out by hand.

Depth is the picture's mean brightness over the channels. A pixel's class is its brightness // 64. There is one person,
point i of whose body is at i eighteenths of the picture's width and height, with a confidence of 1. Edges are where it
is bright.
"""

from collections.abc import Callable, Mapping

import numpy as np

from imagemesh_runtime.registry import ModelCard
from imagemesh_runtime.tensors import Array
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.controlnet.preprocessors.backend import TASK, Task


def _depth(image: Array) -> Array:
    return np.asarray(image.mean(axis=2, dtype=np.float32))


def _classes(image: Array) -> Array:
    return np.asarray(image.mean(axis=2) // 64, dtype=np.int32)


def _people(image: Array) -> Array:
    height, width = image.shape[:2]
    parts = np.arange(1, 18) / 18
    return np.stack([parts * width, parts * height, np.ones(17)], axis=1)[None].astype(np.float32)


def _edges(image: Array) -> Array:
    return _depth(image) / np.float32(255)


_SEES: Mapping[Task, Callable[[Array], Array]] = {
    Task.DEPTH: _depth,
    Task.CLASSES: _classes,
    Task.PEOPLE: _people,
    Task.EDGES: _edges,
}


class FakeAnnotator:
    """See the module."""

    def __init__(self, task: Task) -> None:
        self.look = _SEES[task]


class FakeAnnotators:
    """Has a model a task: "fake-depth", "fake-classes", "fake-people" and "fake-edges"."""

    name, device, dtype = "fake", "cpu", "float32"
    repository = None

    def __init__(self, config: ControlNetConfig) -> None:
        """Needs nothing of the configuration."""

    def cards(self) -> Mapping[str, ModelCard]:
        return {f"fake-{task.value}": ModelCard(f"fake-{task.value}", {TASK: task.value}) for task in Task}

    def load(self, name: str) -> FakeAnnotator:
        return FakeAnnotator(Task(name.removeprefix("fake-")))
