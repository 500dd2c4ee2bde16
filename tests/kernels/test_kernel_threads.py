"""Threads change the time and nothing else: how many there are, who calls, and whether a process has forked."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernel_cases import random, weight
from lanting.kernels import calls
from lanting.kernels import library as lib
from lanting.kernels.conv import convolve, lay

ROOT = Path(__file__).parents[2]


def everything() -> list[Tensor]:
    """One result of every call, each of several pieces of work."""
    packed, _ = weight("Q4_K", 150, 256)
    x = random(2, 61, 256)
    vectors = random(2, 1, 256, seed=1)
    codes = calls.quantize(x.flatten(0, 1))
    q, k, v = (random(2, 40, 3, 64, seed=seed) for seed in (2, 3, 4))
    norms, rope = tuple(random(64, seed=s) for s in range(4)), (random(40, 32, seed=5), random(40, 32, seed=6))
    calls.turn(q, k, norms, rope, 7, 1e-6)
    normed = calls.norm(x, vectors, vectors, rounded=False)
    assert isinstance(normed, Tensor)
    wide = calls.dense(random(150, 256, seed=7, dtype=torch.bfloat16))
    brains = [] if wide is None else [calls.product(calls.quantize(x[0], dense=True), wide, torch.empty(61, 150))]
    picture = random(1, 24, 20, 20).contiguous(memory_format=torch.channels_last)
    return [
        *brains,
        packed.bound,
        calls.expanded(packed),
        codes.scale,
        calls.product(codes, packed, torch.empty(122, 150)),
        calls.product(codes, packed, torch.ones(2, 61, 150), gate=random(2, 2, 150), split=9),
        normed,
        q,
        k,
        calls.attend(q, k, v),
        calls.activate(x, torch.empty_like(x), gelu=True),
        calls.norm_silu(picture, torch.ones(24)),
        convolve(picture, lay(random(20, 24, 3, 3, seed=8), torch.ones(20), torch.float32), torch.ones(32)),
    ]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_any_number_of_threads_gives_the_same_bits(isa):
    lib.use_threads(1)
    wanted = everything()
    for count in (2, 3, 1, 5):
        lib.use_threads(count)
        assert same(everything(), wanted), count


def test_threads_of_python_may_call_at_once():
    """Who comes second works alone; memory for what lies between is each thread's own."""
    lib.use_threads(2)
    wanted = everything()
    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(lambda: [same(everything(), wanted) for _ in range(20)]) for _ in range(3)]
        assert all(all(run.result(timeout=60)) for run in runs)


FORK = """
import os, sys, threading
sys.path[:0] = [{tests!r}, {here!r}]
from test_kernel_threads import calls, everything, lib, random, same, torch, weight

def busy():
    packed, codes, out = weight("Q8_0", 200, 256)[0], calls.quantize(random(200, 256)), torch.empty(200, 200)
    while True:
        calls.product(codes, packed, out)

def generation(left):
    if left and not (child := os.fork()):
        os._exit(generation(left - 1))
    good = not left or os.waitpid(child, 0)[1] == 0
    return 0 if good and same(everything(), wanted) else 1

torch.set_num_threads(1)  # GNU's OpenMP waits in a child for threads that it has only in the parent
lib.use_threads(3)
wanted = everything()
threading.Thread(target=busy, daemon=True).start()
os._exit(generation(3))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_makes_threads_of_its_own():
    """Also while another thread computes: children, and theirs, compute the same, and all of them end."""
    code = FORK.format(tests=str(ROOT / "tests"), here=str(Path(__file__).parent))
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_number_of_threads_follows_openmp_and_the_system(monkeypatch, tmp_path):
    for asked, count in (("3", 3), ("2,4", 2)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert lib.thread_count() == count
    monkeypatch.setattr(lib.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for asked in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        monkeypatch.setattr(lib, "quota", lambda: 1 << 16)
        assert lib.thread_count() == 6
        monkeypatch.setattr(lib, "quota", lambda: 4)
        assert lib.thread_count() == 4


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 1 << 16),
        ({"cpu.max": "what?"}, 1 << 16),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1 << 16),
        ({}, 1 << 16),
    ],
)
def test_the_quota_of_control_groups(tmp_path, files, count):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert lib.quota(tmp_path) == count
