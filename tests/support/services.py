"""One service on a real server in this process, and the channel to it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from imagemesh_runtime.channels import channel_options
from imagemesh_runtime.config import ModelServerConfig
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.service import ModelServer


@dataclass(frozen=True)
class Served:
    """A running service."""

    server: ModelServer[Any]
    channel: grpc.aio.Channel


@asynccontextmanager
async def serving(create: Callable[[Any, Lane], ModelServer[Any]], config: ModelServerConfig) -> AsyncIterator[Served]:
    """The service on the config's address (give port 0), ready; stopped at the end of the block."""
    lane = Lane(config.SERVICE)
    server = create(config, lane)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(
            server.address, options=channel_options(config.max_message_bytes)
        ) as channel:
            yield Served(server, channel)
    finally:
        await server.stop()
        lane.close()
