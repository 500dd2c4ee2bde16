"""A module whose weights come and go: what streaming, the modulation table and taking turns have in common.

A `Part` remembers where each tensor belongs, by the module that owns it and not by its path, so a LoRA may be wrapped
around a Linear at any time. An empty part holds meta tensors: shapes without memory. Rejected: `Module.to("meta")`,
which would also take the LoRA's own matrices along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

Read = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Where weights can be had again at any time, by the names of the network's `state_dict`: tensors on the CPU as the
modules want them, views of a mapped file where nothing has to be cast. Pages of the file leave memory with the last
view of them. Raises ModelError in one sentence, also when a file has vanished since the model was opened."""

PAGE = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor's home: `owner.attribute`, called `name` in the file; `shell` has its shape and no memory."""

    owner: nn.Module
    attribute: str
    name: str
    shell: Tensor


class Part:
    """The weights below one module, except what starts with one of `leave`; `prefix` is the module's path."""

    def __init__(self, module: nn.Module, prefix: str, leave: Sequence[str] = ()):
        self.places = tuple(each for each in _places(module, prefix) if not each.name.startswith(tuple(leave)))
        self.by_name = {place.name: place for place in self.places}
        self.names = tuple(self.by_name)

    def put(self, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> None:
        """Set the weights, moved to `device` if that is given; what is not in `tensors` stays as it is."""
        for name, tensor in tensors.items():
            if name in self.by_name:
                _set(self.by_name[name], tensor if device is None else tensor.to(device))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what it holds now."""
        for place in self.places:
            yield place.name, getattr(place.owner, place.attribute)

    def owners(self) -> Iterator[tuple[str, ...]]:
        """The names of the tensors that share a module, module by module."""
        for _, places in groupby(self.places, key=lambda place: id(place.owner)):
            yield tuple(place.name for place in places)

    def empty(self) -> None:
        """Let the weights go."""
        for place in self.places:
            _set(place, place.shell)

    @property
    def bytes(self) -> int:
        """What it holds in memory now."""
        return sum(tensor.nbytes for _, tensor in self.tensors() if tensor.device.type != "meta")


def _set(place: Place, tensor: Tensor) -> None:
    if place.attribute in place.owner._parameters:
        kept = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        place.owner._parameters[place.attribute] = kept
    else:
        place.owner._buffers[place.attribute] = tensor


def _places(module: nn.Module, path: str) -> Iterator[Place]:
    """Every tensor of the module's state_dict. Of a wrapper only what is inside it counts, by the wrapper's own name:
    a LoRA's matrices come from elsewhere and stay."""
    if isinstance(inside := module._modules.get("base"), nn.Module):
        yield from _places(inside, path)
        return
    for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or attribute in module._non_persistent_buffers_set:
            continue
        shell = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")  # `empty_like` imports a compiler
        if isinstance(tensor, nn.Parameter):
            shell = nn.Parameter(shell, requires_grad=False)
        yield Place(module, attribute, f"{path}.{attribute}".lstrip("."), shell)
    for name, child in module.named_children():
        yield from _places(child, f"{path}.{name}".lstrip("."))


def touch(tensor: Tensor) -> None:
    """Bring a mapped tensor's pages into memory, by one byte of each."""
    if tensor.is_contiguous() and tensor.nbytes > PAGE:
        tensor.detach().flatten().view(torch.uint8)[::PAGE].sum()


def fetch(read: Read, names: Sequence[str]) -> Mapping[str, Tensor]:
    """Read and touch: what a thread does while another computes."""
    tensors = read(names)
    for tensor in tensors.values():
        touch(tensor)
    return tensors


def in_turn(read: Read, parts: Sequence[Part]) -> Iterator[Mapping[str, Tensor]]:
    """The weights of one part after the other; the next ones are read while the caller works."""
    with ThreadPoolExecutor(1, "lanting-ahead") as reader:
        coming = None
        for part in parts:
            ready, coming = coming, reader.submit(fetch, read, part.names)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()
