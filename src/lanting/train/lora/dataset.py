"""The pictures somebody wants to teach, their captions and, for edits, the pictures each was made from.

A folder is read in the ways that people's folders come in:
    metadata.jsonl   a line a picture: {"file_name", "text" (or "prompt", "caption"), "references": [...]}
    NAME.png         with its caption in NAME.txt beside it, and what it was made from in references/NAME.png, or
                     references/NAME-1.png, NAME-2.png, ... for several
Everything is looked at before anything is computed: a run must not end after an hour because of one caption.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lanting.core.errors import RequestError
from lanting.core.lang import explain
from lanting.core.pictures import open_picture
from lanting.specs import Defaults
from lanting.specs.settle import check_text
from lanting.specs.sizes import fit_area

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA, REFERENCES = "metadata.jsonl", "references"
WORDS = ("text", "prompt", "caption")
SMALLEST = 16  # pixels: a token of the transformer's
COARSE = 512 * 512  # square pixels from which on sizes are multiples of 32, so that pictures share them

Size = tuple[int, int]  # width, height


@dataclass(frozen=True, slots=True)
class Example:
    """One picture to be learnt, at the size at which it will be."""

    picture: Path
    caption: str
    size: Size
    references: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class DatasetOptions:
    """What a person may say about all examples.

    trigger   a word that every caption begins with, unless it has it anywhere
    caption   of pictures that have none; None: a picture without one is an error
    side      of the square whose area no picture exceeds; None: 1024, or the release's largest size if that is less
    """

    trigger: str = ""
    caption: str | None = None
    side: int | None = None


def read_folder(folder: Path, options: DatasetOptions, own: Defaults) -> list[Example]:
    """All examples, by file name. Raises RequestError in one sentence for whatever can't be trained with."""
    if not folder.is_dir():
        raise RequestError("{folder} is no folder: give one with pictures and their captions", folder=folder)
    rows = list(from_metadata(folder) if (folder / METADATA).is_file() else from_files(folder))
    if not rows:
        raise RequestError(
            "{folder} holds no pictures: put PNG, JPEG or WebP files there, each with its caption in a .txt beside it",
            folder=folder,
        )
    examples = [example(picture, caption, references, options, own) for picture, caption, references in rows]
    counts = {len(one.references) for one in examples}
    if len(counts) > 1:
        odd = next(one for one in examples if not one.references) if 0 in counts else examples[0]
        raise RequestError(
            "{picture} has {count} references and others have another number: give each picture as many",
            **{"picture": odd.picture.name, "count": len(odd.references)},
        )
    return examples


Row = tuple[Path, str | None, tuple[Path, ...]]


def from_files(folder: Path) -> Iterator[Row]:
    """Pictures with a text file beside each."""
    sources = by_stem(folder / REFERENCES)
    for picture in sorted(path for path in folder.iterdir() if is_picture(path) and path.is_file()):
        words = picture.with_suffix(".txt")
        yield picture, read_caption(words) if words.is_file() else None, sources.get(picture.stem, ())


def is_picture(path: Path) -> bool:
    """By its name; hidden ones are no pictures, such as the ._NAME.png that macOS leaves beside each."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def by_stem(folder: Path) -> Mapping[str, tuple[Path, ...]]:
    """Name of a picture -> what it was made from: NAME.png, or NAME-1.png, NAME-2.png, ... in their order."""
    found: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_picture(path):
            found[path.stem].append((0, path))
            if match := re.fullmatch(r"(.+)-(\d{1,2})", path.stem):
                found[match[1]].append((int(match[2]), path))
    return {stem: tuple(path for _, path in sorted(paths)) for stem, paths in found.items()}


def from_metadata(folder: Path) -> Iterator[Row]:
    """Pictures as a list names them. Raises RequestError with the line that can't be read."""
    for number, line in enumerate(read_text(folder / METADATA).split("\n"), 1):  # a caption may hold U+2028
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line)
            beside = row.get("references") or []
            names = [row["file_name"], *([beside] if isinstance(beside, str) else beside)]
            paths = [inside(folder, name) for name in names]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RequestError(
                'line {number} of {file} is not understood: write {{"file_name": "a.png", "text": "..."}}',
                **{"number": number, "file": METADATA},
            ) from None
        words = next((str(row[key]) for key in WORDS if row.get(key)), None)
        yield paths[0], words, tuple(paths[1:])


def inside(folder: Path, name: str) -> Path:
    """A file of the folder. Raises ValueError for any other place: a list from elsewhere names no files of ours."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(name)
    return path


def read_caption(path: Path) -> str:
    """A text file's words on one line. Raises RequestError."""
    return " ".join(read_text(path).split())


def read_text(path: Path) -> str:
    """A file of people's, with or without a mark in front. Raises RequestError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise RequestError("{path} can't be read: save it as UTF-8 text", path=path) from None


def example(
    picture: Path, caption: str | None, references: tuple[Path, ...], options: DatasetOptions, own: Defaults
) -> Example:
    """A row, its pictures opened once to see that they can be. Raises RequestError or PictureError."""
    words = caption or options.caption
    if words is None and not options.trigger:
        raise RequestError(
            "{picture} has no caption: write one to {file}, or give one for all with --caption",
            **{"picture": picture.name, "file": picture.with_suffix(".txt").name},
        )
    words = words or ""
    if options.trigger and options.trigger not in words:
        words = f"{options.trigger}, {words}" if words else options.trigger
    try:
        check_text(words)
    except RequestError as error:
        raise RequestError("{name}: {reason}", name=picture.name, reason=explain(error)) from None
    seen = open_picture(picture)
    if min(seen.size) < SMALLEST:
        raise RequestError(
            "{picture} is {width}x{height}, too small to learn from ({smallest} pixels a side at least): remove it",
            **{"picture": picture.name, "width": seen.width, "height": seen.height, "smallest": SMALLEST},
        )
    for reference in references:
        open_picture(reference)
    return Example(picture, words, size_for(seen.size, options.side, own), references)


def size_for(size: Size, side: int | None, own: Defaults) -> Size:
    """The size a picture of (width, height) is learnt at: its own ratio, no larger than it is."""
    largest = max(width * height for width, height in (own.size, *own.sizes.values()))
    most = side * side if side else min(1024 * 1024, largest)
    area = min(size[0] * size[1], most)
    step = max(own.multiple, 32 if area >= COARSE else 16)
    return fit_area(area, size[0] / size[1], step)


def batches(kinds: Sequence[Hashable], count: int, seed: int, epoch: int) -> list[list[int]]:
    """One pass over all examples in a random order, `count` at a time where that many are of one kind.

    kinds  of each example what those of one batch must have in common
    """
    rng = random.Random(f"{seed} {epoch}")
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index in rng.sample(range(len(kinds)), len(kinds)):
        groups[kinds[index]].append(index)
    made = [group[i : i + count] for group in groups.values() for i in range(0, len(group), count)]
    rng.shuffle(made)
    return made
