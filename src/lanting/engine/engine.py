"""`Engine`: open a model once, then turn requests into pictures; `stream` is the whole path, `run` its last value.

The path is the same for every task: settle, canvas, loop, finish. Closing the generator cancels within one step.
An engine may be used from several threads; requests then take turns (`turn`).
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from os import fspath
from typing import TYPE_CHECKING, Unpack, cast

import torch

from lanting.core.checkpoint import Checkpoint
from lanting.core.errors import LantingError, NotFiniteError
from lanting.core.recipe import describe_request, request_of_picture
from lanting.core.types import Progress, Recipe, Request, Result, edits, prompts_of
from lanting.engine.choose import Name, devices_of, names
from lanting.engine.conditions import key_of, versions_of
from lanting.engine.controls import check_control
from lanting.engine.drawing import Drawing
from lanting.engine.fit import Fit, hold, in_bytes, planned
from lanting.engine.models import Models
from lanting.engine.parallel import Crew
from lanting.engine.phases import Phases, Previews, sentences
from lanting.engine.remembered import Remembered
from lanting.engine.resume import controlnets_of, go_on, mark_of, put_aside
from lanting.engine.rewriting import check_room, prepare, rewritten, words_for
from lanting.engine.room import room
from lanting.engine.studio import EngineStudio
from lanting.engine.together import Together
from lanting.engine.tries import until_read
from lanting.engine.turn import Turn
from lanting.flow.loop import Canvas, Grid, Step
from lanting.plan import Plan
from lanting.reading import can_read, check_reader
from lanting.specs import ModelSpec, settle
from lanting.tasks import TASKS
from lanting.tasks.pictures import pictures_from, resize, to_mode
from lanting.tasks.studio import size_of
from lanting.weights.find import ModelFolder, locate
from lanting.weights.lora_file import Lora
from lanting.weights.sized import beside

if TYPE_CHECKING:
    from PIL.Image import Image


TILE_ABOVE = 2048 * 2048  # pixels; the VAE's memory grows with them, and tiles bound it at a small loss of exactness


class Engine:
    """A model ready to draw. Make one with `Engine.open`."""

    def __init__(self, models: Models):
        self.models = models
        self.turn = Turn()
        self.remembered: Remembered | None = None  # what has to run in a safer way here
        self.proved: dict[tuple[Hashable, ...], bool] = {}  # common steps: were they the bits of steps alone?
        self.budget: int | None = None  # bytes of the device, where somebody gave a budget
        self.head_planned = False  # the plan has the head of the text encoder, which rewrites prompts

    @classmethod
    def open(
        cls,
        model: Name = "nano",
        *,
        device: str | None = None,
        dtype: str | None = None,
        controlnet: Name | Sequence[Name] | None = None,
        loras: Name | Sequence[Name] = (),
        parts: Mapping[str, Name | None] | None = None,
        quant: str = "auto",
        **fit: Unpack[Fit],
    ) -> Engine:
        """Find a model and check its headers; weights are read when they are first needed.

        model       a release's name ("nano", "qwen-image-2512"), a folder in diffusers' layout, or a weights file
        device      "cpu", "cuda", "cuda:1", "mps"; several for one picture: "cuda:0,cuda:1", "cuda:all", "cpu,cpu";
                    None: the best one present
        dtype       "bfloat16", "float16", "float32", or by component "vae=float32,transformer=bfloat16";
                    None: bfloat16, or float32 for small models on a CPU
        controlnet  a ControlNet, its folder or file, for tasks of that name; of several each follows its own picture
        loras       LoRA files or names of LoRAs the model brings, with a strength if it is not 1: "ink.safetensors:0.8"
        parts       "text_encoder" and "vae": a file or folder that replaces the model's own, or that a file lacks
        quant       "int8", "fp8" or "int4": pack Linears that are stored in 16 or 32 bits while they are loaded;
                    "none": never; "auto": as the plan says
        vram, ram   budgets in bytes or as "12G": plan within them (the release's usual pictures), and keep to them
        rewrite     plan for prompts that are rewritten, too: the text encoder's head takes its room (1.1 GB)
        plan        what stays in memory and what passes through, as `lanting.plan` decided; None: everything stays
        Raises ModelError or RequestError in one sentence.
        """
        own = {part: fspath(place) for part, place in (parts or {}).items() if place is not None}
        folder, devices, nets, hung = locate(fspath(model), own), devices_of(device), names(controlnet), names(loras)
        plan = planned(folder, fit, lambda: beside(hung, nets), device=device, quant=quant)
        models = Models(folder, devices[0] if devices else None, dtype, nets, hung, quant, plan)
        hold(models.device, fit.get("vram"))
        if len(devices) > 1:
            models.crew = Crew(models, devices, fit.get("vram"))
        engine = cls(models)
        engine.head_planned = bool(fit.get("rewrite"))
        engine.budget = in_bytes(fit.get("vram" if models.device.type == "cuda" else "ram"))
        return engine

    @property
    def folder(self) -> ModelFolder:
        return self.models.folder

    @property
    def spec(self) -> ModelSpec:
        return self.models.spec

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The release's own LoRA, then those that were asked for."""
        return (*self.models.release_loras, *self.models.loras)

    def set_strengths(self, *strengths: float) -> None:
        """One for each of the LoRAs that were asked for, -10 to 10, from the next picture on. Their files are not
        read again. Raises RequestError."""
        with self.turn.taken():
            self.models.set_strengths(strengths)

    @property
    def plan(self) -> Plan | None:
        """What stays in memory and what passes through; None: everything stays."""
        return self.models.plan

    @property
    def notes(self) -> tuple[str, ...]:
        """Where the model folder's own configs disagree with the release; the folder wins."""
        return self.folder.notes

    @property
    def reads(self) -> bool:
        """Whether words can be read back here (`Request.tries`)."""
        return can_read()

    def settled(self, request: Request) -> Request:
        """The request without gaps. Raises RequestError, before anything is loaded."""
        settled = check_control(settle(request, self.spec), self.models)
        if settled.rewrite:
            check_room(self.models, self.head_planned, self.budget)
        if settled.tries is not None:
            check_reader()
        return settled

    def run(self, request: Request) -> Result:
        """Draw and return; see `stream`."""
        for event in self.stream(request):
            if isinstance(event, Result):
                return event
        raise LantingError("The drawing ended without a result; please report this.")

    def stream(self, request: Request, previews: Previews = False) -> Iterator[Progress | Result]:
        """Progress after every phase and step, then one Result. `previews`: with a small picture at every step, or at
        those at which it says so. Values are checked before this returns, so a
        wrong request raises here and not at the first `next`. Close the iterator to cancel."""
        return cast("Iterator[Progress | Result]", self._tried(self.settled(request), previews))

    def stream_resumable(
        self, request: Request, previews: Previews = False, *, every: int = 4, resume: Checkpoint | None = None
    ) -> Iterator[Progress | Checkpoint | Result]:
        """As `stream`, with a Checkpoint after every `every` steps (0: none), and going on from one of the same
        request: the picture is that of a drawing that was never interrupted. The request must have a seed. With a
        quality other than exact nothing is left out in the first step after the break, so the picture differs a
        little; its recipe draws it again in one go.

        A checkpoint of another drawing raises RequestError at the first `next`.
        """
        return self._tried(self.settled(request), previews, every, resume)

    def room(self, request: Request, most: int | None = None) -> int:
        """How many drawings like this one may share their steps (`together`), itself counted; 1: none.

        most  as many as fit, up to so many; None: as many as gain something and stay the same to the last bit
        Raises RequestError for wrong values.
        """
        settled, known = self.settled(request), self.known()
        if self.models.crew is not None:  # a picture has all devices, so that it is done sooner
            return 1
        if settled.tries is not None:  # who is drawn again holds nobody up
            return 1
        shared = most is not None or all(same for (key, *_), same in self.proved.items() if key == known.key)
        return room(self.models, settled, most, self.budget) if shared and not known.ways else 1

    def together(self, forced: bool = False) -> Together:
        """Drawings that share their steps, for whoever iterates; the engine is theirs until `close`. `forced`: also
        where sharing changes last bits."""
        return Together(self, forced)

    def rewrite(self, prompt: str, images: Sequence[Image] = ()) -> str:
        """The words that a request with `rewrite` would draw, and no picture; with `images` of an edit of them.

        The prompt itself where what the text encoder writes can't be used. Raises RequestError where it can't write.
        """
        task = "edit" if images else "text_to_image"
        request = self.settled(Request(prompt, task, images=tuple(images), rewrite=True))
        with self.turn.taken(), resting(self.models), sentences(self.models.device):
            return words_for(self.models, request)

    def close(self) -> None:
        """Let the weights go."""
        with self.turn.taken():
            self.models.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _tried(
        self, request: Request, previews: Previews, every: int = 0, resume: Checkpoint | None = None
    ) -> Iterator[Progress | Checkpoint | Result]:
        """The events of a settled request: of one drawing, or of all that are made until its words can be read."""
        if request.tries is None:
            return self._in_turn(request, previews, every, resume)

        def draw(one: Request, first: bool) -> Iterator[Progress | Checkpoint | Result]:
            return self._in_turn(one, previews, every, resume if first else None)

        return until_read(request, draw)

    def _in_turn(
        self, request: Request, previews: Previews, every: int, resume: Checkpoint | None
    ) -> Iterator[Progress | Checkpoint | Result]:
        """One drawing, which has the engine to itself until its end."""
        with self.turn.taken(), resting(self.models):
            drawing = Drawing(self.models, request, self.known(), resume)
            with closing(self.path(drawing, request, previews, every, resume)) as events:
                yield from self.turn.passed(event for event in events if event is not None)

    def path(
        self, drawing: Drawing, request: Request, previews: Previews, every: int, resume: Checkpoint | None
    ) -> Generator[Progress | Checkpoint | Result | None]:
        """The path of one settled request, for whoever has the engine's turn; None where its steps wait for others."""
        phases = Phases()
        with sentences(self.models.device), drawing:
            self._load(request, phases, drawing)
            request = yield from rewritten(self.models, request, drawing, phases)
            request, canvas = self._prepare(request, phases, drawing)
            drawing.mark = mark_of(request, self.models) if every or resume else ""
            canvas = go_on(canvas, resume, drawing.mark) if resume else canvas
            yield from phases.finished()
            last: Step | None = None
            drawing.begin(canvas)
            for step in drawing.steps(canvas):
                if step is None:
                    yield None
                    continue
                last = step
                shown = previews() if callable(previews) else previews
                picture = self._preview(canvas.grids[-1], step) if shown else None
                event = phases.tick("denoise", step.index + drawing.done, step.total + drawing.done, picture)
                yield replace(event, choice=drawing.choice, notices=drawing.notices())
                if every and step.index % every == 0 and step.index < step.total:
                    yield put_aside(step, drawing.done, drawing.mark, drawing.aside)
            drawing.rest()
            phases.end("denoise")
            images = self._finish(canvas, last)
            phases.end("decode")
            yield replace(phases.tick("decode", 1, 1), notices=drawing.notices())
            request = drawing.told(request)
            recipes = self._recipes(request, len(images), drawing.conditions())
            yield Result(tuple(images), recipes, dict(phases.seconds))

    def known(self) -> Remembered:
        """What has to run in a safer way here."""
        key = key_of(self.models)  # strengths of LoRAs may have changed
        if self.remembered is None or self.remembered.key != key:
            self.remembered = Remembered(key)
        return self.remembered

    @torch.no_grad()
    def _load(self, request: Request, phases: Phases, drawing: Drawing) -> None:
        """What is missing; all of it, but where networks take turns."""
        models = self.models
        if models.crew is not None:
            models.crew.start()
        if edits(request.task):
            models.see_pictures()
        prepare(models, request, drawing)
        _ = models.codec, models.controlnets  # built once, kept
        if not models.take_turns:
            models.look_ahead()
        width, height = request.size or (0, 0)
        tiles = models.plan is not None and models.plan.vae_tile > 0
        models.codec.tile = tiles or width * height > TILE_ABOVE
        drawing.watch_vae(models.codec.vae)
        phases.end("load")

    @torch.no_grad()
    def _prepare(self, request: Request, phases: Phases, drawing: Drawing) -> tuple[Request, Canvas]:
        """Let the task fill its canvas. The request comes back with a caption as its prompt where a picture is to be
        layered and nobody described it."""
        models = self.models
        if request.task == "layered" and not str(request.prompt).strip():
            # at the size that is drawn, as the reference does: of a photograph it would read many thousands of tokens
            seen = resize(to_mode(request.images[0], models.codec.pixel_channels), size_of(request))
            request = replace(request, prompt=models.reader().caption(seen) or " ")
        canvas = TASKS[request.task or "text_to_image"](EngineStudio(models, drawing.read), request)
        phases.end("encode")
        models.prepare_transformer(canvas.sigmas)
        phases.end("load")
        return request, canvas

    @torch.no_grad()
    def _preview(self, grid: Grid, step: Step) -> Image:
        """The picture the model has in mind now, from a linear projection of the latents (1/8 of the size)."""
        return pictures_from(self.models.preview(step.denoised[:1], grid))[0]

    @torch.no_grad()
    def _finish(self, canvas: Canvas, last: Step | None) -> Sequence[Image]:
        if last is None or not bool(torch.isfinite(last.latents).all()):
            raise NotFiniteError("The picture broke into numbers that are not finite; try --dtype float32.")
        return canvas.finish(last.latents)

    def _recipes(self, request: Request, images: int, more: Mapping[str, str]) -> tuple[Recipe, ...]:
        """One recipe per picture: the request that draws it alone (or, for layers, all of its layers). `more` are
        conditions of this drawing."""
        each = images // (len(prompts_of(request)) * request.count)
        versions, nets = versions_of(self.models) | dict(more), controlnets_of(request, self.models)
        loras = tuple(lora.describe() for lora in self.models.loras)
        return tuple(
            Recipe(
                request=describe_request(request_of_picture(request, i // each)),
                model=self.folder.name,
                weights=self.models.fingerprint,
                task=request.task or "text_to_image",
                versions=versions,
                loras=loras,
                controlnets=nets,
            )
            for i in range(images)
        )


@contextmanager
def resting(models: Models) -> Iterator[None]:
    """However a drawing ends, nothing that only passes through memory stays there."""
    try:
        yield
    finally:
        models.rest()
