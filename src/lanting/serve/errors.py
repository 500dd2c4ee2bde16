"""What a client can be told: a sentence, an HTTP status, a short code. Dialects give it their own shape.

Errors of the other rooms are the client's fault by their exit code (2), and then a 400. Everything unexpected is told
as one general sentence with a number under which the log has the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lanting.core.errors import LantingError
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
