"""What a person sees while we work: a bar on a terminal, plain lines in a pipe, nothing at all with --quiet.

Progress goes to stderr and results to stdout, so `lanting generate ... | xargs open` works.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lanting.core.lang import say
from lanting.core.types import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

PHASES = {
    "load": "loading",
    "write": "writing",
    "encode": "reading",
    "denoise": "drawing",
    "decode": "developing",
    "read": "reading back",
}


@dataclass
class Screen:
    """One command's output. `begin`, `progress`..., `end` frame the work; `line` and `raw` print results."""

    quiet: bool = False
    json: bool = False
    _title: str = ""
    _since: float = field(default_factory=time.perf_counter)
    _bar: Bar | None = None
    _count: str = ""

    def line(self, sentence: str, **values: object) -> None:
        """A sentence for people, in their language."""
        if not (self.quiet or self.json):
            print("  " + say(sentence, **values), flush=True)

    def note(self, sentence: str, **values: object) -> None:
        """A remark beside the result: stderr, so a pipe stays clean."""
        if not (self.quiet or self.json):
            print("  " + say(sentence, **values), file=sys.stderr, flush=True)

    def aside(self, text: str) -> None:
        """A remark of less weight: dim on a terminal."""
        if not (self.quiet or self.json):
            dim = sys.stderr.isatty() and os.name != "nt" and os.environ.get("TERM") != "dumb"
            print(f"  \x1b[2m{text}\x1b[0m" if dim and "NO_COLOR" not in os.environ else f"  {text}", file=sys.stderr)

    def table(self, rows: Sequence[Sequence[str]], gap: str = "  ") -> None:
        """Columns side by side."""
        from rich.cells import cell_len  # a Chinese letter is two columns wide

        widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
            self.line("{row}", row=gap.join(padded).rstrip())

    def raw(self, text: str) -> None:
        """For programs: printed whatever the flags."""
        print(text, flush=True)

    def begin(self, title: str) -> None:
        self._title, self._since = title, time.perf_counter()
        if self.quiet or self.json or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("  {task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[now]}"))
        self._bar = Progress(*columns, console=Console(stderr=True), transient=False)
        self._bar.add_task(title, total=1, now="")
        self._bar.start()

    def progress(self, event: Progress) -> None:
        if self._bar is None:
            return
        now = say(PHASES.get(event.phase, event.phase))
        if event.phase == "denoise":
            self._count = f"{event.step}/{event.steps}  "
            now = f"{self._count}{event.seconds:.1f} s"
            if 0 < event.step < event.steps and event.seconds > 2:
                left = event.seconds / event.step * (event.steps - event.step)
                now += "  " + say("{seconds:.0f} s left", seconds=left)
            self._bar.update(self._bar.task_ids[0], total=event.steps, completed=event.step)
        self._bar.update(self._bar.task_ids[0], now=now)

    def end(self, done: bool = True) -> None:
        """The work is over; `done` or given up."""
        spent = time.perf_counter() - self._since
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], now=f"{self._count}{spent:.1f} s")
            self._bar.stop()
            self._bar = None
        elif done and not (self.quiet or self.json):
            print(f"  {self._title} · {spent:.1f} s", file=sys.stderr, flush=True)
