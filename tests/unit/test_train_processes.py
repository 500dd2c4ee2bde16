"""Several processes: they walk together, feed one another, and leave nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from lanting.core.errors import ModelError
from lanting.train.course import Budget
from lanting.train.journal import entries
from lanting.train.loop import Trainer
from lanting.train.nano import train_transformer
from lanting.train.workers import Workers
from training import begun, flat, gradients, imported, lighten, one_of_two, small_net, small_run


def test_two_processes_have_the_gradients_of_the_union_of_their_batches(tmp_path, monkeypatch):
    imported(monkeypatch)
    mp.spawn(one_of_two, args=(tmp_path,), nprocs=2, join=True)
    kept = torch.load(tmp_path / "gradients.pt", weights_only=True)
    alone = Trainer(small_net(), Budget(), tmp_path)
    gradients(alone, slice(0, 6))
    whole = flat(alone)
    for found in kept["ways"]:  # of CPUs, then of GPUs
        assert (found - whole).norm() / whole.norm() < 0.02  # bfloat16 inside
    assert torch.equal(*kept["ways"])
    assert kept["agreed"] == pytest.approx(11.0) and kept["ended"]


def test_processes_go_by_the_time_they_agreed_on(tmp_path, monkeypatch):
    """Rates and the end must not depend on a process's own clock."""
    trainer = Trainer(small_net(), Budget(), tmp_path, world=2, rank=0)
    for parameter in trainer.net.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.clock.seconds = 10.0
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: flat.mul_(2).add_(2.0))  # the other is later
    trainer.exchange()
    assert trainer.agreed == pytest.approx(11.0) and trainer.clock.seconds == trainer.agreed
    assert all(torch.allclose(p.grad, torch.full_like(p, 2.0)) for p in trainer.net.parameters())


def test_what_stops_one_of_two_processes_is_a_sentence(tmp_path, monkeypatch):
    imported(monkeypatch)
    lighten(monkeypatch)
    with pytest.raises(ModelError, match="give its --width and --layers"):
        train_transformer(small_run(begun(tmp_path / "run"), workers=2, layers=3))


def test_two_processes_train_and_stop_together(tmp_path, monkeypatch):
    """One that stopped a step before the other would leave it waiting for gradients, and the run would fail."""
    lighten(monkeypatch)
    run = begun(tmp_path / "run")
    with socket.socket() as other:  # a port that follows from numbers of processes may be somebody else's
        other.bind(("127.0.0.1", 29500 + os.getpid() % 1000))
        other.listen()
        train_transformer(small_run(run, workers=2, minutes=0.01))
    clock = torch.load(run / "checkpoint.pt", weights_only=True)["clock"]
    assert clock["step"] >= 1 and clock["seen"] % 2 == 0


def test_a_run_fed_by_another_process(tmp_path, monkeypatch):
    imported(monkeypatch)
    lighten(monkeypatch)
    run = begun(tmp_path / "run")
    train_transformer(small_run(run, feeders=1, minutes=0.01))
    log = entries(run / "log.jsonl")
    assert "first stock" in log[0]["note"] and log[-1] == {"note": "done"}
    figures = next(entry for entry in log if "step" in entry)
    assert {"queue", "waited", "feeding", "reuse", "missed"} <= set(figures) and figures["waited"] == 0
    assert not multiprocessing.active_children()


@dataclass(frozen=True)
class Numbers:
    """Work that is only numbers, and may fail."""

    fails: bool = False

    def maker(self, number: int) -> Numbers:
        return self

    def make(self, hanzi: int) -> tuple[int, int]:
        if self.fails:
            raise OSError("no fonts")
        return hanzi, os.getpid()


def test_workers_fill_their_queue_pause_and_end(monkeypatch):
    imported(monkeypatch)
    workers = Workers(Numbers(), 1, ahead=3, hanzi=7)
    assert workers.wait()[0] == 7 and workers.waited > 0
    deadline = time.monotonic() + 60
    while workers.level() < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers.hanzi.value = 9
    assert [workers.wait()[0] for _ in range(8)][-1] == 9
    while workers.take() is not None:
        pass
    workers.close()
    assert not any(process.is_alive() for process in workers.processes)


def test_a_worker_that_fails_is_a_sentence(monkeypatch):
    imported(monkeypatch)
    workers = Workers(Numbers(fails=True), 1)
    try:
        with pytest.raises(ModelError, match="no fonts"):
            workers.wait()
    finally:
        workers.close()


@dataclass(frozen=True)
class Large:
    """Work that no pipe holds."""

    def maker(self, number: int) -> Large:
        return self

    def make(self, hanzi: int) -> bytes:
        return bytes(4_000_000)


def test_no_worker_leaves_in_the_middle_of_a_piece(monkeypatch):
    """Whoever closed the workers and had read its beginning waited for the rest for ever."""
    imported(monkeypatch)
    workers = Workers(Large(), 1, ahead=1)
    (process,) = workers.processes
    assert len(workers.wait()) == 4_000_000
    deadline = time.monotonic() + 60
    while workers.level() < 1 and time.monotonic() < deadline:  # the next is being sent
        time.sleep(0.02)
    workers.stop.set()
    process.join(2.0)
    assert process.is_alive()
    workers.close()
    assert not process.is_alive()


def leave_workers(pipe) -> None:
    """A trainer that is killed while its worker works."""
    workers = Workers(Numbers(), 1)
    pipe.send(workers.wait()[1])
    os.kill(os.getpid(), 9)


def test_workers_end_with_a_trainer_that_is_killed(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    trainer = context.Process(target=leave_workers, args=(theirs,))
    trainer.start()
    number = ours.recv()
    trainer.join(60)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{number}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{number}").exists()
