"""Jobs in SQLite. Every method is one transaction, on the disk when it returns; for one thread at a time."""

import fcntl
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_gateway.jobs.files import PictureFiles
from imagemesh_gateway.jobs.record import NewJob, Record, State, Waiting
from imagemesh_runtime.errors import FailedPrecondition

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  key TEXT,
  digest BLOB NOT NULL,
  request BLOB NOT NULL,
  summary BLOB NOT NULL,
  state TEXT NOT NULL,
  fence INTEGER NOT NULL DEFAULT 0,
  failures INTEGER NOT NULL DEFAULT 0,
  created REAL NOT NULL,
  due REAL NOT NULL,
  not_before REAL NOT NULL DEFAULT 0,
  deadline REAL,
  retention REAL NOT NULL,
  started REAL,
  finished REAL,
  expires REAL,
  error_code INTEGER NOT NULL DEFAULT 0,
  error_message TEXT NOT NULL DEFAULT '',
  result BLOB,
  tenant TEXT NOT NULL DEFAULT '',
  owner TEXT NOT NULL DEFAULT '',
  model TEXT NOT NULL DEFAULT '',
  amount REAL NOT NULL DEFAULT 0,
  trace TEXT NOT NULL DEFAULT '',
  UNIQUE (tenant, key)
) STRICT;
CREATE INDEX IF NOT EXISTS jobs_by_turn ON jobs (state, due, seq);
CREATE INDEX IF NOT EXISTS jobs_by_expiry ON jobs (expires);
CREATE TABLE IF NOT EXISTS usage (owner TEXT PRIMARY KEY, day INTEGER NOT NULL, used INTEGER NOT NULL) STRICT;
"""
_VERSION = 3
# Version 1 knew no tenants; of a table's constraints SQLite changes none.
_FROM_1 = """
ALTER TABLE jobs RENAME TO jobs_1;
DROP INDEX jobs_by_turn;
DROP INDEX jobs_by_expiry;
"""
_MOVE_1 = """
INSERT INTO jobs SELECT *, '', '', '', 0, '' FROM jobs_1;
DROP TABLE jobs_1;
"""
# Version 2 knew neither what there is to sample, nor traces.
_FROM_2 = """
ALTER TABLE jobs ADD COLUMN model TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN amount REAL NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN trace TEXT NOT NULL DEFAULT '';
"""
_FIELDS = (
    "seq, id, state, fence, failures, digest, summary, created, due, started, finished, deadline, expires, "
    "error_code, error_message, result, tenant, trace"
)


@dataclass(frozen=True)
class _End:
    """How a job ended."""

    state: State
    at: float
    error_code: int = 0
    error_message: str = ""
    result: bytes | None = None


class Store:
    """A folder with a database and pictures; one process at a time has it.

    Raises:
        FailedPrecondition: the folder can't be written, another process has it, or a later version made it.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = (folder / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FailedPrecondition(f"jobs_folder {folder} is in use by another gateway") from error
        except OSError as error:
            raise FailedPrecondition(f"jobs_folder {folder} can't be used: {error.strerror}") from error
        self._files = PictureFiles(folder / "pictures")
        self._db = sqlite3.connect(folder / "jobs.sqlite", isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._migrate(folder)
        self._recover()

    def close(self) -> None:
        """Let go of the folder."""
        self._db.close()
        self._lock.close()

    def add(self, job: NewJob) -> tuple[Record, bool]:
        """The job that has this key already, and True; or the new job, and False."""
        cursor = self._db.execute(
            "INSERT INTO jobs (id, key, digest, request, summary, state, created, due, deadline, retention, tenant, "
            "owner, model, amount, trace) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (tenant, key) DO NOTHING",
            (
                job.id, job.key, job.digest, job.request, job.summary, State.QUEUED,
                job.created, job.due, job.deadline, job.retention, job.tenant, job.owner,
                job.model, job.amount, job.trace,
            ),
        )  # fmt: skip
        existed = cursor.rowcount == 0
        row = self.find_key(job.key, job.tenant) if existed and job.key is not None else self._one("id = ?", job.id)
        assert row is not None
        return row, existed

    def find_key(self, key: str, tenant: str) -> Record | None:
        """The tenant's job with this idempotency key."""
        return self._one("tenant = ? AND key = ?", tenant, key)

    def get(self, job: str) -> Record | None:
        """How the job stands."""
        return self._one("id = ?", job)

    def request(self, job: str) -> bytes:
        """The whole request, serialised."""
        row = self._db.execute("SELECT request FROM jobs WHERE id = ?", (job,)).fetchone()
        request: bytes = row[0]
        return request

    def queued(self) -> int:
        """How many wait."""
        count: int = self._db.execute("SELECT count(*) FROM jobs WHERE state = ?", (State.QUEUED,)).fetchone()[0]
        return count

    def active(self, owner: str) -> int:
        """How many of a key's jobs wait or run."""
        count: int = self._db.execute(
            "SELECT count(*) FROM jobs WHERE state IN (?, ?) AND owner = ?", (State.QUEUED, State.RUNNING, owner)
        ).fetchone()[0]
        return count

    def used(self, owner: str, day: int) -> int:
        """What has been charged to a key on that day."""
        row = self._db.execute("SELECT used FROM usage WHERE owner = ? AND day = ?", (owner, day)).fetchone()
        return 0 if row is None else int(row[0])

    def charge(self, owner: str, day: int, amount: int) -> None:
        """Charge more to a key on that day; what was charged on others is forgotten."""
        self._db.execute(
            "INSERT INTO usage VALUES (?1, ?2, ?3) ON CONFLICT (owner) DO UPDATE SET "
            "used = ?3 + iif(day = ?2, used, 0), day = ?2",
            (owner, day, amount),
        )

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is called in the block is one transaction; an exception undoes it."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite itself may have undone it, where the disk is full
                self._db.execute("ROLLBACK")
            raise

    def waiting(self) -> list[Waiting]:
        """What waits, model by model."""
        rows = self._db.execute(
            "SELECT model, count(*), sum(amount) FROM jobs WHERE state = ? GROUP BY model", (State.QUEUED,)
        )
        return [Waiting(*row) for row in rows]

    def position(self, record: Record) -> int:
        """How many go before a queued job."""
        count: int = self._db.execute(
            "SELECT count(*) FROM jobs WHERE state = ? AND (due, seq) < (?, ?)", (State.QUEUED, record.due, record.seq)
        ).fetchone()[0]
        return count

    def page(self, states: Sequence[State], before: int | None, limit: int, tenant: str | None = None) -> list[Record]:
        """Jobs in these states (none given: in any), the newest first, from below the ``seq`` that is given; of that
        tenant, or of all."""
        where, values = ["true"], list[Any]()
        if states:
            where.append(f"state IN ({', '.join('?' * len(states))})")
            values += states
        if before is not None:
            where.append("seq < ?")
            values.append(before)
        if tenant is not None:
            where.append("tenant = ?")
            values.append(tenant)
        rows = self._db.execute(
            f"SELECT {_FIELDS} FROM jobs WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?",  # noqa: S608
            (*values, limit),
        )
        return [_record(row) for row in rows]

    def claim(self, now: float) -> Record | None:
        """Begin an attempt at the job whose turn it is; None: none may begin now."""
        row = self._db.execute(
            "UPDATE jobs SET state = ?, fence = fence + 1, started = ? WHERE seq = "  # noqa: S608
            "(SELECT seq FROM jobs WHERE state = ? AND not_before <= ? ORDER BY due, seq LIMIT 1) "
            f"RETURNING {_FIELDS}",
            (State.RUNNING, now, State.QUEUED, now),
        ).fetchone()
        return None if row is None else _record(row)

    def next_event(self) -> float | None:
        """When a queued job may begin, or its deadline passes, or a finished one expires; whichever is first."""
        row = self._db.execute(
            "SELECT min(at) FROM (SELECT min(not_before) AS at FROM jobs WHERE state = ?1 "
            "UNION ALL SELECT min(deadline) FROM jobs WHERE state = ?1 UNION ALL SELECT min(expires) FROM jobs)",
            (State.QUEUED,),
        ).fetchone()
        at: float | None = row[0]
        return at

    def succeed(self, job: str, fence: int, result: pb.GenerateResult, now: float) -> bool:
        """Commit an attempt's result and its pictures; False: the job is no longer this attempt's."""
        held = self._one("id = ? AND state = ? AND fence = ?", job, State.RUNNING, fence)
        if held is None:
            return False
        self._files.write(job, fence, [image.png for image in result.images])
        light = pb.GenerateResult()
        light.CopyFrom(result)
        for image in light.images:
            image.ClearField("png")
        return self._finish(job, fence, _End(State.SUCCEEDED, now, result=light.SerializeToString()))

    def fail(self, job: str, fence: int, code: int, message: str, now: float) -> bool:
        """End an attempt and its job with an error; False: the job is no longer this attempt's."""
        return self._finish(job, fence, _End(State.FAILED, now, code, message))

    def cancel(self, job: str, now: float) -> bool:
        """Cancel it; False: it is finished."""
        return self._finish(job, None, _End(State.CANCELLED, now))

    def put_back(self, job: str, fence: int, not_before: float, failed: bool) -> bool:
        """End an attempt, for another one later; False: the job is no longer this attempt's."""
        cursor = self._db.execute(
            "UPDATE jobs SET state = ?, not_before = ?, failures = failures + ? "
            "WHERE id = ? AND state = ? AND fence = ?",
            (State.QUEUED, not_before, int(failed), job, State.RUNNING, fence),
        )
        return cursor.rowcount == 1

    def put_back_strays(self, running: Collection[str], not_before: float) -> list[str]:
        """Put back the running jobs whose attempt is not among these: it could not even write its end."""
        rows = self._db.execute("SELECT id, fence FROM jobs WHERE state = ?", (State.RUNNING,)).fetchall()
        strays = [(job, fence) for job, fence in rows if job not in running]
        return [job for job, fence in strays if self.put_back(job, fence, not_before, failed=True)]

    def expire_waiting(self, now: float, code: int, message: str) -> list[str]:
        """Fail the queued jobs whose deadline has passed."""
        rows = self._db.execute(
            "UPDATE jobs SET state = ?, finished = ?, expires = ? + retention, error_code = ?, error_message = ? "
            "WHERE state = ? AND deadline <= ? RETURNING id",
            (State.FAILED, now, now, code, message, State.QUEUED, now),
        )
        return [row[0] for row in rows.fetchall()]

    def forget(self, now: float) -> list[str]:
        """Delete what has been kept long enough."""
        rows = self._db.execute("DELETE FROM jobs WHERE expires <= ? RETURNING id", (now,)).fetchall()
        for (job,) in rows:
            self._files.delete(job)
        return [row[0] for row in rows]

    def result(self, record: Record, pictures: bool = True) -> pb.GenerateResult:
        """The result of a job that succeeded, with its pictures or without."""
        result = pb.GenerateResult.FromString(record.result or b"")
        if not pictures:
            return result
        files = self._files.read(record.id, record.fence, len(result.images))
        for image, png in zip(result.images, files, strict=True):
            image.png = png
        return result

    def _finish(self, job: str, fence: int | None, end: "_End") -> bool:
        """End a running attempt, or, where no fence is given, the job however it stands; False: it has ended."""
        cursor = self._db.execute(
            "UPDATE jobs SET state = ?, finished = ?, expires = ? + retention, error_code = ?, error_message = ?, "
            "result = ? WHERE id = ? AND (state = ? AND fence = ? OR state IN (?, ?) AND ? IS NULL)",
            (
                end.state, end.at, end.at, end.error_code, end.error_message, end.result,
                job, State.RUNNING, fence, State.QUEUED, State.RUNNING, fence,
            ),
        )  # fmt: skip
        return cursor.rowcount == 1

    def _migrate(self, folder: Path) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > _VERSION:
            self.close()
            raise FailedPrecondition(f"jobs_folder {folder} was made by a later version of imagemesh")
        before, after = {1: (_FROM_1, _MOVE_1), 2: (_FROM_2, "")}.get(version, ("", ""))
        self._db.executescript(f"BEGIN IMMEDIATE;{before}{_SCHEMA}{after}PRAGMA user_version = {_VERSION};COMMIT;")

    def _recover(self) -> None:
        """What ran when the last process ended waits again; files that nobody committed go."""
        self._db.execute(
            "UPDATE jobs SET state = ? WHERE state = ?", (State.QUEUED, State.RUNNING)
        )  # fmt: skip
        rows = self._db.execute("SELECT id, fence FROM jobs WHERE state = ?", (State.SUCCEEDED,))
        self._files.keep_only((job, fence) for job, fence in rows)

    def _one(self, condition: str, *values: Any) -> Record | None:
        row = self._db.execute(f"SELECT {_FIELDS} FROM jobs WHERE {condition}", values).fetchone()  # noqa: S608
        return None if row is None else _record(row)


def _record(row: tuple[Any, ...]) -> Record:
    seq, job, state, *rest = row
    return Record(seq, job, State(state), *rest)
