"""Configuration of the text encoder service."""

from dataclasses import dataclass
from typing import ClassVar

from imagemesh_runtime.config import MIB, ModelServerConfig


@dataclass(frozen=True)
class TextEncoderConfig(ModelServerConfig):
    """See ``ModelServerConfig``; ``max_batch`` counts windows of tokens."""

    SERVICE: ClassVar[str] = "text-encoder"
    listen: str = "127.0.0.1:50051"
    max_batch: int = 32
    # Room for embeddings that are kept for the next who asks for them; 0: none are.
    cache_bytes: int = 64 * MIB
