"""The figures that say how good the shipped models are. Each takes loaded models and returns plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor

from imagemesh_training import augment, data, edges, poses
from imagemesh_training.captions import plain_caption
from imagemesh_training.data import COLOURS, Pixels, Scene, things
from imagemesh_training.inpaint import inpaint

STEPS = 20
GUIDANCE = 2.0
BATCH = 36


@dataclass(frozen=True)
class Models:
    """The shipped models, loaded the ordinary way, in float32; None for what doesn't ship yet."""

    sd: StableDiffusionPipeline | None
    vit: ViTForImageClassification
    processor: ViTImageProcessor
    control: ControlNetModel | None

    @property
    def pipe(self) -> StableDiffusionPipeline:
        """The text-to-picture pipeline, for the measures that need one."""
        if self.sd is None:
            raise FileNotFoundError("emoji-sd is not among the models")
        return self.sd

    @staticmethod
    def load(root: Path) -> Models:
        sd = None
        if (root / "emoji-sd").exists():
            sd = StableDiffusionPipeline.from_pretrained(root / "emoji-sd", dtype=torch.float32)
            sd.set_progress_bar_config(disable=True)
        vit = ViTForImageClassification.from_pretrained(root / "emoji-vit", dtype=torch.float32).eval()
        processor = ViTImageProcessor.from_pretrained(root / "emoji-vit")
        folder = root / "emoji-controlnet"
        control = ControlNetModel.from_pretrained(folder, dtype=torch.float32) if folder.exists() else None
        return Models(sd, vit, processor, control)


def generate(pipe: Any, prompts: list[str], seed: int = 0, **inputs: list[Any]) -> list[Pixels]:
    """One picture a prompt, in batches; `inputs` are further per-prompt arguments of the pipeline."""
    made: list[Pixels] = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        generator = torch.Generator().manual_seed(seed + start)
        more = {name: values[part] for name, values in inputs.items()}
        out = pipe(
            prompts[part],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generator,
            output_type="np",
            **more,
        ).images
        made += list((out * 255).round().astype(np.uint8))
    return made


@torch.no_grad()
def names_of(models: Models, pictures: list[Pixels]) -> list[int]:
    """What the ViT says each picture shows: indexes of `things()`."""
    pixels = models.processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt").pixel_values
    return [int(i) for part in torch.split(pixels, 128) for i in models.vit(part).logits.argmax(-1)]


def colour_of(picture: Pixels) -> str:
    """The named colour nearest to the median of the picture's outermost two pixels."""
    frame = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3)])
    sides = np.concatenate([picture[:, :2].reshape(-1, 3), picture[:, -2:].reshape(-1, 3)])
    median = np.median(np.concatenate([frame, sides]), axis=0)
    return min(COLOURS, key=lambda name: float(np.square(median - np.array(COLOURS[name])).sum()))


def share(hits: list[bool]) -> float:
    """The part of `hits` that is true."""
    return round(sum(hits) / len(hits), 4)


def psnr_of(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def text_to_image(models: Models) -> dict[str, float | list[str]]:
    """Share of held-out prompts whose thing and colour come out right, and which the ViT read otherwise."""
    scenes = data.pairs(held=True)
    pictures = generate(models.pipe, [plain_caption(scene) for scene in scenes])
    guesses = names_of(models, pictures)
    named = [guess == scene.thing for guess, scene in zip(guesses, scenes, strict=True)]
    coloured = [colour_of(p) == scene.colour for p, scene in zip(pictures, scenes, strict=True)]
    wrong = [
        f"{plain_caption(scene)} -> {things()[guess].name}"
        for guess, scene, right in zip(guesses, scenes, named, strict=True)
        if not right
    ]
    figures = {"prompts": len(scenes), "thing_top1": share(named), "background_right": share(coloured)}
    return {**figures, "drawn_wrong": wrong}


def classifier(models: Models, sprites: data.Sprites, rounds: int = 8) -> dict[str, float]:
    """Top-1 of the ViT on real renders: as they are, and under augmentation that it was not trained with."""
    rng = np.random.default_rng(11)
    scenes = []
    for thing in list(range(len(sprites))) * rounds:
        other = data.random_scene(rng)
        scenes.append(Scene(thing, other.colour, other.size, other.place))
    clean = [data.draw(scene, sprites, rng) for scene in scenes]
    spoiled = [augment.unseen(picture, rng) for picture in clean]
    labels = [scene.thing for scene in scenes]
    right = {
        "renders": [a == b for a, b in zip(names_of(models, clean), labels, strict=True)],
        "unseen_augmentation": [a == b for a, b in zip(names_of(models, spoiled), labels, strict=True)],
    }
    return {"pictures": len(scenes), **{name: share(hits) for name, hits in right.items()}}


@torch.no_grad()
def autoencoder(models: Models, sprites: data.Sprites) -> dict[str, float]:
    """Mean PSNR in dB of all things at normal size, a colour at a time, and over all colours."""
    found: dict[str, float] = {}
    for colour in COLOURS:
        values = []
        for start in range(0, len(sprites), 35):
            drawn = [data.draw(Scene(i, colour), sprites) for i in range(start, min(start + 35, len(sprites)))]
            pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents = models.pipe.vae.encode(pixels).latent_dist.mode()
            back = models.pipe.vae.decode(latents).sample.clamp(-1, 1).permute(0, 2, 3, 1)
            restored = ((back + 1) * 127.5).round().numpy().astype(np.uint8)
            values += [psnr_of(a, b) for a, b in zip(drawn, restored, strict=True)]
        found[colour] = round(float(np.mean(values)), 2)
    return {"all": round(float(np.mean(list(found.values()))), 2), **found}


def control(models: Models, sprites: data.Sprites, count: int = 72) -> dict[str, float]:
    """How well edges are kept with the ControlNet and without; the prompts don't tell the pose."""
    if models.control is None:
        return {}
    rng = np.random.default_rng(5)
    posed = [poses.random_pose(rng, held=True) for _ in range(count)]
    wanted = [edges.canny(poses.draw(pose, sprites)) for pose in posed]
    prompts = [plain_caption(pose.scene) for pose in posed]
    pipe = StableDiffusionControlNetPipeline(**models.pipe.components, controlnet=models.control)
    pipe.set_progress_bar_config(disable=True)
    hints = [Image.fromarray(edges.as_hint(lines)) for lines in wanted]
    arms = {"with": generate(pipe, prompts, image=hints), "without": generate(models.pipe, prompts)}
    found = {
        name: float(np.mean([edges.overlap(edges.canny(p), lines) for p, lines in zip(made, wanted, strict=True)]))
        for name, made in arms.items()
    }
    ratio = found["with"] / max(found["without"], 1e-9)
    return {"iou_with": round(found["with"], 3), "iou_without": round(found["without"], 3), "ratio": round(ratio, 2)}


def image_to_image(models: Models, sprites: data.Sprites, count: int = 72) -> dict[str, float]:
    """Change one thing into another: a low strength keeps the input, a high strength follows the prompt."""
    rng = np.random.default_rng(6)
    before = [data.random_scene(rng) for _ in range(count)]
    prompts = [Scene(data.random_scene(rng).thing, scene.colour) for scene in before]
    drawn = [data.draw(scene, sprites) for scene in before]
    pipe = StableDiffusionImg2ImgPipeline(**models.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    found: dict[str, float] = {}
    for strength in (0.3, 0.9):
        made = []
        for start in range(0, count, BATCH):
            made += _change(pipe, prompts[start : start + BATCH], drawn[start : start + BATCH], strength)
        guesses = names_of(models, made)
        found[f"psnr_to_input_at_{strength}"] = round(float(np.mean([*map(psnr_of, made, drawn)])), 2)
        found[f"named_as_input_at_{strength}"] = share([g == s.thing for g, s in zip(guesses, before, strict=True)])
        found[f"named_as_prompt_at_{strength}"] = share([g == s.thing for g, s in zip(guesses, prompts, strict=True)])
    return found


def _change(pipe: Any, scenes: list[Scene], drawn: list[Pixels], strength: float) -> list[Pixels]:
    out = pipe(
        [plain_caption(scene) for scene in scenes],
        image=[Image.fromarray(picture) for picture in drawn],
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    return list((out * 255).round().astype(np.uint8))


def inpainting(models: Models, sprites: data.Sprites, count: int = 72) -> dict[str, float]:
    """Replace what stands in the middle by another thing: the ViT should name the new one, the rest should stay."""
    rng = np.random.default_rng(8)
    before = [Scene(data.random_scene(rng).thing, str(rng.choice(list(COLOURS)))) for _ in range(count)]
    prompts = [Scene(data.random_scene(rng).thing, scene.colour) for scene in before]
    drawn = [data.draw(scene, sprites) for scene in before]
    mask = np.zeros((data.PICTURE, data.PICTURE), bool)
    mask[8:56, 8:56] = True
    made: list[Pixels] = []
    for start in range(0, count, BATCH):
        part = slice(start, start + BATCH)
        texts = [plain_caption(scene) for scene in prompts[part]]
        made += inpaint(models.pipe, texts, drawn[part], mask, STEPS, GUIDANCE)
    guesses = names_of(models, made)
    return {
        "named_as_prompt": share([g == s.thing for g, s in zip(guesses, prompts, strict=True)]),
        "still_named_as_before": share([g == s.thing for g, s in zip(guesses, before, strict=True)]),
        "background_kept": share([colour_of(p) == s.colour for p, s in zip(made, before, strict=True)]),
    }
