"""`lanting lora show`: files of every dialect, strangers, edit and few-step LoRAs, and bad files."""

from __future__ import annotations

import json
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fakes import FakeEngine
from lanting.cli import draw as drawing
from lanting.cli.main import main
from lanting.core.errors import LantingError, ModelError
from lanting.flow.schedule import Schedule
from lanting.specs import get_spec, spec_names
from lanting.weights.linear_names import transformer_linears
from lanting.weights.lora_doctor import examine
from lanting.weights.lora_file import open_lora
from lanting.weights.lora_names import dialect_of, parse
from lanting.weights.lora_wishes import Wishes, wishes_of, with_wishes
from loras import DIALECTS, FORMS, NUMBERS, Made, make, network

NANO = {"num_layers": 6, "num_attention_heads": 7, "attention_head_dim": 32, "joint_attention_dim": 128}
SIDES = transformer_linears(NUMBERS)
OFFICIAL = [name for name in spec_names() if name != "nano" and not get_spec(name).lora]
BASES = tuple(name for name in OFFICIAL if "2.1" not in name)
QUERY = "transformer_blocks.0.attn.to_q"


@pytest.fixture(autouse=True)
def homeless(tmp_path, monkeypatch):
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LANTING_LANG", "en")


def plain(path: Path, config=None, layers=r".*attn\.to_.*", prefix="", notes=None) -> Path:
    """A LoRA of ranks 2 and 4 in Lightning's names over a model's Linears."""
    tensors = {}
    for name, (out, inner) in transformer_linears(config or {}).items():
        if re.fullmatch(layers, name):
            rank = 4 if name.endswith("to_q") else 2
            tensors[f"{prefix}{name}.lora_down.weight"] = torch.zeros(rank, inner, dtype=torch.bfloat16)
            tensors[f"{prefix}{name}.lora_up.weight"] = torch.zeros(out, rank, dtype=torch.bfloat16)
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, str(path), metadata=notes)
    return path


def show(capsys, *words: object, code: int = 0) -> str:
    assert main(["lora", "show", *map(str, words)]) == code
    told = capsys.readouterr()
    return told.out + told.err


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_are_told_apart(tmp_path, dialect):
    from lanting.weights.headers import read_header

    path = make(network(), "lora", DIALECTS[dialect][3]).save(tmp_path / "a.safetensors", dialect)
    wanted = dialect.removesuffix(" of a pipeline").removesuffix(" of old").removesuffix(" of a checkpoint")
    assert dialect_of(read_header(path)) == wanted.removesuffix(" with alpha")


def test_names_are_taken_apart():
    name = parse("base_model.model.transformer.transformer_blocks.0.attn.to_q.lora_A.default.weight")
    assert name is not None and (name.layer, name.role) == (QUERY, "down")
    name = parse("lycoris_transformer_blocks_0_attn_to_q.lokr_w2_a")
    assert name is not None and (name.layer, name.role, name.flat) == (QUERY.replace(".", "_"), "lokr_w2_a", True)
    for nothing in (
        "lora_A.weight",
        f"{QUERY}.weight",
        f"{QUERY}.lora_C.weight",
        "",
        ".",
        "alpha",
        f"{QUERY}.alphabet",
    ):
        assert parse(nothing) is None, nothing


def test_the_official_releases_and_nano_are_told_apart(tmp_path, capsys):
    large, small = plain(tmp_path / "large.safetensors"), plain(tmp_path / "small.safetensors", NANO)
    told = examine(str(large))
    assert told.fits == BASES and (told.tensors, told.matched, told.unmatched) == (900, 900, ())
    assert told.ranks == {2: 240, 4: 60} and told.scales == (0.5, 1.0) and told.forms == {"LoRA": 300}
    assert (told.dialect, told.dtypes) == ("Lightning", {"BF16": 600, "F32": 300})
    assert told.targets["attn.to_out.0"] == 60 and told.problems == () and not told.wishes
    assert examine(str(small)).fits == ("nano",)
    assert examine(str(small), "nano").fits == ("nano",)
    text = show(capsys, large)
    assert "900 matched, 0 not" in text and "fits: qwen-image, qwen-image-2512" in text and "ranks differ" in text
    assert show(capsys, large, "--quiet").split() == list(BASES)
    table = json.loads(show(capsys, large, "--json"))
    assert table["matched"] == 900 and table["fits"] == list(BASES) and table["path"] == str(large)
    wrong = examine(str(small), "qwen-image-2512")
    assert wrong.fits == () and wrong.model == "qwen-image-2512" and "of shape" in str(wrong.problems[0])
    text = show(capsys, small, "--model", "qwen-image", code=2)
    assert "fits: none" in text and text.count("problem: ") == 1
    assert "no release called" in show(capsys, small, "--model", "qwen-imag", code=2)


def test_every_form_has_its_name(tmp_path):
    from lanting.weights import lora_doctor

    net = network()
    shapes = {("small",): SIDES}
    names = {"lokr": "LoKr", "loha": "LoHa", "dora": "DoRA", "diff": "whole differences", "lora": "LoRA"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_doctor, "_known_shapes", lambda: shapes)
        for form in FORMS:
            told = examine(str(make(net, form, form != "lora without alpha").save(tmp_path / "a.safetensors")))
            assert told.fits == ("small",) and told.unmatched == (), form
            assert names[re.split("[ ,]", form)[0]] in told.forms, form
            assert ("biases" in told.forms) == ("bias" in form or form == "diff")


def test_strangers_are_named(tmp_path, capsys):
    path = tmp_path / "flux.safetensors"
    layers = [
        f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_{half}.weight" for i in range(9) for half in ("up", "down")
    ]
    save_file({layer: torch.zeros(4, 4) for layer in layers}, str(path))
    text = show(capsys, path, code=2)
    assert "0 matched, 18 not" in text and "names of FLUX" in text and "... and 10 more" in text
    assert text.count("no place for: ") == 8 and text.count("problem: ") == 1
    table = json.loads(show(capsys, path, "--json", code=2))
    assert table["unmatched"] == sorted(layers) and len(table["problems"]) == 18


def test_lightning_wants_no_guidance(tmp_path, capsys):
    path = plain(tmp_path / "Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors")
    text = show(capsys, path)
    assert "wants: 4 steps, guidance 1, shift 3" in text and "note: with guidance above 1" in text
    spec = with_wishes(get_spec("qwen-image-edit-2509"), [open_lora(path, transformer_linears({}))])
    assert (spec.defaults.steps, spec.defaults.guidance_scale, spec.schedule["shift"]) == (4, 1.0, 3.0)
    for name, steps in (
        ("Qwen-Image-Lightning-8steps-V1.1.safetensors", 8),
        ("Qwen-Image-2512-Lightning-4steps-V1.0-fp32.safetensors", 4),
        ("qwen-image-lightning-0steps.safetensors", None),
        ("lightning.safetensors", None),
    ):
        assert wishes_of(Path(name), {}).steps == steps
    notes = {"lanting.steps": "6"}
    assert wishes_of(path, notes) == Wishes(6), "what a file says itself goes before its name"


def test_sigmas_of_lightning():
    """Both from the release files and from a LoRA that wishes for them, whatever the picture's size."""
    tables = {
        4: [1, 0.9, 0.75, 0.5, 0],
        8: [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0],
    }
    scheduler = {
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "base_image_seq_len": 256,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
    }
    for steps, want in tables.items():

        class Few:
            strength, wishes = 1.0, wishes_of(Path(f"Qwen-Image-Lightning-{steps}steps-V2.0.safetensors"), {})

        for spec in (get_spec(f"qwen-image-lightning-{steps}"), with_wishes(get_spec("qwen-image"), [Few()])):
            assert (spec.defaults.steps, spec.defaults.guidance_scale) == (steps, 1.0)
            for tokens in (256, 4096, 8192):
                sigmas = Schedule.from_config({**scheduler, **spec.schedule}).sigmas(steps, tokens)
                assert torch.allclose(sigmas, torch.tensor(want, dtype=sigmas.dtype), atol=1e-6)


def test_generate_warns_of_guidance(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = plain(tmp_path / "Qwen-Image-Lightning-4steps-V2.0.safetensors")
    lora = open_lora(path, transformer_linears({}))
    engines = {
        "asked": FakeEngine(loras=(lora,)),
        "own": FakeEngine(get_spec("qwen-image-lightning-4"), loras=(lora,)),
        "off": FakeEngine(loras=(open_lora(path, transformer_linears({}), "", 0.0),)),
    }

    def said(engine: str, *flags: str) -> str:
        monkeypatch.setattr(drawing, "open_engine", lambda *_, **__: engines[engine])
        assert main(["generate", "a sign", "-m", "qwen-image", "-o", "x.png", "--force", *flags]) == 0
        return capsys.readouterr().err

    harsh = "is made for 4 steps without guidance; with guidance 4 pictures come out harsh: say --guidance 1"
    assert harsh in said("asked", "--guidance", "4") and harsh in said("own", "--guidance", "4")
    assert "wants 4 steps, guidance 1, shift 3; flags override it" in said("asked", "--guidance", "1")
    assert "wants" not in said("own") + said("off", "--guidance", "4") and "harsh" not in said("own") + said("off")
    monkeypatch.setenv("LANTING_LANG", "zh")
    assert "是为 4 步、不用引导而制作的" in said("asked", "--guidance", "4")


def test_edit_loras_on_models_that_draw(tmp_path, capsys, monkeypatch):
    path = plain(tmp_path / "scarf.safetensors", notes={"ss_base_model_version": "qwen_image_edit"})
    told = examine(str(path))
    assert told.made_for_edits and told.trained_on == "qwen_image_edit"
    text = show(capsys, path)
    assert "trained on, as the file says: qwen_image_edit" in text
    assert "on qwen-image, qwen-image-2512, qwen-image-layered it loads, but" in text
    assert "it loads, but" not in show(capsys, path, "--model", "qwen-image-edit-2511")
    monkeypatch.setenv("LANTING_LANG", "zh")
    assert "适用于：qwen-image" in show(capsys, path) and "它是为编辑而制作的" in show(capsys, path)


def test_a_model_folders_own_lora_and_numbers(tmp_path, capsys):
    """A folder is compared by its config, and LoRAs that it brings are found by name."""
    import tiny

    folder = tiny.save_folder(tmp_path / "model", shard="100KB")
    (folder / "lora").mkdir()
    config = json.loads((folder / "transformer" / "config.json").read_text())
    plain(folder / "lora" / "ink.safetensors", config)
    told = examine("ink", str(folder))
    assert told.fits == (str(folder),) and told.path.parent.name == "lora"
    assert f"fits: {folder}" in show(capsys, "ink", "--model", folder)


def test_the_doctor_needs_no_torch(tmp_path):
    path = plain(tmp_path / "a.safetensors", NANO)
    code = (
        "import sys; from lanting.cli.main import main; code = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'numpy', 'safetensors.torch') if name in sys.modules]); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "lora", "show", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------- bad files
DOWN, UP = torch.zeros(4, 32), torch.zeros(32, 4)
HALVES = {f"{QUERY}.lora_down.weight": DOWN, f"{QUERY}.lora_up.weight": UP}
W = torch.zeros
BAD: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "text encoder": ({"text_encoder.layers.0.q_proj.lora_A.weight": DOWN, **HALVES}, "changes the text encoder too"),
    "text encoder of kohya": ({"lora_te_layers_0_q_proj.lora_down.weight": DOWN}, "changes the text encoder too"),
    "text encoder of peft": ({"base_model.model.text_model.x.lora_A.weight": DOWN}, "changes the text encoder too"),
    "a Tucker core": ({f"{QUERY}.lora_mid.weight": DOWN, **HALVES}, "a kind of change that can't"),
    "a Tucker lokr": ({f"{QUERY}.lokr_t2": DOWN}, "a kind of change that can't"),
    "a rotation": ({f"{QUERY}.oft_blocks": DOWN}, "a kind of change that can't"),
    "a norm": ({"transformer_blocks.0.attn.norm_q.w_norm": DOWN}, "a kind of change that can't"),
    "a norm's diff": ({"transformer_blocks.0.attn.norm_q.diff": W(16)}, "fits no layer"),
    "no role": ({f"{QUERY}.lora_C.weight": DOWN}, "fits no layer"),
    "no layer": ({"transformer_blocks.7.attn.to_q.lora_down.weight": DOWN}, "fits no layer"),
    "a layer of none": ({".lora_down.weight": DOWN}, "fits no layer"),
    "two dialects": ({**HALVES, f"transformer.{QUERY}.lora_A.weight": DOWN.clone()}, "the same thing"),
    "fused and not": (
        {**HALVES, "transformer_blocks.0.attn.to_qkv.lora_A.weight": DOWN.clone()},
        "the same thing",
    ),
    "two forms": ({**HALVES, f"{QUERY}.hada_w1_a": DOWN}, "mixes two kinds"),
    "alpha alone": ({f"{QUERY}.alpha": W(())}, "lacks the down half"),
    "lengths alone": ({f"{QUERY}.dora_scale": W(32, 1)}, "lacks the down half"),
    "an inner bias alone": ({f"{QUERY}.lora_B.bias": W(32)}, "lacks the down half"),
    "lokr by half": ({f"{QUERY}.lokr_w1": W(4, 4)}, "lacks the lokr_w2_a half"),
    "lokr by three quarters": ({f"{QUERY}.lokr_w1": W(4, 4), f"{QUERY}.lokr_w2_a": W(8, 2)}, "lacks the lokr_w2_b"),
    "lokr twice": (
        {f"{QUERY}.lokr_w1": W(4, 4), f"{QUERY}.lokr_w2": W(8, 8), f"{QUERY}.lokr_w2_a": W(8, 2)},
        "the same thing",
    ),
    "lokr too small": ({f"{QUERY}.lokr_w1": W(4, 4), f"{QUERY}.lokr_w2": W(8, 4)}, r"needs \[8, 8\]"),
    "lokr of one axis": ({f"{QUERY}.lokr_w1": W(4), f"{QUERY}.lokr_w2": W(8, 4)}, r"needs \[4, 32\]"),
    "lokr of no rows": ({f"{QUERY}.lokr_w1": W(0, 4), f"{QUERY}.lokr_w2": W(8, 4)}, r"needs \[1, 32\]"),
    "lokr of rank 0": (
        {f"{QUERY}.lokr_w1": W(4, 4), f"{QUERY}.lokr_w2_a": W(8, 0), f"{QUERY}.lokr_w2_b": W(0, 8)},
        r"needs \[8, 1\]",
    ),
    "loha by half": ({f"{QUERY}.hada_w1_a": UP, f"{QUERY}.hada_w1_b": DOWN}, "lacks the hada_w2_a half"),
    "loha of another width": (
        {f"{QUERY}.hada_{a}": t for a, t in (("w1_a", UP), ("w1_b", DOWN), ("w2_a", W(32, 3)), ("w2_b", W(4, 32)))},
        r"needs \[32, 4\]",
    ),
    "rank 0": ({f"{QUERY}.lora_down.weight": W(0, 32), f"{QUERY}.lora_up.weight": W(32, 0)}, r"needs \[1, 32\]"),
    "lengths of another size": ({**HALVES, f"{QUERY}.dora_scale": W(31, 1)}, r"needs \[32\]"),
    "a bias of another size": ({**HALVES, f"{QUERY}.diff_b": W(31)}, r"needs \[32\]"),
    "a diff of another size": ({f"{QUERY}.diff": W(32, 31)}, r"needs \[32, 32\]"),
    "many alphas": ({**HALVES, f"{QUERY}.alpha": W(3)}, r"needs \[\]"),
    "an endless alpha": ({**HALVES, f"{QUERY}.alpha": torch.tensor(float("inf"))}, "should be a number"),
    "alpha, no number": ({**HALVES, f"{QUERY}.alpha": torch.tensor(float("nan"))}, "should be a number"),
    "alpha in 8 bits": ({**HALVES, f"{QUERY}.alpha": W((), dtype=torch.float8_e4m3fn)}, "no weight type"),
    "whole numbers": ({**HALVES, f"{QUERY}.lora_up.weight": UP.int()}, "as I32"),
    "a fused lokr": (
        {f"transformer_blocks.0.attn.to_qkv.lokr_{w}": W(*s) for w, s in (("w1", (4, 4)), ("w2", (24, 8)))},
        "which only a plain LoRA can have",
    ),
    "fused of one height": (
        {f"transformer_blocks.0.attn.to_qkv.{half}": t for half, t in (("lora_A.weight", DOWN), ("lora_B.weight", UP))},
        r"needs \[96, 4\]",
    ),
    "nothing": ({}, "is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_sentences(tmp_path, case):
    tensors, words = BAD[case]
    path = tmp_path / "bad.safetensors"
    save_file({key: value.clone() for key, value in tensors.items()}, str(path))
    with pytest.raises(ModelError, match=words) as caught:
        open_lora(path, SIDES)
    assert "bad.safetensors" in str(caught.value) and "\n" not in str(caught.value)
    assert str(examine(str(path)).problems[0])


def test_headers_that_were_meddled_with(tmp_path):
    """No mutation of names, shapes, types or bytes leads anywhere but to a sentence or a file that fits."""
    made: Made = make(network(), "dora over loha")
    good = made.save(tmp_path / "good.safetensors", "Kohya (musubi-tuner)", {"lanting.steps": "4"}).read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    rng, path, refused = random.Random(7), tmp_path / "mutant.safetensors", 0
    header = json.loads(good[8 : 8 + length])
    for turn in range(300):
        if turn % 2:
            raw = bytearray(good)
            for _ in range(rng.randint(1, 6)):
                raw[rng.randrange(8 + length)] = rng.randrange(256)
            path.write_bytes(bytes(raw))
        else:
            path.write_bytes(_mutated(header, rng) + good[8 + length :])
        try:
            open_lora(path, SIDES)
        except LantingError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 200


def _mutated(header: dict, rng: random.Random) -> bytes:
    """The header with one or two entries renamed, reshaped, retyped or exchanged."""
    table = json.loads(json.dumps(header))
    for _ in range(rng.randint(1, 2)):
        name = rng.choice([key for key in table if key != "__metadata__"])
        entry, what = table[name], rng.randrange(5)
        if what == 0:
            table[name.replace(*rng.choice([("attn", "attm"), ("_0_", "_9_"), ("hada", "lokr"), ("_a", "_b")]))] = (
                table.pop(name)
            )
        elif what == 1:
            entry["shape"] = entry["shape"][::-1] or [1]
        elif what == 2:
            entry["dtype"] = rng.choice(["BF16", "I32", "F64", "F4", "X", 3, None])
        elif what == 3:
            table["__metadata__"] = rng.choice([{"lanting.steps": "-1"}, {"lora_adapter_metadata": "[" * 9999}, []])
        else:
            entry["data_offsets"] = rng.choice([[0, 0], [-1, 4], [0, 2**60], "x", [4]])
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text
