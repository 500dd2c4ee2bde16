"""Ollama's API as its clients draw pictures: /api/generate with NDJSON progress, and what they ask before.

Nothing is downloaded over HTTP: /api/pull answers for what is served and refuses the rest; models come with
`lanting pull` and `lanting serve --model`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from lanting.core.errors import LantingError
from lanting.core.types import Request
from lanting.serve.common import caller_of, finished, followed, once_of, pulsed, read_in, result_path, with_picture
from lanting.serve.errors import UnknownModelError, answer_to
from lanting.serve.house import House
from lanting.serve.intake import Order
from lanting.serve.jobs import Job
from lanting.serve.loras import lora_in
from lanting.serve.pictures import to_base64

PATHS = ("/api/generate", "/api/tags", "/api/show", "/api/ps", "/api/pull", "/api/version")
PATHS += ("/api/chat", "/api/embed", "/api/create", "/api/copy", "/api/delete", "/api/push", "/api/blobs")  # not here
NDJSON = "application/x-ndjson"
BOTH: dict[int | str, dict[str, Any]] = {200: {"content": {NDJSON: {}}}}  # beside JSON, for /openapi.json
VERSION = "0.14.0"  # the newest whose image clients these are


class Ask(BaseModel):
    """What clients send; further fields are ignored, as Ollama does."""

    model_config = ConfigDict(extra="allow")
    model: str = ""
    prompt: str | None = ""
    images: list[str] | None = Field(None, description="Base64 of pictures to edit.")
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    stream: bool | None = None
    options: dict[str, Any] | None = Field(
        None, description="seed, negative_prompt, guidance_scale, strength, rewrite, tries, lora."
    )


class Named(BaseModel):
    """show and pull name the model in either field."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    name: str | None = None
    stream: bool | None = None


def bare(name: str) -> str:
    """A model's name without Ollama's tag."""
    return name.removesuffix(":latest")


async def order_of(house: House, ask: Ask, request: HttpRequest) -> Order:
    """to_request."""
    own = ask.options or {}
    size = None
    if ask.width or ask.height:
        spec = house.desk.model(bare(ask.model)).spec
        width, height = spec.defaults.size if spec else (1024, 1024)
        size = (ask.width or width, ask.height or height)
    wish = Request(
        prompt=ask.prompt or "",
        negative_prompt=own.get("negative_prompt", own.get("negative")),
        size=size,
        steps=ask.steps or own.get("steps"),
        guidance_scale=own.get("guidance_scale"),
        seed=own.get("seed") if own.get("seed") not in (0, -1) else None,
        images=await house.eyes.pictures(list(ask.images or []), house.settings.caps.pictures),
        strength=own.get("strength"),
        rewrite=own.get("rewrite"),
        tries=own.get("tries"),
    )
    return Order(wish, bare(ask.model), "ollama", lora_in(own.get("lora")), once=once_of(request))


async def lines(house: House, request: HttpRequest, ask: Ask, job: Job) -> AsyncIterator[str]:
    """One line a step, then the picture or an error."""
    async with aclosing(followed(house, request, job)) as events:
        async for event in events:
            if event.kind == "step":
                told = {"done": False, "completed": event.body["step"], "total": event.body["steps"]}
                yield line({"model": ask.model, "created_at": now(), "response": "", **told})
    try:
        done = with_picture(await house.desk.job(job.id, caller_of(request)))
    except LantingError as error:
        yield line({"error": answer_to(error).sentence})
        return
    yield line(await result(house, ask, done))


async def result(house: House, ask: Ask, job: Job) -> dict[str, Any]:
    """from_result: the last line, or the only one. Times in nanoseconds."""
    data = await asyncio.to_thread(result_path(house, job, 0).read_bytes)
    assert job.outcome is not None
    seconds = job.outcome["seconds"]
    steps = int(job.outcome["recipes"][0]["request"]["steps"])
    return {
        "model": ask.model,
        "created_at": now(),
        "response": "",
        "image": to_base64(data),
        "done": True,
        "done_reason": "stop",
        "completed": steps,
        "total": steps,
        "total_duration": int(((job.ended or time.time()) - job.created) * 1e9),
        "load_duration": int(seconds.get("load", 0.0) * 1e9),
        "seed": job.outcome["recipes"][0]["request"]["seed"],
        **read_in(job, 0),
    }


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def line(told: dict[str, Any]) -> str:
    return json.dumps(told, ensure_ascii=False) + "\n"


def error_body(error: LantingError) -> dict[str, Any]:
    """An error in Ollama's shape."""
    return {"error": answer_to(error).sentence}


def entry(house: House, name: str) -> dict[str, Any]:
    """A model in a list."""
    model = house.desk.models[name]
    family = model.spec.name if model.spec else name
    details = {"format": "safetensors", "family": "qwen-image", "families": ["qwen-image"], "parent_model": family}
    digest = hashlib.sha256(f"lanting {name}".encode()).hexdigest()
    told = {"name": f"{name}:latest", "model": f"{name}:latest", "modified_at": now(), "size": 0, "digest": digest}
    return told | {"details": details | {"parameter_size": "", "quantization_level": ""}}


def router(house: House) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/api", tags=["ollama"])

    @routes.post("/generate", responses=BOTH, summary="Draw a picture, or load the model where there is no prompt")
    async def generate(ask: Ask, request: HttpRequest) -> Response:
        if not ask.prompt and not ask.images:
            house.desk.model(bare(ask.model))
            told = {"model": ask.model, "created_at": now(), "response": "", "done": True, "done_reason": "load"}
            return JSONResponse(told)
        job = await house.desk.submit(await order_of(house, ask, request), caller_of(request))
        if ask.stream is False:
            return JSONResponse(await result(house, ask, await finished(house, request, job)))
        return StreamingResponse(pulsed(lines(house, request, ask, job), "\n"), media_type=NDJSON)

    models(house, routes)
    return routes


def models(house: House, routes: APIRouter) -> None:
    """Routes of what is served."""

    @routes.get("/tags", summary="Models")
    async def tags() -> dict[str, Any]:
        return {"models": [entry(house, name) for name in house.desk.models]}

    @routes.get("/ps", summary="Models whose worker is ready")
    async def ps() -> dict[str, Any]:
        ready = [name for name, model in house.desk.models.items() if model.ready]
        return {
            "models": [entry(house, name) | {"expires_at": "2100-01-01T00:00:00Z", "size_vram": 0} for name in ready]
        }

    @routes.post("/show", summary="One model")
    async def show(ask: Named) -> dict[str, Any]:
        model = house.desk.model(bare(ask.model or ask.name or ""))
        details = entry(house, model.served.name)["details"]
        own = model.spec.defaults if model.spec else None
        info = {"general.architecture": "qwen-image", "general.basename": details["parent_model"]}
        words = "" if own is None else f"steps {own.steps}\nwidth {own.size[0]}\nheight {own.size[1]}"
        told = {"license": "", "modelfile": "", "parameters": words, "template": "{{ .Prompt }}", "modified_at": now()}
        return told | {"details": details, "model_info": info, "capabilities": ["image"]}

    @routes.post("/pull", responses=BOTH, summary="Nothing is downloaded: success for what is served")
    async def pull(ask: Named) -> Response:
        name = bare(ask.model or ask.name or "")
        if house.settings.model(name) is None:
            raise UnknownModelError(
                "{name} is not served here: run 'lanting pull', then 'lanting serve --model {name}'", name=name
            )
        if ask.stream is False:
            return JSONResponse({"status": "success"})
        return Response(line({"status": "pulling manifest"}) + line({"status": "success"}), media_type=NDJSON)

    @routes.get("/version", summary="The version of Ollama whose clients are understood")
    async def version() -> dict[str, str]:
        return {"version": VERSION}
