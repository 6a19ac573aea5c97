"""A stream is read ahead of who listens, so far and no further."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from imagemesh_gateway.ahead import ahead
from imagemesh_runtime.errors import Unavailable


class Source:
    """Numbers from 0; tells how many were taken, and whether it was closed."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count, self.error = count, error
        self.taken, self.closed = 0, False

    async def events(self) -> AsyncGenerator[int, None]:
        try:
            for i in range(self.count):
                self.taken += 1
                yield i
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


async def settle() -> None:
    for _ in range(100):
        await asyncio.sleep(0)


async def test_it_reads_on_while_nobody_asks_and_stops_in_time() -> None:
    source = Source(100)
    async with aclosing(ahead(source.events(), 8)) as events:
        assert await anext(events) == 0
        await settle()
        assert source.taken == 10  # one is told, eight wait, and one is in hand
        assert [await anext(events) for _ in range(99)] == list(range(1, 100))
        with pytest.raises(StopAsyncIteration):
            await anext(events)


async def test_an_error_comes_in_its_place() -> None:
    async with aclosing(ahead(Source(5, Unavailable("diffusion", "is going away")).events(), 8)) as events:
        assert await anext(events) == 0
        await settle()
        assert [await anext(events) for _ in range(4)] == [1, 2, 3, 4]
        with pytest.raises(Unavailable, match="is going away"):
            await anext(events)


@pytest.mark.parametrize("count", [3, 100])
async def test_who_leaves_closes_it(count: int) -> None:
    source = Source(count)
    async with aclosing(ahead(source.events(), 8)) as events:
        assert await anext(events) == 0
        await settle()
    assert source.closed
