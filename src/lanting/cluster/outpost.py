"""The worker at the other end, as a Ray actor: the same bench as in a process of the server's machine (`serve.worker`),
in a thread over a folder of its own. Paths become bytes here, at the edge, and nowhere else.

The drawing has a thread so that orders to stop are heard meanwhile. Ray calls the methods on one event loop. A worker
that ends for any reason ends its process, and Ray tells the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import threading
import traceback
from collections.abc import Mapping
from typing import Any

from lanting.cluster.parcels import Parcel, fresh_folder, reported, unpacked
from lanting.serve.staff import THREADS
from lanting.serve.worker import Bench, work

USABLE = 0.9  # of a machine's memory; the rest is the system's


class Outpost:
    """One worker."""

    def __init__(self) -> None:
        self.folder = fresh_folder("worker")
        self.words: asyncio.Queue[Parcel] = asyncio.Queue()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.bench = Bench(None, self.say, 0, keeps=False)

    async def open(self, opening: str, takes: Mapping[str, float], threads: int) -> dict[str, str]:
        """Begin to open the engine, which has so much of this machine, with so many threads (0: its part of them).
        Where it is."""
        from lanting import __version__

        self.loop = asyncio.get_running_loop()
        order, (node, has) = json.loads(opening), here()
        part = part_of(takes, has)
        os.environ[THREADS] = str(threads or max(int(has.get("CPU", 1) * part), 1))  # Ray's own choice is 1
        order["options"] = await asyncio.to_thread(budgeted, order["model"], order["options"], part)
        self.bench.every = order["every"]
        threading.Thread(target=self.run, args=(order,), daemon=True).start()
        return {"host": socket.gethostname(), "node": node, "version": __version__}

    async def put(self, parcel: Parcel) -> None:
        """An order."""
        try:
            self.bench.obey(await asyncio.to_thread(unpacked, parcel, self.folder))
        except OSError as error:
            job, told = json.loads(parcel[0])["job"], {"sentence": None, "code": 1, "kind": type(error).__name__}
            self.bench.send("failed", job=job, trace=traceback.format_exc(), **told)

    async def tidy(self) -> None:
        """Drop all files: it is about to be ended."""
        shutil.rmtree(self.folder, ignore_errors=True)

    async def ping(self) -> None:
        """Nothing but an answer."""

    async def hear(self) -> list[Parcel]:
        """What was said since the last time; waits until there is something."""
        said = [await self.words.get()]
        while not self.words.empty():
            said.append(self.words.get_nowait())
        return said

    def run(self, opening: dict[str, Any]) -> None:
        try:
            work(self.bench, opening)
        except BaseException:
            self.bench.send("dead", trace=traceback.format_exc())

    def say(self, line: str) -> None:
        """From any thread."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.words.put_nowait, reported(line, self.folder))


def here() -> tuple[str, Mapping[str, float]]:
    """This machine's id in the cluster, and what it has."""
    import ray

    id_ = ray.get_runtime_context().get_node_id()
    return id_, next((node["Resources"] for node in ray.nodes() if node["NodeID"] == id_), {})


def part_of(takes: Mapping[str, float], has: Mapping[str, float]) -> float:
    """Which part of a machine a worker has, by its GPUs, without any by its CPUs."""
    kind = "GPU" if takes.get("GPU") else "CPU"
    return min(takes.get(kind, 1.0) / max(has.get(kind, 1.0), 1.0), 1.0)


def budgeted(model: str, options: Mapping[str, Any], part: float) -> dict[str, Any]:
    """With its part of the main memory, where others draw beside it and nobody gave budgets. nano fits everywhere."""
    if part == 1 or model == "nano" or {"vram", "ram"} & set(options):
        return dict(options)
    from lanting.plan import detect

    machine = detect()
    budget = min(int(machine.ram * part * USABLE), machine.ram_free)
    return {**options, **({"ram": budget} if budget else {})}
