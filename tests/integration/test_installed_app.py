"""torchord in somebody's own Celery app: their tasks keep Celery's semantics, and a run trains beside them.

The app is tests/support/shop.py, copied into a directory of its own; its workers are started there by
Celery's console script and serve its own queue and torchord's.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import chord
from celery.exceptions import ChordError, TaskRevokedError

from tests.support import models, reference
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord import LocalCluster, Master, TrainingConfig
from torchord.coordinator.local_cluster.import_path import ROOT

SOURCE = ROOT / "tests" / "support" / "shop.py"
CELERY = Path(sysconfig.get_path("scripts")) / "celery"
QUEUES = "celery,gradients,updates"


class Shop:
    """The project in a directory of its own, and its workers.

    Args:
        folder: that directory.
        url: where its messages are.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        shutil.copy(SOURCE, folder / "shop.py")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCHORD_URL", url)
            patch.setattr("torchord.tasks.install.settings", type("Settings", (), {"url": url}))
            spec = importlib.util.spec_from_file_location("shop", folder / "shop.py")
            assert spec is not None and spec.loader is not None
            self.module: Any = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self.module)

    @property
    def store(self) -> redis.Redis:
        """What the tasks write to."""
        found: redis.Redis = self.module.store
        return found

    @contextmanager
    def worker(self, name: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker that is ready: the console script, in the project's directory."""
        log = self.folder / f"{name}.log"
        environment = {**os.environ, "TORCHORD_URL": self.url, "TORCHORD_ALLOWED_MODULES": "tests,torch"}
        environment["PYTHONPATH"] = str(ROOT)
        command = [CELERY, "-A", "shop", "worker", "-n", f"{name}@%h", "-l", "INFO", *options]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            wait_until(lambda: b" ready." in log.read_bytes(), message=lambda: log.read_text()[-3000:])
            yield process
        finally:
            kill(process)

    def inspect(self) -> Any:
        """Remote control of the one worker that runs."""
        return self.module.app.control.inspect(timeout=5.0, limit=1)

    def begun(self, key: str, times: int = 1) -> None:
        """Wait until a task says that it has begun."""
        wait_until(lambda: self.store.llen(f"shop:{key}") >= times, message=f"{key} to begin")

    def go_on(self, key: str) -> None:
        """Let a task that waits return."""
        self.store.rpush(f"shop:{key}:go", "go")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill -9 for a worker and its pool."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """The project, with one worker of Celery's default pool that serves everything."""
    with LocalCluster(workers=0) as server:
        one = Shop(tmp_path_factory.mktemp("shop"), server.url)
        with one.worker("one", "-Q", QUEUES, "-c", "2"):
            yield one
        one.module.app.close()
        one.store.close()


@pytest.fixture
def key() -> str:
    """A name that no other test uses."""
    return uuid.uuid4().hex


# --- their tasks ------------------------------------------------------------------------------


def test_results_and_chords(shop: Shop) -> None:
    assert shop.module.add.delay(1, 2).get(PATIENCE_SECONDS) == 3
    header = [shop.module.add.s(i, i) for i in range(5)]
    assert chord(header)(shop.module.total.s()).get(PATIENCE_SECONDS) == 20
    failed = shop.module.fails.delay()
    with pytest.raises(ValueError, match="on purpose"):
        failed.get(PATIENCE_SECONDS)
    assert failed.state == "FAILURE"


def test_retries_and_eta(shop: Shop) -> None:
    assert shop.module.third_time.delay().get(PATIENCE_SECONDS) == 2
    assert shop.module.add.apply_async((2, 3), countdown=0.5).get(PATIENCE_SECONDS) == 5


def test_a_replaced_task(shop: Shop) -> None:
    """Also as a part of a chord."""
    assert shop.module.replaced.delay(1).get(PATIENCE_SECONDS) == 101
    header = [shop.module.replaced.s(i) for i in range(2)]
    assert chord(header)(shop.module.total.s()).get(PATIENCE_SECONDS) == 201


def test_a_chord_that_fails_calls_its_error_callback(shop: Shop, key: str) -> None:
    header = [shop.module.add.s(1, 1), shop.module.fails.s()]
    body = shop.module.total.s().on_error(shop.module.heard.s(key))
    result = chord(header)(body)
    wait_until(lambda: result.state == "FAILURE", message="the chord to fail")
    assert isinstance(result.result, ChordError)
    shop.begun(key)
    (said,) = shop.store.lrange(f"shop:{key}", 0, -1)
    assert said.startswith("ChordError: ") and "on purpose" in said


def test_a_task_that_is_rejected_comes_again(shop: Shop, key: str) -> None:
    assert shop.module.second_delivery.delay(key).get(PATIENCE_SECONDS) is True
    assert shop.store.lrange(f"shop:{key}", 0, -1) == ["first", "second"]


def test_inspect_shows_what_runs(shop: Shop, key: str) -> None:
    """With arguments, as a task that is acknowledged when it begins; and what waits in the worker."""
    task = shop.module.waits.delay(key)
    shop.begun(key)
    later = shop.module.add.apply_async((1, 1), countdown=3600)
    wait_until(lambda: any(shop.inspect().scheduled().values()), message="the later task")
    ((active,),) = shop.inspect().active().values()
    assert (active["id"], active["name"]) == (task.id, "shop.waits")
    assert (active["args"], active["kwargs"], active["acknowledged"]) == ([key], {}, True)
    ((state, said),) = (found[task.id] for found in shop.inspect().query_task(task.id).values())
    assert (state, said["id"]) == ("active", task.id)
    ((scheduled,),) = shop.inspect().scheduled().values()
    assert scheduled["request"]["id"] == later.id
    later.revoke()
    shop.go_on(key)
    assert task.get(PATIENCE_SECONDS) == "told"


def test_inspect_shows_what_is_reserved(shop: Shop, key: str) -> None:
    """Both processes of the pool are busy; the worker has taken a third task."""
    running = [shop.module.waits.delay(key) for _ in range(2)]
    shop.begun(key, times=2)
    third = shop.module.add.delay(1, 1)
    found = wait_until(lambda: any(shop.inspect().reserved().values()) and shop.inspect().reserved())
    assert [task["id"] for tasks in found.values() for task in tasks] == [third.id]
    for _ in running:
        shop.go_on(key)
    assert [task.get(PATIENCE_SECONDS) for task in running] == ["told", "told"]
    assert third.get(PATIENCE_SECONDS) == 2


def test_revoked_while_it_runs(shop: Shop, key: str) -> None:
    waiting = shop.module.waits.delay(key)
    shop.begun(key)
    waiting.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        waiting.get(PATIENCE_SECONDS)
    assert waiting.state == "REVOKED"
    assert shop.module.add.delay(4, 4).get(PATIENCE_SECONDS) == 8


def test_a_killed_worker_s_task_runs_again(shop: Shop, key: str, tmp_path: Path) -> None:
    """Kombu's record of what is not acknowledged is kept for their queue, and looked at by another worker."""
    with shop.worker("two", "-Q", "alone", "-c", "1", "--pool", "solo") as two:
        task = shop.module.waits_acks_late.apply_async((key,), queue="alone")
        shop.begun(key)
        kill(two)
    with shop.worker("three", "-Q", "alone", "-c", "1", "--pool", "solo"):
        shop.begun(key, times=2)
        shop.go_on(key)
        assert task.get(PATIENCE_SECONDS) == "told"


# --- torchord beside them -----------------------------------------------------------------------


def test_a_run_trains_on_their_workers(shop: Shop, tmp_path: Path) -> None:
    """To the bits of a plain loop, with the chord counted by us and nothing left behind."""
    config = TrainingConfig(epochs=2, batch_size=8, shards=2)
    recipe = models.mlp(16)
    run = Master(shop.url, checkpoint_dir=str(tmp_path)).submit(recipe, config, name="beside")
    assert shop.module.add.delay(1, 1).get(PATIENCE_SECONDS) == 2
    trained = run.wait(timeout=PATIENCE_SECONDS)
    assert reference.bits(trained.module) == reference.accumulate(recipe, config).bits
    assert run.verify().ok


def test_a_worker_of_theirs_alone_is_no_worker_of_ours(shop: Shop) -> None:
    """It serves their queue, says nothing to torchord's registry and does not load torch."""
    ours = Master(shop.url)._services.registry
    with shop.worker("plain", "-Q", "celery", "-c", "1", "--pool", "solo") as plain:
        maps = Path(f"/proc/{plain.pid}/maps")
        assert not any(info.node.startswith("plain@") for info in ours.alive().values())
        if sys.platform == "linux":
            assert "libtorch" not in maps.read_text()
