"""All layers of a finished picture as one file, made from its PNG files when it is asked for.

Nothing is kept: a download is rare, and a file would stand beside the same pixels. Packing takes a processor for
seconds, so it is done for one client after another, and whoever finds many waiting is told to come back.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Response
from starlette.requests import Request as HttpRequest

from lanting.core.layered import KINDS, pack, require
from lanting.core.recipe import read_recipe
from lanting.core.stack import layer_names
from lanting.serve.common import caller_of, result_path
from lanting.serve.errors import BusyError, MissingError
from lanting.serve.house import House
from lanting.serve.jobs import Job
from lanting.serve.studio.words import speaker

MOST = 8  # clients that wait for a file or get one
PAUSE = 5.0  # seconds after which somebody who was sent away may come back
FILES: dict[int | str, dict[str, Any]] = {200: {"content": {media: {} for media in KINDS.values()}}}  # /openapi.json


@dataclass
class Packer:
    """Whose turn it is."""

    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    waiting: int = 0

    async def pack(self, ending: str, paths: list[Path], names: list[str]) -> bytes:
        """Raises BusyError, or OutputError where what writes such files is not installed."""
        require(ending)
        if self.waiting >= MOST:
            error = BusyError("many files with layers are being made just now: try again in a moment")
            error.retry_after = PAUSE
            raise error
        self.waiting += 1
        try:
            async with self.turns:
                return await asyncio.to_thread(packed, ending, paths, names)
        finally:
            self.waiting -= 1


def packed(ending: str, paths: list[Path], names: list[str]) -> bytes:
    """Pictures of ours as one file, the lowest first."""
    from PIL import Image

    images: list[Image.Image] = []
    for path in paths:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
        images.append(image)
    return pack(ending, images, names, read_recipe(paths[0]))


def layers_in(job: Job) -> int:
    """How many layers each picture of a finished job has."""
    recipes = (job.outcome or {}).get("recipes") or [{"request": {}}]
    return int((recipes[0]["request"].get("options") or {}).get("layers", 1))


def layered(house: House, routes: APIRouter) -> None:
    """The route."""
    packer = Packer()

    @routes.get(
        "/jobs/{id_}/layers/{index}",
        response_class=Response,
        responses=FILES,
        summary="All layers of a finished picture as one file, with its recipe inside",
    )
    async def layers(
        id_: str,
        index: int,
        request: HttpRequest,
        format: Literal["psd", "ora", "pptx"] = "psd",
        language: Literal["en", "zh"] | None = None,
    ) -> Response:
        """`index` counts pictures, from 0: a job of one picture has one file, whatever its layers. `language` is that
        of the layers' names; the server's own where it is left out."""
        job = await house.desk.job(id_, caller_of(request))
        each = layers_in(job)
        count = len(job.outcome["images"]) // each if job.outcome else 0
        if not 0 <= index < count:
            raise MissingError("the job has no picture {index}", index=index)
        paths = [result_path(house, job, number) for number in range(index * each, (index + 1) * each)]
        names = layer_names(each, speaker(language)) if language else layer_names(each)
        data = await packer.pack(f".{format}", paths, names)
        headers = {
            "Content-Disposition": f'attachment; filename="{job.id}-{index + 1}.{format}"',
            "Cache-Control": "private, max-age=3600",
        }
        return Response(data, media_type=KINDS[f".{format}"], headers=headers)
