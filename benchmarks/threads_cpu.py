"""How much faster two threads are than one, by the clock, for a full-width 4-bit block, on an idle machine.

    python benchmarks/threads_cpu.py [--tokens 256 1024] [--threads 1 2] [--reps 7]

Medians, numbers of threads in turn; the bits of the results are compared too.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from block_cpu import inputs, oracle, ours, packed
from lanting.kernels import library


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kind", default="int4 64")
    parser.add_argument("--reps", type=int, default=7)
    asked = parser.parse_args()
    block = ours(dict(oracle().state_dict()), inputs(256)[2].bfloat16(), packed(asked.kind))
    for tokens in asked.tokens:
        img, txt, _, _, ctx = inputs(tokens)
        img, txt = img.bfloat16(), txt.bfloat16()
        seen: dict[int, list[float]] = {count: [] for count in asked.threads}
        results = []
        for _ in range(asked.reps + 1):
            for count, times in seen.items():
                library.use_threads(count)
                torch.set_num_threads(count)
                began = time.monotonic()
                results.append(block(img, txt, ctx)[0])
                times.append(time.monotonic() - began)
        first = statistics.median(seen[asked.threads[0]][1:])
        gains = {count: round(first / statistics.median(times[1:]), 2) for count, times in seen.items()}
        same = all(torch.equal(results[0], other) for other in results)
        print(f"{tokens} tokens: times as fast by threads {gains}, bits {'equal' if same else 'differ'}", flush=True)


if __name__ == "__main__":
    main()
