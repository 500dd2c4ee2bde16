"""What several workers gain, and what they lose: pictures a second with one and two, on this machine and by Ray, and
`kill -9`s of random workers, and of a whole machine, while jobs come.

    python benchmarks/serve_scale.py                      # all, ten minutes
    python benchmarks/serve_scale.py --only kills --kills 60

"nano": its usual size, one thread a worker, no steps shared; servers with one worker and with two are asked in turn, so
that what else runs on the machine meets both; the ratio of neighbours, its median, and who was first changes. "waits":
the same with an engine that waits instead of computing, as a server sees one on a GPU: what two lack of twice is what
the server and Ray cost. "kills": three workers by Ray, a random one of them killed again and again. "nodes": a second
raylet on this machine stands for a second machine: it joins a running cluster, and is killed while its worker draws. At
the end ledger and folders are compared with what clients were told. Written: benchmarks/results/serve-scale.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "serve")]

from fakeserve import HERE, Server, events, running, wait_for  # noqa: E402
from test_cluster import outposts  # noqa: E402
from test_faults import Clients, ends_of, jobs_in  # noqa: E402

from serve_load import machine  # noqa: E402

WRITTEN = ROOT / "benchmarks" / "results" / "serve-scale.json"
NANO: dict[str, Any] = {"opener": "lanting.serve.worker:open_engine", "options": {"device": "cpu"}, "batch": 1}
WAITS: dict[str, Any] = {"options": {"pace": 0.05}, "batch": 1}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


def crew(server: Server) -> dict[str, int]:
    return server.get("/api/models").json()["models"][0]["workers"]


def ready(server: Server, count: int) -> None:
    wait_for(lambda: crew(server)["ready"] >= count, 90, 0.05)


@contextmanager
def cluster(cpus: int) -> Iterator[Any]:
    """A cluster of this machine, to which nodes can be added."""
    os.environ.update(LOOPBACK, RAY_AUTH_TOKEN=secrets.token_hex(32), OMP_NUM_THREADS="1")
    os.environ["PYTHONPATH"] = f"{ROOT / 'src'}:{HERE}"
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "object_store_memory": 80 << 20})
    try:
        yield found
    finally:
        found.shutdown()


# -------------------------------------------------------------------- pictures a second
def rate(server: Server, count: int, turn: int) -> float:
    """Pictures a second of so many jobs that wait together."""
    began = time.perf_counter()
    jobs = [server.submit('a blue sign that says "HELLO"', seed=turn * 1000 + n)["id"] for n in range(count)]
    for job in jobs:
        assert server.ended(job, 120)["state"] == "done"
    return count / (time.perf_counter() - began)


def throughput(folder: Path, engine: dict[str, Any], rounds: int, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {"pictures a turn": count, "rounds": rounds}
    with ExitStack() as stack:
        address = stack.enter_context(cluster(3)).address
        servers: dict[str, Server] = {}
        for where, more in (("local", {}), ("ray", {"ray": address})):
            for workers in (1, 2):
                name = f"{where}, {workers}"
                servers[name] = stack.enter_context(running(folder / name, workers=workers, **more, **engine))
        for name, server in servers.items():
            ready(server, int(name[-1]))
            rate(server, 4, 0)  # kernels are chosen, weights are read
        rates: dict[str, list[float]] = {name: [] for name in servers}
        for turn in range(1, rounds + 1):
            for name in list(servers)[:: 1 if turn % 2 else -1]:
                rates[name].append(rate(servers[name], count, turn))
                print(turn, name, round(rates[name][-1], 2), flush=True)
    found["pictures a second"] = {name: round(median(each), 2) for name, each in rates.items()}
    pairs = {"local, 2 / 1": ("local, 2", "local, 1"), "ray, 2 / 1": ("ray, 2", "ray, 1")}
    pairs |= {"ray / local, 1": ("ray, 1", "local, 1"), "ray / local, 2": ("ray, 2", "local, 2")}
    for name, (one, other) in pairs.items():
        ratios = [a / b for a, b in zip(rates[one], rates[other], strict=True)]
        found[name] = {"median": round(median(ratios), 2), "all": [round(ratio, 2) for ratio in ratios]}
    return found


# -------------------------------------------------------------------- deaths
@contextmanager
def asked(server: Server, crowd: int) -> Iterator[list[str]]:
    """What clients that submit all the time were told was accepted."""
    clients = Clients(crowd)
    clients.url = server.url
    for thread in clients.threads:
        thread.start()
    try:
        yield clients.accepted
    finally:
        clients.stop = True
        for thread in clients.threads:
            thread.join()


def settled(folder: Path, accepted: list[str], seconds: float) -> dict[str, Any]:
    """How everything ended, once nothing waits."""
    over = ("done", "failed", "cancelled")
    wait_for(lambda: all(state in over for state in jobs_in(folder).values()), seconds, 0.2)
    states, ends = jobs_in(folder), ends_of(folder)
    drawn = {path.name for path in (folder / "data" / "results").iterdir()}
    return {
        "accepted": len(accepted),
        "ended": dict(Counter(states.values())),
        "lost": len(set(accepted) - set(ends)),
        "ended twice": sum(count != 1 for count in ends.values()),
        "done without pictures": len([job for job, state in states.items() if state == "done" and job not in drawn]),
    }


def kills(folder: Path, count: int) -> dict[str, Any]:
    """Three workers, of which a random one is killed, with a second or so between."""
    chance = random.Random(7)
    how = {"ray": "local", "cpus": 3, "workers": 3, "every": 1, "options": {"pace": 0.05}}
    killed, least = 0, 3
    with running(folder, **how, caps={"waiting": 100_000}) as server:
        ready(server, 3)
        with asked(server, 3) as accepted:
            while killed < count:
                time.sleep(chance.uniform(0.3, 1.5))
                if there := sorted(outposts(server)):
                    with suppress(ProcessLookupError):
                        os.kill(chance.choice(there), signal.SIGKILL)
                        killed += 1
                least = min(least, crew(server)["ready"])
        result = settled(folder, accepted, 600)
        ready(server, 3)
    left = len(list((folder / "data" / "checkpoints").iterdir()))
    return {"kills": killed, **result, "least workers ready": least, "checkpoints left": left}


def nodes(folder: Path, rounds: int) -> dict[str, Any]:
    """A second raylet comes and goes; the job that its worker has goes on with the other one."""
    joined, back = list[float](), list[float]()
    how = {"workers": 2, "every": 1, "options": {"pace": 0.01}, "caps": {"waiting": 100_000}}
    with cluster(1) as own, running(folder, ray=own.address, **how) as server:
        ready(server, 1)
        with asked(server, 1) as accepted:
            for _ in range(rounds):
                node, began = own.add_node(num_cpus=1, object_store_memory=80 << 20), time.monotonic()
                ready(server, 2)
                joined.append(time.monotonic() - began)
                long = [server.submit("slow", steps=60, priority="high")["id"] for _ in range(2)]
                wait_for(lambda long=long: all(steps(server, job) > 5 for job in long), 60)
                own.remove_node(node, allow_graceful=False)
                began = time.monotonic()
                wait_for(lambda: crew(server)["ready"] == 1, 60)
                back.append(time.monotonic() - began)
                for job in long:
                    kinds = [kind for kind, _, _ in events(server, job)]
                    assert kinds[-1] == "done" and kinds.count("resumed") == kinds.count("interrupted"), kinds
        result = settled(folder, accepted, 300)
    names = ("seconds until a node that joined drew", "seconds until a dead one's job was back in the line")
    return {"nodes killed": rounds, **result} | {
        name: round(median(each), 1) for name, each in zip(names, (joined, back), strict=True)
    }


def steps(server: Server, job: str) -> int:
    return server.get(f"/api/jobs/{job}").json().get("progress", {}).get("step", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("-n", type=int, default=5, help="rounds of throughput")
    parser.add_argument("--count", type=int, default=16, help="pictures of a turn")
    parser.add_argument("--only", choices=["nano", "waits", "kills", "nodes"])
    told = parser.parse_args()
    todo = {
        "nano": lambda folder: throughput(folder, NANO, told.n, told.count),
        "waits": lambda folder: throughput(folder, WAITS, told.n, told.count),
        "kills": lambda folder: kills(folder, told.kills),
        "nodes": lambda folder: nodes(folder, told.nodes),
    }
    for name in [told.only] if told.only else todo:
        began = time.time()
        with tempfile.TemporaryDirectory() as folder:
            result = todo[name](Path(folder))
        result |= {"seconds": round(time.time() - began), "machine": machine()}
        print(json.dumps({name: result}, indent=1), flush=True)
        written = json.loads(WRITTEN.read_text(encoding="utf-8")) if WRITTEN.exists() else {}
        WRITTEN.write_text(json.dumps(written | {name: result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
