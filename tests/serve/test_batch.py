"""Jobs that are drawn together: who joins, that nobody is overtaken, and that each ends as it would have alone."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fakeserve import SOON, Server, events, running, start, steps_after_cancelling, wait_for
from PIL import Image
from test_faults import ends_of, jobs_in

from lanting import Engine, Request, RequestError
from lanting.serve.intake import alike
from lanting.serve.line import PATIENCE, Entry, Line
from lanting.serve.pace import Pace
from lanting.serve.settings import Settings, check
from lanting.serve.state import Run
from lanting.serve.table import Place, Table
from lanting.specs import get_spec, settle

SHARED = {"options": {"places": 3}, "every": 1}


def states(server: Server, jobs: list[str]) -> list[str]:
    return [server.get(f"/api/jobs/{job}").json()["state"] for job in jobs]


def begun(server: Server, job: str, step: int = 2) -> bool:
    return server.get(f"/api/jobs/{job}").json().get("progress", {}).get("step", 0) >= step


def together(server: Server, *prompts: str, steps: int = 24) -> list[str]:
    """Jobs that are all being drawn."""
    jobs = [server.submit(prompt, steps=steps)["id"] for prompt in prompts]
    wait_for(lambda: all(begun(server, job) for job in jobs))
    return jobs


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with running(tmp_path_factory.mktemp("batch"), **SHARED, timeout=20.0) as server:
        yield server


# -------------------------------------------------------------------- who joins
def test_alike_jobs_are_drawn_together_and_each_tells_its_own_steps(shared):
    jobs = [shared.submit(f"slow {number}", steps=30)["id"] for number in range(5)]
    seen: list[list[str]] = []
    wait_for(lambda: seen.append(states(shared, jobs)) or seen[-1] == ["done"] * 5, 30)
    assert max(now.count("running") for now in seen) in (3, 4)  # an end is written while the next one is drawn
    for job in jobs:
        steps = [body["step"] for kind, _, body in events(shared, job) if kind == "step"]
        assert steps == list(range(1, 31))
    starts = [shared.get(f"/api/jobs/{job}").json()["started"] for job in jobs]
    assert starts == sorted(starts)


def test_nobody_is_overtaken(shared):
    """The next in line does not fit, so nobody joins: what is drawn ends, and he comes before those behind him."""
    first = shared.submit("slow", steps=12)["id"]
    wait_for(lambda: begun(shared, first))
    other = shared.submit("slow", steps=13)["id"]
    last = [shared.submit("slow", steps=12)["id"] for _ in range(2)]
    told = {job: shared.ended(job) for job in (first, other, *last)}
    assert told[first]["ended"] <= told[other]["started"]
    assert all(told[other]["ended"] <= told[job]["started"] for job in last)


def test_a_lower_priority_does_not_join_a_higher_one(shared):
    first = shared.submit("slow", steps=14)["id"]
    wait_for(lambda: begun(shared, first))
    high = shared.submit("slow", steps=14, priority="high")["id"]
    low = shared.submit("slow", steps=14, priority="low")["id"]
    told = [shared.ended(job) for job in (first, high, low)]
    assert told[1]["started"] < told[0]["ended"]
    assert told[2]["started"] >= max(told[0]["ended"], told[1]["ended"])


def test_off(tmp_path):
    with running(tmp_path, **SHARED, batch=1) as server:
        jobs = [server.submit("slow", steps=6)["id"] for _ in range(3)]
        told = [server.ended(job) for job in jobs]
    assert all(before["ended"] <= after["started"] for before, after in pairwise(told))
    for wrong in (0, 17):
        with pytest.raises(RequestError, match="--batch must be a whole number from 1 to 16"):
            check(Settings(tmp_path, batch=wrong))


def table(*running: Entry, room: int = 3, pace: Pace | None = None) -> Table:
    desk = SimpleNamespace(line=Line(), accepting=True, well=True)
    model = SimpleNamespace(served=SimpleNamespace(name="m"), pace=pace or Pace(), hands=[])
    made = Table(desk, model, None, room=room)  # type: ignore[arg-type]
    now = time.monotonic()
    for one in running:
        run = Run(SimpleNamespace(id=one.id, cost=one.cost), began=now, deadline=now + one.timeout)  # type: ignore
        made.places[one.id] = Place(run, one)
    return made


def entry(id_: str, kind: str = "k", priority: int = 0, timeout: float = 3600.0, created: float = 0.0) -> Entry:
    return Entry(id_, "a", "m", priority, created or time.time(), 10.0, 1.0, kind, timeout)


def test_the_rule():
    now = time.time()
    here = table(entry("a"))
    assert here.fits(entry("b"), now) and not here.fits(entry("b", "other"), now)
    assert not table(entry("a", "")).fits(entry("b", ""), now)  # like no other
    assert not here.fits(entry("b", priority=-1), now) and here.fits(entry("b", priority=1), now)
    assert here.fits(entry("b", priority=-1, created=now - PATIENCE - 1), now)  # it has waited
    assert here.joining() is None
    for one in (entry("b", created=now - 2), entry("c", "other", created=now - 1), entry("d")):
        here.desk.line.add(one)
    taken = here.joining()
    assert taken is not None and taken.id == "b" and here.joining() is None and len(here.desk.line) == 2


def test_everybody_must_be_left_time():
    pace = Pace(per_unit=1.0)  # ten seconds each
    assert table(entry("a", timeout=21), pace=pace).fits(entry("b", timeout=21), time.time())
    assert not table(entry("a", timeout=21), pace=pace).fits(entry("b", timeout=19), time.time())
    assert not table(entry("a", timeout=19), pace=pace).fits(entry("b", timeout=21), time.time())


def test_what_is_alike():
    spec = get_spec("nano")

    def kind(lora: dict[str, float] | None = None, **more: object) -> str:
        return alike(settle(Request(**{"prompt": "a sign", **more}), spec), lora)  # type: ignore[arg-type]

    usual = kind()
    assert usual == kind(seed=7) == kind(prompt="another") == kind(guidance_scale=3.0) == kind(size=(224, 96), steps=6)
    others = [kind(steps=7), kind(size=(128, 64)), kind(guidance_scale=1.0), kind(quality="high"), kind(count=2)]
    others += [kind({"ink": 1.0}), kind({"ink": 0.5}), kind(prompt=("a", "b"))]
    assert len({usual, *others}) == len(others) + 1


# -------------------------------------------------------------------- how each ends
def test_one_is_cancelled(shared):
    jobs = together(shared, "slow 1", "slow 2", "slow 3")
    assert steps_after_cancelling(shared, jobs[1]) <= SOON
    assert [shared.ended(job)["state"] for job in (jobs[0], jobs[2])] == ["done", "done"]


def test_one_fails(shared):
    jobs = [shared.submit(prompt, steps=10)["id"] for prompt in ("slow", "slow boom", "slow sorry", "slow")]
    told = [shared.ended(job) for job in jobs]
    assert [one["state"] for one in told] == ["done", "failed", "failed", "done"]
    assert "can't be drawn" in told[2]["error"]["message"]
    assert "passwd" not in told[1]["error"]["message"]


def test_one_takes_too_long(shared):
    jobs = [shared.submit("slow", steps=10)["id"], shared.submit("slow", steps=10, timeout=0.3)["id"]]
    told = [shared.ended(job) for job in jobs]
    assert [one["state"] for one in told] == ["done", "failed"] and told[1]["error"]["code"] == "timeout"


def test_a_step_that_cannot_be_shared_ends_the_sharing_and_no_job(shared):
    jobs = [shared.submit(prompt, steps=8)["id"] for prompt in ("slow", "slow apart", "slow")]
    assert [shared.ended(job)["state"] for job in jobs] == ["done"] * 3
    for job in jobs:
        kinds = [(kind, body.get("step")) for kind, _, body in events(shared, job)]
        assert [step for kind, step in kinds if kind == "step"] == list(range(1, 9))
        assert [kind for kind, _ in kinds].count("resumed") <= 1
    lines = map(json.loads, shared.log.read_text().splitlines())  # the worker's own among them
    assert [one["reason"] for one in lines if one["event"] == "steps are not shared"] == ["a step can't be shared"]
    assert shared.ended(shared.submit("a sign")["id"])["state"] == "done"


def test_who_waits_for_his_turn_after_that_can_still_be_cancelled(shared):
    jobs = [shared.submit(prompt, steps=40)["id"] for prompt in ("slow apart", "slow", "slow")]
    wait_for(lambda: begun(shared, jobs[0], 5))
    shared.post(f"/api/jobs/{jobs[2]}/cancel")
    assert shared.ended(jobs[2], 2)["state"] == "cancelled"
    assert shared.get(f"/api/jobs/{jobs[0]}").json()["state"] == "running"
    assert [shared.ended(job)["state"] for job in jobs[:2]] == ["done", "done"]


def test_one_kills_the_worker(tmp_path):
    with running(tmp_path, **SHARED) as server:
        jobs = [server.submit(prompt, steps=20)["id"] for prompt in ("slow", "slow die", "slow")]
        told = [server.ended(job, 40) for job in jobs]
    assert [one["state"] for one in told] == ["done", "failed", "done"]
    assert "died 3 times" in told[1]["error"]["message"]


def test_the_worker_is_killed(tmp_path):
    with running(tmp_path, **SHARED) as server:
        jobs = together(server, "slow 1", "slow 2", "slow 3")
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        subprocess.run(["kill", "-9", *children], check=True)
        for job in jobs:
            kinds = [kind for kind, _, _ in events(server, job)]
            assert kinds.count("resumed") == 1 and kinds[-1] == "done"


def test_the_server_is_killed(tmp_path):
    server = start(tmp_path, **SHARED)
    jobs = together(server, "slow 1", "slow 2", "slow 3")
    server.kill()
    with running(tmp_path, **SHARED) as again:
        for job in jobs:
            told = list(events(again, job))
            steps = [body["step"] for kind, _, body in told if kind == "step"]
            assert "resumed" in [kind for kind, _, _ in told] and steps[-1] == 24
        wait_for(lambda: set(jobs_in(tmp_path).values()) == {"done"})
    assert ends_of(tmp_path) == dict.fromkeys(jobs, 1)


def test_sigterm_puts_all_of_them_aside(tmp_path):
    server = start(tmp_path, **SHARED, drain=0.1)
    jobs = together(server, "slow 1", "slow 2", "slow 3")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    assert jobs_in(tmp_path) == dict.fromkeys(jobs, "waiting")
    with running(tmp_path, **SHARED) as again:
        assert [again.ended(job)["state"] for job in jobs] == ["done"] * 3


def test_nano_killed_among_others_is_nano_alone(tmp_path):
    """The real engine: drawn together, killed in the middle, gone on with together; the same pictures to the bit."""
    words = ['a red sign that says "STAY"', "a sign", "绿色招牌“茶馆”"]
    settings = {"opener": "lanting.serve.worker:open_engine", "options": {"device": "cpu"}, "every": 1}
    server = start(tmp_path, **settings)
    jobs = [server.submit(prompt, seed=seed, steps=16, size="128x128")["id"] for seed, prompt in enumerate(words)]
    wait_for(lambda: begun(server, jobs[0], 4), 60)
    server.kill()
    with running(tmp_path, **settings) as again:
        told = [again.ended(job, 90) for job in jobs]
        pictures = [again.get(one["images"][0]["url"]).content for one in told]
        assert "resumed" in [kind for kind, _, _ in events(again, jobs[0])]
    with Engine.open("nano", device="cpu") as engine:
        for seed, (prompt, picture) in enumerate(zip(words, pictures, strict=True)):
            whole = engine.run(Request(prompt, seed=seed, steps=16, size=(128, 128))).images[0]
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture))), np.asarray(whole))
        if engine.room(Request("a sign", size=(128, 128))) > 1:  # sharing keeps the bits on this machine
            starts, ends = ([one[name] for one in told] for name in ("started", "ended"))
            assert max(starts) < min(ends)
