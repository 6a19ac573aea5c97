"""The replicas of one service: who they are, which of them gets the next call, and who is passed over.

Stubs are made once, on ``channel`` or ``parcels``; each call through ``unary`` goes to the replica that is chosen then.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

import grpc

from imagemesh.v1 import load_service_pb2
from imagemesh_runtime.client import Hop, Peer
from imagemesh_runtime.errors import MeshError, Unavailable
from imagemesh_runtime.faults import is_broken, is_lost, lacks_model

Answer = TypeVar("Answer")

# So many errors in a row that say that it is broken, and a replica is passed over.
_BROKEN_IN_A_ROW: Final = 3
# It is passed over for longer each time, up to so many times as long, until a call goes well.
_LONGEST_REST: Final = 10
# What a replica said of its load is believed for so long.
_BELIEVED_SECONDS: Final = 10.0
# How much the newest counts of what work takes.
_NEWEST: Final = 0.2
# Replicas that one call is tried at.
_ATTEMPTS: Final = 3


@dataclass
class _Standing:
    """What is known of one replica.

    Attributes:
        under_way: calls from here; ``amount``: of work that they are, in whatever unit the callers have.
        broken: errors in a row that say that it is broken.
        rests: times in a row that it was passed over.
        rests_until: on the clock of time.monotonic(); ``failed_at``: when it failed last, 0: never.
        ready: what it said last.
        told: its load as it said; ``told_at``: when, and with how many calls from here.
        pace: seconds that an amount of 1 took it, lately; 0: not known.
    """

    under_way: int = 0
    amount: float = 0.0
    broken: int = 0
    rests: int = 0
    rests_until: float = 0.0
    failed_at: float = 0.0
    ready: bool = True
    told: load_service_pb2.ReportLoadResponse | None = None
    told_at: float = 0.0
    under_way_then: int = 0
    amount_then: float = 0.0
    pace: float = 0.0

    def load(self) -> tuple[float | None, int]:
        """Seconds of work, None: not known; and requests. What came from here or went since it said so counts."""
        if self.told is None or time.monotonic() - self.told_at > _BELIEVED_SECONDS:
            return None, self.under_way
        since = self.under_way - self.under_way_then
        requests = max(self.told.requests + since, self.under_way)
        if not self.told.HasField("backlog_seconds"):
            return None, requests
        since_then = self.pace * (self.amount - self.amount_then)
        return max(self.told.backlog_seconds + since_then, 0.0), requests


class Replicas:
    """Several peers that do the same work.

    Args:
        keeping: services, by their full names, whose state is a replica's own: their calls go to the same one as long
            as it is there, and are made once.
        note_rest: called whenever a replica is passed over from now on.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        rest_seconds: float,
        *,
        name: str = "",
        keeping: Collection[str] = (),
        note_rest: Callable[[], object] = lambda: None,
    ) -> None:
        self.name = name or peers[0].name
        self.peers: tuple[Peer, ...] = tuple(peers)
        self.channel = _Routed(lambda peer: peer.channel)
        self.parcels = _Routed(lambda peer: peer.parcels)
        self._rest = rest_seconds
        self._keeping = keeping
        self._note_rest = note_rest
        self._known = {peer: _Standing() for peer in peers}
        self._closing: set[asyncio.Task[None]] = set()

    def join(self, peer: Peer) -> None:
        """A new one."""
        self._known[peer] = _Standing()
        self.peers = (*self.peers, peer)

    def part(self, peer: Peer) -> None:
        """It gets no more calls, and is closed when those under way have ended."""
        self.peers = tuple(one for one in self.peers if one is not peer)
        self._close_if_idle(peer)

    def pick(self, avoid: Collection[Peer] = (), amount: float = 1.0) -> Peer:
        """The lighter of two random replicas (Mitzenmacher, 2001).

        If both say their seconds of work, the one that would be done with this amount more sooner; else the one with
        fewer requests. Those to ``avoid``, those that are passed over and those that aren't ready come only when there
        is nobody else: of these the one first whose failure is longest ago.

        Raises:
            Unavailable: no replica is known.
        """
        if not self.peers:
            raise Unavailable(self.name, "no replica of it is known")
        pool = [peer for peer in self.peers if peer not in avoid] or list(self.peers)
        return self._rank(pool, amount)[0]

    def ranked(self, peers: Sequence[Peer]) -> list[Peer]:
        """Some of them, in the order in which they would be picked; those that have gone are left out."""
        left, order = [peer for peer in peers if peer in self.peers], list[Peer]()
        while left:
            order.append(self._rank(left)[0])
            left.remove(order[-1])
        return order

    async def ask(self, question: Callable[[Peer], Awaitable[Answer]]) -> Answer:
        """What one of them answers, asked one after another until one does.

        Raises:
            MeshError: none does; it is the last one's.
        """
        asked: list[Peer] = []
        while True:
            asked.append(peer := self.pick(avoid=asked))
            try:
                with self.work_on(peer, amount=0.0):
                    return await question(peer)
            except MeshError as error:
                self.note_error(peer, error)
                if not self._others(asked):
                    raise

    async def unary(
        self, method: "_Method", request: Any, hop: Hop | None = None, *, timeout_seconds: float | None = None
    ) -> Any:
        """Call a unary method of a stub on ``channel`` or ``parcels``; as ``Peer.unary``.

        If the replica is away or full, another is asked: all that services do but for those in ``keeping`` may be done
        twice. One that lacks the model did nothing; all others may be asked.
        """
        keeps = method.service in self._keeping
        asked: list[Peer] = []
        while True:
            asked.append(peer := self._keeper() if keeps else self.pick(avoid=asked))
            try:
                with self.work_on(peer):
                    answer = await peer.unary(method.at(peer), request, hop, timeout_seconds=timeout_seconds)
            except MeshError as error:
                elsewhere = self.note_error(peer, error)
                lacking = lacks_model(error)
                enough = len(asked) >= _ATTEMPTS and not lacking
                if keeps or not (elsewhere or lacking) or enough or not self._others(asked):
                    raise
            else:
                self.note_success(peer)
                return answer

    async def stream(self, method: "_Method", request: Any) -> AsyncGenerator[Any, None]:
        """Call a method of a stub on ``channel`` that streams its answers; as ``Peer.stream``, at one replica, once."""
        peer = self._keeper() if method.service in self._keeping else self.pick()
        with self.work_on(peer):
            try:
                async with aclosing(peer.stream(method.at(peer), request)) as answers:
                    async for answer in answers:
                        yield answer
            except MeshError as error:
                self.note_error(peer, error)
                raise
            self.note_success(peer)

    async def everywhere(self, method: "_Method", request: Any) -> list[Any]:
        """Call a unary method of every replica; the answers, in the order of ``peers``.

        Raises:
            MeshError: one of them failed, after all have answered.
        """
        answers = await self._answers(self.peers, lambda peer: peer.unary(method.at(peer), request))
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    async def survey(self, question: Callable[[Peer], Awaitable[Answer]]) -> list[Answer]:
        """What each of them answers, but for those that don't, and those that are passed over while others aren't.

        Raises:
            MeshError: none does; it is the first one's.
        """
        peers = self._good(self.peers) or self.peers
        answers = await self._answers(peers, question)
        for peer, answer in zip(peers, answers, strict=True):
            if isinstance(answer, MeshError):
                self.note_error(peer, answer)
            elif isinstance(answer, BaseException):
                raise answer
        found = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not found and isinstance(answers[0], BaseException):
            raise answers[0]
        return found

    @contextmanager
    def work_on(self, peer: Peer, amount: float = 1.0) -> Iterator[None]:
        """Around a call, so that ``pick`` knows of it."""
        standing = self._known.get(peer)
        if standing is None:
            raise Unavailable(self.name, f"its replica at {peer.address} has gone")
        standing.under_way += 1
        standing.amount += amount
        try:
            yield
        finally:
            standing.under_way -= 1
            standing.amount = standing.amount - amount if standing.under_way else 0.0
            self._close_if_idle(peer)

    def note_failure(self, peer: Peer) -> None:
        """It can't be reached, or goes away: pass it over for a while."""
        standing = self._known.get(peer)
        if standing is None:
            return
        standing.failed_at = time.monotonic()
        if standing.rests_until > standing.failed_at:
            return
        standing.rests += 1
        standing.rests_until = time.monotonic() + self._rest * min(standing.rests, _LONGEST_REST)
        self._note_rest()

    def note_success(self, peer: Peer) -> None:
        """A call went well."""
        standing = self._known.get(peer)
        if standing is not None:
            standing.broken = standing.rests = 0
            standing.rests_until = 0.0

    def note_error(self, peer: Peer, error: MeshError) -> bool:
        """A call didn't; answers whether another replica may do better."""
        if is_lost(error, self.name):
            self.note_failure(peer)
            return True
        standing = self._known.get(peer)
        if standing is not None and is_broken(error):
            standing.broken += 1
            if standing.broken >= _BROKEN_IN_A_ROW:
                standing.broken = 0
                self.note_failure(peer)
        # Too much for one may be little for another; a message that is too large never is.
        return error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after() is not None

    def note_load(self, peer: Peer, told: load_service_pb2.ReportLoadResponse | None) -> None:
        """What it says of its load; None: it doesn't answer."""
        standing = self._known.get(peer)
        if standing is None:
            return
        ready = told is not None and told.ready
        if ready and not standing.ready:  # it is back, or another is in its place
            standing.broken = standing.rests = 0
            standing.rests_until = 0.0
        standing.ready = ready
        standing.told, standing.told_at = told, time.monotonic()
        standing.under_way_then, standing.amount_then = standing.under_way, standing.amount
        if told is not None and told.backlog_seconds > 0 and standing.amount > 0:
            now = told.backlog_seconds / standing.amount
            standing.pace += (now - standing.pace) * (_NEWEST if standing.pace else 1.0)

    def rests(self, peer: Peer) -> bool:
        """Whether it is passed over now."""
        standing = self._known.get(peer)
        return standing is None or standing.rests_until > time.monotonic()

    async def close(self) -> None:
        """Close all channels; calls under way end."""
        peers, self.peers = list(self._known), ()
        self._known.clear()
        for peer in peers:
            await peer.close()
        await asyncio.gather(*self._closing)

    async def _answers(
        self, peers: Sequence[Peer], question: Callable[[Peer], Awaitable[Answer]]
    ) -> list[Answer | BaseException]:
        if not peers:
            raise Unavailable(self.name, "no replica of it is known")

        async def ask(peer: Peer) -> Answer:
            with self.work_on(peer, amount=0.0):
                return await question(peer)

        return await asyncio.gather(*map(ask, peers), return_exceptions=True)

    def _good(self, pool: Sequence[Peer]) -> list[Peer]:
        return [peer for peer in pool if not self.rests(peer) and self._known[peer].ready]

    def _rank(self, pool: list[Peer], amount: float = 1.0) -> list[Peer]:
        """Two of them, or one, the better first."""
        if len(pool) == 1:
            return pool
        good = self._good(pool)
        if not good:
            failed_at = {peer: self._known[peer].failed_at for peer in pool}
            good = [peer for peer in pool if failed_at[peer] == min(failed_at.values())]
        if len(good) == 1:
            return good
        two = self._draw_two(good)
        loads = [self._known[peer].load() for peer in two]
        if any(seconds is None for seconds, _ in loads):
            return two if loads[0][1] <= loads[-1][1] else two[::-1]
        done = [
            (seconds or 0.0) + self._known[peer].pace * amount for peer, (seconds, _) in zip(two, loads, strict=True)
        ]
        return two if done[0] <= done[-1] else two[::-1]

    def _draw_two(self, pool: list[Peer]) -> list[Peer]:
        """Two at random, or the only one, each as often as it is quick.

        Drawn evenly, two slow ones would often meet, and get more than they can do, while quick ones idle.
        """
        paces = [self._known[peer].pace for peer in pool]
        usual = median(known) if (known := [pace for pace in paces if pace > 0]) else 1.0
        rates = [1 / (pace or usual) for pace in paces]
        first = random.choices(range(len(pool)), rates)[0]
        rates[first] = 0.0
        if not any(rates):
            return [pool[first]]
        return [pool[first], pool[random.choices(range(len(pool)), rates)[0]]]

    def _keeper(self) -> Peer:
        """The one that has been here longest."""
        if not self.peers:
            raise Unavailable(self.name, "no replica of it is known")
        return self.peers[0]

    def _others(self, asked: Sequence[Peer]) -> bool:
        return any(peer not in asked for peer in self.peers)

    def _close_if_idle(self, peer: Peer) -> None:
        standing = self._known.get(peer)
        if standing is not None and peer not in self.peers and not standing.under_way:
            del self._known[peer]
            task = asyncio.ensure_future(peer.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


class _Routed:
    """A channel as stubs see one, whose methods are those of whichever replica is chosen."""

    def __init__(self, channel_of: Callable[[Peer], Any]) -> None:
        self._channel_of = channel_of

    def __getattr__(self, kind: str) -> Any:
        def make(path: str, *arguments: Any, **options: Any) -> _Method:
            return _Method(path, lambda peer: getattr(self._channel_of(peer), kind)(path, *arguments, **options))

        return make


class _Method:
    """A method of a service, made on each replica's channel when it is first called there."""

    def __init__(self, path: str, make: Callable[[Peer], Any]) -> None:
        self.service = path.split("/")[1]
        self._make = make
        self._made: WeakKeyDictionary[Peer, Any] = WeakKeyDictionary()

    def at(self, peer: Peer) -> Any:
        if peer not in self._made:
            self._made[peer] = self._make(peer)
        return self._made[peer]
