"""What will be done with a model on a machine: decided before a weight is read, printed, and then obeyed.

A Plan is a value. `lanting.plan.planner` makes it by arithmetic; the engine places the networks by it and reads
nothing else of this room. All sizes are bytes.

`peak_vram` is what the device's tools show at the worst moment: weights, activations and the driver's own share
(0 on a CPU and where device and computer share one memory). `peak_ram` is the process's own memory (anonymous pages
and libraries) plus the mapped pages of the weights in use, which have to stay resident if the disk is not to be
read at every step; pages that are only passing through don't count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to draw on one machine.

    device            "cpu", "cuda", "cuda:1" or "mps"
    dtype             of activations, and of weights that are not packed: "bfloat16", "float16" or "float32"
    transformer       how its Linears are held: "bf16", "fp32", "fp8", "int8", "int4", or a GGUF type ("q4_k");
                      "as stored" where a file mixes kinds
    text_encoder      the same for the text encoder
    blocks            transformer blocks in all
    resident_blocks   how many of them, the first ones, stay on the device
    streamed          where the others come from at every step: "ram" (pinned), "disk" (mapped), or "none"
    modulation_table  modulation is tabulated once per schedule and its weights leave memory
    encoder           "keep": on the device all the time; "unload": it and the transformer take turns there;
                      "cpu": it stays in RAM and runs on the CPU
    parked            where what has no turn waits: "ram", or "disk" (it is let go and read again)
    vae_tile          edge in pixels of the VAE's tiles; 0: pictures go through whole
    peak_vram         bytes; 0 on a CPU and on unified memory
    peak_ram          bytes; on unified memory everything together
    disk              bytes of the files this plan reads
    load_seconds      until the networks are in place; None: not known
    step_seconds      of one denoising step; None: not known for this device
    image_seconds     of one whole picture, loading apart; None: not known for this device
    error             relative error of a Linear's output by its kind, 0 for 16 bit (docs/devices.md says how measured)
    wait              step time over that of a plan that streams nothing and keeps its prefix; None: not known
    prefix_kept       keys and values of words and references, which stay the same at every step of Qwen-Image-2.1,
                      are kept from the first step on; False: there is no room, and every step computes them
    reasons           why this plan, in words
    """

    model: str
    device: str
    dtype: str
    transformer: str
    text_encoder: str
    blocks: int
    resident_blocks: int
    streamed: str
    modulation_table: bool
    encoder: str
    parked: str
    vae_tile: int
    peak_vram: int
    peak_ram: int
    disk: int
    load_seconds: float | None = None
    step_seconds: float | None = None
    image_seconds: float | None = None
    error: float = 0.0
    wait: float | None = 1.0
    prefix_kept: bool = True
    reasons: tuple[str, ...] = ()

    @property
    def trivial(self) -> bool:
        """Everything fits and nothing is given up: not worth a line."""
        plain = self.transformer in ("bf16", "fp32", "fp16", "as stored") and self.streamed == "none"
        whole = not self.vae_tile and not self.modulation_table and self.prefix_kept
        return plain and self.encoder == "keep" and whole

    def to_dict(self) -> Mapping[str, Any]:
        """For JSON."""
        return asdict(self) | {"reasons": list(self.reasons)}

    def sentence(self) -> str:
        """The plan in one line, as `generate` prints it."""
        from lanting.plan.words import sentence

        return sentence(self)
