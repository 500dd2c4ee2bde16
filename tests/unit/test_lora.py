"""LoRA files in every dialect, what is refused, and the wrapper around a Linear."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lanting.core.errors import ModelError, RequestError
from lanting.nn.lora import Factors, LoraLinear, attach, detach
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.specs import get_spec
from lanting.weights.linear_names import transformer_linears
from lanting.weights.lora import attach_loras
from lanting.weights.lora_file import find_again, find_lora, hash_of, open_lora, split_strength
from lanting.weights.lora_wishes import with_wishes

CONFIG = TransformerConfig(2, 2, 16, 24, axes_dims_rope=(4, 6, 6))
CPU = torch.device("cpu")
RANK, ALPHA = 4, 2.0
TARGETS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.1.attn.add_k_proj",
    "transformer_blocks.1.attn.to_add_out",
    "transformer_blocks.1.img_mlp.net.0.proj",
    "transformer_blocks.0.txt_mlp.net.2",
    "transformer_blocks.0.img_mod.1",
    "time_text_embed.timestep_embedder.linear_1",
    "norm_out.linear",
    "proj_out",
    "img_in",
)
DIALECTS = {  # prefix, halves, whether dots become underscores
    "lightning": ("", "lora_down.weight", "lora_up.weight"),
    "peft": ("base_model.model.", "lora_A.weight", "lora_B.weight"),
    "peft of a pipeline": ("base_model.model.transformer.", "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers": ("transformer.", "lora_A.weight", "lora_B.weight"),
    "bare peft": ("", "lora_A.default.weight", "lora_B.default.weight"),
    "ai-toolkit": ("diffusion_model.", "lora_A.weight", "lora_B.weight"),
    "comfy": ("model.diffusion_model.", "lora_down.weight", "lora_up.weight"),
    "old diffusers": ("transformer.", "lora.down.weight", "lora.up.weight"),
    "kohya": ("lora_unet_", "lora_down.weight", "lora_up.weight"),
}


@pytest.fixture(scope="module")
def net() -> QwenImageTransformer:
    torch.manual_seed(0)
    made = QwenImageTransformer(CONFIG).eval().requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(0, 0.15)
    return made


def halves(net: nn.Module, seed: int = 0, targets=TARGETS) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in targets:
        out, inner = net.get_submodule(name).weight.shape
        down, up = (torch.randn(shape, generator=generator) * 0.2 for shape in ((RANK, inner), (out, RANK)))
        made[name] = (down, up)
    return made


def write(path: Path, parts, dialect: str = "lightning", alpha: float | None = ALPHA, notes=None) -> Path:
    """A LoRA file as the tools of that dialect write it."""
    prefix, down, up = DIALECTS[dialect]
    tensors = {}
    for name, (a, b) in parts.items():
        stem = prefix + (name.replace(".", "_") if dialect == "kohya" else name)
        tensors |= {f"{stem}.{down}": a, f"{stem}.{up}": b}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, str(path), metadata=notes)
    return path


def shapes(net: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: tuple(m.weight.shape) for name, m in net.named_modules() if isinstance(m, nn.Linear)}


def draw(net: QwenImageTransformer, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 24, 64, generator=generator), torch.randn(2, 5, 24, generator=generator)
    with torch.no_grad():
        return net(x.to(dtype), torch.tensor([0.7, 0.3]).to(dtype), text.to(dtype), None, [(1, 4, 6)], 24)


def merged(net: QwenImageTransformer, *each) -> QwenImageTransformer:
    """A copy with scale * up @ down added to its weights."""
    copy = QwenImageTransformer(CONFIG).eval().requires_grad_(False)
    copy.load_state_dict(net.state_dict())
    for parts, scale in each:
        for name, (down, up) in parts.items():
            copy.get_submodule(name).weight += scale * up @ down
    return copy


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_equals_merged_weights(net, tmp_path, dialect):
    parts = halves(net)
    alpha = None if "peft" in dialect else ALPHA
    path = write(tmp_path / "a.safetensors", parts, dialect, alpha)
    want = draw(merged(net, (parts, 0.7 * (1.0 if alpha is None else ALPHA / RANK))))
    before = draw(net)
    assert attach_loras(net, [open_lora(path, shapes(net), strength=0.7)], torch.float32, CPU) == len(TARGETS)
    got = draw(net)
    assert detach(net) == len(TARGETS)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (got - before).abs().max() > 0.05 * want.abs().max()
    assert torch.equal(draw(net), before), "taking it off gives the old bits"


def test_several_loras_add_up_and_share_one_wrapper(net, tmp_path):
    first, second = halves(net, 1), halves(net, 2, TARGETS[:3])
    files = [write(tmp_path / "1.safetensors", first), write(tmp_path / "2.safetensors", second, alpha=None)]
    loras = [open_lora(file, shapes(net), strength=s) for file, s in zip(files, (0.6, -1.5), strict=True)]
    want = draw(merged(net, (first, 0.6 * ALPHA / RANK), (second, -1.5)))
    attach_loras(net, loras, torch.float32, CPU)
    got, ranks = draw(net), {len(m.down) for m in net.modules() if isinstance(m, LoraLinear)}
    detach(net)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert ranks == {RANK, 2 * RANK}


def test_strength_zero_changes_no_bit(net, tmp_path):
    before, file = draw(net), write(tmp_path / "a.safetensors", halves(net))
    assert attach_loras(net, [open_lora(file, shapes(net), strength=0.0)], torch.float32, CPU) == 0
    assert torch.equal(draw(net), before)


def test_bfloat16_stays_near_float32(net, tmp_path):
    file = write(tmp_path / "a.safetensors", halves(net))
    lora = open_lora(file, shapes(net), strength=0.3)
    attach_loras(net, [lora], torch.float32, CPU)
    want = draw(net)
    detach(net)
    half = QwenImageTransformer(CONFIG).eval().bfloat16()
    half.load_state_dict(net.state_dict())
    plain = (draw(half, torch.bfloat16).float() - draw(net)).norm() / want.norm()
    attach_loras(half, [lora], torch.bfloat16, CPU)
    got = draw(half, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() / want.norm() <= 2 * plain


def test_a_weak_lora_survives_bfloat16():
    """One that merging into bfloat16 weights would round away to nothing."""
    base = nn.Linear(64, 64, bias=False).bfloat16().requires_grad_(False)
    base.weight.fill_(1.0)
    down, up = torch.full((1, 64), 2e-3).bfloat16(), torch.ones(64, 1).bfloat16()
    assert torch.equal(base.weight + up @ down, base.weight)
    x = torch.ones(1, 64).bfloat16()
    x[:, ::2] = -1.0  # W x = 0, so what the LoRA adds is seen in full
    x[:, 0] = 1.0
    root = nn.ModuleDict({"linear": base})
    attach(root, {"linear": [Factors(down, up, 0.5)]})
    added = root["linear"](x) - base(x)
    assert torch.allclose(added, torch.full_like(added, 2 * 2e-3 * 0.5), atol=0.02) and base(x).unique().tolist() == [2]


def test_peft_alpha_is_read_from_its_notes(net, tmp_path):
    parts = halves(net)
    told = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"transformer_blocks.0.attn.to_q": 2}}
    notes = {"format": "pt", "lora_adapter_metadata": json.dumps(told)}
    file = write(tmp_path / "a.safetensors", parts, "diffusers", None, notes)
    config = {"lora_alpha": 8, "r": RANK, "alpha_pattern": {"0.attn.to_q": 2}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    beside = write(tmp_path / "adapter_model.safetensors", parts, "peft", None)
    scales = {name: (2 if name == TARGETS[0] else 8) / RANK for name in TARGETS}
    want = draw(merged(net, *(({name: parts[name]}, scale) for name, scale in scales.items())))
    for path in (file, beside):
        attach_loras(net, [open_lora(path, shapes(net))], torch.float32, CPU)
        got = draw(net)
        detach(net)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def refused(path: Path, net: nn.Module) -> str:
    with pytest.raises(ModelError) as caught:
        open_lora(path, shapes(net))
    words = str(caught.value)
    assert "\n" not in words and path.name in words
    return words


def test_the_first_tensor_that_fits_nothing_is_named(net, tmp_path):
    parts = halves(net)
    path = tmp_path / "a.safetensors"
    for stray in (
        "transformer_blocks.2.attn.to_q.lora_down.weight",
        "lora_unet_transformer_blocks_0_attn_to_z.lora_down.weight",
        "transformer_blocks.0.attn.norm_q.lora_down.weight",
        "transformer_blocks.0.attn.to_q.weight",
    ):
        tensors = {f"{name}.lora_down.weight": down for name, (down, _) in parts.items()}
        tensors |= {f"{name}.lora_up.weight": up for name, (_, up) in parts.items()}
        save_file({**tensors, stray: torch.zeros(4, 32), "zzz." + stray: torch.zeros(4, 32)}, str(path))
        words = refused(path, net)
        assert f" {stray}," in words and "fits no layer" in words


def test_shapes_and_halves_are_checked(net, tmp_path):
    name, path = TARGETS[0], tmp_path / "a.safetensors"
    down, up = halves(net)[name]
    cases = {
        "needs [4, 32]": {"lora_down": down[:, :-1].contiguous(), "lora_up": up},
        "needs [32, 4]": {"lora_down": down, "lora_up": up[:, :3].contiguous()},
        "lacks the up half": {"lora_down": down},
        "lacks the down half": {"lora_up": up},
        "as I32": {"lora_down": down.int(), "lora_up": up},
    }
    for words, tensors in cases.items():
        save_file({f"{name}.{key}.weight": value for key, value in tensors.items()}, str(path))
        assert words in refused(path, net) and name in refused(path, net)
    plain = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    save_file({**plain, f"{name}.alpha": torch.ones(3)}, str(path))
    assert f"{name}.alpha" in refused(path, net)
    save_file({**plain, f"transformer.{name}.lora_A.weight": down.clone()}, str(path))
    assert "the same thing" in refused(path, net)
    save_file({}, str(path))
    assert "is empty" in refused(path, net)
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert "damaged" in refused(path, net)


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("ink.safetensors", "ink.safetensors", 1.0),
        ("ink.safetensors:0.8", "ink.safetensors", 0.8),
        ("lightning:-2", "lightning", -2.0),
        ("C:\\loras\\ink.safetensors", "C:\\loras\\ink.safetensors", 1.0),
        ("C:\\loras\\ink.safetensors:0", "C:\\loras\\ink.safetensors", 0.0),
        ("ink.safetensors:", "ink.safetensors:", 1.0),
        ("0.5", "0.5", 1.0),
    ],
)
def test_strengths_are_split_off(text, file, strength):
    assert split_strength(text) == (file, strength)


def test_a_file_whose_name_looks_like_a_strength(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ink:2").write_bytes(b"")
    assert split_strength("ink:2") == ("ink:2", 1.0)
    for wrong in ("ink:11", "ink.safetensors:nan", "x:-1e9"):
        with pytest.raises(RequestError, match="strength of a LoRA"):
            split_strength(wrong)


def test_the_models_own_loras_come_first(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    (model / "lora").mkdir(parents=True)
    own = write(model / "lora" / "lightning.safetensors", halves(net))
    (tmp_path / "lightning").write_bytes(b"another")
    other = write(tmp_path / "ink.safetensors", halves(net, 1))
    assert find_lora(model, "lightning") == own
    assert find_lora(model, "ink.safetensors") == Path("ink.safetensors")
    with pytest.raises(ModelError, match="this model brings: lightning"):
        find_lora(model, "lihgtning")
    with pytest.raises(ModelError, match=r"there is no LoRA x\.safetensors: give a safetensors file$"):
        find_lora(tmp_path, "x.safetensors")
    with pytest.raises(ModelError, match="is a folder"):
        find_lora(tmp_path, "model")
    with pytest.raises(ModelError, match="can run code"):
        find_lora(tmp_path, "x.bin")
    record = {"sha256": hash_of(other)}
    assert find_again(model, ["gone", "lightning", "ink.safetensors"], record) == ("ink.safetensors", True)
    assert find_again(model, ["gone", "lightning"], record) == ("lightning", False)
    with pytest.raises(ModelError, match="the LoRA gone is not here any more"):
        find_again(model, ["gone"], record)


def test_a_files_wishes_become_the_releases_defaults(net, tmp_path):
    notes = {"lanting.steps": "4", "lanting.guidance_scale": "1.0", "lanting.shift": "3.0"}
    file = write(tmp_path / "a.safetensors", halves(net), notes=notes)
    spec = get_spec("qwen-image")
    assert with_wishes(spec, [open_lora(file, shapes(net), strength=0.0)]) == spec
    quick = with_wishes(spec, [open_lora(file, shapes(net))])
    assert (quick.defaults.steps, quick.defaults.guidance_scale) == (4, 1.0)
    assert (spec.defaults.size, spec.tasks) == (quick.defaults.size, quick.tasks)
    plain = write(tmp_path / "b.safetensors", halves(net))
    assert with_wishes(spec, [open_lora(plain, shapes(net))]) == spec
    for key, value in (
        ("lanting.steps", "many"),
        ("lanting.steps", "0"),
        ("lanting.steps", "2.5"),
        ("lanting.shift", "nan"),
        ("lanting.guidance_scale", "-1"),
    ):
        write(tmp_path / "a.safetensors", halves(net), notes={**notes, key: value})
        assert key in refused(tmp_path / "a.safetensors", net)


def test_wished_noise_levels_are_those_of_lightning():
    from lanting.flow.schedule import Schedule
    from lanting.weights.lora_wishes import static_shift

    config = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}
    sigmas = Schedule.from_config({**config, **static_shift(3.0)}).sigmas(4, 4096)
    assert torch.allclose(sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]))


def test_linears_are_told_from_a_config():
    numbers = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 24}
    assert transformer_linears(numbers) == shapes(QwenImageTransformer(CONFIG))
    with torch.device("meta"):
        full = shapes(QwenImageTransformer(TransformerConfig(use_additional_t_cond=True)))
    assert transformer_linears({}) == transformer_linears({"num_layers": None, "zero_cond_t": True}) == full
    assert len(full) == 60 * 14 + 6
    flat = [name.replace(".", "_") for name in full]
    assert len(set(flat)) == len(flat), "Kohya's names must be unambiguous"
    for wrong in (0, -1, True, "60", 1.5, 10**9):
        with pytest.raises(ModelError, match=r"config\.json says num_layers"):
            transformer_linears({"num_layers": wrong})


def test_attach_names_what_is_no_linear():
    root = nn.ModuleDict({"linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    part = Factors(torch.ones(1, 4), torch.ones(4, 1))
    with pytest.raises(ValueError, match="norm is no Linear"):
        attach(root, {"linear": [part], "norm": [part]})
    assert attach(root, {"linear": []}) == 0 and isinstance(root["linear"], nn.Linear)
