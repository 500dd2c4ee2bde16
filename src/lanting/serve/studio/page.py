"""The page: three tabs, each with its fields left and the picture beside them, and the history on the right.

Built once for each language, so every word on it is final when it is sent. `wires` ties it to the clerk.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from fastapi import FastAPI

from lanting.serve.house import House
from lanting.serve.studio import show
from lanting.serve.studio.clerk import PAGE, Clerk
from lanting.serve.studio.fields import easel, fold, html, picture, plan_panel
from lanting.serve.studio.forms import DRAW, EDIT, LAYERS, sizes_of, tabs_of
from lanting.serve.studio.look import seal, text, theme
from lanting.serve.studio.words import Say
from lanting.specs import ModelSpec
from lanting.specs.regions import knows_regions

HEAVIEST = "32mb"  # of an upload
NEWS = 4.0  # seconds between looks at the history; browsers make them rare where a page is not seen


@dataclass
class Tab:
    """One tab's components. `extra`: size; canvas and others; picture, count and fine."""

    name: str
    tab: Any
    prompt: Any
    go: Any
    stage: Any
    more: tuple[list[Any], Any, list[Any]]  # of `fields.fold`
    plan: Any
    extra: dict[str, Any]

    @property
    def fold(self) -> list[Any]:
        return self.more[0]

    @property
    def loras(self) -> Any:
        return self.more[1]

    @property
    def pulls(self) -> list[Any]:
        return self.more[2]


@dataclass
class Page:
    """Everything on it."""

    clerk: Clerk
    model: Any
    hidden: Any
    tabs: Any
    each: dict[str, Tab]
    search: Any
    gallery: Any
    timer: Any  # for what other clients of the same key do
    most: Any  # tiles that are shown
    sign: Any  # of what they show
    at: Any  # the tab that is open


def application(house: House, language: str) -> FastAPI:
    """The page as an application that answers below `/LANGUAGE/`."""
    import gradio as gr

    from lanting.serve.studio.wires import tie

    outer, clerk = FastAPI(openapi_url=None), Clerk(house, language)
    with gr.Blocks(
        title=clerk.say("Lanting"), analytics_enabled=False, fill_width=True, delete_cache=(3600, 86_400)
    ) as blocks:
        tie(laid_out(clerk), blocks)
    blocks.queue(default_concurrency_limit=None, api_open=False)
    closed = {"footer_links": [], "run_history": False, "enable_monitoring": False, "pwa": False, "mcp_server": False}
    gr.mount_gradio_app(
        *(outer, blocks, f"/{language}"),
        **closed,
        show_error=False,
        ssr_mode=False,
        max_file_size=HEAVIEST,
        theme=theme(),
        css=text("studio.css") + shapes(house, clerk.say),
        js=text("start.js"),
    )
    return outer


def laid_out(clerk: Clerk) -> Page:
    import gradio as gr

    say, models = clerk.say, clerk.house.desk.models
    first = next(iter(models.values()))
    with gr.Row(elem_id="top"):
        gr.HTML(header(clerk), apply_default_css=False)
        model = gr.Dropdown(
            list(models), value=first.served.name, label=say("Model"), show_label=False, container=False,
            elem_id="model", visible=len(models) > 1, min_width=160, scale=0,
        )  # fmt: skip
    able = tabs_of(first.spec)
    hidden = gr.HTML(hiding(first.spec), apply_default_css=False, elem_id="hidden")
    with gr.Row(elem_id="room"):
        with gr.Column(scale=5, elem_id="work"), gr.Tabs(selected=able[0], elem_id="tabs") as tabs:
            each = {DRAW: draw_tab(clerk), EDIT: edit_tab(clerk)}
            each[LAYERS] = layers_tab(clerk)
        with gr.Column(scale=1, min_width=200, elem_id="history"):
            search = gr.Textbox(
                label=say("Search your pictures"), placeholder=say("Search your pictures"), show_label=False,
                container=False, elem_id="search", lines=1, max_lines=1,
            )  # fmt: skip
            gallery = html("", elem_id="gallery")
    states = gr.State(PAGE), gr.State(""), gr.State(able[0])
    return Page(clerk, model, hidden, tabs, each, search, gallery, gr.Timer(NEWS), *states)


def hiding(spec: ModelSpec | None) -> str:
    """A rule that hides what a model has no use for: tabs, further pictures where it looks at one, the box for
    rewriting prompts where it can't write, words for parts of a picture where it reads one text. Gradio's own `visible`
    does not hide a tab that was shown."""
    able = tabs_of(spec)
    gone = [f"#{name}-tab-button" for name in (DRAW, EDIT, LAYERS) if name not in able]
    gone += [] if spec is not None and spec.defaults.max_pictures > 1 else ["#others"]
    gone += [] if spec is not None and spec.writes and able != (LAYERS,) else [".writes"]
    gone += [] if spec is not None and knows_regions(spec) else [".parts"]
    return f"<style>{','.join(gone)}{{display:none}}</style>" if gone else "<style></style>"


def header(clerk: Clerk) -> str:
    """The mark, the other language, light or dark, and the way out where there was a way in."""
    say = clerk.say
    other, name = ("zh", "中文") if clerk.language == "en" else ("en", "English")
    out = ""
    if clerk.house.settings.needs_keys:
        out = f'<form method="post" action="/logout"><button>{escape(say("Leave"))}</button></form>'
    shade = escape(say("light or dark"))
    return (
        f'<header><span class="mark">{seal()}<strong>{escape(say("Lanting"))}</strong></span><nav>'
        f'<a id="language" href="/?language={other}" lang="{other}">{name}</a>'
        f'<button type="button" id="shade" aria-label="{shade}" title="{shade}">◐</button>{out}</nav></header>'
    )


def prompt_of(say: Say, name: str) -> Any:
    """One line that grows, so that Enter sends and Shift+Enter makes a line."""
    import gradio as gr

    label, hint = {
        DRAW: (say("What shall be drawn?"), say('for example: a blue sign that says "HELLO"')),
        EDIT: (say("What shall change?"), say("for example: make the background red")),
        LAYERS: (say("What is in the picture? (may be left out)"), ""),
    }[name]
    return gr.Textbox(
        label=label, placeholder=hint, lines=1, max_lines=8, elem_classes="prompt", elem_id=f"{name}-words"
    )


def go(say: Say, name: str) -> Any:
    import gradio as gr

    words = {DRAW: say("Draw"), EDIT: say("Change it"), LAYERS: say("Take it apart")}[name]
    return gr.Button(words, variant="primary", elem_id=f"{name}-go", elem_classes="go")


def lora_count(clerk: Clerk) -> int:
    """Of the model that has most: each gets a field for its strength, and fields are made before there is a choice."""
    served = clerk.house.desk.models.values()
    return max(max(len(one.loras), len(one.served.options.get("loras") or ())) for one in served)


def stage(clerk: Clerk, name: str) -> Any:
    spec = clerk.model(None).spec
    empty = show.empty(name, clerk.language, clerk.say, signs=spec is not None and spec.name == "nano")
    return html(empty, elem_id=f"{name}-stage", elem_classes="view")


def draw_tab(clerk: Clerk) -> Tab:
    import gradio as gr

    say = clerk.say
    with gr.Tab(say("Draw"), id=DRAW, elem_id="draw-tab") as tab, gr.Row(elem_classes="pair"):
        with gr.Column(scale=2, min_width=280, elem_classes="fields"):
            prompt = prompt_of(say, DRAW)
            sizes = sizes_of(clerk.model(None).spec, say)
            size = gr.Radio(sizes, value=sizes[0][1] if sizes else None, label=say("Shape"), elem_id="sizes")
            button, more = go(say, DRAW), fold(say, False, True, lora_count(clerk), clerk.house.settings.rewrite)
            plan = plan_panel(say)
        with gr.Column(scale=5, min_width=300, elem_classes="seen"):
            shown = stage(clerk, DRAW)
    return Tab(DRAW, tab, prompt, button, shown, more, plan, {"size": size})


def edit_tab(clerk: Clerk) -> Tab:
    import gradio as gr

    say = clerk.say
    with gr.Tab(say("Edit"), id=EDIT, elem_id="edit-tab") as tab, gr.Row(elem_classes="pair"):
        with gr.Column(scale=2, min_width=280, elem_classes="fields"):
            prompt, button = prompt_of(say, EDIT), go(say, EDIT)
            others = gr.Gallery(
                label=say("Further pictures to look at"), type="filepath", file_types=["image"], columns=3, height=110,
                interactive=True, object_fit="contain", elem_id="others", buttons=[],
            )  # fmt: skip
            more, plan = fold(say, True, True, lora_count(clerk), clerk.house.settings.rewrite), plan_panel(say)
        with gr.Column(scale=5, min_width=300, elem_classes="seen"):
            hint = say("Paint over what may change, or paint nothing.")
            gr.HTML(f'<p class="hint">{escape(hint)}</p>', apply_default_css=False, elem_classes="view")
            canvas = easel(
                label=hint, show_label=False, height=360, elem_id="canvas", placeholder=say("Drop a picture here")
            )
            shown = stage(clerk, EDIT)
    return Tab(EDIT, tab, prompt, button, shown, more, plan, {"canvas": canvas, "others": others})


def layers_tab(clerk: Clerk) -> Tab:
    import gradio as gr

    say = clerk.say
    with gr.Tab(say("Layers"), id=LAYERS, elem_id="layers-tab") as tab, gr.Row(elem_classes="pair"):
        with gr.Column(scale=2, min_width=280, elem_classes="fields"):
            source = picture(label=say("A picture to take apart"), height=220, elem_id="source")
            prompt = prompt_of(say, LAYERS)
            count = gr.Slider(2, 8, 4, step=1, label=say("Layers"))
            fine = gr.Checkbox(label=say("Large (1024 instead of 640)"), value=False)
            button, more = go(say, LAYERS), fold(say, False, False, lora_count(clerk))
            plan = plan_panel(say)
        with gr.Column(scale=5, min_width=300, elem_classes="seen"):
            shown = stage(clerk, LAYERS)
    return Tab(LAYERS, tab, prompt, button, shown, more, plan, {"picture": source, "count": count, "fine": fine})


def shapes(house: House, say: Say) -> str:
    """A little rectangle before each size's name."""
    rules = {}
    for model in house.desk.models.values():
        for name, size in sizes_of(model.spec, say):
            width, height = (int(side) for side in size.split("x"))
            scale = 18 / max(width, height)
            test = name.replace('"', "")
            rules[test] = (
                f'#sizes label[data-testid="{test}-radio-label"]::before'
                f"{{width:{max(width * scale, 4):.0f}px;height:{max(height * scale, 4):.0f}px}}"
            )
    return "\n".join(rules.values())
