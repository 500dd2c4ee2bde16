"""A follower's process as the leader sees it: messages out, messages in, and an end to every wait.

Pipes carry everything but what goes between blocks (`attach.parallel_group`): in a step that is latents one way and a
velocity the other, half a megabyte each at 1024 x 1024 pixels. They break at once when either side is gone, which no
library for GPUs promises, and carry the same bits between devices of any kind. A thread writes and another reads, so
that neither side waits for a full pipe while the other computes. Rejected: torch.multiprocessing, which runs the
caller's program once more in the new process, and a second copy of whatever that starts.
"""

from __future__ import annotations

import io
import os
import pickle
import queue
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

import lanting
from lanting.core.processes import apart

LENGTH = struct.Struct("<Q")
FAREWELL = 2.0  # seconds in which a follower may leave by itself


class GoneError(Exception):
    """A follower that can't help any more: a sentence of ours and its values, or what the system said."""

    def __init__(self, sentence: str, **values: object):
        super().__init__(sentence.format(**values) if values else sentence)
        self.sentence, self.values = sentence, values


# ---------------------------------------------------------------- messages
class Packer(pickle.Pickler):
    """Tensors travel as their bytes, from any device; they arrive on the CPU."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        plain = torch.empty(obj.shape, dtype=obj.dtype).copy_(obj.detach())  # one row that is expanded has no stride
        data = plain.view(-1).view(torch.uint8).numpy().tobytes()
        return unpacked, (data, str(plain.dtype).removeprefix("torch."), tuple(plain.shape))


def unpacked(data: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    kind = getattr(torch, dtype)
    return torch.frombuffer(bytearray(data), dtype=kind).view(shape) if data else torch.empty(shape, dtype=kind)


def packed(message: object) -> bytes:
    room = io.BytesIO()
    Packer(room, pickle.HIGHEST_PROTOCOL).dump(message)
    return room.getvalue()


def write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def read(pipe: IO[bytes]) -> Any:
    """The next message. Raises EOFError where the other side is gone."""
    head = pipe.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    (length,) = LENGTH.unpack(head)
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)  # from a process that we started, over a pipe that nobody else has


# ---------------------------------------------------------------- the process
def command() -> list[str]:
    """A Python that finds this package wherever we found it."""
    root = str(Path(lanting.__file__).parents[1])
    code = f"import sys; sys.path.append({root!r}); from lanting.engine.parallel_follower import main; main()"
    return [sys.executable, "-c", code]


class Peer:
    """One follower. `when_gone` is called once, from a thread, as soon as it can't answer any more."""

    def __init__(self, device: str, threads: int | None = None):
        self.device, self.threads = device, threads
        self.serial, self.failure = 0, GoneError("")
        self.ended = threading.Event()  # it can't answer any more; `failure` says why
        self.when_gone: list[Callable[[], None]] = []
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        self.process = self._start()
        self.orders: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()  # None behind the last one
        for work in (self._write, self._read):
            threading.Thread(target=work, daemon=True).start()

    def _start(self) -> Any:
        env = os.environ | ({} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)})
        pipe = subprocess.PIPE
        return subprocess.Popen(command(), stdin=pipe, stdout=pipe, stderr=self.errors, env=env, **apart())

    def tell(self, verb: str, **values: object) -> None:
        """No answer is waited for; a follower that fails is gone."""
        self.orders.put(packed((verb, values)))

    def ask(self, verb: str, **values: object) -> int:
        """The number under which the answer comes."""
        self.serial += 1
        self.orders.put(packed((verb, {"serial": self.serial, **values})))
        return self.serial

    def answer(self, serial: int, seconds: float) -> Any:
        """What was asked; answers to older questions, which nobody waits for any more, are passed over.
        Raises GoneError where there is none in time, or will be none."""
        until = time.monotonic() + seconds
        while True:
            try:
                message = self.answers.get(timeout=max(until - time.monotonic(), 0.001))
            except queue.Empty:
                raise GoneError("it did not answer in {seconds:.0f} seconds", seconds=seconds) from None
            if message is None:
                self.answers.put(None)  # for whoever asks next
                raise self.failure
            found, value = message
            if found == serial:
                return value

    @property
    def here(self) -> bool:
        return self.process.poll() is None and not self.ended.is_set()

    def close(self, seconds: float = FAREWELL) -> None:
        """Let it leave, or end it."""
        self.orders.put(None)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.orders.put(None)
        with suppress(subprocess.TimeoutExpired):  # a driver may hold on to it
            self.process.wait(FAREWELL)

    # ---------------------------------------------------------------- threads
    def _write(self) -> None:
        pipe = self.process.stdin
        assert pipe is not None
        with suppress(OSError, ValueError):
            while (data := self.orders.get()) is not None:
                write(pipe, data)
        with suppress(OSError):
            pipe.close()

    def _read(self) -> None:
        pipe = self.process.stdout
        assert pipe is not None
        try:
            while True:
                verb, *rest = read(pipe)
                if verb == "failed":
                    sentence, values = rest
                    self.failure = GoneError(sentence, **values)
                    break
                self.answers.put((rest[0], rest[1]))
        except (EOFError, OSError, ValueError):
            self.failure = GoneError("its process ended: {reason}", reason=self._last_words())
        self.ended.set()
        self.answers.put(None)
        for call in self.when_gone:
            call()

    def _last_words(self) -> str:
        """The last line it wrote, or how it ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(FAREWELL)
        with suppress(OSError, ValueError):
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").strip().splitlines()
            if lines:
                return lines[-1]
        return f"exit code {self.process.returncode}"
