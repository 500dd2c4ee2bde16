"""`lanting train nano`: make the embedded model from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lanting.cli import options as o
from lanting.cli.screen import Screen

train = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train models.")


@train.callback()
def _verbs() -> None:
    """Train models."""


@train.command("nano")
def nano(
    folder: Annotated[Path, typer.Option("--folder", help="Where checkpoints and the model go.")] = Path("runs/nano"),
    minutes: Annotated[float, typer.Option("--minutes", help="Minutes for the transformer.")] = 94.0,
    vae_minutes: Annotated[float, typer.Option("--vae-minutes", help="Minutes for the autoencoder.")] = 17.0,
    decoder_minutes: Annotated[
        float, typer.Option("--decoder-minutes", help="Minutes for the autoencoder's decoder alone.")
    ] = 0.0,
    workers: Annotated[int, typer.Option("--workers", help="Processes; 0: one per core.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of data and weights.")] = 0,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Train nano, the model that ships with lanting. A killed run goes on where it was."""
    from lanting.train.nano import NanoRun, cost, main

    run = NanoRun(
        folder, vae_minutes=vae_minutes, decoder_minutes=decoder_minutes, minutes=minutes, workers=workers, seed=seed
    )
    screen = Screen(quiet)
    screen.note("{cost}", cost=cost(run))
    screen.raw(str(main(run)))
