"""A wider network answers as the narrow one did, and every new part of it can learn."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from lanting.train.course import Budget
from lanting.train.loop import Trainer
from lanting.train.model import NanoConfig, NanoNet, language_config, transformer_config
from lanting.train.nano import main
from lanting.train.portable import pack
from lanting.train.vocabulary import VOCAB_SIZE
from lanting.train.widen import widen
from training import WIDTH, begun, lighten, small_net, small_run, union

MORE = WIDTH + 32


def trained(seed: int = 0) -> NanoNet:
    """A small network whose zeros have become numbers."""
    net = small_net(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "_mod." in name or "norm_out" in name or "proj_out" in name:
                p.add_(torch.randn_like(p) * 0.05)
    return net


def wider(net: NanoNet) -> NanoNet:
    layers = net.config.transformer.num_layers
    config = NanoConfig(transformer=transformer_config(MORE, layers), language=language_config(VOCAB_SIZE))
    found = NanoNet(config)
    found.load_state_dict(widen(net.state_dict(), WIDTH, MORE), strict=True)
    return found


def test_the_answers_stay_nearly_the_same():
    batch, t, noise = union()
    net = trained()
    prefix = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before, after = (n(noise, t, prefix, batch)[0] for n in (net, wider(net)))
    scale = before.square().mean()
    assert (before - after).square().mean() < 0.1 * scale


def test_all_of_it_learns(tmp_path):
    net = wider(trained())
    begin = {name: p.detach().clone() for name, p in net.named_parameters()}
    trainer = Trainer(net, Budget(warmup_steps=1, lr=0.01), tmp_path)
    batch, t, noise = union()
    for _ in range(4):
        trainer.loss(replace(batch), [5, 6, 7], t, noise)[0].backward()
        trainer.update()
        trainer.clock.step += 1
    for name, p in net.named_parameters():
        if name.endswith(("to_q.weight", "net.2.weight", "to_out.0.weight")) and "transformer_blocks.0" in name:
            moved = (p - begin[name]).abs()
            assert moved[WIDTH:].max() > 0 and moved[:, WIDTH:].max() > 0, name


def test_it_only_grows():
    with pytest.raises(ValueError, match="can't be widened"):
        widen(small_net().state_dict(), 64, 64)


def test_a_packed_run_is_taken_up_wider(tmp_path, monkeypatch):
    lighten(monkeypatch)
    begun(tmp_path / "run")
    pack(tmp_path / "run", tmp_path / "packed")
    run = small_run(tmp_path / "here", resume_from=str(tmp_path / "packed"), width=MORE, minutes=0.01)
    main(run)
    config = json.loads((tmp_path / "here" / "nano" / "transformer" / "config.json").read_text())
    assert config["num_attention_heads"] == MORE // 32
