"""Qwen3-VL equals transformers' on tiny random weights, up to the last decoder layer: text, pictures, names, configs.

Tolerance: 1e-5 of the largest state, in float32.
"""

import json

import pytest
import torch
from torch.nn.functional import interpolate
from transformers import Qwen3VLConfig as TheirConfig
from transformers import Qwen3VLForConditionalGeneration

from lanting.nn.qwen3_vision import stretch
from lanting.nn.qwen3_vl import Qwen3VL, Qwen3VLConfig, official_name

PICTURE, START, END = 290, 291, 292
GRIDS = [(12, 20), (2, 6), (8, 8)]  # patches: more and fewer than the 6 x 6 learned positions, on one axis or both
TOLERANCE = 1e-5


def tiny_config() -> TheirConfig:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = dict(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters=rope,
    )
    vision = dict(
        depth=3,
        hidden_size=32,
        intermediate_size=40,
        num_heads=2,
        out_hidden_size=48,
        patch_size=4,
        num_position_embeddings=36,
        deepstack_visual_indexes=[0, 1],
    )
    return TheirConfig(text_config=text, vision_config=vision, image_token_id=PICTURE, video_token_id=293)


def build() -> tuple[Qwen3VLForConditionalGeneration, Qwen3VL]:
    torch.manual_seed(0)
    theirs = Qwen3VLForConditionalGeneration(tiny_config()).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.normal_(float(weight.ndim == 1 and name.endswith("weight")), 0.15)
    ours = Qwen3VL(Qwen3VLConfig.from_dict(theirs.config.to_dict())).eval()
    state = {official_name(name): weight for name, weight in theirs.state_dict().items()}
    state.pop("lm_head.weight")
    ours.load_state_dict(state)
    return theirs, ours


@pytest.fixture(scope="module")
def models() -> tuple[Qwen3VLForConditionalGeneration, Qwen3VL]:
    return build()


def with_pictures(grids: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of ids with words around every picture, and random patches."""
    torch.manual_seed(1)
    ids = [5, 6, 7]
    for rows, columns in grids:
        ids += [START, *[PICTURE] * (rows * columns // 4), END, 9]
    patches = torch.randn(sum(rows * columns for rows, columns in grids), 3 * 2 * 4 * 4)
    return torch.tensor([[*ids, 20, 21, 22, 23]]), patches


def their_states(theirs, ids, mask=None, patches=None, grids=()) -> torch.Tensor:
    """What their final norm is given; each row of a batch brings its own copy of the pictures."""
    seen = {}
    if patches is not None:
        seen["pixel_values"] = patches.repeat(len(ids), 1)
        seen["image_grid_thw"] = torch.tensor([(1, *grid) for grid in grids]).repeat(len(ids), 1)
        seen["mm_token_type_ids"] = (ids == PICTURE).int()
    caught = []
    hook = theirs.model.language_model.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    theirs(input_ids=ids, attention_mask=mask, **seen)
    hook.remove()
    return caught[0]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


@torch.no_grad()
def test_text_padded_on_either_side(models):
    theirs, ours = models
    ids = torch.randint(0, 280, (2, 40), generator=torch.Generator().manual_seed(2))
    left, mask = ids.clone(), torch.ones_like(ids)
    left[1, 15:], mask[1, :15] = ids[1, :25], 0
    expected = their_states(theirs, left, mask)
    found = ours(ids)
    assert_close(found[0], expected[0])
    assert_close(found[1, :25], expected[1, 15:])
    ids[1, 25:] = 3  # what stands in the padding must not matter
    assert torch.equal(ours(ids)[1, :25], found[1, :25])


@torch.no_grad()
@pytest.mark.parametrize("grids", [GRIDS[:1], GRIDS[:2], GRIDS])
def test_pictures(models, grids):
    theirs, ours = models
    ids, patches = with_pictures(grids)
    found = ours(ids, patches, grids)
    assert_close(found, their_states(theirs, ids, None, patches, grids))
    assert (ours(ids) - found).abs().max() > 0.1 * found.abs().max()  # the pictures do matter


@torch.no_grad()
def test_rows_share_the_pictures(models):
    theirs, ours = models
    ids, patches = with_pictures(GRIDS[:2])
    short = torch.cat([ids[:, :-4], torch.tensor([[31, 32, 0, 0]])], 1)
    left = torch.cat([ids, torch.cat([short[:, -2:], short[:, :-2]], 1)])
    mask = torch.ones_like(left)
    mask[1, :2] = 0
    expected = their_states(theirs, left, mask, patches, GRIDS[:2])
    found = ours(torch.cat([ids, short]), patches, GRIDS[:2])
    assert_close(found[0], expected[0])
    assert_close(found[1, :-2], expected[1, 2:])


@torch.no_grad()
def test_vision_tower_alone(models):
    theirs, ours = models
    _, patches = with_pictures(GRIDS)
    expected = theirs.model.visual(patches, grid_thw=torch.tensor([(1, *grid) for grid in GRIDS]))
    seen, deep = ours.visual(patches, GRIDS)
    assert_close(seen, expected.pooler_output)
    assert len(deep) == len(expected.deepstack_features) == 2
    for mine, their in zip(deep, expected.deepstack_features, strict=True):
        assert_close(mine, their)


@pytest.mark.parametrize("size", [1, 2, 7, 48, 64])
def test_stretching_a_row(size):
    row = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(size))
    expected = interpolate(row, size=size, mode="linear", align_corners=True)
    assert (stretch(size, 48) @ row[0, 0] - expected[0, 0]).abs().max() < 1e-4  # of values of one unit


@pytest.mark.parametrize("grids", [[(4, 6), (2, 2)], [(4, 4)], []])
@torch.no_grad()
def test_pictures_that_do_not_fit_the_tokens(models, grids):
    ids, patches = with_pictures([(4, 6)])
    with pytest.raises(ValueError, match="pictures"):
        models[1](ids, patches, grids)


@torch.no_grad()
def test_bfloat16_stays_close():
    theirs, ours = build()
    ids, patches = with_pictures(GRIDS)
    exact = ours(ids, patches, GRIDS)
    ours.bfloat16()
    theirs.bfloat16()
    found = ours(ids, patches, GRIDS)
    assert found.dtype == torch.bfloat16
    error = (found.float() - exact).square().mean().sqrt()
    their_error = (their_states(theirs, ids, None, patches, GRIDS).float() - exact).square().mean().sqrt()
    assert error < 1.2 * their_error


def test_config_of_transformers_4_reads_the_same():
    new = json.loads(json.dumps(tiny_config().to_dict()))
    old = json.loads(json.dumps(new))
    rope = old["text_config"].pop("rope_parameters")
    old["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    old["vision_config"].pop("rope_parameters")
    assert Qwen3VLConfig.from_dict(old) == Qwen3VLConfig.from_dict(new)
    assert Qwen3VLConfig.from_dict(new).text.head_dim == 16


@pytest.mark.parametrize(
    ("part", "changed", "words"),
    [
        ("text_config", {"rope_parameters": {"mrope_section": [2, 2, 2]}}, "mrope_section"),
        ("vision_config", {"out_hidden_size": 40}, "out_hidden_size"),
        ("vision_config", {"num_position_embeddings": 35}, "square"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(part, changed, words):
    config = tiny_config().to_dict()
    config[part] |= changed
    with pytest.raises(ValueError, match=words):
        Qwen3VLConfig.from_dict(config)


def test_official_names_and_size():
    text = {"intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8}
    with torch.device("meta"):
        theirs = Qwen3VLForConditionalGeneration(TheirConfig(text_config=text, vision_config={"out_hidden_size": 4096}))
        whole = Qwen3VL(Qwen3VLConfig())
        words = Qwen3VL(Qwen3VLConfig(), vision=False)
    expected = {official_name(name): tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    head = expected.pop("lm_head.weight")
    assert {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()} == expected
    assert sum(weight.numel() for weight in theirs.parameters()) == 8_767_123_696  # Qwen3-VL-8B
    assert sum(weight.numel() for weight in whole.parameters()) == 8_767_123_696 - head[0] * head[1]
    assert set(words.state_dict()) == {name for name in expected if name.startswith("model.")}
