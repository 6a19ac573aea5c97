"""What a scheduler or a guider has become since its run began, as JSON values and tensors, and back again.

diffusers' schedulers keep their state in plain attributes. What differs from a snapshot taken when the schedule was set
is the whole of it; the configuration and callables are never part. A test holds every scheduler of the list to that.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from imagemesh_runtime.errors import InvalidArgument, shorten
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
# Of the attributes that a schedule begins with, those of these kinds change with its steps; tables and names don't.
_CHANGING: Final = (bool, int, float, list, np.generic)
# Sums that begin as the number 0 and become tensors; the guider itself judges those.
_SUMS: Final = frozenset({"running_average"})
# The element types that torch and numpy both have.
_DTYPES: Final = frozenset({"float32", "float16", "bfloat16", "float64", "int64", "int32", "int8", "uint8", "bool"})
# Of the tensors there are, an error names so many.
_SHOWN: Final = 20
_SCALARS: Final = ("float32", "float64", "int32", "int64", "bool")


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
    """The way back. Nothing that a client wrote is trusted: types, sizes and depth are all bounded.

    A tensor is taken out once, so that what is made is never more than what was sent.
    """

    tensors: dict[str, Array]
    device: torch.device
    max_elements: int
    _taken: set[str] = field(default_factory=set)

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
        left = sorted(set(self.tensors) - self._taken)
        if not isinstance(name, str) or name not in left:
            raise InvalidArgument(path, name, f"one of {', '.join(map(shorten, left[:_SHOWN])) or 'none'}, each once")
        found = self.tensors[name]
        if dtype == "float64" and found.dtype == np.int64:
            found = found.view(np.float64)
        if found.dtype.name != dtype:
            raise InvalidArgument(f"{path}.dtype", dtype, found.dtype.name)
        if dtype not in _DTYPES:
            raise InvalidArgument(f"{path}.dtype", dtype, ", ".join(sorted(_DTYPES)))
        if found.size > self.max_elements:
            raise InvalidArgument(f"{path}.shape", list(found.shape), f"at most {self.max_elements} elements")
        self._taken.add(name)
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
        if name not in _SCALARS or not isinstance(value, bool | int | float):
            raise InvalidArgument(path, packed, "a numpy scalar")
        try:
            return np.dtype(name).type(value)
        except (OverflowError, ValueError) as error:
            raise InvalidArgument(path, packed, f"a number that {name} holds") from error


def restore(thing: object, packed: Any, unpacker: Unpacker, path: str) -> None:
    """Give ``thing`` the attributes that ``Packer`` wrote of its twin.

    Raises:
        InvalidArgument: one is not an attribute that changes with the steps of such an object, or its value is none.
    """
    if not isinstance(packed, dict):
        raise InvalidArgument(path, packed, "an object")
    allowed = snapshot(thing)
    for name, value in packed.items():
        if name not in allowed and name not in _LATE:
            raise InvalidArgument(path, name, f"of attributes among {', '.join(sorted(allowed))}")
        field_path = f"{path}.{name}"
        unpacked = unpacker.unpack(value, field_path)
        if name not in _SUMS:
            _check_kind(allowed.get(name), unpacked, field_path)
        setattr(thing, name, unpacked)


def _check_kind(began: Any, value: Any, path: str) -> None:
    """Whether what began as ``began`` may have become ``value``; what began as None may be anything by now."""
    if began is None:
        return
    if not isinstance(began, _CHANGING):
        raise InvalidArgument(path, value, f"left out: a {type(began).__name__} that the request sets")
    kinds = (int, float, np.generic) if isinstance(began, float | np.generic) else (type(began),)
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(began, bool)):
        raise InvalidArgument(path, value, f"of type {type(began).__name__}")
