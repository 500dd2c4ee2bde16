"""kill -9, a stop in order, a full disk, a second server: nothing that was accepted is lost or drawn twice."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from fakeserve import HERE, events, over, running, start, wait_for
from PIL import Image

from lanting import Engine, Request
from lanting.serve.errors import StoreError
from lanting.serve.files import Files
from lanting.serve.house import House, open_house, sweep
from lanting.serve.intake import Order
from lanting.serve.jobs import LOCAL, Job
from lanting.serve.settings import Settings
from lanting.serve.state import Run


def jobs_in(folder: Path) -> dict[str, str]:
    """id -> state, from the ledger itself."""
    with sqlite3.connect(folder / "data" / "queue.sqlite") as db:
        return dict(db.execute("SELECT id, state FROM jobs").fetchall())


def ends_of(folder: Path) -> dict[str, int]:
    """id -> how many ends its log has."""
    with sqlite3.connect(folder / "data" / "queue.sqlite") as db:
        ends = "SELECT job, count(*) FROM events WHERE kind IN ('done', 'failed', 'cancelled') GROUP BY job"
        return dict(db.execute(ends).fetchall())


class Clients:
    """Threads that submit until told to stop, and remember what was accepted."""

    def __init__(self, count: int) -> None:
        self.accepted: list[str] = []
        self.url, self.stop = "", False
        self.threads = [threading.Thread(target=self.run, args=(number,)) for number in range(count)]

    def run(self, number: int) -> None:
        turn, client = 0, httpx.Client(timeout=5)
        while not self.stop:
            turn += 1
            body = {"prompt": f"a sign {number} {turn}", "steps": 6, "seed": number * 1000 + turn}
            try:
                answer = client.post(f"{self.url}/api/jobs", json=body)
                if answer.status_code == 202:
                    self.accepted.append(answer.json()["id"])
            except httpx.HTTPError:
                time.sleep(0.02)
            time.sleep(0.03)


def test_killed_at_random_points_nothing_is_lost_or_done_twice(tmp_path):
    """Kills of the server under load; its orphaned workers leave by themselves. benchmarks/serve_faults.py does 100."""
    chance = random.Random(1)
    options = {"journal": str(tmp_path / "journal"), "pace": 0.004}
    clients = Clients(3)
    for round_ in range(4):
        server = start(tmp_path, options=options, every=2, caps={"waiting": 100_000})
        clients.url = server.url
        if round_ == 0:
            for thread in clients.threads:
                thread.start()
        time.sleep(chance.uniform(0.05, 0.7))
        server.kill()
    clients.stop = True
    for thread in clients.threads:
        thread.join()
    assert len(clients.accepted) > 5
    with running(tmp_path, options=options, every=2, caps={"waiting": 100_000}) as server:
        wait_for(lambda: all(state == "done" for state in jobs_in(tmp_path).values()), 60, 0.1)
        states = jobs_in(tmp_path)
        assert set(clients.accepted) <= set(states)  # what was being accepted in a kill may be there too
        assert set(ends_of(tmp_path).values()) == {1} and len(ends_of(tmp_path)) == len(states)
        for job in clients.accepted[::10]:
            done = server.get(f"/api/jobs/{job}").json()
            picture = server.get(done["images"][0]["url"])
            assert picture.status_code == 200 and done["recipes"][0]["request"]["seed"] == done["request"]["seed"]
    folders = {path.name for path in (tmp_path / "data" / "results").iterdir()}
    assert folders == set(states)
    assert list((tmp_path / "data" / "checkpoints").iterdir()) == []


def test_a_job_goes_on_from_its_checkpoint(tmp_path):
    server = start(tmp_path, every=2)
    job = server.submit("slow", steps=30)["id"]
    wait_for(lambda: server.get(f"/api/jobs/{job}").json().get("progress", {}).get("step", 0) > 12)
    server.kill()
    with running(tmp_path, every=2) as again:
        told = list(events(again, job))
    kinds = [kind for kind, _, _ in told]
    assert kinds.count("done") == 1 and "interrupted" in kinds
    resumed = next(body["step"] for kind, _, body in told if kind == "resumed")
    first = next(body["step"] for kind, _, body in told[kinds.index("resumed") :] if kind == "step")
    assert resumed >= 12 and first == resumed + 1
    numbers = [number for _, number, _ in told]
    assert numbers == sorted(set(numbers))  # also over the restart


def test_a_finished_folder_is_a_finished_job(tmp_path):
    """Killed between the pictures and the ledger: adopted, not drawn again."""
    with running(tmp_path) as server:
        job = server.submit("a sign", seed=5)["id"]
        server.ended(job)
    with sqlite3.connect(tmp_path / "data" / "queue.sqlite") as db:
        db.execute("UPDATE jobs SET state = 'running', outcome = NULL, ended = NULL")
        db.execute("DELETE FROM events WHERE kind = 'done'")
    journal = tmp_path / "journal"
    with running(tmp_path, options={"journal": str(journal)}) as again:
        assert again.ended(job)["recipes"][0]["request"]["seed"] == 5
    assert not journal.exists()


def test_nano_resumed_is_nano_uninterrupted(tmp_path):
    """The real engine, killed in the middle: the picture is the same to the bit."""
    opener, options = "lanting.serve.worker:open_engine", {"device": "cpu"}
    server = start(tmp_path, opener=opener, options=options, every=1)
    asked = {"seed": 3, "steps": 20, "size": "128x128"}
    job = server.submit('a red sign that says "STAY"', **asked)["id"]
    wait_for(lambda: server.get(f"/api/jobs/{job}").json().get("progress", {}).get("step", 0) > 5, 40)
    server.kill()
    with running(tmp_path, opener=opener, options=options, every=1) as again:
        done = again.ended(job, 60)
        kinds = [kind for kind, _, _ in events(again, job)]
        picture = again.get(done["images"][0]["url"]).content
    assert "resumed" in kinds
    path = tmp_path / "again.png"
    path.write_bytes(picture)
    with Engine.open("nano", device="cpu") as engine:
        whole = engine.run(Request('a red sign that says "STAY"', seed=3, steps=20, size=(128, 128))).images[0]
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(whole))


def test_sigterm_lets_a_job_end_and_takes_no_more(tmp_path):
    server = start(tmp_path, drain=20.0)
    job = server.submit("slow", steps=20)["id"]
    waiting = server.submit("a sign")["id"]
    wait_for(lambda: "progress" in server.get(f"/api/jobs/{job}").json())
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    answer = server.post("/api/jobs", {"prompt": "late"})
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert server.get("/readyz").status_code == 503
    assert server.process.wait(20) == 0
    assert jobs_in(tmp_path) == {job: "done", waiting: "waiting"}


def test_sigterm_puts_aside_what_takes_too_long(tmp_path):
    server = start(tmp_path, drain=0.2, every=1)
    job = server.submit("slow", steps=40)["id"]
    wait_for(lambda: server.get(f"/api/jobs/{job}").json().get("progress", {}).get("step", 0) > 3)
    waited: list[httpx.Response] = []
    body = {"model": "nano", "prompt": "a sign", "stream": False}
    thread = threading.Thread(target=lambda: waited.append(server.post("/api/generate", body)))
    thread.start()
    time.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    thread.join(5)
    assert waited and waited[0].status_code == 503 and "goes on" in waited[0].json()["error"]
    assert set(jobs_in(tmp_path).values()) == {"waiting"}
    with running(tmp_path, every=1) as again:
        kinds = [kind for kind, _, _ in events(again, job)]
    assert kinds.count("resumed") == 1 and kinds[-1] == "done"


def test_what_is_cancelled_while_it_is_put_aside_stays_cancelled(tmp_path):
    server = start(tmp_path, drain=0.1, every=100)  # a pause waits for a checkpoint, which does not come
    job = server.submit("slow", steps=200)["id"]
    wait_for(lambda: "progress" in server.get(f"/api/jobs/{job}").json())
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert server.post(f"/api/jobs/{job}/cancel").status_code == 200
    assert server.process.wait(15) == 0
    assert jobs_in(tmp_path) == {job: "cancelled"}


def test_a_worker_that_is_killed_is_replaced_and_its_job_goes_on(tmp_path):
    with running(tmp_path, every=1) as server:
        job = server.submit("slow", steps=30)["id"]
        wait_for(lambda: server.get(f"/api/jobs/{job}").json().get("progress", {}).get("step", 0) > 3)
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        subprocess.run(["kill", "-9", *children], check=True)
        kinds = [kind for kind, _, _ in events(server, job)]
        assert kinds.count("resumed") == 1 and kinds[-1] == "done"


def test_workers_leave_with_their_server(tmp_path):
    server = start(tmp_path)
    wait_for(lambda: server.get("/readyz").status_code == 200)
    child = int(Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()[0])
    server.kill()
    wait_for(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text(), 5)


def test_a_second_server_is_refused(tmp_path):
    with running(tmp_path) as server:
        words = json.dumps({"data": str(server.folder / "data"), "port": 0})
        env = {"PYTHONPATH": f"{HERE.parents[1] / 'src'}:{HERE}", "LANTING_LANG": "en", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [sys.executable, str(HERE / "serving.py"), words], capture_output=True, text=True, timeout=30, env=env
        )
        assert done.returncode != 0 and "another server uses" in done.stderr


def test_a_database_that_cannot_be_written_accepts_nothing_and_loses_nothing(tmp_path):
    """Held by another writer for longer than SQLite waits: 503; afterwards all is as before."""
    with running(tmp_path, patch={"lanting.serve.ledger.BUSY": 0.5}) as server:
        first = server.submit("a sign")["id"]
        server.ended(first)
        other = sqlite3.connect(tmp_path / "data" / "queue.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        answer = server.post("/api/jobs", {"prompt": "a sign"})
        assert answer.status_code == 503 and answer.headers["retry-after"]
        other.execute("ROLLBACK")
        other.close()
        second = server.submit("a sign")["id"]
        assert server.ended(second)["state"] == "done"
        assert set(jobs_in(tmp_path)) == {first, second}


def test_whoever_cancels_waits_no_longer_than_a_pause(tmp_path):
    async def use() -> None:
        house = open_house(Settings(tmp_path))
        job = Job("a" * 24, "local", "nano", "lanting", "running", 0, 0.0, 1.0, 9.0, {})
        run = Run(job)
        await house.desk.stop(run, "pause", 5.0)
        paused = run.deadline
        await house.desk.stop(run, "cancelled")
        assert (run.why, run.deadline) == ("cancelled", paused)
        await house.desk.stop(run, "pause", 5.0)
        assert run.why == "cancelled"
        late = Run(job)
        await house.desk.stop(late, "timeout")
        await house.desk.stop(late, "cancelled")
        assert late.why == "timeout"
        await house.desk.ledger.close()

    asyncio.run(use())


def test_a_server_stops_though_an_end_cannot_be_written(tmp_path, monkeypatch):
    """The disk is full when a picture is done, and stays so: the end is found in its folder by the next server."""

    async def full(act) -> None:
        raise StoreError("nothing can be written")

    async def drain(house: House, seconds: float) -> None:
        house.desk.accepting = False

    async def stop() -> str:
        house = open_house(Settings(tmp_path, opener="fakeserve:open_engine"))
        async with house.living():
            job = await house.desk.submit(Order(Request("a sign")), LOCAL)
            monkeypatch.setattr(house.desk.ledger, "write", full)
            while house.desk.files.outcome(job.id) is None:
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.3)
        return job.id

    monkeypatch.setenv("PYTHONPATH", f"{HERE.parents[1] / 'src'}:{HERE}")
    monkeypatch.setattr(House, "drain", drain)
    monkeypatch.setattr("lanting.serve.house.LAST", 0.5)
    job = asyncio.run(asyncio.wait_for(stop(), 30))
    assert open_house(Settings(tmp_path)).desk.files.outcome(job)


@pytest.mark.parametrize("model", ["broken"])
def test_a_model_that_cannot_be_opened_is_told(tmp_path, model):
    with running(tmp_path, names=[model]) as server:
        told = wait_for(
            lambda: found if (found := server.get("/api/models").json()["models"][0]).get("error") else None
        )
        assert told["error"] == "the model is broken: get another"
        answer = server.post("/api/jobs", {"prompt": "x"})
        assert answer.status_code == 503 and "broken" in answer.json()["error"]["message"]
        assert server.get("/readyz").status_code == 503


def test_what_is_old_is_forgotten(tmp_path):
    with running(tmp_path) as server:
        job = server.submit("a sign")["id"]
        server.ended(job)
    with running(tmp_path, keep_days=0.0) as again:
        wait_for(lambda: again.get(f"/api/jobs/{job}").status_code == 404)
        wait_for(lambda: not list((tmp_path / "data" / "results").iterdir()))
        assert over({"state": "done"})


def test_a_server_killed_while_it_forgets_leaves_nothing_for_ever(tmp_path, monkeypatch):
    """Neither row nor folder is left alone: the next one forgets the rest."""
    with running(tmp_path) as server:
        server.ended(server.submit("a sign")["id"])

    tried: list[object] = []

    def killed(*told: object) -> None:
        tried.append(told)
        raise OSError("as good as killed")

    async def forget(done: Callable[[], bool]) -> None:
        house = open_house(Settings(tmp_path / "data", keep_days=0.0))
        sweeping = asyncio.create_task(sweep(house.desk))
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0.02)
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)
        await house.desk.ledger.close()
        house.lock.release()

    with monkeypatch.context() as patch:
        patch.setattr(Files, "forget", killed)
        asyncio.run(forget(lambda: bool(tried)))
    asyncio.run(forget(lambda: jobs_in(tmp_path) == {}))
    assert list((tmp_path / "data" / "results").iterdir()) == []


def test_a_part_that_ends_is_in_the_log_and_sweeping_goes_on(tmp_path, monkeypatch, caplog):
    """Without a word nobody would know why nothing is drawn."""

    async def broken(*_: object) -> None:
        raise ValueError("nobody foresaw this")

    def fixed(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    async def use() -> None:
        house = open_house(Settings(tmp_path))
        async with house.living():
            await asyncio.sleep(0.3)
            assert [task.done() for task in (*house.tasks, *house.helpers)] == [True, False, False, False]

    monkeypatch.setattr("lanting.serve.house.work", broken)
    monkeypatch.setattr(Files, "forget_pictures", fixed)
    asyncio.run(use())
    assert "nobody foresaw this" in caplog.text and "sweeping failed" in caplog.text


def test_pictures_that_are_old_are_forgotten_though_jobs_wait(tmp_path):
    """A busy server always has some; theirs stay."""

    async def use() -> None:
        house = open_house(Settings(tmp_path))
        files = house.desk.files
        await house.desk.submit(Order(Request("x", images=(Image.new("RGB", (64, 64)),))), LOCAL)
        files.keep_picture(Image.new("RGB", (8, 8)), "old")
        files.keep_picture(Image.new("RGB", (8, 8)), "new")
        for path in files.pictures.iterdir():
            if path.stem != "new":
                os.utime(path, (1, 1))
        sweeping = asyncio.create_task(sweep(house.desk))
        async with asyncio.timeout(5):
            while files.picture("old").exists():
                await asyncio.sleep(0.02)
        sweeping.cancel()
        assert len(list(files.pictures.iterdir())) == 2

    asyncio.run(use())


def test_a_picture_that_is_sent_again_is_whole(tmp_path, monkeypatch):
    """Also where it is forgotten in that moment; and a disk that can't be written is told as ever."""
    files = Files(tmp_path)
    files.prepare()
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.suffix == ".png" or exists(path))
    files.keep_picture(Image.new("RGB", (8, 8)), "some")
    assert files.picture("some").stat().st_size > 0

    def fixed(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", fixed)
    with pytest.raises(StoreError):
        files.keep_picture(Image.new("RGB", (8, 8)), "some")
