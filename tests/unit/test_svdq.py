"""nunchaku's SVDQuant files: to the bit what deepcompressor packs, and whole files that draw as nunchaku computes them.

`tests/packed/nunchaku.safetensors` was made by deepcompressor (`make.py`); `tests/nunchaku.py` packs by itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nunchaku
from lanting.attach import compute
from lanting.attach.gpu_linears import How, Rows, project
from lanting.attach.thin import thin_product
from lanting.core.errors import ModelError
from lanting.engine.placement import Placed
from lanting.kernels import library
from lanting.nn.affine import AffineLinear
from lanting.nn.fourbit import Nvfp4Linear
from lanting.nn.linears import Int4Linear, PackedLinear
from lanting.nn.lora import Factors, attach, detach, merge
from lanting.nn.lowrank import LowRankLinear
from lanting.nn.mmdit import QwenImageTransformer
from lanting.weights.build import build_transformer, store_transformer
from lanting.weights.checkpoint import Checkpoint, open_component
from lanting.weights.configs import config_of
from lanting.weights.find import release_of
from lanting.weights.form import Form
from lanting.weights.forms import read_forms, shapes
from lanting.weights.inspect import describe
from lanting.weights.quantize import dense_reader, quantize_safetensors
from lanting.weights.schemes import svdq, svdq_tiles
from lanting.weights.single import open_file, open_weights
from lanting.weights.sized import held_bytes
from lanting.weights.stored import Placing, loaded
from nunchaku import E2M1, SHIFT, Numbers

KEPT = load_file(Path(__file__).parent.parent / "packed" / "nunchaku.safetensors")
CPU = torch.device("cpu")
FLOAT = Placing(torch.float32, CPU)
ONE = "transformer_blocks.0.attn.to_out.0"
QKV = "transformer_blocks.1.attn.to_qkv"
SHIFTED = "transformer_blocks.1.txt_mlp.net.2"
NUMBERS, HALF = Numbers(), torch.bfloat16
THIN = NUMBERS.thin(128).to(HALF)  # as up; the other way round it is down
DOWN = (THIN.T.double() / NUMBERS.smooth).to(HALF)


# ---------------------------------------------------------------- what deepcompressor made


def test_the_tests_pack_as_deepcompressor_does():
    """The thin product's inputs are not shifted: what a shift would have done to it is taken back in the bias."""
    taken = THIN.flip(0).double() @ (THIN.T.double() / NUMBERS.smooth) @ torch.full((128,), SHIFT).double()
    small, whole = NUMBERS.scales(16), torch.exp2(-(torch.arange(128) % 5).float())
    six = Numbers(24, 128)
    codes, bias = (each.view(6, 4, *each.shape[1:]).transpose(0, 1) for each in (six.codes(0), six.bias))
    made = {
        "int4.qweight": nunchaku.tiled_codes(NUMBERS.codes() & 15),
        "int4.wscales": nunchaku.tiled_rows(NUMBERS.scales(64).to(HALF)),
        "int4.smooth": nunchaku.tiled_rows(NUMBERS.smooth.to(HALF)),
        "int4.lora_up": nunchaku.tiled_thin(THIN.flip(0), down=False),
        "int4.lora_down": nunchaku.tiled_thin(DOWN, down=True),
        "int4.bias": nunchaku.tiled_rows((NUMBERS.bias + taken).to(HALF)),
        "fp4.qweight": nunchaku.tiled_codes(NUMBERS.codes(0) * (NUMBERS.codes(0) != 8)),  # there is one zero
        "fp4.wscales": nunchaku.tiled_small(small.to(torch.float8_e4m3fn)),
        "fp4.wcscales": nunchaku.tiled_rows(whole.to(HALF)),
        "modulation.qweight": nunchaku.tiled_affine(codes.reshape(24, 128)),
        "modulation.bias": (bias + torch.tensor([0, 1, 0, 0, 1, 0])).flatten().to(HALF),
    }
    for name, each in made.items():
        same = KEPT[name].view(torch.uint8), each.view(torch.uint8)
        assert torch.equal(*same), name


def test_a_linear_of_integers_means_what_went_in(tmp_path):
    """Under the names of older files."""
    save_file({k.replace("int4", ONE): v for k, v in KEPT.items() if "int4" in k}, tmp_path / "model.safetensors")
    checkpoint = svdq.named(open_component(tmp_path))
    form = read_forms(checkpoint)[ONE]
    assert (form.kind, form.rank, form.words()) == ("int4", 16, "SVDQuant int4, low-rank 16")
    linear = loaded(form, checkpoint, FLOAT)
    residual = NUMBERS.codes() * NUMBERS.scales(64).repeat_interleave(64, 1)
    meant = residual / NUMBERS.smooth + THIN.flip(0).float() @ DOWN.float()
    torch.testing.assert_close(linear.dense(torch.float32), meant, rtol=1e-6, atol=1e-6)
    assert torch.equal(linear.dense(HALF), linear.dense(torch.float32).to(HALF)), "rounded once"
    rows = torch.tensor([[5, 0], [127, 5]])
    assert torch.equal(linear.lookup(rows, torch.float32), linear.dense(torch.float32)[rows])
    assert linear.bias is not None and torch.equal(nunchaku.tiled_rows(linear.bias), KEPT["int4.bias"])


def test_e2m1_and_modulations_mean_what_went_in():
    thin = {f"proj_{way}": KEPT[f"int4.lora_{way}"] for way in ("down", "up")}
    parts = {name.removeprefix("fp4."): each for name, each in KEPT.items() if name.startswith("fp4.")}
    parts |= {"weight": parts["qweight"], "smooth_factor": parts["smooth"], **thin}
    held = svdq_tiles.low_rank(Form("nvfp4", (128, 128), layout=svdq.PLAIN, rank=16), parts)
    coarse = Nvfp4Linear(128, 128, bias=False, in_rows=True)
    coarse.load_state_dict({k.removeprefix("residual."): v for k, v in held.items() if k.startswith("residual.")})
    scales = NUMBERS.scales(16) * torch.exp2(-(torch.arange(128) % 5).float())[:, None]
    assert torch.equal(coarse.dense(torch.float32), E2M1[NUMBERS.codes(0)] * scales.repeat_interleave(16, 1))
    six = Numbers(24, 128)
    parts = {name.removeprefix("modulation."): each for name, each in KEPT.items() if name.startswith("modulation.")}
    held = svdq_tiles.modulation(
        Form("uint4", (24, 128), group=64, layout=svdq.SIX), parts | {"weight": parts["qweight"]}
    )
    linear = AffineLinear(128, 24, bits=4, group=64)
    linear.load_state_dict(held)
    assert torch.equal(linear.dense(torch.float32), six.codes(-7) * six.scales(64).repeat_interleave(64, 1))
    assert linear.bias is not None
    torch.testing.assert_close(linear.bias, six.bias, rtol=0, atol=2**-8)  # 1 was added in bfloat16


# ---------------------------------------------------------------- whole files


CASES = {"int4": ("int4", 32, True), "fp4": ("nvfp4", 16, True), "int4 of diffusers": ("int4", 16, False)}
CLASSES = {"int4": Int4Linear, "nvfp4": Nvfp4Linear}
Case = tuple[Path, QwenImageTransformer]


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("svdq")
    made = {}
    for name, (kind, rank, whole) in CASES.items():
        tensors, net = nunchaku.file_and_net(kind, rank, whole)
        path = folder / f"svdq-{name.split()[0]}_r{rank}-{whole}-qwen-image.safetensors"
        save_file(tensors, path, nunchaku.notes(rank))
        made[name] = path, net
    return made


def opened(path: Path) -> tuple[Checkpoint, dict]:
    checkpoint = open_file(path)["transformer"]
    return checkpoint, config_of("transformer", checkpoint)


def step(net: nn.Module, tokens: int = 6) -> Tensor:
    make = torch.Generator().manual_seed(5)
    latents, words = (
        torch.randn(1, tokens, 64, generator=make),
        torch.randn(1, 4, nunchaku.SHAPE.joint_attention_dim, generator=make),
    )
    with torch.no_grad():
        return net(latents, torch.tensor([0.7]), words, None, [(1, 2, tokens // 2)], tokens)


@pytest.mark.parametrize("case", CASES)
def test_a_file_draws_as_nunchaku_computes_it(case, cases):
    path, meant = cases[case]
    checkpoint, config = opened(path)
    net = build_transformer(checkpoint, config, FLOAT)
    torch.testing.assert_close(step(net), step(meant), atol=5e-6, rtol=1e-5)
    kinds = [type(part) for part in net.modules() if isinstance(part, PackedLinear)]
    assert kinds.count(LowRankLinear) == kinds.count(CLASSES[CASES[case][0]]) == 2 * 12
    assert kinds.count(AffineLinear) == 2 * 2
    plain = QwenImageTransformer(nunchaku.SHAPE).state_dict()
    assert shapes(checkpoint) == {name: tuple(each.shape) for name, each in plain.items()}


@pytest.mark.parametrize("case", CASES)
def test_people_and_plans_are_told_what_it_is(case, cases):
    path, (kind, rank, _) = cases[case][0], CASES[case]
    told = describe(str(path))
    assert told.problems == () and told.release == "qwen-image"
    assert f"SVDQuant {kind}, low-rank {rank}" in told.parts[0].dtypes
    checkpoint, config = opened(path)
    planned = sum(held_bytes(checkpoint, read_forms(checkpoint)).values())
    held = sum(each.nbytes for each in build_transformer(checkpoint, config, Placing(HALF, CPU)).state_dict().values())
    assert 0.97 < planned / held < 1.05
    assert checkpoint.bytes() == sum(each.nbytes for each in load_file(path).values()), "fused ones are counted once"


def test_2_1_is_read_from_such_files_too(tmp_path):
    tensors, meant = nunchaku.single_file_and_net()
    path = tmp_path / "svdq-fp4_r16-qwen-image-2.1.safetensors"
    save_file(tensors, path)
    checkpoint, config = opened(path)
    make = torch.Generator().manual_seed(5)
    latents, words = torch.randn(1, 6, 16, generator=make), torch.randn(1, 4, 48, generator=make)
    net = build_transformer(checkpoint, config, FLOAT)
    found, wanted = (each(latents, torch.tensor([0.7]), words, None, [(1, 2, 3)], 6) for each in (net, meant))
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-5)
    assert release_of(path, checkpoint)[0].name == "qwen-image-2.1"
    name = "transformer_blocks.0.img_mlp.out.bias"
    save_file(tensors | {name: torch.ones(128, dtype=HALF)}, tmp_path / "biased.safetensors")
    with pytest.raises(ModelError, match=f"no place for, the first is {name}"):
        build_transformer(*opened(tmp_path / "biased.safetensors"), FLOAT)


def test_a_folder_is_read_and_shown_as_its_file_is(cases, tmp_path):
    """As diffusers keeps a Nunchaku Lite checkpoint."""
    path, meant = cases["int4 of diffusers"]
    (tmp_path / "transformer").mkdir()
    config = opened(path)[1] | {"quantization_config": {"quant_method": "nunchaku_lite", "svdq_w4a4": {"rank": 16}}}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    save_file(load_file(path), tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    told = describe(str(tmp_path / "transformer"))
    assert told.problems == told.notes == () and told.parts[0].kind.name == "transformer"
    assert "SVDQuant int4, low-rank 16" in told.parts[0].dtypes
    net = build_transformer(open_weights(tmp_path / "transformer", "transformer"), config, FLOAT)
    torch.testing.assert_close(step(net), step(meant), atol=5e-6, rtol=1e-5)


def test_its_note_and_its_name_tell_the_release(cases, tmp_path):
    """A 2511 of nunchaku's has no marker; versions of Lightning are part of the word."""
    path = tmp_path / "svdq-fp4_r128-lightningv2.0-8steps.safetensors"
    save_file(load_file(cases["fp4"][0]), path, nunchaku.notes(128, zero_cond_t=True))
    checkpoint, config = opened(path)
    assert config["zero_cond_t"] and not opened(cases["fp4"][0])[1]["zero_cond_t"]
    spec, notes = release_of(path, checkpoint)
    assert (spec.name, spec.defaults.steps, notes) == ("qwen-image-edit-2511", 8, ())
    path.unlink()
    save_file(load_file(cases["fp4"][0]), path, {"config": "[broken"})
    assert release_of(path, opened(path)[0])[0].name == "qwen-image"


@pytest.mark.parametrize("case", ["int4", "fp4"])
def test_blocks_that_come_and_go_compute_the_same(case, cases):
    checkpoint, config = opened(cases[case][0])
    meant = step(build_transformer(checkpoint, config, FLOAT))
    placed = Placed(store_transformer(checkpoint, config, FLOAT), "transformer_blocks", resident=1, table=True)
    assert torch.equal(step(placed.net), meant)
    placed.unload("disk")
    placed.load()
    assert torch.equal(step(placed.net), meant)
    placed.close()


def test_what_is_written_of_it_has_the_same_values(cases, tmp_path):
    checkpoint, config = opened(cases["int4"][0])
    net, read = build_transformer(checkpoint, config, FLOAT), dense_reader(checkpoint)
    for path in ("attn.to_k", "txt_mlp.net.2", "img_mod.1"):
        name = f"transformer_blocks.1.{path}"
        linear = net.get_submodule(name)
        assert isinstance(linear, PackedLinear) and linear.bias is not None
        assert torch.equal(read(f"{name}.weight"), linear.dense(torch.float32)), name
        assert torch.equal(read(f"{name}.bias").float(), linear.bias.float()), name
    quantize_safetensors(checkpoint, tmp_path / "plain.safetensors", None, {})
    again = build_transformer(*opened(tmp_path / "plain.safetensors"), FLOAT)
    assert not any(isinstance(part, PackedLinear) for part in again.modules())
    torch.testing.assert_close(step(again), step(net), atol=0.02, rtol=0.02)


def test_loras_go_on_top(cases):
    net = build_transformer(*opened(cases["int4"][0]), FLOAT)
    before, path = step(net), "transformer_blocks.0.attn.to_v"
    part = Factors(torch.randn(4, 128), torch.randn(128, 4))
    attach(net, {path: [part]})
    changed = step(net)
    detach(net)
    assert torch.equal(step(net), before) and not torch.allclose(changed, before, atol=1e-3)
    attach(net, {path: [part]})
    assert merge(net, torch.float32) == 1 and type(net.get_submodule(path)) is nn.Linear
    torch.testing.assert_close(step(net), changed, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no Linear here"):
        attach(net, {"transformer_blocks.0.attn.to_q.residual": [part]})


def test_a_cpus_int4_kernels_multiply_it(cases, monkeypatch):
    """The coarse weight goes through them, the thin ones are torch's."""
    if not library.ready():
        pytest.skip("the kernels are not built here: no compiler")
    net, seen = build_transformer(*opened(cases["int4"][0]), FLOAT), []
    plain = compute.multiplied
    monkeypatch.setattr(compute, "multiplied", lambda linear, *rest: seen.append(linear) or plain(linear, *rest))
    before = step(net, 32)
    compute.attach_kernels(net)
    found = step(net, 32)
    residuals = {part.residual for part in net.modules() if isinstance(part, LowRankLinear)}
    assert {part for part in seen if isinstance(part, PackedLinear)} <= residuals and len(set(seen)) >= 12
    torch.testing.assert_close(found, before, atol=0.03 * float(before.abs().max()), rtol=0)
    compute.detach_kernels(net)
    assert torch.equal(step(net, 32), before)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_thin_matrices_are_plain_weights_to_a_cpus_kernels(dtype, cases):
    if not library.ready():
        pytest.skip("the kernels are not built here: no compiler")
    linear, x = build_transformer(*opened(cases["int4"][0]), FLOAT).get_submodule(SHIFTED), torch.randn(2, 9, 512)
    assert isinstance(linear, LowRankLinear)
    found, meant = thin_product(linear, x.to(dtype)), linear(x.to(dtype).float())
    assert found.dtype == dtype
    far = 2e-6 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(found.float(), meant, atol=far * float(meant.abs().max()), rtol=0)


def test_a_gpus_products_leave_the_thin_ones_to_torch(cases):
    """In whatever bits activations meet weights: what they make is what the definition says."""
    linear = build_transformer(*opened(cases["int4"][0]), FLOAT).get_submodule(SHIFTED)
    x = torch.randn(1, 32, 512)
    for how in (How(), How(torch.int8), How(torch.int8, rotate=64)):
        made = project(linear, Rows(x), how)
        assert isinstance(made, Tensor) and torch.equal(made, linear(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{ONE}.smooth_factor": None}, "its smooth_factor is missing"),
        ({f"{ONE}.proj_down": torch.zeros(128, 24, dtype=HALF)}, "its proj_down is missing or does not fit"),
        ({f"{ONE}.proj_up": torch.zeros(64, 32, dtype=HALF)}, "its proj_up"),
        ({f"{ONE}.proj_up": torch.zeros(32, 128, dtype=HALF)}, "its proj_up"),
        ({f"{ONE}.wscales": torch.zeros(2, 128)}, "its wscales"),
        ({f"{ONE}.wcscales": torch.zeros(128, dtype=HALF)}, "its wcscales"),
        ({f"{ONE}.bias": torch.zeros(64, dtype=HALF)}, "its bias"),
        ({f"{ONE}.qweight": torch.zeros(64, 64, dtype=torch.int8)}, "its qweight"),
        ({f"{QKV}.qweight": torch.zeros(300, 64, dtype=torch.int8)}, "no thirds"),
        ({f"{QKV}.proj_up": torch.zeros((), dtype=HALF)}, "no thirds"),
        ({"transformer_blocks.1.img_mod.1.wzeros": torch.zeros(2, 700, dtype=HALF)}, "its wzeros"),
        ({"transformer_blocks.1.img_mod.1.wzeros": torch.zeros(768, 2, dtype=HALF)}, "its wzeros"),
        ({"transformer_blocks.1.img_mod.1.bias": torch.zeros(768, 1, dtype=HALF)}, "its bias"),
        ({"transformer_blocks.1.img_mod.1.wzeros": None}, "img_mod.1 is not packed as it is there"),
        ({f"{ONE}.wscales": None}, "qweight"),
    ],
)
def test_what_would_draw_noise_is_refused(change, said, cases, tmp_path):
    tensors = load_file(cases["int4"][0]) | change
    path = tmp_path / "damaged.safetensors"
    save_file({name: each for name, each in tensors.items() if each is not None}, path)
    with pytest.raises(ModelError, match=said):
        build_transformer(*opened(path), FLOAT)


def test_a_low_rank_linear_without_smoothing():
    torch.manual_seed(0)
    coarse = Int4Linear.from_dense(torch.randn(24, 64), None)
    linear = LowRankLinear(coarse, 4, bias=False, smooth=False)
    linear.down, linear.up = torch.randn(4, 64), torch.randn(24, 4)
    x = torch.randn(3, 64)
    torch.testing.assert_close(linear(x), x @ linear.dense(torch.float32).T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(linear.dense(torch.float32), coarse.dense(torch.float32) + linear.up @ linear.down)
    assert {*linear.state_dict()} == {"down", "up", "residual.weight", "residual.weight_scale"}
    with pytest.raises(ValueError, match="is none"):
        LowRankLinear(coarse, 0)
    with pytest.raises(ValueError, match="no bias"):
        LowRankLinear(Int4Linear(64, 8), 4)
