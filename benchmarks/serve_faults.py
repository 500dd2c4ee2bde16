"""A hundred `kill -9`s at random moments of a server under load: what was accepted, how it ended, what was lost.

    python benchmarks/serve_faults.py --kills 100

Clients submit all the time, the server is killed 0.05 to 1 second after it answers, and started again over the same
folder; in every third round its worker is killed first. At the end the ledger, the logs and the folders are compared
with what the clients were told. Written: benchmarks/results/serve-faults.json.
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
from collections import Counter
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "serve")]

from fakeserve import Server, running, start, wait_for  # noqa: E402
from test_faults import Clients, ends_of, jobs_in  # noqa: E402


def kill_workers(server: Server) -> None:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--clients", type=int, default=4)
    told = parser.parse_args()
    chance, clients, began = random.Random(7), Clients(told.clients), time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        how = {"options": {"pace": 0.01}, "every": 2, "caps": {"waiting": 1_000_000}}
        for number in range(told.kills):
            server = start(folder, **how)
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
        with running(folder, **how):
            wait_for(lambda: not {"waiting", "running"} & set(jobs_in(folder).values()), 600, 0.5)
            states, ends = jobs_in(folder), ends_of(folder)
        folders = {path.name for path in (folder / "data" / "results").iterdir()}
        done = {job for job, state in states.items() if state == "done"}
        result = {
            "kills": told.kills,
            "of those, after its worker": told.kills // 3,
            "accepted": len(clients.accepted),
            "lost": len(set(clients.accepted) - set(states)),
            "states": dict(Counter(states.values())),
            "ended more than once": sum(count > 1 for count in ends.values()),
            "ended without a log line": len(set(states) - set(ends)),
            "done without pictures": len(done - folders),
            "pictures without a job": len(folders - done),
            "checkpoints left": len(list((folder / "data" / "checkpoints").iterdir())),
            "seconds": round(time.time() - began),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        }
    print(json.dumps(result, indent=1))
    path = ROOT / "benchmarks" / "results" / "serve-faults.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
