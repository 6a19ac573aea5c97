"""diffusers' ControlNetModel and ControlNetUnionModel in torch."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import numpy as np
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.registry import ModelCard, ModelFolder
from imagemesh_runtime.tensors import Array
from imagemesh_services.controlnet.backend import ControlInputs, Emit
from imagemesh_services.controlnet.backends.torch.adapter import TorchAdapter
from imagemesh_services.controlnet.backends.torch.producing import Produced, producing
from imagemesh_services.torch_support import (
    TorchBackend,
    load_module,
    plus,
    to_torch,
)

_TOKENS: Final = 77  # of a prompt of ordinary length
_NUMBERS: Final = 6  # of Stable Diffusion XL's micro-conditioning
_USUAL_TYPES: Final = 6  # diffusers' own, where a config.json leaves it out
# The classes of the folders that are loaded.
CLASSES: Final[Mapping[str, Any]] = {one.__name__: one for one in (ControlNetModel, ControlNetUnionModel, T2IAdapter)}


class TorchControlRun:
    """One generation's picture and prompts, on the device.

    The hint, which the picture is embedded as, doesn't change with the step and is computed once.
    """

    def __init__(self, model: "TorchControlModel", inputs: ControlInputs) -> None:
        self._model = model.net
        self._size = inputs.image.shape[:2]
        self._scales = _scales(model, inputs)
        self.tell(inputs.embeddings, inputs.added)
        self._hint = model.hint(inputs.image)
        self._kind = model.kind(inputs.control_type)
        self._factor = 2 ** (len(self._model.config.conditioning_embedding_out_channels) - 1)

    def tell(self, embeddings: Array, added: Mapping[str, Array]) -> None:
        device, dtype = self._model.device, self._model.dtype
        self._embeddings = to_torch(embeddings, device, dtype)
        self._added = {name: to_torch(one, device, dtype) for name, one in added.items()}

    @torch.inference_mode()
    def residuals(self, sample: Array, timestep: float, emit: Emit) -> None:
        self._check(sample)
        rows = len(sample)
        last = slice(len(self._embeddings) - rows, None)
        with suppress(Produced), producing(self._model, self._scales, emit):
            self._model(
                to_torch(sample, self._model.device, self._model.dtype),
                torch.tensor(timestep, device=self._model.device),
                encoder_hidden_states=self._embeddings[last],
                added_cond_kwargs={name: one[last] for name, one in self._added.items()} or None,
                return_dict=False,
                **self._followed(rows),
            )

    def _followed(self, rows: int) -> dict[str, Any]:
        """The picture, as the model's class takes it."""
        if self._kind is None:
            return {"controlnet_cond": self._hint}
        marks = self._kind.expand(rows, -1)
        kinds = {"control_type": marks, "control_type_idx": [int(self._kind.argmax())]}
        return {"controlnet_cond": [self._hint.expand(rows, -1, -1, -1)], **kinds}

    def _check(self, sample: Array) -> None:
        height, width = (side // self._factor for side in self._size)
        rows = len(self._embeddings)
        wanted = [self._model.config.in_channels, height, width]
        if list(sample.shape[1:]) != wanted or not 1 <= len(sample) <= rows:
            allowed = f"{[rows, *wanted]}, as the picture and prompts have it, or fewer rows, at least 1"
            raise InvalidArgument("step.sample.shape", list(sample.shape), allowed)


def _scales(model: "TorchControlModel", inputs: ControlInputs) -> list[Any]:
    """What each residual is multiplied by, as ``ControlNetModel.forward`` has it, the middle one last."""
    count = model.count
    scales: list[Any] = [inputs.scale] * count
    if inputs.guess and not model.net.config.global_pool_conditions:
        scales = list(torch.logspace(-1, 0, count, device=model.net.device) * inputs.scale)
    weights = inputs.block_weights or [1.0] * count
    return [scale * weight for scale, weight in zip(scales, weights, strict=True)]


class TorchControlModel:
    """A ControlNet, apart from the part of it that embeds pictures."""

    # What ``start`` answers.
    run: type[TorchControlRun] = TorchControlRun

    def __init__(self, model: Any) -> None:
        self.net = model
        self._embed = model.controlnet_cond_embedding
        model.controlnet_cond_embedding = torch.nn.Identity()  # what the model is given is embedded already
        self._flips = model.config.controlnet_conditioning_channel_order == "bgr"
        self.count = len(model.controlnet_down_blocks) + 1
        self.prompt_rows_only = bool(model.config.global_pool_conditions)
        self.control_types: int = model.config.get("num_control_type", 0)

    def kind(self, number: int | None) -> torch.Tensor | None:
        """Which kind of picture, as the model wants it: [1, kinds], 1 at that one."""
        if number is None:
            return None
        marks = torch.zeros(1, self.control_types, device=self.net.device, dtype=self.net.dtype)
        marks[0, number] = 1
        return marks

    @torch.inference_mode()
    def hint(self, image: Array) -> torch.Tensor:
        """A uint8 picture [height, width, 3], embedded: [1, channels, h, w], for the model to add to every row."""
        pixels = to_torch(image, self.net.device).to(self.net.dtype) / 255
        found: torch.Tensor = self._embed((pixels.flip(-1) if self._flips else pixels).permute(2, 0, 1).unsqueeze(0))
        return found.flip(1) if self._flips else found  # the model turns it round, which it means the picture's by

    def start(self, inputs: ControlInputs) -> TorchControlRun:
        width = self.net.config.cross_attention_dim
        if inputs.embeddings.shape[-1] != width:
            got = f"width {inputs.embeddings.shape[-1]}"
            raise InvalidArgument("start.encoder_hidden_states", got, f"of width {width}")
        self._check_added(inputs)
        return self.run(self, inputs)

    def trial(self, image: Array) -> tuple[ControlInputs, Array]:
        config, count = self.net.config, 2
        embeddings = np.zeros((count, _TOKENS, config.cross_attention_dim), np.float32)
        added = {}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - _NUMBERS * config.addition_time_embed_dim
            widths = {"text_embeds": pooled, "time_ids": _NUMBERS}
            added = {name: np.zeros((count, width), np.float32) for name, width in widths.items()}
        factor = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        sample = np.zeros((count, config.in_channels, *(side // factor for side in image.shape[:2])), np.float32)
        kind = 0 if self.control_types else None
        return ControlInputs(image, embeddings, 1.0, added, control_type=kind), sample

    def plus(self, one: Array, other: Array) -> Array:
        """See ``ControlModel``; numpy's sum of half floats takes several times as long."""
        return plus(one, other)

    def _check_added(self, inputs: ControlInputs) -> None:
        config = self.net.config
        wanted = {"text_embeds", "time_ids"} if config.addition_embed_type == "text_time" else set()
        if set(inputs.added) != wanted:
            allowed = f"a map of {' and '.join(sorted(wanted)) or 'nothing'}: another family's ControlNet"
            raise InvalidArgument("start.added_conditions", sorted(inputs.added), allowed)
        if wanted:
            numbers = inputs.added["time_ids"].shape[1]
            given = inputs.added["text_embeds"].shape[1] + numbers * config.addition_time_embed_dim
            if given != config.projection_class_embeddings_input_dim:
                widths = {name: one.shape[1] for name, one in inputs.added.items()}
                raise InvalidArgument("start.added_conditions", widths, "as wide as the ControlNet's were in training")


class TorchControlNet(TorchBackend):
    """Runs folders that hold a ControlNetModel, a ControlNetUnionModel or a T2IAdapter."""

    def cards(self) -> Mapping[str, ModelCard]:
        folders = self.repository.folders().values()
        return {folder.name: _card(folder) for folder in folders if folder.config.get("_class_name") in CLASSES}

    def load(self, name: str) -> TorchControlModel | TorchAdapter:
        folder = self.repository.folders()[name]
        cls = CLASSES[folder.config["_class_name"]]
        module = load_module(cls, folder.path, self._dtype, self._device)
        return TorchAdapter(name, module) if cls is T2IAdapter else TorchControlModel(module)


def _card(folder: ModelFolder) -> ModelCard:
    properties = {"class": str(folder.config["_class_name"])}
    if properties["class"] == ControlNetUnionModel.__name__:
        properties["control_types"] = str(folder.config.get("num_control_type", _USUAL_TYPES))
    return ModelCard(folder.name, properties)
