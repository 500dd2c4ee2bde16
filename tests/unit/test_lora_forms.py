"""LoRA files of every dialect and form equal merged weights, over plain and packed Linears, and PEFT's modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lanting.nn.deltas import Hadamard, dense_weight
from lanting.nn.linears import Fp8Linear, GgufLinear, Int4Linear, Int8Linear, PackedLinear
from lanting.nn.lora import Change, Factors, LoraLinear, attach, detach, merge, set_strengths
from lanting.nn.mmdit import QwenImageTransformer
from lanting.nn.swap import swap
from lanting.weights.linear_names import transformer_linears
from lanting.weights.lora import attach_loras
from lanting.weights.lora_file import Lora, open_lora
from loras import ALPHA, DIALECTS, FORMS, NUMBERS, RANK, Made, draw, make, merged, network

CPU = torch.device("cpu")
SIDES = transformer_linears(NUMBERS)


@pytest.fixture(scope="module")
def net() -> QwenImageTransformer:
    return network()


def opened(made: Made, folder: Path, dialect: str = "Lightning", strength: float = 1.0, notes=None) -> Lora:
    lora = open_lora(made.save(folder / f"{strength}.safetensors", dialect, notes), SIDES, "", strength)
    assert set(lora.pieces) == set(SIDES), "every tensor has found its Linear"
    return lora


def close(got: torch.Tensor, want: torch.Tensor, share: float = 2e-5) -> bool:
    return bool((got - want).abs().max() <= share * want.abs().max())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_maps_all_keys_and_equals_merged_weights(net, tmp_path, dialect):
    alpha = DIALECTS[dialect][3]
    made = make(net, "lora" if alpha else "lora without alpha", alpha)
    want, before = draw(merged(net, (made, 0.7))), draw(net)
    assert attach_loras(net, [opened(made, tmp_path, dialect, 0.7)], torch.float32, CPU) == len(SIDES)
    got = draw(net)
    assert detach(net) == len(SIDES)
    assert close(got, want) and not close(got, before, 0.05)
    assert torch.equal(draw(net), before), "taking it off gives the old bits"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dialect", ["ComfyUI", "LyCORIS"])
def test_every_form_equals_merged_weights(net, tmp_path, form, dialect):
    made = make(net, form, form != "lora without alpha")
    want = draw(merged(net, (made, 0.5)))
    attach_loras(net, [opened(made, tmp_path, dialect, 0.5)], torch.float32, CPU)
    names = set(net.state_dict()) - {f"{path}.{half}" for path in SIDES for half in ("down", "up")}
    got = draw(net)
    detach(net)
    assert close(got, want) and not close(got, draw(net), 0.02)
    assert {name.replace(".base.", ".") for name in names} == set(net.state_dict()), (
        "streaming sees the net's own alone"
    )


@pytest.mark.parametrize("form", FORMS)
def test_merging_a_form_gives_the_merged_weights(net, tmp_path, form):
    made = make(net, form, form != "lora without alpha")
    want, copy = merged(net, (made, -0.8)), merged(net)
    attach_loras(copy, [opened(made, tmp_path, strength=-0.8)], torch.float32, CPU)
    assert merge(copy) == len(SIDES)
    assert not any(isinstance(module, LoraLinear) for module in copy.modules())
    for name, weight in want.state_dict().items():
        assert close(copy.state_dict()[name], weight, 1e-5), name


def test_forms_add_up(net, tmp_path):
    """Three files of three forms at once, then at other strengths without loading anything."""
    kinds, strengths = ("lora", "dora", "loha"), (0.6, -0.4, 1.5)
    made = [make(net, form, seed=seed) for seed, form in enumerate(kinds)]
    loras = [opened(each, tmp_path, strength=s) for each, s in zip(made, strengths, strict=True)]
    attach_loras(net, loras, torch.float32, CPU)
    wrapped = [module for module in net.modules() if isinstance(module, LoraLinear)]
    places = [(module.scales.data_ptr(), module.strengths.data_ptr()) for module in wrapped]
    got = draw(net)
    assert set_strengths(net, (0.1, 0.9)) == len(SIDES)
    others = draw(net)
    set_strengths(net, (0.0, 0.0, 0.0))
    none = draw(net)
    set_strengths(net, strengths)
    again = draw(net)
    assert places == [(m.scales.data_ptr(), m.strengths.data_ptr()) for m in wrapped], "a captured graph stays valid"
    detach(net)
    assert close(got, draw(merged(net, *zip(made, strengths, strict=True))))
    assert close(others, draw(merged(net, *zip(made, (0.1, 0.9, 1.0), strict=True))))
    assert torch.equal(got, again) and torch.equal(none, draw(net))


def test_fused_projections_are_split(net, tmp_path):
    """One LoRA over queries, keys and values together, in two streams, two spellings."""
    made = Made()
    generator = torch.Generator().manual_seed(3)
    for block, (stream, parts) in enumerate(
        (("to_qkv", ("to_q", "to_k", "to_v")), ("add_qkv_proj", ("add_q_proj", "add_k_proj", "add_v_proj")))
    ):
        layer = f"transformer_blocks.{block}.attn"
        down, up = torch.randn(RANK, 32, generator=generator) * 0.2, torch.randn(96, RANK, generator=generator) * 0.2
        bias = torch.randn(96, generator=generator)
        made.tensors[f"{layer}.{stream}"] = {"down": down, "up": up, "alpha": torch.tensor(ALPHA), "diff_b": bias}
        for i, part in enumerate(parts):
            rows = slice(32 * i, 32 * i + 32)
            made.weights[f"{layer}.{part}"] = ALPHA / RANK * up[rows] @ down
            made.biases[f"{layer}.{part}"] = bias[rows]
    want = draw(merged(net, (made, 1.0)))
    for dialect in ("Lightning", "Kohya (musubi-tuner)"):
        lora = open_lora(made.save(tmp_path / "fused.safetensors", dialect), SIDES)
        assert attach_loras(net, [lora], torch.float32, CPU) == 6
        got = draw(net)
        detach(net)
        assert close(got, want)


PACKED = {
    "int8": lambda w, b: Int8Linear.from_dense(w, b),
    "int4": lambda w, b: Int4Linear.from_dense(w, b, group=16 if w.shape[1] % 32 else 32),
    "fp8": lambda w, b: Fp8Linear.from_dense(w, b),
    "q8_0": lambda w, b: q8_0(w, b) if w.shape[1] % 32 == 0 else Int8Linear.from_dense(w, b),
}


def q8_0(weight: torch.Tensor, bias: torch.Tensor) -> GgufLinear:
    """Blocks of 32 signed bytes behind a float16 scale."""
    blocks = weight.unflatten(1, (-1, 32))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half()
    numbers = (blocks / scale.float()).round().clamp(-127, 127).to(torch.int8)
    packed = torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], -1).flatten(1)
    return GgufLinear.from_packed(packed, "Q8_0", weight.shape[1], bias)


def packed(net: QwenImageTransformer, kind: str) -> QwenImageTransformer:
    """A copy whose Linears are packed where the kind allows it."""
    copy = merged(net)

    def pack(path: str, old: nn.Module) -> nn.Module | None:
        assert isinstance(old, nn.Linear)
        return PACKED[kind](old.weight, old.bias) if old.in_features % 16 == 0 else None

    swap(copy, nn.Linear, pack)
    return copy


@pytest.mark.parametrize("form", ["lora", "lokr", "loha", "dora", "dora of columns", "diff"])
@pytest.mark.parametrize("kind", PACKED)
def test_over_packed_weights_it_equals_the_expanded_ones(net, tmp_path, kind, form):
    """To rounding: the error of the whole is the base's own."""
    base = packed(net, kind)
    dense = merged(net)
    for path in SIDES:
        dense.get_submodule(path).weight.copy_(dense_weight(base.get_submodule(path), torch.float32))
    made = make(net, form)
    lora = opened(made, tmp_path, strength=0.6)
    stored = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    plain = draw(base)
    attach_loras(base, [lora], torch.float32, CPU)
    attach_loras(dense, [lora], torch.float32, CPU)
    got, want = draw(base), draw(dense)
    assert close(got, want, 5e-5) and not close(got, plain, 0.02)
    own = (plain - draw(net)).norm() / draw(net).norm()
    changed = draw(merged(net, (made, 0.6))) if not form.startswith("dora") else want
    assert (got - changed).norm() / changed.norm() <= 3 * own + 1e-5, "no worse than the base"
    detach(base)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in base.state_dict().items())


def test_a_packed_linear_is_merged_only_when_asked(net, tmp_path):
    base = packed(net, "int4")
    attach_loras(base, [opened(make(net), tmp_path)], torch.float32, CPU)
    with pytest.raises(ValueError, match="is packed"):
        merge(base)
    want = draw(base)
    merge(base, torch.float32)
    assert close(draw(base), want) and not any(isinstance(m, LoraLinear) for m in base.modules())
    assert not any(isinstance(module, PackedLinear) for module in base.modules())


def test_thin_products_of_loha_are_chosen_where_they_are_thin():
    def loha(rank: int) -> Hadamard:
        generator = torch.Generator().manual_seed(rank)
        shapes = ((64, rank), (rank, 48), (64, rank), (rank, 48))
        return Hadamard(*(torch.randn(shape, generator=generator) for shape in shapes), scale=0.5)

    x = torch.randn(3, 5, 48)
    for rank, thin in ((2, True), (5, True), (6, False)):
        made = loha(rank)
        assert made.thin == thin
        assert torch.allclose(made.apply_to(x), x @ made.dense().T, atol=1e-3)


def test_bfloat16_bases_keep_their_dtype(net, tmp_path):
    half = network(dtype=torch.bfloat16)
    half.load_state_dict(net.state_dict())
    for form in FORMS:
        made = make(net, form, form != "lora without alpha")
        attach_loras(half, [opened(made, tmp_path, strength=0.3)], torch.bfloat16, CPU)
        got, want = draw(half, torch.bfloat16), draw(merged(net, (made, 0.3)))
        detach(half)
        plain = (draw(half, torch.bfloat16).float() - draw(net)).norm() / draw(net).norm()
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() / want.norm() <= 3 * plain, form


def test_weights_that_come_and_go(net, tmp_path):
    """A LoRA is hung on Linears without contents, as streaming has them; they arrive for each use."""
    copy = merged(net)
    own = {path: copy.get_submodule(path).weight for path in SIDES}
    for path in SIDES:
        copy.get_submodule(path).weight = nn.Parameter(own[path].to("meta"), requires_grad=False)
    made = make(net, "dora")
    attach_loras(copy, [opened(made, tmp_path)], torch.float32, CPU)
    for path in SIDES:
        module = copy.get_submodule(path).base

        def arrive(module, args, path=path):
            module.weight = own[path]

        def leave(module, args, result, path=path):
            module.weight = nn.Parameter(own[path].to("meta"), requires_grad=False)

        copy.get_submodule(path).register_forward_pre_hook(lambda m, a, f=arrive: f(m.base, a))
        copy.get_submodule(path).register_forward_hook(lambda m, a, r, f=leave: f(m.base, a, r))
        assert module.weight.is_meta
    want = draw(merged(net, (made, 1.0)))
    assert close(draw(copy), want) and close(draw(copy), want)


# ---------------------------------------------------------------- PEFT's own modules
def pefts(net: QwenImageTransformer, config, folder: Path):
    """(PEFT's model over a copy, the file that it saves)."""
    import peft

    torch.manual_seed(5)
    model = peft.get_peft_model(merged(net), config).eval()
    for name, weight in model.named_parameters():
        if "magnitude" in name:
            weight.data *= 1 + 0.2 * torch.randn_like(weight)
    model.save_pretrained(str(folder))
    return model, folder / "adapter_model.safetensors"


TARGETS = r".*(to_q|add_v_proj|to_out\.0|net\.0\.proj|net\.2|mod\.1|proj_out|linear_1)"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoraConfig", {"r": 4, "lora_alpha": 6}),
        ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
        ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}),
        ("LoraConfig", {"r": 4, "lora_alpha": 6, "lora_bias": True}),
        ("LoraConfig", {"r": 4, "lora_alpha": 6, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 5}}),
        ("LoHaConfig", {"r": 3, "alpha": 5}),
        ("LoKrConfig", {"r": 2, "alpha": 5}),
        ("LoKrConfig", {"r": 2, "alpha": 5, "decompose_both": True, "decompose_factor": 4}),
        ("LoKrConfig", {"r": 64, "alpha": 5}),
        ("LoKrConfig", {"r": 2, "alpha": 5, "rank_pattern": {"to_q": 64}, "alpha_pattern": {"to_q": 3}}),
    ],
)
def test_equal_to_pefts_own_modules(net, tmp_path, kind, options):
    import peft

    name = "init_lora_weights" if kind == "LoraConfig" else "init_weights"
    theirs, file = pefts(net, getattr(peft, kind)(target_modules=TARGETS, **{name: False}, **options), tmp_path)
    lora = open_lora(file, SIDES)
    attach_loras(net, [lora], torch.float32, CPU)
    got = draw(net)
    detach(net)
    want = draw(theirs)
    assert close(got, want) and not close(got, draw(net), 0.01)


def test_a_files_scalars_of_every_type(net, tmp_path):
    """Alpha is read from the bytes, without torch."""
    down, up = torch.ones(2, 32), torch.ones(32, 2)
    name = "transformer_blocks.0.attn.to_q"
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32):
        for shape in ((), (1,)):
            alpha = torch.full(shape, 3, dtype=dtype)
            tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
            save_file(tensors, str(tmp_path / "a.safetensors"))
            assert open_lora(tmp_path / "a.safetensors", SIDES).pieces[name].scale == 1.5


def test_peft_notes_of_strange_types_are_left_aside(net, tmp_path):
    for told in ([], {"lora_alpha": "x", "alpha_pattern": 3}, {"alpha_pattern": {"to_q": None}}, "{"):
        notes = {"lora_adapter_metadata": told if isinstance(told, str) else json.dumps(told)}
        lora = opened(make(net, "lora without alpha", False), tmp_path, "diffusers", notes=notes)
        assert {piece.scale for piece in lora.pieces.values()} == {1.0}


def test_parts_are_numbered():
    root = nn.ModuleDict({"linear": nn.Linear(4, 4, bias=False)})
    from lanting.nn.deltas import Full, Shift

    parts = [
        Factors(torch.ones(1, 4), torch.ones(4, 1), 0.5, 1),
        Change(Full(torch.eye(4)), 0),
        Change(Shift(torch.ones(4)), 2),
    ]
    attach(root, {"linear": parts}, (2.0, 4.0, 8.0))
    x = torch.arange(4.0)[None]
    want = root["linear"].base(x) + 0.5 * 4 * x.sum() + 2 * x + 8
    assert torch.allclose(root["linear"](x), want)
    with pytest.raises(ValueError, match="is no Linear"):
        attach(root, {"linear.base": parts})
    merge(root)
    assert torch.allclose(root["linear"](x), want, atol=1e-5) and root["linear"].bias is not None
