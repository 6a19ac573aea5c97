"""A compute lane: the one thread that a device's work runs on.

Every service in a process that uses a device shares its lane, so that co-hosted services take turns and don't
oversubscribe the cores: math libraries keep one pool of threads for each thread that calls them.
"""

import asyncio
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import ParamSpec, TypeVar

from imagemesh_runtime.context import current_call

P = ParamSpec("P")
T = TypeVar("T")

_COMM = 15  # bytes that Linux keeps of a thread's name


class Lane:
    """Runs functions one after another on its own thread.

    The system knows that thread, and those that a math library starts for it, as ``lane-<name>`` (in ``top -H``), so
    that what computes can be told from what talks.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread: threading.Thread | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"lane-{name}", initializer=self._started)
        # When what runs began, by perf_counter; None: nothing runs.
        self.busy_since: float | None = None

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``function`` on the lane and charge the current call for the wait and the work.

        A caller that is cancelled stops waiting at once. What had not begun never does; what had runs to its end,
        its result dropped.
        """
        call = current_call()
        submitted = perf_counter()

        def work() -> T:
            begun = self.busy_since = perf_counter()
            call.queue_seconds += begun - submitted
            try:
                return function(*args, **kwargs)
            finally:
                self.busy_since = None
                call.compute_seconds += perf_counter() - begun

        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def post(self, function: Callable[[], None]) -> None:
        """Run ``function``, which must not raise, after what the lane has; from any thread, the lane's own too.

        Raises:
            RuntimeError: the lane is closed.
        """

        def work() -> None:
            self.busy_since = perf_counter()
            try:
                function()
            finally:
                self.busy_since = None

        self._pool.submit(work)

    def close(self, seconds: float | None = None) -> bool:
        """Let the work under way end, for so long at most, and drop what waits; answers whether it ended."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def stack(self) -> list[traceback.FrameSummary]:
        """The calls that its thread is in, the innermost last; none once it has ended."""
        frame = sys._current_frames().get(self._thread.ident or 0) if self._thread is not None else None
        return list(traceback.extract_stack(frame)) if frame is not None else []

    def _started(self) -> None:
        self._thread = threading.current_thread()
        _name_thread(f"lane-{self.name}")


def _name_thread(name: str) -> None:
    """Give this thread a name that the system shows, where that is Linux, and that threads started by it inherit."""
    with suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name[:_COMM])
