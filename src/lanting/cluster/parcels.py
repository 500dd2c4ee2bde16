"""Orders and results as bytes. No disk is shared: what an order names by a path travels with it, and a worker's files
come back with its words.

Only JSON and bytes are put into parcels: pictures as the PNG that the server wrote after it had decoded what a client
sent, checkpoints and results as their files. Nothing a client sent is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Blobs = dict[str, bytes]  # name -> a file's bytes
Parcel = tuple[str, Blobs]  # JSON, and what belongs to it
OVER = ("done", "failed", "stopped")  # words after which a job's files are no longer needed


# -------------------------------------------------------------------- to the worker
def packed(order: Mapping[str, Any]) -> Parcel:
    """An order and the files it names. Raises OSError."""
    if order["do"] != "draw":
        return json.dumps(dict(order)), {}
    blobs = {f"picture-{index}": Path(path).read_bytes() for index, path in enumerate(order["pictures"])}
    if order["mask"] is not None:
        blobs["mask"] = Path(order["mask"]).read_bytes()
    with suppress(FileNotFoundError):
        blobs["checkpoint"] = Path(order["checkpoint"]).read_bytes()
    told = {name: value for name, value in order.items() if name not in ("checkpoint", "results")}
    told |= {"pictures": [f"picture-{i}" for i in range(len(order["pictures"]))]}
    return json.dumps(told | {"mask": "mask" if "mask" in blobs else None}, ensure_ascii=False), blobs


def unpacked(parcel: Parcel, folder: Path) -> dict[str, Any]:
    """The order with paths below `folder`, where its files are then. Raises OSError."""
    order, blobs = json.loads(parcel[0]), parcel[1]
    if order["do"] != "draw":
        return order
    own = folder / order["job"]
    own.mkdir(exist_ok=True)
    for name, data in blobs.items():
        (own / name).write_bytes(data)
    order["pictures"] = [str(own / name) for name in order["pictures"]]
    order["mask"] = order["mask"] and str(own / order["mask"])
    return order | {"checkpoint": str(own / "checkpoint"), "results": str(own / "results")}


# -------------------------------------------------------------------- from the worker
def reported(line: str, folder: Path) -> Parcel:
    """A worker's word with the files it is about; those of a job that is over are dropped here. Raises OSError."""
    said = json.loads(line)
    own, blobs = folder / said.get("job", ""), Blobs()
    if said["is"] == "checkpoint":
        blobs["checkpoint"] = (own / "checkpoint").read_bytes()
    elif said["is"] == "done":
        blobs = {path.name: path.read_bytes() for path in (own / "results").iterdir()}
    if said["is"] in OVER:
        shutil.rmtree(own, ignore_errors=True)
    return line, blobs


# -------------------------------------------------------------------- where they are meanwhile
def fresh_folder(kind: str, home: Path | None = None) -> Path:
    """Of this process, readable for nobody else. Those of processes that were killed are dropped."""
    home, prefix = home or Path(tempfile.gettempdir()), f"lanting-{kind}-"
    for left in home.glob(f"{prefix}*"):
        owner = left.name.removeprefix(prefix).partition("-")[0]
        if owner.isdigit() and not lives(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=home))


def lives(process: int) -> bool:
    if os.name == "nt":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
