"""Work on a GPU that is recorded once for every shape and played back from then on, and training by such recordings.

A small network's training step is thousands of little kernels. Python and autograd need longer to ask for them than
a GPU needs to run them; a CUDA graph asks for all of them at once. The first batch of a shape runs as it comes (that
compiles and tunes what has to be), the second is recorded, and it and all later ones are played back. Where recording
fails, everything runs as it comes from then on: the same numbers, only later.

All recordings share one pool of memory, since they never run at the same time: what has to outlive a recording is
copied into tensors of its own. Rejected: padding prompts to few lengths. That needs a mask, a slower attention and
idle tokens, while recording costs about one plain step for each length.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lanting.core.lang import Phrase, say

if TYPE_CHECKING:
    from lanting.train.loop import Trainer
    from lanting.train.replay import Batch

MOST = 320  # recordings kept of one piece of work; a kind of batch has about forty lengths of prompts
SPARE = 0.1  # share of the GPU's memory below which nothing more is recorded

Work = Callable[..., tuple[Tensor, ...]]
Figures = dict[str, Tensor]


class Attempt:
    """A compiled function; the plain one for good where compiling fails (no compiler on the machine, say)."""

    def __init__(self, fast: Callable[..., Any], plain: Callable[..., Any], what: str):
        self.fast, self.plain, self.what, self.failed = fast, plain, what, False

    def __call__(self, *given: Any) -> Any:
        if self.failed:
            return self.plain(*given)
        try:
            return self.fast(*given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise  # recording fails, not compiling
            self.failed = True
            words = str(error).strip().splitlines()[:1]
            reason = f"{type(error).__name__}: {' '.join(words)}"
            told = say("{what} not compiled, so that training is slower ({reason})", what=self.what, reason=reason)
            print(told, file=sys.stderr, flush=True)
        return self.plain(*given)


class Recorder:
    """Records on the current GPU. Another may stand in where there is none: `record` returns what plays it back."""

    def __init__(self) -> None:
        self.stream: Any = None
        self.pool: Any = None
        self.first: Any = None  # in this pool, which ends with the last recording in it

    def ready(self) -> bool:
        """Whether memory is left for it."""
        free, total = torch.cuda.mem_get_info()
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return free + held > SPARE * total

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        """Record what `work` asks for, without running it."""
        if self.pool is None:
            self.stream, self.pool = self.stream or torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        graph, outside, collecting = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), gc.isenabled()
        self.stream.wait_stream(outside)
        gc.disable()  # what a collection frees could ask for what a recording must not contain
        try:
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")  # others may copy meanwhile
                try:
                    work()
                    graph.capture_end()
                except BaseException:
                    self.forget()
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
        finally:
            if collecting:
                gc.enable()
        outside.wait_stream(self.stream)
        self.first = self.first or graph
        return graph.replay

    def aside(self, work: Callable[[], Any]) -> Any:
        """Run work where recordings are made, so that libraries have set up what they need there."""
        self.stream, outside = self.stream or torch.cuda.Stream(), torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            found = work()
        outside.wait_stream(self.stream)
        return found

    def forget(self) -> None:
        """Begin a new pool: recordings that are dropped give back the memory of theirs."""
        self.pool = self.first = None


@cache
def recorder() -> Recorder:
    """The one for everything that the second stage runs on this process's GPU, one after the other."""
    return Recorder()


@dataclass(frozen=True)
class Recording:
    """What is written to, what can be read, and what lies between."""

    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]
    play: Callable[[], object]


class Playback:
    """Work on tensors, recorded for every key and shape that comes twice.

    Inputs of one shape share their memory, whatever the key. What a call returns may be overwritten by the next.
    """

    def __init__(self, recorder: Recorder, what: str = "work", most: int = MOST):
        self.recorder, self.what, self.most = recorder, what, most
        self.met: dict[Hashable, list[tuple[Tensor, torch.device]]] = {}  # what the first call gave, without values
        self.inputs: dict[Hashable, Tensor] = {}
        self.kept: dict[Hashable, Recording] = {}
        self.failed = False

    def __call__(self, key: Hashable, work: Work, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`work(*tensors)`. Under one key, it must depend on nothing else that changes."""
        whole = (key, tuple((x.shape, x.dtype) for x in tensors))
        if whole in self.met and whole not in self.kept and self.willing():
            self.keep(whole, work, tensors)
        recording = self.kept.get(whole)
        if recording is None:
            found = self.recorder.aside(lambda: work(*tensors))
            self.met[whole] = [(x.to("meta"), x.device) for x in found]
            return found
        for place, value in zip(recording.inputs, tensors, strict=True):
            place.copy_(value)
        recording.play()
        return recording.outputs

    def willing(self) -> bool:
        return not self.failed and len(self.kept) < self.most and self.recorder.ready()

    def keep(self, whole: Hashable, work: Work, tensors: Sequence[Tensor]) -> None:
        """Record the work on inputs that look like these. Raises torch.OutOfMemoryError."""
        inputs = [self.place(number, x) for number, x in enumerate(tensors)]
        outputs = tuple(torch.empty_like(like, device=device) for like, device in self.met[whole])

        def write() -> None:
            for place, found in zip(outputs, work(*inputs), strict=True):
                place.copy_(found)

        try:
            self.kept[whole] = Recording(inputs, outputs, self.recorder.record(write))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.failed = True
            words = str(error).strip().splitlines()[:1]
            reason = f"{type(error).__name__}: {' '.join(words)}"
            told = say("{what} not recorded, so that training is slower ({reason})", what=self.what, reason=reason)
            print(told, file=sys.stderr, flush=True)

    def place(self, number: int, like: Tensor) -> Tensor:
        key = (number, like.shape, like.dtype)
        if key not in self.inputs:
            self.inputs[key] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return self.inputs[key]

    def forget(self) -> None:
        """Drop everything recorded."""
        self.met.clear()
        self.kept.clear()
        self.inputs.clear()
        self.recorder.forget()


@runtime_checkable
class Playing(Protocol):
    """An optimizer whose work can be recorded, as `optim.Muon`'s can. Gradients must stay where they are."""

    playback: Playback | None


def record_updates(optimizers: Sequence[object], records: Recorder) -> None:
    """Let optimizers record their work."""
    for optimizer in optimizers:
        if isinstance(optimizer, Playing):
            optimizer.playback = Playback(records, Phrase("updates are"))


class Passes(Protocol):
    """How a trainer goes forward and backward. Gradients are in place between `gather` and `clear`."""

    def __call__(self, name: str, batch: Batch, prefix: Sequence[int], t: Tensor, noise: Tensor) -> Figures: ...

    def gather(self) -> None: ...

    def clear(self) -> None: ...

    def forget(self) -> None: ...


class Plain:
    """One operation after another."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def __call__(self, name: str, batch: Batch, prefix: Sequence[int], t: Tensor, noise: Tensor) -> Figures:
        total, report = self.trainer.loss(batch, prefix, t, noise)
        (total / self.trainer.budget.picks).backward()
        return report

    def gather(self) -> None:
        pass

    def clear(self) -> None:
        pass

    def forget(self) -> None:
        """Drop gradients that may be half of a step's."""
        for parameter in self.trainer.net.parameters():
            parameter.grad = None


class Recorded:
    """Forward and backward pass of each kind and length of prompts as one recording.

    Gradients are summed in memory that stays where it is. A weight that no batch of a step reached has none, as in
    `Plain`: its optimizer must leave it alone.
    """

    def __init__(self, trainer: Trainer, records: Recorder | None = None):
        self.trainer, self.playback = trainer, Playback(records or recorder(), Phrase("batches are"), MOST)
        record_updates(trainer.optimizers, self.playback.recorder)
        self.parameters = list(trainer.net.parameters())
        self.leaves = list(trainer.fast.parameters())  # of the copy that a GPU computes with
        self.sums = [torch.zeros_like(p) for p in self.parameters]
        self.reaches: dict[str, list[int]] = {}  # the parameters that a kind of batch has gradients for
        self.names: tuple[str, ...] = ()  # of figures
        self.touched: set[int] = set()  # parameters reached in this step

    def __call__(self, name: str, batch: Batch, prefix: Sequence[int], t: Tensor, noise: Tensor) -> Figures:
        given = {f.name: value for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}

        def work(*tensors: Tensor) -> tuple[Tensor, ...]:
            *parts, times, drawn = tensors
            return self.pass_through(name, replace(batch, **dict(zip(given, parts, strict=True))), prefix, times, drawn)

        key = (name, tuple(given), batch.grid, batch.patch_grid, tuple(prefix))
        (figures,) = self.playback(key, work, [*given.values(), t, noise])
        self.touched.update(self.reaches[name])
        return dict(zip(self.names, figures.clone().unbind(), strict=True))

    def pass_through(
        self, name: str, batch: Batch, prefix: Sequence[int], t: Tensor, noise: Tensor
    ) -> tuple[Tensor, ...]:
        """One batch forward and backward; its gradients join the sums."""
        total, report = self.trainer.loss(batch, prefix, t, noise)
        found = torch.autograd.grad(total / self.trainer.budget.picks, self.leaves, allow_unused=True)
        self.reaches[name] = [i for i, grad in enumerate(found) if grad is not None]
        torch._foreach_add_([self.sums[i] for i in self.reaches[name]], [g for g in found if g is not None])
        self.names = tuple(report)
        return (torch.stack(list(report.values())),)

    def gather(self) -> None:
        for i in self.touched:
            self.parameters[i].grad = self.sums[i]

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        if self.touched:
            torch._foreach_zero_([self.sums[i] for i in self.touched])
        self.touched.clear()

    def forget(self) -> None:
        """Drop what is recorded, and gradients that may be half of a step's."""
        self.touched.update(range(len(self.sums)))
        self.clear()
        self.playback.forget()


def passes_for(trainer: Trainer) -> Passes:
    """Recordings for one GPU. Several GPUs wait for one another while others would record: they go without."""
    alone = trainer.device.type == "cuda" and trainer.world == 1
    return Recorded(trainer) if alone and (MOST or trainer.fast is not trainer.net) else Plain(trainer)
