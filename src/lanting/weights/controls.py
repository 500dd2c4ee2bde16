"""ControlNets as people have them: a folder or a single file, of InstantX's kind, blockwise or VideoX-Fun's.

InstantX publishes folders in diffusers' layout; ComfyUI's users have the same tensors as one file without a config,
safetensors or GGUF, bare or behind a prefix. DiffSynth publishes one `model.safetensors`, which ComfyUI keeps as a
model patch under the same names, and so it does with VideoX-Fun's. No flag says which it is: the names do, and
the shapes tell depth, width and whether a mask is read. No torch: `lanting replay` and `show` ask here, too. Whether a
net fits a model is told before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lanting.core.errors import ModelError
from lanting.core.lang import Phrase
from lanting.specs.detect import SINGLE_STREAM
from lanting.weights.checkpoint import Checkpoint, layer_notes, open_component, read_json
from lanting.weights.configs import BLOCKWISE, CHAIN, FUN, config_of
from lanting.weights.fused import parted
from lanting.weights.gguf_view import open_gguf
from lanting.weights.headers import read_file
from lanting.weights.home import path_of
from lanting.weights.single import SIGNS, sniff, split_names

USUAL = {  # of the releases, where a config leaves them out
    "num_layers": 60,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 3584,
    "in_channels": 64,
    "control_blocks": 5,
    "control_in_dim": 132,
}
USUAL_21 = {  # the same of Qwen-Image-2.1, and of its net
    "num_layers": 32,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "in_channels": 64,
    "mlp_ratio": 3,
    "control_blocks": 16,
    "control_in_dim": 129,
}
ALIKE_21 = ("attention_head_dim", "mlp_ratio")  # its net's blocks are copies of the transformer's
BESIDE = ("attention_head_dim", "joint_attention_dim")  # what a net that computes beside the transformer shares with it
MASK = 4  # packed channels of a mask
BARE = {*SIGNS["controlnet"]} - {"controlnet_x_embedder.weight"}  # of nets whose folders say other things, if any


@dataclass(frozen=True)
class ControlFile:
    """A ControlNet whose headers were read.

    config  its config.json, or what its tensors say in its place
    masked  it repaints: it reads a picture with a hole, and where that is; known once it was compared with a model
    """

    path: Path
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    masked: bool = False

    @property
    def blockwise(self) -> bool:
        """It hangs on every block of the transformer, and not beside it."""
        return self.config.get("_class_name") == BLOCKWISE

    @property
    def chain(self) -> bool:
        """It is VideoX-Fun's: one net that follows, repaints, or does both, inside of the transformer."""
        return self.config.get("_class_name") in (CHAIN, FUN)


def open_controlnet(place: str | Path) -> ControlFile:
    """A folder or a file. Raises ModelError where it is neither, or holds something else."""
    path = path_of(str(place))
    if not path.exists():
        raise ModelError("there is no ControlNet at {path}: give a file, or a folder with safetensors", path=str(place))
    whole = open_component(path) if path.is_dir() else _file(path)
    names = split_names(whole.infos).get("controlnet")
    told = read_json(path / "config.json") if (path / "config.json").is_file() else None
    if names is None and told is None:
        raise ModelError("{path} holds no ControlNet: 'lanting show' tells what it is", path=str(place))
    if strays := sorted(set(whole.infos) - set(names.values())) if names is not None else []:
        raise ModelError(
            "{path} has {count} tensors that are no part of a ControlNet, the first is {name}: get another file",
            **{"path": str(place), "count": len(strays), "name": strays[0]},
        )
    mine = whole if names is None else parted(whole.renamed(names))
    if told is None or not mine.infos.keys().isdisjoint(BARE):
        layers = (told or {}).get("control_layers")
        told = config_of("controlnet", mine) | ({"control_layers": layers} if layers else {})
    return ControlFile(path, mine, told)


def _file(path: Path) -> Checkpoint:
    label = Phrase("{component} in {file}", component="ControlNet", file=path.name)
    if sniff(path) == "gguf":
        return replace(open_gguf(path), label=label)
    infos, metadata = read_file(path)
    return Checkpoint(label, dict.fromkeys(infos, path), infos, metadata, layer_notes(path, metadata))


def check_controlnet(found: ControlFile, transformer: Mapping[str, Any]) -> ControlFile:
    """The same, where it belongs to the model of this transformer (its config.json); what only the model knows is
    filled in. Raises ModelError in a sentence."""
    name, config = found.path.name, found.config
    single = transformer.get("_class_name") == SINGLE_STREAM
    if single != (config.get("_class_name") == CHAIN):
        family = "Qwen-Image" if single else "Qwen-Image-2.1"
        raise ModelError(
            "the ControlNet {name} is for {family}, and this model is another: leave it out", name=name, family=family
        )
    usual = USUAL_21 if single else USUAL
    facts = [("width", _width(config, usual), _width(transformer, usual))]
    keys = ALIKE_21 if single else BESIDE[:1] if found.chain else ("num_layers",) if found.blockwise else BESIDE
    facts += [(key, _number(config, key, usual), _number(transformer, key, usual)) for key in keys]
    for key, own, theirs in facts:
        if own != theirs:
            raise ModelError(
                "the ControlNet {name} has {key} = {own} and the model {theirs}: they are of different models",
                **{"name": name, "key": key, "own": own, "theirs": theirs},
            )
    if found.chain:
        return _beside_blocks(found, transformer, usual, 1 if single else MASK)
    reads, channels = _number(config, "in_channels"), _number(transformer, "in_channels")
    reads += 0 if found.blockwise else config.get("extra_condition_channels") or 0
    if reads not in (channels, channels + MASK):
        raise ModelError(
            "the ControlNet {name} reads {reads} channels where the model has {channels}: get another",
            **{"name": name, "reads": reads, "channels": channels},
        )
    places = {"axes_dims_rope": transformer["axes_dims_rope"]} if "axes_dims_rope" in transformer else {}
    config = config if found.blockwise else {**places, **config}  # no tensor tells them, and they are the transformer's
    return replace(found, config=config, masked=reads > channels)


def _beside_blocks(
    found: ControlFile, transformer: Mapping[str, Any], usual: Mapping[str, int], mask: int
) -> ControlFile:
    """A chain, with what its transformer alone tells: behind which blocks it is added, and how they norm. `mask`: the
    channels of one."""
    name, config = found.path.name, found.config
    reads, channels = _number(config, "control_in_dim", usual), _number(transformer, "in_channels", usual)
    if reads != 2 * channels + mask:
        raise ModelError(
            "the ControlNet {name} reads {reads} channels where the model has {channels}: get another",
            **{"name": name, "reads": reads, "channels": channels},
        )
    count, depth = _number(config, "control_blocks", usual), _number(transformer, "num_layers", usual)
    layers = config.get("control_layers") or _evenly(count, depth)
    if not isinstance(layers, list) or len(layers) != count:
        raise ModelError(
            "the ControlNet {name} has {count} blocks for the {depth} of the model, and nothing says which are whose: "
            "put it into a folder with a config.json that lists them as control_layers",
            **{"name": name, "count": count, "depth": depth},
        )
    shared = {key: value for key, value in transformer.items() if key != "_class_name"}
    return replace(found, config={**shared, **config, "num_layers": depth, "control_layers": layers})


def _evenly(count: int, depth: int) -> list[int] | None:
    """Behind which of `depth` blocks a net of `count` is added: every second, as 2.1's, or equally far."""
    if count == (depth + 1) // 2:
        return list(range(0, depth, 2))
    return list(range(0, depth, depth // count)) if depth % count == 0 else None


def _number(config: Mapping[str, Any], key: str, usual: Mapping[str, int] = USUAL) -> int:
    return int(config.get(key) or usual[key])


def _width(config: Mapping[str, Any], usual: Mapping[str, int] = USUAL) -> int:
    heads = _number(config, "num_attention_heads", usual) * _number(config, "attention_head_dim", usual)
    return int(config.get("width") or heads)
