"""Workers in a Ray cluster: the same pictures, nothing lost, and room that is waited for. One cluster for all tests,
that of the first server; the second joins it by its address."""

from __future__ import annotations

import base64
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fakeserve import SOON, Server, events, running, start, steps_after_cancelling, wait_for
from PIL import Image
from test_batch import begun
from test_faults import ends_of, jobs_in
from test_workers import crew, running_now

from lanting import RequestError
from lanting.cli.main import main
from lanting.cluster import join as joining
from lanting.cluster.hand import check_version, reason_of, refusal
from lanting.cluster.join import cards, elsewhere, share
from lanting.cluster.outpost import budgeted, part_of
from lanting.cluster.parcels import fresh_folder, packed, reported, unpacked
from lanting.plan import Machine
from lanting.serve.errors import ClusterError
from lanting.serve.files import OUTCOME, adopt
from lanting.serve.settings import Served

NANO = {"opener": "lanting.serve.worker:open_engine", "options": {"device": "cpu"}, "every": 1}
STARTING = 180  # seconds that Ray may take: ten, or a minute and more beside other work
RAY = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def outposts(own: Server) -> set[int]:
    """Processes of workers in the cluster that a server started, of all servers."""
    found = set()
    for process in family(own.process.pid):
        with suppress(OSError):
            if Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::Outpost"):
                found.add(process)
    return found


def family(process: int) -> list[int]:
    """A process and all below it."""
    found = [process]
    for one in found:
        with suppress(OSError):
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found


def picture(server: Server, job: dict) -> Image.Image:
    return Image.open(io.BytesIO(server.get(job["images"][0]["url"]).content))


@pytest.fixture(scope="module")
def beside(tmp_path_factory) -> Iterator[Future[Server]]:
    """nano with a worker on this machine, being started."""
    with ThreadPoolExecutor() as pool:
        found = pool.submit(start, tmp_path_factory.mktemp("beside"), **NANO)
        yield found
        found.result().kill()


@pytest.fixture(scope="module")
def nano(beside, tmp_path_factory) -> Iterator[Server]:
    """One CPU of four for nano, in a cluster of its own. It ends with the server, and nothing is left."""
    before = {name: os.environ.get(name) for name in (*RAY, "RAY_AUTH_TOKEN")}
    os.environ.update(RAY, RAY_AUTH_TOKEN=secrets.token_hex(32))
    server = start(tmp_path_factory.mktemp("nano"), ray="local", cpus=4, workers=1, **NANO)
    try:
        wait_for(lambda: crew(server)["ready"] == 1, STARTING)
        yield server
    finally:
        everyone = family(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(30)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    assert code == 0
    wait_for(lambda: not [one for one in everyone if Path(f"/proc/{one}/exe").exists()], 15, 0.1)


@pytest.fixture(scope="module")
def first(nano) -> set[int]:
    """The process of nano's worker."""
    return outposts(nano)


@pytest.fixture(scope="module")
def address(nano) -> str:
    return json.loads(next(line for line in nano.log.read_text().splitlines() if "cluster" in line))["cluster"]


@pytest.fixture(scope="module")
def other(address) -> Iterator[subprocess.Popen[bytes]]:
    """Somebody else's work, which has another CPU until its stdin is closed."""
    words = "import ray, sys; from ray.util.placement_group import placement_group as room; "
    words += (
        f"ray.init(address={address!r}); ray.get(room([{{'CPU': 1}}]).ready()); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", words], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL) as process:
        yield process


@pytest.fixture(scope="module")
def three(other, address, first, tmp_path_factory) -> Iterator[Server]:
    """Three workers that draw nothing, where there is room for two."""
    assert other.stdout is not None and other.stdout.readline()
    with running(tmp_path_factory.mktemp("three"), ray=address, workers=3, every=1, drain=0.2) as server:
        wait_for(lambda: crew(server)["ready"] == 2, STARTING)
        yield server


# -------------------------------------------------------------------- what is drawn
def test_pictures_are_those_of_a_worker_beside_the_server(nano, beside):
    """Words, and an edit whose picture and mask travel."""
    asked = [{"prompt": 'a red sign that says "STAY"', "seed": 3, "count": 2}]
    mask = Image.new("L", (224, 96), 0)
    mask.paste(255, (0, 0, 112, 96))
    sent = [Image.new("RGB", (224, 96), (20, 60, 200)), mask]
    data = []
    for image in sent:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data.append(base64.b64encode(buffer.getvalue()).decode())
    asked.append({"prompt": "a yellow sign", "seed": 4, "images": data[:1], "mask": data[1]})
    servers = (beside.result(), nano)
    for one in asked:
        here, there = (server.ended(server.submit(**one)["id"], 60) for server in servers)
        assert here["state"] == there["state"] == "done", there
        assert here["recipes"] == there["recipes"]
        for images in zip(here["images"], there["images"], strict=True):
            bits = [np.asarray(picture(s, {"images": [one]})) for s, one in zip(servers, images, strict=True)]
            assert np.array_equal(*bits)
    assert there["recipes"][0]["task"] == "edit_inpaint"
    assert not list((nano.folder / "data" / "checkpoints").iterdir())


def test_previews_and_steps_come_as_they_do_from_beside(nano):
    job = nano.submit("a sign", steps=10, size="192x192")["id"]
    told = list(events(nano, job))
    assert [body["step"] for kind, _, body in told if kind == "step"] == list(range(1, 11))
    kinds = [kind for kind, _, _ in told]
    assert kinds.count("checkpoint") == 9 and kinds[-1] == "done"


# -------------------------------------------------------------------- room
def test_what_finds_no_room_waits_and_holds_nobody_up(three):
    wait_for(lambda: crew(three).get("waiting for the cluster") == 1)
    assert crew(three) == {"count": 3, "ready": 2, "waiting for the cluster": 1}
    told = three.get("/readyz")
    assert told.status_code == 200 and told.json()["workers"]["nano"]["ready"] == 2
    assert "lanting_workers_waiting 1.0" in three.get("/metrics").text
    assert "error" not in three.get("/api/models").json()["models"][0]
    lines = [json.loads(line) for line in three.log.read_text().splitlines() if "waits for the cluster" in line]
    assert lines[0]["level"] == "info" and lines[0]["needs"] == {"CPU": 1.0}
    jobs = [three.submit("a sign", steps=4)["id"] for _ in range(6)]
    assert {three.ended(job)["state"] for job in jobs} == {"done"}


def test_cancelling_reaches_the_worker_within_a_step(three):
    jobs = [three.submit("slow", steps=60)["id"] for _ in range(2)]
    wait_for(lambda: all(begun(three, job) for job in jobs))
    assert steps_after_cancelling(three, jobs[0]) <= SOON
    assert three.get(f"/api/jobs/{jobs[1]}").json()["state"] == "running"
    three.post(f"/api/jobs/{jobs[1]}/cancel")
    assert three.ended(jobs[1])["state"] == "cancelled"


def test_errors_are_told_as_ever(three):
    told = three.ended(three.submit("sorry")["id"])["error"]
    assert told == {"code": "invalid_request", "message": "the prompt can't be drawn: say it differently"}
    told = three.ended(three.submit("boom")["id"])["error"]
    assert told["code"] == "drawing_failed" and "passwd" not in told["message"]
    assert "/etc/passwd" in three.log.read_text()


# -------------------------------------------------------------------- deaths
def test_the_jobs_of_killed_workers_go_on_from_their_checkpoints(nano, first, three):
    jobs = [three.submit("slow", steps=30, seed=seed)["id"] for seed in range(2)]
    wait_for(lambda: all(begun(three, job, 5) for job in jobs))
    assert len(outposts(nano)) == 3
    for one in outposts(nano) - first:
        os.kill(one, signal.SIGKILL)
    for job in jobs:
        told = list(events(three, job))
        kinds = [kind for kind, _, _ in told]
        assert kinds.count("interrupted") == kinds.count("resumed") == kinds.count("done") == 1
        assert next(body["step"] for kind, _, body in told if kind == "resumed") >= 4
    done = three.get(f"/api/jobs/{jobs[1]}").json()
    assert picture(three, done).getpixel((0, 0)) == (1, 10, 0)


def test_a_job_that_kills_its_workers_is_reported_and_others_are_drawn(three):
    bad, good = three.submit("die", steps=6)["id"], three.submit("slow", steps=4)["id"]
    told = three.ended(bad, 40)
    assert told["state"] == "failed" and "3 times" in told["error"]["message"]
    assert three.ended(good)["state"] == "done"


def test_room_that_comes_is_used(other, three):
    assert crew(three)["waiting for the cluster"] == 1
    other.stdin.close()  # type: ignore[union-attr]
    wait_for(lambda: crew(three) == {"count": 3, "ready": 3}, STARTING)
    jobs = [three.submit("slow", steps=16)["id"] for _ in range(3)]
    wait_for(lambda: sorted(running_now(three, jobs)) == [1, 2, 3])
    assert {three.ended(job)["state"] for job in jobs} == {"done"}


def test_stopping_puts_aside_and_gives_room_back(nano, first, three):
    """What is drawn comes home as a checkpoint. It is the second server's last test."""
    job = three.submit("slow", steps=100)["id"]
    wait_for(lambda: begun(three, job, 3))
    began = time.monotonic()
    three.process.send_signal(signal.SIGTERM)
    assert three.process.wait(30) == 0 and time.monotonic() - began < 15
    states = jobs_in(three.folder)
    assert states[job] == "waiting" and set(states.values()) <= {"waiting", "done", "failed", "cancelled"}
    assert set(ends_of(three.folder).values()) == {1}
    assert (three.folder / "data" / "checkpoints" / job).is_file()
    wait_for(lambda: outposts(nano) == first, 10)


# -------------------------------------------------------------------- who may come
def test_a_cluster_of_our_own_is_on_loopback_alone(nano):
    """Every port that the server or a process below it listens on."""
    own, ports = set(), []
    for process in family(nano.process.pid):
        for file in Path(f"/proc/{process}/fd").glob("*"):
            with suppress(OSError):
                own.add(os.readlink(file))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in own:
                ports.append(words[1].partition(":")[0])
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert len(ports) > 4 and set(ports) <= loopback


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:10001", "here", "192.0.2.1:x"])
def test_no_cluster_is_told_at_once(tmp_path, capsys, monkeypatch, address):
    monkeypatch.setenv("LANTING_LANG", "en")
    began = time.monotonic()
    assert main(["serve", "--port", "0", "--data", str(tmp_path), "--ray", address]) == 2
    told = capsys.readouterr().err
    assert ("no Ray cluster answers at 127.0.0.1:1" in told) or "--ray takes auto, local, or HOST:PORT" in told
    assert time.monotonic() - began < 5


def test_something_else_that_answers_is_no_cluster(monkeypatch):
    import socket

    monkeypatch.setattr(joining, "ANSWER", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(RequestError, match="no Ray cluster answers"):
        joining.knock(f"127.0.0.1:{other.getsockname()[1]}")


def test_ray_may_be_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LANTING_LANG", "en")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "--port", "0", "--data", str(tmp_path), "--ray", "auto"]) == 2
    assert 'pip install "lanting[scale]"' in capsys.readouterr().err


# -------------------------------------------------------------------- arithmetic and parcels
def test_what_a_worker_takes():
    assert [share(cpus, n) for cpus, n in (([8], 1), ([8], 3), ([8, 8], 2), ([8, 4], 2), ([2], 5), ([], 1))] == [
        *(8, 2, 8, 4, 1, 1)
    ]
    assert [cards({"device": d}, True) for d in (None, "cpu", "cuda", "cuda:3", "cuda:0,cuda:1")] == [1, 0, 1, 1, 2]
    assert cards({}, False) == 0


def test_a_worker_plans_for_its_part_of_a_machine(monkeypatch):
    has = {"CPU": 64.0, "GPU": 8.0}
    assert [part_of(takes, has) for takes in ({"CPU": 16.0}, {"CPU": 1.0, "GPU": 2.0}, {"CPU": 64.0})] == [
        0.25,
        0.25,
        1,
    ]
    assert part_of({"CPU": 4.0}, {}) == 1
    monkeypatch.setattr("lanting.plan.detect", lambda: Machine(1000, 800, 4, ()))
    assert budgeted("m", {"device": "cpu"}, 0.5) == {"device": "cpu", "ram": 450}
    assert budgeted("m", {}, 0.95)["ram"] == 800  # no more than is free
    for model, options, part in (
        ("m", {}, 1),
        ("nano", {}, 0.5),
        ("m", {"ram": "9G"}, 0.5),
        ("m", {"vram": "9G"}, 0.5),
    ):
        assert budgeted(model, options, part) == options


def test_models_and_devices_as_other_machines_know_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    (tmp_path / "mine").mkdir()
    assert elsewhere(Served("nano", "nano")).model == "nano"
    assert elsewhere(Served("mine", "mine", {"device": "cuda:3"})) == Served(
        "mine", str(tmp_path / "mine"), {"device": "cuda"}
    )
    assert elsewhere(Served("x", "/there", {"device": "cuda:2,cuda:5"})) == Served(
        "x", "/there", {"device": "cuda:0,cuda:1"}
    )


def test_orders_and_results_travel_whole(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    for name in ("a.png", "m.png", "point"):
        (here / name).write_bytes(name.encode())
    order = {"do": "draw", "job": "0" * 24, "request": {"prompt": "茶"}, "pictures": [str(here / "a.png")]}
    order |= {"mask": str(here / "m.png"), "checkpoint": str(here / "point"), "results": "/data/results/0"}
    told = unpacked(packed(order), there)
    own = there / ("0" * 24)
    assert Path(told["pictures"][0]).read_bytes() == b"a.png" and Path(told["mask"]).read_bytes() == b"m.png"
    assert Path(told["checkpoint"]).read_bytes() == b"point" and told["results"] == str(own / "results")
    assert told["request"] == order["request"] and "/data" not in packed(order)[0] and str(here) not in packed(order)[0]
    plain = unpacked(packed({**order, "mask": None, "checkpoint": "/nothing", "job": "1"}), there)
    assert plain["mask"] is None and not Path(plain["checkpoint"]).exists()
    (own / "results").mkdir()
    (own / "results" / "0.png").write_bytes(b"picture")
    line, blobs = reported(json.dumps({"is": "done", "job": "0" * 24}), there)
    assert blobs == {"0.png": b"picture"} and json.loads(line)["is"] == "done" and not own.exists()


def test_results_are_taken_whole_or_not(tmp_path):
    outcome = json.dumps({"images": [{}, {}]}).encode()
    files = {OUTCOME: outcome, "0.png": b"a", "1.png": b"b"}
    for wrong in ({}, {"0.png": b"a"}, {OUTCOME: outcome, "0.png": b"a"}, {**files, "../2.png": b"c"}):
        with pytest.raises(ValueError, match="not whole"):
            adopt(wrong, tmp_path / "job")
    assert not list(tmp_path.iterdir())
    adopt(files, tmp_path / "job")
    adopt({**files, "0.png": b"later"}, tmp_path / "job")  # drawn twice: the first stays
    assert {path.name: path.read_bytes() for path in (tmp_path / "job").iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_what_killed_processes_left_is_dropped(tmp_path):
    names = [
        "lanting-worker-999999999-x",
        f"lanting-worker-{os.getpid()}-x",
        "lanting-worker-x",
        "lanting-ray-999999999-x",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    fresh = fresh_folder("worker", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:], fresh.name}


def test_why_a_worker_can_not_be_started():
    with pytest.raises(ClusterError, match="b has lanting 9 and the server"):
        check_version({"host": "b", "version": "9"})
    told = reason_of(RuntimeError("The actor failed\n  File x\nModuleNotFoundError: No module named 'lanting'\n"))
    assert told == "ModuleNotFoundError: No module named 'lanting'"
    assert "need lanting" in refusal(RuntimeError("x"))["sentence"] and reason_of(RuntimeError()) == "RuntimeError"
