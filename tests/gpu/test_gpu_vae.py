"""The decoder recorded, with the stand-in for the recorder: which shapes, how many, and that pixels stay the same."""

from __future__ import annotations

import pytest
import torch
from test_gpu_graphs import Again

import nets
from lanting.attach.safe import kernels
from lanting.attach.safe_vae import SafeVae
from lanting.attach.tapes import HELD, Recorder
from lanting.attach.vae_graphs import MOST, attach_vae_graphs, detach_vae_graphs
from lanting.core.lang import chinese
from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig

SMALL = VAEConfig(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)


def autoencoder():
    torch.manual_seed(3)
    return nets.randomise(AutoencoderKLQwenImage(SMALL))


def pair(**trouble):
    vae, recorder = autoencoder(), Again(**trouble)
    return vae, autoencoder(), attach_vae_graphs(vae, recorder), recorder  # type: ignore[arg-type]


def decode(vae, height, width, seed=0, tile=False):
    torch.manual_seed(seed)
    with torch.no_grad():
        return vae.decode(torch.randn(1, 4, height, width), tile=tile)


def test_a_shape_is_recorded_once():
    vae, plain, decoding, recorder = pair()
    for seed in range(4):
        assert torch.equal(decode(vae, 4, 6, seed), decode(plain, 4, 6, seed))
    assert (recorder.recorded, recorder.played, len(decoding.tapes.kept)) == (1, 2, 1)
    for width in range(3, 10):
        for _ in range(2):
            assert torch.equal(decode(vae, 3, width), decode(plain, 3, width))
    assert len(decoding.tapes.kept) == MOST


def test_tiles_are_played_back():
    vae, plain, decoding, recorder = pair()
    assert torch.equal(decode(vae, 36, 84, tile=True), decode(plain, 36, 84, tile=True))  # 2 x 4 tiles of 4 shapes
    assert recorder.recorded == 2 and recorder.played == 2
    assert torch.equal(decode(vae, 36, 84, 1, tile=True), decode(plain, 36, 84, 1, tile=True))
    assert len(decoding.tapes.kept) == MOST and recorder.recorded == 4 and recorder.played == 8


def test_what_would_hold_too_much_is_not_recorded(monkeypatch):
    vae, _, decoding, recorder = pair(full=True)
    for _ in range(3):
        decode(vae, 4, 6)
    assert recorder.recorded == 0 and not decoding.tapes.failed
    real, whole = AutoencoderKLQwenImage, torch.empty(1, 16, 128, 128, dtype=torch.bfloat16, device="meta")
    with torch.device("meta"):
        held = attach_vae_graphs(real(VAEConfig())).held(whole)
    assert held == pytest.approx(1.6e9, rel=0.02)  # as measured
    for gigabytes, fits in ((80, True), (24, False)):
        monkeypatch.setattr("lanting.attach.tapes.memory", lambda device, n=gigabytes: (0, n << 30))
        assert Recorder().holds(held, whole.device) == fits == (held <= HELD * (gigabytes << 30))


def test_other_weights_are_recorded_anew():
    vae, plain, _, recorder = pair()
    for _ in range(3):
        decode(vae, 4, 4)
    for each in (vae, plain):
        each.decoder.conv_out.weight = torch.nn.Parameter(each.decoder.conv_out.weight * 2, requires_grad=False)
    for _ in range(3):
        assert torch.equal(decode(vae, 4, 4), decode(plain, 4, 4))
    assert recorder.recorded == 2


def test_where_recording_fails_it_runs_as_it_comes(capsys):
    vae, plain, decoding, _ = pair(broken=RuntimeError)
    for _ in range(3):
        assert torch.equal(decode(vae, 4, 4), decode(plain, 4, 4))
    assert decoding.tapes.failed and capsys.readouterr().err.count("decoding is not recorded") == 1
    assert "decoding is not recorded: {reason}" in chinese()


def test_the_watch_sees_it_and_can_do_without():
    vae, plain, _, recorder = pair()
    assert [module for module, _ in kernels(vae)] == [vae.decoder]
    with SafeVae(vae, {}) as watch:
        for _ in range(3):
            assert torch.equal(decode(vae, 4, 4), decode(plain, 4, 4))
        assert recorder.played == 1 and not watch.notices
        real, recorder.played = vae.decoder.__dict__["forward"].tapes.play, 0
        vae.decoder.__dict__["forward"].tapes.play = lambda *given: tuple(x * torch.nan for x in real(*given))
        assert torch.equal(decode(vae, 4, 4), decode(plain, 4, 4)) and watch.ways == {"vae.decode": "plain"}
    detach_vae_graphs(vae)
    assert "forward" not in vae.decoder.__dict__


def test_gradients_are_not_recorded():
    vae, _, _, recorder = pair()
    for _ in range(3):
        vae.reconstruct(torch.randn(1, 4, 3, 3, requires_grad=True)).sum().backward()
    assert recorder.recorded == 0
