"""Pictures that a generation is to be like: which adapter tells the sampler of each, and what it tells."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagemesh.v1 import diffusion_service_pb2, reference_service_pb2
from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.access.caller import current_caller
from imagemesh_gateway.ledger import Ledger
from imagemesh_runtime.errors import NotFound
from imagemesh_runtime.images import decode
from imagemesh_runtime.limits import MAX_CONTROL_SCALE, MAX_REFERENCES, check_proportion, check_range

if TYPE_CHECKING:
    from imagemesh_gateway.mesh import Mesh


@dataclass(frozen=True)
class ReferencePlan:
    """A picture (not decoded yet), the IP-Adapter for it, and how much it counts."""

    request: pb.GenerateReference
    adapter: str
    scale: float


async def reference_plans(request: pb.GenerateRequest, mesh: "Mesh") -> tuple[ReferencePlan, ...]:
    """The request's, checked.

    Raises:
        NotFound: there is no such adapter, or none at all.
        PermissionDenied: the caller's key is for others.
        InvalidArgument: a bound is passed.
    """
    check_range("references", len(request.references), 0, MAX_REFERENCES)
    if not request.references:
        return ()
    asked = reference_service_pb2.ListAdaptersRequest()
    told: reference_service_pb2.ListAdaptersResponse = await mesh.vit.unary(mesh.references.ListAdapters, asked)
    caller, plans = current_caller(), []
    for i, one in enumerate(request.references):
        scale = one.scale if one.HasField("scale") else 1.0
        check_range(f"references[{i}].scale", scale, 0, MAX_CONTROL_SCALE)
        if not told.adapters or (one.adapter and one.adapter not in told.adapters):
            raise NotFound("IP-Adapter", one.adapter or "any", told.adapters)
        adapter = one.adapter or next(iter(caller.usable(told.adapters)), told.adapters[0])
        caller.require_model(adapter)
        plans.append(ReferencePlan(one, adapter, scale))
    return tuple(plans)


async def embed_references(
    mesh: "Mesh", plans: Sequence[ReferencePlan], ledger: Ledger
) -> list[diffusion_service_pb2.Reference]:
    """What the adapters tell the sampler of the pictures."""
    found = []
    for i, plan in enumerate(plans):
        stage = f"reference[{i}]"
        # Decoded here to be refused by its own name; the file goes on as it is, which is smaller.
        picture = await asyncio.to_thread(decode, plan.request.image, f"references[{i}].image")
        check_proportion(f"references[{i}].image", *picture.shape[:2])
        request = reference_service_pb2.EmbedReferencesRequest(adapter=plan.adapter, images=[plan.request.image])
        with ledger.metrics.stage.time("reference"):
            answer: reference_service_pb2.EmbedReferencesResponse = await mesh.vit.unary(
                mesh.references.EmbedReferences, request, ledger.hop(stage)
            )
        ledger.backends[stage] = answer.backend
        told = diffusion_service_pb2.Reference(adapter=answer.adapter, embeds=answer.embeds, scale=plan.scale)
        found.append(told)
    return found
