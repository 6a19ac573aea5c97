"""Pictures to be like, by IP-Adapters: the same as diffusers' pipelines draw, alone and beside others."""

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import grpc
import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from imagemesh_client import AsyncClient, Client, Control, Reference
from imagemesh_runtime.errors import MeshError
from tests.support import tiny_sdxl
from tests.support.mesh import running_mesh
from tests.support.reference import worst
from tests.support.tiny_adapters import build_adapters
from tests.support.tiny_models import build_models

PROMPT, STEPS = "a red fox on the water", 4
PICTURES = [Image.fromarray(one) for one in np.random.default_rng(2).integers(0, 256, (2, 50, 60, 3), dtype=np.uint8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = build_models(tmp_path_factory.mktemp("references"))
    tiny_sdxl.build_sdxl(root / "tiny-sdxl")
    build_adapters(root / "IP-Adapter" / "models", root / "tiny-sd")
    build_adapters(root / "IP-Adapter" / "sdxl_models", root / "tiny-sdxl")
    return root


@pytest.fixture(scope="module")
def mesh(folder: Path) -> Iterator[Any]:
    with running_mesh(models=str(folder), backend="torch") as mesh:
        yield mesh


@pytest.fixture(scope="module")
def client(mesh: Any) -> Iterator[Client]:
    with Client(mesh.grpc_address) as client:
        yield client


def theirs(folder: Path, model: str, names: list[str], scales: list[float], **settings: Any) -> Any:
    """Of diffusers' pipeline, with the adapters that it loads itself."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / model)
    if controlnet := settings.pop("controlnet", None):
        net = diffusers.ControlNetModel.from_pretrained(folder / controlnet)
        pipe = diffusers.StableDiffusionControlNetPipeline(
            **pipe.components, controlnet=net, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    subfolder = "sdxl_models" if model == "tiny-sdxl" else "models"
    files = [f"{name}.safetensors" for name in names]
    pipe.load_ip_adapter(str(folder / "IP-Adapter"), subfolder=subfolder, weight_name=files)
    pipe.set_ip_adapter_scale(scales)
    made = pipe(
        PROMPT, ip_adapter_image=PICTURES[: len(names)], num_inference_steps=STEPS, width=64, height=64,
        generator=torch.Generator("cpu").manual_seed(3), output_type="np", **{"guidance_scale": 4.0, **settings},
    ).images[0]  # fmt: skip
    return (made * 255).round().astype("uint8")


def options(**more: Any) -> dict[str, Any]:
    return {"steps": STEPS, "guidance": 4, "seed": 3, "scheduler": "DDIM", "model": "tiny-sd", **more}


def ours(client: Client, *references: Reference, **more: Any) -> Any:
    return client.generate(PROMPT, references=references, **options(**more)).images[0].to_pil()


@pytest.mark.parametrize("name", ["plain", "plus"])
@pytest.mark.parametrize(("model", "part"), [("tiny-sd", "models"), ("tiny-sdxl", "sdxl_models")])
def test_a_reference_equals_the_librarys(client: Client, folder: Path, model: str, part: str, name: str) -> None:
    reference = Reference(PICTURES[0], f"IP-Adapter/{part}/{name}", 0.6)
    assert worst(ours(client, reference, model=model), theirs(folder, model, [name], [0.6])) <= 1


def test_two_references_of_two_adapters(client: Client, folder: Path) -> None:
    both = [
        Reference(PICTURES[0], "IP-Adapter/models/plain", 0.6),
        Reference(PICTURES[1], "IP-Adapter/models/plus", 0.3),
    ]
    assert worst(ours(client, *both), theirs(folder, "tiny-sd", ["plain", "plus"], [0.6, 0.3])) <= 1


def test_without_guidance_and_with_a_controlnet(client: Client, folder: Path, control_image: Image.Image) -> None:
    reference = Reference(PICTURES[0], "IP-Adapter/models/plain", 0.7)
    alone = theirs(folder, "tiny-sd", ["plain"], [0.7], guidance_scale=1.0)
    assert worst(ours(client, reference, guidance=1), alone) <= 1
    steered = theirs(folder, "tiny-sd", ["plain"], [0.7], controlnet="tiny-controlnet", image=control_image)
    made = ours(client, reference, controls=[Control(control_image, "tiny-controlnet")])
    assert worst(made, steered) <= 1


async def test_a_crowd_with_and_without_references_changes_nothing(mesh: Any) -> None:
    name = "IP-Adapter/models/plain"
    asked = [
        {"references": [Reference(PICTURES[0], name, 0.6)]},
        {"references": [Reference(PICTURES[1], name, 0.6)], "seed": 4},
        {"references": [Reference(PICTURES[1], name, 0.2)]},
        {"references": [Reference(PICTURES[0], "IP-Adapter/models/plus")], "n": 2},
        {},
        {"guidance": 1.0},
    ]
    async with AsyncClient(mesh.grpc_address) as client:
        together = await asyncio.gather(*(client.generate(PROMPT, **options(**one)) for one in asked))
        for one, made in zip(asked, together, strict=True):
            alone = await client.generate(PROMPT, **options(**one))
            for mine, other in zip(made.images, alone.images, strict=True):
                assert worst(mine.to_pil(), other.to_pil()) <= 1
    pictures = [made.images[0].to_pil() for made in together]
    assert all(worst(pictures[i], pictures[4]) > 3 for i in (0, 2, 3))


def test_what_made_it_is_told(client: Client) -> None:
    made = client.generate(PROMPT, references=[Reference(PICTURES[0], scale=0.5)], **options())
    assert made.parameters.backends["reference[0]"] == "torch"
    assert 'IP-Adapter 0: "Model: IP-Adapter/models/plain, Weight: 0.5"' in made.images[0].to_pil().info["parameters"]


def test_over_http(mesh: Any, client: Client) -> None:
    file = io.BytesIO()
    PICTURES[0].save(file, "PNG")
    body = {
        "prompt": PROMPT,
        **options(),
        "references": [{"image": base64.b64encode(file.getvalue()).decode(), "scale": 0.5}],
    }
    answer = httpx.post(f"http://{mesh.http_address}/v1/generate", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    made = base64.b64decode(answer.json()["images"][0]["png"])
    assert worst(Image.open(io.BytesIO(made)), ours(client, Reference(PICTURES[0], scale=0.5))) == 0


@pytest.mark.parametrize(
    ("reference", "code", "said"),
    [
        (Reference(PICTURES[0], "nobody"), "NOT_FOUND", "IP-Adapter/models/plain"),
        (Reference(PICTURES[0], scale=11), "INVALID_ARGUMENT", "references[0].scale"),
        (Reference(Image.new("RGB", (2, 40))), "INVALID_ARGUMENT", "references[0].image"),
        (Reference(b"no picture"), "INVALID_ARGUMENT", "references[0].image"),
        (Reference(PICTURES[0], "IP-Adapter/sdxl_models/plain"), "FAILED_PRECONDITION", "does not fit model tiny-sd"),
    ],
)
def test_what_cannot_be_is_refused(client: Client, reference: Reference, code: str, said: str) -> None:
    before = ours(client)
    with pytest.raises(MeshError) as caught:
        ours(client, reference)
    assert caught.value.code is getattr(grpc.StatusCode, code)
    assert said in str(caught.value)
    assert worst(ours(client), before) == 0
