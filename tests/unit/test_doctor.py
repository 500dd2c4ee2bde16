"""`lanting doctor`: each check from facts given to it, the facts from machines that are made up, and the verb."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import tiny

from lanting.cli.main import main
from lanting.doctor import examine, gather, hardware, settings, software, storage
from lanting.doctor.finding import NOTE, OK, PROBLEM, Finding, guarded
from lanting.doctor.gather import PROBE
from lanting.doctor.hardware import Kernels
from lanting.doctor.software import Cards, Interpreter, Torch
from lanting.doctor.storage import Begun, Disk, Held
from lanting.plan import Device, Machine
from lanting.weights.home import STAGING, Marker, model_folder, note_begun, write_marker
from processor import python

ROOT = Path(__file__).parents[2]
RTX = Cards(("NVIDIA GeForce RTX 4090",), "570.86", "12.8", (8, 9))
GB = 10**9


@pytest.fixture(autouse=True)
def _own(tmp_path, monkeypatch):
    for name, value in {"LANTING_HOME": "home", "HF_HUB_CACHE": "hub", "LANTING_CONFIG": "config.toml"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("LANTING_LANG", "en")
    monkeypatch.delenv("LANTING_MODEL", raising=False)


def one(findings) -> tuple[str, str]:
    """(state, all that is told) of the only finding."""
    (found,) = findings
    assert (found.advice is None) == (found.state == OK)
    return found.state, f"{found.told()} | {found.advice.told() if found.advice else ''}"


def machine(ram=64 * GB, free=60 * GB, *devices: Device) -> Machine:
    return Machine(ram, free, 8, (*devices, Device("cpu", "CPU")))


# ---------------------------------------------------------------- Python and torch
@pytest.mark.parametrize(
    ("found", "state", "said"),
    [
        (Interpreter((3, 12, 1)), OK, "Python 3.12.1, x86_64"),
        (Interpreter((3, 10, 9)), PROBLEM, "install Python 3.11 or newer"),
        (Interpreter((3, 12, 1), bits=32), PROBLEM, "64-bit Python"),
        (Interpreter((3, 12, 1), machine="x86_64", translated=True), PROBLEM, "Python for arm64"),
    ],
)
def test_python(found, state, said):
    told = one(software.python(found))
    assert told[0] == state and said in told[1]


@pytest.mark.parametrize(
    ("found", "cards", "state", "said"),
    [
        (Torch("2.13.0", "cpu"), Cards(), OK, "torch 2.13.0+cpu"),
        (None, Cards(), PROBLEM, 'pip install "torch>=2.8,<2.14"'),
        (Torch("2.7.1", "cu128"), RTX, PROBLEM, 'pip install "torch>=2.8,<2.14"'),
        (Torch("2.14.0", "cpu"), Cards(), PROBLEM, "none that lanting is made for"),
        (Torch("2.8.0", "cu128"), RTX, OK, "for the NVIDIA GeForce RTX 4090"),
        (Torch("2.8.0", "cu126"), RTX, OK, "torch 2.8.0+cu126"),  # older CUDA of the same number runs
        (Torch("2.9.0", "cu129"), RTX, OK, "torch 2.9.0+cu129"),  # so does newer
        (Torch("2.8.0", "cpu"), RTX, PROBLEM, "https://download.pytorch.org/whl/cu128"),
        (Torch("2.8.0", "cpu"), Cards(("T4",), "525.1", "12.0", (7, 5)), PROBLEM, "whl/cu126"),
        (Torch("2.8.0", "cpu"), Cards(("T4",), "580.1", "13.0", (7, 5)), PROBLEM, "whl/cu130"),
        (Torch("2.8.0", "cpu"), Cards(("GTX 1080",), "580.1", "13.0", (6, 1)), PROBLEM, "whl/cu126"),
        (Torch("2.8.0", "cpu"), Cards(("?",), "580.1", "13.0"), PROBLEM, "whl/cu130"),
        (Torch("2.8.0", "cpu"), Cards(("T4",), "470.1", "11.4", (7, 5)), PROBLEM, "newest driver"),
        (Torch("2.9.0", "cu130"), RTX, PROBLEM, "built for CUDA 13.0, and driver 570.86 speaks 12.8 at most"),
        (Torch("2.8.0", "cu128"), Cards(("T4",), "470.1", "11.4", (7, 5)), PROBLEM, "newest driver"),
        (Torch("2.8.0", "cpu"), Cards(amd="Radeon"), NOTE, "choose ROCm"),
        (Torch("2.8.0", "rocm6.4"), Cards(amd="Radeon"), OK, "torch 2.8.0+rocm6.4"),
    ],
)
def test_torch(found, cards, state, said):
    told = one(software.torch(found, cards))
    assert told[0] == state and said in told[1]


def test_the_range_and_the_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = next(line for line in project["dependencies"] if line.startswith("torch"))
    assert f'"{wanted}"' == software.WANTED
    assert wanted == "torch>={}.{},<{}.{}".format(*software.TORCH[0], *software.TORCH[1])
    assert project["requires-python"] == ">={}.{}".format(*software.PYTHON)
    extras = project["optional-dependencies"]
    assert set(software.EXTRAS) == set(extras) - {"test", "dev"}
    for name, distributions in software.EXTRAS.items():
        listed = {re.split(r"[>=<;\[ ]", line)[0] for line in extras[name]}
        assert set(distributions) <= listed
        assert listed - set(distributions) <= {"lanting", "httptools", "uvloop"}  # not everywhere


def test_gpus_that_can_not_be_reached():
    assert "restart the machine" in one(software.driver(Cards(failed="Driver/library version mismatch")))[1]
    assert one(software.driver(Cards(silent=True)))[0] == PROBLEM
    assert list(software.driver(RTX)) == []


@pytest.mark.parametrize(
    ("told", "state", "said"),
    [
        ({"ok": True}, OK, "RTX 4090 computes"),
        ({"silent": True}, PROBLEM, "no answer in 90 seconds"),
        ({"error": "CUDA error: no kernel image is available"}, PROBLEM, "has no code for"),
        ({"error": "CUDA out of memory"}, PROBLEM, "can't use the NVIDIA GeForce RTX 4090: CUDA out of memory"),
        ({"ok": False}, PROBLEM, "can't use"),
    ],
)
def test_what_torch_says_of_the_gpu(told, state, said):
    found = one(software.answers(RTX, Torch("2.8.0", "cu128"), told, 90))
    assert found[0] == state and said in found[1]
    assert list(software.answers(RTX, Torch("2.8.0", "cu128"), None, 90)) == []


def test_torch_is_asked_where_a_gpu_is_and_in_a_process_of_its_own(monkeypatch, tmp_path):
    cuda, script = Torch("2.8.0", "cu128"), tmp_path / "python"
    script.write_text("#!/bin/sh\nexec " + shlex.quote(sys.executable) + ' "$@"\n')
    asked = []
    monkeypatch.setattr(gather, "ask", lambda *words, seconds: asked.append(words) or (0, 'a warning\n{"ok": true}'))
    assert gather.computing(Cards(), cuda, False) is None  # no GPU
    assert gather.computing(RTX, Torch("2.8.0"), False) is None  # a CPU build
    assert gather.computing(RTX, cuda, True) is None  # hidden
    assert asked == []
    assert gather.computing(RTX, cuda, False) == {"ok": True}
    assert gather.computing(Cards(apple="Apple M4"), Torch("2.8.0"), False) == {"ok": True}
    assert [words[-1] for words in asked] == ["cuda", "mps"]
    monkeypatch.setattr(gather, "ask", lambda *words, seconds: (None, ""))
    assert gather.computing(RTX, cuda, False) == {"silent": True}
    monkeypatch.setattr(gather, "ask", lambda *words, seconds: (-11, ""))
    assert gather.computing(RTX, cuda, False) == {"error": "exit code -11"}


def test_the_probe_computes_and_reports():
    for place, wanted in (("cpu", {"ok"}), ("toaster", {"error"})):
        assert set(json.loads(python("-c", PROBE, place).stdout)) == wanted


@pytest.mark.parametrize(
    ("version", "cards", "said"),
    [
        ("3.4.0", RTX, (OK, "Triton 3.4.0")),
        ("", RTX, (NOTE, "pip install triton")),
        ("", Cards(("T4",), "570", "12.8", (7, 5)), (OK, "older than Ampere (7.5)")),
    ],
)
def test_triton(version, cards, said):
    told = one(software.triton(version, cards))
    assert told[0] == said[0] and said[1] in told[1]
    assert list(software.triton("", Cards())) == []
    assert "triton-windows" in one(software.triton("", RTX, windows=True))[1]


def test_extras():
    found = list(software.extras({"serve": ["gradio"], "eval": [], "layers": [], "scale": ["ray"]}))
    assert [each.state for each in found] == [OK, NOTE, NOTE]
    assert found[0].told() == "extras here: eval, layers"
    assert found[1].advice is not None and 'pip install "lanting[serve]"' in found[1].advice.told()


# ---------------------------------------------------------------- nvidia-smi
SMI = """\
import sys
if "{fails}":
    print("{fails}"); sys.exit(9)
if any("query" in word for word in sys.argv):
    print("NVIDIA H100, 80GB, 570.86, 9.0"); print("NVIDIA T4, 570.86, 7.5")
else:
    print("| NVIDIA-SMI 570.86   Driver Version: 570.86   CUDA Version: 12.8 |")
"""


@pytest.mark.parametrize("fails", ["", "Failed to initialize NVML: Driver/library version mismatch"])
def test_cards_as_nvidia_smi_tells_them(fails, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!{sys.executable}\n{SMI.format(fails=fails)}")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = gather.cards()
    if fails:
        assert found.failed == fails and not found.names
    else:
        assert found == Cards(("NVIDIA H100, 80GB", "NVIDIA T4"), "570.86", "12.8", (7, 5))


def test_a_card_without_a_driver(tmp_path):
    for name, maker, kind in (("0", "0x8086", "0x030000"), ("1", "0x10de", "0x040300")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(maker + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    assert not gather.in_slots(tmp_path)  # Intel's graphics, and the sound of an NVIDIA card
    (tmp_path / "1" / "class").write_text("0x030200\n")
    assert gather.in_slots(tmp_path)


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("__version__ = '2.8.0+cu128'\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", "cu128"),
        ("__version__ = '2.8.0'\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", "cu128"),
        ("__version__ = '2.8.0'\ncuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", "rocm6.4"),
        ("__version__ = '2.8.0'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n", "cpu"),
    ],
)
def test_the_build_of_torch_is_read_from_its_file(text, build, tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "torch" / "version.py").write_text(text)
    spec = type("Spec", (), {"origin": str(tmp_path / "torch" / "__init__.py")})
    monkeypatch.setattr(gather, "find_spec", lambda name: spec)
    assert gather.torch() == Torch("2.8.0", build)
    monkeypatch.setattr(gather, "find_spec", lambda name: None)
    assert gather.torch() is None


# ---------------------------------------------------------------- kernels and memory
@pytest.mark.parametrize(
    ("found", "state", "said"),
    [
        (Kernels("avx2", ("avx2", "plain")), OK, "avx2, of avx2, plain"),
        (Kernels("avx2", ("avx2",), fresh=False), NOTE, "python -m lanting.kernels.build"),
        (Kernels("avx2", ("avx2", "plain"), asked="avx2"), OK, "avx2, of avx2, plain"),
        (Kernels("avx2", ("avx2", "plain"), asked="avx512"), NOTE, "there are avx2, plain"),
        (Kernels(off=True, compiler="g++"), NOTE, "unset LANTING_KERNELS"),
        (Kernels(compiler="clang++"), NOTE, "clang++ is here) | build them: python -m lanting.kernels.build"),
        (Kernels(), NOTE, "sudo apt install g++"),
        (Kernels(system="darwin"), NOTE, "xcode-select --install"),
    ],
)
def test_kernels(found, state, said):
    told = one(hardware.kernels(found))
    assert told[0] == state and said in told[1]


def test_memory():
    gpu = Device("cuda", "RTX 4090", 24 * GB, 23 * GB)
    found = list(hardware.memory(machine(64 * GB, 60 * GB, gpu)))
    assert [each.state for each in found] == [OK, OK]
    assert found[1].told() == "RTX 4090: 24.0 GB, 23.0 GB free"
    found = list(hardware.memory(machine(8 * GB, GB, Device("cuda", "RTX 4090", 24 * GB, 4 * GB))))
    assert [each.state for each in found] == [NOTE, NOTE]
    assert one(hardware.memory(machine(0, 0)))[0] == NOTE


@pytest.mark.parametrize(
    ("here", "state", "said"),
    [
        (machine(128 * GB, 120 * GB, Device("cuda", "H100", 80 * GB, 79 * GB)), OK, "qwen-image-2512 fits; plan: bf16"),
        (machine(32 * GB, 30 * GB, Device("cuda", "RTX 3060", 12 * GB, 11 * GB)), OK, "qwen-image-2512 fits; plan: "),
        (machine(4 * GB, 3 * GB), NOTE, "disk"),
        (machine(GB, 400 * 10**6), NOTE, "lanting plan qwen-image-2512"),
        (machine(GB, 10**6), PROBLEM, "not even memory for nano"),
    ],
)
def test_the_largest_that_fits(here, state, said):
    told = one(hardware.fitting(here))
    assert told[0] == state and said in told[1]


# ---------------------------------------------------------------- the disk
def test_disk():
    home = Path("/home/me/models")
    assert one(storage.disk(Disk(home, home, 100 * GB, True, 58 * GB)))[0] == OK
    state, told = one(storage.disk(Disk(home, home, 20 * GB, True, 58 * GB)))
    assert state == NOTE and "20.0 GB free, and qwen-image-2512 takes 58.0 GB" in told
    assert one(storage.disk(Disk(home, home, 20 * GB, True, 0)))[0] == OK  # it is here
    state, told = one(storage.disk(Disk(home, Path("/home"), 100 * GB, False)))
    assert state == PROBLEM and "LANTING_HOME" in told


def test_the_disk_of_this_machine(tmp_path, monkeypatch):
    found = gather.disk()
    assert (found.folder, found.above) == (tmp_path / "home" / "models", tmp_path)
    assert found.writable and found.free > 0 and 57e9 < found.needs < 58.5e9
    assert not (tmp_path / "home").exists()  # looking makes nothing
    monkeypatch.setattr(gather.os, "access", lambda path, mode: False)
    assert not gather.disk().writable
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "file" / "home"))
    (tmp_path / "file").write_text("")
    assert not gather.disk().writable


def test_downloads_that_stopped():
    for name, files in (("qwen-image-2512", True), ("somebody/else", False)):
        folder = model_folder(name)
        (folder / STAGING).mkdir(parents=True)
        (folder / STAGING / "a.part").write_bytes(b"x" * 2000)
        if files:
            note_begun(folder, {"vae/model.safetensors": (5000, "a")}, 9000)
    assert gather.begun() == [Begun("qwen-image-2512", 6000, 9000), Begun("somebody/else", 2000)]
    found = list(storage.downloads(gather.begun()))
    assert [each.state for each in found] == [NOTE, NOTE]
    assert found[0].told() == "qwen-image-2512 is here in part, 6 kB of 9 kB"
    assert found[1].advice is not None and "lanting remove somebody/else" in found[1].advice.told()


def pulled(name: str, source: Path) -> Path:
    """A download that was finished."""
    folder = model_folder(name)
    shutil.copytree(source, folder)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*.*") if path.is_file()}
    files = {name: {"size": size} for name, size in sizes.items()}
    write_marker(folder, Marker(name, "main", "c" * 40, "https://hub", files))
    return folder


def test_models_and_what_is_wrong_with_them(tmp_path):
    tiny.save_folder(tmp_path / "sound")
    pulled("me/sound", tmp_path / "sound")
    short, torn = pulled("me/short", tmp_path / "sound"), pulled("me/torn", tmp_path / "sound")
    next((short / "transformer").glob("*.safetensors")).unlink()
    shard = next((torn / "vae").glob("*.safetensors"))
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    tokens = next((pulled("me/mute", tmp_path / "sound") / "tokenizer").iterdir())
    tokens.write_bytes(tokens.read_bytes() + b" ")  # which no header tells
    found = {held.name: held.broken for held in gather.held()}
    assert set(found) == {"nano", "me/sound", "me/short", "me/torn", "me/mute"}
    assert found["me/mute"] == f"tokenizer/{tokens.name}"
    assert found["nano"] == found["me/sound"] == ""
    assert "transformer" in found["me/short"] and found["me/torn"]
    told = list(storage.models(list(gather.held())))
    assert [each.state for each in told] == [OK, PROBLEM, PROBLEM, PROBLEM]
    assert told[0].told() == "models here: nano, me/sound"
    assert told[1].advice is not None and "lanting pull me/mute --check" in told[1].advice.told()
    held = Held("qwen-image", Path("/hub/x"), "its header is cut off", pulled=False)
    assert "lanting show /hub/x" in one(storage.models([held]))[1]


# ---------------------------------------------------------------- what is set
ENVIRONMENTS = {
    "a name that means nothing": ({"LANTING_GRAPH": "off"}, NOTE, "did you mean LANTING_GRAPHS"),
    "recordings off": ({"LANTING_GRAPHS": "off"}, NOTE, "unset LANTING_GRAPHS"),
    "compiled by torch": ({"LANTING_COMPILE": "on"}, NOTE, "unset LANTING_COMPILE"),
    "an attention there is none of": ({"LANTING_ATTENTION": "flahs"}, PROBLEM, "export LANTING_ATTENTION=flash"),
    "one makes the other mean nothing": ({"LANTING_KERNELS": "off", "LANTING_ATTENTION": "fa3"}, NOTE, "drop one"),
    "two caches": ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, NOTE, "HF_HUB_CACHE decides"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, NOTE, "unset HF_HUB_OFFLINE"),
    "no address": ({"HF_ENDPOINT": "hub.example"}, PROBLEM, "https://"),
    "one thread": ({"OMP_NUM_THREADS": "1"}, NOTE, "one of 16 cores"),
    "a hidden GPU": ({"CUDA_VISIBLE_DEVICES": ""}, NOTE, "unset CUDA_VISIBLE_DEVICES"),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environment(case):
    env, state, said = ENVIRONMENTS[case]
    told = one(each for each in settings.environment(env, 16, gpu=True) if each.state != OK)
    assert told[0] == state and said in told[1]


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"OMP_NUM_THREADS": "8", "CUDA_VISIBLE_DEVICES": "1"},
        {"LANTING_HOME": "/models", "LANTING_KERNELS": "avx2", "LANTING_COMPILE": "off", "LANTING_ATTENTION": "fa2"},
        {"HF_HUB_CACHE": "/a/hub", "HF_HOME": "/a", "HF_ENDPOINT": "https://mirror.example"},
    ],
)
def test_an_environment_that_is_all_right(env):
    assert all(each.state == OK for each in settings.environment(env, 16, gpu=True))
    assert list(settings.environment({"OMP_NUM_THREADS": "1"}, 2, gpu=False)) == []


def test_secrets_are_not_shown():
    (found,) = settings.environment({"HF_TOKEN": "hf_secret", "LANTING_LANG": "en"}, 2, gpu=False)
    assert found.told() == "environment: LANTING_LANG=en, HF_TOKEN" and "secret" not in json.dumps(found.to_dict())


def test_every_variable_of_ours_is_known():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = set(re.findall(r"LANTING_[A-Z]+\b", source))
    assert named == set(settings.OURS)


def test_attentions_are_those_that_can_be_asked_for():
    from lanting.kernels.gpu.attention import WAYS

    assert set(settings.ATTENTIONS) - {"auto"} == set(WAYS)


def test_language_terminal_and_clock():
    assert list(settings.language({"LANTING_LANG": "zh"}, "utf-8")) == list(settings.language({}, "UTF8")) == []
    assert "export LANTING_LANG=en" in one(settings.language({"LANTING_LANG": "de"}, "utf-8"))[1]
    assert "PYTHONUTF8=1" in one(settings.language({}, "ANSI_X3.4-1968"))[1]
    assert list(settings.clock(2031)) == [] and one(settings.clock(1970))[0] == PROBLEM


# ---------------------------------------------------------------- the whole
def test_a_check_that_fails_is_a_finding():
    def check():
        yield software.fine("torch {version}", "torch", version="1")
        raise OSError("no disk")

    state, told = one(guarded("disk", check))
    assert state == PROBLEM and "OSError: no disk" in told


@pytest.fixture
def healthy(monkeypatch):
    """This machine, but for what may be wrong with it."""
    monkeypatch.setattr(gather, "cards", Cards)
    monkeypatch.setattr(gather, "kernels", lambda: Kernels("avx2", ("avx2",)))
    monkeypatch.setattr(gather, "torch", lambda: Torch("2.8.0"))


def test_the_verb_says_all_and_the_exit_code_says_whether(healthy, monkeypatch, capsys, tmp_path):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "  ok       Python 3." in shown and "no problems; notes:" in shown.splitlines()[-1]
    monkeypatch.setattr(gather, "torch", lambda: None)
    (tmp_path / "config.toml").write_text("model = nano\n")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out.splitlines()
    at = shown.index("  problem  torch is not installed")
    assert shown[at + 1] == '           → run pip install "torch>=2.8,<2.14"'
    assert any("config.toml, line 1" in line for line in shown) and shown[-1].startswith("  problems: 2; ")
    assert main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == 2 and told["findings"][0]["name"] == "python"
    assert all(set(each) == {"name", "state", "found", "advice", "values"} for each in told["findings"])


def test_default_models_that_are_none(healthy, monkeypatch, capsys, tmp_path):
    (tmp_path / "config.toml").write_text('model = "qwen-image"\nedit.model = "/gone"\nserve.model = "nano"\n')
    monkeypatch.setenv("LANTING_MODEL", "qwen-imaje")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "edit.model names /gone" in shown and "LANTING_MODEL names qwen-imaje" in shown
    assert shown.splitlines()[-1].startswith("  problems: 2; ")


def test_kernels_that_were_asked_for(monkeypatch, recwarn):
    monkeypatch.setenv("LANTING_KERNELS", "none-such")
    found = gather.kernels()
    assert found.asked == "none-such" and not found.off and not recwarn
    monkeypatch.setenv("LANTING_KERNELS", "off")
    assert gather.kernels().off


def test_it_speaks_chinese(healthy, monkeypatch, capsys):
    monkeypatch.setenv("LANTING_LANG", "zh")
    monkeypatch.setattr(gather, "torch", lambda: None)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "  问题  没有安装 torch\n        → 请运行 pip install" in shown


def test_nothing_stops_it(monkeypatch, capsys):
    """Whatever can't be asked becomes a finding, and the rest is said."""

    def refuses(*words, **more):
        raise PermissionError("not allowed")

    for name in ("interpreter", "torch", "cards", "computing", "kernels", "missing", "disk", "begun", "held"):
        monkeypatch.setattr(gather, name, refuses)
    monkeypatch.setattr("lanting.plan.detect", refuses)
    found = list(examine.examine())
    failed = [each.name for each in found if "not allowed" in each.told()]
    assert failed == ["python", "driver", "torch", "gpu", "kernels", "memory", "disk", "downloads", "models", "extras"]
    assert main(["doctor"]) == 1 and "Traceback" not in capsys.readouterr().out


def test_no_torch_in_its_process(tmp_path):
    code = "import sys; from lanting.cli.main import main; main(['doctor']); print(*sys.modules)"
    done = python("-c", code, LANTING_HOME=str(tmp_path), PATH=str(tmp_path))
    modules = done.stdout.splitlines()[-1].split()
    assert "lanting.doctor.gather" in modules, done.stderr
    assert not {"torch", "numpy", "triton"} & set(modules)


def test_finding_to_dict_keeps_numbers():
    told = Finding("memory", OK, "torch {version}", {"version": 3, "path": Path("/a")}).to_dict()
    assert told["values"] == {"version": 3, "path": "/a"}
