"""Work on a GPU that is recorded once and played back: Python is out of the way of thousands of small kernels.

The first call of a kind and shape runs as it comes: it compiles, tunes and chooses what has to be. The second runs in
the memory of a recording and is then recorded, as a CUDA graph; all later ones are played back. A recording knows
addresses, not values: what is given is copied into memory of its own first, and what comes out is copied away. Playing
back gives the bits of running. Where recording fails, everything runs as it comes from then on, which is told once.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lanting.core.lang import say
from lanting.kernels.gpu.here import second

SPARE = 0.05  # share of the GPU's memory below which nothing more is recorded
HELD = 0.025  # share of it that a single recording may hold where that is asked: 1024 x 1024 pixels with 80 GB

Outcome = tuple[Tensor, ...]
Work = Callable[[Sequence[Tensor]], Outcome]


class Recorder:
    """Records on the current GPU. All its recordings share their memory: they never run at the same time."""

    def __init__(self) -> None:
        self.pool: Any = None

    def fresh(self) -> Recorder:
        """Another one, whose memory ends apart from this one's."""
        return Recorder()

    def ready(self, device: torch.device) -> bool:
        """Whether it is a GPU that nobody else is recording."""
        return device.type == "cuda" and torch.version.hip is None and not torch.cuda.is_current_stream_capturing()

    def roomy(self, device: torch.device) -> bool:
        """Whether memory is left."""
        free, total = memory(device)
        return free > SPARE * total

    def holds(self, size: int, device: torch.device) -> bool:
        """Whether so many bytes may be held for good."""
        return size <= HELD * memory(device)[1]

    def record(self, work: Callable[[], Outcome], device: torch.device) -> tuple[Callable[[], object], Outcome]:
        """(what plays it back, where the results then are). The work is not done yet."""
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


def memory(device: torch.device) -> tuple[int, int]:
    """(bytes that may still be taken, bytes that may be taken in all) of a GPU, a limit that was set included."""
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free + torch.cuda.memory_reserved(device) - held, limit - held), min(total, limit)


@dataclass
class Recording:
    inputs: list[Tensor]
    outputs: Outcome
    play: Callable[[], object]
    held: object  # what it reads besides: addresses that must stay


class Tapes:
    """The last recordings of one kind of work, `most` of them. `sentence` makes one of the reason where one fails."""

    def __init__(
        self,
        recorder: Recorder,
        most: int,
        sentence: Callable[[str], str] = lambda reason: say("steps are not recorded: {reason}", reason=reason),
    ):
        self.recorder, self.most, self.sentence = recorder, most, sentence
        self.met: OrderedDict[Hashable, None] = OrderedDict()
        self.kept: OrderedDict[Hashable, Recording] = OrderedDict()
        self.failed = ""

    def __call__(self, key: Hashable, tensors: Sequence[Tensor], work: Work, held: object = None) -> Outcome:
        """work(tensors), recorded under `key`: everything but shapes and types that decides what is done."""
        mode = torch.is_inference_mode_enabled()  # what is made in it can't be written to outside
        key = (key, mode, tuple((x.shape, x.dtype, x.device) for x in tensors))
        if key in self.kept:
            return self.play(key, tensors)
        if key in self.met and not self.failed and self.recorder.roomy(tensors[0].device):
            return self.keep(key, tensors, work, held)
        self.met[key] = None
        self.trim(self.met, 16 * self.most)
        return work(tensors)

    def keep(self, key: Hashable, tensors: Sequence[Tensor], work: Work, held: object) -> Outcome:
        """Compute in memory of a recording's own, and record that; remember the failure where it can't be done."""
        self.trim(self.kept, self.most - 1)
        if not self.kept:
            self.recorder.forget()  # memory that recordings share ends with the last of them
        inputs = [x.clone() for x in tensors]
        made = work(inputs)
        try:
            play, outputs = self.recorder.record(lambda: work(inputs), tensors[0].device)
        except Exception as error:  # out of memory, too: without recordings there is more of it
            self.failed = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            self.forget()
            print(self.sentence(self.failed), file=sys.stderr, flush=True)
            return made
        self.kept[key] = Recording(inputs, outputs, play, held)
        return made

    def play(self, key: Hashable, tensors: Sequence[Tensor]) -> Outcome:
        recording = self.kept[key]
        self.kept.move_to_end(key)
        for place, value in zip(recording.inputs, tensors, strict=True):
            place.copy_(value)
        recording.play()
        return tuple(x.clone() for x in recording.outputs)

    def trim(self, kept: OrderedDict[Hashable, Any], most: int) -> None:
        while len(kept) > max(0, most):
            kept.popitem(last=False)

    def forget(self) -> None:
        """Drop all recordings; what comes next is recorded anew."""
        self.kept.clear()
        self.met.clear()
        self.recorder.forget()
