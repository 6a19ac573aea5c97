"""Residuals on their way: put together on the event loop, waited for on the lane."""

import threading
from collections.abc import Callable, Sequence
from functools import reduce
from time import perf_counter

import numpy as np

from imagemesh_runtime.tensors import Array
from imagemesh_services.diffusion.backend import Late, Residuals


class Patience:
    """How long the residuals of one forward may be waited for, all of its rows together."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: float | None = None

    def left(self) -> float:
        """Seconds from now; the first who asks sets the clock going."""
        now = perf_counter()
        if self._until is None:
            self._until = now + self._seconds
        return max(self._until - now, 0.0)


class Incoming:
    """One evaluation's residuals, complete sooner or later; a ``Steering``.

    Args:
        plus: how those of several services are added; called by whoever reads first, which is the lane: it has the
            threads for it, and nothing else to do meanwhile.

    Attributes:
        patience: for whoever reads; without any, what isn't there yet is late.
        stalled: seconds that readers have waited.
    """

    def __init__(self, plus: Callable[[Array, Array], Array] = np.add) -> None:
        self.patience = Patience(0.0)
        self.stalled = 0.0
        self._plus = plus
        self._parts: Sequence[Residuals] = ()
        self._adding = threading.Lock()
        self._over = threading.Event()

    def complete(self, *parts: Residuals) -> None:
        """All are there: to be added in this order, of one family's shapes."""
        self._parts = parts
        self._over.set()

    def give_up(self) -> None:
        """No more will come; whoever waits is told now."""
        self._over.set()

    @property
    def there(self) -> bool:
        """Whether reading takes no wait."""
        return bool(self._parts)

    @property
    def down(self) -> Sequence[Array]:
        return self._wait().down

    @property
    def mid(self) -> Array:
        return self._wait().mid

    def _wait(self) -> Residuals:
        if not self._over.is_set():
            begun = perf_counter()
            self._over.wait(self.patience.left())
            self.stalled += perf_counter() - begun
        if not self._parts:
            raise Late
        with self._adding:
            if len(self._parts) > 1:
                self._parts = (reduce(self._sum, self._parts),)
        return self._parts[0]

    def _sum(self, one: Residuals, other: Residuals) -> Residuals:
        """Both, row by row; those that lack the rows at the front add nothing there."""
        rows = max(len(one.mid), len(other.mid))
        pairs = zip([*one.down, one.mid], [*other.down, other.mid], strict=True)
        *down, mid = [self._plus(_filled(a, rows), _filled(b, rows)) for a, b in pairs]
        return Residuals(down, mid)


def _filled(given: Array, rows: int) -> Array:
    lacking = np.zeros((rows - len(given), *given.shape[1:]), given.dtype)
    return np.concatenate([lacking, given]) if len(lacking) else given
