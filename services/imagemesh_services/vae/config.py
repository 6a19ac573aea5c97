"""Configuration of the VAE service."""

from dataclasses import dataclass
from typing import ClassVar

from imagemesh_runtime.config import ModelServerConfig


@dataclass(frozen=True)
class VaeConfig(ModelServerConfig):
    """See ``ModelServerConfig``; ``max_batch`` counts pictures."""

    SERVICE: ClassVar[str] = "vae"
    listen: str = "127.0.0.1:50053"
