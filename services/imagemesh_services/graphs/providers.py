"""ONNX Runtime's execution providers: which of them this build has, and which of those work on this host."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import onnxruntime

from imagemesh_runtime.errors import InvalidArgument

log = logging.getLogger(__name__)

# By the device that the configuration calls them.
PROVIDERS: Final[Mapping[str, str]] = {
    "cuda": "CUDAExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "cpu": "CPUExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# What "auto" tries, the best first. TensorRT builds an engine for every shape, which takes minutes, and OpenVINO is a
# backend of its own: both only where they are asked for.
AUTOMATIC: Final = ("cuda", "migraphx", "rocm", "directml", "coreml", "cpu")
# Providers that can be told which of several devices.
_NUMBERED: Final = ("cuda", "migraphx", "rocm", "directml", "tensorrt")


def pick_provider(choice: str, present: Sequence[str] | None = None, works: Callable[[str], bool] | None = None) -> str:
    """The device that ``choice`` names, such as "cpu" or "cuda:1"; "auto": the best that works here.

    Args:
        present: the providers that this build has; None: ask it.
        works: whether the device of that name can be used; None: try it.

    Raises:
        InvalidArgument: this ONNX Runtime doesn't have it, or can't use it on this host.
    """
    present = onnxruntime.get_available_providers() if present is None else present
    works = usable if works is None else works
    here = [name for name, provider in PROVIDERS.items() if provider in present]
    if choice == "auto":
        for name in AUTOMATIC:
            if name in here:
                if works(name):
                    return name
                log.warning("onnxruntime: %s can't be used on this host, although this build has it", PROVIDERS[name])
        choice = "cpu"
    name, _, number = choice.partition(":")
    if name not in here or (number and (name not in _NUMBERED or not number.isdecimal())):
        raise InvalidArgument("device", choice, f"auto or one of {', '.join(here)}")
    if not works(choice):
        raise InvalidArgument("device", choice, "one that works on this host: ONNX Runtime can't use it")
    return choice


def with_options(device: str) -> list[Any]:
    """The providers for a device, as a session takes them: what it can't run itself goes to the CPU."""
    name, _, number = device.partition(":")
    first: Any = (PROVIDERS[name], {"device_id": number}) if number else PROVIDERS[name]
    return [first] if name == "cpu" else [first, PROVIDERS["cpu"]]


def usable(device: str) -> bool:
    """Whether a session on that device is one: ONNX Runtime falls back to the CPU by itself, and only logs it."""
    provider = PROVIDERS[device.partition(":")[0]]
    if device == "cpu" or provider not in onnxruntime.get_available_providers():
        return device == "cpu"
    import onnx

    shape = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "trial", shape[:1], shape[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=with_options(device))
    except Exception as error:  # ONNX Runtime has no base class for its own
        log.info("onnxruntime: no session on %s: %s", device, error)
        return False
    return provider in session.get_providers()
