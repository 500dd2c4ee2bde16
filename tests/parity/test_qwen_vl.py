"""Qwen2.5-VL equals transformers' on tiny random weights: text, pictures, generation, names, configs."""

import json

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from lanting.nn.qwen_language import expand_cache
from lanting.nn.qwen_vl import QwenVL, QwenVLConfig, Sampling, official_name, picture_positions

PICTURE, START, END = 290, 291, 292
GRIDS = [(12, 20), (2, 6), (8, 8)]  # patches: windows cut at two borders, less than one window, exactly one


def tiny_config(tied: bool = False) -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = dict(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_parameters=rope,
        tie_word_embeddings=tied,
    )
    vision = dict(
        depth=4,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=64,
        fullatt_block_indexes=[1, 3],
        window_size=112,
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=PICTURE,
        video_token_id=293,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def build(tied: bool = False) -> tuple[Qwen2_5_VLForConditionalGeneration, QwenVL]:
    torch.manual_seed(0)
    theirs = Qwen2_5_VLForConditionalGeneration(tiny_config(tied)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.15)
    ours = QwenVL(QwenVLConfig.from_dict(theirs.config.to_dict())).eval()
    state = {official_name(name): weight for name, weight in theirs.state_dict().items()}
    if tied:
        state.pop("lm_head.weight")
    ours.load_state_dict(state)
    return theirs, ours


@pytest.fixture(scope="module")
def models() -> tuple[Qwen2_5_VLForConditionalGeneration, QwenVL]:
    return build()


def with_pictures(grids: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of ids with words around every picture, and random patches."""
    torch.manual_seed(1)
    ids = [5, 6, 7]
    for rows, columns in grids:
        ids += [START, *[PICTURE] * (rows * columns // 4), END, 9]
    patches = torch.randn(sum(rows * columns for rows, columns in grids), 1176)
    return torch.tensor([[*ids, 20, 21, 22, 23]]), patches


def their_states(theirs, ids, patches, grids, **extra):
    return theirs(
        input_ids=ids,
        pixel_values=patches,
        image_grid_thw=torch.tensor([(1, *grid) for grid in grids]),
        mm_token_type_ids=(ids == PICTURE).int(),
        output_hidden_states=True,
        **extra,
    ).hidden_states[-1]


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "none"])
def test_text_with_padding(models, side):
    theirs, ours = models
    ids = torch.randint(0, 280, (2, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if side == "right":
        mask[1, 25:] = 0
    expected = theirs(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    found = ours(ids)
    assert (found - expected)[mask.bool()].abs().max() < 1e-5
    ids[1, 25:] = 3  # what stands in the padding must not matter
    assert torch.equal(ours(ids)[1, :25], found[1, :25])


@torch.no_grad()
@pytest.mark.parametrize("grids", [GRIDS[:1], GRIDS[1:2], GRIDS])
def test_pictures(models, grids):
    theirs, ours = models
    ids, patches = with_pictures(grids)
    expected = their_states(theirs, ids, patches, grids)
    found = ours(ids, patches, grids)
    assert (found - expected).abs().max() < 1e-5
    assert (ours(ids) - expected).abs().max() > 0.1  # the pictures do matter


@torch.no_grad()
def test_vision_tower_alone(models):
    theirs, ours = models
    _, patches = with_pictures(GRIDS)
    grid = torch.tensor([(1, *grid) for grid in GRIDS])
    expected = theirs.model.visual(patches, grid_thw=grid).pooler_output
    assert (ours.visual(patches, GRIDS) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_rows_share_the_pictures(models):
    _, ours = models
    ids, patches = with_pictures(GRIDS)
    other = torch.cat([ids[:, :-4], torch.tensor([[31, 32, 0, 0]])], 1)
    both = ours(torch.cat([ids, other]), patches, GRIDS)
    assert (both[0] - ours(ids, patches, GRIDS)[0]).abs().max() < 1e-5
    assert (both[1, :-2] - ours(other[:, :-2], patches, GRIDS)[0]).abs().max() < 1e-5


def test_positions_of_a_picture_block():
    ids = [1, 2, 3, 4, 5, 6, *[PICTURE] * 6, 7]
    time, height, width = picture_positions(ids, PICTURE, [(2, 3)]).tolist()
    assert time[6:] == [6, 6, 6, 6, 6, 6, 9]
    assert height[6:] == [6, 6, 6, 7, 7, 7, 9]
    assert width[6:] == [6, 7, 8, 6, 7, 8, 9]


@pytest.mark.parametrize("cells", [[(2, 2)], [(2, 3), (1, 1)], []])
def test_pictures_that_do_not_fit_the_tokens(cells):
    with pytest.raises(ValueError):
        picture_positions([1, *[PICTURE] * 6, 7], PICTURE, cells)


@pytest.mark.parametrize(("tied", "grids", "penalty"), [(True, [], 1.3), (False, GRIDS, 1.0), (False, GRIDS, 1.3)])
def test_greedy_generation(models, tied, grids, penalty):
    theirs, ours = build(tied=True) if tied else models
    ids, patches = with_pictures(grids)
    pictures = {
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
        "mm_token_type_ids": (ids == PICTURE).int(),
    }
    expected = theirs.generate(
        input_ids=ids,
        max_new_tokens=16,
        do_sample=False,
        repetition_penalty=penalty,
        eos_token_id=299,
        pad_token_id=0,
        **(pictures if grids else {}),
    )[0, ids.shape[1] :].tolist()
    sampling = Sampling(max_new_tokens=16, repetition_penalty=penalty, stop=(299,))
    found = list(ours.generate(ids, patches if grids else None, grids, sampling))
    assert found == [token for token in expected if token != 299]
    assert penalty == 1.0 or len(set(found)) > 4  # without the penalty random weights repeat themselves


def test_stop_token_ends_generation(models):
    _, ours = models
    ids, _ = with_pictures([])
    free = list(ours.generate(ids, sampling=Sampling(max_new_tokens=12, stop=())))
    stop = free[5]
    stopped = list(ours.generate(ids, sampling=Sampling(max_new_tokens=12, stop=(stop,))))
    assert stopped == free[: free.index(stop)]


def test_sampling_is_repeatable_and_top_p_narrows(models):
    _, ours = models
    ids, _ = with_pictures([])

    def draw(seed: int, top_p: float) -> list[int]:
        sampling = Sampling(max_new_tokens=12, temperature=2.0, top_p=top_p, stop=())
        return list(ours.generate(ids, sampling=sampling, generator=torch.Generator().manual_seed(seed)))

    assert draw(1, 0.9) == draw(1, 0.9)
    assert draw(1, 0.9) != draw(2, 0.9)
    assert draw(1, 1e-6) == list(ours.generate(ids, sampling=Sampling(max_new_tokens=12, stop=())))


def test_prefix_runs_once_for_a_batch_with_gradient(models):
    _, ours = models
    language = ours.model
    torch.manual_seed(3)
    prefix, rest = torch.randint(0, 280, (1, 12)), torch.randint(0, 280, (3, 9))
    whole = torch.cat([prefix.expand(3, -1), rest], 1)

    def gradient(states: torch.Tensor) -> torch.Tensor:
        ours.zero_grad()
        states.square().sum().backward()
        weight = language.layers[0].self_attn.k_proj.weight.grad
        assert weight is not None
        return weight.clone()

    plain = language(whole)[0][:, 12:]
    cached = language(rest, cache=expand_cache(language(prefix)[1], 3))[0]
    assert (plain - cached).abs().max() < 1e-5
    expected, found = gradient(plain), gradient(cached)
    assert (expected - found).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_bfloat16_stays_close():
    theirs, ours = build()
    ids, patches = with_pictures(GRIDS)
    exact = ours(ids, patches, GRIDS)
    ours.bfloat16()
    theirs.bfloat16()
    found = ours(ids, patches, GRIDS)
    assert found.dtype == torch.bfloat16
    error = (found.float() - exact).pow(2).mean().sqrt()
    their_error = (their_states(theirs, ids, patches, GRIDS).float() - exact).pow(2).mean().sqrt()
    assert error < 1.2 * their_error


def test_old_flat_config_reads_the_same():
    new = tiny_config().to_dict()
    text = {**new["text_config"]}
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    vision = {**new["vision_config"], "in_chans": 3}
    vision.pop("in_channels")
    old = {
        **text,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "vision_config": vision,
        "image_token_id": PICTURE,
        "tie_word_embeddings": False,
    }
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    assert QwenVLConfig.from_dict(old) == QwenVLConfig.from_dict(new)


def test_wrong_rotary_sections_are_refused():
    config = tiny_config().to_dict()
    config["text_config"]["rope_parameters"]["mrope_section"] = [2, 2, 2]
    with pytest.raises(ValueError, match="mrope_section"):
        QwenVLConfig.from_dict(config)


def test_official_names_and_parts():
    with torch.device("meta"):
        whole = QwenVL(QwenVLConfig())
        words = QwenVL(QwenVLConfig(), vision=False, head=False)
    names = set(whole.state_dict())
    assert sum(weight.numel() for weight in whole.parameters()) == 8_292_166_656  # Qwen2.5-VL-7B
    assert {"visual.blocks.31.attn.qkv.bias", "visual.merger.ln_q.weight", "lm_head.weight"} <= names
    assert {"model.layers.27.self_attn.q_proj.bias", "visual.patch_embed.proj.weight"} <= names
    assert set(words.state_dict()) == {name for name in names if name.startswith("model.")}
    assert {official_name(name) for name in names} == names
