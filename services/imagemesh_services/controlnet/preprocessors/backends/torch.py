"""transformers' models for depth, segmentation and poses, and kornia's for edges, each from a folder of its own."""

import inspect
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    VitPoseForPoseEstimation,
)
from transformers.models.auto import modeling_auto

from imagemesh_runtime.errors import FailedPrecondition, NotFinite
from imagemesh_runtime.registry import ModelCard, ModelFolder, cards_of
from imagemesh_runtime.tensors import Array
from imagemesh_services.controlnet.preprocessors.backend import TASK, Annotator, Task
from imagemesh_services.torch_support import (
    TorchBackend,
    building,
    load_module,
    to_numpy,
    to_torch,
)

# Where a model says nothing of it: these tell metres, others nearness.
_METRIC: Final = frozenset({"depth_pro", "glpn", "zoedepth"})
_MAX_PEOPLE: Final = 32
_POINTS: Final = 17
_CERTAIN: Final = 0.5  # of a person that the detector found
# Of a picture at which classes are told apart: with 150 of them their scores are 600 MB in float32.
_CLASS_PIXELS: Final = 1 << 20
# And at which edges are seen; DexiNed was trained on pictures of 1280x720.
_EDGE_PIXELS: Final = 1 << 20
_WEIGHTS: Final = "model.safetensors"


class _Seeing:
    """A transformers model with the image processor of its folder."""

    def __init__(self, name: str, processor: Any, model: Any) -> None:
        self.name, self.processor, self.model = name, processor, model

    def run(self, image: Array, **inputs: Any) -> Any:
        """The outputs for the picture, in float32."""
        # Without its layout named, a picture three pixels high would be taken for channels first.
        batch = self.processor([image], input_data_format="channels_last", return_tensors="pt", **inputs)
        pixels = batch["pixel_values"].to(self.model.device, self.model.dtype)
        more = {name: value.to(self.model.device) for name, value in batch.items() if name == "pixel_mask"}
        return self.model(pixel_values=pixels, **more)

    def finite(self, array: Array, what: str) -> Array:
        """The array.

        Raises:
            NotFinite: it isn't.
        """
        if not np.isfinite(array).all():
            raise NotFinite(self.name, what)
        return array


class DepthAnnotator(_Seeing):
    """A model of ``AutoModelForDepthEstimation``."""

    @torch.inference_mode()
    def look(self, image: Array) -> Array:
        outputs = self.run(image)
        outputs.predicted_depth = outputs.predicted_depth.float()
        post = self.processor.post_process_depth_estimation
        sizes = {name: [image.shape[:2]] for name in ("source_sizes", "target_sizes")}
        known = inspect.signature(post).parameters
        result = post(outputs, **{name: size for name, size in sizes.items() if name in known})[0]
        # The library drops axes of one pixel.
        depth = self.finite(to_numpy(result["predicted_depth"]).reshape(image.shape[:2]), "a depth")
        return -depth if self._far_is_high() else depth

    def _far_is_high(self) -> bool:
        config = self.model.config
        return str(getattr(config, "depth_estimation_type", "")) == "metric" or config.model_type in _METRIC


class ClassAnnotator(_Seeing):
    """A model of ``AutoModelForSemanticSegmentation``."""

    @torch.inference_mode()
    def look(self, image: Array) -> Array:
        scores = self.run(image).logits.float()
        self.finite(to_numpy(scores), "scores of classes")
        share = min(1.0, (_CLASS_PIXELS / (image.shape[0] * image.shape[1])) ** 0.5)
        size = tuple(max(int(side * share), 1) for side in image.shape[:2])
        # As the image processors' ``post_process_semantic_segmentation``, which not all of them have.
        fitted = torch.nn.functional.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        return to_numpy(fitted[0].argmax(dim=0)).astype(np.int32)


class EdgeAnnotator:
    """DexiNed as kornia has it, which also makes its input of a picture's colours.

    Raises:
        FailedPrecondition: the folder has no weights in safetensors, or not DexiNed's.
    """

    def __init__(self, folder: ModelFolder, dtype: torch.dtype, device: torch.device) -> None:
        from kornia.contrib.edge_detection import EdgeDetectorBuilder  # seconds, which few need

        self._name, self._dtype, self._device = folder.name, dtype, device
        with building():
            model = EdgeDetectorBuilder.build("dexined", pretrained=False).model
        try:
            model[1].load_state_dict(load_file(folder.path / _WEIGHTS))
        except (OSError, SafetensorError) as error:
            raise FailedPrecondition(f"{folder.name} has no {_WEIGHTS} that can be read") from error
        except RuntimeError as error:
            raise FailedPrecondition(f"weights of {folder.name} don't fit: {error}") from error
        self._model = model.to(device, dtype).eval().requires_grad_(False)

    @torch.inference_mode()
    def look(self, image: Array) -> Array:
        pixels = to_torch(image, self._device, self._dtype).permute(2, 0, 1)[None] / 255
        share = (_EDGE_PIXELS / (image.shape[0] * image.shape[1])) ** 0.5
        if share < 1:
            size = [int(side * share) for side in image.shape[:2]]
            pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        found = to_numpy(self._model(pixels)[0, 0].float())
        if not np.isfinite(found).all():
            raise NotFinite(self._name, "edges")
        return found


class PeopleAnnotator:
    """VitPose, shown each person that a detector finds; without a detector, the picture as the one person.

    Raises:
        FailedPrecondition: the model knows fewer points than COCO's; those of whole bodies begin with them.
    """

    def __init__(self, pose: _Seeing, detector: _Seeing | None) -> None:
        if pose.model.config.num_labels < _POINTS:
            told = f"{pose.name} tells {pose.model.config.num_labels} points of a body, and COCO's are {_POINTS}"
            raise FailedPrecondition(told)
        self._pose, self._detector = pose, detector

    @torch.inference_mode()
    def look(self, image: Array) -> Array:
        boxes = self._boxes(image)
        if not boxes:
            return np.zeros((0, _POINTS, 3), np.float32)
        outputs = self._run(image, boxes)
        outputs.heatmaps = outputs.heatmaps.float().cpu()
        people = self._pose.processor.post_process_pose_estimation(outputs, boxes=[boxes])[0]
        rows = [torch.cat((one["keypoints"], one["scores"].reshape(-1, 1)), dim=1) for one in people]
        return self._pose.finite(to_numpy(torch.stack(rows)[:, :_POINTS].float()), "points of a body")

    def _run(self, image: Array, boxes: list[list[float]]) -> Any:
        experts = getattr(self._pose.model.config.backbone_config, "num_experts", 1)
        pixels = self._pose.processor(
            [image], boxes=[boxes], input_data_format="channels_last", return_tensors="pt"
        )["pixel_values"].to(self._pose.model.device, self._pose.model.dtype)  # fmt: skip
        # Of several data sets that it may have been trained on, COCO's points are the first.
        chosen = {"dataset_index": torch.zeros(len(boxes), dtype=torch.long, device=pixels.device)}
        return self._pose.model(pixel_values=pixels, **(chosen if experts > 1 else {}))

    def _boxes(self, image: Array) -> list[list[float]]:
        """Left, top, width and height of each person."""
        height, width = image.shape[:2]
        if self._detector is None:
            return [[0.0, 0.0, float(width), float(height)]]
        outputs = self._detector.run(image)
        post = self._detector.processor.post_process_object_detection
        found = post(outputs, threshold=_CERTAIN, target_sizes=[(height, width)])[0]
        people = found["labels"] == _person(self._detector.model.config.id2label)
        order = found["scores"][people].argsort(descending=True)[:_MAX_PEOPLE]
        corners = self._detector.finite(to_numpy(found["boxes"][people][order].float()), "boxes")
        corners = corners.clip(0, [width, height, width, height])
        return [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in corners.tolist() if x2 - x1 >= 1 and y2 - y1 >= 1]


def _person(labels: Mapping[Any, str]) -> int | None:
    """The number of the class of people."""
    return next((int(number) for number, label in labels.items() if label.casefold() == "person"), None)


def _names(mapping: Mapping[str, Any]) -> frozenset[str]:
    found: set[str] = set()
    for entry in mapping.values():
        found.update([entry] if isinstance(entry, str) else entry)
    return frozenset(found)


_CLASSES_OF_TASK: Final[Mapping[Task, frozenset[str]]] = {
    Task.DEPTH: _names(modeling_auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES),
    Task.CLASSES: _names(modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES),
    Task.PEOPLE: frozenset({"VitPoseForPoseEstimation"}),
    Task.EDGES: frozenset({"DexiNed"}),
}
_DETECTORS: Final = _names(modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES)


class TorchAnnotators(TorchBackend):
    """Runs folders in the layouts of Intel/dpt-large, nvidia/segformer-b0-finetuned-ade-512-512 and
    usyd-community/vitpose-base-simple, whatever their architecture, and DexiNed's weights.
    """

    def cards(self) -> Mapping[str, ModelCard]:
        return cards_of(self.repository.folders().values(), _card)

    def load(self, name: str) -> Annotator:
        folder = self.repository.folders()[name]
        task = _task(folder)
        if task is Task.PEOPLE:
            return PeopleAnnotator(self._open(folder, VitPoseForPoseEstimation), self._detector())
        if task is Task.EDGES:
            return EdgeAnnotator(folder, self._dtype, self._device)
        if task is Task.CLASSES:
            seeing = self._open(folder, AutoModelForSemanticSegmentation)
            return ClassAnnotator(seeing.name, seeing.processor, seeing.model)
        seeing = self._open(folder, AutoModelForDepthEstimation)
        return DepthAnnotator(seeing.name, seeing.processor, seeing.model)

    def _detector(self) -> _Seeing | None:
        """The first model by name that finds people."""
        for _, folder in sorted(self.repository.folders().items()):
            labels = folder.config.get("id2label")
            if _architecture(folder) in _DETECTORS and isinstance(labels, dict) and _person(labels) is not None:
                return self._open(folder, AutoModelForObjectDetection)
        return None

    def _open(self, folder: ModelFolder, cls: Any) -> _Seeing:
        # torchvision, where it is installed, would resize to slightly other pixels than Pillow.
        processor = AutoImageProcessor.from_pretrained(folder.path, backend="pil")
        return _Seeing(folder.name, processor, load_module(cls, folder.path, self._dtype, self._device))


def _architecture(folder: ModelFolder) -> str:
    """The class that the folder was saved from; "" where it doesn't say."""
    names = folder.config.get("architectures") or [""]
    return str(names[0])


def _task(folder: ModelFolder) -> Task | None:
    return next((task for task, names in _CLASSES_OF_TASK.items() if _architecture(folder) in names), None)


def _card(folder: ModelFolder) -> ModelCard | None:
    task = _task(folder)
    return task and ModelCard(folder.name, {"class": _architecture(folder), TASK: task.value})
