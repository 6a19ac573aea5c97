"""Bounds on what a client may ask for; the gateway and the services check the same ones."""

from collections.abc import Sequence
from typing import Final

from imagemesh_runtime.errors import InvalidArgument

MAX_PROMPT_CHARACTERS: Final = 10_000
# A prompt's windows; 32 of CLIP's hold 2,400 tokens.
MAX_WINDOWS: Final = 32
# Of a prompt's embeddings: 53 windows of 77.
MAX_TOKENS: Final = 4096
MAX_STEPS: Final = 1000
MAX_SIDE: Final = 4096  # pixels
MAX_IMAGES: Final = 64  # pictures a request
# All of a request's pictures together: 64 of 1024 x 1024, or 4 of 4096 x 4096.
MAX_REQUEST_PIXELS: Final = 1 << 26
MAX_CONTROLS: Final = 8
MAX_GUIDANCE: Final = 100.0
MAX_SEED: Final = 2**63 - 1
MAX_MASK_BLUR: Final = 256  # pixels
MAX_CONTROL_SCALE: Final = 10.0
MAX_REFERENCES: Final = 8  # pictures that IP-Adapters are told of
# Of such a picture's sides: its shorter one is enlarged to what the encoder sees, and the longer one with it.
MAX_PROPORTION: Final = 16
MAX_HIRES_SCALE: Final = 8.0
MAX_BLOCK_WEIGHTS: Final = 64
MAX_LABELS: Final = 1000  # that are told of a picture that was made
MAX_RETRIES: Final = 8  # of a picture that isn't kept
MAX_ID_CHARACTERS: Final = 512  # of a picture in an index
MAX_MATCHES: Final = 1000  # of a picture that is searched for
MAX_PAIRS: Final = 10_000  # near-duplicates of an answer
MAX_CLUSTERS: Final = 1000  # groups that an index's pictures are parted into
MAX_REMOVED: Final = 1000  # pictures that a call takes out of an index


def check_range(field: str, value: float, low: float, high: float) -> None:
    """Raise InvalidArgument unless low <= value <= high (NaN never is)."""
    if not low <= value <= high:
        raise InvalidArgument(field, value, f"{low} to {high}")


def check_interval(field: str, start: float, end: float) -> None:
    """Raise InvalidArgument unless both are parts of the whole, and the start comes before the end."""
    check_range(f"{field}.start", start, 0, 1)
    check_range(f"{field}.end", end, 0, 1)
    if start >= end:
        raise InvalidArgument(f"{field}.start", start, f"below end, {end}")


def check_block_weights(field: str, weights: Sequence[float]) -> None:
    """Raise InvalidArgument unless each is a possible weight of a ControlNet's single residual."""
    check_range(field, len(weights), 0, MAX_BLOCK_WEIGHTS)
    for i, weight in enumerate(weights):
        check_range(f"{field}[{i}]", weight, 0, MAX_CONTROL_SCALE)


def check_size(field: str, pixels: int, multiple: int) -> None:
    """Raise InvalidArgument unless ``pixels`` is a possible side of a picture."""
    if pixels % multiple or not multiple <= pixels <= MAX_SIDE:
        raise InvalidArgument(field, pixels, f"a multiple of {multiple} from {multiple} to {MAX_SIDE}")


def check_pixels(field: str, count: int, width: int, height: int) -> None:
    """Raise InvalidArgument if so many pictures of that size are more than a request may ask for."""
    if count * width * height > MAX_REQUEST_PIXELS:
        got = f"{count} x {width} x {height} = {count * width * height} pixels"
        raise InvalidArgument(field, got, f"at most {MAX_REQUEST_PIXELS} pixels in all")


def check_proportion(field: str, height: int, width: int) -> None:
    """Raise InvalidArgument if the longer side is too many times the shorter."""
    if max(height, width) > MAX_PROPORTION * min(height, width):
        allowed = f"a picture whose longer side is at most {MAX_PROPORTION} times the shorter"
        raise InvalidArgument(field, f"{width}x{height}", allowed)


def check_prompt(field: str, text: str) -> None:
    """Raise InvalidArgument if the prompt is longer than anything a person writes."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        allowed = f"at most {MAX_PROMPT_CHARACTERS} characters"
        raise InvalidArgument(field, f"{len(text)} characters", allowed)
