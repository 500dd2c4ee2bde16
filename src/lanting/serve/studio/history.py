"""The tiles: found by words, kept up to date, and what a press on one brings back."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from lanting.core.errors import LantingError
from lanting.serve.studio.choices import depending, recalled, settings
from lanting.serve.studio.clerk import PAGE
from lanting.serve.studio.events import (
    Updates,
    followed,
    kept,
    known,
    laid,
    listen,
    nothing,
    on_job,
    page_of,
    told_by,
    whose,
)
from lanting.serve.studio.forms import EDIT, LAYERS, tab_of
from lanting.serve.studio.page import Page


def tie_history(page: Page) -> None:
    """Search, older ones, what others do, and a press on a tile."""
    clerk = page.clerk

    async def find(request, event, words) -> Updates:
        return {page.gallery: await clerk.gallery(whose(clerk, request), words), page.most: PAGE}

    async def older(request, event, words) -> Updates:
        most = int(told) if (told := told_by(event, "most")).isdigit() else PAGE
        return {page.gallery: await clerk.gallery(whose(clerk, request), words, most), page.most: most}

    async def look(request, event, words, most, sign) -> Updates:
        tiles = await clerk.gallery(whose(clerk, request), words, most)
        return nothing() if sign == (new := signed(tiles)) else {page.gallery: tiles, page.sign: new}

    listen(page.search.change, find, [page.search], [page.gallery, page.most], trigger_mode="always_last")
    listen(page.gallery.more, older, [page.search], [page.gallery, page.most])
    # past Gradio's queue: one small request, answered from the ledger
    listen(page.timer.tick, look, [page.search, page.most, page.sign], [page.gallery, page.sign], queue=False)
    stages = [tab.stage for tab in page.each.values()]
    listen(page.gallery.pick, recalling(page), [page.model], [page.model, *depending(page), *settings(page)])
    listen(page.gallery.pick, picking(page), [page.search], [*stages, page.gallery], trigger_mode="multiple")
    edit = page.each[EDIT].extra
    listen(page.gallery.restore, restoring(page), [], [edit["canvas"], edit["others"]])
    listen(page.gallery.unpack, restoring(page), [], [page.each[LAYERS].extra["picture"]])


def signed(tiles: str) -> str:
    return hashlib.blake2b(tiles.encode(), digest_size=12).hexdigest()


def recalling(page: Page) -> Any:
    """Every setting of a job comes back, its model too."""

    async def handler(request, event, model) -> Updates:
        try:
            job = await page.clerk.job(whose(page.clerk, request), told_by(event, "job"))
        except LantingError:
            return nothing()  # the stage says so
        return recalled(page, job, model)

    return handler


def picking(page: Page) -> Any:
    """A job's picture on its stage; one that is not over is followed."""
    clerk = page.clerk

    async def tell(request, who, job, words) -> AsyncIterator[Updates]:
        stage = page.each[tab_of(job)].stage
        if job.over:
            clerk.latest.pop(f"{page_of(request)} {tab_of(job)}", None)
            yield {stage: await clerk.stage(job)}
            return
        async for updates in followed(page, who, known(job), page_of(request), words, stage):
            yield updates

    return on_job(page, tell)


def restoring(page: Page) -> Any:
    """The pictures that a job began with, for the fields that hold them. Plain values always: see `fields.easel`."""
    clerk = page.clerk

    async def handler(request, event) -> Any:
        own: list[str] = []
        name = EDIT
        with suppress(LantingError, OSError):
            job = await clerk.job(whose(clerk, request), told_by(event, "job"))
            name, files = tab_of(job), clerk.house.desk.files
            for one in job.asked["request"]["images"]:
                data = await asyncio.to_thread(files.picture(one["sha256"]).read_bytes)
                own.append(await asyncio.to_thread(kept, clerk, data))
        first = own[0] if own else None
        return first if name == LAYERS else (laid(first), own[1:] or None)

    return handler
