"""The door: every request of every route, mounted ones included, passes here first.

1. Host: only names this server has. A web page that rebinds its own name to 127.0.0.1 brings that name along.
2. Origin: a browser says which page asks; another site's page may not, whatever it asks for.
3. Key, where keys are needed: `Authorization: Bearer KEY`, `Basic` with the key as password (browsers, A1111 clients),
   `X-API-Key`, the studio's cookie, or a picture's own signed address.
4. Size and time of the body, and the room that all bodies have together (`bodies`).

One ASGI function around the whole application rather than a dependency per route: a route that somebody adds later
is behind it without being told.
"""

from __future__ import annotations

import base64
import ipaddress
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lanting.core.errors import LantingError
from lanting.serve.bodies import Arriving, Room
from lanting.serve.errors import DeniedError, LargeError, NoKeyError, no_key
from lanting.serve.jobs import LOCAL, Caller
from lanting.serve.keys import Keyring
from lanting.serve.meters import Meters
from lanting.serve.settings import LOOPBACK, Settings, is_loopback
from lanting.serve.signing import Signer

OPEN = ("/healthz", "/readyz")  # for whoever watches that the server lives; they say nothing else
LOGIN = ("POST", "/login")  # where the studio's form sends the key; there only with the studio
COOKIE = "lanting_key"  # which no script reads and no other site sends
JSON_ONLY = ("/api/", "/v1/images/generations", "/sdapi/")  # what is sent there can't be anything else
CLOSE = (b"connection", b"close")  # after a body of which who knows how much is to come
FROM_PAGES = ("origin", "referer", "sec-fetch-site", "cookie")  # headers that browsers send, and programs don't
logger = logging.getLogger("lanting.serve.http")


@dataclass(frozen=True, slots=True)
class Door:
    """What the guard needs to decide."""

    settings: Settings
    keyring: Keyring
    signer: Signer
    meters: Meters
    shape: Callable[[str, LantingError], Response]  # an error in the words of the path's dialect
    room: Room  # for bodies
    login: Callable[[Scope], Response | None] = lambda scope: None  # what a browser without a key is shown


class Guard:
    """The ASGI function."""

    def __init__(self, app: ASGIApp, door: Callable[[], Door]) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        door, began, status, scope = self.door(), time.perf_counter(), 0, as_meant(scope)
        body = Arriving(door.settings.caps, door.room, receive, Headers(scope=scope))

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                body.leave()
                message.setdefault("headers", []).extend(ALWAYS if status != 413 else (*ALWAYS, CLOSE))
                door.meters.answer.observe(time.perf_counter() - began)
            elif message["type"] == "http.response.body" and not message.get("more_body") and not body.whole:
                await send({**message, "more_body": True})  # all that the client is told; it may still be sending
                await body.drop()
                message = {"type": "http.response.body"}
            await send(message)

        try:
            scope.setdefault("state", {})["caller"] = await admitted(door, scope)
        except LantingError as error:
            await turned_away(door, scope, receive, sent, error)
        else:
            try:
                await self.app(scope, body if scope["type"] == "http" else receive, sent)
            except LantingError as error:  # from a mounted application, which has no words for it
                if status:
                    raise
                await turned_away(door, scope, receive, sent, error)
        finally:
            body.leave()
            note(door, scope, status or 500, time.perf_counter() - began)


ALWAYS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


async def turned_away(door: Door, scope: Scope, receive: Receive, send: Send, error: LantingError) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    page = door.login(scope) if isinstance(error, NoKeyError) else None
    await (page or door.shape(scope["path"], error))(scope, receive, send)


def note(door: Door, scope: Scope, status: int, seconds: float) -> None:
    """A line of the access log: the route, not the address, which holds ids and signatures."""
    route = getattr(scope.get("route"), "path", None) or ("mounted" if status < 400 else "none")
    door.meters.requests.labels(route, str(status)).inc()
    caller = scope.get("state", {}).get("caller")
    extra = {"method": scope.get("method"), "route": route, "status": status, "ms": round(seconds * 1000, 1)}
    dull = status < 400 or scope["path"] in OPEN
    level = logging.DEBUG if dull else logging.WARNING if status >= 500 else logging.INFO
    logger.log(level, "answered", extra=extra | {"owner": getattr(caller, "id", None)})


async def admitted(door: Door, scope: Scope) -> Caller | None:
    """Who asks. Raises DeniedError, NoKeyError or LargeError."""
    headers = Headers(scope=scope)
    check_host(door.settings, headers.get("host", ""))
    check_origin(door.settings, headers)
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > door.settings.caps.body:
        raise LargeError("the request is larger than {most} MB: send less", most=door.settings.caps.body >> 20)
    if scope["path"] in OPEN or (scope.get("method"), scope["path"]) == LOGIN:
        return None
    if not door.settings.needs_keys:
        return LOCAL
    signed = door.signer.owner(scope["path"], scope["query_string"]) if scope.get("method") in ("GET", "HEAD") else None
    if signed is not None and (caller := await door.keyring.owner(signed)) is not None:
        return caller
    if (caller := await door.keyring.find(key_in(headers))) is not None:
        return caller
    raise no_key()


def key_in(headers: Headers) -> str:
    """The key that a request brings, in any of the ways that clients have."""
    kind, _, rest = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return rest.strip()
    if kind.lower() == "basic":
        try:
            name, _, password = base64.b64decode(rest, validate=True).decode().partition(":")
        except ValueError:  # no base64, no UTF-8, or letters that are neither
            return ""
        return password or name
    return headers.get("x-api-key", "").strip() or cookie_parser(headers.get("cookie", "")).get(COOKIE, "")


def check_host(settings: Settings, host: str) -> None:
    """Raises DeniedError for a name that is not this server's."""
    name = bare(host)
    known = name in (*LOOPBACK, *map(bare, settings.hosts))
    if not known and not is_loopback(settings.host):
        known = name in (bare(settings.host), socket.gethostname().lower()) or is_address(name)
    if not known:
        raise DeniedError(
            "this server is not called {host}: start it with --allow-host to let it be", host=repr(name[:80])
        )


def bare(host: str) -> str:
    """A host without port and brackets, in small letters."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def is_address(name: str) -> bool:
    """Whether it is an IP address. No page can rebind one."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def check_origin(settings: Settings, headers: Headers) -> None:
    """Raises DeniedError where a page of another site asks. Programs send no Origin."""
    origin, host = headers.get("origin"), headers.get("host", "")
    if origin in settings.origins:
        return
    if origin is not None and site_of(origin) != host.strip().lower():
        raise DeniedError("pages of other sites may not call this server: allow one with --allow-origin")
    going = headers.get("sec-fetch-mode") == "navigate"  # a link somebody followed; nothing is changed by a GET
    if headers.get("sec-fetch-site") == "cross-site" and not going:
        raise DeniedError("pages of other sites may not call this server: allow one with --allow-origin")


def as_meant(scope: Scope) -> Scope:
    """The request with its body called JSON where a program sent it under another name: curl calls it a form, and
    Ollama's own pages say nothing against that. Forms and plain text are what a page of another site can send without
    asking, so where any sign of a browser is there, JSON must be called JSON."""
    if scope.get("method") != "POST" or not scope["path"].startswith(JSON_ONLY):
        return scope
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "")
    if "json" in kind.lower() or kind.startswith("multipart/") or any(name in headers for name in FROM_PAGES):
        return scope
    rest = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return {**scope, "headers": [*rest, (b"content-type", b"application/json")]}


def site_of(origin: str) -> str | None:
    """Host and port of a page's address; None where it is no address."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None
