"""Troubles other than kills, for `serve_faults.py`: a disk that is full, a disk that turns read-only, engines that
raise, die or lose their numbers, clients that are slow, clients that leave.

Disks are an ext4 of their own in a file, mounted by root: full by a ballast that takes what is left, read-only by
ext4's own `trigger_fs_error`, which is what a failing disk does while files are open.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import torch
from fakeserve import Server, running, start, wait_for
from safetensors.torch import load_file, save_file
from test_faults import ends_of, jobs_in

ROOT = Path(__file__).parents[1]
HOW: dict[str, Any] = {"options": {"pace": 0.01}, "every": 2, "caps": {"waiting": 1_000_000}}
ENDED = {"done", "failed", "cancelled"}


class Crowd:
    """Clients that submit all the time; what they were answered, and what was accepted."""

    def __init__(
        self, server: Server, count: int = 4, prompts: tuple[str, ...] = ("a sign",), pause: float = 0.03
    ) -> None:
        self.url, self.prompts, self.pause, self.stop = server.url, prompts, pause, False
        self.accepted: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.threads = [threading.Thread(target=self.run, args=(number,)) for number in range(count)]
        for thread in self.threads:
            thread.start()

    def run(self, number: int) -> None:
        turn, client = 0, httpx.Client(timeout=30)
        while not self.stop:
            turn += 1
            words = self.prompts[turn % len(self.prompts)]
            body = {"prompt": f"{words} {number} {turn}", "steps": 6, "seed": number * 100_000 + turn}
            try:
                answer = client.post(f"{self.url}/api/jobs", json=body)
                self.statuses[answer.status_code] += 1
                if answer.status_code == 202:
                    self.accepted.append(answer.json()["id"])
                elif answer.status_code == 503:
                    assert answer.headers["retry-after"] and answer.json()["error"]["message"]
            except httpx.HTTPError:
                self.statuses[0] += 1  # nobody there
                time.sleep(0.1)
            time.sleep(self.pause)

    def leave(self) -> None:
        self.stop = True
        for thread in self.threads:
            thread.join()


def settled(folder: Path, accepted: list[str], seconds: float = 300) -> dict[str, Any]:
    """When all has ended: what the ledger, its log and the folders say against what the clients were told."""
    wait_for(lambda: set(jobs_in(folder).values()) <= ENDED, seconds, 0.5)
    states, ends = jobs_in(folder), ends_of(folder)
    results = folder / "data" / "results"
    folders = {path.name for path in results.iterdir() if not path.name.startswith(".")}
    done = {job for job, state in states.items() if state == "done"}
    return {
        "accepted": len(accepted),
        "lost": len(set(accepted) - set(states)),
        "states": dict(Counter(states.values())),
        "ended more than once": sum(count > 1 for count in ends.values()),
        "ended without a log line": len(set(states) - set(ends)),
        "done without pictures": len(done - folders),
    }


@contextmanager
def disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """An ext4 of its own at `folder`/data. Raises OSError where this user may not mount."""
    if os.geteuid() != 0:
        raise PermissionError("mounting a disk needs root")
    image, place = folder / "disk.img", folder / "data"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    mount(image, place)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def mount(image: Path, place: Path) -> None:
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", str(image), str(place)], check=True)


def fill(place: Path) -> Path:
    """Take every byte that is left."""
    ballast = place / "ballast"
    with ballast.open("ab", buffering=0) as file, suppress(OSError):
        for size in (1 << 20, 4096, 1):
            with suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    return ballast


def disk_full(folder: Path, rounds: int = 6) -> dict[str, Any]:
    """Full for three seconds, again and again, under load; once the server is killed and started while it is."""
    with disk(folder, 48) as place:
        server = start(folder, **HOW)
        crowd, told = Crowd(server, pause=0.2), Counter[str]()
        for number in range(rounds):
            time.sleep(2)
            ballast = fill(place)
            before = len(crowd.accepted)
            time.sleep(3)
            told["accepted while full"] += len(crowd.accepted) - before
            if number == rounds // 2:
                server.kill()
                told["starts refused while full, else it waits for room"] += refused(folder)
                ballast.unlink()
                server = start(folder, **HOW)
                crowd.url = server.url
            ballast.unlink(missing_ok=True)
            began, seen = time.monotonic(), len(crowd.accepted)
            wait_for(lambda seen=seen: len(crowd.accepted) > seen, 60)
            slowest = max(told["ms until it accepted again"], round((time.monotonic() - began) * 1000))
            told["ms until it accepted again"] = slowest
        crowd.leave()
        result = {"rounds": rounds, **told, "statuses": dict(crowd.statuses), **settled(folder, crowd.accepted)}
        server.kill()
    return result


def refused(folder: Path) -> bool:
    """Whether a server that can't write says so and leaves, rather than starting half."""
    try:
        server = start(folder, **HOW)
    except AssertionError as error:
        return "Error" in str(error) and "data" in str(error)
    server.kill()
    return False


def disk_read_only(folder: Path) -> dict[str, Any]:
    """The disk fails under load; the server is stopped, the disk repaired, the server started again."""
    with disk(folder, 64) as place:
        server = start(folder, **HOW)
        crowd = Crowd(server, pause=0.2)
        time.sleep(5)
        loop = subprocess.run(["losetup", "-j", str(folder / "disk.img")], capture_output=True, text=True).stdout
        name = Path(loop.partition(":")[0]).name
        Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("a failing disk")
        time.sleep(0.5)
        before = len(crowd.accepted)
        time.sleep(5)
        during, lives = len(crowd.accepted) - before, server.get("/healthz").status_code
        ready = server.get("/readyz").status_code
        known = server.get(f"/api/jobs/{crowd.accepted[0]}").status_code
        crowd.leave()
        server.kill()
        no = refused(folder)
        subprocess.run(["umount", str(place)], check=True)
        subprocess.run(["fsck.ext4", "-p", "-f", str(folder / "disk.img")], check=False, capture_output=True)
        mount(folder / "disk.img", place)
        with running(folder, **HOW):
            result = settled(folder, crowd.accepted)
    told = {"accepted while read-only": during, "healthz": lives, "readyz": ready, "asking for a job": known}
    return told | {"starts refused while read-only": no, "statuses": dict(crowd.statuses), **result}


def engine_raises(folder: Path, seconds: float = 12) -> dict[str, Any]:
    """Seven jobs in eighteen fail: by an error in words, by one nobody foresaw, by a process that dies."""
    prompts = ("a sign", "sorry", "a door", "boom", "a wall", "a roof", "sorry", "a tree", "boom", "a lamp")
    prompts += ("a cup", "die", "a hat", "sorry", "a hen", "boom", "a pen", "a map")
    with running(folder, **HOW) as server:
        crowd = Crowd(server, 3, prompts, pause=0.2)
        time.sleep(seconds)
        crowd.leave()
        result = settled(folder, crowd.accepted)
        jobs = told_of(folder)
        right = sum(
            (state == "failed") == any(word in prompt for word in ("sorry", "boom", "die")) for prompt, state, _ in jobs
        )
        codes = Counter(json.loads(error)["code"] for _, _, error in jobs if error)
        lives = server.get("/readyz").status_code
    ends = {"ended as they should": right, "codes": dict(codes), "readyz": lives}
    return {"statuses": dict(crowd.statuses), **result, **ends}


def told_of(folder: Path) -> list[tuple[str, str, str | None]]:
    with sqlite3.connect(folder / "data" / "queue.sqlite") as db:
        return db.execute("SELECT prompt, state, error FROM jobs").fetchall()


def numbers_lost(folder: Path) -> dict[str, Any]:
    """nano with weights that are no numbers, beside a whole nano: the one fails in words, the other draws."""
    broken = folder / "nano-broken"
    shutil.copytree(ROOT / "src" / "lanting" / "nano", broken)
    for path in (broken / "transformer").glob("*.safetensors"):
        weights = {name: torch.full_like(one, float("nan")) for name, one in load_file(path).items()}
        save_file(weights, path)
    names = ["nano", str(broken)]
    with running(folder, opener="lanting.serve.worker:open_engine", options={"device": "cpu"}, names=names) as server:
        wait_for(lambda: server.get("/readyz").status_code == 200, 120, 0.2)
        jobs = [server.submit(f"a sign {turn}", model=name)["id"] for turn in range(5) for name in names]
        ended = [server.ended(job, 120) for job in jobs]
        result = settled(folder, jobs)
    states = {Path(name).name: dict(Counter(one["state"] for one in ended if one["model"] == name)) for name in names}
    sentences = sorted({one["error"]["message"] for one in ended if "error" in one})
    return {**result, "by model": states, "sentences": sentences}


def slow_clients(folder: Path, count: int = 300, seconds: float = 20) -> dict[str, Any]:
    """Clients that read nothing of event streams, others that send a byte at a time; the rest is served meanwhile."""
    with running(folder, **HOW | {"caps": {"waiting": 100_000, "body_seconds": 5.0}}) as server:
        job = server.submit("slow", steps=200)["id"]
        before = memory(server)
        socks = [
            stuck(server.port, f"GET /api/jobs/{job}/events HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(count)
        ]
        head = "POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9999"
        dribbling = [stuck(server.port, head + "\r\n\r\n{") for _ in range(count // 3)]
        until, submits, peak = time.monotonic() + seconds, list[float](), 0
        while time.monotonic() < until:
            began = time.perf_counter()
            server.submit("a sign")
            submits.append(time.perf_counter() - began)
            peak = max(peak, memory(server))
            for sock in dribbling:
                with suppress(OSError):
                    sock.send(b" ")
            time.sleep(0.2)
        given_up = sum(answered(sock) == 413 for sock in dribbling)
        for sock in (*socks, *dribbling):
            sock.close()
        result = settled(folder, [])
    told = {"that read nothing": count, "that send a byte at a time": len(dribbling), "given up with 413": given_up}
    ordered = sorted(submits)
    return told | {
        "submissions of others": len(ordered),
        "their ms": {"p50": round(ordered[len(ordered) // 2] * 1000, 1), "max": round(ordered[-1] * 1000, 1)},
        "server MB": {"before": before >> 10, "peak": peak >> 10},
        "states": result["states"],
        "ended more than once": result["ended more than once"],
    }


def stuck(port: int, words: str) -> socket.socket:
    """A connection with a small window that says something and then reads nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", port))
    sock.sendall(words.encode())
    return sock


def answered(sock: socket.socket) -> int:
    sock.settimeout(8)
    with suppress(OSError, IndexError, ValueError):
        return int(sock.recv(1000).split(b" ", 2)[1])
    return 0


def memory(server: Server) -> int:
    from serve_load import rss

    return rss(server.process.pid)


WAYS: dict[str, tuple[str, dict[str, Any]]] = {  # streams that are left after their first words
    "OpenAI": ("/v1/images/generations", {"stream": True, "partial_images": 3}),
    "Ollama": ("/api/generate", {"model": "nano"}),
    "OpenAI, with an idempotency key": ("/v1/images/generations", {"stream": True, "partial_images": 3}),
}


def clients_gone(folder: Path, rounds: int = 20) -> dict[str, Any]:
    """Clients that leave in the middle of a stream: their jobs are cancelled, unless they said they may come back."""
    told: dict[str, Any] = {}
    with running(folder, **HOW) as server:
        for way, (path, body) in WAYS.items():
            for turn in range(rounds):
                head = {"Idempotency-Key": f"k{turn}"} if "key" in way else {}
                words = {**body, "prompt": f"slow {way} {turn}", "steps": 20}
                with httpx.stream("POST", server.url + path, json=words, headers=head, timeout=30) as answer:
                    next(answer.iter_raw())
        followed = [server.submit("a sign", steps=20)["id"] for _ in range(rounds)]
        for job in followed:
            with httpx.stream("GET", f"{server.url}/api/jobs/{job}/events", timeout=30) as answer:
                next(answer.iter_raw())
        result = settled(folder, followed, 600)
        for way in WAYS:
            told[way] = dict(
                Counter(state for prompt, state, _ in told_of(folder) if prompt.startswith(f"slow {way} "))
            )
        told["Lanting's own events"] = dict(Counter(jobs_in(folder)[job] for job in followed))
    return {"left after the first words": rounds, **told, "ended more than once": result["ended more than once"]}


TROUBLES = {
    "disk full": disk_full,
    "disk read-only": disk_read_only,
    "engine raises": engine_raises,
    "numbers lost": numbers_lost,
    "slow clients": slow_clients,
    "clients gone mid-stream": clients_gone,
}
