"""Which folders are classifiers, and how they are loaded."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.registry import ModelCard, ModelFolder, cards_of
from imagemesh_services.repository import open_repository
from imagemesh_services.torch_support import load_module, pick_device, pick_dtype, set_threads
from imagemesh_services.vit.backends.torch.model import TorchVitModel
from imagemesh_services.vit.config import VitConfig


def _classifiers() -> frozenset[str]:
    """The classes that ``AutoModelForImageClassification`` picks from."""
    names: set[str] = set()
    for entry in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values():
        names.update([entry] if isinstance(entry, str) else entry)
    return frozenset(names)


CLASSIFIERS = _classifiers()


class TorchVit:
    """Runs folders in the layout of google/vit-base-patch16-224, whatever their architecture."""

    name = "torch"

    def __init__(self, config: VitConfig) -> None:
        self.repository = open_repository(config)
        self._device = pick_device(config.device)
        self._dtype = pick_dtype(config.dtype)
        self.device, self.dtype = str(self._device), config.dtype
        set_threads(config.threads)

    def cards(self) -> Mapping[str, ModelCard]:
        return cards_of(self.repository.folders().values(), _card)

    def load(self, name: str) -> TorchVitModel:
        folder = self.repository.folders()[name]
        # torchvision, where it is installed, would resize to slightly other pixels than Pillow.
        processor = AutoImageProcessor.from_pretrained(folder.path, backend="pil")
        module = load_module(AutoModelForImageClassification, folder.path, self._dtype, self._device)
        return TorchVitModel(name, processor, module, labels_of(name, module.config))


def _architecture(folder: ModelFolder) -> str:
    """The class that the folder was saved from; "" where it doesn't say."""
    names = folder.config.get("architectures") or [""]
    return str(names[0])


def _card(folder: ModelFolder) -> ModelCard | None:
    if _architecture(folder) not in CLASSIFIERS:
        return None
    properties = {"class": _architecture(folder), "labels": str(len(folder.config.get("id2label", ())))}
    return ModelCard(folder.name, properties)


def labels_of(name: str, config: Any) -> list[str]:
    """The labels in the order of the head's rows; load_module has seen to it that there are as many of both.

    Raises:
        FailedPrecondition: they are not numbered from 0 on.
    """
    found: dict[int, str] = config.id2label
    if not found or sorted(found) != list(range(len(found))):
        raise FailedPrecondition(f"model {name}: id2label of its config.json must number the labels from 0 on")
    return [found[i] for i in range(len(found))]
