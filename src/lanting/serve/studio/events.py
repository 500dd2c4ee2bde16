"""What handlers share: who asks, what an event tells, a job followed on a stage, files that Gradio shows."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from lanting.core.errors import LantingError
from lanting.serve.errors import no_key
from lanting.serve.jobs import LOCAL, Caller, Job
from lanting.serve.studio.clerk import Clerk
from lanting.serve.studio.forms import DRAW
from lanting.serve.studio.page import Page

Updates = dict[Any, Any]


def whose(clerk: Clerk, request: Any) -> Caller:
    """Whom the guard let in. Never this computer where keys are asked for."""
    caller = request.request.scope.get("state", {}).get("caller")
    if caller is None and clerk.house.settings.needs_keys:
        raise no_key()
    return caller or LOCAL


def listen(event: Any, handler: Any, inputs: Sequence[Any], outputs: Sequence[Any], **how: Any) -> Any:
    """Tie a handler to an event, or to several. It gets the request first, then what the event tells, then values."""
    import gradio as gr

    handler.__annotations__ = {"request": gr.Request, "event": gr.EventData}
    told = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None, **how}
    if isinstance(event, list):
        return gr.on(event, handler, list(inputs), list(outputs), **told)
    return event(handler, list(inputs), list(outputs), **told)


def nothing() -> Any:
    """What a handler returns that changes nothing. An empty dictionary would be a value."""
    import gradio as gr

    return gr.skip()


def told_by(event: Any, name: str) -> str:
    """A word that an event brings."""
    data = getattr(event, "_data", None)
    return str(data.get(name, ""))[:2000] if isinstance(data, dict) else ""


def page_of(request: Any) -> str:
    return str(request.session_hash)


def on_job(page: Page, tell: Callable[..., AsyncIterator[Updates]]) -> Any:
    """A handler for a press on a job: `tell` gets the request, who asks, the job, and values. Without such a job the
    first stage says why."""

    async def handler(request, event, *values) -> AsyncIterator[Updates]:
        who = whose(page.clerk, request)
        try:
            job = await page.clerk.job(who, told_by(event, "job"))
        except LantingError as error:
            yield {page.each[DRAW].stage: page.clerk.failed(error)}
            return
        async for updates in tell(request, who, job, *values):
            yield updates

    return handler


async def followed(
    page: Page, who: Caller, order: Callable[[], Awaitable[Job]], key: str, words: str, stage: Any
) -> AsyncIterator[Updates]:
    """A job from its order to its end on a stage; the history at both."""
    clerk = page.clerk
    try:
        job = await order()
        first = True
        async for shown in clerk.follow(who, job, key):
            yield {stage: shown} | ({page.gallery: await clerk.gallery(who, words)} if first else {})
            first = False
        yield {page.gallery: await clerk.gallery(who, words)}
    except LantingError as error:
        yield {stage: clerk.failed(error)}


def known(job: Job) -> Callable[[], Awaitable[Job]]:
    """For `followed`: a job that was ordered before."""

    async def same() -> Job:
        return job

    return same


def laid(path: str | None) -> Any:
    """A file as the canvas takes it."""
    return None if path is None else {"background": path, "layers": [], "composite": None}


def kept(clerk: Clerk, data: bytes) -> str:
    """A file of its own for Gradio to show: never one that is written twice. It goes with the uploads."""
    path = clerk.house.settings.data / "studio" / f"{secrets.token_hex(12)}.png"
    path.write_bytes(data)
    return str(path)
