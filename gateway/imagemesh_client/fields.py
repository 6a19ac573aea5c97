"""What a field of a request can hold; each check raises InvalidArgument with the field's name."""

import operator
from typing import Final, SupportsFloat, SupportsIndex

from imagemesh_runtime.errors import InvalidArgument

UINT32: Final = 2**32 - 1
UINT64: Final = 2**64 - 1


def whole(field: str, value: SupportsIndex, most: int, least: int = 0) -> int:
    """The value, if it is a whole number from ``least`` to ``most``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not least <= number <= most:
        raise InvalidArgument(field, value, f"a whole number from {least} to {most}")
    return number


def whole_or_absent(field: str, value: SupportsIndex | None) -> int:
    """The value for a field that takes 0 for absent: None is that, and a 0 that was given is refused."""
    return 0 if value is None else whole(field, value, UINT32, least=1)


def number(field: str, value: SupportsFloat) -> float:
    """The value as a float."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InvalidArgument(field, value, "a number") from None


def text(field: str, value: str) -> str:
    """The value, if it is a string that UTF-8 can hold."""
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError):
        raise InvalidArgument(field, value, "a string of valid Unicode") from None
    return value
