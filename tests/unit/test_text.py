"""The text room by itself: templates, tokenizers, picture sizes, what the encoder returns."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from lanting.core.errors import ModelError, RequestError
from lanting.nn.qwen_language import LanguageConfig, initialize
from lanting.nn.qwen_vision import VisionConfig
from lanting.nn.qwen_vl import QwenVL, QwenVLConfig, Sampling
from lanting.text.encoder import PromptEncoder
from lanting.text.pictures import PictureConfig, on_white, picture_patches, smart_resize
from lanting.text.templates import IMAGE_PAD, fill, load_template, opening, takes_pictures
from lanting.text.tokenizer import load_tokenizer

WHITE = Image.new("RGB", (64, 64), "white")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    language = LanguageConfig(151936, 32, 48, 2, 2, 1, mrope_section=(2, 3, 3), tie_word_embeddings=True)
    vision = VisionConfig(2, 16, 16, 1, out_hidden_size=32, fullatt_block_indexes=(1,))
    tiny = QwenVL(QwenVLConfig(language, vision, tie_word_embeddings=True)).eval()
    initialize(tiny, std=0.2)
    return tiny


@pytest.mark.parametrize(("name", "count"), [("text-to-image", 34), ("edit", 64), ("edit-plus", 64)])
def test_dropped_opening_has_the_trained_length(tokenizer, name, count):
    assert len(tokenizer.encode(opening(load_template(name)), add_special_tokens=False).ids) == count


@pytest.mark.parametrize(("prompt", "kept"), [("", 5), (" ", 6), ("a cat", 7)])
def test_kept_lengths(tokenizer, model, prompt, kept):
    states, mask = PromptEncoder(tokenizer, model, "text-to-image").encode([prompt])
    assert states.shape == (1, kept, 32)
    assert mask is None


def test_tokens_of_the_real_vocabulary(tokenizer):
    assert tokenizer.encode("Picture 1: ").ids == [24669, 220, 16, 25, 220]
    closing = fill(load_template("edit"), "").split("<|im_start|>user\n")[1]
    assert tokenizer.encode(closing).ids == [151645, 198, 151644, 77091, 198]
    assert tokenizer.token_to_id(IMAGE_PAD) == 151655
    text = "兰亭 é e\u0301 🙂 12"
    assert tokenizer.decode(tokenizer.encode(text).ids) == "兰亭 é é 🙂 12"


def test_templates_place_pictures():
    edit = fill(load_template("edit"), "make it red", [2])
    assert f"user\n<|vision_start|>{IMAGE_PAD * 2}<|vision_end|>make it red<|im_end|>" in edit
    plus = fill(load_template("edit-plus"), "join {n}", [1, 3])
    assert (
        f"user\nPicture 1: <|vision_start|>{IMAGE_PAD}<|vision_end|>"
        f"Picture 2: <|vision_start|>{IMAGE_PAD * 3}<|vision_end|>join {{n}}<|im_end|>"
    ) in plus
    assert "user\nno picture<|im_end|>\n" in fill(load_template("edit-plus"), "no picture")
    assert [takes_pictures(load_template(name)) for name in ("text-to-image", "edit")] == [False, True]
    assert all(load_template(f"caption-{language}").endswith("assistant\n") for language in ("en", "zh"))


def test_unknown_template_names_the_known_ones():
    with pytest.raises(ModelError, match="text-to-image"):
        load_template("poster")


def test_tokenizer_from_one_file_and_from_parts(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "<|im_start|>user\n读 <tool_call>3.14 don't<|im_end|>"
    assert load_tokenizer(tmp_path).encode(text).ids == tokenizer.encode(text).ids


def test_a_saved_tokenizer_that_was_last_called_to_cut_and_pad_does_neither(tokenizer, tmp_path):
    """transformers keeps both in tokenizer.json; the tokens of a picture alone may be more than it would leave."""
    saved = Tokenizer.from_str(tokenizer.to_str())
    saved.enable_truncation(8)
    saved.enable_padding(pad_id=151643, pad_token="<|endoftext|>", length=64)
    saved.save(str(tmp_path / "tokenizer.json"))
    for text in ("a", "a cat and a dog " * 20):
        assert load_tokenizer(tmp_path).encode(text).ids == tokenizer.encode(text).ids


def write_small(folder, added):
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "added_tokens.json").write_text(json.dumps(added))


def test_tokenizer_with_old_added_tokens(tmp_path):
    write_small(tmp_path, {"<y>": 4, "<x>": 3})
    assert load_tokenizer(tmp_path).encode("ab<y>a<x>").ids == [2, 4, 0, 3]


def test_tokenizer_errors_say_what_to_do(tmp_path):
    with pytest.raises(ModelError, match="download"):
        load_tokenizer(tmp_path)
    write_small(tmp_path, {"<x>": 7})
    with pytest.raises(ModelError, match="<x> as 7"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (1036, 1036)),
        ((384, 384), (392, 392)),
        ((512, 288), (504, 280)),
        ((480, 320), (476, 308)),
    ],
)
def test_picture_sizes_of_the_edit_models(size, expected):
    assert smart_resize(*size, PictureConfig()) == expected


def test_picture_sizes_stay_within_the_area():
    limits = PictureConfig(min_pixels=100 * 100, max_pixels=200 * 200)
    for size in ((10, 300), (1000, 800), (30, 30), (140, 141)):
        width, height = smart_resize(*size, limits)
        assert width % 28 == height % 28 == 0
        assert limits.min_pixels <= width * height <= limits.max_pixels
    with pytest.raises(RequestError, match="narrow"):
        smart_resize(3000, 10, limits)


def test_patches_are_cells_of_two_by_two():
    picture = Image.new("RGB", (112, 56))
    for number in range(4 * 8):  # one shade per patch, in reading order
        row, column = divmod(number, 8)
        picture.paste((number * 8,) * 3, (column * 14, row * 14, column * 14 + 14, row * 14 + 14))
    patches, grid = picture_patches(picture, PictureConfig(image_mean=(0, 0, 0), image_std=(1, 1, 1)))
    assert grid == (4, 8)
    assert patches.shape == (32, 3 * 2 * 14 * 14)
    assert torch.equal(patches, patches[:, :1].expand_as(patches))
    shades = (patches[:, 0] * 255 / 8).round().int().tolist()
    assert shades[:8] == [0, 1, 8, 9, 2, 3, 10, 11]
    assert shades[16:20] == [16, 17, 24, 25]


def test_transparency_is_laid_on_white():
    assert on_white(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert on_white(Image.new("L", (2, 2), 7)).getpixel((1, 1)) == (7, 7, 7)


def test_picture_config_reads_old_and_new_files():
    old = {"min_pixels": 784, "max_pixels": 100000, "image_mean": [0.5] * 3, "patch_size": 14}
    new = {"size": {"shortest_edge": 784, "longest_edge": 100000}, "image_mean": [0.5] * 3}
    assert PictureConfig.from_dict(old) == PictureConfig.from_dict(new)
    assert PictureConfig.from_dict({}) == PictureConfig()


def test_prompts_of_different_length_in_one_batch(tokenizer, model):
    encoder = PromptEncoder(tokenizer, model, "text-to-image")
    prompts = ["a cat", "", "一只猫坐在红色的椅子上"]
    states, mask = encoder.encode(prompts)
    assert mask is not None and mask.dtype == torch.bool
    for row, prompt in enumerate(prompts):
        alone, none = encoder.encode([prompt])
        length = alone.shape[1]
        assert none is None
        assert mask[row].tolist() == [True] * length + [False] * (mask.shape[1] - length)
        assert (states[row, :length] - alone[0]).abs().max() < 1e-5
        assert not states[row, length:].any()


def test_long_prompts_are_cut_only_without_pictures(tokenizer, model):
    long, short = "word " * 700, "word " * 100
    words = PromptEncoder(tokenizer, model, "text-to-image")
    assert words.encode([long])[0].shape[1] == 512
    cut, _ = words.encode([short], max_sequence_length=20)
    whole, _ = words.encode([short])
    assert cut.shape[1] == 20 and whole.shape[1] > 100
    assert (cut - whole[:, :20]).abs().max() < 1e-5
    assert PromptEncoder(tokenizer, model, "edit").encode([long], [WHITE])[0].shape[1] > 700
    with pytest.raises(RequestError, match="1024"):
        words.encode(["a"], max_sequence_length=1025)


def test_pictures_reach_the_states(tokenizer, model):
    encoder = PromptEncoder(tokenizer, model, "edit-plus")
    red, wide = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (112, 56), "red")
    states, mask = encoder.encode(["join them"], [WHITE, wide])
    other, _ = encoder.encode(["join them"], [red, wide])
    assert mask is None
    cells = 2 * 2 + 4 * 2  # 64 pixels become 56, two cells of 28
    assert states.shape[1] == 2 * (5 + 2) + cells + 2 + 5
    assert torch.equal(states[:, :6], other[:, :6])  # "Picture 1: " and the start of the picture
    assert (states[:, 6:] - other[:, 6:]).abs().amax(-1).min() > 0


def test_a_release_may_have_one_template_for_words_and_one_for_pictures(tokenizer, model):
    both = PromptEncoder(tokenizer, model, "text-to-image", edit_template="edit-plus")
    words, pictures = (PromptEncoder(tokenizer, model, name) for name in ("text-to-image", "edit-plus"))
    assert torch.equal(both.encode(["a cat"])[0], words.encode(["a cat"])[0])
    assert torch.equal(both.encode(["a cat"], [WHITE])[0], pictures.encode(["a cat"], [WHITE])[0])
    long = "word " * 700
    assert both.encode([long])[0].shape[1] == 512 < both.encode([long], [WHITE])[0].shape[1]


def test_requests_the_template_cannot_hold(tokenizer, model):
    with pytest.raises(RequestError, match="edit model"):
        PromptEncoder(tokenizer, model, "text-to-image").encode(["a"], [WHITE])
    with pytest.raises(RequestError, match="stands for a picture"):
        PromptEncoder(tokenizer, model, "edit").encode([f"a {IMAGE_PAD}"], [WHITE])


@pytest.mark.parametrize("language", ["en", "zh"])
def test_caption_is_text(tokenizer, model, language):
    encoder = PromptEncoder(tokenizer, model, "text-to-image")
    sampling = Sampling(max_new_tokens=4, stop=())
    caption = encoder.caption(WHITE, language, sampling)
    assert isinstance(caption, str) and caption == encoder.caption(WHITE, language, sampling)


def test_the_room_does_not_import_transformers():
    code = "import sys, lanting.text.encoder, lanting.text.tokenizer; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
