"""Windows and macOS, as far as Linux can tell: what the sources use, and what happens where it is refused
(tests/elsewhere)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

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


WITH_CARE = {"src/lanting/cluster/parcels.py": {"kill"}}  # names a file uses where it has looked at the system first


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
            yield from (f"{node.lineno}: {name}" for name in names if name.split(".")[0] in MODULES)
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
