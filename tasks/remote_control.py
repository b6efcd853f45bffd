"""Which of Celery's remote commands a worker of torchord's own app obeys.

Whoever may publish on the broker may send them to all workers, and nothing tells who did. Celery obeys every
one: to end, to take no more messages, to kill what runs, to write down what its memory holds. Torchord needs
none of these, so its workers answer questions and leave the rest alone, unless TORCHORD_REMOTE_CONTROL says
otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torchord.cache.errors import InvalidInput
from torchord.cache.settings import REMOTE_CONTROL_ALL

log = logging.getLogger(__name__)

Command = Callable[..., Any]

ANSWERED = frozenset(
    {
        "active",
        "active_queues",
        "clock",
        "conf",
        "dump_active",
        "dump_conf",
        "dump_reserved",
        "dump_revoked",
        "dump_schedule",
        "dump_tasks",
        "enable_events",
        "heartbeat",
        "hello",
        "ping",
        "query_task",
        "registered",
        "report",
        "reserved",
        "revoked",
        "scheduled",
        "stats",
    }
)
"""Questions, and the two by which Flower and `celery events` have workers tell what they do."""


def obeyed(commands: Mapping[str, Command], opened: frozenset[str]) -> dict[str, Command]:
    """What a worker does at each command: the command, or a refusal that tells the asker and the log.

    Args:
        commands: all that this process knows, Celery's and those that somebody has added.
        opened: names beyond `ANSWERED`, or `REMOTE_CONTROL_ALL`.

    Raises:
        InvalidInput: a name in `opened` is no command.
    """
    if REMOTE_CONTROL_ALL in opened:
        return dict(commands)
    if unknown := opened - set(commands):
        among = ", ".join(sorted(set(commands) - ANSWERED))
        raise InvalidInput(
            f"TORCHORD_REMOTE_CONTROL names {min(unknown)!r}, which is no remote command; "
            f"name some of {among}"
        )
    kept = {name: command for name, command in commands.items() if name in ANSWERED | opened}
    if "hello" in kept and "revoke" not in opened:
        kept["hello"] = _without_revoked(kept["hello"])
    return {name: kept.get(name, _refusal(name)) for name in commands}


def _without_revoked(hello: Command) -> Command:
    """A greeting also says which tasks are revoked, and so revokes them."""

    def greet(state: Any, from_node: Any = None, **_: Any) -> Any:
        return hello(state, from_node)

    return greet


def _refusal(name: str) -> Command:
    def refuse(state: Any, **_: Any) -> dict[str, str]:
        said = (
            f"the remote command {name!r} is not obeyed here; "
            f"TORCHORD_REMOTE_CONTROL={name} has a worker obey it"
        )
        log.warning("%s", said)
        return {"error": said}

    return refuse


def restrict(consumer: Any, opened: frozenset[str]) -> None:
    """Have a consumer of Celery's obey no more than it is to.

    Args:
        consumer: with its steps made, and not started yet.
        opened: as for `obeyed`.

    Raises:
        InvalidInput: as `obeyed`.
    """
    if REMOTE_CONTROL_ALL in opened:
        return
    for step in consumer.steps:
        if (box := getattr(step, "box", None)) is not None:
            box.node.handlers = obeyed(box.node.handlers, opened)
    # An election ends with the winner sending a task that whoever called it has named.
    if "election" not in opened and hasattr(consumer, "gossip"):
        consumer.gossip.event_handlers.clear()
