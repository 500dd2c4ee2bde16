"""Who is next, and how long it takes: arithmetic, and the same through a live server with keys."""

from __future__ import annotations

import sqlite3
from collections import Counter

import pytest
from fakeserve import running, wait_for
from hypothesis import given
from hypothesis import strategies as st

from lanting.core.types import Request
from lanting.serve.keys import create, listed, revoke
from lanting.serve.line import PATIENCE, Entry, Line
from lanting.serve.pace import Pace, units


def drained(line: Line, now: float = 0.0) -> list[str]:
    order = []
    while (entry := line.take("m", now)) is not None:
        order.append(entry.id)
        line.drawing.pop(entry.id)
    return order


def entry(id_: str, owner: str = "a", priority: int = 0, created: float = 0.0, **more: float) -> Entry:
    return Entry(id_, owner, "m", priority, created, more.get("cost", 1.0), more.get("share", 1.0))


def test_one_keys_jobs_come_in_order():
    line = Line()
    for number in range(3):
        line.add(entry(str(number), created=number))
    assert drained(line) == ["0", "1", "2"]


def test_a_crowd_does_not_hold_up_a_single_job():
    line = Line()
    for number in range(100):
        line.add(entry(f"a{number:02}", created=number))
    line.take("m", 100)
    line.add(entry("b", "b", created=100))
    assert drained(line, 101).index("b") <= 1


def test_shares_are_kept():
    line = Line()
    for number in range(60):
        line.add(entry(f"a{number}", "a", created=number, share=2.0))
        line.add(entry(f"b{number}", "b", created=number))
    first = Counter(name[0] for name in drained(line)[:30])
    assert first == {"a": 20, "b": 10}


def test_dear_jobs_count_for_more():
    line = Line()
    for number in range(10):
        line.add(entry(f"a{number}", "a", created=number, cost=10))
        line.add(entry(f"b{number}", "b", created=number, cost=1))
    assert Counter(name[0] for name in drained(line)[:11]) == {"a": 1, "b": 10}


def test_priorities_and_patience():
    line = Line()
    line.add(entry("low", priority=-1, created=0))
    line.add(entry("normal", created=1))
    line.add(entry("high", "b", priority=1, created=2))
    assert [one.id for one in line.order("m", 3)] == ["high", "normal", "low"]
    assert next(one.id for one in line.order("m", 2 * PATIENCE + 5)) in ("low", "high")  # it has waited long enough


def test_idling_saves_nothing_up():
    line = Line()
    line.served = {"b": 0.0}
    for number in range(5):
        line.add(entry(f"a{number}", "a", created=number))
    for _ in range(3):
        line.take("m", 9)
    line.add(entry("b0", "b", created=10))
    line.add(entry("b1", "b", created=11))
    order = drained(line, 12)
    assert order.index("a3") < order.index("b1")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1), st.floats(0.1, 9)), max_size=40))
def test_the_foretold_order_is_the_order(jobs):
    line = Line()
    for number, (owner, priority, cost) in enumerate(jobs):
        line.add(entry(f"{number}", owner, priority, number, cost=cost))
    foretold = [one.id for one in line.order("m", 50.0)]
    assert drained(line, 50.0) == foretold and len(foretold) == len(jobs)


def test_put_back_is_not_charged_twice():
    line = Line()
    line.add(entry("a0"))
    line.add(entry("b0", "b", created=1))
    taken = line.take("m", 2)
    line.returned(taken)
    assert [one.id for one in line.order("m", 2)] == ["a0", "b0"] and line.served["a"] == 0


def test_pace_learns_and_prices():
    request = Request("x", size=(256, 256), steps=10, guidance_scale=4.0, count=2)
    assert units(request) == 256 * 10 * 2 * 2
    pace = Pace()
    assert pace.seconds(100) is None
    pace.learn(100, {"load": 9, "encode": 1, "denoise": 10, "decode": 1})
    assert pace.seconds(50) == 5 + 2
    pace.learn(100, {"denoise": 20})
    assert 10 < pace.seconds(100) < 22


# ---------------------------------------------------------------- keys, and fairness through a live server
def test_keys_are_shown_once_and_kept_as_hashes(tmp_path):
    text = create(tmp_path, "Anna", share=2.0, priority="high")
    assert text.startswith("lk-") and len(text) == 3 + 8 + 1 + 43
    key = listed(tmp_path)[0]
    assert (key.name, key.share, key.top) == ("Anna", 2.0, 1)
    with sqlite3.connect(tmp_path / "queue.sqlite") as db:
        assert text.split("-", 2)[2] not in str(db.execute("SELECT * FROM keys").fetchall())
    for name, word in (("Anna", "already"), ("", "1 to 60"), ("a\nb", "1 to 60")):
        with pytest.raises(Exception, match=word):
            create(tmp_path, name)
    assert revoke(tmp_path, "Anna").id == key.id
    with pytest.raises(Exception, match="no key is called"):
        revoke(tmp_path, "Anna")
    create(tmp_path, "Anna")  # the name is free again


def test_keys_share_a_server_fairly_and_see_only_their_own(tmp_path):
    data = tmp_path / "data"
    crowd, single, weak = (create(data, name, priority=p) for name, p in (("c", "normal"), ("s", "high"), ("w", "low")))
    with running(tmp_path, keys=True, caps={"waiting": 40}) as server:

        def by(key: str) -> dict:
            return {"headers": {"Authorization": f"Bearer {key}"}}

        wait_for(lambda: server.get("/readyz").status_code == 200)
        crowded = [server.submit("slow", steps=4, **by(crowd))["id"] for _ in range(15)]
        alone = [server.submit("slow", steps=4, **by(single))["id"] for _ in range(2)]
        first, last = (server.ended(job, **by(single)) for job in alone)
        theirs = [server.get(f"/api/jobs/{job}", **by(crowd)).json()["started"] for job in crowded]
        between = [start for start in theirs if start is not None and first["created"] < start < last["started"]]
        assert len(between) <= 3  # in turns, whatever had waited before
        assert server.get(f"/api/jobs/{crowded[0]}", **by(single)).status_code == 404
        assert server.post(f"/api/jobs/{crowded[9]}/cancel", **by(single)).status_code == 404
        mine = server.get("/api/jobs", **by(single)).json()["jobs"]
        assert sorted(job["id"] for job in mine) == sorted(alone)
        assert server.post("/api/jobs", {"prompt": "x", "priority": "normal"}, **by(weak)).status_code == 403
        answers = [server.post("/api/jobs", {"prompt": "slow", "steps": 50}, **by(crowd)) for _ in range(25)]
        full = next(answer for answer in answers if answer.status_code == 429)  # half of the places are the most
        assert int(full.headers["retry-after"]) >= 1 and full.json()["error"]["code"] == "queue_full"
        assert server.post("/api/jobs", {"prompt": "x"}, **by(single)).status_code == 202


def test_a_key_of_low_priority_draws_by_every_client(tmp_path):
    """Who says nothing of a priority asks for normal, which such a key may not: every dialect but ours answered 403."""
    key = create(tmp_path / "data", "nightly batch", priority="low")
    with running(tmp_path, keys=True) as server:
        by = {"headers": {"Authorization": f"Bearer {key}"}}
        wait_for(lambda: server.get("/readyz").status_code == 200)
        assert server.submit("x", **by)["state"] in ("waiting", "running")
        small = {"model": "nano", "prompt": "x", "steps": 1, "stream": False}
        for path in ("/v1/images/generations", "/api/generate", "/sdapi/v1/txt2img"):
            assert server.post(path, small, **by).status_code == 200, path
        refused = server.post("/api/jobs", {"prompt": "x", "priority": "normal"}, **by)
        assert refused.status_code == 403 and "use low" in refused.json()["error"]["message"]
    with sqlite3.connect(tmp_path / "data" / "queue.sqlite") as db:
        assert db.execute("SELECT DISTINCT priority FROM jobs").fetchall() == [(-1,)]


def test_the_queue_is_bounded(tmp_path):
    with running(tmp_path, caps={"waiting": 3}) as server:
        answers = [server.post("/api/jobs", {"prompt": "slow", "steps": 40}) for _ in range(8)]
        full = [answer for answer in answers if answer.status_code == 429]
        assert 3 <= len(full) <= 5 and full[0].headers["retry-after"]
        theirs = server.post("/v1/images/generations", {"prompt": "x"})
        assert theirs.status_code == 429 and theirs.json()["error"]["type"] == "rate_limit_error"
