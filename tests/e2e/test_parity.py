"""The mesh draws what diffusers draws: at most 1/255 apart, for every scheduler, over real channels."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from imagemesh_client import Client, Control
from imagemesh_runtime.errors import MeshError
from imagemesh_services.diffusion.schedulers import SCHEDULERS
from tests.support.mesh import running_mesh
from tests.support.reference import draw, worst

NAMED = (
    "DDIM", "PNDM", "Euler", "Euler a", "DPM++ 2M", "DPM++ 2M Karras", "DPM++ SDE", "UniPC", "Heun", "LCM",
)  # fmt: skip
PROMPT = "a red fox on the water"


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[Client]:
    with running_mesh(models=str(models), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


def pictures(client: Client, prompt: str, **options: object) -> list[np.ndarray]:
    generation = client.generate(prompt, **options)  # type: ignore[arg-type]
    return [np.asarray(image.to_pil()) for image in generation.images]


@pytest.mark.parametrize("scheduler", NAMED)
def test_the_picture_equals_the_pipelines(client: Client, models: Path, scheduler: str) -> None:
    ours = pictures(client, PROMPT, negative_prompt="blue", scheduler=scheduler, steps=9, guidance=6.5, seed=7)
    theirs = draw(
        models / "tiny-sd", PROMPT, negative_prompt="blue", scheduler_name=scheduler, seeds=[7],
        num_inference_steps=9, guidance_scale=6.5,
    )  # fmt: skip
    assert worst(ours, theirs) <= 1


@pytest.mark.parametrize("scheduler", sorted(set(SCHEDULERS) - set(NAMED)))
def test_every_other_scheduler_too(client: Client, models: Path, scheduler: str) -> None:
    ours = pictures(client, PROMPT, scheduler=scheduler, steps=6, guidance=5, seed=3)
    theirs = draw(
        models / "tiny-sd", PROMPT, scheduler_name=scheduler, seeds=[3], num_inference_steps=6, guidance_scale=5
    )
    assert worst(ours, theirs) <= 1


@pytest.mark.parametrize("scheduler", ["", "Euler a", "DPM++ SDE"])
def test_several_images_equal_the_pipelines_with_a_generator_each(client: Client, models: Path, scheduler: str) -> None:
    ours = pictures(client, PROMPT, scheduler=scheduler, steps=5, seed=11, n=3)
    theirs = draw(
        models / "tiny-sd", PROMPT, scheduler_name=scheduler, seeds=[11, 12, 13], num_inference_steps=5,
        guidance_scale=7.5,
    )  # fmt: skip
    assert worst(ours, theirs) <= 1


def test_without_guidance_the_negative_prompt_is_ignored_as_in_the_pipeline(client: Client, models: Path) -> None:
    ours = pictures(client, PROMPT, negative_prompt="blue", steps=5, guidance=1, seed=2)
    theirs = draw(models / "tiny-sd", PROMPT, seeds=[2], num_inference_steps=5, guidance_scale=1)
    assert worst(ours, theirs) <= 1


def test_other_sizes_than_square(client: Client, models: Path) -> None:
    ours = pictures(client, PROMPT, steps=4, seed=2, width=96, height=40)
    theirs = draw(models / "tiny-sd", PROMPT, seeds=[2], num_inference_steps=4, guidance_scale=7.5, width=96, height=40)
    assert np.shape(ours) == (1, 40, 96, 3)
    assert worst(ours, theirs) <= 1


@pytest.mark.parametrize("scheduler", NAMED)
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_a_controlnet_equals_the_controlnet_pipeline(
    client: Client, models: Path, control_image: Image.Image, scheduler: str, scale: float
) -> None:
    control = Control(control_image, model="tiny-controlnet", scale=scale)
    ours = pictures(client, PROMPT, scheduler=scheduler, steps=5, guidance=6, seed=4, controls=[control])
    theirs = draw(
        models / "tiny-sd", PROMPT, scheduler_name=scheduler, seeds=[4], num_inference_steps=5, guidance_scale=6,
        controlnet=models / "tiny-controlnet", control_image=control_image, controlnet_conditioning_scale=scale,
    )  # fmt: skip
    without = pictures(client, PROMPT, scheduler=scheduler, steps=5, guidance=6, seed=4)
    assert worst(ours, theirs) <= 1
    assert worst(ours, without) > 10  # the control has an effect to compare


def test_a_control_picture_of_another_size_is_resized_as_the_pipeline_does(
    client: Client, models: Path, control_image: Image.Image
) -> None:
    small = control_image.resize((50, 38))
    ours = pictures(client, PROMPT, steps=4, seed=4, controls=[Control(small)])
    theirs = draw(
        models / "tiny-sd", PROMPT, seeds=[4], num_inference_steps=4, guidance_scale=7.5, width=64, height=64,
        controlnet=models / "tiny-controlnet", control_image=small,
    )  # fmt: skip
    assert worst(ours, theirs) <= 1


def test_clip_skip_takes_an_earlier_layer_and_norms_it(client: Client, models: Path) -> None:
    ours = pictures(client, PROMPT, steps=4, seed=4, clip_skip=1)
    theirs = draw(
        models / "tiny-sd", None, seeds=[4], num_inference_steps=4, guidance_scale=7.5,
        prompt_embeds=embed(models, [PROMPT], skip=1), negative_prompt_embeds=embed(models, [""], skip=1),
    )  # fmt: skip
    assert worst(ours, theirs) <= 1
    assert worst(ours, pictures(client, PROMPT, steps=4, seed=4)) > 1


def test_a_long_prompt_is_encoded_in_windows_of_75_tokens(client: Client, models: Path) -> None:
    words = ["red", "fox", "dog", "cat", "the", "sea"] * 15  # more tokens than one window holds
    tokenizer = CLIPTokenizer.from_pretrained(models / "tiny-sd" / "tokenizer")
    ids = tokenizer(" ".join(words), add_special_tokens=False).input_ids
    assert 75 < len(ids) <= 225
    windows = [ids[i : i + 75] for i in range(0, len(ids), 75)]
    ours = pictures(client, " ".join(words), steps=4, seed=4)
    theirs = draw(
        models / "tiny-sd", None, seeds=[4], num_inference_steps=4, guidance_scale=7.5,
        prompt_embeds=embed(models, windows), negative_prompt_embeds=embed(models, [""] * len(windows)),
    )  # fmt: skip
    assert worst(ours, theirs) <= 1


def embed(models: Path, windows: list, skip: int = 0) -> torch.Tensor:
    """Embeddings by transformers alone: each window (text or token ids) padded to 77, side by side."""
    path = models / "tiny-sd"
    tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
    model = CLIPTextModel.from_pretrained(path / "text_encoder")
    parts = []
    for window in windows:
        ids = tokenizer(window).input_ids if isinstance(window, str) else window
        if not isinstance(window, str):
            ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        ids = ids + [tokenizer.pad_token_id] * (77 - len(ids))
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-(skip + 1)]
            parts.append(model.final_layer_norm(hidden))
    return torch.cat(parts, dim=1)


OPTIONED = [
    ("DPM++ 2M", {"solver_order": 3, "timestep_spacing": "trailing", "use_lu_lambdas": True}),
    ("DPM++ 2M", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "euler_at_final": True}),
    ("Euler", {"timestep_spacing": "linspace", "use_exponential_sigmas": True}),
    ("UniPC", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    ("DDIM", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": True}),
    ("Heun", {"use_beta_sigmas": True}),
    ("SA Solver", {"predictor_order": 3, "corrector_order": 2}),
]


@pytest.mark.parametrize(("scheduler", "options"), OPTIONED)
def test_options_of_the_scheduler_are_the_librarys(client: Client, models: Path, scheduler: str, options: dict) -> None:
    ours = pictures(client, PROMPT, scheduler=scheduler, scheduler_options=options, steps=7, guidance=5, seed=3)
    theirs = draw(
        models / "tiny-sd", PROMPT, scheduler_name=scheduler, scheduler_options=options, seeds=[3],
        num_inference_steps=7, guidance_scale=5,
    )  # fmt: skip
    assert worst(ours, theirs) <= 1
    plain = pictures(client, PROMPT, scheduler=scheduler, steps=7, guidance=5, seed=3)
    assert worst(ours, plain) > 1


def test_eta_is_the_step_s(client: Client, models: Path) -> None:
    ours = pictures(client, PROMPT, scheduler="DDIM", scheduler_options={"eta": 0.7}, steps=7, guidance=5, seed=3)
    theirs = draw(
        models / "tiny-sd", PROMPT, scheduler_name="DDIM", seeds=[3], num_inference_steps=7, guidance_scale=5, eta=0.7
    )
    assert worst(ours, theirs) <= 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Euler a", {"solver_order": 2}, "scheduler_options must be an option that EulerAncestral"),
        ("DPM++ 2M", {"solver_order": 9}, r"scheduler_options\['solver_order'\] must be a whole number from 1 to 3"),
        ("DPM++ 2M", {"algorithm_type": "dpmsolver"}, "fits the model's own .*sigma_min"),
        ("", {"solver_order": 2}, "names no scheduler"),
    ],
)
def test_an_option_that_it_does_not_take_is_named(client: Client, name: str, options: dict, message: str) -> None:
    with pytest.raises(MeshError, match=message) as caught:
        client.generate(PROMPT, scheduler=name, scheduler_options=options, steps=4)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
