"""How many drawings may share their steps: what each more takes beside the first, against the memory that is left."""

from __future__ import annotations

from dataclasses import replace

from lanting.plan.activations import BYTES, Job, transformer_peak
from lanting.plan.kinds import Kind
from lanting.plan.model import Model

MOST = 16  # drawings that share steps, at the very most


def seats(model: Model, job: Job, kind: Kind, how: tuple[str, bool], spare: int, most: int) -> int:
    """1 to `most` drawings like `job`, so that all but the first fit into `spare` bytes.

    kind  how the transformer's Linears are held
    how   (dtype of activations, on a CPU)
    Pictures are decoded one by one.
    """
    dtype, on_cpu = how
    sizes = model.transformer(kind, dtype)

    def step(count: int) -> int:
        net, batch = model.geometry.transformer, count * job.batch
        peak = transformer_peak(net, sizes, kind, replace(job, batch=batch), dtype, on_cpu, table=True)
        held = batch * job.target_tokens * net.in_channels * BYTES[dtype]
        return peak + 3 * held  # latents, their noise, and the velocity

    first = step(1)
    return max((count for count in range(1, most + 1) if step(count) - first <= spare), default=1)
