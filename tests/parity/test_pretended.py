"""Drawings on GPUs that aren't there (`pretend`): nothing stays on the CPU that is needed there, what is streamed has
arrived, recorded steps do what steps do. The pictures are the CPU's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import tiny21
import torch

import controls
from lanting import Engine, Request
from lanting.kernels.build import compiler
from loras import over_attention
from plans import plan
from pretend import pretend
from pretend_streams import GPU, Refused

THERE = torch.cuda.is_available() or torch.backends.mps.is_available()
pytestmark = [
    pytest.mark.skipif(THERE, reason="a GPU is here: what is pretended would stand in its way"),
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler: PyTorch can't be taught such devices"),
]
BASE, EDIT, NEW = "qwen-image", "qwen-image-edit-2511", "qwen-image-2.1"
SIDE = 64
PLAN = plan(resident_blocks=1, streamed="ram", encoder="unload", parked="ram")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {name: tiny.save_folder(root / name, name) for name in (BASE, EDIT)}
    made[NEW] = tiny21.save_folder(root / NEW)
    made["union"] = tiny.save_controlnet(root / "union")
    made["chain"] = controls.save(root / "chain.safetensors", controls.chain(2))
    made["fun"] = controls.save(root / "fun.safetensors", controls.fun(2))
    made["canny"] = controls.save_blockwise(root / "canny.safetensors", layers=2)
    made["lora"] = over_attention(root / "lora.safetensors", made[BASE], 1)
    return made


HINTS = tuple(tiny.picture(64, 48, seed=n) for n in (3, 4))
CONTROL = {"task": "controlnet", "images": HINTS, "size": (64, 48), "quality": "fast", "steps": 4}
REGIONS = [{"prompt": "a blue sign", "box": "left"}, {"prompt": "a green sign", "box": [0.25, 0, 1, 0.5]}]
HOLE = {"task": "controlnet_inpaint", "images": HINTS, "mask": tiny.mask(64, 48, (16, 0, 48, 48)), "size": (64, 64)}
ONE = {"images": (tiny.picture(64, 48, seed=1),)}
CASES = {  # what is asked, of which model, opened how
    "words": (BASE, {"prompt": ("a red sign", "a longer prompt")}, {}),
    "a LoRA over int8": (BASE, {}, {"loras": ("lora",), "quant": "int8"}),
    "two ControlNets": (BASE, CONTROL, {"controlnet": ("union", "canny")}),
    "a net that repaints, one behind blocks": (BASE, {**HOLE, "steps": 1}, {"controlnet": ("fun", "canny")}),
    "regions": (BASE, {"options": {"regions": REGIONS}, "quality": "fast", "steps": 4}, {}),
    "edit, streamed from RAM": (EDIT, ONE, {"plan": PLAN}),
    "edit, frozen references": (EDIT, {**ONE, "quality": "fast", "steps": 5}, {}),
    "2.1 in int4": (NEW, ONE, {"quant": "int4"}),
    "2.1 with a ControlNet": (NEW, {**HOLE, "quality": "fast", "steps": 4}, {"controlnet": ("chain",)}),
    "2.1, streamed from disk": (NEW, {}, {"plan": replace(PLAN, streamed="disk", parked="disk")}),
}
RECORDED = {"words", "a LoRA over int8", "two ControlNets", "regions", "edit, frozen references"}  # on CUDA
RECORDED |= {"a net that repaints, one behind blocks"}  # and no others
COMMON = {"prompt": "a red sign", "negative_prompt": "blurry", "steps": 2, "guidance_scale": 4.0, "seed": 7}
APPLE = ("words", "a LoRA over int8", "edit, streamed from RAM", "2.1 in int4")


def drawn(models, case, device):
    model, asked, options = CASES[case]
    for key in {"controlnet", "loras"} & set(options):
        options = {**options, key: [str(models[name]) for name in options[key]]}
    if "plan" in options:
        options = {**options, "plan": replace(options["plan"], device=device)}
    with Engine.open(str(models[model]), device=device, dtype="float32", **options) as engine:
        small = replace(engine.spec.defaults, vl_area=SIDE**2, vae_area=SIDE**2, size=(SIDE, SIDE))
        engine.models.spec = replace(engine.spec, defaults=small)
        if device == "cuda" and case in RECORDED:
            engine.run(Request(**{**COMMON, **asked}))  # recorded the second time, played back below
        return [np.asarray(image, np.int16) for image in engine.run(Request(**{**COMMON, **asked})).images]


@pytest.mark.parametrize(("case", "device"), [*((name, "cuda") for name in CASES), *((name, "mps") for name in APPLE)])
def test_a_drawing(models, case, device, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("LANTING_KERNELS", "off")
        here = drawn(models, case, "cpu")
    pretend(monkeypatch, device)
    there = drawn(models, case, device)
    apart = [np.abs(a - b) for a, b in zip(here, there, strict=True)]
    assert GPU.done > 500 and here[0].std() > 10
    assert max(x.mean() for x in apart) < 2 if "int" in case else max(x.max() for x in apart) <= 1
    assert (GPU.graphs > 0) == (device == "cuda" and case in RECORDED)


# ---------------------------------------------------------------- what is pretended would be noticed
@pytest.fixture(params=["cuda", "mps"])
def gpu(request, monkeypatch):
    pretend(monkeypatch, request.param)
    return request.param


def test_tensors_of_two_devices_do_not_meet(gpu):
    here, there = torch.ones(2, 3), torch.ones(2, 3, device=gpu)
    for work in (torch.add, lambda a, b: torch.cat([a, b]), lambda a, b: a @ b.mT, lambda a, b: a[b.long()]):
        with pytest.raises(Refused):
            work(here, there)
    with pytest.raises(Refused):
        torch.nn.functional.linear(there, here)
    total = (there + torch.tensor(2.0))[torch.tensor([1])].sum()  # one number, and places, may come from the CPU
    assert total.device.type == gpu and total.item() == 9 and (here + there.cpu()).tolist() == [[2.0] * 3] * 2
    if gpu == "mps":
        with pytest.raises(TypeError):
            there.double()


def test_what_nobody_waits_for_has_not_arrived(monkeypatch):
    pretend(monkeypatch)
    stream, room = torch.cuda.Stream(), torch.zeros(3, device="cuda")
    with torch.cuda.stream(stream):
        room.copy_(torch.ones(3), non_blocking=True)
        arrived = stream.record_event()
    assert room.tolist() == [0.0] * 3
    torch.cuda.current_stream().wait_event(arrived)
    assert room.tolist() == [1.0] * 3


def test_a_graph_does_its_work_again_and_refuses_what_it_can_not(monkeypatch):
    pretend(monkeypatch)
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x * 2)[1:] + 1
    assert y.isnan().all().item()
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    graph.replay()
    assert y.tolist() == [5.0, 7.0]
    for work in (lambda: x.sum().item(), lambda: x.copy_(torch.ones(3)), lambda: x.nonzero()):
        with pytest.raises(Refused), torch.cuda.graph(torch.cuda.CUDAGraph()):
            work()
