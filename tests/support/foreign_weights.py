"""A model's weights in the files that other libraries write, made from its safetensors.

Layouts and names are those of transformers 4, which still had models for Flax and TensorFlow and whose
``save_pretrained`` wrote such files: of its Flax models a MessagePack tree, of its TensorFlow models Keras' HDF5.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np
import torch
from safetensors.numpy import load_file

Arrays = Mapping[str, np.ndarray]


def with_weights(folder: Path, target: Path, write: Callable[[Arrays, Path], None]) -> Path:
    """A copy of the model's folder with its weights in another format only."""
    shutil.copytree(folder, target)
    (target / "model.safetensors").unlink()
    write(load_file(folder / "model.safetensors"), target)
    return target


def write_pytorch(arrays: Arrays, folder: Path) -> None:
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, folder / "pytorch_model.bin")


def write_pytorch_shards(arrays: Arrays, folder: Path) -> None:
    """As ``save_pretrained`` does with a large model: two shards and their index."""
    names, found = sorted(arrays), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch.save({name: torch.from_numpy(arrays[name]) for name in part}, folder / file)
        found |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": found}))


def write_flax(arrays: Arrays, folder: Path) -> None:
    tree = _flax_tree(arrays)
    (folder / "flax_model.msgpack").write_bytes(msgpack.packb(tree, default=_extension, strict_types=True))


def _flax_tree(arrays: Arrays) -> dict[str, Any]:
    """The parameters as Flax nests them; the running statistics of batch norms in a tree of their own."""
    parameters: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    for name, array in arrays.items():
        *scope, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        tree = statistics if leaf.startswith("running_") else parameters
        for part in scope:
            tree = tree.setdefault(part, {})
        new, value = _flax_leaf(leaf, array)
        tree[new] = np.ascontiguousarray(value)
    return {"params": parameters, "batch_stats": statistics} if statistics else parameters


def _flax_leaf(leaf: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    if leaf != "weight":
        return leaf.removeprefix("running_"), array
    if array.ndim == 1:
        return "scale", array
    return "kernel", array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _extension(array: Any) -> msgpack.ExtType:
    """As flax.serialization packs an array."""
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes("C")), use_bin_type=True))


_TF_LEAVES = {"bias": "beta", "weight": "gamma", "running_mean": "moving_mean", "running_var": "moving_variance"}


def write_tensorflow(arrays: Arrays, folder: Path) -> None:
    """HDF5 as Keras writes it: a group a layer of the model, in it the whole paths of its variables."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = "tf_" + re.sub("(?<=[a-z])(?=[A-Z0-9])|(?<=T)(?=F)", "_", architecture).lower()
    norms = {name.rpartition(".")[0] for name, array in arrays.items() if name.endswith("weight") and array.ndim == 1}
    with h5py.File(folder / "tf_model.h5", "w") as file:
        variables: dict[str, list[str]] = {}
        for name, array in arrays.items():
            if name.endswith("num_batches_tracked"):
                continue
            path, value = _tensorflow(name, array, norms)
            layer = path.partition("/")[0]
            variable = f"{model}/{path}:0"
            file.require_group(layer).create_dataset(variable, data=value)
            variables.setdefault(layer, []).append(variable)
        file.attrs["layer_names"] = [layer.encode() for layer in variables]
        for layer, names in variables.items():
            file[layer].attrs["weight_names"] = [name.encode() for name in names]


def _tensorflow(name: str, array: np.ndarray, norms: set[str]) -> tuple[str, np.ndarray]:
    scope, _, leaf = name.rpartition(".")
    if leaf == "weight" and array.ndim > 1:
        leaf = "kernel"
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    elif scope in norms:
        leaf = _TF_LEAVES.get(leaf, leaf)
    # Lists of ViT and DeiT are named layer_._0, those of the others (layers, stages, blocks) layers.0.
    path = re.sub(r"\.(\d+)(?=\.|$)", r"@\1", scope).replace(".", "/")
    path = re.sub(r"\bencoder/layer@", "encoder/layer_._", path).replace("@", ".")
    return f"{path}/{leaf}", array
