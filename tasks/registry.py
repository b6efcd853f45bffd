"""How our tasks are declared: alike in our own app and in every app that they are installed in.

What they need of Celery is theirs, task by task, and no setting of the app: an app's own tasks keep its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Celery, Task

from torchord.cache.errors import TorchordError
from torchord.tasks.celery_app import app

_OPTIONS: dict[str, Any] = {
    # Acknowledged when it is done, so a worker that stops hands it back; running it twice is safe, see each
    # task's docstring.
    "acks_late": True,
    # A killed prefork child's task runs again at once instead of being reported as failed.
    "reject_on_worker_lost": True,
    # Receipts are for people (events); the ledger holds the truth. Stored results would only fill Redis, and
    # a chord whose header stores none cannot hang between storing and counting.
    "ignore_result": True,
    "track_started": False,
    "throws": (TorchordError,),
    # Celery would register it in every other app of the process, too.
    "shared": False,
}
_declared: list[tuple[Callable[..., Any], dict[str, Any]]] = []


class TorchordTask(Task):
    """A task whose chords are counted where torchord's messages are, whatever its app's result backend."""

    abstract = True

    @property
    def backend(self) -> Any:
        """That of our own app."""
        return app.backend


def task(name: str, *, bind: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Declare one of our tasks.

    Args:
        name: as in `torchord.coordinator.messages.task_names`.
        bind: the function takes the task as its first argument.
    """

    def declare(function: Callable[..., Any]) -> Any:
        options = {"name": name, "bind": bind, "base": TorchordTask, **_OPTIONS}
        _declared.append((function, options))
        return app.task(**options)(function)

    return declare


def register(other: Celery) -> None:
    """Give another app our tasks; the modules that declare them have been imported."""
    for function, options in _declared:
        other.task(**options)(function)
