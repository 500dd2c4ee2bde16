"""Logs as JSON lines on stderr: time, level, what happened, and the values that belong to it.

Prompts, pictures and keys are never in them. On a terminal a line is shorter, for people.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

PLAIN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def values_of(record: logging.LogRecord) -> dict[str, Any]:
    """What was handed over as `extra`; names that begin with _ are those of libraries."""
    own = {name: value for name, value in record.__dict__.items() if not name.startswith("_")}
    return {name: value for name, value in own.items() if name not in PLAIN and value is not None}


class JsonLines(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told: dict[str, Any] = {"time": f"{when}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        told |= {"event": record.getMessage(), "logger": record.name, **values_of(record)}
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


class Short(logging.Formatter):
    """For a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        values = " ".join(f"{name}={value}" for name, value in values_of(record).items() if name != "trace")
        line = f"  {time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()} {values}".rstrip()
        trace = self.formatException(record.exc_info) if record.exc_info else values_of(record).get("trace")
        return f"{line}\n{trace}" if trace else line


def write_to_stderr(level: int = logging.INFO) -> None:
    """Send our lines, and the warnings of everyone else, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Short() if sys.stderr.isatty() else JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("lanting").setLevel(level)
