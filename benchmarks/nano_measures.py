"""Every measure nano was built for against its bars, in one table: `lanting eval` with the sets and numbers of each.

    python benchmarks/nano_measures.py [--model nano] [--processes 2] [--only chinese] [--out benchmarks/results/nano]

Texts, phrasings and seeds are those that training never draws. PP-OCR decides; shares come with 95 % intervals, each
from at least 200 lines, characters, colours, pictograms or edits. The two bars are what was asked of a run on a CPU
alone and of one that used a GPU. The rows are shared out over `--processes`; all of them take about 40 minutes of one
core. Finished rows are kept, and not measured again with `--resume`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
FEW, MANY = 4, 20  # steps with the few-step LoRA, and without


@dataclass(frozen=True)
class Run:
    """What all rows share."""

    model: str
    engine: Any
    how: How
    judge: Judge
    concepts: int


@dataclass(frozen=True)
class Row:
    """One line of the table: its pictures, what it should reach (by a CPU alone, with a GPU), how it is measured."""

    name: str
    pictures: int
    bars: tuple[float, float]
    measure: Callable[[Run, int], Figures]


def figures(share: Share, **others: Any) -> Figures:
    found = {"value": round(share.value, 4), "interval": [round(share.low, 4), round(share.high, 4)], "n": share.total}
    return found | {name: value for name, value in others.items() if value is not None}


def lines(name: str, ceiling: bool = False) -> Callable[[Run, int], Figures]:
    """Share of the English lines of a set that are read exactly."""

    def measure(run: Run, count: int) -> Figures:
        report = read(run, name, "en", count, ceiling)
        ceilings = {who: report.scores[who]["pp"].lines.value for who in (RULE, VAE) if who in report.scores}
        faces = {face: figures(share) for face, share in report.parts()["face"].items()}
        return figures(
            report.scores[MODEL]["pp"].lines,
            characters=round(report.scores[MODEL]["pp"].characters.value, 4),
            faces=faces if len(faces) > 2 else None,
            **{f"ceiling_{who}": round(value, 4) for who, value in ceilings.items()},
        )

    return measure


def characters(name: str) -> Callable[[Run, int], Figures]:
    """Characters of a Chinese set over those that the reader knows from pictures drawn by rule."""

    def measure(run: Run, count: int) -> Figures:
        report = read(run, name, "zh", count, True)
        reader = "pp, known boxes"
        found = figures(report.scores[MODEL][reader].characters, reader=reader)
        share = report.of_ceiling(reader)
        return found | {"share": found["value"], "value": None if share is None else round(share, 4)}

    return measure


def read(run: Run, name: str, language: str, count: int, ceiling: bool) -> TextReport:
    return judge_text(run.engine, text_cases(name, language, count), run.how, [run.judge], Tell(), ceiling)


def colours(run: Run, count: int) -> Figures:
    report = judge_follow(run.engine, follow_cases(count, concepts=run.concepts), run.how, Tell())
    shares = {name: figures(share) for name, share in report.shares().items()}
    return figures(report.shares()["colours"], traits=shares)


def pictograms(run: Run, count: int) -> Figures:
    """Named pictograms that are nearest to themselves among all 1,087; of the commonest `concepts` of them."""
    report = judge_follow(run.engine, follow_cases(count, seed=1, concepts=run.concepts), run.how, Tell())
    return figures(report.shares()["pictogram"], concepts=run.concepts)


def edits(run: Run, count: int) -> Figures:
    cases = edit_cases(KINDS, count, concepts=run.concepts)
    report = judge_edit(run.engine, cases, run.how, run.judge, Tell(), False)
    drawn = judge_edit(run.engine, cases, replace(run.how, keep=False), run.judge, Tell(), False)
    row, alone = report.row(None), drawn.row(None)
    kinds = {kind: figures(report.row(kind)["done"]) for kind in KINDS}
    return figures(
        row["done"],
        kept_median_db=row["kept_median"],
        kinds=kinds,
        drawn_alone={"value": alone["done"].value, "kept_median_db": alone["kept_median"]},
    )


def seeds(run: Run, count: int) -> Figures:
    """Mean FLIP between four seeds of a sentence that leaves the ground open: larger is better."""
    report = judge_follow(run.engine, [], run.how, Tell(), open_cases(count), 4)
    return {"value": round(sum(report.spread) / len(report.spread), 4), "n": 4 * count}


def lightning(run: Run, count: int) -> Figures:
    """How many points of the lines read in 20 steps are lost in 4 with the few-step LoRA: smaller is better."""
    cases, shares = text_cases("words", "en", count, seed=2), {}
    fast = Engine.open(run.model, device="cpu", loras=("lightning",))
    for steps, engine in ((MANY, run.engine), (FEW, fast)):
        report = judge_text(engine, cases, How(steps, 1.0, seed=run.how.seed), [run.judge], Tell(), False)
        shares[steps] = report.scores[MODEL]["pp"].lines
    lost = 100 * (shares[MANY].value - shares[FEW].value)
    return {"value": round(lost, 2), "n": count, **{f"steps_{s}": figures(share) for s, share in shares.items()}}


ROWS = (  # the slow ones first
    Row("edits: asked change done", 210, (0.70, 0.90), edits),
    Row("Chinese at random, of the ceiling", 100, (0.90, 0.97), characters("random")),
    Row("lightning: points lost", 200, (5.0, 2.0), lightning),
    Row("Chinese phrases, of the ceiling", 100, (0.90, 0.97), characters("words")),
    Row("English words, one line", 200, (0.96, 0.98), lines("words")),
    Row("English random strings", 200, (0.88, 0.95), lines("random")),
    Row("English, two to four lines", 75, (0.85, 0.95), lines("posters")),
    Row("English, proportional faces", 135, (0.60, 0.93), lines("faces")),
    Row("pictograms", 420, (0.90, 0.90), pictograms),
    Row("asked colours", 160, (0.98, 0.99), colours),
    Row("seeds differ, mean FLIP", 12, (0.05, 0.08), seeds),
)


def work(given: argparse.Namespace, rows: Sequence[str]) -> None:
    """Measure some rows in this process; each is written when it is finished."""
    torch.set_num_threads(1)
    engine = Engine.open(given.model, device=given.device)
    how = How(given.steps, given.guidance, seed=1000)
    run = Run(given.model, engine, how, judges(["pp"], "en")[0][0], given.concepts)
    about = {"model": given.model, "torch": torch.__version__, "python": platform.python_version()}
    about |= {"steps": given.steps or engine.spec.defaults.steps, "machine": platform.machine()}
    for row in (row for row in ROWS if row.name in rows):
        found = {"bars": list(row.bars)} | row.measure(run, max(4, round(row.pictures * given.share)))
        print(row.name, found, flush=True)
        slug = "".join(c if c.isalnum() else "-" for c in row.name.lower())
        save(given.out / "rows" / slug, about | {row.name: found}, [])


def finished(out: Path) -> dict[str, Any]:
    """The rows that were measured, in the order of the table."""
    found: dict[str, Any] = {}
    for path in sorted(out.glob("rows/*/results.json")):
        found |= json.loads(path.read_text(encoding="utf-8"))
    return found


def as_table(found: dict[str, Any]) -> str:
    """The finished rows in Markdown, as the card has them."""
    head = ["| measure | n | reached | bar, CPU alone | bar, with a GPU |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(_line(row, found[row.name]) for row in ROWS if row.name in found)])


def _line(row: Row, one: dict[str, Any]) -> str:
    value, (low, high) = one["value"], one.get("interval", (None, None))
    if low is not None:
        ends = (
            f" [{100 * low:.1f}, {100 * high:.1f}]" if "share" not in one else f" (of all: {100 * one['share']:.1f} %)"
        )
        reached, bars = f"{100 * value:.1f} %{ends}", [f"{100 * bar:.0f} %" for bar in row.bars]
    else:
        reached, bars = f"{value:.3g}", [f"{bar:g}" for bar in row.bars]
    kept = f"; the rest kept at {one['kept_median_db']:.1f} dB" if "kept_median_db" in one else ""
    return f"| {row.name} | {one['n']} | {reached}{kept} | {bars[0]} | {bars[1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--share", type=float, default=1.0, help="of the pictures, for a quick look")
    parser.add_argument("--concepts", type=int, default=1087, help="pictograms asked for, the commonest first")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--skip", default="-", help="rows whose name contains this are left out")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are finished")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/bars"))
    given = parser.parse_args()
    if judges(["pp"], "en")[1]:
        parser.error("the reader is missing: pip install 'lanting[eval]'")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "rows").mkdir(exist_ok=True)
    done = finished(given.out) if given.resume else {}
    named = [(row.name, row.name.lower()) for row in ROWS if row.name not in done]
    names = [name for name, low in named if given.only.lower() in low and given.skip.lower() not in low]
    context = multiprocessing.get_context("spawn")
    shares = [names[number :: given.processes] for number in range(given.processes)]
    working = [context.Process(target=work, args=(given, share)) for share in shares if share]
    for process in working:
        process.start()
    for process in working:
        process.join()
    save(given.out, finished(given.out), [])
    print(as_table(finished(given.out)))


if __name__ == "__main__":
    main()
