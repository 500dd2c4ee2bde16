"""`lanting eval follow`: is the rest as asked? Colours, pictograms, their number and place, measured and not eyed.

Of a model that draws by our rules everything is measured where the rule puts it. Of any other model the text is found
by the optical reader, and what would need a template (pictograms) is left out. Only what the sentence says is judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lanting.core.errors import RequestError
from lanting.evals.colors import Box, Ground, free_pixels, ground_of, ink_of, nearest_color
from lanting.evals.draw import Drawn, Engine, How, Tell, draw, has_rule
from lanting.evals.flip import mean_flip
from lanting.evals.kept import Kept
from lanting.evals.pictograms import alternatives, boxes_of, count_of, identify, side_of
from lanting.evals.scores import Share, share_of
from lanting.evals.sets import Case
from lanting.reading.reader import text_boxes

if TYPE_CHECKING:
    from PIL.Image import Image

    from lanting.train.design import Design

RING = 16  # pixels: where scenes, borders and ornaments are drawn
EVEN = 80.0  # grey levels of one channel between the upper and the lower edge that are still one colour
SIDES = ("above", "below", "left", "right")
TRAITS = ("ground", "letters", "pictogram", "count", "side", "place", "align")
THIRDS = {"top": 0.25, "middle": 0.5, "bottom": 0.75, "left": 0.25, "center": 0.5, "right": 0.75}


@dataclass
class FollowReport:
    """`traits[i]` says of picture i which of the asked traits are there; `spread` is the mean FLIP of seeds."""

    cases: Sequence[Case]
    drawn: Sequence[Drawn]
    traits: list[dict[str, bool]]
    spread: list[float]

    @property
    def hits(self) -> list[bool]:
        return [all(found.values()) for found in self.traits]

    def shares(self) -> dict[str, Share]:
        """The share of every trait over the pictures of which it was asked, then of all colours together."""
        named = [(name, [found[name] for found in self.traits if name in found]) for name in TRAITS]
        both = [found[name] for found in self.traits for name in ("ground", "letters") if name in found]
        return {name: share_of([float(v) for v in values]) for name, values in [*named, ("colours", both)] if values}

    def as_json(self) -> dict[str, Any]:
        return {
            "traits": {name: share.as_json() for name, share in self.shares().items()},
            "concepts_tried": len({case.design.concept for case in self.cases} - {None}),
            "spread": {
                "mean_flip": round(float(np.mean(self.spread)), 4) if self.spread else None,
                "prompts": [round(value, 4) for value in self.spread],
            },
            "pictures": [
                {"prompt": case.prompt, "seed": one.seed, "traits": found}
                for case, one, found in zip(self.cases, self.drawn, self.traits, strict=True)
            ],
        }


def judge_follow(
    engine: Engine,
    cases: Sequence[Case],
    how: How,
    tell: Tell,
    open_prompts: Sequence[Case] = (),
    seeds: int = 4,
    kept: Kept | None = None,
) -> FollowReport:
    """Draw the cases and measure them; draw every open prompt with some seeds and measure how they differ. `kept` has
    what is known."""
    kept = kept or Kept()
    drawn = draw(engine, cases, how, tell, kept)
    judge = measure if has_rule(engine.spec) and how.size is None else measure_freely
    traits = kept.judged("measure", len(cases), tell, lambda number: judge(drawn[number].image, cases[number]))
    repeated = [case for case in open_prompts for _ in range(seeds)]
    pictures = [one.image for one in draw(engine, repeated, how, tell, kept, "open-")]
    groups = [pictures[at : at + seeds] for at in range(0, len(pictures), seeds)]
    spread = kept.judged("compare", len(groups), tell, lambda number: spread_of(groups[number]))
    return FollowReport(cases, drawn, traits, spread)


def spread_of(images: Sequence[Image]) -> float:
    """Mean FLIP over all pairs of pictures: 0 where the seed changes nothing."""
    tensors = [torch.from_numpy(np.asarray(image.convert("RGB")).copy()) for image in images]
    pairs = [(a, b) for i, a in enumerate(tensors) for b in tensors[i + 1 :]]
    return float(np.mean([mean_flip(a, b) for a, b in pairs])) if pairs else 0.0


def measure(image: Image, case: Case) -> dict[str, bool]:
    """The asked traits of a picture drawn by our rules, each present or not.

    A pictogram on the wrong side is a miss there, and too many or too few are one; everything else is then measured in
    the layout that was found.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)  # (H, W, 3)
    design, found = case.design, {}
    if design.concept is not None and design.lines:
        side = _side(pixels, design)
        found["side"] = side == design.side
        design = replace(design, side=side or design.side)
    if design.concept is not None:
        counts = {int(str(n)): row for n, row in alternatives(design, "count", (1, 2, 3)).items()}
        if len(counts) > 1:
            seen = count_of(pixels, ground_in(pixels, design), counts, design.concept)
            found["count"] = seen == design.count
            design = replace(design, count=seen or design.count)
        ground = ground_in(pixels, design)
        concepts = [identify(pixels, box, ground).concept for box in boxes_of(design)[1]]
        found["pictogram"] = all(concept == design.concept for concept in concepts)
    return dict(colors(pixels, replace(case, design=design))) | found | dict(_text_place(image, case, ruled=True))


def _side(pixels: np.ndarray, design: Design) -> str | None:
    """On which side pictograms stand: as many as asked, or where these are on none, another number."""
    for count in sorted((1, 2, 3), key=lambda count: count != design.count):
        layout = replace(design, count=count)
        sides = {str(s): row for s, row in alternatives(layout, "side", SIDES).items()}
        side = side_of(pixels, ground_in(pixels, design), sides)
        if side is not None:
            return side
    return None


def measure_freely(image: Image, case: Case) -> dict[str, bool]:
    """What can be measured without knowing the layout: colours and the place of the text the reader finds. Where it
    finds none, letters and place are missed, and all of the picture is ground."""
    if not case.lines:
        return {}
    boxes = text_boxes(image)
    pixels, said = np.asarray(image.convert("RGB"), dtype=np.float64), case.labelled and case.labelled.said
    ground = ground_of(pixels, _around(image.size, boxes), graded=False)
    found = {}
    if said and said.ground and case.design.ground2 is None:
        found["ground"] = nearest_color(ground.middle) == case.design.ground
    ink = ink_of(pixels, boxes, ground)
    if said and said.letters:
        found["letters"] = ink is not None and nearest_color(ink) == case.design.letters
    return found | dict(_text_place(image, case, ruled=False))


def ground_in(pixels: np.ndarray, design: Design) -> Ground:
    """The ground of a picture where the layout rule leaves it free."""
    lines, pictograms = boxes_of(design)
    free = free_pixels(design.size, (*lines, *pictograms), RING)
    return ground_of(pixels, free, graded=design.ground2 is not None)


def colors(pixels: np.ndarray, case: Case, said_only: bool = True) -> Iterator[tuple[str, bool]]:
    """Whether ground and letters have the asked colours: of a gradient both ends, and one colour must be one."""
    design, said = case.design, case.labelled and case.labelled.said
    ground = ground_in(pixels, design)
    if not said_only or (said and said.ground):
        wanted = (design.ground, design.ground2 or design.ground)
        right = (nearest_color(ground.top), nearest_color(ground.bottom)) == wanted
        yield "ground", right and (design.ground2 is not None or _is_even(pixels, design))
    if design.lines and (not said_only or (said and said.letters)):
        ink = ink_of(pixels, boxes_of(design)[0], ground)
        yield "letters", ink is not None and nearest_color(ink) == design.letters


def _is_even(pixels: np.ndarray, design: Design) -> bool:
    """Whether a ground of one colour really has one, and does not fade from one into another."""
    graded = ground_in(pixels, replace(design, ground2=design.ground))
    return float(np.abs(graded.top - graded.bottom).max()) < EVEN


def _text_place(image: Image, case: Case, ruled: bool) -> Iterator[tuple[str, bool]]:
    """Height and alignment of the text where the sentence says them: the reader's boxes against where they should be.

    The middle of what was found must be nearest to the middle of the asked place; a canvas so full that the places
    coincide says nothing and is left out. No text found is a miss.
    """
    said = case.labelled and case.labelled.said
    if not said or not case.lines or not (said.place or said.align):
        return
    boxes = text_boxes(image)
    for name, axis, asked in (("place", 1, said.place), ("align", 0, said.align)):
        if not asked:
            continue
        middles = _expected(case.design, name, axis) if ruled else _thirds(name, image.size[axis])
        wanted = getattr(case.design, name)
        if len(set(middles.values())) < len(middles):
            continue
        own = _middle(boxes, axis)
        yield name, own is not None and _nearest(middles, own) == wanted


def _nearest(middles: dict[str, float], own: float) -> str:
    return min(middles, key=lambda value: abs(middles[value] - own))


def _expected(design: Design, name: str, axis: int) -> dict[str, float]:
    """The middle of all lines along an axis, in pixels, for every value of `place` or `align`."""
    from lanting.train.design import ALIGNS, PLACES

    found = {}
    for value in PLACES if name == "place" else ALIGNS:
        try:
            found[value] = _middle(boxes_of(replace(design, **{name: value}))[0], axis) or 0.0
        except RequestError:
            continue
    return found


def _thirds(name: str, length: int) -> dict[str, float]:
    words = ("top", "middle", "bottom") if name == "place" else ("left", "center", "right")
    return {word: THIRDS[word] * length for word in words}


def _middle(boxes: Sequence[Box], axis: int) -> float | None:
    """The middle of the smallest box around all boxes, along an axis (0: x)."""
    if not boxes:
        return None
    return (min(box[axis] for box in boxes) + max(box[axis] + box[axis + 2] for box in boxes)) / 2


def _around(size: tuple[int, int], boxes: Sequence[Box]) -> np.ndarray:
    """True in the neighbourhood of text, outside its boxes: (H, W)."""
    width, height = size
    near, margin = np.zeros((height, width), dtype=bool), max(4, max((box[3] for box in boxes), default=0) // 2)
    for x, y, w, h in boxes:
        near[max(y - margin, 0) : y + h + margin, max(x - margin, 0) : x + w + margin] = True
    for x, y, w, h in boxes:
        near[max(y - 2, 0) : y + h + 2, max(x - 2, 0) : x + w + 2] = False
    return near
