"""The store on a thread of its own: SQLite waits for the disk, which the event loop must not."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from imagemesh_gateway.jobs.store import Store

T = TypeVar("T")


class StoreThread:
    """Calls the store, one call after another."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jobs-store")
        self._store: Store | None = None

    async def open(self, folder: Path) -> None:
        """Open the store in that folder; errors are ``Store``'s."""
        self._store = await asyncio.get_running_loop().run_in_executor(self._thread, Store, folder)

    async def __call__(self, work: Callable[[Store], T]) -> T:
        """What ``work`` makes of the store. Once begun it is done, also if its caller is cancelled meanwhile."""
        store = self._store
        if store is None:
            raise RuntimeError("the store of jobs is not open")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, store)

    async def close(self) -> None:
        """Let calls under way end, and close the store."""
        store, self._store = self._store, None
        if store is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, store.close)
        self._thread.shutdown()
