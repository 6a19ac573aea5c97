"""Weights and schedules with Stable Diffusion XL's two text encoders, against diffusers' own loop."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import grpc
import numpy as np
import pytest
import torch

from imagemesh.v1 import text_encoder_service_pb2 as pb
from imagemesh.v1 import text_encoder_service_pb2_grpc as rpc
from imagemesh_client import AsyncClient, Client
from imagemesh_runtime.tensors import from_proto
from tests.support import tiny_sdxl
from tests.support.mesh import running_mesh
from tests.support.reference import worst
from tests.support.tiny_models import build_models

Pieces = list[tuple[str, float]]
Windows = list[Pieces]
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = build_models(tmp_path_factory.mktemp("sdxl-prompts"))
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
def pipeline(folder: Path) -> Any:
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder / "tiny-sdxl", add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embed(folder: Path, windows: Windows) -> tuple[torch.Tensor, torch.Tensor]:
    """Each encoder's last layer but one, weighed by itself, and the first window's summary, which has no weights."""
    parts, pooled = zip(*(_embed(folder, pieces) for pieces in windows), strict=True)
    return torch.cat(parts, dim=1), pooled[0]


def _embed(folder: Path, pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
    pipe, parts, pooled = pipeline(folder), [], None
    for tokenizer, model in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for text, weight in pieces:
            own = tokenizer(text, add_special_tokens=False).input_ids
            ids, weights = ids + own, weights + [weight] * len(own)
        ids.append(tokenizer.eos_token_id)
        ids += [tokenizer.pad_token_id] * (77 - len(ids))
        with torch.no_grad():
            found = model(torch.tensor([ids]), output_hidden_states=True)
        hidden, pooled = found.hidden_states[-2], getattr(found, "text_embeds", None)
        weighed = hidden * torch.tensor(weights + [1.0] * (77 - len(weights)))[None, :, None]
        parts.append(weighed * float(hidden.double().mean() / weighed.double().mean()))
    assert pooled is not None
    return torch.cat(parts, dim=-1), pooled


@dataclass(frozen=True)
class Course:
    """How a picture is made.

    DDIM bounds the picture that it foresees at every step: with that, guidance of 5 makes of a ten-millionth of the
    embeddings four steps of a pixel in six steps, and without it hardly ever one.
    """

    scheduler: str = "DPM++ 2M"
    kind: str = "DPMSolverMultistepScheduler"
    guidance: float = 2.0
    seed: int = 3


def walk(
    folder: Path,
    phases: list[Windows],
    negatives: list[Windows],
    at: Callable[[int], tuple[int, int]] = lambda i: (0, 0),
    course: Course = Course(),
) -> np.ndarray:
    texts, against = ([embed(folder, one) for one in some] for some in (phases, negatives))

    def swap(pipe: object, i: int, _: object, given: dict) -> dict:
        prompt, negative = at(i + 1)
        given["prompt_embeds"] = torch.cat([against[negative][0], texts[prompt][0]])
        given["add_text_embeds"] = torch.cat([against[negative][1], texts[prompt][1]])
        return given

    prompt, negative = at(0)
    pipe = pipeline(folder)
    pipe.scheduler = getattr(diffusers, course.kind).from_config(pipe.scheduler.config)
    made = pipe(
        prompt_embeds=texts[prompt][0], pooled_prompt_embeds=texts[prompt][1],
        negative_prompt_embeds=against[negative][0], negative_pooled_prompt_embeds=against[negative][1],
        callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds", "add_text_embeds"],
        num_inference_steps=STEPS, guidance_scale=course.guidance,
        generator=torch.Generator("cpu").manual_seed(course.seed), output_type="np",
    ).images[0]  # fmt: skip
    return np.asarray((made * 255).round(), dtype=np.uint8)


def asked(prompt: str, negative: str, course: Course) -> dict[str, Any]:
    return {
        "prompt": prompt, "negative_prompt": negative, "model": "tiny-sdxl", "scheduler": course.scheduler,
        "steps": STEPS, "guidance": course.guidance, "seed": course.seed,
    }  # fmt: skip


def picture(client: Client, prompt: str, negative: str, course: Course = Course()) -> Any:
    return client.generate(**asked(prompt, negative, course)).images[0].to_pil()


def test_schedules_change_the_summaries_too(client: Client, folder: Path) -> None:
    course = Course("DDIM", "DDIMScheduler", 5.0)
    prompts: list[Windows] = [[[("a red fox", 1)]], [[("a red ", 1), ("dog", 1.3)]]]
    negatives: list[Windows] = [[[("the water", 1)]], [[("the tree", 1)]]]
    theirs = walk(folder, prompts, negatives, lambda i: (int(i >= 2), i % 2), course)
    ours = picture(client, "a red [fox:(dog:1.3):2]", "the [water|tree]", course)
    assert worst(ours, theirs) <= 1
    assert worst(ours, picture(client, "a red fox", "the water", course)) > 1


WEIGHED = "a (red:1.3) fox on (the water:0.7)", "a (dog:1.5)"
PIECES: tuple[Pieces, Pieces] = (
    [("a ", 1), ("red", 1.3), ("fox on", 1), ("the water", 0.7)],
    [("a", 1), ("dog", 1.5)],
)


def test_weights_are_those_of_the_reference_in_both_encoders(client: Client, folder: Path) -> None:
    ours = picture(client, *WEIGHED)
    assert worst(ours, walk(folder, [[PIECES[0]]], [[PIECES[1]]])) <= 1
    assert worst(ours, picture(client, "a red fox on the water", "a dog")) > 1


async def test_embeddings_are_those_of_the_reference(mesh: Any, folder: Path) -> None:
    request = pb.EncodeTextRequest(model="tiny-sdxl", prompt=f"{WEIGHED[0]} BREAK a cat", negative_prompt=WEIGHED[1])
    async with grpc.aio.insecure_channel(mesh.services["text-encoder"].address) as channel:
        found = (await rpc.TextEncoderServiceStub(channel).EncodeText(request)).conditioning
    windows: dict[str, Windows] = {"": [PIECES[0], [("a cat", 1)]], "negative_": [PIECES[1], []]}
    for sign, own in windows.items():
        for name, wanted in zip(("prompt_embeds", "pooled_prompt_embeds"), embed(folder, own), strict=True):
            got = from_proto(found[f"{sign}{name}"], name)
            np.testing.assert_allclose(got, wanted.numpy(), rtol=2e-6, atol=2e-6, err_msg=f"{sign}{name}")


async def test_prompts_of_one_window_and_of_two_share_steps_and_are_the_references(mesh: Any, folder: Path) -> None:
    short, long = Course(), Course("Euler a", "EulerAncestralDiscreteScheduler", seed=4)
    theirs = [
        walk(folder, [[[("a dog", 1)]]], [[[("the water", 1)]]], course=short),
        walk(folder, [[[("a red fox", 1)], [("on the tree", 1)]]], [[[("a cat", 1)], []]], course=long),
    ]
    requests = [asked("a dog", "the water", short), asked("a red fox BREAK on the tree", "a cat", long)]

    def forwards() -> float:
        registry = mesh.services["diffusion"].metrics.registry
        return float(registry.get_sample_value("imagemesh_step_seconds_count", {"service": "diffusion"}))

    async with AsyncClient(mesh.grpc_address) as client:
        alone = await client.generate(**requests[1])
        before = forwards()
        together = await asyncio.gather(*(client.generate(**one) for one in requests))
        assert forwards() - before < 2 * STEPS
        cut = await client.generate(**{**requests[1], "prompt": "a red fox"})
    for one, wanted in zip([*together, alone], [*theirs, theirs[1]], strict=True):
        assert worst(one.images[0].to_pil(), wanted) <= 1
    assert worst(cut.images[0].to_pil(), theirs[1]) > 1  # the second window counts
