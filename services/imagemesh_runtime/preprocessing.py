"""What a client may ask of a preprocessor; the gateway and the ControlNet service check it alike."""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Final

from imagemesh.v1 import preprocess_service_pb2 as pb
from imagemesh_runtime.errors import InvalidArgument, NotFound
from imagemesh_runtime.limits import MAX_SIDE, check_range

Value = bool | int | float | str
MIN_RESOLUTION: Final = 16
_MAX_JSON: Final = 200  # characters of a value
_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "string": (str,),
}


def folded(name: str) -> str:
    """The name as it is compared: case does not count, and what stands between words is one underscore."""
    return re.sub(r"[\s_-]+", "_", name[:_MAX_JSON].strip().casefold())


def find_preprocessor(infos: Iterable[pb.PreprocessorInfo], name: str) -> pb.PreprocessorInfo:
    """The preprocessor of that name or alias.

    Raises:
        NotFound: there is none; the error lists what there is.
    """
    named: dict[str, pb.PreprocessorInfo] = {}
    infos = list(infos)
    for info in infos:
        named |= {folded(one): info for one in (*info.aliases, info.name)}
    if folded(name) not in named:
        raise NotFound("preprocessor", name, [info.name for info in infos])
    return named[folded(name)]


def find_model(info: pb.PreprocessorInfo, name: str, field: str) -> str:
    """The model of that name for the preprocessor, or its first one for ""; "" where it needs none.

    Raises:
        NotFound: the repository has no such model, or none at all that the preprocessor could use.
        InvalidArgument: one is named where none is needed.
    """
    if not info.needs_model:
        if name:
            raise InvalidArgument(field, name, f"empty for preprocessor {info.name}, which needs none")
        return ""
    if not info.models or (name and name not in info.models):
        raise NotFound(f"model for preprocessor {info.name}", name or "any", info.models)
    return name or info.models[0]


def check_resolution(field: str, pixels: int) -> None:
    """Raise InvalidArgument unless a picture's shorter side may be brought to so many pixels; 0 is none."""
    if pixels:
        check_range(field, pixels, MIN_RESOLUTION, MAX_SIDE)


def check_parameters(info: pb.PreprocessorInfo, given: Mapping[str, str], field: str) -> dict[str, Value]:
    """The preprocessor's parameters with their values, or their defaults where ``given`` (JSON by name) has none.

    Raises:
        InvalidArgument: one that it doesn't have, or a value that isn't allowed.
    """
    known = {parameter.name: parameter for parameter in info.parameters}
    for name in sorted(given):
        if name not in known:
            allowed = f"a map of {', '.join(known) or 'nothing'} for preprocessor {info.name}"
            raise InvalidArgument(field, name, allowed)
    values: dict[str, Value] = {}
    for name, parameter in known.items():
        text = given.get(name, parameter.default_value)
        values[name] = _value(parameter, text, f"{field}[{name!r}]")
    return values


def _value(parameter: pb.PreprocessorParameter, text: str, field: str) -> Value:
    value: Any = None
    with suppress(ValueError, RecursionError):
        value = json.loads(text) if len(text) <= _MAX_JSON else None
    kinds = _KINDS[parameter.type]
    fits = isinstance(value, kinds) and isinstance(value, bool) == (bool in kinds)
    if fits and parameter.choices:
        fits = value in parameter.choices
    if fits and parameter.HasField("minimum"):
        fits = parameter.minimum <= value <= parameter.maximum
    if not fits:
        raise InvalidArgument(field, text, _allowed(parameter))
    found: Value = value
    return found


def _allowed(parameter: pb.PreprocessorParameter) -> str:
    if parameter.choices:
        return f"one of {', '.join(map(json.dumps, parameter.choices))}"
    if parameter.type == "boolean":
        return "true or false"
    kind = "a whole number" if parameter.type == "integer" else "a number"
    return f"{kind} from {parameter.minimum:g} to {parameter.maximum:g}"
