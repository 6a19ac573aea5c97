"""Who gets the next request, by arithmetic alone: the gateway's choice against fewest connections, in simulated time.

Replicas of unlike speed work through requests of unlike size, each in order. The gateway's own ``Replicas`` chooses,
knowing what replicas said of their seconds of work a second ago, and what it sent them since.
"""

import heapq
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

from imagemesh.v1.load_service_pb2 import ReportLoadResponse
from imagemesh_runtime.client import Peer
from imagemesh_runtime.replicas import Replicas

# Four CPUs, three GPUs of eight times their speed, one of twenty times.
SPEEDS = (1.0,) * 4 + (8.0,) * 3 + (20.0,)
# Seconds at speed 1, and how often: a picture classified, a small generation, a large one.
SIZES = ((0.5, 0.6), (8.0, 0.3), (60.0, 0.1))
TOLD_SECONDS = 1.0


@dataclass
class Server:
    """A replica in simulated time: when it will have done what it has, and when each of its requests ends."""

    speed: float
    free_at: float = 0.0
    ends: list[tuple[float, float]] = field(default_factory=list)

    def take(self, now: float, size: float) -> float:
        """Work through a request after those before it; answers when it ends."""
        self.free_at = max(self.free_at, now) + size / self.speed
        heapq.heappush(self.ends, (self.free_at, size))
        return self.free_at

    def settle(self, now: float) -> list[float]:
        """Forget what has ended; answers the sizes of that."""
        ended = []
        while self.ends and self.ends[0][0] <= now:
            ended.append(heapq.heappop(self.ends)[1])
        return ended


# Chooses a server, by its place, for a request that comes now, of that size.
Choose = Callable[[float, float, Sequence[Server]], int]


@dataclass(frozen=True)
class Outcome:
    """Seconds from arrival to end of each request, and until all were done."""

    times: Sequence[float]
    makespan: float

    @property
    def p99(self) -> float:
        """The time that one of a hundred requests takes longer than."""
        return sorted(self.times)[int(len(self.times) * 0.99)]


def requests(count: int, rate: float, seed: int) -> list[tuple[float, float]]:
    """Arrivals at random, ``rate`` a second (0: all at once), and their sizes."""
    chance, at, found = random.Random(seed), 0.0, []
    sizes, shares = zip(*SIZES, strict=True)
    for _ in range(count):
        at += chance.expovariate(rate) if rate else 0.0
        found.append((at, chance.choices(sizes, shares)[0]))
    return found


def run(asked: Sequence[tuple[float, float]], choose: Choose) -> Outcome:
    """Send all requests where ``choose`` says."""
    servers = [Server(speed) for speed in SPEEDS]
    times, last = [], 0.0
    for now, size in asked:
        end = servers[choose(now, size, servers)].take(now, size)
        times.append(end - now)
        last = max(last, end)
    return Outcome(times, last)


def fewest_connections(now: float, size: float, servers: Sequence[Server]) -> int:
    """As a balancer does that knows of connections alone."""
    for one in servers:
        one.settle(now)
    return min(range(len(servers)), key=lambda i: (len(servers[i].ends), random.random()))


def optimum(asked: Sequence[tuple[float, float]]) -> float:
    """No less time than this until all is done, wherever requests go."""
    return max(sum(size for _, size in asked) / sum(SPEEDS), max(size for _, size in asked) / max(SPEEDS))


@contextmanager
def gateway() -> Iterator[Choose]:
    """The gateway's choice; it needs an event loop."""
    clock = [0.0]
    with patch.object(time, "monotonic", lambda: clock[0]):
        peers = [Peer("x", f"127.0.0.1:{port + 1}", max_message_bytes=1 << 20) for port in range(len(SPEEDS))]
        replicas, places = Replicas(peers, 60.0), {peer: i for i, peer in enumerate(peers)}
        told_at = -TOLD_SECONDS

        def choose(now: float, size: float, servers: Sequence[Server]) -> int:
            nonlocal told_at
            clock[0] = now
            for peer, one in zip(peers, servers, strict=True):
                for ended in one.settle(now):
                    replicas._known[peer].under_way -= 1
                    replicas._known[peer].amount -= ended
            if now - told_at >= TOLD_SECONDS:
                told_at = now
                for peer, one in zip(peers, servers, strict=True):
                    seconds = max(one.free_at - now, 0.0)
                    told = ReportLoadResponse(ready=True, requests=len(one.ends), backlog_seconds=seconds)
                    replicas.note_load(peer, told)
            peer = replicas.pick(amount=size)
            replicas._known[peer].under_way += 1
            replicas._known[peer].amount += size
            return places[peer]

        yield choose
