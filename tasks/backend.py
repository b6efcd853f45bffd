"""The result backend: Celery's own, with a shorter way to count the parts of our chords.

Celery counts a header task in one script and, after the last one, joins: it looks for a saved group, reads
the results, extends its claim, builds and publishes the callback, and cleans up, a round trip each. For the
chord of a global step all of that is one script (cache/scripts/chord_part.lua) on the same keys with the
same values, so that Celery's way and this one can take turns at one chord. What the script does not know
(a header that failed, a server that does not answer, another chord than ours) is left to Celery.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from celery import states
from celery.backends.redis import RedisBackend

from torchord.cache.servers.fast_client import Command, Lane, LaneClosed, script_command
from torchord.coordinator.messages.task_names import APPLY_UPDATE, OUR_TASKS
from torchord.coordinator.messages.templates import CallbackTemplate

log = logging.getLogger(__name__)

_DONE_SECONDS = 60  # how long a chord that has called back is remembered (by Celery: 300)
_TEMPLATES_KEPT = 16


class Backend(RedisBackend):
    """See the module.

    Attributes:
        lane: the way to the server; None: the worker process's.
    """

    lane: Lane | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._templates: dict[tuple[str, str], CallbackTemplate | None] = {}

    def on_chord_part_return(
        self, request: Any, state: str, result: Any, propagate: Any = None, **kwargs: Any
    ) -> None:
        """Count one header task; the last one publishes the callback.

        Where the server refuses that (it is full, say), a task of ours is done all the same: the ledger has
        its slot, and the supervisor calls the training server. Celery would neither end the task nor
        acknowledge its message, and the worker, which takes one at a time, would take none ever after.
        """
        try:
            if state != states.SUCCESS or not self._counted(request, result):
                super().on_chord_part_return(request, state, result, propagate=propagate, **kwargs)
        except Exception as error:
            if getattr(request, "task", "") not in OUR_TASKS:
                raise
            log.warning("a part of a chord of %s was not counted: %s", request.task, error)

    def _counted(self, request: Any, result: Any) -> bool:
        """Count by the short way; False if Celery has to."""
        command = self.part(request, result)
        if command is None:
            return False
        try:
            return counted((self.lane or _process_lane()).call(command)[0])
        except LaneClosed:
            return False

    def part(self, request: Any, result: Any) -> Command | None:
        """The command that counts a header task of ours as done; None for another chord's.

        It may go together with others: `counted` says what its answer means.
        """
        if not request.chord or request.group_index is None or not request.id or not request.group:
            return None
        template = self._template(request.chord)
        if template is None:
            return None
        group = request.group
        names = [self.get_key_for_group(group, ending).decode() for ending in (".j", ".t", ".s", ".d", ".c")]
        value = self.encode([1, request.id, states.SUCCESS, self.encode_result(result, states.SUCCESS)])
        message = template.render(request.chord, root=request.root_id or request.id, parent=request.id)
        expires = int(self.chord_expires or self.expires or _DONE_SECONDS)
        args = [request.id, value, request.group_index, expires, _DONE_SECONDS, *message]
        return script_command("chord_part", [*names, template.queue], args)

    def _template(self, callback: Mapping[str, Any]) -> CallbackTemplate | None:
        """How the callback of a step is worded; None for another chord than ours."""
        if callback.get("task") != APPLY_UPDATE:
            return None
        key = (str(callback["kwargs"]["run"]), str(callback["options"].get("queue")))
        if key not in self._templates:
            if len(self._templates) >= _TEMPLATES_KEPT:
                self._templates.clear()
            try:
                self._templates[key] = CallbackTemplate(self.app, callback)
            except (KeyError, ValueError):
                self._templates[key] = None
        return self._templates[key]


def _process_lane() -> Lane:
    from torchord.tasks.worker import process

    return process().services.lane


def counted(answer: Any) -> bool:
    """Whether a command of `Backend.part` has counted its task, so that Celery need not."""
    return answer in ("counted", "called", "done")
