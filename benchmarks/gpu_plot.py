"""Draws what `benchmarks/gpu.py` found: for every size a bar for each way, by how many times diffusers' speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIZES = ("512", "1024", "1328", "2048")
INK = {"diffusers": "#999999", "compiled": "#c8372d", "bf16": "#1f5fbf", "int8 rotated": "#3d9950", "fp8": "#7a3fb0"}
WIDE, HIGH, LEFT, TOP, BAR = 250, 300, 60, 60, 34


def ways_of(found: dict[str, Any], size: str) -> dict[str, float]:
    """Milliseconds of what was measured at one size."""
    table = {name: row["ms"] for name, row in found.get(size, {}).items() if isinstance(row, dict) and "ms" in row}
    if size in found.get("compiled", {}):
        table["compiled"] = found["compiled"][size]
    return {name: table[name] for name in INK if name in table}


def plot(found: dict[str, Any], path: Path) -> None:
    sizes = [size for size in SIZES if "diffusers" in ways_of(found, size)]
    sheet = Image.new("RGB", (LEFT + WIDE * max(1, len(sizes)) + 20, HIGH + TOP + 50), "white")
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(12)
    gpu = found.get("limits", {}).get("gpu", "no GPU")
    draw.text((LEFT, 12), f"{gpu}: a step, times as fast as diffusers (milliseconds on the bars)", "#000", font)
    gains = {
        size: {n: ways_of(found, size)["diffusers"] / ms for n, ms in ways_of(found, size).items()} for size in sizes
    }
    most = max((gain for row in gains.values() for gain in row.values()), default=1.0) * 1.12
    for tick in range(int(most) + 1):
        y = TOP + HIGH * (1 - tick / most)
        draw.line([(LEFT, y), (sheet.width - 10, y)], fill="#eee")
        draw.text((LEFT - 8, y), f"{tick}", "#333", small, anchor="rm")
    for index, size in enumerate(sizes):
        for place, (name, gain) in enumerate(gains[size].items()):
            x, y = LEFT + index * WIDE + 15 + place * (BAR + 8), TOP + HIGH * (1 - gain / most)
            draw.rectangle((x, y, x + BAR, TOP + HIGH), fill=INK[name])
            draw.text((x + BAR / 2, y - 3), f"{ways_of(found, size)[name]:.0f}", "#333", small, anchor="ms")
        draw.text((LEFT + index * WIDE + WIDE / 2 - 10, TOP + HIGH + 8), f"{size} x {size}", "#000", font, anchor="ma")
    for place, (name, ink) in enumerate(INK.items()):
        x = LEFT + place * 160
        draw.rectangle((x, TOP + HIGH + 32, x + 12, TOP + HIGH + 44), fill=ink)
        draw.text((x + 18, TOP + HIGH + 38), "diffusers, compiled" if name == "compiled" else name, "#333", small, "lm")
    sheet.save(path)
