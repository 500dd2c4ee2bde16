"""Servers as processes that begin with everything imported: a process that has imported it forks when it is told to.

Importing takes a second of a processor, eight with the studio, and a hundred servers are started here; how one begins
when it is started from the shell has tests of its own. The one told here has no threads, so that forking is safe.
Rejected: multiprocessing's fork server, which imports nothing where the path is not its own.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass
class Born:
    """What tests use of a `subprocess.Popen`. It stays a zombie, and its number its own, until somebody waits."""

    nurse: Nurse
    pid: int
    code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.code is None:
            handle = os.pidfd_open(self.pid)
            try:
                if not select.select([handle], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired("serving", timeout or 0)
            finally:
                os.close(handle)
            self.code = self.nurse.ask(wait=self.pid)
        return self.code

    def send_signal(self, number: int) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nurse:
    """The process that forks, as it is asked from here. Its children run `main` of the first of the modules."""

    def __init__(self, *modules: str, paths: tuple[Path, ...] = ()) -> None:
        path = ":".join(map(str, (HERE.parents[1] / "src", HERE, *paths)))
        words = [sys.executable, str(Path(__file__)), *modules]
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.turn = threading.Lock()

    def ask(self, **what: Any) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        with self.turn:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
            return int(self.process.stdout.readline())

    def bear(self, words: str, env: dict[str, str], said: Path, log: Path) -> Born:
        """A server: what it prints goes to `said`, its log behind what is in `log`."""
        return Born(self, self.ask(words=words, env=env, said=str(said), log=str(log)))


@cache
def nurse() -> Nurse:
    """One for each process that tests; it ends with it, and its children with that."""
    return Nurse("serving")


# -------------------------------------------------------------------- in that process
def main() -> None:
    serving, *_ = [importlib.import_module(name) for name in sys.argv[1:]]
    alive: set[int] = set()
    for line in sys.stdin:
        told = json.loads(line)
        if "wait" in told:
            alive.discard(told["wait"])
            answer = os.waitstatus_to_exitcode(os.waitpid(told["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                live(serving.main, told)
            alive.add(answer)
        print(answer, flush=True)
    for child in alive:
        os.kill(child, signal.SIGKILL)


def live(serve: Any, told: dict[str, Any]) -> None:
    """A child's life. It does not return to the loop."""
    code = 1
    try:
        for number, path, how in (
            (0, os.devnull, os.O_RDONLY),
            (1, told["said"], os.O_WRONLY | os.O_CREAT),
            (2, told["log"], os.O_WRONLY | os.O_APPEND),
        ):
            os.dup2(os.open(path, how), number)
        os.environ.clear()
        os.environ.update(told["env"])
        serve(told["words"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
