"""Residuals on their way: put together on the event loop, waited for on the lane."""

import threading
from collections.abc import Sequence
from time import perf_counter

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

    Attributes:
        patience: for whoever reads; without any, what isn't there yet is late.
        stalled: seconds that readers have waited.
    """

    def __init__(self) -> None:
        self.patience = Patience(0.0)
        self.stalled = 0.0
        self._whole: Residuals | None = None
        self._over = threading.Event()

    def complete(self, residuals: Residuals) -> None:
        """All are there."""
        self._whole = residuals
        self._over.set()

    def give_up(self) -> None:
        """No more will come; whoever waits is told now."""
        self._over.set()

    @property
    def there(self) -> bool:
        """Whether reading takes no wait."""
        return self._whole is not None

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
        if self._whole is None:
            raise Late
        return self._whole
