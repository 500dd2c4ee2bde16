"""A layer of the full transformer on one core: stable-diffusion.cpp's time over ours.

    python benchmarks/against_sdcpp.py --sd PATH/bin/sd-cli [--sizes 256 512] [--rounds 5] [--files DIR] [--out FILE]

`--sd` is its command line program; docs/bench.md says how ours was built. Nothing of it is part of this project. The
files it needs are made here with random weights, in `--files` or a temporary folder: transformers of full width and of
one and two layers in every type, a Qwen2.5-VL of one layer, and a decoder. Transformer and encoder are written by the
project's own GGUF writer.

A layer of theirs is a step of two layers less a step of one, so what is around layers (embeddings, graph, sampler) is
in neither. Steps are told apart by the lines the program prints after each, and between lines it is stopped, so that
its two models and our block take turns on the core, step by step. All times are processor time, which other programs
disturb less than the clock's. The first step of each process warms up and does not count.

128 text tokens in both. Ours is a block with its modulation from a table, as it runs in the engine; theirs multiplies
it out in every step. What the table costs ours is measured too, for a picture of 20 steps, and the second ratio charges
a twentieth of it to each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from block_cpu import TEXT, inputs, oracle, ours, packed
from full_size import Pool, shapes_of
from lanting.kernels import library
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.qwen_language import LanguageConfig
from lanting.nn.qwen_vl import QwenVL, QwenVLConfig
from lanting.weights.gguf_encoder import write_text_encoder
from lanting.weights.gguf_write import Entry, write_gguf
from vae_cpu import processor

RESULTS = Path(__file__).parent / "results"
TYPES = ("BF16 flash", "BF16", "F16 flash", "Q8_0 flash", "Q4_0 flash", "Q4_K flash")
KIND = "int4 64"
TURN_END = 5  # tokens of the template that follow the prompt and stay: <|im_end|> \n <|im_start|> assistant \n
TARGET = 5.0
STEPS = 20  # of the picture whose table is charged
WAN = {
    "post_quant_conv.": "conv2.",
    ".conv1.": ".residual.2.",
    ".conv2.": ".residual.6.",
    ".norm1.": ".residual.0.",
    ".norm2.": ".residual.3.",
    "mid_block.resnets.0": "middle.0",
    "mid_block.attentions.0": "middle.1",
    "mid_block.resnets.1": "middle.2",
    "conv_in.": "conv1.",
    "conv_out.": "head.2.",
    "norm_out.": "head.0.",
    "conv_shortcut.": "shortcut.",
}


# ---------------------------------------------------------------- files
def write_layers(path: Path, layers: int, kind: str) -> None:
    """A transformer with every matrix of its blocks in one type, so that no mix blurs what the type costs."""
    shapes, pool = shapes_of(lambda: QwenImageTransformer(TransformerConfig(num_layers=layers))), Pool()

    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        wide = kind if name.startswith("transformer_blocks.") else "BF16"
        chosen = wide if len(shape) == 2 else "F32"
        return Entry(name, shape, chosen, lambda: pool.take_blocks(name, shape, chosen))

    notes = {"general.architecture": "qwen_image", "general.quantization_version": 2}
    write_gguf(path, notes, [entry(name, shape) for name, shape in shapes.items()])


def write_reader(path: Path) -> None:
    net, pool = LanguageConfig(num_hidden_layers=1), Pool()
    shapes = shapes_of(lambda: QwenVL(QwenVLConfig(net), vision=False, head=False))
    read = lambda name: pool.take_blocks(name, shapes[name], "F16").view(torch.float16).view(shapes[name])  # noqa: E731
    write_text_encoder(path, shapes, read, "f16", {"config": asdict(net)})


def write_decoder(path: Path) -> None:
    """The autoencoder's decoder under Wan's names, which theirs reads."""
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoencoderKLQwenImage().state_dict().items()}
    state = {
        wan(name): torch.randn(shape) * 0.02 for name, shape in shapes.items() if name.startswith(("decoder.", "post_"))
    }
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, path)


def wan(name: str) -> str:
    """Wan's name of one of diffusers' tensors of the decoder."""
    if found := re.match(r"decoder\.up_blocks\.(\d)\.(?:resnets\.(\d)|upsamplers\.0)\.(.*)", name):
        name = f"decoder.upsamples.{int(found[1]) * 4 + int(found[2] or 3)}.{found[3]}"
    for theirs, wans in WAN.items():
        name = name.replace(theirs, wans)
    return name


def made(path: Path, write: Callable[[Path], None]) -> Path:
    if not path.exists():
        write(path)
    return path


# ---------------------------------------------------------------- who is timed
class Peer:
    """A process that draws one picture, held between its steps; calling it lets it do one and says what that took."""

    def __init__(self, command: list[str], log: Path):
        self.log = log.open("wb")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log)
        self.clock = (~self.process.pid << 3) | 2  # Linux: the processor time of all threads of a process
        self.text, self.seen = b"", 0.0
        self()

    def __call__(self) -> float:
        self.process.send_signal(signal.SIGCONT)
        assert self.process.stdout is not None
        while True:
            piece = os.read(self.process.stdout.fileno(), 4096)
            now = time.clock_gettime(self.clock) if piece else 0.0
            self.log.write(piece)
            if not piece:
                raise SystemExit(f"it ended before its time; {self.log.name} says why")
            self.text = (self.text + piece)[-200:]
            if b"it\x1b" in self.text or b"it/s\x1b" in self.text:  # "|==>  | 1/6 - 1.30s/it"
                break
        self.process.send_signal(signal.SIGSTOP)
        self.text, took, self.seen = b"", now - self.seen, now
        return took

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def command(asked: argparse.Namespace, transformer: Path, flash: bool, size: int) -> list[str]:
    folder = asked.files
    reader, vae = made(folder / "reader.gguf", write_reader), made(folder / "vae.safetensors", write_decoder)
    words = {"--diffusion-model": transformer, "--llm": reader, "--vae": vae, "-o": folder / "never.png"}
    words |= {"-p": " ".join(["cat"] * (TEXT - TURN_END)), "-W": size, "-H": size, "-t": asked.threads}
    words |= {"--cfg-scale": 1, "--sampling-method": "euler", "--steps": asked.rounds + 2}
    line = [str(asked.sd), "-v", *(str(part) for pair in words.items() for part in pair)]
    return [*line, "--diffusion-fa"] if flash else line


def our_block(tokens: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(a block in W4A8, its rows of the modulation table)."""
    img, txt, temb, _, ctx = inputs(tokens)
    state = dict(oracle().state_dict())
    block, b = ours(state, temb.bfloat16(), packed(KIND)), [img.bfloat16(), txt.bfloat16()]
    make, mods = packed(KIND), []
    for name in ("img_mod", "txt_mod"):
        plain = nn.Linear(temb.shape[-1], 6 * temb.shape[-1])
        plain.load_state_dict({key: state[f"{name}.1.{key}"] for key in ("weight", "bias")})
        assert make is not None
        mods.append(make(name, plain.requires_grad_(False).bfloat16()))
    given = nn.functional.silu(temb[0].bfloat16()).expand(STEPS, -1)

    def modulate() -> list[Tensor]:
        return [mod(given) for mod in mods]

    return lambda: block(*b, ctx), modulate


def taken(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


# ---------------------------------------------------------------- measuring
@torch.inference_mode()
def measure(asked: argparse.Namespace, size: int) -> Iterator[dict[str, Any]]:
    """A row for each type: medians, and what they are medians of."""
    block, modulate = our_block((size // 16) ** 2)
    for run in (block, block, modulate, modulate):
        run()
    for variant in asked.types:
        kind, _, flash = variant.partition(" ")
        files = [
            made(asked.files / f"{kind}-{n}.gguf", lambda path, n=n, kind=kind: write_layers(path, n, kind))
            for n in (1, 2)
        ]
        peers: list[Peer] = []
        try:
            for n, file in enumerate(files, 1):
                log = asked.files / f"{kind}-{n}-{size}{flash}.log"
                peers.append(Peer(command(asked, file, bool(flash), size), log))
            cases = {"one": peers[0], "ours": lambda: taken(block), "two": peers[1]}
            cases["modulation"] = lambda: taken(modulate)
            seen: dict[str, list[float]] = {name: [] for name in cases}
            for _ in range(asked.rounds):
                for name, case in cases.items():
                    seen[name].append(case())
        finally:
            for peer in peers:
                peer.close()
        yield row(variant, seen)


def row(variant: str, seen: dict[str, list[float]]) -> dict[str, Any]:
    middle = {name: statistics.median(values) for name, values in seen.items()}
    layer = middle["two"] - middle["one"]
    charged = middle["ours"] + middle["modulation"] / STEPS
    return {
        "type": variant,
        "layer": layer,
        "ours": middle["ours"],
        "table": middle["modulation"],
        "ratio": layer / middle["ours"],
        "ratio charged": layer / charged,
        "seen": seen,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd", type=Path, required=True, help="stable-diffusion.cpp's sd-cli")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="sides of the picture in pixels")
    parser.add_argument("--types", nargs="+", default=list(TYPES), help='as in the file; "flash": its flash attention')
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--files", type=Path, help="where files are made and kept; else in a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS / f"against-sdcpp-{date.today()}.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    library.use_threads(asked.threads)
    with tempfile.TemporaryDirectory(prefix="against-sdcpp-") as scratch:
        asked.files = asked.files or Path(scratch)
        asked.files.mkdir(parents=True, exist_ok=True)
        run(asked)


def run(asked: argparse.Namespace) -> None:
    report: dict[str, Any] = {"processor": processor(), "kernels": library.instruction_set(), "threads": asked.threads}
    report |= {"ours": KIND, "text tokens": TEXT, "steps of the table": STEPS, "rounds": asked.rounds, "sizes": []}
    for size in asked.sizes:
        print(f"{size} x {size}: {(size // 16) ** 2} image tokens and {TEXT} of text")
        case: dict[str, Any] = {"size": size, "rows": []}
        report["sizes"].append(case)
        for each in measure(asked, size):
            case["rows"].append(each)
            print(
                f"  {each['type']:12s} {each['layer'] * 1e3:7.0f} ms a layer  ours {each['ours'] * 1e3:5.0f} ms"
                f"  {each['ratio']:5.2f} x  table charged {each['ratio charged']:5.2f} x",
                flush=True,
            )
            asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        best = min(case["rows"], key=lambda each: each["layer"])
        case |= {"best": best["type"], "ratio": best["ratio"], "ratio charged": best["ratio charged"]}
        print(f"  its best type, {best['type']}, takes {best['ratio']:.2f} times as long (wanted: {TARGET})")
        asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
