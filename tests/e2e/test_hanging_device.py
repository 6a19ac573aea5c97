"""A service whose device hangs still ends when it is asked to, and says what it hangs at."""

import signal
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import diffusion_service_pb2_grpc as rpc
from imagemesh_runtime.service import EXIT_HANGS
from imagemesh_runtime.tensors import to_proto
from tests.support.fleet import fleet


def test_a_service_whose_device_hangs_ends_after_the_grace_period_and_names_the_call(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with fleet("fake", tmp_path, count=1, IMAGEMESH_DRAIN_GRACE_SECONDS="1") as found:
        replica = found.replicas[0]
        found.record.hang.write_text(str(replica.process.pid))
        embeds = to_proto(np.ones((1, 8, 4), dtype=np.float32))
        request = pb.SampleRequest(
            model="fake", conditioning={"prompt_embeds": embeds}, width=64, height=64, steps=2, seeds=[1]
        )
        with grpc.insecure_channel(replica.address) as channel:
            events = rpc.DiffusionServiceStub(channel).Sample(request)
            assert next(events).HasField("queued")
            begun = time.monotonic()
            replica.process.send_signal(signal.SIGTERM)
            assert replica.process.wait(timeout=60) == EXIT_HANGS
            assert time.monotonic() - begun >= 1  # others had their time
            with pytest.raises(grpc.RpcError):
                list(events)
    told = capfd.readouterr().err
    assert "hangs" not in told, "a slow device looks the same"
    assert "tampered.py" in told.split("lane diffusion is still at ")[1].splitlines()[0]
