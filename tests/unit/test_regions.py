"""Words for parts of a picture: what sees what, what people may ask, and drawings of nano with them."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lanting import Engine, Request, RequestError
from lanting.attach.compiled import Compiler
from lanting.attach.compute import attach_kernels
from lanting.attach.gpu import attach_gpu
from lanting.cli.main import main
from lanting.core.recipe import describe_request, read_recipe, restore_request
from lanting.core.types import Recipe
from lanting.flow.together import joinable
from lanting.nn.mmdit import Attend, Block, Context, QwenImageTransformer, TransformerConfig
from lanting.nn.regions import Regions, regions_of
from lanting.nn.rope import tables
from lanting.specs import get_spec
from lanting.specs.regions import PLACES, covered, parse_region
from lanting.specs.settle import settle

GRID, LENGTHS = (1, 3, 4), (2, 4, 3)  # two regions' texts and the whole picture's
INSIDE = torch.zeros(2, 12, dtype=torch.bool)
INSIDE[0, :8] = INSIDE[1, 5:] = True  # three tokens in both
PARTS = [{"prompt": "a green sign", "box": "left"}, {"prompt": "a blue sign", "box": [0.5, 0.25, 1, 1]}]


def network(**more: Any) -> QwenImageTransformer:
    torch.manual_seed(0)
    net = QwenImageTransformer(TransformerConfig(3, 2, 32, 24, 16, 4, axes_dims_rope=(8, 12, 12), **more))
    for p in net.parameters():
        p.data.normal_(0, 0.1) if p.ndim > 1 else p.data.add_(0.05 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


def step(net: Any, regions: Regions | None, texts: slice = slice(None), batch: int = 2) -> torch.Tensor:
    make = torch.Generator().manual_seed(5)
    latents, words = torch.randn(batch, 12, 16, generator=make), torch.randn(batch, 9, 24, generator=make)
    more = {} if regions is None else {"regions": regions}
    with torch.no_grad():
        return net(latents, torch.full((batch,), 0.7), words[:, texts], None, [GRID], 12, **more)


def sees() -> torch.Tensor:
    """(21, 21) bool, pair by pair: who asks, who is seen."""
    owner = [0] * 2 + [1] * 4 + [2] * 3  # of each text token; 2 is the whole picture's

    def pair(asks: int, seen: int) -> bool:
        if asks < 9 and seen < 9:
            return owner[asks] == owner[seen]
        if asks >= 9 and seen >= 9:
            return True
        text, token = min(asks, seen), max(asks, seen) - 9
        return owner[text] == 2 or bool(INSIDE[owner[text], token])

    return torch.tensor([[pair(asks, seen) for seen in range(21)] for asks in range(21)])


def test_groups_are_the_mask_from_token_to_token():
    q, k, v = torch.randn(3, 2, 21, 2, 32).unbind()
    regions = regions_of(LENGTHS, INSIDE)
    meant = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=sees()).transpose(1, 2)
    torch.testing.assert_close(regions.attend(Attend(), q, k, v), meant)
    asked = torch.cat([asking for asking, _ in regions.groups])
    assert sorted(asked.tolist()) == list(range(21)), "everybody asks once"


def test_each_text_begins_where_one_alone_begins():
    net, regions = network(), regions_of(LENGTHS, INSIDE)
    cos, _ = regions.rope(*net.rope((GRID,), 4, torch.device("cpu")))
    text, picture = tables((GRID,), 4, (8, 12, 12), layered=False)
    assert torch.equal(cos, torch.cat([text[:2], text[:4], text[:3], picture]).cos())


def test_a_network_with_regions_is_one_with_that_mask(monkeypatch):
    """Also with the kernels of CPUs and of GPUs (their twins)."""
    net, regions = network(), regions_of(LENGTHS, INSIDE)
    found = step(net, regions)
    text, picture = tables((GRID,), 4, (8, 12, 12), layered=False)
    angles = torch.cat([text[:2], text[:4], text[:3], picture])
    monkeypatch.setattr(net, "rope", lambda *key: (angles.cos(), angles.sin()))
    blocks: Any = net.transformer_blocks
    for block in blocks:
        masked = lambda q, k, v, mask: F.scaled_dot_product_attention(  # noqa: E731
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=sees()
        ).transpose(1, 2)
        block.attn.attend.__dict__["forward"] = masked
    torch.testing.assert_close(found, step(net, None), atol=1e-5, rtol=1e-4)
    assert (found - step(network(), None)).abs().max() > 1e-3, "the mask does something"
    for attach in (attach_kernels, attach_gpu):
        other = network()
        attach(other)
        torch.testing.assert_close(step(other, regions), found, atol=2e-3, rtol=1e-2)


def test_it_is_not_compiled_anew_for_every_drawing():
    """What sees what would be part of a compiled block."""
    compiler, seen = Compiler("eager"), []
    block: Any = network().transformer_blocks[0]
    compiler.work = lambda *given: seen.append(given) or Block.forward(*given)
    ctx = Context(torch.randn(1, 1, 64), 12, (torch.ones(21, 16), torch.zeros(21, 16)))
    for regions in (None, regions_of(LENGTHS, INSIDE)):
        compiler(block, torch.randn(1, 12, 64), torch.randn(1, 9, 64), replace(ctx, regions=regions))
    assert len(seen) == 1 and not compiler.failed


def test_what_is_far_from_a_region_hears_nothing_of_its_words():
    """One block: only tokens inside see a region's text."""
    net = network()
    del net.transformer_blocks[1:]
    regions, make = regions_of(LENGTHS, INSIDE), torch.Generator().manual_seed(1)
    latents, words = torch.randn(1, 12, 16, generator=make), torch.randn(1, 9, 24, generator=make)
    other = words.clone()
    other[:, :2] += 1  # of the first region
    time = torch.tensor([0.5])
    one, two = (net(latents, time, each, None, [GRID], 12, regions=regions) for each in (words, other))
    changed = (one != two).any(-1)[0]
    assert changed.tolist() == INSIDE[0].tolist()


# ---------------------------------------------------------------- what people say
@pytest.mark.parametrize(
    ("box", "down", "across"),
    [
        ([0, 0, 0.5, 1], range(6), range(4)),
        ([1 / 3, 0.5, 2 / 3, 0.51], range(3, 4), range(2, 6)),
        ([0.99, 0, 1, 0.01], range(1), range(7, 8)),
    ],
)
def test_a_box_covers_what_it_touches(box, down, across):
    assert covered(box, 6, 8) == (down, across)


def test_thirds_meet_without_overlapping():
    assert covered([0, 0, 1 / 3, 1], 6, 9)[1] == range(3) and covered([1 / 3, 0, 2 / 3, 1], 6, 9)[1] == range(3, 6)


def test_regions_are_settled_once_and_go_through_a_recipe():
    asked = Request("a street", options={"regions": PARTS})
    settled = settle(asked, get_spec("qwen-image-2512"))
    assert settled.options["regions"] == [
        {"prompt": "a green sign", "box": [0, 0, 0.5, 1]},
        {"prompt": "a blue sign", "box": [0.5, 0.25, 1, 1]},
    ]
    table = json.loads(json.dumps(describe_request(settled)))
    assert settle(restore_request(table), get_spec("qwen-image-2512")) == settled
    assert parse_region("left= a fox = red") == {"prompt": "a fox = red", "box": list(PLACES["left"])}
    assert parse_region("0, 0.5,1,1=河") == {"prompt": "河", "box": [0, 0.5, 1, 1]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": {"regions": []}}, "a list of 1 to 8"),
        ({"options": {"regions": PARTS * 5}}, "a list of 1 to 8"),
        ({"options": {"regions": [{"prompt": "a"}]}}, "a prompt and a box"),
        ({"options": {"regions": ["left"]}}, "a prompt and a box"),
        ({"options": {"regions": [{"prompt": " ", "box": "left"}]}}, "words of a region"),
        ({"options": {"regions": [{"prompt": "a", "box": "middle"}]}}, "left, top, right and bottom"),
        ({"options": {"regions": [{"prompt": "a", "box": [0.5, 0, 0.5, 1]}]}}, "left, top, right and bottom"),
        ({"options": {"regions": [{"prompt": "a", "box": [0, 0, 2, 1]}]}}, "from 0 to 1"),
        ({"options": {"regions": PARTS, "batched_guidance": True}}, "don't go together"),
        ({"prompt": ("a", "b"), "options": {"regions": PARTS}}, "belong to one prompt"),
    ],
)
def test_what_can_not_be_is_one_sentence(change, said):
    with pytest.raises(RequestError, match=said):
        settle(replace(Request("a street"), **change), get_spec("qwen-image-2512"))


def test_releases_and_tasks_that_know_no_regions_say_so():
    with pytest.raises(RequestError, match="one text for the whole picture"):
        settle(Request("a street", options={"regions": PARTS}), get_spec("qwen-image-2.1"))
    with pytest.raises(RequestError, match="knows no option regions"):
        picture = Image.new("RGB", (64, 64))
        settle(Request("a", images=(picture,), options={"regions": PARTS}), get_spec("qwen-image-edit-2511"))
    with pytest.raises(RequestError, match="has no words"):
        parse_region("left")


# ---------------------------------------------------------------- nano
def test_the_command_draws_and_its_recipe_draws_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LANTING_LANG", "en")
    words = ["generate", 'a red sign that says "TEA"', "--size", "128x64", "--seed", "3", "--steps", "2"]
    more = ["--region", 'right=a blue sign that says "HELLO"']
    assert main([*words, "-o", "plain.png"]) == 0
    assert main([*words, *more, "-o", "parts.png"]) == 0
    assert main(["replay", "parts.png", "-o", "again.png"]) == 0
    plain, parts, again = (np.asarray(Image.open(f"{name}.png"), np.int16) for name in ("plain", "parts", "again"))
    assert np.array_equal(parts, again)
    told: Recipe = read_recipe("parts.png")
    assert told.request["options"]["regions"][0]["box"] == [0.5, 0, 1, 1]
    change = np.abs(parts - plain).mean((0, 2))  # by column
    assert change[64:].mean() > 2 * change[:64].mean() > 0, "the right half is what changes most"
    assert main([*words, "--region", "right", "-o", "none.png"]) == 2


def test_nano_draws_pictures_from_pictures_with_regions_under_the_dial():
    with Engine.open("nano", device="cpu", dtype="float32") as engine:
        source = Image.new("RGB", (128, 64), "white")
        options = {"regions": PARTS}
        asked = Request("a sign", images=(source,), strength=0.8, seed=1, count=2, options=options, quality="balanced")
        result = engine.run(asked)
        assert len(result.images) == 2
        settled = engine.settled(replace(asked, quality="exact"))
        alone = [engine.run(replace(settled, seed=seed, count=1)).images[0] for seed in (1, 2)]
        both = engine.run(settled).images
        assert [one.tobytes() for one in both] == [one.tobytes() for one in alone]


def test_such_a_drawing_shares_no_steps():
    canvas: Any = SimpleNamespace(
        positive=SimpleNamespace(mask=None),
        negative=None,
        control=None,
        steering=None,
        batched_guidance=False,
        regions=1,
    )
    assert not joinable(canvas)
    canvas.regions = None
    assert joinable(canvas)
