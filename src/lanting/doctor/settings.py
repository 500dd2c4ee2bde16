"""What a person has set: environment variables, language and terminal, the clock, the file of defaults."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lanting.core.errors import LantingError
from lanting.core.lang import explain
from lanting.doctor.finding import Finding, advice, fine, problem, remark

OURS = (
    "LANTING_ATTENTION",
    "LANTING_COMPILE",
    "LANTING_CONFIG",
    "LANTING_GRAPHS",
    "LANTING_HOME",
    "LANTING_KERNELS",
    "LANTING_LANG",
    "LANTING_MODEL",
)
HUB = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HUGGINGFACE_HUB_CACHE", "MODELSCOPE_ENDPOINT")
SECRET = ("HF_TOKEN",)
ATTENTIONS = ("auto", "fa3", "cudnn", "fa2", "flash", "efficient", "math", "int8")
MANY = 4  # cores of which one thread leaves most idle
BUILT = 2026  # a clock before this year is wrong


def environment(env: Mapping[str, str], cores: int, gpu: bool) -> Iterator[Finding]:
    """Variables that change something; `gpu`: an NVIDIA GPU is there, hidden or not."""
    for name in sorted(env):
        if name.startswith("LANTING_") and name not in OURS:
            near = difflib.get_close_matches(name, OURS, n=1, cutoff=0.6)
            say_it = advice("did you mean {near}? To drop it: unset {name}", near=(near or OURS)[0], name=name)
            yield remark("{name} is set, and means nothing", "environment", say_it, name=name)
    told = [f"{name}={env[name]}" for name in (*OURS, *HUB) if env.get(name)] + [n for n in SECRET if env.get(n)]
    if told:
        yield fine("environment: {names}", "environment", names=", ".join(told))
    yield from values(env)
    yield from contradictions(env)
    if env.get("OMP_NUM_THREADS", "").split(",")[0] == "1" and cores >= MANY:
        drop = advice("to use all of them: unset OMP_NUM_THREADS")
        yield remark("OMP_NUM_THREADS=1: one of {cores} cores is used", "environment", drop, cores=cores)
    if gpu and env.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        drop = advice("to use it: unset CUDA_VISIBLE_DEVICES")
        yield remark("CUDA_VISIBLE_DEVICES hides the GPU", "environment", drop)


def values(env: Mapping[str, str]) -> Iterator[Finding]:
    """What variables are set to."""
    from lanting.kernels.library import OFF

    asked = env.get("LANTING_ATTENTION", "").strip().lower()
    if asked and asked not in ATTENTIONS:
        near = difflib.get_close_matches(asked, ATTENTIONS, n=1, cutoff=0.4) or ["auto"]
        other = advice(
            "use one of {names}; nearest: export LANTING_ATTENTION={near}", names=", ".join(ATTENTIONS), near=near[0]
        )
        yield problem("LANTING_ATTENTION names {name}, which is no attention", "environment", other, name=asked)
    if env.get("LANTING_GRAPHS", "").strip().lower() in OFF:
        yield remark(
            "LANTING_GRAPHS: steps are not recorded on GPUs", "environment",
            advice("to have that back: unset LANTING_GRAPHS"),
        )  # fmt: skip
    if (asked := env.get("LANTING_COMPILE", "").strip().lower()) and asked not in OFF:
        drop = advice("if you did not mean to: unset LANTING_COMPILE")
        yield remark("LANTING_COMPILE: torch compiles blocks, and ours are not used", "environment", drop)
    if env.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        drop = advice("to download again: unset HF_HUB_OFFLINE")
        yield remark("HF_HUB_OFFLINE: nothing is downloaded", "environment", drop)
    address = env.get("HF_ENDPOINT", "")
    if address and not address.startswith(("https://", "http://")):
        other = advice("write it with https://, or drop it: unset HF_ENDPOINT")
        yield problem("HF_ENDPOINT is no address: {value}", "environment", other, value=address)


def contradictions(env: Mapping[str, str]) -> Iterator[Finding]:
    """Variables of which one makes another mean nothing."""
    from lanting.kernels.library import OFF

    off = env.get("LANTING_KERNELS", "").strip().lower() in OFF
    for name in ("LANTING_GRAPHS", "LANTING_ATTENTION"):
        if off and env.get(name, "").strip().lower() not in ("", *OFF):
            drop = advice("drop one of them: unset LANTING_KERNELS, or unset {name}", name=name)
            yield remark("LANTING_KERNELS is off, so {name} means nothing", "environment", drop, name=name)
    caches = [name for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME") if env.get(name)]
    if len(caches) > 1 and not same_cache(env, caches):
        drop = advice("drop the others: unset {names}", names=" ".join(caches[1:]))
        yield remark("{first} decides where Hugging Face's cache is, before {others}", "environment", drop,
                     first=caches[0], others=", ".join(caches[1:]))  # fmt: skip


def same_cache(env: Mapping[str, str], names: Sequence[str]) -> bool:
    """Whether they all say the same place."""
    return len({Path(env[name], "hub") if name == "HF_HOME" else Path(env[name]) for name in names}) == 1


def language(env: Mapping[str, str], encoding: str, windows: bool = False) -> Iterator[Finding]:
    """Of sentences, and whether the terminal can show them. `encoding`: of stdout."""
    asked = env.get("LANTING_LANG", "").strip().lower()
    if asked and not asked.startswith(("en", "zh")):
        choose = advice("there are en and zh: export LANTING_LANG=en")
        yield remark(
            "LANTING_LANG names {name}, a language that lanting does not speak", "language", choose, name=asked
        )
    if encoding.lower().replace("-", "") not in ("utf8", "utf8sig", "cp65001"):
        command = "export PYTHONUTF8=1" if windows else "export PYTHONUTF8=1 LC_ALL=C.UTF-8"
        use = advice("use UTF-8: {command}", command=command)
        yield remark(
            "the terminal's encoding is {encoding}, which can't show everything", "language", use, encoding=encoding
        )


def clock(year: int) -> Iterator[Finding]:
    """Certificates of a hub are refused where it is wrong."""
    if year < BUILT:
        yield problem(
            "the clock says it is {year}: downloads over https will fail", "clock",
            advice("set the clock: sudo timedatectl set-ntp true"), year=str(year),
        )  # fmt: skip


def named(models: Mapping[str, str]) -> Iterator[Finding]:
    """Default models that are none: where each is named, and its name."""
    for where, name in models.items():
        see = advice("see what there is: lanting list; and where a default is set: lanting config")
        yield problem("{where} names {name}, and there is no such model here", "config", see, where=where, name=name)


def config(path: Path, there: bool, wrong: Sequence[LantingError], count: int) -> Iterator[Finding]:
    """The file of defaults: what is wrong with it, and how many it sets."""
    for error in wrong:
        mend = advice("see all of them: lanting config")
        yield problem("{reason}", "config", mend, reason=explain(error))
    if there and not wrong:
        yield fine("defaults of your own: {count}, in {path}", "config", count=count, path=path)
