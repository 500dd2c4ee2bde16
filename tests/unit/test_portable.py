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
TEXT = {"read_text": 0, "write_text": 1, "open": 2, "fdopen": 2}  # where an encoding may stand without its name


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


def in_no_encoding(tree: ast.AST) -> Iterator[str]:
    """Text whose bytes depend on the machine: Windows' are a code page in which most of Unicode can't be written."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {str(one.arg): one.value for one in node.keywords}
        if name in ("run", "Popen", "check_output"):
            wrong = {"text", "universal_newlines"} & set(given) and "encoding" not in given
        elif name in TEXT and "encoding" not in given:
            modes = [str(one.value) for one in (*node.args, *given.values()) if isinstance(one, ast.Constant)]
            if name == "open" and isinstance(node.func, ast.Attribute):  # of a path, or of something else that opens
                wrong = any(re.fullmatch("[rwax+]+t?", mode) for mode in modes)
            else:
                binary = any(re.fullmatch("[rwax+]*b[rwax+]*", mode) for mode in modes)
                wrong = not binary and len(node.args) <= TEXT[name]
        else:
            continue
        if wrong:
            yield f"{node.lineno}: {ast.unparse(node)[:80]}"


def test_sources_run_on_every_system():
    found = []
    for file in (*SOURCES, ROOT / "hatch_build.py", ROOT / "tools" / "install.py"):
        path, tree = file.relative_to(ROOT).as_posix(), ast.parse(file.read_text(encoding="utf-8"))
        found += [f"{path}:{where}" for where in (*of_one_system(tree, path), *in_no_encoding(tree))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "wrong",
    [
        "import fcntl",
        "os.kill(1, 9)",
        "signal.SIGKILL",
        "path.read_text()",
        "path.write_text('a')",
        "open('a')",
        "path.open('w')",
        "os.fdopen(3, 'w')",
        "subprocess.run(['a'], text=True)",
    ],
)
def test_what_is_not_portable_is_found(wrong):
    assert [*of_one_system(ast.parse(wrong)), *in_no_encoding(ast.parse(wrong))]


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


def test_a_drawing_where_windows_would_refuse(tmp_path):
    """Served is nano there too: tests/serve/test_from_the_shell.py."""
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests' / 'elsewhere'}", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONIOENCODING": "cp1252", "LANTING_LANG": "zh"}
    words = ["-m", "lanting", "generate", "绿色招牌“茶馆”", "--steps", "1", "--seed", "7", "-q"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["绿色招牌-茶馆-7.png"]
    assert done.stdout.decode("ascii").strip() == r"\u7eff\u8272\u62db\u724c-\u8336\u9986-7.png"


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
