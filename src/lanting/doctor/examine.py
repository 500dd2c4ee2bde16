"""All checks in the order in which they are read: what runs, what computes, what is stored, what is set."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

from lanting.doctor import gather, hardware, settings, software, storage
from lanting.doctor.finding import Finding, guarded
from lanting.doctor.software import Cards


def examine() -> Iterator[Finding]:
    """Findings of this machine, each group as soon as it is known. Never raises: a check that fails is a finding."""
    windows = sys.platform == "win32"
    yield from guarded("python", lambda: software.python(gather.interpreter()))
    cards: list[Cards] = []
    yield from guarded("driver", lambda: software.driver(remembered(cards)))
    gpus = cards[0] if cards else Cards()
    yield from guarded("torch", lambda: software.torch(gather.torch(), gpus))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    yield from guarded(
        "gpu",
        lambda: software.answers(gpus, gather.torch(), gather.computing(gpus, gather.torch(), hidden), gather.PATIENCE),
    )
    yield from guarded("triton", lambda: software.triton(triton(), gpus, windows))
    yield from guarded("kernels", lambda: hardware.kernels(gather.kernels()))
    yield from guarded("memory", memory)
    yield from guarded("disk", lambda: storage.disk(gather.disk()))
    yield from guarded("downloads", lambda: storage.downloads(gather.begun()))
    yield from guarded("models", lambda: storage.models(list(gather.held())))
    yield from guarded("extras", lambda: software.extras(gather.missing()))
    yield from guarded("environment", lambda: settings.environment(os.environ, os.cpu_count() or 1, bool(gpus.names)))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    yield from guarded("language", lambda: settings.language(os.environ, encoding, windows))
    yield from guarded("clock", lambda: settings.clock(time.localtime().tm_year))
    yield from guarded("config", config)


def remembered(cards: list[Cards]) -> Cards:
    """The GPUs, which several checks want and only one needs to ask for."""
    cards.append(gather.cards())
    return cards[0]


def triton() -> str:
    from lanting.kernels.gpu.names import triton as installed

    return installed()


def memory() -> Iterator[Finding]:
    from lanting.plan import detect

    machine = detect()
    yield from hardware.memory(machine)
    yield from hardware.fitting(machine)


def config() -> Iterator[Finding]:
    from lanting.defaults.choose import MODEL, problems, sound, tasks_of
    from lanting.defaults.file import config_path, load

    content = load(config_path())
    wrong, own = list(problems(content)), sound(content)
    yield from settings.config(content.path, os.path.exists(content.path), wrong, len(own.values))
    models = {key: str(value) for key, value in own.values.items() if key.rpartition(".")[2] == "model"}
    models |= {MODEL: own.model} if own.model else {}
    yield from settings.named({where: name for where, name in models.items() if tasks_of(name) is None})
