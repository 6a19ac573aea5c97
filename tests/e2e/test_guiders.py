"""Every guider through the mesh draws what it draws in diffusers: alone and in a crowd, of both families."""

import asyncio
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import grpc
import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from imagemesh.v1 import diffusion_service_pb2 as diffusion_pb
from imagemesh.v1 import diffusion_service_pb2_grpc as diffusion_rpc
from imagemesh_client import AsyncClient, Client, Control
from imagemesh_runtime.errors import MeshError
from imagemesh_services.diffusion.guiders import GUIDERS
from tests.support import tiny_sdxl
from tests.support.guided import guider, layers, loaded, loop, modular, perturbed, pixels, scheduler
from tests.support.mesh import running_mesh
from tests.support.reference import worst
from tests.support.tiny_models import build_models

PROMPT, NEGATIVE, SCALE, STEPS, SEED = "a red fox on the water", "a dog", 5.0, 6, 3
COUNTED = ("count", "sum")
UP = "up_blocks.1.attentions.1.transformer_blocks"


@dataclass(frozen=True)
class Case:
    """What is asked of the mesh, and the library's guider."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    library: Callable[[], Any] = lambda: None
    scheduler: str = "Euler"
    guidance: float = SCALE


def library(class_name: str, **options: Any) -> Callable[[], Any]:
    return lambda: guider(class_name, guidance_scale=SCALE, **options)


PERTURBS = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
MOMENTUM = {"adaptive_projected_guidance_momentum": -0.5, "eta": 0.3}
PAG_LATE = {"perturbed_guidance_start": 0.2, "perturbed_guidance_stop": 0.9}
SLG = {"skip_layer_guidance_scale": 2.0, "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9}
CASES = {
    "rescaled": Case(
        "CFG", {"guidance_rescale": 0.7}, library("ClassifierFreeGuidance", guidance_rescale=0.7), "Euler a"
    ),
    "interval": Case("", {"start": 0.3, "stop": 0.8}, library("ClassifierFreeGuidance", start=0.3, stop=0.8)),
    "interval of Heun": Case(
        "", {"start": 0.3, "stop": 0.8}, library("ClassifierFreeGuidance", start=0.3, stop=0.8), "Heun"
    ),
    "zero": Case("CFG-Zero*", {}, library("ClassifierFreeZeroStarGuidance"), "DPM++ 2M"),
    "apg": Case("APG", MOMENTUM, library("AdaptiveProjectedGuidance", **MOMENTUM)),
    "apg of Heun": Case(
        "APG", {**MOMENTUM, "use_original_formulation": True},
        library("AdaptiveProjectedGuidance", use_original_formulation=True, **MOMENTUM), "Heun",
    ),
    "apg mix": Case(
        "APG mix", {"adaptive_projected_guidance_start_step": 2},
        library("AdaptiveProjectedMixGuidance", adaptive_projected_guidance_start_step=2), "DDIM",
    ),
    "tcfg": Case("TCFG", {}, library("TangentialClassifierFreeGuidance"), "Heun"),
    "pag late": Case(
        "PAG", {**PAG_LATE, "perturbed_guidance_layers": ["mid_block", "up_blocks.1.attentions.1"]},
        library(
            "PerturbedAttentionGuidance", perturbed_guidance_scale=3.0, **PAG_LATE,
            perturbed_guidance_config=[layers(**PERTURBS), layers(UP, **PERTURBS)],
        ), "Heun",
    ),
    "pag": Case(
        "PAG", {**PAG_LATE, "perturbed_guidance_scale": 30.0},
        library(
            "PerturbedAttentionGuidance", perturbed_guidance_scale=30.0, **PAG_LATE,
            perturbed_guidance_config=[layers(**PERTURBS)],
        ),
    ),
    "slg": Case("SLG", SLG, library("SkipLayerGuidance", **SLG, skip_layer_config=[layers()])),
    "auto": Case("Auto", {}, library("AutoGuidance", auto_guidance_config=[layers(dropout=1.0)]), "DDIM"),
    "auto drawn": Case(
        "Auto", {"dropout": 0.3}, library("AutoGuidance", auto_guidance_config=[layers(dropout=0.3)]), "Heun"
    ),
}  # fmt: skip
XL = ("interval", "zero", "apg", "tcfg", "pag", "slg", "auto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = build_models(tmp_path_factory.mktemp("guided"))
    tiny_sdxl.build_sdxl(root / "tiny-sdxl")
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
def theirs(folder: Path, name: str) -> np.ndarray:
    case = CASES[name]
    return loop(folder / "tiny-sd", case.library(), PROMPT, NEGATIVE, case.scheduler, SEED, STEPS)


def asked(case: Case, model: str = "tiny-sd") -> dict[str, Any]:
    return {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "model": model, "guidance": case.guidance, "steps": STEPS,
        "seed": SEED, "scheduler": case.scheduler, "guider": case.name, "guider_options": dict(case.options),
    }  # fmt: skip


def ours(client: Client, case: Case, model: str = "tiny-sd", **more: Any) -> np.ndarray:
    return np.asarray(client.generate(**(asked(case, model) | more)).images[0].to_pil())


@pytest.mark.parametrize("name", CASES)
def test_alone_it_is_the_librarys(client: Client, folder: Path, name: str) -> None:
    made = ours(client, CASES[name])
    assert worst(made, theirs(folder, name)) <= 1
    plain = Case("", scheduler=CASES[name].scheduler)
    assert worst(made, ours(client, plain)) > 1, "guided as by CFG all the way"


async def test_in_a_crowd_of_all_the_others_it_is_the_librarys(mesh: Any, folder: Path) -> None:
    async with AsyncClient(mesh.grpc_address) as client:
        made = await asyncio.gather(*(client.generate(**asked(case)) for case in CASES.values()))
    for name, generation in zip(CASES, made, strict=True):
        assert worst(np.asarray(generation.images[0].to_pil()), theirs(folder, name)) <= 1, name


@pytest.mark.parametrize("name", ["interval", "interval of Heun", "auto"])
def test_steered_it_is_the_librarys_and_the_controlnet_sees_the_rows_that_run_alone(
    mesh: Any, client: Client, folder: Path, control_image: Image.Image, name: str
) -> None:
    case, module = CASES[name], diffusers.ControlNetModel.from_pretrained(folder / "tiny-controlnet").eval()
    before = metrics_of(mesh, "controlnet")
    made = ours(client, case, controls=[Control(control_image, model="tiny-controlnet")])
    after = metrics_of(mesh, "controlnet")
    given = (PROMPT, NEGATIVE, case.scheduler, SEED, STEPS, (module, control_image))
    assert worst(made, loop(folder / "tiny-sd", case.library(), *given)) <= 1
    assert worst(made, theirs(folder, name)) > 1, "steered as not at all"
    asked, rows = (after[f"imagemesh_batch_size_{what}"] - before[f"imagemesh_batch_size_{what}"] for what in COUNTED)
    evaluations = 2 * STEPS - 1 if case.scheduler == "Heun" else STEPS
    start, stop = (int(case.options.get(key, end) * evaluations) for key, end in (("start", 0.0), ("stop", 1.0)))
    assert (asked, rows) == (evaluations, evaluations + stop - start)


def metrics_of(mesh: Any, service: str) -> dict[str, float]:
    text = httpx.get(f"http://{mesh.services[service].metrics_http.address}/metrics").text
    return {one.name: one.value for family in text_string_to_metric_families(text) for one in family.samples}


@pytest.mark.parametrize("name", XL)
def test_xl_is_its_modular_pipelines(client: Client, folder: Path, name: str) -> None:
    case = CASES[name] if CASES[name].scheduler != "Heun" else Case(CASES[name].name, CASES[name].options)
    library = CASES[name].library()
    wanted = modular(folder / "tiny-sdxl", library, PROMPT, NEGATIVE, case.scheduler, SEED, STEPS)
    assert worst(ours(client, case, "tiny-sdxl"), wanted) <= 1


@pytest.mark.parametrize(("kind", "model"), [("StableDiffusion", "tiny-sd"), ("StableDiffusionXL", "tiny-sdxl")])
@pytest.mark.parametrize("guidance", [SCALE, 1.0])
def test_perturbed_attention_is_the_classic_pipelines(
    client: Client, folder: Path, kind: str, model: str, guidance: float
) -> None:
    """Without the negative prompt the library's guider begins at the perturbed prediction: pag_scale and one."""
    case = Case("PAG", {"perturbed_guidance_scale": 30.0 if guidance > 1 else 31.0}, guidance=guidance)
    wanted = perturbed(
        f"{kind}PAGPipeline", folder / model, PROMPT, NEGATIVE, "Euler", SEED, pag_scale=30.0, layers="mid",
        num_inference_steps=STEPS, guidance_scale=guidance if guidance > 1 else 0.0,
    )  # fmt: skip
    assert worst(ours(client, case, model), wanted) <= 1
    assert worst(wanted, ours(client, Case("", guidance=guidance), model)) > 1, "perturbed as not at all"


@pytest.mark.parametrize("model", ["tiny-sd", "tiny-sdxl"])
def test_rescaling_is_the_classic_pipelines(client: Client, folder: Path, model: str) -> None:
    pipe = loaded(folder / model)
    pipe.scheduler = scheduler(folder / model, "Euler")
    wanted = pipe(
        PROMPT, negative_prompt=NEGATIVE, guidance_scale=SCALE, guidance_rescale=0.7, num_inference_steps=STEPS,
        generator=torch.Generator("cpu").manual_seed(SEED), output_type="np",
    ).images[0]  # fmt: skip
    assert worst(ours(client, Case("", {"guidance_rescale": 0.7}), model), pixels(wanted)) <= 1


def test_the_picture_and_the_answer_tell_the_guider(client: Client) -> None:
    case = Case("PAG", {"perturbed_guidance_layers": ["mid_block", "up_blocks.1"], "stop": 0.8})
    generation = client.generate(**asked(case))
    made = generation.parameters
    assert made.guider == "PAG"
    assert {name: json.loads(value) for name, value in made.guider_options.items()} == case.options
    text = Image.open(io.BytesIO(generation.images[0].png)).info["parameters"]  # type: ignore[union-attr]
    assert "Guider: PAG, perturbed_guidance_layers: " in text
    assert ", stop: 0.8" in text


@pytest.mark.parametrize(
    ("name", "options", "code", "message"),
    [
        ("SEG", {}, grpc.StatusCode.NOT_FOUND, r"guider 'SEG' not found; available: APG, .*CFG.*PAG"),
        ("PAG", {"eta": 1}, grpc.StatusCode.INVALID_ARGUMENT, "guider_options must be an option that PAG takes"),
        ("", {"start": 2}, grpc.StatusCode.INVALID_ARGUMENT, r"guider_options\['start'\] must be a number from 0 to 1"),
        (
            "SLG", {"skip_layer_guidance_layers": "down_blocks.7"}, grpc.StatusCode.INVALID_ARGUMENT,
            r"\['skip_layer_guidance_layers'\] must be .*mid_block\.attentions\.0.* got 'down_blocks.7'",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_guider_is_named(
    client: Client, name: str, options: dict[str, Any], code: grpc.StatusCode, message: str
) -> None:
    with pytest.raises(MeshError, match=message) as caught:
        client.generate(PROMPT, guider=name, guider_options=options, steps=2)
    assert caught.value.code is code


def test_the_service_lists_its_guiders(mesh: Any) -> None:
    with grpc.insecure_channel(mesh.services["diffusion"].address) as channel:
        listed = diffusion_rpc.DiffusionServiceStub(channel).ListGuiders(diffusion_pb.ListGuidersRequest()).guiders
    assert [one.name for one in listed] == list(GUIDERS)
    for one in listed:
        assert one.about
        assert set(one.options) == set(one.accepts) == set(GUIDERS[one.name].accepts)
        assert {name: json.loads(value) for name, value in one.options.items()} == GUIDERS[one.name].options
