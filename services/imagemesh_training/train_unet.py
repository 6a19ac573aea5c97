"""Train the UNet on a text encoder that can read (`train_text`). `python -m imagemesh_training.train_unet --work DIR`.

On cached latents; the loss is the mean squared error of the velocity (Salimans and Ho, "Progressive Distillation",
2022) with the noisier timesteps drawn more often. A tenth of the captions is dropped for classifier-free guidance (Ho
and Salimans, 2022). The text encoder stays as it was taught.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from imagemesh_training import data, latents, tokenizer
from imagemesh_training.captions import caption, plain_caption
from imagemesh_training.common import Ema, Progress, Run, arguments, autocast, set_lr
from imagemesh_training.measures import GUIDANCE

# A schedule between Stable Diffusion's and zero terminal SNR (Lin et al., 2024): at the last step 2.8% of the signal is
# left instead of 6.8%, so a flat background is not washed out, and no scheduler meets an infinite sigma.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0005,
    "beta_end": 0.018,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
REPEAT = 2  # noise levels a picture in one batch: its caption is encoded once
WIDTH = 128  # of the text encoder, and so of cross-attention
PICTURES = 6000  # in the training set of latents
# What is drawn is above all one thing: a summary of the caption goes to every ResBlock with the timestep, as classes do
# in Dhariwal and Nichol ("Diffusion Models Beat GANs", 2021). Attention, half of the cost at 8x8, is left to 4x4.
UNET = {
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "block_out_channels": (160, 160),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 5,  # diffusers' name for the number of heads
    "norm_num_groups": 16,
    "use_linear_projection": True,
    "addition_embed_type": "text",
    "resnet_time_scale_shift": "scale_shift",
}


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, so that one optimizer, one average and one checkpoint hold both."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """noisy (n, 16, 8, 8), timesteps (n,), ids (n / k, 77), each for k rows -> predicted velocity (n, 16, 8, 8)."""
        with torch.no_grad():
            states = self.text_encoder(ids).last_hidden_state.repeat_interleave(len(noisy) // len(ids), 0)
        velocity: torch.Tensor = self.unet(noisy, timesteps, states).sample
        return velocity


def new_text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder for this vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.LENGTH,
        hidden_act="gelu",
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CLIPTextModel(config)


def load(unet: Path | None, text_encoder: Path | None, words: CLIPTokenizer) -> Denoiser:
    """The denoiser in these folders; new parts where there is no folder."""
    text = CLIPTextModel.from_pretrained(text_encoder).float() if text_encoder else new_text_encoder(words)
    body = UNet2DConditionModel.from_pretrained(unet).float() if unet else UNet2DConditionModel(**UNET)
    return Denoiser(text, body.to(memory_format=torch.channels_last))  # a seventh faster


def pipeline(model: Denoiser, vae: AutoencoderKL, words: CLIPTokenizer) -> StableDiffusionPipeline:
    """The ordinary Stable Diffusion pipeline around these parts, which is also what gets exported."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=words,
        unet=model.unet,
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_timesteps(count: int, steps: int, power: float = 0.5) -> torch.Tensor:
    """All alike at power 1; below it the noisier more often, where the words alone decide what the thing is."""
    return (torch.rand(count) ** power * steps).long().clamp(max=steps - 1)


def loss_of(
    model: Denoiser, clean: torch.Tensor, ids: torch.Tensor, noiser: DDPMScheduler, power: float
) -> torch.Tensor:
    """Velocity error on scaled latents (n, 16, 8, 8) and token ids (n, 77)."""
    noise = torch.randn_like(clean)
    timesteps = draw_timesteps(len(clean), noiser.config.num_train_timesteps, power)
    noisy = noiser.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
    with autocast():
        predicted = model(noisy, timesteps, ids)
    return functional.mse_loss(predicted.float(), noiser.get_velocity(clean, noise, timesteps))


def preview(pipe: StableDiffusionPipeline, path: Path, count: int = 40) -> None:
    """Pictures of `count` held-out prompts, ten a row."""
    rng = np.random.default_rng(7)
    prompts = [plain_caption(data.random_scene(rng, held=True)) for _ in range(count)]
    with autocast():
        generator = torch.Generator().manual_seed(0)
        out = pipe(
            prompts, num_inference_steps=20, guidance_scale=GUIDANCE, generator=generator, output_type="np"
        ).images
    rows = out.reshape(-1, 10, *out.shape[1:]).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(rows.shape[0] * rows.shape[1], -1, 3)
    Image.fromarray((rows * 255).round().astype(np.uint8)).save(path)


def export(run: Run, vae: AutoencoderKL, words: CLIPTokenizer, folder: Path) -> None:
    """Write the averaged weights as a pipeline folder, with a preview beside them."""
    model = run.ema.module
    assert isinstance(model, Denoiser)
    pipe = pipeline(model, vae, words)
    pipe.save_pretrained(folder)
    preview(pipe, folder / f"preview-{run.step}.png")


def parts_to_start_from(args: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """Folders of the UNet and the text encoder it knows: both of `--init`; or no UNet, and what `train_text` wrote."""
    if args.init:
        return args.init / "unet", args.init / "text_encoder"
    taught = args.work / "text_encoder"
    return None, taught if taught.exists() else None


def train(args: argparse.Namespace) -> None:
    """Run the training from wherever its checkpoint left it."""
    torch.manual_seed(args.seed)
    sprites = data.load_sprites(args.work / "cache")
    words = tokenizer.build(args.work / "tokenizer")
    vae = AutoencoderKL.from_pretrained(args.vae or args.work / "vae").eval().requires_grad_(False)
    cached = latents.load_or_make(args.work / "cache" / "latents.npz", vae, sprites, args.pictures, args.seed)
    model = load(*parts_to_start_from(args), words)
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    run = Run(model, optimizer, Ema(model, 0.995), np.random.default_rng(args.seed), args.work / "unet.pt")
    run.resume()
    noiser = DDPMScheduler(**{k: v for k, v in SCHEDULE.items() if k != "steps_offset"})
    progress = Progress(args.steps)
    while run.going(args.steps):
        set_lr(optimizer, run.step, args.steps, args.lr)
        picked = cached.pick(run.rng, args.batch // REPEAT, args.focus)
        texts = [caption(cached.scenes[i], run.rng) if run.rng.random() > 0.1 else "" for i in picked]
        ids = words(texts, padding="max_length", max_length=tokenizer.LENGTH, return_tensors="pt").input_ids
        loss = loss_of(model, cached.at(picked).repeat_interleave(REPEAT, 0), ids, noiser, args.power)
        run.learn(loss)
        progress.add(run.step, loss=loss.item())
        run.save_if_due(args.save_minutes)
        if run.step % args.export_every == 0:
            export(run, vae, words, args.work / "sd")
    run.save()
    export(run, vae, words, args.work / "sd")


def main(argv: list[str] | None = None) -> None:
    """Read the flags and train."""
    parser = arguments("Train the UNet and the text encoder", steps=6500, lr=8e-4, batch=48)
    parser.add_argument("--init", type=Path, help="pipeline folder to start from")
    parser.add_argument("--vae", type=Path, help="VAE folder; default WORK/vae")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="how many scenes to encode beforehand")
    parser.add_argument("--focus", type=float, default=0.5, help="extra share of plain scenes, which teach the names")
    parser.add_argument(
        "--power", type=float, default=0.7, help="of the timesteps: 1 all alike, less noisier ones more"
    )
    parser.add_argument("--export-every", type=int, default=1500)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
