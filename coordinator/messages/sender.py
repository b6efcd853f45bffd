"""Sending tasks: one global step as a Celery chord, and single tasks beside it.

The coordinator knows tasks by name only. Every argument is small JSON; what the tasks work on
is named by (run, step, shard, version) and lies in the cache.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

from celery import Celery, chord
from kombu.exceptions import OperationalError
from kombu.utils.functional import retry_over_time

from torchord.cache.errors import CacheError, CacheUnreachable
from torchord.cache.ledger.launch import Launch
from torchord.cache.servers.address import masked
from torchord.cache.servers.redis_client import hint_of
from torchord.coordinator.messages import task_names
from torchord.coordinator.messages.templates import StepTemplate, enqueue, push, push_front, recorded
from torchord.coordinator.runtime.faults import Injector

log = logging.getLogger(__name__)

_NOTICES = uuid.UUID("0a5a2a52-7c56-4bb4-a2ea-5a8a2ad22f4c")

Join = tuple[str, dict[str, Any]]  # a chord, as (group id, callback)

_PREDICTING = "?"  # after a run's name, whose turns its predictions' are: no name has it
_PUBLISH: dict[str, Any] = {
    "retry": True,
    "retry_policy": {"max_retries": 3, "interval_start": 0.1, "interval_max": 1.0},
}


class Sender:
    """Publishes torchord's tasks.

    Args:
        app: the Celery app whose broker the tasks go to.
        fault: called between the messages of a launch; tests use it to die there.
    """

    def __init__(self, app: Celery, *, fault: Callable[[str], None] | None = None) -> None:
        self.app = app
        self.fault = fault
        self._templates: dict[tuple[str, str, bool], StepTemplate] = {}
        url, options = str(app.conf.broker_url), app.conf.broker_transport_options or {}
        plain = url.startswith(("redis://", "rediss://", "redis+socket://", "unix://"))
        self._one_server = plain and app.conf.result_backend == url and "global_keyprefix" not in options
        self._connection_errors: tuple[type[Exception], ...] = (
            OperationalError,
            *(getattr(app.backend, "connection_errors", ()) if self._one_server else ()),
            *(getattr(app.backend, "channel_errors", ()) if self._one_server else ()),
        )

    def say_turns(self, run: str, weight: float, priority: int) -> None:
        """Say of a run with a share of its own that there are no turns here: they are on one plain server."""
        if (weight, priority) != (1.0, 0) and not self._one_server:
            log.warning(
                "run %r: weight and priority have no effect here, since the broker is not one plain Redis: "
                "shards are taken in the order in which they come",
                run,
            )

    def send(self, task: str, kwargs: dict[str, Any], *, queue: str, hidden: str = "") -> None:
        """Publish one task whose result nobody waits for.

        Args:
            hidden: a keyword argument that people need not see in Flower.

        Raises:
            CacheUnreachable: if the broker does not take it.
        """
        seen = repr({name: value for name, value in kwargs.items() if name != hidden})
        options: dict[str, Any] = {"kwargs": kwargs, "ignore_result": True, "kwargsrepr": seen}
        try:
            if queue == task_names.GRADIENTS and self._one_server:
                flow = _PREDICTING if task == task_names.PREDICT else ""
                message = json.dumps(recorded(partial(self.app.send_task, task), queue, **options)).encode()
                put = partial(enqueue, self.app, queue, str(kwargs["run"]), [message], flow=flow)
                retry_over_time(put, self._connection_errors, **_PUBLISH["retry_policy"])
            else:
                self.app.send_task(task, queue=queue, **options, **_PUBLISH)
        except self._connection_errors as error:
            run = kwargs.get("run", "")
            raise self._unreachable(f"send {task} of run {run!r}", error) from error

    def advance(self, run: str, *, queue: str = task_names.UPDATES) -> None:
        """Ask a training server to do whatever comes next in a run."""
        self.send(task_names.ADVANCE, {"run": run}, queue=queue)

    def tell(self, task: str, notice: dict[str, Any], *, queue: str) -> None:
        """Publish a task of another app, with a notice of what happened in a run as its one argument.

        The same notice makes a message of the same id.

        Raises:
            CacheUnreachable: if the broker does not take it.
        """
        id = str(uuid.uuid5(_NOTICES, str(notice["id"])))
        seen = f"({notice['event']!r} of {notice['run']!r},)"
        try:
            self.app.send_task(
                task, args=(notice,), task_id=id, queue=queue, ignore_result=True, argsrepr=seen, **_PUBLISH
            )
        except OperationalError as error:
            raise self._unreachable(f"send {task} of run {notice['run']!r}", error) from error

    def gradient(
        self, run: str, step: int, shard: int, *, version: int | None = None, backup: bool = False
    ) -> None:
        """Publish one gradient task outside a chord: a lost one again, or a backup.

        Args:
            version: what it is computed at; None: the version of the step's own number.
        """
        self.send(
            task_names.COMPUTE_GRADIENT,
            {
                "run": run,
                "step": step,
                "shard": shard,
                "version": step if version is None else version,
                "backup": backup,
            },
            queue=task_names.GRADIENTS,
        )

    def partial_sum(
        self,
        run: str,
        step: int,
        slot: int,
        *,
        version: int,
        join: Join | None = None,
        backup: bool = False,
    ) -> None:
        """Publish a partial sum whose inputs are there, before the gradients that are queued.

        Args:
            version: what the step is computed at.
            join: the step's chord, whose size counts the partial sum; None: outside a chord.
            backup: compute beside a live holder.

        Raises:
            CacheUnreachable: if the broker does not take it.
        """
        kwargs = {"run": run, "step": step, "slot": slot, "version": version, "backup": backup}
        options: dict[str, Any] = {"kwargs": kwargs, "ignore_result": True, "queue": task_names.GRADIENTS}
        if join is not None:
            options |= {"group_id": join[0], "group_index": slot, "chord": join[1]}
        try:
            if self._one_server:
                push_front(self.app, task_names.PARTIAL_SUM, **options)
            else:
                self.app.send_task(task_names.PARTIAL_SUM, **options, **_PUBLISH)
        except self._connection_errors as error:
            raise self._unreachable(f"send a partial sum of run {run!r}", error) from error

    def step(
        self,
        run: str,
        step: int,
        shards: Sequence[int],
        *,
        callback_queue: str,
        version: int | None = None,
        joining: int = 0,
        steps: int = 1,
        seconds: float | None = None,
    ) -> None:
        """Publish a global step, or a round: a chord of gradient tasks with the update as its callback.

        Args:
            version: what it is computed at; None: the version of the step's own number.
            joining: partial sums that will be published later and belong to the chord, too.
            shards: the shards that still lack a slot; of a round, its seats.
            steps: how many the round has; 1: it is a single step.
            seconds: that each task will take, by which the run's turn is reckoned; None: as shards before.
            callback_queue: private queue of the training server that holds the run.

        Raises:
            CacheUnreachable: if the broker does not take it.
        """
        version = step if version is None else version
        if not self._one_server:
            self._canvas_step(run, step, version, shards, callback_queue, joining, steps)
            return
        template = self._template(run, callback_queue, rounds=steps > 1)
        try:
            more = {"joining": joining, "steps": steps, "seconds": seconds}
            push(self.app, template, step, version, shards, fault=self.fault, **more)  # type: ignore[arg-type]
        except self._connection_errors as error:
            raise self._unreachable(f"launch step {step} of run {run!r}", error) from error

    def drafted(
        self,
        run: str,
        step: int,
        shards: Sequence[int],
        *,
        callback_queue: str,
        version: int,
        incarnation: str,
        seconds: float,
        joining: int = 0,
    ) -> Launch | None:
        """The messages that `step` would publish, for the commit that makes the step possible.

        Args:
            seconds, joining: as for `step`.

        Returns:
            None where the control plane and Celery's broker are not known to be one plain server, or
            a test wants to die in the middle of a launch: then `step` publishes them after the commit.
        """
        if not self._one_server or self._dies_at_launch():
            return None
        template = self._template(run, callback_queue)
        group, messages = template.render(step, version, shards)
        backend = cast(Any, self.app.backend)
        return Launch(
            step,
            incarnation,
            backend.get_key_for_group(group, ".s").decode(),
            len(messages) + joining,
            int(backend.expires),
            template.queue,
            seconds,
            tuple(messages),
        )

    def _dies_at_launch(self) -> bool:
        """Whether a test wants to see a launch that is a matter of its own, and can be cut in half."""
        points = ("server.before_launch", "sender.mid_launch", "server.after_launch")
        return self.fault is not None and (not isinstance(self.fault, Injector) or self.fault.names(*points))

    def _template(self, run: str, callback_queue: str, *, rounds: bool = False) -> StepTemplate:
        key = (run, callback_queue, rounds)
        found = self._templates.get(key)
        if found is None:
            if len(self._templates) > 1:
                self._templates.clear()  # a handful of runs at most; each costs 1 ms to record again
            found = self._templates[key] = StepTemplate(
                self.app,
                task=task_names.COMPUTE_GRADIENT,
                kwargs={"run": run},
                queue=task_names.GRADIENTS,
                body=task_names.APPLY_UPDATE,
                body_kwargs={"run": run},
                body_queue=callback_queue,
                rounds=rounds,
            )
        return found

    def _canvas_step(
        self,
        run: str,
        step: int,
        version: int,
        shards: Sequence[int],
        callback_queue: str,
        joining: int = 0,
        steps: int = 1,
    ) -> None:
        """The same chord by Celery's canvas, for brokers and backends that are not one plain Redis.

        The header is a generator: given a list, Celery subscribes the launching process to every
        header's result and never unsubscribes (celery issue 4824).
        """
        signature = self.app.signature
        header = (
            signature(
                task_names.COMPUTE_GRADIENT,
                kwargs={
                    "run": run,
                    "step": step,
                    "shard": shard,
                    "version": version,
                    **({"steps": steps} if steps > 1 else {}),
                },
                queue=task_names.GRADIENTS,
                ignore_result=True,
            )
            for shard in shards
        )
        body = signature(
            task_names.APPLY_UPDATE,
            kwargs={"run": run, "step": step},
            queue=callback_queue,
            ignore_result=True,
            argsrepr="(receipts,)",
        )
        try:
            launched = chord(header, app=self.app)(body)
            if joining:
                # Celery knows the headers that it sent. Should they all end before this: the callback
                # comes early, which changes nothing, and who writes the last slot calls the server.
                self.app.backend.set_chord_size(launched.parent.id, len(shards) + joining)
        except OperationalError as error:
            raise self._unreachable(f"launch step {step} of run {run!r}", error) from error

    def _unreachable(self, what: str, error: Exception) -> CacheError:
        if hint := hint_of(error):
            return CacheError(f"cannot {what}: {masked(self.app.conf.broker_url)} answered '{error}'{hint}")
        return CacheUnreachable(
            f"cannot {what}: no Redis answers at {masked(self.app.conf.broker_url)} ({error})"
        )

    def evaluation(self, run: str, version: int, parts: Iterable[int], of: int) -> None:
        """Publish the parts of an evaluation of one version."""
        for part in parts:
            self.send(
                task_names.EVALUATE,
                {"run": run, "version": version, "part": part, "parts": of},
                queue=task_names.GRADIENTS,
            )
