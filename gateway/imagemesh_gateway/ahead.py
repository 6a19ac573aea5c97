"""Reading ahead of who listens: a stream goes on at its own pace while its events are told."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    error: Exception | None = None


async def ahead(events: AsyncGenerator[T, None], most: int) -> AsyncGenerator[T, None]:
    """The same events and the same error at the end, of which ``most`` at most are read before they are asked for."""
    read: asyncio.Queue[T | _End] = asyncio.Queue(most)

    async def fill() -> None:
        end = _End()
        try:
            async with aclosing(events):
                async for event in events:
                    await read.put(event)
        except Exception as error:
            end = _End(error)
        await read.put(end)

    reading = asyncio.create_task(fill())
    try:
        while not isinstance(event := await read.get(), _End):
            yield event
        if event.error is not None:
            raise event.error
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
