"""What is to be seen of the pictures made, and which of them are kept: checked, with every default filled in."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import vit_service_pb2
from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument
from imagemesh_runtime.limits import MAX_LABELS, MAX_RETRIES, MAX_SEED, check_range

if TYPE_CHECKING:
    from imagemesh_gateway.mesh import Mesh

DEFAULT_LABELS: Final = 5

Told = vit_service_pb2.DescribeClassifierResponse


@dataclass(frozen=True)
class KeepPlan:
    """The label that a picture must show, among how many likeliest ones, how probably; how often others are drawn."""

    label: str
    top_k: int
    min_probability: float
    retries: int


@dataclass(frozen=True)
class LookPlan:
    """Models that look at what is made; an empty name: none does.

    Attributes:
        labels: told of each picture.
        keep: None: all pictures are kept.
    """

    classifier: str = ""
    labels: int = 0
    embedder: str = ""
    pooling: "vit_service_pb2.Pooling.ValueType" = vit_service_pb2.POOLING_UNSPECIFIED
    normalize: bool = False
    keep: KeepPlan | None = None


async def look_plan(request: pb.GenerateRequest, seeds: Sequence[int], mesh: "Mesh") -> LookPlan:
    """The request's, checked before anything is drawn for nothing.

    Raises:
        InvalidArgument: a bound is passed, or the model has no such label or pooling.
        NotFound: there is no such model.
        FailedPrecondition: the model can't embed.
        MeshError: the vision service can't be asked, or can't load the model.
    """
    classifier, labels, keep = "", 0, None
    if request.HasField("classify") or request.HasField("keep"):
        check_range("classify.top_k", request.classify.top_k, 0, MAX_LABELS)
        labels = request.classify.top_k or DEFAULT_LABELS
        classifier = (await mesh.catalogue.find(mesh.vit, request.classify.model)).name
        if request.HasField("keep"):
            keep = _keep_plan(request.keep, seeds, classifier, await _described(mesh, classifier))
    if not request.HasField("embed"):
        return LookPlan(classifier, labels, keep=keep)
    embedder = (await mesh.catalogue.find(mesh.vit, request.embed.model)).name
    _check_pooling(request.embed.pooling, embedder, await _described(mesh, embedder))
    return LookPlan(classifier, labels, embedder, request.embed.pooling, request.embed.normalize, keep)


def retry_seeds(seeds: Sequence[int], wanted: Sequence[int], retry: int) -> tuple[int, ...]:
    """The seeds of the pictures with the numbers ``wanted`` at the ``retry``-th retry; at the 0th the request's own.

    None is drawn twice: each retry goes on behind the largest of those before it.
    """
    if retry == 0:
        return tuple(seeds[i] for i in wanted)
    return tuple(max(seeds) + (retry - 1) * len(seeds) + i + 1 for i in wanted)


def _keep_plan(asked: pb.GenerateKeep, seeds: Sequence[int], model: str, told: Told) -> KeepPlan:
    if asked.label not in told.labels:
        near = difflib.get_close_matches(asked.label[:80], told.labels, n=1, cutoff=0.6)
        perhaps = f" (perhaps {near[0]!r})" if near else ""
        raise InvalidArgument("keep.label", asked.label, f"one of the {len(told.labels)} labels of {model}{perhaps}")
    check_range("keep.top_k", asked.top_k, 0, MAX_LABELS)
    check_range("keep.min_probability", asked.min_probability, 0, 1)
    check_range("keep.retries", asked.retries, 0, MAX_RETRIES)
    if max(seeds) + asked.retries * len(seeds) > MAX_SEED:
        allowed = f"so few, or the seeds so small, that those of the retries are at most {MAX_SEED}"
        raise InvalidArgument("keep.retries", asked.retries, allowed)
    return KeepPlan(asked.label, asked.top_k or 1, asked.min_probability, asked.retries)


def _check_pooling(pooling: int, model: str, told: Told) -> None:
    if not told.poolings:
        raise FailedPrecondition(f"embed: model {model} only classifies")
    if pooling != vit_service_pb2.POOLING_UNSPECIFIED and pooling not in told.poolings:
        allowed = ", ".join(vit_service_pb2.Pooling.Name(one) for one in told.poolings)
        raise InvalidArgument("embed.pooling", pooling, f"one of {allowed} for model {model}")


async def _described(mesh: "Mesh", model: str) -> Told:
    request = vit_service_pb2.DescribeClassifierRequest(model=model)
    answer: Told = await mesh.vit.unary(mesh.see.DescribeClassifier, request)
    return answer
