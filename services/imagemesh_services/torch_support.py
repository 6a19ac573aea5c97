"""What the torch backends share: devices, element types, arrays. Imported by them alone."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import torch
from safetensors import SafetensorError
from torch.utils.dlpack import from_dlpack

from imagemesh_runtime.config import ModelServerConfig
from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument
from imagemesh_runtime.tensors import Array
from imagemesh_services.repository import open_repository

log = logging.getLogger(__name__)

_FAULTS_SHOWN: Final = 3
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# diffusers patches torch's modules while it builds one without memory for its weights. Two loads on two lanes that
# overlap would leave a patch behind, and no module of the process would ever get memory again.
_LOADING = threading.Lock()


@contextmanager
def building() -> Iterator[None]:
    """While the libraries build modules: one load at a time in a process."""
    with _LOADING:
        yield


def pick_device(choice: str) -> torch.device:
    """The device that ``choice`` names; "auto" prefers an accelerator.

    Raises:
        InvalidArgument: torch knows no such device, or it isn't here.
    """
    if choice == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        device = torch.device(choice)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgument("device", choice, "auto or a torch device that this host has") from error
    return device


def pick_dtype(choice: str) -> torch.dtype:
    """The torch dtype of that name.

    Raises:
        InvalidArgument: it isn't one that weights can have.
    """
    if choice not in DTYPES:
        raise InvalidArgument("dtype", choice, f"one of {', '.join(DTYPES)}")
    return DTYPES[choice]


def set_threads(threads: int) -> None:
    """Bound the threads of one computation for the whole process; 0: the cores that this process may use."""
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))


class TorchBackend:
    """What the torch backends of all services are: models of folders, on one device, in one element type.

    Raises:
        InvalidArgument: there is no such device or element type.
    """

    name = "torch"

    def __init__(self, config: ModelServerConfig) -> None:
        self.repository = open_repository(config)
        self._device = pick_device(config.device)
        self._dtype = pick_dtype(config.dtype)
        self.device, self.dtype = str(self._device), config.dtype
        set_threads(config.threads)

    def _marks(self) -> tuple[object, ...]:
        """What the bits of an answer depend on besides the weights."""
        return (self.name, self._dtype, self._device.type, torch.__version__)


def to_torch(array: Array, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of the array's values; the array, which may share a message's memory, is copied."""
    if array.dtype == ml_dtypes.bfloat16:
        tensor = torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array.copy())
    return tensor.to(device=device, dtype=dtype)


def to_numpy(tensor: torch.Tensor) -> Array:
    """The tensor's values on the host."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        array: Array = tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return array
    result: Array = tensor.numpy()
    return result


def plus(one: Array, other: Array) -> Array:
    """The arrays' sum on the host, rounded as torch does.

    Raises:
        ValueError: their shapes don't go together.
    """
    try:
        return to_numpy(_seen(one) + _seen(other))
    except RuntimeError as error:
        raise ValueError(f"shapes {list(one.shape)} and {list(other.shape)}") from error


def _seen(array: Array) -> torch.Tensor:
    """The array as a tensor, not copied; only to be read, as arrays that came in a message may be."""
    if array.dtype == ml_dtypes.bfloat16:
        return from_dlpack(array.view(np.uint16)).view(torch.bfloat16)
    return from_dlpack(array)


def load_module(cls: Any, path: Path, dtype: torch.dtype, device: torch.device, **kwargs: Any) -> Any:
    """A diffusers or transformers module from safetensors (never a pickle), in eval mode on the device.

    Args:
        kwargs: of ``from_pretrained``; of transformers, ``config`` and ``state_dict`` where the weights are read.

    Raises:
        FailedPrecondition: the folder has no safetensors, or not just the weights that its config.json asks for.
    """
    shown = f"{path.parent.name}/{path.name}"
    try:
        with _LOADING:
            module, report = cls.from_pretrained(
                None if "state_dict" in kwargs else path,
                torch_dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, in words of ours
                **kwargs,
            )
    except (OSError, SafetensorError) as error:  # the latter where a file is torn
        log.warning("%s: %s", shown, error)
        raise FailedPrecondition(f"{shown} has no weights in safetensors files that can be read") from error
    # Both libraries would go on with random values in place of what is missing.
    faults = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    faults += [
        f"{name} is {list(found)}, where config.json asks for {list(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    if faults:
        more = f" and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise FailedPrecondition(f"weights of {shown} don't fit: {'; '.join(faults[:_FAULTS_SHOWN])}{more}")
    return module.to(device).eval().requires_grad_(False)
