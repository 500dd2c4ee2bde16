"""The API of AUTOMATIC1111's web UI: txt2img, img2img, and what its clients ask around them.

Fields for what a flow-matching model has not (samplers, hires fix, subseeds, tiling) are ignored, as that API's clients
send all of them always. A prompt may hold <lora:name:0.8>.
"""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from PIL import Image as Pillow
from PIL import ImageFilter, ImageOps
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest

from lanting.core.errors import LantingError, RequestError
from lanting.core.pictures import decode_picture
from lanting.core.recipe import from_json, infotext
from lanting.core.types import Request
from lanting.serve.common import caller_of, finished, once_of, result_path
from lanting.serve.errors import answer_to
from lanting.serve.house import House
from lanting.serve.intake import Order
from lanting.serve.jobs import Caller, Job
from lanting.serve.loras import tags_in
from lanting.serve.pictures import from_base64, to_base64
from lanting.serve.state import Run

DIALECT = "a1111"
SAMPLER = {"name": "Euler", "aliases": ["euler", "Euler a", "k_euler"], "options": {}}
EMPTY = {
    "upscalers": [],
    "latent-upscale-modes": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "hypernetworks": [],
    "prompt-styles": [],
    "sd-vae": [],
    "extensions": [],
    "embeddings": {"loaded": {}, "skipped": {}},
    "scripts": {"txt2img": [], "img2img": []},
    "script-info": [],
    "cmd-flags": {},
}


class Ask(BaseModel):
    """What is read; everything else a client sends is ignored."""

    model_config = ConfigDict(extra="ignore")
    prompt: str = ""
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    seed: int | None = None
    batch_size: int = 1
    n_iter: int = 1
    sampler_name: str | None = None
    scheduler: str | None = None
    override_settings: dict[str, Any] | None = None
    send_images: bool = True
    init_images: list[str] | None = None
    mask: str | None = None
    mask_blur: float | None = None
    inpainting_mask_invert: int | bool = 0
    inpaint_full_res: bool | None = None
    inpaint_full_res_padding: int | None = None
    denoising_strength: float | None = None
    force_task_id: str | None = None


@dataclass
class Clients:
    """What is known of callers as long as the server lives."""

    chosen: dict[str, str] = field(default_factory=dict[str, str])  # caller -> the model picked with /options
    asked: dict[str, Job] = field(default_factory=dict[str, Job])  # id -> of requests not answered yet


class Options(BaseModel):
    """Only the model can be chosen, and only among those served."""

    model_config = ConfigDict(extra="allow")
    sd_model_checkpoint: str | None = None


class Info(BaseModel):
    image: str = Field(description="Base64 of a PNG.")


async def request_of(house: House, ask: Ask, model: str | None) -> tuple[Request, dict[str, float] | None]:
    """to_request. A picture without a mask is varied where the model can, else edited."""
    prompt, lora = tags_in(ask.prompt)
    images = await house.eyes.pictures(list(ask.init_images or []), house.settings.caps.pictures)
    spec = house.desk.model(model).spec
    tasks = spec.tasks if spec else ()
    task, strength, mask, options = None, None, None, dict[str, Any]()
    if ask.mask is not None:
        if not images:
            raise RequestError("init_images is empty: send the picture to change")
        mask = await mask_of(house, ask, images[0].size)
        task = "inpaint" if "inpaint" in tasks else None
        strength = ask.denoising_strength
        if ask.inpaint_full_res and ask.inpaint_full_res_padding is not None:
            options["padding_mask_crop"] = ask.inpaint_full_res_padding
    elif images and "image_to_image" in tasks:
        task, strength = "image_to_image", ask.denoising_strength
    size = (ask.width, ask.height) if ask.width and ask.height else None
    wish = Request(
        prompt=prompt,
        task=task,
        negative_prompt=ask.negative_prompt or None,
        size=size,
        steps=ask.steps if ask.steps and ask.steps > 0 else None,
        guidance_scale=ask.cfg_scale,
        seed=None if ask.seed is None or ask.seed < 0 else ask.seed,
        count=ask.batch_size * ask.n_iter,
        images=images,
        mask=mask,
        strength=strength,
        options=options,
    )
    return wish, lora


async def mask_of(house: House, ask: Ask, size: tuple[int, int]) -> Pillow.Image:
    """White is drawn anew; brought to the picture's size, inverted or softened where that is asked."""
    mask = await house.eyes.mask(ask.mask or "")
    if mask.size != size:
        mask = mask.resize(size)
    if ask.inpainting_mask_invert:
        mask = ImageOps.invert(mask)
    if ask.mask_blur and 0 < ask.mask_blur <= 64:
        mask = mask.filter(ImageFilter.GaussianBlur(ask.mask_blur))
    return mask


async def draw(house: House, ask: Ask, request: HttpRequest, clients: Clients) -> dict[str, Any]:
    """Submit, wait, answer."""
    caller = caller_of(request)
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in json.dumps(ask.override_settings, ensure_ascii=False)):
        raise RequestError("the prompt holds bytes that are not UTF-8: retype it")  # they are echoed
    named = (ask.override_settings or {}).get("sd_model_checkpoint") or clients.chosen.get(caller.id)
    model = None if named is None else str(named)
    wish, lora = await request_of(house, ask, model)
    job = await house.desk.submit(Order(wish, model, DIALECT, lora, once=once_of(request)), caller)
    clients.asked[job.id] = job
    try:
        return await result(house, ask, await finished(house, request, job))
    finally:
        clients.asked.pop(job.id, None)


async def result(house: House, ask: Ask, job: Job) -> dict[str, Any]:
    """from_result."""
    assert job.outcome is not None
    paths = [result_path(house, job, index) for index in range(len(job.outcome["images"]))]
    images = [to_base64(await asyncio.to_thread(path.read_bytes)) for path in paths] if ask.send_images else []
    recipes = [from_json(json.dumps(recipe)) for recipe in job.outcome["recipes"]]
    first = recipes[0].request
    info = {
        "prompt": first["prompt"],
        "negative_prompt": first["negative_prompt"],
        "all_prompts": [recipe.request["prompt"] for recipe in recipes],
        "seed": first["seed"],
        "all_seeds": [recipe.request["seed"] for recipe in recipes],
        "width": job.outcome["images"][0]["size"][0],
        "height": job.outcome["images"][0]["size"][1],
        "steps": first["steps"],
        "cfg_scale": first["guidance_scale"],
        "sampler_name": SAMPLER["name"],
        "batch_size": len(paths),
        "sd_model_name": job.model,
        "sd_model_hash": recipes[0].weights[:10],
        "infotexts": [infotext(recipe) for recipe in recipes],
        "job_timestamp": str(int(job.created)),
        "job": job.id,
    }
    parameters = ask.model_dump(exclude={"init_images", "mask"})
    return {"images": images, "parameters": parameters, "info": json.dumps(info, ensure_ascii=False)}


def runs_of(house: House, caller: Caller) -> list[Run]:
    """What is being drawn for this client."""
    return [run for run in house.desk.runs.values() if run.job.owner == caller.id and run.job.dialect == DIALECT]


async def interrupt(house: House, caller: Caller, clients: Clients) -> None:
    """End what is being drawn for the caller, with all its pictures; where nothing is, the request whose turn comes
    first. Its others are drawn: theirs, too, ends the job at hand, and the next begins."""
    waiting = [job.id for job in clients.asked.values() if job.owner == caller.id]
    for job in [run.job.id for run in runs_of(house, caller)] or waiting[:1]:
        await house.desk.cancel(job, caller)


def progress(house: House, caller: Caller, skip: bool) -> dict[str, Any]:
    """Of the caller's job that is being drawn, else of nothing. The picture is still a JPEG's bytes: see `as_png`."""
    run, waiting = next(iter(runs_of(house, caller)), None), len(house.desk.line)
    state = {"skipped": False, "interrupted": False, "job": "", "job_count": waiting, "job_no": 0}
    state |= {"job_timestamp": "0", "sampling_step": 0, "sampling_steps": 0}
    if run is None:
        return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    place = house.desk.places(run.job.model).get(run.job.id)
    state |= {"job": run.job.id, "sampling_step": run.step, "sampling_steps": run.steps, "job_count": waiting + 1}
    told = {"progress": run.step / run.steps if run.steps else 0.01, "state": state, "textinfo": None}
    told["eta_relative"] = place.eta if place is not None and place.eta is not None else 0.0
    return told | {"current_image": None if skip else run.preview}


def error_body(error: LantingError) -> dict[str, Any]:
    """An error in that API's shape."""
    sentence = answer_to(error).sentence
    return {"error": type(error).__name__, "detail": sentence, "body": "", "errors": sentence}


def png_info(data: bytes) -> dict[str, Any]:
    """The text that a picture carries."""
    image = decode_picture(data, "the picture")
    text = {name: value for name, value in image.info.items() if isinstance(value, str)}
    return {"info": text.get("parameters", ""), "items": text, "parameters": {}}


def router(house: House) -> APIRouter:
    """The routes."""
    routes, clients = APIRouter(prefix="/sdapi/v1", tags=["a1111"]), Clients()

    @routes.post("/txt2img", summary="Draw pictures")
    async def txt2img(ask: Ask, request: HttpRequest) -> dict[str, Any]:
        return await draw(house, ask.model_copy(update={"init_images": None, "mask": None}), request, clients)

    @routes.post("/img2img", summary="Change pictures")
    async def img2img(ask: Ask, request: HttpRequest) -> dict[str, Any]:
        if not ask.init_images:
            raise RequestError("init_images is empty: send the picture to change")
        return await draw(house, ask, request, clients)

    around(house, routes, clients)
    lists(house, routes)
    return routes


def around(house: House, routes: APIRouter, clients: Clients) -> None:
    """Routes of the caller's picture and of the model it chose."""

    @routes.get("/progress", summary="Of your picture")
    async def get_progress(request: HttpRequest, skip_current_image: bool = False) -> dict[str, Any]:
        return await asyncio.to_thread(as_png, progress(house, caller_of(request), skip_current_image))

    @routes.post("/interrupt", summary="Cancel your picture")
    @routes.post("/skip", summary="Cancel your picture")
    async def stop(request: HttpRequest) -> dict[str, Any]:
        await interrupt(house, caller_of(request), clients)
        return {}

    @routes.post("/png-info", summary="The recipe in a picture")
    async def info(ask: Info) -> dict[str, Any]:
        return await asyncio.to_thread(png_info, from_base64(ask.image, "the picture"))

    @routes.get("/options", summary="The chosen model")
    async def options(request: HttpRequest) -> dict[str, Any]:
        name = clients.chosen.get(caller_of(request).id) or house.settings.models[0].name
        return {"sd_model_checkpoint": name, "sd_checkpoint_hash": "", "samples_format": "png"}

    @routes.post("/options", summary="Choose the model")
    async def choose(ask: Options, request: HttpRequest) -> dict[str, Any]:
        if ask.sd_model_checkpoint is not None:
            clients.chosen[caller_of(request).id] = house.desk.model(ask.sd_model_checkpoint).served.name
        return {}


def as_png(told: dict[str, Any]) -> dict[str, Any]:
    """The preview as the PNG that clients expect."""
    if told["current_image"] is None:
        return told
    buffer = io.BytesIO()
    with Pillow.open(io.BytesIO(told["current_image"]), formats=("JPEG",)) as image:
        image.save(buffer, format="PNG")
    return told | {"current_image": to_base64(buffer.getvalue())}


def lists(house: House, routes: APIRouter) -> None:
    """What clients fill their menus with."""

    @routes.get("/sd-models", summary="Models")
    async def models() -> list[dict[str, Any]]:
        rows = [{"title": name, "model_name": name, "filename": name} for name in house.desk.models]
        return [row | {"hash": None, "sha256": None, "config": None} for row in rows]

    @routes.get("/samplers", summary="The one there is")
    async def samplers() -> list[dict[str, Any]]:
        return [SAMPLER]

    @routes.get("/schedulers", summary="The one there is")
    async def schedulers() -> list[dict[str, Any]]:
        own = {"name": "automatic", "label": "Automatic", "aliases": ["simple", "Automatic"], "default_rho": -1.0}
        return [own | {"need_inner_model": False}]

    @routes.get("/loras", summary="LoRAs the server was started with")
    async def loras() -> list[dict[str, Any]]:
        names = [lora["name"] for model in house.desk.models.values() for lora in model.loras]
        return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]

    @routes.get("/memory", summary="Nothing that would help a stranger")
    async def memory() -> dict[str, Any]:
        return {"ram": {}, "cuda": {}}

    @routes.post("/refresh-checkpoints", summary="Nothing to do")
    @routes.post("/refresh-loras", summary="Nothing to do")
    async def refresh() -> dict[str, Any]:
        return {}

    def empty(name: str) -> None:
        async def nothing() -> Any:
            return EMPTY[name]

        routes.get(f"/{name}", summary="None here", name=name)(nothing)

    for name in EMPTY:
        empty(name)
