"""What Qwen-Image-2.1 reads equals what diffusers' pipeline makes of the same words and pictures.

Tolerance: 1e-5 of the largest state, in float32; picture patches 1e-6.
"""

from itertools import pairwise

import numpy as np
import pytest
import tiny21
import torch
from diffusers import QwenImage21Pipeline
from PIL import Image
from transformers import Qwen3VLConfig as TheirConfig
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as their_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from lanting.core.errors import RequestError
from lanting.nn.qwen3_vl import Qwen3VL, Qwen3VLConfig, official_name
from lanting.text.encoder21 import PICTURES, PromptEncoder21
from lanting.text.pictures import PictureConfig, picture_patches, smart_resize
from lanting.text.tokenizer import load_tokenizer

TOLERANCE = 1e-5
LIMITS = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}


@pytest.fixture(scope="module")
def processor(tokenizer_folder):
    pictures = Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, size=LIMITS)
    tokenizer = Qwen2Tokenizer.from_pretrained(tokenizer_folder)
    return tiny21.Processor(pictures, tokenizer, Qwen3VLVideoProcessor(), chat_template=tiny21.CHAT)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = dict(
        vocab_size=151936,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rope_parameters=rope,
    )
    vision = dict(
        depth=2,
        hidden_size=16,
        intermediate_size=16,
        num_heads=1,
        out_hidden_size=24,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    )
    config = TheirConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    theirs = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.2)
    ours = Qwen3VL(Qwen3VLConfig.from_dict(config.to_dict())).eval()
    state = {official_name(name): weight for name, weight in theirs.state_dict().items()}
    state.pop("lm_head.weight")
    ours.load_state_dict(state)
    theirs.lm_head = torch.nn.Identity()  # nobody reads these scores, which take longer than all the rest
    return theirs, ours


@pytest.fixture(scope="module")
def pipeline(models, processor):
    return QwenImage21Pipeline(None, None, models[0], processor, None)


@pytest.fixture(scope="module")
def encoder(models, processor, tokenizer_folder):
    pictures = PictureConfig.from_dict({"image_processor": processor.image_processor.to_dict()})
    return PromptEncoder21(load_tokenizer(tokenizer_folder), models[1], pictures=pictures)


def noise_picture(width: int, height: int, mode: str = "RGBA") -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def cut_out(embeds, mask, slots):
    """Their states and mask without the slots of pictures, and how many words stand before each picture."""
    assert all(torch.equal(slots[0], row) for row in slots)
    row = slots[0].tolist()
    starts = [here for here, (left, right) in enumerate(pairwise(row), 1) if right and not left]
    places = tuple(start - sum(row[:start]) for start in starts)
    return embeds[:, ~slots[0]], None if mask is None else mask[:, ~slots[0]], places


@torch.no_grad()
@pytest.mark.parametrize("pictures", [[], [(64, 96)], [(96, 64), (64, 64), (32, 128)]])
@pytest.mark.parametrize("prompts", [["a red “兰亭” sign"], ["", "make it {blue}\n", " a long story" * 20]])
def test_states(pipeline, encoder, prompts, pictures):
    images = [noise_picture(*size) for size in pictures]
    whole, their_mask, slots = pipeline.encode_prompt(prompts, images or None)
    embeds, mask, places = cut_out(whole, their_mask, slots)
    found, found_mask, found_places = encoder.encode(prompts, images)
    assert whole.shape[1] - found.shape[1] == sum(width * height // 32**2 for width, height in pictures)
    assert found.shape == embeds.shape
    assert (found - embeds).abs().max() < TOLERANCE * embeds.abs().max()
    assert (mask is None) == (found_mask is None) == (len(prompts) == 1)
    assert mask is None or torch.equal(found_mask, mask.bool())
    assert found_places == places and len(places) == len(pictures)


@torch.no_grad()
def test_transparent_parts_are_read_as_white(pipeline, encoder):
    picture = noise_picture(64, 64)
    flat = Image.new("RGB", picture.size, (255, 255, 255))
    flat.paste(picture, mask=picture.getchannel("A"))
    found = encoder.encode(["hi"], [picture])[0]
    assert torch.equal(found, encoder.encode(["hi"], [flat])[0])
    assert not torch.allclose(found, encoder.encode(["hi"], [picture.convert("RGB")])[0])


def test_the_system_message_is_dropped_whole(pipeline, encoder):
    """A tokenizer with other words gives another count; with the real one it is 14."""
    states, _, _ = encoder.encode(["hi"])
    assert pipeline._drop_idx == 14
    assert states.shape[1] == len(encoder.tokens(encoder.text("hi", []))) - 14


@pytest.mark.parametrize("size", [(64, 96), (70, 50), (400, 200), (16, 20)])
def test_picture_patches(processor, encoder, size):
    picture = noise_picture(*size, mode="RGB")
    theirs = processor.image_processor([picture], return_tensors="pt")
    patches, grid = picture_patches(picture, encoder.pictures)
    assert [[1, *grid]] == theirs["image_grid_thw"].tolist()
    assert (patches - theirs["pixel_values"]).abs().max() < 1e-6


def test_sizes_with_the_limits_of_the_release():
    """A megapixel stays as it is; what is below 256 x 256 is enlarged for the reader, as the reference does."""
    assert smart_resize(1024, 1024, PICTURES) == (1024, 1024)
    assert smart_resize(1376, 768, PICTURES) == (1376, 768)
    assert smart_resize(64, 96, PICTURES) == (224, 320)
    for width, height in [(1024, 1024), (64, 96), (32, 32), (5000, 4000), (256, 256)]:
        theirs = their_resize(height, width, 32, PICTURES.min_pixels, PICTURES.max_pixels)
        assert smart_resize(width, height, PICTURES) == theirs[::-1]


def test_what_can_not_be_read_is_a_sentence(encoder, models):
    with pytest.raises(RequestError, match="stands for a picture"):
        encoder.encode(["a <|image_pad|>"])
    with pytest.raises(RequestError, match="max_sequence_length"):
        encoder.encode(["a"], max_sequence_length=0)
    with pytest.raises(RequestError, match="too narrow"):
        encoder.encode(["a"], [noise_picture(32, 32 * 201)])
    words_only = PromptEncoder21(encoder.tokenizer, models[1], edit_template="")
    with pytest.raises(RequestError, match="reads words only"):
        words_only.encode(["a"], [noise_picture(32, 32)])
