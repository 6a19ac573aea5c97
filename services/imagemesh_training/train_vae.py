"""Train the VAE: 64x64 RGB to 8x8x16 latents and back. `python -m imagemesh_training.train_vae --work DIR`.

Loss: L1 + image-gradient L1 (sharp edges) + a little MSE (the figure it is judged by is PSNR) + KL to the unit normal
(Kingma and Welling, 2014), per latent element. With `--decoder-only` the encoder is frozen, so that latents a UNet was
trained on stay what they were, and the decoder learns to bear the small errors of latents that a UNet made.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from imagemesh_training import data
from imagemesh_training.common import Ema, Progress, Run, arguments, autocast, set_lr

CONFIG = {
    "block_out_channels": (32, 64, 96, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": data.PICTURE,
}


def batch_of(rng: np.random.Generator, sprites: data.Sprites, size: int) -> torch.Tensor:
    """Pictures in -1..1, shape (size, 3, 64, 64): named backgrounds mostly, any colour sometimes, a quarter flipped."""
    pictures = []
    for _ in range(size):
        scene = data.random_scene(rng)
        background = data.COLOURS[scene.colour]
        kind = rng.random()
        if kind < 0.2:
            background = (255, 255, 255)
        elif kind < 0.35:
            red, green, blue = rng.integers(0, 256, 3)
            background = (int(red), int(green), int(blue))
        picture = data.paint(sprites[scene.thing], background, data.box_of(scene, rng))
        pictures.append(picture[:, ::-1] if rng.random() < 0.25 else picture)
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """L1 between horizontal and vertical pixel differences: blurred edges cost what L1 alone forgives."""
    across = functional.l1_loss(a.diff(dim=-1), b.diff(dim=-1))
    down = functional.l1_loss(a.diff(dim=-2), b.diff(dim=-2))
    return across + down


def loss_of(
    vae: AutoencoderKL, pixels: torch.Tensor, kl_weight: float, decoder_only: bool
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of one batch of pictures (n, 3, 64, 64), and what to print of it."""
    with autocast():
        with torch.set_grad_enabled(not decoder_only):
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.sample()
        if decoder_only:
            latents = latents + 0.08 * torch.rand(len(latents), 1, 1, 1) * latents.std() * torch.randn_like(latents)
        out = vae.decode(latents).sample
    out = out.float()
    mse = functional.mse_loss(out, pixels)
    l1 = functional.l1_loss(out, pixels)
    edges = gradient_loss(out, pixels)
    kl = posterior.kl().mean() / latents[0].numel()
    loss = l1 + 0.5 * edges + 2 * mse + kl_weight * kl
    errors = (out.detach().clamp(-1, 1) - pixels).square().mean((1, 2, 3))
    decibels = -10 * torch.log10(errors / 4).mean()
    noise = posterior.std.mean()
    return loss, {"l1": l1.item(), "kl": kl.item(), "psnr": decibels.item(), "noise": noise.item()}


@torch.no_grad()
def psnr(vae: AutoencoderKL, sprites: data.Sprites, colour: str) -> float:
    """Mean PSNR in dB of the reconstructions of all things at normal size on one colour (posterior mean, no noise)."""
    pictures = np.stack([data.draw(data.Scene(i, colour), sprites) for i in range(len(sprites))])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    values = []
    for part in torch.split(pixels, 32):
        out = vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((out - part) / 2).square().mean((1, 2, 3))))
    return float(torch.cat(values).mean())


@torch.no_grad()
def measure_scale(vae: AutoencoderKL, sprites: data.Sprites, seed: int = 0) -> float:
    """1 / standard deviation of the latents of training pictures: what `scaling_factor` is for."""
    pixels = batch_of(np.random.default_rng(seed), sprites, 256)
    return float(1 / torch.cat([vae.encode(part).latent_dist.mode() for part in torch.split(pixels, 32)]).std())


def load(folder: Path | None) -> AutoencoderKL:
    """The VAE in a diffusers folder, or a new one."""
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(folder) if folder else AutoencoderKL(**CONFIG)
    return vae.float().to(memory_format=torch.channels_last)


def export(run: Run, sprites: data.Sprites, folder: Path, *, rescale: bool) -> None:
    """Write the averaged weights, with a newly measured scaling factor where `rescale`, and print the figures."""
    vae = run.ema.module
    assert isinstance(vae, AutoencoderKL)
    if rescale:
        vae.register_to_config(scaling_factor=round(measure_scale(vae, sprites), 4))
    vae.save_pretrained(folder)
    figures = {colour: round(psnr(vae, sprites, colour), 2) for colour in ("white", "blue", "black", "yellow")}
    print(f"step {run.step}: scaling factor {vae.config.scaling_factor}, PSNR in dB {figures}", flush=True)


def train(args: argparse.Namespace) -> None:
    """Run the training from wherever its checkpoint left it."""
    torch.manual_seed(args.seed)
    sprites = data.load_sprites(args.work / "cache")
    vae = load(args.init)
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(vae, optimizer, Ema(vae, 0.999), np.random.default_rng(args.seed), args.work / f"{args.name}.pt")
    run.resume()
    progress = Progress(args.steps)
    rescale = not args.decoder_only  # an encoder that stays keeps its scale: the UNet was trained on such latents
    while run.going(args.steps):
        set_lr(optimizer, run.step, args.steps, args.lr)
        loss, figures = loss_of(vae, batch_of(run.rng, sprites, args.batch), args.kl, args.decoder_only)
        run.learn(loss)
        progress.add(run.step, loss=loss.item(), **figures)
        run.save_if_due(args.save_minutes)
        if run.step % args.export_every == 0:
            export(run, sprites, args.work / args.name, rescale=rescale)
    run.save()
    export(run, sprites, args.work / args.name, rescale=rescale)


def main(argv: list[str] | None = None) -> None:
    """Read the flags and train."""
    parser = arguments("Train the VAE", steps=5500, lr=7e-4, batch=16)
    parser.add_argument("--init", type=Path, help="diffusers folder to start from")
    parser.add_argument("--name", default="vae", help="name of the checkpoint and the folder it is exported to")
    parser.add_argument("--kl", type=float, default=1e-3)
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--export-every", type=int, default=1000)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
