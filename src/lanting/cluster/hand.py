"""The server's side of a worker in a Ray cluster: the same few words as to a process of its own (`serve.hand`).

Room is reserved first, and the worker started where it is: so it is known whether a worker waits for the cluster, which
may take days and is no error, or is being started. The room stays reserved where a worker dies, and Ray finds other
room where its machine does; one that can't open its model gives it back. What Ray does at once is called on the event
loop; whatever may block is in threads. One task listens as long as the worker lives, so a death is heard of also while
nothing is drawn.

A machine that is gone is told apart from a worker that died: the first is nobody's fault, the second may be the
drawing's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lanting.cluster.parcels import OVER, Blobs, packed
from lanting.core.files import replace_file
from lanting.core.lang import explain
from lanting.serve.errors import ClusterError, words_of
from lanting.serve.files import Files, adopt
from lanting.serve.hand import DEAD, Hand
from lanting.serve.settings import Settings
from lanting.serve.staff import Post

SOON = 1.0  # seconds within which a cluster that has room has reserved it
LOOK, LONGEST_LOOK = 0.3, 3.0  # seconds between looks whether there is room
TIDY = 0.5  # seconds that a worker has to drop its files
FIND_OUT = 2.0  # seconds within which a cluster knows that a process died
logger = logging.getLogger("lanting.serve")


@dataclass(frozen=True, slots=True)
class Needs:
    """What one worker takes of a machine. `threads`: 0 for as many as belong to its GPUs."""

    cpus: int
    gpus: int = 0
    threads: int = 0

    @property
    def bundle(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)} | ({"GPU": float(self.gpus)} if self.gpus else {})


class RayHand(Hand):
    """One worker, wherever the cluster has room for it."""

    def __init__(self, settings: Settings, post: Post, needs: Needs) -> None:
        super().__init__(settings, post)
        self.needs, self.files = needs, Files(settings.data)
        self.said: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()
        self.group: Any = None  # the reserved room
        self.stale: Any = None  # what was reserved on a machine that is gone
        self.actor: Any = None
        self.ears: asyncio.Task[None] | None = None
        self.where: Mapping[str, str] = {}  # host, node
        self.results: dict[str, tuple[Path, Path]] = {}  # job -> its folder of results, its checkpoint

    @property
    def alive(self) -> bool:
        return self.ears is not None and not self.ears.done()

    # ---------------------------------------------------------------- come and go
    async def start(self) -> Mapping[str, Any]:
        await self.leave(self.stale)
        self.told, self.stale, self.said = {}, None, asyncio.Queue()
        try:
            self.group = self.group or await asyncio.to_thread(reserve, self.needs)
            self.actor = await asyncio.to_thread(hire, self.group, self.needs)
            how = (json.dumps(self.opening), self.needs.bundle, self.needs.threads)
            first = await asyncio.to_thread(self.actor.open.remote, *how)
            self.where = await self.placed(first)
            check_version(self.where)
        except Exception as error:  # Ray's own, of which there are many
            said = {"is": "dead", **refusal(error)}
        else:
            self.ears = asyncio.create_task(self.listen(self.actor))
            said = {**await self.hear(), "where": self.where["host"]}
        if said["is"] == "ready":
            self.told = said
        else:
            await self.close()
        return said

    async def placed(self, first: Any) -> Mapping[str, str]:
        """Wait until the cluster has room and the worker answers from there."""
        began, look, answer = time.monotonic(), LOOK, asyncio.wrap_future(first.future())
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to hear it
        try:
            while not (await asyncio.wait({answer}, timeout=look))[0]:
                look = min(look * 2, LONGEST_LOOK)  # it is only to be told: the answer comes by itself
                there = await asyncio.to_thread(reserved, self.group)
                if not there and not self.waits and time.monotonic() - began > SOON:
                    self.refused = None
                    extra = {"model": self.post.served.name, "worker": self.post.number, "needs": self.needs.bundle}
                    logger.info("worker waits for the cluster", extra=extra)
                self.waits = not there and (self.waits or time.monotonic() - began > SOON)
            return answer.result()
        finally:
            self.waits = False

    def kill(self) -> None:
        """Ray is told in a thread; that the worker is gone is heard."""
        if self.actor is not None:
            asyncio.get_running_loop().run_in_executor(None, dismiss, self.actor, None)

    async def close(self, patience: float = 2.0) -> None:
        group, self.group = self.group or self.stale, None
        await self.leave(group, patience)

    async def leave(self, group: Any = None, patience: float = 2.0) -> None:
        """Send the worker away, and give room back."""
        actor, ears, there = self.actor, self.ears, self.alive
        self.actor = self.ears = None
        self.results.clear()
        if actor is not None or group is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(dismiss, actor, group, there), patience)
        if ears is not None:  # it ends with the worker
            await asyncio.wait({ears}, timeout=patience)
            ears.cancel()

    # ---------------------------------------------------------------- talk
    async def send(self, order: Mapping[str, Any]) -> None:
        actor = self.actor
        if actor is None:
            return
        if order["do"] == "draw":
            self.results[order["job"]] = (Path(order["results"]), Path(order["checkpoint"]))
        try:
            parcel = await asyncio.to_thread(packed, order)
        except OSError as error:
            self.said.put_nowait(unwritten(order["job"], error))
            return
        with suppress(Exception):  # it may have died: `hear` tells
            await asyncio.to_thread(actor.put.remote, parcel)

    async def hear(self) -> Mapping[str, Any]:
        if self.said.empty() and not self.alive:
            return DEAD
        return await self.said.get()

    async def listen(self, actor: Any) -> None:
        """Until the worker is gone: its words to who hears them, its files to the server's folder."""
        try:
            while True:
                for line, blobs in await actor.hear.remote():
                    said = await asyncio.to_thread(self.take_in, json.loads(line), blobs)
                    if said is not None:
                        self.said.put_nowait(said)
                    if said is not None and said["is"] == "dead":
                        await asyncio.to_thread(dismiss, actor, None)
                        return
        except Exception as error:  # Ray's own
            lost = await machine_lost(actor, self.where.get("node", ""))
            if self.actor is actor:  # nobody sent it away
                extra = {"model": self.post.served.name, "worker": self.post.number, "where": self.where.get("host")}
                logger.info("worker gone", extra={**extra, "reason": reason_of(error), "machine lost": lost or None})
            if lost:  # Ray may take its room for reserved some time still
                self.stale, self.group = self.group, None
            self.said.put_nowait({**DEAD, "lost": lost})

    def take_in(self, said: Mapping[str, Any], blobs: Blobs) -> Mapping[str, Any] | None:
        """Write what came along; what is to be told then. In a thread."""
        job = said.get("job", "")
        results, checkpoint = (self.results.pop if said["is"] in OVER else self.results.get)(job, (None, None))
        if said["is"] == "dead":  # its thread ended; the process is of no use
            logger.error("worker failed", extra={"model": self.post.served.name, "trace": said["trace"]})
        elif said["is"] in (*OVER, "checkpoint") and (results is None or checkpoint is None):
            return None  # of nobody's
        elif said["is"] == "checkpoint" and checkpoint is not None:
            try:
                replace_file(checkpoint, lambda part: part.write_bytes(blobs["checkpoint"]))
            except OSError as error:  # a disk that is full must not end a drawing that goes well
                logger.warning("no checkpoint could be written", extra={"job": said["job"], "reason": str(error)})
                return None
        elif said["is"] == "done" and results is not None:
            try:
                adopt(blobs, results)
            except (OSError, ValueError) as error:
                return unwritten(said["job"], error)
        return said


# -------------------------------------------------------------------- what Ray is asked; all of it may block
def reserve(needs: Needs) -> Any:
    """Room on one machine, now or when there is some."""
    from ray.util.placement_group import placement_group

    return placement_group([needs.bundle])


def hire(group: Any, needs: Needs) -> Any:
    """A worker in reserved room."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from lanting.cluster.outpost import Outpost

    there = PlacementGroupSchedulingStrategy(group)
    how = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "scheduling_strategy": there, "max_restarts": 0}
    return ray.remote(Outpost).options(**how).remote()


def reserved(group: Any) -> bool:
    from ray.util.placement_group import placement_group_table

    return placement_group_table(group).get("state") == "CREATED"


def dismiss(actor: Any, group: Any, there: bool = False) -> None:
    """End a worker and give its room back, whether they are still there or not; one that surely is tidies up first."""
    import ray
    from ray.util.placement_group import remove_placement_group

    with suppress(Exception):
        if actor is not None and there:
            ray.wait([actor.tidy.remote()], timeout=TIDY)
    with suppress(Exception):
        if actor is not None:
            ray.kill(actor)
    with suppress(Exception):
        if group is not None:
            remove_placement_group(group)


async def machine_lost(actor: Any, node: str) -> bool:
    """Whether a worker is gone because its machine is, or can't be reached. A connection that breaks says neither: of a
    process that died the cluster knows in a moment, of a machine only after some time, for which no job should wait."""
    import ray
    from ray.exceptions import ActorUnavailableError

    until = time.monotonic() + FIND_OUT
    while time.monotonic() < until:
        try:
            await asyncio.wait_for(asyncio.wrap_future(actor.ping.remote().future()), FIND_OUT)
            return True  # it lives, and what it said meanwhile is lost
        except (ActorUnavailableError, TimeoutError):
            await asyncio.sleep(LOOK)
        except Exception:
            with suppress(Exception):
                return not any(one["NodeID"] == node and one["Alive"] for one in await asyncio.to_thread(ray.nodes))
            return False
    return True


# -------------------------------------------------------------------- words
def unwritten(job: str, error: Exception) -> Mapping[str, Any]:
    """A job whose files could not be read or written here, as a worker would say it."""
    told = {"is": "failed", "job": job, "sentence": None, "code": 1, "kind": type(error).__name__}
    return {**told, "trace": str(error), "disk": isinstance(error, OSError)}


def check_version(there: Mapping[str, str]) -> None:
    """Pictures are promised to be the same wherever they are drawn."""
    from lanting import __version__

    if there["version"] != __version__:
        raise ClusterError(
            "{host} has lanting {theirs} and the server {ours}: install the same version on all machines",
            **{"host": there["host"], "theirs": there["version"], "ours": __version__},
        )


def refusal(error: Exception) -> dict[str, Any]:
    if not isinstance(error, ClusterError):
        error = ClusterError(
            "no worker could be started in the cluster: {reason}; its machines need lanting, and the same versions of "
            "Python and Ray as the server",
            reason=reason_of(error),
        )
    return {"sentence": explain(error), "words": words_of(error)}


def reason_of(error: Exception) -> str:
    """The line of Ray's long messages that says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in reversed(lines) if "Error: " in line), lines[0])[:300]
