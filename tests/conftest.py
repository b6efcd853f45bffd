"""Fixtures of every test: a real server, a database of one's own, and clusters.

| fixture | what a test gets |
| --- | --- |
| `redis_server` | the session's embedded server (`.url`, `.port`, `.pid`) |
| `redis_url` | URL of an empty database on it, emptied afterwards |
| `cluster` | a function that starts a `LocalCluster`, stopped afterwards |
| `no_keys_without_ttl` | automatic: a test with one of the two above fails if a torchord key has no TTL |

`--times` ends with a table of the slowest files.
"""

from __future__ import annotations

import gc
import itertools
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import kombu.pools
import pytest
import redis
import torch

from tests.support.keys import keys_without_ttl
from tests.support.processes import guardian_pid, responds
from tests.support.times import table_of_times
from tests.support.warm_workers import WarmWorkers
from torchord.coordinator.local_cluster.cluster import LocalCluster
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer
from torchord.coordinator.spec import start_place

DATABASES = 1024
MOST_FILES = 200
_numbers = itertools.count(1)


@pytest.fixture(autouse=True, scope="session")
def neutral_environment() -> Iterator[None]:
    """No setting of the developer's own shell reaches a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("TORCHORD_", "CELERY_")) and name != "TORCHORD_TEST_MARK":
                patch.delenv(name)
        # Workers that tests have in this process admit the tests' recipes, as if they were named.
        others = tuple(name for name in start_place.OWN_FOLDERS if name != "tests")
        patch.setattr(start_place, "OWN_FOLDERS", others)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two files of tests run at a time, beside workers: torch's threads would wait for cores by spinning."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def warm_workers() -> Iterator[WarmWorkers]:
    """The processes whose forks are the workers of this session's clusters."""
    with tempfile.TemporaryDirectory(prefix="warm-") as folder, pytest.MonkeyPatch.context() as patch:
        warm = WarmWorkers(Path(folder))  # not below tmp_path: a socket's path is short
        patch.setattr("torchord.coordinator.local_cluster.cluster.Guardian", warm.guardian)
        yield warm
        warm.close()


@pytest.fixture(autouse=True, scope="module")
def cold_workers(request: pytest.FixtureRequest, warm_workers: WarmWorkers) -> Iterator[None]:
    """In a file that says `COLD = True`, workers are started as they are elsewhere."""
    warm_workers.cold = getattr(request.module, "COLD", False)
    yield
    warm_workers.cold = False


@pytest.fixture(autouse=True, scope="module")
def few_open_files() -> Iterator[None]:
    """What a file of tests leaves open is closed: kombu's pools keep a connection to each URL."""
    yield
    if len(os.listdir("/dev/fd")) > MOST_FILES:
        kombu.pools.reset()
        gc.collect()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedServer]:
    """The session's server, on a free port, in memory, started when first asked for."""
    with EmbeddedServer(options={"databases": DATABASES}) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: EmbeddedServer) -> Iterator[str]:
    """URL of a database that this test has for itself; its keys go when the test ends."""
    url = f"{redis_server.url.removesuffix('/0')}/{1 + next(_numbers) % (DATABASES - 1)}"
    yield url
    client = redis.Redis.from_url(url)
    client.flushdb()  # of the server that we started above
    client.close()


@pytest.fixture
def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., LocalCluster]]:
    """A function with the arguments of `LocalCluster`: starts one whose workers are ready.

    Logs and checkpoints go below `tmp_path`; the logs of a test that fails are shown with it.
    """
    clusters: list[LocalCluster] = []

    def start(workers: int = 2, **arguments: Any) -> LocalCluster:
        folder = tmp_path / f"cluster{len(clusters)}"
        defaults = {"log_dir": folder / "logs", "checkpoint_dir": folder / "checkpoints", "wait_ready": True}
        if "url" in arguments:  # such workers admit a checkout's tests only where they are named
            arguments["env"] = {"TORCHORD_ALLOWED_MODULES": ".,torch,tests", **arguments.get("env", {})}
        started = LocalCluster(workers, **{**defaults, **arguments})
        clusters.append(started)
        started.start()
        return started

    yield start
    forever: list[str] = []
    try:
        for one in clusters:
            if guardian_pid(one) is not None and responds(one.broker):
                forever += keys_without_ttl(one.url)
    finally:
        for one in clusters:
            for worker in one.processes.values():
                worker.kill()  # a warm shutdown would take each test another second
            one.stop()
    assert not forever, f"keys without a TTL: {forever[:20]}"


@pytest.fixture(autouse=True)
def no_keys_without_ttl(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a torchord key without TTL in its database."""
    if "redis_url" not in request.fixturenames:
        yield
        return
    url = request.getfixturevalue("redis_url")
    yield
    forever = keys_without_ttl(url)
    assert not forever, f"keys without a TTL: {forever[:20]}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The switches of the table of times, and of the long form of the property test of models."""
    parser.addoption("--times", action="store_true", help="end with the slowest files, in a table")
    parser.addoption("--models", type=int, default=None, help="random models that test_grammar.py tries")
    parser.addoption(
        "--fuzz", type=int, default=None, help="inputs that test_fuzzing.py tries with each parser"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Tell what tests have to say of themselves, and where the time went, when asked."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    for report in [each for each in reports if getattr(each, "when", "") == "call"]:
        for text in [text for name, text in report.user_properties if name == "summary"]:
            terminalreporter.write_line(str(text))
    if config.getoption("--times"):
        terminalreporter.section("where the time went")
        for line in table_of_times([each for each in reports if isinstance(each, pytest.TestReport)]):
            terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of each worker's log below a failed test."""
    report = yield
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    if call.when == "call" and report.failed and folder is not None:
        for log in sorted(folder.glob("cluster*/logs/*.log")):
            text = log.read_bytes()[-8192:].decode(errors="replace")
            report.sections.append((f"log {log.relative_to(folder)}", text))
    return report
