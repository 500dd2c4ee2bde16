"""SQLite behind two threads: one writes, one reads. What was written when `write` returns survives a power cut.

A commit waits for the disk (5 ms and more), so all that is asked while one is under way shares the next: 500 clients
that submit at once cost a few commits. Steps of running jobs may wait a moment longer (`later`). Rejected: a
connection per request (writers queue on SQLite's lock, in no order), and an asynchronous driver, which is a thread
too.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lanting.serve.errors import StoreError

T = TypeVar("T")
Act = Callable[[sqlite3.Connection], T]
VERSION = 1
TOGETHER = 500  # acts that share a commit
BUSY = 5.0  # seconds that a database which another program writes is waited for
LAZY = 0.25  # seconds an act that nobody waits for may wait for company
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, model TEXT NOT NULL, dialect TEXT NOT NULL, state TEXT NOT NULL,
  priority INTEGER NOT NULL, created REAL NOT NULL, started REAL, ended REAL, cost REAL NOT NULL, timeout REAL NOT NULL,
  crashes INTEGER NOT NULL DEFAULT 0, prompt TEXT NOT NULL, asked TEXT NOT NULL, outcome TEXT, error TEXT);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state);
CREATE INDEX IF NOT EXISTS jobs_by_owner ON jobs (owner, created);
CREATE TABLE IF NOT EXISTS events (
  job TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (job, seq))
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS once (
  owner TEXT NOT NULL, word TEXT NOT NULL, digest TEXT NOT NULL, job TEXT NOT NULL, PRIMARY KEY (owner, word))
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS keys (
  id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, salt BLOB NOT NULL, hash BLOB NOT NULL, share REAL NOT NULL,
  top INTEGER NOT NULL, created REAL NOT NULL, revoked REAL);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


def connect(path: Path, reading: bool = False) -> sqlite3.Connection:
    """A connection in WAL mode, every commit on the disk before it returns. Raises StoreError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY)
        db.row_factory = sqlite3.Row
        if reading:
            db.execute("PRAGMA query_only = ON")
            return db
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.executescript(SCHEMA)
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found > VERSION:
            raise StoreError("{path} was written by a newer lanting: update this one, or use another --data", path=path)
        db.execute(f"PRAGMA user_version = {VERSION}")
        path.chmod(0o600)
        return db
    except (sqlite3.Error, OSError) as error:
        raise StoreError(
            "the queue in {path} can't be opened: {reason}; choose another folder with --data", path=path, reason=error
        ) from None


@dataclass(slots=True)
class Task:
    """An act on its way. Without a future nobody waits for it."""

    act: Act[Any]
    future: Future[Any] | None


class Ledger:
    """The database, for one event loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db, self._reader = connect(path), connect(path, reading=True)
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._reads: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._write_on, name="ledger-writes", daemon=True),
            threading.Thread(target=self._read_on, name="ledger-reads", daemon=True),
        ]
        self.lost = 0  # acts that nobody waited for and that failed
        for thread in self._threads:
            thread.start()

    def at_once(self, act: Act[T]) -> T:
        """Write before there is an event loop."""
        future: Future[T] = Future()
        self._tasks.put(Task(act, future))
        return future.result()

    async def write(self, act: Act[T]) -> T:
        """What `act` returns, when it is on the disk. Raises StoreError, or what `act` raised; then it left nothing."""
        return await self._ask(self._tasks, act)

    async def read(self, act: Act[T]) -> T:
        """What `act` returns; it sees every write that has returned."""
        return await self._ask(self._reads, act)

    def later(self, act: Act[Any]) -> None:
        """Write with the next commit, or within a moment; before anything that is written after."""
        self._tasks.put(Task(act, None))

    async def close(self) -> None:
        """Write what is waiting and let go."""
        self._tasks.put(None)
        self._reads.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._db.close()
        self._reader.close()

    async def _ask(self, tasks: queue.SimpleQueue[Task | None], act: Act[T]) -> T:
        future: Future[T] = Future()
        tasks.put(Task(act, future))
        # shielded: a client that leaves must not undo what is being written for it
        return await asyncio.shield(asyncio.wrap_future(future))

    def _read_on(self) -> None:
        while (task := self._reads.get()) is not None:
            assert task.future is not None
            try:
                settle(task.future, task.act(self._reader))
            except Exception as error:
                settle(task.future, error=explained(error))

    def _write_on(self) -> None:
        open_ = True
        while open_:
            tasks, open_ = self._gather()
            if tasks:
                self._commit(tasks)

    def _gather(self) -> tuple[list[Task], bool]:
        """What is to be committed together, and whether more will come."""
        tasks: list[Task] = []
        patience: float | None = None  # for ever, for the first
        until = 0.0
        while len(tasks) < TOGETHER:
            try:
                task = self._tasks.get(timeout=patience) if patience != 0 else self._tasks.get_nowait()
            except queue.Empty:
                break
            if task is None:
                return tasks, False
            tasks.append(task)
            until = until or time.monotonic() + LAZY
            waited_for = patience == 0 or task.future is not None
            patience = 0 if waited_for else max(until - time.monotonic(), 0)
        return tasks, True

    def _commit(self, tasks: list[Task]) -> None:
        results: list[tuple[Task, Any, Exception | None]] = []
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for task in tasks:
                results.append((task, *self._one(task)))
            self._db.execute("COMMIT")
        except Exception as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            results = [(task, None, explained(error)) for task in tasks]
        for task, value, error in results:
            if task.future is not None:
                settle(task.future, value, error)
            elif error is not None:
                self.lost += 1

    def _one(self, task: Task) -> tuple[Any, Exception | None]:
        """The act's result or its error, undone alone. A database that can't be written fails all of them."""
        self._db.execute("SAVEPOINT one")
        try:
            value, error = task.act(self._db), None
            self._db.execute("RELEASE one")
        except sqlite3.OperationalError:
            raise
        except Exception as failure:
            self._db.execute("ROLLBACK TO one")
            self._db.execute("RELEASE one")
            value, error = None, explained(failure)
        return value, error


def settle(future: Future[Any], value: Any = None, error: Exception | None = None) -> None:
    """Give a future its result, unless nobody wants it any more."""
    if future.set_running_or_notify_cancel():
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)


def explained(error: Exception) -> Exception:
    """SQLite's complaint about the disk as a sentence; anything else as it is."""
    if isinstance(error, sqlite3.Error):
        failure = StoreError("nothing can be written or read just now: the server's disk is full, locked or failing")
        failure.__cause__ = error
        return failure
    return error
