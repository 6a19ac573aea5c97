"""The replicas of one service, and which of them gets the next generation."""

import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from imagemesh_runtime.client import Peer
from imagemesh_runtime.errors import MeshError

Answer = TypeVar("Answer")


class Replicas:
    """Several peers that do the same work."""

    def __init__(self, peers: Sequence[Peer], rest_seconds: float) -> None:
        self.name = peers[0].name
        self.peers = peers
        self._rest = rest_seconds
        self._under_way = dict.fromkeys(peers, 0)
        self._failed_at: dict[Peer, float] = {}

    def pick(self, avoid: Collection[Peer] = ()) -> Peer:
        """The less busy of two random replicas (Mitzenmacher, 2001), as the gateway's own calls have it.

        Those to ``avoid``, and those that failed a moment ago, come only when there is nobody else.
        """
        pool = [peer for peer in self.peers if peer not in avoid] or list(self.peers)
        rested = [peer for peer in pool if not self._rests(peer)]
        two = random.sample(rested or pool, min(2, len(rested or pool)))
        return min(two, key=lambda peer: self._under_way[peer])

    async def ask(self, question: Callable[[Peer], Awaitable[Answer]]) -> Answer:
        """What one of them answers, asked one after another until one does.

        Raises:
            MeshError: none does; it is the last one's.
        """
        asked: list[Peer] = []
        while True:
            asked.append(self.pick(avoid=asked))
            try:
                return await question(asked[-1])
            except MeshError:
                self.note_failure(asked[-1])
                if len(asked) == len(self.peers):
                    raise

    @contextmanager
    def work_on(self, peer: Peer) -> Iterator[None]:
        """Around a call, so that ``pick`` knows of it."""
        self._under_way[peer] += 1
        try:
            yield
        finally:
            self._under_way[peer] -= 1

    def note_failure(self, peer: Peer) -> None:
        """It can't be reached, or goes away: pass it over for a while."""
        self._failed_at[peer] = time.monotonic()

    def _rests(self, peer: Peer) -> bool:
        failed = self._failed_at.get(peer)
        return failed is not None and time.monotonic() - failed < self._rest
