"""What happens when something is pressed: orders to the queue's one interface, and what it tells back as HTML.

No Gradio here. A handler takes who asks and plain values, and gives what the page shows; `page` ties them to fields.
Everything goes through `house.desk`, as in every dialect, so jobs of the studio are durable, fair and in `/api/jobs`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lanting.core.errors import LantingError, RequestError
from lanting.core.pictures import open_mask, open_picture
from lanting.core.recipe import restore_request
from lanting.core.types import Request
from lanting.serve.common import result_path
from lanting.serve.files import ID
from lanting.serve.house import House
from lanting.serve.intake import Order
from lanting.serve.jobs import Caller, Job, Search
from lanting.serve.pace import units
from lanting.serve.state import Model
from lanting.serve.studio import show
from lanting.serve.studio.forms import (
    DIALECT,
    DRAW,
    EDIT,
    LAYERS,
    More,
    edit_of,
    layers_of,
    mask_of,
    order_of,
    request_of,
    size_in,
    tab_of,
    tabs_of,
)
from lanting.serve.studio.plans import panel, planned, words_for
from lanting.serve.studio.words import Say, explained, speaker
from lanting.specs import settle
from lanting.specs.rewriting import may_rewrite

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE, MOST = 24, 480  # tiles at first, and at most
STROKES = 8  # layers of a canvas that are looked at


@dataclass
class Clerk:
    """One language's handlers. `latest`: what each open page follows in a tab, so that a newer job takes over."""

    house: House
    language: str
    latest: dict[str, str] = field(default_factory=dict[str, str])
    planning: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))  # each takes torch's room

    @property
    def say(self) -> Say:
        return speaker(self.language)

    # ---------------------------------------------------------------- orders
    async def draw(self, who: Caller, model: str | None, prompt: str, size: str | None, more: More) -> Job:
        return await self.submit(who, order_of(request_of(prompt, more, size=size_in(size)), model, more))

    async def edit(
        self, who: Caller, model: str | None, prompt: str, canvas: Canvas, others: Sequence[bytes], more: More
    ) -> Job:
        """A painted mask says where, further pictures are looked at."""
        spec = self.model(model).spec
        if spec is None:
            raise RequestError("the model is being loaded: try again in a moment")
        images, mask = await self.seen(canvas, others)
        return await self.submit(who, order_of(edit_of(prompt, more, images, mask, spec), model, more))

    async def seen(self, canvas: Canvas, others: Sequence[bytes]) -> tuple[tuple[Image, ...], Image | None]:
        """Pictures and mask, bounded before they are decoded like everything that comes in."""
        if canvas.background is None:
            return (), None
        sources, most = [canvas.background, *others], self.house.settings.caps.pictures
        images = await self.house.eyes.pictures(sources, most)
        layers = [await self.house.eyes.picture(layer) for layer in canvas.layers[:STROKES]]
        return images, await asyncio.to_thread(mask_of, layers, images[0].size)

    async def layers(
        self, who: Caller, model: str | None, prompt: str, picture: bytes | None, how: tuple[float, bool], more: More
    ) -> Job:
        image = None if picture is None else await self.house.eyes.picture(picture)
        return await self.submit(who, order_of(layers_of(prompt, more, image, *how), model, more))

    async def again(self, who: Caller, id_: str, fresh: bool) -> Job:
        """A job once more: the same picture, or with a new seed another like it."""
        job = await self.job(who, id_)
        request = await asyncio.to_thread(self.restored, job)
        if fresh:
            request = replace(request, seed=None)
        return await self.submit(who, Order(request, job.model, DIALECT, job.asked["lora"]))

    def restored(self, job: Job) -> Request:
        """A job's request with the pictures it came with. Raises PictureError where they were forgotten."""
        asked, files = job.asked["request"], self.house.desk.files
        images = [open_picture(files.picture(one["sha256"])) for one in asked["images"]]
        mask = None if asked["mask"] is None else open_mask(files.picture(asked["mask"]["sha256"]))
        request = restore_request(asked, images, mask)
        return replace(request, rewrite=bool(request.rewrite))  # as then, whatever is the default now

    async def submit(self, who: Caller, order: Order) -> Job:
        spec = self.model(order.model).spec
        if spec is None or not may_rewrite(order.request, spec):  # the box is there for other models
            order = replace(order, request=replace(order.request, rewrite=None))
        return await self.house.desk.submit(order, who)

    async def cancel(self, who: Caller, id_: str) -> None:
        if ID.fullmatch(id_):
            await self.house.desk.cancel(id_, who)

    # ---------------------------------------------------------------- following
    async def follow(self, who: Caller, job: Job, page: str) -> AsyncGenerator[str]:
        """The stage at every event, until the job is over or the page follows another."""
        desk, say, key = self.house.desk, self.say, f"{page} {tab_of(job)}"
        self.latest[key] = job.id
        yield self.waiting(job)
        try:
            async with aclosing(desk.watch(job.id, who)) as events:
                async for event in events:
                    if self.latest.get(key) != job.id:
                        return
                    if event.kind in ("accepted", "place", "interrupted"):
                        yield self.waiting(job)
                    elif event.kind == "step":
                        yield show.drawing(job, event, say)
            yield await self.stage(await desk.job(job.id, who))
        finally:
            if self.latest.get(key) == job.id:
                del self.latest[key]

    def waiting(self, job: Job) -> str:
        """Its place, and who draws."""
        desk = self.house.desk
        crew = desk.models[job.model].crew if job.model in desk.models else {}
        return show.waiting(job, desk.place(job), self.say, crew)

    async def stage(self, job: Job) -> str:
        """A job as it stands."""
        if not job.over:
            return self.waiting(job)
        before = f"/studio/before/{job.id}" if tab_of(job) == EDIT else None
        return show.ended(job, self.say, before, self.language)

    def failed(self, error: LantingError) -> str:
        return show.trouble(explained(self.say, error))

    async def unfinished(self, who: Caller) -> Job | None:
        """What the studio was drawing for somebody when the page was left."""
        for state in ("running", "waiting"):
            found = await self.house.desk.history(Search(who.id, state=state, limit=5))
            if mine := [job for job in found if job.dialect == DIALECT]:
                return mine[0]
        return None

    # ---------------------------------------------------------------- looking up
    async def job(self, who: Caller, id_: str) -> Job:
        return await self.house.desk.job(id_, who)

    async def gallery(self, who: Caller, words: str, most: int = PAGE) -> str:
        most = min(max(most, PAGE), MOST)
        words = (words or "").strip()[:200]
        jobs = await self.house.desk.history(Search(who.id, words, limit=most + 1))
        return show.gallery(jobs, words, most, self.say)

    async def result(self, who: Caller, id_: str, index: int) -> bytes:
        """A finished picture's file."""
        job = await self.job(who, id_)
        return await asyncio.to_thread(result_path(self.house, job, index).read_bytes)

    def model(self, name: str | None) -> Model:
        return self.house.desk.model(name)

    async def plan(self, model: str | None, size: str | None, tab: str, rewrite: bool = False) -> str:
        """Will it fit? `rewrite`: the box is ticked. A server that rewrites holds what writes, ticked or not."""
        served = self.model(model)
        wanted = served.served.options.get("rewrite") or (rewrite and tab != LAYERS)
        writes = bool(wanted) and served.spec is not None and served.spec.writes
        async with self.planning:
            told = await planned(words_for(served.served, size, 1 if tab == EDIT else 0, writes), self.language)
        return panel(told, self.say, self.pace(served, size) if tab == DRAW else None)

    def pace(self, model: Model, size: str | None) -> float | None:
        """Seconds of a picture, from what was drawn here."""
        if model.spec is None or DRAW not in tabs_of(model.spec):
            return None
        wish = Request("?", "text_to_image", size=size_in(size))
        return model.pace.seconds(units(settle(wish, model.spec)))


@dataclass(frozen=True, slots=True)
class Canvas:
    """What was painted on: a picture's file, and the files of the layers above it."""

    background: bytes | None = None
    layers: Sequence[bytes] = ()


def nothing(language: str) -> dict[str, Any]:
    """The stages before anything was asked."""
    return {tab: show.empty(tab, language, speaker(language)) for tab in (DRAW, EDIT, LAYERS)}
