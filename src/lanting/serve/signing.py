"""Addresses of pictures that work without a key, for an hour: what `response_format=url` hands to a browser.

The signature covers the path, its owner and the time it ends. The secret is made with the queue and lies in it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
import time
from urllib.parse import parse_qs, urlencode

LASTS = 3600  # seconds


class Signer:
    """Signs for one server."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret

    def sign(self, path: str, owner: str) -> str:
        """The path with who may see it, until when, and the signature."""
        until = int(time.time()) + LASTS
        return f"{path}?" + urlencode({"owner": owner, "until": until, "sig": self._signature(path, owner, until)})

    def owner(self, path: str, query: bytes) -> str | None:
        """Whose picture a signed address shows; None where it isn't one, or has run out."""
        try:
            asked = {name: values[0] for name, values in parse_qs(query.decode("ascii")).items()}
            until, owner, signature = int(asked["until"]), asked["owner"], asked["sig"]
        except (KeyError, ValueError):
            return None
        right = hmac.compare_digest(signature.encode(), self._signature(path, owner, until).encode())
        return owner if right and time.time() < until else None

    def _signature(self, path: str, owner: str, until: int) -> str:
        return hmac.new(self.secret, f"{path}\n{owner}\n{until}".encode(), hashlib.sha256).hexdigest()


def secret_of(db: sqlite3.Connection) -> bytes:
    """The server's secret; made when there is none."""
    db.execute("INSERT OR IGNORE INTO facts VALUES ('secret', ?)", (secrets.token_hex(32),))
    return bytes.fromhex(db.execute("SELECT value FROM facts WHERE name = 'secret'").fetchone()[0])
