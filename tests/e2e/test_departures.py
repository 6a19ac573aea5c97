"""What a server counts as cancelled: callers who went, not deadlines that passed."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest

from imagemesh.v1 import vae_service_pb2 as pb
from imagemesh.v1 import vae_service_pb2_grpc as rpc
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.tensors import Array, to_proto
from imagemesh_services.vae.backend import MemoryOptions
from imagemesh_services.vae.backends.fake import FakeVae, FakeVaeModel
from imagemesh_services.vae.config import VaeConfig
from imagemesh_services.vae.service import create
from tests.support.services import Served, serving

REQUEST = pb.DecodeLatentsRequest(model="fake", latents=to_proto(np.zeros((20, 4, 1, 1), np.float32)))
METHOD = {"grpc_type": "unary", "grpc_service": "imagemesh.v1.VaeService", "grpc_method": "DecodeLatents"}


class Hanging(FakeVaeModel):
    """Decodes when it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def decode(self, latents: Array, memory: MemoryOptions) -> Array:
        self.begun.set()
        assert self.go.wait(60)
        return super().decode(latents, memory)


@pytest.fixture
async def hanging(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Served, Hanging]]:
    model = Hanging()
    monkeypatch.setattr(FakeVae, "load", lambda self, name: model)
    async with serving(create, VaeConfig(listen="127.0.0.1:0", backend="fake")) as served:
        yield served, model
        model.go.set()


async def _counted(metrics: Metrics, code: str) -> float | None:
    """What is counted as cancelled once a call has ended with ``code``."""
    async with asyncio.timeout(60):
        while not metrics.registry.get_sample_value("grpc_server_handled_total", METHOD | {"grpc_code": code}):
            await asyncio.sleep(0.005)
    return metrics.registry.get_sample_value("imagemesh_cancelled_requests_total", {"service": "vae"})


def _metrics(served: Served) -> Any:
    return served.server._models._metrics


async def test_a_caller_who_goes_counts_once_whatever_parts_its_request_has(hanging):
    served, model = hanging
    call = rpc.VaeServiceStub(served.channel).DecodeLatents(REQUEST, timeout=60)
    sent = asyncio.ensure_future(call)
    assert await asyncio.to_thread(model.begun.wait, 60)
    call.cancel()
    await asyncio.gather(sent, return_exceptions=True)
    assert await _counted(_metrics(served), "CANCELLED") == 1


async def test_a_deadline_that_passes_is_no_caller_who_went(hanging):
    served, _ = hanging
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rpc.VaeServiceStub(served.channel).DecodeLatents(REQUEST, timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await _counted(_metrics(served), "DEADLINE_EXCEEDED") == 0
