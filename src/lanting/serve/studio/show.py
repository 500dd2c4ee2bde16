"""What the page shows of a job, as HTML. Every word that came from somewhere is escaped; pictures are addresses of
`/api/jobs`, so they are seen by their owner alone and no file is copied or written twice.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib.util import find_spec
from typing import Any

from lanting.core.layered import KINDS, PPTX
from lanting.serve.jobs import CANCELLED, DONE, FAILED, RUNNING, Event, Job
from lanting.serve.layered import layers_in
from lanting.serve.state import Place
from lanting.serve.studio.forms import DRAW, EDIT, LAYERS, tab_of
from lanting.serve.studio.words import Say, retold

SIGNS = {  # what nano draws well, so that a first click is a good one
    "en": (
        'a blue sign that says "HELLO"',
        'a yellow sign, black letters, "TAXI"',
        'a white sign with black serif letters, "Garden" "Club"',
        "红色招牌，黄色的字“恭喜发财”",
    ),
    "zh": (
        "蓝色招牌，白色的字“兰亭”",
        "红色海报，黄色的字“恭喜发财”“新年快乐”",
        "白色的牌子，黑色楷体字“平安”",
        'a blue sign that says "HELLO"',
    ),
}
SCENES = {  # for models that draw anything
    "en": (
        "a tea house in the mist, ink on paper",
        'a bakery window at dawn, a chalkboard says "Fresh Bread"',
        "a red fox asleep in tall grass, photograph",
        "a poster of a lighthouse, flat colours",
    ),
    "zh": (
        "雾中的茶馆，水墨画",
        "清晨的面包店橱窗，黑板上写着“今日新鲜”",
        "高草里睡着的红狐狸，摄影",
        "灯塔海报，平涂色块",
    ),
}
CHANGES = {
    "en": ("make the background red", "make the letters yellow", "add a border"),
    "zh": ("把背景改成红色", "把文字改成黄色", "加上边框"),
}


def button(do: str, words: str, main: bool = False, **data: object) -> str:
    """One that the page's script turns into an event."""
    told = "".join(f' data-{name}="{escape(str(value))}"' for name, value in data.items())
    return f'<button type="button" class="act{" main" if main else ""}" data-do="{do}"{told}>{escape(words)}</button>'


def empty(tab: str, language: str, say: Say, laid: bool = False, signs: bool = True) -> str:
    """Before anything was asked. `laid`: a picture is on the canvas; `signs`: the model draws nothing else."""
    head = {
        DRAW: say("What shall it be?"),
        EDIT: say("What shall change?") if laid else say("Drop a picture above, and say what should change."),
        LAYERS: say("Drop a picture, and it is taken apart into layers."),
    }[tab]
    lines = {DRAW: SIGNS if signs else SCENES, EDIT: CHANGES}.get(tab, {}).get(language, ())
    chips = "".join(button("fill", one, text=one) for one in lines)
    return f'<div class="stage empty"><p>{escape(head)}</p><div class="chips">{chips}</div></div>'


def trouble(sentence: str) -> str:
    return f'<div class="stage trouble" role="alert"><p>{escape(sentence)}</p></div>'


def waiting(job: Job, place: Place | None, say: Say, crew: Mapping[str, int] | None = None) -> str:
    """In the queue; `crew` as `Model.crew`, of which one tells nothing."""
    words = say("In the queue")
    if place is not None and place.ahead:
        words = say("In the queue, {count} before you", count=place.ahead)
    words += left(None if place is None else place.eta, say)
    if crew and crew["count"] > 1:
        words += say("; {ready} of {count} workers draw", ready=crew["ready"], count=crew["count"])
    return growing(job, "", words, 0.0, say)


def drawing(job: Job, event: Event, say: Say) -> str:
    """A step was made."""
    step, steps, spent = (event.body[name] for name in ("step", "steps", "seconds"))
    ahead = spent / step * (steps - step) if step else None
    words = say("Step {step} of {steps}", step=step, steps=steps) + left(ahead, say)
    picture = ""
    if event.preview is not None:
        data = base64.b64encode(event.preview).decode("ascii")
        picture = f'<img class="growing" alt="" src="data:image/jpeg;base64,{data}">'
    return growing(job, picture, words, step / max(steps, 1), say)


def growing(job: Job, picture: str, words: str, done: float, say: Say) -> str:
    width, height = shape(job)
    return (
        f'<div class="stage busy" style="--w:{width};--h:{height};--done:{100 * done:.0f}%">'
        f'<div class="paper">{picture}</div><div class="bar" role="progressbar" aria-valuenow="{100 * done:.0f}">'
        f'<i></i></div><div class="below"><span class="told" aria-live="polite">{escape(words)}</span>'
        f"{button('cancel', say('Cancel'), job=job.id)}</div></div>"
    )


def left(seconds: float | None, say: Say) -> str:
    """Seconds to go, as the end of a sentence."""
    if seconds is None:
        return ""
    if seconds < 1:
        return say(", almost done")
    if seconds < 90:
        return say(", about {count} s left", count=round(seconds))
    return say(", about {count} min left", count=round(seconds / 60))


def shape(job: Job) -> tuple[int, int]:
    """(width, height) as far as they are known."""
    request = job.asked["request"]
    if job.outcome:
        width, height = job.outcome["images"][0]["size"]
        return int(width), int(height)
    if request["size"] or request["images"]:
        width, height = request["size"] or request["images"][0]["size"]
        return int(width), int(height)
    return 7, 3


def ended(job: Job, say: Say, before: str | None = None, language: str = "en") -> str:
    """A job that is over."""
    if job.state == CANCELLED:
        return f'<div class="stage empty"><p>{escape(say("Cancelled."))}</p></div>'
    if job.state == FAILED:
        return trouble(retold(say, job.error or {}))
    return finished(job, say, before, language)


def address(job: Job, index: int) -> str:
    return f"/api/jobs/{job.id}/images/{index}"


def finished(job: Job, say: Say, before: str | None, language: str = "en") -> str:
    """The pictures, the first one large; before and after where it was an edit. `language`: of layers in files."""
    assert job.outcome is not None
    width, height = shape(job)
    count, tab = len(job.outcome["images"]), tab_of(job)
    alt, first = escape(job.prompt), address(job, 0)
    if tab == EDIT and before is not None:
        paper = compare(before, first, alt, say)
    else:
        paper = f'<img class="shown" src="{first}" alt="{alt}">'
    thumbs = ""
    if count > 1:
        thumbs = '<div class="thumbs">' + "".join(thumb(job, index, tab, say) for index in range(count)) + "</div>"
    acts = actions(job, tab, say, files(job, say, language) if tab == LAYERS else "")
    clear = " clear" if any(one["mode"] == "RGBA" for one in job.outcome["images"]) else ""
    return (
        f'<div class="stage done{clear}" data-job="{job.id}" data-index="0" style="--w:{width};--h:{height}">'
        f'<div class="paper">{paper}</div>{thumbs}<div class="below">{facts(job, say)}{acts}</div>'
        f"{written(job, say)}{read(job, say)}</div>"
    )


def compare(before: str, after: str, alt: str, say: Say) -> str:
    """Two pictures on one place and a handle between them."""
    return (
        f'<div class="compare"><img src="{before}" alt="{escape(say("Before"))}"><img class="after shown" '
        f'src="{after}" alt="{alt}"><input type="range" min="0" max="100" value="50" '
        f'aria-label="{escape(say("Before and after"))}"><b>{escape(say("Before"))}</b>'
        f"<b>{escape(say('After'))}</b></div>"
    )


def thumb(job: Job, index: int, tab: str, say: Say) -> str:
    name = say("layer {number}", number=index + 1) if tab == LAYERS else say("picture {number}", number=index + 1)
    here = ' aria-current="true"' if index == 0 else ""
    return (
        f'<button type="button" class="thumb" data-show="{index}"{here} aria-label="{escape(name)}" '
        f'title="{escape(name)}"><img src="{address(job, index)}" alt=""></button>'
    )


def facts(job: Job, say: Say) -> str:
    """One quiet line."""
    outcome: Mapping[str, Any] = job.outcome or {}
    width, height = shape(job)
    seed = outcome["recipes"][0]["request"]["seed"]
    spent = sum(value for name, value in outcome["seconds"].items() if name != "load")
    words = say("{size} · seed {seed} · {spent} s", size=f"{width}×{height}", seed=seed, spent=f"{spent:.1f}")
    return f'<span class="told">{escape(words)}</span>'


def written(job: Job, say: Say) -> str:
    """The words that were drawn, where they are others than what was asked."""
    drawn = (job.outcome or {})["recipes"][0]["request"]
    if drawn.get("asked") in (None, drawn.get("prompt")):
        return ""
    return f'<p class="hint">{escape(say("prompt: {prompt}", prompt=drawn["prompt"]))}</p>'


def read(job: Job, say: Say) -> str:
    """What is read in the pictures, where their words were read back."""
    lines = []
    for index, image in enumerate((job.outcome or {})["images"], 1):
        if (text := image.get("text")) is None:
            continue
        read = " / ".join(text["read"]) or "-"
        told = say("picture {number} reads {lines}", number=index, lines=read)
        missing = "" if text["right"] else say("; not all that was asked for")
        lines.append(f'<p class="hint read{"" if text["right"] else " wrong"}">{escape(told + missing)}</p>')
    return "".join(lines)


def actions(job: Job, tab: str, say: Say, further: str = "") -> str:
    """What can be done with a finished picture; `further` ways of saving it."""
    save = f'<a class="act" download="{job.id}-1.png" href="{address(job, 0)}">{escape(say("Save"))}</a>'
    able = [button("again", say("Another like it"), job=job.id, fresh=1)] if tab != LAYERS else []
    able += [button("again", say("Draw it again"), job=job.id), button("edit", say("Edit it"), job=job.id), save]
    return f'<span class="acts">{"".join(able)}{further}</span>'


def files(job: Job, say: Say, language: str) -> str:
    """All layers as one file: a link for each kind that can be written here. The server names the files."""
    links = []
    for kind in (ending[1:] for ending in KINDS if ending != PPTX or find_spec("pptx")):
        told, name = say("All layers as one {kind} file", kind=kind.upper()), kind.upper()
        where = f"/api/jobs/{job.id}/layers/0?format={kind}&amp;language={language}"
        links.append(
            f'<a class="act" download data-each="{layers_in(job)}" title="{escape(told)}" href="{where}">{name}</a>'
        )
    return "".join(links)


def gallery(jobs: Sequence[Job], words: str, most: int, say: Say) -> str:
    """The caller's jobs as tiles, the newest first."""
    if not jobs:
        told = say("Nothing is found for “{words}”.", words=words) if words else say("Your pictures will be here.")
        return f'<p class="nothing">{escape(told)}</p>'
    tiles = "".join(tile(job, say) for job in jobs[:most])
    older = button("more", say("Older"), most=most + 24) if len(jobs) > most else ""
    return f'<div class="tiles">{tiles}</div>{older}'


AGAIN = '<path d="M13 8a5 5 0 1 1-1.500-3.600M13 2v3h-3"/>'
PENCIL = '<path d="M3 13l.700-3L10.500 3.200l2.300 2.300L6 12.300z"/>'


def quick(do: str, job: Job, words: str, path: str) -> str:
    """A small button on a tile."""
    return (
        f'<button type="button" data-do="{do}" data-job="{job.id}" data-tab="{tab_of(job)}" '
        f'aria-label="{escape(words)}" title="{escape(words)}">'
        f'<svg viewBox="0 0 16 16" aria-hidden="true">{path}</svg></button>'
    )


def tile(job: Job, say: Say) -> str:
    told, acts = escape(job.prompt or say("No words")), ""
    head = f'<button type="button" class="open" data-do="pick" data-job="{job.id}" data-tab="{tab_of(job)}">'
    if job.state == DONE and job.outcome:
        count = len(job.outcome["images"])
        badge = f"<b>{count}</b>" if count > 1 else ""
        inside = f'<img loading="lazy" src="{address(job, 0)}" alt="{told}">{badge}'
    else:
        words = {FAILED: say("Failed"), CANCELLED: say("Cancelled"), RUNNING: say("Being drawn")}
        state = words.get(job.state) or say("In the queue")
        inside = f"<span>{escape(state)}</span><small>{told}</small>"
    if job.over:
        acts = quick("again", job, say("Draw it again"), AGAIN)
    if job.state == DONE:
        acts += quick("edit", job, say("Edit it"), PENCIL)
    acts = f'<div class="quick">{acts}</div>' if acts else ""
    return f'<div class="tile {job.state}" title="{told}">{head}{inside}</button>{acts}</div>'
