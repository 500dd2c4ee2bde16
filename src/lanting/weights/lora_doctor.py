"""What a LoRA file is and what it fits, from its header alone: no torch. `lanting lora show` prints it.

Without a model to compare with, the file is held against every shape of transformer that we know: the one that
understands most of its tensors is the one it was made for. All Qwen-Image releases share one shape, so a file cannot
tell by its tensors which of them it was trained on; what its notes say about that is passed on as what they say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lanting.core.errors import LantingError, ModelError
from lanting.specs import ModelSpec, get_spec, spec_names
from lanting.weights.checkpoint import read_json
from lanting.weights.find import locate
from lanting.weights.headers import TensorInfo, read_file
from lanting.weights.home import embedded_nano
from lanting.weights.linear_names import transformer_linears
from lanting.weights.lora_file import find_lora, peft_settings
from lanting.weights.lora_names import Sides, dialect_of, parse
from lanting.weights.lora_pieces import Reading, read_pieces
from lanting.weights.lora_wishes import NONE, Wishes, wishes_of

BASES = (
    "ss_base_model_version",
    "modelspec.architecture",
    "ss_sd_model_name",
    "base_model",
    "baseModel",
    "lanting.base",
)
TRIGGERS = ("lanting.trigger", "modelspec.trigger_phrase")
FORM_NAMES = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa", "diff": "whole differences", "bias": "biases"}
OTHERS = (  # other families, by layers that only they have
    (r"double_blocks|single_blocks|single_transformer_blocks", "FLUX or HunyuanVideo"),
    (r"(down|up|input|output|mid)_blocks?\b|(down|up|input|output)_blocks", "Stable Diffusion"),
    (r"joint_blocks|attn2\.", "Stable Diffusion 3 or Wan"),
    (r"\bblocks[._]\d+[._](cross_attn|self_attn|ffn)", "Wan"),
    (r"(layers|noise_refiner|context_refiner)[._]\d+[._]attention", "Z-Image or Lumina"),
)


@dataclass(frozen=True, slots=True)
class Examined:
    """What was found out. `problems` make the file unusable with the model."""

    name: str
    path: Path
    bytes: int
    dialect: str
    forms: Mapping[str, int]  # LoRA, LoKr, LoHa, DoRA, ... -> Linears
    ranks: Mapping[int, int]  # rank -> Linears
    scales: tuple[float, ...]  # alpha / rank, every value that occurs
    dtypes: Mapping[str, int]  # dtype -> tensors
    targets: Mapping[str, int]  # kind of layer, such as attn.to_q -> Linears
    tensors: int
    unmatched: tuple[str, ...]  # names that fit no Linear
    model: str | None  # what it was compared with
    fits: tuple[str, ...]  # releases
    wishes: Wishes
    trained_on: str | None  # as the file says
    trigger: str | None  # the word that calls it, as the file says
    stranger: str | None  # the family of models that the unmatched names are of
    problems: tuple[LantingError, ...] = ()

    @property
    def matched(self) -> int:
        """Tensors that have their place."""
        return self.tensors - len(self.unmatched)

    @property
    def made_for_edits(self) -> bool:
        """The file says that it was trained on a model that edits."""
        told = (self.trained_on or "").lower()
        return "qwen" in told and "edit" in told


def examine(name: str, model: str | None = None) -> Examined:
    """A LoRA file, compared with a model (a release, a folder, a file) or with all we know.

    Raises ModelError for a file that is damaged or not there, and for a model that is not known.
    """
    folder = Path() if model is None else _folder_of(model)
    path = find_lora(folder, name)
    infos, notes = read_file(path)
    shapes = _known_shapes() if model is None else {(model,): _linears(model)}
    peft = peft_settings(path, notes)
    readings = {names: read_pieces(path, infos, linears, peft) for names, linears in shapes.items()}
    names, best = min(readings.items(), key=lambda item: (len(item[1].strays), len(item[1].problems)))
    return _report(path, infos, notes, best, model, names)


def _report(
    path: Path,
    infos: Mapping[str, TensorInfo],
    notes: Mapping[str, str],
    reading: Reading,
    model: str | None,
    names: Sequence[str],
) -> Examined:
    problems: list[LantingError] = list(reading.problems)
    wishes = NONE
    try:
        wishes = wishes_of(path, notes)
    except ModelError as error:
        problems.append(error)
    pieces = reading.pieces.values()
    return Examined(
        name=path.name,
        path=path,
        bytes=path.stat().st_size,
        dialect=dialect_of(infos),
        forms=_forms(reading),
        ranks=dict(sorted(Counter(piece.rank for piece in pieces if piece.rank).items())),
        scales=tuple(sorted({piece.scale for piece in pieces})),
        dtypes=dict(Counter(info.dtype for info in infos.values()).most_common()),
        targets=dict(Counter(_kind(module) for module in reading.pieces).most_common()),
        tensors=len(infos),
        unmatched=tuple(sorted(reading.strays)),
        model=model,
        fits=() if problems else tuple(names),
        wishes=wishes,
        trained_on=_first(notes, BASES),
        trigger=_first(notes, TRIGGERS),
        stranger=_family(tuple(reading.strays)),
        problems=tuple(problems),
    )


def _first(notes: Mapping[str, str], names: Sequence[str]) -> str | None:
    """The first of these notes that says something."""
    return next((notes[name][:80] for name in names if notes.get(name)), None)


def _forms(reading: Reading) -> dict[str, int]:
    forms = Counter(FORM_NAMES[piece.form] for piece in reading.pieces.values())
    lengths = sum("magnitude" in piece.keys for piece in reading.pieces.values())
    biases = sum(bool({"bias", "up_bias"} & piece.keys.keys()) for piece in reading.pieces.values())
    forms |= Counter({"DoRA": lengths, "biases": biases})
    return {name: count for name, count in forms.most_common() if count}


def _kind(module: str) -> str:
    """attn.to_q of transformer_blocks.7.attn.to_q."""
    return re.sub(r"^transformer_blocks\.\d+\.", "", module)


def _family(unmatched: Sequence[str]) -> str | None:
    """Whose layers these are, if most of them are somebody's."""
    layers = [name.layer for key in unmatched if (name := parse(key)) is not None]
    for pattern, family in OTHERS:
        if sum(bool(re.search(pattern, layer)) for layer in layers) * 2 > len(unmatched):
            return family
    return None


def _known_shapes() -> dict[tuple[str, ...], Sides]:
    """Releases of one shape together; those that are a release and a LoRA are no bases."""
    shapes: dict[str, list[str]] = {}
    for name in spec_names():
        if get_spec(name).lora:
            continue
        build = str(get_spec(name).shape.get("_class_name", "first"))
        shapes.setdefault("nano" if name == "nano" else build, []).append(name)
    return {tuple(names): _of_release(get_spec(names[0])) for names in shapes.values()}


def _of_release(spec: ModelSpec) -> Sides:
    if spec.name == "nano":
        return transformer_linears(read_json(embedded_nano() / "transformer" / "config.json"))
    return transformer_linears(spec.shape)


def _linears(model: str) -> Sides:
    """Of a model that is here, or of a release that is not."""
    if model in spec_names():
        return _of_release(get_spec(model))
    return transformer_linears(locate(model).configs["transformer"])


def _folder_of(model: str) -> Path:
    """Where a model keeps LoRAs of its own; nowhere for one that is not here."""
    try:
        return locate(model).path
    except ModelError:
        if model in spec_names():
            return Path()
        raise
