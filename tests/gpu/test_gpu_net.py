"""Networks with the GPU's kernels attached: as exact as without, undone without a trace, whatever hangs on them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lanting.attach.gpu import attach_gpu, detach_gpu
from lanting.attach.modulation import ModulationTable
from lanting.kernels.gpu import attention, products, twins
from lanting.nn.linears import Fp8Linear, GgufLinear, Int4Linear, Int8Linear, PackedLinear
from lanting.nn.lora import Factors, attach
from lanting.nn.mmdit import Context, QwenImageTransformer, TransformerConfig
from lanting.nn.swap import swap
from lanting.weights.kquants import quantize

GRID, TARGET, TEXT, WIDTH = (1, 3, 4), 12, 7, 64  # little: in the interpreter a row takes milliseconds


@pytest.fixture(params=["kernels", "twins"])
def way(request, monkeypatch) -> Iterator[str]:
    """With Triton's kernels, and without."""
    if request.param == "twins":
        for module in ("rows", "products"):
            monkeypatch.setattr(f"lanting.kernels.gpu.{module}.available", lambda device: False)
        monkeypatch.setattr("lanting.attach.gpu_linears.available", lambda device: False)
    yield request.param


def network(device, two_times: bool = False, layers: int = 1) -> QwenImageTransformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=32,
        joint_attention_dim=48,
        in_channels=16,
        out_channels=4,
        axes_dims_rope=(8, 12, 12),
        zero_cond_t=two_times,
    )
    net = QwenImageTransformer(config).eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(0, 0.08) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.05)
    return net.to(device)


def pack(net: nn.Module, kind: str) -> nn.Module:
    """The blocks' Linears as a kind of weights; fp8 with one scale for all, as files have them."""

    def make(path: str, old: nn.Module) -> nn.Module | None:
        assert isinstance(old, nn.Linear)
        weight, bias = old.weight.float().cpu(), old.bias
        if "_mod" in path or "blocks" not in path:
            return None
        if kind[0] == "Q":
            made: nn.Module = GgufLinear.from_packed(quantize(weight, kind), kind, old.in_features, bias)
        elif kind.startswith("fp8"):
            made = Fp8Linear.from_dense(
                weight, bias, scale=None if "bare" in kind else "tensor" if " " in kind else "channel"
            )
        else:
            cls = Int8Linear if kind.startswith("int8") else Int4Linear
            made = cls.from_dense(weight, bias, rotate=64 if "rotated" in kind else 0)
        return made.to(old.weight.device)

    swap(net, nn.Linear, make)
    return net


def draw(net: QwenImageTransformer, batch: int = 1, masked: bool = False) -> torch.Tensor:
    torch.manual_seed(1)
    weight = net.proj_out.weight
    grids = [GRID] * (2 if net.config.zero_cond_t else 1)
    latents = torch.randn(batch, TARGET * len(grids), 16)
    prompt, mask = torch.randn(batch, TEXT, 48), torch.ones(batch, TEXT, dtype=torch.bool)
    mask[-1, 5:] = not masked
    times = torch.full((batch,), 0.5)
    latents, prompt, times = (x.to(weight.device, weight.dtype) for x in (latents, prompt, times))
    with torch.inference_mode():
        return net(latents, times, prompt, mask.to(weight.device) if masked else None, grids, TARGET).float()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("two_times", "batch", "masked"), [(False, 1, False), (True, 1, True), (True, 2, True)])
def test_as_exact_as_torch(two_times, batch, masked, device, way):
    net = network(device, two_times)
    exact = draw(net, batch, masked)
    attach_gpu(net)
    assert error(draw(net, batch, masked), exact) < (2e-3 if device.type == "cuda" else 3e-6)
    rough = copy.deepcopy(net).to(torch.float16 if masked else torch.bfloat16)
    detach_gpu(rough)
    plain = error(draw(rough, batch, masked), exact)
    attach_gpu(rough)
    assert error(draw(rough, batch, masked), exact) < 1.2 * plain  # they round in fewer places than torch


KINDS = {"int8": 0.012, "int8 rotated": 0.012, "fp8": 0.04, "fp8 tensor": 0.04, "fp8 bare": 0.04, "int4": 3e-6}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_linears_compute_in_what_they_are(kind, device, way):
    """What rounding activations to 8 bits costs beside the same weights without it."""
    net = pack(network(device), kind)
    wanted = draw(net)
    attach_gpu(net)
    found = draw(net)
    assert error(found, wanted) < KINDS[kind] + (2e-3 if device.type == "cuda" else 0)
    assert kind == "int4" or error(found, wanted) > 5e-4
    if way == "twins" or kind in ("int8", "fp8"):
        rough = copy.deepcopy(net).bfloat16()
        assert error(draw(rough), wanted) < KINDS[kind] + 0.012


def test_four_bits_meet_eight(device, way):
    net = pack(network(device), "int4")
    wanted = draw(net)
    attach_gpu(net, four=True)
    assert 5e-4 < error(draw(net), wanted) < 0.012


def rounded_by_twin(weight, how):
    codes = twins.coded(weight.float(), how.plain)
    return products.Weight(codes.data, codes.scale.flatten())


@pytest.mark.parametrize(
    ("compute", "most", "way"),
    [("int8", 0.016, "twins"), ("int8 rotated", 0.014, "twins"), ("fp8", 0.05, "twins"), ("fp8", 0.05, "kernels")],
    indirect=["way"],
)
def test_plain_linears_in_eight_bits(compute, most, device, way, monkeypatch):
    if way == "kernels":  # copies have a thousand rows, which would take the interpreter seconds
        monkeypatch.setattr("lanting.attach.gpu_linears.rounded", rounded_by_twin)
    net = network(device)
    wanted = draw(net)
    attach_gpu(net, compute=compute)
    assert 1e-3 < error(draw(net), wanted) < most
    copies = [module for module in net.modules() if "gpu copy" in module.__dict__]
    assert len(copies) == 12  # not the modulation's, and nothing outside of blocks
    detach_gpu(net)
    assert torch.equal(draw(net), wanted)


def test_kinds_that_have_no_kernels_are_expanded_as_before(device):
    net = pack(network(device), "Q4_0")
    wanted = draw(net)
    attach_gpu(net)
    assert error(draw(net), wanted) < (2e-3 if device.type == "cuda" else 3e-6)


@pytest.mark.parametrize("kind", ["", "int8", "fp8 tensor", "int4"])
def test_detached_it_is_bit_for_bit_what_it_was(kind, device):
    net = (pack(network(device), kind) if kind else network(device)).bfloat16()
    names, before = [*net.state_dict()], draw(net)
    kept = [sorted(module.__dict__) for module in net.modules()]
    attach_gpu(net)
    draw(net)
    assert [*net.state_dict()] == names
    detach_gpu(net)
    assert torch.equal(draw(net), before)
    left = [sorted(key for key in module.__dict__ if key != "product") for module in net.modules()]
    assert left == [[key for key in keys if key != "product"] for keys in kept]


def test_inputs_are_left_alone(device):
    """Whoever asks may want them afterwards, as caches do."""
    net = network(device)
    attach_gpu(net)
    img, txt = torch.randn(1, TARGET, WIDTH, device=device), torch.randn(1, TEXT, WIDTH, device=device)
    before = img.clone(), txt.clone()
    ctx = Context(torch.randn(1, 1, WIDTH, device=device), TARGET, net.rope((GRID,), TEXT, device))
    with torch.inference_mode():
        net.transformer_blocks[0](img, txt, ctx)
    assert torch.equal(img, before[0]) and torch.equal(txt, before[1])


@pytest.mark.parametrize("kind", ["", "int8", "fp8 tensor", "computed"])
def test_a_lora_counts_the_same(kind, device, monkeypatch):
    if kind == "computed":  # copies have a thousand rows, which would take the interpreter seconds
        monkeypatch.setattr("lanting.kernels.gpu.rows.available", lambda device: False)
    net = pack(network(device), kind) if kind not in ("", "computed") else network(device)
    net = net.bfloat16()
    name = "transformer_blocks.0."
    wide = 4 * WIDTH
    shapes = {"attn.to_q": (WIDTH, WIDTH), "img_mlp.net.0.proj": (WIDTH, wide), "txt_mlp.net.2": (wide, WIDTH)}
    shapes |= {"attn.to_out.0": (WIDTH, WIDTH), "attn.add_v_proj": (WIDTH, WIDTH)}
    factors = {
        name + path: [
            Factors(torch.randn(4, width).bfloat16().to(device) * 0.2, torch.randn(rows, 4).bfloat16().to(device) * 0.2)
        ]
        for path, (width, rows) in shapes.items()
    }
    without = draw(net)
    attach(net, factors)
    wanted = draw(net)
    attach_gpu(net, compute="int8" if kind == "computed" else None)
    assert error(wanted, without) > 0.05  # it does something
    assert error(draw(net), wanted) < (0.05 if "fp8" in kind else 0.025)


def test_a_gelu_may_end_a_product(device, monkeypatch):
    """In a kernel of cuBLASLt, where there is one; here by its twin."""
    net, asked = network(device), []

    def fused(x, weight, bias):
        asked.append(x.shape)
        return twins.activate((x @ weight.T).float(), bias, True).to(x.dtype)

    attach_gpu(net)
    wanted = draw(net)
    monkeypatch.setattr("lanting.attach.gpu_linears.gelu_by_torch", lambda device, dtype: True)
    monkeypatch.setattr("lanting.attach.gpu_linears.with_gelu", fused)
    assert error(draw(net), wanted) < 3e-3 and len(asked) == 2
    pack(net, "int8")
    draw(net)
    assert len(asked) == 2  # not for what is computed otherwise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_s_own_gelu_is_ours(dtype, device):
    """On a GPU; elsewhere it is not asked for."""
    assert products.gelu_by_torch(device, dtype) == (device.type == "cuda")


def test_modulation_stays_exact(device):
    """One row a step, and its error would reach every token."""
    net = network(device)
    mod = net.transformer_blocks[0].img_mod
    mod[1] = Int8Linear.from_dense(mod[1].weight.cpu(), mod[1].bias.cpu()).to(device)
    attach_gpu(net, compute="int8")
    assert mod[1].product is None


def test_few_rows_are_multiplied_exactly(device, way):
    linear = Int8Linear.from_dense(torch.randn(96, 128), torch.randn(96)).to(device)
    few, many = torch.randn(1, 3, 128, device=device), torch.randn(1, 40, 128, device=device)
    exact = linear(few), linear(many)
    attach_gpu(nn.ModuleDict({"one": linear}))
    assert torch.equal(linear(few), exact[0])
    assert not torch.equal(linear(many), exact[1]) and error(linear(many), exact[1]) < 0.02
    assert torch.equal(linear(many[0]), linear(many)[0])


def test_a_table_serves_the_same_rows(device):
    net = network(device, two_times=True)
    attach_gpu(net)
    wanted = draw(net)
    table = ModulationTable(net)
    assert error(draw(net), wanted) < 1e-3
    table.forget()


def test_new_weights_are_seen(device):
    """Streaming puts others into the same module."""
    net = pack(network(device), "fp8 tensor")
    attach_gpu(net)
    before = draw(net)
    linear = net.transformer_blocks[0].attn.to_q
    linear.weight_scale = linear.weight_scale * 2
    assert error(draw(net), before) > 2e-3


def test_a_nan_stays_visible(device, way):
    """Sentinels look for it: rounding must not hide it."""
    for kind in ("int8", "fp8"):
        net = pack(network(device), kind)
        attach_gpu(net)
        net.transformer_blocks[0].attn.to_q.bias[3] = float("nan")
        assert draw(net).isnan().any()


def test_gradients_go_the_old_way(device):
    net = network(device)
    attach_gpu(net)
    img, txt = (
        torch.randn(1, TARGET, WIDTH, device=device, requires_grad=True),
        torch.randn(1, TEXT, WIDTH, device=device),
    )
    ctx = Context(torch.randn(1, 1, WIDTH, device=device), TARGET, net.rope((GRID,), TEXT, device))
    found, _ = net.transformer_blocks[0](img, txt, ctx)
    found.sum().backward()
    assert img.grad is not None and img.grad.isfinite().all()


def test_the_attention_was_chosen(device):
    net = network(device)
    attach_gpu(net)
    draw(net)
    key = (next(net.parameters()).device, torch.float32, 32, False)
    assert attention.choices().names[key] in attention.WAYS
    assert all(m.product is None for m in net.modules() if isinstance(m, PackedLinear))
