"""Windows and macOS, as far as Linux can tell: what the sources use, and what happens where it is refused
(tests/elsewhere)."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lanting.cli.main import _as_shells_do
from lanting.core import files, lang
from lanting.core.processes import apart, as_typed
from lanting.doctor.finding import typed
from lanting.kernels import build

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "lanting").rglob("*.py"))
MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty", "uvloop", "winreg", "msvcrt"}
NAMES = {  # of os, signal, socket and an event loop, that one of the systems lacks or means otherwise
    *("fork", "forkpty", "getloadavg", "geteuid", "getgid", "getpgid", "getuid", "kill", "killpg", "mkfifo", "nice"),
    *("O_DIRECTORY", "posix_fadvise", "sched_getaffinity", "sched_setaffinity", "setsid", "statvfs", "sysconf"),
    *("SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "pthread_sigmask", "sigwait", "setitimer"),
    *("AF_UNIX", "add_signal_handler", "getppid", "uname", "startfile", "windll"),
}
TEXT = {"read_text": 0, "write_text": 1, "open": None, "fdopen": 2}  # where an encoding may stand without its name


WITH_CARE = {  # what a file uses where it has looked at the system first
    "src/lanting/cluster/parcels.py": {"kill"},
    "src/lanting/core/lang.py": {"windll"},
    "src/lanting/plan/machine.py": {"winreg"},
}


def guarded(tree: ast.AST) -> set[str]:
    """Names that a file asks for before it uses them."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) > 1]
    asked = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr")]
    return {str(node.args[1].value) for node in asked if isinstance(node.args[1], ast.Constant)}


def of_one_system(tree: ast.AST, path: str = "") -> Iterator[str]:
    """Modules and functions that only some systems have, used without asking."""
    allowed = guarded(tree) | WITH_CARE.get(path, set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            yield from (f"{node.lineno}: {name}" for name in names if name.split(".")[0] in MODULES - allowed)
        elif isinstance(node, ast.Attribute) and node.attr in NAMES - allowed:
            of_a_process = node.attr == "kill" and ast.unparse(node.value) != "os"
            if not of_a_process:
                yield f"{node.lineno}: {ast.unparse(node)}"


def in_no_encoding(tree: ast.AST, path: str = "") -> Iterator[str]:
    """Text whose bytes depend on the machine: Windows' are a code page in which most of Unicode can't be written."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(one.arg == "encoding" for one in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        values = [*node.args, *(one.value for one in node.keywords)]
        binary = any(
            isinstance(one, ast.Constant) and re.fullmatch("[rwax+]*b[rwax+]*", str(one.value)) for one in values
        )
        theirs = (not node.args and name == "open") or ast.unparse(node.func).startswith(("os.open", "Image."))
        text = name in ("read_text", "write_text") or (name in ("open", "fdopen") and not binary and not theirs)
        piped = {"text", "universal_newlines"} & {str(one.arg) for one in node.keywords}
        if (text and len(node.args) <= (TEXT[name] or 0)) or (name in ("run", "Popen", "check_output") and piped):
            yield f"{node.lineno}: {ast.unparse(node)[:80]}"


@pytest.mark.parametrize("rule", [of_one_system, in_no_encoding])
def test_sources_run_on_every_system(rule):
    files = [*SOURCES, ROOT / "hatch_build.py", ROOT / "tools" / "install.py"]
    trees = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}
    found = [f"{path}:{where}" for path, tree in trees.items() for where in rule(tree, path)]
    assert not found, "\n".join(found)


PIPES = """
import os, sys
from lanting.core.processes import own_pipes
orders, answers = own_pipes()
os.write(1, b"a library's words")
answers.write(orders.readline() + repr(sys.stdin.read()).encode())
answers.flush()
"""


def test_a_worker_has_its_pipes_for_itself():
    """A library that asks about standard input finds nothing; on Windows it would wait for our reading thread."""
    done = subprocess.run([sys.executable, "-c", PIPES], input=b"an order\nanother\n", capture_output=True, check=True)
    assert done.stdout == b"an order\n''" and done.stderr == b"a library's words"


def test_what_is_different_on_windows(monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0x200, raising=False)
    monkeypatch.setattr(lang, "of_windows", lambda: lang.CHINESE)
    for name in ("LANTING_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    assert lang.language() == "zh" and lang.language({}) == "en"
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["show", "*.png", "what? *", "~/a.png", "no*.gguf"]
    assert _as_shells_do(words) == ["show", "a.png", "b.png", "what? *", f"{tmp_path}/a.png", "no*.gguf"]
    with monkeypatch.context() as windows:
        windows.setattr("lanting.core.processes.os.name", "nt")
        assert apart() == {"creationflags": 0x200} and as_typed("D:\\a b.png") == '"D:\\a b.png"'
    assert apart() == {"start_new_session": True}


def test_a_file_that_is_held_for_a_moment_is_replaced(monkeypatch, tmp_path):
    tries = []

    def replace(part, path):
        tries.append(part)
        if len(tries) < 3:
            raise PermissionError(13, "in use")

    monkeypatch.setattr(files, "HELD", (0.0, 0.0, 0.0))
    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr(files.os, "name", "nt")
    files.put(tmp_path / "part", tmp_path / "whole")
    monkeypatch.undo()
    assert len(tries) == 3


def test_commands_are_those_of_the_shell():
    told = "use export LANTING_HOME=/path/to/folder（or unset A_B C)"
    assert typed(told, "linux", {}) == typed(told, "darwin", {}) == told
    assert typed(told, "win32", {"PROMPT": "$P$G"}) == "use set LANTING_HOME=D:\\folder（or set A_B=&& set C=)"
    assert typed(told, "win32", {}) == "use $env:LANTING_HOME = 'D:\\folder'（or Remove-Item Env:A_B, Env:C)"


def test_kernels_on_windows_are_compiled_by_zig_or_not_at_all(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.sys, "platform", "win32")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert build.compiler() is None
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: name)
    command = build.compiler()
    assert command and command[1:4] == ["-m", "ziglang", "c++"] and command[-1].endswith("-windows-gnu")
    monkeypatch.undo()
    assert os.name == "posix"
