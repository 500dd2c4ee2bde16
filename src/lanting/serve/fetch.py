"""Fetching a picture from an address a client gives; only where the server was started with --fetch-urls.

The name is resolved once, every address it has must be public, and the connection goes to the address that was
checked, so a name that changes its mind gets nowhere. No redirects, no proxies from the environment, ports 80 and 443,
bounded in bytes and seconds. Whatever goes wrong is told in the same words, so nobody can map a network with it.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import socket
import ssl
import time
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from lanting.core.errors import PictureError

PORTS = {"http": 80, "https": 443}
CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one fetch. `private` is for tests alone."""

    most: int = 20 << 20  # bytes
    seconds: float = 10.0
    private: bool = False


async def fetch(url: str, limits: Limits, name: str = "the picture") -> bytes:
    """What is there. Raises PictureError."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(_fetch, url, limits), limits.seconds + 1)
    except (OSError, ValueError, http.client.HTTPException, TimeoutError) as error:
        raise PictureError(
            "{name} can't be fetched from its address: send it itself, as base64, or upload it", name=name
        ) from error


def _fetch(url: str, limits: Limits) -> bytes:
    parts = urlsplit(url)
    host, port = target(parts, limits)
    until = time.monotonic() + limits.seconds
    address = public_address(host, port, limits)
    raw = socket.create_connection((address, port), timeout=limits.seconds)
    try:
        sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if parts.scheme == "https" else raw
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock  # the address that was checked, whatever the name says by now
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Host": parts.netloc, "User-Agent": "lanting", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status != 200:  # redirects too
            raise ValueError(f"status {response.status}")
        return read(response, sock, limits.most, until)
    finally:
        raw.close()


def target(parts: SplitResult, limits: Limits) -> tuple[str, int]:
    """Host and port, if both are ordinary."""
    host, usual = parts.hostname, PORTS.get(parts.scheme)
    if host is None or usual is None or parts.username is not None or parts.password is not None:
        raise ValueError("not an ordinary address")
    port = parts.port or usual
    if port != usual and not limits.private:
        raise ValueError(f"port {port}")
    return host, port


def public_address(host: str, port: int, limits: Limits) -> str:
    """The first of the host's addresses, if all of them are public."""
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        if not limits.private and not is_public(address):
            raise ValueError("not a public address")
    return found[0]


def is_public(address: str) -> bool:
    """Whether anyone on the internet can have it; IPv4 inside IPv6 is judged as IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None) or ip
        if isinstance(ip, ipaddress.IPv6Address) and ip in ipaddress.ip_network("64:ff9b::/96"):
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not ip.is_multicast


def read(response: http.client.HTTPResponse, sock: socket.socket, most: int, until: float) -> bytes:
    """The body, while there is room and time."""
    if int(response.headers.get("Content-Length") or 0) > most:
        raise ValueError("too large")
    parts, size = list[bytes](), 0
    while True:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        part = response.read1(CHUNK)
        if not part:
            return b"".join(parts)
        size += len(part)
        if size > most:
            raise ValueError("too large")
        parts.append(part)
