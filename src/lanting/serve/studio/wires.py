"""What every press does on the page: values from fields to the clerk, HTML and settings back."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lanting.core.errors import LantingError
from lanting.serve.errors import NoKeyError
from lanting.serve.jobs import LOCAL, Caller, Job
from lanting.serve.studio import show
from lanting.serve.studio.clerk import PAGE, Clerk
from lanting.serve.studio.forms import DRAW, EDIT, LAYERS, NAMES, More, sizes_of, tab_of, tabs_of, values_of
from lanting.serve.studio.page import Page, hiding

Updates = dict[Any, Any]


def tie(page: Page, blocks: Any) -> None:
    """Everything."""
    tie_orders(page)
    tie_stages(page)
    tie_history(page)
    tie_plans(page)
    tie_models(page, blocks)


def whose(clerk: Clerk, request: Any) -> Caller:
    """Whom the guard let in. Never this computer where keys are asked for."""
    caller = request.request.scope.get("state", {}).get("caller")
    if caller is None and clerk.house.settings.needs_keys:
        raise NoKeyError("an API key is needed: send 'Authorization: Bearer KEY'; 'lanting keys create NAME' makes one")
    return caller or LOCAL


def listen(event: Any, handler: Any, inputs: Sequence[Any], outputs: Sequence[Any], **how: Any) -> Any:
    """Tie a handler to an event, or to several. It gets the request first, then what the event tells, then values."""
    import gradio as gr

    handler.__annotations__ = {"request": gr.Request, "event": gr.EventData}
    told = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None, **how}
    if isinstance(event, list):
        return gr.on(event, handler, list(inputs), list(outputs), **told)
    return event(handler, list(inputs), list(outputs), **told)


def told_by(event: Any, name: str) -> str:
    """A word that an event brings."""
    data = getattr(event, "_data", None)
    return str(data.get(name, ""))[:2000] if isinstance(data, dict) else ""


def page_of(request: Any) -> str:
    return str(request.session_hash)


# ---------------------------------------------------------------- orders
def tie_orders(page: Page) -> None:
    """The three buttons, and Enter in their fields."""
    extras = {DRAW: ("size",), EDIT: ("canvas", "others"), LAYERS: ("picture", "count", "fine")}
    for name, tab in page.each.items():
        fields = [page.search, page.model, tab.prompt, *tab.fold, *(tab.extra[one] for one in extras[name])]
        events = [tab.go.click, tab.prompt.submit]
        listen(events, ordering(page, name), fields, [tab.stage, page.gallery], trigger_mode="multiple")


def ordering(page: Page, name: str) -> Any:
    """A handler that submits what a tab asks for and follows it."""
    clerk, tab = page.clerk, page.each[name]

    async def handler(request, words, model, prompt, *values) -> AsyncIterator[Updates]:
        who, more, rest = whose(clerk, request), More(*tidy(values[: len(NAMES)])), values[len(NAMES) :]

        async def order() -> Job:
            if name == DRAW:
                return await clerk.draw(who, model, prompt, rest[0], more)
            if name == EDIT:
                others = [await asyncio.to_thread(Path(path).read_bytes) for path, _ in rest[1] or []]
                return await clerk.edit(who, model, prompt, rest[0], others, more)
            return await clerk.layers(who, model, prompt, rest[0], (rest[1], bool(rest[2])), more)

        async for updates in followed(page, who, order, page_of(request), words, tab.stage):
            yield updates

    return handler


def tidy(values: Sequence[Any]) -> list[Any]:
    """Empty fields as `More` has them."""
    seed, count, steps, guidance, strength, negative, quality, loras, pull = values
    return [seed, count, steps, guidance, strength, negative or "", quality, tuple(loras or ()), pull]


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


# ---------------------------------------------------------------- on the stage
def tie_stages(page: Page) -> None:
    """The buttons under a picture."""
    for name, tab in page.each.items():
        listen(tab.stage.cancel, cancelling(page, tab.stage), [], [tab.stage])
        listen(tab.stage.again, repeating(page, tab.stage), [page.search], [tab.stage, page.gallery])
        target = page.each[EDIT]
        listen(
            tab.stage.edit,
            editing(page, tab.stage),
            [page.model],
            [page.tabs, target.stage, tab.stage][: 3 - (name == EDIT)],
        )
        listen(tab.stage.lay, laying(page), [], [target.extra["canvas"]])
        listen(tab.stage.fill, filling(tab.prompt), [], [tab.prompt])


def cancelling(page: Page, stage: Any) -> Any:
    async def handler(request, event) -> Updates:
        try:
            await page.clerk.cancel(whose(page.clerk, request), told_by(event, "job"))
        except LantingError as error:
            return {stage: page.clerk.failed(error)}
        return {}

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

        spec = clerk.model(model).spec
        if EDIT not in tabs_of(spec):
            name = "?" if spec is None else spec.name
            return {stage: show.trouble(clerk.say("{model} can't change pictures: choose another model", model=name))}
        return {page.tabs: gr.update(selected=EDIT), target.stage: show.empty(EDIT, clerk.language, clerk.say)}

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


def laid(path: str | None) -> Any:
    """A file as the canvas takes it."""
    return None if path is None else {"background": path, "layers": [], "composite": None}


def kept(clerk: Clerk, data: bytes) -> str:
    """A file of its own for Gradio to show: never one that is written twice. It goes with the uploads."""
    path = clerk.house.settings.data / "studio" / f"{secrets.token_hex(12)}.png"
    path.write_bytes(data)
    return str(path)


def filling(prompt: Any) -> Any:
    async def handler(request, event) -> Updates:
        return {prompt: told_by(event, "text")}

    return handler


# ---------------------------------------------------------------- history
def tie_history(page: Page) -> None:
    """Search, older ones, and a press on a tile."""
    clerk = page.clerk

    async def find(request, event, words) -> Updates:
        return {page.gallery: await clerk.gallery(whose(clerk, request), words)}

    async def older(request, event, words) -> Updates:
        most = told_by(event, "most")
        return {page.gallery: await clerk.gallery(whose(clerk, request), words, int(most) if most.isdigit() else PAGE)}

    listen(page.search.change, find, [page.search], [page.gallery], trigger_mode="always_last")
    listen(page.gallery.more, older, [page.search], [page.gallery])
    stages = [tab.stage for tab in page.each.values()]
    outputs = [page.tabs, page.each[DRAW].extra["size"]]
    for tab in page.each.values():
        outputs += [tab.prompt, *tab.fold]
    listen(page.gallery.pick, recalling(page), [], outputs)
    listen(page.gallery.pick, picking(page), [page.search], [*stages, page.gallery], trigger_mode="multiple")
    edit = page.each[EDIT].extra
    listen(page.gallery.restore, restoring(page), [], [edit["canvas"], edit["others"]])
    listen(page.gallery.unpack, restoring(page), [], [page.each[LAYERS].extra["picture"]])


def recalling(page: Page) -> Any:
    """Every setting of a job comes back."""

    async def handler(request, event) -> Updates:
        import gradio as gr

        try:
            job = await page.clerk.job(whose(page.clerk, request), told_by(event, "job"))
        except LantingError:
            return {}  # the stage says so
        return {page.tabs: gr.update(selected=tab_of(job)), **settings_of(page, job)}

    return handler


def picking(page: Page) -> Any:
    """A job's picture on its stage; one that is not over is followed."""
    clerk = page.clerk

    async def handler(request, event, words) -> AsyncIterator[Updates]:
        who = whose(clerk, request)
        try:
            job = await clerk.job(who, told_by(event, "job"))
        except LantingError as error:
            yield {page.each[DRAW].stage: clerk.failed(error)}
            return
        stage = page.each[tab_of(job)].stage
        if job.over:
            clerk.latest.pop(f"{page_of(request)} {tab_of(job)}", None)
            yield {stage: await clerk.stage(job)}
            return
        async for updates in followed(page, who, known(job), page_of(request), words, stage):
            yield updates

    return handler


def known(job: Job) -> Callable[[], Awaitable[Job]]:
    """For `followed`: a job that was ordered before."""

    async def same() -> Job:
        return job

    return same


def settings_of(page: Page, job: Job) -> Updates:
    """The fields as the job was asked."""
    import gradio as gr

    tab = page.each[tab_of(job)]
    prompt, size, more = values_of(job)
    values = [getattr(more, name) for name in NAMES]
    known = [lora["name"] for lora in page.clerk.model(None).loras]
    values[NAMES.index("loras")] = [name for name in more.loras if name in known]
    if more.strength is None:
        values[NAMES.index("strength")] = gr.skip()
    updates = {tab.prompt: prompt, **dict(zip(tab.fold, values, strict=True))}
    if tab.name == DRAW and size is not None:
        sizes = sizes_of(page.clerk.model(None).spec, page.clerk.say)
        odd = [] if size in {known for _, known in sizes} else [(size.replace("x", "×"), size)]
        updates[tab.extra["size"]] = gr.update(choices=[*sizes, *odd], value=size)
    return updates


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


# ---------------------------------------------------------------- plans and models
def tie_plans(page: Page) -> None:
    """The panel is filled when it is opened, and again when the shape changes while it says something."""
    for tab in page.each.values():
        size = tab.extra.get("size")
        inputs = [page.model, *([size] if size is not None else [])]
        told = tab.plan["told"]
        listen(tab.plan["box"].expand, planning(page, tab.name, told), inputs, [told], show_progress="minimal")
        if size is not None:
            listen(size.change, replanning(page, told), [*inputs, told], [told])


def planning(page: Page, name: str, told: Any) -> Any:
    async def handler(request, event, model, size=None) -> Updates:
        whose(page.clerk, request)
        try:
            return {told: await page.clerk.plan(model, size, name)}
        except LantingError as error:
            return {told: page.clerk.failed(error)}

    return handler


def replanning(page: Page, told: Any) -> Any:
    ask = planning(page, DRAW, told)

    async def handler(request, event, model, size, before) -> Updates:
        return await ask(request, event, model, size) if before else {}

    return handler


def tie_models(page: Page, blocks: Any) -> None:
    """What depends on the model, when the page opens and when another is chosen; then what was left unfinished."""
    outputs = [page.hidden, page.tabs, page.each[DRAW].extra["size"]]
    for tab in page.each.values():
        outputs += tab.fold[-2:]
    stages = [tab.stage for tab in page.each.values()]

    async def chosen(request, event, model) -> Updates:
        return for_model(page, model)

    async def opened(request, event, words) -> AsyncIterator[Updates]:
        who = whose(page.clerk, request)
        yield {page.gallery: await page.clerk.gallery(who, words)}
        job = await page.clerk.unfinished(who)
        if job is not None:
            stage = page.each[tab_of(job)].stage
            async for updates in followed(page, who, known(job), page_of(request), words, stage):
                yield updates

    listen([blocks.load, page.model.change], chosen, [page.model], outputs, trigger_mode="always_last")
    listen(blocks.load, opened, [page.search], [*stages, page.gallery])


def for_model(page: Page, name: str | None) -> Updates:
    import gradio as gr

    clerk = page.clerk
    model = clerk.model(name)
    able, sizes = tabs_of(model.spec), sizes_of(model.spec, clerk.say)
    loras = [lora["name"] for lora in model.loras]
    updates: Updates = {
        page.hidden: hiding(able),
        page.tabs: gr.update(selected=able[0]) if able else gr.skip(),
        page.each[DRAW].extra["size"]: gr.update(choices=sizes, value=sizes[0][1] if sizes else None),
    }
    for tab in page.each.values():
        updates[tab.fold[-2]] = gr.update(choices=loras, value=[], visible=bool(loras))
        updates[tab.fold[-1]] = gr.update(visible=bool(loras))
    return updates
