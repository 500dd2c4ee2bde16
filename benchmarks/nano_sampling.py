"""With how many steps, which shift and how much guidance does nano write best? The table in docs/LOG.md.

    python benchmarks/nano_sampling.py [--run runs/nano] [--seed 3]

Draws held-out designs from the same noise in every way and counts characters whose cell correlates above 0.8 with the
one drawn by rule; no optical reader. `--run` is a training run; left out, the shipped weights are taken. Ten minutes of
one core.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lanting.nn.vae import AutoencoderKLQwenImage
from lanting.train.design import SQUARE, WIDE
from lanting.train.designs import DesignMaker, Labelled, Mix
from lanting.train.model import NanoConfig, NanoNet
from lanting.train.portable import unpack
from lanting.train.progress import Velocity, Watch, decode, levels, prompts_batch, sample
from lanting.train.replay import Batch, Reader
from lanting.train.vae import load_vae
from lanting.train.vocabulary import build_tokenizer

WAYS = (  # steps, shift, guidance
    (20, 1, 1),
    (12, 1, 1),
    (6, 1, 1),
    (4, 3, 1),
    (2, 3, 1),
    (1, 1, 1),
    (6, 1, 2),
    (12, 1, 2),
    (6, 1, 3),
    (4, 3, 3),
)
KEPT = Path(__file__).resolve().parents[1] / "checkpoints" / "nano"
Set = tuple[tuple[int, int], list[Labelled]]


def sets(seed: int) -> dict[str, Set]:
    """What is drawn: proportional faces and Chinese on wide canvases, several lines on square ones."""
    rng = random.Random(seed)
    faces = DesignMaker(seed, True, Mix(pictogram=0.0, faces={"sans": 1, "serif": 1, "handwritten": 1}))
    every = DesignMaker(seed, True, Mix(pictogram=0.0))
    return {
        "faces": (WIDE, [faces.sample(rng, WIDE, "en") for _ in range(24)]),
        "chinese": (WIDE, [every.sample(rng, WIDE, "zh") for _ in range(16)]),
        "square": (SQUARE, [every.sample(rng, SQUARE, "en") for _ in range(16)]),
    }


def guided(net: NanoNet, silent: Batch, scale: float) -> Velocity:
    """The network with guidance against silence, without where `scale` is 1."""
    if scale == 1:
        return net

    def velocity(x: Tensor, t: Tensor, start: Tensor, asked: Batch) -> tuple[Tensor, None]:
        with_words, plain = (net(x, t, start, batch)[0].float() for batch in (asked, silent))
        return plain + scale * (with_words - plain), None

    return velocity


def load(run: Path) -> tuple[NanoNet, AutoencoderKLQwenImage, Reader]:
    """Average weights, autoencoder and prompts of a run."""
    kept = torch.load(run / "checkpoint.pt", weights_only=True)
    net = NanoNet(NanoConfig.from_dict(kept["config"]))
    net.load_state_dict({**net.state_dict(), **kept["average"]})
    tokenizer = Tokenizer.from_file(str(run / "tokenizer" / "tokenizer.json"))
    return net, load_vae(run / "vae"), Reader(tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--seed", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = given.run or Path(folder)
        if given.run is None:
            unpack(KEPT, run)
            build_tokenizer(run / "tokenizer")
        net, vae, reader = load(run)
    for steps, shift, guidance in WAYS:
        shares = {}
        for name, (size, drawn) in sets(given.seed).items():
            asked = prompts_batch(reader, drawn, size)
            silent = prompts_batch(reader, [replace(one, prompt=" ") for one in drawn], size)
            latents = sample(guided(net, silent, guidance), asked, reader.prefix, levels(steps, shift))
            pictures = decode(vae, latents, asked.grid)
            shares[name] = f"{Watch.score(drawn, pictures):.1%}"
        print(f"steps {steps}, shift {shift}, guidance {guidance}:", shares, flush=True)


if __name__ == "__main__":
    main()
