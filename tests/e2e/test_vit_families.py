"""Every architecture over a real channel equals transformers on the same folder; what one can't do is refused."""

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from imagemesh.v1 import image_pb2, tensor_pb2
from imagemesh.v1 import vit_service_pb2 as pb
from imagemesh.v1 import vit_service_pb2_grpc as rpc
from imagemesh_runtime.tensors import from_proto, to_proto
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.service import create
from tests.support.pictures import scene
from tests.support.services import serving
from tests.support.tiny_vision import BUILDERS, build_classifiers

CLOSE = 1e-4
SCENES = [scene(), scene(91, 37), 255 - scene(64, 64)]
IMAGES = [image_pb2.Image(pixels=to_proto(one)) for one in SCENES]
EMBEDDING = [name for name in BUILDERS if name != "resnet"]
PREFIX = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2-registers": 4, "swin": 0}  # tokens before the first patch
OTHER_SIZES = ["vit", "deit", "dinov2", "dinov2-registers"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_classifiers(tmp_path_factory.mktemp("classifiers"))


@pytest.fixture
async def vit(repository: Path) -> AsyncIterator[rpc.VitServiceStub]:
    config = VitConfig(listen="127.0.0.1:0", backend="torch", models=str(repository), device="cpu", threads=2)
    async with serving(create, config) as served:
        yield rpc.VitServiceStub(served.channel)


class Reference:
    """transformers itself; ``sizes`` override the processor's."""

    def __init__(self, path: Path, attention: str = "sdpa", **sizes: Any) -> None:
        options = {} if "resnet" in path.name or "convnext" in path.name else {"attn_implementation": attention}
        self.model = AutoModelForImageClassification.from_pretrained(path, **options).eval()
        processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        pictures = [Image.fromarray(one) for one in SCENES]
        self.pixels = processor(pictures, return_tensors="pt", **sizes)["pixel_values"]

    @torch.inference_mode()
    def __call__(self, **options: bool) -> Any:
        return self.model(self.pixels, **options)

    @torch.inference_mode()
    def base(self, **options: bool) -> Any:
        return self.model.base_model(self.pixels, **options)


def resized(name: str, side: int) -> dict[str, Any]:
    """The processor's sizes for pictures of that side, as a user of transformers would write them."""
    square = {"height": side, "width": side}
    if name == "deit":
        return {"size": {"height": side * 5 // 4, "width": side * 5 // 4}, "crop_size": square}
    if name.startswith("dinov2"):
        return {"size": {"shortest_edge": side * 9 // 8}, "crop_size": square}
    return {"size": square}


async def embedded(vit: rpc.VitServiceStub, model: str, **fields: Any) -> pb.EmbedImagesResponse:
    return await vit.EmbedImages(pb.EmbedImagesRequest(model=model, images=IMAGES, **fields))


async def logits(vit: rpc.VitServiceStub, model: str, **fields: Any) -> np.ndarray:
    answer = await vit.ClassifyImages(pb.ClassifyImagesRequest(model=model, images=IMAGES, top_k=1000, **fields))
    rows = [sorted(one.predictions, key=lambda found: found.index) for one in answer.classifications]
    return np.array([[found.logit for found in row] for row in rows])


@pytest.mark.parametrize("name", BUILDERS)
async def test_logits_equal_transformers(vit, repository, name):
    np.testing.assert_allclose(await logits(vit, name), Reference(repository / name)().logits, atol=CLOSE)


@pytest.mark.parametrize("name", EMBEDDING)
async def test_mean_pooling_is_the_mean_of_the_patches_after_the_final_norm(vit, repository, name):
    vectors = from_proto((await embedded(vit, name, pooling=pb.POOLING_MEAN)).embeddings, "embeddings")
    output = Reference(repository / name).base()
    wanted = output.pooler_output if name == "convnext" else output.last_hidden_state[:, PREFIX[name] :].mean(dim=1)
    np.testing.assert_allclose(vectors, wanted, atol=CLOSE)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov2-registers"])
async def test_cls_pooling_is_the_class_token_after_the_final_norm(vit, repository, name):
    vectors = from_proto((await embedded(vit, name)).embeddings, "embeddings")
    np.testing.assert_allclose(vectors, Reference(repository / name).base().last_hidden_state[:, 0], atol=CLOSE)


@pytest.mark.parametrize("name", EMBEDDING)
async def test_each_hidden_state_equals_transformers(vit, repository, name):
    wanted = Reference(repository / name).base(output_hidden_states=True).hidden_states
    for i, one in enumerate(wanted):
        flat = one.flatten(2).transpose(1, 2) if one.ndim == 4 else one
        for layer in (i, i - len(wanted)):
            states = from_proto((await embedded(vit, name, layers=[layer])).hidden_states, "hidden_states")
            np.testing.assert_allclose(states, flat[None], atol=CLOSE)


@pytest.mark.parametrize("name", OTHER_SIZES)
@pytest.mark.parametrize("size", [16, 48])
async def test_other_sizes_than_trained_equal_transformers(vit, repository, name, size):
    options = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
    reference = Reference(repository / name, **resized(name, size))
    assert reference.pixels.shape[-2:] == (size, size)
    np.testing.assert_allclose(await logits(vit, name, size=size), reference(**options).logits, atol=CLOSE)
    vectors = from_proto((await embedded(vit, name, size=size, pooling=pb.POOLING_MEAN)).embeddings, "embeddings")
    last = reference.base(**options).last_hidden_state
    np.testing.assert_allclose(vectors, last[:, PREFIX[name] :].mean(dim=1), atol=CLOSE)


async def test_convolutions_take_larger_pictures(vit, repository):
    reference = Reference(repository / "convnext", size={"shortest_edge": 64})
    np.testing.assert_allclose(await logits(vit, "convnext", size=64), reference().logits, atol=CLOSE)


async def test_the_trained_size_asked_for_is_the_usual_one(vit):
    np.testing.assert_array_equal(await logits(vit, "vit", size=32), await logits(vit, "vit"))


def by_hand(attentions: list[np.ndarray]) -> np.ndarray:
    """Abnar and Zuidema's rollout, written anew in numpy."""
    rolled = np.eye(attentions[0].shape[-1])
    for layer in attentions:
        mixed = 0.5 * layer.mean(axis=0) + 0.5 * np.eye(layer.shape[-1])
        rolled = (mixed / mixed.sum(axis=-1, keepdims=True)) @ rolled
    return rolled


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2-registers"])
async def test_attention_map_is_the_rollout_of_the_models_attention(vit, repository, name):
    answer = await embedded(vit, name, attention_maps=True)
    attentions = Reference(repository / name, "eager").base(output_attentions=True).attentions
    for i, png in enumerate(answer.attention_maps):
        row = by_hand([layer[i].double().numpy() for layer in attentions])[0, PREFIX[name] :].reshape(4, 4)
        grey = np.rint(row * 255 / row.max()).astype(np.uint8)
        wanted = Image.fromarray(grey).resize((32, 32), Image.Resampling.BILINEAR)
        got = Image.open(io.BytesIO(png))
        assert (got.mode, got.size) == ("L", (32, 32))
        assert np.abs(np.asarray(got, int) - np.asarray(wanted, int)).max() <= 1


@pytest.mark.parametrize("normalize", [False, True])
async def test_8_bit_vectors_are_within_half_a_step(vit, normalize):
    exact = from_proto((await embedded(vit, "vit", normalize=normalize)).embeddings, "embeddings")
    answer = await embedded(vit, "vit", normalize=normalize, dtype=tensor_pb2.DTYPE_INT8)
    vectors = from_proto(answer.embeddings, "embeddings", dtypes=["int8"]).astype(np.float32)
    scales = from_proto(answer.scales, "scales", dtypes=["float32"], shape=(3,))[:, None]
    assert (np.abs(vectors * scales - exact) <= scales * 0.501).all()
    assert (np.abs(vectors).max(axis=1) == 127).all()


async def test_16_bit_vectors_and_hidden_states_are_the_same_rounded(vit):
    exact = await embedded(vit, "vit", hidden_states=True)
    answer = await embedded(vit, "vit", hidden_states=True, dtype=tensor_pb2.DTYPE_FP16)
    for name in ("embeddings", "hidden_states"):
        half, full = (from_proto(getattr(one, name), name) for one in (answer, exact))
        assert half.dtype == np.float16
        np.testing.assert_allclose(half, full, rtol=1e-3, atol=1e-3)
    assert not answer.HasField("scales")


REFUSED = {
    "class token of a model without one": ("swin", {"pooling": pb.POOLING_CLS}, "pooling.*no class token"),
    "attention of convolutions": ("convnext", {"attention_maps": True}, "attention_maps"),
    "hidden states of several shapes": ("swin", {"hidden_states": True}, r"layers.*\[64, 16\]"),
    "size of half a patch": ("vit", {"size": 36}, "size.*multiple of 8"),
    "other size for windows": ("swin", {"size": 48}, "size must be 0, 32 for"),
    "size past the limit": ("dinov2", {"size": 2048}, "size.*1024"),
}


@pytest.mark.parametrize(("name", "fields", "said"), REFUSED.values(), ids=REFUSED)
async def test_what_an_architecture_can_not_do_is_refused_in_its_words(vit, name, fields, said):
    with pytest.raises(grpc.aio.AioRpcError, match=said) as caught:
        await embedded(vit, name, **fields)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_architecture_whose_states_are_not_known_only_classifies(vit):
    with pytest.raises(grpc.aio.AioRpcError, match="resnet only classifies") as caught:
        await embedded(vit, "resnet")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
