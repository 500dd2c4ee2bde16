"""Reading pictures safely, writing them whole, and the recipe that travels inside."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import lanting
from fakes import FakeEngine, bare_png
from lanting.core.errors import LantingError, OutputError, PictureError
from lanting.core.files import writing
from lanting.core.lang import Phrase, chinese, explain, language
from lanting.core.pictures import open_mask, open_picture
from lanting.core.recipe import (
    describe_request,
    from_json,
    infotext,
    read_recipe,
    request_of_picture,
    restore_request,
    to_json,
)
from lanting.core.save import Place, check_folder, name_for, plan_places, save_picture
from lanting.core.types import Recipe, Request
from lanting.serve.errors import ServeError
from lanting.specs import get_spec, spec_names
from lanting.weights.headers import damaged

VERSIONS = {"lanting": "0.1.0", "torch": "2.13.0", "device": "cpu", "dtype": "float32"}


def recipe_for(prompt: str = "a sign", negative: str = " ") -> Recipe:
    request = Request(prompt, "text_to_image", negative, (64, 32), 12, 4.0, seed=7, strength=1.0)
    return Recipe(describe_request(request), "nano", "0123456789abcdef", "text_to_image", VERSIONS)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_three_formats_open(kind, tmp_path):
    path = tmp_path / "picture.dat"  # the content decides, not the name
    path.write_bytes(encoded(Image.new("RGB", (20, 10), (200, 30, 30)), kind))
    image = open_picture(path)
    assert (image.mode, image.size, image.info) == ("RGB", (20, 10), {"path": str(path)})


@pytest.mark.parametrize(
    ("made", "mode"),
    [("L", "RGB"), ("LA", "RGBA"), ("P", "RGB"), ("1", "RGB"), ("I;16", "RGB"), ("RGBA", "RGBA")],
)
def test_modes_become_rgb_or_rgba(made, mode):
    assert open_picture(encoded(Image.new(made, (8, 8)), "PNG")).mode == mode
    assert open_picture(encoded(Image.new("CMYK", (8, 8)), "JPEG")).mode == "RGB"


def test_sixteen_bits_are_scaled():
    image = Image.new("I;16", (2, 1))
    image.putpixel((0, 0), 65535)
    image.putpixel((1, 0), 32896)
    opened = open_picture(encoded(image, "PNG"))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (128, 128, 128)]


def test_turned_photos_stand_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert open_picture(encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).size == (10, 20)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_photos_stand_upright_whatever_else_their_camera_wrote(format):
    """A text where a number belongs, which Pillow reads and can't write."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    data = exif.tobytes()
    at = data.index(bytes.fromhex("011a0005"))  # pixels per inch, a fraction
    odd = data[: at + 2] + bytes.fromhex("0002") + data[at + 4 :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_picture(encoded(Image.new("RGB", (20, 10)), format, exif=odd)).size == (10, 20)


@pytest.mark.parametrize("key", ["exif", "xmp", "transparency", "Raw profile type exif"])
def test_comments_named_like_metadata_are_no_crash(key):
    info = PngInfo()
    info.add_text(key, "x")
    with suppress(PictureError):
        assert open_picture(encoded(Image.new("L", (8, 8)), "PNG", pnginfo=info)).size == (8, 8)


def test_animations_give_their_first_frame():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encoded(red, "WEBP", save_all=True, append_images=[blue], lossless=True)
    assert open_picture(data).getpixel((4, 4)) == (255, 0, 0)


def test_masks_are_grey_and_transparent_is_black():
    mask = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    mask.putpixel((1, 1), (255, 255, 255, 255))
    opened = open_mask(encoded(mask, "PNG"))
    assert (opened.mode, opened.getpixel((1, 1)), opened.getpixel((0, 0))) == ("L", 255, 0)


def test_an_81_megapixel_png_is_refused_before_it_is_decoded():
    data = bare_png(9000, 9000)
    assert len(data) < 20_000
    with pytest.raises(PictureError, match="9000×9000, 81 million"):
        open_picture(data, "big.png")
    with pytest.raises(PictureError, match="pixels"):
        open_picture(bare_png(20_000, 20_000))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"hello, I am a text file", "like a text file"),
        (b"GIF89a" + b"\0" * 40, "like a GIF"),
        (b"\0\0\0\x20ftypheic" + b"\0" * 40, "HEIC"),
        (b"<svg xmlns='x'/>", "SVG"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 30, "damaged PNG"),
        (b"\xba\xa8b" + b"\0\1\2" * 20, "PNG, JPEG, WebP"),
    ],
)
def test_what_is_no_picture_says_what_it_looks_like(data, word, tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(data)
    with pytest.raises(PictureError, match=word) as caught:
        open_picture(path)
    assert str(path) in str(caught.value)


def test_damaged_and_missing_files(tmp_path):
    noise = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encoded(noise, kind)
        with pytest.raises(PictureError):
            open_picture(data[: len(data) // 2])
    for path, word in (
        (tmp_path, "folder"),
        (tmp_path / "no.png", "not exist"),
        ("a\0b.png", "null|not exist"),
    ):
        with pytest.raises(PictureError, match=word):
            open_picture(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("prompt", ["a sign", 'says "蘭亭" 🏮\nsecond line', "🏮" * 9999])
def test_recipe_travels_in_every_format(tmp_path, suffix, prompt):
    recipe = recipe_for(prompt, "低" * 3000)
    path = save_picture(Image.new("RGB", (16, 16), "blue"), tmp_path / f"x{suffix}", recipe)
    assert read_recipe(path) == recipe
    assert open_picture(path).size == (16, 16)


def test_infotext_is_what_a1111_writes(tmp_path):
    lines = infotext(recipe_for()).splitlines()
    assert lines[0] == "a sign"
    assert lines[1] == "Negative prompt:  "
    for fact in ("Steps: 12", "Sampler: Euler", "CFG scale: 4.0", "Seed: 7", "Size: 64x32", "Model: nano"):
        assert fact in lines[2]
    path = save_picture(Image.new("RGB", (8, 8)), tmp_path / "x.png", recipe_for())
    assert Image.open(path).info["parameters"] == infotext(recipe_for())
    path = save_picture(Image.new("RGB", (8, 8)), tmp_path / "x.jpg", recipe_for())
    comment = Image.open(path).getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + infotext(recipe_for()).encode("utf-16-be")


def test_request_survives_its_description():
    image, mask = Image.new("RGB", (8, 8)), Image.new("L", (8, 8), 255)
    image.info["path"] = "photos/cat.png"
    request = Request(
        ("a", "b"), "inpaint", "-", (32, 16), 3, 2.5, 7, 2, (image,), mask, 0.5, {"sigmas": (1.0, 0.5, 0.1)}
    )
    table = json.loads(json.dumps(describe_request(request)))
    assert table["images"][0]["path"] == "photos/cat.png"
    back = restore_request(table, (image,), mask)
    assert describe_request(back) == describe_request(request)
    assert request_of_picture(request, 3).prompt == "b"
    assert (request_of_picture(request, 3).seed, request_of_picture(request, 3).count) == (10, 1)


def test_picture_hash_sees_one_changed_pixel():
    one, other = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))
    other.putpixel((0, 0), (0, 0, 1))
    hashes = [describe_request(Request(images=(image,)))["images"][0]["sha256"] for image in (one, other)]
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[1]",
        '{"lanting":1}',
        '{"lanting":99,"request":{}}',
        '{"lanting":1,"request":{"prompt":7},"model":"m","weights":"w","task":"t","versions":{}}',
        '{"lanting":1,"request":{"size":"ab"},"model":"m","weights":"w","task":"t","versions":{}}',
        '{"lanting":1,"request":{"size":[Infinity,8]},"model":"m","weights":"w","task":"t","versions":{}}',
        '{"lanting":1,"request":{"images":[{}]},"model":"m","weights":"w","task":"t","versions":{}}',
        '{"lanting":1,"request":' + "[" * 100_000,
        '{"lanting":1}' + " " * 300_000,
    ],
)
def test_strange_recipes_are_one_sentence(text):
    with pytest.raises(PictureError, match="can't be read") as caught:
        from_json(text, "x.png")
    assert "\n" not in str(caught.value)


def test_pictures_without_recipe(tmp_path):
    path = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(PictureError, match="no recipe"):
        read_recipe(path)
    assert from_json(to_json(recipe_for())) == recipe_for()


def test_names_from_words():
    assert name_for('A blue sign: "HELLO"', 7) == "a-blue-sign-hello-7.png"
    assert name_for("兰亭集序 🏮", 1, ".webp") == "兰亭集序-1.webp"
    assert name_for("../../etc/passwd", 1) == "etc-passwd-1.png"
    assert name_for("!!!", 3) == name_for("", 3) == "picture-3.png"
    for prompt in ("word " * 99, "x" * 999, "字" * 999, "CON", "a\0b\n"):
        name = name_for(prompt, 2**63 - 1)
        assert len(name.encode()) < 100
        assert not set(name) & set('/\\:*?"<>|\0\n')


def test_files_are_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = Image.new("RGB", (8, 8))
    auto = [save_picture(image, plan_places(None, ["a-7.png"])[0]).name for _ in range(3)]
    assert auto == ["a-7.png", "a-7-2.png", "a-7-3.png"]
    save_picture(image, plan_places("sign.png", ["x"])[0])
    before = (tmp_path / "sign.png").read_bytes()
    with pytest.raises(OutputError, match="--force"):
        plan_places("sign.png", ["x"])
    with pytest.raises(OutputError, match="exists"):
        save_picture(Image.new("RGB", (9, 9)), Place(tmp_path / "sign.png", given=True, force=False))
    assert (tmp_path / "sign.png").read_bytes() == before
    save_picture(Image.new("RGB", (9, 9)), plan_places("sign.png", ["x"], force=True)[0])
    assert open_picture("sign.png").size == (9, 9)
    assert [place.path.name for place in plan_places("set.png", ["x", "y"])] == ["set-1.png", "set-2.png"]
    assert not list(tmp_path.glob(".lanting-*"))


def test_a_result_saves_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = FakeEngine().run(Request("a sign", "text_to_image", seed=7, count=2))
    assert [path.name for path in result.save()] == ["a-sign-7.png", "a-sign-8.png"]
    assert [path.name for path in result.save("x.webp")] == ["x-1.webp", "x-2.webp"]
    assert read_recipe("x-2.webp") == result.recipes[1]
    with pytest.raises(OutputError):
        result.save("x.webp")
    layered = FakeEngine().run(Request("", "layered", seed=1, options={"layers": 2}))
    assert [path.name for path in layered.save()] == ["picture-1-layer-1.png", "picture-1-layer-2.png"]


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def fails(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OutputError, match="No space left"):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_what_waits_for_the_disk_is_open_for_writing(tmp_path, monkeypatch):
    import fcntl

    def as_on_windows(handle):
        if not fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_RDWR:
            raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("lanting.core.files.os.fsync", as_on_windows)
    with writing(tmp_path / "x", 1) as part:
        part.write_bytes(b"x")
    assert (tmp_path / "x").read_bytes() == b"x"


def test_a_recipe_too_long_for_a_jpeg_costs_not_the_picture(tmp_path):
    long = recipe_for("\x01" * 12_000)  # JSON escapes it in six letters
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "x.jpg", long)
    assert open_picture(tmp_path / "x.jpg").size == (8, 8)
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "x.webp", long)
    assert read_recipe(tmp_path / "x.webp") == long


def test_places_are_checked_before_work(tmp_path):
    for output, word in (
        (str(tmp_path / "no/such/x.png"), "does not exist"),
        (str(tmp_path / "x.gif"), "ending"),
        (str(tmp_path / "x"), "ending"),
        ("/proc/x.png", "can be written"),
    ):
        with pytest.raises(OutputError, match=word):
            plan_places(output, ["a.png"])
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(OutputError, match="transparency"):
        save_picture(Image.new("RGBA", (8, 8)), tmp_path / "x.jpg")


def test_languages(monkeypatch):
    assert language({"LANTING_LANG": "zh", "LANG": "C"}) == "zh"
    assert language({"LC_ALL": "zh_CN.UTF-8"}) == "zh"
    assert language({"LANTING_LANG": "en", "LANG": "zh_TW"}) == "en"
    assert language({}) == "en"
    error = LantingError("{path} is a folder, not a picture", path="cat")
    monkeypatch.setenv("LANTING_LANG", "zh")
    assert (str(error), explain(error)) == ("cat is a folder, not a picture", "cat 是文件夹，不是图片")
    assert explain(LantingError("plain {words}")) == "plain {words}"
    torn = damaged(Path("a.gguf"), "{what} is cut short", what=Phrase("the note {key}", key="b"))
    assert str(torn) == "a.gguf is damaged: the note b is cut short; download it again"
    assert explain(torn) == "a.gguf 已损坏：注释 b 被截断；请重新下载"


# calls whose first argument (of `damaged` the second) is read by people
SAYING = ("say", "line", "note", "fine", "remark", "problem", "advice", "Phrase", "damaged")
ROOMS = ["core", "specs", "plan", "weights", "text", "reading", "attach", "engine", "bench", "serve", "cluster"]
ROOMS += ["train", "evals", "defaults", "doctor", "cli", "flow", "tasks"]


def said(room: str) -> Iterator[ast.expr]:
    """What calls of a room are given to be read by people."""
    errors = {e.__name__ for e in (LantingError, *LantingError.__subclasses__())} | {
        "RefusalError",
        "MissingJudgeError",
    }
    errors |= {error.__name__ for error in ServeError.__subclasses__()} | {"HttpError"}
    for path in (Path(lanting.__file__).parent / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
            if name in SAYING or name in errors:
                yield node.args[int(name == "damaged")]


def sentences() -> set[str]:
    """Every constant sentence that a person may read."""
    found = {each.value for room in ROOMS for each in said(room) if isinstance(each, ast.Constant)}
    return found | {get_spec(name).licence for name in spec_names()} - {""}


@pytest.mark.parametrize("room", ROOMS)
def test_no_sentence_is_filled_before_it_is_said(room):
    """Nobody would find it in the table of Chinese."""
    assert [ast.unparse(each) for each in said(room) if isinstance(each, ast.JoinedStr)] == []


def test_every_sentence_is_translated_with_its_fields():
    table, used = chinese(), sentences()
    assert len(used) > 60
    assert sorted(used - set(table)) == []
    for english, translated in table.items():
        fields = [sorted(re.findall(r"{[^}]*}", text)) for text in (english, translated)]
        assert set(fields[0]) == set(fields[1]), english
    values = {"a", "an", "something", "loading", "reading", "drawing", "developing", "writing"}  # put into sentences
    orphans = [key for key in table if key not in used and key.split(" ")[0] not in values]
    assert orphans == []
