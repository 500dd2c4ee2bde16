"""The autoencoder's decoder recorded on a GPU, shape by shape: a tile is recorded once and played back for all others.

Its hundred small kernels take Python longer than a GPU needs for a tile or a small picture. A recording holds the
memory of its activations for good, so only shapes are recorded for which that is a small share of the GPU's; what is
larger keeps the GPU busy anyway. How recording works: `attach.tapes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lanting.attach.graphs import listened
from lanting.attach.tapes import Recorder, Tapes
from lanting.core.lang import say
from lanting.nn.vae import AutoencoderKLQwenImage, Decoder

MOST = 4  # recordings kept: a tile inside, at either edge, and in the corner
NUMBERS = 8  # held for a pixel and a channel of the last level: 1.6 GB in 16 bits at 1024 x 1024 and 96, measured


class Decoding:
    """In place of the `forward` of a Decoder."""

    def __init__(self, decoder: Decoder, recorder: Recorder | None = None):
        self.decoder = decoder
        sentence = lambda reason: say("decoding is not recorded: {reason}", reason=reason)  # noqa: E731
        self.tapes = Tapes(recorder or Recorder(), MOST, sentence)
        self.basis: list[Tensor] = []

    def __call__(self, z: Tensor) -> Tensor:
        """(B, z, h, w) -> (B, C, 8 h, 8 w)"""
        if not self.willing(z):
            return type(self.decoder).forward(self.decoder, z)
        basis: list[Tensor] = list(self.decoder.parameters())
        if len(basis) != len(self.basis) or any(a is not b for a, b in zip(basis, self.basis, strict=True)):
            self.tapes.forget()
            self.basis = basis
        last = z.is_contiguous(memory_format=torch.channels_last)  # the layout decides how convolutions round
        return self.tapes(last, [z], self.work)[0]

    def willing(self, z: Tensor) -> bool:
        """Whether this shape may be recorded."""
        recorder = self.tapes.recorder
        busy = self.tapes.failed or torch.is_grad_enabled() or listened(self.decoder)
        return not busy and recorder.ready(z.device) and recorder.holds(self.held(z), z.device)

    def held(self, z: Tensor) -> int:
        """Bytes that a recording keeps."""
        width: int = self.decoder.conv_out.in_channels
        return z.shape[0] * z.shape[2] * z.shape[3] * 64 * width * NUMBERS * z.element_size()

    def work(self, inputs: Sequence[Tensor]) -> tuple[Tensor]:
        return (type(self.decoder).forward(self.decoder, *inputs),)


def attach_vae_graphs(vae: AutoencoderKLQwenImage, recorder: Recorder | None = None) -> Decoding:
    """Record the decoder from now on. Undone by `detach_vae_graphs`."""
    decoding = Decoding(vae.decoder, recorder)
    vae.decoder.__dict__["forward"] = decoding
    return decoding


def detach_vae_graphs(vae: AutoencoderKLQwenImage) -> None:
    """Run as it comes again."""
    decoding = vae.decoder.__dict__.pop("forward", None)
    if isinstance(decoding, Decoding):
        decoding.tapes.forget()
