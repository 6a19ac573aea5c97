"""The gateway as a process: how it ends, and what it writes into its log."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.service import create


async def test_channels_are_closed_also_when_the_http_face_failed() -> None:
    server = create(GatewayConfig(listen="127.0.0.1:0", http_listen="127.0.0.1:0", drain_grace_seconds=1))
    await server.start()
    closed: list[str] = []
    for peer in server._mesh.peers:
        peer.close = lambda close=peer.close, name=peer.name: closed.append(name) or close()  # type: ignore[method-assign]
    serving = server._http_task

    async def failing() -> None:
        assert serving is not None
        await serving
        raise OSError("a socket broke")

    server._http_task = asyncio.create_task(failing())
    with pytest.raises(OSError, match="a socket broke"):
        await server.stop()
    assert closed == ["text-encoder", "diffusion", "vae", "controlnet", "vit"]


@pytest.mark.parametrize(("level", "talks"), [("ERROR", False), ("INFO", True)])
def test_the_gateway_logs_as_much_as_it_is_told(tmp_path: Path, level: str, talks: bool) -> None:
    address = f"unix:{tmp_path}/gateway.sock"
    settings = {"IMAGEMESH_GATEWAY_LISTEN": address, "IMAGEMESH_GATEWAY_HTTP_LISTEN": "127.0.0.1:0"}
    env = {**os.environ, **settings, "IMAGEMESH_LOG_LEVEL": level}
    command = [sys.executable, "-m", "imagemesh_gateway"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            with grpc.insecure_channel(address) as channel:
                grpc.channel_ready_future(channel).result(timeout=30)
            process.terminate()
            _, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert ("INFO imagemesh_runtime.server: gateway serves gRPC" in log) is talks
    assert talks or log == ""
