"""From what a dialect understood to a job that can be accepted: values checked, caps kept, pictures on the disk.

The request is stored as it was asked, with a seed chosen now, so a job that is drawn twice because a server died is
the same picture. It is settled here only to be checked and priced; the worker settles it again with the LoRAs' wishes.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lanting.core.errors import RequestError
from lanting.core.recipe import describe_request
from lanting.core.types import Request, prompts_of
from lanting.serve.errors import DeniedError
from lanting.serve.files import Files
from lanting.serve.jobs import LEVELS, WAITING, Caller, Job
from lanting.serve.pace import units
from lanting.serve.settings import Caps, Settings
from lanting.specs import ModelSpec, settle
from lanting.specs.rewriting import may_rewrite

LONGEST_WORD = 255  # characters of an idempotency key


@dataclass(frozen=True, slots=True)
class Order:
    """A request in the words of no dialect."""

    request: Request
    model: str | None = None  # None: the server's first
    dialect: str = "lanting"
    lora: Mapping[str, float] | None = None  # None: as the server was started; else these and no others
    priority: str | None = None  # None: normal, or the most that the key allows
    timeout: float | None = None  # seconds of drawing; at most the server's
    once: str | None = None  # an idempotency key


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that could be accepted, and what its idempotency key stands for."""

    job: Job
    digest: str


def prepare(order: Order, spec: ModelSpec, model: str, caller: Caller, settings: Settings) -> Prepared:
    """Check everything and price it; blocks while pictures are hashed. Raises LantingError."""
    check_pictures(order.request, settings.caps)
    settled = settle(by_default(order.request, spec, settings.rewrite), spec)
    check_caps(settled, settings.caps)
    asked = {"request": describe_request(order.request), "lora": check_lora(order.lora)}
    digest = digest_of(asked, order)  # before any default of ours: who asks again may meet a server with others
    asked["request"] |= {"seed": settled.seed, **({"rewrite": True} if settled.rewrite else {})}
    asked["alike"] = alike(settled, asked["lora"])
    priority = check_priority(order.priority, caller)
    if order.once is not None and not 0 < len(order.once) <= LONGEST_WORD:
        raise RequestError("an idempotency key has 1 to {most} characters", most=LONGEST_WORD)
    job = Job(
        id=secrets.token_hex(12),
        owner=caller.id,
        model=model,
        dialect=order.dialect,
        state=WAITING,
        priority=priority,
        created=time.time(),
        cost=units(settled),
        timeout=check_timeout(order.timeout),
        asked=asked,
    )
    return Prepared(job, digest)


def digest_of(asked: Mapping[str, Any], order: Order) -> str:
    """The same for requests that are the same."""
    whole = [asked, order.request.rewrite, order.model, order.dialect]
    if (order.priority, order.timeout) != (None, None):  # else as older servers wrote it down
        whole += [order.priority, order.timeout]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def by_default(request: Request, spec: ModelSpec, rewrite: bool) -> Request:
    """The request with the server's default where it says nothing and the model can."""
    wanted = rewrite and request.rewrite is None and may_rewrite(request, spec)
    return replace(request, rewrite=True) if wanted else request


def alike(settled: Request, lora: Mapping[str, float] | None) -> str:
    """The same for jobs whose steps may be taken together: everything but words, seed, strength of guidance and what is
    in pictures. Whether such steps are shared at all, the engine decides."""
    prompts = len(prompts_of(settled))
    guided = settled.guidance_scale is not None and settled.guidance_scale > 1
    shape = [settled.task, settled.size, settled.steps, settled.strength, guided, settled.count, prompts]
    how = [settled.quality, settled.options, len(settled.images), lora, *(["rewrite"] if settled.rewrite else [])]
    how += [] if settled.tries is None else ["tries"]  # who reads is alone
    return hashlib.sha256(json.dumps([shape, how], sort_keys=True).encode()).hexdigest()[:16]


def store_pictures(request: Request, asked: Mapping[str, Any], files: Files) -> None:
    """Input pictures to the disk, under the hashes that `asked` has for them."""
    for image, told in zip(request.images, asked["images"], strict=True):
        files.keep_picture(image, told["sha256"])
    if request.mask is not None:
        files.keep_picture(request.mask, asked["mask"]["sha256"])


def check_pictures(request: Request, caps: Caps) -> None:
    pictures = [*request.images, *([request.mask] if request.mask is not None else [])]
    if len(pictures) > caps.pictures:
        raise RequestError("at most {most} pictures are read, not {count}", most=caps.pictures, count=len(pictures))
    total = sum(picture.width * picture.height for picture in pictures)
    if total > caps.input_pixels:
        raise RequestError(
            "the pictures have {total} million pixels together; at most {most} million are read: shrink them",
            **{"total": total // 1_000_000, "most": caps.input_pixels // 1_000_000},
        )


def check_caps(settled: Request, caps: Caps) -> None:
    width, height = settled.size or (0, 0)
    if width * height > caps.pixels:
        raise RequestError(
            "the size {width}×{height} is more than this server draws: at most {most:,} pixels",
            **{"width": width, "height": height, "most": caps.pixels},
        )
    count = len(prompts_of(settled)) * settled.count
    if count > caps.count:
        raise RequestError(
            "{count} pictures are more than this server draws at once: ask for at most {most}",
            **{"count": count, "most": caps.count},
        )
    if (settled.tries or 0) > caps.tries:
        raise RequestError(
            "{tries} tries are more than this server makes: ask for at most {most}",
            **{"tries": settled.tries, "most": caps.tries},
        )
    if (settled.steps or 0) > caps.steps:
        raise RequestError(
            "{steps} steps are more than this server makes: ask for at most {most}",
            **{"steps": settled.steps, "most": caps.steps},
        )


def check_lora(lora: Mapping[str, float] | None) -> dict[str, float] | None:
    if lora is None:
        return None
    strengths: dict[str, float] = {}
    for name, strength in lora.items():
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not -10 <= strength <= 10:
            raise RequestError("the strength of LoRA {name} must be a number from -10 to 10", name=name)
        strengths[str(name)] = float(strength)
    return strengths


def check_priority(word: str | None, caller: Caller) -> int:
    if word is None:
        return min(LEVELS["normal"], caller.top)
    if word not in LEVELS:
        raise RequestError("there is no priority {word}; use low, normal or high", word=repr(word))
    if LEVELS[word] > caller.top:
        most = next(name for name, level in LEVELS.items() if level == caller.top)
        raise DeniedError(
            "this key may not ask for priority {word}: use {most}, or another key", **{"word": word, "most": most}
        )
    return LEVELS[word]


def check_timeout(asked: float | None) -> float:
    """0: the server's own."""
    if asked is None:
        return 0.0
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 < asked < 1e7:
        raise RequestError("a timeout is a number of seconds above 0")
    return float(asked)


def with_timeout(job: Job, most: float) -> Job:
    """The job's own limit, or the server's where that is shorter."""
    return replace(job, timeout=min(job.timeout or most, most))
