"""Bounds on what a client may ask for; the gateway and the services check the same ones."""

from typing import Final

from imagemesh_runtime.errors import InvalidArgument

MAX_PROMPT_CHARACTERS: Final = 10_000
MAX_STEPS: Final = 1000
MAX_SIDE: Final = 4096  # pixels
MAX_IMAGES: Final = 64  # pictures a request
MAX_CONTROLS: Final = 8
MAX_GUIDANCE: Final = 100.0
MAX_SEED: Final = 2**63 - 1
MAX_CONTROL_SCALE: Final = 10.0


def check_range(field: str, value: float, low: float, high: float) -> None:
    """Raise InvalidArgument unless low <= value <= high (NaN never is)."""
    if not low <= value <= high:
        raise InvalidArgument(field, value, f"{low} to {high}")


def check_size(field: str, pixels: int, multiple: int) -> None:
    """Raise InvalidArgument unless ``pixels`` is a possible side of a picture."""
    if pixels % multiple or not multiple <= pixels <= MAX_SIDE:
        raise InvalidArgument(field, pixels, f"a multiple of {multiple} from {multiple} to {MAX_SIDE}")


def check_prompt(field: str, text: str) -> None:
    """Raise InvalidArgument if the prompt is longer than anything a person writes."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        allowed = f"at most {MAX_PROMPT_CHARACTERS} characters"
        raise InvalidArgument(field, f"{len(text)} characters", allowed)
