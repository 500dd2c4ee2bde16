"""A hundred `kill -9`s at random moments of a server under load, and the troubles of `serve_troubles.py`: what was
accepted, how it ended, what was lost.

    python benchmarks/serve_faults.py --kills 100            # all; as root, who may mount a small disk
    python benchmarks/serve_faults.py --only "disk full"

Clients submit all the time, the server is killed 0.05 to 1 second after it answers, and started again over the same
folder; in every third round its worker is killed first. At the end the ledger, the logs and the folders are compared
with what the clients were told. Written, each trouble beside the others: benchmarks/results/serve-faults.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "serve")]

from fakeserve import Server, running, start  # noqa: E402
from test_faults import Clients  # noqa: E402

from serve_troubles import HOW, TROUBLES, settled  # noqa: E402

WRITTEN = ROOT / "benchmarks" / "results" / "serve-faults.json"


def kill_workers(server: Server) -> None:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGKILL)


def kills(folder: Path, count: int, crowd: int) -> dict[str, Any]:
    """The server, and now and then its worker before it."""
    chance, clients = random.Random(7), Clients(crowd)
    for number in range(count):
        server = start(folder, **HOW)
        clients.url = server.url
        if number == 0:
            for thread in clients.threads:
                thread.start()
        time.sleep(chance.uniform(0.05, 1.0))
        if number % 3 == 2:
            kill_workers(server)
            time.sleep(chance.uniform(0.0, 0.2))
        server.kill()
    clients.stop = True
    for thread in clients.threads:
        thread.join()
    with running(folder, **HOW):
        result = settled(folder, clients.accepted, 600)
    left = len(list((folder / "data" / "checkpoints").iterdir()))
    return {"kills": count, "of those, after its worker": count // 3, **result, "checkpoints left": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--only", choices=["kills", *TROUBLES])
    told = parser.parse_args()
    todo: dict[str, Callable[[Path], dict[str, Any]]] = {
        **TROUBLES,
        "kills": lambda folder: kills(folder, told.kills, told.clients),
    }
    for name in [told.only] if told.only else todo:
        began = time.time()
        with tempfile.TemporaryDirectory() as folder:
            result = todo[name](Path(folder))
        result |= {"seconds": round(time.time() - began), "machine": f"{os.cpu_count()} cores, {platform.machine()}"}
        print(json.dumps({name: result}, indent=1), flush=True)
        written = json.loads(WRITTEN.read_text(encoding="utf-8")) if WRITTEN.exists() else {}
        WRITTEN.write_text(json.dumps(written | {name: result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
