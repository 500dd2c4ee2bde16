"""What computes on which device: the one place that decides.

A CPU has native kernels, an NVIDIA GPU Triton's, recorded steps and channels last; Apple's GPU is torch's alone.
`LANTING_KERNELS=off` leaves everything to torch, `LANTING_GRAPHS=off` only records nothing. `LANTING_COMPILE=on` has
torch.compile make the blocks' kernels in place of ours.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from lanting.attach.compiled import VARIABLE, attach_compiled, backend_of
from lanting.attach.compute import attach_kernels
from lanting.attach.gpu import attach_gpu
from lanting.attach.graphs import attach_graphs
from lanting.attach.modulation import ModulationTable
from lanting.attach.vae import attach_vae
from lanting.attach.vae_graphs import attach_vae_graphs
from lanting.kernels.library import OFF, ready
from lanting.nn.mmdit import Block, QwenImageTransformer
from lanting.nn.vae import AutoencoderKLQwenImage


def wanted(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() not in OFF


def has_kernels(device: torch.device) -> bool:
    """Whether something of ours computes there."""
    if device.type == "cpu":
        return ready()
    return device.type == "cuda" and wanted("LANTING_KERNELS")


def speed_up(net: nn.Module, device: torch.device) -> None:
    """Let a network use what there is. Raises RequestError when a variable asks for what we don't know."""
    backend = backend_of(os.environ.get(VARIABLE, ""))
    if backend is not None and any(isinstance(module, Block) for module in net.modules()):
        attach_compiled(net, backend)
    elif device.type == "cpu":
        attach_kernels(net)
    elif has_kernels(device):
        attach_gpu(net)


def record_steps(net: nn.Module, table: ModulationTable | None, device: torch.device) -> None:
    """Record the steps of a transformer whose weights stay where they are. Those of one stream run as they come."""
    if not isinstance(net, QwenImageTransformer):
        return
    if device.type == "cuda" and has_kernels(device) and wanted("LANTING_GRAPHS"):
        attach_graphs(net, table)


def speed_up_vae(vae: AutoencoderKLQwenImage, device: torch.device, plenty: bool = True) -> None:
    """Kernels on a CPU; channels last and recordings on a GPU, where 2.1's is not recorded. 2.1's copies for kernels
    take 2.4 GB, so they are kept where memory is `plenty`."""
    first = type(vae) is AutoencoderKLQwenImage
    if device.type == "cpu":
        attach_vae(vae, keep=first or plenty)
    elif has_kernels(device):
        vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if wanted("LANTING_GRAPHS") and first:
            attach_vae_graphs(vae)
