"""A recipe is what a picture carries so that it can be drawn again: as our JSON, and as A1111's infotext.

Input pictures are recorded by the hash of their pixels, their size and the path as it was given; never by
content. What is read back comes from strangers' files, so it is bounded and checked before use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lanting.core.errors import PictureError
from lanting.core.pictures import decode_picture, read_bytes
from lanting.core.types import Recipe, Request, prompts_of

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
LONGEST = 200_000  # characters of JSON; a settled request is far below
USER_COMMENT, IMAGE_DESCRIPTION, EXIF_IFD = 0x9286, 0x010E, 0x8769
PLAIN = ("task", "negative_prompt", "steps", "guidance_scale", "seed", "count", "strength", "quality")


def describe_picture(image: Image) -> dict[str, Any]:
    """{"sha256", "size", "path"?} of a picture's pixels (as RGB, RGBA or grey)."""
    plain = image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGBA")
    head = f"{plain.mode} {plain.width}x{plain.height} ".encode()
    where = cast("dict[str, Any]", image.info).get("path")
    table = {"sha256": hashlib.sha256(head + plain.tobytes()).hexdigest(), "size": list(image.size)}
    return table | ({"path": str(where)} if where else {})


def describe_request(request: Request) -> dict[str, Any]:
    """The request as plain JSON values, pictures by their hash."""
    prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
    table: dict[str, Any] = {"prompt": prompt} | {name: getattr(request, name) for name in PLAIN}
    table["size"] = list(request.size) if request.size else None
    table["images"] = [describe_picture(image) for image in request.images]
    table["mask"] = describe_picture(request.mask) if request.mask is not None else None
    if request.choices:
        table["choices"] = dict(request.choices)
    if request.rewrite:
        table["rewrite"] = True
    if request.tries is not None:
        table["tries"] = request.tries
    for name in ("asked", "unwritten"):
        if (words := getattr(request, name)) is not None:
            table[name] = words if isinstance(words, str) else list(words)
    table["options"] = {k: [*v] if isinstance(v, tuple) else v for k, v in request.options.items()}
    return table


def request_of_picture(request: Request, index: int) -> Request:
    """The request that draws picture `index` of a settled batch alone: its own prompt, its own seed."""
    prompts = prompts_of(request)
    alone = replace(request, prompt=prompts[index // request.count], seed=(request.seed or 0) + index, count=1)
    if request.asked is None:
        return alone
    told = (request.asked, request.unwritten)
    own = [words[index // request.count] or None if isinstance(words, tuple) else words for words in told]
    return replace(alone, asked=own[0], unwritten=own[1])


def restore_request(table: Mapping[str, Any], images: Sequence[Image] = (), mask: Image | None = None) -> Request:
    """The request a recipe describes, over pictures the caller found; `settle` still checks its values."""
    prompt, size = table.get("prompt", ""), table.get("size")
    options: dict[str, Any] = dict(table.get("options") or {})
    return Request(
        prompt=_words(prompt),
        rewrite=True if table.get("rewrite") else None,
        tries=table.get("tries"),
        **{name: _words(table[name]) for name in ("asked", "unwritten") if table.get(name) is not None},
        size=None if size is None else (int(size[0]), int(size[1])),
        images=tuple(images),
        mask=mask,
        options=options,
        choices=dict(table["choices"]) if table.get("choices") else None,
        **{name: table[name] for name in PLAIN if table.get(name) is not None},
    )


def _words(given: Any) -> str | tuple[str, ...]:
    return given if isinstance(given, str) else tuple(str(words) for words in given)


def to_json(recipe: Recipe) -> str:
    """One line of JSON, letters of every script kept readable."""
    table = {
        "lanting": FORMAT,
        "request": dict(recipe.request),
        "model": recipe.model,
        "weights": recipe.weights,
        "task": recipe.task,
        "versions": dict(recipe.versions),
    } | ({"loras": [dict(lora) for lora in recipe.loras]} if recipe.loras else {})
    table |= control_entries(recipe)
    return json.dumps(table, ensure_ascii=False, separators=(",", ":"))


def control_entries(recipe: Recipe) -> dict[str, Any]:
    """The ControlNets that drew along, as JSON has them: one by itself, several in a list."""
    nets = [dict(net) for net in recipe.controlnets]
    return {"controlnets": nets} if len(nets) > 1 else {"controlnet": nets[0]} if nets else {}


def from_json(text: str, name: str = "the picture") -> Recipe:
    """The recipe, or a PictureError when the text is no recipe of ours."""
    try:
        if len(text) > LONGEST:
            raise ValueError(f"longer than {LONGEST:,} characters")
        table: Any = json.loads(text)
        if table["lanting"] != FORMAT:
            raise ValueError("written by another version")
        request: dict[str, Any] = table["request"]
        restore_request(request)  # wrong types fail here
        for place in [*request.get("images", []), *([request["mask"]] if request.get("mask") else [])]:
            if not isinstance(place["sha256"], str) or len(place["size"]) != 2:
                raise ValueError("an input picture without hash or size")
        versions = {str(k): str(v) for k, v in table["versions"].items()}
        loras = tuple(_lora(entry) for entry in table.get("loras", []))
        alone = [table["controlnet"]] if table.get("controlnet") else []
        nets = tuple(_controlnet(entry) for entry in table.get("controlnets") or alone)
        return Recipe(request, str(table["model"]), str(table["weights"]), str(table["task"]), versions, loras, nets)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        reason = (str(error).strip() or type(error).__name__)[:120]
        raise PictureError("the recipe in {name} can't be read: {reason}", name=name, reason=reason) from None


def _lora(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One LoRA of a recipe; wrong types fail here."""
    words = {"name": Path(entry["name"]).name, "sha256": str(entry["sha256"]), "path": str(entry["path"])}
    return words | {"strength": float(entry["strength"])}


def _controlnet(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": Path(entry["name"]).name, "weights": str(entry["weights"]), "path": str(entry["path"])}


def infotext(recipe: Recipe) -> str:
    """The recipe in the form that A1111, Civitai and many bots read from the `parameters` chunk."""
    asked = recipe.request
    prompt = asked.get("prompt", "")
    size = asked.get("size") or (0, 0)
    facts: dict[str, Any] = {
        "Steps": asked.get("steps"),
        "Sampler": "Euler",
        "CFG scale": asked.get("guidance_scale"),
        "Seed": asked.get("seed"),
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": recipe.weights[:10],
        "Model": recipe.model,
        "LoRA": " ".join(f"{Path(one['name']).stem}:{one['strength']:g}" for one in recipe.loras) or None,
        "Quality": None if asked.get("quality") in (None, "exact") else asked["quality"],
        "Denoising strength": asked.get("strength") if asked.get("images") else None,
        "Asked": json.dumps(asked["asked"], ensure_ascii=False) if asked.get("asked") else None,
        "Version": f"lanting {recipe.versions.get('lanting', '')}".strip(),
    }
    lines = [prompt if isinstance(prompt, str) else "\n".join(prompt)]
    if asked.get("negative_prompt"):
        lines.append(f"Negative prompt: {asked['negative_prompt']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None))
    return "\n".join(lines)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe a file carries: a picture (PNG text, JPEG and WebP EXIF) or one with layers (PSD, OpenRaster,
    PowerPoint). Raises PictureError where there is none."""
    from lanting.core import layered  # which writes recipes, and so reads this file first

    data = read_bytes(Path(path))
    text = layered.recipe_text(data, str(path)) if layered.kind_in(data) else _in_picture(data, str(path))
    if not isinstance(text, str) or not text.lstrip().startswith('{"lanting"'):
        raise PictureError(
            "{path} carries no recipe: only pictures drawn by lanting, and not re-saved since, do", path=path
        )
    return from_json(text, str(path))


def _in_picture(data: bytes, name: str) -> Any:
    image = decode_picture(data, name)
    text: Any = cast("dict[str, Any]", image.info).get("lanting")
    if text is None:
        raw: Any = image.getexif().get(IMAGE_DESCRIPTION)
        text = _utf8(raw) if isinstance(raw, str) else None
    return text


def _utf8(text: str) -> str:
    """EXIF text comes back one character a byte; ours was written as UTF-8."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text
