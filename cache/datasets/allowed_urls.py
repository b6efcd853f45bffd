"""At which places this process opens stored datasets: a recipe names a URL, and a worker would fetch it.

What a recipe can name, whoever may submit one can name: an address inside the worker's network, say. So a
process opens folders and object stores, whose addresses are its own settings, and anything else only where
its owner says so.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable
from urllib.parse import unquote

from torchord.cache.errors import InvalidInput
from torchord.cache.servers.address import masked

USUAL = (
    "/",
    *(f"{scheme}://" for scheme in ("file", "local", "memory")),
    *(f"{scheme}://" for scheme in ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")),
)
"""Directories, this process's own memory, and object stores at the addresses that its own settings name."""


def require_allowed(url: str, allowed: Iterable[str] | None) -> None:
    """Refuse a place that this process does not open.

    Args:
        url: of the folder, or an absolute directory.
        allowed: schemes ("https://") and places ("https://data.example.org/sets", "/data"), with all that
            lies below; None: `USUAL`.

    Raises:
        InvalidInput: it is none of these, or leaves one by "..".
    """
    words = USUAL if allowed is None else tuple(allowed)
    try:
        if any(lies_below(url, word) for word in words):
            return
    except (ValueError, OSError) as error:
        raise InvalidInput(f"datasets cannot be kept at {masked(url)!r:.200}: {error}") from error
    among = ", ".join(words) if allowed is not None else "directories and object stores"
    raise InvalidInput(
        f"this process opens no stored datasets at {masked(url)!r:.200}, only at {among}: add the place to "
        "TORCHORD_DATASET_URLS, on the workers, too"
    )


def lies_below(url: str, word: str) -> bool:
    """Whether a URL or directory is the scheme or place of an allow-list's word, or lies below it.

    Raises:
        ValueError, OSError: it is no place at all.
    """
    return _below(_plain(url), _plain(word))


def _plain(place: str) -> str:
    """A directory without links, a URL without "." and ".."."""
    scheme, separator, path = place.partition("://")
    if not separator or scheme.lower() in ("file", "local"):
        return "/" if place == "/" else os.path.realpath(os.path.expanduser(path if separator else place))
    if not path:
        return f"{scheme.lower()}://"
    host, slash, rest = path.partition("/")
    rest = posixpath.normpath("/" + unquote(rest)).lstrip("/") if slash else ""
    return f"{scheme.lower()}://{host.lower()}/{rest}".rstrip("/")


def _below(place: str, bound: str) -> bool:
    if bound == "/" or bound.endswith("://"):
        return place.startswith(bound)
    return place == bound or place.startswith(f"{bound}/")
