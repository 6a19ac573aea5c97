"""The ControlNet services that the sampler knows, and which of them is asked for which units."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import grpc

from imagemesh.v1 import model_service_pb2, model_service_pb2_grpc
from imagemesh_runtime.client import Peer, out_of_time
from imagemesh_runtime.errors import DeadlineExceeded, MeshError, Unavailable
from imagemesh_runtime.replicas import Replicas

# What another replica may do better.
_ELSEWHERE: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_LISTED_SECONDS: Final = 10.0  # a list of models is believed for so long
_LISTING_SECONDS: Final = 5.0


class Late(DeadlineExceeded):
    """A step took longer than it may, whatever the generation's own deadline is."""


@dataclass(frozen=True)
class Share:
    """Units that one peer is asked for, by their places in the request, and the peers that could be, the best first."""

    places: Sequence[int]
    peers: Sequence[Peer]


class ControlNets:
    """One ControlNet service, or several that may have the same models or others."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._failed_at: WeakKeyDictionary[Peer, float] = WeakKeyDictionary()
        self._listed: WeakKeyDictionary[Peer, tuple[float, frozenset[str]]] = WeakKeyDictionary()

    async def share(self, models: Sequence[str]) -> list[Share]:
        """Which peers to ask for units of these models: as few as can be, in the order of the units.

        A model that nobody has is left to one of them to refuse.

        Raises:
            Unavailable: none can be reached.
        """
        places = list(range(len(models)))
        if len(self._replicas.peers) == 1:
            return [Share(places, self._replicas.peers)]
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
        """Whether another peer may do better where this one failed so; if so, it is passed over for a while.

        It isn't where the generation's own deadline has come: no peer is to blame for that, and none has time.
        """
        late = error.code is grpc.StatusCode.DEADLINE_EXCEEDED and (isinstance(error, Late) or not out_of_time())
        elsewhere = late or error.code in _ELSEWHERE
        if elsewhere:
            self._failed_at[peer] = time.monotonic()
            self._replicas.note_failure(peer)
        return elsewhere

    def work_on(self, peer: Peer) -> AbstractContextManager[None]:
        """Around a session, so that others are shared out accordingly; raises ``Unavailable`` if it has gone."""
        return self._replicas.work_on(peer)

    async def _served(self) -> Mapping[Peer, frozenset[str]]:
        """The models of each peer that can be reached, in the order in which they are best asked."""
        peers = self._replicas.peers
        found = await asyncio.gather(*(self._models(peer) for peer in peers))
        served = {peer: names for peer, names in zip(peers, found, strict=True) if names is not None}
        best = self._replicas.ranked(list(served))
        if not best:
            raise Unavailable(self._replicas.name, f"none of {len(peers)} can be reached")
        return {peer: served[peer] for peer in best}

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
