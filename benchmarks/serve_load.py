"""Many clients at once against one server: what a submission costs, what is lost, how fair and how steady it is.

    python benchmarks/serve_load.py --clients 500 --seconds 120              # an engine that draws nothing, quickly
    python benchmarks/serve_load.py --clients 50 --seconds 120 --nano

Every client submits a job, waits for it over server-sent events, and begins again. The clients speak HTTP over plain
sockets in one process, so that they take less of the machine than the server; both share it all the same. Written:
benchmarks/results/serve-load-NAME.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "serve")]

from fakeserve import Server, running, wait_for  # noqa: E402


def machine() -> str:
    """What a measurement ran on, and what else did."""
    return f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}"


@dataclass
class Seen:
    """What the clients met."""

    submits: list[float] = field(default_factory=list)  # seconds of a submission, after the first of each client
    first: list[float] = field(default_factory=list)  # of all clients' first ones, which come at once
    waits: list[float] = field(default_factory=list)  # accepted to done
    statuses: Counter[int] = field(default_factory=Counter)
    accepted: list[str] = field(default_factory=list)
    broken: int = 0  # connections that failed
    memory: list[int] = field(default_factory=list)  # KB of the server, once a second


async def ask(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """One request on a connection of its own, read to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    try:
        data = await reader.read(-1)
    finally:
        writer.close()
    top, _, rest = data.partition(b"\r\n\r\n")
    return int(top.split(b" ", 2)[1]), rest


async def client(number: int, port: int, until: float, seen: Seen) -> None:
    """Submit, wait, again."""
    turn = 0
    while time.monotonic() < until:
        body = json.dumps({"prompt": f"a sign {number}", "seed": turn % 7}).encode()
        began = time.perf_counter()
        try:
            status, answer = await ask(port, "POST", "/api/jobs", body)
        except (OSError, IndexError, asyncio.IncompleteReadError):
            seen.broken += 1
            await asyncio.sleep(0.1)
            continue
        (seen.submits if turn else seen.first).append(time.perf_counter() - began)
        seen.statuses[status] += 1
        turn += 1
        if status != 202:
            await asyncio.sleep(0.5)
            continue
        job = json.loads(answer)["id"]
        seen.accepted.append(job)
        try:
            _, events = await ask(port, "GET", f"/api/jobs/{job}/events?previews=false")
        except (OSError, IndexError):
            seen.broken += 1
            continue
        if b"event: done" in events:
            seen.waits.append(time.perf_counter() - began)


async def watch(process: int, until: float, seen: Seen) -> None:
    while time.monotonic() < until:
        seen.memory.append(rss(process))
        await asyncio.sleep(1)


def rss(process: int) -> int:
    """KB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    return 0


async def run(server: Server, clients: int, seconds: float) -> Seen:
    seen, until = Seen(), time.monotonic() + seconds
    crowd = [client(number, server.port, until, seen) for number in range(clients)]
    await asyncio.gather(watch(server.process.pid, until, seen), *crowd)
    return seen


def spread(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(values) or [0.0]
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: round(ordered[min(int(len(ordered) * share), len(ordered) - 1)] * 1000, 1) for name, share in at.items()
    }


def report(server: Server, seen: Seen, how: dict[str, Any]) -> dict[str, Any]:
    """After all clients have left: every accepted job has ended, once."""
    wait_for(lambda: not server.get("/api/models").json()["waiting"], 300, 0.5)
    states = Counter(server.ended(job, 60)["state"] for job in seen.accepted)
    median = statistics.median(seen.waits)
    return {
        **how,
        "machine": machine(),
        "submissions": sum(seen.statuses.values()),
        "statuses": dict(seen.statuses),
        "5xx": sum(count for status, count in seen.statuses.items() if status >= 500),
        "broken connections": seen.broken,
        "accepted": len(seen.accepted),
        "ended": dict(states),
        "lost": len(seen.accepted) - sum(states.values()),
        "submit ms": spread(seen.submits),
        "submit ms, all clients at once": spread(seen.first),
        "wait s": {
            "median": round(median, 2),
            "max": round(max(seen.waits), 2),
            "max/median": round(max(seen.waits) / median, 2),
        },
        "server MB": {"first": seen.memory[1] // 1024, "middle": seen.memory[len(seen.memory) // 2] // 1024}
        | {"last": seen.memory[-1] // 1024},
        "jobs a second": round(len(seen.waits) / how["seconds"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--nano", action="store_true")
    told = parser.parse_args()
    opener = "lanting.serve.worker:open_engine" if told.nano else "fakeserve:open_engine"
    options: dict[str, Any] = {"device": "cpu"} if told.nano else {"pace": 0.001}
    with tempfile.TemporaryDirectory() as folder:
        caps = {"waiting": 10_000}
        with running(Path(folder), opener=opener, options=options, caps=caps) as server:
            wait_for(lambda: server.get("/readyz").status_code == 200, 60, 0.1)
            seen = asyncio.run(run(server, told.clients, told.seconds))
            how = {"clients": told.clients, "seconds": told.seconds, "engine": "nano" if told.nano else "fake"}
            result = report(server, seen, how)
    print(json.dumps(result, indent=1))
    path = ROOT / "benchmarks" / "results" / f"serve-load-{result['engine']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
