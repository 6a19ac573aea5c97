"""A transformers classifier at the seam."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.tensors import Array
from imagemesh_services.torch_support import to_numpy, to_torch
from imagemesh_services.vit.backend import Embedding, Pooling, Sizes, Wanted
from imagemesh_services.vit.families import FAMILIES, Family
from imagemesh_services.vit.processing import processed

MAX_SIDE: Final = 1024  # pixels; 4096 patches of 16


class TorchVitModel:
    """A transformers classifier with the image processor of its folder.

    Attributes:
        module: the classifier itself.
        pooled: see ``Family``.
        trained: shape of a picture as it was trained, [3, h, w].

    Raises:
        FailedPrecondition: the processor makes pictures that the model can't take.
    """

    def __init__(self, name: str, processor: Any, model: Any, labels: Sequence[str]) -> None:
        config = model.config
        family = FAMILIES.get(config.model_type)
        self._processor, self._model, self._family = processor, model, family or Family()
        self.module, self.pooled = model, self._family.pooled
        self.trained: tuple[int, ...] = ()
        self.labels = labels
        self.prefix = self._family.prefix(config)
        self.rollout = self._family.rollout
        self.poolings = ((Pooling.CLS,) if self.prefix else ()) + (Pooling.MEAN,) if family else ()
        pixels = self.preprocess(np.zeros((48, 64, 3), np.uint8))
        _check_processor(name, pixels, model, self._family)
        self.trained = pixels.shape
        self.sizes = self._sizes(pixels)
        self.states, self.width = self._shapes(name, pixels)

    def preprocess(self, image: Array, size: int = 0) -> Array:
        scaled = self._scaled(size) if size and size != self.sizes.trained else {}
        return processed(self._processor, image, **scaled)

    @torch.inference_mode()
    def classify(self, pixels: Array) -> Array:
        return to_numpy(self._model(self._rows(pixels), **self._positions(pixels)).logits.float())

    @torch.inference_mode()
    def embed(self, pixels: Array, wanted: Wanted) -> Embedding:
        with self.attention_shown(wanted.attention):
            output = self._run(pixels, output_hidden_states=bool(wanted.layers), output_attentions=wanted.attention)
        chosen = [_tokens(output.hidden_states[layer]) for layer in wanted.layers]
        states = to_numpy(torch.stack(chosen, dim=1).float()) if chosen else None
        attention = None
        if wanted.attention:
            rolled = rollout([one.float() for one in output.attentions])[:, 0, self.prefix :]
            side = self._model.config.patch_size
            attention = to_numpy(rolled.reshape(len(pixels), pixels.shape[2] // side, pixels.shape[3] // side))
        return Embedding(to_numpy(self._vectors(output, wanted.pooling).float()), states, attention)

    def _vectors(self, output: Any, pooling: Pooling) -> torch.Tensor:
        """``last_hidden_state`` is past the final layer norm, but where the family's ``pooled`` says otherwise."""
        vectors: torch.Tensor
        if pooling is Pooling.CLS:
            vectors = output.last_hidden_state[:, 0]
        elif self._family.pooled:
            vectors = output.pooler_output.flatten(1)
        else:
            vectors = output.last_hidden_state[:, self.prefix :].mean(dim=1)
        return vectors

    def _run(self, pixels: Array, **options: bool) -> Any:
        return self._model.base_model(self._rows(pixels), **self._positions(pixels), **options)

    def _rows(self, pixels: Array) -> torch.Tensor:
        return to_torch(pixels, self._model.device, self._model.dtype)

    def _positions(self, pixels: Array) -> dict[str, bool]:
        """What tells the model that its positions are to be interpolated, if they are."""
        other = pixels.shape[1:] != self.trained and bool(self.trained)
        return {"interpolate_pos_encoding": True} if other and _takes(self._model, "interpolate_pos_encoding") else {}

    def _scaled(self, size: int) -> dict[str, dict[str, int]]:
        """The processor's sizes in the proportion of ``size`` to the trained one: what is cropped stays in share."""
        factor = size / self.sizes.trained
        found: dict[str, dict[str, int]] = {}
        for key in ("size", "crop_size"):
            given = getattr(self._processor, key, None)
            if given:
                found[key] = {side: round(pixels * factor) for side, pixels in dict(given).items() if pixels}
        return found

    def _sizes(self, pixels: Array) -> Sizes:
        height, width = pixels.shape[1:]
        stride = self._family.stride
        if stride is None:
            stride = getattr(self._model.config, "patch_size", 0)
        square = height == width and self.poolings and isinstance(stride, int) and stride > 0
        return Sizes(height, stride, MAX_SIDE) if square else Sizes(height, 1, 0)

    @torch.inference_mode()
    def _shapes(self, name: str, pixels: Array) -> tuple[list[tuple[int, int]], int]:
        """Tokens and width of each hidden state, and the width of the vectors, found by a first run."""
        try:
            output = self._run(pixels[None], output_hidden_states=bool(self.poolings))
        except (RuntimeError, ValueError) as error:
            given = f"its preprocessor_config.json gives pictures of {list(pixels.shape)}"
            raise FailedPrecondition(f"model {name}: {given}, which it can't take: {error}") from error
        if not self.poolings:
            return [], 0
        shapes = [tuple(_tokens(state).shape[1:]) for state in output.hidden_states]
        return [(tokens, width) for tokens, width in shapes], int(self._vectors(output, self.poolings[0]).shape[1])

    @contextmanager
    def attention_shown(self, shown: bool) -> Iterator[None]:
        """Fused attention keeps its weights to itself; within the block they are computed one by one."""
        usual = self._model.config._attn_implementation
        if shown:
            self._model.set_attn_implementation("eager")
        try:
            yield
        finally:
            if shown:
                self._model.set_attn_implementation(usual)


def rollout(attentions: Sequence[torch.Tensor]) -> torch.Tensor:
    """How much each token sees of each at the input: attention rollout (https://arxiv.org/abs/2005.00928).

    Args:
        attentions: of each layer, [n, heads, tokens, tokens], rows summing to 1.

    Returns:
        [n, tokens, tokens], rows summing to 1: the mean of the heads, half of it the residual connection, multiplied.
    """
    identity = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    rolled = identity.expand(len(attentions[0]), -1, -1)
    for attention in attentions:
        rolled = (attention.mean(dim=1) + identity) / 2 @ rolled
    return rolled


def _tokens(state: torch.Tensor) -> torch.Tensor:
    """A hidden state as [n, tokens, width], also where it is [n, width, rows, columns]."""
    return state.flatten(2).transpose(1, 2) if state.ndim == 4 else state


def _takes(model: Any, option: str) -> bool:
    return option in inspect.signature(model.forward).parameters


def _check_processor(name: str, pixels: Array, model: Any, family: Family) -> None:
    """Find out now, not at the first picture, that preprocessor_config.json belongs to another model."""
    if not family.positions:
        return
    patches = model.base_model.embeddings.patch_embeddings
    wanted = (patches.num_channels, *patches.image_size)
    if pixels.shape != wanted:
        given = f"its preprocessor_config.json gives pictures of {list(pixels.shape)}, its config.json wants"
        raise FailedPrecondition(f"model {name}: {given} {list(wanted)}")
