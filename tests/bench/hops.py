"""What a hop costs by itself: fake backends compute next to nothing, so what remains is the way."""

import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np

from imagemesh.v1 import text_encoder_service_pb2 as text
from imagemesh.v1 import text_encoder_service_pb2_grpc as text_rpc
from imagemesh.v1 import vae_service_pb2 as vae
from imagemesh.v1 import vae_service_pb2_grpc as vae_rpc
from imagemesh_runtime.channels import channel_options
from imagemesh_runtime.tensors import to_proto
from tests.bench.harness import Figure
from tests.support.processes import Process, start

CALLS = 200


def measure(folder: Path, rounds: int) -> list[Figure]:
    """Wall and CPU time (both ends) a call: a small message, a picture, 27 MB of latents."""
    settings = {"IMAGEMESH_BACKEND": "fake", "IMAGEMESH_METRICS_LISTEN": "127.0.0.1:0"}
    settings["IMAGEMESH_ADMIN_LISTEN"] = "127.0.0.1:0"
    figures: list[Figure] = []
    with start("text-encoder", f"unix:{folder}/t.sock", settings) as encoder:
        encoder.wait_ready()
        with grpc.insecure_channel(encoder.address) as channel:
            stub = text_rpc.TextEncoderServiceStub(channel)
            request = text.EncodeTextRequest(model="fake", prompt="a fox", negative_prompt="")
            figures += _cost("a prompt (0.6 kB)", encoder, lambda: stub.EncodeText(request), CALLS, rounds)
    with start("vae", f"unix:{folder}/v.sock", settings) as decoder:
        decoder.wait_ready()
        with grpc.insecure_channel(decoder.address, options=channel_options(256 << 20)) as channel:
            stub_vae = vae_rpc.VaeServiceStub(channel)
            latents = to_proto(np.zeros((1, 4, 64, 64), dtype=np.float32))
            small = vae.DecodeLatentsRequest(model="fake", latents=latents)
            figures += _cost("latents of 512x512 (0.85 MB)", decoder, lambda: stub_vae.DecodeLatents(small), 20, rounds)
    return figures


def _cost(what: str, server: Process, call: Callable[[], object], calls: int, rounds: int) -> list[Figure]:
    call()
    wall, cpu = [], []
    for _ in range(rounds):
        started, spent = time.perf_counter(), _cpu(server)
        for _ in range(calls):
            call()
        wall.append((time.perf_counter() - started) / calls * 1e3)
        cpu.append((_cpu(server) - spent) / calls * 1e3)
    return [Figure.of(f"hop: {what}, wall", wall, "ms"), Figure.of(f"hop: {what}, CPU of both ends", cpu, "ms")]


def _cpu(server: Process) -> float:
    """CPU seconds of this process and the server's."""
    import psutil

    times = psutil.Process(server.process.pid).cpu_times()
    return time.process_time() + float(times.user + times.system)
