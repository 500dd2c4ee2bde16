"""What the studio makes of a form, of a language, of an address; no browser and no Gradio."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from lanting.core.errors import LantingError, RequestError
from lanting.serve.app import build_app
from lanting.serve.errors import DrawingError, as_told, on_record, words_of
from lanting.serve.house import open_house
from lanting.serve.jobs import DONE, FAILED, Event, Job
from lanting.serve.keys import create
from lanting.serve.settings import Served, Settings
from lanting.serve.state import Place
from lanting.serve.studio import show
from lanting.serve.studio.clerk import Clerk
from lanting.serve.studio.door import NEEDED, studio
from lanting.serve.studio.forms import (
    DRAW,
    EDIT,
    LAYERS,
    More,
    edit_of,
    edit_task,
    layers_of,
    lora_of,
    mask_of,
    number,
    order_of,
    request_of,
    sizes_of,
    tab_of,
    tabs_of,
    values_of,
    whole,
)
from lanting.serve.studio.plans import panel, words_for
from lanting.serve.studio.wires import planning, replanning
from lanting.serve.studio.words import explained, preferred, speaker
from lanting.specs import get_spec, settle

EN, ZH = speaker("en"), speaker("zh")
NANO = get_spec("nano")


def job(**asked) -> Job:
    request = {"prompt": "a sign", "task": None, "negative_prompt": None, "size": None, "steps": None, "seed": 7}
    request |= {"guidance_scale": None, "count": 1, "images": [], "mask": None, "strength": None, "quality": None}
    request |= {"options": {}} | asked
    return Job("a" * 24, "local", "nano", "studio", "waiting", 0, 0.0, 1.0, 9.0, {"request": request, "lora": None})


def test_an_empty_form_asks_for_what_the_model_recommends():
    request = request_of(" a sign ", More())
    assert (request.prompt, request.seed, request.steps, request.count, request.quality) == (
        "a sign",
        None,
        None,
        1,
        None,
    )
    assert settle(request, NANO).steps == 6
    assert order_of(request, None, More()).lora is None


def test_a_full_form_asks_for_all_of_it():
    more = More("9007199254740993", "2", "4", "1.5", None, " blur ", "fast", {"ink": 0.8, "fox": 0.2})
    request = request_of("x", more, size=(192, 192))
    assert (request.seed, request.count, request.steps, request.guidance_scale) == (9007199254740993, 2, 4, 1.5)
    assert (request.negative_prompt, request.quality, request.size) == ("blur", "fast", (192, 192))
    order = order_of(request, "nano", more)
    assert (order.model, order.dialect, order.lora) == ("nano", "studio", {"ink": 0.8, "fox": 0.2})


def test_each_chosen_lora_has_its_own_strength():
    known = ["ink", "fox", "tea"]
    assert lora_of(known, ["tea", "ink"], [0.5, 0.9, None]) == {"ink": 0.5, "tea": 1.0}
    assert (
        lora_of(known, [], [1.0, 1.0, 1.0]) == {}
        and order_of(request_of("x", More()), None, More(lora={})).lora is None
    )


@pytest.mark.parametrize("text", ["x", "nan", "1e999", "--3"])
def test_what_is_no_number_is_refused_in_a_sentence(text):
    with pytest.raises(RequestError, match="is not a number"):
        number(text)


def test_whole_numbers_are_whole():
    assert (whole(None), whole(" "), whole("12"), whole("4.0"), whole(3.0)) == (None, None, 12, 4, 3)
    with pytest.raises(RequestError, match="not a whole number"):
        whole("2.5")


def test_an_edit_is_the_best_the_model_can():
    picture, mask = Image.new("RGB", (64, 32)), Image.new("L", (64, 32), 255)
    assert edit_of("x", More(), (picture, picture), None, NANO).task == "edit"
    asked = edit_of("x", More(strength=0.4), (picture,), mask, NANO)
    assert (asked.task, asked.mask, asked.strength) == ("edit_inpaint", mask, None)
    plain = replace(NANO, tasks=("text_to_image", "image_to_image", "inpaint"))
    asked = edit_of("x", More(strength=0.4), (picture, picture), mask, plain)
    assert (asked.task, len(asked.images), asked.strength) == ("inpaint", 1, 0.4)
    assert edit_task(("edit",), True) is None
    with pytest.raises(RequestError, match="no picture yet"):
        edit_of("x", More(), (), None, NANO)
    with pytest.raises(RequestError, match="choose another model"):
        edit_of("x", More(), (picture,), None, replace(NANO, tasks=("text_to_image",)))


def test_what_was_painted_on_any_layer_is_the_mask():
    layer, faint = Image.new("RGBA", (8, 4)), Image.new("RGBA", (8, 4), (255, 0, 0, 4))
    assert mask_of([layer, faint, Image.new("RGB", (8, 4))], (8, 4)) is None
    layer.putpixel((2, 1), (229, 67, 46, 153))
    mask = mask_of([faint, layer], (8, 4))
    assert mask is not None and mask.mode == "L" and mask.getbbox() == (2, 1, 3, 2) and mask.getpixel((2, 1)) == 255
    assert mask_of([layer], (16, 8)).size == (16, 8)


def test_layers_are_asked_for():
    request = layers_of("", More(), Image.new("RGB", (64, 64)), 3, True)
    assert settle(request, get_spec("qwen-image-layered")).options["layers"] == 3
    assert request.options["resolution"] == 1024
    with pytest.raises(RequestError, match="no picture yet"):
        layers_of("", More(), None, 3, False)


def test_a_model_shows_the_tabs_it_can_use():
    assert tabs_of(None) == (DRAW,) and tabs_of(NANO) == (DRAW, EDIT)
    assert tabs_of(get_spec("qwen-image-layered")) == (LAYERS,)
    assert EDIT in tabs_of(get_spec("qwen-image-edit-2511"))


def test_sizes_begin_with_the_models_own_and_are_named_in_the_language():
    assert sizes_of(NANO, EN)[0] == ("Wide", "224x96") and sizes_of(NANO, ZH)[0] == ("横幅", "224x96")
    assert sizes_of(None, EN) == []
    assert len(sizes_of(get_spec("qwen-image"), EN)) > 3


def test_a_job_comes_back_as_the_form_it_was():
    prompt, size, more = values_of(job(size=[224, 96], steps=4, guidance_scale=2.0, count=2))
    assert (prompt, size, more.seed, more.steps, more.guidance, more.count) == ("a sign", "224x96", "7", "4", "2", "2")
    assert request_of(prompt, more).seed == 7 and tab_of(job()) == DRAW
    assert tab_of(job(images=[{"sha256": "0", "size": [8, 8]}])) == EDIT
    assert tab_of(job(images=[{}], options={"layers": 3})) == LAYERS


def test_words_of_strangers_stay_words():
    evil = '<img src=x onerror=alert(1)>"'
    one = replace(job(prompt=evil), state=DONE, outcome={
        "images": [{"size": [8, 4], "mode": "RGB"}], "recipes": [{"request": {"seed": 7}}], "seconds": {"denoise": 1.0},
    })  # fmt: skip
    for page in (show.finished(one, EN, "/studio/before/x"), show.tile(one, EN), show.trouble(evil)):
        assert "<img src=x" not in page and 'alert(1)>"' not in page
    assert evil not in show.gallery([], evil, 24, EN) and "no such" in show.gallery([], "no such", 24, EN)


def test_layers_can_be_saved_as_one_file_of_every_kind_that_is_written_here(monkeypatch):
    recipe = {"request": {"seed": 7, "options": {"layers": 2}}}
    outcome = {"images": [{"size": [8, 4], "mode": "RGBA"}] * 4, "recipes": [recipe] * 4, "seconds": {"denoise": 1.0}}
    one = replace(job(images=[{}], options={"layers": 2}), state=DONE, outcome=outcome)
    page = show.ended(one, ZH, None, "zh")
    for kind in ("psd", "ora", "pptx"):
        assert f'href="/api/jobs/{one.id}/layers/0?format={kind}&amp;language=zh"' in page
    assert page.count('data-each="2"') == 3 and "所有图层存为一个 PSD 文件" in page
    assert page.index("images/0") < page.index("layers/0")  # the script takes the first link for the picture's own
    monkeypatch.setattr(show, "find_spec", lambda name: None)
    assert "format=ora" in (page := show.ended(one, EN)) and "format=pptx" not in page
    assert "layers/0" not in show.ended(replace(one, asked=job().asked), EN)


def test_places_steps_and_seconds_are_told():
    assert "3 before you, about 12 s left<" in show.waiting(job(), Place(3, 5, 12.2), EN, {"count": 1, "ready": 1})
    several = show.waiting(job(), Place(3, 5, None), EN, {"count": 3, "ready": 2})
    assert "3 before you; 2 of 3 workers draw<" in several
    step = Event("a" * 24, 1, "step", {"step": 2, "steps": 6, "seconds": 1.0}, b"\xff\xd8")
    page = show.drawing(job(), step, EN)
    assert "Step 2 of 6, about 2 s left" in page and "data:image/jpeg;base64,/9g=" in page and "--done:33%" in page
    assert "第 2 步，共 6 步" in show.drawing(job(), step, ZH)


def test_the_browsers_language_and_the_switch():
    assert preferred("zh-CN,zh;q=0.9,en;q=0.8") == "zh" and preferred("de-DE,en;q=0.5,zh;q=0.4") == "en"
    assert preferred("en;q=0.1, zh-TW") == "zh" and preferred("") == "en" and preferred("fr") == "en"
    assert preferred("zh", "en") == "en" and preferred("zh;q=x, en;q=0.5", "xx") == "en"
    assert explained(ZH, LantingError("{path} does not exist", path="a")) == "A 不存在"


def test_failures_are_told_in_the_pages_language():
    """The server may speak another; and jobs of an older one have no template."""
    error = on_record(
        "timeout", DrawingError("the engine died {count} times on this drawing: ask for a smaller one", count=3)
    )
    assert as_told(error) == {"code": "timeout", "message": str(error["message"])}
    failed = replace(job(), state=FAILED, error=error)
    assert "引擎" in show.ended(failed, ZH) and "The engine died 3 times" in show.ended(failed, EN)
    assert "Old words {x}" in show.ended(replace(failed, error={"code": "x", "message": "old words {x}"}), ZH)
    assert words_of(RequestError("no {a} of {b:g}", a=Path("/x"), b=2.5)) == ["no {a} of {b:g}", {"a": "/x", "b": 2.5}]


def test_the_planner_is_asked_about_the_model_as_it_is_served():
    served = Served("nano", "nano", {"quant": "auto", "vram": "8G", "device": "cuda"})
    assert words_for(served, "224x96", 1)[:7] == ["plan", "nano", "--json", "--size", "224x96", "--references", "1"]
    assert words_for(served, None)[3:] == ["--device", "cuda", "--vram", "8G"]
    assert words_for(served, None, writes=True)[3:] == ["--rewrite", "--device", "cuda", "--vram", "8G"]
    assert "8 GB are needed" in panel("8 GB are needed", EN)


def test_a_plan_counts_what_writes_prompts_where_it_is_on(tmp_path, monkeypatch):
    """By the server's flag, under which the engine holds it, or by the box; of models that can."""
    asked: list[bool] = []

    async def planned(words, language):
        asked.append("--rewrite" in words)
        return ""

    monkeypatch.setattr("lanting.serve.studio.clerk.planned", planned)
    models = (Served("qwen-image", "qwen-image"), Served("eager", "qwen-image", {"rewrite": True}))
    clerk = Clerk(open_house(Settings(tmp_path, (*models, Served("nano", "nano", {"rewrite": True})))), "en")

    async def use(model: str, *how: Any) -> bool:
        await clerk.plan(model, None, *how)
        return asked.pop()

    async def all_of_them() -> None:
        assert not await use("qwen-image", DRAW) and not await use("qwen-image", LAYERS, True)
        assert await use("qwen-image", DRAW, True) and await use("qwen-image", EDIT, True)
        assert await use("eager", DRAW, False) and await use("eager", LAYERS)
        assert not await use("nano", DRAW, True)
        page, request = SimpleNamespace(clerk=clerk), SimpleNamespace(request=SimpleNamespace(scope={}))
        for ticked in (True, False):  # as the page hands it on: when opened, and when the box is pressed
            await planning(page, EDIT, "told")(request, None, "qwen-image", ticked)
            await replanning(page, DRAW, "told")(request, None, "some", "qwen-image", ticked, "64x64")
            assert asked == [ticked] * 2
            asked.clear()

    asyncio.run(all_of_them())


def test_only_what_the_page_needs_is_let_through():
    for path in ("config", "assets/index.js", "gradio_api/queue/join", "gradio_api/file=/tmp/x.png"):
        assert NEEDED.fullmatch(path), path
    for path in ("monitoring", "gradio_api/mcp/sse", "gradio_api/proxy=http://x", "gradio_api/runs", "docs", "login"):
        assert not NEEDED.fullmatch(path), path


def test_nothing_of_it_imports_gradio_before_it_is_opened():
    code = "import sys, lanting.serve.studio.door, lanting.serve.studio.page, lanting.serve.studio.wires\n"
    code += "sys.exit('gradio' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ---------------------------------------------------------------- the door
def test_every_address_of_the_studio_wants_a_key(tmp_path):
    key = create(tmp_path, "Anna")
    house = open_house(Settings(tmp_path, keys=True))
    client = TestClient(build_app(house, studio), base_url="http://localhost", follow_redirects=False)
    paths = ("/", "/en", "/en/", "/zh/", "/en/config", "/en/gradio_api/queue/data", f"/studio/before/{'a' * 24}")
    for path in (*paths, "/favicon.ico"):
        assert client.get(path).status_code == 401, path
        page = client.get(path, headers={"Accept": "text/html", "Accept-Language": "zh"})
        assert page.status_code == 401 and "密钥" in page.text and "www-authenticate" not in page.headers
    script = {"Accept": "text/html", "Sec-Fetch-Mode": "cors"}  # a page's own request gets an error, not a page
    assert "error" in client.get("/en/", headers=script).json()
    assert client.post("/logout").status_code == 401 and client.post("/en/gradio_api/upload").status_code == 401
    assert client.post("/login", data={"key": "lk-wrong"}).status_code == 401
    assert client.post("/login", data={"key": key}, headers={"Origin": "http://evil.example"}).status_code == 403
    let_in = client.post("/login", data={"key": key}, headers={"Origin": "http://localhost"})
    cookie = let_in.headers["set-cookie"]
    assert let_in.status_code == 303 and "HttpOnly" in cookie and "SameSite=strict" in cookie
    browser = {"Accept": "text/html"}
    assert client.get("/", headers=browser).headers["location"] == "/en/"
    assert "being opened" in client.get("/en/", headers=browser).text  # nobody has opened it
    assert client.get("/en/config").status_code == 503 and client.get("/en/monitoring").status_code == 404
    assert client.post("/en/gradio_api/upload", headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.get("/").text.startswith("Lanting is running") and client.head("/").status_code == 200
    house.lock.release()


def test_without_gradio_there_is_a_sentence_and_the_server(monkeypatch, capsys):
    from lanting.cli import serve as verb

    asked = []
    monkeypatch.setattr("lanting.serve.run.serve", lambda settings, tell, page, hire: asked.append(page))
    monkeypatch.setattr("lanting.serve.logs.write_to_stderr", lambda: None)
    verb.start(Settings(Path("x")), mcp=False, page=True)
    verb.start(Settings(Path("x")), mcp=False, page=False)
    monkeypatch.setattr(verb.importlib.util, "find_spec", lambda name: None)
    verb.start(Settings(Path("x")), mcp=False, page=True)
    assert asked == [studio, None, None] and 'pip install "lanting[serve]"' in capsys.readouterr().out


def test_the_box_for_rewriting_is_shown_where_a_model_can_write():
    from lanting.serve.studio.page import hiding

    drawing, layered = get_spec("qwen-image-2512"), get_spec("qwen-image-layered")
    assert ".writes" in hiding(None) and ".writes" in hiding(replace(drawing, writes=False))
    assert ".writes" not in hiding(replace(drawing, writes=True))
    assert ".writes" in hiding(replace(layered, writes=True))
    assert request_of("a cat", More(rewrite=True)).rewrite is True
    assert values_of(job(rewrite=True))[2].rewrite is True and values_of(job())[2].rewrite is False
    for told, shown in (({"asked": "a cat"}, True), ({}, False), ({"asked": "a tabby <cat>"}, False)):
        outcome = {"recipes": [{"request": {"prompt": "a tabby <cat>", **told}}]}
        assert ("a tabby &lt;cat&gt;" in show.written(replace(job(), outcome=outcome), EN)) == shown


def test_words_for_parts_are_a_line_each_and_come_back():
    from lanting.serve.studio.page import hiding

    text = "left=a red fox\n\n0,0.25,1,1=a river = blue\n"
    asked = request_of("a wood", More(regions=text), size=(64, 64))
    assert [one["box"] for one in asked.options["regions"]] == [[0, 0, 0.5, 1], [0, 0.25, 1, 1]]
    told = values_of(job(options=dict(asked.options)))[2].regions
    assert told == "left=a red fox\n0,0.25,1,1=a river = blue" and values_of(job())[2].regions == ""
    assert request_of("a wood", More()).options == {}
    with pytest.raises(RequestError, match="has no words"):
        request_of("a wood", More(regions="a red fox"))
    shown = [".parts" not in hiding(get_spec(name)) for name in ("nano", "qwen-image-2.1", "qwen-image-edit-2511")]
    assert shown == [True, False, False]


def test_what_is_read_in_a_picture_is_shown():
    assert request_of('"A"', More(tries="4")).tries == 4 and request_of('"A"', More(tries="")).tries is None
    assert values_of(job(tries=4))[2].tries == "4" and values_of(job())[2].tries == ""
    texts = [{"read": ["<A>"], "right": True}, None, {"read": [], "right": False}]
    outcome = {"images": [{} if one is None else {"text": one} for one in texts]}
    told = show.read(replace(job(), outcome=outcome), EN)
    assert "picture 1 reads &lt;A&gt;<" in told and "picture 3 reads -; not all" in told and "picture 2" not in told
    assert told.count("wrong") == 1


def test_one_plan_is_made_at_a_time_and_none_for_who_has_left(tmp_path, monkeypatch):
    """Each is a process with torch in it."""
    made = []
    make = asyncio.create_subprocess_exec

    async def slow(*_, **how):
        made.append(await make(sys.executable, "-c", "import time; time.sleep(60)", **how))
        return made[-1]

    async def use() -> None:
        clerk = Clerk(open_house(Settings(tmp_path)), "en")
        asking = [asyncio.create_task(clerk.plan(None, None, DRAW)) for _ in range(3)]
        while not made:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert len(made) == 1
        for task in reversed(asking):
            task.cancel()
        await asyncio.wait(asking)
        assert await asyncio.wait_for(made[0].wait(), 5) < 0 and len(made) == 1

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slow)
    asyncio.run(use())
