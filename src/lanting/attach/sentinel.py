"""A watch over every step: numbers that are not finite, or not possible, are not drawn on; the step is done again.

One length a picture and step tells both: a velocity is noise minus picture, so its root mean square is near one, and
what is not finite anywhere makes the length not finite. In trouble the step is computed once more with eyes on every
part of the network. The first part whose result is not finite, though its inputs are, runs in a safer way from then on
(`attach.safe`), one rung after the other, until the step is sound. Nothing else changes, and without trouble no bit.

A length that is finite but hardly possible is only suspected: if the networks without kernels say the same, it stays.
Rejected: checks of every block in every step, which cost a synchronisation each; a run that starts anew in a safer
dtype, which is another picture, and half as fast for one block's sake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from lanting.attach.safe import HALVES, WAYS, WIDE, Overrides, Safe, kernels
from lanting.core.errors import ModelError, NotFiniteError
from lanting.core.types import Notice, note

LOWEST, HIGHEST = 1 / 32, 32.0  # root mean square of a velocity; of noise minus any picture's latents it is 1 to 5
SPREAD = 3  # faulty parts of a network after which all of them are made safe: it is not their own fault
ALIKE = 0.05  # relative difference at which networks with and without kernels say the same
LIMIT = torch.finfo(torch.float16).max

Again = Callable[[], Tensor]


@dataclass(frozen=True)
class Fault:
    """The first part whose result is not sound. `spilt`: its stream has left the range of float16."""

    path: str
    fed: bool  # its inputs were sound
    spilt: bool


class Sentinel:
    """Over one drawing. Enter it before others hang on the networks; leaving it takes everything off.

    nets    by name: "transformer", "controlnet", "controlnet2", ...
    dtype   of the networks
    known   part -> way, from earlier drawings: so from the first step on
    told    (step, part, way) of the drawing whose choices are made again, in place of `known`; -1: from the start
    mend    reads a part's weights anew; False where it can't
    calm    makes others that hang on the networks let go, before anything is tried; true: the step is done again
    """

    def __init__(
        self,
        nets: Mapping[str, nn.Module],
        dtype: torch.dtype,
        known: Mapping[str, str],
        told: Sequence[Sequence[Any]] | None = None,
        *,
        mend: Callable[[str], bool] = lambda path: False,
        calm: Callable[[bool], None] = lambda redone: None,
    ):
        self.nets, self.dtype, self.mend, self.calm = nets, dtype, mend, calm
        self.parts = dict(part for name, net in nets.items() for part in parts_of(name, net))
        known = {path: way for path, way in known.items() if path in self.parts and way in WAYS}
        due = [(-1, path, way) for path, way in known.items()] if told is None else [(s, p, w) for s, p, w in told]
        self.due = [one for one in due if one[1] in self.parts and one[2] in WAYS]
        self.ways: dict[str, str] = {}
        self.made: list[tuple[int, str, str]] = []  # (step, part, way), as it came into force
        self.ladders: dict[str, list[str]] = {}
        self.hung = Overrides()
        self.notices: list[Notice] = []
        self.step, self.passes = -1, 0  # steps begun, and passes that were made beyond one a step
        self.band = (LOWEST, HIGHEST)
        self.peak: Tensor | None = None  # largest number of the last block's stream, in float16

    def __enter__(self) -> Self:
        self._apply_due(-1)
        stack: Any = getattr(self.nets.get("transformer"), "transformer_blocks", None)
        self.hook = stack.register_forward_hook(self._see) if stack and self.dtype == torch.float16 else None
        return self

    def __exit__(self, *exception: object) -> None:
        self.hung.restore()
        if self.hook is not None:
            self.hook.remove()

    def __call__(self, ask: Again, again: Again) -> Tensor:
        """The velocity (B, N, C) of the next step: `ask` as usual, `again` in full if that is not sound."""
        self.step += 1
        if any(at <= self.step for at, _, _ in self.due):
            self.calm(False)
        self._apply_due(self.step)
        found = ask()
        return found if self.sound(found) else self.rescue(again)

    def sound(self, velocity: Tensor) -> bool:
        """Finite and possible. One reduction, and one wait for the device."""
        peak = [] if self.peak is None else [self.peak.float().view(1)]
        *numbers, high = torch.cat([lengths(velocity), *peak]).tolist() + ([] if peak else [0.0])
        return all(self.band[0] <= one <= self.band[1] for one in numbers) and high < LIMIT

    def rescue(self, again: Again) -> Tensor:
        """The step in a safer way. Raises NotFiniteError or ModelError when there is none."""
        self.calm(True)
        for net in self.nets.values():
            self._run_as_it_comes(net)
        before, mended = len(self.made), [""]
        while True:
            found, fault = self._probe(again)
            if fault is None:
                break
            if not fault.fed:
                raise NotFiniteError(
                    "What {part} was given is not finite in {dtype}; try --dtype float32.",
                    **{"part": fault.path, "dtype": name_of(self.dtype)},
                )
            if self._damaged(self.parts[fault.path]):
                self._mend(fault.path, mended)
            else:
                self._climb(fault)
        if not self.sound(found):
            found = self._suspect(found, again)
        self._tell(self.made[before:], mended[-1])
        return found

    # ---------------------------------------------------------------- finding it
    def _probe(self, again: Again) -> tuple[Tensor, Fault | None]:
        """The step with eyes on every part, in the order in which they compute."""
        seen: list[tuple[str, Tensor]] = []
        hooks = [part.register_forward_hook(partial(look, path, seen)) for path, part in self.parts.items()]
        self.passes += 1
        try:
            found = again()
        finally:
            for hook in hooks:
                hook.remove()
        flags = torch.stack([flag for _, flag in seen]).tolist() if seen else []
        for (path, _), (fed, finite, inside) in zip(seen, flags, strict=True):
            if not finite or not inside:
                return found, Fault(path, fed, finite)
        return found, None

    def _see(self, module: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> None:
        self.peak = out[0].abs().amax()

    # ---------------------------------------------------------------- safer ways
    def _apply_due(self, step: int) -> None:
        """What comes into force with this step."""
        for at, path, way in [one for one in self.due if one[0] <= step]:
            self._apply(path, way, at)
        self.due = [one for one in self.due if one[0] > step]

    def _apply(self, path: str, way: str, step: int | None = None) -> None:
        part, (stack, _, number) = self.parts[path], path.rpartition(".")
        self._run_as_it_comes(self.nets[path.partition(".")[0]])
        self.hung.plain(part)
        self.ways[path] = way
        self.made.append((self.step if step is None else step, path, way))
        if way in WIDE:
            following = f"{stack}.{int(number) + 1}" if number.isdigit() else ""
            onward = lambda: self.ways.get(following) in WIDE  # noqa: E731
            ends = number.isdigit() and following not in self.parts and not path.startswith("controlnet")
            self.hung.set(part, "forward", Safe(part, way, onward=onward, ends=ends))

    def _run_as_it_comes(self, net: nn.Module) -> None:
        """Without a recording of the whole network, which would neither be looked into nor change."""
        if "forward" in net.__dict__:
            self.hung.set(net, "forward")

    def _climb(self, fault: Fault) -> None:
        """The next rung for a part, and for those after it whose stream it has spilt over; at last for all parts."""
        ladder = self.ladders.get(fault.path)
        if ladder is None:
            ladder = self.ladders[fault.path] = self._ladder(fault)
        if not ladder:
            raise NotFiniteError(
                "{part} gives numbers that are not finite in every way: get its weights anew, or leave out the LoRA.",
                part=fault.path,
            )
        way, name = ladder.pop(0), fault.path.split(".")[0]
        reached = [fault.path]
        if fault.spilt:
            reached = self._onward(fault.path)
        if sum(path.startswith(f"{name}.") for path in self.ladders) >= SPREAD:
            reached = [path for path in self.parts if path.startswith(f"{name}.")]
        for path in reached:
            if self._rank(path) < WAYS.index(way):
                self._apply(path, way)

    def _onward(self, path: str) -> list[str]:
        """A block and those behind it."""
        every = list(self.parts)
        stack = path.rpartition(".")[0]
        return [one for one in every[every.index(path) :] if one.rpartition(".")[0] == stack]

    def _rank(self, path: str) -> int:
        return WAYS.index(self.ways[path]) if path in self.ways else -1

    def _ladder(self, fault: Fault) -> list[str]:
        """What is left to try for a part."""
        part = self.parts[fault.path]
        plain = ["plain"] if kernels(part) and not fault.spilt else []
        wide = ["bfloat16"] if self.dtype == torch.float16 else []
        wide += ["float32"] if self.dtype in HALVES else []
        return [way for way in (*plain, *wide) if WAYS.index(way) > self._rank(fault.path)]

    def _damaged(self, part: nn.Module) -> bool:
        """Weights or scales that are no numbers; no way of computing helps."""
        own = [x for module in part.modules() for x in (*module._parameters.values(), *module._buffers.values())]
        here = [x for x in own if x is not None and x.is_floating_point() and x.device.type != "meta"]
        return not all(bool(torch.isfinite(x.float()).all()) for x in here)

    def _mend(self, path: str, mended: list[str]) -> None:
        if path in mended or not self.mend(path) or self._damaged(self.parts[path]):
            raise ModelError(
                "the weights of {part} hold numbers that are not finite: download or quantize the file anew", part=path
            )
        mended.append(path)

    def _suspect(self, found: Tensor, again: Again) -> Tensor:
        """Finite parts, and yet a velocity that is not, or can't be: what do the networks without kernels say?"""
        off = Overrides()
        for part in self.parts.values():
            off.plain(part)
        self.passes += bool(off.undo)
        try:
            other = again() if off.undo else found
        finally:
            off.restore()
        if bool(torch.isfinite(other).all()):
            difference = torch.linalg.vector_norm((other - found).float()) / torch.linalg.vector_norm(found.float())
            if float(difference) > ALIKE or not bool(torch.isfinite(found).all()):
                for path in self.parts:
                    self._apply(path, "plain") if self._rank(path) < 0 else None
            else:  # so be it: a LoRA, random weights
                other = found
            self.band = (0.0, torch.inf) if not self.sound(other) else self.band
            return other
        raise NotFiniteError(
            "The guidance left the range of {dtype}; try --dtype bfloat16, or less guidance.", dtype=name_of(self.dtype)
        )

    # ---------------------------------------------------------------- telling it
    def _tell(self, made: Sequence[tuple[int, str, str]], mended: str) -> None:
        facts: dict[str, object] = {"step": self.step + 1, "dtype": name_of(self.dtype)}
        if made:
            parts = list(dict.fromkeys(path for _, path, _ in made))
            facts |= {"part": parts[0], "more": len(parts) - 1, "way": made[-1][2]}
        if mended:
            told = note("the weights of {part} were damaged in memory: they were read again", part=mended)
        elif not made:
            told = note("step {step} gave numbers that are not finite, and was sound when it was done again", **facts)
        elif facts["way"] == "plain":
            told = note("{part} (and {more} more) broke in step {step}: without kernels from now on", **facts)
        else:
            told = note("{part} (and {more} more) left the range of {dtype} in step {step}: {way} from now on", **facts)
        self.notices.append(told)


def parts_of(name: str, net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of what is looked at: a network's blocks, and what comes before and after them."""
    for child, module in net.named_children():
        inside = isinstance(module, nn.ModuleList | nn.ModuleDict)
        for path, part in module.named_children() if inside else [("", module)]:
            yield f"{name}.{child}.{path}".rstrip("."), part


def look(path: str, seen: list[tuple[str, Tensor]], module: nn.Module, args: Any, out: Any) -> None:
    """Notes (inputs finite, results finite, results inside the range of float16) as one tensor (3,)."""
    results = out if isinstance(out, tuple) else (out,)
    given, made = ([x for x in each if isinstance(x, Tensor)] for each in (args, results))
    yes = torch.ones((), dtype=torch.bool, device=made[0].device)
    finite = [torch.stack([yes, *(torch.isfinite(x).all() for x in each)]).all() for each in (given, made)]
    # a block clips in float16: a number at the end of the range is how it tells that its stream has left it
    inside = [(x.abs() < LIMIT).all() for x in made if x.dtype == torch.float16]
    seen.append((path, torch.stack([*finite, torch.stack([yes, *inside]).all()])))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lengths(velocity: Tensor) -> Tensor:
    """(B, N, C) -> root mean squares (B,) in float32; not finite where a number is not."""
    return torch.linalg.vector_norm(velocity, dim=(1, 2), dtype=torch.float32) / velocity[0].numel() ** 0.5
