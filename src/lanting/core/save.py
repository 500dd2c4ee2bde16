"""Writing pictures: where to, under which name, never over another file, never half.

A picture is written under a temporary name in the same folder and then linked to its own, which fails if that
name was taken meanwhile; so two runs at once can't overwrite one another. Places are checked before any work
starts: a picture that took minutes must not die of a full or read-only folder's first write.
"""

from __future__ import annotations

import os
import re
import secrets
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lanting.core.errors import OutputError
from lanting.core.files import beside, put, unwritable
from lanting.core.layered import KINDS, pack, require
from lanting.core.recipe import EXIF_IFD, IMAGE_DESCRIPTION, USER_COMMENT, infotext, to_json
from lanting.core.stack import layer_names
from lanting.core.types import Recipe

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LONGEST_NAME = 60  # bytes of the prompt in a file name: any file system, and still readable
EXIF_ROOM = 65_000  # JPEG keeps EXIF in one segment of 64 KB


@dataclass(frozen=True, slots=True)
class Place:
    """Where one picture goes; `given` names are never changed, others move on to -2, -3, ..."""

    path: Path
    given: bool
    force: bool


def plan_places(output: str | None, names: list[str], force: bool = False) -> list[Place]:
    """One place per picture; everything that can be refused is refused here.

    output  a file (one picture keeps the name, several get -1, -2, ...), a folder, or None for the current one
    names   the name each picture would like (`name_for`), used unless a file was given
    """
    target = Path(output or ".")
    if _is_folder(output):
        check_folder(target)
        return [Place(target / name, given=False, force=force) for name in names]
    if target.suffix.lower() not in (*SUFFIXES, *KINDS):
        raise OutputError(
            "{path} has no ending we write: use .png, .jpg or .webp, for layers in one file .psd, .ora or .pptx, "
            "or name a folder that exists",
            path=output,
        )
    check_folder(target.parent)
    numbered = (
        [target]
        if len(names) == 1
        else [target.with_name(f"{target.stem}-{number}{target.suffix}") for number in range(1, len(names) + 1)]
    )
    if not force and (taken := [path for path in numbered if path.exists()]):
        raise OutputError("{path} exists already: choose another name, or add --force", path=taken[0])
    if taken := [path for path in numbered if path.is_dir()]:
        raise OutputError("{path} is a folder: choose another name", path=taken[0])
    return [Place(path, given=True, force=force) for path in numbered]


def name_beside(picture: Path, word: str, ending: str, force: bool) -> Path:
    """PICTURE-WORD beside a picture; where that is taken, the first of -2, -3, ... that nothing is called, unless
    `force` overwrites it."""
    path = picture.with_name(f"{picture.stem}-{word}{ending}")
    numbers = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return next(one for one in chain([path], numbers) if force or not one.exists())


def _is_folder(output: str | None) -> bool:
    return output is None or output.endswith(("/", os.sep)) or Path(output).is_dir()


def named_by(recipes: Sequence[Recipe]) -> list[tuple[str, int]]:
    """What pictures are named from: the words as they were asked, and the seed that was drawn with."""
    asked = [one.request for one in recipes]
    return [(str(one.get("asked") or one["prompt"]), int(one["seed"])) for one in asked]


def places_for(
    output: str | None, words: Sequence[tuple[str, int]], layers: int = 1, title: str = "", force: bool = False
) -> list[Place]:
    """Places for what one request draws: one for each picture, or for each of its layers.

    words  (prompt, seed) of every picture; title stands in for an empty prompt
    layers  of each picture; a .psd, .ora or .pptx takes all of them in one place

    Raises OutputError for everything that `save_all` would refuse because of its ending.
    """
    ending = "" if output is None or _is_folder(output) else Path(output).suffix.lower()
    if ending in KINDS:
        require(ending)
        layers = 1
    elif layers > 1 and SUFFIXES.get(ending) == "JPEG":
        raise OutputError("{path}: JPEG has no transparency; use .png or .webp", path=output)
    return plan_places(output, names_for(words, layers, title), force)


def save_all(images: Sequence[Image], places: Sequence[Place], recipes: Sequence[Recipe]) -> tuple[Path, ...]:
    """Write what `places_for` found places for; the paths they got."""
    each = len(images) // len(places)
    if places[0].path.suffix.lower() not in KINDS:
        return tuple(map(save_picture, images, places, recipes))
    firsts = range(0, len(images), each)
    groups = zip(firsts, places, strict=True)
    return tuple(save_layers(images[first : first + each], place, recipes[first]) for first, place in groups)


def save_layers(images: Sequence[Image], place: Place, recipe: Recipe | None = None) -> Path:
    """Writes pictures of one size, the lowest first, as the layers of one file and returns the path it got."""
    data = pack(place.path.suffix.lower(), images, layer_names(len(images)), recipe)
    return _written(place, lambda part: part.write_bytes(data))


def name_for(prompt: str, seed: int, suffix: str = ".png") -> str:
    """A file name from the words: `a-blue-sign-7.png`. Letters and digits of any script; safe on every
    system."""
    words = unicodedata.normalize("NFC", prompt).lower()
    stem = re.sub(r"[^\w]+|_+", "-", words).strip("-")
    while len(stem.encode()) > LONGEST_NAME:
        head, dash, _ = stem.rpartition("-")
        stem = head if dash and len(head) > 8 else stem[:-1]
    return f"{stem.strip('-') or 'picture'}-{seed}{suffix}"


def names_for(words: Sequence[tuple[str, int]], layers: int = 1, title: str = "") -> list[str]:
    """One file name per picture of a batch, from (prompt, seed) each; layers are numbered from the lowest.

    title  stands in for an empty prompt
    """
    names: list[str] = []
    for prompt, seed in words:
        name = name_for(prompt.strip() or title, seed)
        numbers = range(1, layers + 1)
        names += [name] if layers == 1 else [name.replace(".png", f"-layer-{number}.png") for number in numbers]
    return names


def check_folder(folder: Path) -> None:
    """Raises OutputError unless a file can be made in the folder; tries it, since permissions lie to root."""
    if not folder.exists():
        raise OutputError("the folder {folder} does not exist: make it first, or write elsewhere", folder=folder)
    if not folder.is_dir():
        raise OutputError("{folder} is a file, not a folder", folder=folder)
    probe = folder / f".lanting-{secrets.token_hex(6)}.part"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise OutputError(
            "nothing can be written to {folder}: {reason}; choose another place with -o",
            **{"folder": folder, "reason": error.strerror or error},
        ) from None


def save_picture(image: Image, place: Place | str | Path, recipe: Recipe | None = None) -> Path:
    """Writes the picture with its recipe and returns the path it got. PNG and WebP lossless, JPEG quality 95.

    A plain path counts as given and is not overwritten. Raises OutputError.
    """
    if not isinstance(place, Place):
        place = Place(Path(place), given=True, force=False)
    kind = SUFFIXES.get(place.path.suffix.lower())
    if kind is None:
        raise OutputError("{path} has no ending we write: use .png, .jpg or .webp", path=place.path)
    if kind == "JPEG" and image.mode not in ("RGB", "L"):
        raise OutputError("{path}: JPEG has no transparency; use .png or .webp", path=place.path)
    return _written(place, lambda part: image.save(part, format=kind, **how_to_save(kind, recipe)))


def _written(place: Place, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file beside the place, which then gets its name."""
    part = beside(place.path)
    try:
        write(part)
        return _publish(part, place)
    except OSError as error:
        raise unwritable(place.path, error) from None
    finally:
        part.unlink(missing_ok=True)


def _publish(part: Path, place: Place) -> Path:
    """The finished file gets its name; a taken name is refused (given) or counted on (ours)."""
    if place.force:
        put(part, place.path)
        return place.path
    for number in range(1, 10_000):
        path = place.path if number == 1 else place.path.with_stem(f"{place.path.stem}-{number}")
        try:
            _take(part, path)
            return path
        except FileExistsError:
            if place.given:
                raise OutputError("{path} exists already: choose another name, or add --force", path=path) from None
    raise OutputError("{path} and 9,999 names like it are taken: choose another folder", path=place.path)


def _take(part: Path, path: Path) -> None:
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    # file systems without hard links (FAT, some network shares): claim the name, then replace
    except OSError:
        path.touch(exist_ok=False)
        put(part, path)


def how_to_save(kind: str, recipe: Recipe | None) -> dict[str, Any]:
    """Pillow's save arguments for the format, the recipe included."""
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        chunks = PngInfo()
        if recipe is not None:
            chunks.add_text("parameters", infotext(recipe))
            chunks.add_text("lanting", to_json(recipe))
        return {"pnginfo": chunks}
    shape: dict[str, Any] = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    if recipe is None or (kind == "JPEG" and len(to_json(recipe).encode()) > EXIF_ROOM):
        return shape  # the picture matters more than a recipe that has no room in it
    return shape | {"exif": _exif(recipe)}


def _exif(recipe: Recipe) -> Exif:
    """Infotext where A1111 looks for it (UserComment), ours in ImageDescription; ours alone if both are too
    long."""
    from PIL.Image import Exif

    ours, theirs = to_json(recipe).encode(), b"UNICODE\0" + infotext(recipe).encode("utf-16-be")
    exif = Exif()
    exif[IMAGE_DESCRIPTION] = ours
    if len(ours) + len(theirs) < EXIF_ROOM:
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = theirs
    return exif
