"""What diffusers' own guiders draw: its modular pipeline where it has one, and elsewhere the loop of its documentation,
one pass of the model after another."""

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import guiders
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

from imagemesh_services.diffusion.schedulers import find_scheduler

MIDDLE = "mid_block.attentions.0.transformer_blocks"


def guider(name: str, **options: Any) -> Any:
    """The class of diffusers by that name."""
    return getattr(guiders, name)(**options)


def layers(fqn: str = MIDDLE, indices: tuple[int, ...] = (0, 1), **how: Any) -> LayerSkipConfig:
    """Of a stack of blocks those with these indices, as far as there are such."""
    return LayerSkipConfig(list(indices), fqn=fqn, **how)


@cache
def loaded(path: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler(path: Path, name: str) -> Any:
    choice = find_scheduler(name)
    assert choice is not None
    return getattr(diffusers, choice.class_name).from_config(loaded(path).scheduler.config, **choice.options)


def pixels(image: Any) -> np.ndarray:
    """uint8 [height, width, 3] of 0 to 1."""
    return np.asarray((np.asarray(image) * 255).round(), dtype=np.uint8)


@torch.inference_mode()
def loop(
    path: Path, guide: Any, prompt: str, negative: str, name: str, seed: int, steps: int, control: Any = None
) -> np.ndarray:
    """A StableDiffusionPipeline's denoising loop, guided; a pass that draws begins with the seed and evaluation.

    Args:
        control: a ControlNetModel that is asked in every pass, and a picture of 64x64 for it to follow.
    """
    pipe, sampler = loaded(path), scheduler(path, name)
    generator = torch.Generator("cpu").manual_seed(seed)
    embeds = pipe.encode_prompt(prompt, "cpu", 1, True, negative_prompt=negative)
    sampler.set_timesteps(steps)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * sampler.init_noise_sigma
    for i, t in enumerate(sampler.timesteps):
        guide.set_state(step=i, num_inference_steps=len(sampler.timesteps), timestep=t)
        scaled = sampler.scale_model_input(latents, t)
        passes = guide.prepare_inputs({"prompt_embeds": embeds})
        for one in passes:
            torch.manual_seed(seed * 1_000_003 + i)
            guide.prepare_models(pipe.unet)
            added = {} if control is None else _residuals(*control, scaled, t, one.prompt_embeds)
            found = pipe.unet(scaled, t, encoder_hidden_states=one.prompt_embeds, return_dict=False, **added)
            one.noise_pred = found[0]
            guide.cleanup_models(pipe.unet)
        takes_generator = "generator" in sampler.step.__code__.co_varnames
        extra = {"generator": generator} if takes_generator else {}
        latents = sampler.step(guide(passes)[0], t, latents, **extra, return_dict=False)[0]
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return pixels(pipe.image_processor.postprocess(decoded, output_type="np")[0])


def _residuals(module: Any, picture: Any, scaled: Any, t: Any, embeds: Any) -> dict[str, Any]:
    """What a ControlNet adds to the UNet, as the UNet takes it."""
    seen = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    down, mid = module(scaled, t, encoder_hidden_states=embeds, controlnet_cond=seen, return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def modular(path: Path, guide: Any, prompt: str, negative: str, name: str, seed: int, steps: int) -> np.ndarray:
    """diffusers' modular pipeline of Stable Diffusion XL."""
    pipe = StableDiffusionXLAutoBlocks().init_pipeline(str(path))
    pipe.load_components()
    pipe.update_components(guider=guide, scheduler=scheduler(path, name))
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        prompt=prompt, negative_prompt=negative, num_inference_steps=steps, output="images", output_type="np",
        generator=torch.Generator("cpu").manual_seed(seed), height=64, width=64,
    )  # fmt: skip
    return pixels(made[0])


def perturbed(kind: str, path: Path, prompt: str, negative: str, name: str, seed: int, **settings: Any) -> np.ndarray:
    """diffusers' classic pipelines with perturbed-attention guidance."""
    base = loaded(path)
    parts = {key: value for key, value in base.components.items() if key not in ("image_encoder", "feature_extractor")}
    more = {"requires_safety_checker": False, "feature_extractor": None} if "safety_checker" in parts else {}
    parts["scheduler"] = scheduler(path, name)
    layers = settings.pop("layers", "mid")
    pipe = getattr(diffusers, kind)(**parts, **more, pag_applied_layers=layers)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    return pixels(pipe(prompt, negative_prompt=negative, generator=generator, output_type="np", **settings).images[0])
