"""Single files as people have them: which components are inside, and what their tensors are called with us.

ComfyUI's files carry diffusers' names, bare or under a prefix; an all-in-one file holds three components under three
prefixes. Two things are named otherwise: the VAE, in the words of Wan's own code, and the text encoder as transformers
5 has it in memory. The tables below are all there is to it; nothing here reads a tensor or needs torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from lanting.core.errors import ModelError
from lanting.core.lang import Phrase
from lanting.weights.checkpoint import Checkpoint, layer_notes, open_component
from lanting.weights.forms import FLAGS
from lanting.weights.fused import parted
from lanting.weights.headers import damaged, read_file, unreadable
from lanting.weights.kinds import WAN_VAE, foreign, pickled
from lanting.weights.schemes.foreign import as_weights
from lanting.weights.schemes.mlx import translated
from lanting.weights.schemes.svdq import named

OWN_NOTES = "lanting"  # in a safetensors file's metadata: a JSON table of ours
PREFIXES = {  # the first that fits is taken off; then the rest is one of COMPONENTS, or a ControlNet
    "model.diffusion_model.": "transformer",
    "diffusion_model.": "transformer",
    "transformer.": "transformer",
    "text_encoders.qwen25_7b.transformer.": "text_encoder",
    "text_encoders.qwen25_7b.": "text_encoder",
    "text_encoder.": "text_encoder",
    "controlnet.": "controlnet",
    "control_model.": "controlnet",
    "first_stage_model.": "vae",
    "vae.": "vae",
}
OURS = {"model.language_model.": "model.", "model.visual.": "visual.", "language_model.": "model."}
SIGNS = {  # names that only this component has, without its prefix
    "transformer": (
        "transformer_blocks.0.img_mod.1.weight",
        "transformer_blocks.0.img_mod.1.qweight",
        "txt_in.text_norm.weight",
    ),
    "text_encoder": ("model.layers.0.self_attn.q_proj.weight",),
    "vae": ("decoder.conv_in.weight",),
    # blockwise, InstantX's, VideoX-Fun's, that for 2.1: a file of any may stand under the prefix of a transformer
    "controlnet": (
        "controlnet_blocks.0.y_rms.weight",
        "controlnet_x_embedder.weight",
        "control_blocks.0.img_mod.1.weight",
        "control_blocks.0.img_mlp.out.weight",
    ),
}
WAN_PARTS = (  # pattern of Wan's name, diffusers' name; {b}, {j} are the place in the decoder
    (r"conv1\.(.*)", r"quant_conv.\1"),
    (r"conv2\.(.*)", r"post_quant_conv.\1"),
    (r"(encoder|decoder)\.conv1\.(.*)", r"\1.conv_in.\2"),
    (r"(encoder|decoder)\.head\.0\.(.*)", r"\1.norm_out.\2"),
    (r"(encoder|decoder)\.head\.2\.(.*)", r"\1.conv_out.\2"),
    (r"(encoder|decoder)\.middle\.0\.(.*)", r"\1.mid_block.resnets.0.\2"),
    (r"(encoder|decoder)\.middle\.1\.(.*)", r"\1.mid_block.attentions.0.\2"),
    (r"(encoder|decoder)\.middle\.2\.(.*)", r"\1.mid_block.resnets.1.\2"),
    (r"encoder\.downsamples\.(.*)", r"encoder.down_blocks.\1"),
)
WAN_RESIDUAL = (
    ("residual.0.", "norm1."),
    ("residual.2.", "conv1."),
    ("residual.3.", "norm2."),
    ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
)
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x1f\x8b", b"7z\xbc\xaf")


def sniff(path: Path) -> str:
    """ "safetensors" or "gguf", by the file's first bytes; a ModelError for pickles, whatever they are called."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise unreadable(path, error) from None
    if start.startswith(PICKLE_STARTS) and start[8:9] != b"{":  # a safetensors header may be 0x..80 bytes long
        raise pickled(path)
    if start.startswith(b"GGUF"):
        return "gguf"
    if len(start) > 8 and start[8:9] != b"{" and not start.startswith(b"version "):  # an LFS pointer is told later
        raise ModelError("{path} is a file, but not of weights: give safetensors or GGUF", path=str(path))
    return "safetensors"


def open_file(path: Path) -> dict[str, Checkpoint]:
    """Component -> its tensors, of a file that holds one or several; empty where none is known by its tensors."""
    if sniff(path) == "gguf":
        return open_gguf(path)
    infos, metadata = read_file(path)
    whole = translated(Checkpoint(path.name, dict.fromkeys(infos, path), infos, metadata, layer_notes(path, metadata)))
    found = components_of(as_weights(whole), path)
    if not found and (packing := foreign(infos)):
        raise ModelError(
            "{path} is packed as {packing}, which this version can't read: get a bf16, fp8, int8, NF4 or GGUF file of "
            "the same model",
            **{"path": str(path), "packing": packing},
        )
    return found


def components_of(whole: Checkpoint, path: Path) -> dict[str, Checkpoint]:
    """All tensors of a file by component, under our names."""
    return {
        component: ordered(whole.renamed(names, Phrase("{component} in {file}", component=component, file=path.name)))
        for component, names in split_names(whole.infos).items()
    }


def ordered(checkpoint: Checkpoint) -> Checkpoint:
    """The tensors of a component as they are called in the network, whoever wrote them."""
    return parted(named(checkpoint))


def open_gguf(path: Path) -> dict[str, Checkpoint]:
    """The same for a GGUF file: a transformer, or a Qwen2.5-VL with the vision file beside it."""
    from lanting.weights.gguf import read_gguf
    from lanting.weights.gguf_view import open_text_encoder_gguf, view

    header = read_gguf(path)
    if any(name.startswith(("blk.", "v.")) for name in header.tensors):
        encoder, config = open_text_encoder_gguf(path)
        notes = {**encoder.metadata, OWN_NOTES: json.dumps({"config": config})} if config else encoder.metadata
        label = Phrase("{component} in {file}", component="text encoder", file=path.name)
        return {"text_encoder": replace(encoder, label=label, metadata=notes)}
    return components_of(replace(view(path, header), metadata={OWN_NOTES: _gguf_notes(path, header.metadata)}), path)


def _gguf_notes(path: Path, metadata: Mapping[str, object]) -> str:
    """What our GGUF writer noted, as our safetensors writer would have put it."""
    notes = {"release": metadata.get("lanting.release"), "config": metadata.get("lanting.config", "{}")}
    try:
        notes["config"] = json.loads(str(notes["config"]))
    except (ValueError, RecursionError):
        raise damaged(path, "its note lanting.config can't be read") from None
    return json.dumps(notes)


def open_weights(place: Path, component: str) -> Checkpoint:
    """A component from its folder or from a file. Raises ModelError where the file holds something else."""
    if place.is_dir():
        checkpoint = open_component(place)
        return ordered(checkpoint.renamed(our_names(component, checkpoint.infos)))
    found = open_file(place)
    if component not in found:
        what = ", ".join(found).replace("_", " ") or "nothing this version knows"
        raise ModelError(
            "{path} should hold a {component}, but its tensors are of {what}: give another",
            **{"path": str(place), "component": component.replace("_", " "), "what": what},
        )
    return found[component]


def split_names(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Component -> {our name: name in the file}."""
    bare: dict[str, dict[str, str]] = {}
    for name in names:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        bare.setdefault(PREFIXES.get(prefix, ""), {})[name.removeprefix(prefix)] = name
    if "" in bare:  # no prefix: what else is in the file tells what it is
        loose = bare.pop("")
        component = _component_of(loose)
        if component:
            bare[component] = loose | bare.get(component, {})
        elif len(bare) == 1 and set(loose) <= set(FLAGS):
            next(iter(bare.values())).update(loose)
    found: dict[str, dict[str, str]] = {}
    for component, table in bare.items():
        renamed = {ours: table[theirs] for ours, theirs in our_names(component, table).items()}
        told = _component_of(renamed)
        if told and told in (component, "controlnet"):
            found[told] = renamed
    return found


def our_names(component: str, names: Iterable[str]) -> dict[str, str]:
    """Our name -> name as it is, of one component's tensors without a prefix."""
    names = list(names)
    if component == "vae" and set(WAN_VAE) <= set(names):
        return wan_names(names)
    if component != "text_encoder":
        return {name: name for name in names}
    return {_official(name): name for name in names}


def wan_names(names: Iterable[str]) -> dict[str, str]:
    """diffusers' name -> Wan's, of the autoencoder."""
    names = list(names)
    resampled = re.compile(r"decoder\.upsamples\.(\d+)\.resample\.")
    stride = min((int(found[1]) for name in names if (found := resampled.match(name))), default=3) + 1
    return {_wan(name, stride): name for name in names}


def _wan(name: str, stride: int) -> str:
    if found := re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.*)", name):
        block, place = divmod(int(found[1]), stride)
        part = "upsamplers.0" if place == stride - 1 else f"resnets.{place}"
        name = f"decoder.up_blocks.{block}.{part}.{found[2]}"
    for pattern, ours in WAN_PARTS:
        name, count = re.subn(f"^{pattern}$", ours, name)
        if count:
            break
    for theirs, ours in WAN_RESIDUAL:
        name = name.replace(f".{theirs}", f".{ours}")
    return name


def _official(name: str) -> str:
    return next((ours + name.removeprefix(theirs) for theirs, ours in OURS.items() if name.startswith(theirs)), name)


def _component_of(names: Mapping[str, str]) -> str:
    """Which component has these bare names; "" where none is known."""
    if set(WAN_VAE) <= set(names):
        return "vae"
    officials = {_official(name) for name in names}
    found = [component for component, signs in SIGNS.items() if not officials.isdisjoint(signs)]
    if any(name.startswith("controlnet_") for name in names):
        return "controlnet" if "controlnet" in found else ""
    return found[0] if found else ""
