"""Configuration of the ControlNet service."""

from dataclasses import dataclass
from typing import ClassVar

from imagemesh_runtime.config import ModelServerConfig


@dataclass(frozen=True)
class ControlNetConfig(ModelServerConfig):
    """See ``ModelServerConfig``; ``max_queue`` bounds the open sessions, and the pictures to preprocess."""

    SERVICE: ClassVar[str] = "controlnet"
    listen: str = "127.0.0.1:50054"
    # Pictures that preprocessors are at work on at a time.
    max_preprocessing: int = 2
