"""Building: whole or not at all, only when something changed, and never a reason for an installation to fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lanting.kernels import build
from lanting.kernels import library as lib


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "libkernels.so"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A compiler that takes no time: it writes a word into what it should make. Returns what it was told."""
    told: list[list[str]] = []

    def call(command: list[str]) -> None:
        told.append(list(command))
        if "-o" in command:
            Path(command[command.index("-o") + 1]).write_text("made")

    monkeypatch.setattr(build, "call", call)
    return told


def test_without_a_compiler_nothing_is_built_and_that_is_said(target, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert build.main(target) == 0
    said = capsys.readouterr().err
    assert "not built, torch does their work" in said
    assert "no C++ compiler" in said
    assert list(target.parent.iterdir()) == []


def test_a_library_of_other_sources_does_not_stay(target, monkeypatch, quick, capsys):
    """It might be of another interface, or compute what is wrong."""
    build.main(target)
    monkeypatch.setattr(build, "digest", lambda: "other")
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert build.main(target) == 0
    assert "not built" in capsys.readouterr().err
    assert list(target.parent.iterdir()) == []


def test_it_is_built_once(target, quick, capsys):
    assert not build.fresh(target)
    build.main(target)
    assert build.fresh(target)
    assert "are built: " in capsys.readouterr().err
    before = len(quick)
    build.main(target)
    assert len(quick) == before
    assert capsys.readouterr().err == ""


def test_it_is_built_again_when_something_changed(target, quick, monkeypatch):
    build.main(target)
    monkeypatch.setattr(build, "digest", lambda: "other")
    assert not build.fresh(target)
    build.main(target)
    assert build.fresh(target)
    target.write_text("ma")
    assert not build.fresh(target)


def test_sources_that_change_meanwhile_are_noticed(target, quick, monkeypatch):
    """The stamp says what was there when building began."""
    digests = iter(["before", "after", "after"])
    monkeypatch.setattr(build, "digest", lambda: next(digests))
    build.build(target)
    assert not build.fresh(target)


def test_every_file_counts(monkeypatch, tmp_path):
    known = build.digest()
    for path in build.SOURCES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.digest() == known
    for path in sorted(tmp_path.iterdir()):
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        assert build.digest() != known, path.name
        path.write_bytes(text)


def test_what_the_compiler_says_is_passed_on(target, monkeypatch, tmp_path):
    (tmp_path / "csrc").mkdir()
    for name in ("pool.cpp", "dispatch.cpp", "kernels.cpp"):
        (tmp_path / "csrc" / name).write_text("this is no C++")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    with pytest.raises(RuntimeError, match="this"):
        build.build(target)
    assert not target.exists()


def test_only_sets_that_the_compiler_knows_are_compiled(target, quick, monkeypatch):
    monkeypatch.setattr(build, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "knows", lambda command, flags, folder: "-mavx512bf16" not in flags)
    assert build.build(target) == ("avx512_vnni", "avx_vnni", "avx2", "plain")
    assert build.build(target, sets=("plain",)) == ("plain",)
    assert build.stamp(target).read_text().split()[1:] == ["4", "plain"]


@pytest.mark.parametrize(("name", "sets"), [("aarch64", ("dotprod", "plain")), ("riscv64", ("plain",))])
def test_every_machine_has_its_sets(target, quick, monkeypatch, name, sets):
    monkeypatch.setattr(build, "machine", lambda: name)
    assert build.build(target) == sets


def test_the_compiler_can_be_named(monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -m something")
    assert build.compiler() == [sys.executable, "-m", "something"]
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert build.compiler() != ["/nonexistent/c++"]


def test_what_is_built_here_is_what_lies_here():
    assert build.fresh() or not lib.ready(), "run: make kernels"
