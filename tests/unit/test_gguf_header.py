"""GGUF headers: read right, and never believed. Thousands of mutations, and hostile ones by hand."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from lanting.core.errors import ModelError
from lanting.nn.blocks import TYPES
from lanting.weights.gguf import GgufHeader, Long, is_gguf, parse, read_gguf
from lanting.weights.gguf_names import text_config, vision_config
from lanting.weights.gguf_view import view

WHERE = Path("some.gguf")


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def note(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + items


def entry(name: str | bytes, sides: tuple[int, ...], kind: int, place: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, place)


NOTES = (
    note("general.architecture", 8, text("qwen_image")),
    note("general.file_type", 4, struct.pack("<I", 15)),
    note("a.float", 6, struct.pack("<f", 0.5)),
    note("a.flag", 7, b"\1"),
    note("an.array", 9, array(5, 3, struct.pack("<3i", 16, 24, -1))),
    note("some.words", 9, array(8, 2, text("one") + text("two"))),
    note("long", 9, array(8, 300, text("w") * 300)),
    note("long.numbers", 9, array(4, 1000, bytes(4000))),
)
ENTRIES = (entry("first", (64, 3), TYPES["Q8_0"].code, 0), entry("second", (5,), TYPES["F32"].code, 224))
DATA = 256  # bytes: 204 of the first tensor, padding, 20 of the second


def build(
    notes: tuple[bytes, ...] = NOTES,
    entries: tuple[bytes, ...] = ENTRIES,
    start: bytes = b"GGUF" + struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
    data: int = DATA,
) -> bytes:
    header = start + struct.pack("<QQ", *(counts or (len(entries), len(notes)))) + b"".join(notes + entries)
    return header + bytes(-len(header) % 32) + bytes(data)


class Watched(io.BytesIO):
    """A file that fails the test when it is read past its end, or by more than a header can need."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw)
        self.length = len(raw)

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None and 0 <= size <= 1 << 21
        return super().read(size)


def read(raw: bytes) -> GgufHeader:
    header = parse(Watched(raw), len(raw), WHERE)
    for info in header.tensors.values():
        assert 0 <= info.start <= info.end <= len(raw)
        assert info.size * TYPES[info.dtype].values == info.count * TYPES[info.dtype].size
    return header


def test_a_header_is_read():
    header = read(build())
    assert header.architecture == "qwen_image"
    assert header.number("general.file_type") == 15 and header.number("a.flag") is None
    assert header.metadata["a.float"] == 0.5 and header.metadata["a.flag"] is True
    assert header.metadata["an.array"] == (16, 24, -1) and header.metadata["some.words"] == ("one", "two")
    assert header.metadata["long"] == Long(300) and header.metadata["long.numbers"] == Long(1000)
    first, second = header.tensors.values()
    assert (first.dtype, first.shape, first.size) == ("Q8_0", (3, 64), 204)
    assert (second.dtype, second.shape, second.size) == ("F32", (5,), 20)
    assert second.start - first.start == 224 and first.start % 32 == 0


def test_what_others_write_is_read():
    wide = build((note("general.alignment", 4, struct.pack("<I", 64)),), (entry("t", (4,), 0, 0),), data=64)
    assert read(wide).tensors["t"].start % 64 == 0
    assert read(build(start=b"GGUF" + struct.pack("<I", 2))).tensors  # version 2 differs in nothing we use
    assert read(build((), (), data=0)).tensors == {}
    scalar = read(build((), (entry("flag", (), 0, 0), entry("none", (0,), 0, 32)), data=64)).tensors
    assert scalar["flag"].shape == () and scalar["flag"].size == 4 and scalar["none"].size == 0


def test_files(tmp_path: Path):
    path = tmp_path / "a.gguf"
    path.write_bytes(build())
    assert is_gguf(path) and read_gguf(path).tensors
    assert not is_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="does not exist"):
        read_gguf(tmp_path / "none.gguf")


WHOLE = build()
HOSTILE: list[tuple[str, bytes, str]] = [
    ("no magic", b"GGML" + WHOLE[4:], "begins with"),
    ("a pickle", b"\x80\x04" + WHOLE[2:], "begins with"),
    ("nothing", b"", "goes on after its end"),
    ("version 1", build(start=b"GGUF" + struct.pack("<I", 1)), "version 1"),
    ("big-endian", build(start=b"GGUF" + struct.pack(">I", 3)), "big-endian"),
    ("billions of tensors", build(counts=(1 << 60, 1)), "tensors in"),
    ("one tensor more than there is", build(counts=(3, len(NOTES))), "empty or has unprintable"),
    ("billions of notes", build(counts=(1, 1 << 63)), "notes in"),
    ("cut in its notes", WHOLE[:100], "goes on after its end|claims"),
    ("cut in its data", WHOLE[:-64], "cut short"),
    ("a name of 2^63 letters", build((struct.pack("<Q", 1 << 63) + b"x",)), "claims"),
    ("a name that is empty", build((note("", 4, bytes(4)),)), "empty or has unprintable"),
    ("a name that colours the terminal", build((), (entry("\x1b[31m", (4,), 0, 0),)), "unprintable"),
    ("a name that is not UTF-8", build((note(b"\xff\xfe", 4, bytes(4)),)), "UTF-8"),
    ("the same note twice", build((NOTES[0], NOTES[0])), "twice"),
    ("a note of an unknown type", build((note("odd", 77, bytes(8)),)), "unknown type 77"),
    ("an array of arrays", build((note("odd", 9, array(9, 1, array(4, 1, bytes(4)))),)), "array of arrays"),
    ("an array of 2^60 numbers", build((note("odd", 9, array(12, 1 << 60, b"")),)), "claims"),
    ("an array of a million texts", build((note("odd", 9, array(8, 1 << 20, b"")),)), "goes on after its end"),
    ("an alignment of 0", build((note("general.alignment", 4, bytes(4)),)), "alignment"),
    ("an alignment of 48", build((note("general.alignment", 4, struct.pack("<I", 48)),)), "alignment"),
    ("an alignment in words", build((note("general.alignment", 8, text("32")),)), "alignment"),
    ("the same tensor twice", build(entries=(ENTRIES[0], ENTRIES[0])), "twice"),
    ("tensors that overlap", build(entries=(ENTRIES[0], entry("second", (5,), 0, 192))), "overlaps"),
    ("a tensor behind the end", build(entries=(entry("far", (5,), 0, 1 << 40),)), "impossible place"),
    ("a place that is not aligned", build(entries=(entry("odd", (5,), 0, 3),)), "impossible place"),
    ("a place that wraps round", build(entries=(entry("odd", (5,), 0, (1 << 64) - 32),)), "impossible place"),
    ("sides whose product wraps round", build(entries=(entry("odd", (1 << 32, 1 << 32), 0, 0),)), "usable shape"),
    ("a side of 2^63", build(entries=(entry("odd", (1 << 63,), 0, 0),)), "usable shape"),
    ("a thousand sides", build(entries=(entry("odd", (1,) * 1000, 0, 0),)), "1000 sides"),
    ("an unknown block type", build(entries=(entry("odd", (256,), 9, 0),)), "unknown type 9"),
    ("half a block", build(entries=(entry("odd", (48, 2), TYPES["Q4_0"].code, 0),)), "whole number of blocks"),
    ("blocks of nothing", build(entries=(entry("odd", (0, 5), TYPES["Q4_0"].code, 0),)), "whole number of blocks"),
    ("a packed scalar", build(entries=(entry("odd", (), TYPES["Q4_0"].code, 0),)), "whole number of blocks"),
]


@pytest.mark.parametrize(("raw", "word"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_headers_are_one_sentence(raw: bytes, word: str):
    with pytest.raises(ModelError, match=word) as caught:
        read(raw)
    assert str(WHERE) in str(caught.value) and "\n" not in str(caught.value)


def flip(raw: bytearray, dice: random.Random, end: int) -> None:
    raw[dice.randrange(end)] ^= 1 << dice.randrange(8)


def set_bytes(raw: bytearray, dice: random.Random, end: int) -> None:
    at = dice.randrange(end - 8)
    extreme = dice.choice([0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
    raw[at : at + 8] = struct.pack("<Q", extreme)


def cut(raw: bytearray, dice: random.Random, end: int) -> None:
    del raw[dice.randrange(len(raw)) :]


def drop(raw: bytearray, dice: random.Random, end: int) -> None:
    at = dice.randrange(end)
    del raw[at : at + dice.randrange(1, 40)]


def repeat(raw: bytearray, dice: random.Random, end: int) -> None:
    at = dice.randrange(end)
    raw[at:at] = raw[at : at + dice.randrange(1, 60)]


def scribble(raw: bytearray, dice: random.Random, end: int) -> None:
    at, count = dice.randrange(end), dice.randrange(1, 24)
    raw[at : at + count] = dice.randbytes(count)


MUTATIONS: list[Callable[[bytearray, random.Random, int], None]] = [flip, set_bytes, cut, drop, repeat, scribble]


READER = build(  # a text encoder's two halves in one file, so that one header reaches all that is made of metadata
    notes=(
        note("general.architecture", 8, text("qwen2vl")),
        *(
            note(f"qwen2vl.{key}", 4, struct.pack("<I", value))
            for key, value in {
                "embedding_length": 32,
                "feed_forward_length": 64,
                "block_count": 1,
                "attention.head_count": 2,
                "attention.head_count_kv": 1,
            }.items()
        ),
        note("qwen2vl.rope.freq_base", 6, struct.pack("<f", 1e6)),
        note("qwen2vl.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-6)),
        note("qwen2vl.rope.dimension_sections", 9, array(5, 4, struct.pack("<4i", 2, 3, 3, 0))),
        note("clip.vision.attention.head_count", 4, struct.pack("<I", 2)),
        note("clip.vision.n_wa_pattern", 4, struct.pack("<I", 1)),
        note("clip.projector_type", 8, text("qwen2.5vl_merger")),
    ),
    entries=tuple(
        entry(name, sides, 1, 64 * number)
        for number, (name, sides) in enumerate(
            {
                "token_embd.weight": (4, 8),
                "blk.0.attn_q.weight": (4, 4),
                "v.patch_embd.weight": (2, 2, 3, 2),
                "v.patch_embd.weight.1": (2, 2, 3, 2),
                "v.blk.0.attn_q.weight": (2, 4),
                "v.blk.0.attn_k.weight": (2, 4),
                "v.blk.0.attn_v.weight": (2, 4),
                "v.blk.0.ffn_gate.weight": (4, 4),
                "mm.2.weight": (4, 4),
            }.items()
        )
    ),
    data=640,
)


def test_what_is_made_of_headers_survives_mutations():
    """Names, pieces and configs of 4,000 spoilt headers of Qwen2.5-VL: right, or a sentence; no crash, no hang."""
    header = read(READER)
    whole = view(WHERE, header)
    assert whole.infos["visual.blocks.0.attn.qkv.weight"].shape == (12, 2)
    assert whole.infos["visual.patch_embed.proj.weight"].shape == (2, 3, 2, 2, 2)
    assert text_config(header)["num_hidden_layers"] == 1 and vision_config(header)["depth"] == 1
    dice, seen = random.Random(21), 0
    end = len(READER) - 640
    for _ in range(4000):
        raw = bytearray(READER)
        for _ in range(dice.randrange(1, 3)):
            dice.choice([flip, set_bytes, scribble])(raw, dice, end)
        try:
            header = read(bytes(raw))
            text_config(header)
            assert len(vision_config(header).get("fullatt_block_indexes", ())) <= len(header.tensors)
            view(WHERE, header)
            seen += 1
        except ModelError as error:
            assert "\n" not in str(error)
    assert seen > 100


def test_mutated_headers_never_crash():
    """Six ways to spoil a header, one to three at once, 6,000 cases: read within the file, or a sentence."""
    small = build(notes=(*NOTES[:6], note("long", 9, array(8, 260, text("w") * 260))))
    dice, refused, accepted = random.Random(20), 0, 0
    end = len(small) - DATA
    for _ in range(6000):
        raw = bytearray(small)
        for _ in range(dice.randrange(1, 4)):
            if len(raw) > 64:
                dice.choice(MUTATIONS)(raw, dice, min(end, len(raw) - 9))
        try:
            read(bytes(raw))
            accepted += 1
        except ModelError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 3000 and accepted > 20  # a changed letter of a name can't be seen
