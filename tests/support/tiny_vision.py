"""Small random classifiers of further architectures, 32x32 pixels and ten labels each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from tests.support.tiny_models import LABELS, _processor, _seeded, _widen, _write_json, build_deit, build_vit

_LABELLED = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
_DINO = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 48,  # other than the processor's pictures, as facebook/dinov2-base's is: positions are interpolated
    "patch_size": 8,
}
_CROPPED = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}


def _save(path: Path, make: Callable[[], nn.Module], processor: Mapping[str, Any]) -> None:
    with _seeded(5):
        model = make()
        _widen(model)
    model.save_pretrained(path)  # type: ignore[operator]
    _write_json(path / "preprocessor_config.json", dict(processor))


def _swin(path: Path) -> None:
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, **_LABELLED
    )
    processor = _processor("ViTImageProcessor", {"height": 32, "width": 32})
    _save(path, lambda: SwinForImageClassification(config), processor)


def _convnext(path: Path) -> None:
    config = ConvNextConfig(image_size=32, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], **_LABELLED)
    processor = _processor("ConvNextImageProcessor", {"shortest_edge": 32}) | {"crop_pct": 0.875}
    _save(path, lambda: ConvNextForImageClassification(config), processor)


def _dinov2(path: Path) -> None:
    processor = _processor("BitImageProcessor", {"shortest_edge": 36}) | _CROPPED
    _save(path, lambda: Dinov2ForImageClassification(Dinov2Config(**_DINO, **_LABELLED)), processor)


def _registers(path: Path) -> None:
    config = Dinov2WithRegistersConfig(**_DINO, num_register_tokens=3, **_LABELLED)
    processor = _processor("BitImageProcessor", {"shortest_edge": 36}) | _CROPPED
    _save(path, lambda: Dinov2WithRegistersForImageClassification(config), processor)


def _resnet(path: Path) -> None:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10, **_LABELLED
    )
    processor = _processor("ConvNextImageProcessor", {"shortest_edge": 32}) | {"crop_pct": 0.875}
    _save(path, lambda: ResNetForImageClassification(config), processor)


BUILDERS: Mapping[str, Callable[[Path], None]] = {
    "vit": build_vit,
    "deit": build_deit,
    "swin": _swin,
    "convnext": _convnext,
    "dinov2": _dinov2,
    "dinov2-registers": _registers,
    "resnet": _resnet,
}


def build_classifiers(root: Path) -> Path:
    """A repository with one of each; answers ``root``."""
    for name, build in BUILDERS.items():
        build(root / name)
    return root
