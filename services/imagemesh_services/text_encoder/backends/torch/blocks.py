"""Text encoders that diffusers' modular blocks run: T5, Qwen and pairs of CLIP beside them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from types import SimpleNamespace
from typing import Any, Final

import diffusers
import torch
from diffusers.modular_pipelines import PipelineState
from diffusers.modular_pipelines.qwenimage.prompt_templates import (
    QWENIMAGE_PROMPT_TEMPLATE,
    QWENIMAGE_PROMPT_TEMPLATE_START_IDX,
)

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.registry import ModelCard, ModelFolder
from imagemesh_runtime.tensors import Array
from imagemesh_services.torch_support import load_module, to_numpy


def _plain(tokenizer: Any, text: str) -> str:
    return text


def _described(tokenizer: Any, text: str) -> str:
    """As Qwen-Image's block asks its language model to describe the picture."""
    template: str = QWENIMAGE_PROMPT_TEMPLATE
    return template.format(text)


def _asked(tokenizer: Any, text: str) -> str:
    """As Z-Image's block puts it to its language model."""
    messages = [{"role": "user", "content": text}]
    written: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return written


@dataclass(frozen=True)
class PromptFamily:
    """A row of the table.

    Attributes:
        pipelines: diffusers' classic pipelines, by which a folder says that it is of the family.
        blocks: diffusers' modular blocks.
        optional: text encoders that a folder may lack.
        reads: the tokenizers, the first that is there bounds the prompt, and of how many tokens, ends and all.
        written: how the prompt is put to that tokenizer.
        dropped: tokens at the beginning that aren't counted.
    """

    pipelines: Sequence[str]
    blocks: str
    reads: Mapping[str, int]
    optional: Sequence[str] = ()
    negative: bool = True
    skips: bool = False
    written: Callable[[Any, str], str] = _plain
    dropped: int = 0


FAMILIES: Final = (
    PromptFamily(
        pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        blocks="StableDiffusion3AutoBlocks",
        reads={"tokenizer_3": 256, "tokenizer": 77},
        optional=("text_encoder_3", "tokenizer_3"),
        skips=True,
    ),
    PromptFamily(
        pipelines=("FluxPipeline", "FluxImg2ImgPipeline"),
        blocks="FluxAutoBlocks",
        reads={"tokenizer_2": 512},
        negative=False,
    ),
    PromptFamily(
        pipelines=("QwenImagePipeline", "QwenImageImg2ImgPipeline"),
        blocks="QwenImageAutoBlocks",
        reads={"tokenizer": 1024},
        written=_described,
        dropped=QWENIMAGE_PROMPT_TEMPLATE_START_IDX,
    ),
    PromptFamily(
        pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline"),
        blocks="ZImageAutoBlocks",
        reads={"tokenizer": 512},
        written=_asked,
    ),
)


class BlockPrompts:
    """A family's text encoder block with its components; see ``PromptModel``."""

    def __init__(self, family: PromptFamily, block: Any, components: SimpleNamespace) -> None:
        self.negative = family.negative
        self.layers: int = components.text_encoder.config.num_hidden_layers if family.skips else 1
        self._family = family
        self._block = block
        self._components = components
        self._outputs = [one.name for one in block.intermediate_outputs if not one.name.startswith("negative_")]
        name = next(one for one in family.reads if getattr(components, one) is not None)
        self._limit = family.reads[name]
        # A copy: a call sets options of the tokenizer, which the lane may be using.
        self._tokenizer = copy.deepcopy(getattr(components, name))
        self._turn = Lock()

    def count(self, field: str, text: str) -> int:
        written = self._family.written(self._tokenizer, text)
        with self._turn:
            whole = len(self._tokenizer(written, verbose=False).input_ids) - self._family.dropped
            own = len(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if whole > self._limit:
            raise InvalidArgument(field, f"{own} tokens", f"at most {self._limit - whole + own} tokens")
        return own

    @torch.inference_mode()
    def encode_prompts(self, texts: Sequence[str], clip_skip: int) -> list[Mapping[str, Array]]:
        state = PipelineState()
        state.set("prompt", list(texts))
        state.set("clip_skip", clip_skip)
        self._block(self._components, state)
        return [self._row(state, i) for i in range(len(texts))]

    def _row(self, state: PipelineState, i: int) -> Mapping[str, Array]:
        """One prompt's tensors; where a mask tells padding from tokens, without the padding to others' length."""
        rows = {name: state.get(name)[i] for name in self._outputs}
        mask = rows.get("prompt_embeds_mask")
        if mask is not None:
            rows = {name: row[: int(mask.sum())] for name, row in rows.items()}
        return {name: to_numpy(row[None]) for name, row in rows.items()}


def family_of(folder: ModelFolder) -> PromptFamily | None:
    """The family of a folder; None: it is of none of these."""
    found = [one for one in FAMILIES if folder.config.get("_class_name") in one.pipelines]
    for family in found:
        missing = [
            spec.name for spec in _parts(family) if not folder.has(spec.name) and spec.name not in family.optional
        ]
        if not missing:
            return family
    return None


def card(folder: ModelFolder) -> ModelCard | None:
    """What is known of a folder of these families without loading it."""
    family = family_of(folder)
    if family is None:
        return None
    encoders = [spec.name for spec in _parts(family) if spec.name.startswith("text_encoder") and folder.has(spec.name)]
    return ModelCard(folder.name, {"class": ", ".join(folder.config[name][1] for name in encoders)})


def load(folder: ModelFolder, family: PromptFamily, dtype: torch.dtype, device: torch.device) -> BlockPrompts:
    """The family's text encoders and tokenizers, and nothing else of the folder.

    Raises:
        FailedPrecondition: the weights are missing or don't fit.
    """
    parts: dict[str, Any] = {}
    for spec in _parts(family):
        if not folder.has(spec.name):
            parts[spec.name] = None
        elif spec.name.startswith("tokenizer"):
            parts[spec.name] = spec.type_hint.from_pretrained(folder.path / spec.name)
        else:
            parts[spec.name] = load_module(spec.type_hint, folder.path / spec.name, dtype, device)
    # Where a text encoder is left out, the block asks how wide what it leaves out would be.
    transformer = SimpleNamespace(config=SimpleNamespace(**folder.read("transformer", "config.json")), dtype=dtype)
    components = SimpleNamespace(
        **parts, transformer=transformer, requires_unconditional_embeds=False, _execution_device=device
    )
    return BlockPrompts(family, _block(family), components)


def _block(family: PromptFamily) -> Any:
    return getattr(diffusers, family.blocks)().get_workflow("text2image").sub_blocks["text_encoder"]


def _parts(family: PromptFamily) -> list[Any]:
    """What the block needs: specifications of text encoders and tokenizers."""
    return [one for one in _block(family).expected_components if one.name.startswith(("text_encoder", "tokenizer"))]
