"""Qwen-Image-2.1's ControlNet from its file to a picture: what it is shown, every form of file, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import tiny21
import torch

import controls
import nets
import plans
from controls import drawn, english, far  # noqa: F401  a fixture
from lanting import Engine, LantingError, Request
from lanting.cli.main import main
from lanting.core.errors import ModelError, RequestError
from lanting.core.recipe import read_recipe
from lanting.nn.linears import Int8Linear
from lanting.nn.single_stream import QwenImage21Transformer
from lanting.tasks.pictures import pixels_of
from lanting.weights.build import store_controlnet
from lanting.weights.controls import check_controlnet, open_controlnet
from lanting.weights.inspect import describe
from lanting.weights.sized import beside
from lanting.weights.stored import Placing

SIZE = (96, 64)  # 6 by 4 tokens
EDGES, PHOTO = tiny.picture(*SIZE, seed=4), tiny.picture(*SIZE, seed=6)
HOLE = tiny.mask(*SIZE, (32, 16, 64, 64))
NET = "union.safetensors"
LINEARS = 7  # of a block that a kind packs


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("two-one")
    tiny21.save_folder(place / "model", shard="100KB")
    controls.save(place / NET, controls.chain())
    controls.save(place / "two.safetensors", controls.chain(2))
    for name, picture in (("edges", EDGES), ("photo", PHOTO), ("hole", HOLE)):
        picture.save(place / f"{name}.png")
    return place


def request(task: str = "controlnet", **more: Any) -> Request:
    given = {"prompt": "a sign", "size": SIZE, "seed": 5, "steps": 3, "guidance_scale": 3.0, "negative_prompt": "x"}
    steered = {"images": (EDGES,)} if task.startswith("controlnet") else {}
    return Request(**{**given, **steered, "task": task, **more})


def opened(here: Path, net: Any = NET, **options: Any) -> Engine:
    given: dict[str, Any] = {"device": "cpu", "dtype": "float32"} | options
    names = None if net is None else [str(here / one) for one in (net if isinstance(net, list) else [net])]
    engine = Engine.open(str(here / "model"), controlnet=names, **given)
    small = replace(engine.spec.defaults, vl_area=96 * 96, vae_area=96 * 96)
    engine.models.spec = replace(engine.spec, defaults=small)
    return engine


def draw(here: Path, net: Any, asked: Request, **options: Any) -> bytes:
    return drawn(opened(here, net, **options), asked)


@pytest.fixture(scope="module")
def steered(here) -> bytes:
    return draw(here, NET, request())


@pytest.fixture(scope="module")
def plain(here) -> bytes:
    return draw(here, None, request("text_to_image"))


# ---------------------------------------------------------------- what it is shown
def shown(here: Path, asked: Request, net: Any = NET) -> list[torch.Tensor]:
    """What nets are given in the first step, (N, 17) each."""
    heard: list[torch.Tensor] = []
    with opened(here, net) as engine:
        for one in dict.fromkeys(engine.models.controlnets):
            one.control_img_in.register_forward_pre_hook(lambda module, args: heard.append(args[0][0]))
        engine.run(replace(asked, steps=1))
        shown.codec = engine.models.codec  # type: ignore[attr-defined]
    return heard


def seen_alone(picture, blank: torch.Tensor | None = None) -> torch.Tensor:
    """Latents (N, 8) of an opaque picture, mid-grey where `blank` (H, W)."""
    pixels = pixels_of(picture, SIZE)
    pixels = pixels if blank is None else pixels.masked_fill(blank, 0.0)
    whole = torch.cat([pixels, torch.ones(1, 1, *pixels.shape[2:])], 1)
    return shown.codec.latents(whole)[0].flatten(1).T  # type: ignore[attr-defined]


def test_a_picture_that_is_followed_stands_first_and_the_rest_is_zero(here):
    (found,) = shown(here, request())
    assert found.shape == (24, 17) and torch.allclose(found[:, :8], seen_alone(EDGES), atol=1e-5)
    assert not found[:, 8:].any()
    (clear,) = shown(here, request(images=(tiny.picture(*SIZE, "RGBA", seed=4),)))
    assert clear[:, :8].std() > 0.1 and not torch.allclose(clear, found)  # transparent parts are paper


@pytest.mark.parametrize("follow", [False, True])
def test_a_picture_that_is_repainted_stands_behind_its_mask(here, follow):
    pictures = (PHOTO, EDGES) if follow else (PHOTO,)
    (found,) = shown(here, request("controlnet_inpaint", images=pictures, mask=HOLE))
    blank = torch.zeros(64, 96, dtype=torch.bool)
    blank[16:64, 32:64] = True
    assert torch.allclose(found[:, 9:], seen_alone(PHOTO, blank), atol=1e-5)
    assert found[:, 8].view(4, 6).tolist() == [[1.0] * 6] + 3 * [[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]]
    assert torch.allclose(found[:, :8], seen_alone(EDGES), atol=1e-5) if follow else not found[:, :8].any()


def test_grey_of_a_mask_is_cut_at_half(here):
    soft = HOLE.point(lambda level: 140 if level else 100)
    asked = request("controlnet_inpaint", images=(PHOTO,), mask=HOLE)
    assert torch.equal(shown(here, replace(asked, mask=soft))[0], shown(here, asked)[0])


def test_of_several_nets_the_first_repaints(here):
    found = shown(here, request("controlnet_inpaint", images=(PHOTO, EDGES), mask=HOLE), [NET, "two.safetensors"])
    assert found[0][:, 8].any() and not found[0][:, :8].any()
    assert not found[1][:, 8:].any() and torch.allclose(found[1][:, :8], seen_alone(EDGES), atol=1e-5)


# ---------------------------------------------------------------- end to end
def test_it_steers_and_is_off_bit_for_bit(here, steered, plain):
    assert steered != plain
    assert draw(here, NET, request(options={"control_scale": 0})) == plain
    assert draw(here, NET, request("text_to_image")) == plain
    first, last = (draw(here, NET, request(options=each)) for each in ({"control_end": 0.4}, {"control_start": 0.6}))
    masked = draw(here, NET, request("controlnet_inpaint", images=(PHOTO,), mask=HOLE))
    assert len({plain, steered, first, last, masked}) == 5


@pytest.mark.parametrize("task", ["image_to_image", "inpaint", "edit"])
def test_other_tasks_are_drawn_without_it(here, task):
    mask = HOLE if "inpaint" in task else None
    asked = request(task, images=(PHOTO,), mask=mask, steps=1, guidance_scale=1)
    assert draw(here, NET, asked) == draw(here, None, asked)


def test_several_pictures_and_nets(here, steered):
    both = request(images=(EDGES, PHOTO), options={"control_scale": (1, 0)})
    assert draw(here, NET, both) == steered == draw(here, [NET, "two.safetensors"], both)
    with opened(here, [NET, "two.safetensors"]) as engine:
        result = engine.run(replace(both, options={}))
        assert [net.place for net in engine.models.controlnets] == [{0: 0}, {0: 0, 1: 1}]
    assert result.images[0].tobytes() != steered
    assert [net["name"] for net in result.recipes[0].controlnets] == [NET, "two.safetensors"]


@pytest.mark.parametrize(
    "changes",
    [{"prefix_kept": False}, {"streamed": "disk", "resident_blocks": 0}, {"encoder": "unload", "resident_blocks": 1}],
)
def test_by_any_plan_it_is_the_same_picture(here, steered, changes):
    assert draw(here, NET, request(), plan=plans.plan(**changes)) == steered


def test_words_are_read_once_a_stretch(here, monkeypatch, plain):
    """On from the second step to the last but one: each of both sides reads the words three times in four steps."""
    counted, whole = [], QwenImage21Transformer.prefix
    monkeypatch.setattr(QwenImage21Transformer, "prefix", lambda *x: counted.append(1) or whole(*x))
    asked = request(steps=4, options={"control_start": 0.3, "control_end": 0.7})
    kept = draw(here, NET, asked)
    assert len(counted) == 6
    assert draw(here, NET, asked, plan=plans.plan(prefix_kept=False)) == kept and len(counted) == 6 + 8


def test_more_pictures_and_both_sides_at_once(here, steered):
    pair = draw(here, NET, request(count=2))
    assert far(pair, b"".join(draw(here, NET, request(seed=seed)) for seed in (5, 6))) <= 1
    assert far(draw(here, NET, request(options={"batched_guidance": True})), steered) <= 1


def test_with_the_dial_and_again(here):
    asked = request(steps=8, quality="fast")
    with opened(here) as engine:
        result = engine.run(asked)
        again = engine.run(replace(asked, choices=result.recipes[0].request["choices"]))
    words = result.recipes[0].request["choices"]["steps"].split()
    assert len(words) == 8 and set(words) != {"FF"} and again.images[0].tobytes() == result.images[0].tobytes()


def test_in_halves_it_draws_too(here, steered):
    for dtype in ("bfloat16", "transformer=bfloat16,controlnet=float32"):
        assert far(draw(here, NET, request(), dtype=dtype), steered) < 256


# ---------------------------------------------------------------- files
def test_it_is_known_by_its_tensors(here, capsys):
    assert main(["show", str(here / NET)]) == 0
    told = capsys.readouterr().out
    assert "controlnet, a chain of 1 blocks, reads a mask" in told
    assert f"--model qwen-image-2.1 --controlnet {here / NET} --control PICTURE" in told
    assert "defaults" not in told  # it is no release
    assert describe(str(here / "two.safetensors")).parts[0].kind.detail == "a chain of 2 blocks, reads a mask"
    assert beside((), [str(here / NET)]) == open_controlnet(here / NET).checkpoint.bytes()


@pytest.mark.parametrize("prefix", ["", "controlnet.", "model.diffusion_model."])
def test_as_comfyui_keeps_it(here, tmp_path, steered, prefix):
    file = controls.save(tmp_path / "net.safetensors", controls.fused(controls.chain()), prefix)
    assert far(draw(here, file, request()), steered) <= 1


def test_eight_bits_stay_packed(here, tmp_path):
    tensors = controls.fused(controls.chain())
    packed = controls.scaled(tensors)
    dense = {
        name: tensor.float() * packed.get(f"{name.removesuffix('weight')}scale_weight", torch.tensor(1.0))
        for name, tensor in packed.items()
        if not name.endswith("scale_weight")
    }
    files = [controls.save(tmp_path / f"{i}.safetensors", each) for i, each in enumerate((packed, dense))]
    with opened(here, files[0]) as engine:
        found = engine.run(request()).images[0].tobytes()
        assert nets.packed_linears(engine.models.controlnets[0]) == LINEARS + 2  # before_proj, after_proj
    assert far(found, draw(here, files[1], request())) <= 2


def test_turned_eight_bits_as_comfyui_s(here, tmp_path, monkeypatch):
    """Every Linear of the blocks, gate and value in one, a scale for each row, and a note."""
    monkeypatch.setattr("lanting.attach.compute.ready", lambda: False)  # kernels round activations
    packed, dense = {}, {}
    for name, tensor in controls.fused(controls.chain()).items():
        packed[name] = dense[name] = tensor
        if "blocks." in name and tensor.ndim == 2:
            path = name.removesuffix(".weight")
            made = Int8Linear.from_dense(tensor, rotate=16)
            note = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
            packed |= {name: made.weight, f"{path}.weight_scale": made.weight_scale}
            packed[f"{path}.comfy_quant"] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
            dense[name] = made.dense(torch.float32)
    files = [controls.save(tmp_path / f"{i}.safetensors", each) for i, each in enumerate((packed, dense))]
    with opened(here, files[0]) as engine:
        found = engine.run(request()).images[0].tobytes()
        assert nets.packed_linears(engine.models.controlnets[0]) == LINEARS + 2
    assert far(found, draw(here, files[1], request())) <= 1


def test_gguf(here, tmp_path, steered):
    writer, file = gguf.GGUFWriter(tmp_path / "net.gguf", "qwen_image"), tmp_path / "net.gguf"
    for name, tensor in controls.chain().items():
        form = gguf.GGMLQuantizationType["Q8_0" if "blocks." in name and tensor.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with opened(here, file) as engine:
        assert far(engine.run(request()).images[0].tobytes(), steered) <= 24
        assert nets.packed_linears(engine.models.controlnets[0]) == LINEARS + 2


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_while_it_is_loaded(here, steered, kind):
    with opened(here, quant=kind) as engine:
        found = engine.run(request()).images[0].tobytes()
        assert nets.packed_linears(engine.models.controlnets[0]) == LINEARS
    assert 0 < far(found, steered) < 200


def body(**changes: Any) -> dict[str, Any]:
    """A transformer's config."""
    kind = {"_class_name": "QwenImage21Transformer2DModel", "mlp_ratio": 3, "eps": 1e-6}
    return {**kind, **tiny21.NET, "num_layers": 2, **changes}


@pytest.mark.parametrize(
    ("blocks", "depth", "layers"),
    [(1, 2, [0]), (2, 2, [0, 1]), (2, 3, [0, 2]), (2, 4, [0, 2]), (2, 8, [0, 4]), (2, 5, None), (3, 32, None)],
)
def test_behind_which_blocks_it_is_added(tmp_path, blocks, depth, layers):
    """Every second, as the released one; else equally far. Where that is not clear, its folder must say."""
    found = open_controlnet(controls.save(tmp_path / "net" / "model.safetensors", controls.chain(blocks)).parent)
    if layers is None:
        with pytest.raises(ModelError, match=f"has {blocks} blocks for the {depth} of the model, and nothing says"):
            check_controlnet(found, body(num_layers=depth))
        layers = list(range(blocks))
        (tmp_path / "net" / "config.json").write_text(json.dumps({"control_layers": layers}))
        found = open_controlnet(tmp_path / "net")
    checked = check_controlnet(found, body(num_layers=depth))
    assert checked.config["control_layers"] == layers
    net = store_controlnet(checked.checkpoint, checked.config, Placing(torch.float32, torch.device("cpu"))).fill()
    assert list(net.place) == layers and net.config.eps == 1e-6


@pytest.mark.parametrize("layers", [[1], [0, 1], ["0"], "0", [2], {"0": 1}])
def test_a_config_that_says_nonsense(tmp_path, layers):
    controls.save(tmp_path / "net" / "model.safetensors", controls.chain())
    (tmp_path / "net" / "config.json").write_text(json.dumps({"control_layers": layers}))
    with pytest.raises(ModelError, match=r"control_layers|describes no network"):
        found = check_controlnet(open_controlnet(tmp_path / "net"), body())
        store_controlnet(found.checkpoint, found.config, Placing(torch.float32, torch.device("cpu")))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        ({"width": 96}, "has width = 96 and the model 64"),
        ({"head": 16}, "has attention_head_dim = 16 and the model 32"),
        ({"channels": 16}, "reads 16 channels where the model has 8"),
    ],
)
def test_a_net_of_another_model(tmp_path, make, words):
    path = controls.save(tmp_path / "net.safetensors", controls.chain(**make))
    with pytest.raises(ModelError, match=words):
        check_controlnet(open_controlnet(path), body())
    with pytest.raises(ModelError, match="has mlp_ratio = 3 and the model 4"):
        check_controlnet(
            open_controlnet(path),
            body(num_attention_heads=make.get("width", 64) // 32, mlp_ratio=4)
            | ({"attention_head_dim": 16, "num_attention_heads": 4} if "head" in make else {}),
        )


@pytest.mark.parametrize("change", ["missing", "surplus", "misshapen"])
def test_loading_is_strict(here, tmp_path, change):
    tensors, name = controls.broken(controls.chain(), "control_blocks.0.attn.to_v.weight", change)
    with (
        pytest.raises(ModelError, match=name.replace(".", r"\.")),
        opened(here, controls.save(tmp_path / "n.safetensors", tensors)) as engine,
    ):
        engine.run(request())


# ---------------------------------------------------------------- refusals
def test_nets_of_the_other_family_are_told_both_ways(here, tmp_path):
    tiny.save_folder(tmp_path / "model")
    tiny.save_controlnet(tmp_path / "instantx")
    other = controls.save_blockwise(tmp_path / "canny.safetensors")
    for net in (tmp_path / "instantx", other):
        with pytest.raises(ModelError, match="is for Qwen-Image, and this model is another: leave it out"):
            opened(here, net)
    with pytest.raises(ModelError, match=r"union.safetensors is for Qwen-Image-2.1, and this model is another"):
        Engine.open(str(tmp_path / "model"), device="cpu", controlnet=str(here / NET))


@pytest.mark.parametrize(
    ("net", "more", "words"),
    [
        (None, {}, "controlnet needs a ControlNet"),
        ([NET, NET], {}, "2 ControlNets and 1 control pictures were given"),
        (NET, {"options": {"in_context": True}}, "follows no picture in context: give a ControlNet"),
        (None, {"options": {"in_context": True}}, "follows no picture in context: give a ControlNet"),
        (
            NET,
            {"task": "controlnet_inpaint", "mask": HOLE, "images": (PHOTO, EDGES, EDGES)},
            "follows one in it, and 3",
        ),
        (
            NET,
            {
                "task": "controlnet_inpaint",
                "mask": HOLE,
                "images": (PHOTO, EDGES),
                "options": {"control_scale": (1, 1)},
            },
            "reads both pictures at once: give one number",
        ),
        (
            NET,
            {"task": "controlnet_inpaint", "mask": HOLE, "images": (tiny.picture(64, 64), EDGES)},
            "the mask is 96×64 and the picture 64×64",
        ),
        (NET, {"size": (112, 96)}, "multiples of 32"),
    ],
)
def test_what_is_refused_before_weights_are_read(here, net, more, words):
    with opened(here, net) as engine:
        with pytest.raises(LantingError, match=words):
            engine.stream(request(**more))
        assert "placed_transformer" not in engine.models.__dict__


def test_several_devices_are_refused(here):
    with pytest.raises(RequestError, match="one device has to draw"):
        opened(here, device="cpu,cpu")


# ---------------------------------------------------------------- told, counted, recorded
def test_the_plan_counts_it(tmp_path, capsys):
    large = controls.save(tmp_path / "large.safetensors", controls.chain(2, 768, 128))
    peaks = []
    for more in ([], ["--controlnet", str(large)]):
        assert main(["plan", "qwen-image-2.1", "--device", "RTX 4090", "--json", *more]) == 0
        peaks.append(json.loads(capsys.readouterr().out)["chosen"]["peak_vram"])
    assert 0 < peaks[1] - peaks[0] < 2 * large.stat().st_size


def test_the_command_line_draws_and_replays(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    words = ["generate", "a sign", "--model", "model", "--controlnet", NET, "--control", "photo.png", "--control"]
    more = [
        "edges.png",
        "--mask",
        "hole.png",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--seed",
        "3",
        "--force",
        "-o",
        "a.png",
    ]
    assert main([*words, *more]) == 0
    told = read_recipe("a.png")
    assert told.controlnet is not None and told.controlnet["weights"] and told.task == "controlnet_inpaint"
    assert main(["replay", "a.png", "--model", "model", "--device", "cpu", "--force"]) == 0
    assert "identical, pixel for pixel" in capsys.readouterr().out
