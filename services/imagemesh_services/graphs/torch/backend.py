"""What the backends that run graphs share: torch's backend of the service, with an engine for the forwards."""

import dataclasses
from typing import ClassVar

from imagemesh_runtime.config import ModelServerConfig
from imagemesh_services.graphs.engine import Engine
from imagemesh_services.graphs.torch.compiler import open_compiler
from imagemesh_services.torch_support import TorchBackend


class GraphBackend(TorchBackend):
    """Stands before a service's torch backend among the bases: torch computes on the CPU, and the engine on its device.

    Raises:
        InvalidArgument: the engine has no such device, or graphs aren't made in that element type.
    """

    engine: ClassVar[type[Engine]]

    def __init__(self, config: ModelServerConfig) -> None:
        self._compiler = open_compiler(self.name, self.engine, config)
        super().__init__(dataclasses.replace(config, device="cpu"))
        self.device = self._compiler.engine.device

    def _marks(self) -> tuple[object, ...]:
        return (*super()._marks(), self._compiler.engine.version, self.device)
