"""How long work takes that no sampler has been handed yet, from how long such work took.

Samplers tell of what they hold. What waits in the gateway's store they don't know of, so the gateway tells of it, in
the same seconds: those of a device.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from imagemesh_gateway.plan import Plan

_WINDOW: Final = 32  # generations of a model that the next one's time is told from
_MODELS: Final = 64  # remembered


def amount(plan: "Plan") -> float:
    """How much there is to sample: megapixels times rows times evaluations, in all passes."""
    rows = len(plan.seeds) * (2 if plan.guided else 1)
    strength = 1.0 if plan.image is None else plan.image.strength
    passes = [(plan.width * plan.height, plan.steps * strength)]
    if plan.hires is not None:
        passes.append((plan.hires.width * plan.hires.height, plan.hires.steps * plan.hires.strength))
    return sum(pixels / 1e6 * rows * max(steps, 1.0) for pixels, steps in passes)


class Costs:
    """What was measured of each model: seconds of a device for an amount of 1."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, deque[float]] = OrderedDict()

    def note(self, model: str, amount: float, seconds: float) -> None:
        """So much was sampled, and took so long of a device; 0: nobody has counted."""
        if seconds <= 0:
            return
        self._models.setdefault(model, deque(maxlen=_WINDOW)).append(seconds / amount)
        self._models.move_to_end(model)
        if len(self._models) > _MODELS:
            self._models.popitem(last=False)

    def seconds(self, work: Iterable[tuple[str, float]]) -> float:
        """What the amounts of these models will take; a model that never ran counts as the others do.

        0 until something was measured.
        """
        known = {model: median(times) for model, times in self._models.items()}
        other = median(known.values()) if known else 0.0
        return sum(amount * known.get(model, other) for model, amount in work)
