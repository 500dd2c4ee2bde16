"""How one request is drawn: what may be left out, what is watched, and what was decided, for the recipe.

Between the loop, which asks for velocities, and what answers instead of the plain networks: the controller of the dial
(`flow.frugal`) with its caches, and around it the sentinel. They hang on the networks only while this drawing lasts, so
that nothing of it is left for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lanting.attach.caches import residual_cache
from lanting.attach.frozen import frozen_references, kept_bytes
from lanting.attach.held import KEPT
from lanting.attach.parts import Part
from lanting.attach.safe_reader import PARTS, SafeReader, States
from lanting.attach.safe_vae import SafeVae
from lanting.attach.sentinel import Sentinel
from lanting.core.checkpoint import Checkpoint
from lanting.core.errors import LantingError
from lanting.core.quality import LEVELS
from lanting.core.rewriting import aside, taken_up
from lanting.core.types import Notice, Request, note
from lanting.engine.models import Models
from lanting.engine.parallel_split import Split
from lanting.engine.remembered import Remembered
from lanting.flow.frugal import Frugal
from lanting.flow.loop import Canvas, Model, Step, denoise, velocity
from lanting.nn.controlnet21 import QwenImage21ControlNet
from lanting.nn.single_stream import QwenImage21Transformer, keep_prefix
from lanting.plan import detect

SPARE = 0.5  # of the memory that is free may be taken for kept references; the rest is for what a step needs


class Drawing:
    """A context: `begin` when the canvas is ready, `predict` for the loop, `told` when all is done.

    resume  where an earlier drawing of the same request was left, if this one goes on from there
    """

    def __init__(self, models: Models, request: Request, remembered: Remembered, resume: Checkpoint | None = None):
        self.models, self.remembered, self.told_before = models, remembered, request.choices
        self.level = LEVELS[request.quality or "exact"]
        self.done = resume.step if resume else 0
        self.earlier = str(resume.choices.get("steps", "")).split()[: self.done] if resume else []
        self.mark = ""  # of its checkpoints
        self.hung, self.spared = ExitStack(), ExitStack()
        self.frugal: Frugal | None = None
        self.sentinel: Sentinel | None = None
        self.vae: SafeVae | None = None
        self.reader: SafeReader | None = None
        self.split: Split | None = None
        self.shown: list[Notice] = []
        self.written = taken_up(resume.choices) if resume else None  # prompts that were rewritten
        self.remarks: list[Notice] = []  # about them

    def __enter__(self) -> Drawing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.spared.close()
        self.hung.close()
        helped = kind is None or not issubclass(kind, LantingError)
        if self.told_before is None and helped:
            self.remembered.add(self.ways())

    def watch_vae(self, vae: Any) -> None:
        """From the first picture that is encoded to the last one that is decoded."""
        self.vae = self.hung.enter_context(SafeVae(vae, self._known()))

    def read(self, encoder: Any, work: Callable[[], States]) -> States:
        """What the text encoder is asked to do, watched from the first prompt on."""
        if self.reader is None:
            self.reader = self.hung.enter_context(SafeReader(encoder.model, self._known(), mend=self._mend))
        return self.reader.read(work)

    def begin(self, canvas: Canvas) -> None:
        """Hang everything on the networks that the steps need."""
        models = self.models
        nets: dict[str, nn.Module] = {"transformer": models.transformer}
        if canvas.control is not None or canvas.steering is not None:
            placed = models.placed_controlnets.values()
            nets |= {f"controlnet{number if number > 1 else ''}": one.net for number, one in enumerate(placed, start=1)}
        told = None if self.told_before is None else [(s - self.done if s else -1, p, w) for s, p, w in self._safe()]
        watch = Sentinel(nets, models.dtype, self.remembered.ways, told, mend=self._mend, calm=self._calm)
        self.sentinel = self.hung.enter_context(watch)
        prefix = self._keep_prefix(canvas)
        kept = self._spare(canvas)
        if models.crew is not None:
            self.split = Split(models, models.crew, canvas, prefix, self.frugal is not None)
            if (why := self._alone(canvas, watch, kept, models.crew.names[0])) is not None:
                self.split.alone(why)
            self.hung.enter_context(self.split)
            if self.frugal is not None:
                self.frugal.ask = self.split.question

    def _alone(self, canvas: Canvas, watch: Sentinel, kept: bool, leader: str) -> Notice | None:
        """Why several devices can't share this drawing, None where they can."""
        if watch.ways or watch.due:
            return note("parts of this model run in a safer way: {device} draws alone", device=leader)
        if canvas.regions is not None:
            return note("parts of this picture have words of their own: {device} draws alone", device=leader)
        return note("one device decides what may be left out: {device} draws alone", device=leader) if kept else None

    def _keep_prefix(self, canvas: Canvas) -> bool:
        """Of 2.1: words and references are computed once, where there is room to keep them; whether they are."""
        net, plan = self.models.transformer, self.models.plan
        if not isinstance(net, QwenImage21Transformer) or not (plan is None or plan.prefix_kept):
            return False
        kept = self._room(canvas, words=True)
        if kept:
            self.hung.enter_context(keep_prefix(net))
        return kept

    def _spare(self, canvas: Canvas) -> bool:
        """What leaves work out, where it may be or was; whether references are kept, too."""
        models = self.models
        words = str((self.told_before or {}).get("steps", "")).split()[self.done :]
        if self.level.exact and not words:
            return False
        self.frugal = Frugal(self.level, canvas, words)
        self.spared.enter_context(residual_cache(models.transformer, self.frugal))
        kept = any(letter.islower() for word in words for letter in word) if words else self._room(canvas)
        kept = bool(canvas.references and kept and getattr(models.transformer.config, "zero_cond_t", False))
        if kept:
            self.spared.enter_context(frozen_references(models.transformer, self.frugal))
        return kept

    def steps(self, canvas: Canvas) -> Iterator[Step | None]:
        """The loop; None where it waits for others (`engine.together`)."""
        return denoise(self.models.transformer, canvas, self.predict)

    def rest(self) -> None:
        """All steps were made."""
        if self.split is not None:
            self.split.stop()
        self._drop_prefix()
        self.models.rest()

    def predict(self, model: Model, canvas: Canvas, latents: Tensor, sigma: Tensor) -> Tensor:
        """`flow.loop.velocity`, sparing and watched."""
        assert self.sentinel is not None
        usual = self.frugal or self.split or velocity
        return self.sentinel(
            lambda: usual(model, canvas, latents, sigma), lambda: velocity(model, canvas, latents, sigma)
        )

    # ---------------------------------------------------------------- what is told
    @property
    def choice(self) -> str:
        """Of the last step."""
        return self.frugal.words[-1] if self.frugal is not None else ""

    def notices(self) -> tuple[Notice, ...]:
        """What was not told yet."""
        watches = (self.reader, self.vae, self.sentinel, self.split)
        every = [*self.remarks, *(one for watch in watches if watch is not None for one in watch.notices)]
        new = tuple(one for one in every if not any(one is other for other in self.shown))
        self.shown += new
        return new

    def conditions(self) -> dict[str, str]:
        """What else decided the pixels: tokens shared out meet other sums than one device's."""
        split = self.split
        return {} if split is None or not split.exchanged else {"devices": str(split.layout.devices)}

    @property
    def choices(self) -> dict[str, Any]:
        """Everything that was decided so far, and would have to be decided alike to draw the same picture."""
        words = [*self.earlier, *self.frugal.words] if self.frugal is not None else self.earlier
        steps: dict[str, Any] = {"steps": " ".join(words)} if words else {}
        if self.frugal is not None and not self.frugal.told:
            steps["error"] = round(self.frugal.budget.spent, 4)
        elif words and "error" in (self.told_before or {}):
            steps["error"] = (self.told_before or {})["error"]
        made = [
            [step + self.done if step >= 0 else 0, path, way]
            for step, path, way in (self.sentinel.made if self.sentinel else ())
        ]
        made += [[0, path, way] for watch in (self.reader, self.vae) if watch for path, way in watch.ways.items()]
        return steps | ({"safe": made} if made else {})

    @property
    def aside(self) -> dict[str, Any]:
        """The same for a checkpoint, which also keeps what was written."""
        return self.choices | aside(self.written)

    def told(self, request: Request) -> Request:
        """The request with what was decided."""
        return replace(request, choices=self.choices or None)

    def ways(self) -> dict[str, str]:
        """Part -> way, for the next drawing."""
        watches = [watch for watch in (self.reader, self.vae, self.sentinel) if watch]
        return {path: way for watch in watches for path, way in watch.ways.items()}

    # ---------------------------------------------------------------- what the sentinel asks
    def _safe(self) -> Iterator[tuple[int, str, str]]:
        for step, path, way in (self.told_before or {}).get("safe", ()):
            yield int(step), str(path), str(way)

    def _known(self) -> Mapping[str, str]:
        """Part -> way from the first moment on."""
        return self.remembered.ways if self.told_before is None else {path: way for _, path, way in self._safe()}

    def _calm(self, redone: bool) -> None:
        self.spared.close()
        if self.split is not None:  # what is made safe is made so here
            self.split.stop()
        if redone:  # what broke may be in there
            self._drop_prefix()
        if self.frugal is not None:
            self.frugal.stop()
            if redone:
                self.frugal.redone()

    def _drop_prefix(self) -> None:
        """Of 2.1: what is kept of words and references."""
        if kept := getattr(self.models.transformer, "prefixes", None):
            kept.clear()

    def _mend(self, path: str) -> bool:
        """Read a part's weights from its file again."""
        name, _, inside = path.partition(".")
        if name in PARTS:
            placed: Any = self.models.placed_encoder
            inside = f"{PARTS[name]}.{inside}"
        else:
            placed = self.models.placed_by(name)
        module = placed.net.get_submodule(inside)
        part = Part(module, inside)
        here = [name for name, tensor in part.tensors() if tensor.device.type != "meta"]
        part.put(placed.stored.read(here), placed.device)
        for each in module.modules():
            for made in KEPT:
                each.__dict__.pop(made, None)
        return True

    def _room(self, canvas: Canvas, words: bool = False) -> bool:
        """Whether the references' keys and values (and the words') fit beside everything else."""
        tokens = sum(reference.data.shape[1] for reference in canvas.references)
        tokens += canvas.positive.embeds.shape[1] if words else 0
        calls = len(canvas.start) * (1 if canvas.negative is None else 2)
        wanted = kept_bytes(self.models.transformer.config, tokens, calls, self.models.dtype.itemsize)
        if canvas.steering is not None:  # 2.1's ControlNets keep them, too
            chains = [net for net in dict.fromkeys(self.models.controlnets) if isinstance(net, QwenImage21ControlNet)]
            blocks = self.models.transformer.config.num_layers
            wanted += wanted * sum(len(net.control_blocks) for net in chains) // blocks
        return wanted <= SPARE * free_bytes(self.models.device)


def free_bytes(device: torch.device) -> int:
    """Memory that may still be taken where the network computes."""
    if device.type != "cuda":
        return detect().ram_free
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # the allocator's own
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device)) - torch.cuda.memory_allocated(device)
    return min(free, limit)
