"""What crosses process borders: Request in, Progress and Result out. Plain values, no tensors.

`Request` says what a person asked, with None wherever they said nothing; `settle` (in `lanting.specs`)
fills the gaps from the release, so everything after it can rely on every field. `Recipe` is the settled
request plus what is needed to draw the picture again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from lanting.core.readings import Reading

TASK_NAMES = (
    "text_to_image",
    "image_to_image",
    "inpaint",
    "edit",
    "edit_inpaint",
    "layered",
    "controlnet",
    "controlnet_inpaint",
)


@dataclass(frozen=True, slots=True)
class Request:
    """One wish for pictures.

    prompt           words, or several prompts for one batch (all drawn with the same settings)
    task             one of TASK_NAMES; None: inferred from what was given (see `settle`)
    negative_prompt  None: the release's own; only used when guidance_scale > 1
    size             (width, height) in pixels, multiples of 16 (2.1: 32); None: the release's or the picture's
    steps            denoising steps, 1..1000
    guidance_scale   true classifier-free guidance; <= 1 turns it off and halves the work
    seed             0..2**63-1; picture i of a batch uses seed + i; None: chosen at random and recorded
    count            pictures per prompt, 1..64
    images           input pictures (source first, then references)
    mask             white = repaint
    strength         0 < strength <= 1: how far from the source picture (image_to_image, inpaint)
    quality          one of core.quality.NAMES: how much may be left out to be sooner; None: "exact", nothing
    choices          what was decided while the picture was first drawn, from its recipe: it is decided alike
    rewrite          have the text encoder write the prompt out in detail first, and draw that; None: no, unless a
                     server does so by default
    asked            the prompt as it was asked, where another was drawn: recipes have it
    unwritten        why the prompt was not rewritten, though that was wished: recipes have it
    tries            read the quoted words back, and draw with up to so many seeds (1..64) until they are right; 1: read
                     them and no more; None: nothing is read
    options          words of a task's own: layers, resolution, control_scale, control_start, control_end,
                     in_context, padding_mask_crop, keep, regions, sigmas, batched_guidance
    """

    prompt: str | tuple[str, ...] = ""
    task: str | None = None
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    count: int = 1
    images: tuple[Image, ...] = ()
    mask: Image | None = None
    strength: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    quality: str | None = None
    choices: Mapping[str, Any] | None = None
    rewrite: bool | None = None
    asked: str | tuple[str, ...] | None = None
    unwritten: str | tuple[str, ...] | None = None
    tries: int | None = None


def edits(task: str | None) -> bool:
    """Whether a task changes pictures by instruction: its prompts are about them, and the text encoder sees them."""
    return (task or "").startswith("edit")


def prompts_of(request: Request) -> tuple[str, ...]:
    """As a tuple, one or several."""
    words: Any = request.prompt  # None, say, is refused as one prompt
    several = isinstance(words, Iterable) and not isinstance(words, str)
    return tuple(cast("Iterable[str]", words)) if several else (cast("str", words),)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Enough to draw the picture again. JSON-serialisable through `to_json` in `lanting.core.recipe`."""

    request: Mapping[str, Any]  # the settled request; pictures as {"sha256", "size", "path"?}
    model: str  # release or folder name
    weights: str  # hash over the weights' headers and sizes, or contents for small models
    task: str
    versions: Mapping[str, str]  # lanting, torch, python, device, dtype
    loras: tuple[Mapping[str, Any], ...] = ()  # {"name", "sha256", "strength", "path"} of each, as it was given
    controlnets: tuple[Mapping[str, Any], ...] = ()  # {"name", "weights", "path"} of each that drew along, in order

    @property
    def controlnet(self) -> Mapping[str, Any] | None:
        """The only one, or the first; None where there was none."""
        return self.controlnets[0] if self.controlnets else None


@dataclass(frozen=True, slots=True)
class Notice:
    """A sentence for a person about something that is no failure; template and values as in `LantingError`."""

    sentence: str
    values: Mapping[str, object]


def note(sentence: str, **values: object) -> Notice:
    return Notice(sentence, values)


@dataclass(frozen=True, slots=True)
class Progress:
    """What every interface shows. `preview` is a small PIL picture when previews were asked for."""

    phase: str  # "load", "write", "encode", "denoise", "decode", "read"
    step: int
    steps: int
    seconds: float  # since the phase began
    preview: Image | None = None
    choice: str = ""  # how the step was computed, in the letters of core.quality; "" where nothing may be left out
    notices: tuple[Notice, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """The finished pictures, in order of prompt, then count (then layer, bottom first)."""

    images: tuple[Image, ...]
    recipes: tuple[Recipe, ...]  # one per picture
    seconds: Mapping[str, float]  # per phase
    readings: tuple[Reading, ...] = ()  # one per picture, where they were read back

    def save(self, output: str | None = None, *, force: bool = False) -> tuple[Path, ...]:
        """Write every picture with its recipe and return the paths; `output` as with `lanting generate -o`.

        None: PNG files in the current folder, named from prompt and seed. A .psd, .ora or .pptx takes all layers of
        a picture. Nothing that exists is overwritten without `force`. Raises OutputError.
        """
        from lanting.core.save import named_by, places_for, save_all

        layers = int(self.recipes[0].request.get("options", {}).get("layers", 1)) if self.recipes else 1
        words = named_by(self.recipes[::layers])
        return save_all(self.images, places_for(output, words, layers, force=force), self.recipes)
