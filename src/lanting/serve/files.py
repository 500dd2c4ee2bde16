"""Pictures and checkpoints on disk: whole under their own name, or not there.

    pictures/SHA256.png     what clients sent, bounded, upright, without metadata; named by their pixels
    results/JOB/            0.png, 1.png, ... and outcome.json; the folder gets its name when all are on the disk
    checkpoints/JOB         the latents of a job that is being drawn

A folder of results is a finished job, whatever the ledger says: a server that was killed between the two adopts it,
so no picture is drawn twice. Names are ids or hashes, never anything a client wrote.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lanting.core.errors import OutputError
from lanting.core.files import replace_file, replacing, sync
from lanting.core.recipe import to_json
from lanting.core.save import save_picture
from lanting.core.types import Result
from lanting.serve.errors import StoreError

if TYPE_CHECKING:
    from PIL.Image import Image

ID = re.compile(r"[0-9a-f]{24}")
OUTCOME = "outcome.json"
ROOM = 4 << 20  # bytes that a picture may need


@dataclass(frozen=True, slots=True)
class Files:
    """The server's folder."""

    root: Path

    def prepare(self) -> None:
        """Make the folders, drop what a killed server left half-written. Raises OutputError."""
        try:
            for folder in (self.root, self.pictures, self.results, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in (self.pictures, self.results, self.checkpoints):
                for left in folder.glob(".*"):
                    shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                "nothing can be written to {folder}: {reason}; choose another place with --data",
                **{"folder": self.root, "reason": error.strerror or error},
            ) from None

    @property
    def pictures(self) -> Path:
        return self.root / "pictures"

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def picture(self, sha256: str) -> Path:
        """An input picture."""
        return self.pictures / f"{sha256}.png"

    def result(self, job: str, index: int) -> Path:
        return self.results / job / f"{index}.png"

    def checkpoint(self, job: str) -> Path:
        return self.checkpoints / job

    def keep_picture(self, image: Image, sha256: str) -> None:
        """Write an input picture, unless it is there. Raises StoreError."""
        path = self.picture(sha256)
        try:
            with suppress(FileNotFoundError):
                os.utime(path)  # it is wanted again: not to be forgotten with what is old
                return
            replace_file(path, lambda part: image.save(part, format="PNG", compress_level=1), wait=True)
            sync(self.pictures)
        except OSError as error:
            raise StoreError(
                "nothing can be written or read just now: the server's disk is full, locked or failing"
            ) from error

    def writable(self) -> bool:
        """Whether a picture finds room, by trying: a disk that is full may still take a line of the ledger."""
        try:
            with replacing(self.checkpoints / "room", wait=True) as part:
                part.write_bytes(bytes(ROOM))
            (self.checkpoints / "room").unlink()
        except OSError:
            return False
        return True

    def outcome(self, job: str) -> dict[str, Any] | None:
        """What a finished job left, or None."""
        try:
            return json.loads((self.results / job / OUTCOME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def keep_checkpoints(self, jobs: Collection[str]) -> None:
        """Of these jobs and no others: a server killed at the end of a job leaves that job's behind."""
        for path in self.checkpoints.iterdir():
            if path.name not in jobs:
                path.unlink(missing_ok=True)

    def forget(self, jobs: Sequence[str]) -> None:
        """Everything of these jobs."""
        for job in jobs:
            shutil.rmtree(self.results / job, ignore_errors=True)
            self.checkpoint(job).unlink(missing_ok=True)

    def forget_pictures(self, older: float, but: Collection[str] = ()) -> None:
        """Input pictures that nobody sent since `older` (seconds since 1970), `but` those of these hashes."""
        for path in self.pictures.glob("*.png"):
            with suppress(OSError):
                if path.stat().st_mtime < older and path.stem not in but:
                    path.unlink()

    def free(self) -> int:
        """Bytes left on the disk; 0 where it can't be asked."""
        try:
            return shutil.disk_usage(self.root).free
        except OSError:
            return 0


def publish(result: Result, target: Path, wait: bool = True) -> dict[str, Any]:
    """Write a result as the folder `target`, all of it or nothing; its outcome. One that is there stays.

    wait  until it is on the disk, where it is to outlive the machine's power
    """
    with whole(target, wait) as part:
        for index, (image, recipe) in enumerate(zip(result.images, result.recipes, strict=True)):
            save_picture(image, part / f"{index}.png", recipe)
        outcome = describe(result)
        (part / OUTCOME).write_text(json.dumps(outcome, ensure_ascii=False), encoding="utf-8")
    return outcome


def adopt(files: Mapping[str, bytes], target: Path) -> None:
    """Write what `publish` wrote elsewhere as the folder `target`, all of it or nothing. Raises OSError, ValueError
    where it is not a whole result."""
    count = len(json.loads(files[OUTCOME])["images"]) if OUTCOME in files else -1
    if set(files) != {OUTCOME, *(f"{index}.png" for index in range(count))}:
        raise ValueError("a worker's result is not whole")
    with whole(target) as part:
        for name, data in files.items():
            (part / name).write_bytes(data)


@contextmanager
def whole(target: Path, wait: bool = True) -> Generator[Path]:
    """A folder to fill beside `target`, which gets its name when the block ends well. One that is there stays."""
    part = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    part.mkdir(mode=0o700)
    try:
        yield part
        for path in (*part.iterdir(), part) if wait else ():
            sync(path)
        if not (target / OUTCOME).exists():
            os.rename(part, target)
            if wait:
                sync(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def describe(result: Result) -> dict[str, Any]:
    """A result as plain values: sizes and what is read, recipes, seconds."""
    images: list[dict[str, Any]] = [{"size": list(image.size), "mode": image.mode} for image in result.images]
    for image, reading in zip(images, result.readings, strict=bool(result.readings)):
        image["text"] = reading.as_json()
    return {
        "images": images,
        "recipes": [json.loads(to_json(recipe)) for recipe in result.recipes],
        "seconds": {name: round(spent, 4) for name, spent in result.seconds.items()},
    }


def day(days: float) -> float:
    """That many days ago, in seconds since 1970."""
    return time.time() - days * 86_400
