"""Draw a run's log: loss, what the helper heads read and place, the score of samples, and speed over designs seen.

    python benchmarks/plot_training.py runs/nano/log.jsonl -o training.png
    python benchmarks/plot_training.py first/log.jsonl second/log.jsonl -o both.png

Curves are running medians; several logs share the panels. Pillow draws; plotting libraries are no dependency of ours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from lanting.train.journal import entries

WIDTH, HEIGHT = 560, 300  # pixels of a panel
LEFT, TOP, RIGHT, BOTTOM = 56, 34, 130, 30  # margins inside; names stand on the right
COLOURS = ("#1f5fbf", "#c8372d", "#2b8a3e", "#b8860b", "#7048a8", "#0b7285", "#d6336c", "#555555")
Points = list[tuple[float, float]]


@dataclass
class Panel:
    """One diagram: named curves over designs seen, in thousands."""

    title: str
    curves: dict[str, Points]
    low: float | None = None
    high: float | None = None


def curves(log: Sequence[dict[str, Any]], ending: str) -> dict[str, Points]:
    """One curve for each kind of batch, from keys such as "wide loss"."""
    found: dict[str, Points] = {}
    for entry in log:
        for key, value in entry.items():
            if key.endswith(" " + ending) and "left" in entry:
                found.setdefault(key.removesuffix(" " + ending), []).append((entry["seen"] / 1000, value))
    return found


def scores(log: Sequence[dict[str, Any]]) -> dict[str, Points]:
    """Shares of ink and, where an optical reader was asked, of lines that were right on the sheets."""
    found: dict[str, Points] = {}
    for entry in log:
        for key, value in entry.items():
            if key.startswith(("ink ", "lines ")):
                found.setdefault(key, []).append((entry["seen"] / 1000, value))
    return found


def speeds(log: Sequence[dict[str, Any]]) -> dict[str, Points]:
    return {"designs/s": [(e["seen"] / 1000, e["per_second"]) for e in log if "left" in e]}


def panels(logs: dict[str, list[dict[str, Any]]]) -> list[Panel]:
    """All diagrams; with several logs the curves carry their names."""

    def named(make: Any, *words: str) -> dict[str, Points]:
        many = len(logs) > 1
        return {
            f"{name}: {curve}" if many else curve: points
            for name, log in logs.items()
            for curve, points in make(log, *words).items()
        }

    return [
        Panel("loss", named(curves, "loss")),
        Panel("read: what stands on a token", named(curves, "read"), 0.0, 1.0),
        Panel("placed: where a character goes", named(curves, "placed"), 0.0, 1.0),
        Panel("samples: share that is right", named(scores), 0.0, 1.0),
        Panel("speed", named(speeds), 0.0),
    ]


def smooth(curve: Points, half: int = 4) -> Points:
    """The median of each point and its neighbours."""
    found = []
    for i, (x, _) in enumerate(curve):
        near = sorted(y for _, y in curve[max(0, i - half) : i + half + 1])
        found.append((x, near[len(near) // 2]))
    return found


def draw(panel: Panel) -> Image.Image:
    """One panel; says so where there is nothing to show."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    pen.text((LEFT, 8), panel.title, fill="black", font=ImageFont.load_default(14))
    points = [point for curve in panel.curves.values() for point in curve]
    if not points:
        pen.text((LEFT, HEIGHT // 2), "nothing in the log", fill="#777777", font=font)
        return image
    right = max(x for x, _ in points) or 1.0
    low = panel.low if panel.low is not None else min(y for _, y in points)
    high = panel.high if panel.high is not None else max(y for _, y in points)
    high = high if high > low else low + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / right
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (min(y, high) - low) / (high - low)

    for i in range(5):
        value, across = low + (high - low) * i / 4, right * i / 4
        pen.line([place(0, value), place(right, value)], fill="#e4e4e4")
        pen.text((LEFT - 6, place(0, value)[1]), f"{value:,.4g}", fill="#444444", font=font, anchor="rm")
        pen.text(
            (place(across, low)[0], HEIGHT - BOTTOM + 6), f"{across:,.4g}k", fill="#444444", font=font, anchor="ma"
        )
    chosen = [(name, curve) for name, curve in panel.curves.items() if curve]
    for number, (_, curve) in enumerate(chosen):
        colour = COLOURS[number % len(COLOURS)]
        dots = [place(x, y) for x, y in smooth(curve)]
        if len(dots) > 1:
            pen.line(dots, fill=colour, width=2)
        else:
            pen.ellipse([dots[0][0] - 2, dots[0][1] - 2, dots[0][0] + 2, dots[0][1] + 2], fill=colour)
    for number, (name, _) in enumerate(chosen):
        spot = (WIDTH - 4, TOP + 16 * number)
        pen.text(spot, name, fill=COLOURS[number % len(COLOURS)], font=font, anchor="ra")
    return image


def picture(logs: dict[str, list[dict[str, Any]]]) -> Image.Image:
    """All panels, two in a row."""
    drawn = [draw(panel) for panel in panels(logs)]
    whole = Image.new("RGB", (2 * WIDTH, -(-len(drawn) // 2) * HEIGHT), "white")
    for number, image in enumerate(drawn):
        whole.paste(image, (number % 2 * WIDTH, number // 2 * HEIGHT))
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, default=Path("training.png"))
    asked = parser.parse_args()
    logs = {f"{path.parent.name}": entries(path) for path in asked.logs}
    if not any(logs.values()):
        raise SystemExit(f"no entries in {', '.join(map(str, asked.logs))}")
    picture(logs).save(asked.output)
    print(asked.output)


if __name__ == "__main__":
    main()
