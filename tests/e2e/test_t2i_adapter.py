"""T2I-Adapters, asked once a generation: the same as diffusers' pipelines draw, alone and beside others."""

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from imagemesh_client import AsyncClient, Client, Control
from imagemesh_runtime.errors import MeshError
from tests.support import tiny_sdxl
from tests.support.mesh import running_mesh
from tests.support.reference import worst
from tests.support.tiny_models import build_adapter, build_models

PROMPT, STEPS = "a red fox on the water", 4
PICTURES = [Image.fromarray(one) for one in np.random.default_rng(4).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)]
PIPELINES = {"tiny-sd": "StableDiffusionAdapterPipeline", "tiny-sdxl": "StableDiffusionXLAdapterPipeline"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = build_models(tmp_path_factory.mktemp("adapters"))
    tiny_sdxl.build_sdxl(root / "tiny-sdxl")
    build_adapter(root / "lines", 31)
    build_adapter(root / "grey", 32, in_channels=1)
    build_adapter(root / "xl", 33, channels=[32, 64, 64, 64], downscale_factor=16, adapter_type="full_adapter_xl")
    return root


@pytest.fixture(scope="module")
def mesh(folder: Path) -> Iterator[Any]:
    with running_mesh(models=str(folder), backend="torch") as mesh:
        yield mesh


@pytest.fixture(scope="module")
def client(mesh: Any) -> Iterator[Client]:
    with Client(mesh.grpc_address) as client:
        yield client


def theirs(folder: Path, model: str, names: list[str], **settings: Any) -> Any:
    base = diffusers.DiffusionPipeline.from_pretrained(folder / model)
    loaded = [diffusers.T2IAdapter.from_pretrained(folder / name) for name in names]
    parts = dict(base.components)
    if model == "tiny-sdxl":
        parts = {key: one for key, one in parts.items() if key not in ("image_encoder", "feature_extractor")}
    else:
        parts = {key: one for key, one in parts.items() if key != "image_encoder"} | {"requires_safety_checker": False}
    pipe = getattr(diffusers, PIPELINES[model])(**parts, adapter=loaded if len(loaded) > 1 else loaded[0])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(base.scheduler.config)
    pictures = [one.convert("L") if name == "grey" else one for one, name in zip(PICTURES, names, strict=False)]
    made = pipe(
        PROMPT, image=pictures if len(names) > 1 else pictures[0], num_inference_steps=STEPS, guidance_scale=4.0,
        width=64, height=64, generator=torch.Generator("cpu").manual_seed(3), output_type="np", **settings,
    ).images[0]  # fmt: skip
    return (made * 255).round().astype("uint8")


def options(**more: Any) -> dict[str, Any]:
    return {"steps": STEPS, "guidance": 4, "seed": 3, "scheduler": "DDIM", "model": "tiny-sd", **more}


def ours(client: Client, *controls: Control, **more: Any) -> Any:
    return client.generate(PROMPT, controls=controls, **options(**more)).images[0].to_pil()


@pytest.mark.parametrize("name", ["lines", "grey"])
def test_an_adapter_equals_the_librarys(client: Client, folder: Path, name: str) -> None:
    made = ours(client, Control(PICTURES[0], name, 0.7))
    assert worst(made, theirs(folder, "tiny-sd", [name], adapter_conditioning_scale=0.7)) <= 1
    assert worst(made, ours(client)) > 3


def test_two_adapters_are_added_up(client: Client, folder: Path) -> None:
    both = [Control(PICTURES[0], "lines", 0.7), Control(PICTURES[1], "lines", 0.4)]
    wanted = theirs(folder, "tiny-sd", ["lines", "lines"], adapter_conditioning_scale=[0.7, 0.4])
    assert worst(ours(client, *both), wanted) <= 1


@pytest.mark.parametrize("end", [1.0, 0.5])
def test_for_xl_and_for_a_part_of_the_steps(client: Client, folder: Path, end: float) -> None:
    made = ours(client, Control(PICTURES[0], "xl", 0.7, end=end), model="tiny-sdxl")
    wanted = theirs(folder, "tiny-sdxl", ["xl"], adapter_conditioning_scale=0.7, adapter_conditioning_factor=end)
    assert worst(made, wanted) <= 1


async def test_a_crowd_with_adapters_and_controlnets_changes_nothing(mesh: Any) -> None:
    lines, net = Control(PICTURES[0], "lines", 0.7), Control(PICTURES[1], "tiny-controlnet")
    asked: list[dict[str, Any]] = [
        {"controls": [lines]},
        {"controls": [Control(PICTURES[1], "lines", start=0.5)], "n": 2},
        {"controls": [lines, net]},
        {"controls": [net]},
        {},
    ]
    async with AsyncClient(mesh.grpc_address) as client:
        together = await asyncio.gather(*(client.generate(PROMPT, **options(**one)) for one in asked))
        for one, made in zip(asked, together, strict=True):
            alone = await client.generate(PROMPT, **options(**one))
            for mine, other in zip(made.images, alone.images, strict=True):
                assert worst(mine.to_pil(), other.to_pil()) <= 1
    both = together[2].parameters.backends
    assert (both["t2i-adapter[0]"], both["controlnet[1]"]) == ("torch", "torch")
    pictures = [made.images[0].to_pil() for made in together]
    assert all(worst(one, other) > 3 for one, other in pairwise(pictures))


@pytest.mark.parametrize(
    ("control", "model", "code", "said"),
    [
        (Control(PICTURES[0], "lines", guess_mode=True), "tiny-sd", "INVALID_ARGUMENT", "controls[0].guess_mode"),
        (Control(PICTURES[0], "lines", block_weights=[1]), "tiny-sd", "INVALID_ARGUMENT", "controls[0].block_weights"),
        (Control(PICTURES[0], "xl"), "tiny-sd", "FAILED_PRECONDITION", "T2I-Adapter's features don't fit the model"),
    ],
)
def test_what_an_adapter_cannot_do_is_refused(
    client: Client, control: Control, model: str, code: str, said: str
) -> None:
    with pytest.raises(MeshError) as caught:
        ours(client, control, model=model)
    assert caught.value.code is getattr(grpc.StatusCode, code)
    assert said in str(caught.value)


def test_a_side_that_the_adapter_cannot_take_is_refused(client: Client) -> None:
    with pytest.raises(MeshError, match=r"image.shape.*multiples of 16") as caught:
        ours(client, Control(PICTURES[0], "xl"), model="tiny-sdxl", width=72)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
