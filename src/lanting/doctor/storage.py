"""Models on the disk: room for more, downloads that stopped, files that are damaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lanting.doctor.finding import Finding, advice, fine, problem, remark

WANTED = "qwen-image-2512"


@dataclass(frozen=True, slots=True)
class Disk:
    """Where models are kept: bytes `free` there, whether it can be written, and the bytes that WANTED would take (0
    where it is here). `folder` need not exist; `above` is the first folder that does."""

    folder: Path
    above: Path
    free: int
    writable: bool
    needs: int = 0


@dataclass(frozen=True, slots=True)
class Begun:
    """A download that stopped: bytes here, of bytes in all (0: not known)."""

    name: str
    have: int
    total: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """A model on this machine. `broken`: what is wrong with its files, "" for nothing; `pulled`: by lanting."""

    name: str
    path: Path
    broken: str = ""
    pulled: bool = True


def disk(found: Disk) -> Iterator[Finding]:
    from lanting.plan.words import size

    values = {"folder": found.folder, "free": size(found.free)}
    if not found.writable:
        other = advice(
            "name another folder: export LANTING_HOME=/path/to/folder (or make {above} yours)", above=found.above
        )
        yield problem("models go to {folder}, where nothing can be written", "disk", other, **values)
    elif found.free < found.needs:
        other = advice("make room, or name a folder on a larger disk: export LANTING_HOME=/path/to/folder")
        yield remark(
            "models go to {folder}: {free} free, and {model} takes {needs}", "disk", other,
            **values | {"model": WANTED, "needs": size(found.needs)},
        )  # fmt: skip
    else:
        yield fine("models go to {folder}: {free} free", "disk", **values)


def downloads(found: Sequence[Begun]) -> Iterator[Finding]:
    from lanting.plan.words import size

    for begun in found:
        values = {"name": begun.name, "have": size(begun.have), "total": size(begun.total)}
        choice = advice("go on: lanting pull {name}; or delete it: lanting remove {name}", name=begun.name)
        if begun.total:
            yield remark("{name} is here in part, {have} of {total}", "downloads", choice, **values)
        else:
            yield remark("{name} is here in part, {have}", "downloads", choice, **values)


def models(found: Sequence[Held]) -> Iterator[Finding]:
    sound = [held.name for held in found if not held.broken]
    if sound:
        yield fine("models here: {names}", "models", names=", ".join(sound), count=len(sound))
    for held in found:
        if not held.broken:
            continue
        values = {"name": held.name, "path": held.path, "reason": held.broken}
        if held.pulled:
            mend = advice("fetch what is damaged again: lanting pull {name} --check", name=held.name)
        else:
            mend = advice("fetch it anew where it came from, or look closer: lanting show {path}", path=held.path)
        yield problem("{name} in {path} is damaged: {reason}", "models", mend, **values)
