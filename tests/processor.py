"""Python commands in processes of their own, and what they take of the processors."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path


def python(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A Python command that finds this tree's package; `more` is added to its environment."""
    source = Path(__file__).parents[1] / "src"
    env = os.environ | {"PYTHONPATH": str(source)} | more
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, timeout=120)


def processor_seconds(*words: str, **more: str) -> float:
    """User and system time: what it takes on an idle machine, however busy this one is."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python(*words, **more)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
