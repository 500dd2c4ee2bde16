"""Qwen-Image-2.1's transformer with what a GPU has for it: fused targets, attention by the best there is, packed
products."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lanting.attach.gpu import attach_gpu, detach_gpu
from lanting.kernels.gpu import attention, products, rows, twins
from lanting.kernels.gpu.twins import FP8, Codes, Sums
from lanting.nn.linears import Fp8Linear, Int4Linear, Int8Linear
from lanting.nn.lora import Factors, attach
from lanting.nn.single_stream import QwenImage21Transformer, SingleStreamConfig, keep_prefix
from lanting.nn.swap import swap

NET = SingleStreamConfig(2, 2, 32, 24, 8, 8, 1, 3, (8, 12, 12), eps=0.05)  # an eps that is seen where it is forgotten
ONE = SingleStreamConfig(1, 2, 32, 24, 8, 8, 1, 3, (8, 12, 12), eps=0.05)


def network(device, config=NET):
    torch.manual_seed(0)
    net = QwenImage21Transformer(config).eval().requires_grad_(False)
    for weight in net.parameters():
        weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.1)
    return net.to(device)


@pytest.fixture
def net(device):
    return network(device)


def question(device, padded, batch=2):
    """Two rows at different times, with a reference picture after two words."""
    torch.manual_seed(1)
    latents, words = torch.randn(2, 6 + 4, 8, device=device), torch.randn(2, 7, 24, device=device)
    mask = torch.ones(2, 7, dtype=torch.bool, device=device)
    mask[1, 5:] = False
    time = torch.tensor([0.7, 0.3], device=device)
    given = [x[:batch] for x in (latents, time, words)]
    return (*given, mask if padded else None, ((1, 2, 3), (1, 2, 2)), 6), {"places": (2,)}


def draw(net, padded=False, batch=1):
    given, more = question(net.proj_out.weight.device, padded, batch)
    dtype = net.proj_out.weight.dtype
    with torch.inference_mode():
        return net(*(x.to(dtype) if torch.is_tensor(x) and x.dtype != torch.bool else x for x in given), **more).float()


def error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def near(device):
    return 1e-5 if device.type == "cpu" else 1e-2  # a GPU's float32 products may be TF32's


def pack(net, kind):
    classes = {"int8": Int8Linear, "fp8": Fp8Linear, "int4": Int4Linear}
    turn = {"rotate": 64} if "rotated" in kind else {}
    cls = classes[kind.split()[0]]
    swap(
        net.transformer_blocks,
        nn.Linear,
        lambda path, old: cls.from_dense(old.weight.float().cpu(), old.bias, **turn).to(old.weight.device),
    )
    return net


@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_chosen_and_given_back(net, device, padded, monkeypatch):
    asked, choices = [], attention.choices()
    monkeypatch.setattr(attention, "choices", lambda: lambda *x: asked.append(x[0].shape[1]) or choices(*x))
    given, more = question(device, padded)
    plain = net(*given, **more)
    attach_gpu(net)
    with keep_prefix(net):
        found = [net(*given, **more) for _ in range(2)]
    assert torch.equal(*found)
    assert (found[0] - plain).abs().max() < near(device) * plain.abs().max()
    target = [] if padded else [6] * 2  # text and what is padded has masks, and is torch's
    assert sorted(asked) == sorted([4, *target, *target])  # the picture once: nobody reads the last block's prefix
    detach_gpu(net)
    assert torch.equal(net(*given, **more), plain)


@pytest.mark.parametrize(("dtype", "padded"), [(torch.bfloat16, False), (torch.float16, True)])
def test_half_precision_is_no_further_from_float32_than_torch(dtype, padded, device):
    """Two rows at different times, with padding those at different places; in float32 the test above asks for 1e-5."""
    net = network(device)
    exact, rough = draw(net, padded, 2), net.to(dtype)
    plain = error(draw(rough, padded, 2), exact)
    attach_gpu(rough)
    found = draw(rough, padded, 2)
    assert 0 < error(found, exact) < 1.2 * plain


def test_rows_do_not_meet(device):
    """Each is what it is alone: scales, gates and places of its own."""
    net = network(device, ONE)
    attach_gpu(net)
    both, first = draw(net, batch=2), draw(net)
    assert error(both[:1], first) < near(device)
    assert error(both[1:], first) > 0.1


KINDS = {"int8 rotated": 0.012, "fp8": 0.04, "int4": 1e-5}  # plain int8 is in the tests below


@pytest.mark.parametrize("kind", KINDS)
def test_packed_linears_compute_in_what_they_are(kind, device):
    """What rounding activations to 8 bits costs beside the same weights without it."""
    net = pack(network(device, ONE), kind)
    wanted = draw(net)
    attach_gpu(net)
    found = draw(net)
    assert error(found, wanted) < KINDS[kind] + (2e-3 if device.type == "cuda" else 0)
    assert kind == "int4" or error(found, wanted) > 5e-4
    if "rotated" in kind:
        with keep_prefix(net):
            given, more = question(device, False, 1)
            kept = [net(*given, **more) for _ in range(2)]
        assert torch.equal(kept[0], found) and torch.equal(kept[1], found)
    detach_gpu(net)
    assert torch.equal(draw(net), wanted)


def test_integer_sums_bring_their_scales_to_what_follows(device, monkeypatch):
    """As where cuBLASLt multiplies fastest: norm, SwiGLU and gates read its sums."""
    net = pack(network(device, ONE), "int8")
    attach_gpu(net)
    wanted = draw(net)
    monkeypatch.setattr(
        products, "integers", lambda codes, weight, bias, dtype, out: products.sums_of(codes, weight, bias)
    )
    assert error(draw(net), wanted) < 1e-3  # a code next to a tie is another now and then


def test_packed_linears_of_blocks_are_the_kernels(net, device):
    pack(net, "int8")
    attach_gpu(net)
    made = [module for module in net.modules() if isinstance(module, Int8Linear)]
    assert len(made) == 14 and all(module.product is not None for module in made)


def test_detached_it_is_bit_for_bit_what_it_was(device, monkeypatch):
    """The twin makes the copies: hundreds of rows would take the interpreter seconds."""
    net = network(device, ONE).bfloat16()
    before, kept = draw(net), [sorted(module.__dict__) for module in net.modules()]
    monkeypatch.setattr("lanting.attach.gpu_linears.quantize", lambda x, form: twins.coded(x.float(), form))
    attach_gpu(net, compute="int8")
    assert error(draw(net), before) > 1e-3
    detach_gpu(net)
    assert torch.equal(draw(net), before)
    assert [sorted(module.__dict__) for module in net.modules()] == kept


def test_a_lora_on_one_of_two_readers_counts_the_same(device):
    """They want the rows in different forms."""
    net = pack(network(device, ONE), "int8").bfloat16()
    name, draws = "transformer_blocks.0.", torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=draws).bfloat16().to(device) * 0.2  # noqa: E731
    shapes = {"img_mlp.gate_layer": (64, 192), "img_mlp.out": (192, 64), "attn.to_k": (64, 64)}
    without = draw(net)
    attach(net, {name + path: [Factors(make(4, width), make(out, 4))] for path, (width, out) in shapes.items()})
    wanted = draw(net)
    attach_gpu(net)
    assert error(wanted, without) > 0.05  # it does something
    assert error(draw(net), wanted) < 0.025


def test_inputs_are_left_alone_and_gradients_go_the_old_way(device, monkeypatch):
    """Whoever asks may want them afterwards, as caches do."""
    net, calls = network(device, ONE), []
    wanted = copy.deepcopy(net)
    attach_gpu(net)
    block, real = net.transformer_blocks[0], rows.swiglu
    monkeypatch.setattr("lanting.attach.gpu_single.swiglu", lambda *x: calls.append(1) or real(*x))
    given, more = question(device, False, 1)
    seen = []
    hook = block.register_forward_pre_hook(lambda _, x: seen.append((x, x[0].clone(), x[1].clone())))
    net(*given, **more)
    hook.remove()
    (img, txt, ctx), *clones = seen[0]
    assert torch.equal(img, clones[0]) and torch.equal(txt, clones[1]) and len(calls) == 1
    img = img.clone().requires_grad_()
    found, _ = block(img, txt, ctx)
    assert len(calls) == 1 and torch.equal(found, wanted.transformer_blocks[0](img, txt, ctx)[0])
    found.sum().backward()
    assert img.grad is not None and img.grad.isfinite().all()


def test_a_nan_stays_visible(device):
    """Sentinels look for it: rounding must not hide it."""
    for place in ("to_q", "to_v"):
        net = network(device, ONE)
        getattr(net.transformer_blocks[0].attn, place).weight[3] = float("nan")
        attach_gpu(net)
        assert draw(net).isnan().any()


def test_without_triton_it_is_torch_s(device, monkeypatch):
    net = network(device, ONE)
    wanted = draw(net)
    monkeypatch.setattr("lanting.attach.gpu_single.available", lambda device: False)
    attach_gpu(net)
    assert error(draw(net), wanted) < near(device)


STEP = {torch.float32: 2e-6, torch.bfloat16: 0.01, torch.float16: 0.0012}  # one rounding, relative


def same(found, wanted):
    """As close as one rounding lets two ways to compute the same be; of 8-bit codes few, by a step each."""
    if isinstance(wanted, Codes):
        assert found.shape == wanted.shape and found.data.dtype == wanted.data.dtype
        assert torch.allclose(found.scale, wanted.scale, rtol=2e-6)
        apart = (found.data.float() - wanted.data.float()).abs()
        assert (apart > 0).float().mean() < 0.02
        assert (apart <= (1 if found.data.dtype == torch.int8 else wanted.data.float().abs() / 7)).all()
    else:
        assert found.dtype == wanted.dtype and found.shape == wanted.shape and found.isfinite().all()
        a, b = found.float(), wanted.float()
        assert ((a - b).abs() <= STEP[found.dtype] * (b.abs() + b.abs().mean())).all()


def by_twins(monkeypatch, *given):
    with monkeypatch.context() as patch:
        patch.setattr(rows, "known", lambda x: False)
        return rows.swiglu(*given)


@pytest.mark.parametrize("form", [None, torch.int8, FP8, (None, 16), (torch.int8, 16)])
@pytest.mark.parametrize("dtype", STEP)
def test_swiglu_is_its_twin(dtype, form, device, monkeypatch):
    torch.manual_seed(2)
    gate, up = (torch.randn(2, 3, 48, device=device).to(dtype) * 3 for _ in range(2))
    wanted = by_twins(monkeypatch, gate, up, form)
    if form is None:
        same(nn.functional.silu(gate.float()).mul(up.float()).to(dtype), wanted)
    same(rows.swiglu(gate, up, form), wanted)
    if form is None:
        assert rows.swiglu(gate, up, form, gate) is gate  # where it was
        same(gate, wanted)


@pytest.mark.parametrize("other", ["sums", "sums with bias", "numbers"])
def test_swiglu_of_integer_sums(other, device, monkeypatch):
    """Two of them by their scales; what a kernel does not know is made numbers first."""
    torch.manual_seed(3)
    bias = torch.randn(40, device=device) if "bias" in other else None
    gate, up = (
        Sums(
            torch.randint(-(2**26), 2**26, (6, 40), dtype=torch.int32, device=device),
            *(torch.rand(*shape, device=device) / 2**13 for shape in ((6, 1), (40,))),
            bias if number else None,
            (2, 3),
        )
        for number in range(2)
    )
    wanted = (nn.functional.silu(gate.values()) * up.values()).bfloat16()
    given = gate, up.values() if other == "numbers" else up, None, None, torch.bfloat16
    for found in (rows.swiglu(*given), by_twins(monkeypatch, *given)):
        assert found.dtype == torch.bfloat16
        assert error(found.float(), wanted.float()) < 0.01


@pytest.mark.parametrize("form", [None, torch.int8])
def test_a_norm_may_have_no_shift(form, device, monkeypatch):
    torch.manual_seed(4)
    x, y = (torch.randn(2, 3, 48, device=device) for _ in range(2))
    scale, gate = torch.randn(2, 1, 96, device=device).mul(0.3).chunk(2, -1)
    none = torch.zeros_like(scale)
    same(rows.norm(x, None, scale, 0, form, 1e-3), twins.norm(x, none, scale, 0, form, 1e-3))
    moved, normed = rows.join_norm(y, rows.Gated(x, gate), None, scale, form, 1e-3)
    same(moved, x + gate * y)
    same(normed, twins.norm(moved, none, scale, 0, form, 1e-3))
    same(twins.norm(x, None, scale, 0, form, 1e-3), twins.norm(x, none, scale, 0, form, 1e-3))
