"""A model's component as one file in another kind: what `lanting quantize` does.

Here, because the table of kinds is `attach`'s and the writers are `weights`', and only the engine knows both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lanting.attach.quant import GROUP, KINDS, chooser
from lanting.core.errors import ModelError, RequestError
from lanting.engine.allocator import return_memory
from lanting.weights.checkpoint import Checkpoint
from lanting.weights.find import locate
from lanting.weights.forms import shapes
from lanting.weights.gguf_encoder import write_text_encoder
from lanting.weights.gguf_mix import MIXES
from lanting.weights.gguf_write import write_transformer
from lanting.weights.home import path_of
from lanting.weights.linear_names import transformer_linears
from lanting.weights.lora_file import find_lora, open_lora, split_strength
from lanting.weights.merge import merge_loras
from lanting.weights.quantize import Report, dense_reader, quantize_safetensors
from lanting.weights.single import open_file, open_weights

COMPONENTS = ("transformer", "text_encoder")


@dataclass(frozen=True, slots=True)
class Target:
    """What to write: `kind` is "bf16", one of ours, or a GGUF mix."""

    kind: str
    component: str = "transformer"
    group: int = GROUP
    rotate: bool = False
    loras: tuple[str, ...] = ()  # FILE[:STRENGTH], which become part of the weights


def quantize_model(model: str, out: Path, target: Target, report: Report | None = None) -> dict[str, Any]:
    """Write one component of a model to `out`. Returns what was done, for programs.

    Raises RequestError for a kind or component there is none of, ModelError and OutputError as the writers do.
    """
    if target.component not in COMPONENTS:
        raise RequestError(
            "the component {name} is none that is quantized; use one of {known}",
            name=target.component,
            known=", ".join(COMPONENTS),
        )
    gguf = target.kind in MIXES and (target.kind not in ("bf16", "f16") or out.suffix == ".gguf")
    if not gguf and target.kind not in ("bf16", *KINDS):
        raise RequestError(
            "the kind of weights {name} is none we know; use one of {known}",
            name=target.kind,
            known=", ".join(dict.fromkeys(("bf16", *KINDS, *MIXES))),
        )
    _refuse_idle(target)
    wanted = ".gguf" if gguf else ".safetensors"
    if out.suffix != wanted:
        raise RequestError("{kind} is written to a {ending} file", kind=target.kind, ending=wanted)
    return_memory()
    checkpoint, config, release = _open(model, target.component)
    if any(path.resolve() == out.resolve() for path in set(checkpoint.where.values())):
        raise RequestError("{path} is the file that is read: choose another name", path=str(out))
    before, (checkpoint, merged) = checkpoint.bytes(), _with_loras(checkpoint, model, config, target)
    about = merged | {"component": target.component, "release": release, "to": target.kind, "config": dict(config)}
    if gguf and target.component == "text_encoder":
        about["tokenizer"] = None if path_of(model).is_file() else locate(model).tokenizer
        write_text_encoder(out, shapes(checkpoint), dense_reader(checkpoint), target.kind, about, report)
    elif gguf:
        write_transformer(out, shapes(checkpoint), dense_reader(checkpoint), target.kind, about, report)
    else:
        kind = "none" if target.kind == "bf16" else target.kind
        choose = chooser(target.component, kind, target.group, target.rotate)
        quantize_safetensors(checkpoint, out, choose, about, report)
    done = merged | {"to": target.kind, "component": target.component, "release": release}
    return done | {"bytes": out.stat().st_size, "bytes_before": before}


def _refuse_idle(target: Target) -> None:
    """Raises RequestError for a choice that this kind hasn't got: it would do nothing, and nobody would know."""
    if target.rotate and target.kind not in ("int8", "int4"):
        raise RequestError("{kind} is never rotated: leave --rotate out, or use int8 or int4", kind=target.kind)
    if target.group != GROUP and target.kind != "int4":
        raise RequestError("{kind} has no groups to choose: leave --group out, or use int4", kind=target.kind)


def _with_loras(
    checkpoint: Checkpoint, model: str, config: Mapping[str, Any], target: Target
) -> tuple[Checkpoint, dict[str, Any]]:
    """The weights with the LoRAs in them, and what is noted of them."""
    if not target.loras:
        return checkpoint, {}
    if target.component != "transformer":
        raise RequestError("a LoRA changes the transformer: say --component transformer, or leave --lora away")
    path = path_of(model)
    folder = path.parent if path.is_file() else locate(model).path
    linears, split = transformer_linears(config), [split_strength(text) for text in target.loras]
    loras = [open_lora(find_lora(folder, name), linears, name, strength) for name, strength in split]
    return merge_loras(checkpoint, loras), {"loras": [lora.describe() for lora in loras]}


def _open(model: str, component: str) -> tuple[Checkpoint, Any, str | None]:
    """(tensors, config, release) of a component; a file or its folder need not be part of a whole model."""
    from lanting.weights.configs import config_of
    from lanting.weights.find import config_beside, is_transformer, release_of

    path = path_of(model)
    if component == "transformer" and path.is_dir() and is_transformer(path):
        alone = open_weights(path, component)
        config = config_beside(path) or config_of(component, alone)
        return alone, config, release_of(path.resolve(), alone, config)[0].name
    if not path.is_file():
        folder = locate(model)
        return folder.checkpoint(component), folder.configs[component], folder.spec.name
    found = open_file(path)
    if component not in found:
        what = ", ".join(found) or "nothing we know"
        raise ModelError(
            "{path} should hold a {component}, but its tensors are of: {what}",
            **{"path": path, "component": component.replace("_", " "), "what": what},
        )
    release = release_of(path, found["transformer"])[0].name if "transformer" in found else None
    return found[component], config_of(component, found[component]), release
