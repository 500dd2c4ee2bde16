"""What a GGUF file says it holds, read from its header alone, without torch, and believed only after checking.

A header is a magic word, a version, two counts, `count` pairs of key and value, and one entry per tensor (name, sides,
type, place). Every length, count and place is compared with the file's size before anything is read or mapped, long
arrays (vocabularies) are counted and passed over, and what is read at all has a ceiling. Rejected: the `gguf` package,
whose reader maps first and checks little, and which says what is wrong in numpy's words.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lanting.core.lang import Phrase
from lanting.nn.blocks import BY_CODE
from lanting.weights.headers import LARGEST_HEADER, LARGEST_SIZE, TensorInfo, damaged, unreadable

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 had counts of another width and is not in use any more
ALIGNMENT = 32  # bytes; where no metadata says otherwise
MOST_TENSORS, MOST_KEYS, MOST_SIDES = 1 << 16, 1 << 14, 8
LONGEST_ARRAY = 1 << 20  # items; vocabularies have 150,000
KEPT_ITEMS = 256  # of arrays longer than this only the length is kept
LONGEST_NAME, LONGEST_TEXT = 512, 1 << 20  # bytes
STEP = 1 << 16  # bytes read at a time

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Long:
    """An array that was passed over: only its length is known."""

    count: int


Value = int | float | bool | str | tuple[int | float | bool | str, ...] | Long


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Checked metadata and tensors. Shapes are in torch's order; `dtype` is a name of `nn.blocks.TYPES`."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """`general.architecture`, empty where the file does not say (stable-diffusion.cpp leaves it out)."""
        found = self.metadata.get("general.architecture")
        return found if isinstance(found, str) else ""

    def number(self, key: str) -> float | None:
        """A finite number of the metadata; None where there is none."""
        found = self.metadata.get(key)
        if isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found):
            return found
        return None


def is_gguf(path: Path | str) -> bool:
    """Whether a file begins like a GGUF file, whatever its name."""
    try:
        with Path(path).open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path | str) -> GgufHeader:
    """The header of a GGUF file; a ModelError says what is wrong."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return parse(file, path.stat().st_size, path)
    except OSError as error:
        raise unreadable(path, error) from None


def parse(file: BinaryIO, size: int, path: Path) -> GgufHeader:
    """The header at the beginning of `file`, which has `size` bytes; `path` is for messages."""
    source = _Source(file, size, path)
    if (magic := source.take(4, Phrase("its first word"))) != MAGIC:
        raise damaged(path, "it begins with {magic} and not with GGUF", magic=repr(magic))
    (version,) = source.numbers("I")
    if version not in VERSIONS:
        if version & 0xFFFF == 0:
            raise damaged(path, "its numbers are big-endian, which we don't read")
        raise damaged(path, "it is of version {version}, and we read 2 and 3", version=version)
    tensors, keys = source.numbers("QQ")
    if tensors > MOST_TENSORS or tensors * 24 > size:
        raise damaged(path, "it claims {count:,} tensors in {size:,} bytes", count=tensors, size=size)
    if keys > MOST_KEYS or keys * 13 > size:
        raise damaged(path, "it claims {count:,} notes in {size:,} bytes", count=keys, size=size)
    metadata: dict[str, Value] = {}
    for _ in range(keys):
        key = source.text(LONGEST_NAME, Phrase("the name of a note"))
        if key in metadata:
            raise damaged(path, "it has the note {key} twice", key=key)
        metadata[key] = _value(source, key)
    found = _tensors(source, tensors, _alignment(metadata, path))
    return GgufHeader(metadata, found)


class _Source:
    """The file's beginning, read forwards in steps; every read is checked against the file's size first."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.file, self.size, self.path = file, size, path
        self.buffer = b""
        self.at = 0  # in the buffer
        self.before = 0  # bytes of the file before the buffer

    @property
    def position(self) -> int:
        return self.before + self.at

    def need(self, count: int, what: str) -> None:
        """Make `count` bytes available at `at`."""
        if len(self.buffer) - self.at >= count:
            return
        if self.position + count > self.size:
            raise damaged(self.path, "{what} goes on after its end at byte {size:,}", what=what, size=self.size)
        if self.position + count > LARGEST_HEADER:
            raise damaged(self.path, "its header is longer than {most:,} bytes", most=LARGEST_HEADER)
        rest = self.buffer[self.at :]
        more = self.file.read(max(STEP, count - len(rest)))
        self.before, self.at, self.buffer = self.position, 0, rest + more
        if len(self.buffer) < count:  # the file shrank while we read it
            raise damaged(self.path, "{what} is cut short", what=what)

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        self.at += count
        return self.buffer[self.at - count : self.at]

    def skip(self, count: int, what: str) -> None:
        """Pass over bytes, in steps, so that nothing long is held."""
        if self.position + count > self.size:
            raise damaged(self.path, "{what} goes on after its end at byte {size:,}", what=what, size=self.size)
        while count:
            step = min(count, STEP)
            self.take(step, what)
            count -= step

    def skip_texts(self, count: int, what: str) -> None:
        """Pass over many texts; a vocabulary's are mostly in the buffer already, which is worth the direct way."""
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if len(self.buffer) - self.at < 8:
                self.need(8, what)
            (length,) = unpack(self.buffer, self.at)
            self.at += 8
            if length <= len(self.buffer) - self.at:
                self.at += length
            else:
                self.skip(length, what)

    def numbers(self, form: str, what: str = Phrase("its header")) -> tuple[Any, ...]:
        """Little-endian numbers, as `struct` names them."""
        layout = struct.Struct("<" + form)
        self.need(layout.size, what)
        self.at += layout.size
        return layout.unpack_from(self.buffer, self.at - layout.size)

    def text(self, longest: int, what: str) -> str:
        (length,) = self.numbers("Q", what)
        if length > longest or length > self.size:
            raise damaged(self.path, "{what} claims {length:,} letters", what=what, length=length)
        try:
            found = self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise damaged(self.path, "{what} is not UTF-8", what=what) from None
        if longest == LONGEST_NAME and not (found and found.isprintable()):
            raise damaged(self.path, "{what} is empty or has unprintable letters", what=what)
        return found


def _value(source: _Source, key: str) -> Value:
    (kind,) = source.numbers("I")
    if kind == ARRAY:
        return _array(source, key)
    if kind == TEXT:
        return source.text(LONGEST_TEXT, Phrase("the note {key}", key=key))
    return source.numbers(_form(source, kind, key))[0]


def _form(source: _Source, kind: int, key: str) -> str:
    if kind not in NUMBERS:
        raise damaged(source.path, "the note {key} is of the unknown type {kind}", key=key, kind=kind)
    return NUMBERS[kind]


def _array(source: _Source, key: str) -> Value:
    """Short ones as they are; longer ones as their length."""
    kind, count = source.numbers("IQ")
    if kind == ARRAY:
        raise damaged(source.path, "the note {key} is an array of arrays", key=key)
    if count > LONGEST_ARRAY:
        raise damaged(source.path, "the note {key} claims {count:,} items", key=key, count=count)
    what = Phrase("the note {key}", key=key)
    if kind == TEXT:
        if count <= KEPT_ITEMS:
            return tuple(source.text(LONGEST_TEXT, what) for _ in range(count))
        source.skip_texts(count, what)
        return Long(count)
    form = _form(source, kind, key)
    if count <= KEPT_ITEMS:
        return source.numbers(f"{count}{form}", what)
    source.skip(count * struct.calcsize("<" + form), what)
    return Long(count)


def _alignment(metadata: Mapping[str, Value], path: Path) -> int:
    """Bytes; every tensor begins at a multiple of it."""
    found = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 < found <= 1 << 20 or found & (found - 1):
        raise damaged(path, "its alignment is {found} and not a power of two", found=repr(found))
    return found


def _tensors(source: _Source, count: int, alignment: int) -> dict[str, TensorInfo]:
    """All entries, checked one by one and then together, in the order of their bytes."""
    path = source.path
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}  # type, shape, place in the data, size
    for _ in range(count):
        name = source.text(LONGEST_NAME, Phrase("the name of a tensor"))
        if name in entries:
            raise damaged(path, "it has the tensor {name} twice", name=name)
        entries[name] = _entry(source, name, alignment)
    begin = -(-source.position // alignment) * alignment
    end = 0
    found: dict[str, TensorInfo] = {}
    for name, (dtype, shape, place, size) in sorted(entries.items(), key=lambda item: (item[1][2], item[1][3])):
        if place < end:
            raise damaged(path, "{name} overlaps another tensor", name=name)
        end = place + size
        if begin + end > source.size:
            raise damaged(
                path,
                "{name} ends at byte {end:,} and the file at {size:,}, so it is cut short",
                **{"name": name, "end": begin + end, "size": source.size},
            )
        found[name] = TensorInfo(dtype, shape, begin + place, begin + end)
    return found


def _entry(source: _Source, name: str, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
    path = source.path
    (count,) = source.numbers("I")
    if count > MOST_SIDES:
        raise damaged(path, "{name} claims {count} sides", name=name, count=count)
    sides = source.numbers(f"{count}Q")
    kind, place = source.numbers("IQ")
    if max(sides, default=1) > LARGEST_SIZE or math.prod(sides) > LARGEST_SIZE:
        raise damaged(path, "{name} has no usable shape", name=name)
    if kind not in BY_CODE:
        raise damaged(path, "{name} is of the unknown type {kind}", name=name, kind=kind)
    block = BY_CODE[kind]
    shape = tuple(reversed(sides))
    if block.packed and (not shape or not shape[-1] or shape[-1] % block.values):
        raise damaged(
            path,
            "{name} is {kind} and its shape {shape} is no whole number of blocks",
            **{"name": name, "kind": block.name, "shape": shape},
        )
    if place % alignment or place > source.size:
        raise damaged(path, "{name} begins at an impossible place ({place:,})", name=name, place=place)
    return block.name, shape, place, math.prod(shape) // block.values * block.size
