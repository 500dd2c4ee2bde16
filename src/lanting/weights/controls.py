"""ControlNets as people have them: a folder or a single file, of InstantX's kind or blockwise; told by their tensors.

InstantX publishes folders in diffusers' layout; ComfyUI's users have the same tensors as one file without a config,
safetensors or GGUF, bare or behind a prefix. DiffSynth publishes one `model.safetensors`, which ComfyUI keeps as a
model patch under the same names. No flag says which it is: the names do, and the shapes tell depth, width and whether a
mask is read. No torch: `lanting replay` and `show` ask here, too. Whether a net fits a model is told before any weight
is read.
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
from lanting.weights.configs import BLOCKWISE, config_of
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
}
BESIDE = ("attention_head_dim", "joint_attention_dim")  # what a net that computes beside the transformer shares with it
MASK = 4  # packed channels of a mask


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
    mine = whole if names is None else whole.renamed(names)
    if told is None or SIGNS["controlnet"][0] in mine.infos:  # a blockwise net's folder says other things, if any
        told = config_of("controlnet", mine)
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
    if transformer.get("_class_name") == SINGLE_STREAM:
        raise ModelError("the ControlNet {name} is for Qwen-Image, and this model is another: leave it out", name=name)
    facts = [("width", _width(config), _width(transformer))]
    keys = ("num_layers",) if found.blockwise else BESIDE
    facts += [(key, _number(config, key), _number(transformer, key)) for key in keys]
    for key, own, theirs in facts:
        if own != theirs:
            raise ModelError(
                "the ControlNet {name} has {key} = {own} and the model {theirs}: they are of different models",
                **{"name": name, "key": key, "own": own, "theirs": theirs},
            )
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


def _number(config: Mapping[str, Any], key: str) -> int:
    return int(config.get(key) or USUAL[key])


def _width(config: Mapping[str, Any]) -> int:
    return int(config.get("width") or _number(config, "num_attention_heads") * _number(config, "attention_head_dim"))
