"""VideoX-Fun's ControlNet for Qwen-Image from its file to a picture: what it is shown, every form of file, refusals."""

from __future__ import annotations

import json
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
from lanting.tasks.pictures import pixels_of
from lanting.weights.build import store_controlnet
from lanting.weights.controls import check_controlnet, open_controlnet
from lanting.weights.inspect import describe
from lanting.weights.sized import beside
from lanting.weights.stored import Placing

SIZE = (64, 48)  # 4 by 3 tokens
EDGES, PHOTO = tiny.picture(*SIZE, seed=4), tiny.picture(*SIZE, seed=6)
HOLE = tiny.mask(*SIZE, (16, 16, 48, 48))
NET = "fun.safetensors"
LINEARS = 14  # of a block that a kind packs, modulations among them


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("fun")
    tiny.save_folder(place / "model", layers=4, shard="100KB")
    controls.save(place / NET, controls.fun())
    controls.save(place / "one.safetensors", controls.fun(1))
    controls.save_blockwise(place / "canny.safetensors")
    controls.save_blockwise(place / "inpaint.safetensors", channels=68)
    tiny.save_controlnet(place / "union")
    for name, picture in (("edges", EDGES), ("photo", PHOTO), ("hole", HOLE)):
        picture.save(place / f"{name}.png")
    return place


def request(task: str = "controlnet", **more: Any) -> Request:
    given = {"prompt": "a sign", "size": SIZE, "seed": 5, "steps": 2, "guidance_scale": 3.0, "negative_prompt": "x"}
    steered = {"images": (EDGES,)} if task.startswith("controlnet") else {}
    return Request(**{**given, **steered, "task": task, **more})


def painted(*pictures: Any, **more: Any) -> Request:
    return request("controlnet_inpaint", images=pictures, mask=HOLE, **more)


def opened(here: Path, net: Any = NET, **options: Any) -> Engine:
    given: dict[str, Any] = {"device": "cpu", "dtype": "float32"} | options
    names = None if net is None else [str(here / one) for one in (net if isinstance(net, list) else [net])]
    return Engine.open(str(here / "model"), controlnet=names, **given)


def draw(here: Path, net: Any, asked: Request, **options: Any) -> bytes:
    return drawn(opened(here, net, **options), asked)


@pytest.fixture(scope="module")
def steered(here) -> bytes:
    return draw(here, NET, request())


@pytest.fixture(scope="module")
def plain(here) -> bytes:
    return draw(here, None, request("text_to_image"))


# ---------------------------------------------------------------- what it is shown
def shown(here: Path, asked: Request, net: Any = NET) -> tuple[list[torch.Tensor], Any]:
    """What Fun nets are given in the first step, as latents (33, 6, 8) each; what encodes pictures."""
    heard: list[torch.Tensor] = []
    with opened(here, net) as engine:
        for one in dict.fromkeys(engine.models.controlnets):
            if hasattr(one, "control_img_in"):
                one.control_img_in.register_forward_pre_hook(lambda module, args: heard.append(args[0][0]))
        engine.run(replace(asked, steps=1))
        codec = engine.models.codec
    # a token is 33 channels of 2 by 2 latents, channels outermost
    return [x.view(3, 4, 33, 2, 2).permute(2, 0, 3, 1, 4).reshape(33, 6, 8) for x in heard], codec


def seen_alone(codec: Any, picture: Any, blank: torch.Tensor | None = None) -> torch.Tensor:
    """Latents (16, 6, 8) of a picture, mid-grey where `blank` (H, W)."""
    pixels = pixels_of(picture, SIZE)
    return codec.latents(pixels if blank is None else pixels.masked_fill(blank, 0.0))[0]


def hole() -> torch.Tensor:
    blank = torch.zeros(48, 64, dtype=torch.bool)
    blank[16:48, 16:48] = True
    return blank


def test_a_picture_that_is_followed_stands_first_and_the_rest_is_zero(here):
    (found,), codec = shown(here, request())
    assert torch.allclose(found[:16], seen_alone(codec, EDGES), atol=1e-5) and not found[16:].any()
    (clear,), _ = shown(here, request(images=(tiny.picture(*SIZE, "RGBA", seed=4),)))
    assert clear[:16].std() > 0.1 and not torch.allclose(clear, found)  # transparent parts are paper


@pytest.mark.parametrize("follow", [False, True])
def test_a_picture_that_is_repainted_stands_behind_its_mask(here, follow):
    (found,), codec = shown(here, painted(*((PHOTO, EDGES) if follow else (PHOTO,))))
    assert torch.allclose(found[17:], seen_alone(codec, PHOTO, hole()), atol=1e-5)
    row = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert found[16].tolist() == [[1.0] * 8] * 2 + [row] * 4
    assert torch.allclose(found[:16], seen_alone(codec, EDGES), atol=1e-5) if follow else not found[:16].any()


def test_of_several_nets_one_repaints(here):
    """The first of VideoX-Fun's, unless there is a net that can do nothing else."""
    found, _ = shown(here, painted(PHOTO, EDGES), [NET, "one.safetensors"])
    assert found[0][16].any() and not found[0][:16].any() and found[1][:16].any() and not found[1][16:].any()
    (found,), codec = shown(here, painted(EDGES, PHOTO), ["canny.safetensors", NET])
    assert torch.allclose(found[17:], seen_alone(codec, PHOTO, hole()), atol=1e-5) and not found[:16].any()
    (found,), codec = shown(here, painted(EDGES, PHOTO), [NET, "inpaint.safetensors"])
    assert torch.allclose(found[:16], seen_alone(codec, EDGES), atol=1e-5) and not found[16:].any()


# ---------------------------------------------------------------- end to end
def test_it_steers_and_is_off_bit_for_bit(here, steered, plain):
    every = [request(options=each) for each in ({"control_scale": 0}, {"control_end": 0.4}, {"control_start": 0.6})]
    with opened(here) as engine:
        off, first, last, hidden, text = (
            engine.run(each).images[0].tobytes() for each in (*every, painted(PHOTO), request("text_to_image"))
        )
    assert off == plain == text and len({plain, steered, first, last, hidden}) == 5


def test_several_pictures_and_nets_of_all_builds(here, steered):
    every = [NET, "one.safetensors", "canny.safetensors", "union"]
    four = request(images=(EDGES, PHOTO, EDGES, PHOTO))
    with opened(here, every) as engine:
        assert [engine.models.controlnets[i].place for i in (0, 1)] == [{0: 0, 2: 1}, {0: 0}]
        result = engine.run(four)
        drawn = [
            engine.run(replace(four, options={"control_scale": scales})).images[0].tobytes()
            for scales in ((1, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (0, 0, 1, 1))
        ]
    assert [net["name"] for net in result.recipes[0].controlnets] == every
    assert drawn[0] == steered and len({result.images[0].tobytes(), *drawn}) == 6
    both = request(images=(EDGES, PHOTO), options={"control_scale": (1, 0)})
    assert draw(here, NET, both) == steered


def test_streamed_and_tabulated_it_is_the_same_picture(here, steered):
    plan = plans.plan(streamed="disk", resident_blocks=0, modulation_table=True)
    assert far(draw(here, NET, request(), plan=plan), steered) <= 1


def test_more_pictures_both_sides_at_once_and_words_for_parts(here, steered):
    region = {"prompt": "a tree", "box": [0, 0, 0.5, 1]}
    every = [request(count=2), request(seed=6), request(options={"batched_guidance": True})]
    with opened(here) as engine:
        pair, other, joined, parts = (
            [image.tobytes() for image in engine.run(each).images]
            for each in (*every, request(options={"regions": [region]}))
        )
    assert far(b"".join(pair), steered + other[0]) <= 1 and far(joined[0], steered) <= 1 and parts != [steered]


def test_with_the_dial_and_again(here):
    asked = request(steps=8, quality="fast")
    with opened(here) as engine:
        result = engine.run(asked)
        again = engine.run(replace(asked, choices=result.recipes[0].request["choices"]))
    words = result.recipes[0].request["choices"]["steps"].split()
    assert len(words) == 8 and set(words) != {"FF"} and again.images[0].tobytes() == result.images[0].tobytes()


# ---------------------------------------------------------------- files
def test_it_is_known_by_its_tensors(here, capsys):
    assert main(["show", str(here / NET)]) == 0
    told = capsys.readouterr().out
    assert "controlnet, a chain of 2 blocks, reads a mask" in told
    assert f"--model qwen-image --controlnet {here / NET} --control PICTURE" in told
    assert describe(str(here / "one.safetensors")).parts[0].kind.detail == "a chain of 1 blocks, reads a mask"
    assert beside((), [str(here / NET)]) == open_controlnet(here / NET).checkpoint.bytes()


def test_behind_a_prefix(here, tmp_path, steered):
    file = controls.save(tmp_path / "n.safetensors", controls.fun(), "model.diffusion_model.")
    assert far(draw(here, file, request()), steered) <= 1


def test_eight_bits_stay_packed(here, tmp_path):
    packed = controls.scaled(controls.fun())
    dense = {
        name: tensor.float() * packed.get(f"{name.removesuffix('weight')}scale_weight", torch.tensor(1.0))
        for name, tensor in packed.items()
        if not name.endswith("scale_weight")
    }
    files = [controls.save(tmp_path / f"{i}.safetensors", each) for i, each in enumerate((packed, dense))]
    with opened(here, files[0]) as engine:
        found = engine.run(request()).images[0].tobytes()
        assert nets.packed_linears(engine.models.controlnets[0]) == 2 * LINEARS + 3  # before_proj, after_proj
    assert far(found, draw(here, files[1], request())) <= 2


def test_gguf(here, tmp_path, steered):
    writer, file = gguf.GGUFWriter(tmp_path / "net.gguf", "qwen_image"), tmp_path / "net.gguf"
    for name, tensor in controls.fun().items():
        form = gguf.GGMLQuantizationType["Q8_0" if "blocks." in name and tensor.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with opened(here, file) as engine:
        assert far(engine.run(request()).images[0].tobytes(), steered) <= 24
        assert nets.packed_linears(engine.models.controlnets[0]) == 2 * LINEARS + 3


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_while_it_is_loaded(here, steered, kind):
    with opened(here, quant=kind) as engine:
        found = engine.run(request()).images[0].tobytes()
        assert nets.packed_linears(engine.models.controlnets[0]) == 2 * LINEARS
    assert 0 < far(found, steered) < 200


def body(**changes: Any) -> dict[str, Any]:
    """A transformer's config."""
    return {"_class_name": "QwenImageTransformer2DModel", **tiny.NET, "num_layers": 4, **changes}


@pytest.mark.parametrize(
    ("blocks", "depth", "layers"),
    [(5, 60, [0, 12, 24, 36, 48]), (6, 12, [*range(0, 12, 2)]), (2, 4, [0, 2]), (2, 5, None)],
)
def test_behind_which_blocks_it_is_added(tmp_path, blocks, depth, layers):
    """Equally far, as the released one; where that is not clear, its folder must say."""
    found = open_controlnet(controls.save(tmp_path / "net" / "model.safetensors", controls.fun(blocks, 16)).parent)
    config = body(num_layers=depth, num_attention_heads=1)
    if layers is None:
        with pytest.raises(ModelError, match=f"has {blocks} blocks for the {depth} of the model, and nothing says"):
            check_controlnet(found, config)
        layers = list(range(blocks))
        (tmp_path / "net" / "config.json").write_text(json.dumps({"control_layers": layers}))
        found = open_controlnet(tmp_path / "net")
    checked = check_controlnet(found, config)
    net = store_controlnet(checked.checkpoint, checked.config, Placing(torch.float32, torch.device("cpu"))).fill()
    assert list(net.place) == layers == checked.config["control_layers"] and net.config.axes_dims_rope == (4, 6, 6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        ({"width": 48}, "has width = 48 and the model 32"),
        ({"head": 8}, "has attention_head_dim = 8 and the model 16"),
        ({"channels": 64}, "reads 64 channels where the model has 64"),
        ({"channels": 129}, "reads 129 channels where the model has 64"),
    ],
)
def test_a_net_of_another_model(tmp_path, make, words):
    path = controls.save(tmp_path / "net.safetensors", controls.fun(**make))
    with pytest.raises(ModelError, match=words):
        check_controlnet(open_controlnet(path), body())


@pytest.mark.parametrize("change", ["missing", "surplus", "misshapen"])
def test_loading_is_strict(here, tmp_path, change):
    tensors, name = controls.broken(controls.fun(), "control_blocks.1.attn.add_v_proj.weight", change)
    with (
        pytest.raises(ModelError, match=name.replace(".", r"\.")),
        opened(here, controls.save(tmp_path / "n.safetensors", tensors)) as engine,
    ):
        engine.run(request())


# ---------------------------------------------------------------- refusals
def test_nets_of_the_other_family_are_told_both_ways(here, tmp_path):
    newer = open_controlnet(controls.save(tmp_path / "new.safetensors", controls.chain()))
    with pytest.raises(ModelError, match=r"new.safetensors is for Qwen-Image-2.1, and this model is another"):
        check_controlnet(newer, body())
    other = {**body(), "_class_name": "QwenImage21Transformer2DModel"}
    with pytest.raises(ModelError, match=r"fun.safetensors is for Qwen-Image, and this model is another: leave it out"):
        check_controlnet(open_controlnet(here / NET), other)


@pytest.mark.parametrize(
    ("net", "asked", "words"),
    [
        ([NET, NET], request(), "2 ControlNets and 1 control pictures were given"),
        (NET, request(options={"in_context": True}), "leave the ControlNet out"),
        (NET, painted(PHOTO, EDGES, EDGES), "repaints one picture and follows one in it, and 3"),
        (NET, painted(PHOTO, EDGES, options={"control_scale": (1, 1)}), "reads both pictures at once: give one number"),
        (NET, painted(tiny.picture(64, 64), EDGES), "the mask is 64×48 and the picture 64×64"),
        (["canny.safetensors", NET], painted(EDGES, tiny.picture(64, 64)), "the mask is 64×48 and the picture 64×64"),
        ([NET, "inpaint.safetensors"], request(images=(EDGES, PHOTO)), "inpaint.safetensors repaints: give it a mask"),
    ],
)
def test_what_is_refused_before_weights_are_read(here, net, asked, words):
    with opened(here, net) as engine:
        with pytest.raises(LantingError, match=words):
            engine.stream(asked)
        assert "placed_transformer" not in engine.models.__dict__


def test_several_devices_are_refused(here):
    with pytest.raises(RequestError, match="one device has to draw"):
        opened(here, device="cpu,cpu")


# ---------------------------------------------------------------- told, counted, recorded
def test_the_plan_counts_it(tmp_path, capsys):
    large = controls.save(tmp_path / "large.safetensors", controls.fun(1, 384, 128))
    peaks = []
    for more in ([], ["--controlnet", str(large)]):
        assert main(["plan", "qwen-image-2512", "--device", "RTX 4090", "--json", *more]) == 0
        peaks.append(json.loads(capsys.readouterr().out)["chosen"]["peak_vram"])
    assert 0 < peaks[1] - peaks[0] < 2 * large.stat().st_size


def test_the_command_line_draws_and_replays(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    words = ["generate", "a sign", "--model", "model", "--controlnet", NET, "--control", "photo.png"]
    words += ["--control", "edges.png", "--mask", "hole.png", "--steps", "2", "--device", "cpu", "--seed", "3"]
    assert main([*words, "--force", "-o", "a.png"]) == 0
    told = read_recipe("a.png")
    assert told.controlnet is not None and told.controlnet["weights"] and told.task == "controlnet_inpaint"
    assert main(["replay", "a.png", "--model", "model", "--device", "cpu", "--force"]) == 0
    assert "identical, pixel for pixel" in capsys.readouterr().out
