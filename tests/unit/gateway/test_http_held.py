"""The HTTP face's bound on what all bodies take together."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request

from imagemesh_gateway.access.door import Door
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.http_guard import Guard, HttpLimits
from imagemesh_runtime.metrics import Metrics


class Held:
    """A guarded application that answers when it is told to."""

    def __init__(self, held_bytes: int) -> None:
        self.go = asyncio.Event()
        app = FastAPI()

        async def take(request: Request) -> int:
            size = len(await request.body())
            await self.go.wait()
            return size

        app.add_api_route("/take", take, methods=["POST"])
        metrics = Metrics("gateway")
        limits = HttpLimits(8, 8, 100, held_bytes, 30.0, 30.0)
        self._guard = Guard(app, metrics, limits, Door(GatewayConfig(), metrics))

    async def post(self, *parts: bytes, announced: int | None = None) -> tuple[int, dict[str, str]]:
        """Status and headers of the answer to a body that comes in parts."""
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        messages.append({"type": "http.request", "body": b"", "more_body": False})
        headers = [] if announced is None else [(b"content-length", str(announced).encode())]
        scope = {"type": "http", "method": "POST", "path": "/take", "query_string": b"", "headers": headers}
        heard: list[Any] = []

        async def receive() -> Any:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop(0)

        async def send(message: Any) -> None:
            heard.append(message)

        await asyncio.wait_for(self._guard(scope, receive, send), 30)
        return heard[0]["status"], {key.decode(): value.decode() for key, value in heard[0]["headers"]}


async def test_bodies_that_are_too_much_together_are_told_to_come_back_and_room_is_given_back() -> None:
    door = Held(held_bytes=100)
    working = asyncio.create_task(door.post(b"x" * 40, b"x" * 20))
    async with asyncio.timeout(10):
        while door._guard._held < 60:
            await asyncio.sleep(0)
    for refused in (door.post(b"x" * 30, b"x" * 30), door.post(b"x" * 60, announced=60)):
        status, headers = await refused
        assert (status, headers["retry-after"]) == (503, "1")
    assert door._guard._held == 60
    door.go.set()
    assert (await door.post(b"x" * 40))[0] == 200
    assert (await working)[0] == 200
    assert door._guard._held == 0
    assert (await door.post(b"x" * 100))[0] == 200
