"""An attack on a server that was started from the shell over nano: what it answers, how large it grows, who gets in.

    python benchmarks/serve_attack.py --uploads 5000

Uploads of 15 kinds by every dialect, requests made by chance from the server's own OpenAPI (schemathesis, where it is
installed), and probes of DNS rebinding, CSRF, traversal and SSRF, with a port inside that counts who rings. The server
fetches addresses and has its studio, so that every door is there. Written: benchmarks/results/serve-attack.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "serve")]

from attacks import Canary, Upload, probes, ring, uploads  # noqa: E402
from fakeserve import wait_for  # noqa: E402

from serve_load import rss  # noqa: E402

AT_ONCE = 6


class Shell:
    """`lanting serve` in a process, and how much memory it and its workers take."""

    def __init__(self, folder: Path) -> None:
        words = ["serve", "--port", "0", "--data", str(folder / "data"), "--device", "cpu", "--fetch-urls"]
        self.log = folder / "server.log"
        env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "LANTING_LANG": "en"}
        how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": self.log.open("w"), "text": True, "env": env}
        self.process = subprocess.Popen([sys.executable, "-m", "lanting", *words], **how)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1].replace("localhost", "127.0.0.1")
        self.port = int(self.url.rpartition(":")[2])
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        self.client = httpx.Client(base_url=self.url, timeout=60)
        wait_for(lambda: self.client.get("/readyz").status_code == 200, 60, 0.2)
        wait_for(lambda: "gradio" in self.client.get("/en/", headers={"Accept": "text/html"}).text, 60, 0.5)
        self.memory: list[int] = []
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while self.process.poll() is None:
            self.memory.append(rss(self.process.pid) >> 10)
            time.sleep(0.1)

    def lines(self, *levels: str) -> int:
        return sum(json.loads(line)["level"] in levels for line in self.log.read_text().splitlines() if line[:1] == "{")


def uploaded(server: Shell, count: int) -> dict[str, Any]:
    """Statuses of each kind; what was an answer of 5xx in full."""
    todo: queue.SimpleQueue[Upload | None] = queue.SimpleQueue()
    seen, wrong, slowest = defaultdict[str, Counter[int]](Counter), list[str](), 0.0

    def work() -> None:
        nonlocal slowest
        with httpx.Client(base_url=server.url, timeout=120) as client:
            while (upload := todo.get()) is not None:
                began = time.perf_counter()
                answer = upload.send(client)
                slowest = max(slowest, time.perf_counter() - began)
                seen[upload.kind][answer.status_code] += 1
                if answer.status_code >= 500:
                    wrong.append(f"{upload.kind} {upload.path} {answer.status_code} {answer.text[:200]}")

    threads = [threading.Thread(target=work) for _ in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    for number, upload in enumerate(uploads(count)):
        todo.put(upload)
        while todo.qsize() > 50:
            time.sleep(0.01)
        if number % 500 == 0:
            print(f"{number} uploads, {server.memory[-1]} MB", flush=True)
    for _ in threads:
        todo.put(None)
    for thread in threads:
        thread.join()
    total = sum(seen.values(), Counter[int]())
    return {
        "sent": count,
        "statuses": dict(sorted(total.items())),
        "5xx": sum(many for status, many in total.items() if status >= 500),
        "by kind": {kind: dict(sorted(told.items())) for kind, told in sorted(seen.items())},
        "slowest answer s": round(slowest, 2),
        "answers of 5xx": wrong[:20],
    }


def probed(server: Shell) -> dict[str, Any]:
    """How many attempts of each kind were refused, and what was let in."""
    inside = [Canary()]
    try:
        inside.append(Canary(80))  # where an address without a port leads
    except OSError:
        print("nothing can listen on port 80 here: the port that counts is another")
    told, let_in, failed = defaultdict[str, Counter[str]](Counter), list[str](), 0
    for probe in probes(inside[0].port):
        status, body = ring(server.port, probe)
        refused = status in probe.refused and b"root:" not in body
        told[probe.what]["refused" if refused else "let in"] += 1
        failed += status >= 500
        if not refused:
            let_in.append(f"{probe.what}: {probe.method} {probe.path} {probe.headers} {status} {body[:80]!r}")
    return {
        **{what: dict(counts) for what, counts in told.items()},
        "5xx": failed,
        "rung inside": sum(one.rung for one in inside),
        "let in": let_in[:20],
    }


def described(server: Shell, folder: Path, examples: int) -> dict[str, Any] | str:
    """Requests by chance from /openapi.json: how many, and what they were answered with."""
    tool = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if tool is None:
        return "schemathesis is not installed"
    words = [tool, "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error,content_type_conformance"]
    words += ["--phases", "coverage,fuzzing", "--workers", "1", "--max-examples", str(examples), "--seed", "7"]
    words += ["--continue-on-failure", "--request-timeout", "60", "--suppress-health-check", "all"]
    words += ["--report", "ndjson", "--report-dir", str(folder / "report")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    statuses = Counter[int]()
    for path in (folder / "report").glob("*.ndjson"):
        for line in path.read_text().splitlines():
            recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
            for one in recorder.get("interactions", {}).values():
                statuses[(one.get("response") or {}).get("status_code", 0)] += 1
    failures = [line.strip() for line in done.stdout.splitlines() if line.startswith("- ST")]
    return {
        "requests": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "5xx": sum(count for status, count in statuses.items() if status >= 500),
        "failures": dict(Counter(failures)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uploads", type=int, default=5000)
    parser.add_argument("--examples", type=int, default=50, help="of each address, for schemathesis")
    told = parser.parse_args()
    began = time.time()
    with tempfile.TemporaryDirectory() as name:
        server = Shell(Path(name))
        try:
            before = server.memory[-1] if server.memory else rss(server.process.pid) >> 10
            result: dict[str, Any] = {"uploads": uploaded(server, told.uploads)}
            after = server.memory[-1]
            result["probes"] = probed(server)
            result["openapi"] = described(server, Path(name), told.examples)
            result["server MB"] = {"before": before, "peak": max(server.memory), "after uploads": after}
            result["server MB"]["at the end"] = server.memory[-1]
            result["still ready"] = server.client.get("/readyz").status_code == 200
            result["errors in its log"] = server.lines("error")
        finally:
            server.process.kill()
    result |= {"seconds": round(time.time() - began), "machine": f"{os.cpu_count()} cores, {platform.machine()}"}
    print(json.dumps(result, indent=1))
    path = ROOT / "benchmarks" / "results" / "serve-attack.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
