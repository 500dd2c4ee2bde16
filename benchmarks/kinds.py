"""What each kind of weights costs in quality: errors of a full-width block, and what becomes of nano's pictures.

    python benchmarks/kinds.py --no-pictures --out F   # the full-width block, which no training changes
    python benchmarks/kinds.py --no-block -n 200 --out F   # nano's pictures, added to the rows in F
    python benchmarks/kinds.py -n 40 --kinds int4 q4_k_m --language zh --out G   # both at once

For every kind the transformer is written to a file by `lanting quantize` and loaded from it, so the files are measured
too. Pictures have the same seeds as those of the 16-bit file. Columns:
  block   error of the residual that one block of width 3072 adds, relative to its size (random weights and inputs,
          256 picture and 64 text tokens): root of the mean square, both streams together
  read    lines that PP-OCR reads exactly (case and spaces ignored), with a 95 % interval
  FLIP    mean over the first 40 pictures, 0 the same to 1
  SSIM2   SSIMULACRA2, mean over the same: 100 the same, 90 no visible difference, 70 high quality
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from ssimulacra2 import compute_ssimulacra2
from torch import Tensor

from lanting import Engine
from lanting.attach.quant import GROUP
from lanting.engine.quantize import Target, quantize_model
from lanting.evals.draw import How, Tell, draw
from lanting.evals.flip import mean_flip
from lanting.evals.ocr import judges
from lanting.evals.scores import Share, add_up, compare
from lanting.evals.sets import text_cases
from lanting.nn.mmdit import Context, QwenImageTransformer, TransformerConfig
from lanting.weights.build import build_transformer
from lanting.weights.configs import config_of
from lanting.weights.gguf_mix import MIXES
from lanting.weights.single import open_file
from lanting.weights.stored import Placing

OWN = ("fp8", "int8", "int4", "int4 rotated", "int4 32", "int4 128")  # a number: inputs that share a scale
TOKENS, TEXT = 256, 64
COMPARED = 40  # pictures for FLIP and SSIMULACRA2, which take longer than drawing and reading
RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200, help="pictures for each kind")
    parser.add_argument("--kinds", nargs="*", default=[*OWN, *(mix for mix in MIXES if mix not in ("bf16", "f16"))])
    parser.add_argument("--language", choices=("en", "zh"), default="en")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--no-block", action="store_true", help="leave out the full-width block (3 GB of memory)")
    parser.add_argument("--no-pictures", action="store_true", help="leave out nano")
    parser.add_argument("--out", type=Path, help="JSON to add to; left out: benchmarks/results/kinds-LANGUAGE.json")
    return parser.parse_args()


def written(model: str, kind: str, folder: Path) -> Path:
    """The model's transformer in a kind, as a file."""
    word, *more = kind.split()
    group = next((int(each) for each in more if each.isdigit()), GROUP)
    gguf = word in MIXES and word not in ("bf16", "f16")
    out = folder / f"{kind.replace(' ', '-')}{'.gguf' if gguf else '.safetensors'}"
    quantize_model(model, out, Target(word, group=group, rotate="rotated" in more))
    return out


def pictures(model: str, file: Path, cases: Any) -> list[Any]:
    """The cases drawn with a transformer file and the model's other parts."""
    base = Path(Engine.open(model).folder.path)
    parts = {"text_encoder": str(base / "text_encoder"), "vae": str(base / "vae")}
    with Engine.open(str(file), parts=parts, dtype="float32") as engine:
        return [one.image for one in draw(engine, cases, How(), Tell())]


def flip_of(one: Any, other: Any) -> float:
    return mean_flip(torch.from_numpy(np.array(one)), torch.from_numpy(np.array(other)))


def ssimulacra2_of(one: Any, other: Any) -> float:
    files = [BytesIO(), BytesIO()]
    for image, file in zip((one, other), files, strict=True):
        image.save(file, "PNG")
        file.seek(0)
    return float(compute_ssimulacra2(files[0], files[1]))


def mean(numbers: Iterable[float], of_none: float) -> float:
    every = list(numbers)
    return sum(every) / len(every) if every else of_none


@cache
def judge_of(language: str) -> Any:
    return judges(("pp",), language)[0][0]


def lines_read(images: list[Any], cases: Any, language: str) -> Share:
    judge = judge_of(language)
    return add_up([compare(c.lines, judge.read(i, c.script)) for i, c in zip(images, cases, strict=True)]).lines


def full_width(folder: Path) -> Path:
    """A transformer of one layer, as wide as the released ones, with random weights: 340 M parameters in bfloat16."""
    torch.manual_seed(0)
    net = QwenImageTransformer(TransformerConfig(num_layers=1))
    for name, p in net.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, 0, p.shape[1] ** -0.5 * (0.2 if "_mod" in name else 1.0))
        elif name.endswith("bias"):
            torch.nn.init.normal_(p, 0, 0.02)
    path = folder / "full-width.safetensors"
    save_file({name: p.detach().bfloat16() for name, p in net.named_parameters()}, str(path))
    return path


@torch.no_grad()
def residual(file: Path) -> Tensor:
    """What the block of a file adds to random streams, both flattened into one vector, in float32."""
    checkpoint = open_file(file)["transformer"]
    placing = Placing(torch.float32, torch.device("cpu"))
    net = build_transformer(checkpoint, config_of("transformer", checkpoint), placing)
    generator = torch.Generator().manual_seed(1)
    width = net.config.width
    img, txt = (torch.randn(1, n, width, generator=generator) for n in (TOKENS, TEXT))
    temb = net.time_text_embed(torch.tensor([[0.5]]), torch.float32)
    context = Context(temb, TOKENS, net.rope(((1, 16, 16),), TEXT, img.device), None, (), "positive")
    after = net.transformer_blocks[0](img, txt, context)
    return torch.cat([(new - old).flatten() for new, old in zip(after, (img, txt), strict=True)])


class Block:
    """What a full-width block in 16 bits adds, against which every kind is held."""

    def __init__(self, folder: Path):
        (folder / "wide").mkdir()
        self.folder, self.file = folder / "wide", full_width(folder)
        self.added = residual(self.file)

    def measure(self, kind: str) -> dict[str, Any]:
        file = self.file if kind == "bf16" else written(str(self.file), kind, self.folder)
        bits = 8 * file.stat().st_size / (self.file.stat().st_size / 2)
        error = float((residual(file) - self.added).norm() / self.added.norm())
        if kind != "bf16":
            file.unlink()
        return {"bits": bits, "block": error}


class Pictures:
    """nano's pictures with the 16-bit file, against which every kind is held."""

    def __init__(self, wish: argparse.Namespace, folder: Path):
        self.wish, self.folder = wish, folder
        self.cases = text_cases("words", wish.language, wish.n)
        self.images = pictures(wish.model, written(wish.model, "bf16", folder), self.cases)

    def measure(self, kind: str) -> dict[str, Any]:
        images = self.images
        if kind != "bf16":
            file = written(self.wish.model, kind, self.folder)
            images = pictures(self.wish.model, file, self.cases)
            file.unlink()
        pairs = list(zip(images, self.images, strict=True))[: 0 if kind == "bf16" else COMPARED]
        return {
            "read": lines_read(images, self.cases, self.wish.language).as_json(),
            "flip": mean((flip_of(*pair) for pair in pairs), 0.0),
            "ssimulacra2": mean((ssimulacra2_of(*pair) for pair in pairs), 100.0),
        }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, as it stands in docs/formats.md."""
    lines = ["| kind | bits a weight | block | read | FLIP | SSIM2 |", "|---|---|---|---|---|---|"]
    for kind, row in rows.items():
        wide = f"{row['bits']:.2f} | {row['block']:.2%}" if "block" in row else " | "
        seen = " |  | "
        if "read" in row:
            read = "{share:.1%} [{low:.1%}, {high:.1%}]".format(**row["read"])
            seen = f"{read} | {row['flip']:.4f} | {row['ssimulacra2']:.1f}"
        lines.append(f"| {kind} | {wide} | {seen} |")
    return "\n".join(lines)


def main() -> None:
    wish = arguments()
    out = wish.out or RESULTS / f"kinds-{wish.language}.json"
    told = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"settings": {}, "kinds": {}}
    rows: dict[str, dict[str, Any]] = told["kinds"]
    if not wish.no_pictures:
        told["settings"] = {"model": wish.model, "language": wish.language, "n": wish.n, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as name:
        benches: list[Block | Pictures] = [] if wish.no_block else [Block(Path(name))]
        benches += [] if wish.no_pictures else [Pictures(wish, Path(name))]
        for kind in ("bf16", *wish.kinds):
            began = time.monotonic()
            for bench in benches:
                rows.setdefault(kind, {}).update(bench.measure(kind))
            print(f"{kind} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
