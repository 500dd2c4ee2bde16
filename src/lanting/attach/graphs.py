"""The transformer's forward as one recording: a GPU is asked once for what takes Python thousands of calls.

The first call of a shape runs as it comes: it compiles, tunes and chooses what has to be. The second runs in the memory
of a recording and is then recorded, as a CUDA graph; all later ones are played back. A recording knows addresses, not
values: what is given is copied into memory of its own first, and what comes out is copied away. Playing back gives the
bits of running.

What a recording must not outlive is compared before every use: the weights (which come and go when networks take turns)
by the identity of a few, the modulation's table by its rows. The timestep becomes row numbers of that table outside of
the recording, because looking it up is Python. Where recording fails, everything runs as it comes from then on.
Rejected: recordings of single blocks. They would serve caches and streaming, and cost 60 launches and 60 copies a step.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lanting.attach.modulation import ModulationTable, Tabled
from lanting.core.lang import say
from lanting.kernels.gpu.here import second
from lanting.nn.mmdit import QwenImageTransformer, Stack

MOST = 4  # recordings kept: two sides of the guidance in two sizes
SPARE = 0.05  # share of the GPU's memory below which nothing more is recorded

Work = Callable[[], Tensor]


class Recorder:
    """Records on the current GPU. All recordings share their memory: they never run at the same time."""

    def __init__(self) -> None:
        self.pool: Any = None

    def ready(self, device: torch.device) -> bool:
        """Whether it is a GPU that nobody else is recording."""
        return device.type == "cuda" and torch.version.hip is None and not torch.cuda.is_current_stream_capturing()

    def roomy(self, device: torch.device) -> bool:
        """Whether memory is left."""
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held > SPARE * total

    def record(self, work: Work, device: torch.device) -> tuple[Callable[[], object], Tensor]:
        """(what plays it back, where the result then is). The work is not done yet."""
        with torch.cuda.device(device):
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            second(device)  # streams are made outside of recordings
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # others may go on
                found = work()
        return graph.replay, found

    def forget(self) -> None:
        """Recordings that were dropped give back their memory with this pool."""
        self.pool = None


@dataclass
class Recording:
    inputs: list[Tensor]
    output: Tensor
    play: Callable[[], object]
    held: object  # what it reads besides: addresses that must stay


class Graphs:
    """Recordings of one transformer. `table` is its modulation table, if it has one."""

    def __init__(
        self,
        net: QwenImageTransformer,
        table: ModulationTable | None = None,
        recorder: Recorder | None = None,
        most: int = MOST,
    ):
        self.net, self.table, self.most = net, table, most
        self.recorder = recorder or Recorder()
        self.met: OrderedDict[Hashable, None] = OrderedDict()
        self.kept: OrderedDict[Hashable, Recording] = OrderedDict()
        self.basis: list[object] = []  # what all of them were recorded with
        self.failed = ""
        self.last: tuple[Tensor, object, Tensor] | None = None  # timesteps, their state, their rows

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor | None,
        grids: Sequence[Any],
        target_tokens: int,
        **more: Any,
    ) -> Tensor:
        """`QwenImageTransformer.forward`."""
        control = tuple(more.get("control", ()))
        tensors = [latents, timestep, prompt_embeds, *([] if prompt_mask is None else [prompt_mask]), *control]
        fixed = (tuple(grids), target_tokens, more.get("branch", "positive"), prompt_mask is not None)
        mode = torch.is_inference_mode_enabled()  # what is made in it can't be written to outside
        key = (fixed, mode, tuple((x.shape, x.dtype, x.device) for x in tensors))
        plain = partial(type(self.net).forward, self.net)
        if not self.willing(latents) or set(more) - {"control", "branch"}:
            return plain(latents, timestep, prompt_embeds, prompt_mask, grids, target_tokens, **more)
        rows = self.rows(timestep)
        tensors += [] if rows is None else [rows]
        self.check()
        if key in self.kept:
            return self.play(key, tensors)
        if key in self.met and self.recorder.roomy(latents.device):
            return self.keep(key, tensors, fixed)
        self.met[key] = None
        self.trim(self.met, 16 * self.most)
        return plain(latents, timestep, prompt_embeds, prompt_mask, grids, target_tokens, **more)

    def willing(self, latents: Tensor) -> bool:
        """Whether this call may be recorded: whoever wrapped the stack (a cache, say) or listens decides in Python."""
        stack = self.net.transformer_blocks
        wrapped = type(stack) is not Stack or "forward" in stack.__dict__
        wrapped = wrapped or any(each._forward_hooks or each._forward_pre_hooks for each in (stack, *stack))
        return not (self.failed or wrapped or torch.is_grad_enabled()) and self.recorder.ready(latents.device)

    def check(self) -> None:
        """Drop what was recorded with other weights or another table."""
        basis = list(self.now())
        if len(basis) != len(self.basis) or any(a is not b for a, b in zip(basis, self.basis, strict=True)):
            self.forget()
            self.basis = basis

    def now(self) -> Sequence[object]:
        """What recordings depend on: a weight here and there, the modules around them, the table's rows."""
        net: Any = self.net
        blocks = net.transformer_blocks
        some = [net.img_in, net.proj_out, *(b for i in (0, -1) for b in blocks[i].modules())]
        found: list[object] = [tensor for module in some for tensor in tensors_of(module)]
        for block in blocks:
            found += [
                block,
                block.__dict__.get("forward"),
                block.attn.to_q,
                block.attn.to_add_out,
                block.img_mlp.net[2],
            ]
        return [*found, *(part.table for b in (blocks[0], blocks[-1]) if isinstance(part := b.img_mod, Tabled))]

    def keep(self, key: Hashable, tensors: Sequence[Tensor], fixed: tuple[Any, ...]) -> Tensor:
        """Compute in memory of a recording's own, and record that; remember the failure where it can't be done."""
        self.trim(self.kept, self.most - 1)
        if not self.kept:
            self.recorder.forget()  # memory that recordings share ends with the last of them
        inputs = [x.clone() for x in tensors]
        made = self.work(inputs, fixed)
        try:
            play, output = self.recorder.record(lambda: self.work(inputs, fixed), tensors[0].device)
        except Exception as error:  # out of memory, too: without recordings there is more of it
            self.failed = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            self.forget()
            print(say("steps are not recorded: {reason}", reason=self.failed), file=sys.stderr, flush=True)
            return made
        held = self.net.rope(fixed[0], tensors[2].shape[1], tensors[0].device)
        self.kept[key] = Recording(inputs, output, play, held)
        return made

    def work(self, inputs: Sequence[Tensor], fixed: tuple[Any, ...]) -> Tensor:
        """The network's forward on the memory of a recording."""
        grids, target_tokens, branch, masked = fixed
        latents, timestep, prompt, *rest = inputs
        rows = rest.pop() if self.table is not None else None
        mask = rest.pop(0) if masked else None
        clock = None if self.table is None else self.table.clock
        if clock is not None and rows is not None:
            clock.rows, clock.told = rows, True
        try:
            forward = type(self.net).forward
            return forward(self.net, latents, timestep, prompt, mask, grids, target_tokens, control=rest, branch=branch)
        finally:
            if clock is not None:
                clock.told = False

    def play(self, key: Hashable, tensors: Sequence[Tensor]) -> Tensor:
        recording = self.kept[key]
        self.kept.move_to_end(key)
        for place, value in zip(recording.inputs, tensors, strict=True):
            place.copy_(value)
        recording.play()
        return recording.output.clone()

    def rows(self, timestep: Tensor) -> Tensor | None:
        """Which rows of the table these timesteps (B,) have; looked up once for both sides of the guidance."""
        if self.table is None:
            return None
        if self.last is not None and self.last[0] is timestep and self.last[1] == self.state(timestep):
            return self.last[2]
        dtype = self.net.img_in.weight.dtype
        found = self.table.look_up(self.net.times(timestep.to(dtype)))  # may compute the table anew
        self.last = None if timestep.is_inference() else (timestep, self.state(timestep), found)
        return found

    def state(self, timestep: Tensor) -> object:
        """What else decides about the rows of the same tensor of timesteps."""
        assert self.table is not None
        return (0 if timestep.is_inference() else timestep._version, self.table.times)

    def trim(self, kept: OrderedDict[Hashable, Any], most: int) -> None:
        while len(kept) > max(0, most):
            kept.popitem(last=False)

    def forget(self) -> None:
        """Drop all recordings; what comes next is recorded anew. Call it when modules of the network were swapped."""
        self.kept.clear()
        self.met.clear()
        self.last = None
        self.basis = []
        self.recorder.forget()


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [x for x in (*module._parameters.values(), *module._buffers.values()) if x is not None]


def attach_graphs(
    net: QwenImageTransformer, table: ModulationTable | None = None, recorder: Recorder | None = None, most: int = MOST
) -> Graphs:
    """Record the network's forward from now on. Not for networks whose weights stream. Undone by `detach_graphs`."""
    graphs = Graphs(net, table, recorder, most)
    net.__dict__["forward"] = graphs
    return graphs


def detach_graphs(net: QwenImageTransformer) -> None:
    """Run as it comes again."""
    graphs = net.__dict__.pop("forward", None)
    if isinstance(graphs, Graphs):
        graphs.forget()


def forget_graphs(net: QwenImageTransformer) -> None:
    """Drop what was recorded, if anything is: modules of the network were swapped."""
    graphs = net.__dict__.get("forward")
    if isinstance(graphs, Graphs):
        graphs.forget()
