"""The commands that run servers, until the process is told to stop."""

import asyncio
import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from imagemesh_cli.host import MeshHost, require_free
from imagemesh_cli.rooms import GATEWAY, SERVICES, configure
from imagemesh_gateway.config import GatewayConfig
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.service import leave, set_process_defaults

EXIT_INTERRUPTED = 130


def up(args: Namespace) -> int:
    """Host the whole mesh in this process."""
    set_process_defaults(os.environ.get("IMAGEMESH_LOG_LEVEL", "WARNING"))
    host = MeshHost.configured(_given(args, "models", "backend"), _gateway(args), args.config)
    host.close_lane = lambda lane: leave(lane, host.abandon)
    asyncio.run(_up(host, args.json))
    return 0


async def _up(host: MeshHost, as_json: bool) -> None:
    told = _stop_signal(host.abandon)
    if sys.stderr.isatty():
        print("imagemesh starts: it loads its libraries, which takes some seconds", file=sys.stderr, flush=True)
    async with host:
        servers = {**host.services, "gateway": host.gateway}
        metrics = {name: server.metrics_http.address for name, server in servers.items()}
        admin = {name: server.admin_http.address for name, server in servers.items()}
        if as_json:
            addresses = {"grpc": host.grpc_address, "http": host.http_address, "metrics": metrics, "admin": admin}
            print(json.dumps(addresses), flush=True)
        else:
            print(
                f"imagemesh is up\n  gRPC     {host.grpc_address}\n  HTTP     {host.http_scheme}://{host.http_address}"
            )
            for name, address in metrics.items():
                print(f"  metrics  http://{address}/metrics  {name}")
            for name, address in admin.items():
                print(f"  admin    http://{address}/drain  {name}")
            print("Ctrl-C stops it.", flush=True)
        await told.wait()
        if sys.stderr.isatty():
            print("waiting for calls under way to end; Ctrl-C again ends at once", file=sys.stderr, flush=True)


def _gateway(args: Namespace) -> Mapping[str, str]:
    """Where the gateway listens, as far as options say so; of the rest the configuration has the say."""
    configured = configure(GatewayConfig, {}, args.config)
    given: dict[str, str] = {}
    for name, wanted in (("listen", args.grpc_port), ("http_listen", args.http_port)):
        if args.host is None and wanted is None:
            continue
        address = getattr(configured, name)
        usual = address if not address.startswith("unix:") else getattr(GatewayConfig, name)
        host, _, port = usual.rpartition(":")
        if args.host is not None:
            host = f"[{args.host}]" if ":" in args.host else args.host
        given[name] = f"{host}:{port if wanted is None else wanted}"
    if args.keys is not None:
        given["keys_file"] = str(args.keys)
    if args.allow_anyone:
        given["allow_anyone"] = "true"
    return given


def serve(args: Namespace) -> int:
    """Run one server in this process."""
    set_process_defaults(os.environ.get("IMAGEMESH_LOG_LEVEL", "INFO"))
    lane = Lane(args.service)
    try:
        asyncio.run(_serve(args, lane))
    finally:
        leave(lane)
    return 0


async def _serve(args: Namespace, lane: Lane) -> None:
    is_gateway = args.service == "gateway"
    room = GATEWAY if is_gateway else SERVICES[args.service]
    settings = {**dict(args.set), **_given(args, "listen", "models", "backend")}
    config = configure(room.config(), settings, args.config)
    require_free(args.service, config.listen, config.metrics_listen, config.admin_listen)
    if is_gateway:
        require_free(args.service, config.http_listen)
    with _ended_by_signals():
        server = room.create(config) if is_gateway else room.create(config, lane)
    told = _stop_signal()
    try:
        if await _done_before(told, server.start()):
            http = f", HTTP on {server.http_scheme}://{server.http_address}" if is_gateway else ""
            print(f"{args.service} listens on {server.address}{http}", flush=True)
            await told.wait()
    finally:
        await server.stop()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """The first signal ends the process: nobody is served yet, and an event loop hears of none while it imports.

    On a busy machine that takes minutes, and whoever asks a process to stop may not wait so long.
    """
    codes: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: EXIT_INTERRUPTED}
    before = {name: signal.signal(name, lambda number, _: os._exit(codes[number])) for name in codes}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


async def _done_before(told: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do the work, such as to load models; answers whether it is done, or false as soon as the event is set."""
    doing, waiting = asyncio.create_task(work), asyncio.create_task(told.wait())
    try:
        await asyncio.wait((doing, waiting), return_when=asyncio.FIRST_COMPLETED)
        if done := doing.done():
            await doing
        return done
    finally:
        for task in (doing, waiting):
            task.cancel()
        await asyncio.gather(doing, waiting, return_exceptions=True)


def _given(args: Namespace, *names: str) -> dict[str, str]:
    return {name: str(value) for name in names if (value := getattr(args, name)) is not None}


def _stop_signal(abandon: Callable[[], None] = lambda: None) -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; a second one calls ``abandon`` and ends the process at once."""
    told = asyncio.Event()

    def handle() -> None:
        if told.is_set():
            abandon()
            os._exit(EXIT_INTERRUPTED)  # gRPC's servers don't survive the interpreter's orderly end while calls go on
        told.set()

    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, handle)
    return told
