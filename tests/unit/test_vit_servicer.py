"""Which pictures share a forward, and what happens beside the lane."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np
import pytest

from imagemesh.v1 import image_pb2
from imagemesh.v1 import vit_service_pb2 as pb
from imagemesh_runtime.errors import Overloaded
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.tensors import from_proto, to_proto
from imagemesh_services.vit.backends.fake import FakeVit, FakeVitModel
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.servicer import VitServicer


class Spy(FakeVitModel):
    """Notes the rows of each forward and the threads of preprocessing; its first forward waits for ``release``."""

    def __init__(self) -> None:
        self.forwards: list[tuple[str, int]] = []
        self.threads: set[str] = set()
        self.release = threading.Event()
        self.begun = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def preprocess(self, image, size=0):
        self.threads.add(threading.current_thread().name)
        return super().preprocess(image)

    def classify(self, pixels):
        self.forwards.append(("classify", len(pixels)))
        self._loop.call_soon_threadsafe(self.begun.set)
        self.release.wait()
        return super().classify(pixels)

    def embed(self, pixels, wanted):
        self.forwards.append((f"{wanted.pooling.value} {bool(wanted.layers)}", len(pixels)))
        return super().embed(pixels, wanted)


@dataclass
class Room:
    servicer: VitServicer
    model: Spy
    submitted: asyncio.Semaphore

    async def together(self, *calls):
        """The answers of calls that all arrive while the lane is busy with a first one."""
        first = asyncio.create_task(self.servicer.ClassifyImages(_classify(0), None))
        await self.model.begun.wait()
        tasks = [asyncio.create_task(call) for call in calls]
        for _ in (first, *tasks):
            await self.submitted.acquire()
        self.model.release.set()
        answers = await asyncio.gather(*tasks)
        await first
        assert self.model.forwards.pop(0) == ("classify", 1)
        return answers


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    config, metrics, lane = VitConfig(backend="fake", max_batch=4), Metrics("vit"), Lane("vit")
    models: LoadedModels[FakeVitModel] = LoadedModels(FakeVit(config), lane, metrics)
    model = Spy()
    models.backend.load = lambda name: model  # type: ignore[method-assign]
    await models.get("fake")
    servicer = VitServicer(config, models, metrics)
    submitted = asyncio.Semaphore(0)
    submit_all = servicer.batcher.submit_all

    async def noting_submit_all(*args):
        submitted.release()
        return await submit_all(*args)

    servicer.batcher.submit_all = noting_submit_all  # type: ignore[method-assign]
    yield Room(servicer, model, submitted)
    await servicer.close()
    lane.close()


def _image(level: int, size: int = 4) -> image_pb2.Image:
    return image_pb2.Image(pixels=to_proto(np.full((size, size, 3), level, np.uint8)))


def _classify(*levels: int) -> pb.ClassifyImagesRequest:
    return pb.ClassifyImagesRequest(model="fake", images=[_image(level, 4 + level) for level in levels])


def _embed(*levels: int, **fields: int) -> pb.EmbedImagesRequest:
    return pb.EmbedImagesRequest(model="fake", images=[_image(level) for level in levels], **fields)


async def test_pictures_of_several_callers_and_sizes_share_a_forward(room):
    answers = await room.together(*(room.servicer.ClassifyImages(_classify(level), None) for level in (51, 102, 204)))
    assert room.model.forwards == [("classify", 3)]
    logits = [answer.classifications[0].predictions[0].logit for answer in answers]
    np.testing.assert_allclose(logits, [0.2, 0.4, 0.8], atol=1e-6)


async def test_a_forward_has_no_more_rows_than_max_batch(room):
    requests = [_classify(1, 2), _classify(3, 4), _classify(5)]
    answers = await room.together(*(room.servicer.ClassifyImages(request, None) for request in requests))
    assert room.model.forwards == [("classify", 4), ("classify", 1)]
    assert [len(answer.classifications) for answer in answers] == [2, 2, 1]


async def test_verbs_poolings_and_hidden_states_do_not_mix(room):
    embed = room.servicer.EmbedImages
    await room.together(
        room.servicer.ClassifyImages(_classify(1), None),
        embed(_embed(1), None),
        embed(_embed(1, pooling=pb.POOLING_CLS), None),
        embed(_embed(1, pooling=pb.POOLING_MEAN), None),
        embed(_embed(1, hidden_states=1), None),
    )
    assert sorted(room.model.forwards) == [("classify", 1), ("cls False", 2), ("cls True", 1), ("mean False", 1)]


async def test_each_caller_gets_the_hidden_states_of_its_own_pictures(room):
    requests = [_embed(51, hidden_states=1), _embed(102, 204, hidden_states=1)]
    one, two = await room.together(*(room.servicer.EmbedImages(request, None) for request in requests))
    assert room.model.forwards == [("cls True", 3)]
    assert list(one.hidden_states.shape) == [2, 1, 2, 3]
    assert list(two.hidden_states.shape) == [2, 2, 2, 3]


async def test_preprocessing_does_not_wait_for_the_lane(room):
    await room.together(room.servicer.ClassifyImages(_classify(1), None))
    assert room.model.threads
    assert not any(name.startswith("lane-") for name in room.model.threads)


async def test_a_request_of_many_pictures_is_cut_into_forwards_of_max_batch(room):
    room.model.release.set()
    answer = await room.servicer.ClassifyImages(_classify(*range(10)), None)
    assert room.model.forwards == [("classify", 4), ("classify", 4), ("classify", 2)]
    logits = [one.predictions[0].logit for one in answer.classifications]
    np.testing.assert_allclose(logits, np.arange(10) / 255, atol=1e-6)


async def test_hidden_states_of_many_pictures_come_in_their_order(room):
    answer = await room.servicer.EmbedImages(_embed(*range(6), hidden_states=1), None)
    assert room.model.forwards == [("cls True", 4), ("cls True", 2)]
    states = from_proto(answer.hidden_states, "hidden_states")
    np.testing.assert_allclose(states[1, :, 0, 0], np.arange(6) / 255, atol=1e-6)


class Decoding(FakeVitModel):
    """Counts how many pictures are being preprocessed; each waits for a permit."""

    def __init__(self) -> None:
        self.now = self.most = self.done = 0
        self.begun = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)
        self._turn = threading.Lock()

    def preprocess(self, image, size=0):
        with self._turn:
            self.now += 1
            self.most = max(self.most, self.now)
        self.begun.release()
        assert self.permits.acquire(timeout=60)
        with self._turn:
            self.now -= 1
            self.done += 1
        return super().preprocess(image)


@pytest.fixture
async def decoding() -> AsyncIterator[tuple[VitServicer, Decoding]]:
    config, metrics, lane = VitConfig(backend="fake", max_queue=5, max_decoding=2), Metrics("vit"), Lane("vit")
    models: LoadedModels[FakeVitModel] = LoadedModels(FakeVit(config), lane, metrics)
    model = Decoding()
    models.backend.load = lambda name: model  # type: ignore[method-assign]
    await models.get("fake")
    servicer = VitServicer(config, models, metrics)
    yield servicer, model
    model.permits.release(100)
    await servicer.close()
    lane.close()


async def _begin(servicer: VitServicer, count: int) -> list[asyncio.Task[pb.ClassifyImagesResponse]]:
    tasks = [asyncio.create_task(servicer.ClassifyImages(_classify(1), None)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_few_pictures_are_decoded_at_a_time_also_when_callers_leave(decoding):
    servicer, model = decoding
    tasks = await _begin(servicer, 5)
    for _ in range(2):
        assert await asyncio.to_thread(model.begun.acquire, timeout=60)
    for task in tasks[:2]:
        task.cancel()
    await asyncio.gather(*tasks[:2], return_exceptions=True)
    tasks += await _begin(servicer, 2)
    model.permits.release(100)
    await asyncio.gather(*tasks[2:])
    assert (model.most, model.done) == (2, 7)


async def test_a_full_queue_refuses_before_decoding(decoding):
    servicer, model = decoding
    tasks = await _begin(servicer, 5)
    with pytest.raises(Overloaded):
        await servicer.ClassifyImages(_classify(1), None)
    model.permits.release(100)
    await asyncio.gather(*tasks)
    assert model.done == 5


async def test_what_was_accepted_before_a_model_is_replaced_or_dropped_ends_with_the_old_one(room):
    models = room.servicer._models

    class Inverted(FakeVitModel):
        def classify(self, pixels):
            return -super().classify(pixels)

    first = asyncio.create_task(room.servicer.ClassifyImages(_classify(51), None))
    await room.model.begun.wait()
    waiting = asyncio.create_task(room.servicer.ClassifyImages(_classify(102), None))
    for _ in range(2):
        await room.submitted.acquire()
    models.backend.load = lambda name: Inverted()
    assert await models.unload("fake") is True
    later = asyncio.create_task(room.servicer.ClassifyImages(_classify(204), None))
    room.model.release.set()
    answers = await asyncio.gather(first, waiting, later)
    logits = [max(abs(one.logit) for one in answer.classifications[0].predictions) for answer in answers]
    np.testing.assert_allclose(logits, [0.2, 0.4, 0.8], atol=1e-6)
    assert [answer.classifications[0].predictions[-1].logit < -0.1 for answer in answers] == [False, False, True]
    assert room.model.forwards == [("classify", 1), ("classify", 1)]


async def test_a_model_that_nobody_uses_any_more_is_not_kept_in_memory(room):
    room.model.release.set()
    models = room.servicer._models
    models.backend.load = lambda name: FakeVitModel()
    await models.unload("fake")
    await room.servicer.ClassifyImages(_classify(51), None)
    seen = weakref.ref(models.in_memory("fake"))
    await models.unload("fake")
    gc.collect()
    assert seen() is None
