"""Small random models of Stable Diffusion XL's family, in its folder layouts."""

import json
from pathlib import Path
from typing import Any

from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from tests.support import tiny_models as sd

POOLED, EACH = 24, 8


def build_sdxl(path: Path) -> None:
    """A StableDiffusionXLPipeline: 64x64 pixels, embeddings of 32 + 40 side by side, a pooled one of 24."""
    with sd._seeded(6):
        first, second = sd._tokenizer(path / "tokenizer"), _second_tokenizer(path / "tokenizer_2")
        pipeline = StableDiffusionXLPipeline(
            vae=sd._vae(),
            text_encoder=sd._text_encoder(first),
            text_encoder_2=_second_encoder(second),
            tokenizer=first,
            tokenizer_2=second,
            unet=_unet(width=72, numbers=6),
            scheduler=_scheduler(),
            add_watermarker=False,
        )
    _save(pipeline, path)


def build_refiner(path: Path) -> None:
    """A refiner: the second text encoder alone, and scores where the base has the target's size."""
    with sd._seeded(7):
        second = _second_tokenizer(path / "tokenizer_2")
        pipeline = StableDiffusionXLImg2ImgPipeline(
            vae=sd._vae(),
            text_encoder=None,
            text_encoder_2=_second_encoder(second),
            tokenizer=None,
            tokenizer_2=second,
            unet=_unet(width=40, numbers=5),
            scheduler=_scheduler(),
            requires_aesthetics_score=True,
            add_watermarker=False,
        )
    _save(pipeline, path)


def build_controlnet(path: Path, pipeline_path: Path) -> None:
    """A ControlNetModel for that pipeline's UNet, with zero-convolutions that aren't zero."""
    unet = UNet2DConditionModel.from_pretrained(pipeline_path / "unet")
    with sd._seeded(8):
        controlnet = ControlNetModel.from_unet(unet)
        for part in (controlnet.controlnet_cond_embedding, controlnet.controlnet_down_blocks):
            sd._widen(part)
        sd._widen(controlnet.controlnet_mid_block)
    controlnet.save_pretrained(path)


def build_union(path: Path) -> None:
    """A ControlNetUnionModel of six kinds for that pipeline's UNet, of which no part is zero."""
    with sd._seeded(9):
        controlnet = ControlNetUnionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=72,
            attention_head_dim=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=EACH,
            projection_class_embeddings_input_dim=6 * EACH + POOLED,
            conditioning_embedding_out_channels=(8, 16, 16, 32),
            num_control_type=6,
            num_trans_channel=32,
            num_trans_head=4,
            num_proj_channel=32,
        )
        for part in ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block", "spatial_ch_projs"):
            sd._widen(getattr(controlnet, part))
        sd._widen(controlnet.control_add_embedding)
    controlnet.save_pretrained(path)


def _save(pipeline: Any, path: Path) -> None:
    pipeline.save_pretrained(path)
    for folder in path.glob("tokenizer*"):
        (folder / "tokenizer.json").unlink(missing_ok=True)
        build = _second_tokenizer if folder.name.endswith("_2") else sd._tokenizer
        build(folder)


def _second_tokenizer(path: Path) -> CLIPTokenizer:
    """As the first, but it pads with "!" where the first pads with the end."""
    sd._tokenizer(path)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = json.loads((path / name).read_text()) | {"pad_token": "!"}
        (path / name).write_text(json.dumps(content))
    return CLIPTokenizer.from_pretrained(path)


def _second_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=POOLED,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModelWithProjection(config)
    sd._widen(model)
    return model


def _unet(width: int, numbers: int) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=width,
        attention_head_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=EACH,
        projection_class_embeddings_input_dim=numbers * EACH + POOLED,
    )
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            sd._widen(module)
    sd._widen(unet.add_embedding)
    nn.init.normal_(unet.conv_out.weight, std=0.06)
    return unet


def _scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
