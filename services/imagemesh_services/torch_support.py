"""What the torch backends share: devices, element types, arrays. Imported by them alone."""

import os
from typing import Any

import ml_dtypes
import numpy as np
import torch

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.tensors import Array

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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


def load_module(cls: Any, path: Any, dtype: torch.dtype, device: torch.device, **kwargs: Any) -> Any:
    """A diffusers or transformers module from safetensors (never a pickle), in eval mode on the device."""
    module = cls.from_pretrained(path, torch_dtype=dtype, use_safetensors=True, **kwargs)
    return module.to(device).eval().requires_grad_(False)
