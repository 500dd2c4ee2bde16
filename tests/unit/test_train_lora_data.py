"""Teaching a LoRA: seeds that count, lists and pictures as people have them, and whatever Linears are named."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nets
from lanting import RequestError
from lanting.cli.main import main
from lanting.specs import get_spec
from lanting.train.lora import cache
from lanting.train.lora.dataset import DatasetOptions, Example, read_folder
from lanting.train.lora.net import LoraNet
from lanting.train.lora.run import LoraRun

OWN = get_spec("qwen-image").defaults


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


def test_another_seed_is_another_noise():
    draw = lambda seed, number: torch.Generator().manual_seed(LoraRun(seed=seed).seed_of(number))  # noqa: E731
    seen = {tuple(torch.randn(3, generator=draw(seed, number)).tolist()) for seed in (0, 1, 2) for number in range(9)}
    assert len(seen) == 27
    assert [LoraRun().seed_of(number) for number in range(3)] == [0, 1, 2]
    assert 0 <= LoraRun(seed=-(10**15)).seed_of(7) < 2**32


@pytest.mark.parametrize("words", ["one\u2028two", "one\x85two", "one two"])
def test_a_caption_in_a_list_may_hold_any_mark(tmp_path, words):
    rows = [{"file_name": picture(tmp_path / name).name, "text": words} for name in ("a.png", "b.png")]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert [one.caption for one in read_folder(tmp_path, DatasetOptions(), OWN)] == [words] * 2


def test_a_list_that_is_not_utf8_is_a_sentence(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "画"}'.encode("gb18030"))
    with pytest.raises(RequestError, match="UTF-8"):
        read_folder(tmp_path, DatasetOptions(), OWN)


def test_what_is_transparent_is_learnt_white(tmp_path, monkeypatch):
    seen: list[Image.Image] = []

    def look_at(studio: Any, image: Image.Image, size: tuple[int, int]) -> Any:
        seen.append(image)
        return SimpleNamespace(data=torch.zeros(1, 12, 4), grid=(1, 3, 4))

    monkeypatch.setattr(cache, "look_at", look_at)
    monkeypatch.setattr(cache, "references", lambda studio, images: ())
    studio: Any = SimpleNamespace(encode_prompt=lambda texts, shown: None)
    for mode, level in (("RGBA", 255), ("RGB", 0)):
        cache.encode(studio, Example(picture(tmp_path / f"{mode}.png", mode), "words", (64, 48)))
        assert seen[-1].mode == "RGB" and (np.asarray(seen[-1]) == level).all()


def inputs(net: Any) -> tuple:
    draw = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 12 + 6, net.config.in_channels, generator=draw)
    words = torch.randn(2, 5, net.config.joint_attention_dim, generator=draw)
    return latents, torch.tensor([0.3, 0.8]), words, None, ((1, 3, 4), (1, 2, 3)), 12


def gradients(zero_cond_t: bool, plain: bool) -> dict[str, torch.Tensor]:
    net = nets.transformer(zero_cond_t=zero_cond_t)
    placed: Any = SimpleNamespace(net=net, device=torch.device("cpu"), streamer=None)
    made = LoraNet(placed, 3, 6.0, ".*", 1)
    draw = torch.Generator().manual_seed(2)
    for learner in made.loras.values():
        learner.up.data = torch.randn(learner.up.shape, generator=draw) * 0.1
    if plain:
        for module in net.modules():
            module.__dict__.pop("forward", None)
    made.learn(made(*inputs(net)).square().mean())
    return {path: one.up.grad for path, one in made.loras.items() if one.up.grad is not None}


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_what_makes_the_modulations_may_learn_too(zero_cond_t):
    exact, found = gradients(zero_cond_t, plain=True), gradients(zero_cond_t, plain=False)
    assert any("time_text_embed" in path and grad.any() for path, grad in exact.items())
    for path, grad in exact.items():
        assert torch.allclose(found[path], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max())), path


def test_every_linear_of_nano_may_be_named(tmp_path, capsys):
    picture(tmp_path / "set" / "a.png").with_suffix(".txt").write_text("words")
    out = str(tmp_path / "all.safetensors")
    assert main(["train", "lora", str(tmp_path / "set"), "-o", out, "--steps", "2", "--targets", ".*"]) == 0
    drawn = str(tmp_path / "drawn.png")
    assert main(["generate", "a", "--steps", "1", "--size", "64x64", "--lora", out, "-o", drawn]) == 0
