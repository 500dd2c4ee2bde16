"""A packed run that was brought from another machine, looked at as a whole before any of it is written.

Copies are broken off, and folders of other runs lie beside. What is torn, missing or another's would be met after it
had become this run's checkpoint, or hours later; so every file is read and every shape compared first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lanting.core.errors import ModelError
from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig
from lanting.train.course import Clock
from lanting.train.kept import BAD
from lanting.train.loop import NEW
from lanting.train.model import NanoConfig, NanoNet, matrices
from lanting.train.vae import CHECKPOINT, DECODER, UNTUNED, nano_config

RUN, VAE, HEADS = "run.json", "vae.safetensors", "heads.safetensors"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises ModelError where what is read from `path` inside fails."""
    try:
        yield
    except BAD as error:
        raise ModelError("{path} is damaged or no part of a packed run: bring it again", path=path) from error


def lacking(source: Path, name: str) -> ModelError:
    """The sentence for a folder without one of its files."""
    return ModelError(
        "{folder} holds no packed run ({file} is missing): give the folder that a slice wrote",
        **{"folder": source, "file": name},
    )


def read_about(source: Path) -> dict[str, Any]:
    """Clock and shape of a packed run. Raises ModelError."""
    if not (source / RUN).is_file():
        raise lacking(source, RUN)
    with readable(source / RUN):
        about: Any = json.loads((source / RUN).read_text(encoding="utf-8"))
        clock, config = Clock(**about["clock"]), NanoConfig.from_dict(about["config"])
        _ = clock.step + clock.seen + clock.seconds, config.transformer.num_attention_heads
        return {"clock": about["clock"], "config": about["config"]}


def check_state(source: Path, state: Mapping[str, Any], wanted: NanoConfig | None) -> None:
    """Raises ModelError unless a checkpoint made of what was brought is whole, and of the `wanted` shape."""
    with readable(source):
        net = NanoNet(NanoConfig.from_dict(state["config"]))
        for weights in (state["net"], state["average"]):
            compare(net, weights)
        for parameters, kept in zip(matrices(net), state["optimizers"], strict=False):
            for index, values in kept["state"].items():
                shapes = {tuple(value.shape) for name, value in values.items() if name != "step"}
                if shapes != {tuple(parameters[index].shape)}:
                    raise ValueError(index)
    if wanted is not None and shapes_of(NanoNet(wanted)) != shapes_of(net):
        raise ModelError(
            "{path} holds a network of another shape: give its --width and --layers, or another folder", path=source
        )


def shapes_of(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def compare(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless these are a network's tensors, heads that only help left aside."""
    found, own = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes_of(net)
    if {name: shape for name, shape in own.items() if name.split(".")[0] in NEW} | found != own:
        raise ValueError(sorted(found.items() ^ own.items())[0])


def read_vae(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The packed autoencoder: tensors, and the words "config" and "frozen". Raises ModelError."""
    with readable(path):
        tensors = load_file(str(path))
        with safe_open(str(path), "pt") as file:
            words = dict(file.metadata())
        compare(AutoencoderKLQwenImage(VAEConfig.from_dict(json.loads(words["config"]))), tensors)
        return tensors, {name: words[name] for name in ("config", "frozen")}


def check_stage(source: Path) -> None:
    """Raises ModelError unless the autoencoder that was brought, finished or not, can be gone on with."""
    if not any((source / name).is_file() for name in (VAE, CHECKPOINT, HEADS)):
        raise lacking(source, VAE)
    if (source / VAE).is_file():
        read_vae(source / VAE)
    for name in (CHECKPOINT, UNTUNED, DECODER):
        path = source / name
        if not path.is_file():
            continue
        with readable(path):
            packed = path.suffix == ".safetensors"
            held: Any = load_file(str(path)) if packed else torch.load(path, weights_only=True, map_location="cpu")
            compare(AutoencoderKLQwenImage(nano_config()), held if packed else held["vae"])
            if not packed:
                step, seconds = held["clock"]
                _ = step + seconds, held["optimizers"]
