"""Celery's messages recorded, to be sent by torchord: rendered for each step, or put at a queue's front.

Publishing a chord through Celery's canvas costs its publisher about 2 ms for two tasks and 0.6 ms for
each further one: signatures are cloned, options merged and one connection round trip made per task.
All of that gives the same message but for a few fields. So the first step of a run lets Celery make
one header message (onto an in-memory transport), and each step after that fills in the step, the
shard and fresh ids, and sends all of it in one round trip. What arrives is an ordinary protocol-2
message of an ordinary chord: workers, Flower and the `celery` command see no difference.

A task that others wait for goes to the front of its queue, which Celery has no option for: on one plain
Redis its recorded message is put where the workers take from. Elsewhere such a task goes to the back like
any other, and is only done later.
"""

from __future__ import annotations

import base64
import json
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast
from uuid import uuid4

from celery import Celery
from kombu import Connection
from kombu.transport import memory

from torchord.cache import keys
from torchord.cache.scripts import source


class _Channel(memory.Channel):
    queues: dict[str, Any] = {}  # noqa: RUF012  as in its base class; not those of other memory transports in this process


class _Transport(memory.Transport):
    Channel = _Channel


_recording = threading.Lock()


def recorded(publish: Callable[..., object], queue: str, **options: Any) -> dict[str, Any]:
    """The message that Celery would send, as a Redis list has it in JSON.

    Args:
        publish: sends it: `Celery.send_task` with its task, or a signature's `apply_async`.
        queue: where it goes.
        options: for `publish`.
    """
    with _recording, Connection(transport=_Transport) as connection:
        publish(queue=queue, producer=connection.Producer(), add_to_parent=False, **options)
        found: dict[str, Any] = connection.default_channel._get(queue)
        return found


class StepTemplate:
    """Renders the header messages of one run's steps.

    Args:
        app: the Celery app whose settings the messages follow.
        task: name of the header's task.
        kwargs: its keyword arguments but for "step", "version" and "shard"; "run" is one.
        queue: where the header's tasks go.
        body: name of the callback's task.
        body_kwargs: its keyword arguments but for "step".
        body_queue: where the callback goes.
        rounds: whether its tasks are seats in rounds, and say how many steps those have.
    """

    def __init__(
        self,
        app: Celery,
        *,
        task: str,
        kwargs: dict[str, Any],
        queue: str,
        body: str,
        body_kwargs: dict[str, Any],
        body_queue: str,
        rounds: bool = False,
    ) -> None:
        self.queue = queue
        self.run = str(kwargs["run"])
        # Numbers that stand for step, shard and version; drawn, so that nothing else equals them.
        numbers = (str(10**17 + secrets.randbelow(10**17)) for _ in range(4))
        self._step, self._shard, self._version, self._steps = numbers
        self._ids = {name: str(uuid4()) for name in ("task", "group", "body")}
        callback = app.signature(
            body,
            kwargs={**body_kwargs, "step": int(self._step)},
            queue=body_queue,
            ignore_result=True,
            argsrepr="(receipts,)",
        )
        callback.freeze(self._ids["body"])
        step, shard = int(self._step), int(self._shard)
        arguments = {**kwargs, "step": step, "shard": shard, "version": int(self._version)}
        if rounds:
            arguments["steps"] = int(self._steps)
        message = recorded(
            partial(app.send_task, task),
            queue,
            kwargs=arguments,
            task_id=self._ids["task"],
            group_id=self._ids["group"],
            group_index=shard,
            chord=dict(callback),
            ignore_result=True,
            root_id=self._ids["task"],
            parent_id=self._ids["group"],
        )
        message["headers"]["parent_id"] = None
        self._tag = str(message["properties"]["delivery_tag"])
        message["body"], self._body = "@body@", base64.b64decode(message["body"]).decode()
        self._envelope = json.dumps(message)
        for name, token in (
            ("task", self._ids["task"]),
            ("group", self._ids["group"]),
            ("shard", self._shard),
        ):
            if token not in self._envelope or (name == "task" and self._tag not in self._envelope):
                raise ValueError(f"a recorded Celery message has no {name} id where one was expected")

    def render(
        self, step: int, version: int, shards: Sequence[int], steps: int = 1
    ) -> tuple[str, list[bytes]]:
        """(group id, one message a shard or seat), as they lie in a Redis list.

        Args:
            steps: how many the round has whose seats these are; 1: they are shards of one step.
        """
        group, callback = str(uuid4()), str(uuid4())
        ids = self._ids
        body = (
            self._body.replace(self._step, str(step))
            .replace(self._version, str(version))
            .replace(self._steps, str(steps))
            .replace(ids["body"], callback)
            .replace(ids["group"], group)
        )
        envelope = self._envelope.replace(self._step, str(step)).replace(self._version, str(version))
        envelope = envelope.replace(self._steps, str(steps)).replace(ids["group"], group)
        messages = []
        for index, shard in enumerate(shards):
            task, number = str(uuid4()), str(shard)
            text = body.replace(self._shard, number).replace(ids["task"], task)
            encoded = base64.b64encode(text.encode()).decode()
            message = envelope.replace(f'"group_index": {self._shard}', f'"group_index": {index}')
            message = message.replace(self._shard, number).replace(ids["task"], task)
            message = message.replace(self._tag, str(uuid4())).replace("@body@", encoded)
            messages.append(message.encode())
        return group, messages


class CallbackTemplate:
    """Renders the callback of a chord once its results are known, without Celery's canvas.

    Args:
        app: the Celery app whose settings the message follows.
        callback: the chord's body as a header task carries it: a signature as a dict, with keyword
            arguments "run" and "step" and no others.
    """

    def __init__(self, app: Celery, callback: Mapping[str, Any]) -> None:
        self._step = str(10**17 + secrets.randbelow(10**17))
        self._ids = {name: str(uuid4()) for name in ("task", "root", "parent")}
        options = {name: value for name, value in callback["options"].items() if name != "task_id"}
        self.queue = str(options["queue"])
        results = "@results@"
        signature = app.signature(
            callback["task"],
            args=([results],),
            kwargs={**callback["kwargs"], "step": int(self._step)},
            options=options,
        )
        message = recorded(
            signature.apply_async,
            self.queue,
            task_id=self._ids["task"],
            root_id=self._ids["root"],
            parent_id=self._ids["parent"],
        )
        self._tag = str(message["properties"]["delivery_tag"])
        body = base64.b64decode(message["body"]).decode()
        before, found, self._tail = body.partition(f"[[{json.dumps(results)}]]")
        # Plain text: the script that puts the results in could not encode it.
        message["properties"]["body_encoding"] = None
        message["body"] = "@body@"
        self._before, _, self._after = json.dumps(message).partition('"@body@"')
        envelope = self._before + self._after
        missing = [token for token in (*self._ids.values(), self._tag) if token not in envelope]
        if before != "[" or not found or self._step not in self._tail or missing:
            raise ValueError("a recorded Celery message is not built as expected")

    def render(self, callback: Mapping[str, Any], *, root: str, parent: str) -> tuple[str, str, str]:
        """The message of one callback before and after its body, and the body after its arguments.

        Args:
            callback: as for the constructor, of this step.
            root, parent: ids of the first task of the workflow and of the one that calls.
        """
        step, tag = str(callback["kwargs"]["step"]), str(uuid4())
        replaced = (
            (self._step, step),
            (self._ids["task"], str(callback["options"]["task_id"])),
            (self._ids["root"], root),
            (self._ids["parent"], parent),
            (self._tag, tag),
        )
        before, after = self._before, self._after
        for token, value in replaced:
            before, after = before.replace(token, value), after.replace(token, value)
        return before, after, self._tail.replace(self._step, step)


def push(
    app: Celery,
    template: StepTemplate,
    step: int,
    version: int,
    shards: Sequence[int],
    *,
    joining: int = 0,
    steps: int = 1,
    seconds: float | None = None,
    fault: Callable[[str], None] | None = None,
) -> None:
    """Publish one step in one round trip: the chord's size, then its messages, at the run's turn.

    Args:
        joining: header tasks that are published later: the step's partial sums.
        steps: as for `StepTemplate.render`.
        seconds: that each will take, see `enqueue`.
        fault: if given, the first message goes in a round trip of its own and `fault` is called
            between the two; tests use it to die in the middle of a launch.
    """
    group, messages = template.render(step, version, shards, steps)
    backend = cast(Any, app.backend)
    size = (backend.get_key_for_group(group, ".s"), len(messages) + joining, int(backend.expires))
    if fault is not None and len(messages) > 1:
        enqueue(app, template.queue, template.run, [messages.pop(0)], size=size, seconds=seconds)
        fault("sender.mid_launch")
    enqueue(app, template.queue, template.run, messages, size=size, seconds=seconds)


def enqueue(
    app: Celery,
    queue: str,
    run: str,
    messages: Sequence[bytes],
    *,
    flow: str = "",
    seconds: float | None = None,
    size: tuple[str | bytes, int, int] | None = None,
) -> None:
    """Put messages of a run where its share of the fleet has them taken, for apps whose result backend is the
    broker: see scripts/ranked.lua.

    Args:
        flow: whose turn it is, beside the run's own; "" for that.
        seconds: that each will take; None: what a shard of the run takes.
        size: key, size and TTL (s) of the chord that they are; it is set before them.
    """
    client = cast(Any, app.backend).client
    names = [queue, keys.TURNS, keys.RunKeys(run).head, *([] if size is None else [size[0]])]
    chord = ["", ""] if size is None else list(size[1:])
    each = "" if seconds is None else seconds
    client.register_script(source("enqueue"))(
        keys=names, args=[f"{run}{flow}", each, keys.WORK_TTL_SECONDS, *chord, *messages]
    )


def push_front(app: Celery, task: str, *, queue: str, **options: Any) -> None:
    """Publish a task so that the next free worker takes it; for apps whose result backend is the broker.

    Args:
        options: as for `Celery.send_task`.
    """
    message = recorded(partial(app.send_task, task), queue, **options)
    cast(Any, app.backend).client.rpush(queue, json.dumps(message).encode())
