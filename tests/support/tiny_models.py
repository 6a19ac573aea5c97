"""Small random models in the standard folder layouts, the same on every machine that has the same torch.

They mean nothing, but they are not numb: their weights are drawn wide enough that another prompt, seed or control
picture gives a visibly other picture, so that a comparison with them can fail.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    DeiTConfig,
    DeiTForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ("t h", "th e</w>", "c a", "ca t</w>", "d o", "do g</w>", "r e", "re d</w>", "i n", "o n</w>", "a n", "e r")
LABELS = ("cat", "dog", "bird", "fish", "tree", "house", "car", "boat", "cup", "star")


def build_models(root: Path) -> Path:
    """A repository with "tiny-sd", "tiny-controlnet" (for tiny-sd) and "tiny-vit"; answers ``root``."""
    build_stable_diffusion(root / "tiny-sd")
    build_controlnet(root / "tiny-controlnet", root / "tiny-sd")
    build_vit(root / "tiny-vit")
    return root


def build_stable_diffusion(path: Path) -> None:
    """A StableDiffusionPipeline in SD 1.5's layout: 64x64 pixels, 8x8 latents of 4 channels, width 32 of prompts."""
    with _seeded(1):
        tokenizer = _tokenizer(path / "tokenizer")
        pipeline = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=_unet(),
            scheduler=_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(path)
    # transformers saves its own format of late; the folders that people have hold these files.
    (path / "tokenizer" / "tokenizer.json").unlink()
    _tokenizer(path / "tokenizer")


def build_inpainting(path: Path, pipeline_path: Path) -> None:
    """The same pipeline with a UNet of 9 channels, as Stable Diffusion's inpainting models have."""
    with _seeded(5):
        unet = _unet(in_channels=9)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(pipeline_path, unet=unet, safety_checker=None)
    pipeline.save_pretrained(path)
    (path / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    _tokenizer(path / "tokenizer")


def build_controlnet(path: Path, pipeline_path: Path) -> None:
    """A ControlNetModel for that pipeline's UNet, with zero-convolutions that aren't zero."""
    unet = UNet2DConditionModel.from_pretrained(pipeline_path / "unet")
    with _seeded(2):
        controlnet = ControlNetModel.from_unet(unet)
        _widen(controlnet.controlnet_cond_embedding)
        _widen(controlnet.controlnet_down_blocks)
        _widen(controlnet.controlnet_mid_block)
    controlnet.save_pretrained(path)


def build_adapter(path: Path, seed: int, **settings: Any) -> None:
    """A T2IAdapter with features for the UNet's two down blocks."""
    shape = {"channels": [32, 64], "num_res_blocks": 1, "downscale_factor": 8}
    with _seeded(seed):
        adapter = T2IAdapter(**{**shape, **settings})
        _widen(adapter)
    adapter.save_pretrained(path)


def build_vit(path: Path) -> None:
    """A ViTForImageClassification in the layout of google/vit-base-patch16-224: 32x32 pixels, 17 tokens of 32."""
    with _seeded(3):
        model = ViTForImageClassification(ViTConfig(**_VIT))
        _widen(model)
    model.save_pretrained(path)
    _write_json(path / "preprocessor_config.json", _processor("ViTImageProcessor", {"height": 32, "width": 32}))


def build_deit(path: Path) -> None:
    """A DeiTForImageClassification: as ``build_vit``, with a distillation token and a centre crop."""
    with _seeded(4):
        model = DeiTForImageClassification(DeiTConfig(**_VIT))
        _widen(model)
    model.save_pretrained(path)
    processor = _processor("DeiTImageProcessor", {"height": 40, "width": 40})
    crop = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    _write_json(path / "preprocessor_config.json", processor | crop)


_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "id2label": dict(enumerate(LABELS)),
    "label2id": {label: i for i, label in enumerate(LABELS)},
}


def _processor(kind: str, size: dict[str, int]) -> dict[str, object]:
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": kind,
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": size,
    }


def _tokenizer(path: Path) -> CLIPTokenizer:
    """CLIP's byte-level BPE over a small vocabulary: every byte, inside and at the end of a word, and MERGES."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(code) for code in kept] + [chr(256 + i) for i in range(256 - len(kept))]
    words = [*alphabet, *(f"{one}</w>" for one in alphabet), *(pair.replace(" ", "") for pair in MERGES), START, END]
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "vocab.json", {word: i for i, word in enumerate(words)})
    (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{pair}\n" for pair in MERGES))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    _write_json(path / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace"}
    _write_json(path / "tokenizer_config.json", settings | special | {"add_prefix_space": False})
    return CLIPTokenizer.from_pretrained(path)


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=32,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    _widen(model)
    return model


def _unet(in_channels: int = 4) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        in_channels=in_channels,
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            _widen(module)
    nn.init.normal_(unet.conv_out.weight, std=0.06)
    return unet


def _vae() -> AutoencoderKL:
    channels = (16, 16, 32, 32)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        norm_num_groups=8,
        sample_size=64,
    )
    nn.init.normal_(vae.decoder.conv_out.weight, std=0.06)
    return vae


def _scheduler() -> PNDMScheduler:
    """With the settings of Stable Diffusion 1.5; those that PNDM has no use for are kept for the classes that do.

    DDIM would else clip what it takes the picture to be at every step, which makes so small a model chaotic: the
    library's own pipeline then differs from itself by 2/255 where its rows stand in a larger batch.
    """
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "clip_sample": False,
    }
    made: PNDMScheduler = PNDMScheduler.from_config(settings)
    return made


def _widen(model: nn.Module) -> None:
    """The libraries draw weights for training to begin with; at those, every input gives nearly the same output."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=1.4 * fan_in**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.normal_(module.weight, mean=1, std=0.2)
            nn.init.normal_(module.bias, std=0.2)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        yield


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
