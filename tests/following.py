"""Followers without processes: their code in threads of the test's own process, over pipes of the same kind."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

from lanting.engine.parallel_follower import serve
from lanting.engine.parallel_peer import Peer


class ThreadPeer(Peer):
    """What `Peer` is, but for the process. It leaves when its pipe is closed, and can't be killed."""

    def _start(self) -> Any:
        (orders, told), (answers, out) = os.pipe(), os.pipe()
        ends = [os.fdopen(end, mode) for end, mode in ((orders, "rb"), (told, "wb"), (answers, "rb"), (out, "wb"))]
        done = threading.Event()

        def work() -> None:
            serve(ends[0], ends[3], lambda: None)
            done.set()
            ends[3].close()

        threading.Thread(target=work, daemon=True).start()
        return SimpleNamespace(
            stdin=ends[1],
            stdout=ends[2],
            wait=lambda seconds=None: done.wait(seconds),
            poll=lambda: 0 if done.is_set() else None,
            kill=lambda: None,
            pid=id(done),
            returncode=0,
        )
