"""Calling an address of the web: signed, within seconds; no redirect, no private address by chance."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from torchord.cache.errors import NotTold

SECONDS = 10.0
"""For the whole call; beyond that it is given up."""

_TRANSLATING = tuple(map(ipaddress.ip_network, ("64:ff9b::/32", "2002::/16", "2001::/32")))
"""Addresses of IPv6 that are one of IPv4, which may be private."""


def signature(key: str, timestamp: str, body: bytes) -> str:
    """What a receiver compares: HMAC-SHA-256 of the timestamp, a dot and the body, in hexadecimal digits."""
    return hmac.new(key.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def post(url: str, notice: Mapping[str, Any], *, key: str, private: bool, seconds: float = SECONDS) -> None:
    """Call an address with a notice as JSON.

    Args:
        key: signs the call.
        private: whether it may be one of this machine or network.

    Raises:
        NotTold: nobody has taken it; why, in words.
    """
    if not key:
        raise NotTold("no key signs calls here; give the training servers TORCHORD_TELL_KEY")
    body = json.dumps(notice, allow_nan=False).encode()
    timestamp = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "torchord",
        "Torchord-Id": str(notice["id"]),
        "Torchord-Timestamp": timestamp,
        "Torchord-Signature": f"v1={signature(key, timestamp, body)}",
        "Connection": "close",
    }
    try:
        status = _answer(url, body, headers, private=private, seconds=seconds)
    except NotTold:
        raise
    except TimeoutError:
        raise NotTold(f"nobody answered within {seconds:g} s") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NotTold(f"{type(error).__name__}: {error!s:.200}") from None
    if 300 <= status < 400:
        raise NotTold(f"answered {status}: a redirect, and none is followed; give the address it leads to")
    if not 200 <= status < 300:
        raise NotTold(f"answered {status}")


def _answer(url: str, body: bytes, headers: Mapping[str, str], *, private: bool, seconds: float) -> int:
    """The status of the answer; what comes with it is not read."""
    until = time.monotonic() + seconds
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, port)
    made = _connected(host, port, private=private, until=until)
    if secure:
        context = ssl.create_default_context()
        made = context.wrap_socket(made, server_hostname=host, do_handshake_on_connect=False)
    # Whoever sends a byte a second keeps each read within its time: what is over at last is the socket.
    watch = threading.Timer(max(0.0, until - time.monotonic()), _shut, (made,))
    watch.daemon = True
    watch.start()
    try:
        if isinstance(made, ssl.SSLSocket):
            made.do_handshake()
        connection.sock = made
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", target, body, dict(headers))
        status = connection.getresponse().status
        if time.monotonic() >= until:  # the socket was shut: what looks like the end of the headers is none
            raise TimeoutError
        return status
    except (OSError, http.client.HTTPException):
        if time.monotonic() >= until:
            raise TimeoutError from None
        raise
    finally:
        watch.cancel()
        connection.close()
        made.close()


def _connected(host: str, port: int, *, private: bool, until: float) -> socket.socket:
    """A connection to the host, made to the very address that was looked at."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    places = [each for each in found if private or is_public(str(each[4][0]))]
    if not places:
        raise NotTold(
            f"{host} is an address of this machine or of a private network; where that is meant, name the "
            "host in TORCHORD_TELL_URLS"
        )
    failed: OSError = OSError("it has no address")
    for family, kind, protocol, _, address in places[:4]:
        made = socket.socket(family, kind, protocol)
        try:
            made.settimeout(max(0.01, until - time.monotonic()))
            made.connect(address)
        except OSError as error:
            made.close()
            failed = error
        else:
            return made
    raise failed


def is_public(address: str) -> bool:
    """Whether an IP address is one of the whole internet."""
    found = ipaddress.ip_address(address.partition("%")[0])
    within = any(found.version == each.version and found in each for each in _TRANSLATING)
    return found.is_global and not found.is_multicast and not within


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # of TLS not the end in order: somebody reads
