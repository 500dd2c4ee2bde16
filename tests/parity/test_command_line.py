"""The command line on a whole folder with the real tokenizer: the same PNG as diffusers, within one grey level."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from lanting.text.tokenizer import load_tokenizer

PROMPT = 'a coffee shop sign that reads "OPEN 24 hours", 蘭亭集序, neon, 4K'


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder):
    """A tiny Qwen-Image with the real vocabulary: 152,064 rows of embedding, 32 wide."""
    made = tiny.save_folder(tmp_path_factory.mktemp("real") / "qwen-image", shard="100KB")
    for part in ("tokenizer", "text_encoder"):
        shutil.rmtree(made / part)
    shutil.copytree(tokenizer_folder, made / "tokenizer")
    small = tiny.text_encoder().config.to_dict()
    small["text_config"]["vocab_size"] = 152064
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    tokenizer = load_tokenizer(made / "tokenizer")
    ids = {f"{key}_token_id": tokenizer.token_to_id(f"<|{token}|>") for key, token in names.items()}
    config = Qwen2_5_VLConfig.from_dict({**small, **ids})
    torch.manual_seed(3)
    tiny.randomise(Qwen2_5_VLForConditionalGeneration(config).eval(), 0.15).save_pretrained(made / "text_encoder")
    return made


def test_generate_draws_what_diffusers_draws(folder, tmp_path):
    out = tmp_path / "ours.png"
    command = [sys.executable, "-m", "lanting", "generate", PROMPT, "--model", str(folder), "--seed", "7"]
    asked = ["--size", "112x80", "--steps", "4", "--guidance", "4", "--dtype", "float32", "--device", "cpu"]
    done = subprocess.run([*command, *asked, "-o", str(out)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pipe = tiny.open_with_diffusers(folder, "text_to_image")
    theirs = pipe(
        prompt=PROMPT,
        negative_prompt=" ",
        width=112,
        height=80,
        num_inference_steps=4,
        true_cfg_scale=4.0,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    theirs.save(tmp_path / "theirs.png")
    a, b = (np.asarray(Image.open(tmp_path / name), np.int16) for name in ("ours.png", "theirs.png"))
    assert a.shape == b.shape and a.std() > 10
    assert np.abs(a - b).max() <= 1
