"""An event loop on a thread, for those who have none."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, aclosing
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop on a thread of its own, with the client that lives there."""

    def __init__(self, client: AbstractAsyncContextManager[Any]) -> None:
        self._client = client
        self._stopping = asyncio.Event()
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="imagemesh-client", daemon=True)
        self._thread.start()
        self._loop = self._started.result()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for the coroutine; an interrupted wait cancels it."""
        future = self._submit(coroutine)
        try:
            return future.result()
        finally:
            future.cancel()

    def iterate(self, source: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """The items of ``source``, which is left when this generator is."""
        items: SimpleQueue[T | None] = SimpleQueue()

        async def pump() -> None:
            async with aclosing(source):
                async for item in source:
                    items.put(item)

        future = self._submit(pump())
        future.add_done_callback(lambda _: items.put(None))
        try:
            while (item := items.get()) is not None:
                yield item
            future.result()
        finally:
            future.cancel()

    def stop(self) -> None:
        """Close the client, cancel what still runs, end the thread."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        if not self._thread.is_alive():
            coroutine.close()
            raise RuntimeError("this client is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _live(self) -> None:
        async with self._client:
            self._started.set_result(asyncio.get_running_loop())
            await self._stopping.wait()
