"""transformers' Vision Transformers in torch."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.registry import ModelCard, ModelFolder, cards_of
from imagemesh_runtime.tensors import Array
from imagemesh_services.repository import open_repository
from imagemesh_services.torch_support import load_module, pick_device, pick_dtype, set_threads, to_numpy, to_torch
from imagemesh_services.vit.backend import Embedding, Pooling
from imagemesh_services.vit.config import VitConfig

# Classification heads that this backend runs, and their tokens before the first patch: the class token, and DeiT's
# distillation token (https://arxiv.org/abs/2012.12877). Adding one is adding a row.
PREFIX_TOKENS: Final[Mapping[str, int]] = {
    "ViTForImageClassification": 1,
    "DeiTForImageClassification": 2,
    "DeiTForImageClassificationWithTeacher": 2,
}


class TorchVitModel:
    """A transformers classifier with the image processor of its folder."""

    def __init__(self, processor: Any, model: Any, labels: Sequence[str], prefix: int) -> None:
        config = model.config
        self.labels = labels
        self.layers: int = config.num_hidden_layers
        self.width: int = config.hidden_size
        self.tokens: int = model.base_model.embeddings.position_embeddings.shape[1]
        self._processor = processor
        self._model = model
        self._prefix = prefix

    def preprocess(self, image: Array) -> Array:
        # Without its layout named, a picture three pixels high would be taken for channels first.
        batch = self._processor([image], input_data_format="channels_last", return_tensors="np")
        pixels: Array = batch["pixel_values"][0].astype(np.float32, copy=False)
        return pixels

    @torch.inference_mode()
    def classify(self, pixels: Array) -> Array:
        return to_numpy(self._model(self._rows(pixels)).logits.float())

    @torch.inference_mode()
    def embed(self, pixels: Array, pooling: Pooling, hidden_states: bool) -> Embedding:
        """``last_hidden_state`` is ``layernorm(hidden_states[-1])`` in both ViTModel and DeiTModel."""
        output = self._model.base_model(self._rows(pixels), output_hidden_states=hidden_states)
        last = output.last_hidden_state
        vectors = last[:, 0] if pooling is Pooling.CLS else last[:, self._prefix :].mean(dim=1)
        states = to_numpy(torch.stack(output.hidden_states, dim=1).float()) if hidden_states else None
        return Embedding(to_numpy(vectors.float()), states)

    def _rows(self, pixels: Array) -> torch.Tensor:
        return to_torch(pixels, self._model.device, self._model.dtype)


class TorchVit:
    """Runs folders in the layout of google/vit-base-patch16-224."""

    name = "torch"

    def __init__(self, config: VitConfig) -> None:
        self._repository = open_repository(config)
        self._device = pick_device(config.device)
        self._dtype = pick_dtype(config.dtype)
        self.device, self.dtype = str(self._device), config.dtype
        set_threads(config.threads)

    def cards(self) -> Mapping[str, ModelCard]:
        return cards_of(self._repository.folders().values(), _card)

    def load(self, name: str) -> TorchVitModel:
        folder = self._repository.folders()[name]
        # torchvision, where it is installed, would resize to slightly other pixels than Pillow.
        processor = AutoImageProcessor.from_pretrained(folder.path, backend="pil")
        module = load_module(AutoModelForImageClassification, folder.path, self._dtype, self._device)
        model = TorchVitModel(processor, module, _labels(name, module), PREFIX_TOKENS[_architecture(folder)])
        _check_processor(name, model, module)
        return model


def _architecture(folder: ModelFolder) -> str:
    """The class that the folder was saved from; "" where it doesn't say."""
    names = folder.config.get("architectures") or [""]
    return str(names[0])


def _card(folder: ModelFolder) -> ModelCard | None:
    if _architecture(folder) not in PREFIX_TOKENS:
        return None
    properties = {"class": _architecture(folder), "labels": str(len(folder.config.get("id2label", ())))}
    return ModelCard(folder.name, properties)


def _labels(name: str, module: Any) -> list[str]:
    """The labels in the order of the head's rows; load_module has seen to it that there are as many of both."""
    found: dict[int, str] = module.config.id2label
    if not found or sorted(found) != list(range(len(found))):
        raise FailedPrecondition(f"model {name}: id2label of its config.json must number the labels from 0 on")
    return [found[i] for i in range(len(found))]


def _check_processor(name: str, model: TorchVitModel, module: Any) -> None:
    """Find out now, not at the first picture, that preprocessor_config.json belongs to another model."""
    patches = module.base_model.embeddings.patch_embeddings
    wanted = (patches.num_channels, *patches.image_size)
    gets = model.preprocess(np.zeros((48, 64, 3), np.uint8)).shape
    if gets != wanted:
        given = f"its preprocessor_config.json gives pictures of {list(gets)}, its config.json wants {list(wanted)}"
        raise FailedPrecondition(f"model {name}: {given}")
