"""Where a generation is sampled: on one replica, and when that goes away, on another from the last checkpoint."""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

import grpc
from google.rpc import error_details_pb2

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import diffusion_service_pb2_grpc as rpc
from imagemesh_gateway.replicas import Replicas
from imagemesh_runtime.client import Hop, Peer
from imagemesh_runtime.errors import MeshError
from imagemesh_runtime.metrics import Metrics

log = logging.getLogger(__name__)

# A request that kills its replicas must not walk through the fleet; the last time it has its replica for itself.
MAX_MOVES: Final = 2


async def sample(
    replicas: Replicas, request: pb.SampleRequest, hop: Hop, metrics: Metrics, checkpoint_every: int
) -> AsyncGenerator[pb.SampleResponse, None]:
    """The events of ``Sample`` until its result, without the checkpoints, which are kept here.

    Raises:
        MeshError: the request's own fault, or the replicas went away once too often.
    """
    request.checkpoint_every = checkpoint_every if len(replicas.peers) > 1 else 0
    gone: list[Peer] = []
    while True:
        peer = replicas.pick(avoid=gone)
        try:
            with replicas.work_on(peer):
                async with aclosing(_follow(peer, request, hop)) as responses:
                    async for response in responses:
                        yield response
                return
        except MeshError as error:
            if _is_stale(error) and request.HasField("resume_from"):
                log.warning("%s can't go on from the checkpoint; the generation starts again: %s", peer.address, error)
                request.ClearField("resume_from")
                continue
            if not _is_lost(error) or len(gone) == MAX_MOVES or len(replicas.peers) == 1:
                raise
            replicas.note_failure(peer)
            gone.append(peer)
            request.alone = len(gone) == MAX_MOVES
            metrics.moved.inc()
            done = request.resume_from.evaluation
            log.warning("diffusion at %s went away; going on from evaluation %d elsewhere", peer.address, done)


async def _follow(peer: Peer, request: pb.SampleRequest, hop: Hop) -> AsyncGenerator[pb.SampleResponse, None]:
    """One replica's events; the request is kept ready to go on from the last checkpoint."""
    stub = rpc.DiffusionServiceStub(peer.channel)
    asked = pb.SampleRequest()
    asked.CopyFrom(request)
    async with aclosing(peer.stream(stub.Sample, asked, hop)) as responses:
        async for response in responses:
            if response.HasField("checkpoint"):
                request.resume_from.CopyFrom(response.checkpoint)
            else:
                yield response


def _is_lost(error: MeshError) -> bool:
    """Whether the diffusion replica itself is gone, not a service behind it."""
    if error.code is not grpc.StatusCode.UNAVAILABLE:
        return False
    named = [info.metadata.get("service") for info in error.details() if isinstance(info, error_details_pb2.ErrorInfo)]
    return not named or named == ["diffusion"]


def _is_stale(error: MeshError) -> bool:
    """Whether the checkpoint was refused: this replica has other weights or another build."""
    if error.code is not grpc.StatusCode.INVALID_ARGUMENT:
        return False
    fields = [
        violation.field
        for detail in error.details()
        if isinstance(detail, error_details_pb2.BadRequest)
        for violation in detail.field_violations
    ]
    return any(field.startswith("resume_from") for field in fields)
