"""The store of jobs: who may begin, who may finish, and what is left on the disk."""

import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.jobs.record import NewJob, State, Waiting
from imagemesh_gateway.jobs.service import folder_of
from imagemesh_gateway.jobs.store import Store
from imagemesh_runtime.errors import FailedPrecondition

JOB = NewJob(
    id="a0", key=None, digest=b"d", request=b"", summary=b"", created=1.0, due=1.0, deadline=None, retention=10.0
)


def result(picture: bytes = b"png") -> pb.GenerateResult:
    return pb.GenerateResult(id="a0", images=[pb.GeneratedImage(png=picture, seed=3)])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "pictures").iterdir())


def test_an_attempt_that_lost_its_job_commits_nothing(store: Store, tmp_path: Path) -> None:
    store.add(JOB)
    first = store.claim(2.0)
    assert first is not None
    assert store.put_back("a0", first.fence, 0.0, failed=False)
    second = store.claim(3.0)
    assert second is not None
    assert not store.succeed("a0", first.fence, result(b"old"), 4.0)
    assert not store.fail("a0", first.fence, 13, "old", 4.0)
    assert not store.put_back("a0", first.fence, 0.0, failed=False)
    assert store.succeed("a0", second.fence, result(b"new"), 5.0)
    assert not store.succeed("a0", second.fence, result(b"again"), 6.0)
    done = store.get("a0")
    assert done is not None
    assert (done.state, done.finished, done.expires) == (State.SUCCEEDED, 5.0, 15.0)
    assert store.result(done).images[0].png == b"new"
    assert pictures(tmp_path) == ["a0.2.0.png"]


def test_cancelled_or_finished_whichever_is_first(store: Store, tmp_path: Path) -> None:
    for job in ("a0", "a1"):
        store.add(replace(JOB, id=job))
    first, second = store.claim(2.0), store.claim(2.0)
    assert first is not None
    assert second is not None
    assert store.cancel("a0", 3.0)
    assert not store.succeed("a0", first.fence, result(), 4.0)
    assert store.succeed("a1", second.fence, result(), 4.0)
    assert not store.cancel("a1", 5.0)
    assert pictures(tmp_path) == ["a1.1.0.png"]


def test_what_ran_when_the_process_ended_waits_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(JOB)
    store.claim(2.0)
    store.close()
    (tmp_path / "pictures" / "a0.1.0.png").write_bytes(b"not committed")
    (tmp_path / "pictures" / "a0.1.1.part").write_bytes(b"half")
    store = Store(tmp_path)
    again = store.claim(3.0)
    assert again is not None
    assert again.fence == 2
    assert pictures(tmp_path) == []
    store.close()


def test_one_process_has_the_folder(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="in use by another gateway"):
        Store(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match="file/jobs can't be used"):
        Store(tmp_path / "file" / "jobs")


def test_what_waits_is_told_model_by_model(store: Store) -> None:
    assert store.waiting() == []
    for i, (model, amount) in enumerate([("a", 1.5), ("b", 4.0), ("a", 2.0)]):
        store.add(replace(JOB, id=f"a{i}", due=float(i), model=model, amount=amount))
    assert store.waiting() == [Waiting("a", 2, 3.5), Waiting("b", 1, 4.0)]
    store.claim(2.0)
    assert store.waiting() == [Waiting("a", 1, 2.0), Waiting("b", 1, 4.0)]


@pytest.mark.parametrize("fails", ["when it is committed", "and is undone by SQLite itself"])
def test_a_transaction_that_fails_leaves_the_store_fit_for_the_next(store: Store, fails: str) -> None:
    store._db.execute("PRAGMA foreign_keys = ON")
    store._db.execute("CREATE TABLE children (parent REFERENCES jobs (id) DEFERRABLE INITIALLY DEFERRED, n CHECK (n))")
    values = ("nobody", fails == "when it is committed")

    def write() -> None:
        with store.together():
            store.add(JOB)
            store._db.execute("INSERT OR ROLLBACK INTO children VALUES (?, ?)", values)

    with pytest.raises(sqlite3.IntegrityError):
        write()
    assert store.get(JOB.id) is None
    with store.together():
        store.add(JOB)
    assert store.get(JOB.id) is not None


def test_an_earlier_versions_store_is_taken_over_with_its_jobs(store: Store, tmp_path: Path) -> None:
    store.add(JOB)
    for column in ("model", "amount", "trace"):
        store._db.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
    store._db.execute("PRAGMA user_version = 2")
    store.close()
    later = Store(tmp_path)
    try:
        assert later.waiting() == [Waiting("", 1, 0.0)]
        later.add(replace(JOB, id="a1", model="m", amount=2.0))
        assert later.waiting() == [Waiting("", 1, 0.0), Waiting("m", 1, 2.0)]
    finally:
        later.close()


def test_a_later_versions_store_is_left_alone(store: Store, tmp_path: Path) -> None:
    store._db.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(FailedPrecondition, match="later version"):
        Store(tmp_path)
    store = Store(tmp_path / "fresh")
    store.close()


def test_an_expired_job_goes_with_its_pictures(store: Store, tmp_path: Path) -> None:
    store.add(JOB)
    claimed = store.claim(2.0)
    assert claimed is not None
    store.succeed("a0", claimed.fence, result(), 5.0)
    assert store.forget(14.9) == []
    assert store.next_event() == 15.0
    assert store.forget(15.0) == ["a0"]
    assert store.get("a0") is None
    assert pictures(tmp_path) == []


def test_a_stray_waits_again(store: Store) -> None:
    store.add(JOB)
    store.claim(2.0)
    assert store.put_back_strays({"a0"}, 9.0) == []
    assert store.put_back_strays(set(), 9.0) == ["a0"]
    assert store.claim(8.0) is None
    assert store.claim(9.0) is not None


def test_a_gateway_finds_its_folder_again() -> None:
    def folder(**settings: str) -> Path | None:
        return folder_of(GatewayConfig(**settings), {"XDG_STATE_HOME": "/state"})  # type: ignore[arg-type]

    assert folder() == Path("/state/imagemesh/jobs/127.0.0.1-50050")
    assert folder(listen="unix:/run/mesh/gateway.sock") == Path("/state/imagemesh/jobs/unix-run-mesh-gateway.sock")
    assert folder(listen="127.0.0.1:0") is None
    assert folder(listen="127.0.0.1:0", jobs_folder="/data/jobs") == Path("/data/jobs")


class Life(RuleBasedStateMachine):
    """Any order of claims, ends, cancels and restarts: a job is finished once, and its pictures are of that attempt."""

    @initialize(folder=st.builds(lambda: None))
    def begin(self, folder: None) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.store = Store(self.path)
        self.count = 0
        self.attempts: list[tuple[str, int]] = []
        self.finished: dict[str, tuple[State, int]] = {}

    @rule()
    def add(self) -> None:
        self.store.add(replace(JOB, id=f"{self.count:x}", created=time.time()))
        self.count += 1

    @rule()
    def claim(self) -> None:
        if (record := self.store.claim(time.time())) is not None:
            assert record.id not in self.finished
            self.attempts.append((record.id, record.fence))

    @rule(pick=st.integers(0, 20), how=st.sampled_from(["succeed", "fail", "put back", "cancel"]))
    def end(self, pick: int, how: str) -> None:
        if not self.attempts:
            return
        job, fence = self.attempts[pick % len(self.attempts)]
        now = time.time()
        if how == "put back":
            done, state = self.store.put_back(job, fence, 0.0, failed=False), None
            assert not (done and job in self.finished)
            return
        if how == "succeed":
            done, state = self.store.succeed(job, fence, result(f"{job}/{fence}".encode()), now), State.SUCCEEDED
        elif how == "fail":
            done, state = self.store.fail(job, fence, 13, "", now), State.FAILED
        else:
            done, state = self.store.cancel(job, now), State.CANCELLED
        if done:
            assert job not in self.finished
            self.finished[job] = (state, fence)

    @rule()
    def crash(self) -> None:
        self.store.close()
        self.store = Store(self.path)

    @invariant()
    def what_is_finished_stays_so(self) -> None:
        for job, (state, fence) in getattr(self, "finished", {}).items():
            record = self.store.get(job)
            assert record is not None
            assert record.state is state
            if state is State.SUCCEEDED:
                assert self.store.result(record).images[0].png == f"{job}/{fence}".encode()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
