"""Nobody gets in who shouldn't: keys, hosts, origins, sizes, bombs, addresses. Mostly without a port."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
import uvicorn
from fakeserve import Server, running
from PIL import Image
from starlette.datastructures import Headers
from starlette.routing import BaseRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from test_openai import png

from fakes import bare_png
from lanting.core.errors import LantingError, PictureError, RequestError
from lanting.serve.app import build_app
from lanting.serve.bodies import SMALL, Arriving, Room
from lanting.serve.fetch import Limits, fetch, is_public
from lanting.serve.guard import OPEN, bare
from lanting.serve.heads import Heads
from lanting.serve.house import open_house
from lanting.serve.keys import create, revoke
from lanting.serve.pictures import Eyes
from lanting.serve.settings import Caps, Served, Settings, check
from lanting.serve.signing import Signer

LOCALHOST = "http://127.0.0.1"


def client_for(folder: Path, **settings) -> TestClient:
    """An application that is never started: requests meet the guard and the routes, no worker."""
    house = open_house(Settings(folder, (Served("nano", "nano"),), **settings))
    return TestClient(build_app(house), base_url=LOCALHOST, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> TestClient:
    """One without further settings, which nobody gives a job."""
    return client_for(tmp_path_factory.mktemp("plain"))


def paths(routes: list[BaseRoute]) -> list[tuple[str, str]]:
    """(method, path) of every route, filled with something."""
    found = []
    for route in routes:
        inner = getattr(route, "original_router", route)  # of a dialect
        if hasattr(route, "path"):
            path = re.sub(r"{[^}]*}", "0", route.path)
            found += [(method, path) for method in (getattr(route, "methods", None) or ("GET", "POST", "DELETE"))]
        found += paths(getattr(inner, "routes", None) or [])
    return found


def test_every_route_wants_a_key(tmp_path):
    key = create(tmp_path, "Anna")
    client = client_for(tmp_path, keys=True)
    walked = paths(client.app.routes)  # type: ignore[attr-defined]
    assert len(walked) > 50
    for method, path in walked:
        answer = client.request(method, path)
        if path in OPEN:
            assert answer.status_code != 401
            continue
        assert answer.status_code == 401 and "www-authenticate" in answer.headers, (method, path)
        assert method == "HEAD" or "error" in answer.json()
        if path not in ("/mcp",):  # which is opened by the application's life
            assert client.request(method, path, headers={"Authorization": f"Bearer {key}"}).status_code != 401
    with pytest.raises(WebSocketDisconnect) as gone, client.websocket_connect("/queue/join"):
        pass
    assert gone.value.code == 1008


def test_a_key_comes_in_any_of_the_usual_ways_and_a_wrong_one_in_none(tmp_path):
    key = create(tmp_path, "Anna")
    client = client_for(tmp_path, keys=True)

    def status(**headers: str) -> int:
        return client.get(
            "/v1/models", headers={name.replace("_", "-"): value for name, value in headers.items()}
        ).status_code

    basic = [base64.b64encode(words.encode()).decode() for words in (f"anna:{key}", f"{key}:", "anna:wrong")]
    assert status(authorization=f"Bearer {key}") == status(x_api_key=key) == 200
    assert [status(authorization=f"Basic {words}") for words in basic] == [200, 200, 401]
    wrong = [
        key[:-1] + ("A" if key[-1] != "A" else "B"),
        "",
        "lk-",
        "x" * 10_000,
        key + "\u0007",
        "lk-00000000-" + "a" * 43,
    ]
    for one in wrong:
        assert status(authorization=f"Bearer {one}") == 401
    assert status(authorization="Basic !!!") == status(authorization="Basic /w==") == status() == 401
    revoke(tmp_path, "Anna")
    time.sleep(1.1)
    assert status(authorization=f"Bearer {key}") == 401


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, False),
        ({"host": "::1"}, False),
        ({"host": "127.8.8.8"}, False),
        ({"keys": True}, True),
        ({"host": "0.0.0.0"}, True),
        ({"host": "192.168.1.5"}, True),
        ({"hosts": ("pictures.example.com",)}, True),
        ({"hosts": ("localhost",)}, False),
    ],
)
def test_whoever_lets_others_in_needs_keys(tmp_path, settings, needed):
    if needed:
        with pytest.raises(RequestError, match="lanting keys create"):
            open_house(Settings(tmp_path, **settings))
    else:
        open_house(Settings(tmp_path, **settings)).lock.release()


@pytest.mark.parametrize(
    "host", ["evil.com", "127.0.0.1.evil.com", "localhost.evil.com:8353", "", "[::ffff:1.2.3.4]", "a b"]
)
def test_a_page_that_rebinds_its_name_is_refused(plain, host):
    answer = plain.get("/api/jobs", headers={"Host": host})
    assert answer.status_code == 403 and "--allow-host" in answer.json()["error"]["message"]


def test_hosts_that_are_allowed(tmp_path):
    key = create(tmp_path, "Anna")
    client = client_for(tmp_path, hosts=("pictures.example.com",))
    how = {"Authorization": f"Bearer {key}"}
    for host in ("localhost:8353", "127.0.0.1", "[::1]:8353", "pictures.example.com", "Pictures.Example.com:443"):
        assert client.get("/v1/models", headers=how | {"Host": host}).status_code == 200, host
    assert bare("[::1]:80") == "::1" and bare("HOST:80") == "host" and bare("::1") == "::1"


def test_pages_of_other_sites_are_refused_and_get_no_cors(plain):
    own = plain.get("/api/jobs", headers={"Origin": "http://127.0.0.1"})
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers
    for headers in (
        {"Origin": "http://evil.com"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": "http://127.0.0.1:9999"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ):
        for method, path in (
            ("GET", "/api/jobs"),
            ("POST", "/api/jobs"),
            ("POST", "/sdapi/v1/interrupt"),
            ("OPTIONS", "/v1/models"),
        ):
            answer = plain.request(method, path, headers=headers)
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers, (headers, path)


def test_an_origin_that_is_allowed(tmp_path):
    client = client_for(tmp_path, origins=("https://ui.example.com",))
    answer = client.get("/api/jobs", headers={"Origin": "https://ui.example.com"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://ui.example.com"


def test_a_page_of_an_allowed_origin_can_send_its_key_and_read_why_not(tmp_path):
    """Browsers ask first, without a key, whether a request with one may be sent."""
    key = create(tmp_path, "Anna")
    client = client_for(tmp_path, keys=True, origins=("https://ui.example.com",))
    page = {"Origin": "https://ui.example.com"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    answer = client.options("/v1/images/generations", headers=page | asked)
    assert answer.status_code == 200 and "authorization" in answer.headers["access-control-allow-headers"]
    refused = client.get("/api/jobs", headers=page)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://ui.example.com"
    assert client.get("/api/jobs", headers=page | {"Authorization": f"Bearer {key}"}).status_code == 200
    other = client.options("/v1/images/generations", headers={"Origin": "https://evil.com"} | asked)
    assert other.status_code >= 400 and "access-control-allow-origin" not in other.headers


BROWSERS = (
    {"Origin": "null"},  # a form in a sandbox, or of a page that tells nobody where it is
    {"Origin": "http://evil.com"},
    {"Origin": "http://127.0.0.1"},  # of this server's own pages, which call JSON by its name
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    {"Referer": "http://evil.com/"},  # of a browser so old that its forms have no Origin
    {"Cookie": "lanting_key=x"},
)
FORMS = (
    "text/plain",
    "text/plain;charset=UTF-8",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
)
DRAWING = ("/api/jobs", "/api/generate", "/v1/images/generations", "/sdapi/v1/txt2img")


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("browser", BROWSERS, ids=str)
def test_a_form_of_another_site_changes_nothing(plain, browser, kind):
    """What a page can send without asking first: text/plain and forms."""
    for path in DRAWING:
        answer = plain.post(path, content=b'{"prompt": "x"}', headers={"Content-Type": kind, **browser})
        assert answer.status_code in (400, 403, 422), path
    assert plain.get("/api/jobs").json()["jobs"] == []


@pytest.mark.parametrize("kind", [*FORMS[:3], "", None])
def test_a_program_may_call_its_json_what_it_likes(tmp_path, kind):
    """No page is asking, so this opens nothing to one: `curl -d` says that it sends a form, and Ollama's own pages have
    it so. That was refused with 422 before, for the sake of pages."""
    how = {"headers": {} if kind is None else {"Content-Type": kind}}
    client = client_for(tmp_path)
    assert client.post("/api/jobs", content=b'{"prompt": "x"}', **how).status_code == 202
    assert client.post("/api/show", content=b'{"model": "nano"}', **how).status_code == 200
    for path in DRAWING[1:]:  # an answer would wait for the picture: what is said of the size shows that it was read
        body = b'{"prompt": "x", "model": "nano", "width": 1, "height": 1, "size": "1x1"}'
        answer = client.post(path, content=body, **how)
        assert answer.status_code == 400 and "can't be drawn" in answer.text, (path, answer.text)
    assert client.post("/api/jobs", content=b"prompt=x", **how).status_code == 422
    form = client.post("/v1/images/edits", content=b"prompt=x", headers={"Content-Type": FORMS[2]})
    assert form.status_code == 400 and "image is missing" in form.text  # which takes forms, and got one


def test_bodies_are_bounded_before_they_are_read(tmp_path):
    client = client_for(tmp_path, caps=Caps(body=100_000))
    for path in ("/api/jobs", "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/api/generate"):
        answer = client.post(path, content=b"x" * 100_001, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413, path

        def chunks():
            for _ in range(20):
                yield b" " * 10_000

        answer = client.post(path, content=chunks(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413, path
    assert client.post("/api/jobs", headers={"Content-Length": "-1"}).status_code in (400, 413)


def test_the_values_of_a_body_are_bounded(tmp_path):
    """A million short ones in two megabytes held everybody up for seconds, and a gigabyte with them."""
    client = client_for(tmp_path)
    for path in ("/api/jobs", "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/api/generate"):
        for value in (b"1", b"[]", b"{}"):
            body = b'{"prompt": "x", "images": [' + b",".join([value] * 15_000 * (2 if value == b"1" else 1)) + b"]}"
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413 and "more than 20,000 values" in answer.text, (path, value)
    assert client.post("/api/jobs", json={"prompt": "a, b, " * 900}).status_code == 202


def sent_in_full(port: int, size: int, *headers: str, path: str = "/api/jobs") -> bytes:
    """What is answered to whoever sends a whole body, and reads only then."""
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {size}", *headers, "", "")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall("\r\n".join(lines).encode())
        for at in range(0, size, 1 << 20):
            sock.sendall(b" " * min(1 << 20, size - at))
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def test_a_body_that_never_ends_is_given_up_and_a_refusal_is_heard(tmp_path):
    """A connection that is closed over unread bytes is reset, and nobody hears why."""
    json_ = "Content-Type: application/json"
    with running(tmp_path, caps={"body_seconds": 0.5, "body": 1 << 20}) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
            lines = ("POST /api/jobs HTTP/1.1", "Host: localhost", json_, "Content-Length: 99", "", "{")
            sock.sendall("\r\n".join(lines).encode())
            assert b" 413 " in sock.recv(1000)
        for headers in ((json_, "Connection: close"), (json_,)):  # the first: as proxies ask
            assert b" 413 " in sent_in_full(server.port, 8 << 20, *headers)
        stranger = (json_, "Origin: https://evil.com", "Connection: close")
        assert b" 403 " in sent_in_full(server.port, 1 << 20, *stranger)


async def upload(client: httpx.AsyncClient, size: int, rest: asyncio.Event | None = None) -> httpx.Response:
    """A job of so many bytes, the last of which come when `rest` is set."""
    text = b'{"size": "1x1", "prompt": "' + b" " * size + b'"}'

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, size, 50_000):
            yield text[at : at + 50_000]
        if rest is not None:
            await rest.wait()
        yield text[(size + 49_999) // 50_000 * 50_000 :]

    return await client.post("/api/jobs", content=pieces(), headers={"Content-Type": "application/json"})


def test_bodies_are_bounded_together(tmp_path, monkeypatch):
    """Two that don't end leave no room for a third; what is small is read all the same, and room comes back."""
    monkeypatch.setattr("lanting.serve.bodies.PATIENCE", 0.3)
    app = client_for(tmp_path, caps=Caps(body=500_000, bodies=1)).app

    async def use() -> None:
        ends, transport = asyncio.Event(), httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url=LOCALHOST) as client, asyncio.timeout(20):
            reading = [asyncio.create_task(upload(client, 300_000, ends)) for _ in range(2)]
            for _ in range(1000):  # turns of the loop, not seconds: the machine may be busy
                await asyncio.sleep(0)
            refused = await upload(client, 300_000)
            assert refused.status_code == 503 and refused.headers["retry-after"], refused.text
            assert refused.json()["error"]["code"] == "unavailable" and "large requests" in refused.text
            assert (await upload(client, 10_000)).status_code == 400  # read, and its size is none
            monkeypatch.setattr("lanting.serve.bodies.PATIENCE", 10)
            waits = asyncio.create_task(upload(client, 300_000))
            await asyncio.sleep(0.2)
            assert not waits.done()
            ends.set()
            for one in (*reading, waits):
                assert (await one).status_code == 400

    asyncio.run(use())


def test_a_body_that_was_understood_takes_no_room(tmp_path):
    """Its client may wait long for the picture."""
    room, pieces = Room(1_000_000), iter([b"x" * 400_000, b"x" * 100_000])
    head = Headers({"content-length": "500000"})

    async def use() -> None:
        async def receive() -> dict[str, object]:
            piece = next(pieces, None)
            if piece is None:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": piece, "more_body": len(piece) == 400_000}

        body = Arriving(Caps(), room, receive, head)  # type: ignore[arg-type]
        await body()
        await body()
        assert room.held == 500_000 - SMALL
        assert (await body())["type"] == "http.disconnect" and room.held == 0
        body.leave()
        assert room.held == 0

    asyncio.run(use())


# ---------------------------------------------------------------- pictures
def gif(frames: int) -> bytes:
    buffer = io.BytesIO()
    pictures = [Image.new("P", (8, 8), number % 256) for number in range(frames)]
    pictures[0].save(buffer, format="GIF", save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


BAD = {
    "81 megapixels in 10 KB": bare_png(9000, 9000),
    "400 megapixels": bare_png(20_000, 20_000),
    "a GIF": gif(50),
    "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "nothing": b"",
    "half a PNG": png()[:60],
    "text": b"GET / HTTP/1.1",
    "a PNG's head": b"\x89PNG\r\n\x1a\n" + b"\0" * 50,
    "JPEG that lies": b"\xff\xd8\xff\xe0" + b"\0" * 100,
}


@pytest.mark.parametrize("name", BAD)
def test_pictures_that_are_none_are_refused_by_every_dialect(plain, name):
    client, data = plain, base64.b64encode(BAD[name]).decode()
    answers = [
        client.post("/v1/images/edits", data={"prompt": "x"}, files={"image": ("a.png", BAD[name], "image/png")}),
        client.post("/v1/images/variations", files={"image": ("a.png", BAD[name], "image/png")}),
        client.post("/api/jobs", json={"prompt": "x", "images": [data]}),
        client.post("/api/jobs", json={"prompt": "x", "images": [base64.b64encode(png()).decode()], "mask": data}),
        client.post("/api/generate", json={"model": "nano", "prompt": "x", "images": [data]}),
        client.post("/sdapi/v1/img2img", json={"prompt": "x", "init_images": [f"data:image/png;base64,{data}"]}),
        client.post("/sdapi/v1/png-info", json={"image": data}),
    ]
    assert {answer.status_code for answer in answers} == {400}, [answer.text for answer in answers]
    assert not any("0x" in answer.text or "Traceback" in answer.text for answer in answers)


def test_pictures_are_bounded_together(tmp_path):
    client = client_for(tmp_path, caps=Caps(input_pixels=10_000, pictures=3))
    image = base64.b64encode(png((100, 60))).decode()
    assert "million" in client.post("/api/jobs", json={"prompt": "x", "images": [image] * 2}).text
    assert "at most 3 pictures" in client.post("/api/jobs", json={"prompt": "x", "images": [image] * 4}).text


def test_metadata_is_left_at_the_door(tmp_path):
    """GPS in a photograph's EXIF must not come out again, nor stay on the disk."""
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "SECRET PLACE", 6  # turned by 90 degrees
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), "orange").save(buffer, format="JPEG", exif=exif, comment=b"SECRET PLACE")
    with running(tmp_path) as server:
        job = server.submit("x", images=[base64.b64encode(buffer.getvalue()).decode()])
        assert job["request"]["images"][0]["size"] == [32, 64]  # upright
        server.ended(job["id"])
        kept = list((tmp_path / "data" / "pictures").iterdir())
    assert len(kept) == 1 and b"SECRET" not in kept[0].read_bytes()
    everything = b"".join(path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert b"SECRET" not in everything


def test_prompts_and_keys_are_not_in_the_log(tmp_path):
    key = create(tmp_path / "data", "Anna")
    with running(tmp_path, keys=True) as server:
        how = {"headers": {"Authorization": f"Bearer {key}"}}
        job = server.submit("a very private wish", **how)
        server.ended(job["id"], **how)
        server.get("/nowhere?key=" + key, **how)
    log = server.log.read_text()
    assert "job accepted" in log and "private" not in log and key not in log
    assert (tmp_path / "data" / "queue.sqlite").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "path", ["../../etc/passwd", "..%2f..%2fqueue.sqlite", "%2e%2e/%2e%2e/queue.sqlite", "0/images/..%2f0"]
)
def test_paths_lead_nowhere(plain, path):
    for prefix in ("/api/jobs/", "/v1/models/", "/"):
        assert plain.get(prefix + path).status_code in (404, 422)


def test_signed_addresses_are_for_one_picture_and_an_hour(monkeypatch):
    signer = Signer(b"secret")
    path, _, query = signer.sign("/api/jobs/1/images/0", "anna").partition("?")
    assert signer.owner(path, query.encode()) == "anna"
    assert signer.owner("/api/jobs/1/images/1", query.encode()) is None
    assert signer.owner(path, query.replace("anna", "eve").encode()) is None
    assert signer.owner(path, b"until=x") is signer.owner(path, "ü".encode()) is None
    assert Signer(b"other").owner(path, query.encode()) is None
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3700)
    assert signer.owner(path, query.encode()) is None


def test_signed_addresses_open_a_picture_without_a_key(tmp_path):
    key = create(tmp_path / "data", "Anna")
    with running(tmp_path, keys=True) as server:
        how = {"headers": {"Authorization": f"Bearer {key}"}}
        answer = server.post("/v1/images/generations", {"prompt": "a sign", "response_format": "url"}, **how)
        url = answer.json()["data"][0]["url"]
        assert httpx.get(url).status_code == 200
        assert httpx.get(url.replace("images/0", "images/1")).status_code == 401
        assert httpx.get(url.partition("?")[0]).status_code == 401
        assert httpx.post(url).status_code == 401
        revoke(tmp_path / "data", "Anna")
        time.sleep(1.1)
        assert httpx.get(url).status_code == 401  # it ends with the key


# ---------------------------------------------------------------- connections
def test_a_head_that_does_not_end_is_cut(tmp_path):
    """Nobody has shown a key yet."""
    with running(tmp_path) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ")
            with pytest.raises(OSError):
                for _ in range(50):
                    sock.sendall(b"a" * (1 << 20))
                    time.sleep(0.01)
        long = {"X-Long": "a" * 60_000}
        assert all(server.get("/healthz", headers=long).status_code == 200 for _ in range(3))
        body = {"prompt": "x", "images": [base64.b64encode(png((900, 900))).decode()] * 2}
        assert server.post("/api/jobs", body).status_code in (202, 400)
        assert answered_meanwhile(server, b'{"prompt": "x", "images": ["' + b"A" * (12 << 20) + b'"]}') > 5


def answered_meanwhile(server: Server, body: bytes) -> int:
    """How often the server said that it lives while three such bodies were taken in."""
    how = {"content": body, "headers": {"Content-Type": "application/json"}, "timeout": 60}
    with ThreadPoolExecutor() as pool, httpx.Client(base_url=server.url, timeout=5) as client:
        uploads = [pool.submit(httpx.post, f"{server.url}/api/jobs", **how) for _ in range(3)]
        answers = 0
        while not all(upload.done() for upload in uploads):
            answers += client.get("/healthz").status_code == 200
        assert {upload.result().status_code for upload in uploads} == {400}
    return answers


def test_who_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("lanting.serve.heads.SECONDS", 0.3)

    async def answer(scope, receive, send) -> None:
        await asyncio.sleep(0.6)  # an answer may take as long as it likes
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def use() -> None:
        server = uvicorn.Server(uvicorn.Config(answer, port=0, http=Heads, log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with asyncio.timeout(5):
            for said in (b"", b"GET / HTTP/1.1\r\nHost"):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(said)
                assert await reader.read() == b""
                writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(2):
                writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            writer.close()
        server.should_exit = True
        await serving

    asyncio.run(use())


# ---------------------------------------------------------------- addresses
@pytest.mark.parametrize(
    "address",
    (
        *(
            "127.0.0.1",
            "10.0.0.1",
            "172.16.3.4",
            "192.168.0.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "224.0.0.1",
        ),
        *("::1", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"),
        *("::", "ff02::1", "::7f00:1", "::a00:1", "::ffff:0:7f00:1", "64:ff9b:1::a00:1", "fec0::1"),
    ),
)
def test_private_addresses_are_known(address):
    assert not is_public(address)


def test_public_addresses_are_known():
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1:248:1893:25c8:1946")


@pytest.mark.parametrize(
    "url",
    (
        *("http://127.0.0.1/x.png", "http://localhost/x.png", "http://[::1]/", "http://2130706433/", "http://0x7f.1/"),
        *("http://169.254.169.254/latest/meta-data", "https://user:pass@example.com/", "http://example.com:22/"),
        "http:///x",
    ),
)
def test_addresses_inside_are_not_fetched(url):
    with pytest.raises(PictureError, match="can't be fetched from its address"):
        asyncio.run(fetch(url, Limits(seconds=3)))


class Web(BaseHTTPRequestHandler):
    """Pictures, and things that are none."""

    def do_GET(self) -> None:
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/picture.png")
            self.end_headers()
            return
        self.send_response(200)
        if self.path != "/headers":
            self.end_headers()
        self.flush_headers()
        try:
            if self.path == "/headers":  # a byte now and then
                for _ in range(60):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            if self.path == "/slow":
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            self.wfile.write(b"x" * 300_000 if self.path == "/large" else png())
        except OSError:
            pass

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture(scope="module")
def web():
    server = HTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_fetching_has_limits(web):
    limits = Limits(most=100_000, seconds=1.0, private=True)
    picture = asyncio.run(Eyes(limits).picture(f"{web}/picture.png"))
    assert picture.size == (64, 32)
    for path in ("/redirect", "/large", "/slow", "/headers"):
        began = time.monotonic()
        with pytest.raises(PictureError, match="can't be fetched"):
            asyncio.run(fetch(f"{web}{path}", limits))  # which waits for its thread
        assert time.monotonic() - began < 3, path


def test_a_name_is_resolved_once_and_pinned(monkeypatch, web):
    """The second answer of a name that changes its mind is never asked for."""
    port, asked = int(web.rpartition(":")[2]), []

    def resolve(host, port_, *_, **how):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port_))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    connected = []
    real = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: connected.append(to) or real(self, to))
    asyncio.run(fetch(f"http://pictures.example.com:{port}/picture.png", Limits(private=True)))
    assert asked[0] == "pictures.example.com" and set(asked[1:]) <= {"127.0.0.1"} and connected == [("127.0.0.1", port)]


def test_fetching_is_off_unless_asked_for(plain):
    for url in ("http://example.com/x.png", "HTTPS://example.com/x.png"):
        answer = plain.post("/api/jobs", json={"prompt": "x", "images": [url]})
        assert answer.status_code == 400 and "fetches no addresses" in answer.text


def test_settings_are_checked(tmp_path):
    twice = (Served("nano", "nano"), Served("nano", "/elsewhere/nano"))
    for settings in (Settings(tmp_path, twice), replace(Settings(tmp_path), port=70_000)):
        with pytest.raises(LantingError):
            open_house(settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"caps": Caps(waiting=0)},  # all jobs were refused
        {"caps": Caps(pixels=1)},
        {"timeout": 0.0},  # all jobs failed
        {"timeout": float("nan")},
        {"drain": -1.0},
        {"keep_days": -1.0},  # all finished jobs were forgotten, those of today, too
        {"hosts": ("https://pictures.example.com",)},
        {"hosts": ("",)},
        {"origins": ("https://ui.example.com/",)},  # browsers send no slash
        {"origins": ("ui.example.com",)},
        {"origins": ("*",)},
    ],
)
def test_settings_that_could_not_work_are_refused(tmp_path, wrong):
    with pytest.raises(RequestError, match=r"must be|takes"):
        open_house(Settings(tmp_path, keys=False, **wrong))


def test_settings_that_work_are_taken(tmp_path):
    origins = ("https://ui.example.com:8443", "http://[::1]:3000", "app://obsidian.md")
    check(Settings(tmp_path, hosts=("pictures.example.com:443", "::1"), origins=origins, keep_days=0.0, drain=0.0))


WRONG = {  # body -> what is said of it
    b"": "no JSON object",
    b"{": "is no JSON:",
    b"[1]": "no JSON object",
    b'{"zzz": 1}': "zzz is not known here: leave it out",
    b'{"size": [1, 2, 3]}': "size is of no kind",
    b'{"prompt": null}': "prompt is of no kind",
    b'{"model": 5}': "model must be a text",
    b'{"steps": 1.5}': "steps must be a whole number",
    b'{"strength": "x"}': "strength must be a number",
    b'{"rewrite": "maybe"}': "rewrite must be a yes or no, true or false",
    b'{"images": "x"}': "images must be a list",
    b'{"images": [null]}': "images.0 must be a text",
    b'{"options": []}': "options must be an object",
    b'{"lora": {"ink": "x"}}': "lora.ink must be a number",
    b'{"priority": "urgent"}': "priority must be 'low', 'normal' or 'high'",
}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_is_wrong_with_a_request_is_said_in_our_words(plain, monkeypatch, language):
    """They were pydantic's and the framework's: "size.str: Input should be a valid string", "Method Not Allowed"."""
    monkeypatch.setenv("LANTING_LANG", language)
    client = plain
    answers = [(client.post("/api/jobs", content=body), words) for body, words in WRONG.items()]
    for query, words in (("limit=0", "at least 1"), ("limit=201", "at most 200"), ("search=" + "x" * 201, "200 char")):
        answers.append((client.get(f"/api/jobs?{query}"), words))
    answers.append((client.post("/sdapi/v1/png-info", json={}), "image is missing"))
    answers.append((client.post("/v1/images/edits", data={"n": "x"}, files={"image": png()}), "n must be a whole"))
    answers.append((client.put("/api/jobs"), "does not take PUT"))
    for answer, words in answers:
        body = answer.json()
        told = body.get("detail") or body["error"]["message"]
        assert answer.status_code in (400, 405, 422)
        assert words in told if language == "en" else re.search("[\u4e00-\u9fff]", told), told
