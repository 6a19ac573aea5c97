"""Kinds of pictures that one ControlNet follows: those of ControlNet-union."""

from collections.abc import Mapping
from typing import Final

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.preprocessing import folded

# The order of xinsir's controlnet-union-sdxl-1.0, and of its ProMax, which has all of them; the others' is by number.
NAMES: Final = ("openpose", "depth", "softedge", "canny", "normal", "segmentation", "tile", "repaint")
_NAMED_COUNTS: Final = (6, 8)
_ALIASES: Final[Mapping[str, int]] = {"hed": 2, "pidinet": 2, "scribble": 2, "lineart": 3, "mlsd": 3, "segment": 5}


def find_control_type(field: str, given: str, count: int) -> int | None:
    """The number of the kind that ``given`` names, for a model that has so many; None for one that has none.

    Raises:
        InvalidArgument: the model has no such kind, or has kinds and none is named.
    """
    if not count:
        if given:
            raise InvalidArgument(field, given, "empty: the ControlNet follows pictures of one kind")
        return None
    names = NAMES[:count] if count in _NAMED_COUNTS else ()
    known = {name: number for number, name in enumerate(names)}
    known |= {alias: number for alias, number in _ALIASES.items() if names}
    known |= {str(number): number for number in range(count)}
    if folded(given) not in known:
        raise InvalidArgument(field, given, allowed(count))
    return known[folded(given)]


def check_control_type(field: str, given: int | None, count: int) -> None:
    """Raise InvalidArgument unless it is the number of one of so many kinds, or None where there are none."""
    if count and (given is None or given >= count):
        raise InvalidArgument(field, given, f"0 to {count - 1}: the kind of picture")
    if not count and given is not None:
        raise InvalidArgument(field, given, "absent: the ControlNet follows pictures of one kind")


def allowed(count: int) -> str:
    """What ``find_control_type`` takes, in words."""
    numbers = f"0 to {count - 1}"
    return f"{', '.join(NAMES[:count])}, or {numbers}" if count in _NAMED_COUNTS else numbers
