"""Pictures to be judged: drawn by the model, by rule, and by the autoencoder alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from lanting.core.types import Progress, Recipe, Request, Result
from lanting.evals.kept import Kept
from lanting.evals.sets import Case, Size
from lanting.specs import ModelSpec

if TYPE_CHECKING:
    from PIL.Image import Image

    from lanting.train.design import Design

T = TypeVar("T")
BATCH_PIXELS, LARGEST_BATCH = 1 << 20, 16  # nano draws 16 at once, a full-size model one


class Engine(Protocol):
    """What is needed of `lanting.engine.Engine`; `models` only for the autoencoder alone."""

    @property
    def spec(self) -> ModelSpec: ...

    def stream(self, request: Request, previews: bool = False) -> Iterator[Progress | Result]: ...


@dataclass(frozen=True)
class How:
    """The settings of all pictures; None: the release's own. Seeds count up from `seed` in the order of drawing.

    keep  of edits: whether what they leave alone is the given picture's
    """

    steps: int | None = None
    guidance_scale: float | None = None
    size: Size | None = None
    seed: int = 0
    keep: bool | None = None


@dataclass(frozen=True)
class Tell:
    """What a person hears of the work; by default nothing.

    begin  a stage begins: its name ("draw", "read", "rule", "autoencoder", "measure", "compare") and number of pictures
    at     so many of them are done
    end    the stage is over (true), or given up
    """

    begin: Callable[[str, int], object] = lambda name, total: None
    at: Callable[[float], object] = lambda done: None
    end: Callable[[bool], object] = lambda done: None

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[None]:
        self.begin(name, total)
        ended = False
        try:
            yield
            ended = True
        finally:
            self.end(ended)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items one by one, counted."""
        for number, item in enumerate(items, 1):
            yield item
            self.at(number)


def has_rule(spec: ModelSpec) -> bool:
    """Whether the model draws by the rules of our designs: then its pictures can be compared with the rule's."""
    return spec.name.startswith("nano")


@dataclass(frozen=True)
class Drawn:
    """A picture and the recipe that draws it again."""

    image: Image
    recipe: Recipe

    @property
    def seed(self) -> int:
        return int(self.recipe.request["seed"])


def draw(
    engine: Engine, cases: Sequence[Case], how: How, tell: Tell, kept: Kept | None = None, names: str = ""
) -> list[Drawn]:
    """One picture per case, in order. Pictures of one size share batches; edits are drawn one by one.

    kept, names  pictures that it has under such names are not drawn again, and it gets the others
    """
    kept, drawn, seed = kept or Kept(), dict[int, Drawn](), how.seed
    missing: list[tuple[list[int], Request]] = []
    for part, size in batches(cases, how, engine.spec):
        there = [kept.picture(_name(names, i), cases[i].prompt, seed + at) for at, i in enumerate(part)]
        if None in there:  # a batch is drawn whole: its pictures are those of one that was never interrupted
            missing.append((part, _request([cases[i] for i in part], how, size, seed)))
        drawn |= {i: Drawn(*one) for i, one in zip(part, there, strict=True) if one}
        seed += len(part)
    if not missing:
        return [drawn[i] for i in range(len(cases))]
    with tell.stage("draw", sum(len(part) for part, _ in missing)):
        done = 0
        for part, request in missing:
            for event in engine.stream(request):
                if isinstance(event, Result):
                    for i, image, recipe in zip(part, event.images, event.recipes, strict=True):
                        kept.keep(_name(names, i), image, recipe)
                        drawn[i] = Drawn(image, recipe)
                elif event.phase == "denoise":
                    tell.at(done + len(part) * event.step / max(event.steps, 1))
            done += len(part)
            tell.at(done)
    return [drawn[i] for i in range(len(cases))]


def _name(names: str, index: int) -> str:
    return f"{names}{index + 1:05}"


def _request(cases: Sequence[Case], how: How, size: Size | None, seed: int) -> Request:
    return Request(
        tuple(case.prompt for case in cases),
        size=size,
        steps=how.steps,
        guidance_scale=how.guidance_scale,
        seed=seed,
        images=tuple(by_rule(cases[0].sources)),
        options={} if how.keep is None else {"keep": how.keep},
    )


def batches(cases: Sequence[Case], how: How, spec: ModelSpec) -> Iterator[tuple[list[int], Size | None]]:
    """(indices of the cases of one batch, their size); None: the size of an edit follows from its picture."""
    by_size: dict[Size | None, list[int]] = {}
    for index, case in enumerate(cases):
        free = case.sources and not has_rule(spec)
        by_size.setdefault(how.size or (None if free else size_for(case.design.size, spec)), []).append(index)
    for size, same in by_size.items():
        alone = bool(cases[same[0]].sources)
        most = 1 if alone or size is None else max(1, min(LARGEST_BATCH, BATCH_PIXELS // (size[0] * size[1])))
        for at in range(0, len(same), most):
            yield same[at : at + most], size


def size_for(size: Size, spec: ModelSpec) -> Size:
    """The design's own size, or of a full-size release the recommended size nearest in ratio."""
    if has_rule(spec):
        return size
    known = [spec.defaults.size, *spec.defaults.sizes.values()]
    ratio = size[0] / size[1]
    return min(known, key=lambda one: abs(np.log(one[0] / one[1] / ratio)))


def by_rule(designs: Sequence[Design]) -> list[Image]:
    """The pictures of designs as the renderer draws them."""
    from PIL import Image as Pillow

    from lanting.train.draw import render

    return [Pillow.fromarray(render([design])[0].cpu().numpy()) for design in designs]


@torch.no_grad()
def reconstruct(engine: Any, image: Image) -> Image:
    """The picture through the model's autoencoder and back: the best that any of its pictures can be."""
    from PIL import Image as Pillow

    codec = engine.models.codec
    pixels = torch.tensor(np.asarray(image.convert("RGB"))).float().permute(2, 0, 1)[None] / 127.5 - 1
    tokens = codec.encode(pixels)
    back = codec.decode(tokens.data, tokens.grid)[0, :3].float().clamp(-1, 1)
    return Pillow.fromarray(((back.permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().astype(np.uint8))
