"""Lanting's own API, under /api/jobs: submit, watch, cancel, history. What the other dialects can't say is said here.

Its addresses never meet Ollama's, which owns /api/generate, /api/tags, /api/show, /api/ps, /api/pull, /api/version.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse

from lanting.core.errors import RequestError
from lanting.core.lang import explain
from lanting.core.types import Request
from lanting.serve.common import STREAMED, caller_of, event_stream, once_of, result_path, sse
from lanting.serve.errors import MissingError, as_told
from lanting.serve.files import ID
from lanting.serve.house import House
from lanting.serve.intake import Order
from lanting.serve.jobs import Caller, Event, Job, Search
from lanting.serve.layered import layered
from lanting.serve.pictures import TYPES, encoded, kind_of, to_base64
from lanting.specs import parse_size

NUMBER = re.compile(r"[0-9]{1,18}")  # of an event or a picture: SQLite's are hardly longer


class Ask(BaseModel):
    """What to draw. What is left out is as the model recommends."""

    model_config = ConfigDict(extra="forbid")
    prompt: str | list[str] = Field("", description="Words; or several prompts for one batch.")
    model: str | None = Field(None, description="One of GET /api/models; the server's first where it is left out.")
    task: str | None = Field(None, description="text_to_image, image_to_image, inpaint, edit, ...: inferred otherwise.")
    negative_prompt: str | None = None
    size: str | tuple[int, int] | None = Field(None, description='"1024x768", "16:9", or [width, height].')
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = Field(None, description="Same seed, same picture. Chosen, and told, where it is left out.")
    count: int = 1
    images: list[str] = Field(default=[], description="Base64, data URLs, or job:ID/INDEX of an earlier result.")
    mask: str | None = Field(None, description="As large as the first picture; white is drawn anew.")
    strength: float | None = None
    quality: str | None = Field(None, description="exact, high, balanced, fast: how much may be left out.")
    rewrite: bool | None = Field(None, description="The model's text encoder writes the prompt out first; as served.")
    tries: int | None = Field(None, description="Read quoted words back; up to so many seeds until they are right.")
    options: dict[str, Any] = {}
    lora: dict[str, float] | None = Field(None, description="Strengths by name; these LoRAs and no others.")
    priority: Literal["low", "normal", "high"] | None = Field(None, description="Normal, or the most a key may.")
    timeout: float | None = Field(None, description="Seconds of drawing after which the job is given up.")


def view(house: House, job: Job) -> dict[str, Any]:
    """A job as JSON."""
    place, run = house.desk.place(job), house.desk.runs.get(job.id)
    told: dict[str, Any] = {
        "id": job.id,
        "state": job.state,
        "model": job.model,
        "dialect": job.dialect,
        "created": job.created,
        "started": job.started,
        "ended": job.ended,
        "request": job.asked["request"],
        "lora": job.asked["lora"],
        "events": f"/api/jobs/{job.id}/events",
    }
    if place is not None:
        told["place"] = {"ahead": place.ahead, "waiting": place.waiting, "eta": place.eta}
    if run is not None and run.hand is not None and house.desk.models[job.model].crew["count"] > 1:
        told["worker"] = run.hand.post.number
    if run is not None and run.steps:
        told["progress"] = {"step": run.step, "steps": run.steps, "seconds": run.stepped}
    if job.outcome is not None:
        names = [f"/api/jobs/{job.id}/images/{index}" for index in range(len(job.outcome["images"]))]
        told["images"] = [{"url": url, **one} for url, one in zip(names, job.outcome["images"], strict=True)]
        told |= {"recipes": job.outcome["recipes"], "seconds": job.outcome["seconds"]}
    return told | ({} if job.error is None else {"error": as_told(job.error)})


def line_of(event: Event, previews: bool) -> str:
    """An event of a job as a server-sent event."""
    told = dict(event.body)
    if previews and event.preview is not None:
        told["preview"] = f"data:image/jpeg;base64,{to_base64(event.preview)}"
    return sse({"at": event.at, **told}, event.kind, event.seq)


def size_in(house: House, model: str | None, size: str | tuple[int, int] | None) -> tuple[int, int] | None:
    """A size in words as numbers."""
    spec = house.desk.model(model).spec
    if isinstance(size, str):
        return parse_size(size, spec) if spec is not None else None
    return size


async def order_of(house: House, ask: Ask, request: HttpRequest) -> Order:
    """to_request."""
    sources = [await source(house, text, caller_of(request)) for text in ask.images]
    wish = Request(
        prompt=ask.prompt if isinstance(ask.prompt, str) else tuple(ask.prompt),
        task=ask.task,
        negative_prompt=ask.negative_prompt,
        size=size_in(house, ask.model, ask.size),
        steps=ask.steps,
        guidance_scale=ask.guidance_scale,
        seed=ask.seed,
        count=ask.count,
        images=await house.eyes.pictures(sources, house.settings.caps.pictures),
        mask=None if ask.mask is None else await house.eyes.mask(ask.mask),
        strength=ask.strength,
        quality=ask.quality,
        rewrite=ask.rewrite,
        tries=ask.tries,
        options=ask.options,
    )
    return Order(wish, ask.model, "lanting", ask.lora, ask.priority, ask.timeout, once_of(request))


async def source(house: House, text: str, caller: Caller) -> str | bytes:
    """The bytes of an earlier result, where one is named; else the text as it is."""
    if not text.startswith("job:"):
        return text
    id_, _, index = text.removeprefix("job:").partition("/")
    if not ID.fullmatch(id_) or not NUMBER.fullmatch(index):
        raise RequestError("an earlier result is named job:ID/INDEX, not {text}", text=repr(text[:60]))
    job = await house.desk.job(id_, caller)
    return await asyncio.to_thread(result_path(house, job, int(index)).read_bytes)


def router(house: House) -> APIRouter:
    """The routes."""
    routes, desk = APIRouter(prefix="/api", tags=["lanting"]), house.desk

    @routes.post("/jobs", status_code=202, summary="Submit a job")
    async def submit(ask: Ask, request: HttpRequest) -> dict[str, Any]:
        """Accepted means durable: the job is drawn even if the server is killed the moment after. An
        `Idempotency-Key` header makes the same request the same job."""
        job = await desk.submit(await order_of(house, ask, request), caller_of(request))
        return view(house, job)

    @routes.get("/jobs", summary="Search your jobs, the newest first")
    async def jobs(
        request: HttpRequest,
        search: Annotated[str, Query(max_length=200)] = "",
        state: Literal["waiting", "running", "done", "failed", "cancelled"] | None = None,
        model: str | None = None,
        before: Annotated[float | None, Query(description="Only jobs created before; seconds since 1970.")] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> dict[str, Any]:
        found = await desk.history(Search(caller_of(request).id, search, state, model, before, limit))
        return {"jobs": [view(house, job) for job in found]}

    @routes.get("/jobs/{id_}", summary="One job")
    async def job(id_: str, request: HttpRequest) -> dict[str, Any]:
        return view(house, await desk.job(id_, caller_of(request)))

    following(house, routes)
    pictures(house, routes)
    layered(house, routes)
    return routes


def following(house: House, routes: APIRouter) -> None:
    """Routes of one job's events and of its end."""
    desk = house.desk

    @routes.get("/jobs/{id_}/events", responses=STREAMED, summary="What happens to a job, as server-sent events")
    async def events(
        id_: str,
        request: HttpRequest,
        previews: bool = True,
        after: Annotated[int, Query(ge=0, lt=10**18)] = 0,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> StreamingResponse:
        """Kinds: accepted, place, started, resumed, phase, step (with a preview), notice, checkpoint, interrupted, then
        one of done, failed, cancelled. A reader that comes back says with `Last-Event-ID` what it has seen."""
        await desk.job(id_, caller_of(request))
        seen = int(last_event_id) if last_event_id and NUMBER.fullmatch(last_event_id) else after

        async def lines() -> AsyncIterator[str]:
            async for event in desk.watch(id_, caller_of(request), seen):
                yield line_of(event, previews)

        return event_stream(lines())

    @routes.post("/jobs/{id_}/cancel", summary="Cancel a job, within one step")
    async def cancel(id_: str, request: HttpRequest) -> dict[str, Any]:
        return view(house, await desk.cancel(id_, caller_of(request)))


def pictures(house: House, routes: APIRouter) -> None:
    """Routes of finished pictures, of previews and of models."""
    desk = house.desk

    @routes.head("/jobs/{id_}/images/{index}", include_in_schema=False)
    @routes.get("/jobs/{id_}/images/{index}", summary="A finished picture, with its recipe inside")
    async def image(
        id_: str,
        index: int,
        request: HttpRequest,
        format: str = "png",
        compression: Annotated[int | None, Query(ge=0, le=100, description="Of JPEG and WebP; 100 is best.")] = None,
    ) -> Response:
        kind = kind_of(format)
        job = await desk.job(id_, caller_of(request))
        data = await asyncio.to_thread(encoded, result_path(house, job, index), kind, compression)
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return Response(data, media_type=TYPES[kind], headers=headers)

    @routes.get("/jobs/{id_}/preview", summary="The picture so far, small")
    async def preview(id_: str, request: HttpRequest) -> Response:
        job = await desk.job(id_, caller_of(request))
        run = desk.runs.get(job.id)
        if run is None or run.preview is None:
            raise MissingError("there is no preview of this job just now")
        return Response(run.preview, media_type="image/jpeg", headers={"Cache-Control": "no-store"})

    @routes.get("/models", summary="What is served, and how the queue stands")
    async def models() -> dict[str, Any]:
        return {"models": [model_view(house, name) for name in desk.models], "waiting": len(desk.line)}


def model_view(house: House, name: str) -> dict[str, Any]:
    model = house.desk.models[name]
    told: dict[str, Any] = {"name": name, "ready": model.ready, "loras": model.loras, "workers": model.crew}
    if model.refused:
        told["error"] = explain(house.desk.why_not(model))
    if model.spec is not None:
        own = model.spec.defaults
        told |= {"release": model.spec.name, "tasks": list(model.spec.tasks), "size": list(own.size)}
        told |= {"sizes": {key: list(size) for key, size in own.sizes.items()}, "steps": own.steps}
        told |= {"reads": bool(model.reads) and model.spec.tasks != ("layered",)}
        told |= {"rewrites": model.spec.writes and model.spec.tasks != ("layered",)}
        told |= {"guidance_scale": own.guidance_scale, "max_pictures": own.max_pictures}
    return told
