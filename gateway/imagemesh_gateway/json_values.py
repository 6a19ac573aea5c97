"""JSON values that requests carry as text, such as a scheduler's options."""

import json
from collections.abc import Mapping
from typing import Any, Final

from imagemesh_runtime.errors import InvalidArgument

# Of one request's options, and characters of a value: several times what the largest of them takes.
MAX_VALUES: Final = 100
MAX_CHARACTERS: Final = 10_000


def check_values(field: str, values: Mapping[str, str]) -> None:
    """Check that each is JSON without NaN and infinity; which options there are, the services know.

    Raises:
        InvalidArgument: one is not, is too long, or there are too many.
    """
    if len(values) > MAX_VALUES:
        raise InvalidArgument(field, f"{len(values)} values", f"at most {MAX_VALUES}")
    for name, text in values.items():
        try:
            if len(text) > MAX_CHARACTERS:
                raise ValueError("too long")
            _parsed(text)
        except (ValueError, RecursionError) as error:
            allowed = f"JSON of at most {MAX_CHARACTERS} characters, with finite numbers"
            raise InvalidArgument(f"{field}[{name[:40]!r}]", text, allowed) from error


def shown(values: Mapping[str, str]) -> dict[str, Any]:
    """The values as JSON has them; one that is none, as jobs of old may have, as its text."""
    return {name: _shown(text) for name, text in values.items()}


def _shown(text: str) -> Any:
    try:
        return _parsed(text)
    except (ValueError, RecursionError):
        return text


def _parsed(text: str) -> Any:
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # as answers will: no half of a surrogate pair
    return value
