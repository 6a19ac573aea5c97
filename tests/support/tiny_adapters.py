"""Small random IP-Adapters in the layout of h94/IP-Adapter: safetensors files beside an image encoder."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.support import tiny_models as sd

WIDTH, PROJECTED, SIDE = 40, 24, 32


def build_adapters(folder: Path, pipeline_path: Path) -> None:
    """``plain`` and ``plus`` for that pipeline's UNet, beside an encoder that sees 32x32 pixels."""
    unet = UNet2DConditionModel.from_pretrained(pipeline_path / "unet")
    with sd._seeded(21):
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=64,
                projection_dim=PROJECTED,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=SIDE,
                patch_size=8,
            )
        )
        sd._widen(encoder)
        cross = unet.config.cross_attention_dim
        attention = _attention(unet, cross)
        kinds = {"plain": _projection(cross), "plus": _resampler(cross)}
    encoder.save_pretrained(folder / "image_encoder")
    for name, projection in kinds.items():
        weights = {f"image_proj.{key}": value for key, value in projection.items()}
        save_file(weights | attention, folder / f"{name}.safetensors")


def _attention(unet: Any, cross: int) -> dict[str, torch.Tensor]:
    """Keys and values of pictures for each cross-attention, numbered as diffusers counts them."""
    found, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            size = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            for part in ("k", "v"):
                found[f"ip_adapter.{number}.to_{part}_ip.weight"] = _drawn(size, cross)
            number += 2
    return found


def _projection(cross: int) -> dict[str, torch.Tensor]:
    return {"proj.weight": _drawn(4 * cross, PROJECTED), "proj.bias": _drawn(4 * cross)} | _norm("norm", cross)


def _resampler(cross: int) -> dict[str, torch.Tensor]:
    """Four layers, which the library takes them to be, with one head of 64; four queries."""
    inner = 64
    found = {"latents": _drawn(1, 4, inner)}
    for name, (out, into) in {"proj_in": (inner, WIDTH), "proj_out": (cross, inner)}.items():
        found |= {f"{name}.weight": _drawn(out, into), f"{name}.bias": _drawn(out)}
    found |= _norm("norm_out", cross)
    shapes = {"0.to_q": (64, inner), "0.to_kv": (128, inner), "0.to_out": (inner, 64)}
    shapes |= {"1.1": (4 * inner, inner), "1.3": (inner, 4 * inner)}
    for layer in (f"layers.{i}" for i in range(4)):
        for name in ("0.norm1", "0.norm2", "1.0"):
            found |= _norm(f"{layer}.{name}", inner)
        found |= {f"{layer}.{name}.weight": _drawn(*shape) for name, shape in shapes.items()}
    return found


def _norm(name: str, width: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": 1 + 0.2 * torch.randn(width), f"{name}.bias": 0.2 * torch.randn(width)}


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * 1.4 * shape[-1] ** -0.5 if len(shape) > 1 else 0.1 * torch.randn(*shape)
