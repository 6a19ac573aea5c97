"""Many pictures in one request: taken or refused as a whole."""

import asyncio
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest

from imagemesh.v1 import vae_service_pb2 as pb
from imagemesh_runtime.errors import Overloaded
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.parcels import Parcel
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.tensors import Array, to_proto
from imagemesh_services.vae.backend import MemoryOptions
from imagemesh_services.vae.backends.fake import FakeVae, FakeVaeModel
from imagemesh_services.vae.config import VaeConfig
from imagemesh_services.vae.servicer import VaeServicer


class Slow(FakeVaeModel):
    """Notes the pictures of each forward, by their first latent; forwards wait for ``release``."""

    def __init__(self) -> None:
        self.forwards: list[list[float]] = []
        self.release = threading.Event()
        self.begun = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def decode(self, latents: Array, memory: MemoryOptions) -> Array:
        self.forwards.append(latents[:, 0, 0, 0].tolist())
        self._loop.call_soon_threadsafe(self.begun.set)
        assert self.release.wait(60)
        return super().decode(latents, memory)


@pytest.fixture
async def model() -> Slow:
    return Slow()


@pytest.fixture
async def servicer(model: Slow) -> AsyncIterator[VaeServicer]:
    config, metrics, lane = VaeConfig(backend="fake", max_batch=2, max_queue=2), Metrics("vae"), Lane("vae")
    models: LoadedModels[FakeVaeModel] = LoadedModels(FakeVae(config), lane, metrics)
    models.backend.load = lambda name: model  # type: ignore[method-assign]
    await models.get("fake")
    servicer = VaeServicer(config, models, metrics)
    yield servicer
    model.release.set()
    await servicer.batcher.close()
    lane.close()


async def begin(servicer: VaeServicer, *pictures: float) -> asyncio.Task[Parcel[pb.DecodeLatentsResponse]]:
    """The task of a request for such pictures, which has come as far as it can when this returns."""
    latents = np.array(pictures, np.float32).reshape(-1, 1, 1, 1).repeat(4, axis=1)
    request = pb.DecodeLatentsRequest(model="fake", latents=to_proto(latents))
    task = asyncio.create_task(servicer.DecodeLatents(request, None))
    await asyncio.sleep(0)
    return task


async def test_a_request_of_more_parts_than_the_queue_has_places_is_served(servicer, model):
    model.release.set()
    answer = await (await begin(servicer, *range(9)))
    assert list(answer.message.images.shape) == [9, 8, 8, 3]
    assert model.forwards == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


async def test_a_refused_request_decodes_nothing(servicer, model):
    tasks = [await begin(servicer, 1)]
    await model.begun.wait()
    tasks += [await begin(servicer, 2, 2, 2), await begin(servicer, 3, 3, 3)]
    with pytest.raises(Overloaded):
        await (await begin(servicer, 9, 9, 9, 9, 9))
    model.release.set()
    await asyncio.gather(*tasks)
    assert sorted(picture for forward in model.forwards for picture in forward) == [1, 2, 2, 2, 3, 3, 3]


async def test_a_caller_who_goes_takes_the_rest_of_its_pictures_along(servicer, model):
    task = await begin(servicer, *range(9))
    await model.begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    model.release.set()
    await (await begin(servicer, 20))
    assert model.forwards == [[0, 1], [20]]
    assert servicer._metrics.registry.get_sample_value("imagemesh_cancelled_requests_total", {"service": "vae"}) == 1
