"""Long lists over one call: every message of a stream is answered by one, in order; several are in work at a time."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

import grpc

from imagemesh.v1 import vit_service_pb2
from imagemesh_runtime.errors import MeshError

# Messages of one stream in work at a time: enough to fill a batch, few enough to leave others room in the queue. The
# rest is not read, so that gRPC's flow control holds the caller back.
AHEAD: Final = 16

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Work = Callable[[Request], Awaitable[Answer]]
# Called once for each request; refuses one by raising a MeshError.
Count = Callable[[], None]


async def answers(
    requests: AsyncIterator[Request], answer: Work[Request, Answer], ahead: int = AHEAD, count: Count = lambda: None
) -> AsyncGenerator[tuple[int, Answer | MeshError], None]:
    """The number of each request, from 0, and its answer or its own failure, in the order of the requests.

    One that ``count`` refuses gets that error; one that a full queue refuses is made again when the refusal says so.
    Closing the generator cancels what is in work: hold it in ``contextlib.aclosing``.

    Raises:
        Exception: what ``answer`` or ``requests`` raise beside ``MeshError`` ends the stream.
    """
    waiting: deque[asyncio.Task[Answer | MeshError]] = deque()
    more, changed = asyncio.Semaphore(ahead), asyncio.Event()

    async def read() -> None:
        async for request in requests:
            waiting.append(asyncio.create_task(_patient(answer, request, count)))
            changed.set()
            await more.acquire()

    await more.acquire()
    reader = asyncio.create_task(read())
    reader.add_done_callback(lambda _: changed.set())
    index = 0
    try:
        while True:
            while waiting:
                yield index, await waiting[0]
                waiting.popleft()
                more.release()
                index += 1
            if reader.done():
                await reader
                return
            changed.clear()
            await changed.wait()
    finally:
        for task in (reader, *waiting):
            task.cancel()
        await asyncio.gather(reader, *waiting, return_exceptions=True)


async def _patient(answer: Work[Request, Answer], request: Request, count: Count) -> Answer | MeshError:
    try:
        count()
    except MeshError as error:
        return error
    while True:
        try:
            return await answer(request)
        except MeshError as error:
            wait = error.retry_after()
            if wait is None or error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                return error
            await asyncio.sleep(wait)


def as_fields(outcome: Any) -> dict[str, Any]:
    """The field of a stream's response that holds the outcome."""
    if isinstance(outcome, MeshError):
        return {"error": vit_service_pb2.StreamError(code=outcome.code.value[0], message=str(outcome))}
    return {"response": outcome}
