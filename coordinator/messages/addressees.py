"""Whom a run tells what happened to it: tasks of other Celery apps, by name, and addresses of the web.

Whoever may submit may name any; which of them are called is decided by the owner of the processes that call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from torchord.cache.datasets.allowed_urls import lies_below
from torchord.cache.errors import InvalidInput
from torchord.cache.ledger.outbox import MOST_ADDRESSEES, TOLD
from torchord.cache.servers.address import masked
from torchord.cache.settings import Settings

_TASK = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_SCHEMES = ("https", "http")
_OTHERS = ("torchord.", "celery.")  # tasks that are called by nobody but their own
_MOST_SIGNS = 2000

On = Mapping[str, str | Sequence[str]]


def is_url(addressee: str) -> bool:
    """Whether it is an address and no task."""
    return "://" in addressee


def shown(addressee: str) -> str:
    """An addressee as events and pages show it: without an address's path and query, which may be secret."""
    if not is_url(addressee):
        return addressee[:_MOST_SIGNS]
    parts = urlsplit(addressee)
    path = "/…" if parts.path.strip("/") or parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"


def read_on(on: On, settings: Settings) -> dict[str, list[str]]:
    """What `submit` was told to tell, as a spec has it: event -> addressees.

    Raises:
        InvalidInput: an event is none, or an addressee is none that this process would call.
    """
    if not isinstance(on, Mapping):
        raise InvalidInput(f"on must map events to tasks or URLs, got {type(on).__name__}")
    found = {}
    for event, given in on.items():
        if event not in TOLD:
            raise InvalidInput(f"on has {event!r:.60}; what can be told is {', '.join(TOLD)}")
        addressees = [given] if isinstance(given, str) else list(given)
        if not 1 <= len(addressees) <= MOST_ADDRESSEES:
            raise InvalidInput(f"on[{event!r}] has {len(addressees)} addressees; give 1 to {MOST_ADDRESSEES}")
        for addressee in addressees:
            check(event, addressee)
            require_allowed(addressee, settings)
        found[event] = addressees
    return found


def check(event: str, addressee: Any) -> None:
    """Refuse what is neither a task's name nor an address.

    Raises:
        InvalidInput: it is none.
    """
    what = f"on[{event!r}] is {masked(addressee)!r:.200}" if isinstance(addressee, str) else f"on[{event!r}]"
    if not isinstance(addressee, str) or len(addressee) > _MOST_SIGNS:
        raise InvalidInput(f"{what} must be a text of at most {_MOST_SIGNS} signs")
    if not is_url(addressee):
        if not _TASK.fullmatch(addressee):
            raise InvalidInput(f"{what}, which is neither a task such as 'shop.tasks.deploy' nor a URL")
        return
    try:
        parts = urlsplit(addressee)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise InvalidInput(f"{what}, which is no URL: {error}") from None
    if parts.scheme not in _SCHEMES or not host or not addressee.isascii() or port == 0:
        raise InvalidInput(f"{what}, which is no address such as 'https://shop.example/hook'")
    if any(sign <= " " or sign == "\x7f" or sign == "\\" for sign in addressee):
        raise InvalidInput(f"{what}, which has a sign that no URL has")
    if "@" in parts.netloc:
        raise InvalidInput(f"{what}, which holds a password: the run's pages would show it; put none into it")


def require_allowed(addressee: str, settings: Settings) -> None:
    """Refuse whom this process does not call.

    Raises:
        InvalidInput: it is not on the allow-list.
    """
    if is_url(addressee):
        if not any(lies_below(_bare(addressee), word) for word in settings.tell_urls):
            raise InvalidInput(
                f"this process calls no address like {shown(addressee)!r:.200}, only "
                f"{_among(settings.tell_urls)}: add the place to TORCHORD_TELL_URLS, on the training servers "
                "too"
            )
        return
    ours = addressee.startswith(_OTHERS)
    if ours or not any(_matches(addressee, word) for word in settings.tell_tasks):
        raise InvalidInput(
            f"this process sends no task {addressee!r:.200}, only {_among(settings.tell_tasks)}: "
            + (
                "tasks of torchord's and Celery's own are not for that"
                if ours
                else "add it to TORCHORD_TELL_TASKS, on the training servers, too"
            )
        )


def named(addressee: str, settings: Settings) -> bool:
    """Whether the allow-list names the address's host, not only its scheme: then it may be a private one."""
    return any(not word.endswith("://") and lies_below(_bare(addressee), word) for word in settings.tell_urls)


def _bare(url: str) -> str:
    """An address without query and fragment, which are no part of its place."""
    return urlsplit(url)._replace(query="", fragment="").geturl()


def _matches(task: str, word: str) -> bool:
    return task.startswith(word[:-1]) if word.endswith("*") else task == word


def _among(words: Iterable[str]) -> str:
    return ", ".join(words) or "none"
