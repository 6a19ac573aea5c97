"""The mesh as six processes, each started as a user would: ``imagemesh serve SERVICE``."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICES = ("controlnet", "text-encoder", "diffusion", "vae", "vit", "gateway")
START_SECONDS = 300


@dataclass(frozen=True)
class Process:
    """A running service: its gRPC address and the process behind it."""

    name: str
    address: str
    process: "subprocess.Popen[bytes]"

    def wait_ready(self) -> None:
        """Return when its health says so.

        Raises:
            RuntimeError: the process ended instead, or took too long.
        """
        deadline = time.monotonic() + START_SECONDS
        with grpc.insecure_channel(self.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for answer in self._watch(health, deadline):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        raise RuntimeError(f"{self.name} is not ready (exit code {self.process.poll()})")

    def _watch(self, health: health_pb2_grpc.HealthStub, deadline: float) -> Iterator[health_pb2.HealthCheckResponse]:
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                request = health_pb2.HealthCheckRequest(service="readiness")
                # Looked at in turns, so that a process that dies is noticed.
                yield from health.Watch(request, timeout=2, wait_for_ready=True)
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise


@contextmanager
def start(name: str, address: str, env: Mapping[str, str], module: str = "imagemesh_cli.main") -> Iterator[Process]:
    """Start one service; it is asked to stop at the end, and must."""
    command = [sys.executable, "-m", module, "serve", name, "--listen", address]
    process = subprocess.Popen(command, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **env})
    try:
        yield Process(name, address, process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


@contextmanager
def six_processes(models: Path, sockets: Path, **env: str) -> Iterator[dict[str, Process]]:
    """All services and the gateway, joined over TCP, the gateway itself on a Unix socket; ready when entered."""
    addresses = {name: f"127.0.0.1:{free_port()}" for name in SERVICES}
    addresses["gateway"] = f"unix:{sockets}/gateway.sock"
    settings = {
        "IMAGEMESH_MODELS": str(models),
        "IMAGEMESH_METRICS_LISTEN": "127.0.0.1:0",
        "IMAGEMESH_ADMIN_LISTEN": "127.0.0.1:0",
        "IMAGEMESH_GATEWAY_HTTP_LISTEN": "127.0.0.1:0",
        "IMAGEMESH_DIFFUSION_CONTROLNET": addresses["controlnet"],
        **{f"IMAGEMESH_GATEWAY_{name.replace('-', '_').upper()}": address for name, address in addresses.items()},
        **env,
    }
    with ExitStack() as stack:
        found = {name: stack.enter_context(start(name, addresses[name], settings)) for name in SERVICES}
        for process in found.values():
            process.wait_ready()
        yield found
