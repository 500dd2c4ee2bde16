"""Gradio's fields as this page needs them. Uploads stay bytes here: `serve.pictures` reads them, which bounds them
before they are decoded, as Gradio itself does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lanting.core.quality import NAMES
from lanting.serve.studio.clerk import Canvas
from lanting.serve.studio.look import text
from lanting.serve.studio.words import Say

HELD = 256 << 20  # bytes of canvases that are on their way
RED = ("rgb(229, 67, 46)", 0.6)  # of the brush: what is below can be seen


class Held(dict[str, Any]):
    """Canvases that are on their way, by id; the oldest go where they are too much."""

    def __setitem__(self, name: str, held: Any) -> None:
        super().__setitem__(name, held)
        while len(self) > 1 and sum(map(weight, self.values())) > HELD:
            self.pop(next(iter(self)))


def easel(**how: Any) -> Any:
    """A canvas to paint on; its value is a `Canvas`.

    Its method is replaced rather than a class derived: Gradio writes a stub beside the source of every derived one. It
    makes a component anew for every update that is no plain value, so this one must only ever be given values.
    """
    import gradio as gr

    brush = gr.Brush(colors=[RED], default_color=RED, color_mode="fixed", default_size=14)
    canvas: Any = gr.ImageEditor(
        **{"type": "filepath", "format": "png", "sources": ("upload", "clipboard"), "transforms": (), "layers": False},
        **{"brush": brush, "buttons": ["fullscreen"], **how},
    )
    held = canvas.blob_storage = Held()

    def painted(payload: Any) -> Canvas:
        if payload is not None and payload.id is not None:
            payload = held.pop(payload.id, None)
        if payload is None:
            return Canvas()
        return Canvas(content(payload.background), [one for layer in payload.layers if (one := content(layer))])

    canvas.preprocess = painted
    return canvas


def content(held: Any) -> bytes | None:
    """The bytes of a picture that is on its way, or of a file that was uploaded."""
    if held is None or isinstance(held, bytes):
        return held
    return Path(held.path).read_bytes() if held.path else None


def weight(held: Any) -> int:
    return sum(len(part) for part in (held.background, held.composite, *held.layers) if part)


def picture(**how: Any) -> Any:
    """One uploaded picture; its value is the file's bytes."""
    import gradio as gr

    # as with `easel`: give it plain values only
    field: Any = gr.Image(type="filepath", sources=["upload", "clipboard"], buttons=[], **how)
    field.preprocess = content
    return field


def html(value: str, **how: Any) -> Any:
    """A piece of ours, whose buttons become events."""
    import gradio as gr

    return gr.HTML(value, js_on_load=text("studio.js"), apply_default_css=False, **how)


def number(label: str, hint: str, visible: bool = True) -> Any:
    """A field for a number that may be empty: Gradio's own makes 0 of nothing."""
    import gradio as gr

    return gr.Textbox(label=label, placeholder=hint, lines=1, max_lines=1, min_width=90, visible=visible)


def fold(say: Say, strength: bool, many: bool, most: int, rewrite: bool = False) -> tuple[list[Any], Any, list[Any]]:
    """The fields below the fold, in the order of `forms.NAMES`; the LoRAs; a strength for each of up to `most`.
    `rewrite`: the box is ticked at first. Regions are for pictures that begin with words alone."""
    import gradio as gr

    from lanting.reading import can_read

    free = say("As usual")
    with gr.Accordion(say("More"), open=False, elem_classes="fold"):
        with gr.Row():
            seed, count = number(say("Seed"), say("Any")), number(say("Pictures"), "1", many)
        with gr.Row():
            steps, guidance = number(say("Steps"), free), number(say("Guidance"), free)
        change = gr.Slider(
            *(0.1, 1.0, 0.6), step=0.05, label=say("Strength, where the picture is drawn over"), visible=strength
        )
        negative = gr.Textbox(label=say("What should not be there"), lines=1, max_lines=3)
        names = (say("Exact"), say("High"), say("Balanced"), say("Fast"))
        levels = list(zip(names, NAMES, strict=True))
        quality = gr.Dropdown(levels, value="exact", label=say("Quality against time"))
        tries = number(say("Seeds to try until quoted words are right"), say("Not read back"), many and can_read())
        writes = gr.Checkbox(rewrite, label=say("Write the prompt out first"), elem_classes="writes")
        regions = gr.Textbox(
            **{"label": say("Words for parts of the picture, a line each"), "lines": 1, "max_lines": 8},
            **{"placeholder": say("left=a red fox"), "elem_classes": "parts", "visible": many and not strength},
        )
        loras = gr.Dropdown([], multiselect=True, label=say("LoRAs"), visible=False, info=say("None: as served."))
        pulls = [gr.Slider(0, 2, 1, step=0.05, label="-", visible=False, elem_classes="pull") for _ in range(most)]
    return [seed, count, steps, guidance, change, negative, quality, writes, tries, regions], loras, pulls


def plan_panel(say: Say) -> Mapping[str, Any]:
    """The panel that says whether it fits."""
    import gradio as gr

    with gr.Accordion(say("Will it fit?"), open=False, elem_classes="fold") as box:
        told = gr.HTML("", apply_default_css=False, min_height=24)
    return {"box": box, "told": told}
