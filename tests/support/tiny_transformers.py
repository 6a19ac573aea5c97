"""Small random models of the families with a transformer in the UNet's place, in their pipelines' folder layouts."""

import string
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.support import tiny_models as sd

T5_WIDTH, QWEN_WIDTH = 80, 32
_QWEN: dict[str, Any] = {
    "hidden_size": QWEN_WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_MULTIMODAL_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


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


def build_qwen_image(path: Path) -> None:
    """A QwenImagePipeline: a language model that sees is its text encoder, and its VAE is one of videos."""
    with sd._seeded(13):
        tokenizer = qwen_tokenizer()
        transformer = QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=QWEN_WIDTH,
            axes_dims_rope=(4, 6, 6),
        )
        sd._widen(transformer)
        ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        text = {**_QWEN, **ends, "vocab_size": len(tokenizer), "rope_parameters": _MULTIMODAL_ROPE}
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": QWEN_WIDTH}
        encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
        sd._widen(encoder.model.language_model)
        frames = AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
        nn.init.normal_(frames.decoder.conv_out.weight, std=0.1)
        shifts = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
        pipeline = QwenImagePipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shifts),
            vae=frames,
            text_encoder=encoder,
            tokenizer=tokenizer,
        )
    pipeline.save_pretrained(path)


def build_z_image(path: Path) -> None:
    """A ZImagePipeline: a language model's last but one layer is what it reads."""
    with sd._seeded(14):
        tokenizer = qwen_tokenizer()
        transformer = ZImageTransformer2DModel(
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=QWEN_WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        )
        sd._widen(transformer)
        encoder = Qwen3Model(Qwen3Config(**_QWEN, vocab_size=len(tokenizer)))
        sd._widen(encoder)
        pipeline = ZImagePipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(),
            text_encoder=encoder,
            tokenizer=tokenizer,
        )
    pipeline.save_pretrained(path)


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


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes, and the marks of a conversation."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(code) for code in kept] + [chr(256 + i) for i in range(256 - len(kept))]
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {word: i for i, word in enumerate([*alphabet, *marks])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=marks[1:])
    tokenizer.chat_template = (
        "{% for one in messages %}<|im_start|>{{ one.role }}\n{{ one.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


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
