"""What a scheduler or a guider has become since its run began, as JSON values and tensors, and back again.

diffusers' schedulers keep their state in plain attributes. What differs from a snapshot taken when the schedule was set
is the whole of it; the configuration and callables are never part. A test holds every scheduler of the list to that.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.tensors import Array
from imagemesh_services.torch_support import to_numpy

_CONFIGURATION: Final = "_internal_dict"
_MAX_DEPTH: Final = 4
_MAX_ITEMS: Final = 4096
_MAX_INTEGER: Final = 1 << 53
# IPNDM's history only grows; it looks back this far (bit-exact), and PNDM cuts its own to the same length.
_HISTORY: Final = {"ets": 3}
# Attributes that some classes have only from their first step on (Heun, KDPM2 ancestral, SASolver, LCM, UniPC).
_LATE: Final = frozenset(
    {"dt", "last_noise", "sample", "sigma_data", "this_corrector_order", "this_order", "this_predictor_order"}
)


def snapshot(thing: object) -> dict[str, Any]:
    """The attributes as they are now; lists are copied, tensors are not: schedulers replace, never overwrite them."""
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in vars(thing).items()
        if name != _CONFIGURATION and not callable(value)
    }


def changes(thing: object, before: dict[str, Any]) -> dict[str, Any]:
    """The attributes that are no longer what they were in the snapshot ``before``."""
    now = snapshot(thing)
    changed = {name: value for name, value in now.items() if name not in before or not same(value, before[name])}
    return {
        name: value[-_HISTORY[name] :] if name in _HISTORY and isinstance(value, list) else value
        for name, value in changed.items()
    }


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal bit by bit; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return bool(a == b)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor


@dataclass
class Packer:
    """Turns values into JSON ones and puts the tensors aside under names."""

    tensors: dict[str, Array] = field(default_factory=dict)

    def pack(self, value: Any, path: str) -> Any:
        """A JSON value; ``path`` names the tensors in it.

        Raises:
            TypeError: no checkpoint can hold such a value.
        """
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.generic):
            return {"scalar": value.dtype.name, "value": value.item()}
        if isinstance(value, torch.Tensor):
            return {"tensor": self._put(to_numpy(value), path), "dtype": str(value.dtype).removeprefix("torch.")}
        if isinstance(value, np.ndarray):
            return {"array": self._put(value, path), "dtype": value.dtype.name}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self.pack(item, f"{path}.{i}") for i, item in enumerate(value)]}
        raise TypeError(f"{path} is a {type(value).__name__}, which no checkpoint can hold")

    def _put(self, array: Array, path: str) -> str:
        # The contract has no float64; its bits travel as int64.
        self.tensors[path] = array.view(np.int64) if array.dtype == np.float64 else array
        return path


@dataclass(frozen=True)
class Unpacker:
    """The way back. Nothing that a client wrote is trusted: types, sizes and depth are all bounded."""

    tensors: dict[str, Array]
    device: torch.device
    max_elements: int

    def unpack(self, packed: Any, path: str, depth: int = 0) -> Any:
        """The value.

        Raises:
            InvalidArgument: there is none that ``Packer`` would have written so.
        """
        if packed is None or isinstance(packed, bool | float | str):
            return packed
        if isinstance(packed, int) and abs(packed) <= _MAX_INTEGER:
            return packed
        if isinstance(packed, dict) and depth < _MAX_DEPTH:
            for kind, read in (("tensor", self._tensor), ("array", self._array), ("scalar", self._scalar)):
                if kind in packed:
                    return read(packed, path)
            for kind, made in (("list", list), ("tuple", tuple)):
                items = packed.get(kind)
                if isinstance(items, list) and len(items) <= _MAX_ITEMS:
                    return made(self.unpack(item, f"{path}.{i}", depth + 1) for i, item in enumerate(items))
        raise InvalidArgument(path, packed, "a value of a checkpoint")

    def array(self, name: Any, dtype: Any, path: str) -> Array:
        """The array of that name and element type."""
        if not isinstance(name, str) or name not in self.tensors:
            raise InvalidArgument(path, name, f"one of {', '.join(sorted(self.tensors)) or 'none'}")
        found = self.tensors[name]
        if dtype == "float64" and found.dtype == np.int64:
            found = found.view(np.float64)
        if found.dtype.name != dtype:
            raise InvalidArgument(f"{path}.dtype", dtype, found.dtype.name)
        if found.size > self.max_elements:
            raise InvalidArgument(f"{path}.shape", list(found.shape), f"at most {self.max_elements} elements")
        return found

    def _tensor(self, packed: dict[str, Any], path: str) -> torch.Tensor:
        found = self.array(packed["tensor"], packed.get("dtype"), path)
        if found.dtype.name == "bfloat16":
            return torch.from_numpy(found.view(np.uint16).copy()).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(found.copy()).to(self.device)

    def _array(self, packed: dict[str, Any], path: str) -> Array:
        return self.array(packed["array"], packed.get("dtype"), path).copy()

    def _scalar(self, packed: dict[str, Any], path: str) -> Any:
        value, name = packed.get("value"), packed["scalar"]
        if name not in ("float32", "float64", "int32", "int64", "bool") or not isinstance(value, bool | int | float):
            raise InvalidArgument(path, packed, "a numpy scalar")
        return np.dtype(name).type(value)


def restore(thing: object, packed: Any, unpacker: Unpacker, path: str) -> None:
    """Give ``thing`` the attributes that ``Packer`` wrote of its twin.

    Raises:
        InvalidArgument: one is not an attribute that this kind of object has, or its value is none.
    """
    if not isinstance(packed, dict):
        raise InvalidArgument(path, packed, "an object")
    allowed = snapshot(thing)
    for name, value in packed.items():
        if name not in allowed and name not in _LATE:
            raise InvalidArgument(f"{path}.{name}", value, f"one of {', '.join(sorted(allowed))}")
        setattr(thing, name, unpacker.unpack(value, f"{path}.{name}"))
