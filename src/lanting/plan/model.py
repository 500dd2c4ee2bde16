"""What a plan is made for: a release's networks, the kind its files are in, and the bytes a header says they take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lanting.core.types import Request, edits, prompts_of
from lanting.plan.geometry import Geometry
from lanting.plan.job import CELL21, Job, Size
from lanting.plan.kinds import KNOWN, Kind, nearest, plain
from lanting.plan.sizes import (
    Reader,
    Sizes,
    live_weights,
    parameters,
    reader_bytes,
    sum_reader,
    sum_up,
    transformer_sizes,
)
from lanting.specs import ModelSpec
from lanting.specs.sizes import fit_area, reference_size

SMALL = 1 << 30  # bytes of a transformer below which a CPU may compute in float32, as the engine does
PLAIN = ("bf16", "fp32", "fp16")
PUBLISHED = Geometry()
LETTERS = 512  # tokens a prompt is cut to; Qwen-Image-2.1's are read whole
CLOSING = 5  # tokens of the template behind the prompt
OPENING21, AROUND21, NAMED21 = 14, 8, 7  # of 2.1's: dropped in front, kept around a prompt, and with every picture
PROSE = 3  # bytes of a token in long prompts, at least


@dataclass(frozen=True)
class Model:
    """A model as far as plans need it.

    kind, reader_kind  how the transformer's and the text encoder's files hold them: "bf16", "fp32", or a packed kind;
                       None where a file mixes kinds, which is then used as stored
    held, reader_held  bytes of every tensor of the two, by official names, where a header was read
    files              bytes on disk; 0: nothing is here yet
    here               it is on this machine, so the plan must do with its files as they are
    precision          of activations where somebody asks for one: "bfloat16", "float16" or "float32"
    extra              bytes of what is hung on the transformer: LoRAs, a ControlNet
    """

    name: str
    spec: ModelSpec
    geometry: Geometry = PUBLISHED
    kind: str | None = "bf16"
    reader_kind: str | None = "bf16"
    held: Mapping[str, int] = field(default_factory=dict[str, int])
    reader_held: Mapping[str, int] = field(default_factory=dict[str, int])
    files: int = 0
    here: bool = False
    precision: str | None = None
    extra: int = 0

    @property
    def writes(self) -> bool:
        """The text encoder puts pictures into words."""
        return "layered" in self.spec.tasks

    @property
    def packed(self) -> bool:
        """The transformer's file is quantized: it is used as it is."""
        return self.kind not in PLAIN

    def dtype(self, device: str) -> str:
        """Of activations, as the engine chooses it."""
        if self.precision is not None:
            return self.precision
        stored = parameters(self.geometry)["transformer"] * (4 if self.kind == "fp32" else 2)
        if device != "cpu" or stored >= SMALL:
            return "bfloat16"
        from lanting.kernels.library import multiplies_bfloat16

        return "bfloat16" if multiplies_bfloat16() else "float32"

    def transformer(self, kind: Kind, dtype: str) -> Sizes:
        """Bytes in memory, its Linears held as `kind`."""
        if self.packed and self.held:
            return sum_up(self.held, self.geometry.transformer)
        return transformer_sizes(self.geometry.transformer, kind, plain(dtype))

    def reader(self, kind: Kind, dtype: str, sees: bool, writes: bool = False) -> Reader:
        """Bytes in memory of the text encoder."""
        parts = sees or self.writes, writes or self.writes
        if self.reader_held and self.reader_kind not in PLAIN:
            return sum_reader(self.reader_held, *parts)
        return reader_bytes(self.geometry, kind, plain(dtype), *parts)

    def looked_up(self, dtype: str) -> bool:
        """On a CPU the table of words stays in its file, and memory holds the rows of the words that are read. Where
        it has to be cast, all of it is in memory."""
        return plain(dtype).name == (self.reader_kind if self.reader_kind in PLAIN else "bf16")

    def body_kind(self) -> Kind:
        """What a packed transformer file holds; for a mix, the kind with as many bits per weight."""
        weights = parameters(self.geometry)["transformer"]
        return KNOWN.get(self.kind or "") or nearest(8 * sum(self.held.values()) / weights)

    def vae(self, dtype: str) -> int:
        return live_weights(self.geometry.vae) * plain(dtype).stored

    def disk(self, kind: Kind, reader: Kind, dtype: str) -> int:
        """Bytes of files that a plan with these kinds reads."""
        if self.files:
            return self.files
        published = 2 * parameters(self.geometry)["vae"]
        eye = bool(self.spec.edit_template or self.spec.template != "text-to-image") or self.writes
        return self.transformer(kind, dtype).total + self.reader(reader, dtype, eye).every + published


def job_of(request: Request, model: Model, text: int | None = None) -> Job:
    """What a settled request costs. `text`: tokens of the prompt with its closing, else as many as it may have."""
    spec, own, task = model.spec, model.spec.defaults, request.task or "text_to_image"
    prompts = prompts_of(request)
    count = max((len(words.encode()) for words in prompts), default=0)  # a token is at least a byte
    sizes = tuple(image.size for image in request.images)
    editing, size = edits(task), request.size or own.size
    beside = task == "layered" or bool(request.options.get("in_context"))  # one picture of the target's size
    references = tuple(reference_size(*one, own) for one in sizes) if editing else (size,) if beside else ()
    encoded = references if editing or beside else (size,) * len(sizes)
    job = Job(
        size=size,
        references=references,
        seen=tuple(fit_area(own.vl_area, w / h) for w, h in sizes) if editing else (),
        encoded=encoded,
        batch=len(prompts) * request.count,
        frames=request.options.get("layers", own.layers) + 1 if task == "layered" else 1,
        prompts=len(prompts),
        text=text or (LETTERS if request.rewrite else min(LETTERS, count + CLOSING)),
        writes=bool(request.rewrite),
        opening=64 if editing and spec.edit_template != "text-to-image" else 34,
        steps=request.steps or own.steps,
        guided=(own.guidance_scale if request.guidance_scale is None else request.guidance_scale) > 1,
        joined=bool(request.options.get("batched_guidance", False)),
    )
    return _single(job, text or _whole(count)) if model.geometry.single_stream else job


def _whole(count: int) -> int:
    """Tokens of a prompt of `count` bytes that is not cut: at most so many, where a long one is prose."""
    return min(count, LETTERS) + max(count - LETTERS, 0) // PROSE + AROUND21


def _single(job: Job, text: int) -> Job:
    """As Qwen-Image-2.1 reads and draws it."""
    return replace(job, text=text + NAMED21 * len(job.seen), opening=OPENING21, cell=CELL21, cut=True)


def usual_job(model: Model, size: Size | None, references: int = 0, task: str | None = None) -> Job:
    """A release's own steps and guidance, a long prompt, and input pictures of the default size."""
    task = task or ("edit" if references else "text_to_image")
    if "edit" in model.spec.tasks and "text_to_image" not in model.spec.tasks and task == "text_to_image":
        task, references = "edit", max(references, 1)
    job = _usual(model, size, references, task)
    return _single(job, LETTERS) if model.geometry.single_stream else job


def _usual(model: Model, size: Size | None, references: int, task: str) -> Job:
    own = model.spec.defaults
    picture = (math.isqrt(own.vae_area),) * 2 if own.vae_area and edits(task) else own.size
    job = Job(size=size or own.size, text=LETTERS, steps=own.steps, guided=own.guidance_scale > 1)
    if task == "layered" or model.spec.tasks == ("layered",):
        square = size or fit_area(own.resolution**2, 1.0)
        return replace(job, size=square, references=(square,), encoded=(square,), frames=own.layers + 1)
    if edits(task):
        pictures, seen = (picture,) * references, (fit_area(own.vl_area, 1.0),) * references
        chosen = size or picture
        return replace(job, size=chosen, references=pictures, encoded=pictures, seen=seen, opening=64)
    return replace(job, encoded=(job.size,) if task != "text_to_image" else ())


def release(spec: ModelSpec) -> Model:
    """A release that is not here: its published geometry, with what its own file says about the shape."""
    shape: dict[str, Any] = dict(spec.shape)
    configs: dict[str, Mapping[str, Any]] = {"transformer": shape}
    if spec.tasks == ("layered",):
        configs["vae"] = {"input_channels": 4}
    return Model(spec.name, spec, Geometry.from_configs(configs))
