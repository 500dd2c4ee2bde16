"""Ollama's own client against a live server."""

from __future__ import annotations

import base64
import io

import httpx
import ollama
import pytest
from PIL import Image
from test_openai import opened, png


@pytest.fixture(scope="module")
def client(server):
    return ollama.Client(host=server.url)


def test_generate_streams_steps_then_the_picture(client):
    lines = list(client.generate("nano", "a sign", width=64, height=32, steps=5, options={"seed": 9}, stream=True))
    assert [(line.completed, line.total) for line in lines[:-1]] == [(step, 5) for step in range(1, 6)]
    assert lines[-1].done and lines[-1].done_reason == "stop" and lines[-1].total_duration > 0
    assert opened(lines[-1].image).getpixel((0, 0))[0] == 9
    assert opened(lines[-1].image).size == (64, 32)


def test_generate_at_once_and_edit(client):
    answer = client.generate("nano:latest", "a sign", steps=4)
    assert opened(answer.image).size == (224, 96)
    edited = client.generate("nano", "make it red", images=[png()])
    assert opened(edited.image).getpixel((0, 0))[2] == 1


def test_curl_as_ollamas_own_pages_have_it(server):
    """`curl URL -d '{...}'` says that it sends a form."""
    body = b'{"model": "nano", "prompt": "a sign", "stream": false}'
    headers = {"Content-Type": "application/x-www-form-urlencoded", "User-Agent": "curl/8.5.0", "Accept": "*/*"}
    answer = server.post("/api/generate", content=body, headers=headers)
    assert answer.status_code == 200 and opened(answer.json()["image"]).size == (224, 96)


def test_an_empty_prompt_loads(client):
    assert client.generate("nano", "").done_reason == "load"


def test_what_is_there(client, server):
    assert [model.model for model in client.list().models] == ["nano:latest"]
    assert [model.model for model in client.ps().models] == ["nano:latest"]
    shown = client.show("nano")
    assert "image" in shown.capabilities and shown.modelinfo["general.architecture"] == "qwen-image"
    assert client.pull("nano").status == "success"
    assert [line.status for line in client.pull("nano", stream=True)][-1] == "success"
    assert server.get("/api/version").json()["version"]


def test_errors(client, server):
    with pytest.raises(ollama.ResponseError) as error:
        client.generate("nona", "a sign")
    assert error.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="lanting pull"):
        client.pull("qwen-image")
    with pytest.raises(ollama.ResponseError, match="say it differently"):
        list(client.generate("nano", "sorry", stream=True))
    assert "error" in server.post("/api/generate", {"model": "nano", "prompt": "x", "width": 100}).json()
    for ask in (lambda: client.embed("nano", "x"), lambda: client.delete("nano"), lambda: client.copy("nano", "other")):
        with pytest.raises(ollama.ResponseError, match=r"^there is nothing at this address"):  # a sentence, no object
            ask()


def test_a_reader_that_leaves_cancels(server):
    body = {"model": "nano", "prompt": "slow ollama", "steps": 60}
    with httpx.stream("POST", f"{server.url}/api/generate", json=body, timeout=10) as answer:
        next(answer.iter_lines())
    found = server.get("/api/jobs", params={"search": "slow ollama"}).json()["jobs"][0]
    assert server.ended(found["id"])["state"] == "cancelled"


def test_pictures_are_real_files(client):
    data = base64.b64decode(client.generate("nano", "a sign", options={"seed": 3}).image)
    assert "Seed: 3" in Image.open(io.BytesIO(data)).info["parameters"]
