"""Rewritten prompts through a server: asked for, by default, told in every dialect, refused where nobody can write."""

from __future__ import annotations

import json

import pytest
from fakeserve import events, running, wait_for

from lanting.core.types import Request
from lanting.serve.intake import alike, by_default
from lanting.specs import get_spec, settle

SMALL = {"size": "64x64", "steps": 2}


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A server whose engine can write; its prompts are left alone unless a request says otherwise."""
    with running(tmp_path_factory.mktemp("writer"), names=["qwen-image"], options={"release": "qwen-image"}) as server:
        yield server


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """The same, with rewriting by default."""
    how = {"names": ["qwen-image"], "options": {"release": "qwen-image"}, "rewrite": True}
    with running(tmp_path_factory.mktemp("eager"), **how) as server:
        yield server


def drawn(server, prompt="a cat", **more):
    job = server.ended(server.submit(prompt, **SMALL, **more)["id"])
    assert job["state"] == "done", job
    return job


def test_a_request_may_ask_for_it(writer):
    job = drawn(writer, rewrite=True)
    told = job["recipes"][0]["request"]
    assert (told["prompt"], told["asked"]) == ("a cat, in detail", "a cat")
    assert (job["request"]["prompt"], job["request"]["rewrite"]) == ("a cat", True)
    for values in ({}, {"rewrite": False}):
        told = drawn(writer, **values)["recipes"][0]["request"]
        assert told["prompt"] == "a cat" and "asked" not in told


def test_why_a_prompt_stays_is_told_on_the_way(writer):
    job = writer.submit("a shy cat", rewrite=True, **SMALL)
    told = [(kind, body) for kind, _, body in events(writer, job["id"])]
    assert [body["message"] for kind, body in told if kind == "notice"] == ["a shy cat stays: it is shy"]
    assert [kind for kind, _ in told].index("notice") < [kind for kind, _ in told].index("step")
    request = writer.ended(job["id"])["recipes"][0]["request"]
    assert (request["prompt"], request["unwritten"]) == ("a shy cat", "it is shy")


def test_a_server_may_do_it_by_default(eager):
    assert drawn(eager)["recipes"][0]["request"]["prompt"] == "a cat, in detail"
    assert drawn(eager, rewrite=False)["recipes"][0]["request"]["prompt"] == "a cat"
    told = eager.post("/sdapi/v1/txt2img", {"prompt": "a dog", "width": 64, "height": 64, "steps": 2}).json()
    info = json.loads(told["info"])
    assert info["prompt"] == "a dog, in detail" and 'Asked: "a dog"' in info["infotexts"][0]
    assert eager.get("/api/models").json()["models"][0]["rewrites"] is True


def test_openai_is_told_the_revised_prompt(writer, eager):
    def asked(server, prompt="a cat", **more):
        body = {"prompt": prompt, "size": "64x64", "steps": 2, **more}
        return server.post("/v1/images/generations", body).json()["data"][0]

    assert asked(writer, rewrite=True)["revised_prompt"] == "a cat, in detail"
    assert asked(eager)["revised_prompt"] == "a cat, in detail"
    for one in (asked(writer), asked(eager, rewrite=False), asked(eager, "a shy cat")):
        assert "revised_prompt" not in one


def test_ollama_may_ask_for_it(writer):
    body = {"model": "qwen-image", "prompt": "a cat", "width": 64, "height": 64, "steps": 2, "stream": False}
    assert writer.post("/api/generate", {**body, "options": {"rewrite": True}}).json()["done"]
    newest = writer.get("/api/jobs?limit=1").json()["jobs"][0]
    assert newest["recipes"][0]["request"]["asked"] == "a cat"
    answer = writer.post("/api/generate", {**body, "options": {"rewrite": "often"}})
    assert answer.status_code == 400 and "rewrite must be true or false" in answer.json()["error"]


def test_a_model_that_can_not_write_refuses(server, tmp_path):
    answer = server.post("/api/jobs", {"prompt": "a sign", "rewrite": True})
    assert answer.status_code == 400 and "nano can't rewrite prompts" in answer.json()["error"]["message"]
    answer = server.post("/v1/images/generations", {"prompt": "a sign", "rewrite": True})
    assert answer.status_code == 400 and "nano can't rewrite prompts" in answer.json()["error"]["message"]
    assert server.get("/api/models").json()["models"][0]["rewrites"] is False
    with running(tmp_path / "nano", rewrite=True) as other:  # by default only where the model can
        assert other.ended(other.submit("a sign")["id"])["state"] == "done"


def test_the_same_key_is_the_same_wish(writer):
    headers = {"Idempotency-Key": "once"}
    first = writer.submit("a cat", rewrite=True, headers=headers, **SMALL, seed=1)
    assert writer.submit("a cat", rewrite=True, headers=headers, **SMALL, seed=1)["id"] == first["id"]
    other = writer.post("/api/jobs", {"prompt": "a cat", **SMALL, "seed": 1}, headers=headers)
    assert other.status_code == 409


def test_a_server_with_other_defaults_knows_the_wish_again(tmp_path):
    """What is compared is what came, not what this server makes of it."""
    ask, how = {"prompt": "a cat", **SMALL, "seed": 1}, {"headers": {"Idempotency-Key": "once"}}
    release = {"options": {"release": "qwen-image"}}
    with running(tmp_path, names=["first"], rewrite=True, **release) as server:
        wait_for(lambda: server.get("/readyz").status_code == 200)
        asked = server.post("/api/jobs", ask, **how).json()
        server.ended(asked["id"])
    with running(tmp_path, names=["second", "first"], **release) as server:
        wait_for(lambda: server.get("/readyz").status_code == 200)
        again = server.post("/api/jobs", ask, **how)
        assert again.status_code == 202 and again.json()["id"] == asked["id"]
        assert again.json()["request"]["rewrite"] is True  # as it was drawn
        for other in ({"rewrite": False}, {"rewrite": True}, {"model": "second"}):
            assert server.post("/api/jobs", ask | other, **how).status_code == 409, other


def test_defaults_and_company():
    writes, reads = get_spec("qwen-image"), get_spec("nano")
    assert by_default(Request("a cat"), writes, True).rewrite is True
    kept = [by_default(Request("a cat"), writes, False), by_default(Request("a cat"), reads, True)]
    kept += [by_default(Request("a cat", rewrite=False), writes, True), by_default(Request(""), writes, True)]
    assert not any(one.rewrite for one in kept)
    plain, wish = (settle(Request("a cat", seed=1, rewrite=one), writes) for one in (None, True))
    assert alike(plain, None) != alike(wish, None)
    assert alike(plain, None) == alike(settle(Request("a dog", seed=2), writes), None)
