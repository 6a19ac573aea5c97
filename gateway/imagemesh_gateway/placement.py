"""Where a generation is sampled: on one replica, and when that goes away, on another from the last checkpoint."""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Final

import grpc
from google.rpc import error_details_pb2

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import diffusion_service_pb2_grpc as rpc
from imagemesh_runtime.client import Hop, Peer
from imagemesh_runtime.context import current_call
from imagemesh_runtime.errors import Deadly, Hangs, MeshError, RemoteError
from imagemesh_runtime.faults import is_lost
from imagemesh_runtime.metrics import Metrics
from imagemesh_runtime.replicas import Replicas

log = logging.getLogger(__name__)

# A request that kills its replicas must not walk through the fleet; the last time it has its replica for itself.
MAX_MOVES: Final = 2
# Seconds before each further attempt once every replica was tried: one that starts, or that the channel has yet to find
# again, has its time.
PAUSES: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0, 8.0)


@dataclass
class _Journey:
    """Where a request has been.

    Only a replica that broke down while the request ran there may be the request's doing, or one that hangs at it: not
    one that handed it back, nor one that died, by another's doing perhaps, while it waited there.
    """

    gone: list[Peer] = field(default_factory=list)
    deaths: int = 0
    running: bool = False
    waited: float = 0.0  # seconds for a place, since the last one was lost

    def note(self, peer: Peer, error: MeshError) -> None:
        """The replica went away with this error.

        Raises:
            Deadly: once too often while the request ran.
        """
        self.gone.append(peer)
        self.waited = 0.0
        self.deaths += self.running and (not isinstance(error, RemoteError) or _hangs(error))
        if self.deaths > MAX_MOVES:
            raise Deadly("diffusion", self.deaths) from error

    def pause(self, peers: int) -> float | None:
        """Seconds until another attempt, after ``note``; None: there is none. ``peers``: the number of replicas."""
        again = len(self.gone) - peers
        if peers < 2 or again >= len(PAUSES):
            return None
        return _in_time(PAUSES[again]) if again >= 0 else 0.0

    def pause_when_full(self, error: MeshError) -> float | None:
        """The same where one that has lost its place finds no other at once; None too where that isn't the error.

        It waits about as long in all as where every replica is away.
        """
        pause = error.retry_after() if self.gone else None
        if pause is None or self.waited >= sum(PAUSES):
            return None
        self.waited += pause
        return _in_time(pause)


def _in_time(pause: float) -> float | None:
    """None: it would last beyond the call's deadline."""
    remaining = current_call().remaining()
    return pause if remaining is None or pause < remaining else None


# A replica may hold a confirmation up for as long as it waits for one.
_CONFIRM_SECONDS: Final = 2.0


async def sample(
    replicas: Replicas, request: pb.SampleRequest, hop: Hop, metrics: Metrics, checkpoint_every: int
) -> AsyncGenerator[pb.SampleResponse, None]:
    """The events of ``Sample`` until its result, without what is for here: the checkpoints are kept.

    Raises:
        Deadly: it may be the request at which its replicas broke down.
        MeshError: the request's own fault, or the replicas went away once too often.
    """
    request.checkpoint_every = checkpoint_every if len(replicas.peers) > 1 else 0
    journey, amount = _Journey(), _amount(request)
    while True:
        peer = replicas.pick(avoid=journey.gone, amount=amount)
        try:
            with replicas.work_on(peer, amount):
                async with aclosing(_follow(peer, request, hop, journey)) as responses:
                    async for response in responses:
                        yield response
                replicas.note_success(peer)
                return
        except MeshError as error:
            if _starts_again(peer, request, error):
                continue
            if (pause := journey.pause_when_full(error)) is not None:
                log.warning("diffusion at %s is full; the generation waits %.1f s to go on", peer.address, pause)
                await asyncio.sleep(pause)
                continue
            replicas.note_error(peer, error)
            if not is_lost(error, replicas.name):
                raise
            journey.note(peer, error)
            if (pause := journey.pause(len(replicas.peers))) is None:
                raise
            hop.moved = True
            request.alone = journey.deaths == MAX_MOVES
            metrics.moved.inc()
            done = request.resume_from.evaluation
            log.warning("diffusion at %s went away; going on from evaluation %d elsewhere", peer.address, done)
            await asyncio.sleep(pause)


def _starts_again(peer: Peer, request: pb.SampleRequest, error: MeshError) -> bool:
    """Whether the error is about the checkpoint, which is then thrown away."""
    if not (_is_stale(error) and request.HasField("resume_from")):
        return False
    log.warning("%s can't go on from the checkpoint; the generation starts again: %s", peer.address, error)
    request.ClearField("resume_from")
    return True


async def _follow(
    peer: Peer, request: pb.SampleRequest, hop: Hop, journey: _Journey
) -> AsyncGenerator[pb.SampleResponse, None]:
    """One replica's events; the request is kept ready to go on from the last checkpoint, and the replica told so."""
    stub = rpc.DiffusionServiceStub(peer.channel)
    asked = pb.SampleRequest()
    asked.CopyFrom(request)
    if request.checkpoint_every:
        asked.confirm_as = secrets.token_hex(16)
    journey.running = False
    async with aclosing(peer.stream(stub.Sample, asked, hop)) as responses:
        async for response in responses:
            kind = response.WhichOneof("event")
            journey.running |= kind != "queued"
            if kind == "checkpoint":
                request.resume_from.CopyFrom(response.checkpoint)
                await _confirm(peer, stub, asked.confirm_as, response.checkpoint.evaluation)
            elif kind != "started":
                yield response


async def _confirm(peer: Peer, stub: rpc.DiffusionServiceStub, confirm_as: str, evaluation: int) -> None:
    """A replica that isn't told goes on a little later; why it can't be is for its stream to say."""
    request = pb.ConfirmCheckpointRequest(confirm_as=confirm_as, evaluation=evaluation)
    with suppress(MeshError):
        await peer.unary(stub.ConfirmCheckpoint, request, timeout_seconds=_CONFIRM_SECONDS)


def _amount(request: pb.SampleRequest) -> float:
    """How much work it is: megapixels times rows times steps."""
    rows = len(request.seeds) * (2 if request.guidance_scale > 1 else 1)
    steps = request.steps * (request.strength or 1.0)
    return max(request.width * request.height / 1e6 * rows * steps, 1e-3)


def _hangs(error: MeshError) -> bool:
    """Whether the replica's device hangs at this request."""
    return any(isinstance(one, error_details_pb2.ErrorInfo) and one.reason == Hangs.REASON for one in error.details())


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
