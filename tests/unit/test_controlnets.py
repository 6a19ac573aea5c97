"""Which ControlNet services a generation is shared out to, and which are held to have failed: nobody is called."""

import time
from collections.abc import AsyncIterator

import pytest

from imagemesh_runtime.client import Peer
from imagemesh_runtime.context import CallContext, set_current_call
from imagemesh_runtime.errors import DeadlineExceeded, InvalidArgument, MeshError, Unavailable
from imagemesh_runtime.replicas import Replicas
from imagemesh_services.diffusion.controlnets import ControlNets, Late


@pytest.fixture
async def replicas() -> AsyncIterator[Replicas]:
    addresses = ["127.0.0.1:1", "127.0.0.1:2"]
    found = Replicas([Peer("controlnet", one, max_message_bytes=1 << 20) for one in addresses], 60.0)
    yield found
    await found.close()


@pytest.mark.parametrize(
    ("left", "error", "elsewhere"),
    [
        (0.5, DeadlineExceeded("controlnet", "did not answer within the deadline"), False),
        (100.0, DeadlineExceeded("controlnet", "did not answer within the deadline"), True),
        (None, DeadlineExceeded("controlnet", "did not answer within the deadline"), True),
        (0.5, Late("controlnet", "no residuals within 0.2 s"), True),
        (0.5, Unavailable("controlnet", "is going away"), True),
        (100.0, InvalidArgument("scale", "x", "y"), False),
    ],
)
async def test_one_rests_that_failed_or_was_late_but_not_where_the_generations_own_deadline_came(
    replicas: Replicas, left: float | None, error: MeshError, elsewhere: bool
) -> None:
    set_current_call(CallContext(deadline=None if left is None else time.monotonic() + left))
    peer = replicas.peers[0]
    assert ControlNets(replicas).note_failure(peer, error) == elsewhere
    assert replicas.rests(peer) == elsewhere


@pytest.mark.parametrize("going", [1, 2])
async def test_one_that_goes_while_they_are_asked_for_their_models_is_left_out(
    replicas: Replicas, going: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets, peers = ControlNets(replicas), replicas.peers

    async def models(peer: Peer) -> frozenset[str]:
        if peer in peers[:going]:
            replicas.part(peer)
        return frozenset({"m"})

    monkeypatch.setattr(nets, "_models", models)
    if going == len(peers):
        with pytest.raises(Unavailable, match="none of 2 can be reached"):
            await nets.share(["m"])
    else:
        assert [share.peers for share in await nets.share(["m"])] == [[peers[1]]]
