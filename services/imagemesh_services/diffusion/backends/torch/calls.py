"""What a diffusers block says to the model in a step: taken down, merged with what others say, and answered.

A denoiser block calls the model once for each of the guider's passes and then guides. Run with a stand-in that only
listens, it says what it would have asked; run again with one that has the answers, it does all the rest. So the
library's block stays what decides, and its passes share a forward with other requests'.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch.nn.functional import pad

# One call of the model: its keyword arguments.
Call = Mapping[str, Any]


@dataclass(frozen=True)
class CallForm:
    """How a model takes rows. Tensors have a row first; so have lists.

    Attributes:
        sample: the argument whose rows are predicted for.
        shared: arguments that are no rows but hold for all of them.
        ragged: arguments whose second dimension, the tokens, may differ from row to row. Tensors are padded with zeros,
            which a mask among them tells from tokens; lists are taken as they are.
    """

    sample: str
    shared: frozenset[str] = frozenset()
    ragged: frozenset[str] = frozenset()


def record(block: Any, components: SimpleNamespace, state: Any, form: CallForm, i: int, t: torch.Tensor) -> list[Call]:
    """The calls of the model that the denoiser ``block`` makes at this step, the guider's passes in its order."""
    listener = _Listener(components.transformer, form.sample)
    stage = SimpleNamespace(**{**vars(components), "transformer": listener, "guider": _Mute(components.guider)})
    with suppress(_AllSaid):
        block(stage, state, i=i, t=t)
    return listener.calls


def answer(
    block: Any, components: SimpleNamespace, state: Any, predictions: Sequence[Any], i: int, t: torch.Tensor
) -> None:
    """Run the denoiser ``block`` with the model's predictions for the calls that ``record`` took down."""
    speaker = _Speaker(components.transformer, iter(predictions))
    block(SimpleNamespace(**{**vars(components), "transformer": speaker}), state, i=i, t=t)


def key_of(call: Call, form: CallForm) -> Hashable:
    """Equal for calls that can be one: names, element types and shapes of a row, and what isn't rows."""
    return tuple((name, _kind(name, value, form)) for name, value in sorted(call.items()))


def rows_of(call: Call, form: CallForm) -> int:
    """How many rows the call is of."""
    return len(call[form.sample])


def merge(calls: Sequence[Call], form: CallForm) -> dict[str, Any]:
    """One call of all rows, of calls whose keys are equal."""
    merged: dict[str, Any] = {}
    for name, first in calls[0].items():
        values = [call[name] for call in calls]
        if name in form.shared or not isinstance(first, torch.Tensor | list):
            merged[name] = first
        elif isinstance(first, list):
            merged[name] = [row for value in values for row in value]
        else:
            # A timestep may be said once for all rows of a call.
            wide = [
                value.expand(rows_of(call, form), *value.shape[1:]) for call, value in zip(calls, values, strict=True)
            ]
            merged[name] = torch.cat(_padded(wide) if name in form.ragged else wide)
    return merged


def part(call: Call, rows: slice, form: CallForm) -> dict[str, Any]:
    """Some of the call's rows."""
    return {
        name: value[rows] if isinstance(value, torch.Tensor | list) and name not in form.shared else value
        for name, value in call.items()
    }


def _padded(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    most = max(one.shape[1] for one in tensors)
    return [pad(one, (0, 0) * (one.dim() - 2) + (0, most - one.shape[1])) for one in tensors]


def _kind(name: str, value: Any, form: CallForm) -> Hashable:
    if isinstance(value, list) and name not in form.shared:
        rows = (row[None] if isinstance(row, torch.Tensor) else repr(row) for row in value)
        return tuple(sorted({_kind(name, row, form) for row in rows}, key=repr))
    if isinstance(value, torch.Tensor):
        shape = value.shape if name in form.shared else value.shape[2 if name in form.ragged else 1 :]
        return (tuple(shape), value.dtype)
    return repr(value)


class _AllSaid(Exception):
    """The block has made its calls and would guide now."""


class _Listener:
    """In the model's place; answers with what it was asked about, which is of a prediction's form."""

    def __init__(self, model: Any, sample: str) -> None:
        self.forward, self.config, self.dtype = model.forward, model.config, model.dtype
        self.calls: list[Call] = []
        self._sample = sample

    def __call__(self, **call: Any) -> tuple[Any]:
        self.calls.append(call)
        return (call[self._sample],)


class _Speaker:
    """In the model's place; answers what it was given, call by call."""

    def __init__(self, model: Any, predictions: Iterator[Any]) -> None:
        self.forward, self.config, self.dtype = model.forward, model.config, model.dtype
        self._predictions = predictions

    def __call__(self, **call: Any) -> tuple[Any]:
        return (next(self._predictions),)


class _Mute:
    """A guider that prepares and does not guide, so that what it remembers is not disturbed."""

    def __init__(self, guider: Any) -> None:
        self._guider: Final = guider

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)

    def __call__(self, passes: Any) -> Any:
        raise _AllSaid
