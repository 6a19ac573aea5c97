"""Which way the bytes of tensors go, over real channels; the counters prove it."""

from pathlib import Path

import grpc
import numpy as np

from imagemesh.v1 import controlnet_service_pb2 as pb
from imagemesh.v1 import controlnet_service_pb2_grpc as rpc
from imagemesh_runtime.channels import channel_options
from imagemesh_runtime.tensors import from_proto, to_proto
from tests.support.steering import EMBEDDINGS, LIMIT, PICTURE, SAMPLE, moved, payload, same, steered

TIMESTEPS = (981.0, 481.0)


async def test_over_tcp_residuals_come_as_raw_bytes(models: Path) -> None:
    async with steered(models) as sampler:
        answers = await sampler.residuals(*TIMESTEPS)
        told, server = moved(sampler.metrics), moved(sampler.server_metrics)
    total = sum(map(payload, answers))
    assert total > 100_000
    assert total < told["raw received"] < total + 2000
    assert set(told) == {"raw sent", "raw received"}
    assert server["raw received"] > PICTURE.nbytes
    assert server["protobuf received"] > 2 * SAMPLE.nbytes  # under 4 KiB each
    assert abs(server["raw sent"] - told["raw received"]) < 200  # before it is sent, its size is an estimate


async def test_a_plain_client_gets_the_same_residuals(models: Path) -> None:
    """Who knows nothing of parcels talks protobuf, and is answered in it."""
    start = pb.ControlStart(
        model="tiny-controlnet", image=to_proto(PICTURE), encoder_hidden_states=to_proto(EMBEDDINGS), scale=1.0
    )
    async with steered(models) as sampler:
        (wanted,) = await sampler.residuals(601.0)
        async with grpc.aio.insecure_channel(sampler.server.address, options=channel_options(LIMIT)) as channel:
            call = rpc.ControlNetServiceStub(channel).Control()
            await call.write(pb.ControlRequest(start=start))
            await call.write(pb.ControlRequest(step=pb.ControlStep(sample=to_proto(SAMPLE), timestep=601.0)))
            answer = await call.read()
            call.cancel()
    plain = [from_proto(one, "residual") for one in (*answer.down_residuals, answer.mid_residual)]
    for got, one in zip(plain, [*wanted.down, wanted.mid], strict=True):
        np.testing.assert_array_equal(got, one)


async def test_several_controlnets_are_summed_as_before(models: Path) -> None:
    async with steered(models) as sampler:
        async with sampler.control(0.5, 0.5) as control:
            both = await control.residuals(SAMPLE, 601.0)
        async with sampler.control(0.5) as control:
            one = await control.residuals(SAMPLE, 601.0)
    assert same(both, one + one)
