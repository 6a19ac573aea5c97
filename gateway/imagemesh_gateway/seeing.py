"""Looks at what was drawn, keeps what the request's rule lets pass, and says which pictures are still wanted."""

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import image_pb2, tensor_pb2, vit_service_pb2
from imagemesh_gateway.ledger import Ledger
from imagemesh_gateway.looks import KeepPlan, retry_seeds
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.plan import Plan
from imagemesh_runtime.errors import NotFinite
from imagemesh_runtime.limits import MAX_IMAGES
from imagemesh_runtime.tensors import Array, from_proto, to_proto

Classification = vit_service_pb2.Classification
Request = vit_service_pb2.ClassifyImagesRequest | vit_service_pb2.EmbedImagesRequest

_CALL_BYTES: Final = 16 << 20  # pixels of a call; a picture that is larger goes alone


@dataclass(frozen=True)
class Picture:
    """A picture that is kept.

    Attributes:
        index: which of the request's it is.
        plan: what drew it, as the ``row``-th of its pictures.
        pixels: uint8 [height, width, 3].
    """

    index: int
    plan: Plan
    row: int
    pixels: Array
    classification: Classification | None = None
    embedding: tensor_pb2.Tensor | None = None


@dataclass
class Gallery:
    """What was kept and rejected of a request's pictures, and by which plan to draw those that are still wanted."""

    plan: Plan
    kept: list[Picture] = field(default_factory=list)
    rejected: list[pb.RejectedImage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._wanted = list(range(len(self.plan.seeds)))

    def attempts(self) -> Iterator[tuple[int, Plan]]:
        """The number of the retry (0: none yet), and its plan, until all are kept or there are no more retries."""
        most = self.plan.look.keep.retries if self.plan.look.keep else 0
        for retry in range(most + 1):
            if self._wanted:
                yield retry, self._attempt(retry)

    async def add(self, mesh: Mesh, drawn: Plan, images: Array, ledger: Ledger) -> None:
        """Look at what the last attempt's plan drew, uint8 [pictures, height, width, 3]."""
        look = drawn.look
        seen: Sequence[Classification | None] = [None] * len(images)
        if look.classifier:
            seen = await _classified(mesh, drawn, images, ledger)
        reasons = [_why_not(look.keep, one) if look.keep and one else None for one in seen]
        good = [row for row, reason in enumerate(reasons) if reason is None]
        vectors: Sequence[tensor_pb2.Tensor | None] = [None] * len(good)
        if look.embedder and good:
            vectors = await _embedded(mesh, drawn, images[good], ledger)
        told = [_cut(one, look.labels) for one in seen]
        for row, vector in zip(good, vectors, strict=True):
            self.kept.append(Picture(self._wanted[row], drawn, row, images[row], told[row], vector))
        self.kept.sort(key=lambda picture: picture.index)
        bad = [(row, reason) for row, reason in enumerate(reasons) if reason is not None]
        for row, reason in bad:
            index, seed = self._wanted[row], drawn.seeds[row]
            self.rejected.append(pb.RejectedImage(index=index, seed=seed, reason=reason, classification=told[row]))
        self._wanted = [self._wanted[row] for row, _ in bad]

    def _attempt(self, retry: int) -> Plan:
        if retry == 0:
            return self.plan
        seeds = retry_seeds(self.plan.seeds, self._wanted, retry)
        variations = tuple(self.plan.variation_seeds[i] for i in self._wanted) if self.plan.variation_seeds else ()
        return replace(self.plan, seeds=seeds, variation_seeds=variations)


def _why_not(keep: KeepPlan, seen: Classification) -> str | None:
    """Why a picture isn't kept; None: it is."""
    among = seen.predictions[: keep.top_k]
    found = [one.probability for one in among if one.label == keep.label]
    if not found:
        likeliest = "the likeliest label" if keep.top_k == 1 else f"among the {keep.top_k} likeliest labels"
        return f"{keep.label!r} is not {likeliest}; {among[0].label!r} is, with {among[0].probability:.4f}"
    if max(found) < keep.min_probability:
        return f"{keep.label!r} has a probability of {max(found):.4f}, below {keep.min_probability:g}"
    return None


def _cut(seen: Classification | None, labels: int) -> Classification | None:
    return None if seen is None else Classification(predictions=seen.predictions[:labels])


async def _classified(mesh: Mesh, plan: Plan, images: Array, ledger: Ledger) -> list[Classification]:
    look = plan.look
    request = vit_service_pb2.ClassifyImagesRequest(
        model=look.classifier, top_k=max(look.labels, look.keep.top_k if look.keep else 0)
    )
    found: list[Classification] = []
    async for answer in _answers(mesh, "classify", mesh.see.ClassifyImages, request, images, ledger):
        found += answer.classifications
    if not all(np.isfinite(one.logit) for seen in found for one in seen.predictions):
        raise NotFinite(look.classifier, "logits")
    return found


async def _embedded(mesh: Mesh, plan: Plan, images: Array, ledger: Ledger) -> list[tensor_pb2.Tensor]:
    look = plan.look
    request = vit_service_pb2.EmbedImagesRequest(model=look.embedder, pooling=look.pooling, normalize=look.normalize)
    found: list[tensor_pb2.Tensor] = []
    async for answer in _answers(mesh, "embed", mesh.see.EmbedImages, request, images, ledger):
        vectors = from_proto(answer.embeddings, "embeddings", dtypes=["float32"], shape=(None, None))
        if not np.isfinite(vectors).all():
            raise NotFinite(look.embedder, "embeddings")
        found += [to_proto(vector) for vector in vectors]
    return found


async def _answers(
    mesh: Mesh, stage: str, method: Any, request: Request, images: Array, ledger: Ledger
) -> AsyncIterator[Any]:
    """What the vision service says of the pictures, in as many calls as their size takes."""
    count = max(1, min(MAX_IMAGES, _CALL_BYTES // images[0].nbytes))
    for start in range(0, len(images), count):
        del request.images[:]
        request.images.extend(image_pb2.Image(pixels=to_proto(one)) for one in images[start : start + count])
        with ledger.metrics.stage.time("vit"):
            answer = await mesh.vit.unary(method, request, ledger.hop(f"{stage}[{start}]" if start else stage))
        ledger.backends[stage] = answer.backend
        yield answer
