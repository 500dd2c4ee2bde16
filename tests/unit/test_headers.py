"""safetensors headers: what a sound file says, and one sentence for every way in which a file can lie."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lanting.core.errors import ModelError
from lanting.weights.headers import TensorInfo, read_header, read_metadata


def written(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_it_agrees_with_the_library(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(2, 3, dtype=torch.bfloat16),
        "b": torch.arange(5.0),
        "nothing": torch.zeros(0, 4),
        "number": torch.tensor(7.0),
        "small": torch.zeros(4, dtype=torch.float8_e4m3fn),
        "flag": torch.ones(3, dtype=torch.bool),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    assert {name: info.shape for name, info in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {name: info.size for name, info in found.items()} == {n: t.nbytes for n, t in tensors.items()}
    assert found["a"].dtype == "BF16" and found["small"].dtype == "F8_E4M3"
    info = found["b"]
    assert struct.unpack("<5f", path.read_bytes()[info.start : info.end]) == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert read_metadata(path) == {"format": "pt"}
    assert (info.count, info.size) == (5, 20)


def test_half_bytes_count_whole(tmp_path: Path) -> None:
    path = written(tmp_path / "x", {"a": entry("F4", [3, 2], [0, 3])}, b"abc")
    assert read_header(path)["a"] == TensorInfo("F4", (3, 2), path.stat().st_size - 3, path.stat().st_size)
    with pytest.raises(ModelError, match="can't have 3 bytes"):
        read_header(written(tmp_path / "x", {"a": entry("F4", [5], [0, 3])}, b"abc"))


LIES = {
    "unknown dtype": ({"a": entry("F31")}, b"12345678"),
    "dtype no text": ({"a": entry(32)}, b"12345678"),
    "shape of text": ({"a": entry(shape="2")}, b"12345678"),
    "negative side": ({"a": entry(shape=[-2])}, b"12345678"),
    "side no number": ({"a": entry(shape=[2.0])}, b"12345678"),
    "side a truth": ({"a": entry(shape=[True, 2])}, b"12345678"),
    "side too large": ({"a": entry(shape=[2**62, 0], offsets=[0, 0])}, b""),
    "product too large": ({"a": entry(shape=[2**40, 2**40])}, b"12345678"),
    "one offset": ({"a": entry(offsets=[8])}, b"12345678"),
    "offsets backwards": ({"a": entry(offsets=[8, 0])}, b"12345678"),
    "offsets negative": ({"a": entry(offsets=[-8, 0])}, b"12345678"),
    "wrong size": ({"a": entry(shape=[3])}, b"12345678"),
    "cut short": ({"a": entry()}, b"1234"),
    "left over": ({"a": entry()}, b"123456789"),
    "gap": ({"a": entry(), "b": entry(offsets=[12, 20])}, b"x" * 20),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, b"x" * 12),
    "same place": ({"a": entry(), "b": entry()}, b"x" * 8),
    "extra key": ({"a": entry() | {"more": 1}}, b"12345678"),
    "missing key": ({"a": {"dtype": "F32", "shape": [2]}}, b"12345678"),
    "entry no table": ({"a": [1, 2]}, b""),
    "not a table": ([1, 2, 3], b""),
    "not JSON": (b"{broken", b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "same name twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"1",
    ),
    "deep": (b"[" * 90_000, b""),
}


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_is_one_sentence(lie: str, tmp_path: Path) -> None:
    path = written(tmp_path / "lie.safetensors", *LIES[lie])
    with pytest.raises(ModelError, match=r"^[^\n]*lie.safetensors is damaged: [^\n]*; download it again$"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_stump(size: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x01" * size)
    with pytest.raises(ModelError, match=f"has only {size} bytes"):
        read_header(tmp_path / "x")


def test_a_header_longer_than_its_file(tmp_path: Path) -> None:
    for length in (3, 2**63, 2**64 - 1):
        with pytest.raises(ModelError, match="its header claims"):
            read_header(written(tmp_path / "x", b"{}", length=length))


def test_things_that_are_no_weights(tmp_path: Path) -> None:
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(ModelError, match="Git LFS pointer"):
        read_header(pointer)
    with pytest.raises(ModelError, match="does not exist"):
        read_header(tmp_path / "none")
    with pytest.raises(ModelError, match="can't be read"):
        read_header(tmp_path)
    with pytest.raises(ModelError, match="notes are not"):
        read_metadata(written(tmp_path / "x", {"__metadata__": {"a": 1}}))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_no_damage_raises_anything_else(seed: int, blows: int) -> None:
    """Random bytes of a small file changed, cut or repeated: a table of sound entries, or a ModelError."""
    luck = random.Random(seed)
    header = {"__metadata__": {"k": "v"}, "a": entry(), "b": entry("U8", [2, 2], [8, 12])}
    raw = json.dumps(header).encode()
    data = bytearray(struct.pack("<Q", len(raw)) + raw + b"x" * 12)
    for _ in range(blows):
        place = luck.randrange(len(data) + 1)
        blow = luck.randrange(3)
        if blow == 0 and place < len(data):
            data[place] = luck.randrange(256)
        elif blow == 1:
            data = data[:place] or bytearray(b"\0")
        else:
            data[place:place] = data[place : place + luck.randrange(8)]
    path = Path(f"/dev/shm/lanting-{seed}") if Path("/dev/shm").is_dir() else Path(f"lanting-{seed}.tmp")
    try:
        path.write_bytes(data)
        for info in read_header(path).values():
            assert 0 <= info.start <= info.end <= len(data)
    except ModelError as error:
        assert "\n" not in str(error) or "\\n" in repr(data)
    finally:
        path.unlink(missing_ok=True)
