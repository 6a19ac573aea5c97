"""Configuration of the VAE service."""

from dataclasses import dataclass
from typing import ClassVar

from imagemesh_runtime.config import ModelServerConfig


@dataclass(frozen=True)
class VaeConfig(ModelServerConfig):
    """See ``ModelServerConfig``; ``max_batch`` counts pictures.

    ``tiled`` and ``sliced`` spend less memory on every picture: overlapping tiles, which are blended and so not quite
    the picture that one pass gives, or one picture after another. A request can ask for either by itself.
    """

    SERVICE: ClassVar[str] = "vae"
    listen: str = "127.0.0.1:50053"
    tiled: bool = False
    sliced: bool = False
