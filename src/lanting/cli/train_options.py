"""The flags of `lanting train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Option("--folder", help="Where checkpoints and the model go.")]
Minutes = Annotated[float, typer.Option("--minutes", help="Minutes for the transformer, over all slices.")]
VaeMinutes = Annotated[float, typer.Option("--vae-minutes", help="Minutes for the autoencoder.")]
DecoderMinutes = Annotated[
    float, typer.Option("--decoder-minutes", help="Minutes for the autoencoder's decoder alone.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda; auto takes a GPU where there is one.")]
Workers = Annotated[int, typer.Option("--workers", help="Processes; 0: one per core, or per GPU.")]
SliceMinutes = Annotated[
    float, typer.Option("--slice-minutes", help="End cleanly after so long in all, to go on later; 0: never.")
]
ResumeFrom = Annotated[
    Path | None, typer.Option("--resume-from", help="What a slice on another machine left: its folder 'portable'.")
]
Anew = Annotated[bool, typer.Option("--anew", help="What --resume-from brings begins a new schedule, of --minutes.")]
VaeAnew = Annotated[bool, typer.Option("--vae-anew", help="Train the autoencoder that --resume-from brings on first.")]
Warm = Annotated[Path | None, typer.Option("--warm", help="A nano model folder whose weights are continued.")]
Width = Annotated[int, typer.Option("--width", help="Width of the transformer, a multiple of 32.")]
Layers = Annotated[int, typer.Option("--layers", help="Layers of the transformer.")]
Large = Annotated[bool, typer.Option("--large", help="Train on canvases of 256 x 256 too; for a GPU.")]
BatchTimes = Annotated[
    int, typer.Option("--batch-times", help="Batches as multiples of a core's; 0: what fits the device.")
]
Lr = Annotated[float, typer.Option("--lr", help="Highest learning rate; 0: what suits the device.")]
Feeders = Annotated[
    int, typer.Option("--feeders", help="Processes that make up designs for a GPU; -1: all cores but two.")
]
Compile = Annotated[
    str, typer.Option("--compile", help="yes, no or auto: on a GPU, where it takes one minute of the first.")
]
Concepts = Annotated[int, typer.Option("--concepts", help="Pictograms in use, the commonest first.")]
SheetMinutes = Annotated[float, typer.Option("--sheet-minutes", help="Minutes between two sheets of samples; 0: none.")]
Read = Annotated[bool, typer.Option("--read", help="Let an optical reader read the samples (lanting[eval]).")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of data and weights.")]
