"""OpenAI's images API: generations, edits, variations, models; JSON and multipart, streams with partial images.

What OpenAI's models have and ours lack is refused where it would change the picture (transparent background, SVG, GIF,
frames, markup) and ignored where it would not (moderation, user, style, ...). What ours have beyond it is read from
extra fields and told in extra fields of the answer, which the SDK keeps in `model_extra`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from lanting.core.errors import LantingError, RequestError
from lanting.core.quality import NAMES
from lanting.core.types import Request
from lanting.serve.common import (
    STREAMED,
    caller_of,
    event_stream,
    finished,
    followed,
    once_of,
    read_in,
    result_path,
    revised,
    size_of,
    sse,
    with_picture,
)
from lanting.serve.errors import answer_to, misread
from lanting.serve.house import House
from lanting.serve.intake import Order
from lanting.serve.jobs import Job
from lanting.serve.loras import lora_in
from lanting.serve.own import size_in
from lanting.serve.pictures import encoded, enlarged, kind_of, to_base64

THEIRS = ("gpt-image", "chatgpt-image", "dall-e")  # names that clients send by default: our default model
QUALITY = {"low": "fast", "medium": "balanced", "high": "high", "xhigh": "exact", "max": "exact", "hd": "exact"}
REFUSED = ("markup", "svg", "frame_count", "frame_duration_ms")
BLOCK = 256  # pixels of a picture that count as one token


class Ask(BaseModel):
    """One request, from JSON or from a form."""

    model_config = ConfigDict(extra="allow")
    prompt: str = Field("", description="What to draw, or how to change the pictures.")
    model: str | None = None
    n: int | None = Field(None, ge=1, description="Pictures.")
    size: str | None = Field(None, description='"auto", "WIDTHxHEIGHT" or a ratio as "16:9".')
    quality: str | None = Field(None, description="low, medium, high, auto; or exact, balanced, fast.")
    background: str | None = None
    output_format: str | None = Field(None, description="png, jpeg, webp.")
    output_compression: int | None = Field(None, ge=0, le=100)
    response_format: str | None = Field(None, description="b64_json (default) or url.")
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    seed: int | None = None
    steps: int | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    strength: float | None = None
    rewrite: bool | None = Field(None, description="Write the prompt out first: `revised_prompt` has what was drawn.")
    tries: int | None = Field(None, description="Read quoted words back; up to so many seeds until they are right.")
    lora: dict[str, float] | str | None = Field(None, description='{"name": strength}, or "name:0.8, other".')

    @property
    def extras(self) -> dict[str, Any]:
        return self.model_extra or {}


class EditAsk(Ask):
    """An edit as JSON. In a form the pictures are files called `image` or `image[]`, and `mask`."""

    image: str | list[str] | None = Field(None, description="Base64 or data URLs.")
    images: list[dict[str, Any]] | None = Field(None, description='[{"image_url": "data:..."}]')
    mask: str | dict[str, Any] | None = Field(None, description="Transparent where to change.")


def checked(ask: Ask) -> Ask:
    """The same. Raises RequestError for what can't be drawn here."""
    if ask.background == "transparent":
        raise RequestError("a transparent background can't be drawn here: use opaque or auto")
    for name in REFUSED:
        if ask.extras.get(name) is not None:
            raise RequestError("{name} is not known here: leave it out", name=name)
    if ask.response_format not in (None, "url", "b64_json"):
        raise RequestError("response_format must be url or b64_json, not {word}", word=repr(ask.response_format))
    kind_of(ask.output_format)
    return ask


def model_of(ask: Ask) -> str | None:
    return None if ask.model and ask.model.startswith(THEIRS) else ask.model


def quality_of(word: str | None) -> str | None:
    """Our position of the dial; None: exact."""
    return word if word in NAMES and word not in QUALITY else QUALITY.get(word or "")


def request_of(house: House, ask: Ask, **more: Any) -> Request:
    """to_request, without pictures."""
    size = None if ask.size in (None, "", "auto") else size_in(house, model_of(ask), ask.size)
    return Request(
        prompt=ask.prompt,
        negative_prompt=ask.negative_prompt,
        size=size,
        steps=ask.steps,
        guidance_scale=ask.guidance_scale,
        seed=ask.seed,
        count=ask.n or 1,
        strength=ask.strength,
        quality=quality_of(ask.quality),
        rewrite=ask.rewrite,
        tries=ask.tries,
        **more,
    )


async def form_of(request: HttpRequest, model: type[EditAsk]) -> tuple[EditAsk, list[str | bytes], str | bytes | None]:
    """The fields, the pictures and the mask of a form, or of JSON."""
    if request.headers.get("content-type", "").startswith("application/json"):
        ask = model.model_validate(await body_of(request))
        pictures = [ask.image] if isinstance(ask.image, str) else list(ask.image or [])
        pictures += [str(one.get("image_url") or "") for one in ask.images or []]
        mask = str(ask.mask.get("image_url") or "") if isinstance(ask.mask, dict) else ask.mask
        return ask, list[str | bytes](pictures), mask
    fields: dict[str, Any] = {}
    files: dict[str, list[str | bytes]] = {"image": [], "mask": []}
    try:
        async with request.form(max_files=20, max_fields=100, max_part_size=32 << 20) as form:
            for name, value in form.multi_items():
                name, content = name.removesuffix("[]"), await value.read() if isinstance(value, UploadFile) else value
                if name in files:
                    files[name].append(content)
                elif name.startswith("lora[") and name.endswith("]"):  # how their clients send an object in a form
                    fields.setdefault("lora", {})[name[5:-1]] = content
                else:
                    fields[name] = content if isinstance(content, str) else "file"
    except UnicodeError:  # of a charset that the form names
        raise RequestError("the prompt holds bytes that are not UTF-8: retype it") from None
    return model.model_validate(fields), files["image"], files["mask"][0] if files["mask"] else None


async def body_of(request: HttpRequest) -> dict[str, Any]:
    """A JSON object. Raises RequestError."""
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        raise RequestError("the request is no JSON: send an object with Content-Type application/json") from None
    if not isinstance(body, dict):
        raise RequestError("the request is no JSON object: send {...}")
    return body


async def edit_of(house: House, request: HttpRequest, variation: bool) -> tuple[Ask, Request]:
    """to_request of edits and variations."""
    try:
        ask, sources, clear = await form_of(request, EditAsk)
    except ValidationError as error:
        raise misread(error.errors()) from None
    checked(ask)
    if not sources:
        raise RequestError("image is missing: upload the picture to change")
    images = await house.eyes.pictures(sources, house.settings.caps.pictures)
    mask = None if clear is None else await house.eyes.clear_mask(clear)
    task = {"task": "image_to_image"} if variation else {}
    return ask, request_of(house, ask, images=images, mask=mask, **task)


async def draw(house: House, request: HttpRequest, ask: Ask, wish: Request, event: str) -> Response:
    """Submit, and answer as the request wants it."""
    lora = lora_in(ask.lora)
    order = Order(wish, model_of(ask), "openai", lora, once=once_of(request))
    job = await house.desk.submit(order, caller_of(request))
    if ask.stream:
        return event_stream(stream(house, request, ask, job, event))
    job = await finished(house, request, job)
    data = [await picture(house, request, ask, job, index) for index in range(len((job.outcome or {})["images"]))]
    return JSONResponse({"created": int(job.created), "data": data, **told(house, ask, job), **echo(job)})


async def picture(house: House, request: HttpRequest, ask: Ask, job: Job, index: int) -> dict[str, Any]:
    """from_result: one picture."""
    assert job.outcome is not None
    drawn = job.outcome["recipes"][index]["request"]
    seed = {"seed": drawn["seed"]} | revised(drawn) | read_in(job, index)
    if ask.response_format == "url":
        signed = house.signer.sign(f"/api/jobs/{job.id}/images/{index}", job.owner)
        how = {"format": ask.output_format or "png", "compression": ask.output_compression}
        wanted = urlencode({name: value for name, value in how.items() if value is not None})
        return {"url": f"{str(request.base_url).rstrip('/')}{signed}&{wanted}"} | seed
    kind = kind_of(ask.output_format)
    data = await asyncio.to_thread(encoded, result_path(house, job, index), kind, ask.output_compression)
    return {"b64_json": to_base64(data)} | seed


def told(house: House, ask: Ask, job: Job) -> dict[str, Any]:
    """What was drawn, in OpenAI's words."""
    width, height = size_of(job, house)
    pictures = len(job.outcome["images"]) if job.outcome else 1
    text, drawn = len(job.prompt.encode()) // 4 + 1, width * height // BLOCK * pictures
    seen = sum(one["size"][0] * one["size"][1] // BLOCK for one in job.asked["request"]["images"])
    usage: dict[str, Any] = {"input_tokens": text + seen, "output_tokens": drawn, "total_tokens": text + seen + drawn}
    usage["input_tokens_details"] = {"text_tokens": text, "image_tokens": seen}
    usage["output_tokens_details"] = {"text_tokens": 0, "image_tokens": drawn}
    kind = "jpeg" if ask.output_format == "jpg" else ask.output_format or "png"
    quality = ask.quality if ask.quality in ("low", "medium", "high", "xhigh", "max") else "auto"
    return {
        "background": "opaque",
        "output_format": kind,
        "quality": quality,
        "size": f"{width}x{height}",
        "usage": usage,
    }


def echo(job: Job) -> dict[str, Any]:
    """What was drawn, in ours: every value as it was settled."""
    assert job.outcome is not None
    first: Mapping[str, Any] = job.outcome["recipes"][0]
    names = ("seed", "steps", "negative_prompt", "guidance_scale", "strength")
    own = {name: first["request"].get(name) for name in names}
    lora = {lora["name"].rpartition(".")[0] or lora["name"]: lora["strength"] for lora in first.get("loras", [])}
    return own | {"model": job.model, "lora": lora, "job": job.id, "timings": job.outcome["seconds"]}


async def stream(house: House, request: HttpRequest, ask: Ask, job: Job, event: str) -> AsyncIterator[str]:
    """Partial images, then the whole ones; a failure as an `error` event."""
    size, kind = size_of(job, house), kind_of(ask.output_format)
    sent, wanted = 0, ask.partial_images or 0
    async with aclosing(followed(house, request, job)) as events:
        async for news in events:
            if news.preview is None or sent == wanted or not due(news.body, sent, wanted):
                continue
            data = await asyncio.to_thread(enlarged, news.preview, size, kind)
            facts = {name: value for name, value in told(house, ask, job).items() if name != "usage"}
            head = {"type": f"{event}.partial_image", "partial_image_index": sent, "created_at": int(time.time())}
            yield sse({**head, "b64_json": to_base64(data), **facts}, f"{event}.partial_image")
            sent += 1
    try:
        done = with_picture(await house.desk.job(job.id, caller_of(request)))
    except LantingError as error:
        yield sse(error_body(error), "error")
        return
    facts = told(house, ask, done) | echo(done)
    for index in range(len((done.outcome or {})["images"])):
        one = await picture(house, request, ask, done, index)
        head = {"type": f"{event}.completed", "created_at": int(time.time())}
        yield sse({**head, **facts, **one}, f"{event}.completed")


def due(step: Mapping[str, Any], sent: int, wanted: int) -> bool:
    """Whether partial image number `sent` of `wanted` is to be made of this step: they are spread over the steps."""
    return step["step"] >= min(round((sent + 1) * step["steps"] / (wanted + 1)), step["steps"] - 1)


def error_body(error: LantingError) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    answer = answer_to(error)
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(answer.status, "server_error" if answer.status >= 500 else "invalid_request_error")
    return {"error": {"message": answer.sentence, "type": kind, "param": None, "code": answer.code}}


def router(house: House) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1", tags=["openai"])

    @routes.post("/images/generations", responses=STREAMED, summary="Draw pictures")
    async def generations(ask: Ask, request: HttpRequest) -> Response:
        return await draw(house, request, ask, request_of(house, checked(ask)), "image_generation")

    body = {"content": {"application/json": {"schema": EditAsk.model_json_schema()}, "multipart/form-data": {}}}

    @routes.post("/images/edits", responses=STREAMED, summary="Change pictures", openapi_extra={"requestBody": body})
    async def edits(request: HttpRequest) -> Response:
        ask, wish = await edit_of(house, request, variation=False)
        return await draw(house, request, ask, wish, "image_edit")

    @routes.post(
        "/images/variations", summary="Draw a picture again, a little different", openapi_extra={"requestBody": body}
    )
    async def variations(request: HttpRequest) -> Response:
        ask, wish = await edit_of(house, request, variation=True)
        return await draw(house, request, ask, wish, "image_generation")

    @routes.get("/models", summary="What is served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in house.desk.models]}

    @routes.get("/models/{name:path}", summary="One model")
    async def model(name: str) -> dict[str, Any]:
        return card(house.desk.model(name).served.name)

    return routes


def card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1735689600, "owned_by": "lanting"}
