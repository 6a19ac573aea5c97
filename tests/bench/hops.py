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
from imagemesh_services.vae.backend import MemoryOptions
from imagemesh_services.vae.backends.fake import FakeVaeModel
from tests.bench.harness import Figure, interleave
from tests.support.processes import Process, start

CALLS = 200
# Latents of one picture of 512 x 512, and of eight of 1024 x 1024: with the pictures they become, 0.85 and 27 MB.
SMALL, LARGE = (np.zeros(shape, dtype=np.float32) for shape in ((1, 4, 64, 64), (8, 4, 128, 128)))


def measure(folder: Path, rounds: int) -> list[Figure]:
    """Wall and CPU time (both ends) a call: a small message, a picture, eight large pictures.

    The sizes are of request and response together. The fake's own decoding, which is nothing to speak of for the small
    ones, is measured by itself for the large ones.
    """
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
            figures += _decoding(decoder, vae_rpc.VaeServiceStub(channel), rounds)
    return figures


def _decoding(decoder: Process, stub: vae_rpc.VaeServiceStub, rounds: int) -> list[Figure]:
    small, large = (vae.DecodeLatentsRequest(model="fake", latents=to_proto(latents)) for latents in (SMALL, LARGE))
    figures = _cost("latents of 512x512 (0.85 MB)", decoder, lambda: stub.DecodeLatents(small), 20, rounds)
    figures += _cost("latents of 8 x 1024x1024 (27 MB)", decoder, lambda: stub.DecodeLatents(large), 5, rounds)
    model, plain = FakeVaeModel(), MemoryOptions()
    alone = interleave({"fake": lambda: model.decode(LARGE, plain)}, rounds)["fake"]
    return [
        *figures,
        Figure.of("hop: of the 27 MB the fake's own decoding", [seconds * 1e3 for seconds in alone], "ms"),
    ]


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
