"""Brackets weigh words and change prompts: the mesh draws what diffusers draws from embeddings made by transformers."""

import asyncio
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from imagemesh_client import AsyncClient, Client, Control, Hires
from imagemesh_runtime.errors import MeshError
from tests.support.mesh import running_mesh
from tests.support.reference import draw, worst

Pieces = list[tuple[str, float]]


@pytest.fixture(scope="module")
def address(models: Path) -> Iterator[str]:
    with running_mesh(models=str(models), backend="torch") as mesh:
        yield mesh.grpc_address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


def picture(client: Client, prompt: str, **options: object) -> np.ndarray:
    return np.asarray(client.generate(prompt, **options).images[0].to_pil())  # type: ignore[arg-type]


@cache
def text_model(path: Path) -> tuple[Any, Any]:
    return CLIPTokenizer.from_pretrained(path / "tokenizer"), CLIPTextModel.from_pretrained(path / "text_encoder")


def embed(models: Path, *windows: Pieces) -> torch.Tensor:
    """AUTOMATIC1111's reading by transformers alone: a window's pieces multiplied, its mean restored."""
    tokenizer, model = text_model(models / "tiny-sd")
    parts = []
    for pieces in windows:
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for text, weight in pieces:
            own = tokenizer(text, add_special_tokens=False).input_ids
            ids, weights = ids + own, weights + [weight] * len(own)
        ids += [tokenizer.eos_token_id] * (77 - len(ids))
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state
        weighed = hidden * torch.tensor(weights + [1.0] * (77 - len(weights)))[None, :, None]
        parts.append(weighed * float(hidden.double().mean() / weighed.double().mean()))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(
    ("prompt", "windows"),
    [
        ("a (red:1.4) fox [on] the ((water))",
         [[("a ", 1), ("red", 1.4), (" fox ", 1), ("on", 1 / 1.1), (" the ", 1), ("water", 1.21)]]),
        ("a (red fox", [[("a ", 1), ("red fox", 1.1)]]),
        (r"a \(red\) fox:", [[("a (red) fox:", 1)]]),
        ("a red BREAK (fox:0.6)", [[("a red", 1)], [("fox", 0.6)]]),
    ],
)  # fmt: skip
def test_weights_are_automatic1111s(client: Client, models: Path, prompt: str, windows: list[Pieces]) -> None:
    common = {"prompt_embeds": embed(models, *windows), "num_inference_steps": 4, "guidance_scale": 7.5}
    negative = embed(models, [("blue", 1.3)], *[[]] * (len(windows) - 1))
    theirs = draw(models / "tiny-sd", None, seeds=[4], negative_prompt_embeds=negative, **common)  # type: ignore[arg-type]
    ours = picture(client, prompt, negative_prompt="(blue:1.3)", steps=4, seed=4)
    assert worst(ours, theirs[0]) <= 1


def test_weights_matter(client: Client) -> None:
    plain, weighed = (picture(client, prompt, steps=4, seed=4) for prompt in ("a red fox", "a (red:1.6) fox"))
    assert worst(plain, weighed) > 3


def test_a_literal_prompt_is_what_the_pipeline_takes_it_for(client: Client, models: Path) -> None:
    prompt = "a (red:1.4) [fox|dog] [a:b:2]"
    ours = picture(client, prompt, steps=4, seed=4, literal_prompt=True)
    theirs = draw(models / "tiny-sd", prompt, seeds=[4], num_inference_steps=4, guidance_scale=7.5)[0]
    assert worst(ours, theirs) <= 1
    assert worst(ours, picture(client, prompt, steps=4, seed=4)) > 1


def test_a_plain_prompt_gives_the_very_bits_of_a_literal_one(client: Client) -> None:
    plain, literal = (
        picture(client, "a fox: red, 3.5 | on {the} water", steps=4, seed=4, literal_prompt=literal)
        for literal in (False, True)
    )
    np.testing.assert_array_equal(plain, literal)


async def test_weighted_prompts_are_the_same_beside_others(address: str) -> None:
    prompts = ["a (red:1.4) fox", "a red fox", "a (red:0.5) BREAK fox", "[a] fox"]
    async with AsyncClient(address) as client:
        alone = [await client.generate(prompt, steps=5, seed=3) for prompt in prompts]
        together = await asyncio.gather(*(client.generate(prompt, steps=5, seed=3) for prompt in prompts))
    for one, other in zip(alone, together, strict=True):
        assert worst(one.images[0].to_pil(), other.images[0].to_pil()) <= 1


@pytest.mark.parametrize("bracket", ["(", "["])
def test_ten_thousand_brackets_are_refused_by_name_and_place(client: Client, bracket: str) -> None:
    with pytest.raises(MeshError, match=r"negative_prompt must be .*at most 32 deep, got .*at character 33"):
        client.generate("x", negative_prompt=bracket * 10_000, steps=2)


def walk(models: Path, phases: list[torch.Tensor], at: Callable[[int], int], **settings: object) -> np.ndarray:
    """diffusers' own loop, whose embeddings are swapped after an evaluation for those of the next."""

    def swap(pipe: object, i: int, _: object, given: dict) -> dict:
        given["prompt_embeds"] = torch.cat([embed(models, []), phases[at(i + 1)]])
        return given

    found: np.ndarray = draw(
        models / "tiny-sd", None, guidance_scale=7.5, prompt_embeds=phases[at(0)],
        negative_prompt_embeds=embed(models, []), callback_on_step_end=swap,
        callback_on_step_end_tensor_inputs=["prompt_embeds"], **settings,
    )[0]  # type: ignore[arg-type]  # fmt: skip
    return found


def plain(models: Path, *texts: str) -> list[torch.Tensor]:
    return [embed(models, [(text, 1)]) for text in texts]


# Of each scheduler the step, as the user counts them, of each evaluation.
STEP_OF: dict[str, Callable[[int], int]] = {
    "DDIM": lambda i: i,
    "Euler a": lambda i: i,
    "DPM++ 2M Karras": lambda i: i,
    "Heun": lambda i: i // 2,
    "PNDM": lambda i: max(i - 1, 0),
}


@pytest.mark.parametrize("scheduler", STEP_OF)
def test_a_switch_is_a_swap_in_diffusers_loop(client: Client, models: Path, scheduler: str) -> None:
    texts = plain(models, "a red fox", "a red dog")
    common = {"scheduler_name": scheduler, "seeds": [7], "num_inference_steps": 6}
    theirs = walk(models, texts, lambda i: int(STEP_OF[scheduler](i) >= 3), **common)
    options = {"scheduler": scheduler, "steps": 6, "seed": 7}
    ours = picture(client, "a red [fox:dog:0.5]", **options)
    assert worst(ours, theirs) <= 1
    assert min(worst(ours, picture(client, one, **options)) for one in ("a red fox", "a red dog")) > 1


@pytest.mark.parametrize("scheduler", ["DDIM", "Heun", "PNDM"])
def test_turns_are_a_swap_at_every_step(client: Client, models: Path, scheduler: str) -> None:
    texts = plain(models, "a fox on the water", "a dog on the water", "a  on the water")
    common = {"scheduler_name": scheduler, "seeds": [7], "num_inference_steps": 7}
    theirs = walk(models, texts, lambda i: min(STEP_OF[scheduler](i), 6) % 3, **common)
    ours = picture(client, "a [fox|dog|] on the water", scheduler=scheduler, steps=7, seed=7)
    assert worst(ours, theirs) <= 1


def test_words_come_and_go_with_their_weights(client: Client, models: Path) -> None:
    phases = [
        embed(models, [("a ", 1), ("red", 1.5), (" fox ", 1)]),
        embed(models, [("a ", 1), (" fox ", 1)]),
        embed(models, [("a ", 1), (" fox ", 1), ("on", 0.7), (" water", 1)]),
    ]
    theirs = walk(
        models, phases, lambda i: (i >= 2) + (i >= 4), seeds=[7], scheduler_name="DDIM", num_inference_steps=6
    )
    ours = picture(client, "a [(red:1.5)::2] fox [(on:0.7) water:4]", scheduler="DDIM", steps=6, seed=7)
    assert worst(ours, theirs) <= 1


def test_a_negative_prompt_changes_too(client: Client, models: Path) -> None:
    (prompt,), negatives = plain(models, "a red fox"), plain(models, "blue", "green water")

    def swap(pipe: object, i: int, _: object, given: dict) -> dict:
        given["prompt_embeds"] = torch.cat([negatives[i + 1 >= 2], prompt])
        return given

    theirs = draw(
        models / "tiny-sd", None, seeds=[3], scheduler_name="DDIM", num_inference_steps=5, guidance_scale=7.5,
        prompt_embeds=prompt, negative_prompt_embeds=negatives[0], callback_on_step_end=swap,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )[0]  # fmt: skip
    options = {"negative_prompt": "[blue:green water:2]", "scheduler": "DDIM", "steps": 5, "seed": 3}
    assert worst(picture(client, "a red fox", **options), theirs) <= 1


async def test_prompts_that_change_are_the_same_beside_others(address: str) -> None:
    requests = [
        {"prompt": "a [red|blue] fox", "scheduler": "Euler a", "steps": 6, "seed": 1},
        {"prompt": "a [fox:dog:3]", "scheduler": "Heun", "steps": 5, "seed": 2, "n": 2},
        {"prompt": "a fox", "negative_prompt": "[cat::0.4]", "scheduler": "PNDM", "steps": 7, "seed": 3},
        {"prompt": "the water", "scheduler": "DDIM", "steps": 5, "seed": 4},
    ]
    async with AsyncClient(address) as client:
        alone = [await client.generate(**one) for one in requests]  # type: ignore[arg-type]
        together = await asyncio.gather(*(client.generate(**one) for one in requests))  # type: ignore[arg-type]
    for one, other in zip(alone, together, strict=True):
        for first, second in zip(one.images, other.images, strict=True):
            assert worst(first.to_pil(), second.to_pil()) <= 1


def test_image_to_image_begins_in_the_midst_of_the_schedule(client: Client, control_image: Image.Image) -> None:
    common = {"image": control_image, "strength": 0.5, "steps": 8, "seed": 5}
    after, only = picture(client, "a [fox:dog:4]", **common), picture(client, "a dog", **common)
    np.testing.assert_array_equal(after, only)
    assert worst(picture(client, "a [fox:dog:5]", **common), only) > 1
    np.testing.assert_array_equal(picture(client, "a [fox:dog:8]", **common), picture(client, "a fox", **common))


def test_a_second_pass_goes_on_counting(client: Client) -> None:
    common = {"steps": 4, "seed": 5, "hires": Hires(2, strength=1.0)}
    only_second, twice = (picture(client, f"a [fox:dog:{when}]", **common) for when in ("1.0", "0.5"))
    assert only_second.shape == (128, 128, 3)
    # Since step 4, the first of the second pass, it is a dog in both.
    later = picture(client, "a [fox:dog:4]", **common)
    np.testing.assert_array_equal(only_second, later)
    assert worst(only_second, twice) > 1
    never = picture(client, "a [fox:dog:2.0]", **common)
    np.testing.assert_array_equal(never, picture(client, "a fox", **common))
    assert worst(never, only_second) > 1


@pytest.mark.parametrize("scheduler", ["DDIM", "Heun"])
def test_controlnets_follow(client: Client, models: Path, control_image: Image.Image, scheduler: str) -> None:
    texts = plain(models, "a red fox", "the blue water")
    theirs = walk(
        models, texts, lambda i: STEP_OF[scheduler](i) % 2, seeds=[7], scheduler_name=scheduler,
        num_inference_steps=5, controlnet=models / "tiny-controlnet", control_image=control_image,
    )  # fmt: skip
    options = {"scheduler": scheduler, "steps": 5, "seed": 7, "controls": [Control(control_image)]}
    assert worst(picture(client, "[a red fox|the blue water]", **options), theirs) <= 1
    assert worst(picture(client, "a red fox", **options), theirs) > 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("[" + "a|" * 70 + "]", "prompt must be a prompt of at most 64 phases"),
        ("(a:99)", "weight of 99 at character 3"),
    ],
)
def test_what_is_too_much_is_refused(client: Client, prompt: str, message: str) -> None:
    with pytest.raises(MeshError, match=message):
        client.generate(prompt, steps=100)
