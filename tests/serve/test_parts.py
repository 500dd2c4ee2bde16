"""The server's parts by themselves: the ledger, the feed, files, and bodies that nobody would send."""

from __future__ import annotations

import asyncio
import base64
import logging
import shutil
import sqlite3
import time

import pytest
from fakeserve import running, wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient
from test_door import LOCALHOST
from test_openai import png

from lanting.core.types import Recipe, Request, Result
from lanting.serve.app import build_app
from lanting.serve.endings import conclude
from lanting.serve.errors import BusyError, StoreError
from lanting.serve.feed import UNREAD, Feed, Reader
from lanting.serve.files import Files, publish
from lanting.serve.guard import key_in
from lanting.serve.hand import ProcessHand
from lanting.serve.house import open_house
from lanting.serve.intake import Order
from lanting.serve.jobs import LOCAL, Event, unfinished
from lanting.serve.ledger import Ledger
from lanting.serve.logs import JsonLines
from lanting.serve.loras import lora_in, tags_in
from lanting.serve.settings import Settings
from lanting.serve.shift import following, mend
from lanting.serve.staff import Post
from lanting.serve.state import Run
from lanting.serve.worker import now_and_then


def test_the_ledger_keeps_what_it_said_it_kept(tmp_path):
    async def use() -> None:
        ledger = Ledger(tmp_path / "queue.sqlite")
        put = "INSERT INTO facts VALUES (?, ?)"
        await asyncio.gather(*(ledger.write(lambda db, n=n: db.execute(put, (f"{n}", "x"))) for n in range(300)))
        with pytest.raises(KeyError):
            await ledger.write(lambda db: (db.execute(put, ("half", "x")), {}["no"]))
        ledger.later(lambda db: db.execute(put, ("lazy", "x")))
        assert (
            await ledger.read(lambda db: db.execute("SELECT count(*) FROM facts WHERE name = 'half'").fetchone()[0])
            == 0
        )
        await ledger.write(lambda db: None)  # what was put before is written before
        with sqlite3.connect(tmp_path / "queue.sqlite") as other:
            names = {row[0] for row in other.execute("SELECT name FROM facts")}
        assert names == {*map(str, range(300)), "lazy"}
        ledger.later(lambda db: db.execute(put, ("last", "x")))
        await ledger.close()
        with sqlite3.connect(tmp_path / "queue.sqlite") as other:
            assert other.execute("SELECT count(*) FROM facts WHERE name = 'last'").fetchone()[0] == 1

    asyncio.run(use())


def test_a_ledger_that_is_none_or_of_the_future(tmp_path):
    (tmp_path / "bad.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match="--data"):
        Ledger(tmp_path / "bad.sqlite")
    with sqlite3.connect(tmp_path / "new.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="newer lanting"):
        Ledger(tmp_path / "new.sqlite")


def test_a_reader_that_does_not_read_costs_little_and_sees_the_end():
    reader = Reader()
    for number in range(10_000):
        reader.put(Event("j", number, "step"))
    reader.put(Event("j", 10_000, "done"))
    assert len(reader._events) == UNREAD

    async def drain() -> list[int]:
        return [(await reader.get()).seq for _ in range(UNREAD)]

    assert asyncio.run(drain())[-1] == 10_000


def test_the_feed_forgets_what_has_ended():
    feed = Feed()
    with feed.reader("j"):
        feed.put(Event("j", 1, "step", {}, b"preview"))
        assert feed.watched() == ["j"] and feed.said("j")[0].preview == b"preview"
        feed.put(Event("j", 2, "done"))
    assert feed.said("j") == feed.watched() == []


def result(count: int) -> Result:
    request = {"prompt": "x", "seed": 1, "size": [8, 8]}
    recipe = Recipe(request, "nano", "w", "text_to_image", {})
    return Result((Image.new("RGB", (8, 8)),) * count, (recipe,) * count, {"denoise": 1.0})


def test_who_comes_late_sees_the_last_preview_and_no_older_one():
    feed = Feed()
    for step, preview in enumerate((b"1", b"2", None), 1):
        feed.put(Event("a", step, "step", {"step": step}, preview))
    assert [(event.seq, event.preview) for event in feed.said("a")] == [(1, None), (2, b"2"), (3, None)]


def test_results_are_whole_or_not_there(tmp_path, monkeypatch):
    outcome = publish(result(2), tmp_path / "job")
    assert len(outcome["images"]) == 2 and sorted(path.name for path in (tmp_path / "job").iterdir())[0] == "0.png"
    publish(result(1), tmp_path / "job")  # a second run of the same job changes nothing
    assert (tmp_path / "job" / "1.png").exists()
    monkeypatch.setattr("lanting.serve.files.sync", lambda path: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError):
        publish(result(1), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_half_written_things_are_swept(tmp_path):
    files = Files(tmp_path)
    files.prepare()
    (files.results / ".job-1").mkdir()
    (files.results / ".job-1" / "0.png").touch()
    (files.pictures / ".abc").touch()
    files.prepare()
    assert [*files.results.iterdir(), *files.pictures.iterdir()] == []


def test_a_disk_that_cannot_be_written_fails_the_job_and_names_no_folder(tmp_path):
    with running(tmp_path) as server:
        folder = tmp_path / "data" / "results"
        folder.rmdir()
        folder.touch()
        job = server.ended(server.submit("a sign")["id"])
        assert job["state"] == "failed" and str(tmp_path) not in str(job)
        folder.unlink()
        folder.mkdir()
        assert server.ended(server.submit("a sign")["id"])["state"] == "done"


def test_a_picture_that_finds_no_room_is_drawn_again_when_there_is(tmp_path):
    """And pictures that come in are refused meanwhile, in words that a client can wait on."""
    with running(tmp_path) as server:
        folders = [tmp_path / "data" / name for name in ("results", "checkpoints", "pictures")]
        for folder in folders:
            folder.rmdir()
            folder.touch()
        job = server.submit("a sign")["id"]
        wait_for(lambda: "no room for a picture" in server.log.read_text())
        body = {"prompt": "x", "images": [base64.b64encode(png()).decode()]}
        answer = server.post("/api/jobs", body)
        assert answer.status_code == 503 and answer.headers["retry-after"] and str(tmp_path) not in answer.text
        assert server.get("/readyz").status_code == 503 and server.get(f"/api/jobs/{job}").json()["state"] == "waiting"
        for folder in folders:
            folder.unlink()
            folder.mkdir()
        assert server.ended(job)["state"] == "done"


def test_a_server_that_cannot_take_jobs_is_not_ready(tmp_path):
    with running(tmp_path) as server:
        wait_for(lambda: server.get("/readyz").status_code == 200)
        folders = [tmp_path / "data" / name for name in ("checkpoints", "pictures")]
        for folder in folders:
            folder.rmdir()
            folder.touch()
        body = {"prompt": "x", "images": [base64.b64encode(png()).decode()]}
        assert server.post("/api/jobs", body).status_code == 503
        for _ in range(2):
            assert server.get("/readyz").status_code == 503
            time.sleep(1)
        for folder in folders:
            folder.unlink()
            folder.mkdir()
        wait_for(lambda: server.get("/readyz").status_code == 200)


def test_meters_are_read_though_the_disk_is_gone(tmp_path):
    house = open_house(Settings(tmp_path / "data"))
    client = TestClient(build_app(house), base_url=LOCALHOST, raise_server_exceptions=False)
    shutil.rmtree(tmp_path / "data")
    answer = client.get("/metrics")
    assert answer.status_code == 200 and "lanting_disk_free_bytes 0.0" in answer.text


def test_a_disk_that_is_well_again_is_noticed_while_jobs_keep_coming(tmp_path):
    async def use() -> None:
        desk = open_house(Settings(tmp_path)).desk
        model, desk.well = desk.models["nano"], False
        hand = ProcessHand(desk.settings, Post(model.served))
        model.hands.append(hand)
        beside = [asyncio.create_task(come(desk)), asyncio.create_task(mend(desk))]
        async with asyncio.timeout(5):
            while await following(desk, model, hand) is None:
                pass
        for task in beside:
            task.cancel()

    async def come(desk) -> None:
        while True:
            await desk.submit(Order(Request("a sign")), LOCAL)
            await asyncio.sleep(0.05)

    asyncio.run(use())


def test_recipes_do_not_say_where_loras_are(server):
    job = server.ended(server.submit("a sign")["id"])
    assert [lora["path"] for lora in job["recipes"][0]["loras"]] == ["ink.safetensors", "fox.safetensors"]


def test_loras_in_words():
    assert lora_in(None) is None and lora_in("") is None
    assert lora_in("ink:0.8, fox") == {"ink": 0.8, "fox": 1.0} == lora_in('{"ink": 0.8, "fox": 1}')
    assert tags_in("a cat <lora:ink:0.8> asleep<lora:fox>") == ("a cat  asleep", {"ink": 0.8, "fox": 1.0})
    assert tags_in("a < b") == ("a < b", None)
    deep, half = '{"a":' * 100_000, '{"\\ud800": 1}'
    for wrong in ("ink:x", "{", "{1", '{"a": "b"}', deep, half, 5, ["ink"], {"\ud800": 1}):
        with pytest.raises(Exception, match="write"):
            lora_in(wrong)


def test_keys_in_headers():
    assert key_in({"authorization": "bearer  k "}) == "k" and key_in({}) == ""  # type: ignore[arg-type]
    for wrong in (base64.b64encode(b"\xff:x").decode(), "===", "\xe9\xe9"):
        assert key_in({"authorization": f"Basic {wrong}"}) == ""  # type: ignore[arg-type]


def test_a_client_that_leaves_while_its_job_is_written_leaves_no_half_of_it(tmp_path):
    """In the ledger and in the line, or in neither; and a cancelled one tells those who watch."""

    async def use() -> None:
        desk = open_house(Settings(tmp_path)).desk
        for moment in range(6):
            task = asyncio.create_task(desk.submit(Order(Request("a sign", seed=moment)), LOCAL))
            for _ in range(moment):
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.sleep(0.2)
        jobs = {job.id for job in await desk.ledger.read(unfinished)}
        assert jobs == set(desk.line.waiting) and 0 < len(jobs) < 6
        job = next(iter(jobs))
        watching = asyncio.create_task(desk.wait(job, LOCAL))
        await asyncio.sleep(0.05)
        leaving = asyncio.create_task(desk.cancel(job, LOCAL))
        await asyncio.sleep(0.001)
        leaving.cancel()
        ended = await asyncio.wait_for(watching, 5)
        assert ended.state == "cancelled" and job not in desk.line.waiting

    asyncio.run(use())


def test_cancelling_a_job_that_is_being_put_back_cancels_it(tmp_path):
    """Its worker died, and its client leaves in the moment in which that is written."""

    async def use() -> None:
        desk = open_house(Settings(tmp_path)).desk
        job, write = await desk.submit(Order(Request("a sign")), LOCAL), desk.ledger.write
        entry = desk.line.take("nano", time.time())
        assert entry is not None
        run = desk.runs[job.id] = Run(job)

        async def slow(act):
            desk.ledger.write = write  # type: ignore[method-assign]
            told = await write(act)
            await desk.cancel(job.id, LOCAL)
            return told

        desk.ledger.write = slow  # type: ignore[method-assign]
        await conclude(desk, desk.models["nano"], run, {"is": "dead"}, entry)
        assert (await desk.job(job.id, LOCAL)).state == "cancelled"
        assert not desk.runs and not desk.line.waiting and not desk.line.drawing

    asyncio.run(use())


def test_places_are_right_in_the_moment_in_which_somebody_comes_begins_or_ends(tmp_path):
    """They are computed now and then; what was told meanwhile was one too many or too few."""

    async def use() -> None:
        desk = open_house(Settings(tmp_path)).desk
        jobs = [await desk.submit(Order(Request("a sign")), LOCAL) for _ in range(3)]

        def ahead() -> list[int]:
            return [place.ahead for job in jobs if (place := desk.place(job)) is not None]

        assert ahead() == [0, 1, 2]
        assert desk.line.take("nano", time.time()) is not None and ahead() == [0, 1, 2]  # one is drawn
        jobs.append(await desk.submit(Order(Request("a sign")), LOCAL))
        assert ahead() == [0, 1, 2, 3]
        desk.line.finished(jobs.pop(0).id)
        assert ahead() == [0, 1, 2]
        await desk.cancel(jobs.pop(1).id, LOCAL)
        assert ahead() == [0, 1]

    asyncio.run(use())


def test_log_lines_are_json_with_their_values():
    import json

    record = logging.makeLogRecord({"msg": "job ended", "levelname": "INFO", "name": "x", "job": "1", "trace": None})
    told = json.loads(JsonLines().format(record))
    assert told["event"] == "job ended" and told["job"] == "1" and "trace" not in told


# ---------------------------------------------------------------- nothing a client sends makes a 500
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.just(base64.b64encode(png()).decode()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "prompt model n size quality background output_format stream partial_images seed steps negative_prompt lora images"
)
FIELDS += (
    " guidance_scale strength mask image count options task priority timeout width height cfg_scale batch_size n_iter"
)
FIELDS += " init_images denoising_strength mask_blur override_settings name sd_model_checkpoint response_format"
BODIES = st.dictionaries(st.sampled_from(FIELDS.split()), VALUES, max_size=6)
PATHS = (
    "/api/jobs",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/images/variations",
    "/api/generate",
    "/api/show",
)
PATHS += ("/api/pull", "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/options", "/sdapi/v1/png-info")


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """An application that checks everything and then has no room, so that nothing waits for a worker."""
    house = open_house(Settings(tmp_path_factory.mktemp("fuzz")))

    async def full(*_: object) -> None:
        raise BusyError("the queue is full: {count} jobs wait; try again in a moment", count=0)

    house.desk._accept = full  # type: ignore[method-assign,assignment]
    return TestClient(build_app(house), base_url=LOCALHOST, raise_server_exceptions=False)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), body=BODIES | VALUES)
def test_bodies_of_chance(refusing, path, body):
    import json

    answer = refusing.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, answer.text


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(PATHS),
    data=st.binary(max_size=400),
    kind=st.sampled_from(["application/json", "multipart/form-data", "multipart/form-data; boundary=x", "text/plain"]),
)
def test_bytes_of_chance(refusing, path, data, kind):
    answer = refusing.post(path, content=data, headers={"Content-Type": kind})
    assert answer.status_code < 500, answer.text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=8))
def test_pictures_of_chance(refusing, cut, flips):
    data = bytearray(png((40, 30)))
    for at, value in flips:
        data[at % len(data)] = value
    files = {"image": ("x.png", bytes(data[:cut]), "image/png")}
    answer = refusing.post("/v1/images/edits", data={"prompt": "x"}, files=files)
    assert answer.status_code < 500, answer.text


ODD = (
    ("/v1/images/edits", "application/json", b"[" * 200_000),
    ("/v1/images/edits", "multipart/form-data; boundary=x; charset=undefined", b""),
    ("/api/jobs", "application/json", b'{"prompt": "x", "images": ["job:%s/\xc2\xb2"]}' % (b"0" * 24)),
    ("/api/jobs", "application/json", b'{"prompt": "x", "images": ["job:%s/%s"]}' % (b"0" * 24, b"9" * 5000)),
)


@pytest.mark.parametrize(("path", "kind", "data"), ODD)
def test_odd_bodies_are_refused_in_words(refusing, path, kind, data):
    data = data or b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--x--\r\n'
    answer = refusing.post(path, content=data, headers={"Content-Type": kind})
    assert 400 <= answer.status_code < 429, answer.text


HALVES = (  # JSON can hold half a letter, which no UTF-8 has
    ("/api/jobs", '{"prompt": "x", "options": {"batched_guidance": "\\ud800"}}'),
    ("/api/jobs", '{"prompt": "x", "options": {"\\ud800": 1}}'),
    ("/v1/images/generations", '{"prompt": "x", "lora": "{\\"\\\\ud800\\": 1}"}'),
    ("/v1/images/edits", '{"prompt": "x", "image": "\\ud800"}'),
    ("/api/generate", '{"prompt": "x", "options": {"seed": "\\ud800"}}'),
    ("/api/generate", '{"prompt": "x", "options": {"lora": {"\\ud800": 1}}}'),
    ("/sdapi/v1/txt2img", '{"prompt": "x", "override_settings": {"x": ["\\ud800"]}}'),
    ("/sdapi/v1/txt2img", '{"prompt": "x", "override_settings": {"sd_model_checkpoint": "\\ud800"}}'),
)


@pytest.mark.parametrize(("path", "body"), HALVES)
def test_half_a_letter_is_refused_in_words(refusing, path, body):
    answer = refusing.post(path, content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 429, answer.text


def test_time_is_told_in_events():
    assert abs(Event("j", int(time.time() * 1000), "step").at - time.time()) < 1


def test_previews_come_now_and_then(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("lanting.serve.worker.time.monotonic", lambda: clock[0])
    due = now_and_then(0.25)
    seen = []
    for _ in range(40):
        clock[0] += 0.02
        seen.append(due())
    assert seen.count(True) == 3 and not seen[0]  # of 0.8 s
    clock[0] += 1
    assert due() and not due()
