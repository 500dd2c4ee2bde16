"""Streaming: blocks arrive while the one before them computes, and leave after; a few are in memory at any time.

A hook in front of each block asks for it and for those that follow; one thread reads ahead. After the last block comes
the first again: that is the next step. Where weights come from and where they go is a Carrier's business:
    Mapped  on a CPU: blocks are views of the mapped file, nothing is copied; the thread touches the pages
    Slots   on a device: blocks travel into reused buffers there, on a stream of their own, from pinned memory that
            holds all blocks ("ram") or passes them on from the file ("disk")
The same bytes compute, so results are bit-identical to resident blocks. Rejected: `Module.to` back and forth, which
allocates every time and writes weights back that nobody changed; hooks behind blocks too, which an exception skips.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lanting.attach.parts import Part, Read, fetch

ALIGN = 256  # bytes between tensors of a flat buffer; every dtype and every device is content with that


class Carrier(Protocol):
    """Brings blocks. `fetch` runs in the reading thread, `enter` and `leave` where the blocks compute."""

    def fetch(self, index: int) -> Any:
        """Begin to bring a block; may wait for the disk, not for the computation."""
        ...

    def enter(self, index: int, load: Any) -> None:
        """Make the block ready to compute."""
        ...

    def leave(self, index: int, load: Any) -> None:
        """The block has computed (or is not wanted after all): its room may be used for another."""
        ...

    def close(self) -> None: ...


class Streamer:
    """The traffic of one stack of blocks: at most `live` of them are in memory or on their way.

    blocks   the modules that stream, in the order in which they compute
    carrier  brings them
    `peak` is the largest number that was there at once. An exception between two blocks leaves nothing to repair: what
    is not wanted next is dropped when the next block is asked for.
    """

    def __init__(self, blocks: Sequence[nn.Module], carrier: Carrier, live: int = 2):
        self.carrier, self.count, self.live = carrier, len(blocks), max(1, live)
        self.coming: dict[int, Future[Any]] = {}
        self.here: dict[int, Any] = {}
        self.peak = 0
        self.backwards = False  # blocks are asked for in the reverse order: gradients on their way back
        self.reader = ThreadPoolExecutor(1, "lanting-stream")
        self.hooks = [block.register_forward_pre_hook(self._hook(i)) for i, block in enumerate(blocks)]

    def _hook(self, index: int) -> Any:
        def before(module: nn.Module, args: Any) -> None:
            self.arrive(index)

        return before

    def arrive(self, index: int) -> None:
        """Have a block ready, and those after it on their way. Raises what reading raised."""
        way = -1 if self.backwards else 1
        wanted = [(index + way * step) % self.count for step in range(min(self.live, self.count))]
        self._drop(set(self.here | self.coming) - set(wanted))
        for each in wanted:
            if each not in self.here and each not in self.coming:
                self.coming[each] = self.reader.submit(self.carrier.fetch, each)
        self.peak = max(self.peak, len(self.here) + len(self.coming))
        if index not in self.here:
            self._enter(index)

    def _enter(self, index: int) -> None:
        future = self.coming[index]
        try:
            load = future.result()  # may be interrupted, and is then still coming
        except Exception:
            self._drop(set(self.coming))  # what else failed is read anew when it is asked for
            raise
        del self.coming[index]
        self.here[index] = load
        self.carrier.enter(index, load)

    def _drop(self, indices: Iterable[int]) -> None:
        for index in sorted(indices):
            if index in self.here:
                self.carrier.leave(index, self.here.pop(index))
            else:
                future = self.coming.pop(index)
                if not future.cancel() and future.exception() is None:
                    self.carrier.leave(index, future.result())

    def rest(self) -> None:
        """Let every block go until one is asked for again: other networks need the memory now."""
        self._drop(set(self.here | self.coming))

    def close(self) -> None:
        """Stop for good. The blocks are left empty."""
        self.rest()
        for hook in self.hooks:
            hook.remove()
        self.reader.shutdown()
        self.carrier.close()


class Mapped:
    """Blocks for a CPU, straight from the file; what has to be cast on the way is in memory only while it is live."""

    def __init__(self, parts: Sequence[Part], read: Read):
        self.parts, self.read = parts, read
        for part in parts:
            part.empty()

    def fetch(self, index: int) -> Mapping[str, Tensor]:
        return fetch(self.read, self.parts[index].names)

    def enter(self, index: int, load: Mapping[str, Tensor]) -> None:
        self.parts[index].put(load)

    def leave(self, index: int, load: Mapping[str, Tensor]) -> None:
        self.parts[index].empty()

    def close(self) -> None:
        pass


@dataclass
class Slot:
    """A reused buffer on the device, with the pinned one through which a file's bytes pass."""

    room: Tensor
    passage: Tensor
    arrived: Any = None  # event: the copy into `room` is done
    left: Any = None  # event: the last computation that read `room` is done


@dataclass
class Load:
    """A block on the device or on its way there."""

    slot: Slot
    tensors: Mapping[str, Tensor]
    arrived: Any = None


@dataclass
class Slots:
    """Blocks for a device with memory of its own. `home` is "ram" or "disk".

    From RAM, every block's weights lie pinned in one buffer each, and nowhere else. On a device without streams (a
    CPU, in tests) copies simply wait.
    """

    parts: Sequence[Part]
    read: Read
    device: torch.device
    home: str = "ram"
    live: int = 2
    free: queue.SimpleQueue[Slot] = field(default_factory=queue.SimpleQueue)
    kept: list[tuple[Tensor, Mapping[str, Tensor]]] = field(default_factory=list)  # flat, and views by name

    def __post_init__(self) -> None:
        self.cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if self.cuda else None
        for part in self.parts:
            part.empty()
        for _ in range(max(1, self.live)):
            self.free.put(Slot(torch.empty(0, dtype=torch.uint8, device=self.device), torch.empty(0)))
        if self.home == "ram":
            for part in self.parts:
                tensors = self.read(part.names)
                flat = pin(torch.empty(flat_size(tensors), dtype=torch.uint8)) if self.cuda else None
                self.kept.append(packed(tensors, flat))

    def fetch(self, index: int) -> Load:
        slot = self.free.get()
        try:
            flat, views = self.kept[index] if self.kept else self._pass(slot, index)
            return self._send(slot, flat, views)
        except BaseException:
            self.free.put(slot)
            raise

    def _pass(self, slot: Slot, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """A block's bytes from the file to the pinned buffer."""
        tensors = self.read(self.parts[index].names)
        if slot.arrived is not None:
            slot.arrived.synchronize()  # the buffer's last contents are on their way no longer
        size = flat_size(tensors)
        if slot.passage.nbytes < size:
            slot.passage = torch.empty(size, dtype=torch.uint8, pin_memory=self.cuda)
        return packed(tensors, slot.passage[:size])

    def _send(self, slot: Slot, flat: Tensor, views: Mapping[str, Tensor]) -> Load:
        if slot.left is not None and self.stream is not None:
            slot.left.synchronize() if slot.room.nbytes < flat.nbytes else self.stream.wait_event(slot.left)
        if slot.room.nbytes < flat.nbytes:
            slot.room = torch.empty(flat.nbytes, dtype=torch.uint8, device=self.device)
            if self.stream is not None:  # whoever had this memory before may still be computing
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream) if self.cuda else nullcontext():
            # Apple's GPUs would read the buffer later, too, and there is no event to wait for before it is filled again
            slot.room[: flat.nbytes].copy_(flat, non_blocking=self.cuda)
            slot.arrived = self.stream.record_event() if self.stream is not None else None
        return Load(slot, {name: like(view, flat, slot.room) for name, view in views.items()}, slot.arrived)

    def enter(self, index: int, load: Load) -> None:
        if load.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(load.arrived)
        self.parts[index].put(load.tensors)

    def leave(self, index: int, load: Load) -> None:
        self.parts[index].empty()
        if self.cuda:
            load.slot.left = torch.cuda.current_stream(self.device).record_event()
        self.free.put(load.slot)

    def close(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
        for flat, _ in self.kept:
            unpin(flat) if self.cuda else None
        self.kept.clear()
        while not self.free.empty():
            self.free.get()


def flat_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a buffer for all of them."""
    return sum(-(-tensor.nbytes // ALIGN) * ALIGN for tensor in tensors.values())


def packed(tensors: Mapping[str, Tensor], flat: Tensor | None) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Copy tensors into one flat buffer (uint8; None: a new one); the buffer, and views of it by name."""
    flat = torch.empty(flat_size(tensors), dtype=torch.uint8) if flat is None else flat
    views, start = {}, 0
    for name, tensor in tensors.items():
        view = flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        views[name] = view.copy_(tensor)
        start += -(-tensor.nbytes // ALIGN) * ALIGN
    return flat, views


def like(view: Tensor, flat: Tensor, room: Tensor) -> Tensor:
    """What `view` is in `flat`, in another buffer."""
    start = view.data_ptr() - flat.data_ptr()
    return room[start : start + view.nbytes].view(view.dtype).view(view.shape)


def pin(flat: Tensor) -> Tensor:
    """Lock a buffer's pages where they are: pinned allocations are rounded up to powers of two, up to twice the need.
    A system that refuses leaves it as it is: right all the same, and slower."""
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)
    return flat


def unpin(flat: Tensor) -> None:
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(flat.data_ptr())
