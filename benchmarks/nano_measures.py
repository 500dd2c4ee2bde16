"""Every measure nano was built for against its bar, in one table: `lanting eval` with the sets and numbers of each.

    python benchmarks/nano_measures.py [--model nano] [-n 200] [--only chinese] [--no-ceiling] [--out runs/bars]

Texts, phrasings and seeds are those that training never draws. PP-OCR decides; shares come with 95 % intervals. The
full run draws and reads some 2,000 pictures: one to two hours on two cores. Each finished row is written at once.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lanting import Engine
from lanting.evals.draw import How, Tell
from lanting.evals.edit import judge_edit
from lanting.evals.follow import judge_follow
from lanting.evals.ocr import Judge, judges
from lanting.evals.report import save
from lanting.evals.scores import Share
from lanting.evals.sets import edit_cases, follow_cases, open_cases, text_cases
from lanting.evals.text import MODEL, RULE, VAE, TextReport, judge_text
from lanting.train.edits import KINDS

Figures = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What all rows share."""

    engine: Engine
    how: How
    count: int
    ceiling: bool
    judge: Judge


@dataclass(frozen=True)
class Row:
    """One line of the table: how it is measured, and the share it should reach."""

    name: str
    bar: float
    measure: Callable[[Run], Figures]


def figures(share: Share, **others: Any) -> Figures:
    found = {"value": round(share.value, 4), "interval": [round(share.low, 4), round(share.high, 4)], "n": share.total}
    return found | {name: value for name, value in others.items() if value is not None}


def lines(name: str) -> Callable[[Run], Figures]:
    """Share of the English lines of a set that are read exactly."""

    def measure(run: Run) -> Figures:
        report = read(run, name, "en")
        own = report.scores[MODEL]["pp"].lines
        ceilings = {who: report.scores[who]["pp"].lines.value for who in (RULE, VAE) if who in report.scores}
        return figures(own, **{f"ceiling_{who}": round(value, 4) for who, value in ceilings.items()})

    return measure


def characters(name: str) -> Callable[[Run], Figures]:
    """Characters of a Chinese set over those that the reader knows from pictures drawn by rule."""

    def measure(run: Run) -> Figures:
        report = read(run, name, "zh", ceiling=True)
        reader = "pp, known boxes" if "pp, known boxes" in report.readings else "pp"
        found = figures(report.scores[MODEL][reader].characters, reader=reader)
        share = report.of_ceiling(reader)
        return found | {"share": found["value"], "value": None if share is None else round(share, 4)}

    return measure


def read(run: Run, name: str, language: str, ceiling: bool = False) -> TextReport:
    cases = text_cases(name, language, run.count)
    return judge_text(run.engine, cases, run.how, [run.judge], Tell(), ceiling or run.ceiling)


def follows(run: Run) -> Figures:
    report = judge_follow(run.engine, follow_cases(run.count), run.how, Tell(), open_cases(12), 4)
    shares = {name: figures(share) for name, share in report.shares().items()}
    flip = sum(report.spread) / len(report.spread) if report.spread else None
    return figures(report.shares()["colours"], traits=shares, mean_flip_of_seeds=flip)


def pictograms(run: Run) -> Figures:
    report = judge_follow(run.engine, follow_cases(2 * run.count), run.how, Tell())
    return figures(report.shares()["pictogram"], concepts=256)


def edits(run: Run) -> Figures:
    report = judge_edit(run.engine, edit_cases(KINDS, run.count), run.how, run.judge, Tell(), run.ceiling)
    row = report.row(None)
    return figures(row["done"], kept_median_db=row["kept_median"], kept_ceiling_db=row["kept_ceiling"])


ROWS = (
    Row("English words, one line", 0.96, lines("words")),
    Row("English random strings", 0.88, lines("random")),
    Row("English, two to four lines", 0.85, lines("posters")),
    Row("English, proportional faces", 0.60, lines("faces")),
    Row("Chinese phrases, of the ceiling", 0.90, characters("words")),
    Row("Chinese at random, of the ceiling", 0.90, characters("random")),
    Row("asked colours", 0.98, follows),
    Row("pictograms", 0.90, pictograms),
    Row("edits done", 0.70, edits),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("-n", "--number", type=int, default=200)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--no-ceiling", action="store_true", help="don't read what rule and autoencoder reach")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bars"))
    given = parser.parse_args()
    found, missing = judges(["pp"], "en")
    if missing:
        parser.error("the reader is missing: pip install 'lanting[eval]'")
    engine = Engine.open(given.model, device=given.device)
    run = Run(engine, How(given.steps, given.guidance, seed=1000), given.number, not given.no_ceiling, found[0])
    given.out.mkdir(parents=True, exist_ok=True)
    about = {"model": given.model, "torch": torch.__version__, "python": platform.python_version()}
    about |= {"steps": given.steps or engine.spec.defaults.steps, "machine": platform.machine()}
    table: dict[str, Figures] = {}
    for row in ROWS:
        if given.only.lower() in row.name.lower():
            table[row.name] = {"bar": row.bar} | row.measure(run)
            print(row.name, table[row.name], flush=True)
            save(given.out, about | {"rows": table}, [])


if __name__ == "__main__":
    main()
