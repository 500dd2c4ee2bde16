"""LoRA files of every dialect and form with random contents, and what each adds to a small transformer's weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.weights.linear_names import transformer_linears

CONFIG = TransformerConfig(2, 2, 16, 24, axes_dims_rope=(4, 6, 6))
NUMBERS = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 24}
RANK, ALPHA = 4, 2.0
DIALECTS = {  # what doctors call it: prefix, down, up, alpha, whether dots become underscores
    "Lightning": ("", "lora_down.weight", "lora_up.weight", True, False),
    "PEFT": ("base_model.model.", "lora_A.weight", "lora_B.weight", False, False),
    "PEFT of a pipeline": (
        "base_model.model.transformer.",
        "lora_A.default.weight",
        "lora_B.default.weight",
        False,
        False,
    ),
    "PEFT without a prefix": ("", "lora_A.weight", "lora_B.weight", False, False),
    "diffusers": ("transformer.", "lora_A.weight", "lora_B.weight", False, False),
    "diffusers of old": ("transformer.", "lora.down.weight", "lora.up.weight", False, False),
    "diffusers with alpha": ("transformer.", "lora_A.weight", "lora_B.weight", True, False),
    "DiffSynth": ("", "lora_A.default.weight", "lora_B.default.weight", False, False),
    "DiffSynth of a pipeline": ("pipe.dit.", "lora_A.default.weight", "lora_B.default.weight", False, False),
    "ai-toolkit": ("diffusion_model.", "lora_A.weight", "lora_B.weight", False, False),
    "ComfyUI": ("diffusion_model.", "lora_down.weight", "lora_up.weight", True, False),
    "ComfyUI of a checkpoint": ("model.diffusion_model.", "lora_down.weight", "lora_up.weight", True, False),
    "OneTrainer": ("transformer.", "lora_down.weight", "lora_up.weight", True, False),
    "Kohya (musubi-tuner)": ("lora_unet_", "lora_down.weight", "lora_up.weight", True, True),
    "LyCORIS": ("lycoris_", "lora_down.weight", "lora_up.weight", True, True),
}


@dataclass
class Made:
    """Tensors by the layer and role, and what they amount to."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)  # path -> dW (out, in)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path, dialect: str = "Lightning", notes: Mapping[str, str] | None = None) -> Path:
        """As the tools of that dialect write it."""
        prefix, down, up, _, flat = DIALECTS[dialect]
        names = {"down": down, "up": up}
        table = {
            f"{prefix}{layer.replace('.', '_') if flat else layer}.{names.get(role, role)}": tensor.contiguous()
            for layer, roles in self.tensors.items()
            for role, tensor in roles.items()
        }
        save_file(table, str(path), metadata=None if notes is None else dict(notes))
        return path


def over_attention(path: Path, folder: Path, seed: int, notes: Mapping[str, str] | None = None) -> Path:
    """A file of LoRAs over the attention of the transformer in a model folder, in PEFT's dialect."""
    generator = torch.Generator().manual_seed(seed)
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    tensors = {}
    for name, (out, inner) in transformer_linears(config).items():
        if ".attn." in name:
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, inner, generator=generator) * 0.3
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * 0.3
    save_file(tensors, str(path), metadata=None if notes is None else dict(notes))
    return path


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> QwenImageTransformer:
    torch.manual_seed(seed)
    made = QwenImageTransformer(CONFIG).eval().requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(0, 0.15)
    return made.to(dtype)


def linears(net: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: tuple(m.weight.shape) for name, m in net.named_modules() if isinstance(m, nn.Linear)}


def draw(net: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """One step of a batch of two."""
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 24, 64, generator=generator), torch.randn(2, 5, 24, generator=generator)
    with torch.no_grad():
        return net(x.to(dtype), torch.tensor([0.7, 0.3]).to(dtype), text.to(dtype), None, [(1, 4, 6)], 24)


def merged(net: QwenImageTransformer, *each: tuple[Made, float]) -> QwenImageTransformer:
    """A copy with everything added to its weights."""
    copy = network()
    copy.load_state_dict(net.state_dict())
    for made, strength in each:
        for path, change in made.weights.items():
            copy.get_submodule(path).weight += strength * change
        for path, change in made.biases.items():
            copy.get_submodule(path).bias += strength * change
    return copy


def make(net: nn.Module, form: str = "lora", alpha: bool = True, seed: int = 0) -> Made:
    """Over every Linear of the network; see FORMS."""
    generator = torch.Generator().manual_seed(seed)
    made = Made()

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    for path in linears(net):
        module = net.get_submodule(path)
        made.tensors[path] = FORMS[form](made, path, module, random)
        if alpha:
            made.tensors[path]["alpha"] = torch.tensor(ALPHA)
    return made


Random = Callable[..., Tensor]


def lora(made: Made, path: str, module: nn.Linear, random: Random) -> dict[str, Tensor]:
    down, up = random(RANK, module.in_features), random(module.out_features, RANK)
    made.weights[path] = ALPHA / RANK * up @ down
    return {"down": down, "up": up}


def lora_without_alpha(made: Made, path: str, module: nn.Linear, random: Random) -> dict[str, Tensor]:
    tensors = lora(made, path, module, random)
    made.weights[path] *= RANK / ALPHA
    return tensors


def lora_with_bias(made: Made, path: str, module: nn.Linear, random: Random) -> dict[str, Tensor]:
    """ComfyUI's diff_b."""
    made.biases[path] = random(module.out_features)
    return lora(made, path, module, random) | {"diff_b": made.biases[path]}


def lora_with_its_own_bias(made: Made, path: str, module: nn.Linear, random: Random) -> dict[str, Tensor]:
    """PEFT's lora_bias=True."""
    bias = random(module.out_features)
    made.biases[path] = ALPHA / RANK * bias
    return lora(made, path, module, random) | {"lora_B.bias": bias}


def diff(made: Made, path: str, module: nn.Linear, random: Random) -> dict[str, Tensor]:
    made.weights[path], made.biases[path] = random(module.out_features, module.in_features), random(module.out_features)
    return {"diff": made.weights[path], "diff_b": made.biases[path]}


def lokr(w1_whole: bool, w2_whole: bool) -> Callable[[Made, str, nn.Linear, Random], dict[str, Tensor]]:
    """w1 of (2, 4), whole or not; the scale is alpha / rank where anything is not whole."""

    def form(made: Made, path: str, module: nn.Linear, random: Random) -> dict[str, Tensor]:
        a, b = 2, 4
        c, d = module.out_features // a, module.in_features // b
        tensors: dict[str, Tensor] = {}
        factors = []
        for name, whole, high, wide in (("lokr_w1", w1_whole, a, b), ("lokr_w2", w2_whole, c, d)):
            if whole:
                tensors[name] = random(high, wide)
                factors.append(tensors[name])
            else:
                tensors[f"{name}_a"], tensors[f"{name}_b"] = random(high, RANK), random(RANK, wide)
                factors.append(tensors[f"{name}_a"] @ tensors[f"{name}_b"])
        scale = 1.0 if w1_whole and w2_whole else ALPHA / RANK
        made.weights[path] = scale * torch.kron(*factors)
        return tensors

    return form


def loha(rank: int) -> Callable[[Made, str, nn.Linear, Random], dict[str, Tensor]]:
    def form(made: Made, path: str, module: nn.Linear, random: Random) -> dict[str, Tensor]:
        a, b, c, d = (random(*shape) for shape in ((module.out_features, rank), (rank, module.in_features)) * 2)
        made.weights[path] = ALPHA / rank * (a @ b) * (c @ d)
        return dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), (a, b, c, d), strict=True))

    return form


def dora(
    inner: str, rows: bool, name: str = "dora_scale"
) -> Callable[[Made, str, nn.Linear, Random], dict[str, Tensor]]:
    """Any form with new lengths of rows (out, 1) or (out,), or of columns (1, in)."""

    def form(made: Made, path: str, module: nn.Linear, random: Random) -> dict[str, Tensor]:
        tensors = FORMS[inner](made, path, module, random)
        changed = module.weight + made.weights[path]
        length = changed.norm(dim=1 if rows else 0, keepdim=True)
        magnitude = length * (1 + random(*length.shape))
        made.weights[path] = changed * magnitude / length - module.weight
        flat = name != "dora_scale"
        return tensors | {name: magnitude[:, 0] if flat else magnitude}

    return form


FORMS: dict[str, Callable[[Made, str, nn.Linear, Random], dict[str, Tensor]]] = {
    "lora": lora,
    "lora without alpha": lora_without_alpha,
    "lora and bias": lora_with_bias,
    "lora with its own bias": lora_with_its_own_bias,
    "diff": diff,
    "lokr of wholes": lokr(True, True),
    "lokr": lokr(True, False),
    "lokr, w1 thin": lokr(False, True),
    "lokr, both thin": lokr(False, False),
    "loha": loha(2),
    "loha of high rank": loha(8),
    "dora": dora("lora", rows=True),
    "dora, peft": dora("lora", rows=True, name="lora_magnitude_vector"),
    "dora of columns": dora("lora", rows=False),
    "dora over loha": dora("loha", rows=True),
    "dora over lokr, of columns": dora("lokr", rows=False),
}
