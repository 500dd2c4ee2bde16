"""Mutated safetensors headers, 3,000 of them: read, mapped, opened and described, or refused in one sentence.

The sound file is a transformer's block with every kind of note that decides how bytes are read, so mutations reach what
is made of headers too and not only the reader of JSON. Whatever is accepted is read to its last byte: a place outside
the file would end this process.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from lanting.core.errors import LantingError
from lanting.weights.checkpoint import map_tensor
from lanting.weights.forms import read_forms, shapes
from lanting.weights.headers import BITS, read_file
from lanting.weights.inspect import describe
from lanting.weights.single import open_file

CASES = 3000
VALUES: tuple[Any, ...] = (
    0, 1, -1, 3, 255, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**400, 0.5, 1e308, float("inf"), float("nan"), True,
    None, "", "F32", "0", "\x00", "ü" * 40, [], [0], [0, 0], [8, 0], [-8, 8], [0, 2**62], [[0], [8]], [1] * 70,
    {}, {"a": 1}, {"dtype": "F32"}, *BITS,
)  # fmt: skip
BLOCK = "transformer_blocks.0."
NAMES = ("__metadata__", "", "a" * 300, f"{BLOCK}attn.to_q.scale_weight", "x.scale_weight", "scaled_fp8", "\ud800")
PIECES = ("", "{", '"', "9", "\\", "int8", "-")
LAYERS = {
    f"{BLOCK}attn.to_q": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16},
    f"{BLOCK}attn.to_k": {"format": "lanting_int4", "group_size": 32},
    f"{BLOCK}attn.to_v": {"format": "float8_e4m3fn"},
}


def sound() -> tuple[dict[str, Any], int]:
    """A header, and how many bytes of data belong to it."""
    tensors = {
        f"{BLOCK}img_mod.1.weight": ("BF16", [96, 32]),
        f"{BLOCK}attn.to_q.weight": ("I8", [32, 32]),
        f"{BLOCK}attn.to_q.weight_scale": ("F32", [32, 1]),
        f"{BLOCK}attn.to_k.weight": ("U8", [32, 16]),
        f"{BLOCK}attn.to_k.weight_scale": ("BF16", [32, 1]),
        f"{BLOCK}attn.to_v.weight": ("F8_E4M3", [32, 32]),
        f"{BLOCK}attn.to_v.weight_scale": ("F32", []),
        "img_in.weight": ("BF16", [32, 64]),
        "proj_out.weight": ("F32", [64, 32]),
    }
    notes = {"_quantization_metadata": json.dumps({"layers": LAYERS}), "lanting": json.dumps({"version": 1})}
    header: dict[str, Any] = {"__metadata__": notes}
    place = 0
    for name, (dtype, shape) in tensors.items():
        size = BITS[dtype] // 8
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    return header, place


def meddled(header: dict[str, Any], luck: random.Random) -> dict[str, Any]:
    """One to three changes of what a header says."""
    for _ in range(luck.randrange(1, 4)):
        name, value = luck.choice(list(header) or [""]), copy.deepcopy(luck.choice(VALUES))
        entry, what = header.get(name), luck.randrange(8)
        if what == 0:
            header[luck.choice(NAMES)] = copy.deepcopy(entry) if luck.random() < 0.5 else value
        elif what == 1:
            header.pop(name, None)
        elif what == 2:
            header[name] = value
        elif isinstance(entry, dict) and entry:
            key = luck.choice(list(entry))
            if what == 3 and isinstance(entry[key], list) and entry[key]:
                entry[key][luck.randrange(len(entry[key]))] = value
            elif what == 4:
                entry[luck.choice((key, "x", "shape"))] = value
            elif what == 5 and isinstance(entry[key], str):
                at = luck.randrange(len(entry[key]) + 1)
                entry[key] = entry[key][:at] + luck.choice(PIECES) + entry[key][at + 1 :]
            elif what == 6:
                entry.pop(key)
            else:
                entry[key] = value
    return header


def mutated(luck: random.Random) -> bytes:
    """A file whose header says something else than was written, or whose bytes were changed, cut or repeated."""
    header, size = sound()
    raw = json.dumps(meddled(header, luck)).encode("utf-8", "surrogatepass")
    data = bytearray(struct.pack("<Q", len(raw)) + raw + bytes(size))
    for _ in range(luck.randrange(3) if luck.random() < 0.4 else 0):
        at, what = luck.randrange(min(len(data), len(raw) + 8)), luck.randrange(4)
        if what == 0:
            data[at] = luck.randrange(256)
        elif what == 1:
            del data[at:]
        elif what == 2:
            data[at:at] = data[at : at + luck.randrange(60)]
        else:
            data[:8] = struct.pack("<Q", luck.choice((0, 1, len(raw) - 1, len(raw) + 9, 2**31, 2**63, 2**64 - 1)))
        if not data:
            break
    return bytes(data)


def use(path: Path) -> None:
    """Everything that is done with a file before a network is built. Raises LantingError."""
    infos, _ = read_file(path)
    for info in infos.values():
        assert 0 <= info.start <= info.end <= path.stat().st_size
        try:
            tensor = map_tensor(path, info)
        except LantingError:
            continue
        assert tensor.numel() == 0 or tensor.flatten()[-1] is not None
    for checkpoint in open_file(path).values():
        read_forms(checkpoint)
        shapes(checkpoint)
    describe(str(path))


def test_the_sound_file_is_read(tmp_path: Path) -> None:
    header, size = sound()
    raw = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(size))
    use(path)
    forms = read_forms(open_file(path)["transformer"])
    assert {name: form.kind for name, form in forms.items()} == {
        f"{BLOCK}attn.to_q": "int8",
        f"{BLOCK}attn.to_k": "int4",
        f"{BLOCK}attn.to_v": "fp8 e4m3",
    }


@pytest.mark.parametrize("part", range(3))
def test_mutated_headers_are_read_or_refused(part: int, tmp_path: Path) -> None:
    path, refused = tmp_path / "x.safetensors", 0
    for seed in range(part * CASES // 3, (part + 1) * CASES // 3):
        path.write_bytes(mutated(random.Random(seed)))
        try:
            use(path)
        except LantingError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, (seed, str(error))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert CASES // 10 < refused < CASES // 3, "mutations should be refused often, and not always"
