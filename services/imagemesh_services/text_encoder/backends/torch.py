"""CLIP text encoders in torch, as Stable Diffusion's pipelines run them."""

from collections.abc import Mapping
from threading import Lock
from typing import Any, Final

import numpy as np
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from imagemesh_runtime.registry import ModelCard, ModelFolder, cards_of
from imagemesh_runtime.tensors import Array
from imagemesh_services.repository import open_repository
from imagemesh_services.text_encoder.backend import Tokens
from imagemesh_services.text_encoder.config import TextEncoderConfig
from imagemesh_services.torch_support import load_module, pick_device, pick_dtype, set_threads, to_numpy

# One class under the two names that folders call it by.
TOKENIZERS: Final = ("CLIPTokenizer", "CLIPTokenizerFast")


class TorchTextModel:
    """A CLIP text model with its tokenizer."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.layers: int = model.config.num_hidden_layers
        self._tokenizer = tokenizer
        self._turn = Lock()  # a call sets options of the tokenizer, which another thread's call may be using
        self._model = model
        self._window: int = tokenizer.model_max_length

    def tokenize(self, text: str) -> Tokens:
        """A prompt longer than the window goes on in further windows, each with its own start and end."""
        inner = self._window - 2
        ids = self._ids(text)
        start, end, pad = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, self._tokenizer.pad_token_id)
        windows = [ids[i : i + inner] for i in range(0, max(len(ids), 1), inner)]
        rows = [[start, *window, end, *[pad] * (inner - len(window))] for window in windows]
        return Tokens(np.array(rows, dtype=np.int64), len(ids))

    @torch.inference_mode()
    def encode(self, tokens: Array, clip_skip: int) -> Array:
        """Like StableDiffusionPipeline.encode_prompt: the last norm is applied also where layers are skipped."""
        ids = torch.from_numpy(tokens).to(self._model.device)
        mask = self._attention_mask(ids)
        if not clip_skip:
            return to_numpy(self._model(ids, attention_mask=mask).last_hidden_state)
        hidden = self._model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
        return to_numpy(self._model.final_layer_norm(hidden))

    def _ids(self, text: str) -> list[int]:
        with self._turn:
            ids: list[int] = self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return ids

    def _attention_mask(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Only models that ask for one get one; Stable Diffusion was trained to look at its padding."""
        if not getattr(self._model.config, "use_attention_mask", False):
            return None
        ends = (ids == self._tokenizer.eos_token_id).int().argmax(dim=1, keepdim=True)
        mask: torch.Tensor = torch.arange(ids.shape[1], device=ids.device) <= ends
        return mask.long()


class TorchTextEncoder:
    """Runs the ``text_encoder`` of pipeline folders."""

    name = "torch"

    def __init__(self, config: TextEncoderConfig) -> None:
        self._repository = open_repository(config)
        self._device = pick_device(config.device)
        self._dtype = pick_dtype(config.dtype)
        self.device, self.dtype = str(self._device), config.dtype
        set_threads(config.threads)

    def cards(self) -> Mapping[str, ModelCard]:
        return cards_of(self._repository.folders().values(), _card)

    def load(self, name: str) -> TorchTextModel:
        path = self._repository.folders()[name].path
        tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
        return TorchTextModel(tokenizer, load_module(CLIPTextModel, path / "text_encoder", self._dtype, self._device))


def _card(folder: ModelFolder) -> ModelCard | None:
    if not folder.has("text_encoder", "tokenizer"):
        return None
    encoder, tokenizer = (folder.config[part][1] for part in ("text_encoder", "tokenizer"))
    if encoder != CLIPTextModel.__name__ or tokenizer not in TOKENIZERS:
        return None  # T5 of the same folder layout, for one
    return ModelCard(folder.name, {"class": encoder})
