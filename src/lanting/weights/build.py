"""Modules from checkpoints: built on the meta device, filled by assignment, strictly.

On meta nothing is allocated and no random numbers are drawn for weights that are replaced a moment later; with
`assign=True` the mapped tensor becomes the parameter. Every missing, surplus or misshapen tensor is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lanting.core.errors import ModelError
from lanting.nn.controlnet import ControlNetConfig, QwenImageControlNet
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.qwen_vl import QwenVL, QwenVLConfig, official_name
from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig, to_image_weights
from lanting.weights.checkpoint import Checkpoint

M = TypeVar("M", bound=nn.Module)


def fill(module: M, state: Mapping[str, Tensor], label: str) -> M:
    """Assign `state` to a module built on meta: the same names and shapes, no more and no less."""
    wanted = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    missing = sorted(set(wanted) - set(state))
    surplus = sorted(set(state) - set(wanted))
    if missing:
        raise ModelError(f"The {label} lacks {len(missing)} tensors, the first is {missing[0]}; download it again.")
    if surplus:
        raise ModelError(
            f"The {label} has {len(surplus)} tensors its config.json has no place for, the first is {surplus[0]}; "
            "config and weights belong to different models."
        )
    for name in wanted.keys() & state.keys():
        if tuple(state[name].shape) != wanted[name]:
            raise ModelError(
                f"The {label} has {name} of shape {tuple(state[name].shape)} where its config.json asks for "
                f"{wanted[name]}; config and weights belong to different models."
            )
    module.load_state_dict(dict(state), strict=True, assign=True)
    return module.eval().requires_grad_(False)


class NoInit(TorchFunctionMode):
    """Leaves new parameters as they are allocated.

    Their initial values are replaced anyway, and drawing normal numbers on meta makes torch import its compiler,
    which took longer than all the rest of loading a small model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def construct(make: Callable[[], M], label: str) -> M:
    """Build on meta; a config that describes no network is a sentence."""
    try:
        with torch.device("meta"), NoInit():
            return make()
    except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(f"The config.json of the {label} describes no network we know ({error}).") from None


def load(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, leave: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Cast and move tensor by tensor, so nothing is held twice; names that start with one of `leave` stay on disk."""
    state = {}
    for name, tensor in checkpoint.tensors(leave):
        if not tensor.is_floating_point():
            raise ModelError(f"The {checkpoint.label} holds {name} as {tensor.dtype}, which is no weight type we know.")
        state[name] = tensor.to(device=device, dtype=dtype)
    return state


def build_transformer(
    checkpoint: Checkpoint, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> QwenImageTransformer:
    """The MMDiT of a `transformer/` folder."""
    label = checkpoint.label
    module = construct(lambda: QwenImageTransformer(TransformerConfig.from_dict(config)), label)
    return fill(module, load(checkpoint, dtype, device), label)


def build_controlnet(
    checkpoint: Checkpoint, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> QwenImageControlNet:
    """A ControlNet folder (Union: 5 blocks, Inpainting: 6 blocks and a mask channel)."""
    label = checkpoint.label
    module = construct(lambda: QwenImageControlNet(ControlNetConfig.from_dict(config)), label)
    return fill(module, load(checkpoint, dtype, device), label)


def build_vae(
    checkpoint: Checkpoint, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> AutoencoderKLQwenImage:
    """The autoencoder of a `vae/` folder, reduced to what single pictures need; channels-last."""
    label = checkpoint.label
    module = construct(lambda: AutoencoderKLQwenImage(VAEConfig.from_dict(config)), label)
    state = to_image_weights(dict(checkpoint.tensors()))
    moved = {}
    for name, tensor in state.items():
        tensor = tensor.to(device=device, dtype=dtype)
        moved[name] = tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
    return fill(module, moved, label)


def build_text_encoder(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    *,
    vision: bool = True,
    head: bool = True,
) -> QwenVL:
    """Qwen2.5-VL of a `text_encoder/` folder, in the hub's or in transformers' newer naming.

    Without `vision` (releases that read words only) and `head` (unless it is to write words itself) those weights
    are not read: of the 7B model 1.35 GB and 1.09 GB in bfloat16.
    """
    label = checkpoint.label
    module = construct(lambda: QwenVL(QwenVLConfig.from_dict(config), vision=vision, head=head), label)
    leave = () if vision else ("visual.", "model.visual.")
    if not head or module.config.tie_word_embeddings:  # some writers store the tied matrix twice
        leave += ("lm_head.",)
    state = load(checkpoint, dtype, device, leave)
    return fill(module, {official_name(name): tensor for name, tensor in state.items()}, label)
