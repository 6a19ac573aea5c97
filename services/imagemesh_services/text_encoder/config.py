"""Configuration of the text encoder service."""

from dataclasses import dataclass
from typing import ClassVar

from imagemesh_runtime.config import ModelServerConfig


@dataclass(frozen=True)
class TextEncoderConfig(ModelServerConfig):
    """See ``ModelServerConfig``; ``max_batch`` counts windows of tokens."""

    SERVICE: ClassVar[str] = "text-encoder"
    listen: str = "127.0.0.1:50051"
    max_batch: int = 32
