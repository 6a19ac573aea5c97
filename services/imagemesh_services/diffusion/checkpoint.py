"""A generation frozen between two evaluations, so that another replica can go on with it.

It holds what changes from step to step: latents, the scheduler's and the guider's state, the generators, and how many
evaluations are behind. What doesn't change (noise drawn at the start, embeddings, masks) is made anew from the same
request. Values are JSON, tensors are tensors: nothing in it is ever unpickled or imported.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.tensors import Array, map_from_proto, map_to_proto

FIELD = "resume_from"
MAX_TENSORS = 256
MAX_STATE_CHARACTERS = 1 << 20
# Of a request, what says how to run it and not what to make.
_HOW = ("resume_from", "checkpoint_every", "confirm_as", "alone", "priority")


@dataclass(frozen=True)
class Checkpoint:
    """See the module.

    Attributes:
        evaluation: evaluations behind.
        state: JSON-able values by name; what stands for a tensor is for the backend to say.
        tensors: the arrays that ``state`` speaks of.
    """

    evaluation: int
    state: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Array] = field(default_factory=dict)


def request_digest(request: pb.SampleRequest, adapters: Sequence[str] = ()) -> str:
    """The same for requests that ask for the same pictures, in hexadecimal.

    What text encoders, textual inversions, VAEs and T2I-Adapters have to say is in the request; of IP-Adapters only the
    names are.

    Args:
        adapters: a fingerprint of each reference's IP-Adapter.
    """
    plain = pb.SampleRequest()
    plain.CopyFrom(request)
    for name in _HOW:
        plain.ClearField(name)  # type: ignore[arg-type]
    digest = hashlib.sha256("\0".join(adapters).encode())
    digest.update(plain.SerializeToString(deterministic=True))
    return digest.hexdigest()


def to_message(checkpoint: Checkpoint, fingerprint: str) -> pb.SampleCheckpoint:
    """The checkpoint as it travels; ``fingerprint`` says of what model and which request it is."""
    return pb.SampleCheckpoint(
        evaluation=checkpoint.evaluation,
        fingerprint=fingerprint,
        state=json.dumps(checkpoint.state),
        tensors=map_to_proto(checkpoint.tensors),
    )


def check_names(given: Iterable[str], allowed: Iterable[str], field: str) -> None:
    """Raise InvalidArgument if a name is given that isn't allowed."""
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise InvalidArgument(field, unknown, f"an object of {', '.join(allowed) or 'nothing'} alone")


def read_message(message: pb.SampleCheckpoint, fingerprint: str) -> Checkpoint:
    """The checkpoint in a message, as far as it can be checked without the run that it is for.

    Raises:
        InvalidArgument: it is of another model, build or request, or not a checkpoint at all.
    """
    if message.fingerprint != fingerprint:
        allowed = f"{fingerprint}: one of the same request, model, element type and library versions"
        raise InvalidArgument(f"{FIELD}.fingerprint", message.fingerprint, allowed)
    if len(message.tensors) > MAX_TENSORS:
        raise InvalidArgument(f"{FIELD}.tensors", f"{len(message.tensors)} tensors", f"at most {MAX_TENSORS}")
    if len(message.state) > MAX_STATE_CHARACTERS:
        raise InvalidArgument(f"{FIELD}.state", f"{len(message.state)} characters", f"at most {MAX_STATE_CHARACTERS}")
    try:
        state = json.loads(message.state)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{FIELD}.state", message.state, "JSON") from error
    if not isinstance(state, dict):
        raise InvalidArgument(f"{FIELD}.state", message.state, "a JSON object")
    return Checkpoint(message.evaluation, state, map_from_proto(message.tensors, f"{FIELD}.tensors"))
