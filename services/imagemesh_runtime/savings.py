"""What a client may save on ControlNets, at the cost of other pictures: nothing of it is done unless asked for."""

from collections.abc import Mapping
from typing import Final

import ml_dtypes
import numpy as np

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.limits import MAX_STEPS, check_range
from imagemesh_runtime.tensors import Array

# Element types that residuals may travel in, and the largest number of each.
ROUNDINGS: Final[Mapping[str, tuple[np.dtype, float]]] = {
    "int8": (np.dtype(np.int8), 127.0),
    "fp8": (np.dtype(ml_dtypes.float8_e4m3fn), 448.0),
}


def check_rounding(field: str, name: str) -> None:
    """Raise InvalidArgument unless it is one of ``ROUNDINGS`` or empty."""
    if name and name not in ROUNDINGS:
        raise InvalidArgument(field, name, f"empty, {' or '.join(ROUNDINGS)}")


def check_savings(savings: pb.ControlSavings, controls: int) -> None:
    """Raise InvalidArgument unless the savings are possible ones, of so many controls."""
    check_range("control_savings.reuse_steps", savings.reuse_steps, 0, MAX_STEPS)
    check_rounding("control_savings.residuals", savings.residuals)
    if lossy(savings) and not controls:
        raise InvalidArgument("control_savings", sorted(lossy(savings)), "absent: there is no ControlNet to save on")


def lossy(savings: pb.ControlSavings) -> dict[str, str]:
    """What of it changes pictures, for the result to name."""
    found = {}
    if savings.reuse_steps > 1:
        found["control_reuse_steps"] = str(savings.reuse_steps)
    if savings.conditional_only:
        found["control_conditional_only"] = "true"
    if savings.residuals:
        found["control_residuals"] = savings.residuals
    return found


def rounded(array: Array, name: str) -> tuple[Array, Array]:
    """Residuals [rows, channels, ...] in 8 bits, and float32 scales [rows, channels], by each channel's largest number.

    What isn't finite is not after ``restored`` either.
    """
    dtype, most = ROUNDINGS[name]
    values = array.astype(np.float32)
    with np.errstate(invalid="ignore"):
        largest = np.abs(values).max(axis=tuple(range(2, values.ndim))) / np.float32(most)
        scales: Array = np.where(largest == 0, np.float32(1), largest).astype(np.float32)
        scaled = values / _spread(scales, values)
        return (np.rint(scaled) if dtype.kind == "i" else scaled).astype(dtype), scales


def restored(array: Array, scales: Array) -> Array:
    """float32: what ``rounded`` was given, about."""
    values: Array = array.astype(np.float32)
    with np.errstate(invalid="ignore"):
        values *= _spread(scales, values)
    return values


def _spread(scales: Array, values: Array) -> Array:
    return scales.reshape(*scales.shape, *(1,) * (values.ndim - 2))
