"""The client for callers without an event loop: the async one, on a thread of its own."""

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable
from concurrent.futures import Future
from contextlib import aclosing, closing
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from imagemesh_client.aio import DEFAULT_ADDRESS, MAX_MESSAGE_BYTES, AsyncClient
from imagemesh_client.answers import Outcome
from imagemesh_client.images import ImageInput
from imagemesh_client.requests import GenerateOptions, PoolingName
from imagemesh_client.types import Classification, Event, Generation, Models, Progress
from imagemesh_runtime.errors import MeshError
from imagemesh_runtime.tensors import Array

T = TypeVar("T")


class Client:
    """A gateway at ``host:port`` or ``unix:/path``; methods, errors and options are those of ``AsyncClient``.

    It may be shared by threads. An interrupt (Ctrl-C) during a call cancels the call.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout: float = 600.0, max_message_bytes: int = MAX_MESSAGE_BYTES
    ) -> None:
        self._async = AsyncClient(address, timeout=timeout, max_message_bytes=max_message_bytes)
        self._thread = _LoopThread(self._async)
        # Also at interpreter exit, since a forgotten client must not die in the middle of its loop.
        self._close = weakref.finalize(self, self._thread.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the calls under way and the connection."""
        self._close()

    def stream(self, prompt: str, **options: Unpack[GenerateOptions]) -> Generator[Event, None, None]:
        """Generate, and tell how it goes; leaving the iterator cancels the generation."""
        return self._thread.iterate(self._async.stream(prompt, **options))

    def generate(
        self,
        prompt: str,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Make pictures of a prompt; ``on_progress`` is called after each step, on the caller's thread."""
        outcome = Outcome(on_progress)
        with closing(self.stream(prompt, **options)) as events:
            for event in events:
                outcome.note(event)
        return outcome.generation()

    def classify(
        self,
        images: ImageInput | Iterable[ImageInput],
        top_k: int = 5,
        *,
        threshold: float = 0.0,
        model: str = "",
    ) -> list[Classification]:
        """Name what is in each picture with its ``top_k`` likeliest labels of at least ``threshold`` probability."""
        return self._thread.run(self._async.classify(images, top_k, threshold=threshold, model=model))

    def classify_stream(
        self, images: Iterable[ImageInput], top_k: int = 5, *, threshold: float = 0.0, model: str = ""
    ) -> Generator[Classification | MeshError, None, None]:
        """Classify a list of any length, in its order; see ``AsyncClient.classify_stream``."""
        return self._thread.iterate(self._async.classify_stream(images, top_k, threshold=threshold, model=model))

    def embed(
        self,
        images: ImageInput | Iterable[ImageInput],
        pooling: PoolingName = "cls",
        normalize: bool = False,
        *,
        model: str = "",
    ) -> Array:
        """Turn pictures into vectors: float32 [pictures, width]; see ``AsyncClient.embed``."""
        return self._thread.run(self._async.embed(images, pooling, normalize, model=model))

    def models(self) -> Models:
        """List what the mesh can run."""
        return self._thread.run(self._async.models())


class _LoopThread:
    """An event loop on a thread of its own, with the client that lives there."""

    def __init__(self, client: AsyncClient) -> None:
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
