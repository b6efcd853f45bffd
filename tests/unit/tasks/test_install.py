"""`torchord.install`: what it adds to somebody's Celery app, and what it leaves as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from celery import Celery, current_app
from kombu import Connection, Queue
from kombu.transport import redis

import torchord
from torchord.cache import errors
from torchord.cache.errors import InvalidInput
from torchord.coordinator.local_cluster.import_path import ROOT
from torchord.coordinator.messages.broker import celery_url, same_server
from torchord.coordinator.messages.task_names import COMPUTE_GRADIENT, GRADIENTS, QUEUES, UPDATES
from torchord.tasks import transport
from torchord.tasks.celery_app import ROUTES, settings
from torchord.tasks.worker import TorchordStep


def made(name: str = "shop", **conf: object) -> Celery:
    """Somebody's app, whose broker is where torchord's messages are."""
    app = Celery(name, broker=settings.url, backend="rpc://", set_as_current=False)
    app.conf.update(conf)
    return app


@pytest.fixture
def app() -> Iterator[Celery]:
    yield torchord.install(made())


def test_tasks_queues_routes_and_step_are_added(app: Celery) -> None:
    assert set(ROUTES) <= set(app.tasks)
    assert {"celery", *QUEUES} == set(app.amqp.queues.consume_from)
    routed = app.amqp.router.route({}, COMPUTE_GRADIENT)
    assert (routed["queue"].name, routed["queue"].exchange.name) == (GRADIENTS, "")
    assert app.amqp.router.route({}, "shop.add")["queue"].name == "celery"
    assert TorchordStep in app.steps["consumer"]


def test_twice_is_once(app: Celery) -> None:
    before = (app.conf.task_routes, dict(app.amqp.queues), set(app.steps["consumer"]))
    torchord.install(app)
    assert before == (app.conf.task_routes, dict(app.amqp.queues), set(app.steps["consumer"]))


def test_what_our_tasks_need_is_theirs_alone(app: Celery) -> None:
    """The app's own tasks keep the app's settings, and its result backend."""

    @app.task(name="shop.add_alone", shared=False)
    def add(x: int, y: int) -> int:
        return x + y

    ours, theirs = app.tasks[COMPUTE_GRADIENT], app.tasks["shop.add_alone"]
    assert (ours.acks_late, ours.reject_on_worker_lost, ours.ignore_result) == (True, True, True)
    assert (theirs.acks_late, theirs.reject_on_worker_lost, theirs.ignore_result) == (False, None, False)
    assert ours.app is theirs.app is app
    assert ours.backend is torchord.app.backend and theirs.backend is app.backend is not ours.backend


def test_nothing_else_of_the_app_changes() -> None:
    app, untouched = torchord.install(made()), made()
    changed = {name for name in untouched.conf if app.conf[name] != untouched.conf[name]}
    assert changed == {"task_routes"}
    assert app.amqp.Connection is untouched.amqp.Connection is Connection
    assert app.amqp.autoexchange is None


def test_other_apps_of_the_process_are_left_alone() -> None:
    """Neither do they get our tasks, nor our transport; and the current app is not ours."""
    other = made("other")
    other.finalize()
    assert not set(ROUTES) & set(other.tasks)
    assert current_app != torchord.app
    with Connection(settings.url) as connection:
        assert connection.get_transport_cls() is redis.Transport
    with torchord.app.connection_for_write() as ours:
        assert ours.get_transport_cls() is transport.Transport
        assert ours.clone().get_transport_cls() is transport.Transport
        assert ours.as_uri().startswith(("redis://", "unix://"))


@pytest.mark.parametrize("installed", [True, False])
def test_discovering_the_tasks_of_all_packages_neither_installs_nor_disturbs(installed: bool) -> None:
    """Celery imports `torchord.tasks` then, and does not say for which app."""
    app = made()
    app.autodiscover_tasks(["torchord"])
    if installed:
        torchord.install(app)
    app.loader.import_default_modules()
    assert bool(set(ROUTES) & set(app.tasks)) is (TorchordStep in app.steps["consumer"]) is installed


def test_queues_of_the_same_name_stay_theirs() -> None:
    app = torchord.install(made(task_queues=[Queue("gradients"), Queue("celery")]))
    queues = app.amqp.queues
    queues.select(["gradients", "updates"])
    assert set(queues.consume_from) == {"gradients", UPDATES}


@pytest.mark.parametrize(
    ("theirs", "routed"),
    [
        ({"shop.*": {"queue": "sales"}}, "sales"),
        (({"shop.add": {"queue": "sales"}}, {"shop.*": {"queue": "other"}}), "sales"),
        ([[("shop.*", {"queue": "sales"})]], "sales"),
        (None, "celery"),
    ],
)
def test_their_routes_go_on(theirs: object, routed: str) -> None:
    app = torchord.install(made(task_routes=theirs))
    assert app.amqp.router.route({}, "shop.add")["queue"].name == routed
    assert app.amqp.router.route({}, COMPUTE_GRADIENT)["queue"].name == GRADIENTS


def test_everything_that_stands_in_the_way_is_one_error() -> None:
    app = Celery("shop", broker="amqp://user:word@host//", set_as_current=False)
    app.conf.update(
        accept_content=["pickle", "yaml"],
        broker_transport_options={"global_keyprefix": "shop:"},
        worker_pool="gevent",
    )
    with pytest.raises(InvalidInput) as caught:
        torchord.install(app)
    said = str(caught.value)
    for part in (
        "in the Celery app 'shop'", "broker_url is 'amqp://", "TORCHORD_URL", repr(settings.url),
        "accept_content is ['pickle', 'yaml']", "add 'json'", "global_keyprefix: leave it out",
        "worker_pool is 'gevent'", "threads, prefork or solo",
    ):  # fmt: skip
        assert part in said, said
    assert "word" not in said.replace("password", "")
    assert TorchordStep not in app.steps["consumer"] and not set(ROUTES) & set(app.tasks)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("redis://h", "redis://:word@h:6379/0", True),
        ("redis://h/1", "redis://h/0", False),
        ("redis://h:1", "redis://h:2", False),
        ("redis://h/2", "rediss://h/2?ssl_cert_reqs=required", True),
        ("redis+socket:///run/r.sock?virtual_host=2", celery_url("unix:///run/r.sock?db=2"), True),
        ("redis+socket:///run/r.sock", "redis+socket:///run/other.sock", False),
        ("sentinel://a:1/3;sentinel://b:2/3", celery_url("sentinel://b:2,a:1/service/3"), True),
        ("sentinel://a:1/3", celery_url("sentinel://b:2,a:1/service/3"), False),
        ("amqp://h", "redis://h", False),
    ],
)
def test_one_server_and_another(one: str, other: str, same: bool) -> None:
    assert same_server(one, other) is same_server(other, one) is same


def test_the_page_says_of_every_error_whose_fault_it_is() -> None:
    page = (ROOT / "docs" / "your-project.md").read_text()
    _, _, table = page.partition("## Whose fault it is")
    table, _, _ = table.partition("\n## ")
    named = re.findall(r"`(\w+)`", table)
    known = {name for name, value in vars(errors).items() if isinstance(value, type)} - {"TorchordError"}
    assert {name for name in named if name in known} == known
    assert len([name for name in named if name in known]) == len(known), "each once"
