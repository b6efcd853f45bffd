"""torchord in somebody's own Celery app."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from celery import Celery

from torchord.cache.errors import InvalidInput
from torchord.cache.servers.address import masked
from torchord.coordinator.messages.broker import add, celery_url, same_server
from torchord.coordinator.messages.task_names import GRADIENTS, QUEUES
from torchord.tasks.celery_app import MODULES, ROUTES, settings
from torchord.tasks.flower_pages.start import show_runs
from torchord.tasks.registry import register


def install(app: Celery) -> Celery:
    """Have an app's workers serve torchord's queues beside its own.

    Adds to the app torchord's tasks, their routes, the queues `torchord.gradients` and `torchord.updates`
    (for which `-Q` also takes `gradients` and `updates`, unless the app has queues of these names), and what
    a worker on one of them needs beside its tasks. As with every queue of an app, a worker without `-Q`
    serves them. No setting of the app changes: its own tasks run as before. Doing it twice changes nothing.

    Args:
        app: with its settings; they are read here.

    Returns:
        The app.

    Raises:
        InvalidInput: a setting stands in the way. The message names all that do, each with what to set.

    Example:
        >>> app = Celery("shop", broker="redis://localhost:6379/0")
        >>> install(app).main
        'shop'
    """
    problems = list(_problems(app))
    if problems:
        listed = "\n".join(f"    {problem}" for problem in problems)
        raise InvalidInput(f"torchord cannot be installed in the Celery app {app.main!r}:\n{listed}")
    for module in MODULES:
        import_module(module)
    register(app)
    if GRADIENTS not in app.amqp.queues:
        for name in QUEUES:
            add(app, name)
        theirs = app.conf.task_routes or ()
        app.conf.task_routes = (ROUTES, *(theirs if isinstance(theirs, list | tuple) else (theirs,)))
    from torchord.tasks.worker import TorchordStep

    app.steps["consumer"].add(TorchordStep)
    show_runs(app, whole=False)
    return app


def _problems(app: Celery) -> Iterator[str]:
    """The settings that stand in the way, each with what to set."""
    broker = app.conf.broker_url
    if not isinstance(broker, str) or not same_server(broker, celery_url(settings.url)):
        shown = masked(broker) if isinstance(broker, str) else broker
        yield (
            f"broker_url is {shown!r}, and torchord's messages are at {masked(settings.url)!r}: give the "
            "environment variable TORCHORD_URL and broker_url the same server and database"
        )
    accepted = sorted(app.conf.accept_content or ())
    if not {"json", "application/json"} & set(accepted):
        yield f"accept_content is {accepted}: add 'json', in which torchord's messages are written"
    if (app.conf.broker_transport_options or {}).get("global_keyprefix"):
        yield "broker_transport_options has a global_keyprefix: leave it out, torchord's queues have none"
    if app.conf.worker_pool in ("gevent", "eventlet"):
        yield (
            f"worker_pool is {app.conf.worker_pool!r}, which does not let a worker answer while torch "
            "computes: use threads, prefork or solo"
        )
