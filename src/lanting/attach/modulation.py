"""The modulation table: a third of the transformer's weights, replaced by the few rows they produce.

Every block asks `img_mod` and `txt_mod` for six vectors each. They depend on the timestep alone: not on the prompt,
not on the picture. A schedule has some dozens of timesteps, so all rows are computed at once before the first step
(4.4 MB a timestep in the full model), and the weights, 6.8 of 20.4 billion, can leave memory. Read block by block
from disk, they never need to be in memory at all.

The Linears stay where they are, possibly without contents, so names, LoRAs and fused blocks see no difference; only
the Sequential around them answers from the table. The timestep is seen on its way into `time_text_embed`.
Rejected: keeping rows from one schedule to the next. How many rows share a matrix product decides their rounding, and
a picture must not depend on what was drawn before it. Rejected too: a table for `norm_out`, 0.1 % of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lanting.attach.parts import Part, Read, in_turn

MODULATIONS = ("img_mod", "txt_mod")


class Clock:
    """Which rows of the table are valid now: (B, 1 or 2) row numbers."""

    rows: Tensor
    told = False  # somebody has set the rows who records the network: it must not look them up itself


class Tabled(nn.Sequential):
    """SiLU and Linear whose results are looked up: the timestep's embedding (B, k, D) is not even read."""

    def __init__(self, modulation: nn.Sequential, clock: Clock, pictures: bool):
        super().__init__(*modulation)
        self.clock, self.pictures = clock, pictures
        self.table: Tensor | None = None  # (times, 6 D)

    def forward(self, input: Tensor) -> Tensor:
        if self.table is None:
            return self.compute(input)
        return self.table[self.clock.rows[:, : input.shape[1]]]  # (B, k, 6 D)

    def row(self) -> Tensor | None:
        """(1, 1, 6 D) of the one item and its one time, a view of the table; None where there are more, or no table."""
        if self.table is None or "forward" in self.__dict__ or self.clock.rows.shape != (1, 1):
            return None
        width = self.table.shape[1]
        first = self.table.storage_offset() + int(self.clock.rows.item()) * width
        return self.table.as_strided((1, 1, width), (width, width, 1), first)

    def compute(self, temb: Tensor) -> Tensor:
        """What an ordinary modulation does."""
        return super().forward(temb)


class ModulationTable:
    """The modulation of one network (transformer or ControlNet), tabulated for one schedule at a time.

    net       has `transformer_blocks`, `time_text_embed` and a config
    read      where the modulation's weights can be had again: they then never stay in memory.
              None: they stay, and the table only saves time
    together  all rows in one matrix product; False: each as the network would have computed it for one picture,
              then bit-identical to no table, and slower to build
    Attach it after the kinds of Linears are settled. LoRAs may come before or after it; call `forget` when they change.
    """

    def __init__(self, net: nn.Module, read: Read | None = None, together: bool = True):
        self.net: Any = net
        self.read, self.together = read, together
        self.times: tuple[float, ...] = ()
        self.clock = Clock()
        self.entries = [(block, name, part) for block, name, part in self._modulations()]
        for block, name, part in self.entries:
            setattr(block, name, Tabled(getattr(block, name), self.clock, name == "img_mod"))
            if part is not None:
                part.empty()
        self.hook = self.net.time_text_embed.register_forward_pre_hook(self._tick)

    def _modulations(self) -> Iterator[tuple[nn.Module, str, Part | None]]:
        for i, block in enumerate(self.net.transformer_blocks):
            for name in MODULATIONS:
                path = f"transformer_blocks.{i}.{name}"
                yield block, name, Part(getattr(block, name), path) if self.read is not None else None

    @property
    def bytes(self) -> int:
        """Memory of the rows."""
        tables = (getattr(block, name).table for block, name, _ in self.entries)
        return sum(table.nbytes for table in tables if table is not None)

    @property
    def device(self) -> torch.device:
        return self.net.txt_norm.weight.device

    def prepare(self, times: Tensor) -> None:
        """Compute the rows for these timesteps (T,), in the dtype in which the network is told them.

        Nothing happens when they are the present ones. Raises ModelError when the weights can't be read again.
        """
        zero = [0.0] if self.net.config.zero_cond_t else []
        wanted = tuple(dict.fromkeys([*times.tolist(), *zero]))
        if wanted == self.times:
            return
        self.forget()
        steps = torch.tensor(wanted, dtype=times.dtype, device=self.device)
        with torch.no_grad():
            groups = self._embeddings(steps, bool(zero))
            self._fill(groups)
        self.times = wanted

    def _embeddings(self, times: Tensor, zero: bool) -> list[Tensor]:
        """The timesteps' embeddings in the groups that share a product: one of (1, T, D), or T of (1, 1 or 2, D)."""
        embed = self.net.time_text_embed.forward  # not the module itself, whose hook is ours
        if self.together:
            return [embed(times[None], times.dtype)]
        pairs = [torch.stack([t, torch.zeros_like(t)]) if zero else t[None] for t in times]
        return [embed(pair[None], times.dtype) for pair in pairs]

    def _fill(self, groups: Sequence[Tensor]) -> None:
        for tabled, part in self._filled():
            try:
                tabled.table = torch.cat([self._rows(tabled, group) for group in groups])
            finally:
                if part is not None:
                    part.empty()

    def _filled(self) -> Iterator[tuple[Tabled, Part | None]]:
        """Every modulation, with its weights in place."""
        parts = [part for _, _, part in self.entries if part is not None]
        weights = in_turn(self.read, parts) if self.read is not None else iter(())
        for block, name, part in self.entries:
            if part is not None:
                part.put(next(weights), self.device)
            yield getattr(block, name), part

    def _rows(self, tabled: Tabled, group: Tensor) -> Tensor:
        """(T, 6 D) of all timesteps, or (1, 6 D) of one."""
        if self.together:
            return tabled.compute(group)[0]
        return tabled.compute(group[:, : 2 if tabled.pictures else 1])[0, :1]  # the text knows one time only

    def forget(self) -> None:
        """Drop all rows; the next schedule computes them anew."""
        self.times = ()
        for block, name, _ in self.entries:
            getattr(block, name).table = None

    def detach(self) -> None:
        """Put the ordinary modulation back, with its weights, and stop listening."""
        for _ in self._filled():
            pass
        for block, name, _ in self.entries:
            setattr(block, name, nn.Sequential(*getattr(block, name)))
        self.hook.remove()

    def _tick(self, module: nn.Module, args: tuple[Tensor, torch.dtype]) -> None:
        """Look up the rows for the timesteps (B, k) that the network was just told."""
        if not self.clock.told:
            self.clock.rows = self.look_up(args[0])

    def look_up(self, told: Tensor) -> Tensor:
        """The numbers of the rows for timesteps (B, k); rows that are missing are computed, with all others."""
        values = told.tolist()
        known = {time: row for row, time in enumerate(self.times)}
        if any(value not in known for row in values for value in row):
            self.prepare(torch.unique(told[:, 0]).flip(0))
            known = {time: row for row, time in enumerate(self.times)}
        rows = [[known[value] for value in row] for row in values]
        return torch.tensor(rows, device=told.device)
