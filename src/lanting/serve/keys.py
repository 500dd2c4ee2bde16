"""API keys: made by `lanting keys create`, shown once, kept as salted hashes.

A key is `lk-ID-SECRET`. The secret has 256 random bits, which no dictionary holds, so one salted hash is enough and
a flood of wrong keys costs the server nothing; a slow hash is for secrets that people choose. Revoking takes effect
within a second.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from lanting.core.errors import RequestError
from lanting.serve.jobs import LEVELS, Caller
from lanting.serve.ledger import Ledger, connect

KEY = re.compile(r"lk-([0-9a-f]{8})-([A-Za-z0-9_-]{43})")
NAME = re.compile(r"[\w][\w .@-]{0,59}")
FRESH = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret."""

    id: str
    name: str
    share: float
    top: int
    created: float
    revoked: float | None
    salt: bytes
    hash: bytes

    @property
    def caller(self) -> Caller:
        return Caller(self.id, self.name, self.share, self.top)


def create(folder: Path, name: str, share: float = 1.0, priority: str = "normal") -> str:
    """A new key as text: it can't be shown again. Raises RequestError for a name that is taken or odd."""
    if not NAME.fullmatch(name):
        raise RequestError("a key's name has 1 to 60 letters, digits, spaces and .@-_; choose another")
    if not 0.01 <= share <= 100:
        raise RequestError("a share must be 0.01 to 100, not {share}", share=share)
    if priority not in LEVELS:
        raise RequestError("there is no priority {word}; use low, normal or high", word=repr(priority))
    id_, secret, salt = secrets.token_hex(4), secrets.token_urlsafe(32), secrets.token_bytes(16)
    db = connect(folder / "queue.sqlite")
    try:
        values = (id_, name, salt, digest(secret, salt), share, LEVELS[priority], time.time(), None)
        db.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
    except sqlite3.IntegrityError:
        raise RequestError("there is a key called {name} already: choose another name", name=name) from None
    finally:
        db.close()
    return f"lk-{id_}-{secret}"


def revoke(folder: Path, word: str) -> Key:
    """By id or name; what it was. Raises RequestError where there is none that works."""
    db = connect(folder / "queue.sqlite")
    try:
        found = [key for key in read(db) if word in (key.id, key.name) and key.revoked is None]
        if not found:
            raise RequestError("no key is called {name}; see 'lanting keys list'", name=word)
        # its name becomes free; jobs keep its id
        values = (time.time(), f"{found[0].name} ({found[0].id})", found[0].id)
        db.execute("UPDATE keys SET revoked = ?, name = ? WHERE id = ?", values)
        return found[0]
    finally:
        db.close()


def listed(folder: Path) -> list[Key]:
    """All keys, the oldest first; of a folder that is not there none, and it is not made."""
    if not (folder / "queue.sqlite").exists():
        return []
    db = connect(folder / "queue.sqlite")
    try:
        return read(db)
    finally:
        db.close()


def read(db: sqlite3.Connection) -> list[Key]:
    rows = db.execute("SELECT id, name, share, top, created, revoked, salt, hash FROM keys ORDER BY created")
    return [Key(**dict(zip(row.keys(), row, strict=True))) for row in rows]


def digest(secret: str, salt: bytes) -> bytes:
    return hashlib.blake2b(secret.encode(), salt=salt, person=b"lanting key").digest()


class Keyring:
    """The keys as a server sees them, read anew at most once a second."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.keys: dict[str, Key] = {}
        self.read_at = float("-inf")

    async def find(self, text: str) -> Caller | None:
        """Who has this key, or None."""
        match = KEY.fullmatch(text)
        key = None if match is None else await self._valid(match[1])
        if match is None or key is None or not hmac.compare_digest(digest(match[2], key.salt), key.hash):
            return None
        return key.caller

    async def owner(self, id_: str) -> Caller | None:
        """Whose key has this id, or None where it is revoked: what it signed ends with it."""
        key = await self._valid(id_)
        return None if key is None else key.caller

    async def _valid(self, id_: str) -> Key | None:
        if time.monotonic() - self.read_at > FRESH:
            self.keys = {key.id: key for key in await self.ledger.read(read)}
            self.read_at = time.monotonic()
        key = self.keys.get(id_)
        return None if key is None or key.revoked is not None else key

    def now(self) -> list[Key]:
        """Before there is an event loop."""
        return self.ledger.at_once(read)

    async def callers(self) -> dict[str, Caller]:
        """All who have or had a key, by id."""
        return {key.id: key.caller for key in await self.ledger.read(read)}
