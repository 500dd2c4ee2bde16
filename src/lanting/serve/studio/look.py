"""Colours, letters, and the pages that need no Gradio. Fonts are the reader's own: nothing is fetched."""

from __future__ import annotations

from functools import cache
from html import escape
from importlib import resources
from typing import Any

FONTS = ("system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
SEAL = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#b4392a"/>'
    '<path d="M11 6.500l1.800 3.300M21 6.500l-1.800 3.300M9 13h14M10.500 18.500h11M7 24.500h18" stroke="#fff" '
    'stroke-width="2.200" stroke-linecap="round" fill="none"/></svg>'
)
# what a page of the studio may load: itself. Gradio needs inline scripts, and workers and pictures from memory
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)


@cache
def text(name: str) -> str:
    """A file of this folder."""
    return resources.files("lanting.serve.studio").joinpath(name).read_text(encoding="utf-8")


def seal() -> str:
    """The mark, for a page."""
    return SEAL.replace("<svg ", '<svg class="seal" aria-hidden="true" ')


def page(language: str, title: str, body: str, head: str = "") -> str:
    """A whole small page."""
    # a form's post says where it comes from only under this referrer policy; the header says no-referrer
    return (
        f'<!doctype html><html lang="{"zh-CN" if language == "zh" else "en"}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        'content="light dark"><meta name="referrer" content="same-origin"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title>{head}<style>{text('small.css')}</style></head><body>{body}</body></html>"
    )


def theme() -> Any:
    """Paper, ink and one red."""
    import gradio as gr

    red = gr.themes.Color(
        *("#fdf4f2", "#fbe5e1", "#f6c9c2", "#ee9f94", "#e07263", "#c94d3c", "#b4392a", "#962d21", "#7a261d", "#66231c"),
        "#380f0b",
        name="seal",
    )
    base = gr.themes.Base(primary_hue=red, neutral_hue="stone", font=FONTS, font_mono=("ui-monospace", "monospace"))
    return base.set(
        body_background_fill="#faf8f5",
        body_background_fill_dark="#171614",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#201e1c",
        background_fill_secondary="#f4f1ec",
        background_fill_secondary_dark="#1b1a18",
        block_background_fill="*background_fill_primary",
        block_border_width="0px",
        block_shadow="none",
        button_primary_background_fill="#b4392a",
        button_primary_background_fill_hover="#962d21",
        button_primary_background_fill_dark="#b4392a",
        button_primary_background_fill_hover_dark="#c94d3c",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        input_border_color_focus="#b4392a",
        input_border_color_focus_dark="#e07263",
        input_background_fill_focus="*input_background_fill",
        input_background_fill_focus_dark="*input_background_fill",
        input_shadow_focus="none",
        block_label_text_color="*neutral_500",
        block_label_text_color_dark="*neutral_300",
    )
