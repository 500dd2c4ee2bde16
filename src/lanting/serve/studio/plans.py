"""Will it fit? The panel asks `lanting plan --json` in a process of its own: the answer reads the headers of the model
that is here, which needs torch's room, and the server's process has no torch. It is the same object as on the screen.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import escape
from typing import Any

from lanting.plan.words import seconds, size
from lanting.serve.settings import Served
from lanting.serve.studio.words import Say

PATIENCE = 60.0  # seconds
FLAGS = ("device", "quant", "vram", "ram")


def words_for(served: Served, shape: str | None, references: int = 0, writes: bool = False) -> list[str]:
    """The command's arguments for a model as it is served; `writes`: it also rewrites prompts."""
    words = ["plan", served.model, "--json"]
    words += ["--size", shape] if shape else []
    words += ["--references", str(references)] if references else []
    words += ["--rewrite"] if writes else []
    for name in FLAGS:
        value = served.options.get(name)
        if value is not None and value != "auto":
            words += [f"--{name}", str(value)]
    return words


async def planned(words: Sequence[str], language: str) -> dict[str, Any] | str:
    """The plans as `--json` has them, or the sentence that says why there is none."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lanting", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"LANTING_LANG": language},
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    except TimeoutError:
        return ""
    finally:  # also where nobody waits for it any more
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
    try:
        told = json.loads(out)
    except ValueError:
        return ""
    return told if "chosen" in told else str(told.get("error", ""))


def panel(told: dict[str, Any] | str, say: Say, known: float | None = None) -> str:
    """As HTML. `known`: seconds that the last pictures of this kind took here."""
    if isinstance(told, str):
        return f'<p class="plan no">{escape(told or say("there is no answer just now: try again"))}</p>'
    chosen = told["chosen"]
    yes = say("Yes, it fits this machine.")
    memory = size(chosen["peak_ram"])
    if chosen["peak_vram"]:
        memory = say("{size} VRAM", size=size(chosen["peak_vram"])) + ", " + say("{size} RAM", size=memory)
    took = known if known is not None else chosen["image_seconds"]
    facts = [(say("memory"), memory), (say("weights"), chosen["transformer"])]
    facts += [(say("a picture"), seconds(took))] if took is not None else []
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    reasons = "; ".join(chosen["reasons"])
    ways = "".join(way(one, chosen, say) for one in told["plans"][:6]) if len(told["plans"]) > 1 else ""
    return (
        f'<div class="plan"><p class="yes">{escape(yes)}</p><table>{rows}</table>'
        f"<p>{escape(reasons)}</p>{f'<ul>{ways}</ul>' if ways else ''}</div>"
    )


def way(one: Mapping[str, Any], chosen: Mapping[str, Any], say: Say) -> str:
    """Another kind of weights: whether it fits, and how long a picture takes."""
    memory = size(one["peak_vram"] or one["peak_ram"])
    word = say("fits") if one["fits"] else say("doesn't fit")
    took = f", {seconds(one['image_seconds'])}" if one["fits"] and one["image_seconds"] else ""
    mark = ' class="chosen"' if one["transformer"] == chosen["transformer"] else ""
    return f"<li{mark}>{escape(one['transformer'])}: {escape(word)}, {escape(memory)}{escape(took)}</li>"
