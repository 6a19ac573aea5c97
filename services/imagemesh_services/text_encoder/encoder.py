"""From texts to embeddings: what is kept is taken from there, the rest is computed with what others ask for."""

import asyncio
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from imagemesh_runtime.batching import Batcher, submit_rows
from imagemesh_runtime.errors import InvalidArgument, NotFinite
from imagemesh_runtime.limits import MAX_WINDOWS
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.registry import LoadedModels
from imagemesh_runtime.tensors import Array
from imagemesh_services.text_encoder.backend import Encoded, PromptModel, TextModel, Tokens
from imagemesh_services.text_encoder.cache import Embedded, EmbeddingCache
from imagemesh_services.text_encoder.config import TextEncoderConfig
from imagemesh_services.text_encoder.emphasis import weigh
from imagemesh_services.text_encoder.prompts import tokenize
from imagemesh_services.text_encoder.whole_prompts import encode_prompts

# Of all phases of a request's prompts.
MAX_PHASE_WINDOWS = 128


@dataclass(frozen=True)
class Want:
    """A text to encode, and how."""

    text: str
    clip_skip: int
    # Whether brackets are text.
    as_is: bool


class Encoder:
    """Encodes texts; windows of one model and clip skip share a forward, whoever they come from."""

    def __init__(
        self, config: TextEncoderConfig, models: LoadedModels[TextModel | PromptModel], metrics: Metrics
    ) -> None:
        self._models = models
        self._metrics = metrics
        self._cache = EmbeddingCache(config.cache_bytes, metrics)
        self.batcher: Batcher[Any, Any] = Batcher(
            self._compute, metrics, max_rows=config.max_batch, max_queue=config.max_queue
        )

    async def encode(self, name: str, wants: Mapping[Want, str]) -> dict[Want, Embedded]:
        """The texts' embeddings, all of as many windows, since guidance compares them token by token.

        Args:
            wants: the prompt of the request that each text belongs to.

        Raises:
            InvalidArgument: a prompt can't be read, or is too long; the error names it.
            MeshError: as ``Batcher.submit_all``, or the embeddings are not finite.
        """
        model = cast(TextModel, await self._models.get(name))
        with self.batcher.reserve():
            found = self._kept(model, wants)
            missing = {want: field for want, field in wants.items() if want not in found}
            tokens = await asyncio.to_thread(_tokenized, model, missing) if missing else {}
            lengths = [len(one.encoded.embeds) for one in found.values()]
            lengths += [len(one.windows) for one in tokens.values()]
            most = max(lengths)
            _check_windows(most, wants)
            if any(length != most for length in lengths):
                blanks = dict.fromkeys(Want("", want.clip_skip, as_is=True) for want in wants)
                found |= self._kept(model, [want for want in blanks if want not in wants])
                tokens |= {want: model.tokenize("") for want in blanks if want not in found and want not in tokens}
        found |= await self._computed(name, model, tokens)
        return {want: _padded(found, want, most) for want in wants}

    def _kept(self, model: TextModel, wants: Iterable[Want]) -> dict[Want, Embedded]:
        looked_up = {want: self._cache.get((model.fingerprint, want)) for want in wants}
        return {want: kept for want, kept in looked_up.items() if kept is not None}

    async def _computed(self, name: str, model: TextModel, tokens: Mapping[Want, Tokens]) -> dict[Want, Embedded]:
        """In one forward where the texts leave out equally many layers."""
        groups = [[want for want in tokens if want.clip_skip == skip] for skip in {want.clip_skip for want in tokens}]
        forwards = [self._rows(name, [tokens[want] for want in group], group[0].clip_skip) for group in groups]
        parts = [await forwards[0]] if len(forwards) == 1 else await asyncio.gather(*forwards)
        computed: dict[Want, Embedded] = {}
        for group, rows in zip(groups, parts, strict=True):
            for want, encoded in zip(group, rows, strict=True):
                embedded = Embedded(_weighed(name, model, tokens[want], encoded), tokens[want].count)
                computed[want] = self._cache.put((model.fingerprint, want), embedded)
        return computed

    async def _rows(self, name: str, tokens: Sequence[Tokens], clip_skip: int) -> list[Encoded]:
        windows = np.concatenate([one.windows for one in tokens])
        parts = await submit_rows(self.batcher, (name, clip_skip), windows)
        pooled = [part.pooled for part in parts if part.pooled is not None]
        joined = Encoded(np.concatenate([part.embeds for part in parts]), np.concatenate(pooled) if pooled else None)
        return _split(joined, np.cumsum([len(one.windows) for one in tokens])[:-1])

    async def _compute(self, key: Hashable, items: Sequence[Any]) -> list[Any]:
        name, clip_skip = cast(tuple[str, int], key)
        model = await self._models.get(name)
        with self._metrics.stage.time("encode_text"):
            if isinstance(model, PromptModel):
                return await self._models.lane.run(encode_prompts, name, model, items, clip_skip)
            encoded = await self._models.lane.run(model.encode, np.concatenate(items), clip_skip)
        _check_finite(name, encoded)
        return _split(encoded, np.cumsum([len(item) for item in items])[:-1])


def _split(encoded: Encoded, cuts: Array) -> list[Encoded]:
    embeds = np.split(encoded.embeds, cuts)
    if encoded.pooled is None:
        return [Encoded(part) for part in embeds]
    return [Encoded(*pair) for pair in zip(embeds, np.split(encoded.pooled, cuts), strict=True)]


def _check_finite(name: str, encoded: Encoded) -> None:
    for found in (encoded.embeds, encoded.pooled):
        if found is not None and not np.isfinite(found.astype(np.float32)).all():
            raise NotFinite(name, "embeddings")


def _weighed(name: str, model: TextModel, tokens: Tokens, encoded: Encoded) -> Encoded:
    if tokens.weights is None:
        return encoded
    weighed = Encoded(weigh(encoded.embeds, tokens.weights, model.widths), encoded.pooled)
    _check_finite(name, weighed)
    return weighed


def _tokenized(model: TextModel, wants: Mapping[Want, str]) -> dict[Want, Tokens]:
    return {want: _bounded(field, tokenize(model, field, want.text, as_is=want.as_is)) for want, field in wants.items()}


def _bounded(field: str, tokens: Tokens) -> Tokens:
    windows, width = tokens.windows.shape
    if windows > MAX_WINDOWS:
        most = MAX_WINDOWS * (width - 2)  # every window has a start and an end of its own
        raise InvalidArgument(field, f"{tokens.count} tokens", f"at most {most} tokens ({MAX_WINDOWS} windows)")
    return tokens


def _check_windows(most: int, wants: Mapping[Want, str]) -> None:
    if most * len(wants) > MAX_PHASE_WINDOWS:
        fields = list(wants.values())
        got = f"{len(wants)} phases of {most} windows in all"
        raise InvalidArgument(max(fields, key=fields.count), got, f"at most {MAX_PHASE_WINDOWS} windows")


def _padded(found: Mapping[Want, Embedded], want: Want, most: int) -> Embedded:
    own = found[want]
    missing = most - len(own.encoded.embeds)
    if not missing:
        return own
    blank = found[Want("", want.clip_skip, as_is=True)].encoded.embeds
    return Embedded(Encoded(np.concatenate([own.encoded.embeds, *[blank] * missing]), own.encoded.pooled), own.tokens)
