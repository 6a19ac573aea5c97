"""Every replica of every service is replaced under load, first asked to go and then killed, and no request fails."""

import asyncio
import itertools
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from imagemesh_client import AsyncClient
from tests.support.mesh import running_mesh
from tests.support.processes import Process, start

SERVICES, REPLICAS = ("text-encoder", "diffusion", "vae", "vit"), 2
SETTINGS = {
    "IMAGEMESH_BACKEND": "fake", "IMAGEMESH_METRICS_LISTEN": "127.0.0.1:0", "IMAGEMESH_ADMIN_LISTEN": "127.0.0.1:0",
    "IMAGEMESH_THREADS": "1", "IMAGEMESH_LOG_LEVEL": "WARNING",
}  # fmt: skip
# Of requests that come through between two replacements, so that each meets work, and a new replica has taken some.
BETWEEN = 20
# The manifests' minReadySeconds: the next replica goes no sooner.
FOUND_SECONDS = 5.0


class Rollout:
    """The services' replicas as processes, and how many requests came through."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack = stack
        self.addresses = {name: [f"unix:{folder}/{name}-{i}.sock" for i in range(REPLICAS)] for name in SERVICES}
        self.running = {at: self._start(name, at) for name, all_at in self.addresses.items() for at in all_at}
        for process in self.running.values():
            process.wait_ready()
        self.done = 0
        # Whether the gateway takes every replica for ready.
        self.all_found: Callable[[], bool] = lambda: True

    def _start(self, name: str, address: str) -> Process:
        return self._stack.enter_context(start(name, address, SETTINGS))

    async def replace(self, address: str, *, kill: bool) -> None:
        """Let the replica go, start another at its address, and return when the gateway knows and work was done."""
        old = self.running[address]
        (old.process.kill if kill else old.process.terminate)()
        await asyncio.to_thread(old.process.wait, 60)
        self.running[address] = self._start(old.name, address)
        await asyncio.to_thread(self.running[address].wait_ready)
        enough = self.done + BETWEEN
        async with asyncio.timeout(FOUND_SECONDS):
            while not self.all_found():
                await asyncio.sleep(0.05)
        async with asyncio.timeout(120):
            while self.done < enough:
                await asyncio.sleep(0.05)

    async def generate(self, client: AsyncClient, caller: int, over: asyncio.Event) -> None:
        for i in itertools.count():
            if over.is_set():
                return
            made = await client.generate("x", seed=1000 * caller + i, steps=20)
            assert len(made.images) == 1
            self.done += 1

    async def classify(self, client: AsyncClient, over: asyncio.Event) -> None:
        picture = Image.new("RGB", (32, 32))
        while not over.is_set():
            assert await client.classify(picture)
            self.done += 1


@pytest.mark.timeout(1800)
async def test_rolling_every_service_under_load_fails_no_request(figures: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        rollout = Rollout(stack, Path(folder))
        gateway = {name.replace("-", "_"): ",".join(all_at) for name, all_at in rollout.addresses.items()}
        with running_mesh(gateway, without=SERVICES, backend="fake") as mesh:
            services = mesh.gateway._mesh.services  # type: ignore[attr-defined]
            rollout.all_found = lambda: all(
                one._known[peer].ready and not one.rests(peer) for one in services for peer in one.peers
            )
            async with AsyncClient(mesh.grpc_address) as client:
                over = asyncio.Event()
                callers = [asyncio.create_task(rollout.generate(client, caller, over)) for caller in range(4)]
                callers.append(asyncio.create_task(rollout.classify(client, over)))
                for kill in (False, True):
                    for address in list(rollout.running):
                        replacing = asyncio.create_task(rollout.replace(address, kill=kill))
                        await asyncio.wait((replacing, *callers), return_when=asyncio.FIRST_COMPLETED)
                        for caller in callers:
                            if caller.done():  # which it never is before it is over, unless a request failed
                                await caller
                        await replacing
                over.set()
                await asyncio.gather(*callers)
    figures["replicas replaced"] = f"{len(rollout.running)} that were asked to go, and as many that were killed"
    figures["requests meanwhile, of which failed"] = f"{rollout.done}, 0"
