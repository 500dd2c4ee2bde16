"""A forward shared out by its picture tokens is the forward of one device: by the arithmetic's last bits at most.

Devices are threads here, each with a network of its own and real groups of Gloo between them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import nets
from lanting.attach.compute import attach_kernels
from lanting.attach.modulation import ModulationTable
from lanting.attach.parallel import Exchange, Seat, Shared, shares
from lanting.attach.parallel_group import ENDS, Group, GroupError
from lanting.kernels.library import ready

CPU = torch.device("cpu")
GRIDS = {  # 35 tokens; 15 + 10; 45 + 20, enough for the kernels to round to 8 bits
    "one picture": [(1, 5, 7)],
    "references": [(1, 3, 5), (1, 2, 3), (1, 1, 4)],
    "large references": [(1, 5, 9), (1, 4, 5)],
}


@dataclass(frozen=True)
class Asked:
    """Arguments of one forward."""

    grids: list[tuple[int, int, int]]
    target: int
    latents: Tensor
    times: Tensor
    prompt: Tensor
    mask: Tensor | None
    control: list[Tensor] = field(default_factory=list)


def asked(pictures: str, batch: int = 1, masked: bool = False, control: bool = False) -> Asked:
    torch.manual_seed(batch)
    grids = GRIDS[pictures]
    tokens, target = sum(a * b * c for a, b, c in grids), grids[0][1] * grids[0][2]
    mask = torch.arange(6)[None] < torch.tensor([[4], [6]])[:batch] if masked else None
    residuals = [torch.randn(batch, tokens, 96) for _ in range(2)] if control else []
    times = torch.tensor([0.9, 0.4])[:batch]
    return Asked(grids, target, torch.randn(batch, tokens, 16), times, torch.randn(batch, 6, 48), mask, residuals)


def network(**changes: Any) -> Any:
    net = nets.transformer(num_layers=3, num_attention_heads=3, **changes)
    for name, weight in net.named_parameters():
        if ".attn.norm_" in name:  # so that who is looked at counts
            weight.fill_(2.0)
    return net


def together(size: int, path: str, work: Callable[[int, Group], Any], seconds: float = 20) -> list[Any]:
    """What each of `size` devices makes of it."""

    def device(rank: int) -> Any:
        with torch.no_grad():
            return work(rank, Group(path, rank, size, CPU, seconds))

    with ThreadPoolExecutor(size) as pool:
        return [one.result(60) for one in [pool.submit(device, rank) for rank in range(size)]]


def shared(net: Callable[[], Any], given: Asked, size: int, path: str) -> Tensor:
    """The target's velocity (B, N, C) from `size` devices."""

    made = [net() for _ in range(size)]  # one after the other: random numbers are everybody's

    def work(rank: int, group: Group) -> Tensor:
        own, seat = made[rank], Seat(rank, size, given.latents.shape[1])
        control = [seat.own(one) for one in given.control]
        rest = (given.latents, given.times, given.prompt, given.mask, given.grids, given.target)
        before = {name: module.__dict__.get("forward") for name, module in own.named_modules()}
        found = Shared(own, seat, group)(*rest, control=control)
        assert before == {name: module.__dict__.get("forward") for name, module in own.named_modules()}
        return found

    return torch.cat(together(size, path, work), 1)


@torch.no_grad()
def plain(net: Any, given: Asked) -> Tensor:
    rest = (given.latents, given.times, given.prompt, given.mask, given.grids, given.target)
    return net(*rest, control=given.control)[:, : given.target]


def off(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted))


CASES = [
    ("one picture", 1, False, False, False),
    ("one picture", 2, True, True, False),
    ("references", 1, True, False, True),
    ("references", 2, False, True, True),
    ("references", 2, True, False, False),
]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("pictures", "batch", "masked", "control", "zero"), CASES)
def test_shared_is_plain(tmp_path, size, pictures, batch, masked, control, zero):
    """Masks, batches, references modulated at time zero, residuals, and counts that don't divide: 3 heads over 2."""
    given = asked(pictures, batch, masked, control)
    make = lambda: network(zero_cond_t=zero)  # noqa: E731
    assert off(shared(make, given, size, str(tmp_path / "meet")), plain(make(), given)) < 1e-5


@pytest.mark.parametrize("zero", [False, True])
def test_with_kernels_tables_and_packed_weights(tmp_path, zero):
    def make() -> Any:
        net = nets.int4(network(zero_cond_t=zero))
        assert attach_kernels(net) == ready()
        ModulationTable(net).prepare(given.times)
        return net

    given = asked("large references", 1, True)
    assert off(shared(make, given, 2, str(tmp_path / "meet")), plain(make(), given)) < 1e-5


def test_positions_and_heads_matter(tmp_path, monkeypatch):
    """What the equality above rests on: without it there is none."""
    given = asked("one picture")
    wanted = plain(network(), given)
    with monkeypatch.context() as patch:
        patch.setattr("lanting.attach.parallel.Cut.__call__", lambda self, *key: whole_rope(self, *key))
        assert off(shared(network, given, 2, str(tmp_path / "a")), wanted) > 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(Exchange, "__call__", lambda self, q, k, v, mask: self.inner(q, k, v, mask))
        assert off(shared(network, given, 2, str(tmp_path / "b")), wanted) > 1e-3


def whole_rope(cut: Any, grids: Any, text: int, device: Any) -> tuple[Tensor, ...]:
    start, stop = cut.seat.bounds[cut.seat.rank]
    return tuple(x[: text + stop - start] for x in cut.inner(grids, text, device))


def test_shares_cover_everything_once():
    for count in (1, 7, 24, 35):
        for size in range(1, 9):
            found = shares(count, size)
            assert [one for a, b in found for one in range(a, b)] == list(range(count))
            assert max(b - a for a, b in found) - min(b - a for a, b in found) <= 1


def test_targets_and_references_are_told_apart():
    seats = [Seat(rank, 3, 25) for rank in range(3)]
    assert [seat.targets(15) for seat in seats] == [8, 7, 0]
    assert torch.cat([seat.own(torch.arange(25)[None]) for seat in seats], 1).tolist() == [list(range(25))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_exchange_moves_every_dtype(tmp_path, dtype):
    def work(rank: int, group: Group) -> list[Tensor]:
        parts = [torch.full((rank + 1, other + 1), 10 * rank + other, dtype=dtype) for other in range(2)]
        return group(parts, [(other + 1, rank + 1) for other in range(2)])

    found = together(2, str(tmp_path / "meet"), work)
    for rank, parts in enumerate(found):
        for other, part in enumerate(parts):
            assert part.dtype == dtype and part.shape == (other + 1, rank + 1)
            assert bool((part == 10 * other + rank).all())


class Stand:
    """NCCL's group as far as it is used here, made of Gloo's: how NCCL itself behaves is not told by it."""

    class Options:
        pass

    def __init__(self, store: Any, rank: int, size: int, options: Any):
        assert options.global_ranks_in_group == [0, 1]
        self.group: Any = dist.ProcessGroupGloo(store, rank, size, options._timeout)

    def alltoall_base(self, *given: Any) -> Any:
        return self.group.alltoall_base(*given)


def test_gpus_meet_by_nccl_whose_failures_end_no_process(tmp_path, monkeypatch):
    monkeypatch.delenv(ENDS, raising=False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Stand, raising=False)

    def work(rank: int) -> list[float]:
        group = Group(str(tmp_path / "meet"), rank, 2, torch.device("cuda", rank), 20)
        assert group.nccl and isinstance(group.group, Stand)
        group.abort()  # of what has none: nothing
        return [float(part) for part in group([torch.tensor([rank + 0.5])] * 2, [(1,), (1,)])]

    with ThreadPoolExecutor(2) as pool:
        assert [one.result(60) for one in [pool.submit(work, rank) for rank in range(2)]] == [[0.5, 1.5]] * 2
    assert os.environ[ENDS] == "2"


def test_who_leaves_is_noticed_and_who_stays_away_is_not_waited_for(tmp_path):
    with pytest.raises(GroupError):
        Group(str(tmp_path / "alone"), 0, 2, CPU, 0.3)
    met = threading.Barrier(2)

    def work(rank: int, group: Group) -> str:
        met.wait(10)
        if rank == 1:
            group.abort()
            del group.group
            return ""
        try:
            group([torch.ones(1), torch.ones(1)], [(1,), (1,)])
        except GroupError as error:
            return str(error)
        return "nothing"

    first, _ = together(2, str(tmp_path / "meet"), work, 2)
    assert first not in ("", "nothing")
