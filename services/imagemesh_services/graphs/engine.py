"""The seam between a module that became a graph and what runs it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from imagemesh_runtime.tensors import Array


class Graph(Protocol):
    """A graph that an engine has loaded."""

    def __call__(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        """All outputs in the graph's order, of all inputs by their names; the caller may keep and change them."""


class Engine(Protocol):
    """A library that runs graphs on a device, in so many threads (0: the cores that this process may use).

    Raises:
        InvalidArgument: it can't use that device here.
    """

    name: str
    version: str
    device: str

    def __init__(self, device: str, threads: int) -> None: ...

    def open(self, path: Path) -> Graph:
        """Load an ONNX file, with the weights beside it.

        Raises:
            FailedPrecondition: it can't be read, or has what this engine can't run.
        """


def thread_count(threads: int) -> int:
    """Threads of one computation; 0: the cores that this process may use."""
    return threads or len(os.sched_getaffinity(0))
