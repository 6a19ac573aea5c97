"""Small random models of the families with a transformer in the UNet's place, in their pipelines' folder layouts."""

import string
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.support import tiny_models as sd

T5_WIDTH = 80


def build_sd3(path: Path, *, t5: bool = True) -> None:
    """A StableDiffusion3Pipeline: 64x64 pixels, 16 channels of latents; without ``t5`` as people save memory."""
    with sd._seeded(11):
        first, second = (sd._tokenizer(path / name) for name in ("tokenizer", "tokenizer_2"))
        third = t5_tokenizer() if t5 else None
        transformer = SD3Transformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=40,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        )
        sd._widen(transformer)
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(),
            text_encoder=clip(first, width=32, projection=24),
            tokenizer=first,
            text_encoder_2=clip(second, width=40, projection=16),
            tokenizer_2=second,
            text_encoder_3=t5_encoder(third) if third is not None else None,
            tokenizer_3=third,
        )
    save(pipeline, path)


def build_flux(path: Path, *, guidance_embeds: bool = True) -> None:
    """A FluxPipeline: CLIP for the summary, T5 for the prompt; without ``guidance_embeds`` as the distilled one."""
    with sd._seeded(12):
        first, second = sd._tokenizer(path / "tokenizer"), t5_tokenizer()
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=32,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        sd._widen(transformer)
        pipeline = FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance_embeds),
            vae=vae(),
            text_encoder=sd._text_encoder(first),
            tokenizer=first,
            text_encoder_2=t5_encoder(second),
            tokenizer_2=second,
        )
    save(pipeline, path)


def save(pipeline: Any, path: Path) -> None:
    """The pipeline, with CLIP's tokenizers in the files that people's folders have."""
    pipeline.save_pretrained(path)
    for folder in path.glob("tokenizer*"):
        if (folder / "merges.txt").exists() and (folder / "vocab.json").exists():
            (folder / "tokenizer.json").unlink(missing_ok=True)
            sd._tokenizer(folder)


def clip(tokenizer: CLIPTokenizer, width: int, projection: int) -> CLIPTextModelWithProjection:
    """One of SD3's two CLIPs."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModelWithProjection(config)
    sd._widen(model)
    return model


def t5_tokenizer() -> T5Tokenizer:
    """A Unigram vocabulary of single characters."""
    characters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *((one, -2.0) for one in characters)], extra_ids=0)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = T5EncoderModel(config)
    sd._widen(model)
    return model


def vae() -> AutoencoderKL:
    """An AutoencoderKL of 16 channels with a shift and no convolutions between, as SD3, Flux and Z-Image have."""
    channels = (16, 16, 32, 32)
    model = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        norm_num_groups=8,
        sample_size=64,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    nn.init.normal_(model.decoder.conv_out.weight, std=0.06)
    return model
