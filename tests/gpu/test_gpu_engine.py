"""What the engine does with a GPU: what is hung on which network, and whole pictures that way, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from test_gpu_graphs import Again
from test_gpu_vae import autoencoder

from lanting import Engine, Request
from lanting.attach.gpu import attach_gpu
from lanting.attach.graphs import Graphs, attach_graphs
from lanting.attach.vae_graphs import Decoding
from lanting.engine import compute
from lanting.engine.compute import has_kernels, record_steps, speed_up, speed_up_vae
from nets import transformer

GPU, APPLE = torch.device("cuda"), torch.device("mps")


def test_what_has_kernels(monkeypatch):
    assert has_kernels(GPU) and not has_kernels(APPLE)
    monkeypatch.setenv("LANTING_KERNELS", "off")
    assert not has_kernels(GPU)


@pytest.mark.parametrize(("device", "kernels", "hung"), [(GPU, "", True), (GPU, "off", False), (APPLE, "", False)])
def test_what_is_hung_on_networks(device, kernels, hung, monkeypatch):
    monkeypatch.setenv("LANTING_KERNELS", kernels)
    net, pictures = transformer(), autoencoder()
    speed_up(net, device)
    record_steps(net, None, device)
    speed_up_vae(pictures, device)
    assert ("forward" in net.transformer_blocks[0].__dict__) == hung
    assert isinstance(net.forward, Graphs) == hung
    weight = pictures.decoder.up_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == hung
    assert isinstance(pictures.decoder.forward, Decoding) == hung


def test_recording_can_be_left_alone(monkeypatch):
    monkeypatch.setenv("LANTING_GRAPHS", "off")
    net = transformer()
    pictures = autoencoder()
    record_steps(net, None, GPU)
    speed_up_vae(pictures, GPU)
    assert not isinstance(net.forward, Graphs) and not isinstance(pictures.decoder.forward, Decoding)


def test_a_picture_the_gpu_s_way(tmp_path, monkeypatch):
    """Fused blocks, a table, recorded steps on both sides of the guidance: the picture of the CPU's own way."""
    folder, pictures, recorders = tiny.save_folder(tmp_path / "model"), [], []
    request = Request(prompt="a sign", negative_prompt="none at all", size=(64, 48), seed=5, steps=4)

    def record(net, table, device):
        recorders.append(Again())
        attach_graphs(net, table, recorders[0])

    for mine in (False, True):
        if mine:
            for module in ("rows", "products"):
                monkeypatch.setattr(f"lanting.kernels.gpu.{module}.available", lambda device: False)
            monkeypatch.setattr(compute, "attach_kernels", attach_gpu)
            monkeypatch.setattr("lanting.engine.models.record_steps", record)
        engine = Engine.open(str(folder), device="cpu", dtype="float32")
        for _ in range(2):
            pictures.append(np.asarray(engine.run(request).images[0], np.int16))
        engine.close()
    assert np.abs(pictures[0] - pictures[2]).max() <= 1 and np.array_equal(pictures[2], pictures[3])
    assert recorders[0].recorded == 2 and recorders[0].played == 2 * (4 - 2) + 2 * 4
