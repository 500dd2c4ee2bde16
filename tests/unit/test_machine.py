"""`lanting show --machine`: this computer in words, with and without kernels, and without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lanting.cli.main import main
from lanting.kernels import library
from lanting.plan import Device, Machine


@pytest.fixture(autouse=True)
def _english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANTING_LANG", "en")


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["show", "--machine", *flags]) == 0
    return capsys.readouterr().out


def test_what_is_here(capsys):
    told, out = json.loads(printed(capsys, "--json")), printed(capsys)
    assert told["cores"] >= 1 and told["threads"] >= 1 and told["ram"] >= told["ram_free"] > 0
    assert told["processor"] in out and told["kernels"]["known"] == list(library.known_sets())
    absent = "switched off" if told["kernels"]["off"] else "not built"
    assert f"kernels: {told['kernels']['set'] or absent}" in out
    assert bool(told["kernels"]["build"]) != library.ready()


def test_kernels_that_are_not_built_can_be_built(capsys, monkeypatch):
    monkeypatch.setattr(library, "library", lambda: None)
    monkeypatch.delenv("LANTING_KERNELS", raising=False)
    assert "kernels: not built, torch does their work; to build them: python -m lanting.kernels.build" in printed(
        capsys
    )
    told = json.loads(printed(capsys, "--json"))["kernels"]
    assert told == {"set": "", "known": [], "off": False, "build": "python -m lanting.kernels.build"}


def test_kernels_that_are_switched_off_are_said_to_be_and_torch_stays_away():
    code = "import sys; from lanting.cli.main import main; code = main(['show', '--machine'])\n"
    code += "print(code, 'torch' in sys.modules)"
    given = os.environ | {"LANTING_KERNELS": "off", "LANTING_LANG": "en"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given, check=True)
    assert "switched off by LANTING_KERNELS" in done.stdout and done.stdout.splitlines()[-1] == "0 False"


def test_gpus_are_named_with_their_memory(capsys, monkeypatch):
    card = Device("cuda", "NVIDIA GeForce RTX 3060", 12 * 10**9, 11 * 10**9)
    found = Machine(32 * 10**9, 20 * 10**9, 8, (card, Device("cpu", "A Processor")))
    monkeypatch.setattr("lanting.plan.detect", lambda: found)
    out = printed(capsys)
    assert "GPU: NVIDIA GeForce RTX 3060, 12.0 GB VRAM, 11.0 GB free" in out
    assert "processor: A Processor" in out and "memory: 32.0 GB, 20.0 GB free" in out
    monkeypatch.setenv("LANTING_LANG", "zh")
    assert "处理器：A Processor" in printed(capsys)


@pytest.mark.parametrize(
    ("capability", "given", "kernels", "attention", "recorded"),
    [
        ("9.0", {}, "triton 3.6.0", "the first of fa3, cudnn, flash, efficient, math that is right", True),
        ("8.6", {"LANTING_GRAPHS": "off"}, "triton 3.6.0", "flash, cudnn, efficient, math", False),
        ("8.9", {"LANTING_ATTENTION": "math"}, "triton 3.6.0", "math, flash, cudnn, efficient that", True),
        ("7.5", {}, "none for GPUs before Ampere", "flash, cudnn", True),
        ("9.0", {"LANTING_KERNELS": "off"}, "switched off by LANTING_KERNELS", "the first of torch", False),
        ("", {}, "none for this GPU", "the first of torch", False),
    ],
)
def test_what_computes_on_a_gpu(capability, given, kernels, attention, recorded, capsys, monkeypatch):
    for name in ("LANTING_KERNELS", "LANTING_GRAPHS", "LANTING_ATTENTION", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    card = Device("cuda", "A Card", 12 * 10**9, 11 * 10**9)
    monkeypatch.setattr("lanting.plan.detect", lambda: Machine(10**10, 10**9, 8, (card, Device("cpu", "A Processor"))))
    monkeypatch.setattr("lanting.cli.machine.ask", lambda *command: (0, f"{capability}\n"))
    monkeypatch.setattr("lanting.kernels.gpu.names.triton", lambda: "3.6.0")
    monkeypatch.setattr("lanting.kernels.gpu.names.find_spec", lambda name: name == "flash_attn_interface" or None)
    out = printed(capsys)
    assert f"kernels: {kernels}" in out and attention in out
    assert ("steps are recorded" in out) == recorded
    (told,) = json.loads(printed(capsys, "--json"))["gpus"]
    assert (told["capability"], told["recorded"], told["compiled"]) == (capability, recorded, "off")


@pytest.mark.parametrize("arguments", [[], ["nano", "--machine"]])
def test_a_name_or_the_machine(arguments, capsys):
    assert main(["show", *arguments]) == 2
    assert "NAME, or --machine" in capsys.readouterr().err
