"""A GPU that isn't there: tensors that say they lie on it, while a CPU does their work.

What a machine without a GPU can't notice is where tensors lie: a schedule, a mask, a factor of a LoRA that stays on
the CPU is no mistake there and the end of a drawing on a GPU. Here such tensors refuse to meet, as they would there.
Copies on a stream of their own are put off until somebody waits for them, so that what nobody waits for is missed.
Graphs write down what is done and do it again; what may not be recorded is refused.

Numbers are the CPU's: speed, memory and rounding are not pretended. PyTorch's own FakeTensor has been looked at: it has
no numbers, so whatever depends on one ends there, and a picture can't be compared.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional
from torch.utils import _pytree as tree

from lanting.kernels.build import compiler
from pretend_streams import GPU, MAIN, Event, Graph, Refused, Stream, on_stream, recorded, tensors_in

HERE = torch.device("cpu")
GIB = 1 << 30
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
PLACES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
LACKS = {"cuda": (), "mps": (torch.float64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2)}

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
template <DeviceType T> struct First final : NoOpDeviceGuardImpl<T> {
  Device exchangeDevice(Device) const override { return Device(T, 0); }
  Device getDevice() const override { return Device(T, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(T, 0)); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, Device(T, 0)); }
};
C10_REGISTER_GUARD_IMPL(CUDA, First<DeviceType::CUDA>)
C10_REGISTER_GUARD_IMPL(MPS, First<DeviceType::MPS>)
}
"""


class Far(torch.Tensor):
    """A tensor that says it lies on a GPU. `kept` is what it is worth, on the CPU."""

    kept: torch.Tensor

    @staticmethod
    def __new__(cls, kept: torch.Tensor, device: torch.device) -> Far:
        if kept.dtype in LACKS[device.type]:
            raise TypeError(f"{device.type} has no {kept.dtype}")
        like = {"dtype": kept.dtype, "layout": kept.layout, "device": device}
        place = {"strides": kept.stride(), "storage_offset": kept.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, kept.size(), **place, **like)
        made.kept = kept
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return done(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Far({self.kept!r}, {self.device})"

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Far) -> None:  # `nn.Module.to` changes parameters this way
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.kept = other.kept

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            made: torch.Tensor = Far(self.kept.detach().clone(), self.device)
            made = torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made
            memo[id(self)] = made
        return memo[id(self)]

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.kept.data_ptr()

    def untyped_storage(self) -> Any:
        return self.kept.untyped_storage()


def indexed(device: Any) -> torch.device:
    device = torch.device(device)
    return device if device.type == "cpu" else torch.device(device.type, max(device.index or 0, 0))


def done(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation, on the CPU, if a GPU would do it; its results on the device where they would lie."""
    GPU.done += 1
    leaves, shape = tree.tree_flatten((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    home = check(func, tensors)
    if GPU.tape is not None:
        GPU.tape.check(func, tensors)
    plain = [x.kept if isinstance(x, Far) else x for x in leaves]
    wrappers = {id(x.kept): x for x in leaves if isinstance(x, Far)}
    args, kwargs = tree.tree_unflatten(plain, shape)
    if kwargs.get("device") is not None:
        asked = torch.device(kwargs["device"])
        far = asked.type in LACKS
        home = indexed(asked) if far else HERE
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        kwargs["device"] = HERE if far else asked
    if GPU.stream is not None and func is aten.copy_.default and not isinstance(tensors[1], Far):
        GPU.stream.later(lambda: args[0].copy_(args[1]))
        return leaves[0]
    out = func(*args, **kwargs)
    if GPU.tape is not None:
        GPU.tape.keep(func, args, kwargs, out)
    return tree.tree_map(lambda x: back(x, wrappers, home), out)


def back(x: Any, wrappers: dict[int, Far], home: torch.device) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    known = wrappers.get(id(x))
    if known is not None:
        assert known.shape == x.shape and known.stride() == x.stride(), "a tensor changed its shape in place"
        return known
    return x if home == HERE else Far(x, home)


def check(func: Any, tensors: list[torch.Tensor]) -> torch.device:
    """Where the result lies. Raises Refused where tensors may not meet."""
    if func in COPIES:
        return tensors[0].device
    asked = tensors[:1] if func in PLACES else [x for x in tensors if x.dim() or isinstance(x, Far)]
    homes = {x.device for x in asked}
    if len(homes) > 1:
        told = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise Refused(f"{func}: tensors of several devices: {told}")
    if func in PLACES and tensors[0].device == HERE and any(isinstance(x, Far) for x in tensors):
        raise Refused(f"{func}: places on a GPU of a tensor on the CPU")
    return homes.pop() if homes else tensors[0].device


@cache
def registered() -> torch.library.Library:
    """Teach PyTorch that there are such devices. It can't be undone, and nobody meets it who doesn't pretend."""
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD, encoding="utf-8")
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
        subprocess.run([*(compiler() or ["c++"]), str(source), *flags, abi, "-o", str(made)], check=True, timeout=120)
        torch.ops.load_library(made)
    library = torch.library.Library("aten", "IMPL")
    for key in ("CUDA", "MPS"):
        library.impl("empty.memory_format", empty, key)
        library.impl("empty_strided", empty_strided, key)
        library.impl("copy_", copied, key)
        for form in ("arange", "arange.start", "arange.start_step", "eye", "eye.m"):
            library.impl(form, partial(counted, getattr(torch, form.partition(".")[0])), key)
    return library


def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Far(torch.empty(size, dtype=dtype, memory_format=memory_format), indexed(device))


def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return Far(torch.empty_strided(size, stride, dtype=dtype), indexed(device))


def counted(make, *ends, dtype=None, layout=None, device=None, pin_memory=None):
    return Far(make(*ends, dtype=dtype), indexed(device))


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
    """PyTorch asks Apple's library which one to take before it asks the tensors."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, **more)[0]


def copied(self, src, non_blocking=False):
    self.kept.copy_(src.kept if isinstance(src, Far) else src)
    return self


def interpret(patch: Callable[..., None]) -> None:
    """Triton's interpreter works on the CPU, and takes what is worth something there."""
    from triton.runtime.interpreter import GridExecutor

    real = GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = tensors_in((args, kwargs))
        if len({x.device for x in tensors}) > 1:
            told = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
            raise Refused(f"{self.fn.__name__}: tensors of several devices: {told}")
        args, kwargs = tree.tree_map(lambda x: x.kept if isinstance(x, Far) else x, (args, kwargs))
        real(self, *args, **kwargs)
        if GPU.tape is not None:
            GPU.tape.keep(partial(real, self), args, kwargs, None)

    patch(GridExecutor, "__call__", call)


def facts(*_: Any) -> SimpleNamespace:
    return SimpleNamespace(name="pretended", total_memory=24 * GIB, major=8, minor=9, multi_processor_count=64)


def pretend(monkeypatch: Any, kind: str = "cuda", kernels: tuple[int, int] = (0, 0), count: int = 1) -> None:
    """From here on this process has a GPU, "cuda" or "mps". With `kernels` of (0, 0) it has none for Triton."""
    registered()
    GPU.stream, GPU.tape, GPU.graphs, GPU.count, GPU.done = None, None, 0, count, 0
    real, generator = torch.empty, torch.Generator
    patch = monkeypatch.setattr
    patch(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)  # a CPU's can't become a Far
    if kernels > (0, 0):
        interpret(patch)
    patch(torch, "empty", lambda *a, pin_memory=False, **k: real(*a, **k))
    patch(torch, "Generator", type("Generator", (), {"__new__": lambda *_: generator()}))
    patch(torch.Tensor, "pin_memory", lambda self, *_: self)
    if kind == "mps":
        patch(torch.backends.mps, "is_available", lambda: True)
        patch(torch.mps, "empty_cache", lambda: None)
        patch(functional, "scaled_dot_product_attention", attention)
        return
    cuda = torch.cuda
    for name, value in {
        "is_available": True,
        "device_count": count,
        "current_device": 0,
        "get_device_capability": kernels,
        "get_device_name": "pretended",
        "mem_get_info": (22 * GIB, 24 * GIB),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "get_per_process_memory_fraction": 1.0,
        "graph_pool_handle": (0, 0),
        "is_bf16_supported": True,
        "is_initialized": True,
    }.items():
        patch(cuda, name, lambda *_, value=value, **__: value)
    for name in ("_lazy_init", "empty_cache", "synchronize", "set_device", "set_per_process_memory_fraction"):
        patch(cuda, name, lambda *_, **__: None)
    patch(cuda, "reset_peak_memory_stats", lambda *_: None)
    patch(cuda, "get_device_properties", facts)
    patch(cuda, "is_current_stream_capturing", lambda: GPU.tape is not None)
    patch(cuda, "current_stream", lambda *_: GPU.stream or MAIN)
    patch(cuda, "device", lambda *_: nullcontext())
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    patch(cuda, "cudart", lambda: runtime)
    for name, value in {
        "stream": on_stream,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": recorded,
    }.items():
        patch(cuda, name, value)
