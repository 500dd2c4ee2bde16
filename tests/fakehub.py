"""A small Hugging Face hub on loopback: repositories from folders, byte ranges, and faults on request.

It answers the routes that a pull needs (`/api/models/ID/revision/REV`, `/api/models/ID/tree/SHA`,
`/ID/resolve/SHA/FILE`) and remembers every request, so that a test can say what went over the wire.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40


@dataclass
class FakeHub:
    """`files` is the repository. `cuts[path]` = after how many bytes each answer in turn breaks off."""

    repo: str
    files: dict[str, bytes]
    commit: str = COMMIT
    revisions: tuple[str, ...] = ("main",)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    lies: dict[str, bytes] = field(default_factory=dict)  # path -> what is served instead of the contents
    errors: dict[str, list[int]] = field(default_factory=dict)  # path -> HTTP errors answered first
    ranges: bool = True
    gated: bool = False
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    endpoint: str = ""

    def tree(self) -> list[dict[str, object]]:
        return [self.entry(path, data) for path, data in self.files.items()]

    def entry(self, path: str, data: bytes) -> dict[str, object]:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": oid}
        if path.endswith((".safetensors", ".gguf")):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def fetched(self, path: str) -> list[str]:
        """The Range header ("" for none) of every request for a file."""
        return [headers.get("range", "") for verb, where, headers in self.requests if where.endswith(path)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(("GET", path, {key.lower(): value for key, value in self.headers.items()}))
        api = f"/api/models/{hub.repo}"
        if path.startswith(f"{api}/revision/"):
            asked = path.rsplit("/", 1)[1]
            if hub.gated:
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            if asked not in (*hub.revisions, hub.commit):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self.json({"id": hub.repo, "sha": hub.commit, "siblings": [], "private": False, "tags": []})
        if path.startswith(f"{api}/tree/{hub.commit}"):
            return self.json(hub.tree())
        start = f"/{hub.repo}/resolve/{hub.commit}/"
        if path.startswith(start) and (name := path.removeprefix(start)) in hub.files:
            return self.file(name, hub.lies.get(name, hub.files[name]))
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def file(self, name: str, data: bytes) -> None:
        hub, begin, status = self.hub, 0, 200
        if hub.errors.get(name):
            return self.answer(hub.errors[name].pop(0), b"busy")
        headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if hub.ranges and (asked := self.headers.get("Range")):
            begin, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            if begin >= len(data):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        body = data[begin:]
        cut = hub.cuts[name].pop(0) if hub.cuts.get(name) else len(body)
        self.answer(status, body[:cut], headers, length=len(body))
        if cut < len(body):
            self.close_connection = True  # fewer bytes than promised

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int = -1) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Run the hub in a thread on a free loopback port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
