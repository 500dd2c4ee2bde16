"""Tokens, picture patches and prompt states equal those of transformers and of the diffusers pipelines."""

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lanting.nn.qwen_vl import QwenVL, QwenVLConfig, official_name
from lanting.text.encoder import PromptEncoder
from lanting.text.pictures import PictureConfig, picture_patches
from lanting.text.tokenizer import load_tokenizer

PAD = "<|image_pad|>"
TEXTS = [
    'a cat holding a sign that says "Hello, World!" don\'t 12345\n\n\n  indented\ttab ',
    "一只猫坐在红色的椅子上，背景是“兰亭”。１２３",
    "e\u0301 é Ｆｕｌｌ ﬁ 가 שלום ไทย 👩‍🚀🙂 \u3000x\u00a0y\r\n",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|> <tool_call>x<|endoftext|>",
    "",
]


@pytest.fixture(scope="module")
def their_tokenizer(tokenizer_folder):
    return Qwen2Tokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = dict(
        vocab_size=151936,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters=rope,
        tie_word_embeddings=True,
    )
    vision = dict(depth=2, hidden_size=16, intermediate_size=16, num_heads=1, out_hidden_size=32)
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config={**vision, "fullatt_block_indexes": [1]}, tie_word_embeddings=True
    )
    theirs = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.2)
    ours = QwenVL(QwenVLConfig.from_dict(config.to_dict())).eval()
    state = {official_name(name): weight for name, weight in theirs.state_dict().items()}
    state.pop("lm_head.weight")
    ours.load_state_dict(state)
    return theirs, ours


class Processor:
    """Their picture processor and tokenizer, joined as Qwen2_5_VLProcessor does, without torchvision."""

    def __init__(self, tokenizer):
        self.tokenizer, self.pictures = tokenizer, Qwen2VLImageProcessorPil(max_pixels=12845056)

    def __call__(self, text, images=None, **_):
        images = [] if images is None else images if isinstance(images, list) else [images]
        seen = self.pictures(images, return_tensors="pt") if images else {}
        for grid in seen.get("image_grid_thw", []):
            text = [row.replace(PAD, "<|placeholder|>" * int(grid.prod() // 4), 1) for row in text]
        text = [row.replace("<|placeholder|>", PAD) for row in text]
        tokens = self.tokenizer(text, padding=True, return_tensors="pt")
        tokens.update(seen)
        return tokens


@pytest.fixture
def picture_types(models):
    """Tell transformers which tokens are pictures, as their processor does and diffusers 0.42 forgets to."""

    def add(_, args, inputs):
        if inputs.get("pixel_values") is not None:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == 151655).int()
        return args, inputs

    hook = models[0].register_forward_pre_hook(add, with_kwargs=True)
    yield
    hook.remove()


def noise_picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def compare(found, expected, expected_mask):
    states, mask = found
    assert states.shape == expected.shape
    assert (states - expected).abs().max() < 2e-5 * expected.abs().max()
    assert (mask is None) == (expected_mask is None)
    assert mask is None or torch.equal(mask, expected_mask.bool())


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids(tokenizer_folder, their_tokenizer, text):
    ours = load_tokenizer(tokenizer_folder)
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == their_tokenizer(text)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=True) == their_tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("size", [(97, 61), (30, 200), (640, 480)])
def test_picture_patches(size, mode):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    picture = Image.fromarray(noise, "RGBA")
    picture = picture if mode == "RGBA" else picture.convert("RGB").convert(mode)
    theirs = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=200 * 200)([picture], return_tensors="pt")
    patches, grid = picture_patches(picture, PictureConfig(max_pixels=200 * 200))
    assert [(1, *grid)] == [tuple(row) for row in theirs["image_grid_thw"].tolist()]
    assert (patches - theirs["pixel_values"]).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("limit", [512, 9])
@pytest.mark.parametrize("prompts", [["a cat"], ["a cat", "", "“兰亭” in red neon above a door"]])
def test_text_to_image_states(tokenizer_folder, their_tokenizer, models, prompts, limit):
    theirs, ours = models
    pipeline = QwenImagePipeline(None, None, theirs, their_tokenizer, None)
    expected, mask = pipeline.encode_prompt(prompts, max_sequence_length=limit)
    encoder = PromptEncoder(load_tokenizer(tokenizer_folder), ours, "text-to-image")
    compare(encoder.encode(prompts, max_sequence_length=limit), expected, mask)


@torch.no_grad()
def test_text_to_image_states_of_a_very_long_prompt(tokenizer_folder, their_tokenizer, models):
    theirs, ours = models
    pipeline = QwenImagePipeline(None, None, theirs, their_tokenizer, None)
    prompts = ["a long story " * 400, "short"]
    expected, mask = pipeline.encode_prompt(prompts, max_sequence_length=1024)
    encoder = PromptEncoder(load_tokenizer(tokenizer_folder), ours, "text-to-image")
    compare(encoder.encode(prompts, max_sequence_length=1024), expected, mask)


@torch.no_grad()
def test_edit_states(tokenizer_folder, their_tokenizer, models, picture_types):
    theirs, ours = models
    pipeline = QwenImageEditPipeline(None, None, theirs, their_tokenizer, Processor(their_tokenizer), None)
    picture = noise_picture(260, 140)
    expected, mask = pipeline.encode_prompt("make it “红色”", image=picture)
    encoder = PromptEncoder(load_tokenizer(tokenizer_folder), ours, "edit")
    compare(encoder.encode(["make it “红色”"], [picture]), expected, mask)


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 3])
def test_edit_plus_states(tokenizer_folder, their_tokenizer, models, picture_types, count):
    theirs, ours = models
    pipeline = QwenImageEditPlusPipeline(None, None, theirs, their_tokenizer, Processor(their_tokenizer), None)
    pictures = [noise_picture(112, 224), noise_picture(70, 60), noise_picture(300, 90)][:count]
    expected, mask = pipeline.encode_prompt("the cat of Picture 1", image=pictures or None)
    encoder = PromptEncoder(load_tokenizer(tokenizer_folder), ours, "edit-plus")
    compare(encoder.encode(["the cat of Picture 1"], pictures), expected, mask)
