"""Carry a plan out: download, check every file, and only then let the folder look like a model.

Everything arrives in a staging folder under the names of its digests, so a partial file of one revision is never
continued with another's bytes, and a file that two revisions share is fetched once. When all of it is there and
right, the files move to their places, model_index.json last, and `lanting.json` is written. The download is a
generator; closing it stops, and what has arrived stays for the next pull.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

from lanting.core.errors import ModelError
from lanting.weights.fetch import WAITS, StoppedError, fetch
from lanting.weights.home import MARKER, STAGING, Marker, inside, note_begun, read_marker, write_marker
from lanting.weights.hub import Listing, RemoteFile, explain
from lanting.weights.pull import Job, PullPlan, check_space, digest, is_marked, part_path, staged_name

LAST = "model_index.json"  # what makes a folder look like a model
WORKERS = 4


@dataclass(frozen=True, slots=True)
class PullProgress:
    """How far a pull is: bytes here of bytes in all, bytes per second lately, seconds left (None: unknown)."""

    done: int
    total: int
    rate: float
    seconds_left: float | None


def download(
    plan: PullPlan, workers: int = WORKERS, waits: tuple[float, ...] = WAITS, every: float = 0.2
) -> Iterator[PullProgress]:
    """Carry a plan out, yielding progress every `every` seconds and once at the end. Raises ModelError."""
    check_space(plan)
    meter = Meter(plan.total - plan.left, plan.total)
    for job in plan.jobs:
        if job.missing or not is_marked(job):
            try:
                yield from _carry_out(job, meter, workers, waits, every)
            except OSError as error:
                raise _unwritable(job.folder, error) from None
    yield meter.read()


class Meter:
    """Bytes counted from many threads, with the rate of the last ten seconds."""

    def __init__(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self.lock = Lock()
        self.marks = deque([(time.monotonic(), done)], maxlen=512)

    def tick(self, count: int) -> None:
        with self.lock:
            self.done += count

    def read(self) -> PullProgress:
        now = time.monotonic()
        while len(self.marks) > 1 and now - self.marks[0][0] > 10:
            self.marks.popleft()
        then, before = self.marks[0]
        self.marks.append((now, self.done))
        rate = max(self.done - before, 0) / max(now - then, 1e-3)
        left = (self.total - self.done) / rate if rate > 0 else None
        return PullProgress(self.done, self.total, rate, left)


def _carry_out(job: Job, meter: Meter, workers: int, waits: tuple[float, ...], every: float) -> Iterator[PullProgress]:
    from filelock import FileLock, Timeout

    staging = job.folder / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    lock = FileLock(staging / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ModelError("another pull into {folder} is under way: wait for it", folder=str(job.folder)) from None
    files = {staged_name(file): file for file in job.missing}  # twins are fetched once
    note_begun(job.folder, {file.path: (file.size, staged_name(file)) for file in job.missing}, job.total)
    stop, pool = Event(), ThreadPoolExecutor(workers)
    try:
        largest_first = sorted(files.values(), key=lambda file: -file.size)
        pending = {pool.submit(_get, job.listing, file, staging, meter, stop, waits) for file in largest_first}
        while pending:
            finished, pending = wait(pending, timeout=every, return_when=FIRST_EXCEPTION)
            for future in finished:
                _raise(future, job.listing)
            yield meter.read()
        _install(job, staging)
        shutil.rmtree(staging, ignore_errors=True)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        lock.release()
        with suppress(OSError):  # Windows kept the lock, and with it the folder that holds nothing else by now
            staging.rmdir()


def _raise(future: Future[None], listing: Listing) -> None:
    """A worker's error as one for people; an error of our own disk goes on as it is."""
    error = future.exception()
    if error is None:
        return
    ours = isinstance(error, OSError) and not isinstance(error, ConnectionError) and not hasattr(error, "response")
    if ours or isinstance(error, ModelError | StoppedError) or not isinstance(error, Exception):
        raise error
    raise explain(error, listing.source, listing.repo, listing.revision) from None


def _get(
    listing: Listing, file: RemoteFile, staging: Path, meter: Meter, stop: Event, waits: tuple[float, ...]
) -> None:
    """Fetch one file and check it. A wrong one that was continued from an earlier run gets a second chance."""
    done, part = staging / staged_name(file), part_path(staging, file)
    if done.is_file() and done.stat().st_size == file.size:
        return
    continued = part.is_file() and part.stat().st_size > 0
    for _ in range(2 if continued else 1):
        fetch(listing.address(file), part, file.size, listing.headers, meter.tick, stop, waits)
        if digest(part, file) == file.digest:
            os.replace(part, done)
            return
        part.unlink()
        meter.tick(-file.size)
    raise ModelError(
        "{file} arrived with other contents than {source} promises (its {kind} differs): it was deleted; "
        "pull again, or name a mirror with --endpoint",
        **{"file": file.path, "source": listing.source, "kind": "sha256" if len(file.digest) == 64 else "sha1"},
    )


def _install(job: Job, staging: Path) -> None:
    """Everything is staged and right: put it in place so that a crash on the way leaves no half model."""
    folder, listing = job.folder, job.listing
    old = read_marker(folder)
    index = next((file for file in listing.files if file.path == LAST), None)
    moving = list(job.missing)
    if moving:
        (folder / MARKER).unlink(missing_ok=True)
    if moving and index is not None:
        if index in moving:
            (folder / LAST).unlink(missing_ok=True)  # an older one
        else:
            os.replace(folder / LAST, staging / staged_name(index))
            moving.append(index)
    keys = [staged_name(file) for file in moving]
    for file in sorted(moving, key=lambda file: file.path == LAST):
        target = inside(folder, file.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        keys.remove(staged_name(file))
        move = shutil.copyfile if staged_name(file) in keys else os.replace  # another file may have the same contents
        move(staging / staged_name(file), target)
    files = {file.path: {"size": file.size, "digest": file.digest} for file in listing.files}
    before = old.files if old is not None and old.repo == listing.repo else {}
    if index is None:
        files = {**before, **files}  # a collection of LoRAs grows file by file
    write_marker(folder, Marker(listing.repo, listing.revision, listing.commit, listing.source, files))
    for name in set(before) - set(files):
        inside(folder, name).unlink(missing_ok=True)  # of the revision before


def _unwritable(folder: Path, error: OSError) -> ModelError:
    return ModelError(
        "{folder} can't be written ({reason}): what has arrived is kept; make room or choose another place with --to",
        **{"folder": str(folder), "reason": error.strerror or str(error)},
    )
