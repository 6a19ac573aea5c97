"""What the Open Inference Protocol's face serves: models with named tensors, and how they have fared."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import ml_dtypes
import numpy as np

from imagemesh_runtime.tensors import Array

VERSION: Final = "1"
# The protocol's names, numpy's types, and the field of typed contents; BYTES are arrays of ``bytes`` objects.
DTYPES: Final[Mapping[str, tuple[Any, str]]] = {
    "BOOL": (np.dtype(np.bool_), "bool_contents"),
    "UINT8": (np.dtype(np.uint8), "uint_contents"),
    "UINT16": (np.dtype(np.uint16), "uint_contents"),
    "UINT32": (np.dtype(np.uint32), "uint_contents"),
    "UINT64": (np.dtype(np.uint64), "uint64_contents"),
    "INT8": (np.dtype(np.int8), "int_contents"),
    "INT16": (np.dtype(np.int16), "int_contents"),
    "INT32": (np.dtype(np.int32), "int_contents"),
    "INT64": (np.dtype(np.int64), "int64_contents"),
    "FP16": (np.dtype(np.float16), ""),
    "BF16": (np.dtype(ml_dtypes.bfloat16), ""),
    "FP32": (np.dtype(np.float32), "fp32_contents"),
    "FP64": (np.dtype(np.float64), "fp64_contents"),
    "BYTES": (np.dtype(np.object_), "bytes_contents"),
}
Arrays = Mapping[str, Array]
Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a model; ``dims`` are without the batch, -1 is any size."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    optional: bool = False


@dataclass
class Times:
    """How often something was done, and the nanoseconds that it took."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


@dataclass
class Statistics:
    """What a model has done since the server started."""

    success: Times = field(default_factory=Times)
    fail: Times = field(default_factory=Times)
    compute_input: Times = field(default_factory=Times)
    compute_infer: Times = field(default_factory=Times)
    compute_output: Times = field(default_factory=Times)
    items: int = 0
    executions: int = 0
    last: int = 0  # milliseconds since 1970
    by_batch: dict[int, tuple[Times, Times, Times]] = field(default_factory=dict)

    def note(self, batch: int, took: tuple[int, int, int]) -> None:
        """A request of ``batch`` items that succeeded, and its nanoseconds of input, inference and output."""
        self.success.add(sum(took))
        self.items += batch
        self.executions += 1
        self.last = time.time_ns() // 1_000_000
        own = self.by_batch.setdefault(batch, (Times(), Times(), Times()))
        for times, one, ns in zip(
            (self.compute_input, self.compute_infer, self.compute_output), own, took, strict=True
        ):
            times.add(ns)
            one.add(ns)


@dataclass
class OipModel:
    """A model of the face.

    ``infer`` answers once; of a decoupled model ``stream`` answers as often as it likes, and the last answer is the one
    that comes with True. ``max_batch`` 0: tensors have no batch dimension.
    """

    name: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    infer: Callable[[Arrays, Parameters], Awaitable[Arrays]] | None = None
    stream: Callable[[Arrays, Parameters], AsyncGenerator[tuple[Arrays, bool], None]] | None = None
    max_batch: int = 0
    # Which of what ``infer`` makes names the columns of outputs that are classified, BYTES [columns]; empty: none are.
    labels: str = ""
    # Whether it could answer now.
    ready: Callable[[], Awaitable[bool]] | None = None
    loaded: bool = True
    statistics: Statistics = field(default_factory=Statistics)

    @property
    def decoupled(self) -> bool:
        """Whether it answers more than once."""
        return self.stream is not None

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """The shape with the batch, if there is one."""
        return (-1, *spec.dims) if self.max_batch else spec.dims
