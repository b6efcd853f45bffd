"""Our queues' names, and the short ones that `-Q` and `-X` take for them."""

from __future__ import annotations

from celery import Celery
from kombu import Queue

from torchord.coordinator.local_cluster import cluster
from torchord.coordinator.messages.broker import declared
from torchord.coordinator.messages.task_names import GRADIENTS, QUEUES, UPDATES, private_queue, worker_command
from torchord.tasks.celery_app import app


def consumed(app: Celery, *, include: str = "", exclude: str = "") -> set[str]:
    """Names of the queues that a worker with these options consumes."""
    queues = app.amqp.Queues(app.conf.task_queues)
    queues.select([name for name in include.split(",") if name])
    queues.deselect([name for name in exclude.split(",") if name])
    return {queue.name for queue in queues.consume_from.values()}


def test_short_names_mean_our_queues() -> None:
    """So do the full ones, for a worker that is told what to serve and what not."""
    assert consumed(app) == set(QUEUES) == {"torchord.gradients", "torchord.updates"}
    assert consumed(app, include="gradients") == consumed(app, include=GRADIENTS) == {GRADIENTS}
    assert consumed(app, include="updates,more") == {UPDATES, "more"}
    assert consumed(app, exclude="gradients") == consumed(app, exclude=GRADIENTS) == {UPDATES}
    assert worker_command(GRADIENTS) == "celery -A torchord worker -Q gradients -c 1"


def test_a_short_name_that_the_app_uses_itself_stays_its_own() -> None:
    """The full name reaches ours."""
    theirs = Celery("theirs", set_as_current=False)
    queues = [Queue("gradients"), Queue("celery")]
    taken = {queue.name for queue in queues}
    theirs.conf.task_queues = [*queues, *(declared(name, taken=taken) for name in QUEUES)]
    assert consumed(theirs, include="gradients") == {"gradients"}
    assert consumed(theirs, include=f"{GRADIENTS},updates") == {GRADIENTS, UPDATES}
    assert consumed(theirs, exclude="gradients,updates") == {"celery", GRADIENTS}


def test_a_local_cluster_serves_them_by_their_full_names() -> None:
    """So that a short one that its app has for itself is not taken for ours."""
    assert dict(cluster.QUEUES) == {"server": UPDATES, "client": GRADIENTS}


def test_a_private_queue_has_no_short_name() -> None:
    """Nobody but its own training server consumes it."""
    assert declared(private_queue("server@host")).alias is None
