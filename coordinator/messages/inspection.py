"""What a message of ours has to look like before Celery sees it.

Celery and kombu trust what lies in a queue: an entry that is no message ends the worker that takes it, and
where it was put back, the next one too. Whoever can write to Redis could so take a whole fleet down, by
accident or not.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from torchord.coordinator.messages.task_names import OUR_TASKS

_BEFORE = {name.replace("torchord.", "tasks.", 1) for name in OUR_TASKS}  # what releases before this one sent
_MOST_BODY_NBYTES = 64 << 20
_MOST_DEPTH = 64

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
    limits = headers.get("timelimit") or ()
    if len(limits) not in (0, 2) or any(not isinstance(limit, (*_NUMBER, *_NOTHING)) for limit in limits):
        return "its timelimit is no pair of numbers"
    return _fault_of_body(message.get("body"), properties.get("body_encoding"))


def _fault_of_body(body: Any, encoding: Any) -> str | None:
    if not isinstance(body, str) or encoding not in ("base64", None) or len(body) > _MOST_BODY_NBYTES:
        return "its body is no text in base64"
    try:
        text = base64.b64decode(body, validate=True) if encoding else body.encode()
        found = json.loads(text) if _depth(text) <= _MOST_DEPTH else None
    except (ValueError, RecursionError):
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


def _depth(text: bytes) -> int:
    """How deep JSON nests at most, counted without building anything."""
    deepest = depth = 0
    for sign in text.translate(None, delete=_NOT_BRACKETS):
        depth += 1 if sign in b"[{" else -1
        deepest = max(deepest, depth)
        if deepest > _MOST_DEPTH:
            break
    return deepest


_NOT_BRACKETS = bytes(sign for sign in range(256) if sign not in b"[]{}")
