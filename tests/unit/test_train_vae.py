"""The training of nano's VAE: the stages, resuming, and what must never change."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from lanting.nn.vae import AutoencoderKLQwenImage
from lanting.train.redraw import psnr, reconstruction_loss, to_tensor
from lanting.train.scraps import ScrapMaker
from lanting.train.vae import (
    CHECKPOINT,
    DECODER,
    FROZEN,
    UNTUNED,
    VAERecipe,
    VAETrainer,
    finetune_decoder,
    initialise,
    load_vae,
    nano_config,
    train_vae,
)
from training import imported

QUICK = VAERecipe(batch=2, crop=32, canvas_share=0.0, processes=1, log_every=60.0, judged=2, measured=4)
BLINK = 1e-4  # minutes: one step


def fresh(seed: int = 0) -> AutoencoderKLQwenImage:
    vae = AutoencoderKLQwenImage(nano_config())
    initialise(vae, seed)
    return vae


def test_the_scraps_are_varied_and_repeat_with_the_seed():
    first, second = (ScrapMaker(random.Random(3)) for _ in range(2))
    crops = first.crops(40, 64)
    assert crops.shape == (40, 64, 64, 3) and crops.dtype == np.uint8
    assert np.array_equal(crops, second.crops(40, 64))
    assert sum(np.ptp(c, axis=(0, 1)).max() > 0 for c in crops) > 24  # something is written on most of them
    assert first.canvases(2).shape[1:] in {(96, 224, 3), (192, 192, 3)}


def test_a_few_steps_learn_the_colours_of_one_picture():
    torch.manual_seed(0)
    trainer = VAETrainer(fresh(), replace(QUICK, warmup_steps=1), 1.0, "all")
    picture = to_tensor(ScrapMaker(random.Random(1)).crops(2, 32))
    losses = [trainer.train_step(picture).item() for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_rate_warms_up_and_decays_to_two_percent():
    trainer = VAETrainer(fresh(), QUICK, 1.0, "all")
    assert trainer.rate() == pytest.approx(QUICK.lr / QUICK.warmup_steps)
    trainer.step = 1000
    assert trainer.rate() == pytest.approx(QUICK.lr)
    trainer.agreed = 60.0
    assert trainer.rate() == pytest.approx(0.02 * QUICK.lr)


def test_both_stages_and_the_frozen_encoder(tmp_path):
    said: list[str] = []
    first = train_vae(tmp_path, BLINK, recipe=QUICK, log=said.append)
    assert (tmp_path / FROZEN).exists() and "dB" in said[-1]
    assert min(first.config.latents_std) > 0
    again = train_vae(tmp_path, 99.0, recipe=QUICK)  # finished: nothing is trained any more
    assert again.config == first.config
    ended = replace(QUICK, until=0.0, seed=2**63)
    finetune_decoder(tmp_path, 60.0, recipe=ended, log=said.append)
    assert (tmp_path / UNTUNED).exists() and not (tmp_path / DECODER).exists()  # its slice was over
    tuned = finetune_decoder(tmp_path, BLINK, recipe=QUICK, log=said.append)
    changed = {n for n, t in tuned.state_dict().items() if not torch.equal(t, first.state_dict()[n])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    kept = load_vae(tmp_path, DECODER).state_dict()
    assert all(torch.equal(kept[n], t) for n, t in tuned.state_dict().items())


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    trainer = VAETrainer(fresh(), QUICK, 1.0, "all")
    picture = to_tensor(ScrapMaker(random.Random(1)).crops(2, 32))
    trainer.train_step(picture)
    trainer.seconds = 30.0
    trainer.save(tmp_path / CHECKPOINT)
    resumed = VAETrainer(fresh(seed=9), QUICK, 1.0, "all")
    resumed.load(tmp_path / CHECKPOINT)
    assert (resumed.step, resumed.seconds) == (1, 30.0)
    for each in (trainer, resumed):
        torch.manual_seed(4)
        each.train_step(picture)
    ours, theirs = trainer.vae.state_dict(), resumed.vae.state_dict()
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in ours)
    assert not list(tmp_path.glob("*.part"))


def test_two_processes_average_and_stop_together(tmp_path, monkeypatch):
    imported(monkeypatch)
    train_vae(tmp_path, BLINK, recipe=replace(QUICK, processes=2), log=lambda line: None)
    assert (tmp_path / FROZEN).exists()


def test_the_loss_sees_edges_and_psnr_is_in_decibels():
    wanted = torch.zeros(1, 3, 8, 8)
    flat, striped = torch.full_like(wanted, 0.1), torch.zeros_like(wanted)
    striped[..., ::2] = 0.2
    assert reconstruction_loss(striped, wanted, 0.0) < 0.2 < reconstruction_loss(striped, wanted, 0.5)
    assert reconstruction_loss(flat, wanted, 0.5) == pytest.approx(0.11)
    vae = fresh()
    assert 0 < psnr(vae, [torch.full((1, 3, 16, 16), 0.5)]) < 60
