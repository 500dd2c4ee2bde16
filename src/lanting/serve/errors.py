"""What a client can be told: a sentence, an HTTP status, a short code. Dialects give it their own shape.

Errors of the other rooms are the client's fault by their exit code (2), and then a 400. Everything unexpected is told
as one general sentence with a number under which the log has the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lanting.core.errors import LantingError, RequestError
from lanting.core.lang import explain


class ServeError(LantingError):
    """An answer that is not a picture."""

    status, code = 400, "invalid_request"
    retry_after: float | None = None  # seconds


class BusyError(ServeError):
    """The queue is full."""

    status, code = 429, "queue_full"


class ClosedError(ServeError):
    """Starting, stopping, or reading as much as there is room for."""

    status, code, retry_after = 503, "unavailable", 5.0


class MissingError(ServeError):
    """There is no such thing, or it is somebody else's."""

    status, code = 404, "not_found"


class UnknownModelError(ServeError):
    """A model that is not served here."""

    status, code = 404, "model_not_found"


class ConflictError(ServeError):
    """An idempotency key that was used for something else."""

    status, code = 409, "idempotency_conflict"


class DeniedError(ServeError):
    """No key, a wrong one, or a request from another site."""

    status, code = 403, "forbidden"


class NoKeyError(ServeError):
    """No key, or one that is not valid."""

    status, code = 401, "invalid_api_key"


def no_key() -> NoKeyError:
    """The sentence at every door."""
    return NoKeyError("an API key is needed: send 'Authorization: Bearer KEY'; 'lanting keys create NAME' makes one")


class LargeError(ServeError):
    """More bytes than are read."""

    status, code = 413, "too_large"


class DrawingError(ServeError):
    """A job that ended without a picture; 500 where that was not the request's fault."""

    status, code = 500, "drawing_failed"


class ClusterError(ServeError):
    """A worker can't be started in a cluster."""

    status, code = 503, "unavailable"


class StoreError(ServeError):
    """The disk is full, or can't be written."""

    status, code, retry_after = 503, "storage_failed", 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An error as all dialects need it."""

    status: int
    code: str
    sentence: str
    retry_after: float | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds; how to send a key."""
        told = {} if self.retry_after is None else {"Retry-After": str(max(round(self.retry_after), 1))}
        return told | ({"WWW-Authenticate": 'Basic realm="Lanting", Bearer'} if self.status == 401 else {})


def answer_to(error: LantingError) -> Answer:
    """The status and words of an error we can explain."""
    sentence = explain(error).encode("utf-8", "backslashreplace").decode()  # it may quote half a letter
    if isinstance(error, ServeError):
        return Answer(error.status, error.code, sentence, error.retry_after)
    return Answer(400 if error.exit_code == 2 else 500, "invalid_request", sentence)


def words_of(error: LantingError) -> list[Any]:
    """[template, values] of an error, for JSON: whoever reads it may speak another language than this server."""
    plain = {name: one if isinstance(one, int | float | str) else str(one) for name, one in error.values.items()}
    return [error.sentence, plain]


def on_record(code: str, error: LantingError) -> dict[str, Any]:
    """An error as a job keeps it."""
    return {"code": code, "message": explain(error), "words": words_of(error)}


def as_told(error: Mapping[str, Any]) -> dict[str, Any]:
    """A job's error as clients are told it."""
    return {name: error[name] for name in ("code", "message")}


KINDS = {
    "string": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "a yes or no, true or false",
    "list": "a list",
    "dict": "an object",
}
TAG = re.compile(r"(str|int|float|bool|list|dict|tuple)(\[.*)?")  # how pydantic names the kinds that a value may be of


def misread(errors: Sequence[Mapping[str, Any]]) -> LantingError:
    """What pydantic has against a body or a query, in our words: of the first field that it complains about."""
    first = errors[0]
    where = [part for part in first["loc"] if part not in ("body", "query", "path")]
    kind, told = str(first["type"]), dict(first.get("ctx") or {})
    if kind == "json_invalid":
        return RequestError("the request is no JSON: send an object with Content-Type application/json")
    if not where:
        return RequestError("the request is no JSON object: send {...}")
    name = ".".join(str(part) for part in where)[:80]
    if kind == "missing":
        return RequestError("{name} is missing; see /openapi.json", name=name)
    if kind == "extra_forbidden":
        return RequestError("{name} is not known here: leave it out", name=name)
    if kind == "string_too_long":
        return RequestError("{name} has at most {most} characters", name=name, most=told["max_length"])
    if any(isinstance(part, str) and TAG.fullmatch(part) for part in where[1:]):  # one of several kinds
        return RequestError("{name} is of no kind that is read there; see /openapi.json", name=str(where[0]))
    wanted = KINDS.get(kind.partition("_")[0])
    if wanted is not None:
        return RequestError("{name} must be {kind}", name=name, kind=wanted)
    if kind == "literal_error":
        return RequestError("{name} must be {kind}", name=name, kind=told["expected"])
    if kind == "greater_than_equal":
        return RequestError("{name} must be at least {most}", name=name, most=told["ge"])
    if kind == "less_than_equal":
        return RequestError("{name} must be at most {most}", name=name, most=told["le"])
    return RequestError("{name}: {reason}", name=name, reason=str(first["msg"])[:200])
