"""The Celery app as the `celery` command and its workers see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from tests.support import models
from tests.support.fleet import Fleet, fleet
from tests.support.waiting import wait_until
from torchord import Master, TrainingConfig
from torchord.cache.errors import CacheUnreachable
from torchord.coordinator.local_cluster.import_path import ROOT
from torchord.coordinator.messages import task_names
from torchord.coordinator.messages.broker import celery_url


def python(code: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code, or a module's command line, in a fresh interpreter with a plain environment."""
    return subprocess.run(
        [sys.executable, "-P", *(("-c", code) if code else ()), *arguments],
        cwd=folder,
        env={"PATH": os.defpath, "PYTHONPATH": str(ROOT), "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """`celery -A torchord worker`."""
    with fleet(tmp_path_factory.mktemp("app"), workers=1, layout="single") as one:
        yield one


# --- settings that cannot be used ------------------------------------------------------------

UNUSABLE = [
    ("TORCHORD_SERVER_MEMORY_BYTES", "4GB", "must be a whole number of bytes"),
    ("TORCHORD_DATASET_DISK_BYTES", "-1", "must be a whole number of bytes"),
    ("TORCHORD_CACHE_REPLICAS", "one", "must be a whole number, such as 0"),
    ("TORCHORD_CACHE_WEIGHTS", "1,much", "must be numbers between commas"),
    ("TORCHORD_HOST_CACHE", "maybe", "must be on or off"),
    ("TORCHORD_OVERLAP", "upload,colect", "must be on, off, or some of collect, fetch, upload"),
    ("TORCHORD_URL", "rediss:/nowhere", "cannot be used"),
    ("TORCHORD_URL_FILE", "/no/such/file", "cannot be read"),
]


@pytest.mark.parametrize(("name", "value", "said"), UNUSABLE)
def test_a_setting_that_cannot_be_used_is_one_line_to_whoever_starts_a_worker(
    name: str, value: str, said: str, tmp_path: Path
) -> None:
    done = python("", tmp_path, "-m", "celery", "-A", "torchord", "worker", **{name: value})
    assert done.returncode == 1 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("torchord: ") and said in line and (name in line or value in line)


def test_to_python_it_is_an_error_like_others(tmp_path: Path) -> None:
    code = """
from torchord.cache.errors import InvalidInput
try:
    import torchord.tasks
except InvalidInput as error:
    print(error)
"""
    done = python(code, tmp_path, TORCHORD_TASK_LOG="perhaps")
    assert done.stdout == "TORCHORD_TASK_LOG must be on or off, not 'perhaps'\n", done.stderr


# --- what the app is ------------------------------------------------------------------------


def test_the_tasks_are_those_that_the_coordinator_names(tmp_path: Path) -> None:
    """The coordinator knows tasks by name only, so the names must agree; and each says why twice is safe."""
    code = """
from torchord.tasks import app
app.loader.import_default_modules()
for name, task in sorted(app.tasks.items()):
    if not name.startswith("celery."):
        print(name, "twice" in (task.__doc__ or ""), task.ignore_result, task.acks_late)
"""
    found = python(code, tmp_path)
    assert found.returncode == 0, found.stderr
    names = [str(value) for name, value in vars(task_names).items() if name.isupper()]
    tasks = sorted({name for name in names if name.startswith("torchord.")} - set(task_names.QUEUES))
    assert found.stdout.splitlines() == [f"{name} True True True" for name in tasks]


def test_the_celery_commands_do_not_load_torch(tmp_path: Path) -> None:
    """Flower, `inspect` and the like start quickly; a worker loads torch before its pool starts."""
    code = "import sys, tasks; tasks.app.loader.import_default_modules(); print('torch' in sys.modules)"
    found = python(code, tmp_path)
    assert (found.stdout.strip(), found.returncode) == ("False", 0), found.stderr


def test_the_app_is_found_from_any_directory(tmp_path: Path) -> None:
    found = python(
        "", tmp_path, "-m", "celery", "-A", "torchord", "report", TORCHORD_URL="redis://127.0.0.1:7/3"
    )
    assert found.returncode == 0, found.stderr
    for part in ("redis://127.0.0.1:7/3", "accept_content: ['json']", "task_serializer: 'json'"):
        assert part in found.stdout


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, (), "redis://localhost:6379/0"),
        ({"TORCHORD_URL": "redis://a:1/2"}, (), "redis://a:1/2"),
        ({"TORCHORD_URL": "redis://a:1/2"}, ("-b", "redis://b:3/4"), "redis://b:3/4"),
    ],
)
def test_whose_url_it_is(
    tmp_path: Path, environment: dict[str, str], arguments: tuple[str, ...], expected: str
) -> None:
    """Argument, then environment, then default; broker and result backend are one server."""
    found = python("", tmp_path, "-m", "celery", "-A", "torchord", *arguments, "report", **environment)
    shown = expected.replace("//", "//:********@")  # Celery hides a password, also where there is none
    assert f"broker_url: '{shown}'" in found.stdout, found.stdout
    assert f"result_backend: '{expected}'" in found.stdout


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        ("redis://", "redis://localhost:6379/0"),
        ("redis://h?db=3", "redis://h:6379/3"),
        ("valkey://h/3?socket_timeout=5", "redis://h:6379/3"),
        ("redis://h?username=ada&password=a%40b", "redis://ada:a%40b@h:6379/0"),
        ("redis+socket:///run/r.sock?virtual_host=3", "redis+socket:///run/r.sock?virtual_host=3"),
        ("unix:///run/r.sock", "redis+socket:///run/r.sock?virtual_host=0"),
        ("unix:///run/r.sock?db=3", "redis+socket:///run/r.sock?virtual_host=3"),
        ("unix://:word@/run/r.sock", "redis+socket://:word@/run/r.sock?virtual_host=0"),
        ("rediss://h:1/2", "rediss://h:1/2?ssl_cert_reqs=required"),
        ("rediss://h:1/2?ssl_cert_reqs=none", "rediss://h:1/2?ssl_cert_reqs=none"),
    ],
)
def test_the_broker_url_in_celerys_spelling(url: str, expected: str) -> None:
    assert celery_url(url) == expected


@pytest.mark.parametrize(
    "url", ["http://h", "h:1", "redis://h:x/0", "redis://h/zero", "redis://:word@h/zero"]
)
def test_a_broker_url_that_is_none(url: str) -> None:
    with pytest.raises(CacheUnreachable, match="cannot be used") as caught:
        celery_url(url)
    assert "word" not in str(caught.value)


TYPED = {
    "": "threads",
    "--pool prefork": "prefork",
    "--pool=prefork": "prefork",
    "-P prefork -c 2": "prefork",
    "-Pprefork": "prefork",
    "--pool threads": "threads",
    "-Q prefork -n pool@prefork": "threads",
}


def test_the_pool_that_was_typed(tmp_path: Path) -> None:
    """Celery takes a typed `prefork` for its own default; the app's default must not win over it."""
    code = f"""
import json
from torchord.tasks.celery_app import _pool
print(json.dumps({{typed: _pool(typed.split()) for typed in {list(TYPED)!r}}}))
"""
    found = python(code, tmp_path)
    assert json.loads(found.stdout) == TYPED, found.stderr


@pytest.mark.parametrize("typed", ["prefork", "solo", "threads"])
def test_the_pool_that_celery_takes(tmp_path: Path, typed: str) -> None:
    code = f"""
import sys
sys.argv = ["celery", "-A", "torchord", "worker", "-P", {typed!r}]
from celery.apps.worker import Worker
from celery.bin.celery import celery
Worker.start = lambda self: print("POOL", self.pool_cls.__module__)
celery()
"""
    found = python(code, tmp_path, TORCHORD_URL="redis://127.0.0.1:7/0")
    module = {"threads": "thread"}.get(typed, typed)
    assert f"POOL celery.concurrency.{module}" in found.stdout, found.stderr


# --- what it does ---------------------------------------------------------------------------


def test_a_worker_says_who_it_is(single: Fleet) -> None:
    """Its registry entry names node, queues, process and what could change bits."""
    registry = single.master._services.registry
    wait_until(lambda: all(i.environment for i in registry.alive().values()), message="the second beat")
    (info,) = registry.alive().values()
    pid = single.cluster.processes["worker"].pid
    assert info.pid == pid and info.node.startswith("worker@")
    assert set(info.queues) == {*task_names.QUEUES, task_names.private_queue(info.node)}
    assert "torch" in info.environment and "cpu" in info.environment.lower()
    assert psutil.Process(pid).is_running()


def test_remote_control_answers(single: Fleet, tmp_path: Path) -> None:
    """`celery inspect` works, also from a shell that only knows the URL."""
    url = single.cluster.url
    found = python("", tmp_path, "-m", "celery", "-A", "torchord", "inspect", "registered", TORCHORD_URL=url)
    assert found.returncode == 0, found.stderr
    for name in (task_names.COMPUTE_GRADIENT, task_names.APPLY_UPDATE, task_names.PREDICT):
        assert f"* {name}" in found.stdout


def test_a_run_leaves_no_message_and_no_binding(single: Fleet) -> None:
    """Queues are empty, nothing waits for an acknowledgement, and no queue's name stays behind (I7)."""
    single.train(models.mlp(16), TrainingConfig(batch_size=8), "tidy")
    client = redis.Redis.from_url(single.cluster.url, decode_responses=True)
    try:
        info = next(iter(single.master._services.registry.alive().values()))
        for queue in info.queues:
            assert client.llen(queue) == 0
        names = list(client.scan_iter(count=1000))
    finally:
        client.close()
    assert not [name for name in names if name.startswith(("unacked", "celery-task-meta-"))]
    assert not [name for name in names if "binding" in name and "pidbox" not in name and "deadl" not in name]


def test_submitting_alone_writes_what_is_listed(redis_url: str, tmp_path: Path) -> None:
    """A submit is a spec, a head, two indexes and one message: nothing of Celery's bookkeeping."""
    Master(redis_url, checkpoint_dir=str(tmp_path)).submit(models.mlp(), TrainingConfig(), name="only")
    client = redis.Redis.from_url(redis_url, decode_responses=True)
    try:
        names = set(client.scan_iter(count=1000))
        assert client.llen(task_names.UPDATES) == 1
    finally:
        client.close()
    assert {task_names.UPDATES, "torchord:runs", "torchord:active"} <= names
    assert {name for name in names if not name.startswith("torchord:{only}:")} == {
        task_names.UPDATES, "torchord:runs", "torchord:active",
    }  # fmt: skip
