"""Into a Ray cluster: one that runs, or one of this machine's own for as long as the server lives.

Whoever reaches a Ray cluster's ports can run programs on its machines. So a cluster of our own listens on loopback
alone and asks for a token that nobody else is told; who may reach another one is for its owner to say (docs/deploy.md).
Nothing is reported to anyone: Ray's usage statistics are off, and there is no dashboard.

Rejected: `ray[serve]`, whose router would be a second queue in front of ours that forgets what it holds; Ray's client
protocol (ray://), which brings a proxy between that has to be run as well.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lanting.cluster.hand import Needs, RayHand, reason_of
from lanting.cluster.parcels import fresh_folder
from lanting.core.errors import RequestError
from lanting.serve.hand import Hand
from lanting.serve.settings import Served, Settings
from lanting.serve.staff import THREADS, Post
from lanting.specs import spec_names

LOCAL, AUTO = "local", "auto"
KNOCK = 3.0  # seconds for a port to answer
ANSWER = 10.0  # seconds for a cluster to answer
STORE = 200 << 20  # bytes for what travels; larger things go by the disk
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}


@dataclass(frozen=True, slots=True)
class Cluster:
    """One that this process is connected to."""

    address: str
    folder: Path | None = None  # of a cluster of our own

    def hire(self, settings: Settings) -> list[Hand]:
        """The hands of all workers of a server."""
        import ray

        has = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        wanted = cards(settings.models[0].options, any(node.get("GPU") for node in has))
        count = settings.workers
        if count is None:
            count = max(int(sum(node.get("GPU", 0) for node in has)) // max(wanted, 1), 1)
        total = count * len(settings.models)
        own = int(asked) if (asked := os.environ.get(THREADS, "")).isdigit() else 0
        cpus = own or share([node.get("CPU", 0) for node in has], total)
        needs = Needs(1, wanted, own) if wanted else Needs(cpus, 0, cpus)
        places = [Post(elsewhere(served), number) for served in settings.models for number in range(1, count + 1)]
        return [RayHand(settings, post, needs) for post in places]

    def close(self) -> None:
        """Leave it; one of our own ends."""
        import ray

        ray.shutdown()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def join(address: str, cpus: int | None = None) -> Cluster:
    """Connect, or start a cluster of this machine (`local`, with so many CPUs; else all).

    Blocks for seconds, at most about fifteen where nobody answers. In the main thread: what it starts ends with that.
    Raises RequestError where Ray is not installed or no cluster is there.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if address == LOCAL:  # before Ray is imported, which reads them then
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # what Ray calls it: everything on loopback
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise RequestError('Ray is not installed: run pip install "lanting[scale]"') from None
    hush(ray)
    how: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
    if address == LOCAL:
        return start(ray, how, cpus)
    knock(address)
    try:
        ray.init(address=address, **how)
    except Exception as error:  # Ray's own, of which there are many
        raise refused(address, error) from None
    return Cluster(ray.get_runtime_context().gcs_address)


def hush(ray: Any) -> None:
    """It would print news of workers on stdout, where MCP speaks; our log has them."""
    with suppress(AttributeError):
        ray._private.worker._worker_logs_enabled = False


def start(ray: Any, how: Mapping[str, Any], cpus: int | None) -> Cluster:
    """A cluster of this machine, with a folder that nobody else can read."""
    from lanting.plan.machine import usable_cores

    short = Path("/tmp")  # names of sockets have 107 characters at most
    folder = fresh_folder("ray", short if short.is_dir() else None)
    try:
        ray.init(
            num_cpus=cpus or usable_cores(),
            include_dashboard=False,
            object_store_memory=STORE,
            _temp_dir=str(folder),
            **how,
        )
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise refused(LOCAL, error) from None
    return Cluster(ray.get_runtime_context().gcs_address, folder)


def knock(address: str) -> None:
    """Whether a cluster is there, asked for by a process that can be ended: Ray itself tries for over a minute. Raises
    RequestError."""
    if address != AUTO:
        host, _, port = address.rpartition(":")
        if "://" in address or not host or not port.isdigit():
            raise RequestError("--ray takes auto, local, or HOST:PORT of a cluster, not {value}", value=repr(address))
        try:
            socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()
        except (OSError, OverflowError):
            raise nobody(address) from None
    command = (sys.executable, "-m", "ray.scripts.scripts", "health-check", "--skip-version-check")
    words = () if address == AUTO else ("--address", address)
    try:
        done = subprocess.run([*command, *words], capture_output=True, timeout=ANSWER, check=False)
    except subprocess.TimeoutExpired:
        raise nobody(address) from None
    if done.returncode:
        if b"uthentication" in done.stderr + done.stdout:
            raise RequestError(
                "the Ray cluster at {address} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
                address=address,
            )
        raise nobody(address)


def nobody(address: str) -> RequestError:
    return RequestError(
        "no Ray cluster answers at {address}: start one with 'ray start --head', or let --ray local do it",
        address=address,
    )


def refused(address: str, error: Exception) -> RequestError:
    return RequestError(
        "Ray can't be used ({address}): {reason}; the server's own machine must be one of the cluster's",
        **{"address": address, "reason": reason_of(error)},
    )


# -------------------------------------------------------------------- what a worker takes
def cards(options: Mapping[str, Any], there: bool) -> int:
    """How many GPUs: as many as `--device` lists; without it one, where the cluster has any."""
    device = str(options.get("device") or ("cuda" if there else "cpu"))
    return sum(name.strip().startswith("cuda") for name in device.split(","))


def share(cpus: Sequence[float], workers: int) -> int:
    """How many CPUs each of so many workers gets, if all find room on machines with so many; one where they don't."""
    for each in range(int(max(cpus, default=1)), 1, -1):
        if sum(int(one // each) for one in cpus) >= workers:
            return each
    return 1


def elsewhere(served: Served) -> Served:
    """As other machines understand it: paths in full, and GPUs by their numbers among those that Ray gives a worker."""
    options = dict(served.options)
    if (count := cards(options, False)) > 0:
        options["device"] = "cuda" if count == 1 else ",".join(f"cuda:{index}" for index in range(count))
    path = Path(served.model).expanduser()
    named = served.model == "nano" or served.model in spec_names() or not path.exists()
    return replace(served, model=served.model if named else str(path.resolve()), options=options)
