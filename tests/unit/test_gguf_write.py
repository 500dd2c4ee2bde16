"""Writing GGUF: mixes, what can't be written, runs that are stopped; and the files through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lanting.cli.main import command_line
from lanting.core.errors import ModelError, OutputError
from lanting.nn.blocks import TYPES
from lanting.nn.dequant import dequantize
from lanting.weights.gguf import read_gguf
from lanting.weights.gguf_encoder import language_type
from lanting.weights.gguf_mix import MIXES, tensor_bytes, tensor_types
from lanting.weights.gguf_view import open_gguf
from lanting.weights.gguf_write import Entry, encode, write_gguf
from lanting.weights.kquants import can_quantize

BLOCKS = {
    f"transformer_blocks.{block}.{path}.weight": shape
    for block in range(4)
    for path, shape in {
        "img_mod.1": (1536, 256),
        "attn.to_q": (256, 256),
        "attn.to_v": (256, 256),
        "attn.add_v_proj": (256, 256),
        "attn.norm_q": (128,),
        "img_mlp.net.2": (256, 1024),
    }.items()
}
SHAPES: dict[str, tuple[int, ...]] = {
    "img_in.weight": (256, 64),
    "img_in.bias": (256,),
    "time_text_embed.timestep_embedder.linear_1.weight": (256, 256),
    "proj_out.weight": (64, 256),
    **BLOCKS,
}


def entry(name: str = "a", kind: str = "Q8_0", rows: int = 4, **change: object) -> Entry:
    values = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0))
    return Entry(name, (rows, 256), kind, change.get("values", lambda: values))  # type: ignore[arg-type]


def test_the_mixes():
    kinds = tensor_types(SHAPES, "q4_k_m")
    assert kinds["img_in.weight"] == kinds["proj_out.weight"] == "BF16"
    assert kinds["time_text_embed.timestep_embedder.linear_1.weight"] == "BF16"
    assert kinds["img_in.bias"] == kinds["transformer_blocks.1.attn.norm_q.weight"] == "F32"
    inner, ends = "transformer_blocks.1.", ("transformer_blocks.0.", "transformer_blocks.3.")
    assert kinds[inner + "img_mod.1.weight"] == kinds[inner + "attn.to_q.weight"] == "Q4_K"
    assert kinds[inner + "attn.to_v.weight"] == kinds[inner + "attn.add_v_proj.weight"] == "Q6_K"
    assert kinds[inner + "img_mlp.net.2.weight"] == "Q6_K"
    assert {kinds[name] for name in BLOCKS if name.startswith(ends) and "norm" not in name} == {"Q5_K"}
    early = tensor_types(SHAPES, "q4_k_s")
    assert [early[f"transformer_blocks.{block}.attn.to_v.weight"] for block in range(4)] == ["Q5_K"] * 2 + ["Q4_K"] * 2


def test_every_mix_can_be_written():
    for mix in MIXES:
        kinds = set(tensor_types(SHAPES, mix).values())
        assert all(can_quantize(kind) for kind in kinds if TYPES[kind].packed)
    sizes = {
        mix: sum(tensor_bytes(SHAPES[name], kind) for name, kind in tensor_types(SHAPES, mix).items()) for mix in MIXES
    }
    packed = [size for mix, size in sizes.items() if mix not in ("f16", "bf16")]
    assert len(set(packed)) > 10 and max(packed) < sizes["bf16"]


def test_rows_that_no_block_fills_get_the_next_type():
    shapes = {
        "transformer_blocks.0.img_mod.1.weight": (384, 64),
        "transformer_blocks.0.attn.to_q.weight": (64, 64),
        "transformer_blocks.0.attn.to_k.weight": (64, 50),
    }
    assert list(tensor_types(shapes, "q4_k_s").values()) == ["Q5_0", "Q5_0", "BF16"]
    assert list(tensor_types(shapes, "q6_k").values()) == ["Q8_0", "Q8_0", "BF16"]


def test_the_readers_mix_spares_its_outer_layers():
    mix = MIXES["q4_k_m"]
    kinds = [language_type(f"blk.{layer}.attn_v.weight", (512, 3584), mix, 28) for layer in range(28)]
    assert kinds[:3] == ["Q6_K"] * 3 and kinds[25:] == ["Q6_K"] * 3 and kinds.count("Q6_K") == 14
    assert language_type("output.weight", (152064, 3584), mix, 28) == "Q6_K"
    assert language_type("blk.5.attn_q.weight", (3584, 3584), mix, 28) == "Q4_K"
    assert language_type("blk.5.attn_norm.weight", (3584,), mix, 28) == "F32"


def test_notes_of_every_type_come_back(tmp_path: Path):
    notes = {"a": "text", "b": True, "c": 7, "d": 0.5, "e": ["x", "兰亭"], "f": [1, -2], "g": [0.5, 1.5]}
    write_gguf(tmp_path / "a.gguf", notes, [entry()])
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in read_gguf(
        tmp_path / "a.gguf").metadata.items()} == notes  # fmt: skip
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert {key: fields[key].contents() for key in notes} == notes


def test_progress_reaches_the_end(tmp_path: Path):
    told: list[tuple[int, int]] = []
    write_gguf(tmp_path / "a.gguf", {}, [entry("a"), entry("b", "Q4_K", 7)], lambda *state: told.append(state))
    size = (tmp_path / "a.gguf").stat().st_size
    assert told and all(done <= total == size for done, total in told) and size % 32 == 0
    assert [state[0] for state in told] == sorted(state[0] for state in told)


def test_long_tensors_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lanting.weights.gguf_write.ROWS", 1024)
    first = entry("a", "Q4_K", 33)
    write_gguf(tmp_path / "a.gguf", {}, [first, entry("b", "F16", 5)])
    monkeypatch.undo()
    write_gguf(tmp_path / "b.gguf", {}, [first, entry("b", "F16", 5)])
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (entry(values=lambda: torch.full((4, 256), float("inf"))), "not finite"),
        (entry(kind="F16", values=lambda: torch.full((4, 256), 1e6)), "not finite"),
        (entry(values=lambda: torch.zeros(3, 256)), "should be floats"),
        (entry(values=lambda: torch.zeros(4, 256, dtype=torch.int8)), "should be floats"),
        (Entry("a", (4, 256), "IQ4_XS", lambda: torch.zeros(4, 256)), "choose another"),
    ],
)
def test_what_can_not_be_written_leaves_no_file(bad: Entry, word: str, tmp_path: Path):
    with pytest.raises(ModelError, match=word):
        write_gguf(tmp_path / "a.gguf", {}, [entry("first"), bad])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(OutputError, match="can't be written"):
        write_gguf(tmp_path / "none" / "a.gguf", {}, [entry()])


def test_an_old_file_survives_a_failed_run(tmp_path: Path):
    write_gguf(tmp_path / "a.gguf", {"n": 1}, [entry()])
    with pytest.raises(ModelError):
        write_gguf(tmp_path / "a.gguf", {"n": 2}, [entry(values=lambda: torch.zeros(1))])
    assert read_gguf(tmp_path / "a.gguf").metadata["n"] == 1


KILLED = """
import signal, sys, time, torch
from pathlib import Path
from lanting.weights.gguf_write import Entry, encode, write_gguf
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have it ignored
def slow():
    print("half", flush=True)
    time.sleep(600)
entries = [Entry("a", (4, 256), "Q8_0", lambda: torch.ones(4, 256)), Entry("b", (4, 256), "F32", slow)]
write_gguf(Path(sys.argv[1]), {}, entries)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_stopped_run_leaves_nothing_under_the_name(how: signal.Signals, tmp_path: Path):
    out = tmp_path / "a.gguf"
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert run.stdout is not None and run.stdout.readline() == b"half\n"
    os.kill(run.pid, how)
    run.wait(60)
    assert not out.exists()
    left = [path.name for path in tmp_path.iterdir()]
    assert all(name.startswith(".a.gguf.") and name.endswith(".part") for name in left)
    assert how == signal.SIGKILL or left == []


def lanting(*words: str) -> str:
    from typer.testing import CliRunner

    done = CliRunner().invoke(command_line(), [*words])
    assert done.exit_code == 0, done.output
    return done.output


def test_nano_as_a_file_is_shown_and_draws(tmp_path: Path):
    """quantize, show, generate: the picture is nano's own but for eight-bit weights."""
    path = tmp_path / "nano-q8.gguf"
    lanting("quantize", "nano", "--to", "q8_0", "-o", str(path))
    table = json.loads(lanting("show", str(path), "--json"))
    assert table["release"] == "nano" and table["parts"][0]["kind"]["name"] == "transformer"
    assert set(table["parts"][0]["dtypes"]) >= {"Q8_0", "F32"}
    checkpoint = open_gguf(path)
    packed = [name for name, info in checkpoint.infos.items() if info.dtype == "Q8_0"]
    back = dequantize(checkpoint.read(packed[:1])[packed[0]], "Q8_0")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}[packed[0]]
    assert np.array_equal(back.numpy(), gguf.quants.dequantize(theirs.data, theirs.tensor_type))
    pictures, words = [], 'a blue sign with white text "OPEN"'  # what is left open would follow the smallest rounding
    for model in ("nano", str(path)):
        out = tmp_path / f"{len(pictures)}.png"
        lanting("generate", words, "--model", model, "--steps", "2", "--seed", "1", "-o", str(out))
        pictures.append(np.asarray(open_picture(out)).astype(float))
    assert np.abs(pictures[0] - pictures[1]).mean() < 1  # of 255


def test_the_half_that_sees_is_shown_for_what_it_is(tmp_path: Path):
    path = tmp_path / "mmproj.gguf"
    names = ("v.blk.0.ln1.weight", "v.blk.0.ffn_gate.weight", "mm.2.weight")
    write_gguf(path, {"general.architecture": "clip"}, [entry(name, "F16") for name in names])
    table = json.loads(lanting("show", str(path), "--json"))
    assert table["parts"][0]["kind"]["detail"].startswith("its picture reader alone") and "beside" in table["notes"][0]


def open_picture(path: Path):
    from PIL import Image

    return Image.open(path).convert("RGB")


def test_what_is_packed_already_is_written_as_it_is(tmp_path: Path):
    values = torch.randn(4, 256, generator=torch.Generator().manual_seed(3))
    packed = encode(values, "Q4_K")
    write_gguf(tmp_path / "new.gguf", {}, [entry(kind="Q4_K", values=lambda: values)])
    write_gguf(tmp_path / "same.gguf", {}, [entry(kind="Q4_K", values=lambda: packed)])
    assert (tmp_path / "new.gguf").read_bytes() == (tmp_path / "same.gguf").read_bytes()
    with pytest.raises(ModelError, match="should be floats"):
        write_gguf(tmp_path / "less.gguf", {}, [entry(kind="Q4_K", values=lambda: packed[:-1])])
    assert not (tmp_path / "less.gguf").exists()
