"""How devices that share a forward give one another tensors: all to all, by NCCL between GPUs and Gloo between CPUs.

A group of its own, never the process's default one, which belongs to whoever uses us as a library. Members meet over a
file, so that no port is open for it, and Gloo listens on the loopback alone. No wait is without an end: a member that
left breaks Gloo's connections at once, and NCCL's kernels, which would wait for it for ever, are stopped by `abort`.
Where NCCL is missing GPUs exchange by way of the CPU, which is slow and right.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lanting.core.errors import first_line

ENDS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # 2: a failure ends the group, and not the process


class GroupError(Exception):
    """An exchange that can't be made, or was not made in time; says why."""


class Group:
    """One member of `size`. All of them make one with the same `path`, a file that does not exist yet.

    seconds  after which any wait ends
    Raises GroupError, as do all calls.
    """

    def __init__(self, path: str, rank: int, size: int, device: torch.device, seconds: float):
        self.rank, self.size, self.device = rank, size, device
        self.nccl = device.type == "cuda" and dist.is_nccl_available()
        patience = timedelta(seconds=seconds)
        try:
            store = dist.FileStore(path, size)
            store.set_timeout(patience)
            self.group: Any = self._nccl(store, patience) if self.nccl else self._gloo(store, patience)
        except (RuntimeError, ValueError) as error:
            raise GroupError(first_line(error)) from error

    def _gloo(self, store: Any, patience: timedelta) -> Any:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices, options._timeout = [gloo.create_device(hostname="127.0.0.1")], patience
        return gloo(store, self.rank, self.size, options)

    def _nccl(self, store: Any, patience: timedelta) -> Any:
        os.environ.setdefault(ENDS, "2")
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout, options.global_ranks_in_group = patience, list(range(self.size))
        return nccl(store, self.rank, self.size, options)

    def __call__(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `attach.parallel.Swap`. As bytes, which every version of both libraries moves."""
        dtype, place = parts[0].dtype, parts[0].device
        given = torch.cat([part.reshape(-1) for part in parts]).view(torch.uint8)
        sizes = [prod(shape) * dtype.itemsize for shape in shapes]
        asked = [part.numel() * dtype.itemsize for part in parts]
        through = place if self.nccl or place.type == "cpu" else torch.device("cpu")
        given, got = given.to(through), torch.empty(sum(sizes), dtype=torch.uint8, device=through)
        try:
            self.group.alltoall_base(got, given, sizes, asked).wait()
        except RuntimeError as error:
            raise GroupError(first_line(error)) from error
        pieces = got.to(place).view(dtype).split([prod(shape) for shape in shapes])
        return [piece.view(*shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def abort(self) -> None:
        """End what is under way, from any thread; the group is of no use afterwards."""
        try:
            self.group.abort()
        except (RuntimeError, AttributeError):  # it is over already, or ends by itself
            return
