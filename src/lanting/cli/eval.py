"""`lanting eval text | follow | edit`: how well a model does what it is asked, measured.

Everything that can be refused is refused before the first picture. Pictures are kept as soon as they are drawn, so a
run that is cancelled goes on where it was; results are written at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from lanting.cli import draw as drawing
from lanting.cli import options as o
from lanting.cli.eval_run import Setup, about, finish, kept_for, working
from lanting.cli.eval_tables import decibel, edit_table, follow_table, stages, text_table
from lanting.cli.screen import Screen
from lanting.core.errors import RequestError
from lanting.core.types import Request
from lanting.specs import parse_size, settle
from lanting.specs.numbers import whole
from lanting.specs.settle import LARGEST_SEED

if TYPE_CHECKING:
    from lanting.engine import Engine
    from lanting.evals.draw import How
    from lanting.evals.ocr import Judge

eval_ = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure models.")


class TextSet(StrEnum):
    words = "words"
    random = "random"
    phrases = "phrases"
    posters = "posters"
    faces = "faces"
    edits = "edits"


class Language(StrEnum):
    en = "en"
    zh = "zh"


class Reader(StrEnum):
    pp = "pp"
    tesseract = "tesseract"


Number = Annotated[int, typer.Option("--number", "-n", min=1, max=10_000, help="Pictures to draw and judge.")]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", "--guidance-scale", help="How strictly the prompt is followed; default: the model's."),
]
FirstSeed = Annotated[int, typer.Option("--seed", help="Of the set and of the first picture; the next add 1.")]
Folder = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", help="A folder; a cancelled run goes on there. Default: a new one, named after the run."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Begin anew, over what is in that folder.")]
Ocr = Annotated[str, typer.Option("--ocr", help="Readers, the first decides on hits: pp, tesseract.")]
Concepts = Annotated[int, typer.Option("--concepts", min=1, help="Pictograms in use, the commonest first.")]
NoCeiling = Annotated[bool, typer.Option("--no-ceiling", help="Don't measure what rule and autoencoder reach.")]


@eval_.callback()
def _verbs() -> None:
    """Measure models."""


@eval_.command("text")
def text(
    model: o.Model = "nano",
    language: Annotated[Language, typer.Option("--lang", help="The language of the texts.")] = Language.en,
    chosen: Annotated[TextSet, typer.Option("--set", help="What is written.")] = TextSet.words,
    number: Number = 200,
    seed: FirstSeed = 0,
    steps: o.Steps = None,
    guidance: Guidance = None,
    size: o.Size = None,
    ocr: Ocr = "pp,tesseract",
    characters: Annotated[
        int, typer.Option("--characters", min=1, max=3500, help="Chinese characters in use, the commonest first.")
    ] = 3500,
    no_ceiling: NoCeiling = False,
    lora: o.Lora = None,
    device: o.Device = None,
    dtype: o.DtypeFlag = None,
    output: Folder = None,
    force: Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Can a model write? Held-out texts are drawn and read back by two independent optical readers.

    Cost: -n pictures, then one second of one core to read each (two seconds for large ones); with nano twice as
    much reading again for its ceilings. 200 pictures of nano take some ten minutes; of a full-size model at 30
    seconds a picture, 100 minutes.
    """
    setup = Setup(model, number, seed, steps, guidance, size, tuple(lora or ()), device, dtype, output, force)
    screen = Screen(quiet, json)
    with opened(setup, screen, "edit" if chosen == TextSet.edits else "text_to_image") as (engine, how):
        from lanting.evals import sets
        from lanting.evals.text import judge_text

        asked = {"set": chosen.value, "language": language.value, "characters": characters, "readers": ocr}
        own = asked | {"no-ceiling": no_ceiling}
        kept = kept_for(setup, engine, "text", own, f"-{chosen.value}-{language.value}")
        judges = readers(ocr, language.value, screen)
        cases = sets.text_cases(chosen.value, language.value, number, seed, characters, canvases(setup, engine))
        with working(screen, kept, number, len(judges)):
            report = judge_text(engine, cases, how, judges, stages(screen), not no_ceiling, kept)
    text_table(screen, report)
    tiles = [
        (one.image, hit, " / ".join(case.lines), " / ".join(read[report.first]))
        for one, hit, case, read in zip(report.drawn, report.hits, report.cases, report.read, strict=True)
    ]
    finish(screen, kept, about("text", setup, report.drawn) | asked | report.as_json(), tiles)


@eval_.command("follow")
def follow(
    model: o.Model = "nano",
    language: Annotated[Language | None, typer.Option("--lang", help="Of the prompts. Default: both in turn.")] = None,
    number: Number = 200,
    seed: FirstSeed = 0,
    steps: o.Steps = None,
    guidance: Guidance = None,
    size: o.Size = None,
    concepts: Concepts = 256,
    prompts: Annotated[int, typer.Option("--open", min=0, help="Open prompts whose seeds are compared.")] = 8,
    seeds: Annotated[int, typer.Option("--seeds", min=2, max=64, help="Seeds of each open prompt.")] = 4,
    lora: o.Lora = None,
    device: o.Device = None,
    dtype: o.DtypeFlag = None,
    output: Folder = None,
    force: Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Does a model follow the prompt? Colours, pictograms, number and place are measured on the pictures.

    Pictograms are judged for nano alone, which draws by known rules; of other models colours and the place of the
    text. Seeds of open prompts are compared with FLIP. Cost: -n pictures and --open times --seeds more; measuring
    takes a quarter of a second each. 200 of nano take some three minutes.
    """
    setup = Setup(model, number, seed, steps, guidance, size, tuple(lora or ()), device, dtype, output, force)
    screen = Screen(quiet, json)
    with opened(setup, screen, "text_to_image") as (engine, how):
        from lanting.evals import sets
        from lanting.evals.follow import judge_follow

        tongue = language.value if language else None
        asked = {"language": tongue or "both", "concepts": concepts, "open_prompts": prompts, "seeds": seeds}
        kept = kept_for(setup, engine, "follow", asked)
        readers(Reader.pp, "en", screen)
        cases = sets.follow_cases(number, seed, concepts, tongue, canvases(setup, engine))
        with working(screen, kept, number + prompts * seeds, 1):
            report = judge_follow(engine, cases, how, stages(screen), sets.open_cases(prompts, seed), seeds, kept)
    follow_table(screen, report)
    tiles = [
        (one.image, hit, case.prompt, ", ".join(name for name, right in found.items() if not right))
        for one, hit, case, found in zip(report.drawn, report.hits, report.cases, report.traits, strict=True)
    ]
    finish(screen, kept, about("follow", setup, report.drawn) | asked | report.as_json(), tiles)


@eval_.command("edit")
def edit(
    model: o.Model = "nano",
    kinds: Annotated[str, typer.Option("--kinds", help="Kinds of edits with commas between. Default: all.")] = "",
    number: Number = 200,
    seed: FirstSeed = 0,
    steps: o.Steps = None,
    guidance: Guidance = None,
    size: o.Size = None,
    concepts: Concepts = 256,
    keep: o.Keep = None,
    no_ceiling: NoCeiling = False,
    lora: o.Lora = None,
    device: o.Device = None,
    dtype: o.DtypeFlag = None,
    output: Folder = None,
    force: Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Does a model edit what it should, and nothing else? The change is measured, the rest compared in dB.

    Kinds: rewrite, ground, letters, add, remove, replace, move, face, translate, border, texture, scene, and with
    two pictures ground_from, concept_from, text_from. Cost: -n edits drawn one by one, and up to a second of
    measuring each. 200 of nano take some six minutes.
    """
    setup = Setup(model, number, seed, steps, guidance, size, tuple(lora or ()), device, dtype, output, force)
    screen = Screen(quiet, json)
    with opened(setup, screen, "edit") as (engine, how):
        from lanting.evals import sets
        from lanting.evals.draw import by_rule
        from lanting.evals.edit import judge_edit
        from lanting.evals.sheet import side_by_side
        from lanting.train.edits import KINDS

        wanted = listed(kinds, KINDS) or KINDS
        asked = {"edits": list(wanted), "concepts": concepts}
        own = asked | {"keep": keep, "no-ceiling": no_ceiling}
        kept = kept_for(setup, engine, "edit", own)
        judge = readers(Reader.pp, "en", screen)[0]
        cases = sets.edit_cases(wanted, number, seed, concepts, sizes=canvases(setup, engine))
        how = replace(how, keep=keep)
        with working(screen, kept, number, 1):
            report = judge_edit(engine, cases, how, judge, stages(screen), not no_ceiling, kept)
    edit_table(screen, report)
    tiles = [
        (side_by_side([*by_rule(case.sources), one.image]), hit, case.prompt, f"{out.kind} {decibel(out.kept)}")
        for one, hit, case, out in zip(report.drawn, report.hits, report.cases, report.outcomes, strict=True)
    ]
    finish(screen, kept, about("edit", setup, report.drawn) | asked | report.as_json(), tiles)


@contextmanager
def opened(setup: Setup, screen: Screen, task: str) -> Iterator[tuple[Engine, How]]:
    """The engine and its settings, checked as far as can be without drawing; closed in any case."""
    engine = drawing.open_engine(setup.model, setup.device, setup.dtype, None, setup.lora)
    try:
        from lanting.evals.draw import How, has_rule

        for note in engine.notes:
            screen.note("note: {note}", note=note)
        if task not in engine.spec.tasks:
            able = ", ".join(engine.spec.tasks)
            raise RequestError("{model} can't do {task}; it does {able}", model=engine.spec.name, task=task, able=able)
        whole("--seed", setup.seed, 0, LARGEST_SEED - setup.number + 1)  # each picture has the next one
        size = parse_size(setup.size, engine.spec) if setup.size else None
        probe = Request("x", size=size, steps=setup.steps, guidance_scale=setup.guidance, seed=setup.seed)
        if task == "text_to_image":
            settle(probe, engine.spec)
        yield engine, How(setup.steps, setup.guidance, None if has_rule(engine.spec) else size, setup.seed)
    finally:
        engine.close()


def canvases(setup: Setup, engine: Engine) -> tuple[tuple[int, int], ...]:
    """The canvas of the designs where one is asked for: a model with our rules draws designs of that size."""
    from lanting.evals.draw import has_rule

    return (parse_size(setup.size, engine.spec),) if setup.size and has_rule(engine.spec) else ()


def listed(words: str, known: Sequence[str]) -> tuple[str, ...]:
    """The words of a flag with commas between them, each a known one."""
    found = tuple(word.strip() for word in words.split(",") if word.strip())
    for word in found:
        if word not in known:
            raise RequestError("{word} is none we know; use {known}", word=word, known=", ".join(known))
    return found


def readers(ocr: str, language: str, screen: Screen) -> list[Judge]:
    """The asked readers that are installed; those that are not are named, and one at least must be there."""
    from lanting.evals.ocr import judges

    known = [reader.value for reader in Reader]
    asked = tuple(dict.fromkeys(listed(ocr, known)))
    if not asked:
        raise RequestError("{word} is none we know; use {known}", word=repr(ocr), known=", ".join(known))
    ready, missing = judges(asked, language)
    if not ready:
        raise RequestError(
            '{asked} is not installed: pip install "lanting[eval]" brings PP-OCR, the reader pp', asked=ocr
        )
    for name in missing:
        screen.note("{name} is not installed (or lacks {language}) and is left out", name=name, language=language)
    return ready
