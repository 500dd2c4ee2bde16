"""Processes that make up training pictures ahead of time, so that a GPU never waits for Python.

They send what they make through one bounded queue and pause while it is full. They end with the trainer, also when
that is killed. Threads would not do: making up a design is Python, and the trainer's own Python must not wait for it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing import parent_process
from pathlib import Path
from queue import Empty, Full
from typing import Any, Protocol

import torch
import torch.multiprocessing as mp

from lanting.core.errors import ModelError
from lanting.train.atlas import Atlas, default_atlas

CARRIED = "carried"  # what an atlas file says of itself
LOOPBACK = {"linux": "lo", "darwin": "lo0"}
PATIENCE = 180.0  # seconds without anything after which the workers are given up


class Maker(Protocol):
    """Makes one piece of work after another; `hanzi` is how many Chinese characters are in use."""

    def make(self, hanzi: int) -> Any: ...


class Order(Protocol):
    """What workers make; small, since it travels to every one of them."""

    def maker(self, number: int) -> Maker: ...


def kept_atlas(path: Path) -> Atlas:
    """The atlas carried in a file, kept there first if it is missing. It may come from another machine."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        default_atlas().save(path, CARRIED)
    atlas = Atlas.load(path, CARRIED)
    if atlas is None:
        raise ModelError("{path} is no atlas kept by a training run: remove it", path=path)
    return atlas


def work(order: Order, number: int, queue: Any, hanzi: Any, stop: Any) -> None:
    """One worker: make things until told to stop or left alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    try:
        maker = order.maker(number)
        while not stop.is_set() and parent_lives():
            made = maker.make(hanzi.value)
            while not stop.is_set() and parent_lives():
                try:
                    queue.put(made, timeout=1.0)
                    break
                except Full:
                    continue
    except Exception as error:
        queue.put(f"{type(error).__name__}: {error}")
    finally:
        leave(queue)


def leave(queue: Any) -> None:
    """Send what was put, as long as there is a trainer: one that reads would wait for ever for the rest of a piece."""
    queue.close()
    sending = threading.Thread(target=queue.join_thread, daemon=True)
    sending.start()
    while sending.is_alive() and parent_lives():
        sending.join(0.2)
    queue.cancel_join_thread()


def meet_here() -> None:
    """Let Gloo's processes meet on the loopback, whatever this machine's name leads to. Windows has no name for it that
    Gloo knows."""
    if sys.platform in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])


def parent_lives() -> bool:
    """Whether the process that started this one is there. The number of a parent, which Linux changes when it ends,
    stays what it was on Windows."""
    parent = parent_process()
    return parent is None or parent.is_alive()


class Workers:
    """`count` processes and their queue, which holds `ahead` pieces (0: four for each)."""

    def __init__(self, order: Order, count: int, ahead: int = 0, hanzi: int = 3500):
        context = mp.get_context("spawn")
        self.ahead = ahead or 4 * count
        self.queue = context.Queue(self.ahead)
        self.hanzi = context.Value("i", hanzi)
        self.stop = context.Event()
        self.waited = 0.0  # seconds spent in `wait`
        self.processes = [
            context.Process(target=work, args=(order, i, self.queue, self.hanzi, self.stop), daemon=True)
            for i in range(count)
        ]
        for process in self.processes:
            process.start()

    def take(self) -> Any:
        """The next piece, None where none is ready. Raises ModelError when a worker has failed."""
        try:
            return self._checked(self.queue.get_nowait())
        except Empty:
            return None

    def wait(self) -> Any:
        """The next piece, however long it takes. Raises ModelError when there will be none."""
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE and any(process.is_alive() for process in self.processes):
            try:
                made = self.queue.get(timeout=1.0)
            except Empty:
                continue
            self.waited += time.monotonic() - began
            return self._checked(made)
        raise ModelError("The processes that make up designs gave nothing; run the command again to go on.")

    @staticmethod
    def _checked(made: Any) -> Any:
        if isinstance(made, str):
            raise ModelError(
                "a process that makes up designs failed ({reason}): run the command again to go on", reason=made
            )
        return made

    def level(self) -> float:
        """How full the queue is, 0..1; NaN where the system can't tell."""
        try:
            return min(1.0, self.queue.qsize() / self.ahead)
        except NotImplementedError:
            return float("nan")

    def close(self) -> None:
        """End the workers."""
        self.stop.set()
        deadline = time.monotonic() + 5.0
        while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
            try:
                self.queue.get(timeout=0.05)  # a worker may be held up by a full pipe
            except (Empty, OSError, EOFError):
                continue
        for process in self.processes:
            if process.is_alive():
                process.terminate()
            process.join(5.0)
        self.queue.close()
