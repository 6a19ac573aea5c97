"""One evaluation of several runs, of which one's fault is its own."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

# Parts of a forward with the places of their runs, and what became of each: its prediction, or what went wrong.
Begun = Sequence[tuple[int, Any]]
Predict = Callable[[Begun], Iterable[tuple[int, Any]]]


def advance_together(runs: Sequence[Any], predict: Predict) -> list[Exception | None]:
    """Begin each run's step, predict for all that began, and finish each; answers what went wrong, a run each."""
    faults: list[Exception | None] = [None] * len(runs)
    begun: list[tuple[int, Any]] = []
    for i, run in enumerate(runs):
        try:
            begun.append((i, run.begin_step()))
        except Exception as error:
            faults[i] = error
    for i, prediction in predict(begun):
        try:
            if isinstance(prediction, Exception):
                raise prediction
            cast(Any, runs[i]).finish_step(prediction)
        except Exception as error:
            faults[i] = error
    return faults
