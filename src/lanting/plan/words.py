"""Plans in words: one line, and the names of what a plan does. Sentences go through `say`, so Chinese has them too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lanting.core.lang import say

if TYPE_CHECKING:
    from lanting.plan.plan import Plan


def encoder(plan: Plan) -> str:
    """Where the text encoder is: "kept", "takes turns", "on the CPU"."""
    words = {"keep": say("kept"), "unload": say("takes turns"), "cpu": say("on the CPU")}
    return words[plan.encoder]


def size(count: int) -> str:
    """Bytes for people, as files are sold: "10.9 GB", "254 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}" if unit == "GB" else f"{count / scale:.0f} {unit}"
    return f"{count} bytes"


def seconds(value: float | None) -> str:
    """ "~0.4 s", "~48 s", "~6 min"; "?" where it is not known."""
    if value is None:
        return "?"
    if value >= 120:
        return f"~{value / 60:.0f} min"
    return f"~{value:.0f} s" if value >= 3 else f"~{value:.1f} s"


def residence(plan: Plan) -> str:
    """Where the transformer's blocks are: "resident", "18 of 60 resident, rest from RAM"."""
    if plan.streamed == "none":
        return say("resident + table") if plan.modulation_table else say("resident")
    source = say("RAM") if plan.streamed == "ram" else say("disk")
    if plan.resident_blocks == 0:
        return say("streamed from {source}", source=source)
    return say(
        "{resident} of {blocks} resident, rest from {source}",
        **{"resident": plan.resident_blocks, "blocks": plan.blocks, "source": source},
    )


def memory(plan: Plan) -> str:
    """ "10.9 GB VRAM, 6.2 GB RAM"; RAM alone where there is no other."""
    ram = say("{size} RAM", size=size(plan.peak_ram))
    return f"{say('{size} VRAM', size=size(plan.peak_vram))}, {ram}" if plan.peak_vram else ram


def sentence(plan: Plan) -> str:
    """ "plan: int4, resident + table, text encoder takes turns, VAE in tiles; at most 10.9 GB VRAM, 6.2 GB RAM"."""
    parts = [plan.transformer, residence(plan)]
    if plan.text_encoder != plan.transformer:
        parts.append(say("text encoder {kind}", kind=plan.text_encoder))
    if plan.encoder != "keep":
        parts.append(say("text encoder {kind}", kind=encoder(plan)))
    if plan.vae_tile:
        parts.append(say("VAE in tiles"))
    return say("plan: {parts}; at most {memory}", parts=", ".join(parts), memory=memory(plan))
