"""Limits and rows in words, for the table. Sentences go through `say`, so Chinese has them too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lanting.core.lang import say

if TYPE_CHECKING:
    from lanting.bench.judge import Loss, Row
    from lanting.bench.limits import Limits
    from lanting.bench.run import Doing

SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def group(name: str) -> str:
    """What a case is of."""
    words = {"layer": say("layer"), "vae": "VAE", "step": say("step"), "picture": say("picture")}
    return words[name]


def title(row: Row) -> str:
    """ "layer, 256 + 128 tokens", "VAE 512×512", "step nano 224×96"."""
    if row.group == "layer":
        return say("layer, {tokens} tokens", tokens=row.name)
    return f"{group(row.group)} {row.name}"


def doing(event: Doing) -> str:
    """What is being measured."""
    case = event.case
    if case is None:
        return say("limits")
    return " ".join(filter(None, (group(case.group), case.name, case.form)))


def seconds(value: float) -> str:
    """ "8.2 s", "0.24 s", "45 ms"."""
    if value < 0.1:
        return f"{1000 * value:.1f} ms" if value < 0.01 else f"{1000 * value:.0f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def rate(value: float, kind: str = "") -> str:
    """Operations a second, "118 GFLOP/s"; of integers "472 GOP/s"."""
    return f"{value / 1e9:.0f} {'GOP/s' if kind.startswith('int') else 'GFLOP/s'}"


def moved(value: float) -> str:
    return f"{value / 1e9:.1f} GB/s"


def bound(name: str) -> str:
    """What sets a limit: "memory", "compute int8"."""
    return say("memory") if name == "memory" else say("compute {type}", type=SHORT.get(name, name))


def held(row: Row) -> str:
    """What held a case back."""
    if row.near:
        return bound(row.bound)
    return "; ".join(lost(loss, loss.seconds / row.seconds) for loss in row.worst())


def lost(loss: Loss, share: float) -> str:
    """One part: how far it is from its own limit, and how much of the time it takes."""
    named = {"percent": f"{100 * loss.limit / loss.seconds:.0f}", "share": f"{100 * share:.0f}"}
    if loss.part == "small":
        return say("small work: overhead of {calls} calls, {share} % of the time", calls=f"{loss.calls:,}", **named)
    if loss.part == "between" or not loss.type:
        return say("what lies between products: {share} % of the time", **named)
    words = {
        "linears": say("linears in {type}", type=kind(loss)),
        "attention": say("attention in {type}", type=kind(loss)),
        "convolutions": say("convolutions in {type}", type=kind(loss)),
    }
    return say("{part} at {percent} % of the limit, {share} % of the time", part=words[loss.part], **named)


def kind(loss: Loss) -> str:
    return SHORT.get(loss.type, loss.type)


def limit_rows(one: Limits, every: Limits) -> list[list[str]]:
    """The table of limits: a head, a row for each type of number, two for the memory."""
    columns = [one] if every.threads == 1 else [one, every]
    counts = [say("1 thread"), *(say("{count} threads", count=limits.threads) for limits in columns[1:])]
    rows = [["", *counts, say("by"), say("torch's best product")]]
    for name, best in every.best.items():
        product = rate(every.product[name]) if name in every.product else ""
        rates = (rate(limits.operations(name), name) for limits in columns)
        rows.append([SHORT.get(name, name), *rates, best.source, product])
    rows.append([say("memory, read"), *(moved(limits.read) for limits in columns), "", ""])
    rows.append([say("memory, copied"), *(moved(limits.copy) for limits in columns), "", ""])
    return rows


def case_rows(rows: tuple[Row, ...]) -> list[list[str]]:
    """The table of cases, under its head."""
    head = ["", say("weights"), say("by"), say("time"), say("rate"), say("limit"), say("% of it"), say("held back by")]
    return [head, *map(case_row, rows)]


def case_row(row: Row) -> list[str]:
    measured = [seconds(row.seconds), rate(row.rate), seconds(row.limit), f"{row.percent:.0f}"]
    return [title(row), row.form, row.by, *measured, held(row)]
