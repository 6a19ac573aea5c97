"""Train the ControlNet: edges or scribbles to pictures. `python -m imagemesh_training.train_controlnet --work DIR`.

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models" (2023): it starts as a copy of the UNet's
down path behind zero-convolutions; the UNet and the text encoder stay as they are. The things stand in poses that the
captions don't tell, and half the captions are dropped, so that it learns to read the edges.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler
from torch.nn import functional
from transformers import CLIPTokenizer

from imagemesh_training import data, edges, poses, tokenizer
from imagemesh_training.captions import caption
from imagemesh_training.common import Ema, Progress, Run, arguments, autocast, set_lr
from imagemesh_training.train_unet import SCHEDULE, Denoiser, draw_timesteps, load

HINT_CHANNELS = (16, 32, 64, 96)  # three strides: 64 pixels to the 8 of the latents


def hints_of(shown: list[poses.Pose], sprites: data.Sprites, rng: np.random.Generator) -> torch.Tensor:
    """Edges of the pictures, or for a third of them scribbles: float (n, 3, 64, 64), 0 or 1."""
    found = []
    for pose in shown:
        picture = poses.draw(pose, sprites)
        lines = edges.scribble(picture, rng) if rng.random() < 0.33 else edges.canny(picture)
        found.append(edges.as_hint(lines))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


def groups_of(control: ControlNetModel) -> list[dict[str, Any]]:
    """The copied weights, and what starts from nothing or from zero: that learns faster, or hints are long unheard."""
    new = ("controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_mid_block.")
    named = list(control.named_parameters())
    return [
        {"params": [value for name, value in named if not name.startswith(new)]},
        {"params": [value for name, value in named if name.startswith(new)], "scale": 4.0},
    ]


def loss_of(
    base: Denoiser, control: ControlNetModel, clean: torch.Tensor, ids: torch.Tensor, hints: torch.Tensor,
    noiser: DDPMScheduler,
) -> torch.Tensor:  # fmt: skip
    """Velocity error of the frozen UNet with this ControlNet's residuals added."""
    noise = torch.randn_like(clean)
    timesteps = draw_timesteps(len(clean), noiser.config.num_train_timesteps)
    noisy = noiser.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
    with autocast():
        with torch.no_grad():
            states = base.text_encoder(ids).last_hidden_state
        down, mid = control(noisy, timesteps, states, hints, return_dict=False)
        predicted = base.unet(
            noisy, timesteps, states, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
    return functional.mse_loss(predicted.float(), noiser.get_velocity(clean, noise, timesteps))


def train(args: argparse.Namespace) -> None:
    """Run the training from wherever its checkpoint left it."""
    torch.manual_seed(args.seed)
    sprites = data.load_sprites(args.work / "cache")
    folder = args.base or args.work / "sd"
    words = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    base = load(folder / "unet", folder / "text_encoder", words).eval().requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    posed = poses.load_or_make(args.work / "cache" / "poses.npz", vae, sprites, args.pictures, args.seed)
    if args.init:
        control = ControlNetModel.from_pretrained(args.init).float()
    else:
        control = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=HINT_CHANNELS)
    control.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(groups_of(control), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    run = Run(control, optimizer, Ema(control, 0.99), np.random.default_rng(args.seed), args.work / "controlnet.pt")
    run.resume()
    noiser = DDPMScheduler(**{k: v for k, v in SCHEDULE.items() if k != "steps_offset"})
    progress = Progress(args.steps)
    while run.going(args.steps):
        set_lr(optimizer, run.step, args.steps, args.lr)
        picked = run.rng.integers(len(posed.poses), size=args.batch).tolist()
        shown = [posed.poses[i] for i in picked]
        texts = [caption(pose.scene, run.rng) if run.rng.random() > 0.5 else "" for pose in shown]
        ids = words(texts, padding="max_length", max_length=tokenizer.LENGTH, return_tensors="pt").input_ids
        loss = loss_of(base, control, posed.at(picked), ids, hints_of(shown, sprites, run.rng), noiser)
        run.learn(loss)
        progress.add(run.step, loss=loss.item())
        run.save_if_due(args.save_minutes)
    run.save()
    average = run.ema.module
    assert isinstance(average, ControlNetModel)
    average.save_pretrained(args.work / "controlnet")


def main(argv: list[str] | None = None) -> None:
    """Read the flags and train."""
    parser = arguments("Train the ControlNet", steps=3000, lr=4e-4, batch=48)
    parser.add_argument("--base", type=Path, help="pipeline folder it controls; default WORK/sd")
    parser.add_argument("--init", type=Path, help="ControlNet folder to start from")
    parser.add_argument("--pictures", type=int, default=12000)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
