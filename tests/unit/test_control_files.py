"""ControlNets in every file that people have: told by their tensors, drawn with, counted, recorded, and refused.

The blockwise ones draw end to end here, with a transformer of as many blocks.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch

import controls
import nets
import plans
from controls import drawn, english, far  # noqa: F401  a fixture
from lanting import Engine, LantingError, Request
from lanting.cli.main import main
from lanting.core.errors import ModelError, RequestError
from lanting.core.recipe import read_recipe
from lanting.plan.model import job_of, release
from lanting.specs import get_spec
from lanting.specs.settle import settle
from lanting.weights.build import store_controlnet
from lanting.weights.controls import check_controlnet, open_controlnet
from lanting.weights.inspect import describe
from lanting.weights.sized import beside
from lanting.weights.stored import Placing

ASKED: dict[str, Any] = {
    "prompt": "a sign",
    "size": (64, 48),
    "seed": 5,
    "steps": 3,
    "guidance_scale": 3.0,
    "negative_prompt": "x",
}
LAYERS = 4
EDGES = tiny.picture(64, 48, seed=4)
HOLE = tiny.mask(64, 48, (16, 16, 48, 48))


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A model, ControlNets of both builds, and a picture to follow."""
    place = tmp_path_factory.mktemp("controls")
    tiny.save_folder(place / "model", layers=LAYERS, shard="100KB")
    tiny.save_controlnet(place / "union")
    tiny.save_controlnet(place / "hole", extra=4, layers=2)
    controls.save_blockwise(place / "canny.safetensors")
    controls.save_blockwise(place / "inpaint.safetensors", channels=68)
    EDGES.save(place / "edges.png")
    HOLE.save(place / "mask.png")
    return place


def request(task: str = "controlnet", **more: Any) -> Request:
    steered: dict[str, Any] = {"images": (EDGES,)} if task.startswith("controlnet") else {}
    return Request(**{**ASKED, **steered, "task": task, **more})


def opened(here: Path, net: str | Path | list[str] | None = None, **options: Any) -> Engine:
    given: dict[str, Any] = {"device": "cpu", "dtype": "float32"} | options
    if isinstance(net, list):
        return Engine.open(str(here / "model"), controlnet=[str(here / each) for each in net], **given)
    return Engine.open(str(here / "model"), controlnet=None if net is None else here / net, **given)


def draw(here: Path, net: str | Path | list[str] | None, asked: Request, **options: Any) -> bytes:
    return drawn(opened(here, net, **options), asked)


@pytest.fixture(scope="module")
def steered(here) -> bytes:
    return draw(here, "canny.safetensors", request())


# ---------------------------------------------------------------- InstantX's nets as single files
def weights_of(here: Path, net: Path) -> dict[str, torch.Tensor]:
    with opened(here, net) as engine:
        return {name: tensor.clone() for name, tensor in engine.models.controlnets[0].state_dict().items()}


@pytest.mark.parametrize(("folder", "task"), [("union", "controlnet"), ("hole", "controlnet_inpaint")])
def test_a_file_draws_what_its_folder_draws(here, tmp_path, folder, task):
    asked = request(task, mask=HOLE if task != "controlnet" else None)
    file = tmp_path / "some.safetensors"
    shutil.copy(here / folder / "diffusion_pytorch_model.safetensors", file)
    assert draw(here, file, asked) == draw(here, folder, asked) != draw(here, None, request("text_to_image"))


@pytest.mark.parametrize("prefix", ["controlnet.", "model.diffusion_model.", "control_model.", "transformer."])
@pytest.mark.parametrize("build", ["union", "canny.safetensors"])
def test_a_prefix_is_taken_off(here, tmp_path, build, prefix):
    """Weights that begin elsewhere in memory may meet products that round otherwise, so weights are compared."""
    tensors = controls.tensors_in(here / "union") if build == "union" else controls.blockwise()
    file = controls.save(tmp_path / "some.safetensors", tensors, prefix)
    found, wanted = weights_of(here, file), weights_of(here, here / build)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert far(draw(here, file, request()), draw(here, build, request())) <= 1


def test_a_folder_without_a_config_is_read_like_a_file(here, tmp_path):
    shutil.copytree(here / "union", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    assert draw(here, tmp_path / "bare", request()) == draw(here, "union", request())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_cast_as_ever(here, tmp_path, dtype):
    halves = {name: tensor.to(dtype) for name, tensor in controls.tensors_in(here / "union").items()}
    whole = {name: tensor.float() for name, tensor in halves.items()}
    files = [controls.save(tmp_path / f"{i}.safetensors", each) for i, each in enumerate((halves, whole))]
    found, wanted = (weights_of(here, file) for file in files)
    assert all(torch.equal(found[name], wanted[name]) for name in whole)
    assert far(draw(here, files[0], request()), draw(here, files[1], request())) <= 1


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale", None])
@pytest.mark.parametrize("build", ["union", "canny"])
def test_eight_bit_files_stay_packed(here, tmp_path, build, scale):
    tensors = controls.tensors_in(here / "union") if build == "union" else controls.blockwise()
    packed = controls.scaled(tensors, scale or "scale_weight")
    if scale is None:  # plainly cast down
        packed = {
            name: tensors[name].to(torch.float8_e4m3fn) if tensor.dtype == torch.float8_e4m3fn else tensor
            for name, tensor in packed.items()
            if not name.endswith("scale_weight")
        }
    dense = dict(tensors)
    for name, tensor in packed.items():
        if tensor.dtype == torch.float8_e4m3fn:
            dense[name] = tensor.float() * packed.get(f"{name.removesuffix('weight')}{scale}", torch.tensor(1.0))
    paths = [controls.save(tmp_path / f"{i}.safetensors", each) for i, each in enumerate((packed, dense))]
    with opened(here, paths[0]) as engine:
        found = engine.run(request()).images[0].tobytes()
        linears = 14 + 1 if build == "union" else 2 * LAYERS  # of a block and behind it
        assert nets.packed_linears(engine.models.controlnets[0]) == linears
    assert far(found, draw(here, paths[1], request())) <= 2


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
@pytest.mark.parametrize("build", ["union", "canny"])
def test_gguf_files_are_read_like_the_transformer_s(here, tmp_path, build, kind):
    """Written by the `gguf` package, as converters do; packed matrices stay packed."""
    tensors = controls.tensors_in(here / "union") if build == "union" else controls.blockwise()
    dense, file = dict(tensors), tmp_path / "net.gguf"
    writer = gguf.GGUFWriter(file, "qwen_image")
    for name, tensor in tensors.items():
        wide = "blocks." in name and tensor.ndim == 2
        form = gguf.GGMLQuantizationType[kind if wide else "F32"]
        raw = gguf.quants.quantize(tensor.numpy(), form)
        dense[name] = torch.from_numpy(gguf.quants.dequantize(raw, form).reshape(tensor.shape))
        writer.add_tensor(f"controlnet.{name}", raw, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with opened(here, file) as engine:
        found = engine.run(request())
        assert nets.packed_linears(engine.models.controlnets[0]) == (
            0 if kind != "Q8_0" else 14 + 1 if build == "union" else 2 * LAYERS
        )
    assert far(found.images[0].tobytes(), draw(here, controls.save(tmp_path / "d.safetensors", dense), request())) <= 2
    assert beside((), [str(file)]) == open_controlnet(file).checkpoint.bytes() < file.stat().st_size


# ---------------------------------------------------------------- several nets
def test_a_net_that_is_given_twice_is_one_net(here):
    pair = (EDGES, tiny.picture(64, 48, seed=9))
    for net in ("union", "canny.safetensors"):
        with opened(here, [net, net]) as engine:
            found = engine.run(request(images=pair, options={"control_scale": (0.5, 1)}))
            assert len(engine.models.placed_controlnets) == 1
        assert found.images[0].tobytes() == draw(here, net, request(images=pair, options={"control_scale": (0.5, 1)}))


def test_several_nets_draw_together(here, steered):
    """Of both builds; one that counts for nothing changes no bit, and the order is told by the recipe."""
    other = tiny.picture(64, 48, seed=9)
    asked = request(images=(EDGES, other), options={"control_scale": (1, 0)})
    assert draw(here, ["canny.safetensors", "union"], asked) == steered
    assert draw(here, ["union", "canny.safetensors"], asked) == draw(here, "union", request())
    both = request(images=(EDGES, other))
    with opened(here, ["canny.safetensors", "union"]) as engine:
        result = engine.run(both)
        named = {name: engine.models.placed_by(name).net for name in ("controlnet", "controlnet2")}
        assert list(named.values()) == list(engine.models.controlnets)
    assert result.images[0].tobytes() != steered
    assert [net["name"] for net in result.recipes[0].controlnets] == ["canny.safetensors", "union"]
    plan = plans.plan(blocks=LAYERS, streamed="disk", resident_blocks=0)
    assert draw(here, ["canny.safetensors", "union"], both, plan=plan) == result.images[0].tobytes()


def test_a_net_that_repaints_beside_one_that_follows(here):
    other = tiny.picture(96, 48, seed=9)
    asked = request("controlnet_inpaint", images=(other, EDGES), mask=HOLE, options={"control_scale": (0, 1)})
    alone = request("controlnet_inpaint", mask=HOLE)
    for follows, repaints in (("canny.safetensors", "hole"), ("union", "inpaint.safetensors")):
        assert draw(here, [follows, repaints], asked) == draw(here, repaints, alone)
    assert draw(here, ["union", "inpaint.safetensors"], replace(asked, options={})) != draw(here, repaints, alone)


@pytest.mark.parametrize(
    ("given", "more", "words"),
    [
        (["union", "canny.safetensors"], {}, "2 ControlNets and 1 control pictures were given: give each net one"),
        (["union"] * 2, {"images": (EDGES,) * 3}, "2 ControlNets and 3 control pictures were given"),
        (["union", "hole"], {"images": (EDGES,) * 2}, "the ControlNet hole repaints: give it a mask"),
        (["hole"], {"task": "controlnet_inpaint", "mask": HOLE, "images": (EDGES,) * 2}, "repaints one picture, and 2"),
        (
            ["union", "canny.safetensors"],
            {"task": "controlnet_inpaint", "mask": HOLE, "images": (EDGES,) * 2},
            "the ControlNet union, canny.safetensors reads no mask",
        ),
        (
            ["hole", "union"],
            {"task": "controlnet_inpaint", "mask": HOLE, "images": (tiny.picture(96, 48), EDGES)},
            "the mask is 64×48 and the picture 96×48",
        ),
        (["union"] * 5, {"images": (EDGES,) * 5}, "takes at most 4 pictures"),
        (["union"] * 2, {"images": (EDGES,) * 2, "options": {"control_scale": (1, 1, 1)}}, "has 3 numbers for 2"),
    ],
)
def test_what_several_nets_are_refused(here, given, more, words):
    with opened(here, given) as engine, pytest.raises(LantingError, match=words):
        engine.stream(request(**more))


# ---------------------------------------------------------------- blockwise, end to end
def test_scale_0_is_no_net_bit_for_bit(here, steered):
    idle = draw(here, "canny.safetensors", request(options={"control_scale": 0}))
    assert idle == draw(here, None, request("text_to_image")) != steered


def test_start_and_end(here, steered):
    first, last = ({"control_end": 0.4}, {"control_start": 0.6})
    parts = [draw(here, "canny.safetensors", request(options=options)) for options in (first, last)]
    assert len({*parts, steered, draw(here, None, request("text_to_image"))}) == 4


def test_two_pictures_count_each_by_its_scale(here, steered):
    other = tiny.picture(64, 48, seed=9)
    both = request(images=(EDGES, other), options={"control_scale": (1, 0)})
    assert draw(here, "canny.safetensors", both) == steered
    assert draw(here, "canny.safetensors", request(images=(EDGES, other))) != steered


def test_with_a_mask_the_hole_is_black_and_told(here):
    """White of the mask is drawn anew: what the picture has there is not seen."""
    with Engine.open(
        str(here / "model"), device="cpu", dtype="float32", controlnet=str(here / "inpaint.safetensors")
    ) as e:
        heard = []
        (net,) = e.models.controlnets
        net.img_in.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
        asked = request("controlnet_inpaint", mask=HOLE)
        found = e.run(asked).images[0].tobytes()
        filled = EDGES.copy()
        filled.paste((9, 200, 30), (16, 16, 48, 48))
        assert e.run(request("controlnet_inpaint", images=(filled,), mask=HOLE)).images[0].tobytes() == found
        black = EDGES.copy()
        black.paste((0, 0, 0), (16, 16, 48, 48))
        seen = heard[0].unflatten(2, (17, 4))[0]  # (12, 17, 4)
        known = seen[:, 16].reshape(3, 4, 2, 2)
        assert known[0].unique().tolist() == [1.0] and known[1, 1].unique().tolist() == [0.0]
        pixels = torch.tensor(list(black.tobytes())).view(48, 64, 3).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            latents = e.models.codec.latents(pixels.float())
        from lanting.flow.latents import pack

        assert torch.allclose(pack(latents)[0].unflatten(1, (16, 4)), seen[:, :16], atol=1e-5)


def test_more_pictures_at_once(here):
    pair = draw(here, "canny.safetensors", request(count=2))
    alone = [draw(here, "canny.safetensors", request(seed=seed)) for seed in (5, 6)]
    assert far(pair, b"".join(alone)) <= 1
    joined = draw(here, "canny.safetensors", request(options={"batched_guidance": True}))
    assert far(joined, alone[0]) <= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"streamed": "disk", "resident_blocks": 0},
        {"streamed": "disk", "resident_blocks": 2},
        {"encoder": "unload", "streamed": "disk", "resident_blocks": 0},
    ],
    ids=["streamed", "half streamed", "turns"],
)
def test_by_any_plan_it_is_the_same_picture(here, steered, changes):
    plan = plans.plan(blocks=LAYERS, **{"resident_blocks": LAYERS, **changes})
    assert draw(here, "canny.safetensors", request(), plan=plan) == steered


def test_with_the_modulation_s_table(here, steered):
    plan = plans.plan(blocks=LAYERS, modulation_table=True, streamed="disk", resident_blocks=0)
    assert far(draw(here, "canny.safetensors", request(), plan=plan), steered) <= 1


def test_packed_while_it_is_loaded(here, steered):
    with opened(here, "canny.safetensors", quant="int8") as engine:
        found = engine.run(request()).images[0].tobytes()
        assert nets.packed_linears(engine.models.controlnets[0]) == 2 * LAYERS
        assert nets.packed_linears(engine.models.transformer) == 14 * LAYERS
    assert found != steered


@pytest.mark.parametrize("quality", ["high", "balanced", "fast"])
def test_with_the_dial(here, quality):
    """What was left out is in the recipe, and the recipe draws the same picture."""
    asked = request(steps=12, quality=quality)
    with Engine.open(
        str(here / "model"), device="cpu", dtype="float32", controlnet=str(here / "canny.safetensors")
    ) as e:
        exact = e.run(request(steps=12)).images[0].tobytes()
        result = e.run(asked)
        again = e.run(request(steps=12, quality=quality, choices=result.recipes[0].request["choices"]))
    words = result.recipes[0].request["choices"]["steps"].split()
    assert len(words) == 12 and result.images[0].tobytes() == again.images[0].tobytes()
    if quality == "fast":
        assert any(word != "FF" for word in words)
    assert far(result.images[0].tobytes(), exact) <= 90


def test_drawings_that_share_steps_are_each_steered_alone(here, steered):
    plain = request("text_to_image")
    with Engine.open(
        str(here / "model"), device="cpu", dtype="float32", controlnet=str(here / "canny.safetensors")
    ) as e:
        shared = e.together(forced=True)
        seats = [shared.join(asked) for asked in (request(), plain)]
        results = {}
        while len(results) < 2 and not shared.apart:
            for seat, event in shared.round():
                if hasattr(event, "images"):
                    results[id(seat)] = event.images[0].tobytes()
        shared.close()
        found = [results[id(seat)] for seat in seats]
    assert far(found[0], steered) <= 1 and far(found[1], draw(here, None, plain)) <= 1 < far(*found)


def test_in_halves_it_draws_too(here, steered):
    for dtype in ("bfloat16", "float16", "transformer=bfloat16,controlnet=float32"):
        assert far(draw(here, "canny.safetensors", request(), dtype=dtype), steered) < 256


# ---------------------------------------------------------------- in context
def write_lora(path: Path) -> Path:
    """In DiffSynth's dialect."""
    draw = torch.Generator().manual_seed(2)
    sides = {"lora_A": (4, 32), "lora_B": (32, 4)}
    path_of = "transformer_blocks.1.attn.to_q.{}.default.weight".format
    return controls.save(path, {path_of(name): torch.randn(*side, generator=draw) for name, side in sides.items()})


def test_in_context_the_picture_stands_behind_the_target(here, tmp_path):
    lora = write_lora(tmp_path / "union.safetensors")
    asked = request(options={"in_context": True})
    with opened(here, loras=[str(lora)]) as engine:
        heard = []
        net = engine.models.transformer
        net.register_forward_pre_hook(lambda module, args: heard.append((args[0].shape[1], args[4])))
        result = engine.run(asked)
        read = list(engine.models.prompts)
        plain = engine.run(request("text_to_image")).images[0].tobytes()
        other = engine.run(request(images=(tiny.picture(64, 48, seed=9),), options={"in_context": True}))
    assert heard[0] == (24, ((1, 3, 4), (1, 3, 4)))
    assert ("Context_Control. a sign",) in [words for words, _ in read] and ("x",) in [words for words, _ in read]
    assert len({result.images[0].tobytes(), plain, other.images[0].tobytes()}) == 3
    told = result.recipes[0].request
    assert (
        told["prompt"] == "a sign" and told["options"] == {"in_context": True} and result.recipes[0].controlnet is None
    )


def test_what_in_context_has_no_meaning_for(here, tmp_path):
    spec = get_spec("qwen-image")
    for more, words in (
        ({"options": {"in_context": True, "control_scale": 0.5}}, "control_scale has no meaning in context"),
        (
            {"options": {"in_context": True}, "images": (EDGES, EDGES)},
            "one control picture can stand in context",
        ),
        ({"options": {"in_context": "yes"}}, "in_context must be true or false"),
    ):
        with pytest.raises(RequestError, match=words):
            settle(request(**more), spec)
    settled = settle(request(options={"in_context": True}), spec)
    assert settle(settled, spec) == settled
    job = job_of(settled, release(spec))
    assert job.references == ((64, 48),) and job_of(settle(request(), spec), release(spec)).references == ()
    for options, words in (
        ({}, "open the model together with one"),
        ({"controlnet": str(here / "union")}, "leave the ControlNet out"),
    ):
        with (
            Engine.open(str(here / "model"), device="cpu", **options) as engine,
            pytest.raises(LantingError, match=words),
        ):
            engine.stream(request(options={"in_context": True}))


# ---------------------------------------------------------------- refusals
def transformer(**changes) -> dict:
    shape = {"num_layers": LAYERS, **{key: value for key, value in tiny.NET.items() if key != "patch_size"}}
    return {**shape, **changes}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        ({"layers": 3}, "has num_layers = 3 and the model 4"),
        ({"width": 48}, "has width = 48 and the model 32"),
        ({"channels": 72}, "reads 72 channels where the model has 64"),
    ],
)
def test_a_net_of_another_model_is_told_before_weights_are_read(here, tmp_path, make, words, monkeypatch):
    from lanting.weights.checkpoint import Checkpoint

    path = controls.save_blockwise(tmp_path / "net.safetensors", **make)
    monkeypatch.setattr(Checkpoint, "read", lambda self, names: pytest.fail("weights were read"))
    with pytest.raises(ModelError, match=words):
        Engine.open(str(here / "model"), device="cpu", controlnet=str(path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 3}, "has width = 32 and the model 48"),
        ({"num_attention_heads": 1, "attention_head_dim": 32}, "has attention_head_dim = 16 and the model 32"),
        ({"joint_attention_dim": 64}, "has joint_attention_dim = 32 and the model 64"),
        ({"in_channels": 16}, "reads 64 channels where the model has 16"),
        ({"_class_name": "QwenImage21Transformer2DModel"}, "this model is another"),
    ],
)
def test_instantx_s_are_compared_too(here, changes, words):
    found = open_controlnet(here / "union")
    with pytest.raises(ModelError, match=words):
        check_controlnet(found, transformer(**changes))
    assert check_controlnet(found, transformer()).masked is False
    assert check_controlnet(open_controlnet(here / "hole"), transformer()).masked is True


@pytest.mark.parametrize("change", ["missing", "surplus", "misshapen"])
@pytest.mark.parametrize("build", ["union", "canny"])
def test_loading_is_strict(here, tmp_path, build, change):
    tensors = controls.tensors_in(here / "union") if build == "union" else controls.blockwise()
    name = "transformer_blocks.0.attn.to_q.bias" if build == "union" else "controlnet_blocks.2.output_proj.bias"
    if change == "missing":
        del tensors[name]
    elif change == "surplus":
        name = "controlnet_blocks.0.strange.weight"
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = torch.zeros(7)
    path = controls.save(tmp_path / "net.safetensors", tensors)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        found = check_controlnet(open_controlnet(path), transformer(axes_dims_rope=(4, 6, 6)))
        store_controlnet(found.checkpoint, found.config, Placing(torch.float32, torch.device("cpu")))


def test_files_that_are_no_controlnets(here, tmp_path):
    body = here / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    other = controls.save(tmp_path / "other.safetensors", {"conv.weight": torch.zeros(3, 3)})
    mixed = controls.save(tmp_path / "mixed.safetensors", controls.blockwise(), "controlnet.")
    both = {**controls.blockwise(), "vae.decoder.conv_in.weight": torch.zeros(1)}
    (tmp_path / "some.gguf").write_bytes(b"GGUF" + bytes(60))
    (tmp_path / "some.bin").write_bytes(b"PK\x03\x04" + bytes(60))
    (tmp_path / "empty").mkdir()
    assert open_controlnet(mixed).blockwise
    whole = controls.save(tmp_path / "whole.safetensors", tiny_transformer(here))
    for path, words in (
        (tmp_path / "gone", "there is no ControlNet at .*gone: give a file, or a folder"),
        (other, "holds no ControlNet"),
        (whole, "holds no ControlNet"),
        (
            controls.save(tmp_path / "both.safetensors", both),
            "1 tensors that are no part of a ControlNet, the first is vae",
        ),
        (tmp_path / "some.gguf", "some.gguf is damaged"),
        (tmp_path / "some.bin", "is pickled"),
        (tmp_path / "empty", "holds no safetensors weights"),
    ):
        with pytest.raises(ModelError, match=words):
            open_controlnet(path)
    assert not body.is_file()  # sharded
    with pytest.raises(ModelError, match="holds no transformer but controlnet: give it with --controlnet"):
        Engine.open(str(here / "canny.safetensors"))


def tiny_transformer(here: Path) -> dict[str, torch.Tensor]:
    return dict(tiny.our_transformer(tiny.transformer()).state_dict())


@pytest.mark.parametrize(
    ("net", "task", "words"),
    [
        ("canny.safetensors", "controlnet_inpaint", "reads no mask: leave it out"),
        ("union", "controlnet_inpaint", "reads no mask: leave it out"),
        ("inpaint.safetensors", "controlnet", "repaints: give it a mask"),
        ("hole", "controlnet", "repaints: give it a mask"),
        (None, "controlnet", "controlnet needs a ControlNet"),
    ],
)
def test_masks_go_with_nets_that_read_them(here, net, task, words):
    """Said before anything is loaded."""
    asked = request(task, mask=HOLE if task != "controlnet" else None)
    with opened(here, net) as engine:
        with pytest.raises(LantingError, match=words):
            engine.stream(asked)
        assert "placed_transformer" not in engine.models.__dict__


def test_several_devices_are_refused(here):
    with pytest.raises(RequestError, match="one device has to draw"):
        Engine.open(str(here / "model"), device="cpu,cpu", controlnet=str(here / "canny.safetensors"))


# ---------------------------------------------------------------- told, counted, recorded
def test_show_names_them(here, capsys):
    for name, words in (("canny", "controlnet, blockwise, 4 blocks"), ("inpaint", "blockwise, 4 blocks, reads a mask")):
        assert main(["show", str(here / f"{name}.safetensors")]) == 0
        told = capsys.readouterr().out
        assert words in told and f"--controlnet {here / name}.safetensors --control PICTURE" in told
    assert describe(str(here / "hole")).parts[0].kind.detail == "2 blocks, reads a mask"
    assert describe(str(here / "union")).parts[0].kind.detail == "1 blocks"


def test_the_plan_counts_them(here, tmp_path, capsys):
    large = controls.save(tmp_path / "large.safetensors", controls.blockwise(LAYERS, 768))
    peaks = []
    for more in ([], ["--controlnet", str(large)], ["--controlnet", str(large), "--controlnet", str(here / "union")]):
        assert main(["plan", "qwen-image", "--device", "RTX 4090", "--json", *more]) == 0
        peaks.append(json.loads(capsys.readouterr().out)["chosen"]["peak_vram"])
    assert 0 < peaks[1] - peaks[0] < 2 * large.stat().st_size
    assert 1 <= (peaks[2] - peaks[1]) / open_controlnet(here / "union").checkpoint.bytes() < 1.1
    assert main(["plan", "qwen-image", "--controlnet", str(tmp_path / "gone")]) == 2
    assert "there is no ControlNet at" in capsys.readouterr().err


def test_the_command_line_draws_and_replays(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    words = ["generate", "a sign", "--model", "model", "--controlnet", "canny.safetensors", "--control", "edges.png"]
    more = ["--steps", "2", "--size", "64x48", "--device", "cpu", "--seed", "3", "--force", "-o", "a.png"]
    assert main([*words, *more]) == 0
    told = read_recipe("a.png").controlnet
    assert told is not None and (told["name"], told["path"]) == ("canny.safetensors",) * 2
    again = ["replay", "a.png", "--model", "model", "--device", "cpu", "--force"]
    capsys.readouterr()
    assert main(again) == 0 and "identical, pixel for pixel" in capsys.readouterr().out
    shutil.move("canny.safetensors", "moved.safetensors")
    try:
        assert main(again) == 2 and "canny.safetensors is not here any more" in capsys.readouterr().err
        assert main([*again, "--controlnet", "moved.safetensors"]) == 0
        assert "identical, pixel for pixel" in capsys.readouterr().out
        controls.save_blockwise(here / "canny.safetensors", channels=64)
        tensors = controls.blockwise()
        tensors["img_in.bias"] += 1
        controls.save(here / "canny.safetensors", tensors)
        assert main(again) == 0 and "is not the ControlNet the recipe was made with" in capsys.readouterr().err
    finally:
        shutil.move("moved.safetensors", "canny.safetensors")
    masked = [*words[:4], "--controlnet", "inpaint.safetensors", "--control", "edges.png", "--mask", "mask.png"]
    several = ["--controlnet", "union", "--control", "edges.png", "--control-scale", "0.5", "--control-scale", "0.8"]
    assert main([*masked, *several, *more, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [net["name"] for net in told["controlnets"]] == ["inpaint.safetensors", "union"]
    assert main(again) == 0 and "identical, pixel for pixel" in capsys.readouterr().out
    assert main([*again, *["--controlnet", "union"] * 3]) == 2
    assert "--controlnet is given 3 times and the recipe has 2" in capsys.readouterr().err
    assert main([*words[:4], "--in-context", "--control", "edges.png", *more]) == 2
    assert "in context a LoRA follows the control picture" in capsys.readouterr().err
