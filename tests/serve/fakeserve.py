"""An engine for workers that draws nothing, quickly, and misbehaves where the prompt says so; and servers over it.

Words in a prompt: `boom` raises an error nobody foresaw, `sorry` one that explains itself, `die` ends the process,
`hang` sleeps in a step, `slow` takes 50 ms a step, `apart` is a drawing that can't share its third step, `shy` words
are not rewritten. Pictures read OPEN where their seed is a multiple of four, else OPEM. Everything it finishes is
written to a journal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from nursery import Born, nurse
from PIL import Image

from lanting.core.checkpoint import Checkpoint
from lanting.core.errors import RequestError
from lanting.core.recipe import describe_request, request_of_picture
from lanting.core.types import Notice, Progress, Recipe, Request, Result, note
from lanting.specs import get_spec, settle

if TYPE_CHECKING:
    import httpx  # workers need no client, and it takes as long to load as all that they need

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VERSIONS = {"lanting": "0.1.0", "torch": "0", "python": "3", "device": "fake", "dtype": "float32"}


def without_torch() -> None:
    """Let files of the engine's room be imported alone: the room itself brings torch, which takes seconds to load."""
    if "lanting.engine" not in sys.modules:
        room = ModuleType("lanting.engine")
        room.__path__ = [str(ROOT / "src" / "lanting" / "engine")]
        sys.modules["lanting.engine"] = room


@dataclass
class FakeEngine:
    """The engine's contract as a worker uses it."""

    spec: Any
    loras: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()
    pace: float = 0.002  # seconds a step
    journal: Path | None = None
    strengths: tuple[float, ...] = field(default=())
    places: int = 1  # drawings that share steps
    reads: bool = True

    def room(self, request: Request, most: int | None = None) -> int:
        return min(self.places, most or self.places) if settle(request, self.spec).task == "text_to_image" else 1

    def together(self, forced: bool = False) -> FakeTogether:
        return FakeTogether(self)

    def set_strengths(self, *strengths: float) -> None:
        self.strengths = strengths

    def stream_resumable(
        self, request: Request, previews: bool = False, *, every: int = 4, resume: Checkpoint | None = None
    ) -> Iterator[Progress | Checkpoint | Result]:
        settled = settle(request, self.spec)
        if settled.tries is None:
            return self._draw(settled, every, resume)

        without_torch()
        from lanting.engine.tries import until_read

        def draw(one: Request, first: bool) -> Iterator[Any]:
            return self._draw(one, every, resume if first else None)

        return until_read(settled, draw, lambda image: ["OPEN" if image.getpixel((0, 0))[0] % 4 == 0 else "OPEM"])

    def _draw(self, request: Request, every: int, resume: Checkpoint | None) -> Iterator[Any]:
        words, steps = str(request.prompt), request.steps or 1
        mark = json.dumps([words, request.seed])
        if resume is not None and resume.mark != mark:
            raise RequestError("the checkpoint belongs to another drawing: start this one anew")
        done = resume.step if resume else 0
        request, notices = self._rewritten(request)
        yield replace(Progress("encode", 1, 1, 0.001), notices=notices)
        for step in range(done + 1, steps + 1):
            time.sleep(0.05 if "slow" in words else 30 if "hang" in words and step == 2 else self.pace)
            self._misbehave(words, step)
            yield Progress("denoise", step, steps, 0.01 * step, Image.new("RGB", (8, 4), (step % 256, 0, 0)))
            if every and (step - done) % every == 0 and step < steps:
                yield Checkpoint(step, steps, mark, "float32", (1, 1, 1), b"0000")
        yield self._result(request)

    def _rewritten(self, request: Request) -> tuple[Request, tuple[Notice, ...]]:
        words = str(request.prompt)
        if not request.rewrite:
            return request, ()
        if "shy" in words:
            stays = replace(request, rewrite=False, asked=words, unwritten="it is shy")
            return stays, (note("{prompt} stays: {reason}", prompt=words, reason="it is shy"),)
        return replace(request, rewrite=False, asked=words, prompt=f"{words}, in detail"), ()

    def _misbehave(self, words: str, step: int) -> None:
        if "boom" in words:
            raise RuntimeError("secret words of a library: /etc/passwd")
        if "sorry" in words:
            raise RequestError("the prompt can't be drawn: say it differently")
        if "die" in words and step == 3:
            os._exit(9)

    def _result(self, request: Request) -> Result:
        width, height = request.size or (16, 16)
        images, recipes = [], []
        for index in range(request.count):
            one = request_of_picture(request, index)
            loras = tuple(
                {"name": f"{lora.name}", "sha256": "0", "path": lora.name, "strength": strength}
                for lora, strength in zip(self.loras, self.strengths or (1.0,) * len(self.loras), strict=True)
            )
            recipes.append(Recipe(describe_request(one), self.spec.name, "feed", str(request.task), VERSIONS, loras))
            images.append(Image.new("RGB", (width, height), ((one.seed or 0) % 256, 10, len(request.images))))
        if self.journal is not None:
            with self.journal.open("a") as file:
                file.write(json.dumps([request.prompt, request.seed]) + "\n")
        return Result(tuple(images), tuple(recipes), {"encode": 0.001, "denoise": 0.01 * (request.steps or 1)})


@dataclass(eq=False)
class FakeSeat:
    request: Request
    events: Any
    step: int
    work: float = 0.01

    @property
    def words(self) -> str:
        return str(self.request.prompt)


class FakeTogether:
    """A step of everybody in turn."""

    def __init__(self, engine: FakeEngine):
        self.engine, self.apart = engine, ""
        self.seats: list[FakeSeat] = []

    def join(self, request: Request, previews: bool, every: int, resume: Checkpoint | None) -> FakeSeat:
        events = self.engine.stream_resumable(request, previews, every=1, resume=resume)
        self.seats.append(FakeSeat(settle(request, self.engine.spec), events, resume.step if resume else 0))
        return self.seats[-1]

    def round(self) -> Iterator[tuple[FakeSeat, Any]]:
        if any("apart" in seat.words and seat.step == 2 for seat in self.seats):
            self.apart = "a step can't be shared"
            return
        for seat in list(self.seats):
            for event in self._step(seat):
                if isinstance(event, Result | Exception):
                    self.leave(seat)
                yield seat, event
                if seat not in self.seats or (isinstance(event, Progress) and event.phase == "denoise"):
                    break

    def _step(self, seat: FakeSeat) -> Iterator[Any]:
        try:
            for event in seat.events:
                if isinstance(event, Progress):
                    seat.step = event.step if event.phase == "denoise" else seat.step
                yield event
        except Exception as error:
            yield error

    def leave(self, seat: FakeSeat) -> None:
        if seat in self.seats:
            self.seats.remove(seat)

    def put_aside(self, seat: FakeSeat) -> Checkpoint | None:
        mark = json.dumps([seat.words, seat.request.seed])
        return (
            Checkpoint(seat.step, seat.request.steps or 1, mark, "float32", (1, 1, 1), b"0000") if seat.step else None
        )

    def close(self) -> None:
        self.seats.clear()


def open_engine(model: str, **options: Any) -> FakeEngine:
    if model == "broken":
        raise RequestError("the model is broken: get another")
    loras = tuple(
        SimpleNamespace(name=f"{name}.safetensors", path=Path(f"{name}.safetensors"), strength=1.0)
        for name in options.get("loras", ())
    )
    journal = Path(options["journal"]) if options.get("journal") else None
    how = {"pace": options.get("pace", 0.002), "places": options.get("places", 1), "reads": options.get("reads", True)}
    return FakeEngine(get_spec(options.get("release", "nano")), loras, journal=journal, **how)


def client_of() -> httpx.Client:
    import httpx

    return httpx.Client(timeout=30)


@dataclass
class Server:
    """A server in a process of its own."""

    process: Born | subprocess.Popen[str]
    url: str
    folder: Path
    log: Path
    client: httpx.Client = field(default_factory=client_of)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str, **how: Any) -> httpx.Response:
        return self.client.get(self.url + path, **how)

    def post(self, path: str, body: Any = None, **how: Any) -> httpx.Response:
        return self.client.post(self.url + path, **({"json": body} if body is not None else {}), **how)

    def submit(self, prompt: str = "a sign", **more: Any) -> dict[str, Any]:
        headers = more.pop("headers", {})
        answer = self.post("/api/jobs", {"prompt": prompt, **more}, headers=headers)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def ended(self, job: str, seconds: float = 20, **how: Any) -> dict[str, Any]:
        """The job when it is over."""
        return wait_for(lambda: over(self.get(f"/api/jobs/{job}", **how).json()), seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


SOON = 4  # steps that may still be told: the one that is drawn, and those on their way when the answer was


def steps_after_cancelling(server: Server, job: str) -> int:
    """Cancel a job that is drawn: how many steps it was told to have done after that was answered. Steps are counted,
    since seconds say how busy the machine is; an event's number is the time it was told at."""
    server.post(f"/api/jobs/{job}/cancel")
    answered = time.time() * 1000
    assert server.ended(job)["state"] == "cancelled"
    return sum(kind == "step" and number > answered for kind, number, _ in events(server, job))


def over(job: dict[str, Any]) -> dict[str, Any] | None:
    return job if job["state"] in ("done", "failed", "cancelled") else None


def wait_for(look: Any, seconds: float = 10, pause: float = 0.02) -> Any:
    """What `look` returns when that is something."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := look():
            return found
        time.sleep(pause)
    raise AssertionError(f"nothing after {seconds} s")


def start(folder: Path, *, anew: bool = False, **settings: Any) -> Server:
    """A server over fake engines; `settings` as in `Settings`, plain values. `anew`: as from the shell, not forked."""
    folder.mkdir(parents=True, exist_ok=True)
    log, said = folder / "server.log", folder / "server.port"
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{HERE}", "OMP_NUM_THREADS": "1", "LANTING_LANG": "en"}
    words = json.dumps({"data": str(folder / "data"), "port": 0, **settings})
    log.touch()
    said.write_text("")
    if anew or "ray" in settings:
        with log.open("a") as errors, said.open("w") as out:
            command = [sys.executable, str(HERE / "serving.py"), words]
            process = subprocess.Popen(command, stdout=out, stderr=errors, text=True, env=env)
    else:
        process = nurse().bear(words, env, said, log)
    port = wait_for(lambda: told_in(said, process), 300, 0.005)
    assert port.isdigit(), log.read_text()
    server = Server(process, f"http://127.0.0.1:{port}", folder, log)
    wait_for(lambda: alive(server), 20)
    return server


def told_in(said: Path, process: Born | subprocess.Popen[str]) -> str | None:
    """The port, when it is there; a word that is none where the server ended before."""
    text = said.read_text()
    if text.endswith("\n"):
        return text.strip()
    try:
        process.wait(0)
    except subprocess.TimeoutExpired:
        return None
    return said.read_text().strip() or "nothing"


def alive(server: Server) -> bool:
    import httpx

    try:
        return server.get("/readyz").status_code in (200, 503)
    except httpx.HTTPError:
        return False


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Server]:
    server = start(folder, **settings)
    try:
        yield server
    finally:
        server.kill()


def events(server: Server, job: str, **how: Any) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(kind, number, body) of a job's events, until it is over."""
    import httpx

    with httpx.stream("GET", f"{server.url}/api/jobs/{job}/events", timeout=30, **how) as answer:
        kind, number = "", 0
        with closing(answer.iter_lines()) as lines:
            for line in lines:
                if line.startswith("event: "):
                    kind = line[7:]
                elif line.startswith("id: "):
                    number = int(line[4:])
                elif line.startswith("data: "):
                    yield kind, number, json.loads(line[6:])
