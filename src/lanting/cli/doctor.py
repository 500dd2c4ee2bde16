"""`lanting doctor`: this machine looked over, a line for all that was found, and what to type where it matters."""

from __future__ import annotations

import json as json_

from lanting.cli import options as o
from lanting.cli.screen import Screen
from lanting.core.lang import say
from lanting.doctor.examine import examine
from lanting.doctor.finding import NOTE, OK, PROBLEM, Finding


def doctor(json: o.Json = False, debug: o.Debug = False) -> int:
    """Look over this machine and say what to change, with the commands to type.

    Python, torch and its build, GPU and driver, kernels, memory, disk, models, extras, environment, defaults. Nothing
    is changed. Exit code 1 where there is a problem.
    """
    screen, found = Screen(json=json), list[Finding]()
    for finding in examine():
        found.append(finding)
        show(screen, finding)
    problems, notes = (sum(each.state == state for each in found) for state in (PROBLEM, NOTE))
    if json:
        told = {"findings": [each.to_dict() for each in found], "problems": problems, "notes": notes}
        screen.raw(json_.dumps(told, ensure_ascii=False))
    elif problems:
        screen.line("problems: {problems}; notes: {notes}", problems=problems, notes=notes)
    else:
        screen.line("no problems; notes: {notes}", notes=notes)
    return 1 if problems else 0


def show(screen: Screen, finding: Finding) -> None:
    """A mark and what was found; below it what to do."""
    from rich.cells import cell_len  # a Chinese letter is two columns wide

    marks = {OK: say("ok"), NOTE: say("note"), PROBLEM: say("problem")}
    width = max(map(cell_len, marks.values()))
    mark = marks[finding.state]
    screen.line("{row}", row=mark + " " * (width - cell_len(mark) + 2) + finding.told())
    if finding.advice is not None:
        screen.line("{row}", row=" " * (width + 2) + "→ " + finding.advice.told())
