"""CLIP text encoders in torch, as Stable Diffusion's pipelines run them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np
import torch
import transformers
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from imagemesh_runtime.errors import FailedPrecondition
from imagemesh_runtime.registry import ModelCard, ModelFolder, cards_of
from imagemesh_runtime.tensors import Array
from imagemesh_services.fingerprint import fingerprint_of
from imagemesh_services.text_encoder.attention import Section, literal
from imagemesh_services.text_encoder.backend import Encoded, Tokens
from imagemesh_services.text_encoder.backends.torch import blocks
from imagemesh_services.text_encoder.inversions import Inversions, find_inversions, places
from imagemesh_services.text_encoder.windows import cut, side_by_side
from imagemesh_services.torch_support import TorchBackend, load_module, to_numpy

log = logging.getLogger(__name__)

# One class under the two names that folders call it by.
TOKENIZERS: Final = ("CLIPTokenizer", "CLIPTokenizerFast")
PARTS: Final = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
CLASSES: Final = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


class Words(TextualInversionLoaderMixin):  # type: ignore[misc]
    """The library's textual inversions, for one encoder and its tokenizer."""

    hf_device_map = None
    components: Mapping[str, Any] = {}

    def __init__(self, tokenizer: Any, model: Any, words: Mapping[str, torch.Tensor]) -> None:
        self._tokenizer = tokenizer
        self._some = bool(words)
        if words:
            given = [{word: vectors} for word, vectors in words.items()]
            self.load_textual_inversion(given, token=list(words), tokenizer=tokenizer, text_encoder=model)

    def spelled_out(self, text: str) -> str:
        """The text with a word of several vectors as several words."""
        return str(self.maybe_convert_prompt(text, self._tokenizer)) if self._some else text


class Clip:
    """A CLIP text model with its tokenizer."""

    def __init__(self, tokenizer: Any, model: Any, words: Mapping[str, torch.Tensor]) -> None:
        self.layers: int = model.config.num_hidden_layers
        self.window: int = tokenizer.model_max_length
        self.width: int = model.config.hidden_size
        self._tokenizer = tokenizer
        self._turn = Lock()  # a call sets options of the tokenizer, which another thread's call may be using
        self._model = model
        self._words = Words(tokenizer, model, words)

    def hand_over(self, stand_in: Callable[[Any], Any]) -> None:
        """Let what ``stand_in`` makes of the model run in its place."""
        self._model = stand_in(self._model)

    def tokenize(self, sections: Sequence[Section]) -> Tokens:
        """Every piece tokenized by itself."""
        ids = [[(one, piece.weight) for piece in section for one in self._ids(piece.text)] for section in sections]
        start, end, pad = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, self._tokenizer.pad_token_id)
        return cut(ids, self.window, start, end, pad)

    def normed(self, tokens: Array, clip_skip: int) -> torch.Tensor:
        """Like StableDiffusionPipeline.encode_prompt: the last norm is applied also where layers are skipped."""
        found = self._run(tokens, every_layer=clip_skip > 0)
        if not clip_skip:
            last: torch.Tensor = found.last_hidden_state
            return last
        normed: torch.Tensor = self._model.final_layer_norm(found.hidden_states[-(clip_skip + 1)])
        return normed

    def penultimate(self, tokens: Array, clip_skip: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Like StableDiffusionXLPipeline.encode_prompt: counted from the last but one, without a norm; and pooled."""
        found = self._run(tokens, every_layer=True)
        return found.hidden_states[-(clip_skip + 2)], getattr(found, "text_embeds", None)

    def _run(self, tokens: Array, *, every_layer: bool) -> Any:
        ids = torch.from_numpy(tokens).to(self._model.device)
        return self._model(ids, attention_mask=self._attention_mask(ids), output_hidden_states=every_layer)

    def _ids(self, text: str) -> list[int]:
        with self._turn:
            text = self._words.spelled_out(text)
            ids: list[int] = self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return ids

    def _attention_mask(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Only models that ask for one get one; Stable Diffusion was trained to look at its padding."""
        if not getattr(self._model.config, "use_attention_mask", False):
            return None
        ends = (ids == self._tokenizer.eos_token_id).int().argmax(dim=1, keepdim=True)
        mask: torch.Tensor = torch.arange(ids.shape[1], device=ids.device) <= ends
        return mask.long()


class TorchTextModel:
    """The text encoder of Stable Diffusion 1.x and 2.x."""

    skips_negative = True
    zeroes_empty_negative = False

    def __init__(self, clip: Clip, fingerprint: str, unusable: Mapping[str, str]) -> None:
        self._clip = clip
        self.layers = clip.layers
        self.fingerprint = fingerprint
        self.unusable = unusable
        self.widths = (clip.width,)

    def tokenize(self, text: str) -> Tokens:
        return self.tokenize_weighted(literal(text))

    def tokenize_weighted(self, sections: Sequence[Section]) -> Tokens:
        return self._clip.tokenize(sections)

    @torch.inference_mode()
    def encode(self, tokens: Array, clip_skip: int) -> Encoded:
        return Encoded(to_numpy(self._clip.normed(tokens, clip_skip)))


class TorchTextPair:
    """The text encoders of Stable Diffusion XL: both, or the second alone (the refiner)."""

    # The library's own reading: clip_skip is the prompt's alone.
    skips_negative = False

    def __init__(
        self, clips: Sequence[Clip], fingerprint: str, unusable: Mapping[str, str], *, zeroes_empty_negative: bool
    ) -> None:
        self._clips = clips
        self.fingerprint = fingerprint
        self.unusable = unusable
        self.widths = [clip.width for clip in clips]
        self.layers = min(clip.layers for clip in clips)
        self.zeroes_empty_negative = zeroes_empty_negative

    def tokenize(self, text: str) -> Tokens:
        return self.tokenize_weighted(literal(text))

    def tokenize_weighted(self, sections: Sequence[Section]) -> Tokens:
        return side_by_side([clip.tokenize(sections) for clip in self._clips])

    @torch.inference_mode()
    def encode(self, tokens: Array, clip_skip: int) -> Encoded:
        columns = np.split(tokens, len(self._clips), axis=1)
        found = [clip.penultimate(ids, clip_skip) for clip, ids in zip(self._clips, columns, strict=True)]
        pooled = found[-1][1]
        embeds = torch.cat([hidden for hidden, _ in found], dim=-1)
        return Encoded(to_numpy(embeds), None if pooled is None else to_numpy(pooled))


class TorchTextEncoder(TorchBackend):
    """Runs the ``text_encoder`` of pipeline folders."""

    def cards(self) -> Mapping[str, ModelCard]:
        return cards_of(self.repository.folders().values(), _card)

    def load(self, name: str) -> TorchTextModel | TorchTextPair | blocks.BlockPrompts:
        folder = self.repository.folders()[name]
        if (family := blocks.family_of(folder)) is not None:
            return blocks.load(folder, family, self._dtype, self._device)
        parts = [folder.path / part for part in PARTS if folder.has(part)]
        fingerprint = fingerprint_of([*parts, *places(folder)], *map(str, self._marks()))
        encoders = _encoders(folder)
        found = find_inversions(folder, _widths(folder))
        embeddings = [one.path for one in found.usable.values()]
        seen = [
            self._seen([folder.path / part, folder.path / _tokenizer(part), *embeddings]) for part in encoders
        ]  # before any of it is read
        tokenizers = [CLIPTokenizer.from_pretrained(folder.path / _tokenizer(part)) for part in encoders]
        words = _without_taken(folder, found, tokenizers)
        tensors = {word: (load_file(one.path), one.keys) for word, one in words.usable.items()}
        clips = []
        for i, (part, tokenizer) in enumerate(zip(encoders, tokenizers, strict=True)):
            module = load_module(CLASSES[part], folder.path / part, self._dtype, self._device)
            clips.append(Clip(tokenizer, module, {word: held[keys[i]] for word, (held, keys) in tensors.items()}))
            self._prepare(clips[-1], part, seen[i])
        if not folder.has("text_encoder_2"):
            return TorchTextModel(clips[0], fingerprint, words.unusable)
        if len({clip.window for clip in clips}) > 1:
            raise FailedPrecondition(f"model {folder.name}: its tokenizers have windows of different length")
        zeroes = bool(folder.config.get("force_zeros_for_empty_prompt", True))
        return TorchTextPair(clips, fingerprint, words.unusable, zeroes_empty_negative=zeroes)

    def _marks(self) -> tuple[object, ...]:
        return (*super()._marks(), transformers.__version__)

    def _seen(self, paths: Sequence[Path]) -> Any:
        """Called before a model is loaded, with what of the disk it is made of."""

    def _prepare(self, clip: Clip, part: str, seen: Any) -> None:
        """Called with every model that was loaded, and with what ``_seen`` answered before."""


def _encoders(folder: ModelFolder) -> list[str]:
    return [part for part in CLASSES if folder.has(part)]


def _tokenizer(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def _widths(folder: ModelFolder) -> list[int]:
    return [int(folder.read(part, "config.json")["hidden_size"]) for part in _encoders(folder)]


def _without_taken(folder: ModelFolder, found: Inversions, tokenizers: Sequence[Any]) -> Inversions:
    """Without the words that a tokenizer has already, which so keep their meaning."""
    for word, why in found.unusable.items():
        log.warning("model %s: the embedding %s is left out: %s", folder.name, word, why)
    taken = {token for tokenizer in tokenizers for token in tokenizer.get_vocab()}
    usable = {}
    for word, inversion in found.usable.items():
        tokens = inversion.tokens(word)
        if doubled := [token for token in tokens if token in taken]:
            message = "model %s: the embedding %s is left out: there is a token %r already; give the file another name"
            log.warning(message, folder.name, word, doubled[0])
            continue
        usable[word] = inversion
        taken |= set(tokens)
    return Inversions(usable, found.unusable)


def _card(folder: ModelFolder) -> ModelCard | None:
    if folder.has("transformer"):
        return blocks.card(folder)
    found = {part: folder.config[part][1] for part in _encoders(folder)}
    if not found or any(folder.has(f"text_encoder_{i}") for i in (3, 4)):
        return None
    for part, cls in found.items():
        tokenizer = _tokenizer(part)
        if cls != CLASSES[part].__name__ or not folder.has(tokenizer) or folder.config[tokenizer][1] not in TOKENIZERS:
            return None  # T5 of the same folder layout, for one
    properties = {"class": ", ".join(found.values())}
    if places(folder) and (words := find_inversions(folder, _widths(folder)).usable):
        properties["embeddings"] = ", ".join(sorted(words))
    return ModelCard(folder.name, properties)
