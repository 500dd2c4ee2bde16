"""One file over HTTP into a `.part` that a later run takes up where this one stopped.

Cut connections, stalls and busy servers are waited out as long as bytes keep arriving between them; what a
person must decide about is raised at once. Rejected: the hub library's own file download, which deletes the
bytes of an unfinished file when the process ends: a cut at 4.9 of 5 GB would begin again at 0.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

from lanting.core.errors import ModelError

WAITS = (1.0, 2.0, 4.0, 8.0, 15.0)  # seconds before the next try, while no byte arrives
SILENCE = 20.0  # seconds without a byte after which a connection counts as dead
CHUNK = 1 << 20
BUSY = (408, 425, 429, 500, 502, 503, 504)


class StoppedError(Exception):
    """The person cancelled; what has arrived stays."""


def fetch(
    url: str,
    part: Path,
    size: int,
    headers: Mapping[str, str],
    tick: Callable[[int], None],
    stop: Event,
    waits: tuple[float, ...] = WAITS,
) -> None:
    """Bring `part` to `size` bytes. `tick` hears of every byte that arrives, negatively of bytes thrown away.

    Raises ModelError when the hub stays silent through all `waits`, the hub library's errors when it refuses,
    StoppedError when `stop` is set.
    """
    part.touch()
    tries, furthest = 0, part.stat().st_size
    while (have := part.stat().st_size) != size:
        if stop.is_set():
            raise StoppedError
        if have > size:
            _restart(part, tick)
            furthest = 0
            continue
        trouble = _stream(url, part, size, headers, tick, stop)
        if (now := part.stat().st_size) > furthest:  # not what was there before it began anew
            tries, furthest = 0, now
        elif tries < len(waits):
            stop.wait(waits[tries])
            tries += 1
        else:
            raise ModelError(
                "the download stopped ({reason}): what has arrived is kept, pull again to go on",
                reason=trouble,
            )


def digest_of(path: Path, kind: str) -> str:
    """The file's digest of the same kind as `kind`: sha256 (64 letters), or git's sha1 of a blob (40)."""
    if len(kind) == 40:
        made = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        made = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            made.update(block)
    return made.hexdigest()


def _stream(
    url: str, part: Path, size: int, headers: Mapping[str, str], tick: Callable[[int], None], stop: Event
) -> str:
    """One connection: append what it brings, or drop it where that is more than `size` (a proxy's page, another
    file). Returns why it ended; raises when trying again is no use."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session, hf_raise_for_status

    network_error: Any = HfHubHTTPError.__mro__[1]  # the HTTP library's base error: httpx's, httpx2's from hub 2.x
    have = part.stat().st_size
    asked = {**headers, "Accept-Encoding": "identity"}
    if have:
        asked["Range"] = f"bytes={have}-"
    try:
        with get_session().stream("GET", url, headers=asked, timeout=SILENCE, follow_redirects=True) as response:
            if response.status_code in BUSY:
                return f"error {response.status_code}"
            if response.status_code == 416:  # our part is longer than their file
                _restart(part, tick)
                return "the file changed on the hub"
            hf_raise_for_status(response)
            if have and not _continues(response, have):
                _restart(part, tick)
            with part.open("ab") as file:
                for block in response.iter_bytes():
                    file.write(block)
                    tick(len(block))
                    if stop.is_set():
                        raise StoppedError
                    if file.tell() > size:
                        break
            if part.stat().st_size > size:
                _restart(part, tick)
                return "it sends more bytes than it lists"
    except HfHubHTTPError:
        raise
    except network_error as error:
        return str(error).strip() or type(error).__name__
    return "the connection was closed"


def _continues(response: Any, have: int) -> bool:
    """Whether the answer really begins where our part ends."""
    place = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return response.status_code == 206 and place is not None and int(place[1]) == have


def _restart(part: Path, tick: Callable[[int], None]) -> None:
    tick(-part.stat().st_size)
    part.write_bytes(b"")
