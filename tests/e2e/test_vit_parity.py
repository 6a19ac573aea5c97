"""The ViT service over a real channel equals transformers on the same folder."""

import asyncio
import io
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from imagemesh.v1 import image_pb2
from imagemesh.v1 import vit_service_pb2 as pb
from imagemesh.v1 import vit_service_pb2_grpc as rpc
from imagemesh_runtime.tensors import from_proto, to_proto
from imagemesh_services.vit.backend import BACKENDS
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.service import create
from tests.support.backends import load_first
from tests.support.pictures import encoded, rotated_jpeg, scene
from tests.support.services import serving
from tests.support.tiny_models import LABELS, build_deit

CLOSE = 1e-4
SCENES = [scene(), scene(91, 37), 255 - scene(224, 224), scene(3, 50), scene(32, 32)[::-1]]


class Reference:
    """transformers itself."""

    def __init__(self, path: Path) -> None:
        self.processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        self.model = AutoModelForImageClassification.from_pretrained(path).eval()

    def pixels(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        return self.processor([Image.fromarray(one) for one in pictures], return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> Any:
        return self.model(self.pixels(pictures), output_hidden_states=True)


@pytest.fixture(scope="session")
def repository(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vits")
    (root / "tiny-vit").symlink_to(models / "tiny-vit")
    build_deit(root / "tiny-deit")
    return root


@pytest.fixture(scope="module", params=["tiny-vit", "tiny-deit"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(repository: Path, name: str) -> Reference:
    return Reference(repository / name)


@pytest.fixture
async def vit(repository: Path) -> AsyncIterator[rpc.VitServiceStub]:
    config = VitConfig(listen="127.0.0.1:0", backend="torch", models=str(repository), device="cpu", threads=2)
    async with serving(create, config) as served:
        yield rpc.VitServiceStub(served.channel)


def _raw(picture: np.ndarray) -> image_pb2.Image:
    return image_pb2.Image(pixels=to_proto(picture))


def _file(data: bytes) -> image_pb2.Image:
    return image_pb2.Image(encoded=data)


async def _logits(vit: rpc.VitServiceStub, model: str, *images: image_pb2.Image) -> np.ndarray:
    """All logits, in the order of the head."""
    answer = await vit.ClassifyImages(pb.ClassifyImagesRequest(model=model, images=images, top_k=1000))
    rows = [sorted(one.predictions, key=lambda found: found.index) for one in answer.classifications]
    return np.array([[found.logit for found in row] for row in rows])


async def _embed(vit: rpc.VitServiceStub, model: str, **request: Any) -> tuple[np.ndarray, np.ndarray | None]:
    images = [_raw(one) for one in SCENES]
    answer = await vit.EmbedImages(pb.EmbedImagesRequest(model=model, images=images, **request))
    states = from_proto(answer.hidden_states, "hidden_states") if answer.HasField("hidden_states") else None
    return from_proto(answer.embeddings, "embeddings"), states


def test_preprocessed_pixels_equal_the_processors(repository: Path):
    model = load_first(BACKENDS, "torch", VitConfig, repository)  # tiny-deit: resized, cropped, scaled, normalised
    wanted = Reference(repository / "tiny-deit").pixels(SCENES)
    np.testing.assert_array_equal(np.stack([model.preprocess(one) for one in SCENES]), wanted)


async def test_logits_of_raw_pixels_equal_transformers(vit, name, reference):
    got = await _logits(vit, name, *map(_raw, SCENES))
    np.testing.assert_allclose(got, reference(SCENES).logits, atol=CLOSE)


async def test_logits_of_png_files_equal_transformers(vit, name, reference):
    got = await _logits(vit, name, *(_file(encoded(one)) for one in SCENES))
    np.testing.assert_allclose(got, reference(SCENES).logits, atol=CLOSE)


async def test_all_hidden_states_equal_transformers(vit, name, reference):
    _, states = await _embed(vit, name, hidden_states=True)
    wanted = reference(SCENES).hidden_states
    assert states is not None
    assert len(states) == len(wanted) == 4
    for got, one in zip(states, wanted, strict=True):
        np.testing.assert_allclose(got, one, atol=CLOSE)


async def test_hidden_states_stay_away_unless_asked_for(vit, name):
    _, states = await _embed(vit, name)
    assert states is None


@pytest.mark.parametrize("pooling", [pb.POOLING_UNSPECIFIED, pb.POOLING_CLS])
async def test_cls_pooling_is_the_class_token_after_the_final_layer_norm(vit, name, reference, pooling):
    vectors, _ = await _embed(vit, name, pooling=pooling)
    np.testing.assert_allclose(vectors, _final(reference)[:, 0], atol=CLOSE)


async def test_mean_pooling_is_the_mean_of_the_patch_tokens_after_the_final_layer_norm(vit, name, reference):
    vectors, _ = await _embed(vit, name, pooling=pb.POOLING_MEAN)
    patches = (32 // 8) ** 2  # DeiT's distillation token, beside the class token, is no patch
    np.testing.assert_allclose(vectors, _final(reference)[:, -patches:].mean(dim=1), atol=CLOSE)


async def test_normalized_vectors_have_length_one_and_their_direction(vit, name):
    plain, _ = await _embed(vit, name)
    unit, _ = await _embed(vit, name, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(unit * np.linalg.norm(plain, axis=1, keepdims=True), plain, atol=CLOSE)


def _final(reference: Reference) -> torch.Tensor:
    base = reference.model.base_model
    with torch.inference_mode():
        return base.layernorm(reference(SCENES).hidden_states[-1])


async def test_predictions_are_softmax_best_first(vit, name, reference):
    answer = await vit.ClassifyImages(pb.ClassifyImagesRequest(model=name, images=[_raw(SCENES[0])]))
    probabilities = torch.softmax(reference(SCENES[:1]).logits[0], dim=0)
    best = probabilities.topk(5)
    got = answer.classifications[0].predictions
    assert [one.index for one in got] == best.indices.tolist()
    assert [one.label for one in got] == [LABELS[i] for i in best.indices]
    np.testing.assert_allclose([one.probability for one in got], best.values, atol=CLOSE)


@pytest.mark.parametrize(("top_k", "count"), [(0, 5), (1, 1), (3, 3), (10, 10), (2**32 - 1, 10)])
async def test_top_k_counts_labels(vit, top_k, count):
    request = pb.ClassifyImagesRequest(model="tiny-vit", images=[_raw(SCENES[0])], top_k=top_k)
    answer = await vit.ClassifyImages(request)
    assert len(answer.classifications[0].predictions) == count


@pytest.mark.parametrize("threshold", [0.0, 0.08, 0.12, 1.0])
async def test_threshold_leaves_out_what_is_less_probable(vit, name, reference, threshold):
    request = pb.ClassifyImagesRequest(model=name, images=[_raw(SCENES[0])], top_k=10, threshold=threshold)
    answer = await vit.ClassifyImages(request)
    probabilities = torch.softmax(reference(SCENES[:1]).logits[0], dim=0)
    wanted = {i for i, probability in enumerate(probabilities.tolist()) if probability >= threshold}
    assert {one.index for one in answer.classifications[0].predictions} == wanted


async def test_answers_name_model_and_backend(vit):
    images = [_raw(SCENES[0])]
    classified = await vit.ClassifyImages(pb.ClassifyImagesRequest(model="tiny-vit", images=images))
    embedded = await vit.EmbedImages(pb.EmbedImagesRequest(model="tiny-vit", images=images))
    assert {(one.model, one.backend) for one in (classified, embedded)} == {("tiny-vit", "torch")}


async def test_jpeg_is_turned_as_its_exif_says(vit, reference, name):
    data = rotated_jpeg(SCENES[0])
    got = await _logits(vit, name, _file(data))
    upright = np.asarray(Image.open(io.BytesIO(data)).transpose(Image.Transpose.ROTATE_270))
    assert upright.shape == SCENES[0].shape
    np.testing.assert_allclose(got, reference([upright]).logits, atol=CLOSE)
    # Had it not been turned, the answer would be another.
    assert np.abs(got - await _logits(vit, name, _raw(np.rot90(upright)))).max() > 0.01


async def test_transparent_pixels_are_laid_over_white(vit, reference, name):
    alpha = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))
    got = await _logits(vit, name, _file(encoded(np.dstack([SCENES[0], alpha]))))
    weight = alpha[..., None] / 255
    over_white = np.round(SCENES[0] * weight + 255 * (1 - weight)).astype(np.uint8)
    # Pillow may round a pixel the other way.
    np.testing.assert_allclose(got, reference([over_white]).logits, atol=0.02)
    assert np.abs(got - await _logits(vit, name, _raw(SCENES[0]))).max() > 0.05


async def test_palette_with_a_transparent_colour_is_laid_over_white(vit, reference, name):
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 200, 10, 30])
    picture.paste(0, (0, 0, 4, 8))
    got = await _logits(vit, name, _file(encoded(picture, transparency=0)))
    flat = np.full((8, 8, 3), 255, np.uint8)
    flat[:, 4:] = (200, 10, 30)
    np.testing.assert_allclose(got, reference([flat]).logits, atol=CLOSE)


async def test_16_bit_grey_png_is_scaled_not_clipped(vit, reference, name):
    grey = SCENES[0][..., 0]
    got = await _logits(vit, name, _file(encoded(grey.astype(np.uint16) * 257)))
    np.testing.assert_allclose(got, reference([np.repeat(grey[..., None], 3, axis=2)]).logits, atol=CLOSE)


@pytest.mark.parametrize("kind", ["L", "1", "CMYK", "LA"])
async def test_other_colour_modes_become_rgb(vit, reference, name, kind):
    picture = Image.fromarray(SCENES[0]).convert(kind)
    got = await _logits(vit, name, _file(encoded(picture, "JPEG" if kind == "CMYK" else "PNG")))
    np.testing.assert_allclose(got, reference([np.asarray(picture.convert("RGB"))]).logits, atol=0.1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
async def test_of_an_animation_the_first_frame_is_seen(vit, reference, name, kind):
    frames = [Image.fromarray(one) for one in (SCENES[0], 255 - SCENES[0])]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    got = await _logits(vit, name, _file(data))
    np.testing.assert_allclose(got, reference(SCENES[:1]).logits, atol=CLOSE)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
async def test_a_single_pixel_is_a_picture(vit, reference, name, kind):
    pixel = np.full((1, 1, 3), 200, np.uint8)
    got = await _logits(vit, name, _file(encoded(pixel, kind)))
    np.testing.assert_allclose(got, reference([pixel]).logits, atol=CLOSE)


async def test_callers_at_the_same_time_get_their_own_answers(vit, reference, name):
    answers = await asyncio.gather(*(_logits(vit, name, _raw(SCENES[i % 5])) for i in range(20)))
    wanted = reference(SCENES).logits
    for i, got in enumerate(answers):
        np.testing.assert_allclose(got[0], wanted[i % 5], atol=CLOSE)


async def test_image_without_content_is_named_by_its_place(vit):
    request = pb.ClassifyImagesRequest(model="tiny-vit", images=[_raw(SCENES[0]), image_pb2.Image()])
    with pytest.raises(grpc.aio.AioRpcError, match=r"images\[1\]") as caught:
        await vit.ClassifyImages(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
