"""From a folder of pictures to a LoRA file: the stages in their order, each gone before the next needs the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lanting.core.errors import RequestError
from lanting.core.pictures import open_picture
from lanting.core.save import Place, save_picture
from lanting.core.types import Request
from lanting.engine.drawing import free_bytes
from lanting.engine.fit import hold, in_bytes, planned
from lanting.engine.models import Models, choose_device
from lanting.engine.placement import Placed
from lanting.engine.studio import EngineStudio
from lanting.flow.loop import Canvas, denoise
from lanting.specs import settle
from lanting.tasks import TASKS
from lanting.train.kept import alone
from lanting.train.lora.cache import prepare
from lanting.train.lora.dataset import Example
from lanting.train.lora.memory import Need, blocks_of, bytes_of, choose, stored, tokens_of
from lanting.train.lora.run import LoraRun, Report, Trainer, export
from lanting.train.precision import FULL, product_dtype
from lanting.weights.find import ModelFolder

SMALL = 1 << 30  # bytes of a model that fits anywhere
SPARE = 0.95  # of what is free may be planned with


@dataclass(frozen=True)
class LoraJob:
    """What is trained on what, and where the result goes.

    quant     "auto", "none", "int8", "fp8" or "int4": what the frozen weights are packed as
    vram, ram budgets as "12G" or bytes; None: what is free
    samples   prompts that are drawn every `sample_every` steps, into a folder beside the LoRA
    """

    folder: ModelFolder
    examples: Sequence[Example]
    out: Path
    run: LoraRun = LoraRun()  # noqa: RUF009  frozen
    device: str | None = None
    dtype: str | None = None
    quant: str = "auto"
    vram: str | int | None = None
    ram: str | int | None = None
    samples: Sequence[str] = ()
    sample_every: int = 250
    trigger: str = ""

    @property
    def checkpoint(self) -> Path:
        return self.out.with_suffix(".checkpoint")


@dataclass
class LoraTraining:
    """A job's models, opened; `need` says what training will take before anything is read.

    Raises LantingError where the model can't be opened or nothing fits.
    """

    job: LoraJob
    models: Models = field(init=False)
    need: Need = field(init=False)

    def __post_init__(self) -> None:
        own, folder = self.job, self.job.folder
        if folder.spec.lora:
            raise RequestError(
                "{name} is {base} with a LoRA for few steps: train on {base}, and draw with both",
                **{"name": folder.spec.name, "base": folder.spec.repo},
            )
        small = folder.checkpoint("transformer").bytes() < SMALL
        device = choose_device(own.device)
        given = in_bytes(own.vram if device.type == "cuda" else own.ram)
        budget = given or int(SPARE * free_bytes(device))
        fit: Any = {"vram": budget, "ram": own.ram} if device.type == "cuda" else {"ram": budget}
        plan = None if small else planned(folder, fit, device=own.device, quant="auto")  # of those who see examples
        self.models = Models(folder, own.device, own.dtype or usual_dtype(device), plan=plan)
        if self.models.dtype == torch.float16:
            raise RequestError("no LoRA can be taught in float16, whose gradients vanish: use bfloat16 or float32")
        tokens = own.run.batch * max(tokens_of(one, self.models.spec.defaults) for one in own.examples)
        self.need = choose(self.models, own.quant, budget, tokens, own.run)
        hold(device, own.vram)

    def run(self, tell: Callable[[int, int], None]) -> Iterator[Report]:
        """The run; `tell(done, all)` while examples are prepared. What is there of an earlier run is used.

        Raises LantingError; what was learnt until the last checkpoint is there then.
        """
        try:
            with alone(self.job.out):
                yield from self._run(tell)
        except torch.OutOfMemoryError:
            raise RequestError(
                "{device} has too little memory for this after all: allow less with --vram, or take a smaller "
                "--resolution, --batch or --rank; what was learnt until the last checkpoint is kept",
                device=self.models.device,
            ) from None

    def _run(self, tell: Callable[[int, int], None]) -> Iterator[Report]:
        own, models = self.job, self.models
        files = prepare(models, own.examples, own.out.with_suffix(".cache"), tell)
        canvases = [self.canvas(prompt) for prompt in own.samples]
        schedule, same = models.schedule, {"model": models.fingerprint}
        models.close()
        placed = self.placed()
        try:
            trainer = Trainer(placed, schedule, files, own.run, same)
            trainer.resume(own.checkpoint)
            for report in trainer.train(own.checkpoint, own.out, self.notes()):
                if canvases and report.step % own.sample_every == 0:
                    self.draw(trainer, canvases, report.step)
                yield report
            export(trainer.net, own.out, self.notes())
        finally:
            placed.close()

    def placed(self) -> Placed[Any]:
        """The transformer, its weights read. Blocks that stream wait in RAM where that has room for them."""
        models, resident = self.models, self.need.resident
        found = stored(models, self.need.kind)
        away = blocks_of(found)[resident:] if resident is not None else []
        waiting = sum(bytes_of(block, models.dtype.itemsize) for block in away)
        home = "ram" if waiting < SPARE * free_bytes(torch.device("cpu")) else "disk"
        return Placed(found, "transformer_blocks", resident=resident, home=home)

    def notes(self) -> dict[str, str]:
        """What the file says of itself."""
        own = self.job
        told = {"base": own.folder.name, "trained_steps": own.run.steps, "examples": len(own.examples)}
        told |= {"trigger": own.trigger} if own.trigger else {}
        return {f"lanting.{name}": str(value) for name, value in told.items()}

    # ---------------------------------------------------------------- samples
    def canvas(self, prompt: str) -> Canvas:
        """A drawing that is ready to begin: of an edit, of the first example's references."""
        first = self.job.examples[0]
        images = tuple(open_picture(path) for path in first.references)
        task = "edit" if images else "text_to_image"
        request = Request(prompt, task=task, images=images, seed=self.job.run.seed, size=first.size)
        if images:
            self.models.see_pictures()
        settled = settle(request, self.models.spec)
        return TASKS[settled.task or task](EngineStudio(self.models), settled)

    def draw(self, trainer: Trainer, canvases: Sequence[Canvas], step: int) -> None:
        """Into FOLDER/step-N-i.png; a disk that is full must not end a training that goes well."""
        folder = self.job.out.with_suffix(".samples")
        for number, canvas in enumerate(canvases, 1):
            *_, last = denoise(trainer.net.net, canvas)
            with suppress(OSError):
                folder.mkdir(exist_ok=True)
                for image in canvas.finish(last.latents):
                    save_picture(image, Place(folder / f"step-{step:05}-{number}.png", given=True, force=True))


def usual_dtype(device: torch.device) -> str | None:
    """Of the transformer, where nobody said: float32 on a CPU that only imitates bfloat16. The rest as in drawing."""
    return "transformer=float32" if product_dtype(device) == FULL else None
