"""What teaching a LoRA to a full-size transformer takes of a GPU, as predicted: the table of docs/training.md.

    python benchmarks/lora_memory.py [--tokens 4608] [--rank 16]

Nothing is computed or read: the network is built of tensors without memory, and asked what `lanting train lora`
would plan for it. Tokens are those of one picture of 1024x1024 and of a caption of 512 at most.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import torch
from torch import nn

from lanting.attach.quant import chooser
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.swap import swap
from lanting.train.lora import memory
from lanting.train.lora.run import LoraRun
from lanting.weights.stored import NoInit, make_linear

CARDS, USABLE = (24, 16, 12, 8), 0.97  # GiB; the driver's own share is not ours


def network(kind: str) -> QwenImageTransformer:
    """The 20.4 B transformer without memory, its Linears packed as `kind`."""
    choose = chooser("transformer", kind)

    def packed(path: str, old: nn.Module) -> nn.Module | None:
        assert isinstance(old, nn.Linear)
        form = choose(path, (old.out_features, old.in_features)) if choose else None
        return None if form is None else make_linear(form, old.bias is not None)

    with torch.device("meta"), NoInit():
        net = QwenImageTransformer(TransformerConfig()).to(torch.bfloat16)
        swap(net, nn.Linear, packed)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096 + memory.WORDS)
    parser.add_argument("--rank", type=int, default=16)
    own = parser.parse_args()
    run = LoraRun(rank=own.rank)
    models = SimpleNamespace(dtype=torch.bfloat16, device=SimpleNamespace(type="cuda"))
    print("| weights | all on the GPU |" + "".join(f" {card} GB |" for card in CARDS))
    for kind in memory.KINDS:
        net = network(kind)
        memory.stored = lambda models, kind, net=net: SimpleNamespace(module=net)
        whole = memory.need(models, kind, own.tokens, run)
        cells = [f"{whole.total / 1e9:.1f} GB"]
        for card in CARDS:
            budget = int(card * 1024**3 * USABLE)
            fitting = (memory.need(models, kind, own.tokens, run, stay) for stay in (None, *range(57, -1, -1)))
            found = next((one for one in fitting if one.total <= budget), None)
            stays = None if found is None else found.resident
            cells.append("no" if found is None else "all blocks" if stays is None else f"{stays} of 60 blocks stay")
        print(f"| {'bfloat16' if kind == 'none' else kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
