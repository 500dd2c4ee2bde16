"""LoRAs through the engine and the command line: defaults, recipes, replay, a distilled release, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from lanting import Engine, ModelError, PictureError, Request, RequestError
from lanting.cli.main import main
from lanting.core.recipe import from_json, infotext, read_recipe, to_json
from lanting.weights import home
from lanting.weights.inspect import describe
from loras import over_attention

NOTES = {"lanting.steps": "3", "lanting.guidance_scale": "1", "lanting.shift": "3"}
ASKED = {"prompt": "a sign", "size": (64, 48), "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Qwen-Image that brings a LoRA called `lightning`."""
    made = tiny.save_folder(tmp_path_factory.mktemp("lora") / "qwen-image", shard="100KB")
    (made / "lora").mkdir()
    over_attention(made / "lora" / "lightning.safetensors", made, seed=1, notes=NOTES)
    return made


def open_engine(folder: Path, *loras: str) -> Engine:
    return Engine.open(folder, device="cpu", dtype="float32", loras=loras)


def run(folder: Path, *loras: str, **asked):
    with open_engine(folder, *loras) as engine:
        return engine.run(Request(**{**ASKED, **asked}))


def test_a_lora_changes_the_picture_and_nothing_does_not(folder, tmp_path):
    ink = str(over_attention(tmp_path / "ink.safetensors", folder, 2))
    options = {"steps": 2, "guidance_scale": 1.0}
    plain, off = run(folder, **options), run(folder, f"{ink}:0", "lightning:0", **options)
    assert plain.images[0].tobytes() == off.images[0].tobytes()
    half, whole = run(folder, f"{ink}:0.5", **options), run(folder, ink, **options)
    assert len({image.images[0].tobytes() for image in (plain, half, whole)}) == 3
    twice = run(folder, f"{ink}:0.25", f"{ink}:0.25", **options)
    assert max(high for _, high in _difference(twice, half)) <= 1
    assert plain.recipes[0].loras == () and plain.recipes[0].weights == half.recipes[0].weights


def test_one_file_may_be_given_as_a_path_without_a_list(folder, tmp_path):
    ink, one = (
        over_attention(tmp_path / "ink.safetensors", folder, 2),
        Request(**{**ASKED, "steps": 1, "guidance_scale": 1.0}),
    )
    with Engine.open(folder, device="cpu", dtype="float32", loras=ink) as engine, open_engine(folder, str(ink)) as same:
        assert engine.run(one).images[0].tobytes() == same.run(one).images[0].tobytes()
        assert len(engine.models.loras) == 1


def test_strengths_change_without_loading(folder, tmp_path):
    ink, options = (
        str(over_attention(tmp_path / "ink.safetensors", folder, 2)),
        {**ASKED, "steps": 2, "guidance_scale": 1.0},
    )
    with open_engine(folder, f"{ink}:0.5", "lightning:0") as engine:
        half = engine.run(Request(**options))
        net = engine.models.transformer
        engine.set_strengths(0.25, 0)
        quarter = engine.run(Request(**options))
        engine.set_strengths(0.25, 0.5)
        assert engine.spec.defaults.steps == 3, "its wishes count again"
        both = engine.run(Request(**options))
        engine.set_strengths(0.5, 0)
        again = engine.run(Request(**options))
        assert engine.models.transformer is net
        for wrong in ((1.0,), (1.0, 11.0)):
            with pytest.raises(RequestError, match="strength"):
                engine.set_strengths(*wrong)
    for got, strengths in ((half, (0.5, 0)), (quarter, (0.25, 0)), (both, (0.25, 0.5))):
        want = run(folder, f"{ink}:{strengths[0]}", f"lightning:{strengths[1]}", steps=2, guidance_scale=1.0)
        # where a fresh engine's weights begin in memory may change the last bit of a product, so one grey level
        assert max(high for _, high in _difference(got, want)) <= 1
        assert [lora["strength"] for lora in got.recipes[0].loras] == list(strengths)
    assert max(high for _, high in _difference(again, half)) <= 1  # hung anew, and so elsewhere in memory


def _difference(a, b):
    from PIL import ImageChops

    return [band.getextrema() for band in ImageChops.difference(a.images[0], b.images[0]).split()]


def test_a_lora_says_how_it_wants_to_be_drawn_with(folder):
    plain, quick = open_engine(folder), open_engine(folder, "lightning:0.8")
    assert (plain.spec.defaults.steps, plain.spec.defaults.guidance_scale) == (50, 4.0)
    assert (quick.spec.defaults.steps, quick.spec.defaults.guidance_scale) == (3, 1.0)
    assert quick.models.schedule.sigmas(3, 99).tolist() == pytest.approx([1, 6 / 7, 3 / 5, 0])
    recipe = quick.run(Request(**ASKED)).recipes[0]
    assert (recipe.request["steps"], recipe.request["guidance_scale"]) == (3, 1.0)
    (lora,) = recipe.loras
    assert (lora["name"], lora["strength"], lora["path"]) == ("lightning.safetensors", 0.8, "lightning")
    assert len(lora["sha256"]) == 64
    assert from_json(to_json(recipe)) == recipe
    assert "LoRA: lightning:0.8" in infotext(recipe)
    flags = quick.run(Request(**ASKED, steps=2, guidance_scale=2.0)).recipes[0].request
    assert (flags["steps"], flags["guidance_scale"]) == (2, 2.0)


def test_a_recipe_with_strange_loras_is_refused(folder):
    table = json.loads(to_json(run(folder, "lightning").recipes[0]))
    for strange in ("x", [1], [{"name": "x"}], [{**table["loras"][0], "strength": "much"}]):
        with pytest.raises(PictureError, match="can't be read"):
            from_json(json.dumps({**table, "loras": strange}))
    sly = from_json(json.dumps({**table, "loras": [{**table["loras"][0], "name": "../../etc/x"}]}))
    assert sly.loras[0]["name"] == "x"


def test_what_does_not_fit_is_refused_before_a_weight_is_read(folder, tmp_path):
    save_file({"transformer_blocks.9.attn.to_q.lora_A.weight": torch.ones(2, 32)}, str(tmp_path / "big.safetensors"))
    with pytest.raises(ModelError, match=r"transformer_blocks\.9\.attn\.to_q\.lora_A\.weight, which fits no layer"):
        open_engine(folder, str(tmp_path / "big.safetensors"))
    with pytest.raises(ModelError, match="this model brings: lightning"):
        open_engine(folder, "lightening")
    with pytest.raises(RequestError, match="strength"):
        open_engine(folder, "lightning:99")


def test_a_distilled_release_loads_its_lora(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LANTING_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    shutil.copytree(folder, tmp_path / "models" / "qwen-image")
    path = home.lora_path("qwen-image-lightning-4")
    assert path is not None
    with pytest.raises(ModelError, match="lanting pull qwen-image-lightning-4"):
        Engine.open("qwen-image-lightning-4")
    path.parent.mkdir(parents=True)
    over_attention(path, folder, 7)
    engine = Engine.open("qwen-image-lightning-4", device="cpu", dtype="float32")
    ours = engine.run(Request(**ASKED))
    again = run(folder, str(path), steps=4, guidance_scale=1.0, options={"sigmas": None})
    assert ours.recipes[0].request["steps"] == 4 and ours.recipes[0].loras == ()
    assert ours.recipes[0].weights != again.recipes[0].weights, "the release's own LoRA is part of its weights"
    assert ours.images[0].tobytes() != run(folder, steps=4, guidance_scale=1.0).images[0].tobytes()


def test_generate_and_replay(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LANTING_LANG", "en")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many as here, so that sums round alike
    monkeypatch.chdir(tmp_path)

    def lanting(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(list(words)), *capsys.readouterr()

    model = tmp_path / "model"
    shutil.copytree(folder, model)
    ink = over_attention(tmp_path / "ink.safetensors", folder, 2)
    flags = ["--model", str(model), "--device", "cpu", "--dtype", "float32"]
    words = ["generate", "a sign", "--size", "64x48", "--seed", "3", "-o", "a.png", "--json"]
    code, out, err = lanting(*words, "--lora", "lightning", "--lora", "ink.safetensors:0.5", *flags)
    assert code == 0, err
    recorded = read_recipe(tmp_path / "a.png").loras
    assert [(one["path"], one["strength"]) for one in recorded] == [("lightning", 1.0), ("ink.safetensors", 0.5)]
    assert json.loads(out)["loras"] == [dict(one) for one in recorded]

    command = [sys.executable, "-m", "lanting", "replay", "a.png", "-o", "b.png", *flags]
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)  # in another process
    assert again.returncode == 0 and "identical, pixel for pixel" in again.stdout, again.stderr

    moved = ink.rename(tmp_path / "moved.safetensors")
    code, _, err = lanting("replay", "a.png", "-o", "c.png", *flags)
    assert code == 2
    assert err == "lanting: the LoRA ink.safetensors is not here any more: give it with --lora\n"
    given = ["--lora", "lightning", "--lora", moved.name]
    _, out, err = lanting("replay", "a.png", "-o", "c.png", *given, *flags)
    assert "identical, pixel for pixel" in out, err

    over_attention(tmp_path / "ink.safetensors", folder, 3)
    _, out, err = lanting("replay", "a.png", "-o", "d.png", *flags)
    assert "is not the LoRA the recipe was made with" in err and "different by up to" in out


def test_show_lists_the_loras_of_a_model(folder):
    told = describe(str(folder))
    assert told.problems == ()
    names = {part.name: part.kind.name for part in told.parts}
    assert names["lora/lightning.safetensors"] == "lora" and "lora" not in names
