"""Weights as Keras' ``save_weights`` writes those of transformers' TensorFlow models: HDF5, a dataset a variable.

A variable's path has the scopes of PyTorch's names, with ``_._`` before a layer's number (``layer_._0``), below the
name of the model; in a whole file each layer's group repeats that path, in a shard it lies at the root without it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import h5py
import numpy as np

from imagemesh_runtime.tensors import Array

_LEAVES: Final = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "embeddings": "weight",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_AXES: Final = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}  # of a kernel of so many


def read(path: Path) -> Mapping[str, Array]:
    """The file's arrays, by PyTorch's names and in PyTorch's layouts.

    Raises:
        OSError: it is no HDF5.
        ValueError: it refers to other files, which whoever wrote it may have no right to read.
    """
    with h5py.File(path, "r") as file:
        # The group of the layer, then the name of the model.
        above = 2 if any(name.startswith("layer_names") for name in file.attrs) else 0
        found: list[tuple[str, Array]] = []
        file.visititems(lambda name, item: _collect(found, above, name, item))
    return dict(found)


def _collect(found: list[tuple[str, Array]], above: int, name: str, item: h5py.Group | h5py.Dataset) -> None:
    if isinstance(item, h5py.Dataset):
        if item.external or item.is_virtual:
            raise ValueError(f"the numbers of {name} are in other files")
        found.append(_named(_scopes(name, above), np.asarray(item[()])))


def _scopes(name: str, above: int) -> list[str]:
    name = re.sub(r"/[^/]*___([^/]*)/", r"/\1/", name.removesuffix(":0"))  # "one___two" is two
    return [part for part in name.replace("_._", "/").split("/") if part][above:]


def _named(scopes: list[str], array: Array) -> tuple[str, Array]:
    if scopes[-1] == "kernel" and array.ndim in _AXES:
        array = array.transpose(_AXES[array.ndim])
    return ".".join([*scopes[:-1], _LEAVES.get(scopes[-1], scopes[-1])]), array
