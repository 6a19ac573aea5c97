"""A model to measure with: a UNet of about 30 million parameters at 32x32 latents, random weights."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.support.tiny_models import build_stable_diffusion

NAME = "bench-sd"
SIDE = 256  # pixels; 32x32 latents


def build(root: Path) -> None:
    """Write ``root/bench-sd``: tiny-sd's tokenizer and scheduler around larger modules."""
    build_stable_diffusion(root / NAME)
    tiny = StableDiffusionPipeline.from_pretrained(root / NAME)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(128, 256, 320),
        layers_per_block=1,
        cross_attention_dim=256,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
    )
    config = CLIPTextConfig(**(tiny.text_encoder.config.to_dict() | {
        "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}))  # fmt: skip
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        tokenizer=tiny.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_config(tiny.scheduler.config, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root / NAME)
    print(f"model: UNet {sum(p.numel() for p in unet.parameters()) / 1e6:.1f}M parameters at 32x32 latents")
