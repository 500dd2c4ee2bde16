"""What strangers send: pictures that are none, names that are others', addresses inside. Made by chance from a seed.

`benchmarks/serve_attack.py` sends thousands of them to a server started from the shell, `test_attack.py` a few.
"""

from __future__ import annotations

import base64
import io
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import httpx
from PIL import Image
from test_openai import png

from fakes import bare_png

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
SVG = b"""<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "%s"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY x SYSTEM "file:///etc/passwd">]><svg xmlns="http://www.w3.org/2000/svg" width="99999" height="99999">
<script>fetch('http://127.0.0.1')</script><image href="file:///etc/passwd"/><text>&b;&x;</text></svg>"""
HEADS = (
    b"%PDF-1.7\n",
    b"PK\x03\x04",
    b"\x7fELF",
    b"<html><script>alert(1)</script>",
    b"\0\0\0\x18ftypmp42",
    b"MZ",
    b"#!/bin/sh",
)


@cache
def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (64, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


@cache
def gif(frames: int) -> bytes:
    """A few bytes a frame."""
    frame = b"\x21\xf9\x04\x00\x01\x00\x00\x00\x2c\0\0\0\0\x01\0\x01\0\x00\x02\x02\x44\x01\x00"
    return b"GIF89a\x08\0\x08\0\x80\0\0\0\0\0\xff\xff\xff" + frame * frames + b";"


@cache
def moving(kind: str, frames: int) -> bytes:
    buffer = io.BytesIO()
    pictures = [Image.new("RGB", (16, 16), (number % 256, 0, 0)) for number in range(frames)]
    pictures[0].save(buffer, format=kind, save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


@cache
def chunk_bomb(kind: bytes) -> bytes:
    """A small picture with 64 MB in one compressed chunk of text or of a colour profile."""
    body = {b"zTXt": b"k\0\0", b"iCCP": b"p\0\0", b"iTXt": b"k\0\1\0\0\0"}[kind] + zlib.compress(b"\0" * (64 << 20), 9)
    whole = png((16, 16))
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return whole[:33] + chunk + whole[33:]


@cache
def lying_jpeg() -> bytes:
    """65,500 pixels wide and high, in a kilobyte."""
    data = bytearray(encoded("JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def cut(chance: random.Random) -> bytes:
    data = encoded(chance.choice([*FORMATS]))
    return data[: chance.randrange(len(data))]


def flipped(chance: random.Random) -> bytes:
    data = bytearray(encoded(chance.choice([*FORMATS])))
    for _ in range(chance.randint(1, 30)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def odd(chance: random.Random) -> bytes:
    """Kinds that are whole pictures, of formats or modes that few expect."""
    return encoded(*chance.choice([("TIFF", "RGB"), ("BMP", "RGB"), ("ICO", "RGBA"), ("JPEG", "CMYK"), ("PNG", "P"),
        ("PNG", "I;16"), ("PNG", "LA"), ("PNG", "1"), ("PPM", "RGB"), ("TGA", "RGB")]))  # fmt: skip


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "bomb of 400 megapixels": lambda chance: bare_png(20_000, 20_000),
    "bomb of 81 megapixels": lambda chance: bare_png(9000, 9000),
    "bomb in a chunk": lambda chance: chunk_bomb(chance.choice([b"zTXt", b"iCCP", b"iTXt"])),
    "JPEG that lies about its size": lambda chance: lying_jpeg(),
    "truncated": cut,
    "flipped bytes": flipped,
    "wrong kind": lambda chance: chance.choice(HEADS) + chance.randbytes(chance.randrange(2000)),
    "GIF of 10,000 frames": lambda chance: gif(10_000),
    "moving WebP or PNG": lambda chance: moving(chance.choice(["WEBP", "PNG"]), 60),
    "SVG": lambda chance: SVG % (b"A" * chance.randrange(10_000)),
    "nothing": lambda chance: b"",
    "chance": lambda chance: chance.randbytes(chance.randrange(1, 5000)),
    "odd format": odd,
    "picture and page": lambda chance: png() + b"<html><script>alert(1)</script>" + chance.randbytes(99),
    "a picture": lambda chance: encoded(chance.choice([*FORMATS])),
}
# (address, whether as a form, field)
WAYS = (
    ("/v1/images/edits", True, "image"),
    ("/v1/images/edits", True, "mask"),
    ("/v1/images/variations", True, "image"),
    ("/v1/images/edits", False, "image"),
    ("/api/jobs", False, "images"),
    ("/api/jobs", False, "mask"),
    ("/api/generate", False, "images"),
    ("/sdapi/v1/img2img", False, "init_images"),
    ("/sdapi/v1/png-info", False, "image"),
)


@dataclass(frozen=True)
class Upload:
    """One request with a picture in it."""

    kind: str
    path: str
    form: bool
    field: str
    data: bytes
    says: str  # the type it claims to have

    def send(self, client: httpx.Client) -> httpx.Response:
        told = {"prompt": "x", "model": "nano", "steps": 1, "size": "64x32"}
        if self.form:
            files = {"image": ("a.png", png(), "image/png"), self.field: ("../../a.png", self.data, self.says)}
            return client.post(self.path, data={name: str(value) for name, value in told.items()}, files=files)
        told = told if self.path.startswith(("/v1", "/api/jobs")) else {"prompt": "x", "model": "nano", "steps": 1}
        told.pop("model") if self.path == "/sdapi/v1/img2img" else None
        text = base64.b64encode(self.data).decode()
        text = f"data:{self.says};base64,{text}" if len(self.data) % 2 and self.path != "/api/generate" else text
        body = {**told, self.field: [text] if self.field.endswith("images") else text}
        if self.field == "mask":
            body["images"] = [base64.b64encode(png()).decode()]
        return client.post(self.path, json=body)


def uploads(count: int, seed: int = 1) -> Iterator[Upload]:
    """Every kind in its turn, by a way and with a type of chance."""
    chance, names = random.Random(seed), [*KINDS]
    types = [*FORMATS.values(), "image/svg+xml", "text/html", "application/octet-stream", "", "image/png; x=\u00fc"]
    for number in range(count):
        kind = names[number % len(names)]
        path, form, field = chance.choice(WAYS)
        says = chance.choice(types) if form or chance.random() < 0.5 else "image/png"
        yield Upload(kind, path, form, field, KINDS[kind](chance), says.encode("ascii", "ignore").decode())


# ---------------------------------------------------------------- who is not to come in
@dataclass(frozen=True)
class Probe:
    """One attempt, and what counts as refused."""

    what: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""
    refused: tuple[int, ...] = (403,)


STRANGERS = ("", "a b", "127.0.0.1.evil.com", "localhost.evil.com:8353", "[::ffff:1.2.3.4]", "evil.com", "evil.com:80")
STRANGERS += ("127.0.0.1@evil.com", "localhost%00.evil.com", "169.254.169.254", "0.0.0.0", "xn--80ak6aa92e.com")
DOORS = (("GET", "/api/jobs"), ("POST", "/api/jobs"), ("POST", "/v1/images/generations"), ("POST", "/api/generate"),
         ("POST", "/sdapi/v1/txt2img"), ("POST", "/sdapi/v1/interrupt"), ("POST", "/mcp"), ("GET", "/metrics"),
         ("POST", "/en/gradio_api/queue/join"), ("POST", "/en/gradio_api/upload"), ("POST", "/logout"))  # fmt: skip
UP = ("../../../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/%2e%2e/etc/passwd", "queue.sqlite")
UP += ("....//....//etc/passwd", "..%252f..%252fetc%252fpasswd", "..%5c..%5cetc%5cpasswd", "/etc/passwd")
UP += ("%00/etc/passwd", "..%c0%af..%c0%afetc/passwd", "../queue.sqlite", "file:///etc/passwd")
ROOMS = ("/", "/api/jobs/", "/api/jobs/0/images/", "/v1/models/", "/studio/before/", "/en/", "/en/assets/")
ROOMS += ("/en/static/", "/en/gradio_api/file=", "/en/gradio_api/file/", "/en/theme.css/")
INSIDE = ("http://127.0.0.1/x.png", "http://localhost/x.png", "http://[::1]/", "http://2130706433/", "http://0x7f.1/",
          "http://0177.0.0.1/", "http://127.1/", "http://169.254.169.254/latest/meta-data", "http://[::ffff:127.0.0.1]/",
          "http://[64:ff9b::7f00:1]/", "http://10.0.0.1/", "http://192.168.0.1/", "http://0.0.0.0/", "http://x@127.0.0.1/",
          "http://127.0.0.1:{port}/x.png", "http://localhost:{port}/", "https://127.0.0.1:{port}/", "http://example.com:22/",
          "file:///etc/passwd", "ftp://127.0.0.1/", "gopher://127.0.0.1:{port}/", "dict://127.0.0.1/", "HTTP://LOCALHOST/",
          "http://127.0.0.1%0d%0aX:y/", "http:///x", "http://localhost.localdomain/", "//127.0.0.1/x.png")  # fmt: skip


def probes(canary: int) -> Iterator[Probe]:
    """`canary`: a port of this computer where nobody must ring."""
    json_ = {"Content-Type": "application/json", "Host": "localhost"}
    for method, path in DOORS:
        for host in STRANGERS:
            yield Probe("DNS rebinding", method, path, json_ | {"Host": host}, b'{"prompt": "x"}', (403, 400))
        for origin in ("http://evil.com", "null", "http://127.0.0.1:9", "https://localhost.evil.com", "file://"):
            yield Probe("CSRF", method, path, json_ | {"Origin": origin}, b'{"prompt": "x"}')
        cross = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
        yield Probe("CSRF", method, path, json_ | cross, b'{"prompt": "x"}')
        yield Probe("CSRF", "OPTIONS", path, {"Host": "localhost", "Origin": "http://evil.com"})
        if method == "POST" and path.startswith(("/api", "/v1", "/sdapi/v1/txt2img")):
            for kind in ("text/plain", "application/x-www-form-urlencoded"):  # what a page sends without asking
                simple = {"Host": "localhost", "Content-Type": kind, "Origin": "null"}
                yield Probe("CSRF", method, path, simple, b'{"prompt": "x"}')
    for room in ROOMS:
        for way in UP:
            yield Probe("traversal", "GET", room + way, {"Host": "localhost"}, b"", (400, 403, 404, 405, 422))
    for url in INSIDE:
        address = url.format(port=canary)
        for path, field in (("/api/jobs", "images"), ("/v1/images/edits", "image"), ("/api/generate", "images"),
                            ("/sdapi/v1/img2img", "init_images"), ("/sdapi/v1/png-info", "image")):  # fmt: skip
            value = f'["{address}"]' if field.endswith("images") else f'"{address}"'
            model = ', "model": "nano"' if path == "/api/generate" else ""
            body = f'{{"prompt": "x", "{field}": {value}{model}}}'.encode()
            yield Probe("SSRF", "POST", path, json_, body, (400, 422))


def ring(port: int, probe: Probe) -> tuple[int, bytes]:
    """The probe as it is written: no client of ours makes its path or its Host better."""
    lines = [f"{probe.method} {probe.path} HTTP/1.1", "Connection: close", f"Content-Length: {len(probe.body)}"]
    lines += [f"{name}: {value}" for name, value in probe.headers.items()]
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + probe.body)
        data = b""
        while part := sock.recv(1 << 16):
            data += part
    return int(data.split(b" ", 2)[1]), data.partition(b"\r\n\r\n")[2]


class Canary:
    """A port that counts who rings."""

    def __init__(self, port: int = 0) -> None:
        import threading

        self.sock = socket.create_server(("127.0.0.1", port))
        self.port, self.rung = self.sock.getsockname()[1], 0
        threading.Thread(target=self.count, daemon=True).start()

    def count(self) -> None:
        while True:
            try:
                caller, _ = self.sock.accept()
            except OSError:
                return
            self.rung += 1
            caller.close()
