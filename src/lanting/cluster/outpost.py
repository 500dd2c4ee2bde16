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
from typing import Any

from lanting.cluster.parcels import Parcel, fresh_folder, reported, unpacked
from lanting.serve.staff import THREADS
from lanting.serve.worker import Bench, work


class Outpost:
    """One worker."""

    def __init__(self) -> None:
        self.folder = fresh_folder("worker")
        self.words: asyncio.Queue[Parcel] = asyncio.Queue()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.bench = Bench(None, self.say, 0)

    async def open(self, opening: str, threads: int) -> dict[str, str]:
        """Begin to open the engine, with so many threads (0: this one's part of the machine); where that is."""
        from lanting import __version__

        self.loop = asyncio.get_running_loop()
        order, node = json.loads(opening), here()
        os.environ[THREADS] = str(threads or node["threads"])  # Ray has set it to 1 where nobody did
        self.bench.every = order["every"]
        threading.Thread(target=self.run, args=(order,), daemon=True).start()
        return {"host": socket.gethostname(), "node": node["id"], "version": __version__}

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


def here() -> dict[str, Any]:
    """This machine as the cluster knows it: its id, and the threads there are for each of its GPUs."""
    import ray

    id_ = ray.get_runtime_context().get_node_id()
    has = next((node["Resources"] for node in ray.nodes() if node["NodeID"] == id_), {})
    return {"id": id_, "threads": max(int(has.get("CPU", 1) // max(has.get("GPU", 1), 1)), 1)}
