"""The ControlNets of one generation, summed where they are computed: three cost the wire what one does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imagemesh_runtime.control_types import check_control_type
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.tensors import Array
from imagemesh_services.controlnet.backend import ControlInputs, ControlModel, ControlRun, Emit, Part, whole

Plus = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Unit:
    """A ControlNet and what it follows; ``guess``: it is asked about the prompt's rows alone."""

    model: ControlModel
    image: Array  # uint8 [height, width, 3], RGB
    scale: float
    guess: bool = False
    block_weights: Sequence[float] = ()
    control_type: int | None = None

    @property
    def prompt_rows_only(self) -> bool:
        """Whether its residuals have no row for the negative prompt's."""
        return self.guess or self.model.prompt_rows_only


class Session:
    """The units at work. Every method is called on the lane.

    Args:
        embeddings: float [rows, tokens, width], the negative prompt's ``negative_rows`` first.
        added: what some families add to them, each float [rows, width].

    Raises:
        InvalidArgument: a unit doesn't fit them.
    """

    def __init__(
        self, units: Sequence[Unit], embeddings: Array, added: Mapping[str, Array], negative_rows: int
    ) -> None:
        self.embeddings, self.added = embeddings, added
        self._negative = negative_rows
        self._units = units
        self._runs = [self._start(i, unit) for i, unit in enumerate(units)]

    def _start(self, index: int, unit: Unit) -> ControlRun:
        skipped = self._skipped(unit)
        added = {name: rows[skipped:] for name, rows in self.added.items()}
        inputs = ControlInputs(
            unit.image, self.embeddings[skipped:], unit.scale, added, unit.guess, unit.block_weights, unit.control_type
        )
        weights, count = len(unit.block_weights), unit.model.count
        if weights not in (0, count):
            allowed = f"none, or {count}: one for each residual of the model, the middle one's last"
            raise InvalidArgument(f"start.units[{index}].block_weights", f"{weights} weights", allowed)
        check_control_type(f"start.units[{index}].control_type", unit.control_type, unit.model.control_types)
        return unit.model.start(inputs)

    def _skipped(self, unit: Unit) -> int:
        """Rows at the front that the unit isn't asked about."""
        return self._negative if unit.prompt_rows_only else 0

    def tell(self, embeddings: Array, added: Mapping[str, Array]) -> None:
        """The prompts changed: what takes the place of those of the start, of the same shapes."""
        self.embeddings, self.added = embeddings, added
        for unit, run in zip(self._units, self._runs, strict=True):
            skipped = self._skipped(unit)
            run.tell(embeddings[skipped:], {name: rows[skipped:] for name, rows in added.items()})

    def residuals(self, sample: Array, timestep: float, places: Sequence[int], emit: Emit) -> None:
        """The residuals of the units at ``places``, added up in this order, as diffusers' MultiControlNetModel does.

        All but the last unit's are complete before its blocks leave one by one, after an empty part that tells of its
        beginning. If all of these units are asked about the prompt's rows alone, the residuals have those alone.

        Raises:
            InvalidArgument: the rows don't fit the pictures or the embeddings, or the units one another.
        """
        # A step without guidance has no negative rows; the backend says so if it has not even the prompt's.
        negative = max(self._negative - (len(self.embeddings) - len(sample)), 0)
        units = [self._units[place] for place in places]
        skips = [negative if unit.prompt_rows_only else 0 for unit in units]
        wanted = len(sample) - min(skips)
        so_far: list[Array] = []
        for place, skipped in zip(places[:-1], skips[:-1], strict=True):
            part = whole(self._runs[place], sample[skipped:], timestep)
            assert part.mid is not None
            filled = [_filled(one, wanted) for one in (*part.down, part.mid)]
            so_far = _sum(self._units[place].model.plus, so_far, filled, place)
        last = _Adding(so_far, units[-1].model.plus, wanted, places[-1], emit) if so_far else emit
        emit(Part([]))
        self._runs[places[-1]].residuals(sample[skips[-1] :], timestep, last)


class _Adding:
    """Adds each part of the last unit to what the others came to."""

    def __init__(self, so_far: Sequence[Array], plus: Plus, rows: int, place: int, emit: Emit) -> None:
        self._plus, self._so_far, self._rows, self._place, self._emit = plus, so_far, rows, place, emit
        self._at = 0

    def __call__(self, part: Part) -> None:
        down = [self._add(one) for one in part.down]
        mid = None if part.mid is None else self._add(part.mid)
        if mid is not None and self._at < len(self._so_far):
            raise _misfit(self._place, f"{self._at} residuals", str(len(self._so_far)))
        self._emit(Part(down, mid))

    def _add(self, mine: Array) -> Array:
        mine = _filled(mine, self._rows)
        if not self._so_far:
            return mine
        if self._at >= len(self._so_far):
            raise _misfit(self._place, f"more than {self._at} residuals", str(self._at))
        self._at += 1
        return _sum(self._plus, [self._so_far[self._at - 1]], [mine], self._place)[0]


def _filled(rows: Array, wanted: int) -> Array:
    """The rows, after zeros for those that the unit wasn't asked about."""
    if len(rows) == wanted:
        return rows
    return np.concatenate([np.zeros((wanted - len(rows), *rows.shape[1:]), rows.dtype), rows])


def _sum(plus: Plus, so_far: Sequence[Array], more: Sequence[Array], place: int) -> list[Array]:
    if not so_far:
        return list(more)
    if len(so_far) != len(more):
        raise _misfit(place, f"{len(more)} residuals", str(len(so_far)))
    try:
        return [plus(one, other) for one, other in zip(so_far, more, strict=True)]
    except ValueError as error:
        shapes = [list(one.shape[1:]) for one in more]
        raise _misfit(place, f"residuals of {shapes}", str([list(one.shape[1:]) for one in so_far])) from error


def _misfit(place: int, got: str, wanted: str) -> InvalidArgument:
    allowed = f"a ControlNet whose residuals can be added to the units' before it: {wanted}"
    return InvalidArgument(f"start.units[{place}].model", got, allowed)
