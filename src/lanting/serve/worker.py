"""The process that draws: one engine, JSON lines in and out. One job at a time, or several that share their steps
(`serve.crew`).

A process of its own, so that drawing never delays an answer, a crash in native code or a lack of memory ends one job's
run and not the server, and a step that hangs can be killed. When the pipe to the server closes, because it was killed,
the worker leaves at once: two workers never draw the same queue.

in   {"do": "draw", "job", "request", "lora", "pictures", "mask", "checkpoint", "results", "most"},
     {"do": "stop", "job", "why"}
out  {"is": "ready" | "room" | "progress" | "checkpoint" | "resumed" | "done" | "failed" | "stopped", "job", ...}
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lanting.core.checkpoint import Checkpoint
from lanting.core.errors import LantingError, OutputError, RequestError
from lanting.core.files import replace_file
from lanting.core.lang import explain
from lanting.core.pictures import open_mask, open_picture
from lanting.core.processes import own_pipes
from lanting.core.recipe import restore_request
from lanting.core.types import Progress, Request, Result
from lanting.serve.errors import words_of
from lanting.serve.files import publish
from lanting.serve.logs import write_to_stderr
from lanting.serve.loras import check_names

if TYPE_CHECKING:
    from PIL.Image import Image

    from lanting.engine import Engine

QUALITY = 80  # of previews, as JPEG
SIGHT = 0.25  # seconds between previews: nobody sees more, and small pictures take a dozen steps in that time
logger = logging.getLogger("lanting.serve")


def open_engine(model: str, **options: Any) -> Engine:
    """The real thing. Without budgets a model is planned for the memory that is free now, as drawing verbs do; nano
    fits everywhere."""
    from lanting.engine import Engine
    from lanting.plan import detect

    if model != "nano" and not {"vram", "ram"} & set(options) and (free := detect().ram_free):
        options = {**options, "ram": free}
    return Engine.open(model, **options)


@dataclass
class Bench:
    """What the worker holds: the engine, the way out, and which jobs are to be stopped."""

    engine: Any
    say: Callable[[str], object]  # a line to the server
    every: int
    keeps: bool = True  # results stay where they are written
    names: tuple[str, ...] = ()  # of the LoRAs that were asked for
    usual: tuple[float, ...] = ()  # their strengths where a request says nothing
    strengths: tuple[float, ...] = ()  # their strengths now
    stops: dict[str, str] = field(default_factory=dict[str, str])  # job -> why
    orders: queue.SimpleQueue[dict[str, Any]] = field(default_factory=queue.SimpleQueue)
    later: dict[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])  # job -> order, not begun

    def send(self, what: str, **values: Any) -> None:
        self.say(json.dumps({"is": what, **values}, ensure_ascii=False))

    def obey(self, order: dict[str, Any]) -> None:
        """From any thread, beside the drawing."""
        if order["do"] == "stop":
            self.stops[order["job"]] = order["why"]
        else:
            self.orders.put(order)

    def listen(self, orders: BinaryIO) -> None:
        """Read orders until the server is gone."""
        for line in orders:
            self.obey(json.loads(line))
        os._exit(0)  # the server is gone; what was being drawn is in its checkpoint

    def collect(self) -> None:
        """Orders that have come, to those that wait."""
        while not self.orders.empty():  # nobody else takes any
            order = self.orders.get()
            self.later[order["job"]] = order

    def next(self) -> Mapping[str, Any]:
        """The next order, waited for."""
        self.collect()
        return self.later.pop(next(iter(self.later))) if self.later else self.orders.get()

    def hang(self, wished: Mapping[str, float] | None) -> None:
        """The LoRAs of a job: those it names and no others, or the usual ones. Raises RequestError."""
        check_names(wished, self.names)
        new = self.usual if wished is None else tuple(float(wished.get(name, 0.0)) for name in self.names)
        if new != self.strengths:
            self.engine.set_strengths(*new)
            self.strengths = new


def main() -> None:
    """Serve one pipe. The first line says what to open."""
    orders, answers = own_pipes()
    write_to_stderr()  # it is the server's log
    opening = json.loads(orders.readline())
    out = io.TextIOWrapper(answers, encoding="utf-8", newline="\n")
    bench = Bench(None, lambda line: print(line, file=out, flush=True), opening["every"])
    threading.Thread(target=bench.listen, args=(orders,), daemon=True).start()
    work(bench, opening)


def work(bench: Bench, order: Mapping[str, Any]) -> None:
    """Open the engine, and draw what comes for ever; returns where the engine can't be opened, which is told."""
    module, _, name = order["opener"].partition(":")
    try:
        bench.engine = getattr(importlib.import_module(module), name)(order["model"], **order["options"])
        count = len(order["options"].get("loras", ()))
        asked = tuple(bench.engine.loras)[-count:] if count else ()
        bench.names = tuple(lora.path.stem for lora in asked)
        bench.usual = bench.strengths = tuple(float(lora.strength) for lora in asked)
    except LantingError as error:
        bench.send("refused", sentence=explain(error), words=words_of(error), code=error.exit_code)
        return
    loras = [{"name": name, "strength": strength} for name, strength in zip(bench.names, bench.usual, strict=True)]
    told = {"loras": loras, "notes": list(bench.engine.notes), "reads": bench.engine.reads}
    bench.send("ready", spec=asdict(bench.engine.spec), **told)
    while True:
        dismiss(bench)
        take(bench, bench.next())


def take(bench: Bench, order: Mapping[str, Any]) -> None:
    """Draw one job, or several where it may have company, and say how they ended."""
    if (room := room_for(bench, order)) > 1:
        from lanting.serve.crew import draw_together

        bench.send("room", job=order["job"], room=room)
        draw_together(bench, order, room)
    else:
        alone(bench, order)


def room_for(bench: Bench, order: Mapping[str, Any]) -> int:
    """How many jobs like this one may share their steps, itself counted."""
    if order["most"] == 1:
        return 1
    try:
        bench.hang(order["lora"])
        return bench.engine.room(request_of(order), order["most"])
    except Exception:  # whatever it is, it will be met and told when the job is drawn
        return 1


def alone(bench: Bench, order: Mapping[str, Any]) -> None:
    try:
        draw(bench, order)
    except Exception as error:
        fail(bench, order["job"], error)
    bench.stops.pop(order["job"], None)


def fail(bench: Bench, job: str, error: Exception) -> None:
    """In the error's own words where it has some for people."""
    if isinstance(error, LantingError):
        code = getattr(error, "exit_code", 1)
        told = {"sentence": explain(error), "words": words_of(error), "code": code, "kind": type(error).__name__}
        bench.send("failed", job=job, **told)
    else:
        trace = "".join(traceback.format_exception(error))
        told = {"sentence": None, "code": 1, "kind": type(error).__name__, "trace": trace}
        bench.send("failed", job=job, disk=isinstance(error, OSError), **told)


def draw(bench: Bench, order: Mapping[str, Any]) -> None:
    job, checkpoint = order["job"], Path(order["checkpoint"])
    bench.hang(order["lora"])
    request = request_of(order)
    resume = saved(checkpoint)
    try:
        ended = follow(bench, order, request, resume)
    except RequestError:
        if resume is None:
            raise
        checkpoint.unlink(missing_ok=True)  # of another version of the model: from the start, then
        ended = follow(bench, order, request, None)
    if ended is None:
        bench.send("stopped", job=job, why=bench.stops.get(job, ""))
        return
    finish(bench, order, ended)


def finish(bench: Bench, order: Mapping[str, Any], result: Result, **more: Any) -> None:
    outcome = published(result, Path(order["results"]), bench.keeps)
    Path(order["checkpoint"]).unlink(missing_ok=True)
    bench.send("done", job=order["job"], outcome=outcome, **more)


def published(result: Result, target: Path, wait: bool) -> dict[str, Any]:
    """Write the result; recipes say which LoRAs and ControlNet there were, not where this machine keeps them. A disk
    that can't be written is not explained to clients, since the explanation names its folders."""
    recipes = tuple(
        replace(
            one,
            loras=tuple({**lora, "path": lora["name"]} for lora in one.loras),
            controlnets=tuple({**net, "path": net["name"]} for net in one.controlnets),
        )
        for one in result.recipes
    )
    try:
        return publish(replace(result, recipes=recipes), target, wait)
    except OutputError as error:
        raise OSError(str(error)) from error


def follow(bench: Bench, order: Mapping[str, Any], request: Request, resume: Checkpoint | None) -> Result | None:
    """Run the engine, report and save on the way; None where the job was stopped."""
    job = order["job"]
    stream = bench.engine.stream_resumable(request, previews=now_and_then(), every=bench.every, resume=resume)
    with closing(stream) as events:
        for event in events:
            if resume is not None:  # it was taken: the engine refuses it before its first word
                bench.send("resumed", job=job, step=resume.step, steps=resume.steps)
                resume = None
            if isinstance(event, Result):
                return event
            if stopped(bench, order, event):
                return None
            dismiss(bench)
    raise RuntimeError("the engine ended without a result")


def now_and_then(seconds: float = SIGHT) -> Callable[[], bool]:
    """Whether it is time for a preview: when so many seconds have passed since the last one, or since now."""
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last < seconds:
            return False
        last = now
        return True

    return due


def stopped(bench: Bench, order: Mapping[str, Any], event: Progress | Checkpoint) -> bool:
    """Whether the job is to stop here; else the event is told or saved."""
    job = order["job"]
    # a pause waits for the next checkpoint, so that no step is lost
    stops = job in bench.stops and not (bench.stops[job] == "pause" and isinstance(event, Progress))
    if isinstance(event, Checkpoint):
        save(bench, job, Path(order["checkpoint"]), event)
    elif not stops:
        tell(bench, job, event)
    return stops


def dismiss(bench: Bench) -> None:
    """Jobs that wait for their turn stop at once."""
    bench.collect()
    for job in [job for job in bench.later if job in bench.stops]:
        del bench.later[job]
        bench.send("stopped", job=job, why=bench.stops.pop(job))


def tell(bench: Bench, job: str, event: Progress) -> None:
    told: dict[str, Any] = {
        "phase": event.phase,
        "step": event.step,
        "steps": event.steps,
        "seconds": round(event.seconds, 4),
    }
    if event.notices:
        told["notices"] = [words_of(LantingError(one.sentence, **one.values)) for one in event.notices]
    bench.send("progress", job=job, **told, preview=None if event.preview is None else small(event.preview))


def save(bench: Bench, job: str, path: Path, checkpoint: Checkpoint) -> None:
    """A disk that is full must not end a drawing that goes well."""
    try:
        replace_file(path, lambda part: part.write_bytes(checkpoint.to_bytes()))
    except OSError as error:
        logger.warning("no checkpoint could be written", extra={"job": job, "reason": str(error)})
        return
    bench.send("checkpoint", job=job, step=checkpoint.step, steps=checkpoint.steps)


def saved(path: Path) -> Checkpoint | None:
    """What an interrupted run left, if it can be read."""
    try:
        return Checkpoint.from_bytes(path.read_bytes())
    except (OSError, RequestError):
        return None


def request_of(order: Mapping[str, Any]) -> Request:
    """The request, its pictures opened."""
    pictures = [open_picture(Path(path).read_bytes()) for path in order["pictures"]]
    mask = None if order["mask"] is None else open_mask(Path(order["mask"]).read_bytes())
    return restore_request(order["request"], pictures, mask)


def small(image: Image) -> str:
    """A preview as base64 JPEG."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main()
