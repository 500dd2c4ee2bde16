"""The studio as people use it: nano draws, Chromium looks. What a run saw is kept as screenshots."""

from __future__ import annotations

import io
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from PIL import Image

from lanting.core.layered import unpack

OPEN = "#draw-go"
DONE = ".stage.done"
# The editor's canvas is painted sixty times a second as long as it is there, and the processor does what a GPU would.
SELDOM = """() => {
  window.often ??= window.requestAnimationFrame;
  window.requestAnimationFrame = (then) => setTimeout(() => then(performance.now()), 100);
}"""
OFTEN = "() => { window.requestAnimationFrame = window.often; }"


def drawn(page, words: str, tab: str = "draw") -> None:
    page.fill(f"#{tab}-words textarea", words)
    page.press(f"#{tab}-words textarea", "Enter")
    page.wait_for_selector(f"#{tab}-stage .stage:not(.empty):not(.trouble)")
    page.wait_for_selector(f"#{tab}-stage {DONE}")


@contextmanager
def quiet(page, seconds: float = 1.5):
    """Ends when the page has asked for nothing for so long."""
    last = [time.monotonic()]

    def asked(_) -> None:
        last[0] = time.monotonic()

    events = ("request", "requestfinished")
    for event in events:
        page.on(event, asked)
    yield
    while time.monotonic() - last[0] < seconds:
        page.wait_for_timeout(100)
    for event in events:
        page.remove_listener(event, asked)


def newest(ask, server: str) -> dict:
    return ask(f"{server}/api/jobs?limit=1")["jobs"][0]


def loaded(page, selector: str) -> bool:
    """A picture is there and whole."""
    return page.wait_for_function(
        "s => { const i = document.querySelector(s); return i && i.naturalWidth > 0 }", arg=selector
    )


def test_a_sign_is_drawn_and_every_setting_comes_back(server, visit, shot, ask):
    page = visit(server)
    page.wait_for_selector(OPEN)
    assert urlsplit(page.url).path == "/en/"
    page.wait_for_selector("#gallery .nothing")
    shot(page, "draw-empty")
    page.click(".chips button >> nth=0")  # one press, and it is drawn
    page.wait_for_selector(f"#draw-stage {DONE}")
    assert page.input_value("#draw-words textarea") == 'a blue sign that says "HELLO"'
    loaded(page, "#draw-stage .shown")
    shot(page, "draw-done")
    job = newest(ask, server)
    assert (job["dialect"], job["state"], job["request"]["size"]) == ("studio", "done", [224, 96])
    page.click("#draw-stage [data-do=again]:not([data-fresh])")  # the same once more
    page.wait_for_selector("#gallery .tile >> nth=1")
    page.wait_for_function(
        "id => document.querySelector('#draw-stage .stage.done')?.dataset.job !== id && "
        "document.querySelector('#draw-stage .stage.done')",
        arg=job["id"],
    )
    twin = newest(ask, server)
    bytes_of = [httpx.get(f"{server}/api/jobs/{one['id']}/images/0").content for one in (job, twin)]
    pixels = [Image.open(io.BytesIO(data)).tobytes() for data in bytes_of]
    assert twin["id"] != job["id"] and twin["request"]["seed"] == job["request"]["seed"] and pixels[0] == pixels[1]
    page.fill("#draw-words textarea", "other words")
    page.click("#gallery .tile >> nth=0")
    page.wait_for_function("document.querySelector('#draw-words textarea').value.includes('HELLO')")
    page.click(".fold >> nth=0")
    page.get_by_label("Seed").first.wait_for()
    assert page.get_by_label("Seed").first.input_value() == str(job["request"]["seed"])


def test_an_edit_with_a_painted_mask_and_a_further_picture_shows_before_and_after(server, visit, shot, ask, tmp_path):
    Image.new("RGB", (96, 96), "red").save(tmp_path / "red.png")
    page = visit(server)
    page.wait_for_selector(OPEN)
    drawn(page, 'a green sign that says "TEA"')
    page.evaluate(SELDOM)
    with quiet(page):  # Gradio lays a picture, sends it back and lays the copy: what is painted until then is lost
        page.hover("#gallery .tile >> nth=0")
        page.click("#gallery .quick [data-do=edit] >> nth=0")
        canvas = page.wait_for_selector("#canvas canvas", state="visible")
        page.wait_for_function(
            "document.querySelector('#canvas').textContent.match(/[2-9]\\d\\d%/)"
        )  # it is laid, enlarged
    box = canvas.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.evaluate(OFTEN)  # a stroke is as many pieces as there were pictures meanwhile
    page.mouse.move(box["x"] + box["width"] * 0.35, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.65, middle, steps=3)
    page.mouse.up()
    page.evaluate(SELDOM)
    page.set_input_files("#others input[type=file]", tmp_path / "red.png")
    page.wait_for_selector("#others img")
    drawn(page, "make the background red", "edit")
    loaded(page, "#edit-stage .compare .after")
    loaded(page, "#edit-stage .compare img")
    page.evaluate("document.querySelector('#edit-stage').scrollIntoView()")
    page.fill("#edit-stage .compare input", "25")
    shot(page, "edit-done", whole=True)
    job = newest(ask, server)
    assert job["request"]["task"] == "edit_inpaint" and job["request"]["mask"]["size"] == [224, 96]
    assert [one["size"] for one in job["request"]["images"]] == [[224, 96], [96, 96]]
    assert page.eval_on_selector("#edit-stage .compare", "e => e.style.getPropertyValue('--at')") == "25%"


def test_a_job_is_cancelled_and_one_that_was_left_is_found_again(server, visit, shot, ask):
    page = visit(server)
    page.wait_for_selector(OPEN)
    page.click(".fold >> nth=0")
    page.get_by_label("Steps").first.fill("200")
    page.fill("#draw-words textarea", 'a red sign that says "WAIT"')
    page.press("#draw-words textarea", "Enter")
    page.wait_for_selector("#draw-stage img.growing")
    shot(page, "draw-busy")
    page.reload()
    page.wait_for_selector("#draw-stage img.growing")  # the queue kept it, and the page finds it
    page.click("#draw-stage [data-do=cancel]", button="right")  # a menu, and nothing else
    page.wait_for_timeout(500)
    assert newest(ask, server)["state"] == "running"
    page.click("#draw-stage [data-do=cancel]")
    page.wait_for_selector("#draw-stage .stage.empty:has-text('Cancelled')")
    assert newest(ask, server)["state"] == "cancelled"
    page.click("#draw-go")
    page.wait_for_selector("#draw-stage .trouble:has-text('prompt is empty')")
    shot(page, "draw-trouble")


def test_the_history_is_searched(server, visit, shot):
    page = visit(server)
    page.wait_for_selector(OPEN)
    drawn(page, 'a yellow sign, black letters, "TAXI"')
    page.wait_for_selector("#gallery .tile[title*=TAXI]")
    page.fill("#search input, #search textarea", "taxi")
    page.wait_for_function("[...document.querySelectorAll('#gallery .tile')].every(t => t.title.includes('TAXI'))")
    assert page.locator("#gallery .tile").count() == 1
    page.hover("#gallery .tile")
    page.click("#gallery .quick [data-do=again]")  # drawn once more with one press
    page.wait_for_selector("#gallery .tile >> nth=1")
    page.fill("#search input, #search textarea", "no such words")
    page.wait_for_selector("#gallery .nothing:has-text('no such words')")
    shot(page, "history-nothing")


def test_who_has_no_mouse_sees_where_they_are(server, visit, shot):
    """The search field looked the same with the cursor in it, and a tile cut off the ring around what it holds."""
    page = visit(server)
    page.wait_for_selector(OPEN)
    drawn(page, 'a yellow sign, black letters, "KEYS"')
    page.wait_for_selector("#gallery .tile")
    edge = "e => getComputedStyle(e).borderTopColor"
    before = page.eval_on_selector("#search :is(input, textarea)", edge)
    page.focus("#search :is(input, textarea)")
    assert page.eval_on_selector("#search :is(input, textarea)", edge) != before
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "open"
    ring = page.evaluate(
        "(s => [s.outlineStyle, parseFloat(s.outlineOffset)])(getComputedStyle(document.activeElement))"
    )
    assert ring[0] == "solid" and ring[1] <= -2
    shot(page, "history-keyboard")


def test_chinese_on_a_phone_in_the_dark(server, visit, shot):
    page = visit(server, language="zh-CN", phone=True, dark=True)
    page.wait_for_selector(OPEN)
    assert urlsplit(page.url).path == "/zh/" and page.eval_on_selector("html", "e => e.lang") == "zh-CN"
    assert page.inner_text(OPEN) == "画图" and page.get_by_text("想画什么？").is_visible()
    shot(page, "phone-zh-dark")
    for name, label in (("model", "模型"), ("search", "搜索作品")):  # as readers of the screen are told
        told = page.text_content(f"#{name}")
        assert label in told and "Dropdown" not in told and "Textbox" not in told
    drawn(page, "红色招牌，黄色的字“恭喜发财”")
    loaded(page, "#draw-stage .shown")
    shot(page, "phone-zh-dark-done", whole=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
        == "rgb(23, 22, 20)"
    )
    page.click("#language")
    page.wait_for_url("**/en/")
    page.wait_for_selector(OPEN)
    assert page.inner_text(OPEN) == "Draw"
    page.goto(server + "/")  # the switch is remembered
    page.wait_for_url("**/en/")


def test_it_says_whether_it_fits_and_which_loras_there_are(server, visit, shot):
    page = visit(server, dark=True)
    page.wait_for_selector(OPEN)
    page.click(".fold >> nth=1")
    page.wait_for_selector(".plan .yes")
    assert "MB" in page.inner_text(".plan")
    page.click(".fold >> nth=0")
    page.get_by_label("LoRAs").first.wait_for()
    shot(page, "plan-dark", whole=True)
    page.click("#shade")
    assert "dark" not in (page.get_attribute("body", "class") or "")


def test_models_loras_other_clients_and_failures(server, visit, shot, ask):
    """A strength for each LoRA; what another client draws comes by itself; a job brings its model back; a failure is
    told in the browser's language by a server that speaks English."""
    page = visit(server, language="zh-CN")
    page.wait_for_selector(OPEN)
    page.click("#model input")
    page.get_by_role("option", name="qwen-image", exact=True).click()
    page.click(".fold >> nth=0")
    for name in ("ink", "fox"):
        page.get_by_label("LoRA").first.click()
        page.get_by_role("option", name=name).click()
        page.get_by_label(f"number input for {name}").first.wait_for()
    page.get_by_label("number input for fox").first.fill("0.4")
    page.keyboard.press("Tab")
    page.get_by_label("步数").first.fill("3")
    shot(page, "loras-zh", whole=True)
    drawn(page, "水墨山村")
    job = newest(ask, server)
    assert (job["model"], job["lora"], job["request"]["steps"]) == ("qwen-image", {"ink": 1.0, "fox": 0.4}, 3)
    told = {"prompt": 'a green sign "API"', "seed": 1, "model": "nano"}
    httpx.post(f"{server}/api/jobs", json=told).raise_for_status()
    page.click("#gallery .tile[title*=API]:has(img)")
    page.wait_for_function("document.querySelector('#model input').value == 'nano'")
    assert page.input_value("#draw-words textarea") == told["prompt"]
    page.click("#gallery .tile[title=水墨山村]")
    page.wait_for_function("document.querySelector('#model input').value == 'qwen-image'")
    page.wait_for_function("document.querySelector('#draw-words textarea').value == '水墨山村'")
    assert page.get_by_label("number input for fox").first.input_value() == "0.4"
    page.fill("#draw-words textarea", "boom")
    page.click(OPEN)
    page.wait_for_selector("#draw-stage .trouble:has-text('服务器')")
    shot(page, "trouble-zh")


def test_a_picture_is_taken_apart_by_a_model_that_can(server, visit, shot, ask, tmp_path):
    Image.new("RGB", (320, 240), "orange").save(tmp_path / "poster.png")
    page = visit(server)
    page.wait_for_selector(OPEN)
    assert not page.is_visible("#layers-tab-button")
    page.click("#model input")
    page.get_by_role("option", name="qwen-image-layered").click()
    page.wait_for_selector("#layers-go")
    page.wait_for_selector("#draw-tab-button", state="hidden")
    page.set_input_files("#source input[type=file]", tmp_path / "poster.png")
    page.wait_for_selector("#source img")
    page.click("#layers-go")
    page.wait_for_selector(f"#layers-stage {DONE}")
    page.click("[data-show='2']")
    loaded(page, "#layers-stage .shown")
    assert page.locator("#layers-stage .thumb").count() == 4
    assert page.get_attribute("#layers-stage a[download]", "href").endswith("/images/2")
    shot(page, "layers-done")
    assert newest(ask, server)["request"]["task"] == "layered"
    for kind in ("psd", "ora", "pptx"):
        with page.expect_download() as coming:
            page.click(f"#layers-stage a[href*='format={kind}']")
        assert coming.value.suggested_filename.endswith(f"-1.{kind}")
        stack = unpack(Path(coming.value.path()).read_bytes(), kind)
        assert stack.size == (320, 240) and len(stack.layers) == 4


def test_without_the_key_there_is_a_login_and_nothing_else(guarded, visit, shot):
    url, key, other = guarded
    page = visit(url)
    page.wait_for_selector(".login")
    shot(page, "login")
    page.fill("#key", "lk-wrong")
    page.click(".login button")
    page.wait_for_selector(".login .wrong")
    page.fill("#key", key)
    page.click(".login button")
    page.wait_for_selector(OPEN)
    (cookie,) = [one for one in page.context.cookies() if one["name"] == "lanting_key"]
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
    drawn(page, 'a sign "KEY"')
    loaded(page, "#draw-stage .shown")
    shot(page, "guarded-done")
    picture = url + page.get_attribute("#draw-stage .shown", "src")
    assert httpx.get(picture).status_code == 401
    assert httpx.get(picture, headers={"Authorization": f"Bearer {other}"}).status_code == 404
    assert httpx.get(picture, cookies={"lanting_key": key}).status_code == 200
    for path in ("/en/", "/en/config", "/en/gradio_api/info", "/en/gradio_api/file=/etc/passwd", "/studio/before/x"):
        assert httpx.get(url + path).status_code == 401, path
    evil = {"Origin": "http://evil.example", "Cookie": f"lanting_key={key}"}
    assert httpx.post(url + "/en/gradio_api/queue/join", headers=evil, json={}).status_code == 403
    page.click("header form button")
    page.wait_for_selector(".login")
