"""``python -m tests.support.signalled NUMBER serving|loading``: a server that sends itself a signal; 0 if it stopped.

A process of its own, since a signal meets whatever else the process of the tests has loaded.
"""

import asyncio
import os
import sys

from imagemesh_runtime.config import ServerConfig
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.server import MeshServer
from imagemesh_runtime.service import serve


class Recorded(MeshServer):
    """Tells when it started and stopped; the start can be made to wait."""

    def __init__(self, *, hangs: bool) -> None:
        super().__init__(ServerConfig(drain_grace_seconds=1.0), Metrics("recorded"))
        self.hangs = hangs
        self.started, self.stopped = asyncio.Event(), asyncio.Event()

    async def start(self) -> None:
        """Start, and load for ever if it hangs."""
        await super().start()
        self.started.set()
        if self.hangs:
            await asyncio.Event().wait()

    async def stop(self) -> None:
        """Stop, and remember it."""
        await super().stop()
        self.stopped.set()


async def main(number: int, how: str) -> int:
    """Serve until the signal."""
    server = Recorded(hangs=how == "loading")
    task = asyncio.create_task(serve(lambda: server))
    await server.started.wait()
    os.kill(os.getpid(), number)
    await asyncio.wait_for(task, 5)
    return 0 if server.stopped.is_set() else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(int(sys.argv[1]), sys.argv[2])))
