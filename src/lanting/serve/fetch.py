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
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from lanting.core.errors import PictureError

PORTS = {"http": 80, "https": 443}
CHUNK = 1 << 16
# IPv6 that ends in an IPv4 address: translated, translated by a host, compatible; and what one network translates
WITH_IPV4 = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "::ffff:0:0:0/96", "::/96")))
OWN = ipaddress.IPv6Network("64:ff9b:1::/48")


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
    line = raw.dup()  # the same connection, also below TLS
    clock = threading.Timer(max(until - time.monotonic(), 0), hang_up, (line,))  # for who sends a byte now and then
    clock.daemon = True
    clock.start()
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
        clock.cancel()
        hang_up(line)
        line.close()
        raw.close()


def hang_up(line: socket.socket) -> None:
    """Whoever waits for the other side waits no longer."""
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


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
        if isinstance(ip, ipaddress.IPv6Address) and any(ip in network for network in WITH_IPV4):
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    inside = ip.is_multicast or (isinstance(ip, ipaddress.IPv6Address) and (ip.is_site_local or ip in OWN))
    return ip.is_global and not inside


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
        if not part and time.monotonic() < until:  # else we have hung up
            return b"".join(parts)
        size += len(part)
        if size > most:
            raise ValueError("too large")
        parts.append(part)
