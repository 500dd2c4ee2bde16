"""How many pictograms does nano draw right at least nine times of ten? Chosen on some pictures, measured on others.

    python benchmarks/pictograms.py [--model nano] [--choose 3] [--measure 10] --out benchmarks/results/FILE.json

Every pictogram is asked for alone, not two or three of it, on held-out designs as `lanting eval follow` draws them:
with text or without, in both languages, on both usual canvases. One is right when it is nearest to itself among all
1,087. Round A draws all of them; one that was wrong once is out and not drawn again. Round B draws those that are left
with other prompts and seeds, so a lucky choice is not counted twice, and only round B is reported. One core, 40
minutes; what is finished is in FILE.json, and the same command goes on from there. There, a string of 1 (right) and 0
stands for each pictogram, in the order drawn: those of round A, then those of round B.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lanting import Engine
from lanting.core.files import replace_file
from lanting.engine.choose import say_dtypes
from lanting.evals.draw import How, Tell
from lanting.evals.follow import judge_follow
from lanting.evals.scores import share_of
from lanting.evals.sets import LANGUAGES, Case, usual_sizes
from lanting.plan.machine import cpu_title
from lanting.train.assets import concepts
from lanting.train.design import Design
from lanting.train.designs import DesignMaker, Mix

PART = 64  # pictures between two saves
SEEDS = 100_000  # of one draw; the next draw's begin behind them


class OneConcept(DesignMaker):
    """Held-out designs that show one pictogram, and it once."""

    def __init__(self, concept: int):
        self.concept = concept
        super().__init__(0, held_out=True, mix=Mix(pictogram=1.0, concepts=len(concepts()), random_text=0.0))

    def design(self, rng: random.Random, size: tuple[int, int], kind: str) -> Design:
        return replace(super().design(rng, size, kind), concept=self.concept, count=1)


def cases(concept: int, count: int) -> list[Case]:
    """`count` prompts for a pictogram, no two alike; languages and canvases take turns. Only pictograms are judged."""
    maker, rng, found = OneConcept(concept), random.Random(f"pictogram {concept}"), dict[str, Case]()
    while len(found) < count:
        number = len(found) + concept
        tongue, size = LANGUAGES[number % 2], usual_sizes()[number // 2 % 2]
        made = maker.sample(rng, size, rng.choice(("pictogram", tongue)))
        if made.language == tongue and made.design.concept == concept:
            found.setdefault(made.prompt, Case(made.prompt, made.design, made.language))
    return list(found.values())


def draw(engine: Engine, asked: Sequence[tuple[int, Case]], number: int, report: dict[str, Any], out: Path) -> None:
    """The picture `number` of some concepts: a 1 or a 0 behind their earlier ones. Each part is saved."""
    seen: dict[str, str] = report["pictures"]
    for at in range(0, len(asked), PART):
        part = [(concepts()[c].name_en, case) for c, case in asked[at : at + PART]]
        if all(len(seen[name]) > number for name, _ in part):
            continue
        how = How(seed=SEEDS * (number + 1) + at)
        traits = judge_follow(engine, [case for _, case in part], how, Tell()).traits
        for (name, _), found in zip(part, traits, strict=True):
            seen[name] = seen[name][:number] + str(int(found["pictogram"]))
        save(out, report)
    print(f"draw {number}: {len(asked)} pictures, {time.process_time():.0f} s", flush=True)


def save(out: Path, report: dict[str, Any]) -> None:
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    replace_file(out, lambda part: part.write_text(text, encoding="utf-8"))


def figures(marks: Sequence[str]) -> dict[str, float]:
    return share_of([float(mark) for mark in "".join(marks)]).as_json()


def summary(seen: dict[str, str], choose: int, measure: int) -> dict[str, Any]:
    """What round B says of those that round A chose, and by name which were right nine times of ten."""
    chosen = {name: marks[choose:] for name, marks in seen.items() if marks[:choose] == "1" * choose}
    hits = {name: marks.count("1") for name, marks in chosen.items()}
    sure = [name for name in hits if 10 * hits[name] >= 9 * measure]
    return {
        "first pictures": figures([marks[0] for marks in seen.values()]),
        "chosen": {"concepts": len(chosen), "right of": choose},
        "measured": {"pictures each": measure, "right": figures(list(chosen.values()))},
        "by hits": {str(n): list(hits.values()).count(n) for n in range(measure + 1)},
        "nine of ten": {"concepts": len(sure), "bar": 100, "names": sure},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument(
        "--concepts", type=int, default=len(concepts()), help="only the first so many, for a quick look"
    )
    parser.add_argument("--choose", type=int, default=3, help="draws of round A")
    parser.add_argument("--measure", type=int, default=10, help="draws of round B")
    parser.add_argument("--machine", help="what to call this machine in the report")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine.open(given.model, device="cpu")
    report: dict[str, Any] = {"pictures": {one.name_en: "" for one in concepts()[: given.concepts]}}
    if given.out.exists():
        report = json.loads(given.out.read_text(encoding="utf-8"))
    seen = report["pictures"]
    asked = {c: cases(c, given.choose + given.measure) for c in range(len(seen))}
    for number in range(given.choose + given.measure):
        before = min(number, given.choose)
        left = [c for c in asked if seen[concepts()[c].name_en][:before] == "1" * before]
        draw(engine, [(c, asked[c][number]) for c in left], number, report, given.out)
    about = {"model": given.model, "machine": given.machine or cpu_title(), "torch": torch.__version__}
    about |= {"dtype": say_dtypes(engine.models.dtypes)} | {
        "steps": engine.spec.defaults.steps,
        "guidance": engine.spec.defaults.guidance_scale,
    }
    found = summary(seen, given.choose, given.measure)
    print(json.dumps(about | found, ensure_ascii=False, indent=1))
    save(given.out, about | found | {"pictures": seen})


if __name__ == "__main__":
    main()
