"""Small random models that see depth, classes and people, in transformers' layout."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    YolosConfig,
    YolosForObjectDetection,
)

from tests.support.tiny_models import _processor, _seeded, _widen, _write_json

SIDE = 64  # pixels that the models see
CLASSES = 150
_VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
_LABELS = {0: "person", 1: "chair"}


def _save(
    path: Path,
    make: Callable[[], nn.Module],
    processor: Mapping[str, Any],
    finish: Callable[[Any], None] = lambda model: None,
) -> None:
    with _seeded(5):
        model = make()
        _widen(model)
        finish(model)
    model.save_pretrained(path)  # type: ignore[operator]
    _write_json(path / "preprocessor_config.json", dict(processor))


def _squares(name: str, **more: Any) -> dict[str, Any]:
    return _processor(name, {"height": SIDE, "width": SIDE}) | more


def build_dpt(path: Path) -> None:
    """DPT of a plain ViT: the nearer the higher."""
    config = DPTConfig(
        **_VIT, image_size=SIDE, patch_size=16, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, is_hybrid=False, readout_type="project", head_in_index=-1,
    )  # fmt: skip
    _save(path, lambda: DPTForDepthEstimation(config), _squares("DPTImageProcessor"))


def build_depth_anything(path: Path, kind: str = "metric") -> None:
    """Depth Anything of a DINOv2, which says whether it tells metres."""
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=8, depth_estimation_type=kind, max_depth=20,
    )  # fmt: skip
    processor = _processor("DPTImageProcessor", {"height": 56, "width": 56}) | {
        "keep_aspect_ratio": True, "ensure_multiple_of": 14,
    }  # fmt: skip
    _save(path, lambda: DepthAnythingForDepthEstimation(config), processor)


def build_segformer(path: Path) -> None:
    """Segformer with ADE20K's number of classes."""
    config = SegformerConfig(
        num_labels=CLASSES, hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], depths=[1, 1, 1, 1],
        decoder_hidden_size=16,
    )  # fmt: skip
    _save(path, lambda: SegformerForSemanticSegmentation(config), _squares("SegformerImageProcessor"))


def build_vitpose(path: Path, points: int = 17) -> None:
    """ViTPose for COCO's 17 points, or another number."""
    backbone = VitPoseBackboneConfig(
        **_VIT, image_size=[64, 48], patch_size=[16, 16], out_indices=[4], num_experts=1, part_features=0
    )
    config = VitPoseConfig(backbone_config=backbone, num_labels=points, scale_factor=4, use_simple_decoder=True)
    processor = _processor("VitPoseImageProcessor", {"height": 64, "width": 48})
    _save(path, lambda: VitPoseForPoseEstimation(config), processor)


def build_detector(path: Path, certain: float = 8.0) -> None:
    """YOLOS whose three boxes hold people, as certain as the bias says."""
    config = YolosConfig(
        **_VIT, image_size=[SIDE, SIDE], patch_size=16, num_detection_tokens=3, id2label=_LABELS,
        label2id={label: i for i, label in _LABELS.items()}, use_mid_position_embeddings=False,
    )  # fmt: skip

    def finish(model: Any) -> None:
        with torch.no_grad():
            model.class_labels_classifier.layers[-1].bias.copy_(torch.tensor([certain, 0.0, 0.0]))
            nn.init.normal_(model.vit.embeddings.detection_tokens, std=3)

    _save(path, lambda: YolosForObjectDetection(config), _squares("YolosImageProcessor"), finish)


def build_dexined(path: Path) -> None:
    """DexiNed, of which there is one size; in half precision, to be half as much on the disk."""
    from kornia.models.dexined import DexiNed

    with _seeded(5):
        model = DexiNed(pretrained=False)
    path.mkdir(parents=True)
    _write_json(path / "config.json", {"architectures": ["DexiNed"]})
    save_file(model.half().state_dict(), path / "model.safetensors")


BUILDERS: Mapping[str, Callable[[Path], None]] = {
    "tiny-dpt": build_dpt,
    "tiny-metric": build_depth_anything,
    "tiny-segformer": build_segformer,
    "tiny-vitpose": build_vitpose,
    "dexined": build_dexined,
}


def build_annotators(root: Path) -> Path:
    """A repository with one of each, and no detector; answers ``root``."""
    for name, build in BUILDERS.items():
        build(root / name)
    return root
