"""What the values of options may be; each function's complaint says what is allowed, and argparse which option it is.

Nothing heavy is imported here. Bounds that only the mesh knows are left to it.
"""

import json
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from math import isfinite
from pathlib import Path

from imagemesh_runtime.addresses import WANTED, is_address

SERVER_VARIABLE = "IMAGEMESH_SERVER"
_PICTURES = ("", ".png", ".jpg", ".jpeg", ".webp")


class FromEnvironment(str):
    """A default that the environment gave: a complaint about it names the variable."""


def _refuse(allowed: str, text: str, name: str = "") -> ArgumentTypeError:
    return ArgumentTypeError(f"{name + ' ' if name else ''}must be {allowed}, got {text!r}")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type of whole numbers from ``low``, to ``high`` if that is given."""
    allowed = f"a whole number from {low}" if high is None else f"a whole number from {low} to {high}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _refuse(allowed, text) from None
        if value < low or (high is not None and value > high):
            raise _refuse(allowed, text)
        return value

    return convert


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        raise _refuse("a number", text) from None
    if not isfinite(value):
        raise _refuse("a finite number", text)
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    if (value := number(text)) <= 0:
        raise _refuse("a number above 0", text)
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= (value := number(text)) <= 1:
        raise _refuse("a number from 0 to 1", text)
    return value


def split(text: str) -> float:
    """A number above 0 and below 1."""
    if not 0 < (value := number(text)) < 1:
        raise _refuse("a number above 0 and below 1", text)
    return value


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise _refuse("WIDTHxHEIGHT in pixels, each at least 1, such as 512x512", text)
    return int(width), int(height)


def scale_or_size(text: str) -> float | tuple[int, int]:
    """How many times as large, or how large."""
    if "x" in text.lower():
        return size(text)
    try:
        return positive(text)
    except ArgumentTypeError:
        raise _refuse("a factor above 1 such as 1.5, or WIDTHxHEIGHT such as 512x512", text) from None


def option(text: str) -> tuple[str, bool | float | str]:
    """A name, and its value as JSON or as the word that it is."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise _refuse("NAME=VALUE", text)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def setting(text: str) -> tuple[str, str]:
    """A field of a configuration and its value."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise _refuse("NAME=VALUE", text)
    return name.replace("-", "_"), value


def file(text: str) -> Path:
    """A file that is there."""
    path = Path(text)
    if path.is_dir():
        raise ArgumentTypeError(f"a file is wanted, and this is a folder: {text}")
    if not path.is_file():
        raise ArgumentTypeError(f"no such file: {text}")
    return path


def file_or_folder(text: str) -> Path:
    """A file or a folder that is there."""
    if not Path(text).exists():
        raise ArgumentTypeError(f"no such file or folder: {text}")
    return Path(text)


def folder(text: str) -> Path:
    """A folder that is there."""
    if not Path(text).is_dir():
        raise ArgumentTypeError(f"no such folder: {text}")
    return Path(text)


def folders(text: str) -> str:
    """Folders that are there, joined as in PATH."""
    parts = [part for part in text.split(os.pathsep) if part]
    if not parts:
        raise _refuse(f"one folder, or several joined by {os.pathsep!r}", text)
    for part in parts:
        if not Path(part).expanduser().is_dir():
            raise ArgumentTypeError(f"no such folder: {part}")
    return text


def folder_to_make(text: str) -> Path:
    """A folder that is there or can be made."""
    if Path(text).exists() and not Path(text).is_dir():
        raise ArgumentTypeError(f"a folder is wanted, and this is a file: {text}")
    return Path(text)


def file_to_write(text: str) -> Path:
    """A file in a folder that is there."""
    path = Path(text)
    if path.is_dir():
        raise ArgumentTypeError(f"a file is wanted, and this is a folder: {text}")
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"no such folder: {path.parent}")
    return path


def picture_to_write(text: str) -> Path:
    """A file to write a picture to, of a suffix that is known."""
    path = file_to_write(text)
    if path.suffix.lower() not in _PICTURES:
        raise _refuse(f"a file name that ends in {', '.join(_PICTURES[1:])}", text)
    return path


def address(text: str) -> str:
    """A gateway's address."""
    if not is_address(text):
        raise _refuse(WANTED, str(text), SERVER_VARIABLE if isinstance(text, FromEnvironment) else "")
    return str(text)


port = whole(0, 65535)


def preprocessor(text: str) -> tuple[str, dict[str, bool | float | str]]:
    """A name, and after a colon its parameters."""
    name, colon, parameters = text.partition(":")
    return name, dict(option(one) for one in parameters.split(",")) if colon else {}
