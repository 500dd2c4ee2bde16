"""What every dialect does the same way: who asks, waiting for a job, streams that end when the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, StreamingResponse

from lanting.core.errors import LantingError
from lanting.serve.errors import Answer, ClosedError, DrawingError, MissingError, answer_to
from lanting.serve.house import House
from lanting.serve.jobs import DONE, FAILED, LOCAL, Caller, Event, Job

T = TypeVar("T")
PULSE = 10.0  # seconds of silence after which a stream says that it lives
STATUS = {"invalid_request": 400, "cancelled": 409, "timeout": 504}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}  # for /openapi.json
SSE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second: nginx must not hold it back


def caller_of(request: HttpRequest) -> Caller:
    """Whom the guard let in."""
    return request.scope.get("state", {}).get("caller") or LOCAL


def once_of(request: HttpRequest) -> str | None:
    return request.headers.get("idempotency-key")


async def finished(house: House, request: HttpRequest, job: Job) -> Job:
    """The job when it is done; cancelled where its client leaves, unless it can come back with its idempotency key.

    Raises DrawingError where there is no picture, ClosedError where the server stops first.
    """
    caller = caller_of(request)
    end = asyncio.create_task(house.desk.wait(job.id, caller))
    gone = asyncio.create_task(left(request))
    try:
        await asyncio.wait({end, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not end.done():
            await abandon(house, job, caller, once_of(request))
            raise ClosedError("the client has left")
        return with_picture(end.result())
    finally:
        for task in (end, gone):
            task.cancel()


async def left(request: HttpRequest) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def abandon(house: House, job: Job, caller: Caller, once: str | None) -> None:
    """Nobody waits for this job any more."""
    if once is None:
        with suppress(LantingError):
            await house.desk.cancel(job.id, caller)


def with_picture(job: Job) -> Job:
    """The same job. Raises DrawingError where it ended without a picture, ClosedError where it has not ended."""
    if job.state == DONE:
        return job
    if not job.over:
        raise ClosedError("the server is stopping; the job goes on when it is back: ask for it again then")
    told: Mapping[str, Any] = job.error or {"code": "drawing_failed", "message": "?"}
    error = DrawingError(str(told["message"]))
    error.code = str(told["code"])
    error.status = STATUS.get(error.code, 500 if job.state == FAILED else 409)
    raise error


async def followed(house: House, request: HttpRequest, job: Job) -> AsyncGenerator[Event]:
    """The job's events for one stream; a client that leaves cancels the job as in `finished`."""
    caller, over = caller_of(request), False
    try:
        async with aclosing(house.desk.watch(job.id, caller)) as events:
            async for event in events:
                over = event.last
                yield event
        over = True
    finally:
        if not over:
            await asyncio.shield(abandon(house, job, caller, once_of(request)))


def result_path(house: House, job: Job, index: int) -> Path:
    """A finished picture's file. Raises MissingError."""
    count = len(job.outcome["images"]) if job.outcome else 0
    path = house.desk.files.result(job.id, index)
    if not 0 <= index < count or not path.is_file():
        raise MissingError("the job has no picture {index}", index=index)
    return path


def read_in(job: Job, index: int) -> dict[str, Any]:
    """What is read in a finished picture, where its words were read back."""
    assert job.outcome is not None
    text = job.outcome["images"][index].get("text")
    return {} if text is None else {"text": text}


def size_of(job: Job, house: House) -> tuple[int, int]:
    """(width, height) of what is being drawn, as far as it is known before it is done."""
    if job.outcome:
        width, height = job.outcome["images"][0]["size"]
        return width, height
    size = job.asked["request"]["size"]
    spec = house.desk.model(job.model).spec
    width, height = size or (spec.defaults.size if spec else (256, 256))
    return width, height


def event_stream(lines: AsyncIterator[str]) -> StreamingResponse:
    """Server-sent events, with a comment now and then so that nobody between cuts a quiet line."""
    return StreamingResponse(pulsed(lines, ": alive\n\n"), media_type="text/event-stream", headers=SSE)


async def pulsed(lines: AsyncIterator[str], pulse: str) -> AsyncIterator[str]:
    """The same, with `pulse` in long pauses."""
    coming: asyncio.Task[str] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(lines))  # type: ignore[arg-type]
            done, _ = await asyncio.wait({coming}, timeout=PULSE)
            if not done:
                yield pulse
                continue
            try:
                line = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield line
    finally:
        if coming is not None:
            coming.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                await coming
        await lines.aclose()  # type: ignore[attr-defined]


def sse(data: Any, event: str | None = None, id_: int | None = None) -> str:
    """One server-sent event."""
    head = "".join(f"{name}: {value}\n" for name, value in (("event", event), ("id", id_)) if value is not None)
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"


def json_answer(answer: Answer, body: Any) -> JSONResponse:
    return JSONResponse(body, answer.status, headers=answer.headers)


def plain_error(error: LantingError) -> JSONResponse:
    """An error in Lanting's own words."""
    answer = answer_to(error)
    return json_answer(answer, {"error": {"code": answer.code, "message": answer.sentence}})


def revised(drawn: Mapping[str, Any]) -> dict[str, str]:
    """What a recipe's request drew instead of what was asked, under OpenAI's name for it; nothing where that stayed."""
    rewritten = drawn.get("asked") is not None and drawn.get("unwritten") is None
    return {"revised_prompt": drawn["prompt"]} if rewritten else {}
