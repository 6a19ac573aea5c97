"""How much a key may have done: generations at a time, and pixels x steps a day; checked before anything is done."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from imagemesh_gateway.access.caller import current_caller
from imagemesh_gateway.access.keys import Key
from imagemesh_gateway.jobs.record import NewJob, Record
from imagemesh_gateway.jobs.store import Store
from imagemesh_gateway.jobs.store_thread import StoreThread
from imagemesh_gateway.plan import Plan
from imagemesh_runtime.errors import OverLimit, PermissionDenied

_DAY: Final = 86400
_RETRY_SECONDS: Final = 5.0


def work_of(plan: Plan) -> int:
    """Pixels x steps of all its pictures: those of both passes of ``hires``, and of all retries of ``keep``."""
    once = plan.width * plan.height * plan.steps
    if plan.hires is not None:
        once += plan.hires.width * plan.hires.height * plan.hires.steps
    attempts = 1 + (plan.look.keep.retries if plan.look.keep is not None else 0)
    return once * len(plan.seeds) * attempts


class Admission:
    """Holds callers to the quotas of their keys. What is used up is in the store, and outlives the gateway."""

    def __init__(self, store: StoreThread) -> None:
        self._store = store
        # Generations of each key that are no jobs.
        self._direct: Counter[str] = Counter()
        self._lock = asyncio.Lock()

    async def check(self, idempotency_key: str | None = None) -> None:
        """Whether the caller may have anything more at all: before a plan is made, which may load models.

        A job that has the idempotency key already is none more. What is done is charged by ``accept`` and ``direct``.

        Raises:
            OverLimit: any is one too many, or nothing is left of today.
        """
        caller = current_caller()
        key = caller.key
        if key is None or (key.max_jobs is None and key.pixel_steps_per_day is None):
            return

        def look(store: Store) -> None:
            if idempotency_key is not None and store.find_key(idempotency_key, caller.tenant) is not None:
                return
            self._require_place(store, key)
            quota, (day, seconds) = key.pixel_steps_per_day, divmod(time.time(), _DAY)
            if quota is not None and store.used(key.id, int(day)) >= quota:
                told = f"of its {quota} pixels x steps a day (UTC) 0 are left"
                raise OverLimit(f"key {key.id}", told, _DAY - seconds)

        await self._store(look)

    async def accept(self, new: NewJob, plan: Plan) -> tuple[Record, bool]:
        """Store a job of the caller's and charge it; or, and then True, find the one that has its idempotency key.

        Raises:
            OverLimit: it is one too many, or too much for today.
            PermissionDenied: it is too much for any day.
        """
        key, work = current_caller().key, work_of(plan)

        def add(store: Store) -> tuple[Record, bool]:
            with store.together():
                known = store.find_key(new.key, new.tenant) if new.key is not None else None
                if known is not None:
                    return known, True
                if key is not None:
                    self._charge(store, key, work)
                return store.add(new)

        async with self._lock:
            return await self._store(add)

    @asynccontextmanager
    async def direct(self, plan: Plan) -> AsyncIterator[Plan]:
        """Around a generation of the caller's that is no job: the plan as the caller may have it; errors as above."""
        caller = current_caller()
        key, allowed = caller.key, replace(plan, priority=caller.capped(plan.priority))
        if key is None or (key.max_jobs is None and key.pixel_steps_per_day is None):
            yield allowed
            return
        async with self._lock:
            await self._store(lambda store: self._charge(store, key, work_of(plan)))
            self._direct[key.id] += 1
        try:
            yield allowed
        finally:
            self._direct[key.id] -= 1

    def _require_place(self, store: Store, key: Key) -> None:
        if key.max_jobs is None:
            return
        active = store.active(key.id) + self._direct[key.id]
        if active >= key.max_jobs:
            told = f"{active} of its generations wait or run, and it may have {key.max_jobs}"
            raise OverLimit(f"key {key.id}", told, _RETRY_SECONDS)

    def _charge(self, store: Store, key: Key, work: int) -> None:
        self._require_place(store, key)
        quota = key.pixel_steps_per_day
        if quota is None:
            return
        if work > quota:
            told = f"this takes {work} pixels x steps, and the key may have {quota} a day"
            raise PermissionDenied(f"key {key.id}: {told}")
        day, seconds = divmod(time.time(), _DAY)
        used = store.used(key.id, int(day))
        if used + work > quota:
            told = f"this takes {work} pixels x steps, and of its {quota} a day (UTC) {quota - used} are left"
            raise OverLimit(f"key {key.id}", told, _DAY - seconds)
        store.charge(key.id, int(day), work)
