"""Replace modules of one kind inside a model: the one way features attach to Linear and Attend."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def outermost(root: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[tuple[str, nn.Module]]:
    """(path, module) of every `kind` inside that is no part of another one."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in root.named_modules():  # a module's parts follow it
        if isinstance(module, kind) and not (found and path.startswith(f"{found[-1][0]}.")):
            found.append((path, module))
    return found


def swap(
    root: nn.Module,
    kind: type[nn.Module] | tuple[type[nn.Module], ...],
    make: Callable[[str, nn.Module], nn.Module | None],
) -> int:
    """Put `make(path, old)` where a `kind` was; None keeps the old one. Returns how many were replaced. What is part of
    another one (a low-rank Linear's residual) is left to it.

    Raises ValueError if `root` itself is of that kind: it has no parent to hang the new one on.
    """
    if isinstance(root, kind):
        raise ValueError("swap needs a parent: the root itself is of the kind to replace")
    count = 0
    for path, old in outermost(root, kind):
        new = make(path, old)
        if new is not None:
            parent, _, name = path.rpartition(".")
            setattr(root.get_submodule(parent), name, new)
            count += 1
    return count
