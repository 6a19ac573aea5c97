"""Which windows share a forward, how long a prompt may be, and what happens beside the lane."""

import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest

from imagemesh.v1 import text_encoder_service_pb2 as pb
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.limits import MAX_WINDOWS
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.tensors import Array, from_proto
from imagemesh_services.text_encoder.backend import Encoded, Tokens
from imagemesh_services.text_encoder.backends.fake import WINDOW, FakeTextEncoder, FakeTextModel
from imagemesh_services.text_encoder.config import TextEncoderConfig
from imagemesh_services.text_encoder.servicer import TextEncoderServicer

MOST = MAX_WINDOWS * (WINDOW - 2)  # characters, each a token of the fake's


class Spy(FakeTextModel):
    """Notes the rows of each forward, and the texts that are tokenized and on which threads."""

    def __init__(self) -> None:
        self.forwards: list[int] = []
        self.tokenized: list[str] = []
        self.threads: set[threading.Thread] = set()

    def tokenize(self, text: str) -> Tokens:
        self.tokenized.append(text)
        self.threads.add(threading.current_thread())
        return super().tokenize(text)

    def encode(self, tokens: Array, clip_skip: int) -> Encoded:
        self.forwards.append(len(tokens))
        return super().encode(tokens, clip_skip)


@pytest.fixture
def model() -> Spy:
    return Spy()


@pytest.fixture
async def servicer(model: Spy) -> AsyncIterator[TextEncoderServicer]:
    config, metrics, lane = TextEncoderConfig(backend="fake", max_batch=4), Metrics("text-encoder"), Lane("text")
    models: LoadedModels[FakeTextModel] = LoadedModels(FakeTextEncoder(config), lane, metrics)
    models.backend.load = lambda name: model  # type: ignore[method-assign]
    servicer = TextEncoderServicer(config, models, metrics)
    yield servicer
    await servicer.batcher.close()
    lane.close()


def _request(prompt: str, **fields: str) -> pb.EncodeTextRequest:
    return pb.EncodeTextRequest(model="fake", prompt=prompt, **fields)


async def test_no_forward_is_larger_than_max_batch_and_the_windows_stay_in_order(servicer, model):
    prompt = "abcdefghijklmnopqrstuvwxyz" * 2  # 9 windows
    answer = await servicer.EncodeText(_request(prompt, negative_prompt="no"), None)
    assert model.forwards == [4, 4, 3]  # 9, the negative's, and one of nothing to fill it up with
    for name, text in (("prompt_embeds", prompt), ("negative_prompt_embeds", "no")):
        windows = FakeTextModel().tokenize(text).windows
        padding = np.repeat(FakeTextModel().tokenize("").windows, 9 - len(windows), axis=0)
        wanted = FakeTextModel().encode(np.concatenate([windows, padding]).reshape(1, -1), 0).embeds
        np.testing.assert_array_equal(from_proto(answer.conditioning[name], name), wanted)


async def test_a_prompt_of_the_most_tokens_is_encoded(servicer):
    answer = await servicer.EncodeText(_request("x" * MOST), None)
    assert answer.prompt_tokens == MOST
    assert list(answer.conditioning["prompt_embeds"].shape) == [1, MAX_WINDOWS * WINDOW, 4]


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
async def test_a_longer_prompt_is_refused_by_name_count_and_limit(servicer, model, field):
    prompts = {"prompt": "a fox"} | {field: "x" * (MOST + 1)}
    with pytest.raises(InvalidArgument) as caught:
        await servicer.EncodeText(_request(**prompts), None)
    assert caught.value.field == field
    assert str(caught.value) == f"{field} must be at most {MOST} tokens (32 windows), got '{MOST + 1} tokens'"
    assert model.forwards == []


async def test_each_prompt_is_tokenized_once_beside_the_event_loop(servicer, model):
    await servicer.EncodeText(_request("a fox", negative_prompt="dull"), None)
    assert model.tokenized == ["a fox", "dull"]
    assert threading.current_thread() not in model.threads
