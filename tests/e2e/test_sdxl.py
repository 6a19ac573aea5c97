"""Stable Diffusion XL through the mesh draws what diffusers' pipelines draw: every mode, alone and in a crowd."""

import asyncio
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import grpc
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from imagemesh.v1 import diffusion_service_pb2 as diffusion_pb
from imagemesh.v1 import diffusion_service_pb2_grpc as diffusion_rpc
from imagemesh.v1 import text_encoder_service_pb2 as text_pb
from imagemesh.v1 import text_encoder_service_pb2_grpc as text_rpc
from imagemesh_client import AsyncClient, Client, Control, Hires
from imagemesh_runtime.errors import MeshError
from imagemesh_runtime.tensors import to_proto
from imagemesh_services.diffusion.schedulers import find_scheduler
from tests.support import tiny_sdxl
from tests.support.mesh import running_mesh
from tests.support.reference import worst
from tests.support.tiny_models import build_models

PROMPT, NEGATIVE = "a red fox on the water", "a dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = build_models(tmp_path_factory.mktemp("sdxl"))
    tiny_sdxl.build_sdxl(root / "tiny-sdxl")
    tiny_sdxl.build_refiner(root / "tiny-refiner")
    tiny_sdxl.build_controlnet(root / "tiny-sdxl-controlnet", root / "tiny-sdxl")
    return root


@pytest.fixture(scope="module")
def mesh(folder: Path) -> Iterator[Any]:
    with running_mesh(models=str(folder), backend="torch") as mesh:
        yield mesh


@pytest.fixture(scope="module")
def client(mesh: Any) -> Iterator[Client]:
    with Client(mesh.grpc_address) as client:
        yield client


@cache
def loaded(folder: Path) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(folder, add_watermarker=False)


def reference(
    folder: Path, kind: str, name: str, seed: int, extra: dict[str, Any] | None = None, **settings: Any
) -> Any:
    base = loaded(folder)
    more = dict(extra or {})
    if "requires_aesthetics_score" in base.config:
        more["requires_aesthetics_score"] = base.config.requires_aesthetics_score
    parts = {key: value for key, value in base.components.items() if key not in ("image_encoder", "feature_extractor")}
    pipe = getattr(diffusers, kind)(**parts, add_watermarker=False, **more)
    pipe.set_progress_bar_config(disable=True)
    choice = find_scheduler(name)
    if choice is not None:
        pipe.scheduler = getattr(diffusers, choice.class_name).from_config(base.scheduler.config, **choice.options)
    generator = torch.Generator("cpu").manual_seed(seed)
    settings = {"num_inference_steps": 5, "guidance_scale": 4, **settings}
    made = pipe(PROMPT, generator=generator, output_type="np", **settings).images[0]
    return np.asarray((made * 255).round(), dtype=np.uint8)


def ours(client: Client, model: str = "tiny-sdxl", **options: Any) -> np.ndarray:
    options = {"steps": 5, "guidance": 4, "seed": 3, **options}
    return np.asarray(client.generate(PROMPT, model=model, **options).images[0].to_pil())


def a_picture() -> Image.Image:
    numbers = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(numbers).resize((64, 64), Image.Resampling.BICUBIC)


def a_mask() -> Image.Image:
    mask = Image.new("RGB", (64, 64), "black")
    ImageDraw.Draw(mask).rectangle((16, 16, 55, 32), fill="white")
    return mask


@pytest.mark.parametrize("name", ["", "Euler a", "DDIM", "DPM++ 2M Karras", "Heun", "UniPC"])
def test_text_to_image(client: Client, folder: Path, name: str) -> None:
    theirs = reference(
        folder / "tiny-sdxl", "StableDiffusionXLPipeline", name, 3, negative_prompt=NEGATIVE, width=64, height=64
    )
    assert worst(ours(client, scheduler=name, negative_prompt=NEGATIVE), theirs) <= 1


@pytest.mark.parametrize("guidance", [4, 1])
def test_an_empty_negative_prompt_is_zeros_and_none_without_guidance(
    client: Client, folder: Path, guidance: int
) -> None:
    theirs = reference(
        folder / "tiny-sdxl", "StableDiffusionXLPipeline", "DDIM", 3, width=96, height=64, guidance_scale=guidance
    )
    assert worst(ours(client, scheduler="DDIM", width=96, guidance=guidance), theirs) <= 1


def test_clip_skip(client: Client, folder: Path) -> None:
    common = {"negative_prompt": NEGATIVE}
    theirs = reference(
        folder / "tiny-sdxl", "StableDiffusionXLPipeline", "DDIM", 3, clip_skip=1, width=64, height=64, **common
    )
    assert worst(ours(client, scheduler="DDIM", clip_skip=1, **common), theirs) <= 1
    assert worst(ours(client, scheduler="DDIM", **common), theirs) > 1


@pytest.mark.parametrize("model", ["tiny-sdxl", "tiny-refiner"])
@pytest.mark.parametrize("name", ["Euler a", "DDIM"])
def test_image_to_image_of_base_and_refiner(client: Client, folder: Path, model: str, name: str) -> None:
    common: dict[str, Any] = {"image": a_picture(), "strength": 0.7, "negative_prompt": NEGATIVE}
    theirs = reference(folder / model, "StableDiffusionXLImg2ImgPipeline", name, 3, **common)
    assert worst(ours(client, model, scheduler=name, **common), theirs) <= 1


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(client: Client, folder: Path, strength: float) -> None:
    theirs = reference(
        folder / "tiny-sdxl", "StableDiffusionXLInpaintPipeline", "Euler a", 3,
        image=a_picture(), mask_image=a_mask(), strength=strength, width=64, height=64, negative_prompt=NEGATIVE,
    )  # fmt: skip
    made = ours(
        client, scheduler="Euler a", image=a_picture(), mask=a_mask(), strength=strength, negative_prompt=NEGATIVE
    )
    assert worst(made, theirs) <= 1


def test_a_controlnet(client: Client, folder: Path, control_image: Image.Image) -> None:
    module = diffusers.ControlNetModel.from_pretrained(folder / "tiny-sdxl-controlnet")
    theirs = reference(
        folder / "tiny-sdxl", "StableDiffusionXLControlNetPipeline", "Euler", 3, {"controlnet": module},
        image=control_image, controlnet_conditioning_scale=0.8, negative_prompt=NEGATIVE,
    )  # fmt: skip
    control = Control(control_image, "tiny-sdxl-controlnet", 0.8)
    made = ours(client, scheduler="Euler", controls=[control], negative_prompt=NEGATIVE)
    assert worst(made, theirs) <= 1
    assert worst(made, ours(client, scheduler="Euler", negative_prompt=NEGATIVE)) > 3


async def test_a_crowd_of_two_families_changes_nothing(mesh: Any) -> None:
    requests: list[dict[str, Any]] = [
        {"model": "tiny-sdxl", "seed": 1, "scheduler": "Euler", "steps": 6},
        {"model": "tiny-sdxl", "seed": 2, "scheduler": "Euler a", "steps": 8, "guidance": 1.0},
        {"model": "tiny-sdxl", "seed": 3, "scheduler": "Heun", "steps": 4, "negative_prompt": NEGATIVE, "n": 2},
        {"model": "tiny-sdxl", "seed": 4, "image": a_picture(), "strength": 0.5, "steps": 9},
        {"model": "tiny-sdxl", "seed": 5, "steps": 3, "hires": Hires(scale=1.5, strength=0.5)},
        {"model": "tiny-refiner", "seed": 6, "image": a_picture(), "strength": 0.5, "steps": 9},
        {"model": "tiny-sd", "seed": 7, "steps": 5},
    ]
    async with AsyncClient(mesh.grpc_address) as client:
        together = await asyncio.gather(*(client.generate(PROMPT, **one) for one in requests))
        for one, made in zip(requests, together, strict=True):
            alone = await client.generate(PROMPT, **one)
            for mine, other in zip(made.images, alone.images, strict=True):
                assert worst(mine.to_pil(), other.to_pil()) <= 1


def test_a_controlnet_of_another_family_is_refused_by_name(client: Client, control_image: Image.Image) -> None:
    for model, control in (("tiny-sdxl", "tiny-controlnet"), ("tiny-sd", "tiny-sdxl-controlnet")):
        with pytest.raises(MeshError, match="start\\.") as caught:
            ours(client, model, controls=[Control(control_image, control)])
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_the_sampler_wants_the_pooled_embeddings_and_of_the_right_width(mesh: Any) -> None:
    with grpc.insecure_channel(mesh.services["text-encoder"].address) as channel:
        text = text_rpc.TextEncoderServiceStub(channel).EncodeText(
            text_pb.EncodeTextRequest(model="tiny-sdxl", prompt=PROMPT)
        )
    assert sorted(text.conditioning) == ["pooled_prompt_embeds", "prompt_embeds"]
    with grpc.insecure_channel(mesh.services["diffusion"].address) as channel:
        stub = diffusion_rpc.DiffusionServiceStub(channel)
        for change, said in (
            (None, "conditioning must be a map with 'pooled_prompt_embeds'"),
            (np.zeros((1, 7), np.float32), "conditioning['pooled_prompt_embeds'] must be of width 24 (base) or 32"),
            (np.zeros((1, 1, 24), np.float32), "conditioning['pooled_prompt_embeds'].shape"),
        ):
            request = diffusion_pb.SampleRequest(
                model="tiny-sdxl", conditioning=text.conditioning, width=64, height=64, steps=2, seeds=[1]
            )
            if change is None:
                del request.conditioning["pooled_prompt_embeds"]
            else:
                request.conditioning["pooled_prompt_embeds"].CopyFrom(to_proto(change))
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Sample(request, timeout=20))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert said in caught.value.details()


def test_the_family_is_told(client: Client) -> None:
    told = {model.name: model.properties["family"] for model in client.models() if model.role == "diffusion"}
    assert told == {"tiny-sd": "sd", "tiny-sdxl": "sdxl", "tiny-refiner": "sdxl"}
