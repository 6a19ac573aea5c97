"""When the client goes, the sampler stops within one step: shown with a sampler whose every step is let go by hand."""

import asyncio
import threading
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import diffusion_service_pb2_grpc as rpc
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.service import ModelServer
from imagemesh_runtime.tensors import to_proto
from imagemesh_services.diffusion.backend import DiffusionModel, Residuals, SampleInputs
from imagemesh_services.diffusion.backends.fake import FakeDiffusion, FakeDiffusionModel, FakeRun
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.servicer import DiffusionServicer


class Gate:
    """Lets steps pass one by one, and counts them."""

    def __init__(self) -> None:
        self.tickets = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.steps = 0

    def step(self) -> None:
        self.entered.release()
        assert self.tickets.acquire(timeout=30)
        self.steps += 1


class GatedModel(FakeDiffusionModel):
    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def start(self, inputs: SampleInputs) -> FakeRun:
        gate = self.gate

        class GatedRun(FakeRun):
            def advance(self, residuals: Residuals | None) -> None:
                gate.step()
                super().advance(residuals)

        return GatedRun(inputs)


class GatedDiffusion(FakeDiffusion):
    gate = Gate()

    def load(self, name: str) -> FakeDiffusionModel:
        return GatedModel(self.gate)


@pytest.fixture
async def service() -> AsyncIterator[tuple[ModelServer[DiffusionModel], Gate, Metrics, Lane]]:
    config = DiffusionConfig(listen="127.0.0.1:0", backend="fake", drain_grace_seconds=1, max_batch=1)
    backend, lane, metrics = GatedDiffusion(config), Lane("test"), Metrics("diffusion")
    backend.gate = Gate()
    models: LoadedModels[DiffusionModel] = LoadedModels(backend, lane, metrics)
    server = ModelServer(config, metrics, models)
    servicer = DiffusionServicer(config, models, None, metrics)
    server.add(rpc.add_DiffusionServiceServicer_to_server, servicer, "imagemesh.v1.DiffusionService")
    await server.start()
    yield server, backend.gate, metrics, lane
    await server.stop()
    lane.close()


def request(steps: int) -> pb.SampleRequest:
    embeds = to_proto(np.ones((1, 8, 4), dtype=np.float32))
    return pb.SampleRequest(
        model="fake", conditioning={"prompt_embeds": embeds}, width=64, height=64, steps=steps, seeds=[1]
    )


async def until(metrics: Metrics, name: str, value: float) -> None:
    async with asyncio.timeout(20):
        while metrics.registry.get_sample_value(name, {"service": "diffusion"}) != value:
            await asyncio.sleep(0.005)


async def test_at_most_the_step_under_way_is_done_after_a_cancel(
    service: tuple[ModelServer[DiffusionModel], Gate, Metrics, Lane],
) -> None:
    server, gate, metrics, lane = service
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = rpc.DiffusionServiceStub(channel).Sample(request(steps=100))
        gate.tickets.release(3)
        for _ in range(4):  # three steps are done and the fourth is under way
            assert await asyncio.to_thread(gate.entered.acquire, timeout=30)
        call.cancel()
        await until(metrics, "imagemesh_cancelled_requests_total", 1)
        gate.tickets.release(1000)
        await until(metrics, "imagemesh_running_requests", 0)
        # The sampler is free, and does the next request's steps and no other.
        again = rpc.DiffusionServiceStub(channel).Sample(request(steps=3))
        assert [response async for response in again][-1].result.evaluations == 3
        await lane.run(lambda: None)
        assert gate.steps == 4 + 3
        handled = {"grpc_type": "server_stream", "grpc_service": "imagemesh.v1.DiffusionService"}
        handled |= {"grpc_method": "Sample", "grpc_code": "CANCELLED"}
        assert metrics.registry.get_sample_value("grpc_server_handled_total", handled) == 1


async def test_a_deadline_that_passes_is_no_caller_who_went(
    service: tuple[ModelServer[DiffusionModel], Gate, Metrics, Lane],
) -> None:
    server, gate, metrics, _ = service
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            [response async for response in rpc.DiffusionServiceStub(channel).Sample(request(steps=5), timeout=0.5)]
        gate.tickets.release(1000)
        await until(metrics, "imagemesh_running_requests", 0)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert metrics.registry.get_sample_value("imagemesh_cancelled_requests_total", {"service": "diffusion"}) == 0


async def test_a_cancelled_neighbour_in_the_queue_leaves_the_running_one_whole(
    service: tuple[ModelServer[DiffusionModel], Gate, Metrics, Lane],
) -> None:
    server, gate, metrics, _ = service
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = rpc.DiffusionServiceStub(channel)
        running = stub.Sample(request(steps=3))
        assert await asyncio.to_thread(gate.entered.acquire, timeout=30)
        waiting = stub.Sample(request(steps=50))
        assert (await waiting.read()).WhichOneof("event") == "queued"
        waiting.cancel()
        await until(metrics, "imagemesh_cancelled_requests_total", 1)
        gate.tickets.release(3)
        last = [response async for response in running][-1]
    assert last.result.evaluations == 3
    assert gate.steps == 3
