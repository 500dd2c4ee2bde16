"""MCP: the tools generate_image and edit_image, over HTTP at /mcp and over stdin and stdout.

A result comes as pictures and as a line of text that names them (`job:ID/0`), so the next edit needs no upload. Over
stdin and stdout there is no port and no key: whoever started the process owns it.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError, UnexpectedToolError
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import Field, ValidationError

from lanting.core.errors import LantingError, RequestError
from lanting.core.lang import explain, say
from lanting.core.types import Request
from lanting.serve.common import caller_of, read_in, result_path, revised, with_picture
from lanting.serve.errors import misread
from lanting.serve.hand import processes
from lanting.serve.house import Hire, House, open_house
from lanting.serve.intake import Order
from lanting.serve.jobs import LOCAL, Caller, Job
from lanting.serve.loras import lora_in
from lanting.serve.own import size_in, source
from lanting.serve.settings import Settings

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from starlette.types import ASGIApp

SEVERAL = 9  # servers over stdin and stdout that may run at once
ABOUT = "Draws pictures from words and changes pictures by instruction, on this machine (Qwen-Image family)."

Prompt = Annotated[str, Field(description="What to draw. Letters that shall be in the picture go in quotes.")]
Size = Annotated[str | None, Field(description='"WIDTHxHEIGHT" in multiples of 16, or a ratio such as "16:9".')]
Seed = Annotated[int | None, Field(description="Same seed, same picture.")]
Steps = Annotated[int | None, Field(description="Denoising steps.")]
Model = Annotated[str | None, Field(description="One of the server's models; its first where left out.")]
Lora = Annotated[str | None, Field(description='LoRAs of the server, as "name:0.8, other".')]
Rewrite = Annotated[
    bool | None,
    Field(description="Write a short prompt out in detail first, by models that can; as the server does by default."),
]
Tries = Annotated[
    int | None,
    Field(description="Read quoted words back, and draw with up to so many seeds until they are right; see `text`."),
]
Sources = Annotated[list[str], Field(description="Base64, data URLs, or job:ID/INDEX of earlier results.")]
Hole = Annotated[str | None, Field(description="Base64 of a picture as large as the first: white is drawn anew.")]


class Server(MCPServer[Any]):
    """The SDK's, but what went wrong is said in our words alone."""

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None) -> Any:
        try:
            return await super().call_tool(name, arguments, context)
        except UnexpectedToolError as error:  # which the SDK logs, with its cause
            raise UnexpectedToolError(say("something went wrong inside; the server's log has it")) from error.__cause__
        except ToolError as error:
            raise ToolError(in_our_words(name, error.__cause__)) from None


def in_our_words(tool: str, cause: BaseException | None) -> str:
    """A failure that the SDK put its own words around."""
    if isinstance(cause, ToolError):
        return str(cause)
    if not isinstance(cause, ValidationError):
        return explain(RequestError("there is no tool {name}: ask for the list of tools", name=repr(tool[:40])))
    first = cause.errors(include_url=False)[0]
    if first["type"] == "missing":
        return explain(RequestError("{name} is missing: the tool needs it", name=first["loc"][0]))
    return explain(misread([first]))


def tools(house: House) -> MCPServer[Any]:
    """The MCP server over a house."""
    server = Server("lanting", instructions=ABOUT)

    @server.tool(description="Draw a picture from words.", structured_output=False)
    async def generate_image(  # noqa: PLR0913  what clients are shown
        prompt: Prompt,
        ctx: Context[Any, Any],
        size: Size = None,
        seed: Seed = None,
        steps: Steps = None,
        model: Model = None,
        lora: Lora = None,
        rewrite: Rewrite = None,
        tries: Tries = None,
    ) -> list[Any]:
        wish = Request(prompt, seed=seed, steps=steps, rewrite=rewrite, tries=tries)
        return await drawn(house, ctx, Order(wish, model, "mcp", lora_in(lora)), size)

    @server.tool(description="Change pictures by instruction, or redraw part of one.", structured_output=False)
    async def edit_image(  # noqa: PLR0913  the same
        prompt: Prompt,
        images: Sources,
        ctx: Context[Any, Any],
        mask: Hole = None,
        size: Size = None,
        seed: Seed = None,
        model: Model = None,
        rewrite: Rewrite = None,
        tries: Tries = None,
    ) -> list[Any]:
        try:
            wish = await edit_of(house, ctx, Request(prompt, seed=seed, rewrite=rewrite, tries=tries), images, mask)
        except LantingError as error:
            raise ToolError(explain(error)) from None
        return await drawn(house, ctx, Order(wish, model, "mcp"), size)

    return server


async def edit_of(house: House, ctx: Context[Any, Any], wish: Request, images: list[str], mask: str | None) -> Request:
    """The wish with its pictures."""
    if not images:
        raise RequestError("images is empty: send the picture to change")
    caller = asking(ctx)
    sources = [await source(house, one, caller) for one in images]
    pictures = await house.eyes.pictures(sources, house.settings.caps.pictures)
    return replace(wish, images=pictures, mask=None if mask is None else await house.eyes.mask(mask))


def asking(ctx: Context[Any, Any]) -> Caller:
    """Who called the tool: over HTTP whom the guard let in."""
    request = getattr(ctx.request_context, "request", None)
    return LOCAL if request is None else caller_of(request)


async def drawn(house: House, ctx: Context[Any, Any], order: Order, size: str | None) -> list[Any]:
    """Submit, tell steps as progress, return pictures and what they are. A failure is the tool's error."""
    caller, job = asking(ctx), None
    try:
        request = replace(order.request, size=size_in(house, order.model, size))
        job = await house.desk.submit(replace(order, request=request), caller)
        async with aclosing(house.desk.watch(job.id, caller)) as events:
            async for event in events:
                if event.kind == "step":
                    await ctx.report_progress(event.body["step"], event.body["steps"])
        return await answer(house, with_picture(await house.desk.job(job.id, caller)))
    except LantingError as error:
        raise ToolError(explain(error)) from None
    except asyncio.CancelledError:
        if job is not None:
            await asyncio.shield(house.desk.cancel(job.id, caller))
        raise


async def answer(house: House, job: Job) -> list[Any]:
    """from_result."""
    assert job.outcome is not None
    paths = [result_path(house, job, index) for index in range(len(job.outcome["images"]))]
    names = [f"job:{job.id}/{index}" for index in range(len(paths))]
    seeds = [recipe["request"]["seed"] for recipe in job.outcome["recipes"]]
    told = {"images": names, "seeds": seeds, "model": job.model, "seconds": job.outcome["seconds"]}
    told |= written(job) | read_in(job, 0)  # the tools draw one picture a call
    pictures = [Image(data=await asyncio.to_thread(path.read_bytes), format="png") for path in paths]
    return [*pictures, json.dumps(told)]


def written(job: Job) -> dict[str, Any]:
    """What was drawn where the prompt was rewritten, or why it was not; the tools draw one picture a call."""
    assert job.outcome is not None
    drawn = job.outcome["recipes"][0]["request"]
    if drawn.get("unwritten") is not None:
        return {"not_rewritten": drawn["unwritten"]}
    return revised(drawn)


def http_app(house: House) -> tuple[ASGIApp, AbstractAsyncContextManager[None]]:
    """MCP over HTTP, and what keeps its sessions."""
    server = tools(house)
    lax = TransportSecuritySettings(enable_dns_rebinding_protection=False)  # the guard has seen host and origin
    app = server.streamable_http_app(
        streamable_http_path="/mcp", transport_security=lax, max_request_body_size=house.settings.caps.body
    )
    return app, server.session_manager.run()


def speak(settings: Settings, hire: Hire = processes) -> None:
    """Serve MCP on stdin and stdout until they close. Several such servers each take a folder of their own."""
    house = own_house(settings, hire)

    async def run() -> None:
        async with house.living():
            await tools(house).run_stdio_async()

    asyncio.run(run())


def own_house(settings: Settings, hire: Hire) -> House:
    """In the server's folder, or beside it where a server has it."""
    for number in range(SEVERAL + 1):
        folder = settings.data if number == 0 else Path(f"{settings.data}-mcp-{number}")
        try:
            return open_house(replace(settings, data=folder), hire)
        except RequestError:
            if number == SEVERAL:
                raise
            time.sleep(0.01)
    raise AssertionError
