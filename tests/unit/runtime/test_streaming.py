"""Answers of a stream: in order, several in work, none lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from imagemesh_runtime.errors import InvalidArgument, MeshError, OverLimit, Overloaded
from imagemesh_runtime.streaming import answers


async def numbers(count: int) -> AsyncIterator[int]:
    for i in range(count):
        yield i


async def collected(requests: AsyncIterator[int], answer, ahead: int = 4) -> list[object]:
    async with aclosing(answers(requests, answer, ahead)) as outcomes:
        return [one async for one in outcomes]


async def test_answers_come_in_the_order_of_the_requests_whichever_is_ready_first():
    gates = [asyncio.Event() for _ in range(4)]

    async def answer(i: int) -> int:
        if i == 3:
            for gate in reversed(gates):
                gate.set()
        await gates[i].wait()
        return i * 10

    assert await collected(numbers(4), answer) == [(0, 0), (1, 10), (2, 20), (3, 30)]


async def test_no_more_are_read_than_may_be_in_work():
    read, most, now = 0, 0, 0

    async def requests() -> AsyncIterator[int]:
        nonlocal read
        async for i in numbers(30):
            read += 1
            yield i

    async def answer(i: int) -> int:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return i

    async with aclosing(answers(requests(), answer, 3)) as outcomes:
        assert await anext(outcomes) == (0, 0)
        assert read <= 4
        rest = [index async for index, _ in outcomes]
    assert rest == list(range(1, 30))
    assert most <= 3


async def test_a_failure_is_its_own_requests():
    async def answer(i: int) -> int:
        if i == 1:
            raise InvalidArgument("images", 0, "1 to 64")
        return i

    first, second, third = await collected(numbers(3), answer)
    assert (first, third) == ((0, 0), (2, 2))
    assert second[0] == 1
    assert isinstance(second[1], MeshError)


async def test_a_full_queue_is_asked_again():
    refusals = 2

    async def answer(i: int) -> int:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise Overloaded("vit", 1, 0.001)
        return i

    assert await collected(numbers(2), answer) == [(0, 0), (1, 1)]


async def test_each_request_is_counted_once_and_one_too_many_is_refused_at_once():
    counted, refusals = 0, 2

    def count() -> None:
        nonlocal counted
        counted += 1
        if counted > 2:
            raise OverLimit("key k", "it has made its calls", 3600)

    async def answer(i: int) -> int:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise Overloaded("vit", 1, 0.001)
        return i

    async with asyncio.timeout(10), aclosing(answers(numbers(3), answer, count=count)) as outcomes:
        first, second, third = [one async for one in outcomes]
    assert (first, second, counted) == ((0, 0), (1, 1), 3)
    assert isinstance(third[1], OverLimit)


async def test_what_is_unforeseen_ends_the_stream():
    async def answer(i: int) -> int:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        await collected(numbers(2), answer)


async def test_leaving_cancels_what_is_in_work():
    begun, ended = asyncio.Semaphore(0), 0

    async def answer(i: int) -> int:
        nonlocal ended
        if i == 0:
            return i
        begun.release()
        try:
            await asyncio.Event().wait()
        finally:
            ended += 1
        return i

    async with aclosing(answers(numbers(10), answer, 3)) as outcomes:
        await anext(outcomes)
        await begun.acquire()
    assert ended >= 1


async def test_an_empty_stream_has_no_answers():
    assert await collected(numbers(0), None) == []
