"""A checkpoint is of a request with all that its encoders and adapters said: another's weights make it another."""

import numpy as np
import pytest

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import priority_pb2
from imagemesh_runtime.tensors import map_to_proto, to_proto
from imagemesh_services.diffusion.checkpoint import request_digest

ONE, OTHER = np.zeros((1, 2, 3, 4), np.float32), np.ones((1, 2, 3, 4), np.float32)


def request(embeds: np.ndarray = ONE, features: np.ndarray = ONE, reference: np.ndarray = ONE) -> pb.SampleRequest:
    return pb.SampleRequest(
        model="m", seeds=[1], conditioning=map_to_proto({"prompt_embeds": embeds}),
        features=[pb.PictureFeatures(tensors=[to_proto(features)], scale=1)],
        references=[pb.Reference(adapter="a", embeds=map_to_proto({"image_embeds": reference}))],
    )  # fmt: skip


@pytest.mark.parametrize("what", ["embeds", "features", "reference"])
def test_what_textual_inversions_and_adapters_said_of_it_tells_requests_apart(what: str) -> None:
    assert request_digest(request()) != request_digest(request(**{what: OTHER}))


def test_an_ip_adapters_weights_tell_requests_apart() -> None:
    digests = {request_digest(request(), adapters) for adapters in ((), ("a",), ("b",), ("a", "b"), ("ab",))}
    assert len(digests) == 5


def test_how_a_request_is_run_does_not() -> None:
    run = request()
    run.priority, run.checkpoint_every, run.alone = priority_pb2.PRIORITY_BATCH, 7, True
    run.resume_from.evaluation, run.confirm_as = 3, "me"
    assert request_digest(run) == request_digest(request())
