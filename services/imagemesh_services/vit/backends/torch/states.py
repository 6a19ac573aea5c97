"""Weights of any format as a state dict of torch, under the names that transformers' PyTorch models have in files."""

import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Final

import torch

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.tensors import Array
from imagemesh_services.torch_support import to_torch
from imagemesh_services.vit.weights import Weights

log = logging.getLogger(__name__)

# Their libraries are imported where a folder needs them.
_READERS: Final[Mapping[str, str]] = {
    "flax": "imagemesh_services.vit.backends.torch.flax_files:read",
    "tensorflow": "imagemesh_services.vit.backends.torch.tensorflow_files:read",
}
# What the libraries raise on files that are torn, or of another kind than their name says.
_FAULTS: Final = (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError)


def read_state(model: str, weights: Weights) -> dict[str, torch.Tensor]:
    """All weights of the files, on the CPU.

    Raises:
        FailedPrecondition: a file can't be read, or is a pickle of more than weights, which is not unpickled.
    """
    read: Callable[[Path], Mapping[str, torch.Tensor]] = (
        _unpickled if weights.format == "pytorch" else _converted(weights.format)
    )
    state: dict[str, torch.Tensor] = {}
    for path in weights.files:
        try:
            state.update(read(path))
        except pickle.UnpicklingError as error:
            log.warning("%s: %s", path, error)
            raise FailedPrecondition(f"model {model}: {path.name} holds more than weights; it is not loaded") from error
        except _FAULTS as error:
            log.warning("%s: %s", path, error)
            raise FailedPrecondition(f"model {model}: {path.name} can't be read as {weights.format} weights") from error
    return state


def _unpickled(path: Path) -> Mapping[str, torch.Tensor]:
    found: Mapping[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    if not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError("not only tensors")
    return found


def _converted(format: str) -> Callable[[Path], Mapping[str, torch.Tensor]]:
    read: Callable[[Path], Mapping[str, Array]] = resolve_name(_READERS[format])
    return lambda path: _as_torch(read(path))


def _as_torch(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    state = {name: to_torch(array, torch.device("cpu")) for name, array in arrays.items()}
    # Only PyTorch's batch norms count their batches, for training.
    norms = [name.removesuffix("running_mean") for name in arrays if name.endswith(".running_mean")]
    return state | {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}
