"""Modules from checkpoints: built on the meta device, their Linears replaced by what the file holds, then filled by
assignment, strictly.

On meta nothing is allocated and no random numbers are drawn for weights that are replaced a moment later; with
`assign=True` the mapped tensor becomes the parameter. Every missing, surplus or misshapen tensor is named. What is
packed in the file stays packed in memory; what is not may be packed on the way, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lanting.core.errors import ModelError
from lanting.nn.affine import AffineLinear, OrderedLinear
from lanting.nn.blocks import TYPES
from lanting.nn.fourbit import DividedLinear, Nvfp4Linear, TableLinear, untiled
from lanting.nn.linears import FP8, Fp8Linear, GgufLinear, Int4Linear, Int8Linear, PackedEmbedding, PackedLinear
from lanting.nn.lowrank import LowRankLinear
from lanting.nn.number_types import LEVELS
from lanting.nn.numbers import LevelLinear, NumberLinear
from lanting.nn.swap import swap
from lanting.weights.checkpoint import Checkpoint
from lanting.weights.form import SECOND, SVDQUANT, Form
from lanting.weights.forms import TILED, read_forms, side_tensors
from lanting.weights.schemes import bnb
from lanting.weights.schemes.compressed import FLOATS
from lanting.weights.schemes.foreign import contradicts
from lanting.weights.schemes.layouts import LAYOUTS

M = TypeVar("M", bound=nn.Module)
Choose = Callable[[str, tuple[int, int]], Form | None]
"""(path of a Linear, its (out, in)) -> what to pack it as; None leaves it as it is."""


@dataclass(frozen=True)
class Placing:
    """Where weights go, and as what."""

    dtype: torch.dtype
    device: torch.device
    choose: Choose | None = None  # packs the plain Linears of the file; None: they stay plain
    leave: tuple[str, ...] = ()  # names that start so stay on disk


def fill(module: M, state: Mapping[str, Tensor], label: str) -> M:
    """Assign `state` to a module built on meta: the same names and shapes, no more and no less."""
    check(module, {name: tuple(tensor.shape) for name, tensor in state.items()}, label)
    module.load_state_dict(dict(state), strict=True, assign=True)
    return module.eval().requires_grad_(False)


def check(module: nn.Module, found: Mapping[str, tuple[int, ...]], label: str) -> None:
    """Raises ModelError for the first tensor that is missing, surplus or of another shape than the module's."""
    wanted = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    missing = sorted(set(wanted) - set(found))
    surplus = sorted(set(found) - set(wanted))
    if missing:
        raise ModelError(
            "the {label} lacks {count} tensors, the first is {name}: download it again",
            **{"label": label, "count": len(missing), "name": missing[0]},
        )
    if surplus:
        raise ModelError(
            "the {label} has {count} tensors its config.json has no place for, the first is {name}: config and weights "
            "belong to different models",
            **{"label": label, "count": len(surplus), "name": surplus[0]},
        )
    for name, shape in found.items():
        if shape != wanted[name]:
            raise _misfit(label, name, shape, wanted[name])


def _misfit(label: str, name: str, shape: tuple[int, ...], asked: tuple[int, ...]) -> ModelError:
    return ModelError(
        "the {label} has {name} of shape {shape} where its config.json asks for {asked}: config and weights belong to "
        "different models",
        **{"label": label, "name": name, "shape": shape, "asked": asked},
    )


class NoInit(TorchFunctionMode):
    """Leaves new parameters as they are allocated.

    Their initial values are replaced anyway, and drawing normal numbers on meta makes torch import its compiler,
    which took longer than all the rest of loading a small model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def construct(make: Callable[[], M], label: str) -> M:
    """Build on meta; a config that describes no network is a sentence."""
    try:
        with torch.device("meta"), NoInit():
            return make()
    except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(
            "the config.json of the {label} describes no network we know ({error}): download it again",
            **{"label": label, "error": str(error)},
        ) from None


class Stored(Generic[M]):
    """A network and its weights on disk, to be read part by part, in any order, at any time and from any thread.

    Making one gives the module (on meta) the Linears that the file holds or `choose` asks for, still empty, and
    compares names and shapes by the headers: nothing is read before everything is known to fit.
    """

    def __init__(self, module: M, checkpoint: Checkpoint, placing: Placing):
        self.module, self.checkpoint, self.placing = module, checkpoint, placing
        forms = {path: form for path, form in read_forms(checkpoint).items() if not path.startswith(placing.leave)}
        self.forms, self.kept = forms, _swap_in(module, forms, checkpoint, placing.dtype)
        self.chosen = _swap_chosen(module, checkpoint, placing, set(forms))
        aside = side_tensors(checkpoint.infos)
        self.shapes: dict[str, tuple[int, ...]] = {}  # of all tensors, by their names in the module
        self.paths: dict[str, str] = {}  # of those that belong to a packed weight, by the same names
        for name in sorted(checkpoint.where, key=lambda name: (checkpoint.where[name], checkpoint.infos[name].start)):
            if name not in aside and not name.startswith(placing.leave):
                self._note(name, tuple(checkpoint.infos[name].shape))
        check(module, self.shapes, checkpoint.label)

    def _note(self, name: str, shape: tuple[int, ...]) -> None:
        """Write down what becomes of one tensor of the file."""
        path = name.removesuffix(".bias")
        if path != name and path in self.forms and "bias" in self.forms[path].names:  # in the layout of its weight
            self.shapes[name], self.paths[name] = shape, path
            return
        path = name.removesuffix(".weight")
        made = self.kept.get(path) or self.chosen.get(path, (None,))[0]
        if name == path or (made is None and path not in self.forms):
            self.shapes[name] = shape
        elif made is None:  # packed where the network has no Linear: expanded for good
            self.shapes[name], self.paths[name] = self.forms[path].shape, path
        else:
            for part, tensor in made.named_buffers():
                if part != "bias":
                    self.shapes[f"{self._place(path)}.{part}"] = tuple(tensor.shape)
                    self.paths[f"{self._place(path)}.{part}"] = path

    def _place(self, path: str) -> str:
        return f"{path}.table" if isinstance(self.module.get_submodule(path), PackedEmbedding) else path

    def read(self, names: Iterable[str], device: torch.device | None = None) -> dict[str, Tensor]:
        """Tensors by their names in the module, as it wants them, on `device` (None: the CPU, as views of the file
        where nothing is cast). All parts of a packed weight come together. Raises ModelError."""
        state: dict[str, Tensor] = {}
        for name in names:
            if name not in state:
                state |= self._read(name, device or torch.device("cpu"))
        return state

    def _read(self, name: str, device: torch.device) -> dict[str, Tensor]:
        path = self.paths.get(name)
        if path in self.kept:
            parts = _packed(self.kept[path], self._place(path), self.forms[path], self.checkpoint, self.placing.device)
            return {part: each.to(device) for part, each in parts.items()}
        if path in self.forms:
            return {name: expand(self.forms[path], self.checkpoint, replace(self.placing, device=device))}
        tensor = self.checkpoint.read([name if path is None else f"{path}.weight"]).popitem()[1]
        if not tensor.is_floating_point():
            label = self.checkpoint.label
            raise ModelError(
                "the {label} holds {name} as {dtype}, which is no weight type: get another",
                **{"label": label, "name": name, "dtype": tensor.dtype},
            )
        if path is None:
            return {name: tensor.to(device=device, dtype=self.placing.dtype)}
        form, home = self.chosen[path][1], self.placing.device
        packed = pack(form, tensor if has_no_floats(form, home) else tensor.to(home))
        return {f"{path}.{part}": kept_for(each, home).to(device) for part, each in packed.state_dict().items()}

    def fill(self, later: tuple[str, ...] = ()) -> M:
        """Read everything but names that start with one of `later`, which stay empty; one tensor at a time is cast,
        moved or packed, so nothing is held twice."""
        names = [name for name in self.shapes if not name.startswith(later)]
        self.module.load_state_dict(self.read(names, self.placing.device), strict=not later, assign=True)
        return self.module.eval().requires_grad_(False)


def make_linear(form: Form, bias: bool) -> PackedLinear:
    """An empty Linear of a form, on the device of the moment. Raises ValueError where its numbers contradict."""
    rows, columns = form.shape
    if form.rank:
        inner, smooth = replace(form, rank=0, rotate=0), form.program == SVDQUANT
        return LowRankLinear(make_linear(inner, bias=False), form.rank, bias, smooth, form.rotate)
    if form.numbers:
        cls = LevelLinear if form.numbers.endswith(LEVELS) else NumberLinear
        return cls(columns, rows, bias, form.numbers.removesuffix(LEVELS), form.group, form.rotate)
    if form.kind == "int8":
        return Int8Linear(columns, rows, bias, form.rotate, form.scale)
    if form.kind == "int4":
        return Int4Linear(columns, rows, bias, form.group, form.rotate)
    if form.kind.startswith("fp8 "):
        return Fp8Linear(columns, rows, bias, form.kind.split()[1], form.scale, form.rotate)
    if form.kind == "mxfp8":
        return Fp8Linear(columns, rows, bias, "e4m3", form.scale)
    if form.kind.startswith("uint"):
        cls = OrderedLinear if "order" in form.names else AffineLinear
        return cls(columns, rows, bias, int(form.kind.removeprefix("uint")), form.group)
    if form.kind == "nvfp4" and form.layout == FLOATS:
        return DividedLinear(columns, rows, bias)
    if form.kind == "nvfp4":
        return Nvfp4Linear(columns, rows, bias, in_rows=form.program == SVDQUANT)
    if form.kind in bnb.NOTES.values():
        return TableLinear(columns, rows, bias, form.kind, form.group, form.nested)
    return GgufLinear(columns, rows, bias, form.kind, TYPES[form.kind].row_bytes(columns))


def pack(form: Form, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """A dense weight (out, in) in a form: rounded where it is. Of `form` the kind, group, rotation and the shape of
    the scales count. Raises ValueError for a GGUF type, which is not rounded to here."""
    rotate = form.rotate
    if form.kind == "int8":
        groups = form.scale[1] if form.scale is not None and len(form.scale) == 2 else 1
        return Int8Linear.from_dense(weight, bias, group=weight.shape[1] // groups if groups > 1 else 0, rotate=rotate)
    if form.kind == "int4":
        return Int4Linear.from_dense(weight, bias, group=form.group, rotate=rotate)
    if form.kind.startswith("fp8 "):
        scale = None if form.scale is None else "tensor" if form.scale == () else "channel"
        return Fp8Linear.from_dense(weight, bias, kind=form.kind.split()[1], scale=scale, rotate=rotate)
    raise ValueError(f"no Linear is rounded to {form.kind} while it is loaded")


def expand(form: Form, checkpoint: Checkpoint, placing: Placing) -> Tensor:
    """A packed weight of the file as plain floats (out, in)."""
    return loaded(form, checkpoint, placing).dense(placing.dtype)


def loaded(form: Form, checkpoint: Checkpoint, placing: Placing) -> PackedLinear:
    """A packed weight of the file as its Linear; the bias only where it is in the layout of the weight."""
    try:
        with torch.device("meta"):
            linear = make_linear(form, "bias" in form.names)
    except ValueError as error:
        raise contradicts(checkpoint, form.names["weight"], str(error)) from None
    parts = _packed(linear, "", form, checkpoint, placing.device)
    linear.load_state_dict({part: each.to(placing.device) for part, each in parts.items()}, assign=True)
    return linear


def _swap_in(
    module: nn.Module, forms: Mapping[str, Form], checkpoint: Checkpoint, dtype: torch.dtype
) -> dict[str, PackedLinear]:
    """Put packed Linears (and one packed embedding) where the file has them. Returns them by path."""
    made: dict[str, PackedLinear] = {}

    def make(path: str, old: nn.Module) -> nn.Module | None:
        form = forms.get(path)
        if form is None:
            return None
        if isinstance(old, nn.Embedding):
            if not path.endswith("embed_tokens"):
                return None
            asked, bias = (old.num_embeddings, old.embedding_dim), False
        else:
            assert isinstance(old, nn.Linear)
            asked, bias = (old.out_features, old.in_features), old.bias is not None
        if form.shape != asked:
            raise _misfit(checkpoint.label, f"{path}.weight", form.shape, asked)
        try:
            with torch.device("meta"):
                made[path] = make_linear(form, bias)
        except ValueError as error:
            raise contradicts(checkpoint, path, str(error)) from None
        return made[path] if isinstance(old, nn.Linear) else PackedEmbedding(made[path], dtype)

    swap(module, (nn.Linear, nn.Embedding), make)
    return made


def _packed(
    linear: PackedLinear, path: str, form: Form, checkpoint: Checkpoint, home: torch.device
) -> dict[str, Tensor]:
    """The stored parts of one Linear, by the names they have in the module, for the device `home`; nothing is cast."""
    read = checkpoint.read(form.names.values())
    parts = {part: read[name] for part, name in form.names.items()}
    if form.layout:
        held = LAYOUTS[form.layout](form, parts)
    else:
        held = {part: _as_held(linear, form, part, each) for part, each in parts.items()}
    return {f"{path}.{part}".lstrip("."): kept_for(each, home) for part, each in held.items()}


def _as_held(linear: PackedLinear, form: Form, part: str, stored: Tensor) -> Tensor:
    """A part of a packed weight as the Linear holds it: mostly as it is stored."""
    if part == "weight":
        # a file may call the bytes of 8-bit floats uint8, and bitsandbytes keeps 4 bits in one column
        tensor = stored.view(linear.stored) if isinstance(linear, Fp8Linear) else stored
        return tensor.view(linear.weight.shape) if form.kind in bnb.NOTES.values() else tensor
    if part != "weight_scale":
        return stored.reshape(()) if part == SECOND else stored
    if form.names[part].endswith(f".{bnb.ROWS}"):
        return stored.float() / 127
    if form.kind in TILED and form.scale is not None:
        scale = untiled(stored.view(torch.uint8), *form.scale)
        return scale if form.kind == "nvfp4" else torch.exp2(scale.float() - 127).bfloat16()  # exponents: exact
    return stored


def has_no_floats(form: Form, device: torch.device) -> bool:
    """Whether a device knows no 8-bit floats, which a form is of: Apple's GPUs."""
    return device.type == "mps" and form.kind.startswith("fp8 ")


def kept_for(tensor: Tensor, home: torch.device) -> Tensor:
    """A part as it is kept for the device where it computes in the end, even while it waits in RAM or streams: 8-bit
    floats as bytes where that has no such type."""
    return tensor.view(torch.uint8) if home.type == "mps" and tensor.dtype in FP8.values() else tensor


def _swap_chosen(
    module: nn.Module, checkpoint: Checkpoint, placing: Placing, packed: set[str]
) -> dict[str, tuple[PackedLinear, Form]]:
    """Put empty packed Linears where the file has plain ones that `choose` wants packed. Returns them by path."""
    made: dict[str, tuple[PackedLinear, Form]] = {}

    def make(path: str, old: nn.Module) -> nn.Module | None:
        assert isinstance(old, nn.Linear)
        shape = (old.out_features, old.in_features)
        info = checkpoint.infos.get(f"{path}.weight")
        if placing.choose is None or path in packed or info is None or tuple(info.shape) != shape:
            return None
        form = placing.choose(path, shape)
        if form is None:
            return None
        with torch.device("meta"):
            made[path] = make_linear(form, old.bias is not None), form
        return made[path][0]

    swap(module, nn.Linear, make)
    return made
