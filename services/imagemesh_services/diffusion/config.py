"""Configuration of the diffusion service."""

from dataclasses import dataclass
from typing import ClassVar

from imagemesh_runtime.config import ModelServerConfig


@dataclass(frozen=True)
class DiffusionConfig(ModelServerConfig):
    """See ``ModelServerConfig``."""

    SERVICE: ClassVar[str] = "diffusion"
    listen: str = "127.0.0.1:50052"
    max_queue: int = 32
    # Most rows of all running generations together, whatever was measured; with guidance a picture has two.
    max_batch: int = 32
    # Where `imagemesh tune` keeps what it measured; empty: in a file of the user's state.
    knees_file: str = ""
    # Where the ControlNet service is, or several, joined by commas; dns:///host:port is one at every address of that
    # name; empty: requests with control units are refused.
    controlnet: str = ""
    # The device is taken to hang when a tick takes longer than so many seconds and so many times what such ticks were
    # measured to take; 0 seconds: never.
    hang_seconds: float = 60.0
    hang_factor: float = 20.0
    # How long one step may wait for a ControlNet's residuals.
    control_timeout_seconds: float = 60.0
    # How long a forward that has begun may; then it is done without the rows that wait.
    control_wait_seconds: float = 0.5
