"""Engines up to the device's edge: what is picked, and what is said where it isn't there."""

from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest

from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument
from imagemesh_services.diffusion import backend as diffusion
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.graphs.onnx_engine import OnnxEngine
from imagemesh_services.graphs.openvino_engine import OpenVinoEngine, pick_device
from imagemesh_services.graphs.providers import AUTOMATIC, PROVIDERS, pick_provider, usable, with_options
from imagemesh_services.vae import backend as vae
from imagemesh_services.vae.config import VaeConfig
from tests.support.backends import open_backend

CPU = "CPUExecutionProvider"
ENGINES = (OnnxEngine, OpenVinoEngine)


def works(device: str) -> bool:
    return True


def broken(device: str) -> bool:
    return device == "cpu"


@pytest.mark.parametrize("device", PROVIDERS)
def test_every_provider_is_picked_by_its_device_where_the_build_has_it(device: str) -> None:
    present = [PROVIDERS[device], CPU]
    assert pick_provider(device, present, works) == device
    assert with_options(device) == ([CPU] if device == "cpu" else [PROVIDERS[device], CPU])
    assert pick_provider("auto", present, works) == (device if device in AUTOMATIC else "cpu")


def test_auto_takes_the_best_that_works() -> None:
    present = [*PROVIDERS.values()]
    assert pick_provider("auto", present, works) == "cuda"
    assert pick_provider("auto", present, lambda device: device not in ("cuda", "migraphx")) == "rocm"


def test_auto_falls_back_to_the_cpu_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert pick_provider("auto", ["CUDAExecutionProvider", CPU], broken) == "cpu"
    assert "CUDAExecutionProvider can't be used on this host" in caplog.text


def test_a_number_names_one_of_several_devices() -> None:
    assert pick_provider("cuda:1", ["CUDAExecutionProvider", CPU], works) == "cuda:1"
    assert with_options("cuda:1") == [("CUDAExecutionProvider", {"device_id": "1"}), CPU]


@pytest.mark.parametrize("choice", ["tensorrt", "cuda:x", "cpu:1", "tpu", "", "cuda:"])
def test_a_device_that_the_build_has_not_is_refused_with_those_it_has(choice: str) -> None:
    present = [CPU] if choice in ("tensorrt", "cuda:") else ["CUDAExecutionProvider", CPU]
    with pytest.raises(InvalidArgument, match=r"device must be auto or one of .*cpu"):
        pick_provider(choice, present, works)


def test_a_device_that_does_not_work_is_refused_where_it_was_asked_for() -> None:
    with pytest.raises(InvalidArgument, match=r"one that works on this host.*got 'cuda'"):
        pick_provider("cuda", ["CUDAExecutionProvider", CPU], broken)


def test_a_session_that_fell_back_to_the_cpu_is_none_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = PROVIDERS["cuda"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [cuda, CPU])
    for got, works_there in (([CPU], False), ([cuda, CPU], True)):
        session = SimpleNamespace(get_providers=lambda got=got: got)
        monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, session=session, **__: session)
        assert usable("cuda") == works_there
    assert usable("cpu")
    assert not usable("rocm")  # the build hasn't it


@pytest.mark.parametrize("choice", ["gpu.7", "cuda", ""])
def test_a_device_that_openvino_has_not_is_refused_with_those_it_has(choice: str) -> None:
    with pytest.raises(InvalidArgument, match=r"device must be auto or one of cpu, gpu\.0"):
        pick_device(choice, ["CPU", "GPU.0"])
    assert pick_device("gpu.0", ["CPU", "GPU.0"]) == "GPU.0"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("content", [b"", b"no graph at all", b"\x08\x08\x12\x07pytorch:\x99\x99"])
def test_a_file_that_is_no_graph_is_named(engine: type[OnnxEngine], content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(FailedPrecondition, match=r"can't run model\.onnx: "):
        engine("cpu", 1).open(path)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_another_element_type_than_graphs_are_made_in_is_refused(backend: str, models: Path) -> None:
    for table, config in ((vae.BACKENDS, VaeConfig), (diffusion.BACKENDS, DiffusionConfig)):
        with pytest.raises(InvalidArgument, match=f"dtype must be float32 for backend {backend}, got 'float16'"):
            open_backend(table, backend, config, models, dtype="float16")
