"""What a person sees of an evaluation: its progress, and its figures as a table."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lanting.cli.screen import Screen
from lanting.core.lang import say
from lanting.core.types import Progress

if TYPE_CHECKING:
    from lanting.evals.draw import Tell
    from lanting.evals.edit import EditReport
    from lanting.evals.follow import FollowReport
    from lanting.evals.scores import Share
    from lanting.evals.text import TextReport


def stages(screen: Screen) -> Tell:
    """The work's stages on the screen: a bar with the seconds left, or one line each in a pipe."""
    from lanting.evals.draw import Tell

    state = {"total": 0, "since": 0.0}

    def begin(name: str, total: int) -> None:
        state.update(total=total, since=time.perf_counter())
        screen.begin(f"{stage_name(name)} · {total}")

    def at(done: float) -> None:
        screen.progress(Progress("denoise", int(done), int(state["total"]), time.perf_counter() - state["since"]))

    return Tell(begin, at, screen.end)


def stage_name(name: str) -> str:
    return {
        "draw": say("drawing pictures"),
        "read": say("reading them"),
        "rule": say("reading pictures drawn by rule"),
        "autoencoder": say("reading them behind the autoencoder"),
        "measure": say("measuring them"),
        "compare": say("comparing seeds"),
    }[name]


def text_table(screen: Screen, report: TextReport) -> None:
    head = ["", say("exact lines, %"), say("clean pictures"), say("words"), say("characters"), say("NED")]
    drawers = {"model": "", "rule": say(", by rule"), "autoencoder": say(", autoencoder")}
    rows = [
        [
            f"{name}{drawers[who]}",
            percent(one.lines),
            f"{100 * one.clean.value:.1f}",
            f"{100 * one.words.value:.1f}",
            percent(one.characters),
            f"{one.ned.value:.3f}",
        ]
        for who, by in report.scores.items()
        for name, one in by.items()
    ]
    screen.table([head, *rows], gap="   ")
    for name, groups in report.parts().items():
        if len(groups) > 1:
            parts = ", ".join(f"{group} {100 * share.value:.1f} %" for group, share in groups.items())
            heading = {"size": say("by size"), "lines": say("by lines"), "face": say("by face")}[name]
            screen.line("{heading}: {parts}", heading=heading, parts=parts)
    for name in report.readings:
        if (share := report.of_ceiling(name)) is not None:
            screen.line("{reader}: {share:.1f} % of its own ceiling, by characters", reader=name, share=100 * share)


def follow_table(screen: Screen, report: FollowReport) -> None:
    names = {
        "ground": say("colour of the ground"),
        "letters": say("colour of the letters"),
        "pictogram": say("pictogram, of all there are"),
        "count": say("number of pictograms"),
        "side": say("side of the pictogram"),
        "place": say("height of the text"),
        "align": say("alignment of the text"),
        "colours": say("colours together"),
    }
    rows = [[names[name], percent(share), str(share.total)] for name, share in report.shares().items()]
    screen.table([["", say("as asked, %"), say("pictures")], *rows], gap="   ")
    if report.spread:
        mean = sum(report.spread) / len(report.spread)
        screen.line("seeds of one prompt differ by {flip:.3f} (mean FLIP)", flip=mean)


def edit_table(screen: Screen, report: EditReport) -> None:
    head = ["", say("done, %"), say("pictures"), say("rest kept: median"), say("mean"), say("ceiling")]
    rows = [
        [
            kind or say("all"),
            percent(row["done"]) if row["done"] else "—",
            str(row["pictures"]),
            *(decibel(row[name]) for name in ("kept_median", "kept_mean", "kept_ceiling")),
        ]
        for kind in [*report.kinds(), None]
        for row in [report.row(kind)]
    ]
    screen.table([head, *rows], gap="   ")


def percent(share: Share) -> str:
    return f"{100 * share.value:.1f} ({100 * share.low:.1f}–{100 * share.high:.1f})"


def decibel(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f} dB"
