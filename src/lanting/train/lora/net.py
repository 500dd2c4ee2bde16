"""The frozen transformer with LoRAs that learn: packed weights, blocks that are computed twice, blocks that stream.

Three things make a 20 B network trainable on a small card, and none changes a gradient:
    a packed Linear's gradient expands its weight again instead of keeping the expanded one (`Frozen`)
    a block keeps what went in and computes the rest again when its gradient is asked for (`Recomputed`)
    blocks that stream arrive in their order on the way there and in the reverse order on the way back
Kernels are left off: they know no gradients. Rejected: torch's own checkpointing, whose second pass goes around the
hooks by which blocks arrive, and keeps the weights of the first.
Sources: LoRA (Hu et al., 2021), QLoRA (Dettmers et al., 2023), Training Deep Nets with Sublinear Memory Cost (Chen et
al., 2016).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.core.errors import RequestError
from lanting.engine.placement import Placed
from lanting.nn.linears import LINEARS, PackedLinear
from lanting.nn.swap import swap

TARGETS = {
    "attention": r"transformer_blocks\.\d+\.attn\..*",
    "blocks": r"transformer_blocks\.\d+\.(attn|img_mlp|txt_mlp)\..*",
    "all": r"transformer_blocks\..*",
}
"""Names for what is usually trained; anything else is a regular expression over the paths of Linears."""


class TrainableLora(nn.Module):
    """A frozen Linear and a LoRA that learns: y = W x + scale * up (down x); `up` begins at zero."""

    def __init__(self, base: nn.Module, down: Tensor, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        outputs = int(base.out_features)  # type: ignore[call-overload]
        self.down = nn.Parameter(down)  # (rank, in)
        self.up = nn.Parameter(torch.zeros(outputs, len(down), device=down.device))  # (out, rank)

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(x, self.down.to(x.dtype)) * self.scale  # (..., rank)
        return self.base(x) + F.linear(thin, self.up.to(x.dtype))


class Frozen(torch.autograd.Function):
    """A packed Linear that is not trained. x (..., in) -> (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: PackedLinear) -> Tensor:
        ctx.linear = linear
        return linear.plain(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.linear.dense(grads[0].dtype), None


def frozen(linear: PackedLinear, x: Tensor) -> Tensor:
    """At the seam where kernels would be."""
    result = Frozen.apply(x, linear)
    assert isinstance(result, Tensor)
    return result


class Recomputed(torch.autograd.Function):
    """A block that forgets what it computed. `again(img, txt, ...)` computes it, then and later."""

    @staticmethod
    def forward(ctx: Any, again: Callable[..., Any], *inputs: Tensor) -> Any:
        ctx.again = again
        ctx.save_for_backward(*inputs)
        return again(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            results = ctx.again(*inputs)
        pairs = [(one, grad) for one, grad in zip(results, grads, strict=True) if one.requires_grad]
        torch.autograd.backward([one for one, _ in pairs], [grad for _, grad in pairs])
        return None, *(x.grad for x in inputs)


class LoraNet:
    """A transformer made ready to learn, and what it learns.

    placed   the network where it computes; some of its blocks may stream
    targets  a name of TARGETS, or a regular expression: which Linears get a LoRA
    alpha    what the LoRA is scaled by, over its rank
    Raises RequestError where no Linear is called so.
    """

    def __init__(self, placed: Placed[Any], rank: int, alpha: float, targets: str, seed: int):
        self.placed, self.net, self.rank, self.scale = placed, placed.net, rank, alpha / rank
        self.net.requires_grad_(False)
        wanted = pattern_of(targets)
        generator = torch.Generator().manual_seed(seed)
        self.loras: dict[str, TrainableLora] = {}

        def make(path: str, old: nn.Module) -> nn.Module | None:
            if not wanted.fullmatch(path):
                return None
            inputs = int(old.in_features)  # type: ignore[call-overload]
            down = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
            self.loras[path] = TrainableLora(old, down.to(placed.device), self.scale)
            return self.loras[path]

        swap(self.net, LINEARS, make)
        if not self.loras:
            raise none_called(targets)
        for module in self.net.modules():
            if isinstance(module, PackedLinear):
                module.product = frozen
        self.blocks = list(self.net.transformer_blocks)
        for index, block in enumerate(self.blocks):
            block.__dict__["forward"] = partial(self._through, index, type(block).forward)

    def _through(self, index: int, forward: Callable[..., Any], img: Tensor, txt: Tensor, ctx: Any) -> Any:
        """A block, recomputed where somebody learns."""
        block = self.blocks[index]
        if not torch.is_grad_enabled():
            return forward(block, img, txt, ctx)

        # modulations, where what makes them learns too: all blocks share them, so they go in as the streams do
        shared = [one.name for one in fields(ctx) if getattr(getattr(ctx, one.name), "requires_grad", False)]

        def again(img: Tensor, txt: Tensor, *moved: Tensor) -> Any:
            self._arrive(index)
            return forward(block, img, txt, replace(ctx, **dict(zip(shared, moved, strict=True))) if shared else ctx)

        heard = img if img.requires_grad else img.detach().requires_grad_()
        return Recomputed.apply(again, heard, txt, *(getattr(ctx, name) for name in shared))

    def _arrive(self, index: int) -> None:
        """Have a block that streams here; the hook in front of it did on the way there, nobody does on the way back."""
        streamer = self.placed.streamer
        if streamer is not None and (place := index - (len(self.blocks) - streamer.count)) >= 0:
            streamer.arrive(place)

    def __call__(self, *inputs: Any, **more: Any) -> Tensor:
        return self.net(*inputs, **more)

    def learn(self, loss: Tensor) -> None:
        """Add the loss's gradients to those of the LoRAs."""
        if (streamer := self.placed.streamer) is not None:
            streamer.backwards = True
        try:
            loss.backward()
        finally:
            if streamer is not None:
                streamer.backwards = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for learner in self.loras.values() for p in (learner.down, learner.up)]

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(path, down (rank, in), up (out, rank) with the scale in it), on the CPU."""
        for path, learner in self.loras.items():
            yield path, learner.down.detach().cpu(), (learner.up.detach() * self.scale).cpu()


def pattern_of(targets: str) -> re.Pattern[str]:
    """Raises RequestError for what is no regular expression."""
    try:
        return re.compile(TARGETS.get(targets, targets))
    except re.error as error:
        raise RequestError(
            "{targets} is no pattern ({reason}): use one of {known}, or a regular expression",
            **{"targets": targets, "reason": error, "known": ", ".join(TARGETS)},
        ) from None


def none_called(targets: str) -> RequestError:
    """Where no Linear is what `targets` says."""
    return RequestError(
        "no Linear of this model is called {targets}: use one of {known}, or a pattern that fits some",
        **{"targets": targets, "known": ", ".join(TARGETS)},
    )


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Texts (1, T, D) as one batch (B, longest T, D), and which of its tokens are real (B, T), or None for all."""
    lengths = torch.tensor([row.shape[1] for row in rows])
    embeds = nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return embeds, None if bool(mask.all()) else mask
