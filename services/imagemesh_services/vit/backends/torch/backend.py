"""Which folders are classifiers, and how they are loaded."""

import logging
from collections.abc import Mapping
from typing import Any, Final

import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.registry import ModelCard, ModelFolder, cards_of
from imagemesh_services.torch_support import TorchBackend, load_module
from imagemesh_services.vit.backends.torch.model import TorchVitModel
from imagemesh_services.vit.backends.torch.states import read_state
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.processors import load_processor
from imagemesh_services.vit.weights import FORMATS, PICKLE, Weights, find_weights

log = logging.getLogger(__name__)

# What is read without asking, best first; a pickle only where the operator allows it, and then last.
SAFE: Final = ("safetensors", "flax", "tensorflow")


def _classifiers() -> frozenset[str]:
    """The classes that ``AutoModelForImageClassification`` picks from."""
    names: set[str] = set()
    for entry in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values():
        names.update([entry] if isinstance(entry, str) else entry)
    return frozenset(names)


CLASSIFIERS = _classifiers()


class TorchVit(TorchBackend):
    """Runs folders in the layout of google/vit-base-patch16-224, whatever their architecture."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__(config)
        self._formats = (*SAFE, PICKLE) if config.unsafe_pickles else SAFE

    def cards(self) -> Mapping[str, ModelCard]:
        return cards_of(self.repository.folders().values(), self._card)

    def load(self, name: str) -> TorchVitModel:
        folder = self.repository.folders()[name]
        weights = self._weights(folder)
        processor = load_processor(folder.path)
        module = self._module(folder, weights)
        log.info("vit: %s has its weights from %s (%s)", name, weights.files[0].name, weights.format)
        return TorchVitModel(name, processor, module, labels_of(name, module.config))

    def _module(self, folder: ModelFolder, weights: Weights) -> Any:
        cls = getattr(transformers, _architecture(folder))
        if weights.format == "safetensors":
            return load_module(cls, folder.path, self._dtype, self._device)
        config = AutoConfig.from_pretrained(folder.path)
        state = read_state(folder.name, weights)
        return load_module(cls, folder.path, self._dtype, self._device, state_dict=state, config=config)

    def _weights(self, folder: ModelFolder) -> Weights:
        """The weights to load.

        Raises:
            FailedPrecondition: there are none, or only a pickle, and those aren't allowed.
        """
        found = find_weights(folder.path, self._formats)
        if found is not None:
            return found
        if find_weights(folder.path, [PICKLE]) is not None:
            raise FailedPrecondition(
                f"model {folder.name} has its weights only as a PyTorch pickle, which could run any code: convert it to"
                " safetensors, or set unsafe_pickles (IMAGEMESH_VIT_UNSAFE_PICKLES=true) to have its tensors, and"
                " nothing else in it, loaded"
            )
        names = ", ".join(FORMATS[format][0] for format in self._formats)
        raise FailedPrecondition(f"model {folder.name} has no weights that this backend reads: none of {names}")

    def _card(self, folder: ModelFolder) -> ModelCard | None:
        if _architecture(folder) not in CLASSIFIERS:
            return None
        try:
            weights = find_weights(folder.path, self._formats)
        except FailedPrecondition as error:  # half copied: whoever asks for it is told, and it hides no other
            log.warning("vit: %s", error)
            weights = None
        properties = {"class": _architecture(folder), "labels": str(len(folder.config.get("id2label", ())))}
        return ModelCard(folder.name, properties | ({"format": weights.format} if weights else {}))


def _architecture(folder: ModelFolder) -> str:
    """The class that the folder was saved from; "" where it doesn't say."""
    names = folder.config.get("architectures") or [""]
    return str(names[0])


def labels_of(name: str, config: Any) -> list[str]:
    """The labels in the order of the head's rows; load_module has seen to it that there are as many of both.

    Raises:
        FailedPrecondition: they are not numbered from 0 on.
    """
    found: dict[int, str] = config.id2label
    if not found or sorted(found) != list(range(len(found))):
        raise FailedPrecondition(f"model {name}: id2label of its config.json must number the labels from 0 on")
    return [found[i] for i in range(len(found))]
