"""The engine: from a Request to pictures. The only room that knows all the others below it."""

from lanting.engine.engine import Engine

__all__ = ["Engine"]
