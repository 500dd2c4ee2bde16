"""The MCP SDK's client over HTTP and over stdin and stdout."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import sys

from fakeserve import HERE, ROOT, running, wait_for
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from PIL import Image
from test_openai import png


async def use(session: ClientSession) -> dict:
    """Every tool once; what came back."""
    await session.initialize()
    steps: list[tuple[float, float | None]] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        steps.append((progress, total))

    names = {tool.name: tool for tool in (await session.list_tools()).tools}
    drawn = await session.call_tool(
        "generate_image", {"prompt": "slow sign", "seed": 7, "steps": 5, "size": "64x32"}, progress_callback=note
    )
    told = json.loads(drawn.content[-1].text)
    edited = await session.call_tool("edit_image", {"prompt": "red", "images": told["images"]})
    wrong = [(await session.call_tool(tool, wish)) for tool, wish, _ in WRONG]
    return {"names": names, "steps": steps, "drawn": drawn, "edited": edited, "wrong": wrong, "told": told}


WRONG = (  # tool, arguments, how the sentence begins; the SDK had its own words around it, or pydantic's
    ("generate_image", {"prompt": "x", "size": "1x1"}, "the size 1×1 can't be drawn"),
    ("generate_image", {"prompt": "x", "steps": "many"}, "steps must be a whole number"),
    ("generate_image", {"prompt": 5}, "prompt must be a text"),
    ("generate_image", {}, "prompt is missing: the tool needs it"),
    ("generate_image", {"prompt": "boom"}, "something went wrong inside; the server's log has it under"),
    ("edit_image", {"prompt": "x", "images": "x"}, "images must be a list"),
    ("edit_image", {"prompt": "x", "images": ["x", 5]}, "images.1 must be a text"),
    ("edit_image", {"prompt": "x", "images": []}, "images is empty"),
    ("paint", {}, "there is no tool 'paint'"),
)


def check(got: dict) -> None:
    assert set(got["names"]) == {"generate_image", "edit_image"}
    picture = got["drawn"].content[0]
    assert picture.type == "image" and picture.mime_type == "image/png"
    image = Image.open(io.BytesIO(base64.b64decode(picture.data)))
    assert image.size == (64, 32) and image.getpixel((0, 0))[0] == 7
    assert got["steps"] == [(step, 5) for step in range(1, 6)]
    assert not got["edited"].is_error and got["edited"].content[0].type == "image"
    for one, (*_, words) in zip(got["wrong"], WRONG, strict=True):
        told = one.content[0].text
        assert one.is_error and told.startswith(words) and "\n" not in told, told


def test_over_http(server):
    async def run() -> dict:
        async with (
            streamable_http_client(f"{server.url}/mcp") as (read, write, *_),
            ClientSession(read, write) as session,
        ):
            return await use(session)

    check(asyncio.run(run()))


def test_prompts_are_rewritten_where_that_is_asked_for(server, tmp_path):
    async def ask(url: str, *wishes: tuple[str, dict]) -> list:
        async with streamable_http_client(f"{url}/mcp") as (read, write, *_), ClientSession(read, write) as session:
            await session.initialize()
            return [await session.call_tool(tool, wish) for tool, wish in wishes]

    cat, small = {"prompt": "a cat", "rewrite": True}, {"size": "64x64"}
    release = {"names": ["qwen-image"], "options": {"release": "qwen-image"}}
    with running(tmp_path, **release) as other:
        wait_for(lambda: other.get("/readyz").status_code == 200)
        shy = {"prompt": "a shy cat", "rewrite": True}
        wishes = [("generate_image", one | small) for one in (cat, {"prompt": "a cat"}, cat | {"rewrite": False}, shy)]
        told = [json.loads(one.content[-1].text) for one in asyncio.run(ask(other.url, *wishes))]
    assert [one.get("revised_prompt") for one in told] == ["a cat, in detail", None, None, None]
    assert [one.get("not_rewritten") for one in told] == [None, None, None, "it is shy"]
    picture = base64.b64encode(png()).decode()
    refused = asyncio.run(ask(server.url, ("generate_image", cat), ("edit_image", cat | {"images": [picture]})))
    assert all(one.is_error and "nano can't rewrite prompts" in one.content[0].text for one in refused)


def test_an_agent_is_told_what_its_picture_reads(server):
    async def ask() -> list:
        http = streamable_http_client(f"{server.url}/mcp")
        async with http as (read, write, *_), ClientSession(read, write) as session:
            await session.initialize()
            wish = {"prompt": 'a sign "OPEN"', "seed": 2, "steps": 1, "size": "64x64"}
            return [
                await session.call_tool("generate_image", wish | more) for more in ({"tries": 4}, {}, {"tries": 99})
            ]

    right, plain, refused = asyncio.run(ask())
    told = json.loads(right.content[-1].text)
    assert told["text"] == {"asked": ["OPEN"], "read": ["OPEN"], "right": True, "tries": 3} and told["seeds"] == [4]
    assert "text" not in json.loads(plain.content[-1].text)
    assert refused.is_error and "from 1 to 64" in refused.content[0].text


def test_over_stdin_and_stdout(tmp_path):
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{HERE}", "LANTING_LANG": "en"}
    code = (
        "from pathlib import Path; from lanting.serve.mcp_tools import speak; from lanting.serve.settings import *;"
        f"speak(Settings(Path({str(tmp_path)!r}), opener='fakeserve:open_engine'))"
    )

    async def run() -> dict:
        how = StdioServerParameters(command=sys.executable, args=["-c", code], env=env)
        async with stdio_client(how) as (read, write), ClientSession(read, write) as session:
            return await use(session)

    check(asyncio.run(run()))
