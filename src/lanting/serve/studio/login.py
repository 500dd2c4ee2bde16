"""The key, asked for once: a small page that keeps it in a cookie no script can read and no other site can send.

The cookie holds the key itself and is checked like one at every request, so revoking a key ends its sessions too. The
guard shows this page instead of an error where a browser asks for a page without a key.
"""

from __future__ import annotations

from html import escape
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Scope

from lanting.serve.guard import COOKIE
from lanting.serve.house import House
from lanting.serve.studio.look import page, seal
from lanting.serve.studio.words import preferred, speaker

DAYS = 30
MOST = 4096  # bytes of the form


def asks_for_a_page(scope: Scope) -> bool:
    """A browser that was sent here by a person, not a script's request."""
    headers = Headers(scope=scope)
    going = headers.get("sec-fetch-mode", "navigate") == "navigate"
    return scope.get("method") == "GET" and going and "text/html" in headers.get("accept", "")


def login_page(scope: Scope, wrong: bool = False) -> Response:
    """Where the key is typed. 401, so that programs understand too."""
    request = HttpRequest(scope)
    language = preferred(request.headers.get("accept-language", ""), request.cookies.get("lanting_language"))
    say = speaker(language)
    told = f'<p class="wrong" role="alert">{escape(say("That key does not work here."))}</p>' if wrong else ""
    body = f"""<form class="login" method="post" action="/login">{seal()}
<h1>{escape(say("Lanting"))}</h1><p>{escape(say("This server asks for a key. Whoever runs it can give you one."))}</p>
{told}<label for="key">{escape(say("Key"))}</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus placeholder="lk-…">
<button>{escape(say("Enter"))}</button></form>"""
    return HTMLResponse(page(language, say("Lanting"), body), 401, {"Cache-Control": "no-store"})


async def enter(house: House, request: HttpRequest) -> Response:
    """What the form sends. Its origin was checked by the guard."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST:
            break
    key = parse_qs(body[:MOST].decode("utf-8", "replace")).get("key", [""])[0].strip()
    if await house.keyring.find(key) is None:
        return login_page(request.scope, wrong=True)
    answer = RedirectResponse("/", 303)
    secure = request.url.scheme == "https" or request.headers.get("x-forwarded-proto") == "https"
    answer.set_cookie(COOKIE, key, DAYS * 86_400, path="/", secure=secure, httponly=True, samesite="strict")
    return answer


async def leave(request: HttpRequest) -> Response:
    answer = RedirectResponse("/", 303)
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return answer
