"""Tensors of the Open Inference Protocol: their bytes, their checks, and the classification extension."""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.oip_models import DTYPES, OipModel, TensorSpec
from imagemesh_runtime.tensors import MAX_BYTES, Array

# Of an item, that the classification extension names; who wants more can have the numbers.
MAX_CLASSES: Final = 1000


def from_bytes(data: bytes | memoryview, datatype: str, shape: Sequence[int], field: str) -> Array:
    """The tensor behind little-endian bytes, a copy; BYTES elements have their length before them.

    Raises:
        InvalidArgument: there are more or fewer bytes than the shape needs.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return _strings(bytes(data), count, field).reshape(shape)
    dtype = DTYPES[datatype][0]
    if len(data) != count * dtype.itemsize:
        raise InvalidArgument(
            field, f"{len(data)} bytes", f"{count * dtype.itemsize} bytes for {list(shape)} {datatype}"
        )
    return np.frombuffer(data, dtype).reshape(shape).copy()


def _strings(data: bytes, count: int, field: str) -> Array:
    found: list[bytes] = []
    at = 0
    while at + 4 <= len(data) and len(found) <= count:
        (size,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    if at != len(data) or len(found) != count:
        raise InvalidArgument(field, f"{len(data)} bytes", f"{count} elements, each its length in 4 bytes and itself")
    array = np.empty(count, dtype=np.object_)
    array[:] = found
    return array


def to_bytes(array: Array) -> bytes:
    """The tensor's bytes, as ``from_bytes`` reads them."""
    if array.dtype != np.object_:
        return np.ascontiguousarray(array).tobytes()
    return b"".join(struct.pack("<I", len(one)) + one for one in array.reshape(-1))


def datatype_of(array: Array) -> str:
    """The protocol's name for the tensor's type."""
    return next(name for name, (dtype, _) in DTYPES.items() if dtype == array.dtype)


def from_contents(values: Sequence[Any], datatype: str, shape: Sequence[int], field: str) -> Array:
    """The tensor of typed contents.

    Raises:
        InvalidArgument: as many values as the shape needs they are not, or one does not fit the type.
    """
    count = math.prod(shape)
    if len(values) != count:
        raise InvalidArgument(field, f"{len(values)} values", f"{count} values for {list(shape)}")
    try:
        array = np.empty(count, dtype=DTYPES[datatype][0])
        array[:] = values
    except (OverflowError, ValueError) as error:
        raise InvalidArgument(field, "a value", f"within the range of {datatype}") from error
    return array.reshape(shape)


def check_shape(model: OipModel, spec: TensorSpec, shape: Sequence[int], datatype: str) -> None:
    """Raise InvalidArgument unless the model takes such a tensor there."""
    wanted = model.shape(spec)
    if datatype != spec.datatype:
        raise InvalidArgument(f"inputs[{spec.name!r}].datatype", datatype, spec.datatype)
    fits = len(shape) == len(wanted) and all(one in (-1, got) for one, got in zip(wanted, shape, strict=True))
    if not fits or any(side < 0 for side in shape):
        raise InvalidArgument(f"inputs[{spec.name!r}].shape", list(shape), f"{list(wanted)}, where -1 is any size")
    if math.prod(side or 1 for side in shape) * DTYPES[datatype][0].itemsize > MAX_BYTES:
        raise InvalidArgument(f"inputs[{spec.name!r}].shape", list(shape), "of a size that fits in memory")
    if model.max_batch and not 1 <= shape[0] <= model.max_batch:
        allowed = f"a batch of 1 to {model.max_batch}"
        raise InvalidArgument(f"inputs[{spec.name!r}].shape", list(shape), allowed)


def check_together(model: OipModel, arrays: Mapping[str, Array]) -> int:
    """The number of items that all inputs have.

    Raises:
        InvalidArgument: one is missing, or they differ in it.
    """
    for spec in model.inputs:
        if spec.name not in arrays and not spec.optional:
            raise InvalidArgument("inputs", sorted(arrays), f"with {spec.name!r}, which model {model.name!r} needs")
    if not model.max_batch:
        return 1
    batches = {len(array) for array in arrays.values()}
    if len(batches) > 1:
        raise InvalidArgument("inputs", sorted(batches), "of one batch size")
    return batches.pop()


def classified(array: Array, k: int, labels: Sequence[str]) -> Array:
    """BYTES [batch, k]: of each row the ``k`` largest as "value:index:label", the largest first."""
    rows = array.reshape(len(array), -1).astype(np.float64)
    k = min(max(k, 1), rows.shape[1])
    best = np.argsort(-rows, axis=1, kind="stable")[:, :k]
    found = np.empty(best.shape, dtype=np.object_)
    for (row, place), index in np.ndenumerate(best):
        label = f":{labels[int(index)]}" if index < len(labels) else ""
        found[row, place] = f"{rows[row, index]:f}:{index}{label}".encode()
    return found
