"""`lanting eval text`: does a model write what it was asked to write? Read by two optical readers.

For models that draw by our rules three things are read: the model's pictures, the pictures that the rule draws (the
reader's own ceiling), and those through the autoencoder and back (what is left for the transformer to reach). Each
reader also reads the known boxes of the lines: finders miss single Chinese characters and take ornaments for text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lanting.evals.draw import Drawn, Engine, How, Tell, by_rule, draw, has_rule, reconstruct
from lanting.evals.kept import Kept
from lanting.evals.ocr import Judge
from lanting.evals.pictograms import boxes_of
from lanting.evals.scores import Reading, Score, Share, add_up, compare
from lanting.evals.sets import Case

if TYPE_CHECKING:
    from PIL.Image import Image

MODEL, RULE, VAE = "model", "rule", "autoencoder"  # who drew
Readers = dict[str, Callable[["Image", Case], list[str]]]


@dataclass
class TextReport:
    """Everything measured. `scores[who drew][reader]`; `read[i][reader]` are the lines read in picture i."""

    cases: Sequence[Case]
    drawn: Sequence[Drawn]
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    readings: dict[str, list[Reading]] = field(default_factory=dict)  # of the model's pictures, by reader
    read: list[dict[str, list[str]]] = field(default_factory=list)

    @property
    def first(self) -> str:
        """The reader that decides what counts as a hit in sheets and lists: the first that was asked."""
        return next(iter(self.readings))

    @property
    def hits(self) -> list[bool]:
        return [one.lines_right == one.lines for one in self.readings[self.first]]

    def of_ceiling(self, reader: str) -> float | None:
        """Characters right in the model's pictures over those in the rule's; None where no rule was read."""
        ceiling = self.scores.get(RULE, {}).get(reader)
        own = self.scores[MODEL][reader].characters.value
        return own / ceiling.characters.value if ceiling and ceiling.characters.right else None

    def parts(self) -> dict[str, dict[str, Share]]:
        """Exact lines by canvas, by number of lines and by face, as the first reader saw them."""
        found: dict[str, dict[str, Share]] = {}
        for name, key in PARTS.items():
            groups: dict[str, list[Reading]] = {}
            for case, reading in zip(self.cases, self.readings[self.first], strict=True):
                groups.setdefault(key(case), []).append(reading)
            found[name] = {group: add_up(groups[group]).lines for group in sorted(groups)}
        return found

    def as_json(self) -> dict[str, Any]:
        scores = {who: {name: score.as_json() for name, score in by.items()} for who, by in self.scores.items()}
        ceilings = {name: self.of_ceiling(name) for name in self.readings}
        return {
            "scores": scores,
            "characters_of_ceiling": {name: round(v, 4) for name, v in ceilings.items() if v is not None},
            "parts": {
                name: {group: share.as_json() for group, share in groups.items()}
                for name, groups in self.parts().items()
            },
            "pictures": [
                {"prompt": case.prompt, "seed": one.seed, "asked": list(case.lines), "read": read, "hit": hit}
                for case, one, read, hit in zip(self.cases, self.drawn, self.read, self.hits, strict=True)
            ],
        }


PARTS: dict[str, Callable[[Case], str]] = {
    "size": lambda case: "{}×{}".format(*case.design.size),
    "lines": lambda case: str(len(case.lines)),
    "face": lambda case: case.design.face,
}


def judge_text(
    engine: Engine,
    cases: Sequence[Case],
    how: How,
    judges: Sequence[Judge],
    tell: Tell,
    ceiling: bool = True,
    kept: Kept | None = None,
) -> TextReport:
    """Draw the cases, read them, and where the model has a rule, read the ceilings too; `kept` has what is known."""
    kept, ruled = kept or Kept(), has_rule(engine.spec) and how.size is None
    report = TextReport(cases, draw(engine, cases, how, tell, kept))
    readers = readers_for(judges, boxes=ruled)

    def read(stage: str, picture: Callable[[int], Image]) -> list[dict[str, list[str]]]:
        """What every reader finds in every picture."""

        def lines(number: int) -> dict[str, list[str]]:
            image = picture(number)
            return {name: find(image, cases[number]) for name, find in readers.items()}

        return kept.judged(stage, len(cases), tell, lines)

    def perfect(number: int) -> Image:
        return by_rule([cases[number].design])[0]

    report.read = read("read", lambda number: report.drawn[number].image)
    report.readings = score(cases, report.read)
    report.scores[MODEL] = {name: add_up(readings) for name, readings in report.readings.items()}
    if ruled and ceiling:
        for who, picture in ((RULE, perfect), (VAE, lambda number: reconstruct(engine, perfect(number)))):
            readings = score(cases, read(who, picture))
            report.scores[who] = {name: add_up(found) for name, found in readings.items()}
    return report


def readers_for(judges: Sequence[Judge], boxes: bool) -> Readers:
    """The judges as functions of picture and case; with `boxes` each also on the known boxes of the lines."""
    readers: Readers = {}
    for judge in judges:
        readers[judge.name] = _whole(judge)
        if boxes:
            readers[f"{judge.name}, known boxes"] = _in_boxes(judge)
    return readers


def _whole(judge: Judge) -> Callable[[Image, Case], list[str]]:
    return lambda image, case: judge.read(image, case.script)


def _in_boxes(judge: Judge) -> Callable[[Image, Case], list[str]]:
    return lambda image, case: judge.read_boxes(image, boxes_of(case.design)[0], case.script)


def score(cases: Sequence[Case], read: Sequence[dict[str, list[str]]]) -> dict[str, list[Reading]]:
    """Every reader's score of every picture."""
    names = list(read[0]) if read else []
    return {name: [compare(case.lines, one[name]) for case, one in zip(cases, read, strict=True)] for name in names}
