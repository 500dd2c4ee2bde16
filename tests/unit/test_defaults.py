"""Defaults of one's own: which value holds, what one changed line leaves as it was, and what is refused."""

from __future__ import annotations

import json
import os
import stat
import tomllib
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as some
from PIL import Image

from fakes import FakeEngine
from lanting.cli import draw
from lanting.cli.main import main
from lanting.core.errors import LantingError
from lanting.defaults.choose import Defaults, defaults, language_of, speak
from lanting.defaults.file import Content, change, config_path, load, save, understood
from lanting.defaults.keys import KEYS
from lanting.specs import get_spec
from processor import python

GOOD = {
    "model": "qwen-image-2512",
    "device": "cuda:1",
    "vram": "12G",
    "ram": "800M",
    "quality": "balanced",
    "output": "~/pictures",
    "lang": "zh",
    "host": "0.0.0.0",
    "port": 8354,
}
WRITTEN = """\
# mine
model = "nano"  # small
 'device'="cpu"

# what listens
[serve]
port = 9000 # odd
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    """Where the file is, and an empty current folder; nothing of the real home."""
    monkeypatch.setenv("LANTING_CONFIG", str(tmp_path / "own" / "config.toml"))
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LANTING_LANG", "en")
    monkeypatch.delenv("LANTING_MODEL", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "own" / "config.toml"


@pytest.fixture
def opened(config, monkeypatch) -> list[tuple[str, str | None]]:
    """(model, device) of every engine that a verb opened: fakes."""
    seen = []

    def open_engine(model, device, dtype, controlnet=None, loras=(), **options):
        assert type(model) is str
        seen.append((model, device))
        return FakeEngine(spec=get_spec(model))

    monkeypatch.setattr(draw, "open_engine", open_engine)
    monkeypatch.setattr(draw, "fit", lambda request, wish, screen: {})
    return seen


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------- where, and which value holds
def test_where_the_file_is(monkeypatch):
    assert config_path({"LANTING_CONFIG": "/a/b.toml", "XDG_CONFIG_HOME": "/c"}) == Path("/a/b.toml")
    monkeypatch.setattr("sys.platform", "linux")
    assert config_path({"XDG_CONFIG_HOME": "/c"}) == Path("/c/lanting/config.toml")
    assert config_path({}) == Path.home() / ".config/lanting/config.toml"
    monkeypatch.setattr("sys.platform", "win32")
    assert config_path({"APPDATA": "/roaming", "XDG_CONFIG_HOME": "/c"}) == Path("/roaming/lanting/config.toml")


def test_every_key_takes_a_good_value_and_refuses_another(config):
    for name, key in KEYS.items():
        value = GOOD[key.parameter]
        assert defaults(Content(config, values={name: value}), {}).values == {name: value}
        for bad in ("", "x\x07", ["a"], 1.5, True, "nonsense of five words"):
            if isinstance(bad, str) and bad.startswith("nonsense") and key.parameter in ("model", "output"):
                continue  # that there is none of that name, the engine will say
            with pytest.raises(LantingError, match=key.parameter):
                defaults(Content(config, values={name: bad}), {})


def test_keys_stand_for_parameters_that_the_verbs_have():
    import inspect

    from lanting.cli.main import VERBS

    for key in KEYS.values():
        for verb in key.verbs:
            module, name = VERBS[verb].split(":")
            function = getattr(__import__(f"lanting.cli.{module}", fromlist=[name]), name)
            default = inspect.signature(function).parameters[key.parameter].default
            if (key.built_in and verb not in ("layers", "serve")) or key.name in ("layers.model", "serve.host"):
                assert str(default) == key.built_in, (key.name, verb)
            elif key.name == "serve.port":
                assert default == int(key.built_in)


def test_flag_then_environment_then_one_verb_then_all(opened, config, monkeypatch):
    put(config, 'model = "qwen-image-2.1"\ngenerate.model = "qwen-image"\ndevice = "cuda:1"\n')
    monkeypatch.setenv("LANTING_MODEL", "qwen-image-2512")
    assert main(["generate", "x", "-m", "nano", "--device", "cpu", "-o", "1.png"]) == 0
    assert main(["generate", "x", "-o", "2.png"]) == 0
    monkeypatch.delenv("LANTING_MODEL")
    assert main(["generate", "x", "-o", "3.png"]) == 0
    put(config, 'model = "qwen-image-2.1"\n')
    assert main(["generate", "x", "-o", "4.png"]) == 0
    config.unlink()
    assert main(["generate", "x", "-o", "5.png"]) == 0
    assert opened == [
        ("nano", "cpu"),
        ("qwen-image-2512", "cuda:1"),
        ("qwen-image", "cuda:1"),
        ("qwen-image-2.1", None),
        ("nano", None),
    ]


def test_a_general_model_counts_where_its_release_can(opened, config, capsys):
    Image.new("RGB", (64, 48), "orange").save("cat.png")
    edit, layers = ["edit", "cat.png", "blue", "-o"], ["layers", "cat.png", "-o"]
    put(config, 'model = "qwen-image-2512"\n')  # words alone
    assert main(["generate", "x", "-o", "1.png"]) == main([*edit, "2.png"]) == main([*layers, "3.png"]) == 0
    put(config, 'model = "qwen-image-edit-2511"\n')  # edits alone
    assert main(["generate", "x", "-o", "4.png"]) == main([*edit, "5.png"]) == 0
    put(config, 'model = "qwen-image-2512"\nedit.model = "qwen-image"\n')  # somebody said so
    assert main([*edit, "6.png", "--strength", "0.5"]) == 0
    models = [model for model, _ in opened]
    assert models == [
        *("qwen-image-2512", "nano", "qwen-image-layered"),
        *("nano", "qwen-image-edit-2511"),
        "qwen-image",
    ]
    told = [line.strip() for line in capsys.readouterr().err.splitlines() if "lanting config" in line]
    assert told == [f"model: {name} (lanting config)" for name in (models[0], models[4], models[5])]


def test_a_folder_counts_by_what_it_can_do(config, tmp_path):
    tiny.save_folder(tmp_path / "words")
    able = {verb: "model" in Defaults({"model": str(tmp_path / "words")}).of(verb) for verb in ("generate", "edit")}
    assert able == {"generate": True, "edit": False}
    gone = Defaults({"model": "/no/such/folder"})
    assert gone.of("edit")["model"] == "/no/such/folder"  # to be told, not to be passed over


def test_the_line_about_the_model(opened, config, capsys, monkeypatch):
    put(config, 'model = "nano"\n')
    monkeypatch.setenv("LANTING_MODEL", "qwen-image")
    for words, said in (
        ([], "model: qwen-image (LANTING_MODEL)"),
        (["--model", "nano"], ""),
        (["--quiet"], ""),
        (["--json"], ""),
    ):
        assert main(["generate", "x", "--seed", "1", "--force", "-o", "x.png", *words]) == 0
        out = capsys.readouterr()
        assert ("model:" in out.err) == bool(said) and said in out.err and "\x1b" not in out.err
    monkeypatch.setenv("LANTING_LANG", "zh")
    assert main(["generate", "x", "--force", "-o", "x.png"]) == 0
    assert "模型：qwen-image（LANTING_MODEL）" in capsys.readouterr().err


def test_pictures_go_to_the_folder(opened, config, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    put(config, f"output = {json.dumps(str(tmp_path / 'pictures'))}\nquality = 'high'\n")
    assert main(["generate", "x", "--seed", "1"]) == 0
    assert main(["generate", "x", "--seed", "1", "-o", "here.png"]) == 0
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["x-1.png"] and Path("here.png").exists()
    put(config, f"output = {json.dumps(str(tmp_path / 'gone'))}\n")
    capsys.readouterr()
    assert main(["generate", "x"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_replay_and_measuring_get_nothing(opened, config, monkeypatch):
    assert main(["generate", "x", "--seed", "9", "-o", "x.png"]) == 0
    put(config, 'model = "qwen-image"\ndevice = "cuda:1"\nvram = "12G"\noutput = "/no/such"\nquality = "fast"\n')
    monkeypatch.setenv("LANTING_MODEL", "qwen-image-2512")
    assert main(["replay", "x.png", "-o", "y.png"]) == 0
    assert opened == [("nano", None)] * 2
    own = defaults(load(config), {})
    assert [own.of(verb) for verb in ("replay", "bench", "eval", "train", "quantize")] == [{}] * 5


def test_the_server_has_keys_of_its_own(config):
    own = Defaults({"model": "qwen-image", "vram": "12G", "serve.vram": "20G", "serve.port": 8400, "serve.host": "::1"})
    assert own.of("serve") == {"model": ["qwen-image"], "vram": "20G", "host": "::1", "port": 8400}
    assert own.of("generate") == {"model": "qwen-image", "vram": "12G"}


def test_plan_takes_them(config, capsys):
    put(config, 'model = "qwen-image-2512"\nvram = "10G"\nram = "32G"\n')
    assert main(["plan", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)["chosen"]
    assert (chosen["model"], chosen["device"]) == ("qwen-image-2512", "cuda")
    assert chosen["peak_vram"] <= 10e9


def test_the_language_is_spoken_and_given_back(config, capsys, monkeypatch):
    monkeypatch.delenv("LANTING_LANG")
    monkeypatch.setenv("LANG", "C")
    put(config, 'lang = "zh"\n')
    assert main(["plan", "qwen-imaje"]) == 2
    assert "您是指" in capsys.readouterr().err
    assert "LANTING_LANG" not in os.environ
    assert main(["config", "lang", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == "lanting config"  # though the variable is set meanwhile
    monkeypatch.setenv("LANTING_LANG", "en")
    assert main(["plan", "qwen-imaje"]) == 2
    assert "did you mean" in capsys.readouterr().err
    with speak("zh"):
        assert os.environ["LANTING_LANG"] == "en"
    assert language_of(understood(config, "lang = 'zh'\nmodle = 3")) == "zh"  # also where the rest is wrong


# ---------------------------------------------------------------- without a file, and with a broken one
def test_without_a_file_nothing_is_read(tmp_path):
    code = (
        "import sys; from lanting.cli.main import main; "
        "code = main(['list', '--quiet']); print(code, *sorted(m for m in sys.modules if 'defaults' in m))"
    )
    env = {"LANTING_CONFIG": str(tmp_path / "none.toml"), "LANTING_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path)}
    done = python("-c", code, **env)
    assert done.stdout.splitlines()[-1].split()[0] == "0", done.stderr
    code = "from lanting.cli.main import main; main(['--help']); import sys; print('lanting.defaults' in sys.modules)"
    put(tmp_path / "none.toml", "broken")
    assert python("-c", code, **env).stdout.splitlines()[-1] == "False"


BROKEN = {
    "no TOML": ("model = nano\n", 1, "can't be read"),
    "further down": ('# x\n\nmodel = "nano"\n[serve\n', 4, "can't be read"),
    "the same key twice": ('model = "a"\nmodel = "b"\n', 2, "can't be read"),
    "an open string": ('model = "nano', 1, "can't be read"),
    "unknown key": ('# x\nmodle = "nano"\n', 2, "did you mean model?"),
    "unknown key of a verb": ('[edit]\nvram = "12G"\n', 2, "did you mean vram?"),
    "a value that can't be": ('\nquality = "best"\n', 2, "did you mean fast?"),
    "a number for text": ("vram = 12\n", 1, "quotation marks"),
    "an array": ('serve.model = ["a", "b"]\n', 1, "quotation marks"),
    "a port": ("[serve]\nport = 70000", 2, "65535"),
    "not UTF-8": (b'# \xff\nmodel = "nano"\n', 1, "not UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_sentence_with_its_line(case, opened, config, capsys):
    text, line, said = BROKEN[case]
    put(config, "")
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["generate", "x"]) == 2
    err = capsys.readouterr().err
    assert f"{config}, line {line}" in err and said in err and err.count("\n") == 1
    assert opened == []
    assert main(["generate", "--help"]) == main(["--help"]) == 0
    capsys.readouterr()
    assert main(["config"]) == 2
    assert f"line {line}" in capsys.readouterr().out.splitlines()[-1]


def test_a_folder_and_a_huge_file_are_refused(config, capsys):
    config.mkdir(parents=True)
    assert main(["list"]) == 2
    assert "can't be read" in capsys.readouterr().err
    config.rmdir()
    put(config, "#" * (2 << 20))
    assert main(["list"]) == 2
    assert "more than a megabyte" in capsys.readouterr().err


def test_a_mark_in_front_is_no_error(config, capsys):
    """Notepad writes one."""
    put(config, "")
    config.write_bytes(b'\xef\xbb\xbfmodel = "nano"\r\n')
    assert main(["config", "model"]) == 0
    assert capsys.readouterr().out == "nano\n"


def test_a_broken_file_is_repaired_line_by_line(config, capsys):
    put(config, "model = nano  # mine\nvram = 12G\nmodle = 'x'\n")
    assert main(["config", "ram", "16G"]) == 2  # not what is wrong: nothing is written
    assert config.read_text() == "model = nano  # mine\nvram = 12G\nmodle = 'x'\n"
    assert main(["config", "model", "nano"]) == 2  # the next one is told
    assert "line 2" in capsys.readouterr().err
    assert main(["config", "--unset", "vram"]) == 0
    assert main(["config", "--unset", "modle"]) == 0
    assert config.read_text() == 'model = "nano"  # mine\n'
    assert main(["config"]) == 0


# ---------------------------------------------------------------- one line
def test_comments_and_order_survive(config):
    put(config, WRITTEN)
    for words in (["model", "qwen-image"], ["device", "cuda"], ["vram", "12G"], ["serve.host", "::1"], ["lang", "en"]):
        assert main(["config", *words]) == 0
    assert main(["config", "serve.port", "9001"]) == main(["config", "edit.model", "nano"]) == 0
    assert (
        config.read_text()
        == """\
# mine
model = "qwen-image"  # small
 'device'="cuda"
vram = "12G"
lang = "en"
edit.model = "nano"

# what listens
[serve]
host = "::1"
port = 9001 # odd
"""
    )
    for name in ("model", "device", "vram", "serve.host", "serve.port", "edit.model", "lang"):
        assert main(["config", "--unset", name]) == 0
    assert config.read_text() == "# mine\n\n# what listens\n[serve]\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "# Defaults of lanting: 'lanting config' lists what may stand here.\nmodel = \"x\"\n"),
        ("# a\n", '# a\nmodel = "x"\n'),
        ("# a", '# a\nmodel = "x"\n'),
        ("[serve]\nport = 1\n", 'model = "x"\n[serve]\nport = 1\n'),
        ("# a\n\n# b\n[serve]\n", '# a\nmodel = "x"\n\n# b\n[serve]\n'),
        ("model = '''y'''\n", 'model = "x"\n'),
        ("model='#' # c\r\nram = '1G'\r\n", "model=\"x\" # c\r\nram = '1G'\r\n"),
        ('\'model\' = "a\\"#" # c', "'model' = \"x\" # c"),
    ],
)
def test_where_a_line_goes(before, after, tmp_path):
    assert change(understood(tmp_path, before), "model", "x") == after


@pytest.mark.parametrize("text", ['model = """\na\nb"""\n', 'serve = { port = 1 }\nx = """\n[serve]\n"""\n'])
def test_what_one_line_can_not_change_is_left_alone(text, tmp_path):
    content = understood(tmp_path, text)
    assert content.broken is None
    with pytest.raises(LantingError, match="by hand"):
        change(content, "serve.port" if "serve" in text else "model", 2 if "serve" in text else "x")


PRINTED = some.characters(exclude_categories=["C"])
VALUES = {
    name: some.text(PRINTED, min_size=1) if key.parameter != "port" else some.integers(0, 65535)
    for name, key in KEYS.items()
}
TOUCHED = some.lists(
    some.sampled_from(sorted(KEYS)).flatmap(lambda n: some.tuples(some.just(n), some.none() | VALUES[n]))
)
LINES = some.lists(some.sampled_from(["# note", "", "  # ] = [", "[serve]", "[edit]  # e", "[layers]"]), unique=True)


@given(LINES, TOUCHED, some.sampled_from(["\n", "\r\n"]))
def test_any_changes_leave_the_rest_as_it_was(lines, changes, ending):
    text, kept = "".join(line + ending for line in lines), {}
    for name, value in changes:
        text = change(understood(Path("x"), text), name, value)
        kept = {key: old for key, old in kept.items() if key != name} | ({} if value is None else {name: value})
        flat = understood(Path("x"), text)
        assert flat.values == kept and set(flat.lines) == set(kept)
        tomllib.loads(text)
    rest = iter(text.split("\n"))
    assert all(any(line == other.rstrip("\r") for other in rest) for line in lines if line)


def test_links_and_rights_stay(config, tmp_path):
    real = put(tmp_path / "dotfiles" / "lanting.toml", 'model = "nano"\n')
    real.chmod(0o600)
    config.parent.mkdir()
    config.symlink_to(real)
    assert main(["config", "model", "qwen-image"]) == 0
    assert config.is_symlink() and real.read_text() == 'model = "qwen-image"\n'
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    assert [path.name for path in real.parent.iterdir()] == ["lanting.toml"]


def test_a_device_is_never_replaced(config, monkeypatch, capsys):
    monkeypatch.setenv("LANTING_CONFIG", os.devnull)
    assert main(["config", "model", "nano"]) == 2
    assert "is not a file" in capsys.readouterr().err
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_what_can_not_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LantingError, match="can't be written"):
        save(Content(tmp_path / "file" / "config.toml"), "x")


# ---------------------------------------------------------------- the verb
def test_setting_says_what_it_means(config, capsys, monkeypatch):
    monkeypatch.setenv("LANTING_MODEL", "nano")
    assert main(["config", "model", "qwen-image-2512"]) == 0
    out = capsys.readouterr()
    assert f"model = qwen-image-2512, in {config}" in out.out
    assert "it counts for generate, plan, serve; edit, layers can't use it" in out.out
    assert "lanting pull qwen-image-2512" in out.out
    assert "LANTING_MODEL is set to nano and comes first" in out.err
    assert main(["config", "model"]) == main(["config", "ram"]) == 0
    out = capsys.readouterr()
    assert out.out == "nano\n" and "ram is not set" in out.err


def test_places_are_kept_in_full(config, tmp_path):
    Path("pictures").mkdir()
    tiny.save_folder(Path("mine"))
    assert main(["config", "output", "pictures"]) == main(["config", "edit.model", "./mine"]) == 0
    values = tomllib.loads(config.read_text())
    assert values == {"output": str(tmp_path / "work/pictures"), "edit": {"model": str(tmp_path / "work/mine")}}


WRONG = {
    "modle x": "there is no key modle; did you mean model?",
    "generate.vram 12G": "did you mean vram?",
    "model qwen-imaje": "did you mean qwen-image",
    "model no/such/folder": "does not exist",
    "quality best": "none of exact, high, balanced, fast",
    "vram lots": "vram: the amount of memory",
    "device cuad": "did you mean cuda?",
    "device cuda:0,cuda:0": "names a GPU twice",
    "serve.port 70000": "0 to 65535",
    "serve.port 80.5": "0 to 65535",
    "serve.host a/b": "no address",
    "lang de": "none of en, zh",
    "output nowhere": "does not exist",
    "model nano --unset ram": "either KEY or --unset",
    "--unset modle": "there is no key modle",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_can_not_be_is_refused(line, config, capsys):
    assert main(["config", *line.split()]) == 2
    err = capsys.readouterr().err
    assert WRONG[line] in err and err.count("\n") == 1
    assert not config.exists()


def test_the_list_says_where_each_comes_from(config, capsys, monkeypatch):
    put(config, 'model = "qwen-image-2512"\nedit.model = "nano"\n')
    assert main(["config", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["key"]: (row["value"], row["source"], row["line"]) for row in told["keys"]}
    assert set(rows) == set(KEYS) and told["path"] == str(config) and told["problems"] == []
    assert rows["model"] == ("qwen-image-2512", "lanting config", 1)
    assert rows["edit.model"] == ("nano", "lanting config", 2)
    assert rows["generate.model"] == ("qwen-image-2512", "model", 1)
    assert rows["layers.model"] == ("qwen-image-layered", "built-in", None)
    assert rows["vram"] == (None, "", None) and rows["lang"] == ("en", "LANTING_LANG", None)
    monkeypatch.setenv("LANTING_MODEL", "qwen-image")
    assert main(["config"]) == 0
    shown = capsys.readouterr().out
    assert f"defaults: {config}" in shown and "--port of serve" in shown
    assert [line.split()[:3] for line in shown.splitlines() if line.startswith("  model ")] == [
        ["model", "qwen-image", "LANTING_MODEL"]
    ]
    assert main(["config", "edit.model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["value"] == "nano"  # qwen-image edits nothing


def test_no_file_yet(config, capsys):
    assert main(["config"]) == 0
    assert f"{config} (not there yet)" in capsys.readouterr().out
    assert main(["config", "--unset", "model"]) == 0 and not config.parent.exists()
