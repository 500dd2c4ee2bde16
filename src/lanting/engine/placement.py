"""A network where a Plan wants it: resident, streamed, tabulated, or taking turns with another on one device.

The parts of `lanting.attach` in their one order: what stays away is left out when weights are read, then the modulation
table, then streaming; LoRAs come last and are not disturbed by either. Rejected: reading everything first and moving
it away after, which needs at the start all the memory that the plan was made to save.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from lanting.attach.modulation import MODULATIONS, ModulationTable
from lanting.attach.parts import Part
from lanting.attach.stream import Mapped, Slots, Streamer
from lanting.engine.compute import has_kernels
from lanting.nn.blockwise import BlockwiseControlNet
from lanting.nn.chains import ChainNet
from lanting.plan import Plan
from lanting.weights.stored import Stored

M = TypeVar("M", bound=nn.Module)
LIVE = 2  # blocks in memory while they stream: one computes, one arrives


class Placed(Generic[M]):
    """A network with its weights in place, and what the plan hung on it.

    stored    the network and its files, and the device where it computes
    stack     path of its blocks: "transformer_blocks", "model.layers"
    resident  how many of them stay, the first ones; None: all
    home      where the others come from: "ram" or "disk"
    table     tabulate the modulation
    """

    def __init__(
        self,
        stored: Stored[M],
        stack: str,
        *,
        resident: int | None = None,
        home: str = "disk",
        table: bool = False,
    ):
        self.stored, self.device = stored, stored.placing.device
        blocks = list(stored.module.get_submodule(stack).children())
        first = len(blocks) if resident is None else min(resident, len(blocks))
        away = [f"{stack}.{i}." for i in range(first, len(blocks))]
        tabled = [f"{stack}.{i}.{name}." for i in range(len(blocks)) for name in MODULATIONS] if table else []
        self.later = (*away, *tabled)
        self.net: M = stored.fill(self.later)
        self.part = Part(self.net, "", self.later)  # what is always there, but for other networks' turns
        self.table = ModulationTable(self.net, stored.read) if table else None
        parts = [Part(blocks[i], f"{stack}.{i}", tabled) for i in range(first, len(blocks))]
        self.streamer = Streamer(blocks[first:], self._carrier(parts, home), LIVE) if parts else None
        self.here = True
        self.copy: dict[str, Tensor] | None = None

    def _carrier(self, parts: Sequence[Part], home: str) -> Mapped | Slots:
        """On a CPU the file is as good as RAM: its pages are RAM while they are wanted."""
        if self.device.type == "cpu":
            return Mapped(parts, self.stored.read)
        return Slots(parts, self.stored.read, self.device, home, LIVE)

    def rest(self) -> None:
        """Let the blocks go that are only passing through."""
        if self.streamer is not None:
            self.streamer.rest()

    def unload(self, parked: str) -> None:
        """Make room on the device. `parked` is "ram" (a copy stays there, made once) or "disk" (read again)."""
        if not self.here:
            return
        self.rest()
        if parked == "ram" and self.device.type != "cpu" and self.copy is None:
            self.copy = {name: tensor.to("cpu") for name, tensor in self.part.tensors()}
        self.part.empty()
        self.here = False
        empty_cache(self.device)

    def load(self) -> None:
        """Have the weights on the device again. Raises ModelError when they can't be read."""
        if self.here:
            return
        done: set[str] = set()  # a packed weight comes whole, and may be of several modules
        try:
            for names in self.part.owners():  # one module at a time: no second network on the way
                if done.issuperset(names):
                    continue
                kept = {name: self.copy[name] for name in names} if self.copy is not None else self.stored.read(names)
                self.part.put(kept, self.device)
                done |= kept.keys()
        except BaseException:
            self.part.empty()
            raise
        self.here = True

    def close(self) -> None:
        """Stop the reading thread and let everything go. A network on which nothing was hung is left to its owners."""
        if self.streamer is not None:
            self.streamer.close()
        if self.streamer is not None or self.table is not None or not self.here:
            self.part.empty()
            self.here = False
        self.copy = None


def empty_cache(device: torch.device) -> None:
    """Give the device what the allocator keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def place_transformer(stored: Stored[M], plan: Plan | None) -> Placed[M]:
    """The transformer by its plan; without one all of it stays on the device."""
    if plan is None:
        placed = Placed(stored, "transformer_blocks")
    else:
        resident = None if plan.streamed == "none" else plan.resident_blocks
        options = {"resident": resident, "home": plan.streamed, "table": plan.modulation_table}
        placed = Placed(stored, "transformer_blocks", **options)
    device, free = stored.placing.device, placed.table is None and placed.streamer is None
    free &= hasattr(next(placed.net.get_submodule("transformer_blocks").children()), "img_mod")
    if free and has_kernels(device) and (plan is None or device.type == "cuda"):
        placed.table = ModulationTable(placed.net)  # the weights stay: only time is saved
    return placed


def place_controlnet(stored: Stored[M], plan: Plan | None) -> Placed[M]:
    """A ControlNet is a tenth of a transformer (2.1's half of one) and stays; the modulation of InstantX's is tabulated
    where the transformer's is. (Blockwise ones and 2.1's have none, and other chains no embedding of the time.)"""
    if isinstance(stored.module, BlockwiseControlNet):
        return Placed(stored, "controlnet_blocks")
    if isinstance(stored.module, ChainNet):
        return Placed(stored, "control_blocks")
    return Placed(stored, "transformer_blocks", table=plan is not None and plan.modulation_table)


def place_encoder(stored: Stored[M], plan: Plan | None) -> Placed[M]:
    """The text encoder by its plan. Where it is read again for every prompt anyway, and memory is so short that the
    transformer streams from disk, its layers pass through one by one too."""
    passing = plan is not None and (plan.encoder, plan.parked, plan.streamed) == ("unload", "disk", "disk")
    return Placed(stored, "model.layers", resident=0 if passing else None)
