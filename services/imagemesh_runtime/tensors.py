"""The one tensor encoding of the mesh: ``imagemesh.v1.Tensor`` to and from numpy.

numpy has no bfloat16 and no 8-bit floats; their arrays carry ``ml_dtypes``' types.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from imagemesh.v1 import tensor_pb2
from imagemesh_runtime.errors import InvalidArgument, shorten

Array = npt.NDArray[Any]

MAX_RANK: Final = 8
MAX_BYTES: Final = 1 << 62  # numpy refuses more, also where another extent is 0
_DTYPES: Final[Mapping["tensor_pb2.Dtype.ValueType", np.dtype[Any]]] = {
    tensor_pb2.DTYPE_FP32: np.dtype("<f4"),
    tensor_pb2.DTYPE_FP16: np.dtype("<f2"),
    tensor_pb2.DTYPE_BF16: np.dtype(ml_dtypes.bfloat16),
    tensor_pb2.DTYPE_FP8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    tensor_pb2.DTYPE_FP8_E5M2: np.dtype(ml_dtypes.float8_e5m2),
    tensor_pb2.DTYPE_INT8: np.dtype("i1"),
    tensor_pb2.DTYPE_UINT8: np.dtype("u1"),
    tensor_pb2.DTYPE_INT32: np.dtype("<i4"),
    tensor_pb2.DTYPE_INT64: np.dtype("<i8"),
    tensor_pb2.DTYPE_BOOL: np.dtype("?"),
}
_ENUMS: Final = {dtype: enum for enum, dtype in _DTYPES.items()}
FLOATS: Final = ("float32", "float16", "bfloat16")


class Memory(Protocol):
    """Where the payloads of a message's tensors lie when they are not in the message."""

    # Its bytes, and which way they came: "raw" or "shm".
    size: int
    path: str

    def read(self, where: tensor_pb2.SharedMemoryRef, field: str) -> Array:
        """The bytes of a range, as a read-only uint8 array that keeps the memory alive.

        Raises:
            InvalidArgument: the range is not all of this message's own.
        """
        ...


def headed(array: Array) -> tuple[tensor_pb2.Tensor, Array]:
    """A Tensor that lacks its payload, and the payload as contiguous uint8, if possible the array's own memory.

    Raises:
        TypeError: the dtype has no place in the contract (float64, complex, object...).
    """
    dtype = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
    enum = _ENUMS.get(dtype)
    if enum is None:
        raise TypeError(f"no tensor dtype for {array.dtype}")
    payload = np.ascontiguousarray(array, dtype=dtype).reshape(-1).view(np.uint8)
    return tensor_pb2.Tensor(dtype=enum, shape=array.shape), payload


def to_proto(array: Array) -> tensor_pb2.Tensor:
    """Encode an array of any strides.

    Raises:
        TypeError: as ``headed``.
    """
    tensor, payload = headed(array)
    tensor.data = payload.tobytes()
    return tensor


def from_proto(
    tensor: tensor_pb2.Tensor,
    field: str,
    *,
    dtypes: Collection[str] | None = None,
    shape: Sequence[int | None] | None = None,
    memory: Memory | None = None,
) -> Array:
    """Decode a tensor into a read-only array that shares the message's bytes.

    Args:
        field: the tensor's name in the request, for errors.
        dtypes: numpy names of the dtypes allowed; None allows all.
        shape: extents required, None for any; None allows every shape.
        memory: where the payload lies if the message only refers to it; None: such a reference is an error.

    Raises:
        InvalidArgument: dtype, shape or byte count are not what they must be.
    """
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        allowed = ", ".join(tensor_pb2.Dtype.Name(enum) for enum in _DTYPES)
        raise InvalidArgument(f"{field}.dtype", tensor.dtype, f"one of {allowed}")
    if dtypes is not None and dtype.name not in dtypes:
        raise InvalidArgument(f"{field}.dtype", dtype.name, f"one of {', '.join(sorted(dtypes))}")
    extents = _checked_shape(tensor, field, shape)
    if math.prod(extent or 1 for extent in extents) * dtype.itemsize > MAX_BYTES:
        raise InvalidArgument(f"{field}.shape", list(extents), "of a size that fits in memory")
    data = _payload(tensor, field, memory)
    expected = math.prod(extents) * dtype.itemsize
    if len(data) != expected:
        allowed = f"{expected} bytes for shape {list(extents)} of {dtype.name}"
        raise InvalidArgument(f"{field}.data", f"{len(data)} bytes", allowed)
    if dtype == np.bool_ and data.size and data.max() > 1:
        raise InvalidArgument(f"{field}.data", data[data > 1].tobytes(), "bytes of 0 and 1 for bool")
    array = data.view(dtype)
    if not array.flags.aligned:  # in a message payloads lie as they come, and not every library takes that
        array = data.copy().view(dtype)
        array.setflags(write=False)
    return array.reshape(extents)


def _payload(tensor: tensor_pb2.Tensor, field: str, memory: Memory | None) -> Array:
    if tensor.WhichOneof("payload") != "shared_memory":
        return np.frombuffer(tensor.data, np.uint8)
    if memory is None:
        allowed = "carried as data: this connection has negotiated no shared memory"
        raise InvalidArgument(field, "shared_memory", allowed)
    return memory.read(tensor.shared_memory, field)


def _checked_shape(tensor: tensor_pb2.Tensor, field: str, wanted: Sequence[int | None] | None) -> tuple[int, ...]:
    extents = tuple(tensor.shape)
    if len(extents) > MAX_RANK:
        raise InvalidArgument(f"{field}.shape", f"{len(extents)} dimensions", f"at most {MAX_RANK} dimensions")
    if any(extent < 0 for extent in extents):
        raise InvalidArgument(f"{field}.shape", list(extents), "without negative extents")
    if wanted is None:
        return extents
    fits = len(extents) == len(wanted) and all(w is None or w == e for w, e in zip(wanted, extents, strict=True))
    if not fits:
        shown = ", ".join("any" if extent is None else str(extent) for extent in wanted)
        raise InvalidArgument(f"{field}.shape", list(extents), f"[{shown}]")
    return extents


def require_finite(array: Array, field: str) -> Array:
    """``array`` itself, if it has no NaN and no infinity.

    Raises:
        InvalidArgument: it has some.
    """
    finite = np.isfinite(array.astype(np.float32) if array.dtype.itemsize < 4 else array)
    if not finite.all():
        bad = int(array.size - np.count_nonzero(finite))
        raise InvalidArgument(field, f"{bad} of {array.size} elements NaN or infinite", "finite")
    return array


def map_to_proto(arrays: Mapping[str, Array]) -> dict[str, tensor_pb2.Tensor]:
    """Encode named arrays for a ``map<string, Tensor>`` field."""
    return {name: to_proto(array) for name, array in arrays.items()}


def map_from_proto(tensors: Mapping[str, tensor_pb2.Tensor], field: str) -> dict[str, Array]:
    """Decode a ``map<string, Tensor>`` field; errors name the entry."""
    return {name: from_proto(tensor, f"{field}[{shorten(name)}]") for name, tensor in tensors.items()}
