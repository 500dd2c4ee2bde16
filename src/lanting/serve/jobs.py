"""A job: what was asked, by whom, where it stands. And its rows in the ledger, each change one function.

A job is accepted when its row is on the disk, and it ends in one transaction that records state, outcome and last
event together; an ended job never changes again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
ENDED = (DONE, FAILED, CANCELLED)
LEVELS = {"low": -1, "normal": 0, "high": 1}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `share` of the engine's time against other keys; jobs of at most priority `top`."""

    id: str
    name: str
    share: float = 1.0
    top: int = 1


LOCAL = Caller("local", "this computer")


@dataclass(frozen=True, slots=True)
class Job:
    """One accepted request. Times are seconds since 1970."""

    id: str
    owner: str
    model: str
    dialect: str
    state: str
    priority: int
    created: float
    cost: float  # in units of `pace.units`
    timeout: float
    asked: Mapping[str, Any]  # {"request": as core.recipe.describe_request, "lora": {name: strength} or None}
    started: float | None = None
    ended: float | None = None
    crashes: int = 0
    outcome: Mapping[str, Any] | None = None  # {"images": [{"size"}], "recipes": [...], "seconds": {...}}
    error: Mapping[str, Any] | None = None  # {"code", "message", "words"}

    @property
    def over(self) -> bool:
        return self.state in ENDED

    @property
    def prompt(self) -> str:
        words = self.asked["request"]["prompt"]
        return words if isinstance(words, str) else "\n".join(words)


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a job's log. `seq` rises, also over restarts: milliseconds since 1970, or one more than the last.

    kinds: accepted, place, started, resumed, phase, step, notice, checkpoint, interrupted, done, failed, cancelled
    """

    job: str
    seq: int
    kind: str
    body: Mapping[str, Any] = field(default_factory=dict[str, Any])
    preview: bytes | None = None  # a small JPEG; never in the ledger

    @property
    def last(self) -> bool:
        return self.kind in ENDED

    @property
    def at(self) -> float:
        return self.seq / 1000


COLUMNS = "id, owner, model, dialect, state, priority, created, started, ended, cost, timeout, crashes, asked, outcome"
COLUMNS += ", error"


def job_of(row: sqlite3.Row) -> Job:
    values = dict(zip(row.keys(), row, strict=True))
    for name in ("asked", "outcome", "error"):
        values[name] = None if values[name] is None else json.loads(values[name])
    return Job(**values)


def insert(db: sqlite3.Connection, job: Job, event: Event, once: tuple[str, str] | None) -> str:
    """Accept a job, or find the one that was accepted under the same idempotency key; the id of either.

    once  (key, digest). Raises KeyError where the key stands for something else.
    """
    if once is not None:
        found = db.execute("SELECT digest, job FROM once WHERE owner = ? AND word = ?", (job.owner, once[0])).fetchone()
        if found is not None:
            if found["digest"] != once[1]:
                raise KeyError(once[0])
            return str(found["job"])
        db.execute("INSERT INTO once VALUES (?, ?, ?, ?)", (job.owner, *once, job.id))
    db.execute(
        "INSERT INTO jobs (id, owner, model, dialect, state, priority, created, cost, timeout, prompt, asked)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(job.id, job.owner, job.model, job.dialect, job.state, job.priority, job.created, job.cost, job.timeout),
            *(job.prompt, dumps(job.asked)),
        ),
    )
    log(db, event)
    return job.id


def log(db: sqlite3.Connection, event: Event) -> None:
    db.execute("INSERT INTO events VALUES (?, ?, ?, ?)", (event.job, event.seq, event.kind, dumps(event.body)))


def begin(db: sqlite3.Connection, event: Event) -> bool:
    """A job is taken from the queue; False where it has ended meanwhile."""
    changed = db.execute(
        f"UPDATE jobs SET state = ?, started = coalesce(started, ?) WHERE id = ? AND state NOT IN {ENDED}",
        (RUNNING, event.at, event.job),
    )
    if changed.rowcount:
        log(db, event)
    return changed.rowcount > 0


def put_back(db: sqlite3.Connection, event: Event, crashed: bool) -> None:
    """A job that was interrupted waits again."""
    db.execute("UPDATE jobs SET state = ?, crashes = crashes + ? WHERE id = ?", (WAITING, int(crashed), event.job))
    log(db, event)


def end(
    db: sqlite3.Connection, event: Event, outcome: Mapping[str, Any] | None, error: Mapping[str, Any] | None
) -> bool:
    """Record how a job ended; False where it had ended already."""
    told = [None if one is None else dumps(one) for one in (outcome, error)]
    changed = db.execute(
        f"UPDATE jobs SET state = ?, ended = ?, outcome = ?, error = ? WHERE id = ? AND state NOT IN {ENDED}",
        (event.kind, event.at, *told, event.job),
    )
    if changed.rowcount:
        log(db, event)
    return changed.rowcount > 0


def find(db: sqlite3.Connection, job: str) -> Job | None:
    row = db.execute(f"SELECT {COLUMNS} FROM jobs WHERE id = ?", (job,)).fetchone()
    return None if row is None else job_of(row)


def unfinished(db: sqlite3.Connection) -> list[Job]:
    """What a server that starts has to finish, the oldest first."""
    rows = db.execute(f"SELECT {COLUMNS} FROM jobs WHERE state IN ('{WAITING}', '{RUNNING}') ORDER BY created")
    return [job_of(row) for row in rows]


def events_after(db: sqlite3.Connection, job: str, seq: int) -> list[Event]:
    rows = db.execute("SELECT seq, kind, body FROM events WHERE job = ? AND seq > ? ORDER BY seq", (job, seq))
    return [Event(job, row["seq"], row["kind"], json.loads(row["body"])) for row in rows]


def last_seq(db: sqlite3.Connection, job: str) -> int:
    return int(db.execute("SELECT coalesce(max(seq), 0) FROM events WHERE job = ?", (job,)).fetchone()[0])


@dataclass(frozen=True, slots=True)
class Search:
    """Which jobs of a history: words in the prompt, a state, a model; older than `before` (seconds since 1970)."""

    owner: str
    words: str = ""
    state: str | None = None
    model: str | None = None
    before: float | None = None
    limit: int = 50


def history(db: sqlite3.Connection, search: Search) -> list[Job]:
    """The newest first. Words are found as they are, in any case of the Latin letters."""
    where, values = ["owner = ?"], list[Any]([search.owner])
    for word in search.words.split():
        where.append("instr(lower(prompt), lower(?)) > 0")
        values.append(word)
    for column, value in (("state", search.state), ("model", search.model)):
        if value is not None:
            where.append(f"{column} = ?")
            values.append(value)
    if search.before is not None:
        where.append("created < ?")
        values.append(search.before)
    rows = db.execute(
        f"SELECT {COLUMNS} FROM jobs WHERE {' AND '.join(where)} ORDER BY created DESC, id LIMIT ?",
        (*values, search.limit),
    )
    return [job_of(row) for row in rows]


def ended_before(db: sqlite3.Connection, before: float, most: int = 200) -> list[str]:
    """The ids of up to `most` jobs that ended before."""
    rows = db.execute("SELECT id FROM jobs WHERE ended < ? LIMIT ?", (before, most)).fetchall()
    return [str(row["id"]) for row in rows]


def remove(db: sqlite3.Connection, ids: Sequence[str]) -> None:
    """Jobs, their logs and their idempotency keys."""
    for job in ids:
        for table, column in (("jobs", "id"), ("events", "job"), ("once", "job")):
            db.execute(f"DELETE FROM {table} WHERE {column} = ?", (job,))


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
