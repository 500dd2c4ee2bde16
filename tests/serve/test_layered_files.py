"""All layers of a job as one file: who gets it, what is in it, and how much work it may be."""

from __future__ import annotations

import asyncio
import base64
import io
import sys
import threading

import pytest
from fakeserve import running
from layeredfakes import bar
from PIL import Image
from psd_tools import PSDImage
from starlette.testclient import TestClient
from test_openai import png

from lanting.core.errors import OutputError
from lanting.core.layered import KINDS, unpack
from lanting.core.recipe import read_recipe
from lanting.core.stack import spread
from lanting.serve import layered
from lanting.serve.app import build_app
from lanting.serve.errors import BusyError, answer_to
from lanting.serve.house import open_house
from lanting.serve.keys import create
from lanting.serve.settings import Served, Settings


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server that asks for keys, two keys, and a finished job of the first: two pictures of three layers."""
    folder = tmp_path_factory.mktemp("layered")
    (folder / "data").mkdir()
    mine, theirs = ({"Authorization": f"Bearer {create(folder / 'data', name)}"} for name in ("Anna", "Ben"))
    names = ["qwen-image-layered", "nano"]
    with running(folder, keys=True, names=names, opener="layeredfakes:open_engine") as server:
        told = {"images": [base64.b64encode(png((64, 48))).decode()], "count": 2, "options": {"layers": 3}, "steps": 2}
        job = server.submit("a poster", **told, seed=7, headers=mine)
        assert server.ended(job["id"], headers=mine)["state"] == "done"
        yield server, job["id"], mine, theirs


@pytest.mark.parametrize("ending", sorted(KINDS))
def test_each_picture_is_one_file_with_its_recipe(guarded, ending, tmp_path):
    server, job, mine, _ = guarded
    for index in range(2):
        answer = server.get(f"/api/jobs/{job}/layers/{index}", params={"format": ending[1:]}, headers=mine)
        assert answer.status_code == 200 and answer.headers["content-type"] == KINDS[ending]
        assert answer.headers["content-disposition"] == f'attachment; filename="{job}-{index + 1}{ending}"'
        stack = unpack(answer.content, "x")
        assert [layer.name for layer in stack.layers] == ["Layer 1", "Layer 2", "Layer 3"]
        for number, layer in enumerate(stack.layers):
            assert spread(layer, stack.size).tobytes() == bar(index, number).tobytes()
        path = tmp_path / f"x{ending}"
        path.write_bytes(answer.content)
        assert read_recipe(path).request["seed"] == 7 + index


def test_layers_are_called_as_the_client_speaks(guarded):
    server, job, mine, _ = guarded
    answer = server.get(f"/api/jobs/{job}/layers/0?language=zh", headers=mine)
    assert [layer.name for layer in PSDImage.open(io.BytesIO(answer.content))] == ["图层 1", "图层 2", "图层 3"]


def test_others_get_nothing_and_what_is_not_there_is_missing(guarded):
    server, job, mine, theirs = guarded
    path = f"/api/jobs/{job}/layers/0"
    statuses = [server.get(path, headers=headers).status_code for headers in ({}, theirs, mine)]
    assert statuses == [401, 404, 200]
    for index in (2, -1, 10**30):
        assert server.get(f"/api/jobs/{job}/layers/{index}", headers=mine).status_code == 404
    assert server.get(f"/api/jobs/{'0' * 24}/layers/0", headers=mine).status_code == 404
    for wrong in (f"{path}?format=gif", f"{path}?language=xx", f"/api/jobs/{job}/layers/x"):
        answer = server.get(wrong, headers=mine)
        assert answer.status_code == 422 and answer.json()["error"]["message"]


def test_a_picture_without_layers_is_one_and_one_not_drawn_is_missing(guarded):
    server, _, mine, _ = guarded
    job = server.submit("slow sign", model="nano", seed=3, steps=20, headers=mine)["id"]
    assert server.get(f"/api/jobs/{job}/layers/0", headers=mine).status_code == 404
    assert server.ended(job, headers=mine)["state"] == "done"
    (layer,) = PSDImage.open(io.BytesIO(server.get(f"/api/jobs/{job}/layers/0", headers=mine).content))
    assert layer.topil().getpixel((0, 0)) == (3, 10, 0, 255)


def test_one_file_is_made_at_a_time_and_only_some_may_wait(monkeypatch):
    inside, most, go = [0], [0], threading.Event()

    def slowly(*_: object) -> bytes:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        assert go.wait(20)
        inside[0] -= 1
        return b"file"

    async def ask() -> None:
        packer = layered.Packer()
        asked = [asyncio.create_task(packer.pack(".psd", [], [])) for _ in range(layered.MOST)]
        while not inside[0]:
            await asyncio.sleep(0.01)
        with pytest.raises(BusyError) as refused:
            await packer.pack(".psd", [], [])
        told = answer_to(refused.value)
        assert told.status == 429 and told.headers == {"Retry-After": "5"}
        go.set()
        assert await asyncio.gather(*asked) == [b"file"] * layered.MOST
        assert packer.waiting == 0 and await packer.pack(".psd", [], []) == b"file"

    monkeypatch.setattr(layered, "packed", slowly)
    asyncio.run(asyncio.wait_for(ask(), 30))
    assert most == [1]


def test_a_server_without_the_library_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pptx", None)
    packer = layered.Packer()
    with pytest.raises(OutputError, match=r"lanting\[layers\]") as refused:
        asyncio.run(packer.pack(".pptx", [], []))
    assert answer_to(refused.value).status == 400 and packer.waiting == 0


def test_the_description_names_the_files(tmp_path):
    house = open_house(Settings(tmp_path, (Served("nano", "nano"),)))
    client = TestClient(build_app(house), base_url="http://127.0.0.1")
    route = client.get("/openapi.json").json()["paths"]["/api/jobs/{id_}/layers/{index}"]["get"]
    assert set(KINDS.values()) <= set(route["responses"]["200"]["content"])


def test_files_are_decoded_as_the_pngs_they_are(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png", format="GIF")
    with pytest.raises(OSError):
        layered.packed(".psd", [tmp_path / "0.png"], ["a"])
