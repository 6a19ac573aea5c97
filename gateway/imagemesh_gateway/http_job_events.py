"""How a job goes on, as it happens: server-sent events and WebSocket."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, suppress
from typing import Any

from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from starlette.websockets import WebSocketDisconnect

from imagemesh.v1 import job_service_pb2 as pb
from imagemesh_gateway.http_errors import error_body, error_response
from imagemesh_gateway.http_job_body import job_json, state_name
from imagemesh_gateway.http_origin import check_origin
from imagemesh_gateway.jobs.service import Jobs
from imagemesh_runtime.errors import MeshError

log = logging.getLogger(__name__)

# The routes that last as long as a job does.
EVENTS_PATH, SOCKET_PATH = "/v1/jobs/{job}/events", "/v1/jobs/{job}/socket"
# Proxies cut connections on which nothing comes for a minute or so.
KEEP_ALIVE_SECONDS = 15.0
_UNFORESEEN, _TRY_AGAIN = 1011, 1013  # a WebSocket's close codes, as IANA lists them
_BEGIN_AGAIN_MILLISECONDS = 2000


def add_job_events(app: FastAPI, jobs: Jobs) -> None:
    """Both routes."""

    @app.get(EVENTS_PATH, responses={200: {"content": {"text/event-stream": {}}, "description": "As it happens."}})
    async def watch_job(job: str) -> StreamingResponse:
        """Server-sent events: how the job stands, now and at every change, until it is finished."""
        await jobs.get(job, pictures=False)  # an unknown one is refused with a status, not with an event
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_server_sent(jobs, job), media_type="text/event-stream", headers=headers)

    @app.websocket(SOCKET_PATH)
    async def watch_job_by_socket(socket: WebSocket, job: str) -> None:
        try:
            check_origin(socket.headers, "watch jobs")
            await jobs.get(job, pictures=False)
        except MeshError as error:
            await socket.send_denial_response(error_response(error))
            return
        await socket.accept()
        await _tell_socket(socket, jobs, job)


async def _server_sent(jobs: Jobs, job: str) -> AsyncIterator[str]:
    yield f"retry: {_BEGIN_AGAIN_MILLISECONDS}\n\n"
    try:
        async with aclosing(jobs.watch(job, pictures=False)) as changes:
            async for now in _or_silence(changes):
                yield ": still here\n\n" if now is None else _event(state_name(now), job_json(now))
    except MeshError as error:
        yield _event("error", error_body(error))


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


async def _or_silence(changes: Any) -> AsyncIterator[pb.Job | None]:
    """What comes; None whenever nothing came for a while."""
    coming = asyncio.ensure_future(anext(changes))
    try:
        while True:
            done, _ = await asyncio.wait((coming,), timeout=KEEP_ALIVE_SECONDS)
            if not done:
                yield None
                continue
            try:
                now = coming.result()
            except StopAsyncIteration:
                return
            yield now
            coming = asyncio.ensure_future(anext(changes))
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


async def _tell_socket(socket: WebSocket, jobs: Jobs, job: str) -> None:
    """Send each change as a JSON message until the job is finished, or the client goes."""
    telling = asyncio.create_task(_tell(socket, jobs, job))
    leaving = asyncio.create_task(_left(socket))
    try:
        await asyncio.wait((telling, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (telling, leaving):
            task.cancel()
        await asyncio.wait((telling, leaving))
    for task in (telling, leaving):
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("watching job %s by a socket failed", job, exc_info=error)
            with suppress(_ClientLeftError):
                await _say(socket.close(_UNFORESEEN))


class _ClientLeftError(Exception):
    """Nobody is there to be told."""


async def _say(saying: Awaitable[None]) -> None:
    """What the frameworks raise where a client left while something was on its way, as an error of its own."""
    try:
        await saying
    except (WebSocketDisconnect, RuntimeError) as error:
        raise _ClientLeftError from error


async def _tell(socket: WebSocket, jobs: Jobs, job: str) -> None:
    with suppress(_ClientLeftError):
        try:
            async with aclosing(jobs.watch(job, pictures=False)) as changes:
                async for now in changes:
                    message = job_json(now)
                    await _say(socket.send_json(message))
        except MeshError as error:
            await _say(socket.send_json(error_body(error)))
            await _say(socket.close(_TRY_AGAIN))
        else:
            await _say(socket.close())


async def _left(socket: WebSocket) -> None:
    """Return when the client has gone; what it says is passed over."""
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass
