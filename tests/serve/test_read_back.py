"""Words that are read back: asked for and told in every dialect, drawn again, refused where nobody can read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fakeserve import events, running, wait_for

from lanting.core.types import Request
from lanting.serve.intake import alike
from lanting.serve.pace import Pace
from lanting.specs import get_spec, settle

SMALL = {"size": "64x64", "steps": 2}
SIGN = 'a sign "OPEN"'
RIGHT = {"asked": ["OPEN"], "read": ["OPEN"], "right": True, "tries": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("reader")) as server:
        wait_for(lambda: server.get("/readyz").status_code == 200)
        yield server


def test_it_is_drawn_until_it_is_right(server):
    job = server.submit(SIGN, seed=2, tries=5, **SMALL)
    told = [(kind, body) for kind, _, body in events(server, job["id"])]
    assert [body["message"] for kind, body in told if kind == "notice"] == [
        f"it reads OPEM: drawn again, try {number} of 5" for number in (2, 3)
    ]
    done = server.ended(job["id"])
    assert done["images"][0]["text"] == RIGHT
    assert done["recipes"][0]["request"]["seed"] == 4 and "tries" not in done["recipes"][0]["request"]
    assert done["request"]["tries"] == 5 and done["seconds"]["read"] >= 0


def test_what_is_never_right_is_told_as_it_is(server):
    job = server.ended(server.submit('a sign "SHUT"', seed=1, tries=2, **SMALL)["id"])
    assert job["images"][0]["text"] == {"asked": ["SHUT"], "read": ["OPEM"], "right": False, "tries": 2}
    silent = server.ended(server.submit(SIGN, seed=1, **SMALL)["id"])
    assert "text" not in silent["images"][0] and "read" not in silent["seconds"]


def test_every_dialect_asks_and_is_told(server):
    body = {"prompt": SIGN, "seed": 2, "steps": 2, "tries": 4}
    openai = server.post("/v1/images/generations", {**body, "size": "64x64"}).json()["data"][0]
    assert openai["text"] == RIGHT and openai["seed"] == 4
    own = {"seed": 2, "tries": 4}
    ollama = {"model": "nano", "prompt": SIGN, "width": 64, "height": 64, "steps": 2, "stream": False, "options": own}
    assert server.post("/api/generate", ollama).json()["text"] == RIGHT
    assert server.get("/api/models").json()["models"][0]["reads"] is True


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": "a sign", "tries": 2}, "quoted words"),
        ({"prompt": SIGN, "tries": 0}, "from 1 to 64"),
        ({"prompt": SIGN, "tries": 9}, "at most 8"),
    ],
)
def test_what_can_not_be_read_is_refused(server, body, words):
    for path in ("/api/jobs", "/v1/images/generations"):
        answer = server.post(path, {**body})
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_without_a_reader_it_is_refused_before_it_waits(tmp_path):
    with running(tmp_path, options={"reads": False}) as server:
        wait_for(lambda: server.get("/readyz").status_code == 200)
        assert server.get("/api/models").json()["models"][0]["reads"] is False
        answer = server.post("/api/jobs", {"prompt": SIGN, "tries": 2})
        assert answer.status_code == 400 and "pip install" in answer.json()["error"]["message"]
        assert server.post("/api/jobs", {"prompt": SIGN}).status_code == 202


def test_who_reads_is_drawn_alone():
    plain, wish = (settle(Request(SIGN, seed=1, tries=tries), get_spec("nano")) for tries in (None, 2))
    assert alike(plain, None) != alike(wish, None)


def test_a_job_drawn_again_teaches_the_pace_of_one():
    once, thrice = Pace(), Pace()
    once.learn(10.0, {"denoise": 1.0})
    thrice.learn(10.0 * 3, {"denoise": 3.0})
    assert once.per_unit == pytest.approx(thrice.per_unit)


def test_a_worker_that_dies_in_a_later_try_begins_again(tmp_path):
    """Its checkpoint is of another seed than the first."""
    with running(tmp_path, every=1) as server:
        job = server.submit('a slow sign "OPEN"', seed=2, tries=5, size="64x64", steps=10)["id"]
        kinds = []
        for kind, _, body in events(server, job):
            kinds.append(kind)
            if kind == "notice" and "try 3" in body["message"] and "interrupted" not in kinds:
                wait_for(lambda: server.get(f"/api/jobs/{job}").json().get("progress", {}).get("step", 0) in (2, 3, 4))
                children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
                subprocess.run(["kill", "-9", *children], check=True)
        assert kinds.count("interrupted") == 1 and kinds[-1] == "done"
        assert server.ended(job)["images"][0]["text"] == RIGHT
