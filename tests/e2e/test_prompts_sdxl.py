"""Weights and schedules with Stable Diffusion XL's two text encoders, against diffusers' own loop."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from imagemesh_client import Client
from tests.support import tiny_sdxl
from tests.support.mesh import running_mesh
from tests.support.reference import worst
from tests.support.tiny_models import build_models

Pieces = list[tuple[str, float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = build_models(tmp_path_factory.mktemp("sdxl-prompts"))
    tiny_sdxl.build_sdxl(root / "tiny-sdxl")
    return root


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with running_mesh(models=str(folder), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


@cache
def pipeline(folder: Path) -> Any:
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder / "tiny-sdxl", add_watermarker=False)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embed(folder: Path, pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
    """Each encoder's last layer but one, weighed by itself; and the summary, which has no weights."""
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


def walk(
    folder: Path, phases: list[Pieces], negatives: list[Pieces], at: Callable[[int], tuple[int, int]]
) -> np.ndarray:
    texts, against = ([embed(folder, one) for one in some] for some in (phases, negatives))

    def swap(pipe: object, i: int, _: object, given: dict) -> dict:
        prompt, negative = at(i + 1)
        given["prompt_embeds"] = torch.cat([against[negative][0], texts[prompt][0]])
        given["add_text_embeds"] = torch.cat([against[negative][1], texts[prompt][1]])
        return given

    prompt, negative = at(0)
    made = pipeline(folder)(
        prompt_embeds=texts[prompt][0], pooled_prompt_embeds=texts[prompt][1],
        negative_prompt_embeds=against[negative][0], negative_pooled_prompt_embeds=against[negative][1],
        callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds", "add_text_embeds"],
        num_inference_steps=6, guidance_scale=5, generator=torch.Generator("cpu").manual_seed(3), output_type="np",
    ).images[0]  # fmt: skip
    return np.asarray((made * 255).round(), dtype=np.uint8)


def picture(client: Client, prompt: str, negative: str) -> Any:
    options = {"model": "tiny-sdxl", "scheduler": "DDIM", "steps": 6, "guidance": 5, "seed": 3}
    return client.generate(prompt, negative_prompt=negative, **options).images[0].to_pil()  # type: ignore[arg-type]


def test_schedules_change_the_summaries_too(client: Client, folder: Path) -> None:
    prompts: list[Pieces] = [[("a red fox", 1)], [("a red ", 1), ("dog", 1.3)]]
    negatives: list[Pieces] = [[("the water", 1)], [("the tree", 1)]]
    theirs = walk(folder, prompts, negatives, lambda i: (int(i >= 2), i % 2))
    ours = picture(client, "a red [fox:(dog:1.3):2]", "the [water|tree]")
    assert worst(ours, theirs) <= 1
    assert worst(ours, picture(client, "a red fox", "the water")) > 1
