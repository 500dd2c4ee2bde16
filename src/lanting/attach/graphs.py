"""The transformer's forward as one recording: a GPU is asked once for what takes Python thousands of calls.

What a recording must not outlive is compared before every use: the weights (which come and go when networks take turns)
by the identity of a few, the modulation's table by its rows. The timestep becomes row numbers of that table outside of
the recording, because looking it up is Python. Whoever wraps the stack and decides between its blocks has runs of them
recorded instead (`attach.pieces`). How recording works: `attach.tapes`.
Rejected: recordings of single blocks. They would serve streaming, too, and cost 60 launches and 60 copies a step.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lanting.attach.modulation import ModulationTable, Tabled
from lanting.attach.tapes import Recorder, Tapes
from lanting.nn.blockwise import Behind
from lanting.nn.chains import Chains
from lanting.nn.mmdit import QwenImageTransformer, Stack

MOST = 8  # recordings kept, of two sizes: two sides of the guidance, and three runs of blocks where steps are spared


class Graphs:
    """Recordings of one transformer. `table` is its modulation table, if it has one."""

    def __init__(
        self,
        net: QwenImageTransformer,
        table: ModulationTable | None = None,
        recorder: Recorder | None = None,
        most: int = MOST,
    ):
        self.net, self.table = net, table
        self.tapes = Tapes(recorder or Recorder(), most)
        self.basis: list[object] = []  # what all of them were recorded with
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
        steer = more.get("steer")
        if not (self.willing(latents) and repeatable(steer)) or set(more) - {"control", "branch", "steer"}:
            plain = type(self.net).forward
            return plain(self.net, latents, timestep, prompt_embeds, prompt_mask, grids, target_tokens, **more)
        seen, told, own = steered(steer)
        tensors = [latents, timestep, prompt_embeds, *([] if prompt_mask is None else [prompt_mask]), *seen]
        tensors += more.get("control", ())
        fixed = (tuple(grids), target_tokens, more.get("branch", "positive"), prompt_mask is not None)
        rows = self.rows(timestep)
        tensors += [] if rows is None else [rows]
        self.check()
        held = (self.net.rope(fixed[0], prompt_embeds.shape[1], latents.device), own)
        return self.tapes((*fixed, told), tensors, partial(self.work, fixed, steer), held)[0]

    def willing(self, latents: Tensor) -> bool:
        """Whether the whole may be recorded: whoever wrapped the stack (a cache, say) or listens decides in Python."""
        stack = self.net.transformer_blocks
        wrapped = type(stack) is not Stack or "forward" in stack.__dict__
        return self.able(latents) and not (wrapped or listened(stack))

    def able(self, x: Tensor) -> bool:
        """Whether blocks may be recorded here and now."""
        blocks: Any = self.net.transformer_blocks
        free = not (self.failed or torch.is_grad_enabled() or any(map(listened, blocks)))
        return free and self.tapes.recorder.ready(x.device)

    @property
    def failed(self) -> str:
        """Why nothing is recorded any more; empty where it is."""
        return self.tapes.failed

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

    def work(self, fixed: tuple[Any, ...], steer: Any, inputs: Sequence[Tensor]) -> tuple[Tensor]:
        """The network's forward on the memory of a recording."""
        grids, target_tokens, branch, masked = fixed
        latents, timestep, prompt, *rest = inputs
        rows = rest.pop() if self.table is not None else None
        mask = rest.pop(0) if masked else None
        more: dict[str, Any] = {"steer": moved(steer, rest), "control": rest, "branch": branch}
        with self.at(rows):
            return (type(self.net).forward(self.net, latents, timestep, prompt, mask, grids, target_tokens, **more),)

    @contextmanager
    def at(self, rows: Tensor | None) -> Iterator[None]:
        """The table answers with these rows."""
        if self.table is None or rows is None:
            yield
            return
        clock = self.table.clock
        before = (getattr(clock, "rows", rows), clock.told)
        clock.rows, clock.told = rows, True
        try:
            yield
        finally:
            clock.rows, clock.told = before

    def rows(self, timestep: Tensor) -> Tensor | None:
        """Which rows of the table these timesteps (B,) have; looked up once for both sides of the guidance."""
        if self.table is None:
            return None
        if self.last is not None and self.last[0] is timestep and self.last[1] == self.state(timestep):
            return self.last[2]
        dtype = self.net.txt_norm.weight.dtype  # a norm's: `img_in` may be packed, or a LoRA around it
        found = self.table.look_up(self.net.times(timestep.to(dtype)))  # may compute the table anew
        self.last = None if timestep.is_inference() else (timestep, self.state(timestep), found)
        return found

    def state(self, timestep: Tensor) -> object:
        """What else decides about the rows of the same tensor of timesteps."""
        assert self.table is not None
        return (0 if timestep.is_inference() else timestep._version, self.table.times)

    def forget(self) -> None:
        """Drop all recordings; what comes next is recorded anew. Call it when modules of the network were swapped."""
        self.tapes.forget()
        self.last = None
        self.basis = []


def listened(module: nn.Module) -> bool:
    """Whether somebody hears of its calls."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def repeatable(steer: Any) -> bool:
    """Whether what is done behind blocks, and beside them, says what it depends on, and nobody listens to it."""
    if not all(isinstance(one, Behind | Chains) for one in inside(steer)):
        return False
    return not any(listened(block) for one in inside(steer) for net in one.nets for block in blocks_of(net))


def steered(steer: Any) -> tuple[tuple[Tensor, ...], Hashable, list[object]]:
    """What changes of what is done there; what else decides about it, as part of a recording's key; what that must
    hold: weights and ways of computing are known by their identity, which nothing else may come to have."""
    if steer is None:
        return (), None, []
    held: list[object] = []
    for net in (net for one in inside(steer) for net in one.nets):
        modules = [[*block.modules()] for block in blocks_of(net)]
        held += [x for m in [net.entrance, *modules[0], *modules[-1]] for x in tensors_of(m)]
        ways = ("forward", "product")  # what a kernel or a safer way put there
        held += [m.__dict__.get(way) for block in modules for m in block for way in ways]
    scales = tuple(one.scales for one in inside(steer))
    return tuple(x for one in inside(steer) for x in one.seen), (scales, *map(id, held)), held


def moved(steer: Any, rest: list[Tensor]) -> Any:
    """The same on a recording's memory: `seen` of `steered` is taken from the front of `rest`."""
    found = tuple(replace(one, seen=tuple(rest.pop(0) for _ in one.seen)) for one in inside(steer))
    return found if isinstance(steer, tuple) else next(iter(found), None)


def inside(steer: Any) -> tuple[Any, ...]:
    """Each of what ControlNets do in a network: none, one build's, or one's of each."""
    return () if steer is None else steer if isinstance(steer, tuple) else (steer,)


def blocks_of(net: Any) -> nn.ModuleList:
    """A ControlNet's."""
    return net.control_blocks if net.along else net.controlnet_blocks


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [x for x in (*module._parameters.values(), *module._buffers.values()) if x is not None]


def attach_graphs(
    net: QwenImageTransformer, table: ModulationTable | None = None, recorder: Recorder | None = None, most: int = MOST
) -> Graphs:
    """Record the network's forward from now on. Not for networks whose weights stream. Undone by `detach_graphs`."""
    graphs = Graphs(net, table, recorder, most)
    net.__dict__["forward"] = graphs
    return graphs


def graphs_of(net: nn.Module) -> Graphs | None:
    """What records the network, if anything does."""
    graphs = net.__dict__.get("forward")
    return graphs if isinstance(graphs, Graphs) else None


def detach_graphs(net: QwenImageTransformer) -> None:
    """Run as it comes again."""
    graphs = net.__dict__.pop("forward", None)
    if isinstance(graphs, Graphs):
        graphs.forget()


def forget_graphs(net: QwenImageTransformer) -> None:
    """Drop what was recorded, if anything is: modules of the network were swapped."""
    graphs = graphs_of(net)
    if graphs is not None:
        graphs.forget()
