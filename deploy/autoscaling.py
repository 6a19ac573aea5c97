"""How Kubernetes would scale a service, and what its callers would wait: pure arithmetic, no clock and no cluster."""

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Policy:
    """A HorizontalPodAutoscaler's or ScaledObject's settings, times in seconds; KEDA makes such an autoscaler.

    ``target`` is of type AverageValue: what the sum of the metric should be for each replica.
    """

    target: float = 30.0
    least: int = 1
    most: int = 4
    sync: float = 15.0
    tolerance: float = 0.1
    up_pods: int = 2
    up_period: float = 60.0
    down_window: float = 600.0
    down_pods: int = 1
    down_period: float = 120.0


@dataclass
class Autoscaler:
    """Kubernetes' algorithm for one metric of type AverageValue, with stabilization and one policy for each direction.

    From the documentation of HorizontalPodAutoscaler: within the tolerance nothing changes; else ceil(sum / target);
    scaling down takes the highest recommendation of the window, and either way the policy bounds the change from the
    number of replicas at the period's start.
    """

    policy: Policy
    _wishes: deque[tuple[float, int]] = field(default_factory=deque)
    _changes: deque[tuple[float, int]] = field(default_factory=deque)

    def step(self, now: float, metric: float, replicas: int) -> int:
        """How many replicas there should be, asked every ``policy.sync`` seconds; ``metric``: its sum."""
        policy = self.policy
        ratio = metric / (policy.target * max(replicas, 1))
        wish = replicas if abs(ratio - 1) <= policy.tolerance else math.ceil(metric / policy.target)
        wish = min(max(wish, policy.least), policy.most)
        self._wishes.append((now, wish))
        while self._wishes[0][0] < now - policy.down_window:
            self._wishes.popleft()
        if wish < replicas:
            wish = min(replicas, max(number for _, number in self._wishes))
        if wish > replicas:
            wish = max(replicas, min(wish, self._start(now, replicas, policy.up_period, +1) + policy.up_pods))
        elif wish < replicas:
            wish = min(replicas, max(wish, self._start(now, replicas, policy.down_period, -1) - policy.down_pods))
        if wish != replicas:
            self._changes.append((now, wish - replicas))
        return wish

    def _start(self, now: float, replicas: int, period: float, sign: int) -> int:
        """Replicas at the period's start, as far as changes in that direction made the difference."""
        return replicas - sum(by for at, by in self._changes if at > now - period and by * sign > 0)


# (arrival, seconds of work left) of each request.
Queue = deque[tuple[float, float]]


def _backlog(queue: Queue) -> float:
    """Seconds until all of it would be done: a share of ``imagemesh_backlog_seconds``."""
    return sum(work for _, work in queue)


@dataclass
class Replica:
    """One that works through its queue in order."""

    ready_at: float
    queue: Queue = field(default_factory=deque)


@dataclass(frozen=True)
class Moment:
    """What was so at a time."""

    at: float
    replicas: int
    ready: int
    backlog: float
    waiting: int


@dataclass
class Run:
    """A simulated run: moments a second apart, and the seconds from arrival to end of every request that ended."""

    moments: list[Moment] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def replica_hours(self) -> float:
        """What was paid for: replicas, ready or not, by hours."""
        return sum(moment.replicas for moment in self.moments) / 3600

    def quantile(self, q: float) -> float:
        """Of the seconds that requests took; 0 without any."""
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)] if ordered else 0.0


def simulate(arrivals: Sequence[float], work: float, start: float, policy: Policy, seed: int = 0, held: int = 8) -> Run:
    """Replay a trace until everything is done, and the replicas are as few as they may be.

    Args:
        arrivals: seconds at which requests come, in order.
        work: seconds that a replica needs for one request.
        start: seconds from a replica's creation until it takes work: the image, the libraries, the weights.
        policy: of the autoscaler.
        seed: of the choice between replicas, which is the gateway's: the less busy of two random ones.
        held: requests that a replica is handed at a time, ``max_starting_jobs``; the others wait in the store of the
            gateway, which tells the autoscaler of them as the replicas tell of theirs.
    """
    chance, scaler, run = random.Random(seed), Autoscaler(policy), Run()
    fleet = [Replica(0.0) for _ in range(policy.least)]
    pending, store, now = deque(arrivals), Queue(), 0.0
    while pending or store or any(one.queue for one in fleet) or len(fleet) > policy.least:
        ready = [one for one in fleet if one.ready_at <= now]
        while pending and pending[0] < now + 1:
            store.append((pending.popleft(), work))
        _hand_out(store, ready, held, chance)
        for one in ready:
            _work(one, now, run)
        backlog = _backlog(store) + sum(_backlog(one.queue) for one in fleet)
        if now % policy.sync == 0:
            _resize(fleet, scaler.step(now, backlog, len(fleet)), now + start, chance)
        waiting = len(store) + sum(len(one.queue) for one in fleet)
        run.moments.append(Moment(now, len(fleet), len(ready), backlog, waiting))
        now += 1
    return run


def _hand_out(store: Queue, ready: Sequence[Replica], held: int, chance: random.Random) -> None:
    while store and (room := [one for one in ready if len(one.queue) < held]):
        _place(store.popleft(), room, chance)


def _place(request: tuple[float, float], ready: Sequence[Replica], chance: random.Random) -> None:
    two = chance.sample(ready, min(2, len(ready)))
    min(two, key=lambda one: len(one.queue)).queue.append(request)


def _work(one: Replica, now: float, run: Run) -> None:
    """A second's work."""
    left = 1.0
    while one.queue and left > 0:
        arrival, work = one.queue.popleft()
        if work > left:
            one.queue.appendleft((arrival, work - left))
            return
        left -= work
        run.times.append(max(now + 1 - left - arrival, 0.0))


def _resize(fleet: list[Replica], wanted: int, ready_at: float, chance: random.Random) -> None:
    """The last to come goes first, as of a StatefulSet's pods, and hands its work to the others, steps done kept."""
    while len(fleet) > wanted:
        gone = fleet.pop()
        ready = [one for one in fleet if one.ready_at <= ready_at]
        for request in gone.queue:
            _place(request, ready, chance)
    fleet += [Replica(ready_at) for _ in range(wanted - len(fleet))]
