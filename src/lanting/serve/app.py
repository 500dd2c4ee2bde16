"""The application: every dialect's routes over one house, the guard around all of them.

The studio is mounted by whoever calls `build_app`: `studio(app, house)` gets the finished application and may mount
itself at "/", behind the same guard. Without it "/" says what is here.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from lanting.core.errors import LantingError
from lanting.serve import a1111, ollama, openai, own
from lanting.serve.bodies import Room
from lanting.serve.common import json_answer, plain_error
from lanting.serve.errors import MissingError, ServeError, answer_to, misread
from lanting.serve.guard import Door, Guard
from lanting.serve.house import House
from lanting.serve.mcp_door import McpDoor

Studio = Callable[[FastAPI, House], None]
logger = logging.getLogger("lanting.serve")


class HttpError(ServeError):
    """What the framework refuses: an unknown address, a wrong method, a body that is no JSON."""

    code = "invalid_request"


def build_app(house: House, studio: Studio | None = None) -> FastAPI:
    """The server as an ASGI application; its lifespan starts and stops the workers."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with house.living():
            yield

    app = FastAPI(title="Lanting", version=version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.house = house
    app.state.login = lambda scope: None  # the studio has a page for it
    login = lambda scope: app.state.login(scope)  # noqa: E731
    room = Room(house.settings.caps.bodies * house.settings.caps.body)
    door = Door(house.settings, house.keyring, house.signer, house.meters, shaped, room, login)
    app.add_middleware(Guard, door=lambda: door)
    if house.settings.origins:  # before the guard: browsers ask without a key whether they may, and read refusals too
        app.add_middleware(
            CORSMiddleware, allow_origins=house.settings.origins, allow_methods=["*"], allow_headers=["*"]
        )
    for kind, handler in handlers().items():
        app.add_exception_handler(kind, handler)
    for dialect in (own, openai, ollama, a1111):
        app.include_router(dialect.router(house))
    app.router.routes.append(Route("/mcp", McpDoor(house), name="mcp"))
    care(app, house)
    if studio is None:
        # HEAD: how Ollama's command line asks whether anyone is there
        app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)(lambda: PlainTextResponse(WELCOME))
    else:
        studio(app, house)
    return app


WELCOME = """Lanting is running.

  /v1          OpenAI images          /api/jobs       Lanting's own (see /openapi.json)
  /api/...     Ollama                 /metrics        Prometheus
  /sdapi/v1    A1111                  /healthz, /readyz
  /mcp         MCP
"""


def version() -> str:
    from lanting import __version__

    return __version__


def care(app: FastAPI, house: House) -> None:
    """What whoever runs the server asks for."""

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["care"], summary="The server lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["care"], summary="The server takes jobs and can draw them; 503 where not")
    async def readyz() -> JSONResponse:
        told: dict[str, Any] = {"status": "ready" if house.ready else "not ready"}
        crews = {name: model.crew for name, model in house.desk.models.items()}
        if any(len(model.hands) > 1 or model.waits for model in house.desk.models.values()):
            told["workers"] = crews
        return JSONResponse(told, 200 if house.ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse, tags=["care"], summary="For Prometheus")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(house.meters.page(house.desk), media_type="text/plain; version=0.0.4")


def shaped(path: str, error: LantingError) -> Response:
    """An error in the words of the dialect an address belongs to."""
    for prefix, body in (
        (("/v1",), openai.error_body),
        (("/sdapi",), a1111.error_body),
        (ollama.PATHS, ollama.error_body),
    ):
        if path.startswith(prefix):
            return json_answer(answer_to(error), body(error))
    return plain_error(error)


def handlers() -> dict[Any, Any]:
    """Every failure becomes a sentence; what nobody foresaw a general one, the rest in the log."""

    async def explained(request: HttpRequest, error: LantingError) -> Response:
        return shaped(request.url.path, error)

    async def framework(request: HttpRequest, error: HTTPException) -> Response:
        if isinstance(error.__cause__, LantingError):  # of the guard, met while the body was read
            return shaped(request.url.path, error.__cause__)
        if error.status_code == 404:
            return shaped(request.url.path, MissingError("there is nothing at this address; see /openapi.json"))
        if error.status_code == 405:
            refusal = HttpError("this address does not take {method}; see /openapi.json", method=request.method)
        else:
            refusal = HttpError(str(error.detail))
        refusal.status = error.status_code
        return shaped(request.url.path, refusal)

    async def invalid(request: HttpRequest, error: RequestValidationError) -> Response:
        said = misread(error.errors())
        refusal = HttpError(said.sentence, **said.values)
        refusal.status = 422
        return shaped(request.url.path, refusal)

    async def unforeseen(request: HttpRequest, error: Exception) -> Response:
        logger.error("answer failed", extra={"route": request.url.path}, exc_info=error)
        refusal = HttpError("something went wrong inside; the server's log has it")
        refusal.status, refusal.code = 500, "internal_error"
        return shaped(request.url.path, refusal)

    return {
        LantingError: explained,
        HTTPException: framework,
        RequestValidationError: invalid,
        Exception: unforeseen,
    }
