"""What presses do on the page: values from fields to the clerk, HTML back. `history` has the tiles, `choices` what a
model or an earlier job changes in the fields.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lanting.core.errors import LantingError
from lanting.serve.jobs import Job
from lanting.serve.studio import show
from lanting.serve.studio.choices import depending, for_model, recalled, rows, settings
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
from lanting.serve.studio.forms import DRAW, EDIT, LAYERS, NAMES, More, lora_of, tab_of, tabs_of
from lanting.serve.studio.history import tie_history
from lanting.serve.studio.page import Page, Tab


def tie(page: Page, blocks: Any) -> None:
    """Everything."""
    tie_orders(page)
    tie_stages(page)
    tie_history(page)
    tie_tiles(page)
    tie_plans(page)
    tie_models(page, blocks)


# ---------------------------------------------------------------- orders
def tie_orders(page: Page) -> None:
    """The three buttons, and Enter in their fields."""
    extras = {DRAW: ("size",), EDIT: ("canvas", "others"), LAYERS: ("picture", "count", "fine")}
    for name, tab in page.each.items():
        fields = [page.search, page.model, tab.prompt, *tab.fold, tab.loras, *tab.pulls]
        fields += [tab.extra[one] for one in extras[name]]
        events = [tab.go.click, tab.prompt.submit]
        how = {"inputs": fields, "outputs": [tab.stage, page.gallery], "trigger_mode": "multiple"}
        listen(events, ordering(page, name), **how)
        if name != LAYERS:  # an example: its words go into the field, and it is drawn
            filled = listen(tab.stage.fill, filling(tab.prompt), [], [tab.prompt])
            listen(filled.then, ordering(page, name, example=True), **how)


def ordering(page: Page, name: str, example: bool = False) -> Any:
    """A handler that submits what a tab asks for and follows it. An `example` of an edit waits for a picture."""
    clerk, tab = page.clerk, page.each[name]

    async def handler(request, words, model, prompt, *values) -> AsyncIterator[Updates]:
        who, rest = whose(clerk, request), values[len(NAMES) + 1 + len(tab.pulls) :]
        if example and name == EDIT and rest[0].background is None:
            return

        async def order() -> Job:
            more = more_of(page, tab, model, values)
            if name == DRAW:
                return await clerk.draw(who, model, prompt, rest[0], more)
            if name == EDIT:
                others = [await asyncio.to_thread(Path(path).read_bytes) for path, _ in rest[1] or []]
                return await clerk.edit(who, model, prompt, rest[0], others, more)
            return await clerk.layers(who, model, prompt, rest[0], (rest[1], bool(rest[2])), more)

        async for updates in followed(page, who, order, page_of(request), words, tab.stage):
            yield updates

    return handler


def more_of(page: Page, tab: Tab, model: str | None, values: Sequence[Any]) -> More:
    """What stands below the fold, empty fields as `More` has them."""
    own, (loras, *pulls) = dict(zip(NAMES, values, strict=False)), values[len(NAMES) :][: 1 + len(tab.pulls)]
    known = [lora["name"] for lora in page.clerk.model(model).loras]
    return More(**{**own, "negative": own["negative"] or ""}, lora=lora_of(known, loras or (), pulls))


# ---------------------------------------------------------------- on the stage
def tie_stages(page: Page) -> None:
    """The buttons under a picture."""
    for name, tab in page.each.items():
        listen(tab.stage.cancel, cancelling(page, tab.stage), [], [tab.stage])
        listen(tab.stage.again, repeating(page, tab.stage), [page.search], [tab.stage, page.gallery])
        target = page.each[EDIT]
        stages = [target.stage] if name == EDIT else [target.stage, tab.stage]
        listen(tab.stage.edit, editing(page, tab.stage), [page.model], [page.model, *depending(page), *stages])
        listen(tab.stage.lay, laying(page), [], [target.extra["canvas"]])


def tie_tiles(page: Page) -> None:
    """The two small buttons on a tile: the same again, or onto the canvas."""
    stages, fields = [tab.stage for tab in page.each.values()], depending(page)
    repeated = [page.model, *fields, *settings(page), *stages, page.gallery]
    listen(page.gallery.again, replaying(page), [page.search, page.model], repeated, trigger_mode="multiple")
    editor = editing(page, page.each[DRAW].stage)
    listen(page.gallery.edit, editor, [page.model], [page.model, *fields, page.each[EDIT].stage, page.each[DRAW].stage])
    listen(page.gallery.lay, laying(page), [], [page.each[EDIT].extra["canvas"]])


def replaying(page: Page) -> Any:
    """A job once more from its tile: its settings come back, and it is drawn."""
    clerk = page.clerk

    async def tell(request, who, job, words, model) -> AsyncIterator[Updates]:
        yield recalled(page, job, model)

        async def order() -> Job:
            return await clerk.again(who, job.id, fresh=False)

        async for updates in followed(page, who, order, page_of(request), words, page.each[tab_of(job)].stage):
            yield updates

    return on_job(page, tell)


def cancelling(page: Page, stage: Any) -> Any:
    async def handler(request, event) -> Updates:
        try:
            await page.clerk.cancel(whose(page.clerk, request), told_by(event, "job"))
        except LantingError as error:
            return {stage: page.clerk.failed(error)}
        return nothing()

    return handler


def repeating(page: Page, stage: Any) -> Any:
    async def handler(request, event, words) -> AsyncIterator[Updates]:
        who, fresh = whose(page.clerk, request), told_by(event, "fresh") == "1"

        async def order() -> Job:
            return await page.clerk.again(who, told_by(event, "job"), fresh)

        async for updates in followed(page, who, order, page_of(request), words, stage):
            yield updates

    return handler


def editing(page: Page, stage: Any) -> Any:
    """A finished picture goes onto the canvas: the tab, and `laying` the picture."""
    clerk, target = page.clerk, page.each[EDIT]

    async def handler(request, event, model) -> Updates:
        import gradio as gr

        models = clerk.house.desk.models
        able = [name for name in (model, *models) if name in models and EDIT in tabs_of(models[name].spec)]
        if not able:
            told = clerk.say("{model} can't change pictures: choose another model", model=model)
            return {stage: show.trouble(told)}
        updates: Updates = {} if able[0] == model else {page.model: able[0], **for_model(page, able[0], EDIT)}
        empty = show.empty(EDIT, clerk.language, clerk.say, laid=True)
        return {**updates, page.tabs: gr.update(selected=EDIT), target.stage: empty}

    return handler


def laying(page: Page) -> Any:
    """The picture of `editing`. A plain value always: see `fields.easel`."""

    async def handler(request, event) -> Any:
        who, index = whose(page.clerk, request), told_by(event, "index")
        with suppress(LantingError):
            data = await page.clerk.result(who, told_by(event, "job"), int(index) if index.isdigit() else 0)
            return laid(await asyncio.to_thread(kept, page.clerk, data))
        return None

    return handler


def filling(prompt: Any) -> Any:
    async def handler(request, event) -> Updates:
        return {prompt: told_by(event, "text")}

    return handler


# ---------------------------------------------------------------- plans and models
def tie_plans(page: Page) -> None:
    """The panel is filled when it is opened, and again when shape or rewriting change while it says something."""
    for tab in page.each.values():
        size, writes, told = tab.extra.get("size"), tab.fold[NAMES.index("rewrite")], tab.plan["told"]
        sizes = [size] if size is not None else []
        inputs, changes = [page.model, writes, *sizes], [one.change for one in (writes, *sizes)]
        listen(tab.plan["box"].expand, planning(page, tab.name, told), inputs, [told], show_progress="minimal")
        listen(changes, replanning(page, tab.name, told), [told, *inputs], [told])


def planning(page: Page, name: str, told: Any) -> Any:
    async def handler(request, event, model, writes, size=None) -> Updates:
        whose(page.clerk, request)
        try:
            return {told: await page.clerk.plan(model, size, name, bool(writes))}
        except LantingError as error:
            return {told: page.clerk.failed(error)}

    return handler


def replanning(page: Page, name: str, told: Any) -> Any:
    ask = planning(page, name, told)

    async def handler(request, event, before, *values) -> Updates:
        return await ask(request, event, *values) if before else nothing()

    return handler


def tie_models(page: Page, blocks: Any) -> None:
    """What depends on the model, when the page opens and when another is chosen; then what was left unfinished."""
    outputs = depending(page)
    stages = [tab.stage for tab in page.each.values()]

    async def chosen(request, event, model, at) -> Updates:
        return for_model(page, model, at)

    async def opened(request, event, words, model) -> AsyncIterator[Updates]:
        who = whose(page.clerk, request)
        yield {page.gallery: await page.clerk.gallery(who, words), **for_model(page, model)}
        job = await page.clerk.unfinished(who)
        if job is not None:
            yield {page.model: job.model, **for_model(page, job.model, tab_of(job))}
            stage = page.each[tab_of(job)].stage
            async for updates in followed(page, who, known(job), page_of(request), words, stage):
                yield updates

    listen(blocks.load, opened, [page.search, page.model], [page.model, *outputs, *stages, page.gallery])
    # `input`, not `change`: a job that is picked sets model and fields at once
    listen(page.model.input, chosen, [page.model, page.at], outputs, trigger_mode="always_last")
    for tab in page.each.values():
        listen(tab.tab.select, being(page, tab.name), [], [page.at], queue=False)
        listen(tab.loras.change, pulling(page, tab), [page.model, tab.loras], tab.pulls, queue=False)


def being(page: Page, name: str) -> Any:
    async def handler(request) -> Updates:
        return {page.at: name}

    return handler


def pulling(page: Page, tab: Tab) -> Any:
    """A strength for each chosen LoRA."""

    async def handler(request, model, chosen) -> Updates:
        return rows(page, tab, model, dict.fromkeys(chosen or ()))

    return handler
