"""A model on this machine as the planner sees it: its networks' numbers, and what its headers say they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lanting.core.errors import ModelError
from lanting.plan.geometry import Geometry
from lanting.plan.model import Model
from lanting.plan.sizes import parameters
from lanting.weights.checkpoint import Checkpoint
from lanting.weights.controls import open_controlnet
from lanting.weights.find import ModelFolder
from lanting.weights.fits import with_writing
from lanting.weights.form import Form
from lanting.weights.forms import read_forms
from lanting.weights.headers import TensorInfo
from lanting.weights.home import path_of

PLAIN = {"BF16": "bf16", "F32": "fp32", "F16": "fp16", "F64": "fp32"}


def planned_model(folder: ModelFolder) -> Model:
    """From configs and headers alone. Raises ModelError as opening the files does."""
    try:
        geometry = Geometry.from_configs(folder.configs)
        parameters(geometry)  # configs come from strangers: their numbers must be numbers
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(
            "a config.json of {name} describes no network we know ({error}): get another",
            **{"name": folder.name, "error": str(error)},
        ) from None
    body, reader, vae = (folder.checkpoint(name) for name in ("transformer", "text_encoder", "vae"))
    forms, reader_forms = read_forms(body), read_forms(reader)
    return Model(
        name=folder.name,
        spec=with_writing(folder.spec, folder.configs["text_encoder"], reader),
        geometry=geometry,
        kind=kind_of(body, forms),
        reader_kind=kind_of(reader, reader_forms),
        held=held_bytes(body, forms),
        reader_held=held_bytes(reader, reader_forms),
        files=body.bytes() + reader.bytes() + vae.bytes(),
        here=True,
    )


def beside(loras: Iterable[str], controlnets: Iterable[str]) -> int:
    """Bytes of what is hung on a transformer: LoRA files ("ink.safetensors:0.8"; one that a model brings by name is
    small and not counted), and the tensors of ControlNets, each net once. Raises ModelError for one that is none."""
    files = (path_of(place) for lora in loras for place in (lora, lora.rpartition(":")[0]) if place)
    nets = {net.path: net.checkpoint.bytes() for net in map(open_controlnet, controlnets)}
    return sum(path.stat().st_size for path in set(files) if path.is_file()) + sum(nets.values())


def kind_of(checkpoint: Checkpoint, forms: dict[str, Form]) -> str | None:
    """How most weights are stored, None for a mix of packed kinds."""
    if not forms:
        counts: Counter[str] = Counter()
        for info in checkpoint.infos.values():
            counts[PLAIN.get(info.dtype, "bf16")] += info.count
        return counts.most_common(1)[0][0] if counts else "bf16"
    kinds = {form.kind.lower().split()[0] for form in forms.values()}
    return kinds.pop() if len(kinds) == 1 else None


def held_bytes(checkpoint: Checkpoint, forms: dict[str, Form]) -> dict[str, int]:
    """Bytes of every tensor in memory: packed ones as they are or as a layout makes them, the others in 16 bits."""
    laid = {path: form.held for path, form in forms.items() if form.held}
    found = {name: _held(info, _path(name) in forms) for name, info in checkpoint.infos.items()}
    found |= {name: 0 for name in found if _path(name) in laid and not name.endswith(".bias")}
    return found | {f"{path}.weight": held for path, held in laid.items()}


def _path(name: str) -> str:
    """The module of a tensor; bitsandbytes' side tensors are called `X.weight.absmax`."""
    return name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]


def _held(info: TensorInfo, packed: bool) -> int:
    return info.end - info.start if packed else 2 * info.count
