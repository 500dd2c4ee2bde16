"""The studio's addresses: `/` leads to `/en/` or `/zh/`, two pages built from the same code. Nothing else is Gradio's.

Gradio takes seconds to import, so it is opened beside the running server, in a thread; until then a small page says so
and asks again. Of its many addresses only those that the page needs are let through, and its document is given our
language, our icon and a policy under which a browser loads nothing from elsewhere. Rejected: `mount_gradio_app` on the
application itself, which would answer every unknown address and open before the port does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lanting.serve.common import caller_of
from lanting.serve.errors import ClosedError, MissingError
from lanting.serve.house import House
from lanting.serve.studio.login import asks_for_a_page, enter, leave, login_page
from lanting.serve.studio.look import POLICY, SEAL, page, seal
from lanting.serve.studio.words import LANGUAGES, preferred, speaker

NEEDED = re.compile(
    r"(assets|static)/.*|theme\.css|config|gradio_api/(queue/(join|data)|upload|upload_progress|heartbeat/.*|file=.*"
    r"|startup-events|run/predict|component_server|cancel|reset|info|app_id)|svelte/.*"
)
LANGUAGE = "lanting_language"  # the cookie of the switch
PATIENCE = 8.0  # seconds that the engine gets to open before Gradio is imported beside it
logger = logging.getLogger("lanting.serve")


@dataclass
class Studio:
    """One server's pages."""

    house: House
    rooms: dict[str, ASGIApp] = field(default_factory=dict[str, ASGIApp])  # by language; empty until it is open
    refused: bool = False
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def live(self) -> None:
        """Open the pages, and keep them until the server stops."""
        for _ in range(int(PATIENCE / 0.1)):
            if self.house.ready or self.stop.is_set():
                break
            await asyncio.sleep(0.1)
        if self.stop.is_set():
            return
        try:
            built = await asyncio.to_thread(build, self.house)
            async with AsyncExitStack() as stack:
                for app in built.values():
                    await stack.enter_async_context(app.router.lifespan_context(app))
                self.rooms = dict(built)
                await self.stop.wait()
                self.rooms = {}
        except Exception as error:  # Gradio is large: whatever it can't do here, the APIs go on
            self.refused = True
            logger.error("the studio can't be opened", exc_info=error)


def build(house: House) -> dict[str, FastAPI]:
    """Each language's page as an application."""
    folder = house.settings.data / "studio"
    shutil.rmtree(folder, ignore_errors=True)  # what was uploaded to a server that is gone
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    from lanting.serve.studio.page import application

    return {language: application(house, language) for language in LANGUAGES}


def studio(app: FastAPI, house: House) -> None:
    """Mount it: what `build_app` is given."""
    pages = Studio(house)
    outer = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(running: FastAPI) -> AsyncIterator[Any]:
        async with outer(running) as state:
            living = asyncio.create_task(pages.live())
            try:
                yield state
            finally:
                pages.stop.set()
                await asyncio.wait({living}, timeout=5)
                living.cancel()

    app.router.lifespan_context = lifespan
    app.state.login = lambda scope: login_page(scope) if asks_for_a_page(scope) else None
    routes(app, house)
    for language in LANGUAGES:
        app.router.routes.append(Route(f"/{language}", to_page(language), methods=["GET"]))
        app.router.routes.append(Route(f"/{language}/{{rest:path}}", Room(pages, language)))


def routes(app: FastAPI, house: House) -> None:
    """What is not Gradio's."""

    async def home(request: HttpRequest) -> Response:
        if request.method == "HEAD" or "text/html" not in request.headers.get("accept", ""):
            from lanting.serve.app import WELCOME

            return PlainTextResponse(WELCOME)
        chosen = request.query_params.get("language")
        language = preferred(request.headers.get("accept-language", ""), chosen or request.cookies.get(LANGUAGE))
        answer = RedirectResponse(f"/{language}/", 303, headers={"Vary": "Accept-Language, Cookie"})
        if chosen in LANGUAGES:
            answer.set_cookie(LANGUAGE, chosen, 365 * 86_400, httponly=True, samesite="lax")
        return answer

    async def before(request: HttpRequest) -> Response:
        """The picture that an edit began with."""
        job = await house.desk.job(request.path_params["id_"], caller_of(request))
        images = job.asked["request"]["images"]
        path = house.desk.files.picture(images[0]["sha256"]) if images else None
        if path is None or not path.is_file():
            raise MissingError("the job has no picture {index}", index=0)
        return FileResponse(path, headers={"Cache-Control": "private, max-age=31536000, immutable"})

    async def entered(request: HttpRequest) -> Response:
        return await enter(house, request)

    async def icon(request: HttpRequest) -> Response:
        return Response(SEAL, media_type="image/svg+xml", headers={"Cache-Control": "max-age=86400"})

    own = [Route("/", home, methods=["GET"]), Route("/studio/before/{id_}", before, methods=["GET"])]
    own += [Route("/login", entered, methods=["POST"]), Route("/logout", leave, methods=["POST"])]
    app.router.routes.extend([*own, Route("/favicon.ico", icon, methods=["GET"])])


def to_page(language: str) -> Any:
    async def lead(request: HttpRequest) -> Response:
        return RedirectResponse(f"/{language}/", 303)

    return lead


class Room:
    """One language's page: Gradio behind a list of what it needs, or the page that waits for it."""

    def __init__(self, pages: Studio, language: str) -> None:
        self.pages, self.language = pages, language

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rest = scope["path"].removeprefix(f"/{self.language}/")
        if rest and not NEEDED.fullmatch(rest):
            raise MissingError("there is nothing at this address; see /openapi.json")
        gradio = self.pages.rooms.get(self.language)
        if gradio is not None:
            inner = dict(scope, path_params={})
            await (gradio(inner, receive, send) if rest else document(gradio, self.language)(inner, receive, send))
        elif rest:
            raise ClosedError("the studio is being opened: try again in a moment")
        else:
            await self.opening()(scope, receive, send)

    def opening(self) -> Response:
        """Until it is open."""
        say = speaker(self.language)
        words = say("The studio is being opened: a moment, please.")
        if self.pages.refused:
            words = say("The studio can't be opened; the server's log says why. Other clients are served.")
        again = "" if self.pages.refused else '<meta http-equiv="refresh" content="1">'
        body = f'<div class="login">{seal()}<h1>{say("Lanting")}</h1><p id="opening">{words}</p></div>'
        return HTMLResponse(page(self.language, say("Lanting"), body, again), headers={"Cache-Control": "no-store"})


def document(gradio: ASGIApp, language: str) -> ASGIApp:
    """Gradio's document in our language and under our policy. Its own words follow `navigator.language`, so that says
    what the page was chosen to be."""

    async def rewritten(scope: Scope, receive: Receive, send: Send) -> None:
        status, body = 500, bytearray()

        async def gather(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            body.extend(message.get("body", b""))

        await gradio(scope, receive, gather)
        text = body.decode("utf-8", "replace")
        name = "zh-CN" if language == "zh" else "en"
        text = re.sub(r'<meta\s[^>]*(?:og:|twitter:)[^>]*>|<link rel="manifest"[^>]*>', "", text)
        text = text.replace('lang="en"', f'lang="{name}"', 1)
        # a form's post says where it comes from only under this policy; the header says no-referrer
        head = '<meta name="referrer" content="same-origin"><link rel="icon" href="/favicon.ico" type="image/svg+xml">'
        head += early(name)
        text = text.replace("<head>", f"<head>{head}", 1)
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store", "Vary": "Cookie"}
        await HTMLResponse(text, status, headers)(scope, receive, send)

    return GZipMiddleware(rewritten)


def early(name: str) -> str:
    """What must be known before Gradio starts: the language, and light or dark as it was chosen the last time."""
    return (
        f"<script>for (const [key, value] of [['language', '{name}'], ['languages', ['{name}']]])"
        "Object.defineProperty(navigator, key, {get: () => value});"
        "window.lantingShade = localStorage.getItem('lanting-shade');</script>"
    )
