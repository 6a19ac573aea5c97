"""How often a key may call: a token bucket each."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from imagemesh_gateway.access.caller import Caller
from imagemesh_gateway.access.keys import Key
from imagemesh_runtime.errors import OverLimit


@dataclass
class _Bucket:
    tokens: float
    filled: float


class Rates:
    """The buckets of all keys; ``clock`` tells seconds. There are never more of them than keys were known."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, caller: Caller) -> None:
        """Count a call.

        Raises:
            OverLimit: it is one too many for now.
        """
        key = caller.key
        if key is None or key.calls_per_minute is None:
            return
        now, most, rate = self._clock(), burst_of(key), key.calls_per_minute / 60
        bucket = self._buckets.setdefault(key.id, _Bucket(most, now))
        bucket.tokens = min(bucket.tokens + (now - bucket.filled) * rate, most)
        bucket.filled = now
        if bucket.tokens < 1:
            told = f"it has made its {key.calls_per_minute:g} calls a minute, {most:g} of them at once"
            raise OverLimit(f"key {key.id}", told, (1 - bucket.tokens) / rate)
        bucket.tokens -= 1


def burst_of(key: Key) -> float:
    """Calls that a key may make at once."""
    return float(key.burst or max(math.floor(key.calls_per_minute or 1), 1))
