"""Lanting's own API over a live server: submit, watch, cancel, search; every job ends somewhere."""

from __future__ import annotations

import io
import socket

import httpx
import pytest
from fakeserve import SOON, events, running, steps_after_cancelling, wait_for
from PIL import Image


def test_a_job_is_drawn_and_told_step_by_step(server):
    job = server.submit("a sign", seed=7, steps=5)
    assert job["state"] == "waiting" and job["request"]["seed"] == 7
    told = list(events(server, job["id"]))
    kinds = [kind for kind, _, _ in told]
    assert kinds[0] == "accepted" and kinds[-1] == "done"
    assert [body["step"] for kind, _, body in told if kind == "step"] == [1, 2, 3, 4, 5]
    numbers = [number for _, number, _ in told]
    assert numbers == sorted(set(numbers))
    done = server.get(f"/api/jobs/{job['id']}").json()
    assert (done["state"], done["recipes"][0]["request"]["steps"]) == ("done", 5)
    picture = server.get(done["images"][0]["url"])
    image = Image.open(io.BytesIO(picture.content))
    assert image.size == (224, 96) and image.getpixel((0, 0)) == (7, 10, 0)
    assert "Seed: 7" in image.info["parameters"]


def test_a_live_watcher_gets_previews_and_a_late_one_continues(server):
    job = server.submit("slow sign", steps=40)
    seen, pictured = [], False
    for kind, number, body in events(server, job["id"]):
        if kind == "step":
            seen.append(number)
            pictured = body.get("preview", "").startswith("data:image/jpeg;base64,")
        if len(seen) >= 3 and pictured:
            break
    assert pictured
    rest = list(events(server, job["id"], headers={"Last-Event-ID": str(seen[-1])}))
    steps = [body["step"] for kind, _, body in rest if kind == "step"]
    assert steps == list(range(len(seen) + 1, 41)) and rest[-1][0] == "done"
    assert [k for k, _, _ in events(server, job["id"])].count("step") == 40


def test_a_reader_may_say_anything_of_what_it_has_seen(server):
    """Numbers that SQLite has not are no numbers: the whole log comes, and an end."""
    job = server.ended(server.submit("a sign")["id"])["id"]
    for seen in (b"\xb2", b"9" * 30, b"9" * 5000, b"-1"):
        assert [kind for kind, _, _ in events(server, job, headers={"Last-Event-ID": seen})][-1] == "done"
    assert server.get(f"/api/jobs/{job}/events", params={"after": 10**30}).status_code == 422


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_pictures_keep_their_recipe_in_every_format(server, tmp_path, format):
    from lanting.core.recipe import read_recipe

    job = server.submit("a sign", seed=3, count=2)
    done = server.ended(job["id"])
    answer = server.get(done["images"][1]["url"], params={"format": format})
    assert answer.headers["content-type"] == f"image/{format}"
    assert answer.headers["x-content-type-options"] == "nosniff"
    path = tmp_path / f"x.{format}"
    path.write_bytes(answer.content)
    assert read_recipe(path).request["seed"] == 4


def test_cancel_a_running_job_within_a_step_and_a_waiting_one_at_once(server):
    running_, waiting = server.submit("slow", steps=100), server.submit("a sign")
    wait_for(lambda: "progress" in server.get(f"/api/jobs/{running_['id']}").json())
    assert server.post(f"/api/jobs/{waiting['id']}/cancel").json()["state"] == "cancelled"
    assert steps_after_cancelling(server, running_["id"]) <= SOON
    kinds = [kind for kind, _, _ in events(server, waiting["id"])]
    assert kinds == ["accepted", "cancelled"]
    again = server.post(f"/api/jobs/{waiting['id']}/cancel").json()
    assert again["state"] == "cancelled"


def test_engines_that_fail_are_told_in_general_words_and_logged_in_full(server):
    job = server.ended(server.submit("boom")["id"])
    assert job["state"] == "failed" and job["error"]["code"] == "drawing_failed"
    assert "passwd" not in str(job) and job["id"] in job["error"]["message"]
    assert "/etc/passwd" in server.log.read_text()
    job = server.ended(server.submit("sorry")["id"])
    assert job["error"] == {"code": "invalid_request", "message": "the prompt can't be drawn: say it differently"}
    assert server.ended(server.submit("a sign")["id"])["state"] == "done"


def test_a_worker_that_dies_three_times_is_reported_and_the_next_job_drawn(server):
    bad, good = server.submit("die", steps=6), server.submit("a sign")
    job = server.ended(bad["id"], 30)
    assert job["state"] == "failed" and "3 times" in job["error"]["message"]
    kinds = [kind for kind, _, _ in events(server, bad["id"])]
    assert kinds.count("started") == 3 and kinds.count("resumed") == 2  # from the checkpoint after step 2
    assert server.ended(good["id"])["state"] == "done"


def test_a_drawing_that_hangs_is_given_up(tmp_path):
    with running(tmp_path, timeout=0.5) as own:
        job = own.submit("slow", steps=60)
        assert own.ended(job["id"])["error"]["code"] == "timeout"
        assert own.ended(own.submit("a sign", timeout=5)["id"])["state"] == "done"


def test_the_same_idempotency_key_is_the_same_job(server):
    key = {"Idempotency-Key": "order-1"}
    first = server.submit("a sign", headers=key)
    assert server.submit("a sign", headers=key)["id"] == first["id"]
    for more in ({"prompt": "another"}, {"priority": "low"}, {"priority": "normal"}, {"timeout": 60}):
        other = server.post("/api/jobs", {"prompt": "a sign"} | more, headers=key)
        assert other.status_code == 409 and other.json()["error"]["code"] == "idempotency_conflict", more
    server.ended(first["id"])
    assert server.submit("a sign", headers=key)["state"] == "done"
    long = server.post("/api/jobs", {"prompt": "a sign"}, headers={"Idempotency-Key": "x" * 300})
    assert long.status_code == 400


def test_places_and_time_left(server):
    for _ in range(2):
        server.ended(server.submit("slow", steps=10)["id"])
    jobs = [server.submit("slow", steps=20)["id"] for _ in range(4)]
    told = wait_for(lambda: found if (found := server.get(f"/api/jobs/{jobs[3]}").json())["place"]["eta"] else None)
    assert told["place"]["ahead"] == 3
    kinds = [(kind, body) for kind, _, body in events(server, jobs[3])]
    places = [body["ahead"] for kind, body in kinds if kind == "place"]
    assert places and places == sorted(places, reverse=True)
    assert "place" not in server.get(f"/api/jobs/{jobs[3]}").json()


def test_history_is_searched(server):
    for words in ("a crimson boat", "a crimson tower", "一只红色的船"):
        server.ended(server.submit(words)["id"])
    found = server.get("/api/jobs", params={"search": "CRIMSON boat"}).json()["jobs"]
    assert [job["request"]["prompt"] for job in found] == ["a crimson boat"]
    assert len(server.get("/api/jobs", params={"search": "红色"}).json()["jobs"]) == 1
    newest = server.get("/api/jobs", params={"limit": 1}).json()["jobs"][0]
    older = server.get("/api/jobs", params={"limit": 1, "before": newest["created"]}).json()["jobs"][0]
    assert older["created"] < newest["created"]
    assert server.get("/api/jobs", params={"state": "failed", "search": "crimson"}).json()["jobs"] == []
    assert server.get("/api/jobs", params={"limit": 100000}).status_code == 422


def test_an_earlier_result_is_edited_by_its_name(server):
    first = server.ended(server.submit("a sign", seed=1)["id"])
    job = server.ended(server.submit("make it red", images=[f"job:{first['id']}/0"])["id"])
    assert job["recipes"][0]["task"] == "edit" and len(job["request"]["images"]) == 1
    wrong = server.post("/api/jobs", {"prompt": "x", "images": ["job:../../etc/passwd/0"]})
    assert wrong.status_code == 400


def test_prompts_reach_the_worker_whatever_the_locale(tmp_path, monkeypatch):
    """Orders are UTF-8, also where the machine reads and writes something else."""
    monkeypatch.setenv("PYTHONIOENCODING", "gb18030")
    with running(tmp_path, anew=True) as server:
        job = server.ended(server.submit("蓝色招牌“兰亭”")["id"])
    assert job["recipes"][0]["request"]["prompt"] == "蓝色招牌“兰亭”"


def test_loras_are_chosen_by_name(server):
    models = server.get("/api/models").json()["models"]
    assert [lora["name"] for lora in models[0]["loras"]] == ["ink", "fox"]
    job = server.ended(server.submit("a sign", lora={"fox": 0.5})["id"])
    assert [lora["strength"] for lora in job["recipes"][0]["loras"]] == [0.0, 0.5]
    job = server.ended(server.submit("a sign")["id"])
    assert [lora["strength"] for lora in job["recipes"][0]["loras"]] == [1.0, 1.0]
    answer = server.post("/api/jobs", {"prompt": "a sign", "lora": {"cat": 1}})
    assert answer.status_code == 400 and "no LoRA is called cat here" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "x", "size": "1000x1001"}, "multiples of 16"),
        ({"prompt": "x", "size": "4096x4096"}, "more than this server draws"),
        ({"prompt": "x", "count": 17}, "at most 16"),
        ({"prompt": "x", "steps": 201}, "at most 200"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "stepz": 3}, "stepz"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "x", "model": "nona"}, "nona"),
        ({"prompt": "x", "priority": "top"}, "priority"),
        ({"prompt": "x", "lora": {"ink": 11}}, "from -10 to 10"),
        ({"prompt": "x", "images": ["!"]}, "base64"),
        ({"prompt": "x", "images": ["https://example.com/x.png"]}, "fetches no addresses"),
        ({"prompt": "x", "timeout": -1}, "timeout"),
    ],
)
def test_wrong_requests_are_refused_in_one_sentence(server, body, word):
    answer = server.post("/api/jobs", body)
    assert answer.status_code in (400, 404, 422)
    assert word in answer.json()["error"]["message"]


def test_what_is_not_there(server):
    for path in ("/api/jobs/nothing", "/api/jobs/nothing/events", "/api/jobs/nothing/images/0", "/nowhere"):
        answer = server.get(path)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
    job = server.ended(server.submit("a sign")["id"])
    assert server.get(f"/api/jobs/{job['id']}/images/1").status_code == 404
    assert server.get(f"/api/jobs/{job['id']}/images/-1").status_code in (404, 422)
    assert server.get(f"/api/jobs/{job['id']}/images/0", params={"format": "gif"}).status_code == 400
    assert server.post("/api/jobs", content=b"{", headers={"Content-Type": "application/json"}).status_code == 422


def test_the_schema_and_the_meters(server):
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/api/jobs", "/v1/images/edits", "/api/generate", "/sdapi/v1/txt2img"} <= set(paths)
    page = server.get("/metrics").text
    assert 'lanting_jobs_ended_total{state="done"}' in page and "lanting_step_seconds_count" in page
    assert server.get("/healthz").json() == {"status": "ok"}
    assert server.get("/readyz").json() == {"status": "ready"}
    assert "Lanting is running" in server.get("/").text


def test_a_watcher_that_leaves_harms_nobody(server):
    job = server.submit("slow", steps=20)
    with httpx.stream("GET", f"{server.url}/api/jobs/{job['id']}/events", timeout=30) as answer:
        next(answer.iter_lines())
    assert server.ended(job["id"])["state"] == "done"


def test_head_is_get_without_a_body(server):
    """Load balancers ask whether it lives, clients how large a picture is and whether it is there."""
    done = server.ended(server.submit("a sign")["id"])
    picture = f"/api/jobs/{done['id']}/images/0"
    for path in ("/healthz", "/readyz", picture, f"{picture}?format=jpeg", f"/api/jobs/{done['id']}/images/7"):
        whole = server.get(path)
        asked = b"HEAD %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(asked + b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answers = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        head, _, rest = answers.partition(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        assert f" {whole.status_code} " in lines[0] and rest.startswith(b"HTTP/1.1 200"), path  # no body between
        for name in ("content-length", "content-type"):
            assert f"{name}: {whole.headers[name]}" in lines, path
