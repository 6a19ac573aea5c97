"""What steers a generation: the pictures that it follows, and what T2I-Adapters say of them beforehand."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from imagemesh.v1 import controlnet_service_pb2
from imagemesh.v1.diffusion_service_pb2 import ControlUnit, PictureFeatures
from imagemesh_gateway.ledger import Ledger
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.passes import Turn
from imagemesh_gateway.pictures import control_picture
from imagemesh_gateway.plan import ControlPlan
from imagemesh_runtime.tensors import Array, to_proto


@dataclass(frozen=True)
class Controls:
    """For the sampler: units for ControlNets, which are asked at every step, and adapters' answers.

    Attributes:
        places: of the units, among the request's.
    """

    units: Sequence[ControlUnit] = ()
    features: Sequence[PictureFeatures] = ()
    places: Sequence[int] = ()


async def prepare_controls(mesh: Mesh, turn: Turn, ledger: Ledger) -> Controls:
    """The request's units at the size of the pass.

    Raises:
        MeshError: a picture can't be read, or a preprocessor or an adapter failed.
    """
    plans = turn.plan.controls
    if not plans:
        return Controls()
    with ledger.metrics.stage.time("control-pictures"):
        pictures = [await _picture(mesh, turn, i, ledger) for i in range(len(plans))]
    places = [i for i, unit in enumerate(plans) if not unit.once]
    features = [
        await _features(mesh, unit, pictures[i], f"t2i-adapter[{i}]{turn.suffix}", ledger)
        for i, unit in enumerate(plans)
        if unit.once
    ]
    return Controls([_unit(plans[i], pictures[i]) for i in places], features, places)


async def _picture(mesh: Mesh, turn: Turn, i: int, ledger: Ledger) -> Array:
    """What the unit follows, at the size of the pass."""
    picture = await asyncio.to_thread(control_picture, turn.plan, i)
    wanted = turn.plan.controls[i].preprocess
    if wanted is None:
        return picture
    stage = f"preprocess[{i}]{turn.suffix}"
    hint, ledger.backends[stage] = await mesh.preprocessors.hint(wanted, picture, ledger.hop(stage))
    return hint


def _unit(plan: ControlPlan, picture: Array) -> ControlUnit:
    return ControlUnit(
        model=plan.model,
        image=to_proto(picture),
        scale=plan.scale,
        start=plan.start,
        end=plan.end,
        guess_mode=plan.request.guess_mode,
        block_weights=plan.request.block_weights,
        control_type=plan.control_type,
    )


async def _features(mesh: Mesh, plan: ControlPlan, picture: Array, stage: str, ledger: Ledger) -> PictureFeatures:
    request = controlnet_service_pb2.AdaptPictureRequest(model=plan.model, image=to_proto(picture))
    with ledger.metrics.stage.time("t2i-adapter"):
        answer: controlnet_service_pb2.AdaptPictureResponse = await mesh.controlnet.unary(
            mesh.control.AdaptPicture, request, ledger.hop(stage)
        )
    ledger.backends[stage] = answer.backend
    return PictureFeatures(tensors=answer.features, scale=plan.scale, start=plan.start, end=plan.end)
