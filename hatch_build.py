"""Installing lanting compiles its kernels (src/lanting/kernels) where there is a C++ compiler, and else says so.

An editable install gets the library beside its sources; a wheel carries it, and a tag of this platform with it. Any
Python may use it, for it is loaded with ctypes. The sources are in every wheel, so that
`python -m lanting.kernels.build` can make up for a compiler that came later.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

KERNELS = Path("src", "lanting", "kernels")


class KernelsHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        build = runpy.run_path(str(Path(self.root, KERNELS, "build.py")))
        build["main"]()
        if version == "editable" or not build["fresh"]():
            return
        for path in (build["LIBRARY"], build["stamp"](build["LIBRARY"])):  # git ignores them, so hatch would too
            build_data["artifacts"].append((KERNELS / path.name).as_posix())
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform()}"


def platform() -> str:
    """This one, as wheels name it; none of the many Linuxes of manylinux, for which nobody has built here."""
    return next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))
