"""What a key has used up, and what the store knows of tenants."""

import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.access import admission
from imagemesh_gateway.access.admission import Admission, work_of
from imagemesh_gateway.access.caller import ANYBODY, Caller, set_current_caller
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.direct import Direct
from imagemesh_gateway.jobs.record import NewJob, State
from imagemesh_gateway.jobs.store import Store
from imagemesh_gateway.jobs.store_thread import StoreThread
from imagemesh_gateway.looks import KeepPlan, LookPlan
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.modes import HiresPlan
from imagemesh_gateway.plan import Plan
from imagemesh_runtime.errors import OverLimit, PermissionDenied
from imagemesh_runtime.metrics import Metrics
from tests.support.keys import new_key

PLAN = Plan(
    id="p", model="m", prompt="", negative_prompt="", width=64, height=32, steps=10, guidance_scale=1, scheduler="",
    own_scheduler="", clip_skip=0, seeds=(1, 2), controls=(),
)  # fmt: skip
WORK = 64 * 32 * 10 * 2
JOB = NewJob(
    id="a0", key=None, digest=b"d", request=b"", summary=b"", created=1.0, due=1.0, deadline=None, retention=10.0
)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoreThread]:
    store = StoreThread()
    await store.open(tmp_path)
    yield store
    await store.close()
    set_current_caller(ANYBODY)


def call_with(**limits: Any) -> Caller:
    caller = Caller(new_key(**limits)[0])
    set_current_caller(caller)
    return caller


def job(caller: Caller, number: int) -> NewJob:
    return replace(JOB, id=f"{caller.id}{number}", tenant=caller.tenant, owner=caller.id)


def test_the_work_of_both_passes_and_all_pictures_counts() -> None:
    assert work_of(PLAN) == WORK
    hires = HiresPlan(width=128, height=64, upscaler="Latent", steps=5, strength=0.5, scheduler="")
    assert work_of(replace(PLAN, hires=hires)) == WORK + 128 * 64 * 5 * 2
    keep = LookPlan(classifier="vit", keep=KeepPlan("cat", 1, 0.0, retries=3))
    assert work_of(replace(PLAN, look=keep)) == 4 * WORK


async def test_a_days_work_is_used_up_by_jobs_and_by_calls_and_outlives_the_gateway(
    store: StoreThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [86400.0 * 100 + 86000]
    monkeypatch.setattr(admission.time, "time", lambda: now[0])
    caller = call_with(pixel_steps_per_day=2 * WORK)
    await Admission(store).accept(job(caller, 0), PLAN)
    async with Admission(store).direct(PLAN):
        pass
    await store.close()
    again = StoreThread()
    await again.open(tmp_path)
    with pytest.raises(OverLimit, match=f"takes {WORK} pixels x steps.* 0 are left; retry after 400.0 s"):
        await Admission(again).accept(job(caller, 1), PLAN)
    with pytest.raises(OverLimit):
        async with Admission(again).direct(PLAN):
            pytest.fail("it was let through")
    assert await again(lambda store: store.get(job(caller, 1).id)) is None
    now[0] += 400
    await Admission(again).accept(job(caller, 1), PLAN)
    await again.close()


async def test_what_no_day_has_room_for_is_refused_for_good(store: StoreThread) -> None:
    caller = call_with(pixel_steps_per_day=WORK - 1)
    with pytest.raises(PermissionDenied, match=f"takes {WORK} .* may have {WORK - 1} a day"):
        await Admission(store).accept(job(caller, 0), PLAN)


async def test_jobs_and_calls_count_together_until_they_end(store: StoreThread) -> None:
    admission, caller = Admission(store), call_with(max_jobs=2)
    await admission.accept(job(caller, 0), PLAN)
    async with admission.direct(PLAN):
        with pytest.raises(OverLimit, match="2 of its generations wait or run, and it may have 2"):
            await admission.accept(job(caller, 1), PLAN)
        with pytest.raises(OverLimit):
            async with admission.direct(PLAN):
                pytest.fail("it was let through")
    await admission.accept(job(caller, 1), PLAN)
    assert await store(lambda store: store.cancel(job(caller, 0).id, 2.0))
    async with admission.direct(PLAN):
        pass
    other = call_with(max_jobs=1)
    await admission.accept(job(other, 0), PLAN)


async def test_who_has_nothing_left_is_refused_before_a_plan_is_made(
    store: StoreThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_plan(request: pb.GenerateRequest, mesh: Any) -> Plan:
        pytest.fail("a plan was made")

    monkeypatch.setattr("imagemesh_gateway.direct.make_plan", no_plan)
    admission, mesh = Admission(store), Mesh(GatewayConfig(), metrics := Metrics("gateway"))
    direct = Direct(mesh, admission, metrics)
    caller = call_with(max_jobs=1)
    await admission.check()
    mine = replace(job(caller, 0), key="k")
    await admission.accept(mine, PLAN)
    await admission.check("k")
    with pytest.raises(OverLimit, match="1 of its generations wait or run"):
        await direct.result(pb.GenerateRequest())
    call_with(pixel_steps_per_day=WORK)
    async with admission.direct(PLAN):
        pass
    with pytest.raises(OverLimit, match=f"of its {WORK} pixels x steps a day .* 0 are left"):
        await direct.result(pb.GenerateRequest())
    await mesh.close()


async def test_the_same_job_again_is_charged_once(store: StoreThread) -> None:
    admission, caller = Admission(store), call_with(pixel_steps_per_day=WORK, max_jobs=1)
    first = replace(job(caller, 0), key="k")
    assert await admission.accept(first, PLAN) == (await store(lambda store: store.get(first.id)), False)
    record, existed = await admission.accept(replace(first, id="other"), PLAN)
    assert (record.id, existed) == (first.id, True)


async def test_two_tenants_may_have_the_same_idempotency_key(store: StoreThread) -> None:
    one, two = replace(JOB, key="k", tenant="a"), replace(JOB, id="a1", key="k", tenant="b")
    for new in (one, two):
        record, existed = await store(lambda store, new=new: store.add(new))
        assert (record.id, record.tenant, existed) == (new.id, new.tenant, False)
    assert [record.id for record in await store(lambda store: store.page([], None, 9, "b"))] == ["a1"]
    assert len(await store(lambda store: store.page([], None, 9))) == 2


def test_a_store_from_before_there_were_tenants_is_taken_over(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "jobs.sqlite")
    old.executescript(
        "CREATE TABLE jobs (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, key TEXT UNIQUE, "
        "digest BLOB NOT NULL, request BLOB NOT NULL, summary BLOB NOT NULL, state TEXT NOT NULL, fence INTEGER NOT "
        "NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL, due REAL NOT NULL, not_before "
        "REAL NOT NULL DEFAULT 0, deadline REAL, retention REAL NOT NULL, started REAL, finished REAL, expires REAL, "
        "error_code INTEGER NOT NULL DEFAULT 0, error_message TEXT NOT NULL DEFAULT '', result BLOB) STRICT;"
        "CREATE INDEX jobs_by_turn ON jobs (state, due, seq); CREATE INDEX jobs_by_expiry ON jobs (expires);"
        "INSERT INTO jobs (seq, id, key, digest, request, summary, state, created, due, retention) "
        "VALUES (7, 'a0', 'k', x'64', x'', x'', 'queued', 1, 1, 10); PRAGMA user_version = 1;"
    )
    old.close()
    for _ in range(2):
        store = Store(tmp_path)
        known = store.find_key("k", "")
        assert known is not None
        assert (known.seq, known.id, known.state, known.tenant, known.digest) == (7, "a0", State.QUEUED, "", b"d")
        store.close()
    store = Store(tmp_path)
    record, _ = store.add(replace(JOB, id="a1", key="k", tenant="b"))
    assert record.seq > 7
    store.close()
