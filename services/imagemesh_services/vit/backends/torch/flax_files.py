"""Weights as flax.serialization writes them: a MessagePack tree of arrays, each an extension of its own.

Of transformers' Flax models every scope has the name of PyTorch's; leaves and layouts differ.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import msgpack
import numpy as np

from imagemesh_runtime.tensors import Array

_NDARRAY, _SCALAR = 1, 3  # of flax.serialization's extension types; 2 is Python's complex
_CHUNKED: Final = "__msgpack_chunked_array__"  # of arrays over a GiB
_DTYPES: Final = {name: np.dtype(name) for name in ("float16", "float32", "float64", "int32", "int64", "uint8")}
_LEAVES: Final = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_STATISTICS: Final = {"mean": "running_mean", "var": "running_var"}


def read(path: Path) -> Mapping[str, Array]:
    """The file's arrays, by PyTorch's names and in PyTorch's layouts."""
    tree = msgpack.unpackb(path.read_bytes(), ext_hook=_array, raw=False)
    if not isinstance(tree, dict):
        raise TypeError("not a tree of weights")
    parts = {name: tree[name] for name in ("params", "batch_stats") if name in tree} or {"": tree}
    return dict(_named(scope, array) for part in parts.values() for scope, array in _leaves(part, ()))


def _array(code: int, data: bytes) -> Array:
    if code not in (_NDARRAY, _SCALAR):
        raise ValueError(f"extension {code} is no array")
    shape, name, content = msgpack.unpackb(data, raw=False)
    dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else _DTYPES[name]
    return np.frombuffer(content, dtype).reshape(shape)


def _leaves(tree: Mapping[str, Any], scope: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Array]]:
    for name, value in tree.items():
        inner = (*scope, *name.split("/"))  # shards are flat, with the scopes joined
        if not isinstance(value, dict):
            yield inner, value
        elif value.get(_CHUNKED):
            chunks = [value["chunks"][str(i)] for i in range(len(value["chunks"]))]
            shape = [int(value["shape"][str(i)]) for i in range(len(value["shape"]))]
            yield inner, np.concatenate(chunks).reshape(shape)
        else:
            yield from _leaves(value, inner)


def _named(scope: tuple[str, ...], array: Array) -> tuple[str, Array]:
    """A kernel [in, out] becomes a weight [out, in]; of a convolution, [h, w, in, out] becomes [out, in, h, w]."""
    leaf = scope[-1]
    if leaf == "kernel":
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return ".".join((*scope[:-1], _LEAVES.get(leaf) or _STATISTICS.get(leaf) or leaf)), array
