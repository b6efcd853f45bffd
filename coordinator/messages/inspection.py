"""What a message of ours has to look like before Celery sees it.

Celery and kombu trust what lies in a queue: an entry that is no message ends the worker that takes it, and
where it was put back, the next one too. Whoever can write to Redis could so take a whole fleet down, by
accident or not.
"""

from __future__ import annotations

import base64
import bz2
import lzma
import zlib
from collections.abc import Mapping
from typing import Any

from torchord.cache.errors import RecordDamaged
from torchord.cache.reading import parsed
from torchord.coordinator.messages.task_names import OUR_TASKS, is_ours

_BEFORE = {name.replace("torchord.", "tasks.", 1) for name in OUR_TASKS}  # what releases before this one sent
_MOST_BODY_NBYTES = 64 << 20

_TEXT, _NUMBER, _NOTHING = (str,), (int, float), (type(None),)
_HEADERS: dict[str, tuple[type, ...]] = {
    "task": _TEXT,
    "id": _TEXT,
    "lang": (*_TEXT, *_NOTHING),
    "root_id": (*_TEXT, *_NOTHING),
    "parent_id": (*_TEXT, *_NOTHING),
    "group": (*_TEXT, *_NOTHING),
    "group_index": (int, *_NOTHING),
    "retries": (int, *_NOTHING),
    "eta": _NOTHING,
    "expires": _NOTHING,
    "timelimit": (list, tuple, *_NOTHING),
    "stamped_headers": (list, *_NOTHING),
    "stamps": (dict, *_NOTHING),
    "argsrepr": (*_TEXT, *_NOTHING),
    "kwargsrepr": (*_TEXT, *_NOTHING),
    "ignore_result": (bool, *_NOTHING),
}
_PROPERTIES: dict[str, tuple[type, ...]] = {
    "delivery_tag": _TEXT,
    "correlation_id": (*_TEXT, *_NOTHING),
    "reply_to": (*_TEXT, *_NOTHING),
    "priority": (int, *_NOTHING),
    "delivery_info": (dict,),
    "delivery_mode": (int, *_NOTHING),
}
_EMBEDDED: dict[str, tuple[type, ...]] = {
    "callbacks": (list, *_NOTHING),
    "errbacks": (list, *_NOTHING),
    "chain": (list, *_NOTHING),
    "chord": (dict, *_NOTHING),
}
_MAILBOX = ".pidbox"
_ENCODINGS = ("base64", "utf-8", None)
_LETTER: dict[str, tuple[type, ...]] = {
    "method": (*_TEXT, *_NOTHING),
    "arguments": (dict, *_NOTHING),
    "destination": (list, *_NOTHING),
    "pattern": (*_TEXT, *_NOTHING),
    "matcher": (*_TEXT, *_NOTHING),
    "reply_to": (dict, *_NOTHING),
    "ticket": (*_TEXT, *_NOTHING),
}
_LETTER_HEADERS: dict[str, tuple[type, ...]] = {
    "expires": (*_NUMBER, *_NOTHING),
    "ticket": (*_TEXT, *_NOTHING),
}
_NUMBERS = ("step", "shard", "slot", "version", "part", "parts")


def fault_of(message: Any) -> str | None:
    """Why an entry of one of our queues is no message of ours, None if it is one.

    Args:
        message: the entry, read from JSON.
    """
    if not isinstance(message, dict):
        return f"it is a {type(message).__name__}, not an object"
    headers, properties = message.get("headers"), message.get("properties")
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        return "it has no headers and properties"
    fault = _unlike(headers, _HEADERS, ("task", "id")) or _unlike(
        properties, _PROPERTIES, ("delivery_tag", "delivery_info")
    )
    if fault is not None:
        return fault
    if headers["task"] not in OUR_TASKS and headers["task"] not in _BEFORE:
        return f"its task {headers['task'][:100]!r} is none of torchord's"
    place = properties["delivery_info"]
    if not all(isinstance(place.get(name), str) for name in ("exchange", "routing_key")):
        return "its delivery_info names no exchange and routing_key"
    if message.get("content-type") != "application/json" or headers.get("compression"):
        return "it is no plain JSON"
    if not isinstance(message.get("content-encoding"), (*_TEXT, *_NOTHING)):
        return "its encoding is no text"
    limits = headers.get("timelimit") or ()
    if len(limits) not in (0, 2) or any(not isinstance(limit, (*_NUMBER, *_NOTHING)) for limit in limits):
        return "its timelimit is no pair of numbers"
    return _fault_of_body(message.get("body"), properties.get("body_encoding"))


def fault_of_any(message: Any, queue: str = "") -> str | None:
    """Why what lies in a queue of others, or is broadcast to workers, is no message; None if it is one.

    It may be compressed, up to so many bytes as our own may have: kombu unpacks it before anybody looks.

    Args:
        message: the entry, read from JSON.
        queue: where it lay; what workers and their callers tell each other (`*.pidbox`) is looked into.
    """
    if not isinstance(message, dict):
        return f"it is a {type(message).__name__}, not an object"
    headers, properties = message.get("headers"), message.get("properties")
    if not isinstance(headers, (dict, *_NOTHING)) or not isinstance(properties, dict):
        return "it has no headers and properties"
    place = properties.get("delivery_info")
    if not isinstance(place, dict) or not isinstance(properties.get("delivery_tag"), str):
        return "its properties have no delivery_info and delivery_tag"
    body, encoding = message.get("body"), properties.get("body_encoding")
    if not isinstance(body, (str, *_NOTHING)) or encoding not in _ENCODINGS:
        return "its body is no text"
    clock = (headers or {}).get("clock")
    if not isinstance(clock, (int, *_NOTHING)) or not 0 <= (clock or 0) < 1 << 63:
        return "its clock is none"
    if (compression := (headers or {}).get("compression")) is not None:
        fault = _fault_of_compressed(body, encoding, compression)
        return fault or ("it is compressed" if queue.endswith(_MAILBOX) else None)
    return _fault_of_letter(headers or {}, body or "", encoding) if queue.endswith(_MAILBOX) else None


def fault_of_text(text: str | bytes) -> str | None:
    """Why what was broadcast is nothing that can be read, None if it can."""
    try:
        parsed(text, "it")
    except RecordDamaged as error:
        return str(error)
    return None


def fault_of_taken(text: str | bytes) -> str | None:
    """Why an entry of kombu's record of what workers have taken is none, None if it is one."""
    try:
        found = parsed(text, "it")
    except RecordDamaged as error:
        return str(error)
    if not (isinstance(found, list) and len(found) == 3):
        return "it is no message with its exchange and routing key"
    message, exchange, routing_key = found
    if not all(isinstance(name, (str, *_NOTHING)) for name in (exchange, routing_key)):
        return "its exchange and routing key are no texts"
    if isinstance(routing_key, str) and is_ours(routing_key):
        return fault_of(message)
    return fault_of_any(message)


def _fault_of_letter(headers: Mapping[str, Any], body: str, encoding: Any) -> str | None:
    """What a person's `celery inspect` or `control` sends to workers, and what they answer."""
    try:
        found = parsed(base64.b64decode(body, validate=True) if encoding == "base64" else body, "its body")
    except (ValueError, RecordDamaged):
        return "its body cannot be read"
    if not isinstance(found, dict):
        return f"its body is a {type(found).__name__}, not an object"
    if found.get("matcher") in ("pcre", "regex"):
        return "it names workers by a regular expression, which may take for ever"
    return _unlike(headers, _LETTER_HEADERS, ()) or _unlike(found, _LETTER, ())


def _fault_of_compressed(body: Any, encoding: Any, compression: Any) -> str | None:
    make = _UNPACKERS.get(compression) if isinstance(compression, str) else None
    if make is None or not isinstance(body, str):
        return None if isinstance(compression, str) else "its compression is none"  # kombu knows, or refuses
    try:
        packed = base64.b64decode(body, validate=True) if encoding == "base64" else body.encode()
        found = make().decompress(packed, _MOST_BODY_NBYTES + 1)
    except (ValueError, OSError, EOFError, zlib.error, lzma.LZMAError):
        return "its body cannot be unpacked"
    return "its body is too large unpacked" if len(found) > _MOST_BODY_NBYTES else None


_UNPACKERS: dict[str, Any] = {
    **dict.fromkeys(("application/x-gzip", "gzip", "zlib"), zlib.decompressobj),
    **dict.fromkeys(("application/x-bz2", "bzip2", "bzip"), bz2.BZ2Decompressor),
    **dict.fromkeys(("application/x-lzma", "lzma", "xz"), lzma.LZMADecompressor),
}
"""What kombu calls a compression -> what unpacks so many bytes of it and no more."""


def _fault_of_body(body: Any, encoding: Any) -> str | None:
    if not isinstance(body, str) or encoding not in ("base64", None) or len(body) > _MOST_BODY_NBYTES:
        return "its body is no text in base64"
    try:
        found = parsed(base64.b64decode(body, validate=True) if encoding else body, "its body")
    except (ValueError, RecordDamaged):
        return "its body cannot be read"
    if not (isinstance(found, list) and len(found) == 3):
        return "its body is no list of arguments"
    positional, keywords, embedded = found
    if not (isinstance(positional, list) and isinstance(keywords, dict) and isinstance(embedded, dict)):
        return "its body is no list of arguments"
    if not isinstance(keywords.get("run"), str):
        return "its arguments name no run"
    for name in _NUMBERS:
        value = keywords.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < 1 << 53):
            return f"its argument {name!r} is no number from 0 on"
    chord = embedded.get("chord")
    if isinstance(chord, dict) and not (
        isinstance(chord.get("task"), str)
        and all(isinstance(chord.get(name), dict) for name in ("kwargs", "options"))
    ):
        return "its chord is none"
    return _unlike(embedded, _EMBEDDED, ())


def _unlike(
    found: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], needed: tuple[str, ...]
) -> str | None:
    for name in needed:
        if name not in found:
            return f"it has no {name!r}"
    for name, kind in kinds.items():
        if name in found and not isinstance(found[name], kind):
            return f"its {name!r} is a {type(found[name]).__name__}"
    return None
