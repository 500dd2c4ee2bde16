"""What a server is told when it starts. Everything that can be refused is refused before a port is opened.

Keys are needed as soon as anyone but this computer may come: another address to listen on, or another host name that
a proxy answers to.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lanting.core.errors import RequestError
from lanting.plan.room import MOST

MOST_WORKERS = 256  # of a model
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HOST = re.compile(r"[^\s/*@]+")  # a name, perhaps with a port
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\sA-Z/?#@*]+")  # as browsers write it: small letters, no path


@dataclass(frozen=True, slots=True)
class Served:
    """One model and how its engine is opened; `options` are those of `Engine.open`."""

    name: str  # what clients call it
    model: str  # a release, a folder or a file
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Caps:
    """The most that one request, or all together, may ask for."""

    body: int = 64 << 20  # bytes of a request
    body_seconds: float = 60.0  # within which it must have arrived
    bodies: int = 8  # of the largest, whose bytes may be in memory at once while they are read
    pixels: int = 2048 * 2048  # of one picture to be drawn
    count: int = 16  # pictures of one request
    steps: int = 200
    tries: int = 8  # seeds that are drawn with until quoted words are read
    pictures: int = 16  # input pictures of one request
    input_pixels: int = 50_000_000  # of all of them together
    waiting: int = 1000  # jobs in the queue; one key may hold half of them
    fetch_bytes: int = 20 << 20  # of a picture that is fetched
    fetch_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class Settings:
    """A server. `data` is its folder: queue, pictures, keys."""

    data: Path
    models: tuple[Served, ...] = (Served("nano", "nano"),)
    host: str = "127.0.0.1"
    port: int = 8353  # the pavilion's poems were written in 353
    hosts: tuple[str, ...] = ()  # further names it answers to
    origins: tuple[str, ...] = ()  # web pages elsewhere that may call it
    keys: bool = False  # ask for keys even on this computer
    urls: bool = False  # fetch input pictures from addresses that clients give
    timeout: float = 3600.0  # seconds that a job may be drawn
    drain: float = 30.0  # seconds a running job gets when the server is told to stop
    keep_days: float = 30.0  # finished jobs and their pictures
    every: int = 4  # steps between checkpoints
    workers: int | None = 1  # of each model; None: one for each GPU there is, at least one
    batch: int | None = None  # jobs drawn together at most; 1: none; None: as many as gain by it and stay the same
    caps: Caps = Caps()
    rewrite: bool = False  # prompts are rewritten where a request says nothing and the model can
    opener: str = "lanting.serve.worker:open_engine"  # what makes an engine; tests name a fake one

    @property
    def local(self) -> bool:
        """Only this computer can come, under its own names."""
        return is_loopback(self.host) and all(map(is_loopback, self.hosts))

    @property
    def needs_keys(self) -> bool:
        return self.keys or not self.local

    @property
    def url(self) -> str:
        """Where a browser on this computer finds it."""
        shown = "localhost" if self.host in ("0.0.0.0", "::", "127.0.0.1") else self.host
        return f"http://{f'[{shown}]' if ':' in shown else shown}:{self.port}"

    def model(self, name: str | None) -> Served | None:
        """The model of that name; the first one where nobody said which."""
        if not name:
            return self.models[0]
        return next((one for one in self.models if one.name == name), None)


def is_loopback(host: str) -> bool:
    """Whether a name or address means this computer and nothing else."""
    bare = host.strip("[]").lower()
    if bare in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def check(settings: Settings) -> Settings:
    """The same settings, or a RequestError: names of models are unique, and every value is one that can work."""
    names = [one.name for one in settings.models]
    if len(set(names)) != len(names):
        raise RequestError(
            "two models are called {name}: serve one of them", name=next(n for n in names if names.count(n) > 1)
        )
    if not 0 <= settings.port <= 65535:
        raise RequestError("the port must be 0 to 65535, not {port}", port=settings.port)
    check_numbers(settings)
    check_names(settings)
    return settings


def check_numbers(settings: Settings) -> None:
    """Raises RequestError. Below 0 days every finished job would be forgotten, in 0 seconds none would be done."""
    for name, value, low, high in (
        ("--batch", settings.batch, 1, MOST),
        ("--workers", settings.workers, 1, MOST_WORKERS),
        ("--queue", settings.caps.waiting, 1, 1_000_000),
        ("--max-side", math.isqrt(max(settings.caps.pixels, 0)), 16, 16384),
    ):
        if value is not None and not low <= value <= high:
            raise RequestError(
                "{name} must be a whole number from {low} to {high}, not {value}",
                **{"name": name, "low": low, "high": high, "value": value},
            )
    for name, value, low, high in (
        ("--timeout", settings.timeout, 0.1, 1e7),
        ("--drain", settings.drain, 0, 1e6),
        ("--keep", settings.keep_days, 0, 1e5),
    ):
        if not low <= value <= high:
            raise RequestError(
                "{name} must be a number from {low} to {high}, not {value}",
                **{"name": name, "low": low, "high": f"{high:.0f}", "value": value},
            )


def check_names(settings: Settings) -> None:
    """Raises RequestError for what no browser and no proxy would ever send, so that it would do nothing."""
    for host in settings.hosts:
        if not HOST.fullmatch(host):
            raise RequestError("--allow-host takes a name, as pictures.example.com, not {value}", value=repr(host))
    for origin in settings.origins:
        if not ORIGIN.fullmatch(origin):
            raise RequestError(
                "--allow-origin takes a site without a path, as https://host or https://host:8443, not {value}",
                value=repr(origin),
            )
