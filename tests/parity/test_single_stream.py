"""Our Qwen-Image-2.1 transformer against diffusers' on the same random weights.

The reference wants the prompt with a slot for every four tokens of a reference picture, and the target behind all else;
`asked` puts our arguments into that order. Its own way of keeping a prefix is compared too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from torch import Tensor

from lanting.nn.rope import rotate
from lanting.nn.single_stream import Attend, QwenImage21Transformer, SingleStreamConfig, keep_prefix, layout, sinusoid
from lanting.nn.swap import swap

TINY = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "context_in_dim": 24,
    "in_channels": 12,
    "out_channels": 8,
    "mlp_ratio": 2,
    "axes_dims_rope": (8, 12, 12),
    "eps": 1e-3,  # large enough to be seen wherever it is forgotten
}
# grids, target first (the reference wants tokens by fours), and places of the others
SEQUENCES = {
    "text": ([(1, 4, 6)], ()),
    "one reference": ([(1, 4, 3), (1, 3, 4)], (2,)),
    "two references": ([(1, 5, 4), (1, 4, 7), (1, 2, 2)], (0, 3)),
    "side by side": ([(1, 2, 4), (1, 4, 1), (1, 4, 4)], (3, 3)),
    "at the end": ([(1, 4, 4), (1, 6, 2)], (4,)),
}
LENGTHS = [(4,), (7, 4)]


@dataclass
class Call:
    """What our transformer is given."""

    latents: Tensor
    timestep: Tensor
    prompt: Tensor
    mask: Tensor | None
    grids: list
    places: tuple

    @property
    def target(self) -> int:
        return math.prod(self.grids[0])

    def at(self, step: int, dtype=torch.float32) -> Call:
        """The same drawing at another time: only the target has moved."""
        moved = self.latents.clone()
        moved[:, : self.target] = torch.randn(moved[:, : self.target].shape, generator=seeded(step))
        time = (self.timestep * 0.8**step).to(dtype)
        return replace(self, latents=moved.to(dtype), timestep=time, prompt=self.prompt.to(dtype))

    def row(self, index: int) -> Call:
        """One row by itself, without the padding."""
        assert self.mask is not None
        one, words = slice(index, index + 1), int(self.mask[index].sum())
        prompt = self.prompt[one, :words]
        return replace(self, latents=self.latents[one], timestep=self.timestep[one], prompt=prompt, mask=None)

    def wide(self) -> Call:
        """The same numbers in float32."""
        return replace(self, latents=self.latents.float(), timestep=self.timestep.float(), prompt=self.prompt.float())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def call(sequence: str = "two references", lengths: tuple[int, ...] = (7, 4)) -> Call:
    grids, places = SEQUENCES[sequence]
    batch, longest = len(lengths), max(lengths)
    latents = torch.randn(batch, sum(map(math.prod, grids)), 12, generator=seeded(1))
    mask = torch.tensor([[i < n for i in range(longest)] for n in lengths])
    prompt = torch.randn(batch, longest, 24, generator=seeded(2))
    return Call(latents, torch.tensor([0.73, 0.31][:batch]), prompt, None if mask.all() else mask, grids, places)


def twins(**config):
    """(theirs, ours) with the same weights; norms are near the size they have, none is exactly zero or one."""
    torch.manual_seed(0)
    theirs = QwenImage21Transformer2DModel(**{**TINY, **config}).eval().requires_grad_(False)
    for name, weight in theirs.named_parameters():
        weight.normal_(float("norm_q" in name or "norm_k" in name), 0.25 if weight.ndim < 2 else 0.15)
    ours = QwenImage21Transformer(SingleStreamConfig.from_dict(theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def ask(ours, c: Call, **more) -> Tensor:
    return ours(c.latents, c.timestep, c.prompt, c.mask, c.grids, c.target, places=c.places, **more)


def put(x: Tensor, place: int, count: int, value: float) -> Tensor:
    """`count` tokens of `value` behind the first `place` of x (B, n, ...)."""
    return torch.cat([x[:, :place], x.new_full((len(x), count, *x.shape[2:]), value), x[:, place:]], 1)


def asked(theirs, c: Call, caches: Sequence = (), **more) -> Tensor:
    """What the reference answers (B, N, out_channels), rows of different length each by itself: padding moves its
    targets."""
    if c.mask is not None:
        rows = [(c.row(i), caches[i : i + 1]) for i in range(len(c.prompt))]
        return torch.cat([asked(theirs, row, cache, **more) for row, cache in rows])
    slots = [math.prod(grid) // 4 for grid in c.grids]
    prompt, image = c.prompt, torch.zeros(len(c.prompt), c.prompt.shape[1], dtype=torch.bool)
    for place, count in reversed([*zip(c.places, slots[1:], strict=True)]):
        prompt, image = (put(x, place, count, value) for x, value in ((prompt, 9.0), (image, True)))
    more |= {"kv_cache": caches[0]} if caches else {}
    return theirs(
        hidden_states=torch.cat([c.latents[:, c.target :], c.latents[:, : c.target]], 1),
        encoder_hidden_states=prompt,
        timestep=c.timestep,
        img_shapes=[[*c.grids[1:], c.grids[0]]] * len(prompt),
        img_mask=torch.cat([image, image.new_ones(len(image), slots[0])], 1),
        encoder_hidden_states_mask=None,
        return_dict=False,
        **more,
    )[0][:, -c.target :]


def near(want: Tensor, got: Tensor) -> bool:
    return bool((want - got).abs().max() <= 1e-5 * want.abs().max())


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_every_sequence_equals_the_reference(sequence, lengths):
    theirs, ours = twins()
    c = call(sequence, lengths)
    want, got = asked(theirs, c), ask(ours, c)
    assert got.shape == (len(lengths), c.target, 8)
    assert near(want, got)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_kept_prefixes_equal_those_of_the_reference(lengths):
    """Three steps of both, with a prefix computed in the first."""
    theirs, ours = twins()
    caches, c = [QwenImage21KVCache(TINY["num_layers"]) for _ in lengths], call(lengths=lengths)
    with keep_prefix(ours):
        for step in range(3):
            now = replace(c.at(step), prompt=c.prompt)
            want = asked(theirs, now, caches, kv_cache_mode="cached" if step else "extract")
            assert near(want, ask(ours, now))


def test_bfloat16_is_no_further_from_float32_than_the_reference():
    """Errors by their length over four drawings; 3 in 100 is what sums in another order may do to them."""
    theirs, ours = twins()
    drawings = [call().at(step, torch.bfloat16) for step in range(4)]
    wants = [asked(theirs, call().at(step, torch.bfloat16).wide()) for step in range(4)]
    for weight in (*theirs.parameters(), *ours.parameters()):  # not `.bfloat16()`: it casts their frequencies too
        weight.data = weight.data.bfloat16()
    errors = [
        torch.stack([(want - f(net, c).float()).norm() for c, want in zip(drawings, wants, strict=True)]).norm()
        for f, net in ((asked, theirs), (ask, ours))
    ]
    assert 0 < errors[1] <= 1.03 * errors[0], errors
    assert errors[0] < 0.05 * torch.stack([want.norm() for want in wants]).norm(), "roundings, and nothing else"


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize(("lengths", "dtype"), [((4,), torch.float32), ((7, 4), torch.float32), ((7, 4), torch.half)])
def test_keeping_the_prefix_changes_no_bit(sequence, lengths, dtype):
    """Both sides of a guidance, three steps; the second prompt is another one."""
    _, ours = twins(num_layers=2)
    ours, prompt = ours.to(dtype), call(sequence, lengths).prompt.to(dtype)
    sides, drawn = {"positive": prompt, "negative": prompt.flip(2)}, []
    for kept in (nullcontext(), keep_prefix(ours)):
        with kept:
            steps = [(call(sequence, lengths).at(step, dtype), *side) for step in range(3) for side in sides.items()]
            drawn.append([ask(ours, replace(c, prompt=prompt), branch=branch) for c, branch, prompt in steps])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert not any(torch.equal(a, b) for a, b in pairwise(drawn[1]))


def reads(ours) -> list[int]:
    """How often the prompt has been read, counted at the text projection."""
    count = []
    ours.txt_in.register_forward_hook(lambda *_: count.append(1))
    return count


def test_a_prefix_is_kept_only_inside_and_never_for_another_prompt():
    _, ours = twins(num_layers=2)
    count, c = reads(ours), call()
    ask(ours, c), ask(ours, c)
    assert len(count) == 2 and ours.prefixes is None
    changed = {
        "prompt": replace(c, prompt=c.prompt.clone()),
        "grids": replace(c, grids=[(1, 5, 4), (1, 7, 4), (1, 2, 2)]),
        "places": replace(c, places=(1, 3)),
        "rows": replace(c, latents=c.latents[:1], timestep=c.timestep[:1], prompt=c.prompt[:1], mask=c.mask[:1]),
    }
    wants = {name: ask(ours, other) for name, other in changed.items()}
    for name, other in changed.items():
        count.clear()
        with keep_prefix(ours):
            ask(ours, c), ask(ours, c)
            assert len(count) == 1, name
            assert torch.equal(ask(ours, other), wants[name]) and len(count) == 2, name
            ask(ours, other, branch="negative")
            assert len(count) == 3, name
    assert ours.prefixes is None


def test_a_prefix_left_half_done_is_begun_anew():
    _, ours = twins()
    c, want = call(), ask(twins()[1], call())

    def fail(*_):
        raise InterruptedError

    with keep_prefix(ours):
        hook = ours.transformer_blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(InterruptedError):
            ask(ours, c)
        hook.remove()
        assert torch.equal(ask(ours, c), want)
        assert torch.equal(ask(ours, c), want)


def test_everything_passes_the_attend_seam():
    """Queries of the target once a block, the prefix's by segment; the last block spares those."""
    seen = []

    class Watched(Attend):
        def forward(self, q, k, v, mask):
            seen.append((q.shape[1], k.shape[1], None if mask is None else tuple(mask.shape)))
            return super().forward(q, k, v, mask)

    _, ours = twins(num_layers=2)
    swap(ours, Attend, lambda path, old: Watched())
    ask(ours, call("one reference", (4,)))
    prefix = [(2, 2, (1, 1, 2, 2)), (12, 14, None), (2, 16, (1, 1, 2, 16))]
    assert sorted(seen[:4]) == sorted([*prefix, (12, 28, None)])
    assert seen[4:] == [(12, 28, None)]


def test_rope_golden_values():
    """The slowest of each axis' angles is the position itself where its frequency is 1."""
    placed = layout((16, 56, 56), ((1, 3, 2), (1, 4, 5)), (2,), 5, torch.device("cpu"))
    angles = [[0] * 3, [1] * 3, *([2, y, x] for y in range(-2, 2) for x in range(-3, 2))]
    angles += [[7 + i] * 3 for i in range(3)]  # 2 + max(4, 5)
    target = [[10, y, x] for y in range(-2, 1) for x in (-1, 0)]
    for want, turn in ((angles, placed.prefix), (target, placed.target)):
        want = torch.tensor(want).float()
        assert torch.allclose(turn[0][:, [0, 8, 36]], want.cos(), atol=1e-6)
        assert torch.allclose(turn[1][:, [0, 8, 36]], want.sin(), atol=1e-6)
        assert rotate(torch.ones(1, len(want), 1, 128), *turn).shape == (1, len(want), 1, 128)
    assert placed.order.tolist() == [0, 1, *range(5, 25), 2, 3, 4]


def test_sinusoid_golden_values():
    """1000 t is rounded to float32 before it meets the frequencies."""
    t = torch.tensor([0.7351, 1.0])
    assert torch.allclose(sinusoid(t)[1, [0, 1, 128]], torch.tensor([0.562379, 0.789627, 0.826880]), atol=2e-6)
    assert torch.equal(sinusoid(t)[:, 0], (1000 * t).cos())


def test_what_does_not_fit_is_refused():
    _, ours = twins(num_layers=1)
    c = call()
    for change, words in (
        ({"control": [c.latents]}, "control"),
        ({"places": (1,)}, "places"),
        ({"places": (3, 1)}, "places"),
        ({"places": (3, 8)}, "places"),
    ):
        given = {"places": c.places, **change}
        with pytest.raises(ValueError, match=words):
            ours(c.latents, c.timestep, c.prompt, c.mask, c.grids, c.target, **given)
    with pytest.raises(ValueError, match="tokens"):
        ours(c.latents[:, 1:], c.timestep, c.prompt, c.mask, c.grids, c.target, places=c.places)
    with pytest.raises(ValueError, match="causal_condition"):
        SingleStreamConfig.from_dict({"causal_condition": False})


def test_layouts_that_are_kept_are_few():
    _, ours = twins(num_layers=1)
    for text in range(1, 40):
        c = call("text", (text,))
        ask(ours, c)
    assert ours.layouts.cache_info().currsize == 16


def test_config_and_parameter_count_of_the_release():
    config = SingleStreamConfig.from_dict({"_class_name": "any", "axes_dims_rope": [16, 56, 56], "out_channels": None})
    assert config == SingleStreamConfig() and config.width == 4096
    assert SingleStreamConfig.from_dict({"in_channels": 32}).out_channels == 32
    with torch.device("meta"):
        ours = QwenImage21Transformer(config)
        theirs = QwenImage21Transformer2DModel()
    assert sum(p.numel() for p in ours.parameters()) == 7_115_124_736
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
