"""`lanting eval edit`: was the asked change made, and did the rest stay?

The change is measured on the result: words are read, colours and pictograms measured where the rule puts them, and
for faces, borders, textures and scenes the rule draws every possibility and the nearest must be the asked one. The
rest is the part of the source that the edit leaves alone, compared with the source in dB.

Pictograms are covered before words are read, or a red triangle at the end of a line is read as its last letter. Of a
texture every way of laying it is a possibility, since no sentence says where its dots begin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lanting.evals.draw import Drawn, Engine, How, Tell, by_rule, draw, has_rule, reconstruct
from lanting.evals.follow import colors, ground_in
from lanting.evals.kept import Kept
from lanting.evals.ocr import Judge
from lanting.evals.pictograms import boxes_of, identify
from lanting.evals.scores import Share, compare, share_of
from lanting.evals.sets import Case

if TYPE_CHECKING:
    from PIL.Image import Image

    from lanting.train.design import Design

# what of the target decides whether an edit is done; a kind that is not here is judged by all that differs
DECIDES = {
    "rewrite": ("lines",),
    "translate": ("lines",),
    "text_from": ("lines",),
    "ground": ("ground",),
    "ground_from": ("ground",),
    "letters": ("letters",),
    "add": ("concept",),
    "remove": ("concept",),
    "replace": ("concept",),
    "concept_from": ("concept",),
    "move": ("side",),
    "face": ("face", "lines"),  # letters of a kind that spell nothing are not these words in that face
}
FREE_KINDS = ("rewrite", "translate", "text_from", "ground", "ground_from", "letters", "remove")  # need no template
BEST = 60.0  # dB: equal pictures
CORNER, WAYS = 16, 16  # pixels that ornaments mark in every corner; seeds that lay a texture differently
FEWEST = 64  # pixels that must stay for "the rest" to mean something


@dataclass(frozen=True)
class Outcome:
    """One edit: was it done (None: not measurable for this model), and the rest in dB (None: nothing stays)."""

    kind: str
    done: bool | None
    kept: float | None
    ceiling: float | None  # of the rest: the target by rule through the autoencoder


@dataclass
class EditReport:
    """All outcomes; a row of `table` is one kind, the last one all of them."""

    cases: Sequence[Case]
    drawn: Sequence[Drawn]
    outcomes: list[Outcome]

    @property
    def hits(self) -> list[bool]:
        return [bool(one.done) for one in self.outcomes]

    def kinds(self) -> list[str]:
        return list(dict.fromkeys(one.kind for one in self.outcomes))

    def row(self, kind: str | None) -> dict[str, Any]:
        """Share done, and mean and median of the rest in dB, of one kind or (None) of all."""
        chosen = [one for one in self.outcomes if kind in (None, one.kind)]
        done = [float(one.done) for one in chosen if one.done is not None]
        kept = [one.kept for one in chosen if one.kept is not None]
        ceiling = [one.ceiling for one in chosen if one.ceiling is not None]
        return {
            "pictures": len(chosen),
            "done": share_of(done) if done else None,
            "kept_median": _rounded(np.median(kept)) if kept else None,
            "kept_mean": _rounded(np.mean(kept)) if kept else None,
            "kept_ceiling": _rounded(np.median(ceiling)) if ceiling else None,
        }

    def as_json(self) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = {}
        for kind in [*self.kinds(), None]:
            row = self.row(kind)
            done = row["done"]
            rows[kind or "all"] = row | {"done": done.as_json() if isinstance(done, Share) else None}
        pictures = [
            {
                "kind": out.kind,
                "instruction": case.prompt,
                "seed": one.seed,
                "done": out.done,
                "kept": None if out.kept is None else _rounded(out.kept),
            }
            for case, one, out in zip(self.cases, self.drawn, self.outcomes, strict=True)
        ]
        return {"kinds": rows, "pictures": pictures}


def _rounded(value: Any) -> float:
    return round(float(value), 2)


def judge_edit(
    engine: Engine,
    cases: Sequence[Case],
    how: How,
    judge: Judge,
    tell: Tell,
    ceiling: bool = True,
    kept: Kept | None = None,
) -> EditReport:
    """Draw the edits and measure them; `judge` reads the words, and `kept` has what is known."""
    kept, ruled = kept or Kept(), has_rule(engine.spec)
    drawn = draw(engine, cases, how, tell, kept)
    again = (lambda image: reconstruct(engine, image)) if ruled and ceiling else None

    def measured(number: int) -> dict[str, Any]:
        return asdict(outcome(drawn[number].image, cases[number], judge, ruled, again))

    return EditReport(cases, drawn, [Outcome(**one) for one in kept.judged("measure", len(cases), tell, measured)])


def outcome(
    image: Image, case: Case, judge: Judge, ruled: bool = True, again: Callable[[Image], Image] | None = None
) -> Outcome:
    """One edit measured; `again` puts a picture through the autoencoder and back."""
    from PIL import Image as Pillow

    assert case.edit is not None
    source, target = by_rule([case.sources[0], case.design])
    image = image.convert("RGB")
    if image.size != source.size:
        image = image.resize(source.size, Pillow.Resampling.LANCZOS)
    kind = case.edit.kind
    done = is_done(image, case, judge) if ruled or kind in FREE_KINDS else None
    mask = rest_of(source, target, case.edit.changed)
    kept = psnr(image, source, mask) if mask is not None else None
    best = psnr(again(target), source, mask) if again is not None and mask is not None else None
    return Outcome(kind, done, kept, best)


def is_done(image: Image, case: Case, judge: Judge) -> bool:
    """Whether everything that decides this kind of edit is as asked."""
    assert case.edit is not None
    source, target = case.sources[0], case.design
    names = DECIDES.get(case.edit.kind) or tuple(
        name for name in vars(target) if getattr(target, name) != getattr(source, name) and name != "ornament"
    )
    return all(_has(image, case, name, judge) for name in names)


def _has(image: Image, case: Case, name: str, judge: Judge) -> bool:
    """Whether the picture has the target's value of one attribute."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    source, target = case.sources[0], case.design
    if name == "lines":
        return _has_lines(image, case, judge)
    if name in ("ground", "letters"):
        return dict(colors(pixels, case, said_only=False)).get(name, False)
    if name in ("concept", "side"):
        ground, wanted = ground_in(pixels, target), boxes_of(target)[1]
        there = all(identify(pixels, box, ground).concept == target.concept for box in wanted)
        old = [] if name == "concept" and target.concept is not None else boxes_of(source)[1]
        left = [box for box in old if box not in wanted and identify(pixels, box, ground).concept == source.concept]
        return there and not left
    return nearest_value(pixels, target, name) == getattr(target, name)


def _has_lines(image: Image, case: Case, judge: Judge) -> bool:
    """Whether the lines that are new were read: anywhere, or, since finders miss single Chinese characters, in their
    known boxes."""
    new = [line for line in case.lines if line not in case.sources[0].lines] or list(case.lines)
    image = without_pictograms(image, case.design)
    if compare(new, judge.read(image, case.script)).lines_right == len(new):
        return True
    if case.script != "zh":
        return False
    boxes = [box for line, box in zip(case.lines, boxes_of(case.design)[0], strict=True) if line in new]
    return compare(new, judge.read_boxes(image, boxes, case.script)).lines_right == len(new)


def without_pictograms(image: Image, design: Design) -> Image:
    """The picture with its ground over the places of the design's pictograms."""
    from PIL import Image as Pillow

    pixels = np.array(image.convert("RGB"))
    ground = ground_in(pixels.astype(np.float64), design)
    for x, y, width, height in boxes_of(design)[1]:
        pixels[y : y + height, x : x + width] = ground.rows(y, y + height).round().clip(0, 255)
    return Pillow.fromarray(pixels)


def nearest_value(pixels: np.ndarray, design: Design, name: str) -> object:
    """Which value of an attribute the rule must draw to come nearest to the picture, where its values differ."""
    from lanting.core.errors import RequestError
    from lanting.train import design as known

    every = {
        "face": known.FACES,
        "border": (False, True),
        "texture": known.TEXTURES,
        "scene": known.SCENES,
        "align": known.ALIGNS,
        "place": known.PLACES,
        "count": (1, 2, 3),
    }
    drawn: list[tuple[object, np.ndarray]] = []
    for value in every.get(name, (getattr(design, name),)):
        for design_ in laid(design, value) if name == "texture" else [replace(design, **{name: value})]:
            try:
                drawn.append((value, np.asarray(by_rule([design_])[0], dtype=np.float64)))
            except RequestError:
                continue
    differs = np.ptp(np.stack([one for _, one in drawn]), axis=0).max(-1) > 0  # (H, W)
    if name == "texture":
        differs &= within_corners(design.size)
    errors = [(float(np.square(one - pixels)[differs].sum()), value) for value, one in drawn]
    return min(errors, key=lambda error: (error[0], error[1] != getattr(design, name)))[1]


def laid(design: Design, texture: str) -> list[Design]:
    """The design with a texture in all ways of laying it. What stands in its corners differs too."""
    from lanting.train.backdrop import pattern

    found: dict[bytes, Design] = {}
    for seed in range(WAYS if texture != "plain" else 1):
        motif = pattern(texture, seed, (CORNER, CORNER)).numpy().tobytes()
        found.setdefault(motif, replace(design, texture=texture, ornament=seed))
    return list(found.values())


def within_corners(size: tuple[int, int]) -> np.ndarray:
    """False where ornaments mark the corners of a picture of (width, height): (H, W)."""
    inside = np.ones((size[1], size[0]), dtype=bool)
    for rows in (slice(CORNER), slice(-CORNER, None)):
        inside[rows, :CORNER] = inside[rows, -CORNER:] = False
    return inside


def rest_of(source: Image, target: Image, changed: Sequence[tuple[int, int, int, int]]) -> np.ndarray | None:
    """The pixels that an edit leaves alone: outside its boxes; without boxes, those that the rule draws alike.

    (H, W) bool, or None where fewer than FEWEST pixels stay.
    """
    if changed:
        mask = np.ones((source.height, source.width), dtype=bool)
        for x, y, width, height in changed:
            mask[max(y, 0) : y + height, max(x, 0) : x + width] = False
    else:
        mask = (np.asarray(source) == np.asarray(target)).all(-1)
    return mask if mask.sum() >= FEWEST else None


def psnr(image: Image, other: Image, mask: np.ndarray) -> float:
    """10 log10(255² / mean square error) over the masked pixels, in dB, BEST at most."""
    difference = (np.asarray(image, dtype=np.float64) - np.asarray(other, dtype=np.float64))[mask]
    error = float(np.square(difference).mean())
    return BEST if error == 0 else min(BEST, 10 * math.log10(255**2 / error))
