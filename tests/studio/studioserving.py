"""A server with its studio as a process: prints its port. The argument is JSON of settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lanting.serve.logs import write_to_stderr
from lanting.serve.run import serve
from lanting.serve.settings import Served, Settings
from lanting.serve.studio.door import studio

OPENER = "studiofakes:open_engine"


def main(words: str) -> None:
    told = json.loads(words)
    models = [Served("nano", "nano", {"device": "cpu", "loras": ["lightning"]})]
    models += [Served(name, name, options) for name, options in told.pop("further", {}).items()]
    write_to_stderr()
    settings = Settings(data=Path(told.pop("data")), models=tuple(models), port=0, opener=OPENER, **told)
    serve(settings, lambda house: print(house.settings.port, flush=True), studio)


if __name__ == "__main__":
    main(sys.argv[1])
