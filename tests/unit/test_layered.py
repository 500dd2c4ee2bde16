"""Files with all layers: what was put in comes out to the last bit, other programs' readers agree, and nobody's damaged
file does harm. Readers of their own kind are the judges: psd-tools, Pillow, zipfile, python-pptx."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw, ImageFilter, features
from pptx import Presentation
from psd_tools import PSDImage

from fakes import FakeEngine
from lanting.cli import draw
from lanting.cli.main import main
from lanting.core.errors import OutputError, PictureError
from lanting.core.layered import KINDS, kind_in, pack, unpack
from lanting.core.pictures import on_white
from lanting.core.recipe import describe_request, read_recipe
from lanting.core.stack import layer_names, merged, spread, stack_of
from lanting.core.types import Recipe, Request
from lanting.specs import get_spec

ENDINGS = sorted(KINDS)
ODD = 'A "poster" <b> & ]]> 海报 \uffff \U0001f600 \x07'  # XML forbids some of it


def glass(size: tuple[int, int], colour: tuple[int, int, int], box: tuple[float, ...], blur: float = 0) -> Image.Image:
    """A coloured disc with soft edges; its colour goes on where nothing is seen of it."""
    width, height = size
    shape = Image.new("L", size)
    ImageDraw.Draw(shape).ellipse([part * side for part, side in zip(box, (width, height) * 2, strict=True)], fill=200)
    image = Image.new("RGBA", size, colour)
    image.putalpha(shape.filter(ImageFilter.GaussianBlur(blur)))
    return image


def layers_of(size: tuple[int, int] = (61, 37)) -> list[Image.Image]:
    """A full ground, soft edges, nothing, one pixel, noise in colours and alpha."""
    dot = Image.new("RGBA", size)
    dot.putpixel((size[0] - 1, size[1] - 1), (9, 8, 7, 1))
    noise = Image.merge("RGBA", [Image.effect_noise(size, 90) for _ in range(4)])
    ground = Image.linear_gradient("L").resize(size)
    whole = Image.merge("RGBA", [ground, ImageChops.invert(ground), ground, Image.new("L", size, 255)])
    return [
        whole,
        glass(size, (250, 3, 77), (0.1, 0.1, 0.8, 0.7), 3),
        Image.new("RGBA", size, (1, 2, 3, 0)),
        dot,
        noise,
    ]


def recipe_for(prompt: str = "a poster", layers: int = 5) -> Recipe:
    request = Request(prompt, "layered", " ", (61, 37), 12, 4.0, seed=7, options={"layers": layers})
    return Recipe(describe_request(request), "qwen-image-layered", "feed", "layered", {"lanting": "0.1.0"})


def cut(image: Image.Image) -> bytes | None:
    box = image.getbbox()
    return None if box is None else image.crop(box).tobytes()


def same(found: Image.Image, wanted: Image.Image) -> bool:
    """Transparency everywhere and colours within the visible box are equal bit by bit."""
    return found.getchannel("A").tobytes() == wanted.getchannel("A").tobytes() and cut(found) == cut(wanted)


def whole(images: list[Image.Image]) -> Image.Image:
    """What Pillow makes of the layers as they were."""
    canvas = Image.new("RGBA", images[0].size)
    for image in images:
        canvas = Image.alpha_composite(canvas, image)
    return canvas


# ---------------------------------------------------------------- there and back
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("size", [(61, 37), (1, 1), (1, 9), (99, 2), (129, 128)])
def test_every_layer_comes_back_to_the_last_bit(ending, size, tmp_path):
    images, names = layers_of(size), ["地", "soft & <round>", "", "a" * 300, "Layer 5"]
    path = tmp_path / f"x{ending}"
    path.write_bytes(pack(ending, images, names, recipe_for(ODD)))
    stack = unpack(path.read_bytes(), "x")
    assert stack.size == size and [layer.name for layer in stack.layers] == names
    for layer, image in zip(stack.layers, images, strict=True):
        assert same(spread(layer, size), image)
        if layer.image is not None:
            assert layer.image.size == Image.Image.crop(image, image.getbbox()).size
    assert read_recipe(path) == recipe_for(ODD)


SIDE = st.integers(1, 40)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(size=st.tuples(SIDE, SIDE), data=st.data(), ending=st.sampled_from(ENDINGS))
def test_any_pixels_come_back(size, data, ending):
    count = size[0] * size[1]
    images = []
    for _ in range(data.draw(st.integers(1, 3))):
        seed = data.draw(st.binary(min_size=1, max_size=64))
        pixels = (seed * (4 * count // len(seed) + 1))[: 4 * count]  # runs and repeats, as packing likes and dislikes
        images.append(Image.frombytes("RGBA", size, pixels))
    stack = unpack(pack(ending, images, [""] * len(images)), "x")
    assert all(same(spread(layer, size), image) for layer, image in zip(stack.layers, images, strict=True))
    assert merged(stack).tobytes() == merged(stack_of(images, [""] * len(images))).tobytes()


def test_merged_is_what_pillow_makes_of_the_whole_layers():
    images = layers_of()
    for some in (images, images[1:], images[2:4], images[2:3]):
        found, wanted = merged(stack_of(some, [""] * len(some))), whole(some)
        assert found.getchannel("A").tobytes() == wanted.getchannel("A").tobytes()
        assert on_white(found).tobytes() == on_white(wanted).tobytes()
    assert merged(stack_of(images, [""] * 5)).tobytes() == whole(images).tobytes()


# ---------------------------------------------------------------- other programs' readers
def test_psd_tools_and_pillow_read_the_same_psd():
    images, names = layers_of(), ["图层 1", "Layer 2", "Layer 3", "Layer 4", "Layer 5"]
    data = pack(".psd", images, names, recipe_for())
    read = PSDImage.open(io.BytesIO(data))
    assert read.size == (61, 37) and [layer.name for layer in read] == names and read.has_preview()
    for layer, image in zip(read, images, strict=True):
        box = image.getbbox()
        assert layer.bbox == (box or (0, 0, 0, 0)) and layer.visible and layer.opacity == 255
        assert box is None or layer.topil().tobytes() == image.crop(box).tobytes()
    assert read.topil().tobytes() == whole(images).convert("RGB").tobytes()
    with Image.open(io.BytesIO(data), formats=("PSD",)) as picture:
        assert picture.mode == "RGB" and picture.tobytes() == whole(images).convert("RGB").tobytes()
        assert picture.n_frames == 5


@pytest.mark.parametrize("width", range(1, 6))
def test_sections_of_a_psd_have_even_lengths(width):
    red = Image.frombytes("L", (width, 1), bytes(range(width)))  # packed longer than the others
    data = pack(".psd", [Image.merge("RGBA", [red, *[Image.new("L", (width, 1), 255)] * 3])], ["a"])
    resources = int.from_bytes(data[30:34], "big")
    at = 34 + resources
    layers, info = (int.from_bytes(data[place : place + 4], "big") for place in (at, at + 4))
    assert info % 4 == 0 and layers == info + 8 and data[at + 8 + info : at + 12 + info] == bytes(4)


def test_a_psd_one_can_see_through_lies_on_white_as_photoshops_do():
    images = layers_of()[1:3]
    data = pack(".psd", images, ["a", "b"])
    with Image.open(io.BytesIO(data), formats=("PSD",)) as picture:
        assert picture.mode == "RGBA"
        assert picture.getchannel("A").tobytes() == whole(images).getchannel("A").tobytes()
        assert picture.convert("RGB").tobytes() == on_white(whole(images)).tobytes()
    shown = PSDImage.open(io.BytesIO(data)).topil()  # takes the white away again, where it can
    assert shown.getchannel("A").tobytes() == whole(images).getchannel("A").tobytes()
    solid = [at for at in range(61 * 37) if whole(images).getchannel("A").tobytes()[at] == 200]
    pairs = [(shown.tobytes()[4 * at : 4 * at + 3], whole(images).tobytes()[4 * at : 4 * at + 3]) for at in solid]
    assert solid and max(abs(one - other) for pair in pairs for one, other in zip(*pair, strict=True)) <= 2


def test_a_pillow_without_libtiff_writes_plain_bytes(monkeypatch):
    images = layers_of()
    packed = pack(".psd", images, [""] * 5)
    monkeypatch.setattr(features, "check", lambda name: False)
    plain = pack(".psd", images, [""] * 5)
    assert plain != packed
    read = PSDImage.open(io.BytesIO(plain))
    assert read[4].topil().tobytes() == images[4].tobytes() and same(unpack(plain, "x").layers[4].image, images[4])
    assert read.topil().tobytes() == whole(images).convert("RGB").tobytes()


def test_an_openraster_file_is_as_the_specification_says():
    images = layers_of((400, 300))
    data = pack(".ora", images, ["one", "two", "three", "four", "five"], recipe_for())
    assert data == pack(".ora", images, ["one", "two", "three", "four", "five"], recipe_for())  # no clock in it
    assert data[30:54] == b"mimetypeimage/openraster"  # what `file` and desktops look at
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert file.testzip() is None and {one.external_attr >> 16 for one in file.infolist()} == {0o644}
        page = file.read("stack.xml").decode()
        assert [page.index(name) for name in ("five", "four", "three", "two", "one")] == sorted(
            page.index(f'"{name}"') + 1 for name in ("one", "two", "three", "four", "five")
        )
        shown = Image.open(io.BytesIO(file.read("mergedimage.png")))
        small = Image.open(io.BytesIO(file.read("Thumbnails/thumbnail.png")))
        assert shown.mode == "RGBA" and shown.tobytes() == whole(images).tobytes()
        assert small.size == (256, 192)
        assert json.loads(file.read("lanting/recipe.json"))["model"] == "qwen-image-layered"


def test_powerpoint_gets_a_slide_with_pictures_in_their_places():
    images = layers_of()
    show = Presentation(io.BytesIO(pack(".pptx", images, layer_names(5), recipe_for(ODD))))
    unit = show.slide_width // 61
    assert (show.slide_width, show.slide_height) == (61 * unit, 37 * unit) and show.slide_height >= 914_400
    (slide,) = show.slides
    assert [shape.name for shape in slide.shapes] == layer_names(5)
    for shape, image in zip(slide.shapes, images, strict=True):
        box = image.getbbox()
        if box is not None:
            place = [side // unit for side in (shape.left, shape.top, shape.width, shape.height)]
            assert place == [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            assert Image.open(io.BytesIO(shape.image.blob)).tobytes() == image.crop(box).tobytes()
    assert show.core_properties.author == "lanting" and "海报" in show.core_properties.title


@pytest.mark.parametrize(("size", "fits"), [((56, 1), True), (((57, 1)), False), ((1, 57), False), ((6000, 110), True)])
def test_slides_have_the_sizes_powerpoint_takes(size, fits):
    image = Image.new("RGBA", size, "red")
    if fits:
        data = pack(".pptx", [image], ["a"])
        assert unpack(data, "x").size == size and Presentation(io.BytesIO(data)).slide_width <= 51_206_400
        return
    with pytest.raises(OutputError, match="no slides as narrow"):
        pack(".pptx", [image], ["a"])


# ---------------------------------------------------------------- strangers' files
@pytest.mark.parametrize("ending", ENDINGS)
def test_damaged_files_are_one_sentence(ending, tmp_path):
    data = pack(ending, layers_of(), [""] * 5, recipe_for())
    path = tmp_path / f"x{ending}"
    refused = 0
    for at in range(0, len(data), max(len(data) // 60, 1)):
        for broken in (data[:at], data[:at] + bytes((data[at] ^ 0xFF,)) + data[at + 1 :]):
            path.write_bytes(broken)
            for read in (read_recipe, lambda place: unpack(place.read_bytes(), "x")):
                try:
                    read(path)
                except PictureError as error:
                    refused += 1
                    assert "\n" not in str(error)
    assert refused > 60


def zipped(**entries: bytes) -> bytes:
    """A ZIP whose names have _ for / and no ending."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("mimetype", "image/openraster")
        for name, content in entries.items():
            file.writestr(name.replace("__", ".").replace("_", "/"), content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (b'<!DOCTYPE a [<!ENTITY b "c">]><image w="1" h="1"><stack/></image>', "document type"),
        (b'<image w="99999" h="99999"><stack/></image>', "too large"),
        (b'<image w="9" h="9"><stack>' + b"<layer/>" * 65 + b"</stack></image>", "more than 64"),
        (b'<image w="9" h="9"><stack><layer src="../../etc/passwd"/></stack></image>', "missing"),
        (b'<image w="9" h="9"><stack/></image>' + b" " * 4_000_000, "too long"),
        (b"<image", "damaged"),
    ],
)
def test_an_openraster_file_that_is_a_trap_is_refused(page, said):
    with pytest.raises(PictureError, match=said):
        unpack(zipped(stack__xml=page), "x.ora")


def test_recipes_that_are_traps_are_refused(tmp_path):
    bomb = b'<!DOCTYPE a [<!ENTITY b "c">]><recipe xmlns="urn:lanting:1.0/">&b;</recipe>'
    slide = {"ppt_presentation__xml": b"<a/>"}
    for data, said in (
        (zipped(stack__xml=b"<image/>", lanting_recipe__json=b"[" * 800_001), "too long"),
        (zipped(stack__xml=b"<image/>", lanting_recipe__json=b"\xff"), "damaged"),
        (zipped(**slide, customXml_item1__xml=bomb), "document type"),
        (zipped(**slide, customXml_item1__xml=b"<a>" * 9), "damaged"),
        (zipped(**slide, customXml_item1__xml=b"<a/>"), "no recipe"),
    ):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(PictureError, match=said):
            read_recipe(tmp_path / "x")


def test_other_zips_and_pictures_are_none_of_them(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.txt", "b")
    assert kind_in(buffer.getvalue()) is kind_in(b"PK\3\4") is kind_in(b"") is None
    (tmp_path / "x.ora").write_bytes(buffer.getvalue())
    with pytest.raises(PictureError, match="a ZIP"):
        read_recipe(tmp_path / "x.ora")
    for ending in ENDINGS:
        (tmp_path / f"y{ending}").write_bytes(pack(ending, layers_of(), [""] * 5))
        with pytest.raises(PictureError, match="carries no recipe"):
            read_recipe(tmp_path / f"y{ending}")


# ---------------------------------------------------------------- from Python
def layered(count: int = 1, layers: int = 3):
    return FakeEngine().run(Request("", "layered", seed=5, count=count, options={"layers": layers}))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_result_saves_a_file_for_each_picture(ending, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = layered(count=2)
    assert [path.name for path in result.save(f"x{ending}")] == [f"x-1{ending}", f"x-2{ending}"]
    assert [path.name for path in layered().save(f"y{ending}")] == [f"y{ending}"]
    for index, name in enumerate((f"x-1{ending}", f"x-2{ending}")):
        stack = unpack(Path(name).read_bytes(), name)
        assert [layer.image.tobytes() for layer in stack.layers] == [
            one.convert("RGBA").tobytes() for one in result.images[3 * index : 3 * index + 3]
        ]
        assert read_recipe(name) == result.recipes[3 * index]
    with pytest.raises(OutputError, match="--force"):
        result.save(f"x{ending}")
    result.save(f"x{ending}", force=True)
    assert not list(tmp_path.glob(".*"))


def test_a_picture_without_layers_is_one(tmp_path):
    result = FakeEngine().run(Request("a sign", "text_to_image", seed=7))
    (path,) = result.save(str(tmp_path / "sign.psd"))
    (layer,) = PSDImage.open(path)
    assert layer.topil().convert("RGB").tobytes() == result.images[0].tobytes()


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def fails(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fails)
    for ending in ENDINGS:
        with pytest.raises(OutputError, match="No space left"):
            layered().save(str(tmp_path / f"x{ending}"))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- from the shell
@pytest.fixture
def engine(monkeypatch, tmp_path):
    fake = FakeEngine()

    def opened(model, *_, **__):
        fake.spec = get_spec(model)
        return fake

    monkeypatch.setattr(draw, "open_engine", opened)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LANTING_LANG", "en")
    Image.new("RGB", (64, 48), "orange").save("poster.png")
    return fake


@pytest.mark.parametrize("ending", ENDINGS)
def test_layers_into_one_file_and_replayed(engine, ending, capsys, tmp_path):
    words = ["layers", "poster.png", "--layers", "3", "--seed", "5", "--quant", "none"]
    assert main([*words, "-o", f"x{ending}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["files"]
    assert told == [{"path": f"x{ending}", "seed": 5, "size": [8, 8], "weights": engine.weights, "layers": 3}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["poster.png", f"x{ending}"]
    assert [layer.name for layer in unpack(Path(f"x{ending}").read_bytes(), "x").layers] == layer_names(3)
    assert main(["replay", f"x{ending}"]) == 0
    assert "identical, pixel for pixel" in capsys.readouterr().out
    assert kind_in(Path(f"x-replay{ending}").read_bytes()) == ending
    changed = [image.convert("RGBA") for image in layered().images]
    changed[1].putpixel((2, 2), (45, 10, 1, 255))
    Path(f"x{ending}").write_bytes(pack(ending, changed, [""] * 3, read_recipe(f"x{ending}")))
    assert main(["replay", f"x{ending}", "-o", "again.ora"]) == 0
    assert "different by up to 40 of 255" in capsys.readouterr().out


def test_a_single_layer_of_several_is_found_again(engine, capsys):
    assert main(["layers", "poster.png", "--layers", "3", "--seed", "5", "-o", "l.png"]) == 0
    assert main(["replay", "l-2.png"]) == 0
    assert "identical, pixel for pixel" in capsys.readouterr().out


def test_names_of_layers_are_in_the_persons_language(engine, monkeypatch):
    monkeypatch.setenv("LANTING_LANG", "zh")
    assert main(["layers", "poster.png", "--layers", "2", "-o", "x.psd"]) == 0
    assert [layer.name for layer in PSDImage.open("x.psd")] == ["图层 1", "图层 2"]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("x.gif", "no ending we write"),
        ("no/x.psd", "does not exist"),
        ("taken.ora", "add --force"),
        ("folder.psd/x.jpg", "JPEG has no transparency"),
        ("x.jpg", "JPEG has no transparency"),
    ],
)
def test_what_can_be_refused_is_refused_before_drawing(engine, output, said, capsys, tmp_path):
    (tmp_path / "taken.ora").write_bytes(b"mine")
    (tmp_path / "folder.psd").mkdir()
    assert main(["layers", "poster.png", "-o", output]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert engine.requests == [] and (tmp_path / "taken.ora").read_bytes() == b"mine"
    assert main(["layers", "poster.png", "-o", "folder.psd", "--seed", "1", "--layers", "2"]) == 0  # a folder is one
    assert (tmp_path / "folder.psd" / "poster-1-layer-2.png").exists()


def test_a_missing_library_is_said_before_drawing(engine, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pptx", None)
    assert main(["layers", "poster.png", "-o", "x.pptx"]) == 2
    assert 'run pip install "lanting[layers]"' in capsys.readouterr().err
    assert engine.requests == []
    assert main(["layers", "poster.png", "-o", "x.psd"]) == 0  # the others need none
    assert main(["layers", "poster.png", "-o", "x.ora"]) == 0


def test_existing_files_are_overwritten_with_force_only(engine):
    for extra, code in (([], 0), ([], 2), (["--force"], 0)):
        assert main(["layers", "poster.png", "-o", "x.psd", *extra]) == code


def test_a_damaged_file_is_not_replayed(engine, capsys):
    assert main(["layers", "poster.png", "-o", "x.psd"]) == 0
    data = Path("x.psd").read_bytes()
    Path("x.psd").write_bytes(data[:60])
    assert main(["replay", "x.psd"]) == 2
    assert "x.psd is damaged" in capsys.readouterr().err


def test_two_results_of_one_name_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = layered()
    twin = replace(result, recipes=result.recipes)
    result.save("x.ora")
    with pytest.raises(OutputError):
        twin.save("x.ora")
