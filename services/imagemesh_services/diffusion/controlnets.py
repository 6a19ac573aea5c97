"""The ControlNet services that the sampler knows, and which of them is asked for which units."""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import grpc

from imagemesh.v1 import model_service_pb2, model_service_pb2_grpc
from imagemesh_runtime.client import Peer
from imagemesh_runtime.errors import MeshError, Unavailable

# What another replica may do better.
_ELSEWHERE: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
_LISTED_SECONDS: Final = 10.0  # a list of models is believed for so long
_LISTING_SECONDS: Final = 5.0
_REST_SECONDS: Final = 5.0  # a peer that failed is passed over for so long, if there is another


@dataclass(frozen=True)
class Share:
    """Units that one peer is asked for, by their places in the request, and the peers that could be, the best first."""

    places: Sequence[int]
    peers: Sequence[Peer]


class ControlNets:
    """One ControlNet service, or several that may have the same models or others."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        self.peers = peers
        self._failed_at: dict[Peer, float] = {}
        self._listed: dict[Peer, tuple[float, frozenset[str]]] = {}

    async def share(self, models: Sequence[str]) -> list[Share]:
        """Which peers to ask for units of these models: as few as can be, in the order of the units.

        A model that nobody has is left to one of them to refuse.

        Raises:
            Unavailable: none can be reached.
        """
        places = list(range(len(models)))
        if len(self.peers) == 1:
            return [Share(places, self.peers)]
        served = await self._served()
        shares = []
        while places:
            best = max(served, key=lambda peer: sum(models[place] in served[peer] for place in places))
            mine = [place for place in places if models[place] in served[best]] or places
            names = {models[place] for place in mine}
            others = [peer for peer in served if peer is not best and names <= served[peer]]
            shares.append(Share(mine, [best, *others]))
            places = [place for place in places if place not in mine]
        return shares

    def note_failure(self, peer: Peer, error: MeshError) -> bool:
        """Whether another peer may do better where this one failed so; if so, it is passed over for a while."""
        elsewhere = error.code in _ELSEWHERE
        if elsewhere:
            self._failed_at[peer] = time.monotonic()
        return elsewhere

    async def _served(self) -> Mapping[Peer, frozenset[str]]:
        """The models of each peer that can be reached; those that failed a moment ago come last."""
        found = await asyncio.gather(*(self._models(peer) for peer in self.peers))
        served = {peer: names for peer, names in zip(self.peers, found, strict=True) if names is not None}
        if not served:
            raise Unavailable(self.peers[0].name, f"none of {len(self.peers)} can be reached")
        order = random.sample(list(served), len(served))
        return {peer: served[peer] for peer in sorted(order, key=self._rests)}

    def _rests(self, peer: Peer) -> bool:
        return time.monotonic() - self._failed_at.get(peer, -_REST_SECONDS) < _REST_SECONDS

    async def _models(self, peer: Peer) -> frozenset[str] | None:
        now = time.monotonic()
        at, names = self._listed.get(peer, (-_LISTED_SECONDS, frozenset[str]()))
        if now - at < _LISTED_SECONDS and self._failed_at.get(peer, at) <= at:
            return names
        stub = model_service_pb2_grpc.ModelServiceStub(peer.channel)
        request = model_service_pb2.ListServedModelsRequest()
        try:
            answer = await peer.unary(stub.ListServedModels, request, timeout_seconds=_LISTING_SECONDS)
        except MeshError:
            return None
        names = frozenset(one.name for one in answer.models)
        self._listed[peer] = (now, names)
        return names

    async def close(self) -> None:
        """Close the channels."""
        await asyncio.gather(*(peer.close() for peer in self.peers))
