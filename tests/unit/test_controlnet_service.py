"""Annotators beside ControlNets of another engine."""

import pytest

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.registry import BackendEntry
from imagemesh_services.controlnet import service
from imagemesh_services.controlnet.config import ControlNetConfig


class Annotators:
    """Has two devices."""

    def __init__(self, config: ControlNetConfig) -> None:
        if config.device not in ("auto", "cuda:1"):
            raise InvalidArgument("device", config.device, "auto or cuda:1")
        self.device = config.device


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.preprocessors, "BACKENDS", {"torch": BackendEntry(f"{__name__}:Annotators")})


@pytest.mark.parametrize(("device", "taken"), [("cuda:1", "cuda:1"), ("auto", "auto"), ("gpu.0", "auto")])
def test_annotators_take_the_configured_device_unless_it_is_the_engines_alone(device: str, taken: str) -> None:
    for backend in ("onnxruntime", "openvino", "auto"):
        assert service._annotators(ControlNetConfig(backend=backend, device=device)).device == taken


def test_a_device_that_the_annotators_own_backend_has_not_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"gpu\.0"):
        service._annotators(ControlNetConfig(backend="torch", device="gpu.0"))
