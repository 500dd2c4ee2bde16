"""What a choice changes in the fields: another model, LoRAs, or an earlier job with all its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lanting.serve.jobs import Job
from lanting.serve.state import Model
from lanting.serve.studio.forms import DRAW, NAMES, sizes_of, tab_of, tabs_of, values_of
from lanting.serve.studio.page import Page, Tab, hiding

Updates = dict[Any, Any]


def depending(page: Page) -> list[Any]:
    """The components that `for_model` changes."""
    found = [page.hidden, page.tabs, page.each[DRAW].extra["size"]]
    for tab in page.each.values():
        found += [tab.loras, *tab.pulls]
    return found


def settings(page: Page) -> list[Any]:
    """What `recalled` changes besides."""
    return [one for tab in page.each.values() for one in (tab.prompt, *tab.fold)]


def for_model(page: Page, name: str | None, at: str | None = None) -> Updates:
    """The page as a model needs it; the tab `at` stays open where the model has a use for it."""
    import gradio as gr

    model = page.clerk.model(name)
    able, sizes = tabs_of(model.spec), sizes_of(model.spec, page.clerk.say)
    updates: Updates = {
        page.hidden: hiding(model.spec),
        page.tabs: gr.update(selected=at if at in able else able[0]) if able else gr.skip(),
        page.each[DRAW].extra["size"]: gr.update(choices=sizes, value=sizes[0][1] if sizes else None),
    }
    for tab in page.each.values():
        updates |= hung(page, tab, name, {})
    return updates


def hung(page: Page, tab: Tab, name: str | None, chosen: Mapping[str, float | None]) -> Updates:
    """A tab's LoRAs: which there are, which are chosen, how strong each is."""
    import gradio as gr

    known = known_to(page.clerk.model(name))
    here = [name for name in chosen if name in known]
    return {tab.loras: gr.update(choices=known, value=here, visible=bool(known)), **rows(page, tab, name, chosen)}


def known_to(model: Model) -> list[str]:
    return [lora["name"] for lora in model.loras]


def rows(page: Page, tab: Tab, name: str | None, chosen: Mapping[str, float | None]) -> Updates:
    """A strength for each chosen LoRA: the given one, or where there is none the one that stands there."""
    import gradio as gr

    updates: Updates = {pull: gr.update(visible=False) for pull in tab.pulls}
    for pull, lora in zip(tab.pulls, page.clerk.model(name).loras, strict=False):
        told: dict[str, Any] = {"label": lora["name"], "visible": lora["name"] in chosen}
        value = chosen.get(lora["name"])
        if value is not None or lora["name"] not in chosen:
            value = float(lora["strength"]) or 1.0 if value is None else value
            told |= {"value": value, "minimum": min(0, value), "maximum": max(2, value)}
        updates[pull] = gr.update(**told)
    return updates


def recalled(page: Page, job: Job, now: str | None) -> Updates:
    """The fields as a job was asked, its model chosen where it is served."""
    import gradio as gr

    tab, name = page.each[tab_of(job)], job.model if job.model in page.clerk.house.desk.models else now
    updates: Updates = {} if name == now else {page.model: name, **for_model(page, name, tab.name)}
    prompt, size, more = values_of(job)
    values = [getattr(more, field) for field in NAMES]
    if more.strength is None:
        values[NAMES.index("strength")] = gr.skip()
    updates |= {page.tabs: gr.update(selected=tab.name), tab.prompt: prompt}
    updates |= dict(zip(tab.fold, values, strict=True)) | hung(page, tab, name, more.lora or {})
    if tab.name == DRAW and size is not None:
        sizes = sizes_of(page.clerk.model(name).spec, page.clerk.say)
        odd = [] if size in {known for _, known in sizes} else [(size.replace("x", "×"), size)]
        updates[tab.extra["size"]] = gr.update(choices=[*sizes, *odd], value=size)
    return updates
