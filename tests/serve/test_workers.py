"""Several workers of a model on one machine: jobs spread, a worker's trouble is its own, places and times count all."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakeserve import HERE, ROOT, SOON, Server, events, running, start, steps_after_cancelling, wait_for
from test_batch import begun
from test_faults import ends_of, jobs_in

from lanting import Request, RequestError
from lanting.cli.serve import how_many
from lanting.plan import Device, Machine
from lanting.serve.hand import ProcessHand
from lanting.serve.house import open_house
from lanting.serve.intake import Order
from lanting.serve.jobs import LOCAL
from lanting.serve.pace import Pace
from lanting.serve.settings import Served, Settings, check
from lanting.serve.staff import Post, posts
from lanting.serve.state import Model, Run, ends

GIB = 2**30
CARDS = tuple(Device(f"cuda:{i}" if i else "cuda", "H100", 80 * GIB, 60 * GIB) for i in range(2))
BIG = Machine(64 * GIB, 48 * GIB, 16, (*CARDS, Device("cpu", "CPU")))
SMALL = Machine(64 * GIB, 48 * GIB, 16, (Device("cpu", "CPU"),))


def children(server: Server) -> list[int]:
    told = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    return [int(one) for one in told.split()]


def crew(server: Server) -> dict[str, int]:
    return server.get("/api/models").json()["models"][0]["workers"]


def all_ready(server: Server, count: int = 3) -> bool:
    return crew(server)["ready"] == count


def running_now(server: Server, jobs: list[str]) -> list[int]:
    """The workers that draw them, one for each that is being drawn."""
    told = [server.get(f"/api/jobs/{job}").json() for job in jobs]
    return [one["worker"] for one in told if "worker" in one]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    with running(tmp_path_factory.mktemp("three"), workers=3, every=1, timeout=30.0) as server:
        wait_for(lambda: all_ready(server), 30)
        yield server


# -------------------------------------------------------------------- who draws what
def test_jobs_spread_over_all_workers(three):
    jobs = [three.submit("slow", steps=20)["id"] for _ in range(3)]
    wait_for(lambda: sorted(running_now(three, jobs)) == [1, 2, 3])
    fourth = three.submit("a sign")["id"]
    wait_for(lambda: three.get(f"/api/jobs/{fourth}").json()["place"]["ahead"] == 3, 1)
    assert {three.ended(job)["state"] for job in (*jobs, fourth)} == {"done"}


def test_how_many_there_are_is_told(three):
    told = three.get("/readyz").json()
    assert told == {"status": "ready", "workers": {"nano": {"count": 3, "ready": 3}}}
    page = three.get("/metrics").text
    assert "lanting_workers 3.0" in page and "lanting_workers_ready 3.0" in page
    assert "lanting_workers_waiting 0.0" in page


def test_cancelling_reaches_the_worker_that_has_the_job(three):
    jobs = [three.submit("slow", steps=40)["id"] for _ in range(3)]
    wait_for(lambda: all(begun(three, job) for job in jobs))
    assert steps_after_cancelling(three, jobs[1]) <= SOON
    assert [three.ended(job)["state"] for job in (jobs[0], jobs[2])] == ["done", "done"]


def test_the_order_of_the_line_is_kept(three):
    """Priorities first, then as they came: what begins earlier was ahead."""
    busy = [three.submit("slow", steps=16)["id"] for _ in range(3)]
    wait_for(lambda: all(begun(three, job, 1) for job in busy))
    low = [three.submit("slow", steps=4, priority="low")["id"] for _ in range(3)]
    normal = [three.submit("slow", steps=4)["id"] for _ in range(3)]
    high = three.submit("slow", steps=4, priority="high")["id"]
    starts = [three.ended(job)["started"] for job in (high, *normal, *low)]
    assert all(before <= after for before, after in pairwise(starts))


def test_who_can_be_drawn_at_once_does_not_sit_down_with_others(tmp_path):
    """Two workers with room for three each: two jobs alike go to one each, six more join them."""
    with running(tmp_path, workers=2, every=1, options={"places": 3}) as server:
        wait_for(lambda: all_ready(server, 2), 30)
        first = server.submit("slow", steps=40)["id"]
        wait_for(lambda: begun(server, first, 1))
        second = server.submit("slow", steps=40)["id"]
        wait_for(lambda: sorted(running_now(server, [first, second])) == [1, 2])
        more = [server.submit("slow", steps=40)["id"] for _ in range(4)]
        wait_for(lambda: sorted(running_now(server, [first, second, *more])) == [1, 1, 1, 2, 2, 2])
        assert {server.ended(job)["state"] for job in (first, second, *more)} == {"done"}


# -------------------------------------------------------------------- troubles
def test_a_worker_that_is_killed_takes_only_its_own_job_back(tmp_path):
    with running(tmp_path, workers=3, every=1) as server:
        wait_for(lambda: all_ready(server), 30)
        jobs = [server.submit("slow", steps=30)["id"] for _ in range(3)]
        wait_for(lambda: all(begun(server, job, 4) for job in jobs))
        os.kill(children(server)[0], signal.SIGKILL)
        kinds = [[kind for kind, _, _ in events(server, job)] for job in jobs]
        assert sorted(one.count("interrupted") for one in kinds) == [0, 0, 1]
        assert sorted(one.count("resumed") for one in kinds) == [0, 0, 1]  # on whichever worker is free
        assert all(one[-1] == "done" for one in kinds)
        wait_for(lambda: all_ready(server), 30)


def test_a_model_is_ready_with_one_worker(tmp_path):
    with running(tmp_path, workers=2, every=1) as server:
        wait_for(lambda: all_ready(server, 2), 30)
        os.kill(children(server)[0], signal.SIGSTOP)  # it says nothing, and its job waits for it
        os.kill(children(server)[1], signal.SIGKILL)
        wait_for(lambda: crew(server)["ready"] == 1)
        assert server.get("/readyz").status_code == 200
        wait_for(lambda: all_ready(server, 2), 30)
        with suppress(ProcessLookupError):
            os.kill(children(server)[0], signal.SIGCONT)


def test_workers_killed_again_and_again_lose_nothing(tmp_path):
    with running(tmp_path, workers=3, every=1, caps={"waiting": 1000}) as server:
        wait_for(lambda: all_ready(server), 30)
        jobs = [server.submit(f"a sign {n}", steps=12, seed=n)["id"] for n in range(60)]
        for turn in range(3):
            time.sleep(0.3)
            with suppress(ProcessLookupError):
                os.kill(children(server)[turn % len(children(server))], signal.SIGKILL)
            jobs += [server.submit(f"a sign {turn} {n}", steps=12)["id"] for n in range(10)]
        wait_for(lambda: set(jobs_in(tmp_path).values()) == {"done"}, 60, 0.1)
        assert ends_of(tmp_path) == dict.fromkeys(jobs, 1)


def test_sigterm_puts_aside_what_all_of_them_draw(tmp_path):
    server = start(tmp_path, workers=3, every=1, drain=0.1)
    wait_for(lambda: all_ready(server), 30)
    jobs = [server.submit("slow", steps=30)["id"] for _ in range(3)]
    wait_for(lambda: all(begun(server, job) for job in jobs))
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    assert jobs_in(tmp_path) == dict.fromkeys(jobs, "waiting")
    with running(tmp_path, workers=2, every=1) as again:
        assert [again.ended(job)["state"] for job in jobs] == ["done"] * 3
        assert all("resumed" in [kind for kind, _, _ in events(again, job)] for job in jobs)


def test_a_model_that_no_worker_can_open_is_told_once(tmp_path):
    with running(tmp_path, names=["broken"], workers=2) as server:
        told = wait_for(lambda: one if "error" in (one := server.get("/api/models").json()["models"][0]) else None)
        assert told["error"] == "the model is broken: get another"
        wait_for(lambda: crew(server) == {"count": 2, "ready": 0, "refused": 2}, 10)


def test_a_server_that_is_told_to_stop_does_not_wait_for_a_worker_that_begins(tmp_path):
    server = start(tmp_path, names=["broken"], workers=2)
    wait_for(lambda: "error" in server.get("/api/models").json()["models"][0])
    time.sleep(0.5)  # the next try is a second away, then two
    server.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert server.process.wait(10) == 0 and time.monotonic() - began < 5


def test_a_process_that_cannot_be_made_is_tried_again(tmp_path, monkeypatch):
    """No memory, too many processes or open files: for a moment, and a server has no second chance but its own."""
    make, tries = asyncio.create_subprocess_exec, []

    async def scarce(*words, **how):
        tries.append(words)
        if len(tries) == 1:
            raise OSError(24, "Too many open files")
        return await make(*words, **how)

    async def use() -> str:
        house = open_house(Settings(tmp_path, opener="fakeserve:open_engine"))
        async with house.living():
            job = await house.desk.submit(Order(Request("a sign")), LOCAL)
            return (await asyncio.wait_for(house.desk.wait(job.id, LOCAL), 20)).state

    monkeypatch.setattr(asyncio, "create_subprocess_exec", scarce)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{HERE}")
    assert asyncio.run(use()) == "done"


# -------------------------------------------------------------------- arithmetic
def test_times_count_the_workers():
    model = Model(Served("m", "m"), None, Pace(per_unit=1.0))
    model.hands = [SimpleNamespace(ready=True, waits=False) for _ in range(2)]  # type: ignore[list-item]
    assert ends([4, 4, 4, 4], model, []) == [4, 4, 8, 8]
    model.hands[1].ready = False  # type: ignore[misc]
    assert ends([4, 4], model, []) == [4, 8]
    model.hands.clear()
    assert ends([4, 4], model, []) == [4, 8]  # none is ready yet: as if there were one


def test_times_of_those_that_are_drawn(monkeypatch):
    monkeypatch.setattr("lanting.serve.state.left", lambda run, pace: run.steps)
    hands = [SimpleNamespace(ready=True, waits=False) for _ in range(2)]
    model = Model(Served("m", "m"), None, Pace(per_unit=1.0), hands)  # type: ignore[arg-type]
    runs = [Run(None, hand, steps=rest) for hand, rest in ((hands[0], 6), (hands[0], 10), (hands[1], 3))]  # type: ignore[arg-type]
    assert ends([1, 1, 9, 1], model, runs) == [4, 5, 14, 9]  # two that go together: 8 s for both
    assert ends([1], Model(Served("m", "m"), None), []) == [None]


def test_one_worker_of_each_model_is_told_nothing(tmp_path):
    models = (Served("nano", "nano", {"dtype": "float32"}), Served("b", "b"))
    for workers, machine in ((1, BIG), (None, SMALL)):
        told = posts(Settings(tmp_path, models, workers=workers), machine, {})
        assert told == (Post(models[0]), Post(models[1]))


def test_gpus_go_round_all_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    models = (Served("nano", "nano"), Served("b", "b"))
    told = posts(Settings(tmp_path, models, workers=3), BIG, {})
    assert [(post.served.name, post.number) for post in told] == [(n, i) for n in ("nano", "b") for i in (1, 2, 3)]
    assert [post.served.options["device"] for post in told] == ["cuda:0", "cuda:1"] * 3
    assert {post.environ["OMP_NUM_THREADS"] for post in told} == {"1"}
    assert "vram" not in told[0].served.options  # nano fits beside anything
    assert {(post.served.options["vram"], post.served.options["ram"]) for post in told[3:]} == {(20 * GIB, 8 * GIB)}
    auto = posts(Settings(tmp_path, models[1:], workers=None), BIG, {})
    assert [post.served.options["device"] for post in auto] == ["cuda:0", "cuda:1"]
    assert all("vram" not in post.served.options for post in auto)  # a card of its own


def test_what_the_user_says_holds_for_all(tmp_path, monkeypatch):
    given = Served("b", "b", {"device": "cuda:1", "vram": "10G"})
    told = posts(Settings(tmp_path, (given,), workers=2), BIG, {"OMP_NUM_THREADS": "5"})
    assert [post.served for post in told] == [given, given] and all(not post.environ for post in told)
    many = posts(Settings(tmp_path, (Served("b", "b", {"device": "cuda:0,cuda:1"}),), workers=2), BIG, {})
    assert {(post.served.options["device"], post.served.options["vram"]) for post in many} == {
        ("cuda:0,cuda:1", 30 * GIB)
    }
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    cpus = posts(Settings(tmp_path, (Served("b", "b"),), workers=4), SMALL, {})
    assert "device" not in cpus[0].served.options and cpus[0].served.options["ram"] == 12 * GIB
    assert {post.environ["OMP_NUM_THREADS"] for post in cpus} == {"1"}


def test_the_threads_reach_the_processes(tmp_path, monkeypatch):
    post = Post(Served("nano", "nano"), 1, {"OMP_NUM_THREADS": "3"})
    assert ProcessHand(Settings(tmp_path), post).opening["options"] == {}
    with running(tmp_path, workers=2) as server:  # it has OMP_NUM_THREADS=1 of its own: its workers have it too
        wait_for(lambda: all_ready(server, 2), 30)
        for child in children(server):
            assert b"OMP_NUM_THREADS=1\0" in Path(f"/proc/{child}/environ").read_bytes()


@pytest.mark.parametrize("wrong", ["two", "1.5", "", "-1", "²"])
def test_how_many_is_a_number_or_auto(wrong):
    assert how_many("auto") is None and how_many("12") == 12
    with pytest.raises(RequestError, match="--workers must be a whole number or auto"):
        how_many(wrong)


@pytest.mark.parametrize("wrong", [0, 257])
def test_how_many_has_bounds(tmp_path, wrong):
    with pytest.raises(RequestError, match="--workers must be a whole number from 1 to 256"):
        check(Settings(tmp_path, workers=wrong))
