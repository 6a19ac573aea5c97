"""Configuration of the ControlNet service."""

from dataclasses import dataclass
from typing import ClassVar

from imagemesh_runtime.config import ModelServerConfig


@dataclass(frozen=True)
class ControlNetConfig(ModelServerConfig):
    """See ``ModelServerConfig``; ``max_queue`` bounds the open sessions."""

    SERVICE: ClassVar[str] = "controlnet"
    listen: str = "127.0.0.1:50054"
