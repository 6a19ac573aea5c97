"""Embeddings are kept by model, text and options, within their bytes, and who is asked for least leaves."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from imagemesh.v1 import text_encoder_service_pb2 as pb
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.lanes import Lane
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.tensors import Array, from_proto
from imagemesh_services.text_encoder.backend import Encoded
from imagemesh_services.text_encoder.backends.fake import WIDTH, WINDOW, FakeTextEncoder, FakeTextModel
from imagemesh_services.text_encoder.cache import Embedded, EmbeddingCache
from imagemesh_services.text_encoder.config import TextEncoderConfig
from imagemesh_services.text_encoder.servicer import TextEncoderServicer

WINDOW_BYTES = WINDOW * WIDTH * 4


def embedded(value: float, windows: int = 1) -> Embedded:
    return Embedded(Encoded(np.full((windows, WINDOW, WIDTH), value, np.float32)), 3)


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, {"service": metrics.service, **labels})
    assert found is not None
    return found


def lookups(metrics: Metrics) -> tuple[float, float]:
    """Hits and misses."""
    name = "imagemesh_embedding_cache_lookups_total"
    return sample(metrics, name, outcome="hit"), sample(metrics, name, outcome="miss")


def test_what_was_used_least_recently_leaves() -> None:
    cache = EmbeddingCache(2 * WINDOW_BYTES, Metrics("text-encoder"))
    cache.put("a", embedded(1))
    cache.put("b", embedded(2))
    assert cache.get("a") is not None
    cache.put("c", embedded(3))
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]


def test_bytes_are_bounded_and_told() -> None:
    metrics = Metrics("text-encoder")
    cache = EmbeddingCache(5 * WINDOW_BYTES, metrics)
    for i in range(20):
        cache.put(i % 7, embedded(i, windows=1 + i % 3))
        assert sample(metrics, "imagemesh_embedding_cache_bytes") <= 5 * WINDOW_BYTES
    kept = [one for i in range(7) if (one := cache.get(i)) is not None]
    assert sum(one.encoded.embeds.nbytes for one in kept) == sample(metrics, "imagemesh_embedding_cache_bytes")


def test_what_is_larger_than_the_room_drives_nobody_out() -> None:
    cache = EmbeddingCache(2 * WINDOW_BYTES, Metrics("text-encoder"))
    cache.put("a", embedded(1))
    cache.put("large", embedded(2, windows=3))
    assert [cache.get(key) is not None for key in ("a", "large")] == [True, False]


def test_without_room_nothing_is_kept() -> None:
    cache = EmbeddingCache(0, Metrics("text-encoder"))
    cache.put("a", embedded(1))
    assert cache.get("a") is None


def test_what_is_kept_is_a_copy_that_nobody_can_change() -> None:
    cache = EmbeddingCache(2 * WINDOW_BYTES, Metrics("text-encoder"))
    given = embedded(1)
    cache.put("a", given)
    given.encoded.embeds[:] = 9
    found = cache.get("a")
    assert found is not None
    assert float(found.encoded.embeds.max()) == 1
    with pytest.raises(ValueError, match="read-only"):
        found.encoded.embeds[:] = 2


def test_hits_and_misses_are_counted() -> None:
    metrics = Metrics("text-encoder")
    cache = EmbeddingCache(WINDOW_BYTES, metrics)
    cache.get("a")
    cache.put("a", embedded(1))
    cache.get("a")
    cache.get("a")
    assert lookups(metrics) == (2, 1)


class Spy(FakeTextModel):
    """Counts the rows of its forwards."""

    rows = 0

    def encode(self, tokens: Array, clip_skip: int) -> Encoded:
        self.rows += len(tokens)
        return super().encode(tokens, clip_skip)


@asynccontextmanager
async def serving(model: Spy, cache_bytes: int) -> AsyncIterator[tuple[TextEncoderServicer, Metrics]]:
    config, metrics = TextEncoderConfig(backend="fake", cache_bytes=cache_bytes), Metrics("text-encoder")
    lane = Lane("text")
    models: LoadedModels[FakeTextModel] = LoadedModels(FakeTextEncoder(config), lane, metrics)
    models.backend.load = lambda name: model  # type: ignore[method-assign]
    servicer = TextEncoderServicer(config, models, metrics)
    yield servicer, metrics
    await servicer.batcher.close()
    lane.close()


def request(prompt: str, **fields: object) -> pb.EncodeTextRequest:
    return pb.EncodeTextRequest(model="fake", prompt=prompt, **fields)  # type: ignore[arg-type]


def arrays(answer: pb.EncodeTextResponse) -> dict[str, list]:
    return {name: from_proto(tensor, name).tolist() for name, tensor in answer.conditioning.items()}


async def test_who_asks_again_gets_the_same_without_a_forward() -> None:
    model = Spy()
    async with serving(model, 1 << 20) as (servicer, metrics):
        first = await servicer.EncodeText(request("a (fox:1.5)", negative_prompt="dull"), None)
        rows = model.rows
        again = await servicer.EncodeText(request("a (fox:1.5)", negative_prompt="dull"), None)
        assert (model.rows, lookups(metrics)) == (rows, (2, 2))
    assert arrays(again) == arrays(first)
    assert again.prompt_tokens == first.prompt_tokens == 5


async def test_a_new_prompt_beside_a_known_negative_costs_its_own_windows() -> None:
    model = Spy()
    async with serving(model, 1 << 20) as (servicer, _):
        await servicer.EncodeText(request("a fox", negative_prompt="dull"), None)
        await servicer.EncodeText(request("a cat", negative_prompt="dull"), None)
    assert model.rows == 3


@pytest.mark.parametrize(
    "other", [{"clip_skip": 1}, {"literal": True}, {"prompt": "a (cat:1.2)"}], ids=lambda fields: next(iter(fields))
)
async def test_other_options_are_other_embeddings(other: dict) -> None:
    model = Spy()
    async with serving(model, 1 << 20) as (servicer, metrics):
        first = await servicer.EncodeText(request("a (fox:1.2)"), None)
        second = await servicer.EncodeText(request(**{"prompt": "a (fox:1.2)", **other}), None)
        assert lookups(metrics)[0] == 0
    assert arrays(first) != arrays(second)


async def test_another_model_s_embeddings_are_never_taken() -> None:
    model = Spy()
    async with serving(model, 1 << 20) as (servicer, metrics):
        await servicer.EncodeText(request("a fox"), None)
        model.fingerprint = "other weights"
        await servicer.EncodeText(request("a fox"), None)
        assert lookups(metrics) == (0, 2)
    assert model.rows == 2


async def test_weights_reach_the_tokens_they_are_of() -> None:
    async with serving(Spy(), 0) as (servicer, _):
        answer = await servicer.EncodeText(request("a(b:2)"), None)
    tokens = np.array([1, 97, 98, 2, 2, 2, 2, 2]) / 256
    weighed = tokens * [1, 1, 2, 1, 1, 1, 1, 1]
    wanted = weighed * (tokens.mean() / weighed.mean())
    np.testing.assert_allclose(arrays(answer)["prompt_embeds"], np.repeat(wanted[None, :, None], 4, -1), rtol=1e-5)


async def test_break_fills_up_its_window() -> None:
    async with serving(Spy(), 0) as (servicer, _):
        answer = await servicer.EncodeText(request("a BREAK b", negative_prompt="c"), None)
    both = np.array([[1, 97, 2, 2, 2, 2, 2, 2, 1, 98, 2, 2, 2, 2, 2, 2]]) / 256
    negative = np.array([[1, 99, 2, 2, 2, 2, 2, 2, 1, 2, 2, 2, 2, 2, 2, 2]]) / 256
    np.testing.assert_allclose(np.array(arrays(answer)["prompt_embeds"])[..., 0], both, rtol=1e-6)
    np.testing.assert_allclose(np.array(arrays(answer)["negative_prompt_embeds"])[..., 0], negative, rtol=1e-6)


async def test_a_prompt_that_changes_has_a_row_a_phase_and_says_which_step_has_which() -> None:
    async with serving(Spy(), 0) as (servicer, _):
        answer = await servicer.EncodeText(request("[a:b:2]", negative_prompt="[c|d]", steps=3), None)
    told = arrays(answer)
    assert answer.scheduled
    assert [told["prompt_phases"], told["negative_prompt_phases"]] == [[0, 0, 1], [0, 1, 0]]
    columns = {name: np.array(told[f"{name}_embeds"])[:, 1, 0] * 256 for name in ("prompt", "negative_prompt")}
    np.testing.assert_allclose(columns["prompt"], [97, 98], rtol=1e-5)
    np.testing.assert_allclose(columns["negative_prompt"], [99, 100], rtol=1e-5)


async def test_a_prompt_that_does_not_change_in_these_steps_has_one_row() -> None:
    async with serving(Spy(), 0) as (servicer, _):
        answer = await servicer.EncodeText(request("[a:b:9]", steps=3), None)
    assert answer.scheduled
    assert set(answer.conditioning) == {"prompt_embeds"}
    assert list(answer.conditioning["prompt_embeds"].shape) == [1, WINDOW, WIDTH]


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"prompt": "[a:b:0.5]"}, "steps", "at least 1, since prompt changes"),
        ({"prompt": "x", "negative_prompt": "(y:12)"}, "negative_prompt", "weight of 12 at character 3"),
        ({"prompt": "[" + "abcdefghijklm " * 10 + "|a|b|c|d|e|f]", "steps": 20}, "prompt", "at most 128 windows"),
        ({"prompt": "x", "steps": 1001}, "steps", "0 to 1000"),
        ({"prompt": "x", "prior_steps": 1001}, "prior_steps", "0 to 1000"),
    ],
)
async def test_what_can_not_be_is_named(fields: dict, field: str, message: str) -> None:
    model = Spy()
    async with serving(model, 0) as (servicer, _):
        with pytest.raises(InvalidArgument, match=message) as caught:
            await servicer.EncodeText(request(**fields), None)
    assert caught.value.field == field
    assert model.rows == 0
