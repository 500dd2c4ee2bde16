"""`python tools/install.py EXTRA`: lanting and what an extra of it needs, into the environment that runs this.

By uv, which takes a tenth of pip's time, and by pip where uv can't be had or fails. uv is told what pip is configured
to use: its indexes, folders of wheels, constraints and certificates. Rejected: uv alone, which people with a mirror or
behind a company's proxy would have to set up a second time.
"""

import os
import subprocess
import sys
from collections.abc import Mapping

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
MEANT = {  # pip's name of a setting -> uv's variable
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "no-index": "UV_NO_INDEX",
}
LISTS = {"find-links": ","}  # pip parts all values by spaces; uv parts most of them so, these by commas


def main() -> int:
    wanted = f".[{sys.argv[1]}]" if sys.argv[1:] else "."
    if by_uv(wanted):
        return 0
    return subprocess.run([*PIP, "install", "--quiet", "--editable", wanted], check=False).returncode


def by_uv(wanted: str) -> bool:
    """Whether uv did it. What it says is kept to itself: where it fails, pip will say it again."""
    if subprocess.run([*PIP, "install", "--quiet", "uv>=0.5"], check=False, capture_output=True).returncode:
        return False
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
    # as pip does: the best version of all indexes, not of the first one that has any
    command += ["--index-strategy", "unsafe-best-match", "--editable", wanted]
    environment = {**translated(configured()), **os.environ}
    return subprocess.run(command, env=environment, check=False, capture_output=True).returncode == 0


def configured() -> dict[str, str]:
    """pip's settings by their bare names; those that variables say win over those of files."""
    told = subprocess.run([*PIP, "config", "list"], check=False, capture_output=True, encoding="utf-8").stdout
    pairs = [line.partition("=")[::2] for line in told.splitlines()]
    pairs.sort(key=lambda pair: pair[0].startswith(":env:"))
    return {name.rpartition(".")[2]: value.strip("'\"") for name, value in pairs}


def translated(settings: Mapping[str, str]) -> dict[str, str]:
    """The same settings as uv's variables."""
    return {
        variable: LISTS.get(name, " ").join(settings[name].replace("\\n", " ").split())
        for name, variable in MEANT.items()
        if name in settings
    }


if __name__ == "__main__":
    sys.exit(main())
