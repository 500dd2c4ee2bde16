"""A server over fake engines as a process: prints its port. The argument is JSON of settings."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from lanting.serve.logs import write_to_stderr
from lanting.serve.run import serve
from lanting.serve.settings import Caps, Served, Settings


def main(words: str) -> None:
    told = json.loads(words)
    options = told.pop("options", {})
    names = told.pop("names", ["nano"])
    models = tuple(Served(name, name, options) for name in names)
    caps = Caps(**told.pop("caps", {}))
    for name in ("hosts", "origins"):
        told[name] = tuple(told.get(name, ()))
    for path, value in told.pop("patch", {}).items():  # seconds that nothing sets, shorter
        module, _, name = path.rpartition(".")
        setattr(importlib.import_module(module), name, value)
    opener = told.pop("opener", "fakeserve:open_engine")
    ray, cpus = told.pop("ray", None), told.pop("cpus", None)
    settings = Settings(data=Path(told.pop("data")), models=models, caps=caps, opener=opener, **told)
    write_to_stderr()
    if ray is None:
        serve(settings, lambda house: print(house.settings.port, flush=True))
        return
    from lanting.cluster.join import join

    cluster = join(ray, cpus)
    print(json.dumps({"cluster": cluster.address}), file=sys.stderr, flush=True)
    try:
        serve(settings, lambda house: print(house.settings.port, flush=True), hire=cluster.hire)
    finally:
        cluster.close()


if __name__ == "__main__":
    main(sys.argv[1])
